//! Drives a batcher and the toy engine, plays the caller, and checks everything that can be seen from outside.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use tandem_batching::{Batcher, Config, Event, Origin, Plan, Scoring, SequenceId, SequenceSpec};
use tandem_kv_cache::{ChainSeed, FirstTokenBundle, KvCache, chain_seed};
use tandem_types::{
    Attempt, BLOCK_TOKENS, Choice, FinishReason, KvIdentity, LeaseId, Sampled, SamplingParams, ServiceClass,
    StopRules, Time, TokenId, Until, blocks_for,
};

use crate::toy::{Engine, oracle, oracle_scores};

/// What a caller wants.
#[derive(Clone, Debug)]
pub struct Ask {
    pub prompt: Vec<TokenId>,
    pub stop: StopRules,
    /// `FirstToken` is handed off under a lease, adopted here, and goes on to the end.
    pub until: Until,
    /// Score the prompt, with so many of the likeliest tokens at each position.
    pub score: Option<u32>,
}

impl Ask {
    pub fn new(prompt: &[TokenId], max_tokens: u32) -> Ask {
        let stop = StopRules { max_tokens, ..StopRules::default() };
        Ask { prompt: prompt.to_vec(), stop, until: Until::End, score: None }
    }

    pub fn scored(prompt: &[TokenId], max_tokens: u32, top: u32) -> Ask {
        Ask { score: Some(top), ..Ask::new(prompt, max_tokens) }
    }
}

/// How an ask has ended.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum End {
    Finished(FinishReason),
    Rejected,
    Cancelled,
}

/// An ask on its way, over as many sequences as it takes.
#[derive(Debug)]
pub struct Request {
    pub ask: Ask,
    pub output: Vec<TokenId>,
    /// Of the prompt's tokens from the second on.
    pub scores: Vec<Sampled>,
    pub id: SequenceId,
    pub end: Option<End>,
    pub arrived: Time,
    pub paused: bool,
    pub preempted: u32,
    /// Tokens the batcher knows of, of the sequence that is now in it.
    pub given: u32,
    /// The lease on its prompt, until it is adopted.
    lease: Option<LeaseId>,
    admitted: bool,
}

impl Request {
    fn age(&self) -> (Time, SequenceId) {
        (self.arrived, self.id)
    }
}

/// For how many plans the shape must stay: per row its slot, start and pages.
type Shape = (u32, Vec<(u32, u32, Vec<Vec<u32>>)>);

/// One batcher with all it needs.
pub struct Harness {
    pub config: Config,
    pub kv: KvCache,
    pub batcher: Batcher,
    pub engine: Engine,
    pub requests: Vec<Request>,
    by_id: BTreeMap<SequenceId, usize>,
    next_id: u64,
    pub now: Time,
    shape: Option<Shape>,
    pub steps: u64,
}

pub fn seed() -> ChainSeed {
    chain_seed(&KvIdentity { digest: "toy".into(), numerics: "toy".into() }, true, b"", "")
}

/// A prompt; those of one family begin alike.
pub fn prompt(family: u64, length: usize) -> Vec<TokenId> {
    (0..length as u64)
        .map(|at| (crate::toy::mix(family << 20 | at) % crate::toy::VOCABULARY) as u32)
        .collect()
}

impl Harness {
    pub fn new(config: Config, groups: u32, pages: u32, prefix_cache: bool) -> Harness {
        let kv = KvCache::new(tandem_kv_cache::Config {
            pages,
            groups,
            leased_share: 0.5,
            lease_time_to_live: Duration::from_secs(10),
            prefix_cache,
        });
        Harness {
            engine: Engine::new(config.clone(), groups, pages),
            batcher: Batcher::new(config.clone()),
            config,
            kv,
            requests: Vec::new(),
            by_id: BTreeMap::new(),
            next_id: 1,
            now: Time::ZERO,
            shape: None,
            steps: 0,
        }
    }

    /// A batcher with one group and default limits but these.
    pub fn of(token_budget: u32, depth: u32, pages: u32) -> Harness {
        Harness::new(Config { token_budget, depth, ..Config::default() }, 1, pages, true)
    }

    // ------------------------------------------------------------------ what a caller does

    pub fn ask(&mut self, ask: Ask) -> usize {
        self.now += Duration::from_millis(1);
        let at = self.requests.len();
        self.requests.push(Request {
            ask,
            output: Vec::new(),
            scores: Vec::new(),
            id: SequenceId(0),
            end: None,
            arrived: self.now,
            paused: false,
            preempted: 0,
            given: 0,
            lease: None,
            admitted: false,
        });
        self.add(at);
        at
    }

