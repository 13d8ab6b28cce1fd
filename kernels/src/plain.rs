//! The oracle: every operation in the plainest way, one thread, no panels, no spans, in float64 where that is
//! plainer. Correct within rounding; what it gives is compared, not bit for bit, with what devices give.

use std::sync::Arc;

use tandem_device::{
    Attention, Buffer, Device, Download, Element, Embed, Epilogue, Error, Int4Row, KvLayer, KvPages, Linear,
    LinearCall, LinearForm, Logits, Matrix, Norm, Penalties, QkvStore, QuantisedMatrix, QuantisedRows,
    Rotations, SampleCall, SampleRow, Sequences, Stream, TOKEN_PREVIOUS, Tally,
};
use tandem_memory::Region;

use crate::cpu::{Ready, read_bytes, write_bytes};
use crate::memory::{Memory, slice, slice_mut};
use crate::philox;
use crate::scalar::{Bf16, Scalar};

/// The plain device.
#[derive(Clone, Copy, Debug)]
pub struct Plain;

impl Device for Plain {
    fn name(&self) -> &str {
        "plain"
    }

    fn numerics(&self, element: Element) -> String {
        format!("plain-{}", element.as_str())
    }

    fn allocate(&self, element: Element, len: usize) -> Result<Buffer, Error> {
        Memory::allocate(element, len)
    }

    fn map(&self, region: Arc<Region>, element: Element) -> Result<Buffer, Error> {
        let len = region.len() / element.bytes();
        Memory::map(region, element, len)
    }

    fn pack(&self, matrix: Matrix<'_>) -> Result<Linear, Error> {
        let Matrix { outputs, inputs, element, gated, row, .. } = matrix;
        let values = Memory::allocate(element, outputs * inputs)?;
        let mut all = vec![0.0; outputs * inputs];
        for (output, weights) in all.chunks_exact_mut(inputs).enumerate() {
            row(output, weights);
        }
        store(&values, 0, &all);
        Ok(Linear { outputs, inputs, gated, form: LinearForm::Numbers, values, scales: None })
    }

    /// As the numbers that the integers stand for.
    fn pack_quantised(&self, matrix: QuantisedMatrix<'_>) -> Result<Linear, Error> {
        let QuantisedMatrix { outputs, inputs, gated, rows } = matrix;
        let values = Memory::allocate(Element::F32, outputs * inputs)?;
        let (form, row): (_, Box<dyn Fn(usize) -> Vec<f32>>) = match rows {
            QuantisedRows::Int8(row) => (
                LinearForm::Int8,
                Box::new(move |output| {
                    let mut values = vec![0; inputs];
                    let scale = row(output, &mut values);
                    values.iter().map(|value| f32::from(*value) * scale).collect()
                }),
            ),
            QuantisedRows::Int4 { group, row } => (
                LinearForm::Int4 { group },
                Box::new(move |output| {
                    let groups = inputs.div_ceil(group);
                    let (mut values, mut scales, mut zeros) =
                        (vec![0; inputs], vec![0.0; groups], vec![0; groups]);
                    let all = Int4Row { values: &mut values, scales: &mut scales, zeros: &mut zeros };
                    row(output, all);
                    let number = |(input, value): (usize, &u8)| {
                        (f32::from(*value) - f32::from(zeros[input / group])) * scales[input / group]
                    };
                    values.iter().enumerate().map(number).collect()
                }),
            ),
        };
        for output in 0..outputs {
            store(&values, output * inputs, &row(output));
        }
        Ok(Linear { outputs, inputs, gated, form, values, scales: None })
    }

    fn stream(&self) -> Box<dyn Stream> {
        Box::new(Plain)
    }
}

/// Elements `first..first + len` as numbers.
fn load(buffer: &Buffer, first: usize, len: usize) -> Vec<f32> {
    let part = buffer.part(first..first + len);
    // SAFETY: by the stream's contract nothing else touches the buffer now.
    unsafe {
        match part.element() {
            Element::F32 => slice::<f32>(&part).to_vec(),
            Element::Bf16 => slice::<Bf16>(&part).iter().map(|value| value.load()).collect(),
            Element::U32 => panic!("indices are not numbers"),
        }
    }
}

