//! What membership needs of a store: keys that vanish with their registration, transactions on revisions, and a
//! watch that begins with everything.

use std::time::Duration;

use async_trait::async_trait;
use tokio::sync::mpsc;

/// The store did not do what it was asked, in a sentence.
pub(crate) type StoreError = String;

/// A key must be at this revision; 0: must not exist.
#[derive(Clone, Debug)]
pub(crate) struct Condition {
    pub(crate) key: String,
    pub(crate) revision: u64,
}

/// Puts a value, or deletes the key.
#[derive(Clone, Debug)]
pub(crate) struct Change {
    pub(crate) key: String,
    pub(crate) value: Option<Vec<u8>>,
    /// The value vanishes with this registration; 0: it stays.
    pub(crate) registration: u64,
}

/// News of the watched keys.
#[derive(Clone, Debug, Default)]
pub(crate) struct News {
    /// Forget everything known before.
    pub(crate) snapshot: bool,
    pub(crate) revision: u64,
    /// Key, value or deletion, and the revision of the change.
    pub(crate) keys: Vec<(String, Option<Vec<u8>>, u64)>,
}

/// Three implementations: memory, a parent's memory over gRPC, etcd. Callers bring the deadlines.
///
/// A call that ends in an error, or is given up, may still take effect later; whoever calls must be right in
/// either case.
#[async_trait]
pub(crate) trait Store: Send + Sync + 'static {
    /// For error messages.
    fn name(&self) -> String;
    /// Opens a registration that ends unless renewed in time.
    async fn open(&self, time_to_live: Duration) -> Result<u64, StoreError>;
    /// False if it has ended.
    async fn renew(&self, registration: u64) -> Result<bool, StoreError>;
    /// Ends it, and the keys under it.
    async fn close(&self, registration: u64) -> Result<(), StoreError>;
    /// All changes at once, in the revision that is returned; or `None` and no change, if a condition does not
    /// hold.
    async fn transact(
        &self,
        conditions: Vec<Condition>,
        changes: Vec<Change>,
    ) -> Result<Option<u64>, StoreError>;
    /// A snapshot of the keys under `prefix`, then every change. The channel closes when the store is lost.
    async fn watch(&self, prefix: &str) -> Result<mpsc::Receiver<News>, StoreError>;
}
