//! The eBPF source: loads the kernel programs, says which threads to follow, and reads what they counted.
//!
//! Data comes from the maps of `monitor-ebpf`, mapped into this process; one `BPF_PROG_TEST_RUN` per
//! [`monitor_ebpf::READ_BATCH`] threads brings the intervals in progress up to date. Knows neither domains nor
//! output.

mod block;
mod exit_names;
mod exits;
mod images;
mod kvm;
pub mod layout;
mod mapped;
mod net;
mod net_bench;
pub mod probes;
mod process;
mod sched;
mod times;
mod traffic;

use std::{
    collections::BTreeMap,
    io,
    os::fd::{AsFd as _, AsRawFd as _, OwnedFd},
    path::Path,
    time::{Duration, Instant},
};

pub use self::{
    block::{ImageSlot, NotWatched},
    exit_names::{exit_name, userspace_name},
    exits::{ExitReason, ExitReasons, KvmFigures},
    images::{
        Aio, BLOCK_DEVICE, Below, Counted, FLUSH, Hook, Image, ImageHistograms, ImageKey, ImageKind,
        Latencies, Opened, Operation, Plan, READ, WRITE,
    },
    net::NicSlot,
    net_bench::NetYardstick,
    process::ProcessSlot,
    sched::{GroupSlot, Keep, NotFollowed, Slot},
    times::{Doing, Happened, ProcessTimes, ThreadTimes, Torn},
    traffic::{Bursts, DeviceTraffic, DropPlace, Drops, Passed},
};
use aya::{
    Btf, BtfError, Ebpf as Object, EbpfLoader, Pod,
    maps::{Map, MapData, MapError},
    programs::{
        BtfTracePoint, Iter, Program, ProgramError, RawTracePoint, RawTracePointRunOptions, TestRun as _,
    },
};
pub use monitor_ebpf::{
    BUCKETS, CLASSES, Charges, Culprit, Histogram, Histograms, KIND_IDLE, KIND_IRQ, KIND_KERNEL,
    KIND_PROCESS, WINDOW_BUCKETS, bucket_range, class_of,
};
use monitor_ebpf::{
    BlockLayout, CPUS, HISTOGRAMS, Layout, NICS, NetLayout, Nodes, PROCESSES, READ_BATCH, THREADS,
};

use self::{
    block::Block,
    kvm::Kvm,
    layout::LayoutError,
    mapped::Mapped,
    net::Net,
    probes::{Attach, Need, PROBES, Probe, ProbeGroup, ProbeState},
    process::Processes,
    sched::Sched,
};
use crate::{
    host, one_line,
    units::{MonotonicNs, NicKey, Tgid, Tid, Window, duration_ns},
};

/// The programs, as `cargo xtask build-ebpf` made them.
static OBJECT: &[u8] = aya::include_bytes_aligned!(env!("KVM_MONITOR_BPF_OBJECT"));

/// Kernel type information of the running kernel.
pub const BTF_FILE: &str = "/sys/kernel/btf/vmlinux";

