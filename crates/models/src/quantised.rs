//! Matrices as they lie in a checkpoint: numbers, or one of four quantised formats. Formats end here: what is read
//! from a [`Matrix`] is rows of numbers, of 8-bit integers with a scale, or of 4-bit integers in groups.
//!
//! Whether a matrix is quantised says the file: where a scheme is configured, a tensor of an ordinary element type
//! is taken as it is.

use serde_json::Value;

use crate::config::Config;
use crate::error::Error;
use crate::weights::{Dtype, Raw, Tensor, Weights};

/// How a checkpoint's matrices are quantised, as its config says.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Scheme {
    /// Not at all.
    None,
    /// compressed-tensors `int-quantized`: a scale per output; activations per token at run time.
    Int8,
    /// 8-bit floats (e4m3) with a scale per block of `[outputs, inputs]`.
    Fp8 { block: [usize; 2] },
    /// GPTQ, 4 bits; `None` is one group. Stored zero points have `offset` added when they are read.
    Gptq { group: Option<usize>, offset: u8 },
    /// AWQ, 4 bits, in the order of its GEMM kernels.
    Awq { group: Option<usize> },
}

/// What a matrix's rows can be read as beside numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MatrixForm {
    /// Numbers only.
    Numbers,
    /// 8-bit integers with a scale per row; its product takes rows that are quantised alike.
    Int8,
    /// 4-bit integers in groups of so many inputs.
    Int4 {
        /// Inputs of a group; the last one may have fewer.
        group: usize,
    },
}

/// A matrix of a checkpoint: `outputs` rows of `inputs`.
pub struct Matrix<'a> {
    outputs: usize,
    inputs: usize,
    /// Which of the stored rows is the first.
    first: usize,
    values: Values<'a>,
}

enum Values<'a> {
    Numbers(Tensor<'a>),
    Int8 {
        bytes: &'a [u8],
        scales: Vec<f32>,
    },
    Fp8 {
        bytes: &'a [u8],
        scales: Vec<f32>,
        block: [usize; 2],
    },
    Int4 {
        words: &'a [u8],
        packing: Packing,
        /// Outputs of the stored tensor.
        width: usize,
        /// `[group][stored output]`.
        scales: Vec<f32>,
        zeros: Vec<u8>,
        groups: Groups,
    },
}

/// What eight values share a word of 32 bits.
#[derive(Clone, Copy, PartialEq)]
enum Packing {
    /// Eight inputs of an output, the first lowest; words lie `[inputs / 8][outputs]`.
    Inputs,
    /// Eight outputs at an input, in AWQ's order; words lie `[inputs][outputs / 8]`.
    Outputs,
}

/// The group of each input.
enum Groups {
    /// So many inputs each, in order.
    Even(usize),
    /// As listed.
    Listed(Vec<u32>),
}

/// One row in 4-bit integers: the value of an input is `(values - zeros of its group) * scales of its group`.
pub struct Int4Row<'a> {
    /// One per input, 0 to 15.
    pub values: &'a mut [u8],
    /// One per group.
    pub scales: &'a mut [f32],
    /// One per group, 0 to 16.
    pub zeros: &'a mut [u8],
}

impl Scheme {
    /// What a config asks for, or why it cannot be had.
    pub fn read(config: &Config) -> Result<Scheme, Error> {
        let found = ["quantization_config", "compression_config"]
            .into_iter()
            .find_map(|key| Some((key, config.get(key)?)));
        let Some((place, facts)) = found else { return Ok(Scheme::None) };
        Stated { config, place, facts }.scheme()
    }

    /// What it is called in its config.
    pub fn name(self) -> Option<&'static str> {
        match self {
            Scheme::None => None,
            Scheme::Int8 => Some("compressed-tensors"),
            Scheme::Fp8 { .. } => Some("fp8"),
            Scheme::Gptq { .. } => Some("gptq"),
            Scheme::Awq { .. } => Some("awq"),
        }
    }
}

/// What a config says of quantisation.
struct Stated<'a> {
    config: &'a Config,
    place: &'static str,
    facts: &'a Value,
}

