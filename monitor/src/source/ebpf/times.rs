//! What is known of one thread at a reading.

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
