//! How fast this worker is: learnt from its own steps, said in its reports, and used to pace prompts.

use std::time::Duration;

use tandem_batching::pace::{Budget, Order, Pace};
use tandem_batching::{Origin, Plan, SequenceId, SequenceSpec, Target};
use tandem_placement::planner::Observer;
use tandem_placement::predictor::{Measured, PROFILES, Predictor, from_two_points};
use tandem_proto::v1;
use tandem_types::{StepTime, Time, attention_pairs};

use super::Core;
use super::legs::{Purpose, Stage};

/// A step with so many prompt tokens tells how fast prompts are.
const PROMPT_LEAST: f64 = 16.0;
/// After so many measurements in a row that the predictor takes for stalls, it begins anew: the machine is another.
const STALLS_MAX: u32 = 64;
/// Seconds over which the length of answers is averaged.
const MEMORY_SECONDS: f64 = 60.0;

/// What a plan computes, as predictors count it. The time is to be measured.
pub fn measure(plan: &Plan) -> Measured {
    let mut step = Measured { tokens: 0.0, pairs: 0.0, context: 0.0, seconds: 0.0 };
    for row in &plan.rows {
        step.tokens += f64::from(row.count);
        if row.count > 1 {
            step.pairs += attention_pairs(row.count, row.start);
        } else {
            step.context += f64::from(row.start + 1);
        }
    }
    step
}

/// Step times learnt so far, and what has been done.
#[derive(Debug)]
pub(super) struct Speed {
    predictor: Option<Predictor>,
    /// The first measured step of each kind.
    prompt: Option<Measured>,
    decode: Option<Measured>,
    stalls: u32,
    /// Prompt tokens and sequences of a step at most.
    prompt_budget: u32,
    rows_max: u32,
    /// Whether anybody has come with targets.
    by_slack: bool,
    answers: Observer,
    totals: v1::Totals,
}

impl Speed {
    pub(super) fn new(prompt_budget: u32, rows_max: u32) -> Speed {
        Speed {
            predictor: None,
            prompt: None,
            decode: None,
            stalls: 0,
            prompt_budget,
            rows_max,
            by_slack: false,
            answers: Observer::new(MEMORY_SECONDS),
            totals: v1::Totals::default(),
        }
    }

    fn step_time(&self) -> Option<StepTime> {
        self.predictor.as_ref().map(Predictor::step_time)
    }

    /// Before both kinds of steps were measured, the proportions of a known device stand in for what is missing.
    fn learn(&mut self, step: Measured) {
        let kind = if step.tokens - step.pairs.min(1.0) >= PROMPT_LEAST && step.pairs > 0.0 {
            Some(&mut self.prompt)
        } else if step.pairs == 0.0 {
            Some(&mut self.decode)
        } else {
            None
        };
        if let Some(first) = kind
            && first.is_none()
        {
            *first = Some(step);
            self.begin();
        }
        let Some(predictor) = &mut self.predictor else { return };
        if predictor.learn(step) {
            self.stalls = 0;
            return;
        }
        self.stalls += 1;
        if self.stalls > STALLS_MAX {
            (self.prompt, self.decode, self.stalls) = (None, None, 0);
        }
    }

    fn begin(&mut self) {
        let like = PROFILES[0].step;
        let scaled = |step: Measured| {
            let step_time = like.scaled(step.seconds / like.step(step.tokens, step.pairs, step.context));
            step_time.is_sane().then_some(step_time)
        };
        let prior = match (self.prompt, self.decode) {
            (Some(prompt), Some(decode)) => from_two_points(like, prompt, decode),
            (Some(one), None) | (None, Some(one)) => scaled(one),
            (None, None) => None,
        };
        if let Some(prior) = prior {
            self.predictor = Some(Predictor::new(prior));
        }
    }

    fn prefill_seconds(&self, left: u32, before: u32) -> f64 {
        self.step_time().map_or(0.0, |step| step.prefill(left, before, self.prompt_budget))
    }

    fn pacing(&self) -> v1::Pacing {
        let step_time = self.step_time().map(|s| v1::StepTime {
            a0: s.a0,
            a1: s.a1,
            a2: s.a2,
            b0: s.b0,
            b1: s.b1,
            b2: s.b2,
        });
        v1::Pacing {
            step_time,
            error: self.predictor.as_ref().map_or(0.0, Predictor::error),
            prompt_budget: self.prompt_budget,
            rows_max: self.rows_max,
            by_slack: self.by_slack,
        }
    }
}

impl Core {
    /// A step was measured.
    pub fn learn(&mut self, step: Measured) {
        self.speed.learn(step);
    }

