//! What passes watched network devices: taps of VMs.
//!
//! Every packet of the host runs through these programs, so the first thing each does is to find out whether the device
//! is watched, by one bit for its index. A packet that the host sends through a device meets two of them:
//! `net_dev_start_xmit`, where it can still be looked at, and `net_dev_xmit`, where it is known whether the driver took
//! it, but may be gone already because the other side was faster. Both run on one CPU with bottom halves disabled, so
//! the first leaves a note for the second, who looks at nothing else. For the same reason no count needs a lock.
//!
//! Classifiers on the devices (tcx) would cost other devices nothing, but see a packet before the queueing discipline and
//! before it is segmented for a device that cannot: what the guest gets is known here only.
//!
//! A clock is read per packet only while there are few: see [`count_window`].

use aya_ebpf::{
    bindings::BPF_F_MMAPABLE,
    helpers::{bpf_get_smp_processor_id, bpf_jiffies64, bpf_ktime_get_ns},
    macros::{btf_tracepoint, map},
    maps::Array,
    programs::BtfTracePointContext,
};
use monitor_ebpf::{
    DROP_AFTER_DEVICE, DROP_BEFORE_DEVICE, DROP_IN_DEVICE, LOOK, NIC_FILTER_BITS, NIC_QUEUES,
    NIC_TABLE_ENTRIES, NIC_TABLE_PROBES, NICS, NetLayout, Nic, NicCell, NicDrop, NicEntry, NicNotes,
    NicQueue, NicSide, NicTable, NicWindows, OPEN_WINDOWS, WINDOW_MILLISECONDS, WINDOW_PACKET, Window,
    drop_key, nic_key, nic_start, window_bucket,
};

use crate::{
    atomic::{Half, Word},
    kernel::{Address, load, offset, probe},
};

#[unsafe(no_mangle)]
static NET_LAYOUT: NetLayout = NetLayout::ZERO;

#[map(name = "NIC_TABLE")]
static TABLE: Array<NicTable> = Array::with_max_entries(1, BPF_F_MMAPABLE);
#[map(name = "NIC_LIST")]
static LIST: Array<Nic> = Array::with_max_entries(NICS, BPF_F_MMAPABLE);
/// User space gives it room for all CPUs.
#[map(name = "NIC_CELLS")]
static CELLS: Array<NicCell> = Array::with_max_entries(NICS, BPF_F_MMAPABLE);
/// One for each CPU; user space gives it room for all.
#[map(name = "NIC_NOTES")]
static NOTES: Array<NicNotes> = Array::with_max_entries(1, 0);
/// Two for each place: `xmit`, then `receive`.
#[map(name = "NIC_WINDOWS")]
static WINDOWS: Array<NicWindows> = Array::with_max_entries(2 * NICS, BPF_F_MMAPABLE);
#[map(name = "NIC_QUEUES")]
static QUEUES: Array<NicQueue> = Array::with_max_entries(NIC_QUEUES, BPF_F_MMAPABLE);

/// Length of the Ethernet header, which `netif_receive_skb` no longer sees.
const ETHERNET_HEADER: u32 = 14;
/// Length of a VLAN tag.
const VLAN_TAG: u32 = 4;
/// No packet of so many bytes is cut: headers of Ethernet, IPv4 and TCP, and the least that the kernel takes for a
/// segment (`TCP_MIN_SND_MSS`).
const SHORT: u32 = 14 + 20 + 20 + 48;
/// A longer one than any that is usual on a wire, two VLAN tags included.
const PLAIN: u32 = 1522;
/// `CHECKSUM_PARTIAL` of `include/linux/skbuff.h`.
const CHECKSUM_PARTIAL: u32 = 3;
/// `NET_XMIT_DROP`, `NET_XMIT_CN` and `NETDEV_TX_BUSY` of `include/linux/netdevice.h`: thrown away; taken, but the
/// way is congested; not taken, will be sent again.
const XMIT_CONGESTED: u32 = 2;
const TX_BUSY: u32 = 0x10;
/// `SKB_GSO_UDP_L4` of `include/linux/skbuff.h`; other kinds that a guest can send are TCP, or UDP fragments (`SKB_GSO_UDP`).
const GSO_UDP_L4: u32 = 1 << 17;
const GSO_UDP: u32 = 1 << 16;

