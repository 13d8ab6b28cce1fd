//! The suite lets a backend write on after its answer if it says so, and notices one that does not say so.

use std::net::IpAddr;
use std::sync::{Arc, Mutex};

use async_trait::async_trait;
use tandem_kv_transfer::{
    Buffers, Completion, Error, Exported, Gate, Options, Peer, Pull, PullError, Row, TRANSPORTS, Transport,
    conformance,
};
use tandem_memory::Region;
use tandem_types::{Export, Incarnation, Time};

/// `tcp`, but a long pull whose peer has gone writes once more: before its quarantine ends, or, if it is not honest, when the
/// next pull begins.
struct Late {
    inner: Arc<dyn Transport>,
    honest: bool,
}

struct LatePeer {
    inner: Arc<dyn Peer>,
    honest: bool,
    /// Failed pulls that have still to write.
    late: Mutex<Vec<Pull>>,
}

fn late(honest: bool) -> Arc<dyn Transport> {
    let tcp = TRANSPORTS.iter().find(|row| row.name == "tcp").expect("a row");
    Arc::new(Late { inner: (tcp.make)(&Options::default()), honest })
}

#[async_trait]
impl Transport for Late {
    fn name(&self) -> &'static str {
        "tcp"
    }

    async fn export(
        &self,
        region: Arc<Region>,
        gate: Arc<dyn Gate>,
        incarnation: Incarnation,
        bind: IpAddr,
    ) -> Result<Exported, Error> {
        self.inner.export(region, gate, incarnation, bind).await
    }

    async fn connect(&self, export: &Export, deadline: Time) -> Result<Arc<dyn Peer>, Error> {
        let inner = self.inner.connect(export, deadline).await?;
        Ok(Arc::new(LatePeer { inner, honest: self.honest, late: Mutex::default() }))
    }
}

fn write(pull: &Pull) {
    if let (Some(range), Some(&place)) = (pull.remote.first(), pull.local_offsets.first())
        && range.len > 0
    {
        // SAFETY: deliberately the mistake, where it is one; the tests run on one thread.
        let byte = unsafe { pull.local.slice_mut(place as usize, 1) };
        byte[0] = 0x99;
    }
}

#[async_trait]
impl Peer for LatePeer {
    async fn pull(&self, pull: Pull) -> Completion {
        self.late.lock().expect("unpoisoned").drain(..).for_each(|pull| write(&pull));
        let done = self.inner.pull(pull.clone()).await;
        let began = matches!(done.bytes, Err(PullError::PeerGone(_)))
            && pull.remote.iter().any(|range| range.len > 1 << 20);
        if !began {
            return done;
        }
        if self.honest {
            let quarantine = Buffers::Quarantined(Box::pin(async move { write(&pull) }));
            return Completion { buffers: quarantine, ..done };
        }
        self.late.lock().expect("unpoisoned").push(pull);
        done
    }

    fn close(&self) {
        self.inner.close();
    }
}

static HONEST: Row = Row { name: "late", make: |_| late(true), shared_memory: false, not_applicable: &[] };
static DISHONEST: Row =
    Row { name: "late", make: |_| late(false), shared_memory: false, not_applicable: &[] };

#[tokio::test]
async fn a_backend_that_quarantines_what_it_still_writes_to_passes() {
    conformance::run(&HONEST, &Options::default()).await;
}

#[tokio::test]
#[should_panic(expected = "a late write")]
async fn a_backend_that_writes_to_what_it_has_let_go_of_does_not_pass() {
    conformance::run(&DISHONEST, &Options::default()).await;
}
