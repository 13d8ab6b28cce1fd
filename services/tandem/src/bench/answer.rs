//! One request and its answer: the events of a stream, when they came, and how it ended.

use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::Request;
use hyper::body::Incoming;
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;
use serde::Deserialize;
use serde::de::{Deserializer, IgnoredAny, Visitor};
use serde_json::Value;
use tandem_chassis::seam;
use tandem_types::Time;

/// What became of a request.
#[derive(Clone, Debug)]
pub struct Answer {
    /// When it was due; when it was sent, where nothing said when it was due.
    pub due: Time,
    /// When it was sent.
    pub sent: Time,
    /// When its first text came; only streams tell.
    pub first: Option<Time>,
    /// When its last text came.
    pub last: Time,
    /// When it was over.
    pub over: Time,
    /// Tokens of its answer, by the server's count where it gives one, else one for each event with text.
    pub tokens: u32,
    /// Tokens of its prompt, by the server's count.
    pub prompt_tokens: Option<u32>,
    /// Milliseconds between events with text.
    pub gaps: Vec<f32>,
    /// How it ended.
    pub end: End,
}

/// How an answer ended; the words name the kind, for counting.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum End {
    /// With a finish reason.
    Whole,
    /// Refused or lost before anything was streamed.
    Error(String),
    /// The stream had begun, and ended without a finish reason or after an error event.
    Cut(String),
}

/// What bodies are sent to, over connections that are kept.
#[derive(Clone)]
pub struct Server {
    url: hyper::Uri,
    client: Client<HttpConnector, Full<Bytes>>,
    timeout: Duration,
    streams: bool,
}

/// A request that is ready to be sent.
#[derive(Clone, Debug)]
pub struct Body {
    /// When it is due, since the start.
    pub at: Option<Duration>,
    /// Its JSON.
    pub json: Bytes,
    /// Tokens its prompt was to have.
    pub asked: u32,
}

impl Server {
    /// `url` is that of the endpoint; `streams` whether bodies ask for streams.
    pub fn new(url: &str, timeout: Duration, streams: bool) -> Result<Server, String> {
        let mut connector = HttpConnector::new();
        connector.set_nodelay(true);
        let client = Client::builder(TokioExecutor::new()).build(connector);
        let url = url.parse().map_err(|error| format!("{url}: {error}"))?;
        Ok(Server { url, client, timeout, streams })
    }

    /// Sends a body and reads its answer to the end.
    pub async fn ask(&self, body: Body, due: Option<Time>) -> Answer {
        let sent = seam::now();
        let mut answer = Answer {
            due: due.unwrap_or(sent),
            sent,
            first: None,
            last: sent,
            over: sent,
            tokens: 0,
            prompt_tokens: None,
            gaps: Vec::new(),
            end: End::Whole,
        };
        let mut begun = false;
        let read = self.read(body, &mut answer, &mut begun);
        let end = seam::timeout(self.timeout, read).await;
        answer.end = end.unwrap_or_else(|_| {
            let kind = "time-out".to_owned();
            if begun { End::Cut(kind) } else { End::Error(kind) }
        });
        answer.over = seam::now();
        answer
    }

    async fn read(&self, body: Body, answer: &mut Answer, begun: &mut bool) -> End {
        let request = Request::post(self.url.clone())
            .header("content-type", "application/json")
            .body(Full::from(body.json))
            .expect("the address has been read before");
        let response = match self.client.request(request).await {
            Ok(response) => response,
            Err(error) if error.is_connect() => return End::Error("cannot connect".to_owned()),
            Err(_) => return End::Error("broken before an answer".to_owned()),
        };
        let status = response.status();
        if !status.is_success() {
            let body = response.into_body().collect().await.map(|body| body.to_bytes()).unwrap_or_default();
            let body: Value = serde_json::from_slice(&body).unwrap_or_default();
            return End::Error(
                format!("{} {}", status.as_u16(), kind_of(&body["error"])).trim_end().to_owned(),
            );
        }
        if self.streams {
            *begun = true;
            streamed(response.into_body(), answer).await
        } else {
            whole(response.into_body(), answer).await
        }
    }
}

