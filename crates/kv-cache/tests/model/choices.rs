//! What can happen next.

use tandem_types::Time;

use crate::action::{Action, Who};
use crate::bounds::*;
use crate::world::*;

impl State {
    /// What must happen sooner or later, because a message, a step or a decision is pending. Nothing of it: rest.
    pub fn pending(&self, bounds: &Bounds) -> Vec<Action> {
        let mut actions = Vec::new();
        self.router_may(bounds, &mut actions);
        if !self.to_owner.is_empty() {
            actions.push(Action::OwnerReads);
        }
        for decoder in 0..2 {
            if !self.to_decoder[decoder].is_empty() {
                actions.push(Action::DecoderReads(decoder));
            }
        }
        self.owner_may(&mut actions);
        for (at, stream) in self.streams.iter().enumerate() {
            if stream.claiming {
                actions.push(Action::Claim(at));
                if !stream.followed {
                    actions.push(Action::ClaimIsGone(at));
                }
            }
            if !stream.down.is_empty() && stream.followed {
                actions.push(Action::Hear(at));
            }
            if stream.broken && stream.followed {
                actions.push(Action::PullerNotices(at));
            }
            if stream.served && !stream.claiming && (stream.broken || !stream.followed) {
                actions.push(Action::OwnerNotices(at));
            }
        }
        for (at, read) in self.reads.iter().enumerate() {
            actions.push(match read.reading {
                Reading::Asked => Action::BeginRead(at),
                Reading::Halfway { .. } => Action::EndRead(at),
                Reading::Failed => Action::ReadFails(at),
            });
        }
        actions.extend((0..self.ends.len()).map(Action::Judge));
        actions.extend((0..self.lends.len()).map(Action::LendOut));
        actions.extend((0..self.lent.len()).map(Action::Lent));
        for decoder in 0..2 {
            for leg in &self.decoders[decoder].legs {
                if self.now >= DEADLINE {
                    actions.push(Action::Late(decoder, leg.key));
                }
            }
        }
        actions
    }

    pub fn router_may(&self, bounds: &Bounds, actions: &mut Vec<Action>) {
        if !self.router {
            return;
        }
        for (at, request) in self.requests.iter().enumerate() {
            let at = at as u8;
            // The requests are alike: the first one comes first.
            let turn = at == 0 || self.requests[0].attempt > 0 || self.requests[0].ended.is_some();
            if request.ended.is_some() || !turn {
                continue;
            }
            if self.now >= DEADLINE
                || request.attempt == bounds.attempts[at as usize] && request.decode.is_none()
            {
                let waits = request.prefill.is_some() && request.handle.is_none() && self.now < DEADLINE;
                if !waits {
                    actions.push(Action::GiveUp(at));
                    continue;
                }
            }
            if request.decode.is_some() || request.attempt == bounds.attempts[at as usize] {
                continue;
            }
            if request.prefill.is_none() {
                actions.push(Action::Place(at));
            } else if request.handle.is_some() && (bounds.overlap || request.first_token) {
                actions.push(Action::Decode(at, Some(0)));
                // Decoders that do nothing are alike.
                if bounds.second == Second::Borrow || !self.idle(0) || !self.idle(1) {
                    actions.push(Action::Decode(at, Some(1)));
                }
                if bounds.adopts {
                    actions.push(Action::Decode(at, None));
                }
            }
        }
    }

    pub fn idle(&self, d: usize) -> bool {
        self.to_decoder[d].is_empty() && self.decoders[d].legs.is_empty()
    }

    pub fn owner_may(&self, actions: &mut Vec<Action>) {
        let owner = &self.owner;
        let mut queue = true;
        for (at, leg) in owner.legs.iter().enumerate() {
            let stepping = owner.steps.iter().any(|step| step.key == leg.key);
            match &leg.stage {
                Stage::Waiting => {
                    let counts = owner.kv.counts();
                    let room = counts.free + counts.cached >= BLOCKS && owner.kv.can_grant(0, BLOCKS);
                    if std::mem::take(&mut queue) && room {
                        actions.push(Action::Admit(at));
                    }
                }
                Stage::Running { .. } if !stepping => actions.push(Action::Submit(at)),
                Stage::Decoding { wrote, .. } if !stepping => {
                    actions.push(if *wrote { Action::Leave(at) } else { Action::Append(at) });
                }
                Stage::Running { .. } | Stage::Decoding { .. } | Stage::HandedOff => {}
            }
        }
        actions.extend((0..owner.steps.len()).map(Action::Collect));
        if owner.kv.next_expiry().is_some_and(|due| due <= self.now) {
            actions.push(Action::Expire);
        }
    }

    /// What may happen besides: time, clients, and faults.
    pub fn possible(&self, bounds: &Bounds, actions: &mut Vec<Action>) {
        if bounds.time && self.now < HORIZON {
            actions.push(Action::Pass);
        }
        let open = |at: u8| self.router && self.requests[at as usize].ended.is_none();
        for at in 0..2 {
            if bounds.cancels && open(at) {
                actions.push(Action::ClientLeaves(at));
            }
            if self.now > Time::ZERO && self.now <= DEADLINE && self.owner.kv.lease_count() > 0 {
                actions.push(Action::Renew(at));
            }
        }
        for (at, step) in self.owner.steps.iter().enumerate() {
            let last = step.page == self.last_page(step.key);
            if last && step.key.request < 2 {
                actions.push(Action::FinishWithFirst(at));
            }
        }
        let own = self.owner.legs.iter().any(|leg| leg.key == OWN_WORK);
        let room = self.owner.kv.counts().free + self.owner.kv.counts().cached >= BLOCKS;
        let spent = self.owner.memory.iter().any(|bytes| bytes[0].content > 4);
        if bounds.second == Second::Borrow && !own && room && !spent && self.owner.steps.is_empty() {
            actions.push(Action::OwnWork);
        }
        if self.flips > 0 {
            actions.extend([Action::Flip(None), Action::Flip(Some(0))]);
        }
        if self.faults > 0 {
            self.faults(bounds, actions);
        }
    }

