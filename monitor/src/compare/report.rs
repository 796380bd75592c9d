//! What a comparison found, as data: the same for every format it is written in.

use serde::Serialize;

use crate::{
    compare::{
        Comparison, DomainState, claim,
        entity::{Entity, LEDGER, trusted},
        findings,
        input::Input,
        pair::Pair,
        stats::{Distribution, History},
        truth::Watch,
        verdict::{Judgement, Known, judge},
    },
    metric::{Kind, MetricDef, Scope},
    model,
    reconcile::{Cause, real},
    units::{SourceKind, Unit},
};

/// Version of the JSON form.
const VERSION: u32 = 1;

/// The report.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// Always `kvm-monitor comparison`.
    pub report: &'static str,
    /// Version of this form.
    pub version: u32,
    /// All comparisons together.
    pub summary: Overall,
    /// Where the stream is from.
    pub hosts: Vec<HostReport>,
    /// What stands out, with cause and size.
    pub findings: Vec<Finding>,
    /// By domain.
    pub domains: Vec<DomainReport>,
    /// What each source is good for.
    pub sources: Vec<SourceReport>,
    /// What was read, and what was wrong with it.
    pub input: Input,
    /// What the measurement cost, and how exact it can be.
    pub own: OwnReport,
}

/// How a comparison ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Verdict {
    /// All readings can be right at once.
    Agree,
    /// They differ, and known causes account for it.
    Explained,
    /// They differ, and nothing known accounts for it.
    Disagree,
    /// Nothing can be said.
    NotComparable,
}

impl Verdict {
    /// For people.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Agree => "agree",
            Self::Explained => "explained",
            Self::Disagree => "disagree",
            Self::NotComparable => "not comparable",
        }
    }
}

/// Counts of verdicts.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Overall {
    /// Comparisons of two sources that could be made.
    pub compared: u64,
    /// Of them: agree.
    pub agree: u64,
    /// Explained.
    pub explained: u64,
    /// Disagree.
    pub disagree: u64,
    /// Comparisons that could not be made.
    pub not_comparable: u64,
    /// What is known exactly, if anything is, beside what sources say.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub truth: Option<TruthOverall>,
    /// The largest unexplained difference, per cent of the larger total.
    pub largest_unexplained_pct: f64,
    /// Where that is.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub largest_unexplained_in: Option<String>,
    /// The limit given, per cent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub limit_pct: Option<f64>,
    /// An unexplained difference exceeds the limit.
    pub exceeded: bool,
}

/// Counts of what sources say of what is known exactly.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct TruthOverall {
    /// Claims of sources.
    pub claims: u64,
    /// Of them: exactly right, or right within what their readings frame.
    pub right: u64,
    /// Explained by a known cause.
    pub explained: u64,
    /// Wrong.
    pub wrong: u64,
    /// Claims of which nothing can be said.
    pub not_comparable: u64,
}

/// A host.
#[derive(Clone, Debug, Serialize)]
pub struct HostReport {
    /// Its name.
    pub hostname: String,
    /// Kernel release.
    pub kernel: String,
    /// CPUs online.
    pub cpus: u64,
    /// Version of the monitor.
    pub tool_version: String,
    /// Time between samples, nanoseconds.
    pub interval_ns: u64,
    /// Sessions recorded.
    pub sessions: u64,
    /// Begin, wall clock.
    pub from: String,
    /// End, wall clock.
    pub to: String,
    /// From begin to end, nanoseconds.
    pub duration_ns: u64,
    /// What did not work there: source or probe, and why.
    pub missing: Vec<String>,
}

/// Something that stands out.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Finding {
    /// Name of the cause, or of what it looks like.
    pub cause: String,
    /// How bad: `disagree` or `explained`.
    pub verdict: Verdict,
    /// The source it is about.
    pub source: String,
    /// Where it was found: domain and entity.
    pub places: Vec<String>,
    /// Metric.
    pub metric: String,
    /// Size where it is largest, in `unit`.
    pub amount: f64,
    /// `ns`, `bytes`, `count` or `s`.
    pub unit: &'static str,
    /// In words: where, and how much.
    pub sentence: String,
    /// What the cause is, in words; empty if the sentence says all.
    pub explanation: String,
}

