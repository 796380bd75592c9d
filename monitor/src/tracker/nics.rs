//! Network interfaces of the domains: which device of the host each is, and what the sources say of it.
//!
//! rx and tx are the guest's. Who receives what the host sends through a device is decided by what the device is.

use std::path::Path;

use super::{Depth, Tracked, Tracker, Where};
use crate::{
    inventory::{FoundBy, Interface, Observable, QemuProcess},
    ledger::new_in_buckets,
    metric::{Metric, Scope},
    record::EventKind,
    sample::{InterfaceDetail, QueueDetail, ReadClass, Values},
    source::{
        ebpf::{Bursts, DeviceTraffic, DropPlace, Ebpf, NicSlot, NotFollowed, Passed, WINDOW_BUCKETS},
        netdev::{self, CounterTable, Device, DeviceCounters, DeviceKind, Direction, HeldTap},
        procfs::{OpenFiles, ProcfsError},
        virtual_function::{Answer, FunctionCounters, VirtualFunction, VirtualFunctions},
    },
    units::{Bytes, Count, MonotonicNs, SourceKind, Window},
};

/// Looks after which a device of another namespace, whose counters give no cause, or one that went is looked up again.
const FOREIGN_ROUNDS: u64 = 10;

/// What reads one interface; in the order of `domain.interfaces`.
#[derive(Debug, Default)]
pub(super) struct Nic {
    pub(super) slot: Option<NicSlot>,
    device: Option<Device>,
    /// What the guest was given instead of a device of the host's kernel.
    function: Option<VirtualFunction>,
    /// It was looked for.
    sought: bool,
    /// The name the device has now.
    name: String,
    /// It had a device before: the next one starts anew.
    had_one: bool,
    /// Its counters give cause to look whether the device is still the same.
    suspect: bool,
    /// Its line in the table of counters.
    line: usize,
    /// Packets sent into the device by our count, less those read out of it by the kernel's, at the least.
    empty_at: Option<i64>,
    windows: Windows,
    told_of_direction: bool,
}

/// What was taken of the windows of an interface.
#[derive(Debug, Default)]
struct Windows {
    /// Histograms as of the last sample that had them.
    told: Option<[Box<[u32; WINDOW_BUCKETS]>; 2]>,
    /// More was taken since.
    untold: bool,
}

impl Windows {
    /// `None` if there is nothing new, which most interfaces of a host mostly have.
    fn take(
        &mut self,
        ebpf: &mut Ebpf,
        slot: &NicSlot,
        (now, with_histograms): (MonotonicNs, bool),
    ) -> Option<[Bursts; 2]> {
        let at_rest = ebpf.is_at_rest(slot, now);
        if at_rest && !(self.untold && with_histograms) {
            return None;
        }
        self.untold = !with_histograms;
        Some(ebpf.take_bursts(slot, now))
    }

    /// The windows since the last call, by bytes.
    fn histograms(&mut self, taken: Option<[Bursts; 2]>) -> [Vec<[u64; 3]>; 2] {
        let Some(bursts) = taken else { return [Vec::new(), Vec::new()] };
        let before = self.told.get_or_insert_with(|| [Bursts::none().closed, Bursts::none().closed]);
        let new = [0, 1].map(|side| new_in_buckets(&before[side][..], &bursts[side].closed[..]));
        *before = bursts.map(|b| b.closed);
        new
    }
}

/// Whether both mean the same interface. `/proc` does not tell the guest's address.
pub(super) fn is_same(a: &Interface, b: &Interface) -> bool {
    let same_mac = a.mac == b.mac || a.mac.is_none() || b.mac.is_none();
    a.device == b.device && same_mac && (!a.device.is_empty() || a.alias == b.alias)
}

