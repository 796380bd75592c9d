//! The eBPF figures of run and wait time against independent truth, on this machine's kernel.
//!
//! The programs read what the kernel keeps itself, so agreeing with schedstat proves little. Two tests therefore use
//! a thread of this process whose time is known otherwise: by its own CPU clock, and by a real-time thread that
//! keeps it from running. Both fail if the interval in progress is left out. The others read real guests' vCPU
//! threads between two readings of schedstat under every kind of load.
//!
//! `KVM_MONITOR_PARITY_SECONDS` (default 3) is the length of each phase of those.

#![expect(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "a test may panic, and prints what it measured"
)]

#[path = "support/quota.rs"]
mod quota;
#[path = "support/ring.rs"]
mod ring;
#[path = "support/threads.rs"]
mod threads;

use std::{
    collections::BTreeMap,
    path::Path,
    sync::atomic::Ordering,
    time::{Duration, Instant},
};

use lab::{Guest, GuestSpec, Hog, Lab, LabDirs, Which, is_emulated_host};
use monitor::{
    inventory::QemuProcess,
    source::{
        ebpf::{Doing, Ebpf, Keep, Slot, ThreadTimes, probes::ProbeGroup},
        procfs::{SchedStat, ThreadReader},
    },
    units::{Tgid, Tid, Window},
};
use quota::Quota;
use ring::Ring;
use threads::{Bully, PATIENCE, Spinner, pin};

/// The scheduler's clock is compared with `CLOCK_MONOTONIC` at each of our own switches; between the kernel's reading
/// of it and ours lies the rest of that switch.
const CLOCK_ERROR_NS: u64 = 20_000;
/// A scheduler tick at `CONFIG_HZ=100`, the longest there is.
const TICK_NS: u64 = 10_000_000;
/// The CPU that the loads run on.
const CPU: usize = 1;
const OTHER_CPU: usize = 0;

fn follow(ebpf: &mut Ebpf, tid: Tid) -> Slot {
    let slot = ebpf.follow(tid, Keep::Everything, None).unwrap();
    ebpf.seed().unwrap();
    slot
}

fn read(ebpf: &mut Ebpf, slot: &Slot) -> (Window, ThreadTimes) {
    for _ in 0..1000 {
        let window = ebpf.read().unwrap();
        if let Some(times) = ebpf.times(slot) {
            return (window, times);
        }
    }
    panic!("the thread cannot be read");
}

/// A thread that never leaves its CPU between two reads: only the interval in progress makes its figure right. Its own
/// CPU clock, read just after ours, may be ahead by the time that has passed in between, and no more.
///
/// What interrupts or a hypervisor below this host took since the last tick is not run time, but nobody knows of it
/// before the kernel's next update: a reading in between may be ahead by as much, rarely.
#[test]
fn a_run_in_progress_is_counted_to_the_microsecond() {
    // Whoever reads must not keep the other from its CPU: then there is no run in progress.
    let reader = std::thread::spawn(|| {
        pin(OTHER_CPU);
        check_runs_in_progress();
    });
    reader.join().unwrap();
}

fn check_runs_in_progress() {
    let mut ebpf = Ebpf::open(ProbeGroup::ALL).unwrap();
    let spinner = Spinner::start(CPU);
    let slot = follow(&mut ebpf, spinner.tid);
    let (mut worst, mut without, mut ahead) = (0, 0, 0);
    for _ in 0..200 {
        std::thread::sleep(Duration::from_millis(3));
        let (window, times) = read(&mut ebpf, &slot);
        let (own, at) = spinner.own_time();
        let passed = at.since(window.begin) + CLOCK_ERROR_NS;
        let over = times.run_ns.saturating_sub(own + CLOCK_ERROR_NS);
        assert!(over <= TICK_NS, "{over} ns ahead of the thread's own clock ({times:?})");
        ahead += u32::from(over > 0);
        let behind = own.saturating_sub(times.run_ns);
        assert!(behind <= passed, "{behind} ns behind, but only {passed} ns have passed ({times:?})");
        worst = worst.max(behind);
        without += u32::from(own.saturating_sub(times.run_ns - times.open_run_ns) > passed);
    }
    println!(
        "run in progress: at most {worst} ns behind, {ahead} of 200 ahead; without it {without} would be wrong"
    );
    assert!(ahead <= 100, "{ahead} of 200 readings are ahead of the thread's own clock");
    assert!(without > 0, "the test proves nothing: the kernel's own figure was always up to date");
}

