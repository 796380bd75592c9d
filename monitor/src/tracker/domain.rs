//! One watched domain: what is known of it, what reads it, and its values.

use std::{collections::BTreeMap, path::Path};

use super::{
    classes::Classes,
    disks::Disks,
    layers::Comparison,
    nics::{Nic, is_same},
};
use crate::{
    inventory::{Disk, Domain, DomainState, QemuProcess, Vcpu},
    ledger::{Ledger, Parts, new_in_histogram},
    metric::{Metric, Scope},
    record::{EventKind, Subject},
    sample::{
        BackingImage, CulpritKind, DiskDetail, DomainSample, Fall, Number, PreemptedBy, ReadClass, Values,
        VcpuDetail,
    },
    source::{
        ebpf::{
            Culprit, Ebpf, GroupSlot, Histograms, ImageSlot, KIND_IDLE, KIND_IRQ, KIND_KERNEL, KIND_PROCESS,
            KvmFigures, NicSlot, ProcessSlot, ProcessTimes, Slot, ThreadTimes, Torn,
        },
        libvirt::{
            Duty,
            stats::{BalloonStats, BlockStats, DomainStats, InterfaceStats, VcpuState, VcpuStats},
        },
        procfs::{self, Drive, OpenFiles, ProcessReader, ProcfsError, ThreadReader},
    },
    split::{Figures, Split},
    units::{Bytes, Count, MonotonicNs, Nanos, SourceKind, VcpuIndex, Window},
};

/// One watched domain.
#[derive(Debug)]
pub struct Tracked {
    /// What is known of it.
    pub domain: Domain,
    /// Grows when counters restart.
    pub epoch: u32,
    /// Its values.
    pub sample: DomainSample,
    /// Samples written.
    pub seq: u64,
    pub(super) files: Option<ProcessReader>,
    /// Follows the process as a whole.
    pub(super) processes: Vec<ProcessSlot>,
    /// The vhost kernel threads that work for it, ended ones included (before Linux 6.4).
    pub(super) vhosts: Vec<Vhost>,
    /// Its vCPU threads as siblings.
    pub(super) group: Option<GroupSlot>,
    pub(super) classes: Classes,
    classes_at: Option<MonotonicNs>,
    pub(super) threads: Vec<Thread>,
    /// Run time of vCPU threads that ended while the process lived, as last read, nanoseconds.
    ended_run: [u64; SourceKind::COUNT],
    /// In the order of `domain.interfaces`.
    pub(super) nics: Vec<Nic>,
    /// What watched interfaces that are gone; to be given back.
    pub(super) unwatched: Vec<NicSlot>,
    /// The files its process has open.
    pub(super) open: Option<OpenFiles>,
    /// How many there were at the last look for taps.
    pub(super) open_files: Option<u64>,
    /// It was the same then as at the look before.
    pub(super) files_settled: bool,
    /// Thread ids at the last look, to see cheaply whether anything came or went.
    pub(super) task_ids: Vec<u32>,
    pub(super) followed_since: Option<MonotonicNs>,
    histograms_at: Option<MonotonicNs>,
    pub(super) disks: Disks,
    /// As its process's command line has them.
    pub(super) drives: Vec<Drive>,
    /// Read meanwhile, for the next slow read of `/proc`.
    pub(super) pss: Option<Bytes>,
    /// Not to be read before.
    pub(super) pss_due: Option<MonotonicNs>,
    layers: Comparison,
}

/// What followed a domain in the kernel.
#[derive(Debug, Default)]
pub(super) struct Slots {
    pub(super) threads: Vec<Slot>,
    pub(super) processes: Vec<ProcessSlot>,
    pub(super) group: Option<GroupSlot>,
    pub(super) nics: Vec<NicSlot>,
    pub(super) images: Vec<ImageSlot>,
}

/// A vhost kernel thread.
#[derive(Debug)]
pub(super) struct Vhost {
    thread: QemuProcess,
    slot: Option<ProcessSlot>,
    /// As of the last reading.
    times: Option<ProcessTimes>,
}

impl Vhost {
    pub(super) const fn new(thread: QemuProcess, slot: Option<ProcessSlot>) -> Self {
        Self { thread, slot, times: None }
    }
}

/// What reads one vCPU thread; in the order of `domain.vcpus`.
#[derive(Debug, Default)]
pub(super) struct Thread {
    pub(super) file: Option<ThreadReader>,
    pub(super) slot: Option<Slot>,
    ledger: Ledger,
    split: Split,
    /// Its run time as last read, nanoseconds.
    run: [u64; SourceKind::COUNT],
    /// As of the last sample that had them.
    histograms: Option<Box<Histograms>>,
    /// Its times as of then: a thread that neither ran nor waited since has nothing new in them.
    told: Option<ThreadTimes>,
}

