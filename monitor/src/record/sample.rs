//! The `sample` line: every metric of every entity with one number per source, written straight from the tables.

use std::collections::BTreeMap;

use schemars::JsonSchema;
use serde::{
    Serialize, Serializer,
    ser::{SerializeMap as _, SerializeSeq as _},
};

use super::{DomainName, timestamp};
use crate::{
    inventory,
    metric::{Kind, Metric, MetricDef},
    model::{self, rate},
    sample::{DiskDetail, DomainSample, InterfaceDetail, ReadClass, Values},
    source::{
        ebpf::ExitReason,
        libvirt::{Job, stats::DirtyRate},
    },
    units::{MonotonicNs, SourceKind, Unit, Window},
};

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
    /// not read since the last sample is left out, here and in every metric. `procfs_net` is when `/proc` was read for
    /// the numbers of interfaces.
    #[serde(serialize_with = "serialize_windows")]
    #[schemars(schema_with = "super::schema::windows")]
    pub windows: &'a DomainSample,
    /// The domain's CPU time.
    #[schemars(schema_with = "super::schema::cpu")]
    pub cpu: Metrics<'a>,
    /// One element per vCPU.
    #[serde(serialize_with = "serialize_vcpus")]
    #[schemars(schema_with = "super::schema::vcpus")]
    pub vcpus: Entities<'a, inventory::Vcpu>,
    /// One element per network interface.
    #[serde(serialize_with = "serialize_interfaces")]
    #[schemars(schema_with = "super::schema::interfaces")]
    pub interfaces: Entities<'a, inventory::Interface>,
    /// One element per disk.
    #[serde(serialize_with = "serialize_disks")]
    #[schemars(schema_with = "super::schema::disks")]
    pub disks: Entities<'a, inventory::Disk>,
    /// The guest's memory.
    #[schemars(schema_with = "super::schema::memory")]
    pub memory: Metrics<'a>,
    /// How fast the guest writes to its memory, by the last measurement that somebody asked libvirt for; with some of
    /// libvirt's slow reads, and only if there was one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub dirty_rate: Option<&'a DirtyRate>,
    /// A job that libvirt runs on the domain (migration, save, backup, …), with each of libvirt's reads while it runs.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub job: Option<&'a Job>,
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
            dirty_rate: sample.dirty_rate.as_ref(),
            job: sample.job.as_ref(),
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

fn serialize_windows<S: Serializer>(sample: &DomainSample, to: S) -> Result<S::Ok, S::Error> {
    let mut map = to.serialize_map(None)?;
    for source in SourceKind::ALL {
        if let Some(window) = fresh_window(sample, source) {
            map.serialize_entry(source.name(), &[window.begin.0, window.end.0])?;
        }
    }
    let net = sample.reads(ReadClass::ProcfsNet);
    if let Some(window) = net.now.filter(|_| net.fresh) {
        map.serialize_entry("procfs_net", &[window.begin.0, window.end.0])?;
    }
    map.end()
}

fn fresh_window(sample: &DomainSample, source: SourceKind) -> Option<Window> {
    let classes = match source {
        SourceKind::Ebpf => [ReadClass::Ebpf; 2],
        SourceKind::Procfs => [ReadClass::Procfs, ReadClass::ProcfsSlow],
        SourceKind::Libvirt => [ReadClass::LibvirtFast, ReadClass::LibvirtSlow],
    };
    let fresh = classes.into_iter().map(|class| sample.reads(class)).filter(|reads| reads.fresh);
    let mut windows = fresh.filter_map(|reads| reads.now);
    let first = windows.next()?;
    // Counters come with both reads of libvirt: around both. The slow read of `/proc` brings gauges only.
    let more = windows.next().filter(|_| source == SourceKind::Libvirt).unwrap_or(first);
    Some(Window { begin: first.begin.min(more.begin), end: first.end.max(more.end) })
}

