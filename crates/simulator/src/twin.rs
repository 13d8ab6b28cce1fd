//! A worker's batcher in closed form: the same steps as the real one, counted instead of carried out.
//!
//! It keeps numbers of tokens where the batcher keeps tokens and page tables. Which prompt comes first and how
//! much of it fits is decided by the very functions that the batcher calls (`tandem_batching::pace`); that
//! pages, admission and preemption agree too is property-tested against [`crate::real::Real`].

use std::collections::HashMap;

use tandem_batching::pace::{self, Budget, Decode, Filling, Line, Order, Pace, Prompt};
use tandem_types::{BLOCK_TOKENS, ServiceClass, Time, blocks_for};

/// Names a request's leg on a worker.
pub type JobId = u32;

/// What a worker is asked to prefill.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct PromptJob {
    /// Whose.
    pub id: JobId,
    /// When the request arrived: its place in line.
    pub arrived: Time,
    /// Tokens of the prompt, and those emitted before it was placed again.
    pub tokens: u32,
    /// Of these, in pages already when it begins.
    pub cached: u32,
    /// When its first token is due.
    pub due: Time,
    /// Whether it has targets.
    pub class: ServiceClass,
}

/// What a worker is asked to go on with.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct DecodeJob {
    /// Whose.
    pub id: JobId,
    /// Its place in line.
    pub arrived: Time,
    /// Tokens known: prompt, and what was drawn.
    pub tokens: u32,
    /// Tokens to draw.
    pub left: u32,
    /// When its first token was there.
    pub first_at: Time,
    /// Tokens drawn after the first.
    pub made: u32,
    /// Seconds per token that it may take.
    pub token_seconds: f64,
    /// Whether it has targets.
    pub class: ServiceClass,
}

/// What one step computes.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Shape {
    /// New tokens: one per decode, and those of prompts.
    pub new_tokens: u32,
    /// Attention pairs of the prompts.
    pub pairs: f64,
    /// Context tokens of the decodes.
    pub context: u64,
    /// How many of the new tokens are of prompts.
    pub prompt_tokens: u32,
}

/// What a step has brought.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Happened {
    /// It was taken out to make room, with so many tokens: its prompt and all it had drawn.
    Preempted(JobId, u32),
    /// A decode has drawn its last token.
    Finished(JobId),
    /// A prompt is computed and its first token drawn. Its pages stay until they are adopted or let go.
    FirstToken(JobId),
}

#[derive(Clone, Copy, Debug)]
struct Waiting {
    job: PromptJob,
    computed: u32,
    begun: bool,
}

impl Waiting {
    fn prompt(&self) -> Prompt {
        Prompt {
            left: self.job.tokens - self.computed,
            total: self.job.tokens,
            begun: self.begun,
            due: self.job.due,
            class: self.job.class,
        }
    }
}

#[derive(Clone, Copy, Debug)]
struct Running {
    job: DecodeJob,
    room: u32,
}

#[derive(Clone, Debug, Default)]
struct Flight {
    /// Prompts in this step, with the tokens of each.
    prompts: Vec<(JobId, u32)>,
    /// How many rows are in it: the first ones. Who joins meanwhile is in the next.
    rows: usize,
}

/// How much longer prompts are taken to last by another pace.
pub(crate) fn slower(before: &Pace, after: &Pace) -> f64 {
    if before.model == after.model {
        return 1.0;
    }
    let of = |pace: &Pace| pace.model.prefill(BLOCK_TOKENS * 32, 0, pace.budget.most());
    of(after) / of(before)
}

/// A worker's batcher and its pool, as numbers.
#[derive(Clone, Debug)]
pub struct Twin {
    pace: Pace,
    blocks_total: u32,
    blocks_used: u32,
    line: Line<Waiting>,
    rows: Vec<Running>,
    context: u64,
    /// Blocks of legs that are reserved or lent: on their way in or out.
    held: HashMap<JobId, u32>,
    in_flight: Option<Flight>,
    /// The only row has no room for its next token.
    stalled: bool,
    preempted: Vec<(JobId, u32)>,
    /// Seconds of queued prompts as last ordered, all and those in time.
    timely: f64,
    queued: f64,
    as_reference: bool,
}

