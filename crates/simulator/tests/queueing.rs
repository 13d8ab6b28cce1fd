//! The simulator against what queueing theory knows exactly.

use std::time::Duration;

use tandem_batching::pace::Order;
use tandem_placement::predictor::PROFILES;
use tandem_simulator::random::Mersenne;
use tandem_simulator::workload::{Arrival, Workload};
use tandem_simulator::{Options, Split, run};
use tandem_types::{ServiceClass, Time, attention_pairs};

/// Prompt tokens of every request: as many as a step takes, so that each step serves exactly one.
const TOKENS: u32 = 2048;
const REQUESTS: usize = 300_000;

/// One server, constant service, Poisson arrivals (M/D/1): `rho / (2 mu (1 - rho))` seconds of waiting on
/// average. One run of so many requests scatters around it more the higher the load is.
#[test]
fn one_worker_with_constant_work_waits_as_long_as_theory_says() {
    let service = PROFILES[0].step.step(f64::from(TOKENS), attention_pairs(TOKENS, 0), 0.0);
    for (rho, within) in [(0.3, 0.01), (0.5, 0.01), (0.7, 0.015), (0.9, 0.05)] {
        let mut random = Mersenne::new(7);
        let mut at = 0.0;
        let arrivals = (0..REQUESTS).map(|_| {
            at += random.exponential(rho / service);
            let at = Time((at * 1e9) as u64);
            Arrival { at, input: TOKENS, output: 1, class: ServiceClass::Online, blocks: (0, 0) }
        });
        let workload = Workload { arrivals: arrivals.collect(), blocks: Vec::new() };
        let options = Options {
            workers: 1,
            split: Split::Mixed(TOKENS),
            policy: "least-loaded".into(),
            planner: false,
            order: Order::Arrival,
            first_token: Duration::from_secs(3600),
            ..Options::default()
        };
        let outcome = run(&options, &workload).expect("the options are sound");
        assert_eq!(outcome.served.len(), REQUESTS);
        let mean = outcome.served.iter().map(|served| f64::from(served.first)).sum::<f64>() / REQUESTS as f64;
        let (wait, theory) = (mean - service, rho * service / (2.0 * (1.0 - rho)));
        assert!((wait / theory - 1.0).abs() < within, "rho {rho}: {wait} s, theory {theory} s");
    }
}

/// Work comes at a known rate and none of it is lost or done twice, so workers are busy for that share of time.
#[test]
fn workers_are_busy_for_the_share_of_time_that_the_load_asks_for() {
    let service = PROFILES[0].step.step(f64::from(TOKENS), attention_pairs(TOKENS, 0), 0.0);
    let mut random = Mersenne::new(3);
    let mut at = 0.0;
    let arrivals = (0..50_000).map(|_| {
        at += random.exponential(0.6 * 4.0 / service);
        let at = Time((at * 1e9) as u64);
        Arrival { at, input: TOKENS, output: 1, class: ServiceClass::Online, blocks: (0, 0) }
    });
    let workload = Workload { arrivals: arrivals.collect(), blocks: Vec::new() };
    let options = Options {
        workers: 4,
        split: Split::Mixed(TOKENS),
        policy: "round-robin".into(),
        planner: false,
        order: Order::Arrival,
        ..Options::default()
    };
    let outcome = run(&options, &workload).expect("the options are sound");
    let share = outcome.busy_seconds / 4.0 / outcome.ended.as_secs_f64();
    assert!((share / 0.6 - 1.0).abs() < 0.01, "busy for {share} of the time");
}
