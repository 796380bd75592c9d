//! The guests of the demo: what each is, what the host does to it meanwhile, and what it then knows exactly.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use lab::{
    DiskSpec, GroundTruth, Guest, GuestSpec, Hog, ImageFormat, Lab, NicSpec, StartState, UdpSink, Which,
    monotonic_ns, send_datagrams,
};
use serde_json::Value;

use super::monitor::Monitor;
use super::truth::Truths;
use crate::process;

use super::{AFTER_STEP, LOOK, PATIENCE, WHOLE_SCRIPT, pause};

/// Every domain of the demo.
pub(super) const NAMES: [&str; 5] = ["direct", "cached", "balloon-0s", "balloon-1s", "balloon-10s"];
const BALLOON_PERIODS_S: [u32; 3] = [0, 1, 10];

const DISK: &str = "vda";
/// Of the guest that has two: its I/O is limited.
const LIMITED: &str = "vdb";
const LIMITED_IOPS: &str = "50";
const TAP: &str = "tap-demo";
/// The guest's datagrams go here; somebody listens, else the host would answer with ICMP errors.
const SINK: u16 = 5000;
/// The guest's ports: datagrams at an even pace and in a flood, and while it is suspended.
const FLOOD: u16 = 5001;
const LATE: u16 = 5002;
/// Streams, out of the guest and into it: segmentation offload applies.
const STREAM_OUT: u16 = 5003;
const STREAM_IN: u16 = 5004;
const STREAM_BYTES: usize = 1_000_000;
/// At an even pace, and as fast as it gets.
const PACED: u32 = 700;
const FLOODED: u32 = 2_000;
/// Datagrams sent to the suspended guest: fewer than the queue of its tap holds.
const LATE_DATAGRAMS: u32 = 300;
const PAYLOAD_BYTES: usize = 1_000;

/// Runs all of them; returns what is known.
pub(super) fn run(lab: &Lab, monitor: &mut Monitor) -> Result<Vec<Value>> {
    let mut truths = direct(lab, monitor)?;
    truths.extend(quiet(lab, monitor)?);
    Ok(truths)
}

/// A guest that has not run yet, and of which the monitor knows.
fn boot(lab: &Lab, monitor: &mut Monitor, spec: GuestSpec) -> Result<Guest> {
    eprintln!("demo: guest {}: {}", spec.name, spec.script);
    let guest = lab.boot(&GuestSpec { start: StartState::Paused, ..spec })?;
    monitor.wait_sample(&guest.name)?;
    Ok(guest)
}