/// `trace_net_dev_start_xmit(const struct sk_buff *skb, const struct net_device *dev)`, before the driver gets the
/// packet. Notes for a watched device what `net_dev_xmit` can no longer see: segments, VLAN tag, queue.
#[btf_tracepoint(function = "net_dev_start_xmit")]
pub(crate) fn net_dev_start_xmit(ctx: BtfTracePointContext) -> i32 {
    let dev: Address = ctx.arg(1);
    // SAFETY: an argument of a BTF tracepoint.
    let Some(entry) = (unsafe { watched(dev) }) else { return 0 };
    let Some(NicNotes { notes: [outer, inner], .. }) = notes() else { return 0 };
    let skb: Address = ctx.arg(0);
    let device = dev as u64;
    let note = if outer.device == 0 || outer.device == device { outer } else { inner };
    // SAFETY: an argument of a BTF tracepoint.
    unsafe {
        let len: u32 = load(skb, offset(&NET_LAYOUT.skb_len));
        note.device = device;
        note.place = entry.place;
        note.wire = wire_packets(skb, len);
        note.queue = u32::from(load::<u16>(skb, offset(&NET_LAYOUT.skb_queue_mapping)));
        note.tag = if is_tagged(skb) { VLAN_TAG } else { 0 };
        if Half::of(&entry.look[0]).load() == LOOK {
            look_at_source(entry, 0, skb);
        }
    }
    0
}

/// `trace_net_dev_xmit(struct sk_buff *skb, int rc, struct net_device *dev, unsigned int skb_len)`, after the driver had
/// the packet, which may be freed by now. Adds it to its device if the driver took it, else to the refused ones.
#[btf_tracepoint(function = "net_dev_xmit")]
pub(crate) fn net_dev_xmit(ctx: BtfTracePointContext) -> i32 {
    let device = ctx.arg::<u64>(2);
    let Some(NicNotes { notes: [outer, inner], .. }) = notes() else { return 0 };
    let note = if outer.device == device { outer } else { inner };
    if note.device != device {
        return 0;
    }
    note.device = 0;
    let rc: u32 = ctx.arg(1);
    if rc != 0 && rc != XMIT_CONGESTED {
        if rc != TX_BUSY
            && let Some(nic) = nic(note.place)
        {
            Word::of(&nic.refused).add(1);
        }
        return 0;
    }
    let Some(cell) = cell(note.place) else { return 0 };
    let bytes = ctx.arg::<u32>(3) + note.tag;
    count(&mut cell.xmit, bytes, note.wire);
    count_window(&mut cell.xmit, bytes, 2 * note.place);
    if let Some(queue) = queue(&cell.xmit, note.queue) {
        Word::of(&queue.xmit_packets).add(1);
        Word::of(&queue.xmit_bytes).add(u64::from(bytes));
    }
    0
}

/// `trace_netif_receive_skb(struct sk_buff *skb)`, where the host takes a packet from a device, the Ethernet header
/// already in front of it. Adds it to its device.
#[btf_tracepoint(function = "netif_receive_skb")]
pub(crate) fn netif_receive_skb(ctx: BtfTracePointContext) -> i32 {
    let skb: Address = ctx.arg(0);
    // SAFETY: an argument of a BTF tracepoint, and a device loaded through it.
    unsafe {
        let dev: Address = load(skb, offset(&NET_LAYOUT.skb_dev));
        let Some(entry) = watched(dev) else { return 0 };
        let Some(cell) = cell(entry.place) else { return 0 };
        let len: u32 = load::<u32>(skb, offset(&NET_LAYOUT.skb_len)) + ETHERNET_HEADER;
        let bytes = if is_tagged(skb) { len + VLAN_TAG } else { len };
        count(&mut cell.receive, bytes, wire_packets(skb, len));
        count_window(&mut cell.receive, bytes, 2 * entry.place + 1);
        if Half::of(&entry.look[1]).load() == LOOK {
            look_at_source(entry, 1, skb);
        }
        if cell.receive.queues != 0 {
            // `skb_record_rx_queue()` stores the number plus 1.
            let number = u32::from(load::<u16>(skb, offset(&NET_LAYOUT.skb_queue_mapping))).wrapping_sub(1);
            if let Some(queue) = queue(&cell.receive, number) {
                Word::of(&queue.receive_packets).add(1);
                Word::of(&queue.receive_bytes).add(u64::from(bytes));
            }
        }
    }
    0
}

