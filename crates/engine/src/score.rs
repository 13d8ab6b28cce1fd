//! Scores of prompts: log probabilities of tokens that are known already.
//!
//! Each is drawn by force: with a bias that no logit outweighs the device's own draw can take nothing else, and it
//! reports what it always does of the raw logits. So a score has the bits that drawing the token would have had,
//! on any device, and whatever the chunk, the batch, or the number of threads.

use tandem_batching::{Plan, Score};
use tandem_device::{
    Buffer, Device, Download, Edits, Element, Error, Logits, Penalties, SampleCall, SampleRow, SamplingFlags,
    Stream, TOP_LOGPROBS_MAX,
};
use tandem_types::Sampled;

use crate::decoder::Decoder;
use crate::step::Words;

/// Rows whose logits are there at a time: a prompt's would be hundreds of megabytes.
const BLOCK_ROWS: usize = 32;
/// Added to a target's logit. Logits are many orders of magnitude below, and the sum is far from infinity.
const FORCE: f32 = 1e30;

/// Where the arrays of a step's targets lie among its words.
pub(crate) struct TargetRanges {
    rows: std::ops::Range<usize>,
    sampling: std::ops::Range<usize>,
    first: std::ops::Range<usize>,
    tokens: std::ops::Range<usize>,
    values: std::ops::Range<usize>,
}

impl TargetRanges {
    /// Packs the targets of a checked plan, row after row.
    pub(crate) fn put(plan: &Plan, words: &mut Words) -> TargetRanges {
        let mut begins = 0;
        let scores: Vec<(u32, &Score)> = plan
            .rows
            .iter()
            .filter_map(|row| {
                let begin = begins;
                begins += row.count;
                // The token row that computes the position before the first target.
                row.score.as_ref().map(|score| (begin + score.first - 1 - row.start, score))
            })
            .collect();
        let each = || {
            scores
                .iter()
                .flat_map(|(row, score)| (*row..).zip(&score.targets).zip(std::iter::repeat(score.top)))
        };
        let draw = |at: usize, top: u32| SampleRow {
            // Rows of a block are drawn at the same time.
            slot: (at % BLOCK_ROWS) as u32,
            top_p: 1.0,
            repetition: 1.0,
            flags: SamplingFlags {
                tallied: false,
                logprob: true,
                top: top.min(TOP_LOGPROBS_MAX as u32) as u8,
            },
            ..SampleRow::default()
        };
        let count = each().count();
        TargetRanges {
            rows: words.put(each().map(|((row, _), _)| row)),
            sampling: words.put(each().enumerate().flat_map(|(at, (_, top))| draw(at, top).to_words())),
            // One bias per row, in every block.
            first: words.put((0..=count.min(BLOCK_ROWS) as u32).filter(|_| count > 0)),
            tokens: words.put(each().map(|((_, token), _)| *token)),
            values: words.put(std::iter::repeat_n(FORCE.to_bits(), count)),
        }
    }

    /// The arrays themselves.
    pub(crate) fn of(&self, packed: &Buffer) -> Targets {
        let part = |range: &std::ops::Range<usize>| packed.part(range.clone());
        Targets {
            count: self.rows.len(),
            rows: part(&self.rows),
            sampling: part(&self.sampling),
            first: part(&self.first),
            tokens: part(&self.tokens),
            values: part(&self.values).seen_as(Element::F32),
        }
    }
}

/// The tokens that a step scores, on the device.
pub(crate) struct Targets {
    pub(crate) count: usize,
    /// u32 `[count]`: the token row before each.
    rows: Buffer,
    /// [`SampleRow`] `[count]`.
    sampling: Buffer,
    /// u32 `[rows of a block + 1]`: 0, 1, 2, ...
    first: Buffer,
    /// u32 `[count]`.
    tokens: Buffer,
    /// f32 `[count]`.
    values: Buffer,
}

/// Scores what a decoder has just run over. Its buffers are made when a prompt is scored for the first time.
#[derive(Default)]
pub(crate) struct Scorer {
    block: Option<Block>,
    results: Option<Buffer>,
}

