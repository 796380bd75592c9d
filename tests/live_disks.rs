//! Every way in which QEMU opens an image: what the guest asked for, what libvirt says, and what the probes counted.
//!
//! A cell is a kind of image, an I/O mode, a cache mode, and the main loop or an iothread. Each disk of a guest is one
//! cell and gets numbers of requests of its own, so that a request charged to the wrong disk shows. A few cells are tried
//! each time; `KVM_MONITOR_DISK_CELLS` names the images of which all are (`all`, or a list as in [`Image::ALL`]), and
//! `KVM_MONITOR_DISK_ROWS` a file that takes the figures, one JSON object per line (`cargo xtask disks`).

#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]
#![expect(clippy::print_stdout, reason = "figures, for a person")]

use std::{io::Write as _, path::Path, time::Duration};

use lab::{DiskSpec, GroundTruth, Guest, GuestSpec, ImageFormat, Lab, LabDirs, StartState, Which};
use serde_json::{Value, json};
use support::{Run, is_sample_of, program};

#[path = "support/mod.rs"]
#[expect(dead_code, reason = "each test program uses a part of it")]
mod support;

/// For a guest with many disks on a loaded machine.
const SCRIPT: Duration = Duration::from_secs(240);
const SIZE: u64 = 4 << 20;
/// More than QEMU reads and writes of a qcow2 image beside the guest's data: tables, and clusters that it fills up.
const METADATA: u64 = 3 << 20;
/// Reads of the firmware, which looks for something to boot before the guest's kernel starts.
const FIRMWARE: (u64, u64) = (2, 8192);
/// Measurements of one group of cells at most.
const ATTEMPTS: usize = 4;
/// Looks at the stream that a figure may take to settle.
const LOOKS: usize = 50;
/// The main loop, or an iothread.
const THREADS: [Option<u32>; 2] = [None, Some(1)];
const IO: [&str; 3] = ["threads", "native", "io_uring"];
const CACHES: [&str; 5] = ["none", "directsync", "writeback", "writethrough", "unsafe"];

/// A kind of image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Image {
    name: &'static str,
    format: ImageFormat,
}

impl Image {
    const ALL: [Self; 5] = [
        Self { name: "raw", format: ImageFormat::Raw },
        Self { name: "qcow2", format: ImageFormat::Qcow2 },
        Self { name: "qcow2-on-raw", format: ImageFormat::Qcow2OnRaw },
        Self { name: "loop", format: ImageFormat::LoopDevice },
        Self { name: "dm", format: ImageFormat::MappedDevice },
    ];

    fn of(name: &str) -> Self {
        *Self::ALL.iter().find(|image| image.name == name).unwrap_or_else(|| panic!("no image {name}"))
    }

    /// A request of the guest is a request of QEMU.
    fn is_plain(self) -> bool {
        !matches!(self.format, ImageFormat::Qcow2 | ImageFormat::Qcow2OnRaw)
    }
}

/// One way to open an image.
#[derive(Clone, Copy, Debug)]
struct Cell {
    image: Image,
    io: &'static str,
    cache: &'static str,
    iothread: Option<u32>,
}

impl Cell {
    fn new(image: &str, io: &'static str, cache: &'static str, iothread: Option<u32>) -> Self {
        Self { image: Image::of(image), io, cache, iothread }
    }

    fn is_direct(self) -> bool {
        matches!(self.cache, "none" | "directsync")
    }

    /// QEMU refuses the kernel's aio on the page cache.
    fn exists(self) -> bool {
        self.io != "native" || self.is_direct()
    }

    /// All that exist of a kind of image, served by one thread.
    fn all(image: Image, iothread: Option<u32>) -> Vec<Self> {
        let io = |io| CACHES.map(move |cache| Self { image, io, cache, iothread });
        IO.into_iter().flat_map(io).filter(|cell| cell.exists()).collect()
    }
}

/// What one party counted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Counts {
    rd_req: u64,
    rd_bytes: u64,
    wr_req: u64,
    wr_bytes: u64,
    fl_req: u64,
}

impl Counts {
    /// What a source says of a disk in a sample; none if it does not say all.
    fn of(disk: &Value, source: &str) -> Option<Self> {
        let get = |metric: &str| disk[metric][source].as_u64();
        Some(Self {
            rd_req: get("rd_req")?,
            rd_bytes: get("rd_bytes")?,
            wr_req: get("wr_req")?,
            wr_bytes: get("wr_bytes")?,
            fl_req: get("fl_req")?,
        })
    }

    /// What the guest's kernel asked of a disk since it started.
    fn asked(truth: &GroundTruth, target: &str) -> Self {
        let total = |name: &str| truth.total(&format!("disk.{target}.{name}")).unwrap().unsigned_abs();
        Self {
            rd_req: total("rd_ios"),
            rd_bytes: total("rd_sectors") * 512,
            // The guest's kernel counts flushes as writes too.
            wr_req: total("wr_ios") - total("fl_ios"),
            wr_bytes: total("wr_sectors") * 512,
            fl_req: total("fl_ios"),
        }
    }

