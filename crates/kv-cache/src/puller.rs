//! The puller's side of a hand-off, as a state machine: events in, actions out.
//!
//! It asks for pages as they become ready, for the verdict when it has them all, and delivers only after
//! `Held`. It ends exactly once, with `Deliver` or `GiveUp`; what comes after that is ignored.

use std::collections::{BTreeMap, VecDeque};
use std::ops::Range;

use tandem_types::ClaimId;

use crate::mistake::{Mistake, Mistaken};
use crate::{FirstTokenBundle, Verdict};

/// Blocks of one pull at most: a batch is one request, and several may be under way.
const BATCH_BLOCKS: u32 = 64;
/// Pulls under way at once.
const PULLS_MAX: usize = 4;

/// What the puller hears.
#[derive(Clone, Debug, PartialEq)]
pub enum PullEvent {
    /// The owner has accepted the claim.
    Claimed(ClaimId),
    /// Pages of a group are whole: the first and how many.
    Ready {
        /// The KV group.
        group: u32,
        /// Index among the lease's pages.
        first: u32,
        /// How many.
        count: u32,
    },
    /// Everything is ready, and this goes with it.
    Sealed {
        /// Tokens whose KV the pages hold.
        tokens: u32,
        /// The first token.
        bundle: FirstTokenBundle,
    },
    /// Every byte of this pull has arrived; nobody has checked them.
    Arrived(u64),
    /// Every byte of this pull has arrived and is what the owner computed: checksums match.
    Verified(u64),
    /// Every byte of this pull has arrived, and some are not what the owner computed.
    Corrupt(u64),
    /// This pull has failed; its destination may be written no more.
    Broken(u64, String),
    /// The owner's word.
    Verdict(Verdict),
    /// The owner could not be asked for its word.
    NoVerdict(String),
    /// The request ended at the owner.
    Done,
    /// A newer attempt holds the lease.
    Superseded,
    /// The lease is over.
    Lost(String),
    /// The stream to the owner is gone.
    StreamClosed(String),
    /// The request's deadline has passed.
    Deadline,
}

/// What the puller wants done.
#[derive(Clone, Debug, PartialEq)]
pub enum PullAction {
    /// Pull these blocks (indices among the lease's pages), all groups of them, under the claim.
    Pull {
        /// Names the pull in `Arrived` and `Broken`.
        id: u64,
        /// The claim.
        claim: ClaimId,
        /// The blocks.
        blocks: Range<u32>,
    },
    /// Ask the owner for its verdict; every byte is here.
    AskVerdict(ClaimId),
    /// The bytes are good: go on from here. The last action.
    Deliver {
        /// Tokens whose KV is here.
        tokens: u32,
        /// The first token.
        bundle: FirstTokenBundle,
    },
    /// Nothing came of it. The last action.
    GiveUp(GiveUp),
}

/// Why a pull came to nothing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum GiveUp {
    /// The request ended at the owner.
    Done,
    /// A newer attempt holds the lease.
    Superseded,
    /// The lease is over, or the owner is gone before its verdict.
    Lost(String),
    /// Bytes did not arrive.
    Transfer(String),
    /// Bytes of these blocks came wrong twice: they are wrong at the owner, or the way there is bad.
    Corrupt(Range<u32>),
    /// The owner could not be reached at all.
    OwnerUnreachable(String),
    /// The request's deadline has passed.
    Deadline,
}

#[derive(Clone, Debug, PartialEq)]
#[cfg_attr(feature = "model", derive(Hash))]
enum State {
    Pulling,
    Confirming,
    Over,
}

/// A pull under way.
#[derive(Clone, Debug, PartialEq)]
#[cfg_attr(feature = "model", derive(Hash))]
struct Fetch {
    blocks: Range<u32>,
    /// They came wrong before.
    again: bool,
}

/// One pull of one lease.
#[derive(Debug)]
#[cfg_attr(feature = "model", derive(Clone))]
pub struct Puller {
    state: State,
    blocks: u32,
    claim: Option<ClaimId>,
    /// Ready blocks per group, counted from the first.
    ready: Vec<u32>,
    /// Blocks asked for so far, the skipped ones included.
    asked: u32,
    under_way: BTreeMap<u64, Fetch>,
    next_pull: u64,
    /// All that came so far was verified.
    verified: bool,
    sealed: Option<(u32, FirstTokenBundle)>,
    actions: VecDeque<PullAction>,
    mistaken: Mistaken,
}

impl Puller {
    /// For a lease of so many blocks in so many groups, of which the first `skip` are here already.
    pub fn new(groups: u32, blocks: u32, skip: u32) -> Puller {
        assert!(skip <= blocks, "no more blocks can be here than there are");
        Puller {
            state: State::Pulling,
            blocks,
            claim: None,
            ready: vec![0; groups as usize],
            asked: skip,
            under_way: BTreeMap::new(),
            next_pull: 1,
            verified: true,
            sealed: None,
            actions: VecDeque::new(),
            mistaken: Mistaken::default(),
        }
    }

