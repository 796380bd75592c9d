//! Installing Debian packages: no prompt, no service started, nothing removed.

use std::process::Command;
use std::sync::OnceLock;

use anyhow::{Context as _, Result, bail};

use crate::process;

/// Settings for the package scripts: ask nothing, and start or restart nothing.
const QUIET: [&str; 4] =
    ["DEBIAN_FRONTEND=noninteractive", "SYSTEMD_OFFLINE=1", "RUNLEVEL=1", "NEEDRESTART_SUSPEND=1"];

const OPTIONS: [&str; 10] = [
    "-q",
    "-y",
    "-o",
    "Dpkg::Options::=--force-confold",
    "-o",
    "DPkg::Lock::Timeout=300",
    "-o",
    "Acquire::Retries=3",
    "-o",
    "Dpkg::Use-Pty=0",
];

/// Whether this is a Debian-like system where we may install packages; the reason if not.
pub(crate) fn usable() -> Result<()> {
    process::find_program("apt-get").context("this is not a Debian-like system (no apt-get)")?;
    if !process::is_root() && !sudo_works() {
        bail!("installing needs root, and `sudo` is missing or asks for a password");
    }
    Ok(())
}

/// Whether `sudo` runs commands without asking.
pub(crate) fn sudo_works() -> bool {
    static WORKS: OnceLock<bool> = OnceLock::new();
    *WORKS.get_or_init(|| process::succeeds(Command::new("sudo").args(["-n", "true"])))
}

/// Installs the packages, after refreshing the package lists once.
pub(crate) fn install(packages: &[&str]) -> Result<()> {
    usable()?;
    update();
    eprintln!("installing with apt: {}", packages.join(" "));
    let mut command = apt_get();
    // --no-remove: a package that would displace another, say a packaged rustup, is not worth it.
    command.args(OPTIONS).args(["--no-remove", "--no-install-recommends", "install"]).args(packages);
    process::run_tailed(&mut command)
}

/// Refreshes the package lists, once per run. A failure is shown and left to the install to judge.
pub(crate) fn update() {
    static DONE: OnceLock<()> = OnceLock::new();
    DONE.get_or_init(|| {
        eprintln!("refreshing the package lists");
        if let Err(error) = process::run_tailed(apt_get().args(OPTIONS).arg("update")) {
            eprintln!("{error:#}");
        }
    });
}

/// `apt-get` with the settings above. They are arguments of `env`, because sudo drops variables.
fn apt_get() -> Command {
    let mut command = Command::new(if process::is_root() { "env" } else { "sudo" });
    if !process::is_root() {
        command.args(["-n", "env"]);
    }
    command.args(QUIET).arg("apt-get");
    command
}
