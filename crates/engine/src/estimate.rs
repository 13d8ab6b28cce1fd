//! How long steps take: a running average for each power of two of token rows.

use std::time::Duration;

/// Weight of the newest step in an average.
const NEWEST: f64 = 0.2;
/// Multiplications per second assumed before anything was measured: few, since a watchdog waits by it.
const RATE_FIRST: f64 = 1e9;

/// Running averages.
pub(crate) struct Estimate {
    /// Multiplications per token row.
    work: f64,
    /// Seconds of a step of 2^i to 2^(i+1) - 1 token rows.
    averages: [Option<f64>; 24],
}

impl Estimate {
    /// For a model of so many weights.
    pub(crate) fn new(weights: u64) -> Estimate {
        Estimate { work: weights as f64, averages: [None; 24] }
    }

    /// Takes in what a step took.
    pub(crate) fn observe(&mut self, tokens: usize, took: Duration) {
        let average = &mut self.averages[bucket(tokens)];
        let took = took.as_secs_f64();
        *average = Some(average.map_or(took, |average| average + NEWEST * (took - average)));
    }

    /// What a step should take. Without a measurement of its size: scaled from the next smaller size, or that of
    /// the next larger, or from the model's size alone.
    pub(crate) fn expected(&self, tokens: usize) -> Duration {
        let at = bucket(tokens);
        let known = |bucket: usize| self.averages[bucket].map(|average| (bucket, average));
        let smaller = (0..=at).rev().find_map(known);
        let larger = (at + 1..self.averages.len()).find_map(known);
        let seconds = match (smaller, larger) {
            (Some((bucket, average)), _) => average * f64::from(1_u32 << (at - bucket)),
            (None, Some((_, average))) => average,
            (None, None) => (1.0 + tokens as f64) * self.work / RATE_FIRST,
        };
        Duration::from_secs_f64(seconds)
    }
}

fn bucket(tokens: usize) -> usize {
    (tokens.max(1).ilog2() as usize).min(23)
}

#[cfg(test)]
mod tests {
    use super::*;

    const MILLI: Duration = Duration::from_millis(1);

    #[test]
    fn a_size_never_seen_is_scaled_from_a_smaller_one_or_taken_from_a_larger() {
        let mut estimate = Estimate::new(1_000_000);
        assert_eq!(estimate.expected(1), 2 * MILLI);
        estimate.observe(4, 8 * MILLI);
        assert_eq!(estimate.expected(5), 8 * MILLI);
        assert_eq!(estimate.expected(32), 64 * MILLI);
        assert_eq!(estimate.expected(1), 8 * MILLI);
    }

    #[test]
    fn the_average_moves_towards_what_is_observed() {
        let mut estimate = Estimate::new(1);
        estimate.observe(1, 10 * MILLI);
        for _ in 0..50 {
            estimate.observe(1, 20 * MILLI);
        }
        let expected = estimate.expected(1).as_secs_f64();
        assert!((expected - 0.02).abs() < 1e-4, "{expected}");
    }
}
