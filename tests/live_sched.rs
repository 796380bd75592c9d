//! What the scheduling programs say of several threads together, and of quotas, against what must be.

#![expect(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "a test may panic, and prints what it measured"
)]

#[path = "support/threads.rs"]
mod threads;

use std::{
    path::{Path, PathBuf},
    time::Duration,
};

use monitor::{
    source::{
        ebpf::{Ebpf, GroupSlot, Keep, Slot, ThreadTimes, probes::ProbeGroup},
        procfs,
    },
    units::{Tgid, Tid},
};
use threads::{Bully, Spinner};

/// The CPU that the loads run on.
const CPU: usize = 1;
/// A scheduler tick at `CONFIG_HZ=100`, the longest there is.
const TICK_NS: u64 = 10_000_000;

/// What was read of two siblings at one moment.
struct Pair {
    clock: u64,
    wait: u64,
    both: u64,
}

fn read_pair(ebpf: &mut Ebpf, group: &GroupSlot, slots: &[Slot]) -> Pair {
    for _ in 0..1000 {
        ebpf.read().unwrap();
        let times: Option<Vec<ThreadTimes>> = slots.iter().map(|slot| ebpf.times(slot)).collect();
        let Some(times) = times else { continue };
        if let Some(both) = ebpf.both_ns(group, times[0].sched_ns) {
            return Pair { clock: times[0].sched_ns, wait: times.iter().map(|t| t.wait_ns).sum(), both };
        }
    }
    panic!("the group cannot be read");
}

/// Two threads that always want to run share one CPU. At any time one of them runs and the other waits, or both wait for
/// somebody else; so the two waits together, less the time that passed, are the time in which both waited.
#[test]
fn siblings_on_one_cpu_wait_for_each_other_all_the_time() {
    let mut ebpf = Ebpf::open(ProbeGroup::ALL).unwrap();
    let spinners = [Spinner::start(CPU), Spinner::start(CPU)];
    let group = ebpf.follow_group().unwrap();
    let follow = |s: &Spinner| ebpf.follow(s.tid, Keep::Times, Some(&group)).unwrap();
    let slots: Vec<Slot> = spinners.iter().map(follow).collect();
    ebpf.seed().unwrap();
    std::thread::sleep(Duration::from_millis(200)); // Until both have been switched.
    let first = read_pair(&mut ebpf, &group, &slots);
    std::thread::sleep(Duration::from_secs(2));
    let second = read_pair(&mut ebpf, &group, &slots);
    let passed = second.clock - first.clock;
    let (waited, both) = (second.wait - first.wait, second.both - first.both);
    let expected = passed - (waited - passed);
    println!(
        "{passed} ns passed, waited {waited} ns together; one waited while the other ran: {both} of {expected} ns"
    );
    assert!(both.abs_diff(expected) <= passed / 1000 + TICK_NS, "{both} ns, not {expected}");
    assert!(both > passed / 10, "the two hardly ran: nothing was tested");
}

/// One sibling is kept from its CPU while the other runs on the other CPU, and that is counted before the wait is over.
#[test]
fn a_sibling_that_is_kept_waiting_counts_at_once() {
    let mut ebpf = Ebpf::open(ProbeGroup::ALL).unwrap();
    let spinners = [Spinner::start(CPU), Spinner::start(0)];
    let group = ebpf.follow_group().unwrap();
    let follow = |s: &Spinner| ebpf.follow(s.tid, Keep::Times, Some(&group)).unwrap();
    let slots: Vec<Slot> = spinners.iter().map(follow).collect();
    ebpf.seed().unwrap();
    let (mut counted, mut waited) = (0, 0);
    for _ in 0..10 {
        let _bully = Bully::start(CPU);
        let (first, second) = (read_pair(&mut ebpf, &group, &slots), {
            std::thread::sleep(Duration::from_millis(50));
            read_pair(&mut ebpf, &group, &slots)
        });
        let (wait, both) = (second.wait - first.wait, second.both - first.both);
        assert!(both <= wait + TICK_NS, "{both} ns counted, but the two waited for {wait} ns only");
        counted += both;
        waited += wait;
    }
    println!("siblings waited for {waited} ns, of which {counted} ns while the other ran");
    assert!(counted > 5_000_000, "{counted} ns counted of {waited}");
}

/// A control group with a CFS quota of 20 ms in 100 ms, of the first or second version, removed when dropped.
struct Quota(PathBuf);

