//! `tandem bench` against a server that misbehaves on purpose, and against a real cluster.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::{Command, Output, Stdio};

use serde_json::{Value, json};
use tandem_chassis::seam;
use tandem_integration_tests::processes::tandem;
use tandem_integration_tests::{ProcessCluster, checkpoints};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::sync::mpsc;

use crate::support::run;

/// How the server answers a streamed request.
#[derive(Clone, Copy, Debug)]
enum Behaviour {
    /// Three tokens and a finish reason.
    Whole,
    /// Two tokens, then an error event.
    ErrorEvent,
    /// Two tokens and a clean end of the body, without a finish reason.
    NoFinish,
    /// Two tokens, then the connection breaks within the body.
    Broken,
    /// 503 with a code.
    Refused,
    /// One token, and nothing ever after.
    Hangs,
}

const TOKEN: &str = "data: {\"choices\":[{\"index\":0,\"text\":\" a\",\"finish_reason\":null}]}\n\n";
const LAST: &str = "data: {\"choices\":[{\"index\":0,\"text\":\" b\",\"finish_reason\":\"length\"}]}\n\n";
const USAGE: &str =
    "data: {\"choices\":[],\"usage\":{\"prompt_tokens\":20,\"completion_tokens\":3}}\n\ndata: [DONE]\n\n";
const ERROR: &str =
    "data: {\"error\":{\"message\":\"gone\",\"type\":\"server_error\",\"code\":\"worker_lost\"}}\n\n";

/// How the server counts tokens outside of streams.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Tokenize {
    /// It has no `/tokenize`.
    Missing,
    /// By `/tokenize` as by usage.
    Right,
    /// By `/tokenize` one more than by usage.
    Wrong,
    /// Not at all: whoever asks waits.
    Never,
}

async fn server(script: &'static [Behaviour]) -> (SocketAddr, mpsc::UnboundedReceiver<Value>) {
    tokenizing_server(script, Tokenize::Missing).await
}

/// Answers streamed requests by `script`, round and round; says the body of every completion to `seen` first.
async fn tokenizing_server(
    script: &'static [Behaviour],
    tokenize: Tokenize,
) -> (SocketAddr, mpsc::UnboundedReceiver<Value>) {
    let listener = seam::listen_tcp("127.0.0.1:0").await.expect("a port");
    let address = listener.local_addr().expect("an address");
    let (say, seen) = mpsc::unbounded_channel();
    // Serves until the test's runtime ends.
    seam::spawn(async move {
        let mut turn = script.iter().cycle();
        while let Ok((mut stream, _)) = listener.accept().await {
            let Some((head, body)) = request(&mut stream).await else { continue };
            // Every word and every digit is a token.
            let cost =
                |word: &str| if word.starts_with(|c: char| c.is_ascii_digit()) { word.len() } else { 1 };
            let tokens: usize = body["prompt"].as_str().unwrap_or_default().split(' ').map(cost).sum();
            let answer = if head.starts_with("GET /v1/models ") {
                whole("200 OK", &json!({ "data": [{ "id": "invented" }] }))
            } else if tokenize == Tokenize::Never {
                let _ = say.send(body);
                hold(stream);
                continue;
            } else if head.starts_with("POST /tokenize ") && tokenize != Tokenize::Missing {
                whole("200 OK", &json!({ "count": tokens + usize::from(tokenize == Tokenize::Wrong) }))
            } else if !head.starts_with("POST /v1/completions ") {
                whole("404 Not Found", &json!({ "error": { "message": "no such path" } }))
            } else if body["stream"] == true {
                let behaviour = *turn.next().expect("it goes round");
                let _ = say.send(body);
                let answer = streamed(behaviour);
                let _ = stream.write_all(answer.as_bytes()).await;
                if let Behaviour::Hangs = behaviour {
                    hold(stream);
                }
                continue;
            } else {
                let _ = say.send(body);
                let choice = json!({ "text": "x", "finish_reason": "length" });
                whole("200 OK", &json!({ "choices": [choice], "usage": { "prompt_tokens": tokens } }))
            };
            let _ = stream.write_all(answer.as_bytes()).await;
        }
    });
    (address, seen)
}

