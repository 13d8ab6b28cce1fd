//! The life of one request on the workers, and every rule about what the router may trust.
//!
//! A request goes through rounds. A round places it (prefill, then decode, or one worker for both) and
//! streams; whatever breaks before the decode leg's own first delta is placed again, in the next round, with
//! the tokens emitted so far. Deltas are accepted from this round's legs only, each position is delivered
//! once and in order, and there is exactly one terminal event. Dropping the course drops its legs, and that
//! cancels them everywhere.

mod placing;
mod round;
mod scoring;

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicI64, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tandem_chassis::config::Slo;
use tandem_chassis::{Shutdown, Tasks, seam};
use tandem_placement::admission::{self, Limits, Verdict};
use tandem_placement::planner::Observer;
use tandem_placement::{Candidate, Policy, ShortShares};
use tandem_proto::convert;
use tandem_proto::v1::{self, event};
use tandem_types::{
    BlockHash, FinishReason, Sampled, ServiceClass, Time, TokenId, Usage, WorkerId, WorkerState,
};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tracing::Instrument;

use crate::link::{Leg, LegEvent, Link};
use crate::metrics::Metrics;
use crate::records::{Note, Record, Records};
use crate::request::{DispatchError, GenerateEvent, GenerateRequest, Generation, PromptShare, Route};
use crate::workers::Workers;
use round::{Again, Round, broken_after_delta, broken_before_delta, finish};

/// Work redone after faults: at most this many attempts of a request.
const FAULTS_MAX: u32 = 3;
/// Work redone after faults is a fifth of the load at most; so much may be saved up, in fifths of a request.
const RETRIES_SAVED: i64 = 500;
/// Placements that ended in a refusal or preemption before the request is given up as overloaded.
const PLACEMENTS_MAX: u32 = 64;
/// How long a request that must be placed again waits for a worker to turn up.
const WORKER_WAIT: Duration = Duration::from_secs(2);
/// Tokens that may wait for a client; then its legs are paused.
const CLIENT_QUEUE: usize = 64;
/// A client that reads nothing for so long is given up.
const CLIENT_PATIENCE: Duration = Duration::from_secs(30);

/// Over so many seconds the length of answers is averaged.
const ANSWERS_SECONDS: f64 = 60.0;

/// Takes requests and sees them through.
pub struct Dispatcher {
    workers: Arc<Workers>,
    policy: Box<dyn Policy>,
    metrics: Arc<Metrics>,
    records: Arc<Records>,
    /// One permit per request that no worker has begun yet.
    queue: Arc<Semaphore>,
    queue_max: usize,
    ordinal: AtomicU64,
    /// Work that may be redone after faults, in fifths of a request.
    retries: AtomicI64,
    slo: Option<Slo>,
    answers: Mutex<Observer>,
    tasks: Tasks,
    shutdown: Shutdown,
}

impl Dispatcher {
    pub(crate) fn new(
        workers: Arc<Workers>,
        policy: Box<dyn Policy>,
        metrics: Arc<Metrics>,
        records: Arc<Records>,
        queue_max: usize,
        slo: Option<Slo>,
        shutdown: Shutdown,
    ) -> Arc<Dispatcher> {
        Arc::new(Dispatcher {
            workers,
            policy,
            metrics,
            records,
            queue: Arc::new(Semaphore::new(queue_max)),
            queue_max,
            ordinal: AtomicU64::new(0),
            retries: AtomicI64::new(RETRIES_SAVED),
            slo,
            answers: Mutex::new(Observer::new(ANSWERS_SECONDS)),
            tasks: Tasks::new(),
            shutdown,
        })
    }

    /// Takes a request in, or says why not. Returns at its first event; the rest comes through the
    /// generation, and dropping that cancels everything at once.
    pub async fn start(self: &Arc<Self>, request: GenerateRequest) -> Result<Generation, DispatchError> {
        let taken = self.admit(request);
        let (course, events) = taken.inspect_err(|error| self.metrics.observe_refusal(error))?;
        let span = tracing::info_span!("request", request = course.request.name);
        if let Some(traceparent) = &course.request.traceparent {
            tandem_chassis::telemetry::set_parent(&span, traceparent);
        }
        self.tasks.spawn(course.run().instrument(span));
        Generation::begin(events).await
    }

