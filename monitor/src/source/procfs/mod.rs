//! The `/proc` source: finds QEMU processes and their vCPU threads, and reads what the kernel counts for each.
//!
//! Finding uses the `procfs` crate. The files read at every tick are kept open and read with `pread`, without
//! allocating. The root directory is an argument, so that tests can hand over a made-up tree.

mod command_line;
pub mod images;
mod memory;

use std::{
    collections::HashMap,
    ffi::OsString,
    fs::File,
    io,
    os::{
        fd::OwnedFd,
        unix::{ffi::OsStringExt as _, fs::FileExt as _},
    },
    path::{Path, PathBuf},
    time::Duration,
};

use procfs::process::Process;
use rustix::fs::{Mode, OFlags};

use crate::{
    inventory::QemuProcess,
    units::{Bytes, Count, Nanos, Tgid, Tid, VcpuIndex, duration_ns, nanoseconds},
};

pub use command_line::{Drive, QemuArgs, parse_command_line};
pub use memory::{MemoryOf, Pss, PssReader, memory};

/// What the kernel says of a process that has ended while a file of it is open.
const GONE: i32 = rustix::io::Errno::SRCH.raw_os_error();

/// Why something under `/proc` could not be read.
#[derive(Debug, thiserror::Error)]
pub enum ProcfsError {
    /// A file could not be read; `ESRCH` and `ENOENT` mean that the process or thread is gone.
    #[error("cannot read {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// A file did not look as the kernel's documentation says.
    #[error("{}: unexpected content {content:?}", path.display())]
    Parse {
        /// The file.
        path: PathBuf,
        /// Its begin.
        content: String,
    },
    /// The list of processes could not be read.
    #[error("cannot list the processes under {}: {reason}", path.display())]
    List {
        /// The directory.
        path: PathBuf,
        /// What went wrong.
        reason: String,
    },
}

impl ProcfsError {
    /// Whether it only says that the process or thread has ended.
    #[must_use]
    pub fn is_gone(&self) -> bool {
        matches!(self, Self::Read { source, .. }
            if source.kind() == io::ErrorKind::NotFound || source.raw_os_error() == Some(GONE))
    }
}

/// A QEMU process as its command line describes it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FoundQemu {
    /// The process.
    pub process: QemuProcess,
    /// What its command line says.
    pub args: QemuArgs,
}

/// A kernel thread that moves packets for a QEMU process: before Linux 6.4, vhost's threads are none of QEMU's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VhostThread {
    /// The thread, a process of its own.
    pub thread: QemuProcess,
    /// The process it works for, which stands in its name (`vhost_dev_set_owner()`).
    pub owner: Tgid,
}

/// A new process is looked at this often before it is taken for something else than QEMU: right after the
/// fork it still has its parent's command line.
const LOOKS: u8 = 3;

/// The list of processes, looked at again and again.
#[derive(Debug)]
pub struct Processes {
    root: PathBuf,
    /// Processes that are not QEMU, by id, with the number of looks taken; QEMU processes with their start.
    seen: HashMap<u32, Seen>,
}

#[derive(Debug)]
enum Seen {
    Other { looks: u8, round: u64 },
    Qemu { process: QemuProcess, round: u64 },
}

/// What changed since the last look.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct ProcessChanges {
    /// QEMU processes that are new.
    pub started: Vec<FoundQemu>,
    /// QEMU processes that are gone.
    pub ended: Vec<QemuProcess>,
    /// Kernel threads of vhost that are new.
    pub vhosts: Vec<VhostThread>,
}

impl Processes {
    /// Nothing seen yet. `root` is `/proc`.
    #[must_use]
    pub fn new(root: &Path) -> Self {
        Self { root: root.to_owned(), seen: HashMap::new() }
    }

