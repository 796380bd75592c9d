//! Compares the sources of a stream: lines in, a [`Report`] out. Pure: no I/O, no clock, no JSON; the same lines
//! give the same report.
//!
//! Memory grows with the domains, their devices and their metrics, not with the length of the stream.

pub mod amount;
mod claim;
pub mod entity;
mod findings;
pub mod input;
pub mod pair;
pub mod report;
pub mod stats;
pub mod truth;
mod verdict;

use std::collections::BTreeMap;

use entity::{Entity, Surroundings};
use input::{Input, Kind};
pub use report::Report;
use stats::Distribution;
use truth::{Truth, Watch};

use crate::{
    metric::Scope,
    record::{
        SCHEMA_VERSION,
        read::{DomainFacts, DomainLine, EventLine, HealthLine, Line, SampleLine, SessionLine, SummaryLine},
    },
    units::{DomainUuid, SourceKind},
};

/// Events after which QEMU runs no instruction of the guest.
const STOPS: [&str; 5] = ["paused", "stopped", "migrated", "crashed", "io_error"];

/// Everything compared so far.
#[derive(Debug, Default)]
pub struct Comparison {
    /// What was wrong with the lines.
    pub input: Input,
    hosts: Vec<HostState>,
    domains: BTreeMap<(usize, DomainUuid), DomainState>,
    truths: Vec<Truth>,
    events: BTreeMap<String, u64>,
    own: Own,
    /// The last session is one that can be read.
    reading: bool,
    summary_missing: bool,
}

/// One host and its sessions.
#[derive(Clone, Debug)]
struct HostState {
    session: SessionLine,
    sessions: u64,
    first_ts: String,
    last_ts: String,
    first_mono_ns: u64,
    last_mono_ns: u64,
    /// Wall clock minus monotonic clock at the last sample, nanoseconds.
    clock_offset_ns: Option<i128>,
}

/// One domain.
#[derive(Debug)]
struct DomainState {
    name: String,
    facts: DomainFacts,
    epoch: u32,
    seq: Option<u64>,
    mono_ns: u64,
    samples: u64,
    /// How often QEMU has stopped the guest.
    stops: u64,
    cpu: Entity,
    memory: Entity,
    vcpus: Vec<Entity>,
    interfaces: Vec<Entity>,
    disks: Vec<Entity>,
    watches: Vec<Watch>,
}

/// What the monitor says of itself.
#[derive(Clone, Debug, Default)]
struct Own {
    health: Option<HealthLine>,
    ended: Vec<HealthLine>,
    summaries: Vec<SummaryLine>,
    /// Time from tick to tick less the interval, nanoseconds.
    late: Distribution,
    /// Time each source's reading took, nanoseconds.
    windows: [Distribution; SourceKind::COUNT],
    interval_ns: u64,
}

impl Comparison {
    /// Nothing compared yet; `truths` are known exactly.
    #[must_use]
    pub fn new(truths: Vec<Truth>) -> Self {
        Self { truths, ..Self::default() }
    }

    /// Takes a line of that number; a sample's content is in `sample`.
    pub fn take(&mut self, number: u64, line: Line, sample: &SampleLine) {
        match line {
            Line::Session(session) => self.session(number, *session),
            Line::Other(kind) => self.input.note(Kind::UnknownType, number, || kind),
            Line::Sample if !self.reading => self.outside(number),
            Line::Sample => self.sample(number, sample),
            _ if !self.reading => {}
            Line::Domain(domain) => self.domain(&domain),
            Line::Event(event) => self.event(&event),
            Line::Health(health) => self.own.health = Some(health),
            Line::Summary(summary) => {
                self.summary_missing = false;
                self.own.end();
                self.own.summaries.push(summary);
            }
        }
    }

    fn outside(&mut self, number: u64) {
        let kind = if self.hosts.is_empty() && !self.input.problems.contains_key(&Kind::OtherVersion) {
            Kind::NoSession
        } else {
            Kind::OtherVersion
        };
        self.input.note(kind, number, String::new);
    }

