//! What each way of counting requests costs per request, beside an empty program and libbpf-tools' `biolatency`.
//!
//! The load is fio on a loop device whose file lies in memory, and on a file on such a device. The kernel counts runs and
//! time of each program (`kernel.bpf_stats_enabled`); the time contains the counting's own clock reads, which is why the
//! empty program is measured in the same round. Everything is measured in turn, round after round, and medians are printed:
//! figures of one run compare, figures of two do not.
#![expect(
    clippy::unwrap_used,
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "a program for a terminal"
)]
#![expect(clippy::cast_precision_loss, reason = "averages")]

#[path = "../support/counting.rs"]
mod counting;
#[path = "../support/stage.rs"]
mod stage;

use std::{collections::BTreeMap, path::Path};

use counting::{Counting, Peer, loaded};
use monitor::{
    source::{
        ebpf::{
            Aio, Below, Ebpf, Hook, ImageKind, ImageSlot, Opened, Plan, ProgramRuns, Yardstick,
            probes::ProbeGroup,
        },
        procfs::images::ImageId,
    },
    units::Tgid,
};
use stage::{Fio, Stage, total_ios};

const ROUNDS: usize = 3;
const SECONDS: u32 = 1;
const EXT4: u64 = 0xef53;

/// How fio makes requests, on what, and how a QEMU that did so is counted.
struct Load {
    name: &'static str,
    engine: &'static str,
    direct: bool,
    on_file: bool,
    aio: Aio,
}

const LOADS: [Load; 5] = [
    Load { name: "direct, on a file", engine: "libaio", direct: true, on_file: true, aio: Aio::Native },
    Load { name: "direct, on a device", engine: "libaio", direct: true, on_file: false, aio: Aio::Native },
    Load {
        name: "direct, on a file, io_uring",
        engine: "io_uring",
        direct: true,
        on_file: true,
        aio: Aio::Uring,
    },
    Load { name: "page cache, io_uring", engine: "io_uring", direct: false, on_file: true, aio: Aio::Uring },
    Load {
        name: "page cache, system calls",
        engine: "psync",
        direct: false,
        on_file: true,
        aio: Aio::Threads,
    },
];

/// What is attached in one measurement.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Subject {
    Empty,
    Requests,
    WithDevice,
    OtherProcess,
    Biolatency,
}

impl Subject {
    const ALL: [Self; 5] =
        [Self::Empty, Self::Requests, Self::WithDevice, Self::OtherProcess, Self::Biolatency];

    const fn name(self) -> &'static str {
        match self {
            Self::Empty => "empty program, per run",
            Self::Requests => "ours, requests of the process",
            Self::WithDevice => "ours, and the device's share",
            Self::OtherProcess => "ours, for a process not watched",
            Self::Biolatency => "biolatency (libbpf-tools)",
        }
    }
}

#[derive(Clone, Debug, Default)]
struct Measured {
    ns_per_request: f64,
    events_per_request: f64,
    ns_per_event: f64,
}

impl Load {
    fn path<'a>(&self, stage: &'a Stage) -> &'a Path {
        if self.on_file { &stage.file } else { Path::new(&stage.device) }
    }

    fn fio(&self, stage: &Stage) -> Fio {
        let options = format!(
            "--direct={} --rw=randrw --bs=4k --iodepth=8 --ioengine={} --runtime={SECONDS} --time_based \
             --cpus_allowed=1 --size={}m",
            u8::from(self.direct),
            self.engine,
            Stage::FILE_MIB - 8
        );
        Fio::prepare(&options, self.path(stage))
    }
}

fn plan(ebpf: &Ebpf, load: &Load, with_device: bool) -> Plan {
    let kind = if load.on_file { ImageKind::File(EXT4) } else { ImageKind::Device };
    let opened = Opened { kind, direct: load.direct, aio: load.aio, writable: true };
    let plan = Plan::of(opened, |hook| ebpf.can(hook));
    match plan.below {
        Below::Process | Below::Cached if !with_device => {
            Plan { below: Below::NotAttributable("not wanted"), ..plan }
        }
        _ => plan,
    }
}

