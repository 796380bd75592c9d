//! Ground truth: what a guest says it did, beside what the sources say. Pure.

use crate::{
    metric::{Kind, MetricDef, Scope},
    reconcile::{Reading, real},
    units::{SourceKind, Window},
};

/// One thing that is known exactly.
#[derive(Clone, Debug, Default, PartialEq, serde::Deserialize)]
pub struct Truth {
    /// Name of the domain.
    pub domain: String,
    /// Where the metric is: `cpu`, `vcpus`, ….
    pub scope: String,
    /// Number of the vCPU, device or target; empty for `cpu` and `memory`.
    #[serde(default)]
    pub entity: String,
    /// The metrics whose sum it is.
    pub metrics: Vec<String>,
    /// What happened, in words.
    pub quantity: String,
    /// `CLOCK_MONOTONIC` before and after it happened; absent: the whole stream.
    #[serde(default)]
    pub between_ns: Option<[u64; 2]>,
    /// Of a gauge: when it had that value, `CLOCK_MONOTONIC`. It is held against the last reading.
    #[serde(default)]
    pub at_ns: Option<u64>,
    /// How much it was.
    pub value: u64,
    /// Why sources may differ from it.
    #[serde(default)]
    pub note: String,
}

/// Readings around the time of a truth.
#[derive(Clone, Debug)]
pub struct Watch {
    /// What it is about.
    pub truth: Truth,
    /// By metric of `truth.metrics`, and source.
    seen: Vec<[Seen; SourceKind::COUNT]>,
    /// Most packets that waited in the tap's queue meanwhile.
    pub backlog_packets: u64,
    /// When the guest made the report that was read last, `CLOCK_MONOTONIC`: of memory.
    pub reported_ns: Option<u64>,
}

/// A reading, and by how much it may be short of what is true.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Report {
    /// What was read.
    pub reading: Reading,
    /// What it may lack: a run or wait in progress, a clock tick.
    pub lacks: u64,
}

/// Readings of one source around a span of time.
#[derive(Clone, Copy, Debug, Default)]
struct Seen {
    kind: Option<Kind>,
    /// The last one before, the first and the last inside, the first after.
    before: Option<Report>,
    first: Option<Report>,
    last: Option<Report>,
    after: Option<Report>,
}

/// What a source says of a truth.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Claim {
    /// Growth between the readings that frame the span; the last value of a gauge.
    pub value: f64,
    /// Of that, at least so much lies within the span.
    pub at_least: f64,
    /// And at most so much.
    pub at_most: f64,
}

impl Watch {
    /// Nothing seen yet.
    #[must_use]
    pub fn new(truth: Truth) -> Self {
        let seen = vec![[Seen::default(); SourceKind::COUNT]; truth.metrics.len()];
        Self { truth, seen, backlog_packets: 0, reported_ns: None }
    }

    /// Whether this is about a metric of an entity.
    #[must_use]
    pub fn wants(&self, def: &MetricDef, entity: &str) -> bool {
        self.truth.entity == entity
            && self.truth.scope == def.scope.key()
            && self.truth.metrics.iter().any(|m| m == def.name)
    }

    /// Adds a reading.
    pub fn add(&mut self, def: &MetricDef, source: SourceKind, report: Report) {
        let [from, to] = self.truth.between_ns.unwrap_or([0, u64::MAX]);
        let window = report.reading.window;
        for (name, seen) in self.truth.metrics.iter().zip(&mut self.seen) {
            if name != def.name {
                continue;
            }
            let seen = &mut seen[source as usize];
            seen.kind = Some(def.kind);
            if window.end.0 <= from {
                seen.before = Some(report);
            } else if window.begin.0 >= to {
                seen.after.get_or_insert(report);
            } else if window.begin.0 >= from && window.end.0 <= to {
                seen.first.get_or_insert(report);
                seen.last = Some(report);
            }
        }
    }

    /// Adds how many packets waited in the tap's queue at a reading.
    pub fn note_backlog(&mut self, window: Window, packets: u64) {
        let [from, to] = self.truth.between_ns.unwrap_or([0, u64::MAX]);
        if window.end.0 >= from && window.begin.0 <= to {
            self.backlog_packets = self.backlog_packets.max(packets);
        }
    }

