//! Run and wait time of the followed threads, from the scheduler's own figures.
//!
//! No program here reads a clock for a followed thread (a `bpf_ktime_get_ns` costs more than all the rest):
//! when a thread leaves a CPU the kernel has just brought `se.sum_exec_runtime` and `sched_info.run_delay` up
//! to date, so the switch only copies them. What lies after that moment, a run or a wait still in progress, is
//! added by `read_threads` when user space asks.

use core::ffi::c_void;

use aya_ebpf::{
    EbpfContext,
    bindings::BPF_F_MMAPABLE,
    helpers::{bpf_get_smp_processor_id, bpf_ktime_get_ns, generated::bpf_loop},
    macros::{btf_tracepoint, map, raw_tracepoint},
    maps::Array,
    programs::{BtfTracePointContext, RawTracePointContext},
};
use monitor_ebpf::{
    ARMED, CLOCK_THREAD, COMPARISONS, CPUS, Clock, FILTER_BITS, Filter, GROUPS, Group, HISTOGRAMS, Histogram,
    Histograms, NO_FIELD, NOW_RUNNING, NOW_SLEEPING, NOW_WAITING, Nodes, READ_BATCH, READ_LAST, READ_LIVE,
    READ_NOTHING, READ_TORN, Reading, STATE_ON_CPU, STATE_PREEMPTED, STATE_SLEEPING, STATE_THROTTLED,
    STATE_UNKNOWN, TABLE_ENTRIES, TABLE_PROBES, THREADS, Table, Thread, bucket, table_slot, table_start,
};

use crate::{
    culprit::{charge, charge_nobody, remember},
    kernel::{Address, LAYOUT, load, offset, probe, run_queue},
    process::{add, fetch_add, note_process, thread_ended},
};

#[map(name = "FILTER")]
static FILTER: Array<Filter> = Array::with_max_entries(1, BPF_F_MMAPABLE);
#[map(name = "TABLE")]
static TABLE: Array<Table> = Array::with_max_entries(1, BPF_F_MMAPABLE);
#[map(name = "THREADS")]
static THREAD_SLOTS: Array<Thread> = Array::with_max_entries(THREADS, BPF_F_MMAPABLE);
#[map(name = "READINGS")]
static READINGS: Array<Reading> = Array::with_max_entries(THREADS, BPF_F_MMAPABLE);
#[map(name = "HISTOGRAMS")]
static HISTOGRAM_SETS: Array<Histograms> = Array::with_max_entries(HISTOGRAMS, BPF_F_MMAPABLE);
#[map(name = "GROUPS")]
static SIBLINGS: Array<Group> = Array::with_max_entries(GROUPS, BPF_F_MMAPABLE);
#[map(name = "CLOCK")]
static CLOCK: Array<Clock> = Array::with_max_entries(1, BPF_F_MMAPABLE);

/// Filled in before the load.
#[unsafe(no_mangle)]
static NODES: Nodes = [0; CPUS as usize + 1];

/// `trace_sched_switch(bool preempt, struct task_struct *prev, struct task_struct *next, unsigned int
/// prev_state)`, on the CPU that switches, with the run queue locked.
///
/// For a followed `prev`: copies the kernel's run and wait time into its slot, adds the time on the CPU, counts, and
/// adds the run and the wait before it to the histograms. For a followed `next`: charges its wait to who
/// had the CPU, and notes that it is on one. For a `prev` that ends, see `thread_ended`. All times are nanoseconds. Everybody
/// else pays one bit test each, and one byte test for the history of the CPU; what they do not need is in functions of its
/// own, so that they do not pay for its registers either.
#[btf_tracepoint(function = "sched_switch")]
pub(crate) fn sched_switch(ctx: BtfTracePointContext) -> i32 {
    // SAFETY: plain helper call.
    let cpu = unsafe { bpf_get_smp_processor_id() };
    let Some(filter) = filter() else { return 0 };
    let (prev, next): (Address, Address) = (ctx.arg(1), ctx.arg(2));
    // SAFETY: both are arguments of a BTF tracepoint.
    let (out, into) =
        unsafe { (load::<u32>(prev, offset(&LAYOUT.task_pid)), load::<u32>(next, offset(&LAYOUT.task_pid))) };
    let is_armed = filter.armed.get(cpu as usize).is_some_and(|armed| get(armed) != 0);
    let (leaves, comes) = (may_be_followed(filter, out), may_be_followed(filter, into));
    if leaves || comes || ctx.arg::<u32>(3) & TASK_DEAD != 0 {
        let preempt = ctx.arg::<u32>(0) & 1;
        let ways = (u32::from(leaves) * LEAVES) | (u32::from(comes) * COMES) | (preempt * PREEMPTED);
        switched(ways, prev, next, ctx.arg(3));
    }
    if is_armed {
        // Last, so that the history holds only what is over when a wait is charged.
        // SAFETY: `prev` is an argument of a BTF tracepoint.
        unsafe { remember(prev) };
    }
    0
}

