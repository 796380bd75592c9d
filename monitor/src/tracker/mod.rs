//! The domains being watched: merges what libvirt describes with what `/proc` finds, follows the vCPU threads,
//! and collects each source's readings into the domain's table.
//!
//! Decides nothing about time or output: `run` says when to look, and writes the [`Notice`]s.

mod classes;
mod disks;
mod domain;
mod drives;
mod layers;
mod nics;

use std::{
    collections::{BTreeMap, HashMap},
    path::PathBuf,
    time::Duration,
};

pub use self::domain::Tracked;
use self::domain::{Names, Slots, Thread, Vhost};
use crate::{
    inventory::{Domain, DomainState, FoundBy, MonitorState, Owner, QemuProcess},
    record::{Change, EventKind},
    source::{
        ebpf::{Ebpf, EbpfError, Happened, Keep, NotFollowed, probes::ProbeGroup},
        libvirt::{DomainEvent, LibvirtSample, What},
        netdev::{CounterTable, Devices},
        procfs::{
            self, FoundQemu, OpenFiles, ProcessReader, Processes, PssReader, ThreadReader, VhostThread,
        },
        virtual_function::VirtualFunctions,
    },
    units::{DomainUuid, MonotonicNs, SourceKind, Tid, VcpuIndex},
};

/// Beside the kernel programs, `/proc` is read no more often than this, unless ticks are that rare anyway: the times of a
/// process advance by 10 ms there, those of a running thread with the scheduler's tick.
const LEAST_PROCFS: Duration = Duration::from_millis(100);
/// A process that began so lately is looked at closely: its threads and devices come one after the other.
const YOUNG: Duration = Duration::from_secs(10);
/// Time between readings of what is dear to read in `/proc`, beside eBPF and without it.
const SLOW_BESIDE_EBPF_NS: u64 = 10_000_000_000;
const SLOW_NS: u64 = 1_000_000_000;
/// Time between readings of the memory that a process shares, at least.
const PSS_NS: u64 = 300_000_000_000;
/// After each a pause so many times as long as it took: all of them together take no larger share of a CPU.
const PSS_SHARE: u64 = 500;

/// Something the reader of the stream has to be told.
#[derive(Clone, Debug)]
pub enum Notice {
    /// A domain appeared, changed or went.
    Domain {
        /// What happened to it.
        change: Change,
        /// In words.
        reason: String,
        /// Its epoch.
        epoch: u32,
        /// As it is now, or was last.
        domain: Box<Domain>,
        /// When the sources that count from their own start began.
        since_ns: BTreeMap<&'static str, u64>,
    },
    /// An event.
    Event {
        /// What kind.
        kind: EventKind,
        /// Which domain, if one.
        domain: Option<(DomainUuid, String)>,
        /// In words.
        detail: String,
    },
}

/// Which domains are wanted.
#[derive(Clone, Debug, Default)]
pub struct Wanted(Vec<String>);

impl Wanted {
    /// Names or UUIDs; none means all.
    #[must_use]
    pub fn new(names: Vec<String>) -> Self {
        Self(names)
    }

    fn matches(&self, uuid: DomainUuid, name: &str) -> bool {
        self.0.is_empty() || self.0.iter().any(|w| is(w, uuid, name))
    }

    /// Those that none of the domains is.
    #[must_use]
    pub fn unknown(&self, domains: &[Tracked]) -> Vec<&str> {
        let known = |w: &str| domains.iter().any(|t| is(w, t.domain.uuid, &t.domain.name));
        self.0.iter().map(String::as_str).filter(|w| !known(w)).collect()
    }
}

fn is(wanted: &str, uuid: DomainUuid, name: &str) -> bool {
    wanted == name || wanted.parse().is_ok_and(|u: DomainUuid| u == uuid)
}

/// Figures about our own reading.
#[derive(Clone, Debug, Default)]
pub struct ReadCount {
    /// Reads that gave values.
    pub reads: u64,
    /// Reads that failed.
    pub errors: u64,
    /// Readings discarded, or reads not made.
    pub lost: u64,
    /// The last failure.
    pub last_error: Option<String>,
}

impl ReadCount {
    fn failed(&mut self, error: &dyn std::error::Error) {
        self.errors += 1;
        self.last_error = Some(crate::one_line(error));
    }
}

