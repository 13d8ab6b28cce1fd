//! The admin port that every process has: liveness, readiness, metrics, state, configuration and drain.
//!
//! A process shows itself through [`Subject`]; services add routes of their own by merging routers.

use std::sync::Arc;

use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use serde_json::{Value, json};

use crate::Shutdown;
use crate::http::{self, Limits};
use crate::seam::Listener;

/// What an admin port shows and can set going. Called from any thread, at any time; none of it waits.
pub trait Subject: Send + Sync + 'static {
    /// True while new work is welcome.
    fn ready(&self) -> bool;
    /// The body of `/admin/state`, an object.
    fn state(&self) -> Value;
    /// The effective configuration, without secrets.
    fn config(&self) -> Value;
    /// Begins draining; calling it again changes nothing.
    fn drain(&self);
    /// Metrics as Prometheus text; see [`metrics::render`](crate::metrics::render).
    fn metrics(&self) -> String;
}

/// `GET /livez`, `/readyz` (200 or 503), `/metrics`, `/admin/state`, `/admin/config` and `POST /admin/drain`,
/// with JSON errors for everything else. Merge further routes in, but no further fallback.
pub fn routes(subject: Arc<dyn Subject>) -> Router {
    Router::new()
        .route("/livez", get(|| async { "ok\n" }))
        .route("/readyz", get(readyz))
        .route("/metrics", get(metrics))
        .route(
            "/admin/state",
            get(|State(subject): State<Arc<dyn Subject>>| async move { Json(subject.state()) }),
        )
        .route(
            "/admin/config",
            get(|State(subject): State<Arc<dyn Subject>>| async move { Json(subject.config()) }),
        )
        .route("/admin/drain", post(drain))
        .fallback(|| async { error(StatusCode::NOT_FOUND, "not_found", "no such path on the admin port") })
        .method_not_allowed_fallback(|| async {
            error(StatusCode::METHOD_NOT_ALLOWED, "method_not_allowed", "this path wants another method")
        })
        .with_state(subject)
}

/// Serves the admin port until `shutdown` stops; while draining it goes on answering.
pub async fn serve(listener: Listener, routes: Router, shutdown: Shutdown) {
    let limits = Limits { connections_max: 256, ..Limits::default() };
    http::serve(listener, routes, limits, shutdown).await;
}

/// An error body as OpenAI's clients know it.
pub fn error(status: StatusCode, code: &str, message: &str) -> Response {
    let kind = if status.is_server_error() { "server_error" } else { "invalid_request_error" };
    let body = json!({"error": {"message": message, "type": kind, "param": null, "code": code}});
    (status, Json(body)).into_response()
}

async fn readyz(State(subject): State<Arc<dyn Subject>>) -> Response {
    if subject.ready() {
        "ready\n".into_response()
    } else {
        error(StatusCode::SERVICE_UNAVAILABLE, "not_ready", "this process takes no work now")
    }
}

async fn metrics(State(subject): State<Arc<dyn Subject>>) -> Response {
    ([(header::CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")], subject.metrics()).into_response()
}

/// Answers with the state after the drain has begun, so that the caller sees it.
async fn drain(State(subject): State<Arc<dyn Subject>>) -> Json<Value> {
    subject.drain();
    Json(subject.state())
}
