//! Faults on a live host: every way of ending, sources that go away, hang and come back, guests that die and are
//! reborn, missing rights. Whatever still works goes on, every line holds to the schema, nothing stays behind.
//!
//! The real binary runs inside a [`Lab`], mostly against one small guest that all tests share. Needs root and the
//! variables that `cargo xtask test` sets. Nothing here depends on how fast something happens: tests wait for
//! lines of the stream, for at most [`PATIENCE`].
#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::os::unix::process::ExitStatusExt as _;
use std::path::PathBuf;
use std::process::{Child, ChildStdout, Command, ExitStatus, Stdio};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use lab::{DiskSpec, Guest, GuestSpec, Lab, LabDirs, NicSpec, StartState};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

/// Longer than anything here may take.
const PATIENCE: Duration = Duration::from_secs(60);
/// The guest that all tests share, and the one that comes and goes.
const NAME: &str = "faults";
const UUID: &str = "5ec0de00-0000-4000-8000-0000000000fa";
const MORTAL: &str = "mortal";
const MORTAL_UUID: &str = "5ec0de00-0000-4000-8000-0000000000fb";
/// What a run with kernel probes holds in the kernel.
const PROGRAMS: [&str; 3] = ["sched_switch", "read_threads", "seed_threads"];
const MAPS: [&str; 5] = ["FILTER", "TABLE", "THREADS", "READINGS", "CLOCK"];
/// Quick ticks; every read of libvirt brings every group.
const QUICK: [&str; 6] =
    ["--interval", "100ms", "--libvirt-interval", "200ms", "--libvirt-slow-interval", "200ms"];

// ---- every way of ending

#[test]
fn an_end_asked_for_is_a_success_with_a_summary() {
    let stage = stage();
    for signal in [Signal::INT, Signal::TERM, Signal::HUP] {
        let ended = end_while_it_samples(&stage, &QUICK, |run| run.signal(signal));
        assert_eq!(ended.status.code(), Some(0), "{signal:?}: {}", ended.stderr);
        assert!(ended.summary()["reason"].as_str().unwrap().starts_with("SIG"));
    }
    let args = ["--interval", "50ms", "--duration", "2s"];
    let ended = end_while_it_samples(&stage, &args, |_| {});
    assert_eq!(ended.status.code(), Some(0), "--duration: {}", ended.stderr);
    assert!(ended.summary()["reason"].as_str().unwrap().contains("--duration"));
}

#[test]
fn a_reader_that_leaves_is_a_success() {
    let stage = stage();
    let ended = end_while_it_samples(&stage, &QUICK, Run::close_stdout);
    assert_eq!((ended.status.code(), ended.stderr.as_str()), (Some(0), ""));
}

#[test]
fn a_full_disk_is_an_error() {
    let stage = stage();
    let before = bpf_objects();
    let ended = stage.run(&["--output", "/dev/full", "--interval", "50ms", "--libvirt", "off"]).end();
    ended.assert_error(&["/dev/full", "No space left"]);
    assert_nothing_left(&before, &BTreeSet::new());
}

#[test]
fn an_error_at_the_start_is_one_line() {
    let stage = stage();
    let before = bpf_objects();
    let check = |args: &[&str], expected: &[&str]| stage.run(args).end().assert_error(expected);
    check(&["--domain", "nobody"], &["nobody", "kvm-monitor list"]);
    // Again and again: it ends while libvirt is being connected, which must not become a crash.
    for _ in 0..4 {
        check(&["--output", "/nonexistent/x"], &["/nonexistent/x", "No such file"]);
    }
    let nowhere = "qemu+unix:///system?socket=/nonexistent";
    check(&["--libvirt", "require", "--connect", nowhere], &["--libvirt require", "start it"]);
    assert_nothing_left(&before, &BTreeSet::new());
}

#[test]
fn nothing_is_left_after_sigkill() {
    let stage = stage();
    let before = bpf_objects();
    let begin = Instant::now();
    let ended = end_while_it_samples(&stage, &QUICK, |run| run.signal(Signal::KILL));
    assert_eq!(ended.status.signal(), Some(9));
    // Now at moments while it starts, when programs are loaded and attached one by one.
    let start_up = begin.elapsed();
    let mut random = lab::monotonic_ns() | 1;
    for signal in [[Signal::KILL; 4], [Signal::KILL, Signal::TERM, Signal::KILL, Signal::INT]].concat() {
        let run = stage.run(&QUICK);
        random = xorshift(random);
        std::thread::sleep(start_up.mul_f64(fraction(random)));
        run.signal(signal);
        let ended = run.end();
        // Before it waits for signals, they end it as they end any program.
        let killed = ended.status.signal() == Some(signal.as_raw());
        assert!(killed || ended.status.code() == Some(0), "{signal:?}: {}", ended.stderr);
    }
    assert_nothing_left(&before, &BTreeSet::new());
}

