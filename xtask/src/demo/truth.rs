//! What the guests say they did, in the form in which `kvm-monitor compare --truth` takes it. Pure.

use lab::{GroundTruth, StepTruth};
use serde_json::{Value, json};

const SECTOR_BYTES: i64 = 512;
const FIRMWARE: &str = "libvirt also has the reads of the firmware, before the guest's kernel";
const HOST: &str = "eBPF: what QEMU did to the image";
const FLUSHES: &str = "QEMU drops a flush when nothing was written since the last one";
const BURN: &str = "truth: the guest's CPU time; the host also sees the guest's idle ticks and console output around the step";
const FRAMES: &str = "frames with their Ethernet header, as the guest counts them; large segments count once";
const REPORT: &str = "as of the guest's last report, the truth is of its last line";

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
                let entry = self.add(("vcpus", &vcpu.to_string()), ("run_ns", value), &quantity);
                entry["metrics"] = json!(["run_ns", "wait_ns"]);
                entry["between_ns"] = span_with_sleep(truth, step);
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
            self.add(place, (metric, Some(0)), &quantity)["between_ns"] = span(step);
        }
        self
    }

    /// Totals of a disk since the guest's kernel started.
    pub(super) fn disk(mut self, disk: &str) -> Self {
        let truth = self.truth;
        let total = |counter: &str| truth.total(&format!("disk.{disk}.{counter}"));
        // The guest kernel counts a flush as a write of nothing as well.
        let writes = total("wr_ios").zip(total("fl_ios")).map(|(writes, flushes)| writes - flushes);
        let bytes = |counter| total(counter).map(|sectors| sectors * SECTOR_BYTES);
        for (name, metric, value, note) in [
            ("reads", "rd_req", total("rd_ios"), FIRMWARE),
            ("read bytes", "rd_bytes", bytes("rd_sectors"), FIRMWARE),
            ("writes", "wr_req", writes, HOST),
            ("written bytes", "wr_bytes", bytes("wr_sectors"), HOST),
            ("flushes", "fl_req", total("fl_ios"), FLUSHES),
        ] {
            self.add(("disks", disk), (metric, value), &format!("{disk} {name}"))["note"] = json!(note);
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
        entry["note"] = json!("what was delivered to the tap waits in its queue until the guest goes on");
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
            self.add(("memory", ""), (metric, value), name)["note"] = json!(REPORT);
        }
        self
    }
}

fn span(step: &StepTruth) -> Value {
    let end = step.done.as_ref().map_or(u64::MAX, |done| done.seen_ns);
    json!([step.begin_seen_ns, end])
}

/// As [`span`], from the begin of the `sleep` before the step: on a busy host the line that says that a step begins
/// is seen when part of it is over.
fn span_with_sleep(truth: &GroundTruth, step: &StepTruth) -> Value {
    let mut span = span(step);
    let before = truth.steps.iter().rfind(|s| s.number < step.number);
    if let Some(sleep) = before.filter(|s| s.kind() == "sleep") {
        span[0] = json!(sleep.begin_seen_ns);
    }
    span
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use lab::{Moment, StepDone};

    use super::*;

    fn truth() -> GroundTruth {
        let step = |number: u64, word: &str, did: Value| StepTruth {
            number,
            word: word.into(),
            begin_seen_ns: 1_000 + number,
            done: Some(StepDone { seen_ns: 2_000, did, ..StepDone::default() }),
        };
        let steps = vec![
            step(0, "sleep=1s", json!({})),
            step(1, "cpu=cpu1:2s", json!({"cpus": [{"cpu": 1, "cpu_ns": 7}]})),
        ];
        let counters = [("disk.vda.wr_ios", 13), ("disk.vda.fl_ios", 3), ("disk.vda.wr_sectors", 80)];
        let devices = counters.map(|(name, value)| (name.to_owned(), value)).into();
        let memory_kib = BTreeMap::from([("MemTotal".to_owned(), 2)]);
        let end = Moment { devices, memory_kib, ..Moment::default() };
        GroundTruth { start: None, steps, end: Some(end) }
    }

    #[test]
    fn what_the_guest_says_becomes_truths() {
        let truth = truth();
        let all = Truths::of("d", &truth).burns(|_| "").idle("vda", "tap").disk("vda").memory(4096).take();
        let find = |quantity: &str| all.iter().find(|t| t["quantity"] == quantity).expect(quantity);
        let burn = find("vCPU 1 run + wait, cpu=cpu1:2s");
        assert_eq!((&burn["value"], &burn["between_ns"]), (&json!(7), &json!([1_000, 2_000])));
        assert_eq!(burn["metrics"], json!(["run_ns", "wait_ns"]));
        assert_eq!(find("vda writes while idle, sleep=1s")["value"], 0);
        assert_eq!(find("vda writes")["value"], 10);
        assert_eq!(find("vda written bytes")["value"], 80 * 512);
        assert_eq!(find("memory available")["value"], 2048);
        assert_eq!(find("memory given")["value"], 4096);
    }
}
