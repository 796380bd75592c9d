//! The host's side of an experiment: scheduler times of threads, a load that competes for a CPU, UDP peers.

use std::fs;
use std::net::{Ipv4Addr, SocketAddr, UdpSocket};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use rustix::process::Pid;
use rustix::thread::CpuSet;
use rustix::time::{ClockId, clock_gettime};

use crate::Lab;

/// How long a receiver sleeps at most before it looks whether it should end.
const RECEIVE_SLICE: Duration = Duration::from_millis(20);

/// CLOCK_MONOTONIC, ns.
#[must_use]
pub fn monotonic_ns() -> u64 {
    let now = clock_gettime(ClockId::Monotonic);
    now.tv_sec.unsigned_abs() * 1_000_000_000 + now.tv_nsec.unsigned_abs()
}

/// Whether this is the VM of `cargo xtask lab`, whose CPUs are emulated.
#[must_use]
pub fn is_emulated_host() -> bool {
    std::env::var_os("KVM_MONITOR_HOST_UNDER_TEST").is_some()
}

/// Whether a process exists (as a zombie too).
#[must_use]
pub fn process_exists(pid: u32) -> bool {
    let pid = i32::try_from(pid).ok().and_then(Pid::from_raw);
    pid.is_some_and(|pid| rustix::process::test_kill_process(pid).is_ok())
}

/// What the scheduler has charged a thread: /proc/PID/task/TID/schedstat.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ThreadTime {
    /// Time on a CPU, ns. While the thread runs it advances at ticks only.
    pub run_ns: u64,
    /// Time runnable but not on a CPU, ns.
    pub wait_ns: u64,
    /// How often it was put on a CPU.
    pub timeslices: u64,
}

/// Reads a thread's times.
pub fn thread_time(pid: u32, tid: u32) -> Result<ThreadTime> {
    let path = format!("/proc/{pid}/task/{tid}/schedstat");
    let text = fs::read_to_string(&path).with_context(|| format!("cannot read {path}"))?;
    parse_schedstat(&text).with_context(|| format!("{path}: cannot read {text:?}"))
}

/// CPU time of all threads that a process has now, nanoseconds; 0 once it has ended.
#[must_use]
pub fn cpu_ns(pid: u32) -> u64 {
    let threads = fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
    let time =
        |thread: fs::DirEntry| parse_schedstat(&fs::read_to_string(thread.path().join("schedstat")).ok()?);
    threads.filter_map(time).map(|time| time.run_ns).sum()
}

fn parse_schedstat(text: &str) -> Option<ThreadTime> {
    let mut numbers = text.split_whitespace().map(str::parse);
    let (run_ns, wait_ns) = (numbers.next()?.ok()?, numbers.next()?.ok()?);
    Some(ThreadTime { run_ns, wait_ns, timeslices: numbers.next()?.ok()? })
}

/// A process that never sleeps, bound to one CPU. Ends when dropped, and with the lab at the latest.
#[derive(Debug)]
pub struct Hog(Child);

impl Hog {
    /// Starts one on a host CPU.
    pub fn start(lab: &Lab, cpu: usize) -> Result<Self> {
        Self::spawn(lab.command("sh"), cpu)
    }

    /// Starts one that gives way to any other (`SCHED_IDLE`): all it does is that the CPU never halts.
    pub fn giving_way(lab: &Lab, cpu: usize) -> Result<Self> {
        let mut command = lab.command("chrt");
        command.args(["--idle", "0", "sh"]);
        Self::spawn(command, cpu)
    }

    fn spawn(mut command: Command, cpu: usize) -> Result<Self> {
        command.args(["-c", "while :; do :; done"]).stdin(Stdio::null());
        let mut cpus = CpuSet::new();
        cpus.set(cpu);
        // SAFETY: one system call on a value that the closure owns: safe after fork.
        unsafe { command.pre_exec(move || Ok(rustix::thread::sched_setaffinity(None, &cpus)?)) };
        let child = command.spawn().with_context(|| format!("cannot start a busy loop on CPU {cpu}"))?;
        Ok(Self(child))
    }

