//! What too much of everything does to a router: `cargo xtask bench overload` runs this.
//!
//! Ten times the load that a cluster can serve: how fast a refusal is, and how much of the best goodput is left. One
//! stream of very many tokens: by how much the router grows for each. Ten thousand streams of ten tokens: what the
//! router holds at the end, and what it held after a tenth of them. Workers are processes of their own; the load is
//! `tandem bench`.

use std::path::PathBuf;
use std::time::Duration;

use serde_json::{Value, json};
use tandem_chassis::group::Group;
use tandem_chassis::seam;
use tandem_integration_tests::ProcessCluster;
use tandem_integration_tests::measure::{self, number, show, spread};

const HELP: &str = "overload [--slo ttft=2s,tpot=500ms] [--rounds N] [--seconds N] [--quick] [--only load|short|long] [--json FILE]";

/// A cluster that serves few enough requests for one client to send it ten times as many.
const SLOW: [&str; 7] =
    ["--processes", "--fake=qwen3-8b@h200,slow=20", "--prefill", "1", "--decode", "1", "--policy=cost"];
/// A stream of a million tokens takes more than the ten minutes that are the default.
const PATIENCE: &str = "3600s";
const FAST: [&str; 6] = ["--processes", "--fake=zero", "--prefill", "1", "--decode", "1"];

/// So many requests at once are tried to find the slow cluster's best.
const AT_ONCE: [&str; 3] = ["64", "128", "256"];
const TIMES: f64 = 10.0;

struct Options {
    slo: String,
    rounds: usize,
    seconds: u32,
    /// Tokens of the long stream, and short streams.
    tokens: u32,
    streams: u32,
    /// One part alone.
    only: Option<String>,
    json: Option<PathBuf>,
}

/// Ten times the load, many short streams, one long stream.
const PARTS: [&str; 3] = ["load", "short", "long"];

