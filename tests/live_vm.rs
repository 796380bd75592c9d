//! What only a host has whose KVM works and whose kernel may be changed: a host under test, as `cargo xtask lab` boots it.
//!
//! Modules are loaded and unloaded, disks are made slow and made to fail. Nothing of that may happen to anybody's
//! own machine, so every test refuses to run elsewhere.
#![expect(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "a test may panic, and prints what it measured"
)]

use std::{
    fs,
    io::{BufRead as _, BufReader, Write as _},
    net::SocketAddr,
    os::unix::process::CommandExt as _,
    path::Path,
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use lab::tap::{NetSpace, RawTap, VnetHeader, frame, tcp_with_segments};
use lab::vhost::{RING, VhostNet};
use lab::{
    DiskSpec, Guest, GuestSpec, Hog, Lab, LabDirs, NicBackend, NicSpec, UdpSink, Which, is_emulated_host,
    send_datagrams,
};
use monitor::{
    source::ebpf::{Ebpf, probes::ProbeGroup},
    units::NicKey,
};
use serde_json::Value;
use support::{Run, is_change_of, is_sample_of, program};

#[path = "support/mod.rs"]
#[expect(dead_code, reason = "each test program uses a part of it")]
mod support;

/// A guest of an emulated host boots slowly.
const PATIENCE: Duration = Duration::from_secs(180);
/// A tick of Debian's kernels.
const TICK_NS: u64 = 4_000_000;
const UUID: &str = "5ec0de00-0000-4000-8000-0000000000f7";
/// Every read of libvirt brings every group.
const QUICK: [&str; 6] =
    ["--interval", "100ms", "--libvirt-interval", "500ms", "--libvirt-slow-interval", "500ms"];

fn lab() -> Lab {
    only_here();
    Lab::start(&LabDirs::from_env().unwrap()).unwrap()
}

fn only_here() {
    assert!(is_emulated_host(), "this changes the host: it runs in the VM of `cargo xtask lab` only");
}

fn start(lab: &Lab, name: &str) -> Run {
    Run::start(lab.command(program()), &[&["run", "--domain", name], &QUICK[..]].concat())
}

/// The next sample of a moment after now that is as wanted.
fn fresh(run: &mut Run, what: &str, wanted: impl Fn(&Value) -> bool) -> Value {
    let now = lab::monotonic_ns();
    run.wait(what, |r| is_sample_of(r, UUID) && r["windows"]["ebpf"][0].as_u64() > Some(now) && wanted(r))
}

/// Stops a guest, or lets it go on, without libvirt's help, which would set up the tap once more.
fn monitor_command(lab: &Lab, name: &str, command: &str) {
    lab.virsh(&["qemu-monitor-command", name, "--hmp", command]).unwrap();
}

fn ebpf(sample: &Value, group: &str, metric: &str) -> u64 {
    let entity = if group == "cpu" { &sample[group] } else { &sample[group][0] };
    entity[metric]["ebpf"].as_u64().unwrap_or_else(|| panic!("no {group}.{metric} in {sample}"))
}

// ---- KVM and vhost

/// While it stands still, a guest's exits are what KVM's own statistics say, its vhost thread has used what the scheduler
/// says, and its tap has carried what the guest says.
#[test]
fn a_kvm_guest_with_vhost_is_counted_as_the_kernel_counts() {
    const SENT: u64 = 3000;
    const RECEIVED: u32 = 300;
    let lab = lab();
    let nic = NicSpec { backend: NicBackend::Vhost, ..NicSpec::new("tap-vm", 7) };
    let script = format!(
        "{} wait udp={}:5000x{SENT}x1400B udprx=5001x4s burn=cpu0:1s end=idle",
        nic.net_step("eth0"),
        nic.host_address
    );
    let spec =
        GuestSpec { uuid: Some(UUID.to_owned()), nics: vec![nic.clone()], ..GuestSpec::new("vm", &script) };
    let sink = UdpSink::start(&lab, 5000).unwrap();
    let guest = lab.boot(&spec).unwrap();
    guest.wait_begin(Which::Kind("wait"), PATIENCE).unwrap();
    let mut run = start(&lab, "vm");
    fresh(&mut run, "its exits", |r| r["vcpus"][0]["exits"]["ebpf"].is_u64());
    let before = stand_still(&lab, &guest, &mut run);
    guest.go_on(PATIENCE).unwrap();
    guest.wait_begin(Which::Kind("udprx"), PATIENCE).unwrap();
    let to = SocketAddr::from((nic.guest_address(), 5001));
    assert_eq!(
        send_datagrams(&lab, to, (RECEIVED, 700), Duration::from_millis(2)).unwrap(),
        u64::from(RECEIVED)
    );
    let truth = guest.wait_end(PATIENCE).unwrap();
    let after = stand_still(&lab, &guest, &mut run);
    let ended = run.stop();

    let grown = |group, metric| ebpf(&after.sample, group, metric) - ebpf(&before.sample, group, metric);
    let exits = grown("vcpus", "exits");
    println!("exits: {exits}, by KVM's statistics {}", after.kvm_exits - before.kvm_exits);
    assert_eq!(exits, after.kvm_exits - before.kvm_exits);
    let parts = ["guest_ns", "host_ns", "halt_poll_ns"].map(|part| grown("vcpus", part));
    let run_ns = grown("vcpus", "run_ns");
    println!("run {run_ns} ns: guest, host, polling {parts:?}");
    assert_eq!(parts.iter().sum::<u64>(), run_ns);
    assert!(parts[0] > 0 && parts[1] > 0);

    let vhost = grown("cpu", "vhost_run_ns");
    println!("vhost: {vhost} ns, by schedstat {} ns", after.vhost_run_ns - before.vhost_run_ns);
    assert_eq!(vhost, after.vhost_run_ns - before.vhost_run_ns);
    assert!(vhost > 0, "the packets did not pass vhost");
    // They share the only CPU.
    let waits = ended.records.iter().filter_map(|r| r["vcpus"][0]["preempted_by"].as_array()).flatten();
    let by_vhost = waits.filter(|by| by["kind"] == "vhost" && by["who"] == "vm");
    let waited: u64 = by_vhost.map(|by| by["ns"].as_u64().unwrap()).sum();
    println!("the vCPU waited {waited} ns for vhost");
    assert!((1..=after.vhost_run_ns).contains(&waited), "{waited} ns of {}", after.vhost_run_ns);
    let classes = ["vcpu_run_ns", "emulator_run_ns", "iothread_run_ns", "worker_run_ns", "vhost_run_ns"];
    let (sum, whole) =
        (classes.map(|class| grown("cpu", class)).iter().sum::<u64>(), grown("cpu", "time_ns"));
    println!("all threads: {whole} ns, the classes sum to {sum} ns");
    assert!(sum <= whole && vhost < whole);

    // The receiver may be too slow for its socket; all of them have passed the tap.
    assert!(sink.packets() > 0);
    let device = |name: &str| truth.total(&format!("net.eth0.{name}")).unwrap().unsigned_abs();
    for (metric, expected) in [
        ("tx_packets", SENT),
        ("tx_bytes", SENT * (1400 + 42)),
        ("rx_packets", u64::from(RECEIVED)),
        ("rx_bytes", u64::from(RECEIVED) * (700 + 42)),
    ] {
        assert_eq!(grown("interfaces", metric), expected, "{metric}");
        assert_eq!(device(metric), expected, "the guest's own {metric}");
    }
}

/// A guest that stands still, by several accounts.
struct Still {
    sample: Value,
    kvm_exits: u64,
    vhost_run_ns: u64,
}

fn stand_still(lab: &Lab, guest: &Guest, run: &mut Run) -> Still {
    let vhost = vhost_thread(guest.pid);
    monitor_command(lab, &guest.name, "stop");
    loop {
        let (kvm_exits, vhost_run_ns) = (kvm_exits(guest.pid), run_ns(vhost));
        let sample = fresh(run, "a sample", |r| {
            r["vcpus"][0]["exits"]["ebpf"].is_u64() && r["cpu"]["vhost_run_ns"]["procfs"].is_u64()
        });
        // The sample lies in between.
        if (kvm_exits, vhost_run_ns) == (self::kvm_exits(guest.pid), run_ns(vhost)) {
            monitor_command(lab, &guest.name, "cont");
            assert_eq!(sample["cpu"]["vhost_run_ns"]["procfs"], vhost_run_ns, "{sample}");
            return Still { sample, kvm_exits, vhost_run_ns };
        }
    }
}

/// Exits of all vCPUs of a process, as KVM counts them itself.
fn kvm_exits(pid: u32) -> u64 {
    let machines = fs::read_dir("/sys/kernel/debug/kvm").unwrap().flatten();
    let mut of_process =
        machines.filter(|machine| machine.file_name().to_string_lossy().starts_with(&format!("{pid}-")));
    let machine = of_process.next().expect("KVM's statistics of the guest");
    fs::read_to_string(machine.path().join("exits")).unwrap().trim().parse().unwrap()
}

/// The thread is QEMU's since Linux 6.4, and the kernel's before.
fn vhost_thread(pid: u32) -> u32 {
    let name = format!("vhost-{pid}");
    let ids = |directory: String| {
        let entries = fs::read_dir(directory).into_iter().flatten().flatten();
        entries.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok()).collect::<Vec<_>>()
    };
    let mut all = [ids(format!("/proc/{pid}/task")), ids("/proc".to_owned())].concat().into_iter();
    let is_vhost =
        |tid: &u32| fs::read_to_string(format!("/proc/{tid}/comm")).is_ok_and(|comm| comm.trim_end() == name);
    all.find(is_vhost).expect("a vhost thread")
}

