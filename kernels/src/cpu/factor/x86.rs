//! Products of quantised weights in vector instructions.

mod shifted;

use std::arch::x86_64::*;

use super::super::form::{Ahead, PANEL, Rows, add_products, add_rows};
use super::{Int4Rows, NIBBLES};
pub(super) use shifted::{Panel, int4_shifted};

/// Rows that go through half of a panel together: their sums take 8 of the 16 registers.
const ROWS: usize = 4;

/// Adds the products of rows of 8-bit integers with a panel of `words`. The instruction adds two products of 16 bits in
/// 32, which neither the instruction nor [`tandem_device::INT8_INPUTS_MAX`] of them can exceed.
///
/// # Safety
/// The machine has AVX2.
#[target_feature(enable = "avx2")]
pub(in super::super) unsafe fn int8(x: &[u32], words: usize, weights: &[u32], sums: &mut [[i32; PANEL]]) {
    assert!(x.len() >= 2 * words * sums.len(), "{} rows of {words} words in {}", sums.len(), x.len());
    assert!(weights.len() >= words * PANEL, "{words} words of 32 outputs in {}", weights.len());
    let rows = sums.len();
    let mut row = 0;
    while row < rows {
        // Tiles of about equal height.
        let height = (rows - row).div_ceil((rows - row).div_ceil(ROWS));
        let x = &x[2 * row * words..];
        let ahead = match rows {
            1 => Ahead::soon(weights),
            _ => Ahead::following(weights, row..row + height, rows),
        };
        let sums = &mut sums[row..row + height];
        // SAFETY: AVX2 as above; bounds were just checked.
        unsafe {
            match height {
                1 => whole(x, words, weights, ahead, sums),
                2 => halves::<2>(x, words, weights, ahead, sums),
                3 => halves::<3>(x, words, weights, ahead, sums),
                _ => halves::<4>(x, words, weights, ahead, sums),
            }
        }
        row += height;
    }
}

/// A word of weights in 16 bits: the first and third of its four inputs, then the second and fourth.
#[inline]
#[target_feature(enable = "avx2")]
fn widen(weights: __m256i) -> [__m256i; 2] {
    let even = _mm256_srai_epi16::<8>(_mm256_slli_epi16::<8>(weights));
    [even, _mm256_srai_epi16::<8>(weights)]
}

/// One row with a panel.
///
/// # Safety
/// The machine has AVX2; there is one row for `words`, which the panel has.
#[target_feature(enable = "avx2")]
unsafe fn whole(x: &[u32], words: usize, weights: &[u32], ahead: Ahead, sums: &mut [[i32; PANEL]]) {
    let sums = sums[0].as_mut_ptr();
    // SAFETY: a row of sums has 32 elements.
    let mut now: [__m256i; 4] =
        std::array::from_fn(|v| unsafe { _mm256_loadu_si256(sums.add(8 * v).cast_const().cast()) });
    let mut at = weights.as_ptr();
    let mut ahead = ahead.over(words);
    for x in x[..2 * words].chunks_exact(2) {
        ahead.fetch_next();
        let x = [_mm256_set1_epi32(x[0] as i32), _mm256_set1_epi32(x[1] as i32)];
        for v in 0..4 {
            // SAFETY: a word of the row has 32 words of the panel.
            let wide = widen(unsafe { _mm256_loadu_si256(at.add(8 * v).cast()) });
            let products =
                _mm256_add_epi32(_mm256_madd_epi16(wide[0], x[0]), _mm256_madd_epi16(wide[1], x[1]));
            now[v] = _mm256_add_epi32(now[v], products);
        }
        at = at.wrapping_add(PANEL);
    }
    for v in 0..4 {
        // SAFETY: as for the loads.
        unsafe { _mm256_storeu_si256(sums.add(8 * v).cast(), now[v]) };
    }
}

