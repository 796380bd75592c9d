//! What the sources said of one domain: a dense table per entity, this read and the one before.
//!
//! Sources fill it with [`DomainSample::begin`] and `put`; `model` and `record` read it. Nothing here hashes or
//! allocates once the entities are known.

use crate::{
    metric::{Cadence, Kind, METRIC_COUNT, METRICS, Metric, MetricDef, Scope},
    source::{
        ebpf::ExitReasons,
        libvirt::{Job, stats::DirtyRate},
    },
    units::{Quantity, SourceKind, Window},
};

/// What is read at one moment. `/proc` and libvirt count as two each, since what is dear is asked for less often.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReadClass {
    /// The kernel programs.
    Ebpf,
    /// `/proc` and `/sys`.
    Procfs,
    /// What is dear to read there.
    ProcfsSlow,
    /// Counters of network devices under `/proc`, of all domains at once.
    ProcfsNet,
    /// libvirt's cheap groups.
    LibvirtFast,
    /// libvirt's groups that ask QEMU.
    LibvirtSlow,
}

impl ReadClass {
    /// How many there are.
    pub const COUNT: usize = 6;
    /// Every one.
    pub const ALL: [Self; Self::COUNT] =
        [Self::Ebpf, Self::Procfs, Self::ProcfsSlow, Self::ProcfsNet, Self::LibvirtFast, Self::LibvirtSlow];

    /// Which read brings a metric from a source.
    #[must_use]
    pub const fn of(metric: Metric, source: SourceKind) -> Self {
        match (source, metric.def().cadence) {
            (SourceKind::Procfs, _) if matches!(metric.def().scope, Scope::Interface) => Self::ProcfsNet,
            (SourceKind::Ebpf, _) => Self::Ebpf,
            (SourceKind::Procfs, Cadence::Fast | Cadence::Slow) => Self::Procfs,
            (SourceKind::Procfs, Cadence::Rare) => Self::ProcfsSlow,
            (SourceKind::Libvirt, Cadence::Fast) => Self::LibvirtFast,
            (SourceKind::Libvirt, Cadence::Slow | Cadence::Rare) => Self::LibvirtSlow,
        }
    }
}

/// Values of one entity, for each metric of its scope and each source that can have it: now and at the read before.
///
/// Nothing is kept for a source that cannot have a metric: there may be thousands of entities, and between two ticks of
/// a second their values have left every cache.
#[derive(Clone, Debug)]
pub struct Values {
    scope: Scope,
    /// A bit for each of `numbers` that is known.
    now: u64,
    before: u64,
    /// What was put last, however long ago, and what had been when the current read began; 0 before the first.
    numbers: Box<[[u64; 2]]>,
    /// A bit for each of `numbers` whose two may differ: most counters stand still from one read to the next.
    moved: u64,
}

/// In [`PLACES`]: the source cannot have the metric.
const NOWHERE: u8 = u8::MAX;
const SCOPES: usize = Scope::ALL.len();

/// Where the number of each metric and source is among those of the metric's scope.
static PLACES: [[u8; SourceKind::COUNT]; METRIC_COUNT] = layout().0;
/// How many numbers an entity of each scope has.
static COUNTS: [u8; SCOPES] = layout().1;
/// Which of them each read brings.
static BROUGHT: [[u64; ReadClass::COUNT]; SCOPES] = layout().2;
/// Row of the metric, and the source, of each of them.
static MEANS: [[(u8, SourceKind); 64]; SCOPES] = layout().3;

type Layout = (
    [[u8; SourceKind::COUNT]; METRIC_COUNT],
    [u8; SCOPES],
    [[u64; ReadClass::COUNT]; SCOPES],
    [[(u8, SourceKind); 64]; SCOPES],
);

const fn layout() -> Layout {
    let mut places = [[NOWHERE; SourceKind::COUNT]; METRIC_COUNT];
    let mut counts = [0; SCOPES];
    let mut brought = [[0; ReadClass::COUNT]; SCOPES];
    let mut means = [[(u8::MAX, SourceKind::Ebpf); 64]; SCOPES];
    assert!(METRIC_COUNT < u8::MAX as usize, "a row fits in a byte");
    let mut m: u8 = 0;
    while (m as usize) < METRIC_COUNT {
        let def = &METRICS[m as usize];
        let (scope, mut s) = (def.scope as usize, 0);
        while s < def.sources.len() {
            let source = def.sources[s];
            assert!(counts[scope] < 64, "a bit for each number");
            places[m as usize][source as usize] = counts[scope];
            means[scope][counts[scope] as usize] = (m, source);
            brought[scope][ReadClass::of(def.metric, source) as usize] |= 1 << counts[scope];
            counts[scope] += 1;
            s += 1;
        }
        m += 1;
    }
    (places, counts, brought, means)
}

