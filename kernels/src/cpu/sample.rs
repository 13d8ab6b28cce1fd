//! Counts, penalties and the draw.
//!
//! Sums over the vocabulary run in fixed chunks of [`CHUNK`] tokens in the order of ids, so that the work can
//! later be shared out, or fused with the product before it, without changing a bit.

use tandem_device::{Logits, SampleCall, SampleRow, TOP_LOGPROBS_MAX};

use super::isa::kernel;
use crate::math::{self, LANES};
use crate::memory::Shared;
use crate::philox;

/// Tokens of a partial sum.
const CHUNK: usize = 1024;
/// In counts: the token is in the prompt.
const IN_PROMPT: u32 = 1 << 31;

/// Sets a slot's row of counts from its tokens.
pub(super) fn tally(tokens: &[u32], prompt: usize, counts: &mut [u32]) {
    counts.fill(0);
    for (at, token) in tokens.iter().enumerate() {
        let count = &mut counts[*token as usize];
        match at < prompt {
            true => *count |= IN_PROMPT,
            false => *count += 1,
        }
    }
}

pub(super) struct Penalties<'a> {
    pub(super) raw: &'a [f32],
    pub(super) count: usize,
    pub(super) vocab: usize,
    pub(super) rows: &'a [u32],
    pub(super) first: &'a [u32],
    pub(super) tokens: &'a [u32],
    pub(super) values: &'a [f32],
    pub(super) counts: Option<Shared<u32>>,
    pub(super) to: Shared<f32>,
}

kernel!(
    /// Adjusts rows of logits: edits, then penalties.
    penalties, penalties_body, Penalties
);

#[inline(always)]
fn penalties_body(job: &Penalties<'_>, part: usize, parts: usize) {
    let vocab = job.vocab;
    for row in (part..job.count).step_by(parts) {
        let sampling = SampleRow::from_words(&job.rows[row * SampleRow::WORDS..(row + 1) * SampleRow::WORDS]);
        // SAFETY: each row belongs to one part.
        let to = unsafe { job.to.part(row * vocab, vocab) };
        to.copy_from_slice(&job.raw[row * vocab..(row + 1) * vocab]);
        for edit in job.first[row] as usize..job.first[row + 1] as usize {
            to[job.tokens[edit] as usize] += job.values[edit];
        }
        if !sampling.has_penalties() {
            continue;
        }
        let counts = job.counts.as_ref().expect("a row with penalties comes with counts");
        // SAFETY: nothing writes counts during this operation.
        let counts = unsafe { counts.read(sampling.slot as usize * vocab, vocab) };
        for (logit, count) in to.iter_mut().zip(counts) {
            let outputs = count & !IN_PROMPT;
            let mut value = *logit;
            if *count != 0 {
                value = if value > 0.0 { value / sampling.repetition } else { value * sampling.repetition };
            }
            if outputs > 0 {
                value -= sampling.frequency * outputs as f32;
                value -= sampling.presence;
            }
            *logit = value;
        }
    }
}

pub(super) struct Sample<'a> {
    pub(super) raw: &'a [f32],
    pub(super) adjusted: &'a [f32],
    /// See [`Logits::peaks`]; of the raw logits.
    pub(super) peaks: Option<&'a [f32]>,
    pub(super) count: usize,
    pub(super) vocab: usize,
    pub(super) rows: &'a [u32],
    pub(super) previous: Shared<u32>,
    pub(super) counts: Option<Shared<u32>>,
    pub(super) to: Shared<u32>,
}

kernel!(
    /// Draws the token of every `parts`-th row.
    sample, sample_body, Sample
);

