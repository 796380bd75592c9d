//! A guest that was booted: its process, its threads, its console.

use std::fs;
use std::io::Write;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use rustix::process::Pid;

use crate::console::{Console, GroundTruth, StepTruth};
use crate::host::{self, ThreadTime};
use crate::interrupt;
use crate::space::Space;

/// Between two looks at a console.
const LOOK: Duration = Duration::from_millis(5);

/// A running (or paused) guest. Dropping it does nothing: guests end with their lab, or by [`Guest::destroy`].
#[derive(Debug)]
pub struct Guest {
    /// Name of the domain.
    pub name: String,
    /// UUID of the domain, as libvirt prints it.
    pub uuid: String,
    /// Process id of its QEMU, as this process sees it.
    pub pid: u32,
    /// What it was asked to do.
    pub script: String,
    /// The file that the guest's console is written to.
    pub console_path: PathBuf,
    pub(crate) space: Arc<Space>,
    pub(crate) input: PathBuf,
    pub(crate) console: Mutex<Console>,
}

/// A step of a script to wait for.
#[derive(Clone, Copy, Debug)]
pub enum Which<'a> {
    /// By its number, from 0.
    Number(u64),
    /// The first one of a kind, such as `read`.
    Kind(&'a str),
}

impl Guest {
    /// Thread ids of the vCPUs, in the order of their numbers.
    pub fn vcpu_tids(&self) -> Result<Vec<u32>> {
        let mut vcpus: Vec<(u32, u32)> = threads(self.pid)?
            .into_iter()
            .filter_map(|(tid, comm)| Some((vcpu_number(&comm)?, tid)))
            .collect();
        vcpus.sort_unstable();
        Ok(vcpus.into_iter().map(|(_, tid)| tid).collect())
    }

    /// The scheduler's times of all vCPU threads, in the order of their numbers.
    pub fn vcpu_times(&self) -> Result<Vec<ThreadTime>> {
        self.vcpu_tids()?.into_iter().map(|tid| host::thread_time(self.pid, tid)).collect()
    }

    /// Lets a guest run that was booted paused.
    pub fn resume(&self) -> Result<()> {
        self.space.virsh(&["resume", &self.name]).map(drop)
    }

    /// Lets a guest go on that stands at a `wait` step, and waits until it does.
    pub fn go_on(&self, timeout: Duration) -> Result<()> {
        let socket = self.space.path(&self.input);
        let mut stream = UnixStream::connect(&socket)
            .with_context(|| format!("cannot reach the second serial port of {}", self.name))?;
        let mut waits = |truth: &GroundTruth| {
            let waits = truth.steps.last().is_some_and(|step| step.kind() == "wait" && step.done.is_none());
            // Again and again: the port forgets what came before the guest opened it.
            let sent = if waits { stream.write_all(b"\n") } else { Ok(()) };
            if waits && sent.is_ok() { None } else { Some(sent) }
        };
        let sent = self.wait("its going on", timeout, &mut waits)?;
        sent.context("the second serial port does not take input")
    }

    /// Waits until a step has begun.
    pub fn wait_begin(&self, which: Which<'_>, timeout: Duration) -> Result<StepTruth> {
        self.wait(&format!("the begin of step {which:?}"), timeout, |truth| which.find(truth).cloned())
    }

    /// Waits until a step is done.
    pub fn wait_step(&self, which: Which<'_>, timeout: Duration) -> Result<StepTruth> {
        let done = |truth: &GroundTruth| which.find(truth).filter(|step| step.done.is_some()).cloned();
        self.wait(&format!("step {which:?}"), timeout, done)
    }

    /// Waits until all steps are done. Fails if one of them failed.
    pub fn wait_end(&self, timeout: Duration) -> Result<GroundTruth> {
        let truth =
            self.wait("the end of the script", timeout, |truth| truth.end.is_some().then(|| truth.clone()))?;
        match truth.error() {
            Some(error) => bail!("guest {}: {error}", self.name),
            None => Ok(truth),
        }
    }

    /// What the guest has reported so far.
    pub fn truth(&self) -> Result<GroundTruth> {
        let mut console = self.console();
        console.poll(host::monotonic_ns())?;
        Ok(console.truth.clone())
    }

    /// Ends the guest at once.
    pub fn destroy(&self) -> Result<()> {
        self.space.virsh(&["destroy", &self.name]).map(drop)
    }

    /// Whether the guest's QEMU still runs.
    #[must_use]
    pub fn is_alive(&self) -> bool {
        host::process_exists(self.pid)
    }