/// Like Ctrl-Z, or a host that sleeps.
#[test]
fn a_monitor_that_is_stopped_for_a_while_counts_what_it_missed() {
    let stage = stage();
    let interval = Duration::from_millis(50);
    let mut run = stage.run(&["--interval", "50ms"]);
    run.wait("a sample", |r| is_sample_of(r, UUID));
    let (mut random, mut stopped) = (lab::monotonic_ns() | 1, Duration::ZERO);
    for _ in 0..8 {
        random = xorshift(random);
        let monitor = Stopped::new(run.child.id());
        let begin = Instant::now();
        std::thread::sleep(interval.mul_f64(2.0 + 4.0 * fraction(random)));
        stopped += begin.elapsed();
        drop(monitor);
        run.wait("a sample of after", |r| is_sample_of(r, UUID));
    }
    let ended = run.stop();
    let count = |key: &str| ended.summary()[key].as_u64().unwrap();
    let intervals = |ns: u64| ns / u64::try_from(interval.as_nanos()).unwrap();
    // Each stop lets at least its whole intervals but one pass.
    let least = intervals(u64::try_from(stopped.as_nanos()).unwrap()) - 2 * 8;
    assert!(count("ticks_missed") >= least, "{} missed, not {least}", count("ticks_missed"));
    assert!(count("ticks") + count("ticks_missed") <= intervals(count("wall_ns")) + 1);
}

/// From 0 to 1.
fn fraction(random: u64) -> f64 {
    f64::from(u16::try_from(random >> 48).unwrap()) / 65_536.0
}

fn xorshift(mut x: u64) -> u64 {
    x ^= x << 13;
    x ^= x >> 7;
    x ^ x << 17
}

/// Ends a run in the midst of its work, and sees that what it held in the kernel is gone.
fn end_while_it_samples(stage: &Stage, args: &[&str], end: impl FnOnce(&mut Run)) -> Ended {
    let before = bpf_objects();
    let mut run = stage.run(args);
    run.wait("a sample with kernel figures", |r| is_sample_of(r, UUID) && has_window(r, "ebpf"));
    let held = objects_held_by(run.child.id());
    let all = bpf_objects();
    let names: BTreeSet<&str> = held.iter().filter_map(|object| Some(all.get(object)?.as_str())).collect();
    for name in PROGRAMS.iter().chain(&MAPS) {
        assert!(names.contains(name), "bpftool does not show {name} while it runs, only {names:?}");
    }
    end(&mut run);
    let ended = run.end();
    assert_nothing_left(&before, &held);
    ended
}

// ---- libvirt goes away

#[test]
fn libvirtd_that_ends_and_returns_is_told_once_each_time() {
    let stage = stage();
    let mut run = stage.run(&QUICK);
    run.wait_fresh("libvirt");
    for stop in [Lab::stop_libvirtd, Lab::kill_libvirtd] {
        stop(&stage.lab).unwrap();
        run.wait_event("source_lost", "libvirt");
        run.wait_samples_without_libvirt(10);
        stage.lab.start_libvirtd().unwrap();
        run.wait_event("source_back", "libvirt");
        run.wait_fresh("libvirt");
    }
    assert_went_on(run.stop(), 2);
}

#[test]
fn libvirtd_that_hangs_delays_nothing() {
    let stage = stage();
    let mut run = stage.run(&QUICK);
    run.wait_fresh("libvirt");
    let libvirtd = Stopped::new(stage.lab.libvirtd_pid().unwrap());
    // These two find it hung from their start.
    let mut late = stage.run(&QUICK);
    let strict = stage.run(&["--libvirt", "require"]);
    run.wait_event("source_lost", "did not answer");
    run.wait_samples_without_libvirt(10);
    late.wait_samples_without_libvirt(3);
    strict.end().assert_error(&["--libvirt require", "did not answer"]);
    let ended = late.stop();
    // Reads that were due, not ticks.
    let lost = ended.health()["sources"]["libvirt"]["lost"].as_u64().unwrap();
    assert!(lost <= ended.summary()["wall_ns"].as_u64().unwrap() / 200_000_000, "{lost} reads lost");
    let libvirt = &ended.records[0]["sources"]["libvirt"];
    assert_eq!(libvirt["available"], false);
    assert!(libvirt["reason"].as_str().unwrap().contains("did not answer"), "{libvirt}");
    drop(libvirtd);
    run.wait_event("source_back", "libvirt");
    run.wait_fresh("libvirt");
    assert_went_on(run.stop(), 1);
}

/// Every loss of libvirt was told once and taken back once, and meant nothing to the domain.
fn assert_went_on(ended: Ended, losses: usize) {
    let of_source: Vec<&str> = ended
        .records
        .iter()
        .filter(|r| r["type"] == "event")
        .map(|r| r["kind"].as_str().unwrap())
        .filter(|kind| kind.starts_with("source_"))
        .collect();
    assert_eq!(of_source, ["source_lost", "source_back"].repeat(losses));
    let ours = ended.records.iter().filter(|r| r["domain"]["uuid"] == UUID);
    for record in ours {
        assert_ne!(record["change"], "gone", "{record}");
        assert!(record["epoch"].is_null() || record["epoch"] == 0, "{record}");
        assert!(record["type"] != "sample" || has_window(record, "ebpf") && has_window(record, "procfs"));
    }
}

