//! The router's admin port: the cluster as it sees it, decision records, and wishes for workers.

use std::sync::Arc;

use axum::extract::{Path, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use serde_json::{Value, json};
use tandem_chassis::admin::{Subject, error};
use tandem_chassis::{Shutdown, process_facts};
use tandem_cluster::By;
use tandem_types::{Incarnation, Role, WorkerState};

use crate::dispatch::Dispatcher;
use crate::metrics::Metrics;
use crate::planner::Shown;
use crate::records::Records;
use crate::workers::{WishError, Workers};

/// What the admin port shows of a router.
pub(crate) struct RouterSubject {
    pub(crate) id: String,
    pub(crate) model: String,
    pub(crate) incarnation: Incarnation,
    pub(crate) config: Value,
    pub(crate) command: Vec<String>,
    pub(crate) workers: Arc<Workers>,
    pub(crate) dispatcher: Arc<Dispatcher>,
    pub(crate) records: Arc<Records>,
    pub(crate) metrics: Arc<Metrics>,
    pub(crate) planned: Arc<Shown>,
    pub(crate) shutdown: Shutdown,
}

impl Subject for RouterSubject {
    /// A router is ready when at least one worker takes work.
    fn ready(&self) -> bool {
        !self.shutdown.is_draining() && !self.workers.candidates().0.is_empty()
    }

    fn state(&self) -> Value {
        let facts = process_facts();
        let state = if self.shutdown.is_draining() {
            WorkerState::Draining
        } else if self.ready() {
            WorkerState::Ready
        } else {
            WorkerState::Starting
        };
        json!({
            "id": self.id,
            "kind": "router",
            "pid": facts.pid,
            "command": self.command,
            "model": self.model,
            "role": null,
            "epoch": 0,
            "incarnation": self.incarnation.to_string(),
            "state": state.as_str(),
            "running": self.dispatcher.running() - self.dispatcher.waiting().min(self.dispatcher.running()),
            "waiting": self.dispatcher.waiting(),
            "leases": 0,
            "blocks": { "total": 0, "free": 0, "cached": 0, "in_use": 0 },
            "cpu_seconds": facts.cpu_seconds,
            "resident_bytes": facts.resident_bytes,
            "tasks": facts.tasks,
            "version": env!("CARGO_PKG_VERSION"),
        })
    }

    fn config(&self) -> Value {
        self.config.clone()
    }

    fn drain(&self) {
        self.shutdown.drain();
    }

    fn metrics(&self) -> String {
        self.metrics.observe_index(self.workers.prefixes().size());
        self.metrics.render(self.dispatcher.waiting(), |state| self.workers.count(state))
    }
}

/// The routes that only a router has.
pub(crate) fn routes(subject: Arc<RouterSubject>) -> Router {
    Router::new()
        .route("/admin/cluster", get(cluster))
        .route("/admin/requests/{id}", get(request))
        .route("/admin/workers/{id}/role", post(role))
        .route("/admin/workers/{id}/drain", post(drain))
        .route("/admin/workers/{id}/cordon", post(cordon).delete(uncordon))
        .with_state(subject)
}

async fn cluster(State(subject): State<Arc<RouterSubject>>) -> Json<Value> {
    let view = subject.workers.view();
    let peers = |registrations: &std::collections::BTreeMap<String, tandem_cluster::Registration>,
                 kind: &str| {
        let rows = registrations.values().map(|r| {
            json!({
                "id": r.id,
                "kind": kind,
                "role": null,
                "epoch": r.epoch.0,
                "state": r.state.as_str(),
                "address": r.address,
                "admin": r.admin,
                "model": r.model,
                "incarnation": r.incarnation.to_string(),
                "pid": r.pid,
            })
        });
        rows.collect::<Vec<Value>>()
    };
    Json(json!({
        "workers": subject.workers.describe(),
        "routers": peers(&view.routers, "router"),
        "stores": peers(&view.stores, "store"),
        "leader": view.leader,
        "planner": subject.planned.get(),
        "membership": { "connected": view.connected, "revision": view.revision },
    }))
}

async fn request(State(subject): State<Arc<RouterSubject>>, Path(id): Path<String>) -> Response {
    match subject.records.find(&id, subject.dispatcher.policy()) {
        Some(record) => Json(record).into_response(),
        None => {
            let message = format!("no recent request is called {id:?}; the last 1000 are kept");
            error(StatusCode::NOT_FOUND, "request_not_found", &message)
        }
    }
}

async fn role(
    State(subject): State<Arc<RouterSubject>>,
    Path(id): Path<String>,
    body: Result<Json<Value>, axum::extract::rejection::JsonRejection>,
) -> Response {
    let wanted = body.ok().and_then(|Json(body)| Some(body.get("role")?.as_str()?.parse::<Role>()));
    let role = match wanted {
        Some(Ok(role)) => role,
        Some(Err(wrong)) => return error(StatusCode::BAD_REQUEST, "invalid_value", &wrong.to_string()),
        None => {
            let message = r#"the body must be JSON like {"role": "decode"}"#;
            return error(StatusCode::BAD_REQUEST, "invalid_value", message);
        }
    };
    answer(
        subject.workers.order_role(&id, role, By::Operator).await.map(|()| json!({ "id": id, "role": role })),
    )
}

async fn drain(State(subject): State<Arc<RouterSubject>>, Path(id): Path<String>) -> Response {
    answer(subject.workers.drain(&id).await.map(|running| json!({ "id": id, "running": running })))
}

async fn cordon(State(subject): State<Arc<RouterSubject>>, Path(id): Path<String>) -> Response {
    answer(subject.workers.cordon(&id, true).map(|()| json!({ "id": id, "cordoned": true })))
}

async fn uncordon(State(subject): State<Arc<RouterSubject>>, Path(id): Path<String>) -> Response {
    answer(subject.workers.cordon(&id, false).map(|()| json!({ "id": id, "cordoned": false })))
}

fn answer(done: Result<Value, WishError>) -> Response {
    match done {
        Ok(value) => Json(value).into_response(),
        Err(wrong @ WishError::Unknown(_)) => {
            error(StatusCode::NOT_FOUND, "worker_not_found", &wrong.to_string())
        }
        Err(wrong) => error(StatusCode::CONFLICT, "refused", &wrong.to_string()),
    }
}
