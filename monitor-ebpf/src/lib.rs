//! Every byte that crosses the boundary between the kernel programs and user space.
//!
//! This half has no dependency and builds for the host and for BPF. The programs themselves are the binary
//! `probes` of this package. Nothing here knows what a VM is: the kernel side follows *threads* that user
//! space names, and keeps for each what the scheduler itself counted.
//!
//! A derived `Default` on a type used by the programs would become a `memset` call that the BPF linker
//! refuses, hence the `ZERO` constants.
#![no_std]

mod exits;
mod shared;

pub use exits::*;
pub use shared::*;

/// Thread ids modulo this have a place in [`Filter`].
pub const TID_PLACES: u32 = 65_536;
/// 64-bit words of the marks in [`Filter`] (16 KiB).
pub const MARK_WORDS: usize = (TID_PLACES / MARKS_PER_WORD) as usize;
/// Thread ids whose marks are in one word.
pub const MARKS_PER_WORD: u32 = 32;
/// Threads that can be followed at once.
pub const THREADS: u32 = 8_192;
/// Followed threads that may share a place in [`Filter`].
pub const CHAIN: u32 = 8;
/// Threads or processes that one run of a reading program reads at most, which takes some 0.1 ms: nothing else runs on its CPU
/// meanwhile where the kernel does not preempt itself. Its arguments are `[first slot, how many]`.
pub const READ_BATCH: u32 = 256;

/// What every switch of the host looks at, and where it finds the followed threads: in one map, because each look-up costs.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Filter {
    /// Two bits per thread id modulo [`TID_PLACES`]: [`MARK_FOLLOWED`], [`MARK_ARRIVES`].
    pub marks: [u64; MARK_WORDS],
    /// CPUs whose history is being written: not 0 while a followed thread waited there lately. A program makes it [`ARMED`]
    /// when it sees such a wait; user space takes 1 off from time to time, so that other CPUs pay nothing and yet no
    /// wait in progress loses its history at once.
    pub armed: [u8; CPUS as usize],
    /// By thread id modulo [`TID_PLACES`]: slot of a followed thread with such an id, plus 1; 0 = none. [`Thread::next`] leads
    /// to the others. The threads of a VM were mostly made one after the other, and so share cache lines here.
    pub first: [u16; TID_PLACES as usize],
}

/// A thread with such an id is followed: look at it when it leaves its CPU.
pub const MARK_FOLLOWED: u64 = 1;
/// Look at it when it gets a CPU, too. What the scheduler keeps itself until the thread leaves needs no look.
pub const MARK_ARRIVES: u64 = 2;

/// Word of [`Filter::marks`], and position of the two bits in it, for a thread id.
#[must_use]
#[inline(always)]
pub const fn mark_place(tid: u32) -> (usize, u32) {
    let place = tid % TID_PLACES;
    ((place / MARKS_PER_WORD) as usize, place % MARKS_PER_WORD * 2)
}

/// See [`Filter::armed`].
pub const ARMED: u8 = 2;

