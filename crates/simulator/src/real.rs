//! A worker's batcher and KV cache as they are, driven token by token: what the closed form is compared with.

use std::collections::HashMap;
use std::time::Duration;

use tandem_batching::pace::Pace;
use tandem_batching::{
    Batcher, Config, Event, Origin, Outcome, Plan, RowOutcome, SequenceId, SequenceSpec, Target,
};
use tandem_kv_cache::{ChainSeed, FirstTokenBundle, KvCache, Table, chain_seed};
use tandem_types::{
    Attempt, BLOCK_TOKENS, Choice, KvIdentity, LeaseId, Sampled, SamplingParams, StopRules, Time, Until,
    Usage, attention_pairs, blocks_for,
};

use crate::twin::{DecodeJob, Happened, JobId, PromptJob, Shape, slower};

/// The real code with the face of [`crate::twin::Twin`].
pub struct Real {
    batcher: Batcher,
    kv: KvCache,
    pace: Pace,
    seed: ChainSeed,
    /// Prompts that are not computed yet, and how far they are.
    prompts: HashMap<JobId, (PromptJob, u32)>,
    reserved: HashMap<JobId, Table>,
    /// Prompts whose pages are under a lease.
    leased: HashMap<JobId, u32>,
    in_flight: Option<Plan>,
    slots: HashMap<u32, JobId>,
    preempted: Vec<(JobId, u32)>,
    rows: HashMap<JobId, u32>,
    context: u64,
    queued: f64,
    timely: f64,
    now: Time,
}

fn lease(id: JobId) -> LeaseId {
    LeaseId(u128::from(id) + 1)
}

impl Real {
    /// An idle worker.
    pub fn new(pace: Pace, kv_tokens: u64) -> Real {
        let config = Config {
            token_budget: 1 << 24,
            rows_max: 1 << 20,
            depth: 0,
            context_tokens: u32::MAX,
            answer_tokens: 0,
        };
        let mut batcher = Batcher::new(config);
        batcher.set_pace(Some(pace));
        let kv = KvCache::new(tandem_kv_cache::Config {
            pages: (kv_tokens / u64::from(BLOCK_TOKENS)) as u32,
            groups: 1,
            leased_share: 1.0,
            lease_time_to_live: Duration::from_secs(1 << 30),
            prefix_cache: false,
        });
        let identity = KvIdentity { digest: "simulated".into(), numerics: "simulated".into() };
        Real {
            batcher,
            kv,
            pace,
            seed: chain_seed(&identity, true, b"", ""),
            prompts: HashMap::new(),
            reserved: HashMap::new(),
            leased: HashMap::new(),
            in_flight: None,
            slots: HashMap::new(),
            preempted: Vec::new(),
            rows: HashMap::new(),
            context: 0,
            queued: 0.0,
            timely: 0.0,
            now: Time::ZERO,
        }
    }

    pub(crate) fn set_pace(&mut self, pace: Pace) {
        let slower = slower(&self.pace, &pace);
        (self.queued, self.timely) = (self.queued * slower, self.timely * slower);
        self.pace = pace;
        self.batcher.set_pace(Some(pace));
    }

    fn spec(
        &self,
        id: JobId,
        tokens: u32,
        prompt_tokens: u32,
        until: Until,
        max_tokens: u32,
    ) -> SequenceSpec {
        SequenceSpec {
            id: SequenceId(u64::from(id)),
            tokens: vec![1; tokens as usize],
            prompt_tokens,
            until,
            sampling: SamplingParams::default(),
            choice: Choice(0),
            stop: StopRules { max_tokens, ..StopRules::default() },
            class: tandem_types::ServiceClass::Online,
            arrived: Time::ZERO,
            seed: self.seed,
            score: None,
        }
    }

    fn cost(&self, job: &PromptJob, computed: u32) -> f64 {
        self.pace.model.prefill(job.tokens - computed, computed, self.pace.budget.most())
    }

