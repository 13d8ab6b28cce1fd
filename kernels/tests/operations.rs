//! Every operation of the CPU against its plain twin, on odd shapes; and the promise that within a numerics class bits
//! do not depend on the number of threads or the other rows.

mod bench;

use bench::{Bench, check, random, same_bits};
use proptest::prelude::*;
use tandem_device::{
    Attention, Edits, Element, Embed, Epilogue, KvLayer, KvPages, LinearCall, Logits, Matrix, Norm,
    Penalties, QkvStore, Rotations, SampleCall, SampleRow, SamplingFlags, Sequences, StepRows,
    TOKEN_PREVIOUS, Tally,
};

fn element() -> impl Strategy<Value = Element> {
    prop_oneof![Just(Element::F32), Just(Element::Bf16)]
}

/// A product with everything random but the shape.
fn linear(
    bench: &mut Bench,
    element: Element,
    [count, inputs, outputs]: [usize; 3],
    epilogue: Epilogue,
    bias: bool,
    seed: u64,
    rows: std::ops::Range<usize>,
) -> Vec<f32> {
    let gated = epilogue == Epilogue::Gate;
    let weights = random(seed, outputs * inputs);
    let row = |output: usize, to: &mut [f32]| to.copy_from_slice(&weights[output * inputs..][..inputs]);
    let weight =
        bench.device.pack(Matrix { outputs, inputs, element, gated, bytes: &|_| None, row: &row }).unwrap();
    let width = if gated { outputs / 2 } else { outputs };
    let part = |values: Vec<f32>, width: usize| values[rows.start * width..rows.end * width].to_vec();
    let x = bench.numbers(element, &part(random(seed + 1, count * inputs), inputs));
    let to = bench.numbers(element, &part(random(seed + 2, count * width), width));
    let bias = bias.then(|| bench.numbers(Element::F32, &random(seed + 3, outputs)));
    bench.stream.linear(LinearCall {
        x: &x,
        count: rows.len(),
        weight: &weight,
        bias: bias.as_ref(),
        epilogue,
        to: &to,
    });
    bench.read(&to)
}

/// KV pages with random content, and sequences with tables that visit them out of order.
struct Cache {
    pages: KvPages,
    tables: tandem_device::Buffer,
    stride: usize,
}

impl Cache {
    fn new(
        bench: &mut Bench,
        element: Element,
        heads: usize,
        width: usize,
        lengths: &[usize],
        seed: u64,
    ) -> Cache {
        const TOKENS: usize = 32;
        let stride = lengths.iter().map(|length| length.div_ceil(TOKENS)).max().unwrap_or(1);
        let count = lengths.len() * stride;
        // Multiplying by a number prime to the count visits every page once.
        let step = (1..).map(|k| 7 * k + 2).find(|step| gcd(*step, count) == 1).unwrap();
        let tables: Vec<u32> = (0..count).map(|at| (at * step % count) as u32).collect();
        let layers = 2;
        let values = random(seed, count * layers * heads * 2 * TOKENS * width);
        let pages = KvPages { memory: bench.numbers(element, &values), layers, heads, width, tokens: TOKENS };
        Cache { pages, tables: bench.words(&tables), stride }
    }

    fn sequences(&self) -> Sequences<'_> {
        Sequences::Tables { pages: &self.tables, stride: self.stride }
    }
}

fn gcd(a: usize, b: usize) -> usize {
    if b == 0 { a } else { gcd(b, a % b) }
}

/// Rows of a step: some tokens at the end of each sequence.
fn rows(lengths: &[usize], last: usize) -> (Vec<u32>, Vec<u32>) {
    let of = |(sequence, length): (usize, &usize)| {
        (length.saturating_sub(last)..*length).map(move |position| (position as u32, sequence as u32))
    };
    lengths.iter().enumerate().flat_map(of).unzip()
}

