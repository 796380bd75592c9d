//! The thread that owns the connection: connects, answers requests one by one, reconnects.
//!
//! Everything here may block in libvirt. The other side only sends requests and receives updates, so a stuck call
//! holds up nothing but this thread.

use std::{
    collections::{HashMap, HashSet},
    sync::mpsc::{Receiver, RecvTimeoutError},
    time::Duration,
};

use tokio::sync::mpsc::Sender;

use super::{
    Described, Groups, LibvirtSample, Update,
    connection::{Connection, Record},
    error::LibvirtError,
    stats::DeviceMark,
    xml,
};
use crate::{
    inventory::Domain,
    units::{DomainUuid, MonotonicNs, Window},
};

/// Wait before the first new attempt to connect.
const FIRST_BACKOFF: Duration = Duration::from_millis(250);
/// Longest wait between attempts.
const LONGEST_BACKOFF: Duration = Duration::from_secs(10);

/// Serves requests until the other side is dropped.
pub(super) fn run(uri: &str, requests: &Receiver<Groups>, updates: &Sender<Update>) {
    let mut worker = Worker { collector: Collector::default(), backoff: FIRST_BACKOFF, last_reason: None };
    while let Ok(()) = worker.connect_and_serve(uri, requests, updates) {}
}

/// The other side is gone.
struct Dropped;

struct Worker {
    collector: Collector,
    backoff: Duration,
    /// What was last reported as the reason of the loss; the same is not said twice in a row.
    last_reason: Option<String>,
}

impl Worker {
    fn connect_and_serve(
        &mut self,
        uri: &str,
        requests: &Receiver<Groups>,
        updates: &Sender<Update>,
    ) -> Result<(), Dropped> {
        match Connection::open_read_only(uri) {
            Ok(connection) => {
                send(updates, Update::Connected(connection.describe(uri)))?;
                self.last_reason = None;
                self.collector.forget_devices();
                let reason = self.serve(&connection, requests, updates)?;
                self.report_loss(updates, reason)?;
            }
            Err(error) => self.report_loss(updates, error.one_line())?,
        }
        self.pause(requests, updates)
    }

    /// Answers requests until the connection breaks, and says why it did.
    fn serve(
        &mut self,
        connection: &Connection,
        requests: &Receiver<Groups>,
        updates: &Sender<Update>,
    ) -> Result<String, Dropped> {
        loop {
            let groups = requests.recv().map_err(|_| Dropped)?;
            match self.collector.collect(connection, groups) {
                Ok(sample) => {
                    self.backoff = FIRST_BACKOFF;
                    send(updates, Update::Sample(Box::new(sample)))?;
                }
                Err(error) if connection.is_alive() => {
                    send(updates, Update::Failed { reason: error.one_line() })?;
                }
                Err(error) => return Ok(error.one_line()),
            }
        }
    }

    fn report_loss(&mut self, updates: &Sender<Update>, reason: String) -> Result<(), Dropped> {
        if self.last_reason.as_ref() == Some(&reason) {
            return Ok(());
        }
        self.last_reason = Some(reason.clone());
        send(updates, Update::Lost { reason })
    }

    /// Waits before the next attempt, and ends early when the other side is dropped.
    fn pause(&mut self, requests: &Receiver<Groups>, updates: &Sender<Update>) -> Result<(), Dropped> {
        let wait = self.backoff;
        self.backoff = (wait * 2).min(LONGEST_BACKOFF);
        match requests.recv_timeout(wait) {
            Err(RecvTimeoutError::Timeout) => Ok(()),
            Err(RecvTimeoutError::Disconnected) => Err(Dropped),
            // Requests are only made while connected; one that crossed the loss is answered by it.
            Ok(_) => send(updates, Update::Lost { reason: self.last_reason.clone().unwrap_or_default() }),
        }
    }
}

/// Waits while the queue is full: an update is never dropped, and the other side reads in its own time.
fn send(updates: &Sender<Update>, update: Update) -> Result<(), Dropped> {
    updates.blocking_send(update).map_err(|_| Dropped)
}

/// What is remembered of a domain between collections.
#[derive(Default)]
struct Known {
    id: Option<u32>,
    devices: DeviceMark,
    /// Its XML was read since it appeared or since the last change.
    described: bool,
}

/// Collects, and knows which domains were there before.
#[derive(Default)]
pub(super) struct Collector {
    known: HashMap<DomainUuid, Known>,
}

impl Collector {
    /// After a reconnect everything is described again: changes may have been missed.
    fn forget_devices(&mut self) {
        self.known.values_mut().for_each(|known| *known = Known::default());
    }

    pub(super) fn collect(
        &mut self,
        connection: &Connection,
        groups: Groups,
    ) -> Result<LibvirtSample, LibvirtError> {
        let begin = MonotonicNs::now();
        let records = connection.all_domain_stats(groups)?;
        let window = Window { begin, end: MonotonicNs::now() };
        let mut sample = LibvirtSample::empty(window, groups);
        for record in records.iter() {
            if let Err(error) = self.take(&record, &mut sample) {
                sample.errors.push(error.one_line());
            }
        }
        self.find_gone(&mut sample);
        Ok(sample)
    }

    fn take(&mut self, record: &Record<'_>, sample: &mut LibvirtSample) -> Result<(), LibvirtError> {
        let uuid = record.uuid()?;
        let (stats, devices) = record.stats(uuid);
        let known = self.known.entry(uuid).or_default();
        let changed = known.devices.update(devices) || known.id != stats.id;
        known.id = stats.id;
        known.described &= !changed;
        let (id, state) = (stats.id, stats.state);
        sample.domains.push(stats);
        if known.described {
            return Ok(());
        }
        let Some(text) = record.xml()? else { return Ok(()) };
        // Text that cannot be read would not be readable at the next collection either.
        known.described = true;
        match xml::parse_domain(&text) {
            Ok(domain) => {
                let state = state.unwrap_or_default();
                sample.described.push(Described { domain: Domain { id: id.or(domain.id), state, ..domain } });
            }
            Err(error) => sample.errors.push(format!("domain {uuid}: {}", chain(&error))),
        }
        Ok(())
    }

    fn find_gone(&mut self, sample: &mut LibvirtSample) {
        let present: HashSet<_> = sample.domains.iter().map(|stats| stats.uuid).collect();
        sample.gone.extend(self.known.keys().filter(|uuid| !present.contains(uuid)));
        self.known.retain(|uuid, _| present.contains(uuid));
    }
}

fn chain(error: &dyn std::error::Error) -> String {
    error.source().map_or_else(|| error.to_string(), |source| format!("{error}: {source}"))
}
