//! A report for a terminal.

use std::fmt::Write as _;

use super::table;
use crate::{
    compare::{
        Report,
        report::{DomainReport, Verdict},
    },
    visible,
};

/// Findings and domains shown in full; the rest is counted.
const SHOWN: usize = 40;

pub(super) fn render(report: &Report) -> String {
    let mut text = String::from("kvm-monitor comparison\n");
    for host in table::hosts(report) {
        line(&mut text, &host);
    }
    for missing in report.hosts.iter().flat_map(|h| &h.missing) {
        line(&mut text, &format!("not available: {missing}"));
    }
    line(&mut text, &table::overall(report));
    findings(&mut text, report);
    let _ = writeln!(text, "\n{}", table::COLUMNS.replace('`', "'"));
    for domain in report.domains.iter().take(SHOWN) {
        self::domain(&mut text, domain);
    }
    if let Some(more) = report.domains.len().checked_sub(SHOWN).filter(|n| *n > 0) {
        let _ = writeln!(text, "\n… and {more} more domains: --format json has all of them.");
    }
    section(&mut text, "Which source to trust", &table::sources(report));
    section(&mut text, "Input", &table::input(report));
    section(&mut text, "What this measurement cost, and how exact it can be", &table::own(&report.own));
    text
}

fn line(text: &mut String, content: &str) {
    text.push_str(&visible(content));
    text.push('\n');
}

fn section(text: &mut String, title: &str, lines: &[String]) {
    let _ = writeln!(text, "\n{title}");
    for content in lines {
        line(text, &format!("  {content}"));
    }
}

fn findings(text: &mut String, report: &Report) {
    if report.findings.is_empty() {
        return;
    }
    text.push_str("\nFindings\n");
    for group in table::findings(report, SHOWN) {
        let first = &group[0];
        let mark = if first.verdict == Verdict::Disagree { "!" } else { "-" };
        let explanation =
            if first.explanation.is_empty() { String::new() } else { format!(": {}", first.explanation) };
        line(text, &format!("  {mark} {}{explanation}", first.cause));
        for finding in group {
            line(text, &format!("      {}{}", finding.sentence, table::more_places(finding)));
        }
    }
    if let Some(more) = report.findings.len().checked_sub(SHOWN).filter(|n| *n > 0) {
        let _ = writeln!(text, "  … and {more} more: --format json has all of them.");
    }
}

fn domain(text: &mut String, domain: &DomainReport) {
    let _ = writeln!(text, "\n{} ({}), {} samples", visible(&domain.name), domain.uuid, domain.samples);
    let truths = table::truth_rows(domain);
    if !truths.is_empty() {
        let rows: Vec<Vec<String>> = truths.iter().map(|(cells, _)| cells.to_vec()).collect();
        let notes: Vec<&str> = truths.iter().map(|(_, note)| note.as_str()).collect();
        columns(text, &table::TRUTH_TITLES, (&rows, &[]), &notes);
        text.push('\n');
    }
    let rows = table::comparison_rows(domain);
    if !rows.is_empty() {
        let cells: Vec<Vec<String>> = rows.iter().map(|r| r.cells.to_vec()).collect();
        let notes: Vec<&str> =
            rows.iter().map(|r| if r.verdict == Verdict::Agree { "" } else { r.reason }).collect();
        let groups: Vec<&str> = rows.iter().map(|r| r.of).collect();
        columns(text, &table::COMPARISON_TITLES, (&cells, &groups), &notes);
    }
    let _ = writeln!(text, "  {}", table::rest(domain));
}

/// Aligned columns, the first (and the last of many) to the left, under the groups they belong to; notes stand below,
/// once each.
fn columns(text: &mut String, titles: &[&str], (rows, groups): (&[Vec<String>], &[&str]), notes: &[&str]) {
    let last = titles.len() - 1;
    let width = |column: usize| {
        let cells = rows.iter().map(|cells| cells[column].chars().count());
        cells.max().unwrap_or(0).max(titles[column].chars().count())
    };
    let widths: Vec<usize> = (0..titles.len()).map(width).collect();
    let (mut known, mut group): (Vec<&str>, &str) = (Vec::new(), "");
    let titles: Vec<String> = titles.iter().map(|t| (*t).to_owned()).collect();
    for (index, cells) in std::iter::once(&titles).chain(rows).enumerate() {
        if let Some(of) = index.checked_sub(1).and_then(|i| groups.get(i)).filter(|of| **of != group) {
            line(text, &format!("  {of}"));
            group = of;
        }
        let mut row = String::from(if groups.is_empty() { " " } else { "   " });
        for (column, cell) in cells.iter().enumerate() {
            let pad = " ".repeat(widths[column] - cell.chars().count());
            let left = column == 0 || column == last && last > 4;
            row.push(' ');
            row.push_str(&if left { format!("{cell}{pad}") } else { format!("{pad}{cell}") });
            row.push(' ');
        }
        let note = index.checked_sub(1).map_or("", |i| notes[i]);
        if !note.is_empty() {
            let number = known.iter().position(|k| *k == note).unwrap_or_else(|| {
                known.push(note);
                known.len() - 1
            });
            let _ = write!(row, " [{}]", number + 1);
        }
        line(text, row.trim_end());
    }
    for (index, note) in known.iter().enumerate() {
        line(text, &format!("  [{}] {note}", index + 1));
    }
}
