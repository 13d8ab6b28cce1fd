//! Whether to take a request in: its predicted chance, and what the cluster has room for.

use std::fmt;
use std::time::Duration;

use tandem_types::{Role, ServiceClass};

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
#[derive(Clone, Debug, PartialEq)]
pub enum Verdict {
    /// It may be placed.
    Admit {
        /// The predicted chance that it meets its targets.
        chance: f64,
    },
    /// It is refused for now.
    Shed {
        /// Why.
        reason: Reason,
        /// When to come again.
        retry_after: Duration,
    },
}

/// Why a request is refused. It reads as a sentence, which is made where somebody reads it: under overload most of what
/// is decided is never read.
#[derive(Clone, Debug, PartialEq)]
pub enum Reason {
    /// The queue is full.
    Queue {
        /// Requests that no worker has begun.
        waiting: usize,
        /// Their bound.
        most: usize,
    },
    /// There are no workers.
    Nobody,
    /// Offline work finds no gap.
    Full {
        /// The share of KV that is in use.
        usage: f64,
    },
    /// Its first token would be late.
    FirstToken {
        /// The chance that it would be in time.
        chance: f64,
        /// Seconds of work in the shortest queue.
        wait: f64,
        /// Seconds until the first token is due.
        target: f64,
    },
    /// Its other tokens would be late.
    Tokens {
        /// The chance that it would be in time.
        chance: f64,
        /// Seconds that each may take.
        target: f64,
    },
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Reason::Queue { waiting, most } => write!(f, "{waiting} requests wait already, at most {most}"),
            Reason::Nobody => f.write_str("no worker takes work now"),
            Reason::Full { usage } => {
                write!(f, "{:.0} % of KV is in use, and offline work waits for a gap", usage * 100.0)
            }
            Reason::FirstToken { chance, wait, target } => write!(
                f,
                "it would be in time with a chance of {chance:.2}: the shortest queue is {wait:.2} s, and its first \
                 token is due in {target:.2} s"
            ),
            Reason::Tokens { chance, target } => write!(
                f,
                "it would be in time with a chance of {chance:.2}: no worker is likely to draw its other tokens within \
                 {target:.3} s each"
            ),
        }
    }
}

/// Decides at the door. `waiting` are the requests that no worker has begun, `waiting_max` their bound.
pub fn admit(
    request: &Request,
    candidates: &[Candidate],
    limits: &Limits,
    waiting: usize,
    waiting_max: usize,
) -> Verdict {
    let shed = |reason: Reason, seconds: f64| Verdict::Shed {
        reason,
        retry_after: Duration::from_secs_f64(sane_seconds(seconds).clamp(1.0, 60.0).ceil()),
    };
    if waiting >= waiting_max {
        return shed(Reason::Queue { waiting, most: waiting_max }, 1.0);
    }
    let able = || candidates.iter().filter(|c| c.role != Role::Encode);
    if able().next().is_none() {
        return shed(Reason::Nobody, 1.0);
    }
    if request.class == ServiceClass::Offline {
        // What is not a number is taken for full.
        let of =
            |c: &Candidate| if c.kv_usage.is_nan() { 1.0 } else { f64::from(c.kv_usage.clamp(0.0, 1.0)) };
        let usage = able().map(of).sum::<f64>() / able().count() as f64;
        return if usage > limits.offline_kv_usage {
            shed(Reason::Full { usage }, 5.0)
        } else {
            Verdict::Admit { chance: 1.0 }
        };
    }
    let (first, others) = Cost::default().chances(request, candidates);
    let chance = first * others;
    if chance < limits.chance_least {
        let wait = able().map(|c| sane_seconds(c.timely_seconds)).fold(f64::INFINITY, f64::min);
        let target = request.first_token_target();
        let reason = if first <= others {
            Reason::FirstToken { chance, wait, target }
        } else {
            Reason::Tokens { chance, target: request.token_target() }
        };
        return shed(reason, wait - target);
    }
    Verdict::Admit { chance }
}
