//! Leases: the owner's side of a hand-off, as a state machine.
//!
//! A lease keeps a sequence's pages in use until exactly one of: its puller's verdict, adoption, an end by the
//! router, the end of the request, or expiry. A claim is one puller's hold on it; the newest attempt wins.

use std::collections::{BTreeMap, HashMap};

use tandem_types::{
    Attempt, BLOCK_TOKENS, BlockHash, ClaimId, LeaseId, PageRef, Sampled, Time, Usage, blocks_for,
};

use crate::mistake::Mistake;
use crate::pool::{At, Pool};
use crate::{HoldId, KvCache, Table};

/// What a decode worker must know to go on: the first token and what it cost.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct FirstTokenBundle {
    /// The token, with its log probabilities if asked for.
    pub sampled: Sampled,
    /// Prompt and cached tokens, and the one drawn.
    pub usage: Usage,
}

/// The owner's word on a pull.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Verdict {
    /// The lease held throughout, on unchanged pages: the bytes are good.
    Held,
    /// It did not; throw the bytes away.
    Lost,
    /// A newer attempt has it; throw the bytes away.
    Superseded,
}

/// Why a lease is over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EndedWhy {
    /// A puller has every byte.
    Pulled,
    /// This worker took the pages over itself.
    Adopted,
    /// The router said so, or is gone.
    Cancelled,
    /// The request ended with its first token.
    Finished,
    /// Nobody renewed it, or the request's deadline passed.
    Expired,
}

/// What a change means for others. `Ready`, `Sealed`, `Done`, `Superseded` and `Lost` go to who follows under
/// the claim; the last three end it.
#[derive(Clone, Debug, PartialEq)]
pub enum Effect {
    /// These pages are whole and will not be written again.
    Ready {
        /// To whom.
        claim: ClaimId,
        /// The KV group.
        group: u32,
        /// Index of the first among the lease's pages.
        first: u32,
        /// How many.
        count: u32,
    },
    /// All pages are ready and the first token is drawn.
    Sealed {
        /// To whom.
        claim: ClaimId,
        /// Tokens whose KV the pages hold.
        tokens: u32,
        /// What goes with them.
        bundle: FirstTokenBundle,
    },
    /// The request ended at the owner.
    Done {
        /// To whom.
        claim: ClaimId,
    },
    /// A newer attempt came.
    Superseded {
        /// To whom.
        claim: ClaimId,
    },
    /// The lease is over.
    Lost {
        /// To whom.
        claim: ClaimId,
    },
    /// The lease is over, and its pages are given back.
    Ended {
        /// Which.
        lease: LeaseId,
        /// Why.
        why: EndedWhy,
    },
}

/// Why a prompt cannot be leased.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum GrantError {
    /// The leased share is used up; it fits when other leases end.
    #[error("{leased} of at most {cap} blocks are under leases and {wanted} more are wanted")]
    Cap {
        /// Blocks under leases.
        leased: u32,
        /// The most that may be.
        cap: u32,
        /// Blocks of this one.
        wanted: u32,
    },
}

/// Why a lease cannot be claimed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FollowError {
    /// It is over, or was never here.
    #[error("the lease is over or was never here")]
    Unknown,
    /// A newer attempt holds it.
    #[error("a newer attempt holds the lease")]
    Superseded,
}

/// Why a lease cannot be adopted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum AdoptError {
    /// As for a puller.
    #[error(transparent)]
    Follow(#[from] FollowError),
    /// The prompt is not computed yet.
    #[error("the lease is not sealed yet")]
    NotSealed,
    /// A reader is in the last page, which the adopter would write to.
    #[error("somebody is still reading the last page")]
    BeingRead,
}

/// Why pages may not be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ReadError {
    /// The claim is over or superseded.
    #[error("the claim does not stand")]
    NoClaim,
    /// A page is not under the lease, or not ready.
    #[error("page {page} of group {group} is not ready under this claim")]
    NotReady {
        /// Its group.
        group: u32,
        /// Its index in the pool.
        page: u32,
    },
}

/// What the adopter of a lease gets.
#[derive(Debug)]
pub struct Adopted {
    /// The pages; the adopter may append to the last one.
    pub table: Table,
    /// Tokens whose KV is in them.
    pub tokens: u32,
    /// What goes with them.
    pub bundle: FirstTokenBundle,
}

#[derive(Debug)]
#[cfg_attr(feature = "model", derive(Clone))]
struct Lease {
    pages: Vec<Vec<PageRef>>,
    tokens: u32,
    /// Leading blocks that are whole.
    ready: u32,
    sealed: Option<FirstTokenBundle>,
    deadline: Time,
    expires: Time,
    claim: Option<ClaimId>,
    newest: Attempt,
}

