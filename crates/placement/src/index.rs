//! Who holds which blocks: the exact longest prefix of a prompt at every worker, by tier.
//!
//! One table from block hash to holders, fed by each worker's snapshot and deltas. It is bound to incarnations
//! (what a dead start of a worker held is never found), and bounded in bytes: at the bound blocks that were not
//! stored again for long go first, and a block's third and further holders are recorded only while there is
//! room. Both lose a hit and never invent one.

mod lists;

use std::collections::BTreeMap;

use tandem_types::{BlockHash, Incarnation, WorkerId};

use crate::{Held, Tier};
use lists::Lists;

/// What changed at a worker.
#[derive(Clone, Debug, PartialEq)]
pub enum Change {
    /// Blocks are now in this tier.
    Stored(Tier, Vec<BlockHash>),
    /// Blocks are no longer in this tier.
    Removed(Tier, Vec<BlockHash>),
    /// No block is left in any tier.
    Cleared,
}

/// Why a report was not taken in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refused {
    /// Deltas were lost, or none of this incarnation were seen: ask for a snapshot.
    #[error("a snapshot is needed first")]
    SnapshotNeeded,
    /// It was seen before, or belongs to a start of the worker that is over.
    #[error("it is out of date")]
    OutOfDate,
    /// Too many workers at once.
    #[error("no more workers can be told apart")]
    TooManyWorkers,
}

/// What a worker holds of a prompt.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Found {
    /// Who.
    pub worker: WorkerId,
    /// Which start of it.
    pub incarnation: Incarnation,
    /// Leading blocks on its device.
    pub device_blocks: u32,
    /// Leading blocks in any of its tiers.
    pub blocks: u32,
    /// The lowest tier of these.
    pub tier: Tier,
}

/// A holder: worker number in the upper 24 bits, counted from one, and one bit per tier in the lower 8.
type Holder = u32;
const NOBODY: Holder = 0;
/// In the second place of an entry: the first is the number of a longer list.
const LISTED: Holder = u32::MAX;
const WORKERS_MAX: usize = (1 << 24) - 2;
/// Places of an empty table.
const PLACES_LEAST: usize = 1024;
/// Bytes of a place in the table, with its age.
const PLACE_BYTES: usize = size_of::<Place>() + 1;
/// Bytes of a list beside its holders: where it is, that it is free again, and what an allocator takes.
const LIST_BYTES: usize = 24 + 4 + 16;
/// Bytes of a worker: its number, its name twice and its place in the map, by estimate.
const WORKER_BYTES: usize = 256;
/// Blocks of a prompt that are brought from memory at once.
const AHEAD: usize = 64;
/// How often the hand of eviction passes a block after it was last stored before it takes it.
const LIVES: u8 = 7;

#[derive(Clone, Debug)]
struct Member {
    incarnation: Incarnation,
    number: usize,
    sequence: u64,
    /// Blocks that it may come to hold.
    pool: usize,
}

/// A start of a worker that the table may speak of.
#[derive(Clone, Debug)]
struct Start {
    /// `None` when it is over.
    name: Option<(WorkerId, Incarnation)>,
    /// Its pairs in the table.
    pairs: usize,
}

/// A block and its holders, in the order of their numbers; both are `NOBODY` where the place is empty.
#[derive(Clone, Copy, Debug)]
struct Place {
    /// Two halves: a `u128` would ask for a third more room.
    hash: [u64; 2],
    holders: [Holder; 2],
}

const EMPTY: Place = Place { hash: [0; 2], holders: [NOBODY; 2] };

impl Place {
    fn is_empty(&self) -> bool {
        self.holders[0] == NOBODY
    }
}

/// The index.
#[derive(Debug)]
pub struct Index {
    bytes_max: usize,
    /// Open addressing: a block stands at its home or after it, with no empty place between.
    places: Vec<Place>,
    /// Of each place, how often the hand of eviction has still to pass.
    lives: Vec<u8>,
    used: usize,
    lists: Lists,
    /// Pairs in the table, and those of them whose start is over.
    pairs: usize,
    dead: usize,
    members: BTreeMap<WorkerId, Member>,
    starts: Vec<Start>,
    free_numbers: Vec<usize>,
    version: u64,
    /// Where eviction goes on.
    hand: usize,
    evicted: u64,
}

fn bit(tier: Tier) -> u32 {
    1 << tier as u32
}

/// The number that a holder carries.
fn number_of(holder: Holder) -> usize {
    (holder >> 8) as usize - 1
}

