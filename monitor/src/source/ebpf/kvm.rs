//! Exits of vCPU threads: what the programs of `monitor-ebpf/src/kvm.rs` counted.
//!
//! KVM is a module on most hosts, and may be loaded after we start: the programs hang on raw tracepoints, and offsets
//! into KVM's structures are found in the modules' type information when they are there.

use std::{
    path::Path,
    sync::atomic::{Ordering, fence},
};

use aya::Ebpf as Object;
use btf_rs::Btf;
use monitor_ebpf::{
    ExitTable, HISTOGRAMS, KvmLayout, Layout, MODE_GUEST, MODE_HOST, MODE_UNKNOWN, VcpuExits,
};

use super::{
    BTF_FILE, EbpfError,
    exit_names::{exit_name, userspace_name},
    exits::{ExitReason, ExitReasons, KvmFigures},
    layout::{self, LayoutError},
    map,
    mapped::Mapped,
    probes::ProbeState,
    times::ThreadTimes,
};

/// Present while KVM is, as a module or built in.
const KVM: &str = "/sys/module/kvm";
/// The modules that enter guest mode and report it.
const VENDORS: [&str; 2] = ["kvm_intel", "kvm_amd"];
/// Attempts to read figures while they change: exits come some hundred nanoseconds apart at worst.
const ATTEMPTS: u32 = 64;
/// vCPU threads whose exits are counted, for each CPU of the host.
const PLACES_PER_CPU: u32 = 8;
const FEWEST_PLACES: u32 = 256;

/// vCPU threads whose exits are counted on this host: the maps are sized by it. Hosts with more vCPUs than this per CPU
/// are beyond what is usual; those that are followed first are counted.
pub(super) fn places() -> u32 {
    let cpus = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    let wanted = u32::try_from(cpus).unwrap_or(u32::MAX).saturating_mul(PLACES_PER_CPU);
    wanted.clamp(FEWEST_PLACES, HISTOGRAMS)
}

/// What stands in the way of the programs at this moment.
pub(super) fn obstacle(with_sched: bool) -> Option<ProbeState> {
    if !cfg!(target_arch = "x86_64") {
        return Some(ProbeState::Failed("only known for x86-64".to_owned()));
    }
    if !with_sched {
        let reason = "they need the scheduling probes, which do not run; add sched to --probes";
        return Some(ProbeState::Failed(reason.to_owned()));
    }
    (!loaded()).then(|| {
        let reason = "KVM is not loaded; attached once it is (modprobe kvm_intel or kvm_amd)";
        ProbeState::Waiting(reason.to_owned())
    })
}

/// KVM is there.
pub(super) fn loaded() -> bool {
    Path::new(KVM).exists()
}

/// The part of KVM that runs guests on this processor, if it is one that reports entries and exits.
pub(super) fn vendor() -> Option<&'static str> {
    VENDORS.into_iter().find(|module| Path::new("/sys/module").join(module).exists())
}

