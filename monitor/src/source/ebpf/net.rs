//! Network devices that are watched: which, and what the programs of `monitor-ebpf/src/net.rs` counted for them.

use std::{
    collections::{BTreeMap, VecDeque},
    mem::offset_of,
    sync::atomic::{AtomicU32, AtomicU64, Ordering},
};

use aya::Ebpf as Object;
use monitor_ebpf::{
    LOOK, NIC_FILTER_BITS, NIC_QUEUES, NIC_TABLE_ENTRIES, NIC_TABLE_PROBES, NICS, Nic, NicCell, NicEntry,
    NicQueue, NicSide, NicTable, NicWindows, OPEN_WINDOWS, WINDOW_BUCKETS, WINDOW_MILLISECONDS, Window,
    nic_key, nic_start, window_bucket,
};

use super::{
    EbpfError, NotFollowed, map,
    mapped::{Mapped, change_bit},
    traffic::{Bursts, DeviceTraffic, DropPlace, Drops, Passed},
};
use crate::units::{MonotonicNs, NicKey};

/// A window that nobody added to for so long is over: longer than the kernel's coarsest tick (10 ms), within which a CPU
/// may add without looking at the clock.
const LEFT_BEHIND_MS: u32 = 50;
/// No packet for so long: every window is over and taken.
const QUIET_NS: u64 = 2_000_000 * LEFT_BEHIND_MS as u64;
/// More queues of one device are not told apart.
const MOST_QUEUES: u32 = 256;
const XMIT: usize = 0;
const RECEIVE: usize = 1;

/// A device that is watched.
#[derive(Debug, PartialEq, Eq)]
pub struct NicSlot {
    place: u32,
}

/// What is kept of a place beside the maps.
#[derive(Clone, Debug)]
struct Watched {
    key: NicKey,
    /// Its entry in the table.
    entry: usize,
    traffic: DeviceTraffic,
    /// Windows that user space closed.
    closed: [Box<[u32; WINDOW_BUCKETS]>; 2],
    /// Packets in both directions when it was asked last whether it is at rest.
    packets: u64,
    /// When that number was first seen.
    since: MonotonicNs,
    /// It had been seen long enough ago for every window to be over when that was asked last.
    at_rest: bool,
}

/// The maps of the network programs, and what is handed out of them.
pub(super) struct Net {
    table: Mapped<NicTable>,
    list: Mapped<Nic>,
    cells: Mapped<NicCell>,
    windows: Mapped<NicWindows>,
    queues: Mapped<NicQueue>,
    cpus: usize,
    /// By place; the ones beyond its end were never used.
    watched: Vec<Option<Watched>>,
    /// Places given back; the one given back longest ago is used again first.
    free: VecDeque<u32>,
    /// Whether drops are counted with their reasons.
    drops: bool,
    reasons: BTreeMap<u32, String>,
}

impl Net {
    /// Maps the maps; nothing is watched.
    pub(super) fn new(
        object: &Object,
        cpus: u32,
        drops: bool,
        reasons: BTreeMap<u32, String>,
    ) -> Result<Self, EbpfError> {
        let cpus = cpus as usize;
        Ok(Self {
            table: map(object, "NIC_TABLE")?,
            list: map(object, "NIC_LIST")?,
            cells: map(object, "NIC_CELLS")?,
            windows: map(object, "NIC_WINDOWS")?,
            queues: map(object, "NIC_QUEUES")?,
            cpus,
            watched: Vec::new(),
            free: VecDeque::new(),
            drops,
            reasons,
        })
    }

