//! libvirt over its remote transports and through other users' sockets: it works, and what the host's kernel then
//! cannot tell is said with the reason.
//!
//! The real binary runs inside a [`Lab`]; what it connects to is a real SSH server on the lab's own loopback, and a
//! relay to libvirtd whose socket belongs to somebody else. Needs root and the variables that `cargo xtask test` sets.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::{
    fs,
    os::unix::{
        fs::{PermissionsExt as _, chown},
        net::{UnixListener, UnixStream},
    },
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use lab::{DiskSpec, Guest, GuestSpec, Lab, LabDirs, NicSpec, StartState};
use serde_json::Value;
use support::{PATIENCE, Run, has_window, is_sample_of, program};

#[path = "support/mod.rs"]
#[expect(dead_code, reason = "each test program uses a part of it")]
mod support;

const NAME: &str = "remote";
const UUID: &str = "5ec0de00-0000-4000-8000-0000000000ec";
const QUICK: [&str; 6] =
    ["--interval", "100ms", "--libvirt-interval", "200ms", "--libvirt-slow-interval", "200ms"];
const NOBODY: u32 = 65534;
const PORT: &str = "2222";

fn stage() -> (Lab, Guest) {
    let lab = Lab::start(&LabDirs::from_env().unwrap()).unwrap();
    let guest = lab.boot(&GuestSpec {
        uuid: Some(UUID.to_owned()),
        disks: vec![DiskSpec::raw("vda", 1 << 20)],
        nics: vec![NicSpec::new("tap-remote", 0)],
        memory_mib: 64,
        start: StartState::Paused,
        ..GuestSpec::new(NAME, "sleep=1s")
    });
    (lab, guest.unwrap())
}

fn tells_of_disks(sample: &Value) -> bool {
    is_sample_of(sample, UUID) && sample["disks"][0]["rd_req"]["libvirt"].is_u64()
}

// ---- ssh

/// A server with keys of its own, in the lab's network. It ends with the lab at the latest.
struct SshServer {
    child: Child,
    dir: PathBuf,
}

