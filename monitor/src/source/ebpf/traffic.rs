//! What is known of one network device at a reading. Directions are the device's: `xmit` is what the host sends through
//! it, `receive` what it receives from it.

use monitor_ebpf::{DROP_AFTER_DEVICE, DROP_BEFORE_DEVICE, DROP_IN_DEVICE, WINDOW_BUCKETS};

/// What passed in one direction since the device is watched.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Passed {
    /// Packets; a GSO packet is one.
    pub packets: u64,
    /// Bytes with Ethernet header and VLAN tag.
    pub bytes: u64,
    /// Packets on a wire, after segmentation; absent if not known.
    pub wire_packets: Option<u64>,
}

/// Figures of one device since it is watched.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DeviceTraffic {
    /// What the host sent through it: taken by its driver.
    pub xmit: Passed,
    /// What the host received from it.
    pub receive: Passed,
    /// Packets that its driver refused.
    pub refused: u64,
    /// Drops of its packets, by place and reason; absent if not counted.
    pub drops: Option<Vec<Drops>>,
    /// Drops of further kinds than fit.
    pub other_drops: u64,
    /// By queue, if they are counted by themselves: `xmit`, then `receive`.
    pub queues: Vec<[Passed; 2]>,
}

/// Packets dropped at one place for one reason.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Drops {
    /// Where.
    pub place: DropPlace,
    /// The kernel's `enum skb_drop_reason`.
    pub reason: u32,
    /// How many.
    pub packets: u64,
}

/// Where a packet of a device was dropped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DropPlace {
    /// By its driver: the ring is full, a filter of the tap.
    Device,
    /// On the host's way to it: queueing discipline, filters, memory.
    Before,
    /// After the host received it from the device.
    After,
}

impl DropPlace {
    /// From the number in maps.
    #[must_use]
    pub const fn of(number: u32) -> Option<Self> {
        match number {
            DROP_IN_DEVICE => Some(Self::Device),
            DROP_BEFORE_DEVICE => Some(Self::Before),
            DROP_AFTER_DEVICE => Some(Self::After),
            _ => None,
        }
    }
}

/// Windows of 1 ms in one direction.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Bursts {
    /// Bytes of the largest that ended since they were last taken; absent if none did.
    pub most_bytes: Option<u64>,
    /// Packets of the one with most packets, likewise.
    pub most_packets: Option<u64>,
    /// Windows in which something passed, by bytes, since the device is watched, modulo 2³².
    pub closed: Box<[u32; WINDOW_BUCKETS]>,
}

impl Bursts {
    /// None.
    #[must_use]
    pub fn none() -> Self {
        Self { most_bytes: None, most_packets: None, closed: Box::new([0; WINDOW_BUCKETS]) }
    }
}
