//! CPU time of whole processes as the kernel programs read it, against the process's own CPU clock, and what they tell
//! of threads and processes that come and go. The process is this one: its threads bear the names of QEMU's.

#![expect(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "a test may panic, and prints what it measured"
)]

use std::{
    collections::HashSet,
    io::Write as _,
    process::{Child, Command, Stdio},
    sync::{
        Arc, Barrier,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};

use monitor::{
    source::ebpf::{Ebpf, Happened, ProcessSlot, ProcessTimes, Torn, probes::ProbeGroup},
    units::{Tgid, nanoseconds},
};
use procfs::CurrentSI as _;
use rustix::time::{ClockId, clock_gettime};

#[path = "support/ring.rs"]
mod ring;

use ring::Ring;

/// The scheduler's clock is known to that.
const CLOCK_ERROR_NS: u64 = 20_000;
/// A scheduler tick at `CONFIG_HZ=100`, the longest there is: as long as the kernel's own figure may lag.
const TICK_NS: u64 = 10_000_000;
const PATIENCE: Duration = Duration::from_secs(240);

fn clock(id: ClockId) -> u64 {
    let now = clock_gettime(id);
    nanoseconds(now.tv_sec, now.tv_nsec)
}

fn this_process() -> Tgid {
    Tgid(std::process::id())
}

fn follow(ebpf: &mut Ebpf, tgid: Tgid) -> ProcessSlot {
    let slot = ebpf.follow_process(tgid).unwrap();
    ebpf.seed().unwrap();
    slot
}

fn read(ebpf: &mut Ebpf, slot: &ProcessSlot) -> ProcessTimes {
    for _ in 0..1000 {
        ebpf.read().unwrap();
        if let Some(Ok(times)) = ebpf.process_times(slot) {
            return times;
        }
    }
    panic!("the process cannot be read: {:?}", ebpf.process_times(slot));
}

/// Threads that burn CPU time until told to stop, then say how much by their own clocks, and wait to be let go.
struct Burners {
    stop: Arc<AtomicBool>,
    rest: Arc<Barrier>,
    end: Arc<Barrier>,
    used: Vec<Arc<AtomicU64>>,
    threads: Vec<JoinHandle<()>>,
}

impl Burners {
    fn start(names: &[&str]) -> Self {
        let stop = Arc::<AtomicBool>::default();
        let (rest, end) = (Arc::new(Barrier::new(names.len() + 1)), Arc::new(Barrier::new(names.len() + 1)));
        let used: Vec<Arc<AtomicU64>> = names.iter().map(|_| Arc::default()).collect();
        let start = |(name, used): (&&str, &Arc<AtomicU64>)| {
            let (stop, rest, end, used) =
                (Arc::clone(&stop), Arc::clone(&rest), Arc::clone(&end), Arc::clone(used));
            let burn = move || {
                while !stop.load(Ordering::Relaxed) {
                    std::hint::spin_loop();
                }
                used.store(clock(ClockId::ThreadCPUTime), Ordering::Release);
                rest.wait();
                end.wait();
            };
            std::thread::Builder::new().name((*name).to_owned()).spawn(burn).unwrap()
        };
        let threads = names.iter().zip(&used).map(start).collect();
        Self { stop, rest, end, used, threads }
    }

    /// Stops them; each has said what it used and sleeps.
    fn rest(&self) -> Vec<u64> {
        self.stop.store(true, Ordering::Relaxed);
        self.rest.wait();
        std::thread::sleep(Duration::from_millis(20)); // Until the last of them sleeps.
        self.used.iter().map(|used| used.load(Ordering::Acquire)).collect()
    }

    fn end(self) {
        self.end.wait();
        self.threads.into_iter().for_each(|thread| thread.join().unwrap());
    }
}

/// The process's clock before and after, the reading in between. Only this thread runs, and the kernel brings the figure of
/// the thread that asks up to date, so the three differ by the time in between and nothing else.
#[test]
fn a_process_has_the_time_of_its_own_clock_and_each_class_that_of_its_threads() {
    let mut ebpf = Ebpf::open(ProbeGroup::ALL).unwrap();
    let slot = follow(&mut ebpf, this_process());
    let burners = Burners::start(&["CPU 0/TCG", "IO iothread1", "worker", "vhost-1"]);
    let begin = read(&mut ebpf, &slot);
    std::thread::sleep(Duration::from_millis(400));
    let running = read(&mut ebpf, &slot);
    let used = burners.rest();
    let before = clock(ClockId::ProcessCPUTime);
    let times = read(&mut ebpf, &slot);
    let after = clock(ClockId::ProcessCPUTime);
    println!(
        "clock {before} to {after} ns, read {} ns; threads used {used:?}, read {times:?}",
        times.time_ns
    );
    assert!(
        (before..=after + CLOCK_ERROR_NS).contains(&times.time_ns),
        "read {} ns, the process's own clock says {before} to {after}",
        times.time_ns
    );
    for (own, read) in used.iter().zip([times.vcpu_ns, times.iothread_ns, times.worker_ns, times.vhost_ns]) {
        // Between reading its clock and sleeping a thread runs on for a moment.
        assert!((*own..*own + 5_000_000).contains(&read), "read {read} ns of a thread that used {own}");
    }
    assert!(begin.time_ns <= running.time_ns && running.time_ns <= times.time_ns, "went backwards");
    // However much of the host's CPUs they got.
    let ran = running.time_ns - begin.time_ns;
    assert!(ran > used.iter().sum::<u64>() / 2, "{ran} ns counted while threads ran that used {used:?}");
    burners.end();
    let ended = read(&mut ebpf, &slot);
    assert_eq!(ended.ended, 4, "threads that ended");
    assert!(
        ended.vcpu_ns >= times.vcpu_ns && ended.worker_ns >= times.worker_ns,
        "time went with its thread"
    );
    // What the kernel's own sum lacks of four threads that ended since its last update of each.
    let kernel = clock(ClockId::ProcessCPUTime);
    println!("the kernel lost {} ns of four threads", ended.time_ns.saturating_sub(kernel));
    assert!(ended.time_ns <= kernel + 4 * TICK_NS, "{ended:?}, but the clock says {kernel}");
}

/// 20,000 threads of a few microseconds each, in the process and beside it, while it is read over and over: nothing is
/// lost or counted twice, and each reading is either right or none.
#[test]
fn a_storm_of_threads_is_counted_to_the_last() {
    const THREADS: u64 = 20_000;
    let mut ebpf = Ebpf::open(ProbeGroup::ALL).unwrap();
    let slot = follow(&mut ebpf, this_process());
    let first = read(&mut ebpf, &slot);
    let begun = Instant::now();
    let cpus: u64 = std::thread::available_parallelism().unwrap().get().try_into().unwrap();
    let own = Arc::new(AtomicU64::new(0));
    let total = Arc::clone(&own);
    let storm = std::thread::spawn(move || {
        for _ in 0..THREADS / 2 {
            let pair = [(); 2].map(|()| {
                let total = Arc::clone(&total);
                let work = move || {
                    total.fetch_add(clock(ClockId::ThreadCPUTime), Ordering::Relaxed);
                };
                std::thread::Builder::new().name("worker".to_owned()).spawn(work).unwrap()
            });
            pair.into_iter().for_each(|thread| thread.join().unwrap());
        }
    });
    let beside = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "a_storm_beside", "--ignored"])
        .stdout(Stdio::null())
        .spawn();
    let mut beside = beside.unwrap();
    let (mut reads, mut torn, mut backwards, mut last) = (0_u32, 0_u32, 0_u32, first);
    while !storm.is_finished() {
        ebpf.read().unwrap();
        ebpf.happened();
        reads += 1;
        match ebpf.process_times(&slot) {
            Some(Ok(times)) => {
                let now = clock(ClockId::ProcessCPUTime);
                let lost = (times.ended - first.ended + 2) * TICK_NS;
                assert!(times.time_ns <= now + lost, "{} ns read, but the clock says {now}", times.time_ns);
                assert!(times.ended >= last.ended, "{last:?} {times:?}");
                // What a hypervisor below took of a run in progress is known only at the kernel's next update.
                backwards += u32::from(times.time_ns < last.time_ns);
                last = times;
            }
            Some(Err(Torn)) => torn += 1,
            None => panic!("the process is gone"),
        }
    }
    storm.join().unwrap();
    assert!(beside.wait().unwrap().success());
    let kernel = clock(ClockId::ProcessCPUTime);
    let times = read(&mut ebpf, &slot);
    let own = own.load(Ordering::Relaxed);
    println!(
        "{reads} reads, {torn} of them torn, {backwards} behind the one before; {} threads ended; read {} ns, the kernel's clock {kernel} ns; workers used \
         {own} ns by their own clocks, read {} ns",
        times.ended, times.time_ns, times.worker_ns
    );
    assert!(times.time_ns + CLOCK_ERROR_NS >= kernel, "less than the kernel counts");
    let most = u64::try_from(begun.elapsed().as_nanos()).unwrap() * cpus;
    assert!(times.time_ns - first.time_ns <= most, "more than the CPUs have");
    assert!(times.ended - first.ended >= THREADS, "{} ended", times.ended - first.ended);
    assert!(times.worker_ns >= own, "the workers used {own} ns, read {}", times.worker_ns);
    assert!(torn + backwards < reads / 2, "hardly ever read");
}

