//! kvm-monitor: what each VM of a host uses and suffers, seen from the host.
//!
//! # The way of a number
//!
//! `probe → map → sample → model → reconcile → sink`: the kernel programs (package `monitor-ebpf`) sum events in
//! maps; once per tick each [`source`] is read into the [`sample::DomainSample`] of its domain, with the window
//! it was read in; two reads give a rate with bounds ([`model`]); [`record`] defines the line that is written,
//! with every source's number side by side; [`sink`] writes it. [`recorded`] reads such lines back, and [`compare`]
//! holds the sources against each other.
//!
//! | Module | Does | Must not know |
//! |---|---|---|
//! | [`units`], [`metric`] | say what a number is; list every metric once | how sources work |
//! | [`equivalents`] | says what other programs call our figures | how sources work |
//! | [`inventory`] | which domains exist and what belongs to them | metrics |
//! | [`source`] | turns one source into values, or says why not | other sources, output |
//! | [`tracker`] | merges the sources' domains, follows threads | time, output |
//! | [`inquiry`] | when libvirt is asked for what, and what its silence means | metrics, output |
//! | [`ledger`], [`split`], [`model`] | arithmetic on readings and samples | I/O, clocks, JSON |
//! | [`record`], [`sink`] | define the lines; write them | where numbers came from |
//! | [`reconcile`] | says whether two sources can both be right, and which known causes make them differ | I/O, clocks, JSON |
//! | [`compare`] | lines of a stream → a report of how accurate each source is | I/O, clocks, JSON |
//! | [`recorded`] | feeds a recorded stream, or the one being made, to a comparison | any metric by name |
//! | [`run`] | ticks, calls the above in order, stops cleanly | any metric by name |
//! | [`pace`] | says when to tick | anything else |
//! | [`footprint`] | keeps our own memory small | anything else |
//! | [`privilege`] | gives up rights that are not needed any more | anything else |
//! | [`place`] | says where the domains of a libvirt URI are | sources |
//! | [`host`] | facts of this machine and the rules that follow | sources |
//!
//! # Invariants
//!
//! Nothing here changes a guest, a domain or libvirt. A value that is not known is absent, never 0. All
//! arithmetic is on `CLOCK_MONOTONIC`. A counter that goes backwards gives no rate. Every queue is bounded, and
//! what is dropped is counted. Nothing stays attached after the process ends, however it ends.

pub mod check;
pub mod cli;
pub mod compare;
pub mod equivalents;
pub mod footprint;
pub mod host;
pub mod inquiry;
pub mod inventory;
pub mod ledger;
pub mod list;
pub mod metric;
pub mod model;
pub mod pace;
pub mod place;
pub mod privilege;
pub mod reconcile;
pub mod record;
pub mod recorded;
pub mod run;
pub mod sample;
pub mod sink;
pub mod source;
pub mod split;
pub mod tracker;
pub mod units;

/// Whether a character may change how the text around it looks on a terminal or where a line ends: a control
/// character, a line separator or a switch of the writing direction.
#[must_use]
pub fn is_disruptive(c: char) -> bool {
    c.is_control() || matches!(c, '\u{200e}' | '\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
}

/// Text that somebody else chose, safe for a terminal: what is disruptive is shown as an escape.
#[must_use]
pub fn visible(text: &str) -> String {
    text.chars()
        .flat_map(|c| if is_disruptive(c) { c.escape_default().collect::<Vec<_>>() } else { vec![c] })
        .collect()
}

/// An error with its causes, joined in one line.
#[must_use]
pub fn one_line(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(e) = cause {
        text = format!("{text}: {e}");
        cause = e.source();
    }
    text.split('\n').map(str::trim).filter(|line| !line.is_empty()).collect::<Vec<_>>().join("; ")
}

#[cfg(test)]
mod tests {
    use super::visible;

    #[test]
    fn what_steers_a_terminal_becomes_visible() {
        assert_eq!(visible("a\u{1b}[31mb\n\u{9b}é\u{202e}"), "a\\u{1b}[31mb\\n\\u{9b}é\\u{202e}");
    }
}
