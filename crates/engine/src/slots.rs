//! Persistent slots: what stays of a sequence from step to step. The host keeps sampling parameters; the device
//! keeps the token each slot drew last and, where penalties need them, its token counts.

use tandem_batching::SlotOpen;
use tandem_device::{
    Buffer, Device, Element, Error, SampleRow, SamplingFlags, Stream, TOP_LOGPROBS_MAX, Tally,
};
use tandem_types::TokenId;

const SLOTS_FIRST: usize = 16;

/// All slots.
pub(crate) struct Slots {
    vocab: usize,
    open: Vec<Option<Slot>>,
    previous: Buffer,
    counts: Option<Buffer>,
    /// Tokens on their way into counts.
    history: Option<Buffer>,
}

struct Slot {
    prompt_tokens: u32,
    /// Everything but the position.
    row: SampleRow,
    bias: Vec<(TokenId, f32)>,
    suppress: Vec<TokenId>,
    min_tokens: u32,
    drawn: bool,
}

/// How one row draws.
pub(crate) struct Draw<'a> {
    pub(crate) row: SampleRow,
    bias: &'a [(TokenId, f32)],
    suppress: &'a [TokenId],
}

impl Draw<'_> {
    /// What is added to single logits: bias, then negative infinity for tokens that may not be drawn yet.
    pub(crate) fn edits(&self) -> impl Iterator<Item = (TokenId, f32)> {
        let forbidden = self.suppress.iter().map(|token| (*token, f32::NEG_INFINITY));
        self.bias.iter().copied().chain(forbidden)
    }
}

impl Slots {
    pub(crate) fn new(device: &dyn Device, vocab: usize) -> Result<Slots, Error> {
        let previous = device.allocate(Element::U32, SLOTS_FIRST)?;
        Ok(Slots { vocab, open: Vec::new(), previous, counts: None, history: None })
    }

    /// u32 `[slots]`: the token each slot drew last.
    pub(crate) fn previous(&self) -> &Buffer {
        &self.previous
    }

    /// u32 `[slots][vocab]`, once a slot needed it.
    pub(crate) fn counts(&self) -> Option<&Buffer> {
        self.counts.as_ref()
    }

    pub(crate) fn prompt_tokens(&self, slot: u32) -> Option<u32> {
        self.get(slot).map(|slot| slot.prompt_tokens)
    }

    pub(crate) fn has_drawn(&self, slot: u32) -> bool {
        self.get(slot).is_some_and(|slot| slot.drawn)
    }

    pub(crate) fn flags(&self, slot: u32) -> Option<SamplingFlags> {
        self.get(slot).map(|slot| slot.row.flags)
    }

    fn get(&self, slot: u32) -> Option<&Slot> {
        self.open.get(slot as usize)?.as_ref()
    }

    /// Notes that the slot's next token is drawn by a submitted step.
    pub(crate) fn draws(&mut self, slot: u32) {
        if let Some(Some(slot)) = self.open.get_mut(slot as usize) {
            slot.drawn = true;
        }
    }

    pub(crate) fn close(&mut self, slot: u32) {
        if let Some(slot) = self.open.get_mut(slot as usize) {
            *slot = None;
        }
    }

    pub(crate) fn open(
        &mut self,
        spec: &SlotOpen,
        device: &dyn Device,
        stream: &mut dyn Stream,
    ) -> Result<(), Error> {
        let at = spec.slot as usize;
        if at >= self.open.len() {
            self.open.resize_with(at + 1, || None);
        }
        if self.previous.len() <= at {
            self.previous = larger(&self.previous, at + 1, 1, device, stream)?;
        }
        let sampling = &spec.sampling;
        let mut row = SampleRow {
            slot: spec.slot,
            position: 0,
            seed: sampling.seed,
            choice: spec.choice.0,
            temperature: sampling.temperature,
            top_p: sampling.top_p,
            top_k: sampling.top_k,
            min_p: sampling.min_p,
            repetition: sampling.repetition_penalty,
            frequency: sampling.frequency_penalty,
            presence: sampling.presence_penalty,
            flags: SamplingFlags {
                tallied: false,
                logprob: sampling.logprobs.is_some(),
                top: sampling.logprobs.unwrap_or(0).min(TOP_LOGPROBS_MAX as u32) as u8,
            },
        };
        row.flags.tallied = row.has_penalties();
        if row.flags.tallied {
            self.tally(spec, device, stream)?;
        }
        // An id beyond the vocabulary can never be drawn, so what is said about it changes nothing.
        let known = |token: &TokenId| (*token as usize) < self.vocab;
        self.open[at] = Some(Slot {
            prompt_tokens: spec.prompt_tokens,
            row,
            bias: sampling.logit_bias.iter().copied().filter(|(token, _)| known(token)).collect(),
            suppress: spec.stop_suppress.iter().copied().filter(known).collect(),
            min_tokens: spec.min_tokens,
            drawn: false,
        });
        Ok(())
    }

    fn tally(&mut self, spec: &SlotOpen, device: &dyn Device, stream: &mut dyn Stream) -> Result<(), Error> {
        let slots = self.previous.len();
        self.counts = Some(match self.counts.take() {
            None => device.allocate(Element::U32, slots * self.vocab)?,
            Some(counts) if counts.len() < slots * self.vocab => {
                larger(&counts, slots, self.vocab, device, stream)?
            }
            Some(counts) => counts,
        });
        let history = match self.history.take().filter(|history| history.len() >= spec.tokens.len()) {
            Some(history) => history,
            None => device.allocate(Element::U32, spec.tokens.len().next_power_of_two())?,
        };
        let bytes: Vec<u8> = spec.tokens.iter().flat_map(|token| token.to_ne_bytes()).collect();
        stream.upload(&history, &bytes);
        stream.tally(Tally {
            tokens: &history.part(0..spec.tokens.len()),
            prompt: spec.prompt_tokens as usize,
            slot: spec.slot as usize,
            counts: self.counts.as_ref().expect("just made"),
            vocab: self.vocab,
        });
        self.history = Some(history);
        Ok(())
    }

    /// How the token after `known` tokens of an open slot is drawn.
    pub(crate) fn draw(&self, slot: u32, known: u32) -> Draw<'_> {
        let slot = self.get(slot).expect("rows of open slots passed the check");
        let position = known - slot.prompt_tokens;
        let suppress = if position < slot.min_tokens { &slot.suppress[..] } else { &[] };
        Draw { row: SampleRow { position, ..slot.row }, bias: &slot.bias, suppress }
    }
}

/// A larger buffer of at least `rows` rows with the same content at its start.
fn larger(
    old: &Buffer,
    rows: usize,
    width: usize,
    device: &dyn Device,
    stream: &mut dyn Stream,
) -> Result<Buffer, Error> {
    let new = device.allocate(old.element(), rows.next_power_of_two() * width)?;
    stream.copy(old, &new.part(0..old.len()));
    Ok(new)
}