    fn session(&mut self, number: u64, session: SessionLine) {
        if session.schema_version != SCHEMA_VERSION {
            let version = session.schema_version;
            self.reading = false;
            self.input.note(Kind::OtherVersion, number, || {
                format!("schema_version {version}, this program reads {SCHEMA_VERSION}")
            });
            return;
        }
        if self.summary_missing {
            self.input.note(Kind::NoSummary, number, String::new);
        }
        (self.reading, self.summary_missing) = (true, true);
        self.own.end();
        self.own.interval_ns = session.interval_ns;
        let host = &session.host;
        let same = |h: &HostState| {
            (&h.session.host.hostname, &h.session.host.boot_id) == (&host.hostname, &host.boot_id)
        };
        if let Some(at) = self.hosts.iter().position(same) {
            self.input.note(Kind::Restarted, number, || host.hostname.clone());
            for (_, domain) in self.domains.range_mut((at, DomainUuid([0; 16]))..=(at, DomainUuid([255; 16])))
            {
                domain.restart();
                domain.seq = None;
            }
            let mut known = self.hosts.remove(at);
            known.sessions += 1;
            known.session = session;
            self.hosts.push(known);
            self.renumber(at);
            return;
        }
        if !self.hosts.is_empty() {
            self.input.note(Kind::OtherHost, number, || host.hostname.clone());
        }
        self.hosts.push(HostState {
            first_ts: session.clock.ts.clone(),
            last_ts: session.clock.ts.clone(),
            first_mono_ns: session.clock.mono_ns,
            last_mono_ns: session.clock.mono_ns,
            clock_offset_ns: None,
            sessions: 1,
            session,
        });
    }

    /// The host at that place became the last one.
    fn renumber(&mut self, moved: usize) {
        let last = self.hosts.len() - 1;
        if moved == last {
            return;
        }
        let domains = std::mem::take(&mut self.domains);
        let place = |host: usize| match host {
            h if h == moved => last,
            h if h > moved => h - 1,
            h => h,
        };
        self.domains = domains.into_iter().map(|((host, uuid), d)| ((place(host), uuid), d)).collect();
    }

    fn domain(&mut self, line: &DomainLine) {
        let Ok(uuid) = line.domain.uuid.parse() else { return };
        let Some(host) = self.hosts.len().checked_sub(1) else { return };
        let domain = self.domains.entry((host, uuid)).or_insert_with(|| DomainState::new(&line.domain.name));
        domain.name.clone_from(&line.domain.name);
        domain.facts = line.domain.clone();
        domain.describe();
        if domain.watches.is_empty() {
            domain.watches = watches(&self.truths, &domain.name);
        }
    }

    fn event(&mut self, event: &EventLine) {
        *self.events.entry(event.kind.clone()).or_default() += 1;
        let Some(host) = self.hosts.len().checked_sub(1) else { return };
        let uuid = event.domain.as_ref().and_then(|domain| domain.uuid.parse().ok());
        if let Some(domain) = uuid.and_then(|uuid| self.domains.get_mut(&(host, uuid)))
            && STOPS.contains(&event.kind.as_str())
        {
            domain.stops += 1;
        }
    }

    fn sample(&mut self, number: u64, sample: &SampleLine) {
        let (Some(uuid), Some(host)) = (sample.uuid, self.hosts.len().checked_sub(1)) else { return };
        let truths = &self.truths;
        let domain = self.domains.entry((host, uuid)).or_insert_with(|| {
            let mut domain = DomainState::new(&sample.name);
            domain.watches = watches(truths, &sample.name);
            domain
        });
        if domain.seq.is_some() && sample.mono_ns <= domain.mono_ns {
            self.input.note(Kind::Reordered, number, || {
                format!("{}: {} ns after {} ns", domain.name, sample.mono_ns, domain.mono_ns)
            });
            return;
        }
        if let Some(seq) = domain.seq.filter(|seq| sample.seq > seq + 1 && sample.epoch == domain.epoch) {
            self.input.note(Kind::Missing, number, || {
                format!("{}: {} samples before number {}", domain.name, sample.seq - seq - 1, sample.seq)
            });
        }
        if sample.epoch != domain.epoch && domain.seq.is_some() {
            domain.restart();
        }
        (domain.seq, domain.mono_ns, domain.epoch) = (Some(sample.seq), sample.mono_ns, sample.epoch);
        domain.samples += 1;
        self.input.samples += 1;
        let state = &mut self.hosts[host];
        state.follow_clock(sample, |text| self.input.note(Kind::ClockStep, number, || text));
        let hz = state.session.host.hz.max(1);
        let around = Surroundings {
            windows: &sample.windows,
            clock_tick_ns: 1_000_000_000 / hz,
            cpus: state.session.host.cpus,
            stops: domain.stops,
        };
        self.own.tick(sample);
        domain.add(sample, &around);
    }

    /// The lines end here: judges what still waits.
    pub(crate) fn close(&mut self) {
        if self.summary_missing {
            let lines = self.input.lines;
            self.input.note(Kind::NoSummary, lines, String::new);
        }
        self.own.end();
        for domain in self.domains.values_mut() {
            domain.entities_mut().for_each(|entity| entity.finish());
        }
    }

