//! Reads the lines of a recorded stream back: the counterpart of the rest of `record`.
//!
//! Samples are most of a stream, so they are read straight into a table that is used again for every line; the
//! other lines are rare and small. What is not known here is skipped: a newer program may have written it.

mod sample;

use serde::Deserialize;
use serde_json::{Value, error::Category};

pub use sample::{Culprit, EntityRow, Row, SampleLine, Slots};

use crate::units::DomainUuid;

/// What one line says, the sample excepted: that is in the [`SampleLine`] it was read into.
#[derive(Debug)]
pub enum Line {
    /// Who measured, where.
    Session(Box<SessionLine>),
    /// A domain.
    Domain(Box<DomainLine>),
    /// A sample.
    Sample,
    /// Something happened.
    Event(EventLine),
    /// How the monitor was doing.
    Health(HealthLine),
    /// The last line.
    Summary(SummaryLine),
    /// A type that this version does not know.
    Other(String),
}

/// What is wrong with a line.
#[derive(Debug, thiserror::Error)]
pub enum LineError {
    /// It ends before its JSON does.
    #[error("the line ends in the middle: {0}")]
    Truncated(serde_json::Error),
    /// No JSON.
    #[error("not JSON: {0}")]
    NotJson(serde_json::Error),
    /// JSON, but not as a line of the stream is.
    #[error("not a line of a kvm-monitor stream: {0}")]
    Shape(String),
}

impl From<serde_json::Error> for LineError {
    fn from(error: serde_json::Error) -> Self {
        match error.classify() {
            Category::Eof => Self::Truncated(error),
            Category::Syntax | Category::Io => Self::NotJson(error),
            Category::Data => Self::Shape(error.to_string()),
        }
    }
}

/// Parts of `session`.
#[derive(Clone, Debug, Deserialize, PartialEq)]
pub struct SessionLine {
    /// Version of the stream's format.
    pub schema_version: u32,
    /// Version of the program that wrote it.
    #[serde(default)]
    pub tool_version: String,
    /// The machine.
    pub host: HostLine,
    /// Both clocks at one moment.
    pub clock: ClockLine,
    /// Time between samples, nanoseconds.
    pub interval_ns: u64,
    /// What each source could do.
    #[serde(default)]
    pub sources: std::collections::BTreeMap<String, SourceLine>,
    /// What became of each kernel program.
    #[serde(default)]
    pub probes: Vec<ProbeLine>,
}

/// Parts of `session.host`.
#[derive(Clone, Debug, Default, Deserialize, PartialEq)]
pub struct HostLine {
    /// Host name.
    pub hostname: String,
    /// Kernel release.
    #[serde(default)]
    pub kernel: String,
    /// Changes with every boot.
    #[serde(default)]
    pub boot_id: Option<String>,
    /// CPUs online.
    #[serde(default)]
    pub cpus: u64,
    /// Clock ticks per second of the times in `/proc`.
    #[serde(default)]
    pub hz: u64,
}

/// `session.clock`.
#[derive(Clone, Debug, Deserialize, PartialEq)]
pub struct ClockLine {
    /// `CLOCK_MONOTONIC`, nanoseconds.
    pub mono_ns: u64,
    /// The same moment by the wall clock.
    #[serde(default)]
    pub ts: String,
}

/// An element of `session.sources`.
#[derive(Clone, Debug, Default, Deserialize, PartialEq)]
pub struct SourceLine {
    /// It works.
    #[serde(default)]
    pub available: bool,
    /// If it does not: why.
    #[serde(default)]
    pub reason: Option<String>,
}

/// An element of `session.probes`.
#[derive(Clone, Debug, Deserialize, PartialEq)]
pub struct ProbeLine {
    /// Its name.
    pub name: String,
    /// `attached`, `failed` or `off`.
    pub state: String,
    /// If it is not attached: why.
    #[serde(default)]
    pub reason: Option<String>,
}

