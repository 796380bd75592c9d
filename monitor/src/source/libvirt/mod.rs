//! libvirt: which domains exist, and what the daemon and QEMU count.
//!
//! Data comes from one read-only connection: the bulk call `virConnectGetAllDomainStats` for numbers, and the XML of a
//! domain when it is new or its devices changed. libvirt's calls block, so a thread of its own makes them; the
//! asynchronous side asks, goes on, and applies its own deadline. Knows no metric, no other source and no output.

mod connection;
mod error;
pub mod stats;
mod worker;
pub mod xml;

use std::{
    sync::mpsc::{self as std_mpsc, RecvTimeoutError, TrySendError},
    thread,
    time::Duration,
};

use tokio::sync::mpsc;

use crate::{
    inventory::Domain,
    units::{DomainUuid, MonotonicNs, Window},
};

pub use connection::{Connected, Groups, Version};
pub use error::{CallError, LibvirtError, describe_open_error};
use stats::DomainStats;

/// Updates that wait to be read; one answer and a few changes of the connection.
const QUEUE: usize = 8;

/// What the worker says.
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
    /// A collection. Answers the outstanding request.
    Sample(Box<LibvirtSample>),
}

/// One collection.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LibvirtSample {
    /// Around the bulk call only; the XML of new domains is read after it.
    pub window: Window,
    /// What was asked for.
    pub groups: Groups,
    /// Every active domain.
    pub domains: Vec<DomainStats>,
    /// Domains whose XML was read: new, restarted under another id, or with other devices than before.
    pub described: Vec<Described>,
    /// Domains that were there at the last collection and are no longer active.
    pub gone: Vec<DomainUuid>,
    /// What went wrong for single domains, one line each. A domain in `domains` may lack its description then.
    pub errors: Vec<String>,
}

impl LibvirtSample {
    const fn empty(window: Window, groups: Groups) -> Self {
        Self {
            window,
            groups,
            domains: Vec::new(),
            described: Vec::new(),
            gone: Vec::new(),
            errors: Vec::new(),
        }
    }
}

/// A domain as its XML describes it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Described {
    /// The domain, with id and state of the same collection. Process, threads and host device indices are absent.
    pub domain: Domain,
}

/// A request is outstanding, or there is no connection to ask.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("libvirt has not answered the previous request, or is not connected")]
pub struct Busy;

/// The asynchronous side of the worker. Dropping it never waits: a thread stuck in a call is left to itself.
#[derive(Debug)]
pub struct Libvirt {
    requests: std_mpsc::SyncSender<Groups>,
    updates: mpsc::Receiver<Update>,
    connected: bool,
    outstanding_since: Option<MonotonicNs>,
    /// Why there is no worker, to be said once.
    ended: Option<LibvirtError>,
}

impl Libvirt {
    /// Starts the worker. It connects by itself, and reconnects after 0.25 s, doubling to 10 s until a collection
    /// succeeds.
    #[must_use]
    pub fn start(uri: &str) -> Self {
        let (requests, worker_requests) = std_mpsc::sync_channel(1);
        let (worker_updates, updates) = mpsc::channel(QUEUE);
        let uri = uri.to_owned();
        let run = move || worker::run(&uri, &worker_requests, &worker_updates);
        let ended = spawn(run).err().unwrap_or(LibvirtError::Ended);
        Self { requests, updates, connected: false, outstanding_since: None, ended: Some(ended) }
    }

    /// Asks for one collection, to be answered by [`Libvirt::next`].
    pub fn request(&mut self, groups: Groups) -> Result<(), Busy> {
        if !self.connected || self.outstanding_since.is_some() {
            return Err(Busy);
        }
        match self.requests.try_send(groups) {
            Ok(()) => {
                self.outstanding_since = Some(MonotonicNs::now());
                Ok(())
            }
            Err(TrySendError::Full(_) | TrySendError::Disconnected(_)) => Err(Busy),
        }
    }

    /// The next thing the worker says; waits for ever once the worker has ended and said so. Cancel safe.
    pub async fn next(&mut self) -> Update {
        let update = match self.updates.recv().await {
            Some(update) => update,
            None => match self.ended.take() {
                Some(error) => Update::Lost { reason: error.one_line() },
                None => std::future::pending().await,
            },
        };
        match update {
            Update::Connected(_) => self.connected = true,
            Update::Lost { .. } => {
                self.connected = false;
                self.outstanding_since = None;
            }
            Update::Failed { .. } | Update::Sample(_) => self.outstanding_since = None,
        }
        update
    }

    /// Whether the last word of the worker was that a connection stands.
    #[must_use]
    pub const fn is_connected(&self) -> bool {
        self.connected
    }

    /// When the outstanding request was made, if there is one. The caller applies its deadline and reports the source
    /// as lost while it is exceeded; a late answer is delivered all the same.
    #[must_use]
    pub const fn outstanding_since(&self) -> Option<MonotonicNs> {
        self.outstanding_since
    }
}

/// One collection of all groups, every domain described, over a connection of its own. Blocks, at most for `deadline`;
/// a call that is stuck then keeps its thread until the daemon answers or this program ends.
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
    let sample = worker::Collector::default().collect(&connection, Groups::all())?;
    Ok((connection.describe(uri), sample))
}

/// The handle is dropped: nobody ever waits for this thread.
fn spawn(run: impl FnOnce() + Send + 'static) -> Result<(), LibvirtError> {
    let thread = thread::Builder::new().name("libvirt".into());
    thread.spawn(run).map(drop).map_err(LibvirtError::Thread)
}

#[cfg(test)]
mod tests;