    pub fn spec(&mut self, at: usize, until: Until) -> SequenceSpec {
        let id = SequenceId(self.next_id);
        self.next_id += 1;
        let request = &mut self.requests[at];
        request.id = id;
        request.admitted = false;
        let tokens: Vec<TokenId> = request.ask.prompt.iter().chain(&request.output).copied().collect();
        request.given = tokens.len() as u32;
        self.by_id.insert(id, at);
        SequenceSpec {
            id,
            tokens,
            prompt_tokens: request.ask.prompt.len() as u32,
            until,
            sampling: SamplingParams::default(),
            choice: Choice(0),
            stop: request.ask.stop.clone(),
            class: ServiceClass::Online,
            arrived: request.arrived,
            seed: seed(),
            score: request.ask.score.map(|top| Scoring { from: request.scores.len() as u32 + 1, top }),
        }
    }

    /// The request's tokens as a new sequence: when it comes, and again whenever one was lost.
    fn add(&mut self, at: usize) {
        self.shape = None;
        let until =
            if self.requests[at].output.is_empty() { self.requests[at].ask.until } else { Until::End };
        let spec = self.spec(at, until);
        let id = spec.id;
        self.batcher.add(spec, Origin::Fresh);
        if self.requests[at].paused {
            self.batcher.pause(id);
        }
    }

    pub fn cancel(&mut self, at: usize) {
        if self.requests[at].end.is_some() {
            return;
        }
        self.shape = None;
        let id = self.requests[at].id;
        assert!(self.batcher.cancel(id, &mut self.kv, self.now), "{id:?} was there");
        assert!(!self.batcher.cancel(id, &mut self.kv, self.now), "{id:?} is gone");
        self.over(at, End::Cancelled);
        self.check();
    }

    /// As if it had been lost, and placed again with what it has.
    pub fn cancel_and_add(&mut self, at: usize) {
        let id = self.requests[at].id;
        assert!(self.batcher.cancel(id, &mut self.kv, self.now), "{id:?} was there");
        self.by_id.remove(&id);
        self.add(at);
    }

    pub fn pause(&mut self, at: usize, paused: bool) {
        self.shape = None;
        let request = &mut self.requests[at];
        if request.end.is_none() {
            request.paused = paused;
            let id = request.id;
            if paused { self.batcher.pause(id) } else { self.batcher.resume(id) }
        }
    }

    fn over(&mut self, at: usize, end: End) {
        let request = &mut self.requests[at];
        assert_eq!(request.end, None, "it ends once");
        request.end = Some(end);
        self.by_id.remove(&request.id);
        if let Some(lease) = request.lease.take() {
            self.kv.cancel_lease(lease, self.now);
        }
    }

    // ------------------------------------------------------------------ steps

    /// Plans and submits, if that may be. What the plan was.
    pub fn plan(&mut self) -> Option<Plan> {
        self.try_plan().0
    }

    /// The plan, and whether anything happened at all.
    fn try_plan(&mut self) -> (Option<Plan>, bool) {
        self.now += Duration::from_millis(1);
        if self.engine.in_flight() > self.config.depth as usize {
            assert_eq!(self.batcher.plan(&mut self.kv, self.now), None, "no plan beyond the depth");
            return (None, false);
        }
        let plan = self.batcher.plan(&mut self.kv, self.now);
        if let Some(plan) = &plan {
            self.check_writes(plan);
            self.check_shape(plan);
            self.engine.submit(plan.clone());
            self.steps += 1;
        }
        let happened = self.events() > 0 || plan.is_some();
        if !happened && self.engine.in_flight() == 0 && self.live().all(|r| !r.paused) {
            assert_eq!(self.live().count(), 0, "nothing is computed although there is something to do");
        }
        self.check();
        (plan, happened)
    }

    fn live(&self) -> impl Iterator<Item = &Request> {
        self.requests.iter().filter(|r| r.end.is_none())
    }

    /// Takes in the oldest step. False if there is none.
    pub fn collect(&mut self) -> bool {
        self.now += Duration::from_millis(1);
        let Some(outcome) = self.engine.collect() else { return false };
        self.batcher.apply(&mut self.kv, outcome, self.now);
        self.events();
        self.check();
        true
    }

    /// The oldest step fails.
    pub fn fail(&mut self) {
        if let Some(plan) = self.engine.break_off() {
            self.shape = None;
            self.batcher.fail(&mut self.kv, plan, self.now);
            self.events();
            self.check();
        }
    }

    /// Plans and collects until nothing more happens.
    pub fn run(&mut self) {
        for _ in 0..100_000 {
            let (plan, happened) = self.try_plan();
            let full = self.engine.in_flight() > self.config.depth as usize;
            let collected = (full || plan.is_none()) && self.collect();
            if !happened && !collected {
                return;
            }
        }
        panic!("it does not come to an end");
    }

