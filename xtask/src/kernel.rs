//! The kernel that lab guests boot: a Debian cloud kernel, unpacked into the cache and never installed.
//!
//! The directory has `boot/vmlinuz-VERSION` and `lib/modules/VERSION`, as `dpkg -x` leaves them.

use std::env;
use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, bail, ensure};

use crate::{apt, paths, process};

/// Environment variable that names a directory to use instead.
const VARIABLE: &str = "KVM_MONITOR_LAB_KERNEL";
/// The series to prefer: the oldest one promised to work.
const SERIES: &str = "6.1.";

/// The unpacked kernel, if there is one already.
pub(crate) fn find() -> Option<PathBuf> {
    if let Some(dir) = env::var_os(VARIABLE) {
        return Some(PathBuf::from(dir)).filter(|dir| is_kernel(dir));
    }
    newest(unpacked(), SERIES).map(|name| cache().join(name))
}

/// The newest kernel of a series such as `6.12`, fetched if need be.
pub(crate) fn of_series(series: &str) -> Result<PathBuf> {
    let prefix = format!("{series}.");
    let of_series = |name: &String| name.starts_with(&prefix);
    if let Some(name) = newest(unpacked(), &prefix).filter(of_series) {
        return Ok(cache().join(name));
    }
    let fetched = fetch(&prefix).with_context(|| format!("cannot fetch a kernel {series}"))?;
    let name = fetched.file_name().map(|name| name.to_string_lossy().into_owned());
    ensure!(name.as_ref().is_some_and(of_series), "apt has no kernel {series}, the nearest is {name:?}");
    Ok(fetched)
}

/// The kernels in the cache.
fn unpacked() -> Vec<String> {
    let Ok(entries) = fs::read_dir(cache()) else { return Vec::new() };
    let names = entries.flatten().filter_map(|entry| entry.file_name().into_string().ok());
    // A hidden one is still being unpacked, or was left so.
    let complete = names.filter(|name| !name.starts_with('.') && is_kernel(&cache().join(name)));
    complete.collect()
}

/// The unpacked kernel, fetched if need be.
pub(crate) fn prepare() -> Result<PathBuf> {
    if let Some(dir) = find() {
        return Ok(dir);
    }
    if let Some(dir) = env::var_os(VARIABLE) {
        bail!("{VARIABLE} is {}, which lacks boot/vmlinuz-* or lib/modules/*", Path::new(&dir).display());
    }
    fetch(SERIES).or_else(|fetching| {
        eprintln!("cannot fetch a guest kernel: {fetching:#}; looking for one of this host");
        host_kernel().with_context(|| format!("no guest kernel: {fetching:#}; and none of this host serves"))
    })
}

fn cache() -> PathBuf {
    paths::cache().join("kernels")
}

fn is_kernel(dir: &Path) -> bool {
    image(dir).is_some()
        && fs::read_dir(dir.join("lib/modules")).is_ok_and(|mut found| found.next().is_some())
}

/// The kernel image in such a directory.
fn image(dir: &Path) -> Option<PathBuf> {
    let is_image = |path: &PathBuf| {
        path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("vmlinuz"))
            && fs::File::open(path).is_ok()
    };
    fs::read_dir(dir.join("boot")).ok()?.flatten().map(|entry| entry.path()).find(is_image)
}

/// Downloads and unpacks the newest package of the series, else of any.
fn fetch(series: &str) -> Result<PathBuf> {
    for tool in ["apt-get", "apt-cache", "dpkg"] {
        process::find_program(tool).with_context(|| format!("no {tool} here"))?;
    }
    let candidates = candidates()?;
    let version = match newest(candidates, series) {
        Some(version) => version,
        // Without package lists there is no candidate either.
        None => {
            apt::refresh_lists()?;
            newest(self::candidates()?, series).context("apt knows no linux-image-*-cloud-amd64 package")?
        }
    };
    unpack(&version).or_else(|error| {
        // Old lists name packages that are gone from the archive.
        apt::refresh_lists().with_context(|| format!("{error:#}"))?;
        unpack(&newest(self::candidates()?, series).unwrap_or(version))
    })
}

