//! Processes that are followed as a whole, and what changed among processes and threads.

use std::os::fd::{AsFd as _, OwnedFd};

use aya::{
    Ebpf as Object,
    maps::{HashMap, MapData, RingBuf},
};
use monitor_ebpf::{
    CHANGE_END, CHANGE_EXEC, CHANGE_THREADS, CLASSES, Change, PROCESS_READ, PROCESS_TORN, Process,
    ProcessReading,
};

use super::times::{Happened, ProcessTimes, Torn};
use super::{EbpfError, map, mapped::Mapped, read_slots, sched::Places, take_map};
use crate::units::Tgid;

/// A process that is followed.
#[derive(Debug, PartialEq, Eq)]
pub struct ProcessSlot(u32);

/// The maps of the process programs.
pub(super) struct Processes {
    of: HashMap<MapData, u32, u32>,
    slots: Mapped<Process>,
    readings: Mapped<ProcessReading>,
    changes: RingBuf<MapData>,
    places: Places,
}

impl Processes {
    pub(super) fn new(object: &mut Object) -> Result<Self, EbpfError> {
        Ok(Self {
            slots: map(object, "PROCESSES")?,
            readings: map(object, "PROCESS_READ")?,
            of: take_map(object, "PROCESS_OF")?,
            changes: take_map(object, "CHANGES")?,
            places: Places::default(),
        })
    }

    /// `None` if the kernel tables have no room.
    pub(super) fn follow(&mut self, tgid: Tgid) -> Option<ProcessSlot> {
        let place = self.places.take(self.slots.len())?;
        self.readings.set(place as usize, ProcessReading::ZERO);
        self.slots.set(place as usize, Process { tgid: tgid.0, ..Process::ZERO });
        if self.of.insert(tgid.0, place, 0).is_err() {
            self.slots.set(place as usize, Process::ZERO);
            self.places.give_back(place);
            return None;
        }
        Some(ProcessSlot(place))
    }

    #[expect(clippy::needless_pass_by_value, reason = "the slot must not be used afterwards")]
    pub(super) fn forget(&mut self, slot: ProcessSlot) {
        let tgid = self.slots.get(slot.0 as usize).tgid;
        // It fails only where there is nothing to remove; or the id already stands for another slot.
        if self.of.get(&tgid, 0).is_ok_and(|place| place == slot.0) {
            let _ = self.of.remove(&tgid);
        }
        self.slots.set(slot.0 as usize, Process::ZERO);
        self.places.give_back(slot.0);
    }

    pub(super) fn read(&self, object: &Object) -> Result<(), EbpfError> {
        read_slots(object, "read_processes", self.places.used())
    }

    /// Figures of a process at the last read; an error says that it could not be read right.
    pub(super) fn times(&self, slot: &ProcessSlot) -> Option<Result<ProcessTimes, Torn>> {
        let reading = self.readings.get(slot.0 as usize);
        match reading.status {
            PROCESS_READ if reading.threads > 0 => {
                let [emulator_ns, vcpu_ns, iothread_ns, worker_ns, vhost_ns] = reading.class_ns;
                const _: () = assert!(CLASSES == 5);
                Some(Ok(ProcessTimes {
                    time_ns: reading.earlier_ns + reading.class_ns.iter().sum::<u64>(),
                    emulator_ns,
                    vcpu_ns,
                    iothread_ns,
                    worker_ns,
                    vhost_ns,
                    threads: reading.threads,
                    ended: self.slots.get(slot.0 as usize).ended,
                    start_boottime_ns: reading.start_boottime_ns,
                }))
            }
            PROCESS_TORN => Some(Err(Torn)),
            _ => None,
        }
    }

    /// What happened since the last call; each process's later changes are told anew from now on.
    pub(super) fn happened(&mut self) -> Vec<Happened> {
        let mut happened = Vec::new();
        while let Some(item) = self.changes.next() {
            let Some((tgid, kind)) = change(&item) else { continue };
            match kind {
                CHANGE_THREADS => happened.push(Happened::Threads(tgid)),
                CHANGE_EXEC => happened.push(Happened::Began(tgid)),
                CHANGE_END => happened.push(Happened::Ended(tgid)),
                _ => {}
            }
        }
        for one in &happened {
            if let Happened::Threads(tgid) = one
                && let Ok(place) = self.of.get(&tgid.0, 0)
            {
                // The first word of `Process` holds `tgid` and `changed`.
                self.slots
                    .word_of(place as usize, 0)
                    .fetch_and(0xffff_ffff, std::sync::atomic::Ordering::AcqRel);
            }
        }
        happened
    }

    /// A descriptor that becomes readable when something happened.
    pub(super) fn changes(&self) -> std::io::Result<OwnedFd> {
        self.changes.as_fd().try_clone_to_owned()
    }
}

fn change(item: &[u8]) -> Option<(Tgid, u32)> {
    const _: () = assert!(size_of::<Change>() == 8);
    let (tgid, kind) = (item.get(..4)?, item.get(4..8)?);
    Some((Tgid(u32::from_ne_bytes(tgid.try_into().ok()?)), u32::from_ne_bytes(kind.try_into().ok()?)))
}
