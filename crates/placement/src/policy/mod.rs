//! The policies, one file each, and the table of them.

pub mod cost;
pub mod least_loaded;
pub mod prefix;
pub mod round_robin;

use serde::{Deserialize, Serialize};

use crate::{Candidate, Request, Route, decode_side, prefill_side};

/// A part of a route.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Stage {
    /// Computing the prompt and the first token.
    Prefill,
    /// Going on from there.
    Decode,
}

/// Chooses routes.
///
/// `choose` sees all candidates and returns `None` only if no candidate can do the work. It must be pure:
/// same arguments, same answer. `best` orders the workers of one side; a simple policy needs nothing else.
pub trait Policy: Send + Sync {
    /// The best of `side` (indices into `candidates`, never empty) for this stage of this request.
    fn best(&self, stage: Stage, request: &Request, candidates: &[Candidate], side: &[usize]) -> usize;

    /// A route: the best for prefill; decode stays there if that worker is on the decode side too, for then
    /// nothing has to travel.
    fn choose(&self, request: &Request, candidates: &[Candidate]) -> Option<Route> {
        let side = prefill_side(candidates);
        if side.is_empty() {
            return None;
        }
        let prefill = self.best(Stage::Prefill, request, candidates, &side);
        let decode = self.choose_decode(request, candidates, Some(prefill))?;
        Some(Route { prefill, decode })
    }

    /// Who goes on after the first token. `prefill` is where the KV is, if that worker is still a candidate.
    fn choose_decode(
        &self,
        request: &Request,
        candidates: &[Candidate],
        prefill: Option<usize>,
    ) -> Option<usize> {
        let side = decode_side(candidates);
        if let Some(prefill) = prefill.filter(|prefill| side.contains(prefill)) {
            return Some(prefill);
        }
        if side.is_empty() {
            return None;
        }
        Some(self.best(Stage::Decode, request, candidates, &side))
    }

    /// Why `choose` chooses what it chooses. Made when somebody asks: the same arguments give the same answer.
    fn explain(&self, request: &Request, candidates: &[Candidate]) -> Explanation {
        let chosen = self.choose(request, candidates);
        let reason = match chosen {
            None => "no candidate can prefill and decode".to_owned(),
            Some(Route { prefill, decode }) => format!(
                "{} is the best of {} for prefill, {} of {} for decode",
                candidates[prefill].worker,
                prefill_side(candidates).len(),
                candidates[decode].worker,
                decode_side(candidates).len()
            ),
        };
        Explanation { chosen, reason, considered: Vec::new() }
    }
}

/// Why a route was chosen.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Explanation {
    /// The route, if there is one.
    pub chosen: Option<Route>,
    /// In a sentence.
    pub reason: String,
    /// Routes that were looked at, the best first, where the policy weighs whole routes.
    pub considered: Vec<Considered>,
}

/// A route and what it would cost.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Considered {
    /// Who prefills.
    pub prefill: String,
    /// Who decodes.
    pub decode: String,
    /// All terms together, in seconds.
    pub cost_seconds: f64,
    /// The terms.
    pub terms: cost::Terms,
}

/// A policy by its name.
pub struct Row {
    /// What `--policy` calls it.
    pub name: &'static str,
    /// One line for `--help`.
    pub help: &'static str,
    /// Makes it.
    pub make: fn() -> Box<dyn Policy>,
}

/// All policies; the first is the default.
pub static POLICIES: &[Row] = &[
    Row {
        name: "least-loaded",
        help: "the worker with the least work per side",
        make: || Box::new(least_loaded::LeastLoaded),
    },
    Row { name: "round-robin", help: "each worker in turn", make: || Box::new(round_robin::RoundRobin) },
    Row {
        name: "prefix",
        help: "the holder of the longest prefix, unless it is overloaded",
        make: || Box::new(prefix::Prefix),
    },
    Row {
        name: "cost",
        help: "the route that costs the cluster the fewest seconds",
        make: || Box::new(cost::Cost::default()),
    },
];

/// The policy of this name, or a sentence that names the right ones.
pub fn named(name: &str) -> Result<Box<dyn Policy>, String> {
    POLICIES.iter().find(|row| row.name == name).map(|row| (row.make)()).ok_or_else(|| {
        let names: Vec<&str> = POLICIES.iter().map(|row| row.name).collect();
        format!("there is no policy {name:?} in this version; it has {}", names.join(", "))
    })
}
/// What every policy must hold; its tests run this first.
pub fn conformance(policy: &dyn Policy, candidates: &[Candidate], request: &Request) {
    use tandem_types::Role;
    let route = policy.choose(request, candidates);
    assert_eq!(route, policy.choose(request, candidates), "the same arguments give the same route");
    let able = candidates.iter().any(|c| c.role != Role::Encode);
    assert_eq!(route.is_some(), able, "a route exists exactly if somebody can do the work");
    let Some(route) = route else { return };
    let (prefill, decode) = (&candidates[route.prefill], &candidates[route.decode]);
    let prefers = |roles: &[Role]| candidates.iter().any(|c| roles.contains(&c.role));
    assert!(
        prefill.role != Role::Encode && decode.role != Role::Encode,
        "encoders neither prefill nor decode"
    );
    if prefers(&[Role::Prefill, Role::Mixed]) {
        assert!(prefill.role != Role::Decode, "a decode worker prefills only if nobody prefers to");
    }
    if prefers(&[Role::Decode, Role::Mixed]) {
        assert!(decode.role != Role::Prefill, "a prefill worker decodes only if nobody prefers to");
    }
    if prefill.role == Role::Mixed {
        assert_eq!(route.prefill, route.decode, "a mixed worker keeps what it has prefilled");
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use tandem_types::Role;

    use super::*;

    fn candidates() -> impl Strategy<Value = Vec<Candidate>> {
        prop::collection::vec((0..4usize, 0..9u32, 0..9u32, 0..5000u64), 0..8).prop_map(|rows| {
            let made =
                rows.into_iter().enumerate().map(|(i, (role, in_flight, waiting, tokens))| Candidate {
                    worker: format!("w-{i}").as_str().into(),
                    role: Role::ALL[role],
                    in_flight,
                    running: in_flight,
                    waiting,
                    waiting_tokens: tokens,
                    ..Candidate::default()
                });
            made.collect()
        })
    }

    proptest! {
        #[test]
        fn every_policy_keeps_the_contract(candidates in candidates(), ordinal: u64, tokens in 1..5000u32) {
            for row in POLICIES {
                let request = Request { ordinal, prompt_tokens: tokens, max_tokens: 16, ..Request::default() };
                conformance(&*(row.make)(), &candidates, &request);
            }
        }
    }

    #[test]
    fn an_unknown_policy_is_refused_by_naming_the_known_ones() {
        let refusal = named("fastest").err().expect("there is none");
        assert!(refusal.contains("least-loaded"), "{refusal}");
    }
}
