//! The real engine: loads a checkpoint and runs plans on a device.

use std::collections::VecDeque;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use tandem_batching::{Outcome, Plan, Row, RowOutcome, Score};
use tandem_device::{
    Buffer, Device, Download, Element, Error, HEAD_WIDTH_MAX, KvPages, Logits, Penalties, SampleCall, Stream,
};
use tandem_memory::Region;
use tandem_models::{AttentionSpec, Checkpoint, KvGroup};
use tandem_types::{BLOCK_TOKENS, KvForm, KvIdentity, Sampled, Time, TokenId};

use crate::decoder::Decoder;
use crate::estimate::Estimate;
use crate::score::{self, Scorer};
use crate::slots::Slots;
use crate::step::{self, Limits, Packed, StepBuffers};
use crate::{Dtype, Engine, Facts, LoadError, Options, StepError, weights};

/// A model on a device, running plans.
pub struct DecoderEngine {
    facts: Facts,
    limits: Limits,
    device: Arc<dyn Device>,
    stream: Box<dyn Stream>,
    region: Arc<Region>,
    /// Where each group's pages begin in the region, in bytes.
    group_offsets: Vec<u64>,
    decoder: Decoder,
    slots: Slots,
    packed: Packed,
    draws: DrawBuffers,
    scorer: Scorer,
    submitted: VecDeque<Submitted>,
    estimate: Estimate,
}

/// A step in flight.
struct Submitted {
    plan: u64,
    rows: Vec<SubmittedRow>,
    tokens: usize,
    at: Time,
    result: Result<Results, String>,
}

/// A row of a step in flight.
struct SubmittedRow {
    slot: u32,
    count: u32,
    /// What is drawn.
    wanted: Option<Wanted>,
    /// What is scored.
    score: Option<Score>,
}

/// What a step brings to the host: a row of [`SampleCall::WORDS`] per draw, and one per target of a score.
#[derive(Default)]
struct Results {
    drawn: Option<Box<dyn Download>>,
    scored: Option<Box<dyn Download>>,
}

impl Results {
    fn ready(&self) -> bool {
        [&self.drawn, &self.scored].into_iter().flatten().all(|download| download.ready())
    }

    /// The rows of both, waited for.
    fn take(self) -> Result<[Vec<u32>; 2], Error> {
        let words = |download: Option<Box<dyn Download>>| -> Result<Vec<u32>, Error> {
            let bytes = download.map_or(Ok(Vec::new()), Download::take)?;
            Ok(bytes.as_chunks::<4>().0.iter().map(|bytes| u32::from_ne_bytes(*bytes)).collect())
        };
        Ok([words(self.drawn)?, words(self.scored)?])
    }
}

/// What a drawn token comes with.
#[derive(Clone, Copy)]
struct Wanted {
    logprob: bool,
    top: usize,
}

/// Buffers from hidden rows to drawn tokens, as large as the largest step so far.
struct DrawBuffers {
    rows: usize,
    gathered: Buffer,
    normed: Buffer,
    raw: Buffer,
    peaks: Buffer,
    adjusted: Buffer,
    drawn: Buffer,
}

impl DecoderEngine {
    /// Loads a checkpoint folder onto the CPU.
    pub fn load(dir: &Path, options: Options) -> Result<DecoderEngine, LoadError> {
        let device = tandem_kernels::open("cpu", options.threads)
            .map_err(|error| LoadError::Option(error.to_string()))?;
        DecoderEngine::load_on(device, dir, options)
    }

