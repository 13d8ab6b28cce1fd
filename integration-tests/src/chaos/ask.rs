//! One request from a client's side: everything that came, when it came, and whether it may have come so.

use std::net::SocketAddr;
use std::sync::Arc;

use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::Request;
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use serde_json::{Value, json};
use tandem_chassis::seam;
use tandem_engine::fake::{Ordinary, oracle};
use tandem_types::{Choice, SamplingParams};
use tokio::sync::watch;

/// What a client asks: the completion of token ids.
#[derive(Clone, Debug)]
pub struct Question {
    /// Its `x-request-id`.
    pub name: String,
    /// The model's name in the API.
    pub model: Arc<str>,
    /// The prompt.
    pub prompt: Vec<u32>,
    /// How many tokens it wants, exactly.
    pub max_tokens: usize,
    /// Greedy, or drawn with this seed.
    pub seed: Option<u64>,
    /// By events, or in one piece.
    pub streamed: bool,
}

/// What a client heard until the answer's end.
#[derive(Clone, Debug, Default)]
pub struct Heard {
    /// HTTP status; 0 if none came.
    pub status: u16,
    /// Token ids in the order in which they came.
    pub tokens: Vec<u32>,
    finish: Option<String>,
    usage: Value,
    done: bool,
    error: Option<String>,
    broken: Option<String>,
    nonsense: Option<String>,
}

/// How an answer ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum End {
    /// Every token as the oracle says, a finish reason, usage, `[DONE]`.
    Complete,
    /// Before its end, and its client knows: an error event, an HTTP error or a broken transport.
    Loud(String),
    /// As no answer may end.
    Wrong(String),
}

impl Question {
    fn body(&self) -> Value {
        let mut body = json!({
            "model": &*self.model,
            "prompt": self.prompt,
            "max_tokens": self.max_tokens,
            "ignore_eos": true,
            "return_token_ids": true,
            "temperature": if self.seed.is_some() { 1 } else { 0 },
            "stream": self.streamed,
        });
        if let Some(seed) = self.seed {
            body["seed"] = json!(seed);
        }
        if self.streamed {
            body["stream_options"] = json!({ "include_usage": true });
        }
        body
    }

    /// The tokens of a fault-free answer.
    pub fn answer(&self, ordinary: &Ordinary) -> Vec<u32> {
        let sampling = SamplingParams {
            temperature: if self.seed.is_some() { 1.0 } else { 0.0 },
            seed: self.seed.unwrap_or_default(),
            ..SamplingParams::default()
        };
        oracle(ordinary, &self.prompt, &sampling, Choice(0), self.max_tokens)
    }

    /// Whether an answer may be as it was heard, and which kind of end it is.
    pub fn judge(&self, heard: &Heard, ordinary: &Ordinary) -> End {
        let answer = self.answer(ordinary);
        if let Some(nonsense) = &heard.nonsense {
            return End::Wrong(nonsense.clone());
        }
        let wrong = heard.tokens.iter().zip(&answer).position(|(heard, right)| heard != right);
        if let Some(at) = wrong {
            return End::Wrong(format!("token {at} is {} and not {}", heard.tokens[at], answer[at]));
        }
        if heard.tokens.len() > answer.len() {
            return End::Wrong(format!("{} tokens instead of {}", heard.tokens.len(), answer.len()));
        }
        match (&heard.error, &heard.broken) {
            (Some(_), _) if heard.done => End::Wrong("[DONE] after an error".into()),
            (Some(error), _) => End::Loud(error.clone()),
            (None, Some(broken)) => End::Loud(format!("transport broken: {broken}")),
            (None, None) if !heard.done => End::Wrong("a silent end".into()),
            (None, None) => self.judge_whole(heard, answer.len()),
        }
    }

    fn judge_whole(&self, heard: &Heard, tokens: usize) -> End {
        if heard.tokens.len() != tokens {
            return End::Wrong(format!("ended with {} tokens of {tokens}", heard.tokens.len()));
        }
        if heard.finish.as_deref() != Some("length") {
            return End::Wrong(format!("finish reason {:?}", heard.finish));
        }
        let (prompt, completion) = (&heard.usage["prompt_tokens"], &heard.usage["completion_tokens"]);
        if *prompt != self.prompt.len() || *completion != tokens {
            return End::Wrong(format!("usage {}", heard.usage));
        }
        End::Complete
    }
}

/// A connection to an HTTP port, used by one request after another.
pub struct Line {
    sender: http1::SendRequest<Full<Bytes>>,
    driver: tokio::task::JoinHandle<()>,
}

impl Drop for Line {
    fn drop(&mut self) {
        // Closes the socket, whatever is under way.
        self.driver.abort();
    }
}

impl Line {
    /// Connects.
    pub async fn open(address: SocketAddr) -> Result<Line, String> {
        let stream = seam::connect_tcp(address).await.map_err(|error| error.to_string())?;
        let (sender, connection) =
            http1::handshake(TokioIo::new(stream)).await.map_err(|error| error.to_string())?;
        let driver = seam::spawn(async move { connection.await.unwrap_or_default() });
        Ok(Line { sender, driver })
    }

    /// Whether another request may follow.
    pub fn is_open(&self) -> bool {
        !self.sender.is_closed()
    }

    /// GET of JSON.
    pub async fn get(&mut self, path: &str) -> Result<Value, String> {
        let request = Request::get(path).header("host", "tandem").body(Full::default());
        self.sender.ready().await.map_err(|error| error.to_string())?;
        let answer = self.sender.send_request(request.expect("a good request")).await;
        let body = answer.map_err(|error| error.to_string())?.into_body().collect().await;
        let body = body.map_err(|error| error.to_string())?.to_bytes();
        serde_json::from_slice(&body).map_err(|error| error.to_string())
    }

