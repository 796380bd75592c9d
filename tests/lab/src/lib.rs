//! Test lab: a private libvirtd and small guests whose workload is known exactly.
//!
//! A [`Lab`] is a libvirtd with its own mount and network namespaces: programs started with [`Lab::command`] use
//! plain `qemu:///system` and see the lab's domains and taps, and the user's libvirt is not touched. Process ids
//! are the host's. A [`Guest`] executes a script and reports on its console what it did ([`GroundTruth`]).
//!
//! Nothing outlives the process that made the lab, however that ends: `supervisor` says how. `docs/lab.md` is the
//! overview; `tests/guest` is the program inside the guest. Needs root, bash, `ip`, libvirt and QEMU.

mod console;
mod device;
mod domain;
mod guest;
mod host;
mod image;
mod initramfs;
pub mod interrupt;
mod space;
mod supervisor;
pub mod tap;
pub mod vhost;
pub mod vm;

use std::ffi::OsStr;
use std::fs;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use rustix::process::{Pid, Signal};

pub use console::{Counters, GroundTruth, Moment, StepDone, StepTruth};
pub use domain::{DiskSpec, GuestSpec, ImageFormat, NicBackend, NicSpec, StartState};
pub use guest::{Guest, Which};
pub use host::{
    Hog, ThreadTime, UdpSink, cpu_ns, is_emulated_host, monotonic_ns, process_exists, send_datagrams,
    thread_time,
};

use console::Console;
use device::Device;
use space::Space;
use supervisor::Supervisor;

/// How long libvirtd may take to accept a connection; a first start probes QEMU.
const LIBVIRTD_START: Duration = Duration::from_secs(60);
/// How long libvirtd may take to end after SIGTERM.
const LIBVIRTD_END: Duration = Duration::from_secs(20);
/// libvirtd's socket, in the lab.
const SOCKET: &str = "/run/libvirt/libvirt-sock";

/// Where a lab finds what it needs.
#[derive(Clone, Debug)]
pub struct LabDirs {
    /// Below it, `lab/` holds the files of running labs and `lab-cache/` what libvirt found out about QEMU.
    /// It must be on a file system with direct I/O.
    pub target_dir: PathBuf,
    /// An unpacked kernel package: `boot/vmlinuz-*` and `lib/modules/VERSION`.
    pub kernel_dir: PathBuf,
    /// The static binary of package `guest`.
    pub guest_init: PathBuf,
    /// What executes the guests' instructions.
    pub accelerator: Accelerator,
}

/// What executes the instructions of guests.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Accelerator {
    /// QEMU, everywhere.
    #[default]
    Emulated,
    /// The kernel's KVM, which has to work on this host: it does in the VMs of `cargo xtask lab`.
    Kvm,
}

impl LabDirs {
    /// From the variables `KVM_MONITOR_LAB_KERNEL` and `KVM_MONITOR_GUEST_INIT`, which `cargo xtask test` sets, and
    /// the target directory that this program was built in. `KVM_MONITOR_LAB_DIR` names another one;
    /// `KVM_MONITOR_LAB_ACCELERATOR=kvm` wants guests that do not emulate.
    pub fn from_env() -> Result<Self> {
        let path = |name: &str| std::env::var_os(name).map(PathBuf::from);
        let needed = |name: &str| {
            path(name)
                .with_context(|| format!("{name} is not set: run the live tests with `cargo xtask test`"))
        };
        Ok(Self {
            target_dir: path("KVM_MONITOR_LAB_DIR").map_or_else(own_target_dir, Ok)?,
            kernel_dir: needed("KVM_MONITOR_LAB_KERNEL")?,
            guest_init: needed("KVM_MONITOR_GUEST_INIT")?,
            accelerator: match std::env::var("KVM_MONITOR_LAB_ACCELERATOR").as_deref() {
                Err(_) | Ok("tcg") => Accelerator::Emulated,
                Ok("kvm") => Accelerator::Kvm,
                Ok(other) => bail!("KVM_MONITOR_LAB_ACCELERATOR is {other:?}, neither tcg nor kvm"),
            },
        })
    }
}

/// Cargo puts test programs into `TARGET/PROFILE/deps`.
fn own_target_dir() -> Result<PathBuf> {
    let program = std::env::current_exe().context("cannot find this program's file")?;
    let target = program.ancestors().nth(3).map(Path::to_path_buf);
    target.with_context(|| format!("{} is no test of cargo's: set KVM_MONITOR_LAB_DIR", program.display()))
}

/// A private libvirtd and everything that was started with it. Dropping it ends all of that.
#[derive(Debug)]
pub struct Lab {
    // Dropped first: ends all processes and removes `scratch`.
    state: Mutex<State>,
    space: Arc<Space>,
    scratch: PathBuf,
    kernel: PathBuf,
    initrd: PathBuf,
    program: PathBuf,
    accelerator: Accelerator,
}

