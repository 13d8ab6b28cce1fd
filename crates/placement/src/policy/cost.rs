//! The route that costs the cluster the fewest seconds, prefill and decode chosen together.
//!
//! A route's cost is the time to its first token, the exposed transfer, and what it makes likely to be lost:
//! this request's targets, the targets of those who decode where it would, and prefill capacity where roles say
//! otherwise. Prefill where decode is, or decode where prefill was, are routes like others. Losses are smooth
//! functions of predicted time over target, so nothing hangs on a threshold.

mod few;
mod seconds;

use std::collections::HashMap;

use serde::{Deserialize, Serialize};
use tandem_batching::pace;
use tandem_types::{Role, StepTime, WorkerId};

use self::few::{in_turn, smallest};
use self::seconds::{room_seconds, row_seconds, token_seconds};
use super::{Considered, Explanation, Policy, Stage};
use crate::candidate::sane_seconds;
use crate::{Candidate, Held, Request, Route};

/// What seconds are worth; one set for everything.
#[derive(Clone, Debug, PartialEq)]
pub struct Tuning {
    /// Seconds that one missed target weighs as much as.
    pub miss_seconds: f64,
    /// Predicted time over target at which half of the requests are expected to miss it.
    pub edge: f64,
    /// The same of a target that is missed by an answer which turned out too short to be handed off.
    pub short_miss_seconds: f64,
    /// How soft that edge is.
    pub softness: f64,
    /// Seconds against a decode on a worker that prefers prefill.
    pub decode_on_prefill_seconds: f64,
    /// Seconds against a prefill on a worker that prefers decode.
    pub prefill_on_decode_seconds: f64,
    /// Share of a step that prompts must get on a decoding worker to be worth their while.
    pub share_least: f64,
    /// How much of that share may be counted on: decodes come and go while a prompt waits.
    pub share_trust: f64,
    /// Routes whose costs differ by less are as good as each other.
    pub equal_seconds: f64,
    /// How many of each side are weighed in pairs.
    pub few: usize,
    /// Whether prefixes may be brought from peers.
    pub peer_pulls: bool,
}

impl Default for Tuning {
    fn default() -> Self {
        Tuning {
            miss_seconds: 10.0,
            edge: 0.95,
            short_miss_seconds: 20.0,
            softness: 0.04,
            decode_on_prefill_seconds: 1.0,
            prefill_on_decode_seconds: 0.05,
            share_least: 0.1,
            share_trust: 0.7,
            equal_seconds: 0.5e-3,
            few: 8,
            peer_pulls: true,
        }
    }
}

/// What a route's cost is made of, in seconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Terms {
    /// Until this prompt's turn comes.
    pub wait: f64,
    /// To bring a prefix from a lower tier or a peer.
    pub bring: f64,
    /// To compute the rest.
    pub compute: f64,
    /// KV to the decoding worker, and what the gap until its first step there makes likely to be missed.
    pub transfer: f64,
    /// Likely loss of the first token's target.
    pub first_token_loss: f64,
    /// Likely loss of the target of the others.
    pub token_loss: f64,
    /// What it does to those who decode there.
    pub harm: f64,
    /// Against doing what the roles do not prefer.
    pub role: f64,
    /// Until there is room for its KV.
    pub room: f64,
}

impl Terms {
    /// All of them.
    pub fn sum(&self) -> f64 {
        let own = self.wait + self.bring + self.compute + self.transfer;
        own + self.first_token_loss + self.token_loss + self.harm + self.role + self.room
    }
}

/// What no model is known for is taken to be like this.
const UNKNOWN: StepTime = crate::predictor::PROFILES[0].step;

/// Room that a target leaves beyond what a request takes on idle workers, if it is to say anything about load.
const ALONE: f64 = 1.25;

/// So many times the softness away from the edge, a miss is certain or out of the question: one in 10^9.
const CERTAIN: f64 = 20.0;

/// By how much sums of the same may differ, relatively.
const ROUNDING: f64 = 1e-9;

