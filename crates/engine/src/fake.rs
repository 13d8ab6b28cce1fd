//! The fake engine: the same face as the real one, a latency curve instead of a model.
//!
//! It writes one word per token into its real KV pages and draws the next token from the words that it *reads
//! back*, their positions and the seed. So torn, swapped or stale KV changes the output, and [`oracle`] can say
//! every token from the prompt alone, [`oracle_scores`] how likely the prompt's own tokens are.

mod ordinary;
mod spec;

use std::collections::{BTreeMap, VecDeque};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use tandem_batching::{Input, Outcome, Plan, Row, RowOutcome, Score, SlotOpen};
use tandem_memory::Region;
use tandem_models::{KvKind, KvSpec};
use tandem_types::{BLOCK_TOKENS, Choice, KvForm, KvIdentity, Sampled, SamplingParams, Time, TokenId};

use crate::{Engine, Facts, LoadError, Options, StepError};

pub use ordinary::Ordinary;
pub use spec::{Curve, FakeSpec};

/// Longest sequence of a fake engine, in tokens.
pub const CONTEXT_TOKENS: u32 = 1 << 22;

/// As many of the likeliest tokens come with a score at most.
const TOP_LOGPROBS_MAX: u32 = tandem_device::TOP_LOGPROBS_MAX as u32;

/// Bytes of a token's word.
const WORD: u64 = 8;
/// The pool is counted in tokens: one per kibibyte of KV memory, about what a small model takes.
const POOL_BYTES_PER_TOKEN: u64 = 1024;

/// A fake engine with the vocabulary of the checkpoint in `dir`, of which nothing but `config.json` and
/// `tokenizer.json` is read.
pub fn fake(spec: FakeSpec, dir: &Path, options: Options) -> Result<Box<dyn Engine>, LoadError> {
    let ordinary = Ordinary::read(dir)?;
    let model = dir.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
    let engine = Fake::new(spec, ordinary, model, &options)?;
    (options.progress)(1.0);
    Ok(Box::new(engine))
}

/// The `count` tokens that follow a prompt, from the prompt alone.
pub fn oracle(
    ordinary: &Ordinary,
    prompt: &[TokenId],
    sampling: &SamplingParams,
    choice: Choice,
    count: usize,
) -> Vec<TokenId> {
    let mut fold = Fold::default();
    for (position, &token) in prompt.iter().enumerate() {
        fold.add(word(token, position as u32));
    }
    let mut drawn = Vec::with_capacity(count);
    for position in prompt.len()..prompt.len() + count {
        let token = draw(ordinary, fold, position as u32, sampling, choice, &[]).token;
        fold.add(word(token, position as u32));
        drawn.push(token);
    }
    drawn
}

/// The prompt's tokens from the second on, with their log probabilities and the `top` likeliest at each position.
pub fn oracle_scores(ordinary: &Ordinary, prompt: &[TokenId], top: u32) -> Vec<Sampled> {
    let mut fold = Fold::default();
    let mut scored = Vec::with_capacity(prompt.len());
    for (position, &token) in (0..).zip(prompt) {
        if position > 0 {
            scored.push(score(ordinary, fold, position, token, top));
        }
        fold.add(word(token, position));
    }
    scored
}

/// The word of a token at a position.
fn word(token: TokenId, position: u32) -> u64 {
    // Never zero, so that an unwritten word is told apart.
    mix(u64::from(token) << 32 | u64::from(position)) | 1
}