    fn json(self) -> Value {
        json!([self.rd_req, self.rd_bytes, self.wr_req, self.wr_bytes, self.fl_req])
    }
}

/// A disk of a guest.
fn target(number: usize) -> String {
    format!("vd{}", char::from(b'a' + u8::try_from(number).unwrap()))
}

fn guest(lab: &Lab, name: &str, cells: &[Cell]) -> Guest {
    let disks = cells.iter().enumerate().map(|(i, cell)| DiskSpec {
        format: cell.image.format,
        cache: cell.cache,
        io: cell.io,
        iothread: cell.iothread,
        ..DiskSpec::raw(&target(i), SIZE)
    });
    // No two disks have the same numbers; what is read has been written, so that it is there in a qcow2 image too.
    let work = |i: usize| {
        let (disk, writes, large, reads) = (target(i), 20 + i, 3 + i, 10 + i);
        format!(
            "write={disk}:{writes}x4096 write={disk}:{large}x65536 flush={disk}:2 read={disk}:{reads}x4096"
        )
    };
    let script: Vec<_> = (0..cells.len()).map(work).collect();
    let spec = GuestSpec {
        disks: disks.collect(),
        start: StartState::Paused,
        ..GuestSpec::new(name, &script.join(" "))
    };
    lab.boot(&spec).unwrap()
}

/// Some hosts run no program in interrupts that find their first process running, and with it the end of a read may go
/// unseen: a measurement that falls short is made again. A mistake falls short each time.
fn measure(guests: &[(&str, Vec<Cell>)]) -> Vec<Value> {
    let again = (1..ATTEMPTS).find_map(|_| std::panic::catch_unwind(|| measure_once(guests)).ok());
    again.unwrap_or_else(|| measure_once(guests))
}

/// Runs the guests at once under one monitor, and returns a row for each cell.
fn measure_once(guests: &[(&str, Vec<Cell>)]) -> Vec<Value> {
    let lab = Lab::start(&LabDirs::from_env().unwrap()).unwrap();
    let booted: Vec<_> = guests.iter().map(|(name, cells)| guest(&lab, name, cells)).collect();
    let mut args =
        vec!["run", "--interval", "200ms", "--libvirt-interval", "200ms", "--libvirt-slow-interval"];
    args.extend(["200ms", "--probes", "block"]);
    args.extend(guests.iter().flat_map(|(name, _)| ["--domain", name]));
    let mut run = Run::start(lab.command(program()), &args);
    for guest in &booted {
        // Watched before the guest's first instruction.
        run.wait("its disks", |r| is_sample_of(r, &guest.uuid) && r["disks"][0]["rd_req"]["ebpf"] == 0);
        guest.resume().unwrap();
    }
    let mut rows = Vec::new();
    for (guest, (_, cells)) in booted.iter().zip(guests) {
        let truth = guest.wait_end(SCRIPT).unwrap();
        let disks = settled(&mut run, guest);
        for (i, cell) in cells.iter().enumerate() {
            rows.push(judge(*cell, &truth, &target(i), &disks[i]));
        }
        guest.destroy().unwrap();
    }
    run.stop();
    rows
}

/// The disks once libvirt was read after the end of the script and nothing is in flight.
fn settled(run: &mut Run, guest: &Guest) -> Vec<Value> {
    let now = lab::monotonic_ns();
    let mut looks = 0;
    let sample = run.wait("figures after the end", |r| {
        let fresh = |source: &str| r["windows"][source][0].as_u64().is_some_and(|begin| begin > now);
        if !is_sample_of(r, &guest.uuid) || !fresh("libvirt") || !fresh("ebpf") {
            return false;
        }
        looks += 1;
        let disks = r["disks"].as_array().unwrap();
        let done = |disk: &Value| {
            disk["rd_req"]["libvirt"].is_u64() && disk["inflight"]["ebpf"].as_u64().unwrap_or(0) == 0
        };
        disks.iter().all(done) || looks > LOOKS
    });
    sample["disks"].as_array().unwrap().clone()
}

