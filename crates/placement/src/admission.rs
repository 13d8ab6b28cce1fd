//! Whether to take a request in: its predicted chance, and what the cluster has room for.

use std::time::Duration;

use serde::Serialize;
use tandem_types::ServiceClass;

use crate::candidate::sane_seconds;
use crate::{Candidate, Request};

/// When requests are shed.
#[derive(Clone, Debug, PartialEq)]
pub struct Limits {
    /// A request with a smaller chance to meet its target is shed. 0 sheds nobody by chance.
    pub chance_least: f64,
    /// Offline requests are shed beyond this share of KV in use.
    pub offline_kv_usage: f64,
}

impl Default for Limits {
    /// Sheds by chance only what is hopeless; offline work leaves a tenth of the memory free.
    fn default() -> Self {
        Limits { chance_least: 0.02, offline_kv_usage: 0.9 }
    }
}

/// What becomes of a request at the door.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub enum Verdict {
    /// It may be placed.
    Admit {
        /// The predicted chance that it meets its first target.
        chance: f64,
    },
    /// It is refused for now.
    Shed {
        /// In a sentence.
        reason: String,
        /// When to come again.
        retry_after: Duration,
    },
}

/// Decides at the door. `waiting` are the requests that no worker has begun, `waiting_max` their bound.
pub fn admit(
    request: &Request,
    candidates: &[Candidate],
    limits: &Limits,
    waiting: usize,
    waiting_max: usize,
) -> Verdict {
    let shed = |reason: String, seconds: f64| Verdict::Shed {
        reason,
        retry_after: Duration::from_secs_f64(sane_seconds(seconds).clamp(1.0, 60.0).ceil()),
    };
    if waiting >= waiting_max {
        return shed(format!("{waiting} requests wait already, at most {waiting_max}"), 1.0);
    }
    let able: Vec<&Candidate> = candidates.iter().filter(|c| c.role != tandem_types::Role::Encode).collect();
    if able.is_empty() {
        return shed("no worker takes work now".to_owned(), 1.0);
    }
    if request.class == ServiceClass::Offline {
        // What is not a number is taken for full.
        let of =
            |c: &&Candidate| if c.kv_usage.is_nan() { 1.0 } else { f64::from(c.kv_usage.clamp(0.0, 1.0)) };
        let usage = able.iter().map(of).sum::<f64>() / able.len() as f64;
        return if usage > limits.offline_kv_usage {
            shed(format!("{:.0} % of KV is in use, and offline work waits for a gap", usage * 100.0), 5.0)
        } else {
            Verdict::Admit { chance: 1.0 }
        };
    }
    let chance = chance(request, &able);
    if chance < limits.chance_least {
        let wait = able.iter().map(|c| sane_seconds(c.timely_seconds)).fold(f64::INFINITY, f64::min);
        let reason = format!(
            "the shortest queue is {wait:.2} s and its first token is due in {:.2} s",
            request.first_token_target()
        );
        return shed(reason, wait - request.first_token_target());
    }
    Verdict::Admit { chance }
}

/// The chance that the first token of this request is in time at the best candidate.
pub fn chance(request: &Request, candidates: &[&Candidate]) -> f64 {
    let target = request.first_token_target();
    if !target.is_finite() {
        return 1.0;
    }
    let seconds = candidates.iter().filter_map(|c| {
        let model = c.sane_model()?;
        Some(sane_seconds(c.timely_seconds) + model.prefill(request.prompt_tokens, 0, c.prompt_budget))
    });
    let Some(best) = seconds.min_by(f64::total_cmp) else {
        return 1.0; // nothing is known: the queue bound alone sheds
    };
    // A prediction is off by a tenth now and then.
    1.0 / (1.0 + ((best / target.max(1e-6) - 1.0) / 0.05).exp())
}