/// `trace_kfree_skb(struct sk_buff *skb, void *location, enum skb_drop_reason reason, …)`: a packet is thrown away
/// (Linux 6.11 appended the receiving socket). Counts it for the device it belongs to, by place and reason.
#[btf_tracepoint(function = "kfree_skb")]
pub(crate) fn kfree_skb(ctx: BtfTracePointContext) -> i32 {
    let skb: Address = ctx.arg(0);
    // SAFETY: an argument of a BTF tracepoint, and a device loaded through it. What stands in the place of a device
    // that is not set reads as 0 or as some other number, which no watched device has.
    unsafe {
        let dev: Address = load(skb, offset(&NET_LAYOUT.skb_dev));
        let Some(entry) = watched(dev) else { return 0 };
        let (Some(notes), Some(nic)) = (notes(), nic(entry.place)) else { return 0 };
        let device = dev as u64;
        // Set by `__netif_receive_skb_core()`: the packet came from here.
        let came_from: u32 = load(skb, offset(&NET_LAYOUT.skb_iif));
        let at = if notes.notes[0].device == device || notes.notes[1].device == device {
            DROP_IN_DEVICE
        } else if came_from == load(dev, offset(&NET_LAYOUT.dev_ifindex)) {
            DROP_AFTER_DEVICE
        } else {
            DROP_BEFORE_DEVICE
        };
        count_drop(nic, drop_key(at, ctx.arg::<u32>(2)));
    }
    0
}

#[inline(always)]
pub(crate) fn count(side: &mut NicSide, bytes: u32, wire: u32) {
    side.packets += 1;
    side.bytes += u64::from(bytes);
    if wire != 1 {
        side.more_wire_packets += u64::from(wire - 1);
    }
}

/// The notes of this CPU.
#[inline(always)]
fn notes() -> Option<&'static mut NicNotes> {
    // SAFETY: plain helper call.
    let cpu = unsafe { bpf_get_smp_processor_id() };
    // SAFETY: a valid map value; only this CPU changes it, see the top of this file.
    unsafe { NOTES.get_ptr_mut(cpu)?.as_mut() }
}

/// The entry of a device, if it is watched.
///
/// # Safety
/// `dev` must be a pointer to a `net_device` that the verifier trusts.
#[inline(always)]
unsafe fn watched(dev: Address) -> Option<&'static NicEntry> {
    // SAFETY: by the caller.
    let ifindex: u32 = unsafe { load(dev, offset(&NET_LAYOUT.dev_ifindex)) };
    // SAFETY: a valid map value for the life of the program; user space changes whole words.
    let table = unsafe { &*TABLE.get_ptr(0)? };
    let bit = ifindex % NIC_FILTER_BITS;
    if table.filter[(bit / 64) as usize] >> (bit % 64) & 1 == 0 {
        return None;
    }
    // SAFETY: by the caller; the namespace was loaded through the device.
    let netns: u32 = unsafe {
        let net: Address = load(dev, offset(&NET_LAYOUT.dev_net));
        load(net, offset(&NET_LAYOUT.net_inum))
    };
    let key = nic_key(netns, ifindex);
    let start = nic_start(key);
    for i in 0..NIC_TABLE_PROBES {
        let entry = &table.entries[(start + i) as usize % NIC_TABLE_ENTRIES];
        if entry.key == key {
            return Some(entry);
        }
    }
    None
}

/// The counts of a device on this CPU.
#[inline(always)]
pub(crate) fn cell(place: u32) -> Option<&'static mut NicCell> {
    // SAFETY: plain helper call.
    let cpu = unsafe { bpf_get_smp_processor_id() };
    // SAFETY: a valid map value; only this CPU changes it, see the top of this file.
    unsafe { CELLS.get_ptr_mut(place.wrapping_mul(offset(&NET_LAYOUT.cpus)).wrapping_add(cpu))?.as_mut() }
}

#[inline(always)]
pub(crate) fn nic(place: u32) -> Option<&'static Nic> {
    // SAFETY: a valid map value; what changes in it is accessed atomically.
    unsafe { LIST.get_ptr(place)?.as_ref() }
}

/// A queue of a device whose queues are counted by themselves.
#[inline(always)]
fn queue(side: &NicSide, queue: u32) -> Option<&'static NicQueue> {
    if queue >= side.queues {
        return None;
    }
    // SAFETY: a valid map value, accessed atomically.
    unsafe { QUEUES.get_ptr(side.first_queue + queue)?.as_ref() }
}

