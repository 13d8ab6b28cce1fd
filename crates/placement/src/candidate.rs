//! What a policy is shown: the workers as the router sees them, and the request.

use crate::lengths::{SHORT_TOKENS, ShortShares};
use serde::{Deserialize, Serialize};
use tandem_types::{Role, ServiceClass, StepTime, WorkerId};

/// A way between workers, as it is now.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Link {
    /// Seconds before the first byte.
    pub setup_seconds: f64,
    /// KV tokens per second that it brings at present.
    pub tokens_per_second: f64,
}

impl Default for Link {
    /// One 400 Gbit/s adapter and 144 KiB a token.
    fn default() -> Self {
        Link { setup_seconds: 1e-3, tokens_per_second: 40e9 / 147_456.0 }
    }
}

impl Link {
    /// Seconds to bring so many tokens; an absurd link takes an hour.
    pub fn seconds(&self, tokens: f64) -> f64 {
        let seconds = self.setup_seconds.max(0.0) + tokens / self.tokens_per_second.max(1e-3);
        if seconds.is_finite() { seconds.min(3600.0) } else { 3600.0 }
    }
}

/// A worker that may take new work, as the router sees it now. In-flight guards make `in_flight` count
/// requests that the worker's own report does not contain yet.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
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
    /// What its steps are predicted to cost; without it, policies count tokens and sequences.
    pub model: Option<StepTime>,
    /// Prompt tokens of a step at most.
    pub prompt_budget: u32,
    /// Whether the slack of its decodes bounds its prompts (see `batching::pace`).
    pub paced: bool,
    /// Seconds of prompts waiting there, predicted, if it computed nothing else.
    pub queue_seconds: f64,
    /// Of these, the seconds of prompts that can still meet their targets and so come first.
    pub timely_seconds: f64,
    /// Sequences decoding there or on their way.
    pub decodes: u32,
    /// Their tokens.
    pub decode_tokens: u64,
    /// Tokens its KV pool holds; 0 if unknown.
    pub kv_tokens: u64,
    /// Sequences of a step there at most; 0 if unknown.
    pub rows_max: u32,
    /// Its way to and from others.
    pub link: Link,
    /// Better ways to some of them.
    pub near: Vec<(WorkerId, Link)>,
}

impl Default for Candidate {
    /// An idle mixed worker without a name, of which nothing more is known.
    fn default() -> Self {
        Candidate {
            worker: WorkerId::default(),
            role: Role::Mixed,
            in_flight: 0,
            running: 0,
            waiting: 0,
            waiting_tokens: 0,
            kv_usage: 0.0,
            model: None,
            prompt_budget: 2048,
            paced: false,
            queue_seconds: 0.0,
            timely_seconds: 0.0,
            decodes: 0,
            decode_tokens: 0,
            kv_tokens: 0,
            rows_max: 0,
            link: Link::default(),
            near: Vec::new(),
        }
    }
}

/// Nobody waits longer than a day: what a report may claim at most.
pub(crate) const SECONDS_MAX: f64 = 86_400.0;

pub(crate) fn sane_seconds(seconds: f64) -> f64 {
    if seconds.is_nan() { SECONDS_MAX } else { seconds.clamp(0.0, SECONDS_MAX) }
}

/// Step times, unless they cannot be: a step takes a nanosecond at least, and no part of one takes a day.
pub(crate) fn sane_step(step: StepTime) -> Option<StepTime> {
    let all = [step.a0, step.a1, step.a2, step.b0, step.b1, step.b2];
    let times = all.iter().all(|x| (0.0..=SECONDS_MAX).contains(x));
    (times && step.a0.max(step.b0) >= 1e-9).then_some(step)
}

/// A target in seconds: what is not a number is none, and no target is in the past.
fn sane_target(seconds: f64) -> f64 {
    if seconds.is_nan() { f64::INFINITY } else { seconds.max(0.0) }
}

