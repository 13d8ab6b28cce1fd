//! What is multiplied in a product: rows and weights in one of the packed forms. Products of numbers are in
//! [`super::linear`]; here are those of quantised weights.
//!
//! Panels of integers have 32 outputs as those of numbers have. A word of 32 bits holds four inputs of an output in 8
//! bits each, or eight in 4 bits, the first lowest; the words of the 32 outputs lie side by side.

#[cfg(target_arch = "x86_64")]
mod x86;

use std::marker::PhantomData;

use super::form::{Ahead, Exact, Form, PANEL};
use super::isa::{Isa, kernel};
use super::linear::ROWS_BLOCK;
use crate::memory::Shared;
#[cfg(target_arch = "x86_64")]
use crate::scalar::Bf16;
use crate::scalar::Scalar;

/// Rows and weights, and how to multiply them.
pub(super) trait Factor: Send + Sync {
    /// What the product's results are stored as.
    type Stored: Scalar;

    /// The sums of `sums.len()` rows from `first` on with one panel: a row's do not depend on the others.
    fn multiply(&self, panel: usize, first: usize, sums: &mut [[f32; PANEL]]);
}

/// Inputs in a word of 8-bit integers.
pub(super) const BYTES: usize = 4;
/// Inputs in a word of 4-bit integers.
pub(super) const NIBBLES: usize = 8;
/// Places of 4-bit integers in half a word.
#[cfg(target_arch = "x86_64")]
const PLACES: usize = 4;
/// Inputs whose weights are unpacked at a time: so many of a panel stay in the first level of cache.
const UNPACKED: usize = 128;

/// Rows in 8-bit integers and weights in 8-bit integers. Sums are whole numbers, so their order means nothing and all
/// instruction sets give the same.
pub(super) struct Int8<'a, T> {
    pub(super) rows: Int8Rows<'a>,
    pub(super) panels: Shared<u32>,
    /// `[panel][32]`.
    pub(super) scales: Shared<f32>,
    pub(super) isa: Isa,
    pub(super) stored: PhantomData<T>,
}

/// Rows in 8-bit integers: a row is `scale * values`.
#[derive(Clone, Copy)]
pub(super) struct Int8Rows<'a> {
    /// `[count][words of a row]` in the instruction set's [`RowForm`]; missing inputs are zero.
    pub(super) values: &'a [u32],
    /// Words of weights that a row goes with.
    pub(super) words: usize,
    /// `[count]`; NaN where the row holds what is not finite.
    pub(super) scales: &'a [f32],
}

/// How rows of 8-bit integers are written, as they are multiplied.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum RowForm {
    /// Two words for four inputs, 16 bits each: the first and third, then the second and fourth.
    Pairs,
    /// A word for four inputs, with 128 added to each so that it has no sign.
    Bytes,
}

impl RowForm {
    pub(super) fn of(isa: Isa) -> RowForm {
        if isa.multiplies_bytes() { RowForm::Bytes } else { RowForm::Pairs }
    }

    /// Words of a row for each word of weights.
    pub(super) fn words(self) -> usize {
        if self == RowForm::Pairs { 2 } else { 1 }
    }
}

impl<T: Scalar> Factor for Int8<'_, T> {
    type Stored = T;

    #[inline(always)]
    fn multiply(&self, panel: usize, first: usize, sums: &mut [[f32; PANEL]]) {
        let words = self.rows.words;
        // SAFETY: weights are written once, when they are packed.
        let (weights, scales) = unsafe {
            (self.panels.read(panel * PANEL * words, PANEL * words), self.scales.read(panel * PANEL, PANEL))
        };
        let row_words = words * RowForm::of(self.isa).words();
        let x = &self.rows.values[first * row_words..(first + sums.len()) * row_words];
        #[cfg(target_arch = "x86_64")]
        if self.isa.multiplies_bytes() {
            let rows = &self.rows.scales[first..first + sums.len()];
            // SAFETY: an `Isa` in use was found available when the device was opened.
            return unsafe { x86::int8_bytes(x, words, weights, rows, scales, sums) };
        }
        let mut whole = [[0_i32; PANEL]; ROWS_BLOCK];
        let whole = &mut whole[..sums.len()];
        #[cfg(target_arch = "x86_64")]
        match self.isa {
            Isa::Portable => int8(x, words, weights, whole),
            // SAFETY: as above.
            _ => unsafe { x86::int8(x, words, weights, whole) },
        }
        #[cfg(not(target_arch = "x86_64"))]
        int8(x, words, weights, whole);
        for (r, (sums, whole)) in sums.iter_mut().zip(whole).enumerate() {
            let row = self.rows.scales[first + r];
            for j in 0..PANEL {
                sums[j] = whole[j] as f32 * (row * scales[j]);
            }
        }
    }
}

