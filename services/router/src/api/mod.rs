//! The HTTP API: one file per endpoint, one merge line each.

mod answer;
mod chat;
mod completions;
mod error;
mod fields;
#[cfg(any(test, feature = "fuzz"))]
pub mod fuzz;
mod health;
mod models;
mod parameters;
mod sse;
mod strings;
#[cfg(test)]
mod tests;
mod tokenize;

use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::body::{Body, Bytes, HttpBody};
use axum::extract::Request;
use axum::http::{HeaderMap, HeaderValue, Method, Version, header};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use bytes::BytesMut;
use http_body_util::BodyExt;
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
        .merge(tokenize::routes())
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

/// What the parser of HTTP lets through and nobody should rely on: two parties might read it in two ways.
fn check_head(request: &Request) -> Result<(), ApiError> {
    let (headers, method) = (request.headers(), request.method());
    if matches!(*method, Method::TRACE | Method::CONNECT) {
        return Err(ApiError::method_not_allowed(method));
    }
    let mut hosts = headers.get_all(header::HOST).iter();
    let host = hosts.next().map(|host| host.to_str().unwrap_or_default());
    let sane = |host: &str| {
        // What is behind the last colon, but not within an address of IPv6.
        let port = host.rsplit_once(':').map(|(_, port)| port).filter(|port| !port.contains(']'));
        host.parse::<http::uri::Authority>().is_ok()
            && !host.contains('@')
            && port.is_none_or(|port| port.is_empty() || port.parse::<u16>().is_ok())
    };
    let needed = request.version() == Version::HTTP_11 && request.uri().authority().is_none();
    match host {
        _ if hosts.next().is_some() => return Err(ApiError::bad_head("there is more than one Host header")),
        Some(host) if !sane(host) => return Err(ApiError::bad_head("the Host header names no host")),
        None if needed => return Err(ApiError::bad_head("the Host header is missing")),
        _ => {}
    }
    let codings: Vec<_> = headers.get_all(header::TRANSFER_ENCODING).iter().collect();
    if codings.len() > 1 || codings.iter().any(|coding| !coding.as_bytes().eq_ignore_ascii_case(b"chunked")) {
        return Err(ApiError::bad_head("Transfer-Encoding may be chunked, once, and nothing else"));
    }
    if !codings.is_empty() && headers.contains_key(header::CONTENT_LENGTH) {
        return Err(ApiError::bad_head("Content-Length and Transfer-Encoding exclude each other"));
    }
    Ok(())
}

async fn name_request(mut request: Request, next: Next) -> Response {
    let given = request.headers().get(REQUEST_ID).and_then(|value| value.to_str().ok());
    let sane =
        |name: &&str| (1..=128).contains(&name.len()) && name.bytes().all(|b| (0x21..0x7f).contains(&b));
    let name = given.filter(sane).map_or_else(|| format!("{:032x}", seam::random_u128()), str::to_owned);
    request.extensions_mut().insert(RequestName(name.clone()));
    let mut response = match check_head(&request) {
        Ok(()) => next.run(request).await,
        // Where the next request begins is not certain any more.
        Err(error) => error.before_the_body().into_response(),
    };
    let value = HeaderValue::from_str(&name).expect("it is printable ASCII");
    response.headers_mut().insert(REQUEST_ID, value);
    response
}

/// An error for a request whose body, if it has one, stays unread.
fn unread(request: &Request, error: ApiError) -> ApiError {
    if request.body().is_end_stream() { error } else { error.before_the_body() }
}

/// Reads a JSON body whole, within its limit.
pub(crate) async fn read_body(app: &App, headers: &HeaderMap, body: Body) -> Result<Bytes, ApiError> {
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
    let length = headers.get(header::CONTENT_LENGTH).and_then(|l| l.to_str().ok()?.parse::<u64>().ok());
    if length.is_some_and(|length| length > max as u64) {
        return Err(ApiError::too_large(max).before_the_body());
    }
    receive(body, max).await
}

/// The bytes of a body, which must not come too slowly: after ten seconds a kibibyte a second on average.
async fn receive(mut body: Body, max: usize) -> Result<Bytes, ApiError> {
    const PATIENCE: Duration = Duration::from_secs(10);
    const BYTES_PER_SECOND: u64 = 1024;
    let began = seam::now();
    let mut pieces = Pieces::default();
    loop {
        let earned = Duration::from_secs(pieces.len as u64 / BYTES_PER_SECOND);
        let limit = (began + PATIENCE + earned).remaining(seam::now());
        match seam::timeout(limit, body.frame()).await {
            Err(_) => return Err(ApiError::body_timeout().before_the_body()),
            Ok(None) => return Ok(pieces.joined()),
            Ok(Some(Err(_))) => return Err(ApiError::invalid_body("the body broke off").before_the_body()),
            Ok(Some(Ok(frame))) => {
                let Some(data) = frame.data_ref() else { continue };
                if pieces.len + data.len() > max {
                    return Err(ApiError::too_large(max).before_the_body());
                }
                pieces.take(data);
            }
        }
    }
}

/// A body that is coming. What is announced is not there yet, so memory is taken as it comes, and in pieces: one
/// buffer that doubles would be three times the body just after it has grown.
#[derive(Default)]
struct Pieces {
    full: Vec<BytesMut>,
    last: BytesMut,
    len: usize,
}

impl Pieces {
    const BYTES: usize = 64 << 10;

    fn take(&mut self, mut data: &[u8]) {
        self.len += data.len();
        while !data.is_empty() {
            if self.last.len() == self.last.capacity() {
                // The first takes what has come; each further one takes as much as all before it, up to a limit.
                let room = data.len().max((self.len - data.len()).min(Self::BYTES));
                let full = std::mem::replace(&mut self.last, BytesMut::with_capacity(room));
                self.full.extend(Some(full).filter(|full| !full.is_empty()));
            }
            let (now, later) = data.split_at(data.len().min(self.last.capacity() - self.last.len()));
            self.last.extend_from_slice(now);
            data = later;
        }
    }

    /// The whole; a piece is given back as soon as it is copied.
    fn joined(mut self) -> Bytes {
        if self.full.is_empty() {
            return self.last.freeze();
        }
        let mut whole = BytesMut::with_capacity(self.len);
        self.full.push(self.last);
        self.full.into_iter().for_each(|piece| whole.extend_from_slice(&piece));
        whole.freeze()
    }
}

/// When a request that came now is given up.
pub(crate) fn deadline(app: &App) -> (Time, Time) {
    let now = seam::now();
    (now, now + app.options.request_deadline)
}