    pub(crate) fn prompt(&mut self, job: PromptJob) {
        assert_eq!(job.cached, 0, "prefix caches are simulated beside the closed form only");
        let spec = self.spec(job.id, job.tokens, job.tokens, Until::FirstToken, u32::MAX);
        self.batcher.add(SequenceSpec { class: job.class, arrived: job.arrived, ..spec }, Origin::Fresh);
        self.batcher.set_target(SequenceId(u64::from(job.id)), Target { due: job.due, ..Target::default() });
        let cost = self.cost(&job, 0);
        self.queued += cost;
        self.timely += cost;
        self.prompts.insert(job.id, (job, 0));
    }

    pub(crate) fn reserve(&mut self, id: JobId, tokens: u32) -> bool {
        let counts = self.kv.counts();
        let wanted = blocks_for(tokens + self.pace.headroom_tokens.max(BLOCK_TOKENS));
        if counts.in_use + wanted > counts.total {
            return false;
        }
        let (table, _) =
            self.kv.open(&[], tokens, tokens + BLOCK_TOKENS, self.now).expect("there is room for more");
        self.reserved.insert(id, table);
        true
    }

    pub(crate) fn fits_ever(&self, tokens: u32) -> bool {
        self.kv.fits_ever(tokens + self.pace.headroom_tokens.max(BLOCK_TOKENS))
    }

    pub(crate) fn release(&mut self, id: JobId) {
        if let Some(table) = self.reserved.remove(&id) {
            self.kv.close(table, self.now);
        }
        if self.leased.remove(&id).is_some() {
            self.kv.cancel_lease(lease(id), self.now);
            self.kv.take_effects();
        }
    }

    pub(crate) fn join(&mut self, job: DecodeJob) {
        let table = match self.reserved.remove(&job.id) {
            Some(table) => table,
            None => {
                self.leased.remove(&job.id).expect("its pages were reserved or lent");
                let adopted = self.kv.adopt(lease(job.id), Attempt(1), self.now).expect("it is sealed");
                self.kv.take_effects();
                adopted.table
            }
        };
        let prompt_tokens = job.tokens - job.made - 1;
        let spec = self.spec(job.id, job.tokens, prompt_tokens, Until::End, job.made + 1 + job.left);
        let id = spec.id;
        let origin = Origin::Computed { table, computed: job.tokens - 1 };
        self.batcher.add(SequenceSpec { class: job.class, arrived: job.arrived, ..spec }, origin);
        let target = Target { due: Time::MAX, first_at: job.first_at, token_seconds: job.token_seconds };
        self.batcher.set_target(id, target);
        self.rows.insert(job.id, job.tokens);
        self.context += u64::from(job.tokens);
    }

    pub(crate) fn plan(&mut self, now: Time) -> Option<Shape> {
        self.now = now;
        let plan = self.batcher.plan(&mut self.kv, now);
        if !self.prompts.is_empty() {
            self.timely = self.batcher.timely_seconds();
        }
        for event in self.batcher.take_events() {
            match event {
                Event::Admitted { id, .. } => {
                    let (job, _) = self.prompts[&(id.0 as JobId)];
                    let table = self.batcher.table(id).expect("it was admitted");
                    let granted = self.kv.grant(lease(job.id), table, job.tokens, Time::MAX, now);
                    granted.expect("the whole pool may be under leases");
                    self.batcher.set_leased(id, true);
                    self.leased.insert(job.id, job.tokens);
                }
                Event::Preempted { id } => {
                    let id = id.0 as JobId;
                    let tokens = self.rows.remove(&id).expect("a row was preempted");
                    self.context -= u64::from(tokens);
                    self.preempted.push((id, tokens));
                }
                other => unreachable!("no plan makes {other:?}"),
            }
        }
        let plan = plan?;
        let mut shape = Shape::default();
        for row in &plan.rows {
            shape.new_tokens += row.count;
            let id = self.batcher.sequence_of(row.slot).expect("a planned row has a sequence").0 as JobId;
            self.slots.insert(row.slot, id);
            if self.rows.contains_key(&id) {
                shape.context += u64::from(self.rows[&id]);
            } else {
                shape.prompt_tokens += row.count;
                shape.pairs += attention_pairs(row.count, row.start);
            }
        }
        self.in_flight = Some(plan);
        Some(shape)
    }

