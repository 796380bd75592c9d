//! What the probes of KVM count against machines that leave guest mode exactly as often as they are asked to
//! (`tests/kvmex`), and against KVM's own statistics.
//!
//! Where this host's KVM enters guest mode (kvm_intel or kvm_amd), exits are held to exact numbers as well; elsewhere they
//! must be absent. Needs root and /dev/kvm.
#![expect(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "a test may panic, and prints what it measured"
)]

use std::{
    collections::BTreeMap,
    io::{BufRead as _, BufReader, Write as _},
    os::unix::process::CommandExt as _,
    process::{Child, ChildStdin, ChildStdout, Command, Stdio},
    time::{Duration, Instant},
};

use kvmex::{Irqchip, Machine, Returns, Round};
use monitor::{
    ledger::Ledger,
    source::ebpf::{Ebpf, ExitReason, ExitReasons, Keep, KvmFigures, Slot, ThreadTimes, probes::ProbeGroup},
    split::{Figures, RunParts, Split},
    units::Tid,
};
use serde_json::Value;

const PATIENCE: Duration = Duration::from_secs(60);
const ROUND: Round = Round { outs: 1000, cpuids: 50, mmios: 20, hlts: 100, spins: 0 };

/// This host's KVM reports entries and exits.
fn enters_guest_mode() -> bool {
    ["kvm_intel", "kvm_amd"].iter().any(|m| std::path::Path::new("/sys/module").join(m).exists())
}

/// A machine whose vCPU threads are followed.
struct Watched {
    machine: Machine,
    ebpf: Ebpf,
    slots: Vec<Slot>,
}

impl Watched {
    fn new(vcpus: u32, round: Round, irqchip: Irqchip) -> Self {
        let machine = Machine::new(vcpus, round, irqchip).unwrap();
        let mut ebpf = Ebpf::open(ProbeGroup::ALL).unwrap();
        let follow = |tid| ebpf.follow(Tid(tid), Keep::Everything, None).unwrap();
        let slots = machine.tids().into_iter().map(follow).collect();
        ebpf.seed().unwrap();
        Self { machine, ebpf, slots }
    }

    fn round(&self) -> Vec<Returns> {
        self.machine.begin();
        self.machine.end(PATIENCE).unwrap()
    }

    fn read(&mut self) -> Vec<(ThreadTimes, KvmFigures)> {
        for _ in 0..1000 {
            self.ebpf.read().unwrap();
            let read = |slot| Some((self.ebpf.times(slot)?, self.ebpf.kvm_figures(slot)?));
            if let Some(all) = self.slots.iter().map(read).collect() {
                return all;
            }
        }
        panic!("the threads cannot be read");
    }

    fn reasons(&self, vcpu: usize) -> ExitReasons {
        self.ebpf.exit_reasons(&self.slots[vcpu]).unwrap()
    }

    /// One of KVM's own figures.
    fn kvm_says(&self, vcpu: usize, name: &str) -> u64 {
        let statistics = self.machine.statistics(vcpu).unwrap();
        statistics.into_iter().find(|(n, _)| n == name).unwrap_or_else(|| panic!("KVM has no {name}")).1
    }
}

fn counts(reasons: &[ExitReason]) -> BTreeMap<&str, u64> {
    reasons.iter().map(|r| (r.name.as_ref(), r.count)).collect()
}

#[test]
fn every_return_to_user_space_is_counted_by_reason() {
    let mut watched = Watched::new(2, ROUND, Irqchip::None);
    for rounds in 1..=3 {
        let did = watched.round();
        let read = watched.read();
        for (vcpu, (did, (_, figures))) in did.iter().zip(&read).enumerate() {
            assert_eq!((did.io, did.mmio, did.hlt, did.interrupted), (1001, 20, 100, 0));
            assert_eq!(figures.userspace_exits, rounds * did.total(), "vCPU {vcpu}: {figures:?}");
            assert_eq!((figures.kicks, figures.halts), (0, 0), "vCPU {vcpu}");
            let reasons = watched.reasons(vcpu);
            let expected = [("HLT", 100 * rounds), ("IO", 1001 * rounds), ("MMIO", 20 * rounds)];
            assert_eq!(counts(&reasons.userspace), expected.into(), "vCPU {vcpu}");
        }
    }
}

