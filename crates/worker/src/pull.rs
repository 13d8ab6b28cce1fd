//! Carries out pulls: follows the owner, moves bytes, asks for the verdict. What to do next is `Puller`'s to say.

use std::collections::HashMap;
use std::future::Future;
use std::ops::Range;
use std::pin::Pin;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use tandem_batching::SequenceId;
use tandem_chassis::{Shutdown, seam};
use tandem_kv_cache::{FirstTokenBundle, GiveUp, PullAction, PullEvent, Puller, Verdict};
use tandem_kv_transfer::{Buffers, Completion, Peer, Pull, connect_best};
use tandem_memory::Region;
use tandem_proto::v1::lender_client::LenderClient;
use tandem_proto::v1::{self, follow_event, follow_request};
use tandem_proto::{PROTOCOL_MAX, PROTOCOL_MIN, convert};
use tandem_types::{ClaimId, Handle, Incarnation, PageRef, Time, WorkerId};
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinSet;
use tonic::transport::{Channel, Endpoint};

use crate::core::{PullFailure, PullOrder};
use crate::lender::{FOLLOW_BEAT, FOLLOW_SILENCE_MAX};
use crate::pages::PageMap;
use crate::shared::{PullCommand, Shared};

/// Time for a connection to an owner, or for its answer to a question.
const CALL_MAX: Duration = Duration::from_secs(2);
/// Owners whose connections are kept.
const OWNERS_MAX: usize = 256;

/// Owns every pull of this worker.
pub(crate) struct Pulls {
    context: Arc<Context>,
}

struct Context {
    shared: Arc<Shared>,
    region: Arc<Region>,
    pages: PageMap,
    transport: String,
    owners: Mutex<HashMap<(WorkerId, Incarnation), Owner>>,
}

/// Connections to one start of an owner.
#[derive(Clone)]
struct Owner {
    lender: LenderClient<Channel>,
    transport: &'static str,
    peer: Arc<dyn Peer>,
}