    /// Asks and listens to the end. `heard` has what came also when this is dropped half-way; `tokens` rises
    /// with it.
    pub async fn ask(&mut self, question: &Question, heard: &mut Heard, tokens: &watch::Sender<usize>) {
        let request = Request::post("/v1/completions")
            .header("host", "tandem")
            .header("content-type", "application/json")
            .header("x-request-id", &question.name)
            .body(Full::from(question.body().to_string()));
        if let Err(error) = self.sender.ready().await {
            return heard.broken = Some(error.to_string());
        }
        let mut body = match self.sender.send_request(request.expect("a good request")).await {
            Ok(answer) => {
                heard.status = answer.status().as_u16();
                answer.into_body()
            }
            Err(error) => return heard.broken = Some(error.to_string()),
        };
        let mut pending = Vec::new();
        while let Some(frame) = body.frame().await {
            match frame {
                Ok(frame) => pending.extend_from_slice(frame.data_ref().map_or(&[], |data| data)),
                Err(error) => return heard.broken = Some(error.to_string()),
            }
            if question.streamed && heard.status == 200 {
                heard.take_events(&mut pending);
                tokens.send_if_modified(|known| {
                    std::mem::replace(known, heard.tokens.len()) != heard.tokens.len()
                });
            }
        }
        if !question.streamed || heard.status != 200 {
            heard.take_whole(&pending);
        } else if !pending.is_empty() {
            heard.nonsense = Some(format!("half an event: {:?}", String::from_utf8_lossy(&pending)));
        }
    }
}

impl Heard {
    /// No answer could be asked for.
    pub fn broken(&mut self, why: String) {
        self.broken = Some(why);
    }

    fn take_events(&mut self, pending: &mut Vec<u8>) {
        while let Some(end) = pending.windows(2).position(|pair| pair == b"\n\n") {
            let event: Vec<u8> = pending.drain(..end + 2).collect();
            let text = String::from_utf8_lossy(&event);
            match text.trim_end().strip_prefix("data: ") {
                Some(_) if self.done || self.error.is_some() => {
                    self.nonsense = Some(format!("after the end: {text:?}"));
                }
                Some("[DONE]") => self.done = true,
                Some(data) => self.take(&serde_json::from_str(data).unwrap_or_default()),
                None => self.nonsense = Some(format!("no event: {text:?}")),
            }
        }
    }

    fn take_whole(&mut self, body: &[u8]) {
        let body: Value = serde_json::from_slice(body).unwrap_or_default();
        self.take(&body);
        self.done = self.status == 200;
        if self.status != 200 && self.error.is_none() {
            self.nonsense = Some(format!("status {} without an error: {body}", self.status));
        }
    }

    fn take(&mut self, body: &Value) {
        if let Some(error) = body.get("error") {
            self.error = Some(format!("{}: {}", error["code"], error["message"]));
            return;
        }
        let choice = &body["choices"][0];
        let ids = choice["token_ids"].as_array().into_iter().flatten();
        self.tokens.extend(ids.map(|id| id.as_u64().map_or(u32::MAX, |id| id as u32)));
        if let Some(finish) = choice["finish_reason"].as_str() {
            self.finish = Some(finish.to_owned());
        }
        if body["usage"].is_object() {
            self.usage = body["usage"].clone();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn question() -> Question {
        let prompt = vec![1, 2, 3];
        Question { name: "q".into(), model: "m".into(), prompt, max_tokens: 3, seed: Some(5), streamed: true }
    }

    fn ends(events: impl IntoIterator<Item = String>) -> End {
        let mut heard = Heard { status: 200, ..Heard::default() };
        let mut pending = events.into_iter().map(|event| format!("data: {event}\n\n")).collect::<String>();
        heard.take_events(&mut std::mem::take(&mut pending).into_bytes());
        question().judge(&heard, &Ordinary::new(300, &[]))
    }

    fn token(at: usize) -> String {
        let ids = &question().answer(&Ordinary::new(300, &[]))[at..=at];
        let finish = if at == 2 { json!("length") } else { Value::Null };
        json!({ "choices": [{ "token_ids": ids, "finish_reason": finish }] }).to_string()
    }

    #[test]
    fn only_a_whole_answer_is_complete_and_only_one_that_says_so_is_loud() {
        let usage =
            || json!({ "choices": [], "usage": { "prompt_tokens": 3, "completion_tokens": 3 } }).to_string();
        let error = || json!({ "error": { "code": "upstream_error", "message": "x" } }).to_string();
        let done = || "[DONE]".to_owned();
        let wrong = |events: Vec<String>, part: &str| match ends(events) {
            End::Wrong(why) => assert!(why.contains(part), "{why}"),
            other => panic!("{part}: {other:?}"),
        };
        assert_eq!(ends([token(0), token(1), token(2), usage(), done()]), End::Complete);
        assert!(matches!(ends([token(0), error()]), End::Loud(_)));
        wrong(vec![token(0), token(1)], "silent");
        wrong(vec![token(0), token(1), usage(), done()], "2 tokens of 3");
        wrong(vec![token(0), token(0)], "token 1");
        wrong(vec![token(0), token(2)], "token 1");
        wrong(vec![token(0), error(), done()], "after the end");
        wrong(vec![token(0), token(1), token(2), done()], "usage");
    }
}
