//! How far quantised weights stray from bf16: logits and greedy tokens on texts that the bf16 model itself writes.

use std::path::Path;

use tandem_batching::{Input, Outcome, Plan, Row, SlotOpen};
use tandem_engine::{DecoderEngine, Dtype, Engine, Options, Quantization};
use tandem_types::{Choice, SamplingParams, Time, TokenId, blocks_for};

/// Texts that are compared, and tokens of each.
const TEXTS: u32 = 32;
const TOKENS: u32 = 96;
/// Of a text, what greedy decoding continues, and by how much.
const PROMPT: u32 = 32;
const NEW: u32 = 64;

/// Prints one row of a table per form of weights.
pub(crate) fn report(dir: &Path, threads: usize) -> Result<(), String> {
    let load = |dtype, quantization| Model::load(dir, threads, dtype, quantization);
    let mut numbers = load(Dtype::Bfloat16, Quantization::Auto)?;
    let vocab = numbers.engine.facts().vocab;
    let first: Vec<Vec<TokenId>> = (0..TEXTS).map(|text| vec![text * (vocab / TEXTS)]).collect();
    let texts = numbers.write(&first, TOKENS - 1, 1.0)?;
    let prompts: Vec<Vec<TokenId>> = texts.iter().map(|text| text[..PROMPT as usize].to_vec()).collect();
    let view = |model: &mut Model| -> Result<View, String> {
        let logits = texts.iter().map(|text| model.logits(text)).collect::<Result<_, _>>()?;
        Ok(View { logits, greedy: model.write(&prompts, NEW, 0.0)? })
    };
    let reference = view(&mut numbers)?;
    let name = dir.file_name().unwrap_or_default().to_string_lossy();
    for (form, dtype, quantization) in [
        ("float32", Dtype::Float32, Quantization::Auto),
        ("w8a8", Dtype::Bfloat16, Quantization::W8a8),
        ("int4", Dtype::Bfloat16, Quantization::Int4),
    ] {
        let other = view(&mut load(dtype, quantization)?)?;
        let Difference { logits, best, divergence, tokens, whole } = reference.difference(&other);
        println!(
            "| {name} | {form} | {:.1} % | {:.1} % | {divergence:.4} | {:.1} % | {whole} of {TEXTS} |",
            100.0 * logits,
            100.0 * best,
            100.0 * tokens
        );
    }
    Ok(())
}

/// The head of the table.
pub(crate) fn head() {
    println!(
        "Against bf16, on {TEXTS} texts of {TOKENS} tokens that the bf16 model wrote at temperature 1:\n"
    );
    println!(
        "| model | weights | difference of logits | same best token | KL divergence (nats) | greedy tokens before the \
         first other one | greedy texts of {NEW} tokens that are equal |\n|---|---|---|---|---|---|---|"
    );
}

/// What a model makes of the texts.
struct View {
    /// `[text][position][vocabulary]`.
    logits: Vec<Vec<Vec<f32>>>,
    greedy: Vec<Vec<TokenId>>,
}

struct Difference {
    /// Root of the mean square of the difference, over that of the logits.
    logits: f64,
    /// Share of positions with the same best token.
    best: f64,
    /// Mean over positions of the divergence of the other's distribution from this one.
    divergence: f64,
    /// Share of greedy tokens before the first that differs.
    tokens: f64,
    /// Greedy texts that are equal to the end.
    whole: usize,
}

impl View {
    fn difference(&self, other: &View) -> Difference {
        let (mut square, mut all, mut best, mut divergence, mut positions) = (0.0, 0.0, 0.0, 0.0, 0.0);
        let rows = |view: &View| view.logits.iter().flatten().cloned().collect::<Vec<Vec<f32>>>();
        for (ours, theirs) in rows(self).iter().zip(&rows(other)) {
            for (a, b) in ours.iter().zip(theirs) {
                square += f64::from(a - b).powi(2);
                all += f64::from(*a).powi(2);
            }
            positions += 1.0;
            best += f64::from(u8::from(highest(ours) == highest(theirs)));
            let (p, q) = (log_softmax(ours), log_softmax(theirs));
            divergence += p.iter().zip(&q).map(|(p, q)| p.exp() * (p - q)).sum::<f64>();
        }
        let (mut same, mut whole) = (0, 0);
        for (ours, theirs) in self.greedy.iter().zip(&other.greedy) {
            let equal = ours.iter().zip(theirs).take_while(|(a, b)| a == b).count() - PROMPT as usize;
            same += equal;
            whole += usize::from(equal == NEW as usize);
        }
        Difference {
            logits: f64::sqrt(square / all),
            best: best / positions,
            divergence: divergence / positions,
            tokens: same as f64 / f64::from(TEXTS * NEW),
            whole,
        }
    }
}