    fn admit(
        self: &Arc<Self>,
        request: GenerateRequest,
    ) -> Result<(Course, mpsc::Receiver<GenerateEvent>), DispatchError> {
        if self.shutdown.is_draining() {
            return Err(DispatchError::Draining);
        }
        let overloaded = DispatchError::Overloaded { retry_after: Duration::from_secs(1) };
        let permit = self.queue.clone().try_acquire_owned().map_err(|_| overloaded)?;
        let candidates = self.workers.candidates().1;
        // Suspects may be back in a moment; the course waits for them a little.
        if candidates.is_empty() && self.workers.count(WorkerState::Suspect) == 0 {
            return Err(self.no_worker());
        }
        self.check_chance(&request, &candidates)?;
        let earn = |saved: i64| (saved < RETRIES_SAVED).then_some(saved + 1);
        let _ = self.retries.fetch_update(Ordering::Relaxed, Ordering::Relaxed, earn);
        let (out, events) = mpsc::channel(CLIENT_QUEUE);
        let scored = usize::from(request.score_prompt.is_some());
        if scored > 0 {
            // Nothing stands before the first token, so nobody need score it.
            let first = Sampled { token: request.prompt[0], ..Sampled::default() };
            out.try_send(GenerateEvent::Scored(vec![first])).expect("the channel is new");
        }
        let record = self.records.begin(&request);
        self.metrics.request_begins();
        let course = Course {
            dispatcher: self.clone(),
            ordinal: self.ordinal.fetch_add(1, Ordering::Relaxed),
            request,
            out,
            queued: Some(permit),
            delivered: Vec::new(),
            scored,
            cached_tokens: 0,
            attempt: 0,
            faults: 0,
            placements: 0,
            avoid: BTreeSet::new(),
            holder: None,
            hashes: None,
            longest: None,
            predicted_first: None,
            routed: false,
            first_token: None,
            last_token: None,
            record,
        };
        Ok((course, events))
    }

    /// With latency targets, what has no chance to meet them is better refused now than late.
    fn check_chance(&self, request: &GenerateRequest, candidates: &[Candidate]) -> Result<(), DispatchError> {
        let Some(slo) = self.slo.filter(|_| !candidates.is_empty()) else { return Ok(()) };
        let (expected_tokens, short_tokens, short_shares) = self.output_tokens();
        let facts = tandem_placement::Request {
            prompt_tokens: request.prompt.len() as u32,
            max_tokens: request.stop.max_tokens,
            expected_tokens,
            short_tokens,
            short_shares,
            first_token_seconds: slo.ttft.as_secs_f64(),
            token_seconds: slo.tpot.as_secs_f64(),
            class: request.class,
            ..tandem_placement::Request::default()
        };
        // The queue's own bound is kept by its permits.
        match admission::admit(&facts, candidates, &Limits::default(), 0, self.queue_max) {
            Verdict::Admit { .. } => Ok(()),
            Verdict::Shed { reason, retry_after } => {
                tracing::debug!(request = request.name, %reason, "request shed");
                Err(DispatchError::Overloaded { retry_after })
            }
        }
    }

    /// Mean length of the answers of late, what nearly all of them have after the first token, and how many have only
    /// few.
    fn output_tokens(&self) -> (f64, f64, ShortShares) {
        let answers = self.answers.lock().expect("nothing panics under this lock");
        (answers.output_tokens(), answers.short_tokens(), answers.short_shares())
    }

    /// Tokens were delivered.
    fn count_drawn(&self, tokens: usize, now: Time) {
        self.answers.lock().expect("nothing panics under this lock").drawn(tokens as f64, 0.0, now);
    }

    /// An answer of so many tokens has ended.
    fn count_answer(&self, tokens: usize) {
        let mut answers = self.answers.lock().expect("nothing panics under this lock");
        answers.drawn(0.0, 1.0, seam::now());
        answers.answered(tokens as u32);
    }

    /// Whether work may be redone after a fault; counts it if so.
    fn may_redo(&self) -> bool {
        let enough = |saved: i64| (saved >= 5).then(|| saved - 5);
        self.retries.fetch_update(Ordering::Relaxed, Ordering::Relaxed, enough).is_ok()
    }

    fn no_worker(&self) -> DispatchError {
        let known = self.workers.describe().len();
        DispatchError::NoWorker { message: format!("none of the {known} known workers takes work now") }
    }

    /// Who chooses.
    pub(crate) fn policy(&self) -> &dyn Policy {
        &*self.policy
    }

