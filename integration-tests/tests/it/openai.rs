//! The openai Python package, unmodified, against a real cluster.

use crate::support::sdk;

#[test]
fn the_openai_package_works_unmodified() {
    sdk::passes("TANDEM_PYTHON", "suite.py");
}
