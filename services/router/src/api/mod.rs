//! The HTTP API: one file per endpoint, one merge line each.

mod answer;
mod chat;
mod completions;
mod error;
mod fields;
mod health;
mod models;
mod parameters;
mod sse;
#[cfg(test)]
mod tests;

use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::body::{Body, Bytes, HttpBody};
use axum::extract::Request;
use axum::http::{HeaderMap, HeaderValue, header};
use axum::middleware::{self, Next};
use axum::response::Response;
use http_body_util::{BodyExt, Limited};
use tandem_chassis::seam;
use tandem_types::Time;

use crate::request::Generate;
use crate::text::Model;
use error::ApiError;

/// Limits of the API.
#[derive(Clone, Debug)]
pub(crate) struct Options {
    /// Time that a request may take in all.
    pub(crate) request_deadline: Duration,
    /// Largest body.
    pub(crate) body_bytes_max: usize,
}

/// What every endpoint works with.
pub(crate) struct App {
    pub(crate) model: Arc<Model>,
    pub(crate) generate: Arc<dyn Generate>,
    pub(crate) options: Options,
    /// Unix seconds of the start: `created` of the model.
    pub(crate) started: u64,
}

/// The whole API.
pub(crate) fn routes(model: Arc<Model>, generate: impl Generate, options: Options) -> Router {
    let started = seam::unix_time().as_secs();
    let app = Arc::new(App { model, generate: Arc::new(generate), options, started });
    Router::new()
        .merge(chat::routes())
        .merge(completions::routes())
        .merge(models::routes())
        .merge(health::routes())
        .fallback(async |request: Request| unread(&request, ApiError::unknown_path(request.uri().path())))
        .method_not_allowed_fallback(async |request: Request| {
            unread(&request, ApiError::method_not_allowed(request.method()))
        })
        .layer(middleware::from_fn(name_request))
        .with_state(app)
}

/// The client's name of a request, or one of ours; it is on every answer.
#[derive(Clone, Debug)]
pub(crate) struct RequestName(pub(crate) String);

const REQUEST_ID: &str = "x-request-id";

async fn name_request(mut request: Request, next: Next) -> Response {
    let given = request.headers().get(REQUEST_ID).and_then(|value| value.to_str().ok());
    let sane =
        |name: &&str| (1..=128).contains(&name.len()) && name.bytes().all(|b| (0x21..0x7f).contains(&b));
    let name = given.filter(sane).map_or_else(|| format!("{:032x}", seam::random_u128()), str::to_owned);
    request.extensions_mut().insert(RequestName(name.clone()));
    let mut response = next.run(request).await;
    let value = HeaderValue::from_str(&name).expect("it is printable ASCII");
    response.headers_mut().insert(REQUEST_ID, value);
    response
}

/// An error for a request whose body, if it has one, stays unread.
fn unread(request: &Request, error: ApiError) -> ApiError {
    if request.body().is_end_stream() { error } else { error.before_the_body() }
}

/// Reads a JSON body whole, within its limit, and says what is wrong with it.
pub(crate) async fn read_body(
    app: &App,
    headers: &HeaderMap,
    body: Body,
) -> Result<fields::Fields, ApiError> {
    if let Some(kind) = headers.get(header::CONTENT_TYPE) {
        let kind = kind.to_str().unwrap_or_default();
        let essence = kind.split(';').next().unwrap_or_default().trim().to_ascii_lowercase();
        if !(essence.is_empty() || essence == "application/json" || essence.ends_with("+json")) {
            return Err(ApiError::unsupported_media(&format!(
                "content type {kind:?}; send application/json"
            ))
            .before_the_body());
        }
    }
    if let Some(coding) = headers.get(header::CONTENT_ENCODING).filter(|coding| *coding != "identity") {
        return Err(ApiError::unsupported_media(&format!(
            "content encoding {coding:?}; send the body as it is"
        ))
        .before_the_body());
    }
    let max = app.options.body_bytes_max;
    let too_large = || ApiError::too_large(max).before_the_body();
    let length = headers.get(header::CONTENT_LENGTH).and_then(|l| l.to_str().ok()?.parse::<u64>().ok());
    if length.is_some_and(|length| length > max as u64) {
        return Err(too_large());
    }
    // A kibibyte a second after ten seconds, at least: what is slower is given up.
    let time = Duration::from_secs(10) + Duration::from_secs(length.unwrap_or(max as u64) / 1024);
    let bytes: Bytes = match seam::timeout(time, Limited::new(body, max).collect()).await {
        Ok(Ok(collected)) => collected.to_bytes(),
        Ok(Err(error)) if error.is::<http_body_util::LengthLimitError>() => return Err(too_large()),
        Ok(Err(_)) => return Err(ApiError::invalid_body("the body broke off").before_the_body()),
        Err(_) => return Err(ApiError::body_timeout().before_the_body()),
    };
    fields::Fields::parse(&bytes)
}

/// When a request that came now is given up.
pub(crate) fn deadline(app: &App) -> (Time, Time) {
    let now = seam::now();
    (now, now + app.options.request_deadline)
}
