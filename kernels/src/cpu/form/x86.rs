//! bf16 forms in vector instructions. All read the same panels.

mod add;
mod few_fused;
mod few_paired;
mod fused_wide;

use std::arch::x86_64::*;

use super::{Ahead, Form, PANEL, check, gather, scatter, widened_inputs};
use crate::scalar::Bf16;

pub(in super::super) use add::{Rows, add_products, add_rows};
pub(crate) use fused_wide::FusedWide;

/// AVX2: weights widened in registers, products fused with additions.
pub(crate) struct Fused;

impl Form for Fused {
    type Stored = Bf16;
    type Input = f32;
    const ROWS: usize = 5;
    const ROWS_AT_ONCE: usize = 2;

    // Three rows are the slowest: too many to go through a panel at once, too few to keep both units busy.
    #[inline(always)]
    fn rows_next(left: usize) -> usize {
        match left {
            6 => 4,
            7 => 5,
            _ => left.div_ceil(left.div_ceil(Self::ROWS)),
        }
    }

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
        check::<Fused>(x, stride, inputs, panel, sums.len());
        if fresh {
            sums.fill([0.0; PANEL]);
        }
        let halves = ahead.in_two();
        // SAFETY: the caller has the instructions; bounds were just checked.
        unsafe {
            match sums.len() {
                1 => fused_wide::<1>(x, stride, inputs, panel, ahead, sums),
                2 => fused_wide::<2>(x, stride, inputs, panel, ahead, sums),
                3 => {
                    fused_half::<3>(x, stride, inputs, panel, 0, halves[0], sums);
                    fused_half::<3>(x, stride, inputs, panel, 1, halves[1], sums);
                }
                4 => {
                    fused_half::<4>(x, stride, inputs, panel, 0, halves[0], sums);
                    fused_half::<4>(x, stride, inputs, panel, 1, halves[1], sums);
                }
                _ => {
                    fused_half::<5>(x, stride, inputs, panel, 0, halves[0], sums);
                    fused_half::<5>(x, stride, inputs, panel, 1, halves[1], sums);
                }
            }
        }
    }

    #[inline(always)]
    unsafe fn panel_of_rows(rows: &[Bf16], width: usize, ahead: Ahead, panel: &mut [Bf16]) {
        // SAFETY: the caller has the instructions.
        unsafe { transpose(rows, width, ahead, panel) }
    }

    #[inline(always)]
    unsafe fn panel_of_columns(rows: &[Bf16], width: usize, first: usize, ahead: Ahead, panel: &mut [Bf16]) {
        // SAFETY: the caller has the instructions.
        unsafe { interleave(rows, width, first, ahead, panel) }
    }

    #[inline(always)]
    fn takes_rows(queries: usize, width: usize) -> bool {
        (1..=4).contains(&queries) && width.is_multiple_of(32)
    }

    #[inline(always)]
    unsafe fn products_of_rows(
        queries: &[f32],
        width: usize,
        rows: &[Bf16],
        ahead: Ahead,
        products: &mut [f32],
        stride: usize,
    ) {
        // SAFETY: the caller has the instructions.
        unsafe {
            match queries.len() / width {
                1 => few_fused::products::<1>(queries, width, rows, ahead, products, stride),
                2 => few_fused::products::<2>(queries, width, rows, ahead, products, stride),
                3 => few_fused::products::<3>(queries, width, rows, ahead, products, stride),
                _ => few_fused::products::<4>(queries, width, rows, ahead, products, stride),
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
            match sums.len().div_ceil(stride) {
                1 => few_fused::add_weighted::<1, 4>(x, x_stride, rows, width, ahead, sums, stride),
                2 => few_fused::add_weighted::<2, 4>(x, x_stride, rows, width, ahead, sums, stride),
                3 => few_fused::add_weighted::<3, 2>(x, x_stride, rows, width, ahead, sums, stride),
                _ => few_fused::add_weighted::<4, 2>(x, x_stride, rows, width, ahead, sums, stride),
            }
        }
    }
}

