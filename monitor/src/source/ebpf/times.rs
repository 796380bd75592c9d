//! What is known of one thread or process at a reading, and what happened among them.

use crate::units::Tgid;

/// Figures of one thread, the interval in progress included. Times are nanoseconds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ThreadTimes {
    /// On a CPU by the task clock, since the thread started: interrupts and what a hypervisor below took are left out.
    pub run_ns: u64,
    /// Runnable, but not running, since the thread started.
    pub wait_ns: u64,
    /// On a CPU by the scheduler clock, since a moment before the thread was followed: run time, interrupts and steal.
    pub on_cpu_ns: u64,
    /// The scheduler clock at which all of these were read.
    pub sched_ns: u64,
    /// Part of `run_ns` that the kernel has not yet added to its own figure.
    pub open_run_ns: u64,
    /// Part of `wait_ns` that is a wait in progress.
    pub open_wait_ns: u64,
    /// Times it lost its CPU while it could have run on, since it is followed, modulo 2³².
    pub preemptions: u32,
    /// Times it gave its CPU up, likewise.
    pub yields: u32,
    /// Times it got a CPU after that, likewise.
    pub wakeups: u32,
    /// Times it got another CPU than before, likewise.
    pub migrations: u32,
    /// Those of them that led to another NUMA node.
    pub node_migrations: u32,
    /// Part of `wait_ns` in which a CFS quota kept it from running, since it is followed.
    pub throttled_ns: u64,
    /// What it does.
    pub doing: Doing,
    /// The thread is gone; these are its last figures.
    pub last: bool,
}

/// What a thread does at the moment of a reading.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Doing {
    /// It is on a CPU.
    Running,
    /// It could be.
    Waiting,
    /// It has nothing to do, or is gone.
    Sleeping,
}

impl Doing {
    /// The name in records.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Running => "running",
            Self::Waiting => "waiting",
            Self::Sleeping => "sleeping",
        }
    }
}

/// Figures of one process and all its threads, runs in progress included. Times are nanoseconds by the task clock.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ProcessTimes {
    /// CPU time of all threads since the process started, ended ones included. Threads that ended before the process was
    /// followed count as the kernel counted them, which is up to a scheduler tick less than they had, each.
    pub time_ns: u64,
    /// Of the threads that are in no other class. Here and below, threads that ended before the process was followed are
    /// left out.
    pub emulator_ns: u64,
    /// Of the vCPUs.
    pub vcpu_ns: u64,
    /// Of the iothreads.
    pub iothread_ns: u64,
    /// Of the worker threads of QEMU and io_uring.
    pub worker_ns: u64,
    /// Of the vhost threads that belong to the process (Linux 6.4).
    pub vhost_ns: u64,
    /// Living threads.
    pub threads: u32,
    /// Threads that ended since it is followed.
    pub ended: u64,
    /// When it started, nanoseconds after boot.
    pub start_boottime_ns: u64,
}

impl ProcessTimes {
    /// Both together; when it started is this one's.
    #[must_use]
    pub const fn plus(&self, other: &Self) -> Self {
        Self {
            time_ns: self.time_ns + other.time_ns,
            emulator_ns: self.emulator_ns + other.emulator_ns,
            vcpu_ns: self.vcpu_ns + other.vcpu_ns,
            iothread_ns: self.iothread_ns + other.iothread_ns,
            worker_ns: self.worker_ns + other.worker_ns,
            vhost_ns: self.vhost_ns + other.vhost_ns,
            threads: self.threads + other.threads,
            ended: self.ended + other.ended,
            start_boottime_ns: self.start_boottime_ns,
        }
    }
}

/// What happened among processes and threads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Happened {
    /// Threads of a followed process came, ended or got a name.
    Threads(Tgid),
    /// A process began that may be QEMU.
    Began(Tgid),
    /// A followed process ended.
    Ended(Tgid),
}

/// A process whose threads changed under every attempt to read it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Torn;
