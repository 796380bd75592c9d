//! What can go wrong with libvirt, in words that name the cause and the fix.

use std::{io, time::Duration};

/// `VIR_ERR_NO_CONNECT`: no driver of the library knows the URI.
const NO_CONNECT: u32 = virt::sys::VIR_ERR_NO_CONNECT;

/// An error as libvirt reports it.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct CallError {
    /// `virErrorNumber`.
    pub code: u32,
    /// libvirt's text.
    pub message: String,
}

impl CallError {
    /// The calling thread's last libvirt error.
    pub(super) fn last() -> Self {
        let error = virt::error::Error::last_error();
        Self { code: error.code().to_raw(), message: error.message().to_owned() }
    }
}

/// Why libvirt gave no answer.
#[derive(Debug, thiserror::Error)]
pub enum LibvirtError {
    /// No connection.
    #[error("{}", describe_open_error(uri, error))]
    Open {
        /// The connection URI.
        uri: String,
        /// libvirt's reason; part of the text above, so not named `source`, which would print it twice.
        error: CallError,
    },
    /// A URI that cannot be handed to libvirt.
    #[error("the connection URI {uri:?} holds a NUL byte")]
    Uri {
        /// The connection URI.
        uri: String,
    },
    /// A call failed on an open connection.
    #[error("{call} failed")]
    Call {
        /// The function of libvirt.
        call: &'static str,
        /// libvirt's reason.
        #[source]
        source: CallError,
    },
    /// No answer in time; the call may still be stuck in the daemon.
    #[error("{uri} did not answer within {} s; is libvirtd stuck?", deadline.as_secs_f64())]
    Deadline {
        /// The connection URI.
        uri: String,
        /// How long was waited.
        deadline: Duration,
    },
    /// The thread for libvirt could not be started.
    #[error("cannot start the libvirt thread")]
    Thread(#[source] io::Error),
    /// The thread for libvirt ended without an answer.
    #[error("the libvirt thread ended unexpectedly")]
    Ended,
}

impl LibvirtError {
    /// The whole cause chain on one line, for records that hold one text.
    #[must_use]
    pub fn one_line(&self) -> String {
        match self {
            Self::Call { source, .. } => format!("{self}: {source}"),
            Self::Thread(source) => format!("{self}: {source}"),
            _ => self.to_string(),
        }
    }
}

/// One line for a connection that could not be opened: what happened, libvirt's own words, what to do.
#[must_use]
pub fn describe_open_error(uri: &str, error: &CallError) -> String {
    let message = error.message.as_str();
    let says = |words: &[&str]| words.iter().any(|word| message.contains(word));
    let (cause, fix) = if error.code == NO_CONNECT || says(&["URI path"]) || !has_known_driver(uri) {
        ("unknown connection URI", "try qemu:///system, or qemu:///session for the user's own VMs")
    } else if says(&["Permission denied", "system bus", "authenticat", "access denied", "polkit"]) {
        ("no permission for", "run as root or join the group libvirt, or go on without it by --libvirt off")
    } else if says(&["ssh:", "resolve", "No route to host"]) {
        ("cannot reach", "check host name, network and ssh login")
    } else if says(&["No such file or directory", "Connection refused"]) {
        (
            "libvirt does not run behind",
            "start it (systemctl start libvirtd, or virtqemud), or go on without it by --libvirt off",
        )
    } else {
        ("cannot connect to", "see the log of libvirtd, or go on without it by --libvirt off")
    };
    format!("{cause} {uri} ({message}): {fix}")
}

/// Whether the URI names a driver of libvirt (`DRIVER[+TRANSPORT]://…`). Without a daemon libvirt itself only says
/// that it cannot reach one, whatever the driver.
fn has_known_driver(uri: &str) -> bool {
    const DRIVERS: [&str; 14] = [
        "bhyve",
        "ch",
        "esx",
        "gsx",
        "hyperv",
        "lxc",
        "openvz",
        "qemu",
        "test",
        "vbox",
        "vmwarefusion",
        "vpx",
        "vz",
        "xen",
    ];
    let scheme = uri.split(':').next().unwrap_or_default();
    DRIVERS.contains(&scheme.split('+').next().unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Messages as libvirt 9.0 words them.
    #[test]
    fn open_errors_name_cause_and_fix() {
        for (code, message, cause, fix) in [
            (
                38,
                "Failed to connect socket to '/var/run/libvirt/libvirt-sock-ro': No such file or directory",
                "does not run",
                "systemctl start",
            ),
            (
                38,
                "Failed to connect socket to '/var/run/libvirt/libvirt-sock-ro': Connection refused",
                "does not run",
                "systemctl start",
            ),
            (
                38,
                "Failed to connect socket to '/var/run/libvirt/libvirt-sock-ro': Permission denied",
                "no permission",
                "group libvirt",
            ),
            (
                1,
                "internal error: Unable to get system bus connection: Could not connect: No such file or directory",
                "no permission",
                "group libvirt",
            ),
            (
                45,
                "authentication unavailable: no polkit agent available to authenticate action 'org.libvirt.unix.monitor'",
                "no permission",
                "group libvirt",
            ),
            (5, "no connection driver available for nope:///x", "unknown connection URI", "qemu:///system"),
            (
                1,
                "internal error: unexpected qemu URI path '/nope', try qemu:///system",
                "unknown connection URI",
                "qemu:///system",
            ),
            (
                38,
                "Cannot recv data: ssh: Could not resolve hostname h: Name or service not known: Connection reset by peer",
                "cannot reach",
                "host name",
            ),
            (7, "something new", "cannot connect", "log of libvirtd"),
        ] {
            let text = describe_open_error("qemu:///uri", &CallError { code, message: message.into() });
            for part in [cause, fix, message, "qemu:///uri"] {
                assert!(text.contains(part), "{part:?} is not in {text:?}");
            }
            assert_eq!(text.lines().count(), 1);
        }
    }
}