/// `R` rows times the panel's four vectors of 8 outputs, for few rows: what the loop needs fits the 16 registers.
///
/// # Safety
/// As for [`Form::tile`] with AVX2 and FMA; `sums` has `R` rows.
#[target_feature(enable = "avx2,fma")]
unsafe fn fused_wide<const R: usize>(
    x: &[f32],
    stride: usize,
    inputs: usize,
    panel: &[Bf16],
    ahead: Ahead,
    sums: &mut [[f32; PANEL]],
) {
    let x = x.as_ptr();
    let high = _mm256_set1_epi32(0xffff_0000_u32 as i32);
    let mut now: [[__m256; 4]; R] = std::array::from_fn(|r| {
        // SAFETY: rows of `sums` have 32 elements.
        std::array::from_fn(|v| unsafe { _mm256_loadu_ps(sums[r].as_ptr().add(8 * v)) })
    });
    let mut weights = panel.as_ptr();
    let mut ahead = ahead.over(inputs / 2);
    for pair in 0..inputs / 2 {
        ahead.fetch_next();
        for v in 0..4 {
            // SAFETY: a vector of weights is 16 elements, the pairs of 8 outputs; the panel has four for each pair
            // of inputs, and `weights` is at this pair. Both inputs are inside row `r`.
            unsafe {
                let wide = _mm256_loadu_si256(weights.add(16 * v).cast());
                let low = _mm256_castsi256_ps(_mm256_slli_epi32::<16>(wide));
                let top = upper_of(wide, high);
                for r in 0..R {
                    let values = x.add(r * stride + 2 * pair);
                    now[r][v] = _mm256_fmadd_ps(_mm256_set1_ps(*values), low, now[r][v]);
                    now[r][v] = _mm256_fmadd_ps(_mm256_set1_ps(*values.add(1)), top, now[r][v]);
                }
            }
        }
        weights = weights.wrapping_add(2 * PANEL);
    }
    if inputs % 2 == 1 {
        for v in 0..4 {
            // SAFETY: the panel is padded to a whole pair; the last input is inside each row.
            unsafe {
                let wide = _mm256_loadu_si256(weights.add(16 * v).cast());
                let low = _mm256_castsi256_ps(_mm256_slli_epi32::<16>(wide));
                for r in 0..R {
                    let value = _mm256_set1_ps(*x.add(r * stride + inputs - 1));
                    now[r][v] = _mm256_fmadd_ps(value, low, now[r][v]);
                }
            }
        }
    }
    for r in 0..R {
        for v in 0..4 {
            // SAFETY: as for the loads.
            unsafe { _mm256_storeu_ps(sums[r].as_mut_ptr().add(8 * v), now[r][v]) };
        }
    }
}

/// `R` rows times half of the panel: sums of 5 rows and 2 vectors leave registers for weights and inputs.
///
/// # Safety
/// As for [`Form::tile`] with AVX2 and FMA; `sums` has `R` rows; `half` is 0 or 1.
#[target_feature(enable = "avx2,fma")]
unsafe fn fused_half<const R: usize>(
    x: &[f32],
    stride: usize,
    inputs: usize,
    panel: &[Bf16],
    half: usize,
    ahead: Ahead,
    sums: &mut [[f32; PANEL]],
) {
    let x = x.as_ptr();
    let high = _mm256_set1_epi32(0xffff_0000_u32 as i32);
    let mut now: [[__m256; 2]; R] = std::array::from_fn(|r| {
        // SAFETY: rows of `sums` have 32 elements, of which these are one half.
        std::array::from_fn(|v| unsafe { _mm256_loadu_ps(sums[r].as_ptr().add(16 * half + 8 * v)) })
    });
    // SAFETY: the panel has a row of 64 elements for each pair of inputs, a vector of 16 for 8 outputs.
    let mut weights = unsafe { panel.as_ptr().add(32 * half) };
    let mut ahead = ahead.over(inputs / 2);
    for pair in 0..inputs / 2 {
        ahead.fetch_next();
        // SAFETY: as above; `weights` is at this pair.
        let wide: [__m256i; 2] =
            std::array::from_fn(|v| unsafe { _mm256_loadu_si256(weights.add(16 * v).cast()) });
        let low: [__m256; 2] = std::array::from_fn(|v| _mm256_castsi256_ps(_mm256_slli_epi32::<16>(wide[v])));
        for r in 0..R {
            // SAFETY: the input is inside row `r`.
            let value = unsafe { _mm256_set1_ps(*x.add(r * stride + 2 * pair)) };
            for v in 0..2 {
                now[r][v] = _mm256_fmadd_ps(value, low[v], now[r][v]);
            }
        }
        let top: [__m256; 2] = std::array::from_fn(|v| upper_of(wide[v], high));
        for r in 0..R {
            // SAFETY: as above.
            let value = unsafe { _mm256_set1_ps(*x.add(r * stride + 2 * pair + 1)) };
            for v in 0..2 {
                now[r][v] = _mm256_fmadd_ps(value, top[v], now[r][v]);
            }
        }
        weights = weights.wrapping_add(2 * PANEL);
    }
    if inputs % 2 == 1 {
        for v in 0..2 {
            // SAFETY: the panel is padded to a whole pair; the last input is inside each row.
            unsafe {
                let wide = _mm256_loadu_si256(weights.add(16 * v).cast());
                let low = _mm256_castsi256_ps(_mm256_slli_epi32::<16>(wide));
                for r in 0..R {
                    let value = _mm256_set1_ps(*x.add(r * stride + inputs - 1));
                    now[r][v] = _mm256_fmadd_ps(value, low, now[r][v]);
                }
            }
        }
    }
    for r in 0..R {
        for v in 0..2 {
            // SAFETY: as for the loads.
            unsafe { _mm256_storeu_ps(sums[r].as_mut_ptr().add(16 * half + 8 * v), now[r][v]) };
        }
    }
}