/// Why the kernel programs cannot run.
#[derive(Debug, thiserror::Error)]
pub enum EbpfError {
    /// A structure field the programs need was not found.
    #[error("the kernel's structures cannot be read")]
    Layout(#[from] layout::LayoutError),
    /// BTF could not be read by the loader.
    #[error("cannot read kernel type information (BTF)")]
    Btf(#[source] BtfError),
    /// The object was refused as a whole.
    #[error("the kernel refused the BPF maps: {0}")]
    Load(String),
    /// One required program was refused.
    #[error("the kernel refused the program {program}: {reason}")]
    Program {
        /// Its name.
        program: &'static str,
        /// What the kernel said, one line.
        reason: String,
    },
    /// A map is not there or cannot be mapped.
    #[error("cannot use the BPF map {map}")]
    Map {
        /// Its name.
        map: &'static str,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// Every group lacks something; the first of the reasons.
    #[error("the kernel refused the probes: {0}")]
    Refused(String),
    /// No group of probes was asked for.
    #[error("no group of probes was asked for")]
    NoGroup,
}

/// Runs of a program while the kernel counted them (`kernel.bpf_stats_enabled`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ProgramRuns {
    /// How often.
    pub count: u64,
    /// How long altogether, nanoseconds; contains the clock reads of the counting itself.
    pub ns: u64,
}

/// The loaded programs. Everything is detached when this is dropped, or the process ends in any way.
pub struct Ebpf {
    object: Object,
    states: Vec<(Probe, ProbeState)>,
    loads: Loads,
    sched: Option<Sched>,
    processes: Option<Processes>,
    kvm: Option<Kvm>,
    net: Option<Net>,
    block: Option<Block>,
}

/// How long the kernel took to verify, load and attach each program.
type Loads = BTreeMap<&'static str, Duration>;

#[repr(transparent)]
#[derive(Clone, Copy)]
struct Wire<T>(T);
// SAFETY: `Layout` is plain `u32`s without padding.
unsafe impl Pod for Wire<Layout> {}
// SAFETY: plain bytes.
unsafe impl Pod for Wire<Nodes> {}
// SAFETY: so is `NetLayout`.
unsafe impl Pod for Wire<NetLayout> {}
// SAFETY: `BlockLayout` likewise.
unsafe impl Pod for Wire<BlockLayout> {}

impl Ebpf {
    /// Loads and attaches the programs of the groups.
    ///
    /// A group of which a required program is refused is detached as a whole; [`Ebpf::states`] says so.
    ///
    /// # Errors
    /// If the object or its maps are refused, or no group works.
    pub fn open(groups: &[ProbeGroup]) -> Result<Self, EbpfError> {
        let kernel = layout::kernel_types(Path::new(BTF_FILE))?;
        let sched = layout::sched(&kernel);
        let cpus = aya::util::nr_cpus().ok().and_then(|n| u32::try_from(n).ok()).unwrap_or(1);
        let net = layout::net(&kernel, cpus);
        let reasons = layout::drop_reasons(&kernel);
        let block = layout::block(&kernel);
        let btf = Btf::from_sys_fs().map_err(EbpfError::Btf)?;
        let mut loader = EbpfLoader::new();
        let sched_layout = sched.as_ref().ok().copied().map(Wire);
        if let Some(layout) = &sched_layout {
            loader.override_global("LAYOUT", layout, true);
        }
        size_maps(&mut loader, host::possible_cpus());
        let nodes = Wire(host::nodes_of_cpus());
        loader.override_global("NODES", &nodes, true);
        let kvm_places = if groups.contains(&ProbeGroup::Kvm) { kvm::places() } else { 1 };
        for map in ["VCPU_EXITS", "EXIT_TABLES"] {
            loader.map_max_entries(map, kvm_places);
        }
        let net_layout = net.as_ref().ok().copied().map(Wire);
        if let Some(layout) = &net_layout {
            loader.override_global("NET_LAYOUT", layout, true);
        }
        loader.map_max_entries("NIC_CELLS", NICS * cpus).map_max_entries("NIC_NOTES", cpus);
        let block_layout = block.as_ref().ok().copied().map(Wire);
        if let Some(layout) = &block_layout {
            loader.override_global("BLOCK_LAYOUT", layout, true);
        }
        let mut object = loader.btf(Some(&btf)).load(OBJECT).map_err(|e| EbpfError::Load(one_line(&e)))?;
        let mut this =
            Attaching { object: &mut object, btf: &btf, groups, states: Vec::new(), loads: Loads::new() };
        let with_sched = this.attach(ProbeGroup::Sched, sched.map(drop))?;
        let with_kvm = this.attach_kvm(with_sched)?;
        let with_net = this.attach(ProbeGroup::Net, net.map(drop))?;
        let with_block = this.attach(ProbeGroup::Block, block.map(drop))?;
        let Attaching { states, loads, .. } = this;
        if !states.iter().any(|(_, state)| matches!(state, ProbeState::Attached | ProbeState::Ready)) {
            let refused = states.into_iter().find_map(|(_, state)| match state {
                ProbeState::Failed(reason) => Some(reason),
                _ => None,
            });
            return Err(refused.map_or(EbpfError::NoGroup, EbpfError::Refused));
        }
        let sched = if with_sched { Some(Sched::new(&object)?) } else { None };
        let kvm = if with_kvm { Some(Kvm::new(&object, &kernel)?) } else { None };
        drop(kernel);
        let processes = if with_sched { Some(Processes::new(&mut object)?) } else { None };
        let runs = |program| {
            states.iter().any(|(p, s): &(Probe, _)| p.program == program && *s == ProbeState::Attached)
        };
        let drops = runs("kfree_skb");
        let net = if with_net { Some(Net::new(&object, cpus, drops, reasons)?) } else { None };
        let block = if with_block { Some(Block::new(&object, &states)?) } else { None };
        let mut this = Self { object, states, loads, sched, processes, kvm, net, block };
        if let Some(sched) = &mut this.sched {
            sched.compare_clocks();
        }
        drop(btf);
        give_memory_back();
        Ok(this)
    }

    /// What became of each program.
    #[must_use]
    pub fn states(&self) -> &[(Probe, ProbeState)] {
        &self.states
    }

    /// Instructions that the verifier looked at before it let a program in; `None` if it is not loaded.
    #[must_use]
    pub fn verified(&self, probe: &Probe) -> Option<u32> {
        self.object.program(probe.program)?.info().ok()?.verified_instruction_count()
    }

    /// How long the kernel took to verify, load and attach a program, or to refuse it; `None` if it was not tried.
    #[must_use]
    pub fn load_time(&self, probe: &Probe) -> Option<Duration> {
        self.loads.get(probe.program).copied()
    }

    /// Runs of each program so far; empty unless the kernel counts them.
    #[must_use]
    pub fn runs(&self) -> Vec<(&'static str, ProgramRuns)> {
        let runs = |name: &'static str| Some((name, runs(&self.object, name)?));
        PROBES.iter().filter_map(|probe| runs(probe.program)).collect()
    }

    /// Events so far that a program was not run for, because they came (in an interrupt) while it was running on that CPU already;
    /// programs that missed none are left out.
    #[must_use]
    pub fn misses(&self) -> Vec<(&'static str, u64)> {
        let misses = |name: &'static str| Some((name, misses(&self.object, name)?)).filter(|(_, n)| *n > 0);
        PROBES.iter().filter_map(|probe| misses(probe.program)).collect()
    }

    /// Begins to follow a thread. Call [`Ebpf::seed`] after the last of a batch.
    ///
    /// # Errors
    /// If the scheduling probes do not run, or the kernel tables have no room. Where only the histograms have none, the
    /// rest is kept.
    pub fn follow(&mut self, tid: Tid, keep: Keep, group: Option<&GroupSlot>) -> Result<Slot, NotFollowed> {
        let slot = self.sched.as_mut().ok_or(NotFollowed::Off)?.follow(tid, keep, group)?;
        if let (Some(kvm), Some(place)) = (&mut self.kvm, slot.place()) {
            kvm.follow(place);
        }
        Ok(slot)
    }

    /// Begins to keep a group of sibling threads; `None` if the scheduling probes do not run or there is no room.
    pub fn follow_group(&mut self) -> Option<GroupSlot> {
        self.sched.as_mut()?.follow_group()
    }

    /// Stops keeping a group, after the last of its members was forgotten.
    pub fn forget_group(&mut self, slot: GroupSlot) {
        if let Some(sched) = &mut self.sched {
            sched.forget_group(slot);
        }
    }

    /// Time in which at least one thread of the group waited while another ran, nanoseconds since the group is kept, up to
    /// the last [`Ebpf::read`]; `None` if it could not be read.
    #[must_use]
    pub fn both_ns(&self, slot: &GroupSlot) -> Option<u64> {
        self.sched.as_ref()?.both_ns(slot)
    }

    /// Stops following a thread.
    pub fn forget(&mut self, slot: Slot) {
        let place = slot.place();
        if let Some(sched) = &mut self.sched {
            sched.forget(slot);
        }
        if let (Some(kvm), Some(place)) = (&mut self.kvm, place) {
            kvm.forget(place);
        }
    }

    /// Lets the kernel look up the threads that are followed since the last call, so that one that never
    /// leaves its CPU is known as well. Walks over all tasks of the host.
    ///
    /// # Errors
    /// If the iterator cannot be run.
    pub fn seed(&mut self) -> Result<(), EbpfError> {
        self.sched.as_mut().map_or(Ok(()), |sched| sched.seed(&mut self.object))
    }

    /// Reads everything; the other methods then have the figures.
    ///
    /// # Errors
    /// If the kernel refuses to run a reading program.
    pub fn read(&mut self) -> Result<Window, EbpfError> {
        let begin = MonotonicNs::now();
        if let Some(sched) = &mut self.sched {
            sched.read(&self.object)?;
        }
        if let Some(processes) = &self.processes {
            processes.read(&self.object)?;
        }
        if let Some(kvm) = &mut self.kvm {
            kvm.read();
        }
        if let Some(net) = &mut self.net {
            net.read();
        }
        Ok(Window { begin, end: MonotonicNs::now() })
    }

    /// Begins to follow a process as a whole. Call [`Ebpf::seed`] after the last of a batch. `None` if the scheduling
    /// probes do not run or the kernel tables have no room.
    pub fn follow_process(&mut self, tgid: Tgid) -> Option<ProcessSlot> {
        let slot = self.processes.as_mut()?.follow(tgid)?;
        self.sched.as_mut()?.seed_next();
        Some(slot)
    }

    /// Stops following a process.
    pub fn forget_process(&mut self, slot: ProcessSlot) {
        if let Some(processes) = &mut self.processes {
            processes.forget(slot);
        }
    }

    /// Figures of a process at the last [`Ebpf::read`]; `None` if it was never seen or is gone, an error if its threads
    /// changed under every attempt to read them.
    #[must_use]
    pub fn process_times(&self, slot: &ProcessSlot) -> Option<Result<ProcessTimes, Torn>> {
        self.processes.as_ref()?.times(slot)
    }

    /// What happened among processes and threads since the last call.
    pub fn happened(&mut self) -> Vec<Happened> {
        self.processes.as_mut().map(Processes::happened).unwrap_or_default()
    }

    /// Whether [`Ebpf::happened`] tells of every process and thread of QEMU that comes or goes.
    #[must_use]
    pub fn tells_of_processes(&self) -> bool {
        let began = |(probe, state): &(Probe, ProbeState)| {
            probe.program == "process_began" && *state == ProbeState::Attached
        };
        self.processes.is_some() && self.states.iter().any(began)
    }

    /// Whether times of threads and processes, and counters of network devices, come from the kernel programs.
    #[must_use]
    pub fn has_times_and_traffic(&self) -> bool {
        self.processes.is_some() && self.net.is_some()
    }

    /// A descriptor that becomes readable when [`Ebpf::happened`] has something to tell; `None` if nothing ever does.
    #[must_use]
    pub fn changes(&self) -> Option<OwnedFd> {
        self.processes.as_ref()?.changes().ok()
    }

    /// Figures of a thread at the last [`Ebpf::read`]; `None` if it was never seen or could not be read.
    #[must_use]
    pub fn times(&self, slot: &Slot) -> Option<ThreadTimes> {
        self.sched.as_ref()?.times(slot)
    }

    /// When the followed thread started, nanoseconds after boot; `None` until it was seen.
    #[must_use]
    pub fn started_ns(&self, slot: &Slot) -> Option<u64> {
        self.sched.as_ref()?.started_ns(slot)
    }

    /// The distributions of a thread's waits and runs since it is followed, if they are kept. Counts are modulo 2³².
    #[must_use]
    pub fn histograms(&self, slot: &Slot) -> Option<Histograms> {
        self.sched.as_ref()?.histograms(slot)
    }

    /// Takes what was charged for the thread's waits since the last call: the programs go on in another table.
    #[must_use]
    pub fn take_charges(&self, slot: &Slot) -> Option<Charges> {
        self.sched.as_ref()?.take_charges(slot)
    }

    /// What KVM did for a thread, as of the last [`Ebpf::read`]; `None` if the probes of KVM do not run, or the figures
    /// could not be read.
    #[must_use]
    pub fn kvm_figures(&self, slot: &Slot) -> Option<KvmFigures> {
        let sched = self.sched.as_ref()?;
        self.kvm.as_ref()?.figures(slot.place()?, &sched.times(slot)?, sched.read_at_ns(slot))
    }

    /// Exits of a thread by reason, as they are now.
    #[must_use]
    pub fn exit_reasons(&self, slot: &Slot) -> Option<ExitReasons> {
        self.kvm.as_ref()?.reasons(slot.place()?, MonotonicNs::now().0)
    }

    /// For benchmarks: lets the `task_struct` of a followed thread stand for a vCPU of Intel's or AMD's, so that
    /// [`Ebpf::rehearse`] finds a reason where a real exit would have it. Returns the arguments of `kvm_exit`. What is
    /// counted from then on means nothing.
    #[must_use]
    pub fn pretend_exits(&self, slot: &Slot, isa: u32) -> Option<[u64; 3]> {
        let kernel = layout::kernel_types(Path::new(BTF_FILE)).ok()?;
        let layout = layout::sched(&kernel).ok()?;
        self.kvm.as_ref()?.pretend(&layout);
        Some([self.sched.as_ref()?.task(slot), u64::from(isa), 0])
    }

    /// For benchmarks: runs a program of the KVM group on this thread, without its tracepoint.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn rehearse(&self, program: &'static str, args: [u64; 3]) -> Result<(), EbpfError> {
        run_raw(&self.object, program, args)
    }

    /// What the probes of KVM cannot tell on this host although they are attached, and why.
    #[must_use]
    pub fn kvm_caveat(&self) -> Option<&'static str> {
        self.kvm.as_ref()?.caveat()
    }

