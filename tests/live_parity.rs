//! The eBPF figures of run and wait time against independent truth, on this machine's kernel.
//!
//! The programs read what the kernel keeps itself, so agreeing with schedstat proves little. Two tests therefore use
//! a thread of this process whose time is known otherwise: by its own CPU clock, and by a real-time thread that
//! keeps it from running. Both fail if the interval in progress is left out. The third reads a real guest's vCPU
//! thread between two readings of schedstat, at rest, busy and contended.
//!
//! `KVM_MONITOR_PARITY_SECONDS` (default 4) is the length of each phase of the third test.

#![expect(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "a test may panic, and prints what it measured"
)]

#[path = "support/threads.rs"]
mod threads;

use std::{path::Path, sync::atomic::Ordering, time::Duration};

use lab::{GuestSpec, Hog, Lab, LabDirs, Which};
use monitor::{
    inventory::QemuProcess,
    source::{
        ebpf::{Ebpf, Keep, Slot, ThreadTimes, probes::ProbeGroup},
        procfs::{SchedStat, ThreadReader},
    },
    units::{Tgid, Tid, Window},
};
use threads::{Bully, PATIENCE, Spinner};

/// The scheduler's clock is compared with `CLOCK_MONOTONIC` at each of our own switches; between the kernel's reading
/// of it and ours lies the rest of that switch.
const CLOCK_ERROR_NS: u64 = 20_000;
/// A scheduler tick at `CONFIG_HZ=100`, the longest there is.
const TICK_NS: u64 = 10_000_000;
/// The CPU that the loads run on.
const CPU: usize = 1;

fn follow(ebpf: &mut Ebpf, tid: Tid) -> Slot {
    let slot = ebpf.follow(tid, Keep::TimesAndHistograms, None).unwrap();
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
    reads: u32,
    /// Largest difference of the change in one second, nanoseconds: run, wait.
    change: [u64; 2],
    /// Largest part of it that the interval in progress does not explain.
    unexplained: [u64; 2],
    /// Share of the wall time, per cent: run, wait.
    share: [f64; 2],
}

/// A real guest's vCPU thread. schedstat is read between two eBPF readings: it can show nothing that the second
/// does not, and everything that the first had finished.
#[test]
fn a_vcpu_agrees_with_schedstat_at_rest_busy_and_contended() {
    let lab = Lab::start(&LabDirs::from_env().unwrap()).unwrap();
    let spec = GuestSpec {
        vcpus: 1,
        vcpu_pin: Some(CPU.to_string()),
        ..GuestSpec::new("parity", "wait burn=cpu0:3600s")
    };
    let guest = lab.boot(&spec).unwrap();
    guest.wait_begin(Which::Kind("wait"), PATIENCE).unwrap();
    let process = QemuProcess { tgid: Tgid(guest.pid), start_time_ticks: 0 };
    let tid = Tid(guest.vcpu_tids().unwrap()[0]);
    let file = ThreadReader::open(Path::new("/proc"), process, tid).unwrap();
    let mut ebpf = Ebpf::open(ProbeGroup::ALL).unwrap();
    let slot = follow(&mut ebpf, tid);
    let mut compare = |name| {
        let phase = compare_for(&mut ebpf, &slot, &file);
        println!(
            "{name:<10} {:>3} s  run {:5.1} %, wait {:5.1} %  |ebpf − schedstat| per second: run ≤ {:>7} ns, wait ≤ {:>8} ns  \
             unexplained: {} and {} ns",
            phase.reads,
            phase.share[0],
            phase.share[1],
            phase.change[0],
            phase.change[1],
            phase.unexplained[0],
            phase.unexplained[1]
        );
        phase
    };
    compare("idle");
    guest.go_on(PATIENCE).ok(); // The step that follows does not end.
    let busy = compare("busy");
    let hogs = [Hog::start(&lab, CPU).unwrap(), Hog::start(&lab, CPU).unwrap()];
    let contended = compare("contended");
    check_culprits(&mut ebpf, &slot, &hogs);
    drop(hogs);
    assert!(busy.share[0] > contended.share[0], "the hogs took nothing");
    assert!(contended.share[1] > 20.0, "the vCPU hardly waited: {:.1} %", contended.share[1]);
}

