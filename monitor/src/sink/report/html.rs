//! A report as one file for a browser: no network, light and dark, plots inside.

use std::fmt::Write as _;

use super::{plot, table};
use crate::{
    compare::{
        Report,
        amount::{percent, time},
        report::{DomainReport, EntityReport, MetricReport, Verdict},
    },
    reconcile::real,
    units::Unit,
    visible,
};

/// Domains with plots; the others have their tables.
const PLOTTED_DOMAINS: usize = 20;
/// Comparisons of an entity that are plotted: those that say the most about it.
const PLOTTED: [&str; 12] = [
    "time_ns",
    "run_ns",
    "wait_ns",
    "rx_bytes",
    "tx_bytes",
    "rx_packets",
    "tx_packets",
    "rd_bytes",
    "wr_bytes",
    "rd_req",
    "wr_req",
    "fl_req",
];
/// Who had the CPU, at most so many.
const CULPRITS: usize = 8;

pub(super) fn render(report: &Report) -> String {
    let mut page = String::from(concat!(
        "<!DOCTYPE html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n",
        "<meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n",
        "<meta name=\"color-scheme\" content=\"light dark\">\n<title>kvm-monitor comparison</title>\n<style>\n",
        include_str!("style.css"),
        "</style>\n</head>\n<body>\n<main>\n<h1>kvm-monitor comparison</h1>\n"
    ));
    for host in table::hosts(report) {
        let _ = writeln!(page, "<p>{}</p>", escape(&host));
    }
    for missing in report.hosts.iter().flat_map(|h| &h.missing) {
        let _ = writeln!(page, "<p class=\"bad\">not available: {}</p>", escape(missing));
    }
    overall(&mut page, report);
    findings(&mut page, report);
    let _ = writeln!(page, "<p class=\"quiet\">{}</p>", table::COLUMNS.replace('`', ""));
    for (index, domain) in report.domains.iter().enumerate() {
        self::domain(&mut page, domain, index < PLOTTED_DOMAINS);
    }
    list(&mut page, "Which source to trust", &table::sources(report));
    list(&mut page, "Input", &table::input(report));
    list(&mut page, "What this measurement cost, and how exact it can be", &table::own(&report.own));
    page.push_str("</main>\n</body>\n</html>\n");
    page
}

fn overall(page: &mut String, report: &Report) {
    let s = &report.summary;
    page.push_str("<div class=\"tiles\">");
    for (number, name, class) in [
        (s.agree.to_string(), "agree", "good"),
        (s.explained.to_string(), "explained", "fine"),
        (s.disagree.to_string(), "disagree", if s.disagree > 0 { "bad" } else { "good" }),
        (s.not_comparable.to_string(), "not comparable", ""),
        (percent(s.largest_unexplained_pct), "largest unexplained", if s.exceeded { "bad" } else { "" }),
    ] {
        let _ = write!(page, "<div class=\"tile {class}\"><b>{number}</b>{name}</div>");
    }
    let _ = writeln!(page, "</div>\n<p>{}</p>", escape(&table::overall(report)));
}

fn findings(page: &mut String, report: &Report) {
    if report.findings.is_empty() {
        return;
    }
    page.push_str("<h2>Findings</h2>\n<ul class=\"findings\">\n");
    for group in table::findings(report, usize::MAX) {
        let first = &group[0];
        let class = if first.verdict == Verdict::Disagree { "bad" } else { "fine" };
        let _ = writeln!(
            page,
            "<li><span class=\"tag {class}\">{}</span> {}\n<ul>",
            escape(&first.cause),
            escape(&first.explanation)
        );
        for finding in group {
            let also = format!("<small>{}</small>", escape(&table::more_places(finding)));
            let _ = writeln!(page, "<li>{}{also}</li>", escape(&finding.sentence));
        }
        page.push_str("</ul></li>\n");
    }
    page.push_str("</ul>\n");
}

fn domain(page: &mut String, domain: &DomainReport, plots: bool) {
    let _ = writeln!(
        page,
        "<h2>{}</h2>\n<p class=\"quiet\">{}, {} samples</p>",
        escape(&domain.name),
        domain.uuid,
        domain.samples
    );
    let truths = table::truth_rows(domain);
    if !truths.is_empty() {
        page.push_str("<h3>What the guest did, and what each source says</h3>\n");
        let titles: Vec<&str> = table::TRUTH_TITLES.into_iter().chain(["why they differ"]).collect();
        table_head(page, &titles, &(1..5));
        for (cells, note) in truths {
            let cells: Vec<String> = cells.into_iter().chain([note]).collect();
            table_row(page, &cells, 1..5);
        }
        page.push_str("</tbody></table></div>\n");
    }
    let rows = table::comparison_rows(domain);
    if !rows.is_empty() {
        page.push_str("<h3>Source against source</h3>\n");
        comparisons(page, &rows);
    }
    let _ = writeln!(page, "<p class=\"quiet\">{}</p>", table::rest(domain));
    let answers = table::answer_rows(domain);
    if !answers.is_empty() {
        page.push_str("<details><summary>One answer per figure</summary>\n");
        table_head(page, &table::ANSWER_TITLES, &(2..4));
        answers.iter().for_each(|cells| table_row(page, cells, 2..4));
        page.push_str("</tbody></table></div></details>\n");
    }
    if plots {
        page.push_str("<div class=\"plots\">\n");
        domain.entities.iter().for_each(|entity| self::plots(page, entity));
        page.push_str("</div>\n");
    }
}