/// All watched domains.
pub struct Tracker {
    root: PathBuf,
    wanted: Wanted,
    processes: Processes,
    listings: u64,
    rounds: u64,
    ebpf: Option<Ebpf>,
    domains: Vec<Tracked>,
    /// Where each stands in `domains`.
    places: HashMap<DomainUuid, usize>,
    notices: Vec<Notice>,
    /// Which of the notices says that a domain appeared.
    appeared: HashMap<DomainUuid, usize>,
    counts: [ReadCount; SourceKind::COUNT],
    buffer: Vec<u8>,
    /// Every QEMU process found, whether its domain is wanted or not: who took a CPU is named in any case.
    names: Names,
    full_reported: bool,
    devices: Devices,
    /// Counters of network devices, one table for each network namespace that has one of ours.
    tables: Vec<CounterTable>,
    /// Once there is a domain that was given one.
    functions: Option<VirtualFunctions>,
    ebpf_failed: bool,
    /// Started when there is something to read; absent again if that failed.
    pss: Option<PssReader>,
    /// Not to be asked before.
    pss_after: MonotonicNs,
    /// When `/proc` was read last.
    procfs_read: Option<MonotonicNs>,
    /// A file of a process says that it has ended.
    end_seen: bool,
    /// Devices came or went since `tables` were chosen.
    tables_stale: bool,
    /// Whether this host runs the domains.
    place: Where,
    /// Processes that claim to be a domain that another one still runs, such as the destination of a migration within
    /// this host.
    rivals: Vec<FoundQemu>,
}

/// How closely to look.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Depth {
    /// At everything.
    Full,
    /// At what nothing else tells of: neither the kernel programs, nor what was read meanwhile.
    Brief,
}

/// Where the domains are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Where {
    /// Here: their processes and devices are in `/proc`.
    Here,
    /// On another host, or nowhere: libvirt alone knows them, and what has their names here is something else.
    Elsewhere,
}

impl Tracker {
    /// Nothing known yet. `root` is `/proc`.
    #[must_use]
    pub fn new(root: PathBuf, wanted: Wanted, ebpf: Option<Ebpf>) -> Self {
        Self::at(Where::Here, root, wanted, ebpf)
    }

    /// As [`Tracker::new`], for domains that may be elsewhere.
    #[must_use]
    pub fn at(place: Where, root: PathBuf, wanted: Wanted, ebpf: Option<Ebpf>) -> Self {
        Self {
            place,
            rivals: Vec::new(),
            processes: Processes::new(&root),
            devices: Devices::new(&root),
            tables: Vec::new(),
            functions: None,
            root,
            wanted,
            listings: 0,
            rounds: 0,
            ebpf,
            domains: Vec::new(),
            places: HashMap::new(),
            notices: Vec::new(),
            appeared: HashMap::new(),
            counts: Default::default(),
            buffer: vec![0; 4096],
            names: Names::new(),
            full_reported: false,
            ebpf_failed: false,
            pss: None,
            pss_after: MonotonicNs(0),
            procfs_read: None,
            end_seen: false,
            tables_stale: true,
        }
    }

    /// The watched domains.
    #[must_use]
    pub fn domains(&self) -> &[Tracked] {
        &self.domains
    }

    /// The watched domains, to number and mark their samples.
    pub fn domains_mut(&mut self) -> &mut [Tracked] {
        &mut self.domains
    }

    /// The kernel programs, if they run.
    #[must_use]
    pub fn ebpf(&self) -> Option<&Ebpf> {
        self.ebpf.as_ref()
    }

    /// The last reading of the kernel programs failed.
    #[must_use]
    pub fn ebpf_failed(&self) -> bool {
        self.ebpf_failed
    }

    /// How reading went, by source.
    pub fn count(&mut self, source: SourceKind) -> &mut ReadCount {
        &mut self.counts[source as usize]
    }

    /// What the reader has to be told since the last call.
    pub fn notices(&mut self) -> Vec<Notice> {
        self.appeared.clear();
        std::mem::take(&mut self.notices)
    }

    /// Whether processes and threads that come or go are told by the kernel programs, so that [`Tracker::look_at_changes`]
    /// and [`Tracker::look_briefly`] find them, and a full [`Tracker::look`] only what was missed.
    #[must_use]
    pub fn is_told(&self) -> bool {
        !self.ebpf_failed && self.ebpf.as_ref().is_some_and(Ebpf::tells_of_processes)
    }

    /// Looks for QEMU processes, vCPU threads and devices that came or went.
    pub fn look(&mut self) {
        self.look_for_processes();
        self.look_at_domains(Depth::Full);
    }

    /// Looks for what came or went of which the kernel programs do not tell.
    pub fn look_briefly(&mut self) {
        if self.end_seen {
            self.look_for_processes();
        }
        self.look_at_domains(Depth::Brief);
    }

