//! The one worker runtime: admission, step loop, lender and session service around an engine.
//!
//! Never knows: which service started it, HTTP dialects, tokenizers, routing. A role is a value here, not a
//! kind of worker. Always holds: the worker's memory is freed by the worker alone, when nothing refers to it
//! any more; every leg gets exactly one last word; nothing waits under the one lock.

mod admin;
mod config;
mod core;
mod faulty;
mod fetch;
mod lender;
mod metrics;
mod owners;
mod pages;
mod process;
mod pull;
mod roles;
mod session;
mod shared;
mod spans;
mod step_loop;

use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Weak};
use std::time::Duration;

use tandem_batching::Batcher;
use tandem_chassis::{Shutdown, Tasks, seam};
use tandem_cluster::{Capacity, Kind, Membership, Registration};
use tandem_engine::{Engine, LoadError, Options};
use tandem_kv_cache::KvCache;
use tandem_kv_transfer::Exported;
use tandem_proto::v1::lender_server::LenderServer;
use tandem_proto::v1::worker_server::WorkerServer;
use tandem_types::{BLOCK_TOKENS, Epoch, Incarnation, WorkerId, WorkerState};
use tokio::sync::Notify;
use tokio::task::JoinHandle;

pub use config::{Numerics, Switch, WorkerConfig};
pub use process::process_main;

/// What a worker's options are made of, for services that fill them in.
pub mod engine {
    pub use tandem_engine::fake::{CONTEXT_TOKENS as FAKE_CONTEXT_TOKENS, FakeSpec};
    pub use tandem_engine::{Dtype, Quantization};
}

use crate::core::{Constants, Core};
use crate::shared::Shared;

/// Largest message a session takes: prompts of millions of tokens fit.
const MESSAGE_BYTES_MAX: usize = 64 << 20;

/// Called with the loaded share of the model, 0 to 1, from a thread of its own.
pub type Progress = Arc<dyn Fn(f32) + Send + Sync>;