    pub fn last_page(&self, key: Key) -> u32 {
        let leg = self.owner.legs.iter().find(|leg| leg.key == key);
        match leg.map(|leg| &leg.stage) {
            Some(Stage::Running { table, .. }) => table.pages(0)[BLOCKS as usize - 1].page,
            _ => u32::MAX,
        }
    }

    pub fn faults(&self, bounds: &Bounds, actions: &mut Vec<Action>) {
        if self.router {
            actions.push(Action::Crash(Who::Router));
            if !self.to_owner.is_empty() || !self.owner.legs.is_empty() {
                actions.push(Action::BreakSession(Who::Owner));
            }
        }
        if !self.owner.legs.is_empty() || self.owner.kv.lease_count() > 0 || !self.streams.is_empty() {
            actions.push(Action::Crash(Who::Owner));
        }
        for d in 0..2 {
            if !self.idle(d) {
                actions.push(Action::Crash(Who::Decoder(d)));
                if self.router {
                    actions.push(Action::BreakSession(Who::Decoder(d)));
                }
            }
            for leg in &self.decoders[d].legs {
                actions.push(Action::Refuse(d, leg.key));
            }
        }
        for (at, request) in self.requests.iter().enumerate() {
            if self.router && request.ended.is_none() && request.decode.is_some_and(|d| d.decoder.is_some()) {
                actions.push(Action::Distrust(at as u8));
            }
        }
        for (at, stream) in self.streams.iter().enumerate() {
            if !stream.broken && stream.followed && stream.served {
                actions.push(Action::BreakStream(at));
            }
            if stream.claiming && stream.copy == 0 {
                actions.push(Action::DoubleClaim(at));
            }
        }
        for (at, read) in self.reads.iter().enumerate() {
            match read.reading {
                Reading::Asked => {
                    actions.push(Action::LoseRead(at));
                    if !bounds.one_sided {
                        actions.push(Action::DoubleRead(at));
                    }
                }
                Reading::Halfway { .. } => {
                    actions.push(Action::LoseRead(at));
                    if bounds.checksums {
                        actions.push(Action::FlipBits(at));
                    }
                }
                Reading::Failed => {}
            }
        }
        for (at, end) in self.ends.iter().enumerate() {
            actions.push(Action::LoseEnd(at));
            actions.push(Action::DoubleEnd(at));
            if end.awaited {
                actions.extend([Action::DelayEnd(at), Action::LoseReply(at)]);
            }
        }
        for (at, lend) in self.lends.iter().enumerate() {
            actions.push(Action::LoseLend(at));
            if lend.copy == 0 {
                actions.push(Action::DoubleLend(at));
            }
        }
        actions.extend((0..self.lent.len()).map(Action::LoseLent));
        if bounds.given_back_twice && !self.given_back_twice {
            for (at, leg) in self.owner.legs.iter().enumerate() {
                if matches!(leg.stage, Stage::HandedOff) {
                    actions.push(Action::GiveBackTwice(at));
                }
            }
        }
    }

    /// What need not wait: nobody can tell whether it happens now or later, or later is an order of events that
    /// another choice before it brings about too. This is what keeps the number of states small.
    pub fn certain(&self) -> Option<Action> {
        // A Start that arrives late is a Start sent late, unless a role may change or the stream may break.
        let early = self.flips == 0;
        match self.to_owner.first() {
            Some(ToOwner::Start(..)) if early => return Some(Action::OwnerReads),
            Some(ToOwner::Cancel(key)) if !self.owner.legs.iter().any(|leg| leg.key == *key) => {
                return Some(Action::OwnerReads);
            }
            Some(ToOwner::SessionClosed) if self.owner.legs.iter().all(|leg| leg.key == OWN_WORK) => {
                return Some(Action::OwnerReads);
            }
            _ => {}
        }
        for d in 0..2 {
            let here = |key: &Key| self.decoders[d].legs.iter().any(|leg| leg.key == *key);
            match self.to_decoder[d].first() {
                Some(ToDecoder::Start(..) | ToDecoder::Borrow(..)) if early => {
                    return Some(Action::DecoderReads(d));
                }
                Some(ToDecoder::Cancel(key)) if !here(key) => return Some(Action::DecoderReads(d)),
                Some(ToDecoder::SessionClosed) if self.decoders[d].legs.is_empty() => {
                    return Some(Action::DecoderReads(d));
                }
                _ => {}
            }
        }
        // A batch that is computed later is a prompt that is placed later.
        let mut owner = Vec::new();
        self.owner_may(&mut owner);
        if let Some(at) = owner.iter().find(|at| matches!(at, Action::Admit(_) | Action::Submit(_))) {
            return Some(*at);
        }
        for (at, stream) in self.streams.iter().enumerate() {
            // The end of a claim that does not stand changes nothing.
            let idle = stream.claim.is_none_or(|claim| self.owner.kv.claimed_pages(claim, 0).is_empty());
            if stream.served && !stream.claiming && (stream.broken || !stream.followed) && idle {
                return Some(Action::OwnerNotices(at));
            }
            let good = |down: &Down| matches!(down, Down::Claimed(_) | Down::Ready(..) | Down::Sealed(..));
            let heard = stream.followed && !stream.down.is_empty() && stream.down.iter().all(good);
            if heard {
                return Some(Action::Hear(at));
            }
        }
        self.reads.iter().position(|read| matches!(read.reading, Reading::Failed)).map(Action::ReadFails)
    }
}
