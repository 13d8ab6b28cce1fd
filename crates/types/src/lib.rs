//! Nouns that cross process boundaries: ids, time, roles, hashes, sampling parameters and handles.
//!
//! Never knows: protobuf, HTTP, clocks, threads. Everything here is a plain value that compares by value.

mod handle;
mod ids;
mod sampling;
mod step_time;
mod time;

pub use handle::{Export, GroupPages, Handle, KvForm, KvIdentity, PageRef};
pub use ids::{
    Attempt, BlockHash, Choice, ClaimId, Epoch, Incarnation, LeaseId, LegKey, ParseError, RequestId, Role,
    Target, TokenId, WorkerId, WorkerState,
};
pub use sampling::{FinishReason, Sampled, SamplingParams, ServiceClass, StopRules, Until, Usage};
pub use step_time::{StepTime, attention_pairs};
pub use time::Time;

/// Tokens per block: the unit of hashing and reuse, equal in the whole cluster.
pub const BLOCK_TOKENS: u32 = 32;

/// How many blocks hold `tokens` tokens.
pub fn blocks_for(tokens: u32) -> u32 {
    tokens.div_ceil(BLOCK_TOKENS)
}