    /// Requests that no worker has begun yet.
    pub fn waiting(&self) -> usize {
        self.queue_max - self.queue.available_permits()
    }

    /// Requests taken in and not over.
    pub fn running(&self) -> usize {
        self.tasks.len()
    }

    /// Waits for running requests, at most this long, then ends them.
    pub async fn finish(&self, limit: Duration) {
        self.tasks.shutdown(limit).await;
    }
}

/// A prompt that is computed, or being computed, and the lease on it.
struct Grant {
    prefill: Leg,
    granted_as: u32,
    handle: v1::Handle,
}

/// One request under way.
struct Course {
    dispatcher: Arc<Dispatcher>,
    ordinal: u64,
    request: GenerateRequest,
    out: mpsc::Sender<GenerateEvent>,
    queued: Option<OwnedSemaphorePermit>,
    /// What the client has, for whoever goes on.
    delivered: Vec<TokenId>,
    /// Positions of the prompt whose scores the client has, where they are wanted.
    scored: usize,
    cached_tokens: u32,
    attempt: u32,
    faults: u32,
    placements: u32,
    avoid: BTreeSet<WorkerId>,
    /// Who has computed the prompt last.
    holder: Option<WorkerId>,
    /// Names of the prompt's blocks, and who holds the longest beginning of it.
    hashes: Option<Vec<BlockHash>>,
    longest: Option<(WorkerId, u32)>,
    /// Seconds from its arrival to its first token, as predicted when it was placed.
    predicted_first: Option<f64>,
    routed: bool,
    first_token: Option<Time>,
    last_token: Option<Time>,
    record: Record,
}

impl Course {
    async fn run(mut self) {
        let out = self.out.clone();
        let deadline = self.request.deadline;
        let ended = tokio::select! {
            ended = self.rounds() => Some(ended),
            () = seam::sleep_until(deadline) => Some(Err(DispatchError::Deadline)),
            () = out.closed() => None,
        };
        self.queued = None;
        let usage = Usage {
            prompt_tokens: self.request.prompt.len() as u32,
            cached_tokens: self.cached_tokens,
            output_tokens: self.delivered.len() as u32,
        };
        let decoding = self.last_token.unwrap_or_default().since(self.first_token.unwrap_or_default());
        let metrics = &self.dispatcher.metrics;
        let event = match ended {
            None => {
                self.record.note(Note::End("the client left".into()));
                metrics.observe_end(self.request.arrived, decoding, &usage, "abort");
                return;
            }
            Some(Ok(reason)) => {
                let word = if reason == FinishReason::Length { "length" } else { "stop" };
                self.record.note(Note::End(word.into()));
                metrics.observe_end(self.request.arrived, decoding, &usage, word);
                self.dispatcher.count_answer(self.delivered.len());
                self.observe_targets(decoding);
                GenerateEvent::Finished { reason, usage }
            }
            Some(Err(error)) => {
                tracing::warn!(request = self.request.name, %error, "request failed");
                self.record.note(Note::End(error.to_string()));
                metrics.observe_end(self.request.arrived, decoding, &usage, "error");
                GenerateEvent::Failed(error)
            }
        };
        let _ = seam::timeout(CLIENT_PATIENCE, self.out.send(event)).await;
    }

    /// Whether the answer was in time; offline work has no targets.
    fn observe_targets(&self, decoding: Duration) {
        let online = self.request.class == ServiceClass::Online;
        let Some(slo) = self.dispatcher.slo.filter(|_| online) else { return };
        let first = self.first_token.is_some_and(|first| first.since(self.request.arrived) <= slo.ttft);
        let further = self.delivered.len().saturating_sub(1) as u32;
        self.dispatcher.metrics.observe_targets(first, decoding <= slo.tpot * further);
    }

    async fn rounds(&mut self) -> Result<FinishReason, DispatchError> {
        loop {
            let again = match self.round().await {
                Round::Finished(reason) => return Ok(reason),
                Round::Broken(error) => return Err(error),
                Round::Again(again) => again,
            };
            self.count("placed again", again)?;
            self.wait_for_candidates().await?;
        }
    }

