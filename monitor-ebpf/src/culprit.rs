//! Who had the CPU while a followed thread waited for it.
//!
//! Nothing is known of a waiting thread before it gets its CPU: following wakeups would cost every wakeup of the host.
//! When it does, `sched_info.last_queued` says since when it waited, and the thread that just left says since when it
//! ran. If it ran all that time the whole wait is its; this is the common case and needs no memory. Otherwise several
//! ran one after the other, and the CPU has a history of them: a stint is written down when it ends while somebody
//! is left waiting on that CPU (`rq->nr_running` is 2 or more), so an unloaded CPU writes nothing.

use aya_ebpf::{bindings::BPF_F_MMAPABLE, helpers::bpf_get_smp_processor_id, macros::map, maps::Array};
use monitor_ebpf::{
    CPUS, CULPRITS, ChargeTables, Charges, HISTOGRAMS, History, KIND_IDLE, KIND_KERNEL, KIND_PROCESS, STINTS,
    Stint,
};

use crate::kernel::{Address, LAYOUT, load, offset, probe};

#[map(name = "HISTORY")]
static HISTORY: Array<History> = Array::with_max_entries(CPUS, 0);
#[map(name = "CHARGES")]
static CHARGES: Array<ChargeTables> = Array::with_max_entries(HISTOGRAMS, BPF_F_MMAPABLE);

/// `PF_KTHREAD` of `include/linux/sched.h`.
const PF_KTHREAD: u32 = 0x0020_0000;
/// Stints looked back at for one wait.
const LOOK_BACK: u32 = 32;

/// Writes down that `prev` leaves this CPU now, if somebody is left waiting.
///
/// # Safety
/// `prev` must be an argument of a BTF tracepoint, `rq` its run queue loaded through it.
#[inline(always)]
pub(crate) unsafe fn remember(prev: Address, rq: Address) {
    // SAFETY: by the caller.
    let running: u32 = unsafe { load(rq, offset(&LAYOUT.rq_nr_running)) };
    if running < 2 {
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
        Stint {
            begin_ns: if tid == 0 { 0 } else { load(prev, offset(&LAYOUT.task_last_arrival)) },
            end_ns,
            task: prev as u64,
            tid,
            tgid: load(prev, offset(&LAYOUT.task_tgid)),
            flags: load(prev, offset(&LAYOUT.task_flags)),
            reserved: 0,
        }
    }
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

/// Adds time to who had the stint. The name is read through `bpf_probe_read_kernel`: a task of the history may be
/// gone, and then has none.
#[inline(never)]
fn add(charges: &mut Charges, stint: &Stint, ns: u64) {
    let (kind, id) = if stint.tid == 0 {
        (KIND_IDLE, 0)
    } else if stint.flags & PF_KTHREAD != 0 {
        (KIND_KERNEL, stint.tid)
    } else {
        (KIND_PROCESS, stint.tgid)
    };
    for i in 0..CULPRITS {
        let culprit = &mut charges.culprits[i];
        if culprit.ns == 0 {
            culprit.id = id;
            culprit.kind = kind;
            culprit.comm = comm(stint);
        } else if culprit.id != id || culprit.kind != kind {
            continue;
        }
        culprit.ns += ns;
        return;
    }
    charges.other_ns += ns;
}

#[inline(always)]
fn comm(stint: &Stint) -> [u8; 16] {
    if probe::<u32>(stint.task, offset(&LAYOUT.task_pid)) != Some(stint.tid) {
        return [0; 16];
    }
    probe(stint.task, offset(&LAYOUT.task_comm)).unwrap_or([0; 16])
}
