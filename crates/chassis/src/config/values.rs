//! Values as people write them: sizes with their unit and durations with theirs.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use serde::de::{self, Deserializer};
use serde::{Deserialize, Serialize, Serializer};

/// Why a size or a duration is none.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct ParseError(String);

/// Bytes, written `512MiB`, `1.5GiB`, `2GB` (powers of ten) or as a plain number of bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ByteSize(pub u64);

const KIB: u64 = 1 << 10;
const SIZES: [(&str, u64); 9] = [
    ("TiB", KIB * KIB * KIB * KIB),
    ("GiB", KIB * KIB * KIB),
    ("MiB", KIB * KIB),
    ("KiB", KIB),
    ("TB", 1_000_000_000_000),
    ("GB", 1_000_000_000),
    ("MB", 1_000_000),
    ("KB", 1_000),
    ("B", 1),
];

impl FromStr for ByteSize {
    type Err = ParseError;

    fn from_str(text: &str) -> Result<Self, ParseError> {
        let wrong = || ParseError(format!("`{text}` is not a size: write it like 512MiB or 1GiB"));
        let (number, unit) = split(text);
        let unit = match unit {
            "" => 1,
            unit => SIZES.iter().find(|(name, _)| name.eq_ignore_ascii_case(unit)).ok_or_else(wrong)?.1,
        };
        scaled(number, unit).map(ByteSize).ok_or_else(wrong)
    }
}

impl fmt::Display for ByteSize {
    /// The largest power of 1024 that leaves no fraction.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match SIZES[..4].iter().find(|(_, unit)| self.0 > 0 && self.0.is_multiple_of(*unit)) {
            Some((name, unit)) => write!(f, "{}{name}", self.0 / unit),
            None => write!(f, "{}", self.0),
        }
    }
}

/// A duration, written `50ms`, `1.5s`, `10m` or `2h`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct HumanDuration(pub Duration);

/// Units in nanoseconds.
const SPANS: [(&str, u64); 6] = [
    ("h", 3_600_000_000_000),
    ("m", 60_000_000_000),
    ("s", 1_000_000_000),
    ("ms", 1_000_000),
    ("us", 1_000),
    ("ns", 1),
];

impl FromStr for HumanDuration {
    type Err = ParseError;

    fn from_str(text: &str) -> Result<Self, ParseError> {
        let wrong = || ParseError(format!("`{text}` is not a duration: write it like 5s or 50ms"));
        let (number, unit) = split(text);
        if unit.is_empty() && number == "0" {
            return Ok(HumanDuration(Duration::ZERO));
        }
        let (_, unit) = SPANS.iter().find(|(name, _)| *name == unit).ok_or_else(wrong)?;
        let nanos = scaled(number, *unit).ok_or_else(wrong)?;
        Ok(HumanDuration(Duration::from_nanos(nanos)))
    }
}

impl fmt::Display for HumanDuration {
    /// The largest unit that leaves no fraction.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let nanos = self.0.as_nanos();
        match SPANS.iter().find(|(_, unit)| nanos > 0 && nanos.is_multiple_of(u128::from(*unit))) {
            Some((name, unit)) => write!(f, "{}{name}", nanos / u128::from(*unit)),
            None => write!(f, "0s"),
        }
    }
}

/// Latency targets of a request: until its first token, and per further token on average.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Slo {
    /// Until the first token.
    pub ttft: Duration,
    /// Per further token, on average.
    pub tpot: Duration,
}

impl FromStr for Slo {
    type Err = ParseError;

    fn from_str(text: &str) -> Result<Self, ParseError> {
        let wrong = || ParseError(format!("`{text}` are no targets: write them like ttft=1s,tpot=50ms"));
        let mut targets = [None; 2];
        for part in text.split(',') {
            let (name, value) = part.split_once('=').ok_or_else(wrong)?;
            let at = ["ttft", "tpot"].iter().position(|known| *known == name.trim()).ok_or_else(wrong)?;
            let HumanDuration(target) = value.parse().map_err(|_| wrong())?;
            targets[at] = Some(target).filter(|target| !target.is_zero());
        }
        match targets {
            [Some(ttft), Some(tpot)] => Ok(Slo { ttft, tpot }),
            _ => Err(wrong()),
        }
    }
}

impl fmt::Display for Slo {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ttft={},tpot={}", HumanDuration(self.ttft), HumanDuration(self.tpot))
    }
}

