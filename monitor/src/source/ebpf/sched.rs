//! Threads that are followed: which, and what the programs of `monitor-ebpf/src/sched.rs` counted for them.

use std::{
    collections::VecDeque,
    fs::File,
    io::Read as _,
    mem::offset_of,
    sync::atomic::{self, AtomicU64, Ordering},
};

use aya::{
    Ebpf as Object,
    programs::{Iter, ProgramError},
};
use monitor_ebpf::{
    ARMED, CHAIN, CLOCK_THREAD, COMPARISONS, CPUS, ChargeTables, Charges, Clock, Filter, Group, Histograms,
    MARK_ARRIVES, MARK_FOLLOWED, NOW_RUNNING, NOW_WAITING, READ_LAST, READ_LIVE, Reading, Recent, TID_PLACES,
    Thread, mark_place,
};

use super::{
    EbpfError, map,
    mapped::Mapped,
    read_slots,
    times::{Doing, ThreadTimes},
};
use crate::{
    one_line,
    units::{MonotonicNs, Tid},
};

/// Once or twice this time after a followed thread waited there last, a CPU stops writing its history.
const DISARM_INTERVAL_NS: u64 = 10_000_000_000;

/// How often something is read again that changed meanwhile.
const ATTEMPTS: usize = 64;

/// A thread that is followed.
#[derive(Debug, PartialEq, Eq)]
pub struct Slot {
    thread: u32,
    histograms: Option<u32>,
}

impl Slot {
    /// The place of what is kept beside its times and counts, if anything is.
    pub(super) fn place(&self) -> Option<usize> {
        self.histograms.map(|place| place as usize)
    }
}

/// A group of siblings.
#[derive(Debug, PartialEq, Eq)]
pub struct GroupSlot(u16);

/// What is kept of a thread.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Keep {
    /// Times and counts.
    Times,
    /// Also the distributions of its runs and waits.
    TimesAndHistograms,
    /// Also who had the CPU while it waited.
    Everything,
}

/// Places of an array map that are handed out; the one given back longest ago is used again first.
#[derive(Debug, Default)]
pub(super) struct Places {
    free: VecDeque<u32>,
    used: u32,
}

impl Places {
    pub(super) fn take(&mut self, limit: u32) -> Option<u32> {
        if self.used < limit {
            self.used += 1;
            return Some(self.used - 1);
        }
        self.free.pop_front()
    }

    pub(super) fn give_back(&mut self, place: u32) {
        self.free.push_back(place);
    }

    /// Places handed out so far lie below this.
    pub(super) fn used(&self) -> u32 {
        self.used
    }
}

/// A thread or a device cannot be followed.
#[derive(Debug, thiserror::Error)]
pub enum NotFollowed {
    /// The probes that follow it do not run.
    #[error("the probes that follow it do not run")]
    Off,
    /// The kernel tables are full.
    #[error("no room in the kernel tables to follow another one ({0} are followed)")]
    Full(usize),
}

/// The maps of the scheduling programs, and what is handed out of them.
pub(super) struct Sched {
    filter: Mapped<Filter>,
    threads: Mapped<Thread>,
    readings: Mapped<Reading>,
    clock: Mapped<Clock>,
    histograms: Mapped<Histograms>,
    charges: Mapped<ChargeTables>,
    disarmed: MonotonicNs,
    places: Places,
    histogram_places: Places,
    groups: Mapped<Group>,
    group_places: Places,
    followed: usize,
    unseeded: bool,
}

impl Sched {
    /// Maps the maps; nothing is followed.
    pub(super) fn new(object: &Object) -> Result<Self, EbpfError> {
        Ok(Self {
            filter: map(object, "FILTER")?,
            threads: map(object, "THREADS")?,
            readings: map(object, "READINGS")?,
            clock: map(object, "CLOCK")?,
            histograms: map(object, "HISTOGRAMS")?,
            charges: map(object, "CHARGES")?,
            disarmed: MonotonicNs::now(),
            places: Places::default(),
            histogram_places: Places::default(),
            groups: map(object, "GROUPS")?,
            group_places: Places::default(),
            followed: 0,
            unseeded: false,
        })
    }

    /// Begins to follow a thread. Call [`Sched::seed`] after the last of a batch.
    ///
    /// # Errors
    /// [`NotFollowed::Full`] if the kernel tables have no room. Where only the histograms have none, the rest is kept.
    pub(super) fn follow(
        &mut self,
        tid: Tid,
        keep: Keep,
        group: Option<&GroupSlot>,
    ) -> Result<Slot, NotFollowed> {
        let group = group.map_or(0, |group| group.0 + 1);
        self.follow_as(keep, Thread { tid: tid.0, group, ..Thread::ZERO })
    }