    /// Looks for QEMU processes that came or went.
    pub fn look_for_processes(&mut self) {
        if self.place == Where::Elsewhere {
            return;
        }
        self.end_seen = false;
        self.listings += 1;
        match self.processes.look(self.listings) {
            Ok(changes) => {
                changes.ended.iter().for_each(|p| self.process_ended(*p));
                changes.started.into_iter().for_each(|found| self.process_found(found));
                changes.vhosts.into_iter().for_each(|vhost| self.vhost_found(vhost));
            }
            Err(error) => self.count(SourceKind::Procfs).failed(&error),
        }
        self.seed();
    }

    fn look_at_domains(&mut self, depth: Depth) {
        if self.place == Where::Elsewhere {
            return;
        }
        self.rounds += 1;
        let grown_up = procfs::start_time_of(YOUNG);
        for i in 0..self.domains.len() {
            let is_young = |process: QemuProcess| process.start_time_ticks > grown_up;
            let depth =
                if self.domains[i].domain.process.is_some_and(is_young) { Depth::Full } else { depth };
            if depth == Depth::Full {
                self.look_at_threads(i);
            }
            self.look_at_interfaces(i, depth);
            self.look_at_disks(i, depth);
        }
        self.tables_stale = true; // A process that a table was read by may have ended.
        self.seed();
        match self.ebpf.as_mut().map_or(Ok(None), Ebpf::look) {
            Ok(None) => {}
            Ok(Some(news)) => self.notices.push(Notice::Event {
                kind: EventKind::SourceBack,
                domain: None,
                detail: format!("ebpf: {news}"),
            }),
            Err(error) => self.count(SourceKind::Ebpf).failed(&error),
        }
    }

    fn process_found(&mut self, found: FoundQemu) {
        let name = found.args.name.clone().unwrap_or_else(|| format!("qemu-{}", found.process.tgid));
        self.names.insert(found.process.tgid.0, name);
        let uuid = uuid_of(&found);
        let i = match self.find(uuid) {
            Some(i) => i,
            None => {
                let domain = domain_of(uuid, &found);
                if !self.wanted.matches(uuid, &domain.name) {
                    return;
                }
                self.add(domain, "QEMU process found");
                self.domains.len() - 1
            }
        };
        if let Some(old) = self.domains[i].domain.process.filter(|old| *old != found.process) {
            if procfs::lives(&self.root, old) {
                self.rivals.push(found);
                return;
            }
            self.release(i, "another QEMU process runs this domain");
        }
        self.domains[i].domain.process = Some(found.process);
        self.domains[i].open = OpenFiles::open(&self.root, found.process).ok();
        self.domains[i].drives = found.args.drives;
        let slot = self.ebpf.as_mut().and_then(|ebpf| ebpf.follow_process(found.process.tgid));
        self.domains[i].processes.extend(slot);
        match ProcessReader::open(&self.root, found.process) {
            Ok(files) => self.domains[i].files = Some(files),
            Err(error) => self.count(SourceKind::Procfs).failed(&error),
        }
        self.look_at_threads(i);
        self.look_at_interfaces(i, Depth::Full);
        self.look_at_disks(i, Depth::Full);
        self.changed(i, "QEMU process found");
    }

    fn vhost_found(&mut self, vhost: VhostThread) {
        let owner = |t: &Tracked| t.domain.process.is_some_and(|process| process.tgid == vhost.owner);
        let Some(i) = self.domains.iter().position(owner) else { return };
        let slot = self.ebpf.as_mut().and_then(|ebpf| ebpf.follow_process(vhost.thread.tgid));
        self.domains[i].vhosts.push(Vhost::new(vhost.thread, slot));
    }

    fn process_ended(&mut self, process: QemuProcess) {
        self.names.remove(&process.tgid.0);
        self.rivals.retain(|rival| rival.process != process);
        // Whatever libvirt says, or no longer can: without its process there is no domain.
        if let Some(i) = self.domains.iter().position(|t| t.domain.process == Some(process)) {
            let uuid = self.domains[i].domain.uuid;
            let heir = self.rivals.iter().position(|rival| uuid_of(rival) == uuid);
            match heir.map(|at| self.rivals.swap_remove(at)) {
                Some(heir) => self.process_found(heir),
                None => self.remove(i, "its QEMU process ended"),
            }
        }
    }

    /// What libvirt says of one domain's configuration.
    pub fn described(&mut self, domain: Domain) {
        if !self.wanted.matches(domain.uuid, &domain.name) {
            return;
        }
        let Some(i) = self.find(domain.uuid) else {
            self.add(domain, "listed by libvirt");
            return self.look_at_interfaces(self.domains.len() - 1, Depth::Full);
        };
        if matches!((self.domains[i].domain.id, domain.id), (Some(a), Some(b)) if a != b) {
            self.release(i, "libvirt gave it a new id");
        }
        if self.domains[i].describe(domain) {
            self.changed(i, "described by libvirt");
        }
        self.look_at_interfaces(i, Depth::Full);
        self.look_at_disks(i, Depth::Full);
    }

