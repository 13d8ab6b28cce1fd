//! Random operations against a plain model: nothing leaks, no page has two writers, the newest attempt wins.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use proptest::prelude::*;
use tandem_kv_cache::{
    CacheChanges, Config, Effect, FirstTokenBundle, HashChain, HoldId, KvCache, Table, Verdict, chain_seed,
};
use tandem_types::{Attempt, BlockHash, ClaimId, KvIdentity, LeaseId, Time, TokenId, blocks_for};

const PAGES: u32 = 12;

#[derive(Clone, Debug)]
enum Op {
    Open { family: u32, tokens: u32 },
    Grow { which: usize, by: u32 },
    Publish { which: usize },
    Close { which: usize },
    Grant { which: usize, deadline: u64 },
    Progress { lease: usize, tokens: u32 },
    Seal { lease: usize },
    Follow { lease: usize, attempt: u32 },
    Unfollow { claim: usize },
    End { lease: usize, claim: usize, complete: bool },
    Cancel { lease: usize },
    Finish { lease: usize },
    Adopt { lease: usize, attempt: u32 },
    Read { claim: usize, lease: usize, block: usize },
    Release { which: usize },
    Renew { lease: usize },
    Lend { family: u32, blocks: u32 },
    Forget { which: usize, group: u32, block: usize },
    Pass { millis: u64 },
}

fn op() -> impl Strategy<Value = Op> {
    let any = 0..6usize;
    prop_oneof![
        4 => (0..3u32, 1..200u32).prop_map(|(family, tokens)| Op::Open { family, tokens }),
        2 => (any.clone(), 1..60u32).prop_map(|(which, by)| Op::Grow { which, by }),
        2 => any.clone().prop_map(|which| Op::Publish { which }),
        3 => any.clone().prop_map(|which| Op::Close { which }),
        3 => (any.clone(), 1..40u64).prop_map(|(which, deadline)| Op::Grant { which, deadline }),
        2 => (any.clone(), 0..200u32).prop_map(|(lease, tokens)| Op::Progress { lease, tokens }),
        2 => any.clone().prop_map(|lease| Op::Seal { lease }),
        3 => (any.clone(), 1..4u32).prop_map(|(lease, attempt)| Op::Follow { lease, attempt }),
        1 => any.clone().prop_map(|claim| Op::Unfollow { claim }),
        3 => (any.clone(), any.clone(), proptest::bool::ANY).prop_map(|(lease, claim, complete)| Op::End { lease, claim, complete }),
        1 => any.clone().prop_map(|lease| Op::Cancel { lease }),
        1 => any.clone().prop_map(|lease| Op::Finish { lease }),
        1 => (any.clone(), 1..4u32).prop_map(|(lease, attempt)| Op::Adopt { lease, attempt }),
        2 => (any.clone(), any.clone(), 0..4usize).prop_map(|(claim, lease, block)| Op::Read { claim, lease, block }),
        2 => any.clone().prop_map(|which| Op::Release { which }),
        1 => any.clone().prop_map(|lease| Op::Renew { lease }),
        2 => (0..3u32, 0..8u32).prop_map(|(family, blocks)| Op::Lend { family, blocks }),
        1 => (any.clone(), 0..2u32, 0..4usize).prop_map(|(which, group, block)| Op::Forget { which, group, block }),
        2 => (0..6000u64).prop_map(|millis| Op::Pass { millis }),
    ]
}

struct Sequence {
    table: Table,
    tokens: Vec<TokenId>,
    computed: u32,
}

/// What a plain reading of the rules says about a lease.
#[derive(Clone, Debug)]
struct ModelLease {
    pages: Vec<u32>,
    tokens: u32,
    sealed: bool,
    newest: u32,
    claim: Option<ClaimId>,
    expires: Time,
    deadline: Time,
}

struct World {
    followed: (BTreeSet<BlockHash>, u64),
    kv: KvCache,
    now: Time,
    tables: Vec<Sequence>,
    leases: BTreeMap<LeaseId, ModelLease>,
    /// Every lease and claim there ever was, so that stale ones are tried too.
    lease_ids: Vec<LeaseId>,
    claims: Vec<ClaimId>,
    holds: Vec<(HoldId, u32)>,
    held: BTreeMap<LeaseId, ClaimId>,
}

const TIME_TO_LIVE: Duration = Duration::from_secs(10);