/// A `domain` line.
#[derive(Clone, Debug, Deserialize)]
pub struct DomainLine {
    /// `appeared`, `changed` or `gone`.
    pub change: String,
    /// Grows when counters restart.
    #[serde(default)]
    pub epoch: u32,
    /// The domain.
    pub domain: DomainFacts,
}

/// What of a domain matters for a comparison.
#[derive(Clone, Debug, Default, Deserialize, PartialEq)]
pub struct DomainFacts {
    /// Identity.
    pub uuid: String,
    /// Name.
    pub name: String,
    /// `running`, `paused`, ….
    #[serde(default)]
    pub state: String,
    /// `kvm` or `qemu`.
    #[serde(default)]
    pub virt_type: Option<String>,
    /// Network interfaces.
    #[serde(default)]
    pub interfaces: Vec<InterfaceFacts>,
    /// Disks.
    #[serde(default)]
    pub disks: Vec<DiskFacts>,
    /// Balloon.
    #[serde(default)]
    pub balloon: Option<BalloonFacts>,
}

/// What of an interface matters.
#[derive(Clone, Debug, Default, Deserialize, PartialEq)]
pub struct InterfaceFacts {
    /// Host device.
    #[serde(default)]
    pub device: String,
    /// `ethernet`, `bridge`, `direct`, ….
    #[serde(rename = "type", default)]
    pub kind: String,
    /// If the host's kernel does not see its traffic: why.
    #[serde(default)]
    pub observable_reason: Option<String>,
}

/// What of a disk matters.
#[derive(Clone, Debug, Default, Deserialize, PartialEq)]
pub struct DiskFacts {
    /// Guest target.
    #[serde(default)]
    pub target: String,
    /// `file`, `block`, `network`, ….
    #[serde(default)]
    pub source_type: String,
    /// Image format.
    #[serde(default)]
    pub format: Option<String>,
    /// Cache mode.
    #[serde(default)]
    pub cache: Option<String>,
    /// If the host's kernel does not see its I/O: why.
    #[serde(default)]
    pub observable_reason: Option<String>,
}

/// The balloon device.
#[derive(Clone, Debug, Default, Deserialize, PartialEq)]
pub struct BalloonFacts {
    /// Period of the guest's reports, seconds; 0 = none.
    #[serde(default)]
    pub stats_period_s: u32,
}

/// An `event` line.
#[derive(Clone, Debug, Deserialize)]
pub struct EventLine {
    /// `CLOCK_MONOTONIC`, nanoseconds.
    #[serde(default)]
    pub mono_ns: u64,
    /// What.
    pub kind: String,
    /// To which domain.
    #[serde(default)]
    pub domain: Option<DomainRef>,
    /// In words.
    #[serde(default)]
    pub detail: String,
}

/// A domain as samples and events name it.
#[derive(Clone, Debug, Deserialize)]
pub struct DomainRef {
    /// Identity.
    pub uuid: String,
}

/// A `health` line.
#[derive(Clone, Debug, Default, Deserialize)]
pub struct HealthLine {
    /// By source.
    #[serde(default)]
    pub sources: std::collections::BTreeMap<String, SourceHealthLine>,
    /// By kernel program.
    #[serde(default)]
    pub programs: std::collections::BTreeMap<String, ProgramLine>,
    /// Events that a kernel program missed.
    #[serde(default)]
    pub misses: std::collections::BTreeMap<String, u64>,
    /// CPU time of the monitor, nanoseconds.
    #[serde(default)]
    pub cpu_ns: u64,
    /// Its resident memory, bytes.
    #[serde(default)]
    pub rss_bytes: Option<u64>,
}

/// Reads of one source.
#[derive(Clone, Debug, Default, Deserialize)]
pub struct SourceHealthLine {
    /// Reads that gave values.
    #[serde(default)]
    pub reads: u64,
    /// Reads that failed.
    #[serde(default)]
    pub errors: u64,
    /// Reads that were not made or discarded.
    #[serde(default)]
    pub lost: u64,
    /// The last failure.
    #[serde(default)]
    pub last_error: Option<String>,
}