/// Holds the parties against each other.
fn judge(cell: Cell, truth: &GroundTruth, target: &str, disk: &Value) -> Value {
    let truth = Counts::asked(truth, target);
    let libvirt = Counts::of(disk, "libvirt").unwrap();
    let host = Counts::of(disk, "ebpf").unwrap_or_else(|| panic!("not seen: {disk}"));
    let name = format!(
        "{} {} {} {}",
        cell.image.name,
        cell.io,
        cell.cache,
        if cell.iothread.is_some() { "iothread" } else { "main" }
    );
    println!("{name:<42} truth {truth:?}\n{:<42} libvirt {libvirt:?}\n{:<42} host {host:?}", "", "");
    assert_eq!(disk["target"], target);
    // libvirt counts the guest's requests, and the firmware's before.
    let firmware = (libvirt.rd_req - truth.rd_req, libvirt.rd_bytes - truth.rd_bytes);
    assert!(
        firmware.0 <= FIRMWARE.0 && firmware.1 <= FIRMWARE.1,
        "{name}: reads nobody asked for {firmware:?}"
    );
    assert_eq!((libvirt.wr_req, libvirt.wr_bytes), (truth.wr_req, truth.wr_bytes), "{name}");
    judge_host(cell, &name, (host, libvirt));
    assert_eq!(disk["errs"]["ebpf"], 0, "{name}");
    json!({
        "kernel": kernel_name(), "image": cell.image.name, "io": cell.io, "cache": cell.cache,
        "thread": if cell.iothread.is_some() { "iothread" } else { "main loop" },
        "truth": truth.json(), "libvirt": libvirt.json(), "ebpf": host.json(),
        "opening": disk["qemu_open_req"]["ebpf"],
    })
}

fn judge_host(cell: Cell, name: &str, (host, guest): (Counts, Counts)) {
    if cell.image.is_plain() {
        let data = |of: Counts| (of.rd_req, of.rd_bytes, of.wr_req, of.wr_bytes);
        assert_eq!(data(host), data(guest), "{name}");
    } else {
        let more = |host: u64, guest: u64| host >= guest && host <= guest + METADATA;
        assert!(more(host.wr_bytes, guest.wr_bytes), "{name}: {host:?} {guest:?}");
        assert!(host.rd_bytes <= guest.rd_bytes + METADATA, "{name}: {host:?} {guest:?}");
        // All of it was written before, if only by the same guest.
        assert!(
            host.rd_bytes >= guest.rd_bytes - FIRMWARE.1 || !cell.is_direct(),
            "{name}: {host:?} {guest:?}"
        );
    }
    match cell.cache {
        "unsafe" => assert_eq!(host.fl_req, 0, "{name}"),
        // QEMU drops the second of two flushes, and makes further ones of its own for qcow2.
        "none" | "writeback" => assert!(host.fl_req >= 1, "{name}: {host:?}"),
        _ if cell.image.is_plain() => assert_eq!(host.fl_req, guest.wr_req, "{name}: one for each write"),
        _ => assert!(host.fl_req >= guest.wr_req, "{name}: {host:?}"),
    }
}

fn kernel_name() -> String {
    std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap().trim().to_owned()
}

/// This kernel has device-mapper, if need be as a module.
fn has_device_mapper() -> bool {
    let _ = std::process::Command::new("modprobe").args(["--quiet", "dm-mod"]).status();
    // The node alone says nothing: dmsetup makes it where there is none.
    std::fs::File::open("/dev/mapper/control").is_ok()
}

/// Every kind of image, I/O mode and cache mode at least once, each thread several times.
fn some() -> Vec<(&'static str, Vec<Cell>)> {
    let mut one = vec![
        Cell::new("raw", "threads", "writeback", None),
        Cell::new("raw", "native", "directsync", Some(1)),
        Cell::new("qcow2", "io_uring", "none", Some(1)),
        Cell::new("loop", "threads", "unsafe", Some(1)),
    ];
    let two = vec![
        Cell::new("raw", "io_uring", "writethrough", Some(1)),
        Cell::new("qcow2-on-raw", "native", "none", None),
        Cell::new("qcow2-on-raw", "threads", "writeback", None),
        Cell::new("loop", "io_uring", "none", None),
    ];
    if has_device_mapper() {
        one.push(Cell::new("dm", "native", "none", None));
        one.push(Cell::new("dm", "io_uring", "writeback", Some(1)));
    }
    vec![("one", one), ("two", two)]
}

#[test]
fn each_request_is_charged_to_its_disk_however_the_image_is_opened() {
    let wanted = std::env::var("KVM_MONITOR_DISK_CELLS").unwrap_or_default();
    let rows = if wanted.is_empty() {
        measure(&some())
    } else {
        let images: Vec<Image> = match wanted.as_str() {
            "all" => Image::ALL.into_iter().filter(|i| i.name != "dm" || has_device_mapper()).collect(),
            names => names.split(',').map(Image::of).collect(),
        };
        let pair = |image: &Image| {
            measure(&THREADS.map(|t| (if t.is_some() { "iothread" } else { "main" }, Cell::all(*image, t))))
        };
        images.iter().flat_map(pair).collect()
    };
    if let Some(file) = std::env::var_os("KVM_MONITOR_DISK_ROWS") {
        let mut file = std::fs::OpenOptions::new().create(true).append(true).open(file).unwrap();
        rows.iter().for_each(|row| writeln!(file, "{row}").unwrap());
    }
}

// ---- images that change while the guest runs

/// The guest writes between two changes, so that each is followed by requests on what it led to.
const CHANGES: &str = "wait write=vda:10x4096 wait write=vda:20x4096 wait write=vda:30x4096 wait write=vdb:40x4096 \
                       flush=vdb:1 wait write=vda:15x4096 wait write=vda:50x4096 sleep=600s";

