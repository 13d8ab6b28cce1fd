//! A server that answers as fake workers do, at once or paced: what other gateways stand in front of.

use std::convert::Infallible;
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
}

/// Serves on a port until the process is ended.
pub async fn serve(port: u16, pace: Pace) -> Result<(), String> {
    let listener = seam::listen_tcp(("127.0.0.1", port)).await.map_err(|e| format!("port {port}: {e}"))?;
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
    seam::sleep(pace.first + pace.next * (tokens as u32).saturating_sub(1)).await;
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
            let wait = if at == 0 { pace.first } else { pace.next };
            if !wait.is_zero() && at < tokens {
                seam::sleep(wait).await;
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