/// A domain.
#[derive(Clone, Debug, Serialize)]
pub struct DomainReport {
    /// Its name.
    pub name: String,
    /// Identity.
    pub uuid: String,
    /// Host it was on.
    pub host: String,
    /// `kvm` or `qemu`; empty if not known.
    pub virt_type: String,
    /// Samples used.
    pub samples: u64,
    /// What it says it did itself, beside what the sources say.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub truth: Vec<TruthReport>,
    /// CPU, vCPUs, interfaces, disks, memory.
    pub entities: Vec<EntityReport>,
}

/// Part of a domain.
#[derive(Clone, Debug, Serialize)]
pub struct EntityReport {
    /// Key of its kind in the stream.
    pub scope: &'static str,
    /// Number, device or target.
    pub name: String,
    /// For people.
    pub label: String,
    /// If the host's kernel does not see it: why.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub unobservable: Option<String>,
    /// Its metrics that any source has.
    pub metrics: Vec<MetricReport>,
    /// Its histograms.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub histograms: Vec<HistogramReport>,
    /// Who had the CPU while it waited, the most first.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub preempted_by: Vec<CulpritReport>,
    /// For plots: where a vCPU's time went.
    #[serde(skip)]
    pub ledger: Option<History<{ LEDGER.len() }>>,
}

/// A metric of an entity.
#[derive(Clone, Debug, Serialize)]
pub struct MetricReport {
    /// Key in the stream.
    pub metric: &'static str,
    /// `ns`, `bytes` or `count`.
    pub unit: &'static str,
    /// `counter` or `gauge`.
    pub kind: &'static str,
    /// What each source said.
    pub sources: Vec<FigureReport>,
    /// The one answer.
    pub answer: Answer,
    /// Other sources against the reference.
    pub comparisons: Vec<ComparisonReport>,
    /// The same unit, for output.
    #[serde(skip)]
    pub of: Unit,
}

/// What one source said of a metric.
#[derive(Clone, Debug, Serialize)]
pub struct FigureReport {
    /// Who.
    pub source: &'static str,
    /// How often it was read.
    pub readings: u64,
    /// Growth of a counter, mean of a gauge.
    pub total: f64,
    /// Per second: of a counter.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub per_s: Option<f64>,
    /// The largest number that divides all values; absent if all were 0.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub resolution: Option<u64>,
    /// Mean time between readings, nanoseconds.
    pub every_ns: f64,
    /// How old its number gets until the next: longest time between readings, nanoseconds.
    pub oldest_ns: u64,
    /// How often it went backwards.
    pub backwards: u64,
}

/// One answer per metric.
#[derive(Clone, Debug, Serialize)]
pub struct Answer {
    /// Who to trust.
    pub source: &'static str,
    /// Why.
    pub why: String,
    /// Growth of a counter, mean of a gauge.
    pub total: f64,
    /// Per second, at least, about and at most: of a counter, since it last started.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub per_s: Option<[f64; 3]>,
    /// `only_source`, `agree` or `disagree`.
    pub agreement: &'static str,
}

/// One source against another.
#[derive(Clone, Debug, Serialize)]
pub struct ComparisonReport {
    /// The reference.
    pub reference: &'static str,
    /// Its metric, if it is another one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reference_metric: Option<&'static str>,
    /// Who is compared.
    pub other: &'static str,
    /// Readings compared.
    pub ticks: u64,
    /// Growth of the reference in that time (mean of a gauge).
    pub reference_total: f64,
    /// Growth of the other.
    pub other_total: f64,
    /// Other − reference.
    pub difference: f64,
    /// Per cent of the reference; absent if that is 0.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub difference_pct: Option<f64>,
    /// |difference| per tick: mean, median, 95th and 99th percentile, largest.
    pub per_tick: PerTick,
    /// By known causes.
    pub explained: Vec<Explained>,
    /// By none.
    pub unexplained: f64,
    /// Per cent of the larger total.
    pub unexplained_pct: f64,
    /// A difference beyond this would have been noticed; absent: none would.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub noticed_from: Option<f64>,
    /// How it ends.
    pub verdict: Verdict,
    /// Why.
    pub reason: String,
    /// What a disagreement looks like: `factor`, `step`, `late`, `direction`, `constant`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub looks_like: Option<&'static str>,
    /// For plots.
    #[serde(skip)]
    pub history: History<2>,
    /// For plots.
    #[serde(skip)]
    pub differences: Distribution,
}

