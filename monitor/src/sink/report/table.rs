//! The parts of a report as cells and sentences, the same for every format that people read.

use crate::{
    compare::{
        amount::{amount, grouped, percent, signed, time},
        report::{
            ClaimReport, ComparisonReport, DomainReport, Finding, MetricReport, OwnReport, Report,
            TruthReport, Verdict,
        },
    },
    reconcile::real,
    units::{SourceKind, Unit},
};

/// Titles of [`comparison_rows`].
pub(super) const COMPARISON_TITLES: [&str; 8] =
    ["metric", "reference", "other", "difference", "noticed from", PER_TICK, "unexplained", "verdict"];
/// The title of the column that is the least needed.
pub(super) const PER_TICK: &str = "per tick p50 / p99";
/// What the columns mean, for whoever reads the report for the first time.
pub(super) const COLUMNS: &str = "Two sources are never read at the same moment, so their figures always differ. `agree`: all readings can be right at \
     once; a difference larger than `noticed from` would have shown. `explained`: they differ, and named causes account for all \
     of it. `disagree`: something is left that nothing explains.";
/// Titles of [`answer_rows`].
pub(super) const ANSWER_TITLES: [&str; 7] =
    ["what", "metric", "in all (mean of a gauge)", "per second", "source", "others", "why this source"];
/// Titles of [`truth_rows`].
pub(super) const TRUTH_TITLES: [&str; 5] = ["quantity", "truth", "eBPF", "procfs", "libvirt"];

/// One line of the table of comparisons.
pub(super) struct Row<'a> {
    /// What it is about: a vCPU, a disk, ….
    pub(super) of: &'a str,
    pub(super) cells: [String; 8],
    pub(super) verdict: Verdict,
    pub(super) reason: &'a str,
}

/// A domain's comparisons.
pub(super) fn comparison_rows(domain: &DomainReport) -> Vec<Row<'_>> {
    let mut rows = Vec::new();
    for entity in &domain.entities {
        for metric in &entity.metrics {
            let shown = metric.comparisons.iter().filter(|c| !is_nothing(c));
            rows.extend(shown.map(|c| comparison_row(&entity.label, metric, c)));
        }
    }
    rows
}

fn comparison_row<'a>(of: &'a str, metric: &MetricReport, found: &'a ComparisonReport) -> Row<'a> {
    let unit = metric.of;
    let difference = amount(found.difference, unit);
    let share = found.difference_pct.filter(|p| *p != 0.0 && difference != amount(0.0, unit));
    let share = share.map_or(String::new(), |p| format!(" ({})", signed(percent(p))));
    let causes: Vec<&str> = found.explained.iter().map(|e| e.cause).collect();
    let verdict = match found.verdict {
        Verdict::Explained if !causes.is_empty() => format!("explained: {}", causes.join(", ")),
        Verdict::Disagree => match found.looks_like {
            Some(looks) => format!("DISAGREE: {looks}"),
            None => "DISAGREE".to_owned(),
        },
        verdict => verdict.name().to_owned(),
    };
    let reference = match found.reference_metric {
        Some(name) => format!("{} {name} {}", found.reference, amount(found.reference_total, unit)),
        None => format!("{} {}", found.reference, amount(found.reference_total, unit)),
    };
    let nothing = found.ticks == 0;
    let or_dash = |text: String| if nothing { "-".to_owned() } else { text };
    let unexplained = if found.verdict == Verdict::NotComparable {
        "-".to_owned()
    } else {
        format!("{}{}", amount(found.unexplained, unit), pct_beside(found.unexplained, found.unexplained_pct))
    };
    let noticed = match found.noticed_from {
        Some(0.0) => "any".to_owned(),
        Some(from) => amount(from, unit),
        None => "-".to_owned(),
    };
    let per_tick = &found.per_tick;
    let cells = [
        metric.metric.to_owned(),
        or_dash(reference),
        format!("{} {}", found.other, amount(found.other_total, unit)),
        or_dash(format!("{}{share}", signed(difference))),
        or_dash(noticed),
        or_dash(format!("{} / {}", amount(real(per_tick.p50), unit), amount(real(per_tick.p99), unit))),
        unexplained,
        verdict,
    ];
    Row { of, cells, verdict: found.verdict, reason: &found.reason }
}