impl Serialize for Metrics<'_> {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        let mut map = to.serialize_map(None)?;
        serialize_values::<S>(&mut map, self.values, self.sample)?;
        match self.extra {
            Extra::None => {
                serialize_utilization::<S>(&mut map, self.values, self.sample)?;
                if !self.sample.perf.is_empty() {
                    map.serialize_entry("perf", &Named(&self.sample.perf))?;
                }
            }
            Extra::Memory { now_s, stats_period_s } => {
                serialize_memory::<S>(&mut map, self, now_s, stats_period_s)?;
            }
        }
        map.end()
    }
}

/// Numbers of one metric, and what follows from them.
#[derive(Clone, Copy, Debug)]
struct MetricValue {
    /// In the order of [`SourceKind::ALL`].
    numbers: [Option<u64>; SourceKind::COUNT],
    best: SourceKind,
    rate: Option<model::Rate>,
    unit: Unit,
}

impl MetricValue {
    /// `None` if no source was read for it since the last sample.
    fn of(def: &MetricDef, values: &Values, sample: &DomainSample) -> Option<Self> {
        let reads = |source| sample.reads(ReadClass::of(def.metric, source));
        let (mut numbers, mut best) = ([None; SourceKind::COUNT], None);
        for source in def.sources {
            if let Some(now) = values.now(*source, def.metric).filter(|_| reads(*source).fresh) {
                numbers[*source as usize] = Some(now);
                best = best.or(Some((*source, now)));
            }
        }
        let (best, now) = best?;
        let rate_of_best = || {
            let before = values.before(best, def.metric)?;
            let reads = reads(best);
            rate((before, reads.before?), (now, reads.now?)).ok()
        };
        let rate = if def.kind == Kind::Counter { rate_of_best() } else { None };
        Some(Self { numbers, best, rate, unit: def.unit })
    }
}

impl Serialize for MetricValue {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        let mut map = to.serialize_map(None)?;
        for (source, number) in SourceKind::ALL.iter().zip(&self.numbers) {
            if let Some(number) = number {
                map.serialize_entry(source.name(), number)?;
            }
        }
        map.serialize_entry("best", self.best.name())?;
        if let Some(rate) = self.rate {
            let per_s = if self.unit == Unit::Nanoseconds { rate.mid / 1e9 } else { rate.mid };
            map.serialize_entry("per_s", &per_s)?;
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
        if let Some(value) = MetricValue::of(def, values, sample) {
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
    let Some(value) = MetricValue::of(Metric::CpuTime.def(), values, sample) else { return Ok(()) };
    let Some(rate) = value.rate else { return Ok(()) };
    #[derive(Serialize)]
    struct Percent {
        best: &'static str,
        value: f64,
    }
    map.serialize_entry("util_pct", &Percent { best: value.best.name(), value: rate.mid / 1e7 })
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
    let less = |free| value(Metric::MemoryAvailable)?.checked_sub(value(free)?);
    let (usable, unused) = (less(Metric::MemoryUsable), less(Metric::MemoryUnused));
    let used = usable
        .map(|used| (used, "available_minus_usable"))
        .or(unused.map(|used| (used, "available_minus_unused")));
    if let Some((used, by)) = used {
        map.serialize_entry("used_bytes", &used)?;
        map.serialize_entry("used_by", by)?;
    }
    for (name, used) in [("available_minus_usable_bytes", usable), ("available_minus_unused_bytes", unused)] {
        if let Some(used) = used {
            map.serialize_entry(name, &used)?;
        }
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
    Device { interface: &'a inventory::Interface, place: usize },
    Target { target: &'a str, place: usize },
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
            Identity::Device { interface, .. } => serialize_interface_identity::<S>(&mut map, interface)?,
            Identity::Target { target, .. } => map.serialize_entry("target", target)?,
        }
        serialize_values::<S>(&mut map, self.values, self.sample)?;
        if let Identity::Device { place, .. } = self.who {
            serialize_interface_detail::<S>(&mut map, &self.sample.interface_details[place])?;
        }
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
            let exits = detail.exits.as_ref().map(|exits| [&exits.guest, &exits.userspace]);
            for (name, reasons) in
                ["exit_reasons", "userspace_exit_reasons"].into_iter().zip(exits.into_iter().flatten())
            {
                if !reasons.is_empty() {
                    map.serialize_entry(name, &Reasons(reasons))?;
                }
            }
            if let Some(state) = detail.state {
                map.serialize_entry("state", state)?;
            }
            if let Some(state) = detail.libvirt_state {
                map.serialize_entry("libvirt_state", state)?;
            }
            if !detail.kvm_stats.is_empty() {
                map.serialize_entry("kvm_stats", &Named(&detail.kvm_stats))?;
            }
        }
        if let Identity::Target { place, .. } = self.who {
            serialize_disk_detail::<S>(&mut map, &self.sample.disk_details[place])?;
        }
        map.end()
    }
}

/// `{NAME: number}`.
struct Named<'a>(&'a [(String, u64)]);

impl Serialize for Named<'_> {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        to.collect_map(self.0.iter().map(|(name, number)| (name, number)))
    }
}

