//! Rotary position embedding: from the numbers of a config to one inverse frequency per pair of elements.
//! Matches `transformers` 5.23; all arithmetic in float64, where it uses float32.

use std::f64::consts::PI;

/// How queries and keys are rotated by position.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct RopeSpec {
    /// The base: pair `i` of `n` turns by `theta^(-i / n)` radians per position before scaling.
    pub theta: f64,
    /// How the frequencies are scaled for longer contexts.
    pub kind: RopeKind,
    /// The share of a head's elements that is rotated, from its first on; 1 is all.
    pub share: f64,
    /// Which elements of a head turn together.
    pub pairing: Pairing,
}

/// Which of a head's `n` rotated elements turn together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pairing {
    /// Element `i` with element `i + n / 2`.
    Halves,
    /// Element `2 i` with element `2 i + 1`.
    Neighbours,
}

impl Pairing {
    /// Where element `at` of a head comes from when its `rotated` first elements are put in the order of
    /// [`Pairing::Halves`]. Queries and keys in another order give the same scores.
    pub fn source(self, at: usize, rotated: usize) -> usize {
        match self {
            Pairing::Neighbours if at < rotated / 2 => 2 * at,
            Pairing::Neighbours if at < rotated => 2 * (at - rotated / 2) + 1,
            Pairing::Halves | Pairing::Neighbours => at,
        }
    }
}

/// Ways of scaling the frequencies.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum RopeKind {
    /// Not at all (Su et al. 2021).
    Default,
    /// All divided by one factor.
    Linear {
        /// The divisor.
        factor: f64,
    },
    /// Slow ones divided, fast ones kept, those between blended (Llama 3.1).
    Llama3 {
        /// The divisor.
        factor: f64,
        /// Wavelengths above `original_context / low_freq_factor` are slow.
        low_freq_factor: f64,
        /// Wavelengths below `original_context / high_freq_factor` are fast; greater than `low_freq_factor`.
        high_freq_factor: f64,
        /// Tokens of context before scaling.
        original_context: f64,
    },
    /// Blended along the pairs between two numbers of rotations (YaRN, Peng et al. 2023).
    Yarn {
        /// The divisor.
        factor: f64,
        /// Tokens of context before scaling.
        original_context: f64,
        /// Pairs that turn more often than this in the original context are kept.
        beta_fast: f64,
        /// Pairs that turn less often than this are divided.
        beta_slow: f64,
        /// Whether the borders between them are rounded outwards to whole pairs.
        truncate: bool,
        /// Multiplies cosines and sines.
        attention_factor: f64,
    },
}

impl RopeSpec {
    /// Elements of a head that are rotated.
    pub fn rotated(&self, head_dim: usize) -> usize {
        (head_dim as f64 * self.share) as usize
    }

    /// Radians per position of each pair of a head, fastest first: half as many as [`RopeSpec::rotated`].
    pub fn inverse_frequencies(&self, head_dim: usize) -> Vec<f64> {
        let head_dim = self.rotated(head_dim);
        let plain = (0..head_dim / 2).map(|pair| self.theta.powf(-((2 * pair) as f64) / head_dim as f64));
        match self.kind {
            RopeKind::Default => plain.collect(),
            RopeKind::Linear { factor } => plain.map(|frequency| frequency / factor).collect(),
            RopeKind::Llama3 { factor, low_freq_factor, high_freq_factor, original_context } => plain
                .map(|frequency| {
                    let turns = original_context * frequency / (2.0 * PI);
                    let kept =
                        ((turns - low_freq_factor) / (high_freq_factor - low_freq_factor)).clamp(0.0, 1.0);
                    blend(frequency / factor, frequency, kept)
                })
                .collect(),
            RopeKind::Yarn { factor, original_context, beta_fast, beta_slow, truncate, .. } => {
                // The pair, as a fraction, that turns `rotations` times in the original context.
                let pair_of = |rotations: f64| {
                    head_dim as f64 * (original_context / (rotations * 2.0 * PI)).ln()
                        / (2.0 * self.theta.ln())
                };
                let (low, high) = (pair_of(beta_fast), pair_of(beta_slow));
                let (low, high) = if truncate { (low.floor(), high.ceil()) } else { (low, high) };
                let (low, mut high) = (low.max(0.0), high.min(head_dim as f64 - 1.0));
                if low == high {
                    high += 0.001;
                }
                plain
                    .enumerate()
                    .map(|(pair, frequency)| {
                        let divided = ((pair as f64 - low) / (high - low)).clamp(0.0, 1.0);
                        blend(frequency / factor, frequency, 1.0 - divided)
                    })
                    .collect()
            }
        }
    }

