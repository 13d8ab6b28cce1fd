//! The role planner: which workers should prefer what, from what the cluster has seen of late.
//!
//! It predicts, for every split, the share of requests that would meet their targets and how much more load the
//! split could carry, and proposes a better one as data. It changes nothing itself. A flip must promise a clear
//! gain for some seconds, leaves recently flipped workers alone, and keeps the floors. It is fed and asked by
//! its caller's clock, so that a day can be replayed in a second.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use serde::Serialize;
use tandem_types::{Role, StepTime, Time, WorkerId};

use crate::Candidate;
use crate::candidate::{sane_seconds, sane_step};
use crate::lengths::{SHORTER, ShortShares, Shortest};

/// How the planner behaves; one set for everything.
#[derive(Clone, Debug, PartialEq)]
pub struct Config {
    /// Workers that always prefer prefill, and that always prefer decode, at least.
    pub floors: (usize, usize),
    /// A worker that was flipped stays as it is for so long.
    pub cool_down: Duration,
    /// A better split must be better for so long.
    pub patience: Duration,
    /// Gain in predicted attainment that is worth a flip.
    pub gain_attainment: f64,
    /// Gain in the load it could carry that is worth a flip, as a factor.
    pub gain_load: f64,
    /// Seconds over which the load is averaged.
    pub memory_seconds: f64,
    /// Seconds of work that one flip costs: its running decodes end beside prompts.
    pub flip_seconds: f64,
    /// Load over capacity that proposed replica counts aim at.
    pub replica_load: f64,
}

impl Default for Config {
    fn default() -> Self {
        Config {
            floors: (1, 1),
            cool_down: Duration::from_secs(5),
            patience: Duration::from_secs(2),
            gain_attainment: 0.02,
            gain_load: 1.15,
            memory_seconds: 12.0,
            flip_seconds: 0.5,
            replica_load: 0.7,
        }
    }
}

/// Sums that forget.
#[derive(Clone, Copy, Debug, Default)]
struct Fading {
    at: Time,
    requests: f64,
    prompt_tokens: f64,
    prefill_seconds: f64,
    drawn: f64,
    ended: f64,
    weight: f64,
    first_token_seconds: f64,
    token_seconds: f64,
    targets: f64,
}

/// What has come of late, per second.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Load {
    /// Requests.
    pub requests: f64,
    /// Tokens of a prompt, on average.
    pub prompt_tokens: f64,
    /// Seconds to prefill one, on average.
    pub prefill_seconds: f64,
    /// Tokens of an answer, on average, those that are still growing taken into account.
    pub output_tokens: f64,
    /// Target for the first token in seconds, on average; 0 without.
    pub first_token_seconds: f64,
    /// Target per token in seconds, on average; 0 without.
    pub token_seconds: f64,
}

/// No cluster sees more of anything in a second.
const COUNT_MAX: f64 = 1e12;

fn sane_count(count: f64) -> f64 {
    if count.is_nan() { 0.0 } else { count.clamp(0.0, COUNT_MAX) }
}

impl Load {
    /// Without what cannot be: nothing is negative or endless, and a target of no use is none.
    fn sane(&self) -> Load {
        Load {
            requests: sane_count(self.requests),
            prompt_tokens: sane_count(self.prompt_tokens),
            prefill_seconds: sane_seconds(self.prefill_seconds),
            output_tokens: sane_count(self.output_tokens),
            first_token_seconds: sane_count(self.first_token_seconds),
            token_seconds: if self.token_seconds < 1e-6 { 0.0 } else { sane_count(self.token_seconds) },
        }
    }
}

/// Watches what comes and what is drawn.
#[derive(Clone, Debug)]
pub struct Observer {
    memory_seconds: f64,
    sums: Fading,
    shortest: Shortest,
}

impl Observer {
    /// Averages over about so many seconds.
    pub fn new(memory_seconds: f64) -> Observer {
        Observer {
            memory_seconds: sane_seconds(memory_seconds).max(0.1),
            sums: Fading::default(),
            shortest: Shortest::default(),
        }
    }

    fn fade(&mut self, now: Time) {
        let seconds = now.since(self.sums.at).as_secs_f64();
        if seconds <= 0.0 {
            return;
        }
        let s = &mut self.sums;
        let keep = (-seconds / self.memory_seconds).exp();
        for sum in [
            &mut s.requests,
            &mut s.prompt_tokens,
            &mut s.prefill_seconds,
            &mut s.drawn,
            &mut s.ended,
            &mut s.first_token_seconds,
            &mut s.token_seconds,
            &mut s.targets,
        ] {
            *sum *= keep;
        }
        s.weight = s.weight * keep + self.memory_seconds * (1.0 - keep);
        s.at = now;
    }

