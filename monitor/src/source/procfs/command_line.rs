//! The command line of a QEMU process, as people, libvirt and Proxmox write it: identity, memory, disks.
//!
//! Pure. What a command line says was true at the start of the process: disks may have come and gone since.

use std::collections::HashMap;

use serde_json::Value;

use crate::units::DomainUuid;

/// What a QEMU command line says of its domain.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct QemuArgs {
    /// `-name NAME` or `-name guest=NAME,…`.
    pub name: Option<String>,
    /// `-uuid UUID`, else the one of `-smbios type=1,uuid=UUID`.
    pub uuid: Option<DomainUuid>,
    /// Hardware virtualization is asked for (`-enable-kvm`, `-accel kvm`, `accel=kvm`); else QEMU emulates.
    pub kvm: bool,
    /// `-id NUMBER`, which Proxmox's QEMU knows: its VMID.
    pub proxmox_id: Option<String>,
    /// `-m`, bytes.
    pub memory_bytes: Option<u64>,
    /// Disks whose file is named.
    pub drives: Vec<Drive>,
}

/// A disk of a command line.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Drive {
    /// Id of the guest's device, else of the drive.
    pub id: Option<String>,
    /// File or device.
    pub file: String,
    /// `raw`, `qcow2`, ….
    pub format: Option<String>,
    /// Cache mode as written.
    pub cache: Option<String>,
    /// AIO mode as written.
    pub io: Option<String>,
    /// `cdrom` or `disk`.
    pub device: &'static str,
    /// The guest may not write.
    pub read_only: bool,
}

/// Reads a QEMU command line; `None` if the program is not QEMU.
#[must_use]
pub fn parse_command_line(args: &[String]) -> Option<QemuArgs> {
    let program = args.first()?.rsplit('/').next()?;
    if !(program.starts_with("qemu-system-") || matches!(program, "qemu-kvm" | "kvm" | "qemu")) {
        return None;
    }
    let mut found = QemuArgs::default();
    let mut smbios_uuid = None;
    let mut blocks = Blocks::default();
    for (option, value) in args.iter().zip(args.iter().skip(1).map(String::as_str).chain([""])) {
        let Some(option) = option.strip_prefix('-') else { continue };
        match option.trim_start_matches('-') {
            "name" => found.name = Some(guest_name(value)),
            "uuid" => found.uuid = value.parse().ok(),
            "smbios" => {
                smbios_uuid = smbios_uuid.or(Words::of(value).get("uuid").and_then(|u| u.parse().ok()))
            }
            "id" => found.proxmox_id = Some(value.to_owned()),
            "m" => found.memory_bytes = memory(value),
            "enable-kvm" => found.kvm = true,
            "accel" if value.split([',', ':']).any(|v| v == "kvm") => found.kvm = true,
            // libvirt asks QEMU for its capabilities this way: no guest is ever run.
            "machine" | "M" if value.split(',').any(|v| v == "none") => return None,
            "machine" | "M" if value.split(',').any(|v| v.starts_with("accel=kvm")) => found.kvm = true,
            "drive" => blocks.drive(value),
            "blockdev" => blocks.node(value),
            "device" => blocks.device(value),
            "cdrom" => blocks.plain(option, value, "cdrom"),
            "hda" | "hdb" | "hdc" | "hdd" | "sd" | "mtdblock" => blocks.plain(option, value, "disk"),
            _ => {}
        }
    }
    found.kvm |= program == "kvm" || program == "qemu-kvm";
    found.uuid = found.uuid.or(smbios_uuid);
    found.drives = blocks.finish();
    Some(found)
}

/// The value of `-name`: `NAME`, `guest=NAME,debug-threads=on`; a comma in the name is doubled.
fn guest_name(value: &str) -> String {
    let words = Words::of(value);
    words.get("guest").or_else(|| words.first()).unwrap_or_default().to_owned()
}

/// `512`, `2G`, `size=2G,slots=4`; MiB if no unit is written.
fn memory(value: &str) -> Option<u64> {
    let words = Words::of(value);
    let size = words.get("size").or_else(|| words.first())?;
    let digits = size.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let unit = match &size[digits.len()..] {
        "" | "M" | "m" => 1 << 20,
        "k" | "K" => 1 << 10,
        "G" | "g" => 1 << 30,
        "T" | "t" => 1 << 40,
        "b" | "B" => 1,
        _ => return None,
    };
    digits.parse::<u64>().ok()?.checked_mul(unit)
}

/// `a,b=c,d=e,,f`: words with and without a key; a doubled comma is one of the word.
struct Words(Vec<(Option<String>, String)>);

impl Words {
    fn of(value: &str) -> Self {
        const COMMA: &str = "\u{0}";
        let value = value.replace(",,", COMMA);
        let word = |word: &str| match word.split_once('=') {
            Some((key, value)) => (Some(key.to_owned()), value.replace(COMMA, ",")),
            None => (None, word.replace(COMMA, ",")),
        };
        Self(value.split(',').map(word).collect())
    }

