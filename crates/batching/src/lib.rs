//! What the next engine step computes: continuous batching, chunked prefill and preemption as one rule.
//!
//! Never knows: token values beyond carrying them, bytes, devices, sessions, clocks. Every sequence has tokens
//! known, tokens computed (confirmed) and tokens submitted (an upper bound); a step closes part of the gap
//! within a budget. Prefix hits, chunks, decode, resumed, handed-over and preempted sequences are that same
//! case.
//!
//! Always holds: a plan keeps to its budgets and names only pages of its sequences' tables; pages named by a
//! submitted plan are given back only after it was collected; nobody is admitted before an older one that waits
//! for memory; of the sequences that are not paused the oldest is never preempted; every sequence that was added
//! leaves with exactly one of `Finished`, `Preempted`, `Rejected`, `Failed`, or by `cancel`.

mod admit;
mod apply;
mod batcher;
mod lengths;
pub mod pace;
mod paced;
mod plan;
mod sequence;

pub use apply::Completing;
pub use batcher::{Backlog, Batcher, Config, Event};
pub use plan::{Input, Outcome, Plan, Row, RowOutcome, Score, SlotOpen};
pub use sequence::{Origin, Scoring, SequenceId, SequenceSpec, Target};
