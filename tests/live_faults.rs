//! Faults on a live host: every way of ending, sources that go away, hang and come back, guests that die and are
//! reborn, missing rights. Whatever still works goes on, every line holds to the schema, nothing stays behind.
//!
//! The real binary runs inside a [`Lab`], mostly against one small guest that all tests share. Needs root and the
//! variables that `cargo xtask test` sets. Nothing here depends on how fast something happens: tests wait for
//! lines of the stream, for at most [`PATIENCE`].
#![expect(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "a test that cannot go on fails, and says what it saw"
)]

use std::collections::BTreeSet;
use std::fs;
use std::io::{BufRead as _, BufReader, Write as _};
use std::os::unix::process::{CommandExt as _, ExitStatusExt as _};
use std::process::{Command, Stdio};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use lab::{DiskSpec, Guest, GuestSpec, Lab, LabDirs, NicSpec, StartState, is_emulated_host};
use left::{assert_nothing_left, bpf_objects, objects_held_by};
use rustix::process::Signal;
use serde_json::Value;
use support::{Ended, Run, Stopped, has_window, is_change_of, is_sample_of, program, send, xorshift};

#[path = "support/left.rs"]
mod left;
#[path = "support/mod.rs"]
mod support;

/// The guest that all tests share, and the one that comes and goes.
const NAME: &str = "faults";
const UUID: &str = "5ec0de00-0000-4000-8000-0000000000fa";
const MORTAL: &str = "mortal";
const NOBODY: u32 = 65534;
const MORTAL_UUID: &str = "5ec0de00-0000-4000-8000-0000000000fb";
/// What a run with kernel probes holds in the kernel.
const PROGRAMS: [&str; 3] = ["sched_switch", "read_threads", "seed_threads"];
const MAPS: [&str; 4] = ["FILTER", "THREADS", "READINGS", "CLOCK"];
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
    run.wait_fresh(UUID, "libvirt");
    for stop in [Lab::stop_libvirtd, Lab::kill_libvirtd] {
        stop(&stage.lab).unwrap();
        run.wait_event("source_lost", "libvirt");
        run.wait_samples_without_libvirt(UUID, 10);
        stage.lab.start_libvirtd().unwrap();
        run.wait_event("source_back", "libvirt");
        run.wait_fresh(UUID, "libvirt");
    }
    assert_went_on(run.stop(), 2);
}

