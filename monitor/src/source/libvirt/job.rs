//! A job that libvirt runs on a domain (migration, save, dump, backup, …), from named parameters into typed numbers.
//!
//! Names and units follow <https://libvirt.org/html/libvirt-libvirt-domain.html#virDomainGetJobStats>. Which of them
//! there are depends on the job. Knows nothing of connections.

use schemars::JsonSchema;
use serde::Serialize;

use super::stats::Value;

/// What libvirt tells of a job.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, JsonSchema)]
pub struct Job {
    /// `operation`: `migration_out`, `save`, `dump`, …; `unknown` if libvirt does not tell.
    pub operation: &'static str,
    /// `time_elapsed`: since it began, nanoseconds.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub elapsed_ns: Option<u64>,
    /// `downtime`: for how long the guest stood, or would stand by the last estimate, nanoseconds.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub downtime_ns: Option<u64>,
    /// `memory_total`: memory to transfer, bytes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub memory_total_bytes: Option<u64>,
    /// `memory_processed`: of it transferred, bytes; what the guest wrote again is transferred again.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub memory_processed_bytes: Option<u64>,
    /// `memory_remaining`: still to be transferred, bytes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub memory_remaining_bytes: Option<u64>,
    /// `memory_bps`: transferred per second by QEMU's measure, bytes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub memory_bytes_per_s: Option<u64>,
    /// `memory_dirty_rate` times `memory_page_size`: written by the guest per second by QEMU's measure, bytes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub memory_dirty_bytes_per_s: Option<u64>,
    /// `memory_iteration`: passes over memory begun.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub memory_iteration: Option<u64>,
    /// `auto_converge_throttle`: how much the vCPUs are slowed down so that the migration can end, per cent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub throttle_pct: Option<u64>,
    /// `disk_total`: disk contents to transfer, bytes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub disk_total_bytes: Option<u64>,
    /// `disk_processed`: of it transferred, bytes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub disk_processed_bytes: Option<u64>,
    /// `disk_remaining`: still to be transferred, bytes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub disk_remaining_bytes: Option<u64>,
}

impl Job {
    /// Reads the parameters; names that are not known are left alone.
    pub fn from_parameters<'a>(parameters: impl IntoIterator<Item = (&'a str, Value<'a>)>) -> Self {
        let mut job = Self { operation: OPERATIONS[0], ..Self::default() };
        let (mut dirty_pages, mut page_size) = (None, None);
        for (name, value) in parameters {
            let number = value.number();
            let place = match name {
                "operation" => {
                    let known = number.and_then(|n| OPERATIONS.get(usize::try_from(n).ok()?).copied());
                    job.operation = known.unwrap_or(OPERATIONS[0]);
                    continue;
                }
                "time_elapsed" | "downtime" => {
                    let ns = number.and_then(|ms| ms.checked_mul(1_000_000));
                    *(if name == "downtime" { &mut job.downtime_ns } else { &mut job.elapsed_ns }) = ns;
                    continue;
                }
                "memory_total" => &mut job.memory_total_bytes,
                "memory_processed" => &mut job.memory_processed_bytes,
                "memory_remaining" => &mut job.memory_remaining_bytes,
                "memory_bps" => &mut job.memory_bytes_per_s,
                "memory_dirty_rate" => &mut dirty_pages,
                "memory_page_size" => &mut page_size,
                "memory_iteration" => &mut job.memory_iteration,
                "auto_converge_throttle" => &mut job.throttle_pct,
                "disk_total" => &mut job.disk_total_bytes,
                "disk_processed" => &mut job.disk_processed_bytes,
                "disk_remaining" => &mut job.disk_remaining_bytes,
                _ => continue,
            };
            *place = number;
        }
        job.memory_dirty_bytes_per_s =
            dirty_pages.zip(page_size).and_then(|(n, size)| u64::checked_mul(n, size));
        job
    }
}

/// `virDomainJobOperation`.
const OPERATIONS: [&str; 11] = [
    "unknown",
    "start",
    "save",
    "restore",
    "migration_in",
    "migration_out",
    "snapshot",
    "snapshot_revert",
    "dump",
    "backup",
    "snapshot_delete",
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_migration_in_numbers() {
        let unsigned = |name, number| (name, Value::Unsigned(number));
        let job = Job::from_parameters([
            ("operation", Value::Signed(5)),
            unsigned("time_elapsed", 1500),
            unsigned("memory_total", 1 << 30),
            unsigned("memory_dirty_rate", 10),
            unsigned("memory_page_size", 4096),
            unsigned("memory_iteration", 3),
            unsigned("compression_cache", 7),
        ]);
        let expected = Job {
            operation: "migration_out",
            elapsed_ns: Some(1_500_000_000),
            memory_total_bytes: Some(1 << 30),
            memory_dirty_bytes_per_s: Some(40_960),
            memory_iteration: Some(3),
            ..Job::default()
        };
        assert_eq!(job, expected);
    }

    #[test]
    fn numbers_beyond_all_bounds_are_absent() {
        let job = Job::from_parameters([
            ("operation", Value::Signed(99)),
            ("downtime", Value::Unsigned(u64::MAX - 1)),
            ("memory_dirty_rate", Value::Unsigned(u64::MAX - 1)),
            ("memory_page_size", Value::Unsigned(4096)),
            ("disk_total", Value::Signed(-1)),
        ]);
        assert_eq!(job, Job { operation: "unknown", ..Job::default() });
    }
}