/// A share of short answers that is worth thinking of.
const SHARE_LEAST: f64 = 1e-3;

/// The least chance to miss a target; where somebody is sure to meet it, the rest is not looked at.
fn least(missed: impl Iterator<Item = f64>) -> f64 {
    let mut least = 1.0;
    for missed in missed {
        least = f64::min(least, missed);
        if least == 0.0 {
            break;
        }
    }
    least
}

/// The target, or what an idle worker needs and some room, where that is more. One worker that needs less settles it.
fn fair_target(target: f64, alone: impl Iterator<Item = f64>) -> f64 {
    let mut least = f64::INFINITY;
    for seconds in alone {
        least = least.min(ALONE * seconds);
        if least <= target {
            return target;
        }
    }
    least
}

/// Weighs whole routes.
#[derive(Clone, Debug, Default)]
pub struct Cost {
    /// What seconds are worth.
    pub tuning: Tuning,
}

/// What a search is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Search {
    /// Every route that the few best of each side make.
    Everything,
    /// The cheapest route and those that cost the same by and large.
    Cheapest,
}

/// The part of a route's cost that its prefill worker decides.
#[derive(Clone, Copy, Debug)]
struct PrefillPart {
    at: usize,
    terms: Terms,
    /// How likely its first token is late there.
    missed: f64,
    cost: f64,
}

/// The part that its decode worker decides, the transfer left out.
#[derive(Clone, Copy, Debug)]
struct DecodePart {
    at: usize,
    terms: Terms,
    /// How likely its other tokens are late there.
    missed: f64,
    /// Seconds per token there.
    token_seconds: f64,
    /// Seconds of a step there now, with the prompts that it takes along.
    step_seconds: f64,
    cost: f64,
}

impl Cost {
    /// The chances that a request of which nothing is cached meets the target of its first token and that of the
    /// others, each where it is best met. What would miss a target on workers that have nothing else to do gets a
    /// target that it meets there, so that only the work of others counts against it. 1 where no worker has measured
    /// itself yet.
    pub(crate) fn chances(&self, request: &Request, candidates: &[Candidate]) -> (f64, f64) {
        let known = || {
            candidates.iter().filter(|c| c.role != Role::Encode).filter_map(|c| Some((c, c.sane_model()?)))
        };
        if known().next().is_none() {
            return (1.0, 1.0);
        }
        let tokens = request.prompt_tokens;
        let context = f64::from(tokens) + request.expected();
        let fair = Request {
            first_token_seconds: fair_target(
                request.first_token_target(),
                known().map(|(c, model)| model.prefill(tokens, 0, c.prompt_budget)),
            ),
            token_seconds: fair_target(
                request.token_target(),
                known().map(|(_, model)| model.step(1.0, 0.0, context)),
            ),
            held: Vec::new(),
            ..*request
        };
        let first = least(known().map(|(c, _)| self.prefill_part(0, c, &fair, None, None).missed));
        let others = least(known().map(|(c, _)| self.decode_part(0, c, &fair).missed));
        (1.0 - first, 1.0 - others)
    }

    /// The share of requests with this predicted time that will miss this target.
    fn miss(&self, predicted: f64, target: f64) -> f64 {
        if !target.is_finite() {
            return 0.0;
        }
        // Most of a large cluster is far from the edge: no division for those, and no exponential.
        let Tuning { edge, softness, .. } = self.tuning;
        if predicted < (edge - CERTAIN * softness) * target * (1.0 - 1e-9) {
            return 0.0;
        }
        let ratio = if target > 0.0 { predicted / target } else { f64::INFINITY };
        let room = (self.tuning.edge - ratio) / self.tuning.softness;
        match room {
            _ if room > CERTAIN => 0.0,
            _ if room < -CERTAIN => 1.0,
            _ => 1.0 / (1.0 + room.exp()),
        }
    }

