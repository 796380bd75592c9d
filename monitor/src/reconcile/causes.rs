//! The causes of differences that are known and modelled: each a name, a rule that says where it applies, a rule
//! that says by how much it may make two sources differ at one reading, and a sentence for the report.
//!
//! A rule may be generous, never wrong: what it allows is taken off the difference before that is judged.

use crate::{
    metric::{MetricDef, Scope},
    reconcile::NO_LIMIT,
    units::{SourceKind, Unit},
};

/// How far a source may be off the reference at one reading, as other − reference.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Allowance {
    /// At least.
    pub low: i128,
    /// At most.
    pub high: i128,
}

impl Allowance {
    /// Not at all.
    pub const NOTHING: Self = Self { low: 0, high: 0 };
    /// By anything.
    pub const ANYTHING: Self = Self { low: -NO_LIMIT, high: NO_LIMIT };

    /// Both causes at once.
    #[must_use]
    pub fn and(self, more: Self) -> Self {
        let sum = |a: i128, b: i128| (a + b).clamp(-NO_LIMIT, NO_LIMIT);
        Self { low: sum(self.low, more.low), high: sum(self.high, more.high) }
    }

    const fn less(by: i128) -> Self {
        Self { low: -by, high: 0 }
    }

    const fn more(by: i128) -> Self {
        Self { low: 0, high: by }
    }
}

/// A modelled cause.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Cause {
    /// The source counts in clock ticks.
    Tick,
    /// The kernel's figure of a running thread is of the last scheduler tick.
    OpenRun,
    /// The kernel's figure of a waiting thread lacks the wait in progress.
    OpenWait,
    /// The run in progress includes what interrupts took since the last tick.
    IrqTime,
    /// The source leaves out, or adds, the Ethernet header or VLAN tag of each packet.
    EthHeader,
    /// One counts what is handed over at once, the other packets on the wire.
    Gso,
    /// Packets that wait for a guest that does not take them.
    Backlog,
    /// Received and sent are swapped.
    Direction,
    /// QEMU reads the image when it opens it, before the guest asks.
    QemuOpen,
    /// The image format adds and saves requests.
    Qcow2Metadata,
    /// QEMU drops flushes when nothing was written since the last.
    FlushElided,
    /// QEMU flushes by itself when it stops the guest.
    QemuFlush,
    /// The host's page cache took it.
    CacheAbsorbed,
    /// The request waited inside QEMU before the host's kernel saw it.
    Throttle,
    /// The guest's report is old.
    StaleBalloon,
    /// QEMU's other threads are included.
    EmulatorIncluded,
    /// The source has the figure, but nobody keeps it: it is 0.
    NotKept,
}

impl Cause {
    /// Every cause, in the order in which they are taken off.
    pub const ALL: [Self; 17] = [
        Self::Tick,
        Self::OpenRun,
        Self::OpenWait,
        Self::IrqTime,
        Self::EthHeader,
        Self::Gso,
        Self::Backlog,
        Self::Direction,
        Self::QemuOpen,
        Self::Qcow2Metadata,
        Self::FlushElided,
        Self::QemuFlush,
        Self::CacheAbsorbed,
        Self::Throttle,
        Self::StaleBalloon,
        Self::EmulatorIncluded,
        Self::NotKept,
    ];