    // ------------------------------------------------------------------ what is told

    fn events(&mut self) -> usize {
        let events = self.batcher.take_events();
        let count = events.len();
        let mut again = Vec::new();
        for event in events {
            match event {
                Event::Admitted { id, cached_tokens } => self.admitted(id, cached_tokens),
                Event::Computed { id, tokens } => {
                    let request = &self.requests[self.by_id[&id]];
                    assert!(tokens <= (request.ask.prompt.len() + request.output.len()) as u32);
                    if let Some(lease) = request.lease {
                        self.kv.progress(lease, tokens);
                    }
                }
                Event::Scored { id, position, scores } => {
                    let request = &mut self.requests[self.by_id[&id]];
                    assert_eq!(
                        position as usize,
                        request.scores.len() + 1,
                        "scores come in order, each once"
                    );
                    assert!(request.output.is_empty(), "scores come before the first token");
                    request.scores.extend(scores);
                }
                Event::Token { id, position, sampled } => {
                    let request = &mut self.requests[self.by_id[&id]];
                    let wanted = request.ask.score.map_or(0, |_| request.ask.prompt.len() - 1);
                    assert_eq!(request.scores.len(), wanted, "all scores are there with the first token");
                    assert_eq!(position as usize, request.output.len(), "tokens come in order, each once");
                    request.output.push(sampled.token);
                }
                Event::Finished { id, reason, usage } => {
                    self.shape = None;
                    let at = self.by_id[&id];
                    let request = &self.requests[at];
                    assert_eq!(usage.prompt_tokens as usize, request.ask.prompt.len());
                    assert_eq!(usage.output_tokens as usize, request.output.len());
                    match reason {
                        Some(reason) => self.over(at, End::Finished(reason)),
                        None => self.hand_over(at),
                    }
                }
                Event::Preempted { id } => {
                    let at = self.by_id[&id];
                    self.check_preempted(at);
                    self.by_id.remove(&id);
                    self.requests[at].preempted += 1;
                    self.requests[at].admitted = false;
                    again.push(at);
                }
                Event::Failed { id } => {
                    let at = self.by_id.remove(&id).expect("it was there");
                    if let Some(lease) = self.requests[at].lease.take() {
                        self.kv.cancel_lease(lease, self.now);
                    }
                    again.push(at);
                }
                Event::Rejected { id } => {
                    let request = &self.requests[self.by_id[&id]];
                    assert!(!self.kv.fits_ever(request.given), "what fits is not rejected");
                    self.over(self.by_id[&id], End::Rejected);
                }
            }
        }
        for at in again {
            self.add(at);
        }
        self.kv.take_effects();
        count
    }

    fn admitted(&mut self, id: SequenceId, cached_tokens: u32) {
        let at = self.by_id[&id];
        let age = self.requests[at].age();
        let passed =
            self.live().find(|r| !r.admitted && !r.paused && r.age() < age && self.by_id.contains_key(&r.id));
        assert!(passed.is_none(), "{id:?} has passed an older one: {passed:?}");
        let request = &mut self.requests[at];
        request.admitted = true;
        assert!(cached_tokens < request.given, "the last known token is never taken from the cache");
        assert!(
            cached_tokens.is_multiple_of(BLOCK_TOKENS)
                && (cached_tokens == 0 || self.kv.config().prefix_cache)
        );
        if request.ask.until != Until::FirstToken || !request.output.is_empty() {
            return;
        }
        let lease = LeaseId(u128::from(id.0));
        let table = self.batcher.table(id).expect("an admitted sequence has pages");
        if self.kv.grant(lease, table, request.given, Time::MAX, self.now).is_ok() {
            self.kv.progress(lease, cached_tokens);
            self.batcher.set_leased(id, true);
            self.requests[at].lease = Some(lease);
        }
    }

    /// The first token is drawn: the pages come back under a new sequence, or the prompt is computed again.
    fn hand_over(&mut self, at: usize) {
        self.shape = None;
        let request = &mut self.requests[at];
        assert_eq!(request.ask.until, Until::FirstToken);
        assert_eq!(request.output.len(), 1);
        self.by_id.remove(&request.id);
        let Some(lease) = request.lease.take() else { return self.add(at) };
        let computed = request.given;
        self.kv.seal(lease, computed, FirstTokenBundle::default(), self.now);
        let adopted = self.kv.adopt(lease, Attempt(1), self.now).expect("nobody else has it");
        assert_eq!(adopted.tokens, computed);
        let spec = self.spec(at, Until::End);
        let id = spec.id;
        self.requests[at].admitted = true;
        self.batcher.add(spec, Origin::Computed { table: adopted.table, computed });
        if self.requests[at].paused {
            self.batcher.pause(id);
        }
    }