    /// The end of the stream, and what was found. A limit on unexplained differences, in per cent, makes the report
    /// say whether one exceeds it.
    #[must_use]
    pub fn finish(mut self, limit_pct: Option<f64>) -> Report {
        self.close();
        report::build(&self, limit_pct)
    }
}

fn watches(truths: &[Truth], name: &str) -> Vec<Watch> {
    truths.iter().filter(|t| t.domain == name).cloned().map(Watch::new).collect()
}

impl HostState {
    /// Notices when the wall clock was set; slewing (500 ppm at most) is no step.
    fn follow_clock(&mut self, sample: &SampleLine, step: impl FnOnce(String)) {
        const SLEW_PER_NS: i128 = 1_000;
        const SMALL_NS: i128 = 50_000_000;
        let passed = i128::from(sample.mono_ns.saturating_sub(self.last_mono_ns));
        self.last_mono_ns = self.last_mono_ns.max(sample.mono_ns);
        let Ok(wall) = sample.ts.parse::<jiff::Timestamp>() else { return };
        if self.last_ts != sample.ts {
            self.last_ts.clone_from(&sample.ts);
        }
        let offset = wall.as_nanosecond() - i128::from(sample.mono_ns);
        if let Some(before) = self.clock_offset_ns.replace(offset) {
            let moved = offset - before;
            if moved.abs() > SMALL_NS + passed / SLEW_PER_NS {
                step(format!("by {} ms", moved / 1_000_000));
            }
        }
    }
}

impl DomainState {
    fn new(name: &str) -> Self {
        Self {
            name: name.to_owned(),
            facts: DomainFacts::default(),
            epoch: 0,
            seq: None,
            mono_ns: 0,
            samples: 0,
            stops: 0,
            cpu: Entity::new(Scope::Cpu, ""),
            memory: Entity::new(Scope::Memory, ""),
            vcpus: Vec::new(),
            interfaces: Vec::new(),
            disks: Vec::new(),
            watches: Vec::new(),
        }
    }

    fn add(&mut self, sample: &SampleLine, around: &Surroundings<'_>) {
        self.cpu.add(&sample.cpu, around, &mut self.watches);
        self.memory.add(&sample.memory, around, &mut self.watches);
        let lists = [
            (Scope::Vcpu, &mut self.vcpus, &sample.vcpus),
            (Scope::Interface, &mut self.interfaces, &sample.interfaces),
            (Scope::Disk, &mut self.disks, &sample.disks),
        ];
        for (scope, entities, rows) in lists {
            for (place, row) in rows.get().iter().enumerate() {
                // Mostly in the same order as in the line before.
                let same = entities.get(place).is_some_and(|e| e.name == row.name);
                let found = if same { Some(place) } else { entities.iter().position(|e| e.name == row.name) };
                let at = found.unwrap_or_else(|| {
                    let mut entity = Entity::new(scope, &row.name);
                    entity.describe(&self.facts);
                    entities.push(entity);
                    entities.len() - 1
                });
                entities[at].add(&row.row, around, &mut self.watches);
            }
        }
    }

    fn describe(&mut self) {
        let facts = std::mem::take(&mut self.facts);
        self.entities_mut().for_each(|entity| entity.describe(&facts));
        self.facts = facts;
    }

    fn restart(&mut self) {
        self.entities_mut().for_each(|entity| entity.restart());
    }

    fn entities(&self) -> impl Iterator<Item = &Entity> {
        let lists = self.vcpus.iter().chain(&self.interfaces).chain(&self.disks);
        std::iter::once(&self.cpu).chain(lists).chain(std::iter::once(&self.memory))
    }

    fn entities_mut(&mut self) -> impl Iterator<Item = &mut Entity> {
        let lists = self.vcpus.iter_mut().chain(&mut self.interfaces).chain(&mut self.disks);
        std::iter::once(&mut self.cpu).chain(lists).chain(std::iter::once(&mut self.memory))
    }
}

impl Own {
    fn tick(&mut self, sample: &SampleLine) {
        if sample.seq > 0 {
            self.late.add(sample.interval_ns.abs_diff(self.interval_ns));
        }
        for (sum, window) in self.windows.iter_mut().zip(&sample.windows) {
            if let Some(window) = window {
                sum.add(window.end.since(window.begin));
            }
        }
    }

    /// A session ended: its last health line is its sum.
    fn end(&mut self) {
        self.ended.extend(self.health.take());
    }
}
