//! bf16 on AVX-512 in float32: weights are widened in registers, and products fused with additions. On Intel's cores a
//! fused product of 16 numbers takes a quarter of the time that one of 16 pairs does.

use std::arch::x86_64::*;

use super::super::{Ahead, Form, PANEL, check, widened_inputs};
use super::{Rows, add_rows, interleave_wide, transpose_wide, transposed_wide};
use crate::scalar::Bf16;

/// Words of a vector.
const WORDS: usize = 16;

/// AVX-512 without products of bf16.
pub(crate) struct FusedWide;

impl Form for FusedWide {
    type Stored = Bf16;
    type Input = f32;
    const ROWS: usize = 12;
    const ROWS_AT_ONCE: usize = 12;

    fn inputs<'a>(
        stored: &'a [Bf16],
        room: &'a mut Vec<f32>,
        widen: impl FnOnce(&[Bf16], &mut [f32]),
    ) -> &'a [f32] {
        widened_inputs(stored, room, widen)
    }

    #[inline(always)]
    unsafe fn tile(
        x: &[f32],
        stride: usize,
        inputs: usize,
        panel: &[Bf16],
        ahead: Ahead,
        fresh: bool,
        sums: &mut [[f32; PANEL]],
    ) {
        check::<FusedWide>(x, stride, inputs, panel, sums.len());
        // SAFETY: the caller has the instructions; bounds were just checked.
        unsafe {
            match sums.len() {
                1 => fused::<1>(x, stride, inputs, panel, ahead, fresh, sums),
                2 => fused::<2>(x, stride, inputs, panel, ahead, fresh, sums),
                3 => fused::<3>(x, stride, inputs, panel, ahead, fresh, sums),
                4 => fused::<4>(x, stride, inputs, panel, ahead, fresh, sums),
                5 => fused::<5>(x, stride, inputs, panel, ahead, fresh, sums),
                6 => fused::<6>(x, stride, inputs, panel, ahead, fresh, sums),
                7 => fused::<7>(x, stride, inputs, panel, ahead, fresh, sums),
                8 => fused::<8>(x, stride, inputs, panel, ahead, fresh, sums),
                9 => fused::<9>(x, stride, inputs, panel, ahead, fresh, sums),
                10 => fused::<10>(x, stride, inputs, panel, ahead, fresh, sums),
                11 => fused::<11>(x, stride, inputs, panel, ahead, fresh, sums),
                _ => fused::<12>(x, stride, inputs, panel, ahead, fresh, sums),
            }
        }
    }

    #[inline(always)]
    unsafe fn panel_of_rows(rows: &[Bf16], width: usize, ahead: Ahead, panel: &mut [Bf16]) {
        // SAFETY: the caller has the instructions.
        unsafe { transpose_wide(rows, width, ahead, panel) }
    }

    #[inline(always)]
    unsafe fn panel_of_columns(rows: &[Bf16], width: usize, first: usize, ahead: Ahead, panel: &mut [Bf16]) {
        // SAFETY: as above.
        unsafe { interleave_wide(rows, width, first, ahead, panel) }
    }

    #[inline(always)]
    fn takes_rows(queries: usize, width: usize) -> bool {
        (1..=4).contains(&queries) && width.is_multiple_of(64)
    }

    #[inline(always)]
    unsafe fn products_of_rows(
        queries: &[f32],
        width: usize,
        rows: &[Bf16],
        ahead: Ahead,
        to: &mut [f32],
        stride: usize,
    ) {
        // SAFETY: the caller has the instructions.
        unsafe {
            match queries.len() / width {
                1 => products::<1>(queries, width, rows, ahead, to, stride),
                2 => products::<2>(queries, width, rows, ahead, to, stride),
                3 => products::<3>(queries, width, rows, ahead, to, stride),
                _ => products::<4>(queries, width, rows, ahead, to, stride),
            }
        }
    }

    #[inline(always)]
    unsafe fn add_weighted_rows(
        x: &[f32],
        x_stride: usize,
        rows: &[Bf16],
        width: usize,
        ahead: Ahead,
        sums: &mut [f32],
        stride: usize,
    ) {
        // SAFETY: the caller has the instructions.
        unsafe {
            match (sums.len().div_ceil(stride), width.is_multiple_of(128)) {
                (1, true) => add_weighted::<1, 8>(x, x_stride, rows, width, ahead, sums, stride),
                (2, true) => add_weighted::<2, 8>(x, x_stride, rows, width, ahead, sums, stride),
                (1, false) => add_weighted::<1, 4>(x, x_stride, rows, width, ahead, sums, stride),
                (2, false) => add_weighted::<2, 4>(x, x_stride, rows, width, ahead, sums, stride),
                (3, _) => add_weighted::<3, 4>(x, x_stride, rows, width, ahead, sums, stride),
                _ => add_weighted::<4, 4>(x, x_stride, rows, width, ahead, sums, stride),
            }
        }
    }
}

