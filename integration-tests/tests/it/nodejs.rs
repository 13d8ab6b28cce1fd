//! OpenAI's Node package, unmodified, against a real cluster.

use crate::support::sdk;

#[test]
fn the_package_for_nodejs_works_unmodified() {
    sdk::passes("TANDEM_NODE", "suite.mjs");
}