    /// Attaches what waited for KVM to be loaded, once it is. Returns what there is to tell about it.
    ///
    /// # Errors
    /// If the programs are refused then; they are not tried again.
    pub fn look(&mut self) -> Result<Option<&'static str>, EbpfError> {
        if let Some(kvm) = &mut self.kvm {
            kvm.look()?;
        } else if self.waits() && kvm::loaded() {
            return self.attach_late();
        }
        Ok(None)
    }

    fn waits(&self) -> bool {
        self.states.iter().any(|(_, state)| matches!(state, ProbeState::Waiting(_)))
    }

    fn attach_late(&mut self) -> Result<Option<&'static str>, EbpfError> {
        let btf = Btf::from_sys_fs().map_err(EbpfError::Btf)?;
        self.states.retain(|(_, state)| !matches!(state, ProbeState::Waiting(_)));
        let groups = &[ProbeGroup::Kvm];
        let states = std::mem::take(&mut self.states);
        let loads = std::mem::take(&mut self.loads);
        let mut this = Attaching { object: &mut self.object, btf: &btf, groups, states, loads };
        let works = this.attach(ProbeGroup::Kvm, Ok(()));
        (self.states, self.loads) = (this.states, this.loads);
        if works? {
            let kernel = layout::kernel_types(Path::new(BTF_FILE))?;
            let mut kvm = Kvm::new(&self.object, &kernel)?;
            // Threads may be followed already, at any place.
            kvm.follow(kvm::places() as usize - 1);
            self.kvm = Some(kvm);
        }
        drop(btf);
        give_memory_back();
        Ok(Some(if self.kvm.is_some() {
            "probes of KVM attached: it was loaded"
        } else {
            "KVM was loaded, but its probes cannot be attached; see `kvm-monitor check`"
        }))
    }

    /// Begins to watch a network device, with so many queues told apart (0: none).
    ///
    /// # Errors
    /// If the network probes do not run, or the kernel tables have no room. Where only the queues have none, the rest
    /// is kept.
    pub fn watch(&mut self, device: NicKey, queues: u32) -> Result<NicSlot, NotFollowed> {
        self.net.as_mut().ok_or(NotFollowed::Off)?.watch(device, queues)
    }

    /// Stops watching a network device.
    pub fn unwatch(&mut self, slot: NicSlot) {
        if let Some(net) = &mut self.net {
            net.unwatch(slot);
        }
    }

    /// Figures of a network device at the last [`Ebpf::read`].
    #[must_use]
    pub fn traffic(&self, slot: &NicSlot) -> Option<&DeviceTraffic> {
        self.net.as_ref()?.traffic(slot)
    }

    /// Packets that the driver of a network device took since it is watched, at this moment.
    #[must_use]
    pub fn sent_now(&self, slot: &NicSlot) -> Option<u64> {
        Some(self.net.as_ref()?.sent_now(slot))
    }

    /// Source addresses of the packets of a network device that were looked at last: of what the host sent through it,
    /// and of what it received.
    #[must_use]
    pub fn sources(&self, slot: &NicSlot) -> [Option<[u8; 6]>; 2] {
        self.net.as_ref().map_or([None; 2], |net| net.sources(slot))
    }

    /// Whether nothing passed through a network device since its windows were taken last, as of the last [`Ebpf::read`]. Then
    /// there is nothing new in them. To be asked before each time they are taken.
    #[must_use]
    pub fn is_at_rest(&mut self, slot: &NicSlot, now: MonotonicNs) -> bool {
        self.net.as_mut().is_none_or(|net| net.is_at_rest(slot, now))
    }

    /// Windows of 1 ms of a network device, `xmit` and `receive`; the largest ones are those that ended since the last
    /// call. One counts some milliseconds late, at most 60.
    #[must_use]
    pub fn take_bursts(&mut self, slot: &NicSlot, now: MonotonicNs) -> [Bursts; 2] {
        self.net.as_mut().map_or_else(|| [Bursts::none(), Bursts::none()], |net| net.take_bursts(slot, now))
    }

    /// Name of a drop reason; its number where the kernel has none for it.
    #[must_use]
    pub fn drop_reason(&self, reason: u32) -> String {
        self.net.as_ref().map_or_else(|| reason.to_string(), |net| net.reason_name(reason))
    }

    /// Whether the kernel has what a hook on disks needs.
    #[must_use]
    pub fn can(&self, hook: Hook) -> bool {
        self.block.as_ref().is_some_and(|block| block.can(hook))
    }

    /// Begins to count the requests of a process on an image.
    ///
    /// # Errors
    /// If the disk probes do not run, none of them sees this image, or the kernel tables have no room. Where only the
    /// histograms have none, the rest is kept.
    pub fn watch_image(&mut self, key: ImageKey, plan: Plan) -> Result<ImageSlot, NotWatched> {
        self.block.as_mut().ok_or(NotWatched::Off)?.watch(&mut self.object, key, plan)
    }

    /// Stops counting; returns what was counted in the end. `None` where the disk probes do not run.
    pub fn unwatch_image(&mut self, slot: ImageSlot) -> Option<(Counted, Option<Latencies>)> {
        Some(self.block.as_mut()?.unwatch(&mut self.object, slot))
    }

    /// What was counted for an image since it is watched.
    #[must_use]
    pub fn image(&self, slot: &ImageSlot) -> Option<Counted> {
        Some(self.block.as_ref()?.image(slot))
    }

    /// The latencies of its requests since then, if they are kept. Counts are modulo 2³².
    #[must_use]
    pub fn latencies(&self, slot: &ImageSlot) -> Option<Latencies> {
        self.block.as_ref()?.latencies(slot)
    }
}

