//! What there is in the model: who is where, what is on its way, and what every page holds.
//!
//! The owner's `KvCache` and each decoder's `Puller` are the real ones. Everything around them is as little as
//! lets them meet every order of events: the router's rules, the streams, the calls, the reads.

use std::collections::BTreeMap;
use std::hash::{Hash, Hasher};
use std::ops::Range;
use std::sync::Arc;

use tandem_kv_cache::{Config, FirstTokenBundle, HoldId, KvCache, Puller, Table};
use tandem_types::{BlockHash, ClaimId, LeaseId, Time};

use crate::bounds::*;

/// What half a page holds: whose block, and which prefill wrote it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Word {
    /// Zero is what was there before anything.
    pub content: u8,
    /// The attempt that wrote it.
    pub version: u8,
}

/// The two halves of a page, which are read one after the other.
pub type Bytes = [Word; 2];

/// One attempt of one request.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Key {
    /// The request.
    pub request: u8,
    /// Its attempt.
    pub attempt: u8,
}

/// The work that the owner does beside the requests.
pub const OWN_WORK: Key = Key { request: 2, attempt: 1 };

/// What a puller needs to find a lease and its pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Handle {
    /// The lease.
    pub lease: LeaseId,
    /// Which start of the owner granted it.
    pub incarnation: u8,
    /// How many pages.
    pub blocks: u32,
    /// Where they are.
    pub pages: [u32; BLOCKS as usize],
}

/// How a request ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ended {
    /// Somebody goes on from its KV.
    HandedOff,
    /// Its first token was the last.
    Finished,
    /// With an error.
    Failed,
    /// The client left, or the router died and broke its connection.
    Gone,
}

impl Hash for Ended {
    /// Nothing depends on how; the checker is asked for hand-offs, so those it must tell apart.
    fn hash<H: Hasher>(&self, state: &mut H) {
        (*self == Ended::HandedOff).hash(state);
    }
}

/// Where the router believes that decode is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Decode {
    /// The attempt.
    pub attempt: u8,
    /// The decoder; none is the owner itself.
    pub decoder: Option<usize>,
}

/// What the router knows of a request.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Request {
    /// How it ended.
    pub ended: Option<Ended>,
    /// The last attempt.
    pub attempt: u8,
    /// The attempt that prefills or holds the lease.
    pub prefill: Option<u8>,
    /// What it granted.
    pub handle: Option<Handle>,
    /// Whether it has sent the first token.
    pub first_token: bool,
    /// The attempt that goes on.
    pub decode: Option<Decode>,
}

/// What the router sends to the owner.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ToOwner {
    /// Compute a prompt, if the owner's epoch still is this.
    Start(Key, u8),
    /// Go on from your own lease.
    Adopt(Key, LeaseId, u8),
    /// End an attempt and all it holds.
    Cancel(Key),
    /// The stream broke.
    SessionClosed,
}

/// What the router sends to a decoder.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum ToDecoder {
    /// Go on from this, if the decoder's epoch still is that.
    Start(Key, Handle, u8),
    /// Compute a prompt whose beginning the owner may lend.
    Borrow(Key, u8),
    /// End an attempt and all it holds.
    Cancel(Key),
    /// The stream broke.
    SessionClosed,
}

/// Where an attempt is at the owner.
#[derive(Clone, Debug, Hash)]
pub enum Stage {
    /// For room.
    Waiting,
    /// Pages are being computed; so many are.
    Running {
        /// Its pages.
        table: Table,
        /// How many of them are whole.
        whole: u32,
    },
    /// Computed; the lease waits for a puller.
    HandedOff,
    /// Decodes from pages that it took over.
    Decoding {
        /// Its pages.
        table: Table,
        /// Whether it has written behind the prompt's last token.
        wrote: bool,
    },
}

/// An attempt at the owner.
#[derive(Clone, Debug, Hash)]
pub struct OwnerLeg {
    /// Which.
    pub key: Key,
    /// Its lease, while that stands.
    pub lease: Option<LeaseId>,
    /// Where it is.
    pub stage: Stage,
}

/// A hold by its id. Which it is says nothing; what it keeps, the pool's own fingerprint says.
#[derive(Clone, Copy, Debug)]
pub struct Hold(pub HoldId);

impl Hash for Hold {
    fn hash<H: Hasher>(&self, _: &mut H) {}
}

/// An engine step under way. It writes when it is done, whatever has become of the attempt.
#[derive(Clone, Debug, Hash)]
pub struct Step {
    /// For which attempt.
    pub key: Key,
    /// What keeps its page from reuse.
    pub hold: Hold,
    /// The page.
    pub page: u32,
    /// What it will hold.
    pub word: Word,
}

