//! The API against OpenAI's published document, by schemathesis.

use std::process::Command;

use tandem_integration_tests::{Spec, TestCluster, checkpoints, skip};

use crate::support::{run, sdk};

/// Cases where `TANDEM_SCHEMATHESIS` names no other number: what takes well under half a minute.
const CASES: u32 = 120;
const SEED: u32 = 20_261_125;

#[test]
fn schemathesis_finds_no_server_error_and_no_violation_of_openapi() {
    let variable = "TANDEM_SCHEMATHESIS_PYTHON";
    let Some(python) = std::env::var_os(variable) else {
        return skip::skip(&format!("{variable} is not set; `cargo xtask test` makes what it names"));
    };
    let cases = std::env::var("TANDEM_SCHEMATHESIS")
        .map_or(CASES, |cases| cases.parse().expect("TANDEM_SCHEMATHESIS is a number of cases"));
    run(async {
        let cluster = TestCluster::start(Spec::of(checkpoints::demo())).await;
        let mut command = Command::new(python);
        command.arg(sdk::folder().join("schema.py")).arg(format!("{}/v1", cluster.api.url()));
        command.arg(cases.to_string()).arg(SEED.to_string());
        println!("{}", sdk::finished(command).await);
        cluster.wait_until_idle().await;
        cluster.close().await;
    });
}
