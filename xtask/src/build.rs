//! Building user space: kvm-monitor with the BPF object inside, and the program that lab guests run.

use std::env;
use std::io::IsTerminal as _;
use std::os::unix::process::CommandExt as _;
use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context as _, Result, bail};

use crate::setup::{self, Scope};
use crate::{apt, ebpf, kernel, paths, process, sshd};

/// Where `monitor/build.rs` looks for the BPF object.
const OBJECT_VARIABLE: &str = "KVM_MONITOR_BPF_OBJECT";

/// What the demo and the live tests start from.
pub(crate) struct Built {
    /// The release binary of kvm-monitor.
    pub(crate) monitor: PathBuf,
    /// The static program that is PID 1 of a lab guest.
    pub(crate) guest_init: PathBuf,
    /// The program that leaves guest mode exactly as often as it is asked to.
    pub(crate) kvmex: PathBuf,
    /// Has `boot/vmlinuz-*` and `lib/modules/*`.
    pub(crate) kernel_dir: PathBuf,
    /// Has `usr/sbin/sshd`; absent where there is none to be had.
    pub(crate) sshd: Option<PathBuf>,
    /// Where builds go, and where results may.
    pub(crate) target_dir: PathBuf,
}

/// Makes sure of everything that a live run needs, and builds it.
pub(crate) fn prepare_live() -> Result<Built> {
    setup::ensure(Scope::Guests)?;
    Ok(Built {
        monitor: monitor()?,
        guest_init: guest_init()?,
        kvmex: kvmex()?,
        kernel_dir: kernel::prepare()?,
        sshd: sshd::prepare().inspect_err(|error| eprintln!("no SSH server for its tests: {error:#}")).ok(),
        target_dir: paths::target(),
    })
}

/// The subcommand `build-ebpf`: prints the path of the object.
pub(crate) fn run_ebpf(args: &[String]) -> Result<()> {
    refuse("build-ebpf", args)?;
    println!("{}", ebpf::build_ebpf()?.display());
    Ok(())
}

/// The subcommand `build`: prints the path of the binary.
pub(crate) fn run(args: &[String]) -> Result<()> {
    refuse("build", args.strip_prefix(&["--release".to_owned()]).unwrap_or(args))?;
    setup::ensure(Scope::Build)?;
    println!("{}", monitor()?.display());
    Ok(())
}

/// The subcommand `run`: becomes `kvm-monitor run`, as root where that needs no guessing.
pub(crate) fn run_monitor(args: &[String]) -> Result<()> {
    setup::ensure(Scope::Build)?;
    let monitor = monitor()?;
    let args = args.strip_prefix(&["--".to_owned()]).unwrap_or(args);
    let mut command = if process::is_root() {
        Command::new(&monitor)
    } else if std::io::stdin().is_terminal() && process::find_program("sudo").is_some() || apt::sudo_works() {
        let mut sudo = Command::new("sudo");
        sudo.arg(&monitor);
        sudo
    } else {
        eprintln!("not root and no sudo: kvm-monitor will do what it can without");
        Command::new(&monitor)
    };
    // Signals and the exit code then go straight to and from it.
    let error = command.arg("run").args(args).exec();
    Err(error).with_context(|| format!("cannot start {}", process::show(&command)))
}

/// Fails if a subcommand that takes no arguments got some.
pub(crate) fn refuse(subcommand: &str, args: &[String]) -> Result<()> {
    match args.first() {
        Some(argument) => bail!("{subcommand} takes no argument, not `{argument}`"),
        None => Ok(()),
    }
}

/// Builds the release binary with the current BPF object inside.
pub(crate) fn monitor() -> Result<PathBuf> {
    let mut command = host_cargo("build")?;
    process::run_tailed(command.args(["--release", "--package", "monitor"]))?;
    Ok(paths::target().join("release/kvm-monitor"))
}

/// Builds the static programs that are PID 1 of a lab guest, and of a host under test (`host` beside it).
pub(crate) fn guest_init() -> Result<PathBuf> {
    let triple = format!("{}-unknown-linux-gnu", env::consts::ARCH);
    let mut command = host_cargo("build")?;
    // With --target the flags do not reach build scripts, and do not evict the other host builds.
    command.args(["--release", "--package", "guest", "--target", &triple]);
    command.env("CARGO_ENCODED_RUSTFLAGS", "-Ctarget-feature=+crt-static");
    process::run_tailed(&mut command)?;
    Ok(paths::target().join(triple).join("release/guest"))
}

fn kvmex() -> Result<PathBuf> {
    let mut command = host_cargo("build")?;
    process::run_tailed(command.args(["--package", "kvmex"]))?;
    Ok(paths::target().join("debug/kvmex"))
}

/// `cargo SUBCOMMAND` that builds for this host, with the BPF object built and named.
pub(crate) fn host_cargo(subcommand: &str) -> Result<Command> {
    let object = ebpf::build_ebpf()?;
    let mut command = cargo(subcommand);
    command.arg("--target-dir").arg(paths::target()).env(OBJECT_VARIABLE, object);
    Ok(command)
}

/// `cargo SUBCOMMAND` in the checkout, by the cargo that runs us.
pub(crate) fn cargo(subcommand: &str) -> Command {
    let mut command = process::cargo(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.current_dir(paths::root()).arg(subcommand);
    command
}