    /// The name in reports.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Tick => "tick",
            Self::OpenRun => "open_run",
            Self::OpenWait => "open_wait",
            Self::IrqTime => "irq_time",
            Self::EthHeader => "eth_header",
            Self::Gso => "gso",
            Self::Backlog => "backlog",
            Self::Direction => "direction",
            Self::QemuOpen => "qemu_open",
            Self::Qcow2Metadata => "qcow2_metadata",
            Self::FlushElided => "flush_elided",
            Self::QemuFlush => "qemu_flush",
            Self::CacheAbsorbed => "cache_absorbed",
            Self::Throttle => "throttle",
            Self::StaleBalloon => "stale_balloon",
            Self::EmulatorIncluded => "emulator_included",
            Self::NotKept => "not_kept",
        }
    }

    /// What it means, for whoever reads the report.
    #[must_use]
    pub const fn explanation(self) -> &'static str {
        match self {
            Self::Tick => {
                "counts in clock ticks of 10 ms: a reading can be short of the truth by one or two of them"
            }
            Self::OpenRun => {
                "the kernel brings the figure of a running thread up to date at scheduler ticks only: a reading lacks what ran since"
            }
            Self::OpenWait => {
                "the kernel adds a wait when it has ended: a reading lacks the wait in progress"
            }
            Self::IrqTime => {
                "the run in progress still includes what interrupts, or a hypervisor below this host, took since the last scheduler tick"
            }
            Self::EthHeader => {
                "one counts the Ethernet header (14 bytes) or VLAN tag (4) of every packet, the other does not"
            }
            Self::Gso => {
                "segmentation offload: packets are handed over up to 64 KiB at a time, and cut to the size of the wire later"
            }
            Self::Backlog => {
                "packets were delivered to the tap that the guest has not taken: they wait in its queue, as while it is suspended"
            }
            Self::Direction => {
                "received and sent are the host's view in one source and the guest's in the other"
            }
            Self::QemuOpen => {
                "QEMU read the image's header and probed its size when it opened it: host I/O that no guest asked for"
            }
            Self::Qcow2Metadata => {
                "the image is not raw: metadata is added, unallocated blocks are not read, zeroes become holes: guest I/O and host I/O are two quantities"
            }
            Self::FlushElided => {
                "QEMU drops a flush when nothing was written since the last one: the host sees fewer than the guest sent"
            }
            Self::QemuFlush => {
                "QEMU flushes its images by itself when it stops the guest (suspend, migration, end): host I/O that no guest asked for"
            }
            Self::CacheAbsorbed => {
                "the host's page cache is in between: reads it has are not read from the device, writes reach it later or merged"
            }
            Self::Throttle => {
                "libvirt's time begins when the guest's request reaches QEMU, and includes waiting there (I/O limits, queues) before the host's kernel sees it"
            }
            Self::StaleBalloon => {
                "memory figures are the guest's own report by the balloon driver, as old as that report"
            }
            Self::EmulatorIncluded => {
                "CPU time of the whole VM includes QEMU's other threads: emulator, I/O threads, workers and vhost"
            }
            Self::NotKept => {
                "it is constantly 0: the source looks for the figure where this kernel does not keep it, so that 0 means not known"
            }
        }
    }
}

/// Which counter of which two sources is compared, and what is known of the entity.
#[derive(Clone, Copy, Debug)]
pub struct Subject<'a> {
    /// The metric of the other source.
    pub def: &'static MetricDef,
    /// Where the reference takes its number from.
    pub reference: SourceKind,
    /// Where the other does.
    pub other: SourceKind,
    /// Format of the disk's image, if it is a disk.
    pub image_format: Option<&'a str>,
    /// QEMU's cache mode of the disk.
    pub image_cache: Option<&'a str>,
    /// Length of one clock tick of `/proc`, nanoseconds.
    pub clock_tick_ns: u64,
    /// CPUs of the host.
    pub cpus: u64,
}

/// What is known at one reading, beside the two numbers.
#[derive(Clone, Copy, Debug, Default)]
pub struct Moment<'a> {
    /// What the vCPU did when the reference was read; empty if not known.
    pub state: &'a str,
    /// By how much the metric has grown, by the reference, since the last reading at which the vCPU was not doing
    /// what it is doing now: a run or wait in progress is not longer.
    pub in_progress: u64,
    /// By how much `irq_ns` grew since the reading before.
    pub irq: u64,
    /// Packets in the tap's queue, the most of this reading and the one before; `None` if not known.
    pub backlog_packets: Option<u64>,
    /// The most packets in the tap's queue in the last seconds: what matters if a source is late, or swaps directions.
    pub lately_backlog_packets: u64,
    /// How often QEMU has stopped the guest so far.
    pub stops: u64,
    /// What the other source says.
    pub value: u64,
}

/// The longest time between two scheduler ticks of a busy CPU, nanoseconds (`CONFIG_HZ` = 100).
pub const SCHEDULER_TICK_NS: u64 = 10_000_000;
/// Largest packet in a tap's queue, bytes: 64 KiB and its headers (`NETDEV_GSO` limits).
const PACKET_BYTES: i128 = 65_536 + 18;
/// What QEMU may read to open an image and probe it: 13 requests were seen, with a margin.
const OPEN_REQUESTS: i128 = 32;
const OPEN_BYTES: i128 = 1 << 20;
/// How long a flush may take, nanoseconds.
const FLUSH_NS: i128 = 10_000_000_000;
/// Reads of `/proc` in clock ticks are the sum of two truncated figures, user and system time.
const TRUNCATED: i128 = 2;