/// The object while its programs are attached, group by group.
struct Attaching<'a> {
    object: &'a mut Object,
    btf: &'a Btf,
    groups: &'a [ProbeGroup],
    states: Vec<(Probe, ProbeState)>,
    loads: Loads,
}

impl Attaching<'_> {
    /// Attaches the programs of a group, unless it is not asked for or its `layout` was not found. True if the group
    /// works.
    fn attach(&mut self, group: ProbeGroup, layout: Result<(), LayoutError>) -> Result<bool, EbpfError> {
        let probes = || PROBES.iter().filter(|probe| probe.group == group);
        let all = |state: &ProbeState| probes().map(|probe| (*probe, state.clone())).collect::<Vec<_>>();
        if !self.groups.contains(&group) {
            self.states.extend(all(&ProbeState::Off));
            return Ok(false);
        }
        if let Err(error) = layout {
            self.states.extend(all(&ProbeState::Failed(one_line(&error))));
            return Ok(false);
        }
        let mut states = Vec::new();
        for probe in probes() {
            let begin = Instant::now();
            let attached = attach(self.object, probe, self.btf);
            self.loads.insert(probe.program, begin.elapsed());
            match attached {
                Ok(()) => states.push((*probe, probe.attach.attained())),
                Err(reason) if probe.need == Need::Required => {
                    for (attached, _) in &states {
                        detach(self.object, attached)?;
                    }
                    let reason = format!("{}: {reason}", probe.program);
                    self.states.extend(all(&ProbeState::Failed(reason)));
                    return Ok(false);
                }
                Err(reason) => states.push((*probe, ProbeState::Failed(reason))),
            }
        }
        self.states.extend(states);
        Ok(true)
    }
}

