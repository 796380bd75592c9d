//! The guest kernel's own counters: every figure that a profiler on the host can be compared with.
//!
//! Data comes from /proc of the guest. Names are `disk.DEV.…`, `net.DEV.…`, `stat.CPU.…` (clock ticks),
//! `sched.CPU.…`, `vm.…`. Sectors are 512 bytes.

use std::collections::BTreeMap;
use std::fs;

use crate::json::Object;

/// Counter name to value.
pub(crate) type Counters = BTreeMap<String, u64>;

const DISK: [&str; 17] = [
    "rd_ios",
    "rd_merges",
    "rd_sectors",
    "rd_ms",
    "wr_ios",
    "wr_merges",
    "wr_sectors",
    "wr_ms",
    "",
    "io_ms",
    "weighted_ms",
    "dc_ios",
    "dc_merges",
    "dc_sectors",
    "dc_ms",
    "fl_ios",
    "fl_ms",
];
const NET: [&str; 12] = [
    "rx_bytes",
    "rx_packets",
    "rx_errs",
    "rx_drop",
    "",
    "",
    "",
    "",
    "tx_bytes",
    "tx_packets",
    "tx_errs",
    "tx_drop",
];
const CPU: [&str; 9] = ["user", "nice", "system", "idle", "iowait", "irq", "softirq", "steal", "guest"];
const SCHED: [&str; 9] = ["", "", "", "", "", "", "run_ns", "wait_ns", "slices"];
const VM: [&str; 4] = ["pgfault", "pgmajfault", "pswpin", "pswpout"];
const MEMORY: [&str; 6] = ["MemTotal", "MemFree", "MemAvailable", "Buffers", "Cached", "AnonPages"];

/// Reads all counters.
pub(crate) fn read() -> Counters {
    let mut counters = Counters::new();
    disks(&file("/proc/diskstats"), &mut counters);
    interfaces(&file("/proc/net/dev"), &mut counters);
    cpus(&file("/proc/stat"), "stat", &CPU, &mut counters);
    cpus(&file("/proc/schedstat"), "sched", &SCHED, &mut counters);
    memory_events(&file("/proc/vmstat"), &mut counters);
    counters
}

/// Stolen time of a CPU, ns (grain: one clock tick).
pub(crate) fn steal_ns(cpu: usize) -> u64 {
    let mut counters = Counters::new();
    cpus(&file("/proc/stat"), "stat", &CPU, &mut counters);
    const TICK_NS: u64 = 10_000_000; // USER_HZ is 100 on every architecture a lab guest runs on.
    counters.get(&format!("stat.cpu{cpu}.steal")).copied().unwrap_or(0) * TICK_NS
}

/// What changed from one reading to the next, as a JSON object; counters that stood still are left out.
pub(crate) fn change(before: &Counters, after: &Counters) -> Object {
    after
        .iter()
        .filter_map(|(name, now)| {
            let change = i128::from(*now) - i128::from(*before.get(name).unwrap_or(&0));
            (change != 0).then_some((name, change))
        })
        .fold(Object::new(), |object, (name, change)| object.raw(name, change))
}

/// The disk and network counters as they stand, that is since the guest kernel started.
pub(crate) fn devices(counters: &Counters) -> Object {
    counters
        .iter()
        .filter(|(name, value)| **value != 0 && (name.starts_with("disk.") || name.starts_with("net.")))
        .fold(Object::new(), |object, (name, value)| object.raw(name, value))
}

/// The guest's memory, KiB, under the names of /proc/meminfo.
pub(crate) fn memory_kib() -> Object {
    file("/proc/meminfo")
        .lines()
        .filter_map(|line| line.split_once(':'))
        .filter(|(name, _)| MEMORY.contains(name))
        .fold(Object::new(), |object, (name, value)| object.raw(name, value.trim().trim_end_matches(" kB")))
}

fn file(path: &str) -> String {
    fs::read_to_string(path).unwrap_or_default()
}

fn put<'a>(prefix: &str, names: &[&str], values: impl Iterator<Item = &'a str>, out: &mut Counters) {
    for (name, value) in names.iter().zip(values).filter(|(name, _)| !name.is_empty()) {
        if let Ok(value) = value.parse() {
            out.insert(format!("{prefix}.{name}"), value);
        }
    }
}

fn disks(text: &str, out: &mut Counters) {
    for line in text.lines() {
        let mut fields = line.split_whitespace().skip(2);
        if let Some(device) = fields.next() {
            put(&format!("disk.{device}"), &DISK, fields, out);
        }
    }
}

fn interfaces(text: &str, out: &mut Counters) {
    for (device, values) in text.lines().filter_map(|line| line.split_once(':')) {
        put(&format!("net.{}", device.trim()), &NET, values.split_whitespace(), out);
    }
}

/// Lines `cpuN v v v …` of /proc/stat and /proc/schedstat.
fn cpus(text: &str, prefix: &str, names: &[&str], out: &mut Counters) {
    for line in text.lines().filter(|line| line.starts_with("cpu")) {
        let mut fields = line.split_whitespace();
        if let Some(cpu) = fields.next() {
            put(&format!("{prefix}.{cpu}"), names, fields, out);
        }
    }
}

fn memory_events(text: &str, out: &mut Counters) {
    for (name, value) in text.lines().filter_map(|line| line.split_once(' ')) {
        if VM.contains(&name) {
            put("vm", &[name], std::iter::once(value), out);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_get_their_names() {
        let mut counters = Counters::new();
        disks(" 254  0 vda 52 0 1234 7 100 1 800 9 0 11 16 0 0 0 0 3 2\n", &mut counters);
        interfaces(
            "Inter-| x\n face |bytes\n  eth0: 10 2 0 0 0 0 0 0 542000 1000 0 0 0 0 0 0\n",
            &mut counters,
        );
        cpus("cpu0 1 2 3 4 5 6 7 8 0 0\nctxt 5\n", "stat", &CPU, &mut counters);
        cpus("version 15\ncpu0 0 0 0 0 0 0 111 222 33\n", "sched", &SCHED, &mut counters);
        memory_events("pgfault 77\nother 1\n", &mut counters);
        let expected = [
            ("disk.vda.rd_ios", 52),
            ("disk.vda.wr_sectors", 800),
            ("disk.vda.fl_ios", 3),
            ("net.eth0.rx_packets", 2),
            ("net.eth0.tx_bytes", 542_000),
            ("stat.cpu0.steal", 8),
            ("sched.cpu0.run_ns", 111),
            ("sched.cpu0.slices", 33),
            ("vm.pgfault", 77),
        ];
        for (name, value) in expected {
            assert_eq!(counters.get(name), Some(&value), "{name}");
        }
        assert_eq!(counters.get("vm.other"), None);
    }

    #[test]
    fn change_names_only_what_moved() {
        let before = Counters::from([("disk.a".into(), 5), ("vm.b".into(), 7), ("vm.c".into(), 3)]);
        let after = Counters::from([("disk.a".into(), 9), ("vm.b".into(), 7), ("vm.c".into(), 1)]);
        assert_eq!(change(&before, &after).to_string(), r#"{"disk.a":4,"vm.c":-2}"#);
        assert_eq!(devices(&after).to_string(), r#"{"disk.a":9}"#);
    }
}
