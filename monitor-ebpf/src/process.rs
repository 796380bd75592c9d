//! CPU time of whole processes, and notice of threads and processes that come and go.
//!
//! The kernel keeps what each thread has used, so the total of a process costs nothing while it runs: `read_processes`
//! adds up the threads when user space asks. Only their ends are counted as they happen: what the kernel itself keeps of
//! them (`signal->sum_sched_runtime`) lacks the time since the last update of each, which may be all a short thread had.

use core::{
    ffi::c_void,
    intrinsics::{AtomicOrdering, atomic_xadd},
};

use aya_ebpf::{
    bindings::BPF_F_MMAPABLE,
    helpers::{bpf_ktime_get_ns, generated::bpf_loop},
    macros::{btf_tracepoint, map, raw_tracepoint},
    maps::{Array, HashMap, RingBuf},
    programs::{BtfTracePointContext, RawTracePointContext},
};
use monitor_ebpf::{
    CHANGE_END, CHANGE_EXEC, CHANGE_THREADS, CHANGES_BYTES, CLASSES, Change, PROCESS_GONE, PROCESS_READ,
    PROCESS_THREADS, PROCESS_TORN, PROCESSES, Process, ProcessReading, begins, class_of,
};

use crate::{
    kernel::{Address, LAYOUT, load, offset, probe},
    sched::{get, open_run, scheduler_clock, set, slots_to_read},
};

#[map(name = "PROCESS_OF")]
static PROCESS_OF: HashMap<u32, u32> = HashMap::with_max_entries(PROCESSES, 0);
#[map(name = "PROCESSES")]
static PROCESS_SLOTS: Array<Process> = Array::with_max_entries(PROCESSES, BPF_F_MMAPABLE);
#[map(name = "PROCESS_READ")]
static PROCESS_READINGS: Array<ProcessReading> = Array::with_max_entries(PROCESSES, BPF_F_MMAPABLE);
#[map(name = "CHANGES")]
static CHANGES: RingBuf = RingBuf::with_byte_size(CHANGES_BYTES, 0);

/// The slot of a followed process.
#[inline(always)]
pub(crate) fn followed_process(tgid: u32) -> Option<&'static mut Process> {
    // SAFETY: the value is a number that user space replaces as a whole.
    let slot = unsafe { PROCESS_OF.get(tgid) }?;
    // SAFETY: a valid map value; its fields are changed by volatile stores or atomic additions.
    let process = unsafe { PROCESS_SLOTS.get_ptr_mut(*slot)?.as_mut()? };
    (process.tgid == tgid).then_some(process)
}

/// Notes where the first thread of a followed process is, and what threads that ended before had used.
#[inline(always)]
pub(crate) fn note_process(tgid: u32, task: Address) {
    if let Some(process) = followed_process(tgid)
        && process.task == 0
    {
        // SAFETY: the caller's task is a pointer the verifier trusts.
        let signal: u64 = unsafe { load(task, offset(&LAYOUT.task_signal)) };
        let earlier = probe(signal, offset(&LAYOUT.signal_sum_sched_runtime));
        set(&mut process.earlier_ns, earlier.unwrap_or(0));
        set(&mut process.threads, signal + u64::from(offset(&LAYOUT.signal_thread_head)));
        // SAFETY: the caller's task is a pointer the verifier trusts.
        set(&mut process.start_boottime_ns, unsafe { load(task, offset(&LAYOUT.task_start_boottime)) });
        set(&mut process.task, task as u64);
    }
}

/// `trace_sched_process_exit(struct task_struct *p, bool group_dead)` (one argument before Linux 6.17), in the thread
/// that ends: from now until [`thread_ended`] it may be missing among the threads of its process.
#[btf_tracepoint(function = "sched_process_exit")]
pub(crate) fn thread_ends(ctx: BtfTracePointContext) -> i32 {
    let task: Address = ctx.arg(0);
    // SAFETY: an argument of a BTF tracepoint.
    let (tid, tgid): (u32, u32) =
        unsafe { (load(task, offset(&LAYOUT.task_pid)), load(task, offset(&LAYOUT.task_tgid))) };
    if let Some(process) = followed_process(tgid) {
        add(&mut process.ending, 1);
        notify(process, if tid == tgid { CHANGE_END } else { CHANGE_THREADS });
    }
    0
}

