//! Step times: constants per model and device, two measured points, and a fit that follows what is measured.

use tandem_types::StepTime;

use crate::candidate::sane_step;

/// A model on a device whose step times are known before anything was measured.
#[derive(Debug)]
pub struct Profile {
    /// The model, as `--model` names it.
    pub model: &'static str,
    /// The device, as `--device` names it.
    pub device: &'static str,
    /// Its step times.
    pub step: StepTime,
    /// Bytes of KV per token, in bf16.
    pub kv_bytes: u64,
    /// Tokens that its KV pool holds.
    pub kv_tokens: u64,
}

const fn profile(
    model: &'static str,
    device: &'static str,
    a: [f64; 3],
    b: [f64; 3],
    kv_kib: u64,
    kv_tokens: u64,
) -> Profile {
    Profile { model, device, step: StepTime::from_table(a, b), kv_bytes: kv_kib * 1024, kv_tokens }
}

/// Fitted to NVIDIA's aiconfigurator 0.12.0 (vLLM tables, bf16); `x2` is two devices with tensor parallelism.
/// KV room is what nine tenths of the memory leave beside the weights.
pub static PROFILES: &[Profile] = &[
    profile("qwen3-8b", "h200", [3.84, 19.09, 0.913], [5.09, 11.7, 33.2], 144, 708_000),
    profile("qwen3-8b", "h100", [5.00, 19.02, 0.884], [6.59, 11.8, 46.9], 144, 379_000),
    profile("qwen3-8b", "a100", [8.77, 54.84, 3.284], [11.70, 30.3, 95.0], 144, 379_000),
    profile("qwen3-32b", "h200", [9.38, 85.07, 3.284], [19.08, 33.4, 59.7], 256, 232_000),
    profile("qwen3-32b", "h200x2", [7.53, 47.50, 1.639], [10.76, 24.5, 29.6], 256, 697_000),
    profile("qwen3-32b", "h100x2", [9.88, 47.54, 1.618], [13.60, 26.3, 42.2], 256, 312_000),
    profile("qwen3-32b", "h100x4", [8.17, 28.51, 0.786], [8.31, 19.8, 21.3], 256, 880_000),
    profile("qwen3-32b", "a100x4", [11.78, 73.82, 2.958], [14.50, 43.2, 46.2], 256, 880_000),
];

/// The profile of this model on this device, or a sentence that names the right ones.
pub fn profile_of(model: &str, device: &str) -> Result<&'static Profile, String> {
    PROFILES.iter().find(|p| p.model == model && p.device == device).ok_or_else(|| {
        let names: Vec<String> = PROFILES.iter().map(|p| format!("{}@{}", p.model, p.device)).collect();
        format!("no step times are known for {model}@{device}; they are for {}", names.join(", "))
    })
}

/// A step that was measured.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Measured {
    /// New tokens.
    pub tokens: f64,
    /// Attention pairs of prompt chunks.
    pub pairs: f64,
    /// Context tokens of decodes.
    pub context: f64,
    /// How long it took.
    pub seconds: f64,
}

impl Measured {
    fn is_sane(&self) -> bool {
        // No step is as large as any of these.
        let within = |x: f64, most: f64| (0.0..=most).contains(&x);
        let sizes = within(self.tokens, 1e9) && within(self.pairs, 1e18) && within(self.context, 1e15);
        sizes && within(self.seconds, 86_400.0) && self.seconds > 0.0 && self.tokens >= 1.0
    }
}

/// Step times from two measured steps: a prompt of many tokens, and a single decode. The rest keeps the
/// proportions of `like`.
pub fn from_two_points(like: StepTime, prompt: Measured, decode: Measured) -> Option<StepTime> {
    if !prompt.is_sane() || !decode.is_sane() {
        return None;
    }
    let compute = prompt.seconds / like.step(prompt.tokens, prompt.pairs, prompt.context);
    let memory = decode.seconds / like.step(decode.tokens, decode.pairs, decode.context);
    let (a, b) = (like.scaled(compute), like.scaled(memory));
    let step = StepTime { a0: a.a0, a1: a.a1, a2: a.a2, b0: b.b0, b1: b.b1, b2: b.b2 };
    step.is_sane().then_some(step)
}

/// How fast a device may come to differ from itself: what was learnt over so many steps is weighed against the rest.
const MEMORY_STEPS: f64 = 2_000.0;
/// How far off a number of a profile may be: a fifth of it, one standard deviation, squared.
const PRIOR: f64 = 0.04;
/// The noise of one step: a tenth of its time, squared.
const NOISE: f64 = 0.01;
/// Measurements beyond this factor of the prediction are stalls or lies, and teach nothing.
const OUTLIER: f64 = 8.0;
/// Beyond this one not even the first do, when a profile may still be that of another device.
const ABSURD: f64 = 1_000.0;

/// A predictor that learns. It starts from a profile and corrects it by a Kalman filter on relative errors, whose
/// state drifts (Kalman, 1960); a step bound by memory teaches nothing about the line that is bound by arithmetic.
#[derive(Clone, Debug)]
pub struct Predictor {
    prior: StepTime,
    fit: Fit,
    error: f64,
    measured: u64,
}

