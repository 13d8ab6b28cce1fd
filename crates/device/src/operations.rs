//! The arguments of the operations: what each computes, on which shapes. `T` is the element type of a model's
//! weights, activations and KV: f32 or bf16. Arithmetic is float32 throughout; a bf16 result is rounded once,
//! when it is stored.

use crate::{Buffer, Linear};

/// In place of a token id: the token that the row's slot drew last.
pub const TOKEN_PREVIOUS: u32 = u32::MAX;

/// Most alternatives whose log probability a step can report per row.
pub const TOP_LOGPROBS_MAX: usize = 20;

/// The token rows of a step: one per token whose KV it computes.
#[derive(Clone, Copy)]
pub struct StepRows<'a> {
    /// How many.
    pub count: usize,
    /// u32 `[count]`: each row's position in its sequence.
    pub positions: &'a Buffer,
    /// u32 `[count]`: which of the step's sequences it belongs to.
    pub sequences: &'a Buffer,
}

/// Where the step's sequences have their KV.
#[derive(Clone, Copy)]
pub enum Sequences<'a> {
    /// u32 `[sequences][stride]`: the page of each block.
    Tables {
        /// The pages.
        pages: &'a Buffer,
        /// Blocks per row of the table.
        stride: usize,
    },
    /// u32 `[sequences]`: the page of block 0; block `b` lies in that page + `b` (virtually contiguous KV).
    Contiguous {
        /// The first pages.
        bases: &'a Buffer,
    },
}

/// The KV pages of one group: a page is `[layer][kv head][key rows, then value rows]`, a row `width` elements.
#[derive(Clone)]
pub struct KvPages {
    /// T: all pages of the group, one after the other.
    pub memory: Buffer,
    /// Layers in a page.
    pub layers: usize,
    /// Key-value heads.
    pub heads: usize,
    /// Elements of a key and of a value.
    pub width: usize,
    /// Tokens in a page.
    pub tokens: usize,
}

impl KvPages {
    /// Elements from one page to the next.
    pub fn page_elements(&self) -> usize {
        self.layers * self.heads * 2 * self.tokens * self.width
    }
}

/// One layer of a group's pages.
#[derive(Clone, Copy)]
pub struct KvLayer<'a> {
    /// The group.
    pub pages: &'a KvPages,
    /// The layer's index in the group.
    pub layer: usize,
}

/// `to[row] = table[token of row]`.
pub struct Embed<'a> {
    /// The table: a packed matrix whose outputs are the vocabulary, the one the logits use when they are tied.
    pub table: &'a Linear,
    /// u32 `[count]`: token ids, or [`TOKEN_PREVIOUS`].
    pub tokens: &'a Buffer,
    /// The rows; `sequences` names the entry of `slots`.
    pub rows: StepRows<'a>,
    /// u32 `[sequences]`: each sequence's slot.
    pub slots: &'a Buffer,
    /// u32 `[slots]`: the token each slot drew last.
    pub previous: &'a Buffer,
    /// T `[count][inputs of the table]`.
    pub to: &'a Buffer,
}

/// `to[row] = [cos(a_i) * scale, sin(a_i) * scale]` with `a_i = position * frequency_i`, in double precision
/// before the last rounding.
pub struct Rotations<'a> {
    /// Which positions.
    pub rows: StepRows<'a>,
    /// Angle per position of each pair. The same in every step of a model, so plain values of the call.
    pub frequencies: &'a [f64],
    /// Factor on cosine and sine (YaRN's attention factor; 1 otherwise).
    pub scale: f64,
    /// f32 `[count][2][frequencies]`: cosines, then sines.
    pub to: &'a Buffer,
}

/// `x += add; to = x / sqrt(mean(x²) + epsilon) * weight`, per row of `width`.
pub struct Norm<'a> {
    /// T `[count][width]`; changed only if `add` is given.
    pub x: &'a Buffer,
    /// T `[count][width]`: what is added first.
    pub add: Option<&'a Buffer>,
    /// f32 `[width]`.
    pub weight: &'a Buffer,
    /// Added to the mean square.
    pub epsilon: f32,
    /// Rows.
    pub count: usize,
    /// T `[count][width]`.
    pub to: &'a Buffer,
}

/// What happens to a product before it is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Epilogue {
    /// `to = x W + b`.
    None,
    /// `to += x W + b`, rounded once.
    Residual,
    /// The outputs are halves g and u: `to = silu(g) * u`, half as wide; silu(g) = g / (1 + e^-g).
    Gate,
}

/// A matrix product.
pub struct LinearCall<'a> {
    /// T `[count][inputs]`.
    pub x: &'a Buffer,
    /// Rows.
    pub count: usize,
    /// The weights.
    pub weight: &'a Linear,
    /// f32 `[outputs]`.
    pub bias: Option<&'a Buffer>,
    /// What is done with the result.
    pub epilogue: Epilogue,
    /// T `[count][outputs]`, or half the outputs with a gate.
    pub to: &'a Buffer,
}