    /// Looks for QEMU processes that came or went. Command lines are read of new processes only.
    ///
    /// # Errors
    /// If the directory cannot be listed.
    pub fn look(&mut self, round: u64) -> Result<ProcessChanges, ProcfsError> {
        let mut changes = ProcessChanges::default();
        for pid in self.pids()? {
            if self.is_known(pid, round) {
                continue;
            }
            match self.qemu(pid) {
                Some(found) => {
                    let now = Seen::Qemu { process: found.process, round };
                    if let Some(Seen::Qemu { process, .. }) = self.seen.insert(pid, now) {
                        changes.ended.push(process);
                    }
                    changes.started.push(found);
                }
                None => match self.vhost(pid) {
                    Some(vhost) => {
                        self.seen.insert(pid, Seen::Other { looks: LOOKS, round });
                        changes.vhosts.push(vhost);
                    }
                    None => self.count_look(pid, round),
                },
            }
        }
        self.seen.retain(|_, seen| match seen {
            Seen::Qemu { process, round: last } if *last != round => {
                changes.ended.push(*process);
                false
            }
            Seen::Qemu { .. } => true,
            Seen::Other { round: last, .. } => *last == round,
        });
        Ok(changes)
    }

    fn pids(&self) -> Result<Vec<u32>, ProcfsError> {
        let list =
            |source: io::Error| ProcfsError::List { path: self.root.clone(), reason: source.to_string() };
        let entries = std::fs::read_dir(&self.root).map_err(list)?;
        Ok(entries.filter_map(|e| e.ok()?.file_name().to_str()?.parse().ok()).collect())
    }

    /// Marks a process as still there; false if it has to be looked at.
    fn is_known(&mut self, pid: u32, round: u64) -> bool {
        let root = self.root.clone();
        match self.seen.get_mut(&pid) {
            Some(Seen::Qemu { process, round: last }) => {
                // The same id may by now be another process.
                let same = start_time(&root, pid) == Some(process.start_time_ticks);
                if same {
                    *last = round;
                }
                same
            }
            Some(Seen::Other { looks, round: last }) => {
                *last = round;
                *looks >= LOOKS
            }
            None => false,
        }
    }

    fn count_look(&mut self, pid: u32, round: u64) {
        match self.seen.get_mut(&pid) {
            Some(Seen::Other { looks, .. }) => *looks += 1,
            // A QEMU process id that is now another process: `look` reports the end, as it was not marked.
            Some(Seen::Qemu { .. }) => {}
            None => {
                self.seen.insert(pid, Seen::Other { looks: 1, round });
            }
        }
    }

    fn qemu(&self, pid: u32) -> Option<FoundQemu> {
        let process = Process::new_with_root(self.root.join(pid.to_string())).ok()?;
        let args = parse_command_line(&process.cmdline().ok()?)?;
        let start_time_ticks = process.stat().ok()?.starttime;
        Some(FoundQemu { process: QemuProcess { tgid: Tgid(pid), start_time_ticks }, args })
    }

    /// A QEMU process id that is now another process has to end first.
    fn vhost(&self, pid: u32) -> Option<VhostThread> {
        /// The parent of every kernel thread but itself, by which no process can pass for one.
        const KTHREADD: &[u8] = b"2";
        if matches!(self.seen.get(&pid), Some(Seen::Qemu { .. })) {
            return None;
        }
        let text = std::fs::read(self.root.join(pid.to_string()).join("stat")).ok()?;
        let name = text.split(|byte| *byte == b'(').nth(1)?.strip_prefix(b"vhost-")?;
        let owner = std::str::from_utf8(name.split(|byte| *byte == b')').next()?).ok()?.parse().ok()?;
        let mut fields = stat_fields(&text)?;
        let is_kernels = fields.nth(1)?.as_bytes() == KTHREADD;
        let start_time_ticks = fields.nth(17)?.parse().ok()?;
        is_kernels.then_some(VhostThread {
            thread: QemuProcess { tgid: Tgid(pid), start_time_ticks },
            owner: Tgid(owner),
        })
    }
}

fn start_time(root: &Path, pid: u32) -> Option<u64> {
    let file = OpenFile::open(root.join(pid.to_string()).join("stat")).ok()?;
    file.parse(&mut [0; 1024], |text| stat_fields(text)?.nth(19)?.parse().ok()).ok()
}

/// [`QemuProcess::start_time_ticks`] of a process that began so long ago.
#[must_use]
pub fn start_time_of(age: Duration) -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
    let began_ns = nanoseconds(now.tv_sec, now.tv_nsec).saturating_sub(duration_ns(age));
    began_ns / (1_000_000_000 / rustix::param::clock_ticks_per_second().max(1))
}