/// A followed thread, in the slot that user space gave it.
///
/// What is marked so is written by user space; the rest by the programs: by `seed_threads` when the thread is first
/// followed, then by `sched_switch` on the CPU that the thread leaves. Counts begin when it is followed. What lies between its
/// last leave and now, a run included, is known from the scheduler's own figures: nothing of it is here.
/// What each switch needs is in the first 64 bytes, one cache line; what it leaves to be sorted later, in the next; what few
/// switches need, or only a reader, in the last.
#[repr(C, align(64))]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Thread {
    /// Thread id in the initial pid namespace; 0 is a free slot. User space.
    pub tid: u32,
    /// Odd while a switch changes what follows or the histograms, and different after it.
    pub sequence: u32,
    /// One of the `STATE_…` numbers, as of the last switch away.
    pub state: u8,
    /// Which of its two [`ChargeTables`] is in use, 0 or 1. User space.
    pub table: u8,
    /// Where the programs put the number of a culprit, to read it back as one the verifier knows nothing of: else Linux
    /// 6.1 follows every number of every stint to its end, and gives up after a million instructions.
    pub found: u8,
    /// How many of `log` are not in the histograms yet.
    pub logged: u8,
    /// Place of its histograms and charges, plus 1; 0 = none are kept; or [`CLOCK_THREAD`]. User space.
    pub histograms: u16,
    /// Place of its group of siblings, plus 1; 0 = none. User space.
    pub group: u16,
    /// Scheduler clock at the last switch away, nanoseconds; 0 = none yet.
    pub since_ns: u64,
    /// `se.sum_exec_runtime` at the last switch away, nanoseconds since the thread started.
    pub run_ns: u64,
    /// `sched_info.run_delay` at the last switch away, nanoseconds since the thread started.
    pub wait_ns: u64,
    /// Time between the switches to and away, by the scheduler clock, nanoseconds: run time, interrupts and steal.
    pub on_cpu_ns: u64,
    /// Switches away while it could have run on.
    pub preemptions: u32,
    /// Switches away because it had nothing to do.
    pub yields: u32,
    /// CPU that it left last, plus 1; 0 = none yet.
    pub last_cpu: u16,
    /// Slot of another followed thread at the same place of [`Filter::first`], plus 1; 0 = none. User space.
    pub next: u16,
    /// One of the `STATE_…` numbers: as what it counts in its group. [`STATE_ON_CPU`] if it was seen to come, which needs
    /// [`MARK_ARRIVES`]; else what it was when it left.
    pub counts_as: u8,
    /// Not 0 if its waits are charged; it is marked with [`MARK_ARRIVES`] then. User space.
    pub charged: u8,
    /// For each of its two tables: place of the culprit in `recent`.
    pub likely: [u8; 2],
    /// For each of its two tables: who was charged last, and will be again.
    pub recent: [Recent; 2],
    /// Runs that ended and the waits before them, for the histograms; see [`Logged`].
    pub log: [Logged; LOG],
    /// While its state is [`STATE_THROTTLED`]: how long its `cfs_rq` had been throttled altogether when it began,
    /// nanoseconds.
    pub throttled_before_ns: u64,
    /// Switches to on another CPU than the last.
    pub migrations: u32,
    /// Those of them that led to another NUMA node.
    pub node_migrations: u32,
    /// Part of the finished waits in which a CFS quota kept it from running, nanoseconds.
    pub throttled_ns: u64,
    /// Address of the `task_struct`, 0 until the thread was seen. Only ever read through
    /// `bpf_probe_read_kernel`, and believed only while the id found there is `tid`.
    pub task: u64,
    /// `task_struct.start_boottime`, nanoseconds: tells a reused thread id from the thread meant.
    pub start_boottime_ns: u64,
}

/// Runs of a thread that are remembered before they are put into its histograms all at once. The histograms of a host's
/// threads are in no cache and on a page each: to visit them costs several times what the rest of a switch does.
pub const LOG: usize = 18;

/// Where a run that ended, and the wait before it, belong in the histograms.
#[repr(C, align(4))]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Logged {
    /// [`bucket`] of the run.
    pub run: u16,
    /// [`bucket`] of the wait; [`NO_WAIT`] if there was none.
    pub wait: u16,
}

/// No bucket.
pub const NO_WAIT: u16 = u16::MAX;

impl Logged {
    /// Nothing.
    pub const ZERO: Self = Self { run: 0, wait: NO_WAIT };

    /// Of a run, and of the wait before it unless that is 0; both nanoseconds.
    #[inline(always)]
    #[must_use]
    #[expect(clippy::cast_possible_truncation, reason = "buckets are fewer")]
    pub const fn new(run: u64, wait: u64) -> Self {
        Self { run: bucket(run) as u16, wait: if wait == 0 { NO_WAIT } else { bucket(wait) as u16 } }
    }
}

/// A culprit that is charged again and again, and what it was not charged yet: where the thread's other figures are,
/// because the table is on another page.
#[repr(C, align(8))]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Recent {
    /// See [`Recent::who`]; 0 = nobody.
    pub who: u32,
    /// To be added to [`Culprit::ns`], nanoseconds; what would be more than fits is added at once.
    pub ns: u32,
}

impl Recent {
    /// Nobody.
    pub const ZERO: Self = Self { who: 0, ns: 0 };