/// The first numbers of 16 pairs.
#[inline]
#[target_feature(enable = "avx512f")]
fn lower_of(pairs: __m512i) -> __m512 {
    _mm512_castsi512_ps(_mm512_slli_epi32::<16>(pairs))
}

/// The second numbers of 16 pairs.
#[inline]
#[target_feature(enable = "avx512f")]
fn upper_of(pairs: __m512i) -> __m512 {
    _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32(0xffff_0000_u32 as i32)))
}

/// `R` rows times the panel's two vectors of 16 outputs: sums of 12 rows take 24 of the 32 registers.
///
/// # Safety
/// As for [`Form::tile`] with AVX-512 F; `sums` has `R` rows.
#[target_feature(enable = "avx512f")]
unsafe fn fused<const R: usize>(
    x: &[f32],
    stride: usize,
    inputs: usize,
    panel: &[Bf16],
    ahead: Ahead,
    fresh: bool,
    sums: &mut [[f32; PANEL]],
) {
    let mut rows = Rows::new(x.as_ptr(), stride);
    let mut now = [[_mm512_setzero_ps(); 2]; R];
    if !fresh {
        now = std::array::from_fn(|r| {
            // SAFETY: rows of `sums` have 32 elements.
            std::array::from_fn(|v| unsafe { _mm512_loadu_ps(sums[r].as_ptr().add(16 * v)) })
        });
    }
    let mut weights = panel.as_ptr();
    let mut ahead = ahead.over(inputs / 2);
    for _ in 0..inputs / 2 {
        ahead.fetch_next();
        // SAFETY: the panel has a row of 64 elements for each pair of inputs, and `weights` is at this one.
        let wide: [__m512i; 2] =
            std::array::from_fn(|v| unsafe { _mm512_loadu_si512(weights.add(32 * v).cast()) });
        // SAFETY: `rows` are at this pair, which is inside each of them.
        unsafe {
            add_rows!("vfmadd231ps", R, rows, "0", wide.map(|wide| lower_of(wide)), now);
            add_rows!("vfmadd231ps", R, rows, "4", wide.map(|wide| upper_of(wide)), now);
        }
        rows.advance(8);
        weights = weights.wrapping_add(2 * PANEL);
    }
    if inputs % 2 == 1 {
        let wide: [__m512; 2] = std::array::from_fn(|v| {
            // SAFETY: the panel is padded to a whole pair.
            lower_of(unsafe { _mm512_loadu_si512(weights.add(32 * v).cast()) })
        });
        // SAFETY: `rows` are at the last input.
        unsafe { add_rows!("vfmadd231ps", R, rows, "0", wide, now) };
    }
    for r in 0..R {
        for v in 0..2 {
            // SAFETY: as for the loads.
            unsafe { _mm512_storeu_ps(sums[r].as_mut_ptr().add(16 * v), now[r][v]) };
        }
    }
}

/// [`Form::products_of_rows`] for `R` queries: 16 rows by 16 pairs of inputs are transposed in registers, and each
/// column multiplied with every query's pair.
///
/// # Safety
/// The machine has AVX-512 F.
#[target_feature(enable = "avx512f")]
unsafe fn products<const R: usize>(
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
                for (input, numbers) in [lower_of(column), upper_of(column)].into_iter().enumerate() {
                    for (r, sum) in sums.iter_mut().enumerate() {
                        // SAFETY: query `r` has this pair.
                        let query = unsafe { *queries.as_ptr().add(r * width + 2 * (pair + i) + input) };
                        *sum = _mm512_fmadd_ps(_mm512_set1_ps(query), numbers, *sum);
                    }
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

/// [`Form::add_weighted_rows`] for `R` queries, `V` vectors of outputs at a time: numbers are widened in registers, and
/// multiplied with every query's weight.
///
/// # Safety
/// The machine has AVX-512 F.
#[target_feature(enable = "avx512f")]
unsafe fn add_weighted<const R: usize, const V: usize>(
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
        let mut now: [[__m512; V]; R] = std::array::from_fn(|r| {
            // SAFETY: sum `r` has `V` vectors from `first` on.
            std::array::from_fn(|v| unsafe {
                _mm512_loadu_ps(sums.as_ptr().add(r * stride + first + WORDS * v))
            })
        });
        for row in 0..count {
            ahead.fetch_next();
            // SAFETY: query `r` has a weight for each row.
            let weights: [__m512; R] =
                std::array::from_fn(|r| unsafe { _mm512_set1_ps(*x.as_ptr().add(r * x_stride + row)) });
            for v in 0..V {
                // SAFETY: 16 elements from there on are in the row.
                let stored =
                    unsafe { _mm256_loadu_si256(rows.as_ptr().add(row * width + first + WORDS * v).cast()) };
                let numbers = lower_of(_mm512_cvtepu16_epi32(stored));
                for r in 0..R {
                    now[r][v] = _mm512_fmadd_ps(weights[r], numbers, now[r][v]);
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
