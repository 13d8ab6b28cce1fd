//! The API over a scripted generation: what is refused and how, and what answers look like.

use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_trait::async_trait;
use axum::Router;
use axum::body::Body;
use http::{Request, StatusCode};
use http_body_util::BodyExt;
use serde_json::{Value, json};
use tandem_types::{FinishReason, Sampled, Usage};
use tokio::sync::mpsc;
use tower::ServiceExt;

use super::{Options, routes};
use crate::request::{DispatchError, Generate, GenerateEvent, GenerateRequest, Generation, Route};
use crate::text::Model;

/// Answers every request with the same events, and remembers what it was asked.
#[derive(Clone)]
struct Script {
    events: Vec<GenerateEvent>,
    asked: Arc<Mutex<Vec<GenerateRequest>>>,
}

#[async_trait]
impl Generate for Script {
    async fn start(&self, request: GenerateRequest) -> Result<Generation, DispatchError> {
        self.asked.lock().expect("unpoisoned").push(request);
        let (send, events) = mpsc::channel(self.events.len().max(1));
        for event in &self.events {
            send.try_send(event.clone()).expect("room for all");
        }
        Generation::begin(events).await
    }
}

fn model() -> Arc<Model> {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../integration-tests/checkpoints/qwen3");
    Arc::new(Model::open(&dir, "tiny".into(), None).expect("it is committed"))
}

struct Api {
    routes: Router,
    model: Arc<Model>,
    asked: Arc<Mutex<Vec<GenerateRequest>>>,
}

struct Reply {
    status: StatusCode,
    headers: http::HeaderMap,
    text: String,
}

impl Reply {
    fn json(&self) -> Value {
        serde_json::from_str(&self.text).unwrap_or_else(|_| panic!("not JSON: {}", self.text))
    }

    fn events(&self) -> Vec<&str> {
        self.text.split("\n\n").filter_map(|event| event.strip_prefix("data: ")).collect()
    }
}

impl Api {
    fn new(events: Vec<GenerateEvent>) -> Api {
        let asked = Arc::new(Mutex::default());
        let model = model();
        let options = Options { request_deadline: Duration::from_secs(60), body_bytes_max: 10_000 };
        let script = Script { events, asked: asked.clone() };
        Api { routes: routes(model.clone(), script, options), model, asked }
    }

    /// An answer of these tokens, ended by its length.
    fn saying(text: &str) -> Api {
        let ids = model().encode(text, true).expect("it encodes");
        let mut events = vec![GenerateEvent::Routed(Route { prefill: "p".into(), decode: "d".into() })];
        for (position, &token) in (0..).zip(&ids) {
            let top = vec![(token, -0.5), (token + 1, -1.5)];
            let sampled = Sampled { token, logprob: Some(-0.5), top };
            events.push(GenerateEvent::Token { position, sampled });
        }
        let usage = Usage { prompt_tokens: 1, cached_tokens: 0, output_tokens: ids.len() as u32 };
        events.push(GenerateEvent::Finished { reason: FinishReason::Length, usage });
        Api::new(events)
    }

    async fn send(&self, mut request: Request<Body>) -> Reply {
        request.headers_mut().entry("host").or_insert(http::HeaderValue::from_static("localhost"));
        let response = self.routes.clone().oneshot(request).await.expect("infallible");
        let (parts, body) = response.into_parts();
        let bytes = body.collect().await.expect("a body").to_bytes();
        Reply {
            status: parts.status,
            headers: parts.headers,
            text: String::from_utf8(bytes.to_vec()).expect("UTF-8"),
        }
    }

    async fn post(&self, path: &str, body: impl Into<Body>) -> Reply {
        self.send(
            Request::post(path)
                .header("content-type", "application/json")
                .body(body.into())
                .expect("a request"),
        )
        .await
    }

    async fn chat(&self, extra: Value) -> Reply {
        self.post("/v1/chat/completions", merged(chat_body(), extra).to_string()).await
    }

    async fn complete(&self, extra: Value) -> Reply {
        self.post("/v1/completions", merged(json!({ "model": "tiny", "prompt": "a" }), extra).to_string())
            .await
    }

    fn last_asked(&self) -> GenerateRequest {
        self.asked.lock().expect("unpoisoned").last().expect("it was asked").clone()
    }
}

fn chat_body() -> Value {
    json!({ "model": "tiny", "messages": [{ "role": "user", "content": "hi" }] })
}

fn merged(mut base: Value, extra: Value) -> Value {
    let (Value::Object(fields), Value::Object(extra)) = (&mut base, extra) else { unreachable!("objects") };
    fields.extend(extra);
    base
}