impl Pulls {
    pub(crate) fn new(shared: Arc<Shared>, region: Arc<Region>, pages: PageMap, transport: String) -> Pulls {
        Pulls { context: Arc::new(Context { shared, region, pages, transport, owners: Mutex::default() }) }
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
    fn delivered(mut self, tokens: u32, bundle: FirstTokenBundle) {
        self.done = true;
        let sequence = self.sequence;
        self.shared.change(|core, now| core.pull_done(sequence, tokens, bundle, now));
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
        let began = seam::now();
        let outcome = tokio::select! {
            biased;
            outcome = self.take_over(&order) => outcome,
            _ = stopped => Err(PullFailure::Transfer("cancelled".into())),
        };
        match outcome {
            Ok(Taken { tokens, bundle, transport, bytes }) => {
                self.shared.metrics.observe_transfer(transport, bytes, seam::now().since(began));
                report.delivered(tokens, bundle);
            }
            Err(failure) => {
                self.shared.metrics.observe_transfer_failure(failure.word());
                tracing::debug!(request = order.request_name, owner = %order.handle.owner, ?failure, "no hand-off");
                report.failed(failure);
            }
        }
        sequence
    }

    async fn take_over(&self, order: &PullOrder) -> Result<Taken, PullFailure> {
        self.check_compatible(&order.handle)?;
        let owner = self.reach(&order.handle).await?;
        let result = self.follow(order, &owner).await;
        if !matches!(result, Ok(_) | Err(PullFailure::Done | PullFailure::Superseded)) {
            // Whatever is wrong with the connection, the next pull begins with a new one.
            self.forget(&order.handle);
        }
        result
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

    /// Connections to the owner, kept for the next pull from it.
    async fn reach(&self, handle: &Handle) -> Result<Owner, PullFailure> {
        let key = (handle.owner.clone(), handle.incarnation);
        let unreachable = |why: String| PullFailure::Unreachable(format!("{}: {why}", handle.owner));
        if let Some(owner) = self.owners.lock().expect("nothing panics under this lock").get(&key) {
            return Ok(owner.clone());
        }
        let endpoint = Endpoint::from_shared(format!("http://{}", handle.lender))
            .map_err(|e| unreachable(e.to_string()))?
            .connect_timeout(CALL_MAX)
            .tcp_nodelay(true);
        let channel = endpoint.connect().await.map_err(|e| unreachable(format!("{}: {e}", handle.lender)))?;
        let deadline = seam::now() + CALL_MAX;
        let connected = connect_best(&handle.exports, &self.transport, deadline).await;
        let (transport, peer) = connected.map_err(|e| unreachable(e.to_string()))?;
        let owner = Owner { lender: LenderClient::new(channel), transport, peer };
        let mut owners = self.owners.lock().expect("nothing panics under this lock");
        if owners.len() >= OWNERS_MAX {
            owners.clear();
        }
        // An earlier start of the same worker is gone for good.
        owners.retain(|(worker, incarnation), _| *worker != key.0 || *incarnation == key.1);
        owners.insert(key, owner.clone());
        Ok(owner)
    }

    fn forget(&self, handle: &Handle) {
        let key = (handle.owner.clone(), handle.incarnation);
        self.owners.lock().expect("nothing panics under this lock").remove(&key);
    }

    async fn follow(&self, order: &PullOrder, owner: &Owner) -> Result<Taken, PullFailure> {
        let blocks = order.handle.groups.first().map_or(0, |group| group.pages.len() as u32);
        let even = order.handle.groups.iter().all(|group| group.pages.len() as u32 == blocks);
        if blocks == 0 || !even || order.handle.groups.len() != order.local.len() {
            return Err(PullFailure::Incompatible("the handle's groups are not this worker's".into()));
        }
        let mut puller = Puller::new(order.local.len() as u32, blocks, order.skip_blocks);
        let mut events = Follow::open(owner.lender.clone(), order).await?;
        let mut pulls: FuturesUnordered<PullFuture<'_>> = FuturesUnordered::new();
        let mut verdict: Option<VerdictFuture> = None;
        let mut bytes = 0;
        loop {
            while let Some(action) = puller.next_action() {
                match action {
                    PullAction::Pull { id, claim, blocks } => {
                        pulls.push(Box::pin(self.pull_blocks(order, owner, id, claim, blocks)));
                    }
                    PullAction::AskVerdict(claim) => {
                        verdict = Some(Box::pin(ask(owner.lender.clone(), order, claim)))
                    }
                    PullAction::Deliver { tokens, bundle } => {
                        return Ok(Taken { tokens, bundle, transport: owner.transport, bytes });
                    }
                    PullAction::GiveUp(why) => return Err(why.into()),
                }
            }
            let event = tokio::select! {
                biased;
                Some((id, completion)) = pulls.next(), if !pulls.is_empty() => {
                    let Completion { bytes: arrived, buffers } = completion;
                    self.quarantine(order, buffers);
                    match arrived {
                        Ok(arrived) => {
                            bytes += arrived;
                            PullEvent::Arrived(id)
                        }
                        Err(error) => PullEvent::Broken(id, error.to_string()),
                    }
                }
                answer = of(&mut verdict) => {
                    verdict = None;
                    answer
                }
                event = events.next() => event,
                () = seam::sleep_until(order.deadline) => PullEvent::Deadline,
            };
            puller.on(event);
        }
    }

    async fn pull_blocks(
        &self,
        order: &PullOrder,
        owner: &Owner,
        id: u64,
        claim: ClaimId,
        blocks: Range<u32>,
    ) -> (u64, Completion) {
        let mut remote = Vec::new();
        let mut local_offsets = Vec::new();
        for (group, (theirs, ours)) in order.handle.groups.iter().zip(&order.local).enumerate() {
            let pages = |list: &[PageRef]| list[blocks.start as usize..blocks.end as usize].to_vec();
            for (theirs, ours) in pages(&theirs.pages).into_iter().zip(pages(ours)) {
                // Equal forms lie equally in their regions; how long the owner's is, its transport checks.
                remote.push(self.pages.place(group as u32, theirs.page));
                local_offsets.push(self.pages.place(group as u32, ours.page).offset);
            }
        }
        let local = self.region.clone();
        (id, owner.peer.pull(Pull { claim, remote, local, local_offsets, deadline: order.deadline }).await)
    }

    /// Pages that a backend may still write to stay in use until it has let go of them.
    fn quarantine(&self, order: &PullOrder, buffers: Buffers) {
        let Buffers::Quarantined(released) = buffers else { return };
        let pages: Vec<(u32, PageRef)> = order
            .local
            .iter()
            .enumerate()
            .flat_map(|(group, pages)| pages.iter().map(move |&page| (group as u32, page)))
            .collect();
        let hold = self.shared.change(|core, _| core.kv().hold(pages.into_iter()));
        let shared = self.shared.clone();
        // Owned by nobody on purpose: it ends with the backend's endpoint, which outlives this worker's tasks.
        seam::spawn(async move {
            released.await;
            shared.change(|core, _| core.kv().release(hold));
        });
    }
}

/// What a pull brought.
struct Taken {
    tokens: u32,
    bundle: FirstTokenBundle,
    transport: &'static str,
    bytes: u64,
}

type PullFuture<'a> = Pin<Box<dyn Future<Output = (u64, Completion)> + Send + 'a>>;
type VerdictFuture = Pin<Box<dyn Future<Output = PullEvent> + Send>>;

/// The answer of a question that may not have been asked: then never.
async fn of(verdict: &mut Option<VerdictFuture>) -> PullEvent {
    match verdict {
        Some(answer) => answer.await,
        None => std::future::pending().await,
    }
}

/// Asks for the verdict, again if the answer is lost on the way: the owner remembers it.
fn ask(
    mut lender: LenderClient<Channel>,
    order: &PullOrder,
    claim: ClaimId,
) -> impl Future<Output = PullEvent> + Send + use<> {
    let request = v1::EndRequest {
        lease: convert::id128(order.handle.lease.0),
        claim: convert::id128(claim.0),
        incarnation: order.handle.incarnation.0,
        complete: true,
    };
    async move {
        let mut why = String::new();
        for _ in 0..2 {
            match seam::timeout(CALL_MAX, lender.end(request.clone())).await {
                Ok(Ok(reply)) => {
                    return PullEvent::Verdict(match reply.into_inner().verdict() {
                        v1::Verdict::Held => Verdict::Held,
                        v1::Verdict::Superseded => Verdict::Superseded,
                        v1::Verdict::Lost | v1::Verdict::Unspecified => Verdict::Lost,
                    });
                }
                Ok(Err(status)) => why = status.message().to_owned(),
                Err(_) => why = "no answer".to_owned(),
            }
        }
        PullEvent::NoVerdict(why)
    }
}

/// The Follow stream of one claim, with our beats on it.
struct Follow {
    inbound: tonic::Streaming<v1::FollowEvent>,
    outbound: mpsc::Sender<v1::FollowRequest>,
    beats: seam::Interval,
    heard: Time,
}

impl Follow {
    async fn open(mut lender: LenderClient<Channel>, order: &PullOrder) -> Result<Follow, PullFailure> {
        let handle = &order.handle;
        let claim = v1::Claim {
            lease: convert::id128(handle.lease.0),
            incarnation: handle.incarnation.0,
            attempt: order.attempt.0,
            puller: String::new(),
            identity: Some((&handle.identity).into()),
            form: Some((&handle.form).into()),
            protocol_min: PROTOCOL_MIN,
            protocol_max: PROTOCOL_MAX,
            traceparent: order.traceparent.clone().unwrap_or_default(),
        };
        let (outbound, requests) = mpsc::channel(4);
        let first = v1::FollowRequest { message: Some(follow_request::Message::Claim(claim)) };
        outbound.try_send(first).expect("the channel is new");
        let requests = tokio_stream::wrappers::ReceiverStream::new(requests);
        let unreachable = |why: &str| PullFailure::Unreachable(format!("{}: {why}", handle.owner));
        let opened = seam::timeout(CALL_MAX, lender.follow(requests)).await;
        let inbound = opened
            .map_err(|_| unreachable("no answer to the claim"))?
            .map_err(|status| unreachable(status.message()))?
            .into_inner();
        Ok(Follow { inbound, outbound, beats: seam::interval(FOLLOW_BEAT), heard: seam::now() })
    }

    /// What the owner says next, or that it says nothing any more.
    async fn next(&mut self) -> PullEvent {
        loop {
            tokio::select! {
                message = self.inbound.message() => {
                    self.heard = seam::now();
                    match message {
                        Ok(Some(v1::FollowEvent { event: Some(event) })) => match read(event) {
                            Some(event) => return event,
                            None => continue,
                        },
                        Ok(Some(_)) => {}
                        Ok(None) => return closed(self, "the owner closed the stream").await,
                        Err(status) => return closed(self, status.message()).await,
                    }
                }
                () = self.beats.tick() => {
                    if seam::now().since(self.heard) > FOLLOW_SILENCE_MAX {
                        return PullEvent::StreamClosed("the owner is silent".into());
                    }
                    let beat = v1::FollowRequest {
                        message: Some(follow_request::Message::Beat(v1::FollowBeat {})),
                    };
                    let _ = self.outbound.try_send(beat);
                }
            }
        }
    }
}

/// A closed stream is said once; after that there is nothing to hear.
async fn closed(follow: &mut Follow, why: &str) -> PullEvent {
    if follow.outbound.is_closed() && follow.heard == Time::MAX {
        return std::future::pending().await;
    }
    follow.heard = Time::MAX;
    PullEvent::StreamClosed(why.to_owned())
}

fn read(event: follow_event::Event) -> Option<PullEvent> {
    use follow_event::Event;
    Some(match event {
        Event::Claimed(claimed) => {
            PullEvent::Claimed(ClaimId(convert::read_id128("Claimed.claim", &claimed.claim).ok()?))
        }
        Event::Ready(v1::Ready { group, first, count, .. }) => PullEvent::Ready { group, first, count },
        Event::Sealed(v1::Sealed { tokens, first_token }) => {
            let first = first_token?;
            let bundle = FirstTokenBundle {
                sampled: convert::sampled(first.token, first.logprob.as_ref()),
                usage: first.usage.as_ref().map(Into::into).unwrap_or_default(),
            };
            PullEvent::Sealed { tokens, bundle }
        }
        Event::Beat(_) => return None,
        Event::Done(_) => PullEvent::Done,
        Event::Superseded(_) => PullEvent::Superseded,
        Event::Lost(lost) => PullEvent::Lost(lost.message),
    })
}

impl From<GiveUp> for PullFailure {
    fn from(why: GiveUp) -> PullFailure {
        match why {
            GiveUp::Done => PullFailure::Done,
            GiveUp::Superseded => PullFailure::Superseded,
            GiveUp::Lost(why) => PullFailure::Lost(why),
            GiveUp::Transfer(why) => PullFailure::Transfer(why),
            GiveUp::OwnerUnreachable(why) => PullFailure::Unreachable(why),
            GiveUp::Deadline => PullFailure::Transfer("the request's deadline has passed".into()),
        }
    }
}
