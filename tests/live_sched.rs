//! What the scheduling programs say of several threads together, and of quotas, against what must be.

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
    collections::{BTreeMap, BTreeSet},
    path::Path,
    time::{Duration, Instant},
};

use monitor::{
    ledger::Ledger,
    source::{
        ebpf::{Ebpf, GroupSlot, Histogram, Histograms, Keep, Slot, ThreadTimes, probes::ProbeGroup},
        procfs,
    },
    units::{Tgid, Tid},
};
use quota::Quota;
use ring::Ring;
use threads::{Bully, PATIENCE, Spinner};

/// The CPU that the loads run on.
const CPU: usize = 1;
/// A scheduler tick at `CONFIG_HZ=100`, the longest there is.
const TICK_NS: u64 = 10_000_000;

/// What was read of two siblings at one moment.
struct Pair {
    clock: u64,
    wait: u64,
    on_cpu: u64,
    both: u64,
}

fn read_pair(ebpf: &mut Ebpf, group: &GroupSlot, slots: &[Slot]) -> Pair {
    for _ in 0..1000 {
        ebpf.read().unwrap();
        let times: Option<Vec<ThreadTimes>> = slots.iter().map(|slot| ebpf.times(slot)).collect();
        let Some(times) = times else { continue };
        if let Some(both) = ebpf.both_ns(group) {
            let sum = |of: fn(&ThreadTimes) -> u64| times.iter().map(of).sum();
            return Pair {
                clock: times[0].sched_ns,
                wait: sum(|t| t.wait_ns),
                on_cpu: sum(|t| t.on_cpu_ns),
                both,
            };
        }
    }
    panic!("the group cannot be read");
}

/// Two threads that always want to run share one CPU. Whenever one of them is on it the other waits, but for what it may
/// sleep.
#[test]
fn siblings_on_one_cpu_wait_for_each_other_all_the_time() {
    let mut ebpf = Ebpf::open(ProbeGroup::ALL).unwrap();
    let spinners = [Spinner::start(CPU), Spinner::start(CPU)];
    let group = ebpf.follow_group().unwrap();
    let follow = |s: &Spinner| ebpf.follow(s.tid, Keep::Times, Some(&group)).unwrap();
    let slots: Vec<Slot> = spinners.iter().map(follow).collect();
    ebpf.seed().unwrap();
    let deadline = Instant::now() + PATIENCE;
    let switched = |times: &ThreadTimes| times.preemptions + times.yields > 0;
    loop {
        ebpf.read().unwrap();
        if slots.iter().all(|slot| ebpf.times(slot).is_some_and(|times| switched(&times))) {
            break;
        }
        assert!(Instant::now() < deadline, "the two are not switched");
        std::thread::sleep(Duration::from_millis(10));
    }
    let first = read_pair(&mut ebpf, &group, &slots);
    std::thread::sleep(Duration::from_secs(2));
    let second = read_pair(&mut ebpf, &group, &slots);
    let passed = second.clock - first.clock;
    let (waited, on_cpu) = (second.wait - first.wait, second.on_cpu - first.on_cpu);
    let (slept, both) = (2 * passed - waited - on_cpu, second.both - first.both);
    println!(
        "{passed} ns passed; both together waited {waited}, slept {slept} and were on the CPU {on_cpu} ns; one waited while \
         the other ran: {both} ns"
    );
    // The kernel may take the CPU from the reading program between its look at the clock and at the group.
    let error = passed / 100 + 2 * TICK_NS;
    assert!(both <= on_cpu + error, "{both} ns of {on_cpu}");
    assert!(both + slept + error >= on_cpu, "{both} ns of {on_cpu}, and slept {slept}");
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
    assert!(throttled > 1_000_000_000, "{throttled} ns throttled in 3 s");
    assert!(throttled <= times.wait_ns - contended.wait_ns, "throttling is part of the wait");
    // It may have waited for others already when its group was throttled.
    let others = times.wait_ns - contended.wait_ns - throttled;
    assert!(
        throttled + others + TICK_NS >= group - group / 100,
        "{throttled} ns, but the group says {group}"
    );
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
    let mut ahead = BTreeMap::<u64, u32>::new();
    for _ in 0..500 {
        std::thread::sleep(Duration::from_millis(2));
        let (before, Some(times), after) = (proc(), read(), proc()) else { continue };
        if before != after {
            continue; // It was switched in between.
        }
        *ahead.entry(after.involuntary.0 - u64::from(times.preemptions)).or_default() += 1;
    }
    let (base, between) = ahead.pop_first().unwrap();
    println!("{between} of 500 readings fell between two switches, {ahead:?} in one");
    // The kernel counts first and calls its tracepoint then (kernel/sched/core.c: __schedule()); a CPU that is emulated in
    // turn with this one may stand still in between. What is lost would stay so.
    assert!(ahead.keys().all(|within| *within == base + 1), "{base} and {ahead:?}");
    assert!(between > 20 && ahead.values().all(|within| *within <= between / 10), "{between} and {ahead:?}");
}

