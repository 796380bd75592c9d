//! Memory of a QEMU process beyond its resident set: what is swapped out, in huge pages, and shared with others.

use std::{
    io,
    path::{Path, PathBuf},
    sync::mpsc::{Receiver, SyncSender, sync_channel},
};

use super::{OpenFile, ProcfsError};
use crate::{
    inventory::QemuProcess,
    units::{Bytes, MonotonicNs},
};

/// What `/proc/PID/status` tells of a process's memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemoryOf {
    /// `VmSwap`: swapped out by the host, shared memory excluded.
    pub swapped: Bytes,
    /// `HugetlbPages`: in the host's pool of huge pages; in no other figure.
    pub hugetlb: Bytes,
}

/// Reads swapped and huge pages; opens and closes the file.
///
/// # Errors
/// If the process is gone, or the file is not as documented in proc(5).
pub fn memory(root: &Path, process: QemuProcess, buffer: &mut [u8]) -> Result<MemoryOf, ProcfsError> {
    let path = root.join(process.tgid.to_string()).join("status");
    OpenFile::open(path)?.parse(buffer, |text| {
        let text = std::str::from_utf8(text).ok()?;
        Some(MemoryOf { swapped: kib_after(text, "VmSwap:")?, hugetlb: kib_after(text, "HugetlbPages:")? })
    })
}

/// The amount on the line that begins so, `VmSwap:  12 kB`.
fn kib_after(text: &str, key: &str) -> Option<Bytes> {
    let line = text.lines().find_map(|line| line.strip_prefix(key))?;
    Bytes::from_kib(line.trim().strip_suffix("kB")?.trim().parse().ok()?)
}

/// One reading of `/proc/PID/smaps_rollup`.
#[derive(Debug)]
pub struct Pss {
    /// Of which process.
    pub process: QemuProcess,
    /// How long the kernel took, nanoseconds: it looks at every page.
    pub took_ns: u64,
    /// The proportional set size.
    pub bytes: Result<Bytes, ProcfsError>,
}

/// Reads `Pss` on a thread of its own: the kernel walks the page tables for it, which takes long for a big guest that is
/// not in huge pages. It holds the process's `mmap_lock` for reading, which page faults share.
#[derive(Debug)]
pub struct PssReader {
    requests: SyncSender<QemuProcess>,
    answers: Receiver<Pss>,
    busy: bool,
}

impl PssReader {
    /// Starts the thread.
    ///
    /// # Errors
    /// If the system has none left.
    pub fn start(root: PathBuf) -> io::Result<Self> {
        let (requests, to_read) = sync_channel::<QemuProcess>(1);
        let (answer, answers) = sync_channel(1);
        std::thread::Builder::new().name("pss".into()).spawn(move || {
            while let Ok(process) = to_read.recv() {
                if answer.send(read(&root, process)).is_err() {
                    return;
                }
            }
        })?;
        Ok(Self { requests, answers, busy: false })
    }

    /// Asks, unless a question is open.
    pub fn ask(&mut self, process: QemuProcess) {
        self.busy = self.busy || self.requests.try_send(process).is_ok();
    }

    /// The answer, once there is one. Never waits.
    pub fn answer(&mut self) -> Option<Pss> {
        let answer = self.answers.try_recv().ok()?;
        self.busy = false;
        Some(answer)
    }

    /// A question is open.
    #[must_use]
    pub const fn is_busy(&self) -> bool {
        self.busy
    }
}

fn read(root: &Path, process: QemuProcess) -> Pss {
    let begin = MonotonicNs::now();
    let path = root.join(process.tgid.to_string()).join("smaps_rollup");
    let bytes = match std::fs::read_to_string(&path) {
        Err(source) => Err(ProcfsError::Read { path, source }),
        Ok(text) => kib_after(&text, "Pss:")
            .ok_or_else(|| ProcfsError::Parse { content: text.chars().take(80).collect(), path }),
    };
    Pss { process, took_ns: MonotonicNs::now().since(begin), bytes }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::units::Tgid;

    fn ourselves() -> QemuProcess {
        QemuProcess { tgid: Tgid(std::process::id()), start_time_ticks: 0 }
    }

    #[test]
    fn amounts_are_in_kib() {
        let check = |text, expected| assert_eq!(kib_after(text, "VmSwap:"), expected, "{text}");
        check("VmSwap:\t      12 kB\n", Some(Bytes(12 << 10)));
        check("x\nVmSwap: 0 kB", Some(Bytes(0)));
        check("VmSwap: 12", None);
        check("VmSwap: -1 kB", None);
        check("VmSwap: 18446744073709551615 kB", None);
        check("", None);
    }

    #[test]
    fn a_real_process_is_read_by_one_question_at_a_time() {
        let root = Path::new("/proc");
        let mut buffer = [0; 4096];
        assert!(memory(root, ourselves(), &mut buffer).is_ok());
        let mut reader = PssReader::start(root.to_owned()).unwrap();
        reader.ask(ourselves());
        assert!(reader.is_busy());
        let answer = loop {
            if let Some(answer) = reader.answer() {
                break answer;
            }
            std::thread::yield_now();
        };
        assert!(!reader.is_busy());
        assert_eq!(answer.process, ourselves());
        assert!(answer.bytes.unwrap().0 > 0);
    }

    #[test]
    fn a_process_that_is_gone_is_told_as_that() {
        let gone = QemuProcess { tgid: Tgid(u32::MAX), start_time_ticks: 0 };
        assert!(read(Path::new("/proc"), gone).bytes.unwrap_err().is_gone());
    }
}