    fn follow_as(&mut self, keep: Keep, thread: Thread) -> Result<Slot, NotFollowed> {
        let full = NotFollowed::Full(self.followed);
        if self.sharing(thread.tid).count() >= CHAIN as usize {
            return Err(full);
        }
        let Some(place) = self.places.take(self.threads.len()) else { return Err(full) };
        let histograms = match keep {
            Keep::Times => None,
            Keep::TimesAndHistograms | Keep::Everything => {
                self.histogram_places.take(self.histograms.len().min(u32::from(CLOCK_THREAD) - 1))
            }
        };
        if let Some(histograms) = histograms {
            self.histograms.set(histograms as usize, Histograms::ZERO);
            self.charges.set(histograms as usize, ChargeTables::ZERO);
        }
        self.readings.set(place as usize, Reading::ZERO);
        let thread = Thread {
            histograms: histograms.map_or(thread.histograms, one_more),
            charged: u8::from(keep == Keep::Everything && histograms.is_some()),
            next: self.first(thread.tid),
            ..thread
        };
        self.threads.set(place as usize, thread);
        self.set_first(thread.tid, one_more(place));
        self.mark(thread.tid);
        self.followed += 1;
        self.unseeded = true;
        Ok(Slot { thread: place, histograms })
    }

    /// Slot of the first followed thread at the place of a thread id, plus 1; 0 if there is none.
    fn first(&self, tid: u32) -> u16 {
        let (word, shift) = first_place(tid);
        u16::try_from(self.filter.word(word).load(Ordering::Acquire) >> shift & 0xffff).unwrap_or(0)
    }

    /// Only this thread writes these words.
    fn set_first(&self, tid: u32, slot: u16) {
        let (word, shift) = first_place(tid);
        let word = self.filter.word(word);
        let others = word.load(Ordering::Acquire) & !(0xffff << shift);
        word.store(others | u64::from(slot) << shift, Ordering::Release);
    }

    /// The slots of the followed threads at the place of a thread id.
    fn sharing(&self, tid: u32) -> impl Iterator<Item = usize> {
        let slot = |place: u16| usize::from(place).checked_sub(1);
        std::iter::successors(slot(self.first(tid)), move |at| slot(self.threads.get(*at).next))
    }

    /// Tells the programs what to look at of the threads at the place of a thread id.
    fn mark(&self, tid: u32) {
        let marks = |at: usize| {
            let thread = self.threads.get(at);
            let arrives = thread.charged != 0 || thread.group != 0 || thread.histograms == CLOCK_THREAD;
            MARK_FOLLOWED | if arrives { MARK_ARRIVES } else { 0 }
        };
        let marks = self.sharing(tid).map(marks).fold(0, |all, one| all | one);
        let (word, bit) = mark_place(tid);
        let word = self.filter.word(word);
        let others = word.load(Ordering::Acquire) & !((MARK_FOLLOWED | MARK_ARRIVES) << bit);
        word.store(others | marks << bit, Ordering::Release);
    }

    /// Begins to keep a group of siblings; `None` if there is no room.
    pub(super) fn follow_group(&mut self) -> Option<GroupSlot> {
        let place = u16::try_from(self.group_places.take(self.groups.len())?).ok()?;
        self.groups.set(place.into(), Group::ZERO);
        Some(GroupSlot(place))
    }

    /// Stops keeping a group; none of its members may be followed any more.
    #[expect(clippy::needless_pass_by_value, reason = "the slot must not be used afterwards")]
    pub(super) fn forget_group(&mut self, slot: GroupSlot) {
        self.group_places.give_back(slot.0.into());
    }

    /// Time in which at least one member waited while another ran, nanoseconds since the group is kept, up to the last
    /// [`Sched::read`]. `None` if it changed under every attempt to read it.
    pub(super) fn both_ns(&self, slot: &GroupSlot) -> Option<u64> {
        let read = self.groups.word_of(slot.0.into(), offset_of!(Group, read_ns) / 8).load(Ordering::Acquire);
        (read != Group::TORN).then_some(read)
    }

    /// The next [`Sched::seed`] walks even if no thread is new.
    pub(super) fn seed_next(&mut self) {
        self.unseeded = true;
    }

