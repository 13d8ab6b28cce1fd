//! 4-bit integers on AVX2. A word's integers are masked out where they lie, four places of 4 bits in each half, which
//! multiplies them by 1, 16, 256 and 4,096; their inputs were divided by as much. Scales come in once for a group.

use std::arch::x86_64::*;
use std::ops::Range;

use super::super::{Int4Rows, NIBBLES, PLACES, UNPACKED};
use crate::cpu::form::{Ahead, PANEL};
use crate::cpu::linear::ROWS_BLOCK;

/// Rows that go through a panel together: their sums take 10 of the 16 registers.
const ROWS: usize = 5;

/// A panel of 4-bit integers with its scales.
#[derive(Clone, Copy)]
pub(in super::super) struct Panel<'a> {
    /// `[words][32]`.
    pub(in super::super) weights: &'a [u32],
    /// `[groups][2][32]`.
    pub(in super::super) scales: &'a [f32],
    pub(in super::super) words: usize,
    pub(in super::super) groups: usize,
    pub(in super::super) group_words: usize,
}

impl Panel<'_> {
    fn words_of(&self, group: usize) -> Range<usize> {
        let first = group * self.group_words;
        first..self.words.min(first + self.group_words)
    }
}

/// Adds the products of rows with a panel. Of a group, products with the integers are summed in order, then scaled,
/// whether integers become numbers in registers (few rows) or in the first level of cache (many).
///
/// # Safety
/// The machine has AVX2 and FMA.
#[target_feature(enable = "avx2,fma")]
pub(in super::super) unsafe fn int4_shifted(
    x: Int4Rows<'_, f32>,
    panel: Panel<'_>,
    sums: &mut [[f32; PANEL]],
) {
    let (rows, row_len) = (sums.len(), panel.words * NIBBLES);
    assert!(x.values.len() >= row_len * rows, "{rows} rows of {row_len} in {}", x.values.len());
    assert!(x.sums.len() >= panel.groups * rows && rows <= ROWS_BLOCK, "{rows} rows, at most {ROWS_BLOCK}");
    assert!(panel.weights.len() >= panel.words * PANEL, "{} words in {}", panel.words, panel.weights.len());
    assert!(panel.scales.len() >= panel.groups * 2 * PANEL, "{} groups", panel.groups);
    assert!(
        panel.group_words > 0 && panel.groups == panel.words.div_ceil(panel.group_words),
        "a word is of one group"
    );
    // SAFETY: (of all calls) AVX2 and FMA as above; bounds were just checked.
    unsafe {
        match rows {
            1 => few::<1, 4>(x, panel, sums),
            2 => few::<2, 4>(x, panel, sums),
            3 => few::<3, 2>(x, panel, sums),
            4 => few::<4, 2>(x, panel, sums),
            ROWS => few::<ROWS, 2>(x, panel, sums),
            _ => many(x, panel, sums),
        }
    }
}

/// The masks of the places.
#[inline]
#[target_feature(enable = "avx2")]
fn masks() -> [__m256i; PLACES] {
    std::array::from_fn(|place| _mm256_set1_epi32(15 << (4 * place)))
}

/// `R` rows with `V` of the panel's four vectors of 8 outputs at a time.
///
/// # Safety
/// The machine has AVX2 and FMA; there are `R` rows for the panel.
#[target_feature(enable = "avx2,fma")]
unsafe fn few<const R: usize, const V: usize>(
    x: Int4Rows<'_, f32>,
    panel: Panel<'_>,
    sums: &mut [[f32; PANEL]],
) {
    let (masks, row_len) = (masks(), panel.words * NIBBLES);
    let ahead = Ahead::soon(panel.weights);
    let parts = if V == 4 { [ahead, Ahead::NONE] } else { ahead.in_two() };
    for (first, ahead) in (0..4).step_by(V).zip(parts) {
        let mut ahead = ahead.over(panel.words);
        for group in 0..panel.groups {
            let mut now = [[_mm256_setzero_ps(); V]; R];
            for word in panel.words_of(group) {
                ahead.fetch_next();
                // SAFETY: the panel has 32 words here, of which these are `V` vectors of 8.
                let mut wide: [__m256i; V] = std::array::from_fn(|v| unsafe {
                    _mm256_loadu_si256(panel.weights.as_ptr().add(word * PANEL + 8 * (first + v)).cast())
                });
                for half in 0..NIBBLES / PLACES {
                    for (place, mask) in masks.into_iter().enumerate() {
                        let numbers: [__m256; V] =
                            std::array::from_fn(|v| _mm256_cvtepi32_ps(_mm256_and_si256(wide[v], mask)));
                        for r in 0..R {
                            let at = r * row_len + word * NIBBLES + half * PLACES + place;
                            // SAFETY: the input is inside row `r`.
                            let x = _mm256_set1_ps(unsafe { *x.values.as_ptr().add(at) });
                            for v in 0..V {
                                now[r][v] = _mm256_fmadd_ps(x, numbers[v], now[r][v]);
                            }
                        }
                    }
                    wide = std::array::from_fn(|v| _mm256_srli_epi32::<16>(wide[v]));
                }
            }
            // SAFETY: there are `R` rows, and `V` vectors from the `first` on.
            unsafe { add_scaled(&now, x.sums, panel, group, first, sums) };
        }
    }
}

