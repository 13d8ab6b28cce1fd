//! A cluster in virtual time: router and workers over simulated sockets.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use serde_json::{Value, json};
use tandem_chassis::config::ByteSize;
use tandem_chassis::{Shutdown, seam};
use tandem_cluster::{Embedded, Membership};
use tandem_router::RouterConfig;
use tandem_types::{BLOCK_TOKENS, Role};
use tandem_worker::WorkerConfig;
use tandem_worker::engine::FAKE_CONTEXT_TOKENS;

use super::case::Case;
use super::client;
use crate::checkpoints;

/// Bytes of KV memory per token that the fake engine counts.
const BYTES_PER_TOKEN: u64 = 1024;
/// Tokens of a step: long prompts take several.
const TOKEN_BUDGET: u32 = 64;

/// A running cluster.
pub(crate) struct World {
    pub(crate) api: SocketAddr,
    pub(crate) admin: SocketAddr,
    pub(crate) workers: Vec<Worker>,
    pub(crate) model: String,
    router: tandem_router::Running,
    router_end: Shutdown,
}

pub(crate) struct Worker {
    pub(crate) id: String,
    /// Where its gRPC services listen.
    pub(crate) address: SocketAddr,
    pub(crate) admin: SocketAddr,
    shutdown: Shutdown,
    running: tandem_worker::Running,
}

impl World {
    pub(crate) async fn start(case: &Case) -> World {
        let membership: Arc<dyn Membership> = Arc::new(Embedded::new());
        let (prefill, decode, mixed) = case.workers;
        let mut workers = Vec::new();
        for (role, count) in [(Role::Prefill, prefill), (Role::Decode, decode), (Role::Mixed, mixed)] {
            for index in 0..count {
                workers.push(Worker::start(case, format!("{role}-{index}"), role, membership.clone()).await);
            }
        }
        let router_end = Shutdown::new();
        let model = checkpoints::named("qwen3");
        let config = RouterConfig {
            id: Some("router-0".into()),
            port: 0,
            admin_port: 0,
            model: Some(model),
            policy: "round-robin".into(),
            context_tokens: Some(FAKE_CONTEXT_TOKENS),
            ..RouterConfig::defaults()
        };
        let router = tandem_router::start(config, membership, router_end.clone()).await;
        let router = router.expect("the router starts");
        let (api, admin) = (router.api, router.admin);
        let world = World { api, admin, workers, model: "qwen3".into(), router, router_end };
        while world.ready().await.len() < world.workers.len() {
            seam::sleep(Duration::from_millis(50)).await;
        }
        world
    }

    /// Names of workers that take work.
    pub(crate) async fn ready(&self) -> Vec<String> {
        let rows = client::get(self.admin, "/admin/cluster").await.unwrap_or_default();
        let rows = rows["workers"].as_array().cloned().unwrap_or_default();
        let ready = rows.iter().filter(|row| row["state"] == "ready");
        ready.filter_map(|row| row["id"].as_str().map(str::to_owned)).collect()
    }

    /// Orders another role.
    pub(crate) async fn flip(&self, worker: u64, role: Role) {
        let worker = &self.workers[worker as usize].id;
        let path = format!("/admin/workers/{worker}/role");
        // A worker that is gone by now cannot be asked, and that is right.
        let _ = client::post(self.admin, &path, &json!({ "role": role })).await;
    }

    /// The router's record of a request.
    pub(crate) async fn record(&self, name: &str) -> Value {
        client::get(self.admin, &format!("/admin/requests/{name}")).await.unwrap_or_default()
    }

    /// Ends everything in order. A worker whose step loop panicked says so when it is joined.
    pub(crate) async fn close(self) {
        self.router_end.drain();
        self.router.join().await;
        for worker in &self.workers {
            worker.shutdown.drain();
            worker.shutdown.stop();
        }
        for worker in self.workers {
            // Its panic was meant, or has been kept for the judge.
            let _ = seam::spawn(worker.running.join()).await;
        }
    }
}

impl Worker {
    async fn start(case: &Case, id: String, role: Role, membership: Arc<dyn Membership>) -> Worker {
        let shutdown = Shutdown::new();
        let config = WorkerConfig {
            id: Some(id.clone()),
            role,
            port: 0,
            admin_port: 0,
            model: Some(checkpoints::named("qwen3")),
            threads: Some(1),
            kv_memory: ByteSize(case.blocks() * u64::from(BLOCK_TOKENS) * BYTES_PER_TOKEN),
            fake: Some(case.fake().parse().expect("a fake engine's spec")),
            transport: "inproc".into(),
            token_budget: TOKEN_BUDGET,
            ..WorkerConfig::defaults()
        };
        let running = tandem_worker::start(config, membership, shutdown.clone(), Arc::new(|_| {})).await;
        let running = running.unwrap_or_else(|error| panic!("{id} starts: {error}"));
        Worker { id, address: running.address, admin: running.admin, shutdown, running }
    }

    /// What its admin port says; an error if it is gone.
    pub(crate) async fn state(&self) -> Result<Value, String> {
        client::get(self.admin, "/admin/state").await
    }
}
