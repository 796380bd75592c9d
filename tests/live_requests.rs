//! Requests that fio, or this test, makes in place of QEMU: latencies against fio's own, the device's share against the
//! kernel's own count of the device, more requests in flight than there is room for, and ends that nobody sees.

#![expect(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "a test may panic, and prints what it measured"
)]

use std::{
    fs::{File, OpenOptions},
    io::Write as _,
    os::unix::fs::{FileExt as _, MetadataExt as _, OpenOptionsExt as _},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};

use monitor::{
    source::{
        ebpf::{
            Aio, Ebpf, Histogram, Hook, Image, ImageKind, ImageSlot, Opened, Plan, READ, WRITE, bucket_range,
            probes::{ProbeGroup, ProbeState},
        },
        procfs::images::ImageId,
    },
    units::Tgid,
};
use rustix::{
    io::ReadWriteFlags,
    mm::{MapFlags, ProtFlags, mmap, munmap},
};
use stage::{Fio, Stage, run, text, total_ios};

#[path = "support/stage.rs"]
mod stage;

const EXT4: u64 = 0xef53;
const PATIENCE: Duration = Duration::from_secs(120);
const PAGE: usize = 4096;

fn open() -> Ebpf {
    let ebpf = Ebpf::open(&[ProbeGroup::Block]).unwrap();
    for (probe, state) in ebpf.states() {
        if let ProbeState::Failed(reason) = state {
            println!("{}: {reason}", probe.program);
        }
    }
    ebpf
}

fn watch(ebpf: &mut Ebpf, tgid: Tgid, path: &Path, (direct, aio): (bool, Aio)) -> ImageSlot {
    let id = ImageId::of_path(path).unwrap();
    let kind = if let ImageId::Device(_) = id { ImageKind::Device } else { ImageKind::File(EXT4) };
    let plan = Plan::of(Opened { kind, direct, aio, writable: true }, |hook| ebpf.can(hook));
    ebpf.watch_image(id.key(tgid), plan).unwrap()
}

fn image(ebpf: &Ebpf, slot: &ImageSlot) -> Image {
    ebpf.image(slot).unwrap().image
}

// ---- latencies

/// Lets the requests of its processes on one device be carried out at a known rate; removed when dropped.
struct Throttle(PathBuf);

impl Throttle {
    /// Operations per second, each way; with control groups of the first or second version.
    fn new(device: &str, per_second: u32) -> Self {
        let number = std::fs::metadata(device).unwrap().rdev();
        let number = format!("{}:{}", rustix::fs::major(number), rustix::fs::minor(number));
        let name = format!("kvm-monitor-requests-{}", std::process::id());
        let (first, second) = (Path::new("/sys/fs/cgroup/blkio"), Path::new("/sys/fs/cgroup"));
        if first.exists() {
            let this = Self(first.join(name));
            std::fs::create_dir(&this.0).unwrap();
            for file in ["blkio.throttle.read_iops_device", "blkio.throttle.write_iops_device"] {
                this.set(file, &format!("{number} {per_second}"));
            }
            return this;
        }
        std::fs::write(second.join("cgroup.subtree_control"), "+io").unwrap();
        let this = Self(second.join(name));
        std::fs::create_dir(&this.0).unwrap();
        this.set("io.max", &format!("{number} riops={per_second} wiops={per_second}"));
        this
    }

    fn set(&self, file: &str, value: &str) {
        std::fs::write(self.0.join(file), value).unwrap();
    }

    fn take(&self, process: Tgid) {
        self.set("cgroup.procs", &process.to_string());
    }
}

