//! `cargo xtask test`: lint, then the tests that need no rights, then those with a real guest.
//!
//! The first kind runs as an unprivileged user even if we are root: it proves that they need no rights. The second
//! kind, test targets of `monitor` named `live_*` and the lab's own, runs as root, one at a time. Where it cannot
//! run, each test is named as not run.

use std::collections::BTreeMap;
use std::fs;
use std::io::{BufRead as _, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result, bail};
use serde_json::Value;

use crate::build::{self, Built};
use crate::report::{Counts, Report, Verdict};
use crate::setup::{self, Scope};
use crate::{paths, process, vm};

/// The user that nothing belongs to.
const NOBODY: &str = "65534";
/// A live test program that takes longer hangs.
const LIVE_LIMIT: &str = "20m";

/// A compiled test program.
pub(crate) struct TestProgram {
    pub(crate) name: String,
    pub(crate) file: PathBuf,
    /// Where cargo would run it.
    pub(crate) package: PathBuf,
    /// A program of its own below `tests`, not the unit tests inside a library or a program.
    integration: bool,
}

impl TestProgram {
    /// Needs root and a real guest. The lab's own tests do as well: what they test is the lab.
    pub(crate) fn is_live(&self) -> bool {
        self.name.starts_with("live_") || self.integration && self.package.ends_with("tests/lab")
    }
}

impl TestProgram {
    /// Why this program is not for this machine.
    fn obstacle(&self) -> Option<String> {
        let kvm = Path::new("/dev/kvm");
        match self.name.as_str() {
            "live_kvm" if !kvm.exists() => Some(format!("this machine has no {}", kvm.display())),
            "live_vm" => Some("it changes its host: `cargo xtask lab` runs it in a VM".to_owned()),
            _ => None,
        }
    }
}

/// The subcommand: whether everything that ran passed.
pub(crate) fn run(args: &[String]) -> Result<bool> {
    let words: Vec<_> = args.iter().map(String::as_str).collect();
    let (unit, live) = match words[..] {
        [] => (true, true),
        ["--unit-only"] => (true, false),
        ["--live-only"] => (false, true),
        [other, ..] => bail!("test takes --unit-only, --live-only or nothing, not `{other}`"),
    };
    let mut report = Report::default();
    if unit && live {
        crate::lint::checks(&mut report)?;
    }
    setup::ensure(Scope::Build)?;
    let (live_programs, unit_programs): (Vec<_>, Vec<_>) =
        compile()?.into_iter().partition(TestProgram::is_live);
    if unit {
        run_unit(&unit_programs, &mut report)?;
    }
    if live {
        run_live(&live_programs, &mut report)?;
    }
    Ok(report.finish())
}

/// Compiles all tests at once: a second call with other features would compile `monitor` twice.
pub(crate) fn compile() -> Result<Vec<TestProgram>> {
    let mut cargo = build::host_cargo("test")?;
    cargo.args(["--workspace", "--features", "monitor/live,lab/live", "--no-run"]);
    cargo.arg("--message-format=json-render-diagnostics");
    let output = cargo.stderr(Stdio::inherit()).stdin(Stdio::null()).output()?;
    if !output.status.success() {
        bail!("{} failed: {}", process::show(&cargo), output.status);
    }
    let mut programs = BTreeMap::new();
    for line in String::from_utf8_lossy(&output.stdout).lines() {
        if let Some(program) = parse_artifact(line) {
            programs.insert(program.file.clone(), program);
        }
    }
    Ok(programs.into_values().collect())
}

/// The test program that a line of cargo's JSON output announces.
fn parse_artifact(line: &str) -> Option<TestProgram> {
    let message: Value = serde_json::from_str(line).ok()?;
    if message["reason"] != "compiler-artifact" || message["profile"]["test"] != true {
        return None;
    }
    Some(TestProgram {
        name: message["target"]["name"].as_str()?.to_owned(),
        file: message["executable"].as_str()?.into(),
        package: Path::new(message["manifest_path"].as_str()?).parent()?.to_path_buf(),
        integration: message["target"]["kind"][0] == "test",
    })
}

