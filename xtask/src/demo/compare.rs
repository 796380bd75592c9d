//! The comparison of a recorded stream with what the guest says it did. Pure: text in, table out.
//!
//! Counters are compared by their change: over the whole stream, or between the last reading before a step and the
//! first one after it. Where there is no truth, /proc is the reference. The stream is DESIGN.md 4's.

use std::fmt::Write as _;

use anyhow::{Context, Result, ensure};
use lab::{GroundTruth, StepTruth};
use serde_json::Value;

/// The samples of one domain.
pub(super) struct Stream(Vec<Value>);

/// What was done.
pub(super) struct Experiment<'a> {
    pub(super) disk: &'a str,
    pub(super) tap: &'a str,
    /// Memory that the guest was given.
    pub(super) memory_bytes: i64,
    pub(super) truth: &'a GroundTruth,
}

/// One quantity as each source gives it.
#[derive(Debug, Default, PartialEq)]
pub(super) struct Row {
    quantity: String,
    unit: Unit,
    truth: Option<i64>,
    /// In the order of [`SOURCES`].
    values: [Option<i64>; 3],
    /// Why sources may differ.
    note: &'static str,
}

#[derive(Clone, Copy, Debug, Default, PartialEq)]
enum Unit {
    #[default]
    Count,
    Bytes,
    Nanoseconds,
}

/// The sources' keys in the stream, and their titles.
const SOURCES: [(&str, &str); 3] = [("libvirt", "libvirt"), ("ebpf", "eBPF"), ("procfs", "procfs")];
const PROCFS: usize = 2;
const SECTOR_BYTES: i64 = 512;

/// Where a metric is in a sample.
enum Place<'a> {
    /// `cpu` or `memory`.
    Domain(&'a str),
    /// An element of `vcpus`.
    Vcpu(u64),
    /// An element of `disks`.
    Disk(&'a str),
    /// An element of `interfaces`.
    Nic(&'a str),
}

/// A value, and when it was read (CLOCK_MONOTONIC).
struct Reading {
    begin_ns: u64,
    end_ns: u64,
    value: i64,
}

impl Stream {
    /// Reads NDJSON. A last line that is cut off is an error like any other bad line.
    pub(super) fn parse(text: &str, domain: &str) -> Result<Self> {
        let mut samples = Vec::new();
        for (index, line) in text.lines().enumerate() {
            let record: Value = serde_json::from_str(line)
                .with_context(|| format!("line {} of the stream is not JSON", index + 1))?;
            if record["type"] == "sample" && record["domain"]["name"] == domain {
                samples.push(record);
            }
        }
        ensure!(!samples.is_empty(), "the stream has no sample of domain {domain}: nothing was compared");
        Ok(Self(samples))
    }

    fn readings(&self, place: &Place<'_>, metric: &str, source: &str) -> Vec<Reading> {
        let reading = |sample: &Value| {
            let value = place.find(sample)?.get(metric)?.get(source)?.as_i64()?;
            let mono_ns = sample["mono_ns"].as_u64()?;
            let time = |end: usize| sample["windows"][source][end].as_u64().unwrap_or(mono_ns);
            Some(Reading { begin_ns: time(0), end_ns: time(1), value })
        };
        self.0.iter().filter_map(reading).collect()
    }

    /// One figure per source, made from its readings of a metric.
    fn each(
        &self,
        place: &Place<'_>,
        metric: &str,
        figure: impl Fn(&[Reading]) -> Option<i64>,
    ) -> [Option<i64>; 3] {
        SOURCES.map(|(source, _)| figure(&self.readings(place, metric, source)))
    }
}

/// Change from the first to the last reading.
fn change(readings: &[Reading]) -> Option<i64> {
    let (first, last) = (readings.first()?, readings.last()?);
    (first.end_ns < last.begin_ns).then(|| last.value - first.value)
}

/// Change over a step, idle time before and after it included.
fn change_around(readings: &[Reading], step: Span) -> Option<i64> {
    let before = readings.iter().rfind(|reading| reading.end_ns <= step.from_ns)?;
    let after = readings.iter().find(|reading| reading.begin_ns >= step.to_ns)?;
    Some(after.value - before.value)
}

/// The value of a gauge.
fn last(readings: &[Reading]) -> Option<i64> {
    readings.last().map(|reading| reading.value)
}

impl Place<'_> {
    fn find<'s>(&self, sample: &'s Value) -> Option<&'s Value> {
        let element = |list: &str, key: &str, wanted: Value| {
            sample.get(list)?.as_array()?.iter().find(|element| element[key] == wanted)
        };
        match self {
            Self::Domain(part) => sample.get(*part),
            Self::Vcpu(number) => element("vcpus", "vcpu", (*number).into()),
            Self::Disk(target) => element("disks", "target", (*target).into()),
            Self::Nic(device) => element("interfaces", "device", (*device).into()),
        }
    }
}

