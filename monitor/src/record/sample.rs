//! The `sample` line: every metric of every entity with one number per source, written straight from the tables.
//!
//! Most of a stream are such lines, so they are written without values in between: [`Object`] appends to the line.

use std::{collections::BTreeMap, sync::LazyLock};

use schemars::JsonSchema;
use serde::{Serialize, Serializer};

use super::{
    DomainName,
    json::{self, Object},
    timestamp,
};
use crate::{
    inventory,
    metric::{Kind, METRICS, Metric},
    model::Elapsed,
    sample::{DiskDetail, DomainSample, InterfaceDetail, Number, ReadClass, Values, VcpuDetail},
    source::{
        ebpf::ExitReason,
        libvirt::{Job, stats::DirtyRate},
    },
    units::{MonotonicNs, SourceKind, Unit, Window},
};

/// What the sources said of one domain at one tick.
#[derive(Debug, JsonSchema)]
pub struct Sample<'a> {
    /// Number of this sample among the domain's, from 0.
    pub seq: u64,
    /// Wall clock, RFC 3339 with nanoseconds.
    pub ts: &'a str,
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
    #[schemars(schema_with = "super::schema::windows")]
    pub windows: &'a DomainSample,
    /// The domain's CPU time.
    #[schemars(schema_with = "super::schema::cpu")]
    pub cpu: &'a Values,
    /// One element per vCPU.
    #[schemars(schema_with = "super::schema::vcpus")]
    pub vcpus: Entities<'a, inventory::Vcpu, VcpuDetail>,
    /// One element per network interface.
    #[schemars(schema_with = "super::schema::interfaces")]
    pub interfaces: Entities<'a, inventory::Interface, InterfaceDetail>,
    /// One element per disk.
    #[schemars(schema_with = "super::schema::disks")]
    pub disks: Entities<'a, inventory::Disk, DiskDetail>,
    /// The guest's memory.
    #[schemars(schema_with = "super::schema::memory")]
    pub memory: Memory<'a>,
    /// How fast the guest writes to its memory, by the last measurement that somebody asked libvirt for; with some of
    /// libvirt's slow reads, and only if there was one.
    #[schemars(skip_serializing_if = "Option::is_none")]
    pub dirty_rate: Option<&'a DirtyRate>,
    /// A job that libvirt runs on the domain (migration, save, backup, …), with each of libvirt's reads while it runs.
    #[schemars(skip_serializing_if = "Option::is_none")]
    pub job: Option<&'a Job>,
}

/// Identity and values of the entities of one scope, side by side.
#[derive(Clone, Copy, Debug)]
pub struct Entities<'a, T, D> {
    /// Who they are.
    pub who: &'a [T],
    /// Their values.
    pub values: &'a [Values],
    /// What is known of them beside numbers.
    pub details: &'a [D],
}

/// The guest's memory.
#[derive(Clone, Copy, Debug)]
pub struct Memory<'a> {
    values: &'a Values,
    now_s: u64,
    stats_period_s: Option<u32>,
}

impl<'a> Sample<'a> {
    /// The line of one domain at one tick.
    #[must_use]
    pub fn new(tick: &'a Tick, of: Subject<'a>) -> Self {
        let Subject { seq, epoch, domain, sample } = of;
        Self {
            seq,
            ts: &tick.ts,
            mono_ns: tick.mono.0,
            interval_ns: tick.interval_ns,
            domain: DomainName { uuid: domain.uuid, name: &domain.name },
            epoch,
            windows: sample,
            cpu: &sample.cpu,
            vcpus: Entities { who: &domain.vcpus, values: &sample.vcpus, details: &sample.vcpu_details },
            interfaces: Entities {
                who: &domain.interfaces,
                values: &sample.interfaces,
                details: &sample.interface_details,
            },
            disks: Entities { who: &domain.disks, values: &sample.disks, details: &sample.disk_details },
            memory: Memory {
                values: &sample.memory,
                now_s: tick.wall_s,
                stats_period_s: domain.balloon.as_ref().map(|b| b.stats_period_s),
            },
            dirty_rate: sample.dirty_rate.as_ref(),
            job: sample.job.as_ref(),
        }
    }

