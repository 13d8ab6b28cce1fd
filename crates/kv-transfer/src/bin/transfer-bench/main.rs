//! How fast bytes travel: every transport, against a copy of memory and a raw socket, in one interleaved run.
//!
//! `cargo xtask bench transfer` runs this. Owners are processes of their own, as in a cluster (that of `inproc`
//! cannot be). Each round measures every way once per size, one right after the other, because machines
//! change their speed from second to second; a ratio is taken within a round. Memory is far larger than any
//! cache, and every way uses it round and round.

use std::process::ExitCode;

mod measure;
mod mooncake;
mod owner;
mod raw;
mod report;

use measure::{Options, Plan};
use tandem_chassis::seam;

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let done = match arguments.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        // How this program starts the other ends of its connections.
        ["owner", "raw"] => raw::serve(),
        ["owner", transport] => owner::serve(transport),
        _ => options(&arguments).and_then(run),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(sentence) => {
            eprintln!("{sentence}");
            ExitCode::FAILURE
        }
    }
}

fn options(arguments: &[String]) -> Result<Options, String> {
    let mut options = Options { rounds: 5, plan: Plan::full(), json: None };
    let mut arguments = arguments.iter();
    while let Some(argument) = arguments.next() {
        match argument.as_str() {
            "--quick" => options.plan = Plan::quick(),
            "--json" => options.json = Some(arguments.next().ok_or("--json needs a file")?.into()),
            "--rounds" => {
                let rounds = arguments.next().and_then(|text| text.parse().ok()).filter(|&n| n > 0);
                options.rounds = rounds.ok_or("--rounds needs a number above zero")?;
            }
            wrong => {
                return Err(format!(
                    "unknown option `{wrong}`: there are --quick, --rounds N and --json FILE"
                ));
            }
        }
    }
    Ok(options)
}

fn run(options: Options) -> Result<(), String> {
    let runtime = tokio::runtime::Runtime::new().map_err(|error| error.to_string())?;
    let json = options.json.clone();
    // A task like any other, as pulls are in a worker; this thread would be woken through another one.
    let results = runtime.block_on(async { seam::spawn(measure::run(options)).await });
    let results = results.map_err(|error| error.to_string())??;
    print!("{}", report::table(&results));
    match json {
        Some(file) => std::fs::write(&file, report::json(&results))
            .map_err(|error| format!("{}: {error}", file.display())),
        None => Ok(()),
    }
}