    /// The share of its time that a worker gives to prompts while some wait, beside so many decodes.
    fn prefill_share(&self, c: &Candidate, decodes: u32, model: &StepTime, request: &Request) -> f64 {
        if decodes == 0 {
            return 1.0;
        }
        let budget = match c.paced {
            true => pace::Budget::Slack(c.prompt_budget),
            false => pace::Budget::Tokens(c.prompt_budget),
        };
        let most = pace::step_most(request.token_target(), request.short());
        pace::prompt_share(model, budget, most, decodes, c.decode_tokens as f64)
    }

    #[inline(always)]
    fn prefill_part(
        &self,
        at: usize,
        c: &Candidate,
        request: &Request,
        held: Option<&Held>,
        best: Option<Bring>,
    ) -> PrefillPart {
        let model = c.sane_model().unwrap_or(UNKNOWN);
        let (bring, cached) = self.cheapest_prefix(&model, c, request, held, best);
        let alone = model.prefill(request.prompt_tokens - cached, cached, c.prompt_budget);
        let share = self.prefill_share(c, c.decodes, &model, request);
        let usable = (if c.decodes > 0 { share * self.tuning.share_trust } else { 1.0 }).max(0.02);
        let room = room_seconds(c, &model, f64::from(request.prompt_tokens), request.expected());
        let turn = sane_seconds(c.timely_seconds) / usable + row_seconds(&model, c, request);
        let wait = sane_seconds(turn).max(room);
        let compute = alone / usable;
        let first = wait.max(bring) + compute;
        let mut terms = Terms { wait, bring: (bring - wait).max(0.0), compute, ..Terms::default() };
        let missed = self.miss(first, request.first_token_target());
        terms.first_token_loss = self.tuning.miss_seconds * missed;
        if c.role == Role::Decode {
            terms.role = self.tuning.prefill_on_decode_seconds;
        }
        if share < self.tuning.share_least {
            // A sliver of every step: it would hold its pages for long and delay everybody.
            terms.harm = self.tuning.miss_seconds * (1.0 - share / self.tuning.share_least);
        }
        PrefillPart { at, terms, missed, cost: terms.sum() }
    }

    /// Bringing what is held against computing it: the cheaper, as seconds to bring and tokens not to compute.
    #[inline(always)]
    fn cheapest_prefix(
        &self,
        model: &StepTime,
        c: &Candidate,
        request: &Request,
        held: Option<&Held>,
        best: Option<Bring>,
    ) -> (f64, u32) {
        if held.is_none() && best.is_none() {
            return (0.0, 0);
        }
        let most = request.prompt_tokens.saturating_sub(1);
        let compute = |cached: u32| model.prefill(request.prompt_tokens - cached, cached, c.prompt_budget);
        let mut cheapest = (0.0, 0, compute(0));
        let mut consider = |seconds: f64, cached: u32| {
            let cached = cached.min(most);
            let total = seconds + compute(cached);
            if total < cheapest.2 {
                cheapest = (seconds, cached, total);
            }
        };
        if let Some(held) = held {
            consider(0.0, held.device_tokens);
            let lower = held.tokens.saturating_sub(held.device_tokens);
            if lower > 0 {
                consider(held.tier.link().seconds(f64::from(lower)), held.tokens);
            }
        }
        if let Some(best) = best.filter(|_| self.tuning.peer_pulls) {
            let own = held.map_or(0, |held| held.device_tokens);
            if best.tokens > own {
                consider(best.link_seconds(c, best.tokens - own), best.tokens);
            }
        }
        (cheapest.0, cheapest.1)
    }

