//! The kill matrix: in the midst of load the program, QEMU and libvirtd are killed and a disk is taken away, again and
//! again. Nothing stays attached, the kernel does not complain, and the next start works as the first.
//!
//! One round takes some seconds; `KVM_MONITOR_KILL_ROUNDS` sets how many there are (2 if absent). Needs root and the variables
//! that `cargo xtask test` sets.
#![expect(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "a test may panic, and prints what it measured"
)]

use std::{
    collections::BTreeSet,
    fs::{self, File, OpenOptions},
    io::{ErrorKind, Read as _},
    net::SocketAddr,
    os::unix::{fs::OpenOptionsExt as _, process::ExitStatusExt as _},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::JoinHandle,
    time::Duration,
};

use lab::{DiskSpec, Guest, GuestSpec, Lab, LabDirs, NicSpec, UdpSink, Which, is_emulated_host};
use left::{assert_nothing_left, bpf_objects, objects_held_by};
use rustix::process::Signal;
use serde_json::Value;
use support::{PATIENCE, Run, has_window, is_change_of, is_sample_of, program, send, xorshift};

#[path = "support/left.rs"]
mod left;
#[path = "support/mod.rs"]
#[expect(dead_code, reason = "each test program uses a part of it")]
mod support;

const NAME: &str = "kill";
const UUID: &str = "5ec0de00-0000-4000-8000-0000000000f8";
const QUICK: [&str; 6] =
    ["--interval", "50ms", "--libvirt-interval", "200ms", "--libvirt-slow-interval", "200ms"];
/// For a host whose one CPU is emulated, and has a guest to run as well.
const SLOW: [&str; 6] = ["--interval", "500ms", "--libvirt-interval", "2s", "--libvirt-slow-interval", "2s"];
/// Runs that are killed in each round, at some moment of their start or their work.
const KILLS: u32 = 8;

#[test]
fn whatever_is_killed_in_the_midst_of_load_nothing_is_left() {
    let rounds = std::env::var("KVM_MONITOR_KILL_ROUNDS").ok().and_then(|n| n.parse().ok()).unwrap_or(2);
    let lab = Lab::start(&LabDirs::from_env().unwrap()).unwrap();
    let (before, mut messages) = (bpf_objects(), KernelMessages::from_now());
    let mut random = lab::monotonic_ns() | 1;
    // Its start and some of its work.
    let start_us = if is_emulated_host() { 5_000_000 } else { 700_000 };
    let mut kills = 0;
    for round in 0..rounds {
        let load = Load::start(&lab);
        let mut run = start(&lab);
        run.wait("every disk and the interface at work", is_at_work);
        for _ in 0..KILLS {
            random = xorshift(random);
            kill_the_program(&lab, Duration::from_micros(random % start_us));
            kills += 1;
        }
        println!("round {round}: {kills} runs of the program killed so far");
        load.lose_disks(&lab, &mut run);
        println!("round {round}: disks lost");
        lab.kill_libvirtd().unwrap();
        run.wait_event("source_lost", "libvirt");
        run.wait_samples_without_libvirt(UUID, 3);
        if round % 2 == 0 {
            // Before its QEMU: then libvirt finds a guest that died while nobody looked.
            send(load.guest.pid, Signal::KILL);
            run.wait("its end", |r| is_change_of(r, UUID, "gone"));
            lab.start_libvirtd().unwrap();
            run.wait_event("source_back", "libvirt");
        } else {
            lab.start_libvirtd().unwrap();
            run.wait_event("source_back", "libvirt");
            run.wait_fresh(UUID, "libvirt");
            send(load.guest.pid, Signal::KILL);
            run.wait("its end", |r| is_change_of(r, UUID, "gone"));
        }
        let held = objects_held_by(run.child.id());
        let ended = run.stop();
        assert_eq!(ended.records.iter().filter(|r| is_change_of(r, UUID, "gone")).count(), 1);
        assert_nothing_left(&before, &held);
        drop(load);
        messages.assert_no_complaint();
    }
    println!(
        "{rounds} rounds: {kills} runs of the program killed, {rounds} QEMUs, {rounds} libvirtds, 2 disks each"
    );
    assert_nothing_left(&before, &BTreeSet::new());
}

fn start(lab: &Lab) -> Run {
    let pace = if is_emulated_host() { SLOW } else { QUICK };
    Run::start(lab.command(program()), &[&["run", "--domain", NAME], &pace[..]].concat())
}

/// Kills a run after that time; one that follows works at once.
fn kill_the_program(lab: &Lab, after: Duration) {
    let run = start(lab);
    std::thread::sleep(after);
    let held = objects_held_by(run.child.id());
    run.signal(Signal::KILL);
    let ended = run.end();
    assert_eq!(ended.status.signal(), Some(9), "{}", ended.stderr);
    // What this process held is gone; what another one holds, which runs all the time, is not.
    let others = bpf_objects().into_iter().filter(|(object, _)| !held.contains(object)).collect();
    assert_nothing_left(&others, &held);
}

