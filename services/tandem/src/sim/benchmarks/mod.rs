//! The tables of `docs/benchmarks.md` about placement and role switching, in sections that run on their own.
//!
//! Ours is everywhere the same: policy `cost`, order by deadline, the planner on, half and half at the start. It
//! is compared with the best of all fixed splits and of all chunks of mixed workers, chosen anew for every row
//! and round with hindsight, under least load and the same order. Round i has seed i and its own window or
//! rotation of the trace; ratios are taken within a round, and their median counts.

mod carried;
mod flaws;
mod held;
mod speed;

use std::path::PathBuf;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use tandem_simulator::scenario::{Arrivals, Scenario};
use tandem_simulator::{Options, Workload, run};

use super::SimConfig;
use super::runs::{self, Planned};
use crate::progress::Bar;

/// A part of the tables.
struct Section {
    /// What `--benchmarks` calls it.
    name: &'static str,
    /// Makes it.
    make: fn(&Bench) -> Result<String, String>,
    /// Whether its rows can be made one by one.
    by_row: bool,
}

const SECTIONS: [Section; 8] = [
    Section { name: "targets", make: carried::targets, by_row: true },
    Section { name: "xllm", make: carried::xllm, by_row: true },
    Section { name: "shift", make: carried::shift, by_row: true },
    Section { name: "general", make: carried::general, by_row: true },
    Section { name: "cache", make: held::cache, by_row: false },
    Section { name: "offline", make: held::offline, by_row: false },
    Section { name: "flaws", make: flaws::flaws, by_row: true },
    Section { name: "speed", make: speed::speed, by_row: false },
];

/// Share of requests that must meet both targets.
const ATTAINED: f64 = 0.9;

/// What every section needs.
struct Bench {
    rounds: usize,
    traces: PathBuf,
    /// What a row's name must contain.
    rows: String,
    /// Whether one did.
    found: AtomicBool,
    bar: Bar,
}

/// Makes the sections named, separated by commas, and prints each when it is done.
pub fn main(config: &SimConfig, names: &str) -> Result<(), String> {
    let known = || SECTIONS.map(|section| section.name).join(", ");
    for name in names.split(',').filter(|name| *name != "all") {
        if !SECTIONS.iter().any(|section| section.name == name) {
            return Err(format!("--benchmarks knows all, {}, not {name:?}", known()));
        }
    }
    let bench = Bench {
        rounds: config.rounds.max(1),
        traces: config.traces.clone(),
        rows: config.rows.clone().unwrap_or_default(),
        found: AtomicBool::new(false),
        bar: Bar::of_unknown_length(),
    };
    let by_row = config.rows.is_some();
    for section in SECTIONS {
        let named = names.split(',').any(|name| name == section.name);
        if by_row && named && !section.by_row {
            return Err(format!("--rows cannot pick from {}, which is made whole", section.name));
        }
        if named || (names.split(',').any(|name| name == "all") && (section.by_row || !by_row)) {
            let text = (section.make)(&bench)?;
            bench.bar.end();
            println!("{text}");
        }
    }
    if by_row && !bench.found.load(Ordering::Relaxed) {
        return Err(format!("no row's name contains {:?}; without --rows all are made", bench.rows));
    }
    Ok(())
}

/// Requests, and the targets that they have.
#[derive(Clone)]
struct Case {
    name: String,
    /// A trace that is committed, one of `--traces`, or `shift`.
    trace: &'static str,
    /// Seconds of a window; all of it without.
    seconds: Option<f64>,
    /// Where the first round's window begins.
    offset: f64,
    /// Seconds from the window of one round to that of the next.
    stride: f64,
    /// Timestamps are divided, and all of the trace is rotated from round to round.
    squeezed: bool,
    /// How they arrive where the trace does not say.
    arrivals: Arrivals,
    first_ms: u64,
    token_ms: u64,
}

impl Case {
    fn new(name: &str, trace: &'static str, first_ms: u64, token_ms: u64) -> Case {
        Case {
            name: name.to_owned(),
            trace,
            seconds: None,
            offset: 0.0,
            stride: 0.0,
            squeezed: false,
            arrivals: Arrivals::Poisson,
            first_ms,
            token_ms,
        }
    }

