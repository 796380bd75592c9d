//! The process that owns a lab: it holds the namespaces and ends everything in them once this process is gone.
//!
//! `supervisor.sh` runs in its own session, so that Ctrl-C does not reach it, and is the child subreaper, so that
//! daemonized QEMUs become its children. It learns of our end by the end of its standard input, whose other end
//! nobody else holds (the pipe is close-on-exec): this works for a return, a panic and SIGKILL alike.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use rustix::process::Pid;
use rustix::thread::UnshareFlags;

const SCRIPT: &str = include_str!("supervisor.sh");
/// How long ending all processes of a lab may take before the supervisor itself is killed.
const END: Duration = Duration::from_secs(20);

/// The running supervisor. Dropping it ends the lab and waits until nothing is left.
#[derive(Debug)]
pub(crate) struct Supervisor {
    child: Child,
    orders: Option<ChildStdin>,
    answers: BufReader<ChildStdout>,
}

impl Supervisor {
    /// Starts the supervisor in new mount, network and host name namespaces.
    pub(crate) fn start(scratch: &Path, cache: &Path) -> Result<Self> {
        let mut command = Command::new("bash");
        command.arg("-c").arg(SCRIPT).arg("supervisor").arg(scratch).arg(cache).current_dir("/");
        command.stdin(Stdio::piped()).stdout(Stdio::piped());
        // SAFETY: the function makes system calls only, which are safe between fork and exec.
        unsafe { command.pre_exec(become_supervisor) };
        let mut child = command
            .spawn()
            .context("cannot start bash in new namespaces (root with CAP_SYS_ADMIN and bash are needed)")?;
        let (orders, answers) = (child.stdin.take(), child.stdout.take().context("no stdout")?);
        let mut supervisor = Self { child, orders, answers: BufReader::new(answers) };
        let ready = supervisor.answer()?;
        ensure!(ready == "ready", "the lab's supervisor answered {ready:?}");
        Ok(supervisor)
    }

    /// The supervisor's process, which names the namespaces.
    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Starts a libvirtd.
    pub(crate) fn start_libvirtd(&mut self, program: &Path) -> Result<Pid> {
        let orders = self.orders.as_mut().context("the lab has ended")?;
        writeln!(orders, "libvirtd {}", program.display()).context("the lab's supervisor is gone")?;
        let answer = self.answer()?;
        let pid = answer.strip_prefix("pid ").and_then(|pid| pid.parse().ok()).and_then(Pid::from_raw);
        pid.with_context(|| format!("the lab's supervisor answered {answer:?}"))
    }

    fn answer(&mut self) -> Result<String> {
        let mut line = String::new();
        self.answers.read_line(&mut line).context("the lab's supervisor does not answer")?;
        match line.trim_end() {
            "" => bail!("the lab's supervisor ended early; its messages are above"),
            line => match line.strip_prefix("error ") {
                Some(error) => bail!("cannot set up the lab: {error}"),
                None => Ok(line.to_owned()),
            },
        }
    }
}

impl Drop for Supervisor {
    fn drop(&mut self) {
        drop(self.orders.take());
        let deadline = Instant::now() + END;
        while matches!(self.child.try_wait(), Ok(None)) && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(5));
        }
        // Only if it hangs; what is left of the lab then has no owner, but there is nobody to tell in a drop.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn become_supervisor() -> std::io::Result<()> {
    rustix::process::setsid()?;
    rustix::process::set_child_subreaper(Some(rustix::process::getpid()))?;
    // SAFETY: no flag concerns file descriptors or memory; the process has one thread.
    unsafe {
        rustix::thread::unshare_unsafe(UnshareFlags::NEWNS | UnshareFlags::NEWNET | UnshareFlags::NEWUTS)
    }?;
    Ok(())
}
