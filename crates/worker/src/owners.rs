//! Connections to the workers that this one pulls from: kept for the next pull, and let go when their owner is gone.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard};

use tandem_chassis::{Tasks, grpc, seam};
use tandem_kv_transfer::Peer;
use tandem_proto::v1::lender_client::LenderClient;
use tandem_types::{Incarnation, WorkerId};
use tonic::transport::Channel;

use crate::core::{PullFailure, PullSource};
use crate::pull::CALL_MAX;

/// Owners whose connections are kept.
const OWNERS_MAX: usize = 256;

/// Who has the bytes.
pub(crate) struct Source {
    pub(crate) worker: WorkerId,
    incarnation: Incarnation,
    lender: String,
}

/// One start of a worker.
type Key = (WorkerId, Incarnation);

/// A way to an owner's memory, with its transport's name.
pub(crate) type Memory = (&'static str, Arc<dyn Peer>);

/// All connections to owners.
#[derive(Clone, Default)]
pub(crate) struct Owners(Arc<Mutex<HashMap<Key, Owner>>>);

/// Connections to one start of an owner: to its Lender service, and, once it is needed, to its memory.
struct Owner {
    lender: LenderClient<Channel>,
    memory: Option<Memory>,
    /// Waits for the end of the connection to the Lender service, which every owner has, whatever the transport.
    _watch: Tasks,
}

impl Source {
    pub(crate) fn of(source: &PullSource) -> Source {
        let (worker, incarnation, lender) = match source {
            PullSource::Handle(handle) => (&handle.owner, handle.incarnation, &handle.lender),
            PullSource::Holder { holder, .. } => (&holder.worker, holder.incarnation, &holder.lender),
        };
        Source { worker: worker.clone(), incarnation, lender: lender.clone() }
    }

    fn key(&self) -> Key {
        (self.worker.clone(), self.incarnation)
    }
}

impl Owners {
    /// The owner's Lender service.
    pub(crate) async fn lender(&self, source: &Source) -> Result<LenderClient<Channel>, PullFailure> {
        let known = self.known().get(&source.key()).map(|owner| owner.lender.clone());
        if let Some(lender) = known {
            return Ok(lender);
        }
        let unreachable = |why: String| PullFailure::Unreachable(format!("{}: {why}", source.worker));
        let (channel, ended) = seam::timeout(CALL_MAX, grpc::connect_watched(&source.lender))
            .await
            .map_err(|_| unreachable(format!("{} does not answer", source.lender)))?
            .map_err(|e| unreachable(format!("{}: {e}", source.lender)))?;
        let lender = LenderClient::new(channel);
        let mut known = self.known();
        if known.len() >= OWNERS_MAX {
            known.clear();
        }
        // An earlier start of the same worker is gone for good.
        known.retain(|(worker, incarnation), _| {
            *worker != source.worker || *incarnation == source.incarnation
        });
        let watch = self.forget_after(source.key(), ended);
        known.insert(source.key(), Owner { lender: lender.clone(), memory: None, _watch: watch });
        Ok(lender)
    }

    /// A worker that has died may never be pulled from again, and then nothing else would close what is left of
    /// the connections to it.
    fn forget_after(&self, key: Key, ended: impl Future<Output = ()> + Send + 'static) -> Tasks {
        let known = Arc::downgrade(&self.0);
        let watch = Tasks::new();
        watch.spawn(async move {
            ended.await;
            if let Some(known) = known.upgrade() {
                Owners(known).known().remove(&key);
            }
        });
        watch
    }

    /// The way to the owner's memory, if it has been found.
    pub(crate) fn memory(&self, source: &Source) -> Option<Memory> {
        self.known().get(&source.key())?.memory.clone()
    }

    /// Keeps it for the next pull.
    pub(crate) fn keep_memory(&self, source: &Source, memory: &Memory) {
        if let Some(owner) = self.known().get_mut(&source.key()) {
            owner.memory = Some(memory.clone());
        }
    }

    /// The next pull from it begins with new connections.
    pub(crate) fn forget(&self, source: &Source) {
        self.known().remove(&source.key());
    }

    fn known(&self) -> MutexGuard<'_, HashMap<Key, Owner>> {
        self.0.lock().expect("nothing panics under this lock")
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use tokio::io::AsyncReadExt;

    use super::*;

    #[tokio::test]
    async fn connections_to_an_owner_that_dies_are_let_go() {
        let listener = seam::listen("127.0.0.1:0").await.unwrap();
        let lender = listener.local_addr().unwrap().to_string();
        let (die, dies) = tokio::sync::oneshot::channel::<()>();
        let owner = seam::spawn(async move {
            let mut connection = listener.accept().await.unwrap();
            let mut hello = [0; 24];
            connection.read_exact(&mut hello).await.unwrap();
            dies.await.unwrap();
        });
        let source = Source { worker: WorkerId("prefill-0".into()), incarnation: Incarnation(1), lender };
        let owners = Owners::default();
        owners.lender(&source).await.unwrap();
        seam::sleep(Duration::from_millis(20)).await;
        assert_eq!(owners.known().len(), 1);

        die.send(()).unwrap();
        owner.await.unwrap();
        let let_go = async {
            while !owners.known().is_empty() {
                seam::sleep(Duration::from_millis(5)).await;
            }
        };
        seam::timeout(Duration::from_secs(5), let_go).await.expect("it is let go");
    }
}
