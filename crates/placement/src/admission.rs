//! Whether to take a request in: its predicted chance, and what the cluster has room for.

use std::time::Duration;

use serde::Serialize;
use tandem_types::ServiceClass;

use crate::candidate::sane_seconds;
use crate::cost::Cost;
use crate::{Candidate, Request};

/// When requests are shed.
#[derive(Clone, Debug, PartialEq)]
pub struct Limits {
    /// A request with a smaller chance to meet its targets is shed. 0 sheds nobody by chance.
    pub chance_least: f64,
    /// Offline requests are shed beyond this share of KV in use.
    pub offline_kv_usage: f64,
}

impl Default for Limits {
    /// Sheds what is rather late than in time: it would wait behind everybody who can still be in time, and under
    /// lasting overload for as long as that lasts. Offline work leaves a tenth of the memory free.
    fn default() -> Self {
        Limits { chance_least: 0.5, offline_kv_usage: 0.9 }
    }
}

/// What becomes of a request at the door.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub enum Verdict {
    /// It may be placed.
    Admit {
        /// The predicted chance that it meets its targets.
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
    let (first, others) = Cost::default().chances(request, candidates);
    let chance = first * others;
    if chance < limits.chance_least {
        let wait = able.iter().map(|c| sane_seconds(c.timely_seconds)).fold(f64::INFINITY, f64::min);
        let target = request.first_token_target();
        let why = if first <= others {
            format!("the shortest queue is {wait:.2} s, and its first token is due in {target:.2} s")
        } else {
            let each = request.token_target();
            format!("no worker is likely to draw its other tokens within {each:.3} s each")
        };
        return shed(format!("it would be in time with a chance of {chance:.2}: {why}"), wait - target);
    }
    Verdict::Admit { chance }
}