/// A thread that a real-time thread keeps from its CPU: the whole time is one wait, which schedstat does not show before
/// it is over. Between two readings it must have waited for as long as lies between them.
#[test]
fn a_wait_in_progress_is_counted_to_the_microsecond() {
    let mut ebpf = Ebpf::open(ProbeGroup::ALL).unwrap();
    let victim = Spinner::start(CPU);
    let slot = follow(&mut ebpf, victim.tid);
    let file = schedstat(victim.tid);
    let proven = (0..20).filter(|_| {
        let bully = Bully::start(CPU);
        let turns = victim.turns.load(Ordering::Relaxed);
        let before = file.read(&mut [0; 256]).unwrap();
        let (first, a) = read(&mut ebpf, &slot);
        std::thread::sleep(Duration::from_millis(50));
        let (second, b) = read(&mut ebpf, &slot);
        let after = file.read(&mut [0; 256]).unwrap();
        let turned = victim.turns.load(Ordering::Relaxed) != turns;
        drop(bully);
        // The kernel lets ordinary threads run for a moment each second, whatever the real-time ones do.
        if turned {
            return false;
        }
        let (least, most) = (second.begin.since(first.end), second.end.since(first.begin));
        let waited = b.wait_ns - a.wait_ns;
        assert!(
            (least - CLOCK_ERROR_NS..=most + CLOCK_ERROR_NS).contains(&waited),
            "waited {waited} ns of {least} to {most}"
        );
        assert_eq!(before.wait, after.wait, "schedstat shows a wait before it is over");
        assert_eq!(a.run_ns, b.run_ns, "it ran while it waited");
        true
    });
    let proven = proven.count();
    println!("wait in progress: {proven} of 20 waits of 50 ms measured within {CLOCK_ERROR_NS} ns");
    assert!(proven >= 5, "the thread was hardly ever kept waiting: nothing was tested");
}

fn schedstat(tid: Tid) -> ThreadReader {
    let process = QemuProcess { tgid: Tgid(std::process::id()), start_time_ticks: 0 };
    ThreadReader::open(Path::new("/proc"), process, tid).unwrap()
}

/// What both sources said at one moment.
type Pair = (ThreadTimes, SchedStat);

/// Differences found in one phase.
#[derive(Default)]
struct Phase {
    compared: u32,
    /// Largest difference of the change in one second, nanoseconds: run, wait.
    change: [u64; 2],
    /// Largest part of it that the interval in progress does not explain.
    unexplained: [u64; 2],
    /// Share of the wall time, per cent, summed over threads: run, wait.
    share: [f64; 2],
}

/// Threads of a guest that are followed, each with its schedstat.
struct Followed {
    ebpf: Ebpf,
    threads: Vec<(Slot, ThreadReader)>,
}

impl Followed {
    /// Loads the programs, and follows the guest's vCPUs.
    fn new(guest: &Guest) -> Self {
        let process = QemuProcess { tgid: Tgid(guest.pid), start_time_ticks: 0 };
        let mut ebpf = Ebpf::open(ProbeGroup::ALL).unwrap();
        let threads = guest.vcpu_tids().unwrap().into_iter().map(|tid| {
            let file = ThreadReader::open(Path::new("/proc"), process, Tid(tid)).unwrap();
            (follow(&mut ebpf, Tid(tid)), file)
        });
        let threads = threads.collect();
        Self { ebpf, threads }
    }

