//! libvirt on a live host: a QEMU that does not answer holds up nobody else, and what happens to a domain is told by
//! events, not found by looking.
//!
//! The real binary runs inside a [`Lab`] with one guest that works a little and others that come and go. Needs root and
//! the variables that `cargo xtask test` sets. Where an event is to tell, the intervals are so long that nothing else
//! could within a test's patience.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]
#![expect(clippy::print_stderr, reason = "measured times, for a person")]

use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};

use lab::{DiskSpec, Guest, GuestSpec, Lab, LabDirs, NicSpec, StartState};
use rustix::process::Signal;
use serde_json::Value;
use support::{Run, Stopped, has_window, is_change_of, is_sample_of, program, send};

#[path = "support/mod.rs"]
#[expect(dead_code, reason = "each test program uses a part of it")]
mod support;

/// The guest that all tests share, and the one that comes and goes.
const NAME: &str = "steady";
const UUID: &str = "5ec0de00-0000-4000-8000-0000000000ea";
const OTHER: &str = "other";
const OTHER_UUID: &str = "5ec0de00-0000-4000-8000-0000000000eb";
/// Every read of libvirt brings every group.
const QUICK: [&str; 6] =
    ["--interval", "100ms", "--libvirt-interval", "200ms", "--libvirt-slow-interval", "200ms"];
/// Nothing is looked at again while a test lasts.
const BY_EVENTS: [&str; 6] =
    ["--interval", "1h", "--libvirt-interval", "1h", "--libvirt-slow-interval", "1h"];

// ---- a QEMU that does not answer

#[test]
fn a_qemu_that_does_not_answer_delays_nobody_else() {
    let stage = stage();
    let other = stage.boot_other(StartState::Paused);
    for ebpf in ["auto", "off"] {
        let mut run = stage.run(&[&["--ebpf", ebpf], &QUICK[..]].concat());
        run.wait("what QEMU knows of both", |r| is_sample_of(r, OTHER_UUID) && tells_of_disks(r));
        run.wait("what QEMU knows of both", |r| is_sample_of(r, UUID) && tells_of_disks(r));
        let stopped = Stopped::new(other.pid);
        let told = run.wait("the mark", |r| is_event_of(r, OTHER_UUID, "monitor_silent"));
        let mark = run.wait("the mark", |r| is_change_of(r, OTHER_UUID, "changed"));
        assert_eq!(mark["domain"]["monitor"], "silent", "{mark}");
        // The one that answers has all its values again and again, the other what libvirt knows by itself.
        let mut last = told["mono_ns"].as_u64().unwrap();
        let mut longest = 0;
        for _ in 0..10 {
            let sample = run.wait("the other guest's values", |r| is_sample_of(r, UUID) && tells_of_disks(r));
            let now = sample["mono_ns"].as_u64().unwrap();
            longest = longest.max(now - std::mem::replace(&mut last, now));
        }
        eprintln!("--ebpf {ebpf}: at most {} ms between values beside a silent QEMU", longest / 1_000_000);
        run.wait("libvirt's own values of the silent one", |r| {
            is_sample_of(r, OTHER_UUID)
                && r["interfaces"][0]["rx_bytes"]["libvirt"].is_u64()
                && !tells_of_disks(r)
                && has_window(r, "procfs")
        });
        drop(stopped);
        run.wait("the end of the mark", |r| is_event_of(r, OTHER_UUID, "monitor_back"));
        run.wait("what QEMU knows, again", |r| is_sample_of(r, OTHER_UUID) && tells_of_disks(r));
        let ended = run.stop();
        let lost = ended.records.iter().filter(|r| r["kind"] == "source_lost").count();
        assert_eq!(lost, 0, "libvirt was there all the time");
    }
}

#[test]
fn a_silent_qemu_that_dies_goes_and_libvirt_stays() {
    let stage = stage();
    let other = stage.boot_other(StartState::Paused);
    let mut run = stage.run(&QUICK);
    run.wait("what QEMU knows", |r| is_sample_of(r, OTHER_UUID) && tells_of_disks(r));
    let _stopped = Stopped::new(other.pid);
    run.wait("the mark", |r| is_event_of(r, OTHER_UUID, "monitor_silent"));
    send(other.pid, Signal::KILL);
    run.wait("its end", |r| is_change_of(r, OTHER_UUID, "gone"));
    run.wait("the other guest's values", |r| is_sample_of(r, UUID) && tells_of_disks(r));
    let ended = run.stop();
    assert!(ended.records.iter().all(|r| r["kind"] != "source_lost"));
}

