//! The lines of the stream, and their JSON Schema: this file is the specification.
//!
//! One JSON object per line, `type` first, keys in a fixed order. A key whose value is not known is left out,
//! never 0 or `null`. Adding a field is compatible; renaming one or changing a unit raises [`SCHEMA_VERSION`].
//! Knows how numbers are written, not where they came from.

use std::{collections::BTreeMap, io};

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{
    Serialize, Serializer,
    ser::{SerializeMap as _, SerializeSeq as _},
};
use serde_json::Value;

use crate::{
    inventory::{self, Observable},
    is_disruptive,
    metric::{Kind, METRICS, Metric, MetricDef, Scope},
    model::{self, rate},
    sample::{DomainSample, ReadClass, Values},
    units::{MonotonicNs, SourceKind},
};

/// Version of the stream; in every `session` line.
pub const SCHEMA_VERSION: u32 = 1;

/// One line.
#[derive(Debug, Serialize, JsonSchema)]
#[serde(tag = "type", rename_all = "snake_case")]
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
    /// `attached`, `failed` or `off`.
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
    /// Title; text a tenant may have chosen.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub title: Option<&'a str>,
    /// Identity given by a management layer.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub metadata: Option<Owner<'a>>,
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

/// Identity given by a management layer (OpenStack Nova).
#[derive(Debug, Serialize, JsonSchema)]
pub struct Owner<'a> {
    /// Name of the instance as its user sees it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub instance_name: Option<&'a str>,
    /// Flavor.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub flavor: Option<&'a str>,
    /// Project.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub project: Option<&'a str>,
    /// User.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub user: Option<&'a str>,
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
    /// Host device.
    pub device: &'a str,
    /// Its index.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ifindex: Option<u32>,
    /// MAC address of the guest's side.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mac: Option<&'a str>,
    /// `ethernet`, `bridge`, `network`, `direct`, ….
    #[serde(rename = "type")]
    pub kind: &'a str,
    /// Bridge, network or device it is connected to.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub source: Option<&'a str>,
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
    /// It was paused.
    Paused,
    /// It runs again.
    Resumed,
    /// Counters of a domain started anew; its epoch grew.
    CounterReset,
    /// A counter went backwards without a known reason; that reading gives no rate.
    CounterBackwards,
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

/// What the sources said of one domain at one tick.
#[derive(Debug, Serialize, JsonSchema)]
pub struct Sample<'a> {
    /// Number of this sample among the domain's, from 0.
    pub seq: u64,
    /// Wall clock, RFC 3339 with nanoseconds.
    pub ts: String,
    /// `CLOCK_MONOTONIC`, nanoseconds.
    pub mono_ns: u64,
    /// Time since the tick before, nanoseconds; the configured interval at the first.
    pub interval_ns: u64,
    /// Which domain.
    pub domain: DomainName<'a>,
    /// Counters are comparable within one epoch.
    pub epoch: u32,
    /// When each source was read for this sample, `[begin_ns, end_ns]` on `CLOCK_MONOTONIC`. A source that was
    /// not read since the last sample is left out, here and in every metric.
    #[serde(serialize_with = "serialize_windows")]
    #[schemars(schema_with = "windows_schema")]
    pub windows: &'a DomainSample,
    /// The domain's CPU time.
    #[schemars(schema_with = "cpu_schema")]
    pub cpu: Metrics<'a>,
    /// One element per vCPU.
    #[serde(serialize_with = "serialize_vcpus")]
    #[schemars(schema_with = "vcpus_schema")]
    pub vcpus: Entities<'a, inventory::Vcpu>,
    /// One element per network interface.
    #[serde(serialize_with = "serialize_interfaces")]
    #[schemars(schema_with = "interfaces_schema")]
    pub interfaces: Entities<'a, inventory::Interface>,
    /// One element per disk.
    #[serde(serialize_with = "serialize_disks")]
    #[schemars(schema_with = "disks_schema")]
    pub disks: Entities<'a, inventory::Disk>,
    /// The guest's memory.
    #[schemars(schema_with = "memory_schema")]
    pub memory: Metrics<'a>,
}

/// Identity and values of the entities of one scope, side by side.
#[derive(Clone, Copy, Debug)]
pub struct Entities<'a, T> {
    /// Who they are.
    pub who: &'a [T],
    /// Their values.
    pub values: &'a [Values],
    /// The windows they were read in.
    pub sample: &'a DomainSample,
}

/// The metrics of one entity.
#[derive(Clone, Copy, Debug)]
pub struct Metrics<'a> {
    values: &'a Values,
    sample: &'a DomainSample,
    extra: Extra,
}

