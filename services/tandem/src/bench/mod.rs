//! `tandem bench`: a load on a running cluster, or on any server that speaks OpenAI's API, and what came of it.

mod answer;
mod drive;
mod lengths;
mod page;
mod plan;
mod prompts;
mod report;
mod served;

use std::ffi::OsString;
use std::path::PathBuf;
use std::process::ExitCode;

use serde::Serialize;
use serde_json::json;
use tandem_chassis::config::{HumanDuration, Slo};
use tandem_chassis::{Shutdown, raise_open_files, seam};
use tandem_simulator::scenario::Arrivals;

use crate::progress::Bar;
use answer::Server;
use drive::Form;
use lengths::Lengths;
use prompts::{Costs, Prompts};
use report::Run;
use served::Served;

/// Put a load on a running cluster, or on any server that speaks OpenAI's API, and measure it
///
/// Either so many requests at once (--concurrency), or at a rate (--rate), or as a trace has them (--trace). Times
/// begin when a request is sent; how late the client itself sent it is shown apart.
#[derive(Clone, Debug, clap::Parser, Serialize)]
#[command(name = "tandem bench")]
pub struct BenchConfig {
    /// Address of the API
    #[arg(long, default_value = "http://127.0.0.1:8000")]
    pub url: String,
    /// Model to ask; by default the only one listed
    #[arg(long)]
    pub model: Option<String>,
    /// What to ask it for: completions or chat
    #[arg(long, default_value = "completions")]
    pub endpoint: String,
    /// So many requests at once: each that ends makes room for the next
    #[arg(long, value_name = "N")]
    pub concurrency: Option<usize>,
    /// So many requests per second, whatever becomes of them
    #[arg(long, value_name = "R")]
    pub rate: Option<f64>,
    /// How they arrive: poisson (without it), or gamma:CV
    #[arg(long)]
    pub arrivals: Option<String>,
    /// Requests as in a trace: a .csv.gz, azure2023_code, azure2023_conv, or `shift`
    #[arg(long, value_name = "FILE")]
    pub trace: Option<String>,
    /// How many copies of the trace, rotated, over one another [default: 1]
    #[arg(long, value_name = "X")]
    pub scale: Option<f64>,
    /// Divides the timestamps of the trace [default: 1]
    #[arg(long, value_name = "X")]
    pub squeeze: Option<f64>,
    /// Begin so many seconds into the trace [default: 0]
    #[arg(long, value_name = "S")]
    pub offset: Option<f64>,
    /// Tokens of prompts: fixed:N, uniform:A,B, lognormal:MEDIAN,SIGMA or FILE:COLUMN [default: fixed:128, or the
    /// trace's]
    #[arg(long, value_name = "D")]
    pub input_tokens: Option<Lengths>,
    /// Tokens of answers, likewise [default: fixed:64, or the trace's]
    #[arg(long, value_name = "D")]
    pub output_tokens: Option<Lengths>,
    /// Let prompts begin with one of GROUPS common beginnings of so many tokens: GROUPS,TOKENS
    #[arg(long, value_name = "GROUPS,TOKENS")]
    pub shared_prefix: Option<String>,
    /// Ask for answers in one piece
    #[arg(long)]
    pub no_stream: bool,
    /// End after so many requests
    #[arg(long, value_name = "N")]
    pub requests: Option<u64>,
    /// Send no more after so long [default: 30s, unless --requests or --trace is given]
    #[arg(long, value_name = "T")]
    pub duration: Option<HumanDuration>,
    /// Time that a request may take in all
    #[arg(long, default_value = "600s")]
    pub timeout: HumanDuration,
    /// Latency targets for goodput, such as ttft=1s,tpot=50ms; without them every complete answer counts
    #[arg(long)]
    pub slo: Option<Slo>,
    /// Names the draws of times, lengths and prompts [default: drawn, so that prompts are new to every cache]
    #[arg(long, value_name = "S")]
    pub seed: Option<u64>,
    /// Admin port of the router, for its processor time [default: the port after that of --url]
    #[arg(long, value_name = "URL")]
    pub admin: Option<String>,
    /// Process of a router on this host that has no admin port: the processor time of its group
    #[arg(long, value_name = "PID", conflicts_with = "admin")]
    pub router_pid: Option<u32>,
    /// What to call the run
    #[arg(long)]
    pub name: Option<String>,
    /// Write the figures as JSON
    #[arg(long, value_name = "FILE")]
    pub json: Option<PathBuf>,
    /// Write a page that shows the figures
    #[arg(long, value_name = "FILE")]
    pub html: Option<PathBuf>,
}

