//! Where work goes: policies that choose a route for a request from a snapshot of the cluster.
//!
//! Never knows: sessions, HTTP, clocks, randomness. Always holds: `choose` is a function of its arguments,
//! counts nothing and moves nothing, and every route it returns names candidates that it was shown.

mod overlap;
mod policy;

pub use overlap::overlap_pays;
pub use policy::{POLICIES, Policy, Row, conformance, least_loaded, named, round_robin};

use serde::Serialize;
use tandem_types::{Role, WorkerId};

/// A worker that may take new work, as the router sees it now. In-flight guards make `in_flight` count
/// requests that the worker's own report does not contain yet.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Candidate {
    /// Its name.
    pub worker: WorkerId,
    /// What it prefers to do.
    pub role: Role,
    /// Legs of this router on it, running or waiting.
    pub in_flight: u32,
    /// Sequences running there, of all routers, as last reported.
    pub running: u32,
    /// Sequences waiting there, as last reported.
    pub waiting: u32,
    /// Prompt tokens waiting there, as last reported plus those sent since.
    pub waiting_tokens: u64,
    /// Share of its KV pool in use, 0 to 1.
    pub kv_usage: f32,
}

/// What a policy may know of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Request {
    /// How many requests this router has routed before: the state of round robin, as a value.
    pub ordinal: u64,
    /// Tokens to compute before the first new one.
    pub prompt_tokens: u32,
    /// Tokens that may be drawn.
    pub max_tokens: u32,
}

/// Who does what. Equal indices: one worker does both and nothing travels.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Route {
    /// Index into the candidates.
    pub prefill: usize,
    /// Index into the candidates; provisional until the first token.
    pub decode: usize,
}

/// Candidates for the first stage: workers that prefer it, or all if none does.
pub fn prefill_side(candidates: &[Candidate]) -> Vec<usize> {
    side(candidates, |role| matches!(role, Role::Prefill | Role::Mixed))
}

/// Candidates for the second stage: workers that prefer it, or all if none does.
pub fn decode_side(candidates: &[Candidate]) -> Vec<usize> {
    side(candidates, |role| matches!(role, Role::Decode | Role::Mixed))
}

fn side(candidates: &[Candidate], prefers: impl Fn(Role) -> bool) -> Vec<usize> {
    // An encoder can neither prefill nor decode.
    let able = |&index: &usize| candidates[index].role != Role::Encode;
    let preferring: Vec<usize> =
        (0..candidates.len()).filter(able).filter(|&index| prefers(candidates[index].role)).collect();
    if preferring.is_empty() { (0..candidates.len()).filter(able).collect() } else { preferring }
}
