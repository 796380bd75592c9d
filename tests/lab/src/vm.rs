//! A host under test: a virtual machine whose kernel is not this machine's, but whose files are.
//!
//! QEMU emulates a CPU with nested virtualization (TCG, SVM), so that KVM works inside as on a real host: VM exits, module
//! `kvm`, vhost-net, cgroup v2 with the io controller, kernel modules. This machine's root file system is shared
//! read-only by virtiofs: every program and every build is there at the same path. `tests/guest/src/bin/host.rs` is its
//! PID 1, `vm.sh` sets it up, then the caller's commands run.
//!
//! Everything that runs here ends with this process: the kernel kills QEMU and the file servers when their parent dies.

use std::fs::{self, File};
use std::io::{Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use rustix::process::Signal;

use crate::{cpu_ns, find_program, initramfs, interrupt};

const SET_UP: &str = include_str!("vm.sh");
/// What the initramfs needs to reach the root file system; the rest is loaded from there.
const MODULES: [&str; 3] = ["virtio_pci", "virtiofs", "overlay"];
/// Tags of the shares, which `host.rs` mounts.
const ROOT: &str = "root";
const OUT: &str = "out";
/// Boots that were looked at took 5 to 12 s.
const BOOT: Duration = Duration::from_secs(90);
/// How long the end of a machine may take after its last command.
const POWER_OFF: Duration = Duration::from_secs(30);
/// A kernel that has nothing to do is woken by its timers every few seconds. One that was not for so long never will be.
const STANDS: Duration = Duration::from_secs(15);
/// Between two looks at what the VM wrote.
const LOOK: Duration = Duration::from_millis(50);
/// Where file servers are that are in no `PATH`: QEMU's own up to 7.x, the one that follows it.
const FILE_SERVERS: [&str; 3] = ["/usr/libexec/virtiofsd", "/usr/lib/qemu/virtiofsd", "/usr/lib/virtiofsd"];
/// Size of the disk for tests, bytes; sparse.
const SCRATCH_BYTES: u64 = 4 << 30;

/// A machine to start.
#[derive(Clone, Debug)]
pub struct Vm {
    /// An unpacked kernel package: `boot/vmlinuz-*` and `lib/modules/VERSION`.
    pub kernel_dir: PathBuf,
    /// The static binary `host` of package `guest`.
    pub init: PathBuf,
    /// Becomes `/out` in the VM, writable; `console.log`, `output` and `status` are left in it.
    pub out: PathBuf,
    /// Commands for bash, run as root after the set-up; their exit status is the VM's.
    pub commands: String,
    /// From the first command to the last.
    pub limit: Duration,
    /// Its CPUs, and who emulates them.
    pub cpus: Cpus,
    /// Memory, MiB.
    pub memory_mib: u32,
}

/// The CPUs of a machine, and the threads of QEMU that execute their instructions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cpus {
    /// A single one: what a kernel does to its own code is done before anybody executes it.
    One,
    /// Two that one thread executes in turn. Guests of the machine are very slow.
    TwoInTurn,
    /// Two at once. A kernel that patches its code while the other CPU runs it may die: what QEMU translated before
    /// stays.
    TwoAtOnce,
}

/// How a machine ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// The commands ended with this exit status.
    Exited(i32),
    /// The time was up.
    TimedOut,
    /// It ended by itself before its commands did: `console.log` may say why.
    Died,
}

/// What became of a machine, and how long it took.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Outcome {
    /// How it ended.
    pub end: End,
    /// From the start of QEMU to the set-up.
    pub boot: Duration,
    /// Set-up and commands.
    pub commands: Duration,
}

impl Vm {
    /// Boots (twice at most), runs the commands and passes on what they print, line by line.
    ///
    /// # Errors
    /// If the machine cannot be started or does not boot.
    pub fn run(&self, mut line: impl FnMut(&str)) -> Result<Outcome> {
        match self.try_run(&mut line)? {
            Some(outcome) => Ok(outcome),
            None => {
                line("the machine did not boot; trying once more");
                let console = || fs::read(self.out.join("console.log")).unwrap_or_default();
                let _ = fs::write(self.out.join("console-of-first-boot.log"), console()); // To look at, no more.
                self.try_run(&mut line)?.with_context(|| {
                    format!("the machine does not boot; its console ends with\n{}", tail(&console()))
                })
            }
        }
    }