/// |difference| per tick.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct PerTick {
    /// Mean.
    pub mean: f64,
    /// Median.
    pub p50: u64,
    /// 95th percentile.
    pub p95: u64,
    /// 99th percentile.
    pub p99: u64,
    /// Largest.
    pub largest: u64,
    /// Largest share of the reference's growth in that tick, per cent.
    pub largest_pct: f64,
}

/// A part of a difference.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Explained {
    /// Name of the cause.
    pub cause: &'static str,
    /// How much.
    pub amount: f64,
}

/// A histogram.
#[derive(Clone, Debug, Serialize)]
pub struct HistogramReport {
    /// Key in the stream.
    pub name: String,
    /// How many.
    pub count: u64,
    /// Mean, nanoseconds.
    pub mean_ns: f64,
    /// Percentiles and largest, nanoseconds.
    pub p50_ns: u64,
    /// 99th percentile.
    pub p99_ns: u64,
    /// Largest.
    pub largest_ns: u64,
    /// For plots.
    #[serde(skip)]
    pub of: Distribution,
}

/// Who had a vCPU's CPU while it waited.
#[derive(Clone, Debug, Serialize)]
pub struct CulpritReport {
    /// Name.
    pub who: String,
    /// What it is.
    pub kind: String,
    /// How long, nanoseconds.
    pub ns: u64,
}

/// What is known exactly, and what sources say of it.
#[derive(Clone, Debug, Serialize)]
pub struct TruthReport {
    /// What.
    pub quantity: String,
    /// The metrics whose sum it is.
    pub metrics: Vec<String>,
    /// `ns`, `bytes` or `count`.
    pub unit: &'static str,
    /// How much.
    pub truth: f64,
    /// What each source says: in the order ebpf, procfs, libvirt, those that say something.
    pub claims: Vec<ClaimReport>,
    /// What is to be known of it.
    pub note: String,
    /// The same unit, for output.
    #[serde(skip)]
    pub of: Unit,
}

/// What a source says of a truth.
#[derive(Clone, Debug, Serialize)]
pub struct ClaimReport {
    /// Who.
    pub source: &'static str,
    /// How much, between the readings before and after.
    pub value: f64,
    /// Of that, at least so much in the span of the truth; the same for what has no begin and end.
    pub at_least: f64,
    /// And at most so much.
    pub at_most: f64,
    /// More than the truth by, less if negative; 0 if the truth is within its bounds.
    pub difference: f64,
    /// Per cent of the truth; absent if that is 0.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub difference_pct: Option<f64>,
    /// `agree` if it is right.
    pub verdict: Verdict,
    /// Why it may differ.
    pub causes: Vec<&'static str>,
    /// What no cause explains.
    pub unexplained: f64,
    /// Per cent of the larger of truth and claim.
    pub unexplained_pct: f64,
    /// In words.
    pub reason: String,
}

/// What a source is good for.
#[derive(Clone, Debug, Serialize)]
pub struct SourceReport {
    /// Who.
    pub source: &'static str,
    /// Verdicts of comparisons with it, other than as reference.
    pub agree: u64,
    /// Explained.
    pub explained: u64,
    /// Disagree.
    pub disagree: u64,
    /// What it is good for.
    pub recommendation: String,
}

/// The measurement's own cost and accuracy.
#[derive(Clone, Debug, Default, Serialize)]
pub struct OwnReport {
    /// Time that sessions lasted, nanoseconds; absent without their summaries.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub wall_ns: Option<u64>,
    /// Own CPU time, nanoseconds.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cpu_ns: Option<u64>,
    /// Largest resident memory, bytes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rss_bytes: Option<u64>,
    /// Kernel programs: runs and time; only while the kernel counts.
    pub programs: Vec<ProgramReport>,
    /// Events that a program missed, because they came while it was running on that CPU already.
    #[serde(skip_serializing_if = "std::collections::BTreeMap::is_empty")]
    pub misses: std::collections::BTreeMap<String, u64>,
    /// Reads by source.
    pub reads: Vec<ReadReport>,
    /// Ticks made, and left out.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ticks: Option<[u64; 2]>,
    /// Lines dropped because the reader was too slow.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub records_dropped: Option<u64>,
    /// |time between ticks − interval|: median, 99th percentile, largest, nanoseconds.
    pub tick_error_ns: [u64; 3],
    /// Events by kind.
    pub events: std::collections::BTreeMap<String, u64>,
}