/// Whether a process still is the one it was.
#[must_use]
pub fn lives(root: &Path, process: QemuProcess) -> bool {
    start_time(root, process.tgid.0) == Some(process.start_time_ticks)
}

/// The threads of a process, ascending.
///
/// # Errors
/// If the process is gone or its threads cannot be listed.
pub fn thread_ids(root: &Path, process: QemuProcess) -> Result<Vec<u32>, ProcfsError> {
    let path = root.join(process.tgid.to_string()).join("task");
    let entries =
        std::fs::read_dir(&path).map_err(|source| ProcfsError::Read { path: path.clone(), source })?;
    let mut ids: Vec<u32> = entries.filter_map(|e| e.ok()?.file_name().to_str()?.parse().ok()).collect();
    ids.sort_unstable();
    Ok(ids)
}

/// Those of a QEMU process's threads that run a vCPU, by vCPU. QEMU names them `CPU n/KVM` or `CPU n/TCG` where
/// it was started with `debug-threads=on`, as libvirt does.
#[must_use]
pub fn vcpu_threads(root: &Path, process: QemuProcess, ids: &[u32]) -> Vec<(VcpuIndex, Tid)> {
    let tasks = root.join(process.tgid.to_string()).join("task");
    let vcpu = |tid: &u32| {
        let comm = std::fs::read(tasks.join(tid.to_string()).join("comm")).ok()?;
        Some((vcpu_of_comm(&comm)?, Tid(*tid)))
    };
    let mut threads: Vec<_> = ids.iter().filter_map(vcpu).collect();
    threads.sort_unstable();
    threads
}

/// The vCPU a thread name stands for.
#[must_use]
pub fn vcpu_of_comm(comm: &[u8]) -> Option<VcpuIndex> {
    let name = std::str::from_utf8(comm).ok()?.trim_end().strip_prefix("CPU ")?;
    let (index, kind) = name.split_once('/')?;
    matches!(kind, "KVM" | "TCG" | "HVF" | "Xen").then_some(())?;
    index.parse().ok().map(VcpuIndex)
}

/// What the kernel counts for a thread: `/proc/PID/task/TID/schedstat`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SchedStat {
    /// Time on a CPU since the thread started, as of the last scheduler tick.
    pub run: Nanos,
    /// Time runnable but not running; finished waits only.
    pub wait: Nanos,
}

/// What the kernel counts for a process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ProcessStat {
    /// Time in user mode, exited threads included; grain of one clock tick (10 ms).
    pub user: Nanos,
    /// Time in the kernel, likewise.
    pub system: Nanos,
    /// Resident memory.
    pub rss: Bytes,
}

/// The open files of a process.
#[derive(Debug)]
pub struct ProcessReader {
    stat: OpenFile,
    ns_per_tick: u64,
    page_size: u64,
}

impl ProcessReader {
    /// Opens the files of a process.
    ///
    /// # Errors
    /// If the process is gone or not readable.
    pub fn open(root: &Path, process: QemuProcess) -> Result<Self, ProcfsError> {
        let dir = root.join(process.tgid.to_string());
        Ok(Self {
            stat: OpenFile::open(dir.join("stat"))?,
            ns_per_tick: 1_000_000_000 / rustix::param::clock_ticks_per_second().max(1),
            page_size: u64::try_from(rustix::param::page_size()).unwrap_or(4096),
        })
    }

    /// Reads the counters.
    ///
    /// # Errors
    /// If the process is gone or a file is not as documented in proc(5).
    pub fn read(&self, buffer: &mut [u8]) -> Result<ProcessStat, ProcfsError> {
        // `rss` is the second number of `statm` (`get_mm_rss()` in both `do_task_stat()` and `task_statm()`).
        let (user, system, pages) = self.stat.parse(buffer, |text| {
            let mut fields = stat_fields(text)?.skip(11);
            let mut number = |skip| fields.nth(skip)?.parse::<u64>().ok();
            Some((number(0)?, number(0)?, number(8)?))
        })?;
        Ok(ProcessStat {
            user: Nanos(user * self.ns_per_tick),
            system: Nanos(system * self.ns_per_tick),
            rss: Bytes(pages * self.page_size),
        })
    }
}

