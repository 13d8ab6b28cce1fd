//! `cargo xtask chaos`: builds the program that runs clusters under faults, and becomes it.

use std::os::unix::process::CommandExt;
use std::process::Command;

use crate::workspace;

/// Replaces this process by `chaos ARGS`, so that its exit code is its own. Returns only when that did not come
/// about.
pub fn chaos(arguments: &[String]) -> Result<(), String> {
    let build = ["build", "--package=tandem-integration-tests", "--bin=chaos"];
    let status =
        workspace::cargo().args(build).status().map_err(|error| format!("cannot run cargo: {error}"))?;
    if !status.success() {
        return Err("the program that runs cases does not build".to_owned());
    }
    let program = workspace::read()?.target.join("debug/chaos");
    let error = Command::new(&program).args(arguments).exec();
    Err(format!("cannot start {}: {error}", program.display()))
}