/// The second numbers of 8 pairs, `high` being a mask of the higher halves of words.
#[inline]
#[target_feature(enable = "avx2")]
fn upper_of(pairs: __m256i, high: __m256i) -> __m256 {
    _mm256_castsi256_ps(_mm256_and_si256(pairs, high))
}

/// AVX-512 with bf16: an instruction multiplies and adds both inputs of a pair for 16 outputs.
pub(crate) struct Paired;

impl Form for Paired {
    type Stored = Bf16;
    type Input = Bf16;
    const ROWS: usize = 14;
    const ROWS_AT_ONCE: usize = 14;

    fn inputs<'a>(
        stored: &'a [Bf16],
        _: &'a mut Vec<f32>,
        _: impl FnOnce(&[Bf16], &mut [f32]),
    ) -> &'a [Bf16] {
        stored
    }

    #[inline(always)]
    unsafe fn tile(
        x: &[Bf16],
        stride: usize,
        inputs: usize,
        panel: &[Bf16],
        ahead: Ahead,
        fresh: bool,
        sums: &mut [[f32; PANEL]],
    ) {
        check::<Paired>(x, stride, inputs, panel, sums.len());
        // SAFETY: the caller has the instructions; bounds were just checked.
        unsafe {
            match sums.len() {
                1 => paired::<1>(x, stride, inputs, panel, ahead, fresh, sums),
                2 => paired::<2>(x, stride, inputs, panel, ahead, fresh, sums),
                3 => paired::<3>(x, stride, inputs, panel, ahead, fresh, sums),
                4 => paired::<4>(x, stride, inputs, panel, ahead, fresh, sums),
                5 => paired::<5>(x, stride, inputs, panel, ahead, fresh, sums),
                6 => paired::<6>(x, stride, inputs, panel, ahead, fresh, sums),
                7 => paired::<7>(x, stride, inputs, panel, ahead, fresh, sums),
                8 => paired::<8>(x, stride, inputs, panel, ahead, fresh, sums),
                9 => paired::<9>(x, stride, inputs, panel, ahead, fresh, sums),
                10 => paired::<10>(x, stride, inputs, panel, ahead, fresh, sums),
                11 => paired::<11>(x, stride, inputs, panel, ahead, fresh, sums),
                12 => paired::<12>(x, stride, inputs, panel, ahead, fresh, sums),
                13 => paired::<13>(x, stride, inputs, panel, ahead, fresh, sums),
                _ => paired::<14>(x, stride, inputs, panel, ahead, fresh, sums),
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
        queries: &[Bf16],
        width: usize,
        rows: &[Bf16],
        ahead: Ahead,
        products: &mut [f32],
        stride: usize,
    ) {
        // SAFETY: the caller has the instructions.
        unsafe {
            match queries.len() / width {
                1 => few_paired::products::<1>(queries, width, rows, ahead, products, stride),
                2 => few_paired::products::<2>(queries, width, rows, ahead, products, stride),
                3 => few_paired::products::<3>(queries, width, rows, ahead, products, stride),
                _ => few_paired::products::<4>(queries, width, rows, ahead, products, stride),
            }
        }
    }

    #[inline(always)]
    unsafe fn add_weighted_rows(
        x: &[Bf16],
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
                (1, true) => few_paired::add_weighted::<1, 8>(x, x_stride, rows, width, ahead, sums, stride),
                (2, true) => few_paired::add_weighted::<2, 8>(x, x_stride, rows, width, ahead, sums, stride),
                (1, false) => few_paired::add_weighted::<1, 4>(x, x_stride, rows, width, ahead, sums, stride),
                (2, false) => few_paired::add_weighted::<2, 4>(x, x_stride, rows, width, ahead, sums, stride),
                (3, _) => few_paired::add_weighted::<3, 4>(x, x_stride, rows, width, ahead, sums, stride),
                _ => few_paired::add_weighted::<4, 4>(x, x_stride, rows, width, ahead, sums, stride),
            }
        }
    }
}