/// The same number of threads in a process that nobody follows.
#[test]
#[ignore = "another test runs it beside itself"]
fn a_storm_beside() {
    for _ in 0..20_000 {
        std::thread::spawn(|| ()).join().unwrap();
    }
}

/// Threads that fall asleep all the time: while their CPU looks for something else to run they are still on it, and have
/// used no more than when they fell asleep.
#[test]
fn a_thread_that_falls_asleep_takes_nothing_back() {
    const READINGS: u64 = 20_000;
    /// What is stolen in pieces much shorter than a tick shows in no figure: then another round.
    const ROUNDS: u32 = 3;
    let mut ebpf = Ebpf::open(ProbeGroup::ALL).unwrap();
    let cpus = std::thread::available_parallelism().unwrap().get();
    let mut ring = Ring::new(8, cpus - 1);
    ring.rest(Duration::from_micros(100));
    for tid in &ring.tids {
        std::fs::write(format!("/proc/self/task/{}/comm", tid.0), "worker").unwrap();
    }
    let slot = follow(&mut ebpf, this_process());
    ring.begin();
    let mut round = || {
        let (stolen, mut falls, mut most, mut last) = (stolen_ticks(), 0, 0, 0);
        for _ in 0..READINGS {
            ebpf.read().unwrap();
            if let Ok(times) = ebpf.process_times(&slot).unwrap() {
                falls += u64::from(times.worker_ns < last);
                most = most.max(last.saturating_sub(times.worker_ns));
                last = times.worker_ns;
            }
        }
        let stolen = stolen_ticks() - stolen;
        println!(
            "{falls} of {READINGS} readings say less than the one before, {most} ns at most; {stolen} ticks were stolen"
        );
        // What a hypervisor below took of a run in progress is known only at the kernel's next update, and the scheduler's
        // clock to some microseconds.
        falls <= READINGS / 500 + 20 * stolen
    };
    assert!((0..ROUNDS).any(|_| round()), "too many readings say less than the one before, each time");
}

