//! One record of `virConnectGetAllDomainStats`, from named parameters into typed numbers.
//!
//! Names and units follow <https://libvirt.org/html/libvirt-libvirt-domain.html#virConnectGetAllDomainStats>. Every
//! number may be absent: the group was not asked for, the daemon or QEMU is too old, the guest does not tell, or
//! NOWAIT left it out because the domain was busy. Absent is never 0, and unknown names are ignored. Knows nothing
//! of connections; the parameters come from `connection`.

use std::{
    collections::BTreeMap,
    hash::{DefaultHasher, Hash, Hasher},
};

use schemars::JsonSchema;
use serde::Serialize;

use crate::{
    inventory::DomainState,
    units::{Bytes, DomainUuid, VcpuIndex},
};

/// Indices from here on are ignored, so that no text can make a list grow without bound.
const MAX_INDEX: u32 = 4096;
/// Most counters of a kind that libvirt names freely; KVM has about 50 for a vCPU, libvirt 23 perf events.
const MAX_NAMED: usize = 256;

/// One value of a typed parameter.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Value<'a> {
    /// `int` or `long long`.
    Signed(i64),
    /// `unsigned int` or `unsigned long long`.
    Unsigned(u64),
    /// A string.
    Text(&'a str),
    /// A double or a boolean: no parameter read here has one.
    Other,
}

impl Value<'_> {
    /// The number. Negative ones mean "not supported" in libvirt, as does -1 in an unsigned parameter.
    pub(super) fn number(self) -> Option<u64> {
        match self {
            Self::Signed(n) => u64::try_from(n).ok(),
            Self::Unsigned(u64::MAX) | Self::Text(_) | Self::Other => None,
            Self::Unsigned(n) => Some(n),
        }
    }

    fn text(self) -> Option<String> {
        if let Self::Text(text) = self { Some(text.to_owned()) } else { None }
    }

    fn kib(self) -> Option<u64> {
        self.number().and_then(Bytes::from_kib).map(|bytes| bytes.0)
    }
}

/// What libvirt told of one domain in one bulk call.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DomainStats {
    /// Which domain.
    pub uuid: DomainUuid,
    /// libvirt's id of this run.
    pub id: Option<u32>,
    /// `state.state`; absent without the group STATE.
    pub state: Option<DomainState>,
    /// `cpu.time`: CPU time of the whole QEMU process since its start, nanoseconds (cgroup cpuacct, or `/proc`).
    pub cpu_time_ns: Option<u64>,
    /// `cpu.user`: of it in user mode, nanoseconds.
    pub cpu_user_ns: Option<u64>,
    /// `cpu.system`: of it in kernel mode, nanoseconds.
    pub cpu_system_ns: Option<u64>,
    /// `cpu.haltpoll.success.time`: time KVM polled for the end of halts that ended meanwhile, all vCPUs, nanoseconds;
    /// 0 for emulated domains.
    pub haltpoll_success_ns: Option<u64>,
    /// `cpu.haltpoll.fail.time`: time it polled for those that did not, likewise.
    pub haltpoll_fail_ns: Option<u64>,
    /// `vcpu.current`: how many vCPUs are online.
    pub vcpu_current: Option<u64>,
    /// `vcpu.N.*`, ascending, offline numbers left out.
    pub vcpus: Vec<VcpuStats>,
    /// `net.N.*` in libvirt's order; interfaces without a host device are left out (libvirt gives them no name).
    pub interfaces: Vec<InterfaceStats>,
    /// `block.N.*` in libvirt's order.
    pub blocks: Vec<BlockStats>,
    /// `balloon.*`.
    pub balloon: BalloonStats,
    /// `perf.*`: events that are enabled for the domain, by libvirt's name, as counted since they were.
    pub perf: Vec<(String, u64)>,
    /// `dirtyrate.*`; absent if nobody ever had it measured.
    pub dirty_rate: Option<DirtyRate>,
}