// ---- QEMU stops, dies, returns

#[test]
fn a_stopped_qemu_is_sampled_from_outside() {
    let stage = stage();
    let mut run = stage.run(&QUICK);
    run.wait_fresh("libvirt");
    let qemu = Stopped::new(stage.guest.pid);
    let begin = lab::monotonic_ns();
    // Longer than libvirt's deadline: it cannot answer as long as QEMU does not.
    run.wait_event("source_lost", "did not answer");
    run.wait_samples_without_libvirt(10);
    drop(qemu);
    run.wait_event("source_back", "libvirt");
    run.wait("libvirt's word of after", |r| {
        is_sample_of(r, UUID) && r["windows"]["libvirt"][0].as_u64().is_some_and(|at| at > begin)
    });
    assert_went_on(run.stop(), 1);
}

#[test]
fn a_guest_that_is_destroyed_goes_with_its_last_word() {
    let stage = stage();
    let mut run = stage.run_unfiltered(&QUICK);
    run.wait_fresh("libvirt");
    let mortal = stage.boot_mortal();
    let tid = mortal.vcpu_tids().unwrap()[0];
    let appeared = run.wait("the new guest", |r| is_change_of(r, MORTAL_UUID, "appeared"));
    assert_eq!(appeared["domain"]["name"], MORTAL);
    run.wait("its kernel figures", |r| {
        is_sample_of(r, MORTAL_UUID)
            && r["vcpus"][0]["tid"] == tid
            && r["vcpus"][0]["run_ns"]["ebpf"].is_u64()
    });
    run.wait("libvirt's word on it", |r| is_sample_of(r, MORTAL_UUID) && has_window(r, "libvirt"));
    mortal.destroy().unwrap();
    let gone = run.wait("its end", |r| is_change_of(r, MORTAL_UUID, "gone"));
    assert_eq!(gone["domain"]["name"], MORTAL);
    assert_eq!(gone["domain"]["pid"], mortal.pid, "the last values known: {gone}");
    assert_eq!(gone["domain"]["vcpus"][0]["tid"], tid, "the last values known: {gone}");
    // It stays away while the other goes on.
    for _ in 0..5 {
        run.wait("a sample", |r| is_sample_of(r, UUID));
    }
    assert_eq!(run.stop().status.code(), Some(0));
}

/// libvirt cannot say that a guest is gone when it is gone itself.
#[test]
fn a_guest_that_dies_while_libvirtd_is_away_goes() {
    let stage = stage();
    let mortal = stage.boot_mortal();
    let mut run = stage.run_unfiltered(&QUICK);
    run.wait("libvirt's word on it", |r| is_sample_of(r, MORTAL_UUID) && has_window(r, "libvirt"));
    stage.lab.kill_libvirtd().unwrap();
    run.wait_event("source_lost", "libvirt");
    send(mortal.pid, Signal::KILL);
    run.wait("its end", |r| is_change_of(r, MORTAL_UUID, "gone"));
    stage.lab.start_libvirtd().unwrap();
    run.wait_event("source_back", "libvirt");
    run.wait_fresh("libvirt");
    let ended = run.stop();
    let returns = ended.records.iter().filter(|r| is_change_of(r, MORTAL_UUID, "appeared")).count();
    assert_eq!(returns, 1, "it returned from the dead");
}

/// Whoever notices first, libvirt or `/proc`: the counters of the new QEMU are not the old one's. That no rate is
/// formed across is checked in every stream of this file.
#[test]
fn a_guest_that_is_started_again_has_new_counters() {
    let stage = stage();
    let slow = ["--interval", "100ms", "--libvirt-interval", "3s", "--libvirt-slow-interval", "3s"];
    for args in [QUICK, slow] {
        let old = stage.boot_mortal();
        let mut run = stage.run_unfiltered(&args);
        let sampled = |guest: &Guest, source: &'static str| {
            let tid = guest.vcpu_tids().unwrap()[0];
            move |r: &Value| {
                is_sample_of(r, MORTAL_UUID)
                    && r["vcpus"][0]["tid"] == tid
                    && r["vcpus"][0]["run_ns"][source].is_u64()
            }
        };
        let before = run.wait("kernel figures of the old one", sampled(&old, "ebpf"));
        old.destroy().unwrap();
        let new = stage.boot_mortal();
        for source in ["ebpf", "libvirt", "ebpf", "procfs"] {
            run.wait(&format!("the new one by {source}"), sampled(&new, source));
        }
        new.destroy().unwrap();
        run.wait("its end", |r| is_change_of(r, MORTAL_UUID, "gone"));
        let ended = run.stop();
        let was_gone = ended.records.iter().filter(|r| is_change_of(r, MORTAL_UUID, "gone")).count() > 1;
        let epochs: BTreeSet<u64> = ended
            .records
            .iter()
            .filter(|r| is_sample_of(r, MORTAL_UUID))
            .filter_map(|r| r["epoch"].as_u64())
            .collect();
        assert!(was_gone || epochs.len() > 1, "{before} and the one after are told as one");
    }
}

