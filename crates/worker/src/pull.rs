//! All pulls of a worker: whom they reach and how, how they are stopped, and that each reports its end once.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use tandem_batching::SequenceId;
use tandem_chassis::{Shutdown, seam};
use tandem_kv_transfer::{Buffers, connect_best};
use tandem_memory::Region;
use tandem_proto::v1;
use tandem_proto::v1::lender_client::LenderClient;
use tandem_proto::{PROTOCOL_MAX, PROTOCOL_MIN, convert};
use tandem_types::{BlockHash, Handle, PageRef, Time};
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinSet;
use tonic::transport::Channel;

use crate::core::{Holder, PullFailure, PullOrder, PullSource};
use crate::fetch::{Fetching, Taken};
use crate::owners::{Memory, Owners, Source};
use crate::pages::PageMap;
use crate::shared::{PullCommand, Shared};

/// Time for a connection to an owner, or for its answer to a question.
pub(crate) const CALL_MAX: Duration = Duration::from_secs(2);

/// Owns every pull of this worker.
pub(crate) struct Pulls {
    context: Arc<Context>,
}

pub(crate) struct Context {
    pub(crate) shared: Arc<Shared>,
    pub(crate) region: Arc<Region>,
    pub(crate) pages: PageMap,
    /// Whether bytes are checked against the owner's checksums.
    pub(crate) checksums: bool,
    ways: Ways,
    owners: Owners,
}

/// How owners may be reached: `auto` or one transport's name, and what transports are made with.
pub(crate) struct Ways {
    pub(crate) transport: String,
    pub(crate) options: tandem_kv_transfer::Options,
}

impl Pulls {
    pub(crate) fn new(
        shared: Arc<Shared>,
        region: Arc<Region>,
        pages: PageMap,
        ways: Ways,
        checksums: bool,
    ) -> Pulls {
        let owners = Owners::default();
        Pulls { context: Arc::new(Context { shared, region, pages, checksums, ways, owners }) }
    }

    /// Runs until `shutdown` stops; then every pull is dropped, and with it everything that could write.
    pub(crate) async fn run(self, mut commands: mpsc::UnboundedReceiver<PullCommand>, shutdown: Shutdown) {
        let mut running: JoinSet<SequenceId> = JoinSet::new();
        let mut stops: HashMap<SequenceId, oneshot::Sender<()>> = HashMap::new();
        loop {
            tokio::select! {
                command = commands.recv() => match command {
                    Some(PullCommand::Start(order)) => {
                        let (stop, stopped) = oneshot::channel();
                        stops.insert(order.sequence, stop);
                        running.spawn(self.context.clone().pull(order, stopped));
                    }
                    Some(PullCommand::Stop(sequence)) => {
                        // Dropping the sender stops it; it reports by itself.
                        stops.remove(&sequence);
                    }
                    None => return,
                },
                Some(ended) = running.join_next(), if !running.is_empty() => {
                    if let Ok(sequence) = ended {
                        stops.remove(&sequence);
                    }
                }
                () = shutdown.stopped() => return,
            }
        }
    }
}

/// Reports the end of a pull exactly once, also if its task panics or is dropped.
struct Report {
    shared: Arc<Shared>,
    sequence: SequenceId,
    done: bool,
}

impl Report {
    fn delivered(mut self, taken: Taken) {
        self.done = true;
        let sequence = self.sequence;
        self.shared.change(|core, now| {
            core.note_transfer(sequence, taken.transfer);
            core.pull_done(sequence, taken.tokens, taken.bundle, taken.sums, now);
        });
    }

    fn failed(&mut self, failure: PullFailure) {
        if !std::mem::replace(&mut self.done, true) {
            let sequence = self.sequence;
            self.shared.change(|core, now| core.pull_failed(sequence, failure, now));
        }
    }
}

impl Drop for Report {
    fn drop(&mut self) {
        self.failed(PullFailure::Transfer("the pull was broken off".into()));
    }
}

impl Context {
    /// One pull, whole. When this returns or is dropped, nothing writes to its pages any more.
    async fn pull(self: Arc<Self>, order: Box<PullOrder>, stopped: oneshot::Receiver<()>) -> SequenceId {
        let sequence = order.sequence;
        let mut report = Report { shared: self.shared.clone(), sequence, done: false };
        let outcome = tokio::select! {
            biased;
            outcome = self.bring(&order) => outcome,
            _ = stopped => Err(PullFailure::Transfer("cancelled".into())),
        };
        match outcome {
            Ok(taken) => {
                let metrics = &self.shared.metrics;
                let moved = taken.transfer;
                metrics.observe_transfer(taken.transport, moved.bytes, moved.busy);
                match order.source {
                    PullSource::Handle(_) => {
                        metrics.observe_exposed(taken.transport, moved.exposed_bytes, moved.exposed);
                    }
                    PullSource::Holder { .. } => metrics.observe_borrowed(taken.tokens),
                }
                report.delivered(taken);
            }
            Err(failure) => {
                self.shared.metrics.observe_transfer_failure(failure.word());
                let source = Source::of(&order.source);
                tracing::debug!(request = order.request_name, owner = %source.worker, ?failure, "no hand-off");
                report.failed(failure);
            }
        }
        sequence
    }

