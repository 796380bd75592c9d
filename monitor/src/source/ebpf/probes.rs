//! The list of kernel programs: what each hangs on, and what it is for.
//!
//! A row here, the program in `monitor-ebpf`, and the counter it fills are all it takes to add one; a test holds
//! the list against the object.

use crate::record::ProbeInfo;

/// Group of probes that `--probes` switches on or off.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, clap::ValueEnum)]
pub enum ProbeGroup {
    /// Scheduling of the threads of VMs.
    Sched,
    /// Exits of vCPUs; needs `sched`.
    Kvm,
    /// Packets of the network devices of VMs.
    Net,
    /// Requests of VMs on their disk images.
    Block,
}

impl ProbeGroup {
    /// Every group.
    pub const ALL: &[Self] = &[Self::Sched, Self::Kvm, Self::Net, Self::Block];
}

/// What a program hangs on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Attach {
    /// A tracepoint of the kernel image, by BTF (`tp_btf`).
    BtfTracepoint(&'static str),
    /// A tracepoint of the kernel image or of a loaded module, by name (`raw_tp`).
    RawTracepoint(&'static str),
    /// The first of these tracepoints that the kernel image has, by BTF, while a watched disk needs it.
    OnDemand(&'static [&'static str]),
    /// Likewise, and every system call of the host pays for it meanwhile.
    OnDemandDear(&'static str),
    /// An iterator over kernel objects, run when user space asks.
    Iterator(&'static str),
    /// Nothing: user space runs it (`BPF_PROG_TEST_RUN` of a raw tracepoint program, Linux 5.10).
    OnRequest,
}

impl Attach {
    /// What becomes of a program that the kernel takes.
    #[must_use]
    pub const fn attained(self) -> ProbeState {
        match self {
            Self::OnDemand(_) | Self::OnDemandDear(_) => ProbeState::Ready,
            Self::BtfTracepoint(_) | Self::RawTracepoint(_) | Self::Iterator(_) | Self::OnRequest => {
                ProbeState::Attached
            }
        }
    }

    /// In words.
    #[must_use]
    pub const fn describe(self) -> &'static str {
        match self {
            Self::BtfTracepoint(_) => "attached to a kernel tracepoint by BTF (tp_btf)",
            Self::RawTracepoint(_) => "attached to a kernel tracepoint by name (raw_tp)",
            Self::OnDemand(_) => "loads; attached while a disk needs it (tp_btf)",
            Self::OnDemandDear(_) => {
                "loads; attached while a disk with page cache and aio=threads needs it, \
                 costs each system call of the host some 40 ns meanwhile (tp_btf)"
            }
            Self::Iterator(_) => "runs when new threads are followed (BPF iterator)",
            Self::OnRequest => "runs once per tick (BPF_PROG_TEST_RUN)",
        }
    }
}

/// What is lost without the program.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Need {
    /// Its group measures nothing without it.
    Required,
    /// Something is measured less well; the text says what.
    Optional(&'static str),
}

/// One row.
#[derive(Clone, Copy, Debug)]
pub struct Probe {
    /// Name of the program in the object.
    pub program: &'static str,
    /// What it hangs on.
    pub attach: Attach,
    /// The group it belongs to.
    pub group: ProbeGroup,
    /// What is lost without it.
    pub need: Need,
}

/// Every program.
pub const PROBES: &[Probe] = &[
    Probe {
        program: "sched_switch",
        attach: Attach::BtfTracepoint("sched_switch"),
        group: ProbeGroup::Sched,
        need: Need::Required,
    },
    Probe {
        program: "read_threads",
        attach: Attach::OnRequest,
        group: ProbeGroup::Sched,
        need: Need::Required,
    },
    Probe {
        program: "read_processes",
        attach: Attach::OnRequest,
        group: ProbeGroup::Sched,
        need: Need::Required,
    },
    Probe {
        program: "thread_ends",
        attach: Attach::BtfTracepoint("sched_process_exit"),
        group: ProbeGroup::Sched,
        need: Need::Required,
    },
    Probe {
        program: "thread_renamed",
        attach: Attach::BtfTracepoint("task_rename"),
        group: ProbeGroup::Sched,
        need: Need::Optional("a new vCPU is noticed up to a second later"),
    },
    Probe {
        program: "process_began",
        attach: Attach::BtfTracepoint("sched_process_exec"),
        group: ProbeGroup::Sched,
        need: Need::Optional("a new QEMU process is noticed up to a second later"),
    },
    Probe {
        program: "seed_threads",
        attach: Attach::Iterator("task"),
        group: ProbeGroup::Sched,
        need: Need::Optional("a thread that never leaves its CPU is not seen until it does"),
    },
    Probe {
        program: "kvm_userspace_exit",
        attach: Attach::RawTracepoint("kvm_userspace_exit"),
        group: ProbeGroup::Kvm,
        need: Need::Required,
    },
    Probe {
        program: "kvm_exit",
        attach: Attach::RawTracepoint("kvm_exit"),
        group: ProbeGroup::Kvm,
        need: Need::Optional("exits and the time in guest mode are not known"),
    },
    Probe {
        program: "kvm_entry",
        attach: Attach::RawTracepoint("kvm_entry"),
        group: ProbeGroup::Kvm,
        need: Need::Optional("the time in guest mode is not known"),
    },
    Probe {
        program: "kvm_vcpu_wakeup",
        attach: Attach::RawTracepoint("kvm_vcpu_wakeup"),
        group: ProbeGroup::Kvm,
        need: Need::Optional("halts and the time spent polling are not known"),
    },
    Probe {
        program: "net_dev_start_xmit",
        attach: Attach::BtfTracepoint("net_dev_start_xmit"),
        group: ProbeGroup::Net,
        need: Need::Required,
    },
    Probe {
        program: "net_dev_xmit",
        attach: Attach::BtfTracepoint("net_dev_xmit"),
        group: ProbeGroup::Net,
        need: Need::Required,
    },
    Probe {
        program: "netif_receive_skb",
        attach: Attach::BtfTracepoint("netif_receive_skb"),
        group: ProbeGroup::Net,
        need: Need::Required,
    },
    Probe {
        program: "kfree_skb",
        attach: Attach::BtfTracepoint("kfree_skb"),
        group: ProbeGroup::Net,
        need: Need::Optional("drops have no reasons"),
    },
    Probe {
        program: "iomap_dio_rw_begin",
        attach: Attach::OnDemand(&["iomap_dio_rw_begin"]),
        group: ProbeGroup::Block,
        need: Need::Optional(
            "requests on image files with direct I/O are not seen, or only where they are system calls or io_uring",
        ),
    },
    Probe {
        program: "iomap_dio_complete",
        attach: Attach::OnDemand(&["iomap_dio_complete"]),
        group: ProbeGroup::Block,
        need: Need::Optional("as without iomap_dio_rw_begin"),
    },
    Probe {
        program: "block_bio_queue",
        attach: Attach::OnDemand(&["block_bio_queue"]),
        group: ProbeGroup::Block,
        need: Need::Optional("requests on block devices are not seen"),
    },
    Probe {
        program: "block_rq_complete",
        attach: Attach::OnDemand(&["block_rq_complete"]),
        group: ProbeGroup::Block,
        need: Need::Optional("as without block_bio_queue"),
    },
    Probe {
        program: "block_bio_complete",
        attach: Attach::OnDemand(&["block_bio_complete"]),
        group: ProbeGroup::Block,
        need: Need::Optional("as without block_bio_queue"),
    },
    Probe {
        program: "io_uring_submit_req",
        attach: Attach::OnDemand(&["io_uring_submit_req", "io_uring_submit_sqe"]),
        group: ProbeGroup::Block,
        need: Need::Optional("requests by io_uring through the page cache are not seen"),
    },
    Probe {
        program: "io_uring_complete",
        attach: Attach::OnDemand(&["io_uring_complete"]),
        group: ProbeGroup::Block,
        need: Need::Optional("as without io_uring_submit_req"),
    },
    Probe {
        program: "ext4_sync_file_enter",
        attach: Attach::OnDemand(&["ext4_sync_file_enter"]),
        group: ProbeGroup::Block,
        need: Need::Optional("flushes of images on ext4 are not seen"),
    },
    Probe {
        program: "ext4_sync_file_exit",
        attach: Attach::OnDemand(&["ext4_sync_file_exit"]),
        group: ProbeGroup::Block,
        need: Need::Optional("as without ext4_sync_file_enter"),
    },
    Probe {
        program: "ext4_punch_hole",
        attach: Attach::OnDemand(&["ext4_punch_hole"]),
        group: ProbeGroup::Block,
        need: Need::Optional("as without ext4_sync_file_enter"),
    },
    Probe {
        program: "ext4_zero_range",
        attach: Attach::OnDemand(&["ext4_zero_range"]),
        group: ProbeGroup::Block,
        need: Need::Optional("as without ext4_sync_file_enter"),
    },
    Probe {
        program: "block_sys_enter",
        attach: Attach::OnDemandDear("sys_enter"),
        group: ProbeGroup::Block,
        need: Need::Optional("requests by system calls through the page cache are not seen"),
    },
    Probe {
        program: "block_sys_exit",
        attach: Attach::OnDemandDear("sys_exit"),
        group: ProbeGroup::Block,
        need: Need::Optional("as without block_sys_enter"),
    },
];

/// What became of one program.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ProbeState {
    /// Loaded, and attached where it hangs on something.
    Attached,
    /// Loaded; attached while something needs it.
    Ready,
    /// Its group was not asked for.
    Off,
    /// What it hangs on is not there yet; it is attached later. Why.
    Waiting(String),
    /// Refused; the reason.
    Failed(String),
}

impl ProbeState {
    /// As it stands in the stream.
    #[must_use]
    pub fn info(&self, probe: &Probe) -> ProbeInfo {
        let (state, reason) = match (self, probe.need) {
            (Self::Attached, _) => ("attached", None),
            (Self::Ready, _) => ("ready", None),
            (Self::Off, _) => ("off", Some("left out by --probes".to_owned())),
            (Self::Waiting(why), _) => ("waiting", Some(why.clone())),
            (Self::Failed(why), Need::Optional(lost)) => {
                ("failed", Some(format!("{why}; without it, {lost}")))
            }
            (Self::Failed(why), Need::Required) => ("failed", Some(why.clone())),
        };
        ProbeInfo { name: probe.program, state, reason }
    }
}