#[tokio::test]
async fn wrong_parameters_get_400_that_names_them() {
    let api = Api::saying("ok");
    let chat: &[(Value, &str, &str)] = &[
        (json!({ "model": null }), "invalid_value", "model"),
        (json!({ "model": 7 }), "invalid_value", "model"),
        (json!({ "messages": null }), "invalid_value", "messages"),
        (json!({ "messages": [] }), "invalid_value", "messages"),
        (json!({ "messages": "hi" }), "invalid_value", "messages"),
        (json!({ "messages": ["hi"] }), "invalid_value", "messages[0]"),
        (json!({ "messages": [{ "content": "hi" }] }), "invalid_value", "messages[0].role"),
        (json!({ "messages": [{ "role": "cook", "content": "hi" }] }), "invalid_value", "messages[0].role"),
        (json!({ "messages": [{ "role": 1, "content": "hi" }] }), "invalid_value", "messages[0].role"),
        (json!({ "messages": [{ "role": "user" }] }), "invalid_value", "messages[0].content"),
        (json!({ "messages": [{ "role": "user", "content": 7 }] }), "invalid_value", "messages[0].content"),
        (
            json!({ "messages": [{ "role": "user", "content": [{ "text": "x" }] }] }),
            "invalid_value",
            "messages[0].content[0]",
        ),
        (
            json!({ "messages": [{ "role": "user", "content": [{ "type": "text" }] }] }),
            "invalid_value",
            "messages[0].content[0]",
        ),
        (
            json!({ "messages": [{ "role": "user", "content": [{ "type": "image_url", "image_url": {} }] }] }),
            "unsupported_parameter",
            "messages[0].content[0]",
        ),
        (
            json!({ "messages": [{ "role": "assistant", "content": "x", "tool_calls": [{}] }] }),
            "unsupported_parameter",
            "messages[0].tool_calls",
        ),
        (json!({ "temperature": -0.1 }), "invalid_value", "temperature"),
        (json!({ "temperature": 2.1 }), "invalid_value", "temperature"),
        (json!({ "temperature": "hot" }), "invalid_value", "temperature"),
        (json!({ "top_p": 0 }), "invalid_value", "top_p"),
        (json!({ "top_p": 1.1 }), "invalid_value", "top_p"),
        (json!({ "top_k": -2 }), "invalid_value", "top_k"),
        (json!({ "top_k": 1.5 }), "invalid_value", "top_k"),
        (json!({ "min_p": 1.5 }), "invalid_value", "min_p"),
        (json!({ "presence_penalty": 3 }), "invalid_value", "presence_penalty"),
        (json!({ "frequency_penalty": -3 }), "invalid_value", "frequency_penalty"),
        (json!({ "repetition_penalty": 0 }), "invalid_value", "repetition_penalty"),
        (json!({ "max_tokens": 0 }), "invalid_value", "max_tokens"),
        (json!({ "max_tokens": -1 }), "invalid_value", "max_tokens"),
        (json!({ "max_tokens": 1.5 }), "invalid_value", "max_tokens"),
        (json!({ "max_tokens": "9" }), "invalid_value", "max_tokens"),
        (json!({ "max_completion_tokens": 0 }), "invalid_value", "max_completion_tokens"),
        (json!({ "min_tokens": -1 }), "invalid_value", "min_tokens"),
        (json!({ "min_tokens": 5, "max_tokens": 4 }), "invalid_value", "min_tokens"),
        (json!({ "max_tokens": 100_000 }), "context_length_exceeded", "messages"),
        (json!({ "n": 0 }), "invalid_value", "n"),
        (json!({ "n": 129 }), "invalid_value", "n"),
        (json!({ "stop": "" }), "invalid_value", "stop"),
        (json!({ "stop": 7 }), "invalid_value", "stop"),
        (json!({ "stop": ["a", 7] }), "invalid_value", "stop"),
        (json!({ "stop": ["a", "b", "c", "d", "e"] }), "invalid_value", "stop"),
        (json!({ "stop_token_ids": [-1] }), "invalid_value", "stop_token_ids"),
        (json!({ "stop_token_ids": [100_000] }), "invalid_value", "stop_token_ids"),
        (json!({ "stop_token_ids": "x" }), "invalid_value", "stop_token_ids"),
        (json!({ "logit_bias": { "x": 1 } }), "invalid_value", "logit_bias"),
        (json!({ "logit_bias": { "1": 101 } }), "invalid_value", "logit_bias"),
        (json!({ "logit_bias": { "100000": 1 } }), "invalid_value", "logit_bias"),
        (json!({ "logit_bias": [] }), "invalid_value", "logit_bias"),
        (json!({ "logprobs": 3 }), "invalid_value", "logprobs"),
        (json!({ "logprobs": true, "top_logprobs": 21 }), "invalid_value", "top_logprobs"),
        (json!({ "top_logprobs": 2 }), "invalid_value", "top_logprobs"),
        (json!({ "seed": 1.5 }), "invalid_value", "seed"),
        (json!({ "stream": "yes" }), "invalid_value", "stream"),
        (json!({ "stream_options": { "include_usage": true } }), "invalid_value", "stream_options"),
        (json!({ "stream": true, "stream_options": [] }), "invalid_value", "stream_options"),
        (json!({ "ignore_eos": 1 }), "invalid_value", "ignore_eos"),
        (json!({ "response_format": { "type": "json_object" } }), "unsupported_parameter", "response_format"),
        (json!({ "response_format": {} }), "invalid_value", "response_format"),
        (json!({ "tools": [{}] }), "unsupported_parameter", "tools"),
        (json!({ "tool_choice": "required" }), "unsupported_parameter", "tool_choice"),
        (json!({ "functions": [{}] }), "unsupported_parameter", "functions"),
        (json!({ "guided_json": {} }), "unsupported_parameter", "guided_json"),
        (json!({ "service_tier": "flex" }), "unsupported_parameter", "service_tier"),
        (json!({ "service_tier": "gold" }), "invalid_value", "service_tier"),
        (json!({ "chat_template_kwargs": 3 }), "invalid_value", "chat_template_kwargs"),
        (json!({ "chat_template": "{{ 1 }}" }), "unsupported_parameter", "chat_template"),
        (json!({ "best_of": 2 }), "unsupported_parameter", "best_of"),
        (json!({ "user": 7 }), "invalid_value", "user"),
        (json!({ "temperature": "hot" }), "invalid_value", "temperature"),
        (
            json!({ "messages": [{ "role": "tool", "content": "4" }] }),
            "invalid_value",
            "messages[0].tool_call_id",
        ),
        (
            json!({ "messages": [{ "role": "user", "content": "x".repeat(9_000) }] }),
            "context_length_exceeded",
            "messages",
        ),
    ];
    for (extra, code, param) in chat {
        let reply = api.chat(extra.clone()).await;
        check_error(&reply, 400, code, Some(param), &extra.to_string());
    }
    let completions: &[(Value, &str, &str)] = &[
        (json!({ "prompt": null }), "invalid_value", "prompt"),
        (json!({ "prompt": "" }), "invalid_value", "prompt"),
        (json!({ "prompt": [] }), "invalid_value", "prompt"),
        (json!({ "prompt": 7 }), "invalid_value", "prompt"),
        (json!({ "prompt": ["a", ""] }), "invalid_value", "prompt"),
        (json!({ "prompt": ["a", 7] }), "invalid_value", "prompt"),
        (json!({ "prompt": [1, "a"] }), "invalid_value", "prompt"),
        (json!({ "prompt": [-1] }), "invalid_value", "prompt"),
        (json!({ "prompt": [384] }), "invalid_value", "prompt"),
        (json!({ "prompt": [[1], []] }), "invalid_value", "prompt"),
        (json!({ "prompt": vec![1; 2048] }), "context_length_exceeded", "prompt"),
        (json!({ "prompt": vec!["a"; 257] }), "invalid_value", "prompt"),
        (json!({ "logprobs": 6 }), "invalid_value", "logprobs"),
        (json!({ "logprobs": true }), "invalid_value", "logprobs"),
        (json!({ "echo": 1 }), "invalid_value", "echo"),
        (json!({ "best_of": 0 }), "invalid_value", "best_of"),
        (json!({ "best_of": 2, "n": 3 }), "invalid_value", "best_of"),
        (json!({ "best_of": 2, "stream": true }), "invalid_value", "best_of"),
        (json!({ "max_tokens": -1 }), "invalid_value", "max_tokens"),
        (json!({ "suffix": "x" }), "unsupported_parameter", "suffix"),
    ];
    for (extra, code, param) in completions {
        let reply = api.complete(extra.clone()).await;
        check_error(&reply, 400, code, Some(param), &extra.to_string());
    }
    assert!(api.asked.lock().expect("unpoisoned").is_empty(), "nothing wrong reaches the workers");
}

