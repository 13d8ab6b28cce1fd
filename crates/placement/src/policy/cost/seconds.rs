//! What a worker's state costs in seconds.

use tandem_types::{Role, StepTime};

use crate::candidate::sane_seconds;
use crate::{Candidate, Request};

/// Part of a KV pool that is filled by choice. Some of the rest is in pages that are not full; what is left of it lets
/// sequences grow while none ends, for who is preempted is computed twice.
const POOL_USABLE: f64 = 0.96;
/// Part of what ended sequences give back that others do not take by growing, at least.
const GIVEN_BACK_LEAST: f64 = 0.1;

/// Seconds per token where so many sequences decode over `context` tokens in all. Those who find no row take turns.
pub(super) fn token_seconds(model: &StepTime, rows: f64, context: f64, rows_max: u32) -> f64 {
    if rows_max == 0 || rows <= f64::from(rows_max) {
        return model.step(rows, 0.0, context);
    }
    let turns = rows / f64::from(rows_max);
    turns * model.step(rows / turns, 0.0, context / turns)
}

/// Seconds until a row is free for a prompt. Rows end evenly over the expected length of an answer, and everybody who is
/// there or waits there will need one; where prompts are handed off, they give theirs back at once.
pub(super) fn row_seconds(model: &StepTime, c: &Candidate, request: &Request) -> f64 {
    let there = c.in_flight.max(c.decodes.saturating_add(c.waiting));
    if c.role == Role::Prefill || c.rows_max == 0 || there < c.rows_max {
        return 0.0;
    }
    let rows = f64::from(c.rows_max);
    let before = f64::from(there - c.rows_max) + 1.0;
    before * request.expected() * model.step(rows, 0.0, c.decode_tokens as f64) / rows
}

/// Seconds until a worker has room for the KV of so many more tokens.
///
/// Its rows end evenly over their expected length and give their share back, while the others grow by a token with
/// every step. However much they grow, a tenth of what is given back counts: nobody waits for ever.
pub(super) fn room_seconds(c: &Candidate, model: &StepTime, tokens: f64, expected: f64) -> f64 {
    let (rows, context, pool) = (f64::from(c.decodes), c.decode_tokens as f64, c.kv_tokens as f64);
    let missing = context + tokens - POOL_USABLE * pool;
    if pool == 0.0 || rows == 0.0 || missing <= 0.0 {
        return 0.0;
    }
    let freed = context / expected;
    let per_step = (freed - rows).max(GIVEN_BACK_LEAST * freed);
    sane_seconds(missing / per_step.max(1e-6) * model.step(rows, 0.0, context))
}