#[inline(always)]
fn sample_body(job: &Sample<'_>, part: usize, parts: usize) {
    let vocab = job.vocab;
    for row in (part..job.count).step_by(parts) {
        let sampling = SampleRow::from_words(&job.rows[row * SampleRow::WORDS..(row + 1) * SampleRow::WORDS]);
        let raw = &job.raw[row * vocab..(row + 1) * vocab];
        let adjusted = &job.adjusted[row * vocab..(row + 1) * vocab];
        let count = vocab.div_ceil(Logits::PEAK);
        let peaks = job.peaks.map(|peaks| &peaks[row * count..(row + 1) * count]);
        // SAFETY: each row belongs to one part.
        let to = unsafe { job.to.part(row * SampleCall::WORDS, SampleCall::WORDS) };
        to.fill(0);
        // Where nothing was adjusted, what is true of the raw logits is all there is to know.
        let plain = std::ptr::eq(raw, adjusted);
        let best = if plain { best_by(peaks, raw) } else { best(adjusted) };
        let finite = math::all_finite(peaks.unwrap_or(raw));
        if !finite || !plain && !all_below_infinity(adjusted) || adjusted[best] == f32::NEG_INFINITY {
            to[0] = SampleCall::NOT_FINITE;
            continue;
        }
        let token = if sampling.temperature > 0.0 { draw(adjusted, best, &sampling) } else { best };
        to[0] = SampleCall::DRAWN;
        to[1] = token as u32;
        report(raw, peaks, token, &sampling, to);
        // SAFETY: a slot is sampled by at most one row of a step.
        unsafe { job.previous.part(sampling.slot as usize, 1)[0] = token as u32 };
        if let (true, Some(counts)) = (sampling.flags.tallied, &job.counts) {
            // SAFETY: as above.
            unsafe { counts.part(sampling.slot as usize * vocab + token, 1)[0] += 1 };
        }
    }
}

/// Forbidden tokens have negative infinity; NaN and infinity fail.
#[inline(always)]
fn all_below_infinity(logits: &[f32]) -> bool {
    logits.iter().fold(true, |all, logit| all & (*logit < f32::INFINITY))
}

/// The highest logit's id; of equals the lowest.
#[inline(always)]
fn best(logits: &[f32]) -> usize {
    let highest = math::highest(logits);
    logits.iter().position(|value| *value == highest).unwrap_or(0)
}

/// [`best`], by way of the peaks where there are some.
#[inline(always)]
fn best_by(peaks: Option<&[f32]>, logits: &[f32]) -> usize {
    let Some(peaks) = peaks else { return best(logits) };
    let first = best(peaks) * Logits::PEAK;
    first + best(&logits[first..logits.len().min(first + Logits::PEAK)])
}

/// Sum of e^(logit / temperature - highest) over one chunk.
#[inline(always)]
fn chunk_sum(logits: &[f32], temperature: f32, highest: f32) -> f64 {
    let mut lanes = [0.0; LANES];
    let chunks = logits.chunks_exact(LANES);
    let rest = chunks.remainder();
    for chunk in chunks {
        for i in 0..LANES {
            lanes[i] += weight(chunk[i], temperature, highest);
        }
    }
    for (lane, logit) in lanes.iter_mut().zip(rest) {
        *lane += weight(*logit, temperature, highest);
    }
    f64::from(math::fold(lanes))
}

#[inline(always)]
fn weight(logit: f32, temperature: f32, highest: f32) -> f32 {
    math::exp((logit - highest) / temperature)
}

/// One token by the row's uniform number.
#[inline(always)]
fn draw(logits: &[f32], best: usize, sampling: &SampleRow) -> usize {
    let uniform = philox::uniform(sampling.seed, sampling.choice, sampling.position);
    let (temperature, highest) = (sampling.temperature, logits[best]);
    if sampling.top_k == 0 && sampling.top_p >= 1.0 && sampling.min_p <= 0.0 {
        let sums: Vec<f64> =
            logits.chunks(CHUNK).map(|chunk| chunk_sum(chunk, temperature, highest)).collect();
        let target = uniform * sums.iter().sum::<f64>();
        let mut below = 0.0;
        for (chunk, sum) in logits.chunks(CHUNK).zip(&sums).enumerate().map(|(at, (_, sum))| (at, sum)) {
            if below + sum > target {
                let first = chunk * CHUNK;
                let end = logits.len().min(first + CHUNK);
                let weights = logits[first..end].iter().map(|logit| weight(*logit, temperature, highest));
                if let Some(at) = pick(weights, target - below) {
                    return first + at;
                }
            }
            below += sum;
        }
        // Rounding may leave the target beyond the last sum.
        return logits.iter().rposition(|logit| weight(*logit, temperature, highest) > 0.0).unwrap_or(best);
    }
    let kept = Kept::of(logits, highest, sampling);
    let target = uniform * kept.total;
    kept.tokens[pick(kept.weights.iter().copied(), target).unwrap_or(kept.tokens.len() - 1)] as usize
}