impl Lease {
    fn blocks(&self) -> u32 {
        self.pages[0].len() as u32
    }
}

#[derive(Debug)]
#[cfg_attr(feature = "model", derive(Clone, Hash))]
struct Remembered {
    /// Who got `Held`.
    held: ClaimId,
    until: Time,
}

/// All leases of a worker.
#[derive(Debug, Default)]
#[cfg_attr(feature = "model", derive(Clone))]
pub(crate) struct Leases {
    live: BTreeMap<LeaseId, Lease>,
    claims: HashMap<ClaimId, LeaseId>,
    /// Verdicts that may be asked for again.
    over: BTreeMap<LeaseId, Remembered>,
    blocks: u32,
    effects: Vec<Effect>,
}

impl Leases {
    #[cfg(feature = "model")]
    pub(crate) fn ids(&self) -> impl Iterator<Item = LeaseId> + '_ {
        self.live.keys().copied()
    }

    pub(crate) fn check_books(&self, pool: &Pool) {
        let blocks: u32 = self.live.values().map(Lease::blocks).sum();
        assert_eq!(blocks, self.blocks, "the leased blocks are not those of the leases");
        for (id, lease) in &self.live {
            for (group, list) in lease.pages.iter().enumerate() {
                let current = list.iter().all(|&page| pool.is_current(group as u32, page));
                assert!(current, "lease {id} has a page that is no longer what it was");
            }
            assert!(lease.ready <= lease.blocks(), "lease {id} has more ready blocks than blocks");
        }
        let claimed = self.live.values().filter(|lease| lease.claim.is_some()).count();
        assert_eq!(claimed, self.claims.len(), "claims are not those of the leases");
        for (claim, lease) in &self.claims {
            let of = self.live.get(lease).and_then(|lease| lease.claim);
            assert_eq!(of, Some(*claim), "claim {claim} is on a lease that has another");
        }
    }
}

impl KvCache {
    /// Blocks that may be under leases.
    fn lease_cap(&self) -> u32 {
        (f64::from(self.config.pages) * f64::from(self.config.leased_share)) as u32
    }

    /// Whether `wanted` more blocks may go under leases beside the `reserved` ones that are promised. One lease
    /// that would be the only one always may.
    pub fn can_grant(&self, reserved: u32, wanted: u32) -> bool {
        let alone = self.leases.live.is_empty() && reserved == 0;
        alone || self.leases.blocks + reserved + wanted <= self.lease_cap()
    }

    /// Puts the pages that hold `tokens` tokens of a table under a lease.
    ///
    /// # Panics
    /// If the id is in use or the table is too short.
    pub fn grant(
        &mut self,
        id: LeaseId,
        table: &Table,
        tokens: u32,
        deadline: Time,
        now: Time,
    ) -> Result<(), GrantError> {
        let blocks = blocks_for(tokens);
        if !self.can_grant(0, blocks) {
            return Err(GrantError::Cap {
                leased: self.leases.blocks,
                cap: self.lease_cap(),
                wanted: blocks,
            });
        }
        let mut pages = Vec::with_capacity(table.groups.len());
        for (group, list) in table.groups.iter().enumerate() {
            let taken = list[..blocks as usize].iter();
            pages.push(taken.map(|page| self.pool.add_ref((group as u32, page.page))).collect());
        }
        self.insert_lease(id, pages, tokens, deadline, now);
        Ok(())
    }

    /// Lends cached blocks: puts the longest prefix of `hashes` that is here under a lease that is sealed at once
    /// and belongs to whoever claims it. Returns how many blocks; of none there is no lease.
    ///
    /// # Panics
    /// If the id is in use.
    pub fn lend(
        &mut self,
        id: LeaseId,
        hashes: &[BlockHash],
        deadline: Time,
        now: Time,
    ) -> Result<u32, GrantError> {
        let known = u32::try_from(hashes.len()).unwrap_or(u32::MAX).saturating_mul(BLOCK_TOKENS);
        let blocks = self.cached_prefix(hashes, known.saturating_add(1)) / BLOCK_TOKENS;
        if blocks == 0 {
            return Ok(0);
        }
        if !self.can_grant(0, blocks) {
            return Err(GrantError::Cap {
                leased: self.leases.blocks,
                cap: self.lease_cap(),
                wanted: blocks,
            });
        }
        let find = |group: u32, hash: &BlockHash| {
            let page = self.pool.find(group, *hash).expect("the prefix is cached in every group");
            (group, page)
        };
        let places: Vec<Vec<At>> = (0..self.pool.groups())
            .map(|group| hashes[..blocks as usize].iter().map(|hash| find(group, hash)).collect())
            .collect();
        let pages = places.into_iter().map(|list| list.into_iter().map(|at| self.pool.add_ref(at)).collect());
        let pages = pages.collect();
        let tokens = blocks * BLOCK_TOKENS;
        self.insert_lease(id, pages, tokens, deadline, now);
        self.seal(id, tokens, FirstTokenBundle::default(), now);
        Ok(blocks)
    }