/// `hlt` in the kernel, some of them broken off by a signal before their interrupt comes: KVM counts the signals itself.
#[test]
fn every_halt_and_every_kick_is_counted() {
    let round = Round { hlts: 20, ..Round::NONE };
    let mut watched = Watched::new(1, round, Irqchip::Kernel);
    watched.machine.begin();
    let mut kicks = 0;
    for i in 0..round.hlts {
        wait(|| watched.kvm_says(0, "halt_exits") == u64::from(i) + 1);
        watched.machine.wait_asleep(0, PATIENCE).unwrap();
        if i % 4 == 1 {
            kicks += 1;
            watched.machine.kick(0).unwrap();
            wait(|| watched.kvm_says(0, "signal_exits") == kicks);
            watched.machine.wait_asleep(0, PATIENCE).unwrap();
        }
        watched.machine.interrupt().unwrap();
    }
    let did = watched.machine.end(PATIENCE).unwrap()[0];
    let (_, figures) = watched.read()[0];
    println!("{figures:?}, {did:?}");
    assert_eq!((did.io, did.interrupted), (1, kicks));
    assert_eq!((figures.kicks, figures.userspace_exits), (kicks, did.total()));
    assert_eq!((figures.halts, figures.halts_polled), (u64::from(round.hlts) + kicks, 0));
    assert_eq!(counts(&watched.reasons(0).userspace), [("EINTR", kicks), ("IO", 1)].into());
}

/// Interrupts come so quickly that KVM polls for the end of halts: how often and how long, by its own statistics.
#[test]
fn polling_is_counted_as_kvm_counts_it() {
    let round = Round { hlts: 500, ..Round::NONE };
    let mut watched = Watched::new(1, round, Irqchip::Kernel);
    watched.machine.begin();
    for pause in (0..400).step_by(7).cycle() {
        if watched.machine.is_over() {
            break;
        }
        watched.machine.interrupt().unwrap();
        let until = Instant::now() + Duration::from_micros(pause);
        while Instant::now() < until {
            std::hint::spin_loop();
        }
    }
    watched.machine.end(PATIENCE).unwrap();
    let (_, figures) = watched.read()[0];
    let polled = watched.kvm_says(0, "halt_successful_poll");
    println!("{figures:?}, {polled} polled by KVM's count, for {} ns", poll_ns(&watched));
    // Not known without the address of the vCPU, which only entries and exits tell.
    assert_eq!(figures.halt_poll_ns, enters_guest_mode().then(|| poll_ns(&watched)));
    assert!(polled <= figures.halts_polled && figures.halts_polled <= figures.halts);
    // Where the interrupt was there first, there was nothing to wait for.
    assert!((1..=u64::from(round.hlts)).contains(&figures.halts), "{figures:?}");
}

fn poll_ns(watched: &Watched) -> u64 {
    watched.kvm_says(0, "halt_poll_success_ns") + watched.kvm_says(0, "halt_poll_fail_ns")
}

/// For at most [`PATIENCE`].
fn wait(until: impl Fn() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !until() {
        assert!(Instant::now() < deadline, "it does not come");
        std::thread::yield_now();
    }
}

