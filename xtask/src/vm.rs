//! `cargo xtask lab`: the live tests on other kernels, in a VM where KVM, vhost-net and cgroup v2 work.
//!
//! One VM per kernel ([`lab::vm`]), one VM at a time on this machine. What it leaves is in `target/vm/SERIES/`: `output` (all
//! that was printed), `console.log`, `dmesg`, and whatever the commands wrote to `/out`.
#![expect(clippy::print_stdout, clippy::print_stderr, reason = "results go to stdout, progress to stderr")]

use std::collections::BTreeMap;
use std::env;
use std::fmt::Write as _;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, anyhow, bail, ensure};
use lab::interrupt;
use lab::vm::{Cpus, End, Outcome, Vm};

use crate::build::{self, Built};
use crate::report::{Counts, Report, Verdict};
use crate::test::{self, TestProgram};
use crate::{kernel, paths, process};

/// The kernels that kvm-monitor is tried on beside the running one: the oldest promised, and a long-term one.
pub(crate) const SERIES: [&str; 2] = ["6.1", "6.12"];
/// Programs that need two CPUs, one to watch from. All others run on one, which is safer and quicker.
const TWO_CPUS: [&str; 3] = ["live_parity", "live_sched", "live_threads"];
/// For everything that the VMs of one kernel do after their boot.
const LIMIT: Duration = Duration::from_secs(240 * 60);
/// For one test program.
const PROGRAM_LIMIT: &str = "45m";
/// What `cargo xtask test` runs: on one kernel, the parts of these programs whose tests have the word in their names. What
/// the machine itself cannot show comes first: guest mode. A whole guest in the emulated guest mode takes one to three
/// minutes: that is left to `cargo xtask lab`.
const SHORT_SERIES: &str = "6.12";
const SHORT: [(&str, &str); 3] =
    [("live_kvm", "every_"), ("live_sched", "throttling"), ("live_net", "drops_of_a_suspended")];
const SHORT_LIMIT: Duration = Duration::from_secs(10 * 60);
/// What stands before lines that the commands print for us.
const MARK: &str = "lab-vm:";

/// What was asked for.
#[derive(Debug, PartialEq, Eq)]
struct Request {
    series: Vec<&'static str>,
    /// Parts of the names of test programs or of tests.
    filters: Vec<String>,
    /// No more than what `cargo xtask test` runs.
    short: bool,
    /// Of the VM; else as the program needs.
    cpus: Option<Cpus>,
    command: Vec<String>,
}

/// A VM to boot.
#[derive(Clone, Copy)]
struct Host<'s> {
    series: &'s str,
    /// For everything after the boot.
    limit: Duration,
    cpus: Cpus,
}

impl<'s> Host<'s> {
    fn new(series: &'s str) -> Self {
        Self { series, limit: LIMIT, cpus: Cpus::One }
    }
}

/// The subcommand: whether all tests (or the command) succeeded on each kernel.
pub(crate) fn run(args: &[String]) -> Result<bool> {
    let request = parse(args)?;
    ensure!(process::is_root(), "lab needs root, because it shares the root directory with a VM: use sudo");
    let built = build::prepare_live()?;
    let programs = if request.command.is_empty() { test::compile()? } else { Vec::new() };
    let programs: Vec<_> = programs.into_iter().filter(TestProgram::is_live).collect();
    interrupt::catch();
    let mut report = Report::default();
    if request.short {
        short(&programs, &mut report)?;
        return Ok(report.finish());
    }
    let mut succeeded = true;
    let chosen = choose(&programs, &request.filters);
    for series in request.series {
        let host = Host { cpus: request.cpus.unwrap_or(Cpus::One), ..Host::new(series) };
        if request.command.is_empty() {
            let chosen = chosen.as_ref().map_err(|e| anyhow!("{e:#}"))?;
            tests(&built, (chosen, request.cpus), host, &mut report)?;
        } else {
            succeeded &= command(&built, host, &request.command)?;
        }
    }
    Ok(if request.command.is_empty() { report.finish() } else { succeeded })
}

