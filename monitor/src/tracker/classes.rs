//! CPU time of a QEMU process's threads by class, as `/proc` has it: what the threads that are there have used, and what
//! those used that have gone since, as of the last look at them.

use std::{collections::HashMap, path::Path};

use crate::{
    inventory::QemuProcess,
    source::{
        ebpf::{CLASSES, class_of},
        procfs::{self, ProcfsError},
    },
};

/// CPU time by class, nanoseconds.
pub(super) type ClassTimes = [u64; CLASSES];

/// The threads at the last look.
#[derive(Debug, Default)]
pub(super) struct Classes {
    seen: HashMap<u32, (usize, u64)>,
    ended: ClassTimes,
}

impl Classes {
    /// Looks at every thread of the process, and at kernel threads that work for it.
    pub(super) fn read(
        &mut self,
        root: &Path,
        (process, others): (QemuProcess, impl Iterator<Item = QemuProcess>),
        buffer: &mut [u8],
    ) -> Result<ClassTimes, ProcfsError> {
        let ids = procfs::thread_ids(root, process)?;
        let mut now = HashMap::with_capacity(ids.len());
        let others = others.map(|other| (other, other.tgid.0));
        for (process, tid) in ids.into_iter().map(|tid| (process, tid)).chain(others) {
            match procfs::named_time(root, process, tid, buffer) {
                Ok((comm, run)) => drop(now.insert(tid, (class_of(&comm), run.0))),
                Err(error) if error.is_gone() => {}
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
