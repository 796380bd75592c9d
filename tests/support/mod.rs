//! Runs of the program for live tests, each line of which is checked: order, numbering, counters, schema.
//! Waits for lines of the stream, for at most [`PATIENCE`].

use std::collections::{BTreeMap, BTreeSet};
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::path::PathBuf;
use std::process::{Child, ChildStdout, Command, ExitStatus, Stdio};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::sync::{Mutex, OnceLock, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

/// Longer than anything here may take: a busy guest of an emulated host lets go of a disk after minutes.
pub(crate) const PATIENCE: Duration = Duration::from_secs(240);

pub(crate) fn program() -> PathBuf {
    let program = std::env::var_os("KVM_MONITOR_BIN");
    program.expect("KVM_MONITOR_BIN is not set: run the live tests with `cargo xtask test`").into()
}

/// The number after `x`, which is not 0, of a series that looks random.
pub(crate) fn xorshift(mut x: u64) -> u64 {
    x ^= x << 13;
    x ^= x >> 7;
    x ^ x << 17
}

/// A process that does not run until this is dropped.
pub(crate) struct Stopped(u32);

impl Stopped {
    pub(crate) fn new(pid: u32) -> Self {
        send(pid, Signal::STOP);
        Self(pid)
    }
}

impl Drop for Stopped {
    fn drop(&mut self) {
        // Fails only if it is gone: nothing to wake, and a test that fails drops this as well.
        let _ = try_send(self.0, Signal::CONT);
    }
}

pub(crate) fn send(pid: u32, signal: Signal) {
    try_send(pid, signal).unwrap();
}

fn try_send(pid: u32, signal: Signal) -> rustix::io::Result<()> {
    kill_process(Pid::from_raw(i32::try_from(pid).unwrap()).unwrap(), signal)
}

/// Killed when dropped.
pub(crate) struct Run {
    pub(crate) child: Child,
    lines: Option<mpsc::Receiver<String>>,
    stderr: Option<JoinHandle<String>>,
    text: Vec<String>,
    records: Vec<Value>,
}

/// A run that is over. Its stream has been checked.
pub(crate) struct Ended {
    pub(crate) status: ExitStatus,
    pub(crate) stderr: String,
    pub(crate) records: Vec<Value>,
}

impl Run {
    pub(crate) fn start(mut command: Command, args: &[&str]) -> Self {
        command.args(args).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.env_remove("KVM_MONITOR_LOG").spawn().unwrap();
        let (stdout, mut stderr) = (child.stdout.take().unwrap(), child.stderr.take().unwrap());
        let (give, lines) = mpsc::channel();
        std::thread::spawn(move || {
            // The pipe is closed when nobody takes the lines any more.
            BufReader::new(stdout).lines().map_while(Result::ok).try_for_each(|line| give.send(line))
        });
        let stderr = std::thread::spawn(move || {
            let mut text = String::new();
            let _ = stderr.read_to_string(&mut text); // What came before an error is what counts.
            text
        });
        let (lines, stderr) = (Some(lines), Some(stderr));
        Self { child, lines, stderr, text: Vec::new(), records: Vec::new() }
    }

    /// The next line; none if there are no more.
    fn next(&mut self, deadline: Instant) -> Option<&Value> {
        let lines = self.lines.as_ref()?;
        let line = match lines.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
            Ok(line) => line,
            Err(RecvTimeoutError::Disconnected) => return None,
            Err(RecvTimeoutError::Timeout) => panic!("waited in vain; {}", self.told()),
        };
        let record = serde_json::from_str(&line).unwrap_or_else(|error| panic!("{error}: {line}"));
        self.text.push(line);
        self.records.push(record);
        self.records.last()
    }

    /// Reads on until a line is as wanted.
    pub(crate) fn wait(&mut self, what: &str, mut wanted: impl FnMut(&Value) -> bool) -> Value {
        let deadline = Instant::now() + PATIENCE;
        while let Some(record) = self.next(deadline) {
            if wanted(record) {
                return record.clone();
            }
            assert!(Instant::now() < deadline, "waited for {what} in vain; {}", self.told());
        }
        let stderr = self.stderr.take().map(|stderr| stderr.join().unwrap());
        panic!("the stream ended before {what}: {stderr:?}; {}", self.told());
    }

    /// What a person needs to see why a test fails: all but samples, and the last sample.
    fn told(&self) -> String {
        let told = self.records.iter().zip(&self.text).filter(|(r, _)| r["type"] != "sample");
        let told: Vec<&str> = told.map(|(_, text)| text.as_str()).collect();
        format!("it told\n{}\nand last\n{:?}", told.join("\n"), self.text.last())
    }

    pub(crate) fn wait_event(&mut self, kind: &str, detail: &str) {
        self.wait(kind, |r| {
            r["type"] == "event" && r["kind"] == kind && r["detail"].as_str().unwrap().contains(detail)
        });
    }

    /// Reads on until a source has been read after now.
    pub(crate) fn wait_fresh(&mut self, uuid: &str, source: &str) {
        let now = lab::monotonic_ns();
        self.wait(source, |r| {
            is_sample_of(r, uuid) && r["windows"][source][0].as_u64().is_some_and(|begin| begin > now)
        });
    }

    /// Reads on until so many samples hold the kernel's and `/proc`'s figures, and not libvirt's.
    pub(crate) fn wait_samples_without_libvirt(&mut self, uuid: &str, count: usize) {
        let now = lab::monotonic_ns();
        for _ in 0..count {
            self.wait("a sample of the sources on the host", |r| {
                is_sample_of(r, uuid)
                    && r["mono_ns"].as_u64().unwrap() > now
                    && has_window(r, "ebpf")
                    && has_window(r, "procfs")
                    && !has_window(r, "libvirt")
            });
        }
    }

    pub(crate) fn signal(&self, signal: Signal) {
        send(self.child.id(), signal);
    }

    pub(crate) fn close_stdout(&mut self) {
        self.lines = None;
    }

    pub(crate) fn stop(self) -> Ended {
        self.signal(Signal::INT);
        let ended = self.end();
        assert_eq!(ended.status.code(), Some(0), "{}", ended.stderr);
        ended
    }

    /// Reads to the end and checks all that was said.
    pub(crate) fn end(mut self) -> Ended {
        let deadline = Instant::now() + PATIENCE;
        let read_all = self.lines.is_some();
        while self.next(deadline).is_some() {}
        let status = loop {
            match self.child.try_wait().unwrap() {
                Some(status) => break status,
                None => assert!(Instant::now() < deadline, "it does not end"),
            }
            std::thread::sleep(Duration::from_millis(5));
        };
        let stderr = self.stderr.take().unwrap().join().unwrap();
        assert!(!stderr.contains("panicked"), "{stderr}");
        let complete = read_all && status.code() == Some(0);
        check_stream(&self.records, complete);
        validate(&self.text, &self.records);
        Ended { status, stderr, records: std::mem::take(&mut self.records) }
    }
}

