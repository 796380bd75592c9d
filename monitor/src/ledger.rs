//! The ledger of a thread: where its time went, from the figures of single readings. Pure arithmetic.
//!
//! A reading has the thread's run time by the task clock, its time on a CPU and its waiting time by the scheduler's
//! clock, and that clock. From the first reading on, `run + irq + wait + sleep` is the time that has passed on the
//! scheduler's clock, to the nanosecond: what the task clock leaves out of the time on the CPU is `irq`, and the rest
//! is `sleep`.

use crate::source::ebpf::{BUCKETS, Histogram, ThreadTimes, bucket_range};

/// Cumulative parts of a thread's time; see the module.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Parts {
    /// On a CPU, taken by interrupts or a hypervisor below this host, nanoseconds since the first reading.
    pub irq_ns: u64,
    /// Nothing to do, nanoseconds since the first reading.
    pub sleep_ns: u64,
    /// Counts since the thread is followed.
    pub counts: Counts,
}

/// Counts that do not wrap.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Lost its CPU while it could have run on.
    pub preemptions: u64,
    /// Gave its CPU up.
    pub yields: u64,
    /// Got a CPU after it had given it up.
    pub wakeups: u64,
    /// Got another CPU than before.
    pub migrations: u64,
    /// Got one of another NUMA node.
    pub node_migrations: u64,
}

/// The ledger.
#[derive(Clone, Copy, Debug, Default)]
pub struct Ledger {
    first: Option<ThreadTimes>,
    last: Option<ThreadTimes>,
    counts: Counts,
}

impl Ledger {
    /// Adds a reading. `None` if a part would be negative, or smaller than at the reading before: that reading
    /// is wrong, and is not remembered.
    pub fn add(&mut self, now: ThreadTimes) -> Option<Parts> {
        let first = *self.first.get_or_insert(now);
        let last = self.last.unwrap_or(first);
        let before = parts(&first, &last)?;
        let (irq_ns, sleep_ns) = parts(&first, &now)?;
        let backwards = irq_ns < before.0
            || sleep_ns < before.1
            || now.run_ns < last.run_ns
            || now.wait_ns < last.wait_ns
            || now.throttled_ns < last.throttled_ns;
        if backwards {
            return None;
        }
        let base = if self.last.is_some() {
            last
        } else {
            ThreadTimes { preemptions: 0, yields: 0, wakeups: 0, migrations: 0, node_migrations: 0, ..now }
        };
        let grown = |now: u32, last: u32| u64::from(now.wrapping_sub(last));
        self.counts.preemptions += grown(now.preemptions, base.preemptions);
        self.counts.yields += grown(now.yields, base.yields);
        self.counts.wakeups += grown(now.wakeups, base.wakeups);
        self.counts.migrations += grown(now.migrations, base.migrations);
        self.counts.node_migrations += grown(now.node_migrations, base.node_migrations);
        self.last = Some(now);
        Some(Parts { irq_ns, sleep_ns, counts: self.counts })
    }
}

/// Interrupted and sleeping time from one reading to another.
fn parts(first: &ThreadTimes, now: &ThreadTimes) -> Option<(u64, u64)> {
    let passed = now.sched_ns.checked_sub(first.sched_ns)?;
    let on_cpu = now.on_cpu_ns.checked_sub(first.on_cpu_ns)?;
    let run = now.run_ns.checked_sub(first.run_ns)?;
    let wait = now.wait_ns.checked_sub(first.wait_ns)?;
    Some((on_cpu.checked_sub(run)?, passed.checked_sub(on_cpu)?.checked_sub(wait)?))
}

/// The buckets in which `now` has more than `before`, as `[from, to, count]`, nanoseconds; `u64::MAX` is no upper end.
#[must_use]
pub fn new_in_histogram(before: &Histogram, now: &Histogram) -> Vec<[u64; 3]> {
    new_in_buckets(before, now)
}

/// The same for any number of the first buckets, of whatever unit.
#[must_use]
pub fn new_in_buckets(before: &[u32], now: &[u32]) -> Vec<[u64; 3]> {
    let mut buckets = Vec::new();
    for (index, (before, now)) in (0..).zip(before.iter().zip(now)).take(BUCKETS) {
        let count = now.wrapping_sub(*before);
        if count > 0 {
            let (low, high) = bucket_range(index);
            buckets.push([low, high, u64::from(count)]);
        }
    }
    buckets
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::source::ebpf::Doing;

    fn at(sched_ns: u64, on_cpu_ns: u64, run_ns: u64, wait_ns: u64) -> ThreadTimes {
        ThreadTimes {
            run_ns,
            wait_ns,
            on_cpu_ns,
            sched_ns,
            open_run_ns: 0,
            open_wait_ns: 0,
            preemptions: 7,
            yields: u32::MAX,
            wakeups: 0,
            migrations: 0,
            node_migrations: 0,
            throttled_ns: 0,
            doing: Doing::Running,
            last: false,
        }
    }

    #[test]
    fn the_parts_sum_to_the_time_that_passed() {
        let mut ledger = Ledger::default();
        let first = ledger.add(at(1_000, 500, 70, 30)).unwrap();
        assert_eq!((first.irq_ns, first.sleep_ns, first.counts.preemptions), (0, 0, 7));
        let now = at(11_000, 4_500, 3_970, 1_030);
        let parts = ledger.add(now).unwrap();
        assert_eq!((parts.irq_ns, parts.sleep_ns), (100, 5_000));
        assert_eq!((now.run_ns - 70) + parts.irq_ns + (now.wait_ns - 30) + parts.sleep_ns, 10_000);
    }

    #[test]
    fn a_reading_that_cannot_be_is_discarded_and_the_next_is_not() {
        let mut ledger = Ledger::default();
        ledger.add(at(0, 0, 0, 0)).unwrap();
        ledger.add(at(100, 50, 50, 0)).unwrap();
        for wrong in [at(200, 60, 40, 0), at(200, 260, 60, 0), at(90, 50, 50, 0), at(200, 60, 70, 0)] {
            assert_eq!(ledger.add(wrong), None, "{wrong:?}");
        }
        assert_eq!(ledger.add(at(300, 60, 60, 0)).unwrap().sleep_ns, 240);
    }

    #[test]
    fn counts_go_on_when_the_kernels_wrap() {
        let mut ledger = Ledger::default();
        ledger.add(at(0, 0, 0, 0)).unwrap();
        let wrapped = ThreadTimes { yields: 4, ..at(10, 0, 0, 0) };
        assert_eq!(ledger.add(wrapped).unwrap().counts.yields, u64::from(u32::MAX) + 5);
    }

    #[test]
    fn only_what_is_new_is_in_a_histogram() {
        let (mut before, mut now) = ([0; BUCKETS], [0; BUCKETS]);
        (before[3], now[3], now[20]) = (5, 7, 1);
        let (low, high) = bucket_range(20);
        assert_eq!(new_in_histogram(&before, &now), [[12, 16, 2], [low, high, 1]]);
    }
}
