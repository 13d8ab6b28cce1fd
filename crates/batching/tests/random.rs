//! Random loads through the batcher and a toy engine whose tokens depend on what its pages hold: every sequence
//! gets exactly its oracle's tokens, plans keep to their budgets, nothing leaks, and everybody gets on.

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use proptest::prelude::*;
use tandem_batching::{
    Batcher, Config, Event, Input, Origin, Outcome, Plan, RowOutcome, SequenceId, SequenceSpec,
};
use tandem_kv_cache::{KvCache, chain_seed};
use tandem_types::{
    Choice, FinishReason, KvIdentity, Sampled, SamplingParams, ServiceClass, StopRules, Time, TokenId, Until,
};

const VOCAB: u64 = 97;
const EOS: TokenId = 96;

/// The token that follows these; never the end unless `ends` says so.
fn next(tokens: &[TokenId]) -> TokenId {
    let fold = tokens
        .iter()
        .fold(7u64, |h, &t| (h.rotate_left(9) ^ u64::from(t)).wrapping_mul(0x9e37_79b9_7f4a_7c15));
    ((fold >> 32) % VOCAB) as TokenId
}

/// What a sequence must say, from its prompt alone.
fn oracle(prompt: &[TokenId], stop: &StopRules) -> (Vec<TokenId>, FinishReason) {
    let mut tokens = prompt.to_vec();
    loop {
        let token = next(&tokens);
        tokens.push(token);
        let drawn = tokens.len() - prompt.len();
        if stop.eos.contains(&token) {
            return (tokens.split_off(prompt.len()), FinishReason::Eos);
        }
        if drawn as u32 >= stop.max_tokens {
            return (tokens.split_off(prompt.len()), FinishReason::Length);
        }
    }
}

/// Pages of tokens, slots with their last draws, and steps in flight.
#[derive(Default)]
struct Engine {
    pages: BTreeMap<(u32, u32), TokenId>,
    last: BTreeMap<u32, TokenId>,
    in_flight: VecDeque<Outcome>,
}

impl Engine {
    fn submit(&mut self, plan: &Plan) {
        for slot in &plan.close {
            assert!(self.last.remove(slot).is_some(), "a closed slot was open");
        }
        for open in &plan.open {
            assert!(self.last.insert(open.slot, TokenId::MAX).is_none(), "an opened slot was free");
        }
        let rows = plan.rows.iter().map(|row| {
            let tokens = match &row.input {
                Input::Known(tokens) => tokens.clone(),
                Input::Previous => vec![self.last[&row.slot]],
            };
            assert_eq!(tokens.len(), row.count as usize);
            for (position, token) in (row.start..).zip(tokens) {
                let page = row.pages[0][(position / 32) as usize];
                self.pages.insert((page, position % 32), token);
            }
            let sampled = row.sample.then(|| {
                let end = row.start + row.count;
                let read: Vec<TokenId> =
                    (0..end).map(|p| self.pages[&(row.pages[0][(p / 32) as usize], p % 32)]).collect();
                let token = next(&read);
                self.last.insert(row.slot, token);
                Sampled { token, ..Sampled::default() }
            });
            RowOutcome { slot: row.slot, count: row.count, sampled }
        });
        let rows = rows.collect();
        self.in_flight.push_back(Outcome { id: plan.id, rows, took: Duration::ZERO });
    }
}

#[derive(Clone, Debug)]
struct Job {
    family: u32,
    prompt: u32,
    max_tokens: u32,
    ends: bool,
    hand_off: bool,
    arrives: u32,
    cancelled_at: Option<u32>,
    paused_at: Option<u32>,
}

fn job() -> impl Strategy<Value = Job> {
    (
        0..3u32,
        1..150u32,
        1..60u32,
        any::<bool>(),
        prop::bool::weighted(0.2),
        0..40u32,
        prop::option::weighted(0.2, 0..80u32),
        prop::option::weighted(0.2, 0..60u32),
    )
        .prop_map(|(family, prompt, max_tokens, ends, hand_off, arrives, cancelled_at, paused_at)| Job {
            family,
            prompt,
            max_tokens,
            ends,
            hand_off,
            arrives,
            cancelled_at,
            paused_at,
        })
}

impl Job {
    fn spec(&self, id: u64, drawn: &[TokenId]) -> SequenceSpec {
        let prompt = self.tokens();
        let prompt_tokens = prompt.len() as u32;
        SequenceSpec {
            id: SequenceId(id),
            tokens: prompt.into_iter().chain(drawn.iter().copied()).collect(),
            prompt_tokens,
            until: if self.hand_off { Until::FirstToken } else { Until::End },
            sampling: SamplingParams::default(),
            choice: Choice(0),
            stop: self.stop(),
            class: ServiceClass::Online,
            arrived: Time(u64::from(self.arrives)),
            seed: chain_seed(&KvIdentity::default(), true, b"", ""),
        }
    }

    fn tokens(&self) -> Vec<TokenId> {
        (0..self.prompt).map(|t| (t * 7 + self.family) % 90).collect()
    }

    fn stop(&self) -> StopRules {
        let eos = if self.ends { vec![EOS] } else { vec![] };
        StopRules { max_tokens: self.max_tokens, min_tokens: 0, eos, stop_token_ids: vec![] }
    }
}

