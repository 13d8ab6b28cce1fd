//! What placement by cost and a role planner are worth under a load that turns: `cargo xtask bench roles` runs this.
//!
//! Two prefill and two decode workers with the fake engine's H200, ten times slower. First long prompts with short
//! answers, more than two workers can prefill; then short prompts with long answers. Every round has the same
//! requests at the same times for each of the three clusters, one cluster after the other. Goodput is the number of
//! answers per second that meet both targets, as their client sees them.

use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use serde_json::{Value, json};
use tandem_chassis::config::Slo;
use tandem_chassis::seam;
use tandem_integration_tests::measure::{number, show, spread};
use tandem_integration_tests::{Client, ProcessCluster};

const HELP: &str = "roles-goodput [--slo ttft=10s,tpot=500ms] [--rounds N] [--quick] [--json FILE]";

/// So long a request may take before it counts as lost.
const PATIENCE: Duration = Duration::from_secs(180);

/// The clusters that are compared; the first is ours.
const CLUSTERS: [(&str, [&str; 4]); 3] = [
    ("cost, planner on", ["--policy", "cost", "--planner", "on"]),
    ("cost, planner off", ["--policy", "cost", "--planner", "off"]),
    ("least-loaded, planner off", ["--policy", "least-loaded", "--planner", "off"]),
];

/// A part of the load: requests per second for so long, with prompts and answers of about so many tokens.
struct Phase {
    seconds: f64,
    per_second: f64,
    prompt: f64,
    answer: f64,
}

const PHASES: [Phase; 2] = [
    Phase { seconds: 40.0, per_second: 11.0, prompt: 1500.0, answer: 16.0 },
    Phase { seconds: 25.0, per_second: 8.0, prompt: 60.0, answer: 220.0 },
];

struct Options {
    slo: Slo,
    rounds: u64,
    scale: f64,
    json: Option<PathBuf>,
}

