//! The prefix index says what the naive one says; bounded, it says less and never more.

mod oracle;

use oracle::Oracle;
use proptest::prelude::*;
use tandem_placement::index::{Change, Found, Index, Refused};
use tandem_placement::{Held, Tier};
use tandem_types::{BlockHash, Incarnation, WorkerId};

const TIERS: [Tier; 4] = [Tier::Device, Tier::Host, Tier::Disk, Tier::Store];

#[derive(Clone, Debug)]
enum Event {
    Snapshot {
        worker: usize,
        incarnation: u64,
        sequence: u64,
        blocks: Vec<(Tier, BlockHash)>,
    },
    /// The next change of a worker; `gap` is what its sequence number is wrong by.
    Change {
        worker: usize,
        incarnation: Option<u64>,
        gap: i64,
        change: Change,
    },
    Forget {
        worker: usize,
    },
    /// A worker's pool is so large.
    Expect {
        worker: usize,
        pool: usize,
    },
}

fn name(worker: usize) -> WorkerId {
    format!("worker-{worker}").as_str().into()
}

/// Hashes of few homes, so that runs grow long, collide and are closed again.
fn hash(blocks: u32) -> impl Strategy<Value = BlockHash> {
    (0..blocks).prop_map(|block| BlockHash(u128::from(block) | u128::from(block % 3) << 100))
}

fn change(blocks: u32, most: usize) -> impl Strategy<Value = Change> {
    let list = move || (0..4usize, prop::collection::vec(hash(blocks), 0..most));
    prop_oneof![
        8 => list().prop_map(|(tier, hashes)| Change::Stored(TIERS[tier], hashes)),
        4 => list().prop_map(|(tier, hashes)| Change::Removed(TIERS[tier], hashes)),
        1 => Just(Change::Cleared),
    ]
}

fn event(workers: usize, blocks: u32, most: usize) -> impl Strategy<Value = Event> {
    let gap = prop_oneof![12 => Just(0i64), 1 => -2..3i64];
    let other = prop_oneof![12 => Just(None), 1 => (0..3u64).prop_map(Some)];
    let block = (0..4usize, hash(blocks)).prop_map(|(tier, hash)| (TIERS[tier], hash));
    prop_oneof![
        2 => (0..workers, 0..3u64, 0..100u64, prop::collection::vec(block, 0..most)).prop_map(
            |(worker, incarnation, sequence, blocks)| Event::Snapshot { worker, incarnation, sequence, blocks }
        ),
        12 => (0..workers, other, gap, change(blocks, most)).prop_map(
            |(worker, incarnation, gap, change)| Event::Change { worker, incarnation, gap, change }
        ),
        1 => (0..workers).prop_map(|worker| Event::Forget { worker }),
        1 => (0..workers, prop_oneof![0..9_000usize, Just(u32::MAX as usize)])
            .prop_map(|(worker, pool)| Event::Expect { worker, pool }),
    ]
}

/// The real index and the naive one, fed alike.
struct Both {
    index: Index,
    oracle: Oracle,
    /// Incarnation and sequence of every worker as it counts them itself.
    last: Vec<(u64, u64)>,
}

impl Both {
    fn new(workers: usize, bytes_max: usize) -> Both {
        Both { index: Index::new(bytes_max), oracle: Oracle::default(), last: vec![(0, 0); workers] }
    }

    fn happen(&mut self, event: &Event) {
        match event {
            Event::Snapshot { worker, incarnation, sequence, blocks } => {
                self.last[*worker] = (*incarnation, *sequence);
                let (worker, incarnation) = (name(*worker), Incarnation(*incarnation));
                let taken = self.index.snapshot(&worker, incarnation, *sequence, blocks.iter().copied());
                assert_eq!(taken, Ok(()));
                self.oracle.snapshot(&worker, incarnation, *sequence, blocks.iter().copied());
            }
            Event::Change { worker, incarnation, gap, change } => {
                let (known, last) = self.last[*worker];
                let incarnation = Incarnation(incarnation.unwrap_or(known));
                let sequence = (last + 1).saturating_add_signed(*gap);
                let taken = self.index.apply(&name(*worker), incarnation, sequence, change);
                assert_eq!(
                    taken.is_ok(),
                    self.oracle.apply(&name(*worker), incarnation, sequence, change),
                    "{taken:?}"
                );
                if taken.is_ok() {
                    self.last[*worker].1 = sequence;
                }
            }
            Event::Forget { worker } => {
                self.index.forget(&name(*worker));
                self.oracle.forget(&name(*worker));
            }
            Event::Expect { worker, pool } => {
                let (bytes, bound) = (self.index.bytes(), self.index.bytes_max());
                self.index.expect(&name(*worker), *pool);
                assert!(self.index.bytes() >= bytes && self.index.bytes() <= bound, "{bytes} bytes before");
            }
        }
    }