    /// `None` if it did not boot.
    fn try_run(&self, line: &mut impl FnMut(&str)) -> Result<Option<Outcome>> {
        let (place, begin) = (Place::new(self)?, Instant::now());
        let mut machine = Machine::start(self, &place)?;
        let up = self.out.join("up");
        while !up.exists() {
            if machine.has_ended()?.is_some() || begin.elapsed() > BOOT {
                return Ok(None);
            }
            interrupt::check()?;
            std::thread::sleep(LOOK);
        }
        let (boot, begin) = (begin.elapsed(), Instant::now());
        let mut output = Lines::of(self.out.join("output"));
        let mut watch = Watch::new(place.socket("monitor"));
        let mut written: Option<Instant> = None;
        let end = loop {
            let ended = machine.has_ended()?.is_some(); // Before the last look at its output.
            output.pass_on(line)?;
            if let Some(status) = self.status() {
                // It powers off by itself; its last words may still be on their way.
                if ended || written.get_or_insert_with(Instant::now).elapsed() > POWER_OFF {
                    break End::Exited(status);
                }
            } else if ended {
                break End::Died;
            } else if begin.elapsed() > self.limit {
                break End::TimedOut;
            }
            if watch.stands(&machine) {
                let outcome = watch.wake();
                // Halted once, it may be so for long.
                if outcome != Watch::HALTED || !std::mem::replace(&mut watch.halted, true) {
                    line(&format!("lab: the machine stood still for {STANDS:?}; {outcome}"));
                }
            }
            interrupt::check()?;
            std::thread::sleep(LOOK);
        };
        output.pass_on(line)?;
        Ok(Some(Outcome { end, boot, commands: begin.elapsed() }))
    }

    fn status(&self) -> Option<i32> {
        let text = fs::read_to_string(self.out.join("status")).ok()?;
        // Without the end of the line it is still being written.
        text.strip_suffix('\n')?.parse().ok()
    }

    fn script(&self) -> Result<String> {
        let modules = self.kernel_dir.join("lib/modules").canonicalize();
        let modules = modules.with_context(|| format!("no modules in {}", self.kernel_dir.display()))?;
        Ok(format!("MODULES='{}' SCRATCH=/dev/vda\n{SET_UP}\n{}\n", modules.display(), self.commands))
    }
}

/// The program that serves files to a VM by virtiofs.
///
/// # Errors
/// If there is none.
pub fn file_server() -> Result<PathBuf> {
    let server = FILE_SERVERS.into_iter().map(PathBuf::from).find(|server| server.is_file());
    server.map_or_else(|| find_program("virtiofsd", "virtiofsd or qemu-system-common"), Ok)
}

/// The last lines of a console.
fn tail(console: &[u8]) -> String {
    let text = String::from_utf8_lossy(console);
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(15)..].join("\n")
}

/// The directory of one boot: sockets, initramfs, disk. Removed when dropped; those of processes that were killed, by
/// the next one.
struct Place {
    directory: PathBuf,
}

impl Place {
    const PREFIX: &str = "kvm-monitor-vm-";

    /// Short, because a socket's path has 107 characters at most.
    fn new(vm: &Vm) -> Result<Self> {
        let above = Path::new("/tmp");
        for entry in fs::read_dir(above).context("cannot read /tmp")?.flatten() {
            let name = entry.file_name();
            let owner = name.to_str().and_then(|name| name.strip_prefix(Self::PREFIX)?.parse().ok());
            if owner.is_some_and(|pid: u32| !Path::new("/proc").join(pid.to_string()).exists()) {
                let _ = fs::remove_dir_all(entry.path()); // The next one tries again.
            }
        }
        let directory = above.join(format!("{}{}", Self::PREFIX, std::process::id()));
        fs::create_dir(&directory).with_context(|| format!("cannot make {}", directory.display()))?;
        let place = Self { directory };
        place.fill(vm)?;
        Ok(place)
    }

