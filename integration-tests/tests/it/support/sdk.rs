//! Runs the suites of OpenAI's client packages in `sdk/` against a cluster of the demo model.

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::Command;

use tandem_integration_tests::{Spec, TestCluster, checkpoints, skip};

use super::run;

/// Checks that a suite has at least.
const CHECKS_MIN: usize = 60;

/// Runs a suite by the program that a variable names. It must pass, leave nothing behind in the cluster, and have
/// run as many checks as stand in it.
pub fn passes(variable: &str, suite: &str) {
    let Some(program) = std::env::var_os(variable) else {
        return skip::skip(&format!(
            "{variable} is not set; `cargo xtask test` finds or makes what it names"
        ));
    };
    let script = folder().join(suite);
    run(async {
        let cluster = TestCluster::start(Spec::of(checkpoints::demo())).await;
        let mut command = Command::new(&program);
        // The folder of the tool's environment, where Node finds its packages.
        command.current_dir(program_folder(&program)).arg(script);
        command.arg(format!("{}/v1", cluster.api.url())).arg(cluster.admin.url());
        let said = finished(command).await;
        println!("{said}");
        let checks = checks(suite).len();
        let all = format!("{checks} of {checks} checks passed");
        assert!(said.contains(&all), "not `{all}`:\n{said}");
        cluster.wait_until_idle().await;
        cluster.close().await;
    });
}

/// Of `folder/bin/program`, the folder.
fn program_folder(program: &OsStr) -> PathBuf {
    let folder = Path::new(program).parent().and_then(Path::parent);
    folder.expect("a program in the folder bin of an environment").to_owned()
}

/// What a program said; it must have ended well.
pub async fn finished(mut command: Command) -> String {
    let output = tokio::task::spawn_blocking(move || command.output().expect("it runs"));
    let output = output.await.expect("the runner lives");
    let text = [output.stdout.as_slice(), output.stderr.as_slice()].map(String::from_utf8_lossy).concat();
    assert!(output.status.success(), "{}:\n{text}", output.status);
    text
}

/// Where suites stand.
pub fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/it/sdk")
}

/// The names of a suite's checks.
///
/// # Panics
/// If a name is there twice, or there are too few.
pub fn checks(suite: &str) -> BTreeSet<String> {
    // Of a suite in two files, the second has its name with `_faults`.
    let (stem, kind) = suite.rsplit_once('.').expect("a file of a language");
    let read = |file: &Path| std::fs::read_to_string(file).expect("it is committed");
    let mut text = read(&folder().join(suite));
    let second = folder().join(format!("{stem}_faults.{kind}"));
    if second.exists() {
        text.push_str(&read(&second));
    }
    let quoted = |line: &str| {
        let call = line.strip_prefix('@').unwrap_or(line).strip_prefix("check(\"")?;
        Some(call.split_once('"')?.0.to_owned())
    };
    let names: Vec<String> = text.lines().filter_map(quoted).collect();
    let different: BTreeSet<String> = names.iter().cloned().collect();
    assert!(names.len() == different.len(), "{suite} has a name twice");
    assert!(different.len() >= CHECKS_MIN, "{suite} has {} checks", different.len());
    different
}
