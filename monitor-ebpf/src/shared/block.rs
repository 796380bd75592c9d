//! What crosses the boundary for disks: which image files and devices are watched, and what was counted for each.
//!
//! Nothing here knows what a disk of a VM is: the kernel side counts requests of a *process* on an *image*, a file or
//! a block device. A disk may consist of several (a backing chain); user space adds them up.

use crate::Histogram;

/// Images that can be watched at once, and their counters.
pub const IMAGES: u32 = 1_024;
/// Images of which latency histograms can be kept at once.
pub const IMAGE_HISTOGRAMS: u32 = 256;
/// Entries of the table that maps an image to its slot, four times [`IMAGES`] so that probing stays short.
pub const IMAGE_TABLE_ENTRIES: usize = 1 << IMAGE_TABLE_LOG2;
const IMAGE_TABLE_LOG2: u32 = 12;
/// Neighbouring entries looked at for one image.
pub const IMAGE_TABLE_PROBES: u32 = 8;
/// Bits of the filter by process id in front of that table.
pub const PROCESS_FILTER_BITS: u32 = 16_384;

/// The inode number that stands for a block device as such; its number is then the device.
pub const BLOCK_DEVICE: u64 = u64::MAX;

/// Which process on which image.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ImageKey {
    /// Inode number, or [`BLOCK_DEVICE`].
    pub inode: u64,
    /// Device of the file system, or the block device itself, as the kernel writes it: major << 20 | minor.
    pub device: u32,
    /// Process id; [`ANY_PROCESS`] for the kernel's threads, which write back what a process left in the page cache and let
    /// go what a quota holds back.
    pub tgid: u32,
}

/// Stands for the kernel's threads in [`ImageKey::tgid`].
pub const ANY_PROCESS: u32 = 0;

impl ImageKey {
    /// Where the search for this key begins in the table (Fibonacci hashing).
    #[must_use]
    #[inline(always)]
    pub const fn table_start(&self) -> u32 {
        let mixed = self.inode ^ (self.device as u64) << 44 ^ (self.tgid as u64) << 20;
        (mixed.wrapping_mul(GOLDEN) >> (64 - IMAGE_TABLE_LOG2)) as u32
    }
}

const GOLDEN: u64 = 0x9E37_79B9_7F4A_7C15;

/// An entry of the table from image to slot. `slot` is written last when an entry is made and first when it goes.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ImageEntry {
    /// Slot of the image, plus 1; 0 = the entry is free.
    pub slot: u64,
    /// Whose it is.
    pub key: ImageKey,
}

/// The table; see [`ImageKey::table_start`].
#[repr(transparent)]
#[derive(Clone, Copy)]
pub struct ImageTable(pub [ImageEntry; IMAGE_TABLE_ENTRIES]);

/// What every program looks at first, in one map, because each look-up costs.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct BlockFilter {
    /// One bit per process id modulo [`PROCESS_FILTER_BITS`]: set if some image of that process may be watched. Written
    /// by user space.
    pub processes: [u64; (PROCESS_FILTER_BITS / 64) as usize],
    /// `WANTED_…`: what it is worth looking for where I/O enters the block layer. Written by user space.
    pub wanted: u64,
    /// Address of this map in the kernel, as a number; 0 until a program wrote it. Keys of requests are distances to it.
    pub base: u64,
    /// The place farthest from where its search begins that a request was ever given.
    pub deepest: u64,
    /// Nothing: the last cache line is full.
    pub reserved: [u64; 5],
}

/// Some watched image is a block device.
pub const WANTED_DEVICES: u64 = 1;
/// The device's share of some image is wanted that is a file.
pub const WANTED_BELOW: u64 = 1 << 1;

/// Reads, index into [`Image::operations`].
pub const READ: u32 = 0;
/// Writes.
pub const WRITE: u32 = 1;
/// Flushes.
pub const FLUSH: u32 = 2;
/// Kinds of operations that have a latency.
pub const OPERATIONS: usize = 3;

