//! How tokens are drawn and when a sequence ends.

use serde::{Deserialize, Serialize};

use crate::TokenId;

/// How the next token is drawn. Valid by construction at the router's door; nothing inside checks it again.
///
/// The draw for output position `p` of choice `c` depends on `(seed, c, p)` and the logits alone, so a
/// request gives the same tokens wherever and however often it is resumed.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SamplingParams {
    /// 0 means greedy; otherwise logits are divided by it.
    pub temperature: f32,
    /// Keep the smallest set of tokens whose probabilities sum to at least this; 1 keeps all.
    pub top_p: f32,
    /// Keep this many most likely tokens; 0 keeps all.
    pub top_k: u32,
    /// Keep tokens with at least this share of the top probability; 0 keeps all.
    pub min_p: f32,
    /// Added once per distinct output token, negated (OpenAI).
    pub presence_penalty: f32,
    /// Added per occurrence in the output, negated (OpenAI).
    pub frequency_penalty: f32,
    /// Divides positive and multiplies negative logits of tokens in prompt or output (Keskar et al. 2019); 1 is off.
    pub repetition_penalty: f32,
    /// Added to the named tokens' logits before anything else is cut.
    pub logit_bias: Vec<(TokenId, f32)>,
    /// Seed of the counter-based generator. The router draws one if the client gave none.
    pub seed: u64,
    /// `None`: no log probabilities. `Some(k)`: that of the drawn token and of the top `k` (0 to 20).
    /// They are those of the raw logits, before bias, penalties and temperature.
    pub logprobs: Option<u32>,
}

impl Default for SamplingParams {
    /// Greedy, nothing else.
    fn default() -> Self {
        SamplingParams {
            temperature: 0.0,
            top_p: 1.0,
            top_k: 0,
            min_p: 0.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            repetition_penalty: 1.0,
            logit_bias: Vec::new(),
            seed: 0,
            logprobs: None,
        }
    }
}

/// When a sequence ends, as far as the worker can tell from token ids. Stop strings are the router's.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct StopRules {
    /// Output tokens in all (not per attempt); at least 1.
    pub max_tokens: u32,
    /// Until this many output tokens, no token of `eos` or `stop_token_ids` may be drawn.
    pub min_tokens: u32,
    /// The model's end-of-sequence tokens; empty under `ignore_eos`.
    pub eos: Vec<TokenId>,
    /// The client's own stop tokens; they win over `ignore_eos`.
    pub stop_token_ids: Vec<TokenId>,
}

impl Default for StopRules {
    fn default() -> Self {
        StopRules { max_tokens: 16, min_tokens: 0, eos: Vec::new(), stop_token_ids: Vec::new() }
    }
}

/// How far a `Start` goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Until {
    /// Prefill and hand off: stop with the first new token drawn.
    FirstToken,
    /// To the end of the answer.
    End,
    /// Hidden states of the prompt only (embeddings).
    Hidden,
}

/// Whether a request has latency targets.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum ServiceClass {
    /// Has latency targets.
    #[default]
    Online,
    /// Has none; fills gaps.
    Offline,
}

/// Why a sequence ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum FinishReason {
    /// An end-of-sequence token was drawn (it is the last token delivered).
    Eos,
    /// One of the client's `stop_token_ids` was drawn.
    StopToken(TokenId),
    /// `max_tokens`, or the context or pool is full.
    Length,
}

/// One drawn token.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Sampled {
    /// The token.
    pub token: TokenId,
    /// Its log probability (natural), if asked for.
    pub logprob: Option<f32>,
    /// The most likely tokens with their log probabilities, best first; ties go to the lower id.
    pub top: Vec<(TokenId, f32)>,
}

/// What a request is billed for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Usage {
    /// Tokens of the prompt.
    pub prompt_tokens: u32,
    /// Of these, found in a prefix cache.
    pub cached_tokens: u32,
    /// Tokens drawn.
    pub output_tokens: u32,
}
