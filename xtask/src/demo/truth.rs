//! What the guests say they did, in the form in which `kvm-monitor compare --truth` takes it. Pure.

use lab::{GroundTruth, StepTruth};
use serde_json::{Value, json};

const SECTOR_BYTES: i64 = 512;
const BURN: &str =
    "truth: CPU time by the guest's clock, which goes on while the vCPU waits for a CPU of the host";
const FRAMES: &str = "frames with their Ethernet header, as the guest counts them; large segments count once";
/// How late a line of the guest may be seen: a look every 5 ms, a busy host, and the rates of two clocks.
const SEEN_LATE_NS: u64 = 20_000_000;

/// Collects truths of one domain.
pub(super) struct Truths<'a> {
    domain: &'a str,
    truth: &'a GroundTruth,
    all: Vec<Value>,
}

/// Where a metric is: scope and entity.
type Place<'a> = (&'a str, &'a str);

impl<'a> Truths<'a> {
    pub(super) fn of(domain: &'a str, truth: &'a GroundTruth) -> Self {
        Self { domain, truth, all: Vec::new() }
    }

    pub(super) fn take(self) -> Vec<Value> {
        self.all
    }

    fn add(
        &mut self,
        (scope, entity): Place<'_>,
        (metric, value): (&str, Option<i64>),
        quantity: &str,
    ) -> &mut Value {
        self.all.push(json!({
            "domain": self.domain, "scope": scope, "entity": entity, "metrics": [metric],
            "quantity": quantity, "value": value.unwrap_or(0).max(0),
        }));
        self.all.last_mut().expect("one was just added")
    }

    /// CPU time of each `cpu` step. The guest counts it by a clock that goes on while the vCPU thread waits for a
    /// host CPU, so run and wait time together are what it sees.
    pub(super) fn burns(mut self, what: impl Fn(&StepTruth) -> &'static str) -> Self {
        let truth = self.truth;
        for step in truth.of_kind("cpu") {
            for (vcpu, cpu_ns) in step.cpu_ns() {
                let quantity = format!("vCPU {vcpu} run + wait, {}{}", step.word, what(step));
                let value = i64::try_from(cpu_ns).ok();
                let between = span(truth, step);
                let entry = self.add(("vcpus", &vcpu.to_string()), ("run_ns", value), &quantity);
                entry["metrics"] = json!(["run_ns", "wait_ns"]);
                entry["between_ns"] = between;
                entry["note"] = json!(BURN);
            }
        }
        self
    }

    /// Nothing happens during the first `sleep`.
    pub(super) fn idle(mut self, disk: &str, tap: &str) -> Self {
        let truth = self.truth;
        let Some(step) = truth.of_kind("sleep").next() else { return self };
        for (place, metric, what) in
            [(("disks", disk), "wr_req", "writes"), (("interfaces", tap), "tx_packets", "sent packets")]
        {
            let quantity = format!("{} {what} while idle, {}", place.1, step.word);
            self.add(place, (metric, Some(0)), &quantity)["between_ns"] = span(truth, step);
        }
        self
    }

    /// What the guest asked of a disk between its first `sleep` and its last: what firmware and kernel read before is left out.
    pub(super) fn disk(mut self, disk: &str) -> Self {
        let truth = self.truth;
        let Some(end) = &truth.end else { return self };
        let Some(between) = between_idle_times(truth) else { return self };
        let did = |counter: &str| end.kernel.get(&format!("disk.{disk}.{counter}")).copied().unwrap_or(0);
        for (name, metric, value) in [
            ("reads", "rd_req", did("rd_ios")),
            ("read bytes", "rd_bytes", did("rd_sectors") * SECTOR_BYTES),
            // The guest kernel counts a flush as a write of nothing as well.
            ("writes", "wr_req", did("wr_ios") - did("fl_ios")),
            ("written bytes", "wr_bytes", did("wr_sectors") * SECTOR_BYTES),
            ("flushes", "fl_req", did("fl_ios")),
        ] {
            let entry = self.add(("disks", disk), (metric, Some(value)), &format!("{disk} {name}"));
            entry["between_ns"] = between.clone();
        }
        self
    }

    /// Totals of an interface.
    pub(super) fn interface(mut self, tap: &str) -> Self {
        let truth = self.truth;
        for (name, metric) in [
            ("sent packets", "tx_packets"),
            ("sent bytes", "tx_bytes"),
            ("received packets", "rx_packets"),
            ("received bytes", "rx_bytes"),
        ] {
            let value = truth.total(&format!("net.eth0.{metric}"));
            self.add(("interfaces", tap), (metric, value), &format!("{tap} {name}"))["note"] = json!(FRAMES);
        }
        self
    }

    /// What a suspended guest takes: nothing.
    pub(super) fn suspended(mut self, tap: &str, between_ns: [u64; 2], sent: u64) -> Self {
        let quantity = format!("{tap} packets taken while suspended, {sent} were sent");
        let entry = self.add(("interfaces", tap), ("rx_packets", Some(0)), &quantity);
        entry["between_ns"] = json!(between_ns);
        self
    }

