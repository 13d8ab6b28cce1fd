//! What can happen next, and what follows from it.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use tandem_kv_cache::{Effect, FirstTokenBundle, FollowError, GiveUp, PullAction, PullEvent, Puller, Verdict};
use tandem_types::{Attempt, BLOCK_TOKENS, ClaimId, LeaseId};

use crate::world::*;

/// One thing that happens. Streams, reads and messages are named by their place in the state's lists.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    // The router.
    Place(u8),
    Decode(u8, Option<usize>),
    GiveUp(u8),
    ClientLeaves(u8),
    // Sessions, in order.
    OwnerReads,
    DecoderReads(usize),
    // The owner.
    Admit(usize),
    Submit(usize),
    Collect(usize),
    FinishWithFirst(usize),
    OwnWork,
    Append(usize),
    Leave(usize),
    Expire,
    Renew(u8),
    // Follow.
    Claim(usize),
    ClaimIsGone(usize),
    Hear(usize),
    PullerNotices(usize),
    OwnerNotices(usize),
    // Pulls.
    BeginRead(usize),
    EndRead(usize),
    ReadFails(usize),
    // Verdicts and loans.
    Judge(usize),
    LendOut(usize),
    Lent(usize),
    Late(usize, Key),
    // Nobody's doing.
    Pass,
    Flip(Option<usize>),
    // Faults.
    Crash(Who),
    BreakSession(Who),
    BreakStream(usize),
    DoubleClaim(usize),
    LoseRead(usize),
    DoubleRead(usize),
    FlipBits(usize),
    LoseEnd(usize),
    DelayEnd(usize),
    DoubleEnd(usize),
    LoseReply(usize),
    LoseLend(usize),
    DoubleLend(usize),
    LoseLent(usize),
    Distrust(u8),
    Refuse(usize, Key),
    GiveBackTwice(usize),
}

/// A process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Who {
    Router,
    Owner,
    Decoder(usize),
}

impl Action {
    /// Whether it costs one of the faults of a run.
    pub fn is_fault(self) -> bool {
        use Action::*;
        matches!(
            self,
            Crash(_)
                | BreakSession(_)
                | BreakStream(_)
                | DoubleClaim(_)
                | LoseRead(_)
                | DoubleRead(_)
                | FlipBits(_)
                | LoseEnd(_)
                | DelayEnd(_)
                | DoubleEnd(_)
                | LoseReply(_)
                | LoseLend(_)
                | DoubleLend(_)
                | LoseLent(_)
                | Distrust(_)
                | Refuse(..)
                | GiveBackTwice(_)
        )
    }
}

