//! One vCPU, interface or disk, or a domain's CPU or memory: what each source said of it, and its comparisons.

use std::collections::BTreeMap;

use crate::{
    compare::{
        pair::{Beside, Pair},
        stats::{Distribution, History},
        truth::{self, Watch},
    },
    metric::{Kind, MetricDef, Scope},
    reconcile::{
        Allowance, Cause, Grain, Reading, Trail,
        causes::{Moment, Subject},
        real,
    },
    record::read::{DomainFacts, Row},
    units::{SourceKind, Window},
};

/// Two metrics of a scope that differ by nature, and why. Names that no metric has yet are left out.
const RELATIONS: [(Scope, &str, &str, Cause); 8] = [
    (Scope::Vcpu, "wait_ns", "libvirt_wait_ns", Cause::NotKept),
    (Scope::Cpu, "vcpu_run_ns", "time_ns", Cause::EmulatorIncluded),
    (Scope::Interface, "rx_packets", "rx_wire_packets", Cause::Gso),
    (Scope::Interface, "tx_packets", "tx_wire_packets", Cause::Gso),
    (Scope::Disk, "rd_bytes", "device_rd_bytes", Cause::CacheAbsorbed),
    (Scope::Disk, "wr_bytes", "device_wr_bytes", Cause::CacheAbsorbed),
    (Scope::Disk, "rd_req", "device_rd_req", Cause::CacheAbsorbed),
    (Scope::Disk, "wr_req", "device_wr_req", Cause::CacheAbsorbed),
];

/// The parts of a vCPU's time, in the order in which they are stacked.
pub const LEDGER: [&str; 4] = ["run_ns", "irq_ns", "wait_ns", "sleep_ns"];
/// Those who took a vCPU's CPU that are told apart.
const CULPRITS: usize = 64;

/// What one source said of one metric.
#[derive(Clone, Copy, Debug, Default)]
pub struct Figures {
    /// How often it was read.
    pub readings: u64,
    /// The first reading since the counter last started.
    pub first: Option<Reading>,
    /// The last.
    pub last: Option<Reading>,
    /// Growth of a counter, over all its starts; sum of a gauge's readings.
    pub total: f64,
    /// Time between first and last readings, over all starts, nanoseconds.
    pub span_ns: u64,
    /// Longest time between two readings, nanoseconds.
    pub longest_gap_ns: u64,
    /// How often it went backwards.
    pub backwards: u64,
    /// What divides all its values.
    pub grain: Grain,
    /// Readings that differed from the one before.
    pub changes: u64,
}

/// The entity.
#[derive(Clone, Debug)]
pub struct Entity {
    /// Number, device or target; empty for a domain's CPU and memory.
    pub name: String,
    /// What it is.
    pub scope: Scope,
    /// By position of the metric in its scope, and source.
    pub figures: Vec<[Figures; SourceKind::COUNT]>,
    /// Comparisons made.
    pub pairs: Vec<Pair>,
    /// Histograms, by name.
    pub histograms: BTreeMap<String, Distribution>,
    /// Who had a vCPU's CPU while it waited: nanoseconds by name and kind.
    pub culprits: BTreeMap<(String, String), u64>,
    /// The ledger of a vCPU over time, by [`LEDGER`].
    pub ledger: History<{ LEDGER.len() }>,
    /// Ages of the guest's memory report, seconds.
    pub ages_s: Distribution,
    /// Reports that were too old, and reports in all.
    pub stale: (u64, u64),
    /// Format of the image, cache mode: of a disk.
    pub disk: Option<(String, String)>,
    /// Kind of an interface.
    pub interface: Option<String>,
    /// If the host's kernel does not see it: why.
    pub unobservable: Option<String>,
    trails: Vec<[Trail; SourceKind::COUNT]>,
    progress: [Progress; 2],
    backlog: u64,
    lately: Lately,
    /// How many figures of how many sources were read when comparisons were last made.
    said: usize,
}

/// Growth of a vCPU's run or wait time while it was doing that at every reading.
#[derive(Clone, Copy, Debug, Default)]
struct Progress {
    last: Option<u64>,
    /// Since the last reading at which it did something else.
    carried: u64,
    /// As `carried`, whatever it did at this reading.
    most: u64,
}

/// The most packets that waited in a tap's queue in the last seconds: of this span of time, and of the one before.
#[derive(Clone, Copy, Debug, Default)]
struct Lately {
    since_ns: u64,
    now: u64,
    before: u64,
}

