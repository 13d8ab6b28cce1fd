//! Small models with one matrix in each format, and everything that can be wrong with them.

use proptest::prelude::*;
use serde_json::json;

use super::*;
use crate::spec::{LayerPart, Part};
use crate::testing::{Written, changed, qwen3, safetensors, weights};
use crate::{Checkpoint, from_bytes};

const STEM: &str = "model.layers.0.self_attn.q_proj";
/// Of the query projection.
const OUTPUTS: usize = 16;
const INPUTS: usize = 24;

/// A small model whose hidden rows have 24 elements.
fn facts(quantization: &Value) -> Value {
    changed(qwen3(), json!({"hidden_size": INPUTS, "quantization_config": quantization}))
}

fn written(name: &str, dtype: &'static str, shape: &[usize], bytes: Vec<u8>) -> Written {
    Written { name: format!("{STEM}.{name}"), dtype, shape: shape.to_vec(), bytes }
}

fn f16(values: impl IntoIterator<Item = f32>) -> Vec<u8> {
    values.into_iter().flat_map(|value| half::f16::from_f32(value).to_le_bytes()).collect()
}

fn f32(values: impl IntoIterator<Item = f32>) -> Vec<u8> {
    values.into_iter().flat_map(f32::to_le_bytes).collect()
}

fn i32(values: impl IntoIterator<Item = u32>) -> Vec<u8> {
    values.into_iter().flat_map(u32::to_le_bytes).collect()
}

/// The model with its first query projection in the pieces given.
fn opened(quantization: &Value, pieces: &[Written]) -> Result<Checkpoint, String> {
    let facts = facts(quantization);
    let mut all = weights(&changed(facts.clone(), json!({"quantization_config": null})));
    all.retain(|weight| weight.name != format!("{STEM}.weight"));
    all.extend(pieces.iter().cloned());
    from_bytes(facts.to_string().as_bytes(), safetensors(&all)).map_err(|error| error.to_string())
}

fn rows(opened: &Checkpoint) -> Vec<Vec<f32>> {
    let matrix = opened.matrix(Part::Layer(0, LayerPart::Query));
    assert_eq!((matrix.outputs(), matrix.inputs()), (OUTPUTS, INPUTS));
    let row = |row| {
        let mut numbers = vec![9.0; INPUTS];
        matrix.read_row(row, &mut numbers);
        numbers
    };
    (0..OUTPUTS).map(row).collect()
}

/// Whether the integers of each row stand for the numbers of each row.
fn agrees(opened: &Checkpoint, group: usize) {
    let matrix = opened.matrix(Part::Layer(0, LayerPart::Query));
    assert_eq!(matrix.form(), MatrixForm::Int4 { group });
    let groups = INPUTS.div_ceil(group);
    for (row, numbers) in rows(opened).iter().enumerate() {
        let (mut values, mut scales, mut zeros) = (vec![0; INPUTS], vec![0.0; groups], vec![0; groups]);
        matrix.read_int4(row, Int4Row { values: &mut values, scales: &mut scales, zeros: &mut zeros });
        for (input, number) in numbers.iter().enumerate() {
            let group = input / group;
            assert_eq!((f32::from(values[input]) - f32::from(zeros[group])) * scales[group], *number);
        }
    }
}

fn gptq() -> Value {
    json!({"quant_method": "gptq", "bits": 4, "group_size": 16})
}

fn awq() -> Value {
    json!({"quant_method": "awq", "bits": 4, "group_size": 16, "zero_point": true, "version": "gemm"})
}

fn int8() -> Value {
    let weights =
        json!({"num_bits": 8, "type": "int", "symmetric": true, "strategy": "channel", "dynamic": false});
    let rows = json!({"num_bits": 8, "type": "int", "symmetric": true, "strategy": "token", "dynamic": true});
    json!({"quant_method": "compressed-tensors", "format": "int-quantized",
           "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": rows}}})
}

