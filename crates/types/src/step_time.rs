//! How long an engine step takes: six numbers that stand for a model on a device.

use serde::{Deserialize, Serialize};

/// `max(b0 + b1·T, a0 + a1·T) + a2·A + b2·C` seconds for a step with T new tokens, A attention pairs of its
/// prompt chunks and C context tokens of its decodes. The first line is bound by memory, the second by
/// arithmetic.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct StepTime {
    /// Seconds of a step bound by arithmetic, whatever it computes.
    pub a0: f64,
    /// Seconds per new token of such a step.
    pub a1: f64,
    /// Seconds per attention pair.
    pub a2: f64,
    /// Seconds of a step bound by memory, whatever it computes.
    pub b0: f64,
    /// Seconds per new token of such a step.
    pub b1: f64,
    /// Seconds per context token of decodes.
    pub b2: f64,
}

/// Attention pairs of a chunk of `tokens` behind `before` computed tokens.
#[inline]
pub fn attention_pairs(tokens: u32, before: u32) -> f64 {
    let (n, before) = (f64::from(tokens), f64::from(before));
    n * n / 2.0 + n * before
}

impl StepTime {
    /// From milliseconds, microseconds per token and nanoseconds per pair or context token, as tables print them.
    pub const fn from_table(a: [f64; 3], b: [f64; 3]) -> StepTime {
        StepTime {
            a0: a[0] * 1e-3,
            a1: a[1] * 1e-6,
            a2: a[2] * 1e-9,
            b0: b[0] * 1e-3,
            b1: b[1] * 1e-6,
            b2: b[2] * 1e-9,
        }
    }

    /// Seconds of one step.
    #[inline]
    pub fn step(&self, new_tokens: f64, pairs: f64, context: f64) -> f64 {
        (self.b0 + self.b1 * new_tokens).max(self.a0 + self.a1 * new_tokens)
            + self.a2 * pairs
            + self.b2 * context
    }

    /// Seconds to compute `tokens` of a prompt behind `before` others, in steps of `chunk` tokens that it shares
    /// with other prompts: its own work and its part of what every step costs.
    #[inline]
    pub fn prefill(&self, tokens: u32, before: u32, chunk: u32) -> f64 {
        let n = f64::from(tokens);
        self.a0 * n / f64::from(chunk.max(1)) + self.a1 * n + self.a2 * attention_pairs(tokens, before)
    }

    /// Seconds to compute `tokens` of a prompt behind `before` others at once and alone.
    pub fn prefill_alone(&self, tokens: u32, before: u32) -> f64 {
        self.a0 + self.a1 * f64::from(tokens) + self.a2 * attention_pairs(tokens, before)
    }

    /// Every time multiplied.
    pub fn scaled(&self, factor: f64) -> StepTime {
        StepTime {
            a0: self.a0 * factor,
            a1: self.a1 * factor,
            a2: self.a2 * factor,
            b0: self.b0 * factor,
            b1: self.b1 * factor,
            b2: self.b2 * factor,
        }
    }

    /// Whether every number can be a time: finite, none negative, and steps cost something.
    pub fn is_sane(&self) -> bool {
        let all = [self.a0, self.a1, self.a2, self.b0, self.b1, self.b2];
        all.iter().all(|x| x.is_finite() && *x >= 0.0) && self.a0.max(self.b0) > 0.0
    }

    /// The most tokens of one prompt, behind `before` of its tokens, that fit into `seconds` beside `new_tokens`
    /// others, `pairs` and `context`; at most `most`.
    pub fn tokens_within(
        &self,
        seconds: f64,
        new_tokens: f64,
        pairs: f64,
        context: f64,
        before: u32,
        most: u32,
    ) -> u32 {
        // What one more token costs while arithmetic binds is at least what it costs while memory binds, in every
        // profile; a bisection needs no such assumption and 20 rounds at most.
        let fits = |n: u32| {
            let pairs = pairs + attention_pairs(n, before);
            self.step(new_tokens + f64::from(n), pairs, context) <= seconds
        };
        if fits(most) {
            return most;
        }
        let (mut low, mut high) = (0, most);
        while high - low > 1 {
            let middle = low + (high - low) / 2;
            if fits(middle) { low = middle } else { high = middle }
        }
        low
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const H200: StepTime = StepTime::from_table([3.84, 19.09, 0.913], [5.09, 11.7, 33.2]);

    #[test]
    fn a_step_costs_the_higher_line_and_its_attention() {
        let close =
            |seconds: f64, ms: f64| assert!((seconds * 1e3 - ms).abs() < 0.02, "{seconds} s, {ms} ms");
        close(H200.step(1.0, 0.0, 2048.0), 5.17);
        close(H200.step(2048.0, attention_pairs(2048, 0), 0.0), 3.84 + 39.096 + 1.915);
        close(H200.prefill(1024, 1024, 2048), 1.92 + 19.548 + 0.913e-6 * (524_288.0 + 1_048_576.0));
    }

    #[test]
    fn as_many_tokens_fit_as_the_time_allows() {
        let n = H200.tokens_within(0.020, 100.0, 0.0, 100_000.0, 500, 4096);
        let with = |n: u32| H200.step(100.0 + f64::from(n), attention_pairs(n, 500), 100_000.0);
        assert!(with(n) <= 0.020 && with(n + 1) > 0.020, "{n}");
        assert_eq!(H200.tokens_within(0.001, 0.0, 0.0, 0.0, 0, 100), 0);
        assert_eq!(H200.tokens_within(9.0, 0.0, 0.0, 0.0, 0, 100), 100);
    }
}
