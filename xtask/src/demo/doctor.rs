//! Breaks a source of the recorded stream on purpose, in ways that happen, and asks `kvm-monitor compare` what it makes
//! of it: a comparison that finds nothing proves something only if it would have found that.

use std::{fs, path::Path, process::Command};

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;

use super::Recording;
use crate::process;

/// The guest whose figures are changed, the source, and where.
const DOMAIN: &str = "direct";
const SOURCE: &str = "libvirt";
const SCOPE: &str = "interfaces";
/// Whose comparison has to show it.
const METRIC: &str = "rx_bytes";
const SECOND_NS: u64 = 1_000_000_000;

/// What is broken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fault {
    TooMany,
    Swapped,
    Lost,
    Late,
}

/// What became of a broken stream.
pub(super) struct Found {
    what: &'static str,
    /// Verdict, and what the difference is said to look like.
    verdict: String,
    reason: String,
}

impl Fault {
    const ALL: [Self; 4] = [Self::TooMany, Self::Swapped, Self::Lost, Self::Late];

    const fn description(self) -> &'static str {
        match self {
            Self::TooMany => "libvirt's received bytes are 1 % too many",
            Self::Swapped => "libvirt's received and sent are swapped",
            Self::Lost => "libvirt's received lack one second",
            Self::Late => "libvirt's received and sent are 3 s late",
        }
    }

    /// What `compare` calls it.
    const fn name(self) -> &'static str {
        match self {
            Self::TooMany => "factor",
            Self::Swapped => "direction",
            Self::Lost => "step",
            Self::Late => "late",
        }
    }
}

/// Breaks the stream in every way, and fails if `compare` does not find and name one.
pub(super) fn examine(program: &Path, of: &Recording) -> Result<Vec<Found>> {
    let stream = fs::read_to_string(&of.stream).context("cannot read the stream")?;
    Fault::ALL.into_iter().map(|fault| one(program, of, (&stream, fault))).collect()
}

fn one(program: &Path, of: &Recording, (stream, fault): (&str, Fault)) -> Result<Found> {
    let file = of.directory.join(format!("broken-{}.ndjson", fault.name()));
    fs::write(&file, broken(stream, fault)?).with_context(|| format!("cannot write {}", file.display()))?;
    let mut command = Command::new(program);
    command.arg("compare").arg(&file).args(["--domain", DOMAIN, "--format", "json"]);
    let report: Value =
        serde_json::from_str(&process::output(&mut command)?).context("compare wrote no JSON")?;
    let comparison = comparison(&report).context("compare did not compare what was broken")?;
    let text = |key: &str| comparison[key].as_str().unwrap_or("nothing").to_owned();
    let found = Found {
        what: fault.description(),
        verdict: format!("{}: {}", text("verdict"), text("looks_like")),
        reason: text("reason"),
    };
    ensure!(
        comparison["verdict"] == "disagree" && comparison["looks_like"] == fault.name(),
        "{}, and compare says {}: {} (see {})",
        found.what,
        found.verdict,
        found.reason,
        file.display()
    );
    Ok(found)
}

fn comparison(report: &Value) -> Option<&Value> {
    let domain = report["domains"].as_array()?.iter().find(|d| d["name"] == DOMAIN)?;
    let entity = domain["entities"].as_array()?.iter().find(|e| e["scope"] == SCOPE)?;
    let metric = entity["metrics"].as_array()?.iter().find(|m| m["metric"] == METRIC)?;
    metric["comparisons"].as_array()?.iter().find(|c| c["other"] == SOURCE)
}

/// The stream with the source broken.
fn broken(stream: &str, fault: Fault) -> Result<String> {
    let mut lines: Vec<Value> =
        stream.lines().map(serde_json::from_str).collect::<Result<_, _>>().context("a line is no JSON")?;
    let history: Vec<Counters> = lines.iter().filter_map(Counters::read).collect();
    let busiest = busiest_second(&history);
    for line in &mut lines {
        let Some(now) = Counters::read(line) else { continue };
        let at = |ns: u64| history.iter().rev().find(|c| c.read_ns <= ns).copied().unwrap_or(history[0]);
        let first = history[0];
        let said = match fault {
            Fault::TooMany => Counters {
                received_bytes: now.received_bytes + (now.received_bytes - first.received_bytes) / 100,
                ..now
            },
            Fault::Swapped => Counters {
                received_bytes: now.sent_bytes,
                sent_bytes: now.received_bytes,
                received: now.sent,
                sent: now.received,
                ..now
            },
            Fault::Lost => {
                let (from, to) = (at(busiest), at((busiest + SECOND_NS).min(now.read_ns).max(busiest)));
                Counters {
                    received_bytes: now.received_bytes - (to.received_bytes - from.received_bytes),
                    received: now.received - (to.received - from.received),
                    ..now
                }
            }
            Fault::Late => at(now.read_ns.saturating_sub(3 * SECOND_NS)),
        };
        said.write(line);
    }
    let mut text = String::new();
    for line in &lines {
        text.push_str(&line.to_string());
        text.push('\n');
    }
    Ok(text)
}

