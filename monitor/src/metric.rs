//! Every metric, once: its name, unit, kind, sources in order of trust, and what it means.
//!
//! Records, schema, README table and reconciliation are loops over [`METRICS`]. Knows nothing of how a source
//! works.

use crate::units::{SourceKind, Unit};
use Kind::{Counter, Gauge};
use Scope::{Cpu, Disk, Interface, Memory, Vcpu};
use SourceKind::{Ebpf, Libvirt, Procfs};
use Unit::{Bytes, Count, Nanoseconds};

/// What a metric belongs to; also its place in a `sample` record.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Scope {
    /// The domain's CPU time: `cpu`.
    Cpu,
    /// One vCPU: an element of `vcpus`.
    Vcpu,
    /// One network interface: an element of `interfaces`.
    Interface,
    /// One disk: an element of `disks`.
    Disk,
    /// The domain's memory: `memory`.
    Memory,
}

impl Scope {
    /// Every scope.
    pub const ALL: [Self; 5] = [Cpu, Vcpu, Interface, Disk, Memory];

    /// The key of the scope in a `sample` record.
    #[must_use]
    pub const fn key(self) -> &'static str {
        match self {
            Cpu => "cpu",
            Vcpu => "vcpus",
            Interface => "interfaces",
            Disk => "disks",
            Memory => "memory",
        }
    }

    /// The rows of [`METRICS`] that belong to this scope; they stand together.
    #[must_use]
    pub const fn metrics(self) -> &'static [MetricDef] {
        ROWS[self as usize]
    }
}

/// The rows of each scope, in the order of [`Scope::ALL`].
static ROWS: [&[MetricDef]; Scope::ALL.len()] =
    [rows(Cpu), rows(Vcpu), rows(Interface), rows(Disk), rows(Memory)];

const fn rows(scope: Scope) -> &'static [MetricDef] {
    let (mut first, mut count, mut i) = (0, 0, METRICS.len());
    while i > 0 {
        i -= 1;
        if METRICS[i].scope as u8 == scope as u8 {
            first = i;
            count += 1;
        }
    }
    METRICS.split_at(first).1.split_at(count).0
}

/// Whether a number only grows or goes up and down.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Cumulative; differences and rates make sense.
    Counter,
    /// A current value.
    Gauge,
}

/// How often a source is asked while eBPF works.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cadence {
    /// libvirt at each read: it answers without asking QEMU. `/proc` at each tick, beside eBPF ten times a second at most.
    Fast,
    /// libvirt at each slow read (asking costs the guest: QEMU's main loop answers). `/proc` likewise.
    Slow,
    /// libvirt as above, and `/proc` no more often: reading it costs more than it tells beside eBPF.
    Rare,
}

/// One row of the table.
#[derive(Clone, Copy, Debug)]
pub struct MetricDef {
    /// Which metric.
    pub metric: Metric,
    /// What it belongs to.
    pub scope: Scope,
    /// Key in records; the unit is its suffix where it has one.
    pub name: &'static str,
    /// What the number counts.
    pub unit: Unit,
    /// Counter or gauge.
    pub kind: Kind,
    /// Sources that can have it, the most trusted first.
    pub sources: &'static [SourceKind],
    /// How often libvirt and `/proc` are asked for it beside eBPF.
    pub cadence: Cadence,
    /// Meaning, and where each source takes it from.
    pub help: &'static str,
}

/// How many metrics there are.
pub const METRIC_COUNT: usize = METRICS.len();

