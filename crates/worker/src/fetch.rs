//! One pull under way: follows the owner, moves bytes, compares checksums, asks for the verdict. What to do next
//! is `Puller`'s to say.

use std::collections::HashMap;
use std::future::Future;
use std::ops::Range;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use futures_util::stream::FuturesUnordered;
use futures_util::{StreamExt, TryStreamExt};
use tandem_chassis::{fail, seam};
use tandem_kv_cache::{FirstTokenBundle, GiveUp, PullAction, PullEvent, Puller, Verdict};
use tandem_kv_transfer::{Completion, Peer, Pull, PullError};
use tandem_proto::v1::lender_client::LenderClient;
use tandem_proto::v1::{self, follow_event, follow_request};
use tandem_proto::{PROTOCOL_MAX, PROTOCOL_MIN, Sequence, convert};
use tandem_types::{ClaimId, Handle, Time};
use tokio::sync::mpsc;
use tonic::transport::Channel;

use crate::core::{PageSum, PullFailure, PullOrder, Transfer};
use crate::faulty;
use crate::lender::{FOLLOW_BEAT, FOLLOW_SILENCE_MAX};
use crate::pull::{CALL_MAX, Context};

/// A pull of nothing may take so long: as long as a lease that nobody renews.
const PULL_MAX: Duration = Duration::from_secs(10);
/// A network slower than this is no way to hand KV over; computing it again is faster.
const BYTES_PER_SECOND_MIN: u64 = 16 << 20;

/// What a pull brought.
pub(crate) struct Taken {
    pub(crate) tokens: u32,
    pub(crate) bundle: FirstTokenBundle,
    pub(crate) transport: &'static str,
    pub(crate) transfer: Transfer,
    /// Checksums of the local pages, as their owner took them.
    pub(crate) sums: Vec<PageSum>,
}

/// A pull: its number, its blocks, and how it ended; twice where the word of it comes twice.
type PullFuture<'a> = Pin<Box<dyn Future<Output = (u64, Range<u32>, Completion, usize)> + Send + 'a>>;
type VerdictFuture = Pin<Box<dyn Future<Output = PullEvent> + Send>>;

/// A pull and everything it is doing.
pub(crate) struct Fetching<'a> {
    context: &'a Context,
    order: &'a PullOrder,
    handle: &'a Handle,
    lender: LenderClient<Channel>,
    transport: &'static str,
    peer: Arc<dyn Peer>,
    puller: Puller,
    follow: Follow,
    /// The owner's checksums, by (group, block).
    sums: HashMap<(u32, u32), u64>,
    claim: Option<ClaimId>,
    bytes: u64,
    sealed: Option<(Time, u64)>,
    busy: Duration,
    busy_since: Option<Time>,
}