/// Adds a group's sums to those of the rows: `sum * scale + offset * sum of the row's inputs`.
///
/// # Safety
/// The machine has AVX2 and FMA; there are `R` rows with sums of the panel's groups, and `V` vectors from the `first` on.
#[inline]
#[target_feature(enable = "avx2,fma")]
unsafe fn add_scaled<const R: usize, const V: usize>(
    now: &[[__m256; V]; R],
    row_sums: &[f32],
    panel: Panel<'_>,
    group: usize,
    first: usize,
    sums: &mut [[f32; PANEL]],
) {
    for v in 0..V {
        // SAFETY: a group has 32 scales and as many offsets; rows of sums have 32 elements, of which these are 8; a row
        // has a sum for each group.
        unsafe {
            let scales = panel.scales.as_ptr().add(group * 2 * PANEL + 8 * (first + v));
            let (scale, offset) = (_mm256_loadu_ps(scales), _mm256_loadu_ps(scales.add(PANEL)));
            for r in 0..R {
                let to = sums[r].as_mut_ptr().add(8 * (first + v));
                let row = _mm256_set1_ps(*row_sums.as_ptr().add(r * panel.groups + group));
                let sum = _mm256_fmadd_ps(now[r][v], scale, _mm256_loadu_ps(to));
                _mm256_storeu_ps(to, _mm256_fmadd_ps(row, offset, sum));
            }
        }
    }
}

/// Begins with a cache line, so that no vector is in two.
#[repr(align(64))]
struct Lines<const N: usize>([[f32; PANEL]; N]);

/// Many rows: a piece of a group becomes numbers in the first level of cache.
///
/// # Safety
/// The machine has AVX2 and FMA; there are as many rows for the panel as sums.
#[target_feature(enable = "avx2,fma")]
unsafe fn many(x: Int4Rows<'_, f32>, panel: Panel<'_>, sums: &mut [[f32; PANEL]]) {
    let (rows, row_len) = (sums.len(), panel.words * NIBBLES);
    let mut numbers = Lines([[0.0; PANEL]; UNPACKED]);
    // Sums of a group so far, where it goes in several pieces.
    let mut partial = Lines([[0.0; PANEL]; ROWS_BLOCK]);
    for group in 0..panel.groups {
        let all = panel.words_of(group);
        for begin in all.clone().step_by(UNPACKED / NIBBLES) {
            let words = begin..all.end.min(begin + UNPACKED / NIBBLES);
            let count = words.len() * NIBBLES;
            let mut ahead = Ahead::following(panel.weights, words.clone(), panel.words).over(words.len());
            for (word, numbers) in words.clone().zip(numbers.0.as_chunks_mut().0) {
                ahead.fetch_next();
                let weights = panel.weights[word * PANEL..].first_chunk().expect("the panel has the word");
                // SAFETY: the machine has AVX2.
                unsafe { unpack(weights, numbers) };
            }
            let mut row = 0;
            while row < rows {
                // Tiles of about equal height.
                let height = (rows - row).div_ceil((rows - row).div_ceil(ROWS));
                let piece = Piece {
                    x: &x.values[row * row_len + begin * NIBBLES..],
                    row_len,
                    row_sums: &x.sums[row * panel.groups..],
                    numbers: &numbers.0[..count],
                    group,
                    begins: begin == all.start,
                    ends: words.end == all.end,
                };
                let (partial, sums) = (&mut partial.0[row..row + height], &mut sums[row..row + height]);
                // SAFETY: instructions as above; rows and the panel are as long as was checked.
                unsafe {
                    match height {
                        1 => piece.multiply::<1>(panel, partial, sums),
                        2 => piece.multiply::<2>(panel, partial, sums),
                        3 => piece.multiply::<3>(panel, partial, sums),
                        4 => piece.multiply::<4>(panel, partial, sums),
                        _ => piece.multiply::<ROWS>(panel, partial, sums),
                    }
                }
                row += height;
            }
        }
    }
}

