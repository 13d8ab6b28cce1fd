//! Who is in the cluster, in which role, and who leads: one trait over etcd, over memory, and over a parent
//! process.
//!
//! Never knows: load, requests, KV. Always holds: a lost store stops nothing (the last view stays, every
//! registration is made again when the store is back), a role changes only by an order in the store, and no
//! call waits without a deadline.

pub mod conformance;
mod embedded;
#[cfg(feature = "etcd")]
mod etcd;
mod keeper;
mod keys;
mod leader;
mod member;
mod served;
mod store;

use std::collections::BTreeMap;
use std::sync::Arc;

use async_trait::async_trait;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use tandem_types::{Epoch, Incarnation, KvForm, KvIdentity, Role, WorkerState};
use tokio::sync::watch;

pub use embedded::Embedded;
#[cfg(feature = "etcd")]
pub use etcd::Etcd;
pub use keeper::RegistrationGuard;
pub use leader::LeadershipGuard;
pub use served::{Served, serve};

/// What kind of process registers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// Runs a model.
    #[default]
    Worker,
    /// Takes requests.
    Router,
    /// Keeps blocks.
    Store,
}

/// How much a worker can hold.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Capacity {
    /// Blocks of its KV pool.
    pub blocks: u32,
    /// Tokens of a block.
    pub block_tokens: u32,
    /// Longest sequence.
    pub context_tokens: u32,
}

/// What a process says of itself; the JSON under its key. Fields that are missing are empty.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Registration {
    /// Its name.
    pub id: String,
    /// What it is.
    pub kind: Kind,
    /// Which start of it.
    pub incarnation: Incarnation,
    /// Role changes since then.
    pub epoch: Epoch,
    /// What it prefers to do; workers only.
    pub role: Option<Role>,
    /// `ready` or `draining`.
    pub state: WorkerState,
    /// `host:port` of its gRPC services, or of the API.
    pub address: String,
    /// `host:port` of its admin port.
    pub admin: String,
    /// The model's name in the API.
    pub model: String,
    /// What its KV is.
    pub identity: KvIdentity,
    /// How its KV is arranged.
    pub form: KvForm,
    /// How much it holds.
    pub capacity: Capacity,
    /// How its memory can be reached.
    pub transports: Vec<String>,
    /// Its version.
    pub version: String,
    /// The argument list that starts it again.
    pub command: Vec<String>,
    /// Its process id.
    pub pid: u32,
}

impl Default for Registration {
    fn default() -> Self {
        Registration {
            id: String::new(),
            kind: Kind::Worker,
            incarnation: Incarnation::default(),
            epoch: Epoch::default(),
            role: None,
            state: WorkerState::Ready,
            address: String::new(),
            admin: String::new(),
            model: String::new(),
            identity: KvIdentity::default(),
            form: KvForm::default(),
            capacity: Capacity::default(),
            transports: Vec::new(),
            version: String::new(),
            command: Vec::new(),
            pid: 0,
        }
    }
}

/// Who orders a role.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum By {
    /// The role planner.
    Planner,
    /// A person.
    Operator,
}

/// The only way a role changes.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RoleOrder {
    /// For this start of the worker.
    pub incarnation: Incarnation,
    /// In this epoch; stale otherwise.
    pub expected_epoch: Epoch,
    /// The role to take.
    pub role: Role,
    /// Who wants it.
    pub by: By,
    /// Until when nobody else should change it, in Unix milliseconds.
    pub until: Option<u64>,
}

/// The cluster as last seen.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct View {
    /// Workers by name.
    pub workers: BTreeMap<String, Registration>,
    /// Routers by name.
    pub routers: BTreeMap<String, Registration>,
    /// Stores by name.
    pub stores: BTreeMap<String, Registration>,
    /// Role orders by worker.
    pub roles: BTreeMap<String, RoleOrder>,
    /// Who plans roles.
    pub leader: Option<String>,
    /// Knobs that may change while running.
    pub config: Option<Value>,
    /// Of the store, rising.
    pub revision: u64,
    /// Whether the store is within reach now.
    pub connected: bool,
}