    fn insert_lease(
        &mut self,
        id: LeaseId,
        pages: Vec<Vec<PageRef>>,
        tokens: u32,
        deadline: Time,
        now: Time,
    ) {
        let lease = Lease {
            pages,
            tokens,
            ready: 0,
            sealed: None,
            deadline,
            expires: (now + self.config.lease_time_to_live).min(deadline),
            claim: None,
            newest: Attempt(0),
        };
        self.leases.blocks += lease.blocks();
        let before = self.leases.live.insert(id, lease);
        assert!(before.is_none(), "lease {id} is granted twice");
    }

    /// The first `computed` tokens are computed: their full blocks are ready. The last block waits for `seal`.
    pub fn progress(&mut self, id: LeaseId, computed: u32) {
        let Some(lease) = self.leases.live.get_mut(&id) else { return };
        let whole = (computed / BLOCK_TOKENS).min(lease.blocks());
        // A full last block is not written again either, but its bytes go with the seal.
        let ready = whole.min(lease.blocks().saturating_sub(1));
        self.make_ready(id, ready);
    }

    fn make_ready(&mut self, id: LeaseId, ready: u32) {
        let lease = self.leases.live.get_mut(&id).expect("callers have looked it up");
        let first = lease.ready;
        if ready <= first {
            return;
        }
        lease.ready = ready;
        if let Some(claim) = lease.claim {
            for group in 0..lease.pages.len() as u32 {
                self.leases.effects.push(Effect::Ready { claim, group, first, count: ready - first });
            }
        }
    }

    /// All pages are whole, the tail zeroed beyond the last token, and the first token is drawn.
    pub fn seal(&mut self, id: LeaseId, tokens: u32, bundle: FirstTokenBundle, _now: Time) {
        let Some(lease) = self.leases.live.get(&id) else { return };
        assert_eq!(tokens, lease.tokens, "a lease is sealed with the tokens it was granted for");
        let blocks = lease.blocks();
        self.make_ready(id, blocks);
        let lease = self.leases.live.get_mut(&id).expect("looked up above");
        lease.sealed = Some(bundle.clone());
        if let Some(claim) = lease.claim {
            self.leases.effects.push(Effect::Sealed { claim, tokens, bundle });
        }
    }

    /// The request ended here; nobody needs the pages.
    pub fn finish(&mut self, id: LeaseId, now: Time) {
        self.end_lease(id, EndedWhy::Finished, now);
    }

    /// The router ends it. True if it stood.
    pub fn cancel_lease(&mut self, id: LeaseId, now: Time) -> bool {
        self.end_lease(id, EndedWhy::Cancelled, now).is_some()
    }

    /// Ends a lease and gives back its pages, unless `why` is that somebody takes them over; the lists are
    /// returned then.
    fn end_lease(&mut self, id: LeaseId, why: EndedWhy, now: Time) -> Option<Vec<Vec<PageRef>>> {
        let lease = self.leases.live.remove(&id)?;
        self.leases.blocks -= lease.blocks();
        if let Some(claim) = lease.claim {
            self.leases.claims.remove(&claim);
            match why {
                EndedWhy::Pulled => {}
                EndedWhy::Finished => self.leases.effects.push(Effect::Done { claim }),
                EndedWhy::Adopted => self.leases.effects.push(Effect::Superseded { claim }),
                EndedWhy::Cancelled | EndedWhy::Expired => self.leases.effects.push(Effect::Lost { claim }),
            }
        }
        if why == EndedWhy::Pulled && !self.mistaken.makes(Mistake::VerdictForgotten) {
            let held = lease.claim.expect("who pulled has a claim");
            let until = now + self.config.lease_time_to_live;
            self.leases.over.insert(id, Remembered { held, until });
        }
        self.leases.effects.push(Effect::Ended { lease: id, why });
        if why == EndedWhy::Adopted {
            return Some(lease.pages);
        }
        self.give_back(lease.pages);
        Some(Vec::new())
    }