    /// What cosines and sines are multiplied by; 1 except for YaRN.
    pub fn attention_factor(&self) -> f64 {
        match self.kind {
            RopeKind::Yarn { attention_factor, .. } => attention_factor,
            RopeKind::Default | RopeKind::Linear { .. } | RopeKind::Llama3 { .. } => 1.0,
        }
    }
}

/// `b` in the share `share`, `a` in the rest.
fn blend(a: f64, b: f64, share: f64) -> f64 {
    (1.0 - share) * a + share * b
}

/// The attention factor of a YaRN config that does not give it outright.
pub(crate) fn yarn_attention_factor(factor: f64, mscale: Option<f64>, mscale_all_dim: Option<f64>) -> f64 {
    let scale = |mscale: f64| if factor <= 1.0 { 1.0 } else { 0.1 * mscale * factor.ln() + 1.0 };
    match (mscale, mscale_all_dim) {
        // Zero counts as not given.
        (Some(mscale), Some(all)) if mscale != 0.0 && all != 0.0 => scale(mscale) / scale(all),
        _ => scale(1.0),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::{Pairing, RopeKind, RopeSpec};

    #[test]
    fn neighbours_are_put_into_halves_and_what_is_not_rotated_stays() {
        let order = |pairing: Pairing| (0..8).map(|at| pairing.source(at, 6)).collect::<Vec<_>>();
        assert_eq!(order(Pairing::Neighbours), [0, 2, 4, 1, 3, 5, 6, 7]);
        assert_eq!(order(Pairing::Halves), [0, 1, 2, 3, 4, 5, 6, 7]);
    }

    #[test]
    fn a_part_of_a_head_turns_as_a_smaller_head_would() {
        let whole = RopeSpec { theta: 1e4, kind: RopeKind::Default, share: 1.0, pairing: Pairing::Halves };
        let half = RopeSpec { share: 0.5, ..whole };
        assert_eq!(half.inverse_frequencies(32), whole.inverse_frequencies(16));
    }

    use crate::testing::config;

    /// What `transformers` 5.23.0 computes, in float32, for a Llama config with these `rope_parameters`.
    struct Golden {
        rope: &'static str,
        head_dim: usize,
        context_tokens: u32,
        attention_factor: f64,
        frequencies: &'static [f64],
    }

    const GOLDEN: &[Golden] = &[
        Golden {
            rope: r#"{"rope_type": "default", "rope_theta": 10000.0}"#,
            head_dim: 16,
            context_tokens: 2048,
            attention_factor: 1.0,
            frequencies: &[
                1.0,
                0.316227764,
                0.100000001,
                0.0316227786,
                0.00999999978,
                0.00316227786,
                0.00100000005,
                0.000316227786,
            ],
        },
        Golden {
            rope: r#"{"rope_type": "linear", "rope_theta": 500000.0, "factor": 4.0}"#,
            head_dim: 24,
            context_tokens: 2048,
            attention_factor: 1.0,
            frequencies: &[
                0.25,
                0.0837579072,
                0.0280615482,
                0.00940150768,
                0.0031498021,
                0.0010552837,
                0.000353553361,
                0.0001184516,
                3.96850155e-05,
                1.32957393e-05,
                4.45449496e-06,
                1.49239588e-06,
            ],
        },
        Golden {
            rope: r#"{"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}"#,
            head_dim: 64,
            context_tokens: 131072,
            attention_factor: 1.0,
            frequencies: &[
                1.0,
                0.663601279,
                0.440366626,
                0.292227834,
                0.193922758,
                0.128687382,
                0.0853971019,
                0.0566696189,
                0.0376060307,
                0.0249554086,
                0.0165604409,
                0.0109895291,
                0.00729266508,
                0.00483942125,
                0.00321144611,
                0.00137189368,
                0.000524846022,
                0.000178507791,
                7.78465546e-05,
                5.16590699e-05,
                3.42810235e-05,
                2.2748929e-05,
                1.50962178e-05,
                1.00178686e-05,
                6.64786967e-06,
                4.41153452e-06,
                2.92749974e-06,
                1.94269251e-06,
                1.28917316e-06,
                8.55496921e-07,
                5.6770881e-07,
                3.7673226e-07,
            ],
        },
        Golden {
            rope: r#"{"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}"#,
            head_dim: 16,
            context_tokens: 2048,
            attention_factor: 1.0,
            frequencies: &[
                1.0,
                0.244384587,
                0.0130422562,
                0.00395284733,
                0.00124999997,
                0.000395284733,
                0.000125000006,
                3.95284733e-05,
            ],
        },
        Golden {
            rope: r#"{"rope_type": "yarn", "rope_theta": 1000000.0, "factor": 4.0, "original_max_position_embeddings": 32768}"#,
            head_dim: 32,
            context_tokens: 131072,
            attention_factor: 1.13862944,
            frequencies: &[
                1.0,
                0.421696514,
                0.177827939,
                0.0749894157,
                0.0316227786,
                0.0133352149,
                0.00477990136,
                0.00165996165,
                0.000549999997,
                0.000168678584,
                4.44569851e-05,
                1.87473561e-05,
                7.90569356e-06,
                3.33380353e-06,
                1.40585337e-06,
                5.92843435e-07,
            ],
        },
        Golden {
            rope: r#"{"rope_type": "yarn", "rope_theta": 10000.0, "factor": 2.0, "original_max_position_embeddings": 64}"#,
            head_dim: 16,
            context_tokens: 2048,
            attention_factor: 1.06931472,
            frequencies: &[
                1.0,
                0.263523132,
                0.0666666627,
                0.0158113893,
                0.00499999989,
                0.00158113893,
                0.000500000024,
                0.000158113893,
            ],
        },
        Golden {
            rope: r#"{"rope_type": "yarn", "rope_theta": 150000.0, "factor": 32.0, "beta_fast": 16.0, "beta_slow": 2.0, "truncate": false, "original_max_position_embeddings": 4096}"#,
            head_dim: 24,
            context_tokens: 2048,
            attention_factor: 1.34657359,
            frequencies: &[
                1.0,
                0.370389819,
                0.137188628,
                0.0508132726,
                0.0164928399,
                0.00288328459,
                8.0687154e-05,
                2.98857085e-05,
                1.10693582e-05,
                4.09997847e-06,
                1.51859081e-06,
                5.62470291e-07,
            ],
        },
        Golden {
            rope: r#"{"rope_type": "yarn", "rope_theta": 10000.0, "factor": 40.0, "mscale": 1.0, "mscale_all_dim": 0.5, "original_max_position_embeddings": 4096}"#,
            head_dim: 16,
            context_tokens: 163840,
            attention_factor: 1.15572199,
            frequencies: &[
                1.0,
                0.316227764,
                0.100000001,
                0.0239147246,
                0.00512499968,
                0.000849862176,
                2.49999994e-05,
                7.90569447e-06,
            ],
        },
        Golden {
            rope: r#"{"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "attention_factor": 0.75, "original_max_position_embeddings": 2048}"#,
            head_dim: 16,
            context_tokens: 8192,
            attention_factor: 0.75,
            frequencies: &[
                1.0,
                0.316227764,
                0.100000001,
                0.025693506,
                0.00624999963,
                0.00138349656,
                0.000250000012,
                7.90569466e-05,
            ],
        },
        Golden {
            rope: r#"{"rope_type": "yarn", "rope_theta": 10000.0, "factor": null, "original_max_position_embeddings": 1024}"#,
            head_dim: 16,
            context_tokens: 8192,
            attention_factor: 1.20794415,
            frequencies: &[
                1.0,
                0.316227764,
                0.078125,
                0.0177878123,
                0.00343749998,
                0.000395284733,
                0.000125000006,
                3.95284733e-05,
            ],
        },
        Golden {
            rope: r#"{"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 6}"#,
            head_dim: 16,
            context_tokens: 65,
            attention_factor: 1.13862944,
            frequencies: &[
                1.0,
                0.079056941,
                0.0250000004,
                0.00790569466,
                0.00249999994,
                0.000790569466,
                0.000250000012,
                7.90569466e-05,
            ],
        },
    ];

    #[test]
    fn frequencies_are_those_of_the_reference_implementation() {
        for golden in GOLDEN {
            let parameters: Value = serde_json::from_str(golden.rope).unwrap();
            let facts = json!({"rope_parameters": parameters});
            let rope = config(&facts).rope(golden.context_tokens).unwrap();
            let frequencies = rope.inverse_frequencies(golden.head_dim);
            assert_eq!(frequencies.len(), golden.frequencies.len(), "{}", golden.rope);
            for (ours, theirs) in frequencies.iter().zip(golden.frequencies) {
                // They round to float32 several times on the way.
                assert!((ours / theirs - 1.0).abs() < 2e-6, "{ours} is not {theirs} in {}", golden.rope);
            }
            let factor = rope.attention_factor();
            assert!((factor / golden.attention_factor - 1.0).abs() < 1e-7, "{factor} in {}", golden.rope);
        }
    }
}