    /// Its process and thread id.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.0.id()
    }

    /// Its scheduler times.
    pub fn time(&self) -> Result<ThreadTime> {
        thread_time(self.pid(), self.pid())
    }
}

impl Drop for Hog {
    fn drop(&mut self) {
        // Fails only if it is gone already.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Receives datagrams in the lab's network namespace and counts them.
#[derive(Debug)]
pub struct UdpSink {
    counts: Arc<SinkCounts>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Debug, Default)]
struct SinkCounts {
    stop: AtomicBool,
    packets: AtomicU64,
    bytes: AtomicU64,
}

impl UdpSink {
    /// Listens on a port of every address. Without a listener the host would answer with ICMP errors.
    pub fn start(lab: &Lab, port: u16) -> Result<Self> {
        let socket = bind(lab, port)?;
        socket.set_read_timeout(Some(RECEIVE_SLICE))?;
        let counts = Arc::new(SinkCounts::default());
        let counted = Arc::clone(&counts);
        let thread = std::thread::spawn(move || {
            let mut buffer = [0; 65536];
            while !counted.stop.load(Ordering::Relaxed) {
                if let Ok(length) = socket.recv(&mut buffer) {
                    counted.packets.fetch_add(1, Ordering::Relaxed);
                    counted.bytes.fetch_add(u64::try_from(length).unwrap_or(0), Ordering::Relaxed);
                }
            }
        });
        Ok(Self { counts, thread: Some(thread) })
    }

    /// Datagrams received.
    #[must_use]
    pub fn packets(&self) -> u64 {
        self.counts.packets.load(Ordering::Relaxed)
    }

    /// Bytes of payload received.
    #[must_use]
    pub fn payload_bytes(&self) -> u64 {
        self.counts.bytes.load(Ordering::Relaxed)
    }
}

impl Drop for UdpSink {
    fn drop(&mut self) {
        self.counts.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join(); // A panic there has been printed already.
        }
    }
}

/// Sends `count` datagrams of `payload_bytes` from the lab's network namespace, `gap` apart; returns how many
/// the kernel took.
pub fn send_datagrams(
    lab: &Lab,
    to: SocketAddr,
    (count, payload_bytes): (u32, usize),
    gap: Duration,
) -> Result<u64> {
    let socket = bind(lab, 0)?;
    let (payload, start, mut sent) = (vec![0x5a; payload_bytes], Instant::now(), 0);
    for number in 0..count {
        std::thread::sleep((gap * number).saturating_sub(start.elapsed()));
        sent += u64::from(socket.send_to(&payload, to).is_ok());
    }
    Ok(sent)
}

/// A UDP socket that belongs to the lab's network namespace, whatever thread uses it.
fn bind(lab: &Lab, port: u16) -> Result<UdpSocket> {
    lab.in_network(|| UdpSocket::bind((Ipv4Addr::UNSPECIFIED, port)))?
        .with_context(|| format!("cannot bind UDP port {port} in the lab"))
}

/// Runs a program to its end and fails with what it said.
pub(crate) fn run(lab: &Lab, program: &str, arguments: &[&str]) -> Result<()> {
    let output = lab.command(Path::new(program)).args(arguments).output();
    let output = output.with_context(|| format!("cannot run {program} in the lab"))?;
    let message = String::from_utf8_lossy(&output.stderr);
    anyhow::ensure!(output.status.success(), "{program} {}: {}", arguments.join(" "), message.trim());
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn schedstat_has_three_numbers() {
        let expected = ThreadTime { run_ns: 12, wait_ns: 3, timeslices: 4 };
        assert_eq!(parse_schedstat("12 3 4\n"), Some(expected));
        for wrong in ["", "1 2", "a b c", "-1 2 3"] {
            assert_eq!(parse_schedstat(wrong), None, "{wrong:?}");
        }
    }
}