    /// Loads a checkpoint folder onto a device.
    pub fn load_on(
        device: Arc<dyn Device>,
        dir: &Path,
        options: Options,
    ) -> Result<DecoderEngine, LoadError> {
        if options.depth > 1 {
            return Err(LoadError::Option(format!(
                "depth {} is not supported; expected 0 or 1",
                options.depth
            )));
        }
        let checkpoint = tandem_models::open(dir)?;
        let model = dir.display().to_string();
        let refused = |reason: String| LoadError::Unsupported { model: model.clone(), reason };
        let element = element(options.dtype, checkpoint.dtype());
        let spec = checkpoint.spec();
        for layer in &spec.layers {
            let AttentionSpec::Full { head_dim, .. } = layer.attention;
            if head_dim > HEAD_WIDTH_MAX || head_dim % 2 != 0 {
                return Err(refused(format!(
                    "heads of {head_dim} elements; supported are even sizes up to {HEAD_WIDTH_MAX}"
                )));
            }
        }

        // Memory before weights: a pool that is too small should not take minutes to find out.
        let groups = spec.kv_groups(kv_element(element));
        let page_bytes: Vec<u64> = groups.iter().map(page_bytes).collect();
        let block_bytes: u64 = page_bytes.iter().sum();
        let pages = u32::try_from(options.kv_bytes / block_bytes).unwrap_or(u32::MAX);
        if pages == 0 {
            return Err(LoadError::KvMemory { model, given: options.kv_bytes, needed: block_bytes });
        }
        let bytes = u64::from(pages) * block_bytes;
        let region =
            map(bytes, options.shared_memory).map_err(|source| LoadError::Memory { bytes, source })?;
        let region = Arc::new(region);
        let memory = device.map(region.clone(), element).map_err(|error| refused(error.to_string()))?;

        let (kv, group_offsets) = kv_pages(&groups, &page_bytes, pages, &memory);
        // The digest is another pass over the same bytes: at the same time it costs a second core, not a second time.
        let (digest, packed) = std::thread::scope(|scope| {
            let digest = scope.spawn(|| checkpoint.digest());
            let packed =
                weights::pack(&checkpoint, &*device, element, options.quantization, &*options.progress);
            (digest.join().expect("reading bytes does not panic"), packed)
        });
        let packed = packed?;
        let identity = identity(&checkpoint, digest, element, &*device, &packed.forms());
        let decoder =
            Decoder::new(spec, device.clone(), element, packed, kv, places(&groups, spec.layers.len()))
                .map_err(|error| refused(error.to_string()))?;
        let vocab = decoder.vocab();
        let slots = Slots::new(&*device, vocab).map_err(|error| refused(error.to_string()))?;
        let draws = DrawBuffers::new(&*device, element, decoder.hidden(), vocab, 1)
            .map_err(|error| refused(error.to_string()))?;
        let facts = Facts {
            model: checkpoint.name().to_owned(),
            identity,
            form: KvForm {
                layout: "rows".to_owned(),
                element: element.as_str().to_owned(),
                page_bytes,
                shards: 1,
            },
            vocab: vocab as u32,
            context_tokens: spec.context_tokens,
            kv: groups.iter().map(|group| group.spec).collect(),
            pages,
            depth: options.depth,
            kernel: device.name().to_owned(),
        };
        let limits =
            Limits { vocab: facts.vocab, context_tokens: facts.context_tokens, groups: groups.len(), pages };
        let elements: u64 =
            spec.weights().iter().map(|weight| weight.shape.iter().product::<usize>() as u64).sum();
        let stream = device.stream();
        Ok(DecoderEngine {
            facts,
            limits,
            stream,
            region,
            group_offsets,
            decoder,
            slots,
            packed: Packed::default(),
            draws,
            scorer: Scorer::default(),
            submitted: VecDeque::new(),
            estimate: Estimate::new(elements),
            device,
        })
    }

    /// Does a plan's work as far as the host can; what comes back arrives when the device has done it.
    fn start(&mut self, plan: &Plan) -> Result<Results, String> {
        step::check(plan, &self.slots, self.limits)?;
        self.queue(plan).map_err(|error| error.to_string())
    }

