//! `tandem sim`: a cluster in virtual time under a trace, against every baseline.

mod benchmarks;
mod page;
mod runs;
mod table;

use std::ffi::OsString;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use serde::Serialize;
use tandem_batching::pace::Order;
use tandem_chassis::config::Slo;
use tandem_placement::predictor;
use tandem_simulator::scenario::{self, Scenario};
use tandem_simulator::{Batching, Offline, Options};

/// Simulate a cluster under a trace
#[derive(Clone, Debug, clap::Parser, Serialize)]
#[command(name = "tandem sim")]
pub struct SimConfig {
    /// A trace or lengths as .csv.gz, azure2023_code, azure2023_conv, or `shift`
    #[arg(long, default_value = "azure2023_conv")]
    trace: String,
    /// How many copies of the trace, rotated, over one another; requests per second for lengths
    #[arg(long, default_value_t = 1.0)]
    scale: f64,
    /// Divides the timestamps of the trace
    #[arg(long, default_value_t = 1.0)]
    squeeze: f64,
    /// Let --scale and --find-scale divide timestamps instead of superposing copies
    #[arg(long)]
    squeezed: bool,
    /// How lengths arrive: poisson (without it), or gamma:CV; a trace with times forgets them
    #[arg(long)]
    arrivals: Option<String>,
    /// Lengths follow a column of requests per second: FILE:COLUMN
    #[arg(long)]
    rates: Option<String>,
    /// Spread arrivals evenly over so many milliseconds
    #[arg(long, default_value_t = 0.0)]
    spread_ms: f64,
    /// Begin so many seconds into the trace
    #[arg(long, default_value_t = 0.0)]
    offset: f64,
    /// End after so many seconds
    #[arg(long)]
    seconds: Option<f64>,
    /// Workers
    #[arg(long, default_value_t = 8)]
    workers: usize,
    /// 4P4D, mixed:CHUNK, best-fixed, or best-mixed; half and half without it
    #[arg(long)]
    split: Option<String>,
    /// Whose step times
    #[arg(long, default_value = "qwen3-8b")]
    model: String,
    /// On what
    #[arg(long, default_value = "h200")]
    device: String,
    /// Who chooses routes: cost, prefix, least-loaded, round-robin
    #[arg(long, default_value = "cost")]
    policy: String,
    /// Which prompt comes first: deadline or arrival
    #[arg(long, default_value = "deadline")]
    order: String,
    /// Whether roles follow the load: on or off; on for cost without it
    #[arg(long)]
    planner: Option<String>,
    /// Whether what is rather late than in time is refused, to come again when told to: on or off; by deadline only
    #[arg(long, default_value = "on")]
    admission: String,
    /// Prefix caches of each worker: device=N,host=M tokens
    #[arg(long)]
    cache_tokens: Option<String>,
    /// Whether prefixes are pulled from peers: on or off
    #[arg(long, default_value = "on")]
    peer_pulls: String,
    /// Whether transfers of one adapter share it: shared or private
    #[arg(long, default_value = "private")]
    links: String,
    /// Coefficient of variation of step times
    #[arg(long, default_value_t = 0.0)]
    noise: f64,
    /// Age of the router's view in milliseconds
    #[arg(long, default_value_t = 0.0)]
    stale_ms: f64,
    /// Routers that take turns; each knows of what the others have sent by reports alone
    #[arg(long, default_value_t = 1)]
    routers: usize,
    /// Share by which predictors are too high to begin with (too low if negative)
    #[arg(long, default_value_t = 0.0)]
    bias: f64,
    /// Whether workers correct their predictors by what their steps take: on or off
    #[arg(long, default_value = "on")]
    learning: String,
    /// Targets
    #[arg(long, default_value = "ttft=1s,tpot=50ms")]
    slo: Slo,
    /// Names the draws
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Find the highest scale at which this share of requests meets both targets
    #[arg(long)]
    find_scale: Option<f64>,
    /// Also run all baselines
    #[arg(long)]
    compare: bool,
    /// Work without targets beside it: a file of lengths
    #[arg(long)]
    offline: Option<String>,
    /// How much of it
    #[arg(long, default_value_t = 100_000)]
    offline_requests: usize,
    /// When it is admitted: slack, or idle (while no online request runs or waits)
    #[arg(long, default_value = "slack")]
    offline_admit: String,
    /// Which code decides about steps: twin (closed form) or real (the batcher itself)
    #[arg(long, default_value = "twin")]
    batching: String,
    /// Make the tables of docs/benchmarks.md instead: targets, xllm, shift, general, cache, offline, flaws, speed
    #[arg(long, value_name = "SECTIONS", num_args = 0..=1, default_missing_value = "all")]
    benchmarks: Option<String>,
    /// Only those rows of targets, xllm, shift, general or flaws whose name contains this
    #[arg(long, value_name = "TEXT", requires = "benchmarks")]
    rows: Option<String>,
    /// How many seeds and windows they take
    #[arg(long, default_value_t = 5)]
    rounds: usize,
    /// Where the traces are that are not committed
    #[arg(long, value_name = "DIR", default_value = "../shared/traces")]
    traces: PathBuf,
    /// Write the runs as JSON
    #[arg(long)]
    json: Option<PathBuf>,
    /// Write a page that shows every run over time
    #[arg(long)]
    html: Option<PathBuf>,
}

pub fn main(arguments: Vec<OsString>) -> ExitCode {
    let config: SimConfig = tandem_chassis::config::load(arguments);
    let done = match &config.benchmarks {
        Some(sections) => benchmarks::main(&config, sections),
        None => simulate(&config),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(why) => {
            eprintln!("error: {why}");
            ExitCode::from(2)
        }
    }
}