impl Lately {
    /// As long as a source may be late.
    const SPAN_NS: u64 = 10_000_000_000;

    fn add(&mut self, packets: u64, at_ns: u64) {
        if at_ns.saturating_sub(self.since_ns) > Self::SPAN_NS {
            *self = Self { since_ns: at_ns, now: 0, before: self.now };
        }
        self.now = self.now.max(packets);
    }

    fn most(self) -> u64 {
        self.now.max(self.before)
    }
}

/// What a reading of an entity happens in.
#[derive(Clone, Copy, Debug)]
pub struct Surroundings<'a> {
    /// When each source was read.
    pub windows: &'a [Option<Window>; SourceKind::COUNT],
    /// Length of one clock tick of `/proc`, nanoseconds.
    pub clock_tick_ns: u64,
    /// CPUs of the host.
    pub cpus: u64,
    /// How often QEMU has stopped the guest so far.
    pub stops: u64,
}

impl Entity {
    /// Nothing said yet.
    #[must_use]
    pub fn new(scope: Scope, name: &str) -> Self {
        let metrics = scope.metrics().len();
        Self {
            name: name.to_owned(),
            scope,
            figures: vec![[Figures::default(); SourceKind::COUNT]; metrics],
            pairs: Vec::new(),
            histograms: BTreeMap::new(),
            culprits: BTreeMap::new(),
            ledger: History::default(),
            ages_s: Distribution::default(),
            stale: (0, 0),
            disk: None,
            interface: None,
            unobservable: None,
            trails: vec![std::array::from_fn(|_| Trail::default()); metrics],
            progress: [Progress::default(); 2],
            backlog: 0,
            lately: Lately::default(),
            said: 0,
        }
    }

    /// Takes what the domain's configuration says of this entity.
    pub fn describe(&mut self, domain: &DomainFacts) {
        match self.scope {
            Scope::Disk => {
                if let Some(disk) = domain.disks.iter().find(|d| d.target == self.name) {
                    let text = |of: &Option<String>| of.clone().unwrap_or_default();
                    self.disk = Some((text(&disk.format), text(&disk.cache)));
                    self.unobservable.clone_from(&disk.observable_reason);
                }
            }
            Scope::Interface => {
                if let Some(of) = domain.interfaces.iter().find(|i| i.device == self.name) {
                    self.interface = Some(of.kind.clone());
                    self.unobservable.clone_from(&of.observable_reason);
                }
            }
            _ => {}
        }
    }

    /// Adds what a sample says.
    pub fn add(&mut self, row: &Row, around: &Surroundings<'_>, watches: &mut [Watch]) {
        self.add_details(row, around);
        let in_progress = [self.follow(row, 0), self.follow(row, 1)];
        let backlog = self.value(row, "rx_backlog_packets", SourceKind::Ebpf);
        let most_backlog = backlog.map(|now| now.max(self.backlog));
        self.backlog = backlog.unwrap_or(0);
        if let (Some(packets), Some(window)) = (most_backlog, around.windows[SourceKind::Ebpf as usize]) {
            self.lately.add(packets, window.end.0);
        }
        let irq = self.grown(row, "irq_ns");
        for (index, def) in self.scope.metrics().iter().enumerate() {
            for source in SourceKind::ALL {
                let (Some(value), Some(window)) =
                    (row.values[index][source as usize], around.windows[source as usize])
                else {
                    continue;
                };
                let reading = Reading { window, value };
                self.take(def, source, reading);
                for watch in watches.iter_mut().filter(|w| w.wants(def, &self.name)) {
                    let doing = in_progress[usize::from(def.name == "wait_ns")];
                    let lacks = may_lack(def, source, around, (&row.state, doing));
                    watch.add(def, source, truth::Report { reading, lacks });
                    if let Some(packets) = most_backlog {
                        watch.note_backlog(window, packets);
                    }
                    if let (Some(age_s), SourceKind::Libvirt) = (row.age_s, source) {
                        watch.note_age(window, age_s);
                    }
                }
            }
        }
        self.pair_up(around);
        let (mut pairs, image) = (std::mem::take(&mut self.pairs), self.disk.clone());
        for pair in &mut pairs {
            let subject = subject(pair.def, (pair.reference, pair.other), around, image.as_ref());
            let doing = in_progress[usize::from(pair.def.name == "wait_ns")];
            let source = if pair.reference == SourceKind::Ebpf { pair.other } else { SourceKind::Libvirt };
            let moment = Moment {
                irq,
                lately_backlog_packets: self.lately.most(),
                stops: around.stops,
                backlog_packets: most_backlog,
                value: row.values[pair.def.metric.index_in_scope()][pair.other as usize].unwrap_or(0),
                ..moment_of(source, (&row.state, doing))
            };
            self.compare(pair, (row, around), (&subject, &moment));
        }
        self.pairs = pairs;
    }

