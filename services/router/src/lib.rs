//! The router: an OpenAI-compatible endpoint that owns each request and places its work on workers.
//!
//! Never knows: what is in a KV page, how a model computes, which transport bytes take. Always holds: tokens
//! reach the client in order and once, and every request ends exactly once.
//!
//! A request's way: `api` (HTTP in, validated whole) and `text` (templated, tokenized) make a
//! [`GenerateRequest`]; `dispatch` places it over the sessions of `link`; `api` streams what comes back.

mod admin;
mod api;
mod breaker;
mod config;
mod dispatch;
mod link;
mod metrics;
mod planner;
mod prefixes;
mod process;
mod records;
mod request;
mod text;
mod workers;

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use tandem_chassis::{Shutdown, Tasks, seam};
use tandem_cluster::{Kind, Membership, Registration, RegistrationGuard};
use tandem_types::{Incarnation, WorkerState};

#[cfg(feature = "fuzz")]
pub use api::fuzz;
pub use config::{PlannerMode, RouterConfig};
pub use process::process_main;
pub use request::{DispatchError, GenerateEvent, GenerateRequest, Generation, Route};

/// Why a router cannot start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// An option that cannot be.
    #[error("{0}")]
    Config(String),
    /// Tokenizer, template or configuration of the model; names the file and the fact.
    #[error("{0}")]
    Model(String),
    /// A port cannot be listened on.
    #[error("cannot listen on {address}: {source}")]
    Listen {
        /// Where.
        address: SocketAddr,
        /// What the system says.
        source: std::io::Error,
    },
    /// The cluster cannot be joined.
    #[error("cannot join the cluster: {0}")]
    Join(#[from] tandem_cluster::Error),
}

/// A router that listens.
pub struct Running {
    /// Where the API listens.
    pub api: SocketAddr,
    /// Where the admin port listens.
    pub admin: SocketAddr,
    done: tokio::task::JoinHandle<()>,
}

impl Running {
    /// Returns when the router has drained or stopped.
    pub async fn join(self) {
        if let Err(error) = self.done.await
            && error.is_panic()
        {
            std::panic::resume_unwind(error.into_panic());
        }
    }
}