    /// A request came.
    pub fn arrived(&mut self, request: &crate::Request, prefill_seconds: f64, now: Time) {
        self.fade(now);
        let s = &mut self.sums;
        s.requests += 1.0;
        s.prompt_tokens += f64::from(request.prompt_tokens);
        s.prefill_seconds += sane_seconds(prefill_seconds);
        if request.first_token_seconds.is_finite() && request.token_seconds.is_finite() {
            s.first_token_seconds += sane_seconds(request.first_token_seconds);
            s.token_seconds += sane_seconds(request.token_seconds);
            s.targets += 1.0;
        }
    }

    /// Many requests came: how many, their tokens and seconds to prefill in all. `targets` are those of each, in
    /// seconds, if they have any.
    pub fn arrived_many(
        &mut self,
        requests: f64,
        prompt_tokens: f64,
        prefill_seconds: f64,
        targets: Option<(f64, f64)>,
        now: Time,
    ) {
        self.fade(now);
        let sane = |value: f64| if value.is_finite() { value.max(0.0) } else { 0.0 };
        let s = &mut self.sums;
        s.requests += sane(requests);
        s.prompt_tokens += sane(prompt_tokens);
        s.prefill_seconds += sane(prefill_seconds);
        if let Some((first, each)) = targets {
            s.first_token_seconds += sane(requests) * sane_seconds(first);
            s.token_seconds += sane(requests) * sane_seconds(each);
            s.targets += sane(requests);
        }
    }

    /// Tokens were drawn, and so many answers have ended.
    pub fn drawn(&mut self, tokens: f64, ended: f64, now: Time) {
        self.fade(now);
        self.sums.drawn += sane_count(tokens);
        self.sums.ended += sane_count(ended);
    }

    /// An answer of so many tokens has ended.
    pub fn answered(&mut self, tokens: u32) {
        self.shortest.answered(tokens);
    }

    /// Tokens after the first that nearly all answers have; no more than if answers of this mean ended at random.
    pub fn short_tokens(&self) -> f64 {
        self.shortest.tokens().min(SHORTER * self.output_tokens())
    }

    /// How many answers have one token after their first, two, and so on, of those that have any.
    pub fn short_shares(&self) -> ShortShares {
        self.shortest.shares()
    }

    /// Mean answer length by exposure: tokens drawn per answer ended, so that answers which are still growing
    /// count although their end is unknown.
    pub fn output_tokens(&self) -> f64 {
        // As if one answer of 256 tokens had been seen.
        (self.sums.drawn + 256.0) / (self.sums.ended + 1.0)
    }

    /// What has come of late.
    pub fn load(&mut self, now: Time) -> Load {
        self.fade(now);
        let s = &self.sums;
        let (each, targets) = (s.requests.max(1e-9), s.targets.max(1e-9));
        Load {
            requests: s.requests / s.weight.max(1e-9),
            prompt_tokens: s.prompt_tokens / each,
            prefill_seconds: s.prefill_seconds / each,
            output_tokens: self.output_tokens(),
            first_token_seconds: if s.targets > 1e-6 { s.first_token_seconds / targets } else { 0.0 },
            token_seconds: if s.targets > 1e-6 { s.token_seconds / targets } else { 0.0 },
        }
    }
}

/// What a split promises.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Promise {
    /// Workers that prefer prefill.
    pub prefill: usize,
    /// Workers that prefer decode.
    pub decode: usize,
    /// Share of requests that would meet their targets.
    pub attainment: f64,
    /// The load it could carry, over the load there is.
    pub carries: f64,
}

/// A worker that should change its role.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Flip {
    /// Which.
    pub worker: WorkerId,
    /// From this role.
    pub from: Role,
    /// To that one.
    pub to: Role,
}

/// What the planner proposes.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Plan {
    /// Role changes, all at once.
    pub flips: Vec<Flip>,
    /// In a sentence.
    pub reason: String,
    /// What every split promises.
    pub promises: Vec<Promise>,
    /// Workers of each kind that this load asks for, however many there are.
    pub replicas: (usize, usize),
}

/// Plans roles. Its memory is what it last flipped and which split has been better since when.
#[derive(Clone, Debug)]
pub struct Planner {
    config: Config,
    flipped: BTreeMap<WorkerId, Time>,
    better_since: Option<(usize, Time)>,
    last: Time,
}

/// Part of a token target that decodes may take up.
const USABLE: f64 = 0.9;
/// Part of a KV pool that running sequences may take up.
const KV_USABLE: f64 = 0.92;

/// What a worker has room for; 0 where that is unknown.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Room {
    /// Tokens of its KV pool.
    pub kv_tokens: f64,
    /// Sequences of a step.
    pub rows_max: f64,
}

