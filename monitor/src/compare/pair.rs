//! One number from two sources: every reading of the other source is held against the reference. Pure.
//!
//! Several hypotheses are followed at once, each with the bounds it puts on the constant between the counters:
//! nothing differs; the first known cause, the first two, …; and, for what no cause explains, that the other source
//! is late, is swapped with its counterpart, or leaves a fixed amount per packet out.

use std::collections::VecDeque;

use crate::{
    compare::stats::{Distribution, History},
    metric::{Kind, MetricDef},
    reconcile::{
        Allowance, Bracket, Cause, Limit, NO_LIMIT, Offset, Reading, Trail,
        causes::{self, Moment, Subject},
        fit::{Point, Points},
        real, real_difference,
    },
    units::{SourceKind, Window},
};

/// How late the other source may be, nanoseconds: what is tried.
pub const LAGS_NS: [u64; 8] = [
    500_000_000,
    1_000_000_000,
    2_000_000_000,
    3_000_000_000,
    4_000_000_000,
    5_000_000_000,
    6_000_000_000,
    8_000_000_000,
];
/// It may be so much less or more late at each reading: what is late is mostly a copy that is renewed now and then.
const LAG_MARGIN_NS: u64 = 500_000_000;
/// Bytes per packet that may be left out or added: Ethernet header, with VLAN tag, VLAN tag alone.
pub const HEADER_BYTES: [i128; 6] = [-14, 14, -18, 18, -4, 4];
/// Readings that may wait for the reference's next: more come only if the reference is gone.
const PENDING: usize = 64;

/// The trails of the reference that hypotheses need, beside its own.
#[derive(Clone, Copy, Debug, Default)]
pub struct Beside<'a> {
    /// Of the counter in the other direction.
    pub swapped: Option<&'a Trail>,
    /// Of the packets, for a counter of bytes.
    pub packets: Option<&'a Trail>,
}

/// Two sources of a metric, or two metrics that a cause relates.
#[derive(Clone, Debug)]
pub struct Pair {
    /// The reference's metric.
    pub reference_def: &'static MetricDef,
    /// The other's metric; the same one, unless a cause relates two.
    pub def: &'static MetricDef,
    /// Who is the reference.
    pub reference: SourceKind,
    /// Who is compared.
    pub other: SourceKind,
    /// Known causes that can matter here.
    pub causes: Vec<Cause>,
    /// Why the two metrics differ by nature.
    pub relation: Option<Cause>,
    /// Readings compared.
    pub ticks: u64,
    /// Growth of the reference over all ticks, on a line between its readings.
    pub reference_total: f64,
    /// Growth of the other over all ticks.
    pub other_total: f64,
    /// |difference| per tick.
    pub differences: Distribution,
    /// |difference| per tick over the reference's growth in it, in millionths.
    pub relative: Distribution,
    /// Both over time.
    pub history: History<2>,
    /// Between which numbers the reference was at each reading: how far apart these were.
    pub widths: Distribution,
    /// Position of the metric in the other direction, if there is one.
    pub swapped_index: Option<usize>,
    /// Position of the packets that go with these bytes.
    pub packets_index: Option<usize>,
    /// For a gauge: how far beyond the reference's neighbouring readings.
    pub beyond: Distribution,
    /// Readings by which a contradiction is explained, since a counter last started.
    pub points: Points,
    limit: Option<Limit>,
    pending: VecDeque<Pending>,
    before: Option<Before>,
    tracks: Tracks,
    past: Residuals,
}

#[derive(Clone, Debug)]
struct Pending {
    reading: Reading,
    /// By the first cause, the first two, ….
    allowed: Vec<Allowance>,
    /// Beside all of them, if the other is late or swapped.
    lately: Allowance,
}

#[derive(Clone, Copy, Debug)]
struct Before {
    middle_ns: u64,
    reference: f64,
    other: u64,
}

#[derive(Clone, Debug, Default)]
struct Tracks {
    known: Vec<Offset>,
    late: [Offset; LAGS_NS.len()],
    swapped: Offset,
    headers: [Offset; HEADER_BYTES.len()],
}

/// What each hypothesis cannot explain, summed over the times between restarts of a counter.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Residuals {
    /// With no cause, with the first, with the first two, ….
    pub known: Vec<i128>,
    /// With the other source late by [`LAGS_NS`].
    pub late: [i128; LAGS_NS.len()],
    /// With directions swapped; `None` if there is no counterpart.
    pub swapped: Option<i128>,
    /// With so many [`HEADER_BYTES`] per packet; `None` if packets are not known.
    pub headers: Option<[i128; HEADER_BYTES.len()]>,
    /// What could have gone unnoticed; `None`: anything.
    pub slack: Option<i128>,
}