/// `R` rows times the panel's two vectors of 16 outputs: sums of 14 rows take 28 of the 32 registers.
///
/// # Safety
/// As for [`Form::tile`] with AVX-512 F, BW and BF16; `sums` has `R` rows.
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
unsafe fn paired<const R: usize>(
    x: &[Bf16],
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
        unsafe { add_rows!("vdpbf16ps", R, rows, "0", wide, now) };
        rows.advance(4);
        weights = weights.wrapping_add(2 * PANEL);
    }
    if inputs % 2 == 1 {
        // The row ends with its last input; what the panel has beside it, if only padding, counts for nothing.
        let wide: [__m512i; 2] = std::array::from_fn(|v| {
            // SAFETY: the panel is padded to a whole pair.
            let pair = unsafe { _mm512_loadu_si512(weights.add(32 * v).cast()) };
            _mm512_and_si512(pair, _mm512_set1_epi32(0xffff))
        });
        for r in 0..R {
            // SAFETY: the last input is inside row `r`.
            let value = u32::from(unsafe { (*x.as_ptr().add(r * stride + inputs - 1)).0 });
            // SAFETY: `value` is a pair.
            unsafe { add_products!("vdpbf16ps", [&raw const value; "0"], wide, now[r]) };
        }
    }
    for r in 0..R {
        for v in 0..2 {
            // SAFETY: as for the loads.
            unsafe { _mm512_storeu_ps(sums[r].as_mut_ptr().add(16 * v), now[r][v]) };
        }
    }
}

/// [`Form::panel_of_rows`]: pairs are words of 32 bits, so a panel is the rows transposed; 8 by 8 in registers.
///
/// # Safety
/// The machine has AVX2.
#[target_feature(enable = "avx2")]
unsafe fn transpose(rows: &[Bf16], width: usize, ahead: Ahead, panel: &mut [Bf16]) {
    let count = rows.len() / width;
    let pairs = width / 2;
    if count != PANEL || !width.is_multiple_of(2) || !pairs.is_multiple_of(8) {
        return scatter(rows, width, panel);
    }
    assert!(panel.len() >= PANEL * width, "a panel of {width} inputs in {} elements", panel.len());
    let (from, to) = (rows.as_ptr(), panel.as_mut_ptr());
    let mut ahead = ahead.over(PANEL / 8 * (pairs / 8));
    for first in (0..PANEL).step_by(8) {
        for pair in (0..pairs).step_by(8) {
            ahead.fetch_next();
            // SAFETY: rows `first..first + 8` and pairs `pair..pair + 8` exist: both counts are multiples of 8.
            let row: [__m256i; 8] = std::array::from_fn(|i| unsafe {
                _mm256_loadu_si256(from.add((first + i) * width + 2 * pair).cast())
            });
            for (i, column) in transposed(row).into_iter().enumerate() {
                // SAFETY: pair `pair + i` is inside the panel, checked above; a pair's row has 32 outputs.
                unsafe { _mm256_storeu_si256(to.add(((pair + i) * PANEL + first) * 2).cast(), column) };
            }
        }
    }
}