/// What one source says of one metric.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Number {
    row: u8,
    /// Who says so.
    pub source: SourceKind,
    /// At the last read.
    pub now: u64,
    /// At the read before.
    pub before: Option<u64>,
}

impl Number {
    /// Row of the metric in [`METRICS`].
    #[must_use]
    pub fn row(&self) -> usize {
        self.row.into()
    }

    /// The metric.
    #[must_use]
    pub fn def(&self) -> &'static MetricDef {
        &METRICS[self.row()]
    }
}

impl Values {
    /// No values yet.
    #[must_use]
    pub fn new(scope: Scope) -> Self {
        let numbers = vec![[0; 2]; COUNTS[scope as usize].into()].into();
        Self { scope, now: 0, before: 0, numbers, moved: 0 }
    }

    /// What these are values of.
    #[must_use]
    pub fn scope(&self) -> Scope {
        self.scope
    }

    /// Sets the value of a metric as a source gives it.
    ///
    /// # Panics
    /// In debug builds, if the metric belongs to another scope, has another unit, or its row does not name the
    /// source.
    pub fn put<Q: Quantity>(&mut self, source: SourceKind, metric: Metric, value: Q) {
        let def = metric.def();
        debug_assert_eq!((def.scope, def.unit), (self.scope, Q::UNIT), "{}", def.name);
        debug_assert!(def.sources.contains(&source), "{} from {}", def.name, source.name());
        let place = PLACES[metric as usize][source as usize];
        if let Some([now, _]) = self.numbers.get_mut(usize::from(place)) {
            self.moved |= u64::from(*now != value.raw()) << place;
            *now = value.raw();
            self.now |= 1 << place;
        }
    }

    /// As [`Values::put`], nothing for `None`.
    pub fn put_some<Q: Quantity>(&mut self, source: SourceKind, metric: Metric, value: Option<Q>) {
        if let Some(value) = value {
            self.put(source, metric, value);
        }
    }

    /// The value at the last read.
    #[must_use]
    pub fn now(&self, source: SourceKind, metric: Metric) -> Option<u64> {
        self.get(self.now, source, metric).map(|[now, _]| *now)
    }

    /// The value at the read before.
    #[must_use]
    pub fn before(&self, source: SourceKind, metric: Metric) -> Option<u64> {
        self.get(self.before, source, metric).map(|[_, before]| *before)
    }

    /// Whether a counter had a higher value when it was last read, however long ago: one reading that was left out must
    /// not let the next take back what was told.
    #[must_use]
    pub fn falls(&self, source: SourceKind, metric: Metric, now: u64) -> bool {
        self.get(u64::MAX, source, metric).is_some_and(|[last, _]| *last > now)
    }

    /// The first counter among these places that the last read brought, and that is less than what was told of it.
    fn fall(&self, places: u64) -> Option<Number> {
        let mut numbers = self.numbers_at(self.now & places).map(|(_, number)| number);
        numbers.find(|number| number.before > Some(number.now) && number.def().kind == Kind::Counter)
    }

    /// What was read before is of other counters.
    fn restart(&mut self) {
        self.before = 0;
        self.numbers.iter_mut().for_each(|[_, before]| *before = 0);
        self.moved = u64::MAX;
    }

    fn get(&self, known: u64, source: SourceKind, metric: Metric) -> Option<&[u64; 2]> {
        let place = PLACES[metric as usize][source as usize];
        if place != NOWHERE && known & 1 << place != 0 { self.numbers.get(usize::from(place)) } else { None }
    }

    /// The numbers that reads of this sample brought since the last line was written, metric by metric, the most trusted
    /// source of each first.
    pub fn fresh(&self, sample: &DomainSample) -> impl Iterator<Item = Number> {
        self.numbers_at(self.now & sample.fresh[self.scope as usize]).map(|(place, number)| {
            let before = number.before.filter(|_| self.before & 1 << place != 0);
            Number { before, ..number }
        })
    }

