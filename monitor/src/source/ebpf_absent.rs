//! Stands in for the eBPF source in builds without it (feature `ebpf` off): the same names, and no value.

#[path = "ebpf/probes.rs"]
pub mod probes;

use std::os::fd::OwnedFd;

use crate::units::{NicKey, Tgid, Tid, Window};

/// Why kernel programs cannot run.
#[derive(Debug, thiserror::Error)]
#[error("this program was built without kernel probes")]
pub struct EbpfError;

/// A thread cannot be followed.
#[derive(Debug, thiserror::Error)]
pub enum NotFollowed {
    /// Always.
    #[error("this program was built without kernel probes")]
    Off,
    /// Never.
    #[error("no room ({0} are followed)")]
    Full(usize),
}

/// There is none.
#[derive(Debug)]
pub enum Ebpf {}

/// There is none.
#[derive(Debug)]
pub enum Slot {}

/// There is none.
#[derive(Debug)]
pub enum ProcessSlot {}

/// There is none.
#[derive(Debug)]
pub enum GroupSlot {}

/// What would be kept of a thread.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Keep {
    /// Times and counts.
    Times,
    /// Also distributions.
    TimesAndHistograms,
    /// Also culprits.
    Everything,
}

/// There is none.
#[derive(Debug)]
pub enum NicSlot {}

pub use monitor_ebpf::{
    BUCKETS, CLASSES, Charges, Culprit, Histogram, Histograms, KIND_IDLE, KIND_IRQ, KIND_KERNEL,
    KIND_PROCESS, WINDOW_BUCKETS, bucket_range, class_of,
};

/// Runs of a program.
#[derive(Clone, Copy, Debug)]
pub struct ProgramRuns {
    /// How often.
    pub count: u64,
    /// How long, nanoseconds.
    pub ns: u64,
}

#[path = "ebpf/images.rs"]
mod images;
pub use images::{
    Aio, BLOCK_DEVICE, Below, Counted, FLUSH, Hook, Image, ImageHistograms, ImageKey, ImageKind, Latencies,
    Opened, Operation, Plan, READ, WRITE,
};

/// There is none.
#[derive(Debug)]
pub enum ImageSlot {}

impl ImageSlot {
    /// None exists.
    #[must_use]
    pub fn plan(&self) -> Plan {
        match *self {}
    }

    /// None exists.
    ///
    /// # Errors
    /// Never.
    pub fn below(&self) -> Result<(), &'static str> {
        match *self {}
    }
}

/// An image cannot be watched.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NotWatched {
    /// Always.
    #[error("this program was built without kernel probes")]
    Off,
    /// Never.
    #[error("no probe sees its requests")]
    Unseen,
}

#[path = "ebpf/times.rs"]
mod times;
pub use times::{Doing, Happened, ProcessTimes, ThreadTimes, Torn};
#[path = "ebpf/traffic.rs"]
mod traffic;
pub use traffic::{Bursts, DeviceTraffic, DropPlace, Drops, Passed};

#[path = "ebpf/exits.rs"]
mod exits;
pub use exits::{ExitReason, ExitReasons, KvmFigures};

#[path = "ebpf/exit_names.rs"]
mod exit_names;
pub use exit_names::{exit_name, userspace_name};

impl Ebpf {
    /// Never succeeds.
    ///
    /// # Errors
    /// Always.
    pub fn open(_: &[probes::ProbeGroup]) -> Result<Self, EbpfError> {
        Err(EbpfError)
    }

    /// None exists.
    #[must_use]
    pub fn states(&self) -> &[(probes::Probe, probes::ProbeState)] {
        match *self {}
    }

    /// None exists.
    #[must_use]
    pub fn verified(&self, _: &probes::Probe) -> Option<u32> {
        match *self {}
    }

    /// None exists.
    #[must_use]
    pub fn load_time(&self, _: &probes::Probe) -> Option<std::time::Duration> {
        match *self {}
    }

    /// None exists.
    #[must_use]
    pub fn misses(&self) -> Vec<(&'static str, u64)> {
        match *self {}
    }

    /// None exists.
    #[must_use]
    pub fn runs(&self) -> Vec<(&'static str, ProgramRuns)> {
        match *self {}
    }

    /// None exists.
    ///
    /// # Errors
    /// None.
    pub fn follow(&mut self, _: Tid, _: Keep, _: Option<&GroupSlot>) -> Result<Slot, NotFollowed> {
        match *self {}
    }

    /// None exists.
    pub fn forget(&mut self, _: Slot) {
        match *self {}
    }

    /// None exists.
    ///
    /// # Errors
    /// None.
    pub fn seed(&mut self) -> Result<(), EbpfError> {
        match *self {}
    }

