//! Each worker of a side in turn, whatever its load.

use super::{Policy, Stage};
use crate::{Candidate, Request};

/// Each worker of a side in turn.
pub struct RoundRobin;

impl Policy for RoundRobin {
    fn best(&self, _: Stage, request: &Request, _: &[Candidate], side: &[usize]) -> usize {
        side[(request.ordinal % side.len() as u64) as usize]
    }
}

#[cfg(test)]
mod tests {
    use tandem_types::Role;

    use super::*;

    #[test]
    fn requests_go_round_each_side_on_its_own() {
        let candidate = |name: &str, role| Candidate { worker: name.into(), role, ..Candidate::default() };
        let cluster = [
            candidate("prefill-0", Role::Prefill),
            candidate("decode-0", Role::Decode),
            candidate("decode-1", Role::Decode),
            candidate("decode-2", Role::Decode),
        ];
        let routes: Vec<(usize, usize)> = (0..4)
            .map(|ordinal| {
                let request = Request { ordinal, prompt_tokens: 8, max_tokens: 8, ..Request::default() };
                let route = RoundRobin.choose(&request, &cluster).expect("somebody can");
                (route.prefill, route.decode)
            })
            .collect();
        assert_eq!(routes, [(0, 1), (0, 2), (0, 3), (0, 1)]);
    }
}
