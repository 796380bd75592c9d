//! What stands out, in sentences: each with its cause and size, and what each source is good for.

use std::collections::BTreeMap;

use crate::{
    compare::{
        DomainState,
        amount::{amount, grouped, percent, signed, time},
        report::{
            ClaimReport, ComparisonReport, DomainReport, EntityReport, FigureReport, Finding, MetricReport,
            SourceReport, TruthReport, Verdict,
        },
    },
    metric::Scope,
    reconcile::{Cause, real},
    units::{SourceKind, Unit},
};

pub(super) fn find<'a>(domains: impl Iterator<Item = (&'a DomainState, &'a DomainReport)>) -> Vec<Finding> {
    let mut findings: Vec<Finding> = Vec::new();
    for (state, domain) in domains {
        for truth in &domain.truth {
            truth
                .claims
                .iter()
                .filter_map(|c| of_claim(domain, truth, c))
                .for_each(|f| add(&mut findings, f));
        }
        for entity in &domain.entities {
            for metric in &entity.metrics {
                for comparison in &metric.comparisons {
                    let found = of_comparison(domain, entity, metric, comparison);
                    found.into_iter().for_each(|finding| add(&mut findings, finding));
                }
            }
        }
        ceilometer(domain).into_iter().for_each(|finding| add(&mut findings, finding));
        balloon(domain, state).into_iter().for_each(|finding| add(&mut findings, finding));
    }
    findings
}

/// The same finding in several places or of several sources is one, with the sentence of where it is largest.
fn add(all: &mut Vec<Finding>, finding: Finding) {
    let same = |f: &&mut Finding| {
        (&f.cause, &f.metric, f.verdict) == (&finding.cause, &finding.metric, finding.verdict)
    };
    let Some(known) = all.iter_mut().find(same) else {
        all.push(finding);
        return;
    };
    for place in finding.places {
        if !known.places.contains(&place) {
            known.places.push(place);
        }
    }
    if !known.source.split(", ").any(|s| s == finding.source) {
        known.source = format!("{}, {}", known.source, finding.source);
    }
    if finding.amount.abs() > known.amount.abs() {
        known.amount = finding.amount;
        known.sentence = finding.sentence;
    }
}

fn of_comparison(
    domain: &DomainReport,
    entity: &EntityReport,
    metric: &MetricReport,
    comparison: &ComparisonReport,
) -> Vec<Finding> {
    let finding = |cause: &str, size: f64, sentence: String| Finding {
        cause: cause.to_owned(),
        explanation: explanation_of(cause),
        verdict: comparison.verdict,
        source: comparison.other.to_owned(),
        places: vec![format!("{} {}", domain.name, entity.label)],
        metric: metric.metric.to_owned(),
        amount: size,
        unit: metric.unit,
        sentence,
    };
    let what = format!("{}, {} of {}", domain.name, metric.metric, entity.label);
    match comparison.verdict {
        Verdict::Explained => comparison
            .explained
            .iter()
            .map(|part| {
                let size = amount(part.amount, metric.of);
                let parts = if part.cause == Cause::EmulatorIncluded.name() {
                    threads(entity)
                } else {
                    String::new()
                };
                let sentence = sentence(&what, metric, comparison, (part.cause, &size)) + &parts;
                finding(part.cause, part.amount, sentence)
            })
            .collect(),
        Verdict::Disagree => {
            let sentence = format!(
                "{what}: {} and {} disagree by {} ({}): {}.",
                comparison.other,
                comparison.reference,
                amount(comparison.unexplained, metric.of),
                percent(comparison.unexplained_pct),
                comparison.reason
            );
            let cause = comparison.looks_like.unwrap_or("unexplained");
            vec![finding(cause, comparison.unexplained, sentence)]
        }
        Verdict::Agree | Verdict::NotComparable => Vec::new(),
    }
}

/// What is known exactly, and a source that says something else.
fn of_claim(domain: &DomainReport, truth: &TruthReport, claim: &ClaimReport) -> Option<Finding> {
    let wrong = claim.verdict == Verdict::Disagree;
    if !wrong && claim.verdict != Verdict::Explained {
        return None;
    }
    let says = if claim.at_least < claim.at_most {
        format!("between {} and {}", amount(claim.at_least, truth.of), amount(claim.at_most, truth.of))
    } else {
        amount(claim.value, truth.of)
    };
    let share = claim.difference_pct.map_or(String::new(), |p| format!(", {}", signed(percent(p))));
    let cause = claim.causes.last().copied().unwrap_or("against_truth");
    let explanation = explanation_of(cause);
    // What the reason says beyond that.
    let more =
        match claim.reason.strip_suffix(explanation.as_str()).map_or(claim.reason.as_str(), str::trim_end) {
            "" => String::new(),
            more => format!(": {}", more.trim_end_matches(':')),
        };
    let sentence = format!(
        "{}: {} was {} by the guest's own account, {} says {says} ({}{share}){more}.",
        domain.name,
        truth.quantity,
        amount(truth.truth, truth.of),
        claim.source,
        signed(amount(claim.difference, truth.of)),
    );
    Some(Finding {
        cause: cause.to_owned(),
        explanation,
        verdict: claim.verdict,
        source: claim.source.to_owned(),
        places: vec![format!("{} {}", domain.name, truth.quantity)],
        metric: truth.metrics.join(" + "),
        amount: claim.difference,
        unit: truth.unit,
        sentence,
    })
}

