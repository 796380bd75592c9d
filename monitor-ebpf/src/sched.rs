//! Run and wait time of the followed threads, from the scheduler's own figures.
//!
//! No program here reads a clock for a followed thread (a `bpf_ktime_get_ns` costs more than all the rest):
//! when a thread leaves a CPU the kernel has just brought `se.sum_exec_runtime` and `sched_info.run_delay` up
//! to date, so the switch only copies them. What lies after that moment, a run or a wait still in progress, is
//! added by `read_threads` when user space asks.

use aya_ebpf::{
    EbpfContext,
    bindings::BPF_F_MMAPABLE,
    helpers::bpf_ktime_get_ns,
    macros::{btf_tracepoint, map, raw_tracepoint},
    maps::Array,
    programs::{BtfTracePointContext, RawTracePointContext},
};
use monitor_ebpf::{
    COMPARISONS, Clock, FILTER_BITS, Filter, READ_BATCH, READ_LAST, READ_LIVE, READ_NOTHING, READ_TORN,
    ROLE_CLOCK, Reading, STATE_OFF_CPU, STATE_ON_CPU, STATE_UNKNOWN, TABLE_ENTRIES, TABLE_PROBES, THREADS,
    Table, Thread, table_slot, table_start,
};

use crate::kernel::{Address, LAYOUT, load, offset, probe};

#[map(name = "FILTER")]
static FILTER: Array<Filter> = Array::with_max_entries(1, BPF_F_MMAPABLE);
#[map(name = "TABLE")]
static TABLE: Array<Table> = Array::with_max_entries(1, BPF_F_MMAPABLE);
#[map(name = "THREADS")]
static THREAD_SLOTS: Array<Thread> = Array::with_max_entries(THREADS, BPF_F_MMAPABLE);
#[map(name = "READINGS")]
static READINGS: Array<Reading> = Array::with_max_entries(THREADS, BPF_F_MMAPABLE);
#[map(name = "CLOCK")]
static CLOCK: Array<Clock> = Array::with_max_entries(1, BPF_F_MMAPABLE);

/// `trace_sched_switch(bool preempt, struct task_struct *prev, struct task_struct *next, unsigned int
/// prev_state)`, on the CPU that switches, with the run queue locked.
///
/// For a followed `prev`: copies `run_ns` and `wait_ns` (nanoseconds since thread start) into its slot.
/// For a followed `next`: marks it as on a CPU. Everybody else pays one bit test each.
#[btf_tracepoint(function = "sched_switch")]
pub(crate) fn sched_switch(ctx: BtfTracePointContext) -> i32 {
    let prev: Address = ctx.arg(1);
    let next: Address = ctx.arg(2);
    // SAFETY: both are arguments of a BTF tracepoint.
    let (out, into) =
        unsafe { (load::<u32>(prev, offset(&LAYOUT.task_pid)), load::<u32>(next, offset(&LAYOUT.task_pid))) };
    if let Some(thread) = followed(out) {
        leave(thread, prev);
        if thread.role == ROLE_CLOCK {
            compare_clocks(prev);
        }
    }
    if let Some(thread) = followed(into) {
        enter(thread, next);
        if thread.role == ROLE_CLOCK {
            compare_clocks(next);
        }
    }
    0
}

#[inline(always)]
fn leave(thread: &mut Thread, task: Address) {
    // SAFETY: `task` is an argument of a BTF tracepoint.
    unsafe {
        thread.run_ns = load(task, offset(&LAYOUT.task_sum_exec_runtime));
        thread.wait_ns = load(task, offset(&LAYOUT.task_run_delay));
    }
    thread.switches += 1;
    thread.state = STATE_OFF_CPU;
    note_identity(thread, task);
}

#[inline(always)]
fn enter(thread: &mut Thread, task: Address) {
    thread.state = STATE_ON_CPU;
    note_identity(thread, task);
}

