//! The threads that own the connections: connect, answer requests one by one, reconnect.
//!
//! Everything here may block in libvirt. The other side only sends requests and receives what is said, so a stuck
//! call holds up nothing but its thread. There are two kinds ([`Duty`]), so that a QEMU which does not answer can hold
//! up the numbers it is asked for, but not the knowledge of which domains there are.

use std::{
    collections::{HashMap, HashSet},
    sync::mpsc::{Receiver, RecvTimeoutError},
    time::{Duration, Instant},
};

use tokio::sync::mpsc::Sender;

use super::{
    Described, Duty, LaneId, LibvirtSample, Request, Said, Update,
    connection::{Connection, DomainRef, Record},
    error::LibvirtError,
    events::EventSink,
    stats::DeviceMark,
    xml,
};
use crate::{
    inventory::{Domain, DomainState},
    privilege,
    units::{DomainUuid, MonotonicNs, Window},
};

/// Wait before the first new attempt to connect.
const FIRST_BACKOFF: Duration = Duration::from_millis(250);
/// Longest wait between attempts.
const LONGEST_BACKOFF: Duration = Duration::from_secs(10);
/// Every description is read again after so long: an event may have been missed, and not every change has one.
pub(super) const RESYNC: Duration = Duration::from_secs(300);

/// Who a worker is and where it speaks to.
#[derive(Clone)]
pub(super) struct Voice {
    pub(super) duty: Duty,
    pub(super) lane: LaneId,
    /// Where events go; counting workers bring none.
    pub(super) events: Option<EventSink>,
    pub(super) to: Sender<Said>,
}

impl Voice {
    /// Waits while the queue is full: an update is never dropped, and the other side reads in its own time.
    fn say(&self, update: Update) -> Result<(), Dropped> {
        self.to.blocking_send(Said { lane: self.lane, update }).map_err(|_| Dropped)
    }
}

/// Serves requests until the other side is dropped. A watching worker brings events if it is given a sink for them.
pub(super) fn run(uri: &str, voice: &Voice, requests: &Receiver<Request>) {
    let collector = Collector::new(voice.duty);
    let mut worker =
        Worker { uri, voice, requests, collector, backoff: FIRST_BACKOFF, pending: None, last_reason: None };
    while let Ok(()) = worker.connect_and_serve() {}
}

/// The other side is gone.
struct Dropped;

struct Worker<'a> {
    uri: &'a str,
    voice: &'a Voice,
    requests: &'a Receiver<Request>,
    collector: Collector,
    backoff: Duration,
    /// Why a counting worker connects.
    pending: Option<Request>,
    /// What was last reported as the reason of the loss; the same is not said twice in a row.
    last_reason: Option<String>,
}

impl Worker<'_> {
    /// A watching worker connects whenever it has no connection; a counting one to answer, so that a daemon that is
    /// away is told by one of them.
    fn connect_and_serve(&mut self) -> Result<(), Dropped> {
        if self.voice.duty == Duty::Count {
            self.pending = Some(self.requests.recv().map_err(|_| Dropped)?);
        }
        match privilege::with_way(|| Connection::open_read_only(self.uri)) {
            Ok(mut connection) => {
                connection.keep_alive();
                if let Some(events) = &self.voice.events {
                    connection.register(events);
                }
                if self.voice.duty == Duty::Watch {
                    self.voice.say(Update::Connected(connection.describe(self.uri)))?;
                }
                self.last_reason = None;
                self.collector.forget_devices();
                let reason = self.serve(&connection)?;
                self.report_loss(reason)?;
            }
            Err(error) => self.report_loss(error.one_line())?,
        }
        if self.voice.duty == Duty::Count { Ok(()) } else { self.pause() }
    }

    /// Answers requests until the connection breaks, and says why it did.
    fn serve(&mut self, connection: &Connection) -> Result<String, Dropped> {
        loop {
            let request = match self.pending.take() {
                Some(request) => request,
                None => self.requests.recv().map_err(|_| Dropped)?,
            };
            match self.collector.collect(connection, &request) {
                Ok(sample) => {
                    self.backoff = FIRST_BACKOFF;
                    self.voice.say(Update::Sample(Box::new(sample)))?;
                }
                Err(error) if connection.is_alive() => {
                    self.voice.say(Update::Failed { reason: error.one_line() })?;
                }
                Err(error) => return Ok(error.one_line()),
            }
        }
    }

    fn report_loss(&mut self, reason: String) -> Result<(), Dropped> {
        let asked = self.voice.duty == Duty::Count;
        if !asked && self.last_reason.as_ref() == Some(&reason) {
            return Ok(());
        }
        self.last_reason = Some(reason.clone());
        self.voice.say(Update::Lost { reason })
    }

    /// Waits before the next attempt, and ends early when the other side is dropped.
    fn pause(&mut self) -> Result<(), Dropped> {
        let until = Instant::now() + self.backoff;
        self.backoff = (self.backoff * 2).min(LONGEST_BACKOFF);
        loop {
            match self.requests.recv_timeout(until.saturating_duration_since(Instant::now())) {
                Err(RecvTimeoutError::Timeout) => return Ok(()),
                Err(RecvTimeoutError::Disconnected) => return Err(Dropped),
                // A request that crossed the loss is answered by it.
                Ok(_) => {
                    self.voice.say(Update::Lost { reason: self.last_reason.clone().unwrap_or_default() })?
                }
            }
        }
    }
}

