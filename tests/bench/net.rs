//! What the probes of the network cost per packet: on the tap that is watched, on a device that is not, and beside the
//! same counting as classifiers on the device (tcx).
//!
//! Packets of 200 bytes go one by one through a tap whose both ends this program holds. First the kernel counts runs and
//! time of each program (`kernel.bpf_stats_enabled`); the time contains the counting's own clock reads, which is why the
//! empty program is measured in the same round. Then nothing is counted, and the CPU time of a packet is compared with
//! and without. Everything is measured in turn, round after round, and medians are printed: figures of one run compare,
//! figures of two do not.
#![expect(
    clippy::unwrap_used,
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "a program for a terminal"
)]
#![expect(clippy::cast_precision_loss, reason = "averages")]

#[path = "../support/counting.rs"]
mod counting;

use std::{collections::BTreeMap, os::fd::OwnedFd};

use counting::Counting;
use lab::tap::{FrameSocket, NetSpace, RawTap, VnetHeader, frame};
use monitor::{
    source::ebpf::{Ebpf, NetYardstick, NicSlot, ProgramRuns, probes::ProbeGroup},
    units::NicKey,
};
use rustix::time::{ClockId, clock_gettime};

const ROUNDS: usize = 7;
const PACKETS: u64 = 20_000;
const PAIRS: usize = 15;
/// A tap's `tx_queue_len`.
const RING: u32 = 1_000;
const GUEST: [u8; 6] = [0x52, 0x54, 0, 0x77, 1, 1];
const HOST: [u8; 6] = [0xfe, 0x54, 0, 0x77, 1, 1];

/// A tap and everything that can happen to packets on it.
struct Bed {
    space: NetSpace,
    tap: RawTap,
    _other: RawTap,
    socket: FrameSocket,
    _sink: OwnedFd,
    to_guest: Vec<u8>,
    to_host: Vec<u8>,
}

/// Where the packets go.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Load {
    ToGuest,
    ToHost,
    /// Nobody reads: the ring is full, and everything is dropped.
    Dropped,
}

impl Load {
    const ALL: [Self; 3] = [Self::ToGuest, Self::ToHost, Self::Dropped];

    const fn name(self) -> &'static str {
        match self {
            Self::ToGuest => "host to guest",
            Self::ToHost => "guest to host",
            Self::Dropped => "host to guest, ring full",
        }
    }
}

impl Bed {
    fn new() -> Self {
        let space = NetSpace::new().unwrap();
        let tap = RawTap::open(&space, "tap0", 1, VnetHeader::No).unwrap();
        let other = RawTap::open(&space, "tap1", 1, VnetHeader::No).unwrap();
        let socket = space.frame_socket("tap0", VnetHeader::No).unwrap();
        let sink = space.swallow("tap0").unwrap();
        let (to_guest, to_host) = (frame(GUEST, HOST, 200), frame(HOST, GUEST, 200));
        Self { space, tap, _other: other, socket, _sink: sink, to_guest, to_host }
    }

    fn watch(&self, ebpf: &mut Ebpf, device: &str) -> NicSlot {
        let (netns, ifindex) = (self.space.inode().unwrap(), self.space.ifindex(device).unwrap());
        ebpf.watch(NicKey { netns, ifindex }, 0).unwrap()
    }

    /// Sends packets; CPU nanoseconds for each.
    fn send(&self, load: Load, packets: u64) -> f64 {
        let mut buffer = [0; 2048];
        if load == Load::Dropped {
            // More than its ring holds. Whether the sender is told depends on the queueing discipline.
            (0..RING).for_each(|_| drop(self.socket.send(&self.to_guest)));
        }
        let begin = cpu_ns();
        for _ in 0..packets {
            match load {
                Load::ToGuest => {
                    self.socket.send(&self.to_guest).unwrap();
                    assert!(self.tap.receive(&mut buffer).is_some());
                }
                Load::ToHost => self.tap.send(&self.to_host).unwrap(),
                Load::Dropped => drop(self.socket.send(&self.to_guest)),
            }
        }
        let spent = (cpu_ns() - begin) as f64 / packets as f64;
        while self.tap.receive(&mut buffer).is_some() {}
        spent
    }
}

fn cpu_ns() -> u64 {
    let now = clock_gettime(ClockId::ThreadCPUTime);
    now.tv_sec.unsigned_abs() * 1_000_000_000 + now.tv_nsec.unsigned_abs()
}

/// What is attached in one measurement.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Subject {
    Empty,
    OtherDevice,
    Watched,
    Tcx,
}

impl Subject {
    const ALL: [Self; 4] = [Self::Empty, Self::OtherDevice, Self::Watched, Self::Tcx];

