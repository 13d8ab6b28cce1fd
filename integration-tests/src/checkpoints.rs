//! Where the small checkpoints and the demo model lie.

use std::path::{Path, PathBuf};

/// The folder of this crate.
fn here() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// A committed checkpoint with reference outputs.
pub fn named(name: &str) -> PathBuf {
    let dir = here().join("checkpoints").join(name);
    assert!(dir.join("config.json").is_file(), "{} is committed", dir.display());
    dir
}

/// Every committed checkpoint that has reference outputs.
pub fn with_references() -> Vec<PathBuf> {
    let mut dirs: Vec<PathBuf> = std::fs::read_dir(here().join("checkpoints"))
        .expect("checkpoints are committed")
        .map(|entry| entry.expect("a readable folder").path())
        .filter(|dir| dir.join("reference/cases.json").is_file())
        .collect();
    dirs.sort();
    assert!(!dirs.is_empty(), "checkpoints are committed");
    dirs
}

/// The demo model.
pub fn demo() -> PathBuf {
    here().parent().expect("the workspace").join("demo-model")
}
