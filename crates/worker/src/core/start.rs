//! The one verb: what a `Start` must be to begin, and which way it goes.

use tandem_batching::{Origin, Scoring, SequenceId, SequenceSpec};
use tandem_kv_cache::{FirstTokenBundle, Table, chain_seed};
use tandem_proto::{convert, v1};
use tandem_types::{
    Attempt, Choice, Handle, Incarnation, LegKey, RequestId, ServiceClass, Time, Until, WorkerId, WorkerState,
};

use super::borrow::Holder;
use super::legs::{Finish, Leg, Stage, StageName};
use super::{Core, SessionId, speed};

/// Holders of a prompt's prefix that are looked at.
const HOLDERS_MAX: usize = 16;

/// A refusal: why, and a sentence for the caller.
type Refusal = (v1::RefuseReason, String);

impl Core {
    /// Begins an attempt, or refuses it in a sentence; either way its router hears of it.
    pub fn start(&mut self, session: SessionId, start: v1::Start, now: Time) {
        let name = start.leg;
        if let Err((reason, message)) = self.try_start(session, start, now) {
            let refused = v1::Refused { reason: reason as i32, message };
            self.push_event(session, name, v1::event::Event::Refused(refused));
        }
        self.settle(now);
    }

    /// Refuses a Start because the fake engine was told to.
    pub fn refuse(&mut self, session: SessionId, name: u32) {
        let refused = v1::Refused {
            reason: v1::RefuseReason::Overloaded as i32,
            message: "the fake engine was told to refuse".into(),
        };
        self.push_event(session, name, v1::event::Event::Refused(refused));
    }

    fn try_start(&mut self, session: SessionId, start: v1::Start, now: Time) -> Result<(), Refusal> {
        use v1::RefuseReason as Reason;
        if !self.sessions.contains_key(&session) {
            return Err((Reason::Invalid, "the session is over".into()));
        }
        self.check_target(&start)?;
        let until = self.check_features(&start)?;
        let handle = read_handle(&start)?;
        let (key, spec) = self.read_spec(&start, until, now)?;
        self.check_size(&spec)?;
        if self.by_name.contains_key(&(session, start.leg)) {
            return Err((Reason::Invalid, format!("leg {} is in use", start.leg)));
        }
        if self.legs.len() >= self.constants.legs_max {
            let message = format!("{} legs wait or run here, the most allowed", self.legs.len());
            return Err((Reason::Overloaded, message));
        }
        self.supersede(key, handle.as_ref(), now)?;
        let target = speed::target(&start, spec.arrived, now);
        if handle.is_none() {
            self.count_prompt(spec.tokens.len() as u32);
        }

        let id = spec.id;
        let deadline = now + std::time::Duration::from_millis(u64::from(start.remaining_ms));
        self.legs.insert(
            id,
            Leg {
                session,
                name: start.leg,
                key,
                until,
                deadline,
                arrived: now,
                known_tokens: spec.tokens.len() as u32,
                prompt_tokens: spec.prompt_tokens,
                cached_tokens: 0,
                last: None,
                lease: None,
                stage: Stage::Running,
                traceparent: Some(start.traceparent).filter(|t| !t.is_empty()),
                request_name: start.request_name,
                first_token_at: None,
                holders: read_holders(&start.holders),
                target,
            },
        );
        self.by_name.insert((session, start.leg), id);
        self.by_choice.insert((key.request, key.choice), id);
        self.enter(id, StageName::Queue);

        match handle {
            Some(handle) if handle.owner == self.constants.id => {
                self.adopt(id, spec, &handle, now);
            }
            Some(handle) => {
                let leg = self.legs.get_mut(&id).expect("inserted above");
                leg.stage = Stage::WaitingForRoom {
                    spec: Box::new(spec),
                    handle: Box::new(handle),
                    after: Attempt(start.attempt),
                };
                self.waiting_pulls.push_back(id);
                self.begin_waiting_pulls(now);
            }
            None if until == Until::FirstToken => {
                let leg = self.legs.get_mut(&id).expect("inserted above");
                leg.stage = Stage::WaitingForShare { spec: Box::new(spec) };
                self.waiting_grants.push_back(id);
                self.begin_waiting_grants(now);
            }
            None => self.compute(id, spec, now),
        }
        Ok(())
    }

