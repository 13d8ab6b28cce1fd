//! A load that can be made larger or smaller: a trace or lengths, how they arrive, and offline work beside them.

use std::io::Read;
use std::path::{Path, PathBuf};

use crate::workload::{Error, Trace, Workload, shift};

/// How lengths without arrival times arrive.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Arrivals {
    /// Independent of each other.
    Poisson,
    /// In bursts, with this coefficient of variation of the gaps.
    Gamma(f64),
}

impl std::str::FromStr for Arrivals {
    type Err = String;

    fn from_str(text: &str) -> Result<Arrivals, String> {
        let cv = text.strip_prefix("gamma:").and_then(|cv| cv.parse::<f64>().ok());
        match (text, cv.filter(|cv| cv.is_finite() && *cv > 0.0)) {
            ("poisson", _) => Ok(Arrivals::Poisson),
            (_, Some(cv)) => Ok(Arrivals::Gamma(cv)),
            _ => Err(format!("{text:?} is no kind of arrivals; expected poisson or gamma:CV")),
        }
    }
}

/// Where a load comes from, read once.
#[derive(Clone, Debug)]
pub struct Scenario {
    trace: Trace,
    shifts: bool,
    /// Seconds of drawn arrivals.
    seconds: f64,
    /// Divides timestamps instead of superposing copies.
    pub squeezed: bool,
    /// Divides timestamps of the trace before it is superposed.
    pub squeeze: f64,
    /// How lengths arrive; a trace with times needs none.
    pub arrivals: Arrivals,
    /// Requests per second, step by step, that lengths follow.
    rates: Option<(Vec<f64>, f64)>,
    /// Spreads arrivals evenly over so many milliseconds.
    pub spread_ms: f64,
    /// Names the draws.
    pub seed: u64,
    offline: Option<(Trace, usize)>,
}

/// Rows of the trace named `shift` come from this file.
const SHIFT_CODE: &str = "azure2023_code.csv.gz";
/// Seconds of drawn arrivals where nobody says how many.
const DRAWN_SECONDS: f64 = 300.0;

/// The folder of the traces that are committed beside the simulator.
pub fn own_traces() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("traces")
}

/// A trace by path, or by the name of one that is committed beside the simulator.
pub fn find(name: &str) -> PathBuf {
    let path = PathBuf::from(name);
    let own = own_traces().join(if name.contains('.') { name.to_owned() } else { format!("{name}.csv.gz") });
    if !path.exists() && own.exists() { own } else { path }
}

impl Scenario {
    /// The window of a trace, all of a file of lengths, or `shift`.
    pub fn read(name: &str, offset: f64, seconds: Option<f64>, seed: u64) -> Result<Scenario, Error> {
        let shifts = name == "shift";
        let trace = if shifts {
            Trace::read(&own_traces().join(SHIFT_CODE))?.window(0.0, Some(300.0))
        } else {
            let trace = Trace::read(&find(name))?;
            if trace.timed { trace.window(offset, seconds) } else { trace }
        };
        if trace.rows.is_empty() {
            let what = format!("there is no request from {offset} s on");
            return Err(Error::Form { path: name.to_owned(), line: 1, what });
        }
        Ok(Scenario {
            trace,
            shifts,
            seconds: seconds.unwrap_or(DRAWN_SECONDS),
            squeezed: false,
            squeeze: 1.0,
            arrivals: Arrivals::Poisson,
            rates: None,
            spread_ms: 0.0,
            seed,
            offline: None,
        })
    }

    /// The trace begins so many seconds in, and what was before follows at its end.
    pub fn rotate(&mut self, seconds: f64) {
        if seconds > 0.0 {
            self.trace.rotate(seconds);
        }
    }

    /// Arrival times are forgotten: lengths remain, and arrive as `arrivals` says.
    pub fn forget_times(&mut self) {
        self.trace.timed = false;
    }

    /// Arrivals are drawn for so long.
    pub fn draw_for(&mut self, seconds: f64) {
        self.seconds = seconds;
        self.forget_times();
    }

