//! What a comparison comes to: agree, explained by named causes, or disagree, and what it looks like then.

use crate::{
    compare::{
        amount::{amount, percent, signed, time},
        pair::{HEADER_BYTES, LAGS_NS, Pair, explained_by},
        report::{Explained, Verdict},
    },
    metric::Kind,
    reconcile::{
        Cause,
        fit::Fit,
        real,
        shape::{Shape, shape},
    },
    units::Unit,
};

/// Of times, so much of the total may stay unexplained: clocks differ by that.
const TOLERATED_SHARE: f64 = 0.001;
/// A hypothesis beside the known causes has to leave less than this share.
const FITS: f64 = 0.1;

/// Fewer readings than these show no shape.
const ENOUGH: u64 = 30;
/// A shape has to be larger than this share of what the reference moved between readings.
const CERTAIN: f64 = 0.8;

/// The result.
#[derive(Clone, Debug)]
pub(super) struct Judgement {
    pub(super) verdict: Verdict,
    pub(super) explained: Vec<Explained>,
    pub(super) unexplained: f64,
    /// What a difference of which size would have been noticed from; absent if nothing would.
    pub(super) slack: Option<f64>,
    pub(super) reason: String,
    pub(super) looks_like: Option<&'static str>,
}

/// What is known of the entity that tells one verdict from another.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Known {
    /// The interface is one of which libvirt shows the host's view (macvtap).
    pub(super) host_view: bool,
}

pub(super) fn judge(pair: &Pair, known: Known) -> Judgement {
    if pair.def.kind == Kind::Gauge {
        return judge_gauge(pair);
    }
    let left = pair.residuals();
    let first = left.known.first().copied().unwrap_or(0);
    let last = left.known.last().copied().unwrap_or(0);
    let mut explained: Vec<Explained> = Vec::new();
    for (index, cause) in pair.causes.iter().enumerate() {
        let taken = explained_by(&left.known, index);
        if taken > 0.0 {
            explained.push(Explained { cause: cause.name(), amount: taken });
        }
    }
    // Where the source keeps the figure, the two are one.
    let kept = pair.relation == Some(Cause::NotKept) && pair.other_total > 0.0;
    if kept {
        explained.clear();
    }
    let judgement = |verdict, reason| Judgement {
        verdict,
        explained: explained.clone(),
        unexplained: real_of(last),
        slack: left.slack.map(real_of),
        reason,
        looks_like: None,
    };
    if pair.ticks == 0 {
        return judgement(Verdict::NotComparable, "the sources were not both read at least twice".to_owned());
    }
    if let Some(relation) = pair.relation.filter(|_| !kept) {
        if pair.other_total == 0.0 && pair.reference_total == 0.0 {
            return judgement(Verdict::Agree, "nothing happened".to_owned());
        }
        let difference = pair.other_total - pair.reference_total;
        if difference == 0.0 {
            let reason = "equal: what can make these two figures differ does not here";
            return judgement(Verdict::Agree, reason.to_owned());
        }
        let explained = vec![Explained { cause: relation.name(), amount: difference }];
        let fine = real_of(last) <= tolerated(pair);
        let verdict = if fine { Verdict::Explained } else { Verdict::Disagree };
        return Judgement { explained, ..judgement(verdict, relation.explanation().to_owned()) };
    }
    let tolerated = tolerated(pair);
    if real_of(last) <= tolerated {
        // A queue that fills up and stays full looks like a step, of the size that is known.
        let queued = explained.iter().any(|e| e.cause == Cause::Backlog.name());
        if !queued && let Some(found) = hidden(pair, real_of(left.slack.unwrap_or(0))) {
            return Judgement { explained, ..found };
        }
        return no_contradiction(pair, kept || real_of(first) <= tolerated, judgement);
    }
    if let Some(headers) = left.headers
        && let Some((_, bytes)) = smallest(&headers, &HEADER_BYTES, last)
    {
        let amount = pair.other_total - pair.reference_total;
        explained.push(Explained { cause: Cause::EthHeader.name(), amount });
        let reason = format!("{bytes:+} bytes per packet: {}", Cause::EthHeader.explanation());
        let found = Judgement { explained, unexplained: 0.0, ..judgement_of(Verdict::Explained, reason) };
        return Judgement { slack: left.slack.map(real_of), ..found };
    }
    if left.swapped.is_some_and(|swapped| fits(swapped, last)) {
        let reason = Cause::Direction.explanation().to_owned();
        let found = judgement(if known.host_view { Verdict::Explained } else { Verdict::Disagree }, reason);
        let unexplained = if known.host_view { 0.0 } else { found.unexplained };
        return Judgement { looks_like: Some("direction"), unexplained, ..found };
    }
    let found = judgement(Verdict::Disagree, String::new());
    let (looks_like, reason) = name_it(pair, &left.late, last);
    Judgement { looks_like, reason, ..found }
}

