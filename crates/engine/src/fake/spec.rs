//! What a fake engine is told: `--fake=zero`, `paced:TTFT,ITL`, `qwen3-8b@h200`, with options after commas.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tandem_batching::Row;

/// How long a step takes.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Curve {
    /// No time at all.
    Zero,
    /// A fixed time for a step that ends a prompt, and one for every other.
    Paced {
        /// Of a step with a first token.
        first: Duration,
        /// Of every other.
        next: Duration,
    },
    /// Qwen3-8B on one H200, by the step-time model `max(b0 + b1·T, a0 + a1·T) + a2·A + b2·C` of T new tokens,
    /// A attention pairs and C context tokens of decodes.
    Qwen3_8bH200,
}

/// A fake engine's spec.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct FakeSpec {
    /// The latency curve.
    pub curve: Curve,
    /// Multiplies every time.
    pub slow: f64,
    /// Share of steps that fail.
    pub fail: f64,
    /// Share of Starts that the worker refuses.
    pub refuse: f64,
    /// Share of steps that never end.
    pub hang: f64,
    /// Pads pages to so many bytes.
    pub page_bytes: Option<u64>,
    /// Seed of the three shares.
    pub seed: u64,
}

/// Smallest padded page: the words of a block.
const PAGE_BYTES_MIN: u64 = 256;

impl Default for FakeSpec {
    fn default() -> Self {
        FakeSpec {
            curve: Curve::Zero,
            slow: 1.0,
            fail: 0.0,
            refuse: 0.0,
            hang: 0.0,
            page_bytes: None,
            seed: 0,
        }
    }
}

impl FakeSpec {
    pub(super) fn step_time(&self, rows: &[Row], ends_a_prompt: bool) -> Duration {
        let time = match self.curve {
            Curve::Zero => Duration::ZERO,
            Curve::Paced { first, .. } if ends_a_prompt => first,
            Curve::Paced { next, .. } => next,
            Curve::Qwen3_8bH200 => {
                let tokens: f64 = rows.iter().map(|row| f64::from(row.count)).sum();
                let (mut pairs, mut context) = (0.0, 0.0);
                for row in rows {
                    let (n, before) = (f64::from(row.count), f64::from(row.start));
                    if row.count == 1 {
                        context += before;
                    } else {
                        pairs += n * n / 2.0 + n * before;
                    }
                }
                let seconds = (5.09e-3 + 11.7e-6 * tokens).max(3.84e-3 + 19.09e-6 * tokens)
                    + 0.913e-9 * pairs
                    + 33.2e-9 * context;
                Duration::from_secs_f64(seconds)
            }
        };
        Duration::try_from_secs_f64(time.as_secs_f64() * self.slow).unwrap_or(Duration::MAX)
    }
}

impl FromStr for FakeSpec {
    type Err = String;

    fn from_str(text: &str) -> Result<FakeSpec, String> {
        let mut parts = text.split(',').peekable();
        let mut spec = FakeSpec::default();
        // Options alone stand for `zero` with these options.
        let mode = match parts.peek() {
            Some(part) if part.contains('=') => "zero",
            _ => parts.next().unwrap_or("zero"),
        };
        spec.curve = match mode {
            "zero" => Curve::Zero,
            "qwen3-8b@h200" => Curve::Qwen3_8bH200,
            paced => {
                let first = paced.strip_prefix("paced:").ok_or_else(|| unknown_mode(mode))?;
                let next = parts.next().ok_or("paced needs two times: paced:TTFT,ITL")?;
                Curve::Paced { first: duration(first)?, next: duration(next)? }
            }
        };
        for option in parts {
            spec.set(option)?;
        }
        Ok(spec)
    }
}

fn unknown_mode(mode: &str) -> String {
    format!("{mode:?} is no fake engine; there are zero, paced:TTFT,ITL and qwen3-8b@h200")
}

impl FakeSpec {
    fn set(&mut self, option: &str) -> Result<(), String> {
        let known = "slow=FACTOR, fail=P, refuse=P, hang=P, page-bytes=N and seed=N";
        let (name, value) =
            option.split_once('=').ok_or_else(|| format!("{option:?} is no option; there are {known}"))?;
        let share = || match value.parse::<f64>() {
            Ok(share) if (0.0..=1.0).contains(&share) => Ok(share),
            _ => Err(format!("{name}={value} must be a probability from 0 to 1")),
        };
        let number = || value.parse::<u64>().map_err(|_| format!("{name}={value} must be a whole number"));
        match name {
            "slow" => {
                let factor = value.parse::<f64>().ok().filter(|f| f.is_finite() && *f >= 0.0);
                self.slow = factor.ok_or_else(|| format!("slow={value} must be a factor of at least 0"))?;
            }
            "fail" => self.fail = share()?,
            "refuse" => self.refuse = share()?,
            "hang" => self.hang = share()?,
            "page-bytes" => {
                let bytes = number()?;
                if bytes < PAGE_BYTES_MIN || bytes % 8 != 0 {
                    return Err(format!(
                        "page-bytes={bytes} must be a multiple of 8, at least {PAGE_BYTES_MIN}"
                    ));
                }
                self.page_bytes = Some(bytes);
            }
            "seed" => self.seed = number()?,
            _ => return Err(format!("{name:?} is no option; there are {known}")),
        }
        Ok(())
    }
}

/// `50ms`, `1.5s`, `200us`.
fn duration(text: &str) -> Result<Duration, String> {
    let wrong = || format!("{text:?} is not a time such as 50ms or 1s");
    let at = text.find(|c: char| c.is_ascii_alphabetic()).ok_or_else(wrong)?;
    let (number, unit) = text.split_at(at);
    let unit = match unit {
        "s" => 1.0,
        "ms" => 1e-3,
        "us" => 1e-6,
        "ns" => 1e-9,
        _ => return Err(wrong()),
    };
    let number: f64 = number.parse().map_err(|_| wrong())?;
    if !(0.0..=1e6).contains(&(number * unit)) {
        return Err(wrong());
    }
    Ok(Duration::from_secs_f64(number * unit))
}

/// As `duration` reads it, in the largest unit that divides it.
fn written(time: Duration) -> String {
    let nanos = time.as_nanos();
    let units = [("s", 1_000_000_000), ("ms", 1_000_000), ("us", 1000), ("ns", 1)];
    let (unit, size) =
        units.into_iter().find(|(_, size)| nanos.is_multiple_of(*size)).expect("1 divides all");
    format!("{}{unit}", nanos / size)
}

impl fmt::Display for FakeSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.curve {
            Curve::Zero => f.write_str("zero")?,
            Curve::Paced { first, next } => write!(f, "paced:{},{}", written(first), written(next))?,
            Curve::Qwen3_8bH200 => f.write_str("qwen3-8b@h200")?,
        }
        let plain = FakeSpec::default();
        for (name, value, usual) in [
            ("slow", self.slow, plain.slow),
            ("fail", self.fail, plain.fail),
            ("refuse", self.refuse, plain.refuse),
            ("hang", self.hang, plain.hang),
        ] {
            if value != usual {
                write!(f, ",{name}={value}")?;
            }
        }
        if let Some(bytes) = self.page_bytes {
            write!(f, ",page-bytes={bytes}")?;
        }
        if self.seed != plain.seed {
            write!(f, ",seed={}", self.seed)?;
        }
        Ok(())
    }
}

impl TryFrom<String> for FakeSpec {
    type Error = String;

    fn try_from(text: String) -> Result<FakeSpec, String> {
        text.parse()
    }
}

impl From<FakeSpec> for String {
    fn from(spec: FakeSpec) -> String {
        spec.to_string()
    }
}