impl Twin {
    /// An idle worker.
    pub fn new(pace: Pace, kv_tokens: u64) -> Twin {
        Twin {
            pace,
            as_reference: false,
            blocks_total: (kv_tokens / u64::from(BLOCK_TOKENS)) as u32,
            blocks_used: 0,
            line: Line::default(),
            rows: Vec::new(),
            context: 0,
            held: HashMap::new(),
            in_flight: None,
            stalled: false,
            preempted: Vec::new(),
            timely: 0.0,
            queued: 0.0,
        }
    }

    /// Counts as the reference simulator does: prompts take no pages, rows grow without them, and a queue counts
    /// the whole of a prompt until it is done.
    pub fn as_reference(mut self) -> Twin {
        self.as_reference = true;
        self
    }

    /// Other limits from now on.
    pub fn set_pace(&mut self, pace: Pace) {
        let slower = slower(&self.pace, &pace);
        (self.queued, self.timely) = (self.queued * slower, self.timely * slower);
        self.pace = pace;
    }

    fn cost(&self, job: &PromptJob, computed: u32) -> f64 {
        self.pace.model.prefill(job.tokens - computed, computed, self.pace.budget.most())
    }

    /// Takes a prompt in.
    pub fn prompt(&mut self, job: PromptJob) {
        let waiting = Waiting { job, computed: job.cached.min(job.tokens - 1), begun: false };
        let cost = self.cost(&job, waiting.computed);
        self.queued += cost;
        self.timely += cost;
        self.line.push(waiting);
    }

    /// Takes pages for a decode whose KV is on its way. False if there is no room now.
    pub fn reserve(&mut self, id: JobId, tokens: u32) -> bool {
        let wanted = tokens + self.pace.headroom_tokens.max(BLOCK_TOKENS);
        if self.as_reference {
            let on_the_way: u64 = self.held.values().map(|blocks| u64::from(blocks * BLOCK_TOKENS)).sum();
            if self.context + on_the_way + u64::from(wanted) > u64::from(self.blocks_total * BLOCK_TOKENS) {
                return false;
            }
            self.held.insert(id, blocks_for(tokens));
            self.blocks_used += blocks_for(tokens);
            return true;
        }
        if self.blocks_used + blocks_for(wanted) > self.blocks_total {
            return false;
        }
        let blocks = blocks_for(tokens + BLOCK_TOKENS);
        self.blocks_used += blocks;
        self.held.insert(id, blocks);
        true
    }

    /// Whether a decode with so many tokens could ever fit.
    pub fn fits_ever(&self, tokens: u32) -> bool {
        blocks_for(tokens + self.pace.headroom_tokens.max(BLOCK_TOKENS)) <= self.blocks_total
    }

    /// Lets go of pages that were reserved or lent.
    pub fn release(&mut self, id: JobId) {
        if let Some(blocks) = self.held.remove(&id) {
            self.blocks_used -= blocks;
        }
    }

    /// A reserved or lent sequence decodes here from the next step on.
    pub fn join(&mut self, job: DecodeJob) {
        let blocks = self.held.remove(&job.id).expect("its pages were reserved or lent");
        self.context += u64::from(job.tokens);
        self.rows.push(Running { job, room: blocks * BLOCK_TOKENS });
    }

