//! The workspace as `cargo metadata` describes it.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::{env, fs, io};

use serde_json::Value;

/// The members, everything they depend on, and where things lie.
pub struct Workspace {
    /// Folder of the workspace's manifest.
    pub root: PathBuf,
    /// Folder of build outputs.
    pub target: PathBuf,
    /// Members and all that is linked into them on this platform, with every feature on.
    pub packages: Vec<Package>,
}

/// Features that tests are built with.
const TEST_FEATURES: &[&str] = &["etcd", "tls-tests"];

/// One version of one package.
#[derive(Clone, Debug, Default)]
pub struct Package {
    pub name: String,
    pub version: String,
    /// Expression as in its manifest.
    pub licence: Option<String>,
    /// Folder relative to the workspace's root; `None` for packages from outside.
    pub folder: Option<String>,
    pub features: Vec<String>,
    pub dependencies: Vec<Dependency>,
}

/// An edge to another package, by its index in [`Workspace::packages`].
#[derive(Clone, Debug)]
pub struct Dependency {
    pub package: usize,
    /// Linked into the product, not only into its tests or its build script.
    pub linked: bool,
    /// Not only for tests.
    pub beyond_tests: bool,
}

/// The folder of the workspace's manifest.
pub fn root() -> PathBuf {
    // Cargo says at run time where this package lies, also after the clone was moved.
    let package = env::var("CARGO_MANIFEST_DIR").unwrap_or_else(|_| env!("CARGO_MANIFEST_DIR").to_owned());
    let package = PathBuf::from(package);
    package.ancestors().nth(2).expect("this package lies two folders below the root").to_owned()
}

/// The cargo that runs this, or the one on the path.
pub fn cargo() -> Command {
    let mut cargo = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    cargo.current_dir(root());
    // Cargo describes this package to this process; to the cargo below it, that would describe a build script.
    for (name, _) in env::vars_os() {
        let name = name.to_string_lossy();
        if name.starts_with("CARGO_PKG_") || name.starts_with("CARGO_MANIFEST_") {
            cargo.env_remove(name.as_ref());
        }
    }
    cargo
}

/// The triple of this machine, as the compiler names it.
pub fn host() -> Result<String, String> {
    let rustc = env::var_os("RUSTC").unwrap_or_else(|| "rustc".into());
    let output =
        Command::new(rustc).arg("-vV").output().map_err(|error| format!("cannot run rustc: {error}"))?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let host = text.lines().find_map(|line| line.strip_prefix("host: "));
    host.map(str::to_owned).ok_or_else(|| "rustc names no host".to_owned())
}

/// A copy of this program for build scripts that want a `protoc`. To be made before cargo builds anything: a
/// build replaces this program, and then it no longer finds itself.
pub fn protoc(target: &Path) -> Result<PathBuf, String> {
    let copy = target.join("xtask/protoc");
    let made = || -> io::Result<()> {
        let program = fs::read(env::current_exe()?)?;
        if fs::read(&copy).is_ok_and(|old| old == program) {
            return Ok(());
        }
        fs::create_dir_all(target.join("xtask"))?;
        // In one step: another cargo may be running the old one.
        let fresh = target.join(format!("xtask/protoc-{}", std::process::id()));
        fs::copy(env::current_exe()?, &fresh)?;
        fs::rename(&fresh, &copy)
    };
    made().map_err(|error| format!("cannot write {}: {error}", copy.display()))?;
    Ok(copy)
}

/// Asks cargo, for the platform of this machine.
pub fn read() -> Result<Workspace, String> {
    let version = output(Command::new(env::var_os("RUSTC").unwrap_or_else(|| "rustc".into())).arg("-vV"))?;
    let host =
        version.lines().find_map(|line| line.strip_prefix("host: ")).unwrap_or("x86_64-unknown-linux-gnu");
    let arguments = ["metadata", "--format-version=1", "--all-features", "--filter-platform", host];
    let text = output(cargo().args(arguments))?;
    let value: Value = serde_json::from_str(&text).map_err(|error| format!("cargo metadata: {error}"))?;
    from_metadata(&value).ok_or_else(|| "cargo metadata does not look as expected".to_owned())
}