/// While two endless loops share the vCPU's core, each is charged what it took by its own account, and the charges
/// sum to the time waited. A vCPU that always wants to run waits whenever one of them runs.
fn check_culprits(ebpf: &mut Ebpf, slot: &Slot, hogs: &[Hog]) {
    let slots: Vec<Slot> = hogs.iter().map(|hog| follow(ebpf, Tid(hog.pid()))).collect();
    let mut take = || {
        let before = ended_waits(ebpf, slot);
        let charges = ebpf.take_charges(slot).unwrap();
        let on_cpu: Vec<u64> = slots.iter().map(|slot| read(ebpf, slot).1.on_cpu_ns).collect();
        ([before, ended_waits(ebpf, slot)], charges, on_cpu)
    };
    let (first, _, on_cpu_before) = take();
    std::thread::sleep(Duration::from_secs(3));
    let (second, charges, on_cpu_after) = take();
    let (least, most) = (second[0] - first[1], second[1] - first[0]);
    let sum = charges.culprits.iter().map(|c| c.ns).sum::<u64>() + charges.other_ns + charges.unknown_ns;
    println!("waited {least} to {most} ns, charged {sum} ns, of which unknown {} ns", charges.unknown_ns);
    for c in charges.culprits.iter().filter(|c| c.ns > 0) {
        println!("  {} {:?} {} ns", c.id, String::from_utf8_lossy(&c.comm).trim_end_matches('\0'), c.ns);
    }
    assert!(
        (least - least / 100..=most + most / 100).contains(&sum),
        "charged {sum} of {least} to {most} ns"
    );
    assert!(charges.unknown_ns <= most / 100, "nobody known for {} of {most} ns", charges.unknown_ns);
    for (hog, took) in
        hogs.iter().zip(on_cpu_after.iter().zip(on_cpu_before).map(|(after, before)| after - before))
    {
        let charged = charges.culprits.iter().find(|c| c.id == hog.pid()).map_or(0, |c| c.ns);
        println!("hog {} was on the CPU for {took} ns and is charged {charged} ns", hog.pid());
        assert!(charged.abs_diff(took) <= took / 100 + 2 * TICK_NS, "charged {charged} of {took} ns");
    }
}

/// A wait is charged when it ends, so one in progress does not count.
fn ended_waits(ebpf: &mut Ebpf, slot: &Slot) -> u64 {
    let (_, times) = read(ebpf, slot);
    times.wait_ns - times.open_wait_ns
}

fn compare_for(ebpf: &mut Ebpf, slot: &Slot, file: &ThreadReader) -> Phase {
    let seconds = std::env::var("KVM_MONITOR_PARITY_SECONDS").ok().and_then(|s| s.parse().ok()).unwrap_or(4);
    let mut phase = Phase::default();
    let mut last: Option<Pair> = None;
    let (begin, first) = read(ebpf, slot);
    for _ in 0..=seconds {
        let (before, a) = read(ebpf, slot);
        let stat = file.read(&mut [0; 256]).unwrap();
        let (after, b) = read(ebpf, slot);
        bracket("run", [a.run_ns - a.open_run_ns, b.run_ns], stat.run.0);
        bracket("wait", [a.wait_ns - a.open_wait_ns, b.wait_ns], stat.wait.0);
        if let Some(earlier) = last {
            phase.add(earlier, (a, stat), after.end.since(before.begin));
        }
        last = Some((a, stat));
        std::thread::sleep(Duration::from_secs(1));
    }
    let (end, second) = read(ebpf, slot);
    #[expect(clippy::cast_precision_loss, reason = "a percentage")]
    let share = |ns: u64| 100.0 * ns as f64 / end.begin.since(begin.begin) as f64;
    phase.share = [share(second.run_ns - first.run_ns), share(second.wait_ns - first.wait_ns)];
    assert!(phase.reads > 0, "compared nothing");
    phase
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
        self.reads += 1;
        let parts = [
            (a.run_ns - a0.run_ns, s.run.0 - s0.run.0, a.open_run_ns.max(a0.open_run_ns)),
            (a.wait_ns - a0.wait_ns, s.wait.0 - s0.wait.0, a.open_wait_ns.max(a0.open_wait_ns)),
        ];
        for (i, (ours, theirs, open)) in parts.into_iter().enumerate() {
            let difference = ours.abs_diff(theirs);
            self.change[i] = self.change[i].max(difference);
            let unexplained = difference.saturating_sub(open + skew);
            self.unexplained[i] = self.unexplained[i].max(unexplained);
            assert!(unexplained <= 1_000_000, "more than 0.1 % of a second unexplained: {unexplained} ns");
        }
    }
}
