//! `kvm-monitor list`: the domains there are, what belongs to each, and how each was found.

use std::{fmt::Write as _, path::PathBuf, time::Duration};

use crate::{
    cli::{ListArgs, ListFormat, Mode},
    host::hostname,
    inventory::{Domain, FoundBy, Observable},
    place::elsewhere,
    record::{self, Change, DomainRecord, Record, timestamp},
    source::libvirt::{self, LibvirtError},
    tracker::{Tracker, Wanted, Where},
    units::MonotonicNs,
    visible,
};

/// How long libvirt gets to answer.
const DEADLINE: Duration = Duration::from_secs(5);

/// Why nothing can be listed.
#[derive(Debug, thiserror::Error)]
pub enum ListError {
    /// Asked for by name and impossible.
    #[error("--libvirt require: libvirt cannot be used")]
    Libvirt(#[source] LibvirtError),
    /// No domain of that name or UUID.
    #[error("no domain {0:?}; `kvm-monitor list` without --domain shows the domains there are")]
    UnknownDomain(String),
    /// No process of that name or UUID, and nobody to ask.
    #[error("no domain {0:?} among the QEMU processes in /proc, and libvirt does not tell: {1}")]
    UnknownWithoutLibvirt(String, String),
}

/// What to print.
#[derive(Debug)]
pub struct Listing {
    /// For standard output.
    pub text: String,
    /// Why libvirt could not be asked, if so.
    pub libvirt_error: Option<String>,
}

/// Finds the domains and describes them.
///
/// # Errors
/// If libvirt is required and cannot be used, or a domain asked for does not exist.
pub fn list(args: &ListArgs) -> Result<Listing, ListError> {
    let wanted = Wanted::new(args.domains.clone());
    let libvirt = args.sources.libvirt != Mode::Off;
    let elsewhere = libvirt && elsewhere(&args.sources.connect, &hostname()).is_some();
    let place = if elsewhere { Where::Elsewhere } else { Where::Here };
    let mut tracker = Tracker::at(place, PathBuf::from("/proc"), wanted.clone(), None);
    let mut libvirt_error = None;
    if libvirt {
        match libvirt::snapshot(&args.sources.connect, DEADLINE) {
            Ok(answer) => tracker.take_libvirt(answer),
            Err(error) if args.sources.libvirt == Mode::Require => return Err(ListError::Libvirt(error)),
            Err(error) => libvirt_error = Some(crate::one_line(&error)),
        }
    }
    tracker.look();
    if let Some(unknown) = wanted.unknown(tracker.domains()).first() {
        let unknown = (*unknown).to_owned();
        return Err(match libvirt_error {
            Some(error) => ListError::UnknownWithoutLibvirt(unknown, error),
            None => ListError::UnknownDomain(unknown),
        });
    }
    let mut text = String::new();
    for tracked in tracker.domains() {
        match args.format {
            ListFormat::Text => describe(&mut text, &tracked.domain),
            ListFormat::Json => text.push_str(&json_line(&tracked.domain)),
        }
    }
    if tracker.domains().is_empty() && args.format == ListFormat::Text {
        text.push_str("no domains are running\n");
    }
    Ok(Listing { text, libvirt_error })
}

fn json_line(domain: &Domain) -> String {
    let record = Record::Domain(DomainRecord {
        ts: timestamp(jiff::Timestamp::now()),
        mono_ns: MonotonicNs::now().0,
        change: Change::Appeared,
        reason: "listed",
        epoch: 0,
        domain: record::Domain::new(domain, std::collections::BTreeMap::new()),
    });
    let mut line = Vec::new();
    record.write_line(&mut line);
    String::from_utf8(line).expect("JSON is UTF-8")
}

fn describe(text: &mut String, domain: &Domain) {
    let found_by = match domain.found_by {
        FoundBy::Libvirt => "libvirt",
        FoundBy::Procfs => "/proc",
    };
    let _ = writeln!(text, "{}  {}  ({})", visible(&domain.name), domain.uuid, domain.state.name());
    let pid = domain.process.map_or("not found".to_owned(), |p| format!("pid {}", p.tgid));
    let kind = domain.virt_type.as_deref().unwrap_or("unknown type");
    let _ = writeln!(text, "  QEMU: {pid}, {}, found by {found_by}", visible(kind));
    let vcpus: Vec<String> = domain
        .vcpus
        .iter()
        .map(|v| format!("{}={}", v.index, v.tid.map_or("?".to_owned(), |t| t.to_string())))
        .collect();
    let _ = writeln!(
        text,
        "  vCPU threads: {}",
        if vcpus.is_empty() { "none".to_owned() } else { vcpus.join(" ") }
    );
    for i in &domain.interfaces {
        let mac = i.mac.as_deref().unwrap_or("no MAC");
        let _ = writeln!(
            text,
            "  interface {}: {}, {}{}",
            visible(if i.device.is_empty() { "-" } else { &i.device }),
            visible(&i.kind),
            visible(mac),
            blind(&i.observable)
        );
    }
    for d in &domain.disks {
        let source = d.source.as_deref().unwrap_or("no medium");
        let format = d.format.as_deref().unwrap_or("?");
        let _ = writeln!(
            text,
            "  disk {}: {} ({}{}){}",
            visible(&d.target),
            visible(source),
            visible(format),
            d.cache.as_deref().map_or(String::new(), |c| format!(", cache {}", visible(c))),
            blind(&d.observable)
        );
    }
}

fn blind(observable: &Observable) -> String {
    match observable {
        Observable::Yes => String::new(),
        Observable::No(reason) => format!("; not observable: {reason}"),
    }
}
