//! Requests of watched processes on watched images: counts, bytes, latencies, errors.
//!
//! A request is recognised when it begins, in the context of the process that makes it, by process and inode (or
//! block device); nothing is keyed by file descriptor or thread. From there to its completion, which may come in any
//! context, it is remembered by the address of the kernel's own request structure. Where it is seen depends on how
//! the image is opened; user space chooses one way for each image ([`Image::counted_by`]), so that none counts twice.
//!
//! Requests of other processes pay one bit test where they begin, and one look at a cache line where they end.

#![expect(
    clippy::cast_possible_truncation,
    reason = "kernel values have fewer bits than the registers they come in; slots are below 2^16"
)]

use core::{
    ffi::c_void,
    intrinsics::{AtomicOrdering::Relaxed, atomic_xadd},
    mem::MaybeUninit,
};

use aya_ebpf::{
    bindings::BPF_F_MMAPABLE,
    helpers::{
        bpf_get_current_pid_tgid, bpf_get_current_task_btf, bpf_ktime_get_ns, bpf_loop,
        generated::bpf_probe_read_kernel,
    },
    macros::{btf_tracepoint, map},
    maps::Array,
    programs::BtfTracePointContext,
};
use monitor_ebpf::{
    ANY_PROCESS, BLOCK_DEVICE, BY_BIO, BY_CALL, BY_IOMAP, BlockFilter, BlockLayout, CALL_FALLOCATE,
    CALL_READ, CALL_WRITE, FLIGHT_PROBES, FLIGHTS, FLUSH, FLUSH_BY_BIO, FLUSH_BY_CALL, FLUSH_BY_EXT4, Flight,
    IMAGE_HISTOGRAMS, IMAGE_TABLE_ENTRIES, IMAGE_TABLE_PROBES, IMAGES, Image, ImageEntry, ImageHistograms,
    ImageKey, ImageTable, MERGED, PROCESS_FILTER_BITS, READ, WANTED_BELOW, WANTED_DEVICES, WRITE, bucket,
    flight_start,
};

use crate::{
    atomic::Word,
    kernel::{Address, load, offset, probe},
};

#[unsafe(no_mangle)]
static BLOCK_LAYOUT: BlockLayout = BlockLayout::ZERO;

#[map(name = "BLOCK_FILTER")]
static BLOCK_FILTER: Array<BlockFilter> = Array::with_max_entries(1, BPF_F_MMAPABLE);
#[map(name = "IMAGE_TABLE")]
static IMAGE_TABLE: Array<ImageTable> = Array::with_max_entries(1, BPF_F_MMAPABLE);
#[map(name = "IMAGES")]
static IMAGE_SLOTS: Array<Image> = Array::with_max_entries(IMAGES, BPF_F_MMAPABLE);
#[map(name = "IMAGE_HIST")]
static IMAGE_HIST: Array<ImageHistograms> = Array::with_max_entries(IMAGE_HISTOGRAMS, BPF_F_MMAPABLE);
#[map(name = "FLIGHTS")]
static FLYING: Array<Flight> = Array::with_max_entries(FLIGHTS, BPF_F_MMAPABLE);

/// `EAGAIN`: the kernel makes the same request again, in a context that may wait.
const EAGAIN: i64 = 11;
/// `IOCB_NOWAIT` of `kiocb.ki_flags`, which is `RWF_NOWAIT` of include/uapi/linux/fs.h.
const NO_WAIT: u32 = 8;
/// Keys are distances between addresses, whose three highest bits are equal, or thread ids. This sets that of an io_uring
/// request apart from that of the `kiocb` inside, which may be at the same address.
const IN_URING: u64 = 1 << 62;
/// Makes a thread id the key of a system call.
const IN_CALL: u64 = 1 << 61;
/// Makes a thread id the key of a flush in ext4, inside a system call or not.
const IN_EXT4: u64 = 1 << 63;

/// A watched image.
#[derive(Clone, Copy)]
struct Found {
    slot: u16,
    image: &'static Image,
}

impl Found {
    #[inline(always)]
    fn is_counted(self, by: u32) -> bool {
        offset(&self.image.counted_by) & by != 0
    }

    #[inline(always)]
    fn at(slot: u16) -> Option<Self> {
        // SAFETY: a valid map value; counters are added to atomically.
        let image = unsafe { IMAGE_SLOTS.get_ptr(u32::from(slot))?.as_ref()? };
        Some(Self { slot, image })
    }
}

/// The place of an operation in an array. Chosen by comparisons: the verifier does not follow how the compiler writes a
/// remainder.
#[inline(always)]
fn of_operation<T>(all: &[T; 3], operation: u32) -> &T {
    match operation {
        READ => &all[0],
        WRITE => &all[1],
        _ => &all[2],
    }
}

/// A request as it begins.
#[derive(Clone, Copy)]
struct Request {
    operation: u32,
    /// 0 if not known.
    bytes: u64,
    /// The kernel may give it up without a trace, and make it again with the same key.
    no_wait: bool,
}

impl Request {
    #[inline(always)]
    const fn new(operation: u32, bytes: u64) -> Self {
        Self { operation, bytes, no_wait: false }
    }
}

/// What is known of a request when it begins, in one register: its bytes, at most 2^32 − 1, the slot of its image, the
/// operation, and whether it may not wait.
#[derive(Clone, Copy)]
struct What(u64);

impl What {
    #[inline(always)]
    fn new(slot: u16, request: Request) -> Self {
        let no_wait = if request.no_wait { 1 << 56 } else { 0 };
        let place = u64::from(slot) << 32 | u64::from(request.operation) << 48;
        Self(u64::from(request.bytes as u32) | place | no_wait)
    }

    #[inline(always)]
    const fn bytes(self) -> u32 {
        self.0 as u32
    }

    #[inline(always)]
    const fn slot(self) -> u16 {
        (self.0 >> 32) as u16
    }

    #[inline(always)]
    const fn operation(self) -> u32 {
        (self.0 >> 48) as u8 as u32
    }

    #[inline(always)]
    const fn no_wait(self) -> bool {
        self.0 >> 56 != 0
    }
}