/// `R` rows with a panel, one half of its outputs after the other.
///
/// # Safety
/// The machine has AVX2; there are `R` rows for `words`, which the panel has.
#[target_feature(enable = "avx2")]
unsafe fn halves<const R: usize>(
    x: &[u32],
    words: usize,
    weights: &[u32],
    ahead: Ahead,
    sums: &mut [[i32; PANEL]],
) {
    let x = x.as_ptr();
    for (half, ahead) in ahead.in_two().into_iter().enumerate() {
        let mut now: [[__m256i; 2]; R] = std::array::from_fn(|r| {
            // SAFETY: rows of `sums` have 32 elements, of which these are one half.
            std::array::from_fn(|v| unsafe {
                _mm256_loadu_si256(sums[r].as_ptr().add(16 * half + 8 * v).cast())
            })
        });
        // SAFETY: the panel begins with 32 words.
        let mut at = unsafe { weights.as_ptr().add(16 * half) };
        let mut ahead = ahead.over(words);
        for word in 0..words {
            ahead.fetch_next();
            // SAFETY: a word of a row has 32 words of the panel, of which these are one half.
            let wide: [[__m256i; 2]; 2] =
                std::array::from_fn(|v| widen(unsafe { _mm256_loadu_si256(at.add(8 * v).cast()) }));
            for r in 0..R {
                for pair in 0..2 {
                    // SAFETY: both pairs of the word are inside row `r`.
                    let x = _mm256_set1_epi32(unsafe { *x.add(2 * (r * words + word) + pair) } as i32);
                    for v in 0..2 {
                        now[r][v] = _mm256_add_epi32(now[r][v], _mm256_madd_epi16(wide[v][pair], x));
                    }
                }
            }
            at = at.wrapping_add(PANEL);
        }
        for r in 0..R {
            for v in 0..2 {
                // SAFETY: as for the loads.
                unsafe { _mm256_storeu_si256(sums[r].as_mut_ptr().add(16 * half + 8 * v).cast(), now[r][v]) };
            }
        }
    }
}

/// Rows of bytes that go through a panel together: their sums take 24 of the 32 registers.
const BYTE_ROWS: usize = 12;

/// The products of rows of bytes, 128 added to each, with a panel of `words`, scaled. The instruction multiplies bytes
/// without a sign with bytes that have one; what the added 128 contributed is the same for all rows, comes from the first
/// tile, and is taken off again. Sums may wrap on the way; the result fits ([`tandem_device::INT8_INPUTS_MAX`]).
///
/// # Safety
/// The machine has AVX-512 F and VNNI.
#[target_feature(enable = "avx512f,avx512vnni")]
pub(in super::super) unsafe fn int8_bytes(
    x: &[u32],
    words: usize,
    weights: &[u32],
    row_scales: &[f32],
    scales: &[f32],
    sums: &mut [[f32; PANEL]],
) {
    let rows = sums.len();
    assert!(
        x.len() >= words * rows && row_scales.len() == rows,
        "{rows} rows of {words} words in {}",
        x.len()
    );
    assert!(weights.len() >= words * PANEL, "{words} words of 32 outputs in {}", weights.len());
    assert!(scales.len() == PANEL, "{} scales of 32", scales.len());
    let mut offset = [_mm512_setzero_si512(); 2];
    let mut row = 0;
    while row < rows {
        // Tiles of about equal height.
        let height = (rows - row).div_ceil((rows - row).div_ceil(BYTE_ROWS));
        let range = row..row + height;
        let ahead = match rows {
            1..=BYTE_ROWS => Ahead::soon(weights),
            _ => Ahead::following(weights, range.clone(), rows),
        };
        let x = &x[row * words..];
        let tile = Bytes { x, words, weights, ahead, row_scales: &row_scales[range.clone()], scales };
        let sums = &mut sums[range];
        // SAFETY: instructions as above; bounds were just checked.
        unsafe {
            match (height, row == 0) {
                (1, true) => tile.multiply::<1, true>(&mut offset, sums),
                (2, true) => tile.multiply::<2, true>(&mut offset, sums),
                (3, true) => tile.multiply::<3, true>(&mut offset, sums),
                (4, true) => tile.multiply::<4, true>(&mut offset, sums),
                (5, true) => tile.multiply::<5, true>(&mut offset, sums),
                (6, true) => tile.multiply::<6, true>(&mut offset, sums),
                (7, true) => tile.multiply::<7, true>(&mut offset, sums),
                (8, true) => tile.multiply::<8, true>(&mut offset, sums),
                (9, true) => tile.multiply::<9, true>(&mut offset, sums),
                (10, true) => tile.multiply::<10, true>(&mut offset, sums),
                (11, true) => tile.multiply::<11, true>(&mut offset, sums),
                (_, true) => tile.multiply::<12, true>(&mut offset, sums),
                // After the first there are tiles only where there are more than twelve rows.
                (6, _) => tile.multiply::<6, false>(&mut offset, sums),
                (7, _) => tile.multiply::<7, false>(&mut offset, sums),
                (8, _) => tile.multiply::<8, false>(&mut offset, sums),
                (9, _) => tile.multiply::<9, false>(&mut offset, sums),
                (10, _) => tile.multiply::<10, false>(&mut offset, sums),
                (11, _) => tile.multiply::<11, false>(&mut offset, sums),
                (12, _) => tile.multiply::<12, false>(&mut offset, sums),
                (height, _) => unreachable!("tiles of about equal height, and one of {height}"),
            }
        }
        row += height;
    }
}