fn check_error(reply: &Reply, status: u16, code: &str, param: Option<&str>, what: &str) {
    assert_eq!(reply.status, status, "{what}: {}", reply.text);
    let error = &reply.json()["error"];
    assert_eq!(error["code"], code, "{what}: {error}");
    assert_eq!(error["param"], json!(param), "{what}: {error}");
    assert!(
        error["message"].as_str().is_some_and(|m| !m.is_empty()) && error["type"].is_string(),
        "{what}: {error}"
    );
    assert!(reply.headers.contains_key("x-request-id"), "{what}");
}

#[tokio::test]
async fn bodies_that_are_not_a_json_object_are_refused() {
    let api = Api::saying("ok");
    for body in ["", "{", "[]", "7", "null", "{\"model\": \"tiny\"} x", "{\"a\": 1, \"a\": 2}", "{'a': 1}"] {
        let reply = api.post("/v1/chat/completions", body.to_owned()).await;
        check_error(&reply, 400, "invalid_json", None, body);
    }
    let reply = api.post("/v1/completions", vec![0xff, 0xfe]).await;
    check_error(&reply, 400, "invalid_json", None, "not UTF-8");
    let deep = "[".repeat(5000);
    let reply = api.post("/v1/completions", deep).await;
    check_error(&reply, 400, "invalid_json", None, "nested too deeply");
    let reply = api.post("/v1/completions", "x".repeat(20_000)).await;
    check_error(&reply, 413, "request_too_large", None, "too large");
}

