//! The lab's namespaces, seen from outside: running programs and code inside, reaching files inside.

use std::ffi::{CStr, CString};
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::AsFd;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use rustix::fs::{CWD, Mode, OFlags};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

/// Names the namespaces by the process that keeps them, so that holding a `Space` does not keep them alive.
#[derive(Debug)]
pub(crate) struct Space {
    keeper: u32,
    mount: CString,
    network: CString,
}

impl Space {
    /// The namespaces of process `keeper`.
    pub(crate) fn of(keeper: u32) -> Self {
        let link = |kind| CString::new(format!("/proc/{keeper}/ns/{kind}")).expect("digits and letters");
        Self { keeper, mount: link("mnt"), network: link("net") }
    }

    /// A path of the lab, as seen from outside.
    pub(crate) fn path(&self, inside: &Path) -> PathBuf {
        let relative = inside.strip_prefix("/").unwrap_or(inside);
        Path::new("/proc").join(self.keeper.to_string()).join("root").join(relative)
    }

    /// A command that runs inside, in the same working directory by path.
    pub(crate) fn command(&self, program: &Path) -> Command {
        let (mount, network) = (self.mount.clone(), self.network.clone());
        let mut command = Command::new(program);
        // SAFETY: the closure makes system calls only, and neither allocates nor locks: safe after fork.
        unsafe { command.pre_exec(move || enter_both(&mount, &network)) };
        command
    }

    /// Runs `virsh` and returns what it printed.
    pub(crate) fn virsh(&self, arguments: &[&str]) -> Result<String> {
        let mut command = self.command(Path::new("virsh"));
        let output = command.args(["--quiet", "--connect", "qemu:///system"]).args(arguments).output();
        let output = output.context("cannot run virsh in the lab")?;
        let message = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "virsh {}: {}", arguments.join(" "), message.trim());
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    /// Runs a function on a thread of its own that lives in the lab's network namespace.
    pub(crate) fn in_network<T: Send>(&self, work: impl FnOnce() -> T + Send) -> Result<T> {
        std::thread::scope(|scope| {
            let thread = scope.spawn(|| {
                enter(&self.network, LinkNameSpaceType::Network)?;
                io::Result::Ok(work())
            });
            let result = thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
            result.context("cannot enter the lab's network namespace")
        })
    }
}

fn enter(link: &CStr, kind: LinkNameSpaceType) -> io::Result<()> {
    let file = rustix::fs::open(link, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())?;
    Ok(move_into_link_name_space(file.as_fd(), Some(kind))?)
}

/// Enters network and mount namespace. The latter sets the working directory to the root, hence the way back.
fn enter_both(mount: &CStr, network: &CStr) -> io::Result<()> {
    let mut buffer = [MaybeUninit::<u8>::zeroed(); 4096];
    let (directory, _) = rustix::fs::readlinkat_raw(CWD, c"/proc/self/cwd", &mut buffer[..4095])?;
    enter(network, LinkNameSpaceType::Network)?;
    enter(mount, LinkNameSpaceType::Mount)?;
    let mut path = [0; 4096];
    path[..directory.len()].copy_from_slice(directory);
    let path = CStr::from_bytes_until_nul(&path).map_err(|_| io::ErrorKind::InvalidFilename)?;
    Ok(rustix::process::chdir(path)?)
}