fn drive(jobs: Vec<Job>, pages: u32, budget: u32, rows_max: u32, depth: u32) {
    let mut kv = KvCache::new(tandem_kv_cache::Config {
        pages,
        groups: 1,
        leased_share: 0.5,
        lease_time_to_live: Duration::from_secs(10),
        prefix_cache: true,
    });
    let config = Config { token_budget: budget, rows_max, depth, ..Config::default() };
    let mut batcher = Batcher::new(config);
    let mut engine = Engine::default();
    // Ids change with every re-adding; this maps them to jobs.
    let mut job_of: BTreeMap<u64, usize> = BTreeMap::new();
    let mut drawn: Vec<Vec<TokenId>> = vec![Vec::new(); jobs.len()];
    let mut left: Vec<Option<Event>> = vec![None; jobs.len()];
    let mut gone = vec![false; jobs.len()];
    let mut next_id = 0;
    let mut idle = 0;
    for turn in 0.. {
        assert!(turn < 20_000, "everybody gets on");
        let now = Time(turn);
        for (index, job) in jobs.iter().enumerate() {
            if u64::from(job.arrives) == turn {
                batcher.add(job.spec(next_id, &[]), Origin::Fresh);
                job_of.insert(next_id, index);
                next_id += 1;
            }
            let live = job_of.iter().find(|(_, i)| **i == index).map(|(id, _)| SequenceId(*id));
            let Some(live) = live else { continue };
            if job.cancelled_at.is_some_and(|at| u64::from(at) == turn) && batcher.cancel(live, &mut kv, now)
            {
                job_of.remove(&live.0);
                gone[index] = true;
            }
            if job.paused_at.is_some_and(|at| u64::from(at) == turn) {
                batcher.pause(live);
            }
            if job.paused_at.is_some_and(|at| u64::from(at) + 20 == turn) {
                batcher.resume(live);
            }
        }
        if let Some(plan) = batcher.plan(&mut kv, now) {
            let tokens: u32 = plan.rows.iter().map(|row| row.count).sum();
            assert!(tokens <= budget && plan.rows.len() <= rows_max as usize, "within its budgets");
            engine.submit(&plan);
            assert!(engine.in_flight.len() <= depth as usize + 1);
            idle = 0;
        } else {
            idle += 1;
        }
        // The device is as far behind as it may be.
        if engine.in_flight.len() > depth as usize || idle > 0 {
            if let Some(outcome) = engine.in_flight.pop_front() {
                batcher.apply(&mut kv, outcome, now);
                idle = 0;
            }
        }
        for event in batcher.take_events() {
            match event {
                Event::Token { id, position, sampled } => {
                    let index = job_of[&id.0];
                    assert_eq!(position as usize, drawn[index].len(), "in order, each once");
                    drawn[index].push(sampled.token);
                }
                Event::Preempted { id } => {
                    let index = job_of.remove(&id.0).expect("it was here");
                    batcher.add(jobs[index].spec(next_id, &drawn[index]), Origin::Fresh);
                    job_of.insert(next_id, index);
                    next_id += 1;
                }
                Event::Finished { id, .. } | Event::Rejected { id } | Event::Failed { id } => {
                    let index = job_of.remove(&id.0).expect("it was here");
                    assert!(left[index].replace(event).is_none(), "one last word each");
                }
                Event::Admitted { .. } | Event::Computed { .. } => {}
            }
        }
        kv.check_books();
        if idle > 100 && engine.in_flight.is_empty() {
            break;
        }
    }
    assert_eq!((batcher.running(), batcher.waiting()), (0, 0), "nobody is stuck");
    assert_eq!(kv.counts().in_use, 0, "nothing leaks");
    for (index, job) in jobs.iter().enumerate().filter(|(index, _)| !gone[*index]) {
        let (expected, reason) = oracle(&job.tokens(), &job.stop());
        match left[index].as_ref().expect("a last word") {
            Event::Finished { reason: None, .. } => {
                assert!(job.hand_off);
                assert_eq!(drawn[index], expected[..1]);
            }
            Event::Finished { reason: Some(given), usage, .. } => {
                // A pool that cannot hold it alone ends it early, by its length.
                let cut = *given == FinishReason::Length && drawn[index].len() < expected.len();
                assert_eq!(drawn[index], expected[..drawn[index].len()]);
                assert_eq!(usage.output_tokens as usize, drawn[index].len());
                if cut {
                    let needed = (job.prompt as usize + drawn[index].len()).div_ceil(32);
                    assert!(needed >= pages as usize, "{needed} of {pages} pages");
                } else if !job.hand_off {
                    assert_eq!((*given, drawn[index].len()), (reason, expected.len()));
                }
            }
            Event::Rejected { .. } => assert!(job.prompt.div_ceil(32) > pages),
            other => panic!("{other:?}"),
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, ..ProptestConfig::default() })]

    #[test]
    fn every_sequence_says_what_its_oracle_says_and_nothing_is_left(
        jobs in prop::collection::vec(job(), 1..14),
        pages in 3..30u32,
        budget in 1..80u32,
        rows_max in 1..9u32,
        depth in 0..2u32,
    ) {
        drive(jobs, pages, budget, rows_max, depth);
    }
}
