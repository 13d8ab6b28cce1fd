//! The taking side of hand-offs: room first, then the pull, then the sequence goes on.

use std::time::Duration;

use tandem_batching::SequenceId;
use tandem_kv_cache::{FirstTokenBundle, HashChain};
use tandem_proto::v1;
use tandem_types::{BLOCK_TOKENS, Time, blocks_for};

use super::legs::{Finish, PullOrder, PullSource, Purpose, Stage, StageName};
use super::whole::PageSum;
use super::{Core, Output, Transfer};

/// How long a hand-off waits for room while answers that run here will give some back, and while none does.
const PATIENCE_BUSY: Duration = Duration::from_secs(10);
const PATIENCE_STUCK: Duration = Duration::from_secs(1);

/// Why a pull brought nothing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PullFailure {
    /// The owner said that the request ended there.
    Done,
    /// No way to the owner or its memory: the lease waits for another puller.
    Unreachable(String),
    /// Identity or form differ.
    Incompatible(String),
    /// Bytes did not arrive.
    Transfer(String),
    /// Bytes came wrong, twice.
    Corrupt(String),
    /// The lease is over.
    Lost(String),
    /// A newer attempt holds it.
    Superseded,
}

impl PullFailure {
    /// A word for metrics.
    pub fn word(&self) -> &'static str {
        match self {
            PullFailure::Done => "done",
            PullFailure::Unreachable(_) => "unreachable",
            PullFailure::Incompatible(_) => "incompatible",
            PullFailure::Transfer(_) => "transfer",
            PullFailure::Corrupt(_) => "corrupt",
            PullFailure::Lost(_) => "lost",
            PullFailure::Superseded => "superseded",
        }
    }
}

impl Core {
    /// Reserves room for hand-offs, oldest first, and orders their pulls.
    ///
    /// Whoever waits for room, here or in the batcher, is not passed by anybody younger of either.
    pub(super) fn begin_waiting_pulls(&mut self, now: Time) {
        self.reserve_for_pulls(now);
        let oldest = self.waiting_pulls.front().map(|id| &self.legs[id].stage);
        self.batcher.yield_to(oldest.map(|stage| match stage {
            Stage::WaitingForRoom { spec, .. } => spec.arrived,
            _ => unreachable!("only waiting legs are queued"),
        }));
    }

    fn reserve_for_pulls(&mut self, now: Time) {
        while let Some(&id) = self.waiting_pulls.front() {
            let leg = self.legs.get_mut(&id).expect("queued legs exist");
            let Stage::WaitingForRoom { spec, handle, after } = &leg.stage else {
                unreachable!("only waiting legs are queued");
            };
            let mut chain = HashChain::new(spec.seed);
            chain.extend(&spec.tokens);
            let tokens = spec.tokens.len() as u32;
            let left = spec.stop.max_tokens.min(self.constants.context_tokens.saturating_sub(tokens));
            let cached = self.kv.cached_prefix(chain.hashes(), tokens);
            if self.batcher.starved().is_some_and(|starved| starved < spec.arrived)
                || !self.batcher.leaves_room(&self.kv, tokens, cached, left)
            {
                return;
            }
            // One more token than the prompt: the first one's KV goes there in the first decode step.
            let Ok((table, cached)) = self.kv.open(chain.hashes(), tokens, tokens + 1, now) else { return };
            let attempt = *after;
            let source = PullSource::Handle((**handle).clone());
            self.waiting_pulls.pop_front();
            let Stage::WaitingForRoom { spec, .. } = std::mem::replace(&mut leg.stage, Stage::Running) else {
                unreachable!("matched above");
            };
            let local = (0..self.constants.groups).map(|g| table.pages(g).to_vec()).collect();
            let order = PullOrder {
                sequence: id,
                source,
                attempt,
                local,
                skip_blocks: cached / BLOCK_TOKENS,
                deadline: leg.deadline,
                traceparent: leg.traceparent.clone(),
                request_name: leg.request_name.clone(),
            };
            leg.stage = Stage::Pulling { spec, table, purpose: Purpose::TakeOver };
            self.enter(id, StageName::Transfer);
            self.output.push(Output::Pull(Box::new(order)));
        }
    }

