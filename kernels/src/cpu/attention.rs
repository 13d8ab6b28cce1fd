//! Attention over paged KV, built on the tile of [`super::form`].
//!
//! Positions are cut into spans of [`SPAN`] tokens from 0 on. Of each span a query makes a partial result (highest
//! score, sum of exponentials, weighted sum of values) from that span alone; partials are merged in order. So a
//! row's bits depend on its position and the KV, never on how rows were grouped or spans were shared out.
//!
//! A span's keys become panels whose outputs are tokens, its values panels whose outputs are dimensions: both once
//! for all queries of a task, which are some rows of one sequence and the heads that share a kv head.

use std::any::Any;
use std::ops::Range;
use std::sync::{Mutex, PoisonError};

use super::form::{Ahead, Form, PANEL, panel_len};
use super::isa::kernel;
use super::pages::Pages;
use super::shares::Shares;
use crate::math::{self, LANES};
use crate::memory::Shared;
use crate::scalar::Scalar;

/// Tokens of a partial result.
const SPAN: usize = 256;
/// Queries of a task, so that making panels is little beside using them.
const QUERIES: usize = 96;
/// Kv heads of a row that are computed together: their keys and values lie side by side, and memory is read fastest in
/// stretches of about 64 KiB.
pub(super) const TOGETHER: usize = 4;
/// What making panels costs, in queries.
const PANELS_COST: usize = 8;
/// A share this much above the even one is worth splitting contexts for.
const UNEVEN: f64 = 1.1;

pub(super) struct Attention<'a, F: Form> {
    pub(super) queries: &'a [F::Stored],
    pub(super) positions: &'a [u32],
    pub(super) heads: usize,
    pub(super) scale: f32,
    pub(super) sequences: &'a [u32],
    pub(super) pages: Pages<'a, F::Stored>,
    pub(super) plan: &'a Plan,
    pub(super) shares: &'a Shares,
    /// One for each part.
    pub(super) rooms: &'a [Mutex<Room<F>>],
    /// Where partial results of a plan that splits contexts go, `plan.partials` of them.
    pub(super) partials: Shared<f32>,
    pub(super) to: Shared<F::Stored>,
}

/// Who computes what.
pub(super) struct Plan {
    blocks: Vec<Block>,
    /// The tasks of each part.
    tasks: Vec<Vec<Task>>,
    /// Partial results to be merged afterwards: 0 if contexts are not split.
    pub(super) partials: usize,
}

/// Rows of one sequence, which share panels.
struct Block {
    first: usize,
    rows: usize,
    /// Tokens that its last row sees.
    reach: usize,
    /// The first partial result of kv head 0, if contexts are split: `[kv head][span][query]`.
    partial: usize,
}

struct Task {
    block: usize,
    heads: Heads,
    /// One span; without, all of them.
    span: Option<usize>,
}

/// Kv heads that are computed together.
#[derive(Clone, Copy)]
struct Heads {
    first: usize,
    count: usize,
}

impl Block {
    fn spans(&self) -> usize {
        self.reach.div_ceil(SPAN)
    }
}