/// Reads the model's text side, listens and registers. `shutdown` drains it (no new requests; running ones
/// get `drain_timeout`) or stops it.
pub async fn start(
    config: RouterConfig,
    membership: Arc<dyn Membership>,
    shutdown: Shutdown,
) -> Result<Running, StartError> {
    config.check().map_err(StartError::Config)?;
    tandem_chassis::raise_open_files();
    let dir = config.model.clone().ok_or_else(|| StartError::Config("--model DIR is needed".into()))?;
    let model_name = config.model_name.clone().unwrap_or_else(|| {
        dir.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default()
    });
    let loaded = tokio::task::spawn_blocking({
        let context_tokens = config.context_tokens;
        let model_name = model_name.clone();
        move || text::Model::open(&dir, model_name, context_tokens)
    });
    let loaded = loaded.await.map_err(|error| StartError::Model(error.to_string()))?;
    let model = Arc::new(loaded.map_err(|error| StartError::Model(error.to_string()))?);

    let id = config.id.clone().unwrap_or_else(|| format!("router-{:04x}", seam::random_u64() as u16));
    let incarnation = Incarnation(seam::random_u64());
    let (api_listener, api) = listen(config.bind, config.port).await?;
    let (admin_listener, admin) = listen(config.bind, config.admin_port).await?;

    let metrics = Arc::new(metrics::Metrics::new(&model_name));
    let records = Arc::new(records::Records::default());
    let prefixes = Arc::new(prefixes::Prefixes::new(config.index_memory.0));
    let workers = workers::Workers::new(&id, incarnation, membership.clone(), prefixes, shutdown.clone());
    let policy = tandem_placement::named(&config.policy).map_err(StartError::Config)?;
    let dispatcher = dispatch::Dispatcher::new(
        workers.clone(),
        policy,
        metrics.clone(),
        records.clone(),
        config.queue_max,
        config.slo,
        shutdown.clone(),
    );
    let tasks = Tasks::new();
    tasks.spawn(workers.clone().run());
    let planned = Arc::new(planner::Shown::default());
    if config.planner != PlannerMode::Off {
        let planner = planner::RolePlanner {
            id: id.clone(),
            mode: config.planner,
            slo: config.slo,
            workers: workers.clone(),
            membership: membership.clone(),
            metrics: metrics.clone(),
            shutdown: shutdown.clone(),
            shown: planned.clone(),
        };
        tasks.spawn(planner.run());
    }
    // Requests finish while draining, so the API's own end comes after them.
    let api_end = Shutdown::new();
    let options = api::Options {
        request_deadline: config.request_deadline.0,
        body_bytes_max: config.body_max.0 as usize,
    };
    let routes = api::routes(model, dispatcher.clone(), options);
    let limits = tandem_chassis::http::Limits::default();
    tasks.spawn(tandem_chassis::http::serve(api_listener, routes, limits, api_end.clone()));
    let subject = Arc::new(admin::RouterSubject {
        id: id.clone(),
        model: model_name.clone(),
        incarnation,
        config: serde_json::to_value(&config).unwrap_or_default(),
        command: tandem_chassis::process_facts().command,
        workers,
        dispatcher: dispatcher.clone(),
        records,
        metrics,
        planned,
        shutdown: shutdown.clone(),
    });
    let admin_routes = tandem_chassis::admin::routes(subject.clone()).merge(admin::routes(subject));
    tasks.spawn(tandem_chassis::admin::serve(admin_listener, admin_routes, shutdown.clone()));

    let advertised = advertised_host(&config);
    let registration = Registration {
        id,
        kind: Kind::Router,
        incarnation,
        state: WorkerState::Ready,
        address: format!("{advertised}:{}", api.port()),
        admin: format!("{advertised}:{}", admin.port()),
        model: model_name,
        version: env!("CARGO_PKG_VERSION").to_owned(),
        command: tandem_chassis::process_facts().command,
        pid: std::process::id(),
        ..Registration::default()
    };
    let guard = membership.register(registration).await?;
    tracing::info!(%api, %admin, "router is ready");
    let end = End { shutdown, api_end, dispatcher, tasks, guard, drain_timeout: config.drain_timeout.0 };
    Ok(Running { api, admin, done: seam::spawn(end.wait()) })
}

async fn listen(bind: IpAddr, port: u16) -> Result<(seam::Listener, SocketAddr), StartError> {
    let address = SocketAddr::new(bind, port);
    let failed = |source| StartError::Listen { address, source };
    let listener = seam::listen(address).await.map_err(failed)?;
    let address = listener.local_addr().map_err(failed)?;
    Ok((listener, address))
}

fn advertised_host(config: &RouterConfig) -> String {
    config.advertise.clone().unwrap_or_else(|| match config.bind {
        ip if ip.is_unspecified() => "127.0.0.1".to_owned(),
        IpAddr::V6(ip) => format!("[{ip}]"),
        IpAddr::V4(ip) => ip.to_string(),
    })
}

/// What has to be ended, in order.
struct End {
    shutdown: Shutdown,
    api_end: Shutdown,
    dispatcher: Arc<dispatch::Dispatcher>,
    tasks: Tasks,
    guard: RegistrationGuard,
    drain_timeout: Duration,
}

impl End {
    async fn wait(self) {
        self.shutdown.draining().await;
        // Nobody should find this router any more; running requests get their time.
        self.guard.leave().await;
        tokio::select! {
            () = self.dispatcher.finish(self.drain_timeout) => {}
            () = self.shutdown.stopped() => {}
        }
        self.api_end.drain();
        self.api_end.stop();
        self.shutdown.stop();
        self.tasks.shutdown(Duration::from_secs(2)).await;
    }
}
