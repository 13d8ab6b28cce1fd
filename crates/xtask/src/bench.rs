//! `cargo xtask bench NAME`: builds a bench in release and becomes it.

use std::os::unix::process::CommandExt;
use std::process::Command;

use crate::workspace;

struct Bench {
    name: &'static str,
    what: &'static str,
    /// The package, the program in it, and the feature that it is left out without.
    package: &'static str,
    program: &'static str,
    feature: &'static str,
}

const BENCHES: &[Bench] = &[Bench {
    name: "transfer",
    what: "every transport against a copy of memory and a raw socket (--quick, --rounds N, --json FILE)",
    package: "tandem-kv-transfer",
    program: "transfer-bench",
    feature: "bench",
}];

/// The benches with what they measure, one a line.
pub fn benches() -> String {
    BENCHES.iter().map(|bench| format!("  {:<8} {}\n", bench.name, bench.what)).collect()
}

/// Returns only when the bench could not be started.
pub fn bench(arguments: &[String]) -> Result<(), String> {
    let names: Vec<&str> = BENCHES.iter().map(|bench| bench.name).collect();
    let wrong = |said: &str| format!("{said}: it is one of {}", names.join(", "));
    let (name, rest) = arguments.split_first().ok_or_else(|| wrong("which bench?"))?;
    let bench = BENCHES.iter().find(|bench| bench.name == name);
    let bench = bench.ok_or_else(|| wrong(&format!("there is no bench `{name}`")))?;
    let target = workspace::read()?.target;
    let status = workspace::cargo()
        .args(["build", "--release", "--package", bench.package, "--bin", bench.program])
        .args(["--features", bench.feature])
        .status()
        .map_err(|error| format!("cannot run cargo: {error}"))?;
    if !status.success() {
        return Err(format!("the bench `{name}` does not build"));
    }
    let program = target.join("release").join(bench.program);
    Err(format!("cannot start {}: {}", program.display(), Command::new(&program).args(rest).exec()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wrong_bench_names_the_right_ones() {
        assert_eq!(bench(&[]).unwrap_err(), "which bench?: it is one of transfer");
        assert!(
            bench(&["speed".to_owned()]).unwrap_err().contains("no bench `speed`: it is one of transfer")
        );
    }
}
