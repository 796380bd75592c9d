//! PID 1 of a host-under-test VM (`cargo xtask lab`): a small world of its own on top of the outer machine's files.
//!
//! The root file system is the outer machine's, shared read-only by virtiofs (tag `root`) under an overlay in memory;
//! the share `out` is writable and holds `host.sh`, which does the rest. When that ends, its exit status is written to
//! `out/status` and the machine is powered off, whatever happened before.
#![expect(clippy::print_stderr, reason = "the kernel's console is where the outer machine looks for errors")]

use std::ffi::CString;
use std::fs::{self, File};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::process::ExitStatusExt;
use std::process::{Command, ExitStatus, Stdio};

/// Where the writable share is, in the end.
const OUT: &str = "/out";

fn main() {
    if std::process::id() != 1 {
        eprintln!("host: this is the first program of a virtual machine");
        std::process::exit(2);
    }
    match prepare().and_then(|()| run()) {
        Ok(status) => {
            // A shell's way of telling a signal.
            let code = status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or(0));
            report("status", &format!("{code}\n"));
        }
        Err(error) => eprintln!("host: {error}"),
    }
    // SAFETY: sync takes no argument and cannot fail.
    unsafe { libc::sync() };
    // SAFETY: takes a command number only; it does not return if it succeeds.
    unsafe { libc::reboot(libc::LINUX_REBOOT_CMD_POWER_OFF) };
}

/// Loads the modules of the initramfs and makes the new root file system the root.
fn prepare() -> Result<(), String> {
    for (kind, directory) in [("proc", "/proc"), ("sysfs", "/sys"), ("devtmpfs", "/dev")] {
        mount(kind, kind, directory, (0, ""))?;
    }
    for name in fs::read_to_string("/mod/order").unwrap_or_default().lines() {
        load_module(&format!("/mod/{name}")).map_err(|error| format!("module {name}: {error}"))?;
    }
    mount("virtiofs", "root", "/lower", (libc::MS_RDONLY, ""))?;
    mount("tmpfs", "upper", "/upper", (0, "mode=755"))?;
    for directory in ["/upper/files", "/upper/work"] {
        fs::create_dir(directory).map_err(|error| format!("{directory}: {error}"))?;
    }
    let layers = "lowerdir=/lower,upperdir=/upper/files,workdir=/upper/work";
    mount("overlay", "root", "/root", (0, layers))?;
    // It cannot be in the share itself: the share would then contain itself.
    mount("virtiofs", "out", &format!("/root{OUT}"), (0, ""))?;
    for (kind, directory) in [("proc", "/root/proc"), ("sysfs", "/root/sys"), ("devtmpfs", "/root/dev")] {
        mount(kind, kind, directory, (0, ""))?;
    }
    become_root("/root").map_err(|error| format!("cannot change the root directory: {error}"))
}

fn run() -> Result<ExitStatus, String> {
    report("up", &fs::read_to_string("/proc/uptime").unwrap_or_default());
    let output = File::options().append(true).create(true).open(format!("{OUT}/output"));
    let output = output.map_err(|error| format!("{OUT}/output: {error}"))?;
    let error_output = output.try_clone().map_err(|error| error.to_string())?;
    let mut shell = Command::new("/bin/bash");
    shell.arg(format!("{OUT}/host.sh")).current_dir("/").stdin(Stdio::null());
    shell.stdout(output).stderr(error_output);
    let shell = shell.spawn().map_err(|error| format!("cannot start bash: {error}"))?;
    wait_for(i32::try_from(shell.id()).unwrap_or(-1))
}

/// Collects every child, the orphans of others too, until the one meant ends.
fn wait_for(pid: i32) -> Result<ExitStatus, String> {
    loop {
        let mut status = 0;
        // SAFETY: the pointer is valid for the call.
        let ended = unsafe { libc::waitpid(-1, &raw mut status, 0) };
        if ended == pid {
            return Ok(ExitStatus::from_raw(status));
        }
        let error = io::Error::last_os_error();
        if ended < 0 && error.kind() != io::ErrorKind::Interrupted {
            return Err(format!("cannot wait: {error}"));
        }
    }
}

/// Writes a file that the outer machine looks for.
fn report(name: &str, text: &str) {
    if let Err(error) = fs::write(format!("{OUT}/{name}"), text) {
        eprintln!("host: cannot write {name}: {error}");
    }
}

fn mount(
    kind: &str,
    what: &str,
    directory: &str,
    (flags, data): (libc::c_ulong, &str),
) -> Result<(), String> {
    let failed = |error: io::Error| format!("mount {what} on {directory}: {error}");
    fs::create_dir_all(directory).map_err(failed)?;
    let text = |text: &str| CString::new(text).map_err(|error| format!("mount {what}: {error}"));
    let (kind, what_text, target, data) = (text(kind)?, text(what)?, text(directory)?, text(data)?);
    // SAFETY: the four strings end in NUL and live through the call.
    let done = unsafe {
        libc::mount(what_text.as_ptr(), target.as_ptr(), kind.as_ptr(), flags, data.as_ptr().cast())
    };
    match io::Error::last_os_error() {
        // The kernel may have mounted /dev by itself.
        error if done < 0 && error.raw_os_error() != Some(libc::EBUSY) => Err(failed(error)),
        _ => Ok(()),
    }
}

/// Moves a mounted file system to `/`. The initramfs stays below it, out of reach.
fn become_root(directory: &str) -> io::Result<()> {
    std::env::set_current_dir(directory)?;
    // SAFETY: the strings end in NUL and live through the call; moving takes neither kind nor data.
    let moved = unsafe {
        libc::mount(c".".as_ptr(), c"/".as_ptr(), std::ptr::null(), libc::MS_MOVE, std::ptr::null())
    };
    if moved < 0 {
        return Err(io::Error::last_os_error());
    }
    std::os::unix::fs::chroot(".")?;
    std::env::set_current_dir("/")
}

fn load_module(path: &str) -> io::Result<()> {
    let file = File::open(path)?;
    // SAFETY: the descriptor is open through the call and the parameter string ends in NUL.
    let done = unsafe { libc::syscall(libc::SYS_finit_module, file.as_raw_fd(), c"".as_ptr(), 0) };
    if done < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
