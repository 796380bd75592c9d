//! Plots as SVG, with colours that follow the page's theme: classes, no fixed colours.

use std::fmt::Write as _;

use crate::{
    compare::{
        amount::{amount, time},
        entity::LEDGER,
        stats::{Distribution, History},
    },
    reconcile::real,
    units::Unit,
};

const WIDTH: f64 = 640.0;
const HEIGHT: f64 = 180.0;
const LEFT: f64 = 74.0;
const BOTTOM: f64 = 22.0;
const TOP: f64 = 8.0;
const RIGHT: f64 = 8.0;

/// Both sources over time, as growth per second.
pub(super) fn lines(history: &History<2>, unit: Unit, (reference, other): (&str, &str)) -> String {
    let seconds = real(history.span_ns()) / 1e9;
    let rates: Vec<[f64; 2]> = history.spans().iter().map(|s| s.map(|v| v / seconds)).collect();
    let most = rates.iter().flatten().fold(0.0_f64, |a, b| a.max(*b));
    let mut svg = open(&format!("{reference} and {other} per second over time"));
    axes(&mut svg, most, &|v| per_second(v, unit), real(count(&rates)) * seconds);
    for (series, class) in [(0, "a"), (1, "b")] {
        let mut path = String::new();
        for (i, rate) in rates.iter().enumerate() {
            let x = across(real(u64::try_from(i).unwrap_or(0)) + 0.5, real(count(&rates)));
            let _ = write!(path, "{}{x:.1},{:.1}", if i == 0 { "M" } else { "L" }, up(rate[series], most));
        }
        let _ = write!(svg, "<path class=\"line {class}\" d=\"{path}\"/>");
    }
    svg.push_str("</svg>");
    legend(&mut svg, &[("a", reference), ("b", other)]);
    svg
}

/// Where a vCPU's time went, stacked: shares of the time that passed.
pub(super) fn ledger(history: &History<{ LEDGER.len() }>) -> String {
    const NAMES: [&str; LEDGER.len()] = ["running", "interrupted", "waiting for a CPU", "sleeping"];
    let spans = history.spans();
    let mut svg = open("where the vCPU's time went");
    axes(
        &mut svg,
        1.0,
        &|v| format!("{:.0} %", v * 100.0),
        real(count(spans)) * real(history.span_ns()) / 1e9,
    );
    let shares: Vec<[f64; LEDGER.len()]> = spans
        .iter()
        .map(|s| {
            let sum: f64 = s.iter().sum();
            s.map(|v| if sum > 0.0 { v / sum } else { 0.0 })
        })
        .collect();
    let mut floor = vec![0.0; shares.len()];
    for part in 0..LEDGER.len() {
        let step = |i: usize| across(real(u64::try_from(i).unwrap_or(0)), real(count(&shares)));
        let (mut there, mut back) = (String::new(), String::new());
        for (i, share) in shares.iter().enumerate() {
            let (low, high) = (floor[i], floor[i] + share[part]);
            let (x1, x2) = (step(i), step(i + 1));
            let _ = write!(
                there,
                "{}{x1:.1},{y:.1}L{x2:.1},{y:.1}",
                if i == 0 { "M" } else { "L" },
                y = up(high, 1.0)
            );
            back.insert_str(0, &format!("L{x2:.1},{y:.1}L{x1:.1},{y:.1}", y = up(low, 1.0)));
            floor[i] = high;
        }
        if !there.is_empty() {
            let _ = write!(svg, "<path class=\"area l{part}\" d=\"{there}{back}Z\"/>");
        }
    }
    svg.push_str("</svg>");
    let classes = ["l0", "l1", "l2", "l3"];
    let entries: Vec<(&str, &str)> = classes.into_iter().zip(NAMES).collect();
    legend(&mut svg, &entries);
    svg
}

/// A distribution as bars on a logarithmic axis, two per power of two.
pub(super) fn bars(of: &Distribution, unit: Unit, title: &str) -> String {
    let mut octaves = std::collections::BTreeMap::<u32, u64>::new();
    for (low, _, n) in of.buckets() {
        *octaves.entry(half_octave(low)).or_default() += n;
    }
    let mut svg = open(title);
    let (Some(first), Some(last)) = (octaves.keys().next().copied(), octaves.keys().last().copied()) else {
        return svg + "</svg>";
    };
    let most = real(octaves.values().copied().max().unwrap_or(1));
    let columns = f64::from(last - first + 1).max(8.0);
    grid(&mut svg, most, &|v| crate::compare::amount::grouped(v));
    for (octave, n) in &octaves {
        let (x1, x2) =
            (across(f64::from(octave - first), columns), across(f64::from(octave - first + 1), columns));
        let y = up(real(*n), most);
        let range = format!("{} – {}", show(edge(*octave), unit), show(edge(octave + 1), unit));
        let _ = write!(
            svg,
            "<rect class=\"bar\" x=\"{x1:.1}\" y=\"{y:.1}\" width=\"{:.1}\" height=\"{:.1}\"><title>{range}: {n}</title></rect>",
            (x2 - x1 - 1.0).max(0.5),
            HEIGHT - BOTTOM - y
        );
    }
    for label in 0..=4u32 {
        let at = columns * f64::from(label) / 4.0;
        let octave = f64::from(first) + at;
        label_x(
            &mut svg,
            across(at, columns),
            &show((octave / 2.0).exp2() * if first == 0 && label == 0 { 0.0 } else { 1.0 }, unit),
            label == 0,
        );
    }
    svg + "</svg>"
}