/// `list` asks nothing of QEMU, so that it works when it is needed most.
#[test]
fn a_silent_qemu_is_listed() {
    let stage = stage();
    let other = stage.boot_other(StartState::Paused);
    let _stopped = Stopped::new(other.pid);
    let output = stage.lab.command(program()).arg("list").output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(output.status.success() && text.contains(NAME) && text.contains(OTHER_UUID), "{text}");
    assert!(text.contains("found by libvirt"), "{text}");
}

// ---- events

#[test]
fn a_domain_that_starts_and_stops_is_told_at_once() {
    let stage = stage();
    for ebpf in ["auto", "off"] {
        let mut run = stage.run(&[&["--ebpf", ebpf], &BY_EVENTS[..]].concat());
        run.wait("a sample", |r| is_sample_of(r, UUID));
        let other = stage.boot_other(StartState::Paused);
        let mut first_sample = None;
        let mut wait = |run: &mut Run, what: &str, wanted: &dyn Fn(&Value) -> bool| {
            run.wait(what, |r| {
                if is_sample_of(r, OTHER_UUID) {
                    first_sample.get_or_insert(r["mono_ns"].as_u64().unwrap());
                }
                wanted(r)
            })
        };
        let started = wait(&mut run, "its start", &|r| is_event_of(r, OTHER_UUID, "started"));
        assert!(started["detail"].as_str().unwrap().contains("booted"), "{started}");
        if first_sample.is_none() {
            first_sample =
                Some(run.wait("a sample", |r| is_sample_of(r, OTHER_UUID))["mono_ns"].as_u64().unwrap());
        }
        let after = i128::from(first_sample.unwrap()) - i128::from(started["mono_ns"].as_u64().unwrap());
        eprintln!("--ebpf {ebpf}: first sample {} ms after the start was told", after / 1_000_000);
        other.destroy().unwrap();
        run.wait("its end", |r| is_event_of(r, OTHER_UUID, "stopped"));
        let ended = run.stop();
        let described = ended.records.iter().any(|r| {
            r["type"] == "domain" && r["domain"]["uuid"] == OTHER_UUID && r["domain"]["found_by"] == "libvirt"
        });
        assert!(described, "libvirt's description of it");
    }
}

#[test]
fn what_happens_to_a_domain_is_told_by_events() {
    let stage = stage();
    let _other = stage.boot_other(StartState::Paused);
    let mut run = stage.run(&BY_EVENTS);
    run.wait("a sample", |r| is_sample_of(r, UUID));
    let virsh = |arguments: &[&str]| stage.lab.virsh(arguments).unwrap();
    let described = |run: &mut Run, what: &str, wanted: &dyn Fn(&Value) -> bool| {
        run.wait(what, |r| is_change_of(r, UUID, "changed") && wanted(&r["domain"]));
    };

    // libvirt cannot resume a guest for a second time whose tap has an address of the host.
    virsh(&["resume", OTHER]);
    run.wait("the end of a pause", |r| is_event_of(r, OTHER_UUID, "resumed"));
    virsh(&["suspend", OTHER]);
    run.wait("a pause", |r| is_event_of(r, OTHER_UUID, "paused"));
    virsh(&["reset", OTHER]);
    run.wait("a reboot", |r| is_event_of(r, OTHER_UUID, "rebooted"));

    let image = stage.lab.scratch().join("hot.raw");
    std::fs::File::create(&image).unwrap().set_len(1 << 20).unwrap();
    virsh(&["attach-disk", NAME, image.to_str().unwrap(), "vdb", "--live"]);
    run.wait("a device", |r| is_event_of(r, UUID, "hotplug"));
    described(&mut run, "the disk", &|d| d["disks"].as_array().unwrap().iter().any(|d| d["target"] == "vdb"));

    let nic = stage.lab.scratch().join("hot-nic.xml");
    let xml = "<interface type='ethernet'><target dev='tap-hot'/><model type='virtio'/></interface>";
    std::fs::write(&nic, xml).unwrap();
    virsh(&["attach-device", NAME, nic.to_str().unwrap(), "--live"]);
    described(&mut run, "the interface", &|d| {
        let interfaces = d["interfaces"].as_array().unwrap();
        interfaces.iter().any(|i| i["device"] == "tap-hot" && i["ifindex"].is_u64())
    });

    virsh(&["desc", NAME, "--live", "--title", "a new title"]);
    run.wait("metadata", |r| is_event_of(r, UUID, "reconfigured"));
    described(&mut run, "the title", &|d| d["title"] == "a new title");

    virsh(&["setmem", NAME, "120M", "--live"]);
    run.wait("the balloon", |r| is_event_of(r, UUID, "balloon"));
    let ended = run.stop();
    // The counters of the new interface begin an epoch; nothing else does.
    let epochs_of = |uuid: &str| {
        let records = ended.records.iter().filter(|r| r["domain"]["uuid"] == uuid);
        records.filter_map(|r| r["epoch"].as_u64()).max()
    };
    assert_eq!((epochs_of(UUID), epochs_of(OTHER_UUID)), (Some(1), Some(0)));
    assert!(ended.records.iter().all(|r| r["kind"] != "counter_reset"), "nothing restarted");
}