    /// Kind and id of a culprit in one number: ids are below 2²² (`PID_MAX_LIMIT` of include/linux/threads.h).
    #[inline(always)]
    #[must_use]
    pub const fn who(kind: u32, id: u32) -> u32 {
        kind << 22 | id
    }
}

impl Thread {
    /// A free slot.
    pub const ZERO: Self = Self {
        tid: 0,
        sequence: 0,
        state: STATE_UNKNOWN,
        table: 0,
        found: 0,
        logged: 0,
        histograms: 0,
        group: 0,
        since_ns: 0,
        run_ns: 0,
        wait_ns: 0,
        on_cpu_ns: 0,
        preemptions: 0,
        yields: 0,
        last_cpu: 0,
        next: 0,
        counts_as: STATE_UNKNOWN,
        charged: 0,
        likely: [0; 2],
        recent: [Recent::ZERO; 2],
        log: [Logged::ZERO; LOG],
        throttled_before_ns: 0,
        migrations: 0,
        node_migrations: 0,
        throttled_ns: 0,
        task: 0,
        start_boottime_ns: 0,
    };
}

/// The thread is kvm-monitor's own: each time it enters or leaves a CPU the scheduler clock is compared with
/// `CLOCK_MONOTONIC`, so that no program has to read a clock for the threads that are accounted.
pub const CLOCK_THREAD: u16 = u16::MAX;

/// Not switched away since it is followed; `task_struct.on_cpu` decides whether it is on a CPU.
pub const STATE_UNKNOWN: u8 = 0;
/// Was seen to get a CPU since.
pub const STATE_ON_CPU: u8 = 1;
/// Left its CPU to sleep.
pub const STATE_SLEEPING: u8 = 2;
/// Left its CPU, but could have run on.
pub const STATE_PREEMPTED: u8 = 3;
/// Left its CPU because the CFS quota of its cgroup was used up.
pub const STATE_THROTTLED: u8 = 4;
/// Lost its CPU when it was about to sleep. The kernel does not take it for one that waits (`sched_info_depart()`).
pub const STATE_INTERRUPTED: u8 = 5;
/// Left its CPU for the last time. Whoever gets its id afterwards is another thread.
pub const STATE_ENDED: u8 = 6;

/// Groups of siblings that can be kept at once.
pub const GROUPS: u32 = 2_048;

/// Threads that are siblings, the vCPUs of one domain: how many run and wait, and how long some did both.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Group {
    /// How many run in the lower half, how many wait in the upper: changed by atomic additions.
    pub members: u64,
    /// Time in which at least one waited while another ran, nanoseconds by the scheduler clock; while that is so now, minus
    /// the clock at its begin.
    pub both_ns: u64,
    /// Scheduler clock at the last change of `members`.
    pub changed_ns: u64,
    /// What `both_ns` was at the moment at which its members were read; [`Group::TORN`] if it could not be read.
    pub read_ns: u64,
}

impl Group {
    /// Nobody.
    pub const ZERO: Self = Self { members: 0, both_ns: 0, changed_ns: 0, read_ns: Self::TORN };
    /// Not read, or it changed under every attempt to.
    pub const TORN: u64 = u64::MAX;
    /// One that runs, in [`Group::members`].
    pub const RUNS: u64 = 1;
    /// One that waits.
    pub const WAITS: u64 = 1 << 32;

    /// What a thread adds to [`Group::members`] in a state.
    #[must_use]
    #[inline(always)]
    pub const fn share(state: u8) -> u64 {
        match state {
            STATE_ON_CPU => Self::RUNS,
            STATE_PREEMPTED | STATE_THROTTLED => Self::WAITS,
            _ => 0,
        }
    }

    /// Whether one waits while another runs.
    #[must_use]
    #[inline(always)]
    pub const fn both(members: u64) -> bool {
        members >> 32 != 0 && members & 0xffff_ffff != 0
    }
}