    /// The numbers at these places, and where they are; `before` is that of the last read that knew it, however long ago.
    fn numbers_at(&self, mut left: u64) -> impl Iterator<Item = (usize, Number)> {
        std::iter::from_fn(move || {
            let place = left.trailing_zeros() as usize;
            let (row, source) = *MEANS[self.scope as usize].get(place)?;
            let [now, before] = *self.numbers.get(place)?;
            left &= left - 1;
            Some((place, Number { row, source, now, before: Some(before) }))
        })
    }

    fn shift(&mut self, class: ReadClass) {
        let brought = BROUGHT[self.scope as usize][class as usize];
        let known = self.now & brought;
        self.before = self.before & !brought | known;
        self.now &= !brought;
        let mut left = known & self.moved;
        self.moved &= !left;
        while left != 0 {
            let [now, before] = &mut self.numbers[left.trailing_zeros() as usize];
            *before = *now;
            left &= left - 1;
        }
    }

    fn clear(&mut self) {
        (self.now, self.before, self.moved) = (0, 0, 0);
        self.numbers.fill([0; 2]);
    }
}

/// A counter that is less than what was told of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fall {
    /// What it belongs to.
    pub scope: Scope,
    /// Which of those, in the domain's order.
    pub index: usize,
    /// The counter.
    pub number: Number,
}

/// The two last windows of one read class.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Reads {
    /// The last read.
    pub now: Option<Window>,
    /// The one before.
    pub before: Option<Window>,
    /// The last read has not been written out yet.
    pub fresh: bool,
}

/// What a sample says of a vCPU beside its metrics; gone once it is written.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct VcpuDetail {
    /// What it did when it was read.
    pub state: Option<&'static str>,
    /// Waits that ended since the last histogram, as `[from, to, count]`, nanoseconds.
    pub wait_hist: Option<Vec<[u64; 3]>>,
    /// Runs that ended since the last histogram, likewise.
    pub run_hist: Option<Vec<[u64; 3]>>,
    /// Who had the CPU during those waits, the most first.
    pub preempted_by: Option<Vec<PreemptedBy>>,
    /// Exits by reason since the thread is followed.
    pub exits: Option<ExitReasons>,
    /// Its state as libvirt sees it.
    pub libvirt_state: Option<&'static str>,
    /// What KVM counts for it by its own account, by the kernel's name, since the vCPU was made.
    pub kvm_stats: Vec<(String, u64)>,
}

/// What a sample says of a network interface beside its metrics; gone once it is written. Directions are the guest's.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct InterfaceDetail {
    /// Packets for the guest that the driver of its device dropped, by the kernel's reason, since it is watched.
    pub rx_drop_reasons: Vec<(String, u64)>,
    /// Packets of the guest that it dropped.
    pub tx_drop_reasons: Vec<(String, u64)>,
    /// Packets for the guest that the host dropped on the way to its device.
    pub rx_host_drop_reasons: Vec<(String, u64)>,
    /// Packets of the guest that the host dropped as they came from its device.
    pub tx_host_drop_reasons: Vec<(String, u64)>,
    /// Windows of 1 ms by bytes received in them since the last histogram, as `[from, to, count]`.
    pub rx_burst_hist: Option<Vec<[u64; 3]>>,
    /// Likewise, by bytes sent.
    pub tx_burst_hist: Option<Vec<[u64; 3]>>,
    /// By queue, if there is more than one.
    pub queues: Vec<QueueDetail>,
}

/// What one queue of an interface carried since its device is watched. Directions are the guest's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, schemars::JsonSchema)]
pub struct QueueDetail {
    /// Packets the guest received through it.
    pub received_packets: u64,
    /// Their bytes.
    pub received_bytes: u64,
    /// Packets the guest sent through it.
    pub sent_packets: u64,
    /// Their bytes.
    pub sent_bytes: u64,
}

/// What a sample says of a disk beside its metrics; gone once it is written.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct DiskDetail {
    /// Times of reads that ended since the last histogram, as `[from, to, count]`, nanoseconds.
    pub rd_hist: Option<Vec<[u64; 3]>>,
    /// Times of writes, likewise.
    pub wr_hist: Option<Vec<[u64; 3]>>,
    /// Times of flushes, likewise.
    pub fl_hist: Option<Vec<[u64; 3]>>,
    /// Times of the device's reads, likewise.
    pub device_rd_hist: Option<Vec<[u64; 3]>>,
    /// Times of the device's writes, likewise.
    pub device_wr_hist: Option<Vec<[u64; 3]>>,
    /// Why the device's share is not known; told as often as histograms are.
    pub device_reason: Option<&'static str>,
    /// Failed requests by error number, 0 for all that are not told apart; none if none failed.
    pub errors: Vec<(u32, u64)>,
    /// The layers against each other, between two reads of what QEMU knows.
    pub layers: Option<Layers>,
    /// Images below the one on top, and the target of a copy that is under way, as libvirt numbers them; told with the layers.
    pub backing: Vec<BackingImage>,
}