    fn get(&self, key: &str) -> Option<&str> {
        self.0.iter().find(|(k, _)| k.as_deref() == Some(key)).map(|(_, value)| value.as_str())
    }

    /// A first word without a key.
    fn first(&self) -> Option<&str> {
        self.0.first().filter(|(key, _)| key.is_none()).map(|(_, value)| value.as_str())
    }

    fn owned(&self, key: &str) -> Option<String> {
        self.get(key).map(str::to_owned)
    }
}

/// What belongs to disks, until all of the line is known.
#[derive(Default)]
struct Blocks {
    drives: Vec<Drive>,
    /// Nodes of `-blockdev` by name.
    nodes: HashMap<String, Node>,
    /// Devices of the guest: kind, the drive or node it has, its id.
    devices: Vec<(String, String, Option<String>)>,
}

/// A node of QEMU's block layer.
struct Node {
    driver: Option<String>,
    file: Option<String>,
    /// The node below.
    below: Option<String>,
    io: Option<String>,
    direct: bool,
    read_only: bool,
}

impl Blocks {
    fn plain(&mut self, option: &str, file: &str, device: &'static str) {
        let id = Some(option.to_owned());
        self.drives.push(Drive { id, file: file.to_owned(), device, ..Drive::default() });
    }

    fn drive(&mut self, value: &str) {
        let words = Words::of(value);
        let Some(file) = words.owned("file").filter(|file| !file.is_empty()) else { return };
        self.drives.push(Drive {
            id: words.owned("id"),
            file,
            format: words.owned("format"),
            cache: words.owned("cache"),
            io: words.owned("aio"),
            device: if words.get("media") == Some("cdrom") { "cdrom" } else { "disk" },
            read_only: ["readonly", "read-only"].iter().any(|key| words.get(key) == Some("on")),
        });
    }

    /// JSON, as libvirt writes it, or words.
    fn node(&mut self, value: &str) {
        let json = serde_json::from_str::<Value>(value).ok();
        let words = Words::of(value);
        let get = |key: &str| match &json {
            Some(json) => json[key].as_str().map(str::to_owned),
            None => words.owned(key),
        };
        let Some(name) = get("node-name") else { return };
        let direct = match &json {
            Some(json) => json["cache"]["direct"].as_bool() == Some(true),
            None => words.get("cache.direct") == Some("on"),
        };
        let read_only = match &json {
            Some(json) => json["read-only"].as_bool() == Some(true),
            None => words.get("read-only") == Some("on"),
        };
        let (driver, file, below, io) = (get("driver"), get("filename"), get("file"), get("aio"));
        self.nodes.insert(name, Node { driver, file, below, io, direct, read_only });
    }

    /// As for nodes.
    fn device(&mut self, value: &str) {
        let json = serde_json::from_str::<Value>(value).ok();
        let words = Words::of(value);
        let (kind, drive, id) = match &json {
            Some(json) => {
                let get = |key: &str| json[key].as_str().map(str::to_owned);
                (get("driver"), get("drive"), get("id"))
            }
            None => (words.first().map(str::to_owned), words.owned("drive"), words.owned("id")),
        };
        if let (Some(kind), Some(drive)) = (kind, drive) {
            self.devices.push((kind, drive, id));
        }
    }

    fn finish(mut self) -> Vec<Drive> {
        for (kind, drive, id) in std::mem::take(&mut self.devices) {
            if let Some(known) = self.drives.iter_mut().find(|d| d.id.as_ref() == Some(&drive)) {
                known.id = id.or(known.id.take());
            } else if let Some(drive) = self.drive_of_node(&kind, drive, id) {
                self.drives.push(drive);
            }
        }
        self.drives
    }