    /// Counts a placement that came to nothing; an error if it was the last that is allowed.
    fn count(&mut self, what: &'static str, again: Again) -> Result<(), DispatchError> {
        let Again { avoid, fault, why, .. } = again;
        self.record.note(Note::Again { what: what.into(), why: why.clone(), fault });
        self.dispatcher.metrics.observe_retry(fault);
        self.avoid.extend(avoid);
        self.faults += u32::from(fault);
        self.placements += 1;
        if fault && !self.dispatcher.may_redo() {
            let message = format!("{why}; too much has been redone after faults of late");
            return Err(DispatchError::WorkerLost { attempts: self.faults, message });
        }
        if self.faults >= FAULTS_MAX {
            return Err(DispatchError::WorkerLost { attempts: self.faults, message: why });
        }
        if self.placements >= PLACEMENTS_MAX {
            return Err(DispatchError::Overloaded { retry_after: Duration::from_secs(1) });
        }
        Ok(())
    }

    /// Until somebody can take it; the workers avoided so far will do if nobody else turns up.
    async fn wait_for_candidates(&mut self) -> Result<(), DispatchError> {
        let workers = self.dispatcher.workers.clone();
        let mut changes = workers.watch();
        let wait = async {
            while workers.candidates().1.is_empty() {
                if changes.changed().await.is_err() {
                    return;
                }
            }
        };
        let waited = seam::timeout(WORKER_WAIT, wait).await;
        waited.map_err(|_| self.dispatcher.no_worker())
    }

    /// Places the request once and streams what comes, until it ends or something breaks.
    async fn round(&mut self) -> Round {
        if let PromptShare::Follows(lead) = &mut self.request.share {
            // An error says that the lead is over without having computed anything: then everybody for himself.
            let holder = lead.wait_for(Option::is_some).await.ok().and_then(|holder| holder.clone());
            self.holder = holder.or(self.holder.take());
            self.request.share = PromptShare::Alone;
        }
        let Some((route, links)) = self.choose() else {
            return Round::Again(Again::new(None, false, "no worker takes work now".into()));
        };
        let (prefill, decode) = (links[route.prefill].clone(), links[route.decode].clone());
        let rest = self.request.stop.max_tokens - self.delivered.len() as u32;
        if prefill.worker == decode.worker || rest == 1 {
            self.say_route(&prefill.worker, &prefill.worker).await;
            let leg = match self.open(&prefill, v1::Until::End, None, 0) {
                Ok(leg) => leg,
                Err(again) => return again,
            };
            return self.stream(leg, None, false).await;
        }
        self.hand_off(&prefill).await
    }

    /// Prefill on one worker, decode on another. The decode worker is started at the grant where pulling
    /// alongside pays, else at the first token, which goes to the client whoever brings it first.
    async fn hand_off(&mut self, link: &Arc<Link>) -> Round {
        let mut prefill = match self.open(link, v1::Until::FirstToken, None, 0) {
            Ok(leg) => leg,
            Err(again) => return again,
        };
        let granted_as = self.attempt;
        let mut handle = None;
        let mut decode: Option<Leg> = None;
        loop {
            let mut follower = decode.as_mut();
            let (from_follower, event) = tokio::select! {
                biased;
                event = next_of(&mut follower) => (true, event),
                event = prefill.next() => (false, event),
            };
            match event {
                LegEvent::Worker(event::Event::Granted(granted)) if !from_follower => {
                    self.begun(granted.cached_tokens);
                    if let Some(granted) = &granted.handle {
                        decode = self.follow_along(&prefill, granted, granted_as).await;
                    }
                    handle = granted.handle;
                }
                LegEvent::Worker(event::Event::Scored(scored)) if !from_follower => {
                    if let Err(round) = self.take_scores(&scored, prefill.worker()).await {
                        return round;
                    }
                }
                LegEvent::Worker(event::Event::Delta(delta)) if !from_follower => {
                    let Some(handle) = handle else {
                        let why = format!("{} sent a token before its grant", prefill.worker());
                        return Round::Again(Again::new(Some(prefill.worker().clone()), true, why));
                    };
                    self.computed_at(prefill.worker());
                    let grant = Grant { prefill, granted_as, handle: *handle };
                    return self.decode(grant, delta, decode).await;
                }
                // It followed to the end before the prefill worker's own word came.
                LegEvent::Worker(event::Event::Delta(delta)) => {
                    self.computed_at(prefill.worker());
                    let leg = decode.take().expect("it has just spoken");
                    if let Err(round) = self.deliver(&delta, leg.worker()).await {
                        return round;
                    }
                    return self.stream(leg, None, true).await;
                }
                // The request ended with its first token, and the prefill worker is about to say so.
                LegEvent::Worker(event::Event::Released(_)) if from_follower => decode = None,
                event if from_follower => {
                    let leg = decode.take().expect("it has just spoken");
                    match broken_before_delta(leg.worker(), event) {
                        Round::Again(again) if !again.lease_serves => return Round::Again(again),
                        Round::Again(again) => {
                            if let Err(error) = self.count("decode placed again", again) {
                                return Round::Broken(error);
                            }
                        }
                        over => return over,
                    }
                }
                // The follower finds out by itself and its word decides: it may hold every byte already.
                LegEvent::Lost(_) if decode.is_some() => {
                    self.avoid.insert(prefill.worker().clone());
                    let leg = decode.take().expect("looked at above");
                    return self.stream(leg, None, false).await;
                }
                event => return broken_before_delta(prefill.worker(), event),
            }
        }
    }

