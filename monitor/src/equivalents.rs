//! What others call the figures of the stream: OpenStack ceilometer's meters (27, libvirt inspector) and the series of
//! Debian's prometheus-libvirt-exporter (0.2), for those who come from there. Where the formula differs, how.
//!
//! `docs/metrics.md` is printed from here. Knows names only.

use std::fmt::Write as _;

use crate::metric::{Kind, METRICS};

/// A figure of the stream and what others call it.
struct Equivalent {
    /// Where it stands: the key of a scope in `sample`, or `domain`.
    place: &'static str,
    /// Its name there.
    name: &'static str,
    /// ceilometer's meter; empty if it has none.
    ceilometer: &'static str,
    /// The exporter's series, without `libvirt_domain_`; empty if it has none.
    exporter: &'static str,
    /// Where the formula or the unit differs; empty if neither does.
    difference: &'static str,
}

const fn row(
    (place, name): (&'static str, &'static str),
    ceilometer: &'static str,
    exporter: &'static str,
    difference: &'static str,
) -> Equivalent {
    Equivalent { place, name, ceilometer, exporter, difference }
}

#[rustfmt::skip] // A table.
const EQUIVALENTS: &[Equivalent] = &[
    row(("cpu", "time_ns"), "cpu", "info_cpu_time_seconds_total", "ceilometer: Σ over vCPUs of (vcpu.N.time + vcpu.N.wait), so without QEMU's other threads, and with time that was waited; the whole process only if a vCPU's figures lack. Exporter: seconds."),
    row(("cpu", "vcpus_online"), "vcpus", "info_virtual_cpus", ""),
    row(("vcpus", "run_ns"), "cpu", "", "Σ over vCPUs of run_ns {libvirt} + libvirt_wait_ns is ceilometer's cpu."),
    row(("vcpus", "libvirt_wait_ns"), "cpu", "", "See run_ns."),
    row(("interfaces", "rx_bytes"), "network.incoming.bytes", "interface_stats_receive_bytes_total", "ceilometer's .delta and .rate are differences of this; its delta after a restart is the new counter's value. Here per_s, and none across a restart (epoch)."),
    row(("interfaces", "rx_packets"), "network.incoming.packets", "interface_stats_receive_packets_total", ""),
    row(("interfaces", "rx_errs"), "network.incoming.packets.error", "interface_stats_receive_errors_total", ""),
    row(("interfaces", "rx_drop"), "network.incoming.packets.drop", "interface_stats_receive_drops_total", ""),
    row(("interfaces", "tx_bytes"), "network.outgoing.bytes", "interface_stats_transmit_bytes_total", "As rx_bytes."),
    row(("interfaces", "tx_packets"), "network.outgoing.packets", "interface_stats_transmit_packets_total", ""),
    row(("interfaces", "tx_errs"), "network.outgoing.packets.error", "interface_stats_transmit_errors_total", ""),
    row(("interfaces", "tx_drop"), "network.outgoing.packets.drop", "interface_stats_transmit_drops_total", ""),
    row(("disks", "rd_req"), "disk.device.read.requests", "block_stats_read_requests_total", "The same as {libvirt}. {ebpf} counts QEMU's requests on the host."),
    row(("disks", "rd_bytes"), "disk.device.read.bytes", "block_stats_read_bytes_total", "As rd_req."),
    row(("disks", "rd_time_ns"), "disk.device.read.latency", "", "As rd_req. A sum over requests there as well, whatever the name says; divide differences by those of rd_req."),
    row(("disks", "wr_req"), "disk.device.write.requests", "block_stats_write_requests_total", "As rd_req."),
    row(("disks", "wr_bytes"), "disk.device.write.bytes", "block_stats_write_bytes_total", "As rd_req."),
    row(("disks", "wr_time_ns"), "disk.device.write.latency", "", "As rd_time_ns."),
    row(("disks", "capacity_bytes"), "disk.device.capacity", "", "ceilometer: the larger of capacity and physical."),
    row(("disks", "allocation_bytes"), "disk.device.allocation", "", ""),
    row(("disks", "physical_bytes"), "disk.device.usage", "", ""),
    row(("memory", "actual_bytes"), "memory", "info_memory_usage_bytes", "ceilometer: MiB."),
    row(("memory", "available_bytes"), "memory.available", "", "ceilometer: MiB. What the guest has, not what is free."),
    row(("memory", "used_bytes"), "memory.usage", "", "ceilometer: MiB, by the same rule: available − usable, else available − unused; used_by says which. Both stand beside it by name."),
    row(("memory", "rss_bytes"), "memory.resident", "", "ceilometer: MiB."),
    row(("memory", "swap_in_bytes"), "memory.swap.in", "", "ceilometer: MiB, and only if both are there."),
    row(("memory", "swap_out_bytes"), "memory.swap.out", "", "As swap_in_bytes."),
    row(("cpu", "perf.cpu_cycles"), "perf.cpu.cycles", "", "Absent unless the event is enabled (`virsh perf`)."),
    row(("cpu", "perf.instructions"), "perf.instructions", "", "As perf.cpu_cycles."),
    row(("cpu", "perf.cache_references"), "perf.cache.references", "", "As perf.cpu_cycles."),
    row(("cpu", "perf.cache_misses"), "perf.cache.misses", "", "As perf.cpu_cycles."),
    row(("domain", "state"), "power.state", "state_code", "A word; there the number of virDomainState."),
    row(("domain", "memory.max_bytes"), "", "info_maximum_memory_bytes", ""),
];

