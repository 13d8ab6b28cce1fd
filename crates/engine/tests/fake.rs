//! The fake engine under the real batcher and KV bookkeeping, in virtual time: every token is what the oracle says
//! of the prompt alone, and what happens to a page shows.

mod support;

use std::collections::BTreeMap;
use std::time::Duration;

use proptest::prelude::*;
use tandem_batching::{Batcher, Config, Event, Origin, Scoring, SequenceId, SequenceSpec};
use tandem_engine::fake::{CONTEXT_TOKENS, FakeSpec, Ordinary, fake, oracle, oracle_scores};
use tandem_engine::{Engine, LoadError, Options};
use tandem_kv_cache::{KvCache, chain_seed};
use tandem_types::{
    BLOCK_TOKENS, Choice, Sampled, SamplingParams, ServiceClass, StopRules, Time, TokenId, Until, blocks_for,
};

const MODEL: &str = "qwen3";
/// KV memory of one page: 32 tokens of one kibibyte.
const PAGE: u64 = 32 << 10;

fn engine(spec: &str, pages: u32, depth: u32) -> Box<dyn Engine> {
    let options = Options { kv_bytes: u64::from(pages) * PAGE, depth, ..Options::default() };
    fake(spec.parse().unwrap(), &support::checkpoint(MODEL), options).unwrap_or_else(|e| panic!("{e}"))
}

fn ordinary() -> Ordinary {
    Ordinary::read(&support::checkpoint(MODEL)).unwrap()
}

#[derive(Clone, Debug)]
struct Ask {
    prompt: Vec<TokenId>,
    max_tokens: u32,
    sampling: SamplingParams,
    choice: Choice,
    /// Score the prompt, with so many of the likeliest tokens.
    score: Option<u32>,
}

impl Ask {
    fn of(family: u32, length: u32, max_tokens: u32) -> Ask {
        let prompt = (0..length).map(|at| (at * at * 5 + at * 3 + family * 11) % 300).collect();
        Ask { prompt, max_tokens, sampling: SamplingParams::default(), choice: Choice(0), score: None }
    }

    fn expected(&self) -> Vec<TokenId> {
        oracle(&ordinary(), &self.prompt, &self.sampling, self.choice, self.max_tokens as usize)
    }
}

/// An engine with its batcher and books, driven in virtual time.
struct Worker {
    engine: Box<dyn Engine>,
    batcher: Batcher,
    kv: KvCache,
    now: Time,
    asks: Vec<Ask>,
    outputs: Vec<Vec<TokenId>>,
    /// Of each prompt's tokens from the second on.
    scores: Vec<Vec<Sampled>>,
    /// When each token came.
    times: Vec<Vec<Time>>,
    names: BTreeMap<SequenceId, usize>,
    next_id: u64,
    cached: u32,
    preempted: u32,
    failed: u32,
    steps: u32,
}

impl Worker {
    fn new(spec: &str, pages: u32, depth: u32, token_budget: u32) -> Worker {
        let engine = engine(spec, pages, depth);
        let facts = engine.facts();
        let pages = facts.pages;
        // Nothing is kept free for growth: these pools are to run out.
        let config = Config {
            token_budget,
            depth,
            context_tokens: facts.context_tokens,
            answer_tokens: 0,
            ..Config::default()
        };
        let kv = KvCache::new(tandem_kv_cache::Config {
            pages,
            groups: 1,
            leased_share: 0.5,
            lease_time_to_live: Duration::from_secs(10),
            prefix_cache: true,
        });
        Worker {
            engine,
            batcher: Batcher::new(config),
            kv,
            now: Time::ZERO,
            asks: Vec::new(),
            outputs: Vec::new(),
            scores: Vec::new(),
            times: Vec::new(),
            names: BTreeMap::new(),
            next_id: 0,
            cached: 0,
            preempted: 0,
            failed: 0,
            steps: 0,
        }
    }

    fn ask(&mut self, ask: Ask) -> usize {
        self.asks.push(ask);
        self.outputs.push(Vec::new());
        self.scores.push(Vec::new());
        self.times.push(Vec::new());
        self.add(self.asks.len() - 1, None);
        self.asks.len() - 1
    }