/// The last measurement of how fast a guest writes to its memory, which somebody else asked for (`domdirtyrate-calc`).
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, JsonSchema)]
pub struct DirtyRate {
    /// `dirtyrate.calc_status`: it is still under way.
    pub measuring: bool,
    /// `dirtyrate.calc_start_time`: when it began, seconds of the host's `CLOCK_MONOTONIC`.
    pub started_s: u64,
    /// `dirtyrate.calc_period`: how long it takes, seconds.
    pub period_s: u64,
    /// `dirtyrate.calc_mode`: `page-sampling`, `dirty-bitmap` or `dirty-ring`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mode: Option<String>,
    /// `dirtyrate.megabytes_per_second` (MiB); absent while it is under way.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bytes_per_s: Option<u64>,
    /// `dirtyrate.vcpu.N.megabytes_per_second` by vCPU; `dirty-ring` only.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub vcpu_bytes_per_s: BTreeMap<u32, u64>,
}

/// State of a vCPU (`virVcpuState`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum VcpuState {
    /// The vCPU is offline.
    Offline,
    /// Running, as far as libvirt tells.
    Running,
    /// Blocked on a resource.
    Blocked,
}

impl VcpuState {
    const fn from_libvirt(number: u64) -> Option<Self> {
        match number {
            0 => Some(Self::Offline),
            1 => Some(Self::Running),
            2 => Some(Self::Blocked),
            _ => None,
        }
    }

    /// The name in records.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Offline => "offline",
            Self::Running => "running",
            Self::Blocked => "blocked",
        }
    }
}

/// One vCPU.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VcpuStats {
    /// Its number.
    pub index: VcpuIndex,
    /// `vcpu.N.state`.
    pub state: Option<VcpuState>,
    /// `vcpu.N.time`: CPU time of the thread since it started, nanoseconds in steps of a clock tick (10 ms).
    pub time_ns: Option<u64>,
    /// `vcpu.N.wait`: time it wanted to run but the host ran something else, nanoseconds. libvirt takes it from
    /// `/proc/PID/task/TID/sched` and says 0 where that file lacks the figure, as with libvirt 9.0 on new kernels.
    pub wait_ns: Option<u64>,
    /// `vcpu.N.delay`: time runnable but not running (`run_delay` of schedstat), nanoseconds.
    pub delay_ns: Option<u64>,
    /// `vcpu.N.*.sum`: what KVM counts for the vCPU since it was made, by the kernel's name (libvirt 8.10, QEMU 7.1, Linux
    /// 5.14; none for emulated domains).
    pub kvm: Vec<(String, u64)>,
}

/// One network interface, seen from the guest for taps and from the host for `direct` ones, as libvirt does.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct InterfaceStats {
    /// `net.N.name`: the host device.
    pub device: String,
    /// `net.N.rx.bytes`.
    pub rx_bytes: Option<u64>,
    /// `net.N.rx.pkts`.
    pub rx_packets: Option<u64>,
    /// `net.N.rx.errs`.
    pub rx_errs: Option<u64>,
    /// `net.N.rx.drop`.
    pub rx_drop: Option<u64>,
    /// `net.N.tx.bytes`.
    pub tx_bytes: Option<u64>,
    /// `net.N.tx.pkts`.
    pub tx_packets: Option<u64>,
    /// `net.N.tx.errs`.
    pub tx_errs: Option<u64>,
    /// `net.N.tx.drop`.
    pub tx_drop: Option<u64>,
}

/// One image of a disk. The one on top comes first and has the requests as the guest made them; those below it, and the
/// target of a copy that is under way, have sizes only.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct BlockStats {
    /// `block.N.name`: the guest's target (`vda`).
    pub target: String,
    /// `block.N.path`: the image; absent for network disks and empty drives.
    pub path: Option<String>,
    /// `block.N.backingIndex`: number of that image in the chain (`<source index=…>`); absent without a medium.
    pub backing_index: Option<u64>,
    /// `block.N.rd.reqs`.
    pub rd_reqs: Option<u64>,
    /// `block.N.rd.bytes`.
    pub rd_bytes: Option<u64>,
    /// `block.N.rd.times`: total time of reads, nanoseconds.
    pub rd_time_ns: Option<u64>,
    /// `block.N.wr.reqs`.
    pub wr_reqs: Option<u64>,
    /// `block.N.wr.bytes`.
    pub wr_bytes: Option<u64>,
    /// `block.N.wr.times`: total time of writes, nanoseconds.
    pub wr_time_ns: Option<u64>,
    /// `block.N.fl.reqs`.
    pub fl_reqs: Option<u64>,
    /// `block.N.fl.times`: total time of flushes, nanoseconds.
    pub fl_time_ns: Option<u64>,
    /// `block.N.errors`: Xen only, so absent for QEMU.
    pub errors: Option<u64>,
    /// `block.N.allocation`: highest byte in use of the image.
    pub allocation_bytes: Option<u64>,
    /// `block.N.capacity`: size as the guest sees it.
    pub capacity_bytes: Option<u64>,
    /// `block.N.physical`: size of the file or device.
    pub physical_bytes: Option<u64>,
}