impl Plan {
    /// Shares rows out to `parts`. Whole contexts where that is even enough, else span by span. Of a row that is alone
    /// in its block up to `together` kv heads are computed together, as many as can be shared out evenly.
    pub(super) fn new(
        positions: &[u32],
        sequences: &[u32],
        group: usize,
        kv_heads: usize,
        together: usize,
        parts: usize,
    ) -> Plan {
        let rows_max = (QUERIES / group).max(1);
        let mut blocks: Vec<Block> = Vec::new();
        for (row, position) in positions.iter().enumerate() {
            let reach = *position as usize + 1;
            match blocks.last_mut() {
                Some(block) if block.rows < rows_max && sequences[block.first] == sequences[row] => {
                    block.rows += 1;
                    block.reach = block.reach.max(reach);
                }
                _ => blocks.push(Block { first: row, rows: 1, reach, partial: 0 }),
            }
        }
        let whole = |block: &Block| std::iter::once((None, block.reach)).collect::<Vec<_>>();
        let mut together = together;
        loop {
            let (tasks, share) = share_out(&blocks, group, kv_heads, together, parts, whole);
            let even = share < UNEVEN;
            if even || (together == 1 && blocks.iter().all(|block| block.spans() == 1)) {
                return Plan { blocks, tasks, partials: 0 };
            }
            if together == 1 {
                break;
            }
            together /= 2;
        }
        let by_span = |block: &Block| -> Vec<_> {
            (0..block.spans()).map(|span| (Some(span), SPAN.min(block.reach - span * SPAN))).collect()
        };
        let (tasks, _) = share_out(&blocks, group, kv_heads, 1, parts, by_span);
        let mut partials = 0;
        for block in &mut blocks {
            block.partial = partials;
            partials += kv_heads * block.spans() * block.rows * group;
        }
        Plan { blocks, tasks, partials }
    }
}

/// Gives each task to the part that has least; also how much the most loaded part has, the even share being 1.
fn share_out(
    blocks: &[Block],
    group: usize,
    kv_heads: usize,
    together: usize,
    parts: usize,
    pieces: impl Fn(&Block) -> Vec<(Option<usize>, usize)>,
) -> (Vec<Vec<Task>>, f64) {
    let mut loads = vec![0; parts];
    let mut tasks: Vec<Vec<Task>> = (0..parts).map(|_| Vec::new()).collect();
    // Backwards: of a long prompt the later rows see more and are better given out first.
    for (at, block) in blocks.iter().enumerate().rev() {
        for (span, tokens) in pieces(block) {
            let together = if block.rows == 1 { together } else { 1 };
            for first in (0..kv_heads).step_by(together) {
                let heads = Heads { first, count: together.min(kv_heads - first) };
                let part = (0..parts).min_by_key(|part| loads[*part]).expect("there are parts");
                loads[part] += heads.count * tokens * (block.rows * group + PANELS_COST);
                tasks[part].push(Task { block: at, heads, span });
            }
        }
    }
    let most = loads.iter().max().copied().unwrap_or(0);
    let all: usize = loads.iter().sum();
    (tasks, most as f64 * parts as f64 / all.max(1) as f64)
}

/// A part's own memory, kept from call to call.
pub(super) struct Room<F: Form> {
    queries: Vec<F::Input>,
    /// `[32 tokens][panel]`.
    keys: Vec<F::Stored>,
    /// `[32 dimensions][panel]`.
    values: Vec<F::Stored>,
    /// `[query of a tile, or of a row][token]`.
    scores: Vec<f32>,
    /// The same, as they are multiplied with values.
    weights: Vec<F::Input>,
    /// Partial results of a tile's queries: highest score, sum, values.
    tile: Vec<f32>,
    /// What is known of the task's queries after some spans.
    totals: Vec<f32>,
}

impl<F: Form> Room<F> {
    pub(super) fn new() -> Room<F> {
        Room {
            queries: Vec::new(),
            keys: Vec::new(),
            values: Vec::new(),
            scores: Vec::new(),
            weights: Vec::new(),
            tile: Vec::new(),
            totals: Vec::new(),
        }
    }

    /// Makes room for a task of so many queries, of which `at_once` have their scores at the same time.
    fn fit(&mut self, queries: usize, at_once: usize, width: usize) {
        let zero = F::Stored::store(0.0);
        self.scores.resize(at_once * SPAN, 0.0);
        self.weights.resize(at_once * SPAN, F::Input::store(0.0));
        self.queries.resize(queries * width, F::Input::store(0.0));
        self.keys.resize(SPAN / PANEL * panel_len::<F::Stored>(width), zero);
        self.values.resize(width.div_ceil(PANEL) * panel_len::<F::Stored>(SPAN), zero);
        self.tile.resize(at_once * partial_len(width), 0.0);
        self.totals.resize(queries * partial_len(width), 0.0);
    }
}