    pub(crate) fn apply(&mut self, happened: &mut Vec<Happened>, now: Time) {
        self.now = now;
        let plan = self.in_flight.take().expect("a step was planned");
        let begin = happened.len();
        happened.extend(self.preempted.drain(..).map(|(id, tokens)| Happened::Preempted(id, tokens)));
        for row in &plan.rows {
            let id = self.slots[&row.slot];
            if let Some(tokens) = self.rows.get_mut(&id) {
                *tokens += 1;
                self.context += 1;
            } else {
                let (job, computed) = self.prompts[&id];
                let after = computed + row.count;
                let left = if after >= job.tokens { 0.0 } else { self.cost(&job, after) };
                let gone = self.cost(&job, computed) - left;
                self.queued = (self.queued - gone).max(0.0);
                self.timely = (self.timely - gone).max(0.0);
                self.prompts.insert(id, (job, after));
            }
        }
        let rows = plan.rows.iter().map(|row| RowOutcome {
            slot: row.slot,
            count: row.count,
            sampled: row.sample.then(|| Sampled { token: 1, ..Sampled::default() }),
            scored: Vec::new(),
        });
        let outcome = Outcome { id: plan.id, rows: rows.collect(), took: Duration::ZERO };
        self.batcher.apply(&mut self.kv, outcome, now);
        for event in self.batcher.take_events() {
            let Event::Finished { id, reason, .. } = event else { continue };
            let id = id.0 as JobId;
            if reason.is_none() {
                let (job, _) = self.prompts.remove(&id).expect("a prompt was computed");
                let usage = Usage { prompt_tokens: job.tokens, cached_tokens: 0, output_tokens: 1 };
                let bundle = FirstTokenBundle { sampled: Sampled::default(), usage };
                self.kv.seal(lease(id), job.tokens, bundle, now);
                happened.push(Happened::FirstToken(id));
            } else {
                self.context -= u64::from(self.rows.remove(&id).expect("a row has ended"));
                happened.push(Happened::Finished(id));
            }
        }
        if self.prompts.is_empty() {
            (self.queued, self.timely) = (0.0, 0.0);
        }
        happened[begin..].sort_unstable();
    }

    pub(crate) fn take_preempted(&mut self) -> Vec<(JobId, u32)> {
        if self.in_flight.is_some() { Vec::new() } else { std::mem::take(&mut self.preempted) }
    }

    pub(crate) fn clear(&mut self) -> Vec<JobId> {
        let ids = self.prompts.keys().chain(self.rows.keys()).chain(self.reserved.keys());
        let preempted = self.preempted.iter().map(|(id, _)| id);
        let mut ids: Vec<JobId> = ids.chain(self.leased.keys()).chain(preempted).copied().collect();
        ids.sort_unstable();
        ids.dedup();
        for (_, table) in self.reserved.drain() {
            self.kv.close(table, self.now);
        }
        let pages = u64::from(self.kv.config().pages) * u64::from(BLOCK_TOKENS);
        *self = Real::new(self.pace, pages);
        ids
    }

    pub(crate) fn decodes(&self) -> (u32, u64) {
        (self.rows.len() as u32, self.context)
    }

    pub(crate) fn contexts(&self, routers: usize) -> Vec<u64> {
        let mut tokens = vec![0; routers];
        for (id, row) in &self.rows {
            tokens[*id as usize % routers] += u64::from(*row);
        }
        tokens
    }

    pub(crate) fn prompts(&self) -> usize {
        self.prompts.len()
    }

    pub(crate) fn queue_seconds(&self) -> (f64, f64) {
        let arrival = self.pace.order == tandem_batching::pace::Order::Arrival;
        let timely = if arrival { self.queued } else { self.timely };
        (self.queued, timely.min(self.queued))
    }

    pub(crate) fn blocks(&self) -> (u32, u32) {
        let counts = self.kv.counts();
        (counts.in_use, counts.total)
    }

    pub(crate) fn check_books(&self) {
        self.batcher.check_books();
        self.kv.check_books();
    }
}