// ---- what libvirt tells, all of it

/// Every figure that ceilometer's inspector reads, of a guest at rest, as `virsh` prints it.
#[test]
fn libvirts_figures_are_as_virsh_prints_them() {
    let stage = stage();
    let _other = stage.boot_other(StartState::Paused);
    let mut run = stage.run(&[&["--ebpf", "off"], &QUICK[..]].concat());
    let complete = |r: &Value| {
        is_sample_of(r, OTHER_UUID) && tells_of_disks(r) && r["memory"]["actual_bytes"].is_object()
    };
    run.wait("all figures", complete);
    let printed = stage.lab.virsh(&["domstats", "--raw", OTHER]).unwrap();
    // What libvirt is asked for less often comes with a sample of its own where it takes long.
    let mut samples = Vec::new();
    run.wait("all figures", |r| {
        if is_sample_of(r, OTHER_UUID) {
            samples.push(r.clone());
        }
        samples.iter().any(complete)
            && samples.iter().any(|r| r["interfaces"][0]["rx_bytes"]["libvirt"].is_u64())
    });
    let number = |name: &str| {
        let line = printed.lines().find_map(|line| line.trim().strip_prefix(name)?.strip_prefix('='));
        line.unwrap_or_else(|| panic!("no {name} in {printed}")).parse::<u64>().unwrap()
    };
    let of = |place: &str, metric: &str| {
        let place = format!("/{place}/{metric}/libvirt");
        let value = samples.iter().find_map(|sample| sample.pointer(&place)?.as_u64());
        value.unwrap_or_else(|| panic!("no {place} in {samples:?}"))
    };
    for (place, metric, name, scale) in [
        ("cpu", "vcpus_online", "vcpu.current", 1),
        ("disks/0", "rd_req", "block.0.rd.reqs", 1),
        ("disks/0", "rd_bytes", "block.0.rd.bytes", 1),
        ("disks/0", "rd_time_ns", "block.0.rd.times", 1),
        ("disks/0", "wr_req", "block.0.wr.reqs", 1),
        ("disks/0", "wr_bytes", "block.0.wr.bytes", 1),
        ("disks/0", "wr_time_ns", "block.0.wr.times", 1),
        ("disks/0", "fl_req", "block.0.fl.reqs", 1),
        ("disks/0", "fl_time_ns", "block.0.fl.times", 1),
        ("disks/0", "capacity_bytes", "block.0.capacity", 1),
        ("disks/0", "allocation_bytes", "block.0.allocation", 1),
        ("disks/0", "physical_bytes", "block.0.physical", 1),
        ("interfaces/0", "rx_bytes", "net.0.rx.bytes", 1),
        ("interfaces/0", "rx_packets", "net.0.rx.pkts", 1),
        ("interfaces/0", "rx_errs", "net.0.rx.errs", 1),
        ("interfaces/0", "rx_drop", "net.0.rx.drop", 1),
        ("interfaces/0", "tx_bytes", "net.0.tx.bytes", 1),
        ("interfaces/0", "tx_packets", "net.0.tx.pkts", 1),
        ("interfaces/0", "tx_errs", "net.0.tx.errs", 1),
        ("interfaces/0", "tx_drop", "net.0.tx.drop", 1),
        ("memory", "actual_bytes", "balloon.current", 1024),
    ] {
        assert_eq!(of(place, metric), number(name) * scale, "{place} {metric}");
    }
    assert!(samples.iter().any(|sample| sample["vcpus"][0]["libvirt_state"] == "running"));
    run.stop();
}