impl Attaching<'_> {
    /// The probes of KVM, which may have to wait for it. True if they are attached.
    fn attach_kvm(&mut self, with_sched: bool) -> Result<bool, EbpfError> {
        let group = ProbeGroup::Kvm;
        match kvm::obstacle(with_sched) {
            Some(state) if self.groups.contains(&group) => {
                let probes = PROBES.iter().filter(|probe| probe.group == group);
                self.states.extend(probes.map(|probe| (*probe, state.clone())));
                Ok(false)
            }
            _ => self.attach(group, Ok(())),
        }
    }
}

/// A program that does nothing: the yardstick of benchmarks.
pub struct Yardstick(Object);

impl Yardstick {
    const PROGRAM: &'static str = "bench_empty";
    const RAW_PROGRAM: &'static str = "bench_empty_raw";

    /// Loads the one for raw tracepoints, and attaches it to `kvm_userspace_exit`.
    ///
    /// # Errors
    /// As [`Ebpf::open`].
    pub fn open_raw() -> Result<Self, EbpfError> {
        let btf = Btf::from_sys_fs().map_err(EbpfError::Btf)?;
        let mut object =
            EbpfLoader::new().btf(Some(&btf)).load(OBJECT).map_err(|e| EbpfError::Load(one_line(&e)))?;
        let attach = Attach::RawTracepoint("kvm_userspace_exit");
        let probe =
            Probe { program: Self::RAW_PROGRAM, attach, group: ProbeGroup::Kvm, need: Need::Required };
        self::attach(&mut object, &probe, &btf)
            .map_err(|reason| EbpfError::Program { program: Self::RAW_PROGRAM, reason })?;
        Ok(Self(object))
    }

