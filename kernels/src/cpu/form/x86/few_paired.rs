//! Keys and values times few queries, as they lie, in AVX-512 with bf16: what panels are made of stays in registers.

use std::arch::x86_64::*;

use super::{IN_TURN, transposed_wide};
use crate::cpu::form::{Ahead, PANEL};
use crate::scalar::Bf16;

/// Words of a vector.
const WORDS: usize = 16;

/// The pair of inputs at `x`, in all lanes.
///
/// # Safety
/// Both may be read; the machine has AVX-512 F.
#[inline]
#[target_feature(enable = "avx512f")]
unsafe fn spread(x: *const Bf16) -> __m512bh {
    // SAFETY: by the caller's promise.
    let pair = unsafe { x.cast::<i32>().read_unaligned() };
    // SAFETY: both are 512 bits of anything.
    unsafe { std::mem::transmute::<__m512i, __m512bh>(_mm512_set1_epi32(pair)) }
}

/// [`super::Form::products_of_rows`] for `R` queries: 16 rows by 16 pairs of inputs are transposed in registers, and
/// each column multiplied with every query's pair.
///
/// # Safety
/// The machine has AVX-512 F and BF16.
#[target_feature(enable = "avx512f,avx512bf16")]
pub(super) unsafe fn products<const R: usize>(
    queries: &[Bf16],
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
    let mut sums = [[_mm512_setzero_ps(); R]; 2];
    let mut ahead = ahead.over(width);
    for pair in (0..width / 2).step_by(WORDS) {
        for (half, sums) in sums.iter_mut().enumerate() {
            let row: [__m512i; WORDS] = std::array::from_fn(|i| {
                // In place of rows that are missing comes the last: nobody uses its product.
                let row = (WORDS * half + i).min(count - 1);
                // SAFETY: the row exists, and 16 pairs from `pair` on are in it.
                unsafe { _mm512_loadu_si512(rows.as_ptr().add(row * width + 2 * pair).cast()) }
            });
            for (i, column) in transposed_wide(row).into_iter().enumerate() {
                ahead.fetch_next();
                // SAFETY: both are 512 bits of anything.
                let column = unsafe { std::mem::transmute::<__m512i, __m512bh>(column) };
                for (r, sum) in sums.iter_mut().enumerate() {
                    // SAFETY: query `r` has this pair.
                    let query = unsafe { spread(queries.as_ptr().add(r * width + 2 * (pair + i))) };
                    *sum = _mm512_dpbf16_ps(*sum, column, query);
                }
            }
        }
    }
    for (half, sums) in sums.iter().enumerate() {
        for (r, sum) in sums.iter().enumerate() {
            // SAFETY: 32 products from `r * stride` on exist.
            unsafe { _mm512_storeu_ps(products.as_mut_ptr().add(r * stride + WORDS * half), *sum) };
        }
    }
}

/// [`super::Form::add_weighted_rows`] for `R` queries, `V` vectors of outputs at a time: of two rows the elements are
/// put in turn in registers, and multiplied with every query's pair of weights.
///
/// # Safety
/// The machine has AVX-512 F, BW and BF16.
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
pub(super) unsafe fn add_weighted<const R: usize, const V: usize>(
    x: &[Bf16],
    x_stride: usize,
    rows: &[Bf16],
    width: usize,
    ahead: Ahead,
    sums: &mut [f32],
    stride: usize,
) {
    let count = rows.len() / width;
    let pairs = count.div_ceil(2);
    assert!((1..=PANEL).contains(&count) && width.is_multiple_of(V * WORDS), "{count} rows of {width}");
    assert!(x.len() >= (R - 1) * x_stride + 2 * pairs, "{R} times {pairs} pairs in {}", x.len());
    assert!(sums.len() >= (R - 1) * stride + width, "{R} times {width} in {}", sums.len());
    // SAFETY: both have 32 elements.
    let [low, high] = [0, 1].map(|half| unsafe { _mm512_loadu_epi16(IN_TURN[half].as_ptr()) });
    let mut ahead = ahead.over(width / (V * WORDS) * pairs);
    for first in (0..width).step_by(V * WORDS) {
        let mut now: [[__m512; V]; R] = std::array::from_fn(|r| {
            // SAFETY: sum `r` has `V` vectors from `first` on.
            std::array::from_fn(|v| unsafe {
                _mm512_loadu_ps(sums.as_ptr().add(r * stride + first + WORDS * v))
            })
        });
        for pair in 0..pairs {
            ahead.fetch_next();
            // SAFETY: query `r` has this pair of weights.
            let weights: [__m512bh; R] =
                std::array::from_fn(|r| unsafe { spread(x.as_ptr().add(r * x_stride + 2 * pair)) });
            for v in (0..V).step_by(2) {
                let load = |row: usize| {
                    // SAFETY: 32 elements from there on are in the row.
                    let at = unsafe { rows.as_ptr().add(row * width + first + WORDS * v) };
                    // SAFETY: as above.
                    unsafe { _mm512_loadu_si512(at.cast()) }
                };
                let one = load(2 * pair);
                let two = if 2 * pair + 1 < count { load(2 * pair + 1) } else { _mm512_setzero_si512() };
                for (half, places) in [low, high].into_iter().enumerate() {
                    let both = _mm512_permutex2var_epi16(one, places, two);
                    // SAFETY: both are 512 bits of anything.
                    let both = unsafe { std::mem::transmute::<__m512i, __m512bh>(both) };
                    for r in 0..R {
                        now[r][v + half] = _mm512_dpbf16_ps(now[r][v + half], both, weights[r]);
                    }
                }
            }
        }
        for (r, now) in now.iter().enumerate() {
            for (v, now) in now.iter().enumerate() {
                // SAFETY: as for the loads.
                unsafe { _mm512_storeu_ps(sums.as_mut_ptr().add(r * stride + first + WORDS * v), *now) };
            }
        }
    }
}