    fn compare(
        &self,
        pair: &mut Pair,
        (row, around): (&Row, &Surroundings<'_>),
        (subject, moment): (&Subject<'_>, &Moment<'_>),
    ) {
        let trail = self.trail(pair.reference_def, pair.reference);
        pair.settle(trail, self.beside(pair));
        let value = row.values[pair.def.metric.index_in_scope()][pair.other as usize];
        if let (Some(value), Some(window)) = (value, around.windows[pair.other as usize]) {
            pair.add(Reading { window, value }, subject, moment);
            pair.settle(trail, self.beside(pair));
        }
    }

    /// Judges what still waits for a later reading of the reference.
    pub fn finish(&mut self) {
        let mut pairs = std::mem::take(&mut self.pairs);
        for pair in &mut pairs {
            pair.finish(self.trail(pair.reference_def, pair.reference), self.beside(pair));
        }
        self.pairs = pairs;
    }

    /// Counters start anew.
    pub fn restart(&mut self) {
        self.finish();
        for pair in &mut self.pairs {
            pair.restart();
        }
        for figures in self.figures.iter_mut().flatten() {
            figures.end_of_counter();
        }
        self.trails.iter_mut().flatten().for_each(Trail::clear);
        self.progress = [Progress::default(); 2];
        self.backlog = 0;
    }

    fn trail(&self, def: &MetricDef, source: SourceKind) -> &Trail {
        &self.trails[def.metric.index_in_scope()][source as usize]
    }

    fn beside(&self, pair: &Pair) -> Beside<'_> {
        let of = |index: Option<usize>| index.map(|i| &self.trails[i][pair.reference as usize]);
        Beside { swapped: of(pair.swapped_index), packets: of(pair.packets_index) }
    }

    fn take(&mut self, def: &'static MetricDef, source: SourceKind, reading: Reading) {
        let index = def.metric.index_in_scope();
        let figures = &mut self.figures[index][source as usize];
        if figures.last.is_some_and(|last| reading.window.begin <= last.window.begin) {
            return; // The same reading again: nothing was read since.
        }
        let backwards =
            def.kind == Kind::Counter && figures.last.is_some_and(|last| reading.value < last.value);
        if backwards {
            figures.backwards += 1;
            figures.end_of_counter();
            self.trails[index][source as usize].clear();
            let of = |pair: &&mut Pair| {
                (pair.def.metric == def.metric && pair.other == source)
                    || (pair.reference_def.metric == def.metric && pair.reference == source)
            };
            self.pairs.iter_mut().filter(of).for_each(Pair::restart);
        }
        self.figures[index][source as usize].add(def.kind, reading);
        self.trails[index][source as usize].push(reading);
    }

    /// Makes the comparisons that became possible.
    fn pair_up(&mut self, around: &Surroundings<'_>) {
        let said = self.figures.iter().flatten().filter(|f| f.readings > 0).count();
        if std::mem::replace(&mut self.said, said) == said {
            return;
        }
        let read = |of: &Self, def: &MetricDef, source: SourceKind| {
            of.figures[def.metric.index_in_scope()][source as usize].readings > 0
        };
        let metrics = self.scope.metrics();
        let named = |name: &str| metrics.iter().find(|d| d.name == name);
        let related = RELATIONS.iter().filter(|r| r.0 == self.scope);
        let related = related.filter_map(|(_, a, b, cause)| Some((named(a)?, named(b)?, Some(*cause))));
        let mut wanted = Vec::new();
        for (reference_def, def, relation) in metrics.iter().map(|d| (d, d, None)).chain(related) {
            let Some(reference) = trusted(reference_def).find(|s| read(self, reference_def, *s)) else {
                continue;
            };
            for other in trusted(def).filter(|s| read(self, def, *s)) {
                let itself = relation.is_none() && other == reference;
                let known = self.pairs.iter().any(|p| {
                    (p.reference_def.metric, p.def.metric) == (reference_def.metric, def.metric)
                        && (p.reference, p.other) == (reference, other)
                });
                if !itself && !known {
                    wanted.push(((reference_def, def), (reference, other), relation));
                }
            }
        }
        for (defs, sources, relation) in wanted {
            let subject = subject(defs.1, sources, around, self.disk.as_ref());
            let mut pair = Pair::new(defs, sources, &subject, relation);
            if relation.is_some() {
                pair.causes = relation.into_iter().collect();
                pair.restart();
            } else if defs.1.kind == Kind::Counter {
                pair.swapped_index = counterpart(defs.1.name).and_then(|n| position(self.scope, &n));
                pair.packets_index = packets_of(self.scope, defs.1.name);
            }
            self.pairs.push(pair);
        }
    }

