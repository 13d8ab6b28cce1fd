//! Between workers of one process: a copy from region to region.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, LazyLock, Mutex, Weak};

use async_trait::async_trait;
use tandem_chassis::seam;
use tandem_memory::Region;
use tandem_types::{Export, Incarnation, Time};

use crate::{Buffers, Completion, Error, Exported, Gate, Peer, Pull, PullError, Transport, check};

pub(crate) const NAME: &str = "inproc";

/// Bytes copied between two looks at deadline and cancellation.
const SLICE_BYTES: usize = 1 << 20;

/// What is exported in this process, by a random id that no other process can guess or mean.
static EXPORTS: LazyLock<Mutex<HashMap<u128, Weak<Exporting>>>> = LazyLock::new(Mutex::default);

struct Exporting {
    id: u128,
    incarnation: Incarnation,
    region: Arc<Region>,
    gate: Arc<dyn Gate>,
    closed: AtomicBool,
}

/// The export: everything ends when this drops.
struct Serving(Arc<Exporting>);

impl Drop for Serving {
    fn drop(&mut self) {
        self.0.closed.store(true, Ordering::Release);
        EXPORTS.lock().expect("nothing panics under this lock").remove(&self.0.id);
    }
}

/// Copies within the process.
pub(crate) struct Inproc;

#[async_trait]
impl Transport for Inproc {
    fn name(&self) -> &'static str {
        NAME
    }

    async fn export(
        &self,
        region: Arc<Region>,
        gate: Arc<dyn Gate>,
        incarnation: Incarnation,
        _bind: IpAddr,
    ) -> Result<Exported, Error> {
        let id = seam::random_u128();
        let exporting = Arc::new(Exporting { id, incarnation, region, gate, closed: AtomicBool::new(false) });
        EXPORTS.lock().expect("nothing panics under this lock").insert(id, Arc::downgrade(&exporting));
        let mut blob = id.to_be_bytes().to_vec();
        blob.extend(incarnation.0.to_be_bytes());
        Ok(Exported::new(NAME, blob, Box::new(Serving(exporting))))
    }

    async fn connect(&self, export: &Export, _deadline: Time) -> Result<Arc<dyn Peer>, Error> {
        let malformed = || Error::Malformed { transport: NAME, reason: "it is not 24 bytes long".into() };
        let (id, incarnation) = export.blob.split_at_checked(16).ok_or_else(malformed)?;
        let id = u128::from_be_bytes(id.try_into().map_err(|_| malformed())?);
        let incarnation = u64::from_be_bytes(incarnation.try_into().map_err(|_| malformed())?);
        let found = EXPORTS.lock().expect("nothing panics under this lock").get(&id).and_then(Weak::upgrade);
        let exporting = found.ok_or_else(|| Error::Unreachable {
            transport: NAME,
            reason: "the owner is not in this process".into(),
        })?;
        if exporting.incarnation.0 != incarnation {
            return Err(Error::StaleIncarnation { transport: NAME });
        }
        Ok(Arc::new(InprocPeer { exporting, closed: AtomicBool::new(false) }))
    }
}

struct InprocPeer {
    exporting: Arc<Exporting>,
    closed: AtomicBool,
}

impl InprocPeer {
    fn is_closed(&self) -> bool {
        self.closed.load(Ordering::Acquire) || self.exporting.closed.load(Ordering::Acquire)
    }

    async fn copy(&self, pull: &Pull) -> Result<u64, PullError> {
        let gone = || PullError::PeerGone("its export has ended".into());
        let bytes = check(pull, self.exporting.region.len() as u64)?;
        if self.is_closed() {
            return Err(gone());
        }
        let permit = self.exporting.gate.begin(pull.claim, &pull.remote).map_err(|_| PullError::Denied)?;
        for (range, &local) in pull.remote.iter().zip(&pull.local_offsets) {
            let mut done = 0;
            while done < range.len as usize {
                if self.is_closed() {
                    return Err(gone());
                }
                if seam::now() >= pull.deadline {
                    return Err(PullError::Deadline);
                }
                let len = SLICE_BYTES.min(range.len as usize - done);
                // SAFETY: the permit keeps the owner from writing to these bytes until it drops.
                let from = unsafe { self.exporting.region.slice(range.offset as usize + done, len) };
                // SAFETY: the caller of `pull` owns these bytes until the completion.
                let to = unsafe { pull.local.slice_mut(local as usize + done, len) };
                to.copy_from_slice(from);
                done += len;
                // Others on this thread get their turn, and a dropped pull stops here.
                tokio::task::yield_now().await;
            }
        }
        drop(permit);
        Ok(bytes)
    }
}

#[async_trait]
impl Peer for InprocPeer {
    async fn pull(&self, pull: Pull) -> Completion {
        // A copy runs in this future only, so with its end nothing writes any more.
        Completion { bytes: self.copy(&pull).await, buffers: Buffers::Reusable }
    }

    fn close(&self) {
        self.closed.store(true, Ordering::Release);
    }
}
