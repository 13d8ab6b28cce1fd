use super::*;

fn given(arguments: &[&str]) -> Result<Options, String> {
    options(&arguments.iter().map(|argument| (*argument).to_owned()).collect::<Vec<_>>())
}

fn lane(name: &str) -> &'static Lane {
    LANES.iter().find(|lane| lane.name == name).unwrap()
}

fn told(name: &str, filter: Option<&str>, nextest: bool) -> String {
    arguments(lane(name), "a/etcd", filter, nextest).join(" ")
}

#[test]
fn options_are_a_filter_and_a_lane() {
    let options = |filter: Option<&str>, lane: Option<&str>| Options {
        filter: filter.map(str::to_owned),
        lane: lane.map(str::to_owned),
        times: 0,
    };
    assert_eq!(given(&[]), Ok(options(None, None)));
    assert_eq!(given(&["lease"]), Ok(options(Some("lease"), None)));
    assert_eq!(given(&["--lane", "etcd", "lease"]), Ok(options(Some("lease"), Some("etcd"))));
    assert_eq!(given(&["--lane=doc"]), Ok(options(None, Some("doc"))));
    let often = given(&["lease", "--times", "20"]).expect("it is right");
    assert_eq!((often.filter.as_deref(), often.times), (Some("lease"), 20));
    assert!(given(&["--times", "0"]).unwrap_err().contains("such as 20"));
}

#[test]
fn a_wrong_option_names_the_right_ones() {
    assert!(
        given(&["--lane", "etc"])
            .unwrap_err()
            .contains("rust, etcd, openai, nodejs, schemathesis, model, fuzz, doc")
    );
    assert!(given(&["--lane"]).unwrap_err().contains("rust, etcd"));
    assert!(given(&["--lanes=etcd"]).unwrap_err().contains("--lane NAME"));
    assert!(given(&["--release"]).unwrap_err().contains("--lane NAME"));
    assert!(given(&["a", "b"]).unwrap_err().contains("one filter"));
}

#[test]
fn every_test_belongs_to_one_lane() {
    assert!(
        told("rust", None, true)
            .ends_with("--filterset not (test(etcd) | test(openai) | test(nodejs) | test(schemathesis))")
    );
    assert!(told("etcd", None, true).ends_with("--filterset test(etcd)"));
    assert!(told("openai", Some("chat"), true).ends_with("--filterset test(openai) chat"));
    assert!(
        told("rust", None, false).ends_with("-- --skip etcd --skip openai --skip nodejs --skip schemathesis")
    );
    assert!(told("etcd", None, false).ends_with("-- etcd --skip openai --skip nodejs --skip schemathesis"));
    assert!(
        told("openai", Some("chat"), false)
            .ends_with("-- chat --skip etcd --skip nodejs --skip schemathesis")
    );
    assert_eq!(told("doc", None, true), told("doc", None, false));
    assert!(told("model", None, true).contains("--package tandem-kv-cache --test model"));
    assert!(told("model", Some("lent"), false).ends_with("-- --nocapture lent"));
    assert!(told("doc", Some("Lease"), true).ends_with("--doc -- Lease"));
}

#[test]
fn passed_tests_are_counted_in_both_formats() {
    let cargo = "test result: ok. 12 passed; 0 failed; 0 ignored\nx\ntest result: ok. 3 passed; 0 failed\n";
    assert_eq!(count("Summary [ 8.445s] 1 test run: 1 passed, 498 skipped"), 1);
    assert_eq!(count(cargo), 15);
    assert_eq!(count("     Summary [   0.5s] 41 tests run: 40 passed, 1 failed, 0 skipped\n"), 40);
    assert_eq!(count("Summary [ 1s] 41 tests run: 41 passed (2 slow), 3 skipped"), 41);
    assert_eq!(count("nothing here"), 0);
}

#[test]
fn a_failed_log_shows_what_went_wrong() {
    let log = "running 2 tests\ntest a ... ok\ntest b ... FAILED\n\nfailures:\n  left: 1\ntest result: FAILED. 1 passed\n";
    assert_eq!(what_matters(log), "test b ... FAILED\nfailures:\n  left: 1\ntest result: FAILED. 1 passed\n");
    assert_eq!(what_matters(&"boom\n".repeat(1000)).lines().count(), 300);
}

#[test]
fn a_skipped_lane_fails_only_in_ci() {
    let second = Duration::from_secs(1);
    let passed = ("rust", Outcome::Passed(7), second);
    let skipped = ("etcd", Outcome::Skipped("the etcd server is missing".to_owned()), second);
    let failed = ("doc", Outcome::Failed, second);
    assert_eq!(verdict(std::slice::from_ref(&passed), true), Ok(()));
    let table = [passed.clone(), skipped.clone()];
    assert_eq!(verdict(&table, false), Ok(()));
    assert!(verdict(&table, true).unwrap_err().contains("etcd"));
    assert!(verdict(&[passed, failed], false).unwrap_err().contains("doc"));
    assert!(verdict(&[("rust", Outcome::Passed(0), second)], false).unwrap_err().contains("no test ran"));
    let shown = render(&table);
    assert!(
        shown.contains("rust              1.0  passed, 7 tests")
            && shown.contains("skipped: the etcd server"),
        "{shown}"
    );
}

#[test]
fn variables_of_tools_that_are_missing_do_not_reach_the_tests() {
    let others = ["TANDEM_PYTHON", "TANDEM_NODE", "TANDEM_SCHEMATHESIS_PYTHON"];
    assert_eq!(unset(&[]), [&["TANDEM_ETCD"], &others[..]].concat());
    assert_eq!(unset(&[("TANDEM_ETCD".to_owned(), PathBuf::from("/usr/bin/etcd"))]), others);
}

#[test]
fn a_lane_that_lost_its_tests_says_so() {
    assert!(matches!(judged(lane("etcd"), 0, false), Outcome::Skipped(_)));
    assert_eq!(judged(lane("etcd"), 0, true), Outcome::Passed(0));
    assert_eq!(judged(lane("etcd"), 3, false), Outcome::Passed(3));
    assert_eq!(judged(lane("doc"), 0, false), Outcome::Passed(0));
    let second = Duration::from_secs(1);
    assert!(render(&[("doc", Outcome::Passed(0), second)]).contains("nothing to run"));
}
