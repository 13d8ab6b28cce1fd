//! Which runs a command stands for, and running them.

use tandem_batching::pace::Order;
use tandem_simulator::{Options, Outcome, Run, Scenario, Split, search};

use super::{SimConfig, options};
use crate::progress::Bar;

/// Prompt tokens of a step that mixed workers are tried with.
pub const CHUNKS: [u32; 4] = [256, 512, 1024, 2048];

/// A run to be done: one of several clusters, the best of which counts.
pub struct Planned {
    /// What to call it.
    pub name: String,
    /// The clusters.
    pub choices: Vec<Options>,
}

/// A run that was done.
pub struct Done {
    /// What to call it.
    pub name: String,
    /// What it was.
    pub run: Run,
    /// What came of it.
    pub outcome: Outcome,
}

/// The runs of a command: the cluster of its flags, and with `--compare` everything it is compared with.
pub fn plan(config: &SimConfig) -> Result<Vec<Planned>, String> {
    let base = options(config)?;
    let text = config.split.clone().unwrap_or_else(|| {
        let prefill = config.workers.div_ceil(2);
        format!("{prefill}P{}D", config.workers - prefill)
    });
    let name = |options: &Options| {
        let planner = if options.planner { "+planner" } else { "" };
        format!("{}{planner} {text}", options.policy)
    };
    let mut runs = vec![Planned { name: name(&base), choices: choices(&base, &text)? }];
    if config.compare {
        runs.extend(baselines(&base)?);
    }
    for options in runs.iter().flat_map(|run| &run.choices) {
        options.check()?;
    }
    Ok(runs)
}

/// Fixed clusters without a planner, under least load: every split and every chunk in the order at hand, and
/// half and half in order of arrival, by least load and in turn.
pub fn baselines(base: &Options) -> Result<Vec<Planned>, String> {
    let fixed = Options { policy: "least-loaded".into(), planner: false, ..base.clone() };
    let mut runs = Vec::new();
    for split in splits(base.workers).into_iter().chain(CHUNKS.map(Split::Mixed)) {
        runs.push(Planned {
            name: format!("least-loaded {split}"),
            choices: vec![Options { split, ..fixed.clone() }],
        });
    }
    let half = base.workers.div_ceil(2);
    for policy in ["least-loaded", "round-robin"] {
        if base.workers > 1 {
            let split = Split::Roles(half, base.workers - half);
            let options = Options { split, order: Order::Arrival, policy: policy.into(), ..fixed.clone() };
            runs.push(Planned { name: format!("{policy} {split} by arrival"), choices: vec![options] });
        }
    }
    Ok(runs)
}

/// Every split with at least one worker of each role.
pub fn splits(workers: usize) -> Vec<Split> {
    (1..workers).map(|prefill| Split::Roles(prefill, workers - prefill)).collect()
}

fn choices(base: &Options, text: &str) -> Result<Vec<Options>, String> {
    let of = |split| Options { split, ..base.clone() };
    Ok(match text {
        "best-fixed" => splits(base.workers).into_iter().map(of).collect(),
        "best-mixed" => CHUNKS.map(Split::Mixed).into_iter().map(of).collect(),
        other => vec![of(other.parse()?)],
    })
}

/// Does them, one after another, and shows how far it is.
pub fn run(runs: &[Planned], scenario: &Scenario, config: &SimConfig) -> Result<Vec<Done>, String> {
    let bar = Bar::new(runs.iter().map(|run| run.choices.len()).sum());
    let mut guess = scenario.guess(config.workers);
    let mut done = Vec::new();
    for planned in runs {
        let best = match config.find_scale {
            Some(target) => {
                let found = best_scale(planned, scenario, target, guess, &bar)?;
                guess = if found.1 > 0.0 { found.1 } else { guess };
                found
            }
            None => best_at(planned, scenario, config.scale, &bar)?,
        };
        let (options, scale) = best;
        let outcome = tandem_simulator::run(options, &scenario.workload(scale.max(1e-9)))?;
        done.push(Done { name: planned.name.clone(), run: named(options, scale), outcome });
    }
    bar.end();
    Ok(done)
}

/// The choice that carries most, and how much.
pub fn best_scale<'a>(
    planned: &'a Planned,
    scenario: &Scenario,
    target: f64,
    guess: f64,
    bar: &Bar,
) -> Result<(&'a Options, f64), String> {
    let first = planned.choices.first().ok_or("there is no such split")?;
    let mut best = (first, 0.0);
    for options in &planned.choices {
        bar.step(&format!("{} {}", planned.name, options.split));
        let holds =
            |scale: f64| tandem_simulator::holds(options, &scenario.workload(scale), target).unwrap_or(false);
        // Whoever does not hold a little more than the best so far is not it.
        if best.1 > 0.0 && !holds(best.1 * 1.005) {
            continue;
        }
        let guess = if best.1 > 0.0 { best.1 } else { guess };
        let scale = search::highest_scale(holds, 0.01, guess);
        if scale > best.1 {
            best = (options, scale);
        }
    }
    Ok(best)
}

fn best_at<'a>(
    planned: &'a Planned,
    scenario: &Scenario,
    scale: f64,
    bar: &Bar,
) -> Result<(&'a Options, f64), String> {
    let mut best = (planned.choices.first().ok_or("there is no such split")?, -1.0);
    for options in &planned.choices {
        bar.step(&format!("{} {}", planned.name, options.split));
        if planned.choices.len() == 1 {
            break;
        }
        let attainment = tandem_simulator::run(options, &scenario.workload(scale))?.attainment();
        if attainment > best.1 {
            best = (options, attainment);
        }
    }
    Ok((best.0, scale))
}

fn named(options: &Options, scale: f64) -> Run {
    Run {
        policy: options.policy.clone(),
        planner: options.planner,
        order: if options.order == Order::Deadline { "deadline" } else { "arrival" },
        split: options.split.to_string(),
        seed: options.seed,
        scale,
    }
}