fn run_unit(programs: &[TestProgram], report: &mut Report) -> Result<()> {
    let user = User::choose(programs);
    for program in programs {
        eprintln!("\n--- {} ({})", program.name, user.describe());
        let mut command = user.command(&program.file);
        run_program(program, &mut command, report)?;
    }
    Ok(())
}

/// As whom the tests without rights run.
enum User {
    /// Whoever called us.
    Ourselves,
    Nobody,
    /// Nobody, in a mount namespace where the directories above the checkout can be entered.
    NobodyBehind(PathBuf),
    /// We are root and cannot become anybody else who could read the tests.
    Root,
}

impl User {
    fn choose(programs: &[TestProgram]) -> Self {
        let Some(probe) = programs.first() else { return Self::Ourselves };
        if !process::is_root() {
            return Self::Ourselves;
        }
        let mut candidates = vec![Self::Nobody];
        candidates.extend(closed_directory(&probe.file).map(Self::NobodyBehind));
        // Starting the program would prove nothing: setpriv may still use root's rights for that.
        let readable = |user: &Self| {
            let mut test = user.command(Path::new("sh"));
            test.args(["-c", r#"test -x "$1" && test -r "$2""#, "sh"]).arg(&probe.file);
            process::succeeds(test.arg(paths::root().join("Cargo.toml")))
        };
        candidates.into_iter().find(readable).unwrap_or(Self::Root)
    }

    fn describe(&self) -> &'static str {
        match self {
            Self::Ourselves => "as the user who called",
            Self::Nobody | Self::NobodyBehind(_) => "as an unprivileged user",
            Self::Root => "AS ROOT: no unprivileged user can read the checkout",
        }
    }

    fn command(&self, program: &Path) -> Command {
        match self {
            Self::Ourselves | Self::Root => Command::new(program),
            Self::Nobody => {
                let mut command = Command::new("setpriv");
                command.args(["--reuid", NOBODY, "--regid", NOBODY, "--clear-groups"]).arg(program);
                command.env("HOME", "/nonexistent");
                command
            }
            Self::NobodyBehind(closed) => {
                let mut command = Command::new("unshare");
                command.args(["--mount", "sh", "-euc", OPEN_UP, "sh", NOBODY]).arg(closed);
                command.arg(paths::root()).arg(paths::target()).arg(program).env("HOME", "/nonexistent");
                command
            }
        }
    }
}

/// Arguments: user, closed directory, checkout, target directory, command. Replaces the closed directory by an
/// empty one that holds the checkout (and the target directory) only, at their old paths, for this command only.
const OPEN_UP: &str = r#"
user=$1 closed=$2 checkout=$3 target=$4; shift 4
here=$PWD
exec 3< "$checkout" 4< "$target"
mount -t tmpfs -o mode=755 tmpfs "$closed"
mkdir -p "$checkout"; mount --no-canonicalize --bind /proc/self/fd/3 "$checkout"
mkdir -p "$target"; [ -e "$target/debug" ] || mount --no-canonicalize --bind /proc/self/fd/4 "$target"
cd "$here"
exec setpriv --reuid "$user" --regid "$user" --clear-groups "$@" 3<&- 4<&-
"#;

/// The first directory on the way to a file that others may not enter.
fn closed_directory(file: &Path) -> Option<PathBuf> {
    use std::os::unix::fs::PermissionsExt as _;
    let mut parents: Vec<_> = file.ancestors().skip(1).collect();
    parents.reverse();
    let closed = |dir: &&Path| fs::metadata(dir).is_ok_and(|meta| meta.permissions().mode() & 0o001 == 0);
    parents.into_iter().find(closed).map(Path::to_path_buf)
}

fn run_live(programs: &[TestProgram], report: &mut Report) -> Result<()> {
    let built = match live_obstacle() {
        Some(obstacle) => Err(obstacle),
        None => build::prepare_live().map_err(|error| format!("{error:#}")),
    };
    for program in programs {
        let built = match program.obstacle() {
            Some(obstacle) => &Err(obstacle),
            None => &built,
        };
        match built {
            Ok(built) => {
                eprintln!("\n--- {} (as root, with a real guest)", program.name);
                run_program(program, &mut live_command(program, built), report)?;
            }
            Err(reason) => {
                for test in list(program)? {
                    report.add(&format!("test {}::{test}", program.name), Verdict::NotRun(reason.clone()));
                }
            }
        }
    }
    if live_obstacle().is_none() {
        vm::short(programs, report)?;
    }
    Ok(())
}

/// What this machine lacks for live tests that no installation would bring.
fn live_obstacle() -> Option<String> {
    if !process::is_root() {
        return Some("needs root".to_owned());
    }
    let btf = Path::new("/sys/kernel/btf/vmlinux");
    (!btf.exists()).then(|| format!("this kernel has no BTF: no {}", btf.display()))
}

pub(crate) fn live_command(program: &TestProgram, built: &Built) -> Command {
    let mut command = Command::new("timeout");
    // In the foreground, Ctrl-C reaches the test, which then cleans up.
    command.args(["--foreground", "--kill-after=30s", LIVE_LIMIT]).arg(&program.file).arg("--test-threads=1");
    command.env("KVM_MONITOR_BIN", &built.monitor);
    command.env("KVM_MONITOR_GUEST_INIT", &built.guest_init);
    command.env("KVM_MONITOR_KVMEX", &built.kvmex);
    command.env("KVM_MONITOR_LAB_KERNEL", &built.kernel_dir);
    command.envs(built.sshd.as_ref().map(|sshd| ("KVM_MONITOR_SSHD", sshd)));
    command
}

/// Names of the tests in a program.
pub(crate) fn list(program: &TestProgram) -> Result<Vec<String>> {
    let output = process::output(Command::new(&program.file).args(["--list", "--format", "terse"]))?;
    Ok(output.lines().filter_map(|line| line.strip_suffix(": test")).map(str::to_owned).collect())
}

/// Runs a test program, passes its output on and adds up its results.
fn run_program(program: &TestProgram, command: &mut Command, report: &mut Report) -> Result<()> {
    command.current_dir(&program.package).env("CARGO_MANIFEST_DIR", &program.package);
    command.stdin(Stdio::null()).stdout(Stdio::piped());
    let mut child = command.spawn().with_context(|| format!("cannot start {}", process::show(command)))?;
    let mut counts = None;
    for line in BufReader::new(child.stdout.take().context("stdout was not piped")?).split(b'\n') {
        let line = String::from_utf8_lossy(&line?).into_owned();
        println!("{line}");
        counts = Counts::parse(&line).or(counts);
    }
    let status = child.wait()?;
    let mut counts = counts.unwrap_or_default();
    // A crash prints no sum, or a good one before it.
    if !status.success() && counts.failed == 0 {
        println!("{} ended with {status}", program.name);
        counts.failed = 1;
    }
    report.add_program(&program.name, counts);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_test_programs_in_cargos_output() {
        let line = |package: &str, (name, kind): (&str, &str), test: bool| {
            format!(
                r#"{{"reason":"compiler-artifact","manifest_path":"/w/{package}/Cargo.toml",
                "target":{{"name":"{name}","kind":["{kind}"]}},"profile":{{"test":{test}}},"executable":"/t/x"}}"#
            )
        };
        let check = |package: &str, target: (&str, &str), live: bool| {
            let program = parse_artifact(&line(package, target, true)).unwrap();
            assert_eq!((program.name.as_str(), program.is_live()), (target.0, live));
            assert_eq!(program.package, Path::new("/w").join(package));
        };
        check("monitor", ("live_parity", "test"), true);
        check("monitor", ("cli", "test"), false);
        check("tests/lab", ("boot", "test"), true);
        check("tests/lab", ("lab", "lib"), false);
        assert!(parse_artifact(&line("monitor", ("kvm-monitor", "bin"), false)).is_none());
        assert!(parse_artifact("not json").is_none());
    }
}
