//! CPU time of a QEMU process's threads by class, as `/proc` has it: what the threads that are there have used, and what
//! those used that have gone since, as of the last look at them.

use std::{collections::HashMap, path::Path};

use crate::{
    inventory::QemuProcess,
    source::{
        ebpf::{CLASSES, class_of},
        procfs::{self, ProcfsError, ThreadReader},
    },
    units::Tid,
};

/// CPU time by class, nanoseconds.
pub(super) type ClassTimes = [u64; CLASSES];

/// Names are read again at one of so many looks, whatever is told of changes: notice of one may have been lost.
const LOOKS_BY_KNOWN_NAMES: u32 = 6;

/// The threads at the last look.
#[derive(Debug, Default)]
pub(super) struct Classes {
    seen: HashMap<u32, (usize, u64)>,
    ended: ClassTimes,
    /// Looks left for which the names hold that were read at an earlier one.
    names_hold: u32,
}

impl Classes {
    /// Threads came, went or have another name, or may: nobody would tell.
    pub(super) fn changed(&mut self) {
        self.names_hold = 0;
    }

    /// Looks at every thread of the process, and at kernel threads that work for it.
    pub(super) fn read(
        &mut self,
        root: &Path,
        (process, others): (QemuProcess, impl Iterator<Item = QemuProcess>),
        buffer: &mut [u8],
    ) -> Result<ClassTimes, ProcfsError> {
        let by_known_names = self.names_hold > 0;
        self.names_hold = if by_known_names { self.names_hold - 1 } else { LOOKS_BY_KNOWN_NAMES - 1 };
        let mut class_and_time = |process, tid| {
            let class = match self.seen.get(&tid) {
                Some((class, _)) if by_known_names => *class,
                _ => class_of(&procfs::thread_name(root, process, Tid(tid), buffer)?),
            };
            Ok((class, ThreadReader::open(root, process, Tid(tid))?.read(buffer)?.run.0))
        };
        let ids = procfs::thread_ids(root, process)?;
        let mut now = HashMap::with_capacity(ids.len());
        let others = others.map(|other| (other, other.tgid.0));
        for (process, tid) in ids.into_iter().map(|tid| (process, tid)).chain(others) {
            match class_and_time(process, tid) {
                Ok(known) => drop(now.insert(tid, known)),
                Err(error) if ProcfsError::is_gone(&error) => {}
                Err(error) => return Err(error),
            }
        }
        for (tid, (class, run)) in std::mem::replace(&mut self.seen, now) {
            // An id that stands for a thread with less time stands for another thread.
            if self.seen.get(&tid).is_none_or(|(_, later)| *later < run) {
                self.ended[class] += run;
            }
        }
        let mut times = self.ended;
        for (class, run) in self.seen.values() {
            times[*class] += run;
        }
        Ok(times)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::units::Tgid;

    #[test]
    fn names_are_read_again_when_something_changed_and_now_and_then() {
        let root = std::env::temp_dir().join(format!("kvm-monitor-classes-{}", std::process::id()));
        let thread = root.join("7/task/8");
        std::fs::create_dir_all(&thread).unwrap();
        std::fs::write(thread.join("schedstat"), "5 0 1\n").unwrap();
        let is_called = |name: &str| std::fs::write(thread.join("comm"), name).unwrap();
        let process = QemuProcess { tgid: Tgid(7), start_time_ticks: 0 };
        let mut classes = Classes::default();
        let worker = class_of(b"worker\0\0\0\0\0\0\0\0\0\0");
        let worker_ns = |classes: &mut Classes| {
            let times = classes.read(&root, (process, std::iter::empty()), &mut [0; 64]).unwrap();
            assert_eq!(times.iter().sum::<u64>(), 5);
            times[worker]
        };
        is_called("qemu-system-x86");
        assert_eq!(worker_ns(&mut classes), 0);
        is_called("worker");
        assert_eq!(worker_ns(&mut classes), 0, "nobody told");
        classes.changed();
        assert_eq!(worker_ns(&mut classes), 5);
        is_called("qemu-system-x86");
        let looks = (0..LOOKS_BY_KNOWN_NAMES).map(|_| worker_ns(&mut classes)).collect::<Vec<_>>();
        assert_eq!(looks, [5, 5, 5, 5, 5, 0]);
        std::fs::remove_dir_all(root).unwrap();
    }
}