impl Pair {
    /// Nothing compared yet.
    #[must_use]
    pub fn new(
        (reference_def, def): (&'static MetricDef, &'static MetricDef),
        (reference, other): (SourceKind, SourceKind),
        subject: &Subject<'_>,
        relation: Option<Cause>,
    ) -> Self {
        let mut causes: Vec<Cause> = Cause::ALL.into_iter().filter(|c| c.applies(subject)).collect();
        causes.extend(relation);
        let mut pair = Self {
            reference_def,
            def,
            reference,
            other,
            causes,
            relation,
            ticks: 0,
            reference_total: 0.0,
            other_total: 0.0,
            differences: Distribution::default(),
            relative: Distribution::default(),
            history: History::default(),
            widths: Distribution::default(),
            swapped_index: None,
            packets_index: None,
            beyond: Distribution::default(),
            points: Points::default(),
            limit: limit(reference_def, reference, subject.cpus),
            pending: VecDeque::new(),
            before: None,
            tracks: Tracks::default(),
            past: Residuals::default(),
        };
        pair.restart();
        pair
    }

    /// Adds a reading of the other source.
    pub fn add(&mut self, reading: Reading, subject: &Subject<'_>, moment: &Moment<'_>) {
        let mut sum = Allowance::NOTHING;
        let mut allowed = Vec::with_capacity(self.causes.len());
        for cause in &self.causes {
            sum = sum.and(cause.allows(subject, moment));
            allowed.push(sum);
        }
        if self.pending.len() == PENDING {
            self.pending.pop_front();
        }
        let lately = causes::behind_by(moment.lately_backlog_packets, self.def.unit);
        self.pending.push_back(Pending { reading, allowed, lately });
    }

    /// Judges what waits, as far as the reference has been read since.
    pub fn settle(&mut self, trail: &Trail, beside: Beside<'_>) {
        while self.pending.front().is_some_and(|p| trail.covers(p.reading.window)) {
            if let Some(pending) = self.pending.pop_front() {
                self.judge(&pending, trail, beside);
            }
        }
    }

    /// Judges what is left, though no later reading of the reference came.
    pub fn finish(&mut self, trail: &Trail, beside: Beside<'_>) {
        while let Some(pending) = self.pending.pop_front() {
            self.judge(&pending, trail, beside);
        }
    }

    /// A counter started anew: the constant between the two is another one from here on.
    pub fn restart(&mut self) {
        let ended = self.residuals();
        self.past = ended;
        self.tracks = Tracks { known: vec![Offset::default(); self.causes.len() + 1], ..Tracks::default() };
        self.points.clear();
        self.pending.clear();
        self.before = None;
    }

    fn judge(&mut self, pending: &Pending, trail: &Trail, beside: Beside<'_>) {
        let window = pending.reading.window;
        if self.def.kind == Kind::Gauge {
            return self.judge_gauge(pending.reading, trail);
        }
        let Some(bracket) = trail.bracket(window, self.limit) else { return };
        if bracket.high < NO_LIMIT {
            self.widths.add(u64::try_from(bracket.high - bracket.low).unwrap_or(u64::MAX));
        }
        let other = i128::from(pending.reading.value);
        let everything = pending.allowed.last().copied().unwrap_or(Allowance::NOTHING);
        let loosely = everything.and(pending.lately);
        let allowed = std::iter::once(&Allowance::NOTHING).chain(&pending.allowed);
        for (track, allowed) in self.tracks.known.iter_mut().zip(allowed) {
            track.add(other, bracket, *allowed);
        }
        if bracket.high < NO_LIMIT && everything.low > -NO_LIMIT && everything.high < NO_LIMIT {
            let (low, high) = (bracket.low + everything.low, bracket.high + everything.high);
            let point = Point { at_ns: middle(window), other: real_difference(other), ..Point::default() };
            self.points.add(Point { low: real_difference(low), high: real_difference(high), ..point });
        }
        for (track, lag) in self.tracks.late.iter_mut().zip(LAGS_NS) {
            let later = trail.bracket(earlier(window, lag.saturating_sub(LAG_MARGIN_NS)), self.limit);
            let sooner = trail.bracket(earlier(window, lag + LAG_MARGIN_NS), self.limit);
            if let (Some(sooner), Some(later)) = (sooner, later) {
                track.add(other, Bracket { low: sooner.low, high: later.high }, loosely);
            }
        }
        if let Some(bracket) = beside.swapped.and_then(|t| t.bracket(window, None)) {
            self.tracks.swapped.add(other, bracket, loosely);
        }
        if let Some(packets) = beside.packets.and_then(|t| t.bracket(window, None)) {
            for (track, bytes) in self.tracks.headers.iter_mut().zip(HEADER_BYTES) {
                track.add(other, with_headers(bracket, packets, bytes), everything);
            }
        }
        self.count(pending.reading, trail);
    }