impl Tracked {
    /// Makes the readers and details of interfaces follow a new description, whose interfaces get what only we know.
    pub(super) fn carry_nics(&mut self, new: &mut [Interface]) {
        let mut old: Vec<Option<Nic>> = std::mem::take(&mut self.nics).into_iter().map(Some).collect();
        for interface in new.iter_mut() {
            let at = self.domain.interfaces.iter().position(|o| is_same(o, interface));
            if let Some(known) = at.map(|at| &self.domain.interfaces[at]) {
                (interface.ifindex, interface.netns) = (known.ifindex, known.netns);
                interface.since_ns = known.since_ns;
            }
            self.nics.push(at.and_then(|at| old.get_mut(at)?.take()).unwrap_or_default());
        }
        self.unwatched.extend(old.into_iter().flatten().filter_map(|nic| nic.slot));
        self.sample.interface_details = vec![InterfaceDetail::default(); new.len()];
    }

    pub(super) fn take_nic_slots(&mut self) -> Vec<NicSlot> {
        let nics = self.nics.iter_mut().filter_map(|nic| std::mem::take(nic).slot);
        let slots = nics.chain(self.unwatched.drain(..)).collect();
        for interface in &mut self.domain.interfaces {
            (interface.ifindex, interface.netns, interface.since_ns) = (None, None, None);
        }
        slots
    }

    /// Puts what the programs counted. Call within a read of [`ReadClass::Ebpf`].
    pub(super) fn put_nics(&mut self, ebpf: &mut Ebpf, now: MonotonicNs, with_histograms: bool) {
        let entities = self.sample.interfaces.iter_mut().zip(&mut self.sample.interface_details);
        for (nic, (values, detail)) in self.nics.iter_mut().zip(entities) {
            let (Some(slot), Some(device)) = (&nic.slot, nic.device) else { continue };
            let bursts = nic.windows.take(ebpf, slot, (now, with_histograms));
            let Some(traffic) = ebpf.traffic(slot) else { continue };
            put_traffic(values, device.kind, traffic);
            put_bursts(values, device.kind, bursts.as_ref());
            put_drops(detail, ebpf, (device.kind, traffic));
            detail.queues = traffic.queues.iter().map(|queue| queue_detail(device.kind, queue)).collect();
            if with_histograms {
                let [xmit, receive] = nic.windows.histograms(bursts).map(Some);
                (detail.rx_burst_hist, detail.tx_burst_hist) = guests_first(device.kind, xmit, receive);
            }
        }
    }

    /// Puts what the kernel counts, and what follows from that and our own count. True if nothing had to be left out.
    fn put_counters(&mut self, tables: &[CounterTable], functions: Option<&Answer>, ebpf: Option<&Ebpf>) {
        if self.nics.iter().all(|nic| nic.device.is_none() && nic.function.is_none()) {
            return;
        }
        self.sample.begin(ReadClass::ProcfsNet);
        let mut window: Option<Window> = None;
        for (nic, values) in self.nics.iter_mut().zip(&mut self.sample.interfaces) {
            if let Some((read, counters)) = nic.of_function(functions) {
                put_function(values, &counters);
                window = Some(both(window, read));
            }
            let Some(device) = nic.device else { continue };
            let table = tables.iter().find(|table| table.netns() == device.key.netns);
            let Some((table, read)) = table.and_then(|table| Some((table, table.window()?))) else {
                continue;
            };
            let Some(counters) = table.get(&nic.name, &mut nic.line) else {
                nic.suspect = true;
                continue;
            };
            if is_another(values, device.kind, &counters) {
                nic.suspect = true; // A device that was made anew under the old name.
                continue;
            }
            put_counters(values, device.kind, &counters);
            window = Some(both(window, read));
            if let (Some(ebpf), Some(slot), true) = (ebpf, &nic.slot, device.kind != DeviceKind::Macvtap) {
                put_backlog(values, &mut nic.empty_at, (ebpf, slot), counters.tx.packets);
            }
        }
        if let Some(window) = window {
            self.sample.end(ReadClass::ProcfsNet, window);
        }
    }
}