/// A thread leaves its CPU for the last time: adds its CPU time, nanoseconds, to those of its class that ended, if its
/// process is followed.
#[inline(never)]
pub(crate) fn thread_ended(task: u64) -> Option<()> {
    let process = followed_process(probe(task, offset(&LAYOUT.task_tgid))?)?;
    let class = class_of(&probe(task, offset(&LAYOUT.task_comm))?);
    add(process.ended_ns.get_mut(class)?, probe(task, offset(&LAYOUT.task_sum_exec_runtime))?);
    add(&mut process.ended, 1);
    Some(())
}

/// `trace_task_rename(struct task_struct *task, const char *comm)`: QEMU names a thread once it runs.
#[btf_tracepoint(function = "task_rename")]
pub(crate) fn thread_renamed(ctx: BtfTracePointContext) -> i32 {
    let task: Address = ctx.arg(0);
    // SAFETY: an argument of a BTF tracepoint.
    let tgid: u32 = unsafe { load(task, offset(&LAYOUT.task_tgid)) };
    if let Some(process) = followed_process(tgid) {
        notify(process, CHANGE_THREADS);
    }
    0
}

/// `trace_sched_process_exec(struct task_struct *p, pid_t old_pid, struct linux_binprm *bprm)`: tells of a program whose
/// name begins with `qemu` or `kvm`. The task has its new name by now.
#[btf_tracepoint(function = "sched_process_exec")]
pub(crate) fn process_began(ctx: BtfTracePointContext) -> i32 {
    let task: Address = ctx.arg(0);
    let Some(comm) = probe::<[u8; 16]>(task as u64, offset(&LAYOUT.task_comm)) else { return 0 };
    if begins(&comm, b"qemu") || begins(&comm, b"kvm") {
        // SAFETY: an argument of a BTF tracepoint.
        tell(unsafe { load(task, offset(&LAYOUT.task_tgid)) }, CHANGE_EXEC);
    }
    0
}

/// Tells user space once, until it has taken note.
#[inline(always)]
fn notify(process: &mut Process, kind: u32) {
    if kind == CHANGE_END || get(&process.changed) == 0 {
        set(&mut process.changed, 1);
        if !tell(process.tgid, kind) {
            set(&mut process.changed, 0);
        }
    }
}

/// False if the ring buffer has no room.
#[inline(always)]
fn tell(tgid: u32, kind: u32) -> bool {
    CHANGES.output::<Change>(Change { tgid, kind }, 0).is_ok()
}

/// `*place += ns` in one step, whatever other CPUs do at the same time.
#[inline(always)]
pub(crate) fn add(place: &mut u64, ns: u64) {
    // SAFETY: a reference is writable and aligned.
    unsafe { atomic_xadd::<u64, u64, { AtomicOrdering::Relaxed }>(place, ns) };
}

/// As [`add`]; returns what was there before. Of a relaxed addition the compiler forgets that the result is used.
#[inline(always)]
pub(crate) fn fetch_add(place: &mut u64, value: u64) -> u64 {
    // SAFETY: a reference is writable and aligned.
    unsafe { atomic_xadd::<u64, u64, { AtomicOrdering::AcqRel }>(place, value) }
}

/// Not attached to anything: user space runs it with the slots to read as its arguments. Reads processes.
#[raw_tracepoint(tracepoint = "read_processes")]
pub(crate) fn read_processes(ctx: RawTracePointContext) -> i32 {
    let (first, count) = slots_to_read(&ctx);
    // SAFETY: plain helper call.
    let Some(now) = scheduler_clock(unsafe { bpf_ktime_get_ns() }) else { return 0 };
    let mut batch = Batch { first, now };
    let callback: extern "C" fn(u64, &mut Batch) -> u64 = read_one;
    // SAFETY: the callback has the prototype that `bpf_loop` calls, and the batch outlives the call.
    unsafe {
        bpf_loop(count, callback as *mut c_void, (&raw mut batch).cast::<c_void>(), 0);
    }
    0
}