/// Runs of one kernel program.
#[derive(Clone, Copy, Debug, Default, Deserialize)]
pub struct ProgramLine {
    /// Runs while they were counted.
    #[serde(default)]
    pub run_count: u64,
    /// Time they took, nanoseconds.
    #[serde(default)]
    pub run_ns: u64,
}

/// The `summary` line.
#[derive(Clone, Debug, Default, Deserialize)]
pub struct SummaryLine {
    /// Why the run ended.
    #[serde(default)]
    pub reason: String,
    /// Ticks made.
    #[serde(default)]
    pub ticks: u64,
    /// Ticks left out.
    #[serde(default)]
    pub ticks_missed: u64,
    /// Lines dropped.
    #[serde(default)]
    pub records_dropped: u64,
    /// Duration, nanoseconds.
    #[serde(default)]
    pub wall_ns: u64,
    /// CPU time, nanoseconds.
    #[serde(default)]
    pub cpu_ns: u64,
}

/// How each line of the stream begins, as this program writes them.
const BEGIN: &[u8] = b"{\"type\":\"";
const SAMPLE: &[u8] = b"{\"type\":\"sample\",";

/// Reads one line. A sample goes into `sample`, whose content is undefined after an error.
///
/// # Errors
/// If the line is not one of a stream.
pub fn parse(line: &[u8], sample: &mut SampleLine) -> Result<Line, LineError> {
    if line.starts_with(SAMPLE) {
        return sample.read(line).map(|()| Line::Sample);
    }
    let value: Value = serde_json::from_slice(line)?;
    let Some(kind) = value.get("type").and_then(Value::as_str) else {
        return Err(LineError::Shape("it has no `type`".to_owned()));
    };
    Ok(match kind {
        // Not as we write it (its `type` stands elsewhere), but a sample.
        "sample" => return sample.read(line).map(|()| Line::Sample),
        "session" => Line::Session(Box::new(serde_json::from_value(value)?)),
        "domain" => Line::Domain(Box::new(serde_json::from_value(value)?)),
        "event" => Line::Event(serde_json::from_value(value)?),
        "health" => Line::Health(serde_json::from_value(value)?),
        "summary" => Line::Summary(serde_json::from_value(value)?),
        other => Line::Other(other.to_owned()),
    })
}

/// Where in a broken line another one begins: two writers of one file cut into each other's lines.
#[must_use]
pub fn begins_inside(line: &[u8]) -> Option<usize> {
    let inside = line.get(1..)?;
    inside.windows(BEGIN.len()).rposition(|w| w == BEGIN).map(|at| at + 1)
}

/// The identity in a line.
///
/// # Errors
/// If it is no UUID.
pub fn uuid(text: &str) -> Result<DomainUuid, LineError> {
    text.parse().map_err(|error: crate::units::NotAUuid| LineError::Shape(error.to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn broken_lines_are_told_apart() {
        let check = |line: &str, expected: &str| {
            let error = parse(line.as_bytes(), &mut SampleLine::default()).unwrap_err();
            assert!(error.to_string().starts_with(expected), "{line}: {error}");
        };
        check("", "the line ends in the middle");
        check("{\"type\":\"sample\",\"seq\":1", "the line ends in the middle");
        check("{\"type\":\"session\"", "the line ends in the middle");
        check("hello", "not JSON");
        check("{\"type\":\"sample\",\"seq\":{\"type\":\"event\"}", "not a line");
        check("{\"type\":\"sample\"}", "not a line");
        check("{\"type\":\"session\"}", "not a line");
        check("[1]", "not a line");
        check("{\"a\":1}", "not a line");
        assert!(matches!(
            parse(b"{\"type\":\"new\"}", &mut SampleLine::default()),
            Ok(Line::Other(kind)) if kind == "new"
        ));
    }

    #[test]
    fn the_line_inside_a_broken_one_is_found() {
        let line = b"{\"type\":\"sam{\"type\":\"event\",\"kind\":\"x\"}";
        assert_eq!(begins_inside(line), Some(12));
        assert_eq!(begins_inside(&line[12..]), None);
        assert_eq!(begins_inside(b""), None);
    }
}