    /// schedstat is read between two eBPF readings: it can show nothing that the second does not, and everything that the
    /// first had finished. Once a second the change of both is compared.
    fn compare(&mut self, load: &str) -> Phase {
        let seconds =
            std::env::var("KVM_MONITOR_PARITY_SECONDS").ok().and_then(|s| s.parse().ok()).unwrap_or(3);
        let mut phase = Phase::default();
        let mut last: BTreeMap<usize, (Window, Pair)> = BTreeMap::new();
        let begin: Vec<(Window, ThreadTimes)> = self.read_all();
        for _ in 0..=seconds {
            for (i, (slot, file)) in self.threads.iter().enumerate() {
                let (before, a) = read(&mut self.ebpf, slot);
                let stat = file.read(&mut [0; 256]).unwrap();
                let (after, b) = read(&mut self.ebpf, slot);
                bracket("run", [a.run_ns - a.open_run_ns, b.run_ns], stat.run.0);
                bracket("wait", [a.wait_ns - a.open_wait_ns, b.wait_ns], stat.wait.0);
                if let Some((_, earlier)) = last.get(&i) {
                    phase.add(*earlier, (a, stat), after.end.since(before.begin));
                }
                last.insert(i, (before, (a, stat)));
            }
            std::thread::sleep(Duration::from_secs(1));
        }
        for ((begin, first), (end, second)) in begin.iter().zip(self.read_all()) {
            #[expect(clippy::cast_precision_loss, reason = "a percentage")]
            let share = |ns: u64| 100.0 * ns as f64 / end.begin.since(begin.begin) as f64;
            phase.share[0] += share(second.run_ns - first.run_ns);
            phase.share[1] += share(second.wait_ns - first.wait_ns);
        }
        assert!(phase.compared > 0, "compared nothing");
        println!(
            "{load:<34} {:>3} compared, run {:5.1} %, wait {:5.1} %  |ebpf − schedstat| per second: run ≤ {:>8} ns, \
             wait ≤ {:>9} ns, unexplained {} and {} ns",
            phase.compared,
            phase.share[0],
            phase.share[1],
            phase.change[0],
            phase.change[1],
            phase.unexplained[0],
            phase.unexplained[1]
        );
        phase
    }

    fn read_all(&mut self) -> Vec<(Window, ThreadTimes)> {
        self.threads.iter().map(|(slot, _)| read(&mut self.ebpf, slot)).collect()
    }
}

/// A real guest's vCPU thread: at rest, busy, beside two others that want its CPU, among 200 threads that switch as fast as
/// they can (and the programs loaded meanwhile), and kept from its CPU by a quota.
#[test]
fn a_vcpu_agrees_with_schedstat_under_every_load() {
    let quota = Quota::new(); // Goes after the guest has left it.
    let lab = Lab::start(&LabDirs::from_env().unwrap()).unwrap();
    let spec = GuestSpec {
        vcpus: 1,
        vcpu_pin: Some(CPU.to_string()),
        ..GuestSpec::new("parity", "wait burn=cpu0:3600s")
    };
    let guest = lab.boot(&spec).unwrap();
    guest.wait_begin(Which::Kind("wait"), PATIENCE).unwrap();
    let mut followed = Followed::new(&guest);
    followed.compare("idle");
    guest.go_on(PATIENCE).ok(); // The step that follows does not end.
    let busy = followed.compare("busy");
    let hogs = [Hog::start(&lab, CPU).unwrap(), Hog::start(&lab, CPU).unwrap()];
    let contended = followed.compare("two busy processes on its CPU");
    check_culprits(&mut followed, &hogs);
    drop(hogs);
    assert!(busy.share[0] > contended.share[0], "the hogs took nothing");
    assert!(contended.share[1] > 20.0, "the vCPU hardly waited: {:.1} %", contended.share[1]);

    let mut rings = [Ring::new(100, CPU), Ring::new(100, 0)];
    rings.iter_mut().for_each(Ring::begin);
    let hops = || rings.iter().map(|ring| ring.hops.load(Ordering::Relaxed)).sum::<u64>();
    let mut followed = Followed::new(&guest);
    rings[0].rest(Duration::from_micros(200));
    let (begin, before) = (Instant::now(), hops());
    let among = followed.compare("200 threads that switch");
    let switched = hops() - before;
    println!("  they switched {} times a second", u128::from(switched) * 1000 / begin.elapsed().as_millis());
    assert!(switched > 10_000, "{switched} switches");
    assert!(among.share[0] > 2.0, "the vCPU hardly ran: {:.1} %", among.share[0]);
    drop(rings);

    quota.take(Tid(guest.vcpu_tids().unwrap()[0]));
    let before = followed.read_all()[0].1.throttled_ns;
    let throttled = followed.compare("CFS quota of 20 %");
    assert!(followed.read_all()[0].1.throttled_ns > before, "it was never throttled");
    assert!(throttled.share[1] > 20.0, "the quota took nothing: {:.1} %", throttled.share[1]);
    drop((guest, lab));
    drop(quota);
}

