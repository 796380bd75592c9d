//! `cargo xtask demo`: profiles a guest whose workload is known exactly, and compares what each source says.
//!
//! A [`Lab`] gives a private libvirtd; one small guest runs [`script`] in it while `kvm-monitor run` writes
//! `target/demo/stream.ndjson`; [`compare`] makes a table of the guest's own account and the stream.
#![expect(clippy::print_stdout, clippy::print_stderr, reason = "results go to stdout, progress to stderr")]

mod compare;

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, ExitStatus};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use lab::interrupt::{self, Interrupted};
use lab::{
    Accelerator, DiskSpec, GroundTruth, Guest, GuestSpec, Lab, LabDirs, NicSpec, StartState, UdpSink, Which,
};

use compare::{Experiment, Stream};

const DOMAIN: &str = "demo";
const TAP: &str = "tap-demo";
const DISK: &str = "vda";
const MEMORY_MIB: u32 = 192;
/// Where the guest's datagrams go; somebody listens, else the host would answer with ICMP errors.
const PORT: u16 = 5000;
/// How often the monitor samples; slow reads of libvirt come every second. Idle phases in the script are longer.
const CADENCE: [&str; 6] =
    ["--interval", "500ms", "--libvirt-interval", "500ms", "--libvirt-slow-interval", "1s"];
/// How long anything may take: boot, a step, an answer of the monitor.
const PATIENCE: Duration = Duration::from_secs(30);
const WHOLE_SCRIPT: Duration = Duration::from_secs(75);
/// What the monitor sees after the guest's last word.
const AFTER_END: Duration = Duration::from_secs(1);

/// Runs the demo and prints the table.
pub(crate) fn run(args: &[String]) -> Result<()> {
    ensure!(args.is_empty(), "demo takes no arguments (got {})", args.join(" "));
    let built = crate::build::prepare_live()?;
    interrupt::catch();
    let begin = Instant::now();
    let result = record(&built).and_then(|recording| report(&recording));
    // Ctrl-C reaches the programs in the lab too, so that their failure may be what is noticed first.
    if interrupt::check().is_err() {
        return Err(Interrupted).context("the demo was stopped; its guest and libvirtd are gone");
    }
    result?;
    eprintln!("demo: done in {:.0} s", begin.elapsed().as_secs_f64());
    Ok(())
}

/// What one run of the demo leaves behind.
struct Recording {
    directory: PathBuf,
    stream: PathBuf,
    truth: GroundTruth,
}

/// The workload. Idle phases frame each burn, so that readings before and after it hold nothing else.
fn script(nic: &NicSpec) -> String {
    let net = nic.net_step("eth0");
    let host = nic.host_address;
    format!(
        "{net} sleep=2.2s cpu=cpu0:2s sleep=2.2s cpu=cpu1:2s sleep=2.2s write={DISK}:1000x4096 \
         read={DISK}:200x65536 flush={DISK}:3 udp={host}:{PORT}x1000x1000B mem=48M sleep=3.5s end=idle"
    )
}

fn record(built: &crate::build::Built) -> Result<Recording> {
    let directory = built.target_dir.join("demo");
    fs::create_dir_all(&directory).with_context(|| format!("cannot make {}", directory.display()))?;
    let directory = directory.canonicalize().context("cannot resolve the demo's directory")?;
    let stream = directory.join("stream.ndjson");
    let _ = fs::remove_file(&stream); // Of an earlier run; usually there is none.

    eprintln!("demo: starting a private libvirtd and a guest");
    let lab = Lab::start(&LabDirs {
        target_dir: built.target_dir.clone(),
        kernel_dir: built.kernel_dir.clone(),
        guest_init: built.guest_init.clone(),
        accelerator: Accelerator::Emulated,
    })?;
    let nic = NicSpec::new(TAP, 0);
    let _sink = UdpSink::start(&lab, PORT)?;
    let guest = lab.boot(&GuestSpec {
        vcpus: 2,
        memory_mib: MEMORY_MIB,
        disks: vec![DiskSpec::raw(DISK, 64 << 20)],
        nics: vec![nic.clone()],
        start: StartState::Paused,
        ..GuestSpec::new(DOMAIN, &script(&nic))
    })?;

    let mut monitor = Monitor::start(&lab, &built.monitor, &stream)?;
    monitor.wait_sample(&stream)?;
    guest.resume()?;
    eprintln!("demo: the monitor runs, the guest boots");
    let truth = follow(&guest)?;
    pause(AFTER_END)?;
    monitor.stop()?;
    drop(lab);
    Ok(Recording { directory, stream, truth })
}