impl BenchConfig {
    fn check(&self) -> Result<(), String> {
        let kinds = [self.concurrency.is_some(), self.rate.is_some(), self.trace.is_some()];
        if kinds.iter().filter(|given| **given).count() != 1 {
            return Err("give exactly one of --concurrency N, --rate R and --trace FILE".into());
        }
        for (name, given) in [
            ("scale", self.scale.is_some()),
            ("squeeze", self.squeeze.is_some()),
            ("offset", self.offset.is_some()),
        ] {
            if given && self.trace.is_none() {
                return Err(format!("--{name} goes with --trace FILE"));
            }
        }
        for (name, value) in [("rate", self.rate), ("scale", self.scale), ("squeeze", self.squeeze)] {
            if value.is_some_and(|value| !value.is_finite() || value <= 0.0) {
                return Err(format!("--{name} must be above 0"));
            }
        }
        if self.offset.is_some_and(|offset| !offset.is_finite() || offset < 0.0) {
            return Err("--offset must be at least 0".into());
        }
        if self.concurrency == Some(0) || self.requests == Some(0) {
            return Err("--concurrency and --requests must be at least 1".into());
        }
        if self.duration.is_some_and(|duration| duration.0.is_zero()) {
            return Err("--duration must be above 0".into());
        }
        if self.arrivals.is_some() && self.rate.is_none() {
            return Err("--arrivals goes with --rate R".into());
        }
        if self.slo.is_some() && self.no_stream {
            return Err("--slo needs streams to see a first token; leave --no-stream out".into());
        }
        if !["completions", "chat"].contains(&self.endpoint.as_str()) {
            return Err(format!("--endpoint {:?} must be completions or chat", self.endpoint));
        }
        self.arrivals()?;
        self.shared()?;
        served::address(&self.url)?;
        self.admin.as_deref().map_or(Ok(()), |admin| served::address(admin).map(|_| ()))
    }

    fn arrivals(&self) -> Result<Arrivals, String> {
        self.arrivals.as_deref().map_or(Ok(Arrivals::Poisson), str::parse)
    }

    /// Groups, and tokens of their common beginnings.
    fn shared(&self) -> Result<Option<(u64, u32)>, String> {
        let Some(text) = &self.shared_prefix else { return Ok(None) };
        let (groups, tokens) = text.split_once(',').unwrap_or((text, ""));
        match (groups.trim().parse::<u64>(), tokens.trim().parse::<u32>()) {
            (Ok(groups), Ok(tokens)) if groups > 0 && tokens > 0 => Ok(Some((groups, tokens))),
            _ => Err(format!("--shared-prefix {text:?} must be GROUPS,TOKENS, such as 64,1000")),
        }
    }
}

pub fn main(arguments: Vec<OsString>) -> ExitCode {
    let config: BenchConfig = tandem_chassis::config::load_checked(arguments, BenchConfig::check);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    match runtime.block_on(bench(&config)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(why) => {
            eprintln!("error: {why}");
            ExitCode::FAILURE
        }
    }
}

async fn bench(config: &BenchConfig) -> Result<(), String> {
    let seed = config.seed.unwrap_or_else(|| seam::random_u64() >> 32);
    let plan = plan::plan(config, seed)?;
    raise_open_files();
    let shutdown = Shutdown::new();
    // Owned by the runtime; it ends with the process.
    seam::spawn(tandem_chassis::drain::signal(shutdown.clone()));
    let run = measure(config, plan, seed, &shutdown).await?;
    print!("{}", run.text());
    if let Some(path) = &config.json {
        let text =
            serde_json::to_string_pretty(&json!({ "runs": [run.json()] })).map_err(|e| e.to_string())?;
        std::fs::write(path, text).map_err(|e| format!("{}: {e}", path.display()))?;
    }
    if let Some(path) = &config.html {
        std::fs::write(path, page::html(&run)).map_err(|e| format!("{}: {e}", path.display()))?;
    }
    if run.requests() > 0 && run.whole().next().is_none() {
        return Err("no request was answered as it should be; see above".into());
    }
    Ok(())
}