impl Stated<'_> {
    fn scheme(&self) -> Result<Scheme, Error> {
        match self.facts.get("quant_method").and_then(Value::as_str) {
            Some("compressed-tensors") => self.compressed_tensors(),
            Some("fp8") => self.fp8(),
            Some("gptq") => {
                self.expect(self.facts, "bits", &[Value::from(4)])?;
                let offset = match self.facts.get("checkpoint_format").and_then(Value::as_str) {
                    None | Some("gptq") => 1,
                    Some("gptq_v2") => 0,
                    Some(other) => return Err(self.unsupported(&format!("checkpoint_format {other}"))),
                };
                Ok(Scheme::Gptq { group: self.group()?, offset })
            }
            Some("awq") => {
                let key = if self.facts.get("bits").is_some() { "bits" } else { "w_bit" };
                self.expect(self.facts, key, &[Value::from(4)])?;
                self.expect(self.facts, "zero_point", &[Value::from(true)])?;
                self.expect(self.facts, "version", &[Value::from("gemm"), Value::from("GEMM"), Value::Null])?;
                Ok(Scheme::Awq { group: self.group()? })
            }
            Some(other) => Err(self.unsupported(&format!(
                "quant_method {other} is not supported; supported are compressed-tensors, fp8, gptq and awq"
            ))),
            None => Err(self.config.broken(format!("{} has no quant_method", self.place))),
        }
    }

    fn compressed_tensors(&self) -> Result<Scheme, Error> {
        self.expect(self.facts, "format", &[Value::from("int-quantized")])?;
        self.expect(self.facts, "kv_cache_scheme", &[Value::Null])?;
        let groups = self.facts.get("config_groups").and_then(Value::as_object);
        let groups = groups.filter(|groups| !groups.is_empty()).ok_or_else(|| {
            self.config
                .broken(format!("{} has no config_groups, an object of quantisation schemes", self.place))
        })?;
        for group in groups.values() {
            for (part, strategies) in
                [("weights", &["channel", "tensor"][..]), ("input_activations", &["token"])]
            {
                let Some(facts) = group.get(part).filter(|facts| facts.is_object()) else {
                    return Err(self.unsupported(&format!("{part} that are not quantised are not supported")));
                };
                self.expect(facts, "num_bits", &[Value::from(8)])?;
                self.expect(facts, "type", &[Value::from("int")])?;
                self.expect(facts, "symmetric", &[Value::from(true)])?;
                let strategies: Vec<Value> = strategies.iter().map(|name| Value::from(*name)).collect();
                self.expect(facts, "strategy", &strategies)?;
                self.expect(facts, "dynamic", &[Value::from(part == "input_activations")])?;
            }
        }
        Ok(Scheme::Int8)
    }

    fn fp8(&self) -> Result<Scheme, Error> {
        self.expect(self.facts, "fmt", &[Value::from("e4m3"), Value::Null])?;
        self.expect(self.facts, "activation_scheme", &[Value::from("dynamic")])?;
        let stated = self.facts.get("weight_block_size").unwrap_or(&Value::Null);
        let size = |at| stated.get(at).and_then(Value::as_u64).filter(|size| (1..=1 << 24).contains(size));
        match (size(0), size(1), stated.get(2)) {
            (Some(outputs), Some(inputs), None) => {
                Ok(Scheme::Fp8 { block: [outputs as usize, inputs as usize] })
            }
            _ => Err(self.unsupported(&format!("weight_block_size is {stated}; supported are two sizes"))),
        }
    }

    /// `None` is one group.
    fn group(&self) -> Result<Option<usize>, Error> {
        let key = if self.facts.get("group_size").is_some() { "group_size" } else { "q_group_size" };
        match self.facts.get(key).and_then(Value::as_i64) {
            Some(-1) => Ok(None),
            Some(size @ 1..=0x100_0000) => Ok(Some(size as usize)),
            _ => {
                let stated = self.facts.get(key).unwrap_or(&Value::Null);
                Err(self.unsupported(&format!("{key} is {stated}; supported are -1 and sizes from 1")))
            }
        }
    }

    /// A fact that must be one of a few; one that may be null may be absent.
    fn expect(&self, facts: &Value, key: &str, wanted: &[Value]) -> Result<(), Error> {
        let stated = facts.get(key).unwrap_or(&Value::Null);
        if wanted.contains(stated) {
            return Ok(());
        }
        let wanted: Vec<_> = wanted.iter().map(Value::to_string).collect();
        Err(self.unsupported(&format!("{key} is {stated}; supported: {}", wanted.join(", "))))
    }

    fn unsupported(&self, fact: &str) -> Error {
        self.config.unsupported(format!("{}: {fact}", self.place))
    }
}