impl Tracked {
    /// Nothing read yet.
    pub(super) fn new(domain: Domain) -> Self {
        let sample = DomainSample::new(domain.vcpus.len(), domain.interfaces.len(), domain.disks.len());
        let threads = domain.vcpus.iter().map(|_| Thread::default()).collect();
        let nics = domain.interfaces.iter().map(|_| Nic::default()).collect();
        Self {
            domain,
            epoch: 0,
            sample,
            seq: 0,
            files: None,
            processes: Vec::new(),
            vhosts: Vec::new(),
            group: None,
            classes: Classes::default(),
            classes_at: None,
            threads,
            ended_run: [0; SourceKind::COUNT],
            nics,
            unwatched: Vec::new(),
            open: None,
            open_files: None,
            files_settled: false,
            task_ids: Vec::new(),
            followed_since: None,
            histograms_at: None,
            disks: Disks::default(),
            drives: Vec::new(),
            pss: None,
            pss_due: None,
            layers: Comparison::default(),
        }
    }

    /// What its next `sample` line is about.
    #[must_use]
    pub fn subject(&self) -> Subject<'_> {
        Subject { seq: self.seq, epoch: self.epoch, domain: &self.domain, sample: &self.sample }
    }

    /// Its process was found, and no sample of it has been written.
    #[must_use]
    pub fn is_new(&self) -> bool {
        self.seq == 0 && self.domain.process.is_some()
    }

    /// Takes over a new description. Keeps what only `/proc` knows, and the values of what is still there. True if
    /// anything is different.
    pub(super) fn describe(&mut self, mut new: Domain) -> bool {
        new.process = self.domain.process;
        new.monitor = self.domain.monitor;
        if new.state == DomainState::Unknown {
            new.state = self.domain.state;
        }
        if self.domain.vcpus.iter().any(|v| v.tid.is_some()) {
            // libvirt knows pinning, `/proc` knows which threads there are.
            let pinned = |index| new.vcpus.iter().find(|v| v.index == index).and_then(|v| v.affinity.clone());
            let merged = self.domain.vcpus.iter().map(|v| Vcpu { affinity: pinned(v.index), ..v.clone() });
            new.vcpus = merged.collect();
        } else {
            self.sample.vcpus = vec![Values::new(Scope::Vcpu); new.vcpus.len()];
            self.sample.vcpu_details = vec![VcpuDetail::default(); new.vcpus.len()];
            self.threads = new.vcpus.iter().map(|_| Thread::default()).collect();
        }
        self.carry_nics(&mut new.interfaces);
        let (old, sample) = (&self.domain, &mut self.sample);
        let interfaces = (old.interfaces.as_slice(), sample.interfaces.as_slice());
        sample.interfaces = carry(interfaces, &new.interfaces, Scope::Interface, is_same);
        let disks = std::mem::take(&mut new.disks);
        let changed = self.domain.disks != disks;
        self.replace_disks(disks.clone());
        new.disks = disks;
        let changed = changed || self.domain != new;
        self.domain = new;
        changed
    }

    /// Other disks, or the same in another way. Values stay with their targets.
    pub(super) fn replace_disks(&mut self, new: Vec<Disk>) {
        let old = (self.domain.disks.as_slice(), self.sample.disks.as_slice());
        self.sample.disks = carry(old, &new, Scope::Disk, |a, b| a.target == b.target);
        self.sample.disk_details = vec![DiskDetail::default(); new.len()];
        self.disks.described();
        self.domain.disks = new;
    }

    /// Forgets the process and all values: counters will start anew. Returns what followed its threads.
    pub(super) fn release(&mut self) -> Slots {
        let slots = self.take_slots();
        self.classes = Classes::default();
        self.classes_at = None;
        (self.pss, self.pss_due) = (None, None);
        self.domain.process = None;
        self.domain.id = None; // Of the run that is over: libvirt's word on the next one is no further restart.
        (self.files, self.open, self.open_files) = (None, None, None);
        self.files_settled = false;
        self.task_ids.clear();
        self.followed_since = None;
        self.epoch += 1;
        self.layers = Comparison::default();
        self.sample.clear();
        for vcpu in &mut self.domain.vcpus {
            vcpu.tid = None;
        }
        slots
    }

    pub(super) fn take_slots(&mut self) -> Slots {
        Slots {
            threads: self.threads.iter_mut().filter_map(|thread| std::mem::take(thread).slot).collect(),
            processes: {
                let vhosts = std::mem::take(&mut self.vhosts).into_iter().filter_map(|vhost| vhost.slot);
                std::mem::take(&mut self.processes).into_iter().chain(vhosts).collect()
            },
            group: self.group.take(),
            nics: self.take_nic_slots(),
            images: self.disks.take_slots(),
        }
    }

    pub(super) fn since_ns(&self) -> BTreeMap<&'static str, u64> {
        self.followed_since.map(|at| (SourceKind::Ebpf.name(), at.0)).into_iter().collect()
    }

    /// Which counter fell, from where, and what that means.
    pub(super) fn describe_fall(&self, fall: &Fall) -> (EventKind, String) {
        let of = match fall.scope {
            Scope::Cpu | Scope::Memory => fall.scope.key().to_owned(),
            Scope::Vcpu => format!("vCPU {}", self.domain.vcpus[fall.index].index.0),
            Scope::Interface => format!("network device {}", self.domain.interfaces[fall.index].device),
            Scope::Disk => format!("disk {}", self.domain.disks[fall.index].target),
        };
        let Number { source, now, before, .. } = fall.number;
        let (metric, before) = (fall.number.def().name, before.unwrap_or(0));
        let what =
            format!("{of}: {metric} {{{}}} was {before} and is {now}: counters start anew", source.name());
        match fall.scope {
            // The guest's own.
            Scope::Memory => (EventKind::CounterReset, what + " with the guest"),
            _ => (EventKind::CounterBackwards, what),
        }
    }

    pub(super) fn insert_vcpu(&mut self, at: usize, index: VcpuIndex) {
        self.domain.vcpus.insert(at, Vcpu { index, tid: None, affinity: None });
        self.sample.vcpus.insert(at, Values::new(Scope::Vcpu));
        self.sample.vcpu_details.insert(at, VcpuDetail::default());
        self.threads.insert(at, Thread::default());
    }

    /// The thread of a vCPU ended, or is another one now, whose counters start anew. What it used stays in the sums.
    /// Returns what followed it.
    pub(super) fn thread_ended(&mut self, at: usize) -> Option<Slot> {
        let thread = std::mem::take(&mut self.threads[at]);
        for (sum, run) in self.ended_run.iter_mut().zip(thread.run) {
            *sum += run;
        }
        self.sample.vcpus[at] = Values::new(Scope::Vcpu);
        self.sample.vcpu_details[at] = VcpuDetail::default();
        thread.slot
    }

    pub(super) fn remove_vcpu(&mut self, at: usize) {
        self.domain.vcpus.remove(at);
        self.sample.vcpus.remove(at);
        self.sample.vcpu_details.remove(at);
        self.threads.remove(at);
    }

    /// Returns how many readings were discarded because they cannot be.
    pub(super) fn put_ebpf(&mut self, ebpf: &mut Ebpf, window: Window, names: &Names) -> u64 {
        let nics = self.nics.iter().any(|nic| nic.slot.is_some());
        let threads = self.threads.iter().any(|thread| thread.slot.is_some());
        if !nics && !threads && self.processes.is_empty() && self.disks.are_unwatched() {
            return 0;
        }
        self.sample.begin(ReadClass::Ebpf);
        let (mut lost, mut any_read) = (0, false);
        let mut run_sum = Some(self.ended_run[SourceKind::Ebpf as usize]);
        let with_histograms = self.histograms_due(window.begin);
        let on_kvm = self.domain.virt_type.as_deref() == Some("kvm");
        let entities = self.sample.vcpus.iter_mut().zip(&mut self.sample.vcpu_details);
        for (thread, (values, detail)) in self.threads.iter_mut().zip(entities) {
            let times = thread.slot.as_ref().and_then(|slot| ebpf.times(slot));
            let parts = times.map(|times| (times, thread.ledger.add(times)));
            any_read |= times.is_some();
            let mut with_exits = false;
            if let Some((times, Some(parts))) = parts {
                put_vcpu(values, &times, &parts);
                run_sum = run_sum.map(|sum| sum + times.run_ns);
                thread.run[SourceKind::Ebpf as usize] = times.run_ns;
                detail.state = Some(times.doing.name());
                let figures = thread.slot.as_ref().and_then(|slot| ebpf.kvm_figures(slot));
                if let Some(figures) = figures.filter(|figures| on_kvm || figures.any()) {
                    lost += put_kvm(&mut thread.split, values, times.run_ns, &figures);
                    with_exits = with_histograms;
                }
            } else {
                run_sum = None;
                lost += u64::from(times.is_some());
            }
            if with_exits {
                detail.exits = thread.slot.as_ref().and_then(|slot| ebpf.exit_reasons(slot));
            }
            if with_histograms {
                thread.put_distributions(ebpf, names, (times, detail));
            }
        }
        if !self.threads.is_empty() {
            self.sample.cpu.put_some(SourceKind::Ebpf, Metric::CpuVcpuRun, run_sum.map(Nanos));
        }
        lost += self.put_processes(ebpf);
        lost += if any_read { self.put_costop(ebpf) } else { 0 };
        self.put_nics(ebpf, window.end, with_histograms);
        let disks = self.sample.disks.iter_mut().zip(&mut self.sample.disk_details);
        for (disk, (values, detail)) in self.domain.disks.iter().zip(disks) {
            lost += self.disks.put(ebpf, &disk.target, (values, detail));
            if with_histograms {
                self.disks.put_histograms(ebpf, &disk.target, detail);
            }
        }
        self.sample.end(ReadClass::Ebpf, window);
        lost
    }

    /// CPU time of all threads. Returns 1 if it could not be read right.
    fn put_processes(&mut self, ebpf: &Ebpf) -> u64 {
        let mut sum: Option<ProcessTimes> = None;
        for slot in &self.processes {
            match ebpf.process_times(slot) {
                Some(Ok(times)) => sum = Some(sum.map_or(times, |sum| sum.plus(&times))),
                Some(Err(Torn)) => return 1,
                None => return 0,
            }
        }
        let Some(mut times) = sum else { return 0 };
        for vhost in &mut self.vhosts {
            match vhost.slot.as_ref().and_then(|slot| ebpf.process_times(slot)) {
                Some(Ok(now)) => vhost.times = Some(now),
                Some(Err(Torn)) => return 1,
                // It ended, and what it used stays.
                None => {}
            }
            times = vhost.times.map_or(times, |vhost| times.plus(&vhost));
        }
        let figures = [
            (Metric::CpuTime, times.time_ns),
            (Metric::CpuEmulatorRun, times.emulator_ns),
            (Metric::CpuIothreadRun, times.iothread_ns),
            (Metric::CpuWorkerRun, times.worker_ns),
            (Metric::CpuVhostRun, times.vhost_ns),
        ];
        let cpu = &mut self.sample.cpu;
        if figures.iter().any(|(metric, now)| cpu.falls(SourceKind::Ebpf, *metric, *now)) {
            return 1;
        }
        for (metric, ns) in figures {
            cpu.put(SourceKind::Ebpf, metric, Nanos(ns));
        }
        0
    }

    /// Time in which vCPUs waited while others ran. Returns 1 if it could not be read right.
    fn put_costop(&mut self, ebpf: &Ebpf) -> u64 {
        let Some(group) = &self.group else { return 0 };
        let cpu = &mut self.sample.cpu;
        match ebpf.both_ns(group).filter(|now| !cpu.falls(SourceKind::Ebpf, Metric::CpuCostop, *now)) {
            Some(now) => {
                cpu.put(SourceKind::Ebpf, Metric::CpuCostop, Nanos(now));
                0
            }
            None => 1,
        }
    }

    /// Reads what is dear to read, if it is time to.
    pub(super) fn put_procfs_slow(
        &mut self,
        root: &Path,
        buffer: &mut [u8],
        every_ns: u64,
    ) -> Option<Result<(), ProcfsError>> {
        let process = self.domain.process?;
        let begin = MonotonicNs::now();
        if self.classes_at.is_some_and(|at| begin.since(at) < every_ns) {
            return None;
        }
        self.classes_at = Some(begin);
        let processes = (process, self.vhosts.iter().map(|v| v.thread));
        let times = match self.classes.read(root, processes, buffer) {
            Ok(times) => times,
            Err(error) => return Some(Err(error)),
        };
        self.sample.begin(ReadClass::ProcfsSlow);
        let [emulator, _, iothread, worker, vhost] = times;
        let cpu = &mut self.sample.cpu;
        for (metric, ns) in [
            (Metric::CpuEmulatorRun, emulator),
            (Metric::CpuIothreadRun, iothread),
            (Metric::CpuWorkerRun, worker),
            (Metric::CpuVhostRun, vhost),
        ] {
            cpu.put(SourceKind::Procfs, metric, Nanos(ns));
        }
        let mut result = Ok(());
        match procfs::memory(root, process, buffer) {
            Ok(memory) => {
                let values = &mut self.sample.memory;
                values.put(SourceKind::Procfs, Metric::MemorySwap, memory.swapped);
                values.put(SourceKind::Procfs, Metric::MemoryHugetlb, memory.hugetlb);
                values.put_some(SourceKind::Procfs, Metric::MemoryPss, self.pss.take());
            }
            Err(error) => result = Err(error),
        }
        for (vcpu, values) in self.domain.vcpus.iter().zip(&mut self.sample.vcpus) {
            match vcpu.tid.map(|tid| procfs::switches(root, process, tid, buffer)) {
                Some(Ok(switches)) => {
                    values.put(SourceKind::Procfs, Metric::VcpuPreemptions, switches.involuntary);
                    values.put(SourceKind::Procfs, Metric::VcpuYields, switches.voluntary);
                }
                Some(Err(error)) => result = Err(error),
                None => {}
            }
        }
        self.sample.end(ReadClass::ProcfsSlow, Window { begin, end: MonotonicNs::now() });
        Some(result)
    }

    /// At most once a second.
    fn histograms_due(&mut self, now: MonotonicNs) -> bool {
        // A tick may come a little early.
        let due = self.histograms_at.is_none_or(|at| now.since(at) >= 990_000_000);
        if due {
            self.histograms_at = Some(now);
        }
        due
    }

    /// `None` if there is no process to read.
    pub(super) fn put_procfs(&mut self, buffer: &mut [u8]) -> Option<Result<(), ProcfsError>> {
        const PROCFS: SourceKind = SourceKind::Procfs;
        let files = self.files.as_ref()?;
        let begin = MonotonicNs::now();
        let process = match files.read(buffer) {
            Ok(process) => process,
            Err(error) => return Some(Err(error)),
        };
        self.sample.begin(ReadClass::Procfs);
        let cpu = &mut self.sample.cpu;
        cpu.put(PROCFS, Metric::CpuUser, process.user);
        cpu.put(PROCFS, Metric::CpuSystem, process.system);
        cpu.put(PROCFS, Metric::CpuTime, Nanos(process.user.0 + process.system.0));
        self.sample.memory.put(PROCFS, Metric::MemoryRss, process.rss);
        let (mut result, mut run_sum, mut online) = (Ok(()), self.ended_run[PROCFS as usize], 0);
        for (thread, values) in self.threads.iter_mut().zip(&mut self.sample.vcpus) {
            match thread.file.as_ref().map(|file| file.read(buffer)) {
                Some(Ok(stat)) => {
                    values.put(PROCFS, Metric::VcpuRun, stat.run);
                    values.put(PROCFS, Metric::VcpuWait, stat.wait);
                    run_sum += stat.run.0;
                    thread.run[PROCFS as usize] = stat.run.0;
                    online += 1;
                }
                Some(Err(error)) => result = Err(error),
                None => {}
            }
        }
        if online > 0 && online == self.threads.len() as u64 {
            self.sample.cpu.put(PROCFS, Metric::CpuVcpuRun, Nanos(run_sum));
            self.sample.cpu.put(PROCFS, Metric::CpuVcpusOnline, Count(online));
        }
        self.sample.end(ReadClass::Procfs, Window { begin, end: MonotonicNs::now() });
        Some(result)
    }

    pub(super) fn put_libvirt(&mut self, stats: &DomainStats, window: Window, duty: Duty) {
        match duty {
            Duty::Watch => self.put_libvirt_fast(stats, window),
            Duty::Count => {
                self.sample.begin(ReadClass::LibvirtSlow);
                self.put_libvirt_slow(stats);
                self.sample.end(ReadClass::LibvirtSlow, window);
            }
        }
    }

    fn put_libvirt_fast(&mut self, stats: &DomainStats, window: Window) {
        self.sample.begin(ReadClass::LibvirtFast);
        for (interface, values) in self.domain.interfaces.iter().zip(&mut self.sample.interfaces) {
            if let Some(stats) = stats.interfaces.iter().find(|s| s.device == interface.device) {
                put_interface(values, stats);
            }
        }
        self.sample.end(ReadClass::LibvirtFast, window);
    }

    fn put_libvirt_slow(&mut self, stats: &DomainStats) {
        const LIBVIRT: SourceKind = SourceKind::Libvirt;
        // No QEMU that libvirt lists has used no time.
        if stats.cpu_time_ns != Some(0) {
            self.put_libvirt_times(stats);
        }
        self.sample.cpu.put_some(LIBVIRT, Metric::CpuVcpusOnline, stats.vcpu_current.map(Count));
        for (disk, values) in self.domain.disks.iter().zip(&mut self.sample.disks) {
            // The top image comes first; libvirt gives it a backing index too.
            if let Some(stats) = stats.blocks.iter().find(|s| s.target == disk.target) {
                put_disk(values, stats);
            }
        }
        for (i, disk) in self.domain.disks.iter().enumerate() {
            self.sample.disk_details[i].backing = backing_of(&disk.target, &stats.blocks);
            self.sample.disk_details[i].layers = self.layers.compare(&disk.target, &self.sample.disks[i]);
        }
        put_memory(&mut self.sample.memory, &stats.balloon);
        self.sample.balloon_updated_s = stats.balloon.last_update_s;
        if self.domain.virt_type.as_deref() == Some("kvm") {
            // libvirt says 0 for emulated domains.
            let cpu = &mut self.sample.cpu;
            cpu.put_some(LIBVIRT, Metric::CpuHaltPollSuccess, stats.haltpoll_success_ns.map(Nanos));
            cpu.put_some(LIBVIRT, Metric::CpuHaltPollFail, stats.haltpoll_fail_ns.map(Nanos));
        }
        self.sample.perf.clone_from(&stats.perf);
        if stats.dirty_rate.is_some() {
            self.sample.dirty_rate.clone_from(&stats.dirty_rate);
        }
        let details = self.sample.vcpus.iter_mut().zip(&mut self.sample.vcpu_details);
        for (vcpu, (values, detail)) in self.domain.vcpus.iter().zip(details) {
            if let Some(stats) = stats.vcpus.iter().find(|s| s.index == vcpu.index) {
                put_vcpu_of_libvirt(values, detail, stats);
            }
        }
    }

    /// libvirt reads these in `/proc`, and says 0 from QEMU's end until it notices (`virProcessGetStatInfo`).
    fn put_libvirt_times(&mut self, stats: &DomainStats) {
        let put = |values: &mut Values, metric, now: Option<u64>| {
            let risen = now.filter(|now| !values.falls(SourceKind::Libvirt, metric, *now));
            values.put_some(SourceKind::Libvirt, metric, risen.map(Nanos));
        };
        put(&mut self.sample.cpu, Metric::CpuTime, stats.cpu_time_ns);
        put(&mut self.sample.cpu, Metric::CpuUser, stats.cpu_user_ns);
        put(&mut self.sample.cpu, Metric::CpuSystem, stats.cpu_system_ns);
        for (vcpu, values) in self.domain.vcpus.iter().zip(&mut self.sample.vcpus) {
            if let Some(stats) = stats.vcpus.iter().find(|s| s.index == vcpu.index) {
                put(values, Metric::VcpuRun, stats.time_ns);
                put(values, Metric::VcpuWait, stats.delay_ns);
                put(values, Metric::VcpuLibvirtWait, stats.wait_ns);
            }
        }
    }
}