/// Rounds numbers into elements from `first` on.
fn store(buffer: &Buffer, first: usize, values: &[f32]) {
    let part = buffer.part(first..first + values.len());
    // SAFETY: as in `load`.
    unsafe {
        match part.element() {
            Element::F32 => slice_mut::<f32>(&part).copy_from_slice(values),
            Element::Bf16 => {
                for (to, value) in slice_mut::<Bf16>(&part).iter_mut().zip(values) {
                    *to = Bf16::store(*value);
                }
            }
            Element::U32 => panic!("indices are not numbers"),
        }
    }
}

fn indices(buffer: &Buffer) -> &[u32] {
    // SAFETY: as in `load`.
    unsafe { slice(buffer) }
}

/// The first element of a token's key row; its value row is a page's worth of rows further.
fn token_at(kv: KvLayer<'_>, sequences: Sequences<'_>, sequence: u32, position: usize, head: usize) -> usize {
    let pages = kv.pages;
    let (sequence, block) = (sequence as usize, position / pages.tokens);
    let page = match sequences {
        Sequences::Tables { pages, stride } => indices(pages)[sequence * stride + block] as usize,
        Sequences::Contiguous { bases } => indices(bases)[sequence] as usize + block,
    };
    let rows = ((page * pages.layers + kv.layer) * pages.heads + head) * 2 * pages.tokens;
    (rows + position % pages.tokens) * pages.width
}

fn norm(x: &[f32], weight: &[f32], epsilon: f32) -> Vec<f32> {
    let square: f64 = x.iter().map(|value| f64::from(*value).powi(2)).sum();
    let root = (square / x.len() as f64 + f64::from(epsilon)).sqrt();
    x.iter().zip(weight).map(|(x, weight)| (f64::from(*x) / root * f64::from(*weight)) as f32).collect()
}

fn dot(a: &[f32], b: &[f32]) -> f64 {
    a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum()
}

/// A row as the product with 8-bit integers takes it: multiples of a 127th of its largest magnitude.
fn rounded(x: &[f32]) -> Vec<f32> {
    let largest = x.iter().fold(1e-12_f32, |largest, value| largest.max(value.abs()));
    let scale = if x.iter().all(|value| value.is_finite()) { largest / 127.0 } else { f32::NAN };
    x.iter().map(|value| (value / scale).round_ties_even() * scale).collect()
}

/// One row times all of a matrix, plus the bias.
fn product(x: &[f32], weight: &Linear, bias: Option<&Buffer>) -> Vec<f32> {
    let rounded = (weight.form == LinearForm::Int8).then(|| rounded(x));
    let x = rounded.as_deref().unwrap_or(x);
    let bias = bias.map_or(vec![0.0; weight.outputs], |bias| load(bias, 0, weight.outputs));
    (0..weight.outputs)
        .map(|output| {
            dot(x, &load(&weight.values, output * weight.inputs, weight.inputs)) as f32 + bias[output]
        })
        .collect()
}

impl Stream for Plain {
    fn upload(&mut self, to: &Buffer, bytes: &[u8]) {
        // SAFETY: as in `load`.
        unsafe { write_bytes(to, bytes) }
    }

    fn download(&mut self, from: &Buffer) -> Box<dyn Download> {
        // SAFETY: as in `load`.
        Box::new(Ready(unsafe { read_bytes(from) }))
    }

    fn copy(&mut self, from: &Buffer, to: &Buffer) {
        // SAFETY: as in `load`.
        unsafe { write_bytes(to, &read_bytes(from)) }
    }

    fn zero(&mut self, buffer: &Buffer) {
        // SAFETY: as in `load`.
        unsafe { write_bytes(buffer, &vec![0; buffer.bytes()]) }
    }

