//! What runs of the program leave in the kernel: BPF programs, maps and links, as bpftool lists them.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    process::Command,
    time::{Duration, Instant},
};

use serde_json::Value;

use crate::support::PATIENCE;

/// A kind as bpftool names it (`prog`, `map`, `link`) and an id.
pub(crate) type BpfObject = (&'static str, u64);
const BPF_KINDS: [&str; 3] = ["prog", "map", "link"];

/// All of this host, with their names.
pub(crate) fn bpf_objects() -> BTreeMap<BpfObject, String> {
    let mut objects = BTreeMap::new();
    for kind in BPF_KINDS {
        let output = Command::new("bpftool").args(["--json", kind, "show"]).output();
        let output = output.expect("bpftool: `cargo xtask setup` helps");
        let list: Value = serde_json::from_slice(&output.stdout).unwrap();
        for object in list.as_array().unwrap() {
            let name = object["name"].as_str().unwrap_or_default().to_owned();
            objects.insert((kind, object["id"].as_u64().unwrap()), name);
        }
    }
    objects
}

/// Those that a process has open.
pub(crate) fn objects_held_by(pid: u32) -> BTreeSet<BpfObject> {
    let entries = fs::read_dir(format!("/proc/{pid}/fdinfo")).into_iter().flatten();
    let texts = entries.filter_map(|entry| fs::read_to_string(entry.ok()?.path()).ok());
    let objects = |text: String| -> Vec<BpfObject> {
        let object = |line: &str| {
            let (key, id) = line.split_once(":\t")?;
            let kind = BPF_KINDS.into_iter().find(|kind| key.strip_suffix("_id") == Some(kind))?;
            Some((kind, id.parse().ok()?))
        };
        text.lines().filter_map(object).collect()
    };
    texts.flat_map(objects).collect()
}

/// Those that any process has open: another run of the program may be under way on this host.
fn objects_held() -> BTreeSet<BpfObject> {
    let entries = fs::read_dir("/proc").unwrap();
    let pids = entries.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok());
    pids.flat_map(objects_held_by).collect()
}

/// Waits until what a run held is gone, and nothing else that is new lives without a process. The kernel frees
/// late, and a list is of one moment: only what stays is left.
pub(crate) fn assert_nothing_left(before: &BTreeMap<BpfObject, String>, of_the_run: &BTreeSet<BpfObject>) {
    let deadline = Instant::now() + PATIENCE;
    let mut left: Option<BTreeMap<BpfObject, String>> = None;
    loop {
        let mut now = bpf_objects();
        let held = objects_held();
        now.retain(|object, _| {
            of_the_run.contains(object) || !before.contains_key(object) && !held.contains(object)
        });
        if let Some(left) = &left {
            now.retain(|object, _| left.contains_key(object));
        }
        if now.is_empty() {
            return;
        }
        assert!(Instant::now() < deadline, "left behind in the kernel: {now:?}");
        left = Some(now);
        std::thread::sleep(Duration::from_millis(20));
    }
}