/// The rooms of all parts, for the form that a stream uses.
pub(super) struct Rooms {
    parts: usize,
    rooms: Box<dyn Any + Send>,
}

impl Rooms {
    pub(super) fn new(parts: usize) -> Rooms {
        Rooms { parts, rooms: Box::new(()) }
    }

    pub(super) fn parts(&self) -> usize {
        self.parts
    }

    /// A stream that changes to another form gets new ones.
    pub(super) fn of<F: Form>(&mut self) -> &[Mutex<Room<F>>] {
        if !self.rooms.is::<Vec<Mutex<Room<F>>>>() {
            let rooms: Vec<Mutex<Room<F>>> = (0..self.parts).map(|_| Mutex::new(Room::new())).collect();
            self.rooms = Box::new(rooms);
        }
        self.rooms.downcast_ref::<Vec<Mutex<Room<F>>>>().expect("of this form, as just made sure")
    }
}

/// Numbers of a partial result: highest score, sum, values.
pub(super) fn partial_len(width: usize) -> usize {
    width + 2
}

kernel!(
    /// Computes the tasks of part `part`, and what is left of the others'.
    attention, body, Attention<F: Form>
);

#[inline(always)]
fn body<F: Form>(job: &Attention<'_, F>, part: usize, _: usize) {
    let width = job.pages.width;
    let len = partial_len(width);
    // A part that panicked left nothing that the next call reads.
    let mut room = job.rooms[part].lock().unwrap_or_else(PoisonError::into_inner);
    let room = &mut *room;
    // A single thread does the tasks of all.
    let shares = job.plan.tasks.len();
    while let Some((whose, at)) = job.shares.next(part, shares, |whose| job.plan.tasks[whose].len()) {
        let task = &job.plan.tasks[whose][at];
        let block = &job.plan.blocks[task.block];
        // What this part does next, if nobody else does.
        let then = job.plan.tasks[whose].get(at + 1).map(|task| {
            let block = &job.plan.blocks[task.block];
            stretch(job, block, task.heads, task.span.unwrap_or(0))
        });
        let group = job.heads / job.pages.heads;
        let queries = block.rows * group * task.heads.count;
        room.fit(queries, if block.rows == 1 { queries.max(F::ROWS) } else { F::ROWS }, width);
        for (query, to) in room.queries.chunks_exact_mut(width).enumerate() {
            let from = &job.queries[at_query(job, block, task.heads, query)..][..width];
            for (to, from) in to.iter_mut().zip(from) {
                *to = F::Input::store(from.load());
            }
        }
        if let Some(at) = task.span {
            let first = block.partial + (task.heads.first * block.spans() + at) * queries;
            // SAFETY: these partial results belong to this task alone.
            let partials = unsafe { job.partials.part(first * len, queries * len) };
            span(job, block, stretch(job, block, task.heads, at), then, room, |query, partial| {
                partials[query * len..][..len].copy_from_slice(partial);
            });
            continue;
        }
        let mut totals = std::mem::take(&mut room.totals);
        for at in 0..block.spans() {
            let next = at + 1;
            let then = if next == block.spans() { then } else { Some(stretch(job, block, task.heads, next)) };
            span(job, block, stretch(job, block, task.heads, at), then, room, |query, partial| {
                merge(&mut totals[query * len..][..len], partial, at == 0);
            });
        }
        for (query, total) in totals.chunks_exact(len).enumerate() {
            finish(job, block, task.heads, query, total);
        }
        room.totals = totals;
    }
}

kernel!(
    /// After `attention` under a plan that splits contexts: merges the partial results of every `parts`-th query.
    merge_spans, merge_spans_body, Attention<F: Form>
);