fn run_ns(tid: u32) -> u64 {
    let stat = fs::read_to_string(format!("/proc/{tid}/schedstat")).unwrap();
    stat.split(' ').next().unwrap().parse().unwrap()
}

/// The packets of one direction, with their `virtio_net_hdr`: every length of an Ethernet frame, and now and then one that
/// asks for segments.
struct Mixture {
    plain: Vec<u8>,
    large: Vec<u8>,
    step: usize,
    number: usize,
    /// What it has given so far: packets, bytes, packets after segmentation.
    given: [u64; 3],
}

impl Mixture {
    /// One in so many asks for segments.
    const LARGE: usize = 500;
    const HEADER: usize = 10;
    const PAYLOAD: usize = 20_000;
    const SEGMENT: u16 = 1448;

    fn new(step: usize, (to, from): ([u8; 6], [u8; 6])) -> Self {
        let plain = [vec![0; Self::HEADER], frame(to, from, 1514)].concat();
        let mut large = tcp_with_segments(Self::PAYLOAD, Self::SEGMENT);
        large[Self::HEADER..Self::HEADER + 6].copy_from_slice(&to);
        large[Self::HEADER + 6..Self::HEADER + 12].copy_from_slice(&from);
        Self { plain, large, step, number: 0, given: [0; 3] }
    }