#[derive(Clone, Copy, Debug)]
enum Extra {
    None,
    Memory { now_s: u64, stats_period_s: Option<u32> },
}

impl<'a> Sample<'a> {
    /// The line of one domain at one tick.
    #[must_use]
    pub fn new(tick: Tick, of: Subject<'a>) -> Self {
        let Subject { seq, epoch, domain, sample } = of;
        let memory = Extra::Memory {
            now_s: u64::try_from(tick.wall.as_second()).unwrap_or(0),
            stats_period_s: domain.balloon.as_ref().map(|b| b.stats_period_s),
        };
        Self {
            seq,
            ts: timestamp(tick.wall),
            mono_ns: tick.mono.0,
            interval_ns: tick.interval_ns,
            domain: DomainName { uuid: domain.uuid, name: &domain.name },
            epoch,
            windows: sample,
            cpu: Metrics { values: &sample.cpu, sample, extra: Extra::None },
            vcpus: Entities { who: &domain.vcpus, values: &sample.vcpus, sample },
            interfaces: Entities { who: &domain.interfaces, values: &sample.interfaces, sample },
            disks: Entities { who: &domain.disks, values: &sample.disks, sample },
            memory: Metrics { values: &sample.memory, sample, extra: memory },
        }
    }
}

/// The domain a `sample` line is about.
#[derive(Clone, Copy, Debug)]
pub struct Subject<'a> {
    /// Number of the sample.
    pub seq: u64,
    /// Epoch of its counters.
    pub epoch: u32,
    /// Who it is.
    pub domain: &'a inventory::Domain,
    /// Its values.
    pub sample: &'a DomainSample,
}

/// The moment a line is about.
#[derive(Clone, Copy, Debug)]
pub struct Tick {
    /// Wall clock.
    pub wall: jiff::Timestamp,
    /// Arithmetic clock.
    pub mono: MonotonicNs,
    /// Since the tick before, nanoseconds.
    pub interval_ns: u64,
}

/// RFC 3339 in UTC with nine digits of a second.
#[must_use]
pub fn timestamp(moment: jiff::Timestamp) -> String {
    format!("{moment:.9}")
}

fn serialize_windows<S: Serializer>(sample: &DomainSample, to: S) -> Result<S::Ok, S::Error> {
    let mut map = to.serialize_map(None)?;
    for source in SourceKind::ALL {
        if let Some(window) = fresh_window(sample, source) {
            map.serialize_entry(source.name(), &[window.begin.0, window.end.0])?;
        }
    }
    map.end()
}

fn fresh_window(sample: &DomainSample, source: SourceKind) -> Option<crate::units::Window> {
    let classes = match source {
        SourceKind::Ebpf => [ReadClass::Ebpf; 2],
        SourceKind::Procfs => [ReadClass::Procfs; 2],
        SourceKind::Libvirt => [ReadClass::LibvirtFast, ReadClass::LibvirtSlow],
    };
    classes.into_iter().map(|class| sample.reads(class)).find(|r| r.fresh)?.now
}

impl Serialize for Metrics<'_> {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        let mut map = to.serialize_map(None)?;
        serialize_values::<S>(&mut map, self.values, self.sample)?;
        match self.extra {
            Extra::None => serialize_utilization::<S>(&mut map, self.values, self.sample)?,
            Extra::Memory { now_s, stats_period_s } => {
                serialize_memory::<S>(&mut map, self, now_s, stats_period_s)?;
            }
        }
        map.end()
    }
}

/// Numbers of one metric, and what follows from them.
#[derive(Clone, Copy, Debug)]
struct MetricValue<'a> {
    def: &'a MetricDef,
    values: &'a Values,
    sample: &'a DomainSample,
}

impl MetricValue<'_> {
    fn of(&self, source: SourceKind) -> Option<u64> {
        let fresh = self.sample.reads(ReadClass::of(self.def.metric, source)).fresh;
        if fresh { self.values.now(source, self.def.metric) } else { None }
    }

    fn best(&self) -> Option<SourceKind> {
        self.def.sources.iter().copied().find(|s| self.of(*s).is_some())
    }

    fn rate(&self, source: SourceKind) -> Option<model::Rate> {
        let reads = self.sample.reads(ReadClass::of(self.def.metric, source));
        let before = (self.values.before(source, self.def.metric)?, reads.before?);
        rate(before, (self.of(source)?, reads.now?)).ok()
    }
}

