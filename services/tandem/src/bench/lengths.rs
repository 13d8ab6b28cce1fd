//! How long prompts and answers are: fixed, drawn from a distribution, or a column of a trace.

use std::fmt;
use std::str::FromStr;

use serde::{Serialize, Serializer};
use tandem_simulator::Trace;
use tandem_simulator::random::Mersenne;
use tandem_simulator::scenario;

/// As written on the command line.
#[derive(Clone, Debug, PartialEq)]
pub enum Lengths {
    /// Always the same.
    Fixed(u32),
    /// From the first to the second, both included, each as likely.
    Uniform(u32, u32),
    /// The logarithm is normal: median, and the standard deviation of the logarithm.
    LogNormal(f64, f64),
    /// A column of a file, row after row from a drawn one on, round and round.
    Column(String, String),
}

/// No length is above this: a drawn tail must not become a body of gigabytes.
const TOKENS_MAX: f64 = 4_194_304.0;

impl FromStr for Lengths {
    type Err = String;

    fn from_str(text: &str) -> Result<Lengths, String> {
        let wrong = || {
            format!(
                "{text:?} are no lengths: write fixed:N, uniform:A,B, lognormal:MEDIAN,SIGMA or FILE:COLUMN"
            )
        };
        let whole = |text: &str| text.parse::<u32>().ok().filter(|&n| n > 0 && f64::from(n) <= TOKENS_MAX);
        let positive = |text: &str| text.parse::<f64>().ok().filter(|n| n.is_finite() && *n >= 0.0);
        let pair = |text: &str| text.split_once(',').map(|(a, b)| (a.trim().to_owned(), b.trim().to_owned()));
        let Some((kind, rest)) = text.rsplit_once(':') else {
            return whole(text).map(Lengths::Fixed).ok_or_else(wrong);
        };
        let lengths = match kind {
            "fixed" => whole(rest).map(Lengths::Fixed),
            "uniform" => pair(rest)
                .and_then(|(a, b)| Some(Lengths::Uniform(whole(&a)?, whole(&b)?)))
                .filter(|lengths| matches!(lengths, Lengths::Uniform(a, b) if a <= b)),
            "lognormal" => pair(rest)
                .and_then(|(a, b)| Some(Lengths::LogNormal(positive(&a)?, positive(&b)?)))
                .filter(|lengths| matches!(lengths, Lengths::LogNormal(median, _) if *median >= 1.0)),
            file => Some(Lengths::Column(file.to_owned(), rest.to_owned()))
                .filter(|_| !file.is_empty() && rest.starts_with(|first: char| first.is_ascii_alphabetic())),
        };
        lengths.ok_or_else(wrong)
    }
}

impl fmt::Display for Lengths {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Lengths::Fixed(n) => write!(f, "fixed:{n}"),
            Lengths::Uniform(a, b) => write!(f, "uniform:{a},{b}"),
            Lengths::LogNormal(median, sigma) => write!(f, "lognormal:{median},{sigma}"),
            Lengths::Column(file, column) => write!(f, "{file}:{column}"),
        }
    }
}

impl Serialize for Lengths {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

/// Lengths one after the other.
pub struct Draws {
    lengths: Lengths,
    rows: Vec<u32>,
    at: usize,
    random: Mersenne,
}

impl Draws {
    /// `stream` keeps the draws of prompts and answers apart. Columns of one file begin at the same row whatever
    /// the stream, so that a prompt keeps its answer.
    pub fn new(lengths: &Lengths, seed: u64, stream: u64) -> Result<Draws, String> {
        let rows = match lengths {
            Lengths::Column(file, column) => {
                Trace::column(&scenario::find(file), column).map_err(|error| error.to_string())?
            }
            _ => Vec::new(),
        };
        if rows.is_empty() && matches!(lengths, Lengths::Column(..)) {
            return Err(format!("{lengths}: there is no row"));
        }
        let at = (Mersenne::new(seed).uniform() * rows.len() as f64) as usize;
        let random = Mersenne::new(seed.wrapping_mul(4).wrapping_add(stream));
        Ok(Draws { lengths: lengths.clone(), rows, at, random })
    }

    /// The next length, at least 1.
    pub fn next(&mut self) -> u32 {
        match self.lengths {
            Lengths::Fixed(n) => n,
            Lengths::Uniform(a, b) => a + (self.random.uniform() * f64::from(b - a + 1)) as u32,
            Lengths::LogNormal(median, sigma) => {
                self.random.normal(median.ln(), sigma).exp().round().clamp(1.0, TOKENS_MAX) as u32
            }
            Lengths::Column(..) => {
                let row = self.rows[self.at % self.rows.len()];
                self.at += 1;
                row
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn drawn(text: &str, count: usize) -> Vec<u32> {
        let lengths = text.parse().expect(text);
        let mut draws = Draws::new(&lengths, 7, 1).expect("it can be drawn from");
        (0..count).map(|_| draws.next()).collect()
    }

    #[test]
    fn what_is_written_is_read_and_written_again() {
        for text in
            ["fixed:128", "uniform:1,9", "lognormal:300,0.8", "azure2023_code:output_tokens", "a/b.csv.gz:c"]
        {
            assert_eq!(text.parse::<Lengths>().expect(text).to_string(), text);
        }
        assert_eq!("64".parse(), Ok(Lengths::Fixed(64)));
    }

    #[test]
    fn what_is_no_length_is_answered_with_the_right_forms() {
        for text in [
            "",
            "fixed:0",
            "fixed:-1",
            "uniform:9,1",
            "uniform:3",
            "lognormal:0,1",
            "lognormal:5,x",
            "normal:3,4",
            "fixed:4294967295",
        ] {
            let refusal = text.parse::<Lengths>().expect_err(text);
            assert!(refusal.contains("lognormal:MEDIAN,SIGMA"), "{refusal}");
        }
    }

    #[test]
    fn draws_follow_their_distribution() {
        assert_eq!(drawn("fixed:5", 3), [5, 5, 5]);
        let uniform = drawn("uniform:3,6", 4000);
        for length in 3..=6 {
            let share = uniform.iter().filter(|&&drawn| drawn == length).count();
            assert!((900..1100).contains(&share), "{length} was drawn {share} times of 4000");
        }
        assert!(uniform.iter().all(|length| (3..=6).contains(length)));
        let mut normal = drawn("lognormal:300,0.8", 4001);
        normal.sort_unstable();
        assert!((280..320).contains(&normal[2000]), "the median is {}", normal[2000]);
        let within = normal.iter().filter(|&&n| (135..=668).contains(&n)).count();
        assert!((2630..2830).contains(&within), "{within} of 4001 are within one sigma, not 68 %");
    }

    #[test]
    fn columns_of_one_file_stay_pairs_and_go_round() {
        let inputs = drawn("azure2023_code.csv.gz:input_tokens", 9000);
        let outputs = drawn("azure2023_code.csv.gz:output_tokens", 9000);
        let trace = Trace::read(&scenario::find("azure2023_code")).expect("it is committed");
        let first = trace.rows.windows(3).position(|rows| {
            rows.iter()
                .zip(&inputs)
                .zip(&outputs)
                .all(|((row, input), output)| (row.input, row.output) == (*input, *output))
        });
        assert!(first.is_some(), "the first three pairs are three rows of the file");
        assert_eq!(inputs[0], inputs[trace.rows.len()], "after the last row comes the first");
        let lost = Draws::new(&"azure2023_code.csv.gz:tokens".parse().expect("a column"), 1, 1);
        assert!(lost.err().expect("there is none").contains("input_tokens"));
    }
}