/// Finds a matrix and checks all of it: `name` is that of the tensor where it is not quantised; of a tensor that
/// holds several matrices it is the share `share` of `shares`.
pub(crate) fn matrix<'a>(
    weights: &'a Weights,
    scheme: Scheme,
    name: &str,
    shape: &'a [usize],
    (share, shares): (usize, usize),
) -> Result<Matrix<'a>, Error> {
    let (outputs, inputs) = (shape[0], shape[1]);
    let whole = outputs * shares;
    let stem = name.strip_suffix(".weight").unwrap_or(name);
    let values = match scheme {
        Scheme::Int8 if weights.dtype(name) == Some("I8") => {
            let bytes = weights.raw(name, &["I8"], &[&[whole, inputs]])?.bytes;
            let scale = format!("{stem}.weight_scale");
            let mut scales = scales(weights, &scale, &[&[whole, 1], &[whole], &[1]])?;
            if scales.len() == 1 {
                scales = vec![scales[0]; whole];
            }
            Values::Int8 { bytes, scales }
        }
        Scheme::Fp8 { block } if weights.dtype(name) == Some("F8_E4M3") => {
            let bytes = weights.raw(name, &["F8_E4M3"], &[&[whole, inputs]])?.bytes;
            let blocks = [whole.div_ceil(block[0]), inputs.div_ceil(block[1])];
            let scales = scales(weights, &format!("{stem}.weight_scale_inv"), &[&blocks])?;
            Values::Fp8 { bytes, scales, block }
        }
        Scheme::Gptq { group, .. } | Scheme::Awq { group } if !weights.contains(name) => {
            int4(weights, scheme, stem, [whole, inputs], group.unwrap_or(inputs).min(inputs))?
        }
        _ => {
            let tensor = weights.tensor(name, shape, (share, shares))?;
            return Ok(Matrix { outputs, inputs, first: 0, values: Values::Numbers(tensor) });
        }
    };
    Ok(Matrix { outputs, inputs, first: share * outputs, values })
}

/// The tensors that a quantised matrix consists of.
pub(crate) fn pieces<'a>(weights: &'a Weights, name: &str) -> Vec<Raw<'a>> {
    let stem = name.strip_suffix("weight").unwrap_or(name);
    const PIECES: &[&str] =
        &["weight", "weight_scale", "weight_scale_inv", "qweight", "qzeros", "scales", "g_idx"];
    PIECES.iter().filter_map(|piece| weights.any(&format!("{stem}{piece}"))).collect()
}