/// `trace_iomap_dio_rw_begin(struct kiocb *iocb, struct iov_iter *iter, unsigned int dio_flags, size_t done_before)`
/// (Linux 6.5): direct I/O on a file begins, in the context of the task that makes it.
///
/// Remembers the request by its `kiocb`. A read that QEMU's main thread waits for is no request of a guest (those are
/// asynchronous or made by other threads), and counts in `open_requests` and `open_bytes`.
#[btf_tracepoint(function = "iomap_dio_rw_begin")]
pub(crate) fn iomap_dio_rw_begin(ctx: BtfTracePointContext) -> i32 {
    let thread = bpf_get_current_pid_tgid();
    let Some(filter) = filter().filter(|filter| may_be_watched(filter, thread)) else { return 0 };
    let (kiocb, iter): (Address, Address) = (ctx.arg(0), ctx.arg(1));
    let beginning = Beginning::now(filter, key_of(filter, kiocb));
    // SAFETY: arguments of a BTF tracepoint, and what is loaded through them.
    let (inode, written, bytes) = unsafe {
        let file: Address = load(kiocb, offset(&BLOCK_LAYOUT.kiocb_file));
        let inode: Address = load(file, offset(&BLOCK_LAYOUT.file_inode));
        let written: u8 = load(iter, offset(&BLOCK_LAYOUT.iter_data_source));
        (inode, written & 1 != 0, load::<u64>(iter, offset(&BLOCK_LAYOUT.iter_count)))
    };
    // SAFETY: loaded through an argument of a BTF tracepoint.
    let Some(found) = (unsafe { image_of_inode(thread, inode) }) else { return 0 };
    if !found.is_counted(BY_IOMAP) {
        return 0;
    }
    // SAFETY: as above.
    let asynchronous = unsafe { load::<u64>(kiocb, offset(&BLOCK_LAYOUT.kiocb_complete)) } != 0;
    if !written && !asynchronous && thread >> 32 == thread & 0xffff_ffff {
        add(&found.image.open_requests, 1);
        add(&found.image.open_bytes, bytes);
        return 0;
    }
    // SAFETY: as above.
    let no_wait = unsafe { load::<u32>(kiocb, offset(&BLOCK_LAYOUT.kiocb_flags)) } & NO_WAIT != 0;
    let request = Request { operation: if written { WRITE } else { READ }, bytes, no_wait };
    begin(beginning, found, request);
    0
}

/// `trace_iomap_dio_complete(struct kiocb *iocb, int error, ssize_t ret)` (Linux 6.5): direct I/O on a file is over.
/// `ret` is what the caller gets: bytes, or a negative error number.
#[btf_tracepoint(function = "iomap_dio_complete")]
pub(crate) fn iomap_dio_complete(ctx: BtfTracePointContext) -> i32 {
    if let Some(filter) = filter() {
        end(filter, key_of(filter, ctx.arg(0)), ctx.arg::<i64>(2));
    }
    0
}

/// Operations of `enum req_op`, the low 8 bits of `bi_opf`.
const REQ_READ: u32 = 0;
const REQ_WRITE: u32 = 1;
const REQ_FLUSH: u32 = 2;
const REQ_DISCARD: u32 = 3;
const REQ_WRITE_ZEROES: u32 = 9;

/// What a `bio` asks for.
#[derive(Clone, Copy)]
struct Asked {
    bio: Address,
    device: u32,
}

impl Asked {
    #[inline(always)]
    fn of(bio: Address) -> Self {
        // SAFETY: an argument of a BTF tracepoint, and what is loaded through it.
        let device = unsafe {
            let bdev: Address = load(bio, offset(&BLOCK_LAYOUT.bio_bdev));
            load(bdev, offset(&BLOCK_LAYOUT.bdev_dev))
        };
        Self { bio, device }
    }

    /// Operation and flags.
    #[inline(always)]
    fn opf(self) -> u32 {
        // SAFETY: as above.
        unsafe { load(self.bio, offset(&BLOCK_LAYOUT.bio_opf)) }
    }

    #[inline(always)]
    fn bytes(self) -> u64 {
        // SAFETY: as above.
        u64::from(unsafe { load::<u32>(self.bio, offset(&BLOCK_LAYOUT.bio_size)) })
    }

    /// The same as a request, if it moves data.
    #[inline(always)]
    fn data(self) -> Option<Request> {
        let operation = match self.opf() & 0xff {
            REQ_READ => READ,
            REQ_WRITE => WRITE,
            _ => return None,
        };
        Some(Request::new(operation, self.bytes())).filter(|request| request.bytes != 0)
    }
}

/// `trace_block_bio_queue(struct bio *bio)`: I/O enters the block layer, in the context of the task that makes it.
/// Parts that a driver splits off later are not traced again, so that one `bio` is one request, or a part of one
/// above 1 MiB.
///
/// What a quota of the control group holds back is traced when a thread of the kernel lets it go (block/blk-throttle.c:
/// `blk_throtl_dispatch_work_fn()`), so that these are looked at as well: what such a thread asks of a watched device, or of a
/// watched file, is its process's. How long it was held back is not seen here.
///
/// Counts for a disk that is the device itself, and for the device below a disk that is a file.
#[btf_tracepoint(function = "block_bio_queue")]
pub(crate) fn block_bio_queue(ctx: BtfTracePointContext) -> i32 {
    let thread = bpf_get_current_pid_tgid();
    let Some(filter) = filter() else { return 0 };
    let tgid = if may_be_watched(filter, ANY_PROCESS.into()) && is_kernel_thread() {
        ANY_PROCESS
    } else if may_be_watched(filter, thread) {
        (thread >> 32) as u32
    } else {
        return 0;
    };
    let bio: Address = ctx.arg(0);
    let beginning = Beginning::now(filter, key_of(filter, bio));
    let asked = Asked::of(bio);
    let mut counts = Counts::Elsewhere;
    if filter.wanted & WANTED_DEVICES != 0
        && let Some(found) = image(ImageKey { inode: BLOCK_DEVICE, device: asked.device, tgid })
    {
        counts = for_disk(asked, found);
    }
    if let Counts::Elsewhere = counts
        && filter.wanted & WANTED_BELOW != 0
        && let Some(request) = asked.data()
        && let Some(slot) = below_disk(asked.bio, asked.device, tgid).checked_sub(1)
        && let Some(found) = Found::at(slot as u16)
    {
        counts = Counts::From(found, request);
    }
    if let Counts::From(found, request) = counts {
        begin(beginning, found, request);
    }
    0
}