    fn queue(&mut self, plan: &Plan) -> Result<Results, Error> {
        let (device, stream) = (&*self.device, &mut *self.stream);
        for slot in &plan.close {
            self.slots.close(*slot);
        }
        for slot in &plan.open {
            self.slots.open(slot, device, stream)?;
        }
        if plan.rows.is_empty() {
            return Ok(Results::default());
        }
        let step = self.packed.upload(plan, &self.slots, self.limits.groups, device, stream)?;
        self.decoder.run(stream, &step, self.slots.previous())?;
        let mut results = Results::default();
        if step.targets.count > 0 {
            let element = self.draws.normed.element();
            results.scored =
                Some(self.scorer.score(&step.targets, &self.decoder, element, device, stream)?);
        }
        if step.draws > 0 {
            results.drawn = Some(self.draw(&step)?);
        }
        for row in plan.rows.iter().filter(|row| row.sample) {
            self.slots.draws(row.slot);
        }
        Ok(results)
    }

    /// From hidden rows to drawn tokens.
    fn draw(&mut self, step: &StepBuffers) -> Result<Box<dyn Download>, Error> {
        let (count, vocab) = (step.draws, self.decoder.vocab());
        self.make_room(count)?;
        let (buffers, stream) = (&self.draws, &mut *self.stream);
        let between = [&buffers.gathered, &buffers.normed];
        self.decoder.logits(stream, &step.draw_rows, count, between, [&buffers.raw, &buffers.peaks]);
        let adjusted = if step.adjusts { &buffers.adjusted } else { &buffers.raw };
        if step.adjusts {
            stream.penalties(Penalties {
                raw: &buffers.raw,
                count,
                vocab,
                rows: &step.sampling,
                edits: step.edits(),
                counts: self.slots.counts(),
                to: adjusted,
            });
        }
        stream.sample(SampleCall {
            raw: &buffers.raw,
            adjusted,
            peaks: Some(&buffers.peaks),
            count,
            vocab,
            rows: &step.sampling,
            previous: self.slots.previous(),
            counts: self.slots.counts(),
            to: &buffers.drawn,
        });
        Ok(stream.download(&buffers.drawn.part(0..count * SampleCall::WORDS)))
    }

    /// What the row's slot wants to know of a drawn token, if the row draws one.
    fn wanted(&self, row: &Row) -> Option<Wanted> {
        let flags = self.slots.flags(row.slot).filter(|_| row.sample)?;
        Some(Wanted { logprob: flags.logprob, top: usize::from(flags.top).min(self.decoder.vocab()) })
    }

    fn make_room(&mut self, count: usize) -> Result<(), Error> {
        if count > self.draws.rows {
            let rows = count.next_power_of_two();
            let (element, hidden) = (self.draws.normed.element(), self.decoder.hidden());
            self.draws = DrawBuffers::new(&*self.device, element, hidden, self.decoder.vocab(), rows)?;
        }
        Ok(())
    }

    /// Logits of every row of a plan, `[token row][vocabulary]`, for comparing with a reference: the plan runs as
    /// `submit` would run it, but draws nothing.
    pub fn logits(&mut self, plan: &Plan) -> Result<Vec<Vec<f32>>, StepError> {
        let failed = |reason: String| StepError { plan: plan.id, reason };
        let mut plan = plan.clone();
        for row in &mut plan.rows {
            row.sample = false;
            row.score = None;
        }
        self.start(&plan).map_err(failed)?;
        self.rows_as_logits(plan.rows.iter().map(|row| row.count).sum())
            .map_err(|error| failed(error.to_string()))
    }