#[inline(always)]
fn note_identity(thread: &mut Thread, task: Address) {
    if thread.task != task as u64 {
        thread.task = task as u64;
        // SAFETY: `task` is an argument of a BTF tracepoint or of the task iterator.
        thread.start_boottime_ns = unsafe { load(task, offset(&LAYOUT.task_start_boottime)) };
    }
}

/// The run queue's clock was read a moment ago, at the start of this switch.
#[inline(always)]
fn compare_clocks(task: Address) {
    let Some(clock) = CLOCK.get_ptr_mut(0) else { return };
    // SAFETY: each pointer was loaded through the one before, starting from a BTF tracepoint's argument;
    // `clock` is a valid map value, and this thread is on one CPU at a time.
    unsafe {
        let cfs_rq: Address = load(task, offset(&LAYOUT.task_cfs_rq));
        let rq: Address = load(cfs_rq, offset(&LAYOUT.cfs_rq_rq));
        let sched: u64 = load(rq, offset(&LAYOUT.rq_clock));
        let difference = sched.wrapping_sub(bpf_ktime_get_ns()).cast_signed();
        let clock = &mut *clock;
        clock.sched_minus_mono_ns[clock.count as usize % COMPARISONS] = difference;
        clock.count = clock.count.wrapping_add(1);
    }
}

/// The slot of a followed thread. Not followed: one bit test. A thread whose id only shares the bit pays the
/// table as well.
#[inline(always)]
fn followed(tid: u32) -> Option<&'static mut Thread> {
    let bit = tid % FILTER_BITS;
    // SAFETY: both are valid map values for the life of the program; user space changes whole words.
    let filter = unsafe { &*FILTER.get_ptr(0)? };
    if filter.0[(bit / 64) as usize] >> (bit % 64) & 1 == 0 {
        return None;
    }
    // SAFETY: as above.
    let table = unsafe { &*TABLE.get_ptr(0)? };
    let start = table_start(tid);
    for i in 0..TABLE_PROBES {
        if let Some(slot) = table_slot(table.0[(start + i) as usize % TABLE_ENTRIES], tid) {
            // SAFETY: a valid map value; at most one CPU switches a given thread at a time.
            let thread = unsafe { THREAD_SLOTS.get_ptr_mut(slot)?.as_mut()? };
            // The slot may just have been given to another thread.
            return (thread.tid == tid).then_some(thread);
        }
    }
    None
}

/// `struct bpf_iter__task { meta; task }`: run over all tasks of the host when threads begin to be followed,
/// so that a thread that never leaves its CPU is known as well.
#[unsafe(no_mangle)]
#[unsafe(link_section = "iter/task")]
extern "C" fn seed_threads(ctx: *mut core::ffi::c_void) -> i32 {
    // SAFETY: the context of a task iterator has the task at its second word, null at the end.
    let task = unsafe { *ctx.cast::<Address>().add(1) };
    if task.is_null() {
        return 0;
    }
    // SAFETY: the iterator's task is a pointer the verifier trusts.
    let tid: u32 = unsafe { load(task, offset(&LAYOUT.task_pid)) };
    if let Some(thread) = followed(tid) {
        note_identity(thread, task);
    }
    0
}

/// Not attached to anything: user space runs it with the number of the first slot as its argument. Reads
/// [`READ_BATCH`] threads into `READINGS`, the run or wait in progress included.
#[raw_tracepoint(tracepoint = "read_threads")]
pub(crate) fn read_threads(ctx: RawTracePointContext) -> i32 {
    // SAFETY: user space passes the arguments of a raw tracepoint, at least one word.
    let first = unsafe { *ctx.as_ptr().cast::<u64>() };
    let Ok(first) = u32::try_from(first) else { return 0 };
    // SAFETY: plain helper call.
    let mono = unsafe { bpf_ktime_get_ns() };
    let sched = CLOCK.get(0).and_then(Clock::best).map(|ahead| mono.wrapping_add_signed(ahead));
    for i in 0..READ_BATCH {
        let (Some(thread), Some(reading)) =
            (THREAD_SLOTS.get_ptr(first + i), READINGS.get_ptr_mut(first + i))
        else {
            return 0;
        };
        // SAFETY: valid map values; `read_threads` alone writes readings, one run at a time.
        unsafe { read_thread(&*thread, &mut *reading, Now { mono, sched }) };
    }
    0
}