/// A kernel program.
#[derive(Clone, Debug, Serialize)]
pub struct ProgramReport {
    /// Its name.
    pub name: String,
    /// Runs.
    pub runs: u64,
    /// Time, nanoseconds.
    pub ns: u64,
}

/// Reads of a source.
#[derive(Clone, Debug, Serialize)]
pub struct ReadReport {
    /// Who.
    pub source: String,
    /// Good reads.
    pub reads: u64,
    /// Failed.
    pub errors: u64,
    /// Not made.
    pub lost: u64,
    /// How long a reading took: median and 99th percentile, nanoseconds.
    pub window_ns: [u64; 2],
}

impl Report {
    /// Why nothing was compared.
    #[must_use]
    pub fn nothing(&self) -> &'static str {
        if self.hosts.is_empty() {
            "the stream has no session line that this version can read"
        } else if self.input.samples == 0 {
            "the stream has no sample of a domain asked for"
        } else if self.summary.not_comparable > 0 {
            "there are too few readings: measure for longer"
        } else {
            "no figure has two sources"
        }
    }
}

pub(super) fn build(of: &Comparison, limit_pct: Option<f64>) -> Report {
    let host = |number: usize| of.hosts.get(number).map_or("", |h| h.session.host.hostname.as_str());
    let mut states: Vec<_> = of.domains.iter().collect();
    states.sort_by_key(|((number, uuid), domain)| (host(*number), domain.name.as_str(), *uuid));
    let domains: Vec<DomainReport> = states
        .iter()
        .map(|((number, uuid), domain)| domain_report(domain, &uuid.to_string(), host(*number)))
        .collect();
    let states = states.into_iter().map(|(_, domain)| domain);
    let mut findings = findings::find(states.zip(&domains));
    let place = |cause: &str| Cause::ALL.into_iter().position(|c| c.name() == cause);
    findings.sort_by_key(|f| (std::cmp::Reverse(f.verdict == Verdict::Disagree), place(&f.cause)));
    Report {
        report: "kvm-monitor comparison",
        version: VERSION,
        summary: overall(&domains, limit_pct),
        hosts: of.hosts.iter().map(host_report).collect(),
        sources: findings::sources(&domains),
        findings,
        domains,
        input: of.input.clone(),
        own: own_report(of),
    }
}

fn domain_report(domain: &DomainState, uuid: &str, host: &str) -> DomainReport {
    DomainReport {
        name: domain.name.clone(),
        uuid: uuid.to_owned(),
        host: host.to_owned(),
        virt_type: domain.facts.virt_type.clone().unwrap_or_default(),
        samples: domain.samples,
        truth: domain.watches.iter().filter_map(|watch| truth_report(domain, watch)).collect(),
        entities: domain.entities().map(entity_report).collect(),
    }
}

fn entity_report(entity: &Entity) -> EntityReport {
    let mut culprits: Vec<CulpritReport> = entity
        .culprits
        .iter()
        .map(|((who, kind), ns)| CulpritReport { who: who.clone(), kind: kind.clone(), ns: *ns })
        .collect();
    culprits.sort_by_key(|c| std::cmp::Reverse(c.ns));
    EntityReport {
        scope: entity.scope.key(),
        name: entity.name.clone(),
        label: label(entity),
        unobservable: entity.unobservable.clone(),
        metrics: entity.scope.metrics().iter().filter_map(|def| metric_report(entity, def)).collect(),
        histograms: entity.histograms.iter().map(|(name, of)| histogram_report(name, of)).collect(),
        preempted_by: culprits,
        ledger: (!entity.ledger.spans().is_empty()).then(|| entity.ledger.clone()),
    }
}

