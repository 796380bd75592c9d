//! The SSH server of the tests of remote connections: Debian's, unpacked into the cache and never installed, since
//! an installed one would let others in from this machine's next start on.
//!
//! The directory has `usr/sbin/sshd`, and the libraries that it alone needs below `usr/lib` or `lib`.

use std::path::{Path, PathBuf};

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
    eprintln!("fetching an SSH server into {}", cached.display());
    let unpack = || {
        apt::unpack(&PACKAGES, &cached, |unpacked| {
            ensure!(has_server(unpacked), "the package openssh-server has no sshd");
            Ok(())
        })
    };
    // Old lists name packages that are gone from the archive.
    unpack().or_else(|_| {
        apt::refresh_lists()?;
        unpack()
    })?;
    Ok(cached)
}

fn has_server(dir: &Path) -> bool {
    dir.join("usr/sbin/sshd").is_file()
}