impl Nic {
    fn of_function(&self, answer: Option<&Answer>) -> Option<(Window, FunctionCounters)> {
        let answer = answer?;
        Some((answer.window, answer.of(self.function.as_ref()?)?))
    }
}

/// One that holds a read and those before it.
fn both(before: Option<Window>, read: Window) -> Window {
    before.map_or(read, |w| Window { begin: w.begin.min(read.begin), end: w.end.max(read.end) })
}

/// The guest's rx and tx, given what the host sends and receives.
fn guests_first<T>(kind: DeviceKind, xmit: T, receive: T) -> (T, T) {
    match kind {
        DeviceKind::Tap | DeviceKind::Other => (xmit, receive),
        DeviceKind::Macvtap => (receive, xmit),
    }
}

const RX: [Metric; 3] =
    [Metric::InterfaceRxPackets, Metric::InterfaceRxBytes, Metric::InterfaceRxWirePackets];
const TX: [Metric; 3] =
    [Metric::InterfaceTxPackets, Metric::InterfaceTxBytes, Metric::InterfaceTxWirePackets];

fn put_traffic(values: &mut Values, kind: DeviceKind, traffic: &DeviceTraffic) {
    const EBPF: SourceKind = SourceKind::Ebpf;
    let mut put = |[packets, bytes, wire]: [Metric; 3], passed: &Passed| {
        values.put(EBPF, packets, Count(passed.packets));
        values.put(EBPF, bytes, Bytes(passed.bytes));
        values.put_some(EBPF, wire, passed.wire_packets.map(Count));
    };
    match kind {
        DeviceKind::Tap | DeviceKind::Other => {
            put(RX, &traffic.xmit);
            put(TX, &traffic.receive);
            values.put(EBPF, Metric::InterfaceRxDrop, Count(traffic.refused));
        }
        // What comes down from the device below is handed over without passing a tracepoint as the macvtap's own.
        DeviceKind::Macvtap => {
            put(TX, &traffic.xmit);
            values.put(EBPF, Metric::InterfaceTxDrop, Count(traffic.refused));
        }
    }
}

fn put_bursts(values: &mut Values, kind: DeviceKind, bursts: Option<&[Bursts; 2]>) {
    let mut put = |bytes: Metric, packets: Metric, bursts: Option<&Bursts>| {
        values.put(SourceKind::Ebpf, bytes, Bytes(bursts.and_then(|b| b.most_bytes).unwrap_or(0)));
        values.put(SourceKind::Ebpf, packets, Count(bursts.and_then(|b| b.most_packets).unwrap_or(0)));
    };
    let (rx, tx) = guests_first(kind, bursts.map(|[xmit, _]| xmit), bursts.map(|[_, receive]| receive));
    if kind != DeviceKind::Macvtap {
        put(Metric::InterfaceRxBurstBytes, Metric::InterfaceRxBurstPackets, rx);
    }
    put(Metric::InterfaceTxBurstBytes, Metric::InterfaceTxBurstPackets, tx);
}

fn put_drops(detail: &mut InterfaceDetail, ebpf: &Ebpf, (kind, traffic): (DeviceKind, &DeviceTraffic)) {
    let Some(drops) = &traffic.drops else { return };
    for drop in drops {
        let toward_device = drop.place != DropPlace::After;
        let list = match (drop.place, toward_device == (kind != DeviceKind::Macvtap)) {
            (DropPlace::Device, true) => &mut detail.rx_drop_reasons,
            (DropPlace::Device, false) => &mut detail.tx_drop_reasons,
            (_, true) => &mut detail.rx_host_drop_reasons,
            (_, false) => &mut detail.tx_host_drop_reasons,
        };
        list.push((ebpf.drop_reason(drop.reason), drop.packets));
    }
}