impl Thread {
    /// Puts how long its runs and waits were, and who had the CPU meanwhile.
    fn put_distributions(
        &mut self,
        ebpf: &Ebpf,
        names: &Names,
        (now, detail): (Option<ThreadTimes>, &mut VcpuDetail),
    ) {
        let slept = |(told, now): (ThreadTimes, ThreadTimes)| {
            told.run_ns == now.run_ns && told.wait_ns == now.wait_ns
        };
        if self.histograms.is_some() && self.told.zip(now).is_some_and(slept) {
            (detail.wait_hist, detail.run_hist) = (Some(Vec::new()), Some(Vec::new()));
            detail.preempted_by = Some(Vec::new());
            return;
        }
        self.told = now;
        self.put_histograms(ebpf, detail);
        self.put_culprits(ebpf, names, detail);
    }

    fn put_histograms(&mut self, ebpf: &Ebpf, detail: &mut VcpuDetail) {
        let Some(now) = self.slot.as_ref().and_then(|slot| ebpf.histograms(slot)) else { return };
        let before = self.histograms.get_or_insert_with(|| Box::new(Histograms::ZERO));
        detail.wait_hist = Some(new_in_histogram(&before.wait, &now.wait));
        detail.run_hist = Some(new_in_histogram(&before.run, &now.run));
        **before = now;
    }
}