/// One answer per figure of a domain.
pub(super) fn answer_rows(domain: &DomainReport) -> Vec<[String; 7]> {
    let figures = domain.entities.iter().flat_map(|e| e.metrics.iter().map(|m| (e.label.as_str(), m)));
    figures.map(|(label, metric)| answer_row(label, metric)).collect()
}

fn answer_row(label: &str, metric: &MetricReport) -> [String; 7] {
    let answer = &metric.answer;
    let rate = |value: f64| match metric.of {
        Unit::Nanoseconds => percent(value / 1e7),
        Unit::Bytes => grouped(value),
        Unit::Count if value < 1_000.0 => format!("{value:.3}"),
        Unit::Count => grouped(value),
    };
    let per_s = answer.per_s.map_or("-".to_owned(), |[low, _, high]| match (rate(low), rate(high)) {
        (low, high) if low == high => low,
        (low, high) => format!("{low} – {high}"),
    });
    let others = match answer.agreement {
        "agree" => "agree",
        "disagree" => "DISAGREE",
        _ => "none",
    };
    [
        label.to_owned(),
        metric.metric.to_owned(),
        amount(answer.total, metric.of),
        per_s,
        answer.source.to_owned(),
        others.to_owned(),
        answer.why.clone(),
    ]
}

fn pct_beside(amount: f64, pct: f64) -> String {
    if amount > 0.0 { format!(" ({})", percent(pct)) } else { String::new() }
}

/// A domain's truths: cells, and why sources differ from them.
pub(super) fn truth_rows(domain: &DomainReport) -> Vec<([String; 5], String)> {
    domain.truth.iter().map(truth_row).collect()
}

fn truth_row(truth: &TruthReport) -> ([String; 5], String) {
    let claim = |source: SourceKind| {
        let claim = truth.claims.iter().find(|c| c.source == source.name());
        claim.map_or("-".to_owned(), |claim| says(claim, truth))
    };
    let cells = [
        truth.quantity.clone(),
        amount(truth.truth, truth.of),
        claim(SourceKind::Ebpf),
        claim(SourceKind::Procfs),
        claim(SourceKind::Libvirt),
    ];
    let mut reasons: Vec<String> = Vec::new();
    for claim in truth.claims.iter().filter(|c| c.verdict != Verdict::Agree) {
        reasons.push(format!("{}: {}", claim.source, claim.reason));
    }
    if truth.claims.iter().any(|c| c.value != truth.truth) && !truth.note.is_empty() {
        reasons.push(truth.note.clone());
    }
    (cells, reasons.join(". "))
}

fn says(claim: &ClaimReport, truth: &TruthReport) -> String {
    let value = |v: f64| amount(v, truth.of);
    let says = if claim.at_least < claim.at_most {
        format!("{} – {}", value(claim.at_least), value(claim.at_most))
    } else {
        value(claim.value)
    };
    let off = match claim.difference_pct {
        Some(pct) => signed(percent(pct)),
        None => signed(value(claim.difference)),
    };
    match claim.verdict {
        Verdict::Agree if (claim.value - truth.truth).abs() < 0.5 => format!("{} (=)", value(claim.value)),
        Verdict::Agree => format!("{says} (fits)"),
        Verdict::Explained => format!("{says} ({off}: {})", claim.causes.join(", ")),
        Verdict::Disagree => format!("{says} ({off}: WRONG)"),
        Verdict::NotComparable => format!("{says} (?)"),
    }
}

/// Nothing happened, and both say so.
fn is_nothing(of: &ComparisonReport) -> bool {
    of.verdict == Verdict::Agree && of.reference_total == 0.0 && of.other_total == 0.0
}

