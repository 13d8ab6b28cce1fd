//! `cargo xtask test`: prepares what tests need, builds once, runs lane after lane, and says how it went.

use std::env;
use std::fs::{self, File};
use std::io::{IsTerminal, Write, stderr};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use crate::fuzz;
use crate::tools::{self, Tool};
use crate::workspace;

/// Tests that need the same things. A test belongs to a lane by a word in its name.
#[derive(Debug)]
struct Lane {
    name: &'static str,
    what: &'static str,
    kind: Kind,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    /// Every test that belongs to no lane with a tool.
    Rest,
    /// The tests whose name contains the lane's, which need this tool.
    Needs(Tool),
    /// The model of hand-offs. A build of its own: its feature is to be on nowhere else.
    Model,
    /// The fuzzer's targets. A build of its own too: there are counters in all of its code.
    Fuzz,
    /// Examples in the documentation.
    Doc,
}

const LANES: &[Lane] = &[
    Lane { name: "rust", what: "everything that needs Rust and nothing else", kind: Kind::Rest },
    Lane {
        name: "etcd",
        what: "tests with `etcd` in their name: a real etcd server",
        kind: Kind::Needs(Tool::Etcd),
    },
    Lane {
        name: "openai",
        what: "tests with `openai` in their name: the Python package against a cluster",
        kind: Kind::Needs(Tool::Python),
    },
    Lane {
        name: "nodejs",
        what: "tests with `nodejs` in their name: openai's Node package against a cluster",
        kind: Kind::Needs(Tool::Node),
    },
    Lane {
        name: "schemathesis",
        what: "tests with `schemathesis` in their name: OpenAI's document (TANDEM_SCHEMATHESIS=2000 cases)",
        kind: Kind::Needs(Tool::Schemathesis),
    },
    Lane {
        name: "model",
        what: "hand-offs in every order of events (TANDEM_MODEL=full takes the full bounds)",
        kind: Kind::Model,
    },
    Lane {
        name: "fuzz",
        what: "each fuzz target for a minute (`cargo xtask fuzz` runs them longer)",
        kind: Kind::Fuzz,
    },
    Lane { name: "doc", what: "examples in the documentation", kind: Kind::Doc },
];

/// How a lane went.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Outcome {
    Passed(u64),
    Failed,
    Skipped(String),
}

/// What to run.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Options {
    /// Only tests whose name contains this.
    pub filter: Option<String>,
    /// Only this lane.
    pub lane: Option<String>,
    /// So often in a row, until something fails; 0 is once.
    pub times: u32,
}

/// The lanes with what they hold, one a line.
pub fn lanes() -> String {
    LANES.iter().map(|lane| format!("  {:<12} {}\n", lane.name, lane.what)).collect()
}

/// Reads `[FILTER] [--lane NAME] [--times N]`.
pub fn options(arguments: &[String]) -> Result<Options, String> {
    let mut options = Options::default();
    let mut arguments = arguments.iter();
    while let Some(argument) = arguments.next() {
        if argument == "--times" {
            let times = arguments.next().and_then(|times| times.parse().ok()).filter(|times| *times > 0);
            options.times = times.ok_or("--times takes how often to run the tests, such as 20")?;
            continue;
        }
        let lane = match argument.strip_prefix("--lane") {
            Some("") => Some(arguments.next().cloned().unwrap_or_default()),
            Some(value) => value.strip_prefix('=').map(str::to_owned),
            None => None,
        };
        match lane {
            Some(lane) if LANES.iter().any(|known| known.name == lane) => options.lane = Some(lane),
            Some(lane) => {
                let names: Vec<&str> = LANES.iter().map(|lane| lane.name).collect();
                return Err(format!("there is no lane `{lane}`: it is one of {}", names.join(", ")));
            }
            None if argument.starts_with('-') => {
                return Err(format!("unknown option `{argument}`: there are `--lane NAME` and `--times N`"));
            }
            None if options.filter.is_some() => {
                return Err(format!("one filter at a time, not also `{argument}`"));
            }
            None => options.filter = Some(argument.clone()),
        }
    }
    Ok(options)
}