/// Twice the binary logarithm, whole.
fn half_octave(value: u64) -> u32 {
    if value == 0 {
        return 0;
    }
    let octave = value.ilog2();
    // √2 in 1/1024.
    let upper = octave > 0 && u128::from(value) * 1024 >= (1448u128 << octave);
    2 * octave + u32::from(upper)
}

fn edge(half_octave: u32) -> f64 {
    if half_octave == 0 { 0.0 } else { (f64::from(half_octave) / 2.0).exp2() }
}

fn show(value: f64, unit: Unit) -> String {
    match unit {
        Unit::Nanoseconds => {
            let text = time(value);
            text.replace(".000", "").replace(".0 ", " ")
        }
        unit => amount(value, unit),
    }
}

fn per_second(value: f64, unit: Unit) -> String {
    match unit {
        Unit::Nanoseconds => format!("{:.0} %", value / 1e7),
        Unit::Bytes => match value {
            v if v >= 1e9 => format!("{:.1} GB/s", v / 1e9),
            v if v >= 1e6 => format!("{:.1} MB/s", v / 1e6),
            v if v >= 1e3 => format!("{:.1} kB/s", v / 1e3),
            v => format!("{v:.0} B/s"),
        },
        Unit::Count => format!("{}/s", crate::compare::amount::grouped(value)),
    }
}

fn open(title: &str) -> String {
    format!(
        "<svg viewBox=\"0 0 {WIDTH} {HEIGHT}\" role=\"img\" aria-label=\"{title}\"><title>{title}</title>"
    )
}

fn axes(svg: &mut String, most: f64, show: &dyn Fn(f64) -> String, seconds: f64) {
    grid(svg, most, show);
    for part in 0..=4u32 {
        let share = f64::from(part) / 4.0;
        label_x(svg, across(share, 1.0), &format!("{:.1} s", share * seconds), part == 0);
    }
}

fn grid(svg: &mut String, most: f64, show: &dyn Fn(f64) -> String) {
    for part in 0..=2u32 {
        let value = most * f64::from(part) / 2.0;
        let y = up(value, most);
        let _ = write!(
            svg,
            "<line class=\"grid\" x1=\"{LEFT}\" x2=\"{:.0}\" y1=\"{y:.1}\" y2=\"{y:.1}\"/><text x=\"{:.0}\" y=\"{:.1}\" text-anchor=\"end\">{}</text>",
            WIDTH - RIGHT,
            LEFT - 6.0,
            y + 4.0,
            show(value)
        );
    }
}

fn label_x(svg: &mut String, x: f64, text: &str, first: bool) {
    let anchor = if first {
        "start"
    } else if x > WIDTH - 40.0 {
        "end"
    } else {
        "middle"
    };
    let _ =
        write!(svg, "<text x=\"{x:.1}\" y=\"{:.0}\" text-anchor=\"{anchor}\">{text}</text>", HEIGHT - 6.0);
}

fn legend(svg: &mut String, entries: &[(&str, &str)]) {
    svg.push_str("<p class=\"legend\">");
    for (class, name) in entries {
        let _ = write!(svg, "<span><i class=\"{class}\"></i>{name}</span>");
    }
    svg.push_str("</p>");
}

fn across(value: f64, most: f64) -> f64 {
    LEFT + (WIDTH - LEFT - RIGHT) * value / if most > 0.0 { most } else { 1.0 }
}

fn up(value: f64, most: f64) -> f64 {
    let share = if most > 0.0 { value / most } else { 0.0 };
    HEIGHT - BOTTOM - (HEIGHT - BOTTOM - TOP) * share
}

fn count<T>(of: &[T]) -> u64 {
    u64::try_from(of.len()).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn half_octaves_have_edges_that_fit() {
        for value in [1, 2, 3, 4, 5, 6, 100, 1_000_000, u64::MAX / 2] {
            let half = half_octave(value);
            let (low, high) = (edge(half), edge(half + 1));
            assert!(low <= real(value) * 1.001 && real(value) < high * 1.01, "{value}: {low} {high}");
        }
    }

    #[test]
    fn plots_of_nothing_are_plots() {
        for svg in [
            lines(&History::default(), Unit::Bytes, ("a", "b")),
            ledger(&History::default()),
            bars(&Distribution::default(), Unit::Count, "x"),
        ] {
            assert!(svg.starts_with("<svg") && svg.contains("</svg>") && !svg.contains("NaN"), "{svg}");
        }
    }
}