#[inline(always)]
fn merge_spans_body<F: Form>(job: &Attention<'_, F>, part: usize, parts: usize) {
    let len = partial_len(job.pages.width);
    let group = job.heads / job.pages.heads;
    let mut total = vec![0.0; len];
    for block in &job.plan.blocks {
        let queries = block.rows * group;
        for task in (part..job.pages.heads * queries).step_by(parts) {
            let (kv_head, query) = (task / queries, task % queries);
            for at in 0..reach(job, block, query).div_ceil(SPAN) {
                let first = block.partial + (kv_head * block.spans() + at) * queries + query;
                // SAFETY: partial results are complete and nothing writes them now.
                let partial = unsafe { job.partials.read(first * len, len) };
                merge(&mut total, partial, at == 0);
            }
            finish(job, block, Heads { first: kv_head, count: 1 }, query, &total);
        }
    }
}

/// What some kv heads have of a span.
#[derive(Clone, Copy)]
struct Stretch {
    sequence: usize,
    heads: Heads,
    begin: usize,
    end: usize,
}

#[inline(always)]
fn stretch<F: Form>(job: &Attention<'_, F>, block: &Block, heads: Heads, span: usize) -> Stretch {
    let begin = span * SPAN;
    let end = block.reach.min(begin + SPAN);
    Stretch { sequence: job.sequences[block.first] as usize, heads, begin, end }
}

impl Stretch {
    fn tokens(&self) -> usize {
        self.end - self.begin
    }

    /// Its pieces: 32 tokens of a head, then those of the next head, which lie beside them.
    fn pieces(&self) -> usize {
        self.tokens().div_ceil(PANEL) * self.heads.count
    }

    /// The keys and values of a piece, of 32 tokens or what there is.
    #[inline(always)]
    fn piece<'a, F: Form>(&self, job: &'a Attention<'_, F>, at: usize) -> (&'a [F::Stored], &'a [F::Stored]) {
        let position = self.begin + at / self.heads.count * PANEL;
        let (head, tokens) = (self.heads.first + at % self.heads.count, PANEL.min(self.end - position));
        // SAFETY: KV up to a row's own position was written by earlier operations; nothing writes it now.
        unsafe { job.pages.rows(self.sequence, position, head, tokens) }
    }
}

/// Tokens that a query sees.
#[inline(always)]
fn reach<F: Form>(job: &Attention<'_, F>, block: &Block, query: usize) -> usize {
    job.positions[block.first + query / (job.heads / job.pages.heads)] as usize + 1
}

/// The first element of a query, and of its result: queries are the heads of a row, then those of the next.
#[inline(always)]
fn at_query<F: Form>(job: &Attention<'_, F>, block: &Block, heads: Heads, query: usize) -> usize {
    let group = job.heads / job.pages.heads;
    let (row, query) = (query / (group * heads.count), query % (group * heads.count));
    ((block.first + row) * job.heads + heads.first * group + query) * job.pages.width
}

/// The partial results of a span, of every query that sees some of it. `then` is what comes next.
#[inline(always)]
fn span<F: Form>(
    job: &Attention<'_, F>,
    block: &Block,
    now: Stretch,
    then: Option<Stretch>,
    room: &mut Room<F>,
    mut take: impl FnMut(usize, &[f32]),
) {
    let width = job.pages.width;
    let begin = now.begin;
    let queries = room.queries.len() / width;
    if block.rows == 1 && F::takes_rows(queries / now.heads.count, width) {
        of_a_row(job, now, then, room);
        for (query, partial) in room.tile.chunks_exact(partial_len(width)).take(queries).enumerate() {
            take(query, partial);
        }
        return;
    }
    panels(job, now, then, room);
    let mut first = 0;
    while first < queries {
        let rows = F::rows_next(queries - first);
        let seen = |query: usize| reach(job, block, query).clamp(begin, begin + SPAN) - begin;
        let tokens = (first..first + rows).map(seen).max().expect("a tile has rows");
        if tokens > 0 {
            tile(job, room, first..first + rows, tokens, seen);
            for (r, partial) in room.tile.chunks_exact(partial_len(width)).take(rows).enumerate() {
                if seen(first + r) > 0 {
                    take(first + r, partial);
                }
            }
        }
        first += rows;
    }
}

