//! The owner as its peers see it: claims, reads, verdicts and loans.

use std::sync::Arc;

use tandem_kv_cache::{FollowError, KvCache, PullEvent, Verdict};
use tandem_types::{Attempt, ClaimId, LeaseId, Time};

use crate::bounds::*;
use crate::world::*;

impl State {
    pub fn claim(&mut self, at: usize) {
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
    pub fn attempted(&self, key: Key) -> bool {
        self.requests[key.request as usize].attempt > key.attempt
    }

    pub fn begin_read(&mut self, bounds: &Bounds, at: usize) {
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

    /// Calls the owner under a claim; no other claim may suffer from it.
    pub fn without_harm<T>(&mut self, claim: ClaimId, change: impl FnOnce(&mut KvCache, Time) -> T) -> T {
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

    pub fn judge(&mut self, at: usize) {
        let End { key, handle, claim, complete, awaited } = self.ends.remove(at);
        let first = self.owner.kv.lease_alive(handle.lease);
        let verdict = if handle.incarnation == self.owner.incarnation {
            self.without_harm(claim, |kv, now| kv.end(handle.lease, claim, complete, now))
        } else {
            Verdict::Lost
        };
        if complete && handle.incarnation == self.owner.incarnation {
            match (verdict, self.told.get(&claim)) {
                // Asked again, it is not remembered any longer for that.
                (Verdict::Held, None) if first => {
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

    pub fn lend_out(&mut self, bounds: &Bounds, at: usize) {
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
}