#[tokio::test]
async fn paths_methods_and_media_types_have_answers_of_their_own() {
    let api = Api::saying("ok");
    let get = |path: &str| Request::get(path).body(Body::empty()).expect("a request");
    check_error(&api.send(get("/v1/nope")).await, 404, "not_found", None, "unknown path");
    let reply = api.send(get("/v1/chat/completions")).await;
    check_error(&reply, 405, "method_not_allowed", None, "wrong method");
    assert_eq!(reply.headers["allow"], "POST");
    check_error(
        &api.send(get("/v1/models/other")).await,
        404,
        "model_not_found",
        Some("model"),
        "unknown model",
    );
    check_error(
        &api.chat(json!({ "model": "other" })).await,
        404,
        "model_not_found",
        Some("model"),
        "unknown model",
    );
    for (header, value) in [("content-type", "text/plain"), ("content-encoding", "gzip")] {
        let request =
            Request::post("/v1/completions").header(header, value).body(Body::from("{}")).expect("a request");
        check_error(&api.send(request).await, 415, "unsupported_media_type", None, header);
    }
    let untyped =
        Request::post("/v1/chat/completions").body(Body::from(chat_body().to_string())).expect("a request");
    assert_eq!(api.send(untyped).await.status, 200, "a body without a type is read as JSON");
    let models = api.send(get("/v1/models")).await.json();
    assert_eq!(
        (&models["data"][0]["id"], &models["data"][0]["max_model_len"]),
        (&json!("tiny"), &json!(2048))
    );
    assert_eq!(api.send(get("/health")).await.status, 200);
}

#[tokio::test]
async fn parameters_reach_the_workers_as_they_were_meant() {
    let api = Api::saying("ok");
    let extra = json!({
        "temperature": 0.5, "top_p": 0.9, "top_k": -1, "min_p": 0.1, "presence_penalty": 1, "frequency_penalty": -1,
        "repetition_penalty": 1.5, "logit_bias": { "3": 5, "2": -5 }, "seed": -1, "logprobs": true, "top_logprobs": 2,
        "max_completion_tokens": 7, "max_tokens": 9, "min_tokens": 2, "stop_token_ids": [4], "user": "me", "store": true,
    });
    assert_eq!(api.chat(extra).await.status, 200);
    let asked = api.last_asked();
    let s = &asked.sampling;
    assert_eq!((s.temperature, s.top_p, s.top_k, s.min_p), (0.5, 0.9, 0, 0.1));
    assert_eq!((s.presence_penalty, s.frequency_penalty, s.repetition_penalty), (1.0, -1.0, 1.5));
    assert_eq!(
        (s.logit_bias.as_slice(), s.seed, s.logprobs),
        (&[(2, -5.0), (3, 5.0)][..], u64::MAX, Some(2))
    );
    assert_eq!((asked.stop.max_tokens, asked.stop.min_tokens), (7, 2));
    assert_eq!(asked.stop.stop_token_ids, [4]);
    assert_eq!(asked.stop.eos, api.model.eos);

    for tier in ["auto", "default", "fast", "priority", "scale", "standard"] {
        assert_eq!(api.chat(json!({ "service_tier": tier })).await.status, 200, "{tier}");
        assert_eq!(api.last_asked().class, tandem_types::ServiceClass::Online, "{tier}");
    }

    assert_eq!(api.chat(json!({ "ignore_eos": true })).await.status, 200);
    let asked = api.last_asked();
    assert!(asked.stop.eos.is_empty());
    assert_eq!(asked.stop.max_tokens as usize, 2048 - asked.prompt.len(), "what the context leaves");
    assert_eq!(api.complete(json!({ "prompt": [1, 2, 3] })).await.status, 200);
    let asked = api.last_asked();
    assert_eq!((&*asked.prompt, asked.stop.max_tokens), (&[1, 2, 3][..], 16));
}

