//! What is left of the ratios when nothing is exact, and how often roles change when nothing changes.

use std::time::Duration;

use tandem_simulator::{Options, run};

use super::carried::{shift_cases, target_cases};
use super::{ATTAINED, Bench, Carried, Case, median, spread, table, verdict};
use crate::sim::runs::{self, Planned};

/// Noise of steps, age of views, and predictors that are so much too high or too low.
const NOISE: f64 = 0.1;
const STALE: Duration = Duration::from_secs(1);
const BIASES: [f64; 2] = [0.2, -0.2];

/// Seconds of steady load, and the shares of what is carried at which flips are counted.
const STEADY_SECONDS: f64 = 1800.0;
const STEADY_LOADS: [f64; 4] = [0.3, 0.6, 0.8, 0.95];

pub fn flaws(bench: &Bench) -> Result<String, String> {
    let mut rows = Vec::new();
    for case in target_cases().into_iter().chain(shift_cases()).filter(|case| bench.wants(&case.label())) {
        let clean = bench.carried(&case, |options| options)?.expect("its trace is committed");
        for bias in BIASES {
            let flawed =
                bench.carried(&case, |options| Options { noise: NOISE, stale: STALE, bias, ..options });
            let flawed = flawed?.expect("its trace is committed");
            let to_best = kept(&clean, &flawed, |r| r.ours / r.best());
            let to_half = kept(&clean, &flawed, |r| r.ours / r.half);
            rows.push(vec![
                case.label(),
                format!("{:+.0} %", bias * 100.0),
                spread(flawed.iter().map(|r| r.ours), 2),
                spread(flawed.iter().map(|r| r.best()), 2),
                spread(to_best.iter().copied(), 3),
                spread(to_half.iter().copied(), 3),
                verdict(median(&to_best).min(median(&to_half)), 0.9),
            ]);
        }
    }
    let head = [
        "load, targets",
        "bias",
        "ours",
        "best",
        "ours / best, over the same without flaws",
        "ours / 4P4D by arrival, over the same without flaws",
        "goal",
    ];
    let steady = steady(bench)?;
    if rows.is_empty() {
        return Ok(steady);
    }
    Ok(format!(
        "### Noise, stale views, wrong predictors\n\nSteps vary by {:.0} %, views are {} s old, predictors are wrong by \
         the bias, for all alike.\n\n{}\n{steady}",
        NOISE * 100.0,
        STALE.as_secs(),
        table(&head, &rows),
    ))
}

/// Per round, what is left of a ratio.
fn kept(clean: &[Carried], flawed: &[Carried], ratio: fn(&Carried) -> f64) -> Vec<f64> {
    clean.iter().zip(flawed).map(|(clean, flawed)| ratio(flawed) / ratio(clean)).collect()
}

fn steady(bench: &Bench) -> Result<String, String> {
    let case = Case::new("Azure Conv lengths, Poisson", "azure2023_conv", 1000, 50);
    if !bench.wants(&case.label()) {
        return Ok(String::new());
    }
    let mut flips = vec![Vec::new(); STEADY_LOADS.len()];
    for round in 0..bench.rounds {
        let mut scenario = bench.scenario(&case, round)?.expect("its trace is committed");
        scenario.draw_for(STEADY_SECONDS);
        let options = Options { seed: round as u64 + 1, ..Options::default() };
        let planned = Planned { name: "steady load".to_owned(), choices: vec![options.clone()] };
        let guess = scenario.guess(options.workers);
        let (_, carried) = runs::best_scale(&planned, &scenario, ATTAINED, guess, &bench.bar)?;
        for (load, flips) in STEADY_LOADS.iter().zip(&mut flips) {
            bench.bar.step(&format!("steady load, round {}: {load}", round + 1));
            let outcome = run(&options, &scenario.workload(carried * load))?;
            flips.push(outcome.flips as f64 / options.workers as f64 / (STEADY_SECONDS / 3600.0));
        }
    }
    let rows = STEADY_LOADS.iter().zip(&flips).map(|(load, flips)| {
        let most = flips.iter().copied().fold(0.0, f64::max);
        let met = if most <= 6.0 { "met" } else { "missed" };
        vec![format!("{load:.2}"), spread(flips.iter().copied(), 2), format!("at most 6: {met}")]
    });
    let head = ["share of the load that is carried", "flips per worker and hour", "goal"];
    Ok(format!(
        "### Flips on steady load\n\n{}, half an hour, 1 s/50 ms:\n\n{}",
        case.name,
        table(&head, &rows.collect::<Vec<_>>())
    ))
}