#[derive(Debug)]
struct State {
    // Ended first: its processes hold the devices.
    supervisor: Supervisor,
    libvirtd: Option<Pid>,
    devices: Vec<Device>,
}

impl Lab {
    /// Starts a lab; libvirtd answers when this returns.
    pub fn start(dirs: &LabDirs) -> Result<Self> {
        ensure!(
            rustix::process::geteuid().is_root(),
            "the lab needs root, because it makes namespaces and mounts: run this with sudo"
        );
        let program = find_program("libvirtd", "libvirt-daemon-system")?;
        for (name, package) in [("virsh", "libvirt-clients"), ("ip", "iproute2"), ("mount", "mount")] {
            find_program(name, package)?;
        }
        let kernel = initramfs::kernel_image(&dirs.kernel_dir)?;
        let initramfs = initramfs::build(&dirs.kernel_dir, &dirs.guest_init, &initramfs::GUEST_MODULES)?;
        let cache = directory(&dirs.target_dir.join("lab-cache"))?;
        let scratch = directory(&dirs.target_dir.join("lab").join(unique_name()))?;
        let initrd = scratch.join("initrd");
        let supervisor = fs::write(&initrd, initramfs)
            .with_context(|| format!("cannot write {}", initrd.display()))
            .and_then(|()| Supervisor::start(&scratch, &cache));
        let supervisor = match supervisor {
            Ok(supervisor) => supervisor,
            Err(error) => {
                let _ = fs::remove_dir_all(&scratch); // The error that counts is the other one.
                return Err(error);
            }
        };
        let space = Arc::new(Space::of(supervisor.pid()));
        let state = Mutex::new(State { supervisor, libvirtd: None, devices: Vec::new() });
        let accelerator = dirs.accelerator;
        let lab = Self { state, space, scratch, kernel, initrd, program, accelerator };
        lab.start_libvirtd()?;
        Ok(lab)
    }

    /// The directory of the lab's images, consoles and logs; it is part of QEMU's command lines.
    #[must_use]
    pub fn scratch(&self) -> &Path {
        &self.scratch
    }

    /// Process id of the lab's supervisor, whose namespaces are the lab's.
    #[must_use]
    pub fn supervisor_pid(&self) -> u32 {
        self.state().supervisor.pid()
    }

    /// A program to run inside the lab, in the same working directory. It ends with the lab at the latest.
    #[must_use]
    pub fn command(&self, program: impl AsRef<Path>) -> Command {
        self.space.command(program.as_ref())
    }

    /// Runs `virsh` with read and write access; returns what it printed.
    pub fn virsh(&self, arguments: &[&str]) -> Result<String> {
        self.space.virsh(arguments)
    }

    /// Runs a function on a thread inside the lab's network namespace. Sockets it returns stay there (and keep the
    /// namespace alive until they are closed).
    pub fn in_network<T: Send>(&self, work: impl FnOnce() -> T + Send) -> Result<T> {
        self.space.in_network(work)
    }

    /// A file of the lab (such as `/run/libvirt/…`), as this process can reach it.
    #[must_use]
    pub fn path(&self, inside: impl AsRef<Path>) -> PathBuf {
        self.space.path(inside.as_ref())
    }

    /// Makes the disks, starts the guest, and prepares the host's side of its NICs.
    pub fn boot(&self, spec: &GuestSpec) -> Result<Guest> {
        let console = self.scratch.join(format!("{}.console", spec.name));
        let input = Path::new("/run/lab").join(&spec.name);
        let images: Result<Vec<PathBuf>> =
            spec.disks.iter().map(|disk| self.make_image(&spec.name, disk)).collect();
        let files = domain::Files {
            kernel: &self.kernel,
            initrd: &self.initrd,
            console: &console,
            input: &input,
            images: images?,
            accelerator: self.accelerator,
        };
        let xml_path = self.scratch.join(format!("{}.xml", spec.name));
        fs::write(&xml_path, domain::xml(spec, &files)).context("cannot write the domain's XML")?;
        // Always paused at first: the taps get their neighbours before the guest can send.
        self.virsh(&["create", "--paused", &xml_path.to_string_lossy()])?;
        for nic in &spec.nics {
            self.know_guest(nic)?;
        }
        let guest = Guest {
            pid: guest::read_pid(&self.path(format!("/run/libvirt/qemu/{}.pid", spec.name)))?,
            uuid: self.virsh(&["domuuid", &spec.name])?.trim().to_owned(),
            name: spec.name.clone(),
            script: spec.script.clone(),
            console_path: console.clone(),
            space: Arc::clone(&self.space),
            input,
            console: Mutex::new(Console::new(console)),
        };
        if spec.start == StartState::Running {
            guest.resume()?;
        }
        Ok(guest)
    }

