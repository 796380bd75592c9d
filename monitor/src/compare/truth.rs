//! Ground truth: what a guest says it did, beside what the sources say. Pure.

use crate::{
    metric::{Kind, MetricDef, Scope},
    reconcile::{Reading, real},
    units::SourceKind,
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
}

/// Readings of one source around a span of time.
#[derive(Clone, Copy, Debug, Default)]
struct Seen {
    kind: Option<Kind>,
    /// The last one before, the first and the last inside, the first after.
    before: Option<Reading>,
    first: Option<Reading>,
    last: Option<Reading>,
    after: Option<Reading>,
}

/// What a source says of a truth: growth over the span and the idle time beside it, or a gauge's last value.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Claim {
    /// Its number.
    pub value: f64,
    /// How much of it can lie outside the span.
    pub outside: f64,
}

impl Watch {
    /// Nothing seen yet.
    #[must_use]
    pub fn new(truth: Truth) -> Self {
        let seen = vec![[Seen::default(); SourceKind::COUNT]; truth.metrics.len()];
        Self { truth, seen }
    }

    /// Whether this is about a metric of an entity.
    #[must_use]
    pub fn wants(&self, def: &MetricDef, entity: &str) -> bool {
        self.truth.entity == entity
            && self.truth.scope == def.scope.key()
            && self.truth.metrics.iter().any(|m| m == def.name)
    }

    /// Adds a reading.
    pub fn add(&mut self, def: &MetricDef, source: SourceKind, reading: Reading) {
        let [from, to] = self.truth.between_ns.unwrap_or([0, u64::MAX]);
        for (name, seen) in self.truth.metrics.iter().zip(&mut self.seen) {
            if name != def.name {
                continue;
            }
            let seen = &mut seen[source as usize];
            seen.kind = Some(def.kind);
            if reading.window.end.0 <= from {
                seen.before = Some(reading);
            } else if reading.window.begin.0 >= to {
                seen.after.get_or_insert(reading);
            } else {
                seen.first.get_or_insert(reading);
                seen.last = Some(reading);
            }
        }
    }

    /// What a source says; `None` if it has not been read around the span.
    #[must_use]
    pub fn claim(&self, source: SourceKind) -> Option<Claim> {
        let mut sum = Claim { value: 0.0, outside: 0.0 };
        for seen in &self.seen {
            let claim = seen[source as usize].claim()?;
            sum.value += claim.value;
            sum.outside += claim.outside;
        }
        (!self.seen.is_empty()).then_some(sum)
    }

    /// The unit of the truth's metrics.
    #[must_use]
    pub fn def(&self) -> Option<&'static MetricDef> {
        let scope = Scope::ALL.into_iter().find(|s| s.key() == self.truth.scope)?;
        scope.metrics().iter().find(|d| Some(d.name) == self.truth.metrics.first().map(String::as_str))
    }
}

impl Seen {
    fn claim(&self) -> Option<Claim> {
        if self.kind? == Kind::Gauge {
            let last = self.after.or(self.last)?;
            return Some(Claim { value: real(last.value), outside: 0.0 });
        }
        let (begin, end) = (self.before.or(self.first)?, self.after.or(self.last)?);
        if begin.window.end >= end.window.begin {
            return None;
        }
        let grown = |a: Reading, b: Reading| real(b.value.saturating_sub(a.value));
        // Over the whole stream there is nothing outside.
        let inside = match (self.before, self.after) {
            (None, None) => grown(begin, end),
            _ => self.first.zip(self.last).map_or(0.0, |(a, b)| grown(a, b)),
        };
        let whole = grown(begin, end);
        Some(Claim { value: whole, outside: whole - inside })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        metric::Metric,
        units::{MonotonicNs, Window},
    };

    fn reading(at: u64, value: u64) -> Reading {
        Reading { window: Window { begin: MonotonicNs(at), end: MonotonicNs(at + 1) }, value }
    }

    #[test]
    fn a_step_is_framed_by_the_readings_around_it() {
        let truth = Truth {
            domain: "d".into(),
            scope: "vcpus".into(),
            entity: "1".into(),
            metrics: vec!["run_ns".into(), "wait_ns".into()],
            between_ns: Some([150, 350]),
            value: 40,
            ..Truth::default()
        };
        let mut watch = Watch::new(truth);
        let (run, wait) = (Metric::VcpuRun.def(), Metric::VcpuWait.def());
        assert!(watch.wants(run, "1") && !watch.wants(run, "0") && !watch.wants(Metric::VcpuIrq.def(), "1"));
        for (at, value) in [(0, 1), (100, 5), (200, 20), (300, 40), (400, 45), (500, 90)] {
            watch.add(run, SourceKind::Ebpf, reading(at, value));
        }
        assert_eq!(watch.claim(SourceKind::Ebpf), None);
        for at in [100, 400] {
            watch.add(wait, SourceKind::Ebpf, reading(at, at));
        }
        assert_eq!(watch.claim(SourceKind::Ebpf), Some(Claim { value: 340.0, outside: 320.0 }));
        assert_eq!(watch.claim(SourceKind::Libvirt), None);
    }
}