    fn console(&self) -> MutexGuard<'_, Console> {
        self.console.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    fn wait<T>(
        &self,
        what: &str,
        timeout: Duration,
        mut found: impl FnMut(&GroundTruth) -> Option<T>,
    ) -> Result<T> {
        let deadline = Instant::now() + timeout;
        loop {
            let alive = self.is_alive(); // Before the last look, so that nothing it wrote is missed.
            {
                let mut console = self.console();
                console.poll(host::monotonic_ns())?;
                if let Some(result) = found(&console.truth) {
                    return Ok(result);
                }
                if let Some(error) = &console.error {
                    bail!("guest {}: {error}", self.name);
                }
                if !alive || Instant::now() > deadline {
                    let why = if alive { format!("not within {timeout:?}") } else { "QEMU has ended".into() };
                    let (words, steps) = (console.last_words(), console.truth.steps.last());
                    let step = steps.map_or("none".into(), |step| step.word.clone());
                    let stands = if alive { self.stands() } else { String::new() };
                    bail!(
                        "waited for {what} of guest {}: {why}\n{words}\nits last step: {step}\n{stands}",
                        self.name
                    );
                }
            }
            interrupt::check()?;
            std::thread::sleep(LOOK);
        }
    }
}

/// What is asked of a guest that seems to stand: libvirt's state, and QEMU's registers, twice.
const ASK: &str = r#"
virsh="timeout 20 virsh --quiet --connect qemu:///system"
$virsh domstate "$1" --reason
for look in first second; do
  sleep 1
  echo "$look look:"
  $virsh qemu-monitor-command "$1" --hmp 'info registers -a' | grep -E '^CPU#|[ER]IP=|^CR0' | cut -c1-100
done"#;

impl Guest {
    /// Whether its vCPUs work, and where they are: for a person who must tell a guest that stands from one that is slow.
    fn stands(&self) -> String {
        let times =
            || self.vcpu_times().map(|times| times.iter().map(|time| time.run_ns).collect::<Vec<_>>());
        let before = times();
        let mut ask = self.space.command(Path::new("sh"));
        let asked = ask.args(["-c", ASK, "sh", &self.name]).output();
        let told = match &asked {
            Ok(output) => [&output.stdout, &output.stderr].map(|text| String::from_utf8_lossy(text)).concat(),
            Err(error) => error.to_string(),
        };
        format!("its vCPUs have run for {before:?} ns, and after this for {:?} ns:\n{told}", times())
    }
}

impl Which<'_> {
    fn find<'t>(&self, truth: &'t GroundTruth) -> Option<&'t StepTruth> {
        truth.steps.iter().find(|step| match self {
            Self::Number(number) => step.number == *number,
            Self::Kind(kind) => step.kind() == *kind,
        })
    }
}

/// Reads the pid file that libvirt wrote for a domain.
pub(crate) fn read_pid(file: &Path) -> Result<u32> {
    let text = fs::read_to_string(file).with_context(|| format!("cannot read {}", file.display()))?;
    let pid = text.trim().parse().ok().and_then(Pid::from_raw);
    let pid = pid.with_context(|| format!("{}: no pid in {text:?}", file.display()))?;
    Ok(pid.as_raw_nonzero().get().unsigned_abs())
}

/// Thread id and comm of every thread of a process.
fn threads(pid: u32) -> Result<Vec<(u32, String)>> {
    let directory = format!("/proc/{pid}/task");
    let entries = fs::read_dir(&directory).with_context(|| format!("cannot read {directory}"))?;
    let thread = |name: &str| {
        let comm = fs::read_to_string(format!("{directory}/{name}/comm")).ok()?;
        Some((name.parse().ok()?, comm.trim_end().to_owned()))
    };
    Ok(entries.filter_map(|entry| thread(entry.ok()?.file_name().to_str()?)).collect())
}

/// `CPU 3/TCG` and `CPU 3/KVM` are vCPU 3.
fn vcpu_number(comm: &str) -> Option<u32> {
    let (number, kind) = comm.strip_prefix("CPU ")?.split_once('/')?;
    ["TCG", "KVM"].contains(&kind).then(|| number.parse().ok())?
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_vcpu_threads_have_a_number() {
        let comms = ["CPU 0/TCG", "CPU 12/KVM", "CPU 1/XXX", "worker", "CPU x/TCG"];
        assert_eq!(comms.map(vcpu_number), [Some(0), Some(12), None, None, None]);
    }
}
