//! What is known of the exits of one vCPU thread at a reading.

use std::borrow::Cow;

/// Figures of KVM for one vCPU thread since it is followed. What this host's KVM does not report is `None`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KvmFigures {
    /// Time on a CPU in guest mode, the stay in progress included, nanoseconds; `None` until the first entry or exit.
    pub guest_ns: Option<u64>,
    /// Time KVM polled for the end of halts, nanoseconds since the vCPU was made; polling in progress is not included.
    pub halt_poll_ns: Option<u64>,
    /// Exits from guest mode; `None` while no vCPU on this host has any.
    pub exits: Option<u64>,
    /// Returns of `KVM_RUN` to user space.
    pub userspace_exits: u64,
    /// Those that a signal or `immediate_exit` caused.
    pub kicks: u64,
    /// Halts in the kernel that ended.
    pub halts: u64,
    /// Those that ended while KVM polled.
    pub halts_polled: u64,
}

impl KvmFigures {
    /// KVM has done anything for this thread.
    #[must_use]
    pub const fn any(&self) -> bool {
        self.guest_ns.is_some() || self.userspace_exits > 0 || self.halts > 0
    }
}

/// Exits of one vCPU thread by reason, since it is followed; reasons that did not occur are left out.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ExitReasons {
    /// From guest mode.
    pub guest: Vec<ExitReason>,
    /// From the kernel to user space; without times.
    pub userspace: Vec<ExitReason>,
}

/// One reason.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExitReason {
    /// The kernel's name.
    pub name: Cow<'static, str>,
    /// How often.
    pub count: u64,
    /// Time outside guest mode by the wall clock, the time in progress included, nanoseconds.
    pub ns: Option<u64>,
}
