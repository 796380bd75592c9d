//! What an unexplained difference looks like over time: a factor, or something lost at one moment. Pure.
//!
//! Works on sums over a bounded number of equal spans of time, so that a long stream needs no more memory.

/// Growth of both counters in one span of time.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Span {
    /// By the reference.
    pub reference: f64,
    /// By the other source.
    pub other: f64,
}

/// What the difference looks like.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Shape {
    /// The other counts this much more (less, if negative) all the time: 0.01 is one per cent.
    Factor(f64),
    /// So much more (less, if negative) in the span of that number, and the same before and after.
    Step {
        /// Number of the span.
        span: usize,
        /// By how much.
        amount: f64,
    },
}

/// Fewer spans than these say nothing about a shape.
const ENOUGH: usize = 12;
/// A step needs as many spans on either side.
const BESIDE: usize = 3;
/// A shape has to explain so much of the variation, …
const EXPLAINED: f64 = 0.85;
/// … and be so much larger than what it leaves.
const ABOVE_NOISE: f64 = 4.0;

/// The shape of a difference, if it has one that stands out.
#[must_use]
pub fn shape(spans: &[Span]) -> Option<Shape> {
    if spans.len() < ENOUGH {
        return None;
    }
    let mut sum = 0.0;
    let difference: Vec<f64> = spans
        .iter()
        .map(|s| {
            sum += s.other - s.reference;
            sum
        })
        .collect();
    let all = spread(&difference);
    if all <= 0.0 {
        return None;
    }
    let candidates = [factor(spans, &difference), step(&difference)];
    let best = candidates.into_iter().flatten().min_by(|a, b| a.left.total_cmp(&b.left))?;
    let noise = (best.left / real(spans.len())).sqrt();
    let stands_out = best.left <= (1.0 - EXPLAINED) * all && best.effect > ABOVE_NOISE * noise;
    stands_out.then_some(best.shape)
}

struct Candidate {
    shape: Shape,
    /// Sum of squares that it leaves.
    left: f64,
    /// How much it changes, in the counters' unit.
    effect: f64,
}

fn factor(spans: &[Span], difference: &[f64]) -> Option<Candidate> {
    let mut sum = 0.0;
    let reference: Vec<f64> = spans
        .iter()
        .map(|s| {
            sum += s.reference;
            sum
        })
        .collect();
    let (mx, my) = (mean(&reference), mean(difference));
    let (mut xy, mut xx) = (0.0, 0.0);
    for (x, y) in reference.iter().zip(difference) {
        xy += (x - mx) * (y - my);
        xx += (x - mx) * (x - mx);
    }
    if xx <= 0.0 {
        return None;
    }
    let slope = xy / xx;
    let left: Vec<f64> = reference.iter().zip(difference).map(|(x, y)| y - slope * x).collect();
    Some(Candidate { shape: Shape::Factor(slope), left: spread(&left), effect: (slope * sum).abs() })
}

fn step(difference: &[f64]) -> Option<Candidate> {
    let at = |span: usize| {
        let (before, after) = difference.split_at(span);
        let amount = mean(after) - mean(before);
        let left = spread(before) + spread(after);
        Candidate { shape: Shape::Step { span, amount }, left, effect: amount.abs() }
    };
    let places = BESIDE..=difference.len().checked_sub(BESIDE)?;
    places.map(at).min_by(|a, b| a.left.total_cmp(&b.left))
}

fn mean(values: &[f64]) -> f64 {
    values.iter().sum::<f64>() / real(values.len().max(1))
}

/// Sum of squares around the mean.
fn spread(values: &[f64]) -> f64 {
    let mean = mean(values);
    values.iter().map(|v| (v - mean) * (v - mean)).sum()
}

#[expect(clippy::cast_precision_loss, reason = "a number of spans is small")]
fn real(number: usize) -> f64 {
    number as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    /// 60 spans of uneven traffic, with `change` made to what the other source says.
    fn spans(change: impl Fn(usize, f64) -> f64) -> Vec<Span> {
        (0..60usize)
            .map(|i| {
                let reference = [100.0, 90.0, 140.0, 0.0, 70.0][i % 5];
                let jitter = [0.5, -0.5, 0.25, -0.25][i % 4];
                Span { reference, other: change(i, reference) + jitter }
            })
            .collect()
    }

    #[test]
    fn a_factor_is_seen() {
        let Some(Shape::Factor(found)) = shape(&spans(|_, v| v * 1.01)) else { panic!() };
        assert!((found - 0.01).abs() < 0.001, "{found}");
    }

    #[test]
    fn something_lost_is_seen_with_its_place() {
        let lost = |i, v| if i == 20 { 0.0 } else { v };
        let Some(Shape::Step { span, amount }) = shape(&spans(lost)) else { panic!() };
        assert_eq!(span, 20);
        assert!((amount + 100.0).abs() < 2.0, "{amount}");
    }

    #[test]
    fn noise_and_little_have_no_shape() {
        assert_eq!(shape(&spans(|_, v| v)), None);
        assert_eq!(shape(&spans(|_, v| v * 1.01)[..8]), None);
        assert_eq!(shape(&[Span::default(); 40]), None);
    }
}