#[test]
fn many_vcpus_on_two_cpus_agree_with_schedstat() {
    // Emulated CPUs that take turns do not bring eight of them to their first step.
    let vcpus = if is_emulated_host() { 4 } else { 8 };
    let lab = Lab::start(&LabDirs::from_env().unwrap()).unwrap();
    let spec = GuestSpec { vcpus, ..GuestSpec::new("crowd", "wait burn=all:3600s") };
    let guest = boot_many_vcpus(&lab, &spec);
    guest.go_on(PATIENCE).ok(); // The step that follows does not end.
    let mut followed = Followed::new(&guest);
    assert_eq!(followed.threads.len(), vcpus as usize);
    let phase = followed.compare(&format!("{vcpus} busy vCPUs on the host's CPUs"));
    assert!(phase.share[0] > 50.0, "they hardly ran: {phase:.1?}", phase = phase.share);
}

/// A guest at its first step. QEMU 7.2 itself dies at times (SIGSEGV in a vCPU thread) where many emulated vCPUs begin at
/// once: then another one is booted, once, and that is told.
fn boot_many_vcpus(lab: &Lab, spec: &GuestSpec) -> Guest {
    let boot = |spec| {
        let guest = lab.boot(spec).unwrap();
        let begun = guest.wait_begin(Which::Kind("wait"), PATIENCE);
        (guest, begun)
    };
    let (guest, begun) = boot(spec);
    let Err(error) = begun else { return guest };
    assert!(!guest.is_alive(), "{error:?}");
    println!("{error}; booting it once more");
    // Another name: libvirt may not have noticed yet.
    let (guest, begun) = boot(&GuestSpec { name: format!("{}-again", spec.name), ..spec.clone() });
    begun.unwrap();
    guest
}

/// While two endless loops share the vCPU's core, each is charged what it took by its own schedstat, and the charges
/// sum to the time waited. A vCPU that always wants to run waits whenever one of them runs; and when it runs, every wait is
/// charged and the loops' schedstat, of threads that do not run, is exact.
fn check_culprits(followed: &mut Followed, hogs: &[Hog]) {
    let first = Moment::take(followed, hogs);
    std::thread::sleep(Duration::from_secs(3));
    let second = Moment::take(followed, hogs);
    let waited = second.times.wait_ns - first.times.wait_ns;
    let sum = second.charged.values().sum::<u64>() + second.unknown_ns;
    println!("  waited {waited} ns, charged {sum} ns, of which to unknown {} ns", second.unknown_ns);
    assert!(sum.abs_diff(waited) <= waited / 100, "charged {sum} of {waited} ns");
    // More than the history holds may have run in one wait, on a host that does other things.
    assert!(second.unknown_ns <= waited / 4, "nobody known for {} of {waited} ns", second.unknown_ns);
    // What they did while the vCPU slept is nothing that it waited for.
    let passed = second.times.sched_ns - first.times.sched_ns;
    let slept = passed - (second.times.on_cpu_ns - first.times.on_cpu_ns) - waited;
    for ((hog, before), after) in hogs.iter().zip(first.hogs).zip(second.hogs) {
        let took = after - before;
        let charged = second.charged.get(&hog.pid()).copied().unwrap_or(0);
        println!(
            "  process {} took {took} ns by its schedstat, and is charged {charged} ns; the vCPU slept {slept} ns",
            hog.pid()
        );
        assert!(took > 100_000_000, "it hardly ran: nothing was tested");
        assert!(charged <= took + took / 100, "charged {charged} of {took} ns");
        assert!(charged + slept + second.unknown_ns + took / 100 >= took, "charged {charged} of {took} ns");
    }
}