impl Room {
    /// Of the smallest of these.
    fn of(candidates: &[&Candidate]) -> Room {
        let least = |all: &mut dyn Iterator<Item = u64>| all.filter(|&n| n > 0).min().unwrap_or(0) as f64;
        Room {
            kv_tokens: least(&mut candidates.iter().map(|c| c.kv_tokens)),
            rows_max: least(&mut candidates.iter().map(|c| u64::from(c.rows_max))),
        }
    }

    /// Sequences of so many tokens each that decode at once.
    fn rows(&self, context: f64) -> f64 {
        let by_memory =
            if self.kv_tokens > 0.0 { KV_USABLE * self.kv_tokens / context.max(1.0) } else { f64::INFINITY };
        if self.rows_max > 0.0 { by_memory.min(self.rows_max) } else { by_memory }
    }
}

/// Seconds per token that an answer may take. Without a target: what reads well, or what the device can do.
fn token_target(step: &StepTime, load: &Load) -> f64 {
    if load.token_seconds > 0.0 { load.token_seconds } else { (3.0 * step.b0).max(0.1) }
}

/// What a split promises under this load.
pub fn promise(step: &StepTime, room: &Room, load: &Load, prefill: usize, decode: usize) -> Promise {
    let (load, step) = (load.sane(), sane_step(*step).unwrap_or(crate::predictor::PROFILES[0].step));
    let (p, d) = (prefill as f64, decode as f64);
    let target = token_target(&step, &load);
    let per_step = USABLE * target;
    let context = load.prompt_tokens + load.output_tokens / 2.0;
    let drawn = load.requests * (load.output_tokens - 1.0).max(0.0);
    // Tokens per second that one worker draws at most: bound by the target, and by memory.
    let each = step.b1 + step.b2 * context;
    let by_target = ((per_step - step.b0) / per_step / each).max(0.0);
    let rows = room.rows(context);
    let by_memory = if rows.is_finite() { rows / (step.b0 + rows * each) } else { f64::INFINITY };
    let decode_load = drawn / (d * by_target.min(by_memory)).max(1e-9);
    // Prompts: whole workers, and what decodes leave of the others.
    let busy = drawn / d.max(1e-9) * (step.a1 + step.b2 * context);
    let spare = (1.0 - step.a0 / per_step - busy).max(0.0) * 0.8;
    let prefill_load = load.requests * load.prefill_seconds / (p * 0.97 + d * spare).max(1e-9);
    let served = served_share(prefill_load / 0.95);
    let in_time = 1.0 / (1.0 + (decode_load * served / 1.02).powi(10));
    let carries = 1.0 / decode_load.max(prefill_load / 1.2).max(1e-6);
    Promise { prefill, decode, attainment: served * in_time, carries }
}

/// The share of requests that are served when prompts come at `load` times what can be computed, and the longest
/// are left out: sizes taken as exponential, the smallest `s` of them hold `s + (1 - s) ln(1 - s)` of the work.
fn served_share(load: f64) -> f64 {
    if load <= 1.0 {
        return 1.0;
    }
    let work = |s: f64| s + (1.0 - s) * (1.0 - s).max(1e-12).ln();
    let (mut low, mut high) = (0.0, 1.0);
    for _ in 0..30 {
        let middle = (low + high) / 2.0;
        if work(middle) < 1.0 / load { low = middle } else { high = middle }
    }
    low
}

impl Planner {
    /// Nothing flipped yet.
    pub fn new(config: Config) -> Planner {
        Planner { config, flipped: BTreeMap::new(), better_since: None, last: Time::ZERO }
    }