    fn count(&mut self, reading: Reading, trail: &Trail) {
        let Some(reference) = trail.interpolate(reading.window) else { return };
        let middle_ns = middle(reading.window);
        let now = Before { middle_ns, reference, other: reading.value };
        let Some(before) = self.before.replace(now) else { return };
        let (grown, other) = (reference - before.reference, real(reading.value.saturating_sub(before.other)));
        let difference = (other - grown).abs();
        self.ticks += 1;
        self.reference_total += grown;
        self.other_total += other;
        self.differences.add(whole(difference));
        if grown > 0.0 {
            self.relative.add(whole(difference / grown * 1e6));
        }
        self.history.add((before.middle_ns, middle_ns), [grown, other]);
    }

    fn judge_gauge(&mut self, reading: Reading, trail: &Trail) {
        let Some(reference) = trail.interpolate(reading.window) else { return };
        let Some(bracket) = trail.bracket(reading.window, None) else { return };
        let high = if bracket.high == NO_LIMIT { bracket.low } else { bracket.high };
        let (low, high) = (bracket.low.min(high), bracket.low.max(high));
        let other = i128::from(reading.value);
        let beyond = (low - other).max(other - high).max(0);
        self.ticks += 1;
        self.reference_total += reference;
        self.other_total += real(reading.value);
        self.beyond.add(u64::try_from(beyond).unwrap_or(u64::MAX));
        let difference = (real(reading.value) - reference).abs();
        self.differences.add(whole(difference));
        if reference > 0.0 {
            self.relative.add(whole(difference / reference * 1e6));
        }
    }

    /// What each hypothesis leaves.
    #[must_use]
    pub fn residuals(&self) -> Residuals {
        let (now, past) = (&self.tracks, &self.past);
        let mut all = past.clone();
        all.known.resize(now.known.len().max(past.known.len()), 0);
        for (sum, track) in all.known.iter_mut().zip(&now.known) {
            *sum += track.residual();
        }
        for (sum, track) in all.late.iter_mut().zip(&now.late) {
            *sum += track.residual();
        }
        if now.swapped != Offset::default() {
            *all.swapped.get_or_insert(0) += now.swapped.residual();
        }
        if now.headers[0] != Offset::default() {
            let sums = all.headers.get_or_insert_default();
            for (sum, track) in sums.iter_mut().zip(&now.headers) {
                *sum += track.residual();
            }
        }
        let slack = now.known.last().and_then(Offset::slack);
        all.slack = match (past.slack, slack) {
            (Some(a), Some(b)) => Some(a + b),
            (a, b) => a.or(b),
        };
        all
    }
}

/// How fast the reference can grow: threads do not run longer than time passes.
fn limit(def: &MetricDef, source: SourceKind, cpus: u64) -> Option<Limit> {
    use crate::metric::Scope;
    let running = matches!(def.name, "time_ns" | "user_ns" | "system_ns") || def.name.ends_with("run_ns");
    let per_ns = match def.scope {
        Scope::Vcpu if matches!(def.name, "run_ns" | "wait_ns" | "sleep_ns" | "irq_ns") => 1,
        Scope::Cpu if running && cpus > 0 => cpus,
        _ => return None,
    };
    // The kernel brings its figures up to date at ticks, or, of waits, when they end.
    let jump = match (source, def.name) {
        (SourceKind::Ebpf, _) => 0,
        (_, "wait_ns") => return None,
        _ => 2 * crate::reconcile::causes::SCHEDULER_TICK_NS * per_ns,
    };
    Some(Limit { per_ns, jump })
}

fn with_headers(bytes: Bracket, packets: Bracket, per_packet: i128) -> Bracket {
    let (a, b) = (packets.low * per_packet, packets.high.min(NO_LIMIT / 64) * per_packet);
    let high =
        if bytes.high == NO_LIMIT || packets.high == NO_LIMIT { NO_LIMIT } else { bytes.high + a.max(b) };
    Bracket { low: bytes.low + a.min(b), high }
}

fn earlier(window: Window, by_ns: u64) -> Window {
    let back = |at: crate::units::MonotonicNs| crate::units::MonotonicNs(at.0.saturating_sub(by_ns));
    Window { begin: back(window.begin), end: back(window.end) }
}

