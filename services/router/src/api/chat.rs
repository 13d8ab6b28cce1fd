//! `POST /v1/chat/completions`.

use std::sync::Arc;

use axum::body::Body;
use axum::extract::State;
use axum::http::{HeaderMap, HeaderName, HeaderValue};
use axum::response::{IntoResponse, Response};
use axum::routing::post;
use axum::{Extension, Json, Router};
use serde_json::{Map, Value, json};
use tandem_chassis::seam;
use tandem_types::{Sampled, TokenId};

use super::answer::{Answer, Collected, Finish, Piece, ids, json_logprob};
use super::error::ApiError;
use super::fields::{Fields, wrong_type};
use super::parameters::Parameters;
use super::sse::{self, Chunks};
use super::{App, RequestName, read_body};
use crate::request::Route;
use crate::text::{Message, Model};

/// What a model's version is known by to clients that compare seeds.
pub(super) const FINGERPRINT: &str = concat!("tandem-", env!("CARGO_PKG_VERSION"));

/// Roles a message may have; the template may know fewer.
const ROLES: [&str; 6] = ["system", "developer", "user", "assistant", "tool", "function"];

pub(super) fn routes() -> Router<Arc<App>> {
    Router::new().route("/v1/chat/completions", post(chat))
}

async fn chat(
    State(app): State<Arc<App>>,
    Extension(name): Extension<RequestName>,
    headers: HeaderMap,
    body: Body,
) -> Result<Response, ApiError> {
    let mut fields = read_body(&app, &headers, body).await?;
    let logprobs = take_logprobs(&mut fields)?;
    let names = ["max_completion_tokens", "max_tokens"];
    let parameters = Parameters::take(&mut fields, &app.model, &names, logprobs)?;
    let messages = take_messages(&mut fields)?;
    let add_generation_prompt = fields.bool("add_generation_prompt")?.unwrap_or(true);
    let extra = fields.object("chat_template_kwargs")?.map(Fields::into_map).unwrap_or_default();
    let prompt = encode(&app.model, messages, add_generation_prompt, extra).await?;
    let answer = Answer::begin(&app, &name, &headers, vec![prompt], &parameters, "messages").await?;

    let writer = Writer {
        id: format!("chatcmpl-{}", name.0),
        created: seam::unix_time().as_secs(),
        model: app.model.clone(),
        parameters: parameters.clone(),
        prompt: answer.prompts[0].clone(),
    };
    let route = answer.route.clone();
    let mut response = if parameters.stream {
        sse::respond(answer, writer, parameters.include_usage)
    } else {
        writer.whole(answer).await?
    };
    add_route(&headers, route.as_ref(), &mut response);
    Ok(response)
}

/// `x-tandem-route`, if `x-tandem-debug: route` asks for it.
pub(super) fn add_route(headers: &HeaderMap, route: Option<&Route>, response: &mut Response) {
    let asked = headers.get("x-tandem-debug").is_some_and(|value| value == "route");
    if let (true, Some(Route { prefill, decode })) = (asked, route)
        && let Ok(value) = HeaderValue::from_str(&format!("prefill={prefill},decode={decode}"))
    {
        response.headers_mut().insert(HeaderName::from_static("x-tandem-route"), value);
    }
}

/// `logprobs: true` with `top_logprobs` from 0 to 20.
fn take_logprobs(fields: &mut Fields) -> Result<Option<u32>, ApiError> {
    let wanted = fields.bool("logprobs")?.unwrap_or(false);
    let top = fields.integer("top_logprobs", 0, 20)?;
    if top.is_some_and(|top| top > 0) && !wanted {
        return Err(ApiError::invalid("top_logprobs", "top_logprobs needs logprobs: true"));
    }
    Ok(wanted.then_some(top.unwrap_or(0) as u32))
}

fn take_messages(fields: &mut Fields) -> Result<Vec<Message>, ApiError> {
    let messages = match fields.take("messages") {
        None => return Err(ApiError::invalid("messages", "messages is missing")),
        Some(Value::Array(messages)) => messages,
        Some(other) => return Err(wrong_type("messages", "a list of messages", &other)),
    };
    if messages.is_empty() {
        return Err(ApiError::invalid("messages", "messages must not be empty"));
    }
    messages.into_iter().enumerate().map(|(i, message)| read_message(i, message)).collect()
}

fn read_message(i: usize, message: Value) -> Result<Message, ApiError> {
    let at = |field: &str| format!("messages[{i}].{field}");
    let Value::Object(mut message) = message else {
        return Err(wrong_type(&format!("messages[{i}]"), "an object", &message));
    };
    let role = match message.remove("role") {
        Some(Value::String(role)) if ROLES.contains(&role.as_str()) => role,
        Some(Value::String(role)) => {
            let known = ROLES.join(", ");
            return Err(ApiError::invalid(&at("role"), format!("{role:?} is not a role; known are {known}")));
        }
        Some(other) => return Err(wrong_type(&at("role"), "a string", &other)),
        None => return Err(ApiError::invalid(&at("role"), format!("{} is missing", at("role")))),
    };
    if message.get("tool_calls").is_some_and(|calls| calls.as_array().is_none_or(|calls| !calls.is_empty())) {
        return Err(ApiError::unsupported(&at("tool_calls"), "tool calls are not supported in this version"));
    }
    let content = match message.remove("content") {
        Some(Value::String(text)) => text,
        Some(Value::Array(parts)) => read_parts(i, parts)?,
        Some(Value::Null) | None => {
            return Err(ApiError::invalid(&at("content"), format!("{} is missing", at("content"))));
        }
        Some(other) => return Err(wrong_type(&at("content"), "a string or a list of parts", &other)),
    };
    Ok(Message { role, content })
}