fn queue_detail(kind: DeviceKind, [xmit, receive]: &[Passed; 2]) -> QueueDetail {
    let (rx, tx) = guests_first(kind, xmit, receive);
    QueueDetail {
        received_packets: rx.packets,
        received_bytes: rx.bytes,
        sent_packets: tx.packets,
        sent_bytes: tx.bytes,
    }
}

fn put_counters(values: &mut Values, kind: DeviceKind, counters: &DeviceCounters) {
    const PROCFS: SourceKind = SourceKind::Procfs;
    let mut put = |metrics: [Metric; 4], direction: &Direction| {
        let [bytes, packets, errors, dropped] = metrics;
        values.put(PROCFS, bytes, Bytes(direction.bytes));
        values.put(PROCFS, packets, Count(direction.packets));
        values.put(PROCFS, errors, Count(direction.errors));
        values.put(PROCFS, dropped, Count(direction.dropped));
    };
    let (rx, tx) = guests_first(kind, &counters.tx, &counters.rx);
    put(
        [
            Metric::InterfaceRxBytes,
            Metric::InterfaceRxPackets,
            Metric::InterfaceRxErrs,
            Metric::InterfaceRxDrop,
        ],
        rx,
    );
    put(
        [
            Metric::InterfaceTxBytes,
            Metric::InterfaceTxPackets,
            Metric::InterfaceTxErrs,
            Metric::InterfaceTxDrop,
        ],
        tx,
    );
}

fn put_function(values: &mut Values, counters: &FunctionCounters) {
    const PROCFS: SourceKind = SourceKind::Procfs;
    values.put(PROCFS, Metric::InterfaceRxPackets, Count(counters.rx_packets));
    values.put(PROCFS, Metric::InterfaceRxBytes, Bytes(counters.rx_bytes));
    values.put_some(PROCFS, Metric::InterfaceRxDrop, counters.rx_dropped.map(Count));
    values.put(PROCFS, Metric::InterfaceTxPackets, Count(counters.tx_packets));
    values.put(PROCFS, Metric::InterfaceTxBytes, Bytes(counters.tx_bytes));
    values.put_some(PROCFS, Metric::InterfaceTxDrop, counters.tx_dropped.map(Count));
}

/// Counters of a device only grow.
fn is_another(values: &Values, kind: DeviceKind, counters: &DeviceCounters) -> bool {
    let (rx, tx) = guests_first(kind, counters.tx.packets, counters.rx.packets);
    let falls = |metric, now| values.falls(SourceKind::Procfs, metric, now);
    falls(Metric::InterfaceRxPackets, rx) || falls(Metric::InterfaceTxPackets, tx)
}

/// Packets that are in the tap's ring: sent by our count, and not yet read by the kernel's.
///
/// The kernel's was read between our two. What was in the ring when we began to count is not known; but it cannot have
/// held less than nothing, so the difference at its least is that of an empty ring.
fn put_backlog(values: &mut Values, empty_at: &mut Option<i64>, (ebpf, slot): (&Ebpf, &NicSlot), taken: u64) {
    let (Some(before), Some(after)) =
        (values.now(SourceKind::Ebpf, Metric::InterfaceRxPackets), ebpf.sent_now(slot))
    else {
        return;
    };
    let difference = |sent: u64| sent.wrapping_sub(taken).cast_signed();
    let empty = empty_at.map_or(difference(after), |least| least.min(difference(after)));
    *empty_at = Some(empty);
    let at_least = (difference(before) - empty).max(0);
    values.put(SourceKind::Ebpf, Metric::InterfaceRxBacklog, Count(at_least.unsigned_abs()));
}

impl Tracker {
    /// Looks which devices the interfaces of a domain are now.
    pub(super) fn look_at_interfaces(&mut self, i: usize, depth: Depth) {
        if self.place == Where::Elsewhere {
            return; // A device of that name here is another one.
        }
        self.look_for_files(i);
        for n in 0..self.domains[i].domain.interfaces.len() {
            self.look_at_interface(i, n, depth);
        }
        self.check_directions(i);
        let unwatched = std::mem::take(&mut self.domains[i].unwatched);
        self.unwatch(unwatched);
    }