fn judgement_of(verdict: Verdict, reason: String) -> Judgement {
    Judgement { verdict, explained: Vec::new(), unexplained: 0.0, slack: None, reason, looks_like: None }
}

/// No reading contradicts; but does that prove anything?
fn no_contradiction(
    pair: &Pair,
    without_causes: bool,
    judgement: impl Fn(Verdict, String) -> Judgement,
) -> Judgement {
    let total = pair.reference_total.max(pair.other_total);
    let slack = judgement(Verdict::Agree, String::new()).slack;
    let noticed = slack.is_some_and(|slack| slack <= total || total == 0.0);
    let unit = pair.def.unit;
    let one_sided = slack.is_none() && !without_causes;
    if !noticed && !one_sided && total > 0.0 {
        let reason = match slack {
            Some(slack) => format!(
                "too little to tell: {} in all, and only a difference of more than {} would be noticed",
                amount(total, unit),
                amount(slack, unit)
            ),
            None => "too few readings of the reference around those of the other".to_owned(),
        };
        return judgement(Verdict::NotComparable, reason);
    }
    if without_causes {
        let reason = match slack {
            Some(slack) if slack > 0.0 => {
                format!("a difference of more than {} would have been noticed", amount(slack, unit))
            }
            _ => "exactly equal".to_owned(),
        };
        judgement(Verdict::Agree, reason)
    } else {
        let first = judgement(Verdict::Explained, String::new()).explained;
        let named: Vec<&str> = Cause::ALL
            .into_iter()
            .filter(|c| first.iter().any(|e| e.cause == c.name()))
            .map(Cause::explanation)
            .collect();
        judgement(Verdict::Explained, named.join("; "))
    }
}

/// A difference that each reading's bounds leave room for, but that has a clear shape over time.
fn hidden(pair: &Pair, slack: f64) -> Option<Judgement> {
    let one_sided = pair.causes.iter().any(|c| {
        matches!(c, Cause::Qcow2Metadata | Cause::FlushElided | Cause::Throttle | Cause::CacheAbsorbed)
    });
    let spans = pair.history.pairs();
    let shape = shape(&spans).filter(|_| !one_sided)?;
    let effect = match shape {
        Shape::Factor(factor) => (factor * pair.reference_total).abs(),
        Shape::Step { amount, .. } => amount.abs(),
    };
    // Ticks and runs in progress move a difference by as much as they allow, and where the reference was between its
    // readings is a guess.
    let allowed = if pair.causes.is_empty() { 0.0 } else { slack };
    let guessed = CERTAIN * real(pair.widths.percentile(95));
    let least = tolerated(pair).max(0.001 * pair.reference_total).max(allowed).max(guessed);
    (pair.ticks >= ENOUGH && effect > least && effect > 1.5).then(|| {
        let (looks_like, reason) = describe(pair, shape);
        Judgement {
            unexplained: effect,
            looks_like: Some(looks_like),
            slack: Some(slack),
            ..judgement_of(Verdict::Disagree, reason)
        }
    })
}

/// What a contradiction looks like.
fn name_it(pair: &Pair, late: &[i128; LAGS_NS.len()], left: i128) -> (Option<&'static str>, String) {
    if pair.other_total == 0.0 && pair.reference_total > 0.0 {
        return (Some("constant"), "it never changed while the reference did".to_owned());
    }
    let (late, fit) = (late_by(late, left), pair.points.fit());
    match (late, fit) {
        (Some((_, left)), Some((fit, left_by_fit))) if left_by_fit <= left => return describe_fit(pair, fit),
        (None, Some((fit, _))) => return describe_fit(pair, fit),
        (None, None) => {}
        (Some(((least, most), _)), _) => {
            let about = if least == most {
                format!("about {}", time(real(least)))
            } else {
                format!("{} to {}", time(real(least)), time(real(most)))
            };
            return (Some("late"), format!("it fits if it shows what was true {about} before it was read"));
        }
    }
    match shape(&pair.history.pairs()) {
        Some(shape) => {
            let (name, text) = describe(pair, shape);
            (Some(name), text)
        }
        None => (None, "no known cause explains it".to_owned()),
    }
}

