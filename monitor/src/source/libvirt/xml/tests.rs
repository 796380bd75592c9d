use super::*;
use crate::inventory::Owner;

const PLAIN: &str = include_str!("../../../../../tests/fixtures/xml/plain.xml");
const OPENSTACK: &str = include_str!("../../../../../tests/fixtures/xml/openstack.xml");
const HOTPLUG: &str = include_str!("../../../../../tests/fixtures/xml/hotplug.xml");
const ODD_NAMES: &str = include_str!("../../../../../tests/fixtures/xml/odd-names.xml");

fn minimal(body: &str) -> String {
    format!("<domain><name>n</name><uuid>00112233445566778899aabbccddeeff</uuid>{body}</domain>")
}

fn pair(name: &str, value: &str) -> (String, String) {
    (name.into(), value.into())
}

#[test]
fn plain_guest() {
    let domain = parse_domain(PLAIN).unwrap();
    assert_eq!(domain.name, "plain");
    assert!(domain.id.is_some());
    assert_eq!(domain.title.as_deref(), Some("a small one"));
    assert_eq!(domain.virt_type.as_deref(), Some("qemu"));
    assert_eq!(domain.owner, Owner::default());
    assert_eq!((domain.memory_max_bytes, domain.memory_current_bytes), (Some(64 << 20), Some(64 << 20)));
    let vcpus: Vec<_> = domain.vcpus.iter().map(|v| (v.index.0, v.affinity.as_deref())).collect();
    assert_eq!(vcpus, [(0, None), (1, Some("0-1"))]);
    assert_eq!(domain.balloon, Some(Balloon { model: "virtio".into(), stats_period_s: 1 }));

    let [vda, sda] = domain.disks.as_slice() else { panic!("{:?}", domain.disks) };
    assert_eq!(vda.source.as_deref(), Some("/var/lib/libvirt/images/a.s1"));
    assert_eq!(vda.backing_chain, ["/var/lib/libvirt/images/a.raw"]);
    assert_eq!((vda.cache.as_deref(), vda.io.as_deref()), (Some("none"), Some("native")));
    assert_eq!((vda.format.as_deref(), vda.serial.as_deref()), (Some("qcow2"), Some("S1")));
    assert_eq!(vda.observable, Observable::Yes);
    assert_eq!((sda.device.as_str(), &sda.source), ("cdrom", &None));
    assert_eq!(sda.observable, Observable::No("no medium"));

    let [tap, user] = domain.interfaces.as_slice() else { panic!("{:?}", domain.interfaces) };
    assert_eq!((tap.device.as_str(), tap.kind.as_str(), tap.queues), ("vnet0", "ethernet", 1));
    assert_eq!(tap.observable, Observable::Yes);
    assert_eq!((user.device.as_str(), user.kind.as_str()), ("", "user"));
    assert!(matches!(user.observable, Observable::No(why) if why.contains("user-mode")));
}

#[test]
fn openstack_guest() {
    let domain = parse_domain(OPENSTACK).unwrap();
    assert_eq!((domain.id, domain.virt_type.as_deref()), (Some(17), Some("kvm")));
    assert_eq!(
        domain.owner,
        Owner {
            manager: Some("nova"),
            instance_name: Some("web & mail ✉".into()),
            flavor: Some("m1.large".into()),
            project: Some("shop".into()),
            user: Some("alice".into()),
            ..domain.owner.clone()
        }
    );
    let affinity: Vec<_> = domain.vcpus.iter().map(|v| v.affinity.as_deref().unwrap()).collect();
    assert_eq!(affinity, ["2", "3,5", "4-9,^6", "2-9"]);

    let [rbd, block] = domain.disks.as_slice() else { panic!("{:?}", domain.disks) };
    assert_eq!(rbd.source.as_deref(), Some("rbd:vms/9f5b2c1e-7d34-4e5a-8a2b-6f0c1d2e3f40_disk"));
    assert!(matches!(rbd.observable, Observable::No(why) if why.contains("network disk")));
    assert_eq!(block.source_type, "block");
    assert_eq!((block.observable.clone(), block.backing_chain.len()), (Observable::Yes, 0));
}