fn attention(
    bench: &mut Bench,
    element: Element,
    [heads, kv_heads, width]: [usize; 3],
    lengths: &[usize],
    last: usize,
    seed: u64,
) -> Vec<f32> {
    let cache = Cache::new(bench, element, kv_heads, width, lengths, seed);
    let (positions, sequences) = rows(lengths, last);
    let count = positions.len();
    // The query of a row follows from its sequence and position, so that a row is the same in every batch.
    let queries: Vec<f32> = positions
        .iter()
        .zip(&sequences)
        .flat_map(|(position, sequence)| {
            random(seed + 1000 * u64::from(*sequence) + u64::from(*position), heads * width)
        })
        .collect();
    let (queries, to) =
        (bench.numbers(element, &queries), bench.numbers(element, &vec![0.0; count * heads * width]));
    let (positions, sequences) = (bench.words(&positions), bench.words(&sequences));
    bench.stream.attention(Attention {
        queries: &queries,
        rows: StepRows { count, positions: &positions, sequences: &sequences },
        heads,
        scale: 1.0 / (width as f32).sqrt(),
        sequences: cache.sequences(),
        kv: KvLayer { pages: &cache.pages, layer: 1 },
        to: &to,
    });
    bench.read(&to)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn linear_agrees_with_its_twin_under_every_epilogue(
        element in element(), count in 1_usize..12, inputs in 1_usize..150, half in 1_usize..90, bias: bool,
        seed in 0_u64..1000,
    ) {
        for epilogue in [Epilogue::None, Epilogue::Residual, Epilogue::Gate] {
            check(element, (inputs as f32).sqrt(), |bench| {
                linear(bench, element, [count, inputs, 2 * half], epilogue, bias, seed, 0..count)
            });
        }
    }

    #[test]
    fn a_row_of_a_product_has_the_same_bits_alone_and_among_others(
        element in element(), count in 2_usize..34, inputs in 1_usize..80, half in 1_usize..40, seed in 0_u64..1000,
    ) {
        for epilogue in [Epilogue::None, Epilogue::Residual, Epilogue::Gate] {
            same_bits(|bench| linear(bench, element, [count, inputs, 2 * half], epilogue, true, seed, 0..count), |bench| {
                (0..count)
                    .flat_map(|row| linear(bench, element, [count, inputs, 2 * half], epilogue, true, seed, row..row + 1))
                    .collect()
            });
        }
    }

    #[test]
    fn attention_agrees_with_its_twin_over_pages_in_any_order(
        element in element(), kv_heads in 1_usize..4, group in 1_usize..4, half in 1_usize..20,
        lengths in prop::collection::vec(1_usize..700, 1..4), last in 1_usize..6, seed in 0_u64..1000,
    ) {
        check(element, 1.0, |bench| {
            attention(bench, element, [kv_heads * group, kv_heads, 2 * half], &lengths, last, seed)
        });
    }

    #[test]
    fn norm_agrees_with_its_twin_with_and_without_an_addend(
        element in element(), count in 1_usize..40, width in 1_usize..600, seed in 0_u64..1000,
    ) {
        for add in [false, true] {
            check(element, 2.0, |bench| {
                let x = bench.numbers(element, &random(seed, count * width));
                let add = add.then(|| bench.numbers(element, &random(seed + 1, count * width)));
                let weight = bench.numbers(Element::F32, &random(seed + 2, width));
                let to = bench.numbers(element, &vec![0.0; count * width]);
                bench.stream.norm(Norm { x: &x, add: add.as_ref(), weight: &weight, epsilon: 1e-5, count, to: &to });
                let mut all = bench.read(&to);
                all.extend(bench.read(&x));
                all
            });
        }
    }

    #[test]
    fn qkv_store_agrees_with_its_twin_and_leaves_other_tokens_alone(
        element in element(), kv_heads in 1_usize..3, group in 1_usize..3, half in 1_usize..70, norms: bool,
        lengths in prop::collection::vec(1_usize..80, 1..4), last in 1_usize..40, whole: bool, seed in 0_u64..1000,
    ) {
        let (heads, width) = (kv_heads * group, 2 * half);
        let pairs = if whole { half } else { half / 2 };
        check(element, 2.0, |bench| {
            let cache = Cache::new(bench, element, kv_heads, width, &lengths, seed);
            let (positions, sequences) = rows(&lengths, last);
            let count = positions.len();
            let (positions, sequences) = (bench.words(&positions), bench.words(&sequences));
            let rows = StepRows { count, positions: &positions, sequences: &sequences };
            let frequencies: Vec<f64> = (0..pairs).map(|pair| 0.9_f64.powi(pair as i32)).collect();
            let rotations = bench.numbers(Element::F32, &vec![0.0; count * 2 * pairs]);
            bench.stream.rotations(Rotations { rows, frequencies: &frequencies, scale: 1.25, to: &rotations });
            let qkv = bench.numbers(element, &random(seed + 1, count * (heads + 2 * kv_heads) * width));
            let query_norm = norms.then(|| bench.numbers(Element::F32, &random(seed + 2, width)));
            let key_norm = norms.then(|| bench.numbers(Element::F32, &random(seed + 3, width)));
            let queries = bench.numbers(element, &vec![0.0; count * heads * width]);
            bench.stream.qkv_store(QkvStore {
                qkv: &qkv, rows, heads, query_norm: query_norm.as_ref(), key_norm: key_norm.as_ref(), epsilon: 1e-6,
                rotations: &rotations, pairs, sequences: cache.sequences(),
                kv: KvLayer { pages: &cache.pages, layer: 0 }, queries: &queries,
            });
            let mut all = bench.read(&queries);
            all.extend(bench.read(&cache.pages.memory));
            all
        });
    }

    #[test]
    fn embed_and_logits_and_gather_agree_with_their_twins(
        element in element(), vocab in 1_usize..200, width in 1_usize..100, count in 1_usize..20, seed in 0_u64..1000,
    ) {
        check(element, (width as f32).sqrt(), |bench| {
            let weights = random(seed, vocab * width);
            let row = |output: usize, to: &mut [f32]| to.copy_from_slice(&weights[output * width..][..width]);
            let matrix = Matrix { outputs: vocab, inputs: width, element, gated: false, bytes: &|_| None, row: &row };
            let table = bench.device.pack(matrix).unwrap();
            let ids: Vec<u32> = (0..count)
                .map(|at| if at % 3 == 1 { TOKEN_PREVIOUS } else { (at * 31 + 7) as u32 % vocab as u32 })
                .collect();
            let (tokens, positions) = (bench.words(&ids), bench.words(&vec![0; count]));
            let sequences = bench.words(&(0..count).map(|at| at as u32 % 2).collect::<Vec<_>>());
            let (slots, previous) = (bench.words(&[2, 0]), bench.words(&[vocab as u32 - 1, 99999, vocab as u32 / 2]));
            let hidden = bench.numbers(element, &vec![0.0; count * width]);
            let rows = StepRows { count, positions: &positions, sequences: &sequences };
            bench.stream.embed(Embed { table: &table, tokens: &tokens, rows, slots: &slots, previous: &previous, to: &hidden });
            let picked: Vec<u32> = (0..count as u32).rev().step_by(2).collect();
            let gathered = bench.numbers(element, &vec![0.0; picked.len() * width]);
            let rows = bench.words(&picked);
            bench.stream.gather_rows(&hidden, &rows, picked.len(), width, &gathered);
            let logits = bench.numbers(Element::F32, &vec![0.0; picked.len() * vocab]);
            let chunks = vocab.div_ceil(Logits::PEAK);
            let peaks = bench.numbers(Element::F32, &vec![0.0; picked.len() * chunks]);
            bench.stream.logits(Logits { x: &gathered, count: picked.len(), weight: &table, to: &logits, peaks: Some(&peaks) });
            let mut all = bench.read(&hidden);
            let (logits, peaks) = (bench.read(&logits), bench.read(&peaks));
            for (logits, peaks) in logits.chunks(vocab).zip(peaks.chunks(chunks)) {
                assert_eq!(peaks_of(logits), peaks);
            }
            all.extend(logits);
            all
        });
    }

    #[test]
    fn pages_are_copied_whole_and_zeroed_from_the_named_row(
        element in element(), heads in 1_usize..4, width in 1_usize..20, first_row in 0_u32..40, seed in 0_u64..1000,
    ) {
        check(element, 1.0, |bench| {
            let cache = Cache::new(bench, element, heads, width, &[200], seed);
            let pairs = bench.words(&[0, 5, 3, 1]);
            bench.stream.copy_pages(&cache.pages, &pairs, 2);
            bench.stream.zero_rows(&cache.pages, 3, first_row);
            bench.read(&cache.pages.memory)
        });
    }

    #[test]
    fn penalties_agree_with_their_twin(
        vocab in 2_usize..3000, count in 1_usize..6, repetition in 0.5_f32..2.0, frequency in -2.0_f32..2.0,
        presence in -2.0_f32..2.0, history in prop::collection::vec(any::<u32>(), 0..60), prompt in 0.0..1.0,
        seed in 0_u64..1000,
    ) {
        check(Element::F32, 1.0, |bench| {
            let history: Vec<u32> = history.iter().map(|token| token % vocab as u32).collect();
            let (raw, to) = (
                bench.numbers(Element::F32, &random(seed, count * vocab)),
                bench.numbers(Element::F32, &vec![0.0; count * vocab]),
            );
            let counts = bench.words(&vec![77; (count + 1) * vocab]);
            let tokens = bench.words(&history);
            let prompt = (prompt * history.len() as f64) as usize;
            for slot in 0..=count {
                bench.stream.tally(Tally { tokens: &tokens, prompt, slot, counts: &counts, vocab });
            }
            let rows: Vec<u32> = (0..count)
                .flat_map(|row| {
                    // Every third row has no penalties and reads no counts.
                    let off = row % 3 == 2;
                    let row = SampleRow { slot: row as u32 + 1, repetition, frequency, presence, ..SampleRow::default() };
                    let row = if off { SampleRow { repetition: 1.0, frequency: 0.0, presence: 0.0, ..row } } else { row };
                    row.to_words()
                })
                .collect();
            let first: Vec<u32> = (0..=count as u32).collect();
            let edited: Vec<u32> = (0..count).map(|row| (row * 13 % vocab) as u32).collect();
            let values: Vec<f32> = (0..count).map(|row| if row % 2 == 0 { f32::NEG_INFINITY } else { 2.5 }).collect();
            let (rows, first) = (bench.words(&rows), bench.words(&first));
            let (edited, values) = (bench.words(&edited), bench.numbers(Element::F32, &values));
            bench.stream.penalties(Penalties {
                raw: &raw, count, vocab, rows: &rows, edits: Edits { first: &first, tokens: &edited, values: &values },
                counts: Some(&counts), to: &to,
            });
            bench.read(&to)
        });
    }

    #[test]
    fn the_draw_and_its_log_probabilities_agree_with_their_twin(
        vocab in 2_usize..5000, temperature in prop_oneof![Just(0.0_f32), 0.3_f32..2.0],
        top_p in prop_oneof![Just(1.0_f32), 0.1_f32..1.0], top_k in prop_oneof![Just(0_u32), 1_u32..100],
        min_p in prop_oneof![Just(0.0_f32), 0.001_f32..0.5], top in 0_u8..21, seed: u64, adjusts: bool, peaks: bool,
    ) {
        let draw = |bench: &mut Bench| {
            let count = 8;
            let logits: Vec<f32> = random(seed % 1000, count * vocab).iter().map(|logit| logit * 4.0).collect();
            let adjusted: Vec<f32> = logits.iter().enumerate().map(|(at, logit)| if at % 7 == 0 { f32::NEG_INFINITY } else { *logit }).collect();
            let peaks_of: Vec<f32> = logits.chunks(vocab).flat_map(peaks_of).collect();
            let peaks_of = bench.numbers(Element::F32, &peaks_of);
            let (raw, adjusted) = (bench.numbers(Element::F32, &logits), bench.numbers(Element::F32, &adjusted));
            let adjusted = if adjusts { &adjusted } else { &raw };
            let rows: Vec<u32> = (0..count)
                .flat_map(|row| {
                    let flags = SamplingFlags { tallied: row % 2 == 0, logprob: row % 3 == 0, top };
                    SampleRow { slot: row as u32, position: row as u32 * 5, seed, temperature, top_p, top_k, min_p, flags, ..SampleRow::default() }.to_words()
                })
                .collect();
            let rows = bench.words(&rows);
            let (previous, counts) = (bench.words(&[9; 8]), bench.words(&vec![3; count * vocab]));
            let to = bench.words(&vec![5; count * SampleCall::WORDS]);
            bench.stream.sample(SampleCall {
                raw: &raw, adjusted, peaks: peaks.then_some(&peaks_of), count, vocab, rows: &rows, previous: &previous, counts: Some(&counts), to: &to,
            });
            let words = bench.read_words(&to);
            let mut all = Vec::new();
            for row in words.chunks(SampleCall::WORDS) {
                all.extend([row[0] as f32, row[1] as f32, f32::from_bits(row[2])]);
                all.extend(row[3..].chunks(2).flat_map(|pair| [pair[0] as f32, f32::from_bits(pair[1])]));
            }
            all.extend(bench.read_words(&previous).iter().map(|word| *word as f32));
            all.extend(bench.read_words(&counts).iter().map(|word| *word as f32));
            all
        };
        check(Element::F32, 1.0, draw);
    }
}

