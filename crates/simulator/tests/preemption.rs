//! What placement leaves free in KV pools.

use tandem_simulator::scenario::Scenario;
use tandem_simulator::{Options, Split, run};

/// Answers of a thousand tokens and more than memory holds: who is preempted is computed twice. Where pools are filled
/// to 0.98 by choice it is one request in nine.
#[test]
fn sequences_find_room_to_grow_in_pools_that_are_full() {
    let scenario = Scenario::read("shift", 0.0, None, 1).expect("it is committed");
    let workload = scenario.workload(1.05);
    let options = Options { workers: 2, split: Split::Roles(1, 1), planner: false, ..Options::default() };
    let outcome = run(&options, &workload).expect("the options are sound");
    let late = 1.0 - outcome.attainment();
    assert!(late > 0.05, "{late} of the requests are late: memory is not full");
    assert!(
        outcome.preempted * 200 < outcome.requests as u64,
        "{} of {}",
        outcome.preempted,
        outcome.requests
    );
}