/// Keys and values are fetched together so many pieces ahead, in the order in which they lie in memory: the longer one
/// reads on in one place, the faster memory is.
const FETCH_AHEAD: usize = 1;
/// Where they lie is looked up so many pieces ahead: a walk through page tables takes as long as some reads.
const FIND_AHEAD: usize = 4;

/// The partial results of a single row's queries, which see the whole stretch. Nothing is made panels of.
#[inline(always)]
fn of_a_row<F: Form>(job: &Attention<'_, F>, now: Stretch, then: Option<Stretch>, room: &mut Room<F>) {
    let width = job.pages.width;
    let (len, count, heads) = (partial_len(width), now.tokens(), now.heads.count);
    let queries = room.queries.len() / width;
    let group = queries / heads;
    let pieces = now.pieces();
    let later = |at: usize| match then {
        _ if at < pieces => Some(now.piece(job, at)),
        Some(then) if at - pieces < then.pieces() => Some(then.piece(job, at - pieces)),
        _ => None,
    };
    for at in 0..pieces {
        let (keys, _) = now.piece(job, at);
        later(at + FIND_AHEAD).into_iter().for_each(Ahead::find);
        let ahead = later(at + FETCH_AHEAD).map_or(Ahead::NONE, Ahead::both);
        let (first, token) = (at % heads * group, at / heads * PANEL);
        let queries = &room.queries[first * width..][..group * width];
        let products = &mut room.scores[first * SPAN + token..];
        // SAFETY: a form is used with its instruction set, and takes rows of these queries.
        unsafe { F::products_of_rows(queries, width, keys, ahead, products, SPAN) };
    }
    let used = count.next_multiple_of(PANEL);
    for query in 0..queries {
        let scores = &mut room.scores[query * SPAN..][..used];
        scores.iter_mut().for_each(|score| *score *= job.scale);
        let weights = &mut room.weights[query * SPAN..][..used];
        let partial = &mut room.tile[query * len..][..len];
        (partial[0], partial[1]) = soften::<F>(scores, count, weights);
        partial[2..].fill(0.0);
    }
    for at in 0..pieces {
        let (_, values) = now.piece(job, at);
        let (first, token) = (at % heads * group, at / heads * PANEL);
        let weights = &room.weights[first * SPAN + token..];
        let sums = &mut room.tile[first * len..][2..group * len];
        // SAFETY: as above.
        unsafe { F::add_weighted_rows(weights, SPAN, values, width, Ahead::NONE, sums, len) };
    }
}

/// Makes panels of the keys and values of a stretch. Beyond the last token values are zero and keys anything.
#[inline(always)]
fn panels<F: Form>(job: &Attention<'_, F>, now: Stretch, then: Option<Stretch>, room: &mut Room<F>) {
    let width = job.pages.width;
    let (key_len, value_len) = (panel_len::<F::Stored>(width), panel_len::<F::Stored>(SPAN));
    for at in 0..now.pieces() {
        let (keys, values) = now.piece(job, at);
        // What comes next is fetched meanwhile.
        let (next_keys, next_values): (&[F::Stored], &[F::Stored]) = match then {
            _ if at + 1 < now.pieces() => now.piece(job, at + 1),
            Some(then) => then.piece(job, 0),
            None => (&[], &[]),
        };
        // SAFETY: a form is used with its instruction set.
        unsafe {
            F::panel_of_rows(
                keys,
                width,
                Ahead::share(next_keys, 0, 1),
                &mut room.keys[at * key_len..][..key_len],
            )
        };
        let parts = width.div_ceil(PANEL);
        for (dimensions, panel) in room.values.chunks_exact_mut(value_len).enumerate() {
            let panel = &mut panel[at * PANEL * PANEL..][..PANEL * PANEL];
            // SAFETY: as above.
            unsafe {
                F::panel_of_columns(
                    values,
                    width,
                    dimensions * PANEL,
                    Ahead::share(next_values, dimensions, parts),
                    panel,
                )
            };
        }
    }
}

