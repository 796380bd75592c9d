//! Every byte that crosses the boundary between the kernel programs and user space.
//!
//! This half has no dependency and builds for the host and for BPF. The programs themselves are the binary
//! `probes` of this package. Nothing here knows what a VM is: the kernel side follows *threads* that user
//! space names, and keeps for each what the scheduler itself counted.
//!
//! A derived `Default` on a type used by the programs would become a `memset` call that the BPF linker
//! refuses, hence the `ZERO` constants.
#![no_std]

/// Bits in the first-stage filter: bit `tid % FILTER_BITS` is set for every followed thread.
pub const FILTER_BITS: u32 = 65_536;
/// 64-bit words of the filter (8 KiB, small enough to stay in the first-level cache).
pub const FILTER_WORDS: usize = (FILTER_BITS / 64) as usize;
/// Entries of the table that maps a thread id to its slot; a power of two.
pub const TABLE_ENTRIES: usize = 1 << TABLE_ENTRIES_LOG2;
const TABLE_ENTRIES_LOG2: u32 = 15;
/// Neighbouring entries looked at for one thread id, in user space and in the kernel alike.
pub const TABLE_PROBES: u32 = 8;
/// Threads that can be followed at once, a quarter of [`TABLE_ENTRIES`] so that probing stays short.
pub const THREADS: u32 = 8_192;
/// Threads that one run of the `read_threads` program reads; its arguments are `[first slot]`.
pub const READ_BATCH: u32 = 64;

/// Where the search for a thread id begins in the table (Fibonacci hashing).
#[must_use]
pub const fn table_start(tid: u32) -> u32 {
    tid.wrapping_mul(0x9E37_79B1) >> (32 - TABLE_ENTRIES_LOG2)
}

/// A table entry: the thread id in the upper half, its slot in the lower. 0 is a free entry, since no
/// followed thread has the id 0 (the idle tasks).
#[must_use]
pub const fn table_entry(tid: u32, slot: u32) -> u64 {
    (tid as u64) << 32 | slot as u64
}

/// What the table says of `tid`, given a look at one entry.
#[must_use]
pub const fn table_slot(entry: u64, tid: u32) -> Option<u32> {
    if entry >> 32 == tid as u64 { Some((entry & 0xffff_ffff) as u32) } else { None }
}

/// The first-stage filter, one bit per thread id modulo [`FILTER_BITS`].
#[repr(transparent)]
#[derive(Clone, Copy)]
pub struct Filter(pub [u64; FILTER_WORDS]);

/// The table from thread id to slot, see [`table_entry`].
#[repr(transparent)]
#[derive(Clone, Copy)]
pub struct Table(pub [u64; TABLE_ENTRIES]);

/// A followed thread, in the slot that user space gave it.
///
/// `tid` and `role` are written by user space; the rest by the programs: by `seed_threads` when the thread
/// is first followed, then by `sched_switch` on the CPU the thread leaves or enters.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Thread {
    /// Thread id in the initial pid namespace; 0 is a free slot.
    pub tid: u32,
    /// [`ROLE_FOLLOWED`] or [`ROLE_CLOCK`].
    pub role: u32,
    /// Address of the `task_struct`, 0 until the thread was seen. Only ever read through
    /// `bpf_probe_read_kernel`, and believed only while the id found there is `tid`.
    pub task: u64,
    /// `task_struct.start_boottime`, nanoseconds: tells a reused thread id from the thread meant.
    pub start_boottime_ns: u64,
    /// [`STATE_UNKNOWN`], [`STATE_ON_CPU`] or [`STATE_OFF_CPU`], as of the last switch.
    pub state: u64,
    /// `se.sum_exec_runtime` at the last switch away, nanoseconds since the thread started.
    pub run_ns: u64,
    /// `sched_info.run_delay` at the last switch away, nanoseconds since the thread started.
    pub wait_ns: u64,
    /// Times the thread left a CPU since it is followed.
    pub switches: u64,
}

impl Thread {
    /// A free slot.
    pub const ZERO: Self = Self {
        tid: 0,
        role: ROLE_FOLLOWED,
        task: 0,
        start_boottime_ns: 0,
        state: STATE_UNKNOWN,
        run_ns: 0,
        wait_ns: 0,
        switches: 0,
    };
}

/// The thread is accounted.
pub const ROLE_FOLLOWED: u32 = 0;
/// The thread is kvm-monitor's own: each time it leaves a CPU the scheduler clock is compared with
/// `CLOCK_MONOTONIC`, so that no program has to read a clock for the threads that are accounted.
pub const ROLE_CLOCK: u32 = 1;

/// Not switched since it is followed; `task_struct.on_cpu` decides.
pub const STATE_UNKNOWN: u64 = 0;
/// Entered a CPU at its last switch.
pub const STATE_ON_CPU: u64 = 1;
/// Left its CPU at its last switch.
pub const STATE_OFF_CPU: u64 = 2;

/// One thread as `read_threads` found it, the interval in progress included.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Reading {
    /// The thread id read, 0 if the slot was free.
    pub tid: u32,
    /// [`READ_NOTHING`], [`READ_LIVE`], [`READ_LAST`] or [`READ_TORN`].
    pub status: u32,
    /// Copied from [`Thread::start_boottime_ns`].
    pub start_boottime_ns: u64,
    /// Time on a CPU by the task clock (interrupts and steal excluded), nanoseconds since thread start.
    pub run_ns: u64,
    /// Time runnable but not running, nanoseconds since thread start.
    pub wait_ns: u64,
    /// Part of `run_ns` that lies after the kernel's own last update of its figure.
    pub open_run_ns: u64,
    /// Part of `wait_ns` that is a wait still in progress.
    pub open_wait_ns: u64,
    /// `CLOCK_MONOTONIC` of the reading, nanoseconds.
    pub read_at_ns: u64,
}