    /// The ask as a new sequence, with the tokens it has; `computed` of them came with a table.
    fn add(&mut self, at: usize, computed: Option<Origin>) -> SequenceId {
        let ask = &self.asks[at];
        let id = SequenceId(self.next_id);
        self.next_id += 1;
        let spec = SequenceSpec {
            id,
            tokens: ask.prompt.iter().chain(&self.outputs[at]).copied().collect(),
            prompt_tokens: ask.prompt.len() as u32,
            until: Until::End,
            sampling: ask.sampling.clone(),
            choice: ask.choice,
            stop: StopRules { max_tokens: ask.max_tokens, ..StopRules::default() },
            class: ServiceClass::Online,
            arrived: Time(at as u64),
            seed: chain_seed(&self.engine.facts().identity, true, b"", ""),
            score: ask.score.map(|top| Scoring { from: self.scores[at].len() as u32 + 1, top }),
        };
        self.batcher.add(spec, computed.unwrap_or(Origin::Fresh));
        self.names.insert(id, at);
        id
    }

    /// One step planned if it may be, one collected if it must be. False when there is nothing to do.
    fn turn(&mut self) -> bool {
        let room = self.engine.in_flight() <= self.engine.facts().depth as usize;
        let plan = if room { self.batcher.plan(&mut self.kv, self.now) } else { None };
        let planned = plan.is_some();
        if let Some(plan) = plan {
            let expected = self.engine.expected(&plan);
            let begin = self.engine.ready_at().unwrap_or(self.now).max(self.now);
            self.engine.submit(plan, self.now);
            self.steps += 1;
            if self.engine.in_flight() == 1 {
                assert_eq!(self.engine.ready_at(), Some(begin + expected), "it takes what it says");
            }
        }
        self.take_events();
        if planned && self.engine.in_flight() <= self.engine.facts().depth as usize {
            return true;
        }
        let Some(ready) = self.engine.ready_at() else { return planned };
        if ready > self.now {
            assert!(self.engine.collect(Time(ready.0 - 1)).is_none(), "not before its time");
            self.now = ready;
        }
        match self.engine.collect(self.now).expect("its time has come") {
            Ok(outcome) => self.batcher.apply(&mut self.kv, outcome, self.now),
            Err(error) => self.batcher.fail(&mut self.kv, error.plan, self.now),
        }
        self.take_events();
        true
    }

    fn take_events(&mut self) {
        for event in self.batcher.take_events() {
            match event {
                Event::Admitted { cached_tokens, .. } => self.cached += cached_tokens,
                Event::Token { id, position, sampled } => {
                    let at = self.names[&id];
                    assert_eq!(position as usize, self.outputs[at].len());
                    self.outputs[at].push(sampled.token);
                    self.times[at].push(self.now);
                }
                Event::Preempted { id } | Event::Failed { id } => {
                    let counter = if matches!(event, Event::Failed { .. }) {
                        &mut self.failed
                    } else {
                        &mut self.preempted
                    };
                    *counter += 1;
                    self.add(self.names[&id], None);
                }
                Event::Scored { id, position, scores } => {
                    let known = &mut self.scores[self.names[&id]];
                    assert_eq!(position as usize, known.len() + 1);
                    known.extend(scores);
                }
                Event::Computed { .. } | Event::Finished { .. } => {}
                Event::Rejected { id } => panic!("{id:?} was rejected"),
            }
        }
    }

    fn run(&mut self) {
        while self.turn() {}
        self.kv.check_books();
        self.batcher.check_books();
        assert_eq!((self.batcher.running(), self.batcher.waiting()), (0, 0));
        assert_eq!(self.kv.counts().in_use, 0);
    }

    /// Until each ask has at least so many tokens.
    fn run_to(&mut self, tokens: usize) {
        while self.outputs.iter().any(|output| output.len() < tokens) {
            assert!(self.turn());
        }
    }

    fn expect_oracle(&self) {
        for (ask, output) in self.asks.iter().zip(&self.outputs) {
            assert_eq!(output, &ask.expected());
        }
        for (ask, scores) in self.asks.iter().zip(&self.scores) {
            let expected = ask.score.map(|top| oracle_scores(&ordinary(), &ask.prompt, top));
            assert_eq!(scores, &expected.unwrap_or_default());
        }
    }

