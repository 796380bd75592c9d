//! What was wrong with a recorded stream: kinds with counts and the first few line numbers.

use std::collections::BTreeMap;

use serde::Serialize;

/// What can be wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    /// No JSON.
    NotJson,
    /// A line that ends in the middle.
    Truncated,
    /// A line cut into by another one.
    Interleaved,
    /// JSON, but no line of a stream.
    NotAStream,
    /// A line longer than any of ours.
    TooLong,
    /// A type that this version does not know.
    UnknownType,
    /// A stream of another version.
    OtherVersion,
    /// A sample before any session.
    NoSession,
    /// A second session of the same host.
    Restarted,
    /// A session of another host.
    OtherHost,
    /// A sample that is not later than the one before.
    Reordered,
    /// Samples of a domain are missing.
    Missing,
    /// The wall clock was set.
    ClockStep,
    /// The stream ends without its summary.
    NoSummary,
    /// The compressed file is damaged or cut off.
    Compression,
}

impl Kind {
    /// What it means and what was done about it.
    #[must_use]
    pub const fn meaning(self) -> &'static str {
        match self {
            Self::NotJson => "no JSON: left out",
            Self::Truncated => "ends in the middle: left out",
            Self::Interleaved => "cut into by another line: the part that is whole is used",
            Self::NotAStream => "JSON, but no line of a stream: left out",
            Self::TooLong => "longer than any line of a stream: left out",
            Self::UnknownType => "of a type that this version does not know: left out",
            Self::OtherVersion => "of another version of the stream: left out up to the next session",
            Self::NoSession => "a sample before any session: left out",
            Self::Restarted => "a further session of the same host: counters start anew",
            Self::OtherHost => "a session of another host: what follows counts as that host's",
            Self::Reordered => "a sample that is not later than the one before it: left out",
            Self::Missing => "samples are missing before this one: the next comparison spans the gap",
            Self::ClockStep => {
                "the wall clock was set here: no comparison uses it, but ages of memory reports do"
            }
            Self::NoSummary => "the stream ends without its summary: it was cut off, or still runs",
            Self::Compression => "the compressed data is damaged or cut off: what came before is used",
        }
    }

    /// Whether lines were lost by it.
    #[must_use]
    pub const fn is_loss(self) -> bool {
        !matches!(self, Self::Restarted | Self::OtherHost | Self::ClockStep | Self::Missing | Self::NoSummary)
    }
}

/// What was found.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Input {
    /// Lines read.
    pub lines: u64,
    /// Bytes read, after decompression.
    pub bytes: u64,
    /// Samples used.
    pub samples: u64,
    /// Findings by kind.
    pub problems: BTreeMap<Kind, Problem>,
}

/// One kind of finding.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Problem {
    /// How often.
    pub count: u64,
    /// The numbers of the first lines, from 1.
    pub first_lines: Vec<u64>,
    /// What was said of the first one.
    pub detail: String,
}

/// So many line numbers are kept.
const EXAMPLES: usize = 5;

impl Input {
    /// Notes a problem.
    pub fn note(&mut self, kind: Kind, line: u64, detail: impl FnOnce() -> String) {
        let problem = self.problems.entry(kind).or_default();
        if problem.count == 0 {
            problem.detail = detail();
        }
        problem.count += 1;
        if problem.first_lines.len() < EXAMPLES {
            problem.first_lines.push(line);
        }
    }
}
