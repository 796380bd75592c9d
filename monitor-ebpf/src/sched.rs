//! Run and wait time of the followed threads, from the scheduler's own figures.
//!
//! No program here reads a clock for a followed thread (a `bpf_ktime_get_ns` costs more than all the rest):
//! when a thread leaves a CPU the kernel has just brought `se.sum_exec_runtime` and `sched_info.run_delay` up
//! to date, so the switch only copies them. What lies after that moment, a run or a wait still in progress, is
//! added by `read_threads` when user space asks. Nothing is done when a thread gets a CPU that can be found out later: the
//! kernel keeps when that was (`sched_info.last_arrival`), and the CPU is the one it leaves.

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
    ARMED, CHAIN, CLOCK_THREAD, COMPARISONS, CPUS, Clock, Filter, GROUPS, Group, HISTOGRAMS, Histograms,
    Logged, MARK_ARRIVES, MARK_FOLLOWED, NO_FIELD, NOW_RUNNING, NOW_SLEEPING, NOW_WAITING, Nodes, READ_BATCH,
    READ_LAST, READ_LIVE, READ_NOTHING, READ_TORN, Reading, STATE_ENDED, STATE_INTERRUPTED, STATE_ON_CPU,
    STATE_PREEMPTED, STATE_SLEEPING, STATE_THROTTLED, STATE_UNKNOWN, THREADS, TID_PLACES, Thread, mark_place,
};

use crate::{
    culprit::{charge, charge_nobody, remember},
    kernel::{Address, LAYOUT, load, offset, probe, run_queue},
    process::{add, fetch_add, note_process, thread_ended},
};

#[map(name = "FILTER")]
static FILTER: Array<Filter> = Array::with_max_entries(1, BPF_F_MMAPABLE);
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
/// adds the run and the wait before it to the histograms. For a followed `next` that is marked so: charges its wait to who
/// had the CPU, and tells its group. For a `prev` that ends, see `thread_ended`. All times are nanoseconds. Everybody
/// else pays one bit test each, and one byte test for the history of the CPU; what they do not need is in functions of its
/// own, so that they do not pay for its registers either.
#[btf_tracepoint(function = "sched_switch")]
pub(crate) fn sched_switch(ctx: BtfTracePointContext) -> i32 {
    // SAFETY: plain helper call.
    let cpu = unsafe { bpf_get_smp_processor_id() };
    let Some(filter) = filter() else { return 0 };
    let (prev, next): (Address, Address) = (ctx.arg(1), ctx.arg(2));
    let out = tid(prev);
    let ways = marks(filter, out) & LEAVES | marks(filter, tid(next)) & COMES | ctx.arg::<u64>(3) & TASK_DEAD;
    let is_armed = filter.armed.get(cpu as usize).is_some_and(|armed| get(armed) != 0);
    if ways != 0 {
        let leaving = if ways & LEAVES != 0 { find(filter, out) } else { None };
        switched(filter, &ctx, leaving, (ways, cpu));
    }
    if is_armed {
        // Last, so that the history holds only what is over when a wait is charged.
        // SAFETY: `prev` is an argument of a BTF tracepoint.
        unsafe { remember(prev) };
    }
    0
}

/// The thread that leaves may be followed.
const LEAVES: u64 = MARK_FOLLOWED;
/// The thread that comes may be one to look at then.
const COMES: u64 = MARK_ARRIVES;
/// From this bit on: one of the `STATE_…` numbers, what the thread that leaves is from now on.
const STATE_LOG2: u32 = 8;

/// The thread id of an argument of a BTF tracepoint.
#[inline(always)]
fn tid(task: Address) -> u32 {
    // SAFETY: as the caller says.
    unsafe { load(task, offset(&LAYOUT.task_pid)) }
}