fn middle(window: Window) -> u64 {
    window.begin.0 + window.end.since(window.begin) / 2
}

/// A positive number without its fraction.
#[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "the cast saturates")]
fn whole(number: f64) -> u64 {
    number.round() as u64
}

/// The part of a difference that a cause took off.
#[must_use]
pub fn explained_by(residuals: &[i128], cause: usize) -> f64 {
    real_difference(residuals[cause] - residuals[cause + 1])
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        metric::{Metric, Scope},
        units::MonotonicNs,
    };

    const SECOND: u64 = 1_000_000_000;

    fn subject(def: &'static MetricDef) -> Subject<'static> {
        Subject {
            def,
            reference: SourceKind::Ebpf,
            other: SourceKind::Libvirt,
            image_format: None,
            image_cache: None,
            clock_tick_ns: 10_000_000,
            cpus: 2,
        }
    }

    fn reading(at: u64, value: u64) -> Reading {
        Reading { window: Window { begin: MonotonicNs(at), end: MonotonicNs(at + 100_000) }, value }
    }

    /// Traffic with a pause now and then: what a counter shows at a time.
    fn truth(at: u64) -> u64 {
        let second = at / SECOND;
        (0..second).map(|s| if s % 7 == 3 { 0 } else { 1_000 + s % 5 * 100 }).sum()
    }

    /// 60 s of both counters; `other` makes of time and truth what the other source says.
    fn run(def: &'static MetricDef, other: impl Fn(u64) -> u64) -> Pair {
        let to = subject(def);
        let mut pair = Pair::new((def, def), (to.reference, to.other), &to, None);
        let mut trail = Trail::default();
        for second in 1..60 {
            let at = second * SECOND;
            trail.push(reading(at, truth(at)));
            pair.settle(&trail, Beside::default());
            let later = at + SECOND / 2;
            pair.add(reading(later, other(later)), &to, &Moment::default());
            pair.settle(&trail, Beside::default());
        }
        pair
    }

    #[test]
    fn sources_that_are_both_right_leave_nothing() {
        let pair = run(Metric::InterfaceTxBytes.def(), |at| 5_000 + truth(at));
        assert_eq!(pair.residuals().known, [0]);
        assert_eq!(pair.ticks, 57);
        assert!(pair.residuals().slack.unwrap() < 2_000, "{:?}", pair.residuals());
    }

    #[test]
    fn one_per_cent_is_noticed() {
        let pair = run(Metric::InterfaceTxBytes.def(), |at| truth(at) * 101 / 100);
        let missing = pair.residuals().known[0];
        assert!(missing > 300 && missing < 700, "{missing}");
    }

    #[test]
    fn a_late_source_fits_when_it_is_taken_as_late() {
        let pair = run(Metric::InterfaceTxBytes.def(), |at| truth(at.saturating_sub(3 * SECOND)));
        let left = pair.residuals();
        assert!(left.known[0] > 500 && left.late[3] == 0, "{left:?}");
    }

    #[test]
    fn a_restart_is_no_difference() {
        let def = Metric::InterfaceTxBytes.def();
        let to = subject(def);
        let mut pair = run(def, truth);
        pair.restart();
        let mut trail = Trail::default();
        for (at, value) in [(100, 0), (101, 50), (102, 90)] {
            trail.push(reading(at * SECOND, value));
            pair.settle(&trail, Beside::default());
            pair.add(reading(at * SECOND + 500_000, value), &to, &Moment::default());
        }
        pair.finish(&trail, Beside::default());
        assert_eq!(pair.residuals().known, [0]);
    }

    #[test]
    fn a_gauge_has_to_be_between_its_neighbours() {
        let def = Scope::Memory.metrics().iter().find(|d| d.name == "rss_bytes").unwrap();
        let to = Subject { reference: SourceKind::Procfs, ..subject(def) };
        let mut pair = Pair::new((def, def), (SourceKind::Procfs, SourceKind::Libvirt), &to, None);
        let mut trail = Trail::default();
        for (at, value) in [(1, 100), (2, 200), (3, 150)] {
            trail.push(reading(at * SECOND, value));
            pair.settle(&trail, Beside::default());
            pair.add(
                reading(at * SECOND + SECOND / 2, if at == 2 { 250 } else { 150 }),
                &to,
                &Moment::default(),
            );
        }
        pair.finish(&trail, Beside::default());
        assert_eq!((pair.ticks, pair.beyond.largest(), pair.beyond.percentile(50)), (3, 50, 0));
    }
}