// ---- sources that are missing from the start

#[test]
fn without_capabilities_the_other_sources_go_on() {
    let stage = stage();
    let drop = "-bpf,-perfmon,-sys_admin";
    let command = || {
        let mut command = stage.lab.command("setpriv");
        command.args(["--bounding-set", drop, "--inh-caps", drop]).arg(program());
        command
    };
    let strict = Run::start(command(), &["run", "--ebpf", "require"]).end();
    strict.assert_error(&["--ebpf require", "CAP_BPF", "CAP_PERFMON"]);
    let reason = reason_for_no_ebpf(command());
    assert!(reason.contains("CAP_BPF") && reason.contains("CAP_PERFMON"), "{reason}");
}

#[test]
fn without_kernel_type_information_the_other_sources_go_on() {
    let stage = stage();
    let command = || {
        let mut command = stage.lab.command("unshare");
        let hide = r#"mount -t tmpfs none /sys/kernel/btf && exec "$@""#;
        command.args(["--mount", "sh", "-euc", hide, "sh"]).arg(program());
        command
    };
    let strict = Run::start(command(), &["run", "--ebpf", "require"]).end();
    strict.assert_error(&["--ebpf require", "CONFIG_DEBUG_INFO_BTF"]);
    let reason = reason_for_no_ebpf(command());
    assert!(reason.contains("CONFIG_DEBUG_INFO_BTF"), "{reason}");
}

/// Runs where kernel probes cannot work; returns what the session says of them.
fn reason_for_no_ebpf(command: Command) -> String {
    let mut run = Run::start(command, &[&["run", "--domain", NAME], &QUICK[..]].concat());
    run.wait("both other sources", |r| {
        is_sample_of(r, UUID) && has_window(r, "libvirt") && has_window(r, "procfs")
    });
    let ended = run.stop();
    let session = &ended.records[0];
    assert_eq!(session["sources"]["ebpf"]["available"], false);
    let off = |probe: &Value| probe["state"] == "off" && probe["reason"].is_string();
    assert!(session["probes"].as_array().unwrap().iter().all(off), "{}", session["probes"]);
    assert!(ended.records.iter().all(|r| !has_window(r, "ebpf")));
    session["sources"]["ebpf"]["reason"].as_str().unwrap().to_owned()
}

#[test]
fn without_libvirt_domains_are_found_by_their_processes() {
    let stage = stage();
    let tids = stage.guest.vcpu_tids().unwrap();
    let nowhere = "qemu+unix:///system?socket=/nonexistent";
    for (args, reason) in [
        (["--libvirt", "off", "--interval", "100ms"], "--libvirt off"),
        (["--connect", nowhere, "--interval", "100ms"], "start it"),
    ] {
        let mut run = stage.run(&args);
        let domain = run.wait("the domain", |r| is_change_of(r, UUID, "appeared"))["domain"].clone();
        assert_eq!(
            (&domain["name"], &domain["found_by"], &domain["pid"]),
            (&NAME.into(), &"procfs".into(), &stage.guest.pid.into())
        );
        let found = domain["vcpus"].as_array().unwrap().iter().map(|v| v["tid"].as_u64().unwrap());
        assert!(found.eq(tids.iter().map(|tid| u64::from(*tid))), "{domain}");
        run.wait("kernel figures", |r| {
            is_sample_of(r, UUID) && r["vcpus"][0]["run_ns"]["ebpf"].is_u64() && has_window(r, "procfs")
        });
        let ended = run.stop();
        assert!(ended.records.iter().all(|r| !has_window(r, "libvirt")));
        let told = &ended.records[0]["sources"]["libvirt"];
        assert!(told["reason"].as_str().unwrap().contains(reason), "{told}");
    }
}

#[test]
fn libvirts_dear_groups_are_read_at_every_read_only_without_kernel_probes() {
    let stage = stage();
    let cadence = ["--interval", "100ms", "--libvirt-interval", "200ms", "--libvirt-slow-interval", "1h"];
    for (ebpf, dear_reads) in [("off", 4), ("require", 1)] {
        let mut run = stage.run(&[&["--ebpf", ebpf], &cadence[..]].concat());
        let reads: Vec<Value> = (0..4)
            .map(|_| run.wait("a read of libvirt", |r| is_sample_of(r, UUID) && has_window(r, "libvirt")))
            .collect();
        let dear =
            |r: &&Value| r["cpu"]["time_ns"]["libvirt"].is_u64() && r["disks"][0]["rd_req"].is_object();
        let cheap = |r: &&Value| r["interfaces"][0]["rx_bytes"]["libvirt"].is_u64();
        let counted = (reads.iter().filter(dear).count(), reads.iter().filter(cheap).count());
        assert_eq!(counted, (dear_reads, 4), "--ebpf {ebpf}");
        let ended = run.stop();
        let ours = ended.records.iter().filter(|r| is_sample_of(r, UUID));
        for record in ours {
            assert_eq!(has_window(record, "ebpf"), ebpf != "off", "{record}");
        }
    }
}