/// Memory, as the balloon driver in the guest tells it; KiB of libvirt are bytes here.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct BalloonStats {
    /// `balloon.current`: what the balloon gives the guest now.
    pub actual_bytes: Option<u64>,
    /// `balloon.maximum`: what it may give at most.
    pub maximum_bytes: Option<u64>,
    /// `balloon.available`: total memory as the guest's kernel sees it.
    pub available_bytes: Option<u64>,
    /// `balloon.unused`: the guest's `MemFree`.
    pub unused_bytes: Option<u64>,
    /// `balloon.usable`: the guest's `MemAvailable`.
    pub usable_bytes: Option<u64>,
    /// `balloon.rss`: resident memory of the QEMU process; the host's view, there without a driver in the guest.
    pub rss_bytes: Option<u64>,
    /// `balloon.swap_in`: read from swap by the guest.
    pub swap_in_bytes: Option<u64>,
    /// `balloon.swap_out`: written to swap by the guest.
    pub swap_out_bytes: Option<u64>,
    /// `balloon.major_fault`: page faults of the guest that needed I/O.
    pub major_faults: Option<u64>,
    /// `balloon.minor_fault`: those that did not.
    pub minor_faults: Option<u64>,
    /// `balloon.disk_caches`: memory the guest can reclaim from its caches.
    pub disk_caches_bytes: Option<u64>,
    /// `balloon.hugetlb_pgalloc`: huge pages allocated in the guest.
    pub hugetlb_pgalloc: Option<u64>,
    /// `balloon.hugetlb_pgfail`: huge page allocations that failed in the guest.
    pub hugetlb_pgfail: Option<u64>,
    /// `balloon.last-update`: when the guest last reported, seconds since 1970; absent if it never did (libvirt: 0).
    pub last_update_s: Option<u64>,
}

impl DomainStats {
    /// Reads one record. Names may come in any order; numbering may have holes.
    pub fn from_parameters<'a, N: AsRef<str>>(
        uuid: DomainUuid,
        parameters: impl IntoIterator<Item = (N, Value<'a>)>,
    ) -> Self {
        let mut builder = Builder::new(uuid);
        for (name, value) in parameters {
            builder.put(name.as_ref(), value);
        }
        builder.finish().0
    }

    /// Whether nothing in it comes from QEMU's monitor, though it was asked for: libvirt leaves that out (NOWAIT) while
    /// another call waits for that monitor or a job holds it. Its own bookkeeping is there all the same.
    pub(super) fn lacks_what_qemu_tells(&self) -> bool {
        let of_qemu = |block: &BlockStats| block.rd_reqs.is_some() || block.capacity_bytes.is_some();
        let told_of = !self.blocks.is_empty() || self.balloon.actual_bytes.is_some();
        told_of && self.balloon.rss_bytes.is_none() && !self.blocks.iter().any(of_qemu)
    }
}

/// Collects parameters as they come; lists are kept by libvirt's index until the end.
pub(super) struct Builder {
    stats: DomainStats,
    interfaces: Vec<(u32, InterfaceStats)>,
    blocks: Vec<(u32, BlockStats)>,
    vcpus: Vec<(u32, VcpuStats)>,
    told: Told,
}

/// Which lists the record tells of, even if they are empty.
#[derive(Clone, Copy, Default)]
struct Told {
    interfaces: bool,
    blocks: bool,
    vcpus: bool,
}

impl Builder {
    pub(super) const fn new(uuid: DomainUuid) -> Self {
        let stats = DomainStats {
            uuid,
            id: None,
            state: None,
            cpu_time_ns: None,
            cpu_user_ns: None,
            cpu_system_ns: None,
            haltpoll_success_ns: None,
            haltpoll_fail_ns: None,
            vcpu_current: None,
            vcpus: Vec::new(),
            interfaces: Vec::new(),
            blocks: Vec::new(),
            balloon: BalloonStats::NONE,
            perf: Vec::new(),
            dirty_rate: None,
        };
        let told = Told { interfaces: false, blocks: false, vcpus: false };
        Self { stats, interfaces: Vec::new(), blocks: Vec::new(), vcpus: Vec::new(), told }
    }