/// An answer in one piece.
async fn whole(body: Incoming, answer: &mut Answer) -> End {
    let Ok(body) = body.collect().await else { return End::Cut("broken".to_owned()) };
    match serde_json::from_slice::<Event>(&body.to_bytes()) {
        Ok(event) => {
            let counted = event.usage.unwrap_or_default();
            answer.tokens = counted.completion_tokens.unwrap_or(0);
            answer.prompt_tokens = counted.prompt_tokens;
            let finished = event.choices.iter().any(|choice| choice.finish_reason.is_some());
            if finished { End::Whole } else { End::Cut("no finish reason".to_owned()) }
        }
        Err(_) => End::Cut("not JSON".to_owned()),
    }
}

/// A stream of events. Text between two of them that arrives in one piece has no gap.
async fn streamed(mut body: Incoming, answer: &mut Answer) -> End {
    let (mut pending, mut seen, mut broken) = (Vec::new(), Seen::default(), false);
    while let Some(frame) = body.frame().await {
        let Ok(frame) = frame else {
            broken = true;
            break;
        };
        let Ok(bytes) = frame.into_data() else { continue };
        let now = seam::now();
        let mut rest: &[u8] = &bytes;
        while let Some(end) = rest.iter().position(|&byte| byte == b'\n') {
            let line = &rest[..end];
            rest = &rest[end + 1..];
            if pending.is_empty() {
                seen.line(line, now, answer);
            } else {
                pending.extend_from_slice(line);
                seen.line(&pending, now, answer);
                pending.clear();
            }
        }
        pending.extend_from_slice(rest);
    }
    if let Some(counted) = seen.usage {
        answer.prompt_tokens = counted.prompt_tokens;
        answer.tokens = counted.completion_tokens.unwrap_or(answer.tokens);
    }
    match (seen.failed, seen.finished, broken) {
        (Some(kind), ..) => End::Cut(kind),
        (None, true, _) => End::Whole,
        (None, false, true) => End::Cut("broken".to_owned()),
        (None, false, false) => End::Cut("no finish reason".to_owned()),
    }
}

/// What a stream has said so far.
#[derive(Default)]
struct Seen {
    finished: bool,
    failed: Option<String>,
    usage: Option<Usage>,
}

impl Seen {
    fn line(&mut self, line: &[u8], now: Time, answer: &mut Answer) {
        let Some(data) = line.strip_prefix(b"data:") else { return };
        let data = data.trim_ascii();
        if data == b"[DONE]" {
            return;
        }
        let event: Event = match serde_json::from_slice(data) {
            Ok(event) => event,
            Err(_) => {
                self.failed.get_or_insert_with(|| "an event that is not JSON".to_owned());
                return;
            }
        };
        if let Some(error) = event.error {
            self.failed
                .get_or_insert_with(|| format!("error event {}", kind_of(&error)).trim_end().to_owned());
        }
        let finishes = event.choices.iter().any(|choice| choice.finish_reason.is_some());
        let says = event.choices.iter().any(Choice::says_something);
        self.finished |= finishes;
        self.usage = event.usage.or(self.usage.take());
        let ends_without_text = finishes && answer.first.is_none();
        if !(says || ends_without_text) {
            return;
        }
        match answer.first {
            None => answer.first = Some(now),
            Some(_) => answer.gaps.push(now.since(answer.last).as_secs_f32() * 1e3),
        }
        answer.last = now;
        answer.tokens += 1;
    }
}

/// The code of an error, else its type.
fn kind_of(error: &Value) -> &str {
    error["code"].as_str().or(error["type"].as_str()).unwrap_or_default()
}

/// What counts of an event, or of a whole answer, of either endpoint. Text itself is not kept.
#[derive(Deserialize)]
struct Event {
    #[serde(default)]
    choices: Vec<Choice>,
    usage: Option<Usage>,
    error: Option<Value>,
}