    #[inline(always)]
    fn decode_part(&self, at: usize, c: &Candidate, request: &Request) -> DecodePart {
        let model = c.sane_model().unwrap_or(UNKNOWN);
        let (rows, expected) = (f64::from(c.decodes), request.expected());
        let own = f64::from(request.prompt_tokens) + expected / 2.0;
        let context = c.decode_tokens as f64;
        let after = token_seconds(&model, rows + 1.0, context + own, c.rows_max);
        let mut terms = Terms::default();
        let lost = self.tuning.miss_seconds;
        let target = request.token_target();
        let mut missed = self.miss(after, target);
        terms.token_loss = lost * missed + after;
        // Where this one is sure to meet the target, those there now are too.
        if rows > 0.0 && missed > 0.0 {
            let before = token_seconds(&model, rows, context, c.rows_max);
            terms.harm = lost * rows * (missed - self.miss(before, target));
        }
        if matches!(c.role, Role::Prefill) {
            // Its first decode takes away more than one row: steps must stay short from then on.
            let less = if c.decodes == 0 { 1.0 - self.prefill_share(c, 1, &model, request) } else { 0.0 };
            terms.role = self.tuning.decode_on_prefill_seconds * (1.0 + less);
        }
        terms.room = room_seconds(c, &model, own + expected / 2.0, expected);
        if terms.room > 0.0 {
            missed = self.miss(after + terms.room / expected, target);
            terms.token_loss = lost * missed + after;
        }
        let step_seconds = if c.timely_seconds > 0.0 {
            let full = model.step(rows + f64::from(c.prompt_budget), 0.0, context);
            if c.paced {
                full.min(pace::step_most(target.min(1.0), request.short()).max(after))
            } else {
                full
            }
        } else {
            after
        };
        DecodePart { at, terms, missed, token_seconds: after, step_seconds, cost: terms.sum() }
    }

    fn join(&self, p: &PrefillPart, d: &DecodePart, request: &Request, candidates: &[Candidate]) -> Terms {
        let mut terms = p.terms;
        let target = request.token_target();
        if p.at != d.at {
            let from = &candidates[p.at];
            let seconds = from.link_to(&candidates[d.at]).seconds(f64::from(request.prompt_tokens));
            terms.transfer = seconds;
            // The first gap has the transfer and the rest of the step that the worker is in.
            let late = (seconds + d.step_seconds / 2.0) / request.expected().max(1.0);
            let with = self.miss(d.token_seconds + late, target);
            if with > 0.0 {
                let without = self.miss(d.token_seconds, target);
                terms.transfer += self.tuning.miss_seconds * (with - without).max(0.0);
            }
            // Whose answer has few tokens cannot make up for that gap.
            for (tokens, share) in (1..).zip(&request.short_shares) {
                if *share > SHARE_LEAST {
                    let gap = (seconds + d.step_seconds / 2.0) / f64::from(tokens);
                    let missed = self.miss(d.step_seconds + gap, target);
                    terms.transfer += self.tuning.short_miss_seconds * share.min(1.0) * missed;
                }
            }
        }
        terms.token_loss += d.terms.token_loss;
        terms.harm += d.terms.harm;
        terms.role += d.terms.role;
        terms.room += d.terms.room;
        terms
    }

    /// The best few of each side, each worker with itself, and pairs with a link of their own.
    fn pairs(
        &self,
        request: &Request,
        candidates: &[Candidate],
        search: Search,
    ) -> (Vec<(PrefillPart, DecodePart)>, usize) {
        let best = Bring::best(request, candidates);
        // Thousands may hold something: the entry of each, and not a search of all for everybody.
        let mut held: Vec<Option<&Held>> = vec![None; candidates.len()];
        for entry in request.held.iter().filter(|entry| entry.candidate < candidates.len()).rev() {
            held[entry.candidate] = Some(entry);
        }
        // Costs of all, but whole parts of the few only: those of thousands would be a lot to write down.
        let prefill = |at: usize| self.prefill_part(at, &candidates[at], request, held[at], best);
        let decode = |at: usize| self.decode_part(at, &candidates[at], request);
        let able: Vec<usize> =
            (0..candidates.len()).filter(|&at| candidates[at].role != Role::Encode).collect();
        let (prefills, decodes) = self.costs(request, candidates, &able, search, (&prefill, &decode));
        let few = self.tuning.few.max(1);
        let by_prefill = smallest(few, prefills.iter().copied()).into_iter().map(|i| prefill(able[i]));
        let by_decode: Vec<DecodePart> =
            smallest(few, decodes.iter().copied()).into_iter().map(|i| decode(able[i])).collect();
        let mut pairs = Vec::with_capacity(by_decode.len() * by_decode.len() + 16);
        for p in by_prefill {
            pairs.extend(by_decode.iter().map(|d| (p, *d)));
        }
        // The best that stays where it is: nothing travels.
        let local = smallest(few, prefills.iter().zip(&decodes).map(|(p, d)| p + d));
        pairs.extend(local.into_iter().map(|i| (prefill(able[i]), decode(able[i]))));
        if candidates.iter().any(|c| !c.near.is_empty()) {
            let near = self.near(&pairs, (&able, &prefills, &decodes), request, candidates);
            pairs.extend(near.into_iter().map(|(p, d)| (prefill(p), decode(d))));
        }
        (pairs, able.len())
    }

