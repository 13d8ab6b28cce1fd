//! Operations on rows: embedding, norm, rotations, and the split of the fused projection into rotated queries and
//! stored keys and values.

use tandem_device::{HEAD_WIDTH_MAX, Linear, TOKEN_PREVIOUS};

use super::isa::kernel;
use super::pages::Pages;
use super::{form, linear};
use crate::math::{self, LANES};
use crate::memory::Shared;
use crate::scalar::Scalar;

/// The rows of part `part`: every `parts`-th one.
#[inline(always)]
fn share(count: usize, part: usize, parts: usize) -> impl Iterator<Item = usize> {
    (part..count).step_by(parts)
}

pub(super) struct Embed<'a, T> {
    pub(super) table: &'a Linear,
    pub(super) panels: Shared<T>,
    pub(super) tokens: &'a [u32],
    pub(super) sequences: &'a [u32],
    pub(super) slots: &'a [u32],
    pub(super) previous: &'a [u32],
    pub(super) to: Shared<T>,
}

/// Looks rows up in the packed table.
pub(super) fn embed<T: Scalar>(job: &Embed<'_, T>, part: usize, parts: usize) {
    let width = job.table.inputs;
    for row in share(job.tokens.len(), part, parts) {
        let token = match job.tokens[row] {
            TOKEN_PREVIOUS => job.previous[job.slots[job.sequences[row] as usize] as usize],
            token => token,
        } as usize;
        assert!(token < job.table.outputs, "token {token} of {}", job.table.outputs);
        let (panel, lane) = linear::place(job.table.outputs, false, token);
        let len = form::panel_len::<T>(width);
        // SAFETY: weights are written once, when they are packed.
        let panel = unsafe { job.panels.read(panel * len, len) };
        // SAFETY: each row belongs to one part.
        let to = unsafe { job.to.part(row * width, width) };
        for (k, to) in to.iter_mut().enumerate() {
            *to = panel[form::place_in_panel::<T>(k, lane)];
        }
    }
}

pub(super) struct Rotations<'a> {
    pub(super) positions: &'a [u32],
    pub(super) frequencies: &'a [f64],
    pub(super) scale: f64,
    pub(super) to: Shared<f32>,
}

/// Cosines and sines, in double precision before the last rounding.
pub(super) fn rotations(job: &Rotations<'_>, part: usize, parts: usize) {
    let pairs = job.frequencies.len();
    for row in share(job.positions.len(), part, parts) {
        // SAFETY: each row belongs to one part.
        let (cosines, sines) = unsafe { job.to.part(row * 2 * pairs, 2 * pairs) }.split_at_mut(pairs);
        for (i, frequency) in job.frequencies.iter().enumerate() {
            let (sine, cosine) = (f64::from(job.positions[row]) * frequency).sin_cos();
            cosines[i] = (cosine * job.scale) as f32;
            sines[i] = (sine * job.scale) as f32;
        }
    }
}

pub(super) struct Norm<'a, T> {
    pub(super) x: Shared<T>,
    pub(super) add: Option<&'a [T]>,
    pub(super) weight: &'a [f32],
    pub(super) epsilon: f32,
    pub(super) count: usize,
    pub(super) to: Shared<T>,
}

kernel!(
    /// Adds and normalises rows.
    norm, norm_body, Norm<T: Scalar>
);

#[inline(always)]
fn norm_body<T: Scalar>(job: &Norm<'_, T>, part: usize, parts: usize) {
    let width = job.weight.len();
    for row in share(job.count, part, parts) {
        // SAFETY: each row belongs to one part.
        let (x, to) = unsafe { (job.x.part(row * width, width), job.to.part(row * width, width)) };
        if let Some(add) = job.add {
            let add = &add[row * width..(row + 1) * width];
            for i in 0..width {
                x[i] = T::store(x[i].load() + add[i].load());
            }
        }
        let factor = root(x, job.epsilon);
        for i in 0..width {
            to[i] = T::store(x[i].load() * factor * job.weight[i]);
        }
    }
}