    /// Claims a lease. The newest attempt wins; an equal one is the same puller again after a broken stream.
    /// What is ready already comes as effects.
    pub fn follow(
        &mut self,
        id: LeaseId,
        attempt: Attempt,
        claim: ClaimId,
        now: Time,
    ) -> Result<(), FollowError> {
        self.check_newest(id, attempt)?;
        let lease = self.leases.live.get_mut(&id).expect("checked above");
        lease.newest = attempt;
        if let Some(older) = lease.claim.replace(claim) {
            self.leases.claims.remove(&older);
            self.leases.effects.push(Effect::Superseded { claim: older });
        }
        self.leases.claims.insert(claim, id);
        if lease.ready > 0 {
            for group in 0..lease.pages.len() as u32 {
                self.leases.effects.push(Effect::Ready { claim, group, first: 0, count: lease.ready });
            }
        }
        if let Some(bundle) = &lease.sealed {
            self.leases.effects.push(Effect::Sealed { claim, tokens: lease.tokens, bundle: bundle.clone() });
        }
        self.renew_lease(id, now);
        Ok(())
    }

    fn check_newest(&self, id: LeaseId, attempt: Attempt) -> Result<(), FollowError> {
        let lease = self.leases.live.get(&id).ok_or(FollowError::Unknown)?;
        if attempt < lease.newest { Err(FollowError::Superseded) } else { Ok(()) }
    }

    /// The puller's stream shows life.
    pub fn renew_claim(&mut self, claim: ClaimId, now: Time) {
        if let Some(&id) = self.leases.claims.get(&claim) {
            self.renew_lease(id, now);
        }
    }

    /// Somebody still wants the lease. Nothing renews it past the request's deadline.
    pub fn renew_lease(&mut self, id: LeaseId, now: Time) {
        if let Some(lease) = self.leases.live.get_mut(&id) {
            if self.mistaken.makes(Mistake::RenewalPastDeadline) {
                lease.deadline = Time::MAX;
            }
            lease.expires = (now + self.config.lease_time_to_live).min(lease.deadline).max(lease.expires);
        }
    }

    /// The puller's stream is gone, or it refused: its claim ends, the lease waits for the next puller.
    pub fn unfollow(&mut self, claim: ClaimId, _now: Time) {
        if let Some(id) = self.leases.claims.remove(&claim) {
            self.leases.live.get_mut(&id).expect("claims are on live leases").claim = None;
        }
    }

    /// The verdict. `complete`: every byte is in hand, and if the lease held throughout, it is over now. The
    /// answer is remembered for one time to live. Otherwise the puller refuses and only its claim ends.
    pub fn end(&mut self, id: LeaseId, claim: ClaimId, complete: bool, now: Time) -> Verdict {
        let Some(lease) = self.leases.live.get(&id) else {
            let held = self.leases.over.get(&id).is_some_and(|over| over.held == claim);
            return if complete && held { Verdict::Held } else { Verdict::Lost };
        };
        if lease.claim != Some(claim) {
            if complete && lease.claim.is_some() && self.mistaken.makes(Mistake::FreeAtSupersededEnd) {
                self.end_lease(id, EndedWhy::Cancelled, now);
                return Verdict::Superseded;
            }
            return if lease.claim.is_some() { Verdict::Superseded } else { Verdict::Lost };
        }
        if !complete {
            self.unfollow(claim, now);
            return Verdict::Held;
        }
        let unchanged = lease
            .pages
            .iter()
            .enumerate()
            .all(|(group, list)| list.iter().all(|&page| self.pool.is_current(group as u32, page)));
        let unchanged = unchanged || self.mistaken.makes(Mistake::NoGenerationCheck);
        if lease.sealed.is_none() || !unchanged || lease.expires <= now {
            return Verdict::Lost;
        }
        self.end_lease(id, EndedWhy::Pulled, now);
        Verdict::Held
    }

    /// Takes a sealed lease's pages over without copying, for a Start on the worker that granted it. It
    /// counts as the newest attempt, and the lease is over.
    ///
    /// Fails while somebody reads the last page, if that page is not full: the adopter will write to it.
    pub fn adopt(&mut self, id: LeaseId, attempt: Attempt, now: Time) -> Result<Adopted, AdoptError> {
        self.check_newest(id, attempt)?;
        let lease = &self.leases.live[&id];
        let tokens = lease.tokens;
        let bundle = lease.sealed.clone().ok_or(AdoptError::NotSealed)?;
        if !tokens.is_multiple_of(BLOCK_TOKENS) {
            let shared = lease.pages.iter().enumerate().any(|(group, list)| {
                let last: At = (group as u32, list.last().expect("a lease has pages").page);
                self.pool.refs(last) > 1
            });
            if shared {
                return Err(AdoptError::BeingRead);
            }
        }
        let pages = self.end_lease(id, EndedWhy::Adopted, now).expect("checked above");
        Ok(Adopted { table: Table::of(pages), tokens, bundle })
    }

