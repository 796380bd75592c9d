//! Who had the CPU while a followed thread waited for it.
//!
//! Nothing is known of a waiting thread before it gets its CPU: following wakeups would cost every wakeup of the host.
//! When it does, `sched_info.last_queued` says since when it waited, and the thread that just left says since when it
//! ran. If it ran all that time the whole wait is its; this is the common case and needs no memory. Otherwise several
//! ran one after the other, and the CPU has a history of them: a stint is written down when it ends while somebody
//! is left waiting on that CPU (two or more are runnable). Only a CPU on which a followed thread was preempted or
//! waited for several others writes its history, until user space says that it may stop; the others test one byte.

use core::ffi::c_void;

use aya_ebpf::{
    bindings::BPF_F_MMAPABLE,
    helpers::{bpf_get_smp_processor_id, generated::bpf_loop},
    macros::map,
    maps::Array,
};
use monitor_ebpf::{
    CPUS, CULPRITS, ChargeTables, Charges, Culprit, HISTOGRAMS, History, KIND_IDLE, KIND_IRQ, KIND_KERNEL,
    KIND_PROCESS, Recent, STINTS, Stint, Thread,
};

use crate::kernel::{Address, LAYOUT, load, offset, probe, run_queue};
use crate::sched::{arm, filter, get, set};

#[map(name = "HISTORY")]
static HISTORY: Array<History> = Array::with_max_entries(CPUS, 0);
#[map(name = "CHARGES")]
static CHARGES: Array<ChargeTables> = Array::with_max_entries(HISTOGRAMS, BPF_F_MMAPABLE);

/// `PF_KTHREAD` of `include/linux/sched.h`.
const PF_KTHREAD: u32 = 0x0020_0000;
/// `PF_USER_WORKER` (Linux 6.4; the bit means nothing in those before that are supported): a thread of the kernel's that
/// counts as one of a process, as vhost's do.
const PF_USER_WORKER: u32 = 0x0000_4000;
/// `PF_IO_WORKER`: io_uring's, which works for its process alone and counts as its.
const PF_IO_WORKER: u32 = 0x0000_0010;
/// Stints looked back at for one wait.
const LOOK_BACK: u32 = 255;
/// The number that no culprit has: all places are taken.
const NO_PLACE: u8 = 16;
const _: () = assert!(LOOK_BACK as usize == STINTS - 1 && NO_PLACE as usize == CULPRITS);

/// Writes down that `prev` leaves this CPU now, where a followed thread waited lately, if somebody is left waiting.
///
/// # Safety
/// `prev` must be an argument of a BTF tracepoint.
#[inline(never)]
pub(crate) unsafe fn remember(prev: Address) {
    // SAFETY: by the caller.
    let rq = unsafe { run_queue(prev) };
    // SAFETY: loaded through the caller's pointer.
    let waiting = unsafe {
        let running: u32 = load(rq, offset(&LAYOUT.rq_nr_running));
        let queued: u32 = load(rq, offset(&LAYOUT.rq_queued));
        // Since Linux 6.12 a thread that goes to sleep may stay queued for a while; it does not wait.
        let runnable: u32 = load(rq, offset(&LAYOUT.rq_runnable));
        running.wrapping_sub(queued).wrapping_add(runnable)
    };
    if waiting < 2 {
        return;
    }
    // SAFETY: plain helper call; a valid map value that only this CPU writes, with the run queue locked.
    let Some(history) = (unsafe { HISTORY.get_ptr_mut(bpf_get_smp_processor_id()).and_then(|h| h.as_mut()) })
    else {
        return;
    };
    let place = history.count as usize % STINTS;
    // SAFETY: by the caller.
    history.stints[place] = unsafe { stint(prev, load(rq, offset(&LAYOUT.rq_clock))) };
    history.count = history.count.wrapping_add(1);
}

/// The stint of `prev`, which ends now.
///
/// # Safety
/// `prev` must be an argument of a BTF tracepoint.
#[inline(always)]
unsafe fn stint(prev: Address, end_ns: u64) -> Stint {
    // SAFETY: by the caller.
    unsafe {
        let tid = load(prev, offset(&LAYOUT.task_pid));
        let begin_ns = if tid == 0 { 0 } else { load(prev, offset(&LAYOUT.task_last_arrival)) };
        Stint {
            begin_ns,
            end_ns,
            task: prev as u64,
            tid,
            tgid: load(prev, offset(&LAYOUT.task_tgid)),
            flags: load(prev, offset(&LAYOUT.task_flags)),
            reserved: 0,
            irq_ns: if tid == 0 { 0 } else { left_out(prev, end_ns.saturating_sub(begin_ns)) },
        }
    }
}

/// Priorities of the fair class begin here (`MAX_RT_PRIO`).
const FAIR: u32 = 100;