    /// Takes one parameter; a name it does not know is ignored.
    pub(super) fn put(&mut self, name: &str, value: Value<'_>) {
        let Some((group, field)) = name.split_once('.') else { return };
        match group {
            "state" if field == "state" => self.stats.state = value.number().and_then(state_from_libvirt),
            "cpu" => self.put_cpu(field, value),
            "balloon" => self.stats.balloon.put(field, value),
            "perf" => put_named(&mut self.stats.perf, field, value),
            "dirtyrate" => self.stats.dirty_rate.get_or_insert_default().put(field, value),
            "vcpu" if field == "current" => {
                self.told.vcpus = true;
                self.stats.vcpu_current = value.number();
            }
            "net" if field == "count" => self.told.interfaces = true,
            "block" if field == "count" => self.told.blocks = true,
            "vcpu" => {
                if let Some((index, field)) = split_index(field) {
                    entry(&mut self.vcpus, index, VcpuStats::new).put(field, value);
                }
            }
            "net" => {
                if let Some((index, field)) = split_index(field) {
                    entry(&mut self.interfaces, index, |_| InterfaceStats::default()).put(field, value);
                }
            }
            "block" => {
                if let Some((index, field)) = split_index(field) {
                    entry(&mut self.blocks, index, |_| BlockStats::default()).put(field, value);
                }
            }
            _ => {}
        }
    }

    fn put_cpu(&mut self, field: &str, value: Value<'_>) {
        match field {
            "time" => self.stats.cpu_time_ns = value.number(),
            "user" => self.stats.cpu_user_ns = value.number(),
            "system" => self.stats.cpu_system_ns = value.number(),
            "haltpoll.success.time" => self.stats.haltpoll_success_ns = value.number(),
            "haltpoll.fail.time" => self.stats.haltpoll_fail_ns = value.number(),
            _ => {}
        }
    }

    /// The record, without entries that never got a name (nothing could refer to them), and its devices.
    pub(super) fn finish(self) -> (DomainStats, DeviceMark) {
        let mut stats = self.stats;
        stats.vcpus = self.vcpus.into_iter().map(|(_, vcpu)| vcpu).collect();
        stats.interfaces =
            self.interfaces.into_iter().map(|(_, i)| i).filter(|i| !i.device.is_empty()).collect();
        stats.blocks = self.blocks.into_iter().map(|(_, b)| b).filter(|b| !b.target.is_empty()).collect();
        stats.dirty_rate = stats.dirty_rate.filter(|rate| rate.started_s > 0);
        let mark = DeviceMark::of(&stats, self.told);
        (stats, mark)
    }
}

/// The number and the rest of `3.rx.bytes`.
fn split_index(field: &str) -> Option<(u32, &str)> {
    let (index, field) = field.split_once('.')?;
    let index = index.parse().ok().filter(|index| *index < MAX_INDEX)?;
    Some((index, field))
}

/// The entry of that index, added in its place if new. libvirt counts upwards, so the last one is tried first.
fn entry<T>(list: &mut Vec<(u32, T)>, index: u32, new: impl FnOnce(u32) -> T) -> &mut T {
    let at = match list.last() {
        Some((last, _)) if *last == index => list.len() - 1,
        _ => list.binary_search_by_key(&index, |(i, _)| *i).unwrap_or_else(|at| {
            list.insert(at, (index, new(index)));
            at
        }),
    };
    &mut list[at].1
}

/// `virDomainState`; a number of a newer libvirt counts as unknown.
fn state_from_libvirt(number: u64) -> Option<DomainState> {
    const STATES: [DomainState; 8] = [
        DomainState::Unknown,
        DomainState::Running,
        DomainState::Blocked,
        DomainState::Paused,
        DomainState::ShuttingDown,
        DomainState::Shutoff,
        DomainState::Crashed,
        DomainState::Suspended,
    ];
    let known = usize::try_from(number).ok().and_then(|number| STATES.get(number));
    Some(known.copied().unwrap_or_default())
}

impl VcpuStats {
    const fn new(index: u32) -> Self {
        let index = VcpuIndex(index);
        Self { index, state: None, time_ns: None, wait_ns: None, delay_ns: None, kvm: Vec::new() }
    }