/// Idle, CPU with and without competition, raw direct I/O with and without a limit, datagrams and streams both ways,
/// suspension.
fn direct(lab: &Lab, monitor: &mut Monitor) -> Result<Vec<Value>> {
    const MEMORY_MIB: u32 = 192;
    let nic = NicSpec::new(TAP, 0);
    let host = nic.host_address;
    let script = format!(
        "{} sleep=2.5s cpu=cpu0:2s wait cpu=cpu1:2s sleep=1.2s write={DISK}:1000x4096 read={DISK}:200x65536 \
         flush={DISK}:3 write={LIMITED}:60x4096 sleep=1.2s wait udp={host}:{SINK}x{PACED}x{PAYLOAD_BYTES}B@150 \
         sleep=1.2s udp={host}:{SINK}x{FLOODED}x{PAYLOAD_BYTES}B udprx={FLOOD}x1.5s sleep=1.2s \
         tcp={host}:{STREAM_OUT}x{STREAM_BYTES}B tcprx={STREAM_IN} sleep=1.2s wait udprx={LATE}x1s sleep=2.2s end=idle",
        nic.net_step("eth0")
    );
    let _sink = UdpSink::start(lab, SINK)?;
    let stream = StreamSink::start(lab, STREAM_OUT)?;
    let spec = GuestSpec {
        vcpus: 2,
        memory_mib: MEMORY_MIB,
        disks: vec![DiskSpec::raw(DISK, 64 << 20), DiskSpec::raw(LIMITED, 4 << 20)],
        nics: vec![nic.clone()],
        ..GuestSpec::new("direct", &script)
    };
    let guest = boot(lab, monitor, spec)?;
    lab.virsh(&["blkdeviotune", &guest.name, LIMITED, "--write-iops-sec", LIMITED_IOPS, "--live"])?;
    guest.resume()?;
    let address = |port| SocketAddr::from((nic.guest_address(), port));

    reach(&guest, "wait", 0)?;
    let hogs: Result<Vec<Hog>> = (0..2).map(|cpu| Hog::start(lab, cpu)).collect();
    guest.go_on(PATIENCE)?;
    let burn = number(&guest, "cpu", 1)?;
    guest.wait_step(Which::Number(burn), PATIENCE)?;
    drop(hogs?);

    reach(&guest, "wait", 1)?;
    guest.go_on(PATIENCE)?;
    // Into the guest while it sends: at another pace, so that one direction is not the other.
    send_datagrams(lab, address(FLOOD), (PACED / 2, PAYLOAD_BYTES), Duration::from_millis(10))?;
    let flood = number(&guest, "udprx", 0)?;
    guest.wait_begin(Which::Number(flood), PATIENCE)?;
    send_datagrams(lab, address(FLOOD), (FLOODED, PAYLOAD_BYTES), Duration::ZERO)?;
    let receive = number(&guest, "tcprx", 0)?;
    guest.wait_begin(Which::Number(receive), PATIENCE)?;
    send_stream(lab, address(STREAM_IN))?;

    reach(&guest, "wait", 2)?;
    let (between_ns, sent) = suspend(lab, &guest, address(LATE))?;
    guest.go_on(PATIENCE)?;
    let truth = guest.wait_end(WHOLE_SCRIPT)?;
    pause(AFTER_STEP)?;
    stream.end()?;
    guest.destroy()?;
    let what = |step: &lab::StepTruth| if step.number == burn { ", beside busy loops" } else { "" };
    let truths =
        Truths::of("direct", &truth).idle(DISK, TAP).burns(what).disk(DISK).disk(LIMITED).interface(TAP);
    Ok(truths.suspended(TAP, between_ns, sent).memory(i64::from(MEMORY_MIB) << 20).take())
}

/// Sends to the guest while it is suspended; returns when nothing can have been taken, and how much was sent.
fn suspend(lab: &Lab, guest: &Guest, to: SocketAddr) -> Result<([u64; 2], u64)> {
    lab.virsh(&["suspend", &guest.name])?;
    let from_ns = monotonic_ns();
    pause(AFTER_STEP)?;
    let gap = Duration::from_millis(1);
    let sent = send_datagrams(lab, to, (LATE_DATAGRAMS, PAYLOAD_BYTES), gap)?;
    pause(AFTER_STEP)?;
    let to_ns = monotonic_ns();
    pause(AFTER_STEP)?;
    resume(lab, guest)?;
    Ok(([from_ns, to_ns], sent))
}

/// Lets a suspended guest go on. libvirt gives its tap the host's address again then, and fails if it is there.
fn resume(lab: &Lab, guest: &Guest) -> Result<()> {
    let nic = NicSpec::new(TAP, 0);
    let address = format!("{}/24", nic.host_address);
    let mut remove = lab.command("ip");
    process::run(remove.args(["address", "delete", &address, "dev", TAP]))?;
    lab.virsh(&["resume", &guest.name]).map(drop)
}

/// Guests that need no hands: an image in qcow2 behind the host's page cache, and a step in memory use, seen through
/// balloons that report never, often and seldom.
fn quiet(lab: &Lab, monitor: &mut Monitor) -> Result<Vec<Value>> {
    const MEMORY_MIB: u32 = 128;
    let mut guests = Vec::new();
    for period in BALLOON_PERIODS_S {
        let spec = GuestSpec {
            memory_mib: MEMORY_MIB,
            balloon_period_s: period,
            ..GuestSpec::new(&format!("balloon-{period}s"), "sleep=4s mem=32M sleep=1.5s end=idle")
        };
        guests.push(boot(lab, monitor, spec)?);
    }
    guests.push(boot(lab, monitor, cached())?);
    guests.iter().try_for_each(Guest::resume)?;
    let mut truths = Vec::new();
    for (guest, truth) in guests.iter().zip(ends(&guests)?) {
        let of = Truths::of(&guest.name, &truth);
        let of = if guest.name == "cached" { of.disk(DISK) } else { of.memory(i64::from(MEMORY_MIB) << 20) };
        truths.extend(of.take());
    }
    Ok(truths)
}