#[test]
fn large_shapes_that_are_shared_out_agree_too() {
    for element in [Element::F32, Element::Bf16] {
        for epilogue in [Epilogue::None, Epilogue::Residual, Epilogue::Gate] {
            check(element, 20.0, |bench| linear(bench, element, [37, 300, 514], epilogue, true, 5, 0..37));
        }
        check(element, 1.0, |bench| attention(bench, element, [8, 2, 256], &[1300, 40, 257], 3, 11));
    }
}

#[test]
fn a_row_has_the_same_bits_in_every_height_of_tile_and_block() {
    for element in [Element::F32, Element::Bf16] {
        for epilogue in [Epilogue::Residual, Epilogue::Gate] {
            // More inputs than are multiplied at a time, and one more than a pair; more rows than go together.
            let shape = [75, 1027, 70];
            let all = |bench: &mut Bench| linear(bench, element, shape, epilogue, true, 9, 0..75);
            for rows in [1, 2, 3, 6, 7, 13, 15, 29, 71] {
                same_bits(all, |bench| {
                    (0..75)
                        .step_by(rows)
                        .flat_map(|first| {
                            let range = first..(first + rows).min(75);
                            linear(bench, element, shape, epilogue, true, 9, range)
                        })
                        .collect()
                });
            }
        }
    }
}