    fn fill(&self, vm: &Vm) -> Result<()> {
        fs::create_dir_all(vm.out.join("lab-cache"))
            .with_context(|| format!("cannot make {}", vm.out.display()))?;
        for file in ["up", "status", "output", "console.log"] {
            let _ = fs::remove_file(vm.out.join(file)); // Of an earlier boot; usually there is none.
        }
        fs::write(vm.out.join("host.sh"), vm.script()?).context("cannot write the VM's commands")?;
        let initrd = initramfs::build(&vm.kernel_dir, &vm.init, &MODULES)?;
        fs::write(self.initrd(), initrd).context("cannot write the VM's initramfs")?;
        let disk = File::create(self.disk()).context("cannot make the VM's disk")?;
        disk.set_len(SCRATCH_BYTES).context("cannot make the VM's disk")?;
        let mut format = Command::new(find_program("mkfs.ext4", "e2fsprogs")?);
        let done = format.args(["-q", "-F"]).arg(self.disk()).stdin(Stdio::null()).status();
        ensure!(done.context("cannot run mkfs.ext4")?.success(), "mkfs.ext4 cannot format the VM's disk");
        Ok(())
    }

    fn initrd(&self) -> PathBuf {
        self.directory.join("initrd")
    }

    fn disk(&self) -> PathBuf {
        self.directory.join("disk")
    }

    fn socket(&self, tag: &str) -> PathBuf {
        self.directory.join(tag)
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        // If it fails the next machine tries again.
        let _ = fs::remove_dir_all(&self.directory);
    }
}

/// QEMU and its file servers. Dropping it ends them.
struct Machine {
    /// QEMU is the last.
    processes: Vec<Child>,
}

impl Machine {
    fn start(vm: &Vm, place: &Place) -> Result<Self> {
        let server = file_server()?;
        let mut machine = Self { processes: Vec::new() };
        let shares = [(ROOT, Path::new("/")), (OUT, &vm.out)];
        for share in shares {
            // It talks about every reset of a queue.
            let log = File::create(place.directory.join(format!("{}.log", share.0)))?;
            machine.spawn(share_files(&server, place, share)?.stderr(log))?;
        }
        let deadline = Instant::now() + Duration::from_secs(10);
        while ![ROOT, OUT].iter().all(|tag| place.socket(tag).exists()) {
            ensure!(Instant::now() < deadline, "{} does not open its socket", server.display());
            std::thread::sleep(LOOK);
        }
        machine.spawn(&mut qemu(vm, place)?)?;
        Ok(machine)
    }

    fn spawn(&mut self, command: &mut Command) -> Result<()> {
        // SAFETY: one system call, which is safe between fork and exec.
        unsafe {
            command.pre_exec(|| Ok(rustix::process::set_parent_process_death_signal(Some(Signal::KILL))?))
        };
        command.stdin(Stdio::null());
        let child = command.spawn().with_context(|| format!("cannot start {command:?}"))?;
        self.processes.push(child);
        Ok(())
    }

    /// CPU time of QEMU's threads, nanoseconds.
    fn cpu_ns(&self) -> u64 {
        self.processes.last().map_or(0, |qemu| cpu_ns(qemu.id()))
    }

    fn has_ended(&mut self) -> Result<Option<ExitStatus>> {
        let Some(qemu) = self.processes.last_mut() else { bail!("QEMU was not started") };
        qemu.try_wait().context("cannot wait for QEMU")
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        for process in self.processes.iter_mut().rev() {
            let _ = process.kill(); // Fails only if it has ended.
            let _ = process.wait();
        }
    }
}

/// Sees a machine whose CPU sleeps on though an interrupt is pending, for which QEMU 7.2 failed to wake it: it was seen with the
/// timer's bit set in the interrupt request register, interrupts enabled, and the thread of the CPU in a futex.
struct Watch {
    monitor: PathBuf,
    cpu_ns: u64,
    looked: Instant,
    since: Instant,
    /// Whether it was said that somebody halted it.
    halted: bool,
}

impl Watch {
    const HALTED: &str = "somebody halted it";
    const LOOK: Duration = Duration::from_secs(1);
    /// The prompt of QEMU's monitor.
    const PROMPT: &[u8] = b"(qemu) ";

    fn new(monitor: PathBuf) -> Self {
        let now = Instant::now();
        Self { monitor, cpu_ns: 0, looked: now, since: now, halted: false }
    }