/// The thread that leaves may be followed.
const LEAVES: u32 = 1;
/// The thread that comes may be.
const COMES: u32 = 2;
/// The thread that leaves could run on.
const PREEMPTED: u32 = 4;

/// A switch from or to a thread that may be followed, or from one that ends; see `sched_switch`.
#[inline(never)]
fn switched(ways: u32, prev: Address, next: Address, prev_state: u32) {
    // SAFETY: both are arguments of a BTF tracepoint.
    let (out, into) =
        unsafe { (load::<u32>(prev, offset(&LAYOUT.task_pid)), load::<u32>(next, offset(&LAYOUT.task_pid))) };
    let Some(table) = table() else { return };
    // Both are looked up before anything is done for either: what is not in the cache comes while the rest is done.
    let mut coming = if ways & COMES != 0 { find(table, into) } else { None };
    let leaving = if ways & LEAVES != 0 { find(table, out) } else { None };
    let now = clock(prev);
    // SAFETY: `next` is an argument of a BTF tracepoint. `sched_info_arrive()` clears this just afterwards.
    let queued: u64 = unsafe { load(next, offset(&LAYOUT.task_last_queued)) };
    // First, because the verifier goes through all that follows once for each way that led there.
    if let Some(thread) = &mut coming
        && let (Some(place), true) = (thread.histograms.checked_sub(1), queued != 0 && queued < now)
    {
        // SAFETY: `prev` is an argument of a BTF tracepoint.
        unsafe { charge(thread, place, prev, (queued, now)) };
    }
    let mut groups = Groups { left: 0, left_step: 0, entered: 0, entered_step: 0 };
    if let Some(thread) = leaving {
        // As the kernel decides between `nivcsw` and `nvcsw` in `__schedule()`.
        let preempted = ways & PREEMPTED != 0 || prev_state == 0;
        let state = match preempted {
            // SAFETY: `prev` is an argument of a BTF tracepoint.
            true if unsafe { is_throttled(prev) } => STATE_THROTTLED,
            true => STATE_PREEMPTED,
            false => STATE_SLEEPING,
        };
        if state == STATE_THROTTLED {
            let before = throttled_time(prev as u64, now).unwrap_or(0);
            set(&mut thread.throttled_before_ns, before);
        }
        groups.left = thread.group;
        groups.left_step = Group::share(state).wrapping_sub(Group::share(thread.state));
        leave(thread, prev, now, state);
        if preempted {
            arm();
        }
    }
    if let Some(thread) = coming {
        groups.entered = thread.group;
        groups.entered_step = Group::share(STATE_ON_CPU).wrapping_sub(Group::share(thread.state));
        if thread.state == STATE_SLEEPING
            && queued != 0
            && let Some(group) = group(thread.group)
        {
            waited(group, queued, now);
        }
        enter(thread, next, now);
    }
    groups.change(now);
    if prev_state & TASK_DEAD != 0 {
        thread_ended(prev as u64);
    }
}

/// `TASK_DEAD` of `include/linux/sched.h` (Linux 4.14): the thread never runs again.
const TASK_DEAD: u32 = 0x80;

/// The clock of this CPU's run queue, nanoseconds: read at the start of this switch.
#[inline(always)]
fn clock(prev: Address) -> u64 {
    // SAFETY: `prev` is an argument of a BTF tracepoint, and the run queue was loaded through it.
    unsafe { load(run_queue(prev), offset(&LAYOUT.rq_clock)) }
}