#[test]
fn openstack_interfaces() {
    let domain = parse_domain(OPENSTACK).unwrap();
    let [ovs, bridge, vhostuser, hostdev, direct] = domain.interfaces.as_slice() else { panic!() };
    assert_eq!(ovs.mac.as_deref(), Some("fa:16:3e:1c:2d:3e"));
    assert_eq!((ovs.queues, ovs.source.as_deref()), (4, Some("br-int")));
    assert_eq!(
        ovs.parameters,
        [
            pair("virtualport.interfaceid", "0c1d2e3f-4051-6273-8495-a6b7c8d9eafb"),
            pair("virtualport.type", "openvswitch")
        ]
    );
    assert_eq!(bridge.filterref.as_deref(), Some("nova-instance-instance-0000002a-fa163eaabbcc"));
    assert_eq!(
        bridge.parameters,
        [
            pair("DHCPSERVER", "198.51.100.2"),
            pair("IP", "198.51.100.17"),
            pair("IP", "198.51.100.18"),
            pair("PROJNET", "198.51.100.0")
        ]
    );
    assert_eq!(vhostuser.device, "vhu2e3f4051-62");
    for (interface, word) in [(vhostuser, "vhost-user"), (hostdev, "passed through")] {
        assert!(matches!(interface.observable, Observable::No(why) if why.contains(word)), "{interface:?}");
    }
    assert_eq!((hostdev.host_pci.as_deref(), direct.host_pci.as_deref()), (Some("0000:03:10.2"), None));
    assert_eq!((direct.source.as_deref(), direct.observable.clone()), (Some("ens5f0"), Observable::Yes));
}

#[test]
fn holes_backing_chains_and_other_disks() {
    let domain = parse_domain(HOTPLUG).unwrap();
    let vcpus: Vec<_> = domain.vcpus.iter().map(|v| (v.index.0, v.affinity.as_deref())).collect();
    assert_eq!(vcpus, [(0, None), (2, None), (5, Some("0,2-3"))]);
    assert_eq!((domain.memory_max_bytes, domain.memory_current_bytes), (Some(4 << 30), Some(2 << 30)));

    assert_eq!(domain.disks[0].backing_chain, ["/srv/vm/middle.qcow2", "/dev/vg0/base", "nbd:export"]);
    assert_eq!(domain.disks[0].iothread, Some(2));
    let mirrors: Vec<_> = domain.disks.iter().map(|d| d.mirror.as_deref()).collect();
    assert_eq!(mirrors, [Some("/srv/vm/copy.qcow2"), None, None, None, None, None]);
    let disks: Vec<_> = domain
        .disks
        .iter()
        .map(|d| (d.target.as_str(), d.source.as_deref(), d.observable == Observable::Yes))
        .collect();
    assert_eq!(
        disks,
        [
            ("sda", Some("/srv/vm/top.qcow2"), true),
            ("vda", Some("fast/data.img"), true),
            ("fda", Some("/srv/floppy"), true),
            ("vdb", None, false),
            ("vdc", Some("/var/run/spdk/vhost.0"), false),
            ("sdb", Some("/dev/sdq"), true),
        ]
    );
    let sources: Vec<_> = domain.interfaces.iter().map(|i| i.source.as_deref()).collect();
    assert_eq!(sources, [Some("default"), Some("br0"), None]);
    assert_eq!(domain.balloon, Some(Balloon { model: "none".into(), stats_period_s: 0 }));
}

#[test]
fn text_a_tenant_chose_arrives_as_it_is() {
    let domain = parse_domain(ODD_NAMES).unwrap();
    assert_eq!(domain.name, "a<b>&\"c'\ttab\nline\u{202e}rtl 名前 <&>end");
    assert_eq!(domain.title.as_deref(), Some("\u{7f}del  rest 😀"));
    assert_eq!(domain.uuid.to_string(), "01234567-89ab-cdef-0123-456789abcdef");
    assert_eq!(domain.owner.instance_name.as_deref(), Some("\n{\"type\":\"summary\"}"));
    assert_eq!((domain.owner.flavor, domain.owner.user.as_deref()), (None, Some("Zoë")));
    assert_eq!(domain.memory_max_bytes, Some(64 << 20));
    assert_eq!(domain.memory_current_bytes, Some(50_000_000_u64.div_ceil(1024) * 1024));
    assert_eq!(domain.disks[0].source.as_deref(), Some("/srv/a b\nc/<x>.img"));
    let devices: Vec<_> =
        domain.interfaces.iter().map(|i| (i.device.as_str(), i.observable == Observable::Yes)).collect();
    assert_eq!(devices, [("ü&t", true), ("", false)]);
    assert_eq!(domain.interfaces[0].parameters, [pair("A\nB", "\"")]);
}

#[test]
fn units_as_libvirt_scales_them() {
    for (unit, expected) in [
        ("", Some(1024)),
        ("b", Some(1)),
        ("bytes", Some(1)),
        ("KB", Some(1000)),
        ("k", Some(1024)),
        ("KiB", Some(1024)),
        ("MB", Some(1_000_000)),
        ("m", Some(1 << 20)),
        ("GiB", Some(1 << 30)),
        ("T", Some(1 << 40)),
        ("PB", Some(1_000_000_000_000_000)),
        ("EiB", Some(1 << 60)),
        ("Kib", Some(1024)),
        ("KiBs", None),
        ("x", None),
        ("é", None),
        ("ZiB", None),
    ] {
        assert_eq!(unit_bytes(unit), expected, "{unit}");
    }
}

