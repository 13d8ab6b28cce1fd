//! Products of quantised weights in vector instructions.

use std::arch::x86_64::*;

use super::super::form::{Ahead, PANEL};
use super::{NIBBLES, UNPACKED};

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

/// Adds the products of rows of numbers with a panel of 4-bit integers. A weight becomes `value * scale + offset`,
/// rounded once, whether in registers (few rows) or in the first level of cache (many).
///
/// # Safety
/// The machine has AVX2 and FMA.
#[target_feature(enable = "avx2,fma")]
pub(in super::super) unsafe fn int4(
    x: &[f32],
    inputs: usize,
    group: usize,
    weights: &[u32],
    scales: &[f32],
    sums: &mut [[f32; PANEL]],
) {
    assert!(x.len() >= inputs * sums.len(), "{} rows of {inputs} in {}", sums.len(), x.len());
    assert!(weights.len() >= inputs.div_ceil(NIBBLES) * PANEL, "{inputs} inputs in {} words", weights.len());
    assert!(scales.len() >= inputs.div_ceil(group) * 2 * PANEL, "groups of {group} in {}", scales.len());
    assert!(group.is_multiple_of(NIBBLES) && group > 0, "a word is of one group");
    // SAFETY: (of all calls) AVX2 and FMA as above; bounds were just checked, and pieces stay inside them.
    unsafe {
        if let 1..=2 = sums.len() {
            let ahead = Ahead::soon(weights);
            return match sums.len() {
                1 => in_registers::<1>(x, inputs, group, weights, scales, ahead, sums),
                _ => in_registers::<2>(x, inputs, group, weights, scales, ahead, sums),
            };
        }
        let mut numbers = Lines([[0.0; PANEL]; UNPACKED]);
        let numbers = &mut numbers.0;
        let rows = sums.len();
        for from in (0..inputs).step_by(UNPACKED) {
            let count = UNPACKED.min(inputs - from);
            let mut ahead =
                Ahead::following(weights, from..from + count, inputs).over(count.div_ceil(NIBBLES));
            for word in 0..count.div_ceil(NIBBLES) {
                ahead.fetch_next();
                let at = from / NIBBLES + word;
                let group = at * NIBBLES / group;
                unpack(
                    &weights[at * PANEL..][..PANEL],
                    &scales[group * 2 * PANEL..][..2 * PANEL],
                    &mut numbers[word * NIBBLES..][..NIBBLES],
                );
            }
            let mut row = 0;
            while row < rows {
                let height = (rows - row).div_ceil((rows - row).div_ceil(5));
                let x = &x[row * inputs + from..];
                let sums = &mut sums[row..row + height];
                match height {
                    1 => tile::<1>(x, inputs, &numbers[..count], sums),
                    2 => tile::<2>(x, inputs, &numbers[..count], sums),
                    3 => tile::<3>(x, inputs, &numbers[..count], sums),
                    4 => tile::<4>(x, inputs, &numbers[..count], sums),
                    _ => tile::<5>(x, inputs, &numbers[..count], sums),
                }
                row += height;
            }
        }
    }
}

/// Begins with a cache line, so that no vector is in two.
#[repr(align(64))]
struct Lines([[f32; PANEL]; UNPACKED]);