/// Reads and writes are counted where direct I/O on a file enters and leaves the file system (`iomap_dio_*`).
pub const BY_IOMAP: u32 = 1;
/// Reads and writes are counted where they enter the block layer (`block_bio_*`).
pub const BY_BIO: u32 = 1 << 1;
/// Reads and writes are counted as system calls or io_uring requests.
pub const BY_CALL: u32 = 1 << 2;
/// Flushes and discards are counted by ext4's tracepoints.
pub const FLUSH_BY_EXT4: u32 = 1 << 3;
/// Flushes and discards are counted where they enter the block layer.
pub const FLUSH_BY_BIO: u32 = 1 << 4;
/// Flushes and discards are counted as system calls or io_uring requests.
pub const FLUSH_BY_CALL: u32 = 1 << 5;

/// One kind of operation on one image, cumulative since it is watched. Programs add with atomic instructions, where
/// requests end.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Operation {
    /// Requests that succeeded.
    pub done: u64,
    /// Requests that failed.
    pub failed: u64,
    /// Bytes moved by those that succeeded.
    pub bytes: u64,
    /// Time those took, summed, nanoseconds.
    pub time_ns: u64,
}

impl Operation {
    /// Nothing counted.
    pub const ZERO: Self = Self { done: 0, failed: 0, bytes: 0, time_ns: 0 };
}

/// Error numbers that are told apart for one image.
pub const ERRNOS: usize = 6;
/// Parts of one request to a device, merged from requests of processes, that are looked at when it is over, beside the
/// first.
pub const MERGED: u32 = 1_024;

/// A watched image, in the slot that user space gave it.
///
/// Requests mostly begin on one CPU and end on another, and a cache line that both write to travels with each of them:
/// what is touched where they begin is in the first line, where reads and writes end in the second.
#[repr(C, align(64))]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Image {
    /// `BY_…` and `FLUSH_BY_…`: which programs count for it. Written by user space.
    pub counted_by: u32,
    /// Place of its histograms, plus 1; 0 = none are kept. Written by user space.
    pub histograms: u32,
    /// Slot that counts what the device below the image is asked for on its behalf, plus 1; 0 = nothing is counted.
    /// Written by user space.
    pub below: u32,
    /// Device of its file system, or the block device itself, as in [`ImageKey::device`]. Written by user space.
    pub device: u32,
    /// Requests that were begun, those whose end was not seen left out: [`READ`], [`WRITE`], [`FLUSH`].
    pub begun: [u64; OPERATIONS],
    /// Reads that QEMU's main thread waited for: it probes an image so when it opens it, never for a guest. They
    /// are in no other figure.
    pub open_requests: u64,
    /// Their bytes.
    pub open_bytes: u64,
    /// Requests counted as done when they began, without latency: there was no room to remember them.
    pub untimed: u64,
    /// What became of requests: [`READ`], [`WRITE`], [`FLUSH`].
    pub operations: [Operation; OPERATIONS],
    /// Ranges given back (holes punched, discards).
    pub discards: u64,
    /// Bytes given back.
    pub discard_bytes: u64,
    /// Ranges zeroed without writing them.
    pub zeroes: u64,
    /// Bytes zeroed so.
    pub zero_bytes: u64,
    /// Failed requests by error number: the number in the upper half, the count in the lower; 0 = free.
    pub errnos: [u64; ERRNOS],
    /// Failed requests with other numbers.
    pub other_errors: u64,
    /// Requests that are in no other figure: another one began at the same address, so they are over, but their end was
    /// not seen.
    pub unseen: u64,
}

impl Image {
    /// A free slot.
    pub const ZERO: Self = Self {
        counted_by: 0,
        histograms: 0,
        below: 0,
        device: 0,
        begun: [0; OPERATIONS],
        open_requests: 0,
        open_bytes: 0,
        untimed: 0,
        operations: [Operation::ZERO; OPERATIONS],
        discards: 0,
        discard_bytes: 0,
        zeroes: 0,
        zero_bytes: 0,
        errnos: [0; ERRNOS],
        other_errors: 0,
        unseen: 0,
    };

