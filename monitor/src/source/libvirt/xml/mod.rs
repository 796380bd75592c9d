//! Domain XML, as `virDomainGetXMLDesc` prints it for a live domain, into an inventory entry.
//!
//! The text comes from libvirt, but names, titles and metadata in it are chosen by tenants: size, depth and number
//! of nodes are limited, a DTD is refused, and nothing in it can make this module panic. Knows neither libvirt's
//! API nor the host; threads, process and host device indices are filled in by others.

mod limits;
mod owner;

use std::collections::BTreeMap;

use roxmltree::{Document, Node, ParsingOptions};

use crate::{
    inventory::{Balloon, Disk, Domain, DomainState, FoundBy, Interface, MonitorState, Observable, Vcpu},
    units::{DomainUuid, VcpuIndex},
};

/// Largest text accepted, bytes: what libvirt itself allows in one string of its protocol.
pub const MAX_BYTES: usize = 4 << 20;
/// Most XML nodes accepted.
const MAX_NODES: u32 = 1 << 18;
/// Deepest nesting accepted; a backing chain of 200 images needs about 210. The parser libvirt uses stops at 256.
const MAX_DEPTH: usize = 256;
/// Most vCPUs accepted; QEMU's machines stop at 4096.
const MAX_VCPUS: u32 = 4096;