/// Finds what can be found of KVM's structures, in the type information of the kernel and of its modules.
fn kvm_layout(kernel: &Btf) -> KvmLayout {
    let directory = Path::new(BTF_FILE).with_file_name("");
    // Built in, or a module: the structures are in either.
    let module = |name: &str| {
        let types = std::fs::read(directory.join(name)).ok()?;
        Btf::from_split_bytes(&types, kernel).ok()
    };
    let (kvm, intel, amd) = (module("kvm"), module("kvm_intel"), module("kvm_amd"));
    let at = |btf: &Option<Btf>, structure, field| {
        layout::offset(btf.as_ref().unwrap_or(kernel), structure, field).unwrap_or(0)
    };
    // The tracepoints have a `kvm_vcpu`, the structures of the vendors begin with it.
    let begins_with_vcpu = |btf: &Option<Btf>, structure, field| {
        matches!(layout::offset(btf.as_ref().unwrap_or(kernel), structure, field), Ok(0))
    };
    let mut found = KvmLayout {
        halt_poll_success: at(&kvm, "kvm_vcpu", "stat.generic.halt_poll_success_ns"),
        halt_poll_fail: at(&kvm, "kvm_vcpu", "stat.generic.halt_poll_fail_ns"),
        ..KvmLayout::ZERO
    };
    if begins_with_vcpu(&amd, "vcpu_svm", "vcpu") {
        found.svm_vmcb = at(&amd, "vcpu_svm", "vmcb");
        found.vmcb_exit_code = at(&amd, "vmcb", "control.exit_code");
    }
    if begins_with_vcpu(&intel, "vcpu_vmx", "vcpu") {
        found.vmx_exit_reason = match at(&intel, "vcpu_vmx", "vt.exit_reason") {
            0 => at(&intel, "vcpu_vmx", "exit_reason"),
            since_6_16 => since_6_16,
        };
    }
    found
}

/// The maps of the programs.
pub(super) struct Kvm {
    exits: Mapped<VcpuExits>,
    tables: Mapped<ExitTable>,
    layout: Mapped<KvmLayout>,
    /// How many there are.
    places: usize,
    /// Places in use are below this.
    used: usize,
    /// As of the last read.
    heads: Vec<Option<VcpuExits>>,
    /// Any vCPU was ever seen to enter or leave guest mode.
    fires: bool,
    /// As of the last look at the layout.
    vendor: Option<&'static str>,
}

impl Kvm {
    /// Maps the maps; nothing is counted yet. `kernel`: the type information of the kernel.
    pub(super) fn new(object: &Object, kernel: &Btf) -> Result<Self, EbpfError> {
        let exits: Mapped<VcpuExits> = map(object, "VCPU_EXITS")?;
        let this = Self {
            places: exits.len() as usize,
            exits,
            tables: map(object, "EXIT_TABLES")?,
            layout: map(object, "KVM_LAYOUT")?,
            used: 0,
            heads: Vec::new(),
            fires: false,
            vendor: vendor(),
        };
        this.layout.set(0, kvm_layout(kernel));
        Ok(this)
    }

    /// Finds the structures again if the part of KVM that enters guest mode was loaded meanwhile.
    pub(super) fn look(&mut self) -> Result<(), LayoutError> {
        if self.vendor.is_none() && vendor().is_some() {
            self.vendor = vendor();
            self.layout.set(0, kvm_layout(&layout::kernel_types(Path::new(BTF_FILE))?));
        }
        Ok(())
    }

    /// See [`super::Ebpf::pretend_exits`]: the fields are such as have the same types.
    pub(super) fn pretend(&self, task: &Layout) {
        self.layout.set(
            0,
            KvmLayout {
                svm_vmcb: task.task_cfs_rq,
                vmcb_exit_code: task.cfs_rq_rq,
                vmx_exit_reason: task.task_flags,
                halt_poll_success: task.task_sum_exec_runtime,
                halt_poll_fail: task.task_exec_start,
                reserved: 0,
            },
        );
    }

