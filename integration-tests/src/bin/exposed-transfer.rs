//! How much of a hand-off's transfer is seen: `cargo xtask bench transfer` runs this.
//!
//! A prefill and a decode process with the real engine and a random checkpoint of Qwen3-0.6B's shape. The decode
//! worker pulls while the prompt is computed; *exposed* is from the seal to the verdict, *whole* is the time in
//! which bytes moved.

use std::path::PathBuf;
use std::time::Duration;

use serde_json::{Value, json};
use tandem_chassis::seam;
use tandem_engine::random_checkpoint;
use tandem_integration_tests::measure::{number, show, spread};
use tandem_integration_tests::{Client, ProcessCluster, metric};

const HELP: &str =
    "exposed-transfer [--transport NAME] [--prompt-tokens N,N,...] [--rounds N] [--quick] [--json FILE]";

/// A long prompt takes minutes on one slow core.
const PATIENCE: Duration = Duration::from_secs(1200);

struct Options {
    transport: String,
    prompt_tokens: Vec<u32>,
    runs: usize,
    json: Option<PathBuf>,
}

fn options() -> Result<Options, String> {
    let mut options =
        Options { transport: "tcp".into(), prompt_tokens: vec![512, 1024, 2048, 4096], runs: 5, json: None };
    let mut arguments = std::env::args().skip(1);
    while let Some(name) = arguments.next() {
        let mut value = || arguments.next().ok_or_else(|| format!("{name} needs a value; {HELP}"));
        match name.as_str() {
            "--transport" => options.transport = value()?,
            "--prompt-tokens" => {
                let parsed: Result<_, _> = value()?.split(',').map(str::parse).collect();
                options.prompt_tokens =
                    parsed.map_err(|_| format!("--prompt-tokens takes numbers; {HELP}"))?;
            }
            "--rounds" => options.runs = number(&name, &value()?)? as usize,
            "--quick" => options = Options { prompt_tokens: vec![1024, 2048], runs: 1, ..options },
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

/// Sums of the decode worker's transfer metrics.
#[derive(Clone, Copy)]
struct Sums {
    bytes: f64,
    whole: f64,
    exposed_bytes: f64,
    exposed: f64,
}

async fn sums(decode: &Client) -> Sums {
    let text = decode.get("/metrics").await.text;
    Sums {
        bytes: metric(&text, "tandem_kv_transfer_bytes_total"),
        whole: metric(&text, "tandem_kv_transfer_seconds_sum"),
        exposed_bytes: metric(&text, "tandem_kv_transfer_exposed_bytes_total"),
        exposed: metric(&text, "tandem_kv_transfer_exposed_seconds_sum"),
    }
}

async fn bench(options: Options) -> Result<(), String> {
    let target = std::env::current_exe().map_err(|e| e.to_string())?;
    let target =
        target.parent().and_then(|dir| dir.parent()).ok_or("this program lies in no target folder")?;
    eprintln!("making a random checkpoint of Qwen3-0.6B's shape (once, 1.2 GB in {})", target.display());
    let model = random_checkpoint::qwen3_0_6b(target).map_err(|e| format!("the checkpoint: {e}"))?;
    eprintln!("starting a prefill and a decode process with it");
    let model = model.to_str().ok_or("the target folder's path is not UTF-8")?;
    let arguments = [
        "--processes",
        "--model",
        model,
        "--kv-memory",
        "2GiB",
        "--transport",
        &options.transport,
        "--threads",
        "1",
    ];
    let cluster = ProcessCluster::start(&arguments).await;
    let api = cluster.api.with_patience(PATIENCE);
    let name =
        cluster.api.get("/v1/models").await.json["data"][0]["id"].as_str().unwrap_or_default().to_owned();
    let workers = cluster.admin.get("/admin/cluster").await.json["workers"].clone();
    let decode = workers.as_array().and_then(|rows| rows.iter().find(|row| row["role"] == "decode").cloned());
    let decode = decode.and_then(|row| row["admin"].as_str()?.parse().ok()).ok_or("no decode worker")?;
    let decode = Client::new(decode);

    println!("transport {}: median (minimum to maximum) of {} runs", options.transport, options.runs);
    println!(
        "| prompt tokens | MiB | prefill s | whole transfer ms | exposed ms | exposed MiB | exposed / whole |"
    );
    println!("|---|---|---|---|---|---|---|");
    let mut rows: Vec<Value> = Vec::new();
    let mut seed = 1u32;
    for &tokens in &options.prompt_tokens {
        let mut runs = Vec::new();
        for run in 0..options.runs {
            eprint!("\r{tokens} tokens: run {} of {} ", run + 1, options.runs);
            // No two prompts begin alike, so no block is cached.
            seed += 1;
            let prompt: Vec<u32> = (0..tokens).map(|i| (i * 7 + seed * 131) % 1000).collect();
            let before = sums(&decode).await;
            let began = seam::now();
            let answer = api.complete(&name, &prompt, json!({ "max_tokens": 2 })).await;
            if answer.status != 200 {
                return Err(format!("a request failed: {}", answer.text));
            }
            let after = sums(&decode).await;
            runs.push((seam::now().since(began).as_secs_f64(), before, after));
        }
        eprint!("\r\x1b[K");
        let of = |value: &dyn Fn(&(f64, Sums, Sums)) -> f64| spread(runs.iter().map(value).collect());
        let took = of(&|run| run.0);
        let bytes = of(&|run| run.2.bytes - run.1.bytes)[1];
        let whole = of(&|run| 1e3 * (run.2.whole - run.1.whole));
        let exposed = of(&|run| 1e3 * (run.2.exposed - run.1.exposed));
        let exposed_bytes = of(&|run| run.2.exposed_bytes - run.1.exposed_bytes)[1];
        let ratio = of(&|run| (run.2.exposed - run.1.exposed) / (run.2.whole - run.1.whole));
        let mib = f64::from(1 << 20);
        println!(
            "| {tokens} | {:.0} | {} | {} | {} | {:.0} | {} |",
            bytes / mib,
            show(took, 1),
            show(whole, 0),
            show(exposed, 1),
            exposed_bytes / mib,
            show(ratio, 2),
        );
        rows.push(json!({
            "prompt_tokens": tokens, "bytes": bytes, "whole_ms": whole, "exposed_ms": exposed,
            "exposed_bytes": exposed_bytes, "ratio": ratio,
        }));
    }
    if let Some(file) = options.json {
        let text = json!({ "transport": options.transport, "runs": rows }).to_string();
        std::fs::write(&file, text).map_err(|e| format!("{}: {e}", file.display()))?;
    }
    cluster.interrupt().await;
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
