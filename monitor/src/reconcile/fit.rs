//! What makes two counters fit that contradict each other: a factor between them, or something lost or added at one
//! moment. Pure.
//!
//! As everywhere in `reconcile`, a reading of one source only says that the other's counter was between two numbers then.
//! A hypothesis fits if one constant (before and after the moment: two) makes all readings right at once. So bursts
//! of which nobody knows when exactly they came prove nothing, and quiet times prove the most. A bounded number of
//! readings is kept, of each few the one that bounds most tightly.

/// What the other source said while the reference was between two numbers, known causes taken off.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Point {
    /// When, nanoseconds on `CLOCK_MONOTONIC`.
    pub at_ns: u64,
    /// The other source.
    pub other: f64,
    /// The reference, at least.
    pub low: f64,
    /// At most.
    pub high: f64,
}

/// The readings kept.
#[derive(Clone, Debug, Default)]
pub struct Points {
    kept: Vec<Point>,
    /// The tightest of those that came since the last that is kept.
    best: Option<Point>,
    since: u32,
    /// Of so many readings one is kept; 0: of each.
    every: u32,
}

/// What makes the readings fit.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Fit {
    /// The other counts so much more all the time (less, if negative): 0.01 is one per cent.
    Factor(f64),
    /// It has so much more (less, if negative) from about then on.
    Step {
        /// When, nanoseconds on `CLOCK_MONOTONIC`.
        at_ns: u64,
        /// By how much.
        amount: f64,
    },
}

/// The bounds on the constant between the counters.
#[derive(Clone, Copy, Debug)]
struct Constant {
    at_least: f64,
    at_most: f64,
}

impl Points {
    const KEPT: usize = 64;
    /// A hypothesis may leave so much of the contradiction.
    const FITS: f64 = 0.1;
    /// Readings before and after a step.
    const BESIDE: usize = 2;

    /// Adds a reading, later than those before.
    pub fn add(&mut self, point: Point) {
        let width = |p: &Point| p.high - p.low;
        if self.best.is_none_or(|best| width(&point) <= width(&best)) {
            self.best = Some(point);
        }
        self.since += 1;
        if self.since < self.every {
            return;
        }
        self.since = 0;
        self.kept.extend(self.best.take());
        if self.kept.len() >= Self::KEPT {
            let tighter = |two: &[Point]| two.iter().copied().min_by(|a, b| width(a).total_cmp(&width(b)));
            self.kept = self.kept.chunks(2).filter_map(tighter).collect();
            self.every = self.every.max(1) * 2;
        }
    }

    /// Forgets everything: a counter started anew.
    pub fn clear(&mut self) {
        *self = Self::default();
    }

    /// What makes the readings fit, and which share of the contradiction it leaves; `None` if they do not contradict
    /// each other, or nothing does.
    #[must_use]
    pub fn fit(&self) -> Option<(Fit, f64)> {
        let points: Vec<Point> = self.kept.iter().copied().chain(self.best).collect();
        let (first, contradiction) = (*points.first()?, constant(&points, 0.0).contradiction());
        if contradiction <= 0.0 {
            return None;
        }
        let points: Vec<Point> = points.iter().map(|p| p.since(first)).collect();
        let candidates = [factor(&points), step(&points)].into_iter().flatten();
        let best = candidates.min_by(|a, b| a.1.total_cmp(&b.1))?;
        let share = best.1 / contradiction;
        (share <= Self::FITS).then_some((best.0, share))
    }
}

impl Point {
    /// Small numbers are more exact.
    fn since(self, first: Self) -> Self {
        let (other, low, high) = (self.other - first.other, self.low - first.low, self.high - first.low);
        Self { at_ns: self.at_ns, other, low, high }
    }
}

impl Constant {
    /// What no constant makes right.
    fn contradiction(self) -> f64 {
        (self.at_least - self.at_most).max(0.0)
    }

    fn middle(self) -> f64 {
        f64::midpoint(self.at_least, self.at_most)
    }
}

fn constant(points: &[Point], factor: f64) -> Constant {
    let none = Constant { at_least: f64::NEG_INFINITY, at_most: f64::INFINITY };
    points.iter().fold(none, |sum, p| Constant {
        at_least: sum.at_least.max(p.other - (1.0 + factor) * p.high),
        at_most: sum.at_most.min(p.other - (1.0 + factor) * p.low),
    })
}