/// The directory with the descriptors of a process, held so that looking into it needs no way from the root.
#[derive(Debug)]
pub struct OpenFiles(OwnedFd);

impl OpenFiles {
    /// Opens the directory.
    ///
    /// # Errors
    /// If the process is gone.
    pub fn open(root: &Path, process: QemuProcess) -> Result<Self, ProcfsError> {
        let path = root.join(process.tgid.to_string()).join("fd");
        match rustix::fs::open(&path, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty()) {
            Ok(directory) => Ok(Self(directory)),
            Err(error) => Err(ProcfsError::Read { path, source: error.into() }),
        }
    }

    /// How many there are, to see cheaply whether that changed; `None` before Linux 6.2 (`proc_fd_getattr()`), and of a
    /// process that has ended.
    #[must_use]
    pub fn count(&self) -> Option<u64> {
        let size = u64::try_from(rustix::fs::fstat(&self.0).ok()?.st_size).ok()?;
        (size > 0).then_some(size)
    }

    /// What one of them leads to.
    #[must_use]
    pub fn target(&self, number: u32) -> Option<PathBuf> {
        let target = rustix::fs::readlinkat(&self.0, number.to_string(), Vec::new()).ok()?;
        Some(OsString::from_vec(target.into_bytes()).into())
    }
}

/// How often a thread left its CPU.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Switches {
    /// Because it had nothing to do.
    pub voluntary: Count,
    /// While it could have run on.
    pub involuntary: Count,
}

/// Context switches of a thread since it started; opens and closes its file.
///
/// # Errors
/// If the thread is gone, or the file is not as documented in proc(5).
pub fn switches(
    root: &Path,
    process: QemuProcess,
    tid: Tid,
    buffer: &mut [u8],
) -> Result<Switches, ProcfsError> {
    let dir = root.join(process.tgid.to_string()).join("task").join(tid.to_string());
    OpenFile::open(dir.join("status"))?.parse(buffer, |text| {
        let text = std::str::from_utf8(text).ok()?;
        let value = |key| text.lines().find_map(|line| line.strip_prefix(key)?.trim().parse().ok());
        let voluntary = Count(value("voluntary_ctxt_switches:")?);
        Some(Switches { voluntary, involuntary: Count(value("nonvoluntary_ctxt_switches:")?) })
    })
}

/// Name of a thread, 0 bytes after it; opens and closes its file.
///
/// # Errors
/// If the thread is gone, or the file is not as documented.
pub fn thread_name(
    root: &Path,
    process: QemuProcess,
    tid: Tid,
    buffer: &mut [u8],
) -> Result<[u8; 16], ProcfsError> {
    let dir = root.join(process.tgid.to_string()).join("task").join(tid.to_string());
    OpenFile::open(dir.join("comm"))?.parse(buffer, |text| {
        let name = text.strip_suffix(b"\n").unwrap_or(text);
        let mut comm = [0; 16];
        comm.get_mut(..name.len())?.copy_from_slice(name);
        Some(comm)
    })
}

/// The open file of a thread.
#[derive(Debug)]
pub struct ThreadReader {
    schedstat: OpenFile,
}

impl ThreadReader {
    /// Opens the file of a thread.
    ///
    /// # Errors
    /// If the thread is gone, or the kernel keeps no such figures (`CONFIG_SCHED_INFO`).
    pub fn open(root: &Path, process: QemuProcess, tid: Tid) -> Result<Self, ProcfsError> {
        let dir = root.join(process.tgid.to_string()).join("task").join(tid.to_string());
        Ok(Self { schedstat: OpenFile::open(dir.join("schedstat"))? })
    }

    /// Reads the counters.
    ///
    /// # Errors
    /// If the thread is gone or the file is not as documented in sched-stats.rst.
    pub fn read(&self, buffer: &mut [u8]) -> Result<SchedStat, ProcfsError> {
        self.schedstat.parse(buffer, |text| {
            let mut fields = numbers(text)?;
            let run = Nanos(fields.next()?.parse().ok()?);
            Some(SchedStat { run, wait: Nanos(fields.next()?.parse().ok()?) })
        })
    }
}