/// Runs the lanes and prints the table.
pub fn test(options: &Options) -> Result<(), String> {
    let workspace = workspace::read()?;
    let logs = workspace.target.join("xtask");
    fs::create_dir_all(&logs).map_err(|error| format!("{}: {error}", logs.display()))?;
    let mut runner = Runner {
        features: workspace.test_features(),
        environment: vec![("TANDEM_BIN".into(), workspace.target.join("debug/tandem"))],
        nextest: workspace::cargo()
            .args(["nextest", "--version"])
            .output()
            .is_ok_and(|it| it.status.success()),
        filter: options.filter.clone(),
        logs,
        protoc: workspace::protoc(&workspace.target)?,
    };
    let started = now();
    eprintln!("building all tests");
    runner.build()?;
    let mut table = vec![("build", Outcome::Passed(0), started.elapsed())];
    for round in 1..options.times {
        eprintln!("round {round} of {}", options.times);
        lanes_once(options, &workspace, &mut runner, &mut table)?;
        if table.iter().any(|(_, outcome, _)| *outcome == Outcome::Failed) {
            break;
        }
        table.truncate(1);
    }
    if table.len() == 1 {
        lanes_once(options, &workspace, &mut runner, &mut table)?;
    }
    eprint!("\n{}", render(&table));
    verdict(&table, env::var("CI").is_ok_and(|value| value == "true"))
}

type Table = Vec<(&'static str, Outcome, Duration)>;

/// Runs each lane once.
fn lanes_once(
    options: &Options,
    workspace: &workspace::Workspace,
    runner: &mut Runner,
    table: &mut Table,
) -> Result<(), String> {
    for lane in LANES.iter().filter(|lane| options.lane.as_ref().is_none_or(|only| only == lane.name)) {
        let started = now();
        eprintln!("lane {}: {}", lane.name, lane.what);
        let prepared = match lane.kind {
            Kind::Needs(tool) => {
                tool.prepare(&workspace.root, &workspace.target).map(|program| Some((tool, program)))
            }
            Kind::Fuzz => tools::cxx().map(|()| None),
            Kind::Rest | Kind::Model | Kind::Doc => Ok(None),
        };
        let outcome = match prepared {
            Ok(_) if lane.kind == Kind::Fuzz => fuzzed(workspace, &runner.protoc, options.filter.is_some()),
            Ok(tool) => {
                runner.environment.extend(tool.map(|(tool, program)| (tool.variable().to_owned(), program)));
                runner.lane(lane)?
            }
            Err(missing) => Outcome::Skipped(missing),
        };
        table.push((lane.name, outcome, started.elapsed()));
    }
    Ok(())
}

/// Runs the fuzzer's targets, which no filter names.
fn fuzzed(workspace: &workspace::Workspace, protoc: &Path, filtered: bool) -> Outcome {
    if filtered {
        return Outcome::Passed(0);
    }
    match fuzz::run_all(workspace, protoc) {
        Ok(lines) => {
            eprintln!("{}", lines.join("\n"));
            Outcome::Passed(lines.len() as u64)
        }
        Err(why) => {
            eprintln!("{why}");
            Outcome::Failed
        }
    }
}

#[allow(clippy::disallowed_methods)] // a tool on its own, not part of a cluster that is simulated
fn now() -> Instant {
    Instant::now()
}

struct Runner {
    features: String,
    environment: Vec<(String, PathBuf)>,
    nextest: bool,
    filter: Option<String>,
    logs: PathBuf,
    protoc: PathBuf,
}

impl Runner {
    fn cargo(&self) -> Command {
        let mut cargo = workspace::cargo();
        cargo.env("PROTOC", &self.protoc);
        cargo
    }

    /// Builds libraries, programs and tests in one go, so that no lane builds anything again.
    fn build(&self) -> Result<(), String> {
        let mut cargo = self.cargo();
        cargo.args(["build", "--workspace", "--all-targets", "--features", &self.features]);
        if !stderr().is_terminal() {
            cargo.arg("--quiet");
        }
        match cargo.status() {
            Ok(status) if status.success() => Ok(()),
            Ok(_) => Err("the tests do not build".to_owned()),
            Err(error) => Err(format!("cannot run cargo: {error}")),
        }
    }

    /// Runs one lane into a log of its own; shows of it what went wrong.
    fn lane(&self, lane: &Lane) -> Result<Outcome, String> {
        let path = self.logs.join(format!("{}.log", lane.name));
        let unwritten = |error: std::io::Error| format!("{}: {error}", path.display());
        let log = File::create(&path).map_err(unwritten)?;
        let mut cargo = self.cargo();
        cargo.args(arguments(lane, &self.features, self.filter.as_deref(), self.nextest));
        cargo.env("CARGO_TERM_COLOR", "never").envs(self.environment.iter().map(|(name, path)| (name, path)));
        for variable in unset(&self.environment) {
            cargo.env_remove(variable);
        }
        let status = to_log(cargo, log)?;
        let text = fs::read(&path).map_err(unwritten)?;
        let text = String::from_utf8_lossy(&text);
        if status {
            return Ok(judged(lane, count(&text), self.filter.is_some()));
        }
        let _ = stderr().write_all(what_matters(&text).as_bytes());
        eprintln!("lane {} failed; all of it stands in {}", lane.name, path.display());
        Ok(Outcome::Failed)
    }
}

/// A lane with a tool for which no test asks has lost its tests: they were renamed or never written.
fn judged(lane: &Lane, tests: u64, filtered: bool) -> Outcome {
    match lane.kind {
        Kind::Needs(_) if tests == 0 && !filtered => {
            Outcome::Skipped(format!("no test has `{}` in its name", lane.name))
        }
        _ => Outcome::Passed(tests),
    }
}

/// The tools' variables that this run did not set: a leftover of the caller's must not make a test run.
fn unset(environment: &[(String, PathBuf)]) -> Vec<&'static str> {
    let all = Tool::ALL.map(Tool::variable);
    all.into_iter().filter(|variable| environment.iter().all(|(name, _)| name != variable)).collect()
}

