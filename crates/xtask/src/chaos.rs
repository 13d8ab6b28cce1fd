//! `cargo xtask chaos`: builds the program that runs clusters under faults, and becomes it.

use std::os::unix::process::CommandExt;
use std::process::Command;

use crate::workspace;

/// Replaces this process by `chaos ARGS`, so that its exit code is its own. Returns only when that did not come
/// about.
pub fn chaos(arguments: &[String]) -> Result<(), String> {
    // Virtual time has the checks of a debug build at the speed of its own profile; processes run as they are
    // shipped.
    let processes = arguments.iter().any(|word| ["processes", "soak"].contains(&word.as_str()));
    let mut build = vec!["build", "--package=tandem-integration-tests", "--bin=chaos"];
    if processes {
        build.extend(["--package=tandem", "--bin=tandem", "--release"]);
    } else {
        build.push("--profile=chaos");
    }
    let status =
        workspace::cargo().args(build).status().map_err(|error| format!("cannot run cargo: {error}"))?;
    if !status.success() {
        return Err("the program that runs cases does not build".to_owned());
    }
    let built = workspace::read()?.target.join(if processes { "release" } else { "chaos" });
    let program = built.join("chaos");
    let error = Command::new(&program).args(arguments).env("TANDEM_BIN", built.join("tandem")).exec();
    Err(format!("cannot start {}: {error}", program.display()))
}