/// What a `bio` is for a disk.
#[derive(Clone, Copy)]
enum Counts {
    /// A request, from now to its end.
    From(Found, Request),
    /// It is counted.
    Done,
    /// None that counts here.
    Elsewhere,
}

/// What a `bio` of a process is for a disk that is this device.
#[inline(always)]
fn for_disk(asked: Asked, found: Found) -> Counts {
    let (data, flush) = (found.is_counted(BY_BIO), found.is_counted(FLUSH_BY_BIO));
    let (opf, bytes) = (asked.opf(), asked.bytes());
    match opf & 0xff {
        REQ_READ if data => Counts::From(found, Request::new(READ, bytes)),
        REQ_WRITE if data && bytes != 0 => Counts::From(found, Request::new(WRITE, bytes)),
        REQ_WRITE if flush && bytes == 0 && opf & offset(&BLOCK_LAYOUT.preflush) != 0 => {
            Counts::From(found, Request::new(FLUSH, 0))
        }
        REQ_FLUSH if flush => Counts::From(found, Request::new(FLUSH, 0)),
        REQ_DISCARD if flush => {
            count_range(&found.image.discards, &found.image.discard_bytes, bytes);
            Counts::Done
        }
        REQ_WRITE_ZEROES if flush => {
            count_range(&found.image.zeroes, &found.image.zero_bytes, bytes);
            Counts::Done
        }
        _ => Counts::Elsewhere,
    }
}

/// The slot, plus 1, that counts a `bio` of a process, or of a kernel's thread, for the image whose data it moves: that of the
/// device below it or, where nothing else sees its requests, of the image itself. 0 if there is none, or if it writes back for
/// an image with direct I/O what somebody else left in the page cache, as the first flush after a copy of the file does.
#[inline(never)]
fn below_disk(bio: Address, device: u32, tgid: u32) -> u64 {
    if let Some(found) = filter().and_then(|filter| in_flight_above(filter, bio)) {
        // A copy that a stacked device made is carried out by another device.
        return if offset(&found.image.device) == device { offset(&found.image.below).into() } else { 0 };
    }
    // Written out: a function of its own, which `and_then` may become, would be called with what the verifier calls undefined.
    let cached = match inode_of_pages(bio) {
        Some(inode) => image_below(inode, device, tgid),
        None => None,
    };
    if let Some(found) = cached {
        return if found.is_counted(BY_BIO) { 0 } else { offset(&found.image.below).into() };
    }
    let Some(found) = inode_of_direct(bio).and_then(|inode| image_below(inode, device, tgid)) else {
        return 0;
    };
    if found.is_counted(BY_BIO) { u64::from(found.slot) + 1 } else { offset(&found.image.below).into() }
}

/// The image whose request of direct I/O through iomap a `bio` is a part of, if that request is in flight. Of another
/// `bio` what is read here is any number, and no key of a request.
#[inline(always)]
fn in_flight_above(filter: &'static BlockFilter, bio: Address) -> Option<Found> {
    // SAFETY: an argument of a BTF tracepoint.
    let dio: u64 = unsafe { load(bio, offset(&BLOCK_LAYOUT.bio_private)) };
    let kiocb: u64 = probe(dio, offset(&BLOCK_LAYOUT.dio_kiocb))?;
    Found::at(find(filter, key_of_number(filter, kiocb))?.slot)
}

/// The inode whose pages in the page cache a `bio` moves; `None` if they are not of the page cache.
#[inline(always)]
fn inode_of_pages(bio: Address) -> Option<u64> {
    /// The low bits of `page.mapping` (include/linux/page-flags.h): memory of a process, or movable.
    const NO_FILE: u64 = 3;
    // SAFETY: an argument of a BTF tracepoint.
    let vec: u64 = unsafe { load(bio, offset(&BLOCK_LAYOUT.bio_pages)) };
    let page: u64 = probe(vec, offset(&BLOCK_LAYOUT.vec_page))?;
    let head: u64 = probe(page, offset(&BLOCK_LAYOUT.page_head))?;
    let page = if head & 1 != 0 { head - 1 } else { page };
    let mapping: u64 = probe(page, offset(&BLOCK_LAYOUT.page_mapping))?;
    if mapping == 0 || mapping & NO_FILE != 0 {
        return None;
    }
    probe(mapping, offset(&BLOCK_LAYOUT.mapping_host))
}

/// The inode that a `bio` of direct I/O through iomap is for. Of another `bio` the result is any number: what is found
/// with it has to be held against the device.
#[inline(always)]
fn inode_of_direct(bio: Address) -> Option<u64> {
    // SAFETY: an argument of a BTF tracepoint.
    let dio: u64 = unsafe { load(bio, offset(&BLOCK_LAYOUT.bio_private)) };
    let kiocb: u64 = probe(dio, offset(&BLOCK_LAYOUT.dio_kiocb))?;
    let file: u64 = probe(kiocb, offset(&BLOCK_LAYOUT.kiocb_file))?;
    probe(file, offset(&BLOCK_LAYOUT.file_inode))
}

/// The image behind an inode, if it lies on that device: of a process, else of whoever left its data to the kernel.
#[inline(always)]
fn image_below(inode: u64, device: u32, tgid: u32) -> Option<Found> {
    let (number, on) = number_of_inode(inode)?;
    if on != device {
        return None; // A copy that a stacked device made, to be carried out below.
    }
    image(ImageKey { inode: number, device, tgid })
        .or_else(|| image(ImageKey { inode: number, device, tgid: ANY_PROCESS }))
}