fn parse(args: &[String]) -> Result<Request> {
    let mut request = Request {
        series: SERIES.to_vec(),
        filters: Vec::new(),
        short: false,
        cpus: None,
        command: Vec::new(),
    };
    let mut args = args.iter();
    while let Some(option) = args.next() {
        match option.as_str() {
            "--" => {
                request.command = args.cloned().collect();
                ensure!(!request.command.is_empty(), "no command after --");
                break;
            }
            "--kernel" => {
                let wanted = args.next().context("--kernel needs a kernel")?;
                request.series.retain(|series| wanted == "all" || series == wanted);
                ensure!(!request.series.is_empty(), "--kernel is one of {} or all", SERIES.join(", "));
            }
            "--filter" => request.filters.push(args.next().context("--filter needs a name")?.clone()),
            "--short" => request.short = true,
            "--cpus" => {
                request.cpus = Some(match args.next().map(String::as_str) {
                    Some("1") => Cpus::One,
                    Some("2") => Cpus::TwoInTurn,
                    Some("2-at-once") => Cpus::TwoAtOnce,
                    _ => bail!("--cpus is one of 1, 2 and 2-at-once"),
                });
            }
            other => bail!("lab takes --kernel, --filter, --short, --cpus and --, not `{other}`"),
        }
    }
    let chosen = !request.filters.is_empty()
        || request.series.len() < SERIES.len()
        || request.cpus.is_some()
        || !request.command.is_empty();
    ensure!(!request.short || !chosen, "--short chooses kernel and tests itself");
    ensure!(request.filters.is_empty() || request.command.is_empty(), "--filter chooses tests, not commands");
    Ok(request)
}

/// The short part, for `cargo xtask test`.
pub(crate) fn short(programs: &[TestProgram], report: &mut Report) -> Result<()> {
    let mut chosen = Vec::new();
    for (name, filter) in SHORT {
        let program = programs.iter().find(|program| program.name == name);
        chosen
            .push((program.with_context(|| format!("there is no test program {name}"))?, filter.to_owned()));
    }
    let possible = build::prepare_live().and_then(|built| kernel::of_series(SHORT_SERIES).map(|_| built));
    match possible {
        Ok(built) => {
            tests(&built, (&chosen, None), Host { limit: SHORT_LIMIT, ..Host::new(SHORT_SERIES) }, report)
        }
        Err(error) => {
            let reason = format!("{error:#}");
            for (program, _) in chosen {
                let name = format!("{SHORT_SERIES} {}", program.name);
                report.add(&name, Verdict::NotRun(reason.clone()));
            }
            Ok(())
        }
    }
}

/// What commands for the shell print in the VM of a kernel.
pub(crate) fn output_of(built: &Built, series: &str, commands: &str) -> Result<String> {
    let _one_at_a_time = lock()?;
    let mut printed = String::new();
    let outcome = boot(built, Host::new(series), commands.to_owned(), |line| {
        printed.push_str(line);
        printed.push('\n');
    })?;
    ensure!(outcome.end == End::Exited(0), "{commands} on {series}: {:?}\n{printed}", outcome.end);
    Ok(printed)
}

/// Runs one command in the directory of the caller.
pub(crate) fn command_on(built: &Built, series: &str, words: &[String]) -> Result<bool> {
    command(built, Host::new(series), words)
}

fn command(built: &Built, host: Host<'_>, words: &[String]) -> Result<bool> {
    let mut commands = environment(built, host.cpus);
    let here = env::current_dir().context("the working directory is gone")?;
    writeln!(commands, "cd {}", quote(&here.to_string_lossy()))?;
    commands.push_str(&words.iter().map(|word| quote(word)).collect::<Vec<_>>().join(" "));
    let _one_at_a_time = lock()?;
    let outcome = boot(built, host, commands, |line| println!("{line}"))?;
    match outcome.end {
        End::Exited(0) => {}
        End::Exited(status) => eprintln!("exit status {status}"),
        End::TimedOut => eprintln!("not done after {} s", host.limit.as_secs()),
        End::Died => eprintln!("the VM died: {}", last_words(host.series)),
    }
    Ok(outcome.end == End::Exited(0))
}