/// Another image of a disk than the one on top, by libvirt.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize, schemars::JsonSchema)]
pub struct BackingImage {
    /// `block.N.backingIndex`: its number in the domain's XML (`<backingStore index=…>`).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub index: Option<u64>,
    /// `block.N.path`; absent if it is no file or device of the host.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub path: Option<String>,
    /// `block.N.capacity`: its size as a disk.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub capacity_bytes: Option<u64>,
    /// `block.N.allocation`: highest byte in use.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub allocation_bytes: Option<u64>,
    /// `block.N.physical`: size of the file or device.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub physical_bytes: Option<u64>,
}

/// The guest's requests on a disk against those of QEMU and of the host's device, over the time between two reads of
/// what QEMU knows.
#[derive(Clone, Copy, Debug, Default, PartialEq, serde::Serialize, schemars::JsonSchema)]
pub struct Layers {
    /// That time, nanoseconds. The host's figures are up to one interval older at both ends.
    pub interval_ns: u64,
    /// Bytes written to the device over bytes written by the guest; absent while the guest writes nothing, or where the
    /// device's share is not known.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub write_amplification: Option<f64>,
    /// Time of the guest's reads outside QEMU's I/O on the host, summed over requests, nanoseconds: throttling by QEMU, and
    /// waiting for its threads. Absent where QEMU's I/O took longer, as it does when the guest does not wait for it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rd_qemu_ns: Option<u64>,
    /// Of its writes, likewise.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub wr_qemu_ns: Option<u64>,
    /// Of its flushes, likewise.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub fl_qemu_ns: Option<u64>,
}

/// Who had a CPU that a vCPU waited for.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, schemars::JsonSchema)]
pub struct PreemptedBy {
    /// Name: of the domain, else of the first thread of the process that was charged; text others may have chosen.
    pub who: String,
    /// What it is.
    pub kind: CulpritKind,
    /// Its process id (thread id of a kernel thread), if it is one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pid: Option<u32>,
    /// Time it had the CPU while the vCPU waited, nanoseconds.
    pub ns: u64,
}

/// What had a CPU.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, schemars::JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum CulpritKind {
    /// A thread of a domain: another one's, or this one's own.
    Vm,
    /// A vhost kernel thread.
    Vhost,
    /// A process of the host.
    Process,
    /// A kernel thread.
    Kthread,
    /// Interrupts, or a hypervisor below this host: what the kernel's task clock leaves out of the time that others had
    /// the CPU.
    Irq,
    /// Nobody: the CPU was idle and had to wake up.
    Idle,
    /// Those beyond the ones that are told apart.
    Other,
    /// Not known.
    Unknown,
}

/// All values of one domain.
#[derive(Clone, Debug)]
pub struct DomainSample {
    reads: [Reads; ReadClass::COUNT],
    /// By scope, which numbers the fresh ones of them brought.
    fresh: [u64; SCOPES],
    /// `cpu`.
    pub cpu: Values,
    /// `memory`.
    pub memory: Values,
    /// In the order of the domain's vCPUs.
    pub vcpus: Vec<Values>,
    /// What is known of the vCPUs beside numbers, in the same order.
    pub vcpu_details: Vec<VcpuDetail>,
    /// In the order of the domain's interfaces.
    pub interfaces: Vec<Values>,
    /// What is known of the interfaces beside numbers, in the same order.
    pub interface_details: Vec<InterfaceDetail>,
    /// In the order of the domain's disks.
    pub disks: Vec<Values>,
    /// What is known of the disks beside numbers, in the same order.
    pub disk_details: Vec<DiskDetail>,
    /// Wall-clock second at which the guest last reported its memory (libvirt's `balloon.last-update`).
    pub balloon_updated_s: Option<u64>,
    /// Perf events that are enabled for the domain, by libvirt's name; gone once written.
    pub perf: Vec<(String, u64)>,
    /// The last measurement of how fast the guest writes to its memory; gone once written.
    pub dirty_rate: Option<DirtyRate>,
    /// A job that libvirt runs on it; gone once written.
    pub job: Option<Job>,
}