#[tokio::test]
async fn a_chat_answer_has_openais_shape() {
    let api = Api::saying("The cat sees.");
    let extra = json!({ "logprobs": true, "top_logprobs": 2, "return_token_ids": true });
    let body = api.chat(extra).await.json();
    let choice = &body["choices"][0];
    assert_eq!(body["object"], "chat.completion");
    assert_eq!(choice["message"]["content"], "The cat sees.");
    assert_eq!(choice["finish_reason"], "length");
    let content = choice["logprobs"]["content"].as_array().expect("a list");
    assert_eq!(content.len(), choice["token_ids"].as_array().expect("a list").len());
    assert_eq!(content[0]["top_logprobs"].as_array().map(Vec::len), Some(2));
    let text: String = content.iter().filter_map(|token| token["token"].as_str()).collect();
    assert_eq!(text, "The cat sees.");
    assert!(!body["prompt_token_ids"].as_array().expect("a list").is_empty());
    assert_eq!(body["usage"]["completion_tokens"], json!(content.len()));
}

#[tokio::test]
async fn events_carry_the_text_once_and_end_with_done() {
    let api = Api::saying("naïve 🦀 crab");
    let reply = api.chat(json!({ "stream": true, "stream_options": { "include_usage": true } })).await;
    assert_eq!(reply.headers["content-type"], "text/event-stream; charset=utf-8");
    let events = reply.events();
    let (done, chunks) = events.split_last().expect("events");
    assert_eq!(*done, "[DONE]");
    let chunks: Vec<Value> = chunks.iter().map(|chunk| serde_json::from_str(chunk).expect("JSON")).collect();
    let text: String = chunks.iter().filter_map(|c| c["choices"][0]["delta"]["content"].as_str()).collect();
    assert_eq!(text, "naïve 🦀 crab");
    assert!(chunks[..chunks.len() - 1].iter().all(|c| c["usage"].is_null()));
    assert!(chunks.last().expect("chunks")["usage"]["total_tokens"].is_number());
    let reply = api.complete(json!({ "stream": true })).await;
    let text: String = reply
        .events()
        .iter()
        .filter_map(|e| {
            serde_json::from_str::<Value>(e).ok()?["choices"][0]["text"].as_str().map(str::to_owned)
        })
        .collect();
    assert_eq!(text, "naïve 🦀 crab");
}

#[tokio::test]
async fn a_stop_string_ends_the_answer_before_itself() {
    let api = Api::saying("one two three four");
    let body = api.chat(json!({ "stop": ["thr"] })).await.json();
    assert_eq!(body["choices"][0]["message"]["content"], "one two ");
    assert_eq!(body["choices"][0]["finish_reason"], "stop");
    let body = api.complete(json!({ "stop": ["thr"], "include_stop_str_in_output": true })).await.json();
    assert_eq!(body["choices"][0]["text"], "one two thr");
}

#[tokio::test]
async fn an_error_before_the_first_token_is_a_status_and_after_it_an_event_without_done() {
    let cases = [
        (DispatchError::Overloaded { retry_after: Duration::from_secs(1) }, 503, "overloaded"),
        (DispatchError::NoWorker { message: "none".into() }, 503, "no_worker"),
        (DispatchError::Draining, 503, "draining"),
        (DispatchError::ContextLength { message: "too long".into() }, 400, "context_length_exceeded"),
        (DispatchError::Unsupported("x".into()), 400, "unsupported_parameter"),
        (DispatchError::Deadline, 504, "upstream_timeout"),
        (DispatchError::WorkerLost { attempts: 3, message: "x".into() }, 502, "upstream_error"),
        (DispatchError::Internal("x".into()), 500, "internal_error"),
    ];
    for (error, status, code) in cases {
        let at_once = Api::new(vec![GenerateEvent::Failed(error.clone())]);
        for stream in [false, true] {
            let reply = at_once.chat(json!({ "stream": stream })).await;
            assert_eq!(reply.status, status);
            assert_eq!(reply.json()["error"]["code"], code);
            assert_eq!(reply.headers.get("retry-after").is_some(), status == 503);
        }
        let token =
            GenerateEvent::Token { position: 0, sampled: Sampled { token: 40, ..Sampled::default() } };
        let later = Api::new(vec![token, GenerateEvent::Failed(error)]);
        let reply = later.chat(json!({ "stream": true })).await;
        assert_eq!(reply.status, 200);
        let events = reply.events();
        let last: Value = serde_json::from_str(events.last().expect("events")).expect("JSON, not [DONE]");
        assert_eq!(last["error"]["code"], code);
        assert_eq!(later.chat(json!({})).await.status, status, "without a stream it is a status still");
    }
}