    /// A prompt is to be computed here.
    pub(super) fn count_prompt(&mut self, tokens: u32) {
        let totals = &mut self.speed.totals;
        totals.prompts += 1;
        totals.prompt_tokens += u64::from(tokens);
        let seconds = self.speed.prefill_seconds(tokens, 0);
        self.speed.totals.prompt_seconds += seconds;
    }

    pub(super) fn count_drawn(&mut self, tokens: u64, ended: u64, now: Time) {
        self.speed.totals.drawn += tokens;
        self.speed.totals.ended += ended;
        self.speed.answers.drawn(tokens as f64, ended as f64, now);
    }

    /// An answer of so many tokens has ended.
    pub(super) fn count_answer(&mut self, tokens: u32, now: Time) {
        self.count_drawn(0, 1, now);
        self.speed.answers.answered(tokens);
    }

    /// Hands a sequence to the batcher, with the times at which its tokens are due.
    pub(super) fn add_to_batch(&mut self, id: SequenceId, spec: SequenceSpec, origin: Origin, now: Time) {
        self.batcher.add(spec, origin);
        self.begin_target(id, now);
    }

    /// Further tokens count from `first_at` on. From the first leg with a target on, slack paces prompts.
    pub(super) fn begin_target(&mut self, id: SequenceId, first_at: Time) {
        let Some(target) = self.legs.get(&id).and_then(|leg| leg.target) else { return };
        self.speed.by_slack = true;
        self.batcher.set_target(id, Target { first_at, ..target });
    }

    /// Before each plan: what was learnt since the last.
    pub(super) fn set_pace(&mut self) {
        let speed = &self.speed;
        let pace = speed.step_time().filter(|_| speed.by_slack).map(|model| Pace {
            order: Order::Deadline,
            budget: Budget::Slack(speed.prompt_budget),
            model,
            headroom_tokens: 0,
            short_tokens: speed.answers.short_tokens(),
        });
        self.batcher.set_pace(pace);
    }

    /// What a report says beyond counts. Seconds are predicted.
    pub fn forecast(&self) -> Forecast {
        let speed = &self.speed;
        let backlog = self.batcher.backlog(|left, before| speed.prefill_seconds(left, before));
        let mut forecast = Forecast {
            queue_seconds: backlog.prompt_seconds,
            timely_seconds: backlog.prompt_seconds,
            decodes: backlog.decodes,
            decode_tokens: backlog.decode_tokens,
            pacing: speed.pacing(),
            totals: speed.totals,
        };
        if speed.by_slack {
            forecast.timely_seconds = self.batcher.timely_seconds().min(backlog.prompt_seconds);
        }
        for leg in self.legs.values() {
            match &leg.stage {
                Stage::WaitingForShare { .. } | Stage::Pulling { purpose: Purpose::Borrow { .. }, .. } => {
                    let seconds = speed.prefill_seconds(leg.known_tokens, 0);
                    forecast.queue_seconds += seconds;
                    forecast.timely_seconds += seconds;
                }
                Stage::WaitingForRoom { .. } | Stage::Pulling { .. } => {
                    forecast.decodes += 1;
                    forecast.decode_tokens += u64::from(leg.known_tokens);
                }
                Stage::Running | Stage::HandedOff | Stage::Stopping { .. } => {}
            }
        }
        forecast
    }
}

/// See [`Core::forecast`].
#[derive(Clone, Debug, PartialEq)]
pub struct Forecast {
    /// Seconds of prompts that wait.
    pub queue_seconds: f64,
    /// Of these, of those that can be in time.
    pub timely_seconds: f64,
    /// Sequences that decode, or whose KV is on its way.
    pub decodes: u32,
    /// Their tokens.
    pub decode_tokens: u64,
    /// How fast the worker is.
    pub pacing: v1::Pacing,
    /// What it has done.
    pub totals: v1::Totals,
}

/// When a leg's tokens are due, if its router says so. `arrived` is when the router took the request in; what is
/// computed again for a stream that has begun gets the whole time anew.
pub(super) fn target(start: &v1::Start, arrived: Time, now: Time) -> Option<Target> {
    let first = start.ttft_target_ms.map(|ms| Duration::from_millis(u64::from(ms)));
    let each = start.tpot_target_ms.map(|ms| f64::from(ms) / 1e3);
    if first.is_none() && each.is_none() {
        return None;
    }
    let begun = start.tokens.len() as u32 > start.prompt_tokens;
    let from = if begun { now } else { arrived };
    Some(Target {
        due: first.map_or(Time::MAX, |first| from + first),
        first_at: now,
        token_seconds: each.unwrap_or(f64::INFINITY),
    })
}