/// Threads whose ids share a place in the kernel's table do not hide each other, whichever of them goes.
#[test]
fn threads_whose_ids_share_a_place_are_told_apart() {
    let mut ebpf = Ebpf::open(ProbeGroup::ALL).unwrap();
    let spinners = [Spinner::start(CPU), Spinner::start(CPU)];
    let sharing = |i: u32| Tid(spinners[0].tid.0 + i * monitor_ebpf::TID_PLACES);
    let slot = ebpf.follow(sharing(0), Keep::Times, None).unwrap();
    // Nobody has these ids. The one that runs is looked for last.
    let mut others: Vec<Slot> =
        (1..monitor_ebpf::CHAIN).map(|i| ebpf.follow(sharing(i), Keep::Times, None).unwrap()).collect();
    let full = ebpf.follow(sharing(monitor_ebpf::CHAIN), Keep::Times, None);
    assert!(full.is_err(), "one more than can share a place is followed");
    ebpf.seed().unwrap();
    let deadline = Instant::now() + PATIENCE;
    for gone in [None, Some(others.len() - 1), Some(0), Some(2)] {
        if let Some(gone) = gone {
            ebpf.forget(others.remove(gone));
        }
        let mut first = None;
        loop {
            assert!(Instant::now() < deadline, "its switches are not seen with {gone:?} gone");
            ebpf.read().unwrap();
            if let Some(times) = ebpf.times(&slot) {
                let before = *first.get_or_insert(times.preemptions);
                if times.preemptions > before {
                    break;
                }
            }
            std::thread::sleep(Duration::from_millis(2));
        }
    }
    assert!(others.iter().all(|other| ebpf.times(other).is_none()), "figures of a thread that is not there");
}

/// The kernel's programs put runs into the histograms a few at a time. Whoever reads has all of them, each once.
#[test]
fn every_run_is_in_the_histogram_at_once() {
    let mut ebpf = Ebpf::open(ProbeGroup::ALL).unwrap();
    let spinners = [Spinner::start(CPU), Spinner::start(CPU)];
    let slot = ebpf.follow(spinners[0].tid, Keep::TimesAndHistograms, None).unwrap();
    ebpf.seed().unwrap();
    let deadline = Instant::now() + PATIENCE;
    let (mut last, mut between, mut seen) = (None::<Histograms>, 0, BTreeSet::new());
    while between < 200 || seen.len() < 20 {
        assert!(Instant::now() < deadline, "{between} readings fell between two switches: {seen:?}");
        std::thread::sleep(Duration::from_millis(1));
        let switches = |ebpf: &mut Ebpf| {
            ebpf.read().unwrap();
            ebpf.times(&slot).map(|times| times.preemptions + times.yields)
        };
        let (before, now, after) = (switches(&mut ebpf), ebpf.histograms(&slot), switches(&mut ebpf));
        let (Some(before), Some(now), Some(after)) = (before, now, after) else { continue };
        if let Some(last) = last {
            let grown = |a: &Histogram, b: &Histogram| a.iter().zip(b).all(|(a, b)| a <= b);
            assert!(grown(&last.run, &now.run) && grown(&last.wait, &now.wait), "a count fell");
        }
        last = Some(now);
        if before != after || before == 0 {
            continue;
        }
        between += 1;
        seen.insert(after);
        // Of the run in which it was first seen the begin is not known.
        let (runs, waits): (u32, u32) = (now.run.iter().sum(), now.wait.iter().sum());
        assert_eq!(runs, after - 1);
        assert!(waits <= runs, "{waits} waits before {runs} runs");
    }
    println!("{between} readings, {} of them with another number of runs: all there", seen.len());
}

/// The scheduler's clock is known to some microseconds only. A thread that did something after the moment up to which it
/// is known is read all the same.
#[test]
fn a_thread_that_was_switched_a_moment_ago_is_read() {
    let mut ebpf = Ebpf::open(ProbeGroup::ALL).unwrap();
    let mut ring = Ring::new(8, CPU);
    ring.rest(Duration::from_micros(100));
    let slots: Vec<Slot> =
        ring.tids.iter().map(|tid| ebpf.follow(*tid, Keep::Times, None).unwrap()).collect();
    ebpf.seed().unwrap();
    ring.begin();
    let mut torn = 0;
    for _ in 0..5000 {
        ebpf.read().unwrap();
        torn += slots.iter().filter(|slot| ebpf.times(slot).is_none()).count();
    }
    println!("{torn} of {} figures could not be read", 5000 * slots.len());
    // One that is switched at every attempt to read it cannot be; on an emulated CPU that is one in a thousand.
    assert!(torn <= 100, "{torn} figures could not be read");
}