/// A thread that was not seen to come is one all the same: where programs do not run for some of the host's threads, no
/// switch from such a thread is seen.
#[inline(always)]
fn leave(thread: &mut Thread, task: Address, now: u64, state: u8) {
    // SAFETY: `task` is an argument of a BTF tracepoint.
    let (run, wait): (u64, u64) = unsafe {
        (load(task, offset(&LAYOUT.task_sum_exec_runtime)), load(task, offset(&LAYOUT.task_run_delay)))
    };
    let was = thread.state;
    if was != STATE_UNKNOWN
        && let Some(histograms) = histograms(thread)
    {
        let waited = wait.wrapping_sub(thread.wait_ns);
        count(&mut histograms.run, run.wrapping_sub(thread.run_ns));
        if waited != 0 {
            count(&mut histograms.wait, waited);
        }
        if was != STATE_ON_CPU {
            charge_nobody(thread, waited);
        }
    }
    let arrived = if was == STATE_ON_CPU {
        thread.since_ns
    } else {
        // SAFETY: `task` is an argument of a BTF tracepoint.
        unsafe { load(task, offset(&LAYOUT.task_last_arrival)) }
    };
    let sequence = begin(thread);
    note_identity(thread, task);
    let on_cpu_ns = thread.on_cpu_ns.wrapping_add(now.wrapping_sub(arrived));
    set(&mut thread.on_cpu_ns, on_cpu_ns);
    set(&mut thread.run_ns, run);
    set(&mut thread.wait_ns, wait);
    set(&mut thread.since_ns, now);
    set(&mut thread.state, state);
    if state == STATE_SLEEPING {
        let yields = thread.yields.wrapping_add(1);
        set(&mut thread.yields, yields);
    } else {
        let preemptions = thread.preemptions.wrapping_add(1);
        set(&mut thread.preemptions, preemptions);
    }
    end(thread, sequence);
    if thread.histograms == CLOCK_THREAD {
        compare_clocks(now);
    }
}

#[inline(always)]
fn enter(thread: &mut Thread, task: Address, now: u64) {
    // SAFETY: plain helper call.
    let cpu = unsafe { bpf_get_smp_processor_id() };
    let was = thread.state;
    let sequence = begin(thread);
    note_identity(thread, task);
    if was == STATE_SLEEPING {
        let wakeups = thread.wakeups.wrapping_add(1);
        set(&mut thread.wakeups, wakeups);
    } else if was == STATE_THROTTLED {
        let throttled = thread.throttled_ns.wrapping_add(throttled_part(thread, task as u64, cpu, now));
        set(&mut thread.throttled_ns, throttled);
    }
    set(&mut thread.state, STATE_ON_CPU);
    set(&mut thread.since_ns, now);
    if u32::from(thread.last_cpu) != cpu + 1 {
        if thread.last_cpu != 0 {
            migrated(thread, u32::from(thread.last_cpu), cpu + 1);
        }
        #[expect(clippy::cast_possible_truncation, reason = "the kernel has at most 8192 CPUs")]
        set(&mut thread.last_cpu, cpu as u16 + 1);
    }
    end(thread, sequence);
    if thread.histograms == CLOCK_THREAD {
        compare_clocks(now);
    }
}

/// Both CPUs are numbers plus 1, as `Nodes` has them.
#[inline(always)]
fn migrated(thread: &mut Thread, from: u32, to: u32) {
    let migrations = thread.migrations.wrapping_add(1);
    set(&mut thread.migrations, migrations);
    if let (Some(from), Some(to)) = (NODES.get(from as usize), NODES.get(to as usize))
        && get(from) != get(to)
    {
        let migrations = thread.node_migrations.wrapping_add(1);
        set(&mut thread.node_migrations, migrations);
    }
}

/// The group at a place plus 1.
#[inline(always)]
fn group(place: u16) -> Option<&'static mut Group> {
    let place = u32::from(place).checked_sub(1)?;
    // SAFETY: a valid map value; its fields are changed by volatile stores or atomic additions.
    unsafe { SIBLINGS.get_ptr_mut(place)?.as_mut() }
}

/// The groups of the two threads of a switch, and what the switch adds to [`Group::members`] of each.
struct Groups {
    left: u16,
    left_step: u64,
    entered: u16,
    entered_step: u64,
}