    /// Adds how old the guest's report was at a reading, seconds.
    pub fn note_age(&mut self, window: Window, age_s: u64) {
        self.reported_ns = Some(window.begin.0.saturating_sub(age_s.saturating_mul(1_000_000_000)));
    }

    /// What a source says; `None` if it has not been read around the span.
    #[must_use]
    pub fn claim(&self, source: SourceKind) -> Option<Claim> {
        let mut seen = self.seen.iter().map(|s| &s[source as usize]);
        let first = self.seen.first()?[source as usize];
        if first.kind? == Kind::Gauge {
            let value = real(first.after.or(first.last)?.reading.value);
            return Some(Claim { value, at_least: value, at_most: value });
        }
        let Some(span) = self.truth.between_ns else {
            let value: f64 = seen.map(|s| Some(grown(s.first?, s.last?))).sum::<Option<f64>>()?;
            return Some(Claim { value, at_least: value, at_most: value });
        };
        let bounds = seen.try_fold(Bounds::default(), |sum, seen| Some(sum.and(seen.bounds()?)))?;
        let gaps = self.limited().then(|| first.gaps(span)).flatten();
        Some(bounds.claim(gaps))
    }

    /// Whether the metrics are parts of a thread's time, of which no more can pass than time does.
    fn limited(&self) -> bool {
        const PARTS: [&str; 4] = ["run_ns", "wait_ns", "irq_ns", "sleep_ns"];
        self.truth.scope == Scope::Vcpu.key()
            && self.truth.metrics.iter().all(|m| PARTS.contains(&m.as_str()))
    }

    /// The unit of the truth's metrics.
    #[must_use]
    pub fn def(&self) -> Option<&'static MetricDef> {
        let scope = Scope::ALL.into_iter().find(|s| s.key() == self.truth.scope)?;
        scope.metrics().iter().find(|d| Some(d.name) == self.truth.metrics.first().map(String::as_str))
    }
}

/// Growth between the readings around a span, and between those inside it.
#[derive(Clone, Copy, Debug, Default)]
struct Bounds {
    around: f64,
    around_at_least: f64,
    around_at_most: f64,
    inside_at_least: f64,
    inside_at_most: f64,
}

/// Time between a span's ends and the readings next to them, nanoseconds.
#[derive(Clone, Copy, Debug)]
struct Gaps {
    outside: f64,
    /// `None` if no reading lies inside.
    inside: Option<f64>,
    /// How long the span is.
    span: f64,
}

impl Bounds {
    fn and(self, more: Self) -> Self {
        Self {
            around: self.around + more.around,
            around_at_least: self.around_at_least + more.around_at_least,
            around_at_most: self.around_at_most + more.around_at_most,
            inside_at_least: self.inside_at_least + more.inside_at_least,
            inside_at_most: self.inside_at_most + more.inside_at_most,
        }
    }

    fn claim(self, gaps: Option<Gaps>) -> Claim {
        let (mut at_least, mut at_most) = (self.inside_at_least, self.around_at_most);
        if let Some(gaps) = gaps {
            at_least = at_least.max(self.around_at_least - gaps.outside);
            at_most = gaps
                .inside
                .map_or(at_most, |inside| at_most.min(self.inside_at_most + inside))
                .min(gaps.span);
        }
        Claim { value: self.around, at_least: at_least.max(0.0), at_most }
    }
}

impl Seen {
    fn bounds(&self) -> Option<Bounds> {
        let (before, after) = (self.before?, self.after?);
        let around = grown(before, after);
        let (inside, first, last) = match self.first.zip(self.last) {
            Some((first, last)) => (grown(first, last), real(first.lacks), real(last.lacks)),
            None => (0.0, 0.0, 0.0),
        };
        Some(Bounds {
            around,
            around_at_least: (around - real(before.lacks)).max(0.0),
            around_at_most: around + real(after.lacks),
            inside_at_least: (inside - first).max(0.0),
            inside_at_most: inside + last,
        })
    }

    fn gaps(&self, [from, to]: [u64; 2]) -> Option<Gaps> {
        let window = |report: Report| report.reading.window;
        let (before, after) = (window(self.before?), window(self.after?));
        let outside = from.saturating_sub(before.begin.0) + after.end.0.saturating_sub(to);
        let inside = self.first.zip(self.last).map(|(first, last)| {
            real(window(first).end.0.saturating_sub(from) + to.saturating_sub(window(last).begin.0))
        });
        Some(Gaps { outside: real(outside), inside, span: real(to.saturating_sub(from)) })
    }
}