    /// Requests in flight.
    #[must_use]
    pub fn in_flight(&self) -> u64 {
        let over: u64 = self.operations.iter().map(|operation| operation.done + operation.failed).sum();
        self.begun.iter().sum::<u64>().saturating_sub(over)
    }

    /// Takes what is in flight for over, because its end will not be counted.
    pub fn forget_in_flight(&mut self) {
        for (begun, operation) in self.begun.iter_mut().zip(&self.operations) {
            *begun = operation.done + operation.failed;
        }
    }
}

/// Latencies of one image by kind of operation, cumulative since it is watched, nanoseconds.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ImageHistograms {
    /// [`READ`], [`WRITE`], [`FLUSH`].
    pub operations: [Histogram; OPERATIONS],
    /// Nothing; keeps the usual buckets of different images in different sets of the caches.
    pub stagger: [u64; 8],
}

impl ImageHistograms {
    /// Nothing counted.
    pub const ZERO: Self = Self { operations: [[0; crate::BUCKETS]; OPERATIONS], stagger: [0; 8] };
}

/// Places for requests in flight; a power of two.
pub const FLIGHTS: u32 = 1 << FLIGHTS_LOG2;
const FLIGHTS_LOG2: u32 = 14;
/// Neighbouring places that a request may be given.
pub const FLIGHT_PROBES: u32 = 8;

/// A request in flight. Two fill a cache line: whoever begins or ends a request touches one line.
#[repr(C, align(32))]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Flight {
    /// What identifies it; 0 = the place is free. Written first when it begins, and when it ends.
    pub key: u64,
    /// `CLOCK_MONOTONIC` when it began, nanoseconds.
    pub begin_ns: u64,
    /// Length asked for, bytes; 0 if not known.
    pub bytes: u32,
    /// Slot of its image.
    pub slot: u16,
    /// [`READ`], [`WRITE`] or [`FLUSH`].
    pub operation: u8,
    /// Not 0 if it may not wait: the kernel then may give it up without a trace and make it again.
    pub no_wait: u8,
    /// [`Image::histograms`] of its image.
    pub histograms: u32,
    /// Nothing; written to before the others.
    pub reserved: u32,
}

/// Where the search for a request in flight begins.
#[must_use]
#[inline(always)]
pub const fn flight_start(key: u64) -> u32 {
    (key.wrapping_mul(GOLDEN) >> (64 - FLIGHTS_LOG2)) as u32
}

/// Byte offsets into kernel structures and numbers of the kernel that the disk programs need, found when they are
/// loaded. What a kernel lacks belongs to programs that are then not loaded.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlockLayout {
    /// `bio.bi_bdev`.
    pub bio_bdev: u32,
    /// `block_device.bd_dev`.
    pub bdev_dev: u32,
    /// `bio.bi_opf`.
    pub bio_opf: u32,
    /// `bio.bi_iter.bi_size`.
    pub bio_size: u32,
    /// `bio.bi_next`: the next part of a merged request.
    pub bio_next: u32,
    /// `request.bio`: its first part.
    pub request_bio: u32,
    /// `bio.bi_private`: of direct I/O through iomap, its `struct iomap_dio`.
    pub bio_private: u32,
    /// `iomap_dio.iocb`.
    pub dio_kiocb: u32,
    /// `kiocb.ki_filp`.
    pub kiocb_file: u32,
    /// `kiocb.ki_complete`.
    pub kiocb_complete: u32,
    /// `kiocb.ki_flags`.
    pub kiocb_flags: u32,
    /// `iov_iter.count`.
    pub iter_count: u32,
    /// `iov_iter.data_source`: 1 for writes.
    pub iter_data_source: u32,
    /// `file.f_inode`.
    pub file_inode: u32,
    /// `inode.i_mode`.
    pub inode_mode: u32,
    /// `inode.i_ino`.
    pub inode_number: u32,
    /// `inode.i_sb`.
    pub inode_sb: u32,
    /// `inode.i_rdev`.
    pub inode_rdev: u32,
    /// `super_block.s_dev`.
    pub sb_dev: u32,
    /// `task_struct.files`.
    pub task_files: u32,
    /// `files_struct.fdt`.
    pub files_fdt: u32,
    /// `fdtable.max_fds`.
    pub fdt_max: u32,
    /// `fdtable.fd`.
    pub fdt_fd: u32,
    /// `io_kiocb.opcode`.
    pub uring_opcode: u32,
    /// `io_kiocb.cqe.fd`: the file a request is for, until it completes.
    pub uring_fd: u32,
    /// `io_uring_cqe.res`.
    pub cqe_res: u32,
    /// Not 0 if `io_uring_complete` is given a `struct io_uring_cqe *` (Linux 6.10), 0 if the result itself.
    pub uring_complete_has_cqe: u32,
    /// `bio.bi_status`.
    pub bio_status: u32,
    /// The bit `REQ_PREFLUSH` of `bi_opf`.
    pub preflush: u32,
    /// `task_struct.flags`.
    pub task_flags: u32,
    /// `bio.bi_io_vec`: its pages.
    pub bio_pages: u32,
    /// `bio_vec.bv_page`.
    pub vec_page: u32,
    /// `page.compound_head`: where it is odd, the first page of the folio is 1 below.
    pub page_head: u32,
    /// `page.mapping`: of a page of the page cache, whose it is.
    pub page_mapping: u32,
    /// `address_space.host`: the inode.
    pub mapping_host: u32,
    /// `pt_regs`: the first to fourth argument of a system call.
    pub call_arguments: [u32; 4],
    /// What a system call does, by its number: one of `CALL_…`, or 0 if that is of no interest.
    pub calls: [u8; CALLS],
}

