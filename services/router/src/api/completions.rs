//! `POST /v1/completions`.

use std::sync::Arc;

use axum::body::{Body, Bytes};
use axum::extract::State;
use axum::http::HeaderMap;
use axum::response::{IntoResponse, Response};
use axum::routing::post;
use axum::{Extension, Json, Router};
use serde::Serialize;
use serde_json::{Map, Value};
use tandem_chassis::seam;
use tandem_types::{Sampled, TokenId};

use super::answer::{Answer, Collected, Finish, Piece, StopReason, Usage, ids, json_logprob};
use super::chat::{FINGERPRINT, add_route, check_bytes, off_network};
use super::error::ApiError;
use super::fields::{self, Fields, Kind, Raw, kind, wrong_type};
use super::parameters::{CHOICES_MAX, Parameters, token_ids};
use super::sse::{self, Chunks};
use super::{App, RequestName, read_body};
use crate::text::Model;

/// Prompts of a request at most.
const PROMPTS_MAX: usize = 256;
/// Tokens of all prompts of a request that may be scored: each has a place in an answer of some hundred bytes.
const SCORED_MAX: usize = 1 << 20;
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
    let body = read_body(&app, &headers, body).await?;
    let model = app.model.clone();
    let (parameters, prompts, echo) = off_network(body.len(), move || read(body, &model)).await??;
    let answer = Answer::begin(&app, &name, &headers, prompts, echo, &parameters, "prompt").await?;

    let writer = Writer {
        id: format!("cmpl-{}", name.0),
        created: seam::unix_time().as_secs(),
        model: app.model.clone(),
        prompts: answer.prompts.clone(),
        offsets: vec![0; answer.choices],
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

/// From a body to a valid request: its parameters, the prompts in tokens, and their texts if answers begin with them.
pub(super) type Read = (Parameters, Vec<Arc<[TokenId]>>, Option<Vec<String>>);

pub(super) fn read(body: Bytes, model: &Model) -> Result<Read, ApiError> {
    let mut fields = Fields::parse(&body)?;
    let logprobs = fields.integer("logprobs", 0, 5)?.map(|top| top as u32);
    let echo = fields.bool("echo")?.unwrap_or(false);
    let mut parameters = Parameters::take(&mut fields, model, &[("max_tokens", 0)], logprobs)?;
    take_best_of(&mut fields, &mut parameters)?;
    let given = take_prompts(&mut fields, model)?;
    // What follows needs memory of its own.
    drop(fields);
    drop(body);
    let prompts = given.iter().map(|given| given.encode(model)).collect::<Result<Vec<_>, _>>()?;
    let scored = prompts.iter().map(|prompt| prompt.len()).sum::<usize>();
    if echo && parameters.logprobs.is_some() && scored > SCORED_MAX {
        let message = format!(
            "echo with logprobs may score {SCORED_MAX} tokens in a request, and the prompts have {scored}; send them \
             in several requests"
        );
        return Err(ApiError::invalid("prompt", message));
    }
    let texts = given.into_iter().zip(&prompts).map(|(given, ids)| given.text(ids, model));
    let echo = echo.then(|| texts.collect());
    if parameters.max_tokens.is_none() {
        // As the context leaves it, but no more than the endpoint's own default.
        let longest = prompts.iter().map(|prompt| prompt.len()).max().unwrap_or(0);
        let room = (model.context_tokens as usize).saturating_sub(longest);
        parameters.max_tokens = Some(MAX_TOKENS.max(parameters.min_tokens).min(room.max(1) as u32));
    }
    Ok((parameters, prompts, echo))
}

/// Of `best_of` choices the best are given, so they must all be there before the first is.
fn take_best_of(fields: &mut Fields, parameters: &mut Parameters) -> Result<(), ApiError> {
    let Some(best_of) = fields.integer("best_of", 1, CHOICES_MAX)? else { return Ok(()) };
    let best_of = best_of as u32;
    if best_of < parameters.n {
        let message = format!("best_of {best_of} is below n {}: it must be as many at least", parameters.n);
        return Err(ApiError::invalid("best_of", message));
    }
    if best_of > parameters.n && parameters.stream {
        let message = "best_of above n cannot be streamed: the best are known at the end only";
        return Err(ApiError::invalid("best_of", message));
    }
    parameters.draws = best_of;
    if best_of > parameters.n {
        parameters.sampling.logprobs = parameters.sampling.logprobs.or(Some(0));
    }
    Ok(())
}

/// A prompt as it was given.
enum Given {
    Text(String),
    Ids(Vec<TokenId>),
}

impl Given {
    fn encode(&self, model: &Model) -> Result<Arc<[TokenId]>, ApiError> {
        let ids = match self {
            Given::Ids(ids) => ids.clone(),
            Given::Text(text) => model
                .encode(text, true)
                .map_err(|why| ApiError::invalid("prompt", format!("prompt cannot be tokenized: {why}")))?,
        };
        if ids.is_empty() {
            return Err(ApiError::invalid("prompt", "prompt must not be empty"));
        }
        Ok(ids.into())
    }

    /// Its text, for answers that begin with it.
    fn text(self, ids: &[TokenId], model: &Model) -> String {
        match self {
            Given::Text(text) => text,
            Given::Ids(_) => model.decode(ids, false),
        }
    }
}

/// A string, a list of strings, a list of token ids, or a list of such lists.
fn take_prompts(fields: &mut Fields, model: &Model) -> Result<Vec<Given>, ApiError> {
    let prompt = fields.take("prompt").ok_or_else(|| ApiError::invalid("prompt", "prompt is missing"))?;
    // A list that begins with a number is one prompt in tokens.
    let after = prompt.get().strip_prefix('[').map(str::trim_start);
    if after.is_none_or(|rest| rest.starts_with(|c: char| c == '-' || c.is_ascii_digit())) {
        return Ok(vec![take_prompt(prompt, model)?]);
    }
    let mut prompts = Vec::new();
    fields::each("prompt", WANTED, prompt, |at, prompt| {
        if at == PROMPTS_MAX {
            return Err(ApiError::invalid("prompt", format!("prompt may have {PROMPTS_MAX} prompts")));
        }
        prompts.push(take_prompt(prompt, model)?);
        Ok(())
    })?;
    if prompts.is_empty() {
        return Err(ApiError::invalid("prompt", "prompt must not be empty"));
    }
    Ok(prompts)
}

const WANTED: &str = "a string, a list of strings, a list of token ids or a list of such lists";

fn take_prompt(prompt: Raw, model: &Model) -> Result<Given, ApiError> {
    let empty = || ApiError::invalid("prompt", "prompt must not be empty");
    match kind(prompt) {
        Kind::String => {
            let text = fields::string("prompt", WANTED, prompt)?;
            check_bytes("prompt", text.len(), model)?;
            if text.is_empty() { Err(empty()) } else { Ok(Given::Text(text)) }
        }
        Kind::List => {
            let most = model.context_tokens as usize;
            let too_long = || {
                let message = format!("the context is {most} tokens and the prompt has more; shorten it");
                ApiError::context_length("prompt", message)
            };
            let ids = token_ids("prompt", prompt, model, most, too_long)?;
            if ids.is_empty() { Err(empty()) } else { Ok(Given::Ids(ids)) }
        }
        _ => Err(wrong_type("prompt", WANTED, prompt)),
    }
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
}

#[derive(Serialize)]
struct Choice<'a> {
    index: usize,
    text: String,
    logprobs: Option<Logprobs>,
    finish_reason: Option<&'static str>,
    stop_reason: Option<StopReason>,
    #[serde(skip_serializing_if = "Option::is_none")]
    token_ids: Option<Vec<TokenId>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    prompt_token_ids: Option<&'a [TokenId]>,
}

