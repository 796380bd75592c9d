//! Every thread of a real guest, as the real program tells of it: CPU time by class, the three sources side by side,
//! vCPUs that wait for each other, and one that is plugged in while the guest runs.
//!
//! Needs root and the variables that `cargo xtask test` sets.

#![expect(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "a test may panic, and prints what it measured"
)]

use std::{
    io::{BufRead as _, BufReader},
    process::{Child, ChildStdout, Stdio},
    time::{Duration, Instant},
};

use lab::{DiskSpec, GuestSpec, Lab, LabDirs, Which};
use serde_json::Value;

/// A guest of three vCPUs takes minutes to boot where CPUs are emulated and take turns.
const PATIENCE: Duration = Duration::from_secs(900);
const NAME: &str = "threads";
/// `utime` and `stime` of `/proc/PID/stat` are counted in these.
const CLOCK_TICK_NS: u64 = 10_000_000;

/// `kvm-monitor run` in the lab; ended when dropped.
struct Run {
    child: Child,
    lines: BufReader<ChildStdout>,
}

impl Run {
    fn start(lab: &Lab) -> Self {
        let program =
            std::env::var_os("KVM_MONITOR_BIN").expect("run the live tests with `cargo xtask test`");
        let mut command = lab.command(program);
        command.args(["run", "--domain", NAME, "--interval", "200ms", "--libvirt-interval", "200ms"]);
        command.args(["--libvirt-slow-interval", "200ms"]).stdout(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let lines = BufReader::new(child.stdout.take().unwrap());
        Self { child, lines }
    }

    /// The next sample of now or later that `wanted` takes something from.
    fn sample<T>(&mut self, what: &str, mut wanted: impl FnMut(&Value) -> Option<T>) -> T {
        let end = Instant::now() + PATIENCE;
        let now = lab::monotonic_ns();
        let mut last = Value::Null;
        while Instant::now() < end {
            let mut line = String::new();
            assert!(self.lines.read_line(&mut line).unwrap() > 0, "the stream ended before {what}");
            last = serde_json::from_str(&line).unwrap();
            if last["type"] == "sample"
                && last["mono_ns"].as_u64() > Some(now)
                && let Some(found) = wanted(&last)
            {
                return found;
            }
        }
        panic!("{what} never came; the last line: {last}");
    }
}

impl Drop for Run {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

const SOURCES: [&str; 3] = ["ebpf", "procfs", "libvirt"];

fn cpus() -> u64 {
    std::thread::available_parallelism().unwrap().get().try_into().unwrap()
}

/// A counter of `cpu` from a source.
fn cpu(sample: &Value, metric: &str, source: &str) -> Option<u64> {
    sample["cpu"][metric][source].as_u64()
}

#[test]
fn every_thread_of_a_guest_is_accounted() {
    let lab = Lab::start(&LabDirs::from_env().unwrap()).unwrap();
    let iothread = DiskSpec { iothread: Some(1), ..DiskSpec::raw("vda", 4 << 20) };
    let pool = DiskSpec { io: "threads", ..DiskSpec::raw("vdb", 4 << 20) };
    let spec = GuestSpec {
        vcpus: 2,
        vcpus_max: Some(3),
        vcpu_pin: Some("0".to_owned()),
        disks: vec![iothread, pool],
        ..GuestSpec::new(NAME, "wait read=vda:512x4096 read=vdb:512x4096 wait burn=all:3600s")
    };
    let guest = lab.boot(&spec).unwrap();
    guest.wait_begin(Which::Kind("wait"), PATIENCE).unwrap();
    let mut run = Run::start(&lab);
    let classes = ["emulator_run_ns", "iothread_run_ns", "worker_run_ns", "vhost_run_ns", "vcpu_run_ns"];
    let all = |sample: &Value| -> Option<Vec<u64>> {
        classes.iter().map(|class| cpu(sample, class, "ebpf")).collect()
    };
    let before = run.sample("figures of every class", all);
    guest.go_on(PATIENCE).unwrap(); // It reads its disks, and waits again.
    guest.wait_begin(Which::Number(3), PATIENCE).unwrap();
    let after = run.sample("figures of every class", all);
    println!("{classes:?}: {before:?}, after reading two disks {after:?}");
    for (class, (before, after)) in classes.iter().zip(before.iter().zip(&after)) {
        let works = !matches!(*class, "vhost_run_ns");
        assert_eq!(after > before, works, "{class}: {before} to {after}");
    }
    let (times, windows, sum) = run.sample("one time of the process from three sources", |sample| {
        let sum = all(sample)?.into_iter().sum::<u64>();
        let times = SOURCES.map(|source| cpu(sample, "time_ns", source));
        let windows = SOURCES.map(|source| {
            let window = &sample["windows"][source];
            Some([window[0].as_u64()?, window[1].as_u64()?])
        });
        let [ebpf, procfs, libvirt] = times;
        let [of_ebpf, of_procfs, of_libvirt] = windows;
        Some(([ebpf?, procfs?, libvirt?], [of_ebpf?, of_procfs?, of_libvirt?], sum))
    });
    println!("time_ns of {SOURCES:?}: {times:?}, read at {windows:?}; the classes sum to {sum}");
    // All three count the same, to their grain; each is asked at a moment of its own, between which it may have run on each CPU.
    let ebpf = times[0];
    for (time, window) in times.iter().zip(&windows).skip(1) {
        let between = windows[0][1].max(window[1]) - windows[0][0].min(window[0]);
        let most = 5 * CLOCK_TICK_NS + between * cpus();
        assert!(ebpf.abs_diff(*time) <= most, "{ebpf} and {time} differ by more than {most}");
    }
    // Threads that ended before the domain was followed are in the process's time only.
    assert!(sum <= ebpf && ebpf - sum <= 10 * CLOCK_TICK_NS, "{sum} of {ebpf}");

    guest.go_on(PATIENCE).ok(); // The step that follows does not end.
    let rate = run.sample("vCPUs that wait for each other", |sample| {
        sample["cpu"]["costop_ns"]["per_s"].as_f64().filter(|rate| *rate > 0.5)
    });
    println!("co-stop of two busy vCPUs on one CPU: {rate:.3}");
    assert!(rate < 1.1, "{rate} s of co-stop per second");

    check_ledger(&mut run);

    lab.virsh(&["setvcpus", NAME, "3", "--live"]).unwrap();
    let plugged = run.sample("the vCPU that was plugged in", |sample| {
        let third = sample["vcpus"].as_array()?.iter().find(|vcpu| vcpu["vcpu"] == 2)?;
        third["run_ns"]["ebpf"].as_u64()?;
        Some(third["tid"].clone())
    });
    assert!(plugged.is_u64(), "{plugged}");
    let tids = guest.vcpu_tids().unwrap();
    assert!(tids.contains(&u32::try_from(plugged.as_u64().unwrap()).unwrap()), "{plugged} of {tids:?}");
}

/// A counter of the first vCPU.
fn vcpu(sample: &Value, metric: &str) -> Option<u64> {
    sample["vcpus"][0][metric]["ebpf"].as_u64()
}

/// Where the ledger of the first vCPU stands, in a sample.
struct Stand {
    /// When the kernel's figures were read, begin and end.
    window: [u64; 2],
    /// Run, interrupted, waiting and sleeping time.
    sum: u64,
    wait: u64,
}

impl Stand {
    fn of(sample: &Value) -> Option<Self> {
        let window = &sample["windows"]["ebpf"];
        let parts = ["run_ns", "irq_ns", "wait_ns", "sleep_ns"].map(|part| vcpu(sample, part));
        let [run, irq, wait, sleep] = parts;
        Some(Self {
            window: [window[0].as_u64()?, window[1].as_u64()?],
            sum: run? + irq? + wait? + sleep?,
            wait: wait?,
        })
    }
}

/// From sample to sample the ledger grows by the time that has passed, and what is charged is what was waited for, in the
/// stream as it is written. Sums are compared where the vCPU runs, so that no wait is in progress.
fn check_ledger(run: &mut Run) {
    /// The scheduler's clock and `CLOCK_MONOTONIC` are compared to this, once a tick.
    const CLOCK_ERROR_NS: u64 = 100_000;
    let (mut last, mut begin, mut lists, mut intervals, mut charged) = (None::<Stand>, None, 0, 0, 0);
    let (waited, charged) = run.sample("three seconds of the ledger", |sample| {
        let now = Stand::of(sample)?;
        if let Some(last) = &last {
            let grown = now.sum - last.sum;
            let least = now.window[0].saturating_sub(last.window[1] + CLOCK_ERROR_NS);
            let most = now.window[1] - last.window[0] + CLOCK_ERROR_NS;
            assert!((least..=most).contains(&grown), "{grown} ns of {least} to {most}: {sample}");
            intervals += 1;
        }
        let wait = now.wait;
        last = Some(now);
        let list = sample["vcpus"][0]["preempted_by"].as_array()?;
        charged += list.iter().map(|culprit| culprit["ns"].as_u64().unwrap()).sum::<u64>();
        if sample["vcpus"][0]["state"] != "running" {
            return None;
        }
        let Some(begin) = begin else {
            (begin, charged) = (Some(wait), 0);
            return None;
        };
        lists += 1;
        (lists >= 3).then_some((wait - begin, charged))
    });
    println!("{intervals} intervals of the ledger; the vCPU waited {waited} ns and {charged} ns are charged");
    assert!(waited > 100_000_000, "it hardly waited: nothing was tested");
    assert!(charged.abs_diff(waited) <= waited / 100, "waited {waited} ns, charged {charged} ns");
}