#[test]
fn libvirtd_that_hangs_delays_nothing() {
    let stage = stage();
    let mut run = stage.run(&QUICK);
    run.wait_fresh(UUID, "libvirt");
    let libvirtd = Stopped::new(stage.lab.libvirtd_pid().unwrap());
    // These two find it hung from their start.
    let mut late = stage.run(&QUICK);
    let strict = stage.run(&["--libvirt", "require"]);
    run.wait_event("source_lost", "did not answer");
    run.wait_samples_without_libvirt(UUID, 10);
    late.wait_samples_without_libvirt(UUID, 3);
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
    run.wait_fresh(UUID, "libvirt");
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

// ---- QEMU dies, returns

#[test]
fn a_guest_that_is_destroyed_goes_with_its_last_word() {
    let stage = stage();
    let mut run = stage.run_unfiltered(&QUICK);
    run.wait_fresh(UUID, "libvirt");
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
    run.wait_fresh(UUID, "libvirt");
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

/// A process that looks like QEMU makes 20,000 threads, each of which says that it is a vCPU: nothing breaks, nothing that was
/// there is lost, and what could not be read is counted.
#[test]
fn a_storm_of_vcpu_threads_loses_no_domain() {
    const STORM: &str = "
import ctypes, sys, threading
prctl = ctypes.CDLL(None).prctl
def vcpu():
    prctl(15, b'CPU 0/TCG', 0, 0, 0)
sys.stdin.readline()
for _ in range(10000):
    pair = [threading.Thread(target=vcpu) for _ in range(2)]
    [thread.start() for thread in pair]
    [thread.join() for thread in pair]
print('over', flush=True)
sys.stdin.readline()
";
    let stage = stage();
    let mut storm = Command::new("/usr/bin/python3");
    storm.arg0("qemu-system-storm").args(["-c", STORM, "-name", "guest=storm", "-accel", "tcg"]);
    let mut storm = storm.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    // Where the CPU is emulated, the program would leave the storm little of it.
    let interval = if is_emulated_host() { "200ms" } else { "20ms" };
    let mut run = stage.run_unfiltered(&["--interval", interval, "--libvirt", "off"]);
    let of_storm = |r: &Value| r["type"] == "sample" && r["domain"]["name"] == "storm";
    run.wait("the process that will storm", of_storm);
    writeln!(storm.stdin.as_mut().unwrap()).unwrap();
    let mut over = String::new();
    BufReader::new(storm.stdout.as_mut().unwrap()).read_line(&mut over).unwrap();
    assert_eq!(over, "over\n");
    let now = lab::monotonic_ns();
    run.wait("it after the storm", |r| {
        of_storm(r) && r["mono_ns"].as_u64() > Some(now) && r["cpu"]["time_ns"]["ebpf"].is_u64()
    });
    run.wait("the other one", |r| {
        is_sample_of(r, UUID) && r["mono_ns"].as_u64() > Some(now) && r["vcpus"][0]["run_ns"]["ebpf"].is_u64()
    });
    storm.kill().unwrap();
    storm.wait().unwrap();
    run.wait("its end", |r| r["type"] == "domain" && r["domain"]["name"] == "storm" && r["change"] == "gone");
    let ended = run.stop();
    let gone = |r: &&Value| r["type"] == "domain" && r["change"] == "gone";
    assert_eq!(ended.records.iter().filter(gone).count(), 1, "a domain was lost");
    // That it never falls is checked of every stream.
    let ran = |r: &Value| of_storm(r) && r["cpu"]["vcpu_run_ns"]["ebpf"].as_u64() > Some(0);
    assert!(ended.records.iter().any(ran), "none of them was seen to run");
    let ebpf = &ended.health()["sources"]["ebpf"];
    println!("reads {}, lost {}, errors {}", ebpf["reads"], ebpf["lost"], ebpf["errors"]);
    assert!(ebpf["lost"].is_u64() && ebpf["errors"] == 0, "{ebpf}");
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
    for ebpf in ["off", "require"] {
        let mut run = stage.run(&[&["--ebpf", ebpf], &cadence[..]].concat());
        let dear = |r: &Value| r["cpu"]["time_ns"]["libvirt"].is_u64() && r["disks"][0]["rd_req"].is_object();
        let cheap = |r: &Value| r["interfaces"][0]["rx_bytes"]["libvirt"].is_u64();
        // Each kind comes when it comes, in one sample or in two.
        run.wait("dear groups", |r| is_sample_of(r, UUID) && dear(r));
        for _ in 0..4 {
            run.wait("cheap groups", |r| is_sample_of(r, UUID) && cheap(r));
            if ebpf == "off" {
                run.wait("dear groups", |r| is_sample_of(r, UUID) && dear(r));
            }
        }
        let ended = run.stop();
        let ours = || ended.records.iter().filter(|r| is_sample_of(r, UUID));
        for record in ours() {
            assert_eq!(has_window(record, "ebpf"), ebpf != "off", "{record}");
        }
        let dear_reads = ours().filter(|r| dear(r)).count();
        assert!(ebpf == "off" || dear_reads == 1, "--ebpf {ebpf}: {dear_reads} dear reads");
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

/// All rows of the ladder: what each combination of sources tells, by one schema.
#[test]
fn every_row_of_the_ladder_tells_what_it_can() {
    let stage = stage();
    for (ebpf, libvirt) in [("require", "require"), ("off", "require"), ("require", "off"), ("off", "off")] {
        let mut run = stage.run(&[&["--ebpf", ebpf, "--libvirt", libvirt], &QUICK[..]].concat());
        let with = |on: &str, source: &'static str| (on == "require").then_some(source);
        let sources = [with(ebpf, "ebpf"), with(libvirt, "libvirt"), Some("procfs")];
        let has = |value: &Value, source: &str| value[source].is_u64();
        run.wait(&format!("figures with --ebpf {ebpf} --libvirt {libvirt}"), |r| {
            let everywhere = ["/cpu/time_ns", "/vcpus/0/run_ns", "/interfaces/0/rx_bytes"];
            let there = |place: &&str, source: &str| r.pointer(place).is_some_and(|value| has(value, source));
            is_sample_of(r, UUID)
                && sources.iter().flatten().all(|s| everywhere.iter().all(|place| there(place, s)))
                && there(&"/memory/rss_bytes", "procfs")
                && (libvirt == "off" || there(&"/memory/actual_bytes", "libvirt"))
                && (ebpf == "off" || there(&"/disks/0/rd_req", "ebpf"))
                && r["disks"].as_array().unwrap().len() == 1
        });
        let ended = run.stop();
        let disk =
            ended.records.iter().rev().find(|r| r["type"] == "domain").unwrap()["domain"]["disks"][0].clone();
        assert!(disk["source"].as_str().unwrap().ends_with("faults-vda.raw"), "{disk}");
        for (source, on) in [("ebpf", ebpf), ("libvirt", libvirt)] {
            let info = &ended.records[0]["sources"][source];
            assert_eq!(info["available"], on == "require", "{info}");
            assert_eq!(info["reason"].is_string(), on == "off", "{info}");
        }
    }
}

/// By hand and as Proxmox does; the process tracepoints tell of start and end.
#[test]
fn qemus_that_nobody_manages_are_found_as_they_come_and_go() {
    let stage = stage();
    let uuid = "5ec0de00-0000-4000-8000-0000000000fc";
    let image = stage.lab.scratch().join("plain.raw");
    fs::File::create(&image).unwrap().set_len(1 << 20).unwrap();
    let start = |program: &str, words: &str| {
        let script = format!(
            "exec -a {program} qemu-system-x86_64 -accel tcg -S -display none -nodefaults -m 32 {words} \
             -netdev tap,id=net0,ifname=tap-plain,script=no,downscript=no \
             -device virtio-net-pci,netdev=net0,id=net0,mac=52:54:00:77:01:01"
        );
        Owned(stage.lab.command("bash").args(["-c", &script]).spawn().unwrap())
    };
    let image = image.display();
    let by_hand = format!(
        "-name by-hand,debug-threads=on -uuid {uuid} -drive file={image},if=virtio,format=raw,cache=none"
    );
    let proxmox = format!(
        "-name build,debug-threads=on -smbios type=1,uuid={uuid} -drive file={image},if=none,id=drive-scsi0,format=raw,cache=none \
         -device virtio-blk-pci,drive=drive-scsi0,id=scsi0"
    );
    let cases =
        [("qemu-system-x86_64", by_hand, "by-hand", None), ("/usr/bin/kvm", proxmox, "build", Some("scsi0"))];
    for (program, words, name, target) in cases {
        for (ebpf, interval) in [("require", "1h"), ("off", "100ms")] {
            let args = ["--ebpf", ebpf, "--libvirt", "off", "--interval", interval];
            let mut run = stage.run_unfiltered(&args);
            run.wait("a sample", |r| is_sample_of(r, UUID));
            let qemu = start(program, &words);
            let pid = qemu.0.id();
            let complete = |d: &Value| {
                d["uuid"] == uuid
                    && d["disks"][0].is_object()
                    && d["interfaces"][0].is_object()
                    && d["vcpus"][0].is_object()
            };
            let told = run.wait("the new process", |r| r["type"] == "domain" && complete(&r["domain"]));
            let domain = &told["domain"];
            assert_eq!(
                (&domain["name"], &domain["pid"], &domain["found_by"]),
                (&name.into(), &pid.into(), &"procfs".into())
            );
            assert_eq!(domain["interfaces"][0]["device"], "tap-plain");
            assert!(domain["disks"][0]["source"].as_str().unwrap().ends_with("plain.raw"), "{domain}");
            if let Some(target) = target {
                assert_eq!(domain["disks"][0]["target"], target);
            }
            assert_eq!(domain["memory"]["max_bytes"], 32 << 20);
            if ebpf == "off" {
                run.wait("its sample", |r| {
                    is_sample_of(r, uuid) && r["vcpus"][0]["run_ns"]["procfs"].is_u64()
                });
            }
            drop(qemu);
            run.wait("its end", |r| is_change_of(r, uuid, "gone"));
            run.stop();
        }
    }
}

/// Killed when dropped.
struct Owned(std::process::Child);

impl Drop for Owned {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Nobody, with the capabilities that the documents name and no others, and libvirt's read-only socket.
#[test]
fn an_ordinary_user_with_few_capabilities_gets_everything() {
    let stage = stage();
    let few = "+bpf,+perfmon,+sys_ptrace,+dac_read_search";
    let mut command = stage.lab.command("setpriv");
    command.args([
        "--reuid",
        "65534",
        "--regid",
        "65534",
        "--clear-groups",
        "--bounding-set",
        &format!("-all,{few}"),
    ]);
    command.args(["--inh-caps", &format!("-all,{few}"), "--ambient-caps", &format!("-all,{few}")]);
    // A directory above the checkout may be closed to others.
    let copy = stage.lab.scratch().join("kvm-monitor");
    fs::copy(program(), &copy).unwrap();
    command.args(["--"]).arg(&copy);
    let everything = ["--ebpf", "require", "--libvirt", "require", "--domain", NAME];
    let mut run = Run::start(command, &[&["run"], &everything[..], &QUICK[..]].concat());
    // Each comes when it comes.
    for (place, source) in [
        ("/vcpus/0/run_ns", "ebpf"),
        ("/vcpus/0/run_ns", "libvirt"),
        ("/vcpus/0/run_ns", "procfs"),
        ("/interfaces/0/rx_bytes", "ebpf"),
        ("/disks/0/rd_req", "ebpf"),
        ("/memory/pss_bytes", "procfs"),
    ] {
        run.wait(&format!("{place} of {source}"), |r| {
            is_sample_of(r, UUID) && r.pointer(place).is_some_and(|value| value[source].is_u64())
        });
    }
    let status = fs::read_to_string(format!("/proc/{}/status", run.child.id())).unwrap();
    assert!(status.lines().any(|line| line.starts_with("Uid:\t65534\t65534")), "{status}");
    let ended = run.stop();
    let failed = ended.records[0]["probes"].as_array().unwrap().iter().filter(|p| p["state"] == "failed");
    let mut as_root = stage.run(&QUICK);
    as_root.wait("a sample", |r| is_sample_of(r, UUID));
    let failed_as_root = as_root.stop().records[0]["probes"].as_array().unwrap().clone();
    let failed_as_root = failed_as_root.iter().filter(|p| p["state"] == "failed").count();
    assert_eq!(failed.count(), failed_as_root, "every probe that root can attach");
}

/// What the start alone needed is given up, in every thread, and nothing that is started gets more.
#[test]
fn capabilities_that_are_not_needed_any_more_are_given_up() {
    const KEPT: u64 = 1 << 2 | 1 << 19 | 1 << 38 | 1 << 39; // DAC_READ_SEARCH, SYS_PTRACE, PERFMON, BPF
    const ASIDE: u64 = 1 << 12 | 1 << 21; // NET_ADMIN, SYS_ADMIN
    let stage = stage();
    for (ebpf, kept) in [("require", KEPT), ("off", KEPT & ((1 << 38) - 1))] {
        let mut run = stage.run(&[&["--ebpf", ebpf], &QUICK[..]].concat());
        run.wait("a sample with libvirt", |r| is_sample_of(r, UUID) && has_window(r, "libvirt"));
        let pid = run.child.id();
        let set = |status: &str, name: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(name)).unwrap();
            u64::from_str_radix(line.trim_start_matches(':').trim(), 16).unwrap()
        };
        let main = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
        assert_eq!((set(&main, "CapEff"), set(&main, "CapPrm")), (kept, kept | ASIDE), "--ebpf {ebpf}");
        assert!(main.lines().any(|line| line == "NoNewPrivs:\t1"), "{main}");
        let mut without = 0;
        for task in fs::read_dir(format!("/proc/{pid}/task")).unwrap() {
            // A thread may have ended meanwhile.
            let Ok(status) = fs::read_to_string(task.unwrap().path().join("status")) else { continue };
            assert_eq!(set(&status, "CapEff") & !kept, 0, "{status}");
            assert_eq!(set(&status, "CapPrm") & !(kept | ASIDE), 0, "{status}");
            assert_eq!((set(&status, "CapInh"), set(&status, "CapAmb")), (0, 0), "{status}");
            without += usize::from(set(&status, "CapPrm") == 0);
        }
        assert_eq!(without, 1, "the thread that writes needs none");
        run.stop();
    }
}

/// A user's own libvirt, which the connection starts: everything works that the user's rights allow, and what does not is
/// named.
#[test]
fn a_users_own_libvirt_works_as_far_as_the_users_rights() {
    let stage = stage();
    let home = stage.lab.scratch().join("home");
    fs::create_dir_all(&home).unwrap();
    std::os::unix::fs::chown(&home, Some(NOBODY), Some(NOBODY)).unwrap();
    let copy = stage.lab.scratch().join("kvm-monitor-of-user");
    fs::copy(program(), &copy).unwrap();
    let mut command = stage.lab.command("setpriv");
    command.args(["--reuid", "65534", "--regid", "65534", "--clear-groups", "--"]).arg(&copy);
    command
        .env("HOME", &home)
        .env("XDG_RUNTIME_DIR", &home)
        .env_remove("XDG_CONFIG_HOME")
        .env_remove("XDG_CACHE_HOME");
    let args = [
        "run",
        "--connect",
        "qemu:///session",
        "--libvirt",
        "require",
        "--domain",
        NAME,
        "--interval",
        "100ms",
    ];
    let mut run = Run::start(command, &args);
    run.wait("figures of /proc", |r| is_sample_of(r, UUID) && r["vcpus"][0]["run_ns"]["procfs"].is_u64());
    let ended = run.stop();
    let sources = &ended.records[0]["sources"];
    assert_eq!(sources["libvirt"]["details"]["uri"], "qemu:///session");
    assert_eq!(
        (&sources["libvirt"]["available"], &sources["ebpf"]["available"]),
        (&true.into(), &false.into())
    );
    assert!(sources["ebpf"]["reason"].as_str().unwrap().contains("CAP_BPF"), "{sources}");
}

/// The wall clock is for people: a step of it is told, and changes nothing else.
#[test]
fn a_step_of_the_wall_clock_is_told_and_changes_no_rate() {
    let stage = stage();
    let [code, library, offset] = ["step.c", "step.so", "offset"].map(|name| stage.lab.scratch().join(name));
    fs::write(&code, STEPPED_CLOCK.replace("OFFSET", offset.to_str().unwrap())).unwrap();
    let built = Command::new("cc").args(["-shared", "-fPIC", "-o"]).args([&library, &code]).status().unwrap();
    assert!(built.success());
    let set = |seconds: &str| {
        let new = offset.with_extension("new");
        fs::write(&new, seconds).unwrap();
        fs::rename(new, &offset).unwrap();
    };
    set("0");
    let mut command = stage.lab.command(program());
    command.env("LD_PRELOAD", &library);
    let mut run = Run::start(command, &[&["run", "--domain", NAME], &QUICK[..]].concat());
    run.wait("a rate", |r| is_sample_of(r, UUID) && r["vcpus"][0]["run_ns"]["per_s"].is_f64());
    for seconds in ["-7200", "7200"] {
        set(seconds);
        let told = run.wait("the step", |r| r["type"] == "event" && r["kind"] == "clock_step");
        let amount = told["detail"].as_str().unwrap().split(' ').find_map(|word| word.parse::<f64>().ok());
        let expected = if seconds == "7200" { 14_400.0 } else { -7200.0 };
        assert!((amount.unwrap() - expected).abs() < 10.0, "{told}");
        for _ in 0..5 {
            run.wait("a rate", |r| is_sample_of(r, UUID) && r["vcpus"][0]["run_ns"]["per_s"].is_f64());
        }
    }
    let ended = run.stop();
    let cpus = ended.records[0]["host"]["cpus"].as_f64().unwrap();
    let mut last = 0;
    for sample in ended.records.iter().filter(|r| is_sample_of(r, UUID)) {
        let now = sample["mono_ns"].as_u64().unwrap();
        assert!(now > std::mem::replace(&mut last, now), "{sample}");
        let util = sample["cpu"]["util_pct"]["value"].as_f64().unwrap_or(0.0);
        // A tick of the clock more or less in a short interval.
        assert!((0.0..=100.0 * cpus + 50.0).contains(&util), "{sample}");
    }
}

/// Stands before the C library's clock and moves the wall clock by as many seconds as a file says.
const STEPPED_CLOCK: &str = r#"
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdio.h>
#include <time.h>
int clock_gettime(clockid_t clock, struct timespec *to) {
    static int (*real)(clockid_t, struct timespec *);
    if (!real) real = dlsym(RTLD_NEXT, "clock_gettime");
    int result = real(clock, to);
    if (result == 0 && clock == CLOCK_REALTIME) {
        FILE *file = fopen("OFFSET", "r");
        long seconds = 0;
        if (file) { if (fscanf(file, "%ld", &seconds) != 1) seconds = 0; fclose(file); }
        to->tv_sec += seconds;
    }
    return result;
}
"#;

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