/// A run of the monitor beside a guest whose images change.
struct Changing {
    lab: Lab,
    guest: Guest,
    run: Run,
    /// `wait` steps passed.
    steps: u64,
}

impl Changing {
    fn start(script: &str) -> Self {
        let lab = Lab::start(&LabDirs::from_env().unwrap()).unwrap();
        let ports = "<controller type='pci' index='0' model='pcie-root'/>".to_owned()
            + &"<controller type='pci' model='pcie-root-port'/>".repeat(8);
        let spec = GuestSpec {
            disks: vec![DiskSpec::raw("vda", SIZE)],
            extra_devices_xml: ports,
            ..GuestSpec::new("changing", script)
        };
        let guest = lab.boot(&spec).unwrap();
        guest.wait_begin(Which::Number(0), SCRIPT).unwrap();
        let mut args = vec!["run", "--interval", "200ms", "--libvirt-interval", "200ms"];
        args.extend(["--libvirt-slow-interval", "200ms", "--probes", "block", "--domain", "changing"]);
        let mut run = Run::start(lab.command(program()), &args);
        run.wait("its disk", |r| is_sample_of(r, &guest.uuid) && r["disks"][0]["wr_req"]["ebpf"] == 0);
        Self { lab, guest, run, steps: 0 }
    }

    fn virsh(&self, arguments: &[&str]) {
        self.lab.virsh(arguments).unwrap();
    }

    fn file(&self, name: &str) -> String {
        self.lab.scratch().join(name).to_string_lossy().into_owned()
    }

    /// Lets the guest write on, until it has.
    fn write(&mut self) {
        self.guest.go_on(SCRIPT).unwrap();
        self.guest.wait_step(Which::Number(self.steps + 1), SCRIPT).unwrap();
        self.steps += 2;
    }

    /// Reads on until a disk lies in a file, and is watched there; returns its name.
    fn wait_source(&mut self, file: &str) -> String {
        let uuid = self.guest.uuid.clone();
        let changed = self.run.wait("another image", |r| {
            r["type"] == "domain" && r["domain"]["uuid"] == uuid.as_str() && disk_on(r, file).is_some()
        });
        disk_on(&changed, file).unwrap()
    }

    /// Writes of a disk so far; waits until they are as many as wanted.
    fn wait_writes(&mut self, target: &str, wanted: impl Fn(u64) -> bool) -> u64 {
        let uuid = self.guest.uuid.clone();
        let now = lab::monotonic_ns();
        let mut found = 0;
        self.run.wait("its writes", |r| {
            let fresh = r["windows"]["ebpf"][0].as_u64().is_some_and(|begin| begin > now);
            if !is_sample_of(r, &uuid) || !fresh {
                return false;
            }
            let writes = disk_of(r, target).and_then(|disk| disk["wr_req"]["ebpf"].as_u64());
            found = writes.unwrap_or(0);
            writes.is_some_and(&wanted)
        });
        found
    }
}

/// The target of the disk whose top image is a file, in a `domain` record.
fn disk_on(record: &Value, file: &str) -> Option<String> {
    let disks = record["domain"]["disks"].as_array()?;
    Some(disks.iter().find(|disk| disk["source"] == file)?["target"].as_str()?.to_owned())
}

fn disk_of<'a>(sample: &'a Value, target: &str) -> Option<&'a Value> {
    sample["disks"].as_array()?.iter().find(|disk| disk["target"] == target)
}

/// Holds what the stream says of the image below an overlay against the image itself and the domain's XML.
fn check_image_below(stage: &Changing, told: &Value, image: &str) {
    println!("{told}");
    assert_eq!(told.as_array().unwrap().len(), 1, "{told}");
    let size = std::fs::metadata(image).unwrap().len();
    assert_eq!((&told[0]["path"], &told[0]["physical_bytes"]), (&json!(image), &json!(size)));
    assert_eq!(told[0]["capacity_bytes"], SIZE);
    let xml = stage.lab.virsh(&["dumpxml", "changing"]).unwrap();
    assert!(xml.contains(&format!("<backingStore type='file' index='{}'>", told[0]["index"])), "{xml}");
}

