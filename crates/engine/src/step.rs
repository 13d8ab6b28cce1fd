//! From a plan to the arrays of a step: checked, then packed into one buffer that goes to the device in one copy.

use tandem_batching::{Input, Plan, Row, Score};
use tandem_device::{Buffer, Device, Edits, Element, Error, SampleRow, Sequences, Stream, TOKEN_PREVIOUS};
use tandem_types::blocks_for;

use crate::score::{TargetRanges, Targets};
use crate::slots::Slots;

/// What a plan may name.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Limits {
    pub(crate) vocab: u32,
    pub(crate) context_tokens: u32,
    pub(crate) groups: usize,
    pub(crate) pages: u32,
}

/// Says what is wrong with a plan's rows, if anything is: a plan that passes can run without harm to anything but
/// its own pages.
pub(crate) fn check(plan: &Plan, slots: &Slots, limits: Limits) -> Result<(), String> {
    for slot in &plan.open {
        if let Some(token) = slot.tokens.iter().find(|token| **token >= limits.vocab) {
            return Err(format!("slot {} has token {token} of a vocabulary of {}", slot.slot, limits.vocab));
        }
        if slot.prompt_tokens as usize > slot.tokens.len() {
            return Err(format!(
                "slot {} has a prompt of {} in {} tokens",
                slot.slot,
                slot.prompt_tokens,
                slot.tokens.len()
            ));
        }
    }
    let mut seen = std::collections::BTreeSet::new();
    for row in &plan.rows {
        check_row(plan, row, slots, limits).map_err(|fact| format!("the row of slot {} {fact}", row.slot))?;
        if !seen.insert(row.slot) {
            return Err(format!("slot {} has two rows", row.slot));
        }
    }
    Ok(())
}

fn check_row(plan: &Plan, row: &Row, slots: &Slots, limits: Limits) -> Result<(), String> {
    let opened = plan.open.iter().find(|slot| slot.slot == row.slot);
    let prompt_tokens = match opened {
        Some(slot) => slot.prompt_tokens,
        None if plan.close.contains(&row.slot) => return Err("is of a slot that the plan closes".to_owned()),
        None => slots.prompt_tokens(row.slot).ok_or("is of a slot that is not open")?,
    };
    if row.count == 0 {
        return Err("computes no token".to_owned());
    }
    let end = row.start.checked_add(row.count).filter(|end| *end <= limits.context_tokens);
    let end = end.ok_or_else(|| format!("ends beyond {} tokens of context", limits.context_tokens))?;
    match &row.input {
        Input::Known(tokens) => {
            if tokens.len() != row.count as usize {
                return Err(format!("has {} tokens for {} positions", tokens.len(), row.count));
            }
            if let Some(token) = tokens.iter().find(|token| **token >= limits.vocab) {
                return Err(format!("has token {token} of a vocabulary of {}", limits.vocab));
            }
        }
        Input::Previous if row.count != 1 => {
            return Err("has one previous token for more positions".to_owned());
        }
        Input::Previous if slots.has_drawn(row.slot) && opened.is_none() => {}
        Input::Previous => return Err("goes on from a token that its slot never drew".to_owned()),
    }
    if row.sample && end < prompt_tokens {
        return Err("draws a token inside the prompt".to_owned());
    }
    if let Some(Score { first, targets, .. }) = &row.score {
        if targets.is_empty() {
            return Err("scores no token".to_owned());
        }
        let last = u64::from(*first) + targets.len() as u64 - 1;
        if *first <= row.start || last > u64::from(end) {
            return Err(format!("scores tokens {first} to {last}, which do not follow its own"));
        }
        if let Some(token) = targets.iter().find(|token| **token >= limits.vocab) {
            return Err(format!("scores token {token} of a vocabulary of {}", limits.vocab));
        }
    }
    if row.pages.len() != limits.groups {
        return Err(format!("has pages of {} groups; the model has {}", row.pages.len(), limits.groups));
    }
    for pages in &row.pages {
        if pages.len() < blocks_for(end) as usize {
            return Err(format!("has {} pages for {end} tokens", pages.len()));
        }
        if let Some(page) = pages.iter().find(|page| **page >= limits.pages) {
            return Err(format!("names page {page} of {}", limits.pages));
        }
    }
    Ok(())
}

/// The arrays of a step on the device; parts of one buffer.
pub(crate) struct StepBuffers {
    /// Token rows.
    pub(crate) count: usize,
    pub(crate) tokens: Buffer,
    pub(crate) positions: Buffer,
    pub(crate) sequences: Buffer,
    pub(crate) slots: Buffer,
    /// Per KV group: the page tables, and their columns.
    tables: Vec<(Buffer, usize)>,
    /// Rows that draw.
    pub(crate) draws: usize,
    pub(crate) draw_rows: Buffer,
    pub(crate) sampling: Buffer,
    /// What is scored.
    pub(crate) targets: Targets,
    /// Whether any logit is changed before the draw.
    pub(crate) adjusts: bool,
    edits: [Buffer; 3],
}

