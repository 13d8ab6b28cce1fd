//! A client of the public door that keeps every event and knows the right answer.

use std::net::SocketAddr;
use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::{Request, Response};
use hyper_util::rt::TokioIo;
use serde_json::{Value, json};
use tandem_chassis::seam;
use tandem_engine::fake::{Ordinary, oracle, oracle_scores};
use tandem_types::{Choice, SamplingParams};

use super::case::Ask;

/// Every request has ended by then, whatever struck it: three attempts, each as long as a fault can hold one up.
pub(crate) const END_MAX: Duration = Duration::from_secs(90);

/// How a request ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Ended {
    /// With the right answer.
    Whole,
    /// With an error that the client sees, and nothing wrong before it.
    Loudly(String),
    /// The client left.
    Left,
    /// In a way that must not be.
    Wrongly(String),
}

/// Asks as `ask` says, and judges the answer.
pub(crate) async fn ask(api: SocketAddr, model: &str, ask: &Ask, ordinary: &Ordinary) -> Ended {
    seam::sleep(ask.at).await;
    let mut answer = Answer::new(ask, ordinary);
    let whole = async {
        match send(api, "/v1/completions", Some(&body(model, ask)), Some(&ask.name)).await {
            Ok(response) => answer.read(response).await,
            Err(broken) => Ended::Loudly(broken),
        }
    };
    match ask.leaves {
        Some(moment) => seam::timeout(moment, whole).await.unwrap_or(Ended::Left),
        None => {
            let late = |_| Ended::Wrongly(format!("no end after {END_MAX:?}"));
            seam::timeout(END_MAX, whole).await.unwrap_or_else(late)
        }
    }
}

fn body(model: &str, ask: &Ask) -> Value {
    let mut body = json!({
        "model": model,
        "prompt": ask.prompt,
        "max_tokens": ask.tokens,
        "n": ask.choices,
        "stream": ask.streamed,
        "ignore_eos": true,
        "return_token_ids": true,
        "temperature": if ask.seed.is_some() { 1 } else { 0 },
    });
    if ask.streamed {
        body["stream_options"] = json!({ "include_usage": true });
    }
    if let Some(seed) = ask.seed {
        body["seed"] = json!(seed);
    }
    if ask.logprobs {
        body["logprobs"] = json!(5);
        body["echo"] = json!(ask.scored);
    }
    body
}

/// An answer as it comes, beside the right one.
struct Answer<'a> {
    ask: &'a Ask,
    right: Vec<Vec<u32>>,
    /// Log probabilities that every choice begins with.
    scores: Vec<Option<f32>>,
    tokens: Vec<Vec<u32>>,
    logprobs: Vec<Vec<Option<f32>>>,
    finished: Vec<bool>,
    usage: Option<Value>,
    error: Option<String>,
    done: bool,
}