fn measure(subject: Subject, load: &Load, stage: &Stage) -> Option<Measured> {
    let fio = load.fio(stage);
    let between = |fio: Fio, runs: &dyn Fn() -> BTreeMap<String, ProgramRuns>| {
        let before = runs();
        let requests = total_ios(&fio.go()) as f64;
        let (mut events, mut ns) = (0.0, 0.0);
        for (name, now) in runs() {
            let then = before.get(&name).copied().unwrap_or(ProgramRuns { count: 0, ns: 0 });
            events += (now.count - then.count) as f64;
            ns += (now.ns - then.ns) as f64;
        }
        Measured {
            ns_per_request: ns / requests,
            events_per_request: events / requests,
            ns_per_event: ns / events.max(1.0),
        }
    };
    match subject {
        Subject::Empty => {
            let yardstick = Yardstick::open().unwrap();
            Some(between(fio, &|| yardstick.runs().map(|r| ("empty".to_owned(), r)).into_iter().collect()))
        }
        Subject::Requests | Subject::WithDevice | Subject::OtherProcess => {
            let mut ebpf = Ebpf::open(&[ProbeGroup::Block]).unwrap();
            let plan = plan(&ebpf, load, subject != Subject::Requests);
            // The first process of the system makes none of these requests.
            let tgid = if subject == Subject::OtherProcess { Tgid(1) } else { fio.tgid() };
            let id = ImageId::of_path(load.path(stage)).unwrap();
            let slot: ImageSlot = ebpf.watch_image(id.key(tgid), plan).unwrap();
            let runs = || ebpf.runs().into_iter().map(|(n, r)| (n.to_owned(), r)).collect();
            let measured = between(fio, &runs);
            let counted = ebpf.image(&slot).unwrap().image;
            let seen: u64 = counted.operations.iter().map(|operation| operation.done).sum();
            assert_eq!(seen > 0, subject != Subject::OtherProcess, "{}: {counted:?}", load.name);
            assert_eq!(counted.untimed, 0, "{}", load.name);
            Some(measured)
        }
        Subject::Biolatency => {
            let before = loaded();
            let Some(peer) = Peer::start("biolatency") else {
                fio.go(); // Nothing is attached: it only has to end.
                return None;
            };
            let measured = between(fio, &|| {
                let mut now = loaded();
                now.retain(|id, _| !before.contains_key(id));
                now
            });
            drop(peer);
            Some(measured)
        }
    }
}

fn median(values: impl Iterator<Item = f64>) -> f64 {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

/// Names of the hooks that count a load, for the table.
fn hooks(load: &Load) -> String {
    let ebpf = Ebpf::open(&[ProbeGroup::Block]).unwrap();
    let names: Vec<String> = plan(&ebpf, load, false)
        .data
        .into_iter()
        .map(|hook: Hook| format!("{hook:?}").to_lowercase())
        .collect();
    names.join(", ")
}

fn main() {
    // Words of the names of the loads that are wanted; cargo adds options.
    let words: Vec<String> = std::env::args().skip(1).filter(|word| !word.starts_with('-')).collect();
    let stage = Stage::new("bench");
    let _counting = Counting::on();
    for load in LOADS.iter().filter(|load| words.iter().all(|word| load.name.contains(word))) {
        let mut all: BTreeMap<Subject, Vec<Measured>> = BTreeMap::new();
        for round in 0..ROUNDS {
            eprintln!("{}, round {} of {ROUNDS}", load.name, round + 1);
            for subject in Subject::ALL {
                if let Some(measured) = measure(subject, load, &stage) {
                    all.entry(subject).or_default().push(measured);
                }
            }
        }
        let of = |subject: Subject, figure: fn(&Measured) -> f64| {
            all.get(&subject).map(|all| median(all.iter().map(figure)))
        };
        let empty = of(Subject::Empty, |m| m.ns_per_event).unwrap();
        let peer = of(Subject::Biolatency, |m| m.ns_per_request).filter(|ns| *ns > 0.0);
        println!("\n{} ({}), counted by {}: median of {ROUNDS} rounds", load.name, load.engine, hooks(load));
        println!(
            "{:<34} {:>12} {:>12} {:>10} {:>11} {:>16} {:>10}",
            "", "ns/request", "events/req.", "ns/event", "over empty", "over biolatency", "net of empty"
        );
        for (subject, measured) in &all {
            let figure = |figure: fn(&Measured) -> f64| median(measured.iter().map(figure));
            let (request, event) = (figure(|m| m.ns_per_request), figure(|m| m.ns_per_event));
            let over = peer.map_or("-".to_owned(), |peer| format!("{:.2}", request / peer));
            let net = request - empty * figure(|m| m.events_per_request);
            println!(
                "{:<34} {request:>12.1} {:>12.2} {event:>10.1} {:>11.2} {over:>16} {net:>12.1}",
                subject.name(),
                figure(|m| m.events_per_request),
                event / empty
            );
        }
    }
}