    /// Runs the one for raw tracepoints on this thread.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn rehearse_raw(&self) -> Result<(), EbpfError> {
        run_raw(&self.0, Self::RAW_PROGRAM, [0; 3])
    }

    /// Runs of the one for raw tracepoints so far, if the kernel counts them.
    #[must_use]
    pub fn runs_raw(&self) -> Option<ProgramRuns> {
        runs(&self.0, Self::RAW_PROGRAM)
    }

    /// Loads and attaches it.
    ///
    /// # Errors
    /// As [`Ebpf::open`].
    pub fn open() -> Result<Self, EbpfError> {
        let btf = Btf::from_sys_fs().map_err(EbpfError::Btf)?;
        let mut object =
            EbpfLoader::new().btf(Some(&btf)).load(OBJECT).map_err(|e| EbpfError::Load(one_line(&e)))?;
        let attach = Attach::BtfTracepoint("sched_switch");
        let probe = Probe { program: Self::PROGRAM, attach, group: ProbeGroup::Sched, need: Need::Required };
        self::attach(&mut object, &probe, &btf)
            .map_err(|reason| EbpfError::Program { program: Self::PROGRAM, reason })?;
        Ok(Self(object))
    }

    /// Its runs so far, if the kernel counts them.
    #[must_use]
    pub fn runs(&self) -> Option<ProgramRuns> {
        runs(&self.0, Self::PROGRAM)
    }
}

