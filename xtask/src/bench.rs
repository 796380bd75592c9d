//! `cargo xtask bench`: measures what the probes cost. Prints figures; judges nothing.

use anyhow::{Result, bail, ensure};

use crate::{build, process};

/// The subcommand.
pub(crate) fn run(args: &[String]) -> Result<()> {
    let words: Vec<_> = args.iter().map(String::as_str).collect();
    let [name @ ("kvm" | "net" | "sched")] = words[..] else {
        bail!("bench takes the name of a benchmark: kvm, net or sched")
    };
    ensure!(process::is_root(), "bench needs root, because it loads kernel programs: run it with sudo");
    let mut cargo = build::host_cargo("bench")?;
    cargo.args(["--package", "monitor", "--bench", name]);
    process::run(&mut cargo)
}