#[tokio::test]
async fn the_clients_request_id_comes_back_if_it_is_sane_and_the_route_if_it_is_asked_for() {
    let api = Api::saying("ok");
    let send = async |id: &str, debug: bool| {
        let mut request = Request::post("/v1/chat/completions").header("x-request-id", id);
        if debug {
            request = request.header("x-tandem-debug", "route");
        }
        api.send(request.body(Body::from(chat_body().to_string())).expect("a request")).await
    };
    let reply = send("abc-1", true).await;
    assert_eq!(reply.headers["x-request-id"], "abc-1");
    assert_eq!(reply.headers["x-tandem-route"], "prefill=p,decode=d");
    let reply = send("has a space", false).await;
    assert_eq!(reply.headers["x-request-id"].len(), 32);
    assert!(!reply.headers.contains_key("x-tandem-route"));
    assert_ne!(send(&"x".repeat(200), false).await.headers["x-request-id"].len(), 200);
}

#[tokio::test]
async fn an_echo_begins_with_the_prompt_and_its_scores() {
    let api = Api::saying("one two");
    let body = api.complete(json!({ "prompt": "zero ", "echo": true, "stop": ["zero"] })).await.json();
    assert_eq!(body["choices"][0]["text"], "zero one two", "stop strings are looked for in the answer only");
    assert_eq!(api.last_asked().score_prompt, None);

    let prompt = api.model.encode("zero", true).expect("it encodes");
    let scored = |i: usize| Sampled {
        token: prompt[i],
        logprob: (i > 0).then_some(-0.25),
        top: if i > 0 { vec![(prompt[i], -0.25), (1, -3.0)] } else { vec![] },
    };
    let drawn = Sampled { token: prompt[0], logprob: Some(-1.0), top: vec![(prompt[0], -1.0)] };
    let usage = Usage { prompt_tokens: prompt.len() as u32, cached_tokens: 0, output_tokens: 1 };
    let events = vec![
        GenerateEvent::Scored((0..prompt.len()).map(scored).collect()),
        GenerateEvent::Token { position: 0, sampled: drawn },
        GenerateEvent::Finished { reason: FinishReason::Length, usage },
    ];
    let api = Api::new(events);
    let ask = json!({ "prompt": "zero", "echo": true, "logprobs": 1, "max_tokens": 1 });
    let body = api.complete(ask.clone()).await.json();
    assert_eq!(api.last_asked().score_prompt, Some(1));
    let logprobs = &body["choices"][0]["logprobs"];
    let many = prompt.len() + 1;
    assert_eq!(logprobs["tokens"].as_array().map(Vec::len), Some(many));
    assert_eq!(logprobs["token_logprobs"][0], Value::Null, "nothing stands before the first token");
    assert_eq!(logprobs["top_logprobs"][0], Value::Null);
    assert_eq!(logprobs["token_logprobs"][1], json!(-0.25));
    assert_eq!(logprobs["top_logprobs"][1].as_object().map(serde_json::Map::len), Some(1));
    assert_eq!(logprobs["token_logprobs"][many - 1], json!(-1.0));
    assert_eq!(body["usage"]["completion_tokens"], json!(1));

    // The same in a stream.
    let mut ask = ask;
    ask["stream"] = json!(true);
    let reply = api.complete(ask.clone()).await;
    let events = reply.events();
    let chunks = events.iter().filter_map(|event| serde_json::from_str::<Value>(event).ok());
    let tokens: usize =
        chunks.filter_map(|c| c["choices"][0]["logprobs"]["tokens"].as_array().map(Vec::len)).sum();
    assert_eq!(tokens, many);

    // A prompt that is only scored: the token on the way is nobody's.
    ask["stream"] = json!(false);
    ask["max_tokens"] = json!(0);
    let body = api.complete(ask).await.json();
    assert_eq!(api.last_asked().stop.max_tokens, 1);
    assert_eq!(body["choices"][0]["text"], "zero");
    assert_eq!(body["choices"][0]["finish_reason"], "length");
    assert_eq!(body["choices"][0]["logprobs"]["tokens"].as_array().map(Vec::len), Some(prompt.len()));
    assert_eq!(body["usage"]["completion_tokens"], json!(0));
}

