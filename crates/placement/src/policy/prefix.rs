//! The holder of the longest prefix, unless its queue is much longer than the shortest.
//!
//! What each worker of a side holds itself counts; nothing is pulled from peers. Decode goes by least load.

use super::{Policy, Stage, least_loaded};
use crate::candidate::sane_seconds;
use crate::{Candidate, Request};

/// The holder of the longest prefix; without one, or when it is overloaded, the least loaded.
pub struct Prefix;

/// A queue is too long when it exceeds the shortest by this much, in seconds and as a factor.
const IMBALANCE_SECONDS: f64 = 0.5;
const IMBALANCE_FACTOR: f64 = 1.5;

impl Policy for Prefix {
    fn best(&self, stage: Stage, request: &Request, candidates: &[Candidate], side: &[usize]) -> usize {
        let least = least_loaded::LeastLoaded.best(stage, request, candidates, side);
        if stage == Stage::Decode {
            return least;
        }
        let seconds = |index: usize| sane_seconds(candidates[index].queue_seconds);
        let shortest = seconds(least);
        let longest = side.iter().map(|&index| seconds(index)).fold(0.0, f64::max);
        if longest - shortest > IMBALANCE_SECONDS && longest > IMBALANCE_FACTOR * shortest {
            return least;
        }
        let held = request.held.iter().filter(|held| held.tokens > 0 && side.contains(&held.candidate));
        let best = held.max_by(|a, b| {
            (a.tokens.cmp(&b.tokens)).then(seconds(b.candidate).total_cmp(&seconds(a.candidate)))
        });
        best.map_or(least, |held| held.candidate)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Held, Tier};

    #[test]
    fn the_holder_gets_it_unless_its_queue_is_far_longer() {
        let candidate = |queue_seconds| Candidate {
            queue_seconds,
            model: Some(crate::predictor::PROFILES[0].step),
            ..Candidate::default()
        };
        let held = |candidate, tokens| Held { candidate, device_tokens: tokens, tokens, tier: Tier::Device };
        let request =
            Request { prompt_tokens: 100, held: vec![held(0, 32), held(2, 64)], ..Request::default() };
        let choose = |queues: [f64; 3]| {
            let candidates = queues.map(candidate);
            Prefix.choose(&request, &candidates).expect("somebody can").prefill
        };
        assert_eq!(choose([0.0, 0.0, 0.3]), 2);
        assert_eq!(choose([0.0, 0.0, 3.0]), 0, "then the least loaded");
    }
}