/// How late the other source seems to be, nanoseconds: the longest run of lags that fit best; and which share of the
/// contradiction that leaves.
fn late_by(late: &[i128; LAGS_NS.len()], before: i128) -> Option<((u64, u64), f64)> {
    let least = late.iter().min().copied().filter(|least| fits(*least, before))?;
    let mut runs: Vec<(u64, u64, usize)> = Vec::new();
    let mut unbroken = false;
    for (lag, left) in LAGS_NS.into_iter().zip(late) {
        match runs.last_mut() {
            Some(run) if unbroken && *left == least => (run.1, run.2) = (lag, run.2 + 1),
            _ if *left == least => runs.push((lag, lag, 1)),
            _ => {}
        }
        unbroken = *left == least;
    }
    let share = real_of(least) / real_of(before);
    runs.iter().max_by_key(|run| run.2).map(|run| ((run.0, run.1), share))
}

fn describe_fit(pair: &Pair, fit: Fit) -> (Option<&'static str>, String) {
    match fit {
        Fit::Factor(factor) => (Some("factor"), factor_text(factor)),
        Fit::Step { at_ns, amount } => {
            let after = at_ns.saturating_sub(pair.history.begin_ns().unwrap_or(at_ns));
            (Some("step"), step_text(amount, real(after), pair.def.unit))
        }
    }
}

fn factor_text(factor: f64) -> String {
    format!("it counts {} all the time", signed(percent(factor * 100.0)))
}

fn step_text(by: f64, after_ns: f64, unit: Unit) -> String {
    let what = if by < 0.0 { "lost" } else { "counted too much" };
    format!("{} were {what} about {} after the first reading", amount(by.abs(), unit), time(after_ns))
}

fn describe(pair: &Pair, shape: Shape) -> (&'static str, String) {
    match shape {
        Shape::Factor(factor) => ("factor", factor_text(factor)),
        Shape::Step { span, amount } => {
            let after = real(pair.history.span_ns()) * real(u64::try_from(span).unwrap_or(0));
            ("step", step_text(amount, after, pair.def.unit))
        }
    }
}

/// The hypothesis that leaves least, if it fits.
fn smallest<T: Copy>(left: &[i128], hypotheses: &[T], before: i128) -> Option<(i128, T)> {
    let (left, of) = left.iter().zip(hypotheses).min_by_key(|(left, _)| **left)?;
    fits(*left, before).then_some((*left, *of))
}

fn fits(left: i128, before: i128) -> bool {
    real_of(left) <= FITS * real_of(before)
}

fn real_of(number: i128) -> f64 {
    crate::reconcile::real_difference(number)
}

/// Counts and bytes have to be exact; times may differ by a little.
fn tolerated(pair: &Pair) -> f64 {
    if pair.def.unit == Unit::Nanoseconds {
        TOLERATED_SHARE * pair.reference_total.max(pair.other_total)
    } else {
        0.0
    }
}

/// A gauge may move between readings: it disagrees if it is mostly beyond its neighbours.
fn judge_gauge(pair: &Pair) -> Judgement {
    let beyond = real(pair.beyond.percentile(50));
    let mean = pair.reference_total / real(pair.ticks.max(1));
    let unit = pair.def.unit;
    if pair.ticks == 0 {
        return judgement_of(
            Verdict::NotComparable,
            "the sources were not both read around the same time".to_owned(),
        );
    }
    if beyond <= TOLERATED_SHARE * mean {
        let most = amount(real(pair.beyond.largest()), unit);
        return judgement_of(Verdict::Agree, format!("at most {most} beyond the readings around it"));
    }
    let reason = format!("half of its readings are {} or more off", amount(beyond, unit));
    Judgement { unexplained: beyond, ..judgement_of(Verdict::Disagree, reason) }
}
