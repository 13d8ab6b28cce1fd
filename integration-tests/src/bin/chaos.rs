//! Runs cases of clusters under faults and prints what came of them; `cargo xtask chaos` builds and calls it.

use std::io::{IsTerminal, Write};
use std::process::ExitCode;

use tandem_integration_tests::chaos::failpoints;

const USAGE: &str = "chaos --level failpoints [--runs N] [--seed S] [--verbose]";

/// What is asked for.
struct Options {
    runs: u64,
    seed: u64,
    verbose: bool,
}

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    match read(&arguments) {
        Ok(options) => failpoints(&options),
        Err(why) => {
            eprintln!("{why}\nusage: {USAGE}");
            ExitCode::FAILURE
        }
    }
}

fn read(arguments: &[String]) -> Result<Options, String> {
    let mut options = Options { runs: 198, seed: 1, verbose: false };
    let mut words = arguments.iter();
    while let Some(word) = words.next() {
        let mut value = || words.next().ok_or_else(|| format!("{word} needs a value"));
        let number =
            |text: &String| text.parse::<u64>().map_err(|_| format!("{word} {text} is not a whole number"));
        match word.as_str() {
            "--level" => match value()?.as_str() {
                "failpoints" => {}
                other => return Err(format!("there is no level {other:?} here; there is failpoints")),
            },
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
    } else if done.is_multiple_of(100) {
        println!("{done} of {runs} cases, {failed} failed");
    }
}
