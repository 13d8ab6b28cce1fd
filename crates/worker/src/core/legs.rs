//! A leg: one attempt that is live here, what it holds, and how it leaves.

use tandem_batching::{SequenceId, SequenceSpec, Target};
use tandem_kv_cache::Table;
use tandem_proto::v1;
use tandem_types::{
    Attempt, BlockHash, FinishReason, GroupPages, Handle, LeaseId, LegKey, PageRef, Sampled, Time, Until,
    Usage,
};

use super::borrow::Holder;
use super::{Core, Output, SessionId};

/// Scores of an event at most: with all their alternatives a few kibibytes.
const SCORES_MAX: usize = 64;

/// An attempt that is live on this worker.
#[derive(Debug)]
pub(super) struct Leg {
    pub session: SessionId,
    pub name: u32,
    pub key: LegKey,
    pub until: Until,
    pub deadline: Time,
    pub arrived: Time,
    /// Tokens the Start carried: prompt and tokens emitted before.
    pub known_tokens: u32,
    pub prompt_tokens: u32,
    pub cached_tokens: u32,
    pub last: Option<Sampled>,
    /// The lease it granted, with the pages that are under it.
    pub lease: Option<(LeaseId, Vec<GroupPages>)>,
    pub stage: Stage,
    pub traceparent: Option<String>,
    pub request_name: String,
    pub first_token_at: Option<Time>,
    /// Who else may hold its first blocks.
    pub holders: Vec<Holder>,
    /// When its tokens are due, if it has targets.
    pub target: Option<Target>,
}

/// Where a leg is.
#[derive(Debug)]
pub(super) enum Stage {
    /// A hand-off to take over, waiting for room.
    WaitingForRoom { spec: Box<SequenceSpec>, handle: Box<Handle>, after: Attempt },
    /// A prompt to compute and grant, waiting for room under the leased share.
    WaitingForShare { spec: Box<SequenceSpec> },
    /// Bytes are coming into `table`.
    Pulling { spec: Box<SequenceSpec>, table: Table, purpose: Purpose },
    /// In the batcher.
    Running,
    /// Prefilled and sealed; the lease waits for a puller.
    HandedOff,
    /// Cancelled while bytes were coming: the pages are free when the pull says that it stopped.
    Stopping { table: Table },
}

/// What bytes are pulled for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Purpose {
    /// The whole prompt was computed elsewhere: go on from it.
    TakeOver,
    /// The first blocks were; `computed` tokens are in the table whatever comes of it.
    Borrow { computed: u32 },
}

/// Why a leg leaves.
#[derive(Clone, Debug, PartialEq)]
pub enum Finish {
    /// The answer is complete.
    Finished(FinishReason, Usage),
    /// Its lease is over after a hand-off.
    HandedOff,
    /// The router said so, or is gone.
    Cancelled,
    /// A newer attempt of the same choice came to this worker.
    Superseded,
    /// Not begun.
    Refused(v1::RefuseReason, String),
    /// Taken out to make room.
    Preempted,
    /// Broken off.
    Failed(v1::FailReason, String),
}

/// What became of a leg, for metrics and spans.
#[derive(Clone, Debug)]
pub struct LegReport {
    /// Its sequence.
    pub sequence: SequenceId,
    /// How it left.
    pub finish: Finish,
    /// When its Start came.
    pub arrived: Time,
    /// When its first token was drawn or taken over.
    pub first_token_at: Option<Time>,
    /// When it left.
    pub left: Time,
    /// Prompt tokens it stood for.
    pub prompt_tokens: u32,
    /// Of these, found in the prefix cache.
    pub cached_tokens: u32,
}

/// The stages a leg can be in here, named as everywhere.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StageName {
    /// Waits for room or its turn.
    Queue,
    /// Its prompt is being computed.
    Prefill,
    /// Its KV is being pulled.
    Transfer,
    /// Its answer is being drawn.
    Decode,
}

/// A leg enters a stage.
#[derive(Clone, Debug)]
pub struct StageChange {
    /// Its sequence.
    pub sequence: SequenceId,
    /// Whose it is.
    pub key: LegKey,
    /// The stage that begins.
    pub stage: StageName,
    /// The trace it belongs to.
    pub traceparent: Option<String>,
    /// The client's name for the request.
    pub request_name: String,
}

/// Where bytes come from.
#[derive(Clone, Debug)]
pub enum PullSource {
    /// From pages under a lease that was granted for this.
    Handle(Handle),
    /// From whoever is said to hold these blocks, if it lends them.
    Holder {
        /// Who.
        holder: Holder,
        /// The blocks, from the prompt's first.
        hashes: Vec<BlockHash>,
    },
}

/// Bytes to pull.
#[derive(Debug)]
pub struct PullOrder {
    /// The sequence that waits for it.
    pub sequence: SequenceId,
    /// Whose KV, and where.
    pub source: PullSource,
    /// The attempt under which to claim.
    pub attempt: Attempt,
    /// Where it goes, per group; as long as the handle's pages, or as the hashes.
    pub local: Vec<Vec<PageRef>>,
    /// Leading blocks that are here already.
    pub skip_blocks: u32,
    /// The request's deadline.
    pub deadline: Time,
    /// The trace it belongs to.
    pub traceparent: Option<String>,
    /// The client's name for the request, for logs.
    pub request_name: String,
}