fn to_log(mut command: Command, log: File) -> Result<bool, String> {
    let copy = log.try_clone().map_err(|error| error.to_string())?;
    let status = command.stdin(std::process::Stdio::null()).stdout(log).stderr(copy).status();
    status.map(|status| status.success()).map_err(|error| format!("cannot run cargo: {error}"))
}

/// What cargo is told for a lane.
fn arguments(lane: &Lane, features: &str, filter: Option<&str>, nextest: bool) -> Vec<String> {
    let own = |text: &str| text.to_owned();
    let words = || LANES.iter().filter(|lane| matches!(lane.kind, Kind::Needs(_))).map(|lane| lane.name);
    let mut arguments: Vec<String> = Vec::new();
    if lane.kind == Kind::Model {
        arguments.extend(["test", "--package", "tandem-kv-cache", "--test", "model"].map(own));
        arguments.extend(["--features", "tandem-kv-cache/model", "--", "--nocapture"].map(own));
        arguments.extend(filter.map(own));
        return arguments;
    }
    if nextest && lane.kind != Kind::Doc {
        arguments.extend(["nextest", "run", "--workspace", "--no-fail-fast", "--no-tests=pass"].map(own));
        arguments
            .extend(["--status-level=fail", "--final-status-level=fail", "--features", features].map(own));
        let expression = match lane.kind {
            Kind::Needs(_) => format!("test({})", lane.name),
            _ => format!(
                "not ({})",
                words().map(|word| format!("test({word})")).collect::<Vec<_>>().join(" | ")
            ),
        };
        arguments.extend([own("--filterset"), expression]);
        arguments.extend(filter.map(own));
        return arguments;
    }
    arguments.extend(["test", "--workspace", "--no-fail-fast", "--features", features].map(own));
    match lane.kind {
        Kind::Doc => arguments.extend(["--doc", "--"].map(own)),
        _ => arguments.extend(["--lib", "--bins", "--tests", "--"].map(own)),
    }
    match (lane.kind, filter) {
        // The test harness runs what matches any of its filters, so a filter stands alone. What it finds beyond
        // this lane then runs twice; that is better than not at all.
        (_, Some(filter)) => arguments.push(own(filter)),
        (Kind::Needs(_), None) => arguments.push(own(lane.name)),
        (_, None) => {}
    }
    if lane.kind != Kind::Doc {
        let others = words().filter(|word| *word != lane.name);
        arguments.extend(others.flat_map(|word| [own("--skip"), own(word)]));
    }
    arguments
}