/// The first index whose running sum exceeds the target.
fn pick(weights: impl Iterator<Item = f32>, target: f64) -> Option<usize> {
    let mut sum = 0.0;
    for (at, weight) in weights.enumerate() {
        sum += f64::from(weight);
        if sum > target {
            return Some(at);
        }
    }
    None
}

/// The tokens that `min_p`, `top_k` and `top_p` leave, most likely first.
struct Kept {
    tokens: Vec<u32>,
    weights: Vec<f32>,
    total: f64,
}

impl Kept {
    fn of(logits: &[f32], highest: f32, sampling: &SampleRow) -> Kept {
        let weigh = |token: u32| weight(logits[token as usize], sampling.temperature, highest);
        // Weights are relative to the best token's, so `min_p` compares with them directly.
        let mut tokens: Vec<u32> = (0..logits.len() as u32)
            .filter(|token| {
                let weight = weigh(*token);
                weight > 0.0 && weight >= sampling.min_p
            })
            .collect();
        let order = |a: &u32, b: &u32| logits[*b as usize].total_cmp(&logits[*a as usize]).then(a.cmp(b));
        let top_k = sampling.top_k as usize;
        if top_k > 0 && top_k < tokens.len() {
            tokens.select_nth_unstable_by(top_k - 1, order);
            tokens.truncate(top_k);
            tokens.sort_unstable();
        }
        let whole: f64 = tokens.iter().map(|token| f64::from(weigh(*token))).sum();
        let needed = if sampling.top_p < 1.0 { f64::from(sampling.top_p) * whole } else { f64::INFINITY };
        // Most nuclei are small: sort ever longer heads of the list until one reaches far enough.
        let mut head = 64;
        loop {
            let len = head.min(tokens.len());
            if len < tokens.len() {
                tokens.select_nth_unstable_by(len - 1, order);
            }
            tokens[..len].sort_unstable_by(order);
            let weights: Vec<f32> = tokens[..len].iter().map(|token| weigh(*token)).collect();
            let enough = reaching(&weights, needed);
            if enough.is_some() || len == tokens.len() {
                let keep = enough.unwrap_or(len);
                tokens.truncate(keep);
                let weights = weights[..keep].to_vec();
                let total = weights.iter().map(|weight| f64::from(*weight)).sum();
                return Kept { tokens, weights, total };
            }
            head *= 8;
        }
    }
}

/// How many of the first weights sum to at least `needed`; at least one.
fn reaching(weights: &[f32], needed: f64) -> Option<usize> {
    let mut sum = 0.0;
    for (at, weight) in weights.iter().enumerate() {
        sum += f64::from(*weight);
        if sum >= needed {
            return Some(at + 1);
        }
    }
    None
}

/// Log probabilities of the raw logits, into a row of the result.
#[inline(always)]
fn report(raw: &[f32], peaks: Option<&[f32]>, token: usize, sampling: &SampleRow, to: &mut [u32]) {
    let top = usize::from(sampling.flags.top).min(TOP_LOGPROBS_MAX).min(raw.len());
    if !sampling.flags.logprob && top == 0 {
        return;
    }
    let highest = raw[best_by(peaks, raw)];
    let sum: f64 = raw.chunks(CHUNK).map(|chunk| chunk_sum(chunk, 1.0, highest)).sum();
    let offset = sum.ln();
    let logprob = |token: usize| (f64::from(raw[token]) - f64::from(highest) - offset) as f32;
    to[2] = logprob(token).to_bits();
    // Insertion into a short list that stays sorted; ids rise, so equals stay in the order of ids.
    let mut list: Vec<usize> = Vec::with_capacity(top + 1);
    let full = |list: &[usize]| list.len() == top;
    for (chunk, logits) in raw.chunks(Logits::PEAK).enumerate() {
        let below = |last: &usize| peaks.is_some_and(|peaks| peaks[chunk] <= raw[*last]);
        if full(&list) && list.last().is_none_or(below) {
            continue;
        }
        for id in (chunk * Logits::PEAK..).take(logits.len()) {
            if full(&list) && list.last().is_none_or(|last| raw[id] <= raw[*last]) {
                continue;
            }
            let at = list.partition_point(|other| raw[*other] >= raw[id]);
            list.insert(at, id);
            list.truncate(top);
        }
    }
    for (at, id) in list.into_iter().enumerate() {
        to[3 + 2 * at] = id as u32;
        to[4 + 2 * at] = logprob(id).to_bits();
    }
}
