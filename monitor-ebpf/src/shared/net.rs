//! What the network programs and user space share: which devices are watched, and what passed them.
//!
//! All directions here are the *device's*: `xmit` is what the host sends through it, `receive` what it receives from it.
//! Which of the two the guest receives depends on the kind of device and is user space's business.
//!
//! A device is known by its network namespace and its index in there. Counts are kept per CPU without locks: both hooks
//! run with bottom halves disabled, so that nothing else on the CPU counts for the same device meanwhile.

use crate::{Histogram, bucket};

/// Bits in the first-stage filter: bit `ifindex % NIC_FILTER_BITS` is set for every watched device.
pub const NIC_FILTER_BITS: u32 = 65_536;
/// 64-bit words of the filter (8 KiB).
pub const NIC_FILTER_WORDS: usize = (NIC_FILTER_BITS / 64) as usize;
/// Devices that can be watched at once.
pub const NICS: u32 = 512;
/// Entries of the table that maps a device to its place; a power of two, four times [`NICS`] so that probing stays short.
pub const NIC_TABLE_ENTRIES: usize = 1 << NIC_TABLE_LOG2;
const NIC_TABLE_LOG2: u32 = 11;
/// Neighbouring entries looked at for one device, in user space and in the kernel alike.
pub const NIC_TABLE_PROBES: u32 = 8;
/// Queues that are counted by themselves, over all devices with more than one.
pub const NIC_QUEUES: u32 = 2_048;

/// A device: inode number of its network namespace (`net.ns.inum`) and its index there. Never 0.
#[must_use]
pub const fn nic_key(netns: u32, ifindex: u32) -> u64 {
    (netns as u64) << 32 | ifindex as u64
}

/// Where the search for a device begins in the table (Fibonacci hashing).
#[must_use]
pub const fn nic_start(key: u64) -> u32 {
    (key.wrapping_mul(0x9E37_79B9_7F4A_7C15) >> (64 - NIC_TABLE_LOG2)) as u32
}

/// An entry of the table: the device ([`nic_key`], 0 = free) and its place. The place is written first.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NicEntry {
    /// The device.
    pub key: u64,
    /// Its place in the other arrays.
    pub place: u32,
    /// [`LOOK`] if the source address of the next packet is to be looked at, by direction (xmit, receive). User space sets
    /// both at once, the program that looks clears its own.
    pub look: [u16; 2],
}

/// See [`NicEntry::look`].
pub const LOOK: u16 = 1;

/// The table from device to place, and the filter in front of it: together, because each look into a map has its price.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct NicTable {
    /// The first stage, see [`NIC_FILTER_BITS`].
    pub filter: [u64; NIC_FILTER_WORDS],
    /// The second one.
    pub entries: [NicEntry; NIC_TABLE_ENTRIES],
}

/// What passed a device in one direction on one CPU, cumulative since it is watched. One cache line.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NicSide {
    /// Packets as the device counts them: a GSO packet is one.
    pub packets: u64,
    /// Bytes of those, with Ethernet header and VLAN tag.
    pub bytes: u64,
    /// Packets on the wire beyond one for each packet: what GSO packets become.
    pub more_wire_packets: u64,
    /// First of the device's queues in their map; written by user space.
    pub first_queue: u32,
    /// How many of them are counted by themselves; 0 = none. Written by user space.
    pub queues: u32,
    /// The window that packets on this CPU are added to, see [`Window`].
    pub window: u64,
    /// `CLOCK_MONOTONIC` when the clock was last read, nanoseconds.
    pub clock_ns: u64,
    /// The kernel's `jiffies` then.
    pub jiffy: u64,
    /// Packets that may yet be added to `window` before the clock is read again.
    pub credit: u32,
    /// What `credit` was when the clock was read.
    pub granted: u32,
}

impl NicSide {
    /// Nothing counted.
    pub const ZERO: Self = Self {
        packets: 0,
        bytes: 0,
        more_wire_packets: 0,
        first_queue: 0,
        queues: 0,
        window: 0,
        clock_ns: 0,
        jiffy: 0,
        credit: 0,
        granted: 0,
    };
}

/// Both directions of one device on one CPU. The element `place * CPUs + CPU` of its map.
#[repr(C, align(64))]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NicCell {
    /// What the host sends through the device.
    pub xmit: NicSide,
    /// What it receives from it.
    pub receive: NicSide,
}

impl NicCell {
    /// Nothing counted.
    pub const ZERO: Self = Self { xmit: NicSide::ZERO, receive: NicSide::ZERO };
}

/// What `net_dev_start_xmit` saw of the packet that a watched device's driver has at this moment on one CPU.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NicNote {
    /// Address of the device; 0 = none has a packet.
    pub device: u64,
    /// Its place.
    pub place: u32,
    /// Packets on the wire that the packet becomes.
    pub wire: u32,
    /// The queue it goes to.
    pub queue: u32,
    /// Bytes of a VLAN tag that is not among the packet's bytes yet.
    pub tag: u32,
}