macro_rules! metrics {
    ($($metric:ident: $scope:ident, $name:literal, $unit:ident, $kind:ident, $sources:expr, $cadence:ident, $help:literal;)*) => {
        /// Every metric, in the order of [`METRICS`].
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        pub enum Metric {
            $(#[doc = $help] $metric,)*
        }

        /// The table.
        pub static METRICS: &[MetricDef] = &[
            $(MetricDef {
                metric: Metric::$metric,
                scope: $scope,
                name: $name,
                unit: $unit,
                kind: $kind,
                sources: &$sources,
                cadence: Cadence::$cadence,
                help: $help,
            },)*
        ];
    };
}

metrics! {
    CpuTime: Cpu, "time_ns", Nanoseconds, Counter, [Ebpf, Procfs, Libvirt], Slow,
        "CPU time of all threads of the QEMU process since it started, ended ones included. ebpf: to the nanosecond, runs in progress included, and of vhost threads outside the process (before Linux 6.4). procfs: utime + stime of /proc/PID/stat (10 ms grain). libvirt: cpu.time.";
    CpuUser: Cpu, "user_ns", Nanoseconds, Counter, [Procfs, Libvirt], Slow,
        "Part of time_ns spent in user mode (guest mode included by the kernel's accounting). libvirt: cpu.user.";
    CpuSystem: Cpu, "system_ns", Nanoseconds, Counter, [Procfs, Libvirt], Slow,
        "Part of time_ns spent in the kernel. libvirt: cpu.system.";
    CpuVcpuRun: Cpu, "vcpu_run_ns", Nanoseconds, Counter, [Ebpf, Procfs], Slow,
        "Sum of run_ns over the vCPU threads, those that ended while the monitor watched included.";
    CpuEmulatorRun: Cpu, "emulator_run_ns", Nanoseconds, Counter, [Ebpf, Procfs], Rare,
        "CPU time of QEMU's main loop and of every thread that is neither vCPU, iothread, worker nor vhost. ebpf: threads that ended since the domain is followed included. procfs: schedstat, threads that ended as of the last look.";
    CpuIothreadRun: Cpu, "iothread_run_ns", Nanoseconds, Counter, [Ebpf, Procfs], Rare,
        "CPU time of the domain's iothreads.";
    CpuWorkerRun: Cpu, "worker_run_ns", Nanoseconds, Counter, [Ebpf, Procfs], Rare,
        "CPU time of threads that carry out requests for others: QEMU's thread pool and io_uring's workers.";
    CpuVhostRun: Cpu, "vhost_run_ns", Nanoseconds, Counter, [Ebpf, Procfs], Rare,
        "CPU time of the domain's vhost threads: threads of the QEMU process since Linux 6.4, kernel threads before.";
    CpuCostop: Cpu, "costop_ns", Nanoseconds, Counter, [Ebpf], Slow,
        "Time in which at least one vCPU waited for a CPU while another vCPU of the domain ran. Of a wait that follows a wakeup, the time since the last vCPU of the domain came or went counts.";
    CpuHaltPollSuccess: Cpu, "halt_poll_success_ns", Nanoseconds, Counter, [Libvirt], Slow,
        "Time KVM polled for the end of halts that ended meanwhile, all vCPUs. libvirt: cpu.haltpoll.success.time. KVM guests only, and libvirt 7.8.";
    CpuHaltPollFail: Cpu, "halt_poll_fail_ns", Nanoseconds, Counter, [Libvirt], Slow,
        "Time it polled for the end of halts that did not. libvirt: cpu.haltpoll.fail.time. KVM guests only.";
    CpuVcpusOnline: Cpu, "vcpus_online", Count, Gauge, [Libvirt, Procfs], Slow,
        "vCPUs online. procfs: vCPU threads. libvirt: vcpu.current.";
    VcpuRun: Vcpu, "run_ns", Nanoseconds, Counter, [Ebpf, Procfs, Libvirt], Slow,
        "Time the vCPU thread was on a CPU. ebpf: to the nanosecond, the run in progress included. procfs: schedstat, as of the last scheduler tick. libvirt: vcpu.N.time, 10 ms grain.";
    VcpuWait: Vcpu, "wait_ns", Nanoseconds, Counter, [Ebpf, Procfs, Libvirt], Slow,
        "Time the vCPU thread was runnable but not running. ebpf: the wait in progress included. procfs: schedstat run_delay, finished waits only. libvirt: vcpu.N.delay.";
    VcpuLibvirtWait: Vcpu, "libvirt_wait_ns", Nanoseconds, Counter, [Libvirt], Slow,
        "What libvirt calls the waiting time of the vCPU: vcpu.N.wait. Meant to be wait_ns, but constantly 0 where libvirt does not find the figure in the kernel's file, as with libvirt 9.0 on kernels from 5.15.";
    VcpuThrottled: Vcpu, "throttled_ns", Nanoseconds, Counter, [Ebpf], Slow,
        "Part of wait_ns in which a CFS quota that was used up kept the vCPU thread from running. Before Linux 6.6 the wait for a CPU that follows is included.";
    VcpuIrq: Vcpu, "irq_ns", Nanoseconds, Counter, [Ebpf], Slow,
        "Time the vCPU thread was on a CPU, but interrupts or a hypervisor below this host took it: what the kernel's task clock leaves out of run_ns.";
    VcpuSleep: Vcpu, "sleep_ns", Nanoseconds, Counter, [Ebpf], Slow,
        "Time the vCPU thread had nothing to do. run_ns + irq_ns + wait_ns + sleep_ns is the wall time.";
    VcpuPreemptions: Vcpu, "preemptions", Count, Counter, [Ebpf, Procfs], Rare,
        "Times the vCPU thread lost its CPU while it could have run on. ebpf: since the domain is followed. procfs: nonvoluntary_ctxt_switches of /proc/PID/task/TID/status.";
    VcpuYields: Vcpu, "yields", Count, Counter, [Ebpf, Procfs], Rare,
        "Times the vCPU thread gave up its CPU because it had nothing to do. procfs: voluntary_ctxt_switches.";
    VcpuWakeups: Vcpu, "wakeups", Count, Counter, [Ebpf], Slow,
        "Times the vCPU thread got a CPU after it had nothing to do.";
    VcpuMigrations: Vcpu, "migrations", Count, Counter, [Ebpf], Slow,
        "Times the vCPU thread got another CPU than before.";
    VcpuNodeMigrations: Vcpu, "node_migrations", Count, Counter, [Ebpf], Slow,
        "Those of the migrations that led to another NUMA node.";
    VcpuGuest: Vcpu, "guest_ns", Nanoseconds, Counter, [Ebpf], Slow,
        "Part of run_ns in guest mode, from kvm_entry to kvm_exit, the stay in progress included. guest_ns + host_ns + halt_poll_ns is run_ns. Absent for emulated (TCG) guests, as are all that follow.";
    VcpuHost: Vcpu, "host_ns", Nanoseconds, Counter, [Ebpf], Slow,
        "Part of run_ns outside guest mode, in KVM and in QEMU; with polling where halt_poll_ns is absent.";
    VcpuHaltPoll: Vcpu, "halt_poll_ns", Nanoseconds, Counter, [Ebpf, Libvirt], Slow,
        "Part of run_ns in which KVM polled for the end of a halt, by KVM's own statistics. libvirt: vcpu.N.halt_poll_success_ns.sum + vcpu.N.halt_poll_fail_ns.sum (libvirt 8.10).";
    VcpuExits: Vcpu, "exits", Count, Counter, [Ebpf, Libvirt], Slow,
        "Exits from guest mode. ebpf: kvm_exit. libvirt: vcpu.N.exits.sum (libvirt 8.10).";
    VcpuUserspaceExits: Vcpu, "userspace_exits", Count, Counter, [Ebpf], Slow,
        "Returns of KVM_RUN to QEMU (kvm_userspace_exit).";
    VcpuKicks: Vcpu, "kicks", Count, Counter, [Ebpf], Slow,
        "Part of userspace_exits that a signal of QEMU or its immediate_exit caused (EINTR).";
    VcpuHalts: Vcpu, "halts", Count, Counter, [Ebpf], Slow,
        "Halts in the kernel that ended (kvm_vcpu_wakeup).";
    VcpuHaltsPolled: Vcpu, "halts_polled", Count, Counter, [Ebpf], Slow,
        "Part of halts that ended while KVM polled: the vCPU thread did not sleep.";
    InterfaceRxBytes: Interface, "rx_bytes", Bytes, Counter, [Ebpf, Procfs, Libvirt], Fast,
        "Bytes received by the guest, Ethernet header and VLAN tag included. ebpf: given to the host's device since the monitor watches it. procfs: /proc/net/dev, for a tap what the guest's side has read of it. libvirt: net.N.rx.bytes.";
    InterfaceRxPackets: Interface, "rx_packets", Count, Counter, [Ebpf, Procfs, Libvirt], Fast,
        "Packets received by the guest; one that is to be segmented (GSO) is one. Sources as for rx_bytes. libvirt: net.N.rx.pkts.";
    InterfaceRxErrs: Interface, "rx_errs", Count, Counter, [Procfs, Libvirt], Fast,
        "Receive errors. procfs: /proc/net/dev. libvirt: net.N.rx.errs.";
    InterfaceRxDrop: Interface, "rx_drop", Count, Counter, [Ebpf, Procfs, Libvirt], Fast,
        "Packets for the guest that its device on the host did not take. ebpf: since the monitor watches it. procfs: /proc/net/dev. libvirt: net.N.rx.drop.";
    InterfaceTxBytes: Interface, "tx_bytes", Bytes, Counter, [Ebpf, Procfs, Libvirt], Fast,
        "Bytes sent by the guest, Ethernet header and VLAN tag included. ebpf: taken from the host's device since the monitor watches it. procfs: /proc/net/dev. libvirt: net.N.tx.bytes.";
    InterfaceTxPackets: Interface, "tx_packets", Count, Counter, [Ebpf, Procfs, Libvirt], Fast,
        "Packets sent by the guest; one that is to be segmented (GSO) is one. Sources as for tx_bytes. libvirt: net.N.tx.pkts.";
    InterfaceTxErrs: Interface, "tx_errs", Count, Counter, [Procfs, Libvirt], Fast,
        "Send errors. procfs: /proc/net/dev. libvirt: net.N.tx.errs.";
    InterfaceTxDrop: Interface, "tx_drop", Count, Counter, [Ebpf, Procfs, Libvirt], Fast,
        "Packets from the guest that were dropped; for a tap procfs (/proc/net/dev) and libvirt (net.N.tx.drop) count also those for which the host had no use. ebpf: macvtap only.";
    InterfaceRxWirePackets: Interface, "rx_wire_packets", Count, Counter, [Ebpf], Fast,
        "Packets received by the guest, as many as they are on a wire: after segmentation.";
    InterfaceTxWirePackets: Interface, "tx_wire_packets", Count, Counter, [Ebpf], Fast,
        "Packets sent by the guest, as many as they are on a wire: after segmentation.";
    InterfaceRxBacklog: Interface, "rx_backlog_packets", Count, Gauge, [Ebpf], Fast,
        "Packets that are in the ring of the guest's tap and that neither QEMU nor vhost has read yet: at least so many, exactly so many while nothing arrives.";
    InterfaceRxBurstBytes: Interface, "rx_burst_bytes_per_ms", Bytes, Gauge, [Ebpf], Fast,
        "Most bytes received by the guest in any millisecond since the last sample, 0 if none; one counts up to 60 ms late.";
    InterfaceRxBurstPackets: Interface, "rx_burst_packets_per_ms", Count, Gauge, [Ebpf], Fast,
        "Most packets received by the guest in any millisecond, likewise.";
    InterfaceTxBurstBytes: Interface, "tx_burst_bytes_per_ms", Bytes, Gauge, [Ebpf], Fast,
        "Most bytes sent by the guest in any millisecond, likewise.";
    InterfaceTxBurstPackets: Interface, "tx_burst_packets_per_ms", Count, Gauge, [Ebpf], Fast,
        "Most packets sent by the guest in any millisecond, likewise.";
    DiskRdReq: Disk, "rd_req", Count, Counter, [Ebpf, Libvirt], Slow,
        "Read requests. libvirt: the guest's, block.N.rd.reqs. ebpf: QEMU's on the disk's images, since attach.";
    DiskRdBytes: Disk, "rd_bytes", Bytes, Counter, [Ebpf, Libvirt], Slow,
        "Bytes read. libvirt: by the guest, block.N.rd.bytes. ebpf: by QEMU from the disk's images.";
    DiskRdTime: Disk, "rd_time_ns", Nanoseconds, Counter, [Ebpf, Libvirt], Slow,
        "Time reads took, summed over requests. libvirt: the guest's, block.N.rd.times, throttling included. ebpf: QEMU's, on the host.";
    DiskWrReq: Disk, "wr_req", Count, Counter, [Ebpf, Libvirt], Slow,
        "Write requests. libvirt: the guest's, block.N.wr.reqs. ebpf: QEMU's on the disk's images, since attach.";
    DiskWrBytes: Disk, "wr_bytes", Bytes, Counter, [Ebpf, Libvirt], Slow,
        "Bytes written. libvirt: by the guest, block.N.wr.bytes. ebpf: by QEMU to the disk's images.";
    DiskWrTime: Disk, "wr_time_ns", Nanoseconds, Counter, [Ebpf, Libvirt], Slow,
        "Time writes took, summed over requests. libvirt: the guest's, block.N.wr.times, throttling included. ebpf: QEMU's, on the host.";
    DiskFlReq: Disk, "fl_req", Count, Counter, [Ebpf, Libvirt], Slow,
        "Flush requests. libvirt: the guest's, block.N.fl.reqs. ebpf: QEMU's; it leaves out those with nothing to flush.";
    DiskFlTime: Disk, "fl_time_ns", Nanoseconds, Counter, [Ebpf, Libvirt], Slow,
        "Time flushes took, summed over requests. libvirt: the guest's, block.N.fl.times. ebpf: QEMU's, on the host.";
    DiskErrs: Disk, "errs", Count, Counter, [Ebpf, Libvirt], Slow,
        "Failed requests. libvirt: block.N.errors, where the hypervisor counts them (QEMU does not). ebpf: of QEMU on the host; errors has them by error number.";
    DiskInflight: Disk, "inflight", Count, Gauge, [Ebpf], Slow,
        "Requests of QEMU on the disk's images that are not answered yet.";
    DiskDiscardReq: Disk, "discard_req", Count, Counter, [Ebpf], Slow,
        "Ranges that QEMU gave back to the host: holes punched, device discards.";
    DiskDiscardBytes: Disk, "discard_bytes", Bytes, Counter, [Ebpf], Slow,
        "Bytes that QEMU gave back to the host.";
    DiskZeroReq: Disk, "zero_req", Count, Counter, [Ebpf], Slow,
        "Ranges that QEMU had the host zero without writing them.";
    DiskZeroBytes: Disk, "zero_bytes", Bytes, Counter, [Ebpf], Slow,
        "Bytes that QEMU had the host zero without writing them.";
    DiskOpenReq: Disk, "qemu_open_req", Count, Counter, [Ebpf], Slow,
        "Reads by which QEMU probed an image with direct I/O when it opened it; in no other figure.";
    DiskOpenBytes: Disk, "qemu_open_bytes", Bytes, Counter, [Ebpf], Slow,
        "Bytes asked for by those reads.";
    DiskJobWrReq: Disk, "job_wr_req", Count, Counter, [Ebpf], Slow,
        "Part of wr_req that went to images below the one on top (commit) or to what that one is copied to: block jobs write to them, a guest does not. Absent while the disk has one image, unless there were such writes before, and where they are not seen. What a job reads, and writes to the image on top (pull), is not told apart.";
    DiskJobWrBytes: Disk, "job_wr_bytes", Bytes, Counter, [Ebpf], Slow,
        "Bytes of those writes, part of wr_bytes.";
    DiskDeviceRdReq: Disk, "device_rd_req", Count, Counter, [Ebpf], Slow,
        "Reads that the host's block device below the disk's images was asked for on their behalf, read-ahead included. Absent where they cannot be attributed; device_reason says why.";
    DiskDeviceRdBytes: Disk, "device_rd_bytes", Bytes, Counter, [Ebpf], Slow,
        "Bytes of those reads.";
    DiskDeviceRdTime: Disk, "device_rd_time_ns", Nanoseconds, Counter, [Ebpf], Slow,
        "Time those reads took in the block layer and the device, summed.";
    DiskDeviceWrReq: Disk, "device_wr_req", Count, Counter, [Ebpf], Slow,
        "Writes that device was asked for on their behalf, by QEMU or by the kernel's writeback of what QEMU left in the page cache. Without the file system's journal and metadata, which are nobody's.";
    DiskDeviceWrBytes: Disk, "device_wr_bytes", Bytes, Counter, [Ebpf], Slow,
        "Bytes of those writes. Over the guest's wr_bytes: the write amplification.";
    DiskDeviceWrTime: Disk, "device_wr_time_ns", Nanoseconds, Counter, [Ebpf], Slow,
        "Time those writes took in the block layer and the device, summed.";
    DiskCapacity: Disk, "capacity_bytes", Bytes, Gauge, [Libvirt], Slow,
        "Size of the disk as the guest sees it. libvirt: block.N.capacity.";
    DiskAllocation: Disk, "allocation_bytes", Bytes, Gauge, [Libvirt], Slow,
        "Highest byte in use of the image. libvirt: block.N.allocation.";
    DiskPhysical: Disk, "physical_bytes", Bytes, Gauge, [Libvirt], Slow,
        "Size of the image file or device on the host. libvirt: block.N.physical.";
    MemoryActual: Memory, "actual_bytes", Bytes, Gauge, [Libvirt], Slow,
        "Memory the balloon leaves to the guest. libvirt: balloon.current.";
    MemoryAvailable: Memory, "available_bytes", Bytes, Gauge, [Libvirt], Slow,
        "Total memory as the guest's kernel sees it (MemTotal). libvirt: balloon.available.";
    MemoryUnused: Memory, "unused_bytes", Bytes, Gauge, [Libvirt], Slow,
        "Memory the guest left completely unused (MemFree). libvirt: balloon.unused.";
    MemoryUsable: Memory, "usable_bytes", Bytes, Gauge, [Libvirt], Slow,
        "Memory the guest could use without swapping (MemAvailable). libvirt: balloon.usable.";
    MemorySwapIn: Memory, "swap_in_bytes", Bytes, Counter, [Libvirt], Slow,
        "Bytes the guest swapped in. libvirt: balloon.swap_in.";
    MemorySwapOut: Memory, "swap_out_bytes", Bytes, Counter, [Libvirt], Slow,
        "Bytes the guest swapped out. libvirt: balloon.swap_out.";
    MemoryMajorFaults: Memory, "major_faults", Count, Counter, [Libvirt], Slow,
        "Page faults of the guest that read from disk. libvirt: balloon.major_fault.";
    MemoryMinorFaults: Memory, "minor_faults", Count, Counter, [Libvirt], Slow,
        "Page faults of the guest that did not. libvirt: balloon.minor_fault.";
    MemoryDiskCaches: Memory, "disk_caches_bytes", Bytes, Gauge, [Libvirt], Slow,
        "Memory of the guest that caches files and could be taken back. libvirt: balloon.disk_caches.";
    MemoryHugetlbPgalloc: Memory, "hugetlb_pgalloc", Count, Counter, [Libvirt], Slow,
        "Huge pages the guest allocated. libvirt: balloon.hugetlb_pgalloc.";
    MemoryHugetlbPgfail: Memory, "hugetlb_pgfail", Count, Counter, [Libvirt], Slow,
        "Huge pages the guest failed to allocate. libvirt: balloon.hugetlb_pgfail.";
    MemoryRss: Memory, "rss_bytes", Bytes, Gauge, [Procfs, Libvirt], Slow,
        "Resident memory of the QEMU process on the host. procfs: rss of /proc/PID/stat. libvirt: balloon.rss.";
    MemoryPss: Memory, "pss_bytes", Bytes, Gauge, [Procfs], Rare,
        "Resident memory, what is shared with other processes counted by their number (KSM and shared libraries). procfs: /proc/PID/smaps_rollup, every five minutes at most and less often where reading it takes long.";
    MemorySwap: Memory, "swap_bytes", Bytes, Gauge, [Procfs], Rare,
        "Memory of the QEMU process that the host has swapped out. procfs: VmSwap of /proc/PID/status.";
    MemoryHugetlb: Memory, "hugetlb_bytes", Bytes, Gauge, [Procfs], Rare,
        "Memory of the QEMU process in the host's huge page pool, which rss_bytes does not contain. procfs: HugetlbPages of /proc/PID/status.";
}

impl Metric {
    /// The row of this metric.
    #[must_use]
    pub const fn def(self) -> &'static MetricDef {
        &METRICS[self as usize]
    }

    /// Position among the metrics of its scope.
    #[must_use]
    pub const fn index_in_scope(self) -> usize {
        self as usize - self.def().scope.metrics()[0].metric as usize
    }
}