    /// libvirt no longer lists a domain. If its QEMU is known, its end is what counts: libvirt may have lost track of
    /// a domain that lives.
    pub fn unlisted(&mut self, uuid: DomainUuid) {
        let Some(i) = self.find(uuid) else { return };
        if self.domains[i].domain.process.is_none() {
            self.remove(i, "libvirt no longer lists it");
        }
    }

    fn add(&mut self, domain: Domain, reason: &str) {
        self.places.insert(domain.uuid, self.domains.len());
        self.appeared.insert(domain.uuid, self.notices.len());
        self.domains.push(Tracked::new(domain));
        self.notice_domain(self.domains.len() - 1, Change::Appeared, reason);
    }

    fn remove(&mut self, i: usize, reason: &str) {
        let slots = self.domains[i].take_slots();
        self.forget(slots);
        self.notice_domain(i, Change::Gone, reason);
        let gone = self.domains.swap_remove(i);
        self.appeared.remove(&gone.domain.uuid);
        self.places.remove(&gone.domain.uuid);
        if let Some(moved) = self.domains.get(i) {
            self.places.insert(moved.domain.uuid, i);
        }
    }

    /// Lets go of a process: its counters will start anew.
    fn release(&mut self, i: usize, reason: &str) {
        let slots = self.domains[i].release();
        self.forget(slots);
        self.notice_event(i, EventKind::CounterReset, reason);
    }

    fn forget(&mut self, slots: Slots) {
        if let Some(ebpf) = &mut self.ebpf {
            slots.threads.into_iter().for_each(|slot| ebpf.forget(slot));
            slots.processes.into_iter().for_each(|slot| ebpf.forget_process(slot));
            slots.group.into_iter().for_each(|slot| ebpf.forget_group(slot));
            for slot in slots.images {
                ebpf.unwatch_image(slot); // What it counted goes with the domain.
            }
        }
        self.unwatch(slots.nics);
    }

    /// Looks for images of the disks that came or went, cheaply where nothing did.
    fn look_at_disks(&mut self, i: usize, depth: Depth) {
        let Some(ebpf) = &mut self.ebpf else { return };
        let tracked = &mut self.domains[i];
        let (Some(process), Some(files)) = (tracked.domain.process, &tracked.open) else { return };
        let place = disks::Place { root: &self.root, process, files, disks: &tracked.domain.disks };
        match tracked.disks.look(ebpf, place, depth) {
            Ok(notices) => {
                for notice in notices {
                    self.notice_event(i, EventKind::LostEvents, &notice);
                }
            }
            Err(error) if error.is_gone() => {} // The next look reports the end.
            Err(error) => self.count(SourceKind::Procfs).failed(&error),
        }
    }

    fn changed(&mut self, i: usize, reason: &str) {
        // An `appeared` that is not yet written tells it all.
        let uuid = self.domains[i].domain.uuid;
        if let Some(&at) = self.appeared.get(&uuid) {
            let now = self.domains[i].domain.clone();
            let since = self.domains[i].since_ns();
            if let Notice::Domain { domain, since_ns, .. } = &mut self.notices[at] {
                **domain = now;
                *since_ns = since;
            }
        } else {
            self.notice_domain(i, Change::Changed, reason);
        }
    }

    fn notice_domain(&mut self, i: usize, change: Change, reason: &str) {
        let tracked = &self.domains[i];
        self.notices.push(Notice::Domain {
            change,
            reason: reason.to_owned(),
            epoch: tracked.epoch,
            domain: Box::new(tracked.domain.clone()),
            since_ns: tracked.since_ns(),
        });
    }

    fn notice_event(&mut self, i: usize, kind: EventKind, detail: &str) {
        let domain = &self.domains[i].domain;
        self.notices.push(Notice::Event {
            kind,
            domain: Some((domain.uuid, domain.name.clone())),
            detail: detail.to_owned(),
        });
    }

    fn look_at_threads(&mut self, i: usize) {
        let Some(process) = self.domains[i].domain.process else { return };
        let ids = match procfs::thread_ids(&self.root, process) {
            Ok(ids) => ids,
            Err(error) if error.is_gone() => return, // The next look reports the end.
            Err(error) => return self.count(SourceKind::Procfs).failed(&error),
        };
        let every_vcpu_found = self.domains[i].domain.vcpus.iter().all(|v| v.tid.is_some());
        if every_vcpu_found && ids == self.domains[i].task_ids {
            return;
        }
        let found = procfs::vcpu_threads(&self.root, process, &ids);
        if found.is_empty() && self.domains[i].domain.vcpus.iter().any(|v| v.tid.is_some()) {
            return; // The process is ending: its threads go before it does. The next look reports the end.
        }
        self.domains[i].task_ids = ids;
        if self.adopt_threads(i, &found) {
            self.changed(i, "vCPU threads changed");
        }
    }