/// A step on the host's CLOCK_MONOTONIC.
#[derive(Clone, Copy)]
struct Span {
    from_ns: u64,
    to_ns: u64,
}

/// All quantities. Fails if no source has any of them: then nothing was compared.
pub(super) fn rows(stream: &Stream, experiment: &Experiment<'_>) -> Result<Vec<Row>> {
    let mut rows = Vec::new();
    for step in experiment.truth.of_kind("cpu") {
        burn_rows(stream, step, &mut rows);
    }
    total_rows(stream, &mut rows);
    disk_rows(stream, experiment, &mut rows);
    nic_rows(stream, experiment, &mut rows);
    memory_rows(stream, experiment, &mut rows);
    let compared = rows.iter().any(|row| row.values.iter().any(Option::is_some));
    ensure!(compared, "the stream has none of the compared metrics");
    Ok(rows)
}

/// The guest counts its CPU time by a clock that goes on while the vCPU thread waits for a host CPU, so run and
/// wait time together are what it sees.
fn burn_rows(stream: &Stream, step: &StepTruth, rows: &mut Vec<Row>) {
    let Some(done) = &step.done else { return };
    let span = Span { from_ns: step.begin_seen_ns, to_ns: done.seen_ns };
    for (vcpu, cpu_ns) in step.cpu_ns() {
        let place = Place::Vcpu(vcpu);
        let values = |metric| stream.each(&place, metric, |readings| change_around(readings, span));
        let (run, wait) = (values("run_ns"), values("wait_ns"));
        let both = [0, 1, 2].map(|source| Some(run[source]? + wait[source]?));
        rows.push(Row {
            quantity: format!("vCPU {vcpu} run + wait, {}", step.word),
            unit: Unit::Nanoseconds,
            truth: i64::try_from(cpu_ns).ok(),
            values: both,
            note: "truth: the guest's CPU time; the host also sees the guest's idle ticks and console output around \
                   the step",
        });
        rows.push(Row {
            quantity: format!("vCPU {vcpu} run, {}", step.word),
            unit: Unit::Nanoseconds,
            truth: None,
            values: run,
            note: "less than the CPU time the guest believes in, if the host was busy; libvirt has a 10 ms grain",
        });
    }
}

fn total_rows(stream: &Stream, rows: &mut Vec<Row>) {
    let total = |metric, quantity: &str, note| Row {
        quantity: quantity.to_owned(),
        unit: Unit::Nanoseconds,
        truth: None,
        values: stream.each(&Place::Domain("cpu"), metric, change),
        note,
    };
    rows.push(total(
        "time_ns",
        "all threads, CPU time",
        "libvirt has a 10 ms grain, and its first and last read are at other moments",
    ));
    for vcpu in 0..2 {
        let place = Place::Vcpu(vcpu);
        let values = |metric| stream.each(&place, metric, change);
        for (metric, name) in [("run_ns", "run"), ("wait_ns", "wait")] {
            rows.push(Row {
                quantity: format!("vCPU {vcpu} {name}, whole run"),
                unit: Unit::Nanoseconds,
                truth: None,
                values: values(metric),
                note: "the sources' first and last reads are at different moments",
            });
        }
    }
}