/// Names of the domains by QEMU's process id.
pub(super) type Names = std::collections::HashMap<u32, String>;

impl Thread {
    fn put_culprits(&self, ebpf: &Ebpf, names: &Names, detail: &mut VcpuDetail) {
        let Some(charges) = self.slot.as_ref().and_then(|slot| ebpf.take_charges(slot)) else { return };
        let mut list: Vec<_> =
            charges.culprits.iter().filter(|c| c.ns > 0).map(|c| preempted_by(c, names)).collect();
        list.sort_by_key(|culprit| std::cmp::Reverse(culprit.ns));
        let rest = [
            ("other", CulpritKind::Other, charges.other_ns),
            ("unknown", CulpritKind::Unknown, charges.unknown_ns),
        ];
        for (who, kind, ns) in rest.into_iter().filter(|(_, _, ns)| *ns > 0) {
            list.push(PreemptedBy { who: who.to_owned(), kind, pid: None, ns });
        }
        detail.preempted_by = Some(list);
    }
}

fn preempted_by(culprit: &Culprit, names: &Names) -> PreemptedBy {
    let comm = culprit.comm.split(|b| *b == 0).next().unwrap_or_default();
    let comm = match String::from_utf8_lossy(comm) {
        name if name.is_empty() => "exited".to_owned(),
        name => name.into_owned(),
    };
    let (kind, who) = match (culprit.kind, names.get(&culprit.id)) {
        (KIND_IDLE, _) => (CulpritKind::Idle, "idle".to_owned()),
        (KIND_IRQ, _) => (CulpritKind::Irq, "irq".to_owned()),
        (KIND_PROCESS, Some(domain)) => (CulpritKind::Vm, domain.clone()),
        (KIND_PROCESS, None) => (CulpritKind::Process, comm),
        (KIND_KERNEL, _) => match comm.strip_prefix("vhost-").map(|owner| owner.parse::<u32>()) {
            Some(owner) => {
                let domain = owner.ok().and_then(|owner| names.get(&owner)).cloned();
                (CulpritKind::Vhost, domain.unwrap_or(comm))
            }
            None => (CulpritKind::Kthread, comm),
        },
        _ => (CulpritKind::Unknown, comm),
    };
    PreemptedBy { who, kind, pid: (culprit.id != 0).then_some(culprit.id), ns: culprit.ns }
}

