//! What nobody should send: every row of `bad_inputs.toml`, byte by byte, to a cluster that must answer the next
//! request as if nothing had been.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use serde::Deserialize;
use serde_json::{Value, json};
use tandem_chassis::seam;
use tandem_integration_tests::{Spec, TestCluster};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::support::{concurrently, run, tiny};

/// The table.
#[derive(Deserialize)]
struct Table {
    case: Vec<Case>,
}

/// A row; the table's head says what its fields mean.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Case {
    class: u32,
    name: String,
    #[serde(default = "post")]
    method: String,
    #[serde(default = "chat")]
    path: String,
    #[serde(default)]
    headers: Vec<String>,
    body: Option<String>,
    body_hex: Option<String>,
    raw: Option<String>,
    status: Statuses,
    code: Option<String>,
    param: Option<String>,
    #[serde(default)]
    closes: bool,
    #[serde(default)]
    half_close: bool,
    #[serde(default)]
    stalls: bool,
    answers: Option<usize>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Statuses {
    One(u16),
    Any(Vec<u16>),
}

impl Statuses {
    fn allow(&self, status: u16) -> bool {
        match self {
            Statuses::One(one) => *one == status,
            Statuses::Any(any) => any.contains(&status),
        }
    }
}

fn post() -> String {
    "POST".to_owned()
}

fn chat() -> String {
    "/v1/chat/completions".to_owned()
}

fn table() -> Vec<Arc<Case>> {
    toml::from_str::<Table>(include_str!("../../bad_inputs.toml"))
        .expect("the table is in order")
        .case
        .into_iter()
        .map(Arc::new)
        .collect()
}

/// `<<N*TEXT>>` is TEXT N times, `{{n}}` in it the number of the repetition.
fn written_out(text: &str, model: &str, host: SocketAddr) -> String {
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some((before, repeated)) = rest.split_once("<<") {
        let (times, repeated) = repeated.split_once('*').expect("<<N*TEXT>>");
        let (what, after) = repeated.split_once(">>").expect("<<N*TEXT>>");
        let what = what.replace("{{chunk}}", &"x".repeat(0x8000));
        out.push_str(before);
        for n in 0..times.parse::<usize>().expect("a number") {
            if what.contains("{{n}}") {
                out.push_str(&what.replace("{{n}}", &n.to_string()));
            } else {
                out.push_str(&what);
            }
        }
        rest = after;
    }
    out.push_str(rest);
    out.replace("{{model}}", model).replace("{{host}}", &host.to_string())
}

impl Case {
    fn bytes(&self, model: &str, host: SocketAddr) -> Vec<u8> {
        if let Some(raw) = &self.raw {
            let text = written_out(raw, model, host);
            return text.chars().map(|c| u8::try_from(u32::from(c)).expect("raw text is bytes")).collect();
        }
        let body = match (&self.body, &self.body_hex) {
            (Some(body), None) => written_out(body, model, host).into_bytes(),
            (None, Some(hex)) => (0..hex.len())
                .step_by(2)
                .map(|at| u8::from_str_radix(&hex[at..at + 2], 16).expect("hexadecimal"))
                .collect(),
            (None, None) => Vec::new(),
            _ => panic!("{}: one body at a time", self.name),
        };
        let mut headers: Vec<String> = self.headers.clone();
        if headers.is_empty() {
            headers.push("content-type: application/json".to_owned());
        }
        let mut head = format!("{} {} HTTP/1.1\r\nhost: {host}\r\n", self.method, self.path);
        headers.iter().for_each(|header| head.push_str(&format!("{header}\r\n")));
        head.push_str(&format!("content-length: {}\r\n\r\n", body.len()));
        [head.into_bytes(), body].concat()
    }
}

/// An answer as it came over the wire.
struct Answer {
    status: u16,
    body: Vec<u8>,
}

/// Reads one answer from what has come so far, and takes it away; `None` while it is not whole.
fn take_answer(bytes: &mut Vec<u8>, ended: bool, head_only: bool) -> Option<Answer> {
    let end = bytes.windows(4).position(|window| window == b"\r\n\r\n")? + 4;
    let head = String::from_utf8_lossy(&bytes[..end]).to_ascii_lowercase();
    let status = head.split(' ').nth(1)?.parse().ok()?;
    if status == 100 {
        // Go on: no answer yet.
        bytes.drain(..end);
        return take_answer(bytes, ended, head_only);
    }
    let length = head.split("\r\n").find_map(|line| line.strip_prefix("content-length: "));
    let length = length.and_then(|length| length.trim().parse::<usize>().ok());
    let whole = match length {
        _ if head_only => end,
        Some(length) if bytes.len() >= end + length => end + length,
        None if ended => bytes.len(),
        _ => return None,
    };
    let body = bytes[end..whole].to_vec();
    bytes.drain(..whole);
    Some(Answer { status, body })
}