impl NicNote {
    /// Nothing.
    pub const ZERO: Self = Self { device: 0, place: 0, wire: 0, queue: 0, tag: 0 };
}

/// The notes of one CPU: a driver may send through another device meanwhile, as a macvtap does.
#[repr(C, align(64))]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NicNotes {
    /// The outer one first.
    pub notes: [NicNote; 2],
    /// Nothing; there is no padding.
    pub reserved: [u64; 2],
}

impl NicNotes {
    /// Nothing.
    pub const ZERO: Self = Self { notes: [NicNote::ZERO; 2], reserved: [0; 2] };
}

/// What passed in one millisecond, in one word so that it changes at once: the millisecond of `CLOCK_MONOTONIC` modulo
/// 2²⁰ in the upper 20 bits, packets in the next 18, bytes in the lower 26. 0 = nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Window {
    /// Which millisecond, modulo 2²⁰.
    pub millisecond: u32,
    /// Packets.
    pub packets: u32,
    /// Bytes.
    pub bytes: u32,
}

/// Milliseconds that are told apart.
pub const WINDOW_MILLISECONDS: u32 = 1 << 20;
/// What one packet adds to the word of a window, beside its bytes.
pub const WINDOW_PACKET: u64 = 1 << 26;

impl Window {
    /// From its word.
    #[must_use]
    #[inline(always)]
    #[expect(clippy::cast_possible_truncation, reason = "masked or shifted below 32 bits")]
    pub const fn from_word(word: u64) -> Self {
        Self {
            millisecond: (word >> 44) as u32,
            packets: (word >> 26) as u32 & 0x3_ffff,
            bytes: word as u32 & 0x3ff_ffff,
        }
    }

    /// The word of a window in which nothing has passed.
    #[must_use]
    #[inline(always)]
    pub const fn begin(millisecond: u64) -> u64 {
        (millisecond & (WINDOW_MILLISECONDS as u64 - 1)) << 44
    }
}

/// Windows of one device that are open at once; a power of two.
pub const OPEN_WINDOWS: usize = 8;
/// Buckets of the histogram of windows by bytes; the last one counts from 62 MiB on.
pub const WINDOW_BUCKETS: usize = LAST_WINDOW_BUCKET as usize + 1;
const LAST_WINDOW_BUCKET: u32 = 335;

/// The bucket of a window, of those of [`crate::bucket_range`].
#[must_use]
#[inline(always)]
pub const fn window_bucket(bytes: u32) -> u32 {
    let index = bucket(bytes as u64);
    if index < LAST_WINDOW_BUCKET { index } else { LAST_WINDOW_BUCKET }
}
const _: () = assert!(WINDOW_BUCKETS < size_of::<Histogram>() / 4);

/// The windows of one device in one direction, over all CPUs.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NicWindows {
    /// Open windows, by millisecond modulo [`OPEN_WINDOWS`]: what CPUs have handed in. See [`Window`].
    pub open: [u64; OPEN_WINDOWS],
    /// Grows when user space takes the largest; written by user space only.
    pub wanted: u32,
    /// `wanted` when the largest were last set; what they hold is of no use if it differs.
    pub of: u32,
    /// Bytes of the largest window closed since.
    pub most_bytes: u32,
    /// Packets of the one with most packets.
    pub most_packets: u32,
    /// Windows closed by their bytes, cumulative since the device is watched, modulo 2³²: two buckets in each word,
    /// the even one in the lower half.
    pub closed: [u64; WINDOW_BUCKETS / 2],
}

impl NicWindows {
    /// Nothing passed.
    pub const ZERO: Self = Self {
        open: [0; OPEN_WINDOWS],
        wanted: 0,
        of: 0,
        most_bytes: 0,
        most_packets: 0,
        closed: [0; WINDOW_BUCKETS / 2],
    };
}

/// What one direction of one queue carried since its device is watched.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NicQueue {
    /// Packets the host sent through it.
    pub xmit_packets: u64,
    /// Their bytes.
    pub xmit_bytes: u64,
    /// Packets it received from it.
    pub receive_packets: u64,
    /// Their bytes.
    pub receive_bytes: u64,
}

impl NicQueue {
    /// Nothing passed.
    pub const ZERO: Self = Self { xmit_packets: 0, xmit_bytes: 0, receive_packets: 0, receive_bytes: 0 };
}

/// Kinds of drops of one device that are told apart; the rest is summed.
pub const NIC_DROPS: usize = 24;

/// Packets dropped at one place for one reason.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NicDrop {
    /// [`drop_key`]; 0 = free.
    pub key: u64,
    /// How many.
    pub packets: u64,
}