/// Whether there is a VLAN tag that is not in the packet's bytes.
///
/// # Safety
/// `skb` must be a pointer that the verifier trusts.
#[inline(always)]
unsafe fn is_tagged(skb: Address) -> bool {
    let bit = offset(&NET_LAYOUT.skb_vlan_bit);
    // SAFETY: by the caller.
    unsafe {
        if bit == 0 {
            load::<u32>(skb, offset(&NET_LAYOUT.skb_vlan)) != 0
        } else {
            u32::from(load::<u8>(skb, offset(&NET_LAYOUT.skb_vlan))) & bit != 0
        }
    }
}

/// Whether a packet can be one that will be cut into segments, which is known for sure from its shared information only,
/// dear to read as that is. Whoever cuts it has to make the checksums, so they must not be there yet (the kernel's stack
/// and virtio's specification demand that), unless it is too large to be sent as it is.
///
/// # Safety
/// `skb` must be a pointer that the verifier trusts.
#[inline(always)]
unsafe fn may_be_segmented(skb: Address, len: u32) -> bool {
    if len <= SHORT || len > PLAIN {
        return len > SHORT;
    }
    // SAFETY: by the caller.
    let bits: u8 = unsafe { load(skb, offset(&NET_LAYOUT.skb_ip_summed)) };
    (u32::from(bits) >> offset(&NET_LAYOUT.skb_ip_summed_bit)) & 3 == CHECKSUM_PARTIAL
}

/// How many packets a packet becomes on a wire. `len` with the Ethernet header.
///
/// # Safety
/// `skb` must be a pointer that the verifier trusts.
#[inline(always)]
unsafe fn wire_packets(skb: Address, len: u32) -> u32 {
    // SAFETY: by the caller.
    if !unsafe { may_be_segmented(skb, len) } {
        return 1;
    }
    // SAFETY: by the caller.
    let (head, end) = unsafe {
        (load::<u64>(skb, offset(&NET_LAYOUT.skb_head)), load::<u32>(skb, offset(&NET_LAYOUT.skb_end)))
    };
    let shared = head + u64::from(end);
    let gso: u32 = probe(shared, offset(&NET_LAYOUT.shared_gso_size)).unwrap_or(0);
    let (size, segments) = (gso & 0xffff, gso >> 16);
    if size == 0 {
        return 1;
    }
    if segments != 0 {
        return segments;
    }
    // The tun driver does not believe a guest's count and leaves it to be computed.
    // SAFETY: by the caller.
    let (mac, transport) = unsafe {
        (
            load::<u16>(skb, offset(&NET_LAYOUT.skb_mac_header)),
            load::<u16>(skb, offset(&NET_LAYOUT.skb_transport_header)),
        )
    };
    let kind: u32 = probe(shared, offset(&NET_LAYOUT.shared_gso_type)).unwrap_or(0);
    let header = if kind & GSO_UDP_L4 != 0 {
        8
    } else if kind & GSO_UDP != 0 {
        0
    } else {
        // Upper half of byte 12 of a TCP header: its length in words of 4 bytes.
        u32::from(probe::<u8>(head + u64::from(transport), 12).unwrap_or(0x50) >> 4) * 4
    };
    let headers = u32::from(transport.wrapping_sub(mac)) + header;
    let payload = len.saturating_sub(headers);
    let count = payload.wrapping_add(size - 1) / size;
    if count > 1 { count } else { 1 }
}

/// Remembers the source address of a packet, as was asked for: the guest's own address can only come from the guest.
///
/// # Safety
/// `skb` must be a pointer that the verifier trusts.
#[inline(always)]
unsafe fn look_at_source(entry: &NicEntry, direction: usize, skb: Address) {
    // SAFETY: by the caller.
    let (head, mac) = unsafe {
        (load::<u64>(skb, offset(&NET_LAYOUT.skb_head)), load::<u16>(skb, offset(&NET_LAYOUT.skb_mac_header)))
    };
    Half::of(&entry.look[direction]).store(0);
    if let (Some(nic), Some(source)) = (nic(entry.place), probe::<u64>(head + u64::from(mac), 6)) {
        Word::of(&nic.source_mac[direction]).store(source & 0xffff_ffff_ffff);
    }
}

/// A packet each this often or more often makes the clock too dear to be read for all.
const DENSE_NS: u64 = 4_000;
/// Packets that are then counted without reading it.
const CREDIT: u32 = 15;

