//! `cargo xtask tidy`: the rules of the layout that a compiler does not know. One line per failure.

use std::fmt;
use std::path::Path;

use crate::workspace::{self, Workspace};

mod dependencies;
mod licences;
mod sources;

/// One breach of one rule.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Failure {
    /// File relative to the root, with the line where that helps.
    pub place: String,
    /// Name of the rule.
    pub rule: &'static str,
    /// What is wrong and why it matters.
    pub text: String,
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}: {}", self.place, self.rule, self.text)
    }
}

/// Checks everything and prints each failure.
pub fn tidy() -> Result<(), String> {
    let workspace = workspace::read()?;
    let failures = failures(&workspace)?;
    for failure in &failures {
        eprintln!("{failure}");
    }
    match failures.len() {
        0 => {
            println!("tidy: {} packages and their sources keep the rules", workspace.members().count());
            Ok(())
        }
        1 => Err("tidy: 1 failure".to_owned()),
        count => Err(format!("tidy: {count} failures")),
    }
}

fn failures(workspace: &Workspace) -> Result<Vec<Failure>, String> {
    let mut failures = dependencies::check(workspace);
    failures.extend(licences::check(workspace));
    for file in sources::files(&workspace.root).map_err(|error| error.to_string())? {
        failures.extend(sources::check(&file));
    }
    failures.extend(sources::check_readme(read(&workspace.root, "README.md").as_deref()));
    failures.sort();
    failures.dedup();
    Ok(failures)
}

fn read(root: &Path, name: &str) -> Option<String> {
    std::fs::read_to_string(root.join(name)).ok()
}