#[tokio::test]
async fn no_tokens_need_no_worker() {
    let api = Api::new(vec![GenerateEvent::Failed(DispatchError::Draining)]);
    let body = api.complete(json!({ "prompt": ["a", "b"], "echo": true, "max_tokens": 0 })).await.json();
    assert_eq!((&body["choices"][0]["text"], &body["choices"][1]["text"]), (&json!("a"), &json!("b")));
    assert_eq!(body["choices"][1]["finish_reason"], "length");
    assert_eq!(body["usage"]["completion_tokens"], 0);
}

/// Answers each choice with one token of its own log probability.
struct Rated;

#[async_trait]
impl Generate for Rated {
    async fn start(&self, request: GenerateRequest) -> Result<Generation, DispatchError> {
        let choice = request.choice.0;
        assert_eq!(request.sampling.logprobs, Some(0), "choices cannot be compared without");
        let logprob = Some([-2.0, -0.5, -1.0][choice as usize]);
        let (send, events) = mpsc::channel(2);
        let sampled = Sampled { token: 40 + choice, logprob, top: Vec::new() };
        let usage = Usage { prompt_tokens: 1, cached_tokens: 0, output_tokens: 1 };
        let finished = GenerateEvent::Finished { reason: FinishReason::Length, usage };
        for event in [GenerateEvent::Token { position: 0, sampled }, finished] {
            send.try_send(event).expect("room for all");
        }
        Generation::begin(events).await
    }
}

#[tokio::test]
async fn the_likeliest_of_best_of_are_given_and_all_are_counted() {
    let model = model();
    let options = Options { request_deadline: Duration::from_secs(60), body_bytes_max: 10_000 };
    let api =
        Api { routes: routes(model.clone(), Rated, options), model: model.clone(), asked: Arc::default() };
    let ask = json!({ "prompt": ["a", "b"], "best_of": 3, "n": 2, "return_token_ids": true });
    let body = api.complete(ask).await.json();
    let ids: Vec<&Value> =
        body["choices"].as_array().expect("choices").iter().map(|choice| &choice["token_ids"][0]).collect();
    assert_eq!(ids, [&json!(41), &json!(42), &json!(41), &json!(42)]);
    assert_eq!(body["choices"][3]["index"], 3);
    assert_eq!(body["choices"][0]["logprobs"], Value::Null, "nobody asked for them");
    assert_eq!(body["usage"]["completion_tokens"], 6);
}

#[tokio::test]
async fn texts_and_chats_become_tokens_and_text_again() {
    let api = Api::saying("ok");
    let ask = json!({ "prompt": "The cat sees.", "return_token_strs": true });
    let body = api.post("/tokenize", ask.to_string()).await.json();
    let tokens = api.model.encode("The cat sees.", true).expect("it encodes");
    assert_eq!((&body["tokens"], &body["count"]), (&json!(tokens), &json!(tokens.len())));
    assert_eq!(body["max_model_len"], 2048);
    assert_eq!(body["token_strs"].as_array().map(Vec::len), Some(tokens.len()));
    let text = api.post("/detokenize", json!({ "tokens": tokens }).to_string()).await.json();
    assert_eq!(text["prompt"], "The cat sees.");

    let messages = json!([{ "role": "user", "content": "hi" }]);
    let chat =
        api.post("/tokenize", json!({ "model": "tiny", "messages": messages }).to_string()).await.json();
    api.chat(json!({ "messages": messages })).await;
    assert_eq!(chat["tokens"], json!(&*api.last_asked().prompt), "as the same chat would be prefilled");

    for (path, ask, code, param) in [
        ("/tokenize", json!({}), "invalid_value", "prompt"),
        ("/tokenize", json!({ "prompt": 7 }), "invalid_value", "prompt"),
        ("/detokenize", json!({}), "invalid_value", "tokens"),
        ("/detokenize", json!({ "tokens": [100_000] }), "invalid_value", "tokens"),
        ("/detokenize", json!({ "tokens": vec![1; 2049] }), "context_length_exceeded", "tokens"),
    ] {
        let reply = api.post(path, ask.to_string()).await;
        check_error(&reply, 400, code, Some(param), &format!("{path} {ask}"));
    }
    let reply = api.post("/tokenize", json!({ "prompt": "a", "model": "other" }).to_string()).await;
    check_error(&reply, 404, "model_not_found", Some("model"), "another model");
}