    fn found(&self, prompt: &[BlockHash]) -> (Vec<Found>, Vec<Found>) {
        let mut found = self.index.longest(prompt);
        assert!(found.is_sorted_by_key(|found| std::cmp::Reverse(found.blocks)), "the longest first");
        found.sort_by(|a, b| b.blocks.cmp(&a.blocks).then_with(|| a.worker.cmp(&b.worker)));
        (found, self.oracle.longest(prompt))
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 256, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn it_finds_what_the_naive_index_finds(
        events in prop::collection::vec(event(6, 40, 30), 1..60),
        prompts in prop::collection::vec(prop::collection::vec(hash(40), 0..12), 1..6),
    ) {
        let mut both = Both::new(6, 1 << 24);
        for event in &events {
            both.happen(event);
            prop_assert_eq!(both.index.len(), both.oracle.len());
            for prompt in &prompts {
                let (found, expected) = both.found(prompt);
                prop_assert_eq!(found, expected);
            }
        }
        prop_assert_eq!(both.index.evicted(), 0);
    }

    #[test]
    fn what_a_policy_is_told_is_what_is_found(
        events in prop::collection::vec(event(6, 12, 20), 1..30),
        prompt in prop::collection::vec(hash(12), 0..12),
    ) {
        let mut both = Both::new(6, 1 << 24);
        events.iter().for_each(|event| both.happen(event));
        // Of these workers, one is no candidate.
        let candidate = |_, worker: &WorkerId, _| (0..6).find(|n| name(*n) == *worker).filter(|n| *n != 3);
        let mut told = both.index.held(&prompt, 16, candidate);
        told.sort_by_key(|held| held.candidate);
        let expected = both.oracle.longest(&prompt).into_iter().filter_map(|found| {
            let (device_tokens, tokens) = (found.device_blocks * 16, found.blocks * 16);
            let candidate = candidate(0, &found.worker, found.incarnation)?;
            Some(Held { candidate, device_tokens, tokens, tier: found.tier })
        });
        let mut expected: Vec<Held> = expected.collect();
        expected.sort_by_key(|held| held.candidate);
        prop_assert_eq!(&told, &expected);
        // By number it is the same, and another map is due as soon as somebody comes or goes.
        let mut numbers = std::collections::BTreeMap::new();
        for worker in (0..6).filter(|worker| *worker != 3) {
            if let Some(number) = both.index.number(&name(worker)) {
                numbers.insert(number, worker);
            }
        }
        let mut told = both.index.held(&prompt, 16, |number, _, _| numbers.get(&number).copied());
        told.sort_by_key(|held| held.candidate);
        prop_assert_eq!(told, expected);
        let version = both.index.version();
        both.happen(&Event::Snapshot { worker: 0, incarnation: 9, sequence: 0, blocks: Vec::new() });
        prop_assert!(both.index.version() > version);
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn bounded_it_never_says_more_than_the_naive_index_and_keeps_its_bytes(
        events in prop::collection::vec(event(5, 6_000, 1_500), 1..40),
        bytes_max in 0..300_000usize,
        starts in prop::collection::vec(0..6_000u32, 1..20),
    ) {
        let mut both = Both::new(5, bytes_max);
        for event in &events {
            both.happen(event);
            prop_assert!(both.index.bytes() <= both.index.bytes_max(), "{} bytes", both.index.bytes());
            prop_assert!(both.index.len() <= both.oracle.len());
            for start in &starts {
                let blocks = *start..*start + 3;
                let prompt: Vec<BlockHash> =
                    blocks.map(|block| BlockHash(u128::from(block) | u128::from(block % 3) << 100)).collect();
                let (found, expected) = both.found(&prompt);
                for found in found {
                    let known = expected.iter().find(|other| other.worker == found.worker);
                    let known = known.expect("nobody is invented");
                    prop_assert_eq!(found.incarnation, known.incarnation);
                    prop_assert!(found.blocks <= known.blocks && found.device_blocks <= known.device_blocks);
                }
            }
        }
    }
}

fn hashes(range: std::ops::Range<u64>) -> Vec<BlockHash> {
    // Odd factors spread them like real ones.
    range
        .map(|n| BlockHash(u128::from(n + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15_f39c_c060_5ced_c835)))
        .collect()
}

#[test]
fn old_chains_are_evicted_before_those_that_were_stored_again() {
    let (mut index, worker) = (Index::new(1 << 20), name(0));
    let incarnation = Incarnation(1);
    index.snapshot(&worker, incarnation, 0, []).expect("there is room");
    let mut sequence = 0;
    let mut store = |index: &mut Index, blocks| {
        sequence += 1;
        let stored = Change::Stored(Tier::Device, blocks);
        index.apply(&worker, incarnation, sequence, &stored).expect("is next");
    };
    // Chains of a hundred blocks, three times as many as there is room for; the first is used all the time.
    for chain in 0..400u64 {
        store(&mut index, hashes(chain * 100..chain * 100 + 100));
        store(&mut index, hashes(0..100));
    }
    assert!(index.evicted() > 10_000, "{}", index.evicted());
    let blocks =
        |chain: u64| index.longest(&hashes(chain * 100..chain * 100 + 100)).first().map_or(0, |f| f.blocks);
    assert_eq!(blocks(0), 100, "it was stored again");
    let whole = (300..400).filter(|chain| blocks(*chain) == 100).count();
    assert_eq!(whole, 100, "the young stay whole");
    assert_eq!((1..100).map(blocks).sum::<u32>(), 0, "the old are gone");
}

#[test]
fn a_worker_that_starts_over_and_over_leaves_nothing_behind() {
    let mut index = Index::new(1 << 22);
    for start in 0..2_000 {
        let blocks = hashes(start * 7..start * 7 + 200).into_iter().map(|hash| (Tier::Host, hash));
        index.snapshot(&name(start as usize % 3), Incarnation(start), start, blocks).expect("there is room");
        assert_eq!(index.len(), 200 * (start as usize + 1).min(3));
    }
    assert_eq!(index.evicted(), 0);
    let bytes = index.bytes();
    (0..3).for_each(|worker| index.forget(&name(worker)));
    assert!(index.is_empty() && index.bytes() <= bytes);
}

#[test]
fn a_delta_out_of_turn_is_refused_with_its_reason() {
    let (mut index, worker, stored) = (Index::new(0), name(0), Change::Stored(Tier::Device, hashes(0..1)));
    let apply =
        |index: &mut Index, start, sequence| index.apply(&worker, Incarnation(start), sequence, &stored);
    assert_eq!(apply(&mut index, 1, 1), Err(Refused::SnapshotNeeded), "it is not known");
    index.snapshot(&worker, Incarnation(1), u64::MAX, []).expect("there is room");
    assert_eq!(apply(&mut index, 1, u64::MAX), Err(Refused::OutOfDate));
    assert_eq!(apply(&mut index, 1, 0), Err(Refused::OutOfDate));
    index.snapshot(&worker, Incarnation(1), 5, []).expect("there is room");
    assert_eq!(apply(&mut index, 1, 7), Err(Refused::SnapshotNeeded), "one is missing");
    assert_eq!(apply(&mut index, 2, 6), Err(Refused::SnapshotNeeded), "another start");
    assert_eq!(apply(&mut index, 1, 6), Ok(()));
}

#[test]
fn an_index_that_knows_the_pools_need_not_grow_when_they_fill() {
    let mut index = Index::new(64 << 20);
    let pool = 3_000;
    for worker in 0..4 {
        index.snapshot(&name(worker), Incarnation(1), 0, []).unwrap();
        index.expect(&name(worker), pool);
    }
    let bytes = index.bytes();
    for worker in 0..4 {
        let blocks = (0..pool as u128).map(|block| BlockHash((worker as u128) << 64 | block)).collect();
        index.apply(&name(worker), Incarnation(1), 1, &Change::Stored(Tier::Device, blocks)).unwrap();
    }
    assert_eq!((index.bytes(), index.len(), index.evicted()), (bytes, 4 * pool, 0));
    index.expect(&name(9), 1 << 40);
    assert_eq!(index.bytes(), bytes, "nobody knows that worker");
    // What a worker says of itself never asks for more than the bound, and leaves room for lists.
    index.expect(&name(0), usize::MAX / 4);
    assert!(index.bytes() > bytes && index.bytes() * 3 <= index.bytes_max() * 2);
}