    fn look_at_interface(&mut self, i: usize, n: usize, depth: Depth) {
        let tracked = &self.domains[i];
        let (interface, nic, process) =
            (&tracked.domain.interfaces[n], &tracked.nics[n], tracked.domain.process);
        if let Some(address) = &interface.host_pci {
            // A device that is no virtual function hardly becomes one.
            if nic.function.is_none() && (!nic.sought || self.rounds.is_multiple_of(FOREIGN_ROUNDS)) {
                let found = VirtualFunction::find(Path::new("/sys"), address);
                let nic = &mut self.domains[i].nics[n];
                (nic.function, nic.sought) = (found, true);
            }
            return;
        }
        if interface.observable != Observable::Yes || interface.device.is_empty() {
            return;
        }
        let due = nic.suspect || self.rounds.is_multiple_of(FOREIGN_ROUNDS);
        if nic.device.is_none() && nic.had_one && !due {
            return;
        }
        if let Some(device) = nic.device {
            // A device that goes takes its line in the table of counters with it, which makes it suspect.
            let far = depth == Depth::Brief || self.devices.is_foreign(device.key.netns);
            if far && !due {
                return;
            }
            if let Some(name) = self.devices.name(process, device.key) {
                let nic = &mut self.domains[i].nics[n];
                nic.suspect = false;
                if nic.name != name {
                    let reason = format!("the network device {} is called {name} now", nic.name);
                    nic.name = name;
                    self.changed(i, &reason);
                }
                return;
            }
        }
        let found = self.devices.find(process, &interface.device);
        if found.is_some() || nic.device.is_some() {
            self.device_is(i, n, found);
        }
    }

    /// The device of an interface is another one than before, or gone.
    fn device_is(&mut self, i: usize, n: usize, found: Option<Device>) {
        let tracked = &mut self.domains[i];
        let old = std::mem::take(&mut tracked.nics[n]);
        let had_one = old.had_one || old.device.is_some();
        let interface = &mut tracked.domain.interfaces[n];
        let (name, queues) = (interface.device.clone(), interface.queues);
        self.unwatch(old.slot.into_iter().collect());
        self.tables_stale = true;
        let slot = found.and_then(|device| self.watch(device, queues));
        let since_ns = slot.as_ref().map(|_| MonotonicNs::now().0);
        let tracked = &mut self.domains[i];
        // What was read is of the old device.
        tracked.sample.interfaces[n] = Values::new(Scope::Interface);
        tracked.sample.interface_details[n] = InterfaceDetail::default();
        tracked.nics[n] = Nic { slot, device: found, name: name.clone(), had_one, ..Nic::default() };
        let interface = &mut tracked.domain.interfaces[n];
        interface.ifindex = found.map(|device| device.key.ifindex);
        interface.netns = found.map(|device| device.key.netns);
        interface.since_ns = since_ns;
        if found.is_some() && self.begin_epoch(i) && had_one {
            let detail = format!("the network device {name} is another one now: its counters start anew");
            self.notice_event(i, EventKind::CounterReset, &detail);
        }
        let what = if found.is_some() { "found" } else { "gone" };
        self.changed(i, &format!("network device {name} {what}"));
    }

    fn watch(&mut self, device: Device, queues: u32) -> Option<NicSlot> {
        match self.ebpf.as_mut()?.watch(device.key, queues) {
            Ok(slot) => Some(slot),
            Err(full @ NotFollowed::Full(_)) => {
                self.report_full(&full);
                None
            }
            Err(NotFollowed::Off) => None,
        }
    }