/// Snapshot, commit, hotplug, unplug.
fn follow_changes() -> Changing {
    let mut stage = Changing::start(CHANGES);
    let (raw, overlay) = (stage.file("changing-vda.raw"), stage.file("changing-vda.snap"));
    stage.write();
    stage.wait_writes("vda", |writes| writes == 10);
    stage.virsh(&["snapshot-create-as", "changing", "snap", "--disk-only", "--no-metadata", "--atomic"]);
    assert_eq!(stage.wait_source(&overlay), "vda");
    let disk = stage.wait_disk("vda", |disk| disk["backing"].is_array());
    check_image_below(&stage, &disk["backing"], &raw);
    let before = stage.wait_writes("vda", |_| true);
    stage.write();
    // qcow2's own writes come on top.
    stage.wait_writes("vda", |writes| writes >= before + 20);
    stage.wait_disk("vda", |disk| disk["job_wr_req"]["ebpf"] == 0 && disk["job_wr_bytes"]["ebpf"] == 0);
    stage.virsh(&["blockcommit", "changing", "vda", "--active", "--pivot", "--wait"]);
    assert_eq!(stage.wait_source(&raw), "vda");
    stage.wait_disk("vda", |disk| disk["capacity_bytes"]["libvirt"].is_u64() && disk["backing"].is_null());
    let before = stage.wait_writes("vda", |_| true);
    let by_commit = stage.wait_disk("vda", |disk| disk["job_wr_bytes"]["ebpf"].is_u64());
    stage.write();
    stage.wait_writes("vda", |writes| writes == before + 30);
    // What the guest had written to the overlay, in whole clusters, and none of what it writes to the image below since.
    let after = stage.wait_disk("vda", |disk| disk["job_wr_bytes"]["ebpf"].is_u64());
    let [requests, bytes] =
        ["job_wr_req", "job_wr_bytes"].map(|metric| after[metric]["ebpf"].as_u64().unwrap());
    println!("the commit wrote {bytes} bytes by {requests} requests");
    assert!(requests > 0 && (20 * 4096..=SIZE).contains(&bytes), "{after}");
    assert_eq!(by_commit["job_wr_bytes"]["ebpf"], bytes);
    let plugged = stage.file("plugged.raw");
    std::fs::write(&plugged, vec![0x5a; usize::try_from(SIZE).unwrap()]).unwrap();
    stage.virsh(&[
        "attach-disk",
        "changing",
        &plugged,
        "vdb",
        "--live",
        "--subdriver",
        "raw",
        "--cache",
        "none",
    ]);
    let target = stage.wait_source(&plugged);
    stage.wait_writes(&target, |writes| writes == 0);
    stage.write();
    stage.wait_writes(&target, |writes| writes == 40);
    stage.guest.wait_step(Which::Number(stage.steps), SCRIPT).unwrap();
    stage.steps += 1;
    stage.virsh(&["detach-disk", "changing", "vdb", "--live"]);
    let uuid = stage.guest.uuid.clone();
    stage.run.wait("the end of the disk", |r| {
        is_sample_of(r, &uuid) && disk_of(r, &target).is_none() && r["disks"][0]["wr_req"]["ebpf"].is_u64()
    });
    stage
}

#[test]
fn a_disk_is_followed_from_image_to_image() {
    let mut stage = follow_changes();
    // Another size, and a copy that the disk goes on with.
    stage.virsh(&["blockresize", "changing", "vda", "8M"]);
    let uuid = stage.guest.uuid.clone();
    stage.run.wait("the new size", |r| {
        is_sample_of(r, &uuid) && r["disks"][0]["capacity_bytes"]["libvirt"] == 8 << 20
    });
    // What no probe sees of a copy takes nothing from the figures of the disk: the kernel's aio on a file system in memory, which
    // has direct I/O since Linux 6.6.
    if !kernel_name().starts_with("6.1.") {
        let unseen = "/run/unseen.raw";
        stage.virsh(&[
            "blockcopy",
            "changing",
            "vda",
            unseen,
            "--format",
            "raw",
            "--wait",
            "--transient-job",
        ]);
        stage.run.wait("where it is copied to", |r| {
            r["type"] == "domain" && r["domain"]["disks"][0]["mirror"] == unseen
        });
        stage.wait_writes("vda", |_| true);
        stage.virsh(&["blockjob", "changing", "vda", "--abort"]);
    }
    let copy = stage.file("copy.raw");
    let by_jobs = |disk: &Value| disk["job_wr_bytes"]["ebpf"].as_u64().unwrap();
    let before = by_jobs(&stage.wait_disk("vda", |disk| disk["job_wr_bytes"]["ebpf"].is_u64()));
    stage.virsh(&["blockcopy", "changing", "vda", &copy, "--format", "raw", "--wait", "--transient-job"]);
    stage.run.wait("where it is copied to", |r| {
        r["type"] == "domain" && r["domain"]["disks"][0]["mirror"] == copy.as_str()
    });
    // Seen with the first description that has it: what was written before is not in.
    stage.write();
    stage.wait_disk("vda", |disk| by_jobs(disk) >= before + 15 * 4096);
    stage.virsh(&["blockjob", "changing", "vda", "--pivot"]);
    assert_eq!(stage.wait_source(&copy), "vda");
    let before = stage.wait_writes("vda", |_| true);
    let copied = by_jobs(&stage.wait_disk("vda", |disk| disk["job_wr_bytes"]["ebpf"].is_u64()));
    // Whoever deletes the file of a running VM takes its name only.
    std::fs::remove_file(&copy).unwrap();
    stage.write();
    stage.wait_writes("vda", |writes| writes == before + 50);
    // The guest goes on with what was the target: from the pivot on its writes are no job's.
    assert_eq!(by_jobs(&stage.wait_disk("vda", |_| true)), copied);
    let ended = stage.run.stop();
    // What a job reads is like any other request; the stream tells when there was one.
    let jobs = ended.records.iter().filter(|r| r["type"] == "event" && r["kind"] == "block_job");
    let jobs: Vec<_> = jobs.map(|job| job["detail"].as_str().unwrap()).collect();
    println!("{jobs:?}");
    assert!(jobs.iter().any(|job| job.contains("commit")) && jobs.iter().any(|job| job.contains("copy")));
}