    fn next(&mut self) -> &[u8] {
        self.number += 1;
        let (packet, wire) = if self.number.is_multiple_of(Self::LARGE) {
            (&self.large[..], Self::PAYLOAD.div_ceil(usize::from(Self::SEGMENT)))
        } else {
            (&self.plain[..Self::HEADER + 60 + self.number * self.step % 1455], 1)
        };
        let [packets, bytes, on_wire] = &mut self.given;
        (*packets, *bytes) = (*packets + 1, *bytes + (packet.len() - Self::HEADER) as u64);
        *on_wire += wire as u64;
        packet
    }
}

/// A tap that the kernel's vhost serves, with this test in the place of the guest: nothing is lost or counted twice,
/// however the vhost of this kernel hands packets to the tap.
#[test]
fn a_million_packets_each_way_through_vhost_are_exact() {
    const PACKETS: usize = 1_000_000;
    const GUEST: [u8; 6] = [0x52, 0x54, 0, 0x77, 2, 1];
    const HOST: [u8; 6] = [0xfe, 0x54, 0, 0x77, 2, 1];
    only_here();
    let mut ebpf = Ebpf::open(&[ProbeGroup::Net]).unwrap();
    let space = NetSpace::new().unwrap();
    let tap = RawTap::open(&space, "tap0", 1, VnetHeader::Yes).unwrap();
    let key = NicKey { netns: space.inode().unwrap(), ifindex: space.ifindex("tap0").unwrap() };
    let slot = ebpf.watch(key, 0).unwrap();
    let mut guest = VhostNet::start(&tap).unwrap();
    let socket = space.frame_socket("tap0", VnetHeader::Yes).unwrap();
    let (mut to_guest, mut to_host) =
        (Mixture::new(7919, (GUEST, HOST)), Mixture::new(3 * 7919, (HOST, GUEST)));
    let (began, mut arrived) = (Instant::now(), [0, 0]);
    // Half of a ring at a time, so that none is ever full.
    let batch = usize::from(RING / 2);
    while to_guest.number < PACKETS {
        let count = batch.min(PACKETS - to_guest.number);
        (0..count).for_each(|_| socket.send(to_guest.next()).unwrap());
        let packets: Vec<Vec<u8>> = (0..count).map(|_| to_host.next().to_vec()).collect();
        guest.send(packets.iter().map(Vec::as_slice)).unwrap();
        let arrive = |packet: &[u8]| arrived = [arrived[0] + 1, arrived[1] + packet.len() as u64];
        guest.receive(count, arrive).unwrap();
    }
    println!("{PACKETS} packets each way in {:.1} s", began.elapsed().as_secs_f64());
    ebpf.read().unwrap();
    let traffic = ebpf.traffic(&slot).unwrap().clone();
    let kernel = space.counters("tap0").unwrap();
    println!("to the guest {:?}, from it {:?}\n{traffic:?}\n{kernel:?}", to_guest.given, to_host.given);
    assert_eq!(arrived, to_guest.given[..2], "what the guest received");
    for (side, truth) in [(traffic.xmit, to_guest.given), (traffic.receive, to_host.given)] {
        assert_eq!([side.packets, side.bytes, side.wire_packets.unwrap()], truth);
    }
    assert_eq!([kernel.tx_packets, kernel.tx_bytes], to_guest.given[..2]);
    assert_eq!([kernel.rx_packets, kernel.rx_bytes], to_host.given[..2]);
    assert_eq!(traffic.refused, 0);
    assert_eq!(ebpf.sources(&slot), [Some(HOST), Some(GUEST)]);
}