/// The partial results of a tile of queries, of which at least one sees `tokens` of the span and none more.
#[inline(always)]
fn tile<F: Form>(
    job: &Attention<'_, F>,
    room: &mut Room<F>,
    queries: Range<usize>,
    tokens: usize,
    seen: impl Fn(usize) -> usize,
) {
    let width = job.pages.width;
    let rows = queries.len();
    let mut sums = [[0.0; PANEL]; ROWS_MAX];
    let x = &room.queries[queries.start * width..];
    let blocks = tokens.div_ceil(PANEL);
    let used = blocks * PANEL;
    for (at, panel) in room.keys.chunks_exact(panel_len::<F::Stored>(width)).take(blocks).enumerate() {
        let sums = &mut sums[..rows];
        // SAFETY: a form is used with its instruction set; `tile` checks the rest.
        unsafe { F::tile(x, width, width, panel, Ahead::NONE, true, sums) };
        for (r, sums) in sums.iter().enumerate() {
            let scores = &mut room.scores[r * SPAN + at * PANEL..][..PANEL];
            for j in 0..PANEL {
                scores[j] = sums[j] * job.scale;
            }
        }
    }
    for r in 0..rows {
        let scores = &mut room.scores[r * SPAN..][..used];
        let weights = &mut room.weights[r * SPAN..][..used];
        let (highest, sum) = soften::<F>(scores, seen(queries.start + r), weights);
        let partial = &mut room.tile[r * partial_len(width)..];
        (partial[0], partial[1]) = (highest, sum);
    }
    // Tokens that a query does not see weigh exactly nothing.
    for (at, panel) in room.values.chunks_exact(panel_len::<F::Stored>(SPAN)).enumerate() {
        let sums = &mut sums[..rows];
        // SAFETY: as above.
        unsafe { F::tile(&room.weights, SPAN, used, panel, Ahead::NONE, true, sums) };
        for r in 0..rows {
            let seen = seen(queries.start + r);
            if (1..used).contains(&seen) && sums[r].iter().any(|sum| !sum.is_finite()) {
                // Nothing times what is not finite is no number: a later token's values must not be touched.
                let weights = &room.weights[r * SPAN..];
                // SAFETY: as above.
                unsafe { F::tile(weights, SPAN, seen, panel, Ahead::NONE, true, &mut sums[r..=r]) };
            }
        }
        let lanes = PANEL.min(width - at * PANEL);
        for (r, sums) in sums.iter().enumerate() {
            let first = r * partial_len(width) + 2 + at * PANEL;
            room.tile[first..first + lanes].copy_from_slice(&sums[..lanes]);
        }
    }
}

/// No form has more rows in a tile.
const ROWS_MAX: usize = 14;

/// From the first `seen` scores to weights relative to the highest; the others weigh nothing. Also the highest score
/// and the sum of the weights.
#[inline(always)]
fn soften<F: Form>(scores: &mut [f32], seen: usize, weights: &mut [F::Input]) -> (f32, f32) {
    scores[seen..].fill(f32::NEG_INFINITY);
    let highest = math::highest(scores);
    let mut lanes = [0.0; LANES];
    for (scores, weights) in scores.chunks_exact(LANES).zip(weights.chunks_exact_mut(LANES)) {
        for i in 0..LANES {
            // The exponential of negative infinity is exactly 0.
            weights[i] = F::Input::store(math::exp(scores[i] - highest));
            lanes[i] += weights[i].load();
        }
    }
    (highest, math::fold(lanes))
}

