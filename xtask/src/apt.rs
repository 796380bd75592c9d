//! Installing Debian packages: no prompt, no service started, nothing removed.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

use anyhow::{Context as _, Result, anyhow, bail, ensure};

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

/// What to do with an installed package of another release that a needed one cannot stand beside.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Conflicts {
    /// Leave it, and fail.
    Keep,
    /// Replace it by the version that goes with this system's release.
    Downgrade,
}

/// Installs the packages, after refreshing the package lists once.
pub(crate) fn install(packages: &[&str], conflicts: Conflicts) -> Result<()> {
    refresh_lists()?;
    let in_the_way = in_the_way(packages);
    if let (Conflicts::Keep, Some(package)) = (conflicts, in_the_way.first()) {
        bail!(
            "the installed {package} is of another release and cannot stay beside what is needed; \
             `cargo xtask setup --allow-downgrade` replaces it by the version of this release"
        );
    }
    let replaced = in_the_way.iter().map(|package| release_version(package)).collect::<Result<Vec<_>>>()?;
    eprintln!("installing with apt: {} {}", packages.join(" "), replaced.join(" "));
    let mut command = apt_get();
    // --no-remove: a package that would displace another, say a packaged rustup, is not worth it.
    command.args(OPTIONS).args(["--no-remove", "--no-install-recommends"]);
    if !replaced.is_empty() {
        command.arg("--allow-downgrades");
    }
    process::run_tailed(command.arg("install").args(packages).args(&replaced))
}

/// Downloads packages and unpacks them into a new directory, all of it or nothing; nothing is installed. `complete` finishes
/// what was unpacked and judges it, before it gets its place.
pub(crate) fn unpack(
    packages: &[&str],
    dir: &Path,
    complete: impl FnOnce(&Path) -> Result<()>,
) -> Result<()> {
    let partial = dir.with_file_name(format!(".partial-{}", std::process::id()));
    fs::create_dir_all(&partial).with_context(|| format!("cannot create {}", partial.display()))?;
    let result = download(packages, &partial)
        .and_then(|()| complete(&partial))
        .and_then(|()| fs::rename(&partial, dir).with_context(|| format!("cannot create {}", dir.display())));
    if result.is_err() {
        fs::remove_dir_all(&partial).ok();
    }
    result
}

fn download(packages: &[&str], into: &Path) -> Result<()> {
    // Without the sandbox user, who may not write into this directory, apt has nothing to warn about.
    let options = ["-q", "-o", "APT::Sandbox::User=root", "-o", "Acquire::Retries=3", "download"];
    process::run_tailed(Command::new("apt-get").args(options).args(packages).current_dir(into))?;
    let files: Vec<_> = fs::read_dir(into)?.flatten().map(|entry| entry.path()).collect();
    let is_package = |file: &&PathBuf| file.extension().is_some_and(|extension| extension == "deb");
    let debs: Vec<_> = files.iter().filter(is_package).collect();
    ensure!(!debs.is_empty(), "apt-get download {} left no file", packages.join(" "));
    for deb in debs {
        process::run_tailed(Command::new("dpkg").arg("-x").arg(deb).arg(into))?;
        fs::remove_file(deb)?;
    }
    Ok(())
}

/// Installed packages that apt would remove for the sake of these.
fn in_the_way(packages: &[&str]) -> Vec<String> {
    let mut command = Command::new("apt-get");
    command.args(["-q", "--simulate", "--no-install-recommends", "install"]).args(packages);
    removed(&process::output(&mut command).unwrap_or_default())
}

/// The packages that a simulated run removes: its lines `Remv NAME [VERSION]`.
fn removed(simulation: &str) -> Vec<String> {
    let name = |line: &str| Some(line.strip_prefix("Remv ")?.split_whitespace().next()?.to_owned());
    simulation.lines().filter_map(name).collect()
}

/// `NAME=VERSION` with the newest version that the package lists have.
fn release_version(package: &str) -> Result<String> {
    let versions = process::output(Command::new("apt-cache").args(["madison", package]))?;
    let newest = versions.lines().find_map(|line| Some(line.split('|').nth(1)?.trim().to_owned()));
    let newest = newest.ok_or_else(|| anyhow!("the package lists have no {package}"))?;
    Ok(format!("{package}={newest}"))
}

/// Refreshes the package lists, where that is allowed.
pub(crate) fn refresh_lists() -> Result<()> {
    usable()?;
    update();
    Ok(())
}

/// Refreshes the package lists, once per run. A failure is shown and left to the install to judge.
fn update() {
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

#[cfg(test)]
mod tests {
    use super::removed;

    #[test]
    fn removals_are_found_in_a_simulation() {
        let simulation =
            "Reading package lists...\nRemv qemu-utils [1:10.0.2]\nInst cpio (2.13)\nConf cpio\n";
        assert_eq!(removed(simulation), ["qemu-utils"]);
    }
}
