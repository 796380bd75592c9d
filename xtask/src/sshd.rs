//! The SSH server of the tests of remote connections: Debian's, unpacked into the cache and never installed, since
//! an installed one would let others in from this machine's next start on.
//!
//! The directory has `usr/sbin/sshd`, and the libraries that it alone needs below `usr/lib` or `lib`.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, ensure};

use crate::{apt, paths, process};

/// The server, and the library that nothing else needs any more.
const PACKAGES: [&str; 2] = ["openssh-server", "libwrap0"];

/// The unpacked server, fetched if need be. `/` where one is installed.
pub(crate) fn prepare() -> Result<PathBuf> {
    let cached = paths::cache().join("sshd");
    if let Some(dir) = [Path::new("/"), &cached].into_iter().find(|dir| has_server(dir)) {
        return Ok(dir.to_path_buf());
    }
    for tool in ["apt-get", "dpkg"] {
        process::find_program(tool).with_context(|| format!("no sshd, and no {tool} here"))?;
    }
    let partial = paths::cache().join(format!(".sshd-{}", std::process::id()));
    fs::create_dir_all(&partial).with_context(|| format!("cannot create {}", partial.display()))?;
    eprintln!("fetching an SSH server into {}", cached.display());
    // Old lists name packages that are gone from the archive.
    let unpacked = unpack(&partial).or_else(|_| {
        apt::usable()?;
        apt::update();
        unpack(&partial)
    });
    let result = unpacked.and_then(|()| {
        ensure!(has_server(&partial), "the package openssh-server has no sshd");
        fs::rename(&partial, &cached).with_context(|| format!("cannot create {}", cached.display()))
    });
    if result.is_err() {
        fs::remove_dir_all(&partial).ok();
    }
    result.map(|()| cached)
}

fn has_server(dir: &Path) -> bool {
    dir.join("usr/sbin/sshd").is_file()
}

fn unpack(into: &Path) -> Result<()> {
    // Without the sandbox user, who may not write into this directory, apt has nothing to warn about.
    let options = ["-q", "-o", "APT::Sandbox::User=root", "-o", "Acquire::Retries=3", "download"];
    process::run_tailed(Command::new("apt-get").args(options).args(PACKAGES).current_dir(into))?;
    for entry in fs::read_dir(into)?.flatten() {
        let file = entry.path();
        if file.extension().is_some_and(|extension| extension == "deb") {
            process::run_tailed(Command::new("dpkg").arg("-x").arg(&file).arg(into))?;
            fs::remove_file(&file)?;
        }
    }
    Ok(())
}