    /// What either part costs on each of those who are `able`. A search for the cheapest looks at whom roles are against
    /// only if they could be part of it: one route bounds the cheapest from above, and the role and a prompt's own work
    /// bound a part from below. The costs of the others are infinite then.
    fn costs(
        &self,
        request: &Request,
        candidates: &[Candidate],
        able: &[usize],
        search: Search,
        (prefill, decode): (impl Fn(usize) -> PrefillPart, impl Fn(usize) -> DecodePart),
    ) -> (Vec<f64>, Vec<f64>) {
        let everything = search == Search::Everything;
        let (mut prefills, mut decodes) = (vec![f64::INFINITY; able.len()], vec![f64::INFINITY; able.len()]);
        for (i, &at) in able.iter().enumerate() {
            if everything || candidates[at].role != Role::Decode {
                prefills[i] = prefill(at).cost;
            }
            if everything || candidates[at].role != Role::Prefill {
                decodes[i] = decode(at).cost;
            }
        }
        if everything {
            return (prefills, decodes);
        }
        let Tuning { prefill_on_decode_seconds, decode_on_prefill_seconds, .. } = self.tuning;
        let least = |costs: &[f64]| costs.iter().copied().fold(f64::INFINITY, f64::min);
        let (least_prefill, least_decode) = (least(&prefills), least(&decodes));
        let whose = |costs: &[f64], cost: f64| costs.iter().position(|other| *other == cost).map(|i| able[i]);
        let one = whose(&prefills, least_prefill).zip(whose(&decodes, least_decode));
        let one = one.map(|(p, d)| self.join(&prefill(p), &decode(d), request, candidates).sum());
        let most = (one.unwrap_or(f64::INFINITY) + self.tuning.equal_seconds) * (1.0 + ROUNDING);
        let held = request.held.iter().map(|held| held.tokens.max(held.device_tokens)).max().unwrap_or(0);
        let cached = held.min(request.prompt_tokens.saturating_sub(1));
        let cheapest_decode = least_decode.min(decode_on_prefill_seconds);
        let cheapest_prefill = least_prefill.min(prefill_on_decode_seconds);
        for (i, &at) in able.iter().enumerate() {
            let c = &candidates[at];
            if c.role == Role::Decode {
                let model = c.sane_model().unwrap_or(UNKNOWN);
                let own = model.prefill(request.prompt_tokens - cached, cached, c.prompt_budget);
                if prefill_on_decode_seconds + own + cheapest_decode <= most {
                    prefills[i] = prefill(at).cost;
                }
            } else if c.role == Role::Prefill && decode_on_prefill_seconds + cheapest_prefill <= most {
                decodes[i] = decode(at).cost;
            }
        }
        (prefills, decodes)
    }