struct Batch {
    first: u64,
    /// The scheduler's clock, nanoseconds.
    now: u64,
}

/// Called by `bpf_loop` for each process.
extern "C" fn read_one(i: u64, batch: &mut Batch) -> u64 {
    let Ok(slot) = u32::try_from(batch.first + i) else { return 1 };
    let (Some(process), Some(reading)) = (PROCESS_SLOTS.get_ptr(slot), PROCESS_READINGS.get_ptr_mut(slot))
    else {
        return 1;
    };
    // SAFETY: valid map values; `read_processes` alone writes readings, one run at a time.
    let (process, reading) = unsafe { (&*process, &mut *reading) };
    reading.start_boottime_ns = process.start_boottime_ns;
    reading.status =
        if is(process) { read(process, reading, batch.now).unwrap_or(PROCESS_TORN) } else { PROCESS_GONE };
    0
}

/// Whether the task still is the process's first thread.
#[inline(always)]
fn is(process: &Process) -> bool {
    process.task != 0
        && probe(process.task, offset(&LAYOUT.task_start_boottime)) == Some(process.start_boottime_ns)
}

/// One walk over the threads; `None` if one ended meanwhile or a figure could not be read.
#[inline(always)]
fn read(process: &Process, reading: &mut ProcessReading, now: u64) -> Option<u32> {
    let ending = get(&process.ending);
    // One that had begun to end when the process began to be followed only counts as ended.
    if get(&process.ended) < ending {
        return None;
    }
    let head = process.threads;
    let [a, b, c, d, e] = &process.ended_ns;
    let mut walk = Walk {
        now,
        head,
        node: probe(head, 0)?,
        threads: 0,
        classes: [get(a), get(b), get(c), get(d), get(e)],
    };
    let callback: extern "C" fn(u64, &mut Walk) -> u64 = step;
    // SAFETY: the callback has the prototype that `bpf_loop` calls, and the walk outlives the call.
    unsafe {
        bpf_loop(PROCESS_THREADS, callback as *mut c_void, (&raw mut walk).cast::<c_void>(), 0);
    }
    if get(&process.ending) != ending || walk.node != head {
        return None;
    }
    reading.threads = walk.threads;
    reading.earlier_ns = process.earlier_ns;
    reading.class_ns = walk.classes;
    Some(PROCESS_READ)
}

/// Where the walk over the threads of a process is.
struct Walk {
    /// The scheduler's clock, nanoseconds.
    now: u64,
    /// Address of `signal_struct.thread_head`.
    head: u64,
    /// Address of the next thread's `thread_node`; 0 if the walk failed.
    node: u64,
    threads: u32,
    classes: [u64; CLASSES],
}

/// Called by `bpf_loop` for each thread; not 0 ends the loop.
extern "C" fn step(_i: u64, walk: &mut Walk) -> u64 {
    if walk.node == walk.head {
        return 1;
    }
    walk.node = add_thread(walk).unwrap_or(0);
    u64::from(walk.node == 0)
}

/// Adds one thread; the next one's node.
#[inline(always)]
fn add_thread(walk: &mut Walk) -> Option<u64> {
    let task = walk.node - u64::from(offset(&LAYOUT.task_thread_node));
    let run = thread_time(task, walk.now)?;
    // One that has ended and waits for its parent is counted as ended.
    if probe::<u32>(task, offset(&LAYOUT.task_exit_state))? != 0 {
        return probe(walk.node, 0);
    }
    let class = class_of(&probe(task, offset(&LAYOUT.task_comm))?);
    if let Some(sum) = walk.classes.get_mut(class) {
        *sum += run;
    }
    walk.threads += 1;
    probe(walk.node, 0)
}

/// CPU time of a thread, the run in progress included.
#[inline(always)]
fn thread_time(task: u64, now: u64) -> Option<u64> {
    // First, so that one that leaves its CPU meanwhile has in its figure what it did there.
    let on_cpu: u32 = probe(task, offset(&LAYOUT.task_on_cpu))?;
    let run: u64 = probe(task, offset(&LAYOUT.task_sum_exec_runtime))?;
    if on_cpu == 0 {
        return Some(run);
    }
    Some(run + open_run(task, run, now)?)
}
