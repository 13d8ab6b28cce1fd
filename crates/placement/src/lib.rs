//! Where work goes: predictors, policies that choose a route from a snapshot of the cluster, the prefix index,
//! admission, and the role planner.
//!
//! Never knows: sessions, HTTP, clocks, randomness. Always holds: `choose` is a function of its arguments,
//! counts nothing and moves nothing, and every route it returns names candidates that it was shown. Whatever
//! the numbers it is given, it answers; nonsense is clamped or refused with a reason.

pub mod admission;
mod candidate;
pub mod index;
pub mod ledger;
mod lengths;
mod overlap;
pub mod planner;
mod policy;
pub mod predictor;

pub use candidate::{Candidate, Held, Link, Request, Route, Tier, decode_side, prefill_side};
pub use lengths::ShortShares;
pub use overlap::overlap_pays;
pub use policy::{
    Considered, Explanation, POLICIES, Policy, Row, Stage, conformance, cost, least_loaded, named, prefix,
    round_robin,
};