/// A switch from or to a thread that may be followed, or from one that ends; see `sched_switch`. What most switches of such
/// threads need is here in one piece, the rest in functions of its own: the programs' code is not in the first-level cache
/// when a switch comes, and every line of it costs.
#[inline(always)]
fn switched(
    filter: &Filter,
    ctx: &BtfTracePointContext,
    leaving: Option<&'static mut Thread>,
    (ways, cpu): (u64, u32),
) {
    let (prev, next): (Address, Address) = (ctx.arg(1), ctx.arg(2));
    let prev_state: u32 = ctx.arg(3);
    let state = if ways & TASK_DEAD != 0 {
        STATE_ENDED
    } else if prev_state == 0 {
        // SAFETY: `prev` is an argument of a BTF tracepoint.
        if unsafe { is_throttled(prev) } { STATE_THROTTLED } else { STATE_PREEMPTED }
    } else if ctx.arg::<u32>(0) & 1 == 0 {
        STATE_SLEEPING
    } else {
        STATE_INTERRUPTED
    };
    let with_group = leaving.as_ref().is_some_and(|thread| thread.group != 0);
    if ways & COMES != 0 || with_group {
        // Before anything is stored for the thread that leaves: a locked instruction waits for all stores before it.
        tell_others(filter, leaving.as_deref(), ways | u64::from(state) << STATE_LOG2, (prev, next));
    }
    if let Some(thread) = leaving {
        // It waits from now on, and who runs meanwhile will be asked for.
        if prev_state == 0 && thread.charged != 0 {
            arm(filter, cpu);
        }
        leave(thread, prev, (clock(prev), cpu), state);
    }
    if ways & TASK_DEAD != 0 {
        thread_ended(prev as u64);
    }
}

/// What a switch means to others than the thread that leaves: to the one that comes, and to the groups of both.
#[inline(never)]
fn tell_others(filter: &Filter, leaving: Option<&Thread>, ways: u64, (prev, next): (Address, Address)) {
    let coming = if ways & COMES != 0 { find(filter, tid(next)) } else { None };
    let now = clock(prev);
    let mut groups = Groups { left: 0, left_step: 0, entered: 0, entered_step: 0 };
    // First, because the verifier goes through all that follows once for each way that led there.
    if let Some(thread) = coming {
        come(thread, (prev, next), now, &mut groups);
    }
    if let Some(thread) = leaving
        && thread.state != STATE_ENDED
    {
        let state = (ways >> STATE_LOG2 & 0xff) as u8;
        groups.left = thread.group;
        groups.left_step = Group::share(state).wrapping_sub(Group::share(thread.counts_as));
    }
    groups.change(now);
}

/// A thread gets this CPU, and is one to look at then.
#[inline(always)]
fn come(thread: &mut Thread, (prev, next): (Address, Address), now: u64, groups: &mut Groups) {
    if thread.state == STATE_ENDED {
        return;
    }
    // SAFETY: `next` is an argument of a BTF tracepoint. `sched_info_arrive()` clears this just afterwards.
    let queued: u64 = unsafe { load(next, offset(&LAYOUT.task_last_queued)) };
    if thread.charged != 0 && queued != 0 && queued < now {
        // SAFETY: `prev` is an argument of a BTF tracepoint.
        unsafe { charge(thread, prev, (queued, now)) };
    }
    if thread.group != 0 {
        groups.entered = thread.group;
        groups.entered_step = Group::share(STATE_ON_CPU).wrapping_sub(Group::share(thread.counts_as));
        if thread.state == STATE_SLEEPING && queued != 0 {
            waited(thread.group, queued, now);
        }
    }
    set(&mut thread.counts_as, STATE_ON_CPU);
    if thread.histograms == CLOCK_THREAD {
        compare_clocks(now);
    }
}

/// `TASK_DEAD` of `include/linux/sched.h` (Linux 4.14): the thread never runs again.
const TASK_DEAD: u64 = 0x80;

/// The clock of this CPU's run queue, nanoseconds: read at the start of this switch.
#[inline(always)]
fn clock(prev: Address) -> u64 {
    // SAFETY: `prev` is an argument of a BTF tracepoint, and the run queue was loaded through it.
    unsafe { load(run_queue(prev), offset(&LAYOUT.rq_clock)) }
}

