//! A plain HTTP client: JSON in, JSON or server-sent events out.

use std::net::SocketAddr;
use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::Request;
use hyper::body::Incoming;
use hyper_util::client::legacy::Client as Pool;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;
use serde_json::{Value, json};
use tandem_chassis::seam;

/// Nobody waits longer than this for one answer, unless he says so.
const ANSWER_MAX: Duration = Duration::from_secs(120);

/// Talks to one HTTP port.
#[derive(Clone)]
pub struct Client {
    base: String,
    pool: Pool<HttpConnector, Full<Bytes>>,
    patience: Duration,
}

/// An answer, whole.
#[derive(Clone, Debug)]
pub struct Answer {
    /// HTTP status.
    pub status: u16,
    /// Its headers.
    pub headers: hyper::HeaderMap,
    /// Its body, as JSON where it is JSON.
    pub json: Value,
    /// Its body as text.
    pub text: String,
}

/// A streamed answer, event by event.
pub struct Events {
    /// HTTP status.
    pub status: u16,
    /// Its headers.
    pub headers: hyper::HeaderMap,
    body: Incoming,
    pending: Vec<u8>,
}

impl Client {
    /// `http://host:port` of the port it talks to.
    pub fn url(&self) -> &str {
        &self.base
    }

    /// For the port at `address`.
    pub fn new(address: SocketAddr) -> Client {
        let pool = Pool::builder(TokioExecutor::new()).build_http();
        Client { base: format!("http://{address}"), pool, patience: ANSWER_MAX }
    }

    /// The same, but waits so long for an answer.
    pub fn with_patience(&self, patience: Duration) -> Client {
        Client { patience, ..self.clone() }
    }

    /// GET.
    pub async fn get(&self, path: &str) -> Answer {
        self.try_get(path).await.expect(path)
    }

    /// GET; an error if nobody answers.
    pub async fn try_get(&self, path: &str) -> Result<Answer, String> {
        self.whole(Request::get(format!("{}{path}", self.base)), Bytes::new()).await
    }

    /// POST of JSON.
    pub async fn post(&self, path: &str, body: &Value) -> Answer {
        self.try_post(path, body).await.expect(path)
    }

    /// POST of JSON; an error if the connection breaks.
    pub async fn try_post(&self, path: &str, body: &Value) -> Result<Answer, String> {
        let request =
            Request::post(format!("{}{path}", self.base)).header("content-type", "application/json");
        self.whole(request, body.to_string().into()).await
    }

    /// POST of JSON with a further header.
    pub async fn post_with(&self, path: &str, header: (&str, &str), body: &Value) -> Answer {
        let request = Request::post(format!("{}{path}", self.base))
            .header("content-type", "application/json")
            .header(header.0, header.1);
        self.whole(request, body.to_string().into()).await.expect(path)
    }

    /// POST of JSON, answered by events.
    pub async fn stream(&self, path: &str, body: &Value) -> Result<Events, String> {
        let request = Request::post(format!("{}{path}", self.base))
            .header("content-type", "application/json")
            .body(Full::from(body.to_string()))
            .map_err(|e| e.to_string())?;
        let sent = seam::timeout(self.patience, self.pool.request(request)).await;
        let answer = sent.map_err(|_| "no answer")?.map_err(|e| format!("{e:?}"))?;
        let (parts, body) = answer.into_parts();
        Ok(Events { status: parts.status.as_u16(), headers: parts.headers, body, pending: Vec::new() })
    }

    /// Completes token ids greedily or as `extra` says; the body is as vLLM's.
    pub async fn complete(&self, model: &str, prompt: &[u32], extra: Value) -> Answer {
        let mut body = json!({
            "model": model,
            "prompt": prompt,
            "temperature": 0,
            "ignore_eos": true,
            "return_token_ids": true,
        });
        let (Value::Object(body_map), Value::Object(extra)) = (&mut body, extra) else { unreachable!() };
        body_map.extend(extra);
        self.post("/v1/completions", &body).await
    }

    async fn whole(&self, request: hyper::http::request::Builder, body: Bytes) -> Result<Answer, String> {
        let request = request.body(Full::new(body)).map_err(|e| e.to_string())?;
        let answer = async {
            let answer = self.pool.request(request).await.map_err(|e| format!("{e:?}"))?;
            let (parts, body) = answer.into_parts();
            let body = body.collect().await.map_err(|e| e.to_string())?.to_bytes();
            let text = String::from_utf8_lossy(&body).into_owned();
            let json = serde_json::from_str(&text).unwrap_or_default();
            Ok(Answer { status: parts.status.as_u16(), headers: parts.headers, json, text })
        };
        seam::timeout(self.patience, answer).await.map_err(|_| "no answer".to_owned())?
    }
}

impl Answer {
    /// The token ids of the first choice, under `return_token_ids`.
    pub fn token_ids(&self) -> Vec<u32> {
        token_ids(&self.json["choices"][0]["token_ids"])
    }

    /// The log probabilities of a completion's first choice.
    pub fn logprobs(&self) -> &Value {
        &self.json["choices"][0]["logprobs"]["token_logprobs"]
    }
}

/// Token ids from a JSON list.
pub fn token_ids(list: &Value) -> Vec<u32> {
    let ids = list.as_array().into_iter().flatten();
    ids.map(|id| id.as_u64().expect("token ids are numbers") as u32).collect()
}

impl Events {
    /// The data of the next event; `None` when the body has ended.
    pub async fn next(&mut self) -> Option<String> {
        loop {
            if let Some(end) = self.pending.windows(2).position(|pair| pair == b"\n\n") {
                let event: Vec<u8> = self.pending.drain(..end + 2).collect();
                let event = String::from_utf8(event).expect("events are UTF-8");
                if let Some(data) = event.trim_end().strip_prefix("data: ") {
                    return Some(data.to_owned());
                }
                continue;
            }
            let frame = seam::timeout(ANSWER_MAX, self.body.frame()).await.expect("the stream goes on")?;
            if let Ok(data) = frame.ok()?.into_data() {
                self.pending.extend_from_slice(&data);
            }
        }
    }

    /// Every event to the end.
    pub async fn rest(mut self) -> Vec<String> {
        let mut events = Vec::new();
        while let Some(event) = self.next().await {
            events.push(event);
        }
        events
    }
}

/// Sum over all series of a metric in Prometheus text, or of those with one label: `name{label="value"`.
pub fn metric(text: &str, name: &str) -> f64 {
    let (name, label) = name.split_once('{').unwrap_or((name, ""));
    let of_it = |line: &&str| {
        let rest = line.strip_prefix(name);
        rest.is_some_and(|rest| rest.starts_with(['{', ' ']) && rest.contains(label))
    };
    text.lines().filter(of_it).filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok()).sum()
}
