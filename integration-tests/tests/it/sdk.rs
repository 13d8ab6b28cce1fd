//! The suites of OpenAI's packages, as texts.

use std::collections::BTreeSet;

use crate::support::sdk::checks;

#[test]
fn both_suites_check_the_same_behaviours() {
    let python: BTreeSet<String> =
        checks("suite.py").into_iter().filter(|name| !name.starts_with("async: ")).collect();
    assert_eq!(python, checks("suite.mjs"));
}