/// Versions that apt offers, such as `6.1.0-56-cloud-amd64`.
fn candidates() -> Result<Vec<String>> {
    let mut search = Command::new("apt-cache");
    search.args(["search", "--names-only", "^linux-image-[0-9].*-cloud-amd64$"]);
    let names = process::output(&mut search)?;
    let packages = names.lines().filter_map(|line| line.split_whitespace().next());
    let versions = packages.filter_map(|name| name.strip_prefix("linux-image-"));
    // A version has three numbers; with fewer it is a meta-package, which contains nothing.
    Ok(versions.filter(|version| numbers(version).len() > 2).map(str::to_owned).collect())
}

fn unpack(version: &str) -> Result<PathBuf> {
    let dir = cache().join(version);
    eprintln!("fetching guest kernel {version} into {}", dir.display());
    apt::unpack(&[&format!("linux-image-{version}")], &dir, |unpacked| {
        if !unpacked.join("lib").exists() {
            symlink("usr/lib", unpacked.join("lib"))?;
        }
        // The dependencies between modules are made at installation, which does not happen.
        let depmod = process::find_program("depmod").context("no depmod here (package kmod)")?;
        process::run_tailed(Command::new(depmod).arg("-b").arg(unpacked).arg(version))?;
        ensure!(is_kernel(unpacked), "the package of {version} has no kernel or no modules");
        Ok(())
    })?;
    Ok(dir)
}

/// A kernel of this host, as links in the same layout.
fn host_kernel() -> Result<PathBuf> {
    let entries = fs::read_dir("/lib/modules").context("cannot read /lib/modules")?;
    let versions: Vec<_> =
        entries.flatten().filter_map(|entry| entry.file_name().into_string().ok()).collect();
    let image = |version: &str| {
        let modules = Path::new("/lib/modules").join(version);
        let places = [PathBuf::from(format!("/boot/vmlinuz-{version}")), modules.join("vmlinuz")];
        places.into_iter().find(|image| modules.join("modules.dep").exists() && fs::File::open(image).is_ok())
    };
    let usable = versions.into_iter().filter(|version| image(version).is_some()).collect();
    let version =
        newest(usable, SERIES).context("no /boot/vmlinuz-* that we may read and that has its modules")?;
    let image = image(&version).context("the kernel image vanished")?;
    let dir = cache().join(format!("{version}-of-this-host"));
    fs::create_dir_all(dir.join("boot"))?;
    fs::create_dir_all(dir.join("lib/modules"))?;
    link(&image, &dir.join("boot").join(format!("vmlinuz-{version}")))?;
    link(&Path::new("/lib/modules").join(&version), &dir.join("lib/modules").join(&version))?;
    Ok(dir)
}

fn link(from: &Path, to: &Path) -> Result<()> {
    fs::remove_file(to).ok();
    symlink(from, to).with_context(|| format!("cannot create {}", to.display()))
}

/// The newest of the series, else the newest.
fn newest(mut versions: Vec<String>, series: &str) -> Option<String> {
    versions.sort_by_key(|version| (version.starts_with(series), numbers(version)));
    versions.pop()
}

/// All numbers before the flavour: 6.1.0-56-cloud-amd64 is 6, 1, 0, 56.
fn numbers(version: &str) -> Vec<u32> {
    let version = version.split("-cloud").next().unwrap_or(version);
    version.split(|c: char| !c.is_ascii_digit()).filter_map(|number| number.parse().ok()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn newest_of(versions: &[&str]) -> Option<String> {
        newest(versions.iter().map(|version| (*version).to_owned()).collect(), SERIES)
    }

    #[test]
    fn takes_the_newest_by_number_of_the_preferred_series() {
        let found = newest_of(&["6.1.0-9-cloud-amd64", "6.12.117+deb12-cloud-amd64", "6.1.0-56-cloud-amd64"]);
        assert_eq!(found.unwrap(), "6.1.0-56-cloud-amd64");
        let found = newest_of(&["6.12.48+deb13-cloud-amd64", "6.12.107+deb13-cloud-amd64"]);
        assert_eq!(found.unwrap(), "6.12.107+deb13-cloud-amd64");
        assert_eq!(newest_of(&[]), None);
    }

    #[test]
    fn a_meta_package_is_not_a_version() {
        assert_eq!(numbers("6.12-cloud-amd64").len(), 2);
        assert_eq!(numbers("6.1.0-56-cloud-amd64"), [6, 1, 0, 56]);
    }
}