/// Adds the products of rows of `words` with a panel: what every instruction set must give.
fn int8(x: &[u32], words: usize, weights: &[u32], sums: &mut [[i32; PANEL]]) {
    for (x, sums) in x.chunks_exact(2 * words).zip(sums) {
        for (x, weights) in x.as_chunks::<2>().0.iter().zip(weights.chunks_exact(PANEL)) {
            let [even, odd] = x.map(|pair| [i32::from(pair as i16), i32::from((pair >> 16) as i16)]);
            for (sum, weight) in sums.iter_mut().zip(weights) {
                let weight = weight.to_le_bytes().map(|byte| i32::from(byte as i8));
                *sum += even[0] * weight[0] + odd[0] * weight[1] + even[1] * weight[2] + odd[1] * weight[3];
            }
        }
    }
}

/// Rows of numbers and weights in 4-bit integers, which become the numbers they stand for, in float32, on the way.
pub(super) struct Int4<'a, T> {
    /// `[count][inputs]`.
    pub(super) x: &'a [f32],
    pub(super) inputs: usize,
    pub(super) group: usize,
    pub(super) panels: Shared<u32>,
    /// `[panel][group][2][32]`: scales, then what is added for the zero point.
    pub(super) scales: Shared<f32>,
    pub(super) stored: PhantomData<T>,
}

impl<T: Scalar> Factor for Int4<'_, T> {
    type Stored = T;

    #[inline(always)]
    fn multiply(&self, panel: usize, first: usize, sums: &mut [[f32; PANEL]]) {
        let inputs = self.inputs;
        let (words, groups) = (inputs.div_ceil(NIBBLES), inputs.div_ceil(self.group));
        // SAFETY: weights are written once, when they are packed.
        let (weights, scales) = unsafe {
            let scales = self.scales.read(panel * groups * 2 * PANEL, groups * 2 * PANEL);
            (self.panels.read(panel * PANEL * words, PANEL * words), scales)
        };
        sums.fill([0.0; PANEL]);
        let mut numbers = [[0.0; PANEL]; UNPACKED];
        for from in (0..inputs).step_by(UNPACKED) {
            let count = UNPACKED.min(inputs - from);
            let weights = weights[from / NIBBLES * PANEL..].chunks_exact(PANEL);
            for (word, (weights, numbers)) in weights.zip(numbers.chunks_exact_mut(NIBBLES)).enumerate() {
                let group = (from + word * NIBBLES) / self.group;
                unpack(weights, &scales[group * 2 * PANEL..][..2 * PANEL], numbers);
            }
            let x = &self.x[first * inputs + from..];
            for (tile, sums) in sums.chunks_mut(Exact::ROWS).enumerate() {
                let x = &x[tile * Exact::ROWS * inputs..];
                // SAFETY: this form needs no instructions of its own; it checks the rest.
                unsafe { Exact::tile(x, inputs, count, numbers.as_flattened(), Ahead::NONE, false, sums) };
            }
        }
    }
}

/// Eight inputs of a panel as numbers: `value * scale + offset`. Where a scale has few digits, as those of half
/// precision, that is exact.
#[inline(always)]
fn unpack(weights: &[u32], scales: &[f32], numbers: &mut [[f32; PANEL]]) {
    let weights: &[u32; PANEL] = weights.try_into().expect("a word of each output");
    let (scales, offsets) = scales.split_at(PANEL);
    let (scales, offsets): (&[f32; PANEL], &[f32; PANEL]) =
        (scales.try_into().expect("a panel's"), offsets.try_into().expect("a panel's"));
    for (place, numbers) in numbers.iter_mut().enumerate() {
        for j in 0..PANEL {
            let value = weights[j] >> (4 * place) & 15;
            numbers[j] = value as i32 as f32 * scales[j] + offsets[j];
        }
    }
}

