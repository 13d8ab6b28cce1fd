//! The cluster in virtual time: one queue of events, workers that step, a router that decides by `placement`.

use std::cmp::{Ordering, Reverse};
use std::collections::{BinaryHeap, VecDeque};
use std::time::Duration;

use tandem_batching::pace::{Budget, Order, Pace};
use tandem_placement::admission::{self, Limits, Verdict};
use tandem_placement::index::{Change, Index};
use tandem_placement::ledger::{self, Ledger, Load};
use tandem_placement::planner::{self, Observer, Planner};
use tandem_placement::predictor::{Measured, Predictor};
use tandem_placement::{Candidate, Held, Link, Policy, Request, Tier};
use tandem_types::{BlockHash, Incarnation, Role, ServiceClass, StepTime, Time};

use crate::cache::{self, Cache};
use crate::options::{Batching, Fault, Offline, Options, Split};
use crate::random;
use crate::real::Real;
use crate::report::{self, Outcome, Sample, Served};
use crate::twin::{DecodeJob, Happened, JobId, PromptJob, Twin};
use crate::worker::{Batcher, Worker};
use crate::workload::{TRACE_BLOCK_TOKENS, Workload};

/// Prompt tokens of a step of a worker that nothing else bounds.
const FULL_CHUNK: u32 = 2048;
/// How long until a dead worker is known to be dead.
const DEATH_KNOWN: Duration = Duration::from_millis(600);
/// How often the planner looks.
const PLANNER_TICK: Duration = Duration::from_secs(1);
/// How often gaps for offline work are looked for.
const OFFLINE_TICK: Duration = Duration::from_millis(100);
/// Who is refused again stays away twice as long as before, so many times.
const BACK_OFF_MAX: u8 = 4;
/// Attempts of a request after faults.
const ATTEMPTS_MAX: u8 = 3;
/// What has not ended so long after the last arrival never does.
const DRAIN: Duration = Duration::from_secs(3600);

#[derive(Clone, Copy, Debug)]
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

/// An event that is to come. The greatest is the first: the earliest, and of those of one moment the first made.
#[derive(Clone, Copy, Debug)]
struct Due {
    at: Time,
    sequence: u64,
    event: Event,
}

impl Due {
    fn key(&self) -> Reverse<(Time, u64)> {
        Reverse((self.at, self.sequence))
    }
}

impl PartialEq for Due {
    fn eq(&self, other: &Due) -> bool {
        self.key() == other.key()
    }
}

impl Eq for Due {}