    fn check_target(&self, start: &v1::Start) -> Result<(), Refusal> {
        let constants = &self.constants;
        if start.worker_incarnation != constants.incarnation.0 {
            let message = format!("{} has restarted since the route was chosen", constants.id);
            return Err((v1::RefuseReason::StaleTarget, message));
        }
        if self.state() == WorkerState::Draining {
            return Err((v1::RefuseReason::Draining, format!("{} is draining", constants.id)));
        }
        if start.epoch != self.epoch.0 {
            let message =
                format!("{} is in epoch {}, the route was for {}", constants.id, self.epoch.0, start.epoch);
            return Err((v1::RefuseReason::StaleTarget, message));
        }
        Ok(())
    }

    fn check_features(&self, start: &v1::Start) -> Result<Until, Refusal> {
        let until = convert::until(start.until).map_err(|e| (v1::RefuseReason::Invalid, e.to_string()))?;
        let unsupported =
            |what: &str| Err((v1::RefuseReason::Unsupported, format!("{what} is not supported")));
        if until == Until::Hidden {
            return unsupported("computing hidden states");
        }
        match v1::RowsWanted::try_from(start.rows_wanted) {
            Ok(v1::RowsWanted::None) => {}
            Ok(v1::RowsWanted::PromptLogprobs) if start.inputs.is_empty() => {}
            Ok(v1::RowsWanted::PromptLogprobs) => {
                let message = "what was computed elsewhere cannot be scored here".to_owned();
                return Err((v1::RefuseReason::Invalid, message));
            }
            _ => return unsupported("returning rows of the prompt"),
        }
        if !start.adapter.is_empty() {
            return unsupported("an adapter");
        }
        if start.inputs.len() > 1 {
            return unsupported("more than one input");
        }
        Ok(until)
    }

    fn read_spec(
        &mut self,
        start: &v1::Start,
        until: Until,
        now: Time,
    ) -> Result<(LegKey, SequenceSpec), Refusal> {
        let invalid = |message: String| (v1::RefuseReason::Invalid, message);
        let request =
            convert::read_id128("Start.request", &start.request).map_err(|e| invalid(e.to_string()))?;
        let prompt = start.prompt_tokens as usize;
        if prompt == 0 || prompt > start.tokens.len() {
            return Err(invalid(format!("prompt_tokens is {prompt} of {} tokens", start.tokens.len())));
        }
        let sampling = start.sampling.as_ref().ok_or_else(|| invalid("sampling is missing".into()))?;
        let stop = start.stop.as_ref().ok_or_else(|| invalid("stop is missing".into()))?;
        if (start.tokens.len() - prompt) as u32 >= stop.max_tokens {
            return Err(invalid(format!("max_tokens {} are drawn already", stop.max_tokens)));
        }
        let constants = &self.constants;
        let id = SequenceId(self.next_sequence);
        self.next_sequence += 1;
        let waited = std::time::Duration::from_millis(u64::from(start.waited_ms));
        let spec = SequenceSpec {
            id,
            tokens: start.tokens.clone(),
            prompt_tokens: start.prompt_tokens,
            until,
            sampling: sampling.into(),
            choice: Choice(start.choice),
            stop: stop.into(),
            class: match start.class() {
                v1::ServiceClass::Offline => ServiceClass::Offline,
                _ => ServiceClass::Online,
            },
            arrived: Time(now.0.saturating_sub(waited.as_nanos() as u64)),
            seed: chain_seed(&constants.identity, constants.strict, &start.salt, &start.adapter),
            score: (start.rows_wanted() == v1::RowsWanted::PromptLogprobs)
                .then_some(Scoring { from: start.score_from.max(1), top: start.score_top }),
        };
        let key = LegKey {
            request: RequestId(request),
            choice: Choice(start.choice),
            attempt: Attempt(start.attempt),
        };
        Ok((key, spec))
    }