    /// Stops following a thread.
    #[expect(clippy::needless_pass_by_value, reason = "the slot must not be used afterwards")]
    pub(super) fn forget(&mut self, slot: Slot) {
        let Thread { tid, next, .. } = self.threads.get(slot.thread as usize);
        let before = self.sharing(tid).take_while(|at| *at != slot.thread as usize).last();
        match before {
            Some(at) => self.set_next(at, next),
            None => self.set_first(tid, next),
        }
        // A program that has just come to this slot goes on from here.
        self.threads.set(slot.thread as usize, Thread { next, ..Thread::ZERO });
        self.mark(tid);
        self.places.give_back(slot.thread);
        slot.histograms.into_iter().for_each(|place| self.histogram_places.give_back(place));
        self.followed -= 1;
    }

    /// The distributions of a thread's waits and runs since it is followed, if they are kept. Counts are modulo 2³². `None` too
    /// if they changed under every attempt to read them.
    pub(super) fn histograms(&self, slot: &Slot) -> Option<Histograms> {
        let (place, at) = (slot.histograms? as usize, slot.thread as usize);
        let sequence = self.threads.half_of(at, offset_of!(Thread, sequence) / 4);
        (0..ATTEMPTS).find_map(|_| {
            let before = sequence.load(Ordering::Acquire);
            let (mut histograms, thread) = (self.histograms.get(place), self.threads.get(at));
            atomic::fence(Ordering::Acquire);
            if before & 1 != 0 || sequence.load(Ordering::Relaxed) != before {
                std::hint::spin_loop();
                return None;
            }
            for logged in thread.log.iter().take(thread.logged.into()) {
                histograms.count(*logged);
            }
            Some(histograms)
        })
    }

    /// Takes what was charged for the thread's waits since the last call: the programs go on in another table.
    pub(super) fn take_charges(&self, slot: &Slot) -> Option<Charges> {
        const WORDS: usize = size_of::<Charges>() / 8;
        const RECENT: usize = offset_of!(Thread, recent) / 8;
        const WORDS_OF_RECENT: usize = size_of::<Recent>() / 8;
        let (place, at) = (slot.histograms? as usize, slot.thread as usize);
        let chosen = self.threads.byte_of(at, offset_of!(Thread, table));
        let in_use = usize::from(chosen.load(Ordering::Relaxed) & 1);
        let other = 1 - in_use;
        for word in 0..WORDS {
            self.charges.word_of(place, other * WORDS + word).store(0, Ordering::Relaxed);
        }
        for word in 0..WORDS_OF_RECENT {
            self.threads.word_of(at, RECENT + other * WORDS_OF_RECENT + word).store(0, Ordering::Relaxed);
        }
        chosen.store(u8::from(in_use == 0), Ordering::Release);
        // A switch on another CPU may still be charging to this one.
        let read = || {
            let Thread { recent, likely, .. } = self.threads.get(at);
            (self.charges.get(place).tables[in_use], recent[in_use], likely[in_use])
        };
        let mut last = read();
        for _ in 0..ATTEMPTS {
            let now = read();
            if std::mem::replace(&mut last, now) == now {
                break;
            }
        }
        let (mut charges, recent, likely) = last;
        if recent.who != 0
            && let Some(culprit) = charges.culprits.get_mut(usize::from(likely))
        {
            culprit.ns += u64::from(recent.ns);
        }
        Some(charges)
    }

    /// Where the programs go on from a slot.
    fn set_next(&self, at: usize, next: u16) {
        self.threads.short_of(at, offset_of!(Thread, next)).store(next, Ordering::Release);
    }

    /// Lets the kernel look up the threads that are followed since the last call, so that one that never
    /// leaves its CPU is known as well. Walks over all tasks of the host.
    ///
    /// # Errors
    /// If the iterator cannot be run.
    pub(super) fn seed(&mut self, object: &mut Object) -> Result<(), EbpfError> {
        if !std::mem::take(&mut self.unseeded) {
            return Ok(());
        }
        let program = "seed_threads";
        let failed = |e: &dyn std::error::Error| EbpfError::Program { program, reason: one_line(e) };
        let Some(iterator) = object.program_mut(program) else { return Ok(()) };
        let iterator: &mut Iter = iterator.try_into().map_err(|e: ProgramError| failed(&e))?;
        let id = iterator.attach().map_err(|e| failed(&e))?;
        let link = iterator.take_link(id).map_err(|e| failed(&e))?;
        let mut file: File = link.into_file().map_err(|e| failed(&e))?;
        let mut nothing = [0; 64];
        while file.read(&mut nothing).map_err(|e| failed(&e))? > 0 {}
        Ok(())
    }

