//! Products of quantised weights against their plain twin, on odd shapes, and the promise that bits do not depend on
//! the number of threads or the other rows.

mod bench;

use bench::{Bench, check, each, random, same_bits};
use proptest::prelude::*;
use tandem_device::{
    Element, Epilogue, INT8_INPUTS_MAX, Int4Row, LinearCall, QuantisedMatrix, QuantisedRows,
};

/// Which integers the weights are.
#[derive(Clone, Copy, Debug)]
enum Form {
    Int8,
    Int4 { group: usize },
}

fn form() -> impl Strategy<Value = Form> {
    let group = prop_oneof![Just(8_usize), Just(32), Just(64), Just(120), Just(1024)];
    prop_oneof![Just(Form::Int8), group.prop_map(|group| Form::Int4 { group })]
}

const EPILOGUES: [Epilogue; 3] = [Epilogue::None, Epilogue::Residual, Epilogue::Gate];

/// A product with everything random but the shape; `x` may change the rows.
struct Product<'a> {
    element: Element,
    form: Form,
    count: usize,
    inputs: usize,
    outputs: usize,
    epilogue: Epilogue,
    bias: bool,
    seed: u64,
    x: &'a (dyn Fn(&mut [f32]) + Sync),
}

impl Product<'_> {
    /// Some of its rows.
    fn run(&self, bench: &mut Bench, rows: std::ops::Range<usize>) -> Vec<f32> {
        let &Product { element, count, inputs, outputs, seed, .. } = self;
        let gated = self.epilogue == Epilogue::Gate;
        let noise = random(seed, outputs * inputs);
        let scale = |output: usize| 0.01 + (output * 7 % 5) as f32 / 256.0;
        let int8 = |output: usize, row: &mut [i8]| {
            for (value, noise) in row.iter_mut().zip(&noise[output * inputs..]) {
                *value = (noise * 128.0) as i8;
            }
            scale(output)
        };
        let int4 = |output: usize, row: Int4Row<'_>| {
            for (value, noise) in row.values.iter_mut().zip(&noise[output * inputs..]) {
                *value = ((noise + 1.0) * 8.0) as u8;
            }
            for (group, (scale_of, zero)) in row.scales.iter_mut().zip(row.zeros).enumerate() {
                *scale_of = scale(output + group);
                *zero = ((output + 3 * group) % 17) as u8;
            }
        };
        let rows_of = match self.form {
            Form::Int8 => QuantisedRows::Int8(&int8),
            Form::Int4 { group } => QuantisedRows::Int4 { group, row: &int4 },
        };
        let matrix = QuantisedMatrix { outputs, inputs, gated, rows: rows_of };
        let weight = bench.device.pack_quantised(matrix).unwrap();
        let width = if gated { outputs / 2 } else { outputs };
        let mut x = random(seed + 1, count * inputs);
        (self.x)(&mut x);
        let part = |values: Vec<f32>, width: usize| values[rows.start * width..rows.end * width].to_vec();
        let x = bench.numbers(element, &part(x, inputs));
        let to = bench.numbers(element, &part(random(seed + 2, count * width), width));
        let bias = self.bias.then(|| bench.numbers(Element::F32, &random(seed + 3, outputs)));
        bench.stream.linear(LinearCall {
            x: &x,
            count: rows.len(),
            weight: &weight,
            bias: bias.as_ref(),
            epilogue: self.epilogue,
            to: &to,
        });
        bench.read(&to)
    }
}

fn product(
    element: Element,
    form: Form,
    [count, inputs, outputs]: [usize; 3],
    seed: u64,
) -> Product<'static> {
    let (epilogue, bias, x) = (Epilogue::None, true, &|_: &mut [f32]| {});
    Product { element, form, count, inputs, outputs, epilogue, bias, seed, x }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn quantised_products_agree_with_their_twin_under_every_epilogue(
        bf16: bool, form in form(), count in 1_usize..12, inputs in 1_usize..300, half in 1_usize..70, bias: bool,
        seed in 0_u64..1000,
    ) {
        let element = if bf16 { Element::Bf16 } else { Element::F32 };
        for epilogue in EPILOGUES {
            let product = Product { epilogue, bias, ..product(element, form, [count, inputs, 2 * half], seed) };
            check(element, (inputs as f32).sqrt(), |bench| product.run(bench, 0..count));
        }
    }

    #[test]
    fn a_row_of_a_quantised_product_has_the_same_bits_alone_and_among_others(
        bf16: bool, form in form(), count in 2_usize..80, inputs in 1_usize..200, half in 1_usize..40,
        together in 1_usize..9, seed in 0_u64..1000,
    ) {
        let element = if bf16 { Element::Bf16 } else { Element::F32 };
        for epilogue in EPILOGUES {
            let product = Product { epilogue, ..product(element, form, [count, inputs, 2 * half], seed) };
            same_bits(|bench| product.run(bench, 0..count), |bench| {
                let firsts = (0..count).step_by(together);
                firsts.flat_map(|first| product.run(bench, first..(first + together).min(count))).collect()
            });
        }
    }
}

#[test]
fn large_quantised_shapes_that_are_shared_out_agree_too() {
    for element in [Element::F32, Element::Bf16] {
        for form in [Form::Int8, Form::Int4 { group: 64 }] {
            for epilogue in EPILOGUES {
                let product = Product { epilogue, ..product(element, form, [75, 1027, 514], 5) };
                check(element, 40.0, |bench| product.run(bench, 0..75));
            }
        }
    }
}

#[test]
fn a_row_that_is_not_finite_is_so_in_its_results_and_leaves_the_others_alone() {
    for form in [Form::Int8, Form::Int4 { group: 32 }] {
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let plain = product(Element::F32, form, [5, 70, 40], 3);
            let spoil = |x: &mut [f32]| x[2 * 70 + 13] = bad;
            let spoilt = Product { x: &spoil, ..product(Element::F32, form, [5, 70, 40], 3) };
            each(|bench| {
                let (good, got) = (plain.run(bench, 0..5), spoilt.run(bench, 0..5));
                assert!(got[80..120].iter().all(|value| !value.is_finite()), "{form:?} {bad}");
                assert_eq!([&got[..80], &got[120..]].concat(), [&good[..80], &good[120..]].concat());
            });
        }
    }
}

#[test]
fn a_row_of_zeros_has_the_bias_as_its_product() {
    for form in [Form::Int8, Form::Int4 { group: 32 }] {
        let zeros = |x: &mut [f32]| x.fill(0.0);
        let product = Product { x: &zeros, ..product(Element::F32, form, [2, 33, 20], 3) };
        each(|bench| assert_eq!(product.run(bench, 0..2), random(6, 20).repeat(2)));
    }
}

#[test]
fn more_inputs_than_whole_sums_can_hold_are_refused() {
    each(|bench| {
        let row = |_: usize, _: &mut [i8]| 1.0;
        let rows = QuantisedRows::Int8(&row);
        let matrix = QuantisedMatrix { outputs: 1, inputs: INT8_INPUTS_MAX + 1, gated: false, rows };
        let refusal = bench.device.pack_quantised(matrix).err().expect("too many").to_string();
        assert_eq!(refusal, "8-bit integers with 65537 inputs; at most 65536 are supported");
    });
}
