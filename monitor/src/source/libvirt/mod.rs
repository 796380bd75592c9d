//! libvirt: which domains exist, what happens to them, and what the daemon and QEMU count.
//!
//! Data comes from read-only connections: the bulk call `virConnectGetAllDomainStats` for numbers, the XML of a domain
//! when it is new or changed, and domain events. libvirt's calls block, so threads of their own make them, on a
//! connection each ([`Duty`]): one watches what libvirt knows by itself, one counts what it has to ask QEMU for. A QEMU
//! that does not answer holds up the counting worker alone; that is then left to itself
//! ([`Libvirt::give_up_counting`]), and since its call holds the domain's job, the next one passes that domain by
//! (NOWAIT). The asynchronous side asks, goes on, and applies its own deadlines. Knows no metric, no other source and
//! no output.

mod connection;
mod error;
mod events;
mod job;
pub mod stats;
mod worker;
pub mod xml;

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
        mpsc::{self as std_mpsc, RecvTimeoutError},
    },
    thread,
    time::Duration,
};

use tokio::sync::mpsc;

use crate::{
    inventory::Domain,
    units::{DomainUuid, MonotonicNs, Window},
};

pub use connection::{Connected, Control, Groups, Version};
pub use error::{CallError, LibvirtError, describe_open_error};
use events::EventSink;
pub use events::{DomainEvent, What};
pub use job::Job;
use stats::DomainStats;
use worker::{Collector, Voice};

/// Updates that wait to be read; answers and a few changes of the connections.
const QUEUE: usize = 8;
/// Events that wait to be read. One that finds the queue full is lost, and that is said.
const EVENT_QUEUE: usize = 1024;
/// Workers that may be stuck in a call at a time. Each keeps a thread of the daemon, which by default has 20 for all its
/// clients.
const MOST_STUCK: usize = 4;

/// What a worker and its connection are for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Duty {
    /// Which domains there are, their descriptions, state, interfaces and events: libvirt answers by itself.
    Watch,
    /// Numbers that libvirt asks QEMU for.
    Count,
}

/// What is said by this source.
#[derive(Debug)]
pub enum Update {
    /// A connection stands; requests are answered from now on, and every domain is described again.
    Connected(Connected),
    /// There is no connection (any more). Said once per reason while attempts go on; answers an outstanding request.
    Lost {
        /// Cause and fix, one line.
        reason: String,
    },
    /// A collection failed, but the connection stands. Answers the outstanding request.
    Failed {
        /// What failed and why, one line.
        reason: String,
    },
    /// Counting failed or has no connection. Answers the outstanding request for counts.
    NotCounted {
        /// Cause, one line.
        reason: String,
    },
    /// A collection. Answers the outstanding request of its duty.
    Sample(Box<LibvirtSample>),
    /// Something happened to a domain.
    Event(DomainEvent),
    /// Events came faster than they were read, and some are lost.
    EventsLost,
}

/// What a worker is asked for.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Request {
    /// Numbers of all domains.
    pub groups: Option<Groups>,
    /// For every domain: whether its QEMU keeps libvirt waiting. Takes a call each.
    pub look_for_silent: bool,
    /// Domains to be described whatever is known of them.
    pub describe: Vec<DomainUuid>,
    /// Domains whose job is asked for. QEMU answers: for counting workers.
    pub jobs: Vec<DomainUuid>,
}

/// One collection.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LibvirtSample {
    /// Who collected.
    pub duty: Duty,
    /// Numbers were asked for; else it holds descriptions only.
    pub collected: bool,
    /// Around the bulk call only; the XML of new domains is read after it.
    pub window: Window,
    /// Every active domain.
    pub domains: Vec<DomainStats>,
    /// Domains whose XML was read: new, restarted under another id, with other devices than before, asked for, or
    /// because it was long ago.
    pub described: Vec<Described>,
    /// Domains whose devices are others than before, but were not described: counting reads no XML.
    pub changed: Vec<DomainUuid>,
    /// What libvirt does with the QEMU of those that were looked at: all if asked for; when counting, those that lack
    /// what only QEMU tells.
    pub controls: Vec<(DomainUuid, Control)>,
    /// The jobs asked for; none where no job runs (any more).
    pub jobs: Vec<(DomainUuid, Option<Job>)>,
    /// Domains that were there at the last collection and are no longer active.
    pub gone: Vec<DomainUuid>,
    /// What went wrong for single domains, one line each. A domain in `domains` may lack its description then.
    pub errors: Vec<String>,
}

