//! The engine under the real batcher and KV bookkeeping: many sequences, a warm prefix cache, a pool too small for
//! all. The answers are those of the reference and do not change.

mod support;

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Duration;

use support::{Reference, checkpoint, checkpoints};
use tandem_batching::{Batcher, Config, Event, Origin, SequenceId, SequenceSpec};
use tandem_engine::{DecoderEngine, Dtype, Engine, Options};
use tandem_kv_cache::{KvCache, chain_seed};
use tandem_types::{
    BLOCK_TOKENS, Choice, Sampled, SamplingParams, ServiceClass, StopRules, Time, TokenId, Until,
};

struct Worker {
    engine: DecoderEngine,
    kv: KvCache,
    config: Config,
    cached: u32,
    preempted: u32,
    /// Take sequences out after every seventh token or so, and add them again.
    interrupts: bool,
}

#[derive(Clone)]
struct Ask {
    prompt: Vec<TokenId>,
    max_tokens: u32,
    sampling: SamplingParams,
}

impl Worker {
    fn new(dir: &Path, dtype: Dtype, pages: u32, depth: u32, threads: usize, token_budget: u32) -> Worker {
        let load = |kv_bytes| {
            let options = Options { dtype, kv_bytes, depth, threads, ..Options::default() };
            DecoderEngine::load(dir, options).unwrap()
        };
        let page_bytes = load(8 << 20).facts().form.page_bytes[0];
        let engine = load(page_bytes * u64::from(pages));
        assert_eq!(engine.facts().pages, pages);
        let kv = KvCache::new(tandem_kv_cache::Config {
            pages,
            groups: 1,
            leased_share: 0.5,
            lease_time_to_live: Duration::from_secs(10),
            prefix_cache: true,
        });
        let context_tokens = engine.facts().context_tokens;
        // Nothing is kept free for growth: these pools are to run out.
        let config = Config { depth, token_budget, context_tokens, answer_tokens: 0, ..Config::default() };
        Worker { engine, kv, config, cached: 0, preempted: 0, interrupts: false }
    }

    /// Runs all to their ends; preempted ones are added again with what they have.
    fn run(&mut self, asks: &[Ask]) -> Vec<Vec<Sampled>> {
        let mut batcher = Batcher::new(self.config.clone());
        let identity = self.engine.facts().identity.clone();
        let spec = |ask: usize, id: u64, output: &[Sampled]| SequenceSpec {
            id: SequenceId(id),
            tokens: asks[ask]
                .prompt
                .iter()
                .copied()
                .chain(output.iter().map(|sampled| sampled.token))
                .collect(),
            prompt_tokens: asks[ask].prompt.len() as u32,
            until: Until::End,
            sampling: asks[ask].sampling.clone(),
            choice: Choice(0),
            stop: StopRules { max_tokens: asks[ask].max_tokens, ..StopRules::default() },
            class: ServiceClass::Online,
            arrived: Time(ask as u64),
            seed: chain_seed(&identity, true, b"", ""),
            score: None,
        };
        let mut outputs = vec![Vec::new(); asks.len()];
        let mut names: BTreeMap<SequenceId, usize> = BTreeMap::new();
        let mut ids = 0;
        for ask in 0..asks.len() {
            batcher.add(spec(ask, ids, &[]), Origin::Fresh);
            names.insert(SequenceId(ids), ask);
            ids += 1;
        }
        let now = Time::ZERO;
        let mut finished = 0;
        while finished < asks.len() {
            while let Some(plan) = batcher.plan(&mut self.kv, now) {
                self.engine.submit(plan, now);
            }
            let outcome = self.engine.collect(now).expect("unfinished sequences have a step to run");
            batcher.apply(&mut self.kv, outcome.unwrap_or_else(|error| panic!("{error}")), now);
            for event in batcher.take_events() {
                match event {
                    Event::Admitted { cached_tokens, .. } => self.cached += cached_tokens,
                    Event::Computed { .. } | Event::Scored { .. } => {}
                    Event::Token { id, position, sampled } => {
                        let output: &mut Vec<Sampled> = &mut outputs[names[&id]];
                        assert_eq!(position as usize, output.len());
                        output.push(sampled);
                        let interrupt = self.interrupts && output.len() % 7 == 3;
                        if interrupt && batcher.cancel(id, &mut self.kv, now) {
                            self.preempted += 1;
                            let ask = names[&id];
                            batcher.add(spec(ask, ids, &outputs[ask]), Origin::Fresh);
                            names.insert(SequenceId(ids), ask);
                            ids += 1;
                        }
                    }
                    Event::Finished { .. } => finished += 1,
                    Event::Preempted { id } => {
                        self.preempted += 1;
                        let ask = names[&id];
                        batcher.add(spec(ask, ids, &outputs[ask]), Origin::Fresh);
                        names.insert(SequenceId(ids), ask);
                        ids += 1;
                    }
                    Event::Rejected { id } | Event::Failed { id } => panic!("{id:?} did not run"),
                }
            }
        }
        while let Some(outcome) = self.engine.collect(now) {
            batcher.apply(&mut self.kv, outcome.unwrap(), now);
        }
        self.kv.check_books();
        outputs
    }
}

