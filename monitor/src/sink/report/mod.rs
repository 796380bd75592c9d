//! Writes a comparison's report: as text for a terminal, Markdown for a ticket, HTML with plots, or JSON.
//!
//! Each is a function from report to text: the same report gives the same bytes.

mod html;
mod markdown;
mod plot;
mod table;
mod text;

use crate::compare::Report;

/// How a report is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Format {
    /// For a terminal.
    Text,
    /// For programs.
    Json,
    /// For a ticket.
    Markdown,
    /// One file with plots, for a browser.
    Html,
}

/// The report as text of that format.
#[must_use]
pub fn render(report: &Report, format: Format) -> String {
    match format {
        Format::Text => text::render(report),
        Format::Markdown => markdown::render(report),
        Format::Html => html::render(report),
        Format::Json => {
            let json = serde_json::to_string_pretty(report);
            json.unwrap_or_else(|error| format!("{{\"error\":\"{error}\"}}")) + "\n"
        }
    }
}