    fn put(&mut self, field: &str, value: Value<'_>) {
        match field {
            "state" => self.state = value.number().and_then(VcpuState::from_libvirt),
            "time" => self.time_ns = value.number(),
            "wait" => self.wait_ns = value.number(),
            "delay" => self.delay_ns = value.number(),
            _ => {
                if let Some(name) = field.strip_suffix(".sum") {
                    put_named(&mut self.kvm, name, value);
                }
            }
        }
    }

    /// What KVM counts under a name.
    #[must_use]
    pub fn kvm(&self, name: &str) -> Option<u64> {
        self.kvm.iter().find(|(known, _)| known == name).map(|(_, value)| *value)
    }
}

/// Counters whose names are not ours.
fn put_named(list: &mut Vec<(String, u64)>, name: &str, value: Value<'_>) {
    if let Some(number) = value.number().filter(|_| list.len() < MAX_NAMED) {
        list.push((name.to_owned(), number));
    }
}

impl DirtyRate {
    /// Status 0 is none, 1 under way, 2 done (`virDomainDirtyRateStatus`).
    fn put(&mut self, field: &str, value: Value<'_>) {
        let mib = |value: Value<'_>| value.number().and_then(|mib| mib.checked_mul(1 << 20));
        match field {
            "calc_status" => self.measuring = value.number() == Some(1),
            "calc_start_time" => self.started_s = value.number().unwrap_or(0),
            "calc_period" => self.period_s = value.number().unwrap_or(0),
            "calc_mode" => self.mode = value.text(),
            "megabytes_per_second" => self.bytes_per_s = mib(value),
            _ => {
                let of_vcpu = field.strip_prefix("vcpu.").and_then(split_index);
                if let (Some((vcpu, "megabytes_per_second")), Some(rate)) = (of_vcpu, mib(value)) {
                    self.vcpu_bytes_per_s.insert(vcpu, rate);
                }
            }
        }
    }
}

impl InterfaceStats {
    fn put(&mut self, field: &str, value: Value<'_>) {
        let place = match field {
            "name" => return self.device = value.text().unwrap_or_default(),
            "rx.bytes" => &mut self.rx_bytes,
            "rx.pkts" => &mut self.rx_packets,
            "rx.errs" => &mut self.rx_errs,
            "rx.drop" => &mut self.rx_drop,
            "tx.bytes" => &mut self.tx_bytes,
            "tx.pkts" => &mut self.tx_packets,
            "tx.errs" => &mut self.tx_errs,
            "tx.drop" => &mut self.tx_drop,
            _ => return,
        };
        *place = value.number();
    }
}

impl BlockStats {
    fn put(&mut self, field: &str, value: Value<'_>) {
        let place = match field {
            "name" => return self.target = value.text().unwrap_or_default(),
            "path" => return self.path = value.text(),
            "backingIndex" => &mut self.backing_index,
            "rd.reqs" => &mut self.rd_reqs,
            "rd.bytes" => &mut self.rd_bytes,
            "rd.times" => &mut self.rd_time_ns,
            "wr.reqs" => &mut self.wr_reqs,
            "wr.bytes" => &mut self.wr_bytes,
            "wr.times" => &mut self.wr_time_ns,
            "fl.reqs" => &mut self.fl_reqs,
            "fl.times" => &mut self.fl_time_ns,
            "errors" => &mut self.errors,
            "allocation" => &mut self.allocation_bytes,
            "capacity" => &mut self.capacity_bytes,
            "physical" => &mut self.physical_bytes,
            _ => return,
        };
        *place = value.number();
    }
}

impl BalloonStats {
    const NONE: Self = Self {
        actual_bytes: None,
        maximum_bytes: None,
        available_bytes: None,
        unused_bytes: None,
        usable_bytes: None,
        rss_bytes: None,
        swap_in_bytes: None,
        swap_out_bytes: None,
        major_faults: None,
        minor_faults: None,
        disk_caches_bytes: None,
        hugetlb_pgalloc: None,
        hugetlb_pgfail: None,
        last_update_s: None,
    };

