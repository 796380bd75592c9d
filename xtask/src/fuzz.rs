//! `cargo xtask fuzz`: feeds the readers of text that others chose with whatever reaches more of their code.
//!
//! `tests/fuzz` is laid out for cargo-fuzz, which works too; this needs nothing but a C++ compiler, and no nightly
//! toolchain: the coverage that libFuzzer follows is a pass of rustc's own LLVM.

use std::fs;
use std::process::Command;

use anyhow::{Context as _, Result, bail};

use crate::{build, paths, process};

const TARGETS: [&str; 3] = ["domain_xml", "domstats", "command_line"];
/// How long each target runs unless told otherwise.
const SECONDS: &str = "60";
/// As cargo-fuzz sets them, but for the sanitizer: the readers have no `unsafe`.
const COVERAGE: [&str; 7] = [
    "--cfg=fuzzing",
    "-Cdebug-assertions",
    "-Cpasses=sancov-module",
    "-Cllvm-args=-sanitizer-coverage-level=4",
    "-Cllvm-args=-sanitizer-coverage-inline-8bit-counters",
    "-Cllvm-args=-sanitizer-coverage-pc-table",
    "-Cllvm-args=-sanitizer-coverage-trace-compares",
];

/// The subcommand.
pub(crate) fn run(args: &[String]) -> Result<()> {
    let words: Vec<&str> = args.iter().map(String::as_str).collect();
    let (targets, seconds) = match words[..] {
        [] => (&TARGETS[..], SECONDS),
        ["--seconds", seconds] => (&TARGETS[..], seconds),
        [target] => (one(target)?, SECONDS),
        [target, "--seconds", seconds] => (one(target)?, seconds),
        _ => bail!("fuzz takes the name of a target and --seconds N, or neither"),
    };
    seconds.parse::<u32>().with_context(|| format!("--seconds takes a number, not `{seconds}`"))?;
    let (project, output) = (paths::root().join("tests/fuzz"), paths::target().join("fuzz"));
    let triple = format!("{}-unknown-linux-gnu", std::env::consts::ARCH);
    let mut cargo = build::cargo("build");
    cargo.current_dir(&project).args(["--release", "--target", &triple, "--target-dir"]).arg(&output);
    // With --target the flags do not reach build scripts.
    process::run_tailed(cargo.env("CARGO_ENCODED_RUSTFLAGS", COVERAGE.join("\u{1f}")))?;
    for target in targets {
        eprintln!("\n--- {target}, {seconds} s");
        let corpus = output.join("corpus").join(target);
        fs::create_dir_all(&corpus).with_context(|| format!("cannot make {}", corpus.display()))?;
        let mut fuzzer = Command::new(output.join(&triple).join("release").join(target));
        fuzzer.arg(&corpus).arg(paths::root().join("tests/fixtures/xml"));
        fuzzer.args([&format!("-max_total_time={seconds}"), "-timeout=10", "-rss_limit_mb=512"]);
        fuzzer.args(["-max_len=20000", "-print_final_stats=1"]);
        fuzzer.arg(format!("-artifact_prefix={}/", output.display()));
        process::run(&mut fuzzer)?;
    }
    Ok(())
}

fn one(target: &str) -> Result<&'static [&'static str]> {
    let at = TARGETS.iter().position(|known| *known == target);
    let at = at.with_context(|| format!("no fuzz target `{target}`: {}", TARGETS.join(", ")))?;
    Ok(&TARGETS[at..=at])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_target_is_run() {
        let files = fs::read_dir(paths::root().join("tests/fuzz/fuzz_targets")).unwrap();
        let mut names: Vec<String> = files
            .map(|file| file.unwrap().path().file_stem().unwrap().to_string_lossy().into_owned())
            .collect();
        names.sort();
        let mut known = TARGETS.map(str::to_owned);
        known.sort();
        assert_eq!(names, known);
    }
}
