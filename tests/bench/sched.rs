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

use std::{
    collections::BTreeMap,
    fs::File,
    io::{Read, Write},
    process::{Child, Command, Stdio},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use monitor::{
    source::ebpf::{Ebpf, GroupSlot, Keep, ProcessSlot, ProgramRuns, Slot, Yardstick, probes::ProbeGroup},
    units::{Tgid, Tid},
};
use rustix::thread::{CpuSet, sched_setaffinity};

const CPU: usize = 1;
const ROUNDS: usize = 5;
const WINDOW: Duration = Duration::from_millis(600);
const STATS: &str = "/proc/sys/kernel/bpf_stats_enabled";

/// Threads that pass a token on, all on one CPU.
struct Ring {
    tids: Vec<Tid>,
    hops: Arc<AtomicU64>,
    /// Writing ends; closing them ends the ring.
    start: File,
}

impl Ring {
    fn new(threads: usize) -> Self {
        let pipes: Vec<_> = (0..threads).map(|_| rustix::pipe::pipe().unwrap()).collect();
        let hops = Arc::new(AtomicU64::new(0));
        let (tell, tids) = std::sync::mpsc::channel();
        let start = File::from(pipes[0].1.try_clone().unwrap());
        for i in 0..threads {
            let mut from = File::from(pipes[i].0.try_clone().unwrap());
            let mut to = File::from(pipes[(i + 1) % threads].1.try_clone().unwrap());
            let (tell, hops) = (tell.clone(), Arc::clone(&hops));
            std::thread::spawn(move || {
                let mut cpus = CpuSet::new();
                cpus.set(CPU);
                sched_setaffinity(None, &cpus).unwrap();
                tell.send(rustix::thread::gettid()).unwrap();
                let mut token = [0];
                while from.read(&mut token).unwrap() == 1 && token[0] == b'x' {
                    hops.fetch_add(1, Ordering::Relaxed);
                    if to.write_all(&token).is_err() {
                        return; // The ring has ended.
                    }
                }
                let _ = to.write_all(b"q"); // The next one ends as well.
            });
        }
        let tid = |_| Tid(u32::try_from(tids.recv().unwrap().as_raw_nonzero().get()).unwrap());
        Self { tids: (0..threads).map(tid).collect(), hops, start }
    }

    fn follow(&self, ebpf: &mut Ebpf, keep: Keep, group: Option<&GroupSlot>) -> Vec<Slot> {
        self.tids.iter().map(|tid| ebpf.follow(*tid, keep, group).unwrap()).collect()
    }

    /// Hops per second with nothing measured.
    fn speed(&mut self) -> f64 {
        self.start.write_all(b"x").unwrap();
        std::thread::sleep(Duration::from_millis(100));
        let (begin, hops) = (Instant::now(), self.hops.load(Ordering::Relaxed));
        std::thread::sleep(WINDOW);
        (self.hops.load(Ordering::Relaxed) - hops) as f64 / begin.elapsed().as_secs_f64()
    }

    /// Hops made while `WINDOW` passes, and what the kernel counted for each program meanwhile.
    fn measure(&mut self, runs: impl Fn() -> BTreeMap<String, ProgramRuns>) -> Measured {
        self.start.write_all(b"x").unwrap();
        std::thread::sleep(Duration::from_millis(100));
        let (before, hops) = (runs(), self.hops.load(Ordering::Relaxed));
        std::thread::sleep(WINDOW);
        let (after, hops) = (runs(), self.hops.load(Ordering::Relaxed) - hops);
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
}

impl Drop for Ring {
    fn drop(&mut self) {
        let _ = self.start.write_all(b"q");
    }
}

struct Measured {
    ns_per_run: BTreeMap<String, f64>,
    ns_per_hop: f64,
}

/// What is attached in one measurement.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Subject {
    Empty,
    OtherThreads,
    Ledger,
    VmThreads,
    Runqlat,
}

impl Subject {
    const fn name(self) -> &'static str {
        match self {
            Self::Empty => "empty program",
            Self::OtherThreads => "ours, threads of no VM",
            Self::Ledger => "ours, vCPU threads, ledger and counts",
            Self::VmThreads => "ours, vCPU threads, everything on",
            Self::Runqlat => "runqlat (libbpf-tools)",
        }
    }

    fn measure(self, threads: usize) -> Option<Measured> {
        let mut ring = Ring::new(threads);
        match self {
            Self::Empty => {
                let yardstick = Yardstick::open().unwrap();
                Some(ring.measure(|| yardstick.runs().map(|r| ("empty".to_owned(), r)).into_iter().collect()))
            }
            Self::OtherThreads | Self::Ledger | Self::VmThreads => {
                let mut ebpf = Ebpf::open(&[ProbeGroup::Sched]).unwrap();
                let group = ebpf.follow_group();
                let _slots: Vec<Slot> = match self {
                    Self::Ledger => ring.follow(&mut ebpf, Keep::Times, None),
                    Self::VmThreads => ring.follow(&mut ebpf, Keep::TimesAndHistograms, group.as_ref()),
                    _ => Vec::new(),
                };
                Some(ring.measure(|| ebpf.runs().into_iter().map(|(n, r)| (n.to_owned(), r)).collect()))
            }
            Self::Runqlat => {
                let before = loaded();
                let peer = Peer::start()?;
                let measured = ring.measure(|| {
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

/// Every loaded program, by id.
fn loaded() -> BTreeMap<String, ProgramRuns> {
    aya::programs::loaded_programs()
        .filter_map(|info| {
            let info = info.ok()?;
            let ns = monitor::units::duration_ns(info.run_time());
            Some((info.id().to_string(), ProgramRuns { count: info.run_count(), ns }))
        })
        .collect()
}

struct Peer(Child);

impl Peer {
    fn start() -> Option<Self> {
        let child = Command::new("runqlat").arg("1000").stdout(Stdio::null()).stderr(Stdio::null()).spawn();
        let peer = Self(child.ok()?);
        std::thread::sleep(Duration::from_secs(2));
        Some(peer)
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Switches the kernel's counting on, and back to what it was.
struct Counting(String);

impl Counting {
    fn on() -> Self {
        let before = std::fs::read_to_string(STATS).unwrap();
        std::fs::write(STATS, "1").unwrap();
        Self(before)
    }
}

impl Drop for Counting {
    fn drop(&mut self) {
        let _ = std::fs::write(STATS, self.0.trim());
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
            let bare = 1e9 / Ring::new(2).speed();
            let mut ring = Ring::new(2);
            let with = if subject == Subject::Runqlat {
                let Some(_peer) = Peer::start() else { continue };
                ring.speed()
            } else {
                let mut ebpf = Ebpf::open(&[ProbeGroup::Sched]).unwrap();
                let group = ebpf.follow_group();
                let _slots = match subject {
                    Subject::VmThreads => ring.follow(&mut ebpf, Keep::TimesAndHistograms, group.as_ref()),
                    _ => Vec::new(),
                };
                ring.speed()
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
            ebpf.follow(tid, Keep::TimesAndHistograms, Some(&groups[i / 4])).unwrap()
        })
        .collect();
    let followed: Vec<ProcessSlot> =
        processes.iter().map(|child| ebpf.follow_process(Tgid(child.id())).unwrap()).collect();
    ebpf.seed().unwrap();
    let mut times = Vec::new();
    for _ in 0..200 {
        let begin = Instant::now();
        ebpf.read().unwrap();
        let threads = slots.iter().filter_map(|slot| ebpf.times(slot)).count();
        let read = followed.iter().filter(|slot| matches!(ebpf.process_times(slot), Some(Ok(_)))).count();
        times.push(begin.elapsed().as_nanos() as f64 / 1e3);
        assert_eq!((threads, read), (400, 100), "not all of them could be read");
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

fn main() {
    reading();
    slowdown();
    let _counting = Counting::on();
    for threads in [2, 200] {
        let mut per_run: BTreeMap<Subject, Vec<f64>> = BTreeMap::new();
        let mut per_hop: BTreeMap<Subject, Vec<f64>> = BTreeMap::new();
        for round in 0..ROUNDS {
            eprintln!("{threads} threads, round {} of {ROUNDS}", round + 1);
            for subject in
                [Subject::Empty, Subject::OtherThreads, Subject::Ledger, Subject::VmThreads, Subject::Runqlat]
            {
                let Some(measured) = subject.measure(threads) else { continue };
                per_run
                    .entry(subject)
                    .or_default()
                    .extend(measured.ns_per_run.values().copied().reduce(f64::max));
                per_hop.entry(subject).or_default().push(measured.ns_per_hop);
            }
        }
        let of = |values: &BTreeMap<Subject, Vec<f64>>, s| values.get(&s).map(|v| median(v.clone()));
        let (empty, peer) = (of(&per_run, Subject::Empty).unwrap(), of(&per_hop, Subject::Runqlat));
        println!("\nring of {threads} threads: median of {ROUNDS} rounds");
        println!(
            "{:<36} {:>10} {:>12} {:>10} {:>14}",
            "", "ns per run", "over empty", "ns per hop", "over runqlat"
        );
        for (subject, hops) in &per_hop {
            let (run, hop) = (of(&per_run, *subject).unwrap_or(0.0), median(hops.clone()));
            let over = peer.map_or("-".to_owned(), |peer| format!("{:.2}", hop / peer));
            println!("{:<36} {run:>10.1} {:>12.2} {hop:>10.1} {over:>14}", subject.name(), run / empty);
        }
    }
}