impl LibvirtSample {
    const fn empty(duty: Duty, window: Window) -> Self {
        Self {
            duty,
            collected: false,
            window,
            domains: Vec::new(),
            described: Vec::new(),
            changed: Vec::new(),
            controls: Vec::new(),
            jobs: Vec::new(),
            gone: Vec::new(),
            errors: Vec::new(),
        }
    }
}

/// A domain as its XML describes it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Described {
    /// The domain, with id and, if numbers were asked for, state of the same collection. Process, threads and host
    /// device indices are absent.
    pub domain: Domain,
}

/// A request is outstanding, or there is no connection to ask.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("libvirt has not answered the previous request, or is not connected")]
pub struct Busy;

/// Number of a worker.
type LaneId = u32;

/// What a worker says.
struct Said {
    lane: LaneId,
    update: Update,
}

/// The asynchronous side of a worker. Dropping it never waits: a thread stuck in a call is left to itself.
#[derive(Debug)]
struct Lane {
    id: LaneId,
    requests: std_mpsc::SyncSender<Request>,
    outstanding_since: Option<MonotonicNs>,
}

impl Lane {
    fn ask(&mut self, request: Request) -> Result<(), Busy> {
        if self.outstanding_since.is_some() || self.requests.try_send(request).is_err() {
            return Err(Busy);
        }
        self.outstanding_since = Some(MonotonicNs::now());
        Ok(())
    }
}

/// The asynchronous side of all workers.
#[derive(Debug)]
pub struct Libvirt {
    uri: String,
    watch: Lane,
    count: Lane,
    /// Counting workers that were left to themselves and have not returned from their call.
    stuck: Vec<LaneId>,
    lanes_made: u32,
    connected: bool,
    updates: mpsc::Receiver<Said>,
    to_us: mpsc::Sender<Said>,
    events: mpsc::Receiver<DomainEvent>,
    events_lost: Arc<AtomicBool>,
}

impl Libvirt {
    /// Starts the workers. The watching one connects by itself, and reconnects after 0.25 s, doubling to 10 s until a
    /// collection succeeds; the counting one connects to answer.
    #[must_use]
    pub fn start(uri: &str) -> Self {
        let (to_us, updates) = mpsc::channel(QUEUE);
        let (event_queue, events) = mpsc::channel(EVENT_QUEUE);
        let events_lost = Arc::new(AtomicBool::new(false));
        let sink = EventSink { events: event_queue, overflowed: Arc::clone(&events_lost) };
        let events_of_watch = events::start_loop().then_some(sink);
        let watch = Voice { duty: Duty::Watch, lane: 0, events: events_of_watch, to: to_us.clone() };
        let count = Voice { duty: Duty::Count, lane: 1, events: None, to: to_us.clone() };
        Self {
            watch: start_lane(uri, watch),
            count: start_lane(uri, count),
            uri: uri.to_owned(),
            stuck: Vec::new(),
            lanes_made: 2,
            connected: false,
            updates,
            to_us,
            events,
            events_lost,
        }
    }

    /// Asks the watching worker, to be answered by [`Libvirt::next`].
    ///
    /// # Errors
    /// If it is not connected or has not answered yet.
    pub fn watch(&mut self, request: Request) -> Result<(), Busy> {
        if self.connected { self.watch.ask(request) } else { Err(Busy) }
    }

    /// Asks the counting worker; one that is not connected yet connects first.
    ///
    /// # Errors
    /// If it has not answered yet.
    pub fn count(&mut self, request: Request) -> Result<(), Busy> {
        self.count.ask(request)
    }

    /// Leaves a counting worker to itself that is stuck in a call, and starts another. What it still says is not heard:
    /// later reads may have been made meanwhile.
    ///
    /// # Errors
    /// If too many are stuck already.
    pub fn give_up_counting(&mut self) -> Result<(), Busy> {
        if self.stuck.len() >= MOST_STUCK {
            return Err(Busy);
        }
        let voice = Voice { duty: Duty::Count, lane: self.lanes_made, events: None, to: self.to_us.clone() };
        let next = start_lane(&self.uri, voice);
        self.lanes_made += 1;
        self.stuck.push(std::mem::replace(&mut self.count, next).id);
        Ok(())
    }