/// One watched device.
#[repr(C, align(64))]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Nic {
    /// The device, see [`nic_key`]; written by user space.
    pub key: u64,
    /// Packets that the driver refused: what it returned was no success.
    pub refused: u64,
    /// Source address of the packet that was looked at last, by direction (xmit, receive); in the lower six bytes, the
    /// first one lowest. 0 = none.
    pub source_mac: [u64; 2],
    /// Drops that found no entry.
    pub other_drops: u64,
    /// Drops by place and reason.
    pub drops: [NicDrop; NIC_DROPS],
    /// Nothing; there is no padding.
    pub reserved: [u64; 3],
}

impl Nic {
    /// A free place.
    pub const ZERO: Self = Self {
        key: 0,
        refused: 0,
        source_mac: [0; 2],
        other_drops: 0,
        drops: [NicDrop { key: 0, packets: 0 }; NIC_DROPS],
        reserved: [0; 3],
    };
}

/// What a drop is counted under: place and the kernel's `enum skb_drop_reason`.
#[must_use]
pub const fn drop_key(place: u32, reason: u32) -> u64 {
    (place as u64) << 32 | reason as u64
}

/// The driver had the packet and did not take it.
pub const DROP_IN_DEVICE: u32 = 1;
/// The host was about to send the packet through the device.
pub const DROP_BEFORE_DEVICE: u32 = 2;
/// The host had received the packet from the device.
pub const DROP_AFTER_DEVICE: u32 = 3;

/// Byte offsets into kernel structures of the network, found in the running kernel's BTF, and facts of the host.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NetLayout {
    /// CPUs that the cells have room for.
    pub cpus: u32,
    /// `sk_buff.dev`.
    pub skb_dev: u32,
    /// `sk_buff.len`.
    pub skb_len: u32,
    /// `sk_buff.head`.
    pub skb_head: u32,
    /// `sk_buff.end`.
    pub skb_end: u32,
    /// `sk_buff.queue_mapping`.
    pub skb_queue_mapping: u32,
    /// `sk_buff.skb_iif`.
    pub skb_iif: u32,
    /// `sk_buff.vlan_all`, or the byte of `sk_buff.vlan_present` (before Linux 6.2).
    pub skb_vlan: u32,
    /// The bit of `vlan_present` in that byte; 0 where there is `vlan_all`.
    pub skb_vlan_bit: u32,
    /// The byte that holds `sk_buff.ip_summed`.
    pub skb_ip_summed: u32,
    /// The lower one of its two bits.
    pub skb_ip_summed_bit: u32,
    /// `sk_buff.mac_header`.
    pub skb_mac_header: u32,
    /// `sk_buff.transport_header`.
    pub skb_transport_header: u32,
    /// `skb_shared_info.gso_size`; `gso_segs` follows.
    pub shared_gso_size: u32,
    /// `skb_shared_info.gso_type`.
    pub shared_gso_type: u32,
    /// `net_device.ifindex`.
    pub dev_ifindex: u32,
    /// `net_device.nd_net.net`.
    pub dev_net: u32,
    /// `net.ns.inum`.
    pub net_inum: u32,
}

impl NetLayout {
    /// Before the offsets are known.
    pub const ZERO: Self = Self {
        cpus: 0,
        skb_dev: 0,
        skb_len: 0,
        skb_head: 0,
        skb_end: 0,
        skb_queue_mapping: 0,
        skb_iif: 0,
        skb_vlan: 0,
        skb_vlan_bit: 0,
        skb_ip_summed: 0,
        skb_ip_summed_bit: 0,
        skb_mac_header: 0,
        skb_transport_header: 0,
        shared_gso_size: 0,
        shared_gso_type: 0,
        dev_ifindex: 0,
        dev_net: 0,
        net_inum: 0,
    };
}

const _: () =
    assert!(size_of::<NicEntry>() == 16 && size_of::<NicSide>() == 64 && size_of::<NicCell>() == 128);
const _: () = assert!(size_of::<Nic>() == 448);
const _: () = assert!(size_of::<NicWindows>() == 80 + 4 * WINDOW_BUCKETS);
const _: () = assert!(size_of::<NicNotes>() == 64);
const _: () = assert!(size_of::<NetLayout>() == 72);
const _: () = assert!(NICS as usize * 4 == NIC_TABLE_ENTRIES);

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bucket_range;

    #[test]
    fn a_window_is_one_word() {
        let word = Window::begin(u64::from(WINDOW_MILLISECONDS) + 5) + 3 * WINDOW_PACKET + 4_500;
        assert_eq!(Window::from_word(word), Window { millisecond: 5, packets: 3, bytes: 4_500 });
    }

    #[test]
    fn windows_of_any_size_have_a_bucket() {
        let last = u32::try_from(WINDOW_BUCKETS - 1).unwrap();
        assert_eq!(window_bucket(u32::MAX), last);
        assert_eq!(bucket_range(last).0, 62 << 20);
        assert_eq!(window_bucket(64), 16);
    }

    #[test]
    fn the_search_begins_inside_the_table() {
        for key in [1, nic_key(4_026_531_840, 7), u64::MAX] {
            assert!((nic_start(key) as usize) < NIC_TABLE_ENTRIES, "{key}");
        }
    }
}
