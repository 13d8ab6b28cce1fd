//! The `Lender` service, and the gate through which a transport reads pages under a claim.

use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use futures_util::{Stream, StreamExt, TryStreamExt};
use tandem_chassis::{Tasks, fail, seam};
use tandem_kv_cache::{HoldId, Verdict};
use tandem_kv_transfer::{ByteRange, Denied, Gate, Permit, checksum};
use tandem_memory::Region;
use tandem_proto::v1::{self, follow_event, follow_request};
use tandem_proto::{PROTOCOL_MAX, PROTOCOL_MIN, Sequence, convert};
use tandem_types::{Attempt, BLOCK_TOKENS, BlockHash, ClaimId, KvIdentity, LeaseId};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};

use crate::pages::PageMap;
use crate::shared::{FOLLOW_QUEUE, Shared};

/// Both ends of a Follow stream beat this often; each beat of the puller renews the lease.
pub(crate) const FOLLOW_BEAT: Duration = Duration::from_millis(500);
/// A Follow stream that was silent for so long is given up.
pub(crate) const FOLLOW_SILENCE_MAX: Duration = Duration::from_secs(3);

/// Serves `Lender`.
pub(crate) struct LenderService {
    pub(crate) shared: Arc<Shared>,
    pub(crate) tasks: Arc<Tasks>,
    pub(crate) region: Arc<Region>,
    pub(crate) pages: PageMap,
}

#[tonic::async_trait]
impl v1::lender_server::Lender for LenderService {
    type FollowStream = Pin<Box<dyn Stream<Item = Result<v1::FollowEvent, Status>> + Send>>;

    async fn lend(&self, request: Request<v1::LendRequest>) -> Result<Response<v1::LendReply>, Status> {
        let wanted = request.into_inner();
        let own = self.own_name();
        for _ in 1..fail::times("lend.request", &own).await? {
            drop(self.lend_to(&wanted));
        }
        let reply = self.lend_to(&wanted)?;
        // An answer that comes twice is that to a question asked twice.
        if fail::times("lend.reply", &own).await? == 1 { Ok(reply) } else { self.lend_to(&wanted) }
    }

    async fn end(&self, request: Request<v1::EndRequest>) -> Result<Response<v1::EndReply>, Status> {
        let end = request.into_inner();
        let own = self.own_name();
        for _ in 1..fail::times("end.request", &own).await? {
            drop(self.verdict(&end).await);
        }
        let reply = self.verdict(&end).await?;
        if fail::times("end.reply", &own).await? == 1 { Ok(reply) } else { self.verdict(&end).await }
    }

    async fn follow(
        &self,
        request: Request<Streaming<v1::FollowRequest>>,
    ) -> Result<Response<Self::FollowStream>, Status> {
        let mut inbound = fail::through(request.into_inner(), &self.own_name(), fail_point);
        let first = seam::timeout(FOLLOW_SILENCE_MAX, inbound.try_next())
            .await
            .map_err(|_| Status::deadline_exceeded("no claim came"))??;
        let Some(follow_request::Message::Claim(wanted)) = first.and_then(|m| m.message) else {
            return Err(Status::invalid_argument("a Follow begins with a claim"));
        };
        let lease = LeaseId(convert::read_id128("Claim.lease", &wanted.lease)?);
        self.check_claim(&wanted)?;

        let claim = ClaimId(seam::random_u128());
        let (events, outbound) = mpsc::channel(FOLLOW_QUEUE);
        let claimed = v1::Claimed { claim: convert::id128(claim.0) };
        let _ = events.try_send(follow_event::Event::Claimed(claimed));
        // Attached before the claim exists, so that no event can pass by.
        self.shared.attach_follower(claim, events.clone());
        let held = self.shared.change(|core, now| core.follow(lease, Attempt(wanted.attempt), claim, now));
        if held {
            self.tasks.spawn(serve_claim(self.shared.clone(), claim, inbound, events));
        } else {
            self.shared.detach_follower(claim);
            let message = "the lease is over, was never here, or a newer attempt holds it".to_owned();
            let _ = events.try_send(follow_event::Event::Lost(v1::Lost { message }));
        }
        let mut numbers = Sequence::default();
        let outbound = ReceiverStream::new(outbound)
            .map(move |event| Ok(v1::FollowEvent { event: Some(event), sequence: numbers.number() }));
        Ok(Response::new(Box::pin(outbound)))
    }
}