fn grown(from: Report, to: Report) -> f64 {
    real(to.reading.value.saturating_sub(from.reading.value))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        metric::Metric,
        units::{MonotonicNs, Window},
    };

    fn report(at: u64, value: u64, lacks: u64) -> Report {
        let window = Window { begin: MonotonicNs(at), end: MonotonicNs(at + 1) };
        Report { reading: Reading { window, value }, lacks }
    }

    fn watch(scope: &str, entity: &str, metrics: &[&str]) -> Watch {
        Watch::new(Truth {
            domain: "d".into(),
            scope: scope.into(),
            entity: entity.into(),
            metrics: metrics.iter().map(|m| (*m).to_owned()).collect(),
            between_ns: Some([150, 350]),
            value: 40,
            ..Truth::default()
        })
    }

    fn claim(watch: &Watch, source: SourceKind) -> Option<[f64; 3]> {
        watch.claim(source).map(|c| [c.at_least, c.at_most, c.value])
    }

    #[test]
    fn a_count_is_framed_by_the_readings_around_and_inside() {
        let mut watch = watch("interfaces", "tap1", &["rx_packets"]);
        let def = Metric::InterfaceRxPackets.def();
        assert!(watch.wants(def, "tap1") && !watch.wants(def, "tap2"));
        for (at, value) in [(0, 1), (100, 5), (200, 20), (300, 40), (400, 45), (500, 90)] {
            watch.add(def, SourceKind::Ebpf, report(at, value, 0));
        }
        assert_eq!(claim(&watch, SourceKind::Ebpf), Some([20.0, 40.0, 40.0]));
        assert_eq!(claim(&watch, SourceKind::Libvirt), None);
    }

    #[test]
    fn a_thread_cannot_run_longer_than_time_passes() {
        let mut watch = watch("vcpus", "1", &["run_ns", "wait_ns"]);
        let (run, wait) = (Metric::VcpuRun.def(), Metric::VcpuWait.def());
        assert!(watch.wants(run, "1") && !watch.wants(run, "0") && !watch.wants(Metric::VcpuIrq.def(), "1"));
        // Busy from 120 to 380: half the time it runs, half it waits.
        for at in [0, 100, 200, 300, 400, 500u64] {
            let busy = at.clamp(120, 380) - 120;
            watch.add(run, SourceKind::Ebpf, report(at, busy / 2, 0));
            watch.add(wait, SourceKind::Ebpf, report(at, busy - busy / 2, 0));
        }
        // 260 in all, of which 50 + 51 at most before and after; 100 inside, and 51 + 50 at most beside that.
        assert_eq!(claim(&watch, SourceKind::Ebpf), Some([159.0, 200.0, 260.0]));
    }

    #[test]
    fn a_reading_that_may_be_short_widens_the_bounds() {
        let mut watch = watch("vcpus", "1", &["run_ns"]);
        for (at, value) in [(100, 0), (200, 30), (300, 60), (400, 80)] {
            watch.add(Metric::VcpuRun.def(), SourceKind::Libvirt, report(at, value, 10));
        }
        assert_eq!(claim(&watch, SourceKind::Libvirt), Some([20.0, 90.0, 80.0]));
    }

    #[test]
    fn a_reading_across_an_end_of_the_span_is_neither_in_nor_out() {
        let mut watch = watch("interfaces", "tap1", &["rx_packets"]);
        for (at, value) in [(100, 5), (149, 7), (200, 20), (400, 45)] {
            let window = Window { begin: MonotonicNs(at), end: MonotonicNs(at + 5) };
            let reading = Reading { window, value };
            watch.add(Metric::InterfaceRxPackets.def(), SourceKind::Ebpf, Report { reading, lacks: 0 });
        }
        assert_eq!(claim(&watch, SourceKind::Ebpf), Some([0.0, 40.0, 40.0]));
    }

    #[test]
    fn without_readings_on_both_sides_nothing_is_claimed() {
        let mut watch = watch("interfaces", "tap1", &["rx_packets"]);
        for (at, value) in [(200, 20), (400, 45)] {
            watch.add(Metric::InterfaceRxPackets.def(), SourceKind::Ebpf, report(at, value, 0));
        }
        assert_eq!(claim(&watch, SourceKind::Ebpf), None);
    }
}