/// A thread ends, and before anybody looked another one has its id: what the first had done stays what it was.
#[test]
fn a_reused_thread_id_is_not_the_thread_that_was_followed() {
    let mut ebpf = Ebpf::open(ProbeGroup::ALL).unwrap();
    let first = Spinner::start(CPU);
    let id = first.tid;
    let group = ebpf.follow_group().unwrap();
    let slot = ebpf.follow(id, Keep::Everything, Some(&group)).unwrap();
    ebpf.seed().unwrap();
    std::thread::sleep(Duration::from_millis(20));
    drop(first);
    let deadline = Instant::now() + PATIENCE;
    let read = |ebpf: &mut Ebpf| {
        let times = loop {
            ebpf.read().unwrap();
            let times = ebpf.times(&slot).unwrap();
            if times.last {
                break times;
            }
            // Who waits for a thread is woken a moment before it leaves its CPU for the last time.
            assert!(Instant::now() < deadline, "not the end of a thread: {times:?}");
        };
        (ThreadTimes { sched_ns: 0, ..times }, ebpf.histograms(&slot).unwrap(), ebpf.started_ns(&slot))
    };
    let before = read(&mut ebpf);
    let mut others = Vec::new();
    let second = (0..1000).find_map(|_| {
        std::fs::write("/proc/sys/kernel/ns_last_pid", (id.0 - 1).to_string()).unwrap();
        let spinner = Spinner::start(CPU);
        if spinner.tid == id {
            return Some(spinner);
        }
        others.push(spinner);
        (others.len() > 8).then(|| others.clear());
        None
    });
    let second = second.unwrap_or_else(|| panic!("thread id {id:?} could not be had again"));
    // It is switched many times beside another one.
    let rival = Spinner::start(CPU);
    let switches = || {
        let process = monitor::inventory::QemuProcess { tgid: Tgid(std::process::id()), start_time_ticks: 0 };
        procfs::switches(Path::new("/proc"), process, id, &mut [0; 4096]).unwrap().involuntary.0
    };
    let deadline = Instant::now() + PATIENCE;
    while switches() < 20 {
        assert!(Instant::now() < deadline, "the second thread is not switched");
        std::thread::sleep(Duration::from_millis(2));
    }
    let after = read(&mut ebpf);
    assert_eq!((before.0, before.2), (after.0, after.2), "another thread was counted");
    assert!(before.1 == after.1, "another thread's runs are in the histogram");
    drop(rival);
    ebpf.forget(slot);
    let slot = ebpf.follow(id, Keep::Everything, None).unwrap();
    ebpf.seed().unwrap();
    ebpf.read().unwrap();
    let anew = ebpf.times(&slot).unwrap();
    assert!(!anew.last && ebpf.started_ns(&slot) > before.2, "{anew:?} is not the second thread");
    drop(second);
}

/// Takes a CPU off line until dropped.
struct Offline(String);

impl Offline {
    fn new(cpu: usize) -> Self {
        let file = format!("/sys/devices/system/cpu/cpu{cpu}/online");
        std::fs::write(&file, "0").unwrap();
        Self(file)
    }
}

impl Drop for Offline {
    fn drop(&mut self) {
        let _ = std::fs::write(&self.0, "1");
    }
}

/// The CPU of a thread that runs goes away, and comes back: nothing of its time is lost or counted twice. Tried in the VMs of
/// `cargo xtask lab` only, because threads that are bound to the CPU lose that for ever.
#[test]
fn a_cpu_that_goes_takes_no_time_with_it() {
    if std::env::var_os("KVM_MONITOR_LAB_ACCELERATOR").is_none() {
        println!("not in a VM of the lab: no CPU is taken off line");
        return;
    }
    let mut ebpf = Ebpf::open(ProbeGroup::ALL).unwrap();
    let spinner = Spinner::start(CPU);
    let slot = ebpf.follow(spinner.tid, Keep::Everything, None).unwrap();
    ebpf.seed().unwrap();
    let mut ledger = Ledger::default();
    let (mut readings, mut discarded) = (0, 0);
    let mut run_until = |what: &str, done: &dyn Fn(&ThreadTimes, &ThreadTimes) -> bool| {
        let deadline = Instant::now() + PATIENCE;
        let mut first = None;
        loop {
            assert!(Instant::now() < deadline, "{what}: in vain");
            ebpf.read().unwrap();
            let Some(times) = ebpf.times(&slot) else { continue };
            readings += 1;
            discarded += u32::from(ledger.add(times).is_none());
            if done(first.get_or_insert(times), &times) {
                return times;
            }
            std::thread::sleep(Duration::from_millis(2));
        }
    };
    let ran = |first: &ThreadTimes, now: &ThreadTimes| now.run_ns - first.run_ns > 300_000_000;
    let before = run_until("with the CPU", &ran);
    let offline = Offline::new(CPU);
    let away = run_until("without the CPU", &ran);
    drop(offline);
    let after = run_until("with it again", &ran);
    let (own, _) = spinner.own_time();
    println!(
        "{readings} readings, {discarded} discarded; {before:?} {away:?} {after:?}; its own clock {own} ns"
    );
    assert!(away.migrations > before.migrations, "it did not have to leave");
    assert!(own >= after.run_ns - TICK_NS, "its own clock says {own} ns");
    assert!(discarded * 10 <= readings, "{discarded} of {readings} readings discarded");
}
