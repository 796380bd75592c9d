//! Whatever ends the process that made a lab, nothing of the lab remains: no process, directory, namespace or tap.
//!
//! Needs root, libvirt, QEMU and the variables of [`lab::LabDirs::from_env`]; feature `live`.
//! Each test starts this test binary again as the owner of a lab (`owner`, steered by a variable) and ends it.
#![expect(clippy::print_stdout, reason = "the owner tells its lab to the test by a line on stdout")]
#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::fs;
use std::io::{BufRead, BufReader};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use lab::{DiskSpec, GuestSpec, Lab, LabDirs, NicSpec, StartState};
use rustix::process::{Pid, Signal, kill_process, kill_process_group};

/// Says to the second instance of this program how it ends: `wait`, `return` or `panic`.
const ENDING: &str = "LAB_CLEANUP_OWNER";
/// The tests start machines: one at a time.
static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());
/// The supervisor needs a moment after its owner was killed.
const PATIENCE: Duration = Duration::from_secs(20);

#[test]
fn nothing_remains_after_sigkill() {
    check("wait", |owner| kill_process(owner, Signal::KILL).unwrap());
}

#[test]
fn nothing_remains_after_sigterm() {
    check("wait", |owner| kill_process(owner, Signal::TERM).unwrap());
}

#[test]
fn nothing_remains_after_ctrl_c() {
    check("wait", |owner| kill_process_group(owner, Signal::INT).unwrap());
}

#[test]
fn nothing_remains_after_a_return() {
    check("return", |_| {});
}

#[test]
fn nothing_remains_after_a_panic() {
    check("panic", |_| {});
}

/// Guests survive the end of libvirtd, and a new one finds them.
#[test]
fn guests_survive_libvirtd() {
    let _one = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
    let lab = Lab::start(&LabDirs::from_env().unwrap()).unwrap();
    let guest = lab.boot(&paused("survivor")).unwrap();
    for stop in [Lab::stop_libvirtd, Lab::kill_libvirtd] {
        stop(&lab).unwrap();
        assert_eq!((lab.libvirtd_pid(), guest.is_alive()), (None, true));
        lab.start_libvirtd().unwrap();
        assert!(lab.virsh(&["list"]).unwrap().contains("survivor"));
        // This waits until libvirtd has its connection to QEMU again; a destroy before that races with it.
        lab.virsh(&["dommemstat", "survivor"]).unwrap();
    }
    guest.destroy().unwrap();
    assert!(!guest.is_alive());
}

/// The second instance: makes a lab with all kinds of things that could remain. As a plain test it does nothing.
#[test]
fn owner() {
    let Ok(ending) = std::env::var(ENDING) else { return };
    let lab = Lab::start(&LabDirs::from_env().unwrap()).unwrap();
    let spec = GuestSpec {
        disks: vec![DiskSpec::raw("vda", 1 << 20)],
        nics: vec![NicSpec::new("tap-clean", 0)],
        ..paused("cleanup")
    };
    let guest = lab.boot(&spec).unwrap();
    let mut client = lab.command("sleep").arg("1000").spawn().unwrap();
    let namespace = fs::read_link(format!("/proc/{}/ns/net", lab.supervisor_pid())).unwrap();
    println!("\nLAB {} {} {}", lab.scratch().display(), namespace.display(), guest.pid);
    match ending.as_str() {
        "return" => {}
        "panic" => panic!("as asked"),
        _ => drop(client.wait()),
    }
    drop(lab);
    client.wait().unwrap();
}

fn paused(name: &str) -> GuestSpec {
    GuestSpec { start: StartState::Paused, ..GuestSpec::new(name, "end=idle") }
}

fn check(ending: &str, end: impl FnOnce(Pid)) {
    let _one = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
    let (mut owner, _output, facts) = start_owner(ending);
    end(Pid::from_child(&owner));
    owner.wait().unwrap();
    let deadline = Instant::now() + PATIENCE;
    loop {
        let left = facts.remains();
        if left.is_empty() {
            return;
        }
        assert!(Instant::now() < deadline, "still there: {left:#?}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Also returns the rest of the owner's output, so that it has somebody to write to.
fn start_owner(ending: &str) -> (Child, impl Sized, Facts) {
    let mut owner = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "owner", "--nocapture"])
        .env(ENDING, ending)
        .process_group(0)
        .stdout(Stdio::piped())
        .stderr(if ending == "panic" { Stdio::null() } else { Stdio::inherit() })
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(owner.stdout.take().unwrap()).lines();
    let told = lines.find_map(|line| line.unwrap().strip_prefix("LAB ").map(str::to_owned));
    let told = told.expect("the owner could not start its lab; its messages are above");
    let mut words = told.split(' ');
    let mut word = || words.next().expect("three words").to_owned();
    let facts = Facts { scratch: word().into(), namespace: word(), guest_pid: word().parse().unwrap() };
    (owner, lines, facts)
}

/// What identifies a lab.
struct Facts {
    scratch: PathBuf,
    /// Link text of the network namespace, such as `net:[4026532281]`.
    namespace: String,
    guest_pid: u32,
}

impl Facts {
    fn remains(&self) -> Vec<String> {
        let mut left: Vec<String> = processes().filter_map(|process| self.owns(&process)).collect();
        if self.scratch.exists() {
            left.push(format!("directory {}", self.scratch.display()));
        }
        if lab::process_exists(self.guest_pid) {
            left.push(format!("QEMU {}", self.guest_pid));
        }
        let mounts = fs::read_to_string("/proc/self/mounts").unwrap();
        left.extend(mounts.lines().filter(|line| line.contains("/lab/")).map(|line| format!("mount {line}")));
        if Path::new("/sys/class/net/tap-clean").exists() {
            left.push("a tap outside of the lab".to_owned());
        }
        left
    }

    /// Whether a process is in the namespace or names the directory.
    fn owns(&self, process: &Path) -> Option<String> {
        let command = fs::read(process.join("cmdline")).unwrap_or_default();
        let command = String::from_utf8_lossy(&command).replace('\0', " ");
        let inside = fs::read_link(process.join("ns/net")).is_ok_and(|ns| ns == Path::new(&self.namespace));
        let named = command.contains(&*self.scratch.to_string_lossy());
        (inside || named).then(|| format!("{} {command}", process.display()))
    }
}

fn processes() -> impl Iterator<Item = PathBuf> {
    let is_pid = |path: &PathBuf| {
        path.file_name().and_then(|name| name.to_str()).is_some_and(|name| name.parse::<u32>().is_ok())
    };
    fs::read_dir("/proc").unwrap().filter_map(|entry| Some(entry.ok()?.path())).filter(is_pid)
}
