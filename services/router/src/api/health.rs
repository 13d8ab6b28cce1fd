//! `GET /health`: this router answers. Whether it has workers is for `/readyz` of the admin port.

use std::sync::Arc;

use axum::Router;
use axum::routing::get;

use super::App;

pub(super) fn routes() -> Router<Arc<App>> {
    Router::new().route("/health", get(async || "ok\n"))
}