/// Where guest mode is entered, every exit is counted by its reason, and KVM counts as many; elsewhere there are none, and
/// none is not 0.
#[test]
fn every_exit_is_counted_by_reason() {
    let mut watched = Watched::new(2, ROUND, Irqchip::None);
    for rounds in 1..=3 {
        watched.round();
        for vcpu in 0..2 {
            let (_, figures) = watched.read()[vcpu];
            let reasons = watched.reasons(vcpu);
            if !enters_guest_mode() {
                assert_eq!((figures.exits, figures.guest_ns), (None, None), "{figures:?}");
                assert_eq!(reasons.guest, []);
                continue;
            }
            let exits = figures.exits.unwrap();
            let by_reason = counts(&reasons.guest);
            println!("vCPU {vcpu}: {exits} exits, {by_reason:?}");
            assert_eq!(exits, watched.kvm_says(vcpu, "exits"), "KVM says otherwise");
            assert_eq!(exits, by_reason.values().sum::<u64>());
            let of = |vmx, svm| by_reason.get(vmx).or(by_reason.get(svm)).copied();
            assert_eq!(of("IO_INSTRUCTION", "io"), Some(1001 * rounds));
            assert_eq!(of("HLT", "hlt"), Some(100 * rounds));
            assert_eq!(of("CPUID", "cpuid"), Some(50 * rounds));
            assert!(!by_reason.contains_key("other"), "{by_reason:?}");
            assert!(reasons.guest.iter().all(|r| r.ns.unwrap() > 0), "{:?}", reasons.guest);
        }
    }
}

/// Guest mode, polling and the rest sum to the run time, whoever else wants the CPU; and what spins is guest mode.
#[test]
fn run_time_is_split_without_a_rest() {
    if !enters_guest_mode() {
        return; // That the figures are absent is another test's matter.
    }
    let spins = Round { spins: 200_000_000, ..Round::NONE };
    let (spinning, _) = split_while_running(spins, 2);
    let (leaving, io_exits) = split_while_running(Round { outs: 5_000, ..Round::NONE }, 1);
    let share = |parts: &RunParts| {
        let run = parts.guest_ns + parts.host_ns + parts.halt_poll_ns;
        parts.guest_ns * 100 / run.max(1)
    };
    let (of_spinning, of_leaving) = (share(&spinning), share(&leaving));
    println!("guest mode: {of_spinning} % when spinning, {of_leaving} % when leaving ({io_exits} exits)");
    assert!(of_spinning > 50 && of_spinning > of_leaving, "{spinning:?}, {leaving:?}");
}

/// The split of the first vCPU's run time over a round, and its exits. All vCPUs share one CPU.
fn split_while_running(round: Round, vcpus: u32) -> (RunParts, u64) {
    let mut watched = Watched::new(vcpus, round, Irqchip::None);
    for tid in watched.machine.tids() {
        let mut cpus = rustix::thread::CpuSet::new();
        cpus.set(0);
        let tid = rustix::process::Pid::from_raw(tid.cast_signed());
        rustix::thread::sched_setaffinity(tid, &cpus).unwrap();
    }
    let mut splits = vec![(Ledger::default(), Split::default()); vcpus as usize];
    let (mut first, mut last, mut readings, mut discarded) = (None, None, 0, 0);
    watched.machine.begin();
    loop {
        let over = watched.machine.is_over();
        watched.ebpf.read().unwrap();
        for (vcpu, slot) in watched.slots.iter().enumerate() {
            let (Some(times), Some(figures)) = (watched.ebpf.times(slot), watched.ebpf.kvm_figures(slot))
            else {
                continue;
            };
            let Some(guest_ns) = figures.guest_ns else { continue };
            readings += 1;
            let at = Figures { run_ns: times.run_ns, guest_ns, halt_poll_ns: figures.halt_poll_ns };
            let (ledger, split) = &mut splits[vcpu];
            let Some(parts) = ledger.add(times).and_then(|_| split.add(at)) else {
                discarded += 1;
                continue;
            };
            if vcpu == 0 {
                first.get_or_insert(at);
                last = Some((at, parts, figures.exits.unwrap()));
            }
        }
        if over {
            break;
        }
        std::thread::sleep(Duration::from_millis(3));
    }
    watched.machine.end(PATIENCE).unwrap();
    let (at_first, (at_last, parts, exits)) = (first.unwrap(), last.unwrap());
    let run = at_last.run_ns - at_first.run_ns;
    println!("{round:?}: run {run} ns = {parts:?}, measured in guest mode {}", at_last.guest_ns);
    println!("{discarded} of {readings} readings discarded");
    assert_eq!(parts.guest_ns + parts.host_ns + parts.halt_poll_ns, run);
    // No more than the run time, by what the readings are apart.
    assert!(at_last.guest_ns - at_first.guest_ns <= run + 2_000_000, "{at_last:?}, {at_first:?}");
    (parts, exits)
}