/// Runs the tests, and looks at the state of the kernel afterwards.
fn tests(
    built: &Built,
    (chosen, cpus): (&[(&TestProgram, String)], Option<Cpus>),
    host: Host<'_>,
    report: &mut Report,
) -> Result<()> {
    let Host { series, limit, .. } = host;
    // Before anything that the VM of somebody else may use is replaced.
    let _one_at_a_time = lock()?;
    let kept = Kept::new(series)?;
    let kept_built = kept.all_of(built)?;
    let mut lines = Vec::new();
    for (program, test) in chosen {
        let (file, package) = (kept.keep(&program.file)?, program.package.to_string_lossy());
        let file = quote(&file.to_string_lossy());
        lines.push(format!("run {} {} {file} {}\n", program.name, quote(&package), quote(test)));
    }
    let names: Vec<&str> = chosen.iter().map(|(program, _)| program.name.as_str()).collect();
    let cpus_of = |program: usize| cpus.unwrap_or_else(|| cpus_for(names[program]));
    let mut results = Results::default();
    let deadline = Instant::now() + limit;
    let end = until_all_ended(&names, cpus_of, &mut results, |left, cpus, results| {
        let programs: String = left.iter().map(|i| lines[*i].as_str()).collect();
        let commands = [&environment(&kept_built, cpus), RUN, &programs, LOOK].concat();
        let host = Host { limit: deadline.saturating_duration_since(Instant::now()), cpus, ..host };
        let end = boot(built, host, commands, |line| results.take(line))?.end;
        if end == End::Died {
            eprintln!("lab: THE VM DIED: {}", last_words(series));
        }
        Ok(end)
    })?;
    let table = results.table(series, &names);
    judge(&results, (series, &names, end), report)?;
    println!("\n{table}");
    fs::write(out(series).join("results.md"), table).context("cannot write the results")
}

/// Boots VMs for programs by number, one for all that need the same CPUs, until each has ended or is given up; how the
/// last VM ended.
fn until_all_ended(
    names: &[&str],
    cpus_of: impl Fn(usize) -> Cpus,
    results: &mut Results,
    mut boot: impl FnMut(&[usize], Cpus, &mut Results) -> Result<End>,
) -> Result<End> {
    loop {
        let mut left: Vec<_> = (0..names.len()).filter(|i| results.is_left(names[*i])).collect();
        let cpus = left.first().map_or(Cpus::One, |first| cpus_of(*first));
        left.retain(|i| cpus_of(*i) == cpus);
        let ended = results.ended.len();
        match boot(&left, cpus, results)? {
            End::Exited(0) if results.ended.len() > ended && names.iter().any(|n| results.is_left(n)) => {}
            End::Died => {
                // The emulator's fault more often than not: once more from there, but not for ever.
                let during = results.died(left.iter().map(|i| names[*i]));
                eprintln!("lab: it died in {during}");
                if left.is_empty() && results.deaths_in(&during) >= Results::DEATHS {
                    return Ok(End::Died);
                }
            }
            end => return Ok(end),
        }
    }
}

/// Reports what became of each program, and of the kernel.
fn judge(results: &Results, (series, names, end): (&str, &[&str], End), report: &mut Report) -> Result<()> {
    for name in names {
        let what = format!("{series} {name}");
        match results.ended.get(*name) {
            Some((counts, _)) => report.add_program(&what, *counts),
            None if results.deaths_in(name) > 0 => {
                report.add(&what, Verdict::Failed("the VM died in it, each time".to_owned()));
            }
            None => report.add(&what, Verdict::Failed(format!("did not end: {end:?}"))),
        }
    }
    if end == End::Exited(0) {
        ensure!(
            results.looks.len() >= LOOKS && results.looks.len().is_multiple_of(LOOKS),
            "the VM did not look at its kernel: {:?}",
            results.looks
        );
    }
    for (what, complaint) in &results.looks {
        let verdict = if complaint.is_empty() { Verdict::Passed } else { Verdict::Failed(complaint.clone()) };
        report.add(&format!("{series} {what}"), verdict);
    }
    Ok(())
}

