//! `cargo xtask lint`: everything that is checked without running our code.

use anyhow::Result;

use crate::report::{Report, Verdict};
use crate::setup::{self, Scope};
use crate::{build, docs, ebpf, paths, process};

/// The subcommand: whether all checks passed.
pub(crate) fn run(args: &[String]) -> Result<bool> {
    build::refuse("lint", args)?;
    let mut report = Report::default();
    checks(&mut report)?;
    Ok(report.finish())
}

/// Runs every check; each becomes a line of the report.
pub(crate) fn checks(report: &mut Report) -> Result<()> {
    setup::ensure(Scope::Build)?;
    report.add("lint: formatting", format());
    report.add("lint: clippy on the host", streamed(host_clippy()));
    report.add("lint: clippy without probes", streamed(probeless_clippy()));
    report.add("lint: clippy on the BPF target", bpf_clippy());
    report.add("lint: documentation builds", streamed(doc()));
    report.add("lint: generated documents are up to date", verdict(docs::check()));
    Ok(())
}

fn verdict(result: Result<()>) -> Verdict {
    result.map_or_else(|error| Verdict::Failed(format!("{error:#}")), |()| Verdict::Passed)
}

/// For commands whose output was passed on as it came: repeating it would bury the rest.
fn streamed(result: Result<()>) -> Verdict {
    let first_line = |error: anyhow::Error| error.to_string().lines().next().unwrap_or_default().to_owned();
    result.map_or_else(|error| Verdict::Failed(first_line(error)), |()| Verdict::Passed)
}

fn format() -> Verdict {
    // rustfmt is a component of rustup's toolchains, a package of its own elsewhere.
    if !process::succeeds(build::cargo("fmt").arg("--version")) {
        return Verdict::NotRun("this toolchain has no rustfmt".to_owned());
    }
    streamed(process::run(build::cargo("fmt").args(["--all", "--", "--check"])))
}

/// Tests and the live tests included, which a plain build leaves out.
fn host_clippy() -> Result<()> {
    let mut cargo = build::host_cargo("clippy")?;
    cargo.args(["--workspace", "--all-targets", "--features", "monitor/live,lab/live", "--", "-Dwarnings"]);
    process::run_tailed(&mut cargo)
}

/// The program has to build without kernel probes, too.
fn probeless_clippy() -> Result<()> {
    let mut cargo = build::cargo("clippy");
    cargo.arg("--target-dir").arg(paths::target());
    cargo.args(["--package", "monitor", "--no-default-features", "--lib", "--bins", "--", "-Dwarnings"]);
    process::run_tailed(&mut cargo)
}

fn bpf_clippy() -> Verdict {
    match ebpf::toolchain() {
        Err(error) => Verdict::Failed(format!("{error:#}")),
        Ok(toolchain) if !toolchain.has_clippy() => {
            Verdict::NotRun(format!("this toolchain has no clippy: {}", toolchain.describe()))
        }
        Ok(toolchain) => {
            let mut cargo = toolchain.cargo("clippy");
            streamed(process::run_tailed(cargo.args(["--lib", "--bin", "probes", "--", "-Dwarnings"])))
        }
    }
}

fn doc() -> Result<()> {
    let mut cargo = build::host_cargo("doc")?;
    cargo.args(["--workspace", "--no-deps"]).env("RUSTDOCFLAGS", "-Dwarnings");
    process::run_tailed(&mut cargo)
}
