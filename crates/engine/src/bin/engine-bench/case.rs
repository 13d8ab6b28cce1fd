//! What is measured: prefill of a prompt, or steps of decoding, through the engine's own door.

use std::fmt;
use std::path::PathBuf;

use tandem_batching::{Input, Plan, Row, SlotOpen};
use tandem_engine::{DecoderEngine, Dtype, Engine, Options, Quantization, random_checkpoint};
use tandem_kernels::Isa;
use tandem_types::{Choice, SamplingParams, Time, blocks_for};

use crate::machine::{Limits, Took};

/// Qwen3-0.6B.
const LAYERS: f64 = 28.0;
const HIDDEN: f64 = 1024.0;
const INNER: f64 = 3072.0;
const VOCAB: f64 = 151_936.0;
const QUERIES: f64 = 16.0 * 128.0;
const KEYS: f64 = 8.0 * 128.0;

/// Tokens of a prefill step.
const CHUNK: usize = 512;

pub(crate) enum Case {
    Prefill { tokens: usize },
    Decode { batch: usize, context: usize },
}

impl fmt::Display for Case {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Case::Prefill { tokens } => write!(f, "prefill {tokens}"),
            Case::Decode { batch, context } => write!(f, "decode batch {batch} context {context}"),
        }
    }
}

impl Case {
    pub(crate) fn all() -> Vec<Case> {
        let prefill = [128, 512, 2048].map(|tokens| Case::Prefill { tokens });
        let decode = [128, 2048]
            .into_iter()
            .flat_map(|context| [1, 4, 8, 16, 32].map(|batch| Case::Decode { batch, context }));
        prefill.into_iter().chain(decode).collect()
    }

    /// Steps, or prompts, of one measurement.
    pub(crate) fn steps(&self) -> usize {
        match self {
            Case::Prefill { tokens } => (512 / tokens).max(1),
            Case::Decode { batch, .. } => (32 / batch).max(6),
        }
    }

    /// Tokens of one step or prompt.
    pub(crate) fn tokens(&self) -> usize {
        match self {
            Case::Prefill { tokens } => *tokens,
            Case::Decode { batch, .. } => *batch,
        }
    }

    /// Most tokens of KV, over all sequences.
    fn kv_tokens(&self) -> usize {
        match self {
            Case::Prefill { tokens } => *tokens,
            Case::Decode { batch, context } => {
                batch * blocks_for((context + self.steps()) as u32) as usize * 32
            }
        }
    }

    /// What one step or prompt takes at least, with weights of that form.
    pub(crate) fn work(&self, quantization: Quantization) -> Work {
        let layer = HIDDEN * (QUERIES + 2.0 * KEYS) + QUERIES * HIDDEN + 3.0 * HIDDEN * INNER;
        let tokens = self.tokens() as f64;
        // Tokens that are seen, over all rows; rows with logits; tokens of KV that are read at least once.
        let (seen, drawn, kv) = match self {
            Case::Prefill { .. } => (tokens * (tokens + 1.0) / 2.0, 1.0, tokens),
            Case::Decode { batch, context } => {
                let middle = *context as f64 + self.steps() as f64 / 2.0;
                (*batch as f64 * middle, *batch as f64, *batch as f64 * middle)
            }
        };
        let (layers, head) = (2.0 * LAYERS * layer * tokens, 2.0 * VOCAB * HIDDEN * drawn);
        let attention = LAYERS * 4.0 * QUERIES * seen;
        // Bytes per weight of layers and head, and what is multiplied in 8 bits.
        let (of_layers, of_head, whole) = match quantization {
            Quantization::Auto => (2.0, 2.0, 0.0),
            Quantization::W8a8 => (1.0, 1.0, layers + head),
            // Four bits, and a scale and an offset in float32 for each 64 inputs; numbers when multiplied.
            Quantization::Int4 => (0.5 + 8.0 / 64.0, 1.0, head),
        };
        Work {
            numbers: layers + head + attention - whole,
            whole,
            bytes: of_layers * LAYERS * layer + of_head * VOCAB * HIDDEN + LAYERS * 2.0 * 2.0 * KEYS * kv,
        }
    }

    /// Tokens a second at the machine's limits, with weights of that form.
    pub(crate) fn limit(&self, limits: &Limits, quantization: Quantization) -> f64 {
        let work = self.work(quantization);
        let products = work.numbers / limits.products + work.whole / limits.whole;
        self.tokens() as f64 / products.max(work.bytes / limits.bytes)
    }
}

/// What has to be done.
pub(crate) struct Work {
    /// Multiplications and additions of numbers.
    pub(crate) numbers: f64,
    /// The same of 8-bit integers.
    pub(crate) whole: f64,
    /// Bytes to be read.
    pub(crate) bytes: f64,
}

/// The folder of the model that is measured on; made when it is first asked for.
pub(crate) fn checkpoint() -> Result<PathBuf, String> {
    let program = std::env::current_exe().map_err(|error| error.to_string())?;
    let target = program.parent().and_then(|dir| dir.parent()).ok_or("no target folder")?;
    eprintln!("a random checkpoint of Qwen3-0.6B's shape (made once, 1.2 GB in {})", target.display());
    random_checkpoint::qwen3_0_6b(target).map_err(|error| format!("the checkpoint: {error}"))
}

/// The engine under test.
pub(crate) struct Subject {
    /// The folder of its checkpoint.
    pub(crate) dir: PathBuf,
    engine: DecoderEngine,
    plans: u64,
}