/// What the task clock leaves out of the `ns` that `prev` was on the CPU: interrupts and steal. Known for the fair class
/// only.
///
/// # Safety
/// `prev` must be an argument of a BTF tracepoint.
#[inline(always)]
unsafe fn left_out(prev: Address, ns: u64) -> u64 {
    // SAFETY: by the caller.
    let (prio, now, then): (u32, u64, u64) = unsafe {
        (
            load(prev, offset(&LAYOUT.task_prio)),
            load(prev, offset(&LAYOUT.task_sum_exec_runtime)),
            load(prev, offset(&LAYOUT.task_prev_sum_exec_runtime)),
        )
    };
    if prio < FAIR { 0 } else { ns.saturating_sub(now.wrapping_sub(then)) }
}

/// Charges the wait of the thread that gets this CPU now: it was queued at the first of the times, `prev` leaves at the
/// second, the present.
///
/// # Safety
/// `prev` must be an argument of a BTF tracepoint.
#[inline(always)]
pub(crate) unsafe fn charge(thread: &mut Thread, prev: Address, (queued, now): (u64, u64)) {
    // SAFETY: by the caller.
    let (who, arrived) = unsafe { (who_is(prev), load::<u64>(prev, offset(&LAYOUT.task_last_arrival))) };
    // The idle task has no begin, and whoever waited for it waited for it alone.
    let begin = if who.0 == KIND_IDLE || arrived < queued { queued } else { arrived };
    let ns = now.saturating_sub(begin);
    let recent = &mut thread.recent[usize::from(get(&thread.table) & 1)];
    // SAFETY: by the caller.
    let is_whole = who.0 == KIND_IDLE || unsafe { left_out(prev, now.saturating_sub(arrived)) } == 0;
    let sum = ns.wrapping_add(recent.ns.into());
    if is_whole && recent.who == Recent::who(who.0, who.1) && sum >> 32 == 0 {
        #[expect(clippy::cast_possible_truncation, reason = "checked")]
        set(&mut recent.ns, sum as u32);
    } else {
        // SAFETY: by the caller.
        unsafe { charge_another(thread, prev, now, ns) };
    }
    if begin > queued {
        charge_history(thread, queued, begin);
    }
}

/// Kind and id of a thread, as of who had a CPU.
///
/// # Safety
/// `task` must be an argument of a BTF tracepoint.
#[inline(always)]
unsafe fn who_is(task: Address) -> (u32, u32) {
    // SAFETY: by the caller.
    let (tid, tgid, flags): (u32, u32, u32) = unsafe {
        (
            load(task, offset(&LAYOUT.task_pid)),
            load(task, offset(&LAYOUT.task_tgid)),
            load(task, offset(&LAYOUT.task_flags)),
        )
    };
    who(tid, tgid, flags)
}

/// The table that the thread's waits are charged to now, if they are charged, and its number.
#[inline(always)]
fn charges(thread: &Thread) -> Option<(&'static mut Charges, usize)> {
    let place = thread.histograms.checked_sub(1)?;
    // SAFETY: a valid map value; only the CPU that switches the thread changes it.
    let tables = unsafe { CHARGES.get_ptr_mut(place.into())?.as_mut()? };
    let which = usize::from(get(&thread.table) & 1);
    Some((&mut tables.tables[which], which))
}

/// Charges the `ns` of the stint of `prev`, which ends now, to somebody else than the last time.
///
/// # Safety
/// `prev` must be an argument of a BTF tracepoint.
#[inline(never)]
unsafe fn charge_another(thread: &mut Thread, prev: Address, now: u64, ns: u64) {
    let Some((charges, which)) = charges(thread) else { return };
    // SAFETY: by the caller.
    let stint = &unsafe { stint(prev, now) };
    let before = thread.recent[which];
    if before.who != 0
        && let Some(culprit) = charges.culprits.get_mut(usize::from(get(&thread.likely[which])))
    {
        culprit.ns += u64::from(before.ns);
    }
    let (kind, id) = who(stint.tid, stint.tgid, stint.flags);
    add(thread, charges, stint, ns);
    let found = get(&thread.found);
    set(&mut thread.likely[which], found);
    let who = if found < NO_PLACE { Recent::who(kind, id) } else { 0 };
    set(&mut thread.recent[which], Recent { who, ns: 0 });
}

/// Charges a wait of which only the end of the run after it was seen.
#[inline(never)]
pub(crate) fn charge_nobody(thread: &Thread, ns: u64) {
    if let Some((charges, _)) = charges(thread) {
        charges.unknown_ns += ns;
    }
}