/// `PF_KTHREAD` of include/linux/sched.h: writeback, journals, work queues.
#[inline(always)]
fn is_kernel_thread() -> bool {
    const PF_KTHREAD: u32 = 0x0020_0000;
    // SAFETY: plain helper call; what it returns is a pointer that the verifier trusts.
    let flags: u32 = unsafe { load(bpf_get_current_task_btf() as Address, offset(&BLOCK_LAYOUT.task_flags)) };
    flags & PF_KTHREAD != 0
}

/// `trace_block_rq_complete(struct request *rq, blk_status_t error, unsigned int nr_bytes)`: a device that takes
/// requests has carried out so many bytes, in any context. Whole parts among them are over; the kernel does not trace
/// their ends one by one (`blk_update_request()`).
#[btf_tracepoint(function = "block_rq_complete")]
pub(crate) fn block_rq_complete(ctx: BtfTracePointContext) -> i32 {
    let request: Address = ctx.arg(0);
    let (status, bytes) = (ctx.arg::<u64>(1) as u8, ctx.arg::<u64>(2));
    // SAFETY: an argument of a BTF tracepoint, here and below what is loaded through it.
    let bio: Address = unsafe { load(request, offset(&BLOCK_LAYOUT.request_bio)) };
    if bio.is_null() {
        return 0;
    }
    // SAFETY: as above.
    let (first, next): (u32, u64) =
        unsafe { (load(bio, offset(&BLOCK_LAYOUT.bio_size)), load(bio, offset(&BLOCK_LAYOUT.bio_next))) };
    let Some(left) = bytes.checked_sub(u64::from(first)) else { return 0 };
    let Some(filter) = filter() else { return 0 };
    let key = key_of(filter, bio);
    if next != 0 && left != 0 {
        end_more(key, left, status.into());
    }
    end_part(filter, key, status);
    0
}

/// Parts of a request after the first.
#[repr(C)]
struct Parts {
    /// Address of the next one.
    bio: u64,
    /// What to subtract from it to have its key.
    base: u64,
    /// Bytes that are over.
    left: u64,
    status: u64,
}

/// Ends the parts of a merged request after the first, in a loop of the kernel's: the verifier would look at each round
/// of one that is written here.
#[inline(never)]
fn end_more(first_key: u64, left: u64, status: u64) -> u64 {
    let Some(filter) = filter() else { return 0 };
    // Addresses as numbers: the verifier does not let those that it knows as such be kept.
    let base = base(filter);
    let Some(next) = probe::<u64>(base.wrapping_add(first_key), offset(&BLOCK_LAYOUT.bio_next)) else {
        return 0;
    };
    let mut parts = Parts { bio: next, base, left, status };
    let next_part: unsafe extern "C" fn(u64, *mut Parts) -> i64 = end_next;
    // SAFETY: the callback takes what is given here, for as long as the helper runs.
    unsafe { bpf_loop(MERGED, next_part as *mut c_void, (&raw mut parts).cast(), 0) };
    0
}

/// One round; 1 ends the loop.
#[inline(never)]
unsafe extern "C" fn end_next(_: u64, parts: *mut Parts) -> i64 {
    // SAFETY: what `end_more` gives; the verifier knows where it points.
    let parts = unsafe { &mut *parts };
    let Some(bytes) = probe::<u32>(parts.bio, offset(&BLOCK_LAYOUT.bio_size)) else { return 1 };
    let Some(left) = parts.left.checked_sub(u64::from(bytes)) else { return 1 };
    let Some(next) = probe::<u64>(parts.bio, offset(&BLOCK_LAYOUT.bio_next)) else { return 1 };
    let Some(filter) = filter() else { return 1 };
    end_part(filter, parts.bio.wrapping_sub(parts.base), parts.status as u8);
    (parts.bio, parts.left) = (next, left);
    i64::from(next == 0 || left == 0)
}

/// `trace_block_bio_complete(struct request_queue *q, struct bio *bio)`: a `bio` and all its parts are over, in any
/// context; only of devices that take each `bio` themselves, such as those of device-mapper. Its size is used up by now.
#[btf_tracepoint(function = "block_bio_complete")]
pub(crate) fn block_bio_complete(ctx: BtfTracePointContext) -> i32 {
    let bio: Address = ctx.arg(1);
    // SAFETY: an argument of a BTF tracepoint.
    let status: u8 = unsafe { load(bio, offset(&BLOCK_LAYOUT.bio_status)) };
    if let Some(filter) = filter() {
        end_part(filter, key_of(filter, bio), status);
    }
    0
}

/// A `bio` is over.
#[inline(always)]
fn end_part(filter: &'static BlockFilter, key: u64, status: u8) {
    if let Some(place) = find(filter, key) {
        end_at(place, if status == 0 { i64::from(place.bytes) } else { -status_errno(status) });
    }
}

/// The error number that `blk_status_to_errno()` gives a process.
#[inline(always)]
fn status_errno(status: u8) -> i64 {
    match status {
        1 => 95,  // BLK_STS_NOTSUPP: EOPNOTSUPP.
        2 => 110, // BLK_STS_TIMEOUT: ETIMEDOUT.
        3 => 28,  // BLK_STS_NOSPC: ENOSPC.
        4 => 67,  // BLK_STS_TRANSPORT: ENOLINK.
        5 => 121, // BLK_STS_TARGET: EREMOTEIO.
        6 => 52,  // BLK_STS_RESV_CONFLICT: EBADE.
        7 => 61,  // BLK_STS_MEDIUM: ENODATA.
        8 => 84,  // BLK_STS_PROTECTION: EILSEQ.
        9 => 12,  // BLK_STS_RESOURCE: ENOMEM.
        12 => EAGAIN,
        _ => 5, // BLK_STS_IOERR and the rest: EIO.
    }
}