impl Quota {
    fn new() -> Self {
        let name = format!("kvm-monitor-test-{}", std::process::id());
        let first = Path::new("/sys/fs/cgroup/cpu");
        if first.join("cpu.cfs_quota_us").exists() || first.join("tasks").exists() {
            let dir = first.join(name);
            std::fs::create_dir(&dir).unwrap();
            std::fs::write(dir.join("cpu.cfs_quota_us"), "20000").unwrap();
            return Self(dir);
        }
        let root = Path::new("/sys/fs/cgroup");
        std::fs::write(root.join("cgroup.subtree_control"), "+cpu").unwrap();
        let dir = root.join(name);
        std::fs::create_dir(&dir).unwrap();
        std::fs::write(dir.join("cpu.max"), "20000 100000").unwrap();
        std::fs::write(dir.join("cgroup.type"), "threaded").unwrap();
        Self(dir)
    }

    fn take(&self, tid: Tid) {
        let file = ["tasks", "cgroup.threads"].map(|file| self.0.join(file));
        let file = file.iter().find(|file| file.exists()).unwrap();
        std::fs::write(file, tid.to_string()).unwrap();
    }

    /// How long it has been throttled, nanoseconds.
    fn throttled(&self) -> u64 {
        let stat = std::fs::read_to_string(self.0.join("cpu.stat")).unwrap();
        let value = |key| stat.lines().find_map(|line| line.strip_prefix(key)?.trim().parse::<u64>().ok());
        value("throttled_time ").or_else(|| Some(value("throttled_usec ")? * 1000)).unwrap()
    }
}

impl Drop for Quota {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir(&self.0);
    }
}

/// What a quota keeps from a thread is told apart from what others take, by as much as the control group says itself.
#[test]
fn throttling_is_told_apart_from_contention() {
    let mut ebpf = Ebpf::open(ProbeGroup::ALL).unwrap();
    let quota = Quota::new();
    let victim = Spinner::start(CPU);
    let slot = ebpf.follow(victim.tid, Keep::Times, None).unwrap();
    ebpf.seed().unwrap();
    let mut read = || {
        for _ in 0..1000 {
            ebpf.read().unwrap();
            if let Some(times) = ebpf.times(&slot) {
                return times;
            }
        }
        panic!("the thread cannot be read");
    };
    let rival = Spinner::start(CPU);
    let free = read();
    std::thread::sleep(Duration::from_secs(1));
    let contended = read();
    drop(rival);
    quota.take(victim.tid);
    std::thread::sleep(Duration::from_secs(3));
    // While throttled the group's own figure stands still; the difference is at most the period in progress.
    let (group, times) = (quota.throttled(), read());
    let in_between = quota.throttled();
    let throttled = times.throttled_ns - contended.throttled_ns;
    println!(
        "contended: waited {} ns, throttled {} ns; quota: waited {} ns, throttled {throttled} ns, the group says {group}",
        contended.wait_ns - free.wait_ns,
        contended.throttled_ns - free.throttled_ns,
        times.wait_ns - contended.wait_ns,
    );
    assert_eq!(contended.throttled_ns, free.throttled_ns, "contention counts as throttling");
    assert!(contended.wait_ns - free.wait_ns > 100_000_000, "there was no contention");
    assert!(throttled > 1_500_000_000, "{throttled} ns throttled in 3 s");
    assert!(throttled <= times.wait_ns - contended.wait_ns, "throttling is part of the wait");
    assert!(throttled + TICK_NS >= group - group / 100, "{throttled} ns, but the group says {group}");
    assert!(
        throttled <= in_between + in_between / 100 + 100_000_000,
        "{throttled} ns, but the group says {group}"
    );
    drop(victim); // It leaves the group before the group goes.
    drop(quota);
}

/// Each time a thread leaves its CPU the kernel counts as we do.
#[test]
fn preemptions_and_yields_are_those_of_proc() {
    let mut ebpf = Ebpf::open(ProbeGroup::ALL).unwrap();
    let spinners = [Spinner::start(CPU), Spinner::start(CPU)];
    let tid = spinners[0].tid;
    let slot = ebpf.follow(tid, Keep::Times, None).unwrap();
    ebpf.seed().unwrap();
    let process = monitor::inventory::QemuProcess { tgid: Tgid(std::process::id()), start_time_ticks: 0 };
    let proc = || procfs::switches(Path::new("/proc"), process, tid, &mut [0; 4096]).unwrap();
    let mut read = || {
        ebpf.read().unwrap();
        ebpf.times(&slot)
    };
    let mut matched = 0;
    let mut base = None;
    for _ in 0..500 {
        std::thread::sleep(Duration::from_millis(2));
        let (before, Some(times), after) = (proc(), read(), proc()) else { continue };
        if before != after {
            continue; // It was switched in between.
        }
        let ahead = after.involuntary.0 - u64::from(times.preemptions);
        assert_eq!(*base.get_or_insert(ahead), ahead, "{times:?} {after:?}");
        matched += 1;
    }
    println!("{matched} of 500 readings fell between two switches");
    assert!(matched > 20);
}