#[test]
fn attention_of_a_row_has_the_same_bits_whichever_rows_are_with_it() {
    for element in [Element::F32, Element::Bf16] {
        // Alone, a row's context is split over three threads; in a prompt it is not.
        for (shape, rows) in [([4, 2, 24], 40), ([4, 2, 24], 1), ([3, 1, 64], 7), ([2, 2, 128], 2)] {
            let last = rows * shape[0] * shape[2];
            same_bits(
                |bench| attention(bench, element, shape, &[600], rows, 3),
                |bench| {
                    let whole = attention(bench, element, shape, &[600], 600, 3);
                    whole[whole.len() - last..].to_vec()
                },
            );
        }
    }
}

#[test]
fn a_row_of_few_queries_has_the_bits_that_it_has_in_a_prompt() {
    // Alone its keys and values are multiplied as they lie, in a prompt they become panels.
    for shape in [[1, 1, 64], [2, 1, 128], [4, 2, 192], [3, 1, 128], [4, 1, 64], [8, 2, 128]] {
        for length in [1, 2, 31, 32, 63, 256, 257, 512 + 33] {
            let last = shape[0] * shape[2];
            same_bits(
                |bench| attention(bench, Element::Bf16, shape, &[length], 1, 3),
                |bench| {
                    let whole = attention(bench, Element::Bf16, shape, &[length], length, 3);
                    whole[whole.len() - last..].to_vec()
                },
            );
        }
    }
}

