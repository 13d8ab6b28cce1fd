//! Leases, step by step.

use std::time::Duration;

use tandem_kv_cache::{
    AdoptError, ChainSeed, Config, Effect, EndedWhy, FirstTokenBundle, FollowError, GrantError, HashChain,
    KvCache, ReadError, Table, Verdict, chain_seed,
};
use tandem_types::{Attempt, ClaimId, KvIdentity, LeaseId, Time, TokenId};

const LEASE: LeaseId = LeaseId(1);

fn seed() -> ChainSeed {
    chain_seed(&KvIdentity::default(), true, b"", "")
}

fn hashes(tokens: &[TokenId]) -> HashChain {
    let mut chain = HashChain::new(seed());
    chain.extend(tokens);
    chain
}

fn cache(pages: u32) -> KvCache {
    KvCache::new(Config {
        pages,
        groups: 1,
        leased_share: 0.5,
        lease_time_to_live: Duration::from_secs(10),
        prefix_cache: true,
    })
}

fn at(seconds: u64) -> Time {
    Time::from_millis(seconds * 1000)
}

/// A granted lease of 70 tokens (three blocks) and the table it is on.
fn granted(kv: &mut KvCache) -> Table {
    let (table, _) = kv.open(&[], 70, 70, at(0)).expect("room");
    kv.grant(LEASE, &table, 70, at(60), at(0)).expect("the only lease is granted");
    table
}

fn sealed(kv: &mut KvCache) {
    let table = granted(kv);
    kv.seal(LEASE, 70, FirstTokenBundle::default(), at(0));
    kv.close(table, at(0));
}

#[test]
fn pages_become_ready_as_they_are_computed_and_the_last_one_with_the_seal() {
    let mut kv = cache(8);
    let table = granted(&mut kv);
    kv.follow(LEASE, Attempt(1), ClaimId(1), at(0)).expect("it stands");
    assert_eq!(kv.take_effects(), []);
    kv.progress(LEASE, 31);
    assert_eq!(kv.take_effects(), []);
    kv.progress(LEASE, 40);
    let ready = |first, count| Effect::Ready { claim: ClaimId(1), group: 0, first, count };
    assert_eq!(kv.take_effects(), [ready(0, 1)]);
    kv.progress(LEASE, 70);
    assert_eq!(kv.take_effects(), [ready(1, 1)]);
    kv.seal(LEASE, 70, FirstTokenBundle::default(), at(0));
    let seal = Effect::Sealed { claim: ClaimId(1), tokens: 70, bundle: FirstTokenBundle::default() };
    assert_eq!(kv.take_effects(), [ready(2, 1), seal.clone()]);
    // A later puller hears it all at once.
    kv.follow(LEASE, Attempt(2), ClaimId(2), at(0)).expect("it stands");
    let again = kv.take_effects();
    assert_eq!(again[0], Effect::Superseded { claim: ClaimId(1) });
    assert_eq!(again[1], Effect::Ready { claim: ClaimId(2), group: 0, first: 0, count: 3 });
    assert!(matches!(again[2], Effect::Sealed { claim: ClaimId(2), .. }));
    kv.close(table, at(0));
    kv.check_books();
}

#[test]
fn the_verdict_is_held_once_all_is_there_and_stays_the_same_when_asked_again() {
    let mut kv = cache(8);
    let table = granted(&mut kv);
    kv.follow(LEASE, Attempt(1), ClaimId(1), at(0)).expect("it stands");
    assert_eq!(kv.end(LEASE, ClaimId(1), true, at(1)), Verdict::Lost, "it is not sealed");
    kv.seal(LEASE, 70, FirstTokenBundle::default(), at(1));
    kv.close(table, at(1));
    assert_eq!(kv.counts().in_use, 3, "the lease keeps the pages");
    assert_eq!(kv.end(LEASE, ClaimId(1), true, at(2)), Verdict::Held);
    assert_eq!(kv.counts().in_use, 0);
    assert_eq!(kv.end(LEASE, ClaimId(1), true, at(3)), Verdict::Held, "the answer is remembered");
    assert_eq!(kv.end(LEASE, ClaimId(2), true, at(3)), Verdict::Lost, "for the one who got it");
    kv.expire(at(30));
    assert_eq!(kv.end(LEASE, ClaimId(1), true, at(30)), Verdict::Lost, "for one time to live");
}

