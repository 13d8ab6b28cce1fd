//! A simulated worker: its batcher, its adapter, its cache, and what the router was last told of it.

use std::collections::VecDeque;

use tandem_batching::pace::Pace;
use tandem_placement::ledger::{Ledger, Load};
use tandem_placement::predictor::{Measured, Predictor};
use tandem_types::{Role, Time};

use crate::cache::Cache;
use crate::real::Real;
use crate::twin::{DecodeJob, Happened, JobId, PromptJob, Shape, Twin};

/// What decides about steps.
pub enum Batcher {
    /// The closed form.
    Twin(Box<Twin>),
    /// The real batcher and KV cache.
    Real(Box<Real>),
}

macro_rules! both {
    ($self:ident, $b:ident => $call:expr) => {
        match $self {
            Batcher::Twin($b) => $call,
            Batcher::Real($b) => $call,
        }
    };
}

impl Batcher {
    pub(crate) fn set_pace(&mut self, pace: Pace) {
        both!(self, b => b.set_pace(pace));
    }

    pub(crate) fn prompt(&mut self, job: PromptJob) {
        both!(self, b => b.prompt(job));
    }

    pub(crate) fn reserve(&mut self, id: JobId, tokens: u32) -> bool {
        both!(self, b => b.reserve(id, tokens))
    }

    pub(crate) fn fits_ever(&self, tokens: u32) -> bool {
        both!(self, b => b.fits_ever(tokens))
    }

    pub(crate) fn release(&mut self, id: JobId) {
        both!(self, b => b.release(id));
    }

    pub(crate) fn join(&mut self, job: DecodeJob) {
        both!(self, b => b.join(job));
    }

    pub(crate) fn plan(&mut self, now: Time) -> Option<Shape> {
        both!(self, b => b.plan(now))
    }

    pub(crate) fn apply(&mut self, happened: &mut Vec<Happened>, now: Time) {
        match self {
            Batcher::Twin(b) => b.apply(happened),
            Batcher::Real(b) => b.apply(happened, now),
        }
    }

    pub(crate) fn take_preempted(&mut self) -> Vec<(JobId, u32)> {
        both!(self, b => b.take_preempted())
    }

    pub(crate) fn clear(&mut self) -> Vec<JobId> {
        both!(self, b => b.clear())
    }

    pub(crate) fn decodes(&self) -> (u32, u64) {
        both!(self, b => b.decodes())
    }

    fn contexts(&self, routers: usize) -> Vec<u64> {
        both!(self, b => b.contexts(routers))
    }

    pub(crate) fn prompts(&self) -> usize {
        both!(self, b => b.prompts())
    }

    pub(crate) fn queue_seconds(&self) -> (f64, f64) {
        both!(self, b => b.queue_seconds())
    }

    pub(crate) fn blocks(&self) -> (u32, u32) {
        both!(self, b => b.blocks())
    }

    pub(crate) fn check_books(&self) {
        both!(self, b => b.check_books());
    }
}

/// What a worker says of itself.
#[derive(Clone, Copy, Debug, Default)]
pub struct Report {
    pub made: Time,
    pub load: Load,
    pub kv_usage: f32,
    pub prompts: u32,
}

/// One worker.
pub struct Worker {
    pub role: Role,
    pub batcher: Batcher,
    pub up: bool,
    pub busy: bool,
    /// Counts its starts: events of an earlier one are void.
    pub life: u32,
    /// Decodes that wait for room.
    pub inbound: VecDeque<JobId>,
    /// Decodes waiting for room or on their way, and their tokens.
    pub arriving: (u32, u64),
    /// When its adapter is free again, to send and to receive.
    pub sends: Time,
    pub receives: Time,
    pub cache: Cache,
    pub cache_sequence: u64,
    pub steps: u64,
    /// Where there is anything to learn, what learns it, and the step that is under way.
    pub predictor: Option<Predictor>,
    pub measured: Option<Measured>,
    pub slow: (f64, Time),
    pub silent_until: Time,
    /// Each router's books of it, for when reports are old.
    pub ledgers: Vec<Ledger>,
    /// Reports on their way to the router.
    pub reports: VecDeque<Report>,
    pub dirty: bool,
    pub busy_seconds: f64,
    pub online: u32,
}

impl Worker {
    pub fn new(role: Role, batcher: Batcher, cache: Cache, routers: usize) -> Worker {
        Worker {
            role,
            batcher,
            up: true,
            busy: false,
            life: 0,
            inbound: VecDeque::new(),
            arriving: (0, 0),
            sends: Time::ZERO,
            receives: Time::ZERO,
            cache,
            cache_sequence: 0,
            steps: 0,
            predictor: None,
            measured: None,
            slow: (1.0, Time::ZERO),
            silent_until: Time::ZERO,
            ledgers: vec![Ledger::default(); routers.max(1)],
            reports: VecDeque::new(),
            dirty: true,
            busy_seconds: 0.0,
            online: 0,
        }
    }

    /// The step under way has ended and taken what it takes.
    pub fn learn(&mut self) {
        if let (Some(predictor), Some(measured)) = (&mut self.predictor, self.measured.take()) {
            predictor.learn(measured);
        }
    }

    /// The books of whose this request is.
    pub fn ledger(&mut self, id: JobId) -> &mut Ledger {
        let routers = self.ledgers.len();
        &mut self.ledgers[id as usize % routers]
    }

    /// Tokens of the sequences that decode here, by router.
    pub fn contexts(&self) -> Vec<u64> {
        match self.ledgers.len() {
            1 => vec![self.batcher.decodes().1],
            routers => self.batcher.contexts(routers),
        }
    }

    /// Compares the books of routers with what they are about.
    ///
    /// # Panics
    /// If they differ.
    pub fn check_ledgers(&self) {
        let sum = |(n, tokens): (u32, u64), (more, more_tokens)| (n + more, tokens + more_tokens);
        let known = self.ledgers.iter().map(Ledger::decodes).fold((0, 0), sum);
        assert_eq!(known, sum(self.batcher.decodes(), self.arriving), "routers know who decodes here");
    }

    /// What it would say now.
    pub fn report(&self, now: Time) -> Report {
        let (queued, timely) = self.batcher.queue_seconds();
        let (decodes, context) = self.batcher.decodes();
        let (used, total) = self.batcher.blocks();
        Report {
            made: now,
            load: Load {
                queue_seconds: queued,
                timely_seconds: timely,
                decodes: decodes + self.arriving.0,
                decode_tokens: context + self.arriving.1,
            },
            kv_usage: used as f32 / total.max(1) as f32,
            prompts: self.batcher.prompts() as u32,
        }
    }
}
