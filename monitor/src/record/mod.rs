//! The lines of the stream: this file is the specification; [`schema()`] is its JSON Schema.
//!
//! One JSON object per line, `type` first, keys in a fixed order. A key whose value is not known is left out,
//! never 0 or `null`. Adding a field is compatible; renaming one or changing a unit raises [`SCHEMA_VERSION`].
//! Knows how numbers are written, not where they came from.

mod json;
pub mod read;
mod sample;
mod schema;

use std::{collections::BTreeMap, io};

use schemars::JsonSchema;
use serde::{Serialize, Serializer};

use crate::{
    inventory::{self, Observable},
    is_disruptive,
};

pub use self::{
    sample::{Entities, Memory, Sample, Subject, Tick},
    schema::schema,
};

/// Version of the stream; in every `session` line.
pub const SCHEMA_VERSION: u32 = 1;

/// One line.
#[derive(Debug, JsonSchema)]
#[schemars(tag = "type", rename_all = "snake_case")]
pub enum Record<'a> {
    /// The first line: who measures, where, and what can be measured here.
    Session(Session),
    /// A domain appeared, changed or went away.
    Domain(DomainRecord<'a>),
    /// What the sources said of one domain at one tick.
    Sample(Sample<'a>),
    /// Something happened to a domain or a source.
    Event(Event<'a>),
    /// How the monitor itself is doing; once a minute and at the end.
    Health(Health),
    /// The last line.
    Summary(Summary),
}

/// The first line.
#[derive(Debug, Serialize, JsonSchema)]
pub struct Session {
    /// Version of the stream's format.
    pub schema_version: u32,
    /// Version of kvm-monitor.
    pub tool_version: &'static str,
    /// The machine.
    pub host: Host,
    /// How the two clocks of the stream relate.
    pub clock: ClockPair,
    /// Time between samples, nanoseconds.
    pub interval_ns: u64,
    /// What each source can do here, by its name: `ebpf`, `libvirt`, `procfs`.
    pub sources: BTreeMap<&'static str, SourceInfo>,
    /// What became of each kernel program.
    pub probes: Vec<ProbeInfo>,
}

/// The machine.
#[derive(Debug, Serialize, JsonSchema)]
pub struct Host {
    /// Host name.
    pub hostname: String,
    /// Kernel release.
    pub kernel: String,
    /// Changes with every boot; absent if it cannot be read.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub boot_id: Option<String>,
    /// CPUs online.
    pub cpus: usize,
    /// NUMA nodes; absent if it cannot be read.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub numa_nodes: Option<usize>,
    /// Clock ticks per second of the times in `/proc` (`USER_HZ`), the grain of `cpu.time_ns` {procfs}.
    pub hz: u64,
}

/// One moment on both clocks.
#[derive(Debug, Serialize, JsonSchema)]
pub struct ClockPair {
    /// Name of the clock of every `mono_ns` and window.
    pub arithmetic: &'static str,
    /// That clock, nanoseconds.
    pub mono_ns: u64,
    /// The same moment by the wall clock, RFC 3339.
    pub ts: String,
}

/// What a source can do here.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, JsonSchema)]
pub struct SourceInfo {
    /// It works.
    pub available: bool,
    /// If it does not: why, and what to do.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// Versions and the like.
    pub details: BTreeMap<&'static str, String>,
}

/// What became of a kernel program.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, JsonSchema)]
pub struct ProbeInfo {
    /// Its name.
    pub name: &'static str,
    /// `attached`, `waiting` (what it hangs on is not there yet; it is attached later), `ready` (attached while a disk
    /// needs it), `failed` or `off`.
    pub state: &'static str,
    /// If it is not attached: why, and what is lost.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
}

/// A domain appeared, changed or went away.
#[derive(Debug, Serialize, JsonSchema)]
pub struct DomainRecord<'a> {
    /// Wall clock, RFC 3339.
    pub ts: String,
    /// `CLOCK_MONOTONIC`, nanoseconds.
    pub mono_ns: u64,
    /// What happened.
    pub change: Change,
    /// Why, in words.
    pub reason: &'a str,
    /// Grows when counters restart; rates never cross it.
    pub epoch: u32,
    /// The domain as it is now, or was last.
    pub domain: Domain<'a>,
}

/// What happened to a domain.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Change {
    /// Not known before.
    Appeared,
    /// Something of `domain` is different.
    Changed,
    /// No longer there.
    Gone,
}