    /// Appends the line, without its end.
    pub(super) fn write(&self, line: &mut Vec<u8>) {
        let reads = Fresh::new(self.windows);
        let mut to = Object::open(line);
        to.word("type", "sample");
        to.number("seq", self.seq);
        to.word("ts", self.ts);
        to.number("mono_ns", self.mono_ns);
        to.number("interval_ns", self.interval_ns);
        to.object("domain", |to| {
            to.word("uuid", &self.domain.uuid.to_string());
            to.value("name", self.domain.name);
        });
        to.number("epoch", self.epoch.into());
        to.object("windows", |to| write_windows(to, self.windows));
        to.object("cpu", |to| write_cpu(to, self.cpu, &reads));
        to.objects("vcpus", self.vcpus.each(), |to, (vcpu, values, detail)| {
            to.number("vcpu", vcpu.index.0.into());
            if let Some(tid) = vcpu.tid {
                to.number("tid", tid.0.into());
            }
            write_values(to, values, &reads);
            write_vcpu_detail(to, detail);
        });
        to.objects("interfaces", self.interfaces.each(), |to, (interface, values, detail)| {
            write_interface_identity(to, interface);
            write_values(to, values, &reads);
            write_interface_detail(to, detail);
        });
        to.objects("disks", self.disks.each(), |to, (disk, values, detail)| {
            to.value("target", &disk.target);
            write_values(to, values, &reads);
            write_disk_detail(to, detail);
        });
        to.object("memory", |to| {
            write_values(to, self.memory.values, &reads);
            write_use_of_memory(to, self.memory, self.windows);
        });
        to.some("dirty_rate", self.dirty_rate);
        to.some("job", self.job);
        to.close();
    }
}

impl<'a, T, D> Entities<'a, T, D> {
    fn each(&self) -> impl Iterator<Item = (&'a T, &'a Values, &'a D)> {
        self.who
            .iter()
            .zip(self.values)
            .zip(self.details)
            .map(|((who, values), detail)| (who, values, detail))
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

/// The moment lines are about.
#[derive(Clone, Debug)]
pub struct Tick {
    /// Wall clock, RFC 3339.
    ts: String,
    /// The same, seconds.
    wall_s: u64,
    mono: MonotonicNs,
    /// Since the tick before, nanoseconds.
    interval_ns: u64,
}

impl Tick {
    /// A moment on the wall clock and on the one of arithmetic, so many nanoseconds after the tick before.
    #[must_use]
    pub fn new(wall: jiff::Timestamp, mono: MonotonicNs, interval_ns: u64) -> Self {
        let wall_s = u64::try_from(wall.as_second()).unwrap_or(0);
        Self { ts: timestamp(wall), wall_s, mono, interval_ns }
    }
}

/// What was read since the last line.
struct Fresh<'a> {
    sample: &'a DomainSample,
    /// Between the last two reads of each class.
    elapsed: [Option<Elapsed>; ReadClass::COUNT],
}

impl<'a> Fresh<'a> {
    fn new(sample: &'a DomainSample) -> Self {
        let elapsed = ReadClass::ALL.map(|class| {
            let reads = sample.reads(class);
            Elapsed::between(reads.before?, reads.now?).ok()
        });
        Self { sample, elapsed }
    }