    /// The guest's memory at its end.
    pub(super) fn memory(mut self, given_bytes: i64) -> Self {
        let end = self.truth.end.as_ref();
        let guest = |name: &str| i64::try_from(*end?.memory_kib.get(name)?).ok()?.checked_mul(1024);
        for (name, metric, value) in [
            ("memory given", "actual_bytes", Some(given_bytes)),
            ("memory available", "available_bytes", guest("MemTotal")),
            ("memory unused", "unused_bytes", guest("MemFree")),
            ("memory usable", "usable_bytes", guest("MemAvailable")),
        ] {
            let at_ns = end.map(|end| end.seen_ns);
            self.add(("memory", ""), (metric, value), name)["at_ns"] = json!(at_ns);
        }
        self
    }
}

/// When a step was done, by the host's clock: the guest's moments, moved by the smallest distance of the two clocks that
/// any line of the guest showed so far, since a line can be seen late but never early. A guest's clock stands
/// still while it is suspended, so that lines after the step say nothing of it.
fn span(truth: &GroundTruth, step: &StepTruth) -> Value {
    let Some(done) = &step.done else { return json!([step.begin_seen_ns, u64::MAX]) };
    let lines = truth.steps.iter().filter(|s| s.number <= step.number).filter_map(|s| s.done.as_ref());
    let seen =
        lines.map(|line| (line.seen_ns, line.to_ns)).chain(truth.start.iter().map(|s| (s.seen_ns, s.at_ns)));
    let distance = seen.map(|(host, guest)| host.saturating_sub(guest)).min().unwrap_or(0);
    json!([(done.from_ns + distance).saturating_sub(SEEN_LATE_NS), done.to_ns + distance + SEEN_LATE_NS])
}

/// From the middle of the first `sleep` to the middle of the last: readings beside the ends are of an idle guest.
fn between_idle_times(truth: &GroundTruth) -> Option<Value> {
    let middle = |step: &StepTruth| {
        let done = step.done.as_ref()?;
        Some(done.seen_ns.saturating_sub((done.to_ns - done.from_ns) / 2))
    };
    Some(json!([middle(truth.of_kind("sleep").next()?)?, middle(truth.of_kind("sleep").last()?)?]))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use lab::{Moment, StepDone};

    use super::*;

    fn truth() -> GroundTruth {
        const MS: u64 = 1_000_000;
        let step =
            |number: u64, word: &str, (seen_ns, from_ns, to_ns): (u64, u64, u64), did: Value| StepTruth {
                number,
                word: word.into(),
                begin_seen_ns: 0,
                done: Some(StepDone { seen_ns, from_ns, to_ns, did, ..StepDone::default() }),
            };
        let steps = vec![
            step(0, "sleep=1s", (5_100 * MS, 0, 1_000 * MS), json!({})),
            // Its line was seen 70 ms after the step was over.
            step(
                1,
                "cpu=cpu1:2s",
                (7_270 * MS, 1_050 * MS, 3_100 * MS),
                json!({"cpus": [{"cpu": 1, "cpu_ns": 7}]}),
            ),
            step(2, "sleep=1s", (20_000 * MS, 3_100 * MS, 4_100 * MS), json!({})),
        ];
        let counters = [("disk.vda.wr_ios", 13), ("disk.vda.fl_ios", 3), ("disk.vda.wr_sectors", 80)];
        let kernel = counters.map(|(name, value)| (name.to_owned(), value)).into();
        let memory_kib = BTreeMap::from([("MemTotal".to_owned(), 2)]);
        let end = Moment { kernel, memory_kib, seen_ns: 21_000 * MS, ..Moment::default() };
        GroundTruth { start: None, steps, end: Some(end) }
    }

    #[test]
    fn what_the_guest_says_becomes_truths() {
        let truth = truth();
        let all = Truths::of("d", &truth).burns(|_| "").idle("vda", "tap").disk("vda").memory(4096).take();
        let find = |quantity: &str| all.iter().find(|t| t["quantity"] == quantity).expect(quantity);
        let burn = find("vCPU 1 run + wait, cpu=cpu1:2s");
        assert_eq!((&burn["value"], &burn["metrics"]), (&json!(7), &json!(["run_ns", "wait_ns"])));
        // The clocks are 4.1 s apart by the line that was seen soonest.
        assert_eq!(burn["between_ns"], json!([5_130_000_000u64, 7_220_000_000u64]));
        assert_eq!(find("vda writes while idle, sleep=1s")["value"], 0);
        assert_eq!(find("vda writes")["value"], 10);
        assert_eq!(find("vda writes")["between_ns"], json!([4_600_000_000u64, 19_500_000_000u64]));
        assert_eq!(find("vda written bytes")["value"], 80 * 512);
        assert_eq!(find("memory available")["value"], 2048);
        assert_eq!(find("memory available")["at_ns"], 21_000_000_000u64);
        assert_eq!(find("memory given")["value"], 4096);
    }
}