    /// Lengths follow a column of requests per second, from `offset` seconds on, for so many seconds. Returns
    /// the mean of it.
    pub fn follow(&mut self, path: &Path, column: &str, offset: f64, seconds: f64) -> Result<f64, Error> {
        let name = path.display().to_string();
        let error = |source| Error::Read { path: name.clone(), source };
        let mut text = String::new();
        let file = std::fs::File::open(path).map_err(error)?;
        flate2::read::GzDecoder::new(file).read_to_string(&mut text).map_err(error)?;
        let form = |line, what: String| Error::Form { path: name.clone(), line, what };
        let mut lines = text.lines();
        let header: Vec<&str> = lines.next().unwrap_or_default().split(',').collect();
        let at = |wanted: &str| {
            header.iter().position(|name| *name == wanted || name.strip_suffix("_rps") == Some(wanted))
        };
        let time = at("t_s").ok_or_else(|| form(1, "there is no column t_s".into()))?;
        let rate = at(column).ok_or_else(|| form(1, format!("there is no column {column}")))?;
        let mut rates = Vec::new();
        for (number, line) in lines.enumerate() {
            let cells: Vec<&str> = line.split(',').collect();
            let value = |at: usize| cells.get(at).and_then(|cell| cell.parse::<f64>().ok());
            let Some(second) = value(time) else {
                return Err(form(number + 2, "has no time".into()));
            };
            if second >= offset && second < offset + seconds {
                rates.push(value(rate).unwrap_or(0.0).max(0.0));
            }
        }
        if rates.is_empty() {
            return Err(form(1, format!("there is no rate from {offset} s on")));
        }
        let mean = rates.iter().sum::<f64>() / rates.len() as f64;
        self.rates = Some((rates, 600.0));
        Ok(mean)
    }

    /// Work without targets beside it: so many requests of these lengths, all there from the beginning.
    pub fn beside(&mut self, lengths: &str, requests: usize) -> Result<(), Error> {
        self.offline = Some((Trace::read(&find(lengths))?, requests));
        Ok(())
    }

    /// The load at a scale.
    pub fn workload(&self, scale: f64) -> Workload {
        let mut workload = if self.shifts {
            shift(&self.trace, scale, self.seed)
        } else if let Some((rates, step)) = &self.rates {
            self.trace.drawn_by_rates(rates, *step, scale, self.seed)
        } else if !self.trace.timed {
            let cv = match self.arrivals {
                Arrivals::Poisson => None,
                Arrivals::Gamma(cv) => Some(cv),
            };
            self.trace.drawn(scale, self.seconds, cv, self.seed)
        } else if self.squeezed {
            self.trace.squeezed(scale * self.squeeze)
        } else if self.squeeze != 1.0 {
            self.trace.divided(self.squeeze).superposed(scale, self.seed)
        } else {
            self.trace.superposed(scale, self.seed)
        };
        if self.spread_ms > 0.0 {
            workload.spread(self.spread_ms, self.seed);
        }
        if let Some((lengths, requests)) = &self.offline {
            workload.add_offline(lengths, *requests);
        }
        workload
    }

    /// A scale at which to look first for the highest one of so many workers.
    pub fn guess(&self, workers: usize) -> f64 {
        let profile = &tandem_placement::predictor::PROFILES[0].step;
        let probe = self.workload(1.0);
        let online = probe.arrivals.iter().filter(|a| a.class == tandem_types::ServiceClass::Online);
        let seconds: f64 = online
            .map(|a| {
                let tokens = f64::from(a.output);
                let context = f64::from(a.input) + tokens / 2.0;
                profile.prefill(a.input, 0, 2048) + tokens * (profile.b1 + profile.b2 * context)
            })
            .sum();
        let span = probe.arrivals.last().map_or(1.0, |last| last.at.as_secs_f64().max(1.0));
        (workers as f64 * span / seconds.max(1e-9)).clamp(1e-2, 1e4)
    }
}