fn label(entity: &Entity) -> String {
    match entity.scope {
        Scope::Cpu => "CPU".to_owned(),
        Scope::Memory => "memory".to_owned(),
        Scope::Vcpu => format!("vCPU {}", entity.name),
        Scope::Interface => match &entity.interface {
            Some(kind) => format!("interface {} ({kind})", entity.name),
            None => format!("interface {}", entity.name),
        },
        Scope::Disk => match &entity.disk {
            Some((format, cache)) => {
                let parts: Vec<&str> =
                    [format, cache].into_iter().filter(|p| !p.is_empty()).map(String::as_str).collect();
                if parts.is_empty() {
                    format!("disk {}", entity.name)
                } else {
                    format!("disk {} ({})", entity.name, parts.join(", "))
                }
            }
            None => format!("disk {}", entity.name),
        },
    }
}

fn metric_report(entity: &Entity, def: &'static MetricDef) -> Option<MetricReport> {
    let figures = &entity.figures[def.metric.index_in_scope()];
    let read = |s: &SourceKind| figures[*s as usize].readings > 0;
    let sources: Vec<FigureReport> =
        trusted(def).filter(read).map(|s| figure_report(def, s, &figures[s as usize])).collect();
    let best = trusted(def).find(read)?;
    let known = Known { host_view: entity.interface.as_deref() == Some("direct") };
    // Of what a cause relates, one comparison says it all: libvirt's, which is what others show, if it is there.
    let related = |other| {
        entity.pairs.iter().any(|p| p.def.metric == def.metric && p.relation.is_some() && p.other == other)
    };
    let shown = if related(SourceKind::Libvirt) { SourceKind::Libvirt } else { best };
    let comparisons: Vec<ComparisonReport> = entity
        .pairs
        .iter()
        .filter(|p| p.relation.is_none() || p.other == shown)
        .filter(|p| p.def.metric == def.metric)
        // A source that came later than another but is trusted more is the reference from then on.
        .filter(|p| {
            p.reference == trusted(p.reference_def).find(|s| known_from(entity, p, *s)).unwrap_or(best)
        })
        .map(|p| comparison_report(p, judge(p, known)))
        .collect();
    let plain = || comparisons.iter().filter(|c| c.reference_metric.is_none());
    let agreement = if plain().any(|c| c.verdict == Verdict::Disagree) {
        "disagree"
    } else if plain().any(|c| c.verdict != Verdict::NotComparable) {
        "agree"
    } else {
        "only_source"
    };
    let last = figures[best as usize];
    let per_s = last.first.zip(last.last).filter(|_| def.kind == Kind::Counter).and_then(|(a, b)| {
        let rate = model::rate((a.value, a.window), (b.value, b.window)).ok()?;
        rate.high.is_finite().then_some([rate.low, rate.mid, rate.high])
    });
    let total = sources.first().map_or(0.0, |s| s.total);
    let why = findings::why_trust(&sources, agreement);
    let answer = Answer { source: best.name(), why, total, per_s, agreement };
    let kind = if def.kind == Kind::Counter { "counter" } else { "gauge" };
    let (metric, unit) = (def.name, def.unit.name());
    Some(MetricReport { metric, unit, kind, sources, answer, comparisons, of: def.unit })
}

fn known_from(entity: &Entity, pair: &Pair, source: SourceKind) -> bool {
    entity.figures[pair.reference_def.metric.index_in_scope()][source as usize].readings > 0
}

fn figure_report(def: &MetricDef, source: SourceKind, of: &super::entity::Figures) -> FigureReport {
    let counter = def.kind == Kind::Counter;
    let gaps = real(of.readings.saturating_sub(1).max(1));
    FigureReport {
        source: source.name(),
        readings: of.readings,
        total: if counter { of.total } else { of.total / real(of.readings.max(1)) },
        per_s: (counter && of.span_ns > 0).then(|| of.total / (real(of.span_ns) / 1e9)),
        resolution: of.resolution(),
        every_ns: real(of.span_ns) / gaps,
        oldest_ns: of.longest_gap_ns,
        backwards: of.backwards,
    }
}