#[test]
fn the_newest_attempt_wins_and_older_ones_can_end_nothing() {
    let mut kv = cache(8);
    sealed(&mut kv);
    kv.follow(LEASE, Attempt(2), ClaimId(2), at(0)).expect("it stands");
    assert_eq!(kv.follow(LEASE, Attempt(1), ClaimId(1), at(0)), Err(FollowError::Superseded));
    kv.follow(LEASE, Attempt(3), ClaimId(3), at(0)).expect("it is newer");
    assert_eq!(kv.end(LEASE, ClaimId(2), true, at(1)), Verdict::Superseded);
    assert!(kv.lease_alive(LEASE));
    kv.unfollow(ClaimId(2), at(1));
    assert_eq!(kv.end(LEASE, ClaimId(3), true, at(1)), Verdict::Held);
}

#[test]
fn a_refusal_ends_its_claim_only() {
    let mut kv = cache(8);
    sealed(&mut kv);
    kv.follow(LEASE, Attempt(1), ClaimId(1), at(0)).expect("it stands");
    assert_eq!(kv.end(LEASE, ClaimId(1), false, at(1)), Verdict::Held);
    assert!(kv.lease_alive(LEASE));
    kv.follow(LEASE, Attempt(2), ClaimId(2), at(1)).expect("it waits for the next");
    assert_eq!(kv.end(LEASE, ClaimId(2), true, at(1)), Verdict::Held);
}

#[test]
fn a_lease_lives_while_somebody_wants_it_but_not_past_the_requests_deadline() {
    let mut kv = cache(8);
    sealed(&mut kv);
    kv.follow(LEASE, Attempt(1), ClaimId(1), at(0)).expect("it stands");
    for second in [5, 12, 20, 29, 38, 47, 56] {
        kv.renew_claim(ClaimId(1), at(second));
        kv.expire(at(second));
        assert!(kv.lease_alive(LEASE), "at {second} s");
    }
    kv.renew_lease(LEASE, at(59));
    kv.take_effects();
    kv.expire(at(60));
    let ended = Effect::Ended { lease: LEASE, why: EndedWhy::Expired };
    assert_eq!(kv.take_effects(), [Effect::Lost { claim: ClaimId(1) }, ended]);
    assert_eq!(kv.counts().in_use, 0);
    assert_eq!(kv.end(LEASE, ClaimId(1), true, at(60)), Verdict::Lost);
}

#[test]
fn a_lease_nobody_renews_ends_after_its_time() {
    let mut kv = cache(8);
    sealed(&mut kv);
    assert_eq!(kv.next_expiry(), Some(at(10)));
    kv.expire(at(9));
    assert!(kv.lease_alive(LEASE));
    kv.expire(at(10));
    assert!(!kv.lease_alive(LEASE));
}

#[test]
fn only_ready_pages_of_a_live_claim_can_be_read_and_reads_keep_them() {
    let mut kv = cache(8);
    let table = granted(&mut kv);
    kv.follow(LEASE, Attempt(1), ClaimId(1), at(0)).expect("it stands");
    kv.progress(LEASE, 40);
    let page = |i: usize| (0, table.pages(0)[i].page);
    assert_eq!(kv.begin_read(ClaimId(9), &[page(0)]), Err(ReadError::NoClaim));
    assert_eq!(kv.begin_read(ClaimId(1), &[page(1)]), Err(ReadError::NotReady { group: 0, page: page(1).1 }));
    let read = kv.begin_read(ClaimId(1), &[page(0)]).expect("it is ready");
    kv.cancel_lease(LEASE, at(1));
    kv.close(table, at(1));
    assert_eq!(kv.counts().in_use, 1, "the read keeps its page whatever becomes of the lease");
    kv.release(read);
    assert_eq!(kv.counts().in_use, 0);
    kv.check_books();
}

#[test]
fn the_owner_takes_its_own_lease_over_without_copying_unless_the_tail_is_being_read() {
    let mut kv = cache(8);
    let table = granted(&mut kv);
    let pages = table.pages(0).to_vec();
    assert_eq!(kv.adopt(LEASE, Attempt(1), at(0)).unwrap_err(), AdoptError::NotSealed);
    kv.seal(LEASE, 70, FirstTokenBundle::default(), at(0));
    kv.close(table, at(0));
    kv.follow(LEASE, Attempt(1), ClaimId(1), at(0)).expect("it stands");
    let read = kv.begin_read(ClaimId(1), &[(0, pages[2].page)]).expect("it is ready");
    assert_eq!(kv.adopt(LEASE, Attempt(2), at(0)).unwrap_err(), AdoptError::BeingRead);
    kv.release(read);
    kv.take_effects();
    let adopted = kv.adopt(LEASE, Attempt(2), at(0)).expect("nobody reads");
    assert_eq!(adopted.table.pages(0), pages);
    let ended = Effect::Ended { lease: LEASE, why: EndedWhy::Adopted };
    assert_eq!(kv.take_effects(), [Effect::Superseded { claim: ClaimId(1) }, ended]);
    kv.close(adopted.table, at(0));
    assert_eq!(kv.counts().in_use, 0);
}

