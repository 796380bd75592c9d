//! The kernel's own count of what programs cost, for benchmarks, and other programs to hold ours against.

#![expect(clippy::unwrap_used, reason = "a program for a terminal")]
#![allow(dead_code, reason = "no benchmark uses all of it")]

use std::{
    collections::BTreeMap,
    process::{Child, Command, Stdio},
    time::Duration,
};

use monitor::source::ebpf::ProgramRuns;

const STATS: &str = "/proc/sys/kernel/bpf_stats_enabled";

/// Switches the kernel's counting on, and back to what it was.
pub(crate) struct Counting(String);

impl Counting {
    pub(crate) fn on() -> Self {
        let before = std::fs::read_to_string(STATS).unwrap();
        std::fs::write(STATS, "1").unwrap();
        Self(before)
    }
}

impl Drop for Counting {
    fn drop(&mut self) {
        let _ = std::fs::write(STATS, self.0.trim());
    }
}

/// Every loaded program, by id.
pub(crate) fn loaded() -> BTreeMap<String, ProgramRuns> {
    aya::programs::loaded_programs()
        .filter_map(|info| {
            let info = info.ok()?;
            let ns = monitor::units::duration_ns(info.run_time());
            Some((info.id().to_string(), ProgramRuns { count: info.run_count(), ns }))
        })
        .collect()
}

/// Another program that attaches probes; ended when dropped.
pub(crate) struct Peer(Child);

impl Peer {
    /// Starts it with an interval of 1000 s. `None` if it is not there, or ends: this kernel may lack what it hangs on.
    pub(crate) fn start(program: &str) -> Option<Self> {
        let child = Command::new(program).arg("1000").stdout(Stdio::null()).stderr(Stdio::null()).spawn();
        let mut peer = Self(child.ok()?);
        std::thread::sleep(Duration::from_secs(2));
        peer.0.try_wait().ok()?.is_none().then_some(peer)
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