impl LenderService {
    fn own_name(&self) -> String {
        self.shared.look(|core| core.constants().id.0.clone())
    }

    fn lend_to(&self, wanted: &v1::LendRequest) -> Result<Response<v1::LendReply>, Status> {
        self.check_owner(wanted.incarnation, wanted.protocol_min, wanted.protocol_max)?;
        let constants = self.shared.look(|core| core.constants().clone());
        let identity: KvIdentity = wanted.identity.as_ref().map(Into::into).unwrap_or_default();
        if identity != constants.identity {
            return Err(Status::failed_precondition(format!(
                "{} has KV of {}/{}, the borrower wants {}/{}",
                constants.id,
                constants.identity.digest,
                constants.identity.numerics,
                identity.digest,
                identity.numerics
            )));
        }
        let hashes: Vec<BlockHash> = wanted
            .hashes
            .iter()
            .map(|hash| convert::read_id128("LendRequest.hashes", hash).map(BlockHash))
            .collect::<Result<_, _>>()?;
        let remaining = Duration::from_millis(u64::from(wanted.remaining_ms));
        let handle = self.shared.change(|core, now| core.lend(&hashes, now + remaining, now));
        let blocks = handle.as_ref().map_or(0, |handle| handle.tokens / BLOCK_TOKENS);
        let handle = handle
            .map(|handle| v1::Handle { kind: v1::HandleKind::Prefix as i32, ..v1::Handle::from(&handle) });
        Ok(Response::new(v1::LendReply { handle, blocks }))
    }

    async fn verdict(&self, end: &v1::EndRequest) -> Result<Response<v1::EndReply>, Status> {
        let lease = LeaseId(convert::read_id128("EndRequest.lease", &end.lease)?);
        let claim = ClaimId(convert::read_id128("EndRequest.claim", &end.claim)?);
        let own = self.shared.look(|core| core.constants().incarnation);
        if end.incarnation == own.0 && !end.corrupt_blocks.is_empty() {
            self.examine(claim, &end.corrupt_blocks).await;
        }
        let verdict = if end.incarnation == own.0 {
            self.shared.change(|core, now| core.end_claim(lease, claim, end.complete, now))
        } else {
            Verdict::Lost
        };
        let verdict = match verdict {
            Verdict::Held => v1::Verdict::Held,
            Verdict::Lost => v1::Verdict::Lost,
            Verdict::Superseded => v1::Verdict::Superseded,
        };
        Ok(Response::new(v1::EndReply { verdict: verdict as i32 }))
    }

    fn check_claim(&self, claim: &v1::Claim) -> Result<(), Status> {
        self.check_owner(claim.incarnation, claim.protocol_min, claim.protocol_max)
    }

    fn check_owner(&self, incarnation: u64, protocol_min: u32, protocol_max: u32) -> Result<(), Status> {
        let constants = self.shared.look(|core| core.constants().clone());
        if incarnation != constants.incarnation.0 {
            return Err(Status::failed_precondition(format!(
                "the handle is of another start of {}; this is incarnation {}",
                constants.id, constants.incarnation
            )));
        }
        if protocol_max.min(PROTOCOL_MAX) < protocol_min.max(PROTOCOL_MIN) {
            return Err(Status::failed_precondition(format!(
                "no protocol version in common: puller {protocol_min}..{protocol_max}, owner {PROTOCOL_MIN}..{PROTOCOL_MAX}"
            )));
        }
        Ok(())
    }