#[derive(Debug)]
struct OpenFile {
    file: File,
    path: PathBuf,
}

impl OpenFile {
    fn open(path: PathBuf) -> Result<Self, ProcfsError> {
        match File::open(&path) {
            Ok(file) => Ok(Self { file, path }),
            Err(source) => Err(ProcfsError::Read { path, source }),
        }
    }

    fn parse<T>(&self, buffer: &mut [u8], parse: impl Fn(&[u8]) -> Option<T>) -> Result<T, ProcfsError> {
        let read = self.file.read_at(buffer, 0);
        let len = read.map_err(|source| ProcfsError::Read { path: self.path.clone(), source })?;
        if len == 0 {
            // A file of a process that ended while it is open reads as empty or fails, depending on the file.
            let source = io::Error::from_raw_os_error(GONE);
            return Err(ProcfsError::Read { path: self.path.clone(), source });
        }
        let text = &buffer[..len];
        parse(text).ok_or_else(|| ProcfsError::Parse {
            path: self.path.clone(),
            content: String::from_utf8_lossy(&text[..len.min(80)]).into_owned(),
        })
    }
}

/// The fields of `/proc/PID/stat` after the command name, `state` first; the name may hold anything.
fn stat_fields(text: &[u8]) -> Option<impl Iterator<Item = &str>> {
    let after = text.iter().rposition(|b| *b == b')')? + 1;
    numbers(&text[after..])
}