    /// Hand-offs for which no room has come go back to their router, which knows other workers: the owner of
    /// the pages may go on with them itself. Where nobody here decodes, room can only come from elsewhere, and
    /// whoever has it may be waiting for room here.
    pub(super) fn refuse_roomless(&mut self, now: Time) {
        let patience = self.room_patience();
        let overdue = |leg: &super::legs::Leg| leg.arrived + patience <= now;
        while let Some(id) = self.waiting_pulls.iter().copied().find(|id| overdue(&self.legs[id])) {
            let blocks = blocks_for(self.legs[&id].known_tokens + 1);
            let counts = self.kv.counts();
            let message = format!(
                "no room for {blocks} blocks came within {} ms; {} of {} are in use",
                patience.as_millis(),
                counts.in_use,
                counts.total
            );
            self.end_leg(id, Finish::Refused(v1::RefuseReason::Overloaded, message), now);
        }
    }

    fn room_patience(&self) -> Duration {
        if self.batcher.is_decoding() { PATIENCE_BUSY } else { PATIENCE_STUCK }
    }

    /// When the first hand-off is to be sent back for want of room.
    pub(super) fn next_roomless(&self) -> Option<Time> {
        let arrived = self.waiting_pulls.iter().map(|id| self.legs[id].arrived).min()?;
        Some(arrived + self.room_patience())
    }

    /// A pull has moved so much, and `pull_done` follows.
    pub fn note_transfer(&mut self, id: SequenceId, transfer: Transfer) {
        self.costs.pulled(transfer.bytes, transfer.busy);
        self.output.push(Output::Transferred { sequence: id, transfer });
    }

    /// Every byte is here and the owner says they are good.
    ///
    /// `sums` are the checksums of the pages that came, as their owner took them.
    pub fn pull_done(
        &mut self,
        id: SequenceId,
        tokens: u32,
        bundle: FirstTokenBundle,
        sums: Vec<PageSum>,
        now: Time,
    ) {
        let Some(leg) = self.legs.get_mut(&id) else { return };
        match std::mem::replace(&mut leg.stage, Stage::Running) {
            Stage::Pulling { spec, table, purpose: Purpose::TakeOver } => {
                self.note_sums(sums);
                self.take_over(id, *spec, table, tokens, Some(bundle), now);
            }
            Stage::Pulling { spec, table, purpose: Purpose::Borrow { computed } } => {
                self.note_sums(sums);
                self.go_on_computing(id, *spec, table, computed.max(tokens), now);
            }
            Stage::Stopping { table } => {
                self.kv.close(table, now);
                leg.stage = Stage::HandedOff;
                self.remove_leg(id, Finish::Cancelled, now);
            }
            other => leg.stage = other,
        }
        self.settle(now);
    }

    /// The pull has ended without success, and nothing writes into its pages any more.
    pub fn pull_failed(&mut self, id: SequenceId, failure: PullFailure, now: Time) {
        let Some(leg) = self.legs.get_mut(&id) else { return };
        let finish = match std::mem::replace(&mut leg.stage, Stage::HandedOff) {
            // Computing is always possible.
            Stage::Pulling { spec, table, purpose: Purpose::Borrow { computed } } => {
                self.go_on_computing(id, *spec, table, computed, now);
                return self.settle(now);
            }
            Stage::Pulling { table, .. } => {
                self.kv.close(table, now);
                finish_of(failure)
            }
            Stage::Stopping { table } => {
                self.kv.close(table, now);
                Finish::Cancelled
            }
            other => {
                leg.stage = other;
                return;
            }
        };
        self.remove_leg(id, finish, now);
        self.settle(now);
    }
}

fn finish_of(failure: PullFailure) -> Finish {
    use v1::{FailReason, RefuseReason};
    match failure {
        PullFailure::Done => Finish::Cancelled,
        PullFailure::Unreachable(message) => Finish::Refused(RefuseReason::Unreachable, message),
        PullFailure::Incompatible(message) => Finish::Refused(RefuseReason::Incompatible, message),
        PullFailure::Transfer(message) => Finish::Failed(FailReason::Transfer, message),
        PullFailure::Corrupt(message) => Finish::Failed(FailReason::Corrupt, message),
        PullFailure::Lost(message) => Finish::Failed(FailReason::LeaseLost, message),
        PullFailure::Superseded => {
            Finish::Failed(FailReason::Superseded, "a newer attempt holds the lease".into())
        }
    }
}
