//! Who may depend on whom. Dependencies that only tests have are free: tests may look inside.

use super::Failure;
use crate::workspace::{Package, Workspace};

/// Crates whose decisions take values and return values.
pub const PURE: &[&str] = &["tandem-types", "tandem-kv-cache", "tandem-batching", "tandem-placement"];

/// `who` may not depend on any of `what`.
struct Rule {
    name: &'static str,
    who: Who,
    what: &'static [&'static str],
    /// Also through others.
    deep: bool,
    why: &'static str,
}

enum Who {
    Only(&'static [&'static str]),
    AllBut(&'static [&'static str]),
    /// Neither one of these nor a package that speaks gRPC itself.
    AllButGrpcAnd(&'static [&'static str]),
}

const HTTP: &[&str] = &["tandem-integration-tests", "tandem-router", "tandem-chassis", "tandem"];

const RULES: &[Rule] = &[
    Rule {
        name: "pure",
        who: Who::Only(PURE),
        what: &[
            "tokio",
            "mio",
            "async-std",
            "smol",
            "rand",
            "fastrand",
            "getrandom",
            "crossbeam-channel",
            "rayon",
            "tandem-chassis",
        ],
        deep: true,
        why: "pure crates are handed time and randomness as values, so that whole clusters run in virtual time",
    },
    Rule {
        name: "kernels",
        who: Who::AllBut(&["tandem-engine"]),
        what: &["tandem-kernels"],
        deep: false,
        why: "only the engine names kernels; everybody else sees the operations of `device`",
    },
    Rule {
        name: "cuda",
        who: Who::AllBut(&["tandem-kernels", "tandem-device", "tandem-memory"]),
        what: &["cudarc", "cust", "cuda-driver-sys", "cuda-runtime-sys"],
        deep: false,
        why: "only kernels, device and memory touch CUDA",
    },
    Rule {
        name: "vendor",
        who: Who::Only(&["tandem-models"]),
        what: &["tandem-kernels", "tandem-engine", "cudarc"],
        deep: true,
        why: "models are data and know no vendor",
    },
    Rule {
        name: "http",
        who: Who::AllBut(HTTP),
        what: &["axum", "tower-http", "reqwest", "ureq"],
        deep: false,
        why: "HTTP is spoken by the router, the chassis and the command line; use the chassis's admin port",
    },
    Rule {
        name: "http",
        who: Who::AllButGrpcAnd(HTTP),
        what: &["hyper", "hyper-util"],
        deep: false,
        why: "HTTP is spoken by the router, the chassis, the command line and the gRPC stack",
    },
    Rule {
        name: "bottom",
        who: Who::Only(&["tandem-memory", "tandem-device"]),
        what: &["tandem-kv-transfer", "tandem-engine", "tandem-kv-cache", "tandem-chassis"],
        deep: true,
        why: "memory and device lie below everything that moves or computes",
    },
    Rule {
        name: "transfer",
        who: Who::Only(&["tandem-kv-transfer"]),
        what: &["tandem-kv-cache", "tandem-engine", "tandem-models"],
        deep: true,
        why: "a transport moves bytes and never interprets them",
    },
];

/// Packages of which two versions would meet at an interface.
const ONE_VERSION: &[&str] = &["tonic", "prost", "axum", "hyper", "http", "rustls"];

/// All rules of this file.
pub fn check(workspace: &Workspace) -> Vec<Failure> {
    let mut failures = Vec::new();
    for package in workspace.members() {
        failures.extend(RULES.iter().flat_map(|rule| breaches(workspace, package, rule)));
        failures.extend(on_services(workspace, package));
    }
    failures.extend(versions(workspace));
    failures
}

fn breaches(workspace: &Workspace, package: &Package, rule: &Rule) -> Vec<Failure> {
    let name = package.name.as_str();
    let direct = || {
        package
            .dependencies
            .iter()
            .filter(|edge| edge.beyond_tests)
            .map(|edge| &workspace.packages[edge.package])
    };
    let concerned = match rule.who {
        Who::Only(names) => names.contains(&name),
        Who::AllBut(names) => !names.contains(&name),
        Who::AllButGrpcAnd(names) => !names.contains(&name) && !direct().any(|found| found.name == "tonic"),
    };
    if !concerned {
        return Vec::new();
    }
    let reached: Vec<&Package> = if rule.deep { workspace.linked_into(package) } else { direct().collect() };
    let forbidden = reached.into_iter().filter(|found| rule.what.contains(&found.name.as_str()));
    forbidden
        .map(|found| failure(package, rule.name, format!("depends on `{}`: {}", found.name, rule.why)))
        .collect()
}

/// Libraries do not know which service they stand in. Only the command line and the tests name services.
fn on_services(workspace: &Workspace, package: &Package) -> Vec<Failure> {
    let in_services =
        |package: &Package| package.folder.as_ref().is_some_and(|folder| folder.starts_with("services"));
    if ["tandem", "tandem-integration-tests", "tandem-fuzz"].contains(&package.name.as_str()) {
        return Vec::new();
    }
    let direct = package
        .dependencies
        .iter()
        .filter(|edge| edge.beyond_tests)
        .map(|edge| &workspace.packages[edge.package]);
    direct
        .filter(|found| in_services(found))
        .map(|found| {
            let why = "only `tandem` starts services; share through a crate instead";
            failure(package, "services", format!("depends on the service `{}`: {why}", found.name))
        })
        .collect()
}

