//! How short answers are: what nearly all of them have, followed answer by answer.

/// Share of answers that may be shorter.
pub(crate) const SHORTER: f64 = 0.04;
/// How far one answer moves the estimate, as a share of it.
const STEP: f64 = 0.1;
/// Before any answer was seen: what nearly all of those have that are 256 tokens long on average and end at random.
pub(crate) const SHORT_TOKENS: f64 = SHORTER * 256.0;

/// A low quantile of the tokens that answers have after their first, by stochastic approximation (Robbins and Monro,
/// 1951) of its logarithm: whoever is shorter lowers it by as much more as he is rarer.
#[derive(Clone, Debug)]
pub(crate) struct Shortest {
    tokens: f64,
    shares: ShortShares,
}

/// The shares of answers that have one token after their first, two, and so on.
pub type ShortShares = [f64; 8];

/// Weight of a new answer in the shares.
const NEWEST: f64 = 0.002;

impl Default for Shortest {
    fn default() -> Self {
        Shortest { tokens: SHORT_TOKENS, shares: ShortShares::default() }
    }
}

impl Shortest {
    /// An answer has ended. Those of one token have no gap that could be too long, and say nothing.
    pub(crate) fn answered(&mut self, tokens: u32) {
        let further = f64::from(tokens.saturating_sub(1));
        if further == 0.0 {
            return;
        }
        let towards = if further < self.tokens { SHORTER - 1.0 } else { SHORTER };
        self.tokens = (self.tokens * (STEP * towards).exp()).clamp(1.0, 1e6);
        for (few, share) in (1..).zip(&mut self.shares) {
            *share += NEWEST * (f64::from(u8::from(further == f64::from(few))) - *share);
        }
    }

    pub(crate) fn shares(&self) -> ShortShares {
        self.shares
    }

    pub(crate) fn tokens(&self) -> f64 {
        self.tokens
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The estimate, averaged over the later half of many answers with these lengths.
    fn after(length: impl Fn(u32) -> u32) -> f64 {
        let mut shortest = Shortest::default();
        let mut sum = 0.0;
        for i in 0..20_000 {
            shortest.answered(length(i));
            sum += if i >= 10_000 { shortest.tokens() } else { 0.0 };
        }
        sum / 10_000.0
    }

    /// From nought to one, spread evenly and without order.
    fn even(i: u32) -> f64 {
        (f64::from(i) * 0.618_033_988_749_895).fract()
    }

    #[test]
    fn it_follows_what_nearly_all_answers_have() {
        let uniform = after(|i| 1 + (even(i) * 1000.0) as u32);
        assert!((30.0..50.0).contains(&uniform), "{uniform}");
        let random = after(|i| 2 + (-200.0 * (1.0 - even(i)).ln()) as u32);
        assert!((6.0..12.0).contains(&random), "a 25th of the mean: {random}");
        // A quarter of the answers are very short, whatever the mean is.
        let mixed = after(|i| if i % 4 == 0 { 3 } else { 400 });
        assert!((1.0..3.5).contains(&mixed), "{mixed}");
        assert!((90.0..115.0).contains(&after(|_| 101)), "all alike");
    }

    #[test]
    fn shares_are_those_of_answers_with_few_tokens_after_the_first() {
        let mut shortest = Shortest::default();
        // Answers of one token say nothing; of the others a quarter has two more and a quarter eight more.
        for i in 0..20_000 {
            shortest.answered([1, 3, 400, 9, 400][i % 5]);
        }
        let shares = shortest.shares();
        assert!((0.24..0.26).contains(&shares[1]) && (0.24..0.26).contains(&shares[7]), "{shares:?}");
        assert_eq!(shares[0] + shares[2], 0.0);
    }

    #[test]
    fn it_stays_within_bounds_whatever_comes() {
        let mut shortest = Shortest::default();
        for tokens in [0, 1, u32::MAX, 2, 0] {
            for _ in 0..10_000 {
                shortest.answered(tokens);
            }
            assert!((1.0..=1e6).contains(&shortest.tokens()));
        }
        let before = shortest.tokens();
        shortest.answered(1);
        assert_eq!(shortest.tokens(), before, "one token has no gap");
    }
}