/// A thread leaves its CPU. All that its run was is settled here, whether it was seen to come or not: where programs do not
/// run for some of the host's threads, no switch from such a thread is seen.
#[inline(always)]
fn leave(thread: &mut Thread, task: Address, (now, cpu): (u64, u32), state: u8) {
    // SAFETY: `task` is an argument of a BTF tracepoint.
    let (run, wait, arrived): (u64, u64, u64) = unsafe {
        (
            load(task, offset(&LAYOUT.task_sum_exec_runtime)),
            load(task, offset(&LAYOUT.task_run_delay)),
            load(task, offset(&LAYOUT.task_last_arrival)),
        )
    };
    let was = thread.state;
    if was == STATE_ENDED {
        return;
    }
    let sequence = begin(thread);
    if was == STATE_UNKNOWN {
        note_identity(thread, task);
    } else if thread.histograms != 0 {
        distribute(thread, run.wrapping_sub(thread.run_ns), wait.wrapping_sub(thread.wait_ns));
    }
    if was == STATE_THROTTLED || state == STATE_THROTTLED {
        throttled(thread, task as u64, state, (arrived, now));
    }
    let on_cpu_ns = thread.on_cpu_ns.wrapping_add(now.wrapping_sub(arrived));
    set(&mut thread.on_cpu_ns, on_cpu_ns);
    set(&mut thread.run_ns, run);
    set(&mut thread.wait_ns, wait);
    set(&mut thread.since_ns, now);
    set(&mut thread.state, state);
    set(&mut thread.counts_as, state);
    // As the kernel decides between `nvcsw` and `nivcsw` in `__schedule()`.
    if state == STATE_SLEEPING || state == STATE_ENDED {
        let yields = thread.yields.wrapping_add(1);
        set(&mut thread.yields, yields);
    } else {
        let preemptions = thread.preemptions.wrapping_add(1);
        set(&mut thread.preemptions, preemptions);
    }
    if u32::from(thread.last_cpu) != cpu + 1 {
        migrated(thread, cpu + 1);
    }
    end(thread, sequence);
    if thread.histograms == CLOCK_THREAD {
        compare_clocks(now);
    }
}

/// Notes a run and the wait before it for the histograms.
#[inline(always)]
fn distribute(thread: &mut Thread, run: u64, wait: u64) {
    let place = usize::from(thread.logged);
    let one = Logged::new(run, wait);
    let next = match thread.log.get_mut(place) {
        Some(logged) => {
            set(logged, one);
            place + 1
        }
        None => {
            count(thread, one);
            0
        }
    };
    #[expect(clippy::cast_possible_truncation, reason = "at most `LOG`")]
    set(&mut thread.logged, next as u8);
    if thread.charged != 0 && thread.counts_as != STATE_ON_CPU && wait != 0 {
        charge_nobody(thread, wait);
    }
}

/// Counts all that was noted, and one more run with its wait: there is no more room.
#[inline(never)]
fn count(thread: &mut Thread, one: Logged) {
    let Some(histograms) = histograms(thread) else { return };
    histograms.count(one);
    for logged in &thread.log {
        histograms.count(*logged);
    }
}

/// The thread leaves another CPU than the last time. Numbers of CPUs are numbers plus 1, as `Nodes` has them.
#[inline(never)]
fn migrated(thread: &mut Thread, to: u32) {
    let from = u32::from(thread.last_cpu);
    if from != 0 {
        let migrations = thread.migrations.wrapping_add(1);
        set(&mut thread.migrations, migrations);
        if other_node(from, to) {
            let migrations = thread.node_migrations.wrapping_add(1);
            set(&mut thread.node_migrations, migrations);
        }
    }
    #[expect(clippy::cast_possible_truncation, reason = "the kernel has at most 8192 CPUs")]
    set(&mut thread.last_cpu, to as u16);
}