    /// The next step, or `None` if there is nothing to compute.
    pub fn plan(&mut self, now: Time) -> Option<Shape> {
        debug_assert!(self.in_flight.is_none(), "one step at a time");
        self.stalled = false;
        self.grow();
        let mut flight = Flight::default();
        let (rows, context) = if self.stalled { (0, 0) } else { (self.rows.len() as u32, self.context) };
        let (mut prompt_tokens, mut pairs) = (0, 0.0);
        if !self.line.is_empty() {
            self.timely = self.line.arrange(&self.pace, now, |waiting| Some(waiting.prompt()));
            let seconds = self.step_seconds(rows, context, now);
            let mut filling = Filling::new(&self.pace, seconds, rows, context as f64);
            for w in self.line.iter_mut() {
                if filling.is_full() {
                    break;
                }
                let blocks = if self.as_reference { 0 } else { blocks_for(w.job.tokens) };
                if !w.begun && self.blocks_used + blocks > self.blocks_total {
                    break; // nobody passes one that waits for memory
                }
                let count = filling.take(&w.prompt());
                if count == 0 {
                    break;
                }
                if !w.begun {
                    w.begun = true;
                    self.blocks_used += blocks;
                    self.held.insert(w.job.id, blocks);
                }
                flight.prompts.push((w.job.id, count));
                prompt_tokens += count;
                pairs += tandem_types::attention_pairs(count, w.computed);
            }
        }
        if rows + prompt_tokens == 0 {
            return None;
        }
        flight.rows = rows as usize;
        self.in_flight = Some(flight);
        Some(Shape { new_tokens: rows + prompt_tokens, pairs, context, prompt_tokens })
    }

    /// Every row gets room for the token it writes next; the youngest go when there is none.
    fn grow(&mut self) {
        if self.as_reference {
            return;
        }
        let wants = |row: &Running| row.job.tokens > row.room;
        let wanted = self.rows.iter().filter(|row| wants(row)).count() as u32;
        if self.blocks_used + wanted <= self.blocks_total {
            if wanted > 0 {
                for row in self.rows.iter_mut().filter(|row| row.job.tokens > row.room) {
                    row.room += BLOCK_TOKENS;
                }
                self.blocks_used += wanted;
            }
            return;
        }
        let mut order: Vec<usize> = (0..self.rows.len()).collect();
        order.sort_by_key(|&at| self.age(at));
        let mut gone = vec![false; self.rows.len()];
        for (place, &at) in order.iter().enumerate() {
            while !gone[at] && wants(&self.rows[at]) {
                if self.blocks_used < self.blocks_total {
                    self.blocks_used += 1;
                    self.rows[at].room += BLOCK_TOKENS;
                    continue;
                }
                let youngest = order[place..].iter().rev().copied().find(|&at| !gone[at]);
                let Some(victim) = youngest else { break };
                if victim == at && !order[..place].iter().any(|&at| !gone[at]) {
                    // Pages on their way hold the rest: giving up its own would help nobody.
                    self.stalled = true;
                    break;
                }
                gone[victim] = true;
                let Running { job, room } = self.rows[victim];
                self.blocks_used -= room / BLOCK_TOKENS;
                self.context -= u64::from(job.tokens);
                self.preempted.push((job.id, job.tokens));
            }
        }
        let mut at = 0;
        self.rows.retain(|_| {
            at += 1;
            !gone[at - 1]
        });
    }

    fn age(&self, at: usize) -> (bool, Time, JobId) {
        let job = &self.rows[at].job;
        (job.class == ServiceClass::Offline, job.arrived, job.id)
    }

    /// Seconds that the coming step may take.
    fn step_seconds(&self, rows: u32, context: u64, now: Time) -> f64 {
        match self.pace.budget {
            Budget::Tokens(_) => f64::INFINITY,
            Budget::Slack(_) if self.rows.is_empty() => f64::INFINITY,
            Budget::Slack(_) => {
                let decodes = self.rows.iter().map(|row| Decode {
                    first_at: row.job.first_at,
                    made: row.job.made,
                    token_seconds: row.job.token_seconds,
                });
                let least = self.pace.model.step(f64::from(rows), 0.0, context as f64);
                pace::step_seconds(decodes, least, self.pace.short_tokens, now)
            }
        }
    }