impl<'a> Fetching<'a> {
    pub(crate) async fn begin(
        context: &'a Context,
        order: &'a PullOrder,
        handle: &'a Handle,
        lender: LenderClient<Channel>,
        transport: &'static str,
        peer: Arc<dyn Peer>,
    ) -> Result<Fetching<'a>, PullFailure> {
        let blocks = handle.groups.first().map_or(0, |group| group.pages.len() as u32);
        let even = handle.groups.iter().all(|group| group.pages.len() as u32 == blocks);
        let fits = order.local.iter().all(|pages| pages.len() as u32 >= blocks);
        if blocks == 0 || !even || !fits || handle.groups.len() != order.local.len() {
            return Err(PullFailure::Incompatible("the handle's groups are not this worker's".into()));
        }
        let skip = order.skip_blocks.min(blocks);
        let puller = Puller::new(order.local.len() as u32, blocks, skip);
        let follow = Follow::open(lender.clone(), order, handle).await?;
        Ok(Fetching {
            context,
            order,
            handle,
            lender,
            transport,
            peer,
            puller,
            follow,
            sums: HashMap::new(),
            claim: None,
            bytes: 0,
            sealed: None,
            busy: Duration::ZERO,
            busy_since: None,
        })
    }

    /// To the end: everything is here and good, or nothing came of it.
    pub(crate) async fn run(mut self) -> Result<Taken, PullFailure> {
        let mut pulls: FuturesUnordered<PullFuture<'a>> = FuturesUnordered::new();
        let mut verdict: Option<VerdictFuture> = None;
        loop {
            while let Some(action) = self.puller.next_action() {
                match action {
                    PullAction::Pull { id, claim, blocks } => {
                        self.busy_since.get_or_insert_with(seam::now);
                        pulls.push(self.pull_blocks(id, claim, blocks));
                    }
                    PullAction::AskVerdict(claim) => verdict = Some(Box::pin(self.ask(claim))),
                    PullAction::Deliver { tokens, bundle } => return Ok(self.taken(tokens, bundle)),
                    PullAction::GiveUp(why) => {
                        if let (GiveUp::Corrupt(blocks), Some(claim)) = (&why, self.claim) {
                            self.complain(claim, blocks.clone()).await;
                        }
                        return Err(why.into());
                    }
                }
            }
            let event = tokio::select! {
                biased;
                Some((id, blocks, completion, times)) = pulls.next(), if !pulls.is_empty() => {
                    if pulls.is_empty() {
                        self.rest();
                    }
                    let denied = matches!(completion.bytes, Err(PullError::Denied));
                    let mut event = self.arrived(id, blocks, completion);
                    if denied && let Some(why) = self.last_word().await {
                        event = why;
                    }
                    for _ in 1..times {
                        self.puller.on(event.clone());
                    }
                    event
                }
                answer = of(&mut verdict) => {
                    verdict = None;
                    answer
                }
                event = self.follow.next() => self.heard(event),
                () = seam::sleep_until(self.order.deadline) => PullEvent::Deadline,
            };
            self.puller.on(event);
        }
    }

    fn rest(&mut self) {
        if let Some(since) = self.busy_since.take() {
            self.busy += seam::now().since(since);
        }
    }

    /// Keeps what the state machine does not need to know.
    fn heard(&mut self, event: Heard) -> PullEvent {
        match event {
            Heard::Ready { group, first, count, checksums } => {
                if self.context.checksums {
                    self.sums.extend((first..).map(|block| (group, block)).zip(checksums));
                }
                PullEvent::Ready { group, first, count }
            }
            Heard::Event(event) => {
                match &event {
                    PullEvent::Claimed(claim) => self.claim = Some(*claim),
                    PullEvent::Sealed { .. } => self.sealed = Some((seam::now(), self.bytes)),
                    _ => {}
                }
                event
            }
        }
    }

    fn arrived(&mut self, id: u64, blocks: Range<u32>, completion: Completion) -> PullEvent {
        let Completion { bytes, buffers, checksums } = completion;
        self.context.quarantine(self.order, buffers);
        match bytes {
            Ok(bytes) => {
                self.bytes += bytes;
                let groups = 0..self.order.local.len() as u32;
                let places = groups.flat_map(|group| blocks.clone().map(move |block| (group, block)));
                let expected: Option<Vec<u64>> = places.map(|place| self.sums.get(&place).copied()).collect();
                match expected {
                    Some(expected) if self.context.checksums && expected == checksums => {
                        PullEvent::Verified(id)
                    }
                    Some(_) if self.context.checksums => {
                        let owner = &self.handle.owner;
                        tracing::warn!(%owner, ?blocks, "bytes of a pull are not what their owner computed");
                        self.context.shared.metrics.observe_corrupt("transfer", 1);
                        PullEvent::Corrupt(id)
                    }
                    _ => PullEvent::Arrived(id),
                }
            }
            Err(error) => PullEvent::Broken(id, error.to_string()),
        }
    }

    /// The owner's word on why the claim stands no more, which may still be on its way when a pull is denied.
    async fn last_word(&mut self) -> Option<PullEvent> {
        let word = async {
            loop {
                match self.follow.next().await {
                    Heard::Event(word @ (PullEvent::Done | PullEvent::Superseded | PullEvent::Lost(_))) => {
                        return Some(word);
                    }
                    Heard::Event(PullEvent::StreamClosed(_)) => return None,
                    Heard::Event(_) | Heard::Ready { .. } => {}
                }
            }
        };
        seam::timeout(CALL_MAX, word).await.unwrap_or_default()
    }

    fn pull_blocks(&self, id: u64, claim: ClaimId, blocks: Range<u32>) -> PullFuture<'a> {
        let range = blocks.start as usize..blocks.end as usize;
        let mut remote = Vec::new();
        let mut local_offsets = Vec::new();
        let map = &self.context.pages;
        for (group, (theirs, ours)) in self.handle.groups.iter().zip(&self.order.local).enumerate() {
            for (theirs, ours) in theirs.pages[range.clone()].iter().zip(&ours[range.clone()]) {
                // Equal forms lie equally in their regions; how long the owner's is, its transport checks.
                remote.push(map.place(group as u32, theirs.page));
                local_offsets.push(map.place(group as u32, ours.page).offset);
            }
        }
        let local = self.context.region.clone();
        let checksums = self.context.checksums;
        let bytes: u64 = remote.iter().map(|range| range.len).sum();
        // An owner that hangs after the seal is noticed here only.
        let longest = PULL_MAX + Duration::from_secs(bytes / BYTES_PER_SECOND_MIN);
        let deadline = self.order.deadline.min(seam::now() + longest);
        let pull = Pull { claim, remote, local, local_offsets, checksums, deadline };
        let peer = self.peer.clone();
        let owner = &self.handle.owner.0;
        Box::pin(async move {
            let (completion, times) = faulty::pull(peer, pull, owner).await;
            (id, blocks, completion, times)
        })
    }

    fn taken(mut self, tokens: u32, bundle: FirstTokenBundle) -> Taken {
        self.rest();
        let (sealed, before) = self.sealed.unwrap_or((seam::now(), self.bytes));
        let local = &self.order.local;
        let skip = self.order.skip_blocks;
        let sums = self.sums.iter().filter(|((_, block), _)| *block >= skip).map(|((group, block), sum)| {
            let page = local[*group as usize][*block as usize].page;
            PageSum { group: *group, page, checksum: *sum }
        });
        Taken {
            tokens,
            bundle,
            transport: self.transport,
            transfer: Transfer {
                bytes: self.bytes,
                busy: self.busy,
                exposed_bytes: self.bytes - before,
                exposed: seam::now().since(sealed),
            },
            sums: sums.collect(),
        }
    }

    fn end_request(&self, claim: ClaimId) -> v1::EndRequest {
        v1::EndRequest {
            lease: convert::id128(self.handle.lease.0),
            claim: convert::id128(claim.0),
            incarnation: self.handle.incarnation.0,
            complete: true,
            corrupt_blocks: Vec::new(),
        }
    }

    /// Asks for the verdict, again if the answer is lost on the way: the owner remembers it.
    fn ask(&self, claim: ClaimId) -> impl Future<Output = PullEvent> + Send + use<> {
        let (mut lender, request) = (self.lender.clone(), self.end_request(claim));
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

    /// Tells the owner which blocks came wrong, so that it looks at them. Also ends the claim.
    async fn complain(&self, claim: ClaimId, blocks: Range<u32>) {
        let request =
            v1::EndRequest { complete: false, corrupt_blocks: blocks.collect(), ..self.end_request(claim) };
        let mut lender = self.lender.clone();
        // Whether it hears of it or not, this pull is over.
        let _ = seam::timeout(CALL_MAX, lender.end(request)).await;
    }
}