/// A domain.
#[derive(Debug, Serialize, JsonSchema)]
pub struct Domain<'a> {
    /// Identity.
    pub uuid: String,
    /// Name; text a tenant may have chosen.
    pub name: &'a str,
    /// libvirt's id of this run.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub id: Option<u32>,
    /// `running`, `paused`, …, `unknown` without libvirt.
    pub state: &'static str,
    /// `silent`: QEMU does not answer libvirt. `in_job`: libvirt asks it nothing while a job runs. Left out otherwise.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub monitor: Option<&'static str>,
    /// Title; text a tenant may have chosen.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub title: Option<&'a str>,
    /// Identity given by a management layer.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub metadata: Option<Box<Owner<'a>>>,
    /// Process id of QEMU.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pid: Option<u32>,
    /// When it started: clock ticks after boot (field 22 of `/proc/PID/stat`).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pid_start_time: Option<u64>,
    /// `kvm`, or `qemu` where QEMU emulates the CPU.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub virt_type: Option<&'a str>,
    /// vCPUs online.
    pub vcpus: Vec<VcpuInfo<'a>>,
    /// How many it can have.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub vcpus_max: Option<u32>,
    /// Limits of its CPU time by libvirt's name with the unit: `shares`, `period_us`, `quota_us`, `emulator_quota_us`, ….
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub cpu_limits: BTreeMap<&'a str, u64>,
    /// Network interfaces.
    pub interfaces: Vec<InterfaceInfo<'a>>,
    /// Disks.
    pub disks: Vec<DiskInfo<'a>>,
    /// Memory.
    pub memory: MemoryInfo,
    /// Balloon device.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub balloon: Option<BalloonInfo<'a>>,
    /// Who told of the domain: `libvirt` or `procfs`.
    pub found_by: &'static str,
    /// `CLOCK_MONOTONIC` at which each source that counts from its own start began, nanoseconds.
    pub since_ns: BTreeMap<&'static str, u64>,
}

/// Identity given by a management layer.
#[derive(Debug, Serialize, JsonSchema)]
pub struct Owner<'a> {
    /// `nova`, `ovirt`, `kubevirt` or `proxmox`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub manager: Option<&'static str>,
    /// Identity of the instance, where it is not the UUID: KubeVirt's uid, Proxmox's VMID.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub instance_id: Option<&'a str>,
    /// Name of the instance as its user sees it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub instance_name: Option<&'a str>,
    /// Flavor.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub flavor: Option<&'a str>,
    /// Project (Nova) or namespace (KubeVirt).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub project: Option<&'a str>,
    /// Identity of the project.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub project_id: Option<&'a str>,
    /// User.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub user: Option<&'a str>,
    /// Identity of the user.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub user_id: Option<&'a str>,
    /// Identity of the image it was made from.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub image_id: Option<&'a str>,
    /// Version of the cluster's interface (oVirt).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cluster_version: Option<&'a str>,
}

/// A vCPU.
#[derive(Debug, Serialize, JsonSchema)]
pub struct VcpuInfo<'a> {
    /// Its number.
    pub vcpu: u32,
    /// Its thread.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tid: Option<u32>,
    /// CPUs it is pinned to.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub affinity: Option<&'a str>,
}

/// A network interface.
#[derive(Debug, Serialize, JsonSchema)]
pub struct InterfaceInfo<'a> {
    /// Host device; empty if it has none.
    pub device: &'a str,
    /// Its index.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ifindex: Option<u32>,
    /// Its network namespace: inode number of `/proc/PID/ns/net`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub netns: Option<u32>,
    /// `CLOCK_MONOTONIC` at which the kernel programs began to count it, nanoseconds.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub since_ns: Option<u64>,
    /// libvirt's name of the guest's device.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub alias: Option<&'a str>,
    /// MAC address of the guest's side.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mac: Option<&'a str>,
    /// `ethernet`, `bridge`, `network`, `direct`, ….
    #[serde(rename = "type")]
    pub kind: &'a str,
    /// Bridge, network or device it is connected to.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub source: Option<&'a str>,
    /// Bridge of the host it is connected to.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bridge: Option<&'a str>,
    /// Identity of the port it is connected to.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub interface_id: Option<&'a str>,
    /// Limits of its traffic: `inbound_average_bytes_per_s`, `outbound_burst_bytes`, …; inbound is to the guest.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub limits: BTreeMap<&'a str, u64>,
    /// PCI address of the host's device that the guest was given.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub host_pci: Option<&'a str>,
    /// Device model.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub model: Option<&'a str>,
    /// Queue pairs.
    pub queues: u32,
    /// Network filter.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub filterref: Option<&'a str>,
    /// Parameters of the filter and the virtual port.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub parameters: BTreeMap<&'a str, &'a str>,
    /// The host's kernel sees its traffic.
    pub observable: bool,
    /// If not: why.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub observable_reason: Option<&'static str>,
}