/// What QEMU makes the guest wait for is in the guest's times alone, and of a raw image each byte is written once.
#[test]
fn what_qemu_holds_back_and_what_the_device_writes_are_told_beside_the_guests_view() {
    const WRITES: u64 = 8;
    /// One a second: of each write after the first two, far more than a tenth of that is QEMU's doing, however slow the host.
    const LEAST_NS: u64 = (WRITES - 2) * 100_000_000;
    let mut stage = Changing::start(&format!("wait write=vda:{WRITES}x4096 sleep=600s"));
    stage.virsh(&["blkdeviotune", "changing", "vda", "--total-iops-sec", "1", "--live"]);
    stage.guest.go_on(SCRIPT).unwrap();
    let (mut held_back_ns, mut amplifications) = (0, Vec::new());
    let uuid = stage.guest.uuid.clone();
    let sample = stage.run.wait("all that it wrote", |r| {
        if !is_sample_of(r, &uuid) {
            return false;
        }
        let disk = &r["disks"][0];
        held_back_ns += disk["layers"]["wr_qemu_ns"].as_u64().unwrap_or(0);
        amplifications.extend(disk["layers"]["write_amplification"].as_f64());
        disk["wr_req"]["libvirt"] == WRITES && disk["wr_req"]["ebpf"] == WRITES
    });
    let disk = &sample["disks"][0];
    println!("{disk}\nheld back for {held_back_ns} ns, written over asked for {amplifications:?}");
    assert!(held_back_ns >= LEAST_NS, "{held_back_ns}: {disk}");
    let time = |source: &str| disk["wr_time_ns"][source].as_u64().unwrap();
    assert!(time("libvirt") >= time("ebpf") + LEAST_NS, "{disk}");
    // Absent where the image is on a file system without a device, as in a host under test.
    if disk["device_wr_bytes"]["ebpf"].is_u64() {
        assert_eq!(disk["device_wr_bytes"]["ebpf"], disk["wr_bytes"]["ebpf"]);
        assert!(amplifications.contains(&1.0), "{amplifications:?}");
    }
    stage.run.stop();
}

/// Without libvirt nobody says that the new image is the same disk; its requests go on under the disk's name.
#[test]
fn without_libvirt_a_disk_keeps_its_name_under_a_snapshot() {
    let lab = Lab::start(&LabDirs::from_env().unwrap()).unwrap();
    let spec = GuestSpec {
        disks: vec![DiskSpec::raw("vda", SIZE), DiskSpec::raw("vdb", SIZE)],
        ..GuestSpec::new("alone", "wait write=vdb:10x4096 end=idle")
    };
    let guest = lab.boot(&spec).unwrap();
    guest.wait_begin(Which::Number(0), SCRIPT).unwrap();
    let args = ["run", "--libvirt", "off", "--interval", "200ms", "--probes", "block", "--domain", "alone"];
    let mut run = Run::start(lab.command(program()), &args);
    let [raw, overlay] = ["alone-vdb.raw", "alone-vdb.snap"]
        .map(|name| lab.scratch().join(name).to_string_lossy().into_owned());
    let domain = run.wait("its disks", |r| r["type"] == "domain" && disk_on(r, &raw).is_some());
    let name = disk_on(&domain, &raw).unwrap();
    let take =
        ["snapshot-create-as", "alone", "snap", "--disk-only", "--no-metadata", "--atomic", "--diskspec"];
    lab.virsh(&[&take[..], &["vda,snapshot=no", "--diskspec", "vdb,snapshot=external"]].concat()).unwrap();
    // Until QEMU has let go of the old image, the new one looks like another disk.
    run.wait("the new image under the old name", |r| {
        r["type"] == "domain" && disk_on(r, &overlay).as_ref() == Some(&name)
    });
    guest.go_on(SCRIPT).unwrap();
    guest.wait_end(SCRIPT).unwrap();
    run.wait("its writes", |r| {
        is_sample_of(r, &guest.uuid)
            && disk_of(r, &name).is_some_and(|disk| disk["wr_req"]["ebpf"].as_u64() >= Some(10))
    });
    run.stop();
}

/// Ended when dropped.
struct Server(std::process::Child);

