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

use std::{
    collections::BTreeMap,
    io::Write as _,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
};

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

const ROUNDS: usize = 3;
const SECONDS: u32 = 1;
const MIB: u32 = 96;
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

/// A loop device over a file in memory, and a file system on another one. Both go when this is dropped.
struct Stage {
    directory: PathBuf,
    device: String,
    below: String,
    file: PathBuf,
}

impl Stage {
    fn new() -> Self {
        let directory = std::env::temp_dir().join(format!("kvm-monitor-bench-{}", std::process::id()));
        let memory = directory.join("memory");
        std::fs::create_dir_all(&memory).unwrap();
        run("mount", &["-t", "tmpfs", "-o", &format!("size={}m", 2 * MIB + 64), "tmpfs", text(&memory)]);
        let device = loop_device(&memory.join("device"));
        let below = loop_device(&memory.join("below"));
        let mounted = directory.join("mounted");
        std::fs::create_dir_all(&mounted).unwrap();
        run("mkfs.ext4", &["-q", "-F", "-O", "^has_journal", &below]);
        run("mount", &[&below, text(&mounted)]);
        let file = mounted.join("file");
        std::fs::write(&file, vec![0xa5; (MIB as usize - 24) << 20]).unwrap();
        run("sync", &["-f", text(&file)]);
        Self { directory, device, below, file }
    }

    fn path(&self, load: &Load) -> &Path {
        if load.on_file { &self.file } else { Path::new(&self.device) }
    }
}

impl Drop for Stage {
    fn drop(&mut self) {
        for (program, args) in [
            ("umount", vec![text(&self.directory.join("mounted")).to_owned()]),
            ("losetup", vec!["--detach".to_owned(), self.device.clone()]),
            ("losetup", vec!["--detach".to_owned(), self.below.clone()]),
            ("umount", vec![text(&self.directory.join("memory")).to_owned()]),
        ] {
            let _ = Command::new(program).args(args).status();
        }
        let _ = std::fs::remove_dir_all(&self.directory);
    }
}

fn loop_device(file: &Path) -> String {
    std::fs::write(file, vec![0; (MIB as usize) << 20]).unwrap();
    let output =
        Command::new("losetup").args(["--find", "--show", "--direct-io=on"]).arg(file).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap().trim().to_owned()
}

fn run(program: &str, args: &[&str]) {
    let status = Command::new(program).args(args).status();
    assert!(status.is_ok_and(|status| status.success()), "{program} {args:?} failed");
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// fio, which begins when it is told to, so that its process id is known before.
struct Fio(Child);

impl Fio {
    fn prepare(load: &Load, on: &Path) -> Self {
        let options = format!(
            "--name=b --filename={} --direct={} --rw=randrw --bs=4k --iodepth=8 --ioengine={} --runtime={SECONDS} \
             --size={}m --time_based --thread --cpus_allowed=1 --output-format=json",
            on.display(),
            u8::from(load.direct),
            load.engine,
            MIB - 32
        );
        let mut shell = Command::new("sh");
        shell.args(["-c", &format!("read go; exec fio {options}")]);
        Self(shell.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap())
    }

    fn tgid(&self) -> Tgid {
        Tgid(self.0.id())
    }

    /// Requests made.
    fn go(mut self) -> f64 {
        self.0.stdin.take().unwrap().write_all(b"\n").unwrap();
        let output = self.0.wait_with_output().unwrap();
        // fio may have something to say before its answer.
        let answer = output.stdout.iter().position(|byte| *byte == b'{').unwrap_or_default();
        let told: serde_json::Value = serde_json::from_slice(&output.stdout[answer..]).expect("fio's answer");
        ["read", "write"].map(|of| told["jobs"][0][of]["total_ios"].as_f64().unwrap()).iter().sum()
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
    let on = stage.path(load);
    let fio = Fio::prepare(load, on);
    let between = |fio: Fio, runs: &dyn Fn() -> BTreeMap<String, ProgramRuns>| {
        let before = runs();
        let requests = fio.go();
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
            let id = ImageId::of_path(on).unwrap();
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
    let stage = Stage::new();
    let _counting = Counting::on();
    for load in &LOADS {
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
            "{:<34} {:>12} {:>12} {:>10} {:>11} {:>16}",
            "", "ns/request", "events/req.", "ns/event", "over empty", "over biolatency"
        );
        for (subject, measured) in &all {
            let figure = |figure: fn(&Measured) -> f64| median(measured.iter().map(figure));
            let (request, event) = (figure(|m| m.ns_per_request), figure(|m| m.ns_per_event));
            let over = peer.map_or("-".to_owned(), |peer| format!("{:.2}", request / peer));
            println!(
                "{:<34} {request:>12.1} {:>12.2} {event:>10.1} {:>11.2} {over:>16}",
                subject.name(),
                figure(|m| m.events_per_request),
                event / empty
            );
        }
    }
}