// ---- steal

/// A busy loop shares the CPU of a busy vCPU. What the guest's kernel counts as stolen is what its thread waited here.
#[test]
fn what_a_guest_sees_as_steal_is_its_wait() {
    const GUEST_TICK_NS: u64 = 10_000_000; // Of /proc/stat.
    let lab = lab();
    let spec = GuestSpec {
        uuid: Some(UUID.to_owned()),
        vcpu_pin: Some("0".to_owned()),
        ..GuestSpec::new("steal", "wait burn=cpu0:8s wait end=idle")
    };
    let guest = lab.boot(&spec).unwrap();
    guest.wait_begin(Which::Kind("wait"), PATIENCE).unwrap();
    let mut run = start(&lab, "steal");
    let before = fresh(&mut run, "a sample at rest", |_| true);
    let hog = Hog::start(&lab, 0).unwrap();
    guest.go_on(PATIENCE).unwrap();
    guest.wait_begin(Which::Number(2), PATIENCE).unwrap();
    drop(hog);
    let after = fresh(&mut run, "a sample at rest again", |_| true);
    run.stop();
    // Without a rival: it looks at its count first, and tells of it in many exits, each of which would be a wait.
    guest.go_on(PATIENCE).unwrap();
    let truth = guest.wait_end(PATIENCE).unwrap();
    let wait = ebpf(&after, "vcpus", "wait_ns") - ebpf(&before, "vcpus", "wait_ns");
    // Since the start of its script, before which there was no rival, nor any time to steal.
    let ticks = truth.end.as_ref().unwrap().kernel.get("stat.cpu0.steal").copied().unwrap_or(0);
    let steal = ticks.unsigned_abs() * GUEST_TICK_NS;
    println!("waited {wait} ns, stolen {steal} ns by the guest's count");
    assert!(steal > 1_000_000_000, "nobody took the CPU");
    assert!(wait.abs_diff(steal) <= steal / 20, "waited {wait} ns, the guest says {steal}");
}