/// A disk.
#[derive(Debug, Serialize, JsonSchema)]
pub struct DiskInfo<'a> {
    /// Guest target.
    pub target: &'a str,
    /// File, device or network name.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub source: Option<&'a str>,
    /// `file`, `block`, `network`, ….
    pub source_type: &'a str,
    /// `disk`, `cdrom`, ….
    pub device: &'a str,
    /// Bus.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bus: Option<&'a str>,
    /// Image format.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub format: Option<&'a str>,
    /// Cache mode.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cache: Option<&'a str>,
    /// AIO mode.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub io: Option<&'a str>,
    /// Number of its iothread.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub iothread: Option<u32>,
    /// Serial number.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub serial: Option<&'a str>,
    /// Sources below the top image, nearest first.
    #[serde(skip_serializing_if = "<[_]>::is_empty")]
    pub backing_chain: &'a [String],
    /// Where a block job is writing the disk to: the target of a copy, or the image that the one on top is committed to.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mirror: Option<&'a str>,
    /// Limits of its requests by libvirt's name: `total_bytes_sec`, `read_iops_sec`, `total_bytes_sec_max`, ….
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub limits: BTreeMap<&'a str, u64>,
    /// Disks with the same name here share the limits.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub limits_group: Option<&'a str>,
    /// The host's kernel sees its I/O.
    pub observable: bool,
    /// If not: why.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub observable_reason: Option<&'static str>,
}

/// Memory as configured.
#[derive(Debug, Serialize, JsonSchema)]
pub struct MemoryInfo {
    /// At most, bytes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_bytes: Option<u64>,
    /// What the balloon was told to leave, bytes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub current_bytes: Option<u64>,
}

/// The balloon device.
#[derive(Debug, Serialize, JsonSchema)]
pub struct BalloonInfo<'a> {
    /// Device model.
    pub model: &'a str,
    /// Period at which the guest reports its memory, seconds; 0 = it does not.
    pub stats_period_s: u32,
}

/// Something happened.
#[derive(Debug, Serialize, JsonSchema)]
pub struct Event<'a> {
    /// Wall clock, RFC 3339.
    pub ts: String,
    /// `CLOCK_MONOTONIC`, nanoseconds.
    pub mono_ns: u64,
    /// What.
    pub kind: EventKind,
    /// To which domain, if to one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub domain: Option<DomainName<'a>>,
    /// In words.
    pub detail: &'a str,
}

/// Kinds of events.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum EventKind {
    /// A domain started while we watched.
    Started,
    /// A domain stopped while we watched.
    Stopped,
    /// It came from another host or went to one.
    Migrated,
    /// It was paused.
    Paused,
    /// It runs again.
    Resumed,
    /// The guest restarted inside the same QEMU.
    Rebooted,
    /// The guest crashed.
    Crashed,
    /// A device came or went.
    Hotplug,
    /// A device could not be taken out.
    HotplugFailed,
    /// The balloon has another size.
    Balloon,
    /// A job on a disk is ready or ended.
    BlockJob,
    /// A job (migration, save, backup, …) makes progress or is over.
    Job,
    /// I/O on a disk failed on the host.
    IoError,
    /// Metadata, limits or a medium changed; a `domain` line follows if it shows there.
    Reconfigured,
    /// QEMU does not answer libvirt: what only it knows is missing until `monitor_back`.
    MonitorSilent,
    /// QEMU answers libvirt again.
    MonitorBack,
    /// Counters of a domain started anew, or those that its guest keeps; its epoch grew.
    CounterReset,
    /// The direction of an interface does not fit the addresses of its packets.
    DirectionMismatch,
    /// A counter of libvirt or `/proc` went backwards without a known reason; the domain's epoch grew.
    CounterBackwards,
    /// The wall clock (`ts`) was set, or the host slept; `mono_ns`, windows and rates go on as if nothing had happened.
    ClockStep,
    /// A source does not answer any more.
    SourceLost,
    /// A source answers again.
    SourceBack,
    /// Something could not be followed or was dropped.
    LostEvents,
}

/// Identity of a domain in a line.
#[derive(Debug, Serialize, JsonSchema)]
pub struct DomainName<'a> {
    /// Identity.
    #[serde(serialize_with = "as_text")]
    #[schemars(with = "String")]
    pub uuid: crate::units::DomainUuid,
    /// Name; text a tenant may have chosen.
    pub name: &'a str,
}