    fn embed(&mut self, call: Embed<'_>) {
        for row in 0..call.rows.count {
            let token = match indices(call.tokens)[row] {
                TOKEN_PREVIOUS => {
                    let sequence = indices(call.rows.sequences)[row] as usize;
                    indices(call.previous)[indices(call.slots)[sequence] as usize]
                }
                token => token,
            };
            let width = call.table.inputs;
            store(call.to, row * width, &load(&call.table.values, token as usize * width, width));
        }
    }

    fn rotations(&mut self, call: Rotations<'_>) {
        let pairs = call.frequencies.len();
        for row in 0..call.rows.count {
            let position = f64::from(indices(call.rows.positions)[row]);
            for (pair, frequency) in call.frequencies.iter().enumerate() {
                let angle = position * frequency;
                store(call.to, row * 2 * pairs + pair, &[(angle.cos() * call.scale) as f32]);
                store(call.to, row * 2 * pairs + pairs + pair, &[(angle.sin() * call.scale) as f32]);
            }
        }
    }

    fn norm(&mut self, call: Norm<'_>) {
        let width = call.weight.len();
        let weight = load(call.weight, 0, width);
        for row in 0..call.count {
            if let Some(add) = call.add {
                let sum: Vec<f32> = load(call.x, row * width, width)
                    .iter()
                    .zip(load(add, row * width, width))
                    .map(|(a, b)| a + b)
                    .collect();
                store(call.x, row * width, &sum);
            }
            store(call.to, row * width, &norm(&load(call.x, row * width, width), &weight, call.epsilon));
        }
    }

    fn linear(&mut self, call: LinearCall<'_>) {
        for row in 0..call.count {
            let x = load(call.x, row * call.weight.inputs, call.weight.inputs);
            let y = product(&x, call.weight, call.bias);
            let width = if call.epilogue == Epilogue::Gate { y.len() / 2 } else { y.len() };
            let y = match call.epilogue {
                Epilogue::None => y,
                Epilogue::Residual => {
                    y.iter().zip(load(call.to, row * width, width)).map(|(a, b)| a + b).collect()
                }
                Epilogue::Gate => {
                    let silu = |g: f32| g / (1.0 + (-g).exp());
                    y[..width].iter().zip(&y[width..]).map(|(gate, up)| silu(*gate) * up).collect()
                }
            };
            store(call.to, row * width, &y);
        }
    }

    fn qkv_store(&mut self, call: QkvStore<'_>) {
        let pages = call.kv.pages;
        let (width, kv_heads) = (pages.width, pages.heads);
        let turn = |head: Vec<f32>, weight: Option<&Buffer>, row: usize| {
            let head = match weight {
                Some(weight) => norm(&head, &load(weight, 0, width), call.epsilon),
                None => head,
            };
            let turns = load(call.rotations, row * 2 * call.pairs, 2 * call.pairs);
            let mut turned = head.clone();
            for pair in 0..call.pairs {
                let (a, b) = (head[pair], head[pair + call.pairs]);
                let (cosine, sine) = (turns[pair], turns[pair + call.pairs]);
                turned[pair] = a * cosine - b * sine;
                turned[pair + call.pairs] = a * sine + b * cosine;
            }
            turned
        };
        for row in 0..call.rows.count {
            let head_at =
                |head: usize| load(call.qkv, (row * (call.heads + 2 * kv_heads) + head) * width, width);
            for head in 0..call.heads {
                store(
                    call.queries,
                    (row * call.heads + head) * width,
                    &turn(head_at(head), call.query_norm, row),
                );
            }
            let (sequence, position) = (indices(call.rows.sequences)[row], indices(call.rows.positions)[row]);
            for head in 0..kv_heads {
                let at = token_at(call.kv, call.sequences, sequence, position as usize, head);
                store(&pages.memory, at, &turn(head_at(call.heads + head), call.key_norm, row));
                store(&pages.memory, at + pages.tokens * width, &head_at(call.heads + kv_heads + head));
            }
        }
    }