// ---- disks that are slow, and that fail

/// A block device of the kernel's, gone when dropped.
struct Device {
    name: &'static str,
    sectors: u64,
    file: std::path::PathBuf,
    below: String,
}

impl Device {
    const BYTES: u64 = 16 << 20;

    /// A device-mapper device over a loop device over a file.
    fn new(lab: &Lab, name: &'static str) -> Self {
        modprobe(&["dm-mod", "dm-delay", "loop"]);
        let file = lab.scratch().join(name);
        fs::write(&file, vec![0x5a; usize::try_from(Self::BYTES).unwrap()]).unwrap();
        let below = tool("losetup", &["--find", "--show", "--direct-io=on", &file.to_string_lossy()]);
        let device = Self { name, sectors: Self::BYTES / 512, file, below: below.trim().to_owned() };
        tool("dmsetup", &["create", name, "--table", &device.linear()]);
        device
    }

    fn linear(&self) -> String {
        format!("0 {} linear {} 0", self.sectors, self.below)
    }

    /// Every request takes so many milliseconds longer.
    fn delay(&self, ms: u32) -> String {
        format!("0 {} delay {} 0 {ms}", self.sectors, self.below)
    }

    /// Every request fails.
    fn fail(&self) -> String {
        format!("0 {} error", self.sectors)
    }

    /// Changes what it does, with requests under way.
    fn become_(&self, table: &str) {
        tool("dmsetup", &["reload", self.name, "--table", table]);
        tool("dmsetup", &["suspend", "--nolockfs", self.name]);
        tool("dmsetup", &["resume", self.name]);
    }

    fn path(&self) -> String {
        format!("/dev/mapper/{}", self.name)
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        // While a test fails, QEMU has it open still; the VM ends with all of it.
        let _ = Command::new("dmsetup").args(["remove", "--deferred", self.name]).status();
        let _ = Command::new("losetup").args(["--detach", &self.below]).status();
        let _ = fs::remove_file(&self.file);
    }
}

fn modprobe(modules: &[&str]) {
    tool("modprobe", &[&["--all"], modules].concat());
}

fn modprobe_with(module: &str, parameters: &[&str]) {
    tool("modprobe", &[&[module], parameters].concat());
}

/// Without udev nobody else makes the files of devices.
fn tool(name: &str, arguments: &[&str]) -> String {
    let output = Command::new(name).env("DM_DISABLE_UDEV", "1").args(arguments).output().unwrap();
    let message = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{name} {arguments:?}: {message}");
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// A disk of a guest that is a device of the host, with direct I/O.
fn disk_xml(device: &str, target: &str, io: &str) -> String {
    format!(
        "<disk type='block' device='disk'><driver name='qemu' type='raw' cache='none' io='{io}'/>\
         <source dev='{device}'/><target dev='{target}' bus='virtio'/></disk>"
    )
}

fn boot_with(lab: &Lab, disks: &str, script: &str) -> Guest {
    let spec = GuestSpec {
        uuid: Some(UUID.to_owned()),
        extra_devices_xml: disks.to_owned(),
        ..GuestSpec::new("disks", script)
    };
    let guest = lab.boot(&spec).unwrap();
    guest.wait_begin(Which::Kind("wait"), PATIENCE).unwrap();
    guest
}

fn disk<'s>(sample: &'s Value, target: &str) -> &'s Value {
    let disks = sample["disks"].as_array().unwrap();
    disks.iter().find(|disk| disk["target"] == target).unwrap_or_else(|| panic!("no {target} in {sample}"))
}

