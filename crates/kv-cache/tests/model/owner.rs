//! The worker that prefills: what its core does with the bookkeeping.

use std::sync::Arc;

use tandem_kv_cache::{Effect, FirstTokenBundle, KvCache, Table};
use tandem_types::{Attempt, BLOCK_TOKENS, LeaseId};

use crate::bounds::*;
use crate::world::*;

impl State {
    pub fn owner_mut(&mut self) -> &mut Owner {
        Arc::make_mut(&mut self.owner)
    }

    /// Changes the owner's bookkeeping and carries the effects to whom they concern.
    pub fn kv<T>(&mut self, change: impl FnOnce(&mut KvCache) -> T) -> T {
        let result = change(&mut self.owner_mut().kv);
        self.settle();
        result
    }

    pub fn settle(&mut self) {
        loop {
            let effects = self.owner_mut().kv.take_effects();
            if effects.is_empty() {
                return;
            }
            effects.into_iter().for_each(|effect| self.carry(effect));
        }
    }

    pub fn carry(&mut self, effect: Effect) {
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

    pub fn lease_ended(&mut self, lease: LeaseId) {
        let Some(at) = self.owner.legs.iter().position(|leg| leg.lease == Some(lease)) else { return };
        self.owner_mut().legs[at].lease = None;
        let key = self.owner.legs[at].key;
        self.end_owner_leg(key);
    }

    /// Frees all that an attempt holds and tells the router. A step under way keeps its page until it is done.
    pub fn end_owner_leg(&mut self, key: Key) {
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

    pub fn owner_reads(&mut self, bounds: &Bounds, message: ToOwner) {
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
    pub fn check_pages(&mut self, bounds: &Bounds, key: Key, stage: &Stage) {
        let Stage::Decoding { table, .. } = stage else { return };
        for (block, page) in table.pages(0).iter().enumerate() {
            let content = State::content(bounds, key.request, block as u32);
            if self.owner.memory[page.page as usize].iter().any(|word| word.content != content) {
                self.wrong = Some(Wrong::BytesUsed);
            }
        }
    }

    pub fn admit(&mut self, bounds: &Bounds, at: usize) {
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
    pub fn check_fresh(&mut self, table: &Table, cached: u32, referred: &[bool]) {
        let fresh = table.pages(0).iter().skip((cached / BLOCK_TOKENS) as usize);
        if fresh.into_iter().any(|page| referred[page.page as usize]) && !self.given_back_twice {
            self.wrong = Some(Wrong::Reused);
        }
    }

    /// Work beside the requests, so that cached pages are wanted for something else.
    pub fn own_work(&mut self, bounds: &Bounds) {
        let referred = self.owner.referred(&self.reads);
        let now = self.now;
        let _ = bounds;
        let (table, _) = self.kv(|kv| kv.open(&[], TOKENS, TOKENS, now)).expect("there is room");
        self.check_fresh(&table, 0, &referred);
        let stage = Stage::Running { table, whole: 0 };
        self.owner_mut().legs.push(OwnerLeg { key: OWN_WORK, lease: None, stage });
    }

    pub fn submit(&mut self, bounds: &Bounds, at: usize) {
        let leg = &self.owner.legs[at];
        let Stage::Running { table, whole } = &leg.stage else { unreachable!("only running legs step") };
        let (key, page, block) = (leg.key, table.pages(0)[*whole as usize], *whole);
        let word = Word { content: State::content(bounds, key.request, block), version: key.attempt };
        let hold = Hold(self.kv(|kv| kv.hold(std::iter::once((0, page)))));
        self.owner_mut().steps.push(Step { key, hold, page: page.page, word });
    }

    /// A step is done: its page is written and whole. With the last one the first token is drawn, and the
    /// request may end with it.
    pub fn collect(&mut self, bounds: &Bounds, at: usize, ends: bool) {
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
                self.end_request(key.request, Ended::Finished);
            }
            return;
        }
        self.kv(|kv| kv.seal(lease, TOKENS, FirstTokenBundle::default(), now));
        let request = &mut self.requests[key.request as usize];
        request.first_token |= request.prefill == Some(key.attempt);
    }

    /// The adopter writes behind the prompt's last token.
    pub fn append(&mut self, at: usize) {
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

    pub fn leave(&mut self, at: usize) {
        let leg = self.owner_mut().legs.remove(at);
        let Stage::Decoding { table, .. } = leg.stage else { unreachable!("only decoding legs leave so") };
        let now = self.now;
        self.kv(|kv| kv.close(table, now));
        self.outcome(leg.key, true);
    }

    pub fn renew(&mut self, r: u8) {
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
}
