//! What this process may do, and gives up once it has begun.
//!
//! Capabilities belong to threads, so each thread is started after the one that starts it has given up what it can
//! (`run`), or gives up everything itself (the one that writes).

use rustix::{
    io,
    process::{Resource, Rlimit, getrlimit, setrlimit},
    thread::{CapabilitySet, CapabilitySets, capabilities, set_capabilities, set_no_new_privs},
};

/// Kernel programs are attached later too: those of disks when one is opened, those of KVM once it is loaded.
const KERNEL_PROGRAMS: CapabilitySet = CapabilitySet::BPF.union(CapabilitySet::PERFMON);
/// Files of other users' processes: descriptors, `smaps_rollup`, taps.
const PROCESSES: CapabilitySet = CapabilitySet::SYS_PTRACE.union(CapabilitySet::DAC_READ_SEARCH);
/// Entering another network namespace (`setns(2)`), and asking a tap for its own (`TUNGETDEVNETNS`). Kept aside, and in
/// effect only during those calls.
const NAMESPACES: CapabilitySet = CapabilitySet::SYS_ADMIN.union(CapabilitySet::NET_ADMIN);
/// Connecting to a socket that its owner alone may write to, as root. Kept aside likewise.
const SOCKETS: CapabilitySet = CapabilitySet::DAC_OVERRIDE;
/// Connecting by a program such as ssh: libvirt takes all capabilities from it (`virCommandClearCaps()`), and as root
/// cannot (`capng_apply()` fails) without this one. Kept aside likewise.
const COMMANDS: CapabilitySet = CapabilitySet::SETPCAP;
/// More open files than this are of no use; libvirt's child processes close all they might have.
const OPEN_FILES: u64 = 1 << 17;

/// Whether the kernel programs run, or may.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Programs {
    /// They do.
    Run,
    /// They never will.
    Off,
}

/// Whether programs that the connection to libvirt starts may need more rights than we have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Children {
    /// A user's libvirtd, which starts VMs and helpers that are set-user-ID.
    Daemon,
    /// None, or ssh.
    Simple,
}

impl Children {
    /// What a libvirt URI may start.
    #[must_use]
    pub fn of(uri: &str) -> Self {
        let path = uri.split(['?', '#']).next().unwrap_or_default();
        if path.ends_with("/session") { Self::Daemon } else { Self::Simple }
    }
}

/// The way to libvirt's daemon.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// A socket that is open to all, or our own; or another host's port.
    Usual,
    /// A socket that the URI names: it may be another user's.
    NamedSocket,
    /// A program that is started: ssh or the like.
    Command,
}

impl Way {
    /// What a libvirt URI says.
    #[must_use]
    pub fn of(uri: &str) -> Self {
        let (address, query) = uri.split_once('?').unwrap_or((uri, ""));
        let transport = address.split_once(':').and_then(|(scheme, _)| scheme.split_once('+'));
        let names_one = query.split(['&', ';']).any(|parameter| parameter.starts_with("socket="));
        match transport.map_or("unix", |(_, transport)| transport) {
            "unix" if names_one => Self::NamedSocket,
            "ssh" | "ext" => Self::Command,
            _ => Self::Usual,
        }
    }

    fn needs(self) -> CapabilitySet {
        match self {
            Self::Usual => CapabilitySet::empty(),
            Self::NamedSocket => SOCKETS,
            Self::Command => COMMANDS,
        }
    }
}

/// Gives up, on this thread and those it starts from now on, every capability that is not needed any more.
///
/// # Errors
/// What the kernel said. Then nothing is given up.
pub fn reduce(programs: Programs, children: Children, way: Way) -> io::Result<()> {
    let had = capabilities(None)?;
    set_capabilities(None, kept(had, programs, way))?;
    match children {
        Children::Daemon => Ok(()),
        Children::Simple => set_no_new_privs(true),
    }
}

/// Gives up every capability of this thread.
///
/// # Errors
/// What the kernel said.
pub fn give_up() -> io::Result<()> {
    let none = CapabilitySet::empty();
    set_capabilities(None, CapabilitySets { effective: none, permitted: none, inheritable: none })
}

/// Does something with what [`reduce`] kept aside for namespaces in effect.
pub fn with_namespaces<T>(work: impl FnOnce() -> T) -> T {
    with(NAMESPACES, work)
}