fn simulate(config: &SimConfig) -> Result<(), String> {
    let scenario = scenario(config)?;
    let runs = runs::plan(config)?;
    let done = runs::run(&runs, &scenario, config)?;
    print!("{}", table::text(&done));
    if let Some(path) = &config.json {
        let list: Vec<_> = done.iter().map(|run| run.outcome.json(&run.name, &run.run)).collect();
        let text =
            serde_json::to_string_pretty(&serde_json::json!({ "runs": list })).map_err(|e| e.to_string())?;
        std::fs::write(path, text).map_err(|e| format!("{}: {e}", path.display()))?;
    }
    if let Some(path) = &config.html {
        std::fs::write(path, page::html(&done)).map_err(|e| format!("{}: {e}", path.display()))?;
    }
    Ok(())
}

fn scenario(config: &SimConfig) -> Result<Scenario, String> {
    for (name, value) in [("scale", config.scale), ("squeeze", config.squeeze)] {
        if !value.is_finite() || value <= 0.0 {
            return Err(format!("--{name} {value} must be above 0"));
        }
    }
    let window = if config.rates.is_some() { (0.0, None) } else { (config.offset, config.seconds) };
    let read = Scenario::read(&config.trace, window.0, window.1, config.seed);
    let mut scenario = read.map_err(|e| e.to_string())?;
    scenario.squeezed = config.squeezed;
    scenario.squeeze = config.squeeze;
    if let Some(arrivals) = &config.arrivals {
        scenario.arrivals = arrivals.parse()?;
        scenario.forget_times();
    }
    scenario.spread_ms = config.spread_ms;
    if let Some(rates) = &config.rates {
        let (file, column) =
            rates.rsplit_once(':').ok_or_else(|| format!("--rates {rates:?} must be FILE:COLUMN"))?;
        let seconds = config.seconds.unwrap_or(86_400.0);
        let followed = scenario.follow(&scenario::find(file), column, config.offset, seconds);
        followed.map_err(|e| e.to_string())?;
    }
    if let Some(lengths) = &config.offline {
        scenario.beside(lengths, config.offline_requests).map_err(|e| e.to_string())?;
    }
    Ok(scenario)
}

/// What the flags say of the cluster; the split is the runs' own.
fn options(config: &SimConfig) -> Result<Options, String> {
    let order = match config.order.as_str() {
        "deadline" => Order::Deadline,
        "arrival" => Order::Arrival,
        other => return Err(format!("--order {other:?} must be deadline or arrival")),
    };
    let offline = match config.offline_admit.as_str() {
        "slack" => Offline::Slack,
        "idle" => Offline::Idle,
        other => return Err(format!("--offline-admit {other:?} must be slack or idle")),
    };
    let batching = match config.batching.as_str() {
        "twin" => Batching::Twin,
        "real" => Batching::Real,
        other => return Err(format!("--batching {other:?} must be twin or real")),
    };
    let shared_links = match config.links.as_str() {
        "shared" => true,
        "private" => false,
        other => return Err(format!("--links {other:?} must be shared or private")),
    };
    let planner = match &config.planner {
        Some(text) => on_or_off("planner", text)?,
        None => config.policy == "cost",
    };
    if !config.stale_ms.is_finite() || config.stale_ms < 0.0 {
        return Err(format!("--stale-ms {} must be at least 0", config.stale_ms));
    }
    Ok(Options {
        workers: config.workers,
        profile: predictor::profile_of(&config.model, &config.device)?,
        policy: config.policy.clone(),
        order,
        planner,
        admission: on_or_off("admission", &config.admission)?,
        first_token: config.slo.ttft,
        per_token: config.slo.tpot,
        cache: config.cache_tokens.as_deref().map_or(Ok(Default::default()), cache)?,
        peer_pulls: on_or_off("peer-pulls", &config.peer_pulls)?,
        shared_links,
        noise: config.noise,
        stale: Duration::from_secs_f64(config.stale_ms / 1e3),
        routers: config.routers,
        bias: config.bias,
        learning: on_or_off("learning", &config.learning)?,
        offline,
        seed: config.seed,
        batching,
        ..Options::default()
    })
}

fn on_or_off(name: &str, text: &str) -> Result<bool, String> {
    match text {
        "on" => Ok(true),
        "off" => Ok(false),
        other => Err(format!("--{name} {other:?} must be on or off")),
    }
}

fn cache(text: &str) -> Result<tandem_simulator::cache::Sizes, String> {
    let mut sizes = tandem_simulator::cache::Sizes::default();
    for part in text.split(',') {
        let (name, value) = part.split_once('=').unwrap_or((part, ""));
        let tokens = value.parse::<f64>().ok().filter(|n| n.is_finite() && *n >= 0.0);
        let tokens = tokens.ok_or_else(|| format!("--cache-tokens {part:?} must be device=N or host=M"))?;
        match name {
            "device" => sizes.device_tokens = tokens as u64,
            "host" => sizes.host_tokens = tokens as u64,
            _ => return Err(format!("--cache-tokens knows device and host, not {name:?}")),
        }
    }
    Ok(sizes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn caches_are_read_or_refused_with_the_right_form() {
        let sizes = cache("device=700000,host=3e6").expect("is right");
        assert_eq!((sizes.device_tokens, sizes.host_tokens), (700_000, 3_000_000));
        assert!(cache("disk=1").expect_err("is wrong").contains("device and host"));
    }
}
