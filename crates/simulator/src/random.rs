//! Randomness as a function of names: draws of one entity never depend on another's.

/// The `draw`-th number of an entity's stream, from 0 up to 1, never 1.
///
/// Adding a worker or a request changes nobody else's draws.
pub fn uniform(seed: u64, entity: u64, draw: u64) -> f64 {
    (mix(mix(mix(seed ^ 0x9e37_79b9_7f4a_7c15) ^ entity) ^ draw) >> 11) as f64 / (1u64 << 53) as f64
}

/// A standard normal number of an entity's stream.
pub fn normal(seed: u64, entity: u64, draw: u64) -> f64 {
    let (u, v) = (uniform(seed, entity, 2 * draw), uniform(seed, entity, 2 * draw + 1));
    (-2.0 * (1.0 - u).ln()).sqrt() * (std::f64::consts::TAU * v).cos()
}

/// A lognormal factor of mean 1 with this coefficient of variation.
pub fn factor(cv: f64, seed: u64, entity: u64, draw: u64) -> f64 {
    if cv <= 0.0 {
        return 1.0;
    }
    let variance = (1.0 + cv * cv).ln();
    (normal(seed, entity, draw) * variance.sqrt() - variance / 2.0).exp()
}

/// Spreads the bits of a number (the finaliser of SplitMix64).
pub fn mix(mut x: u64) -> u64 {
    x = x.wrapping_add(0x9e37_79b9_7f4a_7c15);
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

/// The Mersenne Twister (MT19937), drawn as Python's `random.Random` draws, so that arrivals agree with those of
/// the reference simulator number by number.
pub struct Mersenne {
    state: [u32; 624],
    at: usize,
}

impl Mersenne {
    /// As `random.Random(seed)`.
    pub fn new(seed: u64) -> Mersenne {
        let key: Vec<u32> =
            if seed >> 32 == 0 { vec![seed as u32] } else { vec![seed as u32, (seed >> 32) as u32] };
        let mut s = [0u32; 624];
        s[0] = 19_650_218;
        for i in 1..624 {
            s[i] = 1_812_433_253u32.wrapping_mul(s[i - 1] ^ (s[i - 1] >> 30)).wrapping_add(i as u32);
        }
        let (mut i, mut j) = (1, 0);
        for _ in 0..624.max(key.len()) {
            s[i] = (s[i] ^ (s[i - 1] ^ (s[i - 1] >> 30)).wrapping_mul(1_664_525))
                .wrapping_add(key[j])
                .wrapping_add(j as u32);
            i += 1;
            j += 1;
            if i >= 624 {
                s[0] = s[623];
                i = 1;
            }
            j %= key.len();
        }
        for _ in 0..623 {
            s[i] = (s[i] ^ (s[i - 1] ^ (s[i - 1] >> 30)).wrapping_mul(1_566_083_941)).wrapping_sub(i as u32);
            i += 1;
            if i >= 624 {
                s[0] = s[623];
                i = 1;
            }
        }
        s[0] = 0x8000_0000;
        Mersenne { state: s, at: 624 }
    }

    fn next(&mut self) -> u32 {
        if self.at == 624 {
            for i in 0..624 {
                let y = (self.state[i] & 0x8000_0000) | (self.state[(i + 1) % 624] & 0x7fff_ffff);
                let odd = if y & 1 == 1 { 0x9908_b0df } else { 0 };
                self.state[i] = self.state[(i + 397) % 624] ^ (y >> 1) ^ odd;
            }
            self.at = 0;
        }
        let mut y = self.state[self.at];
        self.at += 1;
        y ^= y >> 11;
        y ^= (y << 7) & 0x9d2c_5680;
        y ^= (y << 15) & 0xefc6_0000;
        y ^ (y >> 18)
    }

    /// From 0 up to 1, never 1.
    pub fn uniform(&mut self) -> f64 {
        let (a, b) = (self.next() >> 5, self.next() >> 6);
        (f64::from(a) * 67_108_864.0 + f64::from(b)) / 9_007_199_254_740_992.0
    }

    /// Exponential with this rate.
    pub fn exponential(&mut self, rate: f64) -> f64 {
        -(1.0 - self.uniform()).ln() / rate
    }

    /// Normal, by the ratio of uniforms.
    pub fn normal(&mut self, mean: f64, sigma: f64) -> f64 {
        let magic = 4.0 * (-0.5f64).exp() / 2.0f64.sqrt();
        loop {
            let u = self.uniform();
            let v = 1.0 - self.uniform();
            let z = magic * (u - 0.5) / v;
            if z * z / 4.0 <= -v.ln() {
                return mean + z * sigma;
            }
        }
    }

    /// Gamma with this shape and mean 1 (Marsaglia and Tsang; shapes below 1 by a power of a uniform).
    pub fn gamma(&mut self, shape: f64) -> f64 {
        let boosted = if shape < 1.0 { shape + 1.0 } else { shape };
        let d = boosted - 1.0 / 3.0;
        let c = 1.0 / (9.0 * d).sqrt();
        let value = loop {
            let x = self.normal(0.0, 1.0);
            let v = (1.0 + c * x).powi(3);
            let u = 1.0 - self.uniform();
            if v > 0.0 && u.ln() < 0.5 * x * x + d - d * v + d * v.ln() {
                break d * v;
            }
        };
        let value = if shape < 1.0 { value * (1.0 - self.uniform()).powf(1.0 / shape) } else { value };
        value / shape
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_twister_draws_what_python_draws() {
        let mut one = Mersenne::new(1);
        assert_eq!([one.uniform(), one.uniform()], [0.13436424411240122, 0.8474337369372327]);
        assert_eq!(Mersenne::new(5).normal(2.0, 0.5), 2.408270036335598);
    }

    #[test]
    fn draws_have_the_moments_they_promise() {
        let n = 20_000;
        let mean = |f: &mut dyn FnMut(u64) -> f64| (0..n).map(f).sum::<f64>() / n as f64;
        assert!((mean(&mut |i| factor(0.1, 3, 4, i)) - 1.0).abs() < 0.01);
        assert!((mean(&mut |i| normal(3, 4, i).powi(2)) - 1.0).abs() < 0.03);
        let mut twister = Mersenne::new(9);
        assert!((mean(&mut |_| twister.gamma(0.25)) - 1.0).abs() < 0.06);
        let square = mean(&mut |_| twister.gamma(0.25).powi(2));
        assert!((square - 5.0).abs() < 0.8, "CV 2 has a second moment of 5, not {square}");
    }
}