#[test]
fn proc_alone_is_a_source() {
    let stage = stage();
    let mut run = stage.run(&["--ebpf", "off", "--libvirt", "off", "--interval", "100ms"]);
    run.wait("figures of /proc", |r| {
        is_sample_of(r, UUID)
            && r["vcpus"][0]["run_ns"]["procfs"].is_u64()
            && r["memory"]["rss_bytes"]["procfs"].is_u64()
    });
    let ended = run.stop();
    assert!(ended.records.iter().all(|r| !has_window(r, "ebpf") && !has_window(r, "libvirt")));
}

// ---- the stage: one lab and one guest for all tests, one test at a time

struct Stage {
    lab: Lab,
    guest: Guest,
}

/// Mind that a static is never dropped: the lab ends itself when this process does.
fn stage() -> Performance {
    static STAGE: OnceLock<Stage> = OnceLock::new();
    static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());
    let alone = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
    let stage = STAGE.get_or_init(Stage::build);
    // A test that failed may have left these.
    if stage.lab.libvirtd_pid().is_none() {
        stage.lab.start_libvirtd().unwrap();
    }
    let _ = stage.lab.virsh(&["destroy", MORTAL]);
    Performance { stage, _alone: alone }
}

struct Performance {
    stage: &'static Stage,
    _alone: MutexGuard<'static, ()>,
}

impl std::ops::Deref for Performance {
    type Target = Stage;

    fn deref(&self) -> &Stage {
        self.stage
    }
}

impl Stage {
    fn build() -> Self {
        let lab = Lab::start(&LabDirs::from_env().unwrap()).unwrap();
        let nic = NicSpec::new("tap-faults", 0);
        // It works a little for ever, so that its counters rise.
        let script = format!("{} burn=cpu0:0.01s sleep=0.2s times=4000000000", nic.net_step("eth0"));
        let guest = lab.boot(&GuestSpec {
            uuid: Some(UUID.to_owned()),
            disks: vec![DiskSpec::raw("vda", 1 << 20)],
            nics: vec![nic],
            ..GuestSpec::new(NAME, &script)
        });
        Self { guest: guest.unwrap(), lab }
    }

    /// A guest that never executes an instruction.
    fn boot_mortal(&self) -> Guest {
        let spec = GuestSpec {
            uuid: Some(MORTAL_UUID.to_owned()),
            start: StartState::Paused,
            ..GuestSpec::new(MORTAL, "sleep=1s")
        };
        self.lab.boot(&spec).unwrap()
    }

    /// `kvm-monitor run` in the lab, for the shared guest unless `args` say otherwise.
    fn run(&self, args: &[&str]) -> Run {
        let ours: &[&str] = if args.contains(&"--domain") { &[] } else { &["--domain", NAME] };
        self.run_unfiltered(&[ours, args].concat())
    }

    /// The same for every domain: by `/proc` it sees those outside of the lab too.
    fn run_unfiltered(&self, args: &[&str]) -> Run {
        Run::start(self.lab.command(program()), &[&["run"], args].concat())
    }
}

fn program() -> PathBuf {
    let program = std::env::var_os("KVM_MONITOR_BIN");
    program.expect("KVM_MONITOR_BIN is not set: run the live tests with `cargo xtask test`").into()
}

/// A process that does not run until this is dropped.
struct Stopped(u32);

impl Stopped {
    fn new(pid: u32) -> Self {
        send(pid, Signal::STOP);
        Self(pid)
    }
}

impl Drop for Stopped {
    fn drop(&mut self) {
        // Fails only if it is gone: nothing to wake, and a test that fails drops this as well.
        let _ = try_send(self.0, Signal::CONT);
    }
}

fn send(pid: u32, signal: Signal) {
    try_send(pid, signal).unwrap();
}

fn try_send(pid: u32, signal: Signal) -> rustix::io::Result<()> {
    kill_process(Pid::from_raw(i32::try_from(pid).unwrap()).unwrap(), signal)
}

// ---- a run of the program

/// Killed when dropped.
struct Run {
    child: Child,
    lines: Option<mpsc::Receiver<String>>,
    stderr: Option<JoinHandle<String>>,
    text: Vec<String>,
    records: Vec<Value>,
}

/// A run that is over. Its stream has been checked.
struct Ended {
    status: ExitStatus,
    stderr: String,
    records: Vec<Value>,
}