    /// Begins to watch a device, with so many queues told apart (0: none).
    ///
    /// # Errors
    /// [`NotFollowed::Full`] if the kernel tables have no room. Where only the queues have none, the rest is kept.
    pub(super) fn watch(&mut self, key: NicKey, queues: u32) -> Result<NicSlot, NotFollowed> {
        let full = NotFollowed::Full(self.watched.iter().flatten().count());
        let number = nic_key(key.netns, key.ifindex);
        let Some(entry) = self.free_entry(number) else { return Err(full) };
        let place = match u32::try_from(self.watched.len()) {
            Ok(new) if new < NICS => {
                self.watched.push(None);
                new
            }
            _ => self.free.pop_front().ok_or(full)?,
        };
        let queues = queues.min(MOST_QUEUES);
        let first_queue = if queues > 1 { self.free_queues(queues) } else { None };
        let side = NicSide {
            first_queue: first_queue.unwrap_or(0),
            queues: first_queue.map_or(0, |_| queues),
            ..NicSide::ZERO
        };
        for cell in self.cells_of(place) {
            self.cells.set(cell, NicCell { xmit: side, receive: side });
        }
        for direction in [XMIT, RECEIVE] {
            self.windows.set(2 * place as usize + direction, NicWindows::ZERO);
        }
        for queue in first_queue.into_iter().flat_map(|first| first..first + queues) {
            self.queues.set(queue as usize, NicQueue::ZERO);
        }
        self.list.set(place as usize, Nic { key: number, ..Nic::ZERO });
        self.half_of_entry(entry, offset_of!(NicEntry, place)).store(place, Ordering::Release);
        self.look_at_sources(entry);
        self.key_of(entry).store(number, Ordering::Release);
        let bit = key.ifindex % NIC_FILTER_BITS;
        change_bit(self.table.word((bit / 64) as usize), bit % 64, true);
        let nothing = || Box::new([0; WINDOW_BUCKETS]);
        let watched = Watched {
            key,
            entry,
            traffic: DeviceTraffic::default(),
            closed: [nothing(), nothing()],
            packets: 0,
            since: MonotonicNs::now(),
            at_rest: false,
        };
        self.watched[place as usize] = Some(watched);
        Ok(NicSlot { place })
    }

    /// Stops watching a device.
    #[expect(clippy::needless_pass_by_value, reason = "the slot must not be used afterwards")]
    pub(super) fn unwatch(&mut self, slot: NicSlot) {
        let Some(Watched { key, entry, .. }) = self.watched[slot.place as usize].take() else { return };
        self.key_of(entry).store(0, Ordering::Release);
        self.list.set(slot.place as usize, Nic::ZERO);
        let bit = key.ifindex % NIC_FILTER_BITS;
        if !self.watched.iter().flatten().any(|other| other.key.ifindex % NIC_FILTER_BITS == bit) {
            change_bit(self.table.word((bit / 64) as usize), bit % 64, false);
        }
        self.free.push_back(slot.place);
    }

    /// Reads every watched device; the other methods then have the figures.
    pub(super) fn read(&mut self) {
        for place in 0..self.watched.len() {
            if let Some(mut watched) = self.watched[place].take() {
                self.read_one(place, &mut watched.traffic);
                self.look_at_sources(watched.entry);
                self.watched[place] = Some(watched);
            }
        }
    }

    #[expect(clippy::cast_possible_truncation, reason = "places are below NICS")]
    fn read_one(&self, place: usize, traffic: &mut DeviceTraffic) {
        traffic.xmit = Passed { wire_packets: Some(0), ..Passed::default() };
        traffic.receive = traffic.xmit;
        for cell in self.cells_of(place as u32) {
            let cell = self.cells.get(cell);
            add(&mut traffic.xmit, &cell.xmit);
            add(&mut traffic.receive, &cell.receive);
        }
        let nic = self.list.get(place);
        traffic.refused = nic.refused;
        traffic.other_drops = nic.other_drops;
        traffic.drops = self.drops.then(|| nic.drops.iter().filter_map(drops).collect());
        traffic.queues.clear();
        for queue in self.queues_of(place as u32) {
            let queue = self.queues.get(queue as usize);
            let passed = |packets, bytes| Passed { packets, bytes, wire_packets: None };
            traffic.queues.push([
                passed(queue.xmit_packets, queue.xmit_bytes),
                passed(queue.receive_packets, queue.receive_bytes),
            ]);
        }
    }

    /// Figures of a device at the last [`Net::read`].
    pub(super) fn traffic(&self, slot: &NicSlot) -> Option<&DeviceTraffic> {
        Some(&self.watched[slot.place as usize].as_ref()?.traffic)
    }