async fn measure(
    config: &BenchConfig,
    plan: plan::Plan,
    seed: u64,
    shutdown: &Shutdown,
) -> Result<Run, String> {
    let ready = async {
        let mut served = Served::find(config).await?;
        let costs = Costs::measure(&mut served).await?;
        let router = served.router(config).await?;
        Ok::<_, String>((served, costs, router))
    };
    let (served, costs, router) = tokio::select! {
        ready = ready => ready?,
        () = shutdown.draining() => return Err("ended before anything was sent".into()),
    };
    let counted = costs.is_some();
    let costs = costs.unwrap_or_else(Costs::guessed);
    let (before, behind, end) = served.body(!config.no_stream);
    let form = Form { before, behind, end, prompts: Prompts::new(costs, seed, config.shared()?) };
    let server = Server::new(&served.endpoint(), config.timeout.0, !config.no_stream)?;
    let (name, scheduled) =
        (config.name.clone().unwrap_or_else(|| plan.name.clone()), plan.at_once.is_none());
    let planned = plan.ends.filter(|_| config.requests.is_none());
    let bar = Bar::new(0);
    let driven = drive::drive(&server, plan, form, shutdown, &bar).await;
    let after = served.router(config).await.ok().flatten();
    bar.end();
    // A router that was started again in between has spent less than before.
    let router_seconds =
        router.as_ref().zip(after.as_ref()).map(|(before, after)| after.seconds - before.seconds);
    let router_seconds = router_seconds.filter(|seconds| *seconds >= 0.0);
    let mut said = serde_json::to_value(config).map_err(|e| e.to_string())?;
    said["seed"] = seed.into();
    said["model"] = served.model().into();
    Ok(Run {
        name,
        config: said,
        driven,
        slo: config.slo,
        streams: !config.no_stream,
        scheduled,
        planned,
        counted,
        router_seconds,
        router_shared: router.is_some_and(|router| router.shared),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn checked(arguments: &str) -> Result<(), String> {
        let words = std::iter::once("tandem bench").chain(arguments.split_whitespace());
        <BenchConfig as clap::Parser>::try_parse_from(words).map_err(|error| error.to_string())?.check()
    }

    #[test]
    fn what_does_not_go_together_is_refused_by_naming_what_does() {
        for (arguments, part) in [
            ("", "exactly one of --concurrency N, --rate R and --trace FILE"),
            ("--concurrency 4 --rate 3", "exactly one of"),
            ("--concurrency 0", "at least 1"),
            ("--rate 0", "--rate must be above 0"),
            ("--rate 3 --scale 2", "--scale goes with --trace"),
            ("--concurrency 3 --arrivals poisson", "--arrivals goes with --rate"),
            ("--rate 3 --arrivals uniform", "gamma:CV"),
            ("--rate 3 --endpoint embeddings", "completions or chat"),
            ("--rate 3 --input-tokens 3..4", "uniform:A,B"),
            ("--rate 3 --shared-prefix 8", "GROUPS,TOKENS"),
            ("--rate 3 --url ftp://x", "http://"),
            ("--rate 3 --url https://x", "http://"),
            ("--rate 3 --no-stream --slo ttft=1s,tpot=50ms", "--no-stream"),
            ("--trace t --offset=-1", "--offset must be"),
        ] {
            let refusal = checked(arguments).expect_err(arguments);
            assert!(refusal.contains(part), "{arguments}: {refusal}");
        }
        assert_eq!(checked("--rate 3 --arrivals gamma:2 --shared-prefix 8,100 --requests 5"), Ok(()));
    }

    #[test]
    fn what_it_prints_it_reads() {
        tandem_chassis::config::assert_prints_what_it_reads::<BenchConfig>(&[
            "--rate=3.5",
            "--arrivals=gamma:2",
            "--input-tokens=lognormal:300,0.8",
            "--output-tokens=lengths.csv.gz:output_tokens",
            "--duration=90s",
            "--slo=ttft=2s,tpot=30ms",
            "--shared-prefix=8,100",
            "--seed=4",
            "--no-stream",
        ]);
    }
}
