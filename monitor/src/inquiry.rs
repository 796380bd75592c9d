//! When libvirt is asked for what, and what its answers and its silence mean.
//!
//! Pure policy on top of [`Libvirt`]: `run` calls [`Inquiry::tick`] at each tick and [`Inquiry::take`] with every
//! update, and acts on the [`News`]. Knows no metric, no record and no clock: time is an argument.

use std::{collections::BTreeSet, time::Duration};

use crate::{
    inventory::MonitorState,
    record::SourceInfo,
    source::libvirt::{
        Connected, Control, DomainEvent, Duty, Groups, Libvirt, LibvirtSample, Request, Update, What,
    },
    units::{DomainUuid, MonotonicNs, duration_ns},
};

/// Without an answer for so long, or for two intervals, libvirt counts as lost.
const DEADLINE: Duration = Duration::from_secs(5);
/// A QEMU that has not answered for so long, or for half an interval, is passed by.
const PATIENCE: Duration = Duration::from_secs(1);
/// Shortest patience: a QEMU that is busy with its guest may well take so long.
const LEAST_PATIENCE: Duration = Duration::from_millis(250);

/// Every so many reads of what QEMU tells bring [`Groups::rare`] as well.
const RARE: u64 = 6;

/// How often what is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Timing {
    /// Time between ticks; the moments at which it is asked.
    pub tick: Duration,
    /// Between reads of what libvirt knows by itself.
    pub fast: Duration,
    /// Between reads of what it asks QEMU for.
    pub slow: Duration,
}

/// What `run` has to know or do.
#[derive(Debug)]
pub enum News {
    /// The source is away. Said once.
    Lost(String),
    /// It is back.
    Back,
    /// A read failed, or the connection did.
    Failed(String),
    /// A read was due and not made.
    NotMade,
    /// Values and descriptions.
    Answer(Box<LibvirtSample>),
    /// A domain's QEMU does not answer libvirt, or does again.
    Monitor(DomainUuid, MonitorState),
    /// Something happened to a domain.
    Event(DomainEvent),
    /// Some events are lost; every domain is looked at again.
    EventsLost,
}

/// The connection to libvirt, and what is known of it.
pub struct Inquiry {
    source: Libvirt,
    timing: Timing,
    /// For the `session` line.
    pub info: SourceInfo,
    /// Whether the last we heard was good.
    up: bool,
    watched: Option<MonotonicNs>,
    counted: Option<MonotonicNs>,
    /// The counting worker is late, and that has been said.
    late_said: bool,
    /// Domains whose QEMU does not answer.
    silent: BTreeSet<DomainUuid>,
    /// Domains whose description is to be read.
    describe: BTreeSet<DomainUuid>,
    describe_all: bool,
    /// Domains on which a job runs, as far as we know.
    jobs: BTreeSet<DomainUuid>,
    jobs_asked: Option<MonotonicNs>,
    counts: u64,
}

impl Inquiry {
    /// Starts to connect.
    #[must_use]
    pub fn start(uri: &str, timing: Timing) -> Self {
        let details = [("uri", uri.to_owned())].into();
        Self {
            source: Libvirt::start(uri),
            timing,
            info: SourceInfo { available: false, reason: None, details },
            up: false,
            watched: None,
            counted: None,
            late_said: false,
            silent: BTreeSet::new(),
            describe: BTreeSet::new(),
            describe_all: false,
            jobs: BTreeSet::new(),
            jobs_asked: None,
            counts: 0,
        }
    }

    /// The next thing libvirt says, for [`Inquiry::take`]. Cancel safe.
    pub async fn next(&mut self) -> Update {
        self.source.next().await
    }

    /// Whether the last we heard was good.
    #[must_use]
    pub const fn is_up(&self) -> bool {
        self.up
    }

    /// Notes why there is no answer.
    pub fn lost(&mut self, reason: String) {
        self.up = false;
        self.info.available = false;
        self.info.reason = Some(reason);
    }