    /// Adds one to a byte of the word at this position of the ask's KV.
    fn corrupt(&mut self, at: usize, position: u32) {
        let id = *self.names.iter().rfind(|(_, name)| **name == at).expect("it was added").0;
        let table = self.batcher.table(id).expect("it is running");
        let page = table.pages(0)[(position / BLOCK_TOKENS) as usize].page;
        let offset = self.engine.page_offset(0, page) + u64::from(position % BLOCK_TOKENS) * 8;
        let region = self.engine.kv_region();
        // SAFETY: nothing is in flight, and nobody else knows the region.
        let byte = unsafe { &mut region.slice_mut(offset as usize, 1)[0] };
        *byte = byte.wrapping_add(1);
    }
}

#[test]
fn chunks_prefix_hits_and_depth_do_not_change_a_token() {
    for depth in [0, 1] {
        for token_budget in [7, 32, 512] {
            let mut worker = Worker::new("zero", 100, depth, token_budget);
            for length in [1, 31, 32, 33, 100] {
                worker.ask(Ask::of(1, length, 40));
                worker.ask(Ask::of(2, length, 3));
            }
            worker.run();
            let cold = worker.cached;
            worker.ask(Ask::of(1, 100, 40));
            worker.run();
            assert_eq!(worker.cached, cold + 96, "the prompt of before is cached");
            worker.expect_oracle();
        }
    }
}

#[test]
fn a_pool_too_small_for_all_preempts_and_says_the_same() {
    for depth in [0, 1] {
        let mut worker = Worker::new("zero", 9, depth, 40);
        for family in 0..6 {
            worker.ask(Ask::of(family, 10 + family, 90));
        }
        worker.run();
        assert!(worker.preempted > 0);
        worker.expect_oracle();
    }
}

#[test]
fn one_changed_word_changes_what_follows_of_that_sequence_and_of_no_other() {
    for position in [0, 31, 32, 77, 80] {
        let mut worker = Worker::new("zero", 50, 0, 512);
        let spoiled = worker.ask(Ask::of(1, 80, 40));
        let other = worker.ask(Ask::of(2, 80, 40));
        worker.run_to(10);
        let good = worker.outputs[spoiled].len();
        worker.corrupt(spoiled, position);
        worker.run();
        let expected = worker.asks[spoiled].expected();
        assert_eq!(worker.outputs[spoiled][..good], expected[..good]);
        assert_ne!(worker.outputs[spoiled][good..], expected[good..], "word {position}");
        assert_eq!(worker.outputs[other], worker.asks[other].expected());
    }
}

#[test]
fn scores_are_read_back_from_pages_and_those_of_greedy_tokens_are_what_their_draws_reported() {
    let text = Ask::of(1, 90, 1).prompt;
    let scores = |changed: Option<u32>| {
        // A chunk at a time, so that there is something to change.
        let mut worker = Worker::new("zero", 50, 0, 30);
        let at = worker.ask(Ask { score: Some(3), ..Ask::of(1, 90, 1) });
        while worker.scores[at].len() < 60 {
            assert!(worker.turn());
        }
        changed.into_iter().for_each(|position| worker.corrupt(at, position));
        worker.run();
        worker.scores.remove(at)
    };
    let good = oracle_scores(&ordinary(), &text, 3);
    assert_eq!(scores(None), good);
    let bad = scores(Some(40));
    assert_eq!(bad[..60], good[..60], "scored before");
    assert!(bad[60..].iter().zip(&good[60..]).all(|(bad, good)| bad != good));

    let greedy = Ask {
        sampling: SamplingParams { logprobs: Some(3), ..SamplingParams::default() },
        ..Ask::of(1, 90, 20)
    };
    let whole: Vec<TokenId> = text.iter().copied().chain(greedy.expected()).collect();
    for scored in &oracle_scores(&ordinary(), &whole, 3)[89..] {
        assert_eq!(scored.top[0], (scored.token, scored.logprob.unwrap()));
    }
}