/// Rows of bf16 and weights in 4-bit integers on AVX-512. Of a group, products with the integers are summed in
/// float32; then `sum * scale + offset * sum of the row's inputs` is added to the result. So an integer needs no more
/// than to be looked up as a number.
#[cfg(target_arch = "x86_64")]
pub(super) struct Int4Pairs<'a> {
    pub(super) rows: Int4Rows<'a, u32>,
    pub(super) inputs: usize,
    pub(super) group: usize,
    pub(super) panels: Shared<u32>,
    /// As in [`Int4`].
    pub(super) scales: Shared<f32>,
}

/// Rows as they are multiplied with 4-bit integers.
#[cfg(target_arch = "x86_64")]
#[derive(Clone, Copy)]
pub(super) struct Int4Rows<'a, T> {
    /// `[count][words]`, and for each word what its eight inputs are multiplied as; missing ones are zero. In pairs: the
    /// first and fifth, second and sixth and so on as bf16. Shifted: all eight, divided by what their places in half a
    /// word multiply integers by.
    pub(super) values: &'a [T],
    /// `[count][groups]`: sums of a group's inputs.
    pub(super) sums: &'a [f32],
}

#[cfg(target_arch = "x86_64")]
impl Factor for Int4Pairs<'_> {
    type Stored = Bf16;

    #[inline(always)]
    fn multiply(&self, panel: usize, first: usize, sums: &mut [[f32; PANEL]]) {
        let (words, groups) = (self.inputs.div_ceil(NIBBLES), self.inputs.div_ceil(self.group));
        // SAFETY: weights are written once, when they are packed.
        let (weights, scales) = unsafe {
            let scales = self.scales.read(panel * groups * 2 * PANEL, groups * 2 * PANEL);
            (self.panels.read(panel * PANEL * words, PANEL * words), scales)
        };
        let last = first + sums.len();
        let rows = Int4Rows {
            values: &self.rows.values[4 * first * words..4 * last * words],
            sums: &self.rows.sums[first * groups..last * groups],
        };
        sums.fill([0.0; PANEL]);
        // SAFETY: this factor is used on AVX-512, which was found available when the device was opened.
        unsafe { x86::int4_pairs(rows, [words, groups], self.group, weights, scales, sums) }
    }
}

/// Rows of bf16 and weights in 4-bit integers on AVX2, as [`Int4Pairs`]: an integer is a number where it lies, and its
/// input is divided by what its place multiplies it by.
#[cfg(target_arch = "x86_64")]
pub(super) struct Int4Shifted<'a> {
    pub(super) rows: Int4Rows<'a, f32>,
    pub(super) inputs: usize,
    pub(super) group: usize,
    pub(super) panels: Shared<u32>,
    /// As in [`Int4`].
    pub(super) scales: Shared<f32>,
}

#[cfg(target_arch = "x86_64")]
impl Factor for Int4Shifted<'_> {
    type Stored = Bf16;

    #[inline(always)]
    fn multiply(&self, panel: usize, first: usize, sums: &mut [[f32; PANEL]]) {
        let (words, groups) = (self.inputs.div_ceil(NIBBLES), self.inputs.div_ceil(self.group));
        // SAFETY: weights are written once, when they are packed.
        let (weights, scales) = unsafe {
            let scales = self.scales.read(panel * groups * 2 * PANEL, groups * 2 * PANEL);
            (self.panels.read(panel * PANEL * words, PANEL * words), scales)
        };
        let rows = Int4Rows {
            values: &self.rows.values[first * words * NIBBLES..],
            sums: &self.rows.sums[first * groups..],
        };
        let panel = x86::Panel { weights, scales, words, groups, group_words: self.group / NIBBLES };
        sums.fill([0.0; PANEL]);
        // SAFETY: this factor is used on AVX2, which was found available when the device was opened.
        unsafe { x86::int4_shifted(rows, panel, sums) }
    }
}