/// `trace_io_uring_submit_req(struct io_kiocb *req)` (before Linux 6.3 `io_uring_submit_sqe`, with one argument more):
/// a request is taken from a ring, once, whichever thread makes it in the end.
#[btf_tracepoint(function = "io_uring_submit_req")]
pub(crate) fn io_uring_submit_req(ctx: BtfTracePointContext) -> i32 {
    /// Operations of `enum io_uring_op` (include/uapi/linux/io_uring.h).
    const READV: u8 = 1;
    const WRITEV: u8 = 2;
    const FSYNC: u8 = 3;
    const READ_PLAIN: u8 = 22;
    const WRITE_PLAIN: u8 = 23;
    let thread = bpf_get_current_pid_tgid();
    let Some(filter) = filter().filter(|filter| may_be_watched(filter, thread)) else { return 0 };
    let req: Address = ctx.arg(0);
    // SAFETY: an argument of a BTF tracepoint.
    let opcode: u8 = unsafe { load(req, offset(&BLOCK_LAYOUT.uring_opcode)) };
    let (operation, by) = match opcode {
        READV | READ_PLAIN => (READ, BY_CALL),
        WRITEV | WRITE_PLAIN => (WRITE, BY_CALL),
        FSYNC => (FLUSH, FLUSH_BY_CALL),
        _ => return 0,
    };
    let beginning = Beginning::now(filter, key_of(filter, req) ^ IN_URING);
    // SAFETY: as above. Zero-extended: a negative descriptor is larger than any table.
    let fd: u32 = unsafe { load(req, offset(&BLOCK_LAYOUT.uring_fd)) };
    if let Some(found) = image_of_fd(thread, fd).filter(|found| found.is_counted(by)) {
        begin(beginning, found, Request::new(operation, 0));
    }
    0
}

/// `trace_io_uring_complete(struct io_ring_ctx *ctx, void *req, struct io_uring_cqe *cqe)`, before Linux 6.10
/// `(ctx, req, u64 user_data, int res, …)`: the result of a request is put into the ring.
#[btf_tracepoint(function = "io_uring_complete")]
pub(crate) fn io_uring_complete(ctx: BtfTracePointContext) -> i32 {
    let Some(filter) = filter() else { return 0 };
    let Some(place) = find(filter, key_of_number(filter, ctx.arg(1)) ^ IN_URING) else { return 0 };
    let result: i32 = if offset(&BLOCK_LAYOUT.uring_complete_has_cqe) == 0 {
        ctx.arg::<u64>(3) as i32
    } else {
        // SAFETY: an argument of a BTF tracepoint.
        unsafe { load(ctx.arg::<Address>(2), offset(&BLOCK_LAYOUT.cqe_res)) }
    };
    end_at(place, i64::from(result));
    0
}

/// `trace_sys_enter(struct pt_regs *regs, long id)`: every system call of the host, which is why this is attached
/// only while an image needs it. Counts positioned reads and writes, flushes and `fallocate`.
#[btf_tracepoint(function = "sys_enter")]
pub(crate) fn block_sys_enter(ctx: BtfTracePointContext) -> i32 {
    let Some(kind) = BLOCK_LAYOUT.calls.get(ctx.arg::<u64>(1) as usize) else { return 0 };
    // SAFETY: a reference is readable. Volatile, because the compiler believes the zeros of the initializer.
    let kind = unsafe { core::ptr::read_volatile(kind) };
    if kind == 0 {
        return 0;
    }
    let thread = bpf_get_current_pid_tgid();
    let Some(filter) = filter().filter(|filter| may_be_watched(filter, thread)) else { return 0 };
    let beginning = Beginning::now(filter, thread | IN_CALL);
    let regs: Address = ctx.arg(0);
    // SAFETY: an argument of a BTF tracepoint.
    let argument = |n: usize| unsafe { load::<u64>(regs, offset(&BLOCK_LAYOUT.call_arguments[n])) };
    let Some(found) = image_of_fd(thread, argument(0) as u32) else { return 0 };
    let by = if kind <= CALL_WRITE { BY_CALL } else { FLUSH_BY_CALL };
    if !found.is_counted(by) {
        return 0;
    }
    if kind == CALL_FALLOCATE {
        fallocated(found.slot.into(), argument(1), argument(3));
        return 0;
    }
    let operation = match kind {
        CALL_READ => READ,
        CALL_WRITE => WRITE,
        _ => FLUSH,
    };
    begin(beginning, found, Request::new(operation, 0));
    0
}

/// `fallocate` with this mode on the image in a slot.
#[inline(never)]
fn fallocated(slot: u32, mode: u64, bytes: u64) -> u64 {
    const PUNCH_HOLE: u64 = 2;
    const ZERO_RANGE: u64 = 0x10;
    let Some(Found { image, .. }) = Found::at(slot as u16) else { return 0 };
    if mode & PUNCH_HOLE != 0 {
        count_range(&image.discards, &image.discard_bytes, bytes);
    } else if mode & ZERO_RANGE != 0 {
        count_range(&image.zeroes, &image.zero_bytes, bytes);
    }
    0
}

/// `trace_sys_exit(struct pt_regs *regs, long ret)`: likewise.
#[btf_tracepoint(function = "sys_exit")]
pub(crate) fn block_sys_exit(ctx: BtfTracePointContext) -> i32 {
    let thread = bpf_get_current_pid_tgid();
    if let Some(filter) = filter().filter(|filter| may_be_watched(filter, thread)) {
        end(filter, thread | IN_CALL, ctx.arg::<i64>(1));
    }
    0
}

/// `trace_ext4_sync_file_enter(struct file *file, int datasync)`: a file is flushed, whoever asked and how.
#[btf_tracepoint(function = "ext4_sync_file_enter")]
pub(crate) fn ext4_sync_file_enter(ctx: BtfTracePointContext) -> i32 {
    let thread = bpf_get_current_pid_tgid();
    let Some(filter) = filter().filter(|filter| may_be_watched(filter, thread)) else { return 0 };
    let beginning = Beginning::now(filter, thread | IN_EXT4);
    // SAFETY: an argument of a BTF tracepoint, and what is loaded through it.
    let found = unsafe {
        let inode: Address = load(ctx.arg::<Address>(0), offset(&BLOCK_LAYOUT.file_inode));
        image_of_inode(thread, inode)
    };
    if let Some(found) = found.filter(|found| found.is_counted(FLUSH_BY_EXT4)) {
        begin(beginning, found, Request::new(FLUSH, 0));
    }
    0
}

