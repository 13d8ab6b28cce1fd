//! What may not stand in a file of the repository.

use std::path::{Path, PathBuf};
use std::{fs, io};

use super::Failure;
use super::dependencies::PURE;

/// Lines in one file, beyond which a second subject has certainly moved in.
const LINES_MAX: usize = 700;

/// A text file of the repository.
pub struct File {
    /// Relative to the root, with slashes.
    pub path: String,
    pub text: String,
}

/// A word that may not stand in the code of some files.
struct Word {
    rule: &'static str,
    /// In halves, so that this table does not find itself.
    halves: (&'static str, &'static str),
    applies: fn(&str) -> bool,
    why: &'static str,
}

const WORDS: &[Word] = &[
    Word { rule: "unfinished", halves: ("todo", "!("), applies: rust, why: "write it, or leave it out" },
    Word {
        rule: "unfinished",
        halves: ("unimplement", "ed!("),
        applies: rust,
        why: "write it, or leave it out",
    },
    Word { rule: "unfinished", halves: ("dbg", "!("), applies: rust, why: "was for the moment" },
    Word { rule: "ignored test", halves: ("#[ign", "ore"), applies: rust, why: "a test runs or goes" },
    Word { rule: "pure", halves: ("std::time::", "Instant"), applies: pure, why: "time enters as a value" },
    Word { rule: "pure", halves: ("System", "Time"), applies: pure, why: "time enters as a value" },
    Word { rule: "pure", halves: ("std::", "thread"), applies: pure, why: "pure crates have no threads" },
    Word { rule: "pure", halves: ("thread", "::spawn"), applies: pure, why: "pure crates have no threads" },
    Word { rule: "vendor", halves: ("cu", "da"), applies: models, why: "models know no vendor" },
    Word { rule: "vendor", halves: ("nvi", "dia"), applies: models, why: "models know no vendor" },
    Word { rule: "vendor", halves: ("av", "x512"), applies: models, why: "models know no vendor" },
    Word {
        rule: "seam",
        halves: ("allow(clippy::disallowed_", "methods"),
        applies: outside_the_seam,
        why: "clock, spawn, listen and connect go through tandem_chassis::seam",
    },
    Word {
        rule: "yaml",
        halves: ("serde_", "yaml::"),
        applies: outside_config,
        why: "YAML is read in one module, tandem_chassis::config",
    },
];

fn rust(path: &str) -> bool {
    path.ends_with(".rs")
}

fn pure(path: &str) -> bool {
    let mut folders = PURE.iter().map(|name| format!("crates/{}/src/", name.trim_start_matches("tandem-")));
    rust(path) && folders.any(|folder| path.starts_with(&folder))
}

fn models(path: &str) -> bool {
    rust(path) && path.starts_with("crates/models/src/")
}

fn outside_the_seam(path: &str) -> bool {
    rust(path) && path != "crates/chassis/src/seam.rs" && !path.starts_with("crates/xtask/")
}

fn outside_config(path: &str) -> bool {
    rust(path) && !path.starts_with("crates/chassis/src/config")
}

/// Every text file of the repository that some rule looks at.
pub fn files(root: &Path) -> io::Result<Vec<File>> {
    let mut files = Vec::new();
    let mut folders = vec![PathBuf::new()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(root.join(&folder))? {
            let entry = entry?;
            let path = folder.join(entry.file_name());
            let name = entry.file_name().to_string_lossy().into_owned();
            let kind = entry.file_type()?;
            if kind.is_dir()
                && !name.starts_with('.')
                && !["target", "node_modules", "__pycache__"].contains(&&*name)
            {
                folders.push(path);
            } else if kind.is_file()
                && [".rs", ".py", ".proto", ".sh", "Cargo.toml"].iter().any(|end| name.ends_with(end))
            {
                files.push(File {
                    text: fs::read_to_string(entry.path())?,
                    path: path.to_string_lossy().into_owned(),
                });
            }
        }
    }
    Ok(files)
}

/// All rules about a single file.
pub fn check(file: &File) -> Vec<Failure> {
    if file.path.ends_with("Cargo.toml") {
        return manifest(file);
    }
    let mut failures = Vec::new();
    let lines = file.text.lines().count();
    if lines > LINES_MAX {
        let text = format!("{lines} lines, at most {LINES_MAX}: which second subject moved in?");
        failures.push(Failure { place: file.path.clone(), rule: "length", text });
    }
    let words: Vec<(String, &Word)> = WORDS
        .iter()
        .filter(|word| (word.applies)(&file.path))
        .map(|word| ([word.halves.0, word.halves.1].concat(), word))
        .collect();
    for (number, line) in file.text.lines().enumerate() {
        if line.trim_start().starts_with("//") {
            continue;
        }
        let lower = line.to_lowercase();
        for (text, word) in &words {
            let found =
                if word.rule == "vendor" { lower.contains(text) } else { line.contains(text.as_str()) };
            if found {
                let place = format!("{}:{}", file.path, number + 1);
                failures.push(Failure { place, rule: word.rule, text: format!("`{text}`: {}", word.why) });
            }
        }
    }
    failures
}

