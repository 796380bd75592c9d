//! `cargo xtask demo`: profiles guests whose workload is known exactly, and compares what each source says.
//!
//! A [`Lab`] gives a private libvirtd; the guests of [`scenario`] run in it while `kvm-monitor run` writes
//! `target/demo/stream.ndjson`; what they did by their own account goes to `truth.json`, and `kvm-monitor compare` makes
//! the report of both. `--docs` writes the report into `docs/accuracy.md` as well.
#![expect(clippy::print_stdout, clippy::print_stderr, reason = "results go to stdout, progress to stderr")]

mod doctor;
mod monitor;
mod scenario;
mod truth;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use lab::interrupt::{self, Interrupted};
use lab::{Accelerator, Lab, LabDirs};
use serde_json::Value;

use crate::{build::Built, paths, process};
use monitor::Monitor;

/// How long anything may take: boot, a step, an answer of the monitor.
const PATIENCE: Duration = Duration::from_secs(30);
const WHOLE_SCRIPT: Duration = Duration::from_secs(75);
/// What the monitor sees between two things that are to be told apart: more than one slow read of libvirt.
const AFTER_STEP: Duration = Duration::from_millis(1_500);
/// Between two looks at something that is waited for.
const LOOK: Duration = Duration::from_millis(20);
/// Where `--docs` writes.
const DOCUMENT: &str = "docs/accuracy.md";

/// Runs the demo and prints the report.
pub(crate) fn run(args: &[String]) -> Result<()> {
    let words: Vec<_> = args.iter().map(String::as_str).collect();
    let document = match words[..] {
        [] => false,
        ["--docs"] => true,
        [other, ..] => bail!("demo takes --docs or nothing, not `{other}`"),
    };
    let built = crate::build::prepare_live()?;
    interrupt::catch();
    let begin = Instant::now();
    let result = record(&built).and_then(|recording| report(&built.monitor, &recording, document));
    // Ctrl-C reaches the programs in the lab too, so that their failure may be what is noticed first.
    if interrupt::check().is_err() {
        return Err(Interrupted).context("the demo was stopped; its guests and libvirtd are gone");
    }
    result?;
    eprintln!("demo: done in {:.0} s", begin.elapsed().as_secs_f64());
    Ok(())
}

/// What one run of the demo leaves behind.
struct Recording {
    directory: PathBuf,
    stream: PathBuf,
    truth: PathBuf,
}

fn record(built: &Built) -> Result<Recording> {
    let directory = built.target_dir.join("demo");
    fs::create_dir_all(&directory).with_context(|| format!("cannot make {}", directory.display()))?;
    let directory = directory.canonicalize().context("cannot resolve the demo's directory")?;
    let (stream, truth) = (directory.join("stream.ndjson"), directory.join("truth.json"));
    let _ = fs::remove_file(&stream); // Of an earlier run; usually there is none.

    eprintln!("demo: starting a private libvirtd");
    let lab = Lab::start(&LabDirs {
        target_dir: built.target_dir.clone(),
        kernel_dir: built.kernel_dir.clone(),
        guest_init: built.guest_init.clone(),
        accelerator: Accelerator::Emulated,
    })?;
    let mut monitor = Monitor::start(&lab, &built.monitor, &stream)?;
    let truths = scenario::run(&lab, &mut monitor)?;
    monitor.stop()?;
    drop(lab);
    fs::write(&truth, format!("{:#}\n", Value::from(truths)))
        .with_context(|| format!("cannot write {}", truth.display()))?;
    Ok(Recording { directory, stream, truth })
}

fn report(program: &Path, of: &Recording, document: bool) -> Result<()> {
    let compare = |format: &str| {
        let mut command = Command::new(program);
        command.arg("compare").arg(&of.stream).arg("--truth").arg(&of.truth).args(["--format", format]);
        // Other QEMU processes of this host are in the stream too.
        command.args(scenario::NAMES.iter().flat_map(|name| ["--domain", name]));
        process::output(&mut command)
    };
    for (format, name) in [("markdown", "report.md"), ("html", "report.html"), ("json", "report.json")] {
        write(&of.directory.join(name), &compare(format)?)?;
    }
    print!("{}", compare("text")?);
    let doctored = doctor::examine(program, of)?;
    println!("\nThe same stream with a source broken on purpose\n{}", doctor::text(&doctored));
    println!("\nstream: {}\nreport: {}", of.stream.display(), of.directory.join("report.html").display());
    if document {
        write(&paths::root().join(DOCUMENT), &accuracy(&compare("markdown")?, &doctored))?;
    }
    Ok(())
}

/// The report as a document.
fn accuracy(report: &str, doctored: &[doctor::Found]) -> String {
    let body = report.trim_start_matches("# kvm-monitor comparison").trim_start();
    format!(
        "# How accurate the numbers are\n\nWritten by `cargo xtask demo --docs`: guests with an exactly known workload, \
         what they did by their own account (truth), and what each source says. What the causes mean, and how\nthe \
         verdicts come about, is in the [README](../README.md#how-accurate-are-the-numbers). Every way to open a disk \
         image, with the requests of each\nby the guest's own account, by libvirt's and by the probes', is in \
         [disks.md](disks.md).\n\n{body}\n\
         ## The same stream with a source broken on purpose\n\n{}",
        doctor::markdown(doctored)
    )
}

fn write(file: &Path, text: &str) -> Result<()> {
    fs::write(file, text).with_context(|| format!("cannot write {}", file.display()))
}

/// Sleeps, unless Ctrl-C was pressed.
fn pause(time: Duration) -> Result<(), Interrupted> {
    let end = Instant::now() + time;
    while Instant::now() < end {
        interrupt::check()?;
        std::thread::sleep(LOOK.min(end.saturating_duration_since(Instant::now())));
    }
    interrupt::check()
}