/// Some rows with a panel.
struct Bytes<'a> {
    x: &'a [u32],
    words: usize,
    weights: &'a [u32],
    ahead: Ahead,
    row_scales: &'a [f32],
    scales: &'a [f32],
}

impl Bytes<'_> {
    /// With `FIRST`, also what 128 in every input makes.
    ///
    /// # Safety
    /// The machine has AVX-512 F and VNNI; there are `R` rows of `words`, which the panel has, `R` scales of rows, 32 of
    /// outputs, and `R` rows of sums.
    #[target_feature(enable = "avx512f,avx512vnni")]
    unsafe fn multiply<const R: usize, const FIRST: bool>(
        &self,
        offset: &mut [__m512i; 2],
        sums: &mut [[f32; PANEL]],
    ) {
        let mut rows = Rows::new(self.x.as_ptr(), self.words);
        let mut now = [[_mm512_setzero_si512(); 2]; R];
        let mut at = self.weights.as_ptr();
        let mut ahead = self.ahead.over(self.words);
        let added = _mm512_set1_epi8(-128);
        for _ in 0..self.words {
            ahead.fetch_next();
            // SAFETY: a word of a row has 32 words of the panel.
            let wide: [__m512i; 2] =
                std::array::from_fn(|v| unsafe { _mm512_loadu_si512(at.add(16 * v).cast()) });
            if FIRST {
                *offset = std::array::from_fn(|v| _mm512_dpbusd_epi32(offset[v], added, wide[v]));
            }
            // SAFETY: `rows` are at this word, which is inside each of them.
            unsafe { add_rows!("vpdpbusd", R, rows, "0", wide, now) };
            rows.advance(4);
            at = at.wrapping_add(PANEL);
        }
        for r in 0..R {
            for v in 0..2 {
                let whole = _mm512_cvtepi32_ps(_mm512_sub_epi32(now[r][v], offset[v]));
                // SAFETY: there are 32 scales, and rows of sums have 32 elements.
                unsafe {
                    let scale = _mm512_loadu_ps(self.scales.as_ptr().add(16 * v));
                    let scale = _mm512_mul_ps(_mm512_set1_ps(self.row_scales[r]), scale);
                    _mm512_storeu_ps(sums[r].as_mut_ptr().add(16 * v), _mm512_mul_ps(whole, scale));
                }
            }
        }
    }
}

/// Rows in pairs that go through a panel of 4-bit integers together: their sums take 24 of the 32 registers.
const PAIR_ROWS: usize = 6;

/// Adds the products of rows in pairs with a panel of 4-bit integers.
///
/// # Safety
/// The machine has AVX-512 F, BW and BF16.
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
pub(in super::super) unsafe fn int4_pairs(
    x: Int4Rows<'_, u32>,
    [words, groups]: [usize; 2],
    group: usize,
    weights: &[u32],
    scales: &[f32],
    sums: &mut [[f32; PANEL]],
) {
    let rows = sums.len();
    assert!(
        x.values.len() >= 4 * words * rows && x.sums.len() >= groups * rows,
        "{rows} rows of {words} words"
    );
    assert!(weights.len() >= words * PANEL, "{words} words of 32 outputs in {}", weights.len());
    assert!(scales.len() >= groups * 2 * PANEL, "{groups} groups in {}", scales.len());
    assert!(
        group.is_multiple_of(NIBBLES) && groups == (words * NIBBLES).div_ceil(group),
        "a word is of one group"
    );
    let mut row = 0;
    while row < rows {
        // Tiles of about equal height.
        let height = (rows - row).div_ceil((rows - row).div_ceil(PAIR_ROWS));
        let range = row..row + height;
        let ahead = match rows {
            1..=PAIR_ROWS => Ahead::soon(weights),
            _ => Ahead::following(weights, range.clone(), rows),
        };
        let x = Int4Rows { values: &x.values[4 * row * words..], sums: &x.sums[row * groups..] };
        let tile = Pairs { x, words, groups, group_words: group / NIBBLES, weights, scales, ahead };
        let sums = &mut sums[range];
        // SAFETY: instructions as above; bounds were just checked.
        unsafe {
            match height {
                1 => tile.multiply::<1>(sums),
                2 => tile.multiply::<2>(sums),
                3 => tile.multiply::<3>(sums),
                4 => tile.multiply::<4>(sums),
                5 => tile.multiply::<5>(sums),
                _ => tile.multiply::<6>(sums),
            }
        }
        row += height;
    }
}