impl World {
    fn new() -> World {
        let kv = KvCache::new(Config {
            pages: PAGES,
            groups: 2,
            leased_share: 0.5,
            lease_time_to_live: TIME_TO_LIVE,
            prefix_cache: true,
        });
        World {
            followed: (BTreeSet::new(), 0),
            kv,
            now: Time::ZERO,
            tables: Vec::new(),
            leases: BTreeMap::new(),
            lease_ids: Vec::new(),
            claims: Vec::new(),
            holds: Vec::new(),
            held: BTreeMap::new(),
        }
    }

    fn lease(&self, at: usize) -> Option<LeaseId> {
        self.lease_ids.iter().rev().nth(at).copied()
    }

    fn claim(&self, at: usize) -> Option<ClaimId> {
        self.claims.iter().rev().nth(at).copied()
    }

    fn chain(tokens: &[TokenId]) -> HashChain {
        let mut chain = HashChain::new(chain_seed(&KvIdentity::default(), true, b"", ""));
        chain.extend(tokens);
        chain
    }

    fn apply(&mut self, op: &Op) {
        match *op {
            Op::Open { family, tokens } => self.open(family, tokens),
            Op::Grow { which, by } => {
                if let Some(s) = self.tables.get_mut(which) {
                    let (room, before) = (s.table.room(), self.kv.counts());
                    if self.kv.grow(&mut s.table, room + by).is_err() {
                        assert_eq!(self.kv.counts(), before, "a refused growth changes nothing");
                    }
                }
            }
            Op::Publish { which } => {
                if let Some(s) = self.tables.get_mut(which) {
                    s.computed = s.tokens.len() as u32;
                    self.kv.publish(&mut s.table, Self::chain(&s.tokens).hashes(), s.computed);
                }
            }
            Op::Close { which } => {
                if which < self.tables.len() {
                    let s = self.tables.swap_remove(which);
                    self.kv.close(s.table, self.now);
                }
            }
            Op::Grant { which, deadline } => self.grant(which, deadline),
            Op::Progress { lease, tokens } => {
                if let Some(id) = self.lease(lease) {
                    let most = self.leases.get(&id).map_or(0, |l| l.tokens);
                    self.kv.progress(id, tokens.min(most));
                }
            }
            Op::Seal { lease } => {
                if let Some(id) = self.lease(lease)
                    && let Some(model) = self.leases.get_mut(&id)
                {
                    model.sealed = true;
                    self.kv.seal(id, model.tokens, FirstTokenBundle::default(), self.now);
                }
            }
            Op::Follow { lease, attempt } => self.follow(lease, attempt),
            Op::Unfollow { claim } => {
                if let Some(claim) = self.claim(claim) {
                    self.kv.unfollow(claim, self.now);
                    self.leases.values_mut().filter(|l| l.claim == Some(claim)).for_each(|l| l.claim = None);
                }
            }
            Op::End { lease, claim, complete } => self.end(lease, claim, complete),
            Op::Cancel { lease } => {
                if let Some(id) = self.lease(lease) {
                    assert_eq!(self.kv.cancel_lease(id, self.now), self.leases.remove(&id).is_some());
                }
            }
            Op::Finish { lease } => {
                if let Some(id) = self.lease(lease) {
                    self.kv.finish(id, self.now);
                    self.leases.remove(&id);
                }
            }
            Op::Adopt { lease, attempt } => {
                if let Some(id) = self.lease(lease)
                    && let Ok(adopted) = self.kv.adopt(id, Attempt(attempt), self.now)
                {
                    let model = self.leases.remove(&id).expect("only live leases are adopted");
                    assert!(model.sealed && attempt >= model.newest);
                    let tokens = (0..adopted.tokens).map(|t| t + 9000).collect();
                    let computed = adopted.tokens;
                    self.tables.push(Sequence { table: adopted.table, tokens, computed });
                }
            }
            Op::Read { claim, lease, block } => {
                let (Some(claim), Some(id)) = (self.claim(claim), self.lease(lease)) else { return };
                let Some(page) = self.leases.get(&id).and_then(|l| l.pages.get(block)).copied() else {
                    return;
                };
                if let Ok(hold) = self.kv.begin_read(claim, &[(0, page)]) {
                    let of = self.leases.values().find(|l| l.claim == Some(claim));
                    assert!(of.is_some_and(|l| l.pages.contains(&page)), "reads are under a live claim");
                    self.holds.push((hold, page));
                }
            }
            Op::Release { which } => {
                if which < self.holds.len() {
                    let (hold, _) = self.holds.swap_remove(which);
                    self.kv.release(hold);
                }
            }
            Op::Renew { lease } => {
                if let Some(id) = self.lease(lease) {
                    self.kv.renew_lease(id, self.now);
                    if let Some(l) = self.leases.get_mut(&id) {
                        l.expires = (self.now + TIME_TO_LIVE).min(l.deadline).max(l.expires);
                    }
                }
            }
            Op::Lend { family, blocks } => self.lend(family, blocks),
            Op::Forget { which, group, block } => {
                let page = self.tables.get(which).and_then(|s| s.table.pages(group).get(block));
                if let Some(page) = page {
                    let before = self.kv.counts().in_use;
                    self.kv.forget(group, page.page);
                    assert_eq!(self.kv.counts().in_use, before, "who uses a page keeps it");
                }
            }
            Op::Pass { millis } => {
                self.now += Duration::from_millis(millis);
                self.kv.expire(self.now);
                let now = self.now;
                self.leases.retain(|_, l| l.expires > now);
            }
        }
    }