/// The worker that prefills.
#[derive(Clone, Debug, Hash)]
pub struct Owner {
    /// Which start of its process.
    pub incarnation: u8,
    /// How often its role has changed.
    pub epoch: u8,
    /// The real thing.
    pub kv: KvCache,
    /// What every page holds.
    pub memory: Vec<Bytes>,
    /// Its attempts, oldest first.
    pub legs: Vec<OwnerLeg>,
    /// Its steps under way.
    pub steps: Vec<Step>,
}

/// An attempt at a decoder that takes KV over.
#[derive(Clone, Debug, Hash)]
pub struct DecodeLeg {
    /// Which.
    pub key: Key,
    /// Where from; not known yet while the owner is asked to lend.
    pub handle: Option<Handle>,
    /// The real thing.
    pub puller: Option<Puller>,
    /// What has arrived.
    pub bytes: [Bytes; BLOCKS as usize],
    /// What the owner said the pages hold when they became ready.
    pub sums: [Option<Word>; BLOCKS as usize],
    /// How often the verdict was asked for.
    pub asked: u8,
    /// The claim that it was asked for.
    pub claim: Option<ClaimId>,
}

/// A worker that decodes.
#[derive(Clone, Debug, Default, Hash)]
pub struct Decoder {
    /// How often its role has changed.
    pub epoch: u8,
    /// Its attempts.
    pub legs: Vec<DecodeLeg>,
}

/// What the owner says to who follows.
#[derive(Clone, Debug, PartialEq, Hash)]
pub enum Down {
    /// The claim stands.
    Claimed(ClaimId),
    /// These pages are whole, and this is what they hold.
    Ready(u32, Vec<Word>),
    /// Everything is.
    Sealed(u32, FirstTokenBundle),
    /// The request ended here.
    Done,
    /// A newer attempt came.
    Superseded,
    /// The lease is over.
    Lost,
    /// The handle is of another start of the owner.
    Refused,
}

/// A `Follow` stream, from the moment the puller opens it until both ends have let go.
#[derive(Clone, Debug, Hash)]
pub struct Stream {
    /// Who follows.
    pub key: Key,
    /// Tells a doubled one from the first.
    pub copy: u8,
    /// What.
    pub handle: Handle,
    /// The claim is on its way.
    pub claiming: bool,
    /// The claim it stands for at the owner.
    pub claim: Option<ClaimId>,
    /// What is on its way to the puller.
    pub down: Vec<Down>,
    /// The puller listens.
    pub followed: bool,
    /// The owner speaks.
    pub served: bool,
    /// The connection is gone.
    pub broken: bool,
}

/// Where a read is.
#[derive(Clone, Debug, Hash)]
pub enum Reading {
    /// On its way to the owner.
    Asked,
    /// The first halves have been read.
    Halfway {
        /// What keeps the pages from reuse, if the owner knows of the read.
        hold: Option<Hold>,
        /// What was in them.
        first: Vec<Word>,
    },
    /// It came to nothing, and its puller will hear of it.
    Failed,
}

/// A pull on its way.
#[derive(Clone, Debug, Hash)]
pub struct Read {
    /// Whose.
    pub key: Key,
    /// What the puller calls it.
    pub id: u64,
    /// Under which claim.
    pub claim: ClaimId,
    /// Which blocks.
    pub blocks: Range<u32>,
    /// Where they are.
    pub pages: Vec<u32>,
    /// How far it is.
    pub reading: Reading,
}

/// An `End` on its way to the owner.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct End {
    /// Whose.
    pub key: Key,
    /// Of what.
    pub handle: Handle,
    /// Under which claim.
    pub claim: ClaimId,
    /// Every byte is there; otherwise a refusal.
    pub complete: bool,
    /// Somebody waits for the answer.
    pub awaited: bool,
}

/// A `Lend` on its way to the owner.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Lend {
    /// Whose.
    pub key: Key,
    /// Tells a doubled one from the first.
    pub copy: u8,
    /// Somebody waits for the answer.
    pub awaited: bool,
}

/// What may never happen.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Wrong {
    /// Bytes were used that were not whole and held.
    BytesUsed,
    /// A read that the owner let in saw something else than a whole page.
    BytesSeen,
    /// A page was given to a new use while something referred to it.
    Reused,
    /// A newer attempt was turned away, or an older one ended something.
    OlderWon,
    /// The same question got another answer.
    Contradiction,
    /// A lease stood after its request's deadline.
    Outlived,
    /// An assertion of the code itself.
    Panicked,
}

