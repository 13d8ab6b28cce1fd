//! `POST /tokenize` and `POST /detokenize`, as vLLM has them: what the model makes of a text or a chat.

use std::sync::Arc;

use axum::body::Body;
use axum::extract::State;
use axum::http::HeaderMap;
use axum::routing::post;
use axum::{Json, Router};
use serde_json::{Value, json};

use super::chat::{Chat, check_bytes, off_network};
use super::error::ApiError;
use super::fields::{self, Fields};
use super::parameters::{check_model_if_named, token_ids};
use super::{App, read_body};
use crate::text::Model;

pub(super) fn routes() -> Router<Arc<App>> {
    Router::new().route("/tokenize", post(tokenize)).route("/detokenize", post(detokenize))
}

async fn tokenize(
    State(app): State<Arc<App>>,
    headers: HeaderMap,
    body: Body,
) -> Result<Json<Value>, ApiError> {
    let body = read_body(&app, &headers, body).await?;
    let model = app.model.clone();
    off_network(body.len(), move || tokenized(&body, &model)).await?.map(Json)
}

pub(super) fn tokenized(body: &[u8], model: &Model) -> Result<Value, ApiError> {
    let mut fields = Fields::parse(body)?;
    check_model_if_named(&mut fields, model)?;
    let texts = fields.bool("return_token_strs")?.unwrap_or(false);
    let special = fields.bool("add_special_tokens")?.unwrap_or(true);
    let tokens = if let Some(prompt) = fields.take("prompt") {
        let text = fields::string("prompt", "a string", prompt)?;
        check_bytes("prompt", text.len(), model)?;
        let wrong = |why| ApiError::invalid("prompt", format!("prompt cannot be tokenized: {why}"));
        model.encode(&text, special).map_err(wrong)?
    } else if fields.has("messages") {
        Chat::take(&mut fields, model)?.encode(model)?
    } else {
        return Err(ApiError::invalid("prompt", "prompt is missing; send it, or messages"));
    };
    let mut answer =
        json!({ "count": tokens.len(), "max_model_len": model.context_tokens, "tokens": tokens });
    if texts {
        let texts = tokens.iter().map(|token| model.token_text(*token));
        answer["token_strs"] = texts.collect::<Vec<_>>().into();
    }
    Ok(answer)
}

async fn detokenize(
    State(app): State<Arc<App>>,
    headers: HeaderMap,
    body: Body,
) -> Result<Json<Value>, ApiError> {
    let body = read_body(&app, &headers, body).await?;
    let model = app.model.clone();
    off_network(body.len(), move || detokenized(&body, &model)).await?.map(Json)
}

pub(super) fn detokenized(body: &[u8], model: &Model) -> Result<Value, ApiError> {
    let mut fields = Fields::parse(body)?;
    check_model_if_named(&mut fields, model)?;
    let tokens = fields.take("tokens").ok_or_else(|| ApiError::invalid("tokens", "tokens is missing"))?;
    let most = model.context_tokens as usize;
    let too_many =
        || ApiError::context_length("tokens", format!("tokens may have {most}, as the context has"));
    let tokens = token_ids("tokens", tokens, model, most, too_many)?;
    Ok(json!({ "prompt": model.decode(&tokens, false) }))
}