/// Waits for the end of every script, and ends each guest soon after. All consoles are read meanwhile, so that each line
/// is seen when it is written.
fn ends(guests: &[Guest]) -> Result<Vec<GroundTruth>> {
    let deadline = Instant::now() + WHOLE_SCRIPT;
    let mut ended: Vec<Option<Instant>> = vec![None; guests.len()];
    let mut gone = vec![false; guests.len()];
    while gone.contains(&false) {
        for (i, guest) in guests.iter().enumerate().filter(|(i, _)| !gone[*i]).collect::<Vec<_>>() {
            let over = guest.truth()?.end.is_some() || Instant::now() > deadline;
            let since = over.then(|| *ended[i].get_or_insert_with(Instant::now));
            if since.is_some_and(|since| since.elapsed() >= AFTER_STEP) {
                guest.destroy()?;
                gone[i] = true;
            }
        }
        pause(LOOK)?;
    }
    guests.iter().map(|guest| guest.wait_end(LOOK)).collect()
}

/// An image in qcow2 behind the host's page cache.
fn cached() -> GuestSpec {
    let disk = DiskSpec {
        target: DISK.to_owned(),
        format: ImageFormat::Qcow2,
        cache: "writeback",
        io: "threads",
        size_bytes: 64 << 20,
        iothread: None,
    };
    let script = format!(
        "sleep=2.5s write={DISK}:500x4096 flush={DISK}:3 sleep=1.2s bwrite={DISK}:200x65536 read={DISK}:200x65536 \
         sleep=2.2s end=idle"
    );
    GuestSpec { disks: vec![disk], ..GuestSpec::new("cached", &script) }
}

/// Waits until the guest stands at the n-th step of a kind.
fn reach(guest: &Guest, kind: &str, nth: usize) -> Result<()> {
    let number = number(guest, kind, nth)?;
    guest.wait_begin(Which::Number(number), WHOLE_SCRIPT).map(drop)
}

/// The number of the n-th step of a kind in the guest's script.
fn number(guest: &Guest, kind: &str, nth: usize) -> Result<u64> {
    let words = guest.script.split_whitespace().enumerate();
    let of_kind = words.filter(|(_, word)| word.split('=').next() == Some(kind));
    let found = of_kind.map(|(number, _)| number).nth(nth);
    let number = found.with_context(|| format!("the script has no step {kind} number {nth}"))?;
    Ok(u64::try_from(number)?)
}

/// Sends a stream into the guest.
fn send_stream(lab: &Lab, to: SocketAddr) -> Result<()> {
    let stream = lab.in_network(|| TcpStream::connect_timeout(&to, PATIENCE))?;
    let mut stream = stream.context("cannot connect to the guest")?;
    stream.write_all(&vec![0x5a; STREAM_BYTES]).context("cannot send to the guest")?;
    stream.shutdown(Shutdown::Write).context("cannot end the stream to the guest")
}

/// Takes one stream from the guest.
struct StreamSink(JoinHandle<std::io::Result<u64>>);

impl StreamSink {
    fn start(lab: &Lab, port: u16) -> Result<Self> {
        let listener = lab.in_network(|| TcpListener::bind((Ipv4Addr::UNSPECIFIED, port)))?;
        let listener = listener.with_context(|| format!("cannot bind TCP port {port} in the lab"))?;
        Ok(Self(std::thread::spawn(move || {
            let (mut stream, _) = listener.accept()?;
            let (mut buffer, mut bytes) = (vec![0; 1 << 16], 0);
            loop {
                match stream.read(&mut buffer)? {
                    0 => return Ok(bytes),
                    length => bytes += u64::try_from(length).unwrap_or(0),
                }
            }
        })))
    }

    fn end(self) -> Result<()> {
        let bytes = self.0.join().ok().context("the receiver of the stream panicked")??;
        anyhow::ensure!(bytes == STREAM_BYTES as u64, "{bytes} bytes of the stream came from the guest");
        Ok(())
    }
}