/// Every request takes a known time at least.
#[test]
fn a_known_delay_of_a_disk_is_in_its_latencies() {
    let lab = lab();
    let device = Device::new(&lab, "lab-slow");
    device.become_(&device.delay(DELAY_MS));
    // It waits for a number of ticks, the first of which has begun (drivers/md/dm-delay.c: delay_bio()).
    let delay_ns = u64::from(DELAY_MS) * 1_000_000 - TICK_NS;
    assert_delay_is_seen(&lab, (&device.path(), "native"), delay_ns);
}

const DELAY_MS: u32 = 30;

/// Reads of a guest on a device that lets each wait for that long at least.
fn assert_delay_is_seen(lab: &Lab, (device, io): (&str, &str), delay_ns: u64) {
    const READS: u64 = 40;
    let guest = boot_with(lab, &disk_xml(device, "vda", io), &format!("wait read=vda:{READS}x4096 end=idle"));
    let mut run = start(lab, "disks");
    let read = |r: &Value, metric: &str| disk(r, "vda")[metric]["ebpf"].as_u64();
    let before = fresh(&mut run, "the disk", |r| read(r, "rd_req").is_some());
    guest.go_on(PATIENCE).unwrap();
    guest.wait_end(PATIENCE).unwrap();
    let expected = read(&before, "rd_req").unwrap() + READS;
    let after = fresh(&mut run, "every read", |r| read(r, "rd_req") == Some(expected));
    // Histograms come once a second.
    fresh(&mut run, "the last latencies", |r| disk(r, "vda")["rd_latency_hist_ns"].is_array());
    let ended = run.stop();
    let (mut slow, mut quick) = (0, 0);
    for sample in ended.records.iter().filter(|r| is_sample_of(r, UUID)) {
        for bucket in disk(sample, "vda")["rd_latency_hist_ns"].as_array().into_iter().flatten() {
            let [_, high, count] = [0, 1, 2].map(|at| bucket[at].as_u64().unwrap());
            *(if high > delay_ns { &mut slow } else { &mut quick }) += count;
        }
    }
    let took = read(&after, "rd_time_ns").unwrap() - read(&before, "rd_time_ns").unwrap();
    println!("{READS} reads took {took} ns; {slow} of them {delay_ns} ns and more");
    assert!(took >= READS * delay_ns, "{took} ns");
    assert_eq!((slow, quick), (READS, 0), "reads as slow as the device, and quicker ones");
    guest.destroy().unwrap();
}

/// The same on a driver of another kind: requests that pass the block layer's queues, and never reach a device.
#[test]
fn a_known_delay_of_a_null_device_is_in_its_latencies() {
    const IRQ_BY_TIMER: &str = "irqmode=2";
    let lab = lab();
    let delay_ns = u64::from(DELAY_MS) * 1_000_000;
    let delay = format!("completion_nsec={delay_ns}");
    // An earlier test may have had it with other parameters.
    unload(&["null_blk"]);
    modprobe_with("null_blk", &["nr_devices=1", "gb=1", IRQ_BY_TIMER, &delay]);
    assert_delay_is_seen(&lab, ("/dev/nullb0", "threads"), delay_ns);
    unload(&["null_blk"]);
}