/// Runs a program for raw tracepoints on this thread, without its tracepoint.
fn run_raw(object: &Object, name: &'static str, args: [u64; 3]) -> Result<(), EbpfError> {
    let failed = |e: ProgramError| EbpfError::Program { program: name, reason: program_error(&e) };
    let Some(program) = object.program(name) else {
        return Err(EbpfError::Program { program: name, reason: "not in the object".to_owned() });
    };
    let program: &RawTracePoint = program.try_into().map_err(failed)?;
    let mut options = RawTracePointRunOptions::new();
    options.args[..args.len()].copy_from_slice(&args);
    program.test_run(options).map_err(failed)?;
    Ok(())
}

/// Runs a reading program for all slots that were handed out.
fn read_slots(object: &Object, program: &'static str, used: u32) -> Result<(), EbpfError> {
    (0..used).step_by(READ_BATCH as usize).try_for_each(|first| {
        let count = READ_BATCH.min(used - first);
        run_raw(object, program, [first.into(), count.into(), 0])
    })
}

/// Runs of a program; `None` unless the kernel counts them.
fn runs(object: &Object, name: &str) -> Option<ProgramRuns> {
    let info = object.program(name)?.info().ok()?;
    let runs = ProgramRuns { count: info.run_count(), ns: duration_ns(info.run_time()) };
    (runs.count > 0).then_some(runs)
}

/// What `/proc/self/fdinfo` says of a loaded program (kernel/bpf/syscall.c: `bpf_prog_show_fdinfo()`); `None` if it is not loaded.
fn misses(object: &Object, name: &str) -> Option<u64> {
    let fd = object.program(name)?.fd().ok()?.as_fd().as_raw_fd();
    misses_in(&std::fs::read_to_string(format!("/proc/self/fdinfo/{fd}")).ok()?)
}

fn misses_in(fdinfo: &str) -> Option<u64> {
    fdinfo.lines().find_map(|line| line.strip_prefix("recursion_misses:"))?.trim().parse().ok()
}

fn attach(object: &mut Object, probe: &Probe, btf: &Btf) -> Result<(), String> {
    let program = object.program_mut(probe.program).ok_or("not in the object")?;
    let error = |e: ProgramError| program_error(&e);
    match probe.attach {
        Attach::BtfTracepoint(name) => {
            let program: &mut BtfTracePoint = program.try_into().map_err(error)?;
            program.load(name, btf).map_err(error)?;
            program.attach().map_err(error)?;
        }
        Attach::RawTracepoint(name) => {
            let program: &mut RawTracePoint = program.try_into().map_err(error)?;
            program.load().map_err(error)?;
            program.attach(name).map_err(error)?;
        }
        Attach::OnDemand(names) => load_first(program, names, btf)?,
        Attach::OnDemandDear(name) => load_first(program, &[name], btf)?,
        Attach::Iterator(of) => {
            let program: &mut Iter = program.try_into().map_err(error)?;
            program.load(of, btf).map_err(error)?;
        }
        Attach::OnRequest => {
            let program: &mut RawTracePoint = program.try_into().map_err(error)?;
            program.load().map_err(error)?;
        }
    }
    Ok(())
}