/// Perf events and dirty rates are there once somebody has asked libvirt for them, limits as they are set.
#[test]
fn what_somebody_asked_libvirt_for_is_told() {
    let stage = stage();
    let mut run = stage.run(&[&["--ebpf", "off"], &QUICK[..]].concat());
    run.wait("a sample", |r| is_sample_of(r, UUID) && tells_of_disks(r));
    let virsh = |arguments: &[&str]| stage.lab.virsh(arguments).unwrap();
    virsh(&["perf", NAME, "--enable", "task_clock,context_switches", "--live"]);
    run.wait("perf events", |r| {
        let perf = &r["cpu"]["perf"];
        is_sample_of(r, UUID) && perf["task_clock"].as_u64() > Some(0) && perf["context_switches"].is_u64()
    });
    virsh(&["domdirtyrate-calc", NAME, "--seconds", "1"]);
    run.wait("the dirty rate", |r| {
        let rate = &r["dirty_rate"];
        is_sample_of(r, UUID)
            && rate["bytes_per_s"].is_u64()
            && rate["measuring"] == false
            && rate["period_s"] == 1
    });
    virsh(&["blkdeviotune", NAME, "vda", "--total-iops-sec", "3000", "--live"]);
    run.wait("the limit", |r| {
        is_change_of(r, UUID, "changed") && r["domain"]["disks"][0]["limits"]["total_iops_sec"] == 3000
    });
    virsh(&["perf", NAME, "--disable", "task_clock,context_switches", "--live"]);
    run.wait("no perf events", |r| is_sample_of(r, UUID) && tells_of_disks(r) && r["cpu"]["perf"].is_null());
    run.stop();
}

/// A guest that is saved and restored is another process: nothing is told as one that is two, and the stream says what
/// happened.
#[test]
fn a_guest_that_is_saved_and_restored_begins_an_epoch() {
    let stage = stage();
    let other = stage.boot_other(StartState::Paused);
    // Only a persistent domain can be saved by libvirt's own care.
    let xml = stage.lab.virsh(&["dumpxml", OTHER]).unwrap();
    let file = stage.lab.scratch().join("other-persistent.xml");
    std::fs::write(&file, xml).unwrap();
    let virsh = |arguments: &[&str]| stage.lab.virsh(arguments).unwrap();
    virsh(&["define", file.to_str().unwrap()]);
    for ebpf in ["auto", "off"] {
        let mut run = stage.run(&[&["--ebpf", ebpf], &QUICK[..]].concat());
        run.wait("a sample", |r| is_sample_of(r, OTHER_UUID) && tells_of_disks(r));
        virsh(&["managedsave", OTHER]);
        let told = run.wait("its end", |r| is_event_of(r, OTHER_UUID, "stopped"));
        assert!(told["detail"].as_str().unwrap().contains("saved"), "{told}");
        virsh(&["start", OTHER]);
        let told = run.wait("its start", |r| is_event_of(r, OTHER_UUID, "started"));
        assert!(told["detail"].as_str().unwrap().contains("restored"), "{told}");
        let sample = run.wait("a sample of the new one", |r| {
            is_sample_of(r, OTHER_UUID)
                && tells_of_disks(r)
                && r["mono_ns"].as_u64() > told["mono_ns"].as_u64()
        });
        let ended = run.stop();
        let of_other = |r: &&Value| r["domain"]["uuid"] == OTHER_UUID;
        let pids: std::collections::BTreeSet<u64> =
            ended.records.iter().filter(of_other).filter_map(|r| r["domain"]["pid"].as_u64()).collect();
        assert_eq!(pids.len(), 2, "two processes: {sample}");
        let gone = ended.records.iter().filter(|r| is_change_of(r, OTHER_UUID, "gone")).count();
        let resets = ended.records.iter().filter(|r| is_event_of(r, OTHER_UUID, "counter_reset")).count();
        assert!(gone + resets > 0, "the old one's end");
    }
    drop(other);
    virsh(&["destroy", OTHER]);
    virsh(&["undefine", OTHER]);
}

