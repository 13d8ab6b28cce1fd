//! `cargo xtask fuzz`: builds the fuzzer with counters in its code and runs its targets beside each other.
//!
//! The counters are LLVM's own pass, which a stable compiler takes too, so nothing but a C++ compiler is needed:
//! libFuzzer is C++.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use crate::tools;
use crate::workspace::{self, Workspace};

/// The targets, each with what it tries.
const TARGETS: &[(&str, &str)] = &[
    ("body", "bodies of every endpoint"),
    ("sse", "answers written as events"),
    ("detokenizer", "tokens that come one by one"),
    ("template", "messages and arguments of chat templates"),
    ("checkpoint", "configurations and headers of weights"),
];

/// What the lane of `cargo xtask test` gives each target.
pub const LANE_SECONDS: u64 = 60;

const CHECKPOINT: &str = "integration-tests/checkpoints/qwen3";

/// Bytes of an input, at most.
const INPUT_BYTES: u32 = 8192;

/// The targets, one a line.
pub fn targets() -> String {
    TARGETS.iter().map(|(name, what)| format!("  {name:<12} {what}\n")).collect()
}

/// What to run.
#[derive(Debug, PartialEq, Eq)]
struct Options {
    targets: Vec<&'static str>,
    seconds: u64,
}

/// Reads `[TARGET...] [--seconds N]`.
fn options(arguments: &[String]) -> Result<Options, String> {
    let mut options = Options { targets: Vec::new(), seconds: LANE_SECONDS };
    let mut arguments = arguments.iter();
    while let Some(argument) = arguments.next() {
        if argument == "--seconds" {
            let seconds = arguments.next().and_then(|text| text.parse().ok()).filter(|seconds| *seconds > 0);
            options.seconds = seconds.ok_or("--seconds takes how long to run each target, such as 60")?;
            continue;
        }
        let Some((name, _)) = TARGETS.iter().find(|(name, _)| name == argument) else {
            let names: Vec<&str> = TARGETS.iter().map(|(name, _)| *name).collect();
            return Err(format!("there is no target `{argument}`: it is one of {}", names.join(", ")));
        };
        options.targets.push(name);
    }
    if options.targets.is_empty() {
        options.targets = TARGETS.iter().map(|(name, _)| *name).collect();
    }
    Ok(options)
}

/// The command.
pub fn fuzz(arguments: &[String]) -> Result<(), String> {
    let options = options(arguments)?;
    let workspace = workspace::read()?;
    tools::cxx()?;
    let protoc = workspace::protoc(&workspace.target)?;
    for line in run(&workspace, &protoc, &options.targets, options.seconds, None)? {
        println!("{line}");
    }
    Ok(())
}

/// Runs every target for so long, the same way each time; one line per target that held, or what broke which.
pub fn run_all(workspace: &Workspace, protoc: &Path) -> Result<Vec<String>, String> {
    let names: Vec<&str> = TARGETS.iter().map(|(name, _)| *name).collect();
    run(workspace, protoc, &names, LANE_SECONDS, Some(1))
}

/// `seed`: that of libFuzzer's draws; another one each time without it.
fn run(
    workspace: &Workspace,
    protoc: &Path,
    targets: &[&str],
    seconds: u64,
    seed: Option<u32>,
) -> Result<Vec<String>, String> {
    let program = build(workspace, protoc)?;
    let started: Vec<Result<Run, String>> =
        targets.iter().map(|target| Run::start(workspace, &program, target, seconds, seed)).collect();
    let (mut lines, mut broken) = (Vec::new(), Vec::new());
    for run in started {
        match run.and_then(Run::end) {
            Ok(line) => lines.push(line),
            Err(why) => broken.push(why),
        }
    }
    if broken.is_empty() { Ok(lines) } else { Err(broken.join("\n")) }
}

/// Builds into a folder of its own: the flags are those of every crate.
fn build(workspace: &Workspace, protoc: &Path) -> Result<PathBuf, String> {
    let host = workspace::host()?;
    let flags = [
        "-Cpasses=sancov-module",
        "-Cllvm-args=-sanitizer-coverage-level=4",
        "-Cllvm-args=-sanitizer-coverage-inline-8bit-counters",
        "-Cllvm-args=-sanitizer-coverage-pc-table",
        "-Cllvm-args=-sanitizer-coverage-trace-compares",
    ];
    let folder = workspace.target.join("fuzz");
    eprintln!("building the fuzzer");
    let mut cargo = workspace::cargo();
    // A target makes the flags apply to the program alone, not to build scripts.
    cargo.args(["build", "--package=tandem-fuzz", "--features=libfuzzer", "--profile=fuzz", "--quiet"]);
    cargo.arg("--target").arg(&host).arg("--target-dir").arg(&folder);
    cargo.env("RUSTFLAGS", flags.join(" ")).env("PROTOC", protoc);
    match cargo.status() {
        Ok(status) if status.success() => Ok(folder.join(host).join("fuzz/tandem-fuzz")),
        Ok(_) => Err("the fuzzer does not build".to_owned()),
        Err(error) => Err(format!("cannot run cargo: {error}")),
    }
}