    fn rows_as_logits(&mut self, count: u32) -> Result<Vec<Vec<f32>>, Error> {
        self.make_room(count as usize)?;
        let rows = self.device.allocate(Element::U32, count as usize)?;
        let bytes: Vec<u8> = (0..count).flat_map(u32::to_ne_bytes).collect();
        self.stream.upload(&rows, &bytes);
        let (buffers, vocab) = (&self.draws, self.decoder.vocab());
        let between = [&buffers.gathered, &buffers.normed];
        self.decoder.logits(
            &mut *self.stream,
            &rows,
            count as usize,
            between,
            [&buffers.raw, &buffers.peaks],
        );
        let bytes = self.stream.download(&buffers.raw.part(0..count as usize * vocab)).take()?;
        let values: Vec<f32> =
            bytes.as_chunks::<4>().0.iter().map(|bytes| f32::from_ne_bytes(*bytes)).collect();
        Ok(values.chunks(vocab).map(<[f32]>::to_vec).collect())
    }
}

impl Engine for DecoderEngine {
    fn facts(&self) -> &Facts {
        &self.facts
    }

    fn kv_region(&self) -> Arc<Region> {
        self.region.clone()
    }

    fn page_offset(&self, group: u32, page: u32) -> u64 {
        let group = group as usize;
        self.group_offsets[group] + u64::from(page) * self.facts.form.page_bytes[group]
    }

    fn submit(&mut self, plan: Plan, now: Time) {
        assert!(
            self.submitted.len() <= self.facts.depth as usize,
            "{} steps in flight at depth {}",
            self.submitted.len(),
            self.facts.depth
        );
        let result = self.start(&plan);
        let rows = plan.rows.into_iter().map(|row| {
            let wanted = self.wanted(&row);
            SubmittedRow { slot: row.slot, count: row.count, wanted, score: row.score }
        });
        let rows: Vec<_> = rows.collect();
        let tokens = rows.iter().map(|row| row.count as usize).sum();
        self.submitted.push_back(Submitted { plan: plan.id, rows, tokens, at: now, result });
    }

    fn collect(&mut self, now: Time) -> Option<Result<Outcome, StepError>> {
        let oldest = self.submitted.front()?;
        if matches!(&oldest.result, Ok(results) if !results.ready()) {
            return None;
        }
        let Submitted { plan, rows, tokens, at, result } = self.submitted.pop_front()?;
        let failed = |reason| StepError { plan, reason };
        let [drawn, scored] =
            match result.and_then(|results| results.take().map_err(|error| error.to_string())) {
                Err(reason) => return Some(Err(failed(reason))),
                Ok(words) => words,
            };
        let took = now.since(at);
        self.estimate.observe(tokens, took);
        let mut drawn = drawn.chunks_exact(SampleCall::WORDS);
        let mut scored = scored.chunks_exact(SampleCall::WORDS);
        let vocab = self.decoder.vocab();
        let rows = rows.into_iter().map(|SubmittedRow { slot, count, wanted, score }| RowOutcome {
            slot,
            count,
            sampled: wanted.and_then(|wanted| sampled(drawn.next()?, wanted)),
            scored: score.map(|score| score::scores(&score, vocab, &mut scored)).unwrap_or_default(),
        });
        Some(Ok(Outcome { id: plan, rows: rows.collect(), took }))
    }

    fn in_flight(&self) -> usize {
        self.submitted.len()
    }

    fn ready_at(&self) -> Option<Time> {
        None
    }

    fn expected(&self, plan: &Plan) -> Duration {
        self.estimate.expected(plan.rows.iter().map(|row| row.count as usize).sum())
    }

    fn zero_tail(&mut self, group: u32, page: u32, rows: u32) {
        self.stream.zero_rows(self.decoder.kv(group as usize), page, rows);
    }
}

/// A row of the result as a drawn token; `None` where nothing could be drawn. Only what was asked for is filled in.
fn sampled(words: &[u32], wanted: Wanted) -> Option<Sampled> {
    if words[0] != SampleCall::DRAWN {
        return None;
    }
    let top = words[3..].chunks_exact(2).take(wanted.top);
    Some(Sampled {
        token: words[1] as TokenId,
        logprob: wanted.logprob.then(|| f32::from_bits(words[2])),
        top: top.map(|pair| (pair[0], f32::from_bits(pair[1]))).collect(),
    })
}