fn options(mut arguments: impl Iterator<Item = String>) -> Result<Options, String> {
    let slo = "ttft=2s,tpot=500ms".to_owned();
    let (rounds, seconds, tokens, streams) = (5, 60, 1_000_000, 10_000);
    let mut options = Options { slo, rounds, seconds, tokens, streams, only: None, json: None };
    while let Some(name) = arguments.next() {
        let mut value = || arguments.next().ok_or_else(|| format!("{name} needs a value; {HELP}"));
        match name.as_str() {
            "--slo" => options.slo = value()?,
            "--rounds" => options.rounds = number(&name, &value()?)? as usize,
            "--seconds" => options.seconds = number(&name, &value()?)?,
            "--quick" => {
                (options.rounds, options.seconds) = (1, 5);
                (options.tokens, options.streams) = (50_000, 1_000);
            }
            "--only" => {
                let part = value()?;
                if !PARTS.contains(&part.as_str()) {
                    return Err(format!("--only takes one of {}, not {part:?}", PARTS.join(", ")));
                }
                options.only = Some(part);
            }
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

/// Runs `tandem bench` against a cluster.
async fn bench(cluster: &ProcessCluster, arguments: &[&str]) -> Result<Value, String> {
    let url = format!("http://{}", cluster.address);
    measure::bench(&[&["--url", &url, "--timeout", PATIENCE][..], arguments].concat()).await
}

/// The router's processes.
async fn router(cluster: &ProcessCluster) -> Result<Group, String> {
    let state = cluster.admin.get("/admin/state").await.json;
    state["pid"].as_i64().map(Group::of).ok_or_else(|| "the router has no pid".to_owned())
}

/// Figures of one round under too much load.
struct Overloaded {
    /// Answers per second in time, at the cluster's best and under ten times that.
    best: f64,
    goodput: f64,
    refused: u64,
    sent: u64,
    /// Milliseconds until a refusal, at the 50th and 99th percentile.
    refusal_ms: [f64; 2],
    late_ms: f64,
}

async fn overloaded(options: &Options) -> Result<Overloaded, String> {
    let cluster = ProcessCluster::start(&[&SLOW[..], &["--slo", &options.slo]].concat()).await;
    let seconds = format!("{}s", options.seconds);
    let lengths = ["--input-tokens", "fixed:64", "--output-tokens", "fixed:16", "--slo", &options.slo];
    // Every worker has measured itself before it counts.
    bench(&cluster, &[&lengths[..], &["--concurrency", AT_ONCE[0], "--requests", "200"]].concat()).await?;
    let mut best: f64 = 0.0;
    for at_once in AT_ONCE {
        let load = ["--concurrency", at_once, "--duration", &seconds];
        let ran = bench(&cluster, &[&lengths[..], &load].concat()).await?;
        best = best.max(in_time(&ran));
    }
    if best == 0.0 {
        return Err(format!("nothing meets {}", options.slo));
    }
    let rate = format!("{:.1}", best * TIMES);
    let ran = bench(&cluster, &[&lengths[..], &["--rate", &rate, "--duration", &seconds]].concat()).await?;
    cluster.interrupt().await;
    let of = |value: &Value| value.as_f64().unwrap_or(f64::NAN);
    Ok(Overloaded {
        best,
        goodput: in_time(&ran),
        refused: ran["errors_by_kind"]["503 overloaded"].as_u64().unwrap_or(0),
        sent: ran["requests"].as_u64().unwrap_or(0),
        refusal_ms: [of(&ran["error_ms"]["p50"]), of(&ran["error_ms"]["p99"])],
        late_ms: of(&ran["late_ms"]["p99"]),
    })
}

/// Answers in time per second, until the last one has ended: what still waits when the load ends counts for nothing.
fn in_time(ran: &Value) -> f64 {
    let of = |name: &str| ran[name].as_f64().unwrap_or(0.0);
    of("attainment") * of("requests") / of("seconds").max(1e-9)
}

/// Bytes that the router grows by for each token of one stream, as long as it runs and for good.
async fn long_stream(options: &Options) -> Result<[f64; 2], String> {
    let cluster = ProcessCluster::start(
        &[&FAST[..], &["--kv-memory", "2GiB", "--request-deadline", PATIENCE]].concat(),
    )
    .await;
    let router = router(&cluster).await?;
    bench(&cluster, &["--concurrency", "4", "--requests", "100", "--output-tokens", "fixed:1000"]).await?;
    let before = router.resident_bytes();
    let load =
        ["--concurrency", "1", "--requests", "1", "--output-tokens", &format!("fixed:{}", options.tokens)];
    let mut most = before;
    let ran = {
        let mut running = std::pin::pin!(bench(&cluster, &load));
        loop {
            match seam::timeout(Duration::from_millis(200), &mut running).await {
                Ok(ran) => break ran?,
                Err(_) => most = most.max(router.resident_bytes()),
            }
        }
    };
    if ran["output_tokens"].as_u64() != Some(u64::from(options.tokens)) {
        return Err(format!("a stream of {} tokens had {}", options.tokens, ran["output_tokens"]));
    }
    let after = router.resident_bytes();
    cluster.interrupt().await;
    Ok([most, after].map(|bytes| bytes.saturating_sub(before) as f64 / f64::from(options.tokens)))
}

/// MiB that the router holds at rest after a tenth of many short streams, and after all of them.
async fn short_streams(options: &Options) -> Result<[f64; 2], String> {
    let cluster = ProcessCluster::start(&FAST).await;
    let router = router(&cluster).await?;
    let tenth = (options.streams / 10).to_string();
    let load = ["--concurrency", "32", "--input-tokens", "fixed:32", "--output-tokens", "fixed:10"];
    let mut held = [0.0; 2];
    for at in 0..10 {
        let ran = bench(&cluster, &[&load[..], &["--requests", &tenth]].concat()).await?;
        if ran["errors"].as_u64() != Some(0) {
            return Err(format!("short streams failed: {}", ran["errors_by_kind"]));
        }
        if at == 0 || at == 9 {
            held[usize::from(at > 0)] = measure::at_rest(router).await as f64 / f64::from(1 << 20);
        }
    }
    cluster.interrupt().await;
    Ok(held)
}

/// The table as it grows: what is measured is shown at once, whatever comes of the rest.
struct Table(Vec<Value>);

impl Table {
    fn row(&mut self, name: &str, values: [f64; 3], goal: &str) {
        println!("| {name} | {} | {goal} |", show(values, 2));
        self.0.push(json!({ "name": name, "values": values, "goal": goal }));
    }
}

async fn run(options: Options) -> Result<(), String> {
    println!("{} rounds, {}: median (least to most)", options.rounds, options.slo);
    println!("| line | figure | goal |\n|---|---|---|");
    let mut table = Table(Vec::new());
    let wanted = |part: &str| options.only.as_ref().is_none_or(|only| only == part);
    if wanted("load") {
        load(&options, &mut table).await?;
    }
    if wanted("short") {
        short(&options, &mut table).await?;
    }
    if wanted("long") {
        eprintln!("one stream of {} tokens", options.tokens);
        let growth = long_stream(&options).await?;
        table.row("bytes a token of one long stream, at most", [growth[0]; 3], "8 at most");
        table.row("bytes a token of it, afterwards", [growth[1]; 3], "");
    }
    if let Some(file) = options.json {
        let text = json!({ "slo": options.slo, "rows": table.0 }).to_string();
        std::fs::write(&file, text).map_err(|error| format!("{}: {error}", file.display()))?;
    }
    Ok(())
}

async fn short(options: &Options, table: &mut Table) -> Result<(), String> {
    let mut rounds = Vec::new();
    for round in 0..options.rounds {
        eprintln!("round {} of {}: {} streams of ten tokens", round + 1, options.rounds, options.streams);
        rounds.push(short_streams(options).await?);
    }
    let of = |at: usize| spread(rounds.iter().map(|held| held[at]).collect());
    table.row("MiB after a tenth of the short streams", of(0), "");
    table.row("MiB after all of them", of(1), "no more");
    Ok(())
}

async fn load(options: &Options, table: &mut Table) -> Result<(), String> {
    let mut rounds = Vec::new();
    for round in 0..options.rounds {
        eprintln!("round {} of {}: ten times too much", round + 1, options.rounds);
        rounds.push(overloaded(options).await?);
    }
    let of = |value: &dyn Fn(&Overloaded) -> f64| spread(rounds.iter().map(value).collect());
    table.row("answers per second in time, at best", of(&|ran| ran.best), "");
    table.row("the same under ten times that", of(&|ran| ran.goodput), "");
    table.row("share of the best goodput that is left", of(&|ran| ran.goodput / ran.best), "0.9 at least");
    table.row("share of requests refused", of(&|ran| ran.refused as f64 / ran.sent.max(1) as f64), "");
    table.row("ms until a refusal, median", of(&|ran| ran.refusal_ms[0]), "10 at most");
    table.row("ms until a refusal, p99", of(&|ran| ran.refusal_ms[1]), "10 at most");
    table.row("ms that the client itself was late, p99", of(&|ran| ran.late_ms), "");
    Ok(())
}

fn main() -> std::process::ExitCode {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build();
    let done = options(std::env::args().skip(1))
        .and_then(|options| runtime.map_err(|error| error.to_string())?.block_on(run(options)));
    match done {
        Ok(()) => std::process::ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            std::process::ExitCode::FAILURE
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_are_read_and_wrong_ones_named() {
        let read = |line: &str| options(line.split_whitespace().map(str::to_owned));
        let given = read("--rounds 3 --seconds 4 --slo ttft=1s,tpot=1s").expect("it is right");
        assert_eq!((given.rounds, given.seconds, given.slo.as_str()), (3, 4, "ttft=1s,tpot=1s"));
        assert_eq!(read("--only short").expect("it is a part").only.as_deref(), Some("short"));
        assert!(read("--only all").is_err_and(|why| why.contains("load, short, long")));
        assert!(read("--rounds 0").is_err_and(|why| why.contains("from 1 on")));
        assert!(read("--speed").is_err_and(|why| why.contains("no option --speed")));
    }
}
