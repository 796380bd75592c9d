//! The guest's console: one JSON line per event of its script, read into types, with the time each line was seen.
//!
//! `tests/guest` writes these lines. What is no such line (a kernel's last words) is kept for error messages.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{ErrorKind, Read};
use std::path::PathBuf;

use anyhow::{Context, Result};
use serde::Deserialize;
use serde_json::Value;

/// Counters of the guest's kernel by name, such as `disk.vda.rd_ios` (sectors are 512 bytes) or `net.eth0.tx_bytes`.
pub type Counters = BTreeMap<String, i64>;

/// What the guest did, by its own account and by its kernel's.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct GroundTruth {
    /// State before the first step.
    pub start: Option<Moment>,
    /// The steps that have begun, in order.
    pub steps: Vec<StepTruth>,
    /// State after the last step, once it is done.
    pub end: Option<Moment>,
}

/// The guest's state at the start or the end of its script.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
pub struct Moment {
    /// Guest's clock, ns since its boot.
    pub at_ns: u64,
    /// Host's CLOCK_MONOTONIC when the line was seen, ns: at most a few ms late while somebody waits.
    #[serde(default)]
    pub seen_ns: u64,
    /// /proc/meminfo, KiB.
    pub memory_kib: BTreeMap<String, u64>,
    /// Disk and network counters since the guest kernel started (its partition scan included).
    pub devices: Counters,
    /// Change of all counters since the start of the script (end only).
    #[serde(default)]
    pub kernel: Counters,
}

/// One step of the script.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct StepTruth {
    /// Number of the step, from 0, over all rounds.
    pub number: u64,
    /// The word of the script, such as `read=vda:50x4096`.
    pub word: String,
    /// Host's CLOCK_MONOTONIC when the line before the step was seen, ns.
    pub begin_seen_ns: u64,
    /// What was done; absent while the step runs.
    pub done: Option<StepDone>,
}

/// A completed step.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
pub struct StepDone {
    /// Host's CLOCK_MONOTONIC when the line was seen, ns.
    #[serde(default)]
    pub seen_ns: u64,
    /// Guest's clock when the step began, ns.
    pub from_ns: u64,
    /// Guest's clock when it ended, ns.
    pub to_ns: u64,
    /// What the step says it did; `error` if it failed.
    pub did: Value,
    /// Change of the guest kernel's counters.
    pub kernel: Counters,
}

impl GroundTruth {
    /// The steps of a kind, such as `read`.
    pub fn of_kind<'a>(&'a self, kind: &'a str) -> impl Iterator<Item = &'a StepTruth> {
        self.steps.iter().filter(move |step| step.kind() == kind)
    }

    /// A disk or network counter since the guest kernel started, at the end of the script.
    #[must_use]
    pub fn total(&self, counter: &str) -> Option<i64> {
        let end = self.end.as_ref()?;
        // The guest leaves out what is 0.
        Some(end.devices.get(counter).copied().unwrap_or(0))
    }

    /// The message of the first step that failed.
    #[must_use]
    pub fn error(&self) -> Option<String> {
        self.steps.iter().find_map(|step| {
            let error = step.done.as_ref()?.did.get("error")?;
            Some(format!("step {}: {}", step.word, error.as_str().unwrap_or("unknown")))
        })
    }
}

impl StepTruth {
    /// The word up to `=`.
    #[must_use]
    pub fn kind(&self) -> &str {
        self.word.split('=').next().unwrap_or_default()
    }

    /// A number that the step reports, such as `bytes`.
    #[must_use]
    pub fn did(&self, key: &str) -> Option<u64> {
        self.done.as_ref()?.did.get(key)?.as_u64()
    }

    /// Guest-side CPU time of a `cpu` or `burn` step by guest CPU, ns.
    #[must_use]
    pub fn cpu_ns(&self) -> BTreeMap<u64, u64> {
        let cpus = self.done.as_ref().and_then(|done| done.did.get("cpus")?.as_array().cloned());
        let entry = |cpu: &Value| Some((cpu.get("cpu")?.as_u64()?, cpu.get("cpu_ns")?.as_u64()?));
        cpus.unwrap_or_default().iter().filter_map(entry).collect()
    }
}

/// A line of the guest.
#[derive(Deserialize)]
#[serde(tag = "lab", rename_all = "lowercase")]
enum Line {
    Start(Moment),
    Begin {
        number: u64,
        step: String,
    },
    Step {
        number: u64,
        step: String,
        #[serde(flatten)]
        done: StepDone,
    },
    End(Moment),
    Error {
        error: String,
    },
}

