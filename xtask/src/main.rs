//! `cargo xtask`: sets up, builds, runs, demonstrates and tests kvm-monitor.
//!
//! Needs nothing but cargo to build. Each subcommand prepares what it needs by itself. Progress goes to stderr,
//! results to stdout. Exit status: 0 done, 1 a test or check failed, 2 error.
#![expect(clippy::print_stdout, clippy::print_stderr, reason = "a program for people at a terminal")]

mod apt;
mod bench;
mod build;
mod demo;
mod disks;
mod docs;
mod ebpf;
mod elf;
mod fuzz;
mod kernel;
mod kernels;
mod lint;
mod paths;
mod process;
mod report;
mod setup;
mod sshd;
mod test;
mod vm;

use std::process::ExitCode;

use anyhow::{Result, bail};

const HELP: &str = "\
usage: cargo xtask SUBCOMMAND

  setup [--allow-downgrade]    find what is missing on this machine, say why, install it where possible;
                               may replace packages of another release that stand in the way
  build-ebpf                   build the kernel probes; print the path of the object
  build                        build kvm-monitor; print the path of the binary
  run [-- ARGS]                build, then start `kvm-monitor run ARGS` (with sudo if need be)
  demo [ARGS]                  profile a small guest whose workload is known
  test [--unit-only|--live-only]
                               lint, unit tests, and as root live tests with a real guest
  lab [--kernel 6.1|6.12|all] [--filter NAME | --short] [-- COMMAND]
                               the live tests (or a command) in a VM with that kernel, where KVM works; as root
  kernels                      what the verifier of each kernel makes of the programs, into docs/kernels.md; as root
  lint                         formatting, clippy, documentation, generated documents
  bench sched                  cost of the probes at a context switch, as root; prints ratios side by side
  bench libvirt [SIZE…]        cost of a collection with so many real domains, all parties, beside others, as root
  bench libvirt scale [SIZE…]  time and memory with thousands of domains of libvirt's test driver
  bench kvm                    cost of the probes at an exit and a return to user space, as root
  fuzz [TARGET] [--seconds N]  random text for the readers of domain XML, statistics and command lines
  bench block                  cost of the probes at a request to a disk, as root
  disks [here | dm | ROWS…]    every way to open an image, with real guests, as root: all, those on this host, those on
                               device-mapper in a VM, or rows of earlier runs; writes docs/disks.md
  docs [--check]               write the generated parts of the documents, or check them

KVM_MONITOR_BPF_ROUTE=rustup|distro   allow one way to a compiler for BPF only
KVM_MONITOR_LAB_KERNEL=DIR            take the lab guest's kernel from DIR (boot/vmlinuz-*, lib/modules/*)";

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    match dispatch(&args) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::from(1),
        Err(error) if error.is::<lab::interrupt::Interrupted>() => {
            eprintln!("{error:#}");
            ExitCode::from(130)
        }
        Err(error) => {
            eprintln!("error: {error}");
            for cause in error.chain().skip(1) {
                eprintln!("  because: {cause}");
            }
            ExitCode::from(2)
        }
    }
}

/// Runs the subcommand; whether all its checks passed.
fn dispatch(args: &[String]) -> Result<bool> {
    let Some((subcommand, args)) = args.split_first() else { bail!("no subcommand\n{HELP}") };
    match subcommand.as_str() {
        "setup" => setup::run(args)?,
        "build-ebpf" => build::run_ebpf(args)?,
        "build" => build::run(args)?,
        "run" => build::run_monitor(args)?,
        "demo" => demo::run(args)?,
        "test" => return test::run(args),
        "lab" => return vm::run(args),
        "kernels" => kernels::run(args)?,
        "lint" => return lint::run(args),
        "bench" => bench::run(args)?,
        "disks" => disks::run(args)?,
        "docs" => docs::run(args)?,
        "fuzz" => fuzz::run(args)?,
        "help" | "--help" | "-h" => println!("{HELP}"),
        other => bail!("no subcommand `{other}`\n{HELP}"),
    }
    Ok(true)
}