/// Some rows with a panel.
struct Pairs<'a> {
    x: Int4Rows<'a, u32>,
    words: usize,
    groups: usize,
    group_words: usize,
    weights: &'a [u32],
    scales: &'a [f32],
    ahead: Ahead,
}

impl Pairs<'_> {
    /// Of a group, even and odd pairs are summed apart, which halves the chain of sums that wait for each other.
    ///
    /// # Safety
    /// The machine has AVX-512 F, BW and BF16; there are `R` rows of `words` words and `groups` groups, which the panel
    /// and its scales have, and `R` rows of sums.
    #[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
    unsafe fn multiply<const R: usize>(&self, sums: &mut [[f32; PANEL]]) {
        let pairs = self.x.values.as_ptr();
        // An index is five bits, of which the highest belongs to the next integer.
        let numbers: [u16; PANEL] =
            std::array::from_fn(|at| half::bf16::from_f32((at % 16) as f32).to_bits());
        // SAFETY: there are 32.
        let numbers = unsafe { _mm512_loadu_epi16(numbers.as_ptr().cast()) };
        let mut ahead = self.ahead.over(self.words);
        for group in 0..self.groups {
            let mut now = [[[_mm512_setzero_ps(); 2]; 2]; R];
            let first = group * self.group_words;
            for word in first..self.words.min(first + self.group_words) {
                ahead.fetch_next();
                // SAFETY: the panel has 32 words here.
                let wide: [__m512i; 2] = std::array::from_fn(|v| unsafe {
                    _mm512_loadu_si512(self.weights.as_ptr().add(word * PANEL + 16 * v).cast())
                });
                let mut next = |at: usize, wide: [__m512i; 2]| {
                    let numbers: [__m512i; 2] =
                        std::array::from_fn(|v| _mm512_permutexvar_epi16(wide[v], numbers));
                    for r in 0..R {
                        // SAFETY: the pair is inside row `r`.
                        unsafe {
                            let pair = pairs.add(4 * (r * self.words + word) + at);
                            add_products!("vdpbf16ps", [pair; "0"], numbers, now[r][at % 2]);
                        }
                    }
                };
                next(0, wide);
                next(1, wide.map(|wide| _mm512_srli_epi32::<4>(wide)));
                next(2, wide.map(|wide| _mm512_srli_epi32::<8>(wide)));
                next(3, wide.map(|wide| _mm512_srli_epi32::<12>(wide)));
            }
            for v in 0..2 {
                // SAFETY: a group has 32 scales and as many offsets; rows of sums have 32 elements, of which these are
                // 16; a row has a sum for each group.
                unsafe {
                    let scales = self.scales.as_ptr().add(group * 2 * PANEL + 16 * v);
                    let (scale, offset) = (_mm512_loadu_ps(scales), _mm512_loadu_ps(scales.add(PANEL)));
                    for r in 0..R {
                        let to = sums[r].as_mut_ptr().add(16 * v);
                        let row = _mm512_set1_ps(*self.x.sums.as_ptr().add(r * self.groups + group));
                        let products = _mm512_add_ps(now[r][0][v], now[r][1][v]);
                        let sum = _mm512_fmadd_ps(products, scale, _mm512_loadu_ps(to));
                        _mm512_storeu_ps(to, _mm512_fmadd_ps(row, offset, sum));
                    }
                }
            }
        }
    }
}