/// NUMA node of each CPU, for the first [`CPUS`], at the place CPU plus 1, as [`Thread::last_cpu`] is kept. A program that
/// subtracts 1 itself is refused by Linux 6.1: its verifier does not know that what is not 0 is at least 1.
pub type Nodes = [u8; CPUS as usize + 1];

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
    /// Time on a CPU by the scheduler clock, nanoseconds since some moment before the thread was followed.
    pub on_cpu_ns: u64,
    /// Part of `run_ns` that lies after the kernel's own last update of its figure.
    pub open_run_ns: u64,
    /// Part of `wait_ns` that is a wait still in progress.
    pub open_wait_ns: u64,
    /// The scheduler clock of the reading, nanoseconds.
    pub sched_ns: u64,
    /// `CLOCK_MONOTONIC` of the reading, nanoseconds.
    pub read_at_ns: u64,
    /// As in [`Thread`].
    pub preemptions: u32,
    /// As in [`Thread`].
    pub yields: u32,
    /// Runs after a switch away to sleep, one in progress included: the wakeups that led to a run.
    pub wakeups: u32,
    /// As in [`Thread`], that of a run in progress included.
    pub migrations: u32,
    /// As in [`Thread`], that of a run in progress included.
    pub node_migrations: u32,
    /// What it does at this moment: [`NOW_RUNNING`], [`NOW_WAITING`] or [`NOW_SLEEPING`].
    pub doing: u32,
    /// As in [`Thread`], a wait in progress included.
    pub throttled_ns: u64,
}

impl Reading {
    /// No reading.
    pub const ZERO: Self = Self {
        tid: 0,
        status: READ_NOTHING,
        start_boottime_ns: 0,
        run_ns: 0,
        wait_ns: 0,
        on_cpu_ns: 0,
        open_run_ns: 0,
        open_wait_ns: 0,
        sched_ns: 0,
        read_at_ns: 0,
        preemptions: 0,
        yields: 0,
        wakeups: 0,
        migrations: 0,
        node_migrations: 0,
        doing: 0,
        throttled_ns: 0,
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

/// The thread runs.
pub const NOW_RUNNING: u32 = 1;
/// It could run, but something else does.
pub const NOW_WAITING: u32 = 2;
/// It has nothing to do.
pub const NOW_SLEEPING: u32 = 3;

/// Sub-buckets of one power of two of a [`Histogram`]: the relative error is at most 1/16.
pub const SUB_BUCKETS: u32 = 16;
/// Powers of two that are divided so; see [`bucket`].
pub const POWERS: u32 = 32;
/// Buckets of a histogram.
pub const BUCKETS: usize = LAST_BUCKET as usize + 1;
const LAST_BUCKET: u32 = SUB_BUCKETS * POWERS - 1;
/// Values below this, 2⁶ ns, share the first sub-buckets linearly.
const LINEAR_LOG2: u32 = 6;

/// Counts of durations by length, base 2 with linear sub-buckets.
pub type Histogram = [u32; BUCKETS];

/// The distributions of one thread, cumulative since it is followed.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Histograms {
    /// Lengths of finished waits: from wakeup or preemption to the next run.
    pub wait: Histogram,
    /// Lengths of runs, from the switch to the thread to the switch away, by the task clock.
    pub run: Histogram,
    /// Nothing. Without it the histograms of all threads would begin 4096 bytes apart, and their usual buckets would
    /// share a few sets of the caches.
    pub stagger: [u64; 8],
}

impl Histograms {
    /// Nothing counted.
    pub const ZERO: Self = Self { wait: [0; BUCKETS], run: [0; BUCKETS], stagger: [0; 8] };