    /// Makes the vCPUs of a domain those whose threads were found; true if anything changed.
    fn adopt_threads(&mut self, i: usize, found: &[(VcpuIndex, Tid)]) -> bool {
        let tid_of = |index| found.iter().find(|(v, _)| *v == index).map(|(_, tid)| *tid);
        let mut changed = false;
        for v in (0..self.domains[i].domain.vcpus.len()).rev() {
            let vcpu = &self.domains[i].domain.vcpus[v];
            let (number, old, new) = (vcpu.index.0, vcpu.tid, tid_of(vcpu.index));
            if old == new {
                continue;
            }
            changed = true;
            let slot = self.domains[i].thread_ended(v);
            self.forget(Slots { threads: slot.into_iter().collect(), ..Slots::default() });
            match new {
                Some(tid) => {
                    if old.is_some() && self.begin_epoch(i) {
                        let detail = format!("vCPU {number} has another thread now: its counters start anew");
                        self.notice_event(i, EventKind::CounterReset, &detail);
                    }
                    self.adopt_thread(i, v, tid);
                }
                // An unplugged vCPU: its thread is gone while the process lives.
                None => self.domains[i].remove_vcpu(v),
            }
        }
        for (index, tid) in found {
            let vcpus = &self.domains[i].domain.vcpus;
            if let Err(at) = vcpus.binary_search_by_key(index, |v| v.index) {
                self.domains[i].insert_vcpu(at, *index);
                self.adopt_thread(i, at, *tid);
                changed = true;
            }
        }
        changed
    }

    /// Some counters of a domain start anew while others go on: no rate crosses that. False if none was told yet.
    fn begin_epoch(&mut self, i: usize) -> bool {
        let tracked = &mut self.domains[i];
        let was_sampled = tracked.seq > 0;
        if was_sampled {
            tracked.epoch += 1;
            tracked.sample.clear();
        }
        was_sampled
    }

    /// Says of each domain which of its counters fell, if one did that nothing else was said of: an epoch begins with what was
    /// read last. Call it after the last read of a tick.
    pub fn tell_falls(&mut self) {
        for i in 0..self.domains.len() {
            let Some(fall) = self.domains[i].sample.fall() else { continue };
            let tracked = &mut self.domains[i];
            tracked.epoch += 1;
            tracked.sample.restart();
            let (kind, detail) = tracked.describe_fall(&fall);
            self.notice_event(i, kind, &detail);
        }
    }

    fn adopt_thread(&mut self, i: usize, v: usize, tid: Tid) {
        let Some(process) = self.domains[i].domain.process else { return };
        let file = ThreadReader::open(&self.root, process, tid);
        let tracked = &mut self.domains[i];
        let slot = self.ebpf.as_mut().map(|ebpf| {
            if tracked.group.is_none() {
                tracked.group = ebpf.follow_group();
            }
            ebpf.follow(tid, Keep::Everything, tracked.group.as_ref())
        });
        tracked.domain.vcpus[v].tid = Some(tid);
        let mut thread = Thread::default();
        match file {
            Ok(file) => thread.file = Some(file),
            Err(error) => self.counts[SourceKind::Procfs as usize].failed(&error),
        }
        match slot {
            Some(Ok(slot)) => {
                thread.slot = Some(slot);
                tracked.followed_since.get_or_insert_with(MonotonicNs::now);
            }
            Some(Err(full @ NotFollowed::Full(_))) => self.report_full(&full),
            _ => {}
        }
        self.domains[i].threads[v] = thread;
    }

    /// Says once that something could not be followed.
    fn report_full(&mut self, full: &NotFollowed) {
        if !std::mem::replace(&mut self.full_reported, true) {
            let detail = full.to_string();
            self.notices.push(Notice::Event { kind: EventKind::LostEvents, domain: None, detail });
        }
    }

    /// Reads the kernel programs' figures of every domain.
    pub fn read_ebpf(&mut self) {
        let Some(ebpf) = &mut self.ebpf else { return };
        let window = ebpf.read();
        self.ebpf_failed = window.is_err();
        match window {
            Ok(window) => {
                let lost: u64 = self.domains.iter_mut().map(|t| t.put_ebpf(ebpf, window, &self.names)).sum();
                let count = self.count(SourceKind::Ebpf);
                count.reads += 1;
                count.lost += lost;
            }
            Err(error) => self.count(SourceKind::Ebpf).failed(&error),
        }
    }

