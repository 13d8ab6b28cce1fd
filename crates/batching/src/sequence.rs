//! A sequence: what is known, computed and submitted of it.

use crate::Score;
use crate::pace::Prompt;
use tandem_kv_cache::{ChainSeed, HashChain, Table};
use tandem_types::{
    BLOCK_TOKENS, BlockHash, Choice, FinishReason, SamplingParams, ServiceClass, StopRules, Time, TokenId,
    Until, Usage,
};

/// Names a sequence in a batcher. Given by the caller, unique.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SequenceId(pub u64);

/// What to compute.
#[derive(Clone, Debug, PartialEq)]
pub struct SequenceSpec {
    /// Its name.
    pub id: SequenceId,
    /// Prompt, then tokens drawn before; never empty.
    pub tokens: Vec<TokenId>,
    /// How many of them are prompt.
    pub prompt_tokens: u32,
    /// How far to go.
    pub until: Until,
    /// How tokens are drawn.
    pub sampling: SamplingParams,
    /// Which of the request's answers.
    pub choice: Choice,
    /// When it ends; output is counted from the end of the prompt.
    pub stop: StopRules,
    /// Whether it has latency targets.
    pub class: ServiceClass,
    /// When the request arrived: its place in line.
    pub arrived: Time,
    /// Where its block hashes start.
    pub seed: ChainSeed,
    /// What of the prompt is to be scored.
    pub score: Option<Scoring>,
}

/// The prompt's tokens from a position on are to be scored: how likely each was after all before it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Scoring {
    /// The first position, at least 1: nothing stands before position 0.
    pub from: u32,
    /// How many of the likeliest tokens are wanted beside each.
    pub top: u32,
}

/// When a sequence's tokens are due.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Target {
    /// When the first one is.
    pub due: Time,
    /// When the first one was there, wherever it was drawn.
    pub first_at: Time,
    /// Seconds per further token that it may take on average; infinite without a target.
    pub token_seconds: f64,
}

impl Default for Target {
    /// Never.
    fn default() -> Self {
        Target { due: Time::MAX, first_at: Time::ZERO, token_seconds: f64::INFINITY }
    }
}

/// How much of a sequence is computed already.
#[derive(Debug)]
pub enum Origin {
    /// Nothing but what the prefix cache may hold.
    Fresh,
    /// The KV of its first `computed` tokens is in the table; at least one more token is known.
    Computed {
        /// Its pages.
        table: Table,
        /// Tokens computed.
        computed: u32,
    },
}

#[derive(Debug)]
pub(crate) struct Sequence {
    pub(crate) spec: SequenceSpec,
    pub(crate) chain: HashChain,
    pub(crate) table: Option<Table>,
    pub(crate) slot: Option<u32>,
    pub(crate) computed: u32,
    /// Positions in submitted or collected plans.
    pub(crate) submitted: u32,
    /// Draws in submitted plans whose tokens are not known yet.
    pub(crate) draws_in_flight: u32,
    /// Draws of this attempt, in flight or known.
    pub(crate) draws: u32,
    pub(crate) cached: u32,
    pub(crate) leased: bool,
    pub(crate) paused: bool,
    /// It came with its KV, to be gone on with.
    pub(crate) handed_in: bool,
    pub(crate) target: Target,
    /// The last plan that names it.
    pub(crate) last_plan: Option<u64>,
}

impl Sequence {
    pub(crate) fn new(mut spec: SequenceSpec) -> Sequence {
        let from = |score: Scoring| Scoring { from: score.from.max(1), ..score };
        spec.score = spec.score.map(from).filter(|score| score.from < spec.prompt_tokens);
        let mut chain = HashChain::new(spec.seed);
        chain.extend(&spec.tokens);
        Sequence {
            spec,
            chain,
            table: None,
            slot: None,
            computed: 0,
            submitted: 0,
            draws_in_flight: 0,
            draws: 0,
            cached: 0,
            leased: false,
            paused: false,
            handed_in: false,
            target: Target::default(),
            last_plan: None,
        }
    }

    /// Its place in line: the smaller, the older. Those without targets come after all others.
    pub(crate) fn age(&self) -> (bool, Time, SequenceId) {
        (self.spec.class == ServiceClass::Offline, self.spec.arrived, self.spec.id)
    }