/// The answer of a question that may not have been asked: then never.
async fn of(verdict: &mut Option<VerdictFuture>) -> PullEvent {
    match verdict {
        Some(answer) => answer.await,
        None => std::future::pending().await,
    }
}

/// What the owner says on a Follow stream.
enum Heard {
    Ready { group: u32, first: u32, count: u32, checksums: Vec<u64> },
    Event(PullEvent),
}

/// The Follow stream of one claim, with our beats on it.
struct Follow {
    inbound: fail::Through<tonic::Streaming<v1::FollowEvent>, v1::FollowEvent>,
    heard_numbers: Sequence,
    outbound: mpsc::Sender<v1::FollowRequest>,
    numbers: Sequence,
    beats: seam::Interval,
    heard: Time,
}

impl Follow {
    async fn open(
        mut lender: LenderClient<Channel>,
        order: &PullOrder,
        handle: &Handle,
    ) -> Result<Follow, PullFailure> {
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
        let mut numbers = Sequence::default();
        let message = Some(follow_request::Message::Claim(claim));
        let first = v1::FollowRequest { message, sequence: numbers.number() };
        outbound.try_send(first).expect("the channel is new");
        let requests = tokio_stream::wrappers::ReceiverStream::new(requests);
        let unreachable = |why: &str| PullFailure::Unreachable(format!("{}: {why}", handle.owner));
        let opened = seam::timeout(CALL_MAX, lender.follow(requests)).await;
        let inbound = opened
            .map_err(|_| unreachable("no answer to the claim"))?
            .map_err(|status| unreachable(status.message()))?
            .into_inner();
        Ok(Follow {
            inbound: fail::through(inbound, &handle.owner.0, fail_point),
            heard_numbers: Sequence::default(),
            outbound,
            numbers,
            beats: seam::interval(FOLLOW_BEAT),
            heard: seam::now(),
        })
    }

