//! `cargo xtask kernels`: loads every program on this machine's kernel and on those of the VMs, and writes into
//! `docs/kernels.md` what each verifier looked at, how long that took, and what was refused.

use std::fmt::Write as _;
use std::process::Command;

use anyhow::{Result, bail, ensure};

use crate::{build, docs, process, vm};

const FILE: &str = "docs/kernels.md";
const MARKERS: (&str, &str) = ("<!-- programs:begin -->", "<!-- programs:end -->");
/// Runs before the one whose load times count: the first one reads its files.
const WARM_UP: usize = 2;

/// What `kvm-monitor check` says on one kernel.
#[derive(Debug, Default, PartialEq, Eq)]
struct Kernel {
    release: String,
    /// Name and answer of each program.
    programs: Vec<(String, Answer)>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Answer {
    /// Instructions that the verifier looked at, milliseconds of loading, and what the program hangs on.
    Loads { instructions: String, ms: String, on: String },
    /// The reason.
    Refused(String),
}

/// The subcommand.
pub(crate) fn run(args: &[String]) -> Result<()> {
    if let [other, ..] = args {
        bail!("kernels takes no arguments, not `{other}`");
    }
    ensure!(process::is_root(), "kernels needs root, because it loads kernel programs: run it with sudo");
    let built = build::prepare_live()?;
    let check = format!("{} check --libvirt off", built.monitor.display());
    let again = vec![check; WARM_UP + 1].join("; ");
    let mut kernels = Vec::new();
    for series in vm::SERIES {
        kernels.push(parse(&vm::output_of(&built, series, &again)?)?);
    }
    kernels.push(parse(&process::output(Command::new("sh").args(["-c", &again]))?)?);
    docs::replace(FILE, MARKERS, &table(&kernels))
}

/// Reads the last answer that was printed.
fn parse(text: &str) -> Result<Kernel> {
    let mut kernel = Kernel::default();
    let mut source = "";
    for line in text.lines() {
        if let Some((_, release)) = line.split_once(" on kernel ") {
            kernel = Kernel { release: release.to_owned(), ..Kernel::default() };
        }
        let Some(program) = line.strip_prefix("  ") else {
            source = line.split(' ').next().unwrap_or_default();
            continue;
        };
        let Some((name, rest)) = program.split_once(' ').filter(|_| source == "ebpf") else { continue };
        let (mark, detail) = rest.trim_start().split_once(' ').unwrap_or_default();
        if let Some(answer) = answer(mark, detail.trim()) {
            kernel.programs.push((name.to_owned(), answer));
        }
    }
    ensure!(!kernel.programs.is_empty(), "no program loads:\n{text}");
    Ok(kernel)
}

/// `None` for a line that is not about a program.
fn answer(mark: &str, detail: &str) -> Option<Answer> {
    if mark == "NO" {
        // What is lost without it stands elsewhere.
        return Some(Answer::Refused(detail.split("; without it").next()?.to_owned()));
    }
    let instructions = detail.split(", ").find_map(|part| part.strip_suffix(" instructions verified"))?;
    let ms = detail.split(", loaded in ").nth(1)?.strip_suffix(" ms")?;
    let on = detail.rsplit_once('(')?.1.split_once(')')?.0;
    Some(Answer::Loads { instructions: instructions.to_owned(), ms: ms.to_owned(), on: on.to_owned() })
}

fn table(kernels: &[Kernel]) -> String {
    let mut names: Vec<&String> = Vec::new();
    for (name, _) in kernels.iter().flat_map(|kernel| &kernel.programs) {
        if !names.contains(&name) {
            names.push(name);
        }
    }
    let of = |kernel: &Kernel, name: &String| {
        kernel.programs.iter().find(|(n, _)| n == name).map(|(_, answer)| answer.clone())
    };
    let mut text = "| program | by |".to_owned();
    kernels.iter().for_each(|kernel| write_cell(&mut text, &kernel.release));
    text.push_str("\n|---|---|");
    kernels.iter().for_each(|_| text.push_str("---|"));
    text.push('\n');
    let mut notes: Vec<String> = Vec::new();
    for name in names {
        let answers: Vec<Option<Answer>> = kernels.iter().map(|kernel| of(kernel, name)).collect();
        let on = answers.iter().flatten().find_map(|answer| match answer {
            Answer::Loads { on, .. } => Some(on.as_str()),
            Answer::Refused(_) => None,
        });
        let _ = write!(text, "| `{name}` | {} |", on.unwrap_or_default());
        for answer in answers {
            write_cell(&mut text, &cell(answer, &mut notes));
        }
        text.push('\n');
    }
    for (number, note) in (1..).zip(&notes) {
        let _ = write!(text, "\n{number}. {note}");
    }
    text
}

fn write_cell(text: &mut String, content: &str) {
    let _ = write!(text, " {content} |");
}

fn cell(answer: Option<Answer>, notes: &mut Vec<String>) -> String {
    match answer {
        None => "not there".to_owned(),
        Some(Answer::Loads { instructions, ms, .. }) => format!("{instructions}, {ms} ms"),
        Some(Answer::Refused(reason)) => {
            let at = notes.iter().position(|note| *note == reason).unwrap_or_else(|| {
                notes.push(reason);
                notes.len() - 1
            });
            format!("no ({})", at + 1)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const CHECK: &str = "\
kvm-monitor 0.1.0 on kernel 6.1.0-56-cloud-amd64
ebpf                   yes  kernel programs load and attach
  sched_switch         yes  attached to a kernel tracepoint by BTF (tp_btf), 812 instructions verified, loaded in 3.4 ms
  iomap_dio_rw_begin   NO   no such tracepoint; without it, requests are not seen
  guest mode           NO   enters no guest mode
libvirt                NO   switched off by --libvirt off
procfs                 yes  0 QEMU processes visible
  schedstat            NO   the kernel was built without it
";

    #[test]
    fn the_last_answer_of_check_is_read() {
        let kernel = parse(&CHECK.repeat(2)).unwrap();
        assert_eq!(kernel.release, "6.1.0-56-cloud-amd64");
        let loads =
            Answer::Loads { instructions: "812".to_owned(), ms: "3.4".to_owned(), on: "tp_btf".to_owned() };
        let refused = Answer::Refused("no such tracepoint".to_owned());
        assert_eq!(
            kernel.programs[..2],
            [("sched_switch".to_owned(), loads), ("iomap_dio_rw_begin".to_owned(), refused)]
        );
        assert!(parse("ebpf  NO  no BTF").is_err());
    }

    #[test]
    fn the_table_has_a_column_for_each_kernel_and_each_reason_once() {
        let kernel = parse(CHECK).unwrap();
        let table = table(&[kernel, Kernel { release: "x".to_owned(), programs: Vec::new() }]);
        let lines: Vec<_> = table.lines().collect();
        assert_eq!(lines[0], "| program | by | 6.1.0-56-cloud-amd64 | x |");
        assert_eq!(lines[2], "| `sched_switch` | tp_btf | 812, 3.4 ms | not there |");
        assert_eq!(lines[3], "| `iomap_dio_rw_begin` |  | no (1) | not there |");
        assert!(table.ends_with("\n1. no such tracepoint"));
    }
}
