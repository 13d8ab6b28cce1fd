//! What each gateway is put through, and what of it counts.

use std::time::Duration;

use serde_json::Value;
use tandem_chassis::seam;
use tandem_integration_tests::{Client, measure};

use crate::subjects::{Started, Subject, address, first_answer, model};
use crate::{Options, sockets};

/// A line of the table.
pub struct Scenario {
    /// What is done.
    pub name: &'static str,
    /// Of what the figure is.
    pub unit: &'static str,
    /// What it must not exceed: with prefill and decode apart, and plain.
    pub goal: (f64, f64),
    /// How it is measured.
    pub measure: Measure,
    /// Whether once is enough.
    pub once: bool,
}

/// How a figure comes about.
#[derive(Clone, Copy)]
pub enum Measure {
    /// Processor time of the gateway per request.
    PerRequest(Load),
    /// The same per token of streams.
    PerToken(Load),
    /// Median time to the first token; what no gateway takes is taken off later.
    FirstToken(Load),
    /// Resident memory after a few requests.
    Rest,
    /// Memory after many distinct prompts, above that at rest.
    AfterPrompts,
    /// Memory of an idle connection.
    Idle,
    /// Memory of a stream that nobody reads.
    SlowReaders,
    /// How long a head may take that comes a byte a second.
    SlowHeads,
    /// From the start of the process to the first answer.
    Start,
}

/// What `tandem bench` is told.
#[derive(Clone, Copy)]
pub struct Load {
    at_once: usize,
    /// Bytes of a prompt's own part, and of what it shares with one of 64 groups.
    own_bytes: f64,
    shared_bytes: f64,
    output_tokens: u32,
    stream: bool,
    paced: bool,
}

const SHORT: Load =
    Load { at_once: 128, own_bytes: 64.0, shared_bytes: 0.0, output_tokens: 16, stream: false, paced: false };
const STREAM: Load = Load { at_once: 64, output_tokens: 128, stream: true, ..SHORT };
const PACED: Load = Load { at_once: 64, output_tokens: 32, stream: true, paced: true, ..SHORT };
const NONE: f64 = f64::INFINITY;

/// The lines, in order. Goals are those of the measured peers' notes.
pub const SCENARIOS: &[Scenario] = &[
    cpu("short, 32 at once", (NONE, NONE), Load { at_once: 32, ..SHORT }),
    cpu("short, 128 at once", (140.0, 100.0), SHORT),
    cpu("short, 512 at once", (NONE, NONE), Load { at_once: 512, ..SHORT }),
    cpu(
        "4 KiB shared by 64 groups",
        (175.0, 175.0),
        Load { own_bytes: 256.0, shared_bytes: 4096.0, ..SHORT },
    ),
    cpu("16 KiB, distinct", (NONE, NONE), Load { at_once: 32, own_bytes: 16384.0, ..SHORT }),
    cpu("128 KiB, distinct", (2000.0, 2000.0), Load { at_once: 8, own_bytes: 131072.0, ..SHORT }),
    Scenario {
        name: "64 streams, 10 ms a token",
        unit: "CPU µs per token",
        goal: (30.0, 30.0),
        measure: Measure::PerToken(PACED),
        once: false,
    },
    Scenario {
        name: "64 streams, unpaced",
        unit: "CPU µs per token",
        goal: (NONE, NONE),
        measure: Measure::PerToken(STREAM),
        once: false,
    },
    Scenario {
        name: "first token, one at a time",
        unit: "ms more than no gateway",
        goal: (0.7, 0.4),
        measure: Measure::FirstToken(Load { at_once: 1, output_tokens: 2, ..PACED }),
        once: false,
    },
    once("memory at rest", "MiB", 120.0, Measure::Rest),
    once("10,000 idle connections", "KiB each", 5.0, Measure::Idle),
    once("32 streams that nobody reads", "KiB each", 256.0, Measure::SlowReaders),
    once("500 heads, a byte a second", "s until closed, 40 at most", 11.0, Measure::SlowHeads),
    once("memory after 20,000 prompts", "MiB above rest", 20.0, Measure::AfterPrompts),
    Scenario {
        name: "start to first 200",
        unit: "s",
        goal: (0.3, 0.3),
        measure: Measure::Start,
        once: false,
    },
];