impl Serialize for MetricValue<'_> {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        let mut map = to.serialize_map(None)?;
        for source in SourceKind::ALL {
            if let Some(value) = self.of(source) {
                map.serialize_entry(source.name(), &value)?;
            }
        }
        if let Some(best) = self.best() {
            map.serialize_entry("best", best.name())?;
            if let (Kind::Counter, Some(rate)) = (self.def.kind, self.rate(best)) {
                let per_s =
                    if self.def.unit == crate::units::Unit::Nanoseconds { rate.mid / 1e9 } else { rate.mid };
                map.serialize_entry("per_s", &per_s)?;
            }
        }
        map.end()
    }
}

fn serialize_values<S: Serializer>(
    map: &mut S::SerializeMap,
    values: &Values,
    sample: &DomainSample,
) -> Result<(), S::Error> {
    for def in values.scope().metrics() {
        let value = MetricValue { def, values, sample };
        if value.best().is_some() {
            map.serialize_entry(def.name, &value)?;
        }
    }
    Ok(())
}

/// `util_pct`: CPU time per wall time of the process, in per cent of one CPU.
fn serialize_utilization<S: Serializer>(
    map: &mut S::SerializeMap,
    values: &Values,
    sample: &DomainSample,
) -> Result<(), S::Error> {
    let value = MetricValue { def: Metric::CpuTime.def(), values, sample };
    let Some(best) = value.best() else { return Ok(()) };
    let Some(rate) = value.rate(best) else { return Ok(()) };
    #[derive(Serialize)]
    struct Percent {
        best: &'static str,
        value: f64,
    }
    map.serialize_entry("util_pct", &Percent { best: best.name(), value: rate.mid / 1e7 })
}

/// What follows from the balloon's figures: memory in use by the best definition there is, and their age.
fn serialize_memory<S: Serializer>(
    map: &mut S::SerializeMap,
    metrics: &Metrics<'_>,
    now_s: u64,
    stats_period_s: Option<u32>,
) -> Result<(), S::Error> {
    if !metrics.sample.reads(ReadClass::LibvirtSlow).fresh {
        return Ok(());
    }
    let value = |metric| metrics.values.now(SourceKind::Libvirt, metric);
    let free = value(Metric::MemoryUsable)
        .map(|free| (free, "available_minus_usable"))
        .or(value(Metric::MemoryUnused).map(|free| (free, "available_minus_unused")));
    if let (Some(available), Some((free, by))) = (value(Metric::MemoryAvailable), free)
        && let Some(used) = available.checked_sub(free)
    {
        map.serialize_entry("used_bytes", &used)?;
        map.serialize_entry("used_by", by)?;
    }
    if let Some(age) =
        metrics.sample.balloon_updated_s.filter(|at| *at > 0).map(|at| now_s.saturating_sub(at))
    {
        map.serialize_entry("age_s", &age)?;
        let period = u64::from(stats_period_s.unwrap_or(0));
        map.serialize_entry("stale", &(period == 0 || age > 3 * period))?;
    }
    Ok(())
}

fn serialize_entities<S: Serializer, T>(
    entities: &Entities<'_, T>,
    to: S,
    identity: impl Fn(usize, &T) -> Identity<'_>,
) -> Result<S::Ok, S::Error> {
    let mut seq = to.serialize_seq(None)?;
    for (i, (who, values)) in entities.who.iter().zip(entities.values).enumerate() {
        seq.serialize_element(&Entity { who: identity(i, who), values, sample: entities.sample })?;
    }
    seq.end()
}

enum Identity<'a> {
    Vcpu { vcpu: u32, tid: Option<u32>, place: usize },
    Device(&'a str),
    Target(&'a str),
}

struct Entity<'a> {
    who: Identity<'a>,
    values: &'a Values,
    sample: &'a DomainSample,
}

impl Serialize for Entity<'_> {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        let mut map = to.serialize_map(None)?;
        match self.who {
            Identity::Vcpu { vcpu, tid, .. } => {
                map.serialize_entry("vcpu", &vcpu)?;
                if let Some(tid) = tid {
                    map.serialize_entry("tid", &tid)?;
                }
            }
            Identity::Device(device) => map.serialize_entry("device", device)?,
            Identity::Target(target) => map.serialize_entry("target", target)?,
        }
        serialize_values::<S>(&mut map, self.values, self.sample)?;
        if let Identity::Vcpu { place, .. } = self.who {
            let detail = &self.sample.vcpu_details[place];
            let histograms = [("wait_hist_ns", &detail.wait_hist), ("run_hist_ns", &detail.run_hist)];
            for (name, histogram) in histograms {
                if let Some(histogram) = histogram {
                    map.serialize_entry(name, histogram)?;
                }
            }
            if let Some(culprits) = &detail.preempted_by {
                map.serialize_entry("preempted_by", culprits)?;
            }
            if let Some(state) = detail.state {
                map.serialize_entry("state", state)?;
            }
        }
        map.end()
    }
}