impl Groups {
    /// A locked instruction waits for every store before it, so the two become one where they can.
    #[inline(always)]
    fn change(&mut self, now: u64) {
        if self.left == self.entered {
            self.entered_step = self.entered_step.wrapping_add(self.left_step);
        } else if let Some(group) = group(self.left) {
            change(group, self.left_step, now);
        }
        if let Some(group) = group(self.entered) {
            change(group, self.entered_step, now);
        }
    }
}

/// Members of the group go from some states to others.
#[inline(always)]
fn change(group: &mut Group, step: u64, now: u64) {
    if step != 0 {
        let before = fetch_add(&mut group.members, step);
        match (Group::both(before), Group::both(before.wrapping_add(step))) {
            (false, true) => add(&mut group.both_ns, now.wrapping_neg()),
            (true, false) => add(&mut group.both_ns, now),
            _ => {}
        }
    }
    set(&mut group.changed_ns, now);
}

/// A member that nobody knew to wait has waited from `queued` until now: wakeups are not followed. While another waits its
/// time is counted already. Of the time before the last change of the group nothing is known.
#[inline(always)]
fn waited(group: &mut Group, queued: u64, now: u64) {
    let members = get(&group.members);
    let changed = get(&group.changed_ns);
    let since = if changed > queued { changed } else { queued };
    if members != 0 && members < Group::WAITS && since < now {
        add(&mut group.both_ns, now - since);
    }
}

/// Whether a thread that could run on leaves its CPU for a CFS quota that is used up.
///
/// # Safety
/// `task` must be a pointer that the verifier trusts.
#[inline(always)]
unsafe fn is_throttled(task: Address) -> bool {
    let (of_task, of_queue) = (offset(&LAYOUT.task_throttled), offset(&LAYOUT.cfs_rq_throttle_count));
    // SAFETY: by the caller; the second pointer was loaded through the first.
    unsafe {
        if of_task != NO_FIELD {
            load::<u8>(task, of_task) != 0
        } else if of_queue != NO_FIELD {
            let cfs_rq: Address = load(task, offset(&LAYOUT.task_cfs_rq));
            load::<i32>(cfs_rq, of_queue) > 0
        } else {
            false
        }
    }
}

/// How long the queue of a thread has been throttled altogether, nanoseconds; `None` if the kernel keeps no such figure.
#[inline(always)]
fn throttled_time(task: u64, now: u64) -> Option<u64> {
    let (clock, time) =
        (offset(&LAYOUT.cfs_rq_throttled_clock_self), offset(&LAYOUT.cfs_rq_throttled_clock_self_time));
    if clock == NO_FIELD || time == NO_FIELD {
        return None;
    }
    let cfs_rq: u64 = probe(task, offset(&LAYOUT.task_cfs_rq))?;
    let (since, before): (u64, u64) = (probe(cfs_rq, clock)?, probe(cfs_rq, time)?);
    Some(before + if since == 0 { 0 } else { now.saturating_sub(since) })
}

/// The part of a wait that began with the quota used up in which it still was: all of it where the kernel does not say, or
/// says it of another CPU's queue.
#[inline(always)]
fn throttled_part(thread: &Thread, task: u64, cpu: u32, now: u64) -> u64 {
    let wait = now.saturating_sub(get(&thread.since_ns));
    if u32::from(get(&thread.last_cpu)) != cpu + 1 {
        return wait;
    }
    match throttled_time(task, now) {
        Some(time) if time.saturating_sub(get(&thread.throttled_before_ns)) < wait => {
            time.saturating_sub(get(&thread.throttled_before_ns))
        }
        _ => wait,
    }
}

/// What follows changes a slot: a reader on another CPU that sees an odd number, or another one afterwards, reads
/// again. All stores in between are volatile, which keeps their order in the program (BPF has no compiler fence);
/// x86 keeps the order of stores by itself.
#[inline(always)]
fn begin(thread: &mut Thread) -> u32 {
    let sequence = thread.sequence | 1;
    set(&mut thread.sequence, sequence);
    sequence
}

#[inline(always)]
fn end(thread: &mut Thread, sequence: u32) {
    set(&mut thread.sequence, sequence.wrapping_add(1));
}

