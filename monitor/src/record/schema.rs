//! The JSON Schema of the stream: derived from the record types, and for samples from the metric table.

use schemars::{Schema, SchemaGenerator, json_schema};
use serde_json::{Value, json};

use super::{Record, SCHEMA_VERSION};
use crate::{
    metric::{Kind, METRICS, MetricDef, Scope},
    units::SourceKind,
};

/// The JSON Schema of one line of the stream.
#[must_use]
pub fn schema() -> Schema {
    let mut settings = schemars::generate::SchemaSettings::draft2020_12().for_serialize();
    settings.inline_subschemas = false;
    let mut schema = settings.into_generator().into_root_schema_for::<Record<'static>>();
    schema.insert("title".to_owned(), "kvm-monitor stream line".into());
    schema.insert("$id".to_owned(), format!("urn:kvm-monitor:stream:{SCHEMA_VERSION}").into());
    close(&mut schema);
    schema
}

/// The program writes no key that the schema it prints does not name, and no `null`: a missing value is a missing
/// key. The schema says so, that a validator finds what breaks it.
fn close(schema: &mut Schema) {
    let mut lines = Vec::new();
    for line in schema.get_mut("oneOf").and_then(Value::as_array_mut).into_iter().flatten() {
        // The keys of a line are its `type` and those of the definition it refers to.
        line["unevaluatedProperties"] = false.into();
        lines.extend(line["$ref"].as_str().and_then(|r| r.strip_prefix("#/$defs/")).map(str::to_owned));
    }
    for (name, def) in schema.get_mut("$defs").and_then(Value::as_object_mut).into_iter().flatten() {
        let Some(properties) = def.get_mut("properties").and_then(Value::as_object_mut) else { continue };
        properties.values_mut().for_each(forbid_null);
        if !lines.contains(name) {
            def["additionalProperties"] = false.into();
        }
    }
}

/// Undoes what schemars makes of an `Option`.
fn forbid_null(property: &mut Value) {
    let Some(property) = property.as_object_mut() else { return };
    if let Some(types) = property.get_mut("type").and_then(Value::as_array_mut) {
        types.retain(|t| t != "null");
        if let [one] = types.as_mut_slice() {
            let one = one.take();
            property.insert("type".to_owned(), one);
        }
    }
    if let Some(Value::Array(choices)) = property.remove("anyOf") {
        let choice = choices.into_iter().find(|c| c["type"] != "null");
        property.extend(choice.into_iter().filter_map(|c| c.as_object().cloned()).flatten());
    }
}

pub(super) fn windows(_: &mut SchemaGenerator) -> Schema {
    let window = json_schema!({
        "type": "array", "items": { "type": "integer", "minimum": 0 }, "minItems": 2, "maxItems": 2
    });
    let names = SourceKind::ALL.map(SourceKind::name).into_iter().chain(["procfs_net"]);
    let properties: serde_json::Map<_, _> =
        names.map(|name| (name.to_owned(), window.clone().to_value())).collect();
    json_schema!({ "type": "object", "properties": properties, "additionalProperties": false })
}

/// The object of one entity: its identity, its metrics, and what follows from them.
fn entity_schema(scope: Scope, identity: &[(&str, Schema)], derived: &[(&str, Schema)]) -> Schema {
    let mut properties = serde_json::Map::new();
    for (name, schema) in identity.iter().chain(derived) {
        properties.insert((*name).to_owned(), schema.clone().to_value());
    }
    for def in METRICS.iter().filter(|def| def.scope == scope) {
        properties.insert(def.name.to_owned(), metric_schema(def).to_value());
    }
    let required: Vec<&str> = identity.iter().map(|(name, _)| *name).filter(|n| *n != "tid").collect();
    json_schema!({
        "type": "object", "properties": properties, "required": required, "additionalProperties": false
    })
}

fn metric_schema(def: &MetricDef) -> Schema {
    let mut properties = serde_json::Map::new();
    for source in def.sources {
        properties.insert(source.name().to_owned(), serde_json::json!({ "type": "integer", "minimum": 0 }));
    }
    let names: Vec<&str> = def.sources.iter().map(|s| s.name()).collect();
    properties.insert("best".to_owned(), serde_json::json!({ "enum": names }));
    if def.kind == Kind::Counter {
        properties.insert("per_s".to_owned(), serde_json::json!({ "type": "number", "minimum": 0 }));
    }
    let description = format!(
        "{} ({}, {})",
        def.help,
        def.unit.name(),
        if def.kind == Kind::Counter { "counter" } else { "gauge" }
    );
    json_schema!({
        "type": "object", "description": description, "properties": properties, "required": ["best"],
        "minProperties": 2, "additionalProperties": false
    })
}

pub(super) fn cpu(_: &mut SchemaGenerator) -> Schema {
    let names: Vec<&str> = SourceKind::ALL.iter().map(|s| s.name()).collect();
    let percent = json_schema!({
        "type": "object", "description": "CPU time per wall time, per cent of one CPU.",
        "properties": { "best": { "enum": names }, "value": { "type": "number", "minimum": 0 } },
        "required": ["best", "value"], "additionalProperties": false
    });
    let perf = named(
        "Perf events that are enabled for the domain (`virsh perf`), by libvirt's name, counted since they were. libvirt only.",
    );
    entity_schema(Scope::Cpu, &[], &[("util_pct", percent), ("perf", perf)])
}

fn named(description: &str) -> Schema {
    json_schema!({
        "type": "object", "description": description,
        "additionalProperties": { "type": "integer", "minimum": 0 }
    })
}