/// Whether one more than `used` blocks stand well in so many places.
fn has_room(used: usize, places: usize) -> bool {
    used.saturating_mul(4) < places * 3
}

fn halves(hash: BlockHash) -> [u64; 2] {
    [hash.0 as u64, (hash.0 >> 64) as u64]
}

impl Index {
    /// An empty index of at most so many bytes, or of the least that it can work with.
    pub fn new(bytes_max: usize) -> Index {
        Index {
            bytes_max: bytes_max.max(4 * PLACES_LEAST * PLACE_BYTES),
            places: vec![EMPTY; PLACES_LEAST],
            lives: vec![0; PLACES_LEAST],
            used: 0,
            lists: Lists::default(),
            pairs: 0,
            dead: 0,
            members: BTreeMap::new(),
            starts: Vec::new(),
            free_numbers: Vec::new(),
            version: 0,
            hand: 0,
            evicted: 0,
        }
    }

    /// (block, holder) pairs.
    pub fn len(&self) -> usize {
        self.pairs - self.dead
    }

    /// Whether nobody holds anything.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Bytes in use, by what is allocated.
    pub fn bytes(&self) -> usize {
        let workers = self.starts.len() * WORKER_BYTES;
        self.places.len() * PLACE_BYTES + self.lists.bytes() + workers
    }

    /// What `bytes` never exceeds, the names of workers apart.
    pub fn bytes_max(&self) -> usize {
        self.bytes_max
    }

    /// Blocks that were forgotten, and holders that were not recorded, to keep to the bound.
    pub fn evicted(&self) -> u64 {
        self.evicted
    }

    /// A worker says what it holds: all of it. What was known of it before is forgotten.
    pub fn snapshot(
        &mut self,
        worker: &WorkerId,
        incarnation: Incarnation,
        sequence: u64,
        blocks: impl IntoIterator<Item = (Tier, BlockHash)>,
    ) -> Result<(), Refused> {
        self.forget(worker);
        if self.free_numbers.is_empty() && self.starts.len() >= WORKERS_MAX {
            self.sweep();
        }
        let start = Start { name: Some((worker.clone(), incarnation)), pairs: 0 };
        let number = match self.free_numbers.pop() {
            Some(number) => {
                self.starts[number] = start;
                number
            }
            None if self.starts.len() < WORKERS_MAX => {
                self.starts.push(start);
                self.starts.len() - 1
            }
            None => return Err(Refused::TooManyWorkers),
        };
        self.version += 1;
        self.members.insert(worker.clone(), Member { incarnation, number, sequence, pool: 0 });
        for (tier, hash) in blocks {
            self.store(number, tier, hash);
        }
        Ok(())
    }

    /// A worker's pool has so many blocks, and sooner or later it holds as many: the table gets room for those of all
    /// workers at once, as far as the bound allows, and need not grow while requests run.
    pub fn expect(&mut self, worker: &WorkerId, pool: usize) {
        let Some(member) = self.members.get_mut(worker) else { return };
        member.pool = pool;
        let pools = self.members.values().map(|member| member.pool);
        let wanted = pools.fold(0usize, usize::saturating_add);
        let mut places = self.places.len();
        // No larger than it could grow to by itself: beside it there must be room for lists.
        while !has_room(wanted, places) && self.fits(places, places * 2) {
            places *= 2;
        }
        if places > self.places.len() {
            self.grow(places);
        }
    }

    /// A worker says what changed. Its sequence numbers rise by one; a gap asks for a snapshot.
    pub fn apply(
        &mut self,
        worker: &WorkerId,
        incarnation: Incarnation,
        sequence: u64,
        change: &Change,
    ) -> Result<(), Refused> {
        let member = self.members.get_mut(worker).ok_or(Refused::SnapshotNeeded)?;
        if member.incarnation != incarnation {
            return Err(Refused::SnapshotNeeded);
        }
        if sequence <= member.sequence {
            return Err(Refused::OutOfDate);
        }
        if sequence != member.sequence + 1 {
            return Err(Refused::SnapshotNeeded);
        }
        member.sequence = sequence;
        let number = member.number;
        match change {
            Change::Stored(tier, hashes) => hashes.iter().for_each(|&hash| self.store(number, *tier, hash)),
            Change::Removed(tier, hashes) => hashes.iter().for_each(|&hash| self.remove(number, *tier, hash)),
            Change::Cleared => self.snapshot(worker, incarnation, sequence, [])?,
        }
        Ok(())
    }

