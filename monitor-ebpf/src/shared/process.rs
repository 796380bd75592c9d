//! What is kept of whole processes: the CPU time of all their threads, living and ended, by class of thread.

/// Processes that can be followed at once.
pub const PROCESSES: u32 = 2_048;
/// Threads of one process that are read; a process with more gives no reading.
pub const PROCESS_THREADS: u32 = 512;

/// Classes of threads, by the names QEMU and the kernel give them; see [`class_of`].
pub const CLASSES: usize = 5;
/// Every thread that is none of the others: QEMU's main loop, its monitors, displays and migration.
pub const CLASS_EMULATOR: usize = 0;
/// A vCPU.
pub const CLASS_VCPU: usize = 1;
/// An iothread of the domain.
pub const CLASS_IOTHREAD: usize = 2;
/// A thread that carries out requests for another: QEMU's thread pool, and io_uring's.
pub const CLASS_WORKER: usize = 3;
/// A vhost thread.
pub const CLASS_VHOST: usize = 4;

/// The class of a thread of a QEMU process by its name.
///
/// QEMU names its threads when it was started with `debug-threads=on`, as libvirt does: `CPU n/KVM` or `CPU n/TCG`,
/// `IO ` and the id of the iothread object (libvirt: `iothreadN`; the monitor's own is `mon_iothread`), `worker`. The
/// kernel names `iou-wrk-TID` and `iou-sqp-PID` (io_uring) and `vhost-PID`.
#[must_use]
#[inline(always)]
pub const fn class_of(comm: &[u8; 16]) -> usize {
    if begins(comm, b"CPU ") {
        CLASS_VCPU
    } else if begins(comm, b"IO ") && !begins(comm, b"IO mon_") {
        CLASS_IOTHREAD
    } else if begins(comm, b"worker") || begins(comm, b"iou-") {
        CLASS_WORKER
    } else if begins(comm, b"vhost-") {
        CLASS_VHOST
    } else {
        CLASS_EMULATOR
    }
}

/// Whether a name begins so.
#[must_use]
#[inline(always)]
pub const fn begins<const N: usize>(comm: &[u8; 16], with: &[u8; N]) -> bool {
    let mut i = 0;
    while i < N {
        if comm[i] != with[i] {
            return false;
        }
        i += 1;
    }
    true
}

/// A followed process, in the slot that user space gave it.
///
/// `tgid` is written by user space, `task`, `threads` and `start_boottime_ns` by `seed_threads`; the rest counts threads of it
/// that ended since it is followed.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Process {
    /// Process id in the initial pid namespace; 0 is a free slot.
    pub tgid: u32,
    /// Not 0 from the moment a thread of it came, ended or got another name until user space has taken note.
    pub changed: u32,
    /// Address of the `task_struct` of its first thread, 0 until it was seen; believed only while its `start_boottime`, which
    /// no two threads share, is this.
    pub task: u64,
    /// Address of its `signal_struct.thread_head`, the list of its threads: the same as long as it lives.
    pub threads: u64,
    /// `task_struct.start_boottime` of that thread, nanoseconds.
    pub start_boottime_ns: u64,
    /// CPU time of threads that ended before it was followed, nanoseconds (`signal->sum_sched_runtime`).
    pub earlier_ns: u64,
    /// CPU time of the threads that ended since, by class, nanoseconds, when they left their CPU for the last time.
    pub ended_ns: [u64; CLASSES],
    /// Threads that began to end.
    pub ending: u64,
    /// Threads that ended.
    pub ended: u64,
}

impl Process {
    /// A free slot.
    pub const ZERO: Self = Self {
        tgid: 0,
        changed: 0,
        task: 0,
        threads: 0,
        start_boottime_ns: 0,
        earlier_ns: 0,
        ended_ns: [0; CLASSES],
        ending: 0,
        ended: 0,
    };
}

/// One process as `read_processes` found it.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ProcessReading {
    /// One of the `PROCESS_…` states.
    pub status: u32,
    /// Its living threads. None: the process has ended, and its `task_struct` is about to go. (The program must not
    /// look at this number, or the verifier follows every possible count.)
    pub threads: u32,
    /// Copied from [`Process::earlier_ns`].
    pub earlier_ns: u64,
    /// CPU time of the other threads, by class, nanoseconds by the task clock.
    pub class_ns: [u64; CLASSES],
    /// Copied from [`Process::start_boottime_ns`].
    pub start_boottime_ns: u64,
}

impl ProcessReading {
    /// No reading.
    pub const ZERO: Self = Self {
        status: PROCESS_GONE,
        threads: 0,
        earlier_ns: 0,
        class_ns: [0; CLASSES],
        start_boottime_ns: 0,
    };
}

/// The slot is free, or its process was never seen or is gone.
pub const PROCESS_GONE: u32 = 0;
/// Read.
pub const PROCESS_READ: u32 = 1;
/// Threads ended under every attempt to read, or there are too many.
pub const PROCESS_TORN: u32 = 2;

/// Something that user space should look at, in the ring buffer.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Change {
    /// The process.
    pub tgid: u32,
    /// [`CHANGE_THREADS`] or [`CHANGE_EXEC`].
    pub kind: u32,
}

/// Threads of a followed process came, ended or got another name.
pub const CHANGE_THREADS: u32 = 1;
/// A process began to run a program whose name begins as those of QEMU do.
pub const CHANGE_EXEC: u32 = 2;
/// A followed process ended.
pub const CHANGE_END: u32 = 3;
/// Bytes of the ring buffer of changes; a power of two and whole pages. What does not fit is not needed: user space looks
/// at everything that changed when it looks.
pub const CHANGES_BYTES: u32 = 16 * 1024;

const _: () = assert!(size_of::<Process>() == 96 && size_of::<ProcessReading>() == 64);

#[cfg(test)]
mod tests {
    use super::*;

    fn comm(name: &str) -> [u8; 16] {
        let mut comm = [0; 16];
        comm[..name.len()].copy_from_slice(name.as_bytes());
        comm
    }

    #[test]
    fn threads_are_classed_by_name() {
        for (name, class) in [
            ("CPU 0/KVM", CLASS_VCPU),
            ("CPU 127/TCG", CLASS_VCPU),
            ("IO iothread1", CLASS_IOTHREAD),
            ("IO mon_iothread", CLASS_EMULATOR),
            ("worker", CLASS_WORKER),
            ("iou-wrk-4194303", CLASS_WORKER),
            ("iou-sqp-12", CLASS_WORKER),
            ("vhost-4711", CLASS_VHOST),
            ("qemu-system-x86", CLASS_EMULATOR),
            ("SPICE Worker", CLASS_EMULATOR),
            ("CPU", CLASS_EMULATOR),
            ("", CLASS_EMULATOR),
        ] {
            assert_eq!(class_of(&comm(name)), class, "{name}");
        }
    }
}
