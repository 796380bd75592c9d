//! Requests of a real guest on its disks as the kernel programs count them, against what the guest did.

#![expect(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "a test may panic, and prints what it measured"
)]

use std::{io::BufRead as _, path::Path, time::Duration};

use lab::{DiskSpec, GroundTruth, Guest, GuestSpec, Lab, LabDirs, StartState, Which};
use monitor::{
    inventory::QemuProcess,
    source::{
        ebpf::{
            Aio, Ebpf, FLUSH, Image, ImageKind, ImageSlot, Opened, Plan, READ, WRITE, probes::ProbeGroup,
        },
        procfs::images::{OpenImage, file_system, open_images},
    },
    units::Tgid,
};

const PATIENCE: Duration = Duration::from_secs(300);
const MIB: u64 = 1 << 20;
/// Samples of 200 ms that a figure may take to reach the stream.
const MOST_SAMPLES: usize = 150;

fn process(guest: &Guest) -> QemuProcess {
    QemuProcess { tgid: Tgid(guest.pid), start_time_ticks: 0 }
}

/// The image of a disk, by the name the lab gives it.
fn open_image(guest: &Guest, target: &str) -> OpenImage {
    let images = open_images(Path::new("/proc"), process(guest)).unwrap();
    let name = format!("{}-{target}.", guest.name);
    images.into_iter().find(|image| image.path.to_string_lossy().contains(&name)).unwrap()
}