fn plots(page: &mut String, entity: &EntityReport) {
    let label = escape(&entity.label);
    if let Some(ledger) = &entity.ledger {
        figure(page, &format!("{label}: where its time went"), &plot::ledger(ledger), &culprits(entity));
    }
    let plotted = entity.metrics.iter().filter(|m| PLOTTED.contains(&m.metric));
    for metric in plotted {
        comparison_plots(page, &label, metric);
    }
    for histogram in entity.histograms.iter().filter(|h| h.count > 0) {
        let title = format!("{label}: {}", escape(&histogram.name));
        let note = format!(
            "{} in all, mean {}, median {}, p99 {}, largest {}",
            histogram.count,
            time(histogram.mean_ns),
            time(real(histogram.p50_ns)),
            time(real(histogram.p99_ns)),
            time(real(histogram.largest_ns))
        );
        figure(page, &title, &plot::bars(&histogram.of, Unit::Nanoseconds, &title), &note);
    }
}

fn comparison_plots(page: &mut String, label: &str, metric: &MetricReport) {
    let moving =
        metric.comparisons.iter().filter(|c| c.reference_metric.is_none() && c.history.spans().len() > 1);
    for comparison in moving.filter(|c| c.reference_total > 0.0 || c.other_total > 0.0) {
        let title = format!("{label}: {}, {} and {}", metric.metric, comparison.reference, comparison.other);
        let svg = plot::lines(&comparison.history, metric.of, (comparison.reference, comparison.other));
        figure(page, &title, &svg, &escape(comparison.verdict.name()));
        if comparison.differences.largest() > 0 {
            let title = format!("{title}: |difference| per tick");
            let svg = plot::bars(&comparison.differences, metric.of, &title);
            figure(page, &title, &svg, "number of ticks by size of the difference");
        }
    }
}

fn culprits(entity: &EntityReport) -> String {
    let shown: Vec<String> = entity
        .preempted_by
        .iter()
        .filter(|c| c.ns > 0)
        .take(CULPRITS)
        .map(|c| format!("{} ({}) {}", c.who, c.kind, time(real(c.ns))))
        .collect();
    if shown.is_empty() {
        return String::new();
    }
    format!("Who had the CPU while it waited: {}", escape(&shown.join(", ")))
}

fn figure(page: &mut String, title: &str, svg: &str, note: &str) {
    let _ =
        writeln!(page, "<figure><figcaption>{title}</figcaption>{svg}<p class=\"quiet\">{note}</p></figure>");
}

fn table_head(page: &mut String, titles: &[&str], right: &std::ops::Range<usize>) {
    page.push_str("<div class=\"wide\"><table><thead><tr>");
    for (index, title) in titles.iter().enumerate() {
        let align = if right.contains(&index) { " class=\"n\"" } else { "" };
        let _ = write!(page, "<th{align}>{title}</th>");
    }
    page.push_str("</tr></thead><tbody>\n");
}

fn table_row(page: &mut String, cells: &[String], right: std::ops::Range<usize>) {
    page.push_str("<tr>");
    for (index, cell) in cells.iter().enumerate() {
        let align = if right.contains(&index) { " class=\"n\"" } else { "" };
        let _ = write!(page, "<td{align}>{}</td>", escape(cell));
    }
    page.push_str("</tr>\n");
}

/// Rows under what they are about; each verdict with its reason.
fn comparisons(page: &mut String, rows: &[table::Row<'_>]) {
    let titles: Vec<&str> = table::COMPARISON_TITLES.into_iter().filter(|t| *t != table::PER_TICK).collect();
    table_head(page, &titles, &(1..6));
    let mut group = "";
    for row in rows {
        if row.of != group {
            let columns = titles.len();
            let _ =
                writeln!(page, "<tr class=\"group\"><th colspan=\"{columns}\">{}</th></tr>", escape(row.of));
            group = row.of;
        }
        let class = match row.verdict {
            Verdict::Agree => "good",
            Verdict::Explained => "fine",
            Verdict::Disagree => "bad",
            Verdict::NotComparable => "quiet",
        };
        let [cells @ .., verdict] = &row.cells;
        page.push_str("<tr>");
        let mut per_tick = String::new();
        for (index, (cell, title)) in cells.iter().zip(table::COMPARISON_TITLES).enumerate() {
            if title == table::PER_TICK {
                per_tick = format!(" ({title}: {cell})");
                continue;
            }
            let align = if index > 0 { " class=\"n\"" } else { "" };
            let _ = write!(page, "<td{align}>{}</td>", escape(cell));
        }
        let _ = writeln!(
            page,
            "<td class=\"v\"><span class=\"tag {class}\">{}</span> <small>{}{}</small></td></tr>",
            escape(verdict),
            escape(row.reason),
            escape(&per_tick)
        );
    }
    page.push_str("</tbody></table></div>\n");
}

fn list(page: &mut String, title: &str, lines: &[String]) {
    let _ = writeln!(page, "<h2>{title}</h2>\n<ul>");
    lines.iter().for_each(|l| page.push_str(&format!("<li>{}</li>\n", escape(l.trim_start()))));
    page.push_str("</ul>\n");
}

/// Text as it is: others may have chosen it.
fn escape(text: &str) -> String {
    let mut escaped = String::new();
    for c in visible(text).chars() {
        match c {
            '<' => escaped.push_str("&lt;"),
            '>' => escaped.push_str("&gt;"),
            '&' => escaped.push_str("&amp;"),
            '"' => escaped.push_str("&quot;"),
            '\'' => escaped.push_str("&#39;"),
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
        assert_eq!(escape("<a href=\"x\">'&"), "&lt;a href=&quot;x&quot;&gt;&#39;&amp;");
    }
}