#[derive(Serialize)]
struct Logprobs {
    tokens: Vec<String>,
    token_logprobs: Vec<Option<f64>>,
    top_logprobs: Vec<Option<Map<String, Value>>>,
    text_offset: Vec<usize>,
}

impl Writer {
    async fn whole(mut self, mut answer: Answer) -> Result<Response, ApiError> {
        let (drawn, kept) = (self.parameters.draws as usize, self.parameters.n as usize);
        let mut choices = Vec::new();
        let mut all = answer.collect().await?.into_iter();
        for _ in 0..self.prompts.len() {
            let mut of_prompt: Vec<Collected> = all.by_ref().take(drawn).collect();
            if kept < drawn {
                // The likeliest first; of equals, the first drawn.
                of_prompt.sort_by(|a, b| b.piece.mean_logprob().total_cmp(&a.piece.mean_logprob()));
            }
            choices.extend(of_prompt.into_iter().take(kept));
        }
        let mut offsets = std::mem::take(&mut self.offsets);
        let choices = choices.into_iter().zip(&mut offsets).enumerate();
        let choices = choices.map(|(index, (choice, offset))| {
            self.choice(index, offset, choice.piece, true, choice.finish.as_ref())
        });
        let choices: Vec<Choice> = choices.collect();
        let body = Completion { usage: Some(Some(answer.usage())), ..self.completion(choices) };
        Ok(Json(body).into_response())
    }