/// Why a worker cannot start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// An option that cannot be.
    #[error("{0}")]
    Config(String),
    /// The model cannot be served; the message names file and fact.
    #[error(transparent)]
    Load(#[from] LoadError),
    /// A port cannot be listened on.
    #[error("cannot listen on {address}: {source}")]
    Listen {
        /// Where.
        address: SocketAddr,
        /// What the system says.
        source: std::io::Error,
    },
    /// No transport could export the KV memory.
    #[error("cannot make the KV memory reachable: {0}")]
    Export(String),
    /// The cluster cannot be joined.
    #[error("cannot join the cluster: {0}")]
    Join(#[from] tandem_cluster::Error),
}

/// What names this worker to people.
pub(crate) struct Identity {
    pub(crate) model: String,
    pub(crate) version: String,
    pub(crate) command: Vec<String>,
    pub(crate) kernel: String,
    pub(crate) threads: usize,
}

/// A worker that has registered and takes work.
pub struct Running {
    /// Its name.
    pub id: String,
    /// Where its gRPC services listen.
    pub address: SocketAddr,
    /// Where its admin port listens.
    pub admin: SocketAddr,
    /// The numerics and instruction set it computes with.
    pub kernel: String,
    /// Threads that compute.
    pub threads: usize,
    kv: Weak<tandem_memory::Region>,
    done: tokio::task::JoinHandle<()>,
}

impl Running {
    /// Its KV memory, while it lives: to look at from outside.
    pub fn kv_region(&self) -> Option<Arc<tandem_memory::Region>> {
        self.kv.upgrade()
    }

    /// Returns when the worker has stopped and given everything back.
    pub async fn join(self) {
        if let Err(error) = self.done.await
            && error.is_panic()
        {
            std::panic::resume_unwind(error.into_panic());
        }
    }
}

/// Loads the model, listens, registers. Everything that can be wrong with options, files or ports is an
/// error here, before anybody hears of this worker.
///
/// `shutdown` drains it (no new work; it leaves when the rest is done or `drain_timeout` has passed) or stops
/// it.
pub async fn start(
    config: WorkerConfig,
    membership: Arc<dyn Membership>,
    shutdown: Shutdown,
    progress: Progress,
) -> Result<Running, StartError> {
    config.check().map_err(StartError::Config)?;
    let transports = config.transport_options().map_err(StartError::Config)?;
    // The admin port drains this worker alone; the process's own end comes from above.
    let process = shutdown;
    let shutdown = process.child();
    let threads = config.threads.unwrap_or_else(default_threads);
    let engine = load(&config, threads, progress).await?;
    let facts = engine.facts().clone();
    let id =
        config.id.clone().unwrap_or_else(|| format!("{}-{:04x}", config.role, seam::random_u64() as u16));
    let incarnation = Incarnation(seam::random_u64());

    let (grpc, address) = listen(config.bind, config.port).await?;
    let (admin_listener, admin) = listen(config.bind, config.admin_port).await?;
    let advertised = advertised_host(&config);
    let lender = format!("{advertised}:{}", address.port());

    // The gate needs the state, the state needs the exports: the exports come first, with a gate that is
    // filled before anybody can have a claim.
    let gate = Arc::new(lender::LateGate::default());
    let region = engine.kv_region();
    let kv = Arc::downgrade(&region);
    let exports = export(&config, &transports, region.clone(), gate.clone(), incarnation).await?;
    let model = config.model_name.clone().unwrap_or_else(|| facts.model.clone());
    let constants = Constants {
        id: WorkerId(id.clone()),
        incarnation,
        lender: lender.clone(),
        exports: exports.iter().map(|e| e.export().clone()).collect(),
        identity: facts.identity.clone(),
        form: facts.form.clone(),
        context_tokens: facts.context_tokens,
        groups: facts.kv.len() as u32,
        legs_max: config.legs_max,
        strict: config.numerics == Numerics::Strict,
    };
    let cache = KvCache::new(tandem_kv_cache::Config {
        pages: facts.pages,
        groups: facts.kv.len() as u32,
        leased_share: config.leased_share,
        lease_time_to_live: config.lease_time_to_live.0,
        prefix_cache: true,
    });
    let batcher = Batcher::new(tandem_batching::Config {
        token_budget: config.token_budget,
        rows_max: config.rows_max,
        depth: facts.depth,
        context_tokens: facts.context_tokens,
        ..tandem_batching::Config::default()
    });
    let core = Core::new(constants, config.role, cache, batcher, Box::new(seam::random_u128));
    let metrics = Arc::new(metrics::Metrics::new(&facts, &model));
    let pages = pages::PageMap::of(&*engine);
    let checksums = config.checksums == Switch::On;

    let stopped = Arc::new(AtomicBool::new(false));
    let (steps, shared, pull_commands) =
        start_step_loop(&id, core, metrics, engine, &config, stopped.clone(), shutdown.clone());
    gate.fill(lender::LeaseGate { shared: shared.clone(), pages: pages.clone() });

    let identity = Arc::new(Identity {
        model: model.clone(),
        version: env!("CARGO_PKG_VERSION").to_owned(),
        command: tandem_chassis::process_facts().command,
        kernel: facts.kernel.clone(),
        threads,
    });
    let tasks = Arc::new(Tasks::new());
    let ways = pull::Ways { transport: config.transport.clone(), options: transports };
    let pulls = pull::Pulls::new(shared.clone(), region.clone(), pages.clone(), ways, checksums);
    tasks.spawn(pulls.run(pull_commands, shutdown.clone()));
    let lender_service =
        lender::LenderService { shared: shared.clone(), tasks: tasks.clone(), region, pages };
    serve_grpc(grpc, &shared, &identity, &tasks, lender_service, &shutdown);
    let subject = Arc::new(admin::WorkerSubject {
        shared: shared.clone(),
        identity: identity.clone(),
        config: serde_json::to_value(&config).unwrap_or_default(),
        shutdown: shutdown.clone(),
    });
    tasks.spawn(tandem_chassis::admin::serve(
        admin_listener,
        tandem_chassis::admin::routes(subject),
        shutdown.clone(),
    ));

    let registration = Registration {
        id: id.clone(),
        kind: Kind::Worker,
        incarnation,
        epoch: Epoch(0),
        role: Some(config.role),
        state: WorkerState::Ready,
        address: lender,
        admin: format!("{advertised}:{}", admin.port()),
        model,
        identity: facts.identity.clone(),
        form: facts.form.clone(),
        capacity: Capacity {
            blocks: facts.pages,
            block_tokens: BLOCK_TOKENS,
            context_tokens: facts.context_tokens,
        },
        transports: exports.iter().map(|e| e.export().transport.clone()).collect(),
        version: identity.version.clone(),
        command: identity.command.clone(),
        pid: std::process::id(),
    };
    let guard = membership.register(registration.clone()).await?;
    let roles = seam::spawn(roles::run(shared.clone(), membership, guard, registration, shutdown.clone()));
    tracing::info!(id, %address, %admin, kernel = facts.kernel, threads, blocks = facts.pages, "worker is ready");

    let end = End {
        shared,
        process,
        shutdown,
        tasks,
        roles,
        exports,
        stopped,
        steps,
        drain_timeout: config.drain_timeout.0,
    };
    let done = seam::spawn(end.wait());
    Ok(Running { id, address, admin, kernel: facts.kernel, threads, kv, done })
}

/// All cores but one for the network; at least one.
fn default_threads() -> usize {
    let cores = std::thread::available_parallelism().map_or(1, |n| n.get());
    (cores - 1).max(1)
}

async fn load(
    config: &WorkerConfig,
    threads: usize,
    progress: Progress,
) -> Result<Box<dyn Engine>, StartError> {
    let dir = config.model.clone().ok_or_else(|| StartError::Config("--model DIR is needed".into()))?;
    let options = Options {
        dtype: config.dtype,
        quantization: config.quantization,
        threads,
        kv_bytes: config.kv_memory.0,
        depth: 0,
        progress,
        shared_memory: tandem_kv_transfer::allowed(&config.transport).any(|row| row.shared_memory),
    };
    let fake = config.fake.clone();
    let load = move || match fake {
        Some(spec) => tandem_engine::fake::fake(spec, &dir, options),
        None => tandem_engine::load(&dir, options),
    };
    if seam::simulated() {
        // Virtual time would not wait for a thread.
        return Ok(load()?);
    }
    let (send, loaded) = tokio::sync::oneshot::channel();
    seam::thread("load", move || {
        let _ = send.send(load());
    });
    Ok(loaded.await.map_err(|_| StartError::Config("loading the model panicked; see the log".into()))??)
}

async fn listen(bind: IpAddr, port: u16) -> Result<(seam::Listener, SocketAddr), StartError> {
    let address = SocketAddr::new(bind, port);
    let failed = |source| StartError::Listen { address, source };
    let listener = seam::listen(address).await.map_err(failed)?;
    let address = listener.local_addr().map_err(failed)?;
    Ok((listener, address))
}

/// The host that others use: an unspecified bind address is no address, so the loopback stands in for it
/// unless `--advertise` says better.
fn advertised_host(config: &WorkerConfig) -> String {
    config.advertise.clone().unwrap_or_else(|| match config.bind {
        ip if ip.is_unspecified() => "127.0.0.1".to_owned(),
        IpAddr::V6(ip) => format!("[{ip}]"),
        IpAddr::V4(ip) => ip.to_string(),
    })
}

async fn export(
    config: &WorkerConfig,
    options: &tandem_kv_transfer::Options,
    region: Arc<tandem_memory::Region>,
    gate: Arc<lender::LateGate>,
    incarnation: Incarnation,
) -> Result<Vec<Exported>, StartError> {
    let mut exports = Vec::new();
    for row in tandem_kv_transfer::allowed(&config.transport) {
        match (row.make)(options).export(region.clone(), gate.clone(), incarnation, config.bind).await {
            Ok(mut exported) => {
                exported.advertise(&advertised_host(config));
                exports.push(exported);
            }
            // What was asked for by its name is not left out.
            Err(error) if config.transport == row.name => return Err(StartError::Export(error.to_string())),
            Err(error) => tracing::warn!(%error, "the KV memory cannot be reached this way"),
        }
    }
    if exports.is_empty() {
        return Err(StartError::Export(format!("no transport works here for {:?}", config.transport)));
    }
    Ok(exports)
}

/// Who turns the step loop.
enum Driver {
    Thread(std::thread::JoinHandle<()>),
    /// In a simulated world.
    Task(JoinHandle<()>, Arc<Notify>),
}

impl Driver {
    /// Waits for the loop, which has been told to stop. An error is its panic.
    async fn join(self) -> std::thread::Result<()> {
        match self {
            Driver::Thread(thread) => {
                thread.thread().unpark();
                let joined = tokio::task::spawn_blocking(move || thread.join()).await;
                joined.expect("waiting for a thread does not panic")
            }
            Driver::Task(task, wake) => {
                wake.notify_one();
                task.await.map_err(|error| match error.try_into_panic() {
                    Ok(panic) => panic,
                    Err(cancelled) => Box::new(cancelled.to_string()),
                })
            }
        }
    }
}

/// Without its step loop a worker can neither finish nor free anything: with the loop it ends, loudly.
struct EndsWorker(Shutdown);

impl Drop for EndsWorker {
    fn drop(&mut self) {
        self.0.stop();
    }
}

type Started = (Driver, Arc<Shared>, tokio::sync::mpsc::UnboundedReceiver<shared::PullCommand>);

/// Starts the step loop; it is woken by everything that changes the state.
fn start_step_loop(
    id: &str,
    core: Core,
    metrics: Arc<metrics::Metrics>,
    engine: Box<dyn Engine>,
    config: &WorkerConfig,
    stopped: Arc<AtomicBool>,
    shutdown: Shutdown,
) -> Started {
    let refuses = config.fake.as_ref().map(shared::Refuses::new);
    let checksums = config.checksums == Switch::On;
    let ends = EndsWorker(shutdown);
    if seam::simulated() {
        let wake = Arc::new(Notify::new());
        let woken = wake.clone();
        let (shared, pulls) = Shared::new(core, metrics, refuses, Box::new(move || woken.notify_one()));
        let engine = Box::new(faulty::FaultyEngine::new(engine, id));
        let steps = step_loop::StepLoop::new(shared.clone(), engine, checksums);
        let woken = wake.clone();
        let task = seam::spawn(async move {
            let _ends = ends;
            step_loop::drive_in_virtual_time(steps, &stopped, &woken).await;
        });
        return (Driver::Task(task, wake), shared, pulls);
    }
    let (send, receive) = std::sync::mpsc::channel::<step_loop::StepLoop>();
    let thread = seam::thread(&format!("step-{id}"), move || {
        let _ends = ends;
        if let Ok(steps) = receive.recv() {
            step_loop::drive(steps, &stopped);
        }
    });
    let parked = thread.thread().clone();
    let (shared, pulls) = Shared::new(core, metrics, refuses, Box::new(move || parked.unpark()));
    let _ = send.send(step_loop::StepLoop::new(shared.clone(), engine, checksums));
    (Driver::Thread(thread), shared, pulls)
}

fn serve_grpc(
    listener: seam::Listener,
    shared: &Arc<Shared>,
    identity: &Arc<Identity>,
    tasks: &Arc<Tasks>,
    lender: lender::LenderService,
    shutdown: &Shutdown,
) {
    let drain = shutdown.clone();
    let sessions = session::SessionService {
        shared: shared.clone(),
        identity: identity.clone(),
        tasks: tasks.clone(),
        shutdown: drain,
    };
    let stop = shutdown.clone();
    let incoming = tandem_chassis::grpc::incoming(listener);
    let server = tonic::transport::Server::builder()
        .initial_stream_window_size(1 << 20)
        .initial_connection_window_size(4 << 20)
        .add_service(
            WorkerServer::new(sessions)
                .max_decoding_message_size(MESSAGE_BYTES_MAX)
                .max_encoding_message_size(MESSAGE_BYTES_MAX),
        )
        .add_service(LenderServer::new(lender))
        .serve_with_incoming_shutdown(incoming, async move { stop.stopped().await });
    tasks.spawn(async move {
        if let Err(error) = server.await {
            tracing::error!(%error, "the gRPC server ended");
        }
    });
}

/// What has to be ended, in order.
struct End {
    shared: Arc<Shared>,
    process: Shutdown,
    shutdown: Shutdown,
    tasks: Arc<Tasks>,
    roles: tokio::task::JoinHandle<()>,
    exports: Vec<Exported>,
    stopped: Arc<AtomicBool>,
    steps: Driver,
    drain_timeout: Duration,
}

impl End {
    /// Waits for the process's end, then for running work, then takes everything down.
    async fn wait(self) {
        tokio::select! {
            () = self.process.draining() => {}
            () = self.shutdown.stopped() => {}
        }
        tokio::select! {
            () = self.idle() => {}
            () = seam::sleep(self.drain_timeout) => tracing::warn!("requests were cut by the drain time-out"),
            () = self.shutdown.stopped() => {}
        }
        self.shutdown.stop();
        let _ = self.roles.await;
        self.shared.end_streams();
        self.tasks.shutdown(Duration::from_secs(2)).await;
        drop(self.exports);
        self.stopped.store(true, Ordering::Release);
        if let Err(panic) = self.steps.join().await {
            std::panic::resume_unwind(panic);
        }
    }

    /// Until no leg is left.
    async fn idle(&self) {
        let mut load = self.shared.watch_load();
        while self.shared.look(|core| core.leg_count()) > 0 {
            // A leg can leave without the load changing, so look again soon in any case.
            let _ = seam::timeout(Duration::from_millis(100), load.changed()).await;
        }
    }
}
