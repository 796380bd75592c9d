//! What the probes cost at a context switch, beside an empty program and, where it is installed, `runqlat`.
//!
//! The load is a token that N threads pinned to one CPU pass on through pipes: every hop is a switch. The kernel counts
//! runs and time of each program (`kernel.bpf_stats_enabled`); the time contains the counting's own clock reads, which
//! is why the empty program is measured in the same round. Everything is measured in turn, round after round, and
//! medians are printed: figures of one run compare, figures of two do not.
#![expect(
    clippy::unwrap_used,
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "a program for a terminal"
)]
#![expect(clippy::cast_precision_loss, reason = "averages")]

#[path = "../support/counting.rs"]
mod counting;
#[path = "../support/ring.rs"]
mod ring;

use std::{
    collections::BTreeMap,
    process::{Child, Command},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use counting::{Counting, Peer, loaded};
use monitor::{
    source::ebpf::{Ebpf, GroupSlot, Keep, ProcessSlot, ProgramRuns, Slot, Yardstick, probes::ProbeGroup},
    units::{Tgid, Tid},
};
use ring::Ring;

const CPU: usize = 1;
const ROUNDS: usize = 5;
const WINDOW: Duration = Duration::from_millis(600);

/// Follows the threads of a ring.
fn follow(ring: &Ring, ebpf: &mut Ebpf, keep: Keep, group: Option<&GroupSlot>) -> Vec<Slot> {
    ring.tids.iter().map(|tid| ebpf.follow(*tid, keep, group).unwrap()).collect()
}

/// Hops per second with nothing measured.
fn speed(ring: &mut Ring) -> f64 {
    ring.begin();
    std::thread::sleep(Duration::from_millis(100));
    let (begin, hops) = (Instant::now(), ring.hops.load(Ordering::Relaxed));
    std::thread::sleep(WINDOW);
    (ring.hops.load(Ordering::Relaxed) - hops) as f64 / begin.elapsed().as_secs_f64()
}

/// Hops made while `WINDOW` passes, and what the kernel counted for each program meanwhile.
fn measure(ring: &mut Ring, runs: impl Fn() -> BTreeMap<String, ProgramRuns>) -> Measured {
    ring.begin();
    std::thread::sleep(Duration::from_millis(100));
    let (before, hops) = (runs(), ring.hops.load(Ordering::Relaxed));
    std::thread::sleep(WINDOW);
    let (after, hops) = (runs(), ring.hops.load(Ordering::Relaxed) - hops);
    let mut measured = Measured { ns_per_run: BTreeMap::new(), ns_per_hop: 0.0 };
    for (name, now) in after {
        let then = before.get(&name).copied().unwrap_or(ProgramRuns { count: 0, ns: 0 });
        let (count, ns) = (now.count - then.count, (now.ns - then.ns) as f64);
        // Programs that hardly ran have nothing to do with switches.
        if count * 10 > hops {
            measured.ns_per_run.insert(name, ns / count as f64);
            measured.ns_per_hop += ns / hops as f64;
        }
    }
    measured
}

struct Measured {
    ns_per_run: BTreeMap<String, f64>,
    ns_per_hop: f64,
}

impl Measured {
    /// Of the program that takes longest, which is the one that runs at every switch.
    fn ns_per_switch(&self) -> f64 {
        self.ns_per_run.values().copied().fold(0.0, f64::max)
    }
}

/// What is attached in one measurement.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Subject {
    Empty,
    OtherThreads,
    Times,
    Ledger,
    VmThreads,
    Runqlat,
}