impl Drop for Run {
    fn drop(&mut self) {
        // Both fail only if it is gone already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Ended {
    pub(crate) fn summary(&self) -> &Value {
        self.records.last().filter(|r| r["type"] == "summary").expect("the last line is the summary")
    }

    pub(crate) fn health(&self) -> &Value {
        self.records.iter().rfind(|r| r["type"] == "health").expect("it ends with its health")
    }

    /// Nothing but one clear line, with cause and fix.
    pub(crate) fn assert_error(&self, expected: &[&str]) {
        assert_eq!((self.status.code(), self.records.len()), (Some(2), 0), "{}", self.stderr);
        assert_eq!(self.stderr.lines().count(), 1, "{}", self.stderr);
        for part in expected {
            assert!(self.stderr.contains(part), "{part:?} is not in {}", self.stderr);
        }
    }
}

pub(crate) fn is_sample_of(record: &Value, uuid: &str) -> bool {
    record["type"] == "sample" && record["domain"]["uuid"] == uuid
}

pub(crate) fn is_change_of(record: &Value, uuid: &str, change: &str) -> bool {
    record["type"] == "domain" && record["domain"]["uuid"] == uuid && record["change"] == change
}

pub(crate) fn has_window(record: &Value, source: &str) -> bool {
    record["windows"][source].is_array()
}

// ---- what holds for every stream

/// What the stream has said of a domain so far.
#[derive(Default)]
struct Told {
    samples: u64,
    epoch: u64,
    /// Of this epoch, by what they belong to and by source.
    counters: BTreeMap<String, u64>,
}

/// The order of lines, the numbers of samples, counters that only rise, rates that cross no epoch.
fn check_stream(records: &[Value], complete: bool) {
    let mut present: BTreeMap<&str, Told> = BTreeMap::new();
    let mut counts: BTreeMap<&str, u64> = BTreeMap::new();
    for (i, record) in records.iter().enumerate() {
        let kind = record["type"].as_str().unwrap();
        assert_eq!(kind == "session", i == 0, "line {i}: {record}");
        assert!(kind != "summary" || i + 1 == records.len(), "lines after the summary");
        assert_ne!(record["kind"], "counter_backwards", "nothing here takes counters back: {record}");
        *counts.entry(kind).or_default() += u64::from(kind != "summary");
        let uuid = record["domain"]["uuid"].as_str().unwrap_or_default();
        match (kind, record["change"].as_str().unwrap_or_default()) {
            ("domain", "appeared") => {
                let told = Told { epoch: record["epoch"].as_u64().unwrap(), ..Told::default() };
                assert!(present.insert(uuid, told).is_none(), "appeared twice: {record}");
            }
            ("domain", "gone") => {
                present.remove(uuid).unwrap_or_else(|| panic!("was not there: {record}"));
            }
            ("domain", _) => assert!(present.contains_key(uuid), "was not there: {record}"),
            ("sample", _) => {
                let told = present.get_mut(uuid).unwrap_or_else(|| panic!("is not there: {record}"));
                check_sample(told, record);
            }
            _ => {}
        }
    }
    if complete {
        counts.retain(|_, count| *count > 0);
        let last = records.last().expect("a complete stream has lines");
        assert_eq!(last["type"], "summary", "{last}");
        assert_eq!(last["records"], serde_json::to_value(&counts).unwrap(), "{last}");
    }
}

fn check_sample(told: &mut Told, sample: &Value) {
    assert_eq!(sample["seq"], told.samples, "a sample is missing before {sample}");
    let epoch = sample["epoch"].as_u64().unwrap();
    assert!(epoch >= told.epoch, "{sample}");
    if epoch > told.epoch || told.samples == 0 {
        told.counters.clear();
        assert!(!sample.to_string().contains("per_s"), "a rate across a restart: {sample}");
    }
    (told.samples, told.epoch) = (told.samples + 1, epoch);
    let groups = ["cpu", "vcpus", "interfaces", "disks", "memory"];
    groups.iter().for_each(|group| check_counters(told, group, &sample[group]));
}

fn check_counters(told: &mut Told, place: &str, values: &Value) {
    for entity in values.as_array().into_iter().flatten() {
        // Disks that come and go change the place of the others.
        let name = ["vcpu", "target", "device", "alias", "mac"].map(|key| &entity[key]);
        let name = name.into_iter().find(|name| !name.is_null()).expect("entities have names");
        check_counters(told, &format!("{place}[{name}]"), entity);
    }
    for (metric, sources) in values.as_object().into_iter().flatten() {
        if !counters().contains(metric) {
            continue;
        }
        for source in ["ebpf", "libvirt", "procfs"] {
            let Some(now) = sources[source].as_u64() else { continue };
            let before = told.counters.insert(format!("{place}.{metric}.{source}"), now);
            assert!(before <= Some(now), "{place}.{metric}.{source}: {before:?}, then {now}");
        }
    }
}

/// Names of the metrics that have rates.
fn counters() -> &'static BTreeSet<String> {
    static COUNTERS: OnceLock<BTreeSet<String>> = OnceLock::new();
    COUNTERS.get_or_init(|| {
        let mut found = BTreeSet::new();
        find_counters(&serde_json::from_str(schema()).unwrap(), &mut found);
        assert!(found.contains("run_ns") && !found.contains("rss_bytes"), "{found:?}");
        found
    })
}