/// From a fused projection to rotated queries and stored keys and values.
pub struct QkvStore<'a> {
    /// T `[count][(heads + 2 kv heads) * width]`: queries, keys, values.
    pub qkv: &'a Buffer,
    /// The rows.
    pub rows: StepRows<'a>,
    /// Query heads.
    pub heads: usize,
    /// f32 `[width]`: norm of each query head, if the model has one.
    pub query_norm: Option<&'a Buffer>,
    /// f32 `[width]`: norm of each key head, if the model has one.
    pub key_norm: Option<&'a Buffer>,
    /// For both norms.
    pub epsilon: f32,
    /// Cosines and sines, f32 `[count][2][pairs]`: element `i` of a head turns with element `i + pairs`; elements
    /// from `2 * pairs` on stay as they are.
    pub rotations: &'a Buffer,
    /// Pairs that turn.
    pub pairs: usize,
    /// Where the sequences have their pages.
    pub sequences: Sequences<'a>,
    /// Where keys and values go.
    pub kv: KvLayer<'a>,
    /// T `[count][heads * width]`: rotated queries.
    pub queries: &'a Buffer,
}

/// Softmax attention over paged KV. Each row sees positions 0 to its own; partial results are made for fixed
/// spans of positions from 0 and merged in order, so that a row's bits do not depend on how it was scheduled.
pub struct Attention<'a> {
    /// T `[count][heads * width]`.
    pub queries: &'a Buffer,
    /// The rows.
    pub rows: StepRows<'a>,
    /// Query heads; a multiple of the kv heads, consecutive ones share.
    pub heads: usize,
    /// Factor on the scores.
    pub scale: f32,
    /// Where the sequences have their pages.
    pub sequences: Sequences<'a>,
    /// Which keys and values.
    pub kv: KvLayer<'a>,
    /// T `[count][heads * width]`.
    pub to: &'a Buffer,
}

/// `to = x W`, float32.
pub struct Logits<'a> {
    /// T `[count][inputs]`.
    pub x: &'a Buffer,
    /// Rows.
    pub count: usize,
    /// The head: numbers, or 8-bit integers.
    pub weight: &'a Linear,
    /// f32 `[count][outputs]`.
    pub to: &'a Buffer,
    /// f32 `[count][outputs / 32, rounded up]`: the highest of each 32 logits, or NaN where one is not finite. Whoever
    /// looks for the highest need not look at all.
    pub peaks: Option<&'a Buffer>,
}

impl Logits<'_> {
    /// Logits of one peak.
    pub const PEAK: usize = 32;
}

/// Sets row `slot` of `counts` from a sequence's tokens.
pub struct Tally<'a> {
    /// u32 `[tokens]`: prompt and output so far.
    pub tokens: &'a Buffer,
    /// How many of them are the prompt.
    pub prompt: usize,
    /// Which slot.
    pub slot: usize,
    /// u32 `[slots][vocab]`: occurrences in the output; the top bit says that the token is in the prompt.
    pub counts: &'a Buffer,
    /// Tokens of the vocabulary.
    pub vocab: usize,
}

/// Additions to single logits, row by row: entries `first[row]..first[row + 1]` belong to a row. Negative
/// infinity forbids a token.
#[derive(Clone, Copy)]
pub struct Edits<'a> {
    /// u32 `[count + 1]`.
    pub first: &'a Buffer,
    /// u32 `[entries]`.
    pub tokens: &'a Buffer,
    /// f32 `[entries]`.
    pub values: &'a Buffer,
}

/// From raw to adjusted logits: edits, then repetition, frequency and presence penalties.
pub struct Penalties<'a> {
    /// f32 `[count][vocab]`.
    pub raw: &'a Buffer,
    /// Rows.
    pub count: usize,
    /// Tokens of the vocabulary.
    pub vocab: usize,
    /// [`SampleRow`] `[count]` as u32 words.
    pub rows: &'a Buffer,
    /// Bias and masks.
    pub edits: Edits<'a>,
    /// u32 `[slots][vocab]` as [`Tally`] makes it; needed if a row has penalties.
    pub counts: Option<&'a Buffer>,
    /// f32 `[count][vocab]`.
    pub to: &'a Buffer,
}

/// How one row is drawn; lies in a buffer as [`SampleRow::WORDS`] u32 words.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct SampleRow {
    /// The row's slot.
    pub slot: u32,
    /// The index of the token to draw in the output.
    pub position: u32,
    /// Key of the generator.
    pub seed: u64,
    /// Which of the request's answers.
    pub choice: u32,
    /// 0 takes the best token.
    pub temperature: f32,
    /// 1 keeps all.
    pub top_p: f32,
    /// 0 keeps all.
    pub top_k: u32,
    /// 0 keeps all.
    pub min_p: f32,
    /// 1 is off.
    pub repetition: f32,
    /// 0 is off.
    pub frequency: f32,
    /// 0 is off.
    pub presence: f32,
    /// What else is wanted.
    pub flags: SamplingFlags,
}

