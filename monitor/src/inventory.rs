//! Which domains exist, and what belongs to each: QEMU process, vCPU threads, disks, interfaces, memory.
//!
//! Plain typed values, filled in by the sources (libvirt's domain XML, or `/proc` where libvirt is away). Knows
//! no metric and reads nothing itself.

use crate::units::{DomainUuid, Tgid, Tid, VcpuIndex};

/// A QEMU process, with what makes a reused process id visible.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct QemuProcess {
    /// Process id.
    pub tgid: Tgid,
    /// Field 22 of `/proc/PID/stat`: clock ticks after boot when the process started.
    pub start_time_ticks: u64,
}

/// Who told of a domain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FoundBy {
    /// libvirt lists it.
    Libvirt,
    /// A QEMU process found under `/proc`.
    Procfs,
}

/// State of a domain as libvirt names it (`virDomainState`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum DomainState {
    /// Not told (without libvirt, or `VIR_DOMAIN_NOSTATE`).
    #[default]
    Unknown,
    /// Running.
    Running,
    /// Waiting for a resource (Xen only, kept for completeness).
    Blocked,
    /// Paused by an administrator, a migration or an I/O error.
    Paused,
    /// The guest is shutting down.
    ShuttingDown,
    /// Shut off.
    Shutoff,
    /// The guest crashed.
    Crashed,
    /// Suspended to memory by the guest.
    Suspended,
}

impl DomainState {
    /// The name in records.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Unknown => "unknown",
            Self::Running => "running",
            Self::Blocked => "blocked",
            Self::Paused => "paused",
            Self::ShuttingDown => "shutting_down",
            Self::Shutoff => "shutoff",
            Self::Crashed => "crashed",
            Self::Suspended => "suspended",
        }
    }
}

/// Whether QEMU answers libvirt.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum MonitorState {
    /// It does, or nobody asked.
    #[default]
    Answers,
    /// Its monitor does not: stopped, stuck in I/O, or a guest that lets its main loop no time.
    Silent,
    /// libvirt lets a long job (migration, save, dump) finish before it asks anything else.
    InJob,
}

impl MonitorState {
    /// The name in records; absent if all is well.
    #[must_use]
    pub const fn name(self) -> Option<&'static str> {
        match self {
            Self::Answers => None,
            Self::Silent => Some("silent"),
            Self::InJob => Some("in_job"),
        }
    }
}

/// One domain.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Domain {
    /// Identity.
    pub uuid: DomainUuid,
    /// Name; text a tenant may have chosen.
    pub name: String,
    /// libvirt's id of this run, absent without libvirt.
    pub id: Option<u32>,
    /// Last state told.
    pub state: DomainState,
    /// Whether QEMU answers libvirt.
    pub monitor: MonitorState,
    /// `<title>`; text a tenant may have chosen.
    pub title: Option<String>,
    /// Identity given by a management layer, from `<metadata>`.
    pub owner: Owner,
    /// `kvm`, `qemu`, … (`<domain type=…>`).
    pub virt_type: Option<String>,
    /// The process that runs it, once found.
    pub process: Option<QemuProcess>,
    /// Its vCPUs that are online, ascending.
    pub vcpus: Vec<Vcpu>,
    /// How many it can have.
    pub vcpus_max: Option<u32>,
    /// Limits of its CPU time (`<cputune>`), by libvirt's name with the unit: `shares`, `quota_us`, …; sorted.
    pub cpu_limits: Vec<(String, u64)>,
    /// Its network interfaces, in the order of the source.
    pub interfaces: Vec<Interface>,
    /// Its disks, in the order of the source.
    pub disks: Vec<Disk>,
    /// `<memory>`: what it may have at most, bytes.
    pub memory_max_bytes: Option<u64>,
    /// `<currentMemory>`: what the balloon gives it, bytes.
    pub memory_current_bytes: Option<u64>,
    /// Its balloon device.
    pub balloon: Option<Balloon>,
    /// Who told of it.
    pub found_by: FoundBy,
}