    async fn bring(&self, order: &PullOrder) -> Result<Taken, PullFailure> {
        let source = Source::of(&order.source);
        let result = async {
            let channel = self.owners.lender(&source).await?;
            let handle = match &order.source {
                PullSource::Handle(handle) => handle.clone(),
                PullSource::Holder { holder, hashes } => {
                    self.borrow(channel.clone(), holder, hashes, order.deadline).await?
                }
            };
            self.check_compatible(&handle)?;
            let (transport, peer) = self.connect(&source, &handle).await?;
            Fetching::begin(self, order, &handle, channel, transport, peer).await?.run().await
        };
        let result = result.await;
        if !matches!(result, Ok(_) | Err(PullFailure::Done | PullFailure::Superseded)) {
            // Whatever is wrong with the connection, the next pull begins with a new one.
            self.owners.forget(&source);
        }
        result
    }

    /// Asks a holder for blocks: a handle to what it has of them.
    async fn borrow(
        &self,
        mut lender: LenderClient<Channel>,
        holder: &Holder,
        hashes: &[BlockHash],
        deadline: Time,
    ) -> Result<Handle, PullFailure> {
        let constants = self.shared.look(|core| core.constants().clone());
        let request = v1::LendRequest {
            incarnation: holder.incarnation.0,
            borrower: constants.id.0.clone(),
            identity: Some((&constants.identity).into()),
            hashes: hashes.iter().map(|hash| convert::id128(hash.0)).collect(),
            remaining_ms: deadline.remaining(seam::now()).as_millis().min(u128::from(u32::MAX)) as u32,
            protocol_min: PROTOCOL_MIN,
            protocol_max: PROTOCOL_MAX,
        };
        let unreachable = |why: &str| PullFailure::Unreachable(format!("{}: {why}", holder.worker));
        let reply = seam::timeout(CALL_MAX, lender.lend(request)).await;
        let reply = reply
            .map_err(|_| unreachable("no answer to the question for a prefix"))?
            .map_err(|status| unreachable(status.message()))?
            .into_inner();
        let handle = reply.handle.ok_or_else(|| PullFailure::Lost("the holder has nothing of it".into()))?;
        Handle::try_from(&handle).map_err(|error| PullFailure::Incompatible(error.to_string()))
    }

    /// Equal identities, equal forms: a raw copy. Anything else is refused in a sentence before a byte moves.
    fn check_compatible(&self, handle: &Handle) -> Result<(), PullFailure> {
        let constants = self.shared.look(|core| core.constants().clone());
        if handle.identity != constants.identity {
            return Err(PullFailure::Incompatible(format!(
                "{} has KV of {}/{}, this worker computes {}/{}",
                handle.owner,
                handle.identity.digest,
                handle.identity.numerics,
                constants.identity.digest,
                constants.identity.numerics
            )));
        }
        if handle.form != constants.form {
            return Err(PullFailure::Incompatible(format!(
                "{} arranges KV as {:?}, this worker as {:?}; conversion is not in this version",
                handle.owner, handle.form, constants.form
            )));
        }
        Ok(())
    }

    /// The best way to the owner's memory, kept likewise.
    async fn connect(&self, source: &Source, handle: &Handle) -> Result<Memory, PullFailure> {
        if let Some(memory) = self.owners.memory(source) {
            return Ok(memory);
        }
        let connected =
            connect_best(&handle.exports, &self.ways.transport, &self.ways.options, seam::now() + CALL_MAX)
                .await;
        let memory = connected.map_err(|e| PullFailure::Unreachable(format!("{}: {e}", source.worker)))?;
        self.shared.metrics.observe_connection(memory.0);
        self.owners.keep_memory(source, &memory);
        Ok(memory)
    }

    /// Pages that a backend may still write to stay in use until it has let go of them.
    pub(crate) fn quarantine(&self, order: &PullOrder, buffers: Buffers) {
        let Buffers::Quarantined(released) = buffers else { return };
        let pages: Vec<(u32, PageRef)> = order
            .local
            .iter()
            .enumerate()
            .flat_map(|(group, pages)| pages.iter().map(move |&page| (group as u32, page)))
            .collect();
        let bytes: u64 = pages.iter().map(|(group, page)| self.pages.place(*group, page.page).len).sum();
        let bytes = i64::try_from(bytes).unwrap_or(i64::MAX);
        self.shared.metrics.observe_quarantined(bytes);
        let hold = self.shared.change(|core, _| core.kv().hold(pages.into_iter()));
        let shared = self.shared.clone();
        // Owned by nobody on purpose: it ends with the backend's endpoint, which outlives this worker's tasks.
        seam::spawn(async move {
            released.await;
            shared.change(|core, _| core.kv().release(hold));
            shared.metrics.observe_quarantined(-bytes);
        });
    }
}