impl PartialOrd for Due {
    fn partial_cmp(&self, other: &Due) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Due {
    fn cmp(&self, other: &Due) -> Ordering {
        self.key().cmp(&other.key())
    }
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
    /// How often it was refused.
    refused: u8,
    ok: bool,
    /// Whether it is counted as one that cannot meet its targets any more.
    missed: bool,
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
    events: BinaryHeap<Due>,
    sequence: u64,
    now: Time,
    truth: StepTime,
    /// What prompts are taken to need, wherever they are computed.
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
    /// Online requests that met both targets, and those that cannot any more.
    met: usize,
    missed: usize,
    /// The first request that may be in time for its first token, as far as anybody has looked.
    timely: usize,
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
            met: 0,
            missed: 0,
            timely: 0,
        };
        for role in options.roles() {
            cluster.add_worker(role);
        }
        Ok(cluster)
    }

    /// Runs to the end.
    pub fn run(mut self) -> Outcome {
        self.start();
        while self.advance() {}
        self.finish()
    }

    /// Whether at least `target` of the online requests meet both targets. Says what [`Cluster::run`] would come to,
    /// but runs only until it is certain: a cluster that is far from it is soon done.
    pub fn holds(mut self, target: f64) -> bool {
        let online = report::online(self.workload);
        let share = |met: usize| report::share(met, online);
        self.start();
        while share(self.met) < target {
            self.count_overdue();
            if share(online - self.missed) < target || !self.advance() {
                return false;
            }
        }
        true
    }

    fn start(&mut self) {
        if self.options.planner || self.is_cost || self.learns() {
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
    }

    /// Takes in what is next, or says that nothing is.
    fn advance(&mut self) -> bool {
        let due = self.events.peek().map(|due| due.at);
        let arrival = self.workload.arrivals.get(self.next).map(|arrival| arrival.at);
        match (arrival, due) {
            (Some(arrival), due) if due.is_none_or(|due| arrival <= due) => {
                self.now = arrival;
                self.arrive();
            }
            (_, Some(due)) => {
                let end = self.last_arrival();
                let stop = if self.options.as_reference { Time::MAX } else { end + DRAIN };
                let idle = self.next == self.workload.arrivals.len() && self.open_online == 0;
                if due > stop || (idle && self.is_over(due > end)) {
                    return false;
                }
                let Due { at, event, .. } = self.events.pop().expect("peeked");
                self.now = at;
                self.handle(event);
            }
            (None, None) => return false,
            (Some(_), None) => unreachable!("an arrival without other events is the first arm"),
        }
        true
    }

    fn last_arrival(&self) -> Time {
        self.workload.arrivals.last().map_or(Time::ZERO, |last| last.at)
    }

    /// Counts those that have no first token when it is due, in order of arrival.
    fn count_overdue(&mut self) {
        while self.timely < self.next {
            let (job, arrival) = (&mut self.jobs[self.timely], &self.workload.arrivals[self.timely]);
            if arrival.at + self.options.first_token >= self.now {
                break;
            }
            self.timely += 1;
            let open = job.stage != Stage::Over && job.made == 0;
            if open && arrival.class == ServiceClass::Online {
                job.missed = true;
                self.missed += 1;
            }
        }
    }

    /// With no online work left, offline work goes on until the trace's end only.
    fn is_over(&self, after_end: bool) -> bool {
        let offline = !self.offline.is_empty() || self.offline_open.iter().any(|open| !open.is_empty());
        !offline || after_end
    }

    fn add_worker(&mut self, role: Role) -> usize {
        let number = self.workers.len();
        let pace = self.pace(self.predicted);
        let kv = self.options.profile.kv_tokens;
        let batcher = match self.options.batching {
            Batching::Twin if self.options.as_reference => {
                Batcher::Twin(Box::new(Twin::new(pace, kv).as_reference()))
            }
            Batching::Twin => Batcher::Twin(Box::new(Twin::new(pace, kv))),
            Batching::Real => Batcher::Real(Box::new(Real::new(pace, kv))),
        };
        let mut worker = Worker::new(role, batcher, Cache::new(self.options.cache), self.options.routers);
        worker.predictor = self.learns().then(|| Predictor::new(self.predicted));
        self.workers.push(worker);
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

    /// What predicts exactly has nothing to learn.
    fn learns(&self) -> bool {
        self.options.learning && (self.options.bias != 0.0 || self.options.noise > 0.0)
    }

    fn pace(&self, model: StepTime) -> Pace {
        let budget = match self.options.split {
            Split::Mixed(chunk) => Budget::Tokens(chunk),
            Split::Roles(..) if self.is_cost => Budget::Slack(FULL_CHUNK),
            Split::Roles(..) => Budget::Tokens(FULL_CHUNK),
        };
        Pace {
            order: self.options.order,
            budget,
            model,
            headroom_tokens: self.options.headroom_tokens,
            short_tokens: self.observer.short_tokens(),
        }
    }

    /// What a worker's steps are taken to need.
    fn model(&self, worker: usize) -> StepTime {
        self.view[worker].model.unwrap_or(self.predicted)
    }

    fn at(&mut self, at: Time, event: Event) {
        self.sequence += 1;
        self.events.push(Due { at, sequence: self.sequence, event });
    }

    fn log(&mut self, kind: u64, a: u64, b: u64) {
        self.hash = random::mix(self.hash ^ self.now.0).wrapping_add(random::mix(kind << 56 ^ a << 28 ^ b));
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
            for (id, tokens) in w.batcher.take_preempted() {
                self.preempted(id, tokens);
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
        w.measured = Some(Measured {
            tokens: f64::from(shape.new_tokens),
            pairs: shape.pairs,
            context: shape.context as f64,
            seconds,
        });
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
        w.learn();
        let (rows, _) = w.batcher.decodes();
        let before = w.contexts();
        let mut happened = std::mem::take(&mut self.happened);
        happened.clear();
        w.batcher.apply(&mut happened, self.now);
        self.tell_drawn(worker, before, &happened);
        let mut ended = 0;
        for &what in &happened {
            match what {
                Happened::Finished(id) => {
                    ended += 1;
                    let arrival = &self.workload.arrivals[id as usize];
                    let job = &mut self.jobs[id as usize];
                    job.made = arrival.output;
                    job.last_at = self.now;
                    self.observer.answered(arrival.output);
                    self.workers[worker].ledger(id).decode_over(arrival.input + arrival.output, self.now);
                    if arrival.class == ServiceClass::Offline {
                        self.outcome.offline_tokens += u64::from(arrival.output) + u64::from(arrival.input);
                    }
                    self.end(id, worker);
                }
                Happened::FirstToken(id) => self.first_token(id, worker),
                Happened::Preempted(id, tokens) => self.preempted(id, tokens),
            }
        }
        self.observer.drawn(f64::from(rows), f64::from(ended), self.now);
        self.happened = happened;
        if !self.workers[worker].inbound.is_empty() {
            self.let_in(worker);
        }
        if cfg!(debug_assertions) {
            self.workers[worker].check_ledgers();
        }
        self.workers[worker].busy = false;
        self.kick(worker);
        if cfg!(debug_assertions) {
            self.workers[worker].batcher.check_books();
        }
    }

    /// Every router hears of the tokens that a step has drawn for it. `before` are those of its sequences before the
    /// step.
    fn tell_drawn(&mut self, worker: usize, before: Vec<u64>, happened: &[Happened]) {
        let mut after = self.workers[worker].contexts();
        let routers = after.len();
        for what in happened {
            if let Happened::Finished(id) = *what {
                let arrival = &self.workload.arrivals[id as usize];
                after[id as usize % routers] += u64::from(arrival.input) + u64::from(arrival.output);
            }
        }
        for (ledger, (after, before)) in self.workers[worker].ledgers.iter_mut().zip(after.iter().zip(before))
        {
            ledger.drawn((after - before) as u32, self.now);
        }
    }

    /// Lost its pages; it is placed again with what it has.
    fn preempted(&mut self, id: JobId, tokens: u32) {
        self.outcome.preempted += 1;
        let worker = self.jobs[id as usize].worker as usize;
        self.workers[worker].ledger(id).decode_over(tokens, self.now);
        self.jobs[id as usize].made = tokens - self.workload.arrivals[id as usize].input;
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

/// Puts what is known of a worker's work into the view.
fn show(candidate: &mut Candidate, load: &Load) {
    candidate.queue_seconds = load.queue_seconds;
    candidate.timely_seconds = load.timely_seconds;
    candidate.decodes = load.decodes;
    candidate.decode_tokens = load.decode_tokens;
    candidate.running = load.decodes;
}

mod events;
mod router;
