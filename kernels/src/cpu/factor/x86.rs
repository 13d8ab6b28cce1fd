//! Products of 8-bit integers in vector instructions.

use std::arch::x86_64::*;

use super::super::form::PANEL;

/// Rows that go through half of a panel together: their sums take 8 of the 16 registers.
const ROWS: usize = 4;

/// Adds the products of rows of `words` with a panel.
///
/// # Safety
/// The machine has AVX2.
#[target_feature(enable = "avx2")]
pub(in super::super) unsafe fn int8(x: &[u32], words: usize, weights: &[u32], sums: &mut [[i32; PANEL]]) {
    assert!(x.len() >= words * sums.len(), "{} rows of {words} words in {}", sums.len(), x.len());
    assert!(weights.len() >= words * PANEL, "{words} words of 32 outputs in {}", weights.len());
    let mut row = 0;
    while row < sums.len() {
        let height = ROWS.min(sums.len() - row);
        let x = &x[row * words..];
        let sums = &mut sums[row..row + height];
        // SAFETY: AVX2 as above; bounds were just checked.
        unsafe {
            match height {
                1 => {
                    whole(x, words, weights, sums);
                }
                2 => halves::<2>(x, words, weights, sums),
                3 => halves::<3>(x, words, weights, sums),
                _ => halves::<4>(x, words, weights, sums),
            }
        }
        row += height;
    }
}

/// Four products each of eight outputs. The instruction takes bytes without sign on one side and adds two products in
/// 16 bits: magnitudes of weights, at most 128, with rows of at most 127 under the weights' signs stay below 2^15.
#[inline]
#[target_feature(enable = "avx2")]
fn dot(weights: __m256i, magnitudes: __m256i, x: __m256i) -> __m256i {
    let pairs = _mm256_maddubs_epi16(magnitudes, _mm256_sign_epi8(x, weights));
    _mm256_madd_epi16(pairs, _mm256_set1_epi16(1))
}

/// One row with a panel.
///
/// # Safety
/// The machine has AVX2; there is one row of `words`, and the panel has as many.
#[target_feature(enable = "avx2")]
unsafe fn whole(x: &[u32], words: usize, weights: &[u32], sums: &mut [[i32; PANEL]]) {
    let sums = sums[0].as_mut_ptr();
    // SAFETY: a row of sums has 32 elements.
    let mut now: [__m256i; 4] =
        std::array::from_fn(|v| unsafe { _mm256_loadu_si256(sums.add(8 * v).cast_const().cast()) });
    let mut at = weights.as_ptr();
    for x in &x[..words] {
        let x = _mm256_set1_epi32(*x as i32);
        for v in 0..4 {
            // SAFETY: a word of the row has 32 words of the panel.
            let wide = unsafe { _mm256_loadu_si256(at.add(8 * v).cast()) };
            now[v] = _mm256_add_epi32(now[v], dot(wide, _mm256_abs_epi8(wide), x));
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
/// The machine has AVX2; there are `R` rows of `words`, and the panel has as many.
#[target_feature(enable = "avx2")]
unsafe fn halves<const R: usize>(x: &[u32], words: usize, weights: &[u32], sums: &mut [[i32; PANEL]]) {
    let x = x.as_ptr();
    for half in 0..2 {
        let mut now: [[__m256i; 2]; R] = std::array::from_fn(|r| {
            // SAFETY: rows of `sums` have 32 elements, of which these are one half.
            std::array::from_fn(|v| unsafe {
                _mm256_loadu_si256(sums[r].as_ptr().add(16 * half + 8 * v).cast())
            })
        });
        // SAFETY: the panel begins with 32 words.
        let mut at = unsafe { weights.as_ptr().add(16 * half) };
        for word in 0..words {
            // SAFETY: a word of a row has 32 words of the panel, of which these are one half.
            let wide: [__m256i; 2] =
                std::array::from_fn(|v| unsafe { _mm256_loadu_si256(at.add(8 * v).cast()) });
            let magnitudes = wide.map(|wide| _mm256_abs_epi8(wide));
            for r in 0..R {
                // SAFETY: the word is inside row `r`.
                let x = _mm256_set1_epi32(unsafe { *x.add(r * words + word) } as i32);
                for v in 0..2 {
                    now[r][v] = _mm256_add_epi32(now[r][v], dot(wide[v], magnitudes[v], x));
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