    /// Per second; `None` of a gauge, and where two reads give no rate.
    fn rate(&self, number: Number) -> Option<f64> {
        let def = number.def();
        if def.kind == Kind::Gauge {
            return None;
        }
        let elapsed = self.elapsed[ReadClass::of(def.metric, number.source) as usize]?;
        let before = number.before?;
        // Most counters stand still from one tick to the next.
        if before == number.now { Some(0.0) } else { Some(elapsed.rate(before, number.now).ok()?.mid) }
    }
}

fn write_windows(to: &mut Object<'_>, sample: &DomainSample) {
    let mut write = |name, window: Window| {
        let to = to.key(name);
        to.push(b'[');
        json::number(to, window.begin.0);
        to.push(b',');
        json::number(to, window.end.0);
        to.push(b']');
    };
    for source in SourceKind::ALL {
        if let Some(window) = fresh_window(sample, source) {
            write(source.name(), window);
        }
    }
    let net = sample.reads(ReadClass::ProcfsNet);
    if let Some(window) = net.now.filter(|_| net.fresh) {
        write("procfs_net", window);
    }
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

/// Begins of metrics by their row and the source that is named first: `"NAME":{"SOURCE":`.
static BEGINS: LazyLock<Vec<[String; SourceKind::COUNT]>> = LazyLock::new(|| {
    let begin = |name: &str, source: SourceKind| format!("\"{name}\":{{\"{}\":", source.name());
    METRICS.iter().map(|def| SourceKind::ALL.map(|source| begin(def.name, source))).collect()
});
/// What follows the first number of a metric: another one's source.
static MORE: [&str; SourceKind::COUNT] = [",\"ebpf\":", ",\"procfs\":", ",\"libvirt\":"];
/// What follows the last one of a metric that has no rate, one that stands still, and one that does not.
static ENDS: [[&str; SourceKind::COUNT]; 3] = [
    [",\"best\":\"ebpf\"}", ",\"best\":\"procfs\"}", ",\"best\":\"libvirt\"}"],
    [
        ",\"best\":\"ebpf\",\"per_s\":0.0}",
        ",\"best\":\"procfs\",\"per_s\":0.0}",
        ",\"best\":\"libvirt\",\"per_s\":0.0}",
    ],
    [",\"best\":\"ebpf\",\"per_s\":", ",\"best\":\"procfs\",\"per_s\":", ",\"best\":\"libvirt\",\"per_s\":"],
];

/// Every metric of an entity that a source was read for since the last line. Most of a line is this, so what is always
/// the same is appended as a whole.
fn write_values(to: &mut Object<'_>, values: &Values, reads: &Fresh<'_>) {
    let begins = &*BEGINS;
    let mut numbers = values.fresh(reads.sample).peekable();
    while let Some(best) = numbers.next() {
        let mut by_source = [None; SourceKind::COUNT];
        by_source[best.source as usize] = Some(best.now);
        while let Some(other) = numbers.next_if(|other| other.row() == best.row()) {
            by_source[other.source as usize] = Some(other.now);
        }
        let mut known =
            by_source.into_iter().enumerate().filter_map(|(source, number)| Some((source, number?)));
        let Some((source, number)) = known.next() else { continue };
        let line = to.raw(begins[best.row()][source].as_bytes());
        json::number(line, number);
        for (source, number) in known {
            line.extend_from_slice(MORE[source].as_bytes());
            json::number(line, number);
        }
        let end = |kind: usize| ENDS[kind][best.source as usize].as_bytes();
        match reads.rate(best) {
            None => line.extend_from_slice(end(0)),
            Some(0.0) => line.extend_from_slice(end(1)),
            Some(rate) => {
                line.extend_from_slice(end(2));
                let of_time = best.def().unit == Unit::Nanoseconds;
                json::real(line, if of_time { rate / 1e9 } else { rate });
                line.push(b'}');
            }
        }
    }
}

fn write_cpu(to: &mut Object<'_>, values: &Values, reads: &Fresh<'_>) {
    write_values(to, values, reads);
    // CPU time per wall time of the process, in per cent of one CPU.
    let time = values.fresh(reads.sample).find(|number| number.def().metric == Metric::CpuTime);
    if let Some((best, rate)) = time.and_then(|time| Some((time.source, reads.rate(time)?))) {
        to.object("util_pct", |to| {
            to.word("best", best.name());
            json::real(to.key("value"), rate / 1e7);
        });
    }
    if !reads.sample.perf.is_empty() {
        to.value("perf", &Named(&reads.sample.perf));
    }
}

/// What follows from the balloon's figures: memory in use by the best definition there is, and their age.
fn write_use_of_memory(to: &mut Object<'_>, memory: Memory<'_>, sample: &DomainSample) {
    if !sample.reads(ReadClass::LibvirtSlow).fresh {
        return;
    }
    let value = |metric| memory.values.now(SourceKind::Libvirt, metric);
    let less = |free| value(Metric::MemoryAvailable)?.checked_sub(value(free)?);
    let (usable, unused) = (less(Metric::MemoryUsable), less(Metric::MemoryUnused));
    let used = usable
        .map(|used| (used, "available_minus_usable"))
        .or(unused.map(|used| (used, "available_minus_unused")));
    if let Some((used, by)) = used {
        to.number("used_bytes", used);
        to.word("used_by", by);
    }
    for (name, used) in [("available_minus_usable_bytes", usable), ("available_minus_unused_bytes", unused)] {
        if let Some(used) = used {
            to.number(name, used);
        }
    }
    let updated = sample.balloon_updated_s.filter(|at| *at > 0);
    if let Some(age) = updated.map(|at| memory.now_s.saturating_sub(at)) {
        to.number("age_s", age);
        let period = u64::from(memory.stats_period_s.unwrap_or(0));
        to.value("stale", &(period == 0 || age > 3 * period));
    }
}

fn write_vcpu_detail(to: &mut Object<'_>, detail: &VcpuDetail) {
    to.some("wait_hist_ns", detail.wait_hist.as_ref());
    to.some("run_hist_ns", detail.run_hist.as_ref());
    to.some("preempted_by", detail.preempted_by.as_ref());
    let exits = detail.exits.as_ref().map(|exits| [&exits.guest, &exits.userspace]);
    for (name, reasons) in
        ["exit_reasons", "userspace_exit_reasons"].into_iter().zip(exits.into_iter().flatten())
    {
        if !reasons.is_empty() {
            to.value(name, &Reasons(reasons));
        }
    }
    if let Some(state) = detail.state {
        to.word("state", state);
    }
    if let Some(state) = detail.libvirt_state {
        to.word("libvirt_state", state);
    }
    if !detail.kvm_stats.is_empty() {
        to.value("kvm_stats", &Named(&detail.kvm_stats));
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
fn write_interface_identity(to: &mut Object<'_>, interface: &inventory::Interface) {
    if !interface.device.is_empty() {
        to.value("device", &interface.device);
    }
    to.some("alias", interface.alias.as_ref());
    to.some("mac", interface.mac.as_ref());
}

fn write_interface_detail(to: &mut Object<'_>, detail: &InterfaceDetail) {
    let reasons = [
        ("rx_drop_reasons", &detail.rx_drop_reasons),
        ("tx_drop_reasons", &detail.tx_drop_reasons),
        ("rx_host_drop_reasons", &detail.rx_host_drop_reasons),
        ("tx_host_drop_reasons", &detail.tx_host_drop_reasons),
    ];
    for (name, reasons) in reasons.into_iter().filter(|(_, reasons)| !reasons.is_empty()) {
        let reasons: BTreeMap<&str, u64> = reasons.iter().map(|(name, n)| (name.as_str(), *n)).collect();
        to.value(name, &reasons);
    }
    to.some("rx_burst_hist_bytes", detail.rx_burst_hist.as_ref());
    to.some("tx_burst_hist_bytes", detail.tx_burst_hist.as_ref());
    if !detail.queues.is_empty() {
        to.value("queues", &detail.queues);
    }
}

fn write_disk_detail(to: &mut Object<'_>, detail: &DiskDetail) {
    let histograms = [
        ("rd_latency_ns", "rd_latency_hist_ns", &detail.rd_hist),
        ("wr_latency_ns", "wr_latency_hist_ns", &detail.wr_hist),
        ("fl_latency_ns", "fl_latency_hist_ns", &detail.fl_hist),
        ("device_rd_latency_ns", "device_rd_latency_hist_ns", &detail.device_rd_hist),
        ("device_wr_latency_ns", "device_wr_latency_hist_ns", &detail.device_wr_hist),
    ];
    for (summary, name, histogram) in histograms {
        let Some(histogram) = histogram else { continue };
        to.some(summary, latency(histogram).as_ref());
        to.value(name, histogram);
    }
    if let Some(reason) = detail.device_reason {
        to.value("device_reason", reason);
    }
    to.some("layers", detail.layers.as_ref());
    if !detail.backing.is_empty() {
        to.value("backing", &detail.backing);
    }
    if !detail.errors.is_empty() {
        let named: BTreeMap<_, _> = detail.errors.iter().map(|(errno, n)| (errno_name(*errno), n)).collect();
        to.value("errors", &named);
    }
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_name_the_sources() {
        for source in SourceKind::ALL {
            let (at, name) = (source as usize, source.name());
            assert_eq!(MORE[at], format!(",\"{name}\":"));
            let best = format!(",\"best\":\"{name}\"");
            let ends = [format!("{best}}}"), format!("{best},\"per_s\":0.0}}"), format!("{best},\"per_s\":")];
            assert_eq!(ENDS.map(|end| end[at].to_owned()), ends);
        }
    }

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