fn int4<'a>(
    weights: &'a Weights,
    scheme: Scheme,
    stem: &str,
    [width, inputs]: [usize; 2],
    group: usize,
) -> Result<Values<'a>, Error> {
    let (packing, offset) = match scheme {
        Scheme::Gptq { offset, .. } => (Packing::Inputs, offset),
        _ => (Packing::Outputs, 0),
    };
    let count = inputs.div_ceil(group);
    let packed = match packing {
        Packing::Inputs => [inputs.div_ceil(8), width],
        Packing::Outputs => [inputs, width.div_ceil(8)],
    };
    let words = weights.raw(&format!("{stem}.qweight"), &["I32"], &[&packed])?.bytes;
    let stored = weights.raw(&format!("{stem}.qzeros"), &["I32"], &[&[count, width.div_ceil(8)]])?.bytes;
    let scales = scales(weights, &format!("{stem}.scales"), &[&[count, width]])?;
    let zero = |group: usize, output: usize| {
        let place = match packing {
            Packing::Inputs => output % 8,
            Packing::Outputs => AWQ_PLACE[output % 8],
        };
        nibble(stored, group * width.div_ceil(8) + output / 8, place) + offset
    };
    let zeros = (0..count).flat_map(|group| (0..width).map(move |output| (group, output)));
    let zeros = zeros.map(|(group, output)| zero(group, output)).collect();
    let listed = format!("{stem}.g_idx");
    let groups = match packing == Packing::Inputs && weights.contains(&listed) {
        false => Groups::Even(group),
        true => {
            let file = weights.raw(&listed, &["I32"], &[&[inputs]])?;
            let listed: Vec<u32> =
                file.bytes.as_chunks().0.iter().map(|bytes| u32::from_le_bytes(*bytes)).collect();
            if let Some(wrong) = listed.iter().find(|number| **number as usize >= count) {
                return Err(file.broken(format!("has group {} of {count} in {stem}.g_idx", *wrong as i32)));
            }
            let even = listed.iter().enumerate().all(|(input, number)| *number as usize == input / group);
            if even { Groups::Even(group) } else { Groups::Listed(listed) }
        }
    };
    Ok(Values::Int4 { words, packing, width, scales, zeros, groups })
}

/// Where in a word AWQ keeps the outputs 0 to 7: its kernels unpack even ones first.
const AWQ_PLACE: [usize; 8] = [0, 4, 1, 5, 2, 6, 3, 7];

/// The 4 bits at `place` of a word.
fn nibble(words: &[u8], word: usize, place: usize) -> u8 {
    words[4 * word + place / 2] >> (4 * (place % 2)) & 15
}

/// Scales in any element type; each must be a number.
fn scales(weights: &Weights, name: &str, shapes: &[&[usize]]) -> Result<Vec<f32>, Error> {
    let file = weights.raw(name, &["F32", "BF16", "F16"], shapes)?;
    let scales = file.numbers();
    match scales.iter().position(|scale| !scale.is_finite()) {
        Some(at) => Err(file.broken(format!("tensor {name} has the scale {} at {at}", scales[at]))),
        None => Ok(scales),
    }
}