/// When the second in which the guest received the most begins.
fn busiest_second(history: &[Counters]) -> u64 {
    let grown = |from: &Counters| {
        let to = history.iter().rev().find(|c| c.read_ns <= from.read_ns + SECOND_NS);
        to.map_or(0, |to| to.received_bytes - from.received_bytes)
    };
    history.iter().max_by_key(|c| grown(c)).map_or(0, |c| c.read_ns)
}

/// The source's counters of the guest's interface in one line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Counters {
    read_ns: u64,
    received_bytes: u64,
    received: u64,
    sent_bytes: u64,
    sent: u64,
}

const METRICS: [&str; 4] = ["rx_bytes", "rx_packets", "tx_bytes", "tx_packets"];

impl Counters {
    /// `None` if the line is another one, or the source was not read.
    fn read(line: &Value) -> Option<Self> {
        let ours = line["type"] == "sample" && line["domain"]["name"] == DOMAIN;
        let interface = line[SCOPE].as_array().filter(|_| ours)?.first()?;
        let [received_bytes, received, sent_bytes, sent] = METRICS.map(|m| interface[m][SOURCE].as_u64());
        Some(Self {
            read_ns: line["windows"][SOURCE][1].as_u64()?,
            received_bytes: received_bytes?,
            received: received?,
            sent_bytes: sent_bytes?,
            sent: sent?,
        })
    }

    fn write(self, line: &mut Value) {
        let values = [self.received_bytes, self.received, self.sent_bytes, self.sent];
        for (metric, value) in METRICS.into_iter().zip(values) {
            line[SCOPE][0][metric][SOURCE] = value.into();
        }
    }
}

/// For a terminal.
pub(super) fn text(all: &[Found]) -> String {
    all.iter().map(|f| format!("  {}: found as \"{}\": {}\n", f.what, f.verdict, f.reason)).collect()
}

/// For a document.
pub(super) fn markdown(all: &[Found]) -> String {
    let rows: String =
        all.iter().map(|f| format!("| {} | {} | {} |\n", f.what, f.verdict, f.reason)).collect();
    format!("| broken on purpose | found as | in words |\n|---|---|---|\n{rows}")
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    /// A guest that receives 1000 bytes in 10 packets and sends 300 in 3 each second, twice that in second 5.
    fn stream() -> String {
        let mut text = String::from("{\"type\":\"session\"}\n");
        for second in 0..10u64 {
            let n = second + u64::from(second > 5);
            let line = json!({"type": "sample", "domain": {"name": DOMAIN},
                "windows": {"libvirt": [second * SECOND_NS, second * SECOND_NS + 1]},
                "interfaces": [{"rx_bytes": {"libvirt": n * 1_000}, "rx_packets": {"libvirt": n * 10},
                    "tx_bytes": {"libvirt": n * 300}, "tx_packets": {"libvirt": n * 3}}]});
            text.push_str(&format!("{line}\n"));
        }
        text
    }

    fn counters(text: &str) -> Vec<[u64; 4]> {
        let lines = text.lines().map(|l| serde_json::from_str::<Value>(l).expect(l));
        let all: Vec<Counters> = lines.filter_map(|l| Counters::read(&l)).collect();
        all.iter().map(|c| [c.received_bytes, c.received, c.sent_bytes, c.sent]).collect()
    }

    #[test]
    fn a_stream_is_broken_as_announced_and_nowhere_else() {
        let whole = counters(&stream());
        let check = |fault, second: usize, expected: [u64; 4]| {
            let broken = counters(&broken(&stream(), fault).expect("JSON"));
            assert_eq!((broken.len(), broken[second]), (whole.len(), expected), "{fault:?}");
        };
        check(Fault::TooMany, 9, [10_100, 100, 3_000, 30]);
        check(Fault::Swapped, 9, [3_000, 30, 10_000, 100]);
        check(Fault::Lost, 5, whole[5]);
        check(Fault::Lost, 9, [8_000, 80, 3_000, 30]);
        check(Fault::Late, 9, whole[6]);
    }
}