    /// A puller says that these blocks came wrong twice. What is wrong here is never found in the prefix cache
    /// again; what is right here went wrong on the way.
    async fn examine(&self, claim: ClaimId, blocks: &[u32]) {
        let suspects = self.shared.change(|core, _| {
            let mut suspects = Vec::new();
            for group in 0..core.constants().groups {
                let pages = core.kv_ref().claimed_pages(claim, group);
                let named = blocks.iter().filter_map(|&block| pages.get(block as usize));
                suspects.extend(named.map(|page| (group, page.page)));
            }
            let hold = core.kv().begin_read(claim, &suspects).ok()?;
            let summed = |(group, page)| (group, page, core.sum_of(group, page));
            Some((suspects.into_iter().map(summed).collect::<Vec<_>>(), hold))
        });
        let Some((suspects, hold)) = suspects else { return };
        let reading = Reading { shared: self.shared.clone(), hold };
        let (pages, region) = (self.pages.clone(), self.region.clone());
        let look = move || {
            for (group, page, sum) in suspects {
                let place = pages.place(group, page);
                // SAFETY: the hold keeps everybody from writing to the page.
                let bytes = unsafe { region.slice(place.offset as usize, place.len as usize) };
                if sum.is_some_and(|sum| sum != checksum(bytes)) {
                    tracing::error!(group, page, "a page of the KV pool does not hold what was computed");
                    reading.shared.metrics.observe_corrupt("pool", 1);
                    reading.shared.change(|core, _| core.kv().forget(group, page));
                }
            }
        };
        let _ = tokio::task::spawn_blocking(look).await;
    }
}

/// Keeps a claim alive while its puller's stream lives.
async fn serve_claim(
    shared: Arc<Shared>,
    claim: ClaimId,
    mut inbound: impl Stream<Item = Result<v1::FollowRequest, Status>> + Unpin,
    events: mpsc::Sender<follow_event::Event>,
) {
    let _following = Following { shared: &shared, claim };
    let mut beats = seam::interval(FOLLOW_BEAT);
    let mut heard = seam::now();
    let mut numbers = Sequence::default();
    numbers.number(); // the claim
    loop {
        tokio::select! {
            message = inbound.try_next() => match message {
                Ok(Some(message)) => {
                    heard = seam::now();
                    if numbers.take(message.sequence).is_err() {
                        break;
                    }
                    shared.change(|core, now| core.renew_claim(claim, now));
                }
                Ok(None) | Err(_) => break,
            },
            () = beats.tick() => {
                let silent = seam::now().since(heard) > FOLLOW_SILENCE_MAX;
                if silent || events.try_send(follow_event::Event::Beat(v1::FollowBeat {})).is_err() {
                    break;
                }
            }
            () = events.closed() => break,
        }
    }
}

/// A claim whose puller's stream is read; with the reading, however that ends, the claim ends.
struct Following<'a> {
    shared: &'a Shared,
    claim: ClaimId,
}

impl Drop for Following<'_> {
    fn drop(&mut self) {
        self.shared.detach_follower(self.claim);
        self.shared.change(|core, now| core.unfollow(self.claim, now));
    }
}

fn fail_point(message: &v1::FollowRequest) -> Option<&'static str> {
    Some(match message.message.as_ref()? {
        follow_request::Message::Claim(_) => "follow.claim",
        follow_request::Message::Beat(_) => "follow.beat",
    })
}

/// Lets a transport read pages that are ready under a live claim, and keeps them from reuse meanwhile.
pub(crate) struct LeaseGate {
    pub(crate) shared: Arc<Shared>,
    pub(crate) pages: PageMap,
}

/// A gate that is filled before anybody can have a claim; until then it lets nobody through.
#[derive(Default)]
pub(crate) struct LateGate(std::sync::OnceLock<LeaseGate>);

impl LateGate {
    pub(crate) fn fill(&self, gate: LeaseGate) {
        assert!(self.0.set(gate).is_ok(), "a gate is filled once");
    }
}

impl Gate for LateGate {
    fn begin(&self, claim: ClaimId, ranges: &[ByteRange]) -> Result<Permit, Denied> {
        self.0.get().ok_or(Denied)?.begin(claim, ranges)
    }
}

/// A read in progress: gives the pages back when it drops.
struct Reading {
    shared: Arc<Shared>,
    hold: HoldId,
}

impl Drop for Reading {
    fn drop(&mut self) {
        self.shared.change(|core, _| core.kv().release(self.hold));
    }
}

impl Gate for LeaseGate {
    fn begin(&self, claim: ClaimId, ranges: &[ByteRange]) -> Result<Permit, Denied> {
        let pages = self.pages.covering(ranges).ok_or(Denied)?;
        let hold = self.shared.change(|core, _| core.kv().begin_read(claim, &pages)).map_err(|_| Denied)?;
        Ok(Box::new(Reading { shared: self.shared.clone(), hold }))
    }
}