impl Run {
    fn start(mut command: Command, args: &[&str]) -> Self {
        command.args(args).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.env_remove("KVM_MONITOR_LOG").spawn().unwrap();
        let (stdout, mut stderr) = (child.stdout.take().unwrap(), child.stderr.take().unwrap());
        let (give, lines) = mpsc::channel();
        std::thread::spawn(move || {
            // The pipe is closed when nobody takes the lines any more.
            BufReader::new(stdout).lines().map_while(Result::ok).try_for_each(|line| give.send(line))
        });
        let stderr = std::thread::spawn(move || {
            let mut text = String::new();
            let _ = stderr.read_to_string(&mut text); // What came before an error is what counts.
            text
        });
        let (lines, stderr) = (Some(lines), Some(stderr));
        Self { child, lines, stderr, text: Vec::new(), records: Vec::new() }
    }

    /// The next line; none if there are no more.
    fn next(&mut self, deadline: Instant) -> Option<&Value> {
        let lines = self.lines.as_ref()?;
        let line = match lines.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
            Ok(line) => line,
            Err(RecvTimeoutError::Disconnected) => return None,
            Err(RecvTimeoutError::Timeout) => panic!("waited in vain; {}", self.told()),
        };
        let record = serde_json::from_str(&line).unwrap_or_else(|error| panic!("{error}: {line}"));
        self.text.push(line);
        self.records.push(record);
        self.records.last()
    }

    /// Reads on until a line is as wanted.
    fn wait(&mut self, what: &str, mut wanted: impl FnMut(&Value) -> bool) -> Value {
        let deadline = Instant::now() + PATIENCE;
        while let Some(record) = self.next(deadline) {
            if wanted(record) {
                return record.clone();
            }
            assert!(Instant::now() < deadline, "waited for {what} in vain; {}", self.told());
        }
        let stderr = self.stderr.take().map(|stderr| stderr.join().unwrap());
        panic!("the stream ended before {what}: {stderr:?}; {}", self.told());
    }

    /// What a person needs to see why a test fails: all but samples, and the last sample.
    fn told(&self) -> String {
        let told = self.records.iter().zip(&self.text).filter(|(r, _)| r["type"] != "sample");
        let told: Vec<&str> = told.map(|(_, text)| text.as_str()).collect();
        format!("it told\n{}\nand last\n{:?}", told.join("\n"), self.text.last())
    }

    fn wait_event(&mut self, kind: &str, detail: &str) {
        self.wait(kind, |r| {
            r["type"] == "event" && r["kind"] == kind && r["detail"].as_str().unwrap().contains(detail)
        });
    }

    /// Reads on until a source has been read after now.
    fn wait_fresh(&mut self, source: &str) {
        let now = lab::monotonic_ns();
        self.wait(source, |r| {
            is_sample_of(r, UUID) && r["windows"][source][0].as_u64().is_some_and(|begin| begin > now)
        });
    }

    /// Reads on until so many samples hold the kernel's and `/proc`'s figures, and not libvirt's.
    fn wait_samples_without_libvirt(&mut self, count: usize) {
        let now = lab::monotonic_ns();
        for _ in 0..count {
            self.wait("a sample of the sources on the host", |r| {
                is_sample_of(r, UUID)
                    && r["mono_ns"].as_u64().unwrap() > now
                    && has_window(r, "ebpf")
                    && has_window(r, "procfs")
                    && !has_window(r, "libvirt")
            });
        }
    }

    fn signal(&self, signal: Signal) {
        send(self.child.id(), signal);
    }

    fn close_stdout(&mut self) {
        self.lines = None;
    }

    fn stop(self) -> Ended {
        self.signal(Signal::INT);
        let ended = self.end();
        assert_eq!(ended.status.code(), Some(0), "{}", ended.stderr);
        ended
    }

    /// Reads to the end and checks all that was said.
    fn end(mut self) -> Ended {
        let deadline = Instant::now() + PATIENCE;
        let read_all = self.lines.is_some();
        while self.next(deadline).is_some() {}
        let status = loop {
            match self.child.try_wait().unwrap() {
                Some(status) => break status,
                None => assert!(Instant::now() < deadline, "it does not end"),
            }
            std::thread::sleep(Duration::from_millis(5));
        };
        let stderr = self.stderr.take().unwrap().join().unwrap();
        assert!(!stderr.contains("panicked"), "{stderr}");
        let complete = read_all && status.code() == Some(0);
        check_stream(&self.records, complete);
        validate(&self.text);
        Ended { status, stderr, records: std::mem::take(&mut self.records) }
    }
}