/// The attempt of the work that the owner does beside the requests.
const OWN_WORK: Key = Key { request: 2, attempt: 1 };

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

    fn router_may(&self, bounds: &Bounds, actions: &mut Vec<Action>) {
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
            if self.now >= DEADLINE || request.attempt == bounds.attempts[at as usize] && request.decode.is_none() {
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

    fn idle(&self, d: usize) -> bool {
        self.to_decoder[d].is_empty() && self.decoders[d].legs.is_empty()
    }

    fn owner_may(&self, actions: &mut Vec<Action>) {
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
            if self.now > tandem_types::Time::ZERO && self.now <= DEADLINE && self.owner.kv.lease_count() > 0 {
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

    fn last_page(&self, key: Key) -> u32 {
        let leg = self.owner.legs.iter().find(|leg| leg.key == key);
        match leg.map(|leg| &leg.stage) {
            Some(Stage::Running { table, .. }) => table.pages(0)[BLOCKS as usize - 1].page,
            _ => u32::MAX,
        }
    }

    fn faults(&self, bounds: &Bounds, actions: &mut Vec<Action>) {
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

    /// The state after an action. An assertion of the code that fails is part of it.
    pub fn after(&self, bounds: &Bounds, action: Action) -> State {
        let mut next = self.clone();
        if action.is_fault() {
            next.faults -= 1;
        }
        let done = catch_unwind(AssertUnwindSafe(|| {
            next.act(bounds, action);
            while let Some(action) = next.certain() {
                next.act(bounds, action);
            }
            next.tidy(bounds, &self.owner);
        }));
        if done.is_err() {
            next = self.clone();
            next.wrong = Some(Wrong::Panicked);
        }
        next
    }

    /// What need not wait: nobody can tell whether it happens now or later, or later is an order of events that
    /// another choice before it brings about too. This is what keeps the number of states small.
    fn certain(&self) -> Option<Action> {
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

    fn act(&mut self, bounds: &Bounds, action: Action) {
        match action {
            Action::Place(r) => self.place(bounds, r),
            Action::Decode(r, decoder) => self.decode(r, decoder),
            Action::GiveUp(r) => self.end_request(r, Ended::Failed),
            Action::ClientLeaves(r) => self.end_request(r, Ended::Gone),
            Action::OwnerReads => {
                let message = self.to_owner.remove(0);
                self.owner_reads(bounds, message);
            }
            Action::DecoderReads(d) => {
                let message = self.to_decoder[d].remove(0);
                self.decoder_reads(bounds, d, message);
            }
            Action::Admit(at) => self.admit(bounds, at),
            Action::Submit(at) => self.submit(bounds, at),
            Action::Collect(at) => self.collect(bounds, at, false),
            Action::FinishWithFirst(at) => self.collect(bounds, at, true),
            Action::OwnWork => self.own_work(bounds),
            Action::Append(at) => self.append(at),
            Action::Leave(at) => self.leave(at),
            Action::Expire => {
                let now = self.now;
                self.kv(|kv| kv.expire(now));
                let after = self.owner.kv.lease_count();
                if self.now >= DEADLINE && after > 0 {
                    self.wrong = Some(Wrong::Outlived);
                }
            }
            Action::Renew(r) => self.renew(r),
            Action::Claim(at) => self.claim(at),
            Action::ClaimIsGone(at) => drop(self.streams.remove(at)),
            Action::Hear(at) => self.hear(at),
            Action::PullerNotices(at) => {
                let stream = Arc::make_mut(&mut self.streams[at]);
                stream.followed = false;
                let key = stream.key;
                self.tell(key, PullEvent::StreamClosed(String::new()));
            }
            Action::OwnerNotices(at) => {
                let claim = self.streams[at].claim;
                Arc::make_mut(&mut self.streams[at]).served = false;
                if let Some(claim) = claim {
                    self.without_harm(claim, |kv, now| kv.unfollow(claim, now));
                }
            }
            Action::BeginRead(at) => self.begin_read(bounds, at),
            Action::EndRead(at) => self.end_read(bounds, at, false),
            Action::FlipBits(at) => self.end_read(bounds, at, true),
            Action::ReadFails(at) | Action::LoseRead(at) => {
                let read = self.reads.remove(at);
                if let Reading::Halfway { hold: Some(hold), .. } = read.reading {
                    self.kv(|kv| kv.release(hold.0));
                }
                self.tell(read.key, PullEvent::Broken(read.id, String::new()));
            }
            Action::DoubleRead(at) => self.reads.push(self.reads[at].clone()),
            Action::Judge(at) => self.judge(at),
            Action::LoseReply(at) => {
                let key = self.ends[at].key;
                self.ends[at].awaited = false;
                self.judge(at);
                self.ask_again(key);
            }
            Action::LoseEnd(at) => {
                let end = self.ends.remove(at);
                if end.awaited {
                    self.ask_again(end.key);
                }
            }
            Action::DelayEnd(at) => {
                self.ends[at].awaited = false;
                self.ask_again(self.ends[at].key);
            }
            Action::DoubleEnd(at) => self.ends.push(End { awaited: false, ..self.ends[at] }),
            Action::LendOut(at) => self.lend_out(bounds, at),
            Action::Lent(at) => {
                let (key, handle) = self.lent.remove(at);
                self.lent(bounds, key, handle);
            }
            Action::LoseLend(at) => {
                let lend = self.lends.remove(at);
                if lend.awaited {
                    self.lent(bounds, lend.key, None);
                }
            }
            Action::DoubleLend(at) => self.lends.push(Lend { copy: 1, awaited: false, ..self.lends[at] }),
            Action::LoseLent(at) => {
                let (key, _) = self.lent.remove(at);
                self.lent(bounds, key, None);
            }
            Action::Late(_, key) => match self.leg(key) {
                Some(leg) if leg.puller.is_some() => self.tell(key, PullEvent::Deadline),
                _ => self.leave_decoder(key, Some(false)),
            },
            Action::Pass => {
                self.now.0 += 1;
                // Old verdicts are forgotten with whatever comes next; leases have a timer of their own.
                if self.owner.kv.next_expiry().is_none_or(|due| due > self.now) {
                    let now = self.now;
                    self.kv(|kv| kv.expire(now));
                }
            }
            Action::Flip(who) => {
                self.flips -= 1;
                match who {
                    None => self.owner_mut().epoch += 1,
                    Some(d) => Arc::make_mut(&mut self.decoders[d]).epoch += 1,
                }
            }
            Action::Crash(who) => self.crash(bounds, who),
            Action::BreakSession(Who::Owner) => self.lose_owner_session(),
            Action::BreakSession(Who::Decoder(d)) => self.lose_decoder_session(d),
            Action::BreakSession(Who::Router) => unreachable!("sessions are named by their worker"),
            Action::BreakStream(at) => {
                let stream = Arc::make_mut(&mut self.streams[at]);
                stream.broken = true;
                stream.claiming = false;
                stream.down.clear();
            }
            Action::DoubleClaim(at) => {
                let copy = Stream { copy: 1, followed: false, ..(*self.streams[at]).clone() };
                self.streams.push(Arc::new(copy));
            }
            Action::Distrust(r) => {
                self.drop_decode(r);
                self.requests[r as usize].decode = None;
            }
            Action::Refuse(_, key) => {
                let leg = self.leg(key).expect("it is here");
                let refusal = leg.handle.zip(leg.claim);
                self.leave_decoder(key, Some(false));
                if let Some((handle, claim)) = refusal {
                    self.ends.push(End { key, handle, claim, complete: false, awaited: false });
                }
            }
            Action::GiveBackTwice(at) => {
                self.given_back_twice = true;
                let lease = self.owner.legs[at].lease.expect("handed off");
                let pages = self.owner.kv.lease_pages(lease)[0].clone();
                self.owner_mut().kv.give_back_once_more(&pages);
            }
        }
    }

    // ------------------------------------------------------------------ the router

    fn place(&mut self, bounds: &Bounds, r: u8) {
        let request = &mut self.requests[r as usize];
        request.attempt += 1;
        let key = Key { request: r, attempt: request.attempt };
        if bounds.second == Second::Borrow && r == 1 {
            request.decode = Some(Decode { attempt: key.attempt, decoder: Some(1) });
            self.to_decoder[1].push(ToDecoder::Borrow(key, self.decoders[1].epoch));
            return;
        }
        request.prefill = Some(key.attempt);
        request.handle = None;
        request.first_token = false;
        self.to_owner.push(ToOwner::Start(key, self.owner.epoch));
    }

    fn decode(&mut self, r: u8, decoder: Option<usize>) {
        let request = &mut self.requests[r as usize];
        request.attempt += 1;
        let key = Key { request: r, attempt: request.attempt };
        let handle = request.handle.expect("granted");
        request.decode = Some(Decode { attempt: key.attempt, decoder });
        match decoder {
            Some(d) => {
                self.to_decoder[d].push(ToDecoder::Start(key, handle, self.decoders[d].epoch));
            }
            None => self.to_owner.push(ToOwner::Adopt(key, handle.lease, self.owner.epoch)),
        }
    }

    /// Drops whatever the request has, and that cancels it everywhere.
    fn end_request(&mut self, r: u8, ended: Ended) {
        self.drop_decode(r);
        let request = &mut self.requests[r as usize];
        if let Some(attempt) = request.prefill {
            self.to_owner.push(ToOwner::Cancel(Key { request: r, attempt }));
        }
        *request = Request { ended: Some(ended), attempt: u8::MAX, ..Request::default() };
    }

    fn drop_decode(&mut self, r: u8) {
        let Some(Decode { attempt, decoder }) = self.requests[r as usize].decode else { return };
        let key = Key { request: r, attempt };
        match decoder {
            Some(d) => self.to_decoder[d].push(ToDecoder::Cancel(key)),
            None => self.to_owner.push(ToOwner::Cancel(key)),
        }
    }

    /// The decode attempt has sent its first token, or will not.
    fn outcome(&mut self, key: Key, well: bool) {
        let request = &mut self.requests[key.request as usize];
        if request.decode.is_none_or(|decode| decode.attempt != key.attempt) {
            return;
        }
        if well {
            // The leg goes on, and what it does then is not looked at here.
            request.decode = None;
            self.end_request(key.request, Ended::Well);
        } else {
            request.decode = None;
        }
    }

    /// The prefill attempt is over at the owner.
    fn released(&mut self, key: Key) {
        let Some(request) = self.requests.get_mut(key.request as usize) else { return };
        if request.prefill == Some(key.attempt) {
            (request.prefill, request.handle, request.first_token) = (None, None, false);
        }
    }

    fn lose_owner_session(&mut self) {
        self.to_owner.clear();
        self.to_owner.push(ToOwner::SessionClosed);
        for request in &mut self.requests {
            (request.prefill, request.handle, request.first_token) = (None, None, false);
            if request.decode.is_some_and(|decode| decode.decoder.is_none()) {
                request.decode = None;
            }
        }
    }

    fn lose_decoder_session(&mut self, d: usize) {
        self.to_decoder[d].clear();
        self.to_decoder[d].push(ToDecoder::SessionClosed);
        for request in &mut self.requests {
            if request.decode.is_some_and(|decode| decode.decoder == Some(d)) {
                request.decode = None;
            }
        }
    }

    // ------------------------------------------------------------------ the owner

    fn owner_mut(&mut self) -> &mut Owner {
        Arc::make_mut(&mut self.owner)
    }

    /// Changes the owner's bookkeeping and carries the effects to whom they concern.
    fn kv<T>(&mut self, change: impl FnOnce(&mut tandem_kv_cache::KvCache) -> T) -> T {
        let result = change(&mut self.owner_mut().kv);
        self.settle();
        result
    }

    fn settle(&mut self) {
        loop {
            let effects = self.owner_mut().kv.take_effects();
            if effects.is_empty() {
                return;
            }
            effects.into_iter().for_each(|effect| self.carry(effect));
        }
    }

    fn carry(&mut self, effect: Effect) {
        let (claim, down) = match effect {
            Effect::Ready { claim, first, count, .. } => {
                let pages = self.owner.kv.claimed_pages(claim, 0);
                let pages = pages[first as usize..(first + count) as usize].iter();
                let words = pages.map(|page| self.owner.memory[page.page as usize][0]).collect();
                (claim, Down::Ready(first, words))
            }
            Effect::Sealed { claim, tokens, bundle } => (claim, Down::Sealed(tokens, bundle)),
            Effect::Done { claim } => (claim, Down::Done),
            Effect::Superseded { claim } => (claim, Down::Superseded),
            Effect::Lost { claim } => (claim, Down::Lost),
            Effect::Ended { lease, .. } => return self.lease_ended(lease),
        };
        let stream = self.streams.iter_mut().find(|stream| stream.claim == Some(claim));
        if let Some(stream) = stream.filter(|stream| stream.followed && !stream.broken && stream.served) {
            Arc::make_mut(stream).down.push(down);
        }
    }

    fn lease_ended(&mut self, lease: LeaseId) {
        let Some(at) = self.owner.legs.iter().position(|leg| leg.lease == Some(lease)) else { return };
        self.owner_mut().legs[at].lease = None;
        let key = self.owner.legs[at].key;
        self.end_owner_leg(key);
    }

    /// Frees all that an attempt holds and tells the router. A step under way keeps its page until it is done.
    fn end_owner_leg(&mut self, key: Key) {
        let Some(at) = self.owner.legs.iter().position(|leg| leg.key == key) else { return };
        let leg = self.owner_mut().legs.remove(at);
        let now = self.now;
        match leg.stage {
            Stage::Running { table, .. } => self.kv(|kv| kv.close(table, now)),
            Stage::Decoding { table, .. } => {
                self.kv(|kv| kv.close(table, now));
                self.outcome(key, false);
            }
            Stage::Waiting | Stage::HandedOff => {}
        }
        if let Some(lease) = leg.lease {
            self.kv(|kv| kv.cancel_lease(lease, now));
        }
        self.released(key);
    }

    fn owner_reads(&mut self, bounds: &Bounds, message: ToOwner) {
        match message {
            ToOwner::Start(key, epoch) => {
                if epoch != self.owner.epoch {
                    return self.released(key);
                }
                let older = self.owner.legs.iter().find(|leg| leg.key.request == key.request);
                if let Some(older) = older.map(|leg| leg.key) {
                    self.end_owner_leg(older);
                }
                self.owner_mut().legs.push(OwnerLeg { key, lease: None, stage: Stage::Waiting });
            }
            ToOwner::Adopt(key, lease, epoch) => {
                let now = self.now;
                let attempt = Attempt(u32::from(key.attempt));
                if epoch != self.owner.epoch {
                    return self.outcome(key, false);
                }
                match self.kv(|kv| kv.adopt(lease, attempt, now)) {
                    Ok(adopted) => {
                        let stage = Stage::Decoding { table: adopted.table, wrote: false };
                        self.check_pages(bounds, key, &stage);
                        self.owner_mut().legs.push(OwnerLeg { key, lease: None, stage });
                    }
                    Err(_) => self.outcome(key, false),
                }
            }
            ToOwner::Cancel(key) => self.end_owner_leg(key),
            ToOwner::SessionClosed => {
                let keys: Vec<Key> = self.owner.legs.iter().map(|leg| leg.key).collect();
                keys.into_iter().filter(|key| *key != OWN_WORK).for_each(|key| self.end_owner_leg(key));
            }
        }
    }

    /// Pages that are taken over hold what they should.
    fn check_pages(&mut self, bounds: &Bounds, key: Key, stage: &Stage) {
        let Stage::Decoding { table, .. } = stage else { return };
        for (block, page) in table.pages(0).iter().enumerate() {
            let content = State::content(bounds, key.request, block as u32);
            if self.owner.memory[page.page as usize].iter().any(|word| word.content != content) {
                self.wrong = Some(Wrong::BytesUsed);
            }
        }
    }

    fn admit(&mut self, bounds: &Bounds, at: usize) {
        let key = self.owner.legs[at].key;
        let now = self.now;
        let hashes = State::hashes(bounds, key.request);
        let referred = self.owner.referred(&self.reads);
        let (table, cached) =
            self.kv(|kv| kv.open(&hashes, TOKENS, TOKENS, now)).expect("there is room: it was looked for");
        self.check_fresh(&table, cached, &referred);
        let lease = LeaseId(u128::from(key.request) * 100 + u128::from(key.attempt) * 10);
        let granted = self.kv(|kv| kv.grant(lease, &table, TOKENS, DEADLINE, now));
        granted.expect("it was asked before");
        self.kv(|kv| kv.progress(lease, cached));
        let pages = [0, 1].map(|block| table.pages(0)[block].page);
        let incarnation = self.owner.incarnation;
        let leg = &mut self.owner_mut().legs[at];
        leg.stage = Stage::Running { table, whole: cached / BLOCK_TOKENS };
        leg.lease = Some(lease);
        let request = &mut self.requests[key.request as usize];
        if request.prefill == Some(key.attempt) {
            request.handle = Some(Handle { lease, incarnation, blocks: BLOCKS, pages });
        }
    }

    /// Fresh pages were referred to by nobody.
    fn check_fresh(&mut self, table: &tandem_kv_cache::Table, cached: u32, referred: &[bool]) {
        let fresh = table.pages(0).iter().skip((cached / BLOCK_TOKENS) as usize);
        if fresh.into_iter().any(|page| referred[page.page as usize]) && !self.given_back_twice {
            self.wrong = Some(Wrong::Reused);
        }
    }

    /// Work beside the requests, so that cached pages are wanted for something else.
    fn own_work(&mut self, bounds: &Bounds) {
        let referred = self.owner.referred(&self.reads);
        let now = self.now;
        let _ = bounds;
        let (table, _) = self.kv(|kv| kv.open(&[], TOKENS, TOKENS, now)).expect("there is room");
        self.check_fresh(&table, 0, &referred);
        let stage = Stage::Running { table, whole: 0 };
        self.owner_mut().legs.push(OwnerLeg { key: OWN_WORK, lease: None, stage });
    }

    fn submit(&mut self, bounds: &Bounds, at: usize) {
        let leg = &self.owner.legs[at];
        let Stage::Running { table, whole } = &leg.stage else { unreachable!("only running legs step") };
        let (key, page, block) = (leg.key, table.pages(0)[*whole as usize], *whole);
        let word = Word { content: State::content(bounds, key.request, block), version: key.attempt };
        let hold = Hold(self.kv(|kv| kv.hold(std::iter::once((0, page)))));
        self.owner_mut().steps.push(Step { key, hold, page: page.page, word });
    }

    /// A step is done: its page is written and whole. With the last one the first token is drawn, and the
    /// request may end with it.
    fn collect(&mut self, bounds: &Bounds, at: usize, ends: bool) {
        let step = self.owner_mut().steps.remove(at);
        self.owner_mut().memory[step.page as usize] = [step.word; 2];
        self.kv(|kv| kv.release(step.hold.0));
        let (key, now) = (step.key, self.now);
        let Some(leg) = self.owner_mut().leg(key) else { return };
        let lease = leg.lease;
        match &mut leg.stage {
            Stage::Running { whole, .. } => *whole += 1,
            Stage::Decoding { wrote, .. } => {
                *wrote = true;
                return;
            }
            Stage::Waiting | Stage::HandedOff => unreachable!("its step was under way"),
        }
        let Stage::Running { table, whole } = &leg.stage else { unreachable!("matched above") };
        let (mut table, whole) = (table.clone(), *whole);
        if key.request < 2 {
            let hashes = State::hashes(bounds, key.request);
            self.kv(|kv| kv.publish(&mut table, &hashes, (whole * BLOCK_TOKENS).min(TOKENS)));
        }
        if whole < BLOCKS {
            self.owner_mut().leg(key).expect("looked up above").stage = Stage::Running { table, whole };
            if let Some(lease) = lease {
                self.kv(|kv| kv.progress(lease, whole * BLOCK_TOKENS));
            }
            return;
        }
        self.owner_mut().leg(key).expect("looked up above").stage = Stage::HandedOff;
        self.kv(|kv| kv.close(table, now));
        let Some(lease) = lease else { return self.end_owner_leg(key) };
        if ends {
            // The router hears of it from this attempt, unless it has given it up.
            let heard = self.requests[key.request as usize].prefill == Some(key.attempt);
            self.kv(|kv| kv.finish(lease, now));
            if heard {
                self.end_request(key.request, Ended::Well);
            }
            return;
        }
        self.kv(|kv| kv.seal(lease, TOKENS, FirstTokenBundle::default(), now));
        let request = &mut self.requests[key.request as usize];
        request.first_token |= request.prefill == Some(key.attempt);
    }

    /// The adopter writes behind the prompt's last token.
    fn append(&mut self, at: usize) {
        let leg = &self.owner.legs[at];
        let Stage::Decoding { table, .. } = &leg.stage else { unreachable!("only decoding legs append") };
        let (key, page) = (leg.key, table.pages(0)[BLOCKS as usize - 1]);
        let others = self.owner.kv.leases().any(|lease| self.owner.kv.lease_pages(lease)[0].contains(&page));
        let read = self.reads.iter().any(|read| {
            matches!(read.reading, Reading::Halfway { hold: Some(_), .. }) && read.pages.contains(&page.page)
        });
        if others || read {
            self.wrong = Some(Wrong::Reused);
        }
        let word = self.owner.memory[page.page as usize][0];
        let word = Word { version: word.version + 100, ..word };
        let hold = Hold(self.kv(|kv| kv.hold(std::iter::once((0, page)))));
        self.owner_mut().steps.push(Step { key, hold, page: page.page, word });
    }

    fn leave(&mut self, at: usize) {
        let leg = self.owner_mut().legs.remove(at);
        let Stage::Decoding { table, .. } = leg.stage else { unreachable!("only decoding legs leave so") };
        let now = self.now;
        self.kv(|kv| kv.close(table, now));
        self.outcome(leg.key, true);
    }

    fn renew(&mut self, r: u8) {
        let now = self.now;
        let request = &self.requests[r as usize];
        if let Some(handle) = request.handle.filter(|_| self.router) {
            return self.kv(|kv| kv.renew_lease(handle.lease, now));
        }
        let beating = self.streams.iter().find(|s| s.key.request == r && s.followed && s.served && !s.broken);
        if let Some(claim) = beating.and_then(|stream| stream.claim) {
            self.kv(|kv| kv.renew_claim(claim, now));
        }
    }

    // ------------------------------------------------------------------ follow

    fn claim(&mut self, at: usize) {
        let now = self.now;
        let stream = Arc::make_mut(&mut self.streams[at]);
        stream.claiming = false;
        let (key, handle) = (stream.key, stream.handle);
        if handle.incarnation != self.owner.incarnation {
            let stream = Arc::make_mut(&mut self.streams[at]);
            stream.served = false;
            stream.down.push(Down::Refused);
            return;
        }
        let claim = ClaimId(
            u128::from(key.request) * 100 + u128::from(key.attempt) * 10 + u128::from(self.streams[at].copy),
        );
        let stream = Arc::make_mut(&mut self.streams[at]);
        stream.claim = Some(claim);
        if stream.followed {
            stream.down.push(Down::Claimed(claim));
        }
        let standing = self.owner.kv.lease_alive(handle.lease);
        let newer = self.streams.iter().any(|other| {
            other.claim.is_some() && other.handle.lease == handle.lease && other.key.attempt > key.attempt
        });
        let attempt = Attempt(u32::from(key.attempt));
        match self.kv(|kv| kv.follow(handle.lease, attempt, claim, now)) {
            Ok(()) => {}
            Err(why) => {
                if standing && !(newer || why == FollowError::Superseded && self.attempted(key)) {
                    self.wrong = Some(Wrong::OlderWon);
                }
                let stream = Arc::make_mut(&mut self.streams[at]);
                (stream.claim, stream.served) = (None, false);
                stream.down.clear();
                if stream.followed {
                    stream.down.push(Down::Lost);
                }
            }
        }
    }

    /// Whether the router has begun a newer attempt of the same request, which may have claimed before.
    fn attempted(&self, key: Key) -> bool {
        self.requests[key.request as usize].attempt > key.attempt
    }

    fn hear(&mut self, at: usize) {
        let stream = Arc::make_mut(&mut self.streams[at]);
        let key = stream.key;
        for down in std::mem::take(&mut stream.down) {
            let event = match down {
                Down::Claimed(claim) => {
                    if let Some(leg) = self.leg(key) {
                        leg.claim = Some(claim);
                    }
                    PullEvent::Claimed(claim)
                }
                Down::Ready(first, words) => {
                    let count = words.len() as u32;
                    if let Some(leg) = self.leg(key) {
                        for (block, word) in (first as usize..).zip(words) {
                            leg.sums[block] = Some(word);
                        }
                    }
                    PullEvent::Ready { group: 0, first, count }
                }
                Down::Sealed(tokens, bundle) => PullEvent::Sealed { tokens, bundle },
                Down::Done => PullEvent::Done,
                Down::Superseded => PullEvent::Superseded,
                Down::Lost => PullEvent::Lost(String::new()),
                Down::Refused => PullEvent::StreamClosed(String::new()),
            };
            self.tell(key, event);
        }
    }

    // ------------------------------------------------------------------ the decoders

    fn leg(&mut self, key: Key) -> Option<&mut DecodeLeg> {
        let d = self.decoders.iter().position(|d| d.legs.iter().any(|leg| leg.key == key))?;
        Arc::make_mut(&mut self.decoders[d]).legs.iter_mut().find(|leg| leg.key == key)
    }

    fn decoder_reads(&mut self, bounds: &Bounds, d: usize, message: ToDecoder) {
        let fresh = |key, handle, puller| DecodeLeg {
            key,
            handle,
            puller,
            bytes: Default::default(),
            sums: Default::default(),
            asked: 0,
            claim: None,
        };
        match message {
            ToDecoder::Start(key, _, epoch) | ToDecoder::Borrow(key, epoch)
                if epoch != self.decoders[d].epoch =>
            {
                self.outcome(key, false);
            }
            ToDecoder::Start(key, handle, _) => {
                let leg = fresh(key, Some(handle), None);
                Arc::make_mut(&mut self.decoders[d]).legs.push(leg);
                self.follow(bounds, key, handle);
            }
            ToDecoder::Borrow(key, _) => {
                Arc::make_mut(&mut self.decoders[d]).legs.push(fresh(key, None, None));
                self.lends.push(Lend { key, copy: 0, awaited: true });
            }
            ToDecoder::Cancel(key) => self.leave_decoder(key, None),
            ToDecoder::SessionClosed => {
                let keys: Vec<Key> = self.decoders[d].legs.iter().map(|leg| leg.key).collect();
                keys.into_iter().for_each(|key| self.leave_decoder(key, None));
            }
        }
    }

    fn follow(&mut self, bounds: &Bounds, key: Key, handle: Handle) {
        let mut puller = Puller::new(1, handle.blocks, 0);
        if let Some(mistake) = bounds.mistake {
            puller.make(mistake);
        }
        self.leg(key).expect("it has just begun").puller = Some(puller);
        self.streams.push(Arc::new(Stream {
            key,
            copy: 0,
            handle,
            claiming: true,
            claim: None,
            down: Vec::new(),
            followed: true,
            served: true,
            broken: false,
        }));
    }

    /// Tells a puller something, if it is still there, and does what it wants.
    fn tell(&mut self, key: Key, event: PullEvent) {
        let Some(leg) = self.leg(key) else { return };
        let Some(puller) = leg.puller.as_mut() else { return };
        puller.on(event);
        while let Some(action) = self.leg(key).and_then(|leg| leg.puller.as_mut()?.next_action()) {
            let leg = self.leg(key).expect("looked up above");
            let handle = leg.handle.expect("it follows");
            match action {
                PullAction::Pull { id, claim, blocks } => {
                    let pages = handle.pages[blocks.start as usize..blocks.end as usize].to_vec();
                    self.reads.push(Read { key, id, claim, blocks, pages, reading: Reading::Asked });
                }
                PullAction::AskVerdict(claim) => {
                    leg.asked = 1;
                    self.ends.push(End { key, handle, claim, complete: true, awaited: true });
                }
                PullAction::Deliver { .. } => self.deliver(key),
                PullAction::GiveUp(why) => {
                    let claim = leg.claim;
                    self.leave_decoder(key, Some(false));
                    if let (GiveUp::Corrupt(_), Some(claim)) = (why, claim) {
                        self.ends.push(End { key, handle, claim, complete: false, awaited: false });
                    }
                }
            }
        }
    }

    /// The bytes are used from now on.
    fn deliver(&mut self, key: Key) {
        let leg = self.leg(key).expect("it delivers");
        let blocks = leg.handle.expect("it followed").blocks as usize;
        let whole = (0..blocks).all(|block| {
            let word = leg.sums[block];
            word.is_some() && leg.bytes[block].iter().all(|half| Some(*half) == word)
        });
        let contents: Vec<u8> = leg.bytes[..blocks].iter().map(|bytes| bytes[0].content).collect();
        if !whole || contents != self.contents(key, blocks) {
            self.wrong = Some(Wrong::BytesUsed);
        }
        self.leave_decoder(key, Some(true));
    }

    fn contents(&self, key: Key, blocks: usize) -> Vec<u8> {
        // A borrowed prefix is one block, the first request's first.
        let request = if blocks == 1 { 0 } else { key.request };
        (0..blocks as u8).map(|block| 1 + 2 * request + block).collect()
    }

    /// An attempt leaves a decoder: its stream closes, its reads and questions go on without it.
    fn leave_decoder(&mut self, key: Key, well: Option<bool>) {
        let Some(d) = self.decoders.iter().position(|d| d.legs.iter().any(|leg| leg.key == key)) else {
            return;
        };
        Arc::make_mut(&mut self.decoders[d]).legs.retain(|leg| leg.key != key);
        for stream in self.streams.iter_mut().filter(|stream| stream.key == key && stream.followed) {
            let stream = Arc::make_mut(stream);
            stream.followed = false;
            stream.down.clear();
        }
        self.ends.iter_mut().filter(|end| end.key == key).for_each(|end| end.awaited = false);
        self.lends.iter_mut().filter(|lend| lend.key == key).for_each(|lend| lend.awaited = false);
        self.lent.retain(|(of, _)| *of != key);
        if let Some(well) = well {
            self.outcome(key, well);
        }
    }

    fn lent(&mut self, bounds: &Bounds, key: Key, handle: Option<Handle>) {
        let Some(leg) = self.leg(key) else { return };
        match handle {
            Some(handle) => {
                leg.handle = Some(handle);
                self.follow(bounds, key, handle);
            }
            // Computing is always possible.
            None => self.leave_decoder(key, Some(true)),
        }
    }

    // ------------------------------------------------------------------ pulls

    fn begin_read(&mut self, bounds: &Bounds, at: usize) {
        let Read { claim, pages, .. } = self.reads[at].clone();
        let hold = if bounds.one_sided {
            None
        } else {
            let places: Vec<(u32, u32)> = pages.iter().map(|&page| (0, page)).collect();
            match self.kv(|kv| kv.begin_read(claim, &places)) {
                Ok(hold) => Some(Hold(hold)),
                Err(_) => {
                    self.reads[at].reading = Reading::Failed;
                    return;
                }
            }
        };
        let first = pages.iter().map(|&page| self.owner.memory[page as usize][0]).collect();
        self.reads[at].reading = Reading::Halfway { hold, first };
    }

    fn end_read(&mut self, bounds: &Bounds, at: usize, flipped: bool) {
        let read = self.reads.remove(at);
        let Reading::Halfway { hold, first } = read.reading else { unreachable!("it has begun") };
        let second = read.pages.iter().map(|&page| self.owner.memory[page as usize][1]);
        let mut bytes: Vec<Bytes> = first.into_iter().zip(second).map(|(first, second)| [first, second]).collect();
        if let Some(hold) = hold {
            if bytes.iter().any(|[first, second]| first != second) && !self.given_back_twice {
                self.wrong = Some(Wrong::BytesSeen);
            }
            self.kv(|kv| kv.release(hold.0));
        }
        if flipped {
            bytes[0][1].content = u8::MAX;
        }
        let Some(leg) = self.leg(read.key) else { return };
        let blocks = read.blocks.start as usize..read.blocks.end as usize;
        let sums = &leg.sums[blocks.clone()];
        let known = sums.iter().all(Option::is_some);
        let equal = sums.iter().zip(&bytes).all(|(sum, bytes)| bytes.iter().all(|half| Some(*half) == *sum));
        leg.bytes[blocks].copy_from_slice(&bytes);
        let event = match (bounds.checksums && known, equal) {
            (true, true) => PullEvent::Verified(read.id),
            (true, false) => PullEvent::Corrupt(read.id),
            (false, _) => PullEvent::Arrived(read.id),
        };
        self.tell(read.key, event);
    }

    // ------------------------------------------------------------------ verdicts and loans

    /// Calls the owner under a claim; no other claim may suffer from it.
    fn without_harm<T>(
        &mut self,
        claim: ClaimId,
        change: impl FnOnce(&mut tandem_kv_cache::KvCache, tandem_types::Time) -> T,
    ) -> T {
        let now = self.now;
        let standing = |state: &State| -> Vec<ClaimId> {
            let claims = state.streams.iter().filter_map(|stream| stream.claim);
            claims.filter(|c| *c != claim && !state.owner.kv.claimed_pages(*c, 0).is_empty()).collect()
        };
        let before = standing(self);
        let result = self.kv(|kv| change(kv, now));
        if standing(self) != before {
            self.wrong = Some(Wrong::OlderWon);
        }
        result
    }

    fn judge(&mut self, at: usize) {
        let End { key, handle, claim, complete, awaited } = self.ends.remove(at);
        let verdict = if handle.incarnation == self.owner.incarnation {
            self.without_harm(claim, |kv, now| kv.end(handle.lease, claim, complete, now))
        } else {
            Verdict::Lost
        };
        if complete && handle.incarnation == self.owner.incarnation {
            match (verdict, self.told.get(&claim)) {
                (Verdict::Held, None) => {
                    self.told.insert(claim, self.now + TIME_TO_LIVE);
                }
                (Verdict::Lost | Verdict::Superseded, Some(until)) if self.now < *until => {
                    self.wrong = Some(Wrong::Contradiction);
                }
                _ => {}
            }
        }
        if awaited {
            self.tell(key, PullEvent::Verdict(verdict));
        }
    }

    /// The answer did not come: asks once more, then does without.
    fn ask_again(&mut self, key: Key) {
        let Some(leg) = self.leg(key) else { return };
        if leg.asked >= 2 {
            return self.tell(key, PullEvent::NoVerdict(String::new()));
        }
        leg.asked += 1;
        let (handle, claim) = (leg.handle.expect("it asked"), leg.claim.expect("it asked"));
        self.ends.push(End { key, handle, claim, complete: true, awaited: true });
    }

    fn lend_out(&mut self, bounds: &Bounds, at: usize) {
        let Lend { key, copy, awaited } = self.lends.remove(at);
        let now = self.now;
        let lease = LeaseId(u128::from(key.request) * 100 + u128::from(key.attempt) * 10 + u128::from(copy));
        let hashes = State::hashes(bounds, key.request);
        let blocks = self.kv(|kv| kv.lend(lease, &hashes, DEADLINE, now)).unwrap_or(0);
        if awaited {
            let handle = (blocks > 0).then(|| {
                let page = self.owner.kv.lease_pages(lease)[0][0].page;
                Handle { lease, incarnation: self.owner.incarnation, blocks, pages: [page; 2] }
            });
            self.lent.push((key, handle));
        }
    }

    // ------------------------------------------------------------------ crashes

    fn crash(&mut self, bounds: &Bounds, who: Who) {
        match who {
            Who::Router => {
                self.router = false;
                for r in 0..2 {
                    let request = &mut self.requests[r];
                    request.ended.get_or_insert(Ended::Gone);
                    *request = Request { ended: request.ended, attempt: u8::MAX, ..Request::default() };
                }
                self.lose_owner_session();
                (0..2).for_each(|d| self.lose_decoder_session(d));
            }
            Who::Owner => {
                let incarnation = self.owner.incarnation + 1;
                self.owner = Arc::new(Owner::new(bounds, incarnation));
                self.lose_owner_session();
                self.to_owner.clear();
                self.told.clear();
                for stream in &mut self.streams {
                    let stream = Arc::make_mut(stream);
                    (stream.claim, stream.served, stream.broken, stream.claiming) = (None, false, true, false);
                    stream.down.clear();
                }
                self.reads.iter_mut().for_each(|read| read.reading = Reading::Failed);
            }
            Who::Decoder(d) => {
                self.lose_decoder_session(d);
                self.to_decoder[d].clear();
                let keys: Vec<Key> = self.decoders[d].legs.iter().map(|leg| leg.key).collect();
                keys.into_iter().for_each(|key| self.leave_decoder(key, None));
            }
        }
    }

    // ------------------------------------------------------------------ after every action

    /// Forgets what nothing can depend on any more, and compares the owner's books with what refers to what.
    fn tidy(&mut self, bounds: &Bounds, before: &Arc<Owner>) {
        self.streams.retain(|stream| stream.followed || stream.served || stream.claiming);
        self.streams.sort_by_key(|stream| (stream.key, stream.copy));
        self.reads.sort_by_key(|read| (read.key, read.id, matches!(read.reading, Reading::Asked)));
        self.lends.sort();
        if bounds.second != Second::Borrow {
            self.order_decoders();
        }
        let legs: Vec<Key> = self.decoders.iter().flat_map(|d| d.legs.iter().map(|leg| leg.key)).collect();
        self.ends.sort();
        let (ends, now) = (&self.ends, self.now);
        self.told.retain(|claim, until| *until > now && ends.iter().any(|end| end.claim == *claim)
            || legs.iter().any(|key| claim.0 / 10 == u128::from(key.request) * 10 + u128::from(key.attempt)));
        let looked_at = Arc::ptr_eq(before, &self.owner) && matches!(self.wrong, None);
        if self.given_back_twice || looked_at && self.now < DEADLINE {
            return;
        }
        self.owner.kv.check_books();
        let referred = self.owner.referred(&self.reads).into_iter().filter(|referred| *referred).count();
        if self.owner.kv.counts().in_use as usize != referred {
            self.wrong.get_or_insert(Wrong::Reused);
        }
        if self.now >= DEADLINE && self.owner.kv.next_expiry().is_some_and(|due| due > self.now) {
            self.wrong.get_or_insert(Wrong::Outlived);
        }
    }

    /// The decoders are alike, so it does not matter which is which.
    fn order_decoders(&mut self) {
        let busy = |d: usize| {
            let keys: Vec<Key> = self.decoders[d].legs.iter().map(|leg| leg.key).collect();
            (keys, self.to_decoder[d].clone(), self.decoders[d].epoch)
        };
        if busy(0) >= busy(1) {
            return;
        }
        self.decoders.swap(0, 1);
        self.to_decoder.swap(0, 1);
        for request in &mut self.requests {
            if let Some(Decode { decoder: Some(d), .. }) = &mut request.decode {
                *d = 1 - *d;
            }
        }
    }

    /// Nothing is held by anybody, anywhere.
    pub fn holds_nothing(&self) -> bool {
        self.owner.kv.counts().in_use == 0
            && self.owner.kv.lease_count() == 0
            && self.owner.legs.is_empty()
            && self.decoders.iter().all(|decoder| decoder.legs.is_empty())
            && self.streams.is_empty()
    }

    /// Leases of hand-offs that stand.
    pub fn hand_offs_stand(&self, bounds: &Bounds) -> bool {
        let lent = |lease: LeaseId| bounds.second == Second::Borrow && lease.0 >= 100;
        self.owner.kv.leases().any(|lease| !lent(lease))
    }
}
