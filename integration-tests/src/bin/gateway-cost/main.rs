//! What a gateway costs: `cargo xtask bench gateway` runs this.
//!
//! Our router with prefill and decode apart and with mixed workers, nginx, every peer that is named, and no gateway
//! at all go through the same scenarios, interleaved: one round after the other, within a round one gateway after
//! the other. Fake workers are processes of their own; behind nginx stands a responder that answers as they do. The
//! load is `tandem bench`. Processor time and memory are those of the gateway's process group.

mod responder;
mod scenarios;
mod sockets;
mod subjects;
mod table;
mod vocabulary;

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use responder::Pace;
use scenarios::{Figure, Measure, SCENARIOS, Scenario};
use subjects::{Fleet, Subject};
use tandem_chassis::group::{Group, listens};
use tandem_chassis::{raise_open_files, seam};
use tandem_integration_tests::measure::number;

const HELP: &str = "gateway-cost [--peer NAME=URL]... [--only TEXT] [--quick] [--rounds N] [--seconds N] [--model DIR] \
                    [--json FILE]";

/// What is asked for.
pub struct Options {
    /// Gateways that already run: name and address.
    peers: Vec<(String, String)>,
    /// Only scenarios with this in their name.
    only: String,
    /// A tenth of everything, for a look.
    quick: bool,
    rounds: usize,
    /// Of each load.
    seconds: u32,
    /// A checkpoint instead of the invented one.
    model: Option<PathBuf>,
    json: Option<PathBuf>,
}

fn options(mut arguments: impl Iterator<Item = String>) -> Result<Options, String> {
    let mut options = Options {
        peers: Vec::new(),
        only: String::new(),
        quick: false,
        rounds: 5,
        seconds: 3,
        model: None,
        json: None,
    };
    while let Some(name) = arguments.next() {
        let mut value = || arguments.next().ok_or_else(|| format!("{name} needs a value; {HELP}"));
        match name.as_str() {
            "--peer" => {
                let text = value()?;
                let (name, url) = text.split_once('=').ok_or("--peer takes NAME=URL")?;
                subjects::address(url)?;
                options.peers.push((name.to_owned(), url.trim_end_matches('/').to_owned()));
            }
            "--only" => {
                options.only = value()?;
                if !SCENARIOS.iter().any(|scenario| scenario.name.contains(&options.only)) {
                    let names: Vec<&str> = SCENARIOS.iter().map(|scenario| scenario.name).collect();
                    return Err(format!("--only: no scenario has that in its name: {}", names.join("; ")));
                }
            }
            "--quick" => (options.quick, options.rounds, options.seconds) = (true, 1, 1),
            "--rounds" => options.rounds = number(&name, &value()?)? as usize,
            "--seconds" => options.seconds = number(&name, &value()?)?,
            "--model" => options.model = Some(value()?.into()),
            "--json" => options.json = Some(value()?.into()),
            "--help" | "-h" => {
                println!("{HELP}");
                std::process::exit(0);
            }
            _ => return Err(format!("there is no option {name}; {HELP}")),
        }
    }
    Ok(options)
}

/// All figures of a scenario: by gateway, then by round.
pub struct Line {
    scenario: &'static Scenario,
    figures: Vec<Vec<Figure>>,
}

async fn bench(options: Options) -> Result<(), String> {
    let checkpoint = match &options.model {
        Some(dir) => dir.clone(),
        None => {
            let program = std::env::current_exe().map_err(|error| error.to_string())?;
            let beside = program.parent().ok_or("this program lies in no folder")?;
            vocabulary::checkpoint(beside).map_err(|error| format!("the vocabulary: {error}"))?
        }
    };
    raise_open_files();
    let mut fleet = Fleet::start(&options, &checkpoint).await?;
    for subject in &mut fleet.subjects {
        subject.bytes_per_token = scenarios::bytes_per_token(subject).await?;
    }
    let wanted = SCENARIOS.iter().filter(|scenario| scenario.name.contains(&options.only));
    // Memory first: of peers, which are not started again, it would come out of what a load has left.
    let (memory, loads): (Vec<_>, Vec<_>) = wanted.partition(|scenario| scenario.once);
    let mut lines = Vec::new();
    for scenario in memory.into_iter().chain(loads) {
        lines.push(line(scenario, &mut fleet, &options).await?);
    }
    lines.sort_by_key(|line| SCENARIOS.iter().position(|scenario| scenario.name == line.scenario.name));
    let names: Vec<String> = fleet.subjects.iter().map(|subject| subject.name.clone()).collect();
    let names: Vec<&str> = names.iter().map(String::as_str).collect();
    fleet.close().await;
    println!("{}", table::text(&names, &lines));
    if let Some(file) = &options.json {
        let text = table::json(&names, &lines).to_string();
        std::fs::write(file, text).map_err(|error| format!("{}: {error}", file.display()))?;
    }
    Ok(())
}