impl Candidate {
    /// The way from here to there; none is needed to oneself.
    pub fn link_to(&self, other: &Candidate) -> Link {
        let near = self.near.iter().find(|(worker, _)| *worker == other.worker);
        near.map_or_else(
            || Link {
                setup_seconds: self.link.setup_seconds.max(other.link.setup_seconds),
                tokens_per_second: self.link.tokens_per_second.min(other.link.tokens_per_second),
            },
            |(_, link)| *link,
        )
    }

    /// The predictor, unless its numbers cannot be times.
    pub fn sane_model(&self) -> Option<StepTime> {
        self.model.and_then(sane_step)
    }
}

/// Where blocks lie, the nearest first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Tier {
    /// In the device's memory: nothing to bring.
    Device,
    /// In the host's memory.
    Host,
    /// On the worker's disk.
    Disk,
    /// In the store.
    Store,
}

impl Tier {
    /// The way from this tier of a worker to its own device.
    pub fn link(self) -> Link {
        let of =
            |setup_seconds: f64, bytes: f64| Link { setup_seconds, tokens_per_second: bytes / 147_456.0 };
        match self {
            Tier::Device => of(0.0, f64::INFINITY),
            Tier::Host => of(0.2e-3, 40e9),
            Tier::Disk => of(1e-3, 5e9),
            Tier::Store => of(2e-3, 10e9),
        }
    }
}

/// A prefix of the request's prompt that a candidate holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Held {
    /// Index into the candidates.
    pub candidate: usize,
    /// Tokens from the start of the prompt that are on its device.
    pub device_tokens: u32,
    /// Tokens from the start that are on its device or in a lower tier of its own; never fewer.
    pub tokens: u32,
    /// The lowest tier of these.
    pub tier: Tier,
}

/// What a policy may know of a request.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Request {
    /// How many requests this router has routed before: the state of round robin, as a value.
    pub ordinal: u64,
    /// Tokens of the prompt, with those emitted before if it is placed again.
    pub prompt_tokens: u32,
    /// Tokens that may be drawn.
    pub max_tokens: u32,
    /// Tokens that are expected to be drawn, by a predictor; not above `max_tokens` in effect.
    pub expected_tokens: f64,
    /// Tokens after the first that nearly all answers have.
    pub short_tokens: f64,
    /// Shares of answers that have one token after their first, two, and so on.
    pub short_shares: ShortShares,
    /// Seconds left for the first token; infinite without a target.
    pub first_token_seconds: f64,
    /// Seconds per further token that it may take on average; infinite without a target.
    pub token_seconds: f64,
    /// Whether it has targets at all.
    pub class: ServiceClass,
    /// Who holds how much of its prompt, by the prefix index; at most one entry per candidate.
    pub held: Vec<Held>,
}

impl Default for Request {
    /// One token, no targets, nothing held.
    fn default() -> Self {
        Request {
            ordinal: 0,
            prompt_tokens: 1,
            max_tokens: 1,
            expected_tokens: 256.0,
            short_tokens: SHORT_TOKENS,
            short_shares: ShortShares::default(),
            first_token_seconds: f64::INFINITY,
            token_seconds: f64::INFINITY,
            class: ServiceClass::Online,
            held: Vec::new(),
        }
    }
}

impl Request {
    /// Seconds left for the first token: none if they are over, infinite without a target.
    pub fn first_token_target(&self) -> f64 {
        sane_target(self.first_token_seconds)
    }

    /// Seconds per further token: none is negative, infinite without a target.
    pub fn token_target(&self) -> f64 {
        sane_target(self.token_seconds)
    }

    /// What nearly all answers have after their first token, at least one.
    pub fn short(&self) -> f64 {
        if self.short_tokens.is_nan() { 1.0 } else { self.short_tokens.clamp(1.0, 1e6) }
    }

    /// Expected output, at least one token and at most `max_tokens`.
    pub fn expected(&self) -> f64 {
        let most = f64::from(self.max_tokens.max(1));
        if self.expected_tokens.is_nan() { most } else { self.expected_tokens.clamp(1.0, most) }
    }
}

/// Who does what. Equal indices: one worker does both and nothing travels.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
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