fn watch(ebpf: &mut Ebpf, guest: &Guest, target: &str, io: &str) -> ImageSlot {
    let image = open_image(guest, target);
    let kind = ImageKind::File(file_system(Path::new("/proc"), process(guest), image.fds[0]).unwrap());
    let aio = Aio::of_name(Some(io));
    let opened = Opened { kind, direct: image.direct, aio, writable: image.writable };
    let plan = Plan::of(opened, |hook| ebpf.can(hook));
    ebpf.watch_image(image.id.key(Tgid(guest.pid)), plan).unwrap()
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Counts {
    reads: u64,
    read_bytes: u64,
    writes: u64,
    written_bytes: u64,
}

fn counted(image: &Image) -> Counts {
    let [read, write, _] = image.operations;
    Counts { reads: read.done, read_bytes: read.bytes, writes: write.done, written_bytes: write.bytes }
}

/// What the guest's kernel asked of the disk since it started. The firmware's requests come before.
fn asked(truth: &GroundTruth, target: &str) -> Counts {
    let counter = |name: &str| truth.total(&format!("disk.{target}.{name}")).unwrap().unsigned_abs();
    Counts {
        reads: counter("rd_ios"),
        read_bytes: counter("rd_sectors") * 512,
        // The guest's kernel counts flushes as writes too.
        writes: counter("wr_ios") - counter("fl_ios"),
        written_bytes: counter("wr_sectors") * 512,
    }
}

/// An interrupt that ends a read may come while a thread runs in whose context the host runs no programs (README, limits):
/// then its end is not seen. That is no matter of what is tested here, unless it happens again.
#[test]
fn direct_io_on_raw_files_is_exactly_what_the_guest_asked_for() {
    let unseen = check_direct_io_on_raw_files();
    if unseen > 0 {
        println!("the ends of {unseen} reads were not seen; once more");
        assert_eq!(check_direct_io_on_raw_files(), 0, "ends that were not seen");
    }
}

/// Returns how many reads were seen to begin, but not to end.
fn check_direct_io_on_raw_files() -> u64 {
    let lab = Lab::start(&LabDirs::from_env().unwrap()).unwrap();
    let mut ebpf = Ebpf::open(ProbeGroup::ALL).unwrap();
    let disk = |target: &str, io, iothread| DiskSpec { io, iothread, ..DiskSpec::raw(target, 8 * MIB) };
    let specs = [
        (
            "one",
            "read=vda:50x65536 write=vda:100x4096 flush=vda:3 read=vdb:7x4096 write=vdc:11x8192 flush=vdc:1 write=vdc:1x512",
            vec![disk("vda", "threads", None), disk("vdb", "native", None), disk("vdc", "io_uring", Some(1))],
        ),
        (
            "two",
            "read=vda:20x4096 write=vda:30x65536 write=vdb:9x4096 flush=vdb:1",
            vec![disk("vda", "io_uring", None), disk("vdb", "native", Some(1))],
        ),
    ];
    let guests: Vec<_> = specs
        .iter()
        .map(|(name, script, disks)| {
            let spec =
                GuestSpec { disks: disks.clone(), start: StartState::Paused, ..GuestSpec::new(name, script) };
            lab.boot(&spec).unwrap()
        })
        .collect();
    let mut watched = Vec::new();
    for (guest, (_, _, disks)) in guests.iter().zip(&specs) {
        for disk in disks {
            watched.push((guest, disk.clone(), watch(&mut ebpf, guest, &disk.target, disk.io)));
        }
    }
    guests.iter().for_each(|guest| guest.resume().unwrap());
    let truths: Vec<_> = guests.iter().map(|guest| guest.wait_end(PATIENCE).unwrap()).collect();
    let mut all_unseen = 0;
    for (guest, disk, slot) in watched {
        let at = guests.iter().position(|g| g.name == guest.name).unwrap();
        let (asked, image) = (asked(&truths[at], &disk.target), ebpf.image(&slot).unwrap().image);
        let counted = counted(&image);
        let [read, write, flush] = [READ, WRITE, FLUSH].map(|o| image.operations[o as usize]);
        println!(
            "{} {} {:<8} guest {asked:?} host {counted:?} flushes {} opening {}",
            guest.name, disk.target, disk.io, flush.done, image.open_requests
        );
        let begun = image.begun[READ as usize] + image.unseen;
        assert!((asked.reads..=asked.reads + 2).contains(&begun), "{begun} reads begun: {image:?}");
        assert_eq!((counted.writes, counted.written_bytes), (asked.writes, asked.written_bytes));
        if begun > counted.reads {
            all_unseen += begun - counted.reads;
            continue;
        }
        let firmware = counted.read_bytes - asked.read_bytes;
        assert!(firmware <= 2 * 4096, "bytes that nobody asked for: {firmware}");
        for o in [read, write, flush] {
            assert_eq!(o.failed, 0, "{o:?}");
            assert!(o.done == 0 || o.time_ns > 1000 * o.done, "{o:?}");
        }
        assert_eq!(image.begun, [read.done, write.done, flush.done]);
        assert_eq!((image.untimed, image.unseen, image.other_errors), (0, 0, 0));
        let histograms = ebpf.latencies(&slot).unwrap().image;
        for (operation, histogram) in [read, write, flush].iter().zip(histograms.operations) {
            assert_eq!(histogram.iter().map(|n| u64::from(*n)).sum::<u64>(), operation.done);
        }
    }
    all_unseen
}

/// The program itself, with libvirt and without: what the stream says of a disk at the end.
#[test]
fn the_stream_has_the_hosts_view_beside_the_guests() {
    let lab = Lab::start(&LabDirs::from_env().unwrap()).unwrap();
    let disks = vec![DiskSpec { io: "threads", ..DiskSpec::raw("vda", 8 * MIB) }];
    let script = "wait read=vda:40x65536 write=vda:60x4096 flush=vda:1 discard=vda:0+1048576";
    let guest = lab.boot(&GuestSpec { disks, ..GuestSpec::new("stream", script) }).unwrap();
    guest.wait_begin(Which::Kind("wait"), PATIENCE).unwrap();
    let monitor = std::env::var_os("KVM_MONITOR_BIN").expect("KVM_MONITOR_BIN");
    let mut run = lab
        .command(monitor)
        .args(["run", "--interval", "200ms", "--domain", "stream", "--probes", "block"])
        .stdout(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = std::io::BufReader::new(run.stdout.take().unwrap()).lines();
    let mut next = |wanted: &dyn Fn(&serde_json::Value) -> bool| {
        let samples =
            lines.by_ref().map(|line| serde_json::from_str::<serde_json::Value>(&line.unwrap()).unwrap());
        let mut samples = samples.filter(|line| line["type"] == "sample").take(MOST_SAMPLES);
        samples.find(|line| wanted(line)).expect("the sample did not come")
    };
    next(&|sample| sample["disks"][0]["rd_req"]["ebpf"] == 0);
    guest.go_on(PATIENCE).unwrap();
    guest.wait_end(PATIENCE).unwrap();
    let sample = next(&|sample| sample["disks"][0]["discard_req"]["ebpf"] == 1);
    rustix::process::kill_process(rustix::process::Pid::from_child(&run), rustix::process::Signal::INT)
        .unwrap();
    let disk = &sample["disks"][0];
    println!("{disk:#}");
    for (metric, expected) in [
        ("rd_req", 40),
        ("rd_bytes", 40 * 65536),
        ("wr_req", 60),
        ("wr_bytes", 60 * 4096),
        ("fl_req", 1),
        ("errs", 0),
        ("inflight", 0),
        ("discard_bytes", 1 << 20),
        ("qemu_open_req", 0),
    ] {
        assert_eq!(disk[metric]["ebpf"], expected, "{metric}");
    }
    assert!(run.wait().unwrap().success());
}