/// `{NAME: {count, ns}}`.
struct Reasons<'a>(&'a [ExitReason]);

impl Serialize for Reasons<'_> {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        #[derive(Serialize)]
        struct Counted {
            count: u64,
            #[serde(skip_serializing_if = "Option::is_none")]
            ns: Option<u64>,
        }
        to.collect_map(self.0.iter().map(|r| (&r.name, Counted { count: r.count, ns: r.ns })))
    }
}

/// The host device, and what tells interfaces apart that have none.
fn serialize_interface_identity<S: Serializer>(
    map: &mut S::SerializeMap,
    interface: &inventory::Interface,
) -> Result<(), S::Error> {
    if !interface.device.is_empty() {
        map.serialize_entry("device", &interface.device)?;
    }
    if let Some(alias) = &interface.alias {
        map.serialize_entry("alias", alias)?;
    }
    if let Some(mac) = &interface.mac {
        map.serialize_entry("mac", mac)?;
    }
    Ok(())
}

fn serialize_interface_detail<S: Serializer>(
    map: &mut S::SerializeMap,
    detail: &InterfaceDetail,
) -> Result<(), S::Error> {
    let reasons = [
        ("rx_drop_reasons", &detail.rx_drop_reasons),
        ("tx_drop_reasons", &detail.tx_drop_reasons),
        ("rx_host_drop_reasons", &detail.rx_host_drop_reasons),
        ("tx_host_drop_reasons", &detail.tx_host_drop_reasons),
    ];
    for (name, reasons) in reasons.into_iter().filter(|(_, reasons)| !reasons.is_empty()) {
        let reasons: BTreeMap<&str, u64> = reasons.iter().map(|(name, n)| (name.as_str(), *n)).collect();
        map.serialize_entry(name, &reasons)?;
    }
    let histograms =
        [("rx_burst_hist_bytes", &detail.rx_burst_hist), ("tx_burst_hist_bytes", &detail.tx_burst_hist)];
    for (name, histogram) in histograms {
        if let Some(histogram) = histogram {
            map.serialize_entry(name, histogram)?;
        }
    }
    if !detail.queues.is_empty() {
        map.serialize_entry("queues", &detail.queues)?;
    }
    Ok(())
}

fn serialize_disk_detail<S: Serializer>(
    map: &mut S::SerializeMap,
    detail: &DiskDetail,
) -> Result<(), S::Error> {
    let histograms = [
        ("rd_latency_ns", "rd_latency_hist_ns", &detail.rd_hist),
        ("wr_latency_ns", "wr_latency_hist_ns", &detail.wr_hist),
        ("fl_latency_ns", "fl_latency_hist_ns", &detail.fl_hist),
        ("device_rd_latency_ns", "device_rd_latency_hist_ns", &detail.device_rd_hist),
        ("device_wr_latency_ns", "device_wr_latency_hist_ns", &detail.device_wr_hist),
    ];
    for (summary, name, histogram) in histograms {
        let Some(histogram) = histogram else { continue };
        if let Some(latency) = latency(histogram) {
            map.serialize_entry(summary, &latency)?;
        }
        map.serialize_entry(name, histogram)?;
    }
    if let Some(reason) = detail.device_reason {
        map.serialize_entry("device_reason", reason)?;
    }
    if let Some(layers) = &detail.layers {
        map.serialize_entry("layers", layers)?;
    }
    if !detail.errors.is_empty() {
        let named: BTreeMap<_, _> = detail.errors.iter().map(|(errno, n)| (errno_name(*errno), n)).collect();
        map.serialize_entry("errors", &named)?;
    }
    Ok(())
}

