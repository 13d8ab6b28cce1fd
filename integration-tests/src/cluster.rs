//! A whole cluster in this process: real router and workers over embedded membership.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use serde_json::Value;
use tandem_chassis::config::Slo;
use tandem_chassis::{Shutdown, seam};
use tandem_cluster::{Embedded, Membership};
use tandem_router::RouterConfig;
use tandem_types::Role;
use tandem_worker::WorkerConfig;
use tandem_worker::engine::{Dtype, FAKE_CONTEXT_TOKENS, FakeSpec};

use crate::Client;

/// What a cluster is made of.
#[derive(Clone, Debug)]
pub struct Spec {
    /// Prefill, decode and mixed workers.
    pub workers: (u32, u32, u32),
    /// The checkpoint.
    pub model: PathBuf,
    /// The fake engine instead of the real one.
    pub fake: Option<FakeSpec>,
    /// Element type.
    pub dtype: Dtype,
    /// Threads of prefill workers and of all others.
    pub threads: (usize, usize),
    /// The only transport, or `auto`.
    pub transport: String,
    /// KV pool of each worker, in bytes.
    pub kv_bytes: u64,
    /// Routing policy.
    pub policy: String,
    /// Tokens of an engine step.
    pub token_budget: u32,
    /// Latency targets.
    pub slo: Option<Slo>,
}

impl Spec {
    /// One prefill and one decode worker of this checkpoint, in float32.
    pub fn of(model: PathBuf) -> Spec {
        Spec {
            workers: (1, 1, 0),
            model,
            fake: None,
            dtype: Dtype::Float32,
            threads: (1, 1),
            transport: "auto".into(),
            kv_bytes: 64 << 20,
            policy: "round-robin".into(),
            token_budget: 512,
            slo: None,
        }
    }

    /// The same with a fake engine.
    pub fn fake(self, spec: &str) -> Spec {
        Spec { fake: Some(spec.parse().expect("a fake engine's spec")), ..self }
    }

    /// Other numbers of prefill, decode and mixed workers.
    pub fn workers(self, prefill: u32, decode: u32, mixed: u32) -> Spec {
        Spec { workers: (prefill, decode, mixed), ..self }
    }
}

/// One worker of a [`TestCluster`].
pub struct TestWorker {
    /// Its name.
    pub id: String,
    /// Its admin port.
    pub admin: Client,
    shutdown: Shutdown,
    running: tandem_worker::Running,
}

/// A running cluster; ends when it is closed or dropped.
pub struct TestCluster {
    /// The API.
    pub api: Client,
    /// The router's admin port.
    pub admin: Client,
    /// Where the API listens.
    pub address: SocketAddr,
    /// The model's name in the API.
    pub model: String,
    /// Its workers.
    pub workers: Vec<TestWorker>,
    spec: Spec,
    membership: Arc<dyn Membership>,
    router: tandem_router::Running,
    router_end: Shutdown,
}

impl TestCluster {
    /// Starts it and waits until every worker takes work.
    pub async fn start(spec: Spec) -> TestCluster {
        let membership: Arc<dyn Membership> = Arc::new(Embedded::new());
        let mut workers = Vec::new();
        let (prefill, decode, mixed) = spec.workers;
        for (role, count) in [(Role::Prefill, prefill), (Role::Decode, decode), (Role::Mixed, mixed)] {
            for i in 0..count {
                workers.push(start_worker(&spec, &format!("{role}-{i}"), role, membership.clone()).await);
            }
        }
        let router_end = Shutdown::new();
        let config = RouterConfig {
            id: Some("router-0".into()),
            port: 0,
            admin_port: 0,
            model: Some(spec.model.clone()),
            policy: spec.policy.clone(),
            slo: spec.slo,
            context_tokens: spec.fake.as_ref().map(|_| FAKE_CONTEXT_TOKENS),
            drain_timeout: "2s".parse().expect("a duration"),
            ..RouterConfig::defaults()
        };
        let router = tandem_router::start(config, membership.clone(), router_end.clone()).await;
        let router = router.expect("the router starts");
        let (api, admin) = (Client::new(router.api), Client::new(router.admin));
        let model = api.get("/v1/models").await.json["data"][0]["id"].as_str().expect("a model").to_owned();
        let address = router.api;
        let cluster =
            TestCluster { api, admin, address, model, workers, spec, membership, router, router_end };
        cluster.wait_for("every worker is ready", |rows| ready(rows) == cluster.workers.len()).await;
        cluster
    }

    /// Waits until `/admin/cluster`'s workers look as wanted.
    pub async fn wait_for(&self, what: &str, wanted: impl Fn(&[Value]) -> bool) {
        wait_for_workers(&self.admin, what, wanted).await;
    }