    /// Reads every followed thread; [`Sched::times`] then has the figures.
    ///
    /// # Errors
    /// If the kernel refuses to run the reading program.
    pub(super) fn read(&mut self, object: &Object) -> Result<(), EbpfError> {
        read_slots(object, "read_threads", self.places.used)?;
        let now = MonotonicNs::now();
        if now.since(self.disarmed) > DISARM_INTERVAL_NS {
            self.disarmed = now;
            (0..CPUS as usize / 8)
                .for_each(|word| disarm(self.filter.word(offset_of!(Filter, armed) / 8 + word)));
        }
        Ok(())
    }

    /// Figures of a thread at the last [`Sched::read`]; `None` if it was never seen or could not be read.
    pub(super) fn times(&self, slot: &Slot) -> Option<ThreadTimes> {
        let reading = self.readings.get(slot.thread as usize);
        matches!(reading.status, READ_LIVE | READ_LAST).then_some(ThreadTimes {
            run_ns: reading.run_ns,
            wait_ns: reading.wait_ns,
            on_cpu_ns: reading.on_cpu_ns,
            sched_ns: reading.sched_ns,
            open_run_ns: reading.open_run_ns,
            open_wait_ns: reading.open_wait_ns,
            preemptions: reading.preemptions,
            yields: reading.yields,
            wakeups: reading.wakeups,
            migrations: reading.migrations,
            node_migrations: reading.node_migrations,
            throttled_ns: reading.throttled_ns,
            doing: match reading.doing {
                NOW_RUNNING => Doing::Running,
                NOW_WAITING => Doing::Waiting,
                _ => Doing::Sleeping,
            },
            last: reading.status == READ_LAST,
        })
    }

    /// Address of the thread's `task_struct`; 0 until it was seen.
    pub(super) fn task(&self, slot: &Slot) -> u64 {
        self.threads.get(slot.thread as usize).task
    }

    /// `CLOCK_MONOTONIC` of what [`Sched::times`] says, nanoseconds.
    pub(super) fn read_at_ns(&self, slot: &Slot) -> u64 {
        self.readings.get(slot.thread as usize).read_at_ns
    }

    /// When the followed thread started, nanoseconds after boot; `None` until it was seen.
    pub(super) fn started_ns(&self, slot: &Slot) -> Option<u64> {
        let started = self.readings.get(slot.thread as usize).start_boottime_ns;
        (started != 0).then_some(started)
    }

    /// Follows this thread itself and makes it sleep, which lets the kernel side compare the scheduler's clock with
    /// `CLOCK_MONOTONIC`. Later ticks repeat it by themselves, since this thread sleeps between them.
    pub(super) fn compare_clocks(&mut self) {
        self.clock.set(0, Clock::ZERO);
        let me = u32::try_from(rustix::thread::gettid().as_raw_nonzero().get()).unwrap_or(0);
        let thread = Thread { tid: me, histograms: CLOCK_THREAD, ..Thread::ZERO };
        if self.follow_as(Keep::Times, thread).is_err() {
            return; // Impossible in empty tables; without the clock nothing in progress is added.
        }
        for _ in 0..50 {
            if self.clock.get(0).count as usize >= COMPARISONS {
                return;
            }
            std::thread::sleep(std::time::Duration::from_micros(100));
        }
    }
}

/// The number of a place, plus 1; there are fewer places than that holds.
fn one_more(place: u32) -> u16 {
    u16::try_from(place + 1).unwrap_or(0)
}

/// Word of the filter, and position in it, of the first slot of a thread id.
fn first_place(tid: u32) -> (usize, u32) {
    let place = tid % TID_PLACES;
    (offset_of!(Filter, first) / 8 + place as usize / 4, place % 4 * 16)
}

/// Takes 1 off each byte of a word of [`Filter::armed`](monitor_ebpf::Filter::armed) that is not 0. A program may have set
/// one meanwhile: then it is left to the next time.
fn disarm(eight: &AtomicU64) {
    const { assert!(ARMED == 2) } // So that halves are one less.
    let armed = eight.load(Ordering::Relaxed);
    let less = armed >> 1 & 0x0101_0101_0101_0101;
    let _ = eight.compare_exchange(armed, less, Ordering::Relaxed, Ordering::Relaxed);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cpus_stop_writing_their_history_by_and_by() {
        let eight = AtomicU64::new(u64::from_le_bytes([ARMED, 0, 1, ARMED, 1, 0, 0, ARMED]));
        for expected in [[1, 0, 0, 1, 0, 0, 0, 1], [0; 8], [0; 8]] {
            disarm(&eight);
            assert_eq!(eight.load(Ordering::Relaxed).to_le_bytes(), expected);
        }
    }
}
