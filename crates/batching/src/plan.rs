//! Plans and outcomes: what an engine is asked to compute in one step, and what came of it.

use std::time::Duration;

use tandem_types::{Choice, Sampled, SamplingParams, TokenId};

/// One engine step.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Plan {
    /// Rises by one per plan.
    pub id: u64,
    /// Slots to open first.
    pub open: Vec<SlotOpen>,
    /// Slots that no plan will name again; their state can go.
    pub close: Vec<u32>,
    /// What to compute; at most one row per slot.
    pub rows: Vec<Row>,
    /// For how many further steps the plan keeps its shape (same rows, one token each, same pages).
    pub same_shape_steps: u32,
}

/// The persistent state of a sequence in the engine.
#[derive(Clone, Debug, PartialEq)]
pub struct SlotOpen {
    /// Names it in rows.
    pub slot: u32,
    /// All tokens known now: prompt, then those drawn before. For penalties.
    pub tokens: Vec<TokenId>,
    /// How many of them are prompt.
    pub prompt_tokens: u32,
    /// How tokens are drawn.
    pub sampling: SamplingParams,
    /// Which of the request's answers; part of the generator's key.
    pub choice: Choice,
    /// Tokens that may not be drawn before `min_tokens` output tokens.
    pub stop_suppress: Vec<TokenId>,
    /// See `stop_suppress`.
    pub min_tokens: u32,
}

/// Part of a sequence.
#[derive(Clone, Debug, PartialEq)]
pub struct Row {
    /// The sequence's slot.
    pub slot: u32,
    /// First position to compute.
    pub start: u32,
    /// How many positions, at least 1.
    pub count: u32,
    /// Their tokens.
    pub input: Input,
    /// Pages per group, from block 0 to the last one the row writes.
    pub pages: Vec<Vec<u32>>,
    /// Whether to draw the token that follows position `start + count - 1`.
    pub sample: bool,
    /// Tokens of the prompt whose log probabilities are wanted.
    pub score: Option<Score>,
}

/// Tokens of a prompt to score: how likely each was after all before it, by the raw logits of the position before.
#[derive(Clone, Debug, PartialEq)]
pub struct Score {
    /// Position of the first; the row computes the one before it.
    pub first: u32,
    /// The tokens, one position after the other, at least one. The last follows a position of the row too, so it
    /// may be the first of the next chunk.
    pub targets: Vec<TokenId>,
    /// How many of the likeliest tokens are wanted beside each.
    pub top: u32,
}

/// Where a row's tokens come from.
#[derive(Clone, Debug, PartialEq)]
pub enum Input {
    /// The host knows them; `count` of them.
    Known(Vec<TokenId>),
    /// The token that the slot's last sampled row drew, which the host may not know yet; `count` is 1.
    Previous,
}

/// What came of a plan.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Outcome {
    /// The plan's.
    pub id: u64,
    /// One per row of the plan, in its order.
    pub rows: Vec<RowOutcome>,
    /// How long the step took.
    pub took: Duration,
}

/// What came of a row.
#[derive(Clone, Debug, PartialEq)]
pub struct RowOutcome {
    /// The row's slot.
    pub slot: u32,
    /// Positions computed.
    pub count: u32,
    /// The token drawn. Missing where the row should have drawn one: its logits were not finite.
    pub sampled: Option<Sampled>,
    /// Each of the row's targets with its log probability and the likeliest tokens. Fewer than there are targets
    /// where logits were not finite.
    pub scored: Vec<Sampled>,
}