    /// Starts a decode worker that pulls while the prompt is still being computed, if that pays.
    async fn follow_along(&mut self, prefill: &Leg, handle: &v1::Handle, granted_as: u32) -> Option<Leg> {
        // All scores come from the prefill worker, and before the first token whoever brings it.
        if !tandem_placement::overlap_pays(handle.tokens) || self.unscored() {
            return None;
        }
        // What stays where it is has nothing to pull.
        let link = self.choose_decode(prefill.worker()).filter(|link| link.worker != *prefill.worker())?;
        self.say_route(prefill.worker(), &link.worker).await;
        self.open(&link, v1::Until::End, Some(handle.clone()), granted_as).ok()
    }

    /// Delivers the first token, then sees to it that somebody goes on, as often as the held lease allows.
    /// `decode` is who follows already.
    async fn decode(&mut self, grant: Grant, first: v1::Delta, mut decode: Option<Leg>) -> Round {
        let Grant { mut prefill, granted_as, handle } = grant;
        let mut target = None;
        if decode.is_none() {
            target = self.choose_decode(prefill.worker());
            if let Some(link) = &target {
                self.say_route(prefill.worker(), &link.worker).await;
            }
        }
        if let Err(round) = self.deliver(&first, prefill.worker()).await {
            return round;
        }
        if self.ends_with_last() {
            // Only the prefill worker reports the end then; no decode leg is needed.
            drop(decode);
            return self.stream(prefill, None, false).await;
        }
        loop {
            let before = self.delivered.len();
            let leg = match (decode.take(), target.take()) {
                (Some(leg), _) => Ok(leg),
                (None, Some(link)) => self.open(&link, v1::Until::End, Some(handle.clone()), granted_as),
                (None, None) => {
                    return Round::Again(Again::new(None, false, "nobody can decode".into()));
                }
            };
            let round = match leg {
                Ok(leg) => self.stream(leg, Some(&mut prefill), false).await,
                Err(round) => round,
            };
            let Round::Again(again) = round else { return round };
            let lease_stands = again.lease_serves && prefill.try_next().is_none();
            if self.delivered.len() > before || !lease_stands {
                return Round::Again(again);
            }
            // Another decoder from the same lease; nothing is computed again.
            if let Err(error) = self.count("decode placed again", again) {
                return Round::Broken(error);
            }
            target = self.choose_decode(prefill.worker());
        }
    }

    /// Streams a leg to its end. `prefill` holds the lease that the leg pulls from; once the leg has sent a
    /// delta of its own (`own_delta`), the lease has done its service.
    ///
    /// Until the leg's own first delta everything that breaks is placed again; after it, only preemption is, and
    /// everything where nobody has seen a token yet.
    async fn stream(&mut self, mut leg: Leg, mut prefill: Option<&mut Leg>, mut own_delta: bool) -> Round {
        loop {
            let event = tokio::select! {
                biased;
                event = leg.next() => event,
                event = next_of(&mut prefill) => {
                    match event {
                        LegEvent::Worker(event::Event::Finished(finished)) => return finish(&finished),
                        LegEvent::Worker(event::Event::Released(_)) => prefill = None,
                        // The puller finds out by itself and its word decides: it may hold every byte already.
                        LegEvent::Worker(_) | LegEvent::Lost(_) => prefill = None,
                    }
                    continue;
                }
            };
            match event {
                LegEvent::Worker(event::Event::Granted(granted)) => self.begun(granted.cached_tokens),
                LegEvent::Worker(event::Event::Scored(scored)) => {
                    if let Err(round) = self.take_scores(&scored, leg.worker()).await {
                        return round;
                    }
                }
                LegEvent::Worker(event::Event::Delta(delta)) => {
                    if !std::mem::replace(&mut own_delta, true) {
                        self.computed_at(leg.worker());
                    }
                    prefill = None;
                    match self.deliver(&delta, leg.worker()).await {
                        Ok(()) => {}
                        Err(Round::Again(again)) => {
                            return Round::Again(Again { lease_serves: false, ..again });
                        }
                        Err(over) => return over,
                    }
                }
                LegEvent::Worker(event::Event::Finished(finished)) => return finish(&finished),
                LegEvent::Worker(event::Event::Preempted(_)) => {
                    let why = format!("{} preempted it", leg.worker());
                    return Round::Again(Again { lease_serves: !own_delta, ..Again::new(None, false, why) });
                }
                other if own_delta && !self.request.unseen => {
                    return broken_after_delta(leg.worker(), self.faults, other);
                }
                other if own_delta => {
                    return match broken_before_delta(leg.worker(), other) {
                        // What the lease holds is the prompt; more is known by now.
                        Round::Again(again) => Round::Again(Again { lease_serves: false, ..again }),
                        over => over,
                    };
                }
                other => return broken_before_delta(leg.worker(), other),
            }
        }
    }

