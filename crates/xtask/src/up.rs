//! `cargo xtask up`: builds the cluster in release and becomes it.

use std::env;
use std::os::unix::process::CommandExt;
use std::process::Command;

use crate::workspace;

/// Replaces this process by `tandem up ARGS`, so that Ctrl-C and the exit code are its own. Returns only when
/// that did not come about.
pub fn up(arguments: &[String]) -> Result<(), String> {
    let arguments = arguments.strip_prefix(&["--".to_owned()]).unwrap_or(arguments);
    let build = ["build", "--release", "--package=tandem", "--features=etcd", "--bin=tandem"];
    let target = workspace::read()?.target;
    let status = workspace::cargo()
        .env("PROTOC", workspace::protoc(&target)?)
        .args(build)
        .status()
        .map_err(|error| format!("cannot run cargo: {error}"))?;
    if !status.success() {
        return Err("tandem does not build".to_owned());
    }
    let program = target.join("release/tandem");
    let mut tandem = Command::new(&program);
    tandem.arg("up").args(arguments);
    // What cargo tells this program about itself is not for the cluster.
    for (name, _) in env::vars_os().filter(|(name, _)| name.to_string_lossy().starts_with("CARGO_")) {
        tandem.env_remove(name);
    }
    Err(format!("cannot start {}: {}", program.display(), tandem.exec()))
}