    /// Asks for what is due, and notices what is late.
    pub fn tick(&mut self, now: MonotonicNs) -> Vec<News> {
        let mut news = Vec::new();
        let deadline = DEADLINE.max(2 * self.timing.fast);
        if self.up && self.waits_longer(Duty::Watch, now, deadline) {
            let reason = format!("libvirt did not answer for {deadline:?}");
            self.lost(reason.clone());
            news.push(News::Lost(reason));
        } else if self.source.is_connected() && self.due(self.watched, self.timing.fast, now) {
            let late = self.waits_longer(Duty::Count, now, self.patience());
            self.watched = Some(now);
            let request = Request {
                groups: Some(Groups::fast()),
                look_for_silent: late || !self.silent.is_empty(),
                describe: self.take_describe(),
                jobs: Vec::new(),
            };
            if self.ask_watch(request).is_err() {
                news.push(News::NotMade);
            }
        }
        if self.up && self.due(self.counted, self.timing.slow, now) && self.count(now).is_err() {
            self.counted = Some(now);
            news.push(News::NotMade);
        }
        self.ask_jobs(now);
        if self.up && !self.late_said && self.waits_longer(Duty::Count, now, 2 * deadline) {
            self.late_said = true;
            news.push(News::Failed(
                "the values of QEMU take long, and no single domain is the cause".to_owned(),
            ));
        }
        news
    }

    /// What an update means.
    pub fn take(&mut self, update: Update, now: MonotonicNs) -> Vec<News> {
        match update {
            // It counts as back once it has answered.
            Update::Connected(connected) => {
                self.connected(&connected);
                self.watched = Some(now);
                self.describe.clear();
                let request = Request { groups: Some(Groups::fast()), ..Request::default() };
                // The worker has nothing else to do: it has just connected.
                let _ = self.source.watch(request);
                Vec::new()
            }
            Update::Lost { reason } | Update::Failed { reason } => {
                let was_up = self.up;
                self.lost(reason.clone());
                // What libvirt says next is of other moments; each kind is asked for at once.
                self.counted = None;
                let lost = was_up.then(|| News::Lost(reason.clone()));
                [News::Failed(reason)].into_iter().chain(lost).collect()
            }
            Update::NotCounted { reason } => vec![News::Failed(reason)],
            Update::Sample(answer) if answer.duty == Duty::Watch => self.take_watch(answer, now),
            Update::Sample(answer) => self.take_count(answer),
            Update::Event(event) => {
                match event.what {
                    What::JobPass => drop(self.jobs.insert(event.uuid)),
                    What::JobEnded => drop(self.jobs.remove(&event.uuid)),
                    _ => drop(self.describe.insert(event.uuid)),
                }
                self.describe_soon();
                vec![News::Event(event)]
            }
            Update::EventsLost => {
                self.describe_all = true;
                vec![News::EventsLost]
            }
        }
    }

    fn take_watch(&mut self, answer: Box<LibvirtSample>, now: MonotonicNs) -> Vec<News> {
        let mut news = Vec::new();
        if !std::mem::replace(&mut self.up, true) {
            self.info.available = true;
            self.info.reason = None;
            news.push(News::Back);
        }
        if std::mem::take(&mut self.describe_all) {
            self.describe.extend(answer.domains.iter().map(|stats| stats.uuid));
        }
        let mut stuck = false;
        for (uuid, control) in &answer.controls {
            // A job may hold a domain for hours and answer all the same; it counts only where an answer was incomplete.
            let blocked = matches!(control, Control::Occupied(time) if *time >= self.patience());
            stuck |= blocked;
            if matches!(control, Control::Job(_)) {
                self.jobs.insert(*uuid);
            }
            let busy = control.busy_for().is_some_and(|time| time >= self.patience());
            if blocked || !busy {
                news.extend(
                    self.mark(*uuid, if blocked { MonitorState::Silent } else { MonitorState::Answers }),
                );
            }
        }
        for uuid in &answer.gone {
            self.silent.remove(uuid);
            self.jobs.remove(uuid);
        }
        if stuck && self.waits_longer(Duty::Count, now, self.patience()) {
            // One of them holds up the others.
            if self.source.give_up_counting().is_err() {
                news.push(News::Failed(
                    "too many domains do not answer: QEMU's values are not asked for".to_owned(),
                ));
            } else {
                self.counted = None;
            }
        }
        // Values of a new domain are not waited for until the next round.
        if (self.counted.is_none() || !answer.described.is_empty())
            && self.source.outstanding_since(Duty::Count).is_none()
        {
            // The worker has nothing else to do.
            let _ = self.count(now);
        }
        news.push(News::Answer(answer));
        self.describe_soon();
        news
    }