impl Drop for Run {
    fn drop(&mut self) {
        // Both fail only if it is gone already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Ended {
    fn summary(&self) -> &Value {
        self.records.last().filter(|r| r["type"] == "summary").expect("the last line is the summary")
    }

    fn health(&self) -> &Value {
        self.records.iter().rfind(|r| r["type"] == "health").expect("it ends with its health")
    }

    /// Nothing but one clear line, with cause and fix.
    fn assert_error(&self, expected: &[&str]) {
        assert_eq!((self.status.code(), self.records.len()), (Some(2), 0), "{}", self.stderr);
        assert_eq!(self.stderr.lines().count(), 1, "{}", self.stderr);
        for part in expected {
            assert!(self.stderr.contains(part), "{part:?} is not in {}", self.stderr);
        }
    }
}

fn is_sample_of(record: &Value, uuid: &str) -> bool {
    record["type"] == "sample" && record["domain"]["uuid"] == uuid
}

fn is_change_of(record: &Value, uuid: &str, change: &str) -> bool {
    record["type"] == "domain" && record["domain"]["uuid"] == uuid && record["change"] == change
}

fn has_window(record: &Value, source: &str) -> bool {
    record["windows"][source].is_array()
}

// ---- what holds for every stream

/// What the stream has said of a domain so far.
#[derive(Default)]
struct Told {
    samples: u64,
    epoch: u64,
    /// Of this epoch, by where they stand and by source.
    counters: BTreeMap<String, u64>,
}

/// The order of lines, the numbers of samples, counters that only rise, rates that cross no epoch.
fn check_stream(records: &[Value], complete: bool) {
    let mut present: BTreeMap<&str, Told> = BTreeMap::new();
    let mut counts: BTreeMap<&str, u64> = BTreeMap::new();
    for (i, record) in records.iter().enumerate() {
        let kind = record["type"].as_str().unwrap();
        assert_eq!(kind == "session", i == 0, "line {i}: {record}");
        assert!(kind != "summary" || i + 1 == records.len(), "lines after the summary");
        *counts.entry(kind).or_default() += u64::from(kind != "summary");
        let uuid = record["domain"]["uuid"].as_str().unwrap_or_default();
        match (kind, record["change"].as_str().unwrap_or_default()) {
            ("domain", "appeared") => {
                let told = Told { epoch: record["epoch"].as_u64().unwrap(), ..Told::default() };
                assert!(present.insert(uuid, told).is_none(), "appeared twice: {record}");
            }
            ("domain", "gone") => {
                present.remove(uuid).unwrap_or_else(|| panic!("was not there: {record}"));
            }
            ("domain", _) => assert!(present.contains_key(uuid), "was not there: {record}"),
            ("sample", _) => {
                let told = present.get_mut(uuid).unwrap_or_else(|| panic!("is not there: {record}"));
                check_sample(told, record);
            }
            _ => {}
        }
    }
    if complete {
        counts.retain(|_, count| *count > 0);
        let last = records.last().expect("a complete stream has lines");
        assert_eq!(last["type"], "summary", "{last}");
        assert_eq!(last["records"], serde_json::to_value(&counts).unwrap(), "{last}");
    }
}

fn check_sample(told: &mut Told, sample: &Value) {
    assert_eq!(sample["seq"], told.samples, "a sample is missing before {sample}");
    let epoch = sample["epoch"].as_u64().unwrap();
    assert!(epoch >= told.epoch, "{sample}");
    if epoch > told.epoch || told.samples == 0 {
        told.counters.clear();
        assert!(!sample.to_string().contains("per_s"), "a rate across a restart: {sample}");
    }
    (told.samples, told.epoch) = (told.samples + 1, epoch);
    let groups = ["cpu", "vcpus", "interfaces", "disks", "memory"];
    groups.iter().for_each(|group| check_counters(told, group, &sample[group]));
}

fn check_counters(told: &mut Told, place: &str, values: &Value) {
    for (i, entity) in values.as_array().into_iter().flatten().enumerate() {
        check_counters(told, &format!("{place}[{i}]"), entity);
    }
    for (metric, sources) in values.as_object().into_iter().flatten() {
        if !counters().contains(metric) {
            continue;
        }
        for source in ["ebpf", "libvirt", "procfs"] {
            let Some(now) = sources[source].as_u64() else { continue };
            let before = told.counters.insert(format!("{place}.{metric}.{source}"), now);
            assert!(before <= Some(now), "{place}.{metric}.{source}: {before:?}, then {now}");
        }
    }
}

/// Names of the metrics that have rates.
fn counters() -> &'static BTreeSet<String> {
    static COUNTERS: OnceLock<BTreeSet<String>> = OnceLock::new();
    COUNTERS.get_or_init(|| {
        let mut found = BTreeSet::new();
        find_counters(&serde_json::from_str(schema()).unwrap(), &mut found);
        assert!(found.contains("run_ns") && !found.contains("rss_bytes"), "{found:?}");
        found
    })
}

fn find_counters(schema: &Value, found: &mut BTreeSet<String>) {
    for (name, below) in schema.as_object().into_iter().flatten() {
        if below["properties"]["per_s"].is_object() {
            found.insert(name.clone());
        }
        find_counters(below, found);
    }
}

fn schema() -> &'static str {
    static SCHEMA: OnceLock<String> = OnceLock::new();
    SCHEMA.get_or_init(|| {
        let output = Command::new(program()).arg("schema").output().unwrap();
        assert!(output.status.success());
        // On one line.
        serde_json::from_slice::<Value>(&output.stdout).unwrap().to_string()
    })
}