/// Requests are under way on both disks, and packets.
fn is_at_work(record: &Value) -> bool {
    let rises = |value: &Value| value["per_s"].as_f64().is_some_and(|rate| rate > 0.0);
    is_sample_of(record, UUID)
        && has_window(record, "ebpf")
        && rises(&record["vcpus"][0]["run_ns"])
        && rises(&record["interfaces"][0]["rx_packets"])
        && record["disks"].as_array().is_some_and(|disks| disks.len() == 2)
}

/// A guest that reads, writes and sends for ever, and a host that sends to it.
struct Load {
    guest: Guest,
    stop: Arc<AtomicBool>,
    sender: Option<JoinHandle<()>>,
    _sink: UdpSink,
}

impl Load {
    fn start(lab: &Lab) -> Self {
        let nic = NicSpec::new("tap-kill", 4);
        let script = format!(
            "{} write=vda:40x4096 flush=vda:1 read=vdb:40x4096 udp={}:5004x200x512B {} times=4000000000",
            nic.net_step("eth0"),
            nic.host_address,
            // QEMU, the program and whoever unplugs a disk share the one CPU there.
            if is_emulated_host() { "sleep=0.3s" } else { "" }
        );
        let pause = Duration::from_millis(if is_emulated_host() { 20 } else { 1 });
        let disks =
            vec![DiskSpec::raw("vda", 4 << 20), DiskSpec { io: "threads", ..DiskSpec::raw("vdb", 4 << 20) }];
        let spec = GuestSpec {
            uuid: Some(UUID.to_owned()),
            disks,
            nics: vec![nic.clone()],
            ..GuestSpec::new(NAME, &script)
        };
        let sink = UdpSink::start(lab, 5004).unwrap();
        let guest = lab.boot(&spec).unwrap();
        guest.wait_begin(Which::Kind("udp"), PATIENCE).unwrap();
        let stop = Arc::<AtomicBool>::default();
        let stopped = Arc::clone(&stop);
        let socket = lab.in_network(|| std::net::UdpSocket::bind("0.0.0.0:0")).unwrap().unwrap();
        let to = SocketAddr::from((nic.guest_address(), 5005));
        let sender = std::thread::spawn(move || {
            while !stopped.load(Ordering::Relaxed) {
                // Nobody listens, and the tap may be gone.
                let _ = socket.send_to(&[0x5a; 200], to);
                std::thread::sleep(pause);
            }
        });
        Self { guest, stop, sender: Some(sender), _sink: sink }
    }

    /// Deletes the image of one disk, and unplugs the other, while both are at work.
    fn lose_disks(&self, lab: &Lab, run: &mut Run) {
        for entry in fs::read_dir(lab.scratch()).unwrap().flatten() {
            if entry.file_name().to_string_lossy().contains("-vda.") {
                fs::remove_file(entry.path()).unwrap();
            }
        }
        run.wait("figures of both disks", is_at_work);
        lab.virsh(&["detach-disk", NAME, "vdb", "--live"]).unwrap();
        run.wait("a domain with one disk less", |r| {
            is_sample_of(r, UUID) && r["disks"].as_array().is_some_and(|disks| disks.len() == 1)
        });
        for _ in 0..3 {
            run.wait_fresh(UUID, "ebpf");
        }
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(sender) = self.sender.take() {
            let _ = sender.join(); // A panic there has been printed already.
        }
    }
}

/// What the kernel says from now on.
struct KernelMessages(File);

impl KernelMessages {
    fn from_now() -> Self {
        let mut options = OpenOptions::new();
        let file = options.read(true).custom_flags(libc::O_NONBLOCK).open("/dev/kmsg").unwrap();
        rustix::fs::seek(&file, rustix::fs::SeekFrom::End(0)).unwrap();
        Self(file)
    }

    /// A CPU that stood still is the fault of a machine that others load.
    fn assert_no_complaint(&mut self) {
        let mut record = [0; 8192];
        loop {
            let length = match self.0.read(&mut record) {
                Ok(length) => length,
                Err(error) if error.kind() == ErrorKind::WouldBlock => return,
                // Overwritten before it was read.
                Err(error) if error.kind() == ErrorKind::BrokenPipe => continue,
                Err(error) => panic!("cannot read the kernel's messages: {error}"),
            };
            let text = String::from_utf8_lossy(&record[..length]);
            let complains = ["WARNING: ", "BUG: ", "Oops", "general protection", "blocked for more than"];
            let complaint = complains.iter().any(|word| text.contains(word)) && !text.contains("soft lockup");
            assert!(!complaint, "the kernel complains: {text}");
        }
    }
}