/// Rows to be multiplied with 4-bit integers: a word's eight inputs become `N` values.
#[cfg(target_arch = "x86_64")]
pub(super) struct Arrange<'a, T, const N: usize> {
    pub(super) x: &'a [Bf16],
    pub(super) inputs: usize,
    pub(super) group: usize,
    pub(super) values: Shared<T>,
    pub(super) sums: Shared<f32>,
}

#[cfg(target_arch = "x86_64")]
kernel!(
    /// Makes [`Int4Rows`] of pairs; part `part` of `parts` of the rows.
    pair, pair_body, Pair
);

#[cfg(target_arch = "x86_64")]
kernel!(
    /// Makes shifted [`Int4Rows`]; part `part` of `parts` of the rows.
    shift, shift_body, Shift
);

/// Rows to be put in pairs.
#[cfg(target_arch = "x86_64")]
pub(super) type Pair<'a> = Arrange<'a, u32, 4>;

/// Rows to be shifted.
#[cfg(target_arch = "x86_64")]
pub(super) type Shift<'a> = Arrange<'a, f32, NIBBLES>;

#[cfg(target_arch = "x86_64")]
#[inline(always)]
fn pair_body(job: &Pair<'_>, part: usize, parts: usize) {
    job.rows(part, parts, |x| {
        let bits = |at: usize| x.get(at).map_or(0, |value| u32::from(value.0));
        std::array::from_fn(|at| bits(at) | bits(at + 4) << 16)
    });
}

#[cfg(target_arch = "x86_64")]
#[inline(always)]
fn shift_body(job: &Shift<'_>, part: usize, parts: usize) {
    const SHARES: [f32; PLACES] = [1.0, 1.0 / 16.0, 1.0 / 256.0, 1.0 / 4096.0];
    job.rows(part, parts, |x| {
        std::array::from_fn(|at| x.get(at).map_or(0.0, |value| value.load() * SHARES[at % PLACES]))
    });
}

#[cfg(target_arch = "x86_64")]
impl<T, const N: usize> Arrange<'_, T, N> {
    #[inline(always)]
    fn rows(&self, part: usize, parts: usize, of_word: impl Fn(&[Bf16]) -> [T; N]) {
        let count = self.x.len() / self.inputs;
        let (words, groups) = (self.inputs.div_ceil(NIBBLES), self.inputs.div_ceil(self.group));
        for row in count * part / parts..count * (part + 1) / parts {
            let x = &self.x[row * self.inputs..][..self.inputs];
            // SAFETY: each part has rows of its own.
            let (values, sums) = unsafe {
                (self.values.part(N * row * words, N * words), self.sums.part(row * groups, groups))
            };
            for (x, values) in x.chunks(NIBBLES).zip(values.as_chunks_mut::<N>().0) {
                *values = of_word(x);
            }
            for (x, sum) in x.chunks(self.group).zip(sums) {
                *sum = x.iter().map(|value| value.load()).sum();
            }
        }
    }
}

/// Rows to be quantised.
pub(super) struct Quantise<'a, T> {
    pub(super) x: &'a [T],
    pub(super) inputs: usize,
    pub(super) form: RowForm,
    pub(super) values: Shared<u32>,
    pub(super) scales: Shared<f32>,
}

/// Words of a row of 8-bit integers.
pub(super) fn words_of_bytes(inputs: usize) -> usize {
    inputs.div_ceil(BYTES)
}

kernel!(
    /// Quantises rows to 8 bits, each by its largest magnitude; part `part` of `parts` of the rows.
    quantise, quantise_body, Quantise<T: Scalar>
);