    /// The next thing that is said; waits for ever if all workers have ended. Cancel safe.
    pub async fn next(&mut self) -> Update {
        loop {
            if self.events_lost.swap(false, Ordering::Relaxed) {
                return Update::EventsLost;
            }
            tokio::select! {
                biased;
                // Both queues have a sender for as long as `self` or a worker lives.
                Some(said) = self.updates.recv() => {
                    if let Some(update) = self.hear(said) {
                        return update;
                    }
                }
                Some(event) = self.events.recv() => return Update::Event(event),
                else => std::future::pending().await,
            }
        }
    }

    fn hear(&mut self, said: Said) -> Option<Update> {
        if said.lane == self.watch.id {
            match &said.update {
                Update::Connected(_) => self.connected = true,
                Update::Lost { .. } => {
                    self.connected = false;
                    self.watch.outstanding_since = None;
                }
                _ => self.watch.outstanding_since = None,
            }
            return Some(said.update);
        }
        if said.lane != self.count.id {
            self.stuck.retain(|lane| *lane != said.lane);
            return None;
        }
        self.count.outstanding_since = None;
        Some(match said.update {
            Update::Lost { reason } | Update::Failed { reason } => Update::NotCounted { reason },
            update => update,
        })
    }

    /// Whether the last word of the watching worker was that a connection stands.
    #[must_use]
    pub const fn is_connected(&self) -> bool {
        self.connected
    }

    /// When the outstanding request to a worker was made, if there is one. The caller applies its deadline; a late
    /// answer is delivered all the same.
    #[must_use]
    pub const fn outstanding_since(&self, duty: Duty) -> Option<MonotonicNs> {
        match duty {
            Duty::Watch => self.watch.outstanding_since,
            Duty::Count => self.count.outstanding_since,
        }
    }
}

fn start_lane(uri: &str, voice: Voice) -> Lane {
    let (requests, worker_requests) = std_mpsc::sync_channel(1);
    let id = voice.lane;
    let (uri, end) = (uri.to_owned(), LastWord(voice.clone()));
    let started = spawn({
        let voice = voice.clone();
        move || {
            let _end = end;
            worker::run(&uri, &voice, &worker_requests);
        }
    });
    if let Err(error) = started {
        // The queue has room: this worker has said nothing.
        let _ = voice.to.try_send(Said { lane: id, update: Update::Lost { reason: error.one_line() } });
    }
    Lane { id, requests, outstanding_since: None }
}

/// Says that the worker has ended, however it did.
struct LastWord(Voice);

impl Drop for LastWord {
    fn drop(&mut self) {
        let update = Update::Lost { reason: LibvirtError::Ended.one_line() };
        // Nobody listens if the other side ended first, as it mostly does.
        let _ = self.0.to.try_send(Said { lane: self.0.lane, update });
    }
}

/// One look at what libvirt knows without asking QEMU, every domain described, over a connection of its own. Blocks, at
/// most for `deadline`; a call that is stuck then keeps its thread until the daemon answers or this program ends.
pub fn snapshot(uri: &str, deadline: Duration) -> Result<LibvirtSample, LibvirtError> {
    probe(uri, deadline).map(|(_, sample)| sample)
}

/// As [`snapshot`], with whom the connection reached.
pub fn probe(uri: &str, deadline: Duration) -> Result<(Connected, LibvirtSample), LibvirtError> {
    let (answer, answers) = std_mpsc::sync_channel(1);
    let asked = uri.to_owned();
    spawn(move || {
        // Nobody listens after the deadline.
        let _ = answer.send(read_once(&asked));
    })?;
    match answers.recv_timeout(deadline) {
        Ok(result) => result,
        Err(RecvTimeoutError::Timeout) => Err(LibvirtError::Deadline { uri: uri.to_owned(), deadline }),
        Err(RecvTimeoutError::Disconnected) => Err(LibvirtError::Ended),
    }
}

fn read_once(uri: &str) -> Result<(Connected, LibvirtSample), LibvirtError> {
    let connection = connection::Connection::open_read_only(uri)?;
    let request = Request { groups: Some(Groups::fast()), ..Request::default() };
    let sample = Collector::new(Duty::Watch).collect(&connection, &request)?;
    Ok((connection.describe(uri), sample))
}

/// The handle is dropped: nobody ever waits for this thread.
fn spawn(run: impl FnOnce() + Send + 'static) -> Result<(), LibvirtError> {
    let thread = thread::Builder::new().name("libvirt".into());
    thread.spawn(run).map(drop).map_err(LibvirtError::Thread)
}

#[cfg(test)]
mod tests;
