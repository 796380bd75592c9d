//! `cargo xtask disks`: every way to open an image, tried with an exact workload; writes `docs/disks.md`.
//!
//! The cells are those of `tests/live_disks.rs`: files and loop devices on this host, device-mapper in a host under test.
#![expect(clippy::print_stderr, reason = "progress goes to stderr")]

use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;

use crate::build::{self, Built};
use crate::test::{self, TestProgram};
use crate::{paths, process, vm};

const PROGRAM: &str = "live_disks";
const TEST: &str = "each_request_is_charged_to_its_disk_however_the_image_is_opened";
const HERE: &str = "raw,qcow2,qcow2-on-raw,loop";
const THERE: &str = "dm";
/// The host under test that has device-mapper.
const SERIES: &str = "6.12";
const DOCUMENT: &str = "docs/disks.md";
const ROWS: &str = "rows.ndjson";

/// The subcommand: what to measure now (all, what this host can, or what takes the host under test; the last run tells the
/// rest), or files with rows of earlier runs.
pub(crate) fn run(args: &[String]) -> Result<()> {
    let words: Vec<_> = args.iter().map(String::as_str).collect();
    let rows = match words[..] {
        [] => measure(&[Place::Here, Place::UnderTest])?,
        ["here"] => measure(&[Place::Here])?,
        [THERE] => measure(&[Place::UnderTest])?,
        ref files => files.iter().map(|file| read(Path::new(file))).collect::<Result<Vec<_>>>()?.concat(),
    };
    let file = paths::root().join(DOCUMENT);
    fs::write(&file, document(&rows)?).with_context(|| format!("cannot write {}", file.display()))?;
    eprintln!("disks: {} cells; wrote {DOCUMENT}", rows.len());
    Ok(())
}

/// Where cells are measured.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Place {
    Here,
    UnderTest,
}

impl Place {
    const ALL: [Self; 2] = [Self::Here, Self::UnderTest];

    /// Where the rows are left.
    fn rows(self) -> PathBuf {
        paths::target().join("disks").join(match self {
            Self::Here => "here.ndjson",
            Self::UnderTest => "dm.ndjson",
        })
    }
}

/// All cells: some are measured now, the others those of the last run, if there was one. Fails if one is not as expected.
fn measure(now: &[Place]) -> Result<Vec<Value>> {
    ensure!(process::is_root(), "disks needs root, because it runs guests: use sudo");
    let built = build::prepare_live()?;
    let program = test::compile()?.into_iter().find(|program| program.name == PROGRAM);
    let program = program.with_context(|| format!("there is no test {PROGRAM}"))?;
    let directory = paths::target().join("disks");
    fs::create_dir_all(&directory).with_context(|| format!("cannot make {}", directory.display()))?;
    let mut all = Vec::new();
    for place in Place::ALL {
        let rows = place.rows();
        if now.contains(&place) {
            let _ = fs::remove_file(&rows); // Of an earlier run; usually there is none.
            fill(place, (&program, &built), &rows)?;
        } else if !rows.exists() {
            eprintln!("disks: no rows in {} yet; their cells are left out", rows.display());
            continue;
        }
        all.extend(read(&rows)?);
    }
    Ok(all)
}

/// Measures the cells of one place.
fn fill(place: Place, (program, built): (&TestProgram, &Built), rows: &Path) -> Result<()> {
    match place {
        Place::Here => {
            let mut command = test::live_command(program, built);
            command.arg(TEST).env("KVM_MONITOR_DISK_CELLS", HERE).env("KVM_MONITOR_DISK_ROWS", rows);
            process::run(command.current_dir(&program.package))
        }
        Place::UnderTest => {
            let there = vm::out(SERIES).join(ROWS);
            let _ = fs::remove_file(&there); // Of an earlier run; usually there is none.
            ensure!(vm::command_on(built, SERIES, &words(program))?, "the cells on device-mapper failed");
            let copied = fs::copy(&there, rows);
            copied.with_context(|| format!("cannot copy {}", there.display())).map(drop)
        }
    }
}

/// What the host under test runs.
fn words(program: &TestProgram) -> Vec<String> {
    let variables = [format!("KVM_MONITOR_DISK_CELLS={THERE}"), format!("KVM_MONITOR_DISK_ROWS=/out/{ROWS}")];
    let program =
        [program.file.to_string_lossy().into_owned(), "--test-threads=1".to_owned(), TEST.to_owned()];
    ["env".to_owned()].into_iter().chain(variables).chain(program).collect()
}