fn comparison_report(pair: &Pair, judgement: Judgement) -> ComparisonReport {
    let ticks = real(pair.ticks.max(1));
    let (mut reference_total, mut other_total) = (pair.reference_total, pair.other_total);
    if pair.def.kind == Kind::Gauge {
        reference_total /= ticks;
        other_total /= ticks;
    }
    let difference = other_total - reference_total;
    let larger = reference_total.max(other_total);
    let pct = |part: f64, of: f64| (of > 0.0).then(|| part / of * 100.0);
    ComparisonReport {
        reference: pair.reference.name(),
        reference_metric: pair.relation.map(|_| pair.reference_def.name),
        other: pair.other.name(),
        ticks: pair.ticks,
        reference_total,
        other_total,
        difference,
        difference_pct: pct(difference, reference_total),
        per_tick: PerTick {
            mean: pair.differences.mean(),
            p50: pair.differences.percentile(50),
            p95: pair.differences.percentile(95),
            p99: pair.differences.percentile(99),
            largest: pair.differences.largest(),
            largest_pct: real(pair.relative.largest()) / 1e4,
        },
        explained: judgement.explained,
        unexplained: judgement.unexplained,
        unexplained_pct: pct(judgement.unexplained, larger).unwrap_or(0.0),
        noticed_from: judgement.slack,
        verdict: judgement.verdict,
        reason: judgement.reason,
        looks_like: judgement.looks_like,
        history: pair.history.clone(),
        differences: pair.differences.clone(),
    }
}

fn histogram_report(name: &str, of: &Distribution) -> HistogramReport {
    HistogramReport {
        name: name.to_owned(),
        count: of.count(),
        mean_ns: of.mean(),
        p50_ns: of.percentile(50),
        p99_ns: of.percentile(99),
        largest_ns: of.largest(),
        of: of.clone(),
    }
}

fn truth_report(domain: &DomainState, watch: &Watch) -> Option<TruthReport> {
    let def = watch.def()?;
    let disk = domain.disks.iter().find(|d| def.scope == Scope::Disk && d.name == watch.truth.entity);
    let known = claim::Known { image: disk.and_then(|d| d.disk.as_ref()), stops: domain.stops };
    let claims =
        SourceKind::ALL.into_iter().filter_map(|source| claim_report(watch, source, known)).collect();
    Some(TruthReport {
        quantity: watch.truth.quantity.clone(),
        metrics: watch.truth.metrics.clone(),
        unit: def.unit.name(),
        truth: real(watch.truth.value),
        claims,
        note: watch.truth.note.clone(),
        of: def.unit,
    })
}

fn claim_report(watch: &Watch, source: SourceKind, known: claim::Known<'_>) -> Option<ClaimReport> {
    let (claim, truth) = (watch.claim(source)?, real(watch.truth.value));
    let found = claim::judge(watch, (source, claim), known)?;
    let (difference, larger) = (claim::off(truth, claim), truth.max(claim.at_most));
    Some(ClaimReport {
        source: source.name(),
        value: claim.value,
        at_least: claim.at_least,
        at_most: claim.at_most,
        difference,
        difference_pct: (truth > 0.0).then(|| difference / truth * 100.0),
        verdict: found.verdict,
        causes: found.causes.into_iter().map(Cause::name).collect(),
        unexplained: found.unexplained,
        unexplained_pct: if larger > 0.0 { found.unexplained / larger * 100.0 } else { 0.0 },
        reason: found.reason,
    })
}

fn overall(domains: &[DomainReport], limit_pct: Option<f64>) -> Overall {
    let mut sum = Overall { limit_pct, ..Overall::default() };
    for domain in domains {
        for entity in &domain.entities {
            for metric in &entity.metrics {
                for comparison in &metric.comparisons {
                    sum.add(comparison, || format!("{} {} {}", domain.name, entity.label, metric.metric));
                }
            }
        }
        for truth in &domain.truth {
            for claim in &truth.claims {
                sum.add_claim(claim, || format!("{}: {} {{{}}}", domain.name, truth.quantity, claim.source));
            }
        }
    }
    sum
}

impl Overall {
    fn add(&mut self, comparison: &ComparisonReport, place: impl FnOnce() -> String) {
        match comparison.verdict {
            Verdict::Agree => self.agree += 1,
            Verdict::Explained => self.explained += 1,
            Verdict::Disagree => self.disagree += 1,
            Verdict::NotComparable => {
                self.not_comparable += 1;
                return;
            }
        }
        self.compared += 1;
        self.unexplained(comparison.unexplained_pct, place);
    }