/// Word `i` of every row, for each `i`.
#[inline]
#[target_feature(enable = "avx2")]
fn transposed(row: [__m256i; 8]) -> [__m256i; 8] {
    let two: [__m256i; 8] = std::array::from_fn(|i| match i % 2 {
        0 => _mm256_unpacklo_epi32(row[i], row[i + 1]),
        _ => _mm256_unpackhi_epi32(row[i - 1], row[i]),
    });
    // Of every four rows: words 0 and 4, 1 and 5, 2 and 6, 3 and 7, four rows each.
    let four: [__m256i; 8] = std::array::from_fn(|i| {
        let base = i / 4 * 4;
        match i % 4 {
            0 => _mm256_unpacklo_epi64(two[base], two[base + 2]),
            1 => _mm256_unpackhi_epi64(two[base], two[base + 2]),
            2 => _mm256_unpacklo_epi64(two[base + 1], two[base + 3]),
            _ => _mm256_unpackhi_epi64(two[base + 1], two[base + 3]),
        }
    });
    std::array::from_fn(|i| match i / 4 {
        0 => _mm256_permute2x128_si256::<0x20>(four[i], four[i + 4]),
        _ => _mm256_permute2x128_si256::<0x31>(four[i - 4], four[i]),
    })
}

/// [`Form::panel_of_columns`]: the elements of two rows in turn.
///
/// # Safety
/// The machine has AVX2.
#[target_feature(enable = "avx2")]
unsafe fn interleave(rows: &[Bf16], width: usize, first: usize, ahead: Ahead, panel: &mut [Bf16]) {
    let count = rows.len() / width;
    if count != PANEL || first + PANEL > width {
        return gather(rows, width, first, panel);
    }
    assert!(panel.len() >= PANEL * PANEL, "32 rows in a panel of {}", panel.len());
    let (from, to) = (rows.as_ptr(), panel.as_mut_ptr());
    let mut ahead = ahead.over(PANEL / 2);
    for row in (0..PANEL).step_by(2) {
        ahead.fetch_next();
        for half in [0, PANEL / 2] {
            // SAFETY: 16 elements from `first + half` on are in each of the 32 rows; so are 32 in the panel.
            unsafe {
                let at = from.add(row * width + first + half);
                let one = _mm256_loadu_si256(at.cast());
                let two = _mm256_loadu_si256(at.add(width).cast());
                let (low, high) = (_mm256_unpacklo_epi16(one, two), _mm256_unpackhi_epi16(one, two));
                let to = to.add(row * PANEL + 2 * half);
                _mm256_storeu_si256(to.cast(), _mm256_permute2x128_si256::<0x20>(low, high));
                _mm256_storeu_si256(to.add(16).cast(), _mm256_permute2x128_si256::<0x31>(low, high));
            }
        }
    }
}

/// [`transpose`] with vectors of 16 words.
///
/// # Safety
/// The machine has AVX-512 F and AVX2.
#[target_feature(enable = "avx512f,avx2")]
unsafe fn transpose_wide(rows: &[Bf16], width: usize, ahead: Ahead, panel: &mut [Bf16]) {
    const WORDS: usize = 16;
    let count = rows.len() / width;
    let pairs = width / 2;
    if count != PANEL || !width.is_multiple_of(2) || !pairs.is_multiple_of(WORDS) {
        // SAFETY: the machine has AVX2.
        return unsafe { transpose(rows, width, ahead, panel) };
    }
    assert!(panel.len() >= PANEL * width, "a panel of {width} inputs in {} elements", panel.len());
    let (from, to) = (rows.as_ptr(), panel.as_mut_ptr());
    let mut ahead = ahead.over(PANEL / WORDS * (pairs / WORDS));
    for first in (0..PANEL).step_by(WORDS) {
        for pair in (0..pairs).step_by(WORDS) {
            ahead.fetch_next();
            // SAFETY: rows `first..first + 16` and pairs `pair..pair + 16` exist: both counts are multiples of 16.
            let row: [__m512i; WORDS] = std::array::from_fn(|i| unsafe {
                _mm512_loadu_si512(from.add((first + i) * width + 2 * pair).cast())
            });
            let column = transposed_wide(row);
            for (i, column) in column.into_iter().enumerate() {
                // SAFETY: pair `pair + i` is inside the panel, checked above; a pair's row has 32 outputs.
                unsafe { _mm512_storeu_si512(to.add(((pair + i) * PANEL + first) * 2).cast(), column) };
            }
        }
    }
}