fn serialize_vcpus<S: Serializer>(of: &Entities<'_, inventory::Vcpu>, to: S) -> Result<S::Ok, S::Error> {
    serialize_entities(of, to, |place, v| Identity::Vcpu { vcpu: v.index.0, tid: v.tid.map(|t| t.0), place })
}

fn serialize_interfaces<S: Serializer>(
    of: &Entities<'_, inventory::Interface>,
    to: S,
) -> Result<S::Ok, S::Error> {
    serialize_entities(of, to, |_, i| Identity::Device(&i.device))
}

fn serialize_disks<S: Serializer>(of: &Entities<'_, inventory::Disk>, to: S) -> Result<S::Ok, S::Error> {
    serialize_entities(of, to, |_, d| Identity::Target(&d.target))
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
        let mut to = serde_json::Serializer::with_formatter(&mut *line, Plain);
        self.serialize(&mut to).expect("every map key is text");
        line.push(b'\n');
    }
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
            instance_name: owner.instance_name.as_deref(),
            flavor: owner.flavor.as_deref(),
            project: owner.project.as_deref(),
            user: owner.user.as_deref(),
        };
        Self {
            uuid: domain.uuid.to_string(),
            name: &domain.name,
            id: domain.id,
            state: domain.state.name(),
            title: domain.title.as_deref(),
            metadata: (*owner != inventory::Owner::default()).then_some(metadata),
            pid: domain.process.map(|p| p.tgid.0),
            pid_start_time: domain.process.map(|p| p.start_time_ticks),
            virt_type: domain.virt_type.as_deref(),
            vcpus: domain.vcpus.iter().map(VcpuInfo::new).collect(),
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
            mac: of.mac.as_deref(),
            kind: &of.kind,
            source: of.source.as_deref(),
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
            observable,
            observable_reason,
        }
    }
}

fn observable(of: &Observable) -> (bool, Option<&'static str>) {
    match of {
        Observable::Yes => (true, None),
        Observable::No(reason) => (false, Some(reason)),
    }
}

/// The JSON Schema of one line of the stream.
#[must_use]
pub fn schema() -> Schema {
    let mut settings = schemars::generate::SchemaSettings::draft2020_12().for_serialize();
    settings.inline_subschemas = false;
    let mut schema = settings.into_generator().into_root_schema_for::<Record<'static>>();
    schema.insert("title".to_owned(), "kvm-monitor stream line".into());
    schema.insert("$id".to_owned(), format!("urn:kvm-monitor:stream:{SCHEMA_VERSION}").into());
    close(&mut schema);
    schema
}

/// The program writes no key that the schema it prints does not name, and no `null`: a missing value is a missing
/// key. The schema says so, that a validator finds what breaks it.
fn close(schema: &mut Schema) {
    let mut lines = Vec::new();
    for line in schema.get_mut("oneOf").and_then(Value::as_array_mut).into_iter().flatten() {
        // The keys of a line are its `type` and those of the definition it refers to.
        line["unevaluatedProperties"] = false.into();
        lines.extend(line["$ref"].as_str().and_then(|r| r.strip_prefix("#/$defs/")).map(str::to_owned));
    }
    for (name, def) in schema.get_mut("$defs").and_then(Value::as_object_mut).into_iter().flatten() {
        let Some(properties) = def.get_mut("properties").and_then(Value::as_object_mut) else { continue };
        properties.values_mut().for_each(forbid_null);
        if !lines.contains(name) {
            def["additionalProperties"] = false.into();
        }
    }
}

/// Undoes what schemars makes of an `Option`.
fn forbid_null(property: &mut Value) {
    let Some(property) = property.as_object_mut() else { return };
    if let Some(types) = property.get_mut("type").and_then(Value::as_array_mut) {
        types.retain(|t| t != "null");
        if let [one] = types.as_mut_slice() {
            let one = one.take();
            property.insert("type".to_owned(), one);
        }
    }
    if let Some(Value::Array(choices)) = property.remove("anyOf") {
        let choice = choices.into_iter().find(|c| c["type"] != "null");
        property.extend(choice.into_iter().filter_map(|c| c.as_object().cloned()).flatten());
    }
}

