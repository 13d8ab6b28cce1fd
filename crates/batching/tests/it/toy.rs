//! A model of a few lines: the next token is a pure function of all tokens before it, read back from pages.
//!
//! The engine works when a step is collected, as late as any device may, and checks every plan it is given.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use tandem_batching::{Config, Input, Outcome, Plan, Row, RowOutcome, Score};
use tandem_types::{BLOCK_TOKENS, Sampled, StopRules, TokenId, blocks_for};

/// Token ids are below this; so small that stop tokens come up by themselves.
pub const VOCABULARY: u64 = 40;

/// What a token at a position leaves in KV.
fn word(token: TokenId, position: u32) -> u64 {
    mix((u64::from(token) + 1) << 32 | u64::from(position))
}

pub fn mix(mut x: u64) -> u64 {
    x = (x ^ (x >> 32)).wrapping_mul(0xd6e8_feb8_6659_fd93);
    x = (x ^ (x >> 32)).wrapping_mul(0xd6e8_feb8_6659_fd93);
    x ^ (x >> 32)
}

/// What follows these words, tokens that may not be drawn left out.
fn next(words: impl Iterator<Item = u64>, forbidden: &[TokenId]) -> TokenId {
    let state = words.fold(7, |state, word| mix(state ^ word).wrapping_add(1));
    let ranked = (0..).map(|rank| (mix(state.wrapping_add(rank)) % VOCABULARY) as TokenId);
    ranked.take(1000).find(|token| !forbidden.contains(token)).expect("few tokens are forbidden")
}

fn forbidden(stop: &StopRules, output: u32) -> Vec<TokenId> {
    let all = stop.eos.iter().chain(&stop.stop_token_ids).copied();
    if output < stop.min_tokens { all.collect() } else { Vec::new() }
}

/// The output for a prompt, by the rules alone; a sequence never grows beyond `longest` tokens.
pub fn oracle(prompt: &[TokenId], stop: &StopRules, longest: u32) -> Vec<TokenId> {
    let mut tokens = prompt.to_vec();
    while ((tokens.len() - prompt.len()) as u32) < stop.max_tokens && (tokens.len() as u32) < longest {
        let words = tokens.iter().enumerate().map(|(at, &token)| word(token, at as u32));
        let token = next(words, &forbidden(stop, (tokens.len() - prompt.len()) as u32));
        tokens.push(token);
        if stop.eos.contains(&token) || stop.stop_token_ids.contains(&token) {
            break;
        }
    }
    tokens.split_off(prompt.len())
}

/// A token's score after these words, and as many of the likeliest as are wanted.
fn score(words: impl Iterator<Item = u64>, token: TokenId, top: u32) -> Sampled {
    let state = words.fold(11, |state, word| mix(state ^ word).wrapping_add(1));
    let logprob = -((mix(state ^ u64::from(token)) % 1000) as f32) / 100.0;
    let likely = |rank| ((mix(state.wrapping_add(rank)) % VOCABULARY) as TokenId, -(rank as f32));
    Sampled { token, logprob: Some(logprob), top: (0..u64::from(top)).map(likely).collect() }
}

/// The scores of a prompt's tokens from the second on, by the rules alone.
pub fn oracle_scores(prompt: &[TokenId], top: u32) -> Vec<Sampled> {
    let words = |end: usize| prompt[..end].iter().enumerate().map(|(at, &token)| word(token, at as u32));
    (1..prompt.len()).map(|at| score(words(at), prompt[at], top)).collect()
}

struct Slot {
    prompt_tokens: u32,
    suppress: Vec<TokenId>,
    min_tokens: u32,
    /// Positions submitted; unknown until its first row, which may begin after a cached prefix.
    submitted: Option<u32>,
    /// Whether its last submitted row draws.
    draws: bool,
    last: Option<TokenId>,
}

/// Computes plans late.
pub struct Engine {
    config: Config,
    groups: u32,
    pages: Vec<Vec<[u64; BLOCK_TOKENS as usize]>>,
    slots: BTreeMap<u32, Slot>,
    submitted: VecDeque<Plan>,
    last_id: u64,
}

impl Engine {
    pub fn new(config: Config, groups: u32, pages: u32) -> Engine {
        let group = || vec![[0; BLOCK_TOKENS as usize]; pages as usize];
        Engine {
            config,
            groups,
            pages: (0..groups).map(|_| group()).collect(),
            slots: BTreeMap::new(),
            submitted: VecDeque::new(),
            last_id: 0,
        }
    }

    pub fn in_flight(&self) -> usize {
        self.submitted.len()
    }

    /// Pages of one group that plans in flight name.
    pub fn pages_in_flight(&self) -> BTreeSet<u32> {
        self.submitted.iter().flat_map(|plan| &plan.rows).flat_map(|row| row.pages[0].clone()).collect()
    }

    /// Whether a plan in flight names the page of the first group.
    pub fn names(&self, page: u32) -> bool {
        self.submitted.iter().flat_map(|plan| &plan.rows).any(|row| row.pages[0].contains(&page))
    }