/// A finaliser with full avalanche (Steele et al. 2014, the mixing function of SplitMix64).
fn mix(mut x: u64) -> u64 {
    x = x.wrapping_add(0x9e37_79b9_7f4a_7c15);
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

/// The `n`-th draw of a seeded coin that comes up with this probability.
pub fn chance(seed: u64, n: u64, probability: f64) -> bool {
    let draw = mix(seed ^ mix(n)) >> 11;
    (draw as f64 / (1u64 << 53) as f64) < probability
}

/// All words up to a position, in order.
#[derive(Clone, Copy, Debug, Default)]
struct Fold(u64);

impl Fold {
    fn add(&mut self, word: u64) {
        self.0 = (self.0.rotate_left(5) ^ word).wrapping_mul(0x2545_f491_4f6c_dd1d);
    }
}

fn draw(
    ordinary: &Ordinary,
    fold: Fold,
    position: u32,
    sampling: &SamplingParams,
    choice: Choice,
    suppressed: &[TokenId],
) -> Sampled {
    let seeded = if sampling.temperature > 0.0 { mix(sampling.seed ^ u64::from(choice.0)) } else { 0 };
    let base = mix(fold.0 ^ u64::from(position) ^ seeded);
    let ranked = |rank: u64| ordinary.at(mix(base.wrapping_add(rank)));
    let token = (0..64).map(ranked).find(|token| !suppressed.contains(token)).unwrap_or_else(|| ranked(0));
    let Some(top) = sampling.logprobs else { return Sampled { token, logprob: None, top: Vec::new() } };
    // Plausible and reproducible: the drawn token first with at most one half, each further one half as likely.
    let first = -std::f32::consts::LN_2 - (base % 997) as f32 / 1000.0;
    let mut tokens = vec![token];
    for other in (64..).map(ranked).take(16 * top as usize) {
        if tokens.len() < top as usize && !tokens.contains(&other) {
            tokens.push(other);
        }
    }
    let likely = |(rank, token)| (token, first - rank as f32 * std::f32::consts::LN_2);
    let top = tokens.into_iter().take(top as usize).enumerate().map(likely).collect();
    Sampled { token, logprob: Some(first), top }
}

/// What a token that stands at a position has for a score: that of the greedy draw where this could have reported it,
/// and less likely the less it has to do with it.
fn score(ordinary: &Ordinary, fold: Fold, position: u32, token: TokenId, top: u32) -> Sampled {
    let greedy = SamplingParams { logprobs: Some(TOP_LOGPROBS_MAX), ..SamplingParams::default() };
    let mut drawn = draw(ordinary, fold, position, &greedy, Choice(0), &[]);
    let known = drawn.top.iter().find(|(other, _)| *other == token).map(|(_, logprob)| *logprob);
    let logprob = known.or(drawn.logprob.map(|first| {
        let rank = TOP_LOGPROBS_MAX as u64 + mix(fold.0 ^ u64::from(token)) % 100;
        first - rank as f32 * std::f32::consts::LN_2
    }));
    drawn.top.truncate(top as usize);
    Sampled { token, logprob, top: drawn.top }
}

struct Slot {
    open: SlotOpen,
    last: Option<TokenId>,
}

/// A step that is done when its time has come.
struct Flight {
    outcome: Result<Outcome, StepError>,
    ready: Time,
}

struct Fake {
    spec: FakeSpec,
    ordinary: Ordinary,
    facts: Facts,
    region: Arc<Region>,
    slots: BTreeMap<u32, Slot>,
    in_flight: VecDeque<Flight>,
    steps: u64,
}

impl Fake {
    fn new(spec: FakeSpec, ordinary: Ordinary, model: String, options: &Options) -> Result<Fake, LoadError> {
        let own = WORD * u64::from(BLOCK_TOKENS);
        let page_bytes = spec.page_bytes.unwrap_or(own);
        let counted = spec.page_bytes.unwrap_or(POOL_BYTES_PER_TOKEN * u64::from(BLOCK_TOKENS));
        let pages = (options.kv_bytes / counted).min(u64::from(u32::MAX)) as u32;
        if pages == 0 {
            return Err(LoadError::KvMemory { model, given: options.kv_bytes, needed: counted });
        }
        let bytes = u64::from(pages) * page_bytes;
        let region = if options.shared_memory { Region::shared } else { Region::anonymous };
        let region = region(bytes as usize).map_err(|source| LoadError::Memory { bytes, source })?;
        let facts = Facts {
            model,
            identity: KvIdentity { digest: "fake-1".into(), numerics: "fake-1".into() },
            form: KvForm {
                layout: "words".into(),
                element: "u64".into(),
                page_bytes: vec![page_bytes],
                shards: 1,
            },
            vocab: ordinary.vocab(),
            context_tokens: CONTEXT_TOKENS,
            kv: vec![KvSpec {
                kind: KvKind::Full,
                heads: 1,
                key_width: 1,
                value_width: 1,
                element: tandem_models::Dtype::F32,
                window: None,
                state_bytes: 0,
            }],
            pages,
            depth: options.depth,
            kernel: "fake".into(),
        };
        let region = Arc::new(region);
        Ok(Fake {
            spec,
            ordinary,
            facts,
            region,
            slots: BTreeMap::new(),
            in_flight: VecDeque::new(),
            steps: 0,
        })
    }

    fn word_at(&self, pages: &[u32], position: u32) -> usize {
        let (block, row) = (position / BLOCK_TOKENS, position % BLOCK_TOKENS);
        (self.page_offset(0, pages[block as usize]) + WORD * u64::from(row)) as usize
    }

    fn run(&mut self, plan: Plan) -> Outcome {
        for slot in &plan.close {
            self.slots.remove(slot);
        }
        for open in plan.open {
            self.slots.insert(open.slot, Slot { open, last: None });
        }
        let rows = plan.rows.iter().map(|row| self.run_row(row)).collect();
        Outcome { id: plan.id, rows, took: Duration::ZERO }
    }

    fn run_row(&mut self, row: &Row) -> RowOutcome {
        let last = self.slots.get(&row.slot).and_then(|slot| slot.last);
        let tokens = match &row.input {
            Input::Known(tokens) => tokens.clone(),
            Input::Previous => vec![last.expect("a slot has drawn before it goes on from its draw")],
        };
        let pages = &row.pages[0];
        for (position, &token) in (row.start..).zip(&tokens) {
            let at = self.word_at(pages, position);
            // SAFETY: the page is this sequence's alone while the plan is in flight, and this thread runs it.
            let bytes = unsafe { self.region.slice_mut(at, WORD as usize) };
            bytes.copy_from_slice(&word(token, position).to_le_bytes());
        }
        let scored = row.score.as_ref().map(|wanted| self.score(row, wanted)).unwrap_or_default();
        let sampled = row.sample.then(|| self.sample(row));
        RowOutcome { slot: row.slot, count: row.count, sampled, scored }
    }

    /// The sequence's words up to the row's end, read back from its pages.
    fn words<'a>(&'a self, row: &'a Row) -> impl Iterator<Item = u64> + 'a {
        let end = row.start + row.count;
        row.pages[0].iter().enumerate().flat_map(move |(block, &page)| {
            let rows = (end - (block as u32 * BLOCK_TOKENS).min(end)).min(BLOCK_TOKENS) as usize;
            let at = self.page_offset(0, page) as usize;
            // SAFETY: nobody writes to pages of a plan in flight but the engine, which is here.
            let bytes = unsafe { self.region.slice(at, rows * WORD as usize) };
            let words = bytes.chunks_exact(WORD as usize);
            words.map(|word| u64::from_le_bytes(word.try_into().expect("eight bytes")))
        })
    }

    /// Scores tokens by all words before them.
    fn score(&self, row: &Row, wanted: &Score) -> Vec<Sampled> {
        let mut words = self.words(row);
        let mut fold = Fold::default();
        words.by_ref().take(wanted.first as usize).for_each(|word| fold.add(word));
        let targets = (wanted.first..).zip(&wanted.targets);
        let scored = targets.map(|(position, &token)| {
            let scored = score(&self.ordinary, fold, position, token, wanted.top);
            words.next().into_iter().for_each(|word| fold.add(word));
            scored
        });
        scored.collect()
    }

    /// Reads every word of the sequence back and draws what follows from them.
    fn sample(&mut self, row: &Row) -> Sampled {
        let end = row.start + row.count;
        let mut fold = Fold::default();
        self.words(row).for_each(|word| fold.add(word));
        let slot = self.slots.get_mut(&row.slot).expect("rows name open slots");
        let open = &slot.open;
        let output = end.saturating_sub(open.prompt_tokens);
        let suppressed = if output < open.min_tokens { open.stop_suppress.as_slice() } else { &[] };
        let sampled = draw(&self.ordinary, fold, end, &open.sampling, open.choice, suppressed);
        slot.last = Some(sampled.token);
        sampled
    }

    /// What the step takes by the curve.
    fn time(&self, plan: &Plan) -> Duration {
        let prompt_of = |row: &Row| {
            let opened = plan.open.iter().find(|open| open.slot == row.slot);
            opened
                .or_else(|| self.slots.get(&row.slot).map(|slot| &slot.open))
                .map_or(0, |open| open.prompt_tokens)
        };
        let ends_a_prompt = plan.rows.iter().any(|row| row.sample && row.start < prompt_of(row));
        self.spec.step_time(&plan.rows, ends_a_prompt)
    }
}

impl Engine for Fake {
    fn facts(&self) -> &Facts {
        &self.facts
    }

    fn kv_region(&self) -> Arc<Region> {
        self.region.clone()
    }

    fn page_offset(&self, _: u32, page: u32) -> u64 {
        u64::from(page) * self.facts.form.page_bytes[0]
    }

    fn submit(&mut self, plan: Plan, now: Time) {
        let (in_flight, depth) = (self.in_flight.len(), self.facts.depth);
        assert!(in_flight <= depth as usize, "{in_flight} steps in flight at depth {depth}");
        let time = self.time(&plan);
        let begin = self.in_flight.back().map_or(now, |flight| flight.ready.max(now));
        self.steps += 1;
        let fails = chance(self.spec.seed ^ 1, self.steps, self.spec.fail);
        let hangs = chance(self.spec.seed ^ 2, self.steps, self.spec.hang);
        let id = plan.id;
        let outcome = self.run(plan);
        let outcome = if fails {
            Err(StepError { plan: id, reason: "the fake engine was told to fail".into() })
        } else {
            Ok(Outcome { took: time, ..outcome })
        };
        self.in_flight.push_back(Flight { outcome, ready: if hangs { Time::MAX } else { begin + time } });
    }

    fn collect(&mut self, now: Time) -> Option<Result<Outcome, StepError>> {
        self.in_flight.front().filter(|flight| flight.ready <= now && flight.ready != Time::MAX)?;
        self.in_flight.pop_front().map(|flight| flight.outcome)
    }

    fn in_flight(&self) -> usize {
        self.in_flight.len()
    }

    fn ready_at(&self) -> Option<Time> {
        self.in_flight.front().map(|flight| flight.ready)
    }

    fn expected(&self, plan: &Plan) -> Duration {
        self.time(plan)
    }

    fn zero_tail(&mut self, _: u32, page: u32, rows: u32) {
        let (start, bytes) = (self.page_offset(0, page), self.facts.form.page_bytes[0]);
        let kept = WORD * u64::from(rows);
        // SAFETY: no plan in flight names the page: its sequence has just been collected for the last time.
        unsafe { self.region.slice_mut((start + kept) as usize, (bytes - kept) as usize) }.fill(0);
    }
}

#[cfg(test)]
mod tests;