/// What a hypervisor below took of this host's CPUs, clock ticks of 10 ms.
fn stolen_ticks() -> u64 {
    procfs::KernelStats::current().unwrap().total.steal.unwrap_or(0)
}

fn until_told(ebpf: &mut Ebpf, wanted: Happened) {
    let end = Instant::now() + PATIENCE;
    while Instant::now() < end {
        if ebpf.happened().contains(&wanted) {
            return;
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    panic!("{wanted:?} was never told");
}

fn sleeper() -> Child {
    Command::new("sleep").arg("3600").stdin(Stdio::null()).spawn().unwrap()
}

/// Whether a process is found by its id is of no help here: the kernel says it before anybody looks.
#[test]
fn threads_and_processes_are_told_as_they_come_and_go() {
    let mut ebpf = Ebpf::open(ProbeGroup::ALL).unwrap();
    let slot = follow(&mut ebpf, this_process());
    ebpf.happened();
    std::thread::Builder::new().name("CPU 7/KVM".to_owned()).spawn(|| {}).unwrap().join().unwrap();
    until_told(&mut ebpf, Happened::Threads(this_process()));
    // A second time: having taken note once must not be the end of it.
    std::thread::Builder::new().name("CPU 8/KVM".to_owned()).spawn(|| {}).unwrap().join().unwrap();
    until_told(&mut ebpf, Happened::Threads(this_process()));
    ebpf.forget_process(slot);

    let dir = std::env::temp_dir().join(format!("kvm-monitor-test-{}", std::process::id()));
    std::fs::create_dir_all(&dir).unwrap();
    let program = dir.join("qemu-system-test");
    std::fs::copy("/bin/sleep", &program).unwrap();
    let mut child = Command::new(&program).arg("3600").spawn().unwrap();
    until_told(&mut ebpf, Happened::Began(Tgid(child.id())));
    let slot = follow(&mut ebpf, Tgid(child.id()));
    read(&mut ebpf, &slot);
    child.kill().unwrap();
    until_told(&mut ebpf, Happened::Ended(Tgid(child.id())));
    child.wait().unwrap();
    ebpf.forget_process(slot);
    std::fs::remove_dir_all(&dir).unwrap();
}

/// The kernel hands out ids one after the other; root may say which one was the last.
#[test]
fn a_reused_process_id_is_not_the_process_that_was_followed() {
    let mut ebpf = Ebpf::open(ProbeGroup::ALL).unwrap();
    let mut first = sleeper();
    let slot = follow(&mut ebpf, Tgid(first.id()));
    read(&mut ebpf, &slot);
    let id = first.id();
    first.kill().unwrap();
    first.wait().unwrap();
    let mut others = Vec::new();
    let second = (0..1000).find_map(|_| {
        let mut last_pid =
            std::fs::OpenOptions::new().write(true).open("/proc/sys/kernel/ns_last_pid").unwrap();
        write!(last_pid, "{}", id - 1).unwrap();
        let child = sleeper();
        if child.id() == id {
            return Some(child);
        }
        others.push(child);
        None
    });
    let reading = {
        ebpf.read().unwrap();
        ebpf.process_times(&slot)
    };
    ebpf.forget_process(slot);
    let slot = follow(&mut ebpf, Tgid(id));
    let anew = read(&mut ebpf, &slot);
    let reused = second.is_some();
    for mut child in others.into_iter().chain(second) {
        child.kill().unwrap();
        child.wait().unwrap();
    }
    assert!(reused, "process id {id} could not be had again");
    assert_eq!(reading, None, "another process was read");
    assert_eq!(anew.threads, 1);
}

/// Slots that are given back are used again, and no process is found by another's.
#[test]
fn slots_are_given_back() {
    let mut ebpf = Ebpf::open(ProbeGroup::ALL).unwrap();
    for _ in 0..3 {
        let mut children: Vec<Child> = (0..20).map(|_| sleeper()).collect();
        let slots: Vec<ProcessSlot> =
            children.iter().map(|child| ebpf.follow_process(Tgid(child.id())).unwrap()).collect();
        ebpf.seed().unwrap();
        ebpf.read().unwrap();
        let starts: HashSet<u64> =
            slots.iter().map(|slot| ebpf.process_times(slot).unwrap().unwrap().start_boottime_ns).collect();
        assert_eq!(starts.len(), children.len());
        slots.into_iter().for_each(|slot| ebpf.forget_process(slot));
        for child in &mut children {
            child.kill().unwrap();
            child.wait().unwrap();
        }
    }
}