#[derive(Deserialize)]
struct Choice {
    text: Option<Text>,
    delta: Option<Delta>,
    finish_reason: Option<IgnoredAny>,
}

#[derive(Deserialize)]
struct Delta {
    content: Option<Text>,
    reasoning_content: Option<Text>,
    tool_calls: Option<IgnoredAny>,
}

#[derive(Clone, Copy, Debug, Default, Deserialize)]
struct Usage {
    prompt_tokens: Option<u32>,
    completion_tokens: Option<u32>,
}

impl Choice {
    fn says_something(&self) -> bool {
        let full = |text: &Option<Text>| text.as_ref().is_some_and(|text| text.full);
        full(&self.text)
            || self.delta.as_ref().is_some_and(|delta| {
                full(&delta.content) || full(&delta.reasoning_content) || delta.tool_calls.is_some()
            })
    }
}

/// Whether a text has any letters.
struct Text {
    full: bool,
}

impl<'de> Deserialize<'de> for Text {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Text, D::Error> {
        struct Reader;

        impl Visitor<'_> for Reader {
            type Value = Text;

            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("text")
            }

            fn visit_str<E>(self, text: &str) -> Result<Text, E> {
                Ok(Text { full: !text.is_empty() })
            }
        }

        deserializer.deserialize_str(Reader)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn after(lines: &[&str]) -> (Seen, Answer) {
        let mut answer = Answer {
            due: Time(0),
            sent: Time(0),
            first: None,
            last: Time(0),
            over: Time(0),
            tokens: 0,
            prompt_tokens: None,
            gaps: Vec::new(),
            end: End::Whole,
        };
        let mut seen = Seen::default();
        for (at, line) in lines.iter().enumerate() {
            seen.line(line.as_bytes(), Time((at as u64 + 1) * 10_000_000), &mut answer);
        }
        (seen, answer)
    }

    #[test]
    fn the_first_token_is_the_first_text_and_gaps_lie_between_texts() {
        let (seen, answer) = after(&[
            r#"data: {"choices":[{"delta":{"role":"assistant","content":""},"finish_reason":null}]}"#,
            ": ping",
            r#"data: {"choices":[{"delta":{"content":"a\n"},"finish_reason":null}]}"#,
            "",
            r#"data: {"choices":[{"delta":{"content":"b"},"finish_reason":null}],"usage":null}"#,
            r#"data: {"choices":[{"delta":{},"finish_reason":"stop"}]}"#,
            r#"data: {"choices":[],"usage":{"prompt_tokens":7,"completion_tokens":2,"total_tokens":9}}"#,
            "data: [DONE]\r",
        ]);
        assert_eq!((answer.first, answer.last), (Some(Time(30_000_000)), Time(50_000_000)));
        assert_eq!((answer.gaps, answer.tokens), (vec![20.0], 2));
        assert!(seen.finished && seen.failed.is_none());
        assert_eq!(seen.usage.and_then(|usage| usage.prompt_tokens), Some(7));
    }

    #[test]
    fn errors_are_named_by_their_code() {
        let error = r#"data: {"error":{"message":"gone","type":"server_error","code":"worker_lost"}}"#;
        let (seen, _) =
            after(&[r#"data:{"choices":[{"text":"a","finish_reason":null}]}"#, error, "data: [DONE]"]);
        assert_eq!((seen.failed.as_deref(), seen.finished), (Some("error event worker_lost"), false));
        assert!(after(&["data: {"]).0.failed.is_some_and(|kind| kind.contains("not JSON")));
    }

    #[test]
    fn a_finish_without_any_text_is_the_first_token() {
        let (seen, answer) = after(&[r#"data: {"choices":[{"text":"","finish_reason":"stop"}]}"#]);
        assert_eq!((answer.first, answer.tokens, seen.finished), (Some(Time(10_000_000)), 1, true));
    }
}
