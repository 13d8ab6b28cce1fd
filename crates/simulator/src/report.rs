//! What came of a run.

use serde_json::{Value, json};
use tandem_types::{Role, ServiceClass, Time};

use crate::options::Batching;
use crate::workload::Workload;

/// An online request that has ended. Small: a day has millions.
#[derive(Clone, Copy, Debug)]
pub struct Served {
    /// Its place in the workload.
    pub id: u32,
    /// Seconds until its first token.
    pub first: f32,
    /// Seconds per further token, on average; not a number if there was none.
    pub per_token: f32,
    /// Whether it met both targets.
    pub met: bool,
}

/// The cluster at a moment.
#[derive(Clone, Copy, Debug)]
pub struct Sample {
    /// When.
    pub at: Time,
    /// Share of those ended since the last sample that met both targets; no number if none ended.
    pub attainment: f64,
    /// How many ended.
    pub ended: u32,
    /// Seconds of prompts queued that can be in time, over all workers.
    pub queue_seconds: f64,
    /// Sequences decoding.
    pub decodes: u32,
    /// Workers that prefer prefill, decode, either.
    pub roles: [u32; 3],
}

/// A whole run.
#[derive(Clone, Debug, Default)]
pub struct Outcome {
    /// Online requests that came.
    pub requests: usize,
    /// Those that ended, in order of their end.
    pub served: Vec<Served>,
    /// Those that did not.
    pub unfinished: usize,
    /// Role changes: when, who, to what.
    pub flip_log: Vec<(Time, u32, Role)>,
    /// Role changes.
    pub flips: usize,
    /// Prompt and output tokens of offline requests that ended.
    pub offline_tokens: u64,
    /// Offline requests that ended.
    pub offline_requests: u64,
    /// Offline requests that did not end.
    pub offline_open: usize,
    /// Blocks of KV in use after the last event. Only what has not ended has any.
    pub kv_blocks_left: u64,
    /// When the last request came.
    pub span: Time,
    /// When the last event was.
    pub ended: Time,
    /// Steps of all workers.
    pub steps: u64,
    /// Prompt tokens computed.
    pub prompt_tokens: u64,
    /// Prompt tokens of all requests that came.
    pub prompt_tokens_in: u64,
    /// Prompt tokens found in caches, and those of them that came from peers.
    pub hit_tokens: u64,
    /// See `hit_tokens`.
    pub pulled_tokens: u64,
    /// Tokens of KV moved between workers.
    pub moved_tokens: u64,
    /// Sequences that lost their pages to others.
    pub preempted: u64,
    /// Seconds that workers stepped, over all of them.
    pub busy_seconds: f64,
    /// A digest of everything that happened, in order.
    pub log_hash: u64,
    /// The cluster over time.
    pub samples: Vec<Sample>,
    /// Which code decided about steps.
    pub batching: Batching,
}

/// Percentiles in milliseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Spread {
    /// The median.
    pub p50: f64,
    /// Nine tenths are below.
    pub p90: f64,
    /// All but a hundredth are below.
    pub p99: f64,
    /// The mean.
    pub mean: f64,
}

impl Spread {
    /// Of values in any order; all zero where there are none.
    pub fn of(mut values: Vec<f64>) -> Spread {
        if values.is_empty() {
            return Spread::default();
        }
        values.sort_by(f64::total_cmp);
        let at = |q: f64| values[((values.len() - 1) as f64 * q) as usize];
        let mean = values.iter().sum::<f64>() / values.len() as f64;
        Spread { p50: at(0.5), p90: at(0.9), p99: at(0.99), mean }
    }

    /// As it stands in reports.
    pub fn json(&self) -> Value {
        json!({ "p50": self.p50, "p90": self.p90, "p99": self.p99, "mean": self.mean })
    }
}

/// Online requests of a workload.
pub(crate) fn online(workload: &Workload) -> usize {
    workload.arrivals.iter().filter(|arrival| arrival.class == ServiceClass::Online).count()
}

/// The share of requests that met their targets; of none, all.
pub(crate) fn share(met: usize, requests: usize) -> f64 {
    if requests == 0 { 1.0 } else { met as f64 / requests as f64 }
}

impl Outcome {
    /// Share of online requests that met both targets; unfinished ones did not.
    pub fn attainment(&self) -> f64 {
        share(self.served.iter().filter(|served| served.met).count(), self.requests)
    }

    /// Times to the first token, of all that ended.
    pub fn first_ms(&self) -> Spread {
        Spread::of(self.served.iter().map(|served| f64::from(served.first) * 1e3).collect())
    }

    /// Times per further token.
    pub fn per_token_ms(&self) -> Spread {
        let times = self.served.iter().map(|served| f64::from(served.per_token) * 1e3);
        Spread::of(times.filter(|time| !time.is_nan()).collect())
    }

    /// Requests per second that met both targets, while requests came.
    pub fn goodput(&self) -> f64 {
        let met = self.served.iter().filter(|served| served.met).count() as f64;
        met / self.span.as_secs_f64().max(1e-9)
    }

    /// One entry of the list `runs`.
    pub fn json(&self, name: &str, run: &Run) -> Value {
        json!({
            "name": name,
            "policy": run.policy,
            "planner": if run.planner { "on" } else { "off" },
            "order": run.order,
            "split": run.split,
            "seed": run.seed,
            "scale": run.scale,
            "attainment": self.attainment(),
            "goodput_rps": self.goodput(),
            "ttft_ms": self.first_ms().json(),
            "tpot_ms": self.per_token_ms().json(),
            "flips": self.flips,
            "sim_seconds": self.ended.as_secs_f64(),
            "offline_tokens": self.offline_tokens,
            "unfinished": self.unfinished,
            "log_hash": format!("{:016x}", self.log_hash),
            "batching": match self.batching { Batching::Twin => "twin", Batching::Real => "real" },
            "requests": self.requests,
            "hit_tokens": self.hit_tokens,
            "prompt_tokens": self.prompt_tokens_in,
            "preempted": self.preempted,
        })
    }
}

/// What names a run in a report.
#[derive(Clone, Debug)]
pub struct Run {
    /// The policy.
    pub policy: String,
    /// Whether roles change.
    pub planner: bool,
    /// `arrival` or `deadline`.
    pub order: &'static str,
    /// Roles at the start.
    pub split: String,
    /// Names its draws.
    pub seed: u64,
    /// How much of the load.
    pub scale: f64,
}