/// Sends a case and says what is wrong with what came back.
async fn try_case(case: Arc<Case>, model: &str, host: SocketAddr) -> Result<(), String> {
    // Some are large: the others must not wait for them, or they would be late with their heads.
    let written = tokio::task::spawn_blocking({
        let (case, model) = (case.clone(), model.to_owned());
        move || case.bytes(&model, host)
    });
    let request = written.await.expect("the table is in order");
    let mut stream = seam::connect_tcp(host).await.map_err(|error| error.to_string())?;
    let (mut from, mut to) = stream.split();
    let send = async {
        // It may be refused before all of it is sent.
        let _ = to.write_all(&request).await;
        if case.half_close {
            let _ = to.shutdown().await;
        }
    };
    let (wanted, head_only) = (case.answers.unwrap_or(1), case.method == "HEAD");
    let receive = async {
        let (mut bytes, mut answers, mut ended) = (Vec::new(), Vec::new(), false);
        let mut buffer = vec![0; 64 << 10];
        loop {
            while let Some(answer) = take_answer(&mut bytes, ended, head_only) {
                answers.push(answer);
            }
            // Where the connection must end, wait for that.
            if ended || (answers.len() >= wanted && !case.closes) {
                return (answers, ended);
            }
            match from.read(&mut buffer).await {
                Ok(0) | Err(_) => ended = true,
                Ok(count) => bytes.extend_from_slice(&buffer[..count]),
            }
        }
    };
    // Both at once: whoever is refused early must be heard while still sending. Sending may then never end.
    let both = async {
        let mut receive = std::pin::pin!(receive);
        tokio::select! {
            received = &mut receive => received,
            () = send => receive.await,
        }
    };
    let limit = Duration::from_secs(60);
    let (answers, ended) =
        seam::timeout(limit, both).await.map_err(|_| "no answer within a minute".to_owned())?;
    judge(&case, &answers, ended)
}

fn judge(case: &Case, answers: &[Answer], ended: bool) -> Result<(), String> {
    let Some(first) = answers.first() else {
        return if case.status.allow(0) || case.stalls && case.closes {
            Ok(())
        } else {
            Err("the connection ended without an answer".to_owned())
        };
    };
    let text = String::from_utf8_lossy(&first.body);
    let said = format!("{} {}", first.status, text.chars().take(300).collect::<String>());
    if !case.status.allow(first.status) {
        return Err(said);
    }
    if case.closes && !ended {
        return Err(format!("the connection goes on after {said}"));
    }
    if let Some(wanted) = case.answers
        && answers.len() != wanted
    {
        return Err(format!("{} answers of {wanted}", answers.len()));
    }
    if case.code.is_none() && case.param.is_none() {
        return Ok(());
    }
    let body: Value = serde_json::from_slice(&first.body).map_err(|_| format!("not JSON: {said}"))?;
    let error = &body["error"];
    let message = error["message"].as_str().unwrap_or_default();
    if error["code"] != json!(case.code) || error["param"] != json!(case.param) || message.is_empty() {
        return Err(said);
    }
    if message.len() > 600 {
        return Err(format!("a message of {} bytes: {said}", message.len()));
    }
    Ok(())
}

async fn try_all(cluster: &TestCluster, cases: &[Arc<Case>], at_once: usize) {
    let (model, host) = (&cluster.model, cluster.address);
    let results = concurrently(cases.len(), at_once, |i| try_case(cases[i].clone(), model, host)).await;
    let wrong: Vec<String> = cases
        .iter()
        .zip(results)
        .filter_map(|(case, result)| Some(format!("class {}, {}: {}", case.class, case.name, result.err()?)))
        .collect();
    assert!(wrong.is_empty(), "{} of {} cases:\n{}", wrong.len(), cases.len(), wrong.join("\n"));

    let body = json!({ "model": model, "messages": [{ "role": "user", "content": "hi" }], "max_tokens": 2 });
    let answer = cluster.api.post("/v1/chat/completions", &body).await;
    assert_eq!(answer.status, 200, "{}", answer.text);
    cluster.wait_until_idle().await;
}

#[test]
fn bad_inputs_get_the_answers_of_the_table() {
    run(async {
        let cases = table();
        assert!(cases.len() >= 300, "{} cases", cases.len());
        let cluster = TestCluster::start(Spec::of(tiny()).workers(1, 1, 0)).await;
        let (stalling, others): (Vec<Arc<Case>>, Vec<Arc<Case>>) =
            cases.into_iter().partition(|case| case.stalls);
        try_all(&cluster, &others, 8).await;
        try_all(&cluster, &stalling, 8).await;
        println!("{} cases", stalling.len() + others.len());
        cluster.close().await;
    });
}

#[test]
fn texts_that_are_hard_to_tokenize_are_tokenized_where_the_context_is_long() {
    run(async {
        let cluster = TestCluster::start(Spec::of(tiny()).workers(1, 1, 0).fake("zero")).await;
        let mut cases = table();
        cases.retain(|case| case.class == 62);
        assert!(!cases.is_empty());
        // A million tokens are much for a cluster that shares its processors with other tests.
        try_all(&cluster, &cases, 1).await;
        cluster.close().await;
    });
}