#[test]
fn pages_copied_to_another_worker_go_on_there_and_a_torn_copy_shows() {
    // The last page has six words.
    for (copied_last, same) in [(48, true), (40, false), (0, false)] {
        let mut from = Worker::new("zero", 20, 0, 512);
        from.ask(Ask::of(1, 70, 30));
        from.run_to(1);
        let mut to = Worker::new("zero", 20, 1, 512);
        to.asks = from.asks.clone();
        to.outputs = vec![from.outputs[0][..1].to_vec()];
        to.times = vec![vec![Time::ZERO]];
        let (table, cached) = to.kv.open(&[], 70, 71, Time::ZERO).unwrap();
        assert_eq!(cached, 0);
        let source = from.batcher.table(SequenceId(0)).unwrap().pages(0)[..blocks_for(70) as usize].to_vec();
        for (block, (source, target)) in source.iter().zip(table.pages(0)).enumerate() {
            let bytes = if block == 2 { copied_last } else { 256 };
            let [source, target] =
                [from.engine.page_offset(0, source.page), to.engine.page_offset(0, target.page)];
            // SAFETY: nothing is in flight in either.
            unsafe {
                let target = to.engine.kv_region().slice_mut(target as usize, bytes).as_mut_ptr();
                target.copy_from(from.engine.kv_region().slice(source as usize, bytes).as_ptr(), bytes);
            }
        }
        to.add(0, Some(Origin::Computed { table, computed: 70 }));
        to.run();
        assert_eq!(to.outputs[0] == to.asks[0].expected(), same, "{copied_last} bytes of the last page");
    }
}

#[test]
fn a_page_handed_out_holds_nothing_beyond_its_rows() {
    let mut worker = Worker::new("zero,page-bytes=512", 64, 0, 512);
    worker.ask(Ask::of(1, 40, 20));
    worker.run_to(10);
    let page = worker.batcher.table(SequenceId(0)).unwrap().pages(0)[1].page;
    worker.engine.zero_tail(0, page, 5);
    let region = worker.engine.kv_region();
    // SAFETY: nothing is in flight.
    let bytes = unsafe { region.slice(worker.engine.page_offset(0, page) as usize, 512) };
    assert!(bytes[..40].chunks(8).all(|word| word.iter().any(|byte| *byte != 0)), "its rows stay");
    assert!(bytes[40..].iter().all(|byte| *byte == 0));
}

#[test]
fn paced_tokens_come_at_their_pace() {
    for (spec, first, next) in [("paced:50ms,5ms", 50, 5), ("paced:50ms,5ms,slow=2", 100, 10), ("zero", 0, 0)]
    {
        let mut worker = Worker::new(spec, 50, 0, 512);
        worker.ask(Ask::of(1, 40, 4));
        worker.run();
        let expected: Vec<Time> = (0..4).map(|at| Time::from_millis(first + at * next)).collect();
        assert_eq!(worker.times[0], expected, "{spec}");
    }
}

#[test]
fn at_depth_one_a_step_begins_when_the_one_before_it_ends() {
    let mut worker = Worker::new("paced:50ms,5ms", 50, 1, 512);
    worker.ask(Ask::of(1, 40, 4));
    worker.run();
    let expected: Vec<Time> = (0..4).map(|at| Time::from_millis(50 + at * 5)).collect();
    assert_eq!(worker.times[0], expected);
}

#[test]
fn a_prompt_on_an_h200_takes_what_was_measured() {
    let mut worker = Worker::new("qwen3-8b@h200", 400, 0, 8192);
    worker.ask(Ask::of(1, 8192, 2));
    worker.run();
    let [first, second] = worker.times[0][..] else { panic!("two tokens") };
    assert!((first.as_secs_f64() / 0.2017 - 1.0).abs() < 0.06, "{first}");
    let next = second.since(first).as_secs_f64() * 1e3;
    assert!((5.0..5.5).contains(&next), "{next} ms");
}