fn as_text<S: Serializer>(value: &impl std::fmt::Display, to: S) -> Result<S::Ok, S::Error> {
    to.collect_str(value)
}

/// RFC 3339 in UTC with nine digits of a second.
#[must_use]
pub fn timestamp(moment: jiff::Timestamp) -> String {
    format!("{moment:.9}")
}

/// How the monitor itself is doing.
#[derive(Debug, Serialize, JsonSchema)]
pub struct Health {
    /// Wall clock, RFC 3339.
    pub ts: String,
    /// `CLOCK_MONOTONIC`, nanoseconds.
    pub mono_ns: u64,
    /// By source.
    pub sources: BTreeMap<&'static str, SourceHealth>,
    /// Kernel programs, by name; only while the kernel counts their runs (`kernel.bpf_stats_enabled`).
    pub programs: BTreeMap<&'static str, ProgramHealth>,
    /// Events since the start that a kernel program was not run for, because they came in an interrupt while it was running on that
    /// CPU already, by program; those that missed none are left out.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub misses: BTreeMap<&'static str, u64>,
    /// CPU time of this process since it started, nanoseconds.
    pub cpu_ns: u64,
    /// Its resident memory, bytes; absent if it cannot be read.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rss_bytes: Option<u64>,
}

/// Reads of one source since the start.
#[derive(Clone, Debug, Default, Serialize, JsonSchema)]
pub struct SourceHealth {
    /// Reads that gave values.
    pub reads: u64,
    /// Reads that failed.
    pub errors: u64,
    /// Reads that were due but not made, because the one before was still under way or the source was away,
    /// and readings that were discarded.
    pub lost: u64,
    /// The last failure.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub last_error: Option<String>,
}

/// Runs of one kernel program since it was loaded.
#[derive(Clone, Copy, Debug, Serialize, JsonSchema)]
pub struct ProgramHealth {
    /// Runs while they were counted.
    pub run_count: u64,
    /// Time they took, nanoseconds.
    pub run_ns: u64,
}

/// The last line.
#[derive(Clone, Debug, Default, Serialize, JsonSchema)]
pub struct Summary {
    /// Wall clock, RFC 3339.
    pub ts: String,
    /// Why the run ended.
    pub reason: &'static str,
    /// Lines written, by type; without this one.
    pub records: BTreeMap<&'static str, u64>,
    /// Ticks made.
    pub ticks: u64,
    /// Ticks that were due while another was still under way.
    pub ticks_missed: u64,
    /// Lines dropped because the reader of the stream was too slow.
    pub records_dropped: u64,
    /// Wall time of the run, nanoseconds.
    pub wall_ns: u64,
    /// CPU time of this process, nanoseconds.
    pub cpu_ns: u64,
}

impl Record<'_> {
    /// The value of `type`.
    #[must_use]
    pub const fn name(&self) -> &'static str {
        match self {
            Record::Session(_) => "session",
            Record::Domain(_) => "domain",
            Record::Sample(_) => "sample",
            Record::Event(_) => "event",
            Record::Health(_) => "health",
            Record::Summary(_) => "summary",
        }
    }

    /// Appends the line, its end included.
    ///
    /// # Panics
    /// Never: only a map key that is not text could fail, and there is none.
    pub fn write_line(&self, line: &mut Vec<u8>) {
        let kind = self.name();
        match self {
            Record::Session(record) => json::anything(line, &Typed { kind, record }),
            Record::Domain(record) => json::anything(line, &Typed { kind, record }),
            Record::Sample(sample) => sample.write(line),
            Record::Event(record) => json::anything(line, &Typed { kind, record }),
            Record::Health(record) => json::anything(line, &Typed { kind, record }),
            Record::Summary(record) => json::anything(line, &Typed { kind, record }),
        }
        line.push(b'\n');
    }
}

/// A line with its type first.
#[derive(Serialize)]
struct Typed<'a, T> {
    #[serde(rename = "type")]
    kind: &'static str,
    #[serde(flatten)]
    record: &'a T,
}

/// JSON that can also be looked at: serde_json escapes control characters up to U+001F, this the others, some of
/// which steer terminals (U+009B) or end lines for some readers (U+0085, U+2028).
struct Plain;

impl serde_json::ser::Formatter for Plain {
    fn write_string_fragment<W: io::Write + ?Sized>(&mut self, to: &mut W, text: &str) -> io::Result<()> {
        if text.bytes().all(|b| b < 0x7f) {
            return to.write_all(text.as_bytes());
        }
        for c in text.chars() {
            if is_disruptive(c) { write!(to, "\\u{:04x}", u32::from(c))? } else { write!(to, "{c}")? }
        }
        Ok(())
    }
}