/// Figures that belong together are never torn: whenever they are read, the reasons sum to the whole.
#[test]
fn no_reading_is_torn() {
    let mut watched = Watched::new(1, Round { outs: 5_000, ..Round::NONE }, Irqchip::None);
    watched.machine.begin();
    let (mut readings, mut last) = (0, 0);
    while last < 5_001 {
        let reasons = watched.reasons(0);
        let before: u64 = reasons.userspace.iter().map(|r| r.count).sum();
        let (_, figures) = watched.read()[0];
        let after: u64 = watched.reasons(0).userspace.iter().map(|r| r.count).sum();
        let read = figures.userspace_exits;
        assert!(before <= read && read <= after, "{before} {read} {after}");
        assert!(last <= read, "{last} {read}");
        last = read;
        readings += 1;
    }
    watched.machine.end(PATIENCE).unwrap();
    println!("{readings} readings while it ran");
    assert!(readings > 10);
}

// ---- the stream

/// A program that looks like QEMU and runs `kvmex`.
struct FakeQemu {
    child: Child,
    rounds: ChildStdin,
    says: BufReader<ChildStdout>,
}

impl FakeQemu {
    const NAME: &str = "kvmex";

    fn start() -> Self {
        let mut command =
            Command::new(std::env::var_os("KVM_MONITOR_KVMEX").expect("KVM_MONITOR_KVMEX is not set"));
        command.arg0("qemu-system-kvmex").args(["-name", "guest=kvmex", "-accel", "kvm"]);
        command.args(["outs=1000", "mmios=20", "hlts=100"]);
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        let (rounds, says) = (child.stdin.take().unwrap(), BufReader::new(child.stdout.take().unwrap()));
        let mut this = Self { child, rounds, says };
        assert!(this.line().starts_with("ready "));
        this
    }

    fn line(&mut self) -> String {
        let mut line = String::new();
        self.says.read_line(&mut line).unwrap();
        line
    }

    fn round(&mut self) {
        writeln!(self.rounds).unwrap();
        assert_eq!(self.line().trim(), "done 1001 20 100");
    }
}