    fn attention(&mut self, call: Attention<'_>) {
        let pages = call.kv.pages;
        let width = pages.width;
        for row in 0..call.rows.count {
            let (sequence, position) = (indices(call.rows.sequences)[row], indices(call.rows.positions)[row]);
            for head in 0..call.heads {
                let query = load(call.queries, (row * call.heads + head) * width, width);
                let at = |position| {
                    token_at(call.kv, call.sequences, sequence, position, head * pages.heads / call.heads)
                };
                let scores: Vec<f64> = (0..=position as usize)
                    .map(|position| {
                        dot(&query, &load(&pages.memory, at(position), width)) * f64::from(call.scale)
                    })
                    .collect();
                let highest = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                let weights: Vec<f64> = scores.iter().map(|score| (score - highest).exp()).collect();
                let mut values = vec![0.0; width];
                for (position, weight) in weights.iter().enumerate() {
                    let row = load(&pages.memory, at(position) + pages.tokens * width, width);
                    for (sum, value) in values.iter_mut().zip(row) {
                        *sum += weight * f64::from(value);
                    }
                }
                let sum: f64 = weights.iter().sum();
                let values: Vec<f32> = values.iter().map(|value| (value / sum) as f32).collect();
                store(call.to, (row * call.heads + head) * width, &values);
            }
        }
    }

    fn gather_rows(&mut self, from: &Buffer, rows: &Buffer, count: usize, width: usize, to: &Buffer) {
        for (at, row) in indices(rows)[..count].iter().enumerate() {
            store(to, at * width, &load(from, *row as usize * width, width));
        }
    }

    fn logits(&mut self, call: Logits<'_>) {
        for row in 0..call.count {
            let x = load(call.x, row * call.weight.inputs, call.weight.inputs);
            let logits = product(&x, call.weight, None);
            store(call.to, row * call.weight.outputs, &logits);
            let Some(peaks) = call.peaks else { continue };
            let peak = |logits: &[f32]| match logits.iter().all(|logit| logit.is_finite()) {
                true => logits.iter().copied().fold(f32::NEG_INFINITY, f32::max),
                false => f32::NAN,
            };
            let all: Vec<f32> = logits.chunks(Logits::PEAK).map(peak).collect();
            store(peaks, row * all.len(), &all);
        }
    }

    fn tally(&mut self, call: Tally<'_>) {
        let row = call.counts.part(call.slot * call.vocab..(call.slot + 1) * call.vocab);
        // SAFETY: as in `load`.
        let row = unsafe { slice_mut::<u32>(&row) };
        for (token, count) in row.iter_mut().enumerate() {
            let (prompt, output) = indices(call.tokens).split_at(call.prompt);
            let outputs = output.iter().filter(|id| **id as usize == token).count() as u32;
            *count = outputs | if prompt.contains(&(token as u32)) { 1 << 31 } else { 0 };
        }
    }

    fn penalties(&mut self, call: Penalties<'_>) {
        let vocab = call.vocab;
        for at in 0..call.count {
            let row = SampleRow::from_words(&indices(call.rows)[at * SampleRow::WORDS..]);
            let mut logits = load(call.raw, at * vocab, vocab);
            let first = indices(call.edits.first);
            for edit in first[at] as usize..first[at + 1] as usize {
                logits[indices(call.edits.tokens)[edit] as usize] += load(call.edits.values, edit, 1)[0];
            }
            if row.has_penalties() {
                let counts = indices(call.counts.expect("a row with penalties comes with counts"));
                for (token, logit) in logits.iter_mut().enumerate() {
                    let count = counts[row.slot as usize * vocab + token];
                    if count > 0 {
                        *logit = if *logit > 0.0 { *logit / row.repetition } else { *logit * row.repetition };
                    }
                    let outputs = count & !(1 << 31);
                    *logit -= row.frequency * outputs as f32;
                    *logit -= if outputs > 0 { row.presence } else { 0.0 };
                }
            }
            store(call.to, at * vocab, &logits);
        }
    }

