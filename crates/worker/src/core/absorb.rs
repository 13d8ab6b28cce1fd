//! What a step, or the passing of time, has changed: from the batcher's and the leases' events to output.

use tandem_batching::Event;
use tandem_kv_cache::{Effect, EndedWhy, FirstTokenBundle};
use tandem_proto::{convert, v1};
use tandem_types::{GroupPages, LeaseId, Time, Until, Usage, blocks_for};

use super::legs::{Finish, Purpose, Stage, StageName};
use super::{Core, Output};
use tandem_batching::SequenceId;

impl Core {
    /// Turns everything the batcher has to say into output.
    pub(super) fn absorb(&mut self, now: Time) {
        for event in self.batcher.take_events() {
            match event {
                Event::Admitted { id, cached_tokens } => self.admitted_sequence(id, cached_tokens, now),
                Event::Computed { id, tokens } => {
                    if let Some((lease, _)) = self.legs.get(&id).and_then(|leg| leg.lease.as_ref()) {
                        self.kv.progress(*lease, tokens);
                    }
                }
                Event::Scored { id, position, scores } => self.push_scores(id, position, &scores),
                Event::Token { id, position, sampled } => {
                    let Some(leg) = self.legs.get_mut(&id) else { continue };
                    let first = leg.first_token_at.replace(leg.first_token_at.unwrap_or(now)).is_none();
                    let (session, name) = (leg.session, leg.name);
                    if first && leg.until == Until::End {
                        self.enter(id, StageName::Decode);
                    }
                    if first {
                        self.begin_target(id, now);
                    }
                    self.count_drawn(1, 0, now);
                    self.push_delta(session, name, position, &sampled);
                    self.legs.get_mut(&id).expect("looked up above").last = Some(sampled);
                }
                Event::Finished { id, reason, usage } => {
                    let Some(leg) = self.legs.get_mut(&id) else { continue };
                    let usage = Usage { cached_tokens: leg.cached_tokens, ..usage };
                    leg.stage = Stage::HandedOff;
                    match reason {
                        Some(reason) => {
                            self.count_answer(usage.output_tokens, now);
                            self.remove_leg(id, Finish::Finished(reason, usage), now);
                        }
                        None => self.seal(id, usage, now),
                    }
                }
                Event::Preempted { id } => self.leave_batcher(id, Finish::Preempted, now),
                Event::Rejected { id } => {
                    let message = "the sequence does not fit into this worker's KV pool".to_owned();
                    self.leave_batcher(id, Finish::Refused(v1::RefuseReason::ContextLength, message), now);
                }
                Event::Failed { id } => {
                    let message = "the engine step failed".to_owned();
                    self.leave_batcher(id, Finish::Failed(v1::FailReason::Engine, message), now);
                }
            }
        }
        self.settle(now);
    }

    /// The batcher has forgotten this sequence by itself.
    fn leave_batcher(&mut self, id: SequenceId, finish: Finish, now: Time) {
        if let Some(leg) = self.legs.get_mut(&id) {
            leg.stage = Stage::HandedOff;
        }
        self.remove_leg(id, finish, now);
    }

    /// Pages are reserved: a prompt that will be handed off is granted at once.
    pub(super) fn admitted_sequence(&mut self, id: SequenceId, cached_tokens: u32, now: Time) {
        let Some(leg) = self.legs.get_mut(&id) else { return };
        leg.cached_tokens = leg.cached_tokens.max(cached_tokens);
        let (until, handed_over) = (leg.until, leg.first_token_at.is_some());
        if !handed_over {
            self.enter(id, StageName::Prefill);
        }
        if until != Until::FirstToken {
            return;
        }
        let leg = &self.legs[&id];
        let (session, name, deadline) = (leg.session, leg.name, leg.deadline);
        let (tokens, cached) = (leg.known_tokens, leg.cached_tokens);
        let lease = LeaseId((self.draw_id)());
        let table = self.batcher.table(id).expect("an admitted sequence has a table");
        let blocks = blocks_for(tokens) as usize;
        let groups: Vec<GroupPages> = (0..self.constants.groups)
            .map(|group| GroupPages { group, shard: 0, pages: table.pages(group)[..blocks].to_vec() })
            .collect();
        if let Err(error) = self.kv.grant(lease, table, tokens, deadline, now) {
            let message = format!("the prompt cannot be leased: {error}");
            self.end_leg(id, Finish::Refused(v1::RefuseReason::Overloaded, message), now);
            return;
        }
        self.batcher.set_leased(id, true);
        self.kv.progress(lease, cached);
        self.by_lease.insert(lease, id);
        self.legs.get_mut(&id).expect("looked up above").lease = Some((lease, groups.clone()));
        let handle = self.handle(lease, groups, tokens);
        let granted = v1::Granted { handle: Some(Box::new((&handle).into())), cached_tokens: cached };
        self.push_event(session, name, v1::event::Event::Granted(granted));
    }