    /// Counts a run, and the wait before it if there was one.
    #[inline(always)]
    pub fn count(&mut self, logged: Logged) {
        count(&mut self.run, logged.run);
        count(&mut self.wait, logged.wait);
    }
}

#[inline(always)]
fn count(histogram: &mut Histogram, bucket: u16) {
    if let Some(count) = histogram.get_mut(usize::from(bucket)) {
        *count = count.wrapping_add(1);
    }
}

/// Histograms that can be kept at once, unless user space asks for another number when it loads the programs, as for all
/// arrays of many entries.
pub const HISTOGRAMS: u32 = 1_024;

/// The bucket of a duration: 16 linear ones below 2⁶ ns (4 ns each), then 16 for each power of two up to 2³⁷ ns
/// (137 s); longer ones count in the last.
#[must_use]
#[inline(always)]
#[expect(clippy::cast_possible_truncation, reason = "what is cast is below 32 or masked")]
pub const fn bucket(ns: u64) -> u32 {
    if ns < 1 << LINEAR_LOG2 {
        return (ns >> (LINEAR_LOG2 - 4)) as u32;
    }
    let power = log2(ns);
    let sub = (ns >> (power - 4)) as u32 & (SUB_BUCKETS - 1);
    let index = (power - LINEAR_LOG2 + 1) * SUB_BUCKETS + sub;
    if index < LAST_BUCKET { index } else { LAST_BUCKET }
}

/// Position of the highest bit of a number that is not 0. BPF has no instruction for it. Of a byte it is looked up:
/// further halving would branch on bits that differ from one duration to the next, which no CPU foresees.
#[inline(always)]
const fn log2(mut value: u64) -> u32 {
    let mut log = 0;
    let mut step = 32;
    while step > 4 {
        if value >> step != 0 {
            value >>= step;
            log += step;
        }
        step /= 2;
    }
    log + LOG2_OF_BYTE[(value & 0xff) as usize] as u32
}

/// Position of the highest bit of each byte; 0 for 0.
static LOG2_OF_BYTE: [u8; 256] = {
    let mut table = [0; 256];
    let mut byte = 2;
    while byte < 256 {
        table[byte] = table[byte / 2] + 1;
        byte += 1;
    }
    table
};

/// The durations that a bucket stands for, nanoseconds: from the first to before the second. The last bucket has no
/// upper end; it is given as `u64::MAX`.
#[must_use]
pub const fn bucket_range(index: u32) -> (u64, u64) {
    let low = bucket_low(index);
    if index < LAST_BUCKET { (low, bucket_low(index + 1)) } else { (low, u64::MAX) }
}

const fn bucket_low(index: u32) -> u64 {
    let (power, sub) = (index / SUB_BUCKETS, (index % SUB_BUCKETS) as u64);
    if power == 0 {
        sub << (LINEAR_LOG2 - 4)
    } else {
        let power = power - 1 + LINEAR_LOG2;
        (1 << power) + (sub << (power - 4))
    }
}

/// Culprits of one thread that are told apart; what the rest took is summed.
pub const CULPRITS: usize = 16;

/// Who had the CPU while a thread waited for it.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Culprit {
    /// Process id, or thread id of a kernel thread; 0 for [`KIND_IDLE`] and [`KIND_IRQ`].
    pub id: u32,
    /// [`KIND_PROCESS`], [`KIND_KERNEL`], [`KIND_IDLE`] or [`KIND_IRQ`]; 0 = this entry is free.
    pub kind: u32,
    /// Time charged, nanoseconds by the scheduler clock.
    pub ns: u64,
    /// Name of the thread that was charged first, as the kernel has it: up to a 0 byte.
    pub comm: [u8; 16],
}

/// A thread of a process.
pub const KIND_PROCESS: u32 = 1;
/// A kernel thread, or one of vhost's, which since Linux 6.4 are threads of the process.
pub const KIND_KERNEL: u32 = 2;
/// Nobody: the CPU was idle and had to wake up.
pub const KIND_IDLE: u32 = 3;
/// Interrupts, or a hypervisor below this host: what the task clock left out of a thread's time on the CPU.
pub const KIND_IRQ: u32 = 4;

/// Finished waits of one thread, charged to who had the CPU.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Charges {
    /// In the order they were first charged.
    pub culprits: [Culprit; CULPRITS],
    /// Charged to others than those, nanoseconds.
    pub other_ns: u64,
    /// Time waited for which nobody could be named, nanoseconds: on another CPU before a migration, or longer ago
    /// than the history reaches.
    pub unknown_ns: u64,
}

impl Charges {
    /// Nothing charged.
    pub const ZERO: Self = Self {
        culprits: [Culprit { id: 0, kind: 0, ns: 0, comm: [0; 16] }; CULPRITS],
        other_ns: 0,
        unknown_ns: 0,
    };
}

/// Two tables for one thread: the programs charge to the one that user space chose ([`Thread::table`]), user space reads
/// the other.
#[repr(C, align(64))]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ChargeTables {
    /// The tables.
    pub tables: [Charges; 2],
}