#[test]
fn what_is_not_finite_in_a_token_is_seen_from_that_token_on_and_not_before() {
    const HEADS: usize = 2;
    const LENGTH: usize = 50;
    const BAD: usize = 37;
    // All rows of a prompt at once, or each of them alone.
    let run = |bench: &mut Bench, element: Element, width: usize, alone: bool, bad: Option<f32>| {
        let cache = Cache::new(bench, element, HEADS, width, &[LENGTH], 5);
        // Its table names pages in order; the token is in the second.
        for head in (0..HEADS).filter(|_| bad.is_some()) {
            let rows = ((cache.pages.layers + 1) * HEADS + head) * 64 + 32 + BAD % 32;
            let row = cache.pages.memory.part(rows * width..(rows + 1) * width);
            let values = bench.numbers(element, &vec![bad.unwrap_or_default(); width]);
            bench.stream.copy(&values, &row);
        }
        let queries = random(6, LENGTH * HEADS * width);
        let count = if alone { 1 } else { LENGTH };
        let mut all = Vec::new();
        for first in (0..LENGTH).step_by(count) {
            let positions: Vec<u32> = (first as u32..).take(count).collect();
            let (positions, sequences) = (bench.words(&positions), bench.words(&vec![0; count]));
            let queries = &queries[first * HEADS * width..][..count * HEADS * width];
            let (queries, to) =
                (bench.numbers(element, queries), bench.numbers(element, &vec![0.0; queries.len()]));
            bench.stream.attention(Attention {
                queries: &queries,
                rows: StepRows { count, positions: &positions, sequences: &sequences },
                heads: HEADS,
                scale: 0.2,
                sequences: cache.sequences(),
                kv: KvLayer { pages: &cache.pages, layer: 1 },
                to: &to,
            });
            all.extend(bench.read(&to));
        }
        all
    };
    for element in [Element::F32, Element::Bf16] {
        // The second width is one whose rows need no panels where they are alone.
        for (width, alone) in [(40, false), (64, false), (64, true)] {
            for bad in [f32::NAN, f32::INFINITY] {
                bench::each(|bench| {
                    let good = run(bench, element, width, alone, None);
                    let got = run(bench, element, width, alone, Some(bad));
                    let (before, after) = got.split_at(BAD * HEADS * width);
                    assert!(good[..before.len()] == *before, "{bad} {element:?}: an earlier token sees it");
                    assert!(
                        after.iter().all(|value| !value.is_finite()),
                        "{bad} {element:?}: a later one does not"
                    );
                });
            }
        }
    }
}