    /// Whether QEMU has used no CPU time for [`STANDS`]; then it is looked at anew from now.
    fn stands(&mut self, machine: &Machine) -> bool {
        if self.looked.elapsed() < Self::LOOK {
            return false;
        }
        self.looked = Instant::now();
        let cpu_ns = machine.cpu_ns();
        let stands = cpu_ns == self.cpu_ns && self.since.elapsed() >= STANDS;
        if stands || cpu_ns != self.cpu_ns {
            (self.cpu_ns, self.since) = (cpu_ns, Instant::now());
        }
        stands
    }

    /// Wakes its CPU, unless somebody halted it. Says what came of it.
    fn wake(&self) -> String {
        let wake = || -> std::io::Result<&'static str> {
            let mut monitor = UnixStream::connect(&self.monitor)?;
            monitor.set_read_timeout(Some(Duration::from_secs(3)))?;
            Self::answer(&mut monitor)?;
            let mut ask = |command: &str| {
                writeln!(monitor, "{command}")?;
                Self::answer(&mut monitor)
            };
            if !ask("info status")?.contains("running") {
                return Ok(Self::HALTED);
            }
            ask("stop")?;
            ask("cont")?;
            Ok("its CPU was woken")
        };
        wake().map_or_else(|error| format!("its monitor does not answer: {error}"), str::to_owned)
    }

    /// All that comes until the prompt.
    fn answer(monitor: &mut UnixStream) -> std::io::Result<String> {
        let (mut answer, mut part) = (Vec::new(), [0; 4096]);
        while !answer.ends_with(Self::PROMPT) {
            match monitor.read(&mut part)? {
                0 => return Err(std::io::ErrorKind::UnexpectedEof.into()),
                n => answer.extend_from_slice(&part[..n]),
            }
        }
        Ok(String::from_utf8_lossy(&answer).into_owned())
    }
}

/// Serves the whole machine, read-only for the server too, whatever the VM asks for; or the writable share.
fn share_files(server: &Path, place: &Place, (tag, directory): (&str, &Path)) -> Result<Command> {
    const READ_ONLY: &str = r#"
mount --make-rprivate /
mount -t tmpfs tmpfs /run # For its pid file, and so that the VM does not see this machine's.
mount --bind "$1" "$1"
mount -o remount,bind,ro /
shift
exec "$@""#;
    let (mut command, cache) = if tag == ROOT {
        let mut command = Command::new("unshare");
        command.args(["--mount", "sh", "-euc", READ_ONLY, "sh"]).arg(&place.directory).arg(server);
        (command, "always")
    } else {
        (Command::new(server), "auto")
    };
    command.arg(format!("--socket-path={}", place.socket(tag).display()));
    // QEMU's own and the one that followed it share no other option.
    let version = Command::new(server).arg("--version").output();
    let version = version.with_context(|| format!("cannot run {}", server.display()))?;
    if String::from_utf8_lossy(&version.stdout).contains("FUSE kernel interface") {
        command.args(["-f", "-o", "log_level=err", "-o", "sandbox=chroot", "-o", &format!("cache={cache}")]);
        command.arg("-o").arg(format!("source={}", directory.display()));
    } else {
        command.args(["--log-level=error", "--sandbox=chroot", &format!("--cache={cache}")]);
        command.arg(format!("--shared-dir={}", directory.display()));
    }
    Ok(command)
}

fn qemu(vm: &Vm, place: &Place) -> Result<Command> {
    let mut command = Command::new(find_program("qemu-system-x86_64", "qemu-system-x86")?);
    let memory = format!("{}M", vm.memory_mib);
    let (number, threads) = match vm.cpus {
        Cpus::One => ("1", "single"),
        Cpus::TwoInTurn => ("2", "single"),
        Cpus::TwoAtOnce => ("2", "multi"),
    };
    command.args(["-machine", "q35,memory-backend=memory"]);
    command.args(["-accel", &format!("tcg,thread={threads},tb-size=512")]);
    command.args(["-cpu", "EPYC,+svm,+npt", "-smp", number, "-m", &memory]);
    command.arg("-object").arg(format!("memory-backend-memfd,id=memory,size={memory},share=on"));
    command.args(["-nodefaults", "-display", "none", "-no-reboot"]);
    command.arg("-serial").arg(format!("file:{}", vm.out.join("console.log").display()));
    // For whoever wants to see why a machine stands, or to halt it and its clock for a while.
    command.arg("-monitor").arg(format!("unix:{},server=on,wait=off", place.socket("monitor").display()));
    for tag in [ROOT, OUT] {
        command.arg("-chardev").arg(format!("socket,id={tag},path={}", place.socket(tag).display()));
        command.arg("-device").arg(format!("vhost-user-fs-pci,chardev={tag},tag={tag},queue-size=1024"));
    }
    let disk = format!("file={},if=virtio,format=raw,cache=unsafe,discard=unmap", place.disk().display());
    command.arg("-drive").arg(disk);
    command.arg("-kernel").arg(initramfs::kernel_image(&vm.kernel_dir)?).arg("-initrd").arg(place.initrd());
    command.args(["-append", "console=ttyS0 quiet panic=-1 mitigations=off"]);
    // It warns of every feature of the CPU model that TCG does not have.
    let log = File::create(vm.out.join("qemu.log")).context("cannot write QEMU's log")?;
    command.stdout(log.try_clone()?).stderr(log);
    Ok(command)
}

