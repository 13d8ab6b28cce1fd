//! The worker of a side with the least work: queued prefill for the first stage, tokens held for the second.
//!
//! Where a worker's step times are unknown, waiting prompt tokens, sequences and KV in use stand in for both.

use super::{Policy, Stage};
use crate::candidate::sane_seconds;
use crate::{Candidate, Request};

/// Prompt tokens that weigh as much as one sequence in flight: about what one decode step costs in prefill.
const TOKENS_PER_SEQUENCE: u64 = 64;
/// What a running decode weighs beside queued prefill: enough to break ties.
const SECONDS_PER_DECODE: f64 = 50e-6;

/// The worker of a side with the least work; equals go round.
pub struct LeastLoaded;

impl Policy for LeastLoaded {
    fn best(&self, stage: Stage, request: &Request, candidates: &[Candidate], side: &[usize]) -> usize {
        let known = side.iter().all(|&index| candidates[index].model.is_some());
        let work = |index: usize| {
            let c = &candidates[index];
            match stage {
                Stage::Prefill if known => {
                    ((sane_seconds(c.queue_seconds) + f64::from(c.decodes) * SECONDS_PER_DECODE) * 1e9) as u64
                }
                Stage::Decode if known => c.decode_tokens,
                _ => {
                    let sequences = u64::from(c.in_flight.max(c.running.saturating_add(c.waiting)));
                    let tokens = c.waiting_tokens.saturating_add(sequences * TOKENS_PER_SEQUENCE);
                    // KV in use breaks ties only.
                    tokens.saturating_mul(128).saturating_add((c.kv_usage.clamp(0.0, 1.0) * 100.0) as u64)
                }
            }
        };
        least(request.ordinal, side, work)
    }
}

/// The one with the least work; equals go round by the ordinal.
pub(crate) fn least(ordinal: u64, side: &[usize], work: impl Fn(usize) -> u64) -> usize {
    let (mut best, mut least, mut equals) = (side[0], u64::MAX, 0u64);
    for &index in side {
        let work = work(index);
        if work < least || equals == 0 {
            (best, least, equals) = (index, work, 1);
        } else if work == least {
            equals += 1;
        }
    }
    if equals == 1 {
        return best;
    }
    let nth = (ordinal % equals) as usize;
    side.iter().copied().filter(|&index| work(index) == least).nth(nth).unwrap_or(best)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn choose(loads: &[(u32, u64)], ordinal: u64) -> usize {
        let candidates: Vec<Candidate> = loads
            .iter()
            .map(|&(in_flight, waiting_tokens)| Candidate {
                in_flight,
                waiting_tokens,
                ..Candidate::default()
            })
            .collect();
        let request = Request { ordinal, prompt_tokens: 8, max_tokens: 8, ..Request::default() };
        LeastLoaded.choose(&request, &candidates).expect("somebody can").prefill
    }

    #[test]
    fn the_least_loaded_takes_it_and_equals_take_turns() {
        assert_eq!(choose(&[(3, 0), (1, 0), (2, 0)], 0), 1);
        assert_eq!(
            choose(&[(1, 5000), (9, 0)], 0),
            1,
            "a long prompt waiting weighs more than eight sequences"
        );
        assert_eq!([choose(&[(0, 0), (0, 0)], 0), choose(&[(0, 0), (0, 0)], 1)], [0, 1]);
    }
}