fn explanation_of(cause: &str) -> String {
    Cause::ALL.into_iter().find(|c| c.name() == cause).map_or(String::new(), |c| c.explanation().to_owned())
}

fn sentence(
    what: &str,
    metric: &MetricReport,
    comparison: &ComparisonReport,
    (cause, size): (&str, &str),
) -> String {
    let (other, reference) = (comparison.other, comparison.reference);
    let share = comparison.difference_pct.map_or(String::new(), |p| format!(", {}", percent(p)));
    match cause {
        "tick" | "open_run" | "open_wait" | "irq_time" => {
            format!("{what}: {other} is up to {size} off {reference} at a reading.")
        }
        "backlog" | "qemu_open" | "qemu_flush" => {
            format!("{what}: {reference} is up to {size} ahead of {other} at a reading.")
        }
        "emulator_included" | "gso" | "cache_absorbed" | "not_kept" => format!(
            "{what} {{{other}}} is {} beside {} of {} {{{reference}}} (difference {size}{share}).",
            amount(comparison.other_total, metric.of),
            amount(comparison.reference_total, metric.of),
            comparison.reference_metric.unwrap_or(metric.metric),
        ),
        _ => format!(
            "{what}: {other} has {}, {reference} {} (difference {}{share}).",
            amount(comparison.other_total, metric.of),
            amount(comparison.reference_total, metric.of),
            amount(comparison.difference, metric.of),
        ),
    }
}

/// What the threads of a VM beside its vCPUs ran, by class.
fn threads(cpu: &EntityReport) -> String {
    let classes = [
        ("emulator_run_ns", "the emulator"),
        ("iothread_run_ns", "I/O threads"),
        ("worker_run_ns", "workers"),
        ("vhost_run_ns", "vhost"),
    ];
    let of = |metric: &str| cpu.metrics.iter().find(|m| m.metric == metric).map(|m| m.answer.total);
    let parts = classes.into_iter().filter_map(|(metric, name)| {
        of(metric).filter(|ns| *ns > 0.0).map(|ns| format!("{name} {}", amount(ns, Unit::Nanoseconds)))
    });
    let parts: Vec<String> = parts.collect();
    if parts.is_empty() { String::new() } else { format!(" Of it, {}.", parts.join(", ")) }
}

fn total(entity: &EntityReport, metric: &str, source: SourceKind) -> Option<f64> {
    let metric = entity.metrics.iter().find(|m| m.metric == metric)?;
    metric.sources.iter().find(|s| s.source == source.name()).map(|s| s.total)
}

/// OpenStack's ceilometer takes the sum of libvirt's vcpu.N.time and vcpu.N.wait as the CPU time of an instance.
fn ceilometer(domain: &DomainReport) -> Option<Finding> {
    let vcpus = || domain.entities.iter().filter(|e| e.scope == Scope::Vcpu.key());
    let sum = |metric| vcpus().map(|e| total(e, metric, SourceKind::Libvirt)).sum::<Option<f64>>();
    let (run, wait) = (sum("run_ns")?, sum("libvirt_wait_ns")?);
    if run <= 0.0 {
        return None;
    }
    let waited: f64 =
        vcpus().filter_map(|e| Some(e.metrics.iter().find(|m| m.metric == "wait_ns")?.answer.total)).sum();
    let cpu = domain.entities.iter().find(|e| e.scope == Scope::Cpu.key());
    let used = cpu.and_then(|e| total(e, "time_ns", SourceKind::Libvirt));
    let time = |ns| amount(ns, Unit::Nanoseconds);
    let beside = used.map_or(String::new(), |used| format!("; the whole VM used {}", time(used)));
    let sentence = if wait > 0.0 {
        format!(
            "{}: ceilometer's CPU time (vcpu.time + vcpu.wait of each vCPU) is {}, of which {} was waiting for a CPU, not using one: {} too much{beside}.",
            domain.name,
            time(run + wait),
            time(wait),
            percent(wait / run * 100.0)
        )
    } else {
        format!(
            "{}: ceilometer's CPU time (vcpu.time + vcpu.wait of each vCPU) is {} only because libvirt's wait is 0 here; where libvirt reads it, the {} these vCPUs waited for a CPU count as used: {} too much{beside}.",
            domain.name,
            time(run),
            time(waited),
            percent(waited / run * 100.0)
        )
    };
    Some(Finding {
        cause: "ceilometer_wait".to_owned(),
        explanation: "OpenStack's ceilometer adds libvirt's waiting time of each vCPU to its running time, and calls the sum CPU time".to_owned(),
        verdict: Verdict::Explained,
        source: SourceKind::Libvirt.name().to_owned(),
        places: vec![domain.name.clone()],
        metric: "run_ns".to_owned(),
        amount: if wait > 0.0 { wait } else { waited },
        unit: "ns",
        sentence,
    })
}

