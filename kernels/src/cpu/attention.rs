//! Attention over paged KV.
//!
//! Positions are cut into spans of [`SPAN`] tokens from 0 on. For each span a row makes a partial result (highest
//! score, sum of exponentials, weighted sum of values) from that span alone; partials are merged in order. So a
//! row's bits depend on its position and the KV, never on how rows were grouped, and later spans of a long
//! context can be given to several threads without changing a bit.

use tandem_device::HEAD_WIDTH_MAX;

use super::isa::kernel;
use super::pages::Pages;
use crate::math::{self, LANES};
use crate::memory::Shared;
use crate::scalar::Scalar;

/// Tokens of a partial result: a multiple of every page size.
pub(super) const SPAN: usize = 256;

pub(super) struct Attention<'a, T> {
    pub(super) queries: &'a [T],
    pub(super) positions: &'a [u32],
    pub(super) sequences: &'a [u32],
    pub(super) heads: usize,
    pub(super) scale: f32,
    pub(super) pages: Pages<'a, T>,
    pub(super) to: Shared<T>,
}

kernel!(
    /// Attention of every `parts`-th pair of row and head.
    attention, body, Attention<T: Scalar>
);

/// What is known after some spans.
struct Partial {
    highest: f32,
    sum: f32,
    values: [f32; HEAD_WIDTH_MAX],
}

#[inline(always)]
fn body<T: Scalar>(job: &Attention<'_, T>, part: usize, parts: usize) {
    let width = job.pages.width;
    let mut query = [0.0; HEAD_WIDTH_MAX];
    for task in (part..job.positions.len() * job.heads).step_by(parts) {
        let (row, head) = (task / job.heads, task % job.heads);
        let first = task * width;
        for i in 0..width {
            query[i] = job.queries[first + i].load() * job.scale;
        }
        let tokens = job.positions[row] as usize + 1;
        let mut total = span(job, row, head, &query[..width], 0, SPAN.min(tokens));
        let mut begin = SPAN;
        while begin < tokens {
            let next = span(job, row, head, &query[..width], begin, tokens.min(begin + SPAN));
            merge(&mut total, &next, width);
            begin += SPAN;
        }
        // SAFETY: each pair of row and head belongs to one part.
        let to = unsafe { job.to.part(first, width) };
        for i in 0..width {
            to[i] = T::store(total.values[i] / total.sum);
        }
    }
}

/// The partial result of positions `begin..end`, at most a span of them.
#[inline(always)]
fn span<T: Scalar>(
    job: &Attention<'_, T>,
    row: usize,
    head: usize,
    query: &[f32],
    begin: usize,
    end: usize,
) -> Partial {
    let (pages, width) = (&job.pages, query.len());
    let sequence = job.sequences[row] as usize;
    let kv_head = head / (job.heads / pages.heads);
    let mut scores = [f32::NEG_INFINITY; SPAN];
    let mut at = begin;
    while at < end {
        let tokens = pages.tokens.min(end - at);
        // SAFETY: KV up to a row's own position was written by earlier operations; nothing writes it now.
        let (keys, _) = unsafe { pages.rows(sequence, at / pages.tokens, kv_head, tokens) };
        for (score, key) in scores[at - begin..].iter_mut().zip(keys.chunks_exact(width)) {
            *score = dot(query, key);
        }
        at += tokens;
    }
    let mut highest = f32::NEG_INFINITY;
    let used = &mut scores[..(end - begin).next_multiple_of(LANES)];
    for score in used.iter().copied() {
        highest = if score > highest { score } else { highest };
    }
    // Places beyond `end` hold negative infinity, whose exponential is exactly 0.
    let mut lanes = [0.0; LANES];
    for chunk in used.chunks_exact_mut(LANES) {
        for i in 0..LANES {
            chunk[i] = math::exp(chunk[i] - highest);
            lanes[i] += chunk[i];
        }
    }
    let mut partial = Partial { highest, sum: math::fold(lanes), values: [0.0; HEAD_WIDTH_MAX] };
    let values = &mut partial.values[..width];
    let mut at = begin;
    while at < end {
        let tokens = pages.tokens.min(end - at);
        // SAFETY: as above.
        let (_, rows) = unsafe { pages.rows(sequence, at / pages.tokens, kv_head, tokens) };
        for (weight, value) in scores[at - begin..].iter().zip(rows.chunks_exact(width)) {
            for i in 0..width {
                values[i] += weight * value[i].load();
            }
        }
        at += tokens;
    }
    partial
}

#[inline(always)]
fn merge(total: &mut Partial, next: &Partial, width: usize) {
    let highest = if next.highest > total.highest { next.highest } else { total.highest };
    let ours = math::exp(total.highest - highest);
    let theirs = math::exp(next.highest - highest);
    total.highest = highest;
    total.sum = total.sum * ours + next.sum * theirs;
    for i in 0..width {
        total.values[i] = total.values[i] * ours + next.values[i] * theirs;
    }
}

#[inline(always)]
fn dot<T: Scalar>(query: &[f32], key: &[T]) -> f32 {
    let mut lanes = [0.0; LANES];
    let whole = query.len() / LANES * LANES;
    for (query, key) in query[..whole].chunks_exact(LANES).zip(key[..whole].chunks_exact(LANES)) {
        for i in 0..LANES {
            lanes[i] += query[i] * key[i].load();
        }
    }
    for i in whole..query.len() {
        lanes[i - whole] += query[i] * key[i].load();
    }
    math::fold(lanes)
}
