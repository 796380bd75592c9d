//! From two reads to a rate. Pure arithmetic: no clock, no I/O, no names.

use crate::units::Window;

/// A rate per second with its bounds: the change happened in at least the time between the two reads and at
/// most the time from the begin of the first to the end of the second.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Rate {
    /// The least it can have been.
    pub low: f64,
    /// With the time between the middles of the two windows.
    pub mid: f64,
    /// The most it can have been; infinite if the windows touch.
    pub high: f64,
}

/// Why two readings give no rate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NoRate {
    /// The counter went backwards.
    Backwards,
    /// The second read is not after the first.
    NoTime,
}

/// How long the time between two reads was.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Elapsed {
    /// From the end of the first to the begin of the second, nanoseconds.
    shortest: f64,
    /// From the begin of the first to the end of the second, nanoseconds.
    longest: f64,
}

impl Elapsed {
    /// Between two reads.
    ///
    /// # Errors
    /// [`NoRate::NoTime`].
    pub fn between(before: Window, now: Window) -> Result<Self, NoRate> {
        let longest = now.end.since(before.begin);
        if longest == 0 || now.begin < before.begin {
            return Err(NoRate::NoTime);
        }
        Ok(Self { shortest: real(now.begin.since(before.end)), longest: real(longest) })
    }

    /// The rate of a counter that was `before` and is `now`.
    ///
    /// # Errors
    /// [`NoRate::Backwards`].
    pub fn rate(self, before: u64, now: u64) -> Result<Rate, NoRate> {
        let change = real(now.checked_sub(before).ok_or(NoRate::Backwards)?);
        let per_second = |ns: f64| change / (ns / 1e9);
        Ok(Rate {
            low: per_second(self.longest),
            // Halved as a real number: half of 1 ns is not 0, so that `mid` is always finite.
            mid: per_second(f64::midpoint(self.longest, self.shortest)),
            high: if self.shortest > 0.0 { per_second(self.shortest) } else { f64::INFINITY },
        })
    }
}

/// The rate of a counter that was `before` and is `now`.
///
/// # Errors
/// If the counter went backwards or no time passed; never a clamped number.
pub fn rate(before: (u64, Window), now: (u64, Window)) -> Result<Rate, NoRate> {
    now.0.checked_sub(before.0).ok_or(NoRate::Backwards)?;
    Elapsed::between(before.1, now.1)?.rate(before.0, now.0)
}

#[expect(clippy::cast_precision_loss, reason = "a rate is an approximate number; 53 bits are plenty")]
fn real(number: u64) -> f64 {
    number as f64
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::units::MonotonicNs;

    const fn window(begin: u64, end: u64) -> Window {
        Window { begin: MonotonicNs(begin), end: MonotonicNs(end) }
    }

    #[test]
    fn a_rate_is_bounded_by_the_windows() {
        let r = rate((100, window(0, 100_000_000)), (1_100, window(1_000_000_000, 1_100_000_000))).unwrap();
        assert!((r.low - 1_000.0 / 1.1).abs() < 1e-9 && (r.mid - 1_000.0).abs() < 1e-9);
        assert!((r.high - 1_000.0 / 0.9).abs() < 1e-9);
    }

    #[test]
    fn touching_windows_leave_the_rate_unbounded_above_but_finite() {
        for (change, end) in [(0, 1), (7, 1), (7, 2)] {
            let r = rate((0, window(0, end)), (change, window(end, end))).unwrap();
            assert!(r.low <= r.mid && r.mid.is_finite() && r.high == f64::INFINITY, "{change} {end}: {r:?}");
        }
    }

    #[test]
    fn backwards_or_no_time_is_no_rate() {
        assert_eq!(rate((2, window(0, 1)), (1, window(5, 6))), Err(NoRate::Backwards));
        assert_eq!(rate((1, window(5, 5)), (2, window(5, 5))), Err(NoRate::NoTime));
        assert_eq!(rate((1, window(5, 6)), (2, window(1, 9))), Err(NoRate::NoTime));
    }
}
