//! `kvm-monitor run` inside the lab.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, ExitStatus};
use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};
use lab::{Lab, interrupt};

use super::{LOOK, PATIENCE, pause};

/// How often the monitor samples; slow reads of libvirt come every second. Idle phases in the scripts are longer.
const CADENCE: [&str; 6] =
    ["--interval", "250ms", "--libvirt-interval", "500ms", "--libvirt-slow-interval", "1s"];

/// The program. Killed if it still runs when dropped.
pub(super) struct Monitor {
    child: Child,
    log: PathBuf,
    stream: PathBuf,
}

impl Monitor {
    pub(super) fn start(lab: &Lab, program: &Path, stream: &Path) -> Result<Self> {
        let log = stream.with_file_name("monitor.log");
        let stderr = File::create(&log).with_context(|| format!("cannot write {}", log.display()))?;
        let mut command = lab.command(program);
        command.arg("run").args(CADENCE);
        let child = command.arg("--output").arg(stream).stderr(stderr).spawn();
        let child = child.with_context(|| format!("cannot start {}", program.display()))?;
        Ok(Self { child, log, stream: stream.to_owned() })
    }

    /// Waits until the stream holds a sample of a domain: from here on nothing of the guest is missed.
    pub(super) fn wait_sample(&mut self, domain: &str) -> Result<()> {
        let deadline = Instant::now() + PATIENCE;
        let name = format!("\"name\":\"{domain}\"}},\"epoch\"");
        while !fs::read_to_string(&self.stream).is_ok_and(|text| text.contains(&name)) {
            if let Some(status) = self.child.try_wait().context("cannot ask for the monitor's state")? {
                bail!("kvm-monitor ended early ({status}): {}", self.last_words());
            }
            ensure!(Instant::now() < deadline, "no sample of {domain}: {}", self.last_words());
            pause(LOOK)?;
        }
        Ok(())
    }

    /// Ends it as Ctrl-C would, and waits for its summary.
    pub(super) fn stop(&mut self) -> Result<()> {
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
            pause(LOOK)?;
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