/// `trace_ext4_sync_file_exit(struct inode *inode, int ret)`.
#[btf_tracepoint(function = "ext4_sync_file_exit")]
pub(crate) fn ext4_sync_file_exit(ctx: BtfTracePointContext) -> i32 {
    let thread = bpf_get_current_pid_tgid();
    if let Some(filter) = filter().filter(|filter| may_be_watched(filter, thread)) {
        end(filter, thread | IN_EXT4, i64::from(ctx.arg::<u64>(1) as i32));
    }
    0
}

/// `trace_ext4_punch_hole(struct inode *inode, loff_t offset, loff_t len, int mode)`: a range is given back.
#[btf_tracepoint(function = "ext4_punch_hole")]
pub(crate) fn ext4_punch_hole(ctx: BtfTracePointContext) -> i32 {
    if let Some(found) = ext4_range(&ctx) {
        count_range(&found.image.discards, &found.image.discard_bytes, ctx.arg::<u64>(2));
    }
    0
}

/// `trace_ext4_zero_range(struct inode *inode, loff_t offset, loff_t len, int mode)`: a range is zeroed.
#[btf_tracepoint(function = "ext4_zero_range")]
pub(crate) fn ext4_zero_range(ctx: BtfTracePointContext) -> i32 {
    if let Some(found) = ext4_range(&ctx) {
        count_range(&found.image.zeroes, &found.image.zero_bytes, ctx.arg::<u64>(2));
    }
    0
}

#[inline(always)]
fn ext4_range(ctx: &BtfTracePointContext) -> Option<Found> {
    let thread = bpf_get_current_pid_tgid();
    filter().filter(|filter| may_be_watched(filter, thread))?;
    // SAFETY: an argument of a BTF tracepoint.
    let found = unsafe { image_of_inode(thread, ctx.arg(0)) }?;
    found.is_counted(FLUSH_BY_EXT4).then_some(found)
}

/// One bit: whether it is worth looking for an image of this thread's process.
#[inline(always)]
fn may_be_watched(filter: &BlockFilter, thread: u64) -> bool {
    let bit = (thread >> 32) as u32 % PROCESS_FILTER_BITS;
    filter.processes[(bit / 64) as usize] >> (bit % 64) & 1 != 0
}

#[inline(always)]
fn filter() -> Option<&'static BlockFilter> {
    // SAFETY: a valid map value for the life of the program; user space changes whole words.
    unsafe { BLOCK_FILTER.get_ptr(0)?.as_ref() }
}

/// The image behind an inode, for the process of this thread.
///
/// # Safety
/// `inode` must be a pointer that the verifier trusts.
#[inline(always)]
unsafe fn image_of_inode(thread: u64, inode: Address) -> Option<Found> {
    // SAFETY: by the caller.
    unsafe {
        let mode: u16 = load(inode, offset(&BLOCK_LAYOUT.inode_mode));
        let (number, device) = if is_block_device(mode) {
            (BLOCK_DEVICE, load(inode, offset(&BLOCK_LAYOUT.inode_rdev)))
        } else {
            let sb: Address = load(inode, offset(&BLOCK_LAYOUT.inode_sb));
            (load(inode, offset(&BLOCK_LAYOUT.inode_number)), load(sb, offset(&BLOCK_LAYOUT.sb_dev)))
        };
        image(ImageKey { inode: number, device, tgid: (thread >> 32) as u32 })
    }
}

/// The image behind a file descriptor of the current task. Looked up anew for each request, because a descriptor may
/// be another file by the next.
#[inline(always)]
fn image_of_fd(thread: u64, fd: u32) -> Option<Found> {
    // SAFETY: plain helper call; what it returns is a pointer that the verifier trusts.
    let (max, table) = unsafe {
        let task = bpf_get_current_task_btf() as Address;
        let files: Address = load(task, offset(&BLOCK_LAYOUT.task_files));
        let fdt: Address = load(files, offset(&BLOCK_LAYOUT.files_fdt));
        (load::<u32>(fdt, offset(&BLOCK_LAYOUT.fdt_max)), load::<u64>(fdt, offset(&BLOCK_LAYOUT.fdt_fd)))
    };
    if fd >= max {
        return None;
    }
    Found::at(image_of_file(table + u64::from(fd) * 8, (thread >> 32) as u32).checked_sub(1)? as u16)
}

/// The slot, plus 1, of the image behind an entry of the table of open files of a process; 0 if there is none.
#[inline(never)]
fn image_of_file(entry: u64, tgid: u32) -> u64 {
    let image = || {
        let file: u64 = probe(entry, 0)?;
        let inode: u64 = probe(file, offset(&BLOCK_LAYOUT.file_inode))?;
        let (inode, device) = number_of_inode(inode)?;
        image(ImageKey { inode, device, tgid })
    };
    image().map_or(0, |found| u64::from(found.slot) + 1)
}

/// What identifies an inode that is known by its address only: its number and the device of its file system, or
/// [`BLOCK_DEVICE`] and the device.
#[inline(always)]
fn number_of_inode(inode: u64) -> Option<(u64, u32)> {
    let mut head = MaybeUninit::<InodeHead>::uninit();
    // SAFETY: the helper fills as many bytes, from any address.
    let failed = unsafe {
        let size = size_of::<InodeHead>() as u32;
        bpf_probe_read_kernel(head.as_mut_ptr().cast(), size, inode as *const c_void)
    };
    if failed != 0 {
        return None;
    }
    // SAFETY: filled.
    let head = unsafe { head.assume_init_ref() };
    if is_block_device(head.field(inode, offset(&BLOCK_LAYOUT.inode_mode))?) {
        return Some((BLOCK_DEVICE, head.field(inode, offset(&BLOCK_LAYOUT.inode_rdev))?));
    }
    let sb: u64 = head.field(inode, offset(&BLOCK_LAYOUT.inode_sb))?;
    Some((head.field(inode, offset(&BLOCK_LAYOUT.inode_number))?, probe(sb, offset(&BLOCK_LAYOUT.sb_dev))?))
}

/// The first bytes of a `struct inode`, which have its fields here on every usual kernel: one copy costs less than four.
#[repr(transparent)]
struct InodeHead([u64; 12]);