fn versions(workspace: &Workspace) -> Vec<Failure> {
    let mut failures = Vec::new();
    for name in ONE_VERSION {
        let found: Vec<&str> = workspace
            .packages
            .iter()
            .filter(|package| package.name == *name)
            .map(|package| package.version.as_str())
            .collect();
        if found.len() > 1 {
            let text =
                format!("`{name}` in versions {}: their types would not fit together", found.join(" and "));
            failures.push(Failure { place: "Cargo.lock".to_owned(), rule: "one version", text });
        }
    }
    failures
}

fn failure(package: &Package, rule: &'static str, text: String) -> Failure {
    let folder = package.folder.as_deref().unwrap_or_default();
    Failure { place: format!("{folder}/Cargo.toml"), rule, text }
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use super::*;
    use crate::workspace::Dependency;

    /// A workspace from lines of the form `folder/name: dependency dependency`; `(name)` is for tests only, and
    /// names without a line come from outside.
    fn workspace(lines: &[&str]) -> Workspace {
        let mut packages: Vec<Package> = Vec::new();
        for line in lines {
            let path = line.split(':').next().unwrap();
            let name = path.rsplit('/').next().unwrap().to_owned();
            packages.push(Package { name, folder: Some(path.to_owned()), ..Package::default() });
        }
        for (at, line) in lines.iter().enumerate() {
            for word in line.split(':').nth(1).unwrap().split_whitespace() {
                let name = word.trim_matches(['(', ')']);
                let package = packages.iter().position(|package| package.name == name).unwrap_or_else(|| {
                    packages.push(Package { name: name.to_owned(), ..Package::default() });
                    packages.len() - 1
                });
                let beyond_tests = !word.starts_with('(');
                packages[at].dependencies.push(Dependency { package, linked: beyond_tests, beyond_tests });
            }
        }
        Workspace { root: PathBuf::new(), target: PathBuf::new(), packages }
    }

    fn found(lines: &[&str]) -> Vec<String> {
        check(&workspace(lines)).iter().map(|failure| format!("{} {}", failure.place, failure.rule)).collect()
    }

    #[test]
    fn what_the_layout_allows_passes() {
        let lines = [
            "crates/tandem-types: serde",
            "crates/tandem-kv-cache: tandem-types blake3 (tokio)",
            "crates/tandem-chassis: axum hyper tokio",
            "crates/tandem-engine: tandem-kernels",
            "kernels/tandem-kernels: tandem-device cudarc",
            "crates/tandem-device: tandem-memory",
            "crates/tandem-memory: libc",
            "crates/tandem-worker: tandem-engine tandem-chassis tonic hyper-util",
            "services/tandem-router: axum tandem-chassis",
            "services/tandem: tandem-router tandem-worker hyper",
            "integration-tests/tandem-integration-tests: (tandem-kernels) (axum) tandem-router",
        ];
        assert_eq!(found(&lines), [""; 0]);
    }

    #[test]
    fn each_rule_finds_its_breach() {
        for (lines, expected) in [
            (
                &["crates/tandem-batching: helper", "crates/helper: tokio"][..],
                "crates/tandem-batching/Cargo.toml pure",
            ),
            (&["crates/tandem-types: rand"], "crates/tandem-types/Cargo.toml pure"),
            (&["crates/tandem-worker: tandem-kernels"], "crates/tandem-worker/Cargo.toml kernels"),
            (&["crates/tandem-engine: cudarc"], "crates/tandem-engine/Cargo.toml cuda"),
            (
                &["crates/tandem-models: x", "crates/x: tandem-engine"],
                "crates/tandem-models/Cargo.toml vendor",
            ),
            (&["crates/tandem-worker: axum tonic"], "crates/tandem-worker/Cargo.toml http"),
            (&["crates/tandem-cluster: hyper"], "crates/tandem-cluster/Cargo.toml http"),
            (&["crates/tandem-memory: tandem-chassis"], "crates/tandem-memory/Cargo.toml bottom"),
            (
                &["crates/tandem-kv-transfer: tandem-kv-cache"],
                "crates/tandem-kv-transfer/Cargo.toml transfer",
            ),
            (
                &["crates/tandem-worker: tandem-router", "services/tandem-router: serde"],
                "crates/tandem-worker/Cargo.toml services",
            ),
        ] {
            assert_eq!(found(lines), [expected], "{lines:?}");
        }
    }

    #[test]
    fn a_second_version_is_found() {
        let mut workspace = workspace(&["crates/tandem-proto: tonic"]);
        let version =
            |version: &str| Package { name: "tonic".into(), version: version.into(), ..Package::default() };
        workspace.packages[1] = version("0.14.9");
        assert_eq!(check(&workspace), []);
        workspace.packages.push(version("0.12.0"));
        let failures = check(&workspace);
        assert_eq!(failures.len(), 1);
        assert!(
            failures[0]
                .to_string()
                .starts_with("Cargo.lock: one version: `tonic` in versions 0.14.9 and 0.12.0")
        );
    }
}