/// Buffers from hidden rows to scores, of one block.
struct Block {
    rows: usize,
    gathered: Buffer,
    normed: Buffer,
    raw: Buffer,
    peaks: Buffer,
    forced: Buffer,
    /// Where a draw notes its token for the next step; nothing comes after a target.
    previous: Buffer,
}

impl Scorer {
    /// Begins to score a step's targets, block by block, from the hidden rows of the decoder's last run. `element`
    /// is that of activations.
    pub(crate) fn score(
        &mut self,
        targets: &Targets,
        decoder: &Decoder,
        element: Element,
        device: &dyn Device,
        stream: &mut dyn Stream,
    ) -> Result<Box<dyn Download>, Error> {
        let vocab = decoder.vocab();
        let rows = targets.count.min(BLOCK_ROWS).next_power_of_two();
        let block = match self.block.take().filter(|block| block.rows >= rows) {
            Some(block) => block,
            None => Block::new(device, element, decoder.hidden(), vocab, rows)?,
        };
        let block = self.block.insert(block);
        let words = targets.count * SampleCall::WORDS;
        let results = match self.results.take().filter(|results| results.len() >= words) {
            Some(results) => results,
            None => device.allocate(Element::U32, words.next_power_of_two())?,
        };
        let results = self.results.insert(results);
        for begin in (0..targets.count).step_by(BLOCK_ROWS) {
            let count = BLOCK_ROWS.min(targets.count - begin);
            let part = |buffer: &Buffer, width: usize| buffer.part(begin * width..(begin + count) * width);
            let sampling = part(&targets.sampling, SampleRow::WORDS);
            let between = [&block.gathered, &block.normed];
            decoder.logits(stream, &part(&targets.rows, 1), count, between, [&block.raw, &block.peaks]);
            stream.penalties(Penalties {
                raw: &block.raw,
                count,
                vocab,
                rows: &sampling,
                edits: Edits {
                    first: &targets.first.part(0..count + 1),
                    tokens: &part(&targets.tokens, 1),
                    values: &part(&targets.values, 1),
                },
                counts: None,
                to: &block.forced,
            });
            stream.sample(SampleCall {
                raw: &block.raw,
                adjusted: &block.forced,
                peaks: Some(&block.peaks),
                count,
                vocab,
                rows: &sampling,
                previous: &block.previous,
                counts: None,
                to: &part(results, SampleCall::WORDS),
            });
        }
        Ok(stream.download(&results.part(0..words)))
    }
}

impl Block {
    fn new(
        device: &dyn Device,
        element: Element,
        hidden: usize,
        vocab: usize,
        rows: usize,
    ) -> Result<Block, Error> {
        Ok(Block {
            rows,
            gathered: device.allocate(element, rows * hidden)?,
            normed: device.allocate(element, rows * hidden)?,
            raw: device.allocate(Element::F32, rows * vocab)?,
            peaks: device.allocate(Element::F32, rows * vocab.div_ceil(Logits::PEAK))?,
            forced: device.allocate(Element::F32, rows * vocab)?,
            previous: device.allocate(Element::U32, rows)?,
        })
    }
}

/// The scores of a row's targets, of which each has a row of the result; up to the first whose logits were not finite.
pub(crate) fn scores<'a>(
    score: &Score,
    vocab: usize,
    mut results: impl Iterator<Item = &'a [u32]>,
) -> Vec<Sampled> {
    let top = (score.top as usize).min(TOP_LOGPROBS_MAX).min(vocab);
    // All are taken: what is left belongs to the next row.
    let words: Vec<&[u32]> = results.by_ref().take(score.targets.len()).collect();
    let scored = score.targets.iter().zip(words).map_while(|(&token, words)| {
        let drawn = words[0] == SampleCall::DRAWN && words[1] == token;
        drawn.then(|| Sampled {
            token,
            logprob: Some(f32::from_bits(words[2])),
            top: words[3..]
                .chunks_exact(2)
                .take(top)
                .map(|pair| (pair[0], f32::from_bits(pair[1])))
                .collect(),
        })
    });
    scored.collect()
}