#[test]
fn what_is_wrong_is_named() {
    for (xml, expected) in [
        ("", "domain XML cannot be parsed"),
        ("<domain><name>n</name>", "domain XML cannot be parsed"),
        ("<!DOCTYPE d [<!ENTITY a 'b'>]><domain/>", "domain XML cannot be parsed"),
        ("<network/>", "expected a <domain> document, found <network>"),
        ("<domain xmlns='urn:x'/>", "expected a <domain> document, found <domain>"),
        ("<domain/>", "domain XML has no <name>"),
        ("<domain><name/><uuid/></domain>", "domain XML has no <name>"),
        ("<domain><name>n</name></domain>", "domain XML has no <uuid>"),
        (
            "<domain><name>n</name><uuid>7</uuid></domain>",
            "domain XML: <uuid> has the unexpected value \"7\"",
        ),
    ] {
        assert_eq!(parse_domain(xml).unwrap_err().to_string(), expected, "{xml}");
    }
    for body in [
        "<memory unit='EiB'>99</memory>",
        "<memory unit='x'>1</memory>",
        "<memory>-1</memory>",
        "<memory/>",
        "<vcpu>4097</vcpu>",
        "<vcpu current='x'>1</vcpu>",
        "<vcpus><vcpu id='4096' enabled='yes'/></vcpus>",
        "<vcpus><vcpu enabled='yes'/></vcpus>",
    ] {
        assert!(matches!(parse_domain(&minimal(body)), Err(XmlError::Unexpected { .. })), "{body}");
    }
}

#[test]
fn what_is_absent_stays_absent() {
    let domain = parse_domain(&minimal("")).unwrap();
    assert_eq!((domain.id, domain.title, domain.virt_type), (None, None, None));
    assert_eq!((domain.memory_max_bytes, domain.memory_current_bytes), (None, None));
    assert_eq!(domain.vcpus.len(), 1);
    assert!(domain.disks.is_empty() && domain.interfaces.is_empty() && domain.balloon.is_none());
}

#[test]
fn size_depth_and_nodes_are_limited() {
    let huge = " ".repeat(MAX_BYTES + 1);
    assert!(matches!(parse_domain(&huge), Err(XmlError::TooLarge { .. })));
    for depth in [MAX_DEPTH, 100_000] {
        let deep = minimal(&format!("{}{}", "<a>".repeat(depth), "</a>".repeat(depth)));
        assert!(matches!(parse_domain(&deep), Err(XmlError::TooDeep)), "{depth}");
    }
    let wide = minimal(&"<a/>".repeat(300_000));
    assert!(matches!(parse_domain(&wide), Err(XmlError::Syntax(roxmltree::Error::NodesLimitReached))));
    let unclosed = "<a>".repeat(1_000_000);
    assert!(matches!(parse_domain(&unclosed), Err(XmlError::Syntax(_))));
}

/// A small generator with a fixed seed: what fails once fails again.
struct XorShift(u64);

impl XorShift {
    fn below(&mut self, bound: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        usize::try_from(self.0 % u64::try_from(bound.max(1)).unwrap()).unwrap()
    }
}

fn mutate(bytes: &mut Vec<u8>, random: &mut XorShift) {
    let at = random.below(bytes.len());
    match random.below(6) {
        0 => bytes.truncate(at),
        1 => {
            let other = random.below(bytes.len());
            bytes.swap(at, other);
        }
        2 => {
            let end = (at + random.below(200)).min(bytes.len());
            bytes.drain(at..end);
        }
        3 => {
            let end = (at + random.below(200)).min(bytes.len());
            let copy = bytes[at..end].to_vec();
            let to = random.below(bytes.len());
            bytes.splice(to..to, copy);
        }
        4 => bytes[at] = b"<>&'\"/=0 9-\n"[random.below(12)],
        _ => bytes[at] = u8::try_from(random.below(256)).unwrap(),
    }
}

#[test]
fn mutilated_text_never_panics() {
    let mut random = XorShift(0x9e37_79b9_7f4a_7c15);
    let mut accepted = 0;
    for fixture in [PLAIN, OPENSTACK, HOTPLUG, ODD_NAMES] {
        for _ in 0..1500 {
            let mut bytes = fixture.as_bytes().to_vec();
            for _ in 0..=random.below(4) {
                if !bytes.is_empty() {
                    mutate(&mut bytes, &mut random);
                }
            }
            accepted += u32::from(parse_domain(&String::from_utf8_lossy(&bytes)).is_ok());
        }
    }
    assert!(accepted > 100, "only {accepted} mutations reach the reader");
}