impl Cause {
    /// Whether this cause can make the two differ at all.
    #[must_use]
    pub fn applies(self, to: &Subject<'_>) -> bool {
        let (def, other, reference) = (to.def, to.other, to.reference);
        let kernel = other != SourceKind::Ebpf;
        let host_and_guest = reference == SourceKind::Ebpf && other == SourceKind::Libvirt;
        match self {
            Self::Tick => in_clock_ticks(def, other) || in_clock_ticks(def, reference),
            Self::OpenRun => is_cpu_time(def) && kernel,
            Self::OpenWait => def.scope == Scope::Vcpu && def.name == "wait_ns" && kernel,
            Self::IrqTime => {
                reference == SourceKind::Ebpf && def.scope == Scope::Vcpu && def.name == "run_ns"
            }
            Self::Backlog => {
                reference == SourceKind::Ebpf
                    && def.scope == Scope::Interface
                    && matches!(def.name, "rx_packets" | "rx_bytes")
            }
            // With direct I/O, reads by which QEMU opens the image are told apart (`qemu_open_req`).
            Self::QemuOpen => {
                let direct = matches!(to.image_cache, Some("none" | "directsync"));
                let read = host_and_guest && matches!(def.name, "rd_req" | "rd_bytes");
                read && !direct && !Self::Qcow2Metadata.applies(to)
            }
            Self::QemuFlush => host_and_guest && matches!(def.name, "fl_req" | "fl_time_ns"),
            Self::FlushElided => host_and_guest && matches!(def.name, "fl_req" | "fl_time_ns"),
            Self::Qcow2Metadata => {
                host_and_guest && def.scope == Scope::Disk && to.image_format.is_some_and(|f| f != "raw")
            }
            Self::Throttle => {
                host_and_guest && matches!(def.name, "rd_time_ns" | "wr_time_ns" | "fl_time_ns")
            }
            // These relate different metrics, or are tried as a whole; see `compare`.
            Self::EthHeader
            | Self::Gso
            | Self::Direction
            | Self::CacheAbsorbed
            | Self::StaleBalloon
            | Self::EmulatorIncluded
            | Self::NotKept => false,
        }
    }

    /// By how much it can, at one reading.
    #[must_use]
    pub fn allows(self, to: &Subject<'_>, at: &Moment<'_>) -> Allowance {
        let grain = i128::from(to.clock_tick_ns) * if is_sum(to.def) { TRUNCATED } else { 1 };
        match self {
            Self::Tick => {
                let short = if in_clock_ticks(to.def, to.other) { grain } else { 0 };
                let long = if in_clock_ticks(to.def, to.reference) { grain } else { 0 };
                Allowance { low: -short, high: long }
            }
            Self::OpenRun if to.def.scope == Scope::Vcpu && !at.state.is_empty() => {
                let running = if at.state == "running" { at.in_progress.min(SCHEDULER_TICK_NS) } else { 0 };
                Allowance::less(running.into())
            }
            // Nobody knows how many of the threads run.
            Self::OpenRun => {
                let running = if to.def.scope == Scope::Vcpu { 1 } else { to.cpus.max(1) };
                Allowance::less(i128::from(SCHEDULER_TICK_NS) * i128::from(running))
            }
            Self::OpenWait => Allowance::less(at.in_progress.into()),
            Self::IrqTime => Allowance::less(at.irq.into()),
            Self::Backlog => behind_by(at.backlog_packets.unwrap_or(0), to.def.unit),
            Self::QemuOpen => {
                Allowance::less(if to.def.unit == Unit::Bytes { OPEN_BYTES } else { OPEN_REQUESTS })
            }
            Self::QemuFlush => {
                // The stop under way is told later.
                let flushes = i128::from(at.stops) + 1;
                Allowance::less(if to.def.unit == Unit::Nanoseconds { flushes * FLUSH_NS } else { flushes })
            }
            Self::FlushElided | Self::Throttle | Self::EmulatorIncluded => Allowance::more(NO_LIMIT),
            Self::Qcow2Metadata | Self::CacheAbsorbed | Self::Gso => Allowance::ANYTHING,
            Self::NotKept if at.value == 0 => Allowance::ANYTHING,
            Self::NotKept | Self::EthHeader | Self::Direction | Self::StaleBalloon => Allowance::NOTHING,
        }
    }
}