fn find_counters(schema: &Value, found: &mut BTreeSet<String>) {
    for (name, below) in schema.as_object().into_iter().flatten() {
        if below["properties"]["per_s"].is_object() {
            found.insert(name.clone());
        }
        find_counters(below, found);
    }
}

fn schema() -> &'static str {
    static SCHEMA: OnceLock<String> = OnceLock::new();
    SCHEMA.get_or_init(|| {
        let output = Command::new(program()).arg("schema").output().unwrap();
        assert!(output.status.success());
        // On one line.
        serde_json::from_slice::<Value>(&output.stdout).unwrap().to_string()
    })
}

/// Holds the lines against the schema, by code that is not ours and is slow where a CPU is emulated: those that have something new
/// to it, and so each thing once.
fn validate(lines: &[String], records: &[Value]) {
    static VALIDATOR: OnceLock<Mutex<(Validator, BTreeSet<String>)>> = OnceLock::new();
    let validator = VALIDATOR.get_or_init(|| Mutex::new((Validator::start(), BTreeSet::new())));
    let (validator, seen) = &mut *validator.lock().unwrap_or_else(PoisonError::into_inner);
    for (line, record) in lines.iter().zip(records) {
        let mut place = record["type"].as_str().unwrap_or_default().to_owned();
        if !add_shapes(record, &mut place, seen) {
            continue;
        }
        let answer = validator.ask(line);
        assert_eq!(answer, "ok", "{line}");
    }
}

