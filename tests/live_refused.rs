//! A probe that the kernel refuses takes its own figures with it and no others.
//!
//! The refusals are real: the program reads type information in which one name of this kernel is spelt otherwise, so that
//! it finds a kernel that has no such tracepoint or no such field of a structure. A run with the true names says which
//! figures there are; then each run must have all of those but the ones that hang on the name. Needs root and the
//! variables that `cargo xtask test` sets.
#![expect(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "a test may panic, and prints what it measured"
)]

use std::{collections::BTreeSet, path::Path, process::Command};

use lab::{DiskSpec, GuestSpec, Lab, LabDirs, NicSpec};
use serde_json::Value;
use support::{Run, is_sample_of, program};

#[path = "support/mod.rs"]
#[expect(dead_code, reason = "each test program uses a part of it")]
mod support;

const NAME: &str = "refused";
const UUID: &str = "5ec0de00-0000-4000-8000-0000000000f9";
const BTF: &str = "/sys/kernel/btf/vmlinux";
/// Samples of the first run: enough for everything that comes once a second.
const SAMPLES: usize = 20;

/// One name that this kernel is not to have, and what must follow.
struct Refusal {
    /// The name in the type information.
    name: &'static str,
    /// The probe that is told to have failed.
    probe: &'static str,
    /// Part of the reason.
    reason: &'static str,
    /// Figures that go: prefixes of their paths.
    lost: &'static [&'static str],
}

const SCHED: &[&str] = &["cpu.", "vcpus."];
const NET: &[&str] = &["interfaces."];

const REFUSALS: [Refusal; 6] = [
    // Nothing required, nothing lost: what it tells at once is looked for every second.
    Refusal { name: "btf_trace_task_rename", probe: "thread_renamed", reason: "up to a second", lost: &[] },
    Refusal { name: "btf_trace_kfree_skb", probe: "kfree_skb", reason: "drops have no reasons", lost: &[] },
    Refusal {
        name: "btf_trace_ext4_sync_file_enter",
        probe: "ext4_sync_file_enter",
        reason: "flushes of images on ext4",
        lost: &["disks.fl_", "disks.discard_", "disks.zero_"],
    },
    // Its group cannot do without it; the other groups can.
    Refusal {
        name: "btf_trace_netif_receive_skb",
        probe: "net_dev_xmit",
        reason: "netif_receive_skb",
        lost: NET,
    },
    Refusal { name: "btf_trace_sched_switch", probe: "read_threads", reason: "sched_switch", lost: SCHED },
    // A field of a structure.
    Refusal { name: "run_delay", probe: "sched_switch", reason: "sched_info.run_delay", lost: SCHED },
];

#[test]
fn a_refused_probe_takes_its_own_figures_only() {
    let lab = Lab::start(&LabDirs::from_env().unwrap()).unwrap();
    let nic = NicSpec::new("tap-refused", 3);
    let script = format!("{} burn=cpu0:0.01s sleep=0.2s times=4000000000", nic.net_step("eth0"));
    let disk = DiskSpec { io: "threads", ..DiskSpec::raw("vda", 1 << 20) };
    let spec = GuestSpec {
        uuid: Some(UUID.to_owned()),
        disks: vec![disk],
        nics: vec![nic],
        ..GuestSpec::new(NAME, &script)
    };
    let _guest = lab.boot(&spec).unwrap();
    let types = std::fs::read(BTF).unwrap();
    let all = every_figure(&lab);
    println!("{} figures: {all:?}", all.len());
    for group in ["cpu.", "vcpus.", "interfaces.", "disks."] {
        assert!(all.iter().any(|figure| figure.starts_with(group)), "no {group} to begin with");
    }
    for refusal in &REFUSALS {
        let file = lab.scratch().join("types");
        std::fs::write(&file, without(&types, refusal.name)).unwrap();
        check(&lab, &file, refusal, &all);
    }
}

/// The figures of the kernel probes in a run with nothing refused.
fn every_figure(lab: &Lab) -> BTreeSet<String> {
    let mut run = start(lab, Path::new(BTF));
    let mut found = BTreeSet::new();
    for _ in 0..SAMPLES {
        found.extend(figures(&run.wait("a sample", |r| is_sample_of(r, UUID))));
    }
    run.stop();
    found
}

fn check(lab: &Lab, types: &Path, refusal: &Refusal, all: &BTreeSet<String>) {
    let goes = |figure: &String| refusal.lost.iter().any(|lost| figure.starts_with(lost));
    let (lost, mut wanted): (BTreeSet<String>, BTreeSet<String>) = all.iter().cloned().partition(goes);
    assert_eq!(lost.is_empty(), refusal.lost.is_empty(), "{}: nothing there that could go", refusal.name);
    let mut run = start(lab, types);
    run.wait("all that is left", |r| {
        if is_sample_of(r, UUID) {
            let found = figures(r);
            let none: Vec<_> = found.intersection(&lost).collect();
            assert!(none.is_empty(), "{}: {none:?} in {r}", refusal.name);
            wanted.retain(|figure| !found.contains(figure));
        }
        wanted.is_empty()
    });
    let ended = run.stop();
    let probes = ended.records[0]["probes"].as_array().unwrap().clone();
    let told = probes.iter().find(|probe| probe["name"] == refusal.probe).unwrap();
    let reason = told["reason"].as_str().unwrap_or_default();
    println!("{}: {} figures go; {told}", refusal.name, lost.len());
    assert!(told["state"] == "failed" && reason.contains(refusal.reason), "{}: {told}", refusal.name);
}

/// `kvm-monitor run`, for which the kernel's type information is that file.
fn start(lab: &Lab, types: &Path) -> Run {
    const INSTEAD: &str = r#"mount --bind "$1" /sys/kernel/btf/vmlinux; shift; exec "$@""#;
    let mut command: Command = lab.command("unshare");
    command.args(["--mount", "sh", "-euc", INSTEAD, "sh"]).arg(types).arg(program());
    Run::start(command, &["run", "--domain", NAME, "--libvirt", "require", "--interval", "100ms"])
}

/// The same, in which a name begins with another letter.
fn without(types: &[u8], name: &str) -> Vec<u8> {
    let bytes = [b"\0", name.as_bytes(), b"\0"].concat();
    let at = types.windows(bytes.len()).position(|window| window == bytes);
    let at = at.unwrap_or_else(|| panic!("this kernel has no {name}"));
    let mut types = types.to_vec();
    types[at + 1] = b'_';
    types
}

/// Paths of the figures and histograms that kernel probes made, without the numbers of their entities.
fn figures(sample: &Value) -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    for group in ["cpu", "vcpus", "interfaces", "disks"] {
        let entities = match &sample[group] {
            Value::Array(entities) => entities.clone(),
            one => vec![one.clone()],
        };
        for (name, value) in entities.iter().filter_map(Value::as_object).flatten() {
            let is_figure = !value["ebpf"].is_null() || name.ends_with("_hist_ns") && value.is_array();
            if is_figure {
                found.insert(format!("{group}.{name}"));
            }
        }
    }
    found
}

#[test]
fn a_name_is_respelt_and_nothing_else() {
    let types = b"\0one\0two\0twofold\0";
    assert_eq!(without(types, "two"), b"\0one\0_wo\0twofold\0");
}