impl StepBuffers {
    pub(crate) fn sequences_of(&self, group: usize) -> Sequences<'_> {
        let (pages, stride) = &self.tables[group];
        Sequences::Tables { pages, stride: *stride }
    }

    pub(crate) fn edits(&self) -> Edits<'_> {
        let [first, tokens, values] = &self.edits;
        Edits { first, tokens, values }
    }
}

/// The one buffer, as large as the largest step so far.
#[derive(Default)]
pub(crate) struct Packed {
    host: Vec<u32>,
    device: Option<Buffer>,
}

impl Packed {
    /// Packs a checked plan and copies it to the device.
    pub(crate) fn upload(
        &mut self,
        plan: &Plan,
        slots: &Slots,
        groups: usize,
        device: &dyn Device,
        stream: &mut dyn Stream,
    ) -> Result<StepBuffers, Error> {
        let mut words = Words { host: std::mem::take(&mut self.host) };
        words.host.clear();
        let rows = || plan.rows.iter();
        let tokens = words.put(rows().flat_map(|row| {
            (0..row.count as usize).map(move |at| match &row.input {
                Input::Known(tokens) => tokens[at],
                Input::Previous => TOKEN_PREVIOUS,
            })
        }));
        let positions = words.put(rows().flat_map(|row| row.start..row.start + row.count));
        let sequences = words
            .put(rows().enumerate().flat_map(|(at, row)| std::iter::repeat_n(at as u32, row.count as usize)));
        let slot_numbers = words.put(rows().map(|row| row.slot));
        let tables: Vec<_> = (0..groups)
            .map(|group| {
                let blocks = |row: &Row| blocks_for(row.start + row.count) as usize;
                let stride = rows().map(blocks).max().unwrap_or(1);
                let table = words.put(rows().flat_map(|row| {
                    let used = &row.pages[group][..blocks(row)];
                    used.iter().copied().chain(std::iter::repeat_n(0, stride - used.len()))
                }));
                (table, stride)
            })
            .collect();
        let mut end = 0;
        let draw_rows = words.put(rows().filter_map(|row| {
            end += row.count;
            row.sample.then_some(end - 1)
        }));
        let drawing: Vec<_> =
            rows().filter(|row| row.sample).map(|row| slots.draw(row.slot, row.start + row.count)).collect();
        let sampling = words.put(drawing.iter().flat_map(|draw| draw.row.to_words()));
        let mut entries = 0;
        let first = words.put(std::iter::once(0).chain(drawing.iter().map(|draw| {
            entries += draw.edits().count() as u32;
            entries
        })));
        let edit_tokens = words.put(drawing.iter().flat_map(|draw| draw.edits().map(|(token, _)| token)));
        let values =
            words.put(drawing.iter().flat_map(|draw| draw.edits().map(|(_, value)| value.to_bits())));
        let targets = TargetRanges::put(plan, &mut words);
        let adjusts = entries > 0 || drawing.iter().any(|draw| draw.row.has_penalties());

        let packed = self.copy(words.host, device, stream)?;
        let part = |range: &std::ops::Range<usize>| packed.part(range.clone());
        let views = StepBuffers {
            count: tokens.len(),
            tokens: part(&tokens),
            positions: part(&positions),
            sequences: part(&sequences),
            slots: part(&slot_numbers),
            tables: tables.iter().map(|(table, stride)| (part(table), *stride)).collect(),
            draws: draw_rows.len(),
            draw_rows: part(&draw_rows),
            sampling: part(&sampling),
            targets: targets.of(&packed),
            adjusts,
            edits: [part(&first), part(&edit_tokens), part(&values).seen_as(Element::F32)],
        };
        debug_assert_eq!(sampling.len(), views.draws * SampleRow::WORDS);
        Ok(views)
    }

    fn copy(
        &mut self,
        host: Vec<u32>,
        device: &dyn Device,
        stream: &mut dyn Stream,
    ) -> Result<Buffer, Error> {
        let packed = match self.device.take().filter(|buffer| buffer.len() >= host.len()) {
            Some(buffer) => buffer,
            None => device.allocate(Element::U32, host.len().next_power_of_two())?,
        };
        let bytes: Vec<u8> = host.iter().flat_map(|word| word.to_ne_bytes()).collect();
        stream.upload(&packed, &bytes);
        self.host = host;
        Ok(self.device.insert(packed).clone())
    }
}

/// Words being packed.
pub(crate) struct Words {
    host: Vec<u32>,
}

impl Words {
    /// Appends an array; says where it lies.
    pub(crate) fn put(&mut self, words: impl Iterator<Item = u32>) -> std::ops::Range<usize> {
        let first = self.host.len();
        self.host.extend(words);
        first..self.host.len()
    }
}
