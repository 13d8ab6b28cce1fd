//! `POST /v1/chat/completions`.

use std::sync::{Arc, LazyLock};
use std::time::Duration;

use axum::body::{Body, Bytes};
use axum::extract::State;
use axum::http::{HeaderMap, HeaderName, HeaderValue};
use axum::response::{IntoResponse, Response};
use axum::routing::post;
use axum::{Extension, Json, Router};
use serde::Serialize;
use serde_json::{Map, Value};
use tandem_chassis::seam;
use tandem_types::{Sampled, TokenId};
use tokio::sync::Semaphore;

use super::answer::{Answer, Finish, Piece, StopReason, Usage, ids, json_logprob};
use super::error::ApiError;
use super::fields::{self, Fields, Kind, Raw, kind};
use super::parameters::Parameters;
use super::sse::{self, Chunks};
use super::{App, RequestName, read_body};
use crate::request::{DispatchError, Route};
use crate::text::{Message, Model};

/// What a model's version is known by to clients that compare seeds.
pub(super) const FINGERPRINT: &str = concat!("tandem-", env!("CARGO_PKG_VERSION"));

/// A long text waits so long for its turn to be read.
const TURN: Duration = Duration::from_secs(30);
/// Messages of a chat at most.
const MESSAGES_MAX: usize = 16_384;

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
    let body = read_body(&app, &headers, body).await?;
    let model = app.model.clone();
    let (parameters, prompt) = off_network(body.len(), move || read(body, &model)).await??;
    let answer = Answer::begin(&app, &name, &headers, vec![prompt], None, &parameters, "messages").await?;

    let id = format!("chatcmpl-{}", name.0);
    let writer = Writer::new(id, app.model.clone(), parameters.clone(), answer.prompts[0].clone());
    let route = answer.route.clone();
    let mut response = if parameters.stream {
        sse::respond(answer, writer, parameters.include_usage)
    } else {
        writer.whole(answer).await?
    };
    add_route(&headers, route.as_ref(), &mut response);
    Ok(response)
}