    /// Whether it draws a token in every step: it has drawn here, or came to be gone on with.
    pub(crate) fn decodes(&self) -> bool {
        self.gap() == 1 && (self.draws > 0 || self.handed_in)
    }

    /// What is left of its prompt.
    pub(crate) fn prompt(&self) -> Prompt {
        Prompt {
            left: self.gap(),
            total: self.known(),
            begun: self.table.is_some(),
            due: self.target.due,
            class: self.spec.class,
        }
    }

    pub(crate) fn known(&self) -> u32 {
        self.spec.tokens.len() as u32
    }

    /// The blocks that may come from the prefix cache: a token is scored where the position before it is computed.
    pub(crate) fn reusable(&self) -> &[BlockHash] {
        let hashes = self.chain.hashes();
        let blocks = self.spec.score.map_or(usize::MAX, |score| ((score.from - 1) / BLOCK_TOKENS) as usize);
        &hashes[..hashes.len().min(blocks)]
    }

    /// What a row that computes the positions from `start` to before `end` scores.
    pub(crate) fn score(&self, start: u32, end: u32) -> Option<Score> {
        let Scoring { from, top } = self.spec.score?;
        let first = from.max(start + 1);
        let last = (end + 1).min(self.spec.prompt_tokens);
        let targets =
            self.spec.tokens.get(first as usize..last as usize).filter(|targets| !targets.is_empty())?;
        Some(Score { first, targets: targets.to_vec(), top })
    }

    /// Tokens that are known or will be when everything in flight is collected.
    pub(crate) fn upper(&self) -> u32 {
        self.known() + self.draws_in_flight
    }

    /// Positions not yet submitted.
    pub(crate) fn gap(&self) -> u32 {
        self.upper() - self.submitted
    }

    /// Tokens that may still be drawn, those in flight not counted.
    pub(crate) fn draws_left(&self, context_tokens: u32) -> u32 {
        let output = self.upper() - self.spec.prompt_tokens;
        let by_max = self.spec.stop.max_tokens.saturating_sub(output);
        let by_context = context_tokens.saturating_sub(self.upper());
        let by_until = match self.spec.until {
            Until::FirstToken => 1u32.saturating_sub(self.draws),
            Until::End | Until::Hidden => u32::MAX,
        };
        by_max.min(by_context).min(by_until)
    }

    /// Whether a row for it would bring anything.
    pub(crate) fn wants_row(&self, context_tokens: u32) -> bool {
        !self.paused && self.table.is_some() && self.gap() > 0 && self.draws_left(context_tokens) > 0
    }

    /// Whether it has pages, wants more with time, and gives them all back at its end.
    pub(crate) fn will_grow(&self) -> bool {
        self.table.is_some() && !self.paused && self.spec.until != Until::FirstToken
    }

    /// Tokens that fit into its pages.
    pub(crate) fn room(&self) -> u32 {
        self.table.as_ref().map_or(0, Table::room)
    }

    /// How it ends with the last token drawn, if it does. `Some(None)`: the hand-off is reached.
    pub(crate) fn finish(&self, token: TokenId, context_tokens: u32) -> Option<Option<FinishReason>> {
        let (stop, output) = (&self.spec.stop, self.known() - self.spec.prompt_tokens);
        if stop.eos.contains(&token) {
            Some(Some(FinishReason::Eos))
        } else if stop.stop_token_ids.contains(&token) {
            Some(Some(FinishReason::StopToken(token)))
        } else if output >= stop.max_tokens || self.known() >= context_tokens {
            Some(Some(FinishReason::Length))
        } else if self.spec.until == Until::FirstToken {
            Some(None)
        } else {
            None
        }
    }

    pub(crate) fn usage(&self) -> Usage {
        Usage {
            prompt_tokens: self.spec.prompt_tokens,
            cached_tokens: self.cached,
            output_tokens: self.known() - self.spec.prompt_tokens,
        }
    }

    /// Room to reserve when it is admitted: the prompt for a hand-off, a block more for an answer.
    pub(crate) fn wanted_room(&self, context_tokens: u32) -> u32 {
        let known = self.known();
        match self.spec.until {
            Until::FirstToken => known,
            Until::End | Until::Hidden => (known + BLOCK_TOKENS).min(context_tokens.max(known)),
        }
    }
}