/// Who runs a domain, by what a management layer left in its metadata, its name or QEMU's command line.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Owner {
    /// `nova`, `ovirt`, `kubevirt` or `proxmox`.
    pub manager: Option<&'static str>,
    /// Its identity of the instance, where that is not the domain's UUID: KubeVirt's uid, Proxmox's VMID.
    pub instance_id: Option<String>,
    /// Name of the instance as its user sees it.
    pub instance_name: Option<String>,
    /// Flavor name.
    pub flavor: Option<String>,
    /// Project name (Nova), namespace (KubeVirt).
    pub project: Option<String>,
    /// Identity of the project.
    pub project_id: Option<String>,
    /// User name.
    pub user: Option<String>,
    /// Identity of the user.
    pub user_id: Option<String>,
    /// Identity of the image it was made from.
    pub image_id: Option<String>,
    /// Version of the cluster's interface (oVirt).
    pub cluster_version: Option<String>,
}

/// One vCPU.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Vcpu {
    /// Its number.
    pub index: VcpuIndex,
    /// Its thread, once found.
    pub tid: Option<Tid>,
    /// CPUs it is pinned to (`<vcpupin cpuset=…>`), as written.
    pub affinity: Option<String>,
}

/// One network interface.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Interface {
    /// Host device (`<target dev=…>`), for example `vnet0`; empty if it has none.
    pub device: String,
    /// Index of the host device, once found.
    pub ifindex: Option<u32>,
    /// Network namespace of the host device (inode number of `/proc/PID/ns/net`), once found.
    pub netns: Option<u32>,
    /// `CLOCK_MONOTONIC` at which the kernel programs began to count the device, nanoseconds.
    pub since_ns: Option<u64>,
    /// MAC address of the guest's side, lower case.
    pub mac: Option<String>,
    /// libvirt's name of the guest's device (`<alias name=…>`), for example `net0`.
    pub alias: Option<String>,
    /// `ethernet`, `bridge`, `network`, `direct`, `hostdev`, `user`, `vhostuser`, ….
    pub kind: String,
    /// Bridge, network or device it is connected to.
    pub source: Option<String>,
    /// Bridge of the host it is connected to, if to one.
    pub bridge: Option<String>,
    /// Identity of the port it is connected to (`interfaceid` of `<virtualport>`).
    pub interface_id: Option<String>,
    /// Limits of its traffic (`<bandwidth>`), as seen from the guest, by name with the unit; sorted.
    pub limits: Vec<(String, u64)>,
    /// PCI address of the host's device that the guest was given (`0000:03:10.2`), if it was given one.
    pub host_pci: Option<String>,
    /// Device model (`virtio`, `e1000e`, …).
    pub model: Option<String>,
    /// Number of queue pairs, 1 if not told.
    pub queues: u32,
    /// Name of its network filter.
    pub filterref: Option<String>,
    /// Parameters of the filter or the virtual port, sorted by name.
    pub parameters: Vec<(String, String)>,
    /// Whether its traffic passes a host network device.
    pub observable: Observable,
}

/// One disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Disk {
    /// Guest target (`<target dev=…>`), for example `vda`.
    pub target: String,
    /// File, device, volume or network name.
    pub source: Option<String>,
    /// `file`, `block`, `network`, `volume`, ….
    pub source_type: String,
    /// `disk`, `cdrom`, `floppy`, `lun`.
    pub device: String,
    /// `virtio`, `scsi`, `sata`, ….
    pub bus: Option<String>,
    /// Image format (`raw`, `qcow2`, …).
    pub format: Option<String>,
    /// Cache mode as written.
    pub cache: Option<String>,
    /// AIO mode as written.
    pub io: Option<String>,
    /// Number of its iothread.
    pub iothread: Option<u32>,
    /// Serial number.
    pub serial: Option<String>,
    /// Sources below the top image, nearest first.
    pub backing_chain: Vec<String>,
    /// Where a block job is writing the disk to (`<mirror>`): the target of a copy, or the image that the one on top is
    /// committed to. `None` while there is no such job.
    pub mirror: Option<String>,
    /// Limits of its requests (`<iotune>`), by libvirt's name (`total_bytes_sec`, `read_iops_sec`, …); sorted.
    pub limits: Vec<(String, u64)>,
    /// Disks with the same name share the limits.
    pub limits_group: Option<String>,
    /// Whether its I/O passes the host's file or block layer.
    pub observable: Observable,
}

/// Whether the host's kernel sees the traffic of a device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Observable {
    /// It does.
    Yes,
    /// It does not; the text says why.
    No(&'static str),
}

/// The balloon device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Balloon {
    /// `virtio`, `none`, ….
    pub model: String,
    /// Period at which the guest reports its memory statistics, seconds; 0 = it does not.
    pub stats_period_s: u32,
}