impl Drop for Throttle {
    fn drop(&mut self) {
        // Its processes are over, and leave it a moment later.
        let deadline = Instant::now() + Duration::from_secs(5);
        while std::fs::remove_dir(&self.0).is_err() && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

/// The bucket in which so many per cent of all lie, nanoseconds.
fn percentile(histogram: &Histogram, per_cent: u64) -> (u64, u64) {
    let total: u64 = histogram.iter().map(|n| u64::from(*n)).sum();
    let mut seen = 0;
    for (at, count) in (0..).zip(histogram) {
        seen += u64::from(*count);
        if seen * 100 >= total * per_cent && seen > 0 {
            return bucket_range(at);
        }
    }
    panic!("no latencies");
}

/// fio looks at the clock before it makes a request and after it learned that it is over; the programs do so in between.
/// What lies before and after is little against what the throttled device takes.
#[test]
fn percentiles_of_latencies_are_what_fio_found_itself() {
    /// The kernel lets requests pass in bursts ten times a second: one at a time, so that none is quick.
    const PER_SECOND: u32 = 10;
    const REQUESTS: u64 = 80;
    /// Beside the width of our buckets (1/16) and of fio's (1/64).
    const BUCKETS: f64 = 1.0 + 1.0 / 16.0 + 1.0 / 32.0;
    let stage = Stage::new("requests");
    for (depth, engine, aio) in [(1, "psync", Aio::Threads), (8, "libaio", Aio::Native)] {
        let throttle = Throttle::new(&stage.below, PER_SECOND);
        let options = format!(
            "--direct=1 --rw=randrw --bs=4k --size=64m --ioengine={engine} --iodepth={depth} --number_ios={REQUESTS} \
             --clat_percentiles=0 --lat_percentiles=1 --percentile_list=50:95:99"
        );
        let fio = Fio::prepare(&options, &stage.file);
        let mut ebpf = open();
        let slot = watch(&mut ebpf, fio.tgid(), &stage.file, (true, aio));
        throttle.take(fio.tgid());
        let job = fio.go();
        let (counted, latencies) = (image(&ebpf, &slot), ebpf.latencies(&slot).unwrap().image);
        for (of, operation) in [("read", READ), ("write", WRITE)] {
            let done = counted.operations[operation as usize].done;
            assert_eq!(Some(done), job[of]["total_ios"].as_u64(), "{of}: {counted:?}");
            for (per_cent, least) in [(50, 0.8), (95, 0.7), (99, 0.5)] {
                let told = &job[of]["lat_ns"]["percentile"][format!("{per_cent}.000000")];
                let fio = told.as_f64().unwrap();
                let (low, high) = percentile(&latencies.operations[operation as usize], per_cent);
                println!("depth {depth}, {of}, p{per_cent}: fio {fio:.0} ns, here {low} to {high} ns");
                #[expect(clippy::cast_precision_loss, reason = "nanoseconds")]
                let (low, high) = (low as f64, high as f64);
                assert!(low <= fio * BUCKETS, "longer than fio waited: {low} ns, fio {fio} ns");
                // Before Linux 6.5 what is held back is not seen until it is let go.
                assert!(
                    !ebpf.can(Hook::Iomap) || high * BUCKETS >= fio * least,
                    "much shorter than fio waited: {high} ns, fio {fio} ns"
                );
            }
        }
    }
}

/// What a quota of the control group holds back is let go by the kernel's own threads: it is no less a request of its
/// process.
#[test]
fn requests_that_a_quota_holds_back_are_counted() {
    let stage = Stage::new("requests");
    let throttle = Throttle::new(&stage.device, 20);
    let options = "--direct=1 --rw=randrw --bs=4k --size=64m --ioengine=libaio --iodepth=8 --number_ios=60";
    let on = Path::new(&stage.device);
    let fio = Fio::prepare(options, on);
    let mut ebpf = open();
    let slot = watch(&mut ebpf, fio.tgid(), on, (true, Aio::Native));
    throttle.take(fio.tgid());
    let asked = total_ios(&fio.go());
    let [read, write, _] = image(&ebpf, &slot).operations;
    println!("asked for {asked}, here {} and {}", read.done, write.done);
    assert_eq!(read.done + write.done, asked);
}

// ---- the device's own count

/// Read requests and bytes, write requests and bytes.
type Traffic = [u64; 4];

/// What a block device counted since it exists. One that was merged into another counts here as well.
fn counted_by_device(device: &str) -> Traffic {
    let name = device.strip_prefix("/dev/").unwrap();
    let stat = std::fs::read_to_string(format!("/sys/block/{name}/stat")).unwrap();
    // Documentation/block/stat.rst: requests, merged into those, sectors of 512 bytes, ticks; for reads, then for writes.
    let fields: Vec<u64> = stat.split_whitespace().map(|field| field.parse().unwrap()).collect();
    [fields[0] + fields[1], fields[2] * 512, fields[4] + fields[5], fields[6] * 512]
}

fn counted_here(image: &Image) -> Traffic {
    let [read, write, _] = image.operations;
    [read.done, read.bytes, write.done, write.bytes]
}

/// On a device that nobody else uses, what is charged to the image is what the device did.
#[test]
fn the_share_of_a_quiet_device_is_all_that_it_did() {
    /// Of 3000.
    const MOST_UNSEEN: u64 = 3;
    let stage = Stage::new("requests");
    let fio = |options: &str, on: &Path| {
        Fio::prepare(&format!("{options} --bs=4k --size=32m --number_ios=3000 --iodepth=8"), on)
    };
    // No writes to a file through direct I/O: they change its times, and those are written too, some time later.
    let device = Path::new(&stage.device);
    for (what, options, on, below, direct, aio) in [
        (
            "device, direct",
            "--direct=1 --rw=randrw --ioengine=libaio",
            device,
            &stage.device,
            true,
            Aio::Native,
        ),
        (
            "file, direct",
            "--direct=1 --rw=randread --ioengine=libaio",
            &*stage.file,
            &stage.below,
            true,
            Aio::Native,
        ),
        (
            "file, direct, io_uring",
            "--direct=1 --rw=read --ioengine=io_uring",
            &*stage.file,
            &stage.below,
            true,
            Aio::Uring,
        ),
        (
            "file, page cache",
            "--direct=0 --rw=randread --ioengine=psync",
            &*stage.file,
            &stage.below,
            false,
            Aio::Threads,
        ),
    ] {
        let fio = fio(options, on);
        let mut ebpf = open();
        let slot = watch(&mut ebpf, fio.tgid(), on, (direct, aio));
        slot.below().unwrap();
        let before = counted_by_device(below);
        let asked = total_ios(&fio.go());
        let after = counted_by_device(below);
        let counted = ebpf.image(&slot).unwrap();
        let counted = counted.below.unwrap_or(counted.image);
        let here = counted_here(&counted);
        let device: Traffic = std::array::from_fn(|at| after[at] - before[at]);
        // Where no program runs beside some of the host's threads, the end of a request that interrupts one is not seen. Then it
        // is told as in flight still or, once another begins in its place, as one whose end was not seen.
        let unseen = counted.in_flight() + counted.unseen;
        println!(
            "{what}: asked for {asked}, the device did {device:?}, here {here:?}, {unseen} not seen to end"
        );
        assert!(device[1] > 0, "{what}: nothing was compared");
        assert_eq!(here[0] + here[2] + unseen, device[0] + device[2], "{what}: requests");
        assert_eq!(here[1] + here[3] + unseen * 4096, device[1] + device[3], "{what}: bytes");
        assert!(unseen <= MOST_UNSEEN, "{what}: {unseen} not seen to end");
    }
}

/// What is written to the page cache reaches the device later, with what the file system writes about it.
#[test]
fn what_is_written_back_is_charged_to_who_wrote_it() {
    const MOST_BEYOND: u64 = 64;
    let stage = Stage::new("requests");
    let options =
        "--direct=0 --rw=randwrite --ioengine=psync --bs=4k --size=32m --number_ios=3000 --end_fsync=1";
    let fio = Fio::prepare(options, &stage.file);
    let mut ebpf = open();
    let slot = watch(&mut ebpf, fio.tgid(), &stage.file, (false, Aio::Threads));
    let before = counted_by_device(&stage.below);
    fio.go();
    run("sync", &["-f", text(&stage.file)]);
    let after = counted_by_device(&stage.below);
    let here = counted_here(&ebpf.image(&slot).unwrap().below.unwrap());
    let device: Traffic = std::array::from_fn(|at| after[at] - before[at]);
    println!("the device did {device:?}, here {here:?}");
    assert!(here[2] > 0 && here[2] <= device[2] && here[2] + MOST_BEYOND >= device[2]);
    assert!(here[3] <= device[3] && here[3] + MOST_BEYOND * 4096 >= device[3]);
}

// ---- more in flight than there is room for

/// Nobody writes to a file system, until this is dropped.
struct Frozen(PathBuf);

impl Frozen {
    fn new(mounted: PathBuf) -> Self {
        run("fsfreeze", &["--freeze", text(&mounted)]);
        Self(mounted)
    }
}

impl Drop for Frozen {
    fn drop(&mut self) {
        run("fsfreeze", &["--unfreeze", text(&self.0)]);
    }
}

/// Writes to a file system that is frozen wait; all of them are counted, those without a place too.
#[test]
fn a_hundred_thousand_requests_in_flight_are_counted() {
    const JOBS: u64 = 4;
    const EACH: u64 = 25_000;
    /// Places that a crowd is certain to find.
    const TIMED: u64 = 8_000;
    let stage = Stage::new("requests");
    let options = format!(
        "--ioengine=io_uring --iodepth={EACH} --numjobs={JOBS} --number_ios={EACH} --direct=0 --rw=randwrite --bs=512 \
         --size=48m --norandommap --allow_file_create=0"
    );
    let mut fio = Fio::prepare(&options, &stage.file);
    // Let go before it is waited for, however this ends.
    let frozen = Frozen::new(stage.mounted());
    let mut ebpf = open();
    let slot = watch(&mut ebpf, fio.tgid(), &stage.file, (false, Aio::Uring));
    assert_eq!(slot.plan().data, Some(Hook::Uring));
    fio.begin();
    wait_begun(&ebpf, &slot, JOBS * EACH);
    let full = image(&ebpf, &slot);
    println!("{} in flight, {} more without a place", full.in_flight(), full.untimed);
    assert_eq!(full.in_flight() + full.untimed, JOBS * EACH);
    assert!(full.in_flight() >= TIMED && full.untimed > 0, "{full:?}");
    drop(frozen);
    assert_eq!(total_ios(&fio.end()), JOBS * EACH);
    let over = image(&ebpf, &slot);
    assert_eq!(over.operations[WRITE as usize].done, JOBS * EACH, "{over:?}");
    assert_eq!((over.in_flight(), over.unseen, over.untimed), (0, 0, full.untimed));
    let timed: u64 = ebpf.latencies(&slot).unwrap().image.operations[WRITE as usize]
        .iter()
        .map(|count| u64::from(*count))
        .sum();
    assert_eq!(timed + over.untimed, JOBS * EACH);
}

fn wait_begun(ebpf: &Ebpf, slot: &ImageSlot, writes: u64) {
    let deadline = Instant::now() + PATIENCE;
    while image(ebpf, slot).begun[WRITE as usize] < writes {
        assert!(Instant::now() < deadline, "{:?}", image(ebpf, slot));
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Requests end after their disk is gone, while another image has its place in the tables.
#[test]
fn what_ends_after_its_disk_is_unplugged_is_nobodys() {
    const REQUESTS: u64 = 200;
    let stage = Stage::new("requests");
    let options = format!(
        "--ioengine=io_uring --iodepth={REQUESTS} --number_ios={REQUESTS} --direct=0 --rw=randwrite --bs=4k \
         --size=48m --allow_file_create=0"
    );
    let mut fio = Fio::prepare(&options, &stage.file);
    // Let go before it is waited for, however this ends.
    let frozen = Frozen::new(stage.mounted());
    let mut ebpf = open();
    let (unplugged, other) = (fio.tgid(), own_tgid());
    let slot = watch(&mut ebpf, unplugged, &stage.file, (false, Aio::Uring));
    fio.begin();
    wait_begun(&ebpf, &slot, REQUESTS);
    let (counted, _) = ebpf.unwatch_image(slot).unwrap();
    assert_eq!((counted.image.in_flight(), counted.image.operations[WRITE as usize].done), (0, 0));
    let slot = watch(&mut ebpf, other, &stage.file, (false, Aio::Uring));
    drop(frozen);
    assert_eq!(total_ios(&fio.end()), REQUESTS);
    let image = image(&ebpf, &slot);
    assert_eq!((image.begun, image.operations[WRITE as usize].done), ([0; 3], 0), "{image:?}");
}

// ---- reads that are no guest's

/// dd reads as QEMU does to learn what an image is: its first thread waits for each.
#[test]
fn what_the_first_thread_waits_for_is_counted_apart() {
    const READS: u64 = 13;
    let stage = Stage::new("requests");
    let mut ebpf = open();
    if !ebpf.can(Hook::Iomap) {
        println!("reads are not told apart here: Linux before 6.5");
        return;
    }
    let script = format!(
        "read go; exec dd if={} of=/dev/null bs=4096 count={READS} iflag=direct status=none",
        stage.file.display()
    );
    let mut dd = Command::new("sh").args(["-c", &script]).stdin(Stdio::piped()).spawn().unwrap();
    let slot = watch(&mut ebpf, Tgid(dd.id()), &stage.file, (true, Aio::Threads));
    dd.stdin.take().unwrap().write_all(b"\n").unwrap();
    assert!(dd.wait().unwrap().success());
    let image = image(&ebpf, &slot);
    assert_eq!((image.open_requests, image.open_bytes), (READS, READS * 4096), "{image:?}");
    assert_eq!((image.begun, image.operations[READ as usize].done), ([0; 3], 0), "{image:?}");
}

// ---- ends that nobody sees

/// A page of memory where direct I/O wants it.
#[repr(align(4096))]
struct Page([u8; PAGE]);

/// A file for direct I/O by this process, which is watched, and the same file for the page cache.
struct Own {
    direct: File,
    cached: File,
    ebpf: Ebpf,
    slot: ImageSlot,
    /// The last to go.
    _stage: Stage,
}

impl Own {
    /// `None`, and a word about it, where the kernel does not show direct I/O as the file system takes it.
    fn watched(aio: Aio) -> Option<Self> {
        let stage = Stage::new("requests");
        let open =
            |flags| OpenOptions::new().read(true).write(true).custom_flags(flags).open(&stage.file).unwrap();
        let (direct, cached) = (open(libc::O_DIRECT), open(0));
        let mut ebpf = self::open();
        if !ebpf.can(Hook::Iomap) {
            println!("requests are not seen here where this happens: Linux before 6.5");
            return None;
        }
        let slot = watch(&mut ebpf, own_tgid(), &stage.file, (true, aio));
        Some(Self { direct, cached, ebpf, slot, _stage: stage })
    }

    fn image(&self) -> Image {
        image(&self.ebpf, &self.slot)
    }
}

/// The kernel may have another place for the request each time; as often as that, it has the same as before at last.
const TRIES: u64 = 100_000;

fn own_tgid() -> Tgid {
    Tgid(std::process::id())
}

/// A page of a file in memory, changed all the time by another thread until this is dropped.
struct Changing {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Changing {
    fn first_page(file: &File) -> Self {
        // SAFETY: a new mapping at an address the kernel chooses touches no memory in use.
        let page = unsafe {
            mmap(std::ptr::null_mut(), PAGE, ProtFlags::READ | ProtFlags::WRITE, MapFlags::SHARED, file, 0)
        };
        let page = page.unwrap().expose_provenance();
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let thread = std::thread::spawn(move || {
            let page = std::ptr::with_exposed_provenance_mut::<u8>(page);
            while !stopped.load(Ordering::Relaxed) {
                // SAFETY: mapped until the end of this thread, which alone has the address.
                unsafe { page.write_volatile(page.read_volatile().wrapping_add(1)) };
            }
            // SAFETY: likewise.
            unsafe { munmap(page.cast(), PAGE) }.unwrap();
        });
        Self { stop, thread: Some(thread) }
    }
}

impl Drop for Changing {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.take().unwrap().join().unwrap();
    }
}

/// A page of the page cache that cannot be dropped, because it changes again before that: direct I/O over it is given up
/// after it began, and made through the page cache. The next request in the same place shows that it is over.
#[test]
fn a_request_whose_end_is_not_seen_is_counted_once_and_not_in_flight_for_ever() {
    let Some(own) = Own::watched(Aio::Threads) else { return };
    let page = Page([7; PAGE]);
    let mut writes = 0;
    let mut write = |limit: &dyn Fn(&Image) -> bool| {
        while !limit(&own.image()) {
            assert!(writes < TRIES, "{:?}", own.image());
            own.direct.write_all_at(&page.0, 0).unwrap();
            writes += 1;
        }
        writes
    };
    let changing = Changing::first_page(&own.cached);
    write(&|image| image.in_flight() + image.unseen > 0);
    drop(changing);
    let writes = write(&|image| image.in_flight() == 0);
    let over = own.image();
    let done = over.operations[WRITE as usize].done;
    println!("{writes} requests, {done} seen to end, {} not", over.unseen);
    assert!(over.unseen > 0);
    assert_eq!(done + over.unseen, writes, "{over:?}");
    assert_eq!(over.begun[WRITE as usize], done, "{over:?}");
}

/// A request that may not wait, and would have to, is made again by whoever may: one request.
#[test]
fn a_request_that_is_made_again_counts_once() {
    let Some(own) = Own::watched(Aio::Uring) else { return };
    // Not by the main thread: whose reads are those of QEMU opening an image.
    std::thread::spawn(move || make_again(&own)).join().unwrap();
}

fn make_again(own: &Own) {
    let mut page = Page([0; PAGE]);
    let mut read = |flags| {
        let mut into = [std::io::IoSliceMut::new(&mut page.0)];
        rustix::io::preadv2(&own.direct, &mut into, 0, flags)
    };
    // What is not written back yet would have to be, before it is read past the page cache.
    own.cached.write_all_at(&[9; PAGE], 0).unwrap();
    assert_eq!(read(ReadWriteFlags::NOWAIT), Err(rustix::io::Errno::AGAIN));
    assert_eq!(own.image().in_flight(), 1);
    let mut reads = 0;
    while own.image().in_flight() > 0 {
        assert!(reads < TRIES, "{:?}", own.image());
        assert_eq!(read(ReadWriteFlags::empty()), Ok(PAGE));
        reads += 1;
    }
    let over = own.image();
    println!("made again by the last of {reads}: {over:?}");
    assert_eq!(
        (over.unseen, over.operations[READ as usize].done, over.begun[READ as usize]),
        (0, reads, reads)
    );
}