/// Holds every line against the schema, by code that is not ours.
fn validate(lines: &[String]) {
    static VALIDATOR: OnceLock<Mutex<Validator>> = OnceLock::new();
    let validator = VALIDATOR.get_or_init(|| Mutex::new(Validator::start()));
    let mut validator = validator.lock().unwrap_or_else(PoisonError::into_inner);
    for line in lines {
        let answer = validator.ask(line);
        assert_eq!(answer, "ok", "{line}");
    }
}

/// Python's jsonschema. It ends when its input does, with this process.
struct Validator {
    python: Child,
    answers: BufReader<ChildStdout>,
}

impl Validator {
    fn start() -> Self {
        const PROGRAM: &str = "
import json, sys
from jsonschema import Draft202012Validator, validators
schema = json.loads(sys.stdin.readline())
assert validators.validator_for(schema) is Draft202012Validator
Draft202012Validator.check_schema(schema)
validator = Draft202012Validator(schema)
for line in sys.stdin:
    error = next(validator.iter_errors(json.loads(line)), None)
    print('ok' if error is None else str(error).replace('\\n', ' '), flush=True)
";
        let mut python = Command::new("/usr/bin/python3");
        python.args(["-c", PROGRAM]).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut python = python.spawn().expect("Python with jsonschema: `cargo xtask setup` helps");
        let answers = BufReader::new(python.stdout.take().unwrap());
        let mut this = Self { python, answers };
        this.give(schema());
        for wrong in [r#"{"type":"sample"}"#, r#"{"type":"nonsense"}"#, "[]"] {
            assert_ne!(this.ask(wrong), "ok", "the schema allows {wrong}");
        }
        this
    }

    fn give(&mut self, line: &str) {
        writeln!(self.python.stdin.as_mut().unwrap(), "{line}").expect("the validator still runs");
    }

    fn ask(&mut self, line: &str) -> String {
        self.give(line);
        let mut answer = String::new();
        self.answers.read_line(&mut answer).unwrap();
        answer.trim_end().to_owned()
    }
}

// ---- what is left in the kernel

/// A kind as bpftool names it (`prog`, `map`, `link`) and an id.
type BpfObject = (&'static str, u64);
const BPF_KINDS: [&str; 3] = ["prog", "map", "link"];

/// All of this host, with their names.
fn bpf_objects() -> BTreeMap<BpfObject, String> {
    let mut objects = BTreeMap::new();
    for kind in BPF_KINDS {
        let output = Command::new("bpftool").args(["--json", kind, "show"]).output();
        let output = output.expect("bpftool: `cargo xtask setup` helps");
        let list: Value = serde_json::from_slice(&output.stdout).unwrap();
        for object in list.as_array().unwrap() {
            let name = object["name"].as_str().unwrap_or_default().to_owned();
            objects.insert((kind, object["id"].as_u64().unwrap()), name);
        }
    }
    objects
}

/// Those that a process has open.
fn objects_held_by(pid: u32) -> BTreeSet<BpfObject> {
    let entries = fs::read_dir(format!("/proc/{pid}/fdinfo")).into_iter().flatten();
    let texts = entries.filter_map(|entry| fs::read_to_string(entry.ok()?.path()).ok());
    let objects = |text: String| -> Vec<BpfObject> {
        let object = |line: &str| {
            let (key, id) = line.split_once(":\t")?;
            let kind = BPF_KINDS.into_iter().find(|kind| key.strip_suffix("_id") == Some(kind))?;
            Some((kind, id.parse().ok()?))
        };
        text.lines().filter_map(object).collect()
    };
    texts.flat_map(objects).collect()
}

/// Those that any process has open: another run of the program may be under way on this host.
fn objects_held() -> BTreeSet<BpfObject> {
    let entries = fs::read_dir("/proc").unwrap();
    let pids = entries.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok());
    pids.flat_map(objects_held_by).collect()
}

/// Waits until what a run held is gone, and nothing else that is new lives without a process. The kernel frees
/// late, and a list is of one moment: only what stays is left.
fn assert_nothing_left(before: &BTreeMap<BpfObject, String>, of_the_run: &BTreeSet<BpfObject>) {
    let deadline = Instant::now() + PATIENCE;
    let mut left: Option<BTreeMap<BpfObject, String>> = None;
    loop {
        let mut now = bpf_objects();
        let held = objects_held();
        now.retain(|object, _| {
            of_the_run.contains(object) || !before.contains_key(object) && !held.contains(object)
        });
        if let Some(left) = &left {
            now.retain(|object, _| left.contains_key(object));
        }
        if now.is_empty() {
            return;
        }
        assert!(Instant::now() < deadline, "left behind in the kernel: {now:?}");
        left = Some(now);
        std::thread::sleep(Duration::from_millis(20));
    }
}
