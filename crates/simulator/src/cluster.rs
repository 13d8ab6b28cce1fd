//! The cluster in virtual time: one queue of events, workers that step, a router that decides by `placement`.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, VecDeque};
use std::time::Duration;

use tandem_batching::pace::{Budget, Pace};
use tandem_placement::index::{Change, Index};
use tandem_placement::planner::{self, Observer, Planner};
use tandem_placement::{Candidate, Held, Link, Policy, Request, Tier};
use tandem_types::{BlockHash, Incarnation, Role, ServiceClass, StepTime, Time};

use crate::cache::{self, Cache};
use crate::options::{Batching, Fault, Offline, Options, Split};
use crate::random;
use crate::real::Real;
use crate::report::{Outcome, Sample, Served};
use crate::twin::{DecodeJob, Happened, JobId, PromptJob, Twin};
use crate::worker::{Batcher, Report, Worker};
use crate::workload::{TRACE_BLOCK_TOKENS, Workload};

/// Prompt tokens of a step of a worker that nothing else bounds.
const FULL_CHUNK: u32 = 2048;
/// How long until a dead worker is known to be dead.
const DEATH_KNOWN: Duration = Duration::from_millis(600);
/// How often the planner looks.
const PLANNER_TICK: Duration = Duration::from_secs(1);
/// How often gaps for offline work are looked for.
const OFFLINE_TICK: Duration = Duration::from_millis(100);
/// Attempts of a request after faults.
const ATTEMPTS_MAX: u8 = 3;
/// What has not ended so long after the last arrival never does.
const DRAIN: Duration = Duration::from_secs(3600);

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Event {
    Step { worker: u32, life: u32 },
    Prompt { job: JobId, leg: u32 },
    Kv { job: JobId, leg: u32 },
    Report { worker: u32 },
    Deliver { worker: u32 },
    Plan,
    Gaps,
    Sample,
    Fault { number: u32 },
    Up { worker: u32 },
    Again { job: JobId, leg: u32 },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    Waiting,
    Prefill,
    Moving,
    Decode,
    Over,
}

/// A request under way.
#[derive(Clone, Copy, Debug)]
struct Job {
    stage: Stage,
    /// Where it is.
    worker: u32,
    /// Where its KV goes, while it moves.
    to: u32,
    /// Counts its placements: what was scheduled for an earlier one is void.
    leg: u32,
    first_at: Time,
    last_at: Time,
    /// Tokens drawn.
    made: u32,
    attempts: u8,
    ok: bool,
}

/// A cluster with its work.
pub struct Cluster<'a> {
    options: &'a Options,
    workload: &'a Workload,
    policy: Box<dyn Policy>,
    is_cost: bool,
    workers: Vec<Worker>,
    view: Vec<Candidate>,
    jobs: Vec<Job>,
    events: BinaryHeap<Reverse<(Time, u64, Event)>>,
    sequence: u64,
    now: Time,
    truth: StepTime,
    predicted: StepTime,
    observer: Observer,
    planner: Planner,
    index: Option<Index>,
    next: usize,
    ordinal: u64,
    open_online: usize,
    offline: VecDeque<JobId>,
    offline_open: Vec<Vec<JobId>>,
    outcome: Outcome,
    happened: Vec<Happened>,
    changes: Vec<Change>,
    hash: u64,
    sampled: (usize, usize),
}

