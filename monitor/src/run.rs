//! The main job: ticks, calls sources and sink in order, stops cleanly.
//!
//! One task owns all state. libvirt answers when it does, on a thread of its own; a tick never waits for it.
//! Knows no metric by name.

use std::{collections::BTreeMap, os::fd::OwnedFd, path::PathBuf, time::Duration};

use tokio::{
    io::{Interest, unix::AsyncFd},
    time::Instant,
};

use crate::{
    cli::{Config, Mode},
    footprint,
    host::{self, Facts},
    inquiry::{Inquiry, News, Timing},
    pace::Pace,
    place::elsewhere,
    privilege::{self, Children, Programs, Way},
    record::{
        ClockPair, Domain, DomainName, DomainRecord, Event, EventKind, Health, Host, ProbeInfo,
        ProgramHealth, Record, SCHEMA_VERSION, Sample, Session, SourceInfo, Summary, Tick, timestamp,
    },
    sink::{Ndjson, SinkEnd, SinkError},
    source::{
        ebpf::{
            self, Ebpf,
            probes::{Need, ProbeState},
        },
        libvirt::{DomainEvent, LibvirtSample, Update, What},
    },
    tracker::{Notice, Tracked, Tracker, Wanted, Where, open_ebpf},
    units::{MonotonicNs, SourceKind, duration_ns, nanoseconds},
};

/// How long the first answer of libvirt is waited for before the stream begins.
const FIRST_ANSWER: Duration = Duration::from_secs(3);
/// The same where there is no stream without it: an ssh to a far or busy host takes its time.
const REQUIRED_ANSWER: Duration = Duration::from_secs(10);
/// Time between looks for processes, threads and devices that came or went.
const LOOK_INTERVAL: Duration = Duration::from_secs(1);
/// Time between looks at all of them, where the kernel programs tell of most.
const FULL_LOOK_INTERVAL: Duration = Duration::from_secs(10);
/// Least time between looks at what changed: in a storm of threads one look serves for many.
const LOOK_PAUSE: Duration = Duration::from_millis(20);
/// A change of the wall clock against the arithmetic one from here on is a step; slewing makes less of it between ticks
/// (0.05 % of an interval).
const CLOCK_STEP_NS: u128 = 500_000_000;
/// For how long a process that began or ended is looked at every [`LOOK_INTERVAL`], not only at ticks: QEMU opens its disks
/// and taps one after the other, and is still there when it begins to end.
const SETTLING: Duration = Duration::from_secs(10);
const HEALTH_INTERVAL: Duration = Duration::from_secs(60);
/// After so many ticks the start is over, and what it needed can go.
const SETTLED_TICKS: u64 = 3;
/// How long the reader of the stream gets to take the last lines.
const LAST_LINES: Duration = Duration::from_secs(2);