/// Keeps a connection until the client leaves.
fn hold(mut stream: tokio::net::TcpStream) {
    seam::spawn(async move {
        let _ = stream.read(&mut [0; 1]).await;
    });
}

/// One request: its head, and its body as JSON.
async fn request(stream: &mut tokio::net::TcpStream) -> Option<(String, Value)> {
    let mut bytes = Vec::new();
    loop {
        if let Some(end) = bytes.windows(4).position(|four| four == b"\r\n\r\n") {
            let head = String::from_utf8_lossy(&bytes[..end]).into_owned();
            let length = head.lines().find_map(|line| line.strip_prefix("content-length: "));
            let length = length.map_or(0, |length| length.trim().parse().expect("a length"));
            if bytes.len() >= end + 4 + length {
                return Some((head, serde_json::from_slice(&bytes[end + 4..]).unwrap_or_default()));
            }
        }
        if stream.read_buf(&mut bytes).await.ok()? == 0 {
            return None;
        }
    }
}

fn whole(status: &str, body: &Value) -> String {
    let body = body.to_string();
    format!("HTTP/1.1 {status}\r\nconnection: close\r\ncontent-length: {}\r\n\r\n{body}", body.len())
}

fn streamed(behaviour: Behaviour) -> String {
    let events = match behaviour {
        Behaviour::Whole => format!("{TOKEN}{TOKEN}{LAST}{USAGE}"),
        Behaviour::ErrorEvent => format!("{TOKEN}{TOKEN}{ERROR}data: [DONE]\n\n"),
        Behaviour::NoFinish | Behaviour::Broken => format!("{TOKEN}{TOKEN}"),
        Behaviour::Hangs => TOKEN.to_owned(),
        Behaviour::Refused => {
            return whole("503 Service Unavailable", &json!({ "error": { "code": "overloaded" } }));
        }
    };
    let end = if let Behaviour::Broken | Behaviour::Hangs = behaviour { "" } else { "0\r\n\r\n" };
    let head = "HTTP/1.1 200 OK\r\nconnection: close\r\ntransfer-encoding: chunked\r\n\r\n";
    format!("{head}{:x}\r\n{events}\r\n{end}", events.len())
}

/// A file of this process's own, removed at the end.
struct File(PathBuf);

impl File {
    fn new(end: &str) -> File {
        File(std::env::temp_dir().join(format!("tandem-bench-{:x}.{end}", seam::random_u128())))
    }

    fn path(&self) -> &str {
        self.0.to_str().expect("a path")
    }

    fn text(&self) -> String {
        std::fs::read_to_string(&self.0).expect("it was written")
    }

    /// The only run of a report.
    fn run(&self) -> Value {
        let mut report: Value = serde_json::from_str(&self.text()).expect("JSON");
        assert_eq!(report["runs"].as_array().map(Vec::len), Some(1));
        report["runs"][0].take()
    }
}