/// Adds what a schema can tell apart at each place: the names in an object, the length of a list, the kind of a number, text but
/// for its digits. Says whether some of it was not seen at that place before.
fn add_shapes(value: &Value, place: &mut String, seen: &mut BTreeSet<String>) -> bool {
    let end = place.len();
    let mut is_new = false;
    match value {
        Value::Object(fields) => {
            for (name, field) in fields {
                place.extend([".", name]);
                is_new |= add_shapes(field, place, seen);
                place.truncate(end);
            }
            place.push('{');
            fields.keys().for_each(|name| place.extend([name, ","]));
        }
        Value::Array(elements) => {
            place.push_str("[]");
            for element in elements {
                is_new |= add_shapes(element, place, seen);
            }
            place.push_str(&elements.len().min(4).to_string()); // As far as the schema counts.
        }
        Value::Null => place.push_str(" null"),
        Value::Bool(is) => place.push_str(if *is { " true" } else { " false" }),
        Value::Number(number) => place.push_str(match number.as_f64() {
            Some(0.0) => " 0",
            Some(below) if below < 0.0 => " -",
            Some(part) if part.fract() != 0.0 => " .",
            _ => " +",
        }),
        Value::String(text) => {
            place.push('"');
            place.extend(text.chars().map(|c| if c.is_ascii_digit() { '9' } else { c }));
        }
    }
    if !seen.contains(place.as_str()) {
        seen.insert(place.clone());
        is_new = true;
    }
    place.truncate(end);
    is_new
}

/// Python's jsonschema. It ends when its input does, with this process.
struct Validator {
    python: Child,
    answers: BufReader<ChildStdout>,
}

impl Validator {
    fn start() -> Self {
        const PROGRAM: &str = "
import json, sys
from jsonschema import Draft202012Validator, validators
schema = json.loads(sys.stdin.readline())
assert validators.validator_for(schema) is Draft202012Validator
Draft202012Validator.check_schema(schema)
validator = Draft202012Validator(schema)
for line in sys.stdin:
    error = next(validator.iter_errors(json.loads(line)), None)
    print('ok' if error is None else str(error).replace('\\n', ' '), flush=True)
";
        let mut python = Command::new("/usr/bin/python3");
        python.args(["-c", PROGRAM]).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut python = python.spawn().expect("Python with jsonschema: `cargo xtask setup` helps");
        let answers = BufReader::new(python.stdout.take().unwrap());
        let mut this = Self { python, answers };
        this.give(schema());
        for wrong in [r#"{"type":"sample"}"#, r#"{"type":"nonsense"}"#, "[]"] {
            assert_ne!(this.ask(wrong), "ok", "the schema allows {wrong}");
        }
        this
    }

    fn give(&mut self, line: &str) {
        writeln!(self.python.stdin.as_mut().unwrap(), "{line}").expect("the validator still runs");
    }

    fn ask(&mut self, line: &str) -> String {
        self.give(line);
        let mut answer = String::new();
        self.answers.read_line(&mut answer).unwrap();
        answer.trim_end().to_owned()
    }
}