impl DomainSample {
    /// Nothing read yet, for a domain with so many entities.
    #[must_use]
    pub fn new(vcpus: usize, interfaces: usize, disks: usize) -> Self {
        Self {
            reads: [Reads::default(); ReadClass::COUNT],
            fresh: [0; SCOPES],
            cpu: Values::new(Scope::Cpu),
            memory: Values::new(Scope::Memory),
            vcpus: vec![Values::new(Scope::Vcpu); vcpus],
            vcpu_details: vec![VcpuDetail::default(); vcpus],
            interfaces: vec![Values::new(Scope::Interface); interfaces],
            interface_details: vec![InterfaceDetail::default(); interfaces],
            disks: vec![Values::new(Scope::Disk); disks],
            disk_details: vec![DiskDetail::default(); disks],
            balloon_updated_s: None,
            perf: Vec::new(),
            dirty_rate: None,
            job: None,
        }
    }

    /// Begins a new read: what was now is before, and nothing is now until it is put.
    pub fn begin(&mut self, class: ReadClass) {
        self.each(|values| values.shift(class));
        let reads = &mut self.reads[class as usize];
        reads.before = reads.now.take();
    }

    /// Ends a read with the window it took.
    pub fn end(&mut self, class: ReadClass, window: Window) {
        let reads = &mut self.reads[class as usize];
        reads.now = Some(window);
        reads.fresh = true;
        for (fresh, brought) in self.fresh.iter_mut().zip(&BROUGHT) {
            *fresh |= brought[class as usize];
        }
    }

    /// The windows of a class.
    #[must_use]
    pub fn reads(&self, class: ReadClass) -> Reads {
        self.reads[class as usize]
    }

    /// Everything read so far has been written out.
    pub fn written(&mut self) {
        for reads in &mut self.reads {
            reads.fresh = false;
        }
        self.fresh = [0; SCOPES];
        self.forget_details();
    }

    fn forget_details(&mut self) {
        self.vcpu_details.fill(VcpuDetail::default());
        self.interface_details.fill(InterfaceDetail::default());
        self.disk_details.fill(DiskDetail::default());
        self.perf = Vec::new();
        self.dirty_rate = None;
        self.job = None;
    }

    /// The first counter that fell since the last line. Those of the kernel programs are not looked at: readings that would
    /// take something back are discarded.
    #[must_use]
    pub fn fall(&self) -> Option<Fall> {
        let of = |scope: Scope, values: &[Values]| {
            let places = self.fresh[scope as usize] & !BROUGHT[scope as usize][ReadClass::Ebpf as usize];
            let found =
                values.iter().enumerate().find_map(|(index, values)| Some((index, values.fall(places)?)));
            found.map(|(index, number)| Fall { scope, index, number })
        };
        of(Scope::Cpu, std::slice::from_ref(&self.cpu))
            .or_else(|| of(Scope::Vcpu, &self.vcpus))
            .or_else(|| of(Scope::Interface, &self.interfaces))
            .or_else(|| of(Scope::Disk, &self.disks))
            .or_else(|| of(Scope::Memory, std::slice::from_ref(&self.memory)))
    }

    /// Counters started anew before what was read last (a new epoch): no rate crosses that.
    pub fn restart(&mut self) {
        self.each(Values::restart);
        self.reads.iter_mut().for_each(|reads| reads.before = None);
    }

    /// Forgets all values: counters start anew (a new epoch).
    pub fn clear(&mut self) {
        self.each(Values::clear);
        self.reads = [Reads::default(); ReadClass::COUNT];
        self.fresh = [0; SCOPES];
        self.balloon_updated_s = None;
        self.forget_details();
    }