fn disk_rows(stream: &Stream, experiment: &Experiment<'_>, rows: &mut Vec<Row>) {
    const FIRMWARE: &str = "libvirt also has the reads of the firmware, before the guest's kernel";
    const HOST: &str = "eBPF: what QEMU did to the image";
    const FLUSHES: &str = "QEMU drops a flush when nothing was written since the last one";
    let disk = experiment.disk;
    let truth = |counter: &str| experiment.truth.total(&format!("disk.{disk}.{counter}"));
    // The guest kernel counts a flush as a write of nothing as well.
    let writes = truth("wr_ios").zip(truth("fl_ios")).map(|(writes, flushes)| writes - flushes);
    let bytes = |counter| truth(counter).map(|sectors| sectors * SECTOR_BYTES);
    let quantities = [
        ("reads", "rd_req", Unit::Count, truth("rd_ios"), FIRMWARE),
        ("read bytes", "rd_bytes", Unit::Bytes, bytes("rd_sectors"), FIRMWARE),
        ("writes", "wr_req", Unit::Count, writes, HOST),
        ("written bytes", "wr_bytes", Unit::Bytes, bytes("wr_sectors"), HOST),
        ("flushes", "fl_req", Unit::Count, truth("fl_ios"), FLUSHES),
    ];
    for (name, metric, unit, truth, note) in quantities {
        let values = stream.each(&Place::Disk(disk), metric, change);
        rows.push(Row { quantity: format!("{disk} {name}"), unit, truth, values, note });
    }
}

fn nic_rows(stream: &Stream, experiment: &Experiment<'_>, rows: &mut Vec<Row>) {
    let tap = experiment.tap;
    let quantities = [
        ("sent packets", "tx_packets", Unit::Count),
        ("sent bytes", "tx_bytes", Unit::Bytes),
        ("received packets", "rx_packets", Unit::Count),
        ("received bytes", "rx_bytes", Unit::Bytes),
    ];
    for (name, metric, unit) in quantities {
        rows.push(Row {
            quantity: format!("{tap} {name}"),
            unit,
            truth: experiment.truth.total(&format!("net.eth0.{metric}")),
            values: stream.each(&Place::Nic(tap), metric, change),
            note: "frames with their Ethernet header, as the guest counts them",
        });
    }
}

fn memory_rows(stream: &Stream, experiment: &Experiment<'_>, rows: &mut Vec<Row>) {
    let end = experiment.truth.end.as_ref();
    let guest = |name: &str| i64::try_from(*end?.memory_kib.get(name)?).ok()?.checked_mul(1024);
    const DELAY: &str = "the balloon reports once a second, the guest's figure is of its last line";
    let quantities = [
        ("memory given", "actual_bytes", Some(experiment.memory_bytes), "the balloon's current size"),
        ("memory available", "available_bytes", guest("MemTotal"), "the guest kernel's MemTotal"),
        ("memory unused", "unused_bytes", guest("MemFree"), DELAY),
        ("memory usable", "usable_bytes", guest("MemAvailable"), DELAY),
    ];
    for (name, metric, truth, note) in quantities {
        let values = stream.each(&Place::Domain("memory"), metric, last);
        rows.push(Row { quantity: name.to_owned(), unit: Unit::Bytes, truth, values, note });
    }
}

impl Row {
    fn reference(&self) -> Option<i64> {
        self.truth.or(self.values[PROCFS])
    }

    /// Quantity, truth, one cell per source, note. The note is only there where something differs.
    fn cells(&self) -> [String; 6] {
        let source = |index: usize| match self.values[index] {
            None => "-".to_owned(),
            Some(value) if self.truth.is_none() && index == PROCFS => self.unit.show(value),
            Some(value) => format!("{}{}", self.unit.show(value), difference(value, self.reference())),
        };
        let truth = self.truth.map_or_else(|| "-".to_owned(), |value| self.unit.show(value));
        let reference = self.reference();
        let differs = self.values.iter().flatten().any(|value| Some(*value) != reference);
        let note = if differs && reference.is_some() { self.note } else { "" };
        [self.quantity.clone(), truth, source(0), source(1), source(2), note.to_owned()]
    }
}

impl Unit {
    fn show(self, value: i64) -> String {
        match self {
            Self::Nanoseconds => format!("{:.4} s", value as f64 / 1e9),
            Self::Count | Self::Bytes => grouped(value),
        }
    }
}

/// ` (=)`, ` (+0.12 %)`, or nothing without a reference.
fn difference(value: i64, reference: Option<i64>) -> String {
    match reference {
        None => String::new(),
        Some(reference) if reference == value => " (=)".to_owned(),
        Some(0) => format!(" ({value:+})"),
        Some(reference) => format!(" ({:+.2} %)", (value - reference) as f64 * 100.0 / reference as f64),
    }
}

