//! A server that answers as fake workers do, at once or paced: what other gateways stand in front of.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::sync::{OnceLock, mpsc};
use std::time::Duration;

use bytes::Bytes;
use futures_util::stream;
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt, Full, StreamBody};
use hyper::body::{Frame, Incoming};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Request, Response};
use hyper_util::rt::{TokioIo, TokioTimer};
use serde_json::{Value, json};
use tandem_chassis::seam;
use tandem_types::Time;
use tokio::net::TcpListener;
use tokio::sync::oneshot;

/// Time to the first token and between tokens.
#[derive(Clone, Copy, Debug)]
pub struct Pace {
    first: Duration,
    next: Duration,
}

impl Pace {
    /// No time at all.
    pub const ZERO: Pace = Pace { first: Duration::ZERO, next: Duration::ZERO };
    /// As the paced fake engine of the bench.
    pub const PACED: Pace = Pace { first: Duration::from_millis(20), next: Duration::from_millis(10) };

    /// Until a step with this token is done. Workers send a message for each step, so each token is on its way
    /// before the next, however fast they are.
    async fn wait(self, at: u64) {
        let wait = if at == 0 { self.first } else { self.next };
        if wait.is_zero() {
            return tokio::task::yield_now().await;
        }
        let (end, ended) = oneshot::channel();
        let _ = alarms().send(Alarm { at: seam::now() + wait, end });
        let _ = ended.await;
    }
}

/// Somebody waits for a moment.
struct Alarm {
    at: Time,
    end: oneshot::Sender<()>,
}

/// A thread that wakes whoever waits, to a tenth of a millisecond: timers of an event loop are ten times coarser,
/// and what is measured is not.
fn alarms() -> &'static mpsc::Sender<Alarm> {
    static ALARMS: OnceLock<mpsc::Sender<Alarm>> = OnceLock::new();
    ALARMS.get_or_init(|| {
        let (send, receive) = mpsc::channel::<Alarm>();
        // Lives as long as the process.
        let _ = seam::thread("alarms", move || {
            let mut open: BTreeMap<(Time, u64), oneshot::Sender<()>> = BTreeMap::new();
            for number in 0.. {
                let next = open.first_key_value().map_or(Time::MAX, |((at, _), _)| *at);
                match receive.recv_timeout(next.remaining(seam::now())) {
                    Ok(alarm) => drop(open.insert((alarm.at, number), alarm.end)),
                    Err(mpsc::RecvTimeoutError::Timeout) => {}
                    Err(mpsc::RecvTimeoutError::Disconnected) => return,
                }
                while let Some(due) = open.first_entry().filter(|entry| entry.key().0 <= seam::now()) {
                    let _ = due.remove().send(());
                }
            }
        });
        send
    })
}

/// Serves until the process is ended.
pub async fn serve(listener: TcpListener, pace: Pace) {
    loop {
        let Ok((stream, _)) = listener.accept().await else { continue };
        let _ = stream.set_nodelay(true);
        // Ends with its connection.
        seam::spawn(async move {
            let service = service_fn(move |request| answer(request, pace));
            let connection = http1::Builder::new()
                .timer(TokioTimer::new())
                .serve_connection(TokioIo::new(stream), service);
            let _ = connection.await;
        });
    }
}

type Body = UnsyncBoxBody<Bytes, Infallible>;