    /// Whether a domain's QEMU process has not been found yet.
    #[must_use]
    pub fn has_unfound(&self) -> bool {
        self.domains.iter().any(|tracked| tracked.domain.process.is_none())
    }

    /// Reads the kernel programs and `/proc` for domains that have not been sampled yet, and no others: their rates
    /// are from tick to tick. True if there is one.
    pub fn read_new(&mut self) -> bool {
        if !self.domains.iter().any(Tracked::is_new) {
            return false;
        }
        if let Some(ebpf) = &mut self.ebpf
            && let Ok(window) = ebpf.read()
        {
            for tracked in self.domains.iter_mut().filter(|tracked| tracked.is_new()) {
                tracked.put_ebpf(ebpf, window, &self.names);
            }
        }
        for tracked in self.domains.iter_mut().filter(|tracked| tracked.is_new()) {
            // An error shows at the next tick too, and is counted there.
            let _ = tracked.put_procfs(&mut self.buffer);
        }
        true
    }

    /// Reads `/proc` of every domain, unless that was just done and the kernel programs tell more. `interval` is that of the
    /// ticks, one of which may come a little early.
    pub fn read_procfs(&mut self, interval: Duration) {
        let now = MonotonicNs::now();
        let least_ns = LEAST_PROCFS.saturating_sub(interval / 2).as_nanos();
        let is_fresh = |read: MonotonicNs| interval < LEAST_PROCFS && u128::from(now.since(read)) < least_ns;
        let is_second = !self.ebpf_failed && self.ebpf.as_ref().is_some_and(Ebpf::has_times_and_traffic);
        if is_second && self.procfs_read.is_some_and(is_fresh) {
            return;
        }
        self.procfs_read = Some(now);
        let every_ns = if self.ebpf.is_some() { SLOW_BESIDE_EBPF_NS } else { SLOW_NS };
        let changes_are_told = self.is_told();
        for tracked in &mut self.domains {
            if !changes_are_told {
                tracked.classes.changed();
            }
            let results = [
                tracked.put_procfs(&mut self.buffer),
                tracked.put_procfs_slow(&self.root, &mut self.buffer, every_ns),
            ];
            let count = &mut self.counts[SourceKind::Procfs as usize];
            for result in results.into_iter().flatten() {
                match result {
                    Ok(()) => count.reads += 1,
                    Err(error) if error.is_gone() => {
                        count.lost += 1;
                        self.end_seen = true;
                    }
                    Err(error) => count.failed(&error),
                }
            }
        }
        self.read_pss();
        self.read_counters();
    }

    /// Takes what was read of the memory that processes share, and asks for the next that is due.
    fn read_pss(&mut self) {
        let now = MonotonicNs::now();
        if let Some(answer) = self.pss.as_mut().and_then(PssReader::answer) {
            let of = self.domains.iter_mut().find(|tracked| tracked.domain.process == Some(answer.process));
            self.pss_after = MonotonicNs(now.0.saturating_add(answer.took_ns.saturating_mul(PSS_SHARE)));
            match answer.bytes {
                Err(error) if error.is_gone() => {}
                Err(error) => self.counts[SourceKind::Procfs as usize].failed(&error),
                Ok(bytes) => {
                    if let Some(tracked) = of {
                        tracked.pss = Some(bytes);
                    }
                }
            }
        }
        if now < self.pss_after || self.pss.as_ref().is_some_and(PssReader::is_busy) {
            return;
        }
        // The one that waits longest.
        let is_due = |tracked: &&mut Tracked| tracked.pss_due.is_none_or(|due| due <= now);
        let waiting = self.domains.iter_mut().filter(is_due);
        let with_process = waiting.filter_map(|t| t.domain.process.map(|process| (t, process)));
        let Some((tracked, process)) = with_process.min_by_key(|(t, _)| t.pss_due) else { return };
        tracked.pss_due = Some(MonotonicNs(now.0.saturating_add(PSS_NS)));
        if self.pss.is_none() {
            self.pss = PssReader::start(self.root.clone()).ok();
        }
        if let Some(reader) = &mut self.pss {
            reader.ask(process);
        }
    }

    /// Looks at what the kernel programs say has changed. True if a process began or ended, which takes it some time.
    pub fn look_at_changes(&mut self) -> bool {
        let happened = self.ebpf.as_mut().map(Ebpf::happened).unwrap_or_default();
        let processes = happened.iter().any(|what| matches!(what, Happened::Began(_) | Happened::Ended(_)));
        if processes {
            self.look_for_processes();
        }
        for i in 0..self.domains.len() {
            let process = self.domains[i].domain.process.map(|process| process.tgid);
            let is_meant =
                |what: &Happened| matches!(what, Happened::Threads(tgid) if Some(*tgid) == process);
            if happened.iter().any(is_meant) {
                self.domains[i].classes.changed();
                self.look_at_threads(i);
            }
        }
        self.seed();
        processes
    }