    fn each(&mut self, mut f: impl FnMut(&mut Values)) {
        f(&mut self.cpu);
        f(&mut self.memory);
        self.vcpus.iter_mut().chain(&mut self.interfaces).chain(&mut self.disks).for_each(f);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::units::{Bytes, MonotonicNs, Nanos};

    #[test]
    fn a_read_moves_now_to_before_for_its_class_only() {
        let mut sample = DomainSample::new(1, 0, 0);
        for (run, class, source) in [
            (10, ReadClass::Ebpf, SourceKind::Ebpf),
            (8, ReadClass::Procfs, SourceKind::Procfs),
            (20, ReadClass::Ebpf, SourceKind::Ebpf),
        ] {
            sample.begin(class);
            sample.vcpus[0].put(source, Metric::VcpuRun, Nanos(run));
            sample.end(class, Window { begin: MonotonicNs(run), end: MonotonicNs(run + 1) });
        }
        let vcpu = &sample.vcpus[0];
        assert_eq!(vcpu.now(SourceKind::Ebpf, Metric::VcpuRun), Some(20));
        assert_eq!(vcpu.before(SourceKind::Ebpf, Metric::VcpuRun), Some(10));
        assert_eq!(vcpu.now(SourceKind::Procfs, Metric::VcpuRun), Some(8));
        assert_eq!(vcpu.before(SourceKind::Procfs, Metric::VcpuRun), None);
    }

    #[test]
    fn a_counter_falls_below_what_was_told_before_a_gap() {
        let mut sample = DomainSample::new(1, 0, 0);
        let (source, metric) = (SourceKind::Ebpf, Metric::VcpuRun);
        for told in [Some(10), None, None] {
            sample.begin(ReadClass::Ebpf);
            sample.vcpus[0].put_some(source, metric, told.map(Nanos));
            let falls = |now| sample.vcpus[0].falls(source, metric, now);
            assert_eq!((falls(9), falls(10)), (true, false), "{told:?}");
        }
        assert!(!sample.vcpus[0].falls(SourceKind::Procfs, metric, 0));
        sample.clear();
        assert!(!sample.vcpus[0].falls(source, metric, 0));
    }

    #[test]
    fn a_fall_is_of_a_counter_that_was_just_read() {
        let mut sample = DomainSample::new(0, 0, 2);
        let read = |sample: &mut DomainSample, (capacity, written): (u64, u64)| {
            sample.begin(ReadClass::LibvirtSlow);
            sample.disks[1].put(SourceKind::Libvirt, Metric::DiskCapacity, Bytes(capacity));
            sample.disks[1].put(SourceKind::Libvirt, Metric::DiskWrBytes, Bytes(written));
            sample.end(ReadClass::LibvirtSlow, Window { begin: MonotonicNs(1), end: MonotonicNs(2) });
        };
        for values in [(5, 7), (4, 7)] {
            read(&mut sample, values);
            assert_eq!(sample.fall(), None, "a gauge may fall");
        }
        read(&mut sample, (4, 6));
        let fall = sample.fall().unwrap();
        assert_eq!((fall.scope, fall.index, fall.number.def().name), (Scope::Disk, 1, "wr_bytes"));
        assert_eq!((fall.number.before, fall.number.now), (Some(7), 6));
        sample.restart();
        assert_eq!(sample.fall(), None);
        assert_eq!(sample.disks[1].now(SourceKind::Libvirt, Metric::DiskWrBytes), Some(6));
        assert_eq!(sample.reads(ReadClass::LibvirtSlow).before, None);
        read(&mut sample, (4, 5));
        sample.written();
        assert_eq!(sample.fall(), None, "it was told");
    }

    #[test]
    fn every_metric_of_every_source_has_a_place_of_its_own() {
        for scope in Scope::ALL {
            let pairs = || scope.metrics().iter().flat_map(|def| def.sources.iter().map(move |s| (def, *s)));
            let mut places: Vec<u8> =
                pairs().map(|(def, source)| PLACES[def.metric as usize][source as usize]).collect();
            places.sort_unstable();
            assert_eq!(places, (0..COUNTS[scope as usize]).collect::<Vec<_>>(), "{scope:?}");
            // Each is brought by one read.
            let all: u64 = BROUGHT[scope as usize].iter().fold(0, |all, one| {
                assert_eq!(all & one, 0, "{scope:?}");
                all | one
            });
            assert_eq!(all.count_ones() as usize, places.len(), "{scope:?}");
            for (def, source) in pairs() {
                let mut values = Values::new(scope);
                let place = PLACES[def.metric as usize][source as usize];
                values.numbers[usize::from(place)] = [7, 8];
                (values.now, values.before) = (1 << place, 0);
                assert_eq!(values.now(source, def.metric), Some(7), "{}", def.name);
                assert_eq!(values.before(source, def.metric), None, "{}", def.name);
            }
        }
    }

    #[test]
    fn what_is_not_put_again_is_absent() {
        let mut sample = DomainSample::new(1, 0, 0);
        sample.begin(ReadClass::Ebpf);
        sample.vcpus[0].put(SourceKind::Ebpf, Metric::VcpuRun, Nanos(1));
        sample.begin(ReadClass::Ebpf);
        assert_eq!(sample.vcpus[0].now(SourceKind::Ebpf, Metric::VcpuRun), None);
    }
}