/// [`transposed`] with vectors of 16 words.
#[inline]
#[target_feature(enable = "avx512f")]
fn transposed_wide(row: [__m512i; 16]) -> [__m512i; 16] {
    let two: [__m512i; 16] = std::array::from_fn(|i| match i % 2 {
        0 => _mm512_unpacklo_epi32(row[i], row[i + 1]),
        _ => _mm512_unpackhi_epi32(row[i - 1], row[i]),
    });
    // Of every four rows: in each quarter of the vector a word of the four; `i % 4` says which of its words.
    let four: [__m512i; 16] = std::array::from_fn(|i| {
        let base = i / 4 * 4;
        match i % 4 {
            0 => _mm512_unpacklo_epi64(two[base], two[base + 2]),
            1 => _mm512_unpackhi_epi64(two[base], two[base + 2]),
            2 => _mm512_unpacklo_epi64(two[base + 1], two[base + 3]),
            _ => _mm512_unpackhi_epi64(two[base + 1], two[base + 3]),
        }
    });
    std::array::from_fn(|i| {
        let (quarter, word) = (i / 4, i % 4);
        let (low, high) = ([four[word], four[word + 4]], [four[word + 8], four[word + 12]]);
        // Quarters 0 and 2, or 1 and 3, of rows 0 to 7 and of rows 8 to 15.
        let [a, b] = [low, high].map(|[a, b]| match quarter % 2 {
            0 => _mm512_shuffle_i32x4::<0b10_00_10_00>(a, b),
            _ => _mm512_shuffle_i32x4::<0b11_01_11_01>(a, b),
        });
        match quarter / 2 {
            0 => _mm512_shuffle_i32x4::<0b10_00_10_00>(a, b),
            _ => _mm512_shuffle_i32x4::<0b11_01_11_01>(a, b),
        }
    })
}

/// Elements of one vector and of another in turn: those of their first halves, and of their second.
const IN_TURN: [[i16; PANEL]; 2] = {
    let mut places = [[0; PANEL]; 2];
    let mut at = 0;
    while at < PANEL {
        let place = (at / 2 + at % 2 * PANEL) as i16;
        (places[0][at], places[1][at]) = (place, place + PANEL as i16 / 2);
        at += 1;
    }
    places
};

/// [`interleave`] with vectors of 32 elements.
///
/// # Safety
/// The machine has AVX-512 F and BW, and AVX2.
#[target_feature(enable = "avx512f,avx512bw,avx2")]
unsafe fn interleave_wide(rows: &[Bf16], width: usize, first: usize, ahead: Ahead, panel: &mut [Bf16]) {
    let count = rows.len() / width;
    if count != PANEL || first + PANEL > width {
        // SAFETY: the machine has AVX2.
        return unsafe { interleave(rows, width, first, ahead, panel) };
    }
    assert!(panel.len() >= PANEL * PANEL, "32 rows in a panel of {}", panel.len());
    let (from, to) = (rows.as_ptr(), panel.as_mut_ptr());
    // SAFETY: both have 32 elements.
    let [low, high] = [0, 1].map(|half| unsafe { _mm512_loadu_epi16(IN_TURN[half].as_ptr()) });
    let mut ahead = ahead.over(PANEL / 2);
    for row in (0..PANEL).step_by(2) {
        ahead.fetch_next();
        // SAFETY: 32 elements from `first` on are in each of the 32 rows; so are 64 in the panel for each two rows.
        unsafe {
            let at = from.add(row * width + first);
            let (one, two) = (_mm512_loadu_si512(at.cast()), _mm512_loadu_si512(at.add(width).cast()));
            let to = to.add(row * PANEL);
            _mm512_storeu_si512(to.cast(), _mm512_permutex2var_epi16(one, low, two));
            _mm512_storeu_si512(to.add(PANEL).cast(), _mm512_permutex2var_epi16(one, high, two));
        }
    }
}