    /// A worker is gone, or this start of it is over.
    pub fn forget(&mut self, worker: &WorkerId) {
        let Some(member) = self.members.remove(worker) else { return };
        self.version += 1;
        let start = &mut self.starts[member.number];
        start.name = None;
        if start.pairs == 0 {
            self.free_numbers.push(member.number);
            return;
        }
        // Its pairs name a start that is over, and are never found. When there are many, a sweep frees them.
        self.dead += start.pairs;
        if self.dead > self.places.len() / 8 {
            self.sweep();
        }
    }

    /// Takes out the pairs of starts that are over.
    fn sweep(&mut self) {
        let mut at = 0;
        while at < self.places.len() {
            let over = |holder: &Holder| self.starts[number_of(*holder)].name.is_none();
            let Some(&holder) = self.holders(at).iter().find(|holder| over(holder)) else {
                at += 1;
                continue;
            };
            self.take(at, number_of(holder)); // another block may have moved here: look again
        }
    }

    fn mask(&self) -> usize {
        self.places.len() - 1
    }

    /// Where a hash would be in a table of its own.
    fn home(&self, hash: [u64; 2]) -> usize {
        // Hashes are spread already; but a worker that lies may name others.
        let mixed = u128::from(hash[0] ^ hash[1].rotate_left(32)) * 0x9e37_79b9_7f4a_7c15;
        (mixed ^ (mixed >> 64)) as usize & self.mask()
    }

    /// Where a hash is, or the empty place where it would be.
    fn find(&self, hash: [u64; 2]) -> usize {
        let mut at = self.home(hash);
        loop {
            let place = &self.places[at];
            if place.is_empty() || place.hash == hash {
                return at;
            }
            at = (at + 1) & self.mask();
        }
    }

    /// The holders at a place, in the order of their numbers.
    fn holders(&self, at: usize) -> &[Holder] {
        let pair = &self.places[at].holders;
        match pair {
            [NOBODY, _] => &[],
            [_, NOBODY] => &pair[..1],
            [list, LISTED] => self.lists.get(*list),
            _ => pair,
        }
    }

    /// Where a worker's holder is among those at a place, or where it would be.
    fn position(&self, at: usize, number: usize) -> Result<usize, usize> {
        self.holders(at).binary_search_by_key(&number, |holder| number_of(*holder))
    }

    fn store(&mut self, number: usize, tier: Tier, hash: BlockHash) {
        let hash = halves(hash);
        let new = ((number as u32 + 1) << 8) | bit(tier);
        let mut at = self.find(hash);
        if self.places[at].is_empty() {
            if self.make_room() {
                at = self.find(hash);
            }
            self.places[at] = Place { hash, holders: [new, NOBODY] };
            self.used += 1;
            // Before eviction moves the hand, blocks that come do, so that lives tell their age when one must go.
            if self.used * 32 < self.places.len() * 23 {
                (0..=LIVES).for_each(|_| self.pass());
            }
        } else {
            match self.position(at, number) {
                Ok(known) => {
                    match &mut self.places[at].holders {
                        [list, LISTED] => self.lists.get_mut(*list)[known] |= bit(tier),
                        pair => pair[known] |= bit(tier),
                    }
                    self.lives[at] = LIVES;
                    return;
                }
                Err(place) if self.insert(at, place, new) => (),
                Err(_) => {
                    self.evicted += 1;
                    return;
                }
            }
        }
        self.lives[at] = LIVES;
        self.pairs += 1;
        self.starts[number].pairs += 1;
    }

    /// Puts a holder into those of a block. False if there is no room for it.
    fn insert(&mut self, at: usize, place: usize, new: Holder) -> bool {
        let room = self.bytes_max.saturating_sub(self.bytes());
        match self.places[at].holders {
            [list, LISTED] => return self.lists.insert(list, place, new, room),
            [one, NOBODY] => {
                self.places[at].holders = if place == 0 { [new, one] } else { [one, new] };
            }
            [one, two] => {
                let mut three = [one, two, new];
                three[place..].rotate_right(1);
                let Some(list) = self.lists.add(&three, room) else { return false };
                self.places[at].holders = [list, LISTED];
            }
        }
        true
    }

    fn remove(&mut self, number: usize, tier: Tier, hash: BlockHash) {
        // A worker may speak of what was evicted here, or lie.
        let at = self.find(halves(hash));
        let Ok(known) = self.position(at, number) else { return };
        let holder = match &mut self.places[at].holders {
            [list, LISTED] => &mut self.lists.get_mut(*list)[known],
            pair => &mut pair[known],
        };
        if *holder & 0xff != bit(tier) {
            *holder &= !bit(tier);
        } else {
            self.take(at, number);
        }
    }