fn fp8() -> Value {
    json!({"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [8, 16]})
}

/// The value of an input for an output, and the zero point of a group.
fn value(output: usize, input: usize) -> u32 {
    ((output * 5 + input * 3) % 16) as u32
}

fn zero(output: usize, group: usize) -> u32 {
    ((output * 7 + group) % 15 + 1) as u32
}

fn scale(output: usize, group: usize) -> f32 {
    0.25 + (output + group) as f32 / 64.0
}

fn word(nibbles: impl Fn(usize) -> u32) -> u32 {
    (0..8).map(|at| nibbles(at) << (4 * at)).sum()
}

/// Scales of two groups, and the values and zero points of GPTQ, whose zero points are stored less one.
fn gptq_pieces() -> Vec<Written> {
    let words = (0..INPUTS / 8).flat_map(|at| (0..OUTPUTS).map(move |output| (at, output)));
    let values = words.map(|(at, output)| word(|place| value(output, 8 * at + place)));
    let words = (0..2).flat_map(|group| (0..OUTPUTS / 8).map(move |at| (group, at)));
    let zeros = words.map(|(group, at)| word(|place| zero(8 * at + place, group) - 1));
    vec![
        written("qweight", "I32", &[INPUTS / 8, OUTPUTS], i32(values)),
        written("qzeros", "I32", &[2, OUTPUTS / 8], i32(zeros)),
        written("scales", "F16", &[2, OUTPUTS], scales()),
    ]
}

fn scales() -> Vec<u8> {
    f16((0..2).flat_map(|group| (0..OUTPUTS).map(move |output| scale(output, group))))
}

fn awq_pieces() -> Vec<Written> {
    // What lies at each place of a word, as its public description has it.
    const ORDER: [usize; 8] = [0, 2, 4, 6, 1, 3, 5, 7];
    let words = (0..INPUTS).flat_map(|input| (0..OUTPUTS / 8).map(move |at| (input, at)));
    let values = words.map(|(input, at)| word(|place| value(8 * at + ORDER[place], input)));
    let words = (0..2).flat_map(|group| (0..OUTPUTS / 8).map(move |at| (group, at)));
    let zeros = words.map(|(group, at)| word(|place| zero(8 * at + ORDER[place], group)));
    vec![
        written("qweight", "I32", &[INPUTS, OUTPUTS / 8], i32(values)),
        written("qzeros", "I32", &[2, OUTPUTS / 8], i32(zeros)),
        written("scales", "F16", &[2, OUTPUTS], scales()),
    ]
}

fn int8_pieces() -> Vec<Written> {
    let bytes = (0..OUTPUTS * INPUTS).map(|at| (at * 37) as u8).collect();
    let scales = f32((0..OUTPUTS).map(|output| scale(output, 0)));
    vec![
        written("weight", "I8", &[OUTPUTS, INPUTS], bytes),
        written("weight_scale", "F32", &[OUTPUTS, 1], scales),
    ]
}

fn fp8_pieces() -> Vec<Written> {
    let bytes = (0..OUTPUTS * INPUTS).map(|at| (at % 127) as u8).collect();
    let scales = f32((0..4).map(|block| scale(block, 0)));
    vec![
        written("weight", "F8_E4M3", &[OUTPUTS, INPUTS], bytes),
        written("weight_scale_inv", "F32", &[2, 2], scales),
    ]
}

#[test]
fn gptq_and_awq_give_the_numbers_their_integers_stand_for() {
    let wanted = |group: &dyn Fn(usize) -> usize| -> Vec<Vec<f32>> {
        let number = |output, input| {
            let group = group(input);
            (value(output, input) as f32 - zero(output, group) as f32) * scale(output, group)
        };
        (0..OUTPUTS).map(|output| (0..INPUTS).map(|input| number(output, input)).collect()).collect()
    };
    for (config, pieces) in [(gptq(), gptq_pieces()), (awq(), awq_pieces())] {
        let opened = opened(&config, &pieces).unwrap();
        assert_eq!(rows(&opened), wanted(&|input| input / 16));
        agrees(&opened, 16);
    }
    // Groups listed in order are groups in order; in another order they are read as numbers.
    let listed = |group: &dyn Fn(usize) -> usize| {
        let list = written("g_idx", "I32", &[INPUTS], i32((0..INPUTS).map(|input| group(input) as u32)));
        opened(&gptq(), &[gptq_pieces(), vec![list]].concat()).unwrap()
    };
    agrees(&listed(&|input| input / 16), 16);
    let mixed = |input: usize| input * 5 % 2;
    let opened = listed(&mixed);
    assert_eq!(opened.matrix(Part::Layer(0, LayerPart::Query)).form(), MatrixForm::Numbers);
    assert_eq!(rows(&opened), wanted(&mixed));
}

#[test]
fn the_second_format_of_gptq_stores_zero_points_as_they_are() {
    let second = changed(gptq(), json!({"checkpoint_format": "gptq_v2"}));
    let (first, second) = (opened(&gptq(), &gptq_pieces()), opened(&second, &gptq_pieces()));
    let (first, second) = (rows(&first.unwrap()), rows(&second.unwrap()));
    assert_eq!(second[3][2] - first[3][2], scale(3, 0));
}

#[test]
fn int8_and_fp8_give_bytes_times_scales() {
    let int8 = opened(&int8(), &int8_pieces()).unwrap();
    let mut bytes = [0; INPUTS];
    let matrix = int8.matrix(Part::Layer(0, LayerPart::Query));
    assert_eq!((matrix.form(), matrix.read_int8(3, &mut bytes)), (MatrixForm::Int8, scale(3, 0)));
    assert_eq!(bytes[5], ((3 * INPUTS + 5) * 37) as u8 as i8);
    assert_eq!(rows(&int8)[3][5], f32::from(bytes[5]) * scale(3, 0));
    let one = written("weight_scale", "BF16", &[1], vec![0, 63]);
    let tensor = opened(&self::int8(), &[int8_pieces()[0].clone(), one]).unwrap();
    assert_eq!(rows(&tensor)[15][0], f32::from((15 * INPUTS * 37) as u8 as i8) * 0.5);

    let fp8 = rows(&opened(&fp8(), &fp8_pieces()).unwrap());
    for (output, input) in [(0, 0), (7, 15), (7, 16), (8, 3), (15, 23)] {
        let block = output / 8 * 2 + input / 16;
        let byte = ((output * INPUTS + input) % 127) as u8;
        assert_eq!(fp8[output][input], e4m3(byte) * scale(block, 0));
    }
}

#[test]
fn eight_bit_floats_have_their_published_values() {
    for (byte, value) in [
        (0x00, 0.0),
        (0x01, 2_f32.powi(-9)),
        (0x07, 7.0 * 2_f32.powi(-9)),
        (0x08, 2_f32.powi(-6)),
        (0x38, 1.0),
        (0x3c, 1.5),
        (0x7e, 448.0),
        (0xc0, -2.0),
    ] {
        assert_eq!(e4m3(byte), value, "{byte:#x}");
    }
    assert!(e4m3(0x7f).is_nan() && e4m3(0xff).is_nan());
}

#[test]
fn a_matrix_of_ordinary_type_is_taken_as_it_is_under_every_scheme() {
    let plain = weights(&changed(facts(&gptq()), json!({"quantization_config": null})));
    let query = plain.iter().find(|weight| weight.name == format!("{STEM}.weight")).unwrap();
    for config in [gptq(), awq(), int8(), fp8()] {
        let opened = opened(&config, std::slice::from_ref(query)).unwrap();
        assert_eq!(rows(&opened)[0], opened.weight(Part::Layer(0, LayerPart::Query)).to_f32()[..INPUTS]);
    }
}

#[test]
fn every_fault_of_a_quantised_matrix_is_named() {
    let check = |config: Value, mut pieces: Vec<Written>, change: &dyn Fn(&mut Vec<Written>), fact: &str| {
        change(&mut pieces);
        let refusal = opened(&config, &pieces).err().unwrap_or_else(|| panic!("opened, without {fact:?}"));
        assert!(
            refusal.starts_with("model.safetensors: ") && refusal.contains(fact),
            "{refusal:?} for {fact:?}"
        );
    };
    let nan = f32::NAN.to_le_bytes();
    check(
        int8(),
        int8_pieces(),
        &|p| p[1].bytes[8..12].copy_from_slice(&nan),
        "weight_scale has the scale NaN at 2",
    );
    let infinite = f32::INFINITY.to_le_bytes();
    check(fp8(), fp8_pieces(), &|p| p[1].bytes[..4].copy_from_slice(&infinite), "has the scale inf at 0");
    check(gptq(), gptq_pieces(), &|p| p[2].bytes[1] = 0x7e, "q_proj.scales has the scale NaN at 0");
    check(int8(), int8_pieces(), &|p| drop(p.pop()), "q_proj.weight_scale is missing");
    check(awq(), awq_pieces(), &|p| drop(p.remove(1)), "q_proj.qzeros is missing");
    check(gptq(), gptq_pieces(), &|p| drop(p.remove(0)), "q_proj.qweight is missing");
    check(int8(), int8_pieces(), &|p| p[1].shape = vec![1, OUTPUTS], "weight_scale has shape [1, 16]");
    check(
        fp8(),
        fp8_pieces(),
        &|p| p[1].shape = vec![4, 1],
        "weight_scale_inv has shape [4, 1]; the config asks for [2, 2]",
    );
    check(
        gptq(),
        gptq_pieces(),
        &|p| p[0].shape.reverse(),
        "qweight has shape [16, 3]; the config asks for [3, 16]",
    );
    check(
        awq(),
        awq_pieces(),
        &|p| p[2].dtype = "I16",
        "scales has dtype I16; its format asks for F32, BF16, F16",
    );
    let bare = |pieces: &mut Vec<Written>| drop(pieces.pop());
    check(gptq(), int8_pieces(), &bare, "q_proj.weight has dtype I8; supported are BF16, F16 and F32");
    for wrong in [2, u32::MAX] {
        let list = move |pieces: &mut Vec<Written>| {
            let groups = (0..INPUTS).map(|input| if input == 9 { wrong } else { 0 });
            pieces.push(written("g_idx", "I32", &[INPUTS], i32(groups)));
        };
        check(gptq(), gptq_pieces(), &list, &format!("has group {} of 2", wrong as i32));
    }
}

#[test]
fn a_scheme_that_is_not_had_is_refused_by_naming_what_is() {
    let check = |config: Value, changes: Value, fact: &str| {
        let refusal = opened(&changed(config, changes), &[]).err().expect("it is refused");
        assert!(refusal.starts_with("config.json: ") && refusal.contains(fact), "{refusal:?} for {fact:?}");
    };
    check(
        gptq(),
        json!({"quant_method": "bitsandbytes"}),
        "supported are compressed-tensors, fp8, gptq and awq",
    );
    check(gptq(), json!({"quant_method": "absent"}), "quantization_config has no quant_method");
    check(gptq(), json!({"bits": 3}), "bits is 3; supported: 4");
    check(gptq(), json!({"group_size": 0}), "group_size is 0; supported are -1 and sizes from 1");
    check(gptq(), json!({"group_size": 1_u64 << 60}), "group_size is 1152921504606846976");
    check(gptq(), json!({"checkpoint_format": "marlin"}), "checkpoint_format marlin");
    check(awq(), json!({"version": "gemv"}), "version is \"gemv\"; supported: \"gemm\"");
    check(awq(), json!({"zero_point": false}), "zero_point is false; supported: true");
    check(
        fp8(),
        json!({"weight_block_size": "absent"}),
        "weight_block_size is null; supported are two sizes",
    );
    check(fp8(), json!({"weight_block_size": [0, 128]}), "weight_block_size is [0,128]");
    check(fp8(), json!({"activation_scheme": "static"}), "activation_scheme is \"static\"");
    check(int8(), json!({"format": "pack-quantized"}), "format is \"pack-quantized\"");
    check(int8(), json!({"config_groups": {}}), "has no config_groups");
    let groups =
        json!({"config_groups": {"group_0": {"weights": int8()["config_groups"]["group_0"]["weights"]}}});
    check(int8(), groups, "input_activations that are not quantised are not supported");
    let mut four = int8();
    four["config_groups"]["group_0"]["weights"]["num_bits"] = json!(4);
    check(four, json!({}), "num_bits is 4; supported: 8");
}

proptest! {
#[test]
    fn no_scheme_makes_the_reader_panic(
        method in prop::sample::select(vec!["gptq", "awq", "fp8", "compressed-tensors", "x"]),
        group in prop_oneof![Just(json!(null)), any::<i64>().prop_map(Value::from)],
        block in prop::collection::vec(any::<u64>(), 0..4), bits in 0..9_u8,
    ) {
        let config = json!({
            "quant_method": method, "bits": bits, "group_size": group, "zero_point": true, "version": "gemm",
            "activation_scheme": "dynamic", "weight_block_size": block,
        });
        let pieces = [gptq_pieces(), int8_pieces(), fp8_pieces()].into_iter().flatten();
        let mut pieces: Vec<Written> = pieces.collect();
        pieces.dedup_by(|a, b| a.name == b.name);
        let _ = opened(&config, &pieces);
    }
}