/// A save to a disk that takes its time: it is told as a job, how far it is with it, until it ends.
#[test]
fn a_managed_save_is_followed_as_a_job() {
    let stage = stage();
    // More than fits into a pipe.
    let spec = GuestSpec {
        uuid: Some(OTHER_UUID.to_owned()),
        disks: vec![DiskSpec::raw("vda", 1 << 20)],
        memory_mib: 128,
        ..GuestSpec::new(OTHER, "mem=32M")
    };
    let other = stage.lab.boot(&spec).unwrap();
    other.wait_end(support::PATIENCE).unwrap();
    let xml = stage.lab.virsh(&["dumpxml", OTHER]).unwrap();
    let file = stage.lab.scratch().join("other-saved.xml");
    std::fs::write(&file, xml).unwrap();
    let virsh = |arguments: &[&str]| stage.lab.virsh(arguments).unwrap();
    virsh(&["define", file.to_str().unwrap()]);
    let mut run = stage.run(&[&["--ebpf", "off"], &QUICK[..]].concat());
    run.wait("a sample", |r| is_sample_of(r, OTHER_UUID) && tells_of_disks(r));
    let (halted, mut save) = loop {
        let mut save = stage.lab.command("virsh").args(["managedsave", OTHER]).spawn().unwrap();
        if let Some(halted) = halt_a_save(&stage.lab, &mut save) {
            break (halted, save);
        }
        assert!(save.wait().unwrap().success());
        virsh(&["start", OTHER]);
    };
    let is_job = |r: &Value| is_sample_of(r, OTHER_UUID) && r["job"].is_object();
    let first = run.wait("the job", is_job);
    assert_eq!(first["job"]["operation"], "save", "{first}");
    let next = run.wait("the job, later", is_job);
    let elapsed = |r: &Value| r["job"]["elapsed_ns"].as_u64().unwrap();
    assert!(elapsed(&next) > elapsed(&first), "{first}\n{next}");
    assert!(next["job"]["memory_remaining_bytes"].as_u64() > Some(0), "{next}");
    // The other guest is none the worse for it.
    run.wait("the other guest's values", |r| {
        is_sample_of(r, UUID) && tells_of_disks(r) && r["job"].is_null()
    });
    drop(halted);
    assert!(save.wait().unwrap().success());
    run.wait("its end", |r| is_event_of(r, OTHER_UUID, "stopped"));
    virsh(&["start", OTHER]);
    run.wait("no job any more", |r| is_sample_of(r, OTHER_UUID) && tells_of_disks(r) && r["job"].is_null());
    run.stop();
    drop(other);
    virsh(&["destroy", OTHER]);
    virsh(&["undefine", OTHER]);
}

/// Makes a disk slow by halting the process that writes to it. `None` if that was over before.
fn halt_a_save(lab: &Lab, save: &mut std::process::Child) -> Option<Stopped> {
    let halted = loop {
        if let Some(writer) = writer_of_libvirtd(lab) {
            break Stopped::new(writer);
        }
        if save.try_wait().unwrap().is_some() {
            return None;
        }
    };
    let job = lab.virsh(&["domjobinfo", OTHER]).unwrap();
    job.contains("Unbounded").then_some(halted)
}

/// The process by which libvirtd lets QEMU write to a file (`virFileWrapperFdNew()`), if there is one.
fn writer_of_libvirtd(lab: &Lab) -> Option<u32> {
    let daemon = format!("/proc/{}/task", lab.libvirtd_pid()?);
    let threads = std::fs::read_dir(daemon).ok()?.flatten();
    let children = threads.filter_map(|thread| std::fs::read_to_string(thread.path().join("children")).ok());
    let pids: Vec<u32> = children
        .flat_map(|list| list.split_whitespace().map(|pid| pid.parse().unwrap()).collect::<Vec<_>>())
        .collect();
    pids.into_iter().find(|pid| {
        let name = std::fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
        name.starts_with("libvirt_iohelpe")
    })
}