impl Matrix<'_> {
    /// Rows.
    pub fn outputs(&self) -> usize {
        self.outputs
    }

    /// Elements of a row.
    pub fn inputs(&self) -> usize {
        self.inputs
    }

    /// What rows can be read as beside numbers.
    pub fn form(&self) -> MatrixForm {
        match &self.values {
            Values::Numbers(_) | Values::Fp8 { .. } => MatrixForm::Numbers,
            Values::Int8 { .. } => MatrixForm::Int8,
            Values::Int4 { groups: Groups::Even(group), .. } => MatrixForm::Int4 { group: *group },
            // Inputs whose groups are not in order are read as numbers.
            Values::Int4 { groups: Groups::Listed(_), .. } => MatrixForm::Numbers,
        }
    }

    /// Bytes of the values in the file, without scales.
    pub fn bytes(&self) -> usize {
        match &self.values {
            Values::Numbers(tensor) => tensor.bytes.len(),
            Values::Int8 { .. } | Values::Fp8 { .. } => self.outputs * self.inputs,
            Values::Int4 { .. } => (self.outputs * self.inputs).div_ceil(2),
        }
    }

    /// The bytes of a row of numbers, and their element type; `None` where the matrix is quantised.
    ///
    /// # Panics
    /// If there is no such row.
    pub fn row_bytes(&self, row: usize) -> Option<(Dtype, &[u8])> {
        match &self.values {
            Values::Numbers(tensor) => Some((tensor.dtype, tensor.row_bytes(row))),
            Values::Int8 { .. } | Values::Fp8 { .. } | Values::Int4 { .. } => None,
        }
    }

    /// One row as numbers: what the stored ones stand for.
    ///
    /// # Panics
    /// If there is no such row, or `out` does not have its length.
    pub fn read_row(&self, row: usize, out: &mut [f32]) {
        assert!(row < self.outputs && out.len() == self.inputs, "row {row} into {} elements", out.len());
        let stored = self.first + row;
        match &self.values {
            Values::Numbers(tensor) => tensor.read_row(row, out),
            Values::Int8 { bytes, scales } => {
                let bytes = &bytes[stored * self.inputs..][..self.inputs];
                for (out, byte) in out.iter_mut().zip(bytes) {
                    *out = f32::from(*byte as i8) * scales[stored];
                }
            }
            Values::Fp8 { bytes, scales, block } => {
                let bytes = &bytes[stored * self.inputs..][..self.inputs];
                let across = self.inputs.div_ceil(block[1]);
                let scales = &scales[stored / block[0] * across..][..across];
                for (block, scale) in bytes.chunks(block[1]).zip(out.chunks_mut(block[1])).zip(scales) {
                    for (byte, out) in block.0.iter().zip(block.1) {
                        *out = e4m3(*byte) * scale;
                    }
                }
            }
            Values::Int4 { width, scales, zeros, .. } => {
                for (input, out) in out.iter_mut().enumerate() {
                    let at = self.group(input) * width + stored;
                    *out = (f32::from(self.int4(stored, input)) - f32::from(zeros[at])) * scales[at];
                }
            }
        }
    }

    /// One row in 8-bit integers, and its scale.
    ///
    /// # Panics
    /// If the form is another, there is no such row, or `out` does not have its length.
    pub fn read_int8(&self, row: usize, out: &mut [i8]) -> f32 {
        assert!(row < self.outputs && out.len() == self.inputs, "row {row} into {} elements", out.len());
        let Values::Int8 { bytes, scales } = &self.values else {
            panic!("the matrix is not of 8-bit integers")
        };
        let stored = self.first + row;
        for (out, byte) in out.iter_mut().zip(&bytes[stored * self.inputs..]) {
            *out = *byte as i8;
        }
        scales[stored]
    }

    /// One row in 4-bit integers.
    ///
    /// # Panics
    /// If the form is another, there is no such row, or `out` does not have its length.
    pub fn read_int4(&self, row: usize, out: Int4Row<'_>) {
        assert!(row < self.outputs && out.values.len() == self.inputs, "row {row} into {}", out.values.len());
        let Values::Int4 { width, scales, zeros, groups: Groups::Even(_), .. } = &self.values else {
            panic!("the matrix is not of 4-bit integers in groups")
        };
        let stored = self.first + row;
        for (input, value) in out.values.iter_mut().enumerate() {
            *value = self.int4(stored, input);
        }
        for (group, (scale, zero)) in out.scales.iter_mut().zip(out.zeros).enumerate() {
            *scale = scales[group * width + stored];
            *zero = zeros[group * width + stored];
        }
    }

    fn group(&self, input: usize) -> usize {
        match &self.values {
            Values::Int4 { groups: Groups::Even(group), .. } => input / group,
            Values::Int4 { groups: Groups::Listed(groups), .. } => groups[input] as usize,
            _ => 0,
        }
    }

    fn int4(&self, stored: usize, input: usize) -> u8 {
        let Values::Int4 { words, packing, width, .. } = &self.values else { return 0 };
        match packing {
            Packing::Inputs => nibble(words, input / 8 * width + stored, input % 8),
            Packing::Outputs => nibble(words, input * width.div_ceil(8) + stored / 8, AWQ_PLACE[stored % 8]),
        }
    }
}

/// An 8-bit float of 4 exponent and 3 fraction bits, without infinities (Micikevicius et al., "FP8 formats for deep
/// learning", 2022).
fn e4m3(byte: u8) -> f32 {
    let (exponent, fraction) = (i32::from(byte >> 3 & 15), f32::from(byte & 7));
    let magnitude = match (exponent, byte & 7) {
        (15, 7) => f32::NAN,
        (0, _) => fraction / 512.0,
        _ => (1.0 + fraction / 8.0) * f32::from_bits(((exponent - 7 + 127) as u32) << 23),
    };
    if byte & 0x80 != 0 { -magnitude } else { magnitude }
}

#[cfg(test)]
mod tests;