fn numbers(text: &[u8]) -> Option<impl Iterator<Item = &str>> {
    Some(std::str::from_utf8(text).ok()?.split_ascii_whitespace())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn vcpu_names() {
        let check = |comm: &str, expected| assert_eq!(vcpu_of_comm(comm.as_bytes()), expected, "{comm}");
        check("CPU 0/KVM\n", Some(VcpuIndex(0)));
        check("CPU 31/TCG\n", Some(VcpuIndex(31)));
        check("CPU 1/KVM", Some(VcpuIndex(1)));
        check("CPU x/KVM\n", None);
        check("IO iothread1\n", None);
        check("qemu-system-x86\n", None);
        assert_eq!(vcpu_of_comm(b"CPU \xff/KVM"), None);
    }

    #[test]
    fn stat_survives_any_command_name() {
        let text = b"42 (a) b) c) S 1 2 3 4 5 6 7 8 9 10 77 88 0";
        let mut fields = stat_fields(text).unwrap().skip(11);
        assert_eq!((fields.next(), fields.next()), (Some("77"), Some("88")));
    }

    #[test]
    fn the_process_is_read_by_the_numbers_of_proc_5() {
        let dir = tempdir::Dir::new();
        dir.process(7, "", 100);
        let before = "0 ".repeat(10);
        let stat = format!("7 (q) S {before}3 4 {}17 5 6", "0 ".repeat(8));
        std::fs::write(dir.path().join("7/stat"), stat).unwrap();
        let process = QemuProcess { tgid: Tgid(7), start_time_ticks: 0 };
        let reader = ProcessReader::open(dir.path(), process).unwrap();
        let read = reader.read(&mut [0; 1024]).unwrap();
        assert_eq!((read.user.0 / reader.ns_per_tick, read.system.0 / reader.ns_per_tick), (3, 4));
        assert_eq!(read.rss.0 / reader.page_size, 17);
    }

    #[test]
    fn what_begins_now_is_young_and_what_began_with_the_host_is_not() {
        let ourselves = start_time(Path::new("/proc"), std::process::id()).unwrap();
        assert!(ourselves >= start_time_of(Duration::from_secs(3600)));
        assert!(ourselves <= start_time_of(Duration::ZERO));
    }

    #[test]
    fn the_files_that_a_process_has_open_are_counted_and_named() {
        let root = Path::new("/proc");
        let ourselves = QemuProcess {
            tgid: Tgid(std::process::id()),
            start_time_ticks: start_time(root, std::process::id()).unwrap(),
        };
        let files = OpenFiles::open(root, ourselves).unwrap();
        let path = std::env::temp_dir().join(format!("kvm-monitor-open-files-{}", std::process::id()));
        let file = File::create(&path).unwrap();
        let number = u32::try_from(std::os::fd::AsRawFd::as_raw_fd(&file)).unwrap();
        let target = files.target(number);
        std::fs::remove_file(&path).unwrap();
        assert_eq!(target, Some(path));
        assert!(files.count().is_none_or(|count| count > 3));
    }

    /// A made-up `/proc` with one process.
    fn tree(pid: u32, cmdline: &str, start: u64) -> tempdir::Dir {
        let dir = tempdir::Dir::new();
        dir.process(pid, cmdline, start);
        dir
    }

    #[test]
    fn processes_come_go_and_reuse_ids() {
        let dir = tree(7, "qemu-system-x86_64\0-name\0a\0", 100);
        let mut processes = Processes::new(dir.path());
        let first = processes.look(1).unwrap();
        assert_eq!(first.started[0].process, QemuProcess { tgid: Tgid(7), start_time_ticks: 100 });
        assert_eq!(processes.look(2).unwrap(), ProcessChanges::default());
        dir.process(7, "qemu-system-x86_64\0-name\0b\0", 200);
        let reused = processes.look(3).unwrap();
        assert_eq!(reused.started[0].args.name.as_deref(), Some("b"));
        assert_eq!(reused.ended[0].start_time_ticks, 100);
        dir.process(7, "sleep\0", 300);
        assert_eq!(processes.look(4).unwrap().ended[0].start_time_ticks, 200);
        std::fs::remove_dir_all(dir.path().join("7")).unwrap();
        assert_eq!(processes.look(5).unwrap(), ProcessChanges::default());
    }

    #[test]
    fn a_process_that_becomes_qemu_after_its_fork_is_found() {
        let dir = tree(7, "libvirtd\0", 100);
        let mut processes = Processes::new(dir.path());
        assert_eq!(processes.look(1).unwrap(), ProcessChanges::default());
        dir.process(7, "qemu-system-x86_64\0", 100);
        assert_eq!(processes.look(2).unwrap().started.len(), 1);
    }

    #[test]
    fn a_kernel_thread_of_vhost_is_found_once_and_nobody_passes_for_one() {
        let dir = tree(7, "qemu-system-x86_64\0", 100);
        dir.process(8, "", 200);
        dir.process(9, "", 300);
        let stat = |pid: u32, parent: u32, start: u32| {
            let text = format!("{pid} (vhost-7) S {parent} {}{start} 0 0", "0 ".repeat(17));
            std::fs::write(dir.path().join(pid.to_string()).join("stat"), text).unwrap();
        };
        stat(8, 2, 200);
        stat(9, 1, 300);
        let mut processes = Processes::new(dir.path());
        let thread = QemuProcess { tgid: Tgid(8), start_time_ticks: 200 };
        assert_eq!(processes.look(1).unwrap().vhosts, [VhostThread { thread, owner: Tgid(7) }]);
        assert_eq!(processes.look(2).unwrap(), ProcessChanges::default());
    }

    mod tempdir {
        use std::path::{Path, PathBuf};

        pub(super) struct Dir(PathBuf);

        impl Dir {
            pub(super) fn new() -> Self {
                static NEXT: std::sync::atomic::AtomicU32 = std::sync::atomic::AtomicU32::new(0);
                let n = NEXT.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
                let path = std::env::temp_dir().join(format!("kvm-monitor-test-{}-{n}", std::process::id()));
                std::fs::create_dir_all(&path).unwrap();
                Self(path)
            }

            pub(super) fn path(&self) -> &Path {
                &self.0
            }

            pub(super) fn process(&self, pid: u32, cmdline: &str, start: u64) {
                let dir = self.0.join(pid.to_string());
                std::fs::create_dir_all(&dir).unwrap();
                std::fs::write(dir.join("cmdline"), cmdline).unwrap();
                let zeros = "0 ".repeat(18);
                std::fs::write(dir.join("stat"), format!("{pid} (q) S {zeros}{start} {}", "0 ".repeat(30)))
                    .unwrap();
            }
        }

        impl Drop for Dir {
            fn drop(&mut self) {
                let _ = std::fs::remove_dir_all(&self.0);
            }
        }
    }
}
