//! What follows from an action.

use std::cell::Cell;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Once};

use tandem_kv_cache::PullEvent;
use tandem_types::{ClaimId, LeaseId, Time};

use crate::action::{Action, Who};
use crate::bounds::*;
use crate::world::*;

thread_local! {
    /// Whether an assertion that fails now is no news.
    static EXPECTED: Cell<bool> = const { Cell::new(false) };
}

/// Keeps quiet about assertions that are expected to fail.
pub fn expect_panics() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let tell = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |panic| {
            if !EXPECTED.get() {
                tell(panic);
            }
        }));
    });
}

impl State {
    /// The state after an action. An assertion of the code that fails is part of it; none, if the owner's process
    /// stopped at one because its own code had given pages back twice: that is loud, and as good as a crash.
    pub fn after(&self, bounds: &Bounds, action: Action) -> Option<State> {
        let mut next = self.clone();
        if action.is_fault() {
            next.faults -= 1;
        }
        EXPECTED.set(self.given_back_twice || matches!(action, Action::GiveBackTwice(_)));
        let done = catch_unwind(AssertUnwindSafe(|| {
            next.act(bounds, action);
            while let Some(action) = next.certain() {
                next.act(bounds, action);
            }
            next.tidy(bounds);
            if !Arc::ptr_eq(&self.owner, &next.owner) {
                next.check_owner(bounds);
            }
            let outlives = |due: Time| next.now >= DEADLINE && due > next.now;
            if next.owner.kv.next_expiry().is_some_and(outlives) {
                next.wrong.get_or_insert(Wrong::Outlived);
            }
        }));
        EXPECTED.set(false);
        match done {
            Ok(()) => Some(next),
            Err(_) if next.given_back_twice => None,
            Err(_) => Some(State { wrong: Some(Wrong::Panicked), ..self.clone() }),
        }
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

    /// Forgets what nothing can depend on any more, and puts what has no order into one.
    fn tidy(&mut self, bounds: &Bounds) {
        self.streams.retain(|stream| stream.followed || stream.served || stream.claiming);
        self.streams.sort_by_key(|stream| (stream.key, stream.copy));
        self.reads.sort_by_key(|read| (read.key, read.id, matches!(read.reading, Reading::Asked)));
        self.lends.sort();
        self.ends.sort();
        if bounds.second != Second::Borrow {
            self.order_decoders();
        }
        // Nobody asks again for the verdict of an attempt that is over and has no question on its way.
        let (ends, decoders, now) = (&self.ends, &self.decoders, self.now);
        let lives = |claim: ClaimId| {
            let mut legs = decoders.iter().flat_map(|decoder| &decoder.legs);
            legs.any(|leg| leg.claim == Some(claim)) || ends.iter().any(|end| end.claim == claim)
        };
        self.told.retain(|claim, until| *until > now && lives(*claim));
    }

    /// Compares the owner's books with what refers to what.
    fn check_owner(&mut self, bounds: &Bounds) {
        if self.given_back_twice {
            return;
        }
        self.owner.kv.check_books();
        let referred = self.owner.referred(&self.reads);
        if self.owner.kv.counts().in_use as usize != referred.iter().filter(|referred| **referred).count() {
            self.wrong.get_or_insert(Wrong::Reused);
        }
        // What a free page holds is anything: a page that is freed too early is noticed at once.
        if bounds.second != Second::Borrow {
            for (page, _) in referred.iter().enumerate().filter(|(_, referred)| !**referred) {
                self.owner_mut().memory[page] = Bytes::default();
            }
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