    /// What the owner says next, or that it says nothing any more.
    async fn next(&mut self) -> Heard {
        loop {
            tokio::select! {
                message = self.inbound.try_next(), if self.heard != Time::MAX => {
                    self.heard = seam::now();
                    match message {
                        Ok(Some(v1::FollowEvent { event, sequence })) => {
                            match self.heard_numbers.take(sequence) {
                                Ok(true) => {}
                                Ok(false) => continue,
                                Err(gap) => return closed(self, &gap.to_string()).await,
                            }
                            if let Some(event) = event.and_then(read) {
                                return event;
                            }
                        }
                        Ok(None) => return closed(self, "the owner closed the stream").await,
                        Err(status) => return closed(self, status.message()).await,
                    }
                }
                () = self.beats.tick() => {
                    if seam::now().since(self.heard) > FOLLOW_SILENCE_MAX {
                        return closed(self, "the owner is silent").await;
                    }
                    let message = Some(follow_request::Message::Beat(v1::FollowBeat {}));
                    // Numbered only when sent: a beat that finds the queue full is no loss.
                    if let Ok(place) = self.outbound.try_reserve() {
                        place.send(v1::FollowRequest { message, sequence: self.numbers.number() });
                    }
                }
            }
        }
    }
}

/// A closed stream is said once; after that there is nothing to hear.
async fn closed(follow: &mut Follow, why: &str) -> Heard {
    if follow.heard == Time::MAX {
        return std::future::pending().await;
    }
    follow.heard = Time::MAX;
    Heard::Event(PullEvent::StreamClosed(why.to_owned()))
}

fn fail_point(message: &v1::FollowEvent) -> Option<&'static str> {
    use follow_event::Event;
    Some(match message.event.as_ref()? {
        Event::Claimed(_) => "follow.claimed",
        Event::Ready(_) => "follow.ready",
        Event::Sealed(_) => "follow.sealed",
        Event::Beat(_) => "follow.owner-beat",
        Event::Done(_) => "follow.done",
        Event::Superseded(_) => "follow.superseded",
        Event::Lost(_) => "follow.lost",
    })
}

fn read(event: follow_event::Event) -> Option<Heard> {
    use follow_event::Event;
    Some(Heard::Event(match event {
        Event::Claimed(claimed) => {
            PullEvent::Claimed(ClaimId(convert::read_id128("Claimed.claim", &claimed.claim).ok()?))
        }
        Event::Ready(v1::Ready { group, first, count, checksums, .. }) => {
            return Some(Heard::Ready { group, first, count, checksums });
        }
        Event::Sealed(v1::Sealed { tokens, first_token }) => {
            // Absent on lent prefixes.
            let bundle = first_token.map_or_else(FirstTokenBundle::default, |first| FirstTokenBundle {
                sampled: convert::sampled(first.token, first.logprob.as_ref()),
                usage: first.usage.as_ref().map(Into::into).unwrap_or_default(),
            });
            PullEvent::Sealed { tokens, bundle }
        }
        Event::Beat(_) => return None,
        Event::Done(_) => PullEvent::Done,
        Event::Superseded(_) => PullEvent::Superseded,
        Event::Lost(lost) => PullEvent::Lost(lost.message),
    }))
}

impl From<GiveUp> for PullFailure {
    fn from(why: GiveUp) -> PullFailure {
        match why {
            GiveUp::Done => PullFailure::Done,
            GiveUp::Superseded => PullFailure::Superseded,
            GiveUp::Lost(why) => PullFailure::Lost(why),
            GiveUp::Transfer(why) => PullFailure::Transfer(why),
            GiveUp::Corrupt(blocks) => PullFailure::Corrupt(format!(
                "the bytes of blocks {} to {} came wrong twice",
                blocks.start,
                blocks.end - 1
            )),
            GiveUp::OwnerUnreachable(why) => PullFailure::Unreachable(why),
            GiveUp::Deadline => PullFailure::Transfer("the request's deadline has passed".into()),
        }
    }
}