    fn put(&mut self, field: &str, value: Value<'_>) {
        match field {
            "current" => self.actual_bytes = value.kib(),
            "maximum" => self.maximum_bytes = value.kib(),
            "available" => self.available_bytes = value.kib(),
            "unused" => self.unused_bytes = value.kib(),
            "usable" => self.usable_bytes = value.kib(),
            "rss" => self.rss_bytes = value.kib(),
            "swap_in" => self.swap_in_bytes = value.kib(),
            "swap_out" => self.swap_out_bytes = value.kib(),
            "disk_caches" => self.disk_caches_bytes = value.kib(),
            "major_fault" => self.major_faults = value.number(),
            "minor_fault" => self.minor_faults = value.number(),
            "hugetlb_pgalloc" => self.hugetlb_pgalloc = value.number(),
            "hugetlb_pgfail" => self.hugetlb_pgfail = value.number(),
            "last-update" => self.last_update_s = value.number().filter(|seconds| *seconds != 0),
            _ => {}
        }
    }
}

/// What a record says about which devices exist, per group; a change means that the XML has to be read again.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct DeviceMark {
    interfaces: Option<u64>,
    blocks: Option<u64>,
    vcpus: Option<u64>,
}

impl DeviceMark {
    fn of(stats: &DomainStats, told: Told) -> Self {
        let interfaces = stats.interfaces.iter().map(|i| &i.device);
        let blocks = stats.blocks.iter().map(|b| (&b.target, &b.path, b.backing_index));
        let vcpus = stats.vcpus.iter().map(|v| v.index);
        Self {
            interfaces: told.interfaces.then(|| mark(interfaces)),
            blocks: told.blocks.then(|| mark(blocks)),
            vcpus: told.vcpus.then(|| mark(vcpus)),
        }
    }

    /// Takes over what the newer record tells; whether something known changed.
    pub(super) fn update(&mut self, newer: Self) -> bool {
        let mut changed = false;
        for (old, new) in [
            (&mut self.interfaces, newer.interfaces),
            (&mut self.blocks, newer.blocks),
            (&mut self.vcpus, newer.vcpus),
        ] {
            changed |= old.is_some() && new.is_some() && *old != new;
            *old = new.or(*old);
        }
        changed
    }
}

fn mark<T: Hash>(items: impl Iterator<Item = T>) -> u64 {
    let mut hasher = DefaultHasher::new();
    items.for_each(|item| item.hash(&mut hasher));
    hasher.finish()
}

#[cfg(test)]
mod tests {
    use super::*;

    const UUID: DomainUuid = DomainUuid([7; 16]);

    /// `virsh domstats` of libvirt 9.0 for a running TCG guest, the unread groups included.
    const REAL: &str = include_str!("../../../../tests/fixtures/xml/plain.domstats");

    fn parse(text: &str) -> DomainStats {
        parse_with_mark(text).0
    }

    /// Numbers as the daemon sends them, mostly `unsigned long long`; `state.state` is an `int`.
    fn parse_with_mark(text: &str) -> (DomainStats, DeviceMark) {
        let mut builder = Builder::new(UUID);
        for (name, text) in text.lines().filter_map(|line| line.trim().split_once('=')) {
            builder.put(
                name,
                match text.parse() {
                    Ok(number) if name.starts_with("state") => Value::Signed(number),
                    Ok(number) => Value::Unsigned(u64::try_from(number).unwrap()),
                    Err(_) => Value::Text(text),
                },
            );
        }
        builder.finish()
    }

    fn one(name: &str, value: Value<'_>) -> DomainStats {
        DomainStats::from_parameters(UUID, [(name, value)])
    }

    #[test]
    fn a_real_domain() {
        let stats = parse(REAL);
        assert_eq!(stats.state, Some(DomainState::Running));
        assert_eq!(
            (stats.cpu_time_ns, stats.cpu_user_ns, stats.cpu_system_ns),
            (Some(676_848_000), Some(356_267_000), Some(320_580_000))
        );
        assert_eq!(stats.vcpu_current, Some(2));
        let vcpu = |index, time_ns, delay_ns| VcpuStats {
            index: VcpuIndex(index),
            state: Some(VcpuState::Running),
            time_ns: Some(time_ns),
            wait_ns: Some(0),
            delay_ns: Some(delay_ns),
            kvm: Vec::new(),
        };
        assert_eq!((stats.haltpoll_success_ns, stats.haltpoll_fail_ns), (Some(0), Some(0)));
        assert_eq!((stats.perf.as_slice(), &stats.dirty_rate), (&[][..], &None), "nothing was measured");
        assert_eq!(stats.vcpus, [vcpu(0, 280_000_000, 156_843_514), vcpu(1, 10_000_000, 63_281_793)]);
        assert_eq!(
            stats.balloon,
            BalloonStats {
                actual_bytes: Some(64 << 20),
                maximum_bytes: Some(64 << 20),
                rss_bytes: Some(55_048 << 10),
                ..BalloonStats::NONE
            }
        );
        let [tap] = stats.interfaces.as_slice() else { panic!("{:?}", stats.interfaces) };
        assert_eq!((tap.device.as_str(), tap.rx_bytes, tap.rx_packets), ("vnet0", Some(90), Some(1)));
        assert_eq!((tap.tx_bytes, tap.tx_drop), (Some(0), Some(0)));
    }

