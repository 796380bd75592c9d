//! Block devices for disks: loop devices, and device-mapper devices over them.
//!
//! Each is told to go with its last user as soon as it exists, so that none outlives the lab however that ends.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};

/// A block device; it goes when this and QEMU have let go of it.
#[derive(Debug)]
pub(crate) struct Device {
    path: PathBuf,
    /// Keeps it until QEMU has it open.
    _user: File,
}

impl Device {
    /// A loop device over a file.
    pub(crate) fn over_file(file: &Path) -> Result<Self> {
        // On a kernel without, the next command says so.
        let _ = Command::new("modprobe").args(["--quiet", "loop"]).status();
        let output = run(Command::new("losetup").args(["--find", "--show"]).arg(file))?;
        let device = Self::open(output.trim().into())?;
        // While it is in use, this only sets the flag by which its last user takes it along.
        run(Command::new("losetup").arg("--detach").arg(&device.path))?;
        Ok(device)
    }

    /// A device-mapper device over a loop device over a file.
    pub(crate) fn mapped(file: &Path, name: &str) -> Result<Self> {
        let _ = Command::new("modprobe").args(["--quiet", "dm-mod"]).status();
        let below = Self::over_file(file)?;
        let sectors = file.metadata().context("the image is gone")?.len() / 512;
        let table = format!("0 {sectors} linear {} 0", below.path.display());
        run(dmsetup().args(["create", name, "--table", &table]))?;
        // By the kernel's own name: where there is no udev, dmsetup takes the other one away as soon as it is told to remove.
        let number = run(dmsetup().args(["info", "-c", "--noheadings", "-o", "blkdevname", name]))?;
        let device = Self::open(Path::new("/dev").join(number.trim()))?;
        run(dmsetup().args(["remove", "--deferred", name]))?;
        Ok(device)
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    fn open(path: PathBuf) -> Result<Self> {
        let user = File::open(&path).with_context(|| format!("cannot open {}", path.display()))?;
        Ok(Self { path, _user: user })
    }
}

/// Without udev nobody else makes the device's file.
fn dmsetup() -> Command {
    let mut command = Command::new("dmsetup");
    command.env("DM_DISABLE_UDEV", "1");
    command
}

fn run(command: &mut Command) -> Result<String> {
    let name = command.get_program().to_string_lossy().into_owned();
    let output = command.output().with_context(|| format!("cannot run {name}"))?;
    let message = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{name}: {}", message.trim());
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}