#[test]
fn a_request_that_ends_with_its_first_token_is_done_for_who_follows() {
    let mut kv = cache(8);
    let table = granted(&mut kv);
    kv.follow(LEASE, Attempt(1), ClaimId(1), at(0)).expect("it stands");
    kv.finish(LEASE, at(0));
    assert_eq!(kv.take_effects()[0], Effect::Done { claim: ClaimId(1) });
    kv.close(table, at(0));
    assert_eq!(kv.counts().in_use, 0);
}

#[test]
fn the_leased_share_is_capped_but_a_lone_lease_always_fits() {
    let mut kv = cache(8);
    let (large, _) = kv.open(&[], 200, 200, at(0)).expect("seven blocks");
    kv.grant(LeaseId(1), &large, 200, at(60), at(0)).expect("alone");
    let (small, _) = kv.open(&[], 5, 5, at(0)).expect("one block");
    let refused = kv.grant(LeaseId(2), &small, 5, at(60), at(0));
    assert_eq!(refused, Err(GrantError::Cap { leased: 7, cap: 4, wanted: 1 }));
    kv.cancel_lease(LeaseId(1), at(0));
    kv.grant(LeaseId(2), &small, 5, at(60), at(0)).expect("there is a share now");
    assert!(kv.can_grant(0, 3) && !kv.can_grant(0, 4) && !kv.can_grant(1, 3));
    kv.close(large, at(0));
    kv.close(small, at(0));
    kv.cancel_lease(LeaseId(2), at(0));
    assert_eq!(kv.counts().in_use, 0);
}

#[test]
fn a_prefix_is_reused_up_to_the_last_full_block_and_never_covers_the_last_known_token() {
    let mut kv = cache(8);
    let tokens: Vec<TokenId> = (0..96).collect();
    let chain = hashes(&tokens);
    let (mut table, cached) = kv.open(chain.hashes(), 96, 96, at(0)).expect("room");
    assert_eq!(cached, 0);
    kv.publish(&mut table, chain.hashes(), 96);
    kv.close(table, at(0));
    assert_eq!((kv.counts().cached, kv.counts().in_use), (3, 0));
    assert_eq!(kv.cached_prefix(chain.hashes(), 96), 64, "the last token's block must be computed");
    assert_eq!(kv.cached_prefix(chain.hashes(), 97), 96);
    let mut other = tokens.clone();
    other[40] = 7;
    assert_eq!(kv.cached_prefix(hashes(&other).hashes(), 97), 32);
    let (table, cached) = kv.open(chain.hashes(), 100, 128, at(0)).expect("room");
    assert_eq!((cached, table.pages(0).len()), (96, 4));
    kv.close(table, at(0));
}

#[test]
fn the_longest_unused_blocks_are_evicted_first_and_a_blocks_children_before_itself() {
    let mut kv = cache(4);
    let of = |first: TokenId| -> Vec<TokenId> { (first..first + 64).collect() };
    for first in [0, 1000] {
        let chain = hashes(&of(first));
        let (mut table, _) = kv.open(chain.hashes(), 64, 64, at(0)).expect("room");
        kv.publish(&mut table, chain.hashes(), 64);
        kv.close(table, at(0));
    }
    assert_eq!(kv.counts().cached, 4);
    let (table, _) = kv.open(&[], 32, 32, at(0)).expect("by eviction");
    assert_eq!(
        kv.cached_prefix(hashes(&of(0)).hashes(), 65),
        32,
        "its second block is gone, its first is not"
    );
    assert_eq!(kv.cached_prefix(hashes(&of(1000)).hashes(), 65), 64);
    kv.close(table, at(0));
    let full = kv.open(&[], 160, 160, at(0)).expect_err("five blocks of four");
    assert_eq!((full.wanted, full.room), (5, 4));
    assert!(!kv.fits_ever(129) && kv.fits_ever(128));
}