    pub(super) fn unwatch(&mut self, slots: Vec<NicSlot>) {
        if let Some(ebpf) = &mut self.ebpf {
            slots.into_iter().for_each(|slot| ebpf.unwatch(slot));
        }
    }

    /// Where libvirt does not tell, a domain's interfaces and disks are the taps and images that its QEMU holds open.
    fn look_for_files(&mut self, i: usize) {
        let tracked = &mut self.domains[i];
        let Some(process) = tracked.domain.process.filter(|_| tracked.domain.found_by == FoundBy::Procfs)
        else {
            return;
        };
        let files = tracked.open.as_ref().and_then(OpenFiles::count);
        let is_as_before = files == tracked.open_files;
        if files.is_some() && is_as_before && tracked.files_settled {
            return;
        }
        tracked.open_files = files;
        // Once more after a change: QEMU may be amid opening some and closing as many others.
        tracked.files_settled = is_as_before;
        self.look_for_images(i, process);
        let taps = netdev::held_taps(&self.root, process);
        let mut interfaces: Vec<_> = taps.iter().filter_map(|tap| self.interface_of(process, tap)).collect();
        let tracked = &mut self.domains[i];
        let same = |a: &[Interface], b: &[Interface]| {
            a.len() == b.len() && a.iter().zip(b).all(|(a, b)| is_same(a, b))
        };
        if !same(&tracked.domain.interfaces, &interfaces) {
            let values = interfaces.iter().map(|_| Values::new(Scope::Interface)).collect();
            let old = std::mem::replace(&mut tracked.sample.interfaces, values);
            for (new, values) in interfaces.iter().zip(&mut tracked.sample.interfaces) {
                let at = tracked.domain.interfaces.iter().position(|o| is_same(o, new));
                if let Some(known) = at.and_then(|at| old.get(at)) {
                    values.clone_from(known);
                }
            }
            tracked.carry_nics(&mut interfaces);
            tracked.domain.interfaces = interfaces;
            self.changed(i, "taps of its QEMU process changed");
        }
    }

    fn interface_of(&self, process: QemuProcess, tap: &HeldTap) -> Option<Interface> {
        let (device, kind) = match tap {
            HeldTap::Named(name) => (name.clone(), "ethernet"),
            HeldTap::Macvtap(ifindex) => (self.devices.find_index(process, *ifindex)?, "direct"),
        };
        Some(Interface {
            device,
            ifindex: None,
            netns: None,
            since_ns: None,
            mac: None,
            alias: None,
            kind: kind.to_owned(),
            source: None,
            bridge: None,
            interface_id: None,
            limits: Vec::new(),
            host_pci: None,
            model: None,
            queues: 1,
            filterref: None,
            parameters: Vec::new(),
            observable: Observable::Yes,
        })
    }

    /// Reads the kernel's counters of all interfaces.
    pub(super) fn read_counters(&mut self) {
        if std::mem::take(&mut self.tables_stale) {
            self.choose_tables();
        }
        for table in &mut self.tables {
            let count = &mut self.counts[SourceKind::Procfs as usize];
            let read = table.read();
            self.tables_stale |= read.is_err();
            match read {
                Ok(()) => count.reads += 1,
                Err(error) if ProcfsError::is_gone(&error) => count.lost += 1,
                Err(error) => count.failed(&error),
            }
        }
        let functions = self.ask_functions();
        for tracked in &mut self.domains {
            tracked.put_counters(&self.tables, functions.as_ref(), self.ebpf.as_ref());
        }
    }

    /// What the drivers of network cards count for the functions that guests were given.
    fn ask_functions(&mut self) -> Option<Answer> {
        let functions = self.domains.iter().flat_map(|tracked| &tracked.nics);
        let mut devices: Vec<u32> =
            functions.filter_map(|nic| nic.function.as_ref()).flat_map(|f| f.devices.clone()).collect();
        if devices.is_empty() {
            return None;
        }
        devices.sort_unstable();
        devices.dedup();
        let count = &mut self.counts[SourceKind::Procfs as usize];
        if self.functions.is_none() {
            match VirtualFunctions::start() {
                Ok(started) => self.functions = Some(started),
                Err(error) => count.failed(&error),
            }
        }
        let answer = self.functions.as_mut()?.ask(devices)?;
        count.reads += 1;
        if let Some(error) = &answer.error {
            count.failed(error);
        }
        Some(answer)
    }