    fn take_count(&mut self, answer: Box<LibvirtSample>) -> Vec<News> {
        let mut news = Vec::new();
        for stats in &answer.domains {
            let control =
                answer.controls.iter().find(|(uuid, _)| *uuid == stats.uuid).map(|(_, control)| *control);
            if let Some(Control::Job(_)) = control {
                self.jobs.insert(stats.uuid);
            }
            let state = match control {
                None => MonitorState::Answers,
                Some(Control::Occupied(time)) if time >= self.patience() => MonitorState::Silent,
                Some(Control::Job(time)) if time >= self.patience() => MonitorState::InJob,
                // Just now somebody else asks it something.
                Some(_) => continue,
            };
            news.extend(self.mark(stats.uuid, state));
        }
        for (uuid, _) in answer.jobs.iter().filter(|(_, job)| job.is_none()) {
            self.jobs.remove(uuid);
        }
        self.describe.extend(&answer.changed);
        news.push(News::Answer(answer));
        self.describe_soon();
        news
    }

    fn mark(&mut self, uuid: DomainUuid, state: MonitorState) -> Option<News> {
        let changed =
            if state == MonitorState::Answers { self.silent.remove(&uuid) } else { self.silent.insert(uuid) };
        changed.then_some(News::Monitor(uuid, state))
    }

    fn count(&mut self, now: MonotonicNs) -> Result<(), ()> {
        let groups = if self.counts.is_multiple_of(RARE) { Groups::rare() } else { Groups::slow() };
        let jobs = self.jobs.iter().copied().collect();
        let request = Request { groups: Some(groups), jobs, ..Request::default() };
        self.source.count(request).map_err(|_| ())?;
        self.late_said = false;
        self.counts += 1;
        self.counted = Some(now);
        self.jobs_asked = Some(now);
        Ok(())
    }

    /// A job is followed at each read: it is over soon. One that cannot be asked for now is next time.
    fn ask_jobs(&mut self, now: MonotonicNs) {
        if self.up && !self.jobs.is_empty() && self.due(self.jobs_asked, self.timing.fast, now) {
            let request = Request { jobs: self.jobs.iter().copied().collect(), ..Request::default() };
            if self.source.count(request).is_ok() {
                self.jobs_asked = Some(now);
            }
        }
    }

    /// Asks for descriptions alone, unless there is a request under way: then they go with the next.
    fn describe_soon(&mut self) {
        let idle = self.source.is_connected() && self.source.outstanding_since(Duty::Watch).is_none();
        if idle && !self.describe.is_empty() {
            let request = Request { describe: self.take_describe(), ..Request::default() };
            // It was just seen to be idle.
            let _ = self.ask_watch(request);
        }
    }

    fn take_describe(&mut self) -> Vec<DomainUuid> {
        std::mem::take(&mut self.describe).into_iter().collect()
    }

    /// What could not be asked is asked next time.
    fn ask_watch(&mut self, request: Request) -> Result<(), ()> {
        let describe = request.describe.clone();
        self.source.watch(request).map_err(|_| self.describe.extend(describe))
    }

    fn waits_longer(&self, duty: Duty, now: MonotonicNs, than: Duration) -> bool {
        self.source.outstanding_since(duty).is_some_and(|since| now.since(since) >= duration_ns(than))
    }

    fn due(&self, last: Option<MonotonicNs>, every: Duration, now: MonotonicNs) -> bool {
        // A tick may come a little early; a quarter of an interval is not worth waiting a whole one.
        let slack = duration_ns(self.timing.tick) / 4;
        last.is_none_or(|last| now.since(last) + slack >= duration_ns(every))
    }

    fn patience(&self) -> Duration {
        (self.timing.fast / 2).clamp(LEAST_PATIENCE, PATIENCE)
    }

    fn connected(&mut self, connected: &Connected) {
        self.info.available = true;
        self.info.reason = None;
        let version = |v: Option<_>| v.map(|v: crate::source::libvirt::Version| v.to_string());
        let details = [
            ("uri", Some(connected.uri.clone())),
            ("client_version", version(connected.client_version)),
            ("library_version", version(connected.library_version)),
            ("hypervisor", connected.hypervisor.clone()),
        ];
        self.info.details.extend(details.into_iter().filter_map(|(key, value)| Some((key, value?))));
    }
}