    // ------------------------------------------------------------------ what must hold

    fn check_preempted(&self, at: usize) {
        let victim = &self.requests[at];
        assert!(victim.lease.is_none(), "a granted sequence is not preempted");
        let others = || self.live().filter(|r| r.admitted && r.lease.is_none() && r.id != victim.id);
        if victim.paused {
            return;
        }
        assert!(others().all(|other| !other.paused), "paused ones are preempted first");
        assert!(others().all(|other| other.age() < victim.age()), "the youngest is preempted");
        assert!(others().next().is_some(), "the oldest is never preempted");
    }

    /// A row writes only to pages that no other sequence has.
    fn check_writes(&self, plan: &Plan) {
        let mut holders: BTreeMap<u32, u32> = BTreeMap::new();
        for table in self.tables() {
            for page in table {
                *holders.entry(page).or_default() += 1;
            }
        }
        for row in &plan.rows {
            let written = (row.start / BLOCK_TOKENS) as usize..blocks_for(row.start + row.count) as usize;
            for page in &row.pages[0][written] {
                assert_eq!(holders[page], 1, "page {page} is written by one and read by another");
            }
        }
    }

    fn tables(&self) -> impl Iterator<Item = Vec<u32>> {
        let tables = self.by_id.keys().filter_map(|&id| self.batcher.table(id));
        tables.map(|table| table.pages(0).iter().map(|page| page.page).collect())
    }

    fn check_shape(&mut self, plan: &Plan) {
        let rows =
            || plan.rows.iter().map(|row| (row.slot, row.start + 1, row.pages.clone())).collect::<Vec<_>>();
        if let Some((_, expected)) = &self.shape {
            let same =
                plan.rows.iter().map(|row| (row.slot, row.start, row.pages.clone())).collect::<Vec<_>>();
            assert_eq!(&same, expected, "a plan that promised to keep its shape changed it");
            assert!(plan.rows.iter().all(|row| row.count == 1 && row.sample));
        }
        let before = self.shape.take().map_or(0, |(left, _)| left - 1);
        let left = plan.same_shape_steps.max(before);
        self.shape = (left > 0).then(|| (left, rows()));
    }

    /// What holds between any two calls.
    pub fn check(&self) {
        self.kv.check_books();
        self.batcher.check_books();
        let mut used: BTreeSet<u32> = self.tables().flatten().collect();
        used.extend(self.engine.pages_in_flight());
        let in_use = self.kv.counts().in_use as usize;
        assert!(in_use >= used.len(), "{in_use} pages are in use, {} are named", used.len());
        if self.engine.in_flight() == 0 {
            assert_eq!(in_use, used.len(), "pages are in use and nobody names them");
        }
        assert_eq!(self.batcher.running() + self.batcher.waiting(), self.live().count());
    }

    /// The longest any sequence can be here: its last token needs no KV.
    fn longest(&self) -> u32 {
        (self.kv.config().pages * BLOCK_TOKENS + 1).min(self.config.context_tokens)
    }

    /// Everything is over: all answers are right, and nothing is left.
    pub fn check_end(&mut self) {
        while self.collect() {}
        for request in &self.requests {
            let (ask, output) = (&request.ask, &request.output);
            let expected = oracle(&ask.prompt, &ask.stop, self.longest().max(ask.prompt.len() as u32));
            let end = request.end.expect("everything is over");
            if let Some(top) = ask.score {
                assert!(oracle_scores(&ask.prompt, top).starts_with(&request.scores), "{ask:?}");
            }
            match end {
                End::Cancelled => assert!(expected.starts_with(output)),
                End::Rejected => assert!(output.is_empty()),
                End::Finished(reason) => {
                    assert_eq!(output, &expected, "{ask:?}");
                    let last = output.last().copied().unwrap_or_default();
                    let by_token = !output.is_empty();
                    if by_token && ask.stop.eos.contains(&last) {
                        assert_eq!(reason, FinishReason::Eos);
                    } else if by_token && ask.stop.stop_token_ids.contains(&last) {
                        assert_eq!(reason, FinishReason::StopToken(last));
                    } else {
                        assert_eq!(reason, FinishReason::Length);
                    }
                }
            }
        }
        assert_eq!(
            (self.batcher.running(), self.batcher.waiting(), self.batcher.waiting_tokens()),
            (0, 0, 0)
        );
        assert_eq!(self.kv.counts().in_use, 0, "all pages are back");
        assert_eq!(self.kv.lease_count(), 0);
        assert!(self.batcher.take_events().is_empty());
    }
}
