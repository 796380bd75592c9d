//! What a lab guest consists of, and the libvirt XML that says so. Pure: nothing is started here.

use std::fmt::Write as _;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};

use crate::Accelerator;

/// A guest to boot. `GuestSpec::new` gives one vCPU, 128 MiB, no disk, no NIC.
#[derive(Clone, Debug)]
pub struct GuestSpec {
    /// Name of the domain; also of its files.
    pub name: String,
    /// UUID of the domain; chosen by libvirt if absent.
    pub uuid: Option<String>,
    /// Number of vCPUs.
    pub vcpus: u32,
    /// Number that it can have, further ones plugged in later; absent: as many as it has.
    pub vcpus_max: Option<u32>,
    /// Memory, MiB.
    pub memory_mib: u32,
    /// The workload, in the steps language of `tests/guest/src/script.rs`.
    pub script: String,
    /// Disks.
    pub disks: Vec<DiskSpec>,
    /// Network interfaces.
    pub nics: Vec<NicSpec>,
    /// Period of the balloon's statistics, seconds; 0: none are collected.
    pub balloon_period_s: u32,
    /// The host CPUs of all vCPU threads, as in `0-1,3`; absent: any.
    pub vcpu_pin: Option<String>,
    /// Further elements for `<devices>`, such as spare PCI ports for hotplug.
    pub extra_devices_xml: String,
    /// Whether the guest runs at once.
    pub start: StartState,
}

/// State of a guest after [`crate::Lab::boot`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum StartState {
    /// It boots.
    #[default]
    Running,
    /// QEMU exists, but no instruction of the guest has run; [`crate::Guest::resume`] starts it.
    Paused,
}

/// A disk of a guest.
#[derive(Clone, Debug)]
pub struct DiskSpec {
    /// Name in the guest, such as `vda`.
    pub target: String,
    /// Format of the image.
    pub format: ImageFormat,
    /// QEMU's cache mode: `none`, `directsync`, `writeback`, `writethrough`, `unsafe`.
    pub cache: &'static str,
    /// QEMU's I/O mode: `native`, `threads`, `io_uring`.
    pub io: &'static str,
    /// Capacity, bytes.
    pub size_bytes: u64,
    /// The I/O thread (from 1) that serves the disk; absent: QEMU's main thread.
    pub iothread: Option<u32>,
}

/// Format of a disk image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ImageFormat {
    /// Every block is written, so that a read of the guest is a read of the host.
    Raw,
    /// Nothing is allocated.
    Qcow2,
    /// Nothing is allocated, and a raw image in which every block is written lies below.
    Qcow2OnRaw,
    /// A loop device over such a raw image.
    LoopDevice,
    /// A device-mapper device (`dm-linear`) over such a loop device; needs `dmsetup` and a kernel with device-mapper.
    MappedDevice,
}

/// A network interface of type `ethernet`: a tap in the lab's network namespace.
#[derive(Clone, Debug)]
pub struct NicSpec {
    /// Name of the tap, at most 15 characters.
    pub tap: String,
    /// MAC address in the guest.
    pub mac: [u8; 6],
    /// Address of the host's side of the tap; the guest takes [`NicSpec::guest_address`]. The network is a /24.
    pub host_address: Ipv4Addr,
    /// Who moves the packets.
    pub backend: NicBackend,
}

/// Who moves the packets between tap and guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NicBackend {
    /// QEMU.
    Qemu,
    /// The vhost-net module of the host's kernel.
    Vhost,
}

impl GuestSpec {
    /// A guest that runs `script` on one vCPU.
    #[must_use]
    pub fn new(name: &str, script: &str) -> Self {
        Self {
            name: name.to_owned(),
            uuid: None,
            vcpus: 1,
            vcpus_max: None,
            memory_mib: 128,
            script: script.to_owned(),
            disks: Vec::new(),
            nics: Vec::new(),
            balloon_period_s: 1,
            vcpu_pin: None,
            extra_devices_xml: String::new(),
            start: StartState::Running,
        }
    }
}

impl DiskSpec {
    /// A raw image with direct native I/O: here a request of the guest is a request of the host.
    #[must_use]
    pub fn raw(target: &str, size_bytes: u64) -> Self {
        let (format, target) = (ImageFormat::Raw, target.to_owned());
        Self { target, format, cache: "none", io: "native", size_bytes, iothread: None }
    }
}

