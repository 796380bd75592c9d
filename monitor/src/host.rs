//! Facts about this machine and this process, and the rule that says whether kernel programs can run.
//!
//! Facts are collected once, at start; the rule is a pure function of them, so that a test can take away one
//! fact at a time.

use std::path::Path;

/// The inode of the initial pid namespace (`PROC_PID_INIT_INO` in the kernel's `proc_ns.h`).
const INITIAL_PID_NAMESPACE: &str = "pid:[4026531836]";
/// Oldest kernel the programs are written for: the tracepoint `sched_switch` has its fourth argument, the state of the
/// thread that leaves, since 5.18.
const OLDEST_KERNEL: (u32, u32) = (5, 18);
const CAP_SYS_ADMIN: u32 = 21;
const CAP_PERFMON: u32 = 38;
const CAP_BPF: u32 = 39;

/// What decides whether kernel programs can run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Facts {
    /// This program was built with them.
    pub compiled_in: bool,
    /// The kernel's type information is readable; else why not.
    pub btf: Result<(), String>,
    /// Effective capabilities of this process, one bit each; `None` if unknown.
    pub capabilities: Option<u64>,
    /// Major and minor version of the kernel; `None` if the release does not begin with two numbers.
    pub kernel: Option<(u32, u32)>,
    /// This process sees the host's process ids; `None` if unknown.
    pub initial_pid_namespace: Option<bool>,
}

/// Why a source cannot work, and what to do about it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Unavailable {
    /// Why.
    pub reason: String,
    /// What to do.
    pub fix: String,
}

impl std::fmt::Display for Unavailable {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}; {}", self.reason, self.fix)
    }
}

impl Facts {
    /// Reads the facts of this process on this machine.
    #[must_use]
    pub fn read() -> Self {
        Self {
            compiled_in: cfg!(feature = "ebpf"),
            btf: std::fs::File::open("/sys/kernel/btf/vmlinux").map(drop).map_err(|e| e.to_string()),
            capabilities: std::fs::read_to_string("/proc/self/status").ok().and_then(|s| effective(&s)),
            kernel: kernel_version(&release()),
            initial_pid_namespace: std::fs::read_link("/proc/self/ns/pid")
                .ok()
                .map(|link| link == Path::new(INITIAL_PID_NAMESPACE)),
        }
    }

    fn has(&self, capability: u32) -> bool {
        self.capabilities.is_none_or(|caps| caps >> capability & 1 == 1)
    }
}

/// The rule: whether kernel programs can be expected to run. What is unknown is not held against them.
///
/// # Errors
/// The first thing that is missing, with its fix.
pub fn ebpf_rule(facts: &Facts) -> Result<(), Unavailable> {
    let missing =
        |reason: &str, fix: &str| Err(Unavailable { reason: reason.to_owned(), fix: fix.to_owned() });
    if !facts.compiled_in {
        return missing("this program was built without kernel probes", "build it with `cargo xtask build`");
    }
    if let Some(kernel) = facts.kernel.filter(|k| *k < OLDEST_KERNEL) {
        return missing(
            &format!("kernel {}.{} is too old", kernel.0, kernel.1),
            &format!("use kernel {}.{} or newer", OLDEST_KERNEL.0, OLDEST_KERNEL.1),
        );
    }
    if let Err(error) = &facts.btf {
        return missing(
            &format!("no kernel type information at /sys/kernel/btf/vmlinux ({error})"),
            "use a kernel built with CONFIG_DEBUG_INFO_BTF, and mount /sys",
        );
    }
    if !(facts.has(CAP_SYS_ADMIN) || facts.has(CAP_BPF) && facts.has(CAP_PERFMON)) {
        return missing(
            "no permission to load kernel programs",
            "run as root, or with the capabilities CAP_BPF and CAP_PERFMON",
        );
    }
    if facts.initial_pid_namespace == Some(false) {
        return missing(
            "this process runs in a pid namespace and cannot see the host's thread ids",
            "run it in the host's pid namespace",
        );
    }
    Ok(())
}

/// `CapEff` of `/proc/PID/status`.
fn effective(status: &str) -> Option<u64> {
    let hex = status.lines().find_map(|line| line.strip_prefix("CapEff:"))?;
    u64::from_str_radix(hex.trim(), 16).ok()
}

/// The kernel's release, for example `6.12.0-1-amd64`.
#[must_use]
pub fn release() -> String {
    rustix::system::uname().release().to_string_lossy().into_owned()
}

/// The machine's name in the network.
#[must_use]
pub fn hostname() -> String {
    rustix::system::uname().nodename().to_string_lossy().into_owned()
}