fn put_vcpu(values: &mut Values, times: &ThreadTimes, parts: &Parts) {
    const EBPF: SourceKind = SourceKind::Ebpf;
    values.put(EBPF, Metric::VcpuRun, Nanos(times.run_ns));
    values.put(EBPF, Metric::VcpuWait, Nanos(times.wait_ns));
    values.put(EBPF, Metric::VcpuIrq, Nanos(parts.irq_ns));
    values.put(EBPF, Metric::VcpuSleep, Nanos(parts.sleep_ns));
    values.put(EBPF, Metric::VcpuPreemptions, Count(parts.counts.preemptions));
    values.put(EBPF, Metric::VcpuYields, Count(parts.counts.yields));
    values.put(EBPF, Metric::VcpuWakeups, Count(parts.counts.wakeups));
    values.put(EBPF, Metric::VcpuMigrations, Count(parts.counts.migrations));
    values.put(EBPF, Metric::VcpuNodeMigrations, Count(parts.counts.node_migrations));
    values.put(EBPF, Metric::VcpuThrottled, Nanos(times.throttled_ns));
}

/// Returns how many readings were discarded.
fn put_kvm(split: &mut Split, values: &mut Values, run_ns: u64, figures: &KvmFigures) -> u64 {
    const EBPF: SourceKind = SourceKind::Ebpf;
    values.put_some(EBPF, Metric::VcpuExits, figures.exits.map(Count));
    values.put(EBPF, Metric::VcpuUserspaceExits, Count(figures.userspace_exits));
    values.put(EBPF, Metric::VcpuKicks, Count(figures.kicks));
    values.put(EBPF, Metric::VcpuHalts, Count(figures.halts));
    values.put(EBPF, Metric::VcpuHaltsPolled, Count(figures.halts_polled));
    let Some(guest_ns) = figures.guest_ns else { return 0 };
    let halt_poll_ns = figures.halt_poll_ns;
    let Some(parts) = split.add(Figures { run_ns, guest_ns, halt_poll_ns }) else { return 1 };
    values.put(EBPF, Metric::VcpuGuest, Nanos(parts.guest_ns));
    values.put(EBPF, Metric::VcpuHost, Nanos(parts.host_ns));
    values.put_some(EBPF, Metric::VcpuHaltPoll, halt_poll_ns.map(|_| Nanos(parts.halt_poll_ns)));
    0
}