impl InodeHead {
    #[inline(always)]
    fn field<T>(&self, inode: u64, offset: u32) -> Option<T> {
        if offset as usize + size_of::<T>() > size_of::<Self>() {
            return probe(inode, offset);
        }
        let field = core::ptr::from_ref(self).cast::<u8>().wrapping_add(offset as usize).cast::<T>();
        // SAFETY: inside (checked), of a type that is any bits, and aligned as in the kernel's structure.
        Some(unsafe { core::ptr::read_volatile(field) })
    }
}

/// `S_ISBLK` of include/uapi/linux/stat.h.
#[inline(always)]
fn is_block_device(mode: u16) -> bool {
    mode & 0o170_000 == 0o060_000
}

/// A watched image.
#[inline(always)]
fn image(key: ImageKey) -> Option<Found> {
    let start = key.table_start();
    let first = entry(start)?;
    let slot = if is_of(first, key.inode, key.device, key.tgid) {
        first.slot
    } else {
        search_image(start, key.inode, key.device, key.tgid)
    };
    Found::at(slot.checked_sub(1)? as u16)
}

/// The slot of an image that is not where the search for it begins, plus 1; 0 if it is not watched.
#[inline(never)]
fn search_image(start: u32, inode: u64, device: u32, tgid: u32) -> u64 {
    for i in 1..IMAGE_TABLE_PROBES {
        let Some(entry) = entry(start + i) else { return 0 };
        if is_of(entry, inode, device, tgid) {
            return entry.slot;
        }
    }
    0
}

#[inline(always)]
fn entry(at: u32) -> Option<&'static ImageEntry> {
    // SAFETY: a valid map value for the life of the program; user space changes whole words.
    let table = unsafe { &*IMAGE_TABLE.get_ptr(0)? };
    Some(&table.0[at as usize % IMAGE_TABLE_ENTRIES])
}

#[inline(always)]
fn is_of(entry: &ImageEntry, inode: u64, device: u32, tgid: u32) -> bool {
    entry.key.inode == inode && entry.key.device == device && entry.key.tgid == tgid
}

#[inline(always)]
fn count_range(ranges: &u64, sum: &u64, bytes: u64) {
    add(ranges, 1);
    add(sum, bytes);
}

/// A number for the address of a kernel structure. The verifier lets no address be hashed, but it lets two be
/// subtracted; that of a map never changes.
#[inline(always)]
fn key_of(filter: &'static BlockFilter, address: Address) -> u64 {
    (address as u64).wrapping_sub(core::ptr::from_ref(filter) as u64)
}

/// The same for an address that is known as a number only.
#[inline(always)]
fn key_of_number(filter: &'static BlockFilter, address: u64) -> u64 {
    address.wrapping_sub(base(filter))
}

/// The address that keys are distances to, as a number: that is what the verifier takes for it once it was in memory.
#[inline(always)]
fn base(filter: &'static BlockFilter) -> u64 {
    let base = Word::of(&filter.base);
    if base.load() == 0 {
        base.store(core::ptr::from_ref(filter) as u64);
    }
    base.load()
}

/// `CLOCK_MONOTONIC`, nanoseconds. Waits for everything that was read from memory before.
#[inline(always)]
fn now() -> u64 {
    // SAFETY: plain helper call.
    unsafe { bpf_ktime_get_ns() }
}

/// A request that may begin.
///
/// Made before anything is looked up. The first place of the search is mostly in the cache of the CPU that ended a request
/// last. To write something there has it come while the clock is read and the rest is looked up, and come for good: what is
/// only read is asked for once more when it is written. Nothing waits for a write, as the clock does for all that is being
/// read from memory.
#[derive(Clone, Copy)]
struct Beginning {
    key: u64,
    begin_ns: u64,
    /// The first place of the search, where no other has to be looked at: mostly nobody ever was anywhere else.
    place: Option<&'static Flight>,
}

impl Beginning {
    #[inline(always)]
    fn now(filter: &'static BlockFilter, key: u64) -> Self {
        let place = flying(flight_start(key)).filter(|_| Word::of(&filter.deepest).load() == 0);
        if let Some(place) = place {
            fetch(place);
        }
        Self { key, begin_ns: now(), place }
    }
}

/// Has the cache line of a place come to this CPU.
#[inline(always)]
fn fetch(place: &Flight) {
    let to = core::ptr::from_ref(place).cast_mut();
    // SAFETY: a field of a valid, aligned map value that nobody reads.
    unsafe { (&raw mut (*to).reserved).write_volatile(0) };
}

/// A request begins.
#[inline(always)]
fn begin(beginning: Beginning, found: Found, request: Request) {
    let Beginning { key, begin_ns, place } = beginning;
    let what = What::new(found.slot, request);
    let histograms = offset(&found.image.histograms);
    if let Some(place) = place
        && claim(&place.key, key)
    {
        write(place, begin_ns, what, histograms);
        add(of_operation(&found.image.begun, request.operation), 1);
        return;
    }
    begin_elsewhere(key, begin_ns, what.0, histograms);
}

/// The same where the first place of the search may not do. A request that has no room counts as done, without latency.
#[inline(never)]
fn begin_elsewhere(key: u64, begin_ns: u64, what: u64, histograms: u32) -> u64 {
    let what = What(what);
    let (Some(filter), Some(found)) = (filter(), Found::at(what.slot())) else { return 0 };
    let (start, deepest) = (flight_start(key), Word::of(&filter.deepest));
    if let Some(place) = find(filter, key)
        && replace(place, begin_ns, what, histograms)
    {
        return 0; // Made again: it counts once, from now.
    }
    add(of_operation(&found.image.begun, what.operation()), 1);
    for i in 0..FLIGHT_PROBES {
        let Some(place) = flying(start + i) else { return 0 };
        if get(&place.key) == 0 && claim(&place.key, key) {
            if u64::from(i) > deepest.load() {
                deepen(deepest, i.into());
            }
            write(place, begin_ns, what, histograms);
            return 0;
        }
    }
    let counted = of_operation(&found.image.operations, what.operation());
    add(&counted.done, 1);
    add(&counted.bytes, what.bytes().into());
    add(&found.image.untimed, 1);
    0
}