impl Subject {
    const fn name(self) -> &'static str {
        match self {
            Self::Empty => "empty program",
            Self::OtherThreads => "ours, threads of no VM",
            Self::Times => "ours, vCPU threads, ledger",
            Self::Ledger => "ours, vCPU threads, and histograms",
            Self::VmThreads => "ours, vCPU threads, everything on",
            Self::Runqlat => "runqlat (libbpf-tools)",
        }
    }

    fn measure(self, threads: usize) -> Option<Measured> {
        let mut ring = Ring::new(threads, CPU);
        match self {
            Self::Empty => {
                let yardstick = Yardstick::open().unwrap();
                Some(measure(&mut ring, || {
                    yardstick.runs().map(|r| ("empty".to_owned(), r)).into_iter().collect()
                }))
            }
            Self::OtherThreads | Self::Times | Self::Ledger | Self::VmThreads => {
                let mut ebpf = Ebpf::open(&[ProbeGroup::Sched]).unwrap();
                let group = ebpf.follow_group();
                let _slots: Vec<Slot> = match self {
                    Self::Times => follow(&ring, &mut ebpf, Keep::Times, None),
                    Self::Ledger => follow(&ring, &mut ebpf, Keep::TimesAndHistograms, None),
                    Self::VmThreads => follow(&ring, &mut ebpf, Keep::Everything, group.as_ref()),
                    _ => Vec::new(),
                };
                Some(measure(&mut ring, || ebpf.runs().into_iter().map(|(n, r)| (n.to_owned(), r)).collect()))
            }
            Self::Runqlat => {
                let before = loaded();
                let peer = Peer::start("runqlat")?;
                let measured = measure(&mut ring, || {
                    let mut now = loaded();
                    now.retain(|id, _| !before.contains_key(id));
                    now
                });
                drop(peer);
                Some(measured)
            }
        }
    }
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

/// What a ring of two threads loses of its speed, next to nothing attached: ours for threads of no VM and of one, and
/// `runqlat`. The kernel counts nothing meanwhile, which would cost more than the programs.
fn slowdown() {
    let mut lost: BTreeMap<Subject, Vec<f64>> = BTreeMap::new();
    for round in 0..2 * ROUNDS {
        eprintln!("slowdown, round {} of {}", round + 1, 2 * ROUNDS);
        for subject in [Subject::OtherThreads, Subject::VmThreads, Subject::Runqlat] {
            let bare = 1e9 / speed(&mut Ring::new(2, CPU));
            let mut ring = Ring::new(2, CPU);
            let with = if subject == Subject::Runqlat {
                let Some(_peer) = Peer::start("runqlat") else { continue };
                speed(&mut ring)
            } else {
                let mut ebpf = Ebpf::open(&[ProbeGroup::Sched]).unwrap();
                let group = ebpf.follow_group();
                let _slots = match subject {
                    Subject::VmThreads => follow(&ring, &mut ebpf, Keep::Everything, group.as_ref()),
                    _ => Vec::new(),
                };
                speed(&mut ring)
            };
            lost.entry(subject).or_default().push(1e9 / with - bare);
        }
    }
    println!("\nring of 2 threads, ns added to a hop: median of {} pairs", 2 * ROUNDS);
    let peer = lost.get(&Subject::Runqlat).map(|values| median(values.clone()));
    for (subject, values) in &lost {
        let added = median(values.clone());
        let over = peer.map_or("-".to_owned(), |peer| format!("{:.2} x what runqlat adds", added / peer));
        println!("{:<36} {added:>10.1}   {over}", subject.name());
    }
}

/// Memory of the maps, and the time to read 400 threads and 100 processes, as of 100 domains with 4 vCPUs each.
fn reading() {
    let stop = Arc::new(AtomicU64::new(0));
    let (tell, tids) = std::sync::mpsc::channel();
    for _ in 0..400 {
        let (tell, stop) = (tell.clone(), Arc::clone(&stop));
        std::thread::spawn(move || {
            tell.send(rustix::thread::gettid()).unwrap();
            while stop.load(Ordering::Relaxed) == 0 {
                std::thread::sleep(Duration::from_millis(100));
            }
        });
    }
    let mut processes: Vec<Child> =
        (0..100).map(|_| Command::new("sleep").arg("3600").spawn().unwrap()).collect();
    let mut ebpf = Ebpf::open(&[ProbeGroup::Sched]).unwrap();
    let groups: Vec<GroupSlot> = (0..100).map(|_| ebpf.follow_group().unwrap()).collect();
    let slots: Vec<Slot> = (0..400)
        .map(|i| {
            let tid = Tid(u32::try_from(tids.recv().unwrap().as_raw_nonzero().get()).unwrap());
            ebpf.follow(tid, Keep::Everything, Some(&groups[i / 4])).unwrap()
        })
        .collect();
    let followed: Vec<ProcessSlot> =
        processes.iter().map(|child| ebpf.follow_process(Tgid(child.id())).unwrap()).collect();
    ebpf.seed().unwrap();
    let (mut times, mut least) = (Vec::new(), (400, 100));
    for _ in 0..200 {
        let begin = Instant::now();
        ebpf.read().unwrap();
        let threads = slots.iter().filter_map(|slot| ebpf.times(slot)).count();
        let read = followed.iter().filter(|slot| matches!(ebpf.process_times(slot), Some(Ok(_)))).count();
        times.push(begin.elapsed().as_nanos() as f64 / 1e3);
        least = least.min((threads, read));
        std::thread::sleep(Duration::from_millis(5));
    }
    println!("\n100 domains with 4 vCPUs, 4 vCPU threads and 1 process of 1 thread read for each");
    println!("one reading of everything: median {:.0} µs of {}", median(times.clone()), times.len());
    println!("memory of all maps: {:.2} MiB", map_bytes() as f64 / f64::from(1 << 20));
    stop.store(1, Ordering::Relaxed);
    for child in &mut processes {
        let _ = child.kill();
        let _ = child.wait();
    }
    assert_eq!(least, (400, 100), "not all of them could be read each time");
}