/// What a guest leaves in the host's page cache is written later, by the kernel: to the byte what the guest wrote, and
/// what the kernel charges to the control group that QEMU is in.
#[test]
fn what_the_kernel_writes_back_is_the_disks_and_its_groups() {
    const WRITES: u64 = 200;
    const BYTES: u64 = WRITES * 65_536;
    /// Consoles and logs of the lab are written by members of the group, too.
    const BESIDE: u64 = 1 << 20;
    only_here();
    let group = Group::enter();
    let lab = lab();
    let spec = GuestSpec {
        uuid: Some(UUID.to_owned()),
        disks: vec![DiskSpec { cache: "unsafe", io: "threads", ..DiskSpec::raw("vda", 16 << 20) }],
        ..GuestSpec::new("disks", &format!("wait write=vda:{WRITES}x65536 end=idle"))
    };
    let guest = lab.boot(&spec).unwrap();
    guest.wait_begin(Which::Kind("wait"), PATIENCE).unwrap();
    let mut run = start(&lab, "disks");
    let written = |r: &Value| disk(r, "vda")["device_wr_bytes"]["ebpf"].as_u64();
    rustix::fs::sync();
    let before = written(&fresh(&mut run, "the device's share", |r| written(r).is_some())).unwrap();
    let charged_before = group.written();
    guest.go_on(PATIENCE).unwrap();
    guest.wait_end(PATIENCE).unwrap();
    rustix::fs::sync();
    let charged = group.written() - charged_before;
    let after = fresh(&mut run, "what was written back", |r| written(r) >= Some(before + BYTES));
    println!("{BYTES} bytes of the guest; {} by the probes, {charged} by the group", {
        written(&after).unwrap() - before
    });
    assert_eq!(written(&after), Some(before + BYTES));
    assert!((BYTES..BYTES + BESIDE).contains(&charged), "{charged} bytes by the group");
    run.stop();
    guest.destroy().unwrap();
}

/// A control group (version 2) that this process is in, and all that it starts, until this is dropped.
struct Group(std::path::PathBuf);

impl Group {
    const ROOT: &str = "/sys/fs/cgroup";

    fn enter() -> Self {
        let group = Self(Path::new(Self::ROOT).join("lab-writeback"));
        fs::create_dir(&group.0).unwrap();
        fs::write(group.0.join("cgroup.procs"), std::process::id().to_string()).unwrap();
        group
    }

    /// Bytes written by its members or on their behalf, to all disks.
    fn written(&self) -> u64 {
        let text = fs::read_to_string(self.0.join("io.stat")).unwrap();
        // 254:0 rbytes=… wbytes=… rios=…
        let words = text.split_whitespace().filter_map(|word| word.strip_prefix("wbytes="));
        words.map(|bytes| bytes.parse::<u64>().unwrap()).sum()
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        let _ = fs::write(Path::new(Self::ROOT).join("cgroup.procs"), std::process::id().to_string());
        let _ = fs::remove_dir(&self.0); // Its other members end a moment later; the VM ends with it.
    }
}

/// Every request fails for a while, under a guest that keeps asking; then none does any more.
#[test]
fn a_disk_that_fails_under_load_is_told_by_error() {
    let lab = lab();
    let device = Device::new(&lab, "lab-bad");
    let guest = boot_with(
        &lab,
        &disk_xml(&device.path(), "vda", "native"),
        "wait read=vda:5x4096 wait end=idle times=3",
    );
    let mut run = start(&lab, "disks");
    let errors = |r: &Value| disk(r, "vda")["errs"]["ebpf"].as_u64();
    let done = |r: &Value| disk(r, "vda")["rd_req"]["ebpf"].as_u64();
    let healthy = fresh(&mut run, "the disk", |r| errors(r).is_some());
    assert_eq!(errors(&healthy), Some(0));
    device.become_(&device.fail());
    guest.go_on(PATIENCE).unwrap();
    let failed = fresh(&mut run, "failed requests", |r| errors(r) > Some(0));
    println!("{}", disk(&failed, "vda"));
    assert_eq!(disk(&failed, "vda")["errors"]["EIO"].as_u64(), errors(&failed));
    assert_eq!(done(&failed), done(&healthy), "failed requests are no requests done");
    device.become_(&device.linear());
    guest.wait_step(Which::Kind("read"), PATIENCE).unwrap();
    // Through the second `wait` of this round and the first of the next one.
    for step in [2, 3] {
        guest.wait_begin(Which::Number(step), PATIENCE).unwrap();
        guest.go_on(PATIENCE).unwrap();
    }
    let well = fresh(&mut run, "requests done", |r| done(r) >= done(&healthy).map(|n| n + 5));
    assert_eq!(disk(&well, "vda")["inflight"]["ebpf"], 0);
    run.stop();
    guest.destroy().unwrap();
}

