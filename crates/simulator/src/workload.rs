//! What arrives: traces, superposed or squeezed, lengths with drawn arrivals, and the shifting load.

use std::collections::HashMap;
use std::fs::File;
use std::io::Read;
use std::path::Path;

use flate2::read::GzDecoder;
use tandem_types::{ServiceClass, Time};

use crate::random::Mersenne;

/// Tokens of a prefix block in traces that carry them.
pub const TRACE_BLOCK_TOKENS: u32 = 512;

/// One request of a workload.
#[derive(Clone, Debug, PartialEq)]
pub struct Arrival {
    /// When it comes.
    pub at: Time,
    /// Prompt tokens, at least 1.
    pub input: u32,
    /// Output tokens, at least 1. Nobody in the cluster knows them.
    pub output: u32,
    /// Whether it has targets.
    pub class: ServiceClass,
    /// Its prefix blocks: where they start in [`Workload::blocks`], and how many.
    pub blocks: (u32, u32),
}

/// Requests in order of arrival.
#[derive(Clone, Debug, Default)]
pub struct Workload {
    /// The requests.
    pub arrivals: Vec<Arrival>,
    /// Prefix blocks of all requests.
    pub blocks: Vec<u32>,
}

/// A row of a trace; milliseconds as in the file.
#[derive(Clone, Debug, PartialEq)]
pub struct TraceRow {
    /// Since the first.
    pub arrival_ms: f64,
    /// Prompt tokens.
    pub input: u32,
    /// Output tokens.
    pub output: u32,
    /// Where its prefix blocks start, and how many.
    pub blocks: (u32, u32),
}

/// A trace or a list of lengths.
#[derive(Clone, Debug, Default)]
pub struct Trace {
    /// In order of arrival.
    pub rows: Vec<TraceRow>,
    /// Prefix blocks of all rows.
    pub blocks: Vec<u32>,
    /// Whether rows have arrival times.
    pub timed: bool,
}

/// Why there is no workload.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The file cannot be read.
    #[error("{path}: {source}")]
    Read {
        /// Which.
        path: String,
        /// Why.
        source: std::io::Error,
    },
    /// It is not of the form described in its README.
    #[error("{path}, line {line}: {what}")]
    Form {
        /// Which.
        path: String,
        /// Counted from 1.
        line: usize,
        /// What is wrong.
        what: String,
    },
}

impl Trace {
    /// Reads a gzip CSV with columns `input_tokens`, `output_tokens`, and perhaps `arrival_ms` and
    /// `hash_ids_512`.
    pub fn read(path: &Path) -> Result<Trace, Error> {
        let name = path.display().to_string();
        let read_error = |source| Error::Read { path: name.clone(), source };
        let mut text = String::new();
        let file = File::open(path).map_err(read_error)?;
        GzDecoder::new(file).read_to_string(&mut text).map_err(read_error)?;
        let form = |line: usize, what: String| Error::Form { path: name.clone(), line, what };
        let mut lines = text.lines().enumerate();
        let header: Vec<&str> = lines.next().map(|(_, line)| line.split(',').collect()).unwrap_or_default();
        let column = |name: &str| header.iter().position(|column| *column == name);
        let needed = |name: &str| column(name).ok_or_else(|| form(1, format!("there is no column {name}")));
        let (input, output) = (needed("input_tokens")?, needed("output_tokens")?);
        let (arrival, hashes) = (column("arrival_ms"), column("hash_ids_512"));
        let mut trace = Trace { timed: arrival.is_some(), ..Trace::default() };
        for (number, line) in lines {
            let cells: Vec<&str> = line.split(',').collect();
            let cell = |at: usize| {
                cells.get(at).copied().ok_or_else(|| form(number + 1, "has too few columns".into()))
            };
            let number_of = |at: usize| {
                let text = cell(at)?;
                text.parse::<f64>().map_err(|_| form(number + 1, format!("{text:?} is not a number")))
            };
            let from = trace.blocks.len() as u32;
            if let Some(hashes) = hashes {
                for run in cell(hashes)?.split_whitespace() {
                    let (first, last) = run.split_once('-').unwrap_or((run, run));
                    let id = |text: &str| {
                        text.parse::<u32>().map_err(|_| form(number + 1, format!("{text:?} is no block id")))
                    };
                    trace.blocks.extend(id(first)?..=id(last)?);
                }
            }
            trace.rows.push(TraceRow {
                arrival_ms: arrival.map_or(Ok(0.0), number_of)?,
                input: (number_of(input)? as u32).max(1),
                output: (number_of(output)? as u32).max(1),
                blocks: (from, trace.blocks.len() as u32 - from),
            });
        }
        Ok(trace)
    }