/// How many tests a log reports as passed.
fn count(log: &str) -> u64 {
    let number_before = |line: &str, word: &str| {
        let end = line.find(word)?;
        line[..end].trim_end().rsplit([' ', ':']).next()?.parse::<u64>().ok()
    };
    let reports = log
        .lines()
        .filter(|line| ["test result:", "tests run:", "test run:"].iter().any(|word| line.contains(word)));
    reports.filter_map(|line| number_before(line, " passed")).sum()
}

/// A log without the lines about what went well, and not more than fits on some screens.
fn what_matters(log: &str) -> String {
    const LINES_MAX: usize = 300;
    let dull = |line: &str| {
        let line = line.trim();
        line.is_empty()
            || (line.starts_with("test ") && line.ends_with(" ok"))
            || (line.starts_with("running ") && (line.ends_with(" tests") || line.ends_with(" test")))
            || line.starts_with("test result: ok")
            || ["Running ", "Doc-tests ", "Compiling ", "Finished ", "PASS "]
                .iter()
                .any(|word| line.starts_with(word))
    };
    let lines: Vec<&str> = log.lines().filter(|line| !dull(line)).collect();
    let start = lines.len().saturating_sub(LINES_MAX);
    lines[start..].iter().map(|line| format!("{line}\n")).collect()
}

fn render(table: &[(&str, Outcome, Duration)]) -> String {
    let mut text = format!("{:<12} {:>8}  {}\n", "lane", "seconds", "result");
    for (name, outcome, took) in table {
        let result = match outcome {
            Outcome::Passed(0) if *name == "build" => "passed".to_owned(),
            Outcome::Passed(0) => "nothing to run".to_owned(),
            Outcome::Passed(tests) => format!("passed, {tests} tests"),
            Outcome::Failed => "FAILED".to_owned(),
            Outcome::Skipped(why) => format!("skipped: {why}"),
        };
        text += &format!("{name:<12} {:>8.1}  {result}\n", took.as_secs_f64());
    }
    text
}

/// Whether the run as a whole is good: in CI a skipped lane is a failure, and nothing that ran nothing is good.
fn verdict(table: &[(&str, Outcome, Duration)], ci: bool) -> Result<(), String> {
    let names = |wanted: fn(&Outcome) -> bool| {
        let found: Vec<&str> =
            table.iter().filter(|(_, outcome, _)| wanted(outcome)).map(|(name, ..)| *name).collect();
        (!found.is_empty()).then(|| found.join(", "))
    };
    if let Some(failed) = names(|outcome| *outcome == Outcome::Failed) {
        return Err(format!("failed: {failed}"));
    }
    if let Some(skipped) = names(|outcome| matches!(outcome, Outcome::Skipped(_))).filter(|_| ci) {
        return Err(format!("skipped, which CI=true forbids: {skipped}"));
    }
    if !table.iter().any(|(_, outcome, _)| matches!(outcome, Outcome::Passed(tests) if *tests > 0)) {
        return Err("no test ran: does the filter match a name?".to_owned());
    }
    Ok(())
}

#[cfg(test)]
mod tests;