impl Reading {
    /// No reading.
    pub const ZERO: Self = Self {
        tid: 0,
        status: READ_NOTHING,
        start_boottime_ns: 0,
        run_ns: 0,
        wait_ns: 0,
        open_run_ns: 0,
        open_wait_ns: 0,
        read_at_ns: 0,
    };
}

/// The slot is free or its thread was never seen.
pub const READ_NOTHING: u32 = 0;
/// Read from the living thread.
pub const READ_LIVE: u32 = 1;
/// The thread is gone; these are its figures when it left the CPU for the last time.
pub const READ_LAST: u32 = 2;
/// The figures changed under every attempt to read them; nothing is reported.
pub const READ_TORN: u32 = 3;

/// How the scheduler's clock (`rq->clock`, nanoseconds of `sched_clock`) relates to `CLOCK_MONOTONIC`, by the last
/// comparisons.
///
/// A comparison can only come out too low: the run queue's clock was read first, and an interrupt or a hypervisor may
/// have come in between. The largest of a few is therefore the one to believe; few, because the two clocks drift.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Clock {
    /// Scheduler clock − `CLOCK_MONOTONIC`, nanoseconds; [`NOT_COMPARED`] where there was no comparison yet.
    pub sched_minus_mono_ns: [i64; COMPARISONS],
    /// Comparisons made, modulo 2³².
    pub count: u32,
    /// Nothing; there is no padding.
    pub reserved: u32,
}

/// Comparisons that are remembered. Two are made each time kvm-monitor sleeps.
pub const COMPARISONS: usize = 4;
/// No comparison.
pub const NOT_COMPARED: i64 = i64::MIN;

impl Clock {
    /// Not compared yet.
    pub const ZERO: Self = Self { sched_minus_mono_ns: [NOT_COMPARED; COMPARISONS], count: 0, reserved: 0 };

    /// The difference to believe, if there was any comparison.
    #[must_use]
    pub const fn best(&self) -> Option<i64> {
        let [a, b, c, d] = self.sched_minus_mono_ns;
        let best = larger(larger(a, b), larger(c, d));
        if best == NOT_COMPARED { None } else { Some(best) }
    }
}

const fn larger(a: i64, b: i64) -> i64 {
    if a > b { a } else { b }
}

/// Byte offsets into kernel structures, found in the running kernel's BTF when the programs are loaded.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layout {
    /// `task_struct.pid`: the thread id.
    pub task_pid: u32,
    /// `task_struct.on_cpu`.
    pub task_on_cpu: u32,
    /// `task_struct.start_boottime`.
    pub task_start_boottime: u32,
    /// `task_struct.se.sum_exec_runtime`.
    pub task_sum_exec_runtime: u32,
    /// `task_struct.se.exec_start`.
    pub task_exec_start: u32,
    /// `task_struct.se.cfs_rq`.
    pub task_cfs_rq: u32,
    /// `task_struct.sched_info.run_delay`.
    pub task_run_delay: u32,
    /// `task_struct.sched_info.last_queued`.
    pub task_last_queued: u32,
    /// `cfs_rq.rq`.
    pub cfs_rq_rq: u32,
    /// `rq.clock`.
    pub rq_clock: u32,
    /// `rq.clock_task`.
    pub rq_clock_task: u32,
}

impl Layout {
    /// Before the offsets are known.
    pub const ZERO: Self = Self {
        task_pid: 0,
        task_on_cpu: 0,
        task_start_boottime: 0,
        task_sum_exec_runtime: 0,
        task_exec_start: 0,
        task_cfs_rq: 0,
        task_run_delay: 0,
        task_last_queued: 0,
        cfs_rq_rq: 0,
        rq_clock: 0,
        rq_clock_task: 0,
    };
}

const _: () = assert!(size_of::<Thread>() == 56); // no padding
const _: () = assert!(size_of::<Reading>() == 56);
const _: () = assert!(size_of::<Clock>() == 40);
const _: () = assert!(size_of::<Layout>() == 44);
const _: () = assert!(THREADS as usize * 4 == TABLE_ENTRIES && THREADS.is_multiple_of(READ_BATCH));

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn table_start_stays_inside_the_table() {
        for tid in [0, 1, 65_535, 65_536, 4_194_303, u32::MAX] {
            assert!((table_start(tid) as usize) < TABLE_ENTRIES, "{tid}");
        }
    }

    #[test]
    fn the_largest_comparison_is_believed() {
        assert_eq!(Clock::ZERO.best(), None);
        let clock = Clock { sched_minus_mono_ns: [-7, -5, NOT_COMPARED, -9], ..Clock::ZERO };
        assert_eq!(clock.best(), Some(-5));
    }

    #[test]
    fn table_entry_is_found_by_its_own_tid_only() {
        let entry = table_entry(4_194_303, 8_191);
        assert_eq!(table_slot(entry, 4_194_303), Some(8_191));
        assert_eq!(table_slot(entry, 4_194_302), None);
        assert_eq!(table_slot(0, 1), None);
    }
}