/// What else is wanted of a row.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SamplingFlags {
    /// The slot's counts are kept.
    pub tallied: bool,
    /// Log probability of the drawn token.
    pub logprob: bool,
    /// How many alternatives with theirs.
    pub top: u8,
}

impl SampleRow {
    /// u32 words of one row.
    pub const WORDS: usize = 14;

    /// Whether any penalty is on.
    pub fn has_penalties(&self) -> bool {
        self.repetition != 1.0 || self.frequency != 0.0 || self.presence != 0.0
    }

    /// As it lies in the buffer.
    pub fn to_words(&self) -> [u32; Self::WORDS] {
        let flags = u32::from(self.flags.tallied)
            | u32::from(self.flags.logprob) << 1
            | u32::from(self.flags.top) << 8;
        [
            self.slot,
            self.position,
            self.seed as u32,
            (self.seed >> 32) as u32,
            self.choice,
            self.temperature.to_bits(),
            self.top_p.to_bits(),
            self.top_k,
            self.min_p.to_bits(),
            self.repetition.to_bits(),
            self.frequency.to_bits(),
            self.presence.to_bits(),
            flags,
            0,
        ]
    }

    /// Read back; the inverse of [`SampleRow::to_words`].
    pub fn from_words(words: &[u32]) -> SampleRow {
        SampleRow {
            slot: words[0],
            position: words[1],
            seed: u64::from(words[2]) | u64::from(words[3]) << 32,
            choice: words[4],
            temperature: f32::from_bits(words[5]),
            top_p: f32::from_bits(words[6]),
            top_k: words[7],
            min_p: f32::from_bits(words[8]),
            repetition: f32::from_bits(words[9]),
            frequency: f32::from_bits(words[10]),
            presence: f32::from_bits(words[11]),
            flags: SamplingFlags {
                tallied: words[12] & 1 != 0,
                logprob: words[12] & 2 != 0,
                top: (words[12] >> 8) as u8,
            },
        }
    }
}

/// Draws a token per row from adjusted logits, reports log probabilities of the raw ones.
///
/// Greedy takes the highest logit, of equals the lowest id. Otherwise logits are divided by the temperature, then
/// cut: `min_p`, then `top_k`, then `top_p` of what is left; ties at a cut are kept from the lowest id on. The
/// draw takes one uniform number from Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3",
/// 2011) with the seed as key and (position, choice) as counter.
pub struct SampleCall<'a> {
    /// f32 `[count][vocab]`: what to report log probabilities of.
    pub raw: &'a Buffer,
    /// f32 `[count][vocab]`: what to draw from.
    pub adjusted: &'a Buffer,
    /// What [`Logits`] says of the raw ones.
    pub peaks: Option<&'a Buffer>,
    /// Rows.
    pub count: usize,
    /// Tokens of the vocabulary.
    pub vocab: usize,
    /// [`SampleRow`] `[count]` as u32 words.
    pub rows: &'a Buffer,
    /// u32 `[slots]`: the drawn token goes here too, for [`TOKEN_PREVIOUS`].
    pub previous: &'a Buffer,
    /// u32 `[slots][vocab]` of [`Tally`]: counted up for rows whose slot is tallied.
    pub counts: Option<&'a Buffer>,
    /// u32 `[count][SampleCall::WORDS]`: status, token, log probability, then pairs (token, log probability).
    pub to: &'a Buffer,
}

impl SampleCall<'_> {
    /// u32 words of one row of the result.
    pub const WORDS: usize = 3 + 2 * TOP_LOGPROBS_MAX;
    /// Status of a row that was drawn.
    pub const DRAWN: u32 = 0;
    /// Status of a row with a raw logit that is not finite, with an adjusted one that is NaN or infinite, or whose
    /// every token is forbidden; nothing was drawn.
    pub const NOT_FINITE: u32 = 1;
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn a_sample_row_reads_back_as_it_was_written(
            seed: u64, slot: u32, position: u32, top_k: u32, top: u8, tallied: bool, logprob: bool,
            temperature in 0.0f32..10.0, top_p in 0.0f32..1.0,
        ) {
            let row = SampleRow {
                slot, position, seed, choice: 3, temperature, top_p, top_k, min_p: 0.25, repetition: 1.5,
                frequency: -0.5, presence: 2.0, flags: SamplingFlags { tallied, logprob, top },
            };
            prop_assert_eq!(SampleRow::from_words(&row.to_words()), row);
        }
    }

    #[test]
    fn only_a_penalty_that_changes_something_counts_as_one() {
        let off = SampleRow { repetition: 1.0, ..SampleRow::default() };
        assert!(!off.has_penalties());
        assert!(SampleRow { presence: -0.1, ..off }.has_penalties());
    }
}