fn cpus_for(program: &str) -> Cpus {
    if TWO_CPUS.contains(&program) { Cpus::TwoInTurn } else { Cpus::One }
}

/// The end of the console of a VM that died: what its kernel said.
fn last_words(series: &str) -> String {
    let console = out(series).join("console.log");
    let text = fs::read(&console).unwrap_or_default();
    let text = String::from_utf8_lossy(&text);
    let lines: Vec<&str> = text.lines().collect();
    // The next boot writes it anew.
    let kept = out(series).join("console-of-death.log");
    let _ = fs::write(&kept, text.as_bytes());
    let end = lines[lines.len().saturating_sub(40)..].join("\n  ");
    format!("all of its console is in {}, which ends with\n  {end}", kept.display())
}

/// The programs as they are now: a build that goes on meanwhile replaces files, and the VM would see half of each.
struct Kept(PathBuf);

impl Kept {
    fn new(series: &str) -> Result<Self> {
        let directory = out(series).join("programs");
        let _ = fs::remove_dir_all(&directory); // Of an earlier call; usually there is none.
        fs::create_dir_all(&directory).with_context(|| format!("cannot make {}", directory.display()))?;
        Ok(Self(directory))
    }

    fn keep(&self, file: &Path) -> Result<PathBuf> {
        let kept = self.0.join(file.file_name().unwrap_or_default());
        // Builds replace files, they do not write into them.
        fs::hard_link(file, &kept)
            .or_else(|_| fs::copy(file, &kept).map(drop))
            .with_context(|| format!("cannot keep {}", file.display()))?;
        Ok(kept)
    }

    fn all_of(&self, built: &Built) -> Result<Built> {
        Ok(Built {
            monitor: self.keep(&built.monitor)?,
            guest_init: self.keep(&built.guest_init)?,
            kvmex: self.keep(&built.kvmex)?,
            kernel_dir: built.kernel_dir.clone(),
            sshd: built.sshd.clone(),
            target_dir: built.target_dir.clone(),
        })
    }
}

/// For each filter, the programs whose name has it; or all, with it as the filter of their tests.
fn choose<'p>(programs: &'p [TestProgram], filters: &[String]) -> Result<Vec<(&'p TestProgram, String)>> {
    if filters.is_empty() {
        return Ok(programs.iter().map(|p| (p, String::new())).collect());
    }
    let mut chosen: Vec<(&TestProgram, String)> = Vec::new();
    for filter in filters {
        let named: Vec<_> = programs.iter().filter(|p| p.name.contains(filter)).collect();
        let before = chosen.len();
        chosen.extend(named.iter().map(|program| (*program, String::new())));
        for program in programs.iter().filter(|_| named.is_empty()) {
            if test::list(program)?.iter().any(|test| test.contains(filter)) {
                chosen.push((program, filter.clone()));
            }
        }
        ensure!(chosen.len() > before, "no live test has `{filter}` in its name");
    }
    for (i, (program, _)) in chosen.iter().enumerate() {
        let twice = chosen[..i].iter().any(|(earlier, _)| earlier.name == program.name);
        ensure!(!twice, "{} is chosen by two filters", program.name);
    }
    Ok(chosen)
}

/// Runs a test program: NAME PACKAGE FILE FILTER.
const RUN: &str = r#"
run() {
  local begin=$SECONDS status
  echo "lab-vm: begin $1"
  (cd "$2" && CARGO_MANIFEST_DIR=$2 timeout --kill-after=30s "$limit" "$3" --test-threads=1 --nocapture ${4:+"$4"})
  status=$?
  echo "lab-vm: end $1 $status $((SECONDS - begin))"
}
"#;