/// A moment of the whole.
#[allow(clippy::derived_hash_with_manual_eq)] // equal is what hashes alike
#[derive(Clone, Debug, Hash)]
pub struct State {
    /// The time.
    pub now: Time,
    /// Faults that may still happen.
    pub faults: u8,
    /// Role changes that may still happen.
    pub flips: u8,
    /// The router is there.
    pub router: bool,
    /// What it knows.
    pub requests: [Request; 2],
    /// The session to the owner.
    pub to_owner: Vec<ToOwner>,
    /// The sessions to the decoders.
    pub to_decoder: [Vec<ToDecoder>; 2],
    /// Who prefills.
    pub owner: Arc<Owner>,
    /// Who decodes.
    pub decoders: [Arc<Decoder>; 2],
    /// Follow streams.
    pub streams: Vec<Arc<Stream>>,
    /// Pulls.
    pub reads: Vec<Read>,
    /// Questions for verdicts.
    pub ends: Vec<End>,
    /// Questions for prefixes.
    pub lends: Vec<Lend>,
    /// Prefixes lent, on their way to the decoder; none is a no.
    pub lent: Vec<(Key, Option<Handle>)>,
    /// Claims that were told `Held`, and until when that must be remembered.
    pub told: BTreeMap<ClaimId, Time>,
    /// The owner has given a table back twice.
    pub given_back_twice: bool,
    /// What has gone wrong.
    pub wrong: Option<Wrong>,
}

impl PartialEq for State {
    /// Alike, as far as anything can depend on it: the checker compares states only to follow a path again.
    fn eq(&self, other: &State) -> bool {
        let print = |state: &State| {
            let mut hasher = std::hash::DefaultHasher::new();
            state.hash(&mut hasher);
            hasher.finish()
        };
        print(self) == print(other)
    }
}

impl Owner {
    /// A fresh start of the process.
    pub fn new(bounds: &Bounds, incarnation: u8) -> Owner {
        let mut kv = KvCache::new(Config {
            pages: bounds.pages,
            groups: 1,
            leased_share: 1.0,
            lease_time_to_live: TIME_TO_LIVE,
            prefix_cache: bounds.second == Second::Borrow,
        });
        if let Some(mistake) = bounds.mistake {
            kv.make(mistake);
        }
        let memory = vec![Bytes::default(); bounds.pages as usize];
        Owner { incarnation, epoch: 0, kv, memory, legs: Vec::new(), steps: Vec::new() }
    }

    /// The attempt, if it is here.
    pub fn leg(&mut self, key: Key) -> Option<&mut OwnerLeg> {
        self.legs.iter_mut().find(|leg| leg.key == key)
    }

    /// Every page that something refers to: what the pool must agree with.
    pub fn referred(&self, reads: &[Read]) -> Vec<bool> {
        let mut referred = vec![false; self.memory.len()];
        for leg in &self.legs {
            let table = match &leg.stage {
                Stage::Running { table, .. } | Stage::Decoding { table, .. } => table.pages(0),
                Stage::Waiting | Stage::HandedOff => &[],
            };
            table.iter().for_each(|page| referred[page.page as usize] = true);
        }
        for lease in self.kv.leases() {
            for page in &self.kv.lease_pages(lease)[0] {
                referred[page.page as usize] = true;
            }
        }
        self.steps.iter().for_each(|step| referred[step.page as usize] = true);
        for read in reads {
            if matches!(read.reading, Reading::Halfway { hold: Some(_), .. }) {
                read.pages.iter().for_each(|&page| referred[page as usize] = true);
            }
        }
        referred
    }
}

impl State {
    /// How it begins: both prompts are on their way.
    pub fn first(bounds: &Bounds) -> State {
        let mut state = State {
            now: Time::ZERO,
            faults: bounds.faults,
            flips: bounds.flips,
            router: true,
            requests: [Request::default(); 2],
            to_owner: Vec::new(),
            to_decoder: [Vec::new(), Vec::new()],
            owner: Arc::new(Owner::new(bounds, 1)),
            decoders: [Arc::default(), Arc::default()],
            streams: Vec::new(),
            reads: Vec::new(),
            ends: Vec::new(),
            lends: Vec::new(),
            lent: Vec::new(),
            told: BTreeMap::new(),
            given_back_twice: false,
            wrong: None,
        };
        if bounds.second == Second::Nothing {
            state.requests[1].ended = Some(Ended::Gone);
        }
        state
    }

    /// What half a page of this block must hold.
    pub fn content(bounds: &Bounds, request: u8, block: u32) -> u8 {
        let shared = bounds.second == Second::Borrow && block == 0;
        1 + 2 * if shared { 0 } else { request } + block as u8
    }

    /// The names of a prompt's full blocks.
    pub fn hashes(bounds: &Bounds, request: u8) -> [BlockHash; 1] {
        [BlockHash(u128::from(State::content(bounds, request, 0)))]
    }
}