pub(super) fn memory(_: &mut SchemaGenerator) -> Schema {
    let derived = [
        ("used_bytes", json_schema!({ "type": "integer", "minimum": 0 })),
        ("used_by", json_schema!({ "enum": ["available_minus_usable", "available_minus_unused"] })),
        ("available_minus_usable_bytes", json_schema!({ "type": "integer", "minimum": 0 })),
        ("available_minus_unused_bytes", json_schema!({ "type": "integer", "minimum": 0 })),
        (
            "age_s",
            json_schema!({ "type": "integer", "minimum": 0, "description": "Seconds since the guest last reported." }),
        ),
        (
            "stale",
            json_schema!({ "type": "boolean", "description": "age_s is above three reporting periods, or the guest does not report." }),
        ),
    ];
    entity_schema(Scope::Memory, &[], &derived)
}

fn histogram(of: &str) -> Schema {
    let bucket = json_schema!({
        "type": "array", "items": { "type": "integer", "minimum": 0 }, "minItems": 3, "maxItems": 3
    });
    json_schema!({
        "type": "array", "items": bucket.to_value(),
        "description": format!("Lengths of {of} that ended since the last histogram: [from, to, count], ns.")
    })
}

pub(super) fn vcpus(generator: &mut SchemaGenerator) -> Schema {
    let number = json_schema!({ "type": "integer", "minimum": 0 });
    let reasons = |what: &str, properties: Value, required: Value| {
        json_schema!({
            "type": "object", "description": format!("{what}, by the kernel's names, since the thread is followed."),
            "additionalProperties": {
                "type": "object", "properties": properties, "required": required, "additionalProperties": false
            }
        })
    };
    let count = json!({ "type": "integer", "minimum": 1 });
    let ns = json!({
        "type": "integer", "minimum": 0,
        "description": "Time outside guest mode by the wall clock, sleep and the time in progress included, ns."
    });
    let derived = [
        (
            "exit_reasons",
            reasons("Exits from guest mode", json!({ "count": count, "ns": ns }), json!(["count", "ns"])),
        ),
        (
            "userspace_exit_reasons",
            reasons("Returns of KVM_RUN to QEMU", json!({ "count": count }), json!(["count"])),
        ),
        ("wait_hist_ns", histogram("waits")),
        ("run_hist_ns", histogram("runs")),
        ("preempted_by", generator.subschema_for::<Vec<crate::sample::PreemptedBy>>()),
        ("state", json_schema!({ "enum": ["running", "waiting", "sleeping"] })),
        ("libvirt_state", json_schema!({ "enum": ["offline", "running", "blocked"] })),
        (
            "kvm_stats",
            named(
                "What KVM counts for the vCPU since it was made, by the kernel's name. libvirt only (8.10).",
            ),
        ),
    ];
    array_of(entity_schema(Scope::Vcpu, &[("vcpu", number.clone()), ("tid", number)], &derived))
}

pub(super) fn interfaces(generator: &mut SchemaGenerator) -> Schema {
    let text = json_schema!({ "type": "string" });
    let bucket = json_schema!({
        "type": "array", "items": { "type": "integer", "minimum": 0 }, "minItems": 3, "maxItems": 3
    });
    let histogram = json_schema!({
        "type": "array", "items": bucket.to_value(),
        "description": "Milliseconds in which something passed, by bytes, since the last histogram: [from, to, count]."
    });
    let reasons = |whose: &str| {
        json_schema!({
            "type": "object", "additionalProperties": { "type": "integer", "minimum": 0 },
            "description": format!("Packets {whose}, by the kernel's reason, since the monitor watches the device.")
        })
    };
    let derived = [
        ("device", text.clone()),
        ("alias", text.clone()),
        ("mac", text),
        ("rx_drop_reasons", reasons("for the guest that its device on the host dropped")),
        ("tx_drop_reasons", reasons("of the guest that its device on the host dropped")),
        ("rx_host_drop_reasons", reasons("for the guest that the host dropped before its device")),
        ("tx_host_drop_reasons", reasons("of the guest that the host dropped after its device")),
        ("rx_burst_hist_bytes", histogram.clone()),
        ("tx_burst_hist_bytes", histogram),
        ("queues", generator.subschema_for::<Vec<crate::sample::QueueDetail>>()),
    ];
    array_of(entity_schema(Scope::Interface, &[], &derived))
}

pub(super) fn disks(generator: &mut SchemaGenerator) -> Schema {
    let latency = generator.subschema_for::<super::sample::Latency>();
    let derived = [
        ("rd_latency_ns", latency.clone()),
        ("rd_latency_hist_ns", histogram("reads")),
        ("wr_latency_ns", latency.clone()),
        ("wr_latency_hist_ns", histogram("writes")),
        ("fl_latency_ns", latency.clone()),
        ("fl_latency_hist_ns", histogram("flushes")),
        ("device_rd_latency_ns", latency.clone()),
        ("device_rd_latency_hist_ns", histogram("reads of the device")),
        ("device_wr_latency_ns", latency),
        ("device_wr_latency_hist_ns", histogram("writes of the device")),
        (
            "device_reason",
            json_schema!({
                "type": "string",
                "description": "Why the device's share is not attributable; once a second at most."
            }),
        ),
        ("layers", generator.subschema_for::<crate::sample::Layers>()),
        ("backing", generator.subschema_for::<Vec<crate::sample::BackingImage>>()),
        (
            "errors",
            json_schema!({
                "type": "object", "additionalProperties": { "type": "integer", "minimum": 1 },
                "description": "Failed requests of QEMU on the disk's images by error number, since attach."
            }),
        ),
    ];
    array_of(entity_schema(Scope::Disk, &[("target", json_schema!({ "type": "string" }))], &derived))
}

fn array_of(items: Schema) -> Schema {
    json_schema!({ "type": "array", "items": items.to_value() })
}
