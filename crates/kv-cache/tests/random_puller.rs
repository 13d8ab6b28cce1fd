//! A puller that hears anything, in any order: what it does is compared with what it has heard, kept in plain sets.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;

use proptest::prelude::*;
use tandem_kv_cache::{FirstTokenBundle, PullAction, PullEvent, Puller, Verdict};
use tandem_types::ClaimId;

const CLAIM: ClaimId = ClaimId(3);
const GROUPS: u32 = 2;
const BLOCKS: u32 = 150;

fn event() -> impl Strategy<Value = PullEvent> {
    let why = String::new;
    let id = 1..8u64;
    let ready = (0..GROUPS + 1, 0..3u32, 0..4u32);
    let verdict =
        prop_oneof![4 => Just(Verdict::Held), 1 => Just(Verdict::Lost), 1 => Just(Verdict::Superseded)];
    prop_oneof![
        6 => Just(PullEvent::Claimed(CLAIM)),
        12 => ready.prop_map(|(group, first, count)| PullEvent::Ready { group, first: first * 50, count: count * 50 }),
        6 => Just(PullEvent::Sealed { tokens: BLOCKS * 32, bundle: FirstTokenBundle::default() }),
        8 => id.clone().prop_map(PullEvent::Arrived),
        12 => id.clone().prop_map(PullEvent::Verified),
        2 => id.clone().prop_map(PullEvent::Corrupt),
        1 => id.prop_map(move |id| PullEvent::Broken(id, why())),
        3 => verdict.prop_map(PullEvent::Verdict),
        2 => Just(PullEvent::NoVerdict(why())),
        1 => prop_oneof![
            Just(PullEvent::Done),
            Just(PullEvent::Superseded),
            Just(PullEvent::Lost(why())),
            Just(PullEvent::StreamClosed(why())),
            Just(PullEvent::Deadline),
        ],
    ]
}

/// What has been heard and done so far.
#[derive(Default)]
struct Heard {
    claimed: bool,
    sealed: bool,
    /// By group, blocks that were said to be whole.
    whole: BTreeMap<u32, BTreeSet<u32>>,
    under_way: BTreeMap<u64, Range<u32>>,
    /// How often each block was asked for, and came wrong.
    asked: BTreeMap<u32, u32>,
    wrong: BTreeMap<u32, u32>,
    good: BTreeSet<u32>,
    unverified: bool,
    verdict_asked: bool,
    ended: bool,
}

impl Heard {
    fn hear(&mut self, event: &PullEvent) {
        match event {
            PullEvent::Claimed(_) => self.claimed = true,
            PullEvent::Sealed { .. } => self.sealed = true,
            PullEvent::Ready { group, first, count } => {
                self.whole.entry(*group).or_default().extend(*first..first + count);
            }
            PullEvent::Arrived(id) | PullEvent::Verified(id) => {
                if let Some(blocks) = self.under_way.remove(id) {
                    self.unverified |= matches!(event, PullEvent::Arrived(_));
                    self.good.extend(blocks);
                }
            }
            PullEvent::Corrupt(id) => {
                for block in self.under_way.remove(id).into_iter().flatten() {
                    *self.wrong.entry(block).or_default() += 1;
                }
            }
            _ => {}
        }
    }

    /// Whether this may be done now, after that was heard.
    fn check(&mut self, action: PullAction, after: &PullEvent, skip: u32) {
        assert!(!self.ended, "{action:?} after the last action");
        match action {
            PullAction::Pull { id, claim, blocks } => {
                assert!(self.claimed && claim == CLAIM);
                for block in blocks.clone() {
                    let whole = |group| self.whole.get(&group).is_some_and(|whole| whole.contains(&block));
                    assert!(block >= skip && (0..GROUPS).all(whole), "block {block} is not whole");
                    let asked = self.asked.entry(block).or_default();
                    *asked += 1;
                    assert_eq!(*asked, 1 + self.wrong.get(&block).copied().unwrap_or_default());
                }
                assert!(self.under_way.insert(id, blocks).is_none(), "pulls have names of their own");
            }
            PullAction::AskVerdict(claim) => {
                assert!(self.sealed && claim == CLAIM && !self.verdict_asked);
                assert!((skip..BLOCKS).all(|block| self.good.contains(&block)), "bytes are missing");
                self.verdict_asked = true;
            }
            PullAction::Deliver { tokens, .. } => {
                assert_eq!(tokens, BLOCKS * 32);
                let owners_word = *after == PullEvent::Verdict(Verdict::Held);
                let sums = matches!(after, PullEvent::NoVerdict(_)) && !self.unverified;
                assert!(self.verdict_asked && (owners_word || sums), "used after {after:?}");
                self.ended = true;
            }
            PullAction::GiveUp(_) => self.ended = true,
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2000, ..ProptestConfig::default() })]

    #[test]
    fn it_does_only_what_it_may_and_ends_once(
        skip in prop_oneof![Just(0), Just(60), Just(BLOCKS)],
        events in prop::collection::vec(event(), 1..80),
    ) {
        let mut puller = Puller::new(GROUPS, BLOCKS, skip);
        let mut heard = Heard::default();
        for event in events {
            heard.hear(&event);
            puller.on(event.clone());
            while let Some(action) = puller.next_action() {
                heard.check(action, &event, skip);
            }
            prop_assert_eq!(puller.is_over(), heard.ended);
        }
    }
}