    fn add_details(&mut self, row: &Row, around: &Surroundings<'_>) {
        for (name, buckets) in &row.histograms {
            let sum = self.histograms.entry(name.clone()).or_default();
            for [low, high, count] in buckets {
                let high = if *high == u64::MAX { *low } else { *high };
                sum.add_many(low + high.saturating_sub(*low) / 2, *count);
            }
        }
        for culprit in &row.culprits {
            let full = self.culprits.len() >= CULPRITS;
            let key = (culprit.who.clone(), culprit.kind.clone());
            let key = if full && !self.culprits.contains_key(&key) {
                ("others".to_owned(), "other".to_owned())
            } else {
                key
            };
            *self.culprits.entry(key).or_default() += culprit.ns;
        }
        if let Some(age) = row.age_s {
            self.ages_s.add(age);
            self.stale.0 += u64::from(row.stale == Some(true));
            self.stale.1 += 1;
        }
        self.add_ledger(row, around);
    }

    fn add_ledger(&mut self, row: &Row, around: &Surroundings<'_>) {
        let Some(window) = around.windows[SourceKind::Ebpf as usize] else { return };
        if self.scope != Scope::Vcpu {
            return;
        }
        let grown = LEDGER.map(|name| {
            let index = self.scope.metrics().iter().position(|d| d.name == name)?;
            let last = self.figures[index][SourceKind::Ebpf as usize].last?;
            let now = row.values[index][SourceKind::Ebpf as usize]?;
            Some((last.window.begin.0, real(now.checked_sub(last.value)?)))
        });
        let Some((from, _)) = grown[0] else { return };
        self.ledger.add((from, window.begin.0), grown.map(|g| g.map_or(0.0, |(_, ns)| ns)));
    }

    /// The value of a metric by name, if the table has it and the row does.
    fn value(&self, row: &Row, name: &str, source: SourceKind) -> Option<u64> {
        let index = self.scope.metrics().iter().position(|d| d.name == name)?;
        row.values[index][source as usize]
    }

    fn grown(&self, row: &Row, name: &str) -> u64 {
        let Some(index) = self.scope.metrics().iter().position(|d| d.name == name) else { return 0 };
        let last = self.figures[index][SourceKind::Ebpf as usize].last.map(|l| l.value);
        let now = row.values[index][SourceKind::Ebpf as usize];
        now.zip(last).map_or(0, |(now, last)| now.saturating_sub(last))
    }

    /// Follows how long a vCPU has been running (0) or waiting (1) at most.
    fn follow(&mut self, row: &Row, what: usize) -> Progress {
        if self.scope != Scope::Vcpu {
            return Progress::default();
        }
        let (name, doing) = [("run_ns", "running"), ("wait_ns", "waiting")][what];
        let values = self.scope.metrics().iter().position(|d| d.name == name).map(|i| row.values[i]);
        let now = values.and_then(|v| v.into_iter().flatten().next());
        let progress = &mut self.progress[what];
        if let Some(now) = now {
            let grown = progress.last.map_or(0, |last| now.saturating_sub(last));
            progress.last = Some(now);
            progress.most = progress.carried.saturating_add(grown);
            progress.carried = if row.state == doing { progress.most } else { 0 };
        }
        *progress
    }
}