    /// Pairs with a link of their own, as far as one may be cheaper than all `pairs`: a route costs at least what
    /// its ends and its link do. Of those who are able, the parts' costs are given in the same order.
    fn near(
        &self,
        pairs: &[(PrefillPart, DecodePart)],
        (able, prefills, decodes): (&[usize], &[f64], &[f64]),
        request: &Request,
        candidates: &[Candidate],
    ) -> Vec<(usize, usize)> {
        let costs = pairs.iter().map(|(p, d)| self.join(p, d, request, candidates).sum());
        let cheapest = costs.fold(f64::INFINITY, f64::min);
        let least = decodes.iter().copied().fold(f64::INFINITY, f64::min);
        let mut by_name: HashMap<&WorkerId, usize> = HashMap::new();
        let mut found = Vec::new();
        for (&p, cost) in able.iter().zip(prefills) {
            if cost + least > cheapest {
                continue;
            }
            for (worker, link) in &candidates[p].near {
                let at_least = cost + link.seconds(f64::from(request.prompt_tokens));
                if at_least + least > cheapest {
                    continue;
                }
                if by_name.is_empty() {
                    by_name.extend(able.iter().enumerate().rev().map(|(i, &d)| (&candidates[d].worker, i)));
                }
                if let Some(&i) = by_name.get(worker).filter(|&&i| at_least + decodes[i] <= cheapest) {
                    found.push((p, able[i]));
                }
            }
        }
        found
    }

    /// Every pair of candidates, for tests: `choose` looks at few of them.
    pub fn full_search(&self, request: &Request, candidates: &[Candidate]) -> Option<(Route, f64)> {
        let everything = Cost { tuning: Tuning { few: candidates.len().max(1), ..self.tuning.clone() } };
        everything.searched(request, candidates, Search::Everything)
    }

    /// `cheapest` without putting anybody off, for tests.
    pub fn few_search(&self, request: &Request, candidates: &[Candidate]) -> Option<(Route, f64)> {
        self.searched(request, candidates, Search::Everything)
    }

    /// What one route costs, for tests.
    pub fn terms(&self, request: &Request, candidates: &[Candidate], route: Route) -> Terms {
        let held = request.held.iter().find(|held| held.candidate == route.prefill);
        let best = Bring::best(request, candidates);
        let prefill = self.prefill_part(route.prefill, &candidates[route.prefill], request, held, best);
        let decode = self.decode_part(route.decode, &candidates[route.decode], request);
        self.join(&prefill, &decode, request, candidates)
    }

    /// The cheapest route and its cost. Requests take turns among routes that cost the same by and large, or one
    /// worker would do everything while little is asked for, and a new one nothing.
    pub fn cheapest(&self, request: &Request, candidates: &[Candidate]) -> Option<(Route, f64)> {
        self.searched(request, candidates, Search::Cheapest)
    }

    fn searched(&self, request: &Request, candidates: &[Candidate], search: Search) -> Option<(Route, f64)> {
        let (pairs, _) = self.pairs(request, candidates, search);
        let cost = |(p, d): &(PrefillPart, DecodePart)| {
            (Route { prefill: p.at, decode: d.at }, self.join(p, d, request, candidates).sum())
        };
        in_turn(pairs.iter().map(cost).collect(), self.tuning.equal_seconds, request.ordinal)
    }
}

/// A prefix at a peer.
#[derive(Clone, Copy, Debug)]
struct Bring {
    tokens: u32,
    link: crate::Link,
}

impl Bring {
    fn best(request: &Request, candidates: &[Candidate]) -> Option<Bring> {
        let held = request.held.iter().filter(|held| held.candidate < candidates.len());
        let best = held.max_by_key(|held| held.tokens)?;
        Some(Bring { tokens: best.tokens, link: candidates[best.candidate].link })
    }

    fn link_seconds(&self, to: &Candidate, tokens: u32) -> f64 {
        let link = crate::Link {
            setup_seconds: self.link.setup_seconds.max(to.link.setup_seconds),
            tokens_per_second: self.link.tokens_per_second.min(to.link.tokens_per_second),
        };
        link.seconds(f64::from(tokens))
    }
}

impl Policy for Cost {
    fn best(&self, stage: Stage, request: &Request, candidates: &[Candidate], side: &[usize]) -> usize {
        let bring = Bring::best(request, candidates);
        let cost = |at: usize| match stage {
            Stage::Prefill => {
                let held = request.held.iter().find(|held| held.candidate == at);
                self.prefill_part(at, &candidates[at], request, held, bring).cost
            }
            Stage::Decode => self.decode_part(at, &candidates[at], request).cost,
        };
        side[smallest(1, side.iter().map(|&at| cost(at)))[0]]
    }