#[test]
fn virtually_contiguous_kv_gives_the_bits_of_a_table_that_counts_up() {
    same_bits(|bench| contiguous(bench, false), |bench| contiguous(bench, true));
}

fn contiguous(bench: &mut Bench, base: bool) -> Vec<f32> {
    let cache = Cache::new(bench, Element::F32, 1, 8, &[96, 96, 96], 1);
    let (tables, bases) = (bench.words(&[4, 5, 6]), bench.words(&[4]));
    let (positions, sequences) = (bench.words(&[80, 5]), bench.words(&[0, 0]));
    let (queries, to) =
        (bench.numbers(Element::F32, &random(2, 16)), bench.numbers(Element::F32, &[0.0; 16]));
    bench.stream.attention(Attention {
        queries: &queries,
        rows: StepRows { count: 2, positions: &positions, sequences: &sequences },
        heads: 1,
        scale: 0.3,
        sequences: match base {
            true => Sequences::Contiguous { bases: &bases },
            false => Sequences::Tables { pages: &tables, stride: 3 },
        },
        kv: KvLayer { pages: &cache.pages, layer: 0 },
        to: &to,
    });
    bench.read(&to)
}

/// What [`Logits`] says of them.
fn peaks_of(logits: &[f32]) -> Vec<f32> {
    let peak = |logits: &[f32]| match logits.iter().all(|logit| logit.is_finite()) {
        true => logits.iter().copied().fold(f32::NEG_INFINITY, f32::max),
        false => f32::NAN,
    };
    logits.chunks(Logits::PEAK).map(peak).collect()
}