    /// Packets that the driver took so far, at this moment.
    pub(super) fn sent_now(&self, slot: &NicSlot) -> u64 {
        self.cells_of(slot.place).map(|cell| self.cells.get(cell).xmit.packets).sum()
    }

    /// Source addresses of the packets that were looked at last: of what the host sent, and of what it received.
    pub(super) fn sources(&self, slot: &NicSlot) -> [Option<[u8; 6]>; 2] {
        let address = |word: u64| {
            let [a, b, c, d, e, f, ..] = word.to_le_bytes();
            (word != 0).then_some([a, b, c, d, e, f])
        };
        self.list.get(slot.place as usize).source_mac.map(address)
    }

    /// Name of a drop reason; its number where the kernel has none for it.
    pub(super) fn reason_name(&self, reason: u32) -> String {
        self.reasons.get(&reason).cloned().unwrap_or_else(|| format!("{reason:#x}"))
    }

    /// Whether nothing passed, as of the last [`Net::read`], since windows were taken last.
    pub(super) fn is_at_rest(&mut self, slot: &NicSlot, now: MonotonicNs) -> bool {
        let Some(watched) = self.watched[slot.place as usize].as_mut() else { return true };
        let packets = watched.traffic.xmit.packets.wrapping_add(watched.traffic.receive.packets);
        if packets != watched.packets {
            (watched.packets, watched.since, watched.at_rest) = (packets, now, false);
            return false;
        }
        std::mem::replace(&mut watched.at_rest, now.since(watched.since) > QUIET_NS)
    }

    /// The windows of both directions (xmit, receive); the largest ones are those that ended since the last call.
    pub(super) fn take_bursts(&mut self, slot: &NicSlot, now: MonotonicNs) -> [Bursts; 2] {
        let place = slot.place as usize;
        let Some(mut watched) = self.watched[place].take() else { return [Bursts::none(), Bursts::none()] };
        let bursts = [XMIT, RECEIVE].map(|d| self.take_windows(place, d, (&mut watched.closed[d], now)));
        self.watched[place] = Some(watched);
        bursts
    }

    fn take_windows(
        &self,
        place: usize,
        direction: usize,
        (closed, now): (&mut [u32; WINDOW_BUCKETS], MonotonicNs),
    ) -> Bursts {
        let of = 2 * place + direction;
        let mut ended: Vec<Window> = Vec::new();
        let mut collect =
            |window: Window| match ended.iter_mut().find(|w| w.millisecond == window.millisecond) {
                Some(other) => {
                    other.packets += window.packets;
                    other.bytes += window.bytes;
                }
                None => ended.push(window),
            };
        self.left_behind(place, direction, now).into_iter().for_each(&mut collect);
        let mut bursts = Bursts::none();
        let windows = self.windows.get(of);
        if windows.of == windows.wanted {
            let some = |most: u32| (most > 0).then_some(u64::from(most));
            (bursts.most_bytes, bursts.most_packets) = (some(windows.most_bytes), some(windows.most_packets));
        }
        // The word also holds `of`, which the programs write; only its lower half is ours.
        self.windows.half_of(of, WANTED_HALF).store(windows.wanted.wrapping_add(1), Ordering::Release);
        for window in ended {
            closed[window_bucket(window.bytes) as usize] += 1;
            bursts.most_bytes = bursts.most_bytes.max(Some(window.bytes.into()));
            bursts.most_packets = bursts.most_packets.max(Some(window.packets.into()));
        }
        for (i, pair) in windows.closed.into_iter().enumerate() {
            bursts.closed[2 * i] = low(pair).wrapping_add(closed[2 * i]);
            bursts.closed[2 * i + 1] = low(pair >> 32).wrapping_add(closed[2 * i + 1]);
        }
        bursts
    }

