//! The limits that libvirt puts on a domain's CPU time, disks and interfaces, as its XML has them. 0 is no limit there,
//! and left out here.

use roxmltree::Node;

use super::{child, text};

/// Children of `<cputune>` whose unit is µs (`virDomainCputuneDef`); quotas below 0 are none.
const MICROSECONDS: [&str; 8] = [
    "period",
    "quota",
    "global_period",
    "global_quota",
    "emulator_period",
    "emulator_quota",
    "iothread_period",
    "iothread_quota",
];

/// `<cputune>`.
pub(super) fn of_cpu(cputune: Option<Node<'_, '_>>) -> Vec<(String, u64)> {
    let Some(cputune) = cputune else { return Vec::new() };
    let limit = |name: &str| amount(&text(child(cputune, name)?));
    let times = MICROSECONDS.iter().filter_map(|name| Some((format!("{name}_us"), limit(name)?)));
    sorted(limit("shares").map(|shares| ("shares".to_owned(), shares)).into_iter().chain(times))
}

/// `<iotune>`: every number in it, by its name.
pub(super) fn of_disk(iotune: Option<Node<'_, '_>>) -> Vec<(String, u64)> {
    let children = iotune.into_iter().flat_map(|iotune| iotune.children()).filter(Node::is_element);
    sorted(children.filter(|limit| limit.tag_name().name() != "group_name").filter_map(|limit| {
        let name = limit.tag_name().name();
        let known = name.is_ascii() && name.len() <= 64;
        known.then(|| Some((name.to_owned(), amount(&text(limit))?)))?
    }))
}

/// `<bandwidth>`: libvirt writes KiB and KiB/s.
pub(super) fn of_interface(bandwidth: Option<Node<'_, '_>>) -> Vec<(String, u64)> {
    let Some(bandwidth) = bandwidth else { return Vec::new() };
    let directions = ["inbound", "outbound"].into_iter().filter_map(|d| Some((d, child(bandwidth, d)?)));
    sorted(directions.flat_map(|(direction, node)| {
        let units = [("average", "_per_s"), ("peak", "_per_s"), ("floor", "_per_s"), ("burst", "")];
        units.into_iter().filter_map(move |(name, per)| {
            let bytes = amount(node.attribute(name)?)?.checked_mul(1024)?;
            Some((format!("{direction}_{name}_bytes{per}"), bytes))
        })
    }))
}

fn amount(text: &str) -> Option<u64> {
    text.trim().parse().ok().filter(|amount| *amount > 0)
}

fn sorted(limits: impl Iterator<Item = (String, u64)>) -> Vec<(String, u64)> {
    let mut limits: Vec<_> = limits.collect();
    limits.sort_unstable();
    limits.dedup_by(|a, b| a.0 == b.0);
    limits
}

#[cfg(test)]
mod tests {
    use super::super::parse_domain;

    #[test]
    fn limits_have_names_with_units() {
        let xml = "<domain><name>n</name><uuid>00112233445566778899aabbccddeeff</uuid>
            <cputune><shares>512</shares><period>100000</period><quota>50000</quota><emulator_quota>-1</emulator_quota></cputune>
            <devices><disk type='file'><target dev='vda'/><iotune><total_iops_sec>300</total_iops_sec>
            <read_bytes_sec>0</read_bytes_sec><group_name>g</group_name></iotune></disk>
            <interface type='bridge'><bandwidth><inbound average='1000' burst='5'/><outbound peak='x'/></bandwidth></interface>
            </devices></domain>";
        let domain = parse_domain(xml).unwrap();
        let named = |list: &[(String, u64)]| list.iter().map(|(n, v)| format!("{n}={v}")).collect::<Vec<_>>();
        assert_eq!(named(&domain.cpu_limits), ["period_us=100000", "quota_us=50000", "shares=512"]);
        assert_eq!(named(&domain.disks[0].limits), ["total_iops_sec=300"]);
        assert_eq!(domain.disks[0].limits_group.as_deref(), Some("g"));
        assert_eq!(
            named(&domain.interfaces[0].limits),
            ["inbound_average_bytes_per_s=1024000", "inbound_burst_bytes=5120"]
        );
    }
}
