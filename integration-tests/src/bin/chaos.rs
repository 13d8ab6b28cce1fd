//! Runs cases of clusters under faults and prints what came of them; `cargo xtask chaos` builds and calls it.

use std::io::{IsTerminal, Write};
use std::process::ExitCode;
use std::sync::atomic::{AtomicU64, Ordering};

use tandem_integration_tests::chaos::{failpoints, processes, soak};

const USAGE: &str = "chaos --level failpoints|processes [--runs N] [--seed S] [--lanes N] [--verbose]
       chaos --level soak [--requests N] [--seed S]";

/// What is asked for.
struct Options {
    level: String,
    runs: u64,
    requests: u64,
    seed: u64,
    lanes: u64,
    verbose: bool,
}

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    match read(&arguments) {
        Ok(options) => match options.level.as_str() {
            "processes" => in_processes(processes(&options)),
            "soak" => in_processes(soak(&options)),
            _ => failpoints(&options),
        },
        Err(why) => {
            eprintln!("{why}\nusage: {USAGE}");
            ExitCode::FAILURE
        }
    }
}

fn read(arguments: &[String]) -> Result<Options, String> {
    let level = "failpoints".to_owned();
    let mut options = Options { level, runs: 204, requests: 100_000, seed: 1, lanes: 3, verbose: false };
    let mut words = arguments.iter();
    while let Some(word) = words.next() {
        let mut value = || words.next().ok_or_else(|| format!("{word} needs a value"));
        let number =
            |text: &String| text.parse::<u64>().map_err(|_| format!("{word} {text} is not a whole number"));
        match word.as_str() {
            "--level" => match value()?.as_str() {
                level @ ("failpoints" | "processes" | "soak") => options.level = level.to_owned(),
                other => {
                    return Err(format!("there is no level {other:?}; it is failpoints, processes or soak"));
                }
            },
            "--requests" => options.requests = number(value()?)?,
            "--lanes" => options.lanes = number(value()?)?,
            "--runs" => options.runs = number(value()?)?,
            "--seed" => options.seed = number(value()?)?,
            "--verbose" => options.verbose = true,
            other => return Err(format!("there is no option {other}")),
        }
    }
    Ok(options)
}

/// Runs the cases numbered from the seed on.
fn failpoints(options: &Options) -> ExitCode {
    let log = if options.verbose { "info" } else { "off" };
    let telemetry = tandem_chassis::telemetry::Options { log: Some(log.into()), otlp_endpoint: None };
    let _telemetry = tandem_chassis::telemetry::init_with("chaos", &telemetry);
    let mut table = failpoints::Table::default();
    for done in 0..options.runs {
        let report = failpoints::run(options.seed + done);
        table.add(&report);
        if !report.violations.is_empty() || options.verbose {
            show(&report);
        }
        progress(done + 1, options.runs, table.failed());
    }
    println!("\n{table}");
    if table.failed() == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// Runs real processes from this thread, which must live as long as they do.
fn in_processes(run: impl Future<Output = Result<bool, String>>) -> ExitCode {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build();
    match runtime.expect("a runtime").block_on(run) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(why) => {
            eprintln!("error: {why}");
            ExitCode::FAILURE
        }
    }
}

/// Kills and stops processes, in cases numbered from the seed on.
async fn processes(options: &Options) -> Result<bool, String> {
    let Options { runs, seed, lanes, verbose, .. } = *options;
    let counts = (AtomicU64::new(0), AtomicU64::new(0));
    let done = |case: &str, violation: Option<&str>| {
        let failed = counts.1.fetch_add(u64::from(violation.is_some()), Ordering::Relaxed);
        if let Some(violation) = violation {
            println!("\nVIOLATION {violation}");
        } else if verbose {
            println!("{case}");
        }
        let failed = failed as usize + usize::from(violation.is_some());
        progress(counts.0.fetch_add(1, Ordering::Relaxed) + 1, runs, failed);
    };
    let table = processes::run(processes::Options { runs, seed, lanes }, &done).await?;
    println!("\n{table}");
    Ok(table.violations.is_empty())
}

/// Very many requests, a third of which leave.
async fn soak(options: &Options) -> Result<bool, String> {
    let Options { requests, seed, .. } = *options;
    let count = AtomicU64::new(0);
    let done = || {
        let done = count.fetch_add(1, Ordering::Relaxed) + 1;
        if done.is_multiple_of((requests / 20).max(1)) {
            progress(done, requests, 0);
        }
    };
    let report = soak::run(soak::Options { requests, seed }, &done).await?;
    println!("\n{report}");
    report.violations.iter().for_each(|violation| println!("VIOLATION {violation}"));
    Ok(report.violations.is_empty())
}

fn show(report: &failpoints::Report) {
    let case = &report.case;
    println!("\ncase {}: {:?} workers {:?}", case.number, case.situation, case.workers);
    for fate in &report.fates {
        println!(
            "  {} x {} at hit {}: {:?}",
            fate.fault.point, fate.fault.action, fate.fault.nth, fate.struck
        );
    }
    for (name, ended) in &report.ended {
        println!("  {name} ended {ended}");
    }
    println!("  {:?} of virtual time", report.took);
    for violation in &report.violations {
        println!("  VIOLATION {violation}");
    }
    println!("  again: {}", failpoints::command(case.number));
}

/// A bar on terminals, a line now and then elsewhere.
fn progress(done: u64, runs: u64, failed: usize) {
    const WIDTH: u64 = 40;
    if std::io::stdout().is_terminal() {
        let full = (done * WIDTH / runs.max(1)) as usize;
        let bar = format!("{}{}", "#".repeat(full), ".".repeat(WIDTH as usize - full));
        print!("\r[{bar}] {done}/{runs}, {failed} failed");
        let _ = std::io::stdout().flush();
    } else if done.is_multiple_of((runs / 10).clamp(1, 100)) {
        println!("{done} of {runs}, {failed} failed");
    }
}