fn options() -> Result<Options, String> {
    let slo = Slo { ttft: Duration::from_secs(10), tpot: Duration::from_millis(500) };
    let mut options = Options { slo, rounds: 5, scale: 1.0, json: None };
    let mut arguments = std::env::args().skip(1);
    while let Some(name) = arguments.next() {
        let mut value = || arguments.next().ok_or_else(|| format!("{name} needs a value; {HELP}"));
        match name.as_str() {
            "--slo" => options.slo = value()?.parse().map_err(|error| format!("--slo: {error}"))?,
            "--rounds" => options.rounds = number(&name, &value()?)?.into(),
            "--quick" => (options.rounds, options.scale) = (1, 0.5),
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

/// A request: when it is sent, tokens of its prompt and of its answer.
struct Sent {
    at: Duration,
    prompt: u32,
    answer: u32,
}

/// Draws from a seed, the same everywhere.
struct Draws(u64);

impl Draws {
    /// Evenly from 0 to 1.
    fn next(&mut self) -> f64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        ((z ^ (z >> 31)) >> 11) as f64 / (1u64 << 53) as f64
    }
}

/// Poisson arrivals; lengths from a half to one and a half of what they are about.
fn load(round: u64, scale: f64) -> Vec<Sent> {
    let (mut draws, mut begin, mut sent) = (Draws(round), 0.0, Vec::new());
    for phase in &PHASES {
        let end = begin + phase.seconds * scale;
        let mut at = begin;
        loop {
            at -= (1.0 - draws.next()).ln() / phase.per_second;
            if at >= end {
                break;
            }
            let mut about = |tokens: f64| (tokens * (0.5 + draws.next())) as u32;
            let (prompt, answer) = (about(phase.prompt).max(1), about(phase.answer).max(2));
            sent.push(Sent { at: Duration::from_secs_f64(at), prompt, answer });
        }
        begin = end;
    }
    sent
}

/// What became of a request.
enum Became {
    Met,
    Late,
    /// Refused at the door because it could not meet its targets.
    Shed,
    Lost(String),
}

async fn ask(api: &Client, name: &str, number: usize, sent: &Sent, slo: Slo) -> Became {
    let prompt: Vec<u32> = (0..sent.prompt).map(|i| 10 + (i * 7 + number as u32 * 131) % 190).collect();
    let body = json!({
        "model": name, "prompt": prompt, "max_tokens": sent.answer, "ignore_eos": true, "stream": true,
    });
    let began = seam::now();
    let mut events = match api.stream("/v1/completions", &body).await {
        Ok(events) if events.status == 200 => events,
        Ok(events) if events.status == 503 => return Became::Shed,
        Ok(events) => return Became::Lost(format!("status {}", events.status)),
        Err(why) => return Became::Lost(why),
    };
    let (mut first, mut last, mut finished) = (None, began, false);
    while let Some(event) = events.next().await {
        if event.contains("\"error\"") {
            return Became::Lost(event);
        }
        finished |= event.contains("\"finish_reason\":\"length\"");
        if event != "[DONE]" {
            last = seam::now();
            first.get_or_insert(last);
        }
    }
    let Some(first) = first.filter(|_| finished) else { return Became::Lost("it was cut short".into()) };
    let each = last.since(first) / (sent.answer - 1);
    if first.since(began) <= slo.ttft && each <= slo.tpot { Became::Met } else { Became::Late }
}

/// One cluster under one round of the load.
struct Ran {
    goodput: f64,
    flips: usize,
    counts: [usize; 4],
}

async fn run(arguments: &[&str; 4], round: u64, options: &Options) -> Result<Ran, String> {
    let slo = options.slo.to_string();
    let fixed = ["--fake=qwen3-8b@h200,slow=10", "--prefill", "2", "--decode", "2", "--slo", &slo];
    let arguments: Vec<&str> = fixed.iter().chain(arguments).copied().collect();
    let cluster = ProcessCluster::start(&arguments).await;
    let api = cluster.api.with_patience(PATIENCE);
    let name = api.get("/v1/models").await.json["data"][0]["id"].as_str().unwrap_or_default().to_owned();
    // Every worker has measured itself before it counts.
    let warm = Sent { at: Duration::ZERO, prompt: 64, answer: 8 };
    for number in 0..8 {
        ask(&api, &name, 1000 + number, &warm, options.slo).await;
    }
    let load = load(round, options.scale);
    let counts: [AtomicUsize; 4] = Default::default();
    let began = seam::now();
    let requests = load.iter().enumerate().map(|(number, sent)| {
        let (api, name, counts) = (&api, &name, &counts);
        async move {
            seam::sleep_until(began + sent.at).await;
            let place = match ask(api, name, number, sent, options.slo).await {
                Became::Met => 0,
                Became::Late => 1,
                Became::Shed => 2,
                Became::Lost(why) => {
                    eprintln!("request {number} was lost: {why}");
                    3
                }
            };
            counts[place].fetch_add(1, Ordering::Relaxed);
        }
    });
    futures_util::future::join_all(requests).await;
    let shown = cluster.admin.get("/admin/cluster").await.json;
    let flips = shown["planner"]["flips"].as_array().map_or(0, Vec::len);
    cluster.interrupt().await;
    let counts = counts.map(AtomicUsize::into_inner);
    let seconds: f64 = PHASES.iter().map(|phase| phase.seconds * options.scale).sum();
    Ok(Ran { goodput: counts[0] as f64 / seconds, flips, counts })
}

async fn bench(options: Options) -> Result<(), String> {
    let mut rounds: Vec<Vec<Ran>> = Vec::new();
    for round in 0..options.rounds {
        let mut ran = Vec::new();
        for (name, arguments) in &CLUSTERS {
            eprintln!("round {} of {}: {name}", round + 1, options.rounds);
            ran.push(run(arguments, round + 1, &options).await?);
        }
        rounds.push(ran);
    }
    println!("{} rounds, {}: median (least to most)", options.rounds, options.slo);
    println!("| cluster | goodput per second | in time, late, shed, lost | flips | ours over it |");
    println!("|---|---|---|---|---|");
    let mut rows: Vec<Value> = Vec::new();
    for (at, (name, _)) in CLUSTERS.iter().enumerate() {
        let of = |value: &dyn Fn(&Ran) -> f64| spread(rounds.iter().map(|ran| value(&ran[at])).collect());
        let goodput = of(&|ran| ran.goodput);
        let ratio = spread(rounds.iter().map(|ran| ran[0].goodput / ran[at].goodput.max(1e-9)).collect());
        let counts: Vec<String> =
            (0..4).map(|kind| format!("{:.0}", of(&|ran| ran.counts[kind] as f64)[1])).collect();
        let flips = of(&|ran| ran.flips as f64)[1];
        println!(
            "| {name} | {} | {} | {flips:.0} | {} |",
            show(goodput, 2),
            counts.join(", "),
            show(ratio, 2)
        );
        rows.push(json!({ "name": name, "goodput_rps": goodput, "ratio": ratio, "flips": flips }));
    }
    if let Some(file) = options.json {
        let text = json!({ "slo": options.slo, "runs": rows }).to_string();
        std::fs::write(&file, text).map_err(|e| format!("{}: {e}", file.display()))?;
    }
    Ok(())
}

fn main() -> std::process::ExitCode {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build();
    let done = options().and_then(|options| runtime.map_err(|e| e.to_string())?.block_on(bench(options)));
    match done {
        Ok(()) => std::process::ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            std::process::ExitCode::FAILURE
        }
    }
}