    fn windows(self, seconds: f64, stride: f64) -> Case {
        Case { seconds: Some(seconds), stride, ..self }
    }

    fn label(&self) -> String {
        let first = match self.first_ms {
            ms if ms % 1000 == 0 => format!("{} s", ms / 1000),
            ms => format!("{ms} ms"),
        };
        format!("{}, {first}/{} ms", self.name, self.token_ms)
    }
}

/// What one round of a case carries, as scales.
struct Carried {
    ours: f64,
    fixed: (f64, String),
    mixed: (f64, String),
    half: f64,
    ceiling: f64,
    flips: usize,
}

impl Carried {
    fn best(&self) -> f64 {
        self.fixed.0.max(self.mixed.0)
    }
}

impl Bench {
    /// The scenario of a round, or `None` if its trace is not there.
    fn scenario(&self, case: &Case, round: usize) -> Result<Option<Scenario>, String> {
        let Some(path) = self.find(case.trace) else { return Ok(None) };
        let offset = case.offset + case.stride * round as f64;
        let seed = round as u64 + 1;
        let (from, rotated) = if case.squeezed { (0.0, offset) } else { (offset, 0.0) };
        let read = Scenario::read(&path, from, case.seconds, seed);
        let mut scenario = read.map_err(|error| error.to_string())?;
        scenario.rotate(rotated);
        scenario.squeezed = case.squeezed;
        scenario.arrivals = case.arrivals;
        Ok(Some(scenario))
    }

    /// A trace by name: committed, `shift`, or a file of `--traces` if it is there.
    fn find(&self, name: &str) -> Option<String> {
        if name == "shift" || tandem_simulator::scenario::find(name).exists() {
            return Some(name.to_owned());
        }
        let path = self.traces.join(format!("{name}.csv.gz"));
        path.exists().then(|| path.display().to_string())
    }

    /// What to print instead of a row whose trace is missing.
    fn missing(&self, name: &str) -> String {
        format!("skipped: {name}.csv.gz is not in {}", self.traces.display())
    }

    /// All rounds of a case, or `None` if its trace is missing. `flawed` changes the cluster of all alike.
    fn carried(
        &self,
        case: &Case,
        flawed: impl Fn(Options) -> Options + Sync,
    ) -> Result<Option<Vec<Carried>>, String> {
        let mut scenarios = Vec::new();
        for round in 0..self.rounds {
            let Some(scenario) = self.scenario(case, round)? else { return Ok(None) };
            scenarios.push(scenario);
        }
        let rounds = side_by_side(scenarios.len(), |round| {
            let ours = flawed(Options {
                first_token: Duration::from_millis(case.first_ms),
                per_token: Duration::from_millis(case.token_ms),
                seed: round as u64 + 1,
                ..Options::default()
            });
            self.round(case, &scenarios[round], &ours, round)
        });
        rounds.map(Some)
    }

    /// Whether a row of this name is to be made.
    fn wants(&self, label: &str) -> bool {
        let wanted = label.contains(&self.rows);
        self.found.fetch_or(wanted, Ordering::Relaxed);
        wanted
    }

    fn round(
        &self,
        case: &Case,
        scenario: &Scenario,
        ours: &Options,
        round: usize,
    ) -> Result<Carried, String> {
        let name = |who: &str| format!("{} round {}: {who}", case.label(), round + 1);
        let planned = |who: &str, choices| Planned { name: name(who), choices };
        let baselines = runs::baselines(ours)?;
        let of = |keep: fn(&Options) -> bool| {
            let all = baselines.iter().flat_map(|planned| planned.choices.clone());
            all.filter(keep).collect::<Vec<_>>()
        };
        let by_deadline =
            |options: &Options| options.order == super::Order::Deadline && options.policy == "least-loaded";
        let fixed = of(|o| !is_mixed(o)).into_iter().filter(by_deadline).collect();
        let mixed = of(is_mixed).into_iter().filter(by_deadline).collect();
        let half = of(|o| o.order == super::Order::Arrival && o.policy == "least-loaded");
        let guess = scenario.guess(ours.workers);
        let best = |planned: &Planned, guess: f64| {
            let (options, scale) = runs::best_scale(planned, scenario, ATTAINED, guess, &self.bar)?;
            Ok::<_, String>((scale, options.split.to_string()))
        };
        let own = best(&planned("ours", vec![ours.clone()]), guess)?.0;
        let flips = run(ours, &scenario.workload(own.max(1e-3)))?.flips;
        let near = if own > 0.0 { own } else { guess };
        Ok(Carried {
            ours: own,
            fixed: best(&planned("fixed splits", fixed), near)?,
            mixed: best(&planned("mixed workers", mixed), near)?,
            half: best(&planned("4P4D by arrival", half), near)?.0,
            ceiling: ceiling(ours, &scenario.workload(near), near),
            flips,
        })
    }
}