    const fn name(self) -> &'static str {
        match self {
            Self::Empty => "empty program",
            Self::OtherDevice => "ours, another device is watched",
            Self::Watched => "ours, on the watched tap",
            Self::Tcx => "as classifiers (tcx), one device",
        }
    }

    fn attach(self, bed: &Bed) -> Attached {
        match self {
            Self::Empty => Attached::Yardstick(NetYardstick::open_empty().unwrap()),
            Self::Tcx => Attached::Yardstick(bed.space.run(|| Ok(NetYardstick::open_tcx("tap0")?)).unwrap()),
            Self::OtherDevice | Self::Watched => {
                let mut ebpf = Ebpf::open(&[ProbeGroup::Net]).unwrap();
                let device = if self == Self::Watched { "tap0" } else { "tap1" };
                let slot = bed.watch(&mut ebpf, device);
                Attached::Ours(Box::new(ebpf), slot)
            }
        }
    }
}

/// Detached when dropped.
enum Attached {
    Yardstick(NetYardstick),
    Ours(Box<Ebpf>, NicSlot),
}

impl Attached {
    fn runs(&self) -> BTreeMap<&'static str, ProgramRuns> {
        match self {
            Self::Yardstick(yardstick) => yardstick.runs().into_iter().collect(),
            Self::Ours(ebpf, _) => ebpf.runs().into_iter().collect(),
        }
    }

    /// Packets counted on the tap that is watched, both ways and refused ones.
    fn counted(&mut self) -> u64 {
        match self {
            Self::Yardstick(yardstick) => yardstick.packets().unwrap().iter().sum(),
            Self::Ours(ebpf, slot) => {
                ebpf.read().unwrap();
                let traffic = ebpf.traffic(slot).unwrap();
                traffic.xmit.packets + traffic.receive.packets + traffic.refused
            }
        }
    }
}

fn median(values: &[f64]) -> f64 {
    let mut values = values.to_vec();
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

/// What each program takes, by the kernel's count.
fn programs(bed: &Bed) {
    let _counting = Counting::on();
    let mut figures: BTreeMap<(Load, Subject, &str), Vec<f64>> = BTreeMap::new();
    for round in 0..ROUNDS {
        eprintln!("programs, round {} of {ROUNDS}", round + 1);
        for subject in Subject::ALL {
            let mut attached = subject.attach(bed);
            for load in Load::ALL {
                let (before, counted) = (attached.runs(), attached.counted());
                bed.send(load, PACKETS);
                let counts = matches!(subject, Subject::Watched | Subject::Tcx);
                let grown = attached.counted() - counted;
                assert!(if counts { grown >= PACKETS } else { grown == 0 }, "{subject:?} counted {grown}");
                for (program, now) in attached.runs() {
                    let then = before.get(program).copied().unwrap_or(ProgramRuns { count: 0, ns: 0 });
                    let (count, ns) = (now.count - then.count, now.ns - then.ns);
                    // Programs that hardly ran have nothing to do with this load.
                    if count > PACKETS / 2 {
                        figures.entry((load, subject, program)).or_default().push(ns as f64 / count as f64);
                    }
                }
            }
        }
    }
    let empty = median(&figures[&(Load::ToGuest, Subject::Empty, "bench_empty_net")]);
    println!("ns per run, median of {ROUNDS} rounds; empty program {empty:.1}");
    println!("{:<26} {:<34} {:<20} {:>8} {:>11}", "", "", "program", "ns", "over empty");
    for ((load, subject, program), values) in &figures {
        let ns = median(values);
        println!("{:<26} {:<34} {program:<20} {ns:>8.1} {:>11.2}", load.name(), subject.name(), ns / empty);
    }
}

/// What a packet costs altogether, with and without, in pairs.
fn flood(bed: &Bed) {
    let mut bare: BTreeMap<Load, Vec<f64>> = BTreeMap::new();
    let mut more: BTreeMap<(Load, Subject), Vec<f64>> = BTreeMap::new();
    for pair in 0..PAIRS {
        eprintln!("flood, pair {} of {PAIRS}", pair + 1);
        for subject in Subject::ALL {
            let mut with = BTreeMap::new();
            // Which of both comes first alternates, so that a drift of the machine takes off what it adds.
            for attached in if pair % 2 == 0 { [true, false] } else { [false, true] } {
                let _attached = attached.then(|| subject.attach(bed));
                for load in Load::ALL {
                    with.insert((load, attached), bed.send(load, PACKETS));
                }
            }
            for load in Load::ALL {
                let (on, off) = (with[&(load, true)], with[&(load, false)]);
                bare.entry(load).or_default().push(off);
                more.entry((load, subject)).or_default().push(on - off);
            }
        }
    }
    println!("\nCPU ns of a packet (system calls included), median of {PAIRS} pairs");
    println!(
        "{:<26} {:<34} {:>8} {:>8} {:>14} {:>14}",
        "", "", "bare", "added", "packets/s bare", "packets/s with"
    );
    for ((load, subject), values) in &more {
        let (bare, added) = (median(&bare[load]), median(values));
        let (name, subject) = (load.name(), subject.name());
        let per_s = |ns: f64| 1e9 / ns;
        println!(
            "{name:<26} {subject:<34} {bare:>8.1} {added:>8.1} {:>14.0} {:>14.0}",
            per_s(bare),
            per_s(bare + added)
        );
    }
}

fn main() {
    let bed = Bed::new();
    programs(&bed);
    flood(&bed);
}
