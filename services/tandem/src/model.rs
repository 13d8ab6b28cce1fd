//! Finds the checkpoint that `--model` names; `demo` is the one that comes with Tandem.

use std::path::{Path, PathBuf};

/// Folder of the demo model, in the repository and beside an installed binary.
const DEMO: &str = "demo-model";

/// The folder of the checkpoint.
pub fn find(model: &str) -> Result<PathBuf, String> {
    if model != "demo" {
        let dir = PathBuf::from(model);
        return match dir.canonicalize() {
            Ok(dir) if dir.is_dir() => Ok(dir),
            _ => Err(format!("--model {model}: no such directory (a Hugging Face checkpoint, or `demo`)")),
        };
    }
    if let Some(named) = std::env::var_os("TANDEM_DEMO_MODEL") {
        return Ok(PathBuf::from(named));
    }
    let program = std::env::current_exe().unwrap_or_default();
    let here = std::env::current_dir().unwrap_or_default();
    let installed = program.ancestors().map(|dir| dir.join("share/tandem"));
    let nearby = program.ancestors().chain(here.ancestors()).map(Path::to_path_buf);
    let found =
        nearby.chain(installed).map(|dir| dir.join(DEMO)).find(|dir| dir.join("config.json").is_file());
    found.ok_or_else(|| {
        "the demo model was not found near this program or the current directory; \
         name a checkpoint with --model DIR, or the demo's folder in TANDEM_DEMO_MODEL"
            .to_owned()
    })
}
