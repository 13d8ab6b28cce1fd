//! Quantised weights made from numbers when a model is loaded: what `--quantization` asks for. A row is quantised by
//! itself, so the result does not depend on how matrices are put together.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use tandem_device::Int4Row;

/// Inputs that share a scale and a zero point in [`Quantization::Int4`].
pub(crate) const INT4_GROUP: usize = 64;

/// How the matrices of a model's layers are held. Embedding, norms and biases stay numbers; where the layers are made
/// at load, so is the head, in 8 bits.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Quantization {
    /// As the checkpoint has them.
    #[default]
    Auto,
    /// Weights in 8 bits with a scale per output, rows in 8 bits with a scale per token, made from numbers at load.
    W8a8,
    /// Weights in 4 bits with a scale and a zero point per 64 inputs, made from numbers at load; rows stay numbers.
    Int4,
}

impl Quantization {
    /// The word used in flags and JSON.
    pub fn as_str(self) -> &'static str {
        match self {
            Quantization::Auto => "auto",
            Quantization::W8a8 => "w8a8",
            Quantization::Int4 => "int4",
        }
    }
}

impl fmt::Display for Quantization {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for Quantization {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        [Quantization::Auto, Quantization::W8a8, Quantization::Int4]
            .into_iter()
            .find(|quantization| quantization.as_str() == text)
            .ok_or_else(|| format!("{text:?} is not a quantization; expected auto, w8a8 or int4"))
    }
}

/// A row in 8 bits: each value is within half a scale of `out * scale`, and 127 of them are its largest magnitude.
pub(crate) fn int8(row: &[f32], out: &mut [i8]) -> f32 {
    let largest = row.iter().fold(0.0_f32, |largest, value| largest.max(value.abs()));
    let scale = scale(row, largest / 127.0);
    for (out, value) in out.iter_mut().zip(row) {
        *out = if scale > 0.0 { nearest(value / scale).clamp(-127.0, 127.0) as i8 } else { 0 };
    }
    scale
}

/// A row in 4 bits by groups. A group's range always holds zero, so that zero stays exact; its scale is rounded to 8
/// digits, so that every number it stands for is exact in float32.
pub(crate) fn int4(row: &[f32], group: usize, out: Int4Row<'_>) {
    let groups = row.chunks(group).zip(out.values.chunks_mut(group));
    for ((row, values), (scale_of, zero_of)) in groups.zip(out.scales.iter_mut().zip(out.zeros)) {
        let low = row.iter().fold(0.0_f32, |low, value| low.min(*value));
        let high = row.iter().fold(0.0_f32, |high, value| high.max(*value));
        let scale = scale(row, half::bf16::from_f32((high - low) / 15.0).to_f32());
        let whole = |value: f32| if scale > 0.0 { nearest(value).clamp(0.0, 15.0) } else { 0.0 };
        let zero = whole(-low / scale);
        (*scale_of, *zero_of) = (scale, zero as u8);
        for (value, number) in values.iter_mut().zip(row) {
            *value = whole(number / scale + zero) as u8;
        }
    }
}

/// The nearest whole number, of two the even one, for magnitudes below 2^22: adding 1.5 * 2^23 leaves no digits behind
/// the point. (The library's function is a call per number where the machine's baseline lacks the instruction.)
fn nearest(value: f32) -> f32 {
    const WHOLE: f32 = 12_582_912.0;
    (value + WHOLE) - WHOLE
}

/// A row that holds what is not finite gets a scale that is not, so that its results are not taken for numbers.
fn scale(row: &[f32], scale: f32) -> f32 {
    if row.iter().all(|value| value.is_finite()) { scale } else { f32::NAN }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn int4_of(row: &[f32]) -> Vec<f32> {
        let groups = row.len().div_ceil(INT4_GROUP);
        let (mut values, mut scales, mut zeros) = (vec![9; row.len()], vec![9.0; groups], vec![9; groups]);
        let out = Int4Row { values: &mut values, scales: &mut scales, zeros: &mut zeros };
        int4(row, INT4_GROUP, out);
        let number = |(at, value): (usize, &u8)| {
            let group = at / INT4_GROUP;
            (f32::from(*value) - f32::from(zeros[group])) * scales[group]
        };
        values.iter().enumerate().map(number).collect()
    }

    proptest! {
        #[test]
        fn a_number_is_off_by_half_a_step_of_its_row_or_group_at_most(
            row in prop::collection::vec(-4.0_f32..4.0, 1..300), shrink in 0.0001_f32..1.0,
        ) {
            let row: Vec<f32> = row.iter().map(|value| value * shrink).collect();
            let mut bytes = vec![9; row.len()];
            let scale = int8(&row, &mut bytes);
            for (value, byte) in row.iter().zip(&bytes) {
                prop_assert!((value - f32::from(*byte) * scale).abs() <= scale * 0.5001);
            }
            let numbers = int4_of(&row);
            for (row, numbers) in row.chunks(INT4_GROUP).zip(numbers.chunks(INT4_GROUP)) {
                let range = row.iter().fold(0.0_f32, |high, value| high.max(*value))
                    - row.iter().fold(0.0_f32, |low, value| low.min(*value));
                // Half a step, and half of one more where the zero point was rounded, at the ends of the range.
                for (value, number) in row.iter().zip(numbers) {
                    prop_assert!((value - number).abs() <= range / 15.0 * 1.05, "{value} became {number}");
                }
            }
        }
    }

    #[test]
    fn zeros_stay_zeros_and_what_is_not_finite_stays_not_finite() {
        let mut bytes = [5; 70];
        assert_eq!(int8(&[0.0; 70], &mut bytes), 0.0);
        assert_eq!(bytes, [0; 70]);
        assert_eq!(int4_of(&[0.0; 70]), [0.0; 70]);
        let mut row = [1.0; 70];
        row[3] = 0.0;
        assert_eq!(int4_of(&row)[3], 0.0);
        row[5] = f32::INFINITY;
        assert!(int8(&row, &mut bytes).is_nan());
        assert!(int4_of(&row)[5].is_nan());
    }

    #[test]
    fn the_words_of_the_flag_are_read_back_and_others_are_refused_by_naming_them() {
        for word in ["auto", "w8a8", "int4"] {
            assert_eq!(word.parse::<Quantization>().unwrap().to_string(), word);
        }
        let refusal = "int5".parse::<Quantization>().unwrap_err();
        assert_eq!(refusal, "\"int5\" is not a quantization; expected auto, w8a8 or int4");
    }
}
