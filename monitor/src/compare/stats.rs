//! Figures of many numbers in bounded memory: a distribution, and a history in equal spans of time. Pure.

use std::collections::BTreeMap;

use crate::reconcile::{real, shape::Span};

/// A distribution of whole numbers: counts in buckets with a relative width of at most 1/16.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Distribution {
    buckets: BTreeMap<u32, u64>,
    count: u64,
    sum: f64,
    largest: u64,
}

/// Linear steps in each power of two.
const STEPS: u32 = 16;

impl Distribution {
    /// Adds a number.
    pub fn add(&mut self, value: u64) {
        self.add_many(value, 1);
    }

    /// Adds a number that came so often.
    pub fn add_many(&mut self, value: u64, times: u64) {
        *self.buckets.entry(bucket(value)).or_default() += times;
        self.count += times;
        self.sum += real(value) * real(times);
        self.largest = self.largest.max(value);
    }

    /// How many numbers there are.
    #[must_use]
    pub fn count(&self) -> u64 {
        self.count
    }

    /// Their mean.
    #[must_use]
    pub fn mean(&self) -> f64 {
        if self.count == 0 { 0.0 } else { self.sum / real(self.count) }
    }

    /// The largest.
    #[must_use]
    pub fn largest(&self) -> u64 {
        self.largest
    }

    /// The number that so many per cent do not exceed, at most 1/16 too large.
    #[must_use]
    pub fn percentile(&self, per_cent: u64) -> u64 {
        let wanted = (self.count * per_cent).div_ceil(100).max(1);
        let mut seen = 0;
        for (index, count) in &self.buckets {
            seen += count;
            if seen >= wanted {
                return range(*index).1.saturating_sub(1).min(self.largest);
            }
        }
        self.largest
    }

    /// The buckets, as `(from, to, count)`.
    pub fn buckets(&self) -> impl Iterator<Item = (u64, u64, u64)> {
        self.buckets.iter().map(|(index, count)| {
            let (low, high) = range(*index);
            (low, high, *count)
        })
    }
}

fn bucket(value: u64) -> u32 {
    if value < u64::from(STEPS) {
        return u32::try_from(value).unwrap_or(0);
    }
    let octave = value.ilog2() - STEPS.ilog2();
    let step = u32::try_from(value >> octave).unwrap_or(0) - STEPS;
    (octave + 1) * STEPS + step
}

fn range(index: u32) -> (u64, u64) {
    let (octave, step) = (index / STEPS, u64::from(index % STEPS));
    if octave == 0 {
        return (step, step + 1);
    }
    let low = (u64::from(STEPS) + step) << (octave - 1);
    (low, low.saturating_add(1 << (octave - 1)))
}

/// Growth of several counters over time, in at most [`History::SPANS`] equal spans: when the time is over, two
/// spans become one.
#[derive(Clone, Debug, PartialEq)]
pub struct History<const N: usize> {
    begin_ns: Option<u64>,
    span_ns: u64,
    spans: Vec<[f64; N]>,
}

impl<const N: usize> Default for History<N> {
    fn default() -> Self {
        Self { begin_ns: None, span_ns: 100_000_000, spans: Vec::new() }
    }
}

impl<const N: usize> History<N> {
    /// How many spans there are at most.
    pub const SPANS: usize = 120;

    /// Adds growth from one moment to another, evenly spread.
    pub fn add(&mut self, (from_ns, to_ns): (u64, u64), growth: [f64; N]) {
        let begin = *self.begin_ns.get_or_insert(from_ns);
        if to_ns <= from_ns || from_ns < begin {
            return;
        }
        while (to_ns - begin) / self.span_ns >= Self::SPANS as u64 {
            self.halve();
        }
        let (first, last) = ((from_ns - begin) / self.span_ns, (to_ns - 1 - begin) / self.span_ns);
        let needed = usize::try_from(last).map_or(0, |last| last + 1);
        if self.spans.len() < needed {
            self.spans.resize(needed, [0.0; N]);
        }
        for index in first..=last {
            let (low, high) = (begin + index * self.span_ns, begin + (index + 1) * self.span_ns);
            let share = real(to_ns.min(high) - from_ns.max(low)) / real(to_ns - from_ns);
            let Some(span) = usize::try_from(index).ok().and_then(|i| self.spans.get_mut(i)) else { return };
            for (sum, growth) in span.iter_mut().zip(growth) {
                *sum += growth * share;
            }
        }
    }

    fn halve(&mut self) {
        self.span_ns *= 2;
        self.spans = self
            .spans
            .chunks(2)
            .map(|two| {
                let mut sum = [0.0; N];
                for span in two {
                    sum.iter_mut().zip(span).for_each(|(a, b)| *a += b);
                }
                sum
            })
            .collect();
    }

    /// Length of a span, nanoseconds.
    #[must_use]
    pub fn span_ns(&self) -> u64 {
        self.span_ns
    }

    /// When the first span begins, nanoseconds on `CLOCK_MONOTONIC`; `None` if nothing was added.
    #[must_use]
    pub fn begin_ns(&self) -> Option<u64> {
        self.begin_ns
    }

    /// The spans.
    #[must_use]
    pub fn spans(&self) -> &[[f64; N]] {
        &self.spans
    }
}

impl History<2> {
    /// As pairs of reference and other source.
    #[must_use]
    pub fn pairs(&self) -> Vec<Span> {
        self.spans.iter().map(|[reference, other]| Span { reference: *reference, other: *other }).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buckets_hold_their_numbers_and_are_narrow() {
        for value in (0..5_000).chain([1 << 40, (1 << 40) + 12_345, u64::MAX / 3, u64::MAX]) {
            let (low, high) = range(bucket(value));
            assert!(low <= value && (value < high || high == u64::MAX), "{value}: {low} {high}");
            assert!(high - low <= 1 + low / 16, "{value}: {low} {high}");
        }
    }

    #[test]
    fn percentiles() {
        let mut of = Distribution::default();
        (1..=1_000).for_each(|v| of.add(v));
        for (per_cent, exact) in [(50, 500), (95, 950), (99, 990), (100, 1_000)] {
            let found = of.percentile(per_cent);
            assert!(found >= exact && found <= exact + exact / 16, "{per_cent}: {found}");
        }
        assert_eq!((of.largest(), of.count()), (1_000, 1_000));
        assert!((of.mean() - 500.5).abs() < 1e-9);
        assert_eq!(Distribution::default().percentile(50), 0);
    }

    #[test]
    fn a_history_keeps_sums_however_long_it_gets() {
        let mut history = History::<2>::default();
        for second in 0..100_000u64 {
            history.add((second * 1_000_000_000, (second + 1) * 1_000_000_000), [1.0, 2.0]);
        }
        assert!(history.spans().len() <= History::<2>::SPANS);
        let sum: f64 = history.spans().iter().map(|s| s[0]).sum();
        assert!((sum - 100_000.0).abs() < 1e-3, "{sum}");
        let middle = history.spans()[10];
        assert!((middle[1] - 2.0 * middle[0]).abs() < 1e-6);
    }
}