fn read_parts(i: usize, parts: Vec<Value>) -> Result<String, ApiError> {
    let mut text = String::new();
    for (j, part) in parts.iter().enumerate() {
        let at = format!("messages[{i}].content[{j}]");
        match part["type"].as_str() {
            Some("text") => {
                let piece = part["text"].as_str();
                text.push_str(
                    piece.ok_or_else(|| ApiError::invalid(&at, format!("{at}.text must be a string")))?,
                );
            }
            Some(other) => {
                let message =
                    format!("content of type {other:?} is not supported in this version; it has text");
                return Err(ApiError::unsupported(&at, message));
            }
            None => return Err(ApiError::invalid(&at, format!("{at} needs a type, such as text"))),
        }
    }
    Ok(text)
}

/// Long chats are tokenized off the network threads.
async fn encode(
    model: &Arc<Model>,
    messages: Vec<Message>,
    add_generation_prompt: bool,
    extra: Map<String, Value>,
) -> Result<Arc<[TokenId]>, ApiError> {
    let length: usize = messages.iter().map(|m| m.content.len()).sum();
    let model = model.clone();
    let encode = move || model.encode_chat(&messages, add_generation_prompt, &extra);
    let ids = off_network(length, encode).await??;
    if ids.is_empty() {
        return Err(ApiError::invalid(
            "messages",
            "the messages are empty once the template has written them",
        ));
    }
    Ok(ids.into())
}

/// Runs at once what is short, and on a thread for such work what is long.
pub(super) async fn off_network<T: Send + 'static>(
    bytes: usize,
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, ApiError> {
    if bytes < 4096 {
        return Ok(work());
    }
    let done = tokio::task::spawn_blocking(work).await;
    done.map_err(|_| crate::request::DispatchError::Internal("tokenizing panicked".into()).into())
}

/// Writes chat completions.
struct Writer {
    id: String,
    created: u64,
    model: Arc<Model>,
    parameters: Parameters,
    prompt: Arc<[TokenId]>,
}

impl Writer {
    async fn whole(self, mut answer: Answer) -> Result<Response, ApiError> {
        let choices = answer.collect().await?;
        let choices: Vec<Value> = choices.into_iter().enumerate().map(|(i, c)| self.choice(i, &c)).collect();
        let mut body = json!({
            "id": self.id,
            "object": "chat.completion",
            "created": self.created,
            "model": self.model.name,
            "system_fingerprint": FINGERPRINT,
            "choices": choices,
            "usage": answer.usage(),
        });
        if self.parameters.return_token_ids {
            body["prompt_token_ids"] = json!(&*self.prompt);
        }
        Ok(Json(body).into_response())
    }

    fn choice(&self, index: usize, choice: &Collected) -> Value {
        let finish = choice.finish.as_ref();
        let mut body = json!({
            "index": index,
            "message": { "role": "assistant", "content": choice.text, "refusal": null },
            "logprobs": self.logprobs(&choice.tokens),
            "finish_reason": finish.map(|finish| finish.reason),
            "stop_reason": finish.map(|finish| &finish.stop_reason),
        });
        if self.parameters.return_token_ids {
            body["token_ids"] = json!(ids(&choice.tokens));
        }
        body
    }

    fn logprobs(&self, tokens: &[Sampled]) -> Value {
        if self.parameters.sampling.logprobs.is_none() {
            return Value::Null;
        }
        let entry = |token: TokenId, logprob: f32| {
            let text = self.model.decode(&[token], false);
            json!({ "token": text, "logprob": json_logprob(logprob), "bytes": text.as_bytes() })
        };
        let content = tokens.iter().map(|sampled| {
            let mut body = entry(sampled.token, sampled.logprob.unwrap_or(f32::NEG_INFINITY));
            body["top_logprobs"] =
                sampled.top.iter().map(|&(token, logprob)| entry(token, logprob)).collect();
            body
        });
        json!({ "content": content.collect::<Vec<_>>(), "refusal": null })
    }

    fn chunk(&self, choices: Value) -> Value {
        let mut body = json!({
            "id": self.id,
            "object": "chat.completion.chunk",
            "created": self.created,
            "model": self.model.name,
            "system_fingerprint": FINGERPRINT,
            "choices": choices,
        });
        if self.parameters.include_usage {
            body["usage"] = Value::Null;
        }
        body
    }
}

impl Chunks for Writer {
    fn first(&mut self, index: usize) -> Option<Value> {
        let delta = json!({ "role": "assistant", "content": "" });
        let mut body = self.chunk(json!([
            { "index": index, "delta": delta, "logprobs": null, "finish_reason": null }
        ]));
        if self.parameters.return_token_ids {
            body["prompt_token_ids"] = json!(&*self.prompt);
        }
        Some(body)
    }

    fn piece(&mut self, index: usize, piece: &Piece, finish: Option<&Finish>) -> Value {
        let delta = if piece.text.is_empty() { json!({}) } else { json!({ "content": piece.text }) };
        let mut choice = json!({
            "index": index,
            "delta": delta,
            "logprobs": if piece.tokens.is_empty() { Value::Null } else { self.logprobs(&piece.tokens) },
            "finish_reason": finish.map(|finish| finish.reason),
        });
        if let Some(finish) = finish {
            choice["stop_reason"] = finish.stop_reason.clone();
        }
        if self.parameters.return_token_ids {
            choice["token_ids"] = json!(ids(&piece.tokens));
        }
        self.chunk(json!([choice]))
    }

    fn usage(&mut self, usage: Value) -> Value {
        let mut body = self.chunk(json!([]));
        body["usage"] = usage;
        body
    }
}