/// Merges a partial result into what is known of earlier spans.
#[inline(always)]
fn merge(total: &mut [f32], next: &[f32], first: bool) {
    if first {
        return total.copy_from_slice(next);
    }
    let highest = if next[0] > total[0] { next[0] } else { total[0] };
    let ours = math::exp(total[0] - highest);
    let theirs = math::exp(next[0] - highest);
    total[0] = highest;
    for (total, next) in total[1..].iter_mut().zip(&next[1..]) {
        *total = *total * ours + next * theirs;
    }
}

#[inline(always)]
fn finish<F: Form>(job: &Attention<'_, F>, block: &Block, heads: Heads, query: usize, total: &[f32]) {
    let width = job.pages.width;
    // SAFETY: each query belongs to one task of one part.
    let to = unsafe { job.to.part(at_query(job, block, heads, query), width) };
    for (to, value) in to.iter_mut().zip(&total[2..]) {
        // Adding zero makes a negative zero, which unseen tokens might have left, positive.
        *to = F::Stored::store(value / total[1] + 0.0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn contexts_are_split_only_where_whole_ones_cannot_be_shared_out_evenly() {
        let plan = |positions: &[u32], parts| Plan::new(positions, &vec![0; positions.len()], 2, 8, 4, parts);
        assert_eq!(plan(&[2047], 1).partials, 0);
        assert_eq!(plan(&[2047], 2).partials, 0);
        assert_eq!(plan(&[2047], 3).partials, 8 * 8 * 2);
        assert_eq!(plan(&[100], 3).partials, 0, "one span cannot be split");
    }

    #[test]
    fn heads_of_single_rows_are_computed_together_as_far_as_parts_stay_even() {
        let plan = |rows: usize, parts| {
            let positions = vec![100; rows];
            let sequences: Vec<u32> = (0..rows as u32).collect();
            let plan = Plan::new(&positions, &sequences, 2, 8, 4, parts);
            let mut seen: Vec<(usize, usize)> = Vec::new();
            for task in plan.tasks.iter().flatten() {
                seen.extend((0..task.heads.count).map(|head| (task.block, task.heads.first + head)));
            }
            seen.sort_unstable();
            let all: Vec<(usize, usize)> =
                (0..rows).flat_map(|row| (0..8).map(move |head| (row, head))).collect();
            assert_eq!(seen, all, "{rows} rows, {parts} parts");
            plan.tasks.iter().flatten().map(|task| task.heads.count).max()
        };
        assert_eq!(plan(1, 2), Some(4));
        assert_eq!(plan(1, 4), Some(2));
        assert_eq!(plan(1, 8), Some(1));
        assert_eq!(plan(32, 3), Some(4));
        assert_eq!(plan(32, 16), Some(4));
    }

    #[test]
    fn every_query_of_every_span_belongs_to_one_task() {
        let positions: Vec<u32> = (700..900).chain([3]).chain(200..300).collect();
        let sequences: Vec<u32> = [vec![0; 200], vec![1; 1], vec![2; 100]].concat();
        for parts in [1, 2, 3, 16] {
            let plan = Plan::new(&positions, &sequences, 4, 2, 1, parts);
            let mut rows = vec![0; positions.len()];
            let second = |task: &&Task| task.heads.first == 1 && task.span.unwrap_or(0) == 0;
            for task in plan.tasks.iter().flatten().filter(second) {
                let block = &plan.blocks[task.block];
                rows[block.first..block.first + block.rows].iter_mut().for_each(|count| *count += 1);
                assert!(
                    sequences[block.first..][..block.rows].iter().all(|id| *id == sequences[block.first])
                );
            }
            assert!(rows.iter().all(|count| *count == 1), "{parts} parts");
        }
    }
}