const fn cpu(name: &'static str, goal: (f64, f64), load: Load) -> Scenario {
    Scenario { name, unit: "CPU µs per request", goal, measure: Measure::PerRequest(load), once: false }
}

const fn once(name: &'static str, unit: &'static str, goal: f64, measure: Measure) -> Scenario {
    Scenario { name, unit, goal: (goal, goal), measure, once: true }
}

/// What one run gave.
#[derive(Clone, Copy, Debug, Default)]
pub struct Figure {
    /// In the scenario's unit; none where this gateway cannot be measured so.
    pub value: Option<f64>,
    /// Requests or tokens per second, where there was a load.
    pub per_second: Option<f64>,
    /// What of it is left when its cause is gone.
    pub left: Option<f64>,
    /// Requests that were not answered, or connections that were not held, as they should be.
    pub failed: u64,
    /// Whether the client was its own bottleneck.
    pub client_bound: bool,
}

/// Connections that are idle, and prompts that are all different.
const IDLE: usize = 10_000;
const PROMPTS: usize = 20_000;
const SLOW: usize = 32;
const SLOW_TOKENS: u32 = 12_000;
const SLOW_HEADS: usize = 500;
const SLOW_HEADS_MAX: Duration = Duration::from_secs(40);

/// Puts one gateway through one scenario once.
pub async fn measure(scenario: &Scenario, subject: &Subject, options: &Options) -> Result<Figure, String> {
    let few = if options.quick { 10 } else { 1 };
    let value = |value: f64| Figure { value: Some(value), ..Figure::default() };
    let Some(group) = subject.group else {
        // Without processes to look at, only what clients see can be measured.
        return match scenario.measure {
            Measure::PerRequest(load) | Measure::PerToken(load) => bench(subject, load, options, None).await,
            Measure::FirstToken(load) => first_token(subject, load, options).await,
            _ => Ok(Figure::default()),
        };
    };
    let address = address(&subject.url)?;
    match scenario.measure {
        Measure::PerRequest(load) => bench(subject, load, options, Some("router_cpu_us_per_request")).await,
        Measure::PerToken(load) => bench(subject, load, options, Some("router_cpu_us_per_token")).await,
        Measure::FirstToken(load) => first_token(subject, load, options).await,
        Measure::Rest => Ok(value(mib(measure::at_rest(group).await))),
        Measure::AfterPrompts => {
            let before = mib(measure::at_rest(group).await);
            let load = Load { own_bytes: 1024.0, ..SHORT };
            let ran = bench_of(subject, load, &["--requests", &(PROMPTS / few).to_string()], None).await?;
            Ok(Figure { value: Some(mib(measure::at_rest(group).await) - before), ..ran })
        }
        Measure::Idle => {
            let idle = sockets::idle(address, group, IDLE / few).await?;
            Ok(Figure { left: Some(idle.after), failed: idle.refused as u64, ..value(idle.during) })
        }
        Measure::SlowReaders => {
            let model = model(&Client::new(address)).await.ok_or("it lists no model")?;
            Ok(value(sockets::slow_readers(address, &model, group, SLOW, SLOW_TOKENS).await?))
        }
        Measure::SlowHeads => {
            Ok(value(sockets::slow_heads(address, SLOW_HEADS / few, SLOW_HEADS_MAX).await?))
        }
        Measure::Start => Ok(Figure::default()),
    }
}