    /// Takes a holder out of those of a block, and the block with the last of them.
    fn take(&mut self, at: usize, number: usize) {
        let Ok(known) = self.position(at, number) else { return };
        self.uncount(number);
        match self.places[at].holders {
            [list, LISTED] => {
                let left = self.lists.get_mut(list);
                left.remove(known);
                if let [one, two] = **left {
                    self.places[at].holders = [one, two];
                    self.lists.give_back(list);
                }
            }
            [_, NOBODY] => self.vacate(at),
            pair => self.places[at].holders = [pair[1 - known], NOBODY],
        }
    }

    /// One pair fewer.
    fn uncount(&mut self, number: usize) {
        self.pairs -= 1;
        let start = &mut self.starts[number];
        start.pairs -= 1;
        if start.name.is_none() {
            self.dead -= 1;
            if start.pairs == 0 {
                self.free_numbers.push(number);
            }
        }
    }

    /// Empties a place and closes the gap in its run.
    fn vacate(&mut self, at: usize) {
        self.used -= 1;
        let (mask, mut gap, mut next) = (self.mask(), at, at);
        loop {
            next = (next + 1) & mask;
            let place = self.places[next];
            if place.is_empty() {
                break;
            }
            // Whoever has a home at the gap or before it would not be found behind it.
            let from_home = next.wrapping_sub(self.home(place.hash)) & mask;
            if from_home >= next.wrapping_sub(gap) & mask {
                self.places[gap] = place;
                self.lives[gap] = self.lives[next];
                gap = next;
            }
        }
        self.places[gap] = EMPTY;
    }

    /// Room for one more hash: a larger table within the bound, or fewer blocks. True if something moved.
    fn make_room(&mut self) -> bool {
        if has_room(self.used, self.places.len()) {
            return false;
        }
        if self.fits(self.places.len(), self.places.len() * 2) {
            self.grow(self.places.len() * 2);
            return true;
        }
        // A thousandth at once. The order of the table is random, and lives make it one by age, by and large.
        let mut left = (self.places.len() / 1024).max(1);
        while left > 0 {
            let at = self.hand;
            if !self.places[at].is_empty() && self.lives[at] == 0 {
                self.evict(at); // another block may have moved here: look again
                left -= 1;
                continue;
            }
            self.pass();
        }
        true
    }

    /// Whether a table may grow from so many places to so many. While blocks move, both tables stand.
    fn fits(&self, from: usize, to: usize) -> bool {
        self.bytes() + (from + to - self.places.len()) * PLACE_BYTES <= self.bytes_max
    }

    fn grow(&mut self, places: usize) {
        let old = std::mem::replace(&mut self.places, vec![EMPTY; places]);
        let lives = std::mem::replace(&mut self.lives, vec![0; places]);
        for (place, lives) in old.into_iter().zip(lives).filter(|(place, _)| !place.is_empty()) {
            let at = self.find(place.hash);
            self.places[at] = place;
            self.lives[at] = lives;
        }
        self.hand = 0;
    }

    /// The hand goes on by a place.
    fn pass(&mut self) {
        self.lives[self.hand] = self.lives[self.hand].saturating_sub(1);
        self.hand = (self.hand + 1) & self.mask();
    }

    fn evict(&mut self, at: usize) {
        for place in 0..self.holders(at).len() {
            self.uncount(number_of(self.holders(at)[place]));
        }
        if let [list, LISTED] = self.places[at].holders {
            self.lists.give_back(list);
        }
        self.vacate(at);
        self.evicted += 1;
    }

    /// What everybody holds of a prompt from its start, the longest first. Exact: a block counts only if all
    /// before it are held too.
    pub fn longest(&self, hashes: &[BlockHash]) -> Vec<Found> {
        let mut found: Vec<(usize, Found)> = Vec::new();
        for lead in self.leads(hashes) {
            let number = number_of(lead.holder);
            if let Some((worker, incarnation)) = self.starts[number].name.clone() {
                let (device_blocks, blocks, tier) = (lead.device_blocks, lead.blocks, lead.tier());
                found.push((number, Found { worker, incarnation, device_blocks, blocks, tier }));
            }
        }
        found.sort_by_key(|(number, found)| (std::cmp::Reverse(found.blocks), *number));
        found.into_iter().map(|(_, found)| found).collect()
    }