    /// What should change now. Mixed workers and encoders are left as they are.
    pub fn plan(&mut self, candidates: &[Candidate], load: &Load, now: Time) -> Plan {
        self.last = self.last.max(now); // a clock that goes back stands still
        let now = self.last;
        // A worker that is shown twice is still one.
        let mut names = BTreeSet::new();
        let candidates: Vec<&Candidate> = candidates.iter().filter(|c| names.insert(&c.worker)).collect();
        let of = |role| candidates.iter().filter(move |c| c.role == role);
        let (prefill, decode) = (of(Role::Prefill).count(), of(Role::Decode).count());
        let all = prefill + decode;
        let none = |reason: &str| Plan { reason: reason.to_owned(), ..Plan::default() };
        let (prefill_floor, decode_floor) = self.config.floors;
        if all < prefill_floor.saturating_add(decode_floor) || all < 2 {
            return none("too few workers have a role to change");
        }
        let sane = [load.requests, load.prompt_tokens, load.prefill_seconds, load.output_tokens];
        if sane.iter().any(|x| !x.is_finite() || *x < 0.0) {
            return none("the load is not a load");
        }
        let load = &load.sane();
        let Some(step) = candidates.iter().find_map(|c| c.sane_model()) else {
            return none("no step times are known");
        };
        let room = Room::of(&candidates);
        let promises: Vec<Promise> = (prefill_floor..=all - decode_floor)
            .map(|prefill| promise(&step, &room, load, prefill, all - prefill))
            .collect();
        let replicas = self.replicas(&step, &room, load);
        let now_promised = promise(&step, &room, load, prefill, decode);
        let worth = |p: &Promise| {
            let flips = p.prefill.abs_diff(prefill) as f64;
            // A flip's seconds, spread over the memory of the observer, are lost to all workers alike.
            let cost = self.config.flip_seconds * flips / (self.config.memory_seconds * all as f64);
            (p.attainment - cost, p.carries * (1.0 - cost))
        };
        let best = promises.iter().copied().max_by(|a, b| {
            let (a, b) = (worth(a), worth(b));
            let by_attainment =
                if (a.0 - b.0).abs() < 0.005 { a.1.total_cmp(&b.1) } else { a.0.total_cmp(&b.0) };
            by_attainment.then(std::cmp::Ordering::Equal)
        });
        let Some(best) = best else { return none("no split keeps the floors") };
        let gains = worth(&best).0 > now_promised.attainment + self.config.gain_attainment
            || (worth(&best).0 > now_promised.attainment - 0.005
                && worth(&best).1 > now_promised.carries * self.config.gain_load
                && now_promised.carries < 3.0);
        let plan = |flips, reason| Plan { flips, reason, promises: promises.clone(), replicas };
        if best.prefill == prefill || !gains {
            self.better_since = None;
            return plan(Vec::new(), "no split is clearly better".to_owned());
        }
        let grows = best.prefill > prefill;
        let since = match self.better_since {
            Some((was, since)) if (was > prefill) == grows => since,
            _ => now,
        };
        self.better_since = Some((best.prefill, since));
        if now.since(since) < self.config.patience {
            return plan(Vec::new(), "a better split has to be better for longer".to_owned());
        }
        let flips = self.flips(&candidates, prefill, best.prefill, now);
        let reason = if flips.is_empty() {
            "who should flip was flipped a moment ago".to_owned()
        } else {
            format!(
                "{}P{}D promises {:.3} and carries {:.2} times the load, {prefill}P{decode}D {:.3} and {:.2}",
                best.prefill,
                best.decode,
                best.attainment,
                best.carries,
                now_promised.attainment,
                now_promised.carries
            )
        };
        for flip in &flips {
            self.flipped.insert(flip.worker.clone(), now);
        }
        if !flips.is_empty() {
            self.better_since = None;
        }
        self.flipped.retain(|_, at| now.since(*at) < self.config.cool_down);
        plan(flips, reason)
    }

    /// Those with the least to lose: fewest decodes to become a prefill worker, shortest queue the other way.
    fn flips(&self, candidates: &[&Candidate], from: usize, to: usize, now: Time) -> Vec<Flip> {
        let (old, new) =
            if to > from { (Role::Decode, Role::Prefill) } else { (Role::Prefill, Role::Decode) };
        let rested = |c: &&Candidate| {
            self.flipped.get(&c.worker).is_none_or(|at| now.since(*at) >= self.config.cool_down)
        };
        let mut able: Vec<&Candidate> =
            candidates.iter().copied().filter(|c| c.role == old).filter(rested).collect();
        able.sort_by(|a, b| {
            let by = match old {
                Role::Decode => a.decode_tokens.cmp(&b.decode_tokens),
                _ => sane_seconds(a.queue_seconds).total_cmp(&sane_seconds(b.queue_seconds)),
            };
            by.then_with(|| a.worker.cmp(&b.worker))
        });
        let flips = able.into_iter().take(to.abs_diff(from));
        flips.map(|c| Flip { worker: c.worker.clone(), from: old, to: new }).collect()
    }

    fn replicas(&self, step: &StepTime, room: &Room, load: &Load) -> (usize, usize) {
        let limit = self.config.replica_load;
        let one = promise(step, room, load, 1, 1);
        if load.requests <= 0.0 || !one.carries.is_finite() {
            return self.config.floors;
        }
        let prefill = (load.requests * load.prefill_seconds / limit).ceil();
        let context = load.prompt_tokens + load.output_tokens / 2.0;
        let target = token_target(step, load) * USABLE;
        let by_target = ((target - step.b0) / target / (step.b1 + step.b2 * context)).max(1e-6);
        let decode = (load.requests * load.output_tokens / by_target / limit).ceil();
        let bounded = |n: f64, floor: usize| (n.clamp(0.0, 1e6) as usize).max(floor);
        (bounded(prefill, self.config.floors.0), bounded(decode, self.config.floors.1))
    }
}