fn put_vcpu_of_libvirt(values: &mut Values, detail: &mut VcpuDetail, stats: &VcpuStats) {
    const LIBVIRT: SourceKind = SourceKind::Libvirt;
    detail.libvirt_state = stats.state.map(VcpuState::name);
    detail.kvm_stats.clone_from(&stats.kvm);
    values.put_some(LIBVIRT, Metric::VcpuExits, stats.kvm("exits").map(Count));
    let polled = stats.kvm("halt_poll_success_ns").zip(stats.kvm("halt_poll_fail_ns"));
    values.put_some(LIBVIRT, Metric::VcpuHaltPoll, polled.map(|(success, fail)| Nanos(success + fail)));
}

fn put_interface(values: &mut Values, stats: &InterfaceStats) {
    const LIBVIRT: SourceKind = SourceKind::Libvirt;
    values.put_some(LIBVIRT, Metric::InterfaceRxBytes, stats.rx_bytes.map(Bytes));
    values.put_some(LIBVIRT, Metric::InterfaceRxPackets, stats.rx_packets.map(Count));
    values.put_some(LIBVIRT, Metric::InterfaceRxErrs, stats.rx_errs.map(Count));
    values.put_some(LIBVIRT, Metric::InterfaceRxDrop, stats.rx_drop.map(Count));
    values.put_some(LIBVIRT, Metric::InterfaceTxBytes, stats.tx_bytes.map(Bytes));
    values.put_some(LIBVIRT, Metric::InterfaceTxPackets, stats.tx_packets.map(Count));
    values.put_some(LIBVIRT, Metric::InterfaceTxErrs, stats.tx_errs.map(Count));
    values.put_some(LIBVIRT, Metric::InterfaceTxDrop, stats.tx_drop.map(Count));
}