/// Follows a console file.
#[derive(Debug)]
pub(crate) struct Console {
    pub(crate) path: PathBuf,
    file: Option<File>,
    /// Bytes of a line that is not complete yet.
    partial: Vec<u8>,
    pub(crate) truth: GroundTruth,
    /// What the guest said about a script it could not run.
    pub(crate) error: Option<String>,
    /// Lines that are not the guest program's.
    other: Vec<String>,
}

impl Console {
    pub(crate) fn new(path: PathBuf) -> Self {
        let (truth, other) = (GroundTruth::default(), Vec::new());
        Self { path, file: None, partial: Vec::new(), truth, error: None, other }
    }

    /// Reads what is new; `now_ns` is the time it counts as seen.
    pub(crate) fn poll(&mut self, now_ns: u64) -> Result<()> {
        if self.file.is_none() {
            self.file = match File::open(&self.path) {
                Err(e) if e.kind() == ErrorKind::NotFound => return Ok(()),
                file => Some(file.with_context(|| format!("cannot open {}", self.path.display()))?),
            };
        }
        if let Some(file) = &mut self.file {
            file.read_to_end(&mut self.partial).context("cannot read the console")?;
        }
        while let Some(end) = self.partial.iter().position(|byte| *byte == b'\n') {
            let line: Vec<u8> = self.partial.drain(..=end).collect();
            self.take(String::from_utf8_lossy(&line).trim(), now_ns);
        }
        Ok(())
    }

    /// The last lines that are not the guest program's: a kernel's complaint.
    pub(crate) fn last_words(&self) -> String {
        let start = self.other.len().saturating_sub(5);
        self.other[start..].join("\n")
    }

    fn take(&mut self, text: &str, seen_ns: u64) {
        // Firmware writes escape sequences in front of the first line.
        let json = text.find("{\"lab\"").map(|start| &text[start..]);
        match json.and_then(|json| serde_json::from_str(json).ok()) {
            Some(Line::Start(moment)) => {
                self.truth =
                    GroundTruth { start: Some(Moment { seen_ns, ..moment }), ..GroundTruth::default() };
            }
            Some(Line::Begin { number, step }) => {
                self.truth.steps.push(StepTruth { number, word: step, begin_seen_ns: seen_ns, done: None });
            }
            Some(Line::Step { number, step, done }) => {
                let steps = &mut self.truth.steps;
                if let Some(begun) = steps.iter_mut().find(|s| s.number == number && s.word == step) {
                    begun.done = Some(StepDone { seen_ns, ..done });
                }
            }
            Some(Line::End(moment)) => self.truth.end = Some(Moment { seen_ns, ..moment }),
            Some(Line::Error { error }) => self.error = Some(error),
            None if text.is_empty() => {}
            None => self.other.push(text.to_owned()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_become_ground_truth() {
        let mut console = Console::new("nowhere".into());
        console.take(
            "\u{1b}[2J{\"lab\":\"start\",\"at_ns\":5,\"memory_kib\":{\"MemTotal\":9},\"devices\":{}}",
            1,
        );
        console.take(r#"{"lab":"begin","at_ns":6,"number":0,"step":"cpu=cpu1:1s"}"#, 2);
        console.take(
            r#"{"lab":"step","at_ns":8,"number":0,"step":"cpu=cpu1:1s","from_ns":6,"to_ns":8,"did":{"cpus":[{"cpu":1,"cpu_ns":7}]},"kernel":{"vm.pgfault":1}}"#,
            3,
        );
        console.take("Kernel panic", 3);
        console.take(
            r#"{"lab":"end","at_ns":9,"memory_kib":{},"devices":{"disk.vda.rd_ios":52},"kernel":{}}"#,
            4,
        );
        let truth = &console.truth;
        let step = truth.of_kind("cpu").next().expect("the step");
        assert_eq!((step.begin_seen_ns, step.done.as_ref().map(|done| done.seen_ns)), (2, Some(3)));
        assert_eq!(step.cpu_ns(), BTreeMap::from([(1, 7)]));
        assert_eq!((truth.total("disk.vda.rd_ios"), truth.total("disk.vda.fl_ios")), (Some(52), Some(0)));
        assert_eq!((console.last_words().as_str(), truth.error()), ("Kernel panic", None));
    }

    #[test]
    fn a_failed_step_is_an_error() {
        let mut console = Console::new("nowhere".into());
        console.take(r#"{"lab":"begin","at_ns":6,"number":0,"step":"flush=vdz:1"}"#, 2);
        console.take(
            r#"{"lab":"step","at_ns":8,"number":0,"step":"flush=vdz:1","from_ns":6,"to_ns":8,"did":{"error":"no"},"kernel":{}}"#,
            3,
        );
        assert_eq!(console.truth.error().as_deref(), Some("step flush=vdz:1: no"));
    }
}