    /// Takes the windows that are over and that no program has closed, since nothing came after them.
    fn left_behind(&self, place: usize, direction: usize, now: MonotonicNs) -> Vec<Window> {
        const SIDE_WORDS: usize = size_of::<NicSide>() / 8;
        const WINDOW_WORD: usize = offset_of!(NicSide, window) / 8;
        let now_ms = now.0 / 1_000_000;
        #[expect(clippy::cast_possible_truncation, reason = "modulo 2²⁰")]
        let age = |window: Window| (now_ms as u32).wrapping_sub(window.millisecond) % WINDOW_MILLISECONDS;
        let word = direction * SIDE_WORDS + WINDOW_WORD;
        let on_cpus =
            self.cells_of(u32::try_from(place).unwrap_or(0)).map(|cell| self.cells.word_of(cell, word));
        let open = (0..OPEN_WINDOWS).map(|i| self.windows.word_of(2 * place + direction, i));
        let mut taken = Vec::new();
        for word in on_cpus.chain(open) {
            let found = word.load(Ordering::Relaxed);
            let window = Window::from_word(found);
            if window.packets > 0
                && age(window) > LEFT_BEHIND_MS
                && word.compare_exchange(found, 0, Ordering::AcqRel, Ordering::Relaxed).is_ok()
            {
                taken.push(window);
            }
        }
        taken
    }

    fn cells_of(&self, place: u32) -> std::ops::Range<usize> {
        place as usize * self.cpus..(place as usize + 1) * self.cpus
    }

    /// The queues of a watched device that are counted by themselves.
    fn queues_of(&self, place: u32) -> std::ops::Range<u32> {
        let NicSide { first_queue, queues, .. } = self.cells.get(self.cells_of(place).start).xmit;
        first_queue..first_queue + queues
    }

    /// A free table entry where a device is looked for.
    fn free_entry(&self, key: u64) -> Option<usize> {
        let start = nic_start(key);
        (0..NIC_TABLE_PROBES)
            .map(|i| (start + i) as usize % NIC_TABLE_ENTRIES)
            .find(|&entry| self.key_of(entry).load(Ordering::Acquire) == 0)
    }

    /// Asks for the source address of the next packet in each direction.
    fn look_at_sources(&self, entry: usize) {
        const BOTH: u32 = (LOOK as u32) << 16 | LOOK as u32;
        self.half_of_entry(entry, offset_of!(NicEntry, look)).store(BOTH, Ordering::Release);
    }

    /// The 32 bits at `offset` of a table entry.
    fn half_of_entry(&self, entry: usize, offset: usize) -> &AtomicU32 {
        self.table.half_of(0, (offset_of!(NicTable, entries) + entry * size_of::<NicEntry>() + offset) / 4)
    }

    /// Whose a table entry is.
    fn key_of(&self, entry: usize) -> &AtomicU64 {
        self.table.word((offset_of!(NicTable, entries) + entry * size_of::<NicEntry>()) / 8)
    }

    /// Queues in a row that no watched device has.
    fn free_queues(&self, count: u32) -> Option<u32> {
        let mut used: Vec<(u32, u32)> = (0..self.watched.len())
            .filter(|place| self.watched[*place].is_some())
            .map(|place| self.queues_of(u32::try_from(place).unwrap_or(0)))
            .filter(|queues| !queues.is_empty())
            .map(|queues| (queues.start, queues.end))
            .collect();
        used.sort_unstable();
        let mut free_from = 0;
        for (first, end) in used.into_iter().chain([(NIC_QUEUES, NIC_QUEUES)]) {
            if first - free_from >= count {
                return Some(free_from);
            }
            free_from = end;
        }
        None
    }
}

/// `NicWindows::wanted`, counted in halves of words.
const WANTED_HALF: usize = offset_of!(NicWindows, wanted) / 4;

#[expect(clippy::cast_possible_truncation, reason = "the lower half is meant")]
const fn low(pair: u64) -> u32 {
    pair as u32
}

fn add(to: &mut Passed, side: &NicSide) {
    to.packets += side.packets;
    to.bytes += side.bytes;
    to.wire_packets = to.wire_packets.map(|sum| sum + side.packets + side.more_wire_packets);
}

#[expect(clippy::cast_possible_truncation, reason = "both halves of the key have 32 bits")]
fn drops(drop: &monitor_ebpf::NicDrop) -> Option<Drops> {
    let place = DropPlace::of((drop.key >> 32) as u32)?;
    Some(Drops { place, reason: drop.key as u32, packets: drop.packets })
}