impl NicSpec {
    /// The NIC with that number (0 to 255): addresses follow from it, so that the numbers of a lab must differ.
    #[must_use]
    pub fn new(tap: &str, number: u8) -> Self {
        Self {
            tap: tap.to_owned(),
            mac: [0x52, 0x54, 0x00, 0x77, 0x00, number],
            host_address: Ipv4Addr::new(10, 77, number, 1),
            backend: NicBackend::Qemu,
        }
    }

    /// The address that [`NicSpec::net_step`] gives the guest.
    #[must_use]
    pub fn guest_address(&self) -> Ipv4Addr {
        let [a, b, c, _] = self.host_address.octets();
        Ipv4Addr::new(a, b, c, 2)
    }

    /// The script word that configures the NIC in the guest, where it is called `device`, with the host as a known
    /// neighbour: no ARP packet is sent in either direction.
    #[must_use]
    pub fn net_step(&self, device: &str) -> String {
        // libvirt gives a tap the MAC of the guest with 0xfe as the first byte.
        let mut tap_mac = self.mac;
        tap_mac[0] = 0xfe;
        let mac = mac_text(tap_mac);
        format!("net={device},{}/24,{},{mac}", self.guest_address(), self.host_address)
    }
}

impl ImageFormat {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Raw | Self::LoopDevice | Self::MappedDevice => "raw",
            Self::Qcow2 | Self::Qcow2OnRaw => "qcow2",
        }
    }

    /// Type of the disk and attribute of its source, as libvirt has them.
    fn source(self) -> (&'static str, &'static str) {
        match self {
            Self::Raw | Self::Qcow2 | Self::Qcow2OnRaw => ("file", "file"),
            Self::LoopDevice | Self::MappedDevice => ("block", "dev"),
        }
    }
}

/// `52:54:00:…`.
pub(crate) fn mac_text(mac: [u8; 6]) -> String {
    mac.map(|byte| format!("{byte:02x}")).join(":")
}

/// The files a domain refers to.
pub(crate) struct Files<'a> {
    pub(crate) kernel: &'a Path,
    pub(crate) initrd: &'a Path,
    pub(crate) console: &'a Path,
    /// Socket of the second serial port.
    pub(crate) input: &'a Path,
    /// One image per disk of the specification.
    pub(crate) images: Vec<PathBuf>,
    pub(crate) accelerator: Accelerator,
}

/// The domain XML.
pub(crate) fn xml(spec: &GuestSpec, files: &Files<'_>) -> String {
    let uuid = spec.uuid.as_ref().map(|uuid| format!("<uuid>{}</uuid>", escape(uuid))).unwrap_or_default();
    // What a guest in an emulated guest mode takes to boot is 33 s instead of 87 without randomized addresses.
    let command_line = format!(
        "console=ttyS0 quiet loglevel=1 panic=-1 ipv6.disable=1 mitigations=off nokaslr no_timer_check -- \"{}\"",
        spec.script
    );
    let mut devices: String =
        spec.disks.iter().zip(&files.images).map(|(disk, image)| disk_xml(disk, image)).collect();
    devices.extend(spec.nics.iter().map(nic_xml));
    let stats = match spec.balloon_period_s {
        0 => String::new(),
        period => format!("<stats period='{period}'/>"),
    };
    let (virt, cpu) = match files.accelerator {
        Accelerator::Emulated => ("qemu", "<cpu mode='custom'><model>qemu64</model></cpu>"),
        Accelerator::Kvm => ("kvm", "<cpu mode='host-passthrough'/>"),
    };
    format!(
        "<domain type='{virt}'>
 <name>{name}</name>{uuid}<memory unit='MiB'>{memory}</memory><vcpu current='{vcpus}'>{vcpus_max}</vcpu>{threads}
 <os><type arch='x86_64' machine='q35'>hvm</type><kernel>{kernel}</kernel><initrd>{initrd}</initrd>
  <cmdline>{command_line}</cmdline></os>
 <features><acpi/></features>{cpu}
 <devices>{devices}
  <controller type='usb' model='none'/>
  <serial type='file'><source path='{console}'/><target port='0'/></serial>
  <serial type='unix'><source mode='bind' path='{input}'/><target port='1'/></serial>
  <memballoon model='virtio'>{stats}</memballoon>{extra}
 </devices>
</domain>
",
        name = escape(&spec.name),
        memory = spec.memory_mib,
        vcpus = spec.vcpus,
        vcpus_max = spec.vcpus_max.unwrap_or(spec.vcpus),
        threads = threads_xml(spec),
        kernel = path(files.kernel),
        initrd = path(files.initrd),
        command_line = escape(&command_line),
        console = path(files.console),
        input = path(files.input),
        extra = spec.extra_devices_xml,
    )
}