    fn open(&mut self, family: u32, tokens: u32) {
        let tokens: Vec<TokenId> = (0..tokens).map(|t| t + family * 1000).collect();
        let known = tokens.len() as u32;
        let before = self.kv.counts();
        match self.kv.open(Self::chain(&tokens).hashes(), known, known, self.now) {
            Ok((table, cached)) => {
                assert!(cached < known && cached.is_multiple_of(32));
                assert!(table.room() >= known);
                self.tables.push(Sequence { table, tokens, computed: cached });
            }
            Err(full) => {
                assert_eq!(self.kv.counts(), before, "a refused opening changes nothing");
                assert!(full.wanted > full.room);
            }
        }
    }

    fn grant(&mut self, which: usize, deadline: u64) {
        let Some(s) = self.tables.get(which) else { return };
        let id = LeaseId(self.lease_ids.len() as u128 + 1);
        let tokens = s.tokens.len() as u32;
        let deadline = self.now + Duration::from_secs(deadline);
        if self.kv.grant(id, &s.table, tokens, deadline, self.now).is_ok() {
            let pages = s.table.pages(0)[..blocks_for(tokens) as usize].iter().map(|p| p.page).collect();
            let expires = (self.now + TIME_TO_LIVE).min(deadline);
            let lease =
                ModelLease { pages, tokens, sealed: false, newest: 0, claim: None, expires, deadline };
            self.leases.insert(id, lease);
            self.lease_ids.push(id);
        }
    }

    fn lend(&mut self, family: u32, blocks: u32) {
        let tokens: Vec<TokenId> = (0..blocks * 32).map(|t| t + family * 1000).collect();
        let hashes = Self::chain(&tokens);
        let cached = self.kv.cached_prefix(hashes.hashes(), blocks * 32 + 1);
        let id = LeaseId(self.lease_ids.len() as u128 + 1);
        let deadline = self.now + Duration::from_secs(20);
        match self.kv.lend(id, hashes.hashes(), deadline, self.now) {
            Ok(0) => assert_eq!(cached, 0, "what is here is lent"),
            Ok(lent) => {
                assert_eq!(lent * 32, cached, "no more and no less than what is here");
                let pages: Vec<u32> = self.kv.lease_pages(id)[0].iter().map(|p| p.page).collect();
                let written =
                    self.tables.iter().flat_map(|s| &s.table.pages(0)[(s.computed / 32) as usize..]);
                let written: BTreeSet<u32> = written.map(|p| p.page).collect();
                assert!(pages.iter().all(|page| !written.contains(page)), "only whole pages are lent");
                let expires = (self.now + TIME_TO_LIVE).min(deadline);
                let lease = ModelLease {
                    pages,
                    tokens: lent * 32,
                    sealed: true,
                    newest: 0,
                    claim: None,
                    expires,
                    deadline,
                };
                self.leases.insert(id, lease);
                self.lease_ids.push(id);
            }
            Err(_) => assert!(cached > 0 && !self.kv.can_grant(0, cached / 32)),
        }
    }