/// 1 / sqrt(mean square + epsilon).
#[inline(always)]
fn root<T: Scalar>(x: &[T], epsilon: f32) -> f32 {
    let mut lanes = [0.0; LANES];
    let chunks = x.chunks_exact(LANES);
    let rest = chunks.remainder();
    for chunk in chunks {
        for i in 0..LANES {
            let value = chunk[i].load();
            lanes[i] += value * value;
        }
    }
    for (lane, value) in lanes.iter_mut().zip(rest) {
        let value = value.load();
        *lane += value * value;
    }
    1.0 / (math::fold(lanes) / x.len() as f32 + epsilon).sqrt()
}

pub(super) struct QkvStore<'a, T> {
    pub(super) qkv: &'a [T],
    pub(super) positions: &'a [u32],
    pub(super) sequences: &'a [u32],
    pub(super) heads: usize,
    pub(super) query_norm: Option<&'a [f32]>,
    pub(super) key_norm: Option<&'a [f32]>,
    pub(super) epsilon: f32,
    pub(super) rotations: &'a [f32],
    pub(super) pairs: usize,
    pub(super) pages: Pages<'a, T>,
    pub(super) queries: Shared<T>,
}

kernel!(
    /// Splits, normalises, rotates and stores rows of the fused projection.
    qkv_store, qkv_store_body, QkvStore<T: Scalar>
);

#[inline(always)]
fn qkv_store_body<T: Scalar>(job: &QkvStore<'_, T>, part: usize, parts: usize) {
    let width = job.pages.width;
    let (heads, kv_heads) = (job.heads, job.pages.heads);
    let all = (heads + 2 * kv_heads) * width;
    let mut room = [0.0; HEAD_WIDTH_MAX];
    for row in share(job.positions.len(), part, parts) {
        let qkv = &job.qkv[row * all..(row + 1) * all];
        let (queries, rest) = qkv.split_at(heads * width);
        let (keys, values) = rest.split_at(kv_heads * width);
        let turns = &job.rotations[row * 2 * job.pairs..(row + 1) * 2 * job.pairs];
        // SAFETY: each row belongs to one part.
        let to = unsafe { job.queries.part(row * heads * width, heads * width) };
        for (query, to) in queries.chunks_exact(width).zip(to.chunks_exact_mut(width)) {
            turn(query, job.query_norm, job.epsilon, turns, &mut room, to);
        }
        let (sequence, position) = (job.sequences[row] as usize, job.positions[row] as usize);
        for head in 0..kv_heads {
            // SAFETY: a position of a sequence is one row of the step, and pages being written are one
            // sequence's own.
            let (key, value) = unsafe { job.pages.token_mut(sequence, position, head) };
            turn(&keys[head * width..(head + 1) * width], job.key_norm, job.epsilon, turns, &mut room, key);
            value.copy_from_slice(&values[head * width..(head + 1) * width]);
        }
    }
}

/// One head: norm, then rotation of its first `turns.len()` elements. `room` holds a head.
#[inline(always)]
fn turn<T: Scalar>(
    head: &[T],
    norm: Option<&[f32]>,
    epsilon: f32,
    turns: &[f32],
    room: &mut [f32; HEAD_WIDTH_MAX],
    to: &mut [T],
) {
    let width = head.len();
    let values = &mut room[..width];
    match norm {
        Some(weight) => {
            let factor = root(head, epsilon);
            for ((value, head), weight) in values.iter_mut().zip(head).zip(&weight[..width]) {
                *value = head.load() * factor * weight;
            }
        }
        None => {
            for (value, head) in values.iter_mut().zip(head) {
                *value = head.load();
            }
        }
    }
    // Slices of one length, so that the loop needs no checks and vectorises.
    let pairs = turns.len() / 2;
    let (cosines, sines) = (&turns[..pairs], &turns[pairs..2 * pairs]);
    let (turned, rest) = to[..width].split_at_mut(2 * pairs);
    let (first, second) = turned.split_at_mut(pairs);
    let (a, b) = (&values[..pairs], &values[pairs..2 * pairs]);
    for i in 0..pairs {
        first[i] = T::store(a[i] * cosines[i] - b[i] * sines[i]);
        second[i] = T::store(b[i] * cosines[i] + a[i] * sines[i]);
    }
    for (to, value) in rest.iter_mut().zip(&values[2 * pairs..]) {
        *to = T::store(*value);
    }
}