impl DrawBuffers {
    fn new(
        device: &dyn Device,
        element: Element,
        hidden: usize,
        vocab: usize,
        rows: usize,
    ) -> Result<DrawBuffers, Error> {
        Ok(DrawBuffers {
            rows,
            gathered: device.allocate(element, rows * hidden)?,
            normed: device.allocate(element, rows * hidden)?,
            raw: device.allocate(Element::F32, rows * vocab)?,
            peaks: device.allocate(Element::F32, rows * vocab.div_ceil(Logits::PEAK))?,
            adjusted: device.allocate(Element::F32, rows * vocab)?,
            drawn: device.allocate(Element::U32, rows * SampleCall::WORDS)?,
        })
    }
}

/// What weights, activations and KV are stored as.
fn element(asked: Dtype, checkpoint: tandem_models::Dtype) -> Element {
    match (asked, checkpoint) {
        (Dtype::Float32, _) | (Dtype::Auto, tandem_models::Dtype::F32) => Element::F32,
        (Dtype::Bfloat16 | Dtype::Auto, _) => Element::Bf16,
    }
}

fn kv_element(element: Element) -> tandem_models::Dtype {
    match element {
        Element::Bf16 => tandem_models::Dtype::Bf16,
        Element::F32 | Element::U32 => tandem_models::Dtype::F32,
    }
}

fn page_bytes(group: &KvGroup) -> u64 {
    group.spec.token_bytes() * u64::from(BLOCK_TOKENS) * group.layers.len() as u64
}

fn map(bytes: u64, shared: bool) -> std::io::Result<Region> {
    let bytes = usize::try_from(bytes).map_err(|_| std::io::Error::from(std::io::ErrorKind::OutOfMemory))?;
    if shared { Region::shared(bytes) } else { Region::anonymous(bytes) }
}

/// Digest of everything that makes KV bytes what they are.
fn identity(
    checkpoint: &Checkpoint,
    weights: blake3::Hash,
    element: Element,
    device: &dyn Device,
    forms: &[String],
) -> KvIdentity {
    let mut digest = blake3::Hasher::new();
    digest.update(weights.as_bytes());
    digest.update(format!("{} {:?} {BLOCK_TOKENS}", element.as_str(), checkpoint.spec().rope).as_bytes());
    // Quantised products have other results than those of numbers, so they are a class of their own.
    let numerics = [vec![device.numerics(element)], forms.to_vec()].concat().join("-");
    KvIdentity { digest: digest.finalize().to_hex().to_string(), numerics }
}

/// The groups' pages lie one group after the other in the region.
fn kv_pages(groups: &[KvGroup], page_bytes: &[u64], pages: u32, memory: &Buffer) -> (Vec<KvPages>, Vec<u64>) {
    let size = memory.element().bytes() as u64;
    let mut offset = 0;
    let mut offsets = Vec::new();
    let kv = groups.iter().zip(page_bytes).map(|(group, page_bytes)| {
        let bytes = page_bytes * u64::from(pages);
        let first = (offset / size) as usize;
        offsets.push(offset);
        offset += bytes;
        KvPages {
            memory: memory.part(first..first + (bytes / size) as usize),
            layers: group.layers.len(),
            heads: group.spec.heads,
            width: group.spec.key_width,
            tokens: BLOCK_TOKENS as usize,
        }
    });
    let kv = kv.collect();
    (kv, offsets)
}

/// Each layer's group and its index there.
fn places(groups: &[KvGroup], layers: usize) -> Vec<(usize, usize)> {
    (0..layers)
        .map(|layer| {
            let place = groups.iter().enumerate().find_map(|(group, spec)| {
                Some((group, spec.layers.iter().position(|other| *other == layer)?))
            });
            place.expect("every layer is in a group")
        })
        .collect()
}