    /// One column of whole numbers of such a file, at least 1 each: lengths by whatever name.
    pub fn column(path: &Path, name: &str) -> Result<Vec<u32>, Error> {
        let file = path.display().to_string();
        let read_error = |source| Error::Read { path: file.clone(), source };
        let mut text = String::new();
        GzDecoder::new(File::open(path).map_err(read_error)?)
            .read_to_string(&mut text)
            .map_err(read_error)?;
        let form = |line: usize, what: String| Error::Form { path: file.clone(), line, what };
        let mut lines = text.lines();
        let header: Vec<&str> = lines.next().unwrap_or_default().split(',').collect();
        let at = header.iter().position(|column| *column == name);
        let at =
            at.ok_or_else(|| form(1, format!("there is no column {name}; there are {}", header.join(", "))))?;
        let numbers = lines.enumerate().map(|(number, line)| {
            let cell = line.split(',').nth(at).unwrap_or_default();
            let value = cell.parse::<f64>().ok().filter(|value| value.is_finite() && *value >= 0.0);
            let value = value.ok_or_else(|| form(number + 2, format!("{cell:?} is no length")))?;
            Ok((value as u32).max(1))
        });
        numbers.collect()
    }

    /// The rows from `offset` on, for `seconds`; times count from there.
    pub fn window(&self, offset: f64, seconds: Option<f64>) -> Trace {
        let (from, to) = (offset * 1e3, seconds.map_or(f64::INFINITY, |s| (offset + s) * 1e3));
        let rows = self.rows.iter().filter(|row| row.arrival_ms >= from && row.arrival_ms < to);
        let rows = rows.map(|row| TraceRow { arrival_ms: row.arrival_ms - from, ..row.clone() }).collect();
        Trace { rows, blocks: self.blocks.clone(), timed: self.timed }
    }

    /// Begins so many seconds in; what was before follows at the end.
    pub fn rotate(&mut self, seconds: f64) {
        let span = self.rows.iter().map(|row| row.arrival_ms).fold(0.0, f64::max) + 1.0;
        for row in &mut self.rows {
            row.arrival_ms = (row.arrival_ms + span - seconds * 1e3 % span) % span;
        }
        self.rows.sort_by(|a, b| a.arrival_ms.total_cmp(&b.arrival_ms));
    }

    /// `scale` rotated copies over one another, the last one thinned; the clock stays as it is. Copies share no
    /// prefixes with each other: more load is more conversations, not the same ones again.
    pub fn superposed(&self, scale: f64, seed: u64) -> Workload {
        let mut trace = Trace { rows: Vec::new(), blocks: Vec::new(), timed: true };
        let mut rows = Vec::new();
        let names = self.blocks.iter().max().map_or(0, |most| most + 1);
        let copies = superpose(&self.rows, scale, seed);
        for (copy, row) in copies {
            let copied = copy * self.blocks.len() as u32;
            if copied as usize >= trace.blocks.len() {
                trace.blocks.extend(self.blocks.iter().map(|block| block + copy * names));
            }
            rows.push(TraceRow { blocks: (row.blocks.0 + copied, row.blocks.1), ..row });
        }
        trace.workload(rows)
    }

    /// All timestamps divided: bursts are squeezed too.
    pub fn squeezed(&self, factor: f64) -> Workload {
        self.workload(self.divided(factor).rows)
    }

    /// The same with all timestamps divided.
    pub fn divided(&self, factor: f64) -> Trace {
        let rows = self.rows.iter().map(|r| TraceRow { arrival_ms: r.arrival_ms / factor, ..r.clone() });
        Trace { rows: rows.collect(), blocks: self.blocks.clone(), timed: self.timed }
    }

    /// So many requests per second for so long, with lengths in the order of the rows, begun at a drawn one.
    /// Gaps are exponential, or Gamma with this coefficient of variation.
    pub fn drawn(&self, per_second: f64, seconds: f64, cv: Option<f64>, seed: u64) -> Workload {
        let mut random = Mersenne::new(seed);
        let start = (random.uniform() * self.rows.len() as f64) as usize;
        let (mut at, mut rows) = (0.0, Vec::new());
        for row in self.rows.iter().cycle().skip(start) {
            let gap = match cv {
                None => random.exponential(1.0),
                Some(cv) => random.gamma(1.0 / (cv * cv)),
            };
            at += gap / per_second * 1e3;
            if at >= seconds * 1e3 {
                break;
            }
            rows.push(TraceRow { arrival_ms: at, ..row.clone() });
        }
        self.workload(rows)
    }

    /// As `drawn`, Poisson, with a rate that changes: each entry holds for `step_seconds`.
    pub fn drawn_by_rates(&self, per_second: &[f64], step_seconds: f64, scale: f64, seed: u64) -> Workload {
        let mut random = Mersenne::new(seed);
        let mut lengths = self.rows.iter().cycle();
        let mut rows = Vec::new();
        for (step, rate) in per_second.iter().enumerate() {
            let (begin, mut at) = (step as f64 * step_seconds, 0.0);
            loop {
                at += random.exponential((rate * scale).max(1e-9));
                if at >= step_seconds {
                    break;
                }
                let Some(row) = lengths.next() else { break };
                rows.push(TraceRow { arrival_ms: (begin + at) * 1e3, ..row.clone() });
            }
        }
        self.workload(rows)
    }