    #[test]
    fn blocks_of_a_real_domain() {
        let stats = parse(REAL);
        let [vda, sda] = stats.blocks.as_slice() else { panic!("{:?}", stats.blocks) };
        assert_eq!(
            *vda,
            BlockStats {
                target: "vda".into(),
                path: Some("/var/lib/libvirt/images/a.s1".into()),
                backing_index: Some(3),
                rd_reqs: Some(1),
                rd_bytes: Some(512),
                rd_time_ns: Some(122_790),
                wr_reqs: Some(0),
                wr_bytes: Some(0),
                wr_time_ns: Some(0),
                fl_reqs: Some(0),
                fl_time_ns: Some(0),
                errors: None,
                allocation_bytes: Some(197_120),
                capacity_bytes: Some(16 << 20),
                physical_bytes: Some(204_800),
            }
        );
        assert_eq!((sda.target.as_str(), &sda.path, sda.capacity_bytes), ("sda", &None, None));
        assert_eq!(sda.rd_bytes, Some(54));
    }

    /// Of a KVM guest with a balloon driver, huge pages and perf events, on libvirt 8.10 and later: the names are those of
    /// virsh(1), `domstats`; numbers of a kind of their own, so that none can stand for another.
    #[test]
    fn what_only_some_domains_have() {
        let stats = parse(
            "cpu.haltpoll.success.time=1\ncpu.haltpoll.fail.time=2\nballoon.swap_in=3\nballoon.swap_out=4\n\
             balloon.major_fault=5\nballoon.minor_fault=6\nballoon.unused=7\nballoon.available=8\nballoon.usable=9\n\
             balloon.disk_caches=10\nballoon.hugetlb_pgalloc=11\nballoon.hugetlb_pgfail=12\nballoon.last-update=13\n\
             vcpu.current=1\nvcpu.0.state=1\nvcpu.0.exits.sum=14\nvcpu.0.halt_poll_success_ns.sum=15\n\
             vcpu.0.halt_poll_fail_ns.sum=16\nvcpu.0.io_exits.sum=17\nvcpu.0.guest_mode.cur=no\nvcpu.0.x.max=18\n\
             perf.cpu_cycles=19\nperf.instructions=20\nperf.cache_references=21\nperf.cache_misses=22\nperf.cmt=23\n\
             dirtyrate.calc_status=2\ndirtyrate.calc_start_time=24\ndirtyrate.calc_period=25\n\
             dirtyrate.megabytes_per_second=26\ndirtyrate.calc_mode=dirty-ring\n\
             dirtyrate.vcpu.0.megabytes_per_second=27",
        );
        assert_eq!((stats.haltpoll_success_ns, stats.haltpoll_fail_ns), (Some(1), Some(2)));
        assert_eq!(
            stats.balloon,
            BalloonStats {
                swap_in_bytes: Some(3 << 10),
                swap_out_bytes: Some(4 << 10),
                major_faults: Some(5),
                minor_faults: Some(6),
                unused_bytes: Some(7 << 10),
                available_bytes: Some(8 << 10),
                usable_bytes: Some(9 << 10),
                disk_caches_bytes: Some(10 << 10),
                hugetlb_pgalloc: Some(11),
                hugetlb_pgfail: Some(12),
                last_update_s: Some(13),
                ..BalloonStats::NONE
            }
        );
        let named = |list: &[(String, u64)]| list.iter().map(|(n, v)| format!("{n}={v}")).collect::<Vec<_>>();
        let of_kvm = ["exits=14", "halt_poll_success_ns=15", "halt_poll_fail_ns=16", "io_exits=17"];
        assert_eq!(named(&stats.vcpus[0].kvm), of_kvm, "what is no sum has another meaning, and is left out");
        let events = ["cpu_cycles=19", "instructions=20", "cache_references=21", "cache_misses=22", "cmt=23"];
        assert_eq!(named(&stats.perf), events);
        let expected = DirtyRate {
            bytes_per_s: Some(26 << 20),
            measuring: false,
            started_s: 24,
            period_s: 25,
            mode: Some("dirty-ring".to_owned()),
            vcpu_bytes_per_s: [(0, 27 << 20)].into(),
        };
        assert_eq!(stats.dirty_rate, Some(expected));
    }