/// Lines that begin with `look` below.
const LOOKS: usize = 2;
/// The kernel's complaints, and what is left attached. A CPU that stood still is the fault of the outer machine.
const LOOK: &str = r#"
dmesg >/out/dmesg
bad=$(grep -E 'WARNING: |BUG: |Oops|general protection|INFO: task .* blocked' /out/dmesg | grep -v 'soft lockup' | head -5 | tr '\n' ' ')
echo "lab-vm: look no warning of the kernel;$bad"
sleep 0.5
left=$(bpftool --json prog show | tr -d '\n')
if [ "$left" = "[]" ]; then left=; fi
echo "lab-vm: look no BPF program is left;$left"
"#;

/// What the tests said.
#[derive(Default)]
struct Results {
    current: Counts,
    seen: bool,
    /// With the seconds that each took.
    ended: BTreeMap<String, (Counts, u64)>,
    /// The program that runs.
    running: Option<String>,
    /// Programs in which the VM died; those between two programs count for the next one.
    deaths: Vec<String>,
    looks: Vec<(String, String)>,
}

impl Results {
    /// Deaths of the VM in the same program until it is given up.
    const DEATHS: usize = 2;

    fn is_left(&self, program: &str) -> bool {
        !self.ended.contains_key(program) && self.deaths_in(program) < Self::DEATHS
    }

    fn deaths_in(&self, program: &str) -> usize {
        self.deaths.iter().filter(|name| *name == program).count()
    }

    /// Notes that the VM died, with these programs left.
    fn died<'n>(&mut self, left: impl IntoIterator<Item = &'n str>) -> String {
        let next = left.into_iter().find(|name| !self.ended.contains_key(*name));
        let during = self.running.take().or(next.map(str::to_owned)).unwrap_or_else(|| "its end".to_owned());
        self.deaths.push(during.clone());
        // Of the VMs before, which looked at their kernels.
        self.looks.truncate(self.looks.len() / LOOKS * LOOKS);
        during
    }

    /// For a person: each program, and how often its VM died before it ended.
    fn table(&self, series: &str, names: &[&str]) -> String {
        let mut table =
            format!("| {series} | passed | failed | skipped | s | VM died |\n|---|---|---|---|---|---|\n");
        for name in names {
            let deaths = self.deaths_in(name);
            let row = match self.ended.get(*name) {
                Some((Counts { passed, failed, skipped }, seconds)) => {
                    format!("| {name} | {passed} | {failed} | {skipped} | {seconds} | {deaths} |\n")
                }
                None => format!("| {name} | - | - | - | - | {deaths} |\n"),
            };
            table.push_str(&row);
        }
        table
    }

    fn take(&mut self, line: &str) {
        let Some(mark) = line.strip_prefix(MARK) else {
            println!("{line}");
            if let Some(counts) = Counts::parse(line) {
                (self.current, self.seen) = (counts, true);
            }
            return;
        };
        let words: Vec<_> = mark.split_whitespace().collect();
        match words[..] {
            ["begin", name] => {
                eprintln!("\n--- {name}");
                (self.current, self.seen) = (Counts::default(), false);
                self.running = Some(name.to_owned());
            }
            ["end", name, status, seconds] => {
                eprintln!("--- {name}: status {status} after {seconds} s");
                // A crash prints no sum, or a good one before it.
                if (status != "0" || !self.seen) && self.current.failed == 0 {
                    self.current.failed = 1;
                }
                self.ended.insert(name.to_owned(), (self.current, seconds.parse().unwrap_or(0)));
                self.running = None;
            }
            ["look", ..] => {
                let (what, complaint) =
                    mark.trim_start_matches(" look ").split_once(';').unwrap_or((mark, ""));
                self.looks.push((what.to_owned(), complaint.trim().to_owned()));
            }
            _ => println!("{line}"),
        }
    }
}

/// Boots the VM of a kernel and says how long it took. The caller has the [`lock`].
fn boot(built: &Built, host: Host<'_>, commands: String, line: impl FnMut(&str)) -> Result<Outcome> {
    let vm = Vm {
        kernel_dir: kernel::of_series(host.series)?,
        init: built.guest_init.with_file_name("host"),
        out: out(host.series),
        commands,
        limit: host.limit,
        cpus: host.cpus,
        memory_mib: 3072,
    };
    fs::create_dir_all(&vm.out).with_context(|| format!("cannot make {}", vm.out.display()))?;
    let name = vm.kernel_dir.file_name().unwrap_or_default().to_string_lossy().into_owned();
    eprintln!("lab: booting {name}");
    let outcome = vm.run(line)?;
    let (boot, commands) = (outcome.boot.as_secs_f64(), outcome.commands.as_secs_f64());
    eprintln!("lab: {name}: up after {boot:.1} s, {commands:.1} s of work; {}", vm.out.display());
    Ok(outcome)
}

