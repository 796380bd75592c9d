//! Numbers as people read them.

use crate::units::Unit;

/// An amount with its unit: `1.234 s`, `19.8 ms`, `14,000 B`, `1,000`.
#[must_use]
pub fn amount(value: f64, unit: Unit) -> String {
    match unit {
        Unit::Nanoseconds => time(value),
        Unit::Bytes => format!("{} B", grouped(value)),
        Unit::Count => grouped(value),
    }
}

/// A time in nanoseconds, with the unit that fits.
#[must_use]
pub fn time(ns: f64) -> String {
    let (size, sign) = (ns.abs(), if ns < 0.0 { "-" } else { "" });
    let (value, unit) = match size {
        s if s >= 1e9 => (s / 1e9, "s"),
        s if s >= 1e6 => (s / 1e6, "ms"),
        s if s >= 1e3 => (s / 1e3, "µs"),
        s => return format!("{sign}{s:.0} ns"),
    };
    let digits = if value >= 100.0 { 1 } else { 3 };
    format!("{sign}{value:.digits$} {unit}")
}

/// A whole number in groups of three digits.
#[must_use]
pub fn grouped(value: f64) -> String {
    let digits = format!("{:.0}", value.abs());
    let mut text = if value <= -0.5 { "-".to_owned() } else { String::new() };
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

/// A share in per cent, with as many digits as matter.
#[must_use]
pub fn percent(of_hundred: f64) -> String {
    let size = of_hundred.abs();
    if of_hundred == 0.0 {
        "0 %".to_owned()
    } else if size >= 100.0 {
        format!("{of_hundred:.0} %")
    } else if size >= 0.01 {
        format!("{of_hundred:.2} %")
    } else if size >= 0.0001 {
        format!("{of_hundred:.4} %")
    } else {
        "< 0.0001 %".to_owned()
    }
}

/// With a sign in front, also of what is positive.
#[must_use]
pub fn signed(text: String) -> String {
    let nothing = !text.contains(|c: char| c.is_ascii_digit() && c != '0');
    if text.starts_with(['-', '<']) || nothing { text } else { format!("+{text}") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn amounts_are_short_and_exact_enough() {
        let check = |value, unit, expected: &str| assert_eq!(amount(value, unit), expected);
        check(1_234_567_890.0, Unit::Nanoseconds, "1.235 s");
        check(-19_800_000.0, Unit::Nanoseconds, "-19.800 ms");
        check(999.0, Unit::Nanoseconds, "999 ns");
        check(123_456.0, Unit::Nanoseconds, "123.5 µs");
        check(14_000.0, Unit::Bytes, "14,000 B");
        check(0.0, Unit::Count, "0");
        check(-1_234_567.0, Unit::Count, "-1,234,567");
    }

    #[test]
    fn shares_and_signs() {
        for (value, expected) in
            [(0.0, "0 %"), (123.4, "123 %"), (1.0, "1.00 %"), (0.00123, "0.0012 %"), (1e-9, "< 0.0001 %")]
        {
            assert_eq!(percent(value), expected);
        }
        assert_eq!(signed("5 B".into()), "+5 B");
        assert_eq!(signed("-5 B".into()), "-5 B");
        assert_eq!(signed("0 %".into()), "0 %");
    }
}