    /// Prefill is done and the first token drawn: the lease can be pulled whole.
    fn seal(&mut self, id: SequenceId, usage: Usage, now: Time) {
        let leg = &self.legs[&id];
        let (Some((lease, _)), Some(sampled)) = (&leg.lease, &leg.last) else {
            // The lease was ended while the last chunk ran; its end has cancelled the leg already.
            self.remove_leg(id, Finish::HandedOff, now);
            return;
        };
        let bundle = FirstTokenBundle { sampled: sampled.clone(), usage };
        self.kv.seal(*lease, leg.known_tokens, bundle, now);
    }

    /// Carries the effects of lease changes to followers and legs until nothing is left to do.
    pub(super) fn settle(&mut self, now: Time) {
        loop {
            let effects = self.kv.take_effects();
            if effects.is_empty() {
                return;
            }
            for effect in effects {
                self.carry(effect, now);
            }
        }
    }

    fn carry(&mut self, effect: Effect, now: Time) {
        use v1::follow_event::Event as Follow;
        let (claim, event, last) = match effect {
            Effect::Ready { claim, group, first, count } => {
                let pages = self.kv.claimed_pages(claim, group);
                let pages = pages.get(first as usize..(first + count) as usize).unwrap_or_default();
                // All or none: a puller without them checks nothing.
                let sums: Option<Vec<u64>> =
                    pages.iter().map(|page| self.sums.get(group, page.page)).collect();
                let checksums = sums.unwrap_or_default();
                (claim, Follow::Ready(v1::Ready { group, shard: 0, first, count, checksums }), false)
            }
            Effect::Sealed { claim, tokens, bundle } => {
                let first_token = v1::FirstToken {
                    token: bundle.sampled.token,
                    logprob: convert::token_logprob(&bundle.sampled),
                    usage: Some(bundle.usage.into()),
                };
                (claim, Follow::Sealed(v1::Sealed { tokens, first_token: Some(first_token) }), false)
            }
            Effect::Done { claim } => (claim, Follow::Done(v1::Done {}), true),
            Effect::Superseded { claim } => (claim, Follow::Superseded(v1::Superseded {}), true),
            Effect::Lost { claim } => {
                (claim, Follow::Lost(v1::Lost { message: "the lease is over".into() }), true)
            }
            Effect::Ended { lease, why } => return self.lease_ended(lease, why, now),
        };
        self.output.push(Output::Follow { claim, event, last });
    }

    /// A lease is over. A leg that had handed off leaves; one still computing for it is cancelled.
    fn lease_ended(&mut self, lease: LeaseId, why: EndedWhy, now: Time) {
        let Some(id) = self.by_lease.remove(&lease) else { return };
        if let Some(leg) = self.legs.get_mut(&id) {
            leg.lease = None;
            let finish = match why {
                EndedWhy::Pulled | EndedWhy::Adopted => Finish::HandedOff,
                EndedWhy::Cancelled | EndedWhy::Finished => Finish::Cancelled,
                EndedWhy::Expired => {
                    Finish::Failed(v1::FailReason::LeaseLost, "the lease expired without a puller".into())
                }
            };
            self.end_leg(id, finish, now);
        }
        self.begin_waiting_grants(now);
    }

    /// Hands first-token prompts to the batcher, oldest first, as far as the leased share allows.
    ///
    /// One at a time beyond the share always fits (a lease that would be the only one is granted), so the
    /// head of this queue can wait only for leases that exist, and those end.
    pub(super) fn begin_waiting_grants(&mut self, now: Time) {
        while let Some(&id) = self.waiting_grants.front() {
            let reserved: u32 =
                self.legs.values().filter(|leg| leg.awaits_grant()).map(|l| blocks_for(l.known_tokens)).sum();
            let wanted = blocks_for(self.legs[&id].known_tokens);
            if !self.kv.can_grant(reserved, wanted) {
                return;
            }
            self.waiting_grants.pop_front();
            let leg = self.legs.get_mut(&id).expect("queued legs exist");
            let Stage::WaitingForShare { spec } = std::mem::replace(&mut leg.stage, Stage::Running) else {
                unreachable!("only waiting legs are queued");
            };
            self.compute(id, *spec, now);
        }
    }
}

impl super::legs::Leg {
    /// In the batcher, to be granted when admitted.
    fn awaits_grant(&self) -> bool {
        let computes = match self.stage {
            Stage::Running => true,
            Stage::Pulling { purpose, .. } => matches!(purpose, Purpose::Borrow { .. }),
            _ => false,
        };
        computes && self.until == Until::FirstToken && self.lease.is_none()
    }
}