/// The factor that leaves least. What is left falls towards it from both sides, so that it can be closed in on.
fn factor(points: &[Point]) -> Option<(Fit, f64)> {
    const ROUNDS: u32 = 80;
    let left = |factor: f64| {
        let of = constant(points, factor);
        of.at_least - of.at_most
    };
    let (mut low, mut high) = (-1.0, 10.0);
    for _ in 0..ROUNDS {
        let third = (high - low) / 3.0;
        let (a, b) = (low + third, high - third);
        if left(a) <= left(b) {
            high = b;
        } else {
            low = a;
        }
    }
    let best = f64::midpoint(low, high);
    (best != 0.0).then(|| (Fit::Factor(best), left(best).max(0.0)))
}

fn step(points: &[Point]) -> Option<(Fit, f64)> {
    let at = |place: usize| {
        let (before, after) = points.split_at(place);
        let (one, two) = (constant(before, 0.0), constant(after, 0.0));
        let fit = Fit::Step { at_ns: points[place].at_ns, amount: two.middle() - one.middle() };
        (fit, one.contradiction() + two.contradiction())
    };
    let places = Points::BESIDE..=points.len().checked_sub(Points::BESIDE)?;
    places.filter(|p| *p < points.len()).map(at).min_by(|a, b| a.1.total_cmp(&b.1))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Bursts with quiet times between them: what the reference shows at a moment, and between which numbers it was by
    /// readings before and after.
    fn points(count: u32, other: impl Fn(u32, f64) -> f64) -> Points {
        let reference = |i: u32| f64::from(i / 5) * 1_000.0 + f64::from((i % 5).min(2)) * 500.0;
        let mut points = Points::default();
        for i in 1..count {
            let (low, high) = (reference(i - 1), reference(i + 1));
            let at_ns = u64::from(i) * 1_000_000_000;
            points.add(Point { at_ns, other: 7_000.0 + other(i, reference(i)), low, high });
        }
        points
    }

    #[test]
    fn what_can_be_right_needs_no_explanation() {
        assert_eq!(points(60, |_, v| v).fit(), None);
        assert_eq!(Points::default().fit(), None);
        // Off by less than the readings leave room for.
        assert_eq!(points(60, |i, v| v + f64::from(i % 5 == 1) * 100.0).fit(), None);
    }

    #[test]
    fn a_factor_is_found_whatever_the_bursts() {
        for wanted in [0.01, -0.01, 0.5, -0.3] {
            let Some((Fit::Factor(found), _)) = points(400, |_, v| v * (1.0 + wanted)).fit() else {
                panic!("{wanted}")
            };
            assert!((found - wanted).abs() < 0.03 * wanted.abs(), "{found} {wanted}");
        }
    }

    #[test]
    fn what_was_lost_at_one_moment_is_found_with_its_place() {
        for count in [40, 300] {
            let lost = points(count, |i, v| if i < 21 { v } else { v - 600.0 }).fit();
            let Some((Fit::Step { at_ns, amount }, _)) = lost else { panic!("{lost:?}") };
            let apart = at_ns.abs_diff(21_000_000_000);
            assert!(apart <= u64::from(count) * 1_000_000_000 / 16, "{at_ns} of {count}");
            assert!((amount + 600.0).abs() < 60.0, "{amount}");
        }
    }

    #[test]
    fn what_comes_and_goes_is_neither() {
        assert_eq!(points(60, |i, v| v + f64::from(i / 7 % 2) * 900.0).fit(), None);
    }

    #[test]
    fn memory_is_bounded_and_tight_readings_stay() {
        let mut of = Points::default();
        for i in 0..100_000u32 {
            let at = f64::from(i);
            let high = if i % 64 == 10 { at } else { at + 500.0 };
            of.add(Point { at_ns: u64::from(i), other: at, low: at, high });
        }
        assert!(of.kept.len() <= Points::KEPT);
        let tight = of.kept.iter().filter(|p| p.low == p.high).count();
        assert!(tight * 10 >= of.kept.len() * 9, "{tight} of {}", of.kept.len());
    }
}