impl Drop for File {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

async fn bench(address: SocketAddr, arguments: &[&str]) -> Output {
    let mut command = Command::new(tandem());
    command.args(["bench", "--url", &format!("http://{address}")]).args(arguments);
    let output = tokio::task::spawn_blocking(move || command.output().expect("it runs"));
    output.await.expect("the runner lives")
}

/// Ctrl-C, and what it says until its end.
async fn interrupt(child: std::process::Child) -> Output {
    // SAFETY: a plain system call on a process this test has started and not waited for.
    let interrupted = unsafe { libc::kill(child.id() as i32, libc::SIGINT) };
    assert_eq!(interrupted, 0);
    let output = tokio::task::spawn_blocking(move || child.wait_with_output().expect("it ends"));
    output.await.expect("the runner lives")
}

/// Fields that every run has, with what they may be.
fn assert_form(run: &Value) {
    for name in ["requests", "errors", "cut"] {
        assert!(run[name].is_u64(), "{name}: {run:#}");
    }
    for name in ["goodput_rps", "attainment", "offered_rps"] {
        assert!(run[name].is_f64(), "{name}: {run:#}");
    }
    for name in ["ttft_ms", "tpot_ms", "itl_ms", "e2e_ms"] {
        for part in ["p50", "p90", "p99", "mean"] {
            assert!(run[name][part].is_f64(), "{name}.{part}: {run:#}");
        }
    }
    for name in ["router_cpu_us_per_request", "router_cpu_us_per_token"] {
        assert!(run[name].is_f64() || run[name].is_null(), "{name}: {run:#}");
    }
    assert!(run["name"].is_string() && run["config"].is_object() && run["late_ms"].is_object(), "{run:#}");
}

#[test]
fn every_way_to_end_is_counted_as_what_it_is() {
    run(async {
        const SCRIPT: &[Behaviour] = &[
            Behaviour::Whole,
            Behaviour::ErrorEvent,
            Behaviour::Refused,
            Behaviour::NoFinish,
            Behaviour::Whole,
            Behaviour::Broken,
        ];
        let (address, mut seen) = server(SCRIPT).await;
        let (report, page) = (File::new("json"), File::new("html"));
        let arguments =
            ["--concurrency", "1", "--requests", "24", "--input-tokens", "20", "--output-tokens", "3"];
        let files = ["--slo", "ttft=60s,tpot=60s", "--json", report.path(), "--html", page.path()];
        let output = bench(address, &[&arguments[..], &files].concat()).await;
        let said = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(output.status.success(), "{output:?}");
        let ran = report.run();
        assert_form(&ran);
        let counts =
            ["requests", "errors", "cut", "completed"].map(|name| ran[name].as_u64().unwrap_or_default());
        assert_eq!(counts, [24, 4, 12, 8], "{ran:#}");
        assert_eq!(ran["errors_by_kind"], json!({ "503 overloaded": 4 }));
        let cut = json!({ "broken": 4, "error event worker_lost": 4, "no finish reason": 4 });
        assert_eq!(ran["cut_by_kind"], cut);
        assert_eq!(ran["attainment"], 8.0 / 24.0);
        // Three of each whole answer, two of each that was cut.
        assert_eq!(ran["output_tokens"], 8 * 3 + 12 * 2);
        assert_eq!((&ran["prompt_tokens"], &ran["prompt_tokens_asked"]), (&json!(8 * 20), &json!(24 * 20)));
        assert!(ran["router_cpu_us_per_request"].is_null(), "nobody there is a router");
        for part in ["4 (4 503 overloaded)", "12 (4 broken, 4 error event worker_lost, 4 no finish reason)"] {
            assert!(said.contains(part), "{part}: {said}");
        }
        let html = page.text();
        for part in [
            "<td>requests</td><td>24</td>",
            "<td>errors</td><td>4</td>",
            "<td>cut streams</td><td>12</td>",
            "<td>attained</td><td>33.33 %</td>",
            "<svg",
        ] {
            assert!(html.contains(part), "{part}");
        }

        let mut firsts = std::collections::HashSet::new();
        while let Ok(body) = seen.try_recv() {
            if body["stream"] != true {
                continue; // it counts tokens
            }
            let prompt = body["prompt"].as_str().expect("a prompt");
            // Eight digits and twelve words.
            assert_eq!(prompt.split(' ').count(), 13, "{prompt}");
            assert_eq!((&body["max_tokens"], &body["model"]), (&json!(3), &json!("invented")));
            firsts.insert(prompt.split(' ').next().unwrap_or_default().to_owned());
        }
        assert_eq!(firsts.len(), 24, "no two prompts begin alike");
    });
}

#[test]
fn tokenize_is_asked_instead_of_completions_where_both_count_alike() {
    run(async {
        for tokenize in [Tokenize::Missing, Tokenize::Right, Tokenize::Wrong] {
            let (address, mut seen) = tokenizing_server(&[Behaviour::Whole], tokenize).await;
            let load = ["--concurrency", "2", "--requests", "6", "--input-tokens", "20"];
            let output = bench(address, &load).await;
            assert!(output.status.success(), "{output:?}");
            let (mut small, mut streams) = (0, 0);
            while let Ok(body) = seen.try_recv() {
                let prompt = body["prompt"].as_str().expect("a prompt");
                if body["stream"] == true {
                    streams += 1;
                    // Eight digits and twelve words.
                    assert_eq!(prompt.split(' ').count(), 13, "{tokenize:?}: {prompt}");
                } else {
                    small += 1;
                }
            }
            assert_eq!(streams, 6);
            assert_eq!(small == 1, tokenize == Tokenize::Right, "{tokenize:?}: {small} small completions");
        }
    });
}

#[test]
fn a_run_without_any_good_answer_fails_and_still_says_what_happened() {
    run(async {
        let (address, _seen) = server(&[Behaviour::Refused]).await;
        let output = bench(address, &["--rate", "200", "--requests", "5"]).await;
        assert_eq!(output.status.code(), Some(1), "{output:?}");
        assert!(String::from_utf8_lossy(&output.stdout).contains("5 (5 503 overloaded)"), "{output:?}");
        assert!(String::from_utf8_lossy(&output.stderr).contains("no request was answered"), "{output:?}");
    });
}

#[test]
fn interrupted_it_shows_what_it_has_measured() {
    run(async {
        let script = &[Behaviour::Whole, Behaviour::Whole, Behaviour::Whole, Behaviour::Hangs];
        let (address, mut seen) = server(script).await;
        let report = File::new("json");
        let url = format!("http://{address}");
        let child = Command::new(tandem())
            .args(["bench", "--url", &url, "--concurrency", "1", "--duration", "1h", "--json", report.path()])
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("it runs");
        let mut streams = 0;
        while streams < 4 {
            let body = seen.recv().await.expect("the server lives");
            streams += u32::from(body["stream"] == true);
        }
        let output = interrupt(child).await;
        assert!(output.status.success(), "{output:?}");
        let ran = report.run();
        assert_form(&ran);
        assert_eq!((&ran["requests"], &ran["unfinished"]), (&json!(3), &json!(1)), "{ran:#}");
        assert_eq!(ran["interrupted"], true);
        assert!(String::from_utf8_lossy(&output.stdout).contains("ended early with 1 requests running"));
    });
}

#[test]
fn interrupted_before_anything_was_sent_it_says_so() {
    run(async {
        let (address, mut seen) = tokenizing_server(&[Behaviour::Whole], Tokenize::Never).await;
        let url = format!("http://{address}");
        let child = Command::new(tandem())
            .args(["bench", "--url", &url, "--concurrency", "1"])
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("it runs");
        seen.recv().await.expect("the server lives");
        let output = interrupt(child).await;
        assert_eq!(output.status.code(), Some(1), "{output:?}");
        assert!(String::from_utf8_lossy(&output.stderr).contains("before anything was sent"), "{output:?}");
    });
}

#[test]
fn a_real_cluster_gets_prompts_of_the_tokens_asked_for_and_its_router_is_watched() {
    run(async {
        let model = checkpoints::named("qwen3");
        let cluster =
            ProcessCluster::start(&["--processes", "--fake", "--model", model.to_str().expect("a path")])
                .await;
        let admin = format!("http://{}", cluster.admin_address);
        for endpoint in ["completions", "chat"] {
            let report = File::new("json");
            let load =
                ["--concurrency", "4", "--requests", "40", "--endpoint", endpoint, "--output-tokens", "9"];
            let length = ["--input-tokens", "uniform:60,200", "--admin", &admin, "--json", report.path()];
            let output = bench(cluster.address, &[&load[..], &length].concat()).await;
            assert!(output.status.success(), "{output:?}");
            let ran = report.run();
            assert_form(&ran);
            assert_eq!((&ran["requests"], &ran["completed"]), (&json!(40), &json!(40)), "{ran:#}");
            assert_eq!(ran["output_tokens"], 40 * 9);
            assert_eq!(ran["prompt_tokens"], ran["prompt_tokens_asked"]);
            assert!(ran["router_cpu_us_per_request"].as_f64().is_some_and(|micros| micros > 0.0), "{ran:#}");
            assert_eq!(ran["router_shares_its_process"], false);
        }
        assert_eq!(cluster.interrupt().await, Some(0));
    });
}