#[test]
fn steps_fail_as_often_as_told_and_answers_stay_right() {
    let run = |spec: &str| {
        let mut worker = Worker::new(spec, 50, 1, 512);
        for family in 0..5 {
            worker.ask(Ask::of(family, 40, 60));
        }
        worker.run();
        worker.expect_oracle();
        (worker.failed, worker.steps)
    };
    let (failed, steps) = run("zero,fail=0.2,seed=3");
    assert!(failed > 0 && steps > 60);
    assert_eq!(run("zero,fail=0.2,seed=3"), (failed, steps), "the same seed fails the same steps");
    assert_ne!(run("zero,fail=0.2,seed=4"), (failed, steps));
    assert_eq!(run("zero").0, 0);
}

#[test]
fn facts_are_those_of_the_checkpoint_and_the_pool_is_counted_in_tokens() {
    let engine = engine("zero", 7, 1);
    let facts = engine.facts();
    assert_eq!((facts.pages, facts.depth), (7, 1));
    assert_eq!((facts.context_tokens, facts.vocab), (CONTEXT_TOKENS, ordinary().vocab()));
    assert_eq!(CONTEXT_TOKENS, 1 << 22);
    assert_eq!(facts.model, MODEL);
    assert!(facts.identity.digest.starts_with("fake"));
    assert_eq!(engine.kv_region().len() as u64, 7 * facts.form.page_bytes[0]);
    let padded = |kv_bytes| {
        let options = Options { kv_bytes, ..Options::default() };
        fake("page-bytes=4096".parse().unwrap(), &support::checkpoint(MODEL), options)
    };
    let engine = padded(3 * 4096 + 1).unwrap();
    assert_eq!((engine.facts().pages, engine.facts().form.page_bytes[0]), (3, 4096));
    assert!(matches!(padded(4095), Err(LoadError::KvMemory { needed: 4096, .. })));
}

#[test]
fn a_checkpoint_without_a_tokenizer_is_refused_by_the_file_s_name() {
    let refuse = |dir: &std::path::Path| match fake(FakeSpec::default(), dir, Options::default()) {
        Ok(_) => panic!("it was loaded"),
        Err(error) => error.to_string(),
    };
    let dir = std::env::temp_dir().join(format!("tandem-fake-{}", std::process::id()));
    assert!(refuse(&dir).contains("config.json"));
    std::fs::create_dir_all(&dir).unwrap();
    std::fs::write(dir.join("config.json"), "{\"vocab_size\": 10}").unwrap();
    assert!(refuse(&dir).contains("tokenizer.json"));
    std::fs::write(dir.join("tokenizer.json"), "{\"model\": ").unwrap();
    assert!(refuse(&dir).contains("tokenizer.json"));
    std::fs::write(dir.join("tokenizer.json"), "{\"model\": {\"vocab\": {\"a\": 30}}}").unwrap();
    assert!(refuse(&dir).contains("no ordinary tokens"));
    std::fs::remove_dir_all(&dir).unwrap();
}

fn ask() -> impl Strategy<Value = Ask> {
    let sampling = (prop_oneof![Just(0.0), Just(0.8f32)], any::<u64>());
    let score = prop_oneof![2 => Just(None), 1 => (0..4u32).prop_map(Some)];
    let length = (0..3u32, 1..120u32, 1..50u32);
    (length, 0..2u32, sampling, score).prop_map(|((family, length, max), choice, sampling, score)| Ask {
        score,
        sampling: SamplingParams { temperature: sampling.0, seed: sampling.1, ..SamplingParams::default() },
        choice: Choice(choice),
        ..Ask::of(family, length, max)
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(100))]

    #[test]
    fn under_any_load_every_token_is_the_oracle_s(
        asks in prop::collection::vec((ask(), 0..20u32), 1..10),
        pages in 6..30u32,
        depth in 0..2u32,
        token_budget in 1..80u32,
        fail in prop_oneof![Just(0.0), Just(0.05)],
        mode in prop_oneof![Just("zero"), Just("paced:9ms,2ms"), Just("qwen3-8b@h200")],
    ) {
        let mut worker = Worker::new(&format!("{mode},fail={fail}"), pages, depth, token_budget);
        for (ask, turns) in asks {
            worker.ask(ask);
            for _ in 0..turns {
                worker.turn();
            }
        }
        worker.run();
        worker.expect_oracle();
    }
}