    /// One table for each namespace that has a device of ours.
    fn choose_tables(&mut self) {
        let mut needed: Vec<(u32, QemuProcess)> = Vec::new();
        for tracked in &self.domains {
            let Some(process) = tracked.domain.process else { continue };
            for device in tracked.nics.iter().filter_map(|nic| nic.device) {
                if !needed.iter().any(|(netns, _)| *netns == device.key.netns) {
                    needed.push((device.key.netns, process));
                }
            }
        }
        let is_needed = |netns| needed.iter().any(|(other, _)| *other == netns);
        self.tables.retain(|table| is_needed(table.netns()));
        self.devices.keep(is_needed);
        for (netns, process) in needed {
            let path = self.devices.counters_file(netns, process);
            match self.tables.iter_mut().find(|table| table.netns() == netns) {
                Some(table) if table.path() == path => {}
                Some(table) => *table = self.devices.counters(netns, process),
                None => self.tables.push(self.devices.counters(netns, process)),
            }
        }
    }

    /// The guest's own address as the sender of what it seems to receive, and not of what it sends: then what the device
    /// is does not decide the direction. Says so once.
    fn check_directions(&mut self, i: usize) {
        let Some(ebpf) = &self.ebpf else { return };
        let tracked = &mut self.domains[i];
        let mut swapped = Vec::new();
        for (nic, interface) in tracked.nics.iter_mut().zip(&tracked.domain.interfaces) {
            let (Some(slot), Some(device), false) = (&nic.slot, nic.device, nic.told_of_direction) else {
                continue;
            };
            let Some(mac) = interface.mac.as_deref().and_then(parse_mac) else { continue };
            let [xmit, receive] = ebpf.sources(slot);
            let (rx, tx) = guests_first(device.kind, xmit, receive);
            if rx == Some(mac) && tx != Some(mac) {
                nic.told_of_direction = true;
                swapped.push(interface.device.clone());
            }
        }
        for device in swapped {
            let detail = format!(
                "network device {device}: the guest's own address sends what the guest should receive; its rx and tx may be swapped"
            );
            self.notice_event(i, EventKind::DirectionMismatch, &detail);
        }
    }
}

fn parse_mac(text: &str) -> Option<[u8; 6]> {
    let bytes: Option<Vec<u8>> = text.split(':').map(|byte| u8::from_str_radix(byte, 16).ok()).collect();
    bytes?.try_into().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_read() {
        assert_eq!(parse_mac("52:54:00:77:00:ff"), Some([0x52, 0x54, 0, 0x77, 0, 0xff]));
        for bad in ["", "52:54:00:77:00", "52:54:00:77:00:ff:00", "x2:54:00:77:00:ff"] {
            assert_eq!(parse_mac(bad), None, "{bad}");
        }
    }

    #[test]
    fn the_guest_receives_what_the_host_sends_except_on_a_macvtap() {
        let counters = DeviceCounters {
            rx: Direction { packets: 1, ..Direction::default() },
            tx: Direction { packets: 2, ..Direction::default() },
        };
        for (kind, rx) in [(DeviceKind::Tap, 2), (DeviceKind::Other, 2), (DeviceKind::Macvtap, 1)] {
            let mut values = Values::new(Scope::Interface);
            put_counters(&mut values, kind, &counters);
            assert_eq!(values.now(SourceKind::Procfs, Metric::InterfaceRxPackets), Some(rx), "{kind:?}");
        }
    }
}