#[inline(always)]
pub(crate) fn set<T>(place: &mut T, value: T) {
    // SAFETY: a reference is writable and aligned.
    unsafe { core::ptr::write_volatile(place, value) }
}

#[inline(always)]
pub(crate) fn get<T>(place: &T) -> T {
    // SAFETY: a reference is readable and aligned; the fields are plain numbers.
    unsafe { core::ptr::read_volatile(place) }
}

#[inline(always)]
fn histograms(thread: &Thread) -> Option<&'static mut Histograms> {
    let index = thread.histograms.checked_sub(1)?;
    // SAFETY: a valid map value; only the CPU that switches the thread changes it.
    unsafe { HISTOGRAM_SETS.get_ptr_mut(index)?.as_mut() }
}

#[inline(always)]
fn count(histogram: &mut Histogram, ns: u64) {
    if let Some(count) = histogram.get_mut(bucket(ns) as usize) {
        *count = count.wrapping_add(1);
    }
}

#[inline(always)]
fn note_identity(thread: &mut Thread, task: Address) {
    // A thread keeps its `task_struct`, so the first switch told it all.
    if thread.state == STATE_UNKNOWN && thread.task != task as u64 {
        set(&mut thread.task, task as u64);
        // SAFETY: `task` is an argument of a BTF tracepoint or of the task iterator.
        set(&mut thread.start_boottime_ns, unsafe { load(task, offset(&LAYOUT.task_start_boottime)) });
    }
}

/// `sched` is the run queue's clock, read a moment ago at the start of this switch.
#[inline(always)]
fn compare_clocks(sched: u64) {
    let Some(clock) = CLOCK.get_ptr_mut(0) else { return };
    // SAFETY: `clock` is a valid map value, and kvm-monitor's thread is on one CPU at a time.
    unsafe {
        let clock = &mut *clock;
        let difference = sched.wrapping_sub(bpf_ktime_get_ns()).cast_signed();
        clock.sched_minus_mono_ns[clock.count as usize % COMPARISONS] = difference;
        clock.count = clock.count.wrapping_add(1);
    }
}

#[inline(always)]
pub(crate) fn filter() -> Option<&'static Filter> {
    // SAFETY: a valid map value for the life of the program; user space changes whole words.
    FILTER.get_ptr(0).map(|filter| unsafe { &*filter })
}

/// One bit: whether it is worth looking for the thread in the table.
#[inline(always)]
fn may_be_followed(filter: &Filter, tid: u32) -> bool {
    let bit = tid % FILTER_BITS;
    filter.threads[(bit / 64) as usize] >> (bit % 64) & 1 != 0
}

/// The first look of [`may_be_followed`], for programs that look for one thread only.
#[inline(always)]
pub(crate) fn is_followed(tid: u32) -> bool {
    filter().is_some_and(|filter| may_be_followed(filter, tid))
}

/// From now on this CPU writes its history: a followed thread waits here.
#[inline(always)]
pub(crate) fn arm() {
    // SAFETY: a valid map value; only this CPU sets its byte, and clearing it at the same time does no harm.
    let Some(filter) = (unsafe { FILTER.get_ptr_mut(0).and_then(|filter| filter.as_mut()) }) else { return };
    // SAFETY: plain helper call.
    if let Some(armed) = filter.armed.get_mut(unsafe { bpf_get_smp_processor_id() } as usize)
        && get(armed) != ARMED
    {
        set(armed, ARMED);
    }
}

#[inline(always)]
fn table() -> Option<&'static Table> {
    // SAFETY: a valid map value for the life of the program; user space changes whole words.
    TABLE.get_ptr(0).map(|table| unsafe { &*table })
}

/// The slot of a followed thread.
#[inline(always)]
pub(crate) fn followed(tid: u32) -> Option<&'static mut Thread> {
    find(table()?, tid)
}

#[inline(always)]
fn find(table: &Table, tid: u32) -> Option<&'static mut Thread> {
    // Read back, so that the compiler does not know that it is small enough and leaves out the bound below, which the
    // verifier of Linux 6.1 needs: it does not follow how the number is made.
    let start = get(&table_start(tid));
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
    note_process(tid, task);
    0
}