/// Status and token of a row of logits.
fn drawn(bench: &mut Bench, raw: &[f32], adjusted: &[f32]) -> (u32, u32) {
    let vocab = raw.len();
    let peaks = bench.numbers(Element::F32, &peaks_of(raw));
    let same = std::ptr::eq(raw, adjusted);
    let (raw, adjusted) = (bench.numbers(Element::F32, raw), bench.numbers(Element::F32, adjusted));
    let adjusted = if same { &raw } else { &adjusted };
    let rows = bench.words(&SampleRow::default().to_words());
    let (previous, to) = (bench.words(&[0]), bench.words(&[0; SampleCall::WORDS]));
    bench.stream.sample(SampleCall {
        raw: &raw,
        adjusted,
        peaks: Some(&peaks),
        count: 1,
        vocab,
        rows: &rows,
        previous: &previous,
        counts: None,
        to: &to,
    });
    let words = bench.read_words(&to);
    (words[0], words[1])
}

#[test]
fn of_equal_logits_the_lowest_id_wins_wherever_they_stand() {
    for (low, high) in [(0, 1), (3, 40), (17, 33), (62, 63), (15, 16)] {
        let mut logits = vec![-1.0; 67];
        logits[low] = 2.0;
        logits[high] = 2.0;
        bench::each(|bench| assert_eq!(drawn(bench, &logits, &logits), (SampleCall::DRAWN, low as u32)));
    }
}

#[test]
fn a_row_that_is_not_finite_or_wholly_forbidden_is_reported_and_draws_nothing() {
    for (at, bad) in [(0, f32::NAN), (33, f32::INFINITY), (66, f32::NEG_INFINITY)] {
        let mut logits = vec![1.0; 67];
        logits[at] = bad;
        bench::each(|bench| {
            assert_eq!(drawn(bench, &logits, &logits).0, SampleCall::NOT_FINITE, "{bad} at {at}")
        });
    }
    let (fine, mut adjusted) = (vec![1.0; 67], vec![f32::NEG_INFINITY; 67]);
    adjusted[3] = 0.0;
    bench::each(|bench| assert_eq!(drawn(bench, &fine, &adjusted), (SampleCall::DRAWN, 3)));
    for bad in [f32::NAN, f32::INFINITY] {
        adjusted[50] = bad;
        bench::each(|bench| assert_eq!(drawn(bench, &fine, &adjusted).0, SampleCall::NOT_FINITE, "{bad}"));
    }
    let (fine, forbidden) = (vec![1.0; 9], vec![f32::NEG_INFINITY; 9]);
    bench::each(|bench| assert_eq!(drawn(bench, &fine, &forbidden).0, SampleCall::NOT_FINITE));
}

#[test]
fn draws_at_temperature_one_follow_the_probabilities() {
    let probabilities = [0.5_f32, 0.25, 0.125, 0.125];
    let logits: Vec<f32> = probabilities.iter().map(|p| p.ln()).collect();
    bench::each(|bench| {
        let count = 4000;
        let raw = bench.numbers(Element::F32, &logits.repeat(count));
        let rows: Vec<u32> = (0..count)
            .flat_map(|row| {
                SampleRow {
                    position: row as u32,
                    seed: 42,
                    temperature: 1.0,
                    top_p: 1.0,
                    ..SampleRow::default()
                }
                .to_words()
            })
            .collect();
        // Each row has a slot of its own, since rows are drawn by several threads.
        let rows: Vec<u32> = rows
            .chunks(SampleRow::WORDS)
            .enumerate()
            .flat_map(|(at, row)| SampleRow { slot: at as u32, ..SampleRow::from_words(row) }.to_words())
            .collect();
        let (rows, previous) = (bench.words(&rows), bench.words(&vec![0; count]));
        let to = bench.words(&vec![0; count * SampleCall::WORDS]);
        bench.stream.sample(SampleCall {
            raw: &raw,
            adjusted: &raw,
            peaks: None,
            count,
            vocab: 4,
            rows: &rows,
            previous: &previous,
            counts: None,
            to: &to,
        });
        let words = bench.read_words(&to);
        for (token, probability) in probabilities.iter().enumerate() {
            let hits = words.chunks(SampleCall::WORDS).filter(|row| row[1] as usize == token).count();
            let share = hits as f32 / count as f32;
            assert!((share - probability).abs() < 0.03, "token {token}: {share} instead of {probability}");
        }
    });
}