/// From a body to a valid request.
pub(super) fn read(body: Bytes, model: &Model) -> Result<(Parameters, Arc<[TokenId]>), ApiError> {
    let mut fields = Fields::parse(&body)?;
    let logprobs = take_logprobs(&mut fields)?;
    let limits = [("max_completion_tokens", 1), ("max_tokens", 1)];
    let parameters = Parameters::take(&mut fields, model, &limits, logprobs)?;
    if fields.integer("best_of", 1, i64::MAX)?.is_some_and(|best_of| best_of > 1) {
        return Err(ApiError::unsupported("best_of", "best_of is for /v1/completions"));
    }
    let chat = Chat::take(&mut fields, model)?;
    // What follows needs memory of its own.
    drop(fields);
    drop(body);
    Ok((parameters, chat.encode(model)?.into()))
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

/// What a chat template is given.
pub(super) struct Chat {
    messages: Vec<Message>,
    add_generation_prompt: bool,
    extra: Map<String, Value>,
}

impl Chat {
    pub(super) fn take(fields: &mut Fields, model: &Model) -> Result<Chat, ApiError> {
        if fields.has("chat_template") {
            let message = "chat_template is not taken from requests; the model has its own";
            return Err(ApiError::unsupported("chat_template", message));
        }
        let messages = take_messages(fields)?;
        let bytes = messages.iter().map(|message| message.content.len()).sum();
        check_bytes("messages", bytes, model)?;
        Ok(Chat {
            messages,
            add_generation_prompt: fields.bool("add_generation_prompt")?.unwrap_or(true),
            extra: fields.map("chat_template_kwargs")?.unwrap_or_default(),
        })
    }

    /// As the model's template writes it, in tokens.
    pub(super) fn encode(self, model: &Model) -> Result<Vec<TokenId>, ApiError> {
        let ids = model.encode_chat(&self.messages, self.add_generation_prompt, &self.extra)?;
        if ids.is_empty() {
            let message = "the messages are empty once the template has written them";
            return Err(ApiError::invalid("messages", message));
        }
        Ok(ids)
    }
}

/// Refuses what is longer than any tokens of the context can be, before anybody tokenizes it.
pub(super) fn check_bytes(param: &str, bytes: usize, model: &Model) -> Result<(), ApiError> {
    let context = model.context_tokens;
    match model.text_bytes_max() {
        Some(most) if bytes > most => {
            let message =
                format!("the context is {context} tokens, and {bytes} bytes are more than that; shorten it");
            Err(ApiError::context_length(param, message))
        }
        _ => Ok(()),
    }
}

fn take_messages(fields: &mut Fields) -> Result<Vec<Message>, ApiError> {
    let list = fields.take("messages").ok_or_else(|| ApiError::invalid("messages", "messages is missing"))?;
    let mut messages = Vec::new();
    fields::each("messages", "a list of messages", list, |i, message| {
        if i == MESSAGES_MAX {
            let message = format!("messages may have {MESSAGES_MAX} messages");
            return Err(ApiError::invalid("messages", message));
        }
        messages.push(read_message(i, message)?);
        Ok(())
    })?;
    if messages.is_empty() {
        return Err(ApiError::invalid("messages", "messages must not be empty"));
    }
    Ok(messages)
}

fn read_message(i: usize, message: Raw) -> Result<Message, ApiError> {
    let at = |field: &str| format!("messages[{i}].{field}");
    let mut message = Fields::read(&format!("messages[{i}]"), message)?;
    let missing = |field: &str| ApiError::invalid(&at(field), format!("{} is missing", at(field)));
    let role = message.take("role").ok_or_else(|| missing("role"))?;
    let role = fields::string(&at("role"), "a string", role)?;
    if !ROLES.contains(&role.as_str()) {
        let (said, known) = (fields::quoted(&role), ROLES.join(", "));
        return Err(ApiError::invalid(&at("role"), format!("{said} is not a role; known are {known}")));
    }
    if let Some(calls) = message.take("tool_calls")
        && fields::small(calls).is_none_or(|calls| calls.as_array().is_none_or(|calls| !calls.is_empty()))
    {
        return Err(ApiError::unsupported(&at("tool_calls"), "tool calls are not supported in this version"));
    }
    if role == "tool" && !message.has("tool_call_id") {
        return Err(missing("tool_call_id"));
    }
    let content = message.take("content").ok_or_else(|| missing("content"))?;
    let content = match kind(content) {
        Kind::List => read_parts(i, content)?,
        _ => fields::string(&at("content"), "a string or a list of parts", content)?,
    };
    Ok(Message { role, content })
}

fn read_parts(i: usize, parts: Raw) -> Result<String, ApiError> {
    // All parts in one text, which no part makes grow.
    let mut text = String::with_capacity(parts.get().len());
    let wanted = "a string or a list of parts";
    fields::each(&format!("messages[{i}].content"), wanted, parts, |j, part| {
        let at = format!("messages[{i}].content[{j}]");
        let mut part = Fields::read(&at, part)?;
        let kind = part.take("type").and_then(fields::small);
        match kind.as_ref().and_then(Value::as_str) {
            Some("text") => {
                let piece = part.take("text");
                let piece =
                    piece.ok_or_else(|| ApiError::invalid(&at, format!("{at}.text must be a string")))?;
                fields::append_string(&at, "text that is a string", piece, &mut text)
            }
            Some(other) => {
                let message =
                    format!("content of type {other:?} is not supported in this version; it has text");
                Err(ApiError::unsupported(&at, message))
            }
            None => Err(ApiError::invalid(&at, format!("{at} needs a type, such as text"))),
        }
    })?;
    Ok(text)
}

/// Runs at once what is short, and on a thread for such work what is long: on as many as there are processors, for
/// each of them keeps memory for its longest text.
pub(super) async fn off_network<T: Send + 'static>(
    bytes: usize,
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, ApiError> {
    static THREADS: LazyLock<Arc<Semaphore>> = LazyLock::new(|| {
        Arc::new(Semaphore::new(std::thread::available_parallelism().map_or(1, usize::from)))
    });
    if bytes < 8192 {
        return Ok(work());
    }
    let turn = seam::timeout(TURN, THREADS.clone().acquire_owned()).await;
    let turn = turn.map_err(|_| DispatchError::Overloaded { retry_after: Duration::from_secs(1) })?;
    let turn = turn.expect("it is never closed");
    let work = move || {
        // A client that leaves does not end the work, so the turn goes with the work.
        let _turn = turn;
        work()
    };
    let done = tokio::task::spawn_blocking(work).await;
    done.map_err(|_| DispatchError::Internal("tokenizing panicked".into()).into())
}

/// Writes chat completions.
pub(super) struct Writer {
    id: String,
    created: u64,
    model: Arc<Model>,
    parameters: Parameters,
    prompt: Arc<[TokenId]>,
}

/// A whole answer, or a chunk of one.
#[derive(Serialize)]
struct Completion<'a, C> {
    id: &'a str,
    object: &'static str,
    created: u64,
    model: &'a str,
    system_fingerprint: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    service_tier: Option<&'static str>,
    choices: C,
    /// Null in all chunks but the last, if it was asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    usage: Option<Option<Usage>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    prompt_token_ids: Option<&'a [TokenId]>,
}

#[derive(Serialize)]
struct Whole<'a> {
    index: usize,
    message: Said<'a>,
    logprobs: Option<Logprobs>,
    finish_reason: Option<&'static str>,
    stop_reason: Option<&'a StopReason>,
    #[serde(skip_serializing_if = "Option::is_none")]
    token_ids: Option<Vec<TokenId>>,
}

#[derive(Serialize)]
struct Said<'a> {
    role: &'static str,
    content: &'a str,
    refusal: Option<&'static str>,
}