fn highest(logits: &[f32]) -> usize {
    let best = (0..logits.len()).max_by(|a, b| logits[*a].total_cmp(&logits[*b]).then(b.cmp(a)));
    best.unwrap_or(0)
}

fn log_softmax(logits: &[f32]) -> Vec<f64> {
    let highest = logits.iter().fold(f32::NEG_INFINITY, |highest, logit| highest.max(*logit));
    let shifted = logits.iter().map(|logit| f64::from(logit - highest));
    let sum = shifted.clone().map(f64::exp).sum::<f64>().ln();
    shifted.map(|logit| logit - sum).collect()
}

struct Model {
    engine: DecoderEngine,
    plans: u64,
}

impl Model {
    fn load(dir: &Path, threads: usize, dtype: Dtype, quantization: Quantization) -> Result<Model, String> {
        let options = Options { dtype, quantization, threads, kv_bytes: 256 << 20, ..Options::default() };
        let engine = DecoderEngine::load(dir, options).map_err(|error| error.to_string())?;
        Ok(Model { engine, plans: 0 })
    }

    /// Prompts with so many tokens more, all decoded together.
    fn write(
        &mut self,
        prompts: &[Vec<TokenId>],
        new: u32,
        temperature: f32,
    ) -> Result<Vec<Vec<TokenId>>, String> {
        let mut texts = prompts.to_vec();
        let pages = blocks_for(prompts[0].len() as u32 + new);
        let sampling =
            |slot| SamplingParams { temperature, seed: u64::from(slot), ..SamplingParams::default() };
        let mut open: Vec<SlotOpen> =
            (0..).zip(&texts).map(|(slot, text)| opened(slot, text, sampling(slot))).collect();
        for step in 0..new {
            let rows = (0..).zip(&texts).map(|(slot, text)| {
                let start = if step == 0 { 0 } else { text.len() as u32 - 1 };
                row(slot, start, &text[start as usize..], slot * pages, true)
            });
            let rows = rows.collect();
            let outcome = self.step(std::mem::take(&mut open), Vec::new(), rows)?;
            for (text, row) in texts.iter_mut().zip(outcome.rows) {
                text.push(row.sampled.ok_or("logits are not finite")?.token);
            }
        }
        self.step(Vec::new(), (0..texts.len() as u32).collect(), Vec::new())?;
        Ok(texts)
    }

    fn logits(&mut self, text: &[TokenId]) -> Result<Vec<Vec<f32>>, String> {
        let open = vec![opened(0, text, SamplingParams::default())];
        let plan = self.plan(open, Vec::new(), vec![row(0, 0, text, 0, false)]);
        let logits = self.engine.logits(&plan).map_err(|error| error.to_string())?;
        self.step(Vec::new(), vec![0], Vec::new())?;
        Ok(logits)
    }

    fn step(&mut self, open: Vec<SlotOpen>, close: Vec<u32>, rows: Vec<Row>) -> Result<Outcome, String> {
        let plan = self.plan(open, close, rows);
        self.engine.submit(plan, Time::ZERO);
        let outcome = self.engine.collect(Time::ZERO).ok_or("the step is still running")?;
        outcome.map_err(|error| error.to_string())
    }

    fn plan(&mut self, open: Vec<SlotOpen>, close: Vec<u32>, rows: Vec<Row>) -> Plan {
        self.plans += 1;
        Plan { id: self.plans, open, close, rows, same_shape_steps: 1 }
    }
}

fn opened(slot: u32, tokens: &[TokenId], sampling: SamplingParams) -> SlotOpen {
    let (tokens, prompt_tokens) = (tokens.to_vec(), tokens.len() as u32);
    SlotOpen {
        slot,
        tokens,
        prompt_tokens,
        sampling,
        choice: Choice(0),
        stop_suppress: Vec::new(),
        min_tokens: 0,
    }
}

fn row(slot: u32, start: u32, tokens: &[TokenId], first_page: u32, sample: bool) -> Row {
    let count = tokens.len() as u32;
    let pages = vec![(first_page..first_page + blocks_for(start + count)).collect()];
    Row { slot, start, count, input: Input::Known(tokens.to_vec()), pages, sample, score: None }
}
