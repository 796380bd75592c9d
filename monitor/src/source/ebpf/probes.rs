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
}

impl ProbeGroup {
    /// Every group.
    pub const ALL: &[Self] = &[Self::Sched, Self::Kvm, Self::Net];
}

/// What a program hangs on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Attach {
    /// A tracepoint of the kernel image, by BTF (`tp_btf`).
    BtfTracepoint(&'static str),
    /// A tracepoint of the kernel image or of a loaded module, by name (`raw_tp`).
    RawTracepoint(&'static str),
    /// An iterator over kernel objects, run when user space asks.
    Iterator(&'static str),
    /// Nothing: user space runs it (`BPF_PROG_TEST_RUN` of a raw tracepoint program, Linux 5.10).
    OnRequest,
}

impl Attach {
    /// In words.
    #[must_use]
    pub const fn describe(self) -> &'static str {
        match self {
            Self::BtfTracepoint(_) => "attached to a kernel tracepoint by BTF (tp_btf)",
            Self::RawTracepoint(_) => "attached to a kernel tracepoint by name (raw_tp)",
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
        need: Need::Optional(
            "what a guest receives is not counted as packets on the wire, and without VLAN tags that are not in the packet",
        ),
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
];

/// What became of one program.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ProbeState {
    /// Loaded, and attached where it hangs on something.
    Attached,
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