/// Fields of the stream that are no rows of the metric table, and what they mean.
const FIELDS: &[(&str, &str, &str)] = &[
    ("cpu", "util_pct", "CPU time per wall time, per cent of one CPU."),
    (
        "cpu",
        "perf.NAME",
        "Perf events that are enabled for the domain, by libvirt's name (cpu_cycles, instructions, cache_references, cache_misses, cmt, mbmt, mbml, page_faults, …), counted since they were. libvirt: perf.NAME.",
    ),
    ("vcpus", "state", "running, waiting or sleeping at the moment of reading. ebpf."),
    ("vcpus", "libvirt_state", "running, blocked or offline. libvirt: vcpu.N.state."),
    (
        "vcpus",
        "kvm_stats.NAME",
        "What KVM counts for the vCPU since it was made, by the kernel's name (exits, halt_exits, halt_attempted_poll, io_exits, …). libvirt: vcpu.N.NAME.sum (8.10).",
    ),
    (
        "disks",
        "backing",
        "Of each image below the one on top, and of the target of a copy that is under way: index, path, capacity_bytes, allocation_bytes, physical_bytes. libvirt: block.N.backingIndex and so on, with the layers.",
    ),
    (
        "disks",
        "layers",
        "Between two reads of what QEMU knows: write_amplification (bytes of the device over bytes of the guest), rd_qemu_ns, wr_qemu_ns, fl_qemu_ns (time of the guest's requests outside QEMU's I/O on the host: throttling by QEMU). ebpf and libvirt.",
    ),
    ("disks", "errors.NAME", "Failed requests of QEMU on the disk's images by error number. ebpf."),
    ("memory", "used_bytes", "Memory in use by the guest, and used_by: by which definition."),
    (
        "memory",
        "available_minus_usable_bytes",
        "By the first definition: what the guest could not give away without swapping.",
    ),
    ("memory", "available_minus_unused_bytes", "By the second: the guest's caches count as used."),
    (
        "memory",
        "age_s",
        "Seconds since the guest last reported; stale: more than three of its periods. libvirt: balloon.last-update.",
    ),
    (
        "dirty_rate",
        "bytes_per_s",
        "How fast the guest writes to its memory, by the last measurement somebody asked for (`virsh domdirtyrate-calc`). libvirt: dirtyrate.",
    ),
    (
        "job",
        "memory_remaining_bytes",
        "With the rest of job: how far a migration, save, dump or backup is. libvirt: virDomainGetJobStats.",
    ),
    ("domain", "state", "State of the domain."),
    ("domain", "memory.max_bytes", "What the guest may have at most. libvirt: <memory>."),
];

/// ceilometer's meters of the libvirt inspector that have no equivalent here, and why.
const NOT_OURS: [(&str, &str); 4] = [
    ("disk.ephemeral.size", "size of the flavor, as Nova keeps it; no measurement"),
    ("disk.root.size", "size of the flavor, as Nova keeps it; no measurement"),
    ("network.incoming.bytes.rate", "its libvirt inspector does not have it; `per_s` of rx_bytes is it"),
    ("network.outgoing.bytes.rate", "its libvirt inspector does not have it; `per_s` of tx_bytes is it"),
];