fn threads_xml(spec: &GuestSpec) -> String {
    let mut xml = String::new();
    if let Some(count) = spec.disks.iter().filter_map(|disk| disk.iothread).max() {
        write!(xml, "<iothreads>{count}</iothreads>").expect("writing to a string cannot fail");
    }
    if let Some(cpus) = &spec.vcpu_pin {
        let pin = |vcpu| format!("<vcpupin vcpu='{vcpu}' cpuset='{}'/>", escape(cpus));
        let pins: String = (0..spec.vcpus_max.unwrap_or(spec.vcpus)).map(pin).collect();
        write!(xml, "<cputune>{pins}</cputune>").expect("writing to a string cannot fail");
    }
    xml
}

fn disk_xml(disk: &DiskSpec, image: &Path) -> String {
    let iothread = disk.iothread.map(|number| format!(" iothread='{number}'")).unwrap_or_default();
    let (kind, attribute) = disk.format.source();
    format!(
        "
  <disk type='{kind}' device='disk'>
   <driver name='qemu' type='{}' cache='{}' io='{}' discard='unmap'{iothread}/>
   <source {attribute}='{}'/><target dev='{}' bus='virtio'/></disk>",
        disk.format.name(),
        disk.cache,
        disk.io,
        path(image),
        escape(&disk.target),
    )
}

fn nic_xml(nic: &NicSpec) -> String {
    let backend = match nic.backend {
        NicBackend::Qemu => "qemu",
        NicBackend::Vhost => "vhost",
    };
    format!(
        "
  <interface type='ethernet'><mac address='{}'/><source><ip address='{}' family='ipv4' prefix='24'/></source>
   <target dev='{}'/><model type='virtio'/><driver name='{backend}'/></interface>",
        mac_text(nic.mac),
        nic.host_address,
        escape(&nic.tap),
    )
}

fn path(path: &Path) -> String {
    escape(&path.to_string_lossy())
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('\'', "&apos;").replace('"', "&quot;")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn files<'a>(images: &[&str]) -> Files<'a> {
        Files {
            kernel: Path::new("/k/vmlinuz"),
            initrd: Path::new("/s/initrd"),
            console: Path::new("/s/g.console"),
            input: Path::new("/run/lab/g"),
            images: images.iter().map(PathBuf::from).collect(),
            accelerator: Accelerator::Emulated,
        }
    }

    #[test]
    fn every_part_of_the_specification_is_in_the_xml() {
        let disk = DiskSpec { iothread: Some(1), ..DiskSpec::raw("vda", 1 << 20) };
        let spec = GuestSpec {
            vcpus: 2,
            disks: vec![disk],
            nics: vec![NicSpec::new("tap-g", 3)],
            vcpu_pin: Some("1".into()),
            ..GuestSpec::new("g", "sleep=1 end=idle")
        };
        let xml = xml(&spec, &files(&["/s/g&.raw"]));
        let parts = [
            "-- &quot;sleep=1 end=idle&quot;</cmdline>",
            "<iothreads>1</iothreads>",
            "<vcpupin vcpu='0' cpuset='1'/><vcpupin vcpu='1' cpuset='1'/>",
            "type='raw' cache='none' io='native' discard='unmap' iothread='1'",
            "<source file='/s/g&amp;.raw'/><target dev='vda' bus='virtio'/>",
            "<mac address='52:54:00:77:00:03'/><source><ip address='10.77.3.1' family='ipv4' prefix='24'/>",
            "<stats period='1'/>",
        ];
        for part in parts {
            assert!(xml.contains(part), "{part} is not in {xml}");
        }
    }

    #[test]
    fn the_net_step_names_the_tap_as_a_neighbour() {
        let step = NicSpec::new("tap-g", 3).net_step("eth0");
        assert_eq!(step, "net=eth0,10.77.3.2/24,10.77.3.1,fe:54:00:77:00:03");
    }
}
