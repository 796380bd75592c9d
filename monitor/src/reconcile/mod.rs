//! Whether two sources can both be right. Pure arithmetic on readings: no I/O, no clock, no JSON.
//!
//! Two sources are never read at the same moment, and count from different zeros. So a reading of one source only
//! says that the other's counter was, at that moment, between its reading before and its reading after
//! ([`Trail::bracket`]). All readings of a counter together bound the constant by which the two may differ
//! ([`Offset`]): if no constant fits them all, no skew can explain the difference, and what is missing is the
//! residual. Known causes ([`causes`]) widen the bounds by name, and what is left then is unexplained.

pub mod causes;
pub mod fit;
pub mod shape;

use std::collections::VecDeque;

pub use causes::{Allowance, Cause};

use crate::units::Window;

/// Larger than any difference of two counters: no limit.
pub const NO_LIMIT: i128 = 1 << 100;

/// A number, and when it was read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Reading {
    /// When.
    pub window: Window,
    /// What.
    pub value: u64,
}

/// How fast a counter can grow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limit {
    /// At most so much per nanosecond: a thread cannot run longer than time passes.
    pub per_ns: u64,
    /// On top of that, since it is brought up to date in jumps of so much.
    pub jump: u64,
}

/// The latest readings of one counter of one source.
#[derive(Clone, Debug, Default)]
pub struct Trail {
    readings: VecDeque<Reading>,
}

/// Between which two numbers a counter was at some moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bracket {
    /// At least.
    pub low: i128,
    /// At most; [`NO_LIMIT`] if no later reading tells.
    pub high: i128,
}

impl Trail {
    /// Readings that are kept in full.
    const RECENT: usize = 8;
    /// Readings kept in all; the older ones are thinned out, for looks some seconds back.
    const KEPT: usize = 40;
    const SPACING_NS: u64 = 250_000_000;

    /// Adds a reading; it has to be later than the ones before.
    pub fn push(&mut self, reading: Reading) {
        self.readings.push_back(reading);
        if let Some(older) = self.readings.len().checked_sub(Self::RECENT + 1).filter(|i| *i > 0) {
            let (this, before) = (self.readings[older].window.begin, self.readings[older - 1].window.begin);
            if this.since(before) < Self::SPACING_NS {
                self.readings.remove(older);
            }
        }
        if self.readings.len() > Self::KEPT {
            self.readings.pop_front();
        }
    }

    /// Forgets everything: the counter started anew.
    pub fn clear(&mut self) {
        self.readings.clear();
    }

    /// The latest reading.
    #[must_use]
    pub fn last(&self) -> Option<Reading> {
        self.readings.back().copied()
    }

    /// Whether a reading after that window is there.
    #[must_use]
    pub fn covers(&self, at: Window) -> bool {
        self.last().is_some_and(|last| last.window.begin >= at.end)
    }

    /// What a counter may have been during a window. `None` if nothing bounds it from below.
    #[must_use]
    pub fn bracket(&self, at: Window, limit: Option<Limit>) -> Option<Bracket> {
        let (mut low, mut high) = (None, NO_LIMIT);
        for reading in self.readings.iter().rev() {
            let value = i128::from(reading.value);
            if reading.window.begin >= at.end {
                high = value;
            }
            if reading.window.end <= at.begin {
                low = low.max(Some(value));
            }
            if let Some(limit) = limit {
                let most = |ns: u64| i128::from(ns) * i128::from(limit.per_ns) + i128::from(limit.jump);
                if reading.window.begin <= at.end {
                    high = high.min(value + most(at.end.since(reading.window.begin)));
                }
                if reading.window.end >= at.begin {
                    low = low.max(Some(value - most(reading.window.end.since(at.begin))));
                }
            }
            if reading.window.end <= at.begin {
                break;
            }
        }
        low.map(|low| Bracket { low, high })
    }

    /// What the counter was at the middle of a window, on a line between its readings. A guess, for plots and
    /// for the differences a user would see.
    #[must_use]
    pub fn interpolate(&self, at: Window) -> Option<f64> {
        let middle = |w: Window| f64::midpoint(real(w.begin.0), real(w.end.0));
        let wanted = middle(at);
        let mut later: Option<(f64, f64)> = None;
        for reading in self.readings.iter().rev() {
            let this = (middle(reading.window), real(reading.value));
            if this.0 <= wanted {
                return Some(match later {
                    Some((t2, v2)) if t2 > this.0 => {
                        this.1 + (v2 - this.1) * (wanted - this.0) / (t2 - this.0)
                    }
                    _ => this.1,
                });
            }
            later = Some(this);
        }
        None
    }
}

/// The bounds that readings put on the constant between two counters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Offset {
    at_least: i128,
    at_most: i128,
    /// Where the other may get ahead by anything, but never falls back: by how much it fell back.
    fell_back: i128,
}

impl Default for Offset {
    fn default() -> Self {
        Self { at_least: -NO_LIMIT, at_most: NO_LIMIT, fell_back: 0 }
    }
}

impl Offset {
    /// Adds a reading of `other` while the reference was in `bracket`, with what known causes allow.
    pub fn add(&mut self, other: i128, bracket: Bracket, allowed: Allowance) {
        if allowed.low <= -NO_LIMIT {
            return;
        }
        let (ahead, most) = (allowed.high >= NO_LIMIT, other - bracket.low - allowed.low);
        if ahead {
            self.fell_back = self.fell_back.max(self.at_least - most);
        } else {
            self.at_most = self.at_most.min(most);
        }
        if bracket.high < NO_LIMIT {
            let allowed = if ahead { 0 } else { allowed.high };
            self.at_least = self.at_least.max(other - bracket.high - allowed);
        }
    }