    /// The file is at the lowest node, the format at the highest.
    fn drive_of_node(&self, kind: &str, name: String, id: Option<String>) -> Option<Drive> {
        let top = self.nodes.get(&name)?;
        let mut node = top;
        // A chain that bites its tail ends, too.
        for _ in 0..self.nodes.len() {
            let Some(below) = node.below.as_ref().and_then(|below| self.nodes.get(below)) else { break };
            node = below;
        }
        Some(Drive {
            id: id.or(Some(name)),
            file: node.file.clone()?,
            format: top.driver.clone(),
            cache: node.direct.then(|| "none".to_owned()),
            io: node.io.clone(),
            device: if kind.ends_with("-cd") { "cdrom" } else { "disk" },
            read_only: top.read_only,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn args(line: &str) -> Option<QemuArgs> {
        parse_command_line(&line.split_whitespace().map(str::to_owned).collect::<Vec<_>>())
    }

    #[test]
    fn command_lines_of_libvirt_and_by_hand() {
        let libvirt = args(
            r#"/usr/bin/qemu-system-x86_64 -name guest=web,,1,debug-threads=on -S -accel tcg -m size=65536k
             -uuid 4d5e0e2b-3c1f-4a7b-9d8e-0123456789ab -display none
             -blockdev {"driver":"file","filename":"/srv/base.raw","node-name":"libvirt-2-storage"}
             -blockdev {"node-name":"libvirt-2-format","read-only":true,"driver":"raw","file":"libvirt-2-storage"}
             -blockdev {"driver":"file","filename":"/srv/web.qcow2","aio":"native","node-name":"libvirt-1-storage","cache":{"direct":true}}
             -blockdev {"node-name":"libvirt-1-format","driver":"qcow2","file":"libvirt-1-storage","backing":"libvirt-2-format"}
             -device {"driver":"virtio-blk-pci","drive":"libvirt-1-format","id":"virtio-disk0"}"#,
        );
        let libvirt = libvirt.unwrap();
        assert_eq!(libvirt.name.as_deref(), Some("web,1"));
        assert_eq!(libvirt.uuid.unwrap().to_string(), "4d5e0e2b-3c1f-4a7b-9d8e-0123456789ab");
        assert_eq!((libvirt.kvm, libvirt.memory_bytes, libvirt.proxmox_id), (false, Some(64 << 20), None));
        let disk = Drive {
            id: Some("virtio-disk0".into()),
            file: "/srv/web.qcow2".into(),
            format: Some("qcow2".into()),
            cache: Some("none".into()),
            io: Some("native".into()),
            device: "disk",
            read_only: false,
        };
        assert_eq!(libvirt.drives, [disk]);
        let plain =
            args("qemu-system-x86_64 -machine q35,accel=kvm:tcg -name a -hda x.img -cdrom y.iso -m 1G")
                .unwrap();
        assert_eq!((plain.name.as_deref(), plain.uuid, plain.kvm), (Some("a"), None, true));
        assert_eq!(plain.memory_bytes, Some(1 << 30));
        let drives: Vec<_> =
            plain.drives.iter().map(|d| (d.id.as_deref(), d.file.as_str(), d.device)).collect();
        assert_eq!(drives, [(Some("hda"), "x.img", "disk"), (Some("cdrom"), "y.iso", "cdrom")]);
        assert_eq!(args("/usr/sbin/libvirtd -d"), None);
        assert_eq!(args("qemu-img create"), None);
        assert_eq!(args("/usr/bin/qemu-system-x86_64 -S -nodefaults -machine none,accel=kvm:tcg"), None);
    }

    #[test]
    fn command_lines_of_proxmox() {
        let proxmox = args(
            "/usr/bin/kvm -id 100 -name build,debug-threads=on -no-shutdown -m 2048
             -smbios type=1,uuid=4d5e0e2b-3c1f-4a7b-9d8e-0123456789ab
             -drive file=/dev/pve/vm-100-disk-0,if=none,id=drive-scsi0,cache=none,format=raw,aio=io_uring
             -device scsi-hd,bus=scsihw0.0,drive=drive-scsi0,id=scsi0,bootindex=100
             -drive if=none,id=drive-ide2,media=cdrom,aio=io_uring",
        );
        let proxmox = proxmox.unwrap();
        assert_eq!((proxmox.name.as_deref(), proxmox.kvm), (Some("build"), true));
        assert_eq!((proxmox.proxmox_id.as_deref(), proxmox.memory_bytes), (Some("100"), Some(2 << 30)));
        assert_eq!(proxmox.uuid.unwrap().to_string(), "4d5e0e2b-3c1f-4a7b-9d8e-0123456789ab");
        let [disk] = proxmox.drives.as_slice() else { panic!("{:?}", proxmox.drives) };
        assert_eq!((disk.id.as_deref(), disk.file.as_str()), (Some("scsi0"), "/dev/pve/vm-100-disk-0"));
        assert_eq!((disk.cache.as_deref(), disk.io.as_deref()), (Some("none"), Some("io_uring")));
    }

    #[test]
    fn odd_ends_are_no_panic() {
        assert_eq!(args("qemu-system-x86_64 -name").unwrap().name.as_deref(), Some(""));
        assert_eq!(parse_command_line(&[]), None);
        assert_eq!(args("qemu-system-x86_64 -m 99999999999999999999G").unwrap().memory_bytes, None);
        assert_eq!(args("qemu-system-x86_64 -m 99999999999999G").unwrap().memory_bytes, None);
        let circle = r#"qemu-system-x86_64 -blockdev {"node-name":"a","file":"b"} -blockdev {"node-name":"b","file":"a"}
            -device virtio-blk-pci,drive=a"#;
        assert_eq!(args(circle).unwrap().drives, []);
    }
}