/// `docs/metrics.md`: every figure, what others call it, and where their formula differs.
#[must_use]
pub fn markdown() -> String {
    let mut text = String::from(
        "| in | figure | unit | kind | sources | ceilometer | prometheus-libvirt-exporter | where theirs differs | meaning |\n\
         |---|---|---|---|---|---|---|---|---|\n",
    );
    for def in METRICS {
        let sources: Vec<&str> = def.sources.iter().map(|s| s.name()).collect();
        let kind = if def.kind == Kind::Counter { "counter" } else { "gauge" };
        let about = format!("{} | {kind} | {}", def.unit.name(), sources.join(", "));
        line(&mut text, (def.scope.key(), def.name), &about, def.help);
    }
    for (place, name, meaning) in FIELDS {
        line(&mut text, (place, name), " | | ", meaning);
    }
    text.push_str("\nMeters of ceilometer that have no equivalent:\n\n");
    for (meter, why) in NOT_OURS {
        let _ = writeln!(text, "- `{meter}`: {why}.");
    }
    text
}

fn line(text: &mut String, (place, name): (&str, &str), about: &str, meaning: &str) {
    let family = name.strip_suffix("NAME");
    let same = |e: &&Equivalent| {
        e.place == place && family.map_or(e.name == name, |family| e.name.starts_with(family))
    };
    let others: Vec<_> = EQUIVALENTS.iter().filter(same).collect();
    let names = |of: fn(&Equivalent) -> &'static str, before: &str| {
        let names = others.iter().map(|e| of(e)).filter(|name| !name.is_empty());
        names.map(|name| format!("`{before}{name}`")).collect::<Vec<_>>().join(", ")
    };
    let (ceilometer, exporter) = (names(|e| e.ceilometer, ""), names(|e| e.exporter, "libvirt_domain_"));
    let difference = others.first().map_or("", |e| e.difference);
    let _ = writeln!(
        text,
        "| `{place}` | `{name}` | {about} | {ceilometer} | {exporter} | {difference} | {meaning} |"
    );
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::metric::MetricDef;

    /// Whether a row of the metric table is meant.
    fn is_metric(equivalent: &Equivalent) -> bool {
        let is = |def: &MetricDef| def.scope.key() == equivalent.place && def.name == equivalent.name;
        METRICS.iter().any(is)
    }

    /// The meters that `ceilometer.poll.compute` of ceilometer 27 lists, deltas aside.
    const METERS: [&str; 34] = [
        "cpu",
        "disk.device.allocation",
        "disk.device.capacity",
        "disk.device.read.bytes",
        "disk.device.read.latency",
        "disk.device.read.requests",
        "disk.device.usage",
        "disk.device.write.bytes",
        "disk.device.write.latency",
        "disk.device.write.requests",
        "disk.ephemeral.size",
        "disk.root.size",
        "memory",
        "memory.available",
        "memory.resident",
        "memory.swap.in",
        "memory.swap.out",
        "memory.usage",
        "network.incoming.bytes",
        "network.incoming.bytes.rate",
        "network.incoming.packets",
        "network.incoming.packets.drop",
        "network.incoming.packets.error",
        "network.outgoing.bytes",
        "network.outgoing.bytes.rate",
        "network.outgoing.packets",
        "network.outgoing.packets.drop",
        "network.outgoing.packets.error",
        "perf.cache.misses",
        "perf.cache.references",
        "perf.cpu.cycles",
        "perf.instructions",
        "power.state",
        "vcpus",
    ];

    #[test]
    fn every_meter_of_ceilometer_has_its_row_or_a_reason() {
        for meter in METERS {
            let ours = EQUIVALENTS.iter().any(|e| e.ceilometer == meter);
            let not_ours = NOT_OURS.iter().any(|(name, _)| *name == meter);
            assert!(ours != not_ours, "{meter}");
        }
        let known = |meter: &str| METERS.contains(&meter);
        assert!(EQUIVALENTS.iter().all(|e| e.ceilometer.is_empty() || known(e.ceilometer)));
    }

    #[test]
    fn every_row_means_a_figure_that_there_is() {
        for e in EQUIVALENTS {
            let field = FIELDS.iter().any(|(place, name, _)| {
                *place == e.place
                    && name.strip_suffix("NAME").map_or(*name == e.name, |f| e.name.starts_with(f))
            });
            assert!(is_metric(e) != field, "{} {}", e.place, e.name);
        }
    }

    #[test]
    fn a_line_has_as_many_cells_as_the_head() {
        let text = markdown();
        let cells = |line: &str| line.matches('|').count();
        let mut lines = text.lines().take_while(|line| line.starts_with('|'));
        let head = cells(lines.next().unwrap());
        assert!(lines.all(|line| cells(line) == head), "{text}");
        assert!(
            text.contains("`network.incoming.bytes` | `libvirt_domain_interface_stats_receive_bytes_total`")
        );
        assert!(text.contains("`perf.cpu.cycles`, `perf.instructions`"));
    }
}