/// A target that runs.
struct Run {
    name: String,
    child: Child,
    log: PathBuf,
    broken: PathBuf,
}

impl Run {
    fn start(
        workspace: &Workspace,
        program: &Path,
        name: &str,
        seconds: u64,
        seed: Option<u32>,
    ) -> Result<Run, String> {
        let folder = workspace.target.join("fuzz").join(name);
        let (corpus, broken) = (folder.join("corpus"), folder.join("broken"));
        // What an earlier run has found would make this one another.
        if seed.is_some() && corpus.exists() {
            fs::remove_dir_all(&corpus).map_err(|error| format!("{}: {error}", corpus.display()))?;
        }
        for folder in [&corpus, &broken] {
            fs::create_dir_all(folder).map_err(|error| format!("{}: {error}", folder.display()))?;
        }
        let log = folder.join("log");
        let file = File::create(&log).map_err(|error| format!("{}: {error}", log.display()))?;
        let copy = file.try_clone().map_err(|error| error.to_string())?;
        eprintln!("{name}: {seconds} s, log in {}", log.display());
        let child = Command::new(program)
            .arg(&corpus)
            .arg(workspace.root.join("fuzz/seeds").join(name))
            .arg(format!("-max_total_time={seconds}"))
            .arg(format!("-max_len={INPUT_BYTES}"))
            .arg(format!("-artifact_prefix={}/", broken.display()))
            .arg(format!("-seed={}", seed.unwrap_or(0)))
            .args(["-timeout=10", "-rss_limit_mb=2048", "-print_final_stats=1"])
            .env("TANDEM_FUZZ", name)
            .env("TANDEM_FUZZ_MODEL", workspace.root.join(CHECKPOINT))
            .stdin(Stdio::null())
            .stdout(file)
            .stderr(copy)
            .spawn()
            .map_err(|error| format!("{}: {error}", program.display()))?;
        Ok(Run { name: name.to_owned(), child, log, broken })
    }

    /// How it went, once it has ended.
    fn end(mut self) -> Result<String, String> {
        let status = self.child.wait().map_err(|error| format!("{}: {error}", self.name))?;
        let log = String::from_utf8_lossy(&fs::read(&self.log).unwrap_or_default()).into_owned();
        if status.success() {
            return Ok(line(&self.name, &log));
        }
        let lines: Vec<&str> = log.lines().collect();
        let end = lines[lines.len().saturating_sub(40)..].join("\n");
        Err(format!("{end}\n{} broke; the input stands in {}", self.name, self.broken.display()))
    }
}

/// What a log says about its whole run: inputs that were tried, and what is covered.
fn line(name: &str, log: &str) -> String {
    let inputs = log.lines().find_map(|line| line.strip_prefix("stat::number_of_executed_units:"));
    let words = log.lines().rev().find(|line| line.contains(" cov: ")).map(|line| line.split_whitespace());
    let covered = words.and_then(|words| words.skip_while(|word| *word != "cov:").nth(1));
    format!("{name:<12} {:>12} inputs, {:>6} places", inputs.map_or("?", str::trim), covered.unwrap_or("?"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(words: &[&str]) -> Result<Options, String> {
        options(&words.iter().map(|word| (*word).to_owned()).collect::<Vec<_>>())
    }

    #[test]
    fn options_name_targets_that_exist() {
        assert_eq!(read(&["sse", "--seconds", "5"]), Ok(Options { targets: vec!["sse"], seconds: 5 }));
        assert_eq!(read(&[]).map(|options| options.targets.len()), Ok(TARGETS.len()));
        assert!(read(&["sses"]).unwrap_err().contains("body, sse"));
        assert!(read(&["--seconds", "0"]).unwrap_err().contains("such as 60"));
    }

    #[test]
    fn every_target_has_seeds_and_every_folder_of_seeds_a_target() {
        let seeds = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fuzz/seeds");
        let folders =
            seeds.read_dir().expect("seeds are committed").map(|entry| entry.expect("a folder").path());
        let filled = folders.filter(|folder| folder.read_dir().is_ok_and(|mut seeds| seeds.next().is_some()));
        let mut found: Vec<String> =
            filled.map(|folder| folder.file_name().expect("a name").to_string_lossy().into_owned()).collect();
        let mut known: Vec<&str> = TARGETS.iter().map(|(name, _)| *name).collect();
        found.sort();
        known.sort();
        assert_eq!(found, known);
    }

    #[test]
    fn the_line_of_a_run_says_what_was_tried() {
        let log = "#2 INITED cov: 12 ft: 13\n#900 DONE   cov: 120 ft: 130 corp: 4\n\
                   stat::number_of_executed_units: 900\n";
        assert_eq!(line("sse", log), "sse                   900 inputs,    120 places");
    }
}