#[derive(Serialize)]
struct Chunk<'a> {
    index: usize,
    delta: Delta<'a>,
    logprobs: Option<Logprobs>,
    finish_reason: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    stop_reason: Option<Option<&'a StopReason>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    token_ids: Option<Vec<TokenId>>,
}

#[derive(Default, Serialize)]
struct Delta<'a> {
    #[serde(skip_serializing_if = "Option::is_none")]
    role: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    content: Option<&'a str>,
}

#[derive(Serialize)]
struct Logprobs {
    content: Vec<TokenLogprob>,
    refusal: Option<&'static str>,
}

#[derive(Serialize)]
struct TokenLogprob {
    #[serde(flatten)]
    entry: Entry,
    top_logprobs: Vec<Entry>,
}

#[derive(Serialize)]
struct Entry {
    token: String,
    logprob: f64,
    bytes: Vec<u8>,
}

impl Writer {
    pub(super) fn new(
        id: String,
        model: Arc<Model>,
        parameters: Parameters,
        prompt: Arc<[TokenId]>,
    ) -> Writer {
        Writer { id, created: seam::unix_time().as_secs(), model, parameters, prompt }
    }

    async fn whole(self, mut answer: Answer) -> Result<Response, ApiError> {
        let choices = answer.collect().await?;
        let choices = choices.iter().enumerate().map(|(index, choice)| {
            let finish = choice.finish.as_ref();
            Whole {
                index,
                message: Said { role: "assistant", content: &choice.piece.text, refusal: None },
                logprobs: self.logprobs(&choice.piece.tokens),
                finish_reason: finish.map(|finish| finish.reason),
                stop_reason: finish.and_then(|finish| finish.stop_reason.as_ref()),
                token_ids: self.token_ids(&choice.piece.tokens),
            }
        });
        let body = Completion {
            object: "chat.completion",
            usage: Some(Some(answer.usage())),
            prompt_token_ids: self.parameters.return_token_ids.then_some(&*self.prompt),
            ..self.completion(choices.collect::<Vec<_>>())
        };
        Ok(Json(body).into_response())
    }

    /// A chunk with these choices.
    fn completion<C>(&self, choices: C) -> Completion<'_, C> {
        Completion {
            id: &self.id,
            object: "chat.completion.chunk",
            created: self.created,
            model: &self.model.name,
            system_fingerprint: FINGERPRINT,
            service_tier: self.parameters.service_tier,
            choices,
            usage: self.parameters.include_usage.then_some(None),
            prompt_token_ids: None,
        }
    }

    fn token_ids(&self, tokens: &[Sampled]) -> Option<Vec<TokenId>> {
        self.parameters.return_token_ids.then(|| ids(tokens))
    }

    fn logprobs(&self, tokens: &[Sampled]) -> Option<Logprobs> {
        self.parameters.logprobs?;
        let entry = |token: TokenId, logprob: f32| {
            let bytes = self.model.token_bytes(token);
            let text = String::from_utf8_lossy(&bytes).into_owned();
            Entry { token: text, logprob: json_logprob(logprob), bytes: bytes.into_owned() }
        };
        let content = tokens.iter().map(|sampled| TokenLogprob {
            entry: entry(sampled.token, sampled.logprob.unwrap_or(f32::NEG_INFINITY)),
            top_logprobs: sampled.top.iter().map(|&(token, logprob)| entry(token, logprob)).collect(),
        });
        Some(Logprobs { content: content.collect(), refusal: None })
    }
}

impl Chunks for Writer {
    fn piece(&mut self, out: &mut Vec<u8>, index: usize, piece: Piece, first: bool, finish: Option<&Finish>) {
        if first {
            let delta = Delta { role: Some("assistant"), content: Some("") };
            let chunk = Chunk {
                index,
                delta,
                logprobs: None,
                finish_reason: None,
                stop_reason: None,
                token_ids: None,
            };
            let prompt_token_ids = self.parameters.return_token_ids.then_some(&*self.prompt);
            sse::event(out, &Completion { prompt_token_ids, ..self.completion([chunk]) });
        }
        let content = (!piece.text.is_empty()).then_some(piece.text.as_str());
        let chunk = Chunk {
            index,
            delta: Delta { role: None, content },
            logprobs: if piece.tokens.is_empty() { None } else { self.logprobs(&piece.tokens) },
            finish_reason: finish.map(|finish| finish.reason),
            stop_reason: finish.map(|finish| finish.stop_reason.as_ref()),
            token_ids: self.token_ids(&piece.tokens),
        };
        sse::event(out, &self.completion([chunk]));
    }

    fn usage(&mut self, out: &mut Vec<u8>, usage: Usage) {
        let none: [Chunk; 0] = [];
        sse::event(out, &Completion { usage: Some(Some(usage)), ..self.completion(none) });
    }
}