/// The wait before the run that ends now was one for a quota, or the next one is.
#[inline(never)]
fn throttled(thread: &mut Thread, task: u64, state: u8, (arrived, now): (u64, u64)) {
    if thread.state == STATE_THROTTLED {
        // SAFETY: plain helper call.
        let cpu = unsafe { bpf_get_smp_processor_id() };
        let part = throttled_part(thread, task, cpu, (arrived, now));
        let throttled = thread.throttled_ns.wrapping_add(part);
        set(&mut thread.throttled_ns, throttled);
    }
    if state == STATE_THROTTLED {
        let before = throttled_time(task, now).unwrap_or(0);
        set(&mut thread.throttled_before_ns, before);
    }
}

/// Whether two CPUs are known to belong to different NUMA nodes; numbers as for `migrated`.
#[inline(always)]
fn other_node(from: u32, to: u32) -> bool {
    match (NODES.get(from as usize), NODES.get(to as usize)) {
        (Some(from), Some(to)) => get(from) != get(to),
        _ => false,
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
#[inline(never)]
fn waited(place: u16, queued: u64, now: u64) {
    let Some(group) = group(place) else { return };
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

/// The part of a wait that began with the quota used up, and ended at the first of the times, in which it still was: all of
/// it where the kernel does not say, or says it of another CPU's queue. The second time is the present: the queue of a
/// thread that runs is not throttled.
#[inline(always)]
fn throttled_part(thread: &Thread, task: u64, cpu: u32, (until, now): (u64, u64)) -> u64 {
    let wait = until.saturating_sub(get(&thread.since_ns));
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
    unsafe { HISTOGRAM_SETS.get_ptr_mut(index.into())?.as_mut() }
}

#[inline(never)]
fn note_identity(thread: &mut Thread, task: Address) {
    // A thread keeps its `task_struct`, so the first switch tells it all.
    if thread.task != task as u64 {
        set(&mut thread.task, task as u64);
        // SAFETY: `task` is an argument of a BTF tracepoint or of the task iterator.
        set(&mut thread.start_boottime_ns, unsafe { load(task, offset(&LAYOUT.task_start_boottime)) });
    }
}

/// `sched` is the run queue's clock, read a moment ago at the start of this switch.
#[inline(never)]
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

/// What is known of the threads with such an id: [`MARK_FOLLOWED`], [`MARK_ARRIVES`], and what else is there.
#[inline(always)]
fn marks(filter: &Filter, tid: u32) -> u64 {
    let (word, bit) = mark_place(tid);
    filter.marks[word] >> bit
}

/// The first look at a thread, for programs that look for one thread only.
#[inline(always)]
pub(crate) fn is_followed(tid: u32) -> bool {
    filter().is_some_and(|filter| marks(filter, tid) & MARK_FOLLOWED != 0)
}

/// From now on this CPU writes its history: a followed thread waits here.
#[inline(always)]
pub(crate) fn arm(filter: &Filter, cpu: u32) {
    if let Some(armed) = filter.armed.get(cpu as usize)
        && get(armed) != ARMED
    {
        // SAFETY: in a map, whose memory is writable whatever the reference says; only this CPU sets its byte, and clearing
        // it at the same time does no harm.
        unsafe { core::ptr::from_ref(armed).cast_mut().write_volatile(ARMED) };
    }
}

/// The slot of a followed thread.
#[inline(always)]
pub(crate) fn followed(tid: u32) -> Option<&'static mut Thread> {
    find(filter()?, tid)
}

#[inline(always)]
fn find(filter: &Filter, tid: u32) -> Option<&'static mut Thread> {
    let thread = slot(filter.first[(tid % TID_PLACES) as usize])?;
    // The slot may just have been given to another thread.
    if thread.tid == tid { Some(thread) } else { find_farther(thread.next, tid) }
}

/// The rare case that ids of two followed threads share their place.
#[inline(never)]
fn find_farther(mut place: u16, tid: u32) -> Option<&'static mut Thread> {
    for _ in 1..CHAIN {
        let thread = slot(place)?;
        if thread.tid == tid {
            return Some(thread);
        }
        place = thread.next;
    }
    None
}