/// The search for requests has to look as far as that from now on. It only grows, also where two CPUs want that at once.
#[inline(always)]
fn deepen(deepest: Word, to: u64) {
    let mut seen = deepest.load();
    for _ in 0..FLIGHT_PROBES {
        if seen >= to {
            return;
        }
        let now = deepest.exchange(seen, to);
        if now == seen {
            return;
        }
        seen = now;
    }
}

/// Another request has the key of one in flight. True if it is the same, made again by the kernel, this time in a
/// context that may wait; else the end of the earlier one was not seen, and it is forgotten.
#[inline(always)]
fn replace(place: &Flight, begin_ns: u64, what: What, histograms: u32) -> bool {
    if place.no_wait != 0 && !what.no_wait() && place.slot == what.slot() {
        write(place, begin_ns, what, histograms);
        return true;
    }
    if let Some(lost) = Found::at(place.slot) {
        add(of_operation(&lost.image.begun, u32::from(place.operation)), u64::MAX);
        add(&lost.image.unseen, 1);
    }
    Word::of(&place.key).store(0);
    false
}

/// Writes what is known of a request into its place, where its key is already: who claimed it alone writes there.
#[inline(always)]
fn write(place: &Flight, begin_ns: u64, what: What, histograms: u32) {
    let to = core::ptr::from_ref(place).cast_mut();
    // SAFETY: fields of a valid, aligned map value.
    unsafe {
        (&raw mut (*to).begin_ns).write_volatile(begin_ns);
        (&raw mut (*to).bytes).write_volatile(what.bytes());
        (&raw mut (*to).slot).write_volatile(what.slot());
        (&raw mut (*to).operation).write_volatile(what.operation() as u8);
        (&raw mut (*to).no_wait).write_volatile(u8::from(what.no_wait()));
        (&raw mut (*to).histograms).write_volatile(histograms);
    }
}

/// A request is over, with bytes or a negative error number.
#[inline(always)]
fn end(filter: &'static BlockFilter, key: u64, result: i64) {
    if let Some(place) = find(filter, key) {
        end_at(place, result);
    }
}

/// The same, where it is.
#[inline(always)]
fn end_at(place: &'static Flight, result: i64) {
    if result < 0 {
        failed(place.slot.into(), place.operation.into(), result.unsigned_abs());
    } else {
        done(place, result.cast_unsigned());
    }
    // Last, so that nothing here waits for it; and before this nobody else claims the place.
    Word::of(&place.key).store(0);
}

/// Where a request in flight is.
#[inline(always)]
fn find(filter: &'static BlockFilter, key: u64) -> Option<&'static Flight> {
    let start = flight_start(key);
    let first = flying(start)?;
    if get(&first.key) == key {
        return Some(first);
    }
    let deepest = Word::of(&filter.deepest).load();
    if deepest == 0 {
        return None;
    }
    flying(search(start, key, deepest).checked_sub(1)?)
}

/// The place, plus 1, of a request in flight that is not where the search for it begins; 0 if there is none.
#[inline(never)]
fn search(start: u32, key: u64, deepest: u64) -> u32 {
    for i in 1..FLIGHT_PROBES {
        if u64::from(i) > deepest {
            break;
        }
        let Some(place) = flying(start + i) else { break };
        if get(&place.key) == key {
            return start + i + 1;
        }
    }
    0
}

#[inline(always)]
fn flying(at: u32) -> Option<&'static Flight> {
    // SAFETY: a valid map value for the life of the program.
    unsafe { FLYING.get_ptr(at % FLIGHTS)?.as_ref() }
}

/// A request has moved so many bytes.
#[inline(always)]
fn done(place: &'static Flight, bytes: u64) -> Option<()> {
    let (slot, operation, histograms) = (place.slot, u32::from(place.operation), place.histograms);
    let took = now().wrapping_sub(place.begin_ns);
    let counted = of_operation(&Found::at(slot)?.image.operations, operation);
    // SAFETY: a valid map value; counts are added to atomically.
    let histograms = unsafe { IMAGE_HIST.get_ptr(histograms.wrapping_sub(1)).and_then(|h| h.as_ref()) };
    let count =
        histograms.and_then(|all| of_operation(&all.operations, operation).get(bucket(took) as usize));
    if let Some(count) = count {
        add_32(count, 1);
    }
    add(&counted.done, 1);
    if operation != FLUSH {
        add(&counted.bytes, bytes);
    }
    add(&counted.time_ns, took);
    Some(())
}

/// A request on the image in a slot failed, or the kernel will make it again.
#[inline(never)]
fn failed(slot: u32, operation: u32, errno: u64) -> u64 {
    let Some(Found { image, .. }) = Found::at(slot as u16) else { return 0 };
    if errno == EAGAIN.unsigned_abs() {
        add(of_operation(&image.begun, operation), u64::MAX); // It begins again.
    } else {
        add(&of_operation(&image.operations, operation).failed, 1);
        count_error(image, errno);
    }
    0
}

#[inline(always)]
fn count_error(image: &Image, errno: u64) {
    for place in &image.errnos {
        let now = get(place);
        if now >> 32 == errno || now == 0 && claim(place, errno << 32) {
            add(place, 1);
            return;
        }
    }
    add(&image.other_errors, 1);
}

#[inline(always)]
fn get(place: &u64) -> u64 {
    Word::of(place).load()
}

/// Adds in one step: requests of one image end on several CPUs at once.
#[inline(always)]
fn add(place: &u64, n: u64) {
    Word::of(place).add(n);
}

#[inline(always)]
fn add_32(place: &u32, n: u32) {
    // SAFETY: a place in a map, aligned, which all writers change atomically.
    unsafe { atomic_xadd::<u32, u32, { Relaxed }>(core::ptr::from_ref(place).cast_mut(), n) };
}

/// Puts `value` where 0 is; false if somebody else was faster.
#[inline(always)]
fn claim(place: &u64, value: u64) -> bool {
    Word::of(place).exchange(0, value) == 0
}