impl<'a> Cluster<'a> {
    /// A cluster before its first request.
    pub fn new(options: &'a Options, workload: &'a Workload) -> Result<Cluster<'a>, String> {
        options.check()?;
        let policy = tandem_placement::named(&options.policy)?;
        let is_cost = options.policy == "cost";
        let truth = options.profile.step;
        let predicted = truth.scaled(1.0 + options.bias);
        let mut config = planner::Config::default();
        if !options.planner {
            config.patience = Duration::MAX;
        }
        let cached = options.cache.device_tokens > 0;
        let mut cluster = Cluster {
            options,
            workload,
            policy,
            is_cost,
            workers: Vec::new(),
            view: Vec::new(),
            jobs: Vec::with_capacity(workload.arrivals.len()),
            events: BinaryHeap::new(),
            sequence: 0,
            now: Time::ZERO,
            truth,
            predicted,
            observer: Observer::new(config.memory_seconds),
            planner: Planner::new(config),
            index: cached.then(|| Index::new(1 << 30)),
            next: 0,
            ordinal: 0,
            open_online: 0,
            offline: VecDeque::new(),
            offline_open: Vec::new(),
            outcome: Outcome::default(),
            happened: Vec::new(),
            changes: Vec::new(),
            hash: random::mix(options.seed),
            sampled: (0, 0),
        };
        for role in options.roles() {
            cluster.add_worker(role);
        }
        Ok(cluster)
    }

    /// Runs to the end.
    pub fn run(mut self) -> Outcome {
        let end = self.workload.arrivals.last().map_or(Time::ZERO, |last| last.at);
        if self.options.planner || self.is_cost {
            self.at(Time::ZERO + PLANNER_TICK, Event::Plan);
        }
        if self.workload.arrivals.iter().any(|arrival| arrival.class == ServiceClass::Offline) {
            self.at(Time::ZERO + OFFLINE_TICK, Event::Gaps);
        }
        self.at(Time::ZERO, Event::Sample);
        for (number, (after, _, _)) in self.options.faults.iter().enumerate() {
            self.at(Time::ZERO + *after, Event::Fault { number: number as u32 });
        }
        for (after, role) in &self.options.added {
            let worker = self.add_worker(*role);
            self.workers[worker].up = false;
            self.view[worker].role = Role::Encode;
            self.at(Time::ZERO + *after + self.options.scale_up, Event::Up { worker: worker as u32 });
        }
        if !self.options.stale.is_zero() {
            for worker in 0..self.workers.len() {
                self.at(Time(worker as u64), Event::Report { worker: worker as u32 });
            }
        }
        let stop = if self.options.as_reference { Time::MAX } else { end + DRAIN };
        loop {
            let due = self.events.peek().map(|Reverse((at, ..))| *at);
            let arrival = self.workload.arrivals.get(self.next).map(|arrival| arrival.at);
            match (arrival, due) {
                (Some(arrival), due) if due.is_none_or(|due| arrival <= due) => {
                    self.now = arrival;
                    self.arrive();
                }
                (_, Some(due)) => {
                    let idle = self.next == self.workload.arrivals.len() && self.open_online == 0;
                    if due > stop || (idle && self.is_over(due > end)) {
                        break;
                    }
                    let Reverse((at, _, event)) = self.events.pop().expect("peeked");
                    self.now = at;
                    self.handle(event);
                }
                (None, None) => break,
                (Some(_), None) => unreachable!("an arrival without other events is the first arm"),
            }
        }
        self.finish(end)
    }

    /// With no online work left, offline work goes on until the trace's end only.
    fn is_over(&self, after_end: bool) -> bool {
        let offline = !self.offline.is_empty() || self.offline_open.iter().any(|open| !open.is_empty());
        !offline || after_end
    }

    fn add_worker(&mut self, role: Role) -> usize {
        let number = self.workers.len();
        let pace = self.pace();
        let kv = self.options.profile.kv_tokens;
        let batcher = match self.options.batching {
            Batching::Twin if self.options.as_reference => Batcher::Twin(Twin::new(pace, kv).as_reference()),
            Batching::Twin => Batcher::Twin(Twin::new(pace, kv)),
            Batching::Real => Batcher::Real(Box::new(Real::new(pace, kv))),
        };
        self.workers.push(Worker::new(role, batcher, Cache::new(self.options.cache)));
        let bytes = self.options.profile.kv_bytes as f64;
        self.view.push(Candidate {
            worker: format!("w-{number:04}").as_str().into(),
            role,
            model: Some(self.predicted),
            prompt_budget: pace.budget.most(),
            paced: matches!(pace.budget, Budget::Slack(_)),
            kv_tokens: kv,
            link: Link { setup_seconds: 1e-3, tokens_per_second: self.options.link_bytes / bytes },
            ..Candidate::default()
        });
        self.offline_open.push(Vec::new());
        if let Some(index) = &mut self.index {
            let worker = &self.view[number].worker;
            index.snapshot(worker, Incarnation(1), 0, []).expect("few workers have numbers");
        }
        number
    }

    fn pace(&self) -> Pace {
        let budget = match self.options.split {
            Split::Mixed(chunk) => Budget::Tokens(chunk),
            Split::Roles(..) if self.is_cost => Budget::Slack(FULL_CHUNK),
            Split::Roles(..) => Budget::Tokens(FULL_CHUNK),
        };
        Pace {
            order: self.options.order,
            budget,
            model: self.predicted,
            headroom_tokens: self.options.headroom_tokens,
            expected_tokens: self.observer.output_tokens(),
        }
    }

    fn at(&mut self, at: Time, event: Event) {
        self.sequence += 1;
        self.events.push(Reverse((at, self.sequence, event)));
    }

    fn log(&mut self, kind: u64, a: u64, b: u64) {
        self.hash = random::mix(self.hash ^ self.now.0).wrapping_add(random::mix(kind << 56 ^ a << 28 ^ b));
    }

    // ------------------------------------------------------------------ the router

    fn arrive(&mut self) {
        let id = self.next as JobId;
        self.next += 1;
        self.jobs.push(Job {
            stage: Stage::Waiting,
            worker: 0,
            to: 0,
            leg: 0,
            first_at: Time::ZERO,
            last_at: Time::ZERO,
            made: 0,
            attempts: 0,
            ok: true,
        });
        let arrival = &self.workload.arrivals[id as usize];
        if arrival.class == ServiceClass::Offline {
            self.offline.push_back(id);
            return;
        }
        self.open_online += 1;
        self.log(1, u64::from(id), 0);
        let seconds = self.predicted.prefill(arrival.input, 0, FULL_CHUNK);
        let request = self.request(id);
        self.observer.arrived(&request, seconds, self.now);
        self.place(id);
    }

    /// What a policy may know of it.
    fn request(&self, id: JobId) -> Request {
        let (job, arrival) = (&self.jobs[id as usize], &self.workload.arrivals[id as usize]);
        let online = arrival.class == ServiceClass::Online;
        let left = (arrival.at + self.options.first_token).remaining(self.now).as_secs_f64();
        Request {
            ordinal: self.ordinal,
            prompt_tokens: arrival.input + job.made,
            max_tokens: 1 << 20,
            expected_tokens: self.observer.output_tokens(),
            first_token_seconds: if !online {
                f64::INFINITY
            } else if job.made > 0 {
                self.options.first_token.as_secs_f64()
            } else {
                left
            },
            token_seconds: if online { self.options.per_token.as_secs_f64() } else { f64::INFINITY },
            class: arrival.class,
            held: Vec::new(),
        }
    }

    fn blocks(&self, id: JobId) -> &'a [u32] {
        let (from, count) = self.workload.arrivals[id as usize].blocks;
        &self.workload.blocks[from as usize..(from + count) as usize]
    }

    fn held(&self, id: JobId) -> Vec<Held> {
        let Some(index) = &self.index else { return Vec::new() };
        let hashes: Vec<BlockHash> = self.blocks(id).iter().map(|&block| cache::hash(block)).collect();
        let found = index.longest(&hashes).into_iter().map(|found| {
            let number = found.worker.0[2..].parse().expect("workers are numbered");
            Held {
                candidate: number,
                device_tokens: found.device_blocks * TRACE_BLOCK_TOKENS,
                tokens: found.blocks * TRACE_BLOCK_TOKENS,
                tier: found.tier,
            }
        });
        found.collect()
    }

    /// Finds workers for a request and sends it.
    fn place(&mut self, id: JobId) {
        self.refresh();
        let mut request = self.request(id);
        request.held = self.held(id);
        self.ordinal += 1;
        let Some(route) = self.policy.choose(&request, &self.view) else {
            return self.place_again(id, Duration::from_millis(100));
        };
        self.start_prefill(id, route.prefill, &request);
    }

    fn start_prefill(&mut self, id: JobId, worker: usize, request: &Request) {
        self.log(2, u64::from(id), worker as u64);
        let seconds = self.predicted.prefill(request.prompt_tokens, 0, self.view[worker].prompt_budget);
        let job = &mut self.jobs[id as usize];
        (job.stage, job.worker) = (Stage::Prefill, worker as u32);
        let w = &mut self.workers[worker];
        if !w.up {
            // Sent to one that is dead and not yet known to be.
            return self.place_again(id, DEATH_KNOWN);
        }
        w.online += u32::from(request.class == ServiceClass::Online);
        if !self.options.stale.is_zero() {
            w.belief.queued.send(seconds, self.now);
            w.belief.timely.send(seconds, self.now);
        }
        let delay = self.bring(id, worker);
        if delay.is_zero() {
            self.take_prompt(id, worker);
        } else {
            let leg = self.jobs[id as usize].leg;
            self.at(self.now + delay, Event::Prompt { job: id, leg });
        }
    }

    /// It waits for so long and is placed then.
    fn place_again(&mut self, id: JobId, delay: Duration) {
        let job = &mut self.jobs[id as usize];
        job.stage = Stage::Waiting;
        job.leg += 1;
        let leg = job.leg;
        self.at(self.now + delay, Event::Again { job: id, leg });
    }

    /// What the worker does to have the prefix: nothing, up from its host memory, or a pull from a peer.
    fn bring(&mut self, id: JobId, worker: usize) -> Duration {
        if self.index.is_none() {
            return Duration::ZERO;
        }
        let blocks = self.blocks(id);
        let tokens = |count: u32| count * TRACE_BLOCK_TOKENS;
        let input = self.workload.arrivals[id as usize].input + self.jobs[id as usize].made;
        let (device, own) = self.workers[worker].cache.longest(blocks);
        let compute = |cached: u32| {
            let cached = tokens(cached).min(input - 1);
            self.predicted.prefill(input - cached, cached, FULL_CHUNK)
        };
        let mut best = (compute(device), 0.0, device, None);
        let up = Tier::Host.link().seconds(f64::from(tokens(own - device)));
        if own > device && up + compute(own) < best.0 {
            best = (up + compute(own), up, own, None);
        }
        if self.options.peer_pulls {
            let peers = (0..self.workers.len()).filter(|&peer| peer != worker && self.workers[peer].up);
            let (longest, peer) = peers
                .map(|peer| (self.workers[peer].cache.longest(blocks).1, Reverse(peer)))
                .max()
                .unwrap_or((0, Reverse(0)));
            let seconds = self.view[worker].link.seconds(f64::from(tokens(longest.saturating_sub(device))));
            if longest > device && seconds + compute(longest) < best.0 {
                best = (seconds + compute(longest), seconds, longest, Some(peer.0));
            }
        }
        let (_, seconds, have, peer) = best;
        self.outcome.hit_tokens += u64::from(tokens(have).min(input - 1));
        self.outcome.pulled_tokens += if peer.is_some() { u64::from(tokens(have - device)) } else { 0 };
        if have > 0 {
            self.put(worker, &blocks[..have as usize]);
        }
        match peer {
            Some(peer) => self.transfer(peer, worker, tokens(have - device)).since(self.now),
            None => Duration::from_secs_f64(seconds),
        }
    }

    /// When so many tokens of KV, sent now, have arrived.
    fn transfer(&mut self, from: usize, to: usize, tokens: u32) -> Time {
        let bytes = f64::from(tokens) * self.options.profile.kv_bytes as f64;
        let takes = Duration::from_secs_f64(bytes / self.options.link_bytes);
        let setup = Duration::from_millis(1);
        self.outcome.moved_tokens += u64::from(tokens);
        if !self.options.shared_links {
            return self.now + setup + takes;
        }
        // Transfers of one adapter take turns, each at full speed.
        let begin = (self.now + setup).max(self.workers[from].sends).max(self.workers[to].receives);
        let end = begin + takes;
        self.workers[from].sends = end;
        self.workers[to].receives = end;
        end
    }

    fn put(&mut self, worker: usize, blocks: &[u32]) {
        let Some(index) = &mut self.index else { return };
        let w = &mut self.workers[worker];
        self.changes.clear();
        w.cache.put(blocks, &mut self.changes);
        for change in &self.changes {
            w.cache_sequence += 1;
            let (name, life) = (&self.view[worker].worker, u64::from(w.life) + 1);
            let taken = index.apply(name, Incarnation(life), w.cache_sequence, change);
            taken.expect("changes come in order");
        }
    }

    fn take_prompt(&mut self, id: JobId, worker: usize) {
        let arrival = &self.workload.arrivals[id as usize];
        let job = &self.jobs[id as usize];
        let tokens = arrival.input + job.made;
        let cached = if self.index.is_some() {
            self.workers[worker].cache.longest(self.blocks(id)).0 * TRACE_BLOCK_TOKENS
        } else {
            0
        };
        // What had begun to stream when it was lost goes before what has not.
        let online = arrival.class == ServiceClass::Online;
        let due = if job.made > 0 || !online { Time::MAX } else { arrival.at + self.options.first_token };
        let prompt = PromptJob {
            id,
            arrived: arrival.at,
            tokens,
            cached: cached.min(tokens - 1),
            due,
            class: arrival.class,
        };
        self.workers[worker].batcher.prompt(prompt);
        self.kick(worker);
    }

    /// Brings the view up to date.
    fn refresh(&mut self) {
        if self.options.stale.is_zero() {
            for (worker, candidate) in self.workers.iter_mut().zip(&mut self.view) {
                if worker.dirty {
                    worker.dirty = false;
                    show(candidate, &worker.report(self.now), 1.0 + self.options.bias);
                }
            }
            return;
        }
        for (worker, candidate) in self.workers.iter_mut().zip(&mut self.view) {
            let belief = &worker.belief;
            candidate.queue_seconds = belief.queued.seconds(self.now);
            candidate.timely_seconds = belief.timely.seconds(self.now);
            let sent: u64 = belief.sent.iter().map(|(_, tokens)| u64::from(*tokens)).sum();
            candidate.decodes = belief.decodes + belief.sent.len() as u32;
            candidate.decode_tokens = belief.decode_tokens + sent;
            candidate.kv_usage = belief.kv_usage;
        }
    }

    fn first_token(&mut self, id: JobId, worker: usize) {
        let arrival = &self.workload.arrivals[id as usize];
        let job = &mut self.jobs[id as usize];
        if job.made == 0 {
            job.first_at = self.now;
        }
        job.made += 1;
        job.last_at = self.now;
        let over = job.made >= arrival.output;
        self.log(3, u64::from(id), worker as u64);
        self.observer.drawn(1.0, f64::from(u8::from(over)), self.now);
        if self.index.is_some() {
            self.put(worker, self.blocks(id));
        }
        if over {
            self.workers[worker].batcher.release(id);
            return self.end(id, worker);
        }
        if arrival.class == ServiceClass::Offline {
            return self.decode_here(id, worker);
        }
        self.refresh();
        let request = self.request(id);
        let Some(decode) = self.policy.choose_decode(&request, &self.view, Some(worker)) else {
            return self.decode_here(id, worker);
        };
        if (decode == worker && !self.options.as_reference) || !self.workers[decode].up {
            return self.decode_here(id, worker);
        }
        let tokens = arrival.input + self.jobs[id as usize].made;
        self.log(4, u64::from(id), decode as u64);
        let job = &mut self.jobs[id as usize];
        (job.stage, job.to) = (Stage::Moving, decode as u32);
        job.leg += 1;
        let w = &mut self.workers[decode];
        w.arriving.0 += 1;
        w.arriving.1 += u64::from(tokens);
        w.dirty = true;
        if !self.options.stale.is_zero() {
            w.belief.sent.push_back((self.now, tokens));
        }
        if self.options.as_reference && decode != worker {
            // The reference sends KV first and finds room for it then.
            return self.send_kv(id, decode);
        }
        self.workers[decode].inbound.push_back(id);
        self.let_in(decode);
    }

    fn send_kv(&mut self, id: JobId, worker: usize) {
        let tokens = self.workload.arrivals[id as usize].input + self.jobs[id as usize].made - 1;
        let (from, leg) = (self.jobs[id as usize].worker, self.jobs[id as usize].leg);
        let arrives = self.transfer(from as usize, worker, tokens);
        self.at(arrives, Event::Kv { job: id, leg });
    }

    fn decode_here(&mut self, id: JobId, worker: usize) {
        self.jobs[id as usize].stage = Stage::Decode;
        let job = self.decode_job(id);
        self.workers[worker].batcher.join(job);
        self.kick(worker);
    }

    fn decode_job(&self, id: JobId) -> DecodeJob {
        let (job, arrival) = (&self.jobs[id as usize], &self.workload.arrivals[id as usize]);
        let online = arrival.class == ServiceClass::Online;
        DecodeJob {
            id,
            arrived: arrival.at,
            tokens: arrival.input + job.made,
            left: arrival.output - job.made,
            first_at: job.first_at,
            made: job.made - 1,
            token_seconds: if online { self.options.per_token.as_secs_f64() } else { f64::INFINITY },
            class: arrival.class,
        }
    }

    /// Room for decodes that wait for it, and their KV on its way.
    fn let_in(&mut self, worker: usize) {
        while let Some(&id) = self.workers[worker].inbound.front() {
            let arrival = &self.workload.arrivals[id as usize];
            let tokens = arrival.input + self.jobs[id as usize].made;
            if !self.workers[worker].batcher.reserve(id, tokens) {
                if self.workers[worker].batcher.fits_ever(tokens) {
                    return;
                }
                // It never fits: it ends as it is.
                self.workers[worker].inbound.pop_front();
                self.left_arriving(worker, tokens);
                let from = self.jobs[id as usize].worker as usize;
                self.workers[from].batcher.release(id);
                self.jobs[id as usize].ok = false;
                self.end(id, from);
                continue;
            }
            self.workers[worker].inbound.pop_front();
            if self.options.as_reference {
                self.left_arriving(worker, tokens);
                self.decode_here(id, worker);
            } else {
                self.send_kv(id, worker);
            }
        }
    }

    fn left_arriving(&mut self, worker: usize, tokens: u32) {
        let w = &mut self.workers[worker];
        w.arriving.0 -= 1;
        w.arriving.1 -= u64::from(tokens);
        w.dirty = true;
    }

    /// A request is over at this worker.
    fn end(&mut self, id: JobId, worker: usize) {
        let arrival = &self.workload.arrivals[id as usize];
        let job = &mut self.jobs[id as usize];
        job.stage = Stage::Over;
        self.log(5, u64::from(id), worker as u64);
        let job = &self.jobs[id as usize];
        if arrival.class == ServiceClass::Offline {
            self.outcome.offline_requests += 1;
            self.offline_open[worker].retain(|open| *open != id);
            return;
        }
        self.workers[worker].online = self.workers[worker].online.saturating_sub(1);
        self.open_online -= 1;
        let first = job.first_at.since(arrival.at);
        let gaps = (arrival.output.saturating_sub(1)).max(1);
        let per_token = job.last_at.since(job.first_at) / gaps;
        let met = job.ok && first <= self.options.first_token && per_token <= self.options.per_token;
        self.sampled.0 += usize::from(met);
        self.sampled.1 += 1;
        let per_token = if arrival.output > 1 { per_token.as_secs_f32() } else { f32::NAN };
        self.outcome.served.push(Served { id, first: first.as_secs_f32(), per_token, met });
    }

    // ------------------------------------------------------------------ the workers

    /// Starts a step if the worker can.
    fn kick(&mut self, worker: usize) {
        let w = &mut self.workers[worker];
        w.dirty = true;
        if w.busy || !w.up {
            return;
        }
        let shape = w.batcher.plan(self.now);
        if shape.is_none() {
            for id in w.batcher.take_preempted() {
                self.preempted(id);
            }
            return;
        }
        let shape = shape.expect("checked");
        w.busy = true;
        w.steps += 1;
        let mut seconds = self.truth.step(f64::from(shape.new_tokens), shape.pairs, shape.context as f64);
        seconds *= random::factor(self.options.noise, self.options.seed, worker as u64, w.steps);
        if self.now < w.slow.1 {
            seconds *= w.slow.0;
        }
        w.busy_seconds += seconds;
        self.outcome.steps += 1;
        self.outcome.prompt_tokens += u64::from(shape.prompt_tokens);
        let life = w.life;
        let end = Time(self.now.0 + ((seconds * 1e9).round() as u64).max(1));
        self.at(end, Event::Step { worker: worker as u32, life });
    }

    fn step_ends(&mut self, worker: usize) {
        // Busy until all of the step is taken in: whoever decodes on here is in the very next one.
        let w = &mut self.workers[worker];
        let (rows, _) = w.batcher.decodes();
        let mut happened = std::mem::take(&mut self.happened);
        happened.clear();
        w.batcher.apply(&mut happened, self.now);
        let mut ended = 0;
        for &what in &happened {
            match what {
                Happened::Finished(id) => {
                    ended += 1;
                    let arrival = &self.workload.arrivals[id as usize];
                    let job = &mut self.jobs[id as usize];
                    job.made = arrival.output;
                    job.last_at = self.now;
                    if arrival.class == ServiceClass::Offline {
                        self.outcome.offline_tokens += u64::from(arrival.output) + u64::from(arrival.input);
                    }
                    self.end(id, worker);
                }
                Happened::FirstToken(id) => self.first_token(id, worker),
                Happened::Preempted(id) => self.preempted(id),
            }
        }
        self.observer.drawn(f64::from(rows), f64::from(ended), self.now);
        self.happened = happened;
        if !self.workers[worker].inbound.is_empty() {
            self.let_in(worker);
        }
        self.workers[worker].busy = false;
        self.kick(worker);
        if cfg!(debug_assertions) {
            self.workers[worker].batcher.check_books();
        }
    }

    /// Lost its pages; it is placed again with what it has.
    fn preempted(&mut self, id: JobId) {
        self.outcome.preempted += 1;
        let worker = self.jobs[id as usize].worker as usize;
        self.lose(id, worker);
    }

    fn lose(&mut self, id: JobId, worker: usize) {
        let arrival = &self.workload.arrivals[id as usize];
        if arrival.class == ServiceClass::Offline {
            self.offline_open[worker].retain(|open| *open != id);
            let job = &mut self.jobs[id as usize];
            job.stage = Stage::Waiting;
            job.leg += 1;
            self.offline.push_front(id);
        } else {
            self.place_again(id, Duration::ZERO);
        }
    }
}

/// Puts a report into the view.
fn show(candidate: &mut Candidate, report: &Report, bias: f64) {
    let _ = bias;
    candidate.queue_seconds = report.queued;
    candidate.timely_seconds = report.timely;
    candidate.decodes = report.decodes;
    candidate.decode_tokens = report.decode_tokens;
    candidate.kv_usage = report.kv_usage;
    candidate.running = report.decodes;
    candidate.waiting = report.prompts;
}

mod events;