impl Subject {
    pub(crate) fn load(
        threads: usize,
        cases: &[Case],
        quantization: Quantization,
    ) -> Result<Subject, String> {
        let dir = checkpoint()?;
        let tokens = cases.iter().map(Case::kv_tokens).max().unwrap_or(0);
        let token_bytes = (LAYERS * 2.0 * 2.0 * KEYS) as u64;
        let kv_bytes = (tokens as u64 + 32) * token_bytes;
        let options =
            Options { dtype: Dtype::Bfloat16, quantization, threads, kv_bytes, ..Options::default() };
        let (engine, took) = Took::of(|| DecoderEngine::load(&dir, options));
        eprintln!("loaded in {:.1} s", took.wall);
        let engine = engine.map_err(|error| error.to_string())?;
        // Decoding starts at any position; what lies before it is this. Untouched memory would be one page of zeros.
        let region = engine.kv_region();
        // SAFETY: no step is in flight, so the memory is ours; it is as long as that and aligned to pages.
        let kv = unsafe { std::slice::from_raw_parts_mut(region.as_ptr().cast::<u16>(), region.len() / 2) };
        for (at, value) in kv.iter_mut().enumerate() {
            *value = 0x3f00 | (at as u16).wrapping_mul(40_503) & 0x80ff; // ±0.5 to ±1
        }
        Ok(Subject { dir, engine, plans: 0 })
    }

    pub(crate) fn kernel(&self) -> &str {
        &self.engine.facts().kernel
    }

    pub(crate) fn isa(&self) -> Result<Isa, String> {
        let name = self.kernel().strip_prefix("cpu-");
        Isa::choose(name).map_err(|error| error.to_string())
    }

    /// One measurement of a case.
    pub(crate) fn measure(&mut self, case: &Case) -> Result<Took, String> {
        match *case {
            Case::Prefill { tokens } => {
                let plans: Vec<Plan> = (0..case.steps()).flat_map(|_| self.prefill(tokens)).collect();
                self.run(plans)
            }
            Case::Decode { batch, context } => {
                let open = (0..batch as u32).map(open).collect();
                let pages = (case.kv_tokens() / batch / 32) as u32;
                let first = self.decode(batch, pages, context - 1, open);
                self.run(vec![first])?;
                let steps = context..context + case.steps();
                let plans = steps.map(|at| self.decode(batch, pages, at, Vec::new())).collect();
                self.run(plans)
            }
        }
    }

    /// What a prompt's last token makes of it.
    pub(crate) fn logits(&mut self, prompt: &[u32]) -> Result<Vec<f32>, String> {
        let row = Row {
            slot: 0,
            start: 0,
            count: prompt.len() as u32,
            input: Input::Known(prompt.to_vec()),
            pages: vec![(0..blocks_for(prompt.len() as u32)).collect()],
            sample: false,
            score: None,
        };
        let plan = self.plan(vec![open(0)], vec![row]);
        let logits = self.engine.logits(&plan).map_err(|error| error.to_string())?;
        logits.into_iter().next_back().ok_or_else(|| "an empty prompt has no logits".to_owned())
    }

    fn run(&mut self, plans: Vec<Plan>) -> Result<Took, String> {
        let (done, took) = Took::of(|| {
            plans.into_iter().try_for_each(|plan| {
                let draws = plan.rows.iter().filter(|row| row.sample).count();
                self.engine.submit(plan, Time::ZERO);
                match self.engine.collect(Time::ZERO) {
                    Some(Ok(outcome))
                        if outcome.rows.iter().flat_map(|row| &row.sampled).count() == draws =>
                    {
                        Ok(())
                    }
                    Some(Ok(_)) => Err("a row met logits that are not finite".to_owned()),
                    Some(Err(error)) => Err(error.to_string()),
                    None => Err("the step is still running".to_owned()),
                }
            })
        });
        done.map(|()| took)
    }

    fn plan(&mut self, open: Vec<SlotOpen>, rows: Vec<Row>) -> Plan {
        self.plans += 1;
        Plan { id: self.plans, open, close: Vec::new(), rows, same_shape_steps: 1 }
    }

    /// A prompt in chunks; its last token draws.
    fn prefill(&mut self, tokens: usize) -> Vec<Plan> {
        let starts = (0..tokens).step_by(CHUNK);
        starts
            .map(|start| {
                let end = tokens.min(start + CHUNK);
                let row = Row {
                    slot: 0,
                    start: start as u32,
                    count: (end - start) as u32,
                    input: Input::Known((start..end).map(|at| token(at as u32)).collect()),
                    pages: vec![(0..blocks_for(end as u32)).collect()],
                    sample: end == tokens,
                    score: None,
                };
                let open = if start == 0 { vec![open(0)] } else { Vec::new() };
                self.plan(open, vec![row])
            })
            .collect()
    }

    /// The next token of every sequence, each with pages of its own.
    fn decode(&mut self, batch: usize, pages: u32, position: usize, open: Vec<SlotOpen>) -> Plan {
        let rows = (0..batch as u32).map(|slot| Row {
            slot,
            start: position as u32,
            count: 1,
            input: Input::Known(vec![token(slot + position as u32)]),
            pages: vec![(slot * pages..(slot + 1) * pages).collect()],
            sample: true,
            score: None,
        });
        let rows = rows.collect();
        self.plan(open, rows)
    }
}

/// What stands at a place, here and in `llama.py`.
pub(crate) fn token(at: u32) -> u32 {
    at * 7919 % 151_936
}

fn open(slot: u32) -> SlotOpen {
    SlotOpen {
        slot,
        tokens: Vec::new(),
        prompt_tokens: 0,
        sampling: SamplingParams::default(),
        choice: Choice(0),
        stop_suppress: Vec::new(),
        min_tokens: 0,
    }
}