impl<'a> Answer<'a> {
    fn new(ask: &'a Ask, ordinary: &Ordinary) -> Answer<'a> {
        let sampling = SamplingParams {
            temperature: if ask.seed.is_some() { 1.0 } else { 0.0 },
            seed: ask.seed.unwrap_or(0),
            ..SamplingParams::default()
        };
        let right = (0..ask.choices)
            .map(|choice| oracle(ordinary, &ask.prompt, &sampling, Choice(choice), ask.tokens as usize));
        let scores = oracle_scores(ordinary, &ask.prompt, 0).into_iter().map(|scored| scored.logprob);
        Answer {
            ask,
            right: right.collect(),
            scores: std::iter::once(None).chain(scores).filter(|_| ask.scored).collect(),
            tokens: vec![Vec::new(); ask.choices as usize],
            logprobs: vec![Vec::new(); ask.choices as usize],
            finished: vec![false; ask.choices as usize],
            usage: None,
            error: None,
            done: false,
        }
    }

    async fn read(&mut self, response: Response<Incoming>) -> Ended {
        let status = response.status().as_u16();
        let mut body = response.into_body();
        if status != 200 || !self.ask.streamed {
            let Ok(bytes) = body.collect().await else {
                return Ended::Loudly("the connection broke".into());
            };
            let whole: Value = serde_json::from_slice(&bytes.to_bytes()).unwrap_or_default();
            return self.judge_whole(status, &whole);
        }
        let mut pending = Vec::new();
        let mut events = 0;
        while let Some(frame) = body.frame().await {
            let Ok(frame) = frame else { return self.judge_end(true) };
            pending.extend_from_slice(&frame.into_data().unwrap_or_default());
            while let Some(end) = pending.windows(2).position(|pair| pair == b"\n\n") {
                let event: Vec<u8> = pending.drain(..end + 2).collect();
                let event = String::from_utf8_lossy(&event).into_owned();
                if let Err(wrong) = self.event(event.trim_end()) {
                    return Ended::Wrongly(wrong);
                }
                events += 1;
                if let Some((after, pause)) = self.ask.stalls
                    && events == after
                {
                    seam::sleep(pause).await;
                }
            }
        }
        self.judge_end(false)
    }

    fn event(&mut self, event: &str) -> Result<(), String> {
        let data = event.strip_prefix("data: ").ok_or_else(|| format!("not an event: {event:?}"))?;
        if self.done || self.error.is_some() {
            return Err(format!("an event after the last one: {data}"));
        }
        if data == "[DONE]" {
            self.done = true;
            return Ok(());
        }
        let data: Value = serde_json::from_str(data).map_err(|e| format!("no JSON: {e}: {data}"))?;
        if let Some(error) = data.get("error") {
            let message = error["message"].as_str().filter(|text| !text.is_empty());
            self.error = Some(message.ok_or_else(|| format!("an error without a word: {data}"))?.to_owned());
            return Ok(());
        }
        if data["usage"].is_object() {
            self.usage = Some(data["usage"].clone());
        }
        for choice in data["choices"].as_array().into_iter().flatten() {
            self.choice(choice)?;
        }
        Ok(())
    }

    fn choice(&mut self, choice: &Value) -> Result<(), String> {
        let index = choice["index"].as_u64().unwrap_or_default() as usize;
        let right = &self.right[index];
        if self.finished[index] {
            return Err(format!("choice {index} goes on after its finish"));
        }
        self.tokens[index].extend(crate::client::token_ids(&choice["token_ids"]));
        let tokens = &self.tokens[index];
        if !right.starts_with(tokens) {
            let at = tokens.iter().zip(right).position(|(is, should)| is != should).unwrap_or(right.len());
            return Err(format!("choice {index} is wrong from token {at} of {}", tokens.len()));
        }
        let came = choice["logprobs"]["token_logprobs"].as_array().into_iter().flatten();
        self.logprobs[index].extend(came.map(|logprob| logprob.as_f64().map(|logprob| logprob as f32)));
        let logprobs = &self.logprobs[index];
        let wrong = logprobs.iter().zip(&self.scores).position(|(is, should)| is != should);
        if let Some(at) = wrong {
            let (is, should) = (&logprobs[at], &self.scores[at]);
            return Err(format!(
                "choice {index} scores position {at} of the prompt {is:?} and not {should:?}"
            ));
        }
        if choice["finish_reason"].is_string() {
            self.finished[index] = true;
            let wanted = if self.ask.logprobs { self.scores.len() + right.len() } else { 0 };
            if logprobs.len() != wanted {
                return Err(format!("choice {index} has {} log probabilities of {wanted}", logprobs.len()));
            }
            if tokens.len() != right.len() {
                return Err(format!("choice {index} ends with {} of {} tokens", tokens.len(), right.len()));
            }
        }
        Ok(())
    }

    fn judge_whole(&mut self, status: u16, whole: &Value) -> Ended {
        if status != 200 {
            return match whole["error"]["message"].as_str().filter(|text| !text.is_empty()) {
                // Before its first token nothing stands in the way of placing it again.
                Some(message) if self.ask.streamed && given_up_early(message) => {
                    Ended::Wrongly(format!("given up before its first token: {message}"))
                }
                Some(message) => Ended::Loudly(format!("{status}: {message}")),
                None => Ended::Wrongly(format!("{status} without a word")),
            };
        }
        self.usage = Some(whole["usage"].clone());
        for choice in whole["choices"].as_array().into_iter().flatten() {
            if let Err(wrong) = self.choice(choice) {
                return Ended::Wrongly(wrong);
            }
        }
        self.done = true;
        self.judge_end(false)
    }

    fn judge_end(&self, broken: bool) -> Ended {
        if let Some(error) = &self.error {
            return Ended::Loudly(error.clone());
        }
        if broken {
            return Ended::Loudly("the connection broke".into());
        }
        if !self.done {
            return Ended::Wrongly("the events ended without a last one".into());
        }
        if !self.finished.iter().all(|finished| *finished) {
            return Ended::Wrongly("done, but not every choice has a finish reason".into());
        }
        let usage = self.usage.clone().unwrap_or_default();
        let counts = (usage["prompt_tokens"].as_u64(), usage["completion_tokens"].as_u64());
        let right = (self.ask.prompt.len() as u64, u64::from(self.ask.tokens * self.ask.choices));
        if counts != (Some(right.0), Some(right.1)) {
            return Ended::Wrongly(format!("usage is {counts:?} and should be {right:?}"));
        }
        Ended::Whole
    }
}

/// Whether the router says that it has lost a worker fewer than three times.
fn given_up_early(message: &str) -> bool {
    ["(attempt 1)", "(attempt 2)"].iter().any(|attempt| message.contains(attempt))
}

/// GET of JSON.
pub(crate) async fn get(address: SocketAddr, path: &str) -> Result<Value, String> {
    json_of(send(address, path, None, None).await?).await
}

/// POST of JSON.
pub(crate) async fn post(address: SocketAddr, path: &str, body: &Value) -> Result<Value, String> {
    json_of(send(address, path, Some(body), None).await?).await
}

async fn json_of(response: Response<Incoming>) -> Result<Value, String> {
    let body = response.into_body().collect().await.map_err(|e| e.to_string())?;
    serde_json::from_slice(&body.to_bytes()).map_err(|e| e.to_string())
}

/// One request over a connection of its own, which breaks when the answer is dropped before its end.
async fn send(
    address: SocketAddr,
    path: &str,
    body: Option<&Value>,
    name: Option<&str>,
) -> Result<Response<Incoming>, String> {
    let stream = seam::connect(address).await.map_err(|e| e.to_string())?;
    let (mut sender, connection) =
        hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.map_err(|e| e.to_string())?;
    // It ends with the exchange.
    seam::spawn(async move { drop(connection.await) });
    let mut request = Request::builder()
        .method(if body.is_some() { "POST" } else { "GET" })
        .uri(path)
        .header("host", "simulated")
        .header("content-type", "application/json");
    if let Some(name) = name {
        request = request.header("x-request-id", name);
    }
    let body = body.map(Value::to_string).unwrap_or_default();
    let request = request.body(Full::new(Bytes::from(body))).map_err(|e| e.to_string())?;
    sender.send_request(request).await.map_err(|e| e.to_string())
}