impl Core {
    /// Removes a leg, frees all it holds, and tells its router. The one way out.
    ///
    /// A leg whose bytes are still coming stays as `Stopping` until the pull has let go of its pages.
    pub(super) fn end_leg(&mut self, id: SequenceId, finish: Finish, now: Time) {
        let Some(leg) = self.legs.get_mut(&id) else { return };
        match std::mem::replace(&mut leg.stage, Stage::HandedOff) {
            Stage::Running => {
                self.batcher.cancel(id, &mut self.kv, now);
            }
            Stage::WaitingForRoom { .. } => self.waiting_pulls.retain(|&waiting| waiting != id),
            Stage::WaitingForShare { .. } => self.waiting_grants.retain(|&waiting| waiting != id),
            Stage::Pulling { table, .. } => {
                leg.stage = Stage::Stopping { table };
                self.output.push(Output::StopPull(id));
                return;
            }
            stopping @ Stage::Stopping { .. } => {
                leg.stage = stopping;
                return;
            }
            Stage::HandedOff => {}
        }
        self.remove_leg(id, finish, now);
    }

    /// Forgets a leg that holds no pages of its own any more; ends its lease if it still has one.
    pub(super) fn remove_leg(&mut self, id: SequenceId, finish: Finish, now: Time) {
        let Some(leg) = self.legs.remove(&id) else { return };
        self.by_name.remove(&(leg.session, leg.name));
        let choice = (leg.key.request, leg.key.choice);
        if self.by_choice.get(&choice) == Some(&id) {
            self.by_choice.remove(&choice);
        }
        if let Some((lease, _)) = &leg.lease {
            self.by_lease.remove(lease);
            match finish {
                Finish::Finished(..) => self.kv.finish(*lease, now),
                _ => {
                    self.kv.cancel_lease(*lease, now);
                }
            }
        }
        self.output.push(Output::Left(LegReport {
            sequence: id,
            finish: finish.clone(),
            arrived: leg.arrived,
            first_token_at: leg.first_token_at,
            left: now,
            prompt_tokens: leg.prompt_tokens,
            cached_tokens: leg.cached_tokens,
        }));
        if !self.sessions.contains_key(&leg.session) {
            return;
        }
        let event = match finish {
            Finish::Finished(reason, usage) => {
                let (reason, stop_token) = tandem_proto::convert::finish(reason);
                self.push_event(
                    leg.session,
                    leg.name,
                    v1::event::Event::Finished(v1::Finished {
                        reason: reason as i32,
                        stop_token,
                        usage: Some(usage.into()),
                    }),
                );
                v1::event::Event::Released(v1::Released {})
            }
            Finish::HandedOff | Finish::Cancelled => v1::event::Event::Released(v1::Released {}),
            Finish::Superseded => v1::event::Event::Failed(v1::Failed {
                reason: v1::FailReason::Superseded as i32,
                message: "a newer attempt of this choice came to this worker".into(),
            }),
            Finish::Refused(reason, message) => {
                v1::event::Event::Refused(v1::Refused { reason: reason as i32, message })
            }
            Finish::Preempted => v1::event::Event::Preempted(v1::Preempted {}),
            Finish::Failed(reason, message) => {
                v1::event::Event::Failed(v1::Failed { reason: reason as i32, message })
            }
        };
        self.push_event(leg.session, leg.name, event);
    }

    /// Tells the spans that a leg enters a stage.
    pub(super) fn enter(&mut self, id: SequenceId, stage: StageName) {
        let Some(leg) = self.legs.get(&id) else { return };
        self.output.push(Output::Stage(Box::new(StageChange {
            sequence: id,
            key: leg.key,
            stage,
            traceparent: leg.traceparent.clone(),
            request_name: leg.request_name.clone(),
        })));
    }

    pub(super) fn push_event(&mut self, session: SessionId, leg: u32, event: v1::event::Event) {
        self.output.push(Output::Event { session, leg, event });
    }

    /// A chunk's scores, as events of bounded size.
    pub(super) fn push_scores(&mut self, id: SequenceId, position: u32, scores: &[Sampled]) {
        let Some(leg) = self.legs.get(&id) else { return };
        let (session, name) = (leg.session, leg.name);
        for (position, scores) in (position..).step_by(SCORES_MAX).zip(scores.chunks(SCORES_MAX)) {
            let logprobs = scores.iter().filter_map(tandem_proto::convert::token_logprob).collect();
            let scored = v1::Scored { position, logprobs };
            self.push_event(session, name, v1::event::Event::Scored(scored));
        }
    }

    pub(super) fn push_delta(&mut self, session: SessionId, leg: u32, position: u32, sampled: &Sampled) {
        let delta = v1::Delta {
            position,
            tokens: vec![sampled.token],
            logprobs: tandem_proto::convert::token_logprob(sampled).into_iter().collect(),
            hidden: Default::default(),
        };
        self.push_event(session, leg, v1::event::Event::Delta(delta));
    }
}