#[tokio::test]
async fn bodies_are_read_as_their_text_says() {
    let api = Api::saying("ok");
    let marked = format!("\u{feff}{}", chat_body());
    assert_eq!(api.post("/v1/chat/completions", marked).await.status, 200, "a byte order mark is ignored");
    let mut unknown = chat_body();
    unknown["__proto__"] = json!({ "a": [[[1]]] });
    unknown["max_tokens"] = Value::Null;
    assert_eq!(api.post("/v1/chat/completions", unknown.to_string()).await.status, 200);
    let twice = r#"{"model": "tiny", "messages": [{"role": "user", "role": "system", "content": "x"}]}"#;
    check_error(&api.post("/v1/chat/completions", twice).await, 400, "invalid_json", None, "twice within");
    let deep = format!(r#"{{"model": "tiny", "x": {}{}}}"#, "[".repeat(64), "]".repeat(64));
    check_error(&api.post("/v1/chat/completions", deep).await, 400, "invalid_json", None, "too deep");
    let many: Vec<String> = (0..1025).map(|i| format!("\"k{i}\":0")).collect();
    let many = format!("{{{}}}", many.join(","));
    check_error(&api.post("/v1/chat/completions", many).await, 400, "invalid_json", None, "too many keys");
    for number in ["1e400", "-1e400", "99999999999999999999"] {
        let body = chat_body().to_string().replacen('{', &format!("{{\"temperature\": {number},"), 1);
        let reply = api.post("/v1/chat/completions", body).await;
        assert_eq!(reply.status, 400, "{number}: {}", reply.text);
    }
    let half = r#"{"model": "tiny", "messages": [{"role": "user", "content": "\ud800"}]}"#;
    let reply = api.post("/v1/chat/completions", half).await;
    check_error(&reply, 400, "invalid_value", Some("messages[0].content"), "half a character");
}

#[tokio::test]
async fn an_answer_before_the_whole_body_closes_the_connection_and_says_so() {
    let api = Api::saying("ok");
    let closes = async |request: http::request::Builder, body: &'static str| {
        let reply = api.send(request.body(Body::from(body)).expect("a request")).await;
        reply.headers.get("connection").is_some_and(|value| value == "close")
    };
    assert!(closes(Request::post("/v1/nope"), "{}").await, "unknown path");
    assert!(closes(Request::post("/v1/models"), "{}").await, "wrong method");
    let typed = |value| Request::post("/v1/completions").header("content-type", value);
    assert!(closes(typed("text/plain"), "{}").await, "wrong type");
    let coded = Request::post("/v1/completions").header("content-encoding", "gzip");
    assert!(closes(coded, "{}").await, "wrong coding");
    let long = Request::post("/v1/completions").header("content-length", "10001");
    assert!(closes(long, "{}").await, "too large");
    assert!(!closes(Request::get("/v1/nope"), "").await, "there is no body");
    assert!(!closes(typed("application/json"), "{").await, "the body was read");
}

#[tokio::test]
async fn a_whole_number_may_be_written_as_a_float() {
    let api = Api::saying("ok");
    let extra =
        json!({ "max_tokens": 7.0, "min_tokens": 2e0, "seed": -3.0, "n": 1.0, "stop_token_ids": [4.0] });
    assert_eq!(api.complete(merged(extra, json!({ "prompt": [1.0, 2] }))).await.status, 200);
    let asked = api.last_asked();
    assert_eq!((asked.stop.max_tokens, asked.stop.min_tokens, asked.sampling.seed), (7, 2, -3_i64 as u64));
    assert_eq!((&*asked.prompt, asked.stop.stop_token_ids.as_slice()), (&[1, 2][..], &[4][..]));
    for (extra, param) in [
        (json!({ "seed": 1e300 }), "seed"),
        (json!({ "seed": 9_007_199_254_740_994.0 }), "seed"),
        (json!({ "max_tokens": 0.1 }), "max_tokens"),
        (json!({ "prompt": [1.5] }), "prompt"),
        (json!({ "prompt": [-1.0] }), "prompt"),
    ] {
        let reply = api.complete(extra.clone()).await;
        check_error(&reply, 400, "invalid_value", Some(param), &extra.to_string());
    }
}