    fn workload(&self, mut rows: Vec<TraceRow>) -> Workload {
        rows.sort_by(|a, b| {
            (a.arrival_ms, a.input, a.output)
                .partial_cmp(&(b.arrival_ms, b.input, b.output))
                .expect("arrival times are numbers")
        });
        let arrivals = rows.into_iter().map(|row| Arrival {
            at: Time((row.arrival_ms * 1e6) as u64),
            input: row.input,
            output: row.output,
            class: ServiceClass::Online,
            blocks: row.blocks,
        });
        Workload { arrivals: arrivals.collect(), blocks: self.blocks.clone() }
    }
}

/// Rows of all copies, one copy after the other, each with its copy's number.
fn superpose(rows: &[TraceRow], scale: f64, seed: u64) -> Vec<(u32, TraceRow)> {
    let mut random = Mersenne::new(seed);
    let span = rows.iter().map(|row| row.arrival_ms).fold(0.0, f64::max) + 1.0;
    let (mut left, mut copy, mut out) = (scale, 0u32, Vec::new());
    while left > 1e-9 {
        let share = left.min(1.0);
        left -= 1.0;
        let offset = if copy > 0 { random.uniform() * span } else { 0.0 };
        copy += 1;
        let mut thin = Mersenne::new(seed * 1000 + u64::from(copy));
        let kept = rows.iter().filter(|_| share >= 1.0 || thin.uniform() < share);
        out.extend(
            kept.map(|row| {
                (copy - 1, TraceRow { arrival_ms: (row.arrival_ms + offset) % span, ..row.clone() })
            }),
        );
    }
    out
}

/// Twice: 300 s of code completion at 5 × scale, then 300 s of a load like reasoning at 25 × scale a second.
/// `code` is the first 300 s of that trace.
pub fn shift(code: &Trace, scale: f64, seed: u64) -> Workload {
    let mut random = Mersenne::new(seed);
    let mut rows = Vec::new();
    for phase in 0..4 {
        let begin = f64::from(phase) * 300_000.0;
        if phase % 2 == 0 {
            let copies = superpose(&code.rows, 5.0 * scale, seed + phase as u64);
            rows.extend(
                copies.into_iter().map(|(_, row)| TraceRow { arrival_ms: begin + row.arrival_ms, ..row }),
            );
            continue;
        }
        let mut at = 0.0;
        loop {
            at += random.exponential(25.0 * scale) * 1e3;
            if at >= 300_000.0 {
                break;
            }
            let mut draw = |median: f64| (random.normal(median.ln(), 0.8).exp() as u32).clamp(1, 8000);
            let (input, output) = (draw(300.0), draw(900.0));
            rows.push(TraceRow { arrival_ms: begin + at, input, output, blocks: (0, 0) });
        }
    }
    Trace::default().workload(rows)
}

impl Workload {
    /// Arrivals drawn evenly over the next `ms`, for traces whose publisher grouped them.
    pub fn spread(&mut self, ms: f64, seed: u64) {
        for (i, arrival) in self.arrivals.iter_mut().enumerate() {
            let later = crate::random::uniform(seed, 0x5bead, i as u64) * ms * 1e6;
            arrival.at = Time(arrival.at.0 + later as u64);
        }
        self.arrivals.sort_by_key(|arrival| arrival.at);
    }

    /// Adds work without targets.
    pub fn add_offline(&mut self, lengths: &Trace, requests: usize) {
        let rows = lengths.rows.iter().cycle().take(requests);
        self.arrivals.splice(
            0..0,
            rows.map(|row| Arrival {
                at: Time::ZERO,
                input: row.input,
                output: row.output,
                class: ServiceClass::Offline,
                blocks: (0, 0),
            }),
        );
    }

    /// Share of all prompt tokens that caches without bounds would hold.
    pub fn best_hit_share(&self) -> f64 {
        let mut seen: HashMap<u32, ()> = HashMap::new();
        let (mut hit, mut all) = (0.0, 0.0);
        for arrival in &self.arrivals {
            let (from, count) = arrival.blocks;
            let blocks = &self.blocks[from as usize..(from + count) as usize];
            let held = blocks.iter().take_while(|block| seen.contains_key(block)).count() as u32;
            hit += f64::from((held * TRACE_BLOCK_TOKENS).min(arrival.input.saturating_sub(1)));
            all += f64::from(arrival.input);
            seen.extend(blocks.iter().map(|&block| (block, ())));
        }
        if all > 0.0 { hit / all } else { 0.0 }
    }
}
