//! Where a request goes: what the policy is told, what it answers, and the Start that follows from it.

use std::sync::Arc;
use std::time::Duration;

use tandem_chassis::seam;
use tandem_placement::{Candidate, Held};
use tandem_proto::{convert, v1};
use tandem_types::{BLOCK_TOKENS, Incarnation, ServiceClass, WorkerId};

use super::Course;
use super::round::{Again, Round};
use crate::link::{Leg, Link};
use crate::prefixes;
use crate::records::Note;

/// At least one.
fn whole_ms(time: Duration) -> u32 {
    u32::try_from(time.as_millis()).unwrap_or(u32::MAX).max(1)
}

impl Course {
    pub(super) fn facts(&self) -> tandem_placement::Request {
        let (request, now) = (&self.request, seam::now());
        let targets = self.dispatcher.slo.filter(|_| request.class == ServiceClass::Online);
        let first = targets.map(|slo| {
            // What is placed again in the middle of its stream has the whole time once more.
            let from = if self.delivered.is_empty() { request.arrived } else { now };
            (from + slo.ttft).remaining(now).as_secs_f64()
        });
        let (expected_tokens, short_tokens, short_shares) = self.dispatcher.output_tokens();
        tandem_placement::Request {
            ordinal: self.ordinal,
            prompt_tokens: (request.prompt.len() + self.delivered.len()) as u32,
            max_tokens: request.stop.max_tokens,
            expected_tokens,
            short_tokens,
            short_shares,
            first_token_seconds: first.unwrap_or(f64::INFINITY),
            token_seconds: targets.map_or(f64::INFINITY, |slo| slo.tpot.as_secs_f64()),
            class: request.class,
            held: Vec::new(),
        }
    }

    /// Candidates without those avoided, unless nobody else is left.
    fn candidates(&self) -> (Vec<Arc<Link>>, Vec<Candidate>) {
        let all = self.dispatcher.workers.candidates();
        if self.avoid.is_empty() {
            return all;
        }
        let fresh = all.0.iter().cloned().zip(all.1.iter().cloned());
        let fresh: (Vec<_>, Vec<_>) = fresh.filter(|(link, _)| !self.avoid.contains(&link.worker)).unzip();
        if fresh.0.is_empty() { all } else { fresh }
    }

    pub(super) fn choose(&mut self) -> Option<(tandem_placement::Route, Vec<Arc<Link>>)> {
        let (links, candidates) = self.candidates();
        let mut request = self.facts();
        let began = seam::now();
        if !self.unscored() {
            request.held = self.look_up(&links);
        }
        let dispatcher = self.dispatcher.clone();
        let policy = &*dispatcher.policy;
        let route = policy.choose(&request, &candidates);
        let took = seam::now().since(began);
        if let Some(route) = route {
            self.observe_route(&request, &candidates, route, took);
        }
        self.record.note(Note::route(policy, request, candidates, route));
        Some((route?, links))
    }

    fn observe_route(
        &mut self,
        request: &tandem_placement::Request,
        candidates: &[Candidate],
        route: tandem_placement::Route,
        took: Duration,
    ) {
        let metrics = &self.dispatcher.metrics;
        metrics.observe_decision(route.prefill == route.decode, took);
        let at = |held: &&Held| held.candidate == route.prefill;
        let own = request.held.iter().find(at).map_or(0, |held| held.device_tokens);
        let best = request.held.iter().map(|held| held.tokens).max().unwrap_or(0);
        metrics.observe_held("device", own);
        metrics.observe_held("peer", best.saturating_sub(own));
        if self.delivered.is_empty() {
            let prefill = &candidates[route.prefill];
            let cached = own.min(request.prompt_tokens.saturating_sub(1));
            self.predicted_first = prefill.sane_model().map(|model| {
                let waited = seam::now().since(self.request.arrived).as_secs_f64();
                let compute = model.prefill_alone(request.prompt_tokens - cached, cached);
                // On average half of the step that is under way is still to come.
                let decodes = f64::from(prefill.decodes);
                let step = if prefill.running > 0 {
                    model.step(decodes, 0.0, prefill.decode_tokens as f64)
                } else {
                    0.0
                };
                waited + prefill.timely_seconds + step / 2.0 + compute
            });
        }
    }