impl ChargeTables {
    /// Nothing charged.
    pub const ZERO: Self = Self { tables: [Charges::ZERO; 2] };
}

/// Stints on one CPU that are remembered while somebody waits for it; a power of two.
pub const STINTS: usize = 256;
/// CPUs whose history is kept; waits on others have no culprits.
pub const CPUS: u32 = 1_024;

/// One thread's time on a CPU.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stint {
    /// Scheduler clock when it came, nanoseconds; 0 for the idle task.
    pub begin_ns: u64,
    /// Scheduler clock when it left, nanoseconds.
    pub end_ns: u64,
    /// Address of its `task_struct`.
    pub task: u64,
    /// Its thread id, to see whether the address still means it; 0 for the idle task.
    pub tid: u32,
    /// Its process id.
    pub tgid: u32,
    /// Its `task_struct.flags`.
    pub flags: u32,
    /// Nothing; there is no padding.
    pub reserved: u32,
    /// Part of it that the task clock left out, nanoseconds.
    pub irq_ns: u64,
}

/// The last stints on one CPU that ended while somebody waited for it; only that CPU writes.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct History {
    /// Stints written so far, modulo 2³².
    pub count: u32,
    /// Nothing; there is no padding.
    pub reserved: u32,
    /// The last of them.
    pub stints: [Stint; STINTS],
}

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
    /// `task_struct.on_rq`: 0 from when it begins to fall asleep.
    pub task_on_rq: u32,
    /// `task_struct.thread_info.cpu`, `task_struct.cpu` before Linux 5.16: the CPU that it is on or was last.
    pub task_cpu: u32,
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
    /// `task_struct.sched_info.last_arrival`.
    pub task_last_arrival: u32,
    /// `task_struct.tgid`.
    pub task_tgid: u32,
    /// `task_struct.flags`.
    pub task_flags: u32,
    /// `task_struct.comm`.
    pub task_comm: u32,
    /// `task_struct.prio`: 100 and more for threads of the fair class.
    pub task_prio: u32,
    /// `task_struct.se.prev_sum_exec_runtime`: the run time when the fair class gave it the CPU.
    pub task_prev_sum_exec_runtime: u32,
    /// `task_struct.throttled` (Linux 6.18), [`NO_FIELD`] before.
    pub task_throttled: u32,
    /// `cfs_rq.throttle_count`, [`NO_FIELD`] without CFS quotas.
    pub cfs_rq_throttle_count: u32,
    /// `cfs_rq.throttled_clock_self` (Linux 6.6), [`NO_FIELD`] before.
    pub cfs_rq_throttled_clock_self: u32,
    /// `cfs_rq.throttled_clock_self_time`, likewise.
    pub cfs_rq_throttled_clock_self_time: u32,
    /// `task_struct.signal`.
    pub task_signal: u32,
    /// `task_struct.exit_state`.
    pub task_exit_state: u32,
    /// `task_struct.thread_node`.
    pub task_thread_node: u32,
    /// `signal_struct.thread_head`.
    pub signal_thread_head: u32,
    /// `signal_struct.sum_sched_runtime`.
    pub signal_sum_sched_runtime: u32,
    /// `cfs_rq.rq`.
    pub cfs_rq_rq: u32,
    /// `rq.nr_running`.
    pub rq_nr_running: u32,
    /// `rq.cfs.h_nr_queued`, or the same as the next where the kernel has no such field.
    pub rq_queued: u32,
    /// `rq.cfs.h_nr_runnable` (Linux 6.14): what is queued and has not gone to sleep meanwhile.
    pub rq_runnable: u32,
    /// `rq.clock`.
    pub rq_clock: u32,
    /// `rq.clock_task`.
    pub rq_clock_task: u32,
}

/// This kernel has no such field.
pub const NO_FIELD: u32 = u32::MAX;