/// Why a domain's XML cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum XmlError {
    /// More text than [`MAX_BYTES`].
    #[error("domain XML of {bytes} bytes is larger than {MAX_BYTES}")]
    TooLarge {
        /// Its length, bytes.
        bytes: usize,
    },
    /// Elements nested too deep.
    #[error("domain XML is nested deeper than {MAX_DEPTH} elements")]
    TooDeep,
    /// Not well-formed, with a DTD, or with too many nodes.
    #[error("domain XML cannot be parsed")]
    Syntax(#[source] roxmltree::Error),
    /// Some other document.
    #[error("expected a <domain> document, found <{found}>")]
    NotADomain {
        /// The root element.
        found: String,
    },
    /// An element that every domain has is not there.
    #[error("domain XML has no <{0}>")]
    Missing(&'static str),
    /// An element or attribute holds something else than it should.
    #[error("domain XML: {what} has the unexpected value {value:?}")]
    Unexpected {
        /// Where.
        what: &'static str,
        /// The value, shortened.
        value: String,
    },
}

/// Reads the XML of one live domain. Process, thread and host device ids stay absent, the state unknown.
pub fn parse_domain(xml: &str) -> Result<Domain, XmlError> {
    if xml.len() > MAX_BYTES {
        return Err(XmlError::TooLarge { bytes: xml.len() });
    }
    let options = ParsingOptions { allow_dtd: false, nodes_limit: MAX_NODES, ..ParsingOptions::default() };
    let document = Document::parse_with_options(xml, options).map_err(XmlError::Syntax)?;
    check_depth(&document)?;
    let root = document.root_element();
    if !is(root, "domain") {
        return Err(XmlError::NotADomain { found: shorten(root.tag_name().name()) });
    }
    read_domain(root)
}

fn read_domain(root: Node<'_, '_>) -> Result<Domain, XmlError> {
    let name = child_text(root, "name").filter(|name| !name.is_empty()).ok_or(XmlError::Missing("name"))?;
    let uuid = child_text(root, "uuid").ok_or(XmlError::Missing("uuid"))?;
    let uuid: DomainUuid = uuid.parse().map_err(|_| unexpected("<uuid>", &uuid))?;
    let devices = child(root, "devices");
    Ok(Domain {
        uuid,
        id: number(root.attribute("id")),
        state: DomainState::Unknown,
        monitor: MonitorState::default(),
        title: child_text(root, "title"),
        owner: owner::read(root, &name),
        virt_type: attribute(root, "type"),
        process: None,
        vcpus: read_vcpus(root)?,
        vcpus_max: child(root, "vcpu").and_then(|vcpu| number(Some(&text(vcpu)))),
        cpu_limits: limits::of_cpu(child(root, "cputune")),
        interfaces: each(devices, "interface").map(read_interface).collect(),
        disks: each(devices, "disk").map(read_disk).collect(),
        memory_max_bytes: read_memory(root, "memory", "<memory>")?,
        memory_current_bytes: read_memory(root, "currentMemory", "<currentMemory>")?,
        balloon: each(devices, "memballoon").next().map(read_balloon),
        name,
        found_by: FoundBy::Libvirt,
    })
}

/// `<vcpus>` names each vCPU and may have holes; without it the first `current` of `<vcpu>` are online.
fn read_vcpus(root: Node<'_, '_>) -> Result<Vec<Vcpu>, XmlError> {
    let vcpu = child(root, "vcpu");
    let pins = read_pins(root);
    let anywhere = vcpu.and_then(|vcpu| attribute(vcpu, "cpuset"));
    let online = match child(root, "vcpus") {
        Some(list) => online_vcpus(list)?,
        None => (0..count_vcpus(vcpu)?).collect(),
    };
    let affinity = |index: u32| pins.get(&index).cloned().or_else(|| anywhere.clone());
    Ok(online.iter().map(|&i| Vcpu { index: VcpuIndex(i), tid: None, affinity: affinity(i) }).collect())
}

/// `current`, else the maximum, else 1 as libvirt does for a domain without `<vcpu>`.
fn count_vcpus(vcpu: Option<Node<'_, '_>>) -> Result<u32, XmlError> {
    let Some(vcpu) = vcpu else { return Ok(1) };
    let written = attribute(vcpu, "current").unwrap_or_else(|| text(vcpu));
    number(Some(&written)).filter(|n| *n <= MAX_VCPUS).ok_or_else(|| unexpected("<vcpu>", &written))
}

fn online_vcpus(list: Node<'_, '_>) -> Result<Vec<u32>, XmlError> {
    let mut online = Vec::new();
    for vcpu in each(Some(list), "vcpu").filter(|vcpu| vcpu.attribute("enabled") == Some("yes")) {
        let id = vcpu.attribute("id").unwrap_or_default();
        let bad = || unexpected("id of <vcpus><vcpu>", id);
        online.push(number(Some(id)).filter(|id| *id < MAX_VCPUS).ok_or_else(bad)?);
    }
    online.sort_unstable();
    online.dedup();
    Ok(online)
}

fn read_pins(root: Node<'_, '_>) -> BTreeMap<u32, String> {
    let pin = |pin: Node<'_, '_>| Some((number(pin.attribute("vcpu"))?, attribute(pin, "cpuset")?));
    each(child(root, "cputune"), "vcpupin").filter_map(pin).collect()
}

fn read_interface(node: Node<'_, '_>) -> Interface {
    let kind = attribute(node, "type").unwrap_or_default();
    let device = child_attribute(node, "target", "dev").unwrap_or_default();
    let filter = child(node, "filterref");
    let observable = interface_observable(&kind, &device);
    Interface {
        ifindex: None,
        netns: None,
        since_ns: None,
        alias: child_attribute(node, "alias", "name"),
        mac: child_attribute(node, "mac", "address").map(|mac| mac.to_lowercase()),
        source: child(node, "source").and_then(|source| interface_source(&kind, source)),
        bridge: child_attribute(node, "source", "bridge"),
        interface_id: child(node, "virtualport")
            .and_then(|port| child_attribute(port, "parameters", "interfaceid")),
        host_pci: child(node, "source").and_then(pci_address),
        limits: limits::of_interface(child(node, "bandwidth")),
        model: child_attribute(node, "model", "type"),
        queues: number(child(node, "driver").and_then(|driver| driver.attribute("queues"))).unwrap_or(1),
        filterref: filter.and_then(|filter| attribute(filter, "filter")),
        parameters: read_parameters(filter, child(node, "virtualport")),
        observable,
        device,
        kind,
    }
}

/// The address in a `<source>`, as `/sys/bus/pci/devices` has it (`virPCIDeviceAddressAsString`).
fn pci_address(source: Node<'_, '_>) -> Option<String> {
    let address = child(source, "address").filter(|address| address.attribute("type") == Some("pci"))?;
    let part = |name| u32::from_str_radix(address.attribute(name)?.trim_start_matches("0x"), 16).ok();
    let (domain, bus) = (part("domain").unwrap_or(0), part("bus")?);
    Some(format!("{domain:04x}:{bus:02x}:{:02x}.{:x}", part("slot")?, part("function").unwrap_or(0)))
}

/// A live domain on a network that bridges tells both; the interface's own type says which one it is connected to.
fn interface_source(kind: &str, source: Node<'_, '_>) -> Option<String> {
    let order = match kind {
        "bridge" => ["bridge", "network", "dev", "path"],
        "direct" => ["dev", "network", "bridge", "path"],
        _ => ["network", "bridge", "dev", "path"],
    };
    order.iter().find_map(|name| attribute(source, name))
}

/// Parameters of the filter under their own name, those of the virtual port with `virtualport.` before it.
fn read_parameters(filter: Option<Node<'_, '_>>, virtualport: Option<Node<'_, '_>>) -> Vec<(String, String)> {
    let mut parameters: Vec<_> = each(filter, "parameter")
        .filter_map(|p| Some((attribute(p, "name")?, attribute(p, "value")?)))
        .collect();
    if let Some(port) = virtualport {
        parameters.extend(attribute(port, "type").map(|kind| ("virtualport.type".into(), kind)));
        let attributes = each(Some(port), "parameters").flat_map(|node| node.attributes());
        parameters.extend(attributes.map(|a| (format!("virtualport.{}", a.name()), a.value().to_owned())));
    }
    parameters.sort();
    parameters
}

/// By type (`virDomainNetType`): only what passes a network device of the host can be seen from it.
fn interface_observable(kind: &str, device: &str) -> Observable {
    Observable::No(match kind {
        "user" => "user-mode network: its traffic passes sockets, not a host network device",
        "vhostuser" => "vhost-user: packets pass shared memory to another process, not the kernel",
        "hostdev" => "host device passed through: packets pass the hardware, not the kernel",
        "vdpa" => "vDPA: packets pass the hardware, not the kernel",
        "udp" | "mcast" | "server" | "client" => "socket network: frames travel inside a socket of QEMU",
        "null" => "null network: connected to nothing",
        "internal" | "vds" => "the hypervisor connects it without a host network device",
        _ if device.is_empty() => "libvirt names no host network device for it",
        _ => return Observable::Yes,
    })
}

fn read_disk(node: Node<'_, '_>) -> Disk {
    let source_type = attribute(node, "type").unwrap_or_default();
    let source = child(node, "source").and_then(|source| disk_source(&source_type, source));
    let driver = |name| child_attribute(node, "driver", name);
    let observable = disk_observable(&source_type, source.is_some());
    Disk {
        target: child_attribute(node, "target", "dev").unwrap_or_default(),
        device: attribute(node, "device").unwrap_or_else(|| "disk".into()),
        bus: child_attribute(node, "target", "bus"),
        format: driver("type"),
        cache: driver("cache"),
        io: driver("io"),
        iothread: number(driver("iothread").as_deref()),
        serial: child_text(node, "serial"),
        backing_chain: read_backing_chain(node),
        mirror: child(node, "mirror").and_then(image_source),
        limits: limits::of_disk(child(node, "iotune")),
        limits_group: child(node, "iotune").and_then(|limits| child_text(limits, "group_name")),
        observable,
        source,
        source_type,
    }
}

/// What a `<source>` points at; for a network disk `protocol:name`, for a volume `pool/volume`.
fn disk_source(source_type: &str, source: Node<'_, '_>) -> Option<String> {
    let get = |name| attribute(source, name);
    match source_type {
        "network" => {
            let name = get("name").unwrap_or_default();
            get("protocol").map(|protocol| format!("{protocol}:{name}"))
        }
        "volume" => Some(format!("{}/{}", get("pool")?, get("volume")?)),
        _ => ["file", "dev", "dir", "path", "name"].iter().find_map(|name| attribute(source, name)),
    }
}

/// What the `<source>` of a `<backingStore>` or `<mirror>` points at.
fn image_source(image: Node<'_, '_>) -> Option<String> {
    let source_type = image.attribute("type").unwrap_or_default();
    child(image, "source").and_then(|source| disk_source(source_type, source))
}

/// Each image below the top one is nested in the `<backingStore>` of the one above.
fn read_backing_chain(disk: Node<'_, '_>) -> Vec<String> {
    let mut chain = Vec::new();
    let mut above = disk;
    while let Some(image) = child(above, "backingStore") {
        chain.extend(image_source(image));
        above = image;
    }
    chain
}

fn disk_observable(source_type: &str, has_source: bool) -> Observable {
    Observable::No(match source_type {
        "network" => "network disk: QEMU talks to the storage server, no host block I/O",
        "vhostuser" => "vhost-user disk: requests pass shared memory to another process",
        "nvme" => "NVMe driven by QEMU itself: requests do not pass the kernel",
        "vhostvdpa" => "vDPA: requests pass the hardware, not the kernel",
        _ if !has_source => "no medium",
        _ => return Observable::Yes,
    })
}

fn read_balloon(node: Node<'_, '_>) -> Balloon {
    let period = child(node, "stats").and_then(|stats| stats.attribute("period"));
    Balloon {
        model: attribute(node, "model").unwrap_or_default(),
        stats_period_s: number(period).unwrap_or(0),
    }
}

/// An amount of memory in bytes, rounded up to whole KiB as libvirt keeps it. KiB if no unit is written.
fn read_memory(root: Node<'_, '_>, name: &'static str, what: &'static str) -> Result<Option<u64>, XmlError> {
    let Some(node) = child(root, name) else { return Ok(None) };
    let written = text(node);
    let bytes = || {
        let amount: u64 = written.trim().parse().ok()?;
        let bytes = amount.checked_mul(unit_bytes(node.attribute("unit").unwrap_or_default())?)?;
        bytes.div_ceil(1024).checked_mul(1024)
    };
    bytes().map(Some).ok_or_else(|| unexpected(what, &written))
}

/// Bytes in a unit, by the rules of libvirt's `virScaleInteger`: `k` and `KiB` are 1024, `KB` is 1000, case is ignored.
fn unit_bytes(unit: &str) -> Option<u64> {
    let unit = unit.to_ascii_lowercase();
    if let "b" | "byte" | "bytes" = unit.as_str() {
        return Some(1);
    }
    let mut letters = unit.chars();
    let power = match letters.next() {
        None | Some('k') => 1,
        Some('m') => 2,
        Some('g') => 3,
        Some('t') => 4,
        Some('p') => 5,
        Some('e') => 6,
        Some(_) => return None,
    };
    match letters.as_str() {
        "" | "ib" => 1024_u64.checked_pow(power),
        "b" => 1000_u64.checked_pow(power),
        _ => None,
    }
}

/// Nodes come in document order, so a node's parent has its depth already.
fn check_depth(document: &Document<'_>) -> Result<(), XmlError> {
    let mut depths: Vec<usize> = Vec::new();
    for node in document.descendants() {
        let above = node.parent().and_then(|parent| depths.get(parent.id().get_usize()));
        let depth = above.map_or(0, |depth| depth + 1);
        if depth > MAX_DEPTH {
            return Err(XmlError::TooDeep);
        }
        depths.push(depth);
    }
    Ok(())
}

/// libvirt's own elements are in no namespace.
fn is(node: Node<'_, '_>, name: &str) -> bool {
    node.is_element() && node.tag_name().name() == name && node.tag_name().namespace().is_none()
}

fn child<'a, 'i>(node: Node<'a, 'i>, name: &str) -> Option<Node<'a, 'i>> {
    node.children().find(|child| is(*child, name))
}

fn each<'a, 'i>(parent: Option<Node<'a, 'i>>, name: &str) -> impl Iterator<Item = Node<'a, 'i>> {
    parent.into_iter().flat_map(|parent| parent.children()).filter(move |child| is(*child, name))
}

/// All text directly below a node: comments and CDATA split it into several nodes.
fn text(node: Node<'_, '_>) -> String {
    node.children().filter(Node::is_text).filter_map(|child| child.text()).collect()
}

fn child_text(node: Node<'_, '_>, name: &str) -> Option<String> {
    child(node, name).map(text)
}

fn attribute(node: Node<'_, '_>, name: &str) -> Option<String> {
    node.attribute(name).map(str::to_owned)
}

fn child_attribute(node: Node<'_, '_>, name: &str, attribute_name: &str) -> Option<String> {
    child(node, name).and_then(|child| attribute(child, attribute_name))
}

fn number(text: Option<&str>) -> Option<u32> {
    text?.trim().parse().ok()
}

fn unexpected(what: &'static str, value: &str) -> XmlError {
    XmlError::Unexpected { what, value: shorten(value) }
}

fn shorten(text: &str) -> String {
    text.chars().take(64).collect()
}

#[cfg(test)]
mod tests;