/// Adds a packet to the millisecond it passes in.
///
/// A clock costs more than all the rest, so it is read at each packet only while they come more than [`DENSE_NS`]
/// apart. Else the next [`CREDIT`] packets count into the same millisecond, unless the kernel's tick says that time went
/// on: a window is wrong by those at most, one in sixteen. Each CPU sums for itself, and hands in its sum when a
/// packet falls into a later millisecond; user space collects what was left behind. `of` is the place in `WINDOWS`.
#[inline(always)]
pub(crate) fn count_window(side: &mut NicSide, bytes: u32, of: u32) {
    let add = WINDOW_PACKET + u64::from(bytes);
    // SAFETY: plain helper call.
    let jiffy = unsafe { bpf_jiffies64() };
    if side.credit > 0 && side.jiffy == jiffy {
        side.credit -= 1;
        side.window += add;
        return;
    }
    // SAFETY: plain helper call.
    let now = unsafe { bpf_ktime_get_ns() };
    let packets = 1 + side.granted.wrapping_sub(side.credit);
    let dense = now.wrapping_sub(side.clock_ns) < DENSE_NS * u64::from(packets);
    side.credit = if dense { CREDIT } else { 0 };
    side.granted = side.credit;
    side.clock_ns = now;
    side.jiffy = jiffy;
    let begin = Window::begin(now / 1_000_000);
    let before = side.window;
    if before >> 44 == begin >> 44 && before != 0 {
        side.window = before + add;
        return;
    }
    // User space takes a sum that was left behind, so it is exchanged and not overwritten.
    let before = Word::of(&side.window).swap(begin + add);
    // SAFETY: a valid map value; what changes in it is accessed atomically or by one closer at a time.
    if let Some(windows) = unsafe { WINDOWS.get_ptr_mut(of).and_then(|w| w.as_mut()) } {
        hand_in(windows, before);
    }
}

/// Attempts to hand in a sum while other CPUs do the same.
const ATTEMPTS: u32 = 4;

/// Adds what one CPU counted in a millisecond to what the others did. Whoever puts a later millisecond in the place of
/// an earlier one closes that.
#[inline(always)]
fn hand_in(windows: &mut NicWindows, sum: u64) {
    let window = Window::from_word(sum);
    if window.packets == 0 {
        return;
    }
    let place = window.millisecond as usize % OPEN_WINDOWS;
    let open = Word::of(&windows.open[place]);
    let mut found = open.load();
    for _ in 0..ATTEMPTS {
        let there = Window::from_word(found);
        let same = there.packets != 0 && there.millisecond == window.millisecond;
        let ahead = window.millisecond.wrapping_sub(there.millisecond) % WINDOW_MILLISECONDS;
        if there.packets != 0 && ahead > WINDOW_MILLISECONDS / 2 {
            return close(windows, window); // Too late to be added: the place is taken by a later one.
        }
        let new = if same { found + (sum & ((1 << 44) - 1)) } else { sum };
        let now = open.exchange(found, new);
        if now != found {
            found = now;
            continue;
        }
        if !same && there.packets != 0 {
            close(windows, there);
        }
        return;
    }
    close(windows, window);
}

/// Counts a window that is over.
#[inline(always)]
fn close(windows: &mut NicWindows, window: Window) {
    let bucket = window_bucket(window.bytes) as usize;
    if let Some(pair) = windows.closed.get(bucket / 2) {
        Word::of(pair).add(1 << (bucket % 2 * 32));
    }
    // SAFETY: aligned and valid; user space changes the word as a whole.
    let wanted = unsafe { core::ptr::read_volatile(&windows.wanted) };
    if windows.of != wanted {
        windows.most_bytes = 0;
        windows.most_packets = 0;
    }
    if window.bytes > windows.most_bytes {
        windows.most_bytes = window.bytes;
    }
    if window.packets > windows.most_packets {
        windows.most_packets = window.packets;
    }
    windows.of = wanted;
}

#[inline(always)]
fn count_drop(nic: &Nic, key: u64) {
    for drop in &nic.drops {
        let NicDrop { key: at, packets } = drop;
        let mut found = Word::of(at).load();
        if found == 0 {
            found = Word::of(at).exchange(0, key);
            if found == 0 {
                found = key;
            }
        }
        if found == key {
            Word::of(packets).add(1);
            return;
        }
    }
    Word::of(&nic.other_drops).add(1);
}