    /// A chunk with these choices.
    fn completion<C>(&self, choices: C) -> Completion<'_, C> {
        Completion {
            id: &self.id,
            object: "text_completion",
            created: self.created,
            model: &self.model.name,
            system_fingerprint: FINGERPRINT,
            service_tier: self.parameters.service_tier,
            choices,
            usage: self.parameters.include_usage.then_some(None),
        }
    }

    /// A piece of a choice; `offset` is that of its first character, and is moved on.
    fn choice(
        &self,
        index: usize,
        offset: &mut usize,
        piece: Piece,
        first: bool,
        finish: Option<&Finish>,
    ) -> Choice<'_> {
        let returned = self.parameters.return_token_ids;
        let prompt = &self.prompts[index / self.parameters.n as usize];
        Choice {
            index,
            logprobs: self.logprobs(offset, &piece),
            text: piece.text,
            finish_reason: finish.map(|finish| finish.reason),
            stop_reason: finish.and_then(|finish| finish.stop_reason.clone()),
            token_ids: returned.then(|| ids(&piece.tokens)),
            prompt_token_ids: (returned && first).then_some(&**prompt),
        }
    }

    fn logprobs(&self, offset: &mut usize, piece: &Piece) -> Option<Logprobs> {
        let wanted = self.parameters.logprobs?;
        let mut logprobs = Logprobs {
            tokens: Vec::new(),
            token_logprobs: Vec::new(),
            top_logprobs: Vec::new(),
            text_offset: Vec::new(),
        };
        for Sampled { token, logprob, top } in piece.echoed.iter().chain(&piece.tokens) {
            let text = self.model.token_text(*token);
            logprobs.text_offset.push(*offset);
            *offset += text.chars().count();
            logprobs.tokens.push(text);
            logprobs.token_logprobs.push(logprob.map(json_logprob));
            // The first token of a prompt has nothing before it that could tell.
            logprobs
                .top_logprobs
                .push(logprob.map(|_| self.likeliest(&top[..top.len().min(wanted as usize)])));
        }
        Some(logprobs)
    }
}

impl Writer {
    /// By their texts. Of tokens with the same text, such as halves of characters, the likeliest stands for all.
    fn likeliest(&self, top: &[(TokenId, f32)]) -> Map<String, Value> {
        let mut likeliest = Map::new();
        for &(token, logprob) in top {
            likeliest.entry(self.model.token_text(token)).or_insert_with(|| json_logprob(logprob).into());
        }
        likeliest
    }
}

impl Chunks for Writer {
    fn piece(&mut self, out: &mut Vec<u8>, index: usize, piece: Piece, first: bool, finish: Option<&Finish>) {
        let mut offset = self.offsets[index];
        let choice = self.choice(index, &mut offset, piece, first, finish);
        sse::event(out, &self.completion([choice]));
        self.offsets[index] = offset;
    }

    fn usage(&mut self, out: &mut Vec<u8>, usage: Usage) {
        let none: [Choice; 0] = [];
        sse::event(out, &Completion { usage: Some(Some(usage)), ..self.completion(none) });
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    #[test]
    fn so_many_tokens_of_prompts_are_scored_in_a_request_and_no_more() {
        let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../integration-tests/checkpoints/qwen3");
        let model = Model::open(&dir, "tiny".into(), Some(1 << 22)).expect("it is committed");
        let read = |tokens: usize, more: &str| {
            let prompt = vec!["1"; tokens / 2].join(",");
            let odd = if tokens.is_multiple_of(2) { "" } else { ",2" };
            let body = format!(
                r#"{{"model": "tiny", "prompt": [[{prompt}], [{prompt}{odd}]], "max_tokens": 0{more}}}"#
            );
            super::read(body.into(), &model).map(|(_, prompts, _)| prompts.len())
        };
        let scored = r#", "echo": true, "logprobs": 1"#;
        assert_eq!(read(SCORED_MAX, scored).ok(), Some(2));
        assert_eq!(read(SCORED_MAX + 1, r#", "echo": true"#).ok(), Some(2));
        assert_eq!(read(SCORED_MAX + 1, r#", "logprobs": 1"#).ok(), Some(2));
        let error = format!("{:?}", read(SCORED_MAX + 1, scored).expect_err("too many"));
        assert!(error.contains("1048576 tokens in a request, and the prompts have 1048577"), "{error}");
    }
}
