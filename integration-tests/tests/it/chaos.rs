//! A handful of the cases that `cargo xtask chaos --level failpoints` runs by the thousand.

use tandem_integration_tests::chaos::failpoints::{self, Case};

/// Runs the first `count` cases whose number stands for a fail point with one of these beginnings, spread over them.
fn cases(beginnings: &[&str], count: usize) {
    // A step that shares no factor with the number of cells meets all of them in turn.
    let numbers = (1..).map(|index: u64| 3 + index * 31);
    let wanted = numbers.filter(|&number| {
        let point = Case::draw(number).faults[0].point;
        beginnings.iter().any(|beginning| point.starts_with(beginning))
    });
    for number in wanted.take(count) {
        let report = failpoints::run(number);
        let again = failpoints::command(number);
        assert!(report.violations.is_empty(), "{:#?}\nagain: {again}", report.violations);
    }
}

#[test]
fn faults_on_sessions_make_no_answer_wrong_and_leave_nothing() {
    cases(&["session.", "frame."], 12);
}

#[test]
fn faults_while_a_prompt_is_scored_leave_no_score_out_and_none_twice() {
    cases(&["frame.scored"], 12);
}

#[test]
fn faults_in_hand_offs_make_no_answer_wrong_and_leave_nothing() {
    cases(&["follow.", "pull.", "end.", "lend."], 12);
}

#[test]
fn faults_of_engines_make_no_answer_wrong_and_leave_nothing() {
    cases(&["engine."], 6);
}

#[test]
fn a_case_runs_alike_every_time() {
    let (first, second) = (failpoints::run(42), failpoints::run(42));
    assert_eq!(first.ended, second.ended);
    assert_eq!(first.took, second.took);
}