/// Starts a gateway in place of one that has ended; seconds to its first answer.
pub async fn start(subject: &Subject) -> Result<(f64, Started), String> {
    let start = subject.start.as_ref().ok_or("it is not ours to start")?;
    let began = seam::now();
    let started = start.start()?;
    let answered = seam::timeout(Duration::from_secs(30), first_answer(&subject.url)).await;
    answered.map_err(|_| format!("{}: no answer in 30 s after a start", subject.name))?;
    Ok((seam::now().since(began).as_secs_f64(), started))
}

async fn first_token(subject: &Subject, load: Load, options: &Options) -> Result<Figure, String> {
    let requests = if options.quick { "20" } else { "60" };
    bench_of(subject, load, &["--requests", requests], Some("ttft_ms")).await
}

async fn bench(
    subject: &Subject,
    load: Load,
    options: &Options,
    figure: Option<&str>,
) -> Result<Figure, String> {
    let duration = format!("{}s", options.seconds);
    bench_of(subject, load, &["--duration", &duration], figure).await
}

/// Runs `tandem bench`; `figure` names what of its report counts.
async fn bench_of(
    subject: &Subject,
    load: Load,
    more: &[&str],
    figure: Option<&str>,
) -> Result<Figure, String> {
    let ran = report(subject, load, more).await?;
    let (whole, all) = (ran["completed"].as_u64().unwrap_or(0), ran["requests"].as_u64().unwrap_or(0));
    let mut value = figure.and_then(|name| ran[name]["p50"].as_f64().or(ran[name].as_f64()));
    if figure == Some("router_cpu_us_per_request") {
        // What refusals cost is part of what an answer costs.
        value = value.map(|value| value * all as f64 / whole.max(1) as f64);
    }
    let seconds = ran["seconds"].as_f64().unwrap_or(f64::NAN);
    let done = if load.stream { ran["output_tokens"].as_f64().unwrap_or(0.0) } else { whole as f64 };
    Ok(Figure {
        value,
        per_second: Some(done / seconds),
        left: None,
        failed: all - whole,
        client_bound: ran["warnings"].to_string().contains("the client was the bottleneck"),
    })
}

/// Bytes of a body per token of its prompt, for this gateway's tokenizer.
pub async fn bytes_per_token(subject: &Subject) -> Result<f64, String> {
    let load = Load { at_once: 1, own_bytes: 1000.0 * subject.bytes_per_token, output_tokens: 1, ..SHORT };
    let ran = report(subject, load, &["--requests", "4"]).await?;
    let bytes = ran["sent_bytes"].as_f64().zip(ran["prompt_tokens_asked"].as_f64());
    bytes.map(|(bytes, tokens)| bytes / tokens).ok_or_else(|| "no bytes were counted".to_owned())
}

async fn report(subject: &Subject, load: Load, more: &[&str]) -> Result<Value, String> {
    let tokens = |bytes: f64| ((bytes / subject.bytes_per_token).round() as u32).max(1).to_string();
    let (url, group) =
        if load.paced { (&subject.paced, subject.paced_group) } else { (&subject.url, subject.group) };
    let (at_once, output_tokens) = (load.at_once.to_string(), load.output_tokens.to_string());
    let (input_tokens, shared) = (tokens(load.own_bytes), format!("64,{}", tokens(load.shared_bytes)));
    let pid = group.map(|group| group.pid().to_string());
    let mut arguments = vec!["--endpoint", "chat", "--url", url, "--timeout", "60s"];
    arguments.extend(["--concurrency", &at_once, "--input-tokens", &input_tokens]);
    arguments.extend(["--output-tokens", &output_tokens]);
    arguments.extend(more);
    if load.shared_bytes > 0.0 {
        arguments.extend(["--shared-prefix", &shared]);
    }
    if !load.stream {
        arguments.push("--no-stream");
    }
    if let Some(pid) = &pid {
        arguments.extend(["--router-pid", pid]);
    }
    measure::bench(&arguments).await.map_err(|error| format!("{}: {error}", subject.name))
}

fn mib(bytes: u64) -> f64 {
    bytes as f64 / f64::from(1 << 20)
}