/// Does something with what [`reduce`] kept aside for the way to libvirt's daemon in effect.
pub fn with_way<T>(work: impl FnOnce() -> T) -> T {
    with(SOCKETS | COMMANDS, work)
}

fn with<T>(aside: CapabilitySet, work: impl FnOnce() -> T) -> T {
    let Ok(had) = capabilities(None) else { return work() };
    let more = had.effective | had.permitted & aside;
    if more == had.effective {
        return work();
    }
    // It fails only for what is not permitted; then the work fails and says so.
    let _ = set_capabilities(None, CapabilitySets { effective: more, ..had });
    let result = work();
    let _ = set_capabilities(None, had);
    result
}

/// What stays of these capabilities. None is handed on to a program that is started.
fn kept(had: CapabilitySets, programs: Programs, way: Way) -> CapabilitySets {
    let wanted = match programs {
        Programs::Run => KERNEL_PROGRAMS | PROCESSES,
        Programs::Off => PROCESSES,
    };
    CapabilitySets {
        effective: had.effective & wanted,
        permitted: had.permitted & (wanted | NAMESPACES | way.needs()),
        inheritable: CapabilitySet::empty(),
    }
}

/// Lets this process have as many files open as it may: it holds some of each domain's.
pub fn raise_open_files() {
    let now = getrlimit(Resource::Nofile);
    let most = now.maximum.unwrap_or(OPEN_FILES).min(OPEN_FILES);
    if now.current.is_some_and(|current| current < most) {
        // What it fails at shows where a file cannot be opened.
        let _ = setrlimit(Resource::Nofile, Rlimit { current: Some(most), maximum: now.maximum });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_needed_later_stays() {
        let all = CapabilitySet::all();
        let had = CapabilitySets { effective: all, permitted: all, inheritable: all };
        let run = kept(had, Programs::Run, Way::Usual);
        assert_eq!(run.effective, KERNEL_PROGRAMS | PROCESSES);
        assert_eq!(run.permitted, KERNEL_PROGRAMS | PROCESSES | NAMESPACES);
        assert_eq!(run.inheritable, CapabilitySet::empty());
        assert_eq!(kept(had, Programs::Off, Way::Usual).effective, PROCESSES);
        for (way, more) in [(Way::NamedSocket, SOCKETS), (Way::Command, COMMANDS)] {
            let with = kept(had, Programs::Run, way);
            assert_eq!((with.effective, with.permitted), (run.effective, run.permitted | more), "{way:?}");
        }
    }

    #[test]
    fn nothing_is_gained() {
        let few = CapabilitySet::BPF | CapabilitySet::CHOWN;
        let had = CapabilitySets { effective: few, permitted: few, inheritable: CapabilitySet::empty() };
        let now = kept(had, Programs::Run, Way::NamedSocket);
        assert_eq!((now.effective, now.permitted), (CapabilitySet::BPF, CapabilitySet::BPF));
    }

    #[test]
    fn a_thread_without_capabilities_stays_without() {
        std::thread::spawn(|| {
            give_up().unwrap();
            let effective = || capabilities(None).unwrap().effective;
            assert_eq!(with_namespaces(effective), CapabilitySet::empty());
        })
        .join()
        .unwrap();
    }

    #[test]
    fn ways_to_a_daemon() {
        let check = |uri, expected| assert_eq!(Way::of(uri), expected, "{uri}");
        check("qemu:///system", Way::Usual);
        check("qemu:///session?socket=/run/user/1000/libvirt/libvirt-sock", Way::NamedSocket);
        check("qemu+unix:///system?mode=direct&socket=/x", Way::NamedSocket);
        check("qemu+ssh://node/system?socket=/x", Way::Command);
        check("qemu+ext:///system?command=x", Way::Command);
        check("qemu+tls://node/system?socket=/x", Way::Usual);
        check("qemu:///system?keyfile=/socket=", Way::Usual);
        check("", Way::Usual);
    }

    #[test]
    fn what_a_connection_starts() {
        let check = |uri, expected| assert_eq!(Children::of(uri), expected, "{uri}");
        check("qemu:///system", Children::Simple);
        check("qemu+ssh://root@node/system?keyfile=/session", Children::Simple);
        check("qemu:///session", Children::Daemon);
        check("qemu:///session?socket=/x", Children::Daemon);
        check("", Children::Simple);
    }
}