impl SshServer {
    fn start(lab: &Lab) -> Self {
        let unpacked = PathBuf::from(std::env::var_os("KVM_MONITOR_SSHD").expect(
            "KVM_MONITOR_SSHD is not set: `cargo xtask test` fetches an SSH server, or says why it cannot",
        ));
        let dir = lab.scratch().join("ssh");
        fs::create_dir(&dir).unwrap();
        fs::set_permissions(&dir, fs::Permissions::from_mode(0o700)).unwrap();
        for key in ["host", "user"] {
            let mut keygen = Command::new("ssh-keygen");
            keygen.args(["-q", "-t", "ed25519", "-N", "", "-C", key, "-f"]).arg(dir.join(key));
            assert!(keygen.status().unwrap().success());
        }
        fs::copy(dir.join("user.pub"), dir.join("authorized")).unwrap();
        let host_key = fs::read_to_string(dir.join("host.pub")).unwrap();
        fs::write(dir.join("known"), format!("node2 {host_key}")).unwrap();
        let at = |name: &str| dir.join(name).display().to_string();
        let settings = format!(
            "ListenAddress 127.0.0.1\nPort {PORT}\nHostKey {}\nAuthorizedKeysFile {}\nPidFile none\nUsePAM no\n\
             PermitRootLogin prohibit-password\nPasswordAuthentication no\nStrictModes no\n",
            at("host"),
            at("authorized"),
        );
        fs::write(dir.join("settings"), settings).unwrap();
        // The server wants a user for what it does before a login, and one to log in that is not locked.
        fs::write(
            dir.join("passwd"),
            "root:*:0:0:root:/root:/bin/sh\nsshd:*:65533:65534::/run/sshd:/bin/false\n",
        )
        .unwrap();
        fs::write(dir.join("shadow"), "root:*:1::::::\nsshd:*:1::::::\n").unwrap();
        // `node2` is found by this alone, and nothing of the user's own settings is read or written.
        let client = format!(
            "#!/bin/sh\nexec ssh -F none -o HostName=127.0.0.1 -o HostKeyAlias=node2 -o UserKnownHostsFile={} \
             -o GlobalKnownHostsFile=none -o StrictHostKeyChecking=yes -o BatchMode=yes \"$@\"\n",
            at("known"),
        );
        fs::write(dir.join("client"), client).unwrap();
        fs::set_permissions(dir.join("client"), fs::Permissions::from_mode(0o755)).unwrap();
        let script = "set -e; mount --bind \"$1/passwd\" /etc/passwd; mount --bind \"$1/shadow\" /etc/shadow
            mkdir -p /run/sshd; exec \"$2\" -D -e -f \"$1/settings\"";
        let libraries: Vec<String> = ["usr/lib", "lib"]
            .map(|lib| unpacked.join(lib).join("x86_64-linux-gnu").display().to_string())
            .into();
        let mut command = lab.command("unshare");
        command.args(["--mount", "sh", "-c", script, "sh"]).arg(&dir).arg(unpacked.join("usr/sbin/sshd"));
        if unpacked != Path::new("/") {
            command.env("LD_LIBRARY_PATH", libraries.join(":"));
        }
        let log = fs::File::create(dir.join("log")).unwrap();
        let child = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log).spawn().unwrap();
        let mut this = Self { child, dir };
        this.wait_until_it_listens(lab);
        this
    }

    fn wait_until_it_listens(&mut self, lab: &Lab) {
        let deadline = Instant::now() + PATIENCE;
        let address = format!("127.0.0.1:{PORT}");
        while lab.in_network(|| std::net::TcpStream::connect(&address).is_err()).unwrap() {
            let ended = self.child.try_wait().unwrap();
            assert!(ended.is_none() && Instant::now() < deadline, "{}", self.log());
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    fn uri(&self, host: &str) -> String {
        let at = |name: &str| self.dir.join(name).display().to_string();
        format!(
            "qemu+ssh://root@{host}:{PORT}/system?command={}&keyfile={}&no_tty=1",
            at("client"),
            at("user")
        )
    }

    fn log(&self) -> String {
        fs::read_to_string(self.dir.join("log")).unwrap_or_default()
    }
}

impl Drop for SshServer {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Another host as its name says: libvirt's part is all there, and that of the kernel is refused with the reason.
#[test]
fn a_libvirt_behind_ssh_works_and_its_kernel_is_not_asked() {
    let (lab, _guest) = stage();
    let server = SshServer::start(&lab);
    let uri = server.uri("node2");
    let mut run = Run::start(
        lab.command(program()),
        &[&["run", "--libvirt", "require", "--connect", &uri], &QUICK[..]].concat(),
    );
    for _ in 0..3 {
        run.wait("libvirt's figures", |r| {
            tells_of_disks(r) && r["memory"]["actual_bytes"]["libvirt"].is_u64()
        });
    }
    // Events come by the same way.
    lab.virsh(&["desc", NAME, "--live", "--title", "from afar"]).unwrap();
    run.wait("its new title", |r| r["type"] == "domain" && r["domain"]["title"] == "from afar");
    let ended = run.stop();
    assert!(ended.status.success(), "{}\n{}", ended.stderr, server.log());
    let sources = &ended.records[0]["sources"];
    assert_eq!(sources["libvirt"]["available"], true);
    for local in ["ebpf", "procfs"] {
        assert_eq!(sources[local]["available"], false, "{sources}");
        assert!(sources[local]["reason"].as_str().unwrap().contains("on host node2"), "{sources}");
    }
    // The guest's process, tap and disk are this host's in truth: nothing of them may have been taken for node2's.
    for record in &ended.records {
        assert!(record["domain"]["pid"].is_null() && record["windows"]["procfs"].is_null(), "{record}");
        assert!(record["windows"]["ebpf"].is_null(), "{record}");
    }
}

/// The same way to this host: everything is there.
#[test]
fn a_libvirt_behind_ssh_that_is_this_hosts_has_its_kernel_beside_it() {
    let (lab, _guest) = stage();
    let server = SshServer::start(&lab);
    let uri = server.uri("127.0.0.1");
    let mut run = Run::start(
        lab.command(program()),
        &[&["run", "--libvirt", "require", "--ebpf", "require", "--connect", &uri], &QUICK[..]].concat(),
    );
    run.wait("libvirt's figures", tells_of_disks);
    run.wait("the kernel's", |r| is_sample_of(r, UUID) && has_window(r, "ebpf") && has_window(r, "procfs"));
    let ended = run.stop();
    assert!(ended.status.success(), "{}\n{}", ended.stderr, server.log());
}

// ---- another user's socket

/// Hands on what comes through a socket that belongs to nobody, in a directory that is nobody's.
struct Relay {
    socket: PathBuf,
    connections: Arc<Mutex<Vec<UnixStream>>>,
    accepted: Arc<AtomicUsize>,
    over: Arc<AtomicBool>,
}

impl Relay {
    fn start(dir: &Path, to: PathBuf) -> Self {
        fs::create_dir(dir).unwrap();
        let socket = dir.join("sock");
        let listener = UnixListener::bind(&socket).unwrap();
        for (path, mode) in [(&socket, 0o700), (&dir.to_path_buf(), 0o700)] {
            fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
            chown(path, Some(NOBODY), Some(NOBODY)).unwrap();
        }
        let this =
            Self { socket, connections: Arc::default(), accepted: Arc::default(), over: Arc::default() };
        let (connections, accepted) = (Arc::clone(&this.connections), Arc::clone(&this.accepted));
        let over = Arc::clone(&this.over);
        std::thread::spawn(move || {
            for near in listener.incoming() {
                if over.load(Ordering::Relaxed) {
                    return;
                }
                let (near, far) = (near.unwrap(), UnixStream::connect(&to).unwrap());
                accepted.fetch_add(1, Ordering::Relaxed);
                for (mut from, mut into) in [
                    (near.try_clone().unwrap(), far.try_clone().unwrap()),
                    (far.try_clone().unwrap(), near.try_clone().unwrap()),
                ] {
                    std::thread::spawn(move || {
                        let _ = std::io::copy(&mut from, &mut into); // It ends when either side does.
                        let _ = into.shutdown(std::net::Shutdown::Both);
                    });
                }
                connections.lock().unwrap().extend([near, far]);
            }
        });
        this
    }

    fn cut(&self) {
        for connection in self.connections.lock().unwrap().drain(..) {
            let _ = connection.shutdown(std::net::Shutdown::Both); // It may have ended by itself.
        }
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        self.over.store(true, Ordering::Relaxed);
        let _ = UnixStream::connect(&self.socket); // Wakes it.
        self.cut();
    }
}

/// Root may connect to a socket of a user's own, at first and again, though it gives up what it does not need.
#[test]
fn root_reaches_another_users_socket_again_and_again() {
    let (lab, _guest) = stage();
    let relay = Relay::start(&lab.scratch().join("of-nobody"), lab.path("/run/libvirt/libvirt-sock-ro"));
    let uri = format!("qemu+unix:///system?socket={}", relay.socket.display());
    let mut run = Run::start(
        lab.command(program()),
        &[&["run", "--libvirt", "require", "--ebpf", "require", "--connect", &uri], &QUICK[..]].concat(),
    );
    run.wait("libvirt's figures", tells_of_disks);
    // What is kept for that is aside while it is not needed.
    let status = fs::read_to_string(format!("/proc/{}/status", run.child.id())).unwrap();
    let effective = status.lines().find_map(|line| line.strip_prefix("CapEff:")).unwrap();
    assert_eq!(u64::from_str_radix(effective.trim(), 16).unwrap() & 1 << 1, 0, "CAP_DAC_OVERRIDE: {status}");
    for _ in 0..2 {
        let before = relay.accepted.load(Ordering::Relaxed);
        relay.cut();
        run.wait_event("source_lost", "libvirt");
        run.wait_event("source_back", "libvirt");
        run.wait("libvirt's figures", tells_of_disks);
        assert!(relay.accepted.load(Ordering::Relaxed) > before, "through the relay");
    }
    let ended = run.stop();
    assert!(ended.status.success(), "{}", ended.stderr);
}