/// `R` rows with a panel whose weights become numbers in registers.
///
/// # Safety
/// The machine has AVX2 and FMA; there are `R` rows of `inputs`, as many in the panel, and scales of all groups.
#[target_feature(enable = "avx2,fma")]
unsafe fn in_registers<const R: usize>(
    x: &[f32],
    inputs: usize,
    group: usize,
    weights: &[u32],
    scales: &[f32],
    ahead: Ahead,
    sums: &mut [[f32; PANEL]],
) {
    let low = _mm256_set1_epi32(15);
    let mut now: [[__m256; 4]; R] = std::array::from_fn(|r| {
        // SAFETY: rows of `sums` have 32 elements.
        std::array::from_fn(|v| unsafe { _mm256_loadu_ps(sums[r].as_ptr().add(8 * v)) })
    });
    let mut ahead = ahead.over(inputs.div_ceil(NIBBLES));
    for word in 0..inputs.div_ceil(NIBBLES) {
        ahead.fetch_next();
        let first = word * NIBBLES;
        let count = NIBBLES.min(inputs - first);
        for v in 0..4 {
            // SAFETY: the panel has 32 words here, and a group 32 scales and as many offsets.
            let (mut wide, scale, offset) = unsafe {
                let scales = scales.as_ptr().add(first / group * 2 * PANEL + 8 * v);
                (
                    _mm256_loadu_si256(weights.as_ptr().add(word * PANEL + 8 * v).cast()),
                    _mm256_loadu_ps(scales),
                    _mm256_loadu_ps(scales.add(PANEL)),
                )
            };
            let mut next = |input: usize| {
                let value = _mm256_cvtepi32_ps(_mm256_and_si256(wide, low));
                let number = _mm256_fmadd_ps(value, scale, offset);
                wide = _mm256_srli_epi32::<4>(wide);
                for r in 0..R {
                    // SAFETY: the input is inside row `r`.
                    let x = _mm256_set1_ps(unsafe { *x.as_ptr().add(r * inputs + first + input) });
                    now[r][v] = _mm256_fmadd_ps(x, number, now[r][v]);
                }
            };
            match count {
                // With its length known the loop is unrolled.
                NIBBLES => (0..NIBBLES).for_each(&mut next),
                _ => (0..count).for_each(&mut next),
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

/// Eight inputs of a panel as numbers.
///
/// # Safety
/// The machine has AVX2 and FMA.
#[target_feature(enable = "avx2,fma")]
unsafe fn unpack(weights: &[u32], scales: &[f32], numbers: &mut [[f32; PANEL]]) {
    assert!(weights.len() == PANEL && scales.len() == 2 * PANEL && numbers.len() == NIBBLES);
    let low = _mm256_set1_epi32(15);
    for v in 0..4 {
        // SAFETY: of 32 words, scales and offsets each these are eight.
        let (mut wide, scale, offset) = unsafe {
            (
                _mm256_loadu_si256(weights.as_ptr().add(8 * v).cast()),
                _mm256_loadu_ps(scales.as_ptr().add(8 * v)),
                _mm256_loadu_ps(scales.as_ptr().add(PANEL + 8 * v)),
            )
        };
        for numbers in numbers.iter_mut() {
            let value = _mm256_cvtepi32_ps(_mm256_and_si256(wide, low));
            let number = _mm256_fmadd_ps(value, scale, offset);
            wide = _mm256_srli_epi32::<4>(wide);
            // SAFETY: an input has 32 outputs.
            unsafe { _mm256_storeu_ps(numbers.as_mut_ptr().add(8 * v), number) };
        }
    }
}

/// `R` rows, `stride` apart, with numbers, one half of the outputs after the other.
///
/// # Safety
/// The machine has AVX2 and FMA; each row has as many elements as there are numbers; `sums` has `R` rows.
#[target_feature(enable = "avx2,fma")]
unsafe fn tile<const R: usize>(
    x: &[f32],
    stride: usize,
    numbers: &[[f32; PANEL]],
    sums: &mut [[f32; PANEL]],
) {
    let x = x.as_ptr();
    for half in 0..2 {
        let mut now: [[__m256; 2]; R] = std::array::from_fn(|r| {
            // SAFETY: rows of `sums` have 32 elements, of which these are one half.
            std::array::from_fn(|v| unsafe { _mm256_loadu_ps(sums[r].as_ptr().add(16 * half + 8 * v)) })
        });
        for (input, numbers) in numbers.iter().enumerate() {
            // SAFETY: an input has 32 outputs, of which these are one half.
            let wide: [__m256; 2] =
                std::array::from_fn(|v| unsafe { _mm256_loadu_ps(numbers.as_ptr().add(16 * half + 8 * v)) });
            for r in 0..R {
                // SAFETY: the input is inside row `r`.
                let x = _mm256_set1_ps(unsafe { *x.add(r * stride + input) });
                for v in 0..2 {
                    now[r][v] = _mm256_fmadd_ps(x, wide[v], now[r][v]);
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
}