/// Digits in groups of three.
fn grouped(value: i64) -> String {
    let digits = value.unsigned_abs().to_string();
    let mut text = if value < 0 { "-".to_owned() } else { String::new() };
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

fn header() -> [String; 6] {
    let [libvirt, ebpf, procfs] = SOURCES.map(|(_, title)| title);
    ["quantity", "truth", libvirt, ebpf, procfs, "why they differ"].map(str::to_owned)
}

/// The table for a terminal; notes stand below it, once each.
pub(super) fn text(rows: &[Row]) -> String {
    const COLUMNS: usize = 5;
    let mut notes: Vec<String> = Vec::new();
    let mut lines = vec![header()];
    lines.extend(rows.iter().map(Row::cells));
    let width = |column: usize| lines.iter().map(|cells| cells[column].chars().count()).max().unwrap_or(0);
    let widths: Vec<usize> = (0..COLUMNS).map(width).collect();
    let mut text = String::new();
    for (index, cells) in lines.iter().enumerate() {
        let mut line = format!("{:<1$}", cells[0], widths[0]);
        for column in 1..COLUMNS {
            line.push_str(&format!("  {:>1$}", cells[column], widths[column]));
        }
        if index > 0 && !cells[COLUMNS].is_empty() {
            let known = notes.iter().position(|note| *note == cells[COLUMNS]);
            let number = known.unwrap_or_else(|| {
                notes.push(cells[COLUMNS].clone());
                notes.len() - 1
            });
            line.push_str(&format!("  [{}]", number + 1));
        }
        text.push_str(line.trim_end());
        text.push('\n');
    }
    text.push_str("\nPercent: difference from the truth, else from procfs. - : no value.\n");
    for (index, note) in notes.iter().enumerate() {
        writeln!(text, "[{}] {note}", index + 1).expect("writing to a string cannot fail");
    }
    text
}

/// The table as Markdown.
pub(super) fn markdown(rows: &[Row]) -> String {
    let line =
        |cells: [String; 6]| format!("| {} |\n", cells.map(|cell| cell.replace('|', "\\|")).join(" | "));
    let mut text = String::from(
        "# kvm-monitor demo\n\nOne guest with an exactly known workload: what it did itself (truth), and what each \
         source says.\nPercent: difference from the truth, else from procfs. `-`: no value.\n\n",
    );
    text.push_str(&line(header()));
    text.push_str("|---|--:|--:|--:|--:|---|\n");
    text.extend(rows.iter().map(|row| line(row.cells())));
    text
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use lab::{Moment, StepDone};
    use serde_json::json;

    use super::*;

    /// One sample per second; libvirt is read every other second, and everything counts from 100.
    fn sample(second: u64, run_ms: i64) -> Value {
        let now_ns = second * 1_000_000_000;
        let run_ns = run_ms * 1_000_000;
        let mut run = json!({"ebpf": run_ns, "procfs": run_ns, "best": "ebpf", "per_s": 0.5});
        let mut disks = json!([]);
        if second.is_multiple_of(2) {
            run["libvirt"] = json!(run_ns / 10_000_000 * 10_000_000);
            let requests = if second < 2 { 0 } else { 52 };
            disks = json!([{"target": "vda", "rd_req": {"libvirt": requests}}]);
        }
        json!({
            "type": "sample", "mono_ns": now_ns, "domain": {"name": "demo"},
            "windows": {"ebpf": [now_ns, now_ns + 1000], "procfs": [now_ns, now_ns + 1000]},
            "vcpus": [{"vcpu": 1, "run_ns": run, "wait_ns": {"ebpf": 0, "procfs": 0}}],
            "disks": disks,
            "memory": {"actual_bytes": {"libvirt": 1024}},
        })
    }

    fn stream() -> Stream {
        let mut text = json!({"type": "session"}).to_string();
        for (second, run_ms) in [(0, 100), (1, 105), (2, 1107), (3, 2108), (4, 2115)] {
            write!(text, "\n{}", sample(second, run_ms)).unwrap();
        }
        Stream::parse(&text, "demo").unwrap()
    }

    fn truth() -> GroundTruth {
        let done = StepDone {
            seen_ns: 2_900_000_000,
            did: json!({"cpus": [{"cpu": 1, "cpu_ns": 2_000_000_000u64}]}),
            ..StepDone::default()
        };
        let step = StepTruth {
            number: 0,
            word: "cpu=cpu1:2s".into(),
            begin_seen_ns: 1_100_000_000,
            done: Some(done),
        };
        let devices = BTreeMap::from([("disk.vda.rd_ios".to_owned(), 50)]);
        let memory_kib = BTreeMap::from([("MemTotal".to_owned(), 2)]);
        let end = Moment { devices, memory_kib, ..Moment::default() };
        GroundTruth { start: None, steps: vec![step], end: Some(end) }
    }

    fn demo_rows() -> Vec<Row> {
        let truth = truth();
        let experiment = Experiment { disk: "vda", tap: "tap-demo", memory_bytes: 1024, truth: &truth };
        rows(&stream(), &experiment).unwrap()
    }

    fn row<'a>(rows: &'a [Row], quantity: &str) -> &'a Row {
        rows.iter().find(|row| row.quantity == quantity).expect(quantity)
    }

    #[test]
    fn a_burn_is_framed_by_the_readings_around_it() {
        let rows = demo_rows();
        let burn = row(&rows, "vCPU 1 run, cpu=cpu1:2s");
        // eBPF and procfs: from second 1 to 3. libvirt has even seconds only: 0 to 4.
        assert_eq!(burn.values, [Some(2_010_000_000), Some(2_003_000_000), Some(2_003_000_000)]);
        let both = row(&rows, "vCPU 1 run + wait, cpu=cpu1:2s");
        assert_eq!(both.truth, Some(2_000_000_000));
        assert_eq!(both.values, [None, Some(2_003_000_000), Some(2_003_000_000)]);
    }

    #[test]
    fn totals_are_changes_and_gauges_are_the_last_value() {
        let rows = demo_rows();
        let reads = row(&rows, "vda reads");
        assert_eq!((reads.truth, reads.values), (Some(50), [Some(52), None, None]));
        let given = row(&rows, "memory given");
        assert_eq!((given.truth, given.values), (Some(1024), [Some(1024), None, None]));
        assert_eq!(row(&rows, "memory available").truth, Some(2048));
        assert_eq!(row(&rows, "tap-demo sent packets").values, [None; 3]);
    }

    #[test]
    fn cells_show_value_difference_and_reason() {
        let rows = demo_rows();
        let cells = row(&rows, "vda reads").cells();
        assert_eq!(cells[..5], ["vda reads", "50", "52 (+4.00 %)", "-", "-"]);
        assert!(cells[5].contains("firmware"), "{cells:?}");
        let cells = row(&rows, "memory given").cells();
        assert_eq!(cells[1..], ["1,024", "1,024 (=)", "-", "-", ""]);
        let cells = row(&rows, "vCPU 1 run, whole run").cells();
        assert_eq!(cells[1..5], ["-", "2.0100 s (-0.25 %)", "2.0150 s (=)", "2.0150 s"]);
    }

    #[test]
    fn numbers_are_grouped() {
        let check = |value, expected: &str| assert_eq!(grouped(value), expected);
        check(0, "0");
        check(999, "999");
        check(1_000, "1,000");
        check(-12_345_678, "-12,345,678");
        assert_eq!(difference(3, Some(0)), " (+3)");
    }

    #[test]
    fn both_tables_hold_every_row() {
        let rows = demo_rows();
        let (text, markdown) = (text(&rows), markdown(&rows));
        for row in &rows {
            assert!(text.contains(&row.quantity) && markdown.contains(&row.quantity), "{}", row.quantity);
        }
        assert!(text.contains("[1] truth: the guest's CPU time"), "{text}");
    }

    #[test]
    fn a_comparison_of_nothing_fails() {
        let error = |text: &str| Stream::parse(text, "demo").err().map(|error| error.to_string());
        let empty = "the stream has no sample of domain demo: nothing was compared";
        assert_eq!(error("{\"type\":\"session\"}").as_deref(), Some(empty));
        assert_eq!(error("{\"type\":").as_deref(), Some("line 1 of the stream is not JSON"));
        let bare = json!({"type": "sample", "mono_ns": 1, "domain": {"name": "demo"}}).to_string();
        let truth = GroundTruth::default();
        let experiment = Experiment { disk: "vda", tap: "t", memory_bytes: 1, truth: &truth };
        assert!(rows(&Stream::parse(&bare, "demo").unwrap(), &experiment).is_err());
    }
}