impl Layout {
    /// Before the offsets are known.
    pub const ZERO: Self = Self {
        task_pid: 0,
        task_on_cpu: 0,
        task_on_rq: 0,
        task_cpu: 0,
        task_start_boottime: 0,
        task_sum_exec_runtime: 0,
        task_exec_start: 0,
        task_cfs_rq: 0,
        task_run_delay: 0,
        task_last_queued: 0,
        task_last_arrival: 0,
        task_tgid: 0,
        task_flags: 0,
        task_comm: 0,
        task_prio: 0,
        task_prev_sum_exec_runtime: 0,
        task_throttled: NO_FIELD,
        cfs_rq_throttle_count: NO_FIELD,
        cfs_rq_throttled_clock_self: NO_FIELD,
        cfs_rq_throttled_clock_self_time: NO_FIELD,
        task_signal: 0,
        task_exit_state: 0,
        task_thread_node: 0,
        signal_thread_head: 0,
        signal_sum_sched_runtime: 0,
        cfs_rq_rq: 0,
        rq_nr_running: 0,
        rq_queued: 0,
        rq_runnable: 0,
        rq_clock: 0,
        rq_clock_task: 0,
    };
}

const _: () = assert!(size_of::<Thread>() == 192 && core::mem::offset_of!(Thread, recent) == 64);
const _: () = assert!(size_of::<Reading>() == 104);
const _: () = assert!(size_of::<Clock>() == 40);
const _: () = assert!(size_of::<Charges>() == 528 && size_of::<ChargeTables>() == 1088);
const _: () = assert!(size_of::<History>() == 8 + 48 * STINTS);
const _: () = assert!(size_of::<Layout>() == 124);
const _: () = assert!(THREADS.is_multiple_of(READ_BATCH) && THREADS < u16::MAX as u32);
const _: () = assert!(4 * HISTOGRAMS < CLOCK_THREAD as u32);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_thread_id_has_its_own_two_bits() {
        let mut taken = [0_u64; MARK_WORDS];
        for tid in 0..TID_PLACES {
            let (word, bit) = mark_place(tid);
            assert_eq!(taken[word] >> bit & 3, 0, "{tid}");
            taken[word] |= (MARK_FOLLOWED | MARK_ARRIVES) << bit;
            assert_eq!(mark_place(tid + TID_PLACES), (word, bit));
        }
        assert!(taken.iter().all(|word| *word == u64::MAX));
    }

    #[test]
    fn buckets_follow_each_other_and_are_narrow() {
        let mut expected = 0;
        for index in 0..=LAST_BUCKET {
            let (low, high) = bucket_range(index);
            assert_eq!((low, bucket(low), bucket(high - 1)), (expected, index, index));
            if low >= 1 << LINEAR_LOG2 && high != u64::MAX {
                assert!((high - low) * 16 <= low, "bucket {index}: {low} to {high}");
            }
            expected = high;
        }
        assert_eq!(bucket(u64::MAX), LAST_BUCKET);
    }

    #[test]
    fn what_is_logged_is_counted_in_its_buckets() {
        let mut counted = Histograms::ZERO;
        for (run, wait) in [(0, 0), (70, 1), (5_000_000_000, 70), (u64::MAX, u64::MAX)] {
            counted.count(Logged::new(run, wait));
        }
        let mut expected = Histograms::ZERO;
        [0, 70, 5_000_000_000, u64::MAX].iter().for_each(|run| expected.run[bucket(*run) as usize] += 1);
        [1, 70, u64::MAX].iter().for_each(|wait| expected.wait[bucket(*wait) as usize] += 1);
        assert_eq!(counted, expected);
    }

    #[test]
    fn kind_and_id_are_one_number_for_each_culprit() {
        const LARGEST: u32 = (1 << 22) - 1;
        let kinds = [KIND_PROCESS, KIND_KERNEL, KIND_IDLE, KIND_IRQ];
        let all = kinds.map(|kind| [0, 1, LARGEST].map(|id| Recent::who(kind, id)));
        assert!(all.as_flattened().is_sorted_by(|a, b| a < b), "{all:?}");
        assert!(all[0][0] > Recent::ZERO.who);
    }

    #[test]
    fn the_largest_comparison_is_believed() {
        assert_eq!(Clock::ZERO.best(), None);
        let clock = Clock { sched_minus_mono_ns: [-7, -5, NOT_COMPARED, -9], ..Clock::ZERO };
        assert_eq!(clock.best(), Some(-5));
    }
}