    /// Takes an event in.
    pub fn on(&mut self, event: PullEvent) {
        if self.state == State::Over {
            return;
        }
        match event {
            PullEvent::Claimed(claim) => self.claim = Some(claim),
            PullEvent::Ready { group, first, count } => {
                // Ready ranges come in order; one that leaves a gap is not counted before the gap is filled.
                if let Some(ready) = self.ready.get_mut(group as usize)
                    && first <= *ready
                {
                    *ready = (*ready).max(first.saturating_add(count)).min(self.blocks);
                }
            }
            PullEvent::Sealed { tokens, bundle } => self.sealed = Some((tokens, bundle)),
            PullEvent::Arrived(id) => {
                self.verified &= self.under_way.remove(&id).is_none();
            }
            PullEvent::Verified(id) => {
                self.under_way.remove(&id);
            }
            PullEvent::Corrupt(id) => {
                let Some(Fetch { blocks, again }) = self.under_way.remove(&id) else { return };
                if again {
                    return self.give_up(GiveUp::Corrupt(blocks));
                }
                self.fetch(Fetch { blocks, again: true });
            }
            PullEvent::Broken(id, why) => {
                self.under_way.remove(&id);
                return self.give_up(GiveUp::Transfer(why));
            }
            PullEvent::Verdict(verdict) => {
                return match (verdict, &self.state) {
                    (Verdict::Held, State::Confirming) => self.deliver(),
                    (Verdict::Held, _) => self.give_up(GiveUp::Lost("a verdict nobody asked for".into())),
                    (Verdict::Lost, _) => self.give_up(GiveUp::Lost("the owner's verdict is lost".into())),
                    (Verdict::Superseded, _) => self.give_up(GiveUp::Superseded),
                };
            }
            // The owner has died after the seal: checksums that match stand in for its word, for they say that
            // these are the bytes it computed.
            PullEvent::NoVerdict(_) if self.state == State::Confirming && self.verified => {
                return self.deliver();
            }
            PullEvent::NoVerdict(why) => return self.give_up(GiveUp::Lost(format!("no verdict: {why}"))),
            PullEvent::Done => return self.give_up(GiveUp::Done),
            PullEvent::Superseded => return self.give_up(GiveUp::Superseded),
            PullEvent::Lost(why) => return self.give_up(GiveUp::Lost(why)),
            PullEvent::StreamClosed(why) => {
                // Once everything is announced the stream has done its service.
                if self.sealed.is_some() {
                    return;
                }
                let unreachable = self.claim.is_none();
                return self.give_up(if unreachable {
                    GiveUp::OwnerUnreachable(why)
                } else {
                    GiveUp::Lost(why)
                });
            }
            PullEvent::Deadline => return self.give_up(GiveUp::Deadline),
        }
        self.go_on();
    }

    /// Asks for what can be had now.
    fn go_on(&mut self) {
        let Some(claim) = self.claim else { return };
        if self.state != State::Pulling {
            return;
        }
        let mut ready = self.ready.iter().copied().min().expect("there is a group");
        if self.mistaken.makes(Mistake::ReadingBeforeReady) {
            ready = self.blocks;
        }
        while self.asked < ready && self.under_way.len() < PULLS_MAX {
            let blocks = self.asked..ready.min(self.asked + BATCH_BLOCKS);
            self.asked = blocks.end;
            self.fetch(Fetch { blocks, again: false });
        }
        if self.sealed.is_some() && self.asked == self.blocks && self.under_way.is_empty() {
            self.state = State::Confirming;
            self.actions.push_back(PullAction::AskVerdict(claim));
        }
    }

    fn fetch(&mut self, fetch: Fetch) {
        let claim = self.claim.expect("nothing is fetched before the claim stands");
        let id = self.next_pull;
        self.next_pull += 1;
        self.actions.push_back(PullAction::Pull { id, claim, blocks: fetch.blocks.clone() });
        self.under_way.insert(id, fetch);
    }

    fn deliver(&mut self) {
        let (tokens, bundle) = self.sealed.take().expect("the verdict is asked for after the seal");
        self.state = State::Over;
        self.actions.push_back(PullAction::Deliver { tokens, bundle });
    }

    fn give_up(&mut self, why: GiveUp) {
        self.state = State::Over;
        self.actions.clear();
        self.actions.push_back(PullAction::GiveUp(why));
    }

    /// The next thing to do.
    pub fn next_action(&mut self) -> Option<PullAction> {
        self.actions.pop_front()
    }

    /// Blocks for which a pull has been ordered, those that were here already included.
    pub fn asked(&self) -> u32 {
        self.asked
    }

    /// Whether it has ended.
    pub fn is_over(&self) -> bool {
        self.state == State::Over
    }
}

#[cfg(feature = "model")]
impl Puller {
    /// Makes this mistake from now on.
    pub fn make(&mut self, mistake: Mistake) {
        self.mistaken = Mistaken::from(mistake);
    }
}

#[cfg(feature = "model")]
impl std::hash::Hash for Puller {
    fn hash<H: std::hash::Hasher>(&self, state: &mut H) {
        (&self.state, self.claim, &self.ready, self.asked).hash(state);
        (&self.under_way, self.next_pull, self.verified, &self.sealed).hash(state);
        assert!(self.actions.is_empty(), "actions are taken before anybody looks");
    }
}