/// What the table of comparisons leaves out.
pub(super) fn rest(domain: &DomainReport) -> String {
    let metrics = || domain.entities.iter().flat_map(|e| &e.metrics);
    let nothing = metrics().flat_map(|m| &m.comparisons).filter(|c| is_nothing(c)).count();
    let only = metrics().filter(|m| m.answer.agreement == "only_source" && m.comparisons.is_empty()).count();
    format!("Not shown: {nothing} comparisons that agree on 0; {only} figures that have one source only.")
}

/// Findings of the same cause together, at most so many.
pub(super) fn findings(report: &Report, most: usize) -> impl Iterator<Item = &[Finding]> {
    let shown = &report.findings[..report.findings.len().min(most)];
    shown.chunk_by(|a, b| (&a.cause, a.verdict, &a.explanation) == (&b.cause, b.verdict, &b.explanation))
}

/// Where else something was found.
pub(super) fn more_places(finding: &Finding) -> String {
    const SHOWN: usize = 8;
    if finding.places.len() < 2 {
        return String::new();
    }
    let shown = finding.places[..finding.places.len().min(SHOWN)].join(", ");
    let more = if finding.places.len() > SHOWN { ", …" } else { "" };
    format!(" ({} places, this is the largest: {shown}{more})", finding.places.len())
}

/// The hosts, one sentence each.
pub(super) fn hosts(report: &Report) -> Vec<String> {
    report
        .hosts
        .iter()
        .map(|h| {
            let sessions = if h.sessions > 1 { format!(", {} sessions", h.sessions) } else { String::new() };
            format!(
                "{}, Linux {}, {} CPUs: {} to {} ({}), a sample every {}{sessions}",
                h.hostname,
                h.kernel,
                h.cpus,
                second(&h.from),
                second(&h.to),
                time(real(h.duration_ns)),
                time(real(h.interval_ns))
            )
        })
        .collect()
}

/// A wall clock without parts of a second.
fn second(ts: &str) -> String {
    ts.get(..19).map_or_else(|| ts.to_owned(), |t| format!("{}Z", t.replace('T', " ")))
}

/// All verdicts in one sentence.
pub(super) fn overall(report: &Report) -> String {
    let s = &report.summary;
    let place = s.largest_unexplained_in.as_ref().map_or(String::new(), |p| format!(" ({p})"));
    let limit = match (s.limit_pct, s.exceeded) {
        (Some(limit), true) => format!(" The limit of {limit} % is EXCEEDED."),
        (Some(limit), false) => format!(" The limit of {limit} % is kept."),
        (None, _) => String::new(),
    };
    let truth = s.truth.map_or(String::new(), |t| {
        let unknown = if t.not_comparable > 0 {
            format!(", {} not to be told", t.not_comparable)
        } else {
            String::new()
        };
        format!(
            " Against what is known exactly, {} claims: {} right, {} explained, {} wrong{unknown}.",
            t.claims, t.right, t.explained, t.wrong
        )
    });
    format!(
        "{} comparisons: {} agree, {} explained, {} disagree; {} could not be made.{truth} Largest unexplained difference: {}{place}.{limit}",
        s.compared,
        s.agree,
        s.explained,
        s.disagree,
        s.not_comparable,
        percent(s.largest_unexplained_pct)
    )
}

/// What each source is good for.
pub(super) fn sources(report: &Report) -> Vec<String> {
    report
        .sources
        .iter()
        .map(|s| {
            let checked = s.agree + s.explained + s.disagree;
            let checked = if checked == 0 {
                String::new()
            } else {
                format!(
                    " Held against a better source {checked} times: {} agree, {} explained, {} disagree.",
                    s.agree, s.explained, s.disagree
                )
            };
            format!("{}: {}.{checked}", s.source, s.recommendation)
        })
        .collect()
}

