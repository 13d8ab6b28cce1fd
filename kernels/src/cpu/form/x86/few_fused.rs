//! Keys and values times few queries, as they lie, in AVX2: what panels are made of stays in registers.

use std::arch::x86_64::*;

use super::{transposed, upper_of};
use crate::cpu::form::{Ahead, PANEL};
use crate::scalar::Bf16;

/// Words, and numbers, of a vector.
const WORDS: usize = 8;
/// Vectors of 8 products of a query with 32 rows.
const GROUPS: usize = PANEL / WORDS;

/// [`super::Form::products_of_rows`] for `R` queries: 8 rows by 8 pairs of inputs are transposed in registers, and each
/// column multiplied with every query's pair.
///
/// # Safety
/// The machine has AVX2 and FMA.
#[target_feature(enable = "avx2,fma")]
pub(super) unsafe fn products<const R: usize>(
    queries: &[f32],
    width: usize,
    rows: &[Bf16],
    ahead: Ahead,
    products: &mut [f32],
    stride: usize,
) {
    let count = rows.len() / width;
    assert!((1..=PANEL).contains(&count) && width.is_multiple_of(2 * WORDS), "{count} rows of {width}");
    assert!(queries.len() >= R * width, "{R} queries of {width} in {}", queries.len());
    assert!(products.len() >= (R - 1) * stride + PANEL, "{R} times {PANEL} in {}", products.len());
    let high = _mm256_set1_epi32(0xffff_0000_u32 as i32);
    let mut sums = [[_mm256_setzero_ps(); R]; GROUPS];
    let mut ahead = ahead.over(width / 2 / WORDS * GROUPS);
    for pair in (0..width / 2).step_by(WORDS) {
        // Sums of one group wait for each other, those of the next do not.
        for (group, sums) in sums.iter_mut().enumerate() {
            ahead.fetch_next();
            let row: [__m256i; WORDS] = std::array::from_fn(|i| {
                // In place of rows that are missing comes the last: nobody uses its product.
                let row = (WORDS * group + i).min(count - 1);
                // SAFETY: the row exists, and 8 pairs from `pair` on are in it.
                unsafe { _mm256_loadu_si256(rows.as_ptr().add(row * width + 2 * pair).cast()) }
            });
            for (i, column) in transposed(row).into_iter().enumerate() {
                let numbers = [_mm256_castsi256_ps(_mm256_slli_epi32::<16>(column)), upper_of(column, high)];
                for (r, sum) in sums.iter_mut().enumerate() {
                    for (input, numbers) in numbers.into_iter().enumerate() {
                        // SAFETY: query `r` has this pair.
                        let query = unsafe { *queries.as_ptr().add(r * width + 2 * (pair + i) + input) };
                        *sum = _mm256_fmadd_ps(_mm256_set1_ps(query), numbers, *sum);
                    }
                }
            }
        }
    }
    for (group, sums) in sums.iter().enumerate() {
        for (r, sum) in sums.iter().enumerate() {
            // SAFETY: 32 products from `r * stride` on exist.
            unsafe { _mm256_storeu_ps(products.as_mut_ptr().add(r * stride + WORDS * group), *sum) };
        }
    }
}

/// [`super::Form::add_weighted_rows`] for `R` queries, `V` vectors of outputs at a time: numbers are widened in
/// registers, and multiplied with every query's weight.
///
/// # Safety
/// The machine has AVX2 and FMA.
#[target_feature(enable = "avx2,fma")]
pub(super) unsafe fn add_weighted<const R: usize, const V: usize>(
    x: &[f32],
    x_stride: usize,
    rows: &[Bf16],
    width: usize,
    ahead: Ahead,
    sums: &mut [f32],
    stride: usize,
) {
    let count = rows.len() / width;
    assert!((1..=PANEL).contains(&count) && width.is_multiple_of(V * WORDS), "{count} rows of {width}");
    assert!(x.len() >= (R - 1) * x_stride + count, "{R} times {count} weights in {}", x.len());
    assert!(sums.len() >= (R - 1) * stride + width, "{R} times {width} in {}", sums.len());
    let mut ahead = ahead.over(width / (V * WORDS) * count);
    for first in (0..width).step_by(V * WORDS) {
        let mut now: [[__m256; V]; R] = std::array::from_fn(|r| {
            // SAFETY: sum `r` has `V` vectors from `first` on.
            std::array::from_fn(|v| unsafe {
                _mm256_loadu_ps(sums.as_ptr().add(r * stride + first + WORDS * v))
            })
        });
        for row in 0..count {
            ahead.fetch_next();
            // SAFETY: query `r` has a weight for each row.
            let weights: [__m256; R] =
                std::array::from_fn(|r| unsafe { _mm256_set1_ps(*x.as_ptr().add(r * x_stride + row)) });
            for v in 0..V {
                // SAFETY: 8 elements from there on are in the row.
                let stored =
                    unsafe { _mm_loadu_si128(rows.as_ptr().add(row * width + first + WORDS * v).cast()) };
                let numbers = _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(stored)));
                for r in 0..R {
                    now[r][v] = _mm256_fmadd_ps(weights[r], numbers, now[r][v]);
                }
            }
        }
        for (r, now) in now.iter().enumerate() {
            for (v, now) in now.iter().enumerate() {
                // SAFETY: as for the loads.
                unsafe { _mm256_storeu_ps(sums.as_mut_ptr().add(r * stride + first + WORDS * v), *now) };
            }
        }
    }
}