/// Numbers of a step time.
const TERMS: usize = 6;

/// A Kalman filter for the factors on `a0`, `a1`, `a2`, `b0`, `b1` and `b2`.
#[derive(Clone, Debug)]
struct Fit {
    factors: [f64; TERMS],
    covariance: [[f64; TERMS]; TERMS],
}

impl Fit {
    fn new() -> Fit {
        let mut covariance = [[0.0; TERMS]; TERMS];
        for (i, row) in covariance.iter_mut().enumerate() {
            row[i] = PRIOR;
        }
        Fit { factors: [1.0; TERMS], covariance }
    }

    /// `terms` are shares of the predicted time by the profile's numbers, `ratio` is the measured time over it.
    fn learn(&mut self, terms: [f64; TERMS], ratio: f64) {
        let mut gain = [0.0; TERMS];
        for (g, row) in gain.iter_mut().zip(&self.covariance) {
            *g = row.iter().zip(&terms).map(|(p, x)| p * x).sum();
        }
        let spread = NOISE + gain.iter().zip(&terms).map(|(g, x)| g * x).sum::<f64>().max(0.0);
        let expected: f64 = self.factors.iter().zip(&terms).map(|(f, x)| f * x).sum();
        // A stall is no reason to believe in a device that is several times slower.
        let surprise = (ratio - expected).clamp(-1.0, 1.0);
        for (factor, g) in self.factors.iter_mut().zip(&gain) {
            *factor = (*factor + g / spread * surprise).clamp(0.05, 20.0);
        }
        for i in 0..TERMS {
            for j in 0..TERMS {
                self.covariance[i][j] -= gain[i] * gain[j] / spread;
            }
            self.covariance[i][i] += NOISE / (MEMORY_STEPS * MEMORY_STEPS);
        }
        // What no step tells of does not become less certain than it was. Rows and columns shrink together, or it
        // would be no covariance any more and the filter would run away.
        for i in 0..TERMS {
            let shrink = (PRIOR / self.covariance[i][i]).sqrt();
            if shrink < 1.0 {
                for j in 0..TERMS {
                    self.covariance[i][j] *= shrink;
                    self.covariance[j][i] *= shrink;
                }
            }
        }
    }
}

impl Predictor {
    /// Begins with these step times, or with those of some device if they cannot be any.
    pub fn new(prior: StepTime) -> Predictor {
        let prior = sane_step(prior).unwrap_or(PROFILES[0].step);
        Predictor { prior, fit: Fit::new(), error: 0.0, measured: 0 }
    }

    /// What it predicts with now.
    pub fn step_time(&self) -> StepTime {
        let ([a0, a1, a2, b0, b1, b2], prior) = (self.fit.factors, &self.prior);
        StepTime {
            a0: prior.a0 * a0,
            a1: prior.a1 * a1,
            a2: prior.a2 * a2,
            b0: prior.b0 * b0,
            b1: prior.b1 * b1,
            b2: prior.b2 * b2,
        }
    }

    /// Takes a measured step in. False if it was nonsense or a stall and taught nothing.
    pub fn learn(&mut self, step: Measured) -> bool {
        if !step.is_sane() {
            return false;
        }
        let now = self.step_time();
        let predicted = now.step(step.tokens, step.pairs, step.context);
        let ratio = step.seconds / predicted;
        // A whole device may be that much slower than its profile; after some steps it is an outlier.
        let most = if self.measured > 20 { OUTLIER } else { ABSURD };
        if !(1.0 / most..=most).contains(&ratio) {
            return false;
        }
        self.measured += 1;
        let weight = (1.0 / self.measured as f64).max(1.0 / 200.0);
        self.error += ((ratio - 1.0).abs().min(1.0) - self.error) * weight;
        let p = &self.prior;
        let compute_bound = now.a0 + now.a1 * step.tokens >= now.b0 + now.b1 * step.tokens;
        let (pairs, context) = (p.a2 * step.pairs, p.b2 * step.context);
        let terms = if compute_bound {
            [p.a0, p.a1 * step.tokens, pairs, 0.0, 0.0, context]
        } else {
            [0.0, 0.0, pairs, p.b0, p.b1 * step.tokens, context]
        };
        self.fit.learn(terms.map(|term| term / predicted), ratio);
        true
    }

    /// Mean relative error of its predictions, of late.
    pub fn error(&self) -> f64 {
        self.error
    }

    /// Steps it has learnt from.
    pub fn measured(&self) -> u64 {
        self.measured
    }
}

#[cfg(test)]
mod tests {
    use tandem_types::attention_pairs;

    use super::*;

    fn h200() -> StepTime {
        profile_of("qwen3-8b", "h200").expect("is in the table").step
    }

    fn measure(truth: &StepTime, tokens: f64, pairs: f64, context: f64) -> Measured {
        Measured { tokens, pairs, context, seconds: truth.step(tokens, pairs, context) }
    }