fn balloon(domain: &DomainReport, state: &DomainState) -> Option<Finding> {
    let memory = &state.memory;
    let period = state.facts.balloon.as_ref().map(|b| b.stats_period_s);
    let (stale, reports) = memory.stale;
    let oldest = memory.ages_s.largest();
    let (what, size) = match period {
        Some(0) if reports == 0 => ("the guest is never asked for its memory (balloon statistics period 0), so that only the size given to it is known".to_owned(), 0),
        Some(0) => (format!("the guest is never asked for its memory (balloon statistics period 0): the figures shown are up to {oldest} s old and will not change"), oldest),
        _ if stale > 0 => (format!("{stale} of {reports} reports of the guest's memory were older than three periods, the oldest {oldest} s: the guest does not answer, or is suspended"), oldest),
        Some(period) if oldest >= 5 && reports > 0 => (format!("memory figures are up to {oldest} s old, since the guest is asked every {period} s: shorter peaks are not seen"), oldest),
        _ => return None,
    };
    Some(Finding {
        cause: Cause::StaleBalloon.name().to_owned(),
        explanation: Cause::StaleBalloon.explanation().to_owned(),
        verdict: Verdict::Explained,
        source: SourceKind::Libvirt.name().to_owned(),
        places: vec![domain.name.clone()],
        metric: "available_bytes".to_owned(),
        amount: real(size),
        unit: "s",
        sentence: format!("{}, memory: {what}.", domain.name),
    })
}

/// Why the first of the sources is the one to trust.
pub(super) fn why_trust(sources: &[FigureReport], agreement: &str) -> String {
    let Some((best, others)) = sources.split_first() else { return String::new() };
    let mut reasons = Vec::new();
    for other in others {
        let finer = match (best.resolution, other.resolution) {
            (Some(a), Some(b)) if b >= 1_000 && b >= 100 * a => Some(format!("finer than {}", other.source)),
            _ => None,
        };
        let oftener = (other.every_ns > 2.0 * best.every_ns && best.every_ns > 0.0).then(|| {
            format!(
                "read every {} instead of {} ({})",
                time(best.every_ns),
                time(other.every_ns),
                other.source
            )
        });
        reasons.extend([finer, oftener].into_iter().flatten());
    }
    match (agreement, reasons.is_empty()) {
        ("only_source", _) => "no second source to check it with".to_owned(),
        ("disagree", _) => {
            "nearest to where the number is made; but a source disagrees: find out why before relying on either"
                .to_owned()
        }
        (_, true) => "nearest to where the number is made, and the others bear it out".to_owned(),
        (_, false) => format!("{}, and the others bear it out", reasons.join(", ")),
    }
}

/// What each source is good for.
pub(super) fn sources(domains: &[DomainReport]) -> Vec<SourceReport> {
    SourceKind::ALL.into_iter().filter_map(|source| source_report(domains, source)).collect()
}

fn source_report(domains: &[DomainReport], source: SourceKind) -> Option<SourceReport> {
    let name = source.name();
    let metrics = || domains.iter().flat_map(|d| &d.entities).flat_map(|e| &e.metrics);
    let said = metrics().filter(|m| m.sources.iter().any(|s| s.source == name)).count();
    let mut counts: BTreeMap<Verdict, u64> = BTreeMap::new();
    let mut wrong: Vec<&str> = Vec::new();
    for metric in metrics() {
        for comparison in
            metric.comparisons.iter().filter(|c| c.other == name && c.reference_metric.is_none())
        {
            *counts.entry(comparison.verdict).or_default() += 1;
            if comparison.verdict == Verdict::Disagree && !wrong.contains(&metric.metric) {
                wrong.push(metric.metric);
            }
        }
    }
    if said == 0 {
        return None;
    }
    let best = metrics().filter(|m| m.answer.source == name).count();
    let only = metrics().filter(|m| m.answer.source == name && m.answer.agreement == "only_source").count();
    let coarse = metrics().any(|m| {
        m.of == Unit::Nanoseconds
            && m.sources.iter().any(|s| s.source == name && s.resolution.is_some_and(|r| r >= 1_000_000))
    });
    let mut text =
        format!("the best source of {} of the {} figures it has", grouped(count(best)), grouped(count(said)));
    if only > 0 {
        text.push_str(&format!(", of {} the only one", grouped(count(only))));
    }
    if coarse {
        text.push_str("; its CPU times have a grain of 10 ms: do not use them over short intervals");
    }
    let verdict = if wrong.is_empty() {
        "no unexplained difference".to_owned()
    } else {
        format!("do not rely on {} before the difference is understood", wrong.join(", "))
    };
    let of = |v| counts.get(&v).copied().unwrap_or(0);
    Some(SourceReport {
        source: name,
        agree: of(Verdict::Agree),
        explained: of(Verdict::Explained),
        disagree: of(Verdict::Disagree),
        recommendation: format!("{text}; {verdict}"),
    })
}

fn count(of: usize) -> f64 {
    real(u64::try_from(of).unwrap_or(u64::MAX))
}