/// Memory of the maps that this process holds, as the kernel charges it.
fn map_bytes() -> u64 {
    let mut maps = BTreeMap::new();
    for entry in std::fs::read_dir("/proc/self/fdinfo").unwrap().flatten() {
        let text = std::fs::read_to_string(entry.path()).unwrap_or_default();
        let value = |key| text.lines().find_map(|line| line.strip_prefix(key)?.trim().parse::<u64>().ok());
        if let (Some(bytes), Some(id)) = (value("memlock:"), value("map_id:")) {
            maps.insert(id, bytes);
        }
    }
    maps.values().sum()
}

/// What the programs cost at a switch on a ring of some threads, each subject beside an empty program of the same round.
fn switches(threads: usize) {
    const SUBJECTS: [Subject; 6] = [
        Subject::Empty,
        Subject::OtherThreads,
        Subject::Times,
        Subject::Ledger,
        Subject::VmThreads,
        Subject::Runqlat,
    ];
    let mut rounds: BTreeMap<Subject, Vec<Round>> = BTreeMap::new();
    for round in 0..ROUNDS {
        eprintln!("{threads} threads, round {} of {ROUNDS}", round + 1);
        let measured = SUBJECTS.map(|subject| Some((subject, subject.measure(threads)?)));
        let of = |wanted| {
            let (_, found) = measured.iter().flatten().find(|(subject, _)| *subject == wanted)?;
            Some(found)
        };
        let empty = of(Subject::Empty).unwrap().ns_per_switch();
        let peer = of(Subject::Runqlat).map(|peer| peer.ns_per_hop);
        for (subject, measured) in measured.iter().flatten() {
            rounds.entry(*subject).or_default().push(Round {
                ns: measured.ns_per_switch(),
                over_empty: measured.ns_per_switch() / empty,
                ns_per_hop: measured.ns_per_hop,
                over_peer: peer.map(|peer| measured.ns_per_hop / peer),
            });
        }
    }
    println!("\nring of {threads} threads: medians of {ROUNDS} rounds, and the smallest and largest ratio");
    println!(
        "{:<38} {:>10} {:>22} {:>10} {:>14}",
        "", "ns per run", "over empty", "ns per hop", "over runqlat"
    );
    for (subject, rounds) in &rounds {
        let of = |what: fn(&Round) -> f64| median(rounds.iter().map(what).collect());
        let ratios = || rounds.iter().map(|round| round.over_empty);
        let (least, most) = (ratios().fold(f64::MAX, f64::min), ratios().fold(0.0, f64::max));
        let over: Vec<f64> = rounds.iter().filter_map(|round| round.over_peer).collect();
        let over = if over.is_empty() { "-".to_owned() } else { format!("{:.3}", median(over)) };
        println!(
            "{:<38} {:>10.1} {:>8.2} ({least:.2} to {most:.2}) {:>10.1} {over:>14}",
            subject.name(),
            of(|round| round.ns),
            of(|round| round.over_empty),
            of(|round| round.ns_per_hop),
        );
    }
}

/// One subject in one round.
struct Round {
    ns: f64,
    over_empty: f64,
    ns_per_hop: f64,
    over_peer: Option<f64>,
}

/// Parts may be named: `read`, `hop`, `switch`; none is all.
fn main() {
    let parts: Vec<String> = std::env::args().skip(1).filter(|arg| !arg.starts_with('-')).collect();
    let wanted = |part: &str| parts.is_empty() || parts.iter().any(|named| named == part);
    if wanted("read") {
        reading();
    }
    if wanted("hop") {
        slowdown();
    }
    if wanted("switch") {
        let _counting = Counting::on();
        [2, 200].into_iter().for_each(switches);
    }
}