    pub fn submit(&mut self, plan: Plan) {
        assert!(self.submitted.len() <= self.config.depth as usize, "too many plans in flight");
        assert_eq!(plan.id, self.last_id + 1, "plans are numbered");
        self.last_id = plan.id;
        let tokens: u32 = plan.rows.iter().map(|row| row.count).sum();
        assert!(tokens <= self.config.token_budget, "{tokens} tokens in a step");
        assert!(plan.rows.len() <= self.config.rows_max as usize, "{} rows in a step", plan.rows.len());
        assert!(!plan.rows.is_empty(), "a step computes something");
        let slots: BTreeSet<u32> = plan.rows.iter().map(|row| row.slot).collect();
        assert_eq!(slots.len(), plan.rows.len(), "a slot has one row");
        for slot in &plan.close {
            let named = self.submitted.iter().flat_map(|plan| &plan.rows).any(|row| row.slot == *slot);
            assert!(!named && !slots.contains(slot), "slot {slot} is closed while a plan names it");
            assert!(self.slots.remove(slot).is_some(), "slot {slot} is closed but not open");
        }
        for open in &plan.open {
            assert!(!plan.close.contains(&open.slot), "slot {} is closed and opened by one plan", open.slot);
            let slot = Slot {
                prompt_tokens: open.prompt_tokens,
                suppress: open.stop_suppress.clone(),
                min_tokens: open.min_tokens,
                submitted: None,
                draws: false,
                last: None,
            };
            assert!(self.slots.insert(open.slot, slot).is_none(), "slot {} is open", open.slot);
        }
        for row in &plan.rows {
            self.check(row);
        }
        self.submitted.push_back(plan);
    }

    fn check(&mut self, row: &Row) {
        let slot = self.slots.get_mut(&row.slot).expect("rows name open slots");
        assert!(row.count > 0, "a row computes something");
        assert!(slot.submitted.is_none_or(|submitted| submitted == row.start), "rows follow one another");
        match &row.input {
            Input::Known(tokens) => assert_eq!(tokens.len(), row.count as usize),
            Input::Previous => assert!(row.count == 1 && slot.draws, "there is a token to go on from"),
        }
        assert_eq!(row.pages.len(), self.groups as usize);
        for pages in &row.pages {
            assert_eq!(pages.len(), blocks_for(row.start + row.count) as usize, "pages up to the last block");
        }
        let end = row.start + row.count;
        if let Some(Score { first, targets, .. }) = &row.score {
            let last = first + targets.len() as u32 - 1;
            assert!(!targets.is_empty(), "a score is of tokens");
            assert!(*first > row.start && last <= end, "tokens {first} to {last} do not follow the row");
            assert!(last < slot.prompt_tokens, "only the prompt is scored");
        }
        slot.submitted = Some(end);
        slot.draws = row.sample;
    }

    /// Computes the oldest plan now.
    pub fn collect(&mut self) -> Option<Outcome> {
        let plan = self.submitted.pop_front()?;
        let rows = plan.rows.iter().map(|row| self.run(row)).collect();
        Some(Outcome { id: plan.id, rows, ..Outcome::default() })
    }

    /// The oldest plan breaks off and leaves garbage wherever it would have written.
    pub fn break_off(&mut self) -> Option<u64> {
        let plan = self.submitted.pop_front()?;
        for row in &plan.rows {
            self.write(row, |_, position| 0xdead ^ u64::from(position));
            // What later steps in flight go on from.
            self.slot(row).last = Some(0);
        }
        Some(plan.id)
    }

    fn slot(&mut self, row: &Row) -> &mut Slot {
        self.slots.get_mut(&row.slot).expect("slots stay open while a plan names them")
    }

    fn write(&mut self, row: &Row, word: impl Fn(usize, u32) -> u64) {
        for at in 0..row.count {
            let position = row.start + at;
            let (block, place) = ((position / BLOCK_TOKENS) as usize, (position % BLOCK_TOKENS) as usize);
            for (group, pages) in row.pages.iter().enumerate() {
                self.pages[group][pages[block] as usize][place] = word(at as usize, position);
            }
        }
    }

    fn run(&mut self, row: &Row) -> RowOutcome {
        let tokens = match &row.input {
            Input::Known(tokens) => tokens.clone(),
            Input::Previous => vec![self.slot(row).last.expect("checked when it was submitted")],
        };
        self.write(row, |at, position| word(tokens[at], position));
        let end = row.start + row.count;
        // Each group in turn: a page misplaced in any of them shows.
        let words = |end: u32| {
            (0..end).map(|position| {
                let group = (position as usize / 3) % self.pages.len();
                let page = row.pages[group][(position / BLOCK_TOKENS) as usize];
                self.pages[group][page as usize][(position % BLOCK_TOKENS) as usize]
            })
        };
        let scored = row.score.iter().flat_map(|wanted| {
            (wanted.first..).zip(&wanted.targets).map(|(at, &token)| score(words(at), token, wanted.top))
        });
        let scored = scored.collect();
        let sampled = row.sample.then(|| {
            let slot = &self.slots[&row.slot];
            let early = end - slot.prompt_tokens < slot.min_tokens;
            next(words(end), if early { &slot.suppress } else { &[] })
        });
        self.slot(row).last = sampled.or(self.slot(row).last);
        let sampled = sampled.map(|token| Sampled { token, ..Sampled::default() });
        RowOutcome { slot: row.slot, count: row.count, sampled, scored }
    }
}
