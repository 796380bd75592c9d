//! `kvm-monitor check`: what this host can do, source by source and probe by probe; if not, why and what to do.

use std::{fmt::Write as _, time::Duration};

use crate::{
    cli::{Mode, SourceArgs},
    host::{Facts, hostname, release},
    place::elsewhere,
    source::{
        ebpf::{Ebpf, probes::ProbeGroup},
        libvirt, procfs,
    },
    tracker::open_ebpf,
};

/// How long libvirt gets to answer.
const DEADLINE: Duration = Duration::from_secs(5);

/// What was found.
#[derive(Debug)]
pub struct Report {
    /// For a person, several lines.
    pub text: String,
    /// Everything asked for works, and at least one source does.
    pub usable: bool,
}

/// Tries every source that is not switched off. Loads and attaches the kernel programs for a moment.
#[must_use]
pub fn check(args: &SourceArgs) -> Report {
    let mut text = format!("kvm-monitor {} on kernel {}\n", env!("CARGO_PKG_VERSION"), release());
    let elsewhere = (args.libvirt != Mode::Off).then(|| elsewhere(&args.connect, &hostname())).flatten();
    let ebpf = check_ebpf(&mut text, args.ebpf, elsewhere.as_deref());
    let libvirt = check_libvirt(&mut text, args);
    let procfs = check_procfs(&mut text, elsewhere.as_deref());
    let required = |mode, works: bool| mode != Mode::Require || works;
    Report {
        usable: required(args.ebpf, ebpf) && required(args.libvirt, libvirt) && (ebpf || libvirt || procfs),
        text,
    }
}

fn line(text: &mut String, name: &str, works: Result<&str, &str>) {
    let (mark, detail) = match works {
        Ok(detail) => ("yes", detail),
        Err(reason) => ("NO", reason),
    };
    let _ = writeln!(text, "{name:<22} {mark:<4} {}", crate::visible(detail));
}

fn check_ebpf(text: &mut String, mode: Mode, elsewhere: Option<&str>) -> bool {
    if let Some(reason) = if mode == Mode::Off { Some("switched off by --ebpf off") } else { elsewhere } {
        line(text, "ebpf", Err(reason));
        return false;
    }
    match open_ebpf(&Facts::read(), ProbeGroup::ALL) {
        Ok(ebpf) => {
            line(text, "ebpf", Ok("kernel programs load and attach"));
            probe_lines(text, &ebpf);
            true
        }
        Err(reason) => {
            line(text, "ebpf", Err(&reason));
            false
        }
    }
}

fn probe_lines(text: &mut String, ebpf: &Ebpf) {
    for (probe, state) in ebpf.states() {
        let info = state.info(probe);
        let name = format!("  {}", info.name);
        match info.reason {
            None => {
                let verified =
                    ebpf.verified(probe).map_or_else(String::new, |n| format!(", {n} instructions verified"));
                let loaded = ebpf
                    .load_time(probe)
                    .map_or_else(String::new, |t| format!(", loaded in {:.1} ms", t.as_secs_f64() * 1e3));
                line(text, &name, Ok(&format!("{}{verified}{loaded}", probe.attach.describe())));
            }
            Some(reason) => line(text, &name, Err(&reason)),
        }
    }
    if let Some(caveat) = ebpf.kvm_caveat() {
        line(text, "  guest mode", Err(caveat));
    }
}

fn check_libvirt(text: &mut String, args: &SourceArgs) -> bool {
    if args.libvirt == Mode::Off {
        line(text, "libvirt", Err("switched off by --libvirt off"));
        return false;
    }
    match libvirt::snapshot(&args.connect, DEADLINE) {
        Ok(answer) => {
            let n = answer.domains.len();
            let detail =
                format!("{} answers, {n} domain{} running", args.connect, if n == 1 { "" } else { "s" });
            line(text, "libvirt", Ok(&detail));
            true
        }
        Err(error) => {
            line(text, "libvirt", Err(&crate::one_line(&error)));
            false
        }
    }
}

fn check_procfs(text: &mut String, elsewhere: Option<&str>) -> bool {
    if let Some(reason) = elsewhere {
        line(text, "procfs", Err(reason));
        return false;
    }
    let root = std::path::Path::new("/proc");
    match procfs::Processes::new(root).look(1) {
        Ok(found) => {
            let n = found.started.len();
            let detail = format!("{n} QEMU process{} visible", if n == 1 { "" } else { "es" });
            line(text, "procfs", Ok(&detail));
            let emulated = found.started.iter().filter(|qemu| !qemu.args.kvm).count();
            if emulated > 0 {
                let detail = format!(
                    "{emulated} of {n} emulated (TCG): they never enter KVM, so exits, halts and guest_ns are absent for them"
                );
                line(text, "  KVM guests", Err(&detail));
            }
        }
        Err(error) => {
            line(text, "procfs", Err(&crate::one_line(&error)));
            return false;
        }
    }
    if !std::path::Path::new("/proc/self/schedstat").exists() {
        line(
            text,
            "  schedstat",
            Err("run and wait time of threads: the kernel was built without CONFIG_SCHED_INFO"),
        );
    }
    true
}