/// The slot at a place plus 1.
#[inline(always)]
fn slot(place: u16) -> Option<&'static mut Thread> {
    let place = u32::from(place).checked_sub(1)?;
    // SAFETY: a valid map value; at most one CPU switches a given thread at a time.
    unsafe { THREAD_SLOTS.get_ptr_mut(place)?.as_mut() }
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
    if let Some(thread) = followed(tid)
        && thread.state != STATE_ENDED
    {
        note_identity(thread, task);
    }
    note_process(tid, task);
    0
}

/// Not attached to anything: user space runs it with the slots to read as its arguments. Reads threads into `READINGS`,
/// the run or wait in progress included.
#[raw_tracepoint(tracepoint = "read_threads")]
pub(crate) fn read_threads(ctx: RawTracePointContext) -> i32 {
    let (first, count) = slots_to_read(&ctx);
    // SAFETY: plain helper call.
    let mono = unsafe { bpf_ktime_get_ns() };
    let mut batch = Batch { first, now: Now { mono, sched: scheduler_clock(mono).unwrap_or(0) } };
    let callback: extern "C" fn(u64, &mut Batch) -> u64 = read_one;
    // SAFETY: the callback has the prototype that `bpf_loop` calls, and the batch outlives the call.
    unsafe {
        bpf_loop(count, callback as *mut c_void, (&raw mut batch).cast::<c_void>(), 0);
    }
    0
}

/// Arguments of a reading program: the first slot to read, and how many.
#[inline(always)]
pub(crate) fn slots_to_read(ctx: &RawTracePointContext) -> (u64, u32) {
    let words = ctx.as_ptr().cast::<u64>();
    // SAFETY: user space passes the arguments of a raw tracepoint, at least two words.
    let (first, count) = unsafe { (*words, *words.add(1)) };
    (first, u32::try_from(count).unwrap_or(READ_BATCH).min(READ_BATCH))
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
    read_thread(thread, reading, &mut batch.now);
    if batch.now.sched != 0
        && let Some(group) = group(thread.group)
    {
        read_group(group, &mut batch.now);
    }
    0
}

