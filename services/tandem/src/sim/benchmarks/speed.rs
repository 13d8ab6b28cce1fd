//! How fast the simulator itself is.

use tandem_chassis::seam;
use tandem_simulator::{Options, Split, run};

use super::{Bench, Case, spread, table};

const WORKERS: usize = 1000;
const REQUESTS: f64 = 1_000_000.0;
/// Requests per second and worker: about two thirds of what Azure Conv allows.
const PER_WORKER: f64 = 20.0;

pub fn speed(bench: &Bench) -> Result<String, String> {
    let case = Case::new("Azure Conv lengths", "azure2023_conv", 1000, 50);
    let mut rows = Vec::new();
    for policy in ["cost", "least-loaded"] {
        let (mut seconds, mut rates, mut attained) = (Vec::new(), Vec::new(), Vec::new());
        for round in 0..bench.rounds {
            bench.bar.step(&format!("speed, round {}: {policy}", round + 1));
            let mut scenario = bench.scenario(&case, round)?.expect("its trace is committed");
            scenario.draw_for(REQUESTS / (WORKERS as f64 * PER_WORKER));
            let workload = scenario.workload(WORKERS as f64 * PER_WORKER);
            let options = Options {
                workers: WORKERS,
                split: Split::Roles(WORKERS / 2, WORKERS / 2),
                policy: policy.to_owned(),
                planner: policy == "cost",
                seed: round as u64 + 1,
                ..Options::default()
            };
            let begin = seam::now();
            let outcome = run(&options, &workload)?;
            let took = seam::now().since(begin).as_secs_f64();
            seconds.push(took);
            rates.push(outcome.requests as f64 / took);
            attained.push(outcome.attainment());
        }
        let met = if seconds.iter().all(|took| *took < 120.0) { "met" } else { "missed" };
        rows.push(vec![
            policy.to_owned(),
            spread(seconds, 1),
            format!("under 120: {met}"),
            spread(rates, 0),
            spread(attained, 3),
        ]);
    }
    let head = ["policy", "seconds on one core", "goal", "requests a second", "attained"];
    Ok(format!(
        "### Speed of the simulator: {WORKERS} workers, {REQUESTS:.0} requests\n\n{}",
        table(&head, &rows)
    ))
}
