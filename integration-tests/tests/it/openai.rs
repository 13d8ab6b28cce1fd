//! The openai Python package, unmodified, against a real cluster.

use std::path::Path;
use std::process::Command;

use tandem_integration_tests::{Spec, TestCluster, checkpoints, skip};

use crate::support::run;

#[test]
fn the_openai_package_works_unmodified() {
    let Some(python) = std::env::var_os("TANDEM_PYTHON") else {
        return skip::skip("TANDEM_PYTHON names no Python with openai; `cargo xtask test` makes one");
    };
    run(async {
        let cluster = TestCluster::start(Spec::of(checkpoints::demo())).await;
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/it/openai_client.py");
        let (address, model) = (cluster.address.to_string(), cluster.model.clone());
        let output = tokio::task::spawn_blocking(move || {
            Command::new(python)
                .arg(script)
                .arg(format!("http://{address}/v1"))
                .arg(model)
                .output()
                .expect("it runs")
        });
        let output = output.await.expect("the runner lives");
        let said =
            format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        assert!(output.status.success(), "{said}");
        println!("{said}");
        cluster.wait_until_idle().await;
        cluster.close().await;
    });
}