/// By how much a reading may be short of what was true when it was taken: clock ticks, runs and waits in progress.
fn may_lack(
    def: &'static MetricDef,
    source: SourceKind,
    around: &Surroundings<'_>,
    (state, progress): (&str, Progress),
) -> u64 {
    if source == SourceKind::Ebpf {
        return 0;
    }
    let subject = subject(def, (SourceKind::Ebpf, source), around, None);
    let moment = moment_of(source, (state, progress));
    let causes = [Cause::Tick, Cause::OpenRun, Cause::OpenWait].into_iter().filter(|c| c.applies(&subject));
    let lacks = causes.fold(Allowance::NOTHING, |sum, cause| sum.and(cause.allows(&subject, &moment))).low;
    u64::try_from(-lacks).unwrap_or(u64::MAX)
}

/// What is known of a vCPU when a source other than eBPF was read. libvirt is read at another moment, at which nobody
/// knows what the thread did.
fn moment_of<'a>(source: SourceKind, (state, progress): (&'a str, Progress)) -> Moment<'a> {
    let ours = source != SourceKind::Libvirt;
    let in_progress = if ours { progress.carried } else { progress.most };
    Moment { state: if ours { state } else { "" }, in_progress, ..Moment::default() }
}

fn subject<'a>(
    def: &'static MetricDef,
    (reference, other): (SourceKind, SourceKind),
    around: &Surroundings<'_>,
    image: Option<&'a (String, String)>,
) -> Subject<'a> {
    let (clock_tick_ns, cpus) = (around.clock_tick_ns, around.cpus);
    let [image_format, image_cache] = image.map_or([None; 2], |(format, cache)| {
        [format, cache].map(|text| Some(text.as_str()).filter(|text| !text.is_empty()))
    });
    Subject { def, reference, other, image_format, image_cache, clock_tick_ns, cpus }
}

/// The name of the same counter in the other direction.
#[must_use]
pub fn counterpart(name: &str) -> Option<String> {
    [("rx_", "tx_"), ("tx_", "rx_"), ("rd_", "wr_"), ("wr_", "rd_")]
        .into_iter()
        .find_map(|(this, that)| name.strip_prefix(this).map(|rest| format!("{that}{rest}")))
}

/// The sources of a metric, the most trusted first; those that only a newer program knows of as well.
pub(super) fn trusted(def: &'static MetricDef) -> impl Iterator<Item = SourceKind> {
    let more = SourceKind::ALL.into_iter().filter(|s| !def.sources.contains(s));
    let (ebpf, rest): (Vec<_>, Vec<_>) = more.partition(|s| *s == SourceKind::Ebpf);
    ebpf.into_iter().chain(def.sources.iter().copied()).chain(rest)
}

/// The position of a metric in its scope, by name.
fn position(scope: Scope, name: &str) -> Option<usize> {
    scope.metrics().iter().position(|d| d.name == name)
}

/// The packets that go with a counter of an interface's bytes.
fn packets_of(scope: Scope, name: &str) -> Option<usize> {
    let direction = name.strip_suffix("_bytes").filter(|_| scope == Scope::Interface)?;
    position(scope, &format!("{direction}_packets"))
}

impl Figures {
    fn add(&mut self, kind: Kind, reading: Reading) {
        self.readings += 1;
        self.grain.add(reading.value);
        if let Some(last) = self.last {
            let gap = reading.window.begin.since(last.window.begin);
            self.changes += u64::from(reading.value != last.value);
            self.longest_gap_ns = self.longest_gap_ns.max(gap);
            self.span_ns += gap;
            if kind == Kind::Counter {
                self.total += real(reading.value.saturating_sub(last.value));
            }
        }
        if kind == Kind::Gauge {
            self.total += real(reading.value);
        }
        self.first.get_or_insert(reading);
        self.last = Some(reading);
    }

    /// The grain of its values; `None` while there are too few to tell.
    #[must_use]
    pub fn resolution(&self) -> Option<u64> {
        const ENOUGH: u64 = 5;
        self.grain.get().filter(|_| self.changes >= ENOUGH)
    }

    fn end_of_counter(&mut self) {
        (self.first, self.last) = (None, None);
    }
}

#[cfg(test)]
mod tests {
    use super::Lately;

    #[test]
    fn a_queue_that_was_long_is_remembered_for_a_while() {
        let mut lately = Lately::default();
        let most =
            [(1, 5), (8, 478), (12, 0), (17, 299), (23, 0), (35, 0), (46, 0)].map(|(second, packets)| {
                lately.add(packets, (100 + second) * 1_000_000_000);
                lately.most()
            });
        assert_eq!(most, [5, 478, 478, 478, 299, 0, 0]);
    }
}
