//! A report for a ticket.

use std::fmt::Write as _;

use super::table;
use crate::{
    compare::{
        Report,
        report::{DomainReport, Verdict},
    },
    visible,
};

pub(super) fn render(report: &Report) -> String {
    let mut text = String::from("# kvm-monitor comparison\n\n");
    for host in table::hosts(report) {
        let _ = writeln!(text, "{}  ", escape(&host));
    }
    for missing in report.hosts.iter().flat_map(|h| &h.missing) {
        let _ = writeln!(text, "not available: {}  ", escape(missing));
    }
    let _ = writeln!(text, "\n**{}**", escape(&table::overall(report)));
    if !report.findings.is_empty() {
        text.push_str("\n## Findings\n\n");
        for group in table::findings(report, usize::MAX) {
            let first = &group[0];
            let explanation =
                if first.explanation.is_empty() { String::new() } else { format!(": {}", first.explanation) };
            let _ = writeln!(text, "- **{}**{}", first.cause, escape(&explanation));
            for finding in group {
                let also = table::more_places(finding);
                let _ = writeln!(text, "  - {}{}", escape(&finding.sentence), escape(&also));
            }
        }
    }
    let _ = writeln!(text, "\n{}", table::COLUMNS);
    for domain in &report.domains {
        self::domain(&mut text, domain);
    }
    section(&mut text, "Which source to trust", &table::sources(report));
    section(&mut text, "Input", &table::input(report));
    section(&mut text, "What this measurement cost, and how exact it can be", &table::own(&report.own));
    text
}

fn section(text: &mut String, title: &str, lines: &[String]) {
    let _ = writeln!(text, "\n## {title}\n");
    for line in lines {
        let indent = if line.starts_with("  ") { "  " } else { "" };
        let _ = writeln!(text, "{indent}- {}", escape(line.trim_start()));
    }
}

fn domain(text: &mut String, domain: &DomainReport) {
    let _ = writeln!(text, "\n## {}\n\n`{}`, {} samples", escape(&domain.name), domain.uuid, domain.samples);
    let truths = table::truth_rows(domain);
    if !truths.is_empty() {
        let titles: Vec<&str> = table::TRUTH_TITLES.into_iter().chain(["why they differ"]).collect();
        head(text, &titles, 1..5);
        for (cells, note) in truths {
            let cells: Vec<String> = cells.into_iter().chain([note]).collect();
            row(text, &cells);
        }
    }
    let rows = table::comparison_rows(domain);
    if !rows.is_empty() {
        comparisons(text, &rows);
    }
    let _ = writeln!(text, "\n{}", table::rest(domain));
    let answers = table::answer_rows(domain);
    if !answers.is_empty() {
        text.push_str("\n<details><summary>One answer per figure</summary>\n");
        head(text, &table::ANSWER_TITLES, 2..4);
        answers.iter().for_each(|cells| row(text, cells));
        text.push_str("\n</details>\n");
    }
}

/// Reasons stand below, once each.
fn comparisons(text: &mut String, rows: &[table::Row<'_>]) {
    let titles: Vec<&str> = ["what"].into_iter().chain(table::COMPARISON_TITLES).collect();
    head(text, &titles, 2..8);
    let mut reasons: Vec<&str> = Vec::new();
    for of in rows {
        let mut cells: Vec<String> = [of.of.to_owned()].into_iter().chain(of.cells.clone()).collect();
        if of.verdict != Verdict::Agree && !of.reason.is_empty() {
            let number = reasons.iter().position(|r| *r == of.reason).unwrap_or_else(|| {
                reasons.push(of.reason);
                reasons.len() - 1
            });
            if let Some(verdict) = cells.last_mut() {
                verdict.push_str(&format!(" ({})", number + 1));
            }
        }
        row(text, &cells);
    }
    text.push('\n');
    for (index, reason) in reasons.iter().enumerate() {
        let _ = writeln!(text, "{}. {}", index + 1, escape(reason));
    }
}

fn head(text: &mut String, titles: &[&str], right: std::ops::Range<usize>) {
    let _ = writeln!(text, "\n| {} |", titles.join(" | "));
    let lines: Vec<&str> =
        (0..titles.len()).map(|i| if right.contains(&i) { "--:" } else { "---" }).collect();
    let _ = writeln!(text, "|{}|", lines.join("|"));
}

fn row(text: &mut String, cells: &[String]) {
    let cells: Vec<String> = cells.iter().map(|c| escape(c)).collect();
    let _ = writeln!(text, "| {} |", cells.join(" | "));
}

/// Text as it is: others may have chosen it.
fn escape(text: &str) -> String {
    let mut escaped = String::new();
    for c in visible(text).chars() {
        match c {
            '<' => escaped.push_str("&lt;"),
            '>' => escaped.push_str("&gt;"),
            '&' => escaped.push_str("&amp;"),
            '\\' | '`' | '*' | '[' | ']' | '|' | '!' | '#' | '~' => {
                escaped.push('\\');
                escaped.push(c);
            }
            c => escaped.push(c),
        }
    }
    escaped
}

#[cfg(test)]
mod tests {
    use super::escape;

    #[test]
    fn text_of_tenants_stays_text() {
        assert_eq!(escape("a|b <img> [x](y) `z`\n"), "a\\|b &lt;img&gt; \\[x\\](y) \\`z\\`\\\\n");
    }
}