/// Between two libvirtds with a host of their own each, as far as they know; the processes are this host's, so that both
/// ends are seen.
#[test]
fn a_guest_that_migrates_is_told_at_both_ends() {
    let stage = stage();
    let there = Lab::start(&LabDirs::from_env().unwrap()).unwrap();
    let other = stage.boot_other(StartState::Paused);
    let mut from = stage.run(&[&["--ebpf", "auto"], &QUICK[..]].concat());
    let mut to =
        Run::start(there.command(program()), &[&["run", "--domain", OTHER_UUID], &QUICK[..]].concat());
    from.wait("a sample", |r| is_sample_of(r, OTHER_UUID) && tells_of_disks(r));
    let daemon = there.path("/run/libvirt/libvirt-sock");
    let uri = format!("qemu+unix:///system?socket={}", daemon.display());
    let meet = format!("unix://{}", stage.lab.scratch().join("migration.sock").display());
    stage
        .lab
        .virsh(&["migrate", OTHER, "--live", "--unsafe", "--migrateuri", &meet, "--desturi", &uri])
        .unwrap();
    // Whoever notices first, libvirt or `/proc`.
    let (mut left, mut another) = (false, false);
    from.wait("its leaving and the other process", |r| {
        left |= is_event_of(r, OTHER_UUID, "migrated") && r["detail"].as_str().unwrap().contains("away");
        another |= is_event_of(r, OTHER_UUID, "counter_reset");
        left && another
    });
    let new = to.wait("its new process", |r| {
        r["type"] == "domain"
            && r["domain"]["uuid"] == OTHER_UUID
            && r["domain"]["pid"].is_u64()
            && r["domain"]["pid"] != other.pid
    });
    assert_eq!(new["domain"]["name"], OTHER);
    to.wait("a sample of the new process", |r| {
        is_sample_of(r, OTHER_UUID) && has_window(r, "procfs") && tells_of_disks(r)
    });
    let passes = from.stop();
    let passes = passes.records.iter().filter(|r| is_event_of(r, OTHER_UUID, "job")).count();
    assert!(passes > 0, "the job was told");
    let arrived = to.stop();
    assert!(arrived.records.iter().any(|r| is_event_of(r, OTHER_UUID, "migrated")), "its arrival");
    there.virsh(&["destroy", OTHER]).unwrap();
}

fn tells_of_disks(sample: &Value) -> bool {
    sample["disks"][0]["rd_req"]["libvirt"].is_u64()
}

fn is_event_of(record: &Value, uuid: &str, kind: &str) -> bool {
    record["type"] == "event" && record["kind"] == kind && record["domain"]["uuid"] == uuid
}

// ---- the stage: one lab and one guest for all tests, one test at a time

struct Stage {
    lab: Lab,
    _guest: Guest,
}

/// Mind that a static is never dropped: the lab ends itself when this process does.
fn stage() -> Performance {
    static STAGE: OnceLock<Stage> = OnceLock::new();
    static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());
    let alone = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
    let stage = STAGE.get_or_init(Stage::build);
    // A test that failed may have left it.
    let _ = stage.lab.virsh(&["destroy", OTHER]);
    let _ = stage.lab.virsh(&["undefine", "--managed-save", OTHER]);
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
        let nic = NicSpec::new("tap-steady", 0);
        // It works a little for ever, so that its counters rise.
        let script = format!("{} burn=cpu0:0.01s sleep=0.2s times=4000000000", nic.net_step("eth0"));
        let root = "<controller type='pci' index='0' model='pcie-root'/>".to_owned();
        let ports = root + &"<controller type='pci' model='pcie-root-port'/>".repeat(8);
        let guest = lab.boot(&GuestSpec {
            uuid: Some(UUID.to_owned()),
            disks: vec![DiskSpec::raw("vda", 1 << 20)],
            nics: vec![nic],
            extra_devices_xml: ports,
            ..GuestSpec::new(NAME, &script)
        });
        Self { _guest: guest.unwrap(), lab }
    }

    fn boot_other(&self, start: StartState) -> Guest {
        let spec = GuestSpec {
            uuid: Some(OTHER_UUID.to_owned()),
            disks: vec![DiskSpec::raw("vda", 1 << 20)],
            nics: vec![NicSpec::new("tap-other", 1)],
            memory_mib: 64,
            start,
            ..GuestSpec::new(OTHER, "sleep=1s")
        };
        self.lab.boot(&spec).unwrap()
    }

    /// `kvm-monitor run` in the lab, for the guests of this file.
    fn run(&self, args: &[&str]) -> Run {
        let command = self.lab.command(program());
        Run::start(command, &[&["run"], args].concat())
    }
}
