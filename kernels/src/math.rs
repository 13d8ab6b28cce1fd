//! Elementary functions and sums with one fixed arithmetic on every instruction set.

/// Lanes of a sum: element `i` goes to lane `i % LANES`, lanes are added pairwise.
pub(crate) const LANES: usize = 16;

/// e^x with a relative error below 2e-7; exactly 0 below -87.3, infinite above 88.7, NaN for NaN.
///
/// Cody and Waite's reduction to |r| ≤ ln 2 / 2, then the Taylor polynomial of degree 7. Only additions,
/// multiplications and bit operations, so that loops over it vectorise and bits are the same everywhere.
#[inline(always)]
pub fn exp(x: f32) -> f32 {
    const LOG2_E: f32 = std::f32::consts::LOG2_E;
    // ln 2 in two parts: the first has few enough bits for n * LN2_HIGH to be exact.
    const LN2_HIGH: f32 = 0.693_359_4;
    const LN2_LOW: f32 = -2.121_944_4e-4;
    const ROUND: f32 = 12_582_912.0; // 1.5 * 2^23: adding it leaves the nearest integer in the low bits
    let clamped = x.clamp(-87.3, 88.7);
    let shifted = clamped * LOG2_E + ROUND;
    let n = shifted - ROUND;
    let r = (clamped - n * LN2_HIGH) - n * LN2_LOW;
    let mut p = 1.0 / 5040.0;
    p = p * r + 1.0 / 720.0;
    p = p * r + 1.0 / 120.0;
    p = p * r + 1.0 / 24.0;
    p = p * r + 1.0 / 6.0;
    p = p * r + 0.5;
    p = p * r + 1.0;
    p = p * r + 1.0;
    // 2^n in two factors, because 2^128 is no float32.
    let whole = shifted.to_bits().wrapping_sub(ROUND.to_bits()) as i32;
    let half = whole >> 1;
    let first = f32::from_bits(((half + 127) as u32) << 23);
    let second = f32::from_bits(((whole - half + 127) as u32) << 23);
    let value = p * first * second;
    let value = if x < -87.3 { 0.0 } else { value };
    let value = if x > 88.7 { f32::INFINITY } else { value };
    if x.is_nan() { x } else { value }
}

/// x / (1 + e^-x).
#[inline(always)]
pub(crate) fn silu(x: f32) -> f32 {
    x / (1.0 + exp(-x))
}

/// Adds lanes pairwise: halves on halves.
#[inline(always)]
pub(crate) fn fold(mut lanes: [f32; LANES]) -> f32 {
    let mut width = LANES / 2;
    while width > 0 {
        for i in 0..width {
            lanes[i] += lanes[i + width];
        }
        width /= 2;
    }
    lanes[0]
}

/// The highest value; negative infinity if there is none. NaN counts for nothing.
#[inline(always)]
pub(crate) fn highest(values: &[f32]) -> f32 {
    let mut lanes = [f32::NEG_INFINITY; LANES];
    let chunks = values.chunks_exact(LANES);
    let rest = chunks.remainder();
    for chunk in chunks {
        for i in 0..LANES {
            lanes[i] = if chunk[i] > lanes[i] { chunk[i] } else { lanes[i] };
        }
    }
    lanes.iter().chain(rest).fold(f32::NEG_INFINITY, |a, b| if *b > a { *b } else { a })
}

/// Without a branch per element, so that it vectorises.
#[inline(always)]
pub(crate) fn all_finite(values: &[f32]) -> bool {
    values.iter().fold(true, |all, value| all & value.is_finite())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn exp_is_within_two_ten_millionths_of_the_truth(x in -87.3f32..88.7) {
            let truth = f64::from(x).exp();
            let error = (f64::from(exp(x)) - truth).abs() / truth;
            prop_assert!(error < 2e-7, "exp({x}) is off by {error:e}");
        }
    }

    #[test]
    fn exp_of_the_extremes_is_what_ieee_would_say() {
        assert_eq!(exp(0.0), 1.0);
        assert_eq!(exp(-200.0), 0.0);
        assert_eq!(exp(f32::NEG_INFINITY), 0.0);
        assert_eq!(exp(100.0), f32::INFINITY);
        assert!(exp(f32::NAN).is_nan());
        assert_eq!(silu(0.0), 0.0);
        assert!((silu(1.0) - 0.731_058_6).abs() < 1e-6);
        assert_eq!(silu(-300.0), -0.0);
    }

    #[test]
    fn fold_adds_every_lane_once() {
        let lanes: [f32; LANES] = std::array::from_fn(|i| (1 << i) as f32);
        assert_eq!(fold(lanes), 65535.0);
    }

    #[test]
    fn the_highest_is_found_wherever_it_stands() {
        for count in [1, LANES - 1, LANES, 2 * LANES + 3] {
            for at in 0..count {
                let mut values = vec![f32::NEG_INFINITY; count];
                values[at] = -2.0;
                values[(at + 1) % count] = if count > 1 { f32::NAN } else { -2.0 };
                assert_eq!(highest(&values), -2.0, "{at} of {count}");
                assert!(!all_finite(&values) || count == 1);
            }
        }
        assert_eq!(highest(&[]), f32::NEG_INFINITY);
        assert!(all_finite(&[0.0; 40]));
    }
}