/// As of the moment of which the figures of its members are: later its begin or end would be another one.
#[inline(always)]
fn read_group(group: &mut Group, now: &mut Now) {
    let mut read = Group::TORN;
    for _ in 0..ATTEMPTS {
        let (members, both_ns, changed) = (get(&group.members), get(&group.both_ns), get(&group.changed_ns));
        if changed > now.sched {
            // A member was switched since the clock was read.
            now.refresh(changed);
        }
        let at = if Group::both(members) { both_ns.wrapping_add(now.sched) } else { both_ns };
        // An addition that is under way on another CPU leaves a number that cannot be: below 0, or not below the clock, which
        // runs since the host started.
        if get(&group.members) == members
            && get(&group.both_ns) == both_ns
            && get(&group.changed_ns) == changed
            && at < now.sched
        {
            read = at;
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

impl Now {
    /// Reads the clock again, for a thread that did something after it was read: as of the moment before, its figures are not
    /// known any more. The scheduler's clock has come as far as what the thread did, even where the difference that was
    /// measured, which is some microseconds too small at times, says less.
    #[inline(always)]
    fn refresh(&mut self, did: u64) {
        // SAFETY: plain helper call.
        self.mono = unsafe { bpf_ktime_get_ns() };
        let sched = scheduler_clock(self.mono).unwrap_or(self.sched);
        self.sched = if did > sched { did } else { sched };
    }
}

#[inline(always)]
fn read_thread(thread: &Thread, reading: &mut Reading, now: &mut Now) {
    reading.tid = thread.tid;
    reading.start_boottime_ns = thread.start_boottime_ns;
    reading.read_at_ns = now.mono;
    if thread.tid == 0 || thread.task == 0 {
        reading.status = READ_NOTHING;
        return;
    }
    reading.status = READ_TORN;
    if now.sched == 0 {
        return;
    }
    for _ in 0..ATTEMPTS {
        let sequence = get(&thread.sequence);
        let Some((status, latest)) = read_once(thread, reading, now.sched) else { continue };
        if sequence & 1 != 0 || get(&thread.sequence) != sequence {
            continue;
        }
        if latest > now.sched {
            now.refresh(latest);
            continue;
        }
        reading.status = status;
        break;
    }
    reading.read_at_ns = now.mono;
    reading.sched_ns = now.sched;
}

/// Attempts to read a thread while its figures change.
const ATTEMPTS: u32 = 4;

/// What kind of reading it is, and the scheduler's clock at the last thing that the thread did, nanoseconds; `None` if the
/// figures could not be read or changed meanwhile.
#[inline(always)]
fn read_once(thread: &Thread, reading: &mut Reading, sched: u64) -> Option<(u32, u64)> {
    let state = get(&thread.state);
    reading.preemptions = get(&thread.preemptions);
    reading.yields = get(&thread.yields);
    // Each time that it went to sleep it was woken up and ran, but for the last time.
    reading.wakeups = reading.yields.wrapping_sub(u32::from(state == STATE_SLEEPING));
    reading.migrations = get(&thread.migrations);
    reading.node_migrations = get(&thread.node_migrations);
    reading.throttled_ns = get(&thread.throttled_ns);
    reading.on_cpu_ns = get(&thread.on_cpu_ns);
    // One by one: of two together the compiler makes a loop over their bytes.
    set(&mut reading.open_run_ns, 0);
    set(&mut reading.open_wait_ns, 0);
    reading.run_ns = get(&thread.run_ns);
    reading.wait_ns = get(&thread.wait_ns);
    reading.doing = NOW_SLEEPING;
    let since = get(&thread.since_ns);
    if state == STATE_ENDED {
        return Some((READ_LAST, since));
    }
    let info = sched_info(thread.task);
    if state == STATE_SLEEPING
        && let Some(Info { arrived, queued: 0 }) = info
        && arrived <= since
    {
        // Most threads: nothing happened to it since it fell asleep, and no more of its `task_struct` need be looked at. That
        // it ended would have been seen.
        return Some((READ_LIVE, since));
    }
    if probe(thread.task, offset(&LAYOUT.task_pid)) != Some(thread.tid) {
        return Some((READ_LAST, since));
    }
    Some((READ_LIVE, read_live(thread, reading, info?, sched)?))
}

/// `None` if the figures could not be read or changed meanwhile; else the scheduler's clock at the last of what the thread
/// did, nanoseconds.
#[inline(always)]
fn read_live(thread: &Thread, reading: &mut Reading, info: Info, now: u64) -> Option<u64> {
    let task = thread.task;
    let (state, since) = (get(&thread.state), get(&thread.since_ns));
    let run: u64 = probe(task, offset(&LAYOUT.task_sum_exec_runtime))?;
    let wait: u64 = probe(task, offset(&LAYOUT.task_run_delay))?;
    let Info { arrived, queued } = info;
    let mut latest = since;
    if queued != 0 {
        // sched_info_enqueue() stamps last_queued, sched_info_arrive() adds to run_delay and clears it.
        latest = if queued > since { queued } else { since };
        reading.doing = NOW_WAITING;
        reading.open_wait_ns = now.saturating_sub(queued);
        if state == STATE_THROTTLED {
            let cpu = u32::from(get(&thread.last_cpu)).wrapping_sub(1);
            reading.throttled_ns =
                reading.throttled_ns.wrapping_add(throttled_part(thread, task, cpu, (now, now)));
        }
    } else if is_on_cpu(task, arrived, since)? {
        latest = arrived;
        reading.doing = NOW_RUNNING;
        reading.on_cpu_ns = reading.on_cpu_ns.wrapping_add(now.saturating_sub(arrived));
        reading.open_run_ns = open_run(task, run, now)?;
        reading.wakeups = reading.yields;
        let cpu: u32 = probe(task, offset(&LAYOUT.task_cpu))?;
        if state == STATE_THROTTLED {
            reading.throttled_ns =
                reading.throttled_ns.wrapping_add(throttled_part(thread, task, cpu, (arrived, now)));
        }
        let last_cpu = u32::from(get(&thread.last_cpu));
        if last_cpu != 0 && last_cpu != cpu.wrapping_add(1) {
            reading.migrations = reading.migrations.wrapping_add(1);
            reading.node_migrations =
                reading.node_migrations.wrapping_add(u32::from(other_node(last_cpu, cpu.wrapping_add(1))));
        }
    } else if state == STATE_PREEMPTED || state == STATE_THROTTLED {
        // The kernel is about to queue it again, here or on another CPU.
        return None;
    }
    reading.run_ns = run + reading.open_run_ns;
    reading.wait_ns = wait + reading.open_wait_ns;
    // What the kernel changes when it gives the thread a CPU: `sched_info_arrive()`.
    (sched_info(task)? == info).then_some(latest)
}

/// Of `task_struct.sched_info`, nanoseconds: what changes whenever the thread begins or stops to wait.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq)]
struct Info {
    /// `last_arrival`.
    arrived: u64,
    /// `last_queued`; 0 while it does not wait.
    queued: u64,
}

/// Both at once: a call of the helper costs as much as the rest of a reading, and they mostly lie in one cache line.
#[inline(always)]
fn sched_info(task: u64) -> Option<Info> {
    probe(task, offset(&LAYOUT.task_last_arrival))
}

/// Whether a thread that does not wait is on a CPU: it has got one since it left its last. One that was not seen to leave
/// any says itself.
#[inline(always)]
fn is_on_cpu(task: u64, arrived: u64, since: u64) -> Option<bool> {
    if since != 0 {
        return Some(arrived > since);
    }
    Some(probe::<u32>(task, offset(&LAYOUT.task_on_cpu))? != 0)
}

/// Task-clock time since `update_curr()` last added to `sum_exec_runtime`: it stamped `exec_start` with
/// `rq->clock_task`, which lags `rq->clock` by the time that interrupts and a hypervisor below took. What they took since
/// is in it, and only the next reading leaves it out.
#[inline(always)]
pub(crate) fn open_run(task: u64, run: u64, sched_now: u64) -> Option<u64> {
    let exec_start: u64 = probe(task, offset(&LAYOUT.task_exec_start))?;
    let cfs_rq: u64 = probe(task, offset(&LAYOUT.task_cfs_rq))?;
    let rq: u64 = probe(cfs_rq, offset(&LAYOUT.cfs_rq_rq))?;
    let clock: u64 = probe(rq, offset(&LAYOUT.rq_clock))?;
    let clock_task: u64 = probe(rq, offset(&LAYOUT.rq_clock_task))?;
    // One that falls asleep is off the queue, and its figure complete, before its CPU looks for something else to run, which
    // takes some 0.1 ms where there is nothing.
    let runs = probe::<u32>(task, offset(&LAYOUT.task_on_rq))? != 0;
    if probe::<u64>(task, offset(&LAYOUT.task_sum_exec_runtime))? != run
        || probe::<u64>(task, offset(&LAYOUT.task_exec_start))? != exec_start
    {
        return None;
    }
    let open = sched_now.wrapping_sub(clock.wrapping_sub(clock_task)).wrapping_sub(exec_start);
    // The scheduler clock is known to some microseconds: just after an update the difference may be below 0.
    Some(if runs && open.cast_signed() > 0 { open } else { 0 })
}

/// The yardstick of `cargo xtask bench sched`: what any program on this tracepoint costs at least. The monitor never
/// loads it.
#[btf_tracepoint(function = "sched_switch")]
pub(crate) fn bench_empty(_ctx: BtfTracePointContext) -> i32 {
    0
}