    fn seed(&mut self) {
        if let Some(Err(error)) = self.ebpf.as_mut().map(Ebpf::seed) {
            self.count(SourceKind::Ebpf).failed(&error);
        }
    }

    /// Takes over what libvirt answered.
    pub fn take_libvirt(&mut self, answer: LibvirtSample) {
        answer.described.into_iter().for_each(|d| self.described(d.domain));
        answer.gone.into_iter().for_each(|uuid| self.unlisted(uuid));
        for error in answer.errors {
            let count = self.count(SourceKind::Libvirt);
            count.errors += 1;
            count.last_error = Some(error);
        }
        self.count(SourceKind::Libvirt).reads += u64::from(answer.collected);
        for (uuid, job) in answer.jobs {
            if let Some(i) = self.find(uuid) {
                self.domains[i].sample.job = job;
            }
        }
        for stats in &answer.domains {
            let Some(i) = self.find(stats.uuid) else { continue };
            self.domains[i].put_libvirt(stats, answer.window, answer.duty);
            if let Some(state) = stats.state {
                self.state_is(i, state, "libvirt says so");
            }
        }
    }

    fn find(&self, uuid: DomainUuid) -> Option<usize> {
        self.places.get(&uuid).copied()
    }

    fn state_is(&mut self, i: usize, state: DomainState, why: &str) {
        let old = std::mem::replace(&mut self.domains[i].domain.state, state);
        if old == state {
            return;
        }
        match (old, state) {
            (_, DomainState::Paused) if old != DomainState::Unknown => {
                self.notice_event(i, EventKind::Paused, why);
            }
            (DomainState::Paused, DomainState::Running) => self.notice_event(i, EventKind::Resumed, why),
            (_, DomainState::Crashed) => self.notice_event(i, EventKind::Crashed, why),
            _ => {}
        }
        self.changed(i, &format!("state {} → {}", old.name(), state.name()));
    }

    /// A domain's QEMU does not answer libvirt, or does again.
    pub fn monitor_is(&mut self, uuid: DomainUuid, state: MonitorState) {
        let Some(i) = self.find(uuid) else { return };
        if std::mem::replace(&mut self.domains[i].domain.monitor, state) == state {
            return;
        }
        let (kind, detail) = match state {
            MonitorState::Answers => (EventKind::MonitorBack, "QEMU answers libvirt again"),
            MonitorState::Silent => (
                EventKind::MonitorSilent,
                "QEMU does not answer libvirt: what only it knows is missing, and the others are read without it",
            ),
            MonitorState::InJob => (
                EventKind::MonitorSilent,
                "libvirt asks QEMU nothing while a job runs: what only QEMU knows is missing",
            ),
        };
        self.notice_event(i, kind, detail);
        self.changed(i, detail);
    }

    /// Something libvirt tells of a domain. What it means for the description is read from that.
    pub fn happened(&mut self, event: &DomainEvent) {
        let known = self.find(event.uuid);
        if known.is_none() && !self.wanted.matches(event.uuid, &event.name) {
            return;
        }
        let kind = match event.what {
            What::State(state) => {
                if let Some(i) = known {
                    self.state_is(i, state, &event.detail);
                }
                return;
            }
            What::Started => EventKind::Started,
            What::MigratedIn | What::MigratedAway => EventKind::Migrated,
            What::Stopped => EventKind::Stopped,
            What::Rebooted => EventKind::Rebooted,
            What::Hotplug => EventKind::Hotplug,
            What::HotplugFailed => EventKind::HotplugFailed,
            What::Balloon(bytes) => {
                if let Some(i) = known {
                    self.domains[i].domain.memory_current_bytes = Some(bytes);
                }
                EventKind::Balloon
            }
            What::BlockJob => EventKind::BlockJob,
            What::JobPass | What::JobEnded => EventKind::Job,
            What::IoError => EventKind::IoError,
            What::Changed => EventKind::Reconfigured,
        };
        self.notices.push(Notice::Event {
            kind,
            domain: Some((event.uuid, event.name.clone())),
            detail: event.detail.clone(),
        });
    }
}