impl<'a> Domain<'a> {
    /// A domain as it stands in a line.
    #[must_use]
    pub fn new(domain: &'a inventory::Domain, since_ns: BTreeMap<&'static str, u64>) -> Self {
        let owner = &domain.owner;
        let metadata = Owner {
            manager: owner.manager,
            instance_id: owner.instance_id.as_deref(),
            instance_name: owner.instance_name.as_deref(),
            flavor: owner.flavor.as_deref(),
            project: owner.project.as_deref(),
            project_id: owner.project_id.as_deref(),
            user: owner.user.as_deref(),
            user_id: owner.user_id.as_deref(),
            image_id: owner.image_id.as_deref(),
            cluster_version: owner.cluster_version.as_deref(),
        };
        Self {
            uuid: domain.uuid.to_string(),
            name: &domain.name,
            id: domain.id,
            state: domain.state.name(),
            monitor: domain.monitor.name(),
            title: domain.title.as_deref(),
            metadata: (*owner != inventory::Owner::default()).then(|| Box::new(metadata)),
            pid: domain.process.map(|p| p.tgid.0),
            pid_start_time: domain.process.map(|p| p.start_time_ticks),
            virt_type: domain.virt_type.as_deref(),
            vcpus: domain.vcpus.iter().map(VcpuInfo::new).collect(),
            vcpus_max: domain.vcpus_max,
            cpu_limits: by_name(&domain.cpu_limits),
            interfaces: domain.interfaces.iter().map(InterfaceInfo::new).collect(),
            disks: domain.disks.iter().map(DiskInfo::new).collect(),
            memory: MemoryInfo {
                max_bytes: domain.memory_max_bytes,
                current_bytes: domain.memory_current_bytes,
            },
            balloon: domain
                .balloon
                .as_ref()
                .map(|b| BalloonInfo { model: &b.model, stats_period_s: b.stats_period_s }),
            found_by: match domain.found_by {
                inventory::FoundBy::Libvirt => "libvirt",
                inventory::FoundBy::Procfs => "procfs",
            },
            since_ns,
        }
    }
}

impl<'a> VcpuInfo<'a> {
    fn new(vcpu: &'a inventory::Vcpu) -> Self {
        Self { vcpu: vcpu.index.0, tid: vcpu.tid.map(|t| t.0), affinity: vcpu.affinity.as_deref() }
    }
}

impl<'a> InterfaceInfo<'a> {
    fn new(of: &'a inventory::Interface) -> Self {
        let (observable, observable_reason) = observable(&of.observable);
        Self {
            device: &of.device,
            ifindex: of.ifindex,
            netns: of.netns,
            since_ns: of.since_ns,
            alias: of.alias.as_deref(),
            mac: of.mac.as_deref(),
            kind: &of.kind,
            source: of.source.as_deref(),
            bridge: of.bridge.as_deref(),
            interface_id: of.interface_id.as_deref(),
            limits: by_name(&of.limits),
            host_pci: of.host_pci.as_deref(),
            model: of.model.as_deref(),
            queues: of.queues,
            filterref: of.filterref.as_deref(),
            parameters: of.parameters.iter().map(|(k, v)| (k.as_str(), v.as_str())).collect(),
            observable,
            observable_reason,
        }
    }
}

impl<'a> DiskInfo<'a> {
    fn new(of: &'a inventory::Disk) -> Self {
        let (observable, observable_reason) = observable(&of.observable);
        Self {
            target: &of.target,
            source: of.source.as_deref(),
            source_type: &of.source_type,
            device: &of.device,
            bus: of.bus.as_deref(),
            format: of.format.as_deref(),
            cache: of.cache.as_deref(),
            io: of.io.as_deref(),
            iothread: of.iothread,
            serial: of.serial.as_deref(),
            backing_chain: &of.backing_chain,
            mirror: of.mirror.as_deref(),
            limits: by_name(&of.limits),
            limits_group: of.limits_group.as_deref(),
            observable,
            observable_reason,
        }
    }
}

fn by_name(list: &[(String, u64)]) -> BTreeMap<&str, u64> {
    list.iter().map(|(name, value)| (name.as_str(), *value)).collect()
}

fn observable(of: &Observable) -> (bool, Option<&'static str>) {
    match of {
        Observable::Yes => (true, None),
        Observable::No(reason) => (false, Some(reason)),
    }
}
