//! What passed, failed and did not run: one line each as it happens, and the sum at the end.

/// How one check or test ended.
pub(crate) enum Verdict {
    Passed,
    Failed(String),
    /// With the reason: never counted as passed.
    NotRun(String),
}

/// Counts of everything so far.
#[derive(Debug, Default)]
pub(crate) struct Report {
    counts: Counts,
    /// Said again at the end: the reason is far up in the output by then.
    failures: Vec<String>,
}

/// How many ended in which way.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Counts {
    pub(crate) passed: u32,
    pub(crate) failed: u32,
    pub(crate) skipped: u32,
}

impl Report {
    /// Records and prints one check.
    pub(crate) fn add(&mut self, name: &str, verdict: Verdict) {
        match verdict {
            Verdict::Passed => {
                println!("{name} ... ok");
                self.counts.passed += 1;
            }
            Verdict::Failed(reason) => {
                println!("{name} ... FAILED\n{reason}");
                self.counts.failed += 1;
                self.failures.push(name.to_owned());
            }
            Verdict::NotRun(reason) => {
                println!("{name} ... not run ({reason})");
                self.counts.skipped += 1;
            }
        }
    }

    /// Records a program of tests that printed its results itself.
    pub(crate) fn add_program(&mut self, name: &str, counts: Counts) {
        self.counts.passed += counts.passed;
        self.counts.failed += counts.failed;
        self.counts.skipped += counts.skipped;
        if counts.failed > 0 {
            self.failures.push(format!("{name}: {} failed", counts.failed));
        }
    }

    /// Prints the sum; whether nothing failed.
    pub(crate) fn finish(&self) -> bool {
        println!();
        for failure in &self.failures {
            println!("failed: {failure}");
        }
        let Counts { passed, failed, skipped } = self.counts;
        println!("{passed} passed, {failed} failed, {skipped} skipped");
        failed == 0
    }
}

impl Counts {
    /// Reads the sum that a test program prints: `test result: ok. 3 passed; 0 failed; 1 ignored; …`.
    pub(crate) fn parse(line: &str) -> Option<Self> {
        let (_, sums) = line.strip_prefix("test result: ")?.split_once(". ")?;
        let mut counts = Self::default();
        for part in sums.split(';') {
            let Some((number, what)) = part.trim().split_once(' ') else { continue };
            match what {
                "passed" => counts.passed = number.parse().ok()?,
                "failed" => counts.failed = number.parse().ok()?,
                "ignored" => counts.skipped = number.parse().ok()?,
                _ => {}
            }
        }
        Some(counts)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_the_sum_of_a_test_program() {
        let parse = Counts::parse;
        let line =
            "test result: ok. 12 passed; 0 failed; 1 ignored; 0 measured; 2 filtered out; finished in 0.01s";
        assert_eq!(parse(line), Some(Counts { passed: 12, failed: 0, skipped: 1 }));
        let line = "test result: FAILED. 1 passed; 2 failed; 0 ignored; 0 measured; 0 filtered out";
        assert_eq!(parse(line), Some(Counts { passed: 1, failed: 2, skipped: 0 }));
        assert_eq!(parse("test a ... ok"), None);
    }
}