fn windows_schema(_: &mut SchemaGenerator) -> Schema {
    let window = json_schema!({
        "type": "array", "items": { "type": "integer", "minimum": 0 }, "minItems": 2, "maxItems": 2
    });
    let properties: serde_json::Map<_, _> =
        SourceKind::ALL.iter().map(|s| (s.name().to_owned(), window.clone().to_value())).collect();
    json_schema!({ "type": "object", "properties": properties, "additionalProperties": false })
}

/// The object of one entity: its identity, its metrics, and what follows from them.
fn entity_schema(scope: Scope, identity: &[(&str, Schema)], derived: &[(&str, Schema)]) -> Schema {
    let mut properties = serde_json::Map::new();
    for (name, schema) in identity.iter().chain(derived) {
        properties.insert((*name).to_owned(), schema.clone().to_value());
    }
    for def in METRICS.iter().filter(|def| def.scope == scope) {
        properties.insert(def.name.to_owned(), metric_schema(def).to_value());
    }
    let required: Vec<&str> = identity.iter().map(|(name, _)| *name).filter(|n| *n != "tid").collect();
    json_schema!({
        "type": "object", "properties": properties, "required": required, "additionalProperties": false
    })
}

fn metric_schema(def: &MetricDef) -> Schema {
    let mut properties = serde_json::Map::new();
    for source in def.sources {
        properties.insert(source.name().to_owned(), serde_json::json!({ "type": "integer", "minimum": 0 }));
    }
    let names: Vec<&str> = def.sources.iter().map(|s| s.name()).collect();
    properties.insert("best".to_owned(), serde_json::json!({ "enum": names }));
    if def.kind == Kind::Counter {
        properties.insert("per_s".to_owned(), serde_json::json!({ "type": "number", "minimum": 0 }));
    }
    let description = format!(
        "{} ({}, {})",
        def.help,
        def.unit.name(),
        if def.kind == Kind::Counter { "counter" } else { "gauge" }
    );
    json_schema!({
        "type": "object", "description": description, "properties": properties, "required": ["best"],
        "minProperties": 2, "additionalProperties": false
    })
}

fn cpu_schema(_: &mut SchemaGenerator) -> Schema {
    let names: Vec<&str> = SourceKind::ALL.iter().map(|s| s.name()).collect();
    let percent = json_schema!({
        "type": "object", "description": "CPU time per wall time, per cent of one CPU.",
        "properties": { "best": { "enum": names }, "value": { "type": "number", "minimum": 0 } },
        "required": ["best", "value"], "additionalProperties": false
    });
    entity_schema(Scope::Cpu, &[], &[("util_pct", percent)])
}

fn memory_schema(_: &mut SchemaGenerator) -> Schema {
    let derived = [
        ("used_bytes", json_schema!({ "type": "integer", "minimum": 0 })),
        ("used_by", json_schema!({ "enum": ["available_minus_usable", "available_minus_unused"] })),
        (
            "age_s",
            json_schema!({ "type": "integer", "minimum": 0, "description": "Seconds since the guest last reported." }),
        ),
        (
            "stale",
            json_schema!({ "type": "boolean", "description": "age_s is above three reporting periods, or the guest does not report." }),
        ),
    ];
    entity_schema(Scope::Memory, &[], &derived)
}

fn vcpus_schema(generator: &mut SchemaGenerator) -> Schema {
    let number = json_schema!({ "type": "integer", "minimum": 0 });
    let bucket = json_schema!({
        "type": "array", "items": { "type": "integer", "minimum": 0 }, "minItems": 3, "maxItems": 3
    });
    let histogram = |of: &str| {
        json_schema!({
            "type": "array", "items": bucket.clone().to_value(),
            "description": format!("Lengths of {of} that ended since the last histogram: [from, to, count], ns.")
        })
    };
    let derived = [
        ("wait_hist_ns", histogram("waits")),
        ("run_hist_ns", histogram("runs")),
        ("preempted_by", generator.subschema_for::<Vec<crate::sample::PreemptedBy>>()),
        ("state", json_schema!({ "enum": ["running", "waiting", "sleeping"] })),
    ];
    array_of(entity_schema(Scope::Vcpu, &[("vcpu", number.clone()), ("tid", number)], &derived))
}

fn interfaces_schema(_: &mut SchemaGenerator) -> Schema {
    array_of(entity_schema(Scope::Interface, &[("device", json_schema!({ "type": "string" }))], &[]))
}

fn disks_schema(_: &mut SchemaGenerator) -> Schema {
    array_of(entity_schema(Scope::Disk, &[("target", json_schema!({ "type": "string" }))], &[]))
}

fn array_of(items: Schema) -> Schema {
    json_schema!({ "type": "array", "items": items.to_value() })
}