/// Waits for the end of the script, and says which step runs.
fn follow(guest: &Guest) -> Result<GroundTruth> {
    let words = guest_steps();
    for number in 0..words {
        let step = guest.wait_begin(Which::Number(number), PATIENCE)?;
        eprintln!("demo: guest: {}", step.word);
    }
    guest.wait_end(WHOLE_SCRIPT)
}

/// Number of steps in the script: all words but `end=`.
fn guest_steps() -> u64 {
    let words = script(&NicSpec::new(TAP, 0)).split_whitespace().count();
    u64::try_from(words).unwrap_or(0).saturating_sub(1)
}

fn report(recording: &Recording) -> Result<()> {
    let text = fs::read_to_string(&recording.stream)
        .with_context(|| format!("cannot read {}", recording.stream.display()))?;
    let stream = Stream::parse(&text, DOMAIN)?;
    let experiment = Experiment {
        disk: DISK,
        tap: TAP,
        memory_bytes: i64::from(MEMORY_MIB) << 20,
        truth: &recording.truth,
    };
    let rows = compare::rows(&stream, &experiment)?;
    let report = recording.directory.join("report.md");
    fs::write(&report, compare::markdown(&rows))
        .with_context(|| format!("cannot write {}", report.display()))?;
    print!("{}", compare::text(&rows));
    println!("\nstream: {}\nreport: {}", recording.stream.display(), report.display());
    Ok(())
}

/// `kvm-monitor run` inside the lab. Killed if it still runs when dropped.
struct Monitor {
    child: Child,
    log: PathBuf,
}

impl Monitor {
    fn start(lab: &Lab, program: &Path, stream: &Path) -> Result<Self> {
        let log = stream.with_file_name("monitor.log");
        let stderr = File::create(&log).with_context(|| format!("cannot write {}", log.display()))?;
        let mut command = lab.command(program);
        command
            .arg("run")
            .args(["--domain", DOMAIN])
            .args(CADENCE)
            .arg("--output")
            .arg(stream)
            .stderr(stderr);
        let child = command.spawn().with_context(|| format!("cannot start {}", program.display()))?;
        Ok(Self { child, log })
    }

    /// Waits until the stream holds a sample: from here on nothing of the guest is missed.
    fn wait_sample(&mut self, stream: &Path) -> Result<()> {
        let deadline = Instant::now() + PATIENCE;
        while !fs::read_to_string(stream).is_ok_and(|text| text.contains("\"type\":\"sample\"")) {
            if let Some(status) = self.child.try_wait().context("cannot ask for the monitor's state")? {
                bail!("kvm-monitor ended early ({status}): {}", self.last_words());
            }
            ensure!(Instant::now() < deadline, "kvm-monitor writes no sample: {}", self.last_words());
            pause(Duration::from_millis(20))?;
        }
        Ok(())
    }

    /// Ends it as Ctrl-C would, and waits for its summary.
    fn stop(&mut self) -> Result<()> {
        interrupt::send(&self.child).context("cannot signal kvm-monitor")?;
        let status = self.wait()?;
        ensure!(status.success(), "kvm-monitor failed ({status}): {}", self.last_words());
        Ok(())
    }

    fn wait(&mut self) -> Result<ExitStatus> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(status) = self.child.try_wait().context("cannot ask for the monitor's state")? {
                return Ok(status);
            }
            ensure!(Instant::now() < deadline, "kvm-monitor does not end after SIGINT");
            pause(Duration::from_millis(20))?;
        }
    }

    fn last_words(&self) -> String {
        let log = fs::read_to_string(&self.log).unwrap_or_default();
        let last = log.lines().rfind(|line| !line.trim().is_empty()).unwrap_or("it printed nothing");
        format!("{last} (see {})", self.log.display())
    }
}

impl Drop for Monitor {
    fn drop(&mut self) {
        // Both fail only if it is gone already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Sleeps, unless Ctrl-C was pressed.
fn pause(time: Duration) -> Result<(), Interrupted> {
    const SLICE: Duration = Duration::from_millis(20);
    let end = Instant::now() + time;
    while Instant::now() < end {
        interrupt::check()?;
        std::thread::sleep(SLICE.min(end.saturating_duration_since(Instant::now())));
    }
    interrupt::check()
}
