//! How long answers get: what is kept free for those that run, so that they need not be preempted.

/// Weight of a new answer.
const NEWEST: f64 = 0.05;
/// Tokens that are kept free at most for one that has passed the mean.
const TAIL_MAX: u32 = 64;

/// A moving average of how many tokens answers have in the end.
#[derive(Clone, Debug)]
pub(crate) struct Lengths {
    mean: f64,
    /// Nothing is kept free at all.
    off: bool,
}

impl Lengths {
    /// Where nothing is known but a guess. Of zero, nothing is learnt and nothing kept free.
    pub(crate) fn new(guess: u32) -> Lengths {
        Lengths { mean: f64::from(guess), off: guess == 0 }
    }

    /// An answer has ended with so many tokens.
    pub(crate) fn observe(&mut self, tokens: u32) {
        self.mean += NEWEST * (f64::from(tokens) - self.mean);
    }

    /// Tokens that an answer of `drawn` tokens will still get, at most `left`. One that has passed the mean is
    /// taken to be half way: lengths have long tails, and the longer it is the longer it will be.
    pub(crate) fn growth(&self, drawn: u32, left: u32) -> u32 {
        if self.off {
            return 0;
        }
        let rest = (self.mean - f64::from(drawn)).max(f64::from((drawn / 2).min(TAIL_MAX)));
        (rest.ceil() as u32).min(left)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn growth_follows_what_has_been_seen_and_never_passes_what_is_left() {
        let mut lengths = Lengths::new(128);
        assert_eq!(lengths.growth(0, 1000), 128);
        assert_eq!(lengths.growth(0, 10), 10);
        for _ in 0..200 {
            lengths.observe(1000);
        }
        assert!((990..=1000).contains(&lengths.growth(0, 5000)), "{}", lengths.growth(0, 5000));
        assert!((490..=500).contains(&lengths.growth(500, 5000)), "{}", lengths.growth(500, 5000));
        assert_eq!(lengths.growth(2000, 5000), 64, "beyond the mean something is still to come");
        assert_eq!(lengths.growth(2000, 0), 0);
        let mut off = Lengths::new(0);
        off.observe(1000);
        assert_eq!(off.growth(0, 5000), 0);
    }
}
