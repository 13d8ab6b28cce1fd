//! Real processes under faults: some of what `cargo xtask chaos --level processes` and `--level soak` run.

use tandem_integration_tests::chaos::{processes, soak};

use crate::support::run;

#[test]
fn killed_and_stopped_processes_make_no_answer_wrong_and_leave_nothing() {
    run(async {
        let options = processes::Options { runs: 30, seed: 1, lanes: 3 };
        let table = processes::run(options, &|case, _| println!("{case}")).await.expect("clusters start");
        println!("{table}");
        assert!(table.violations.is_empty(), "{}", table.violations.join("\n"));
    });
}

#[test]
fn fifteen_hundred_requests_a_third_of_them_left_leave_nothing_in_any_process() {
    run(async {
        let options = soak::Options { requests: 1500, seed: 1 };
        let report = soak::run(options, &|| {}).await.expect("a cluster starts");
        println!("{report}");
        assert!(report.violations.is_empty(), "{}", report.violations.join("\n"));
    });
}