/// Charges the part of a wait before `until` to those who ran before.
#[inline(never)]
fn charge_history(thread: &mut Thread, queued: u64, until: u64) {
    let Some((charges, _)) = charges(thread) else { return };
    // SAFETY: plain helper call.
    let cpu = unsafe { bpf_get_smp_processor_id() };
    // The next wait will find more.
    if let Some(filter) = filter() {
        arm(filter, cpu);
    }
    // SAFETY: a valid map value that only this CPU writes.
    let Some(history) = (unsafe { HISTORY.get_ptr(cpu).and_then(|h| h.as_ref()) }) else { return };
    let mut search = Search { thread, charges, history, queued, until, unknown: 0 };
    let callback: extern "C" fn(u64, &mut Search) -> u64 = charge_earlier;
    // SAFETY: the callback has the prototype that `bpf_loop` calls, and the search outlives the call.
    unsafe {
        bpf_loop(LOOK_BACK, callback as *mut c_void, (&raw mut search).cast::<c_void>(), 0);
    }
    search.charges.unknown_ns += search.unknown + search.until.saturating_sub(queued);
}

/// Where the search for those who ran while a thread waited is.
struct Search<'a> {
    thread: &'a mut Thread,
    charges: &'a mut Charges,
    history: &'a History,
    /// When the wait began.
    queued: u64,
    /// The wait from here on is charged.
    until: u64,
    /// Time for which nobody is known.
    unknown: u64,
}

/// Called by `bpf_loop` for each stint, the last first; not 0 ends the loop.
extern "C" fn charge_earlier(back: u64, search: &mut Search<'_>) -> u64 {
    let (history, Ok(back)) = (search.history, u32::try_from(back)) else { return 1 };
    let stint: &Stint = &history.stints[history.count.wrapping_sub(back + 1) as usize % STINTS];
    if stint.end_ns <= search.queued || stint.end_ns > search.until {
        return 1;
    }
    search.unknown += search.until - stint.end_ns;
    let begin = if stint.begin_ns > search.queued { stint.begin_ns } else { search.queued };
    add(search.thread, search.charges, stint, stint.end_ns.saturating_sub(begin));
    search.until = begin;
    u64::from(begin <= search.queued)
}

/// Adds the `ns` of a stint that somebody waited for to who had it, and to interrupts what they took of it, evenly spread.
#[inline(never)]
fn add(thread: &mut Thread, charges: &mut Charges, stint: &Stint, ns: u64) {
    let length = stint.end_ns.wrapping_sub(stint.begin_ns);
    let irq = if stint.irq_ns == 0 || ns >= length { stint.irq_ns } else { stint.irq_ns * ns / length };
    let irq = if irq < ns { irq } else { ns };
    if irq > 0 {
        add_to(thread, charges, None, Share { kind: KIND_IRQ, id: 0, ns: irq });
    }
    let (kind, id) = who(stint.tid, stint.tgid, stint.flags);
    add_to(thread, charges, Some(stint), Share { kind, id, ns: ns - irq });
}

/// What somebody had of a wait.
struct Share {
    kind: u32,
    id: u32,
    ns: u64,
}

/// Kind and id of who had the CPU.
#[inline(always)]
fn who(tid: u32, tgid: u32, flags: u32) -> (u32, u32) {
    if tid == 0 {
        (KIND_IDLE, 0)
    } else if flags & PF_KTHREAD != 0 || flags & (PF_USER_WORKER | PF_IO_WORKER) == PF_USER_WORKER {
        (KIND_KERNEL, tid)
    } else {
        (KIND_PROCESS, tgid)
    }
}

/// The name is read through `bpf_probe_read_kernel`: a task of the history may be gone, and then has none.
#[inline(always)]
fn add_to(thread: &mut Thread, charges: &mut Charges, stint: Option<&Stint>, share: Share) {
    let Share { kind, id, ns } = share;
    let is_theirs = |culprit: &Culprit| culprit.kind == 0 || culprit.id == id && culprit.kind == kind;
    let mut place = NO_PLACE;
    for i in 0..NO_PLACE {
        if is_theirs(&charges.culprits[usize::from(i)]) {
            place = i;
            break;
        }
    }
    set(&mut thread.found, place);
    let Some(culprit) = charges.culprits.get_mut(usize::from(get(&thread.found))) else {
        charges.other_ns += ns;
        return;
    };
    if culprit.kind == 0 {
        culprit.id = id;
        culprit.kind = kind;
        culprit.comm = stint.map_or([0; 16], comm);
    }
    culprit.ns += ns;
}

#[inline(always)]
fn comm(stint: &Stint) -> [u8; 16] {
    if probe::<u32>(stint.task, offset(&LAYOUT.task_pid)) != Some(stint.tid) {
        return [0; 16];
    }
    probe(stint.task, offset(&LAYOUT.task_comm)).unwrap_or([0; 16])
}