    #[test]
    fn the_profile_meets_the_points_it_was_fitted_to() {
        let close = |seconds: f64, ms: f64, share: f64| {
            assert!((seconds * 1e3 / ms - 1.0).abs() < share, "{} ms, measured {ms}", seconds * 1e3);
        };
        for (tokens, ms) in [(512, 12.6), (2048, 42.3), (8192, 201.7), (32_768, 1177.0)] {
            close(h200().prefill_alone(tokens, 0), ms, 0.13);
        }
        for (batch, context, ms) in [(1.0, 2048.0, 5.12), (32.0, 2048.0, 7.64), (128.0, 2048.0, 15.1)] {
            close(h200().step(batch, 0.0, batch * context), ms, 0.04);
        }
    }

    #[test]
    fn two_points_scale_a_profile() {
        let truth = h200().scaled(3.0);
        let prompt = measure(&truth, 2048.0, attention_pairs(2048, 0), 0.0);
        let decode = measure(&truth, 1.0, 0.0, 512.0);
        let found = from_two_points(h200(), prompt, decode).expect("both are sane");
        let ratio = found.step(100.0, 0.0, 1e5) / truth.step(100.0, 0.0, 1e5);
        assert!((ratio - 1.0).abs() < 1e-9);
        assert_eq!(from_two_points(h200(), Measured { seconds: f64::NAN, ..prompt }, decode), None);
    }

    #[test]
    fn a_predictor_learns_a_device_that_is_not_like_its_profile() {
        let truth = StepTime { a1: h200().a1 * 1.4, b0: h200().b0 * 0.7, b2: h200().b2 * 1.5, ..h200() };
        let mut predictor = Predictor::new(h200());
        for i in 0..4000u32 {
            let (rows, chunk) = (f64::from(1 + i * 7 % 200), f64::from(i * 37 % 2048));
            let chunk = if i % 3 == 0 { chunk } else { 0.0 };
            let noise = 1.0 + 0.05 * f64::from(i * 31 % 11 % 3) - 0.05;
            let mut step = measure(&truth, rows + chunk, chunk * chunk / 2.0, rows * 1200.0);
            step.seconds *= noise;
            assert!(predictor.learn(step));
        }
        let learnt = predictor.step_time();
        for (rows, chunk) in [(10.0, 0.0), (150.0, 0.0), (50.0, 1000.0), (5.0, 2000.0)] {
            let of = |s: &StepTime| s.step(rows + chunk, chunk * chunk / 2.0, rows * 1200.0);
            let ratio = of(&learnt) / of(&truth);
            assert!((ratio - 1.0).abs() < 0.05, "{rows} rows and {chunk} prompt tokens: {ratio}");
        }
        assert!(predictor.error() < 0.08, "{}", predictor.error());
    }

    /// Predicted over true, of steps like those that a worker sees and of others.
    fn errors(learnt: &StepTime, truth: &StepTime) -> Vec<f64> {
        let shapes = [(1000.0, 5e5, 0.0), (400.0, 2e5, 5e4), (8.0, 0.0, 8e3), (64.0, 0.0, 8e4)];
        let ratio = |(tokens, pairs, context)| {
            learnt.step(tokens, pairs, context) / truth.step(tokens, pairs, context)
        };
        shapes.into_iter().map(ratio).collect()
    }

    #[test]
    fn a_predictor_does_not_run_away_from_steps_that_are_all_alike() {
        let truth = h200();
        let mut predictor = Predictor::new(truth.scaled(1.2));
        let mut noise = 1u64;
        for i in 0..200_000u32 {
            // Decodes for long, now and then a piece of a prompt, as on a decode worker.
            let chunk = if i % 50 == 0 { f64::from(i % 1000) } else { 0.0 };
            let rows = 30.0 + f64::from(i / 1000 % 7);
            let mut step = measure(&truth, rows + chunk, chunk * 1000.0, rows * 1500.0);
            noise = noise.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            step.seconds *= 0.83 + 0.34 * (noise >> 40) as f64 / f64::from(1 << 24);
            predictor.learn(step);
            if i % 1000 == 999 && i > 5000 {
                let errors = errors(&predictor.step_time(), &truth);
                assert!(errors.iter().all(|ratio| (ratio - 1.0).abs() < 0.15), "after {i} steps: {errors:?}");
                // What such a worker does all the time.
                assert!((errors[2] - 1.0).abs() < 0.05, "after {i} steps: {errors:?}");
            }
        }
    }

    #[test]
    fn nonsense_teaches_nothing() {
        let mut predictor = Predictor::new(h200());
        for _ in 0..100 {
            predictor.learn(measure(&h200(), 10.0, 0.0, 1e4));
        }
        let before = predictor.step_time();
        for seconds in [f64::NAN, f64::INFINITY, -1.0, 0.0, 1e9] {
            assert!(!predictor.learn(Measured { seconds, ..measure(&h200(), 10.0, 0.0, 1e4) }), "{seconds}");
        }
        assert_eq!(predictor.step_time(), before);
    }
}