    /// What cannot be told on this host, and why.
    pub(super) fn caveat(&self) -> Option<&'static str> {
        let layout = self.layout.get(0);
        let reason_known = match self.vendor {
            Some("kvm_intel") => layout.vmx_exit_reason != 0,
            Some(_) => layout.svm_vmcb != 0 && layout.vmcb_exit_code != 0,
            None => {
                return Some(
                    "neither kvm_intel nor kvm_amd is loaded: exits and the time in guest mode are absent unless \
                     this KVM reports them",
                );
            }
        };
        if !reason_known {
            return Some("no type information of KVM's module: every exit has the reason \"other\"");
        }
        (layout.halt_poll_success == 0 || layout.halt_poll_fail == 0)
            .then_some("no type information of KVM's statistics: halt_poll_ns is absent, and part of host_ns")
    }

    /// The thread at this place is followed from now on.
    pub(super) fn follow(&mut self, place: usize) {
        self.used = self.used.max(place + 1);
    }

    /// The thread at this place is not followed any more.
    pub(super) fn forget(&mut self, place: usize) {
        if place < self.places {
            self.exits.set(place, VcpuExits::ZERO);
            self.tables.set(place, ExitTable::ZERO);
        }
        if let Some(head) = self.heads.get_mut(place) {
            *head = None;
        }
    }

    /// Reads the figures of every place.
    pub(super) fn read(&mut self) {
        let used = self.used.min(self.places);
        let mut heads = std::mem::take(&mut self.heads);
        heads.clear();
        heads.extend((0..used).map(|place| self.consistent(place, |_| ()).map(|(head, ())| head)));
        self.fires |= heads.iter().flatten().any(|head| head.mode != MODE_UNKNOWN);
        self.heads = heads;
    }

    /// The figures of a place, and what `rest` reads meanwhile; `None` if they changed at every attempt.
    fn consistent<R>(&self, place: usize, rest: impl Fn(&Self) -> R) -> Option<(VcpuExits, R)> {
        let sequence = || self.exits.word_of(place, 0).load(Ordering::Acquire) & u64::from(u32::MAX);
        (0..ATTEMPTS).find_map(|_| {
            let before = sequence();
            let read = (self.exits.get(place), rest(self));
            fence(Ordering::Acquire);
            (before & 1 == 0 && sequence() == before).then_some(read)
        })
    }

    /// Figures of a thread at the last read. `times` are those of the thread, read at `mono_ns`.
    pub(super) fn figures(&self, place: usize, times: &ThreadTimes, mono_ns: u64) -> Option<KvmFigures> {
        let head = self.heads.get(place).copied().flatten()?;
        let open = if head.mode == MODE_GUEST {
            // The programs know the monotonic clock only, the thread's times are by the scheduler's.
            let ahead = times.sched_ns.wrapping_sub(mono_ns);
            let open = times.on_cpu_ns.wrapping_sub(ahead).wrapping_sub(head.position_ns).cast_signed();
            // Below 0 if it entered guest mode after its times were read.
            u64::try_from(open).unwrap_or(0)
        } else {
            0
        };
        Some(KvmFigures {
            guest_ns: (head.mode != MODE_UNKNOWN).then_some(head.guest_ns + open),
            halt_poll_ns: (head.halt_poll_known != 0).then_some(head.halt_poll_ns),
            exits: self.fires.then_some(head.exits),
            userspace_exits: head.userspace_exits,
            kicks: head.kicks,
            halts: head.halts,
            halts_polled: head.halts_polled,
        })
    }

    /// Exits of a thread by reason, as they are now; `mono_ns` is the time until which an exit in progress counts.
    pub(super) fn reasons(&self, place: usize, mono_ns: u64) -> Option<ExitReasons> {
        if place >= self.used.min(self.places) {
            return None;
        }
        let (head, table) = self.consistent(place, |this| this.tables.get(place))?;
        let in_progress = |at: usize| {
            let is = head.mode == MODE_HOST && usize::try_from(head.reason).is_ok_and(|reason| reason == at);
            if is { mono_ns.saturating_sub(head.since_ns) } else { 0 }
        };
        let guest = table.counts.iter().enumerate().filter(|(_, count)| **count > 0);
        let userspace = table.userspace.iter().enumerate().filter(|(_, count)| **count > 0);
        Some(ExitReasons {
            guest: guest
                .map(|(at, count)| ExitReason {
                    name: exit_name(head.isa, at),
                    count: *count,
                    ns: Some(table.ns[at] + in_progress(at)),
                })
                .collect(),
            userspace: userspace
                .map(|(at, count)| ExitReason { name: userspace_name(at), count: *count, ns: None })
                .collect(),
        })
    }
}
