//! `cargo xtask bench`: measures what the probes and collections cost. Prints figures; judges nothing.

use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context as _, Result, bail, ensure};

use crate::apt::{self, Conflicts};
use crate::setup::{self, Scope};
use crate::{build, paths, process};

/// The other program that collects from libvirt, as Python's package registry has it.
const CEILOMETER: &str = "ceilometer==27.0.0";

/// The subcommand.
pub(crate) fn run(args: &[String]) -> Result<()> {
    let Some((name @ ("block" | "kvm" | "libvirt" | "net" | "sched"), rest)) =
        args.split_first().map(|(name, rest)| (name.as_str(), rest))
    else {
        bail!("bench takes the name of a benchmark: block, kvm, libvirt, net or sched")
    };
    let takes_arguments = matches!(name, "block" | "libvirt" | "sched");
    ensure!(rest.is_empty() || takes_arguments, "bench {name} takes no argument, not `{}`", rest[0]);
    ensure!(process::is_root(), "bench needs root, because it loads kernel programs: run it with sudo");
    if name == "block" {
        setup::ensure(Scope::Bench)?;
    }
    let mut cargo = build::host_cargo("bench")?;
    cargo.args(["--package", "monitor", "--bench", name]);
    if name == "libvirt" {
        setup::ensure(Scope::Bench)?;
        let built = build::prepare_live()?;
        cargo.env("KVM_MONITOR_BIN", built.monitor);
        cargo.env("KVM_MONITOR_LAB_KERNEL", built.kernel_dir).env("KVM_MONITOR_GUEST_INIT", built.guest_init);
        cargo.env("KVM_MONITOR_LAB_DIR", built.target_dir);
        match ceilometer() {
            Ok(python) => drop(cargo.env("KVM_MONITOR_BENCH_PYTHON", python)),
            Err(error) => eprintln!("ceilometer is not measured: {error:#}"),
        }
    }
    if name == "sched" {
        want_peer();
    }
    cargo.arg("--").args(rest);
    process::run(&mut cargo)
}

/// A Python that has ceilometer, and Debian's libvirt module; made once.
fn ceilometer() -> Result<PathBuf> {
    let place = paths::target().join("bench-python");
    let python = place.join("bin/python3");
    let has_it = |python: &PathBuf| process::succeeds(Command::new(python).args(["-c", "import ceilometer"]));
    if !has_it(&python) {
        let mut venv = Command::new("/usr/bin/python3");
        process::run_tailed(venv.args(["-m", "venv", "--system-site-packages"]).arg(&place))?;
        process::run_tailed(Command::new(&python).args(["-m", "pip", "install", "--quiet", CEILOMETER]))?;
    }
    has_it(&python).then_some(python).context("it cannot be imported after its installation")
}

/// The program that the probes at a context switch are compared with, where the distribution has it.
fn want_peer() {
    if process::find_program("runqlat").is_some() {
        return;
    }
    eprintln!("missing: runqlat (to compare with), which Debian has in libbpf-tools");
    if let Err(error) = apt::usable().and_then(|()| apt::install(&["libbpf-tools"], Conflicts::Keep)) {
        eprintln!("its rows are left out: {error:#}");
    }
}