impl Unit {
    /// Name in the schema and the metric table.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Nanoseconds => "ns",
            Bytes => "bytes",
            Count => "count",
        }
    }
}

/// The metric table as Markdown, for the README. [`crate::equivalents`] has the table with the names others use.
#[must_use]
pub fn markdown() -> String {
    use std::fmt::Write as _;
    let mut text = String::from(
        "| in | metric | unit | kind | sources, best first | meaning |\n|---|---|---|---|---|---|\n",
    );
    for def in METRICS {
        let sources: Vec<&str> = def.sources.iter().map(|s| s.name()).collect();
        let kind = if def.kind == Counter { "counter" } else { "gauge" };
        let _ = writeln!(
            text,
            "| `{}` | `{}` | {} | {kind} | {} | {} |",
            def.scope.key(),
            def.name,
            def.unit.name(),
            sources.join(", "),
            def.help
        );
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_stand_in_enum_order_and_scopes_together() {
        for (i, def) in METRICS.iter().enumerate() {
            assert_eq!(def.metric as usize, i, "{}", def.name);
        }
        let total: usize = Scope::ALL.iter().map(|s| s.metrics().len()).sum();
        assert_eq!(total, METRICS.len(), "a scope's rows are not next to each other");
        for scope in Scope::ALL {
            for (i, def) in scope.metrics().iter().enumerate() {
                assert_eq!((def.scope, def.metric.index_in_scope()), (scope, i), "{}", def.name);
            }
        }
    }

    #[test]
    fn names_are_unique_in_a_scope_and_carry_their_unit() {
        for scope in Scope::ALL {
            let mut seen = std::collections::HashSet::new();
            for def in scope.metrics() {
                assert!(seen.insert(def.name), "{} twice", def.name);
                assert_eq!(def.name.ends_with("_ns"), def.unit == Nanoseconds, "{}", def.name);
                let bytes = def.name.ends_with("_bytes") || def.name.ends_with("_bytes_per_ms");
                assert_eq!(bytes, def.unit == Bytes, "{}", def.name);
                assert!(!def.sources.is_empty() && def.help.ends_with('.'), "{}", def.name);
            }
        }
    }
}