fn unload(modules: &[&str]) {
    let deadline = Instant::now() + PATIENCE;
    // What had it open lets go a moment later.
    while !Command::new("modprobe").arg("--remove").args(modules).status().unwrap().success() {
        assert!(Instant::now() < deadline, "{modules:?} cannot be unloaded");
        std::thread::sleep(Duration::from_millis(100));
    }
}

// ---- KVM that comes late

/// Loads KVM again, whatever happens.
struct Unloaded;

impl Unloaded {
    fn new() -> Self {
        unload(&["kvm_amd", "kvm"]);
        Self
    }
}

impl Drop for Unloaded {
    fn drop(&mut self) {
        modprobe(&["kvm_amd"]);
    }
}

#[test]
fn kvm_that_is_loaded_later_is_counted_from_then_on() {
    count_kvm_that_comes_late(Command::new(program()));
}

/// With no more rights than the README asks for.
#[test]
fn kvm_that_is_loaded_later_is_counted_for_a_user_with_capabilities() {
    const CAPABILITIES: &str = "-all,+bpf,+perfmon,+sys_ptrace,+dac_read_search";
    let mut command = Command::new("setpriv");
    command.args(["--reuid", "nobody", "--clear-groups", "--inh-caps", CAPABILITIES]);
    command.args(["--ambient-caps", CAPABILITIES, "--"]).arg(program());
    count_kvm_that_comes_late(command);
}

fn count_kvm_that_comes_late(program: Command) {
    only_here();
    let unloaded = Unloaded::new();
    assert!(!Path::new("/dev/kvm").exists());
    let mut run = Run::start(program, &["run", "--libvirt", "off", "--interval", "100ms"]);
    let session = run.wait("the session", |r| r["type"] == "session");
    let probes = session["probes"].as_array().unwrap();
    let exit = probes.iter().find(|probe| probe["name"] == "kvm_exit").unwrap();
    println!("{exit}");
    assert_eq!(exit["state"], "waiting");
    assert!(exit["reason"].as_str().unwrap().contains("modprobe"), "{exit}");
    drop(unloaded);
    run.wait("word of it", |r| r["type"] == "event" && r["detail"].as_str().unwrap().contains("attached"));

    let mut kvmex = Command::new(std::env::var_os("KVM_MONITOR_KVMEX").unwrap());
    kvmex.arg0("qemu-system-kvmex").args(["-name", "guest=late", "-uuid", UUID, "-accel", "kvm"]);
    kvmex.args(["outs=1000", "cpuids=50", "hlts=100"]).stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut kvmex = kvmex.spawn().unwrap();
    let (mut rounds, says) = (kvmex.stdin.take().unwrap(), BufReader::new(kvmex.stdout.take().unwrap()));
    let mut says = says.lines();
    assert!(says.next().unwrap().unwrap().starts_with("ready "));
    run.wait("the machine", |r| is_change_of(r, UUID, "appeared"));
    run.wait("its vCPU", |r| is_sample_of(r, UUID) && r["vcpus"][0]["userspace_exits"]["ebpf"].is_u64());
    writeln!(rounds).unwrap();
    assert_eq!(says.next().unwrap().unwrap(), "done 1001 0 100");
    let sample =
        fresh(&mut run, "its exits by reason", |r| r["vcpus"][0]["exit_reasons"]["io"]["count"] == 1001);
    let reasons = &sample["vcpus"][0]["exit_reasons"];
    println!("{reasons}");
    assert_eq!((&reasons["hlt"]["count"], &reasons["cpuid"]["count"]), (&100.into(), &50.into()));
    let exits = sample["vcpus"][0]["exits"]["ebpf"].as_u64().unwrap();
    let sum: u64 = reasons.as_object().unwrap().values().map(|r| r["count"].as_u64().unwrap()).sum();
    assert_eq!(sum, exits);
    run.stop();
    kvmex.kill().unwrap();
    kvmex.wait().unwrap();
}