/// Makes `count` things on as many threads as there are processors.
fn side_by_side<T: Send>(
    count: usize,
    make: impl Fn(usize) -> Result<T, String> + Sync,
) -> Result<Vec<T>, String> {
    let (next, made) = (AtomicUsize::new(0), Mutex::new(Vec::new()));
    let processors = std::thread::available_parallelism().map_or(1, usize::from);
    std::thread::scope(|scope| {
        for _ in 0..processors.min(count) {
            scope.spawn(|| {
                loop {
                    let at = next.fetch_add(1, Ordering::Relaxed);
                    if at >= count {
                        return;
                    }
                    let thing = make(at);
                    made.lock().expect("nothing panics under this lock").push((at, thing));
                }
            });
        }
    });
    let mut made = made.into_inner().expect("nothing panics under this lock");
    made.sort_by_key(|(at, _)| *at);
    made.into_iter().map(|(_, thing)| thing).collect()
}

fn is_mixed(options: &Options) -> bool {
    matches!(options.split, tandem_simulator::Split::Mixed(_))
}

/// The scale at which all workers would do nothing but prefill, all of it.
fn ceiling(options: &Options, workload: &Workload, scale: f64) -> f64 {
    let step = options.profile.step;
    let seconds: f64 = workload.arrivals.iter().map(|a| step.prefill(a.input, 0, 2048)).sum();
    let span = workload.arrivals.last().map_or(0.0, |last| last.at.as_secs_f64());
    scale * options.workers as f64 * span / seconds.max(1e-9)
}

fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    match sorted.len() {
        0 => f64::NAN,
        n if n % 2 == 1 => sorted[n / 2],
        n => (sorted[n / 2 - 1] + sorted[n / 2]) / 2.0,
    }
}

/// `median (least to most)`.
fn spread(values: impl IntoIterator<Item = f64>, digits: usize) -> String {
    let values: Vec<f64> = values.into_iter().collect();
    let least = values.iter().copied().fold(f64::INFINITY, f64::min);
    let most = values.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    format!("{:.digits$} ({least:.digits$} to {most:.digits$})", median(&values))
}

/// A goal beside what was reached.
fn verdict(reached: f64, goal: f64) -> String {
    let word = if reached >= goal { "met" } else { "missed" };
    format!("{goal:.2}: {word}")
}

/// A table of Markdown.
fn table(head: &[&str], rows: &[Vec<String>]) -> String {
    let line = |cells: &[String]| format!("| {} |\n", cells.join(" | "));
    let head: Vec<String> = head.iter().map(|cell| (*cell).to_owned()).collect();
    let mut text = line(&head) + &line(&vec!["---".to_owned(); head.len()]);
    for row in rows {
        let mut row = row.clone();
        row.resize(head.len(), String::new());
        text += &line(&row);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_spread_shows_the_median_between_the_least_and_the_most() {
        assert_eq!(spread([3.0, 1.0, 2.0], 1), "2.0 (1.0 to 3.0)");
        assert_eq!(spread([1.0, 2.0], 2), "1.50 (1.00 to 2.00)");
        assert_eq!(verdict(0.98, 0.98), "0.98: met");
    }

    #[test]
    fn rows_are_as_wide_as_their_head() {
        let text = table(&["a", "b"], &[vec!["1".into()]]);
        assert_eq!(text, "| a | b |\n| --- | --- |\n| 1 |  |\n");
    }
}