/// A VM takes more than one CPU: two at a time would only make both slow, and their tests fail.
fn lock() -> Result<File> {
    let path = paths::cache().join("lab.lock");
    fs::create_dir_all(paths::cache())?;
    let file = File::create(&path).with_context(|| format!("cannot write {}", path.display()))?;
    let mut said = false;
    while file.try_lock().is_err() {
        if !said {
            eprintln!("lab: waiting for the VM of somebody else ({})", path.display());
            said = true;
        }
        interrupt::check()?;
        std::thread::sleep(Duration::from_millis(200));
    }
    Ok(file)
}

/// What a VM leaves.
pub(crate) fn out(series: &str) -> PathBuf {
    paths::target().join("vm").join(series)
}

/// What the programs in the VM find in their environment.
fn environment(built: &Built, cpus: Cpus) -> String {
    let set = |name: &str, value: &Path| format!("export {name}={}\n", quote(&value.to_string_lossy()));
    // The caller's wishes, such as KVM_MONITOR_KILL_ROUNDS; what follows is not theirs to say.
    // A guest in guest mode was seen not to boot within minutes where two CPUs take turns.
    let accelerator = if cpus == Cpus::TwoInTurn { "tcg" } else { "kvm" };
    let wishes = env::vars().filter(|(name, _)| name.starts_with("KVM_MONITOR_"));
    let wishes: String = wishes.map(|(name, value)| set(&name, Path::new(&value))).collect();
    let sshd = built.sshd.as_ref().map(|dir| set("KVM_MONITOR_SSHD", dir)).unwrap_or_default();
    [
        wishes,
        sshd,
        set("KVM_MONITOR_BIN", &built.monitor),
        set("KVM_MONITOR_GUEST_INIT", &built.guest_init),
        set("KVM_MONITOR_KVMEX", &built.kvmex),
        set("KVM_MONITOR_LAB_KERNEL", &built.kernel_dir),
        set("KVM_MONITOR_LAB_DIR", Path::new("/scratch")),
        format!(
            "export KVM_MONITOR_LAB_ACCELERATOR={accelerator} KVM_MONITOR_HOST_UNDER_TEST=1\nlimit={PROGRAM_LIMIT}\n"
        ),
    ]
    .concat()
}