    /// Hands a delta on: each position once, in order; a different token at a delivered position ends the leg.
    async fn deliver(&mut self, delta: &v1::Delta, from: &WorkerId) -> Result<(), Round> {
        self.begun(0);
        self.check_scored(from)?;
        let now = seam::now();
        self.dispatcher.count_drawn(delta.tokens.len(), now);
        for (i, &token) in delta.tokens.iter().enumerate() {
            let position = delta.position as usize + i;
            if let Some(known) = self.delivered.get(position) {
                if *known != token {
                    self.dispatcher.metrics.observe_divergence();
                    tracing::error!(request = self.request.name, worker = %from, position, "a leg diverged");
                    let why = format!("{from} sent another token at position {position}");
                    return Err(Round::Again(Again::new(Some(from.clone()), true, why)));
                }
                continue;
            }
            if position > self.delivered.len() {
                let why = format!("{from} left out positions {} to {position}", self.delivered.len());
                return Err(Round::Again(Again::new(Some(from.clone()), true, why)));
            }
            self.delivered.push(token);
            let sampled = convert::sampled(token, delta.logprobs.get(i));
            self.first_token.get_or_insert(now);
            let since = self.last_token.replace(now).unwrap_or(self.request.arrived);
            self.dispatcher.metrics.observe_token(position == 0, now.since(since));
            if let Some(predicted) = self.predicted_first.take() {
                self.dispatcher.metrics.observe_prediction(predicted, now.since(since).as_secs_f64());
            }
            self.send(GenerateEvent::Token { position: position as u32, sampled }).await?;
        }
        Ok(())
    }

    /// A worker has begun: the request leaves the queue.
    fn begun(&mut self, cached_tokens: u32) {
        if self.queued.take().is_some() {
            self.dispatcher.metrics.observe_queue(seam::now().since(self.request.arrived));
        }
        if self.delivered.is_empty() {
            self.cached_tokens = self.cached_tokens.max(cached_tokens);
        }
    }

    /// This worker has the prompt's KV: others may borrow it.
    fn computed_at(&mut self, worker: &WorkerId) {
        self.holder = Some(worker.clone());
        if let PromptShare::Leads(lead) = &self.request.share {
            lead.send_replace(Some(worker.clone()));
        }
    }

    fn ends_with_last(&self) -> bool {
        let Some(last) = self.delivered.last() else { return false };
        let (stop, drawn) = (&self.request.stop, self.delivered.len() as u32);
        let stops = stop.eos.contains(last) || stop.stop_token_ids.contains(last);
        drawn >= stop.max_tokens || (stops && drawn > stop.min_tokens)
    }

    async fn say_route(&mut self, prefill: &WorkerId, decode: &WorkerId) {
        if !std::mem::replace(&mut self.routed, true) {
            let route = Route { prefill: prefill.0.clone(), decode: decode.0.clone() };
            let _ = self.out.send(GenerateEvent::Routed(route)).await;
        }
    }
}

/// The next event of a leg that may not be there: then never.
async fn next_of(leg: &mut Option<&mut Leg>) -> LegEvent {
    match leg {
        Some(leg) => leg.next().await,
        None => std::future::pending().await,
    }
}