    fn add_claim(&mut self, claim: &ClaimReport, place: impl FnOnce() -> String) {
        let sum = self.truth.get_or_insert_default();
        sum.claims += 1;
        match claim.verdict {
            Verdict::Agree => sum.right += 1,
            Verdict::Explained => sum.explained += 1,
            Verdict::Disagree => sum.wrong += 1,
            Verdict::NotComparable => sum.not_comparable += 1,
        }
        self.unexplained(claim.unexplained_pct, place);
    }

    fn unexplained(&mut self, pct: f64, place: impl FnOnce() -> String) {
        if pct > self.largest_unexplained_pct {
            self.largest_unexplained_pct = pct;
            self.largest_unexplained_in = Some(place());
        }
        self.exceeded |= self.limit_pct.is_some_and(|limit| pct > limit);
    }
}

fn host_report(of: &super::HostState) -> HostReport {
    let session = &of.session;
    let sources = session.sources.iter().filter(|(_, s)| !s.available);
    let text = |name: &str, reason: &Option<String>| {
        format!("{name}: {}", reason.as_deref().unwrap_or("no reason given"))
    };
    let mut missing: Vec<String> = sources.map(|(name, s)| text(name, &s.reason)).collect();
    let probes = session.probes.iter().filter(|p| p.state == "failed");
    missing.extend(probes.map(|p| text(&format!("probe {}", p.name), &p.reason)));
    HostReport {
        hostname: session.host.hostname.clone(),
        kernel: session.host.kernel.clone(),
        cpus: session.host.cpus,
        tool_version: session.tool_version.clone(),
        interval_ns: session.interval_ns,
        sessions: of.sessions,
        from: of.first_ts.clone(),
        to: of.last_ts.clone(),
        duration_ns: of.last_mono_ns.saturating_sub(of.first_mono_ns),
        missing,
    }
}

fn own_report(of: &Comparison) -> OwnReport {
    let own = &of.own;
    let (mut report, mut programs) = (OwnReport::default(), std::collections::BTreeMap::new());
    let mut reads: std::collections::BTreeMap<&str, ReadReport> = std::collections::BTreeMap::new();
    for health in &own.ended {
        report.cpu_ns = Some(report.cpu_ns.unwrap_or(0) + health.cpu_ns);
        report.rss_bytes = report.rss_bytes.max(health.rss_bytes);
        for (name, program) in &health.programs {
            let sum: &mut ProgramReport =
                programs.entry(name).or_insert_with(|| ProgramReport { name: name.clone(), runs: 0, ns: 0 });
            sum.runs += program.run_count;
            sum.ns += program.run_ns;
        }
        for (name, misses) in &health.misses {
            *report.misses.entry(name.clone()).or_default() += misses;
        }
        for (name, source) in &health.sources {
            let sum = reads.entry(name).or_insert_with(|| ReadReport {
                source: name.clone(),
                reads: 0,
                errors: 0,
                lost: 0,
                window_ns: window_of(of, name),
            });
            sum.reads += source.reads;
            sum.errors += source.errors;
            sum.lost += source.lost;
        }
    }
    for summary in &own.summaries {
        report.wall_ns = Some(report.wall_ns.unwrap_or(0) + summary.wall_ns);
        let [made, missed] = report.ticks.unwrap_or_default();
        report.ticks = Some([made + summary.ticks, missed + summary.ticks_missed]);
        report.records_dropped = Some(report.records_dropped.unwrap_or(0) + summary.records_dropped);
    }
    report.programs = programs.into_values().collect();
    report.reads = reads.into_values().collect();
    report.tick_error_ns = [own.late.percentile(50), own.late.percentile(99), own.late.largest()];
    report.events = of.events.clone();
    report
}

fn window_of(of: &Comparison, source: &str) -> [u64; 2] {
    let source = SourceKind::ALL.into_iter().find(|s| s.name() == source);
    source.map_or([0; 2], |s| {
        let widths = &of.own.windows[s as usize];
        [widths.percentile(50), widths.percentile(99)]
    })
}