    /// The number by which `held` names a worker that is known, while `version` stays.
    pub fn number(&self, worker: &WorkerId) -> Option<usize> {
        self.members.get(worker).map(|member| member.number)
    }

    /// Rises whenever a worker gets or loses its number.
    pub fn version(&self) -> u64 {
        self.version
    }

    /// The same for a policy, in no particular order: prefixes in tokens of blocks of `block_tokens`, held by the
    /// candidates that `candidate` knows this start of a worker as. It is given a number too, for there may be
    /// thousands and looking up names takes long: a map by number is right as long as `version` is what it was.
    pub fn held(
        &self,
        hashes: &[BlockHash],
        block_tokens: u32,
        candidate: impl Fn(usize, &WorkerId, Incarnation) -> Option<usize>,
    ) -> Vec<Held> {
        let held = self.leads(hashes).into_iter().filter_map(|lead| {
            let number = number_of(lead.holder);
            let (worker, incarnation) = self.starts[number].name.as_ref()?;
            Some(Held {
                candidate: candidate(number, worker, *incarnation)?,
                device_tokens: lead.device_blocks.saturating_mul(block_tokens),
                tokens: lead.blocks.saturating_mul(block_tokens),
                tier: lead.tier(),
            })
        });
        held.collect()
    }

    /// Has the memory bring the homes of these and what follows them at once; a walk would wait for each.
    fn touch(&self, hashes: &[BlockHash]) {
        let seen = hashes.iter().fold(0, |seen, &hash| {
            let home = self.home(halves(hash));
            let next = (home + 1) & self.mask();
            seen ^ self.places[home].hash[0] ^ u64::from(self.places[next].holders[1])
        });
        std::hint::black_box(seen);
    }

    /// Walks a prompt's blocks beside those who hold them all.
    fn leads(&self, hashes: &[BlockHash]) -> Vec<Lead> {
        let (mut open, mut done): (Vec<Lead>, Vec<Lead>) = (Vec::new(), Vec::new());
        let mut before: &[Holder] = &[];
        for (at, &hash) in (0u32..).zip(hashes) {
            if (at as usize).is_multiple_of(AHEAD) {
                self.touch(&hashes[at as usize..hashes.len().min(at as usize + AHEAD)]);
            }
            let holders = self.holders(self.find(halves(hash)));
            if at == 0 {
                let lead = |&holder| Lead { holder, tiers: 0, device_blocks: u32::MAX, blocks: u32::MAX };
                open.extend(holders.iter().map(lead));
            }
            // Mostly the holders are those of the block before, in the same tiers: then nothing changes.
            if at == 0 || holders != before {
                let mut rest = holders;
                open.retain_mut(|lead| {
                    while rest.first().is_some_and(|holder| holder >> 8 < lead.holder >> 8) {
                        rest = &rest[1..];
                    }
                    let holder = rest.first().filter(|holder| **holder >> 8 == lead.holder >> 8);
                    match holder {
                        Some(holder) => lead.goes_on(at, *holder),
                        None => {
                            done.push(Lead { blocks: at, device_blocks: lead.device_blocks.min(at), ..*lead })
                        }
                    }
                    holder.is_some()
                });
            }
            if open.is_empty() {
                break;
            }
            before = holders;
        }
        let all = hashes.len() as u32;
        done.extend(open.into_iter().map(|lead| Lead {
            blocks: all,
            device_blocks: lead.device_blocks.min(all),
            ..lead
        }));
        done
    }
}

/// How far somebody has come along a prompt.
#[derive(Clone, Copy)]
struct Lead {
    /// Who.
    holder: Holder,
    /// The nearest tiers of its blocks.
    tiers: u32,
    /// Leading blocks on its device, and in any tier; the largest number while they go on.
    device_blocks: u32,
    blocks: u32,
}

impl Lead {
    fn goes_on(&mut self, at: u32, holder: Holder) {
        if holder & bit(Tier::Device) == 0 {
            self.device_blocks = self.device_blocks.min(at);
        }
        let tiers = holder & 0xff;
        self.tiers |= tiers & tiers.wrapping_neg();
    }

    fn tier(&self) -> Tier {
        let tiers = [Tier::Store, Tier::Disk, Tier::Host].into_iter();
        let mut beyond =
            tiers.filter(|tier| self.tiers & bit(*tier) != 0 && self.device_blocks < self.blocks);
        beyond.next().unwrap_or(Tier::Device)
    }
}