    /// Lets a transport read pages that are ready under a live claim. They stay in use until the hold is
    /// released, whatever becomes of the lease.
    pub fn begin_read(&mut self, claim: ClaimId, pages: &[(u32, u32)]) -> Result<HoldId, ReadError> {
        let id = self.leases.claims.get(&claim).ok_or(ReadError::NoClaim)?;
        let lease = &self.leases.live[id];
        let anything = self.mistaken.makes(Mistake::ReadingBeforeReady);
        let ready = if anything { lease.blocks() } else { lease.ready };
        for &(group, page) in pages {
            let list = lease.pages.get(group as usize).map_or(&[][..], |list| &list[..ready as usize]);
            if !list.iter().any(|ready| ready.page == page) {
                return Err(ReadError::NotReady { group, page });
            }
        }
        Ok(self.pool.hold(pages.iter().copied()))
    }

    /// Ends leases that nobody renewed and forgets old verdicts.
    pub fn expire(&mut self, now: Time) {
        let due = |lease: &Lease| lease.expires <= now;
        let overdue: Vec<LeaseId> =
            self.leases.live.iter().filter(|(_, lease)| due(lease)).map(|(id, _)| *id).collect();
        for id in overdue {
            self.end_lease(id, EndedWhy::Expired, now);
        }
        self.leases.over.retain(|_, over| over.until > now);
    }

    /// When the next lease is due to expire.
    pub fn next_expiry(&self) -> Option<Time> {
        self.leases.live.values().map(|lease| lease.expires).min()
    }

    /// Leases that stand.
    pub fn lease_count(&self) -> usize {
        self.leases.live.len()
    }

    /// The pages of a group under the lease that this claim is on; none if it stands no more.
    pub fn claimed_pages(&self, claim: ClaimId, group: u32) -> &[PageRef] {
        let lease = self.leases.claims.get(&claim).and_then(|id| self.leases.live.get(id));
        lease.and_then(|lease| lease.pages.get(group as usize)).map_or(&[], Vec::as_slice)
    }

    /// The pages under a lease, per group; none if it is over.
    pub fn lease_pages(&self, id: LeaseId) -> &[Vec<PageRef>] {
        self.leases.live.get(&id).map_or(&[], |lease| lease.pages.as_slice())
    }

    /// Takes a block out of the prefix cache, because its bytes are not what they should be. Who uses the page
    /// keeps it; nobody finds it any more.
    pub fn forget(&mut self, group: u32, page: u32) {
        self.pool.forget((group, page));
    }

    /// Whether this lease stands.
    pub fn lease_alive(&self, id: LeaseId) -> bool {
        self.leases.live.contains_key(&id)
    }

    /// What the changes since the last call mean for others, in order.
    pub fn take_effects(&mut self) -> Vec<Effect> {
        std::mem::take(&mut self.leases.effects)
    }
}

impl Default for Verdict {
    /// Without a word from the owner, bytes are not used.
    fn default() -> Self {
        Verdict::Lost
    }
}

/// Claims are those of the leases, so they say nothing more. Generations count only in whether they still are the
/// pages' own.
#[cfg(feature = "model")]
impl std::hash::Hash for KvCache {
    fn hash<H: std::hash::Hasher>(&self, state: &mut H) {
        self.pool.hash(state);
        for (id, lease) in &self.leases.live {
            for (group, list) in (0..).zip(&lease.pages) {
                list.iter().for_each(|&page| (page.page, self.pool.is_current(group, page)).hash(state));
            }
            (id, lease.ready, &lease.sealed, lease.claim, lease.newest).hash(state);
            (lease.deadline, lease.expires).hash(state);
        }
        self.leases.over.hash(state);
        assert!(self.leases.effects.is_empty(), "effects are taken before anybody looks");
    }
}

#[cfg(feature = "model")]
impl std::hash::Hash for FirstTokenBundle {
    fn hash<H: std::hash::Hasher>(&self, state: &mut H) {
        self.sampled.token.hash(state);
    }
}