    /// The step in flight has ended.
    pub fn apply(&mut self, happened: &mut Vec<Happened>) {
        let flight = self.in_flight.take().expect("a step was planned");
        let begin = happened.len();
        happened.extend(self.preempted.drain(..).map(|(id, tokens)| Happened::Preempted(id, tokens)));
        self.context += flight.rows as u64;
        // From the last: what takes the place of one that ends has had its token, or is not in this step.
        for at in (0..flight.rows).rev() {
            let row = &mut self.rows[at];
            row.job.tokens += 1;
            row.job.made += 1;
            row.job.left -= 1;
            if row.job.left > 0 {
                continue;
            }
            let row = self.rows.swap_remove(at);
            self.context -= u64::from(row.job.tokens);
            self.blocks_used -= row.room / BLOCK_TOKENS;
            happened.push(Happened::Finished(row.job.id));
        }
        for &(id, count) in &flight.prompts {
            let place = self.line.iter().position(|w| w.job.id == id).expect("it is in line");
            let w = self.line.iter_mut().nth(place).expect("it has this place");
            let before = *w;
            w.computed += count;
            let done = w.computed >= w.job.tokens;
            if done {
                self.line.remove(place);
                happened.push(Happened::FirstToken(id));
            } else {
                self.line.begun(place);
            }
            let model = self.pace.model;
            let most = self.pace.budget.most();
            let left = |w: &Waiting, computed: u32| model.prefill(w.job.tokens - computed, computed, most);
            let gone = match (done, self.as_reference) {
                (true, true) => left(&before, before.job.cached),
                (false, true) => 0.0,
                (true, false) => left(&before, before.computed),
                (false, false) => left(&before, before.computed) - left(&before, before.computed + count),
            };
            self.queued = (self.queued - gone).max(0.0);
            self.timely = (self.timely - gone).max(0.0);
        }
        if self.line.is_empty() {
            (self.queued, self.timely) = (0.0, 0.0);
        }
        happened[begin..].sort_unstable();
    }

    /// Who was preempted while the last plan found no step at all, and with how many tokens.
    pub fn take_preempted(&mut self) -> Vec<(JobId, u32)> {
        if self.in_flight.is_some() { Vec::new() } else { std::mem::take(&mut self.preempted) }
    }

    /// Everything is lost; whose it was, in order.
    pub fn clear(&mut self) -> Vec<JobId> {
        let mut ids: Vec<JobId> = (self.line.clear().into_iter().map(|w| w.job.id))
            .chain(self.rows.drain(..).map(|row| row.job.id))
            .chain(self.held.drain().map(|(id, _)| id))
            .chain(self.preempted.drain(..).map(|(id, _)| id))
            .collect();
        ids.sort_unstable();
        ids.dedup();
        self.context = 0;
        self.blocks_used = 0;
        self.in_flight = None;
        (self.queued, self.timely) = (0.0, 0.0);
        ids
    }

    /// Sequences decoding, and their tokens.
    pub fn decodes(&self) -> (u32, u64) {
        (self.rows.len() as u32, self.context)
    }

    /// Tokens of the sequences decoding, by the router that each is of, where routers take turns.
    pub fn contexts(&self, routers: usize) -> Vec<u64> {
        let mut tokens = vec![0; routers];
        for row in &self.rows {
            tokens[row.job.id as usize % routers] += u64::from(row.job.tokens);
        }
        tokens
    }

    /// Tokens of online sequences decoding, and how many.
    pub fn online_decodes(&self) -> usize {
        self.rows.iter().filter(|row| row.job.class == ServiceClass::Online).count()
    }

    /// Prompts waiting or under way.
    pub fn prompts(&self) -> usize {
        self.line.len()
    }

    /// Seconds of queued prompts: all of them, and those that can still be in time.
    pub fn queue_seconds(&self) -> (f64, f64) {
        let timely = if self.pace.order == Order::Arrival { self.queued } else { self.timely };
        (self.queued, timely.min(self.queued))
    }

    /// Blocks in use, and in all.
    pub fn blocks(&self) -> (u32, u32) {
        (self.blocks_used, self.blocks_total)
    }

    /// Compares the counters with what they count, from scratch.
    ///
    /// # Panics
    /// If they do not add up.
    pub fn check_books(&self) {
        let rows: u32 = self.rows.iter().map(|row| row.room / BLOCK_TOKENS).sum();
        let held: u32 = self.held.values().sum();
        assert_eq!(self.blocks_used, rows + held, "blocks are counted");
        assert!(
            self.as_reference || self.blocks_used <= self.blocks_total,
            "no more blocks are in use than exist"
        );
        let context: u64 = self.rows.iter().map(|row| u64::from(row.job.tokens)).sum();
        assert_eq!(self.context, context, "context is counted");
    }
}