/// A file that grows, line by line.
struct Lines {
    path: PathBuf,
    file: Option<File>,
    partial: Vec<u8>,
}

impl Lines {
    fn of(path: PathBuf) -> Self {
        Self { path, file: None, partial: Vec::new() }
    }

    fn pass_on(&mut self, line: &mut impl FnMut(&str)) -> Result<()> {
        if self.file.is_none() {
            self.file = File::open(&self.path).ok(); // Not there yet.
        }
        if let Some(file) = &mut self.file {
            file.read_to_end(&mut self.partial).context("cannot read the VM's output")?;
        }
        while let Some(end) = self.partial.iter().position(|byte| *byte == b'\n') {
            let whole: Vec<u8> = self.partial.drain(..=end).collect();
            line(String::from_utf8_lossy(&whole).trim_end());
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::io::{BufRead as _, BufReader};
    use std::os::unix::net::UnixListener;

    use super::*;

    /// A monitor that says of the machine that it is in this state: what it was asked, and what came of it.
    fn woken(state: &str) -> (Vec<String>, String) {
        let path = std::env::temp_dir().join(format!("kvm-monitor-watch-{}-{state}", std::process::id()));
        let listener = UnixListener::bind(&path).unwrap();
        let state = state.to_owned();
        let monitor = std::thread::spawn(move || {
            let mut stream = listener.accept().unwrap().0;
            let lines = BufReader::new(stream.try_clone().unwrap()).lines();
            write!(stream, "QEMU 7.2 monitor\r\n(qemu) ").unwrap();
            let asked = lines.map_while(Result::ok).inspect(|line| {
                let status =
                    if line == "info status" { format!("VM status: {state}\r\n") } else { String::new() };
                write!(stream, "{line}\r\n{status}(qemu) ").unwrap();
            });
            asked.collect()
        });
        let said = Watch::new(path.clone()).wake();
        fs::remove_file(path).unwrap();
        (monitor.join().unwrap(), said)
    }

    #[test]
    fn a_machine_that_stands_is_woken_unless_somebody_halted_it() {
        let running = woken("running");
        assert_eq!(
            running,
            (["info status", "stop", "cont"].map(str::to_owned).to_vec(), "its CPU was woken".to_owned())
        );
        let halted = woken("paused");
        assert_eq!(halted, (vec!["info status".to_owned()], Watch::HALTED.to_owned()));
    }

    #[test]
    fn a_process_that_uses_no_cpu_time_stands() {
        let mut machine = Machine { processes: Vec::new() };
        machine.spawn(Command::new("sleep").arg("60")).unwrap();
        let mut watch = Watch::new(PathBuf::new());
        let long_ago = || Instant::now().checked_sub(STANDS).unwrap();
        watch.looked = long_ago();
        watch.stands(&machine);
        assert!(watch.cpu_ns > 0, "a process that was started has used some");
        std::thread::sleep(Duration::from_millis(200)); // Until it sleeps.
        (watch.cpu_ns, watch.looked) = (machine.cpu_ns(), long_ago());
        assert!(!watch.stands(&machine), "not for long");
        (watch.looked, watch.since) = (long_ago(), long_ago());
        assert!(watch.stands(&machine));
        (watch.looked, watch.since, watch.cpu_ns) = (long_ago(), long_ago(), 1);
        assert!(!watch.stands(&machine), "it has used some since");
    }
}