    fn check_size(&self, spec: &SequenceSpec) -> Result<(), Refusal> {
        let tokens = spec.tokens.len() as u32;
        let context = self.constants.context_tokens;
        if tokens >= context {
            let message = format!("{tokens} tokens leave no room to answer in a context of {context}");
            return Err((v1::RefuseReason::ContextLength, message));
        }
        if !self.kv.fits_ever(tokens + 1) {
            let counts = self.kv.counts();
            let message = format!(
                "{tokens} tokens and one more do not fit into this worker's KV pool of {} blocks of {} tokens",
                counts.total,
                tandem_types::BLOCK_TOKENS
            );
            return Err((v1::RefuseReason::ContextLength, message));
        }
        Ok(())
    }

    /// Ends older attempts of the same choice here, but not the lease that this Start is about to use.
    fn supersede(&mut self, key: LegKey, handle: Option<&Handle>, now: Time) -> Result<(), Refusal> {
        let Some(&old) = self.by_choice.get(&(key.request, key.choice)) else { return Ok(()) };
        let leg = &self.legs[&old];
        if leg.key.attempt >= key.attempt {
            let message = format!("attempt {} is here already", leg.key.attempt.0);
            return Err((v1::RefuseReason::Invalid, message));
        }
        let uses_its_lease =
            matches!((handle, &leg.lease), (Some(handle), Some((lease, _))) if *lease == handle.lease);
        if !uses_its_lease {
            self.end_leg(old, Finish::Superseded, now);
        }
        Ok(())
    }

    /// Takes over pages that this worker itself granted, without copying.
    fn adopt(&mut self, id: SequenceId, spec: SequenceSpec, handle: &Handle, now: Time) {
        let attempt = self.legs[&id].key.attempt;
        match self.kv.adopt(handle.lease, attempt, now) {
            Ok(adopted) => self.take_over(id, spec, adopted.table, adopted.tokens, Some(adopted.bundle), now),
            Err(error) => {
                let message = format!("the lease cannot be adopted: {error}");
                self.end_leg(id, Finish::Failed(v1::FailReason::LeaseLost, message), now);
            }
        }
    }

    /// All KV of `spec.tokens` is in `table`, and `bundle` has the token that follows: go on from there.
    pub(super) fn take_over(
        &mut self,
        id: SequenceId,
        mut spec: SequenceSpec,
        table: Table,
        computed: u32,
        bundle: Option<FirstTokenBundle>,
        now: Time,
    ) {
        let Some(leg) = self.legs.get_mut(&id) else {
            self.kv.close(table, now);
            return;
        };
        let (Some(bundle), true) = (bundle, computed == spec.tokens.len() as u32) else {
            self.kv.close(table, now);
            let message = format!("the hand-off holds {computed} of {} tokens", spec.tokens.len());
            self.end_leg(id, Finish::Refused(v1::RefuseReason::Invalid, message), now);
            return;
        };
        leg.stage = Stage::Running;
        leg.cached_tokens = bundle.usage.cached_tokens;
        leg.first_token_at = Some(now);
        let (session, name) = (leg.session, leg.name);
        let position = spec.tokens.len() as u32 - spec.prompt_tokens;
        spec.tokens.push(bundle.sampled.token);
        self.enter(id, StageName::Decode);
        self.push_delta(session, name, position, &bundle.sampled);
        self.add_to_batch(id, spec, Origin::Computed { table, computed }, now);
    }
}

fn read_holders(holders: &[v1::Holder]) -> Vec<Holder> {
    let read = |holder: &v1::Holder| Holder {
        worker: WorkerId(holder.worker.clone()),
        incarnation: Incarnation(holder.incarnation),
        lender: holder.lender.clone(),
        blocks: holder.blocks,
    };
    holders.iter().take(HOLDERS_MAX).map(read).collect()
}

fn read_handle(start: &v1::Start) -> Result<Option<Handle>, Refusal> {
    let Some(input) = start.inputs.first() else { return Ok(None) };
    if input.kind() != v1::HandleKind::HandOff {
        return Err((v1::RefuseReason::Unsupported, "only hand-offs are supported as inputs".into()));
    }
    let handle = Handle::try_from(input).map_err(|e| (v1::RefuseReason::Invalid, e.to_string()))?;
    Ok(Some(handle))
}