fn output(command: &mut Command) -> Result<String, String> {
    let program = command.get_program().to_string_lossy().into_owned();
    let output = command.output().map_err(|error| format!("cannot run {program}: {error}"))?;
    if !output.status.success() {
        return Err(format!("{program} failed:\n{}", String::from_utf8_lossy(&output.stderr).trim()));
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

fn from_metadata(value: &Value) -> Option<Workspace> {
    let root = PathBuf::from(value["workspace_root"].as_str()?);
    let nodes = value["resolve"]["nodes"].as_array()?;
    let index: HashMap<&str, usize> =
        nodes.iter().enumerate().filter_map(|(at, node)| Some((node["id"].as_str()?, at))).collect();
    let mut packages = vec![Package::default(); nodes.len()];
    for described in value["packages"].as_array()? {
        let Some(&at) = index.get(described["id"].as_str()?) else { continue };
        let outside = !described["source"].is_null();
        let folder = Path::new(described["manifest_path"].as_str()?).parent()?;
        packages[at] = Package {
            name: described["name"].as_str()?.to_owned(),
            version: described["version"].as_str()?.to_owned(),
            licence: described["license"].as_str().map(str::to_owned),
            folder: if outside {
                None
            } else {
                Some(folder.strip_prefix(&root).ok()?.to_string_lossy().into_owned())
            },
            features: described["features"].as_object()?.keys().cloned().collect(),
            dependencies: Vec::new(),
        };
    }
    for (at, node) in nodes.iter().enumerate() {
        for dependency in node["deps"].as_array()? {
            let has = |wanted: &[&str]| {
                let kinds = dependency["dep_kinds"].as_array();
                kinds.is_some_and(|kinds| {
                    kinds.iter().any(|kind| wanted.contains(&kind["kind"].as_str().unwrap_or("")))
                })
            };
            packages[at].dependencies.push(Dependency {
                package: *index.get(dependency["pkg"].as_str()?)?,
                linked: has(&[""]),
                beyond_tests: has(&["", "build"]),
            });
        }
    }
    Some(Workspace { target: PathBuf::from(value["target_directory"].as_str()?), root, packages })
}

impl Workspace {
    /// The packages of this repository.
    pub fn members(&self) -> impl Iterator<Item = &Package> {
        self.packages.iter().filter(|package| package.folder.is_some())
    }

    /// `PACKAGE/FEATURE` for each feature of a member that a plain build leaves out and tests need, joined for
    /// `--features`.
    pub fn test_features(&self) -> String {
        let wanted = |feature: &&String| TEST_FEATURES.contains(&feature.as_str());
        let of = |package: &Package| {
            let name = package.name.clone();
            let features: Vec<String> = package.features.iter().filter(wanted).cloned().collect();
            features.into_iter().map(move |feature| format!("{name}/{feature}"))
        };
        self.members().flat_map(of).collect::<Vec<_>>().join(",")
    }

    /// Everything linked into `package`, itself excluded.
    pub fn linked_into(&self, package: &Package) -> Vec<&Package> {
        let mut seen = vec![false; self.packages.len()];
        let mut waiting: Vec<&Dependency> = package.dependencies.iter().filter(|edge| edge.linked).collect();
        while let Some(edge) = waiting.pop() {
            if !std::mem::replace(&mut seen[edge.package], true) {
                waiting.extend(self.packages[edge.package].dependencies.iter().filter(|edge| edge.linked));
            }
        }
        self.packages.iter().zip(seen).filter_map(|(package, seen)| seen.then_some(package)).collect()
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn metadata_becomes_packages_and_edges() {
        let package = |name: &str, source: Value| {
            json!({"id": name, "name": name, "version": "1.0.0", "license": "MIT", "source": source,
                   "manifest_path": format!("/w/crates/{name}/Cargo.toml"), "features": {"etcd": []}})
        };
        let value = json!({
            "workspace_root": "/w", "target_directory": "/w/target",
            "packages": [package("c", json!("registry")), package("a", Value::Null), package("b", Value::Null)],
            "resolve": {"nodes": [
                {"id": "a", "deps": [{"pkg": "b", "dep_kinds": [{"kind": null}]}, {"pkg": "c", "dep_kinds": [{"kind": "dev"}]}]},
                {"id": "b", "deps": [{"pkg": "c", "dep_kinds": [{"kind": "dev"}, {"kind": "build"}]}]},
                {"id": "c", "deps": []},
            ]},
        });
        let workspace = from_metadata(&value).unwrap();
        let names =
            |packages: Vec<&Package>| packages.iter().map(|package| package.name.clone()).collect::<Vec<_>>();
        assert_eq!(names(workspace.members().collect()), ["a", "b"]);
        assert_eq!(names(workspace.linked_into(&workspace.packages[0])), ["b"]);
        assert_eq!(workspace.packages[0].folder.as_deref(), Some("crates/a"));
        assert!(workspace.packages[1].dependencies[0].beyond_tests);
        assert_eq!(workspace.test_features(), "a/etcd,b/etcd");
        assert!(from_metadata(&json!({})).is_none());
    }

    #[test]
    fn this_workspace_is_read() {
        let workspace = read().unwrap();
        assert!(workspace.members().any(|package| package.name == "xtask"));
        assert!(workspace.root.join("Cargo.toml").is_file());
    }
}