impl Drop for Server {
    fn drop(&mut self) {
        // Both fail only if it is gone already.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A disk on a server of network block devices has libvirt's figures only, which says why; the one beside it has both, and
/// a medium that is changed is another image.
#[test]
fn a_disk_on_a_server_is_left_to_libvirt_and_media_are_followed() {
    let lab = Lab::start(&LabDirs::from_env().unwrap()).unwrap();
    let at = |name: &str| lab.scratch().join(name).to_string_lossy().into_owned();
    let [socket, image, first, second] = ["nbd.socket", "nbd.raw", "first.iso", "second.iso"].map(at);
    for file in [&image, &first, &second] {
        std::fs::write(file, vec![0x5a; usize::try_from(SIZE).unwrap()]).unwrap();
    }
    let mut server = lab.command("qemu-nbd");
    server.args(["--persistent", "--shared=8", "--format=raw", "--socket", &socket, &image]);
    let _server = Server(server.spawn().unwrap());
    let devices = format!(
        "<disk type='network' device='disk'><driver name='qemu' type='raw' cache='none'/>\
         <source protocol='nbd'><host transport='unix' socket='{socket}'/></source>\
         <target dev='vdb' bus='virtio'/></disk>\
         <disk type='file' device='cdrom'><driver name='qemu' type='raw'/><source file='{first}'/>\
         <target dev='sda' bus='sata'/><readonly/></disk>"
    );
    let spec = GuestSpec {
        disks: vec![DiskSpec::raw("vda", SIZE)],
        extra_devices_xml: devices,
        start: StartState::Paused,
        ..GuestSpec::new("media", "write=vdb:40x4096 flush=vdb:1 write=vda:7x4096 end=idle")
    };
    let begun = std::time::Instant::now();
    while !Path::new(&socket).exists() {
        assert!(begun.elapsed() < SCRIPT, "qemu-nbd does not listen");
        std::thread::sleep(Duration::from_millis(20));
    }
    let guest = lab.boot(&spec).unwrap();
    let mut args = vec!["run", "--interval", "200ms", "--libvirt-interval", "200ms"];
    args.extend(["--libvirt-slow-interval", "200ms", "--probes", "block", "--domain", "media"]);
    let mut run = Run::start(lab.command(program()), &args);
    let domain = run.wait("its disks", |r| r["type"] == "domain" && disk_on(r, &first).is_some());
    let disks = domain["domain"]["disks"].as_array().unwrap();
    let remote = disks.iter().find(|disk| disk["target"] == "vdb").unwrap();
    println!("{remote}");
    assert_eq!(remote["observable"], false);
    assert!(remote["observable_reason"].as_str().unwrap().contains("network disk"), "{remote}");
    let writes = |r: &Value, target: &str, source: &str| {
        disk_of(r, target).and_then(|disk| disk["wr_req"][source].as_u64())
    };
    run.wait("its disks", |r| is_sample_of(r, &guest.uuid) && writes(r, "vda", "ebpf") == Some(0));
    guest.resume().unwrap();
    guest.wait_end(SCRIPT).unwrap();
    let sample = run.wait("its writes", |r| {
        is_sample_of(r, &guest.uuid)
            && writes(r, "vdb", "libvirt") == Some(40)
            && writes(r, "vda", "ebpf") == Some(7)
            && writes(r, "vda", "libvirt") == Some(7)
    });
    println!("{}", disk_of(&sample, "vdb").unwrap());
    assert_eq!(writes(&sample, "vdb", "ebpf"), None);
    lab.virsh(&["change-media", "media", "sda", "--eject", "--live", "--force"]).unwrap();
    run.wait("an empty drive", |r| {
        let of = |disk: &&Value| disk["target"] == "sda" && disk["observable"] == false;
        r["type"] == "domain" && r["domain"]["disks"].as_array().unwrap().iter().any(|disk| of(&disk))
    });
    lab.virsh(&["change-media", "media", "sda", &second, "--insert", "--live", "--force"]).unwrap();
    let changed = run.wait("the other medium", |r| r["type"] == "domain" && disk_on(r, &second).is_some());
    assert_eq!(disk_on(&changed, &second).as_deref(), Some("sda"));
    run.wait("its figures", |r| {
        is_sample_of(r, &guest.uuid)
            && disk_of(r, "sda").is_some_and(|disk| disk["rd_req"]["ebpf"].is_u64())
            && writes(r, "vda", "ebpf") == Some(7)
    });
    run.stop();
}

// ---- disks that fail, and one that is slow

/// A guest that asks for one more disk, which is plugged in before.
fn with_disk(script: &str, prepare: impl Fn(&Lab) -> [String; 2]) -> (Changing, String) {
    let mut stage = Changing::start(&format!("wait {script}"));
    let [kind, source] = prepare(&stage.lab);
    let disk = ["attach-disk", "changing", &source, "vdb", "--live", "--subdriver", "raw", "--cache", "none"];
    stage.virsh(&[&disk[..], &["--sourcetype", &kind]].concat());
    let target = stage.wait_source(&source);
    stage.wait_writes(&target, |writes| writes == 0);
    stage.guest.go_on(SCRIPT).unwrap();
    (stage, target)
}

impl Changing {
    /// Reads on until a disk has what is wanted.
    fn wait_disk(&mut self, target: &str, wanted: impl Fn(&Value) -> bool) -> Value {
        let uuid = self.guest.uuid.clone();
        let sample = self.run.wait("figures of the disk", |r| {
            is_sample_of(r, &uuid) && disk_of(r, target).is_some_and(&wanted)
        });
        disk_of(&sample, target).unwrap().clone()
    }
}

/// A sparse image that has outgrown its file system: QEMU stops the guest, and the host says why.
#[test]
fn a_full_file_system_under_a_sparse_image_is_told_by_its_error_number() {
    let (mut stage, target) = with_disk("write=vdb:250x65536", |lab| {
        let at = |name: &str| lab.scratch().join(name).to_string_lossy().into_owned();
        let (image, directory) = (at("small.ext4"), at("small"));
        let script = format!(
            "truncate -s 8M {image} && mkfs.ext4 -q -F {image} && mkdir {directory} && mount -o loop {image} {directory} \
             && truncate -s 64M {directory}/sparse.raw"
        );
        assert!(lab.command("sh").args(["-c", &script]).status().unwrap().success());
        ["file".to_owned(), format!("{directory}/sparse.raw")]
    });
    // Before Linux 6.5, direct I/O on a file is seen where it reaches the device, which nobody asks then.
    if kernel_name().starts_with("6.1.") {
        stage.run.wait_event("io_error", "enospc");
    } else {
        let disk = stage.wait_disk(&target, |disk| disk["errors"]["ENOSPC"].as_u64() >= Some(1));
        println!("{disk}");
        assert_eq!(disk["errs"]["ebpf"], disk["errors"]["ENOSPC"]);
    }
    stage.guest.destroy().unwrap();
    stage.run.stop();
    let directory = stage.lab.scratch().join("small");
    assert!(stage.lab.command("umount").arg(&directory).status().unwrap().success());
}

/// A device-mapper device over a loop device, by a table in which `LOOP` stands for it; goes with its last user.
fn mapped(lab: &Lab, name: &str, module: &str, table: &str) -> [String; 2] {
    let image = lab.scratch().join(name);
    std::fs::write(&image, vec![0x5a; usize::try_from(SIZE).unwrap()]).unwrap();
    let script = "set -e; modprobe -q loop || :; modprobe -q \"$3\" || :; export DM_DISABLE_UDEV=1
        device=$(losetup --find --show \"$1\"); echo \"$4\" | sed \"s,LOOP,$device,\" | dmsetup create \"$2\"";
    let mut shell = std::process::Command::new("sh");
    shell.args(["-c", script, "sh"]).arg(&image).args([name, module, table]);
    assert!(shell.status().unwrap().success(), "no device-mapper device");
    ["block".to_owned(), format!("/dev/mapper/{name}")]
}

#[test]
fn an_error_of_the_device_is_told_by_its_number() {
    if !has_device_mapper() {
        println!("this kernel has no device-mapper: tried in hosts under test");
        return;
    }
    // The second MiB cannot be written.
    let table = "0 2048 linear LOOP 0\n2048 2048 error\n4096 4096 linear LOOP 4096";
    let (mut stage, target) = with_disk("write=vdb:300x4096", |lab| mapped(lab, "bad", "dm-mod", table));
    let disk = stage.wait_disk(&target, |disk| disk["errors"]["EIO"].as_u64() >= Some(1));
    println!("{disk}");
    assert_eq!(disk["wr_req"]["ebpf"], 256);
    assert_eq!(disk["errs"]["ebpf"], disk["errors"]["EIO"]);
    stage.run.stop();
}

#[test]
fn a_device_with_a_known_delay_is_never_quicker() {
    const DELAY_NS: u64 = 50_000_000;
    if !has_device_mapper() {
        println!("this kernel has no device-mapper: tried in hosts under test");
        return;
    }
    let (mut stage, target) =
        with_disk("read=vdb:20x4096", |lab| mapped(lab, "slow", "dm-delay", "0 8192 delay LOOP 0 50"));
    let disk = stage.wait_disk(&target, |disk| {
        disk["rd_latency_ns"].is_object() && disk["rd_req"]["ebpf"].as_u64() >= Some(20)
    });
    println!("{disk}");
    let (time, reads) =
        (disk["rd_time_ns"]["ebpf"].as_u64().unwrap(), disk["rd_req"]["ebpf"].as_u64().unwrap());
    assert!(time >= reads * DELAY_NS, "{reads} reads took {time} ns");
    // Percentiles are upper ends of buckets.
    assert!(disk["rd_latency_ns"]["p50"].as_u64() >= Some(DELAY_NS), "{disk}");
    stage.run.stop();
}