#[inline(always)]
fn quantise_body<T: Scalar>(job: &Quantise<'_, T>, part: usize, parts: usize) {
    let count = job.x.len() / job.inputs;
    let words = words_of_bytes(job.inputs);
    for row in count * part / parts..count * (part + 1) / parts {
        let x = &job.x[row * job.inputs..][..job.inputs];
        // Magnitudes are in the order of their bits; what is not finite has the highest.
        let magnitude = |value: &T| value.load().to_bits() & 0x7fff_ffff;
        let largest = x.iter().map(magnitude).max().map_or(0.0, f32::from_bits);
        let scale = if largest.is_finite() { largest.max(1e-12) / 127.0 } else { f32::NAN };
        // SAFETY: each part has rows of its own.
        let (values, scales) = unsafe {
            let words = words * job.form.words();
            (job.values.part(row * words, words), job.scales.part(row, 1))
        };
        scales[0] = scale;
        // Adding this leaves the nearest whole number, of two the even one, in the low bits. Of a row that is not finite
        // nothing counts but the scale.
        const WHOLE: f32 = 12_582_912.0; // 1.5 * 2^23
        let number = |value: &T| (value.load() / scale + WHOLE).to_bits();
        if job.form == RowForm::Bytes {
            // SAFETY: words may be written as bytes; they are little-endian on machines with this form.
            let bytes =
                unsafe { std::slice::from_raw_parts_mut(values.as_mut_ptr().cast::<u8>(), BYTES * words) };
            bytes[x.len()..].fill(128);
            for (to, value) in bytes.iter_mut().zip(x) {
                *to = (number(value) as u8).wrapping_add(128);
            }
            continue;
        }
        let (whole, rest) = x.as_chunks::<BYTES>();
        let pair = |a: u32, b: u32| a & 0xffff | b << 16;
        let (pairs, last) = values.split_at_mut(2 * whole.len());
        for (to, x) in pairs.as_chunks_mut::<2>().0.iter_mut().zip(whole) {
            let numbers: [u32; BYTES] = std::array::from_fn(|at| number(&x[at]));
            *to = [pair(numbers[0], numbers[2]), pair(numbers[1], numbers[3])];
        }
        if let [even, odd] = last {
            let number = |at: usize| rest.get(at).map_or(0, number);
            (*even, *odd) = (pair(number(0), number(2)), pair(number(1), number(3)));
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn every_instruction_set_gives_the_same_whole_sums(
            rows in 1_usize..30, words in 1_usize..40, extreme: bool, seed: u32,
        ) {
            let number = |at: usize| {
                let word = (at as u32 + 1).wrapping_mul(2_654_435_761).wrapping_add(seed).wrapping_mul(2_246_822_519);
                word ^ word >> 13
            };
            let row = |word: u32| {
                let number = |byte: u32| match byte as u8 as i8 {
                    byte if extreme => if byte & 1 == 0 { 127 } else { -127 },
                    byte => i16::from(byte).max(-127),
                };
                u32::from(number(word) as u16) | u32::from(number(word >> 8) as u16) << 16
            };
            let weight = |word: u32| match extreme {
                true => u32::from_le_bytes(word.to_le_bytes().map(|byte| if byte & 1 == 0 { 0x7f } else { 0x80 })),
                false => word,
            };
            let x: Vec<u32> = (0..2 * rows * words).map(|at| row(number(at))).collect();
            let weights: Vec<u32> = (0..PANEL * words).map(|at| weight(number(at + 9999))).collect();
            let mut plain = vec![[7; PANEL]; rows];
            int8(&x, words, &weights, &mut plain);
            #[cfg(target_arch = "x86_64")]
            if Isa::Avx2.available() {
                let mut vectors = vec![[7; PANEL]; rows];
                // SAFETY: the machine has AVX2.
                unsafe { x86::int8(&x, words, &weights, &mut vectors) };
                prop_assert_eq!(&vectors, &plain);
            }
            #[cfg(target_arch = "x86_64")]
            if Isa::Avx512Fma.available() {
                let bytes: Vec<u32> = x.as_chunks::<2>().0.iter().map(|[even, odd]| {
                    let byte = |value: u32| (value as u8).wrapping_add(128);
                    u32::from_le_bytes([byte(*even), byte(*odd), byte(*even >> 16), byte(*odd >> 16)])
                }).collect();
                let mut vectors = vec![[7.0; PANEL]; rows];
                let (row_scales, scales) = (vec![0.5; rows], [0.25; PANEL]);
                // SAFETY: the machine has AVX-512 with products of bytes.
                unsafe { x86::int8_bytes(&bytes, words, &weights, &row_scales, &scales, &mut vectors) };
                let plain: Vec<[f32; PANEL]> =
                    plain.iter().map(|row| row.map(|sum| (sum - 7) as f32 * 0.125)).collect();
                prop_assert_eq!(vectors, plain);
            }
        }
    }
}