/// Every package takes its lints from the workspace.
fn manifest(file: &File) -> Vec<Failure> {
    let mut lines = file.text.lines().map(|line| line.split('#').next().unwrap_or_default().trim());
    let is_package = file.text.lines().any(|line| line.trim() == "[package]");
    let has_lints = lines.any(|line| line == "[lints]")
        && lines.find(|line| !line.is_empty()).is_some_and(|line| line.replace(' ', "") == "workspace=true");
    if !is_package || has_lints {
        return Vec::new();
    }
    let text = "lacks `[lints]` with `workspace = true`".to_owned();
    vec![Failure { place: file.path.clone(), rule: "lints", text }]
}

/// A newcomer finds the two commands in the first file they open.
pub fn check_readme(readme: Option<&str>) -> Vec<Failure> {
    let failure = |text: String| Failure { place: "README.md".to_owned(), rule: "readme", text };
    let Some(readme) = readme else { return vec![failure("is missing".to_owned())] };
    let missing =
        ["cargo xtask up", "cargo xtask test"].into_iter().filter(|command| !readme.contains(command));
    missing.map(|command| failure(format!("does not mention `{command}`"))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(path: &str, text: &str) -> Vec<String> {
        let file = File { path: path.to_owned(), text: text.to_owned() };
        check(&file).iter().map(|failure| format!("{} {}", failure.place, failure.rule)).collect()
    }

    #[test]
    fn each_word_is_found_where_it_may_not_stand() {
        for word in WORDS {
            let text = ["fn f() {\n    ", word.halves.0, word.halves.1, ") }\n"].concat();
            let paths = [
                "crates/kv-cache/src/pool.rs",
                "crates/models/src/arch/llama.rs",
                "services/router/src/lib.rs",
            ];
            let path =
                paths.into_iter().find(|path| (word.applies)(path)).expect("the word concerns some file");
            assert!(found(path, &text).contains(&format!("{path}:2 {}", word.rule)), "{text}");
            assert_eq!(found(path, &text.replace("    ", "    // ")), [""; 0]);
        }
    }

    #[test]
    fn words_are_free_where_they_belong() {
        assert_eq!(found("crates/worker/src/lib.rs", "use std::time::Instant; use std::thread;"), [""; 0]);
        assert_eq!(found("kernels/src/lib.rs", "mod cuda;"), [""; 0]);
        assert_eq!(found("crates/chassis/src/seam.rs", "#![allow(clippy::disallowed_methods)]"), [""; 0]);
        let yaml = ["serde_", "yaml::from_str(&text)"].concat();
        assert_eq!(found("crates/chassis/src/config.rs", &yaml), [""; 0]);
    }

    #[test]
    fn a_long_file_is_listed() {
        assert_eq!(found("a.py", &"x\n".repeat(LINES_MAX)), [""; 0]);
        assert_eq!(found("a.py", &"x\n".repeat(LINES_MAX + 1)), ["a.py length"]);
    }

    #[test]
    fn a_package_without_the_workspace_lints_is_listed() {
        let good = "[package]\nname = \"x\"\n\n[lints]\n# one set for all\nworkspace = true\n";
        assert_eq!(found("crates/x/Cargo.toml", good), [""; 0]);
        assert_eq!(found("Cargo.toml", "[workspace]\n"), [""; 0]);
        for bad in
            ["[package]\n", "[package]\n[lints]\n[dependencies]\nworkspace = true\n", "[package]\n[lints]\n"]
        {
            assert_eq!(found("crates/x/Cargo.toml", bad), ["crates/x/Cargo.toml lints"]);
        }
    }

    #[test]
    fn the_readme_shows_both_commands() {
        assert_eq!(check_readme(Some("run `cargo xtask up`, then `cargo xtask test`")), []);
        assert_eq!(check_readme(Some("cargo xtask up")).len(), 1);
        assert_eq!(check_readme(None)[0].to_string(), "README.md: readme: is missing");
    }

    #[test]
    fn files_are_found_below_the_root_but_not_in_outputs() {
        let files = files(&crate::workspace::root()).unwrap();
        assert!(files.iter().any(|file| file.path == "crates/xtask/src/tidy/sources.rs"));
        assert!(files.iter().all(|file| !file.path.starts_with("target/")));
    }
}