/// Reads at a place: `pread64`, `preadv`.
pub const CALL_READ: u8 = 1;
/// Writes at a place: `pwrite64`, `pwritev`.
pub const CALL_WRITE: u8 = 2;
/// Flushes: `fsync`, `fdatasync`.
pub const CALL_FLUSH: u8 = 3;
/// Gives back or zeroes a range: `fallocate`.
pub const CALL_FALLOCATE: u8 = 4;
/// Numbers of system calls that are looked at; those above are of no interest.
pub const CALLS: usize = 512;

impl BlockLayout {
    /// Before anything is known.
    pub const ZERO: Self = Self {
        bio_bdev: 0,
        bdev_dev: 0,
        bio_opf: 0,
        bio_size: 0,
        bio_next: 0,
        request_bio: 0,
        bio_private: 0,
        dio_kiocb: 0,
        kiocb_file: 0,
        kiocb_complete: 0,
        kiocb_flags: 0,
        iter_count: 0,
        iter_data_source: 0,
        file_inode: 0,
        inode_mode: 0,
        inode_number: 0,
        inode_sb: 0,
        inode_rdev: 0,
        sb_dev: 0,
        task_files: 0,
        files_fdt: 0,
        fdt_max: 0,
        fdt_fd: 0,
        uring_opcode: 0,
        uring_fd: 0,
        cqe_res: 0,
        uring_complete_has_cqe: 0,
        bio_status: 0,
        preflush: 0,
        task_flags: 0,
        bio_pages: 0,
        vec_page: 0,
        page_head: 0,
        page_mapping: 0,
        mapping_host: 0,
        call_arguments: [0; 4],
        calls: [0; CALLS],
    };
}

const _: () = assert!(size_of::<ImageEntry>() == 24 && size_of::<Flight>() == 32);
const _: () = assert!(size_of::<Image>() == 256 && core::mem::offset_of!(Image, operations) == 64);
const _: () = assert!(core::mem::offset_of!(BlockFilter, wanted) == 2048 && size_of::<BlockFilter>() < 4096);
const _: () = assert!(size_of::<BlockLayout>() == 4 * (35 + 4) + CALLS);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn searches_begin_inside_their_tables() {
        for value in [0, 1, u64::MAX, 0xffff_8880_1234_5678, 0x8000_0001_0000_0001] {
            assert!(flight_start(value) < FLIGHTS);
            let key = ImageKey { inode: value, device: u32::MAX, tgid: 4_194_303 };
            assert!((key.table_start() as usize) < IMAGE_TABLE_ENTRIES);
        }
    }
}