/// Loads a program for the first of these tracepoints that the kernel has.
fn load_first(program: &mut Program, names: &[&str], btf: &Btf) -> Result<(), String> {
    let program: &mut BtfTracePoint = program.try_into().map_err(|e: ProgramError| program_error(&e))?;
    let mut reasons = Vec::new();
    for name in names {
        match program.load(name, btf) {
            Ok(()) => return Ok(()),
            Err(error) => reasons.push(program_error(&error)),
        }
    }
    Err(reasons.join("; "))
}

/// Unloads a program, which detaches it.
fn detach(object: &mut Object, probe: &Probe) -> Result<(), EbpfError> {
    let failed = |e: ProgramError| EbpfError::Program { program: probe.program, reason: program_error(&e) };
    match object.program_mut(probe.program) {
        Some(Program::BtfTracePoint(program)) => program.unload().map_err(failed),
        Some(Program::RawTracePoint(program)) => program.unload().map_err(failed),
        Some(Program::Iter(program)) => program.unload().map_err(failed),
        _ => Ok(()),
    }
}

/// Gives the maps room for what a host with so many CPUs can carry: a small one should not pay for a large one.
fn size_maps(loader: &mut EbpfLoader<'_>, cpus: u32) {
    let vcpus = cpus.saturating_mul(8).clamp(512, 4 * HISTOGRAMS);
    // Threads are read in batches.
    let threads = cpus.saturating_mul(64).clamp(2_048, THREADS).next_multiple_of(READ_BATCH);
    let processes = cpus.saturating_mul(8).clamp(512, PROCESSES).next_multiple_of(READ_BATCH);
    for (maps, entries) in [
        (["HISTOGRAMS", "CHARGES"].as_slice(), vcpus),
        (["THREADS", "READINGS"].as_slice(), threads),
        (["PROCESSES", "PROCESS_READ", "PROCESS_OF", "GROUPS"].as_slice(), processes),
        (["HISTORY"].as_slice(), cpus.clamp(1, CPUS)),
    ] {
        for map in maps {
            loader.map_max_entries(map, entries);
        }
    }
}

/// Takes a map out of the object.
fn take_map<M: TryFrom<Map, Error = MapError>>(
    object: &mut Object,
    name: &'static str,
) -> Result<M, EbpfError> {
    let failed = |source| EbpfError::Map { map: name, source };
    let map = object.take_map(name).ok_or_else(|| failed(io::Error::other("not in the object")))?;
    M::try_from(map).map_err(|e| failed(io::Error::other(e)))
}

/// Maps every value of an array, or the only one.
fn map<T: Copy>(object: &Object, name: &'static str) -> Result<Mapped<T>, EbpfError> {
    let failed = |source| EbpfError::Map { map: name, source };
    let data: &MapData = match object.map(name) {
        Some(Map::Array(data)) => data,
        _ => return Err(failed(io::Error::other("not an array in the object"))),
    };
    let info = data.info().map_err(|e| failed(io::Error::other(e)))?;
    if info.value_size() as usize != size_of::<T>() {
        return Err(failed(io::Error::other("its values have another size")));
    }
    Mapped::new(data.fd(), info.max_entries() as usize).map_err(failed)
}

/// Reading BTF takes tens of megabytes for a moment, which glibc would keep for later.
fn give_memory_back() {
    #[cfg(target_env = "gnu")]
    // SAFETY: `malloc_trim` has no preconditions.
    unsafe {
        libc::malloc_trim(0);
    }
}

/// What the kernel said, without the verifier's log, which goes to the debug log. `EACCES` with such a log is no question of
/// rights.
fn program_error(error: &ProgramError) -> String {
    if let ProgramError::LoadError { io_error, verifier_log } = error {
        if verifier_log.to_string().is_empty() {
            return io_error.to_string();
        }
        tracing::debug!(%verifier_log, "program refused");
        return format!("the kernel's verifier refuses it ({io_error}; KVM_MONITOR_LOG=debug tells why)");
    }
    if let ProgramError::Btf(BtfError::UnknownBtfTypeName { type_name }) = error
        && let Some(tracepoint) = type_name.strip_prefix("btf_trace_")
    {
        return format!("this kernel has no tracepoint {tracepoint}");
    }
    one_line(error)
}

#[cfg(test)]
mod tests {
    use super::misses_in;

    #[test]
    fn events_that_a_program_missed_are_in_its_fdinfo() {
        let fdinfo =
            "flags:\t02000002\nprog_type:\t26\nrun_cnt:\t51\nrecursion_misses:\t7\nverified_insns:\t12\n";
        assert_eq!(misses_in(fdinfo), Some(7));
        assert_eq!(misses_in("flags:\t02000002\nrun_cnt:\t51\n"), None, "before Linux 5.12");
    }
}