    /// Starts libvirtd and waits until it takes connections.
    pub fn start_libvirtd(&self) -> Result<()> {
        let pid = {
            let mut state = self.state();
            ensure!(state.libvirtd.is_none(), "libvirtd runs already");
            let pid = state.supervisor.start_libvirtd(&self.program)?;
            state.libvirtd = Some(pid);
            pid
        };
        let (socket, deadline) = (self.path(SOCKET), Instant::now() + LIBVIRTD_START);
        while UnixStream::connect(&socket).is_err() {
            interrupt::check()?;
            if rustix::process::test_kill_process(pid).is_err() || Instant::now() > deadline {
                bail!("libvirtd does not start; its log ends with\n{}", self.libvirtd_log());
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        Ok(())
    }

    /// Ends libvirtd as an upgrade would (SIGTERM); guests go on.
    pub fn stop_libvirtd(&self) -> Result<()> {
        self.end_libvirtd(Signal::TERM)
    }

    /// Ends libvirtd as a crash would (SIGKILL); guests go on.
    pub fn kill_libvirtd(&self) -> Result<()> {
        self.end_libvirtd(Signal::KILL)
    }

    /// Process id of libvirtd; absent if it was stopped.
    #[must_use]
    pub fn libvirtd_pid(&self) -> Option<u32> {
        self.state().libvirtd.map(|pid| pid.as_raw_nonzero().get().unsigned_abs())
    }

    fn end_libvirtd(&self, signal: Signal) -> Result<()> {
        let pid = self.state().libvirtd.take().context("libvirtd does not run")?;
        rustix::process::kill_process(pid, signal).context("cannot signal libvirtd")?;
        let deadline = Instant::now() + LIBVIRTD_END;
        while rustix::process::test_kill_process(pid).is_ok() {
            ensure!(Instant::now() < deadline, "libvirtd does not end after {signal:?}");
            std::thread::sleep(Duration::from_millis(5));
        }
        Ok(())
    }

    fn libvirtd_log(&self) -> String {
        let log = fs::read_to_string(self.scratch.join("log/libvirtd.log")).unwrap_or_default();
        let lines: Vec<&str> = log.lines().collect();
        lines[lines.len().saturating_sub(5)..].join("\n")
    }

    fn make_image(&self, guest: &str, disk: &DiskSpec) -> Result<PathBuf> {
        let path = self.scratch.join(format!("{guest}-{}.{}", disk.target, disk.format.name()));
        let below = self.scratch.join(format!("{guest}-{}-below.raw", disk.target));
        match disk.format {
            ImageFormat::Raw | ImageFormat::LoopDevice | ImageFormat::MappedDevice => {
                image::write_raw(&path, disk.size_bytes)
            }
            ImageFormat::Qcow2 => image::write_qcow2(&path, disk.size_bytes, None),
            ImageFormat::Qcow2OnRaw => image::write_raw(&below, disk.size_bytes)
                .and_then(|()| image::write_qcow2(&path, disk.size_bytes, Some(&below))),
        }
        .with_context(|| format!("cannot write the image {}", path.display()))?;
        let device = match disk.format {
            ImageFormat::Raw | ImageFormat::Qcow2 | ImageFormat::Qcow2OnRaw => return Ok(path),
            ImageFormat::LoopDevice => Device::over_file(&path)?,
            ImageFormat::MappedDevice => {
                Device::mapped(&path, &format!("{}-{guest}-{}", unique_name(), disk.target))?
            }
        };
        let path = device.path().to_path_buf();
        self.state().devices.push(device);
        Ok(path)
    }

    /// Gives the host the guest's MAC, so that it need not ask.
    fn know_guest(&self, nic: &NicSpec) -> Result<()> {
        let (address, mac) = (nic.guest_address().to_string(), domain::mac_text(nic.mac));
        host::run(self, "ip", &["neigh", "replace", &address, "lladdr", &mac, "dev", &nic.tap])
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}

/// Makes a directory and returns its absolute path.
fn directory(path: &Path) -> Result<PathBuf> {
    fs::create_dir_all(path)
        .and_then(|()| path.canonicalize())
        .with_context(|| format!("cannot make the directory {}", path.display()))
}

/// Differs between labs of one process and between processes.
fn unique_name() -> String {
    static NUMBER: AtomicU32 = AtomicU32::new(0);
    format!("{}-{}", std::process::id(), NUMBER.fetch_add(1, Ordering::Relaxed))
}

/// Finds a program in PATH, or where daemons are on systems that leave those directories out of it.
fn find_program(name: &str, package: &str) -> Result<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let directories = std::env::split_paths(&path).chain(["/usr/sbin", "/sbin"].map(PathBuf::from));
    directories
        .map(|directory| directory.join(OsStr::new(name)))
        .find(|program| program.is_file())
        .with_context(|| {
            format!("the lab needs {name} (Debian package {package}): `cargo xtask setup` helps")
        })
}