    /// What workers hold of the prompt, by index of their links.
    fn look_up(&mut self, links: &[Arc<Link>]) -> Vec<Held> {
        let workers = &self.dispatcher.workers;
        if self.hashes.is_none() {
            let identity = workers.identity();
            self.hashes = identity
                .map(|identity| prefixes::hashes(&identity, &self.request.salt, &self.request.prompt));
        }
        // Links are in order of their workers' names.
        let place = |worker: &WorkerId, incarnation: Incarnation| {
            let at = links.binary_search_by(|link| link.worker.cmp(worker)).ok()?;
            (links[at].incarnation == incarnation).then_some(at)
        };
        let held = workers.prefixes().held(self.hashes.as_deref().unwrap_or_default(), place);
        let best = held.iter().max_by_key(|held| held.tokens);
        self.longest = best.map(|held| (links[held.candidate].worker.clone(), held.tokens / BLOCK_TOKENS));
        held
    }

    /// Whom this worker may ask for the beginning of the prompt: who has computed it for this request, or who is
    /// known to hold the longest part of it.
    fn holder_for(&self, worker: &WorkerId) -> Option<v1::Holder> {
        let whole = self.request.prompt.len() as u32 / BLOCK_TOKENS;
        let computed = self.holder.as_ref().map(|holder| (holder, whole));
        let known = self.longest.as_ref().map(|(holder, blocks)| (holder, *blocks));
        let (holder, blocks) = computed.or(known).filter(|(holder, _)| *holder != worker)?;
        self.dispatcher.workers.holder(holder, blocks)
    }

    /// Who goes on from the KV at `prefill`. Chosen when it is needed, by the same policy.
    pub(super) fn choose_decode(&self, prefill: &WorkerId) -> Option<Arc<Link>> {
        let (links, candidates) = self.candidates();
        let at = links.iter().position(|link| link.worker == *prefill);
        let chosen = self.dispatcher.policy.choose_decode(&self.facts(), &candidates, at);
        self.record.note(Note::decode(candidates, chosen));
        chosen.map(|index| links[index].clone())
    }

    /// Sends a Start. With a handle, the tokens are those that the handle stands for.
    pub(super) fn open(
        &mut self,
        link: &Arc<Link>,
        until: v1::Until,
        handle: Option<v1::Handle>,
        after: u32,
    ) -> Result<Leg, Round> {
        self.attempt += 1;
        let request = &self.request;
        let now = seam::now();
        let mut tokens = request.prompt.to_vec();
        tokens.extend(&self.delivered);
        if let Some(handle) = &handle {
            tokens.truncate(handle.tokens as usize);
        }
        // What is handed over needs nothing borrowed, and what is scored must be computed.
        let unscored = self.unscored() && handle.is_none();
        let borrows = handle.is_none() && !unscored;
        let holders = if borrows { self.holder_for(&link.worker) } else { None };
        let online = request.class == tandem_types::ServiceClass::Online;
        let targets = self.dispatcher.slo.filter(|_| online);
        let start = v1::Start {
            leg: 0,
            request: convert::id128(request.id.0),
            choice: request.choice.0,
            attempt: self.attempt,
            after,
            worker_incarnation: 0,
            epoch: 0,
            inputs: handle.into_iter().collect(),
            holders: holders.into_iter().collect(),
            until: until as i32,
            rows_wanted: if unscored { v1::RowsWanted::PromptLogprobs } else { v1::RowsWanted::None } as i32,
            score_from: if unscored { self.scored as u32 } else { 0 },
            score_top: request.score_prompt.filter(|_| unscored).unwrap_or(0),
            remaining_ms: request.deadline.remaining(now).as_millis().min(u128::from(u32::MAX)) as u32,
            class: match request.class {
                tandem_types::ServiceClass::Online => v1::ServiceClass::Online,
                tandem_types::ServiceClass::Offline => v1::ServiceClass::Offline,
            } as i32,
            tokens,
            prompt_tokens: request.prompt.len() as u32,
            sampling: Some((&request.sampling).into()),
            stop: Some((&request.stop).into()),
            salt: request.salt.clone().into(),
            adapter: String::new(),
            waited_ms: now.since(request.arrived).as_millis().min(u128::from(u32::MAX)) as u32,
            // Without a collector of our own, the client's context goes on as it came.
            traceparent: tandem_chassis::telemetry::traceparent_of_current()
                .or_else(|| request.traceparent.clone())
                .unwrap_or_default(),
            request_name: request.name.clone(),
            ttft_target_ms: targets.map(|slo| whole_ms(slo.ttft)),
            tpot_target_ms: targets.map(|slo| whole_ms(slo.tpot)),
        };
        let until = until.as_str_name().into();
        self.record.note(Note::Start { worker: link.worker.clone(), attempt: self.attempt, until });
        link.open(start)
            .map_err(|error| Round::Again(Again::new(Some(link.worker.clone()), false, error.to_string())))
    }
}