fn asks(reference: &Reference) -> Vec<Ask> {
    let ask = |case: &support::Case| Ask {
        prompt: case.prompt.clone(),
        max_tokens: case.greedy.len() as u32,
        sampling: reference.sampling(),
    };
    reference.cases.iter().map(ask).collect()
}

fn expect_greedy(outputs: &[Vec<Sampled>], reference: &Reference, how: &str) {
    for (output, case) in outputs.iter().zip(&reference.cases) {
        assert_eq!(support::tokens(output), case.greedy, "{} {how}", case.name);
    }
}

#[test]
fn the_reference_s_greedy_tokens_come_out_of_one_batch_and_again_from_a_warm_prefix_cache() {
    for dir in checkpoints() {
        let reference = Reference::read(&dir);
        for depth in [0, 1] {
            let mut worker = Worker::new(&dir, Dtype::Float32, 200, depth, 2, 48);
            expect_greedy(&worker.run(&asks(&reference)), &reference, "cold");
            let cold = worker.cached;
            expect_greedy(&worker.run(&asks(&reference)), &reference, "warm");
            let longest = reference.cases.iter().map(|case| case.prompt.len()).max().unwrap() as u32;
            assert!(worker.cached >= cold + (longest - 1) / BLOCK_TOKENS * BLOCK_TOKENS, "the cache was hit");
        }
    }
}

#[test]
fn preempted_sequences_draw_the_same_tokens() {
    for name in ["qwen2", "qwen3", "llama"] {
        let dir = checkpoint(name);
        let reference = Reference::read(&dir);
        for depth in [0, 1] {
            // Taken out again and again, as preemption does it.
            let mut worker = Worker::new(&dir, Dtype::Float32, 60, depth, 1, 64);
            worker.interrupts = true;
            expect_greedy(&worker.run(&asks(&reference)), &reference, "taken out and added again");
            assert!(worker.preempted as usize >= 3 * reference.cases.len());
            assert_eq!(worker.kv.counts().in_use, 0);
        }
        // Taken out because there is no room: long answers, which begin with the reference's.
        let long: Vec<Ask> = asks(&reference).into_iter().map(|ask| Ask { max_tokens: 120, ..ask }).collect();
        let expected = Worker::new(&dir, Dtype::Float32, 200, 0, 1, 64).run(&long);
        let begins: Vec<Vec<Sampled>> = expected.iter().map(|output| output[..24].to_vec()).collect();
        expect_greedy(&begins, &reference, "at first");
        let mut worker = Worker::new(&dir, Dtype::Float32, 15, 0, 1, 64);
        let again: Vec<Ask> = long.iter().chain(&long).cloned().collect();
        let outputs = worker.run(&again);
        assert!(worker.preempted > 0, "the pool is too small for all");
        assert!(outputs[..long.len()] == expected && outputs[long.len()..] == expected, "{name}");
    }
}

#[test]
fn seeded_draws_have_the_same_bits_in_a_large_pool_and_in_one_that_preempts() {
    let dir = checkpoint("qwen3-s27");
    for dtype in [Dtype::Float32, Dtype::Bfloat16] {
        let asks: Vec<Ask> = (0..9_u32)
            .map(|at| Ask {
                prompt: (0..10 + at * 9).map(|token| (token * 13 + at * 7) % 380).collect(),
                max_tokens: 60,
                sampling: SamplingParams {
                    temperature: 1.0,
                    top_p: 0.9,
                    frequency_penalty: 0.3,
                    repetition_penalty: 1.05,
                    seed: u64::from(at),
                    logprobs: Some(2),
                    ..SamplingParams::default()
                },
            })
            .collect();
        let mut large = Worker::new(&dir, dtype, 300, 0, 1, 512);
        let expected = large.run(&asks);
        assert_eq!(large.preempted, 0);
        let mut small = Worker::new(&dir, dtype, 9, 1, 3, 40);
        assert_eq!(small.run(&asks), expected, "{dtype}");
        assert!(small.preempted > 0, "the small pool preempts");
    }
}