fn kernel_version(release: &str) -> Option<(u32, u32)> {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit());
    Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
}

/// Number of NUMA nodes, if sysfs tells.
#[must_use]
pub fn numa_nodes() -> Option<usize> {
    let nodes = std::fs::read_dir("/sys/devices/system/node").ok()?.filter_map(|entry| {
        let name = entry.ok()?.file_name();
        name.to_str()?.strip_prefix("node")?.parse::<u32>().ok()
    });
    Some(nodes.count()).filter(|n| *n > 0)
}

/// CPUs that this machine can have, by the highest number; 1 024 if sysfs does not tell.
#[must_use]
pub fn possible_cpus() -> u32 {
    let text = std::fs::read_to_string("/sys/devices/system/cpu/possible").unwrap_or_default();
    let cpus = cpu_list(&text).max().and_then(|last| u32::try_from(last + 1).ok());
    cpus.unwrap_or(monitor_ebpf::CPUS)
}

/// NUMA node of each CPU, as far as the kernel programs keep them; node 0 where sysfs does not tell.
#[must_use]
pub fn nodes_of_cpus() -> monitor_ebpf::Nodes {
    let mut nodes = [0; monitor_ebpf::CPUS as usize + 1];
    let Ok(entries) = std::fs::read_dir("/sys/devices/system/node") else { return nodes };
    for entry in entries.flatten() {
        let name = entry.file_name();
        let Some(node) = name.to_str().and_then(|name| name.strip_prefix("node")?.parse().ok()) else {
            continue;
        };
        let cpus = std::fs::read_to_string(entry.path().join("cpulist")).unwrap_or_default();
        for cpu in cpu_list(&cpus) {
            if let Some(of) = nodes.get_mut(cpu.saturating_add(1)) {
                *of = node;
            }
        }
    }
    nodes
}

/// The CPUs of a list as `0-3,8,10-11`.
fn cpu_list(text: &str) -> impl Iterator<Item = usize> {
    text.trim().split(',').flat_map(|part| {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        match (first.parse::<usize>(), last.parse::<usize>()) {
            (Ok(first), Ok(last)) => first..last.saturating_add(1),
            _ => 0..0,
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn good() -> Facts {
        Facts {
            compiled_in: true,
            btf: Ok(()),
            capabilities: Some(1 << CAP_BPF | 1 << CAP_PERFMON),
            kernel: Some((6, 12)),
            initial_pid_namespace: Some(true),
        }
    }

    #[test]
    fn each_missing_fact_is_named() {
        let check = |change: fn(&mut Facts), expected: &str| {
            let mut facts = good();
            change(&mut facts);
            let reason = ebpf_rule(&facts).unwrap_err().reason;
            assert!(reason.contains(expected), "{reason}");
        };
        assert_eq!(ebpf_rule(&good()), Ok(()));
        check(|f| f.compiled_in = false, "built without");
        check(|f| f.kernel = Some((5, 17)), "too old");
        check(|f| f.btf = Err("no such file".into()), "type information");
        check(|f| f.capabilities = Some(0), "permission");
        check(|f| f.capabilities = Some(1 << CAP_BPF), "permission");
        check(|f| f.initial_pid_namespace = Some(false), "pid namespace");
    }

    #[test]
    fn root_of_old_days_and_unknown_facts_are_no_obstacle() {
        assert_eq!(ebpf_rule(&Facts { capabilities: Some(1 << CAP_SYS_ADMIN), ..good() }), Ok(()));
        let unknown = Facts { capabilities: None, kernel: None, initial_pid_namespace: None, ..good() };
        assert_eq!(ebpf_rule(&unknown), Ok(()));
    }

    #[test]
    fn lists_of_cpus() {
        assert_eq!(cpu_list("0-2,8,10-11\n").collect::<Vec<_>>(), [0, 1, 2, 8, 10, 11]);
        assert_eq!(cpu_list("\n").count(), 0);
    }

    #[test]
    fn kernel_releases() {
        assert_eq!(kernel_version("6.18.44-fc-v445"), Some((6, 18)));
        assert_eq!(kernel_version("5.19-rc1"), Some((5, 19)));
        assert_eq!(kernel_version("unknown"), None);
    }

    #[test]
    fn capabilities_are_read_from_status() {
        assert_eq!(effective("Name:\tx\nCapEff:\t000001ffffffffff\n"), Some(0x1ff_ffff_ffff));
        assert_eq!(effective("Name:\tx\n"), None);
    }
}
