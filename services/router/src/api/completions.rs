//! `POST /v1/completions`.

use std::sync::Arc;

use axum::body::Body;
use axum::extract::State;
use axum::http::HeaderMap;
use axum::response::{IntoResponse, Response};
use axum::routing::post;
use axum::{Extension, Json, Router};
use serde_json::{Value, json};
use tandem_chassis::seam;
use tandem_types::{Sampled, TokenId};

use super::answer::{Answer, Collected, Finish, Piece, ids, json_logprob};
use super::chat::{FINGERPRINT, add_route, off_network};
use super::error::ApiError;
use super::fields::{Fields, wrong_type};
use super::parameters::{Parameters, token_ids};
use super::sse::{self, Chunks};
use super::{App, RequestName, read_body};
use crate::text::Model;

/// Prompts of a request at most.
const PROMPTS_MAX: usize = 256;
/// What OpenAI's endpoint draws where nothing is said.
const MAX_TOKENS: u32 = 16;

pub(super) fn routes() -> Router<Arc<App>> {
    Router::new().route("/v1/completions", post(complete))
}

async fn complete(
    State(app): State<Arc<App>>,
    Extension(name): Extension<RequestName>,
    headers: HeaderMap,
    body: Body,
) -> Result<Response, ApiError> {
    let mut fields = read_body(&app, &headers, body).await?;
    let logprobs = fields.integer("logprobs", 0, 5)?.map(|top| top as u32);
    if fields.bool("echo")?.unwrap_or(false) {
        return Err(ApiError::unsupported("echo", "echo is not supported in this version"));
    }
    let mut parameters = Parameters::take(&mut fields, &app.model, &["max_tokens"], logprobs)?;
    let prompts = take_prompts(&mut fields, &app.model).await?;
    if parameters.max_tokens.is_none() {
        // As the context leaves it, but no more than the endpoint's own default.
        let longest = prompts.iter().map(|prompt| prompt.len()).max().unwrap_or(0);
        let room = (app.model.context_tokens as usize).saturating_sub(longest);
        parameters.max_tokens = Some(MAX_TOKENS.max(parameters.min_tokens).min(room.max(1) as u32));
    }
    let answer = Answer::begin(&app, &name, &headers, prompts, &parameters, "prompt").await?;

    let writer = Writer {
        id: format!("cmpl-{}", name.0),
        created: seam::unix_time().as_secs(),
        model: app.model.clone(),
        prompts: answer.prompts.clone(),
        offsets: vec![0; answer.choices],
        begun: vec![false; answer.choices],
        parameters: parameters.clone(),
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

/// A string, a list of strings, a list of token ids, or a list of such lists.
async fn take_prompts(fields: &mut Fields, model: &Arc<Model>) -> Result<Vec<Arc<[TokenId]>>, ApiError> {
    let wanted = "a string, a list of strings, a list of token ids or a list of such lists";
    let prompt = fields.take("prompt").ok_or_else(|| ApiError::invalid("prompt", "prompt is missing"))?;
    let prompts = match prompt {
        Value::Array(items) if items.first().is_some_and(|item| !item.is_number()) => items,
        one => vec![one],
    };
    if prompts.len() > PROMPTS_MAX {
        let message = format!("prompt has {} prompts but may have {PROMPTS_MAX}", prompts.len());
        return Err(ApiError::invalid("prompt", message));
    }
    let mut read: Vec<Arc<[TokenId]>> = Vec::with_capacity(prompts.len());
    for prompt in prompts {
        let ids = match prompt {
            Value::String(text) => {
                let model = model.clone();
                let encoded = off_network(text.len(), move || model.encode(&text)).await?;
                encoded.map_err(|why| {
                    ApiError::invalid("prompt", format!("prompt cannot be tokenized: {why}"))
                })?
            }
            Value::Array(_) => token_ids("prompt", &prompt, model)?,
            other => return Err(wrong_type("prompt", wanted, &other)),
        };
        if ids.is_empty() {
            return Err(ApiError::invalid("prompt", "prompt must not be empty"));
        }
        read.push(ids.into());
    }
    Ok(read)
}

/// Writes text completions.
struct Writer {
    id: String,
    created: u64,
    model: Arc<Model>,
    parameters: Parameters,
    prompts: Vec<Arc<[TokenId]>>,
    /// Characters of each choice so far, for `text_offset`.
    offsets: Vec<usize>,
    begun: Vec<bool>,
}

impl Writer {
    async fn whole(mut self, mut answer: Answer) -> Result<Response, ApiError> {
        let choices = answer.collect().await?;
        let choices: Vec<Value> = choices.into_iter().enumerate().map(|(i, c)| self.choice(i, c)).collect();
        let mut body = self.body(choices.into());
        body["usage"] = answer.usage();
        Ok(Json(body).into_response())
    }

    fn body(&self, choices: Value) -> Value {
        json!({
            "id": self.id,
            "object": "text_completion",
            "created": self.created,
            "model": self.model.name,
            "system_fingerprint": FINGERPRINT,
            "choices": choices,
        })
    }

    fn choice(&mut self, index: usize, choice: Collected) -> Value {
        let piece = Piece { text: choice.text, tokens: choice.tokens };
        self.piece_body(index, &piece, choice.finish.as_ref())
    }

    fn piece_body(&mut self, index: usize, piece: &Piece, finish: Option<&Finish>) -> Value {
        let mut body = json!({
            "index": index,
            "text": piece.text,
            "logprobs": self.logprobs(index, &piece.tokens),
            "finish_reason": finish.map(|finish| finish.reason),
            "stop_reason": finish.map(|finish| &finish.stop_reason),
        });
        if self.parameters.return_token_ids {
            body["token_ids"] = json!(ids(&piece.tokens));
            if !std::mem::replace(&mut self.begun[index], true) {
                body["prompt_token_ids"] = json!(&*self.prompts[index / self.parameters.n as usize]);
            }
        }
        body
    }

    fn logprobs(&mut self, index: usize, tokens: &[Sampled]) -> Value {
        if self.parameters.sampling.logprobs.is_none() {
            return Value::Null;
        }
        let text = |token: TokenId| self.model.decode(&[token], false);
        let texts: Vec<String> = tokens.iter().map(|sampled| text(sampled.token)).collect();
        let top: Vec<Value> = tokens
            .iter()
            .map(|sampled| {
                let pairs = sampled.top.iter().map(|&(token, logprob)| (text(token), json_logprob(logprob)));
                Value::Object(pairs.collect())
            })
            .collect();
        let mut offset = self.offsets[index];
        let mut offsets = Vec::with_capacity(texts.len());
        for text in &texts {
            offsets.push(offset);
            offset += text.chars().count();
        }
        self.offsets[index] = offset;
        let drawn = tokens.iter().map(|sampled| json_logprob(sampled.logprob.unwrap_or(f32::NEG_INFINITY)));
        json!({
            "tokens": texts,
            "token_logprobs": drawn.collect::<Vec<_>>(),
            "top_logprobs": top,
            "text_offset": offsets,
        })
    }
}

impl Chunks for Writer {
    fn first(&mut self, _: usize) -> Option<Value> {
        None
    }

    fn piece(&mut self, index: usize, piece: &Piece, finish: Option<&Finish>) -> Value {
        let choice = self.piece_body(index, piece, finish);
        let mut body = self.body(json!([choice]));
        if self.parameters.include_usage {
            body["usage"] = Value::Null;
        }
        body
    }

    fn usage(&mut self, usage: Value) -> Value {
        let mut body = self.body(json!([]));
        body["usage"] = usage;
        body
    }
}