/// What a latency histogram says at a glance.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, JsonSchema)]
pub(super) struct Latency {
    /// Half of the requests took no longer, nanoseconds. Like the others the upper end of a bucket: up to 6.25 % more
    /// than the exact value, never less.
    pub p50: u64,
    /// 95 % of the requests took no longer.
    pub p95: u64,
    /// 99 % of the requests took no longer.
    pub p99: u64,
    /// None took longer.
    pub max: u64,
}

/// `None` if there was no request, or one beyond the last bucket, whose length is not known.
fn latency(histogram: &[[u64; 3]]) -> Option<Latency> {
    let total: u64 = histogram.iter().map(|[.., count]| count).sum();
    let max = histogram.last().map(|[_, high, _]| *high).filter(|high| *high != u64::MAX)?;
    let at_most = |percent: u64| {
        let rank = (total * percent).div_ceil(100);
        let mut below = 0;
        histogram.iter().find(|[.., count]| {
            below += count;
            below >= rank
        })
    };
    let high = |percent| at_most(percent).map(|[_, high, _]| *high);
    Some(Latency { p50: high(50)?, p95: high(95)?, p99: high(99)?, max })
}

/// As errno(3) names it; the number where it is none that disks give.
fn errno_name(errno: u32) -> String {
    let name = match errno {
        0 => "other",
        5 => "EIO",
        6 => "ENXIO",
        9 => "EBADF",
        12 => "ENOMEM",
        14 => "EFAULT",
        16 => "EBUSY",
        19 => "ENODEV",
        22 => "EINVAL",
        27 => "EFBIG",
        28 => "ENOSPC",
        30 => "EROFS",
        61 => "ENODATA",
        67 => "ENOLINK",
        84 => "EILSEQ",
        95 => "EOPNOTSUPP",
        110 => "ETIMEDOUT",
        116 => "ESTALE",
        121 => "EREMOTEIO",
        122 => "EDQUOT",
        125 => "ECANCELED",
        _ => return format!("errno_{errno}"),
    };
    name.to_owned()
}

fn serialize_vcpus<S: Serializer>(of: &Entities<'_, inventory::Vcpu>, to: S) -> Result<S::Ok, S::Error> {
    serialize_entities(of, to, |place, v| Identity::Vcpu { vcpu: v.index.0, tid: v.tid.map(|t| t.0), place })
}

fn serialize_interfaces<S: Serializer>(
    of: &Entities<'_, inventory::Interface>,
    to: S,
) -> Result<S::Ok, S::Error> {
    serialize_entities(of, to, |place, interface| Identity::Device { interface, place })
}

fn serialize_disks<S: Serializer>(of: &Entities<'_, inventory::Disk>, to: S) -> Result<S::Ok, S::Error> {
    serialize_entities(of, to, |place, d| Identity::Target { target: &d.target, place })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_upper_ends_of_buckets() {
        let one = latency(&[[64, 68, 1]]).unwrap();
        assert_eq!((one.p50, one.p95, one.p99, one.max), (68, 68, 68, 68));
        let many = latency(&[[64, 68, 50], [68, 72, 45], [128, 136, 4], [1024, 1088, 1]]).unwrap();
        assert_eq!((many.p50, many.p95, many.p99, many.max), (68, 72, 136, 1088));
        assert_eq!(latency(&[]), None);
        assert_eq!(latency(&[[1 << 37, u64::MAX, 1]]), None);
    }
}
