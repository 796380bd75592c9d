//! The duties of PID 1: mount /proc, /sys and /dev, load the modules of the initramfs, end the machine.

use std::ffi::CStr;
use std::fs::{self, File};
use std::io;
use std::os::fd::AsRawFd;

use crate::script::End;

/// Prepares the guest, and returns the script: what stands behind ` -- ` on the kernel command line.
/// The kernel itself ignores that part, else it would take `mem=64M` as a limit of its own.
pub(crate) fn start() -> Result<String, String> {
    for (kind, directory) in [(c"proc", c"/proc"), (c"sysfs", c"/sys"), (c"devtmpfs", c"/dev")] {
        mount(kind, directory).map_err(|e| format!("mount {directory:?}: {e}"))?;
    }
    for name in fs::read_to_string("/mod/order").unwrap_or_default().lines() {
        load_module(&format!("/mod/{name}")).map_err(|e| format!("module {name}: {e}"))?;
    }
    let line = fs::read_to_string("/proc/cmdline").map_err(|e| format!("/proc/cmdline: {e}"))?;
    Ok(script_of(&line).to_owned())
}

/// Powers off, resets, or returns to idle.
pub(crate) fn end(end: End) {
    let command = match end {
        End::Idle => return,
        End::PowerOff => libc::LINUX_REBOOT_CMD_POWER_OFF,
        End::Reboot => libc::LINUX_REBOOT_CMD_RESTART,
    };
    // SAFETY: sync takes no argument and cannot fail.
    unsafe { libc::sync() };
    // SAFETY: takes a command number only; it does not return if it succeeds.
    unsafe { libc::reboot(command) };
}

fn script_of(command_line: &str) -> &str {
    command_line.split_once(" -- ").map_or("", |(_, script)| script.trim().trim_matches('"'))
}

fn mount(kind: &CStr, directory: &CStr) -> io::Result<()> {
    let path = directory.to_str().expect("the names above are ASCII");
    fs::create_dir_all(path)?;
    // SAFETY: the three strings end in NUL and live through the call; none of these file systems takes data.
    let done = unsafe { libc::mount(kind.as_ptr(), directory.as_ptr(), kind.as_ptr(), 0, std::ptr::null()) };
    match io::Error::last_os_error() {
        // The kernel may have mounted /dev by itself.
        error if done < 0 && error.raw_os_error() != Some(libc::EBUSY) => Err(error),
        _ => Ok(()),
    }
}

fn load_module(path: &str) -> io::Result<()> {
    let file = File::open(path)?;
    // SAFETY: the descriptor is open through the call and the parameter string ends in NUL.
    let done = unsafe { libc::syscall(libc::SYS_finit_module, file.as_raw_fd(), c"".as_ptr(), 0) };
    if done < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_script_stands_behind_two_dashes() {
        assert_eq!(script_of("console=ttyS0 quiet -- \"sleep=1 mem=64M\"\n"), "sleep=1 mem=64M");
        assert_eq!(script_of("console=ttyS0 quiet\n"), "");
    }
}