#[derive(Clone, Copy)]
struct Now {
    /// `CLOCK_MONOTONIC`, nanoseconds.
    mono: u64,
    /// The scheduler's clock, nanoseconds, once it was compared.
    sched: Option<u64>,
}

#[inline(always)]
fn read_thread(thread: &Thread, reading: &mut Reading, now: Now) {
    reading.tid = thread.tid;
    reading.read_at_ns = now.mono;
    reading.start_boottime_ns = thread.start_boottime_ns;
    reading.open_run_ns = 0;
    reading.open_wait_ns = 0;
    if thread.tid == 0 || thread.task == 0 {
        reading.status = READ_NOTHING;
        return;
    }
    if probe::<u32>(thread.task, offset(&LAYOUT.task_pid)) != Some(thread.tid) {
        reading.run_ns = thread.run_ns;
        reading.wait_ns = thread.wait_ns;
        reading.status = READ_LAST;
        return;
    }
    reading.status = if read_live(thread, reading, now.sched).is_some() { READ_LIVE } else { READ_TORN };
}

/// `None` if the figures could not be read or changed meanwhile.
#[inline(always)]
fn read_live(thread: &Thread, reading: &mut Reading, sched_now: Option<u64>) -> Option<()> {
    let task = thread.task;
    let run: u64 = probe(task, offset(&LAYOUT.task_sum_exec_runtime))?;
    let wait: u64 = probe(task, offset(&LAYOUT.task_run_delay))?;
    let queued: u64 = probe(task, offset(&LAYOUT.task_last_queued))?;
    if queued != 0 {
        // sched_info_enqueue() stamps last_queued, sched_info_arrive() adds to run_delay and clears it.
        let now = sched_now?;
        reading.open_wait_ns = now.saturating_sub(queued);
    } else if on_cpu(thread)? {
        reading.open_run_ns = open_run(task, run, sched_now?)?;
    }
    reading.run_ns = run + reading.open_run_ns;
    reading.wait_ns = wait + reading.open_wait_ns;
    Some(())
}

#[inline(always)]
fn on_cpu(thread: &Thread) -> Option<bool> {
    match thread.state {
        STATE_UNKNOWN => Some(probe::<u32>(thread.task, offset(&LAYOUT.task_on_cpu))? != 0),
        state => Some(state == STATE_ON_CPU),
    }
}

/// Task-clock time since `update_curr()` last added to `sum_exec_runtime`: it stamped `exec_start` with
/// `rq->clock_task`, which lags `rq->clock` by the time that interrupts and a hypervisor below took.
#[inline(always)]
fn open_run(task: u64, run: u64, sched_now: u64) -> Option<u64> {
    let exec_start: u64 = probe(task, offset(&LAYOUT.task_exec_start))?;
    let cfs_rq: u64 = probe(task, offset(&LAYOUT.task_cfs_rq))?;
    let rq: u64 = probe(cfs_rq, offset(&LAYOUT.cfs_rq_rq))?;
    let clock: u64 = probe(rq, offset(&LAYOUT.rq_clock))?;
    let clock_task: u64 = probe(rq, offset(&LAYOUT.rq_clock_task))?;
    if probe::<u64>(task, offset(&LAYOUT.task_sum_exec_runtime))? != run
        || probe::<u64>(task, offset(&LAYOUT.task_exec_start))? != exec_start
    {
        return None;
    }
    let open = sched_now.wrapping_sub(clock.wrapping_sub(clock_task)).wrapping_sub(exec_start);
    // The scheduler clock is known to a microsecond: just after an update the difference may be below 0.
    Some(if open as i64 > 0 { open } else { 0 })
}