fn read(file: &Path) -> Result<Vec<Value>> {
    let text = fs::read_to_string(file).with_context(|| format!("cannot read {}", file.display()))?;
    let rows: Result<Vec<Value>, _> = text.lines().map(serde_json::from_str).collect();
    rows.with_context(|| format!("{} holds no rows", file.display()))
}

fn document(rows: &[Value]) -> Result<String> {
    let mut text = String::from(
        "# Disks: what each party counts, however an image is opened\n\n\
         Written by `cargo xtask disks`. Each row is one disk of a guest that made a known number of requests: what the \
         guest's kernel says it asked for (truth), what\nlibvirt says QEMU was asked for, and what the probes saw QEMU do \
         on the host. Three figures in a cell are truth / libvirt / eBPF; one figure is that of all three.\n\n\
         - libvirt also has the reads of the firmware, before the guest's kernel; so has QEMU.\n\
         - Raw files and devices: QEMU makes each request of the guest once, through the page cache or past it, and \
         eBPF equals libvirt exactly.\n\
         - qcow2 adds its tables, and fills up clusters that the guest writes a part of (from the image below, if there \
         is one): more requests and bytes than the guest's.\n\
         - QEMU drops a flush when nothing was written since the last; `directsync` and `writethrough` hide the write cache \
         from the guest and flush after each write; `unsafe` never flushes.\n\
         - The kernel's aio (`native`) needs direct I/O: QEMU refuses it with the other cache modes.\n",
    );
    let mut images: Vec<&str> = Vec::new();
    for image in rows.iter().filter_map(|row| row["image"].as_str()) {
        if !images.contains(&image) {
            images.push(image);
        }
    }
    for image in images {
        let of = || rows.iter().filter(|row| row["image"] == image);
        let kernel = of().find_map(|row| row["kernel"].as_str()).unwrap_or_default();
        writeln!(text, "\n## {}, kernel {kernel}\n", title(image))?;
        writeln!(text, "| io | cache | served by | reads | bytes read | writes | bytes written | flushes |")?;
        writeln!(text, "|---|---|---|---|---|---|---|---|")?;
        for row in of() {
            let word = |key: &str| row[key].as_str().unwrap_or_default();
            write!(text, "| {} | {} | {} |", word("io"), word("cache"), word("thread"))?;
            for figure in 0..5 {
                write!(text, " {} |", cell(row, figure))?;
            }
            writeln!(text)?;
        }
    }
    Ok(text)
}

fn title(image: &str) -> &str {
    match image {
        "raw" => "Raw file",
        "qcow2" => "qcow2 file",
        "qcow2-on-raw" => "qcow2 file on a raw backing file",
        "loop" => "Loop device",
        "dm" => "Device-mapper device (in a host under test)",
        other => other,
    }
}

/// `truth / libvirt / eBPF`, or one figure if they are equal.
fn cell(row: &Value, figure: usize) -> String {
    let of = |party: &str| match &row[party][figure] {
        Value::Null => "not seen".to_owned(),
        value => value.to_string(),
    };
    let [truth, libvirt, ebpf] = ["truth", "libvirt", "ebpf"].map(of);
    if truth == libvirt && libvirt == ebpf { truth } else { format!("{truth} / {libvirt} / {ebpf}") }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_row_shows_where_the_parties_differ() {
        let row = json!({
            "kernel": "6.12", "image": "raw", "io": "native", "cache": "none", "thread": "main loop",
            "truth": [1, 512, 2, 1024, 2], "libvirt": [3, 5120, 2, 1024, 2], "ebpf": [3, 5120, 2, 1024, 1],
        });
        let text = document(&[row]).unwrap();
        assert!(text.contains("## Raw file, kernel 6.12"));
        let line = "| native | none | main loop | 1 / 3 / 3 | 512 / 5120 / 5120 | 2 | 1024 | 2 / 2 / 1 |";
        assert!(text.contains(line), "{text}");
        assert_eq!(cell(&json!({ "truth": [1], "libvirt": [1], "ebpf": null }), 0), "1 / 1 / not seen");
    }
}