/// Eight inputs of a panel as numbers.
///
/// # Safety
/// The machine has AVX2.
#[target_feature(enable = "avx2")]
unsafe fn unpack(weights: &[u32; PANEL], numbers: &mut [[f32; PANEL]; NIBBLES]) {
    let masks = masks();
    for v in 0..4 {
        // SAFETY: of 32 words these are eight.
        let mut wide = unsafe { _mm256_loadu_si256(weights.as_ptr().add(8 * v).cast()) };
        for half in 0..NIBBLES / PLACES {
            for (place, mask) in masks.into_iter().enumerate() {
                let number = _mm256_cvtepi32_ps(_mm256_and_si256(wide, mask));
                let to = numbers[half * PLACES + place].as_mut_ptr();
                // SAFETY: an input has 32 outputs, of which these are eight.
                unsafe { _mm256_storeu_ps(to.add(8 * v), number) };
            }
            wide = _mm256_srli_epi32::<16>(wide);
        }
    }
}

/// Some inputs of one group.
struct Piece<'a> {
    /// Rows from the first of these inputs on, one `row_len` after the other.
    x: &'a [f32],
    row_len: usize,
    /// `[row][groups]`.
    row_sums: &'a [f32],
    numbers: &'a [[f32; PANEL]],
    group: usize,
    /// Whether the group begins with it.
    begins: bool,
    /// Whether the group ends with it.
    ends: bool,
}

impl Piece<'_> {
    /// `R` rows with the numbers, one half of the outputs after the other.
    ///
    /// # Safety
    /// The machine has AVX2 and FMA; there are `R` rows with as many inputs as there are numbers, and of `partial` and
    /// `sums`; the panel has the group.
    #[target_feature(enable = "avx2,fma")]
    unsafe fn multiply<const R: usize>(
        &self,
        panel: Panel<'_>,
        partial: &mut [[f32; PANEL]],
        sums: &mut [[f32; PANEL]],
    ) {
        let x = self.x.as_ptr();
        for half in 0..2 {
            let mut now = [[_mm256_setzero_ps(); 2]; R];
            if !self.begins {
                now = std::array::from_fn(|r| {
                    // SAFETY: rows of sums have 32 elements, of which these are one half.
                    std::array::from_fn(|v| unsafe {
                        _mm256_loadu_ps(partial[r].as_ptr().add(16 * half + 8 * v))
                    })
                });
            }
            for (input, numbers) in self.numbers.iter().enumerate() {
                // SAFETY: an input has 32 outputs, of which these are one half.
                let wide: [__m256; 2] = std::array::from_fn(|v| unsafe {
                    _mm256_loadu_ps(numbers.as_ptr().add(16 * half + 8 * v))
                });
                for r in 0..R {
                    // SAFETY: the input is inside row `r`.
                    let x = _mm256_set1_ps(unsafe { *x.add(r * self.row_len + input) });
                    for v in 0..2 {
                        now[r][v] = _mm256_fmadd_ps(x, wide[v], now[r][v]);
                    }
                }
            }
            if self.ends {
                // SAFETY: there are `R` rows, and two vectors from there on.
                unsafe { add_scaled(&now, self.row_sums, panel, self.group, 2 * half, sums) };
                continue;
            }
            for r in 0..R {
                for v in 0..2 {
                    // SAFETY: as for the loads.
                    unsafe { _mm256_storeu_ps(partial[r].as_mut_ptr().add(16 * half + 8 * v), now[r][v]) };
                }
            }
        }
    }
}