    /// What no skew can explain: 0 if some constant fits all readings.
    #[must_use]
    pub fn residual(&self) -> i128 {
        if self.at_least <= -NO_LIMIT || self.at_most >= NO_LIMIT {
            return self.fell_back;
        }
        (self.at_least - self.at_most).max(self.fell_back)
    }

    /// How large a difference between the counters could have gone unnoticed; `None`: any.
    #[must_use]
    pub fn slack(&self) -> Option<i128> {
        let bounded = self.at_least > -NO_LIMIT && self.at_most < NO_LIMIT;
        bounded.then(|| (self.at_most - self.at_least).max(0))
    }
}

/// The grain of a source: the largest number that divides every value seen.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Grain(u64);

impl Grain {
    /// Adds a value.
    pub fn add(&mut self, value: u64) {
        let (mut a, mut b) = (self.0, value);
        while b != 0 {
            (a, b) = (b, a % b);
        }
        self.0 = a;
    }

    /// The grain; `None` if there was no value but 0.
    #[must_use]
    pub fn get(self) -> Option<u64> {
        (self.0 > 0).then_some(self.0)
    }
}

/// A count as a real number: 53 bits are plenty for what is shown.
#[expect(clippy::cast_precision_loss, reason = "for figures that are shown, 53 bits are plenty")]
#[must_use]
pub fn real(number: u64) -> f64 {
    number as f64
}

/// A difference as a real number.
#[expect(clippy::cast_precision_loss, reason = "for figures that are shown, 53 bits are plenty")]
#[must_use]
pub fn real_difference(number: i128) -> f64 {
    number as f64
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::units::MonotonicNs;

    const fn window(begin: u64, end: u64) -> Window {
        Window { begin: MonotonicNs(begin), end: MonotonicNs(end) }
    }

    fn trail(readings: &[(u64, u64)]) -> Trail {
        let mut trail = Trail::default();
        for (at, value) in readings {
            trail.push(Reading { window: window(*at, *at + 10), value: *value });
        }
        trail
    }

    #[test]
    fn a_counter_is_between_the_readings_around() {
        let trail = trail(&[(0, 5), (100, 8), (200, 9)]);
        let check = |at, expected| {
            assert_eq!(trail.bracket(at, None).map(|b| (b.low, b.high)), expected, "{at:?}");
        };
        check(window(50, 60), Some((5, 8)));
        check(window(110, 200), Some((8, 9)));
        // Windows that overlap a reading prove nothing about that reading.
        check(window(105, 120), Some((5, 9)));
        check(window(300, 310), Some((9, NO_LIMIT)));
        check(window(0, 5), None);
    }

    #[test]
    fn a_limit_makes_it_tighter() {
        let trail = trail(&[(0, 0), (1_000, 900)]);
        let limit = Some(Limit { per_ns: 1, jump: 2 });
        assert_eq!(trail.bracket(window(100, 110), limit), Some(Bracket { low: 0, high: 112 }));
        assert_eq!(trail.bracket(window(1_005, 1_030), limit), Some(Bracket { low: 893, high: 932 }));
        assert_eq!(trail.interpolate(window(500, 510)), Some(450.0));
    }

    #[test]
    fn old_readings_are_thinned_out_and_recent_ones_are_not() {
        let mut long = Trail::default();
        for i in 0..10_000u64 {
            long.push(Reading { window: window(i * 10_000_000, i * 10_000_000), value: i });
        }
        assert!(long.readings.len() <= Trail::KEPT);
        let recent: Vec<u64> = long.readings.iter().rev().take(Trail::RECENT).map(|r| r.value).collect();
        assert_eq!(recent, (9_992..10_000).rev().collect::<Vec<_>>());
        let span = long.readings.back().unwrap().window.begin.since(long.readings[0].window.begin);
        assert!(span > 7_000_000_000, "{span}");
    }

    #[test]
    fn a_constant_fits_or_something_is_missing() {
        let check = |others: &[(i128, i128, i128)], residual, slack| {
            let mut offset = Offset::default();
            for (other, low, high) in others {
                offset.add(*other, Bracket { low: *low, high: *high }, Allowance::NOTHING);
            }
            assert_eq!((offset.residual(), offset.slack()), (residual, slack), "{others:?}");
        };
        check(&[(100, 0, 0), (150, 50, 50)], 0, Some(0));
        check(&[(100, 0, 10), (155, 50, 60)], 0, Some(5));
        check(&[(100, 0, 0), (151, 50, 50)], 1, Some(0));
        check(&[(100, 0, 0), (140, 50, 60)], 10, Some(0));
        check(&[(100, 0, NO_LIMIT)], 0, None);
    }

    #[test]
    fn what_may_get_ahead_may_not_fall_back() {
        let ahead = Allowance { low: 0, high: NO_LIMIT };
        let check = |others: &[i128], residual| {
            let mut offset = Offset::default();
            for (other, at) in others.iter().zip([0, 100, 200]) {
                offset.add(*other, Bracket { low: at, high: at + 10 }, ahead);
            }
            assert_eq!(offset.residual(), residual, "{others:?}");
        };
        check(&[0, 150, 900], 0);
        check(&[0, 100, 200], 0);
        check(&[0, 80, 200], 10);
        check(&[0, 500, 500], 90);
    }

    #[test]
    fn the_grain_divides_all_values() {
        let check = |values: &[u64], expected| {
            let mut grain = Grain::default();
            values.iter().for_each(|v| grain.add(*v));
            assert_eq!(grain.get(), expected, "{values:?}");
        };
        check(&[30_000_000, 50_000_000, 0], Some(10_000_000));
        check(&[30_000_000, 50_000_003], Some(1));
        check(&[0, 0], None);
    }
}