/// A domain known by its QEMU process alone.
fn domain_of(uuid: DomainUuid, found: &FoundQemu) -> Domain {
    let name = found.args.name.clone().unwrap_or_else(|| format!("qemu-{}", found.process.tgid));
    Domain {
        uuid,
        name,
        id: None,
        state: DomainState::Unknown,
        monitor: MonitorState::default(),
        title: None,
        owner: owner_of(found),
        virt_type: Some(if found.args.kvm { "kvm" } else { "qemu" }.to_owned()),
        process: None,
        vcpus: Vec::new(),
        vcpus_max: None,
        cpu_limits: Vec::new(),
        interfaces: Vec::new(),
        disks: Vec::new(),
        memory_max_bytes: found.args.memory_bytes,
        memory_current_bytes: None,
        balloon: None,
        found_by: FoundBy::Procfs,
    }
}

/// Only Proxmox's QEMU takes an `-id`.
fn owner_of(found: &FoundQemu) -> Owner {
    let Some(id) = &found.args.proxmox_id else { return Owner::default() };
    let instance_name = found.args.name.clone();
    Owner { manager: Some("proxmox"), instance_id: Some(id.clone()), instance_name, ..Owner::default() }
}

fn uuid_of(found: &FoundQemu) -> DomainUuid {
    found.args.uuid.unwrap_or_else(|| made_up_uuid(found.process))
}

/// Identity of a process that has no `-uuid`: a custom (version 8) UUID of process id and start time, the same
/// for as long as the process lives.
fn made_up_uuid(process: QemuProcess) -> DomainUuid {
    let mut bytes = [0; 16];
    bytes[..4].copy_from_slice(&process.tgid.0.to_be_bytes());
    bytes[8..].copy_from_slice(&process.start_time_ticks.to_be_bytes());
    bytes[6] = 0x80;
    bytes[8] = 0x80 | bytes[8] & 0x3f;
    DomainUuid(bytes)
}

impl From<ReadCount> for crate::record::SourceHealth {
    fn from(count: ReadCount) -> Self {
        Self { reads: count.reads, errors: count.errors, lost: count.lost, last_error: count.last_error }
    }
}

/// Opens the kernel programs of these groups if the facts allow it.
///
/// # Errors
/// Why not, in one line with the fix.
pub fn open_ebpf(facts: &crate::host::Facts, groups: &[ProbeGroup]) -> Result<Ebpf, String> {
    crate::host::ebpf_rule(facts).map_err(|u| u.to_string())?;
    Ebpf::open(groups).map_err(|e: EbpfError| crate::one_line(&e))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        metric::Metric,
        sample::ReadClass,
        source::libvirt::xml::parse_domain,
        units::{Bytes, Count, Window},
    };

    #[test]
    fn a_counter_that_falls_begins_an_epoch_and_is_told() {
        let xml = "<domain type='qemu' id='3'><name>web</name><uuid>6a1c8f60-0000-4000-8000-000000000001</uuid>\
            <devices><disk type='file' device='disk'><source file='/a'/><target dev='vda'/></disk></devices></domain>";
        let mut tracker = Tracker::at(Where::Elsewhere, "/proc".into(), Wanted::new(Vec::new()), None);
        tracker.described(parse_domain(xml).unwrap());
        tracker.notices();
        let read = |tracker: &mut Tracker, (written, faults), at| {
            let sample = &mut tracker.domains[0].sample;
            sample.begin(ReadClass::LibvirtSlow);
            sample.disks[0].put(SourceKind::Libvirt, Metric::DiskWrBytes, Bytes(written));
            sample.memory.put(SourceKind::Libvirt, Metric::MemoryMinorFaults, Count(faults));
            sample.end(ReadClass::LibvirtSlow, Window { begin: MonotonicNs(at), end: MonotonicNs(at + 1) });
            tracker.tell_falls();
            tracker.domains[0].sample.written();
            let told = tracker.notices().into_iter().map(|notice| match notice {
                Notice::Event { kind, detail, .. } => (kind, detail),
                Notice::Domain { .. } => panic!("{notice:?}"),
            });
            (tracker.domains[0].epoch, told.collect::<Vec<_>>())
        };
        assert_eq!(read(&mut tracker, (9, 50), 1), (0, vec![]));
        assert_eq!(read(&mut tracker, (9, 50), 2), (0, vec![]));
        let detail = "disk vda: wr_bytes {libvirt} was 9 and is 8: counters start anew".to_owned();
        assert_eq!(read(&mut tracker, (8, 50), 3), (1, vec![(EventKind::CounterBackwards, detail)]));
        assert_eq!(read(&mut tracker, (8, 51), 4), (1, vec![]));
        let detail =
            "memory: minor_faults {libvirt} was 51 and is 3: counters start anew with the guest".to_owned();
        assert_eq!(read(&mut tracker, (8, 3), 5), (2, vec![(EventKind::CounterReset, detail)]));
    }
}