/// Not attached to anything: user space runs it with the number of the first slot as its argument. Reads
/// [`READ_BATCH`] threads into `READINGS`, the run or wait in progress included.
#[raw_tracepoint(tracepoint = "read_threads")]
pub(crate) fn read_threads(ctx: RawTracePointContext) -> i32 {
    // SAFETY: user space passes the arguments of a raw tracepoint, at least one word.
    let first = unsafe { *ctx.as_ptr().cast::<u64>() };
    // SAFETY: plain helper call.
    let mono = unsafe { bpf_ktime_get_ns() };
    let mut batch = Batch { first, now: Now { mono, sched: scheduler_clock(mono).unwrap_or(0) } };
    let callback: extern "C" fn(u64, &mut Batch) -> u64 = read_one;
    // SAFETY: the callback has the prototype that `bpf_loop` calls, and the batch outlives the call.
    unsafe {
        bpf_loop(READ_BATCH, callback as *mut c_void, (&raw mut batch).cast::<c_void>(), 0);
    }
    0
}

struct Batch {
    first: u64,
    now: Now,
}

/// Called by `bpf_loop` for each thread; not 0 ends the loop.
extern "C" fn read_one(i: u64, batch: &mut Batch) -> u64 {
    let Ok(slot) = u32::try_from(batch.first + i) else { return 1 };
    let (Some(thread), Some(reading)) = (THREAD_SLOTS.get_ptr(slot), READINGS.get_ptr_mut(slot)) else {
        return 1;
    };
    // SAFETY: valid map values; `read_threads` alone writes readings, one run at a time.
    let (thread, reading) = unsafe { (&*thread, &mut *reading) };
    read_thread(thread, reading, batch.now);
    let sched = batch.now.sched;
    if sched != 0
        && let Some(group) = group(thread.group)
    {
        read_group(group, sched);
    }
    0
}

/// As of the moment of which the figures of its members are: later its begin or end would be another one.
#[inline(always)]
fn read_group(group: &mut Group, sched: u64) {
    let mut read = Group::TORN;
    for _ in 0..ATTEMPTS {
        let (members, both_ns) = (get(&group.members), get(&group.both_ns));
        let now = if Group::both(members) { both_ns.wrapping_add(sched) } else { both_ns };
        // An addition that is under way on another CPU leaves a number that cannot be.
        if get(&group.members) == members && get(&group.both_ns) == both_ns && now < Group::TORN / 2 {
            read = now;
            break;
        }
    }
    set(&mut group.read_ns, read);
}

/// The scheduler's clock at a moment of `CLOCK_MONOTONIC`, nanoseconds; `None` before the two were compared.
#[inline(always)]
pub(crate) fn scheduler_clock(mono: u64) -> Option<u64> {
    CLOCK.get(0).and_then(Clock::best).map(|ahead| mono.wrapping_add_signed(ahead))
}

#[derive(Clone, Copy)]
struct Now {
    /// `CLOCK_MONOTONIC`, nanoseconds.
    mono: u64,
    /// The scheduler's clock, nanoseconds; 0 before it was compared. No `Option`: before Linux 6.18 the verifier refuses to
    /// have a number stored that was never set.
    sched: u64,
}

#[inline(always)]
fn read_thread(thread: &Thread, reading: &mut Reading, now: Now) {
    reading.tid = thread.tid;
    reading.read_at_ns = now.mono;
    reading.start_boottime_ns = thread.start_boottime_ns;
    if thread.tid == 0 || thread.task == 0 {
        reading.status = READ_NOTHING;
        return;
    }
    let sched = now.sched;
    if sched == 0 {
        reading.status = READ_TORN;
        return;
    }
    reading.sched_ns = sched;
    for _ in 0..ATTEMPTS {
        let sequence = get(&thread.sequence);
        let status = read_once(thread, reading, sched);
        if sequence & 1 == 0 && get(&thread.sequence) == sequence && status != READ_TORN {
            reading.status = status;
            return;
        }
    }
    reading.status = READ_TORN;
}

/// Attempts to read a thread while its figures change.
const ATTEMPTS: u32 = 4;