async fn answer(request: Request<Incoming>, pace: Pace) -> Result<Response<Body>, hyper::Error> {
    let chat = request.uri().path() == "/v1/chat/completions";
    if request.uri().path() == "/v1/models" {
        return Ok(whole(&json!({ "object": "list", "data": [{ "id": "responder", "object": "model" }] })));
    }
    if !chat && request.uri().path() != "/v1/completions" {
        let mut response = whole(&json!({ "error": { "message": "no such path", "code": "unknown_path" } }));
        *response.status_mut() = hyper::StatusCode::NOT_FOUND;
        return Ok(response);
    }
    let bytes = request.into_body().collect().await?.to_bytes();
    let body: Value = serde_json::from_slice(&bytes).unwrap_or_default();
    let prompt = body["prompt"].as_str().or(body["messages"][0]["content"].as_str()).unwrap_or_default();
    let cost = |word: &str| if word.starts_with(|c: char| c.is_ascii_digit()) { word.len() } else { 1 };
    let prompt_tokens: usize = prompt.split(' ').map(cost).sum();
    let tokens = body["max_tokens"].as_u64().unwrap_or(16);
    let usage = json!({ "prompt_tokens": prompt_tokens, "completion_tokens": tokens });
    if body["stream"] == true {
        return Ok(events(chat, tokens, &usage, pace));
    }
    for at in 0..tokens {
        pace.wait(at).await;
    }
    let text = " time".repeat(tokens as usize);
    let choice = match chat {
        true => {
            json!({ "index": 0, "message": { "role": "assistant", "content": text }, "finish_reason": "length" })
        }
        false => json!({ "index": 0, "text": text, "finish_reason": "length" }),
    };
    Ok(whole(&json!({ "id": "r-1", "object": "completion", "choices": [choice], "usage": usage })))
}

fn whole(body: &Value) -> Response<Body> {
    let mut response = Response::new(Full::from(body.to_string()).boxed_unsync());
    let json = hyper::header::HeaderValue::from_static("application/json");
    response.headers_mut().insert(hyper::header::CONTENT_TYPE, json);
    response
}

/// An event per token, the last with a finish reason, then usage.
fn events(chat: bool, tokens: u64, usage: &Value, pace: Pace) -> Response<Body> {
    let event = |finish: Value| {
        let choice = match chat {
            true => json!({ "index": 0, "delta": { "content": " time" }, "finish_reason": finish }),
            false => json!({ "index": 0, "text": " time", "finish_reason": finish }),
        };
        Bytes::from(format!(
            "data: {}\n\n",
            json!({ "id": "r-1", "model": "responder", "choices": [choice] })
        ))
    };
    let (each, last) = (event(Value::Null), event("length".into()));
    let end = Bytes::from(format!("data: {}\n\ndata: [DONE]\n\n", json!({ "choices": [], "usage": usage })));
    let body = stream::unfold(0, move |at| {
        let (each, last, end) = (each.clone(), last.clone(), end.clone());
        async move {
            if at < tokens {
                pace.wait(at).await;
            }
            let piece = match at {
                at if at + 1 < tokens => each,
                at if at + 1 == tokens => last,
                at if at == tokens => end,
                _ => return None,
            };
            Some((Ok::<_, Infallible>(Frame::data(piece)), at + 1))
        }
    });
    let mut response = Response::new(StreamBody::new(body).boxed_unsync());
    let kind = hyper::header::HeaderValue::from_static("text/event-stream");
    response.headers_mut().insert(hyper::header::CONTENT_TYPE, kind);
    response
}

#[cfg(test)]
mod tests {
    use tandem_integration_tests::Client;

    use super::*;

    #[tokio::test(flavor = "multi_thread")]
    async fn answers_have_the_tokens_asked_for_streamed_and_not_paced_and_not() {
        for pace in [Pace::ZERO, Pace::PACED] {
            let listener = seam::listen_tcp("127.0.0.1:0").await.expect("a port");
            let client = Client::new(listener.local_addr().expect("an address"));
            let server = seam::spawn(serve(listener, pace));
            let mut body = json!({ "model": "responder", "prompt": "12 time", "max_tokens": 3 });
            let whole = client.post("/v1/completions", &body).await;
            assert_eq!(whole.json["usage"], json!({ "prompt_tokens": 3, "completion_tokens": 3 }));
            assert_eq!(whole.json["choices"][0]["text"], " time time time");
            body["stream"] = true.into();
            let began = seam::now();
            let events = client.stream("/v1/completions", &body).await.expect("a stream").rest().await;
            let took = seam::now().since(began);
            assert!(took >= pace.first + 2 * pace.next, "{took:?} is less than the pace");
            assert_eq!(events.len(), 5, "three tokens, usage and the end: {events:?}");
            let finishes: Vec<bool> = events.iter().map(|event| event.contains("\"length\"")).collect();
            assert_eq!(finishes, [false, false, true, false, false]);
            assert_eq!(client.get("/nope").await.status, 404);
            server.abort();
        }
    }
}