fn put_disk(values: &mut Values, stats: &BlockStats) {
    const LIBVIRT: SourceKind = SourceKind::Libvirt;
    values.put_some(LIBVIRT, Metric::DiskRdReq, stats.rd_reqs.map(Count));
    values.put_some(LIBVIRT, Metric::DiskRdBytes, stats.rd_bytes.map(Bytes));
    values.put_some(LIBVIRT, Metric::DiskRdTime, stats.rd_time_ns.map(Nanos));
    values.put_some(LIBVIRT, Metric::DiskWrReq, stats.wr_reqs.map(Count));
    values.put_some(LIBVIRT, Metric::DiskWrBytes, stats.wr_bytes.map(Bytes));
    values.put_some(LIBVIRT, Metric::DiskWrTime, stats.wr_time_ns.map(Nanos));
    values.put_some(LIBVIRT, Metric::DiskFlReq, stats.fl_reqs.map(Count));
    values.put_some(LIBVIRT, Metric::DiskFlTime, stats.fl_time_ns.map(Nanos));
    values.put_some(LIBVIRT, Metric::DiskErrs, stats.errors.map(Count));
    values.put_some(LIBVIRT, Metric::DiskCapacity, stats.capacity_bytes.map(Bytes));
    values.put_some(LIBVIRT, Metric::DiskAllocation, stats.allocation_bytes.map(Bytes));
    values.put_some(LIBVIRT, Metric::DiskPhysical, stats.physical_bytes.map(Bytes));
}