#[inline(always)]
fn read_once(thread: &Thread, reading: &mut Reading, sched: u64) -> u32 {
    reading.preemptions = get(&thread.preemptions);
    reading.yields = get(&thread.yields);
    reading.wakeups = get(&thread.wakeups);
    reading.migrations = get(&thread.migrations);
    reading.node_migrations = get(&thread.node_migrations);
    reading.throttled_ns = get(&thread.throttled_ns);
    reading.on_cpu_ns = get(&thread.on_cpu_ns);
    reading.open_run_ns = 0;
    reading.open_wait_ns = 0;
    if probe::<u32>(thread.task, offset(&LAYOUT.task_pid)) != Some(thread.tid) {
        reading.run_ns = get(&thread.run_ns);
        reading.wait_ns = get(&thread.wait_ns);
        reading.doing = NOW_SLEEPING;
        return READ_LAST;
    }
    if read_live(thread, reading, sched).is_some() { READ_LIVE } else { READ_TORN }
}

/// `None` if the figures could not be read or changed meanwhile.
#[inline(always)]
fn read_live(thread: &Thread, reading: &mut Reading, now: u64) -> Option<()> {
    let task = thread.task;
    let run: u64 = probe(task, offset(&LAYOUT.task_sum_exec_runtime))?;
    let wait: u64 = probe(task, offset(&LAYOUT.task_run_delay))?;
    let queued: u64 = probe(task, offset(&LAYOUT.task_last_queued))?;
    reading.doing = NOW_SLEEPING;
    if let Some(since) = on_cpu_since(thread, queued)? {
        // The kernel adds the wait before this run, and clears `last_queued`, just after the switch was traced.
        if queued != 0 {
            return None;
        }
        reading.doing = NOW_RUNNING;
        reading.on_cpu_ns = reading.on_cpu_ns.wrapping_add(now.saturating_sub(since));
        reading.open_run_ns = open_run(task, run, now)?;
    } else if queued != 0 {
        // sched_info_enqueue() stamps last_queued, sched_info_arrive() adds to run_delay and clears it.
        reading.doing = NOW_WAITING;
        reading.open_wait_ns = now.saturating_sub(queued);
        if get(&thread.state) == STATE_THROTTLED {
            let cpu = u32::from(get(&thread.last_cpu)).wrapping_sub(1);
            reading.throttled_ns = reading.throttled_ns.wrapping_add(throttled_part(thread, task, cpu, now));
        }
    }
    reading.run_ns = run + reading.open_run_ns;
    reading.wait_ns = wait + reading.open_wait_ns;
    (probe::<u64>(task, offset(&LAYOUT.task_run_delay))? == wait).then_some(())
}

/// Since when a thread has been on its CPU, if it is; the outer `None` if that could not be read.
#[inline(always)]
fn on_cpu_since(thread: &Thread, queued: u64) -> Option<Option<u64>> {
    let (state, since) = (get(&thread.state), get(&thread.since_ns));
    if state == STATE_ON_CPU && since != 0 {
        return Some(Some(since));
    }
    if state != STATE_ON_CPU && queued != 0 {
        return Some(None);
    }
    let on_cpu: u32 = probe(thread.task, offset(&LAYOUT.task_on_cpu))?;
    let arrived: u64 = probe(thread.task, offset(&LAYOUT.task_last_arrival))?;
    // One that arrived after it was seen to leave was not seen to come.
    let is_on_cpu = state == STATE_ON_CPU || on_cpu != 0 && arrived > since;
    Some(is_on_cpu.then_some(arrived))
}

/// Task-clock time since `update_curr()` last added to `sum_exec_runtime`: it stamped `exec_start` with
/// `rq->clock_task`, which lags `rq->clock` by the time that interrupts and a hypervisor below took.
#[inline(always)]
pub(crate) fn open_run(task: u64, run: u64, sched_now: u64) -> Option<u64> {
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
    // The scheduler clock is known to some microseconds: just after an update the difference may be below 0.
    Some(if open.cast_signed() > 0 { open } else { 0 })
}

/// The yardstick of `cargo xtask bench sched`: what any program on this tracepoint costs at least. The monitor never
/// loads it.
#[btf_tracepoint(function = "sched_switch")]
pub(crate) fn bench_empty(_ctx: BtfTracePointContext) -> i32 {
    0
}