impl Drop for FakeQemu {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// `kvm-monitor run` of one domain.
struct Stream {
    child: Child,
    lines: std::io::Lines<BufReader<ChildStdout>>,
}

impl Stream {
    fn start(domain: &str, args: &[&str]) -> Self {
        let program = std::env::var_os("KVM_MONITOR_BIN").expect("KVM_MONITOR_BIN is not set");
        let mut command = Command::new(program);
        command.args(["run", "--libvirt", "off", "--ebpf", "require", "--interval", "100ms"]);
        command.args(["--domain", domain]).args(args).stdout(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let lines = BufReader::new(child.stdout.take().unwrap()).lines();
        Self { child, lines }
    }

    fn next(&mut self, wanted: impl Fn(&Value) -> bool) -> Value {
        let deadline = Instant::now() + PATIENCE;
        loop {
            assert!(Instant::now() < deadline, "the line does not come");
            let line = self.lines.next().expect("the stream ended").unwrap();
            let line: Value = serde_json::from_str(&line).unwrap();
            if wanted(&line) {
                return line;
            }
        }
    }

    /// The first vCPU of the next sample that has histograms, and with them everything else.
    fn vcpu(&mut self) -> Value {
        self.next(|line| line["vcpus"][0]["wait_hist_ns"].is_array())["vcpus"][0].clone()
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

const KVM_FIELDS: [&str; 10] = [
    "guest_ns",
    "host_ns",
    "halt_poll_ns",
    "exits",
    "userspace_exits",
    "kicks",
    "halts",
    "halts_polled",
    "exit_reasons",
    "userspace_exit_reasons",
];

#[test]
fn the_stream_has_the_exits_of_a_kvm_domain() {
    let mut qemu = FakeQemu::start();
    let mut stream = Stream::start(FakeQemu::NAME, &[]);
    let before = stream.vcpu();
    assert_eq!(before["userspace_exits"]["ebpf"], 0, "{before}");
    qemu.round();
    stream.vcpu();
    let after = stream.vcpu();
    assert_eq!(after["userspace_exits"]["ebpf"], 1121, "{after}");
    assert_eq!(after["userspace_exits"]["best"], "ebpf");
    assert_eq!(after["kicks"]["ebpf"], 0);
    let expected = serde_json::json!({"IO": {"count": 1001}, "HLT": {"count": 100}, "MMIO": {"count": 20}});
    assert_eq!(after["userspace_exit_reasons"], expected);
    for field in ["exits", "exit_reasons", "guest_ns", "host_ns"] {
        assert_eq!(after[field].is_object(), enters_guest_mode(), "{field}: {after}");
    }
}

#[test]
fn without_the_probes_the_fields_are_absent_and_it_says_why() {
    let mut qemu = FakeQemu::start();
    let mut stream = Stream::start(FakeQemu::NAME, &["--probes", "sched"]);
    let session = stream.next(|line| line["type"] == "session");
    let probes = session["probes"].as_array().unwrap();
    let of_kvm = probes.iter().filter(|p| p["name"].as_str().unwrap().starts_with("kvm_"));
    let off = |p: &Value| p["state"] == "off" && p["reason"].as_str().unwrap().contains("--probes");
    assert_eq!(of_kvm.filter(|p| off(p)).count(), 4, "{probes:?}");
    qemu.round();
    stream.vcpu();
    let vcpu = stream.vcpu();
    assert!(vcpu["run_ns"].is_object());
    assert_eq!(KVM_FIELDS.iter().find(|field| !vcpu[**field].is_null()), None, "{vcpu}");
}

/// A guest that QEMU emulates never enters KVM.
#[test]
fn an_emulated_domain_has_none_of_it_and_check_says_why() {
    let qemu = Command::new("qemu-system-x86_64")
        .args([
            "-name",
            "guest=emulated,debug-threads=on",
            "-accel",
            "tcg",
            "-display",
            "none",
            "-nodefaults",
            "-S",
        ])
        .stdin(Stdio::null())
        .spawn()
        .unwrap();
    let _qemu = Killed(qemu);
    let mut stream = Stream::start_when_there("emulated");
    let vcpu = stream.vcpu();
    assert!(vcpu["run_ns"].is_object());
    assert_eq!(KVM_FIELDS.iter().find(|field| !vcpu[**field].is_null()), None, "{vcpu}");
    let check = Command::new(std::env::var_os("KVM_MONITOR_BIN").unwrap())
        .args(["check", "--libvirt", "off"])
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&check.stdout).into_owned();
    assert!(text.contains("emulated (TCG)"), "{text}");
    assert!(text.contains("kvm_exit"), "{text}");
}

struct Killed(Child);

impl Drop for Killed {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Stream {
    /// The vCPU threads of a QEMU that was just started are not there at once.
    fn start_when_there(domain: &str) -> Self {
        let program = std::env::var_os("KVM_MONITOR_BIN").expect("KVM_MONITOR_BIN is not set");
        wait(|| {
            let list = Command::new(&program).args(["list", "--libvirt", "off"]).output().unwrap();
            String::from_utf8_lossy(&list.stdout).contains(domain)
        });
        Self::start(domain, &[])
    }
}