    #[test]
    fn absent_is_not_zero() {
        let stats = parse("");
        assert_eq!(stats, Builder::new(UUID).finish().0);
        assert_eq!((stats.state, stats.cpu_time_ns, stats.balloon.rss_bytes), (None, None, None));
    }

    #[test]
    fn unsupported_and_overflowing_numbers_are_absent() {
        for value in [Value::Signed(-1), Value::Unsigned(u64::MAX), Value::Text("9"), Value::Other] {
            let stats = DomainStats::from_parameters(
                UUID,
                [("block.0.name", Value::Text("vda")), ("block.0.errors", value)],
            );
            assert_eq!(stats.blocks[0].errors, None, "{value:?}");
            assert_eq!(one("cpu.time", value).cpu_time_ns, None, "{value:?}");
        }
        assert_eq!(one("balloon.current", Value::Unsigned(u64::MAX / 1024 + 1)).balloon.actual_bytes, None);
        assert_eq!(one("balloon.last-update", Value::Unsigned(0)).balloon.last_update_s, None);
        assert_eq!(
            one("balloon.last-update", Value::Unsigned(1_700_000_000)).balloon.last_update_s,
            Some(1_700_000_000)
        );
    }

    #[test]
    fn holes_order_and_bounds() {
        let stats = parse(
            "vcpu.7.time=70\nvcpu.2.time=20\nvcpu.7.delay=7\nvcpu.4096.time=1\nvcpu.-1.time=1\nvcpu..time=1\n\
             vcpu.99999999999.time=1\nvcpu.2=1\nnet.count=4000000000\nnet.5.name=b\nnet.3.rx.bytes=1\nnet.1.name=a",
        );
        let vcpus: Vec<_> = stats.vcpus.iter().map(|v| (v.index.0, v.time_ns, v.delay_ns)).collect();
        assert_eq!(vcpus, [(2, Some(20), None), (7, Some(70), Some(7))]);
        let devices: Vec<_> = stats.interfaces.iter().map(|i| i.device.as_str()).collect();
        assert_eq!(devices, ["a", "b"], "an interface without a name is none of the host's");
    }

    #[test]
    fn states() {
        assert_eq!(one("state.state", Value::Signed(3)).state, Some(DomainState::Paused));
        assert_eq!(one("state.state", Value::Signed(7)).state, Some(DomainState::Suspended));
        assert_eq!(one("state.state", Value::Signed(99)).state, Some(DomainState::Unknown));
        assert_eq!(one("state.reason", Value::Signed(1)).state, None);
        assert_eq!(one("vcpu.0.state", Value::Signed(2)).vcpus[0].state, Some(VcpuState::Blocked));
    }

    #[test]
    fn a_changed_device_is_noticed_once_and_an_absent_group_is_not() {
        let mut mark = DeviceMark::default();
        for (text, expected) in [
            ("net.count=0\nblock.count=1\nblock.0.name=vda\nblock.0.path=/x", false),
            ("net.count=0", false),
            ("net.count=1\nnet.0.name=a", true),
            ("net.count=1\nnet.0.name=a\nnet.0.rx.bytes=9", false),
            ("state.state=1", false),
            ("net.count=2\nnet.0.name=a\nnet.1.name=b", true),
            ("block.count=1\nblock.0.name=vda\nblock.0.path=/snapshot", true),
            ("vcpu.current=1\nvcpu.0.time=1", false),
            ("vcpu.current=2\nvcpu.0.time=2\nvcpu.3.time=1", true),
            ("net.count=0", true),
            ("net.count=0", false),
        ] {
            assert_eq!(mark.update(parse_with_mark(text).1), expected, "{text}");
        }
    }
}