/// By how much a tap's queue makes the reference get ahead of other sources, if so many packets wait in it.
#[must_use]
pub fn behind_by(packets: u64, unit: Unit) -> Allowance {
    Allowance::less(i128::from(packets) * if unit == Unit::Bytes { PACKET_BYTES } else { 1 })
}

/// Whether a source takes the metric from a file in clock ticks. libvirt takes its CPU times from
/// `/proc/PID/stat` where no cgroup accounts them (`virProcessGetStatInfo`).
fn in_clock_ticks(def: &MetricDef, source: SourceKind) -> bool {
    match (def.scope, def.name) {
        (Scope::Cpu, "time_ns" | "user_ns" | "system_ns") => source != SourceKind::Ebpf,
        (Scope::Vcpu, "run_ns") => source == SourceKind::Libvirt,
        _ => false,
    }
}

fn is_sum(def: &MetricDef) -> bool {
    matches!(def.name, "time_ns" | "run_ns")
}

/// Whether the metric is CPU time by the kernel's task clock.
fn is_cpu_time(def: &MetricDef) -> bool {
    match def.scope {
        Scope::Vcpu => def.name == "run_ns",
        Scope::Cpu => matches!(def.name, "time_ns" | "user_ns" | "system_ns") || def.name.ends_with("run_ns"),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use SourceKind::{Ebpf, Libvirt, Procfs};

    fn subject(scope: Scope, name: &str, (reference, other): (SourceKind, SourceKind)) -> Subject<'static> {
        let def = scope.metrics().iter().find(|d| d.name == name).unwrap();
        let (image_format, image_cache) = (None, None);
        Subject { def, reference, other, image_format, image_cache, clock_tick_ns: 10_000_000, cpus: 2 }
    }

    fn rules(of: &Subject<'_>) -> Vec<&'static str> {
        Cause::ALL.into_iter().filter(|c| c.applies(of)).map(Cause::name).collect()
    }

    #[test]
    fn names_are_unique_and_in_order() {
        for (i, cause) in Cause::ALL.into_iter().enumerate() {
            assert_eq!(cause as usize, i);
            assert!(cause.explanation().len() > 40 && !cause.explanation().ends_with('.'));
        }
    }

    #[test]
    fn causes_apply_where_they_can() {
        let check = |scope, name, sources, expected: &[&str]| {
            assert_eq!(rules(&subject(scope, name, sources)), expected, "{name} {sources:?}");
        };
        check(Scope::Vcpu, "run_ns", (Ebpf, Procfs), &["open_run", "irq_time"]);
        check(Scope::Vcpu, "run_ns", (Ebpf, Libvirt), &["tick", "open_run", "irq_time"]);
        check(Scope::Vcpu, "wait_ns", (Ebpf, Procfs), &["open_wait"]);
        check(Scope::Cpu, "time_ns", (Procfs, Libvirt), &["tick", "open_run"]);
        check(Scope::Interface, "rx_bytes", (Ebpf, Libvirt), &["backlog"]);
        check(Scope::Interface, "tx_bytes", (Ebpf, Libvirt), &[]);
        check(Scope::Disk, "rd_req", (Ebpf, Libvirt), &["qemu_open"]);
        check(Scope::Disk, "wr_bytes", (Ebpf, Libvirt), &[]);
        check(Scope::Disk, "fl_req", (Ebpf, Libvirt), &["flush_elided", "qemu_flush"]);
        check(Scope::Disk, "wr_time_ns", (Ebpf, Libvirt), &["throttle"]);
        check(Scope::Memory, "rss_bytes", (Procfs, Libvirt), &[]);
    }

    #[test]
    fn with_direct_io_the_reads_that_open_an_image_are_known() {
        for (cache, expected) in [("none", &[][..]), ("directsync", &[]), ("writeback", &["qemu_open"])] {
            let of = Subject { image_cache: Some(cache), ..subject(Scope::Disk, "rd_req", (Ebpf, Libvirt)) };
            assert_eq!(rules(&of), expected, "{cache}");
        }
    }

    #[test]
    fn a_stop_of_the_guest_flushes_once() {
        let of = subject(Scope::Disk, "fl_req", (Ebpf, Libvirt));
        let allows = |stops| Cause::QemuFlush.allows(&of, &Moment { stops, ..Moment::default() });
        assert_eq!((allows(0), allows(2)), (Allowance::less(1), Allowance::less(3)));
    }

    #[test]
    fn an_image_that_is_not_raw_makes_two_quantities() {
        let of = |format| Subject {
            image_format: Some(format),
            ..subject(Scope::Disk, "wr_req", (Ebpf, Libvirt))
        };
        assert!(rules(&of("raw")).is_empty());
        assert_eq!(rules(&of("qcow2")), ["qcow2_metadata"]);
    }

    #[test]
    fn tick_is_one_grain_or_two_of_the_side_that_has_it() {
        let allows = |name, sources| {
            let scope = if name == "run_ns" { Scope::Vcpu } else { Scope::Cpu };
            let a = Cause::Tick.allows(&subject(scope, name, sources), &Moment::default());
            (a.low, a.high)
        };
        assert_eq!(allows("run_ns", (Ebpf, Libvirt)), (-20_000_000, 0));
        assert_eq!(allows("time_ns", (Procfs, Libvirt)), (-20_000_000, 20_000_000));
        assert_eq!(allows("user_ns", (Procfs, Libvirt)), (-10_000_000, 10_000_000));
    }

    #[test]
    fn what_is_in_progress_bounds_what_a_reading_lacks() {
        let run = subject(Scope::Vcpu, "run_ns", (Ebpf, Procfs));
        let at = |state, in_progress| Moment { state, in_progress, irq: 7, ..Moment::default() };
        assert_eq!(Cause::OpenRun.allows(&run, &at("running", 3_000)), Allowance::less(3_000));
        assert_eq!(Cause::OpenRun.allows(&run, &at("running", 50_000_000)), Allowance::less(10_000_000));
        assert_eq!(Cause::OpenRun.allows(&run, &at("sleeping", 3_000)), Allowance::NOTHING);
        assert_eq!(Cause::IrqTime.allows(&run, &at("running", 0)), Allowance::less(7));
        let wait = subject(Scope::Vcpu, "wait_ns", (Ebpf, Procfs));
        assert_eq!(Cause::OpenWait.allows(&wait, &at("waiting", 80_000_000)), Allowance::less(80_000_000));
    }

    #[test]
    fn a_backlog_is_as_large_as_the_queue() {
        let allows = |name, backlog_packets| {
            let to = subject(Scope::Interface, name, (Ebpf, Libvirt));
            Cause::Backlog.allows(&to, &Moment { backlog_packets, ..Moment::default() }).low
        };
        assert_eq!(allows("rx_packets", Some(999)), -999);
        assert_eq!(allows("rx_packets", None), 0);
        assert_eq!(allows("rx_bytes", Some(2)), -2 * PACKET_BYTES);
    }

    #[test]
    fn one_sided_causes_do_not_explain_the_other_side() {
        let of = subject(Scope::Disk, "fl_req", (Ebpf, Libvirt));
        let a = Cause::FlushElided.allows(&of, &Moment::default());
        assert_eq!((a.low, a.high), (0, NO_LIMIT));
        let of = subject(Scope::Disk, "rd_req", (Ebpf, Libvirt));
        let a = Cause::QemuOpen.allows(&of, &Moment::default());
        assert_eq!((a.low, a.high), (-32, 0));
    }

    #[test]
    fn only_a_figure_that_stays_0_is_not_kept() {
        let of = subject(Scope::Vcpu, "libvirt_wait_ns", (Ebpf, Libvirt));
        let allows = |value| Cause::NotKept.allows(&of, &Moment { value, ..Moment::default() });
        assert_eq!((allows(0), allows(1)), (Allowance::ANYTHING, Allowance::NOTHING));
    }

    #[test]
    fn allowances_add_up_and_stay_without_limit() {
        let sum = Allowance::less(5).and(Allowance::more(3));
        assert_eq!(sum, Allowance { low: -5, high: 3 });
        assert_eq!(Allowance::ANYTHING.and(sum), Allowance::ANYTHING);
    }
}