/// What was read, and what was wrong with it.
pub(super) fn input(report: &Report) -> Vec<String> {
    let input = &report.input;
    let number = |n: u64| grouped(real(n));
    let mut lines = vec![format!(
        "{} lines, {} bytes, {} samples used; {}.",
        number(input.lines),
        number(input.bytes),
        number(input.samples),
        if input.problems.is_empty() { "nothing was wrong with them" } else { "what was noticed:" }
    )];
    for (kind, problem) in &input.problems {
        let places: Vec<String> = problem.first_lines.iter().map(|l| number(*l)).collect();
        let more = if problem.count > real_len(&problem.first_lines) { ", …" } else { "" };
        let detail = match problem.detail.as_str() {
            "" => String::new(),
            detail => format!(" ({detail})"),
        };
        lines.push(format!(
            "{} × {} - line {}{more}{detail}",
            number(problem.count),
            kind.meaning(),
            places.join(", ")
        ));
    }
    lines
}

fn real_len<T>(of: &[T]) -> u64 {
    u64::try_from(of.len()).unwrap_or(u64::MAX)
}

/// What the measurement cost, and how exact it can be.
pub(super) fn own(own: &OwnReport) -> Vec<String> {
    let mut lines = Vec::new();
    let number = |n: u64| grouped(real(n));
    match (own.cpu_ns, own.wall_ns) {
        (Some(cpu), Some(wall)) if wall > 0 => lines.push(format!(
            "CPU of the monitor: {} in {}, {} of one CPU.",
            time(real(cpu)),
            time(real(wall)),
            percent(real(cpu) / real(wall) * 100.0)
        )),
        (Some(cpu), _) => lines.push(format!("CPU of the monitor: {}.", time(real(cpu)))),
        _ => lines.push("CPU of the monitor: not known, the stream has no health line.".to_owned()),
    }
    if let Some(rss) = own.rss_bytes {
        lines.push(format!("Memory of the monitor: {} at most seen.", amount(real(rss), Unit::Bytes)));
    }
    let (runs, ns) = own.programs.iter().fold((0, 0), |(r, n), p| (r + p.runs, n + p.ns));
    if runs > 0 {
        lines.push(format!(
            "Kernel programs: {} runs, {} in all, {} per event.",
            number(runs),
            time(real(ns)),
            time(real(ns) / real(runs))
        ));
        lines.extend(own.programs.iter().filter(|p| p.runs > 0).map(|p| {
            format!(
                "  {}: {} runs, {}, {} each",
                p.name,
                number(p.runs),
                time(real(p.ns)),
                time(real(p.ns) / real(p.runs))
            )
        }));
    } else {
        lines.push(
            "Kernel programs: their cost is not known; the kernel counts it while sysctl kernel.bpf_stats_enabled is 1."
                .to_owned(),
        );
    }
    lines.extend(own.misses.iter().map(|(program, n)| {
        format!("  {program}: {} events missed, in an interrupt that came while it was running.", number(*n))
    }));
    for read in &own.reads {
        let [p50, p99] = read.window_ns;
        lines.push(format!(
            "{}: {} reads, {} failed, {} not made; a read takes {} (p99 {}): values of one read are apart by up to that.",
            read.source,
            number(read.reads),
            number(read.errors),
            number(read.lost),
            time(real(p50)),
            time(real(p99))
        ));
    }
    let missed = own.ticks.map_or(String::new(), |[made, missed]| {
        format!("{} ticks, {} missed; ", number(made), number(missed))
    });
    let [p50, p99, most] = own.tick_error_ns;
    lines.push(format!(
        "Clock: {missed}ticks were off their time by {} (p99 {}, largest {}). All arithmetic uses the moments of reading, not the interval.",
        time(real(p50)),
        time(real(p99)),
        time(real(most))
    ));
    if let Some(dropped) = own.records_dropped {
        lines.push(format!("Lines dropped because the reader was too slow: {}.", number(dropped)));
    }
    let events: Vec<String> = own.events.iter().map(|(kind, n)| format!("{kind} {n}")).collect();
    let events = if events.is_empty() { "none".to_owned() } else { events.join(", ") };
    lines.push(format!("Events: {events}."));
    lines
}