/// What is remembered of a domain between collections.
#[derive(Default)]
struct Known {
    id: Option<u32>,
    devices: DeviceMark,
    /// When its XML was read, since it appeared or since the last change.
    described: Option<Instant>,
}

/// Collects, and knows which domains were there before.
pub(super) struct Collector {
    duty: Duty,
    known: HashMap<DomainUuid, Known>,
    /// Old descriptions that may still be read again in this collection.
    renewals: usize,
}

impl Collector {
    pub(super) fn new(duty: Duty) -> Self {
        Self { duty, known: HashMap::new(), renewals: 0 }
    }

    /// Makes all descriptions older.
    #[cfg(test)]
    pub(super) fn age(&mut self, by: Duration) {
        let described = self.known.values_mut().filter_map(|known| known.described.as_mut());
        described.for_each(|at| *at = at.checked_sub(by).unwrap());
    }

    /// After a reconnect everything is described again: changes may have been missed.
    fn forget_devices(&mut self) {
        self.known.values_mut().for_each(|known| *known = Known::default());
    }

    pub(super) fn collect(
        &mut self,
        connection: &Connection,
        request: &Request,
    ) -> Result<LibvirtSample, LibvirtError> {
        let begin = MonotonicNs::now();
        let mut sample = LibvirtSample::empty(self.duty, Window { begin, end: begin });
        if let Some(groups) = request.groups {
            let records = connection.all_domain_stats(groups)?;
            sample.window.end = MonotonicNs::now();
            sample.collected = true;
            // So that not all of many are due at once.
            self.renewals = 1 + self.known.len() / 100;
            for record in records.iter() {
                if let Err(error) = self.take(&record, request.look_for_silent, &mut sample) {
                    sample.errors.push(error.one_line());
                }
            }
            self.find_gone(&mut sample);
        }
        for uuid in &request.jobs {
            let job = connection.domain(*uuid).and_then(|domain| domain.map_or(Ok(None), |d| d.job()));
            match job {
                Ok(job) => sample.jobs.push((*uuid, job)),
                Err(error) => sample.errors.push(error.one_line()),
            }
        }
        for uuid in &request.describe {
            let described = sample.described.iter().any(|d| d.domain.uuid == *uuid);
            if let Some(domain) = if described { None } else { connection.domain(*uuid)? } {
                self.describe_again(*uuid, &domain, &mut sample)?;
            }
        }
        Ok(sample)
    }

    fn take(
        &mut self,
        record: &Record<'_>,
        look_for_silent: bool,
        sample: &mut LibvirtSample,
    ) -> Result<(), LibvirtError> {
        let uuid = record.uuid()?;
        let (stats, devices) = record.stats(uuid);
        let silent = self.duty == Duty::Count && stats.lacks_what_qemu_tells();
        if silent || look_for_silent {
            sample.controls.push((uuid, record.control()?));
        }
        let known = self.known.entry(uuid).or_default();
        let changed = known.devices.update(devices) || known.id.is_some() && known.id != stats.id;
        known.id = stats.id;
        let (id, state) = (stats.id, stats.state);
        sample.domains.push(stats);
        if self.duty == Duty::Count {
            sample.changed.extend(changed.then_some(uuid));
            return Ok(());
        }
        let old = known.described.is_some_and(|at| at.elapsed() > RESYNC);
        let renew = old && self.renewals > 0;
        self.renewals -= usize::from(renew);
        if known.described.is_some() && !changed && !renew {
            return Ok(());
        }
        let Some(text) = record.xml()? else { return Ok(()) };
        // Text that cannot be read would not be readable at the next collection either.
        known.described = Some(Instant::now());
        describe(uuid, &text, (id, state.unwrap_or_default()), sample);
        Ok(())
    }

    fn describe_again(
        &mut self,
        uuid: DomainUuid,
        domain: &DomainRef<'_>,
        sample: &mut LibvirtSample,
    ) -> Result<(), LibvirtError> {
        // An inactive one has no id.
        let Some(id) = domain.id() else { return Ok(()) };
        let Some(text) = domain.xml()? else { return Ok(()) };
        let known = self.known.entry(uuid).or_default();
        (known.id, known.described) = (Some(id), Some(Instant::now()));
        describe(uuid, &text, (Some(id), DomainState::Unknown), sample);
        Ok(())
    }

    fn find_gone(&mut self, sample: &mut LibvirtSample) {
        let present: HashSet<_> = sample.domains.iter().map(|stats| stats.uuid).collect();
        sample.gone.extend(self.known.keys().filter(|uuid| !present.contains(uuid)));
        self.known.retain(|uuid, _| present.contains(uuid));
    }
}

/// Id and state of the run go with it: a description does not tell the state.
fn describe(uuid: DomainUuid, text: &str, run: (Option<u32>, DomainState), sample: &mut LibvirtSample) {
    match xml::parse_domain(text) {
        Ok(domain) => {
            let (id, state) = run;
            sample.described.push(Described { domain: Domain { id: id.or(domain.id), state, ..domain } });
        }
        Err(error) => sample.errors.push(format!("domain {uuid}: {}", crate::one_line(&error))),
    }
}