    fn choose(&self, request: &Request, candidates: &[Candidate]) -> Option<Route> {
        self.cheapest(request, candidates).map(|(route, _)| route)
    }

    fn choose_decode(
        &self,
        request: &Request,
        candidates: &[Candidate],
        prefill: Option<usize>,
    ) -> Option<usize> {
        let nowhere = PrefillPart { at: usize::MAX, terms: Terms::default(), missed: 0.0, cost: 0.0 };
        let from = prefill.filter(|&at| at < candidates.len());
        let equal = self.tuning.equal_seconds;
        let part = |at: usize| self.decode_part(at, &candidates[at], request);
        let whole = |at: usize| match from {
            Some(p) => self.join(&PrefillPart { at: p, ..nowhere }, &part(at), request, candidates).sum(),
            None => part(at).cost,
        };
        // The way there only adds to a cost: whoever costs more without it than another does with it is out.
        let add = |parts: &mut Vec<(usize, f64)>, preferred: bool| {
            for (at, c) in candidates.iter().enumerate() {
                if c.role != Role::Encode && (c.role != Role::Prefill) == preferred {
                    parts.push((at, part(at).cost));
                }
            }
        };
        let cheapest = |parts: &[(usize, f64)]| parts.iter().min_by(|a, b| a.1.total_cmp(&b.1)).copied();
        let mut parts = Vec::with_capacity(candidates.len());
        add(&mut parts, true);
        // Whom roles are against, only if they could be better than the best of the others.
        let bound = cheapest(&parts).map_or(f64::INFINITY, |(at, _)| whole(at) + equal);
        if self.tuning.decode_on_prefill_seconds <= bound {
            add(&mut parts, false);
        }
        let first = cheapest(&parts)?.0;
        let most = whole(first) + equal;
        let near = parts.iter().filter(|(at, cost)| *at == first || *cost <= most);
        let costs: Vec<(usize, f64)> = near.map(|(at, _)| (*at, whole(*at))).collect();
        in_turn(costs, equal, request.ordinal).map(|(at, _)| at)
    }

    fn explain(&self, request: &Request, candidates: &[Candidate]) -> Explanation {
        let (pairs, able) = self.pairs(request, candidates, Search::Everything);
        let mut considered: Vec<(Route, Terms)> = pairs
            .iter()
            .map(|(p, d)| (Route { prefill: p.at, decode: d.at }, self.join(p, d, request, candidates)))
            .collect();
        considered.sort_by(|a, b| {
            (a.1.sum().total_cmp(&b.1.sum())).then((a.0.prefill, a.0.decode).cmp(&(b.0.prefill, b.0.decode)))
        });
        considered.dedup_by_key(|(route, _)| *route);
        // Of those that are as good as the first, the one whose turn it is.
        let chosen = self.cheapest(request, candidates).map(|(route, _)| route);
        if let Some(turn) = considered.iter().position(|(route, _)| Some(*route) == chosen) {
            considered[..=turn].rotate_right(1);
        }
        let name = |at: usize| candidates[at].worker.to_string();
        let reason = match considered.as_slice() {
            [] => "no candidate can prefill and decode".to_owned(),
            [(only, _)] => format!("{} and {} alone can do it", name(only.prefill), name(only.decode)),
            [(first, a), (_, b), ..] => format!(
                "{} and {} cost {:.3} s, the next best route {:.3} s; {} of {} workers can do it",
                name(first.prefill),
                name(first.decode),
                a.sum(),
                b.sum(),
                able,
                candidates.len()
            ),
        };
        let shown = considered.into_iter().take(8).map(|(route, terms)| Considered {
            prefill: name(route.prefill),
            decode: name(route.decode),
            cost_seconds: terms.sum(),
            terms,
        });
        Explanation { chosen, reason, considered: shown.collect() }
    }
}