async fn line(scenario: &'static Scenario, fleet: &mut Fleet, options: &Options) -> Result<Line, String> {
    let rounds = if scenario.once { 1 } else { options.rounds };
    let mut figures: Vec<Vec<Figure>> = fleet.subjects.iter().map(|_| Vec::new()).collect();
    for round in 0..rounds {
        for (at, figures) in figures.iter_mut().enumerate() {
            eprintln!("{}: {}, round {} of {rounds}", scenario.name, fleet.subjects[at].name, round + 1);
            let memory = scenario.once && !matches!(scenario.measure, Measure::Rest);
            if memory && fleet.subjects[at].start.is_some() {
                // What an earlier scenario has left would be taken for this one's.
                start_again(fleet, at).await?;
                scenarios::bytes_per_token(&fleet.subjects[at]).await?;
            }
            let figure = match scenario.measure {
                Measure::Start => start_again(fleet, at).await,
                _ => scenarios::measure(scenario, &fleet.subjects[at], options).await,
            };
            figures.push(figure.unwrap_or_else(|why| {
                eprintln!("  {why}");
                Figure { failed: 1, ..Figure::default() }
            }));
        }
        if let Measure::FirstToken(_) = scenario.measure {
            // What takes this long without a gateway is not the gateway's.
            let none = figures[0][round].value.unwrap_or(0.0);
            for figures in &mut figures {
                figures[round].value = figures[round].value.map(|value| value - none);
            }
        }
    }
    Ok(Line { scenario, figures })
}

/// Kills a gateway that we started and starts it again.
async fn start_again(fleet: &mut Fleet, at: usize) -> Result<Figure, String> {
    let subject: &Subject = &fleet.subjects[at];
    let (Some(group), true) = (subject.group, subject.start.is_some()) else { return Ok(Figure::default()) };
    // SAFETY: a plain system call on a group that was started for this bench and leads itself.
    unsafe { libc::kill(-(group.pid() as i32), libc::SIGKILL) };
    let port = subjects::address(&subject.url)?.port();
    while listens(port) {
        seam::sleep(Duration::from_millis(5)).await;
    }
    let (seconds, started) = scenarios::start(subject).await?;
    let group: Group = started.group();
    fleet.subjects[at].group = Some(group);
    fleet.keep(started);
    Ok(Figure { value: Some(seconds), ..Figure::default() })
}

/// `respond PORT zero|paced`: the responder, as a process of its own.
async fn respond(port: &str, pace: &str) -> Result<(), String> {
    let port: u16 = port.parse().map_err(|_| format!("{port:?} is no port"))?;
    let listener =
        seam::listen_tcp(("127.0.0.1", port)).await.map_err(|error| format!("port {port}: {error}"))?;
    responder::serve(listener, if pace == "paced" { Pace::PACED } else { Pace::ZERO }).await;
    Ok(())
}

fn main() -> ExitCode {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build();
    let runtime = match runtime {
        Ok(runtime) => runtime,
        Err(error) => {
            eprintln!("error: {error}");
            return ExitCode::FAILURE;
        }
    };
    let words: Vec<String> = std::env::args().skip(1).collect();
    let done = match words.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["respond", port, pace] => runtime.block_on(respond(port, pace)),
        _ => options(words.into_iter()).and_then(|options| runtime.block_on(bench(options))),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(line: &str) -> Result<Options, String> {
        options(line.split_whitespace().map(str::to_owned))
    }

    #[test]
    fn options_are_read_and_wrong_ones_named() {
        let read_well = read("--peer smg=http://127.0.0.1:9000/ --rounds 3 --only short").expect("is right");
        assert_eq!(read_well.peers, [("smg".to_owned(), "http://127.0.0.1:9000".to_owned())]);
        assert_eq!((read_well.rounds, read_well.seconds, read_well.quick), (3, 3, false));
        for (wrong, part) in [
            ("--peer smg", "NAME=URL"),
            ("--peer smg=nowhere", "http://127.0.0.1:8000"),
            ("--rounds 0", "from 1 on"),
            ("--only nonsense", "short, 32 at once"),
            ("--speed", "no option --speed"),
        ] {
            let refusal = read(wrong).err().expect(wrong);
            assert!(refusal.contains(part), "{wrong}: {refusal}");
        }
    }
}
