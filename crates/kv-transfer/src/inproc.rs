//! Between workers of one process: a copy from region to region.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, LazyLock, Mutex, Weak};

use async_trait::async_trait;
use tandem_chassis::fail::{self, Passage};
use tandem_chassis::seam;
use tandem_memory::Region;
use tandem_types::{Export, Incarnation, Time};

use crate::copying::Copying;
use crate::{Completion, Error, Exported, Gate, Peer, Pull, PullError, Transport, check};

pub(crate) const NAME: &str = "inproc";

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
        Ok(Exported::new(NAME, blob, None, Box::new(Serving(exporting))))
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
        Ok(Arc::new(InprocPeer { exporting: Arc::downgrade(&exporting), closed: AtomicBool::new(false) }))
    }
}

struct InprocPeer {
    /// Weak: a peer that somebody keeps must not keep its owner's memory.
    exporting: Weak<Exporting>,
    closed: AtomicBool,
}

impl InprocPeer {
    async fn copy(&self, pull: &Pull) -> Result<(u64, Vec<u64>), PullError> {
        let gone = || PullError::PeerGone("its export has ended".into());
        let exporting = self.exporting.upgrade().ok_or_else(gone)?;
        let may_go_on = || {
            if self.closed.load(Ordering::Acquire) || exporting.closed.load(Ordering::Acquire) {
                return Err(gone());
            }
            if seam::now() >= pull.deadline {
                return Err(PullError::Deadline);
            }
            Ok(())
        };
        let bytes = check(pull, exporting.region.len() as u64)?;
        may_go_on()?;
        let passage = fail::pass("pull.gate", "").await;
        if matches!(passage, Passage::Lost | Passage::Broken) {
            return Err(PullError::Denied);
        }
        let permit = exporting.gate.begin(pull.claim, &pull.remote).map_err(|_| PullError::Denied)?;
        if passage == Passage::Twice {
            drop(exporting.gate.begin(pull.claim, &pull.remote).map_err(|_| PullError::Denied)?);
        }
        let source = exporting.region.clone();
        // SAFETY: the ranges are inside the region, as checked. The permit keeps the owner from writing to the source
        // until it drops, after the copy; the caller of `pull` owns the destination until the completion.
        let mut copying = unsafe { Copying::new(pull, source.as_ptr(), source.clone()) };
        while copying.step() {
            // Others on this thread get their turn, and a dropped pull stops here.
            tokio::task::yield_now().await;
            may_go_on()?;
        }
        let sums = copying.into_sums();
        drop(permit);
        Ok((bytes, sums))
    }
}

#[async_trait]
impl Peer for InprocPeer {
    async fn pull(&self, pull: Pull) -> Completion {
        // A copy runs in this future only, so with its end nothing writes any more.
        Completion::stopped(self.copy(&pull).await)
    }

    fn close(&self) {
        self.closed.store(true, Ordering::Release);
    }
}
