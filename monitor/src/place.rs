//! Where the domains of a libvirt connection are: on this host, whose kernel can be asked about them, or elsewhere.

/// Names of this machine for itself.
const HERE: [&str; 3] = ["", "localhost", "localhost.localdomain"];

/// Why this host's kernel cannot tell of the domains behind a URI; `None` if it can.
#[must_use]
pub fn elsewhere(uri: &str, hostname: &str) -> Option<String> {
    let (scheme, rest) = uri.split_once(':')?;
    let (driver, transport) = scheme.split_once('+').unwrap_or((scheme, "unix"));
    let authority = rest.strip_prefix("//").unwrap_or_default().split(['/', '?']).next().unwrap_or_default();
    let host = host_of(authority);
    let is_address = host.parse().is_ok_and(|ip: std::net::IpAddr| ip.is_loopback());
    let here = HERE.contains(&host) || is_address || host == hostname;
    if driver == "test" {
        return Some("the domains of libvirt's test driver are made up and have no process".to_owned());
    }
    if driver != "qemu" {
        return Some(format!("the domains of {driver} are no QEMU processes"));
    }
    if transport == "ext" {
        return Some(
            "where the domains are is known only to the command of that URI: run kvm-monitor there"
                .to_owned(),
        );
    }
    (!here).then(|| {
        format!(
            "the domains are on host {host}, whose kernel cannot be asked from here: run kvm-monitor there"
        )
    })
}

/// The host of `user@host:port` or `[address]:port`.
fn host_of(authority: &str) -> &str {
    let host = authority.rsplit_once('@').map_or(authority, |(_, host)| host);
    match host.strip_prefix('[').and_then(|host| host.split_once(']')) {
        Some((address, _)) => address,
        None => host.split_once(':').map_or(host, |(host, _)| host),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hosts_of_uris() {
        for here in [
            "qemu:///system",
            "qemu:///session",
            "qemu+unix:///system?socket=/run/x",
            "qemu+ssh://localhost/system",
            "qemu+ssh://root@node1:2222/system",
            "qemu+tcp://127.0.0.1/system",
            "qemu+tls://[::1]:16514/system",
            "",
            "alias",
        ] {
            assert_eq!(elsewhere(here, "node1"), None, "{here}");
        }
        for (uri, word) in [
            ("qemu+ssh://node2/system", "on host node2"),
            ("qemu+ssh://root@node2:2222/system?keyfile=/x", "on host node2"),
            ("qemu://node2/system", "on host node2"),
            ("qemu+tls://[2001:db8::1]:16514/system", "on host 2001:db8::1"),
            ("qemu+ext:///system?command=x", "known only to the command"),
            ("test:///default", "test driver"),
            ("lxc:///", "lxc"),
        ] {
            let reason = elsewhere(uri, "node1").unwrap_or_else(|| panic!("{uri}"));
            assert!(reason.contains(word), "{uri}: {reason}");
        }
    }
}
