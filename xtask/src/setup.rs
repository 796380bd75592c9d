//! `cargo xtask setup`: finds what this machine lacks, says what each thing is for, and installs it where it can.

use std::path::Path;
use std::process::Command;

use anyhow::{Context as _, Result, bail};

use crate::{
    apt::{self, Conflicts},
    ebpf, kernel, process,
};

/// How much has to be there.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Scope {
    /// Compiling kvm-monitor.
    Build,
    /// The demo and the live tests too: real guests under a libvirtd of our own.
    Guests,
    /// Loads for benchmarks, and other programs that they measure beside ours.
    Bench,
}

impl Scope {
    fn purpose(self) -> &'static str {
        match self {
            Self::Build => "to build",
            Self::Guests => "for demo and live tests",
            Self::Bench => "for benchmarks",
        }
    }
}

/// How to tell that an item is there.
enum Presence {
    /// A program of this name.
    Program(&'static str),
    /// A pkg-config module.
    PkgConfig(&'static str),
    /// A library that the C compiler finds.
    StaticLibrary(&'static str),
    /// A module of the system's Python.
    PythonModule(&'static str),
    /// The daemon that serves files to a VM, which is in no `PATH`.
    FileServer,
}

struct Item {
    name: &'static str,
    scope: Scope,
    why: &'static str,
    presence: Presence,
    /// Package names.
    debian: &'static str,
    fedora: &'static str,
    arch: &'static str,
}

use Presence::{FileServer, PkgConfig, Program, PythonModule, StaticLibrary};
use Scope::{Bench, Build, Guests};

#[rustfmt::skip] // A table.
const ITEMS: [Item; 24] = [
    Item { name: "cc", scope: Build, why: "links every Rust program", presence: Program("cc"),
           debian: "gcc libc6-dev", fedora: "gcc glibc-devel", arch: "gcc" },
    Item { name: "pkg-config", scope: Build, why: "finds the libvirt library", presence: Program("pkg-config"),
           debian: "pkg-config", fedora: "pkgconf-pkg-config", arch: "pkgconf" },
    Item { name: "libvirt headers", scope: Build, why: "kvm-monitor links to libvirt", presence: PkgConfig("libvirt"),
           debian: "libvirt-dev", fedora: "libvirt-devel", arch: "libvirt" },
    Item { name: "libc.a", scope: Guests, why: "the program inside the lab guest is static", presence: StaticLibrary("libc.a"),
           debian: "libc6-dev", fedora: "glibc-static", arch: "glibc" },
    Item { name: "libvirtd", scope: Guests, why: "manages the lab guest, in a mount namespace of its own", presence: Program("libvirtd"),
           debian: "libvirt-daemon-system", fedora: "libvirt-daemon libvirt-daemon-driver-qemu", arch: "libvirt" },
    Item { name: "virsh", scope: Guests, why: "defines and starts the lab guest", presence: Program("virsh"),
           debian: "libvirt-clients", fedora: "libvirt-client", arch: "libvirt" },
    Item { name: "QEMU", scope: Guests, why: "runs the lab guest", presence: Program("qemu-system-x86_64"),
           debian: "qemu-system-x86", fedora: "qemu-system-x86-core", arch: "qemu-system-x86" },
    Item { name: "jsonschema for Python", scope: Guests, why: "validates the stream independently of us", presence: PythonModule("jsonschema"),
           debian: "python3-jsonschema", fedora: "python3-jsonschema", arch: "python-jsonschema" },
    Item { name: "bpftool", scope: Guests, why: "shows that no BPF program is left behind", presence: Program("bpftool"),
           debian: "bpftool", fedora: "bpftool", arch: "bpf" },
    Item { name: "ip", scope: Guests, why: "makes the lab guest's network", presence: Program("ip"),
           debian: "iproute2", fedora: "iproute", arch: "iproute2" },
    Item { name: "tc", scope: Guests, why: "makes a queueing discipline drop packets", presence: Program("tc"),
           debian: "iproute2", fedora: "iproute-tc", arch: "iproute2" },
    Item { name: "unshare", scope: Guests, why: "gives the lab its own namespaces", presence: Program("unshare"),
           debian: "util-linux", fedora: "util-linux", arch: "util-linux" },
    Item { name: "nsenter", scope: Guests, why: "reaches into the lab's namespaces", presence: Program("nsenter"),
           debian: "util-linux", fedora: "util-linux", arch: "util-linux" },
    Item { name: "modprobe", scope: Guests, why: "orders the lab guest's kernel modules", presence: Program("modprobe"),
           debian: "kmod", fedora: "kmod", arch: "kmod" },
    Item { name: "cpio", scope: Guests, why: "packs the lab guest's initramfs", presence: Program("cpio"),
           debian: "cpio", fedora: "cpio", arch: "cpio" },
    Item { name: "xz", scope: Guests, why: "unpacks compressed kernel modules", presence: Program("xz"),
           debian: "xz-utils", fedora: "xz", arch: "xz" },
    Item { name: "virtiofsd", scope: Guests, why: "shares this machine's files with the VMs of `cargo xtask lab`", presence: FileServer,
           debian: FILE_SERVER_PACKAGE, fedora: "virtiofsd", arch: "virtiofsd" },
    Item { name: "mkfs.ext4", scope: Guests, why: "formats the disk of the VMs of `cargo xtask lab`", presence: Program("mkfs.ext4"),
           debian: "e2fsprogs", fedora: "e2fsprogs", arch: "e2fsprogs" },
    Item { name: "losetup", scope: Guests, why: "makes block devices for the lab guest's disks", presence: Program("losetup"),
           debian: "mount", fedora: "util-linux", arch: "util-linux" },
    Item { name: "dmsetup", scope: Guests, why: "makes slow and failing disks in the VMs of `cargo xtask lab`", presence: Program("dmsetup"),
           debian: "dmsetup", fedora: "device-mapper", arch: "device-mapper" },
    Item { name: "libvirt for Python", scope: Bench, why: "collects beside us", presence: PythonModule("libvirt"),
           debian: "python3-libvirt", fedora: "python3-libvirt", arch: "libvirt-python" },
    Item { name: "venv for Python", scope: Bench, why: "holds ceilometer, which is measured beside us", presence: PythonModule("ensurepip"),
           debian: "python3-venv", fedora: "python3", arch: "python" },
    Item { name: "fio", scope: Guests, why: "makes requests to disks in place of QEMU", presence: Program("fio"),
           debian: "fio", fedora: "fio", arch: "fio" },
    Item { name: "biolatency", scope: Bench, why: "does a part of what the disk probes do, for comparison", presence: Program("biolatency"),
           debian: "libbpf-tools", fedora: "libbpf-tools", arch: "libbpf-tools" },
];

/// Debian 12's QEMU brings its own; later releases have a package for it, and QEMU's common files anyway.
const FILE_SERVER_PACKAGE: &str = "qemu-system-common";

/// The subcommand: prepares everything and reports on each item.
pub(crate) fn run(args: &[String]) -> Result<()> {
    let conflicts = match args {
        [] => Conflicts::Keep,
        [option] if option == "--allow-downgrade" => Conflicts::Downgrade,
        [argument, ..] => bail!("setup takes --allow-downgrade only, not `{argument}`"),
    };
    let missing: Vec<_> = missing(Guests).iter().map(|item| item.name).collect();
    packages(Guests, conflicts)?;
    ensure(Guests)?;
    for item in ITEMS.iter().filter(|item| item.scope <= Guests) {
        let state = if missing.contains(&item.name) { "installed" } else { "present" };
        println!("{state:<9}  {:<21}  {}: {}", item.name, item.scope.purpose(), item.why);
    }
    let bpf = ebpf::ready().context("the BPF toolchain vanished")?;
    println!("present    BPF toolchain          to build: compiles the kernel probes ({})", bpf.describe());
    let kernel = kernel::find().context("the guest kernel vanished")?;
    println!(
        "present    guest kernel           for demo and live tests: the lab guest boots it ({})",
        kernel.display()
    );
    Ok(())
}

/// Makes sure that everything in the scope is there, installing what is not.
pub(crate) fn ensure(scope: Scope) -> Result<()> {
    packages(scope, Conflicts::Keep)?;
    if ebpf::ready().is_none() {
        ebpf::toolchain().with_context(toolchain_help)?;
    }
    if scope >= Guests && kernel::find().is_none() {
        kernel::prepare().with_context(kernel_help)?;
    }
    Ok(())
}

fn packages(scope: Scope, conflicts: Conflicts) -> Result<()> {
    let lacking = missing(scope);
    if lacking.is_empty() {
        return Ok(());
    }
    for item in &lacking {
        eprintln!("missing: {} (needed {}: {})", item.name, item.scope.purpose(), item.why);
    }
    apt::usable().with_context(|| commands(&lacking))?;
    apt::install(&names(&lacking, |item| item.debian), conflicts).with_context(|| commands(&lacking))?;
    let lacking = missing(scope);
    if let Some(item) = lacking.first() {
        bail!("{}\n{} is still missing after the installation", commands(&lacking), item.name);
    }
    Ok(())
}

fn missing(scope: Scope) -> Vec<&'static Item> {
    ITEMS.iter().filter(|item| item.scope <= scope && !item.presence.holds()).collect()
}

impl Presence {
    fn holds(&self) -> bool {
        match *self {
            Program(name) => process::find_program(name).is_some(),
            PkgConfig(module) => process::succeeds(Command::new("pkg-config").args(["--exists", module])),
            StaticLibrary(name) => {
                // The compiler answers with a path if it has the file, else with the bare name.
                let answer = process::output(Command::new("cc").arg(format!("-print-file-name={name}")));
                answer.is_ok_and(|path| Path::new(path.trim()).is_absolute())
            }
            FileServer => lab::vm::file_server().is_ok(),
            PythonModule(module) => {
                let find = format!("import importlib.util as u, sys; sys.exit(not u.find_spec('{module}'))");
                process::succeeds(Command::new("/usr/bin/python3").args(["-c", &find]))
            }
        }
    }
}

/// Package names of the items, each once.
fn names(items: &[&'static Item], column: impl Fn(&Item) -> &'static str) -> Vec<&'static str> {
    let mut names: Vec<_> = items.iter().flat_map(|item| column(item).split(' ')).collect();
    names.sort_unstable();
    names.dedup();
    names
}

/// What to type on each family of distributions.
fn commands(items: &[&'static Item]) -> String {
    let row = |column: fn(&Item) -> &'static str| names(items, column).join(" ");
    format!(
        "install what is missing, then try again:\n  \
         Debian: sudo apt-get update && sudo apt-get install --no-install-recommends {}\n  \
         Fedora: sudo dnf install {}\n  \
         Arch:   sudo pacman -S --needed {}",
        row(|item| item.debian),
        row(|item| item.fedora),
        row(|item| item.arch),
    )
}

fn toolchain_help() -> String {
    format!(
        "install a compiler for BPF, then try again:\n  \
         any system: install rustup (https://rustup.rs), then: rustup component add rust-src\n  \
         Debian: sudo apt-get install --no-install-recommends {}\n  \
         Fedora: sudo dnf install rust cargo rust-src llvm-devel gcc-c++\n  \
         Arch:   sudo pacman -S --needed rust rust-src llvm gcc",
        ebpf::DISTRO_PACKAGES.join(" ")
    )
}

fn kernel_help() -> String {
    "get a kernel for the lab guest, then try again:\n  \
     Debian: sudo apt-get update (the package is unpacked, not installed)\n  \
     Fedora: sudo dnf install kernel-core kernel-modules\n  \
     Arch:   sudo pacman -S --needed linux\n  \
     or set KVM_MONITOR_LAB_KERNEL to a directory with boot/vmlinuz-* and lib/modules/*"
        .to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_commands_name_each_package_once_for_every_family() {
        let items: Vec<_> = ITEMS.iter().collect();
        let text = commands(&items);
        for line in text.lines().skip(1) {
            let words: Vec<_> = line.split_whitespace().collect();
            assert_eq!(words.iter().filter(|word| word.starts_with("util-linux")).count(), 1, "{line}");
        }
        assert!(text.contains("libvirt-dev ") && text.contains("libvirt-devel ") && text.contains("pacman"));
    }

    #[test]
    fn building_needs_nothing_that_only_guests_need() {
        assert!(ITEMS.iter().filter(|item| item.scope == Build).all(|item| item.name != "QEMU"));
    }
}