/// Why the cluster cannot be reached.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// Not in this build, or not at all.
    #[error("{0}")]
    Unsupported(String),
    /// The store does not answer.
    #[error("{store} cannot be reached: {reason}")]
    Unreachable {
        /// Which store.
        store: String,
        /// What happened.
        reason: String,
    },
}

/// Why a role cannot be ordered.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RoleError {
    /// No such worker.
    #[error("worker {0:?} is not registered")]
    Unknown(String),
    /// It has restarted or changed its role since.
    #[error("worker {worker:?} is incarnation {incarnation} in epoch {epoch} now; the order was for another")]
    Stale {
        /// The worker.
        worker: String,
        /// Which start it is.
        incarnation: Incarnation,
        /// Which epoch it is in.
        epoch: u64,
    },
    /// Somebody else changed it at the same moment.
    #[error("somebody else has just changed worker {0:?}; look again")]
    Conflict(String),
    /// The planner orders only while it leads.
    #[error("the planner that orders is not the leader")]
    NotLeader,
    /// The store does not answer.
    #[error(transparent)]
    Store(#[from] Error),
}

/// A member's connection to the cluster. Cheap to share.
#[async_trait]
pub trait Membership: Send + Sync + 'static {
    /// Registers, and keeps registered until the guard leaves or drops, through any loss of the store.
    /// Returns after the first success; an error if that does not come in time. Replaces an earlier start of
    /// the same name, and is replaced by a later one for good.
    async fn register(&self, registration: Registration) -> Result<RegistrationGuard, Error>;

    /// The cluster as last seen. Stays while the store is out of reach.
    fn watch(&self) -> watch::Receiver<Arc<View>>;

    /// Orders a worker to take a role, if it still is in the incarnation and epoch that the order expects, and,
    /// for an order of the planner, if this member leads: all in one transaction.
    async fn order_role(&self, worker: &str, order: RoleOrder) -> Result<(), RoleError>;

    /// Waits to become the leader, however long that takes and whatever becomes of the store meanwhile.
    /// Leadership ends with the guard, or when the store may have forgotten it.
    async fn campaign(&self, id: &str) -> LeadershipGuard;

    /// Changes the knobs that may change while running.
    async fn set_config(&self, config: Value) -> Result<(), Error>;
}

/// Which store to use.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Spec {
    /// An etcd endpoint.
    pub etcd: Option<String>,
    /// A parent process.
    pub parent: Option<String>,
}

/// Connects to the store that `spec` names; memory of this process alone if it names none.
pub async fn connect(spec: &Spec, cluster: &str) -> Result<Arc<dyn Membership>, Error> {
    if cluster.is_empty() || cluster.contains('/') {
        let sentence =
            format!("the cluster name {cluster:?} is not one: it has at least one letter and no slash");
        return Err(Error::Unsupported(sentence));
    }
    match (&spec.etcd, &spec.parent) {
        (Some(url), _) => connect_etcd(url, cluster).await,
        (None, Some(url)) => Ok(Arc::new(Served::connect(url, cluster)?)),
        (None, None) => Ok(Arc::new(Embedded::named(cluster))),
    }
}

#[cfg(feature = "etcd")]
async fn connect_etcd(url: &str, cluster: &str) -> Result<Arc<dyn Membership>, Error> {
    Ok(Arc::new(Etcd::connect(url, cluster).await?))
}

#[cfg(not(feature = "etcd"))]
async fn connect_etcd(_: &str, _: &str) -> Result<Arc<dyn Membership>, Error> {
    Err(Error::Unsupported(
        "this build has no etcd: `cargo xtask up` builds it in, or `cargo build --features etcd` with PROTOC set".into(),
    ))
}