    /// None exists.
    ///
    /// # Errors
    /// None.
    pub fn read(&mut self) -> Result<Window, EbpfError> {
        match *self {}
    }

    /// None exists.
    #[must_use]
    pub fn times(&self, _: &Slot) -> Option<ThreadTimes> {
        match *self {}
    }

    /// None exists.
    #[must_use]
    pub fn histograms(&self, _: &Slot) -> Option<Histograms> {
        match *self {}
    }

    /// None exists.
    #[must_use]
    pub fn take_charges(&self, _: &Slot) -> Option<Charges> {
        match *self {}
    }

    /// None exists.
    pub fn follow_group(&mut self) -> Option<GroupSlot> {
        match *self {}
    }

    /// None exists.
    pub fn forget_group(&mut self, _: GroupSlot) {
        match *self {}
    }

    /// None exists.
    #[must_use]
    pub fn both_ns(&self, _: &GroupSlot) -> Option<u64> {
        match *self {}
    }

    /// None exists.
    pub fn follow_process(&mut self, _: Tgid) -> Option<ProcessSlot> {
        match *self {}
    }

    /// None exists.
    pub fn forget_process(&mut self, _: ProcessSlot) {
        match *self {}
    }

    /// None exists.
    #[must_use]
    pub fn process_times(&self, _: &ProcessSlot) -> Option<Result<ProcessTimes, Torn>> {
        match *self {}
    }

    /// None exists.
    pub fn happened(&mut self) -> Vec<Happened> {
        match *self {}
    }

    /// None exists.
    #[must_use]
    pub fn changes(&self) -> Option<OwnedFd> {
        match *self {}
    }
    /// None exists.
    #[must_use]
    pub fn kvm_figures(&self, _: &Slot) -> Option<KvmFigures> {
        match *self {}
    }

    /// None exists.
    #[must_use]
    pub fn exit_reasons(&self, _: &Slot) -> Option<ExitReasons> {
        match *self {}
    }

    /// None exists.
    #[must_use]
    pub fn kvm_caveat(&self) -> Option<&'static str> {
        match *self {}
    }

    /// None exists.
    #[must_use]
    pub fn can(&self, _: Hook) -> bool {
        match *self {}
    }

    /// None exists.
    ///
    /// # Errors
    /// None.
    pub fn look(&mut self) -> Result<Option<&'static str>, EbpfError> {
        match *self {}
    }

    /// None exists.
    ///
    /// # Errors
    /// None.
    pub fn watch(&mut self, _: NicKey, _: u32) -> Result<NicSlot, NotFollowed> {
        match *self {}
    }

    /// None exists.
    pub fn unwatch(&mut self, _: NicSlot) {
        match *self {}
    }

    /// None exists.
    #[must_use]
    pub fn traffic(&self, _: &NicSlot) -> Option<&DeviceTraffic> {
        match *self {}
    }

    /// None exists.
    #[must_use]
    pub fn sent_now(&self, _: &NicSlot) -> Option<u64> {
        match *self {}
    }

    /// None exists.
    #[must_use]
    pub fn sources(&self, _: &NicSlot) -> [Option<[u8; 6]>; 2] {
        match *self {}
    }

    /// None exists.
    #[must_use]
    pub fn is_at_rest(&mut self, _: &NicSlot, _: crate::units::MonotonicNs) -> bool {
        match *self {}
    }

    /// None exists.
    #[must_use]
    pub fn tells_of_processes(&self) -> bool {
        match *self {}
    }

    /// None exists.
    #[must_use]
    pub fn has_times_and_traffic(&self) -> bool {
        match *self {}
    }

    /// None exists.
    #[must_use]
    pub fn take_bursts(&mut self, _: &NicSlot, _: crate::units::MonotonicNs) -> [Bursts; 2] {
        match *self {}
    }

    /// None exists.
    #[must_use]
    pub fn drop_reason(&self, _: u32) -> String {
        match *self {}
    }

    /// None exists.
    ///
    /// # Errors
    /// None.
    pub fn watch_image(&mut self, _: ImageKey, _: Plan) -> Result<ImageSlot, NotWatched> {
        match *self {}
    }

    /// None exists.
    pub fn unwatch_image(&mut self, _: ImageSlot) -> Option<(Counted, Option<Latencies>)> {
        match *self {}
    }

    /// None exists.
    #[must_use]
    pub fn image(&self, _: &ImageSlot) -> Option<Counted> {
        match *self {}
    }

    /// None exists.
    #[must_use]
    pub fn latencies(&self, _: &ImageSlot) -> Option<Latencies> {
        match *self {}
    }
}
