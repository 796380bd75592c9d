//! Threads whose CPU time is limited.

#![expect(clippy::unwrap_used, reason = "a test may panic")]
#![allow(dead_code, reason = "no test program uses all of it")]

use std::path::{Path, PathBuf};

use monitor::units::Tid;

/// A control group with a CFS quota of 20 ms in 100 ms, of the first or second version, removed when dropped.
pub(crate) struct Quota(PathBuf);

impl Quota {
    pub(crate) fn new() -> Self {
        let name = format!("kvm-monitor-test-{}", std::process::id());
        let first = Path::new("/sys/fs/cgroup/cpu");
        if first.join("cpu.cfs_quota_us").exists() || first.join("tasks").exists() {
            let dir = first.join(name);
            std::fs::create_dir(&dir).unwrap();
            std::fs::write(dir.join("cpu.cfs_quota_us"), "20000").unwrap();
            return Self(dir);
        }
        let root = Path::new("/sys/fs/cgroup");
        std::fs::write(root.join("cgroup.subtree_control"), "+cpu").unwrap();
        let dir = root.join(name);
        std::fs::create_dir(&dir).unwrap();
        std::fs::write(dir.join("cpu.max"), "20000 100000").unwrap();
        std::fs::write(dir.join("cgroup.type"), "threaded").unwrap();
        Self(dir)
    }

    pub(crate) fn take(&self, tid: Tid) {
        let file = ["tasks", "cgroup.threads"].map(|file| self.0.join(file));
        let file = file.iter().find(|file| file.exists()).unwrap();
        std::fs::write(file, tid.to_string()).unwrap();
    }

    /// How long it has been throttled, nanoseconds.
    pub(crate) fn throttled(&self) -> u64 {
        let stat = std::fs::read_to_string(self.0.join("cpu.stat")).unwrap();
        let value = |key| stat.lines().find_map(|line| line.strip_prefix(key)?.trim().parse::<u64>().ok());
        value("throttled_time ").or_else(|| Some(value("throttled_usec ")? * 1000)).unwrap()
    }
}

impl Drop for Quota {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir(&self.0);
    }
}