/// A word as the shell takes it.
fn quote(word: &str) -> String {
    format!("'{}'", word.replace('\'', r"'\''"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(words: &[&str]) -> Result<Request> {
        parse(&words.iter().map(|word| (*word).to_owned()).collect::<Vec<_>>())
    }

    #[test]
    fn a_request_names_kernels_and_tests_or_a_command() {
        let all = parsed(&[]).unwrap();
        assert_eq!((all.series, all.filters.len(), all.command.len()), (SERIES.to_vec(), 0, 0));
        assert_eq!(all.cpus, None);
        assert_eq!(parsed(&["--cpus", "2-at-once"]).unwrap().cpus, Some(Cpus::TwoAtOnce));
        let one = parsed(&["--kernel", "6.12", "--filter", "live_kvm", "--filter", "live_net"]).unwrap();
        assert_eq!(
            (one.series, one.filters),
            (vec!["6.12"], vec!["live_kvm".to_owned(), "live_net".to_owned()])
        );
        assert_eq!(parsed(&["--kernel", "all", "--", "sh", "--kernel"]).unwrap().command, ["sh", "--kernel"]);
        for wrong in [
            &["--kernel", "5.4"][..],
            &["--kernel"],
            &["x"],
            &["--"],
            &["--filter", "x", "--", "y"],
            &["--short", "--kernel", "6.1"],
            &["--short", "--cpus", "1"],
            &["--cpus", "3"],
        ] {
            assert!(parsed(wrong).is_err(), "{wrong:?}");
        }
    }

    #[test]
    fn results_are_read_from_the_output() {
        let mut results = Results::default();
        let lines = [
            "lab-vm: begin live_a",
            "test result: ok. 2 passed; 0 failed; 1 ignored; 0 measured; 0 filtered out",
            "lab-vm: end live_a 0 3",
            "lab-vm: begin live_b",
            "lab-vm: end live_b 137 9",
            "lab-vm: look no warning of the kernel;",
            "lab-vm: look no BPF program is left;[{\"id\":1}]",
        ];
        lines.iter().for_each(|line| results.take(line));
        assert_eq!(results.ended["live_a"], (Counts { passed: 2, failed: 0, skipped: 1 }, 3));
        assert_eq!(results.ended["live_b"].0.failed, 1, "it crashed");
        let complaints: Vec<_> = results.looks.iter().map(|(_, complaint)| complaint.as_str()).collect();
        assert_eq!(complaints, ["", "[{\"id\":1}]"]);
    }

    #[test]
    fn a_death_of_the_vm_is_not_a_failure_of_the_program_that_passes_in_the_next_one() {
        let mut results = Results::default();
        let names = ["live_a", "live_b"];
        let give = |results: &mut Results, lines: &[&str]| lines.iter().for_each(|line| results.take(line));
        let left = |results: &Results| names.map(|name| results.is_left(name));
        give(&mut results, &["lab-vm: begin live_a"]);
        assert_eq!(results.died(names), "live_a");
        assert_eq!(left(&results), [true, true]);
        give(&mut results, &["lab-vm: begin live_a", "test result: ok. 1 passed; 0 failed; 0 ignored"]);
        give(&mut results, &["lab-vm: end live_a 0 7", "lab-vm: begin live_b"]);
        assert_eq!((results.died(names), left(&results)), ("live_b".to_owned(), [false, true]));
        // Before it began, this time: it is given up all the same.
        assert_eq!((results.died(names), left(&results)), ("live_b".to_owned(), [false, false]));
        let table = results.table("6.1", &names);
        assert!(
            table.ends_with("| live_a | 1 | 0 | 0 | 7 | 1 |\n| live_b | - | - | - | - | 2 |\n"),
            "{table}"
        );
    }

    #[test]
    fn each_program_runs_in_a_vm_with_its_cpus_and_those_behind_a_death_all_the_same() {
        let names = ["live_a", "live_sched", "live_bad", "live_b"];
        let mut results = Results::default();
        let mut boots = Vec::new();
        let end = until_all_ended(
            &names,
            |i| cpus_for(names[i]),
            &mut results,
            |left, cpus, results| {
                boots.push((left.to_vec(), cpus));
                for name in left.iter().map(|i| names[*i]) {
                    results.take(&format!("lab-vm: begin {name}"));
                    if name == "live_bad" {
                        return Ok(End::Died);
                    }
                    results.take("test result: ok. 1 passed; 0 failed; 0 ignored");
                    results.take(&format!("lab-vm: end {name} 0 1"));
                }
                for look in ["lab-vm: look kernel;", "lab-vm: look programs;"] {
                    results.take(look);
                }
                Ok(End::Exited(0))
            },
        );
        assert_eq!(end.unwrap(), End::Exited(0));
        let expected = [
            (vec![0, 2, 3], Cpus::One),
            (vec![1], Cpus::TwoInTurn),
            (vec![2, 3], Cpus::One),
            (vec![3], Cpus::One),
        ];
        assert_eq!(boots, expected, "the death is no end of the others");
        assert_eq!((results.ended.len(), results.deaths_in("live_bad"), results.looks.len()), (3, 2, 4));
    }

    #[test]
    fn words_survive_the_shell() {
        let output = process::output(
            std::process::Command::new("sh").args(["-c", &format!("printf %s {}", quote("a 'b' $c"))]),
        );
        assert_eq!(output.unwrap(), "a 'b' $c");
    }
}