    fn follow(&mut self, lease: usize, attempt: u32) {
        let Some(id) = self.lease(lease) else { return };
        let claim = ClaimId(self.claims.len() as u128 + 1);
        let followed = self.kv.follow(id, Attempt(attempt), claim, self.now);
        match self.leases.get_mut(&id) {
            Some(l) if attempt >= l.newest => {
                assert_eq!(followed, Ok(()), "a newer attempt always gets through");
                (l.newest, l.claim) = (attempt, Some(claim));
                l.expires = (self.now + TIME_TO_LIVE).min(l.deadline).max(l.expires);
                self.claims.push(claim);
            }
            _ => assert!(followed.is_err()),
        }
    }

    fn end(&mut self, lease: usize, claim: usize, complete: bool) {
        let (Some(id), Some(claim)) = (self.lease(lease), self.claim(claim)) else { return };
        let verdict = self.kv.end(id, claim, complete, self.now);
        let Some(l) = self.leases.get_mut(&id) else {
            if verdict == Verdict::Held {
                assert_eq!(self.held.get(&id), Some(&claim), "only who was told so is told so again");
            }
            return;
        };
        if l.claim != Some(claim) {
            assert_ne!(verdict, Verdict::Held, "a claim that does not stand ends nothing");
        } else if !complete {
            l.claim = None;
        } else if l.sealed {
            assert_eq!(verdict, Verdict::Held);
            self.leases.remove(&id);
            self.held.insert(id, claim);
        } else {
            assert_eq!(verdict, Verdict::Lost);
        }
    }

    /// Who follows the cache change by change knows what somebody learns who asks for all of it.
    fn follow_cache(&mut self) {
        let (known, seen) = &mut self.followed;
        let (CacheChanges::Since(changes), now) = self.kv.cache_changes(Some(*seen)) else {
            panic!("so few changes are remembered");
        };
        for (stored, hash) in changes {
            let new = if stored { known.insert(hash) } else { known.remove(&hash) };
            assert!(new, "a block comes once and goes once");
        }
        *seen = now;
        let all = CacheChanges::All(known.iter().copied().collect());
        assert_eq!(self.kv.cache_changes(None), (all, now));
    }

    /// What must hold after every operation.
    fn check(&mut self) {
        self.kv.check_books();
        self.follow_cache();
        for effect in self.kv.take_effects() {
            if let Effect::Ended { lease, .. } = effect {
                assert!(!self.leases.contains_key(&lease), "an ended lease is over");
            }
        }
        let alive: BTreeSet<LeaseId> = self.leases.keys().copied().collect();
        assert_eq!(self.kv.lease_count(), alive.len());
        assert!(alive.iter().all(|id| self.kv.lease_alive(*id)));
        // Every page in use is used by somebody we know, and the other way round.
        let tables = self.tables.iter().flat_map(|s| s.table.pages(0)).map(|p| p.page);
        let leased = self.leases.values().flat_map(|l| l.pages.iter().copied());
        let used: BTreeSet<u32> =
            tables.chain(leased).chain(self.holds.iter().map(|(_, page)| *page)).collect();
        let counts = self.kv.counts();
        assert_eq!(counts.in_use as usize, used.len());
        assert_eq!(counts.total, counts.free + counts.cached + counts.in_use);
        // A page that two sequences have is a published one, whole and never written again.
        let mut writers: BTreeMap<u32, usize> = BTreeMap::new();
        for s in &self.tables {
            let tail = s.computed / 32;
            for page in s.table.pages(0).iter().skip(tail as usize) {
                *writers.entry(page.page).or_default() += 1;
            }
        }
        assert!(writers.values().all(|&n| n == 1), "two sequences would write to one page");
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, ..ProptestConfig::default() })]

    #[test]
    fn the_books_are_right_after_any_operations_and_nothing_is_left_in_the_end(ops in prop::collection::vec(op(), 1..120)) {
        let mut world = World::new();
        for op in &ops {
            world.apply(op);
            world.check();
        }
        for s in std::mem::take(&mut world.tables) {
            world.kv.close(s.table, world.now);
        }
        for (hold, _) in std::mem::take(&mut world.holds) {
            world.kv.release(hold);
        }
        world.apply(&Op::Pass { millis: 60_000 });
        world.check();
        prop_assert_eq!(world.kv.counts().in_use, 0);
        prop_assert_eq!(world.kv.lease_count(), 0);
        prop_assert_eq!(world.kv.next_expiry(), None);
    }
}
