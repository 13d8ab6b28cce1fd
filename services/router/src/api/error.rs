//! Errors as OpenAI's clients know them, and the one place where status codes are assigned.

use axum::Json;
use axum::http::{HeaderValue, Method, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};

use crate::request::DispatchError;
use crate::text::TemplateError;

/// An error answer.
#[derive(Clone, Debug)]
pub(crate) struct ApiError {
    pub(crate) status: StatusCode,
    kind: &'static str,
    pub(crate) code: Option<&'static str>,
    pub(crate) param: Option<String>,
    message: String,
    /// Says when to try again.
    retry: bool,
    /// The body was not read to its end, so the connection cannot carry another request, and says so.
    unread: bool,
}

const INVALID: &str = "invalid_request_error";
const SERVER: &str = "server_error";

impl ApiError {
    fn new(
        status: StatusCode,
        kind: &'static str,
        code: &'static str,
        message: impl Into<String>,
    ) -> ApiError {
        let message = message.into();
        ApiError { status, kind, code: Some(code), param: None, message, retry: false, unread: false }
    }

    /// The same where the body was not read, or not to its end.
    pub(crate) fn before_the_body(self) -> ApiError {
        ApiError { unread: true, ..self }
    }

    /// A parameter that is not as it must be.
    pub(crate) fn invalid(param: &str, message: impl Into<String>) -> ApiError {
        let error = ApiError::new(StatusCode::BAD_REQUEST, INVALID, "invalid_value", message);
        ApiError { param: Some(param.to_owned()), ..error }
    }

    /// A parameter that this version does not support.
    pub(crate) fn unsupported(param: &str, message: impl Into<String>) -> ApiError {
        let error = ApiError::new(StatusCode::BAD_REQUEST, INVALID, "unsupported_parameter", message);
        ApiError { param: Some(param.to_owned()), ..error }
    }

    /// A body that is not JSON, or not an object.
    pub(crate) fn invalid_body(message: impl Into<String>) -> ApiError {
        ApiError::new(StatusCode::BAD_REQUEST, INVALID, "invalid_json", message)
    }

    /// A prompt that does not fit.
    pub(crate) fn context_length(param: &str, message: impl Into<String>) -> ApiError {
        let error = ApiError::new(StatusCode::BAD_REQUEST, INVALID, "context_length_exceeded", message);
        ApiError { param: Some(param.to_owned()), ..error }
    }

    /// A model that is not here.
    pub(crate) fn unknown_model(name: &str, known: &str) -> ApiError {
        let name: String = name.chars().take(64).collect();
        let message = format!("the model {name:?} does not exist; this cluster serves {known:?}");
        let error = ApiError::new(StatusCode::NOT_FOUND, INVALID, "model_not_found", message);
        ApiError { param: Some("model".into()), ..error }
    }

    pub(crate) fn unknown_path(path: &str) -> ApiError {
        let path: String = path.chars().take(64).collect();
        let message = format!(
            "there is no {path}; the API has /v1/chat/completions, /v1/completions, /v1/models, /tokenize, \
             /detokenize and /health"
        );
        ApiError::new(StatusCode::NOT_FOUND, INVALID, "not_found", message)
    }

    pub(crate) fn method_not_allowed(method: &Method) -> ApiError {
        let message = format!("{method} is not for this path; the allow header says what is");
        ApiError::new(StatusCode::METHOD_NOT_ALLOWED, INVALID, "method_not_allowed", message)
    }

    /// A head that is not as HTTP wants it.
    pub(crate) fn bad_head(message: &str) -> ApiError {
        ApiError::new(StatusCode::BAD_REQUEST, INVALID, "invalid_request", message)
    }

    pub(crate) fn unsupported_media(what: &str) -> ApiError {
        let message = format!("the body has {what}");
        ApiError::new(StatusCode::UNSUPPORTED_MEDIA_TYPE, INVALID, "unsupported_media_type", message)
    }

    pub(crate) fn too_large(max: usize) -> ApiError {
        let message = format!("the body is larger than {max} bytes");
        ApiError::new(StatusCode::PAYLOAD_TOO_LARGE, INVALID, "request_too_large", message)
    }

    pub(crate) fn body_timeout() -> ApiError {
        ApiError::new(StatusCode::REQUEST_TIMEOUT, "timeout", "request_timeout", "the body came too slowly")
    }

    /// As a body or an event.
    pub(crate) fn body(&self) -> Value {
        json!({
            "error": { "message": self.message, "type": self.kind, "param": self.param, "code": self.code }
        })
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let mut response = (self.status, Json(self.body())).into_response();
        if self.retry {
            response.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from_static("1"));
        }
        if self.unread {
            // The HTTP server closes it in any case; a client that is not told sends its next request into it.
            response.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
        }
        response
    }
}

impl From<DispatchError> for ApiError {
    fn from(error: DispatchError) -> ApiError {
        let message = error.to_string();
        let unavailable = |code| {
            let error = ApiError::new(StatusCode::SERVICE_UNAVAILABLE, SERVER, code, message.clone());
            ApiError { retry: true, ..error }
        };
        match error {
            DispatchError::Overloaded { .. } => unavailable("overloaded"),
            DispatchError::NoWorker { .. } => unavailable("no_worker"),
            DispatchError::Draining => unavailable("draining"),
            DispatchError::ContextLength { .. } => {
                ApiError::new(StatusCode::BAD_REQUEST, INVALID, "context_length_exceeded", message)
            }
            DispatchError::Unsupported(_) => {
                ApiError::new(StatusCode::BAD_REQUEST, INVALID, "unsupported_parameter", message)
            }
            DispatchError::Deadline => {
                ApiError::new(StatusCode::GATEWAY_TIMEOUT, SERVER, "upstream_timeout", message)
            }
            DispatchError::WorkerLost { .. } => {
                ApiError::new(StatusCode::BAD_GATEWAY, SERVER, "upstream_error", message)
            }
            DispatchError::SlowClient(_) => {
                ApiError::new(StatusCode::REQUEST_TIMEOUT, "timeout", "slow_client", message)
            }
            DispatchError::Internal(_) => {
                ApiError::new(StatusCode::INTERNAL_SERVER_ERROR, SERVER, "internal_error", message)
            }
        }
    }
}

impl From<TemplateError> for ApiError {
    fn from(error: TemplateError) -> ApiError {
        ApiError::invalid("messages", error.to_string())
    }
}