/// The images of a disk but the one on top.
fn backing_of(target: &str, images: &[BlockStats]) -> Vec<BackingImage> {
    let image = |of: &BlockStats| BackingImage {
        index: of.backing_index,
        path: of.path.clone(),
        capacity_bytes: of.capacity_bytes,
        allocation_bytes: of.allocation_bytes,
        physical_bytes: of.physical_bytes,
    };
    images.iter().filter(|image| image.target == target).skip(1).map(image).collect()
}

fn put_memory(values: &mut Values, stats: &BalloonStats) {
    const LIBVIRT: SourceKind = SourceKind::Libvirt;
    values.put_some(LIBVIRT, Metric::MemoryActual, stats.actual_bytes.map(Bytes));
    values.put_some(LIBVIRT, Metric::MemoryAvailable, stats.available_bytes.map(Bytes));
    values.put_some(LIBVIRT, Metric::MemoryUnused, stats.unused_bytes.map(Bytes));
    values.put_some(LIBVIRT, Metric::MemoryUsable, stats.usable_bytes.map(Bytes));
    values.put_some(LIBVIRT, Metric::MemorySwapIn, stats.swap_in_bytes.map(Bytes));
    values.put_some(LIBVIRT, Metric::MemorySwapOut, stats.swap_out_bytes.map(Bytes));
    values.put_some(LIBVIRT, Metric::MemoryMajorFaults, stats.major_faults.map(Count));
    values.put_some(LIBVIRT, Metric::MemoryMinorFaults, stats.minor_faults.map(Count));
    values.put_some(LIBVIRT, Metric::MemoryDiskCaches, stats.disk_caches_bytes.map(Bytes));
    values.put_some(LIBVIRT, Metric::MemoryHugetlbPgalloc, stats.hugetlb_pgalloc.map(Count));
    values.put_some(LIBVIRT, Metric::MemoryHugetlbPgfail, stats.hugetlb_pgfail.map(Count));
    // 0 as in `put_libvirt_times`.
    values.put_some(LIBVIRT, Metric::MemoryRss, stats.rss_bytes.filter(|rss| *rss > 0).map(Bytes));
}

/// Values of the entities that are still there, and room for the new ones.
fn carry<T>(old: (&[T], &[Values]), new: &[T], scope: Scope, same: impl Fn(&T, &T) -> bool) -> Vec<Values> {
    let value_of = |n: &T| old.0.iter().position(|o| same(o, n)).map(|i| old.1[i].clone());
    new.iter().map(|n| value_of(n).unwrap_or_else(|| Values::new(scope))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `vhost_worker_create()` names the worker after the thread that asked for it, QEMU's first, in every Linux.
    #[test]
    fn a_worker_of_vhost_goes_by_the_name_of_its_domain() {
        let names = Names::from([(4711, "web".to_owned())]);
        let who = |kind, id, comm: &[u8]| {
            let mut culprit = Culprit { id, kind, ns: 5, comm: [0; 16] };
            culprit.comm[..comm.len()].copy_from_slice(comm);
            let found = preempted_by(&culprit, &names);
            (found.kind, found.who)
        };
        for (kind, id, comm, expected) in [
            (KIND_KERNEL, 4720, b"vhost-4711".as_slice(), (CulpritKind::Vhost, "web")),
            (KIND_KERNEL, 99, b"vhost-98", (CulpritKind::Vhost, "vhost-98")),
            (KIND_KERNEL, 99, b"vhost-x", (CulpritKind::Vhost, "vhost-x")),
            (KIND_KERNEL, 4721, b"kvm-nx-lpage-re", (CulpritKind::Kthread, "kvm-nx-lpage-re")),
            (KIND_PROCESS, 4711, b"CPU 0/KVM", (CulpritKind::Vm, "web")),
            (KIND_PROCESS, 4712, b"vhost-4711", (CulpritKind::Process, "vhost-4711")),
        ] {
            assert_eq!(who(kind, id, comm), (expected.0, expected.1.to_owned()));
        }
    }
}
