//! The worker of a side with the least work: waiting prompt tokens first, then sequences, then KV in use.

use super::Policy;
use crate::{Candidate, Request};

/// Prompt tokens that weigh as much as one sequence in flight: about what one decode step costs in prefill.
const TOKENS_PER_SEQUENCE: u64 = 64;

/// The worker of a side with the least work; equals go round.
pub struct LeastLoaded;

impl Policy for LeastLoaded {
    fn best(&self, request: &Request, candidates: &[Candidate], side: &[usize]) -> usize {
        let work = |&index: &usize| {
            let c = &candidates[index];
            let sequences = u64::from(c.in_flight.max(c.running + c.waiting));
            (c.waiting_tokens + sequences * TOKENS_PER_SEQUENCE, (c.kv_usage * 100.0) as u64)
        };
        let least = side.iter().map(work).min().expect("a side is never empty");
        let equals: Vec<usize> = side.iter().copied().filter(|index| work(index) == least).collect();
        equals[(request.ordinal % equals.len() as u64) as usize]
    }
}

#[cfg(test)]
mod tests {
    use tandem_types::Role;

    use super::*;

    fn choose(loads: &[(u32, u64)], ordinal: u64) -> usize {
        let candidates: Vec<Candidate> = loads
            .iter()
            .map(|&(in_flight, waiting_tokens)| Candidate {
                worker: "w".into(),
                role: Role::Mixed,
                in_flight,
                running: 0,
                waiting: 0,
                waiting_tokens,
                kv_usage: 0.0,
            })
            .collect();
        let request = Request { ordinal, prompt_tokens: 8, max_tokens: 8 };
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
