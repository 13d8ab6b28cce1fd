//! `POST /tokenize` and `POST /detokenize`, as vLLM has them: what the model makes of a text or a chat.

use std::sync::Arc;

use axum::body::Body;
use axum::extract::State;
use axum::http::HeaderMap;
use axum::routing::post;
use axum::{Json, Router};
use serde_json::{Value, json};

use super::chat::{Chat, check_bytes, encode, off_network};
use super::error::ApiError;
use super::fields::{self, Fields};
use super::parameters::{check_model_if_named, token_ids};
use super::{App, read_body};

pub(super) fn routes() -> Router<Arc<App>> {
    Router::new().route("/tokenize", post(tokenize)).route("/detokenize", post(detokenize))
}

async fn tokenize(
    State(app): State<Arc<App>>,
    headers: HeaderMap,
    body: Body,
) -> Result<Json<Value>, ApiError> {
    let body = read_body(&app, &headers, body).await?;
    let mut fields = Fields::parse(&body)?;
    check_model_if_named(&mut fields, &app.model)?;
    let texts = fields.bool("return_token_strs")?.unwrap_or(false);
    let special = fields.bool("add_special_tokens")?.unwrap_or(true);
    let tokens = if let Some(prompt) = fields.take("prompt") {
        let text = fields::string("prompt", "a string", prompt)?;
        check_bytes("prompt", text.len(), &app.model)?;
        let model = app.model.clone();
        let encoded = off_network(text.len(), move || model.encode(&text, special)).await?;
        let wrong = |why| ApiError::invalid("prompt", format!("prompt cannot be tokenized: {why}"));
        encoded.map_err(wrong)?.into()
    } else if fields.has("messages") {
        encode(&app.model, Chat::take(&mut fields, &app.model)?).await?
    } else {
        return Err(ApiError::invalid("prompt", "prompt is missing; send it, or messages"));
    };
    let mut answer = json!({
        "count": tokens.len(),
        "max_model_len": app.model.context_tokens,
        "tokens": &*tokens,
    });
    if texts {
        let texts = tokens.iter().map(|token| app.model.token_text(*token));
        answer["token_strs"] = texts.collect::<Vec<_>>().into();
    }
    Ok(Json(answer))
}

async fn detokenize(
    State(app): State<Arc<App>>,
    headers: HeaderMap,
    body: Body,
) -> Result<Json<Value>, ApiError> {
    let body = read_body(&app, &headers, body).await?;
    let mut fields = Fields::parse(&body)?;
    check_model_if_named(&mut fields, &app.model)?;
    let tokens = fields.take("tokens").ok_or_else(|| ApiError::invalid("tokens", "tokens is missing"))?;
    let most = app.model.context_tokens as usize;
    let too_many =
        || ApiError::context_length("tokens", format!("tokens may have {most}, as the context has"));
    let tokens = token_ids("tokens", tokens, &app.model, most, too_many)?;
    let model = app.model.clone();
    let text = off_network(tokens.len() * 4, move || model.decode(&tokens, false)).await?;
    Ok(Json(json!({ "prompt": text })))
}