    /// Starts one more worker and waits until it takes work.
    pub async fn add_worker(&mut self, id: &str, role: Role) {
        let worker = start_worker(&self.spec, id, role, self.membership.clone()).await;
        self.workers.push(worker);
        let id = id.to_owned();
        self.wait_for("the new worker is ready", |rows| {
            rows.iter().any(|row| row["id"] == id.as_str() && row["state"] == "ready")
        })
        .await;
    }

    /// Ends one worker at once, as if its process had gone.
    pub async fn stop_worker(&mut self, id: &str) {
        let at = self.workers.iter().position(|w| w.id == id).expect("such a worker");
        let worker = self.workers.remove(at);
        worker.shutdown.drain();
        worker.shutdown.stop();
        worker.running.join().await;
    }

    /// Waits until no worker holds a block or a lease. Returns how long that took.
    ///
    /// # Panics
    /// After five seconds.
    pub async fn wait_until_idle(&self) -> Duration {
        let began = seam::now();
        loop {
            let mut busy = Vec::new();
            for worker in &self.workers {
                let state = worker.admin.get("/admin/state").await.json;
                if state["blocks"]["in_use"] != 0 || state["leases"] != 0 || state["legs"] != 0 {
                    busy.push(state);
                }
            }
            let took = seam::now().since(began);
            if busy.is_empty() {
                return took;
            }
            assert!(took < Duration::from_secs(5), "still held after {took:?}: {busy:#?}");
            seam::sleep(Duration::from_millis(10)).await;
        }
    }

    /// `host:port` of a worker's gRPC services.
    pub fn grpc(&self, id: &str) -> String {
        self.worker(id).running.address.to_string()
    }

    /// Flips a byte of a worker's KV memory, behind everybody's back.
    pub fn spoil_kv(&self, id: &str, offset: usize) {
        let region = self.worker(id).running.kv_region().expect("the worker runs");
        // SAFETY: nothing here keeps a reference to these bytes; whoever races with this reads one value or the
        // other, and either is what the test is about.
        unsafe { region.slice_mut(offset, 1)[0] ^= 0x10 };
    }

    fn worker(&self, id: &str) -> &TestWorker {
        self.workers.iter().find(|worker| worker.id == id).expect("such a worker")
    }

    /// Workers added from now on have this fake engine.
    pub fn set_fake(&mut self, spec: &str) {
        self.spec.fake = Some(spec.parse().expect("a fake engine's spec"));
    }

    /// Ends a cluster with a worker whose step never ends: its requests are cut.
    pub async fn close_hung(self) {
        self.router_end.drain();
        self.router.join().await;
        for worker in &self.workers {
            worker.shutdown.drain();
            worker.shutdown.stop();
        }
        for worker in self.workers {
            worker.running.join().await;
        }
    }

    /// Ends it in order and waits.
    pub async fn close(self) {
        self.router_end.drain();
        self.router.join().await;
        for worker in self.workers {
            worker.shutdown.drain();
            worker.running.join().await;
        }
    }
}

async fn start_worker(spec: &Spec, id: &str, role: Role, membership: Arc<dyn Membership>) -> TestWorker {
    let shutdown = Shutdown::new();
    let threads = if role == Role::Prefill { spec.threads.0 } else { spec.threads.1 };
    let config = WorkerConfig {
        id: Some(id.to_owned()),
        role,
        port: 0,
        admin_port: 0,
        model: Some(spec.model.clone()),
        dtype: spec.dtype,
        threads: Some(threads),
        kv_memory: tandem_chassis::config::ByteSize(spec.kv_bytes),
        fake: spec.fake.clone(),
        transport: spec.transport.clone(),
        token_budget: spec.token_budget,
        ..WorkerConfig::defaults()
    };
    let running = tandem_worker::start(config, membership, shutdown.clone(), Arc::new(|_| {})).await;
    let running = running.unwrap_or_else(|error| panic!("{id} starts: {error}"));
    TestWorker { id: id.to_owned(), admin: Client::new(running.admin), shutdown, running }
}

/// How many workers take work.
pub fn ready(rows: &[Value]) -> usize {
    rows.iter().filter(|row| row["state"] == "ready").count()
}

/// Waits until `/admin/cluster`'s workers look as wanted.
///
/// # Panics
/// After thirty seconds.
pub async fn wait_for_workers(admin: &Client, what: &str, wanted: impl Fn(&[Value]) -> bool) {
    let began = seam::now();
    loop {
        let cluster = admin.get("/admin/cluster").await.json;
        let rows = cluster["workers"].as_array().cloned().unwrap_or_default();
        if wanted(&rows) {
            return;
        }
        assert!(seam::now().since(began) < Duration::from_secs(30), "waited for: {what}\n{cluster:#}");
        seam::sleep(Duration::from_millis(10)).await;
    }
}
