//! `cargo xtask docs`: writes generated tables into the documents, or checks that they are up to date.

use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context as _, Result, bail};

use crate::setup::{self, Scope};
use crate::{build, paths, process};

/// A part of a document that a command writes.
struct Generated {
    file: &'static str,
    begin: &'static str,
    end: &'static str,
    /// Arguments of kvm-monitor whose output belongs between the two.
    args: &'static [&'static str],
}

const ALL: [Generated; 2] = [
    Generated {
        file: "README.md",
        begin: "<!-- metrics:begin -->",
        end: "<!-- metrics:end -->",
        args: &["schema", "--format", "markdown"],
    },
    Generated {
        file: "docs/metrics.md",
        begin: "<!-- metrics:begin -->",
        end: "<!-- metrics:end -->",
        args: &["schema", "--format", "equivalents"],
    },
];

/// The subcommand.
pub(crate) fn run(args: &[String]) -> Result<()> {
    let words: Vec<_> = args.iter().map(String::as_str).collect();
    match words[..] {
        [] => for_each(write),
        ["--check"] => check(),
        [other, ..] => bail!("docs takes --check or nothing, not `{other}`"),
    }
}

/// Fails if a generated part is not what it would be now.
pub(crate) fn check() -> Result<()> {
    for_each(|file, old, new| match difference(old, new) {
        None => Ok(()),
        Some(difference) => bail!(
            "{} is out of date; run `cargo xtask docs`. The first difference:\n{difference}",
            file.display()
        ),
    })
}

fn write(file: &Path, old: &str, new: &str) -> Result<()> {
    if old != new {
        fs::write(file, new).with_context(|| format!("cannot write {}", file.display()))?;
        eprintln!("updated {}", file.display());
    }
    Ok(())
}

fn for_each(act: impl Fn(&Path, &str, &str) -> Result<()>) -> Result<()> {
    setup::ensure(Scope::Build)?;
    let monitor = build::monitor()?;
    for part in &ALL {
        let file = paths::root().join(part.file);
        let old = fs::read_to_string(&file).with_context(|| format!("cannot read {}", file.display()))?;
        let table = process::output(Command::new(&monitor).args(part.args))?;
        let new = part.put(&old, &table).with_context(|| file.display().to_string())?;
        act(&file, &old, &new)?;
    }
    Ok(())
}

impl Generated {
    /// The document with the part replaced.
    fn put(&self, document: &str, content: &str) -> Result<String> {
        put(document, (self.begin, self.end), content)
    }
}

/// Writes what is between two markers of a document.
pub(crate) fn replace(file: &str, markers: (&str, &str), content: &str) -> Result<()> {
    let file = paths::root().join(file);
    let old = fs::read_to_string(&file).with_context(|| format!("cannot read {}", file.display()))?;
    let new = put(&old, markers, content).with_context(|| file.display().to_string())?;
    write(&file, &old, &new)
}

fn put(document: &str, (begin, end): (&str, &str), content: &str) -> Result<String> {
    let missing = |marker| format!("the marker {marker} is missing");
    let (before, rest) = document.split_once(begin).with_context(|| missing(begin))?;
    let (_, after) = rest.split_once(end).with_context(|| missing(end))?;
    let content = content.trim();
    Ok(format!("{before}{begin}\n\n{content}\n\n{end}{after}"))
}

/// The first line that differs, as a diff shows it.
fn difference(old: &str, new: &str) -> Option<String> {
    if old == new {
        return None;
    }
    let (mut old, mut new) = (old.lines(), new.lines());
    for number in 1.. {
        match (old.next(), new.next()) {
            (None, None) => break,
            (is, should) if is == should => {}
            (is, should) => {
                let side = |sign, line: Option<&str>| {
                    line.map(|line| format!("\n{sign} {line}")).unwrap_or_default()
                };
                return Some(format!("line {number}:{}{}", side('-', is), side('+', should)));
            }
        }
    }
    Some("line ends".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn replaces_what_is_between_the_markers_only() {
        let document = "a\n<!-- metrics:begin -->\nold\n<!-- metrics:end -->\nb\n";
        let new = ALL[0].put(document, "| table |\n").unwrap();
        assert_eq!(new, "a\n<!-- metrics:begin -->\n\n| table |\n\n<!-- metrics:end -->\nb\n");
        assert_eq!(ALL[0].put(&new, "| table |").unwrap(), new);
    }

    #[test]
    fn a_missing_marker_is_named() {
        let error = ALL[0].put("<!-- metrics:begin -->", "").unwrap_err();
        assert!(error.to_string().contains("<!-- metrics:end -->"));
    }

    #[test]
    fn shows_the_first_difference() {
        assert_eq!(difference("a\nb", "a\nb"), None);
        assert_eq!(difference("a\nb", "a\nc\nd").unwrap(), "line 2:\n- b\n+ c");
        assert_eq!(difference("a\nb", "a").unwrap(), "line 2:\n- b");
    }
}
