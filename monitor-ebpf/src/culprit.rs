//! Who had the CPU while a followed thread waited for it.
//!
//! Nothing is known of a waiting thread before it gets its CPU: following wakeups would cost every wakeup of the host.
//! When it does, `sched_info.last_queued` says since when it waited, and the thread that just left says since when it
//! ran. If it ran all that time the whole wait is its; this is the common case and needs no memory. Otherwise several
//! ran one after the other, and the CPU has a history of them: a stint is written down when it ends while somebody
//! is left waiting on that CPU (two or more are runnable). Only a CPU on which a followed thread was preempted or
//! waited for several others writes its history, until user space says that it may stop; the others test one byte.

use aya_ebpf::{bindings::BPF_F_MMAPABLE, helpers::bpf_get_smp_processor_id, macros::map, maps::Array};
use monitor_ebpf::{
    Armed, CPUS, CULPRITS, ChargeTables, Charges, Culprit, HISTOGRAMS, History, KIND_IDLE, KIND_IRQ,
    KIND_KERNEL, KIND_PROCESS, STINTS, Stint,
};

use crate::kernel::{Address, LAYOUT, load, offset, probe, run_queue};
use crate::sched::{get, set};

#[map(name = "HISTORY")]
static HISTORY: Array<History> = Array::with_max_entries(CPUS, 0);
#[map(name = "ARMED")]
static ARMED: Array<Armed> = Array::with_max_entries(1, BPF_F_MMAPABLE);
#[map(name = "CHARGES")]
static CHARGES: Array<ChargeTables> = Array::with_max_entries(HISTOGRAMS, BPF_F_MMAPABLE);

/// `PF_KTHREAD` of `include/linux/sched.h`.
const PF_KTHREAD: u32 = 0x0020_0000;
/// Stints looked back at for one wait.
const LOOK_BACK: u32 = 32;

/// Writes down that `prev` leaves this CPU now, if a followed thread waited here lately and somebody is left waiting.
///
/// # Safety
/// `prev` must be an argument of a BTF tracepoint.
#[inline(always)]
pub(crate) unsafe fn remember(prev: Address) {
    if armed().is_none_or(|armed| *armed == 0) {
        return;
    }
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

/// From now on this CPU writes its history: a followed thread waits here.
#[inline(always)]
pub(crate) fn arm() {
    if let Some(armed) = armed() {
        *armed = 1;
    }
}

#[inline(always)]
fn armed() -> Option<&'static mut u8> {
    // SAFETY: a valid map value; only this CPU sets its byte, and clearing it at the same time does no harm.
    let armed = unsafe { ARMED.get_ptr_mut(0)?.as_mut()? };
    // SAFETY: plain helper call.
    armed.0.get_mut(unsafe { bpf_get_smp_processor_id() } as usize)
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

/// Charges the wait of the thread that gets this CPU now: it was queued at `queued`, `prev` leaves.
///
/// # Safety
/// `prev` must be an argument of a BTF tracepoint.
#[inline(always)]
pub(crate) unsafe fn charge(place: u32, prev: Address, queued: u64, now: u64) {
    // SAFETY: a valid map value; only the CPU that the thread enters changes it.
    let Some(tables) = (unsafe { CHARGES.get_ptr_mut(place).and_then(|t| t.as_mut()) }) else { return };
    let charges = &mut tables.tables[tables.in_use as usize & 1];
    // SAFETY: by the caller.
    let stint = unsafe { stint(prev, now) };
    // The idle task has no begin, and whoever waited for it waited for it alone.
    let begin = if stint.tid == 0 || stint.begin_ns < queued { queued } else { stint.begin_ns };
    add(charges, &stint, now.saturating_sub(begin));
    if begin > queued {
        arm();
        charge_history(charges, queued, begin);
    }
}

/// Charges the part of a wait before `until` to those who ran before.
#[inline(never)]
fn charge_history(charges: &mut Charges, queued: u64, mut until: u64) {
    // SAFETY: plain helper call; a valid map value that only this CPU writes.
    let Some(history) = (unsafe { HISTORY.get_ptr(bpf_get_smp_processor_id()).and_then(|h| h.as_ref()) })
    else {
        return;
    };
    let mut unknown = 0;
    for back in 1..=LOOK_BACK {
        let stint: &Stint = &history.stints[history.count.wrapping_sub(back) as usize % STINTS];
        if stint.end_ns <= queued || stint.end_ns > until {
            break;
        }
        unknown += until - stint.end_ns;
        let begin = if stint.begin_ns > queued { stint.begin_ns } else { queued };
        add(charges, stint, stint.end_ns.saturating_sub(begin));
        until = begin;
        if until <= queued {
            break;
        }
    }
    charges.unknown_ns += unknown + until.saturating_sub(queued);
}

/// Adds the `ns` of a stint that somebody waited for to who had it, and to interrupts what they took of it, evenly spread.
#[inline(never)]
fn add(charges: &mut Charges, stint: &Stint, ns: u64) {
    let length = stint.end_ns.wrapping_sub(stint.begin_ns);
    let irq = if stint.irq_ns == 0 || ns >= length { stint.irq_ns } else { stint.irq_ns * ns / length };
    let irq = if irq < ns { irq } else { ns };
    let (kind, id) = if stint.tid == 0 {
        (KIND_IDLE, 0)
    } else if stint.flags & PF_KTHREAD != 0 {
        (KIND_KERNEL, stint.tid)
    } else {
        (KIND_PROCESS, stint.tgid)
    };
    add_to(charges, Some(stint), (kind, id), ns - irq);
    if irq > 0 {
        add_to(charges, None, (KIND_IRQ, 0), irq);
    }
}

/// The name is read through `bpf_probe_read_kernel`: a task of the history may be gone, and then has none.
#[inline(always)]
fn add_to(charges: &mut Charges, stint: Option<&Stint>, (kind, id): (u32, u32), ns: u64) {
    let is_theirs = |culprit: &Culprit| culprit.ns == 0 || culprit.id == id && culprit.kind == kind;
    let mut place = CULPRITS as u64;
    for i in 0..CULPRITS {
        if is_theirs(&charges.culprits[i]) {
            place = i as u64;
            break;
        }
    }
    set(&mut charges.found, place);
    let place = usize::try_from(get(&charges.found)).unwrap_or(CULPRITS);
    let Some(culprit) = charges.culprits.get_mut(place) else {
        charges.other_ns += ns;
        return;
    };
    if culprit.ns == 0 {
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