    fn sample(&mut self, call: SampleCall<'_>) {
        let vocab = call.vocab;
        // SAFETY: as in `load`.
        let (previous, to) = unsafe { (slice_mut::<u32>(call.previous), slice_mut::<u32>(call.to)) };
        for at in 0..call.count {
            let row = SampleRow::from_words(&indices(call.rows)[at * SampleRow::WORDS..]);
            let (raw, logits) = (load(call.raw, at * vocab, vocab), load(call.adjusted, at * vocab, vocab));
            let to = &mut to[at * SampleCall::WORDS..(at + 1) * SampleCall::WORDS];
            to.fill(0);
            let mut order: Vec<usize> = (0..vocab).collect();
            order.sort_by(|a, b| logits[*b].total_cmp(&logits[*a]));
            let broken = logits.iter().any(|logit| logit.is_nan() || *logit == f32::INFINITY);
            let forbidden = logits.iter().all(|logit| *logit == f32::NEG_INFINITY);
            if raw.iter().any(|logit| !logit.is_finite()) || broken || forbidden {
                to[0] = SampleCall::NOT_FINITE;
                continue;
            }
            let token = draw(&order, &logits, &row);
            to[0] = SampleCall::DRAWN;
            to[1] = token as u32;
            previous[row.slot as usize] = token as u32;
            if let (true, Some(counts)) = (row.flags.tallied, call.counts) {
                // SAFETY: as in `load`.
                unsafe { slice_mut::<u32>(counts)[row.slot as usize * vocab + token] += 1 };
            }
            if row.flags.logprob || row.flags.top > 0 {
                let sum: f64 = raw.iter().map(|logit| f64::from(*logit).exp()).sum();
                let logprob = |token: usize| ((f64::from(raw[token]) - sum.ln()) as f32).to_bits();
                order.sort_by(|a, b| raw[*b].total_cmp(&raw[*a]).then(a.cmp(b)));
                to[2] = logprob(token);
                for (at, token) in order.iter().take(usize::from(row.flags.top)).enumerate() {
                    to[3 + 2 * at] = *token as u32;
                    to[4 + 2 * at] = logprob(*token);
                }
            }
        }
    }

    fn copy_pages(&mut self, pages: &KvPages, pairs: &Buffer, count: usize) {
        let len = pages.page_elements();
        for pair in indices(pairs)[..2 * count].chunks_exact(2) {
            store(&pages.memory, pair[1] as usize * len, &load(&pages.memory, pair[0] as usize * len, len));
        }
    }

    fn zero_rows(&mut self, pages: &KvPages, page: u32, first_row: u32) {
        let first_row = (first_row as usize).min(pages.tokens);
        for head in 0..pages.layers * pages.heads * 2 {
            let first = page as usize * pages.page_elements() + head * pages.tokens * pages.width;
            for row in first_row..pages.tokens {
                store(&pages.memory, first + row * pages.width, &vec![0.0; pages.width]);
            }
        }
    }
}

/// `order` lists tokens from the most likely on.
fn draw(order: &[usize], logits: &[f32], row: &SampleRow) -> usize {
    if row.temperature <= 0.0 {
        return order[0];
    }
    let highest = f64::from(logits[order[0]]);
    let weight = |token: &usize| ((f64::from(logits[*token]) - highest) / f64::from(row.temperature)).exp();
    let mut kept = order.to_vec();
    kept.retain(|token| weight(token) >= f64::from(row.min_p));
    if row.top_k > 0 {
        kept.truncate(row.top_k as usize);
    }
    let whole: f64 = kept.iter().map(weight).sum();
    let mut sum = 0.0;
    if row.top_p < 1.0 {
        let enough = kept.iter().position(|token| {
            sum += weight(token);
            sum >= whole * f64::from(row.top_p)
        });
        kept.truncate(enough.map_or(kept.len(), |at| at + 1));
    }
    if row.top_k == 0 && row.top_p >= 1.0 && row.min_p <= 0.0 {
        kept.sort_unstable(); // without cuts the draw runs through the vocabulary in the order of ids
    }
    let target = philox::uniform(row.seed, row.choice, row.position) * kept.iter().map(weight).sum::<f64>();
    let mut sum = 0.0;
    let drawn = kept.iter().find(|token| {
        sum += weight(token);
        sum > target
    });
    *drawn.unwrap_or(&kept[kept.len() - 1])
}