/// The number in front and the unit behind it, with the space between them gone.
fn split(text: &str) -> (&str, &str) {
    let text = text.trim();
    let end = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, unit) = text.split_at(end);
    (number, unit.trim_start())
}

/// `number` (decimal, at most nine places) times `unit`, exactly, rounded down; `None` when it is no number or
/// does not fit.
fn scaled(number: &str, unit: u64) -> Option<u64> {
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    if whole.is_empty() || fraction.len() > 9 || (number.contains('.') && fraction.is_empty()) {
        return None;
    }
    let fraction_value: u128 = if fraction.is_empty() { 0 } else { fraction.parse().ok()? };
    let whole = u128::from(whole.parse::<u64>().ok()?) * u128::from(unit);
    let part = fraction_value * u128::from(unit) / 10u128.pow(fraction.len() as u32);
    u64::try_from(whole + part).ok()
}

impl Serialize for ByteSize {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl Serialize for Slo {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl Serialize for HumanDuration {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for ByteSize {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(untagged)]
        enum Written {
            Bytes(u64),
            Text(String),
        }
        match Written::deserialize(deserializer)? {
            Written::Bytes(bytes) => Ok(ByteSize(bytes)),
            Written::Text(text) => text.parse().map_err(de::Error::custom),
        }
    }
}

impl<'de> Deserialize<'de> for HumanDuration {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn sizes_are_read_with_and_without_units() {
        for (text, bytes) in [
            ("512MiB", 512 << 20),
            ("1GiB", 1 << 30),
            ("1.5GiB", 3 << 29),
            ("2gb", 2_000_000_000),
            ("7", 7),
            ("64 KiB", 65536),
            ("0", 0),
            ("12B", 12),
        ] {
            assert_eq!(text.parse(), Ok(ByteSize(bytes)), "{text}");
        }
        for wrong in ["", "MiB", "-1", "1M", "1.MiB", ".5GiB", "1e3", "99999999TiB", "1 2", "1.2.3MiB"] {
            let error = wrong.parse::<ByteSize>().unwrap_err().to_string();
            assert!(error.contains("512MiB"), "{wrong}: {error}");
        }
    }

    #[test]
    fn durations_need_a_unit() {
        for (text, millis) in
            [("1s", 1000), ("50ms", 50), ("1.5s", 1500), ("10m", 600_000), ("2h", 7_200_000), ("0", 0)]
        {
            assert_eq!(text.parse(), Ok(HumanDuration(Duration::from_millis(millis))), "{text}");
        }
        for wrong in ["", "5", "s", "5sec", "-1s", "1s2", "1 day"] {
            wrong.parse::<HumanDuration>().unwrap_err();
        }
        assert_eq!(HumanDuration(Duration::from_secs(600)).to_string(), "10m");
        assert_eq!(HumanDuration(Duration::from_millis(1500)).to_string(), "1500ms");
        assert_eq!(HumanDuration(Duration::ZERO).to_string(), "0s");
    }

    proptest! {
        #[test]
        fn what_is_written_reads_back(number: u64) {
            let size = ByteSize(number);
            prop_assert_eq!(size.to_string().parse(), Ok(size));
            let duration = HumanDuration(Duration::from_nanos(number));
            prop_assert_eq!(duration.to_string().parse(), Ok(duration));
        }

        #[test]
        fn no_text_makes_the_readers_panic(text: String) {
            let _ = (text.parse::<ByteSize>(), text.parse::<HumanDuration>());
        }
    }

    #[test]
    fn targets_are_read_and_written_alike() {
        let slo: Slo = "ttft=1s,tpot=50ms".parse().unwrap();
        assert_eq!(slo, Slo { ttft: Duration::from_secs(1), tpot: Duration::from_millis(50) });
        assert_eq!(slo.to_string(), "ttft=1s,tpot=50ms");
        assert_eq!("tpot=0.5s, ttft=10s".parse::<Slo>().unwrap().to_string(), "ttft=10s,tpot=500ms");
        for wrong in ["", "ttft=1s", "ttft=1,tpot=2ms", "ttft=0s,tpot=2ms", "ttft=1s,tpot=2ms,e2e=3s"] {
            assert!(wrong.parse::<Slo>().unwrap_err().to_string().contains("ttft=1s,tpot=50ms"), "{wrong}");
        }
    }
}