/// A moment at which the vCPU runs.
struct Moment {
    times: ThreadTimes,
    /// Run time of the processes beside it by their schedstat.
    hogs: Vec<u64>,
    /// Charged since the moment before, by the id of the culprit.
    charged: BTreeMap<u32, u64>,
    unknown_ns: u64,
}

impl Moment {
    fn take(followed: &mut Followed, hogs: &[Hog]) -> Self {
        let (slot, _) = &followed.threads[0];
        let (mut charged, mut unknown_ns) = (BTreeMap::new(), 0);
        let deadline = Instant::now() + PATIENCE;
        loop {
            assert!(Instant::now() < deadline, "it never runs for long enough");
            let (_, times) = read(&mut followed.ebpf, slot);
            let run = hogs.iter().map(|hog| hog.time().unwrap().run_ns).collect();
            let charges = followed.ebpf.take_charges(slot).unwrap();
            for culprit in charges.culprits {
                *charged.entry(culprit.id).or_default() += culprit.ns;
            }
            unknown_ns += charges.unknown_ns;
            *charged.entry(u32::MAX).or_default() += charges.other_ns;
            let (_, after) = read(&mut followed.ebpf, slot);
            let still = |t: &ThreadTimes| (t.doing == Doing::Running, t.preemptions, t.yields);
            if times.doing == Doing::Running && still(&times) == still(&after) {
                return Self { times, hogs: run, charged, unknown_ns };
            }
            std::thread::sleep(Duration::from_micros(300));
        }
    }
}

fn bracket(what: &str, [low, high]: [u64; 2], stat: u64) {
    assert!(low <= stat, "{what}: schedstat has {stat}, but {low} had already ended before it was read");
    assert!(
        stat <= high + CLOCK_ERROR_NS,
        "{what}: schedstat has {stat}, more than the {high} read after it"
    );
}

impl Phase {
    fn add(&mut self, (a0, s0): Pair, (a, s): Pair, skew: u64) {
        self.compared += 1;
        let parts = [
            (a.run_ns - a0.run_ns, s.run.0 - s0.run.0, a.open_run_ns.max(a0.open_run_ns)),
            (a.wait_ns - a0.wait_ns, s.wait.0 - s0.wait.0, a.open_wait_ns.max(a0.open_wait_ns)),
        ];
        for (i, (ours, theirs, open)) in parts.into_iter().enumerate() {
            let difference = ours.abs_diff(theirs);
            self.change[i] = self.change[i].max(difference);
            let unexplained = difference.saturating_sub(open + skew);
            self.unexplained[i] = self.unexplained[i].max(unexplained);
            // What an emulated CPU's interrupts took since the last tick may be milliseconds; Debian's kernels tick at 250 Hz.
            let limit = if is_emulated_host() { 4_000_000 } else { 1_000_000 };
            assert!(
                unexplained <= limit,
                "more than 0.1 % of a second, or a tick, unexplained: {unexplained} ns"
            );
        }
    }
}