/// Why `run` fails.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// Asked for by name and impossible.
    #[error("--ebpf require: kernel probes cannot run: {0}")]
    EbpfRequired(String),
    /// Asked for by name and impossible.
    #[error("--probes: {name} cannot run: {reason}")]
    ProbeRequired {
        /// The program.
        name: &'static str,
        /// Why not.
        reason: String,
    },
    /// Asked for by name and impossible.
    #[error("--libvirt require: {0}")]
    LibvirtRequired(String),
    /// No domain of that name or UUID.
    #[error("no domain {0:?}; `kvm-monitor list` shows the domains there are")]
    UnknownDomain(String),
    /// No process of that name or UUID, and nobody to ask.
    #[error("no domain {0:?} among the QEMU processes in /proc, and libvirt does not tell: {1}")]
    UnknownWithoutLibvirt(String, String),
    /// The kernel gives no timer.
    #[error("cannot set a timer")]
    Timer(#[source] std::io::Error),
    /// The stream cannot be written.
    #[error(transparent)]
    Sink(#[from] SinkError),
}

/// Streams until `shutdown` says why to stop, the configured time is over, or the reader leaves.
///
/// # Errors
/// If a required source cannot work, a domain asked for does not exist, or the stream cannot be written.
pub async fn run(config: Config, shutdown: impl Future<Output = &'static str>) -> Result<(), RunError> {
    let sink = Ndjson::open(&config.output)?;
    run_into(config, sink, shutdown).await
}

/// As [`run`], into a sink that is open already.
///
/// # Errors
/// As [`run`].
pub async fn run_into(
    config: Config,
    sink: Ndjson,
    shutdown: impl Future<Output = &'static str>,
) -> Result<(), RunError> {
    let mut runner = Runner::start(config, sink).await?;
    let reason = match runner.until(shutdown).await? {
        End::Stop(reason) => reason,
        End::Sink(SinkEnd::ReaderLeft) => return Ok(()),
        End::Sink(SinkEnd::Failed(error)) => return Err(error.into()),
    };
    tracing::info!(reason, "stopping");
    runner.last_lines(reason);
    runner.sink.finish(LAST_LINES).await?;
    Ok(())
}

enum End {
    Stop(&'static str),
    Sink(SinkEnd),
}

struct Runner {
    config: Config,
    tracker: Tracker,
    libvirt: Option<Inquiry>,
    sink: Ndjson,
    started: MonotonicNs,
    last_tick: Option<MonotonicNs>,
    looked: MonotonicNs,
    /// When all of them were looked at.
    looked_fully: MonotonicNs,
    ticks: u64,
    ticks_missed: u64,
    ebpf_lost: bool,
    /// The wall clock less the arithmetic one at the last tick, nanoseconds.
    wall_offset: Option<i128>,
    /// Readable when the kernel programs saw threads or processes come or go.
    changes: Option<AsyncFd<OwnedFd>>,
    /// No look at changes before.
    look_after: Instant,
    /// When to look again at what began lately.
    look_again: Option<Instant>,
    /// Until then.
    settled: Instant,
}

impl Runner {
    async fn start(config: Config, sink: Ndjson) -> Result<Self, RunError> {
        privilege::raise_open_files();
        let elsewhere =
            (config.libvirt != Mode::Off).then(|| elsewhere(&config.uri, &host::hostname())).flatten();
        let ebpf = match (config.ebpf, &elsewhere) {
            (Mode::Off, _) => Err("switched off by --ebpf off".to_owned()),
            (Mode::Auto | Mode::Require, Some(reason)) => Err(reason.clone()),
            (Mode::Auto | Mode::Require, None) => open_ebpf(&Facts::read(), config.probe_groups()),
        };
        if let (Mode::Require, Err(reason)) = (config.ebpf, &ebpf) {
            return Err(RunError::EbpfRequired(reason.clone()));
        }
        let (ebpf, ebpf_reason) = match ebpf {
            Ok(ebpf) => (Some(ebpf), None),
            Err(reason) => (None, Some(reason)),
        };
        if let (Some(ebpf), Some(_)) = (&ebpf, &config.probes) {
            required_probes(ebpf)?;
        }
        let programs = if ebpf.is_some() { Programs::Run } else { Programs::Off };
        if let Err(error) = privilege::reduce(programs, Children::of(&config.uri), Way::of(&config.uri)) {
            tracing::warn!(%error, "capabilities that are not needed any more could not be given up");
        }
        let session_probes = probe_states(ebpf.as_ref(), ebpf_reason.as_deref());
        let wanted = Wanted::new(config.domains.clone());
        let slow = if ebpf.is_some() { config.libvirt_slow_interval } else { config.libvirt_interval };
        let timing = Timing { tick: config.interval, fast: config.libvirt_interval, slow };
        let now = MonotonicNs::now();
        let place = if elsewhere.is_some() { Where::Elsewhere } else { Where::Here };
        let mut this = Self {
            tracker: Tracker::at(place, PathBuf::from("/proc"), wanted.clone(), ebpf),
            libvirt: (config.libvirt != Mode::Off).then(|| Inquiry::start(&config.uri, timing)),
            sink,
            started: now,
            last_tick: None,
            looked: now,
            looked_fully: now,
            ticks: 0,
            ticks_missed: 0,
            ebpf_lost: false,
            wall_offset: None,
            changes: None,
            look_after: Instant::now(),
            look_again: None,
            settled: Instant::now(),
            config,
        };
        this.changes = this.tracker.ebpf().and_then(Ebpf::changes).and_then(watch);
        this.first_answer().await?;
        this.tracker.look();
        if let Some(unknown) = wanted.unknown(this.tracker.domains()).first() {
            let unknown = (*unknown).to_owned();
            return Err(match this.libvirt.and_then(|libvirt| libvirt.info.reason) {
                Some(reason) => RunError::UnknownWithoutLibvirt(unknown, reason),
                None => RunError::UnknownDomain(unknown),
            });
        }
        this.write_session(ebpf_reason, elsewhere, session_probes);
        this.write_notices();
        tracing::info!(domains = this.tracker.domains().len(), interval = ?this.config.interval, "streaming");
        Ok(this)
    }

    /// Waits for what libvirt says first.
    async fn first_answer(&mut self) -> Result<(), RunError> {
        let Some(libvirt) = &mut self.libvirt else { return Ok(()) };
        let patience = if self.config.libvirt == Mode::Require { REQUIRED_ANSWER } else { FIRST_ANSWER };
        let deadline = Instant::now() + patience;
        while !libvirt.is_up() && libvirt.info.reason.is_none() {
            let Ok(update) = tokio::time::timeout_at(deadline, libvirt.next()).await else {
                libvirt.lost(format!("libvirt at {} did not answer within {patience:?}", self.config.uri));
                break;
            };
            for news in libvirt.take(update, MonotonicNs::now()) {
                if let News::Answer(answer) = news {
                    self.tracker.take_libvirt(*answer);
                }
            }
        }
        match (&self.config.libvirt, &libvirt.info.reason) {
            (Mode::Require, Some(reason)) => Err(RunError::LibvirtRequired(reason.clone())),
            _ => Ok(()),
        }
    }

    async fn until(&mut self, shutdown: impl Future<Output = &'static str>) -> Result<End, RunError> {
        let mut ticks = Pace::start(self.config.interval).map_err(RunError::Timer)?;
        let mut health = tokio::time::interval_at(Instant::now() + HEALTH_INTERVAL, HEALTH_INTERVAL);
        // Set once: to set a timer anew at each tick costs as much as the rest of waiting.
        let end = sleep_until(self.config.duration.map(|duration| Instant::now() + duration));
        tokio::pin!(shutdown, end);
        loop {
            tokio::select! {
                biased;
                reason = &mut shutdown => return Ok(End::Stop(reason)),
                sink_end = self.sink.ended() => return Ok(End::Sink(sink_end)),
                missed = ticks.next() => self.tick(missed),
                update = next_update(&mut self.libvirt) => self.libvirt_says(update),
                () = changed(self.changes.as_ref(), self.look_after) => self.look_at_changes(),
                () = sleep_until(self.look_again) => self.look_again(),
                _ = health.tick() => self.write_health(),
                () = &mut end => return Ok(End::Stop("the time given by --duration is over")),
            }
            self.sink.flush();
        }
    }

    fn tick(&mut self, missed: u64) {
        let now = MonotonicNs::now();
        let interval_ns = self.last_tick.map_or(duration_ns(self.config.interval), |last| now.since(last));
        self.last_tick = Some(now);
        self.ticks += 1;
        self.ticks_missed += missed;
        if now.since(self.looked) >= duration_ns(LOOK_INTERVAL) {
            self.look(now);
        }
        self.tracker.read_ebpf();
        self.watch_ebpf();
        self.tracker.read_procfs(self.config.interval);
        self.ask_libvirt(now);
        let wall = jiff::Timestamp::now();
        self.watch_clock(wall);
        self.tracker.tell_falls();
        self.write_notices();
        self.write_samples(&Tick::new(wall, now, interval_ns));
        tracing::debug!(number = self.ticks, interval_ns, domains = self.tracker.domains().len(), "tick");
        if self.ticks == SETTLED_TICKS {
            footprint::release();
        }
    }

    fn look(&mut self, now: MonotonicNs) {
        self.looked = now;
        let every =
            if self.changes.is_some() && self.tracker.is_told() { FULL_LOOK_INTERVAL } else { LOOK_INTERVAL };
        if now.since(self.looked_fully) >= duration_ns(every) {
            self.looked_fully = now;
            self.tracker.look();
        } else {
            self.tracker.look_briefly();
        }
    }

    fn look_at_changes(&mut self) {
        self.look_after = Instant::now() + LOOK_PAUSE;
        if self.tracker.look_at_changes() {
            let now = Instant::now();
            self.settled = now + SETTLING;
            self.look_again.get_or_insert(now + LOOK_INTERVAL);
        }
        self.write_notices();
        self.write_first_samples();
    }

    fn look_again(&mut self) {
        self.looked = MonotonicNs::now();
        self.tracker.look_for_processes();
        self.tracker.look_briefly();
        self.write_notices();
        self.write_first_samples();
        let next = Instant::now() + LOOK_INTERVAL;
        self.look_again = (next <= self.settled).then_some(next);
    }

    /// Says that the wall clock was set. Nothing is computed from it.
    fn watch_clock(&mut self, wall: jiff::Timestamp) {
        let offset = wall.as_nanosecond() - i128::from(MonotonicNs::now().0);
        let step = self.wall_offset.replace(offset).map_or(0, |before| offset - before);
        if step.unsigned_abs() >= CLOCK_STEP_NS {
            let milliseconds = step / 1_000_000;
            let (seconds, rest) = (milliseconds / 1000, (milliseconds % 1000).unsigned_abs());
            let detail =
                format!("the wall clock was set by {seconds}.{rest:03} s, or the host slept for so long");
            self.write_event(EventKind::ClockStep, &detail);
        }
    }

    /// Says once that the kernel programs cannot be read any more, and once that they can again.
    fn watch_ebpf(&mut self) {
        if self.tracker.ebpf().is_none() {
            return;
        }
        let lost = self.tracker.ebpf_failed();
        if lost != std::mem::replace(&mut self.ebpf_lost, lost) {
            let (kind, detail) = if lost {
                let error = self.tracker.count(SourceKind::Ebpf).last_error.clone();
                (EventKind::SourceLost, format!("ebpf: {}", error.unwrap_or_default()))
            } else {
                (EventKind::SourceBack, "ebpf: reading works again".to_owned())
            };
            self.write_event(kind, &detail);
        }
    }

    fn ask_libvirt(&mut self, now: MonotonicNs) {
        let Some(libvirt) = &mut self.libvirt else { return };
        let news = libvirt.tick(now);
        self.act(news);
    }

    fn libvirt_says(&mut self, update: Update) {
        let Some(libvirt) = &mut self.libvirt else { return };
        let news = libvirt.take(update, MonotonicNs::now());
        self.act(news);
        self.write_notices();
        self.write_first_samples();
    }

    fn act(&mut self, news: Vec<News>) {
        for news in news {
            match news {
                News::Lost(reason) => {
                    self.write_event(EventKind::SourceLost, &format!("libvirt: {reason}"));
                }
                News::Back => self.write_event(EventKind::SourceBack, "libvirt: answers again"),
                News::Failed(reason) => {
                    let count = self.tracker.count(SourceKind::Libvirt);
                    count.errors += 1;
                    count.last_error = Some(reason);
                }
                News::NotMade => self.tracker.count(SourceKind::Libvirt).lost += 1,
                News::Answer(answer) => self.take_answer(*answer),
                News::Monitor(domain, state) => self.tracker.monitor_is(domain, state),
                News::Event(event) => self.happened(&event),
                News::EventsLost => {
                    let detail = "libvirt: events came too fast, every domain is looked at again";
                    self.write_event(EventKind::LostEvents, detail);
                }
            }
        }
    }

    fn take_answer(&mut self, answer: LibvirtSample) {
        let (new, gone) = (!answer.described.is_empty(), !answer.gone.is_empty());
        self.tracker.take_libvirt(answer);
        if new && self.tracker.has_unfound() || gone {
            self.tracker.look_for_processes();
        }
    }

    /// A domain that stops goes with its process, which ends about now.
    fn happened(&mut self, event: &DomainEvent) {
        self.tracker.happened(event);
        if matches!(event.what, What::Stopped | What::MigratedAway) {
            self.tracker.look_for_processes();
        }
    }

    /// A domain that is new is sampled at once, not when the next tick is due.
    fn write_first_samples(&mut self) {
        // Before the first tick there is no sample to be ahead of.
        if self.last_tick.is_none() || !self.tracker.read_new() {
            return;
        }
        let interval_ns = duration_ns(self.config.interval);
        let tick = Tick::new(jiff::Timestamp::now(), MonotonicNs::now(), interval_ns);
        self.write_samples_of(&tick, Tracked::is_new);
    }

    fn write_session(
        &mut self,
        ebpf_reason: Option<String>,
        procfs_reason: Option<String>,
        probes: Vec<ProbeInfo>,
    ) {
        let place = if procfs_reason.is_some() { Where::Elsewhere } else { Where::Here };
        let wall = jiff::Timestamp::now();
        let mono = MonotonicNs::now();
        let libvirt = self.libvirt.as_ref().map_or_else(
            || SourceInfo {
                available: false,
                reason: Some("switched off by --libvirt off".to_owned()),
                details: BTreeMap::new(),
            },
            |libvirt| libvirt.info.clone(),
        );
        let caveat = self.tracker.ebpf().and_then(Ebpf::kvm_caveat);
        let details = caveat.map(|caveat| ("kvm", caveat.to_owned())).into_iter().collect();
        let ebpf = SourceInfo { available: ebpf_reason.is_none(), reason: ebpf_reason, details };
        let procfs = SourceInfo {
            available: procfs_reason.is_none(),
            reason: procfs_reason,
            details: BTreeMap::new(),
        };
        let session = Session {
            schema_version: SCHEMA_VERSION,
            tool_version: env!("CARGO_PKG_VERSION"),
            host: this_host(),
            clock: ClockPair { arithmetic: "CLOCK_MONOTONIC", mono_ns: mono.0, ts: timestamp(wall) },
            interval_ns: duration_ns(self.config.interval),
            sources: [("ebpf", ebpf), ("libvirt", libvirt), ("procfs", procfs)].into(),
            probes,
        };
        // Where the domains are elsewhere, nobody expects their processes here.
        let unexpected =
            session.sources.iter().filter(|(name, _)| place == Where::Here || **name != "procfs");
        for (name, source) in unexpected {
            if let Some(reason) = source.reason.as_ref().filter(|r| !r.starts_with("switched off")) {
                tracing::warn!(source = name, reason, "source not available, going on without it");
            }
        }
        self.sink.write(&Record::Session(session));
    }

    fn write_notices(&mut self) {
        for notice in self.tracker.notices() {
            let (ts, mono_ns) = now();
            match &notice {
                Notice::Domain { change, reason, epoch, domain, since_ns } => {
                    let domain = Domain::new(domain, since_ns.clone());
                    let record = DomainRecord { ts, mono_ns, change: *change, reason, epoch: *epoch, domain };
                    self.sink.write(&Record::Domain(record));
                }
                Notice::Event { kind, domain, detail } => {
                    let domain = domain.as_ref().map(|(uuid, name)| DomainName { uuid: *uuid, name });
                    self.sink.write(&Record::Event(Event { ts, mono_ns, kind: *kind, domain, detail }));
                }
            }
        }
    }

    fn write_event(&mut self, kind: EventKind, detail: &str) {
        let (ts, mono_ns) = now();
        tracing::warn!(detail, "event");
        self.sink.write(&Record::Event(Event { ts, mono_ns, kind, domain: None, detail }));
    }

    fn write_samples(&mut self, tick: &Tick) {
        self.write_samples_of(tick, |_| true);
    }

    fn write_samples_of(&mut self, tick: &Tick, which: impl Fn(&Tracked) -> bool) {
        for tracked in self.tracker.domains_mut().iter_mut().filter(|tracked| which(tracked)) {
            let sample = Sample::new(tick, tracked.subject());
            self.sink.write(&Record::Sample(sample));
            tracked.seq += 1;
            tracked.sample.written();
        }
    }

    fn write_health(&mut self) {
        let (ts, mono_ns) = now();
        let sources = SourceKind::ALL.map(|s| (s.name(), self.tracker.count(s).clone().into()));
        let programs = self.tracker.ebpf().map(program_health).unwrap_or_default();
        let misses = self.tracker.ebpf().map(Ebpf::misses).unwrap_or_default();
        let health = Health {
            ts,
            mono_ns,
            sources: sources.into(),
            programs,
            misses: misses.into_iter().collect(),
            cpu_ns: own_cpu_ns(),
            rss_bytes: own_rss_bytes(),
        };
        self.sink.write(&Record::Health(health));
    }

    fn last_lines(&mut self, reason: &'static str) {
        self.write_notices();
        self.write_health();
        let summary = Summary {
            ts: now().0,
            reason,
            records: self.sink.written().clone(),
            ticks: self.ticks,
            ticks_missed: self.ticks_missed,
            records_dropped: self.sink.dropped(),
            wall_ns: MonotonicNs::now().since(self.started),
            cpu_ns: own_cpu_ns(),
        };
        self.sink.write(&Record::Summary(summary));
    }
}

async fn next_update(libvirt: &mut Option<Inquiry>) -> Update {
    match libvirt {
        Some(libvirt) => libvirt.next().await,
        None => std::future::pending().await,
    }
}

/// Lets the runtime watch a descriptor; `None` if it cannot, and then a look comes once a second only.
fn watch(fd: OwnedFd) -> Option<AsyncFd<OwnedFd>> {
    // SAFETY: an owned descriptor stays the same open file until the `AsyncFd` that owns it is dropped.
    unsafe { AsyncFd::register_with_interest(fd, Interest::READABLE) }.ok()
}

/// Until the kernel programs saw threads or processes come or go; not before `after`.
async fn changed(changes: Option<&AsyncFd<OwnedFd>>, after: Instant) {
    let Some(changes) = changes else { return std::future::pending().await };
    if after > Instant::now() {
        tokio::time::sleep_until(after).await;
    }
    match changes.readable().await {
        Ok(mut ready) => ready.clear_ready(),
        Err(_) => std::future::pending().await,
    }
}

async fn sleep_until(end: Option<Instant>) {
    match end {
        Some(end) => tokio::time::sleep_until(end).await,
        None => std::future::pending().await,
    }
}

fn now() -> (String, u64) {
    (timestamp(jiff::Timestamp::now()), MonotonicNs::now().0)
}

fn this_host() -> Host {
    Host {
        hostname: host::hostname(),
        kernel: host::release(),
        boot_id: std::fs::read_to_string("/proc/sys/kernel/random/boot_id")
            .ok()
            .map(|id| id.trim().to_owned()),
        cpus: std::thread::available_parallelism().map_or(1, std::num::NonZero::get),
        numa_nodes: host::numa_nodes(),
        hz: rustix::param::clock_ticks_per_second(),
    }
}

/// An error if a group that was asked for by name lacks what it cannot do without.
fn required_probes(ebpf: &Ebpf) -> Result<(), RunError> {
    let missing = ebpf.states().iter().find_map(|(probe, state)| match state {
        ProbeState::Failed(reason) if probe.need == Need::Required => Some((probe.program, reason.clone())),
        _ => None,
    });
    match missing {
        Some((name, reason)) => Err(RunError::ProbeRequired { name, reason }),
        None => Ok(()),
    }
}

/// What became of each program; if none was loaded, the reason for all of them.
fn probe_states(ebpf: Option<&Ebpf>, reason: Option<&str>) -> Vec<ProbeInfo> {
    let Some(ebpf) = ebpf else {
        let off = |probe: &ebpf::probes::Probe| ProbeInfo {
            name: probe.program,
            state: "off",
            reason: reason.map(str::to_owned),
        };
        return ebpf::probes::PROBES.iter().map(off).collect();
    };
    ebpf.states().iter().map(|(probe, state)| state.info(probe)).collect()
}

fn program_health(ebpf: &Ebpf) -> BTreeMap<&'static str, ProgramHealth> {
    let health = |run: ebpf::ProgramRuns| ProgramHealth { run_count: run.count, run_ns: run.ns };
    ebpf.runs().into_iter().map(|(name, runs)| (name, health(runs))).collect()
}

fn own_cpu_ns() -> u64 {
    let t = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
    nanoseconds(t.tv_sec, t.tv_nsec)
}

fn own_rss_bytes() -> Option<u64> {
    let statm = std::fs::read_to_string("/proc/self/statm").ok()?;
    let pages: u64 = statm.split_ascii_whitespace().nth(1)?.parse().ok()?;
    pages.checked_mul(u64::try_from(rustix::param::page_size()).ok()?)
}
