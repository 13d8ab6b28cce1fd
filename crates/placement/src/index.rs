//! Who holds which blocks: the exact longest prefix of a prompt at every worker, by tier.
//!
//! One table from block hash to holders, fed by each worker's snapshot and deltas. It is bound to incarnations
//! (what a dead start of a worker held is never found), and bounded in bytes: at the bound the entries that
//! were not stored again for longest go first, which loses a hit and never invents one.

use std::collections::BTreeMap;

use tandem_types::{BlockHash, Incarnation, WorkerId};

use crate::Tier;

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

/// A holder: worker number in the upper 24 bits, one bit per tier in the lower 8.
type Holder = u32;
const NOBODY: Holder = 0;
/// In the second place of an entry: the first is the number of a longer list.
const LISTED: Holder = u32::MAX;
const WORKERS_MAX: u32 = (1 << 24) - 2;
/// Bytes of a place in the table: a hash and two holders.
const PLACE_BYTES: usize = 16 + 8;
/// Bytes of a longer list beside its holders, by estimate.
const LIST_BYTES: usize = 40;

#[derive(Clone, Debug)]
struct Member {
    incarnation: Incarnation,
    number: u32,
    sequence: u64,
}

/// The index.
#[derive(Debug)]
pub struct Index {
    bytes_max: usize,
    hashes: Vec<u128>,
    /// Holders of the hash at the same place; both `NOBODY` where the place is empty.
    holders: Vec<[Holder; 2]>,
    used: usize,
    lists: Vec<Vec<Holder>>,
    free_lists: Vec<u32>,
    listed: usize,
    /// How many (block, holder) pairs there are.
    entries: usize,
    members: BTreeMap<WorkerId, Member>,
    /// By number; `None` where that start of a worker is over.
    names: Vec<Option<(WorkerId, Incarnation)>>,
    /// Numbers whose entries may still stand in the table.
    retired: usize,
    /// Where eviction goes on.
    hand: usize,
    evicted: u64,
}

fn bit(tier: Tier) -> u32 {
    1 << tier as u32
}

fn of(number: u32) -> Holder {
    (number + 1) << 8
}

impl Index {
    /// An empty index of at most so many bytes.
    pub fn new(bytes_max: usize) -> Index {
        let places = 1024;
        Index {
            bytes_max: bytes_max.max(2 * places * PLACE_BYTES),
            hashes: vec![0; places],
            holders: vec![[NOBODY; 2]; places],
            used: 0,
            lists: Vec::new(),
            free_lists: Vec::new(),
            listed: 0,
            entries: 0,
            members: BTreeMap::new(),
            names: Vec::new(),
            retired: 0,
            hand: 0,
            evicted: 0,
        }
    }

    /// (block, holder) pairs.
    pub fn len(&self) -> usize {
        self.entries
    }

    /// Whether nobody holds anything.
    pub fn is_empty(&self) -> bool {
        self.entries == 0
    }

    /// Bytes in use, by what is allocated.
    pub fn bytes(&self) -> usize {
        self.hashes.len() * PLACE_BYTES + self.lists.len() * LIST_BYTES + self.listed * 4
    }

    /// Blocks that were forgotten to keep to the bound.
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
        if self.names.len() as u32 >= WORKERS_MAX {
            self.sweep();
        }
        let vacant = self.names.iter().position(|name| name.is_none() && self.retired == 0);
        let number = vacant.unwrap_or(self.names.len()) as u32;
        if number >= WORKERS_MAX {
            return Err(Refused::TooManyWorkers);
        }
        let name = Some((worker.clone(), incarnation));
        if vacant.is_some() {
            self.names[number as usize] = name
        } else {
            self.names.push(name)
        }
        self.members.insert(worker.clone(), Member { incarnation, number, sequence });
        for (tier, hash) in blocks {
            self.store(number, tier, hash);
        }
        Ok(())
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
        if let Some(member) = self.members.remove(worker) {
            self.names[member.number as usize] = None;
            self.retired += 1;
            // Its entries name a start that is over, and are never found. A sweep now and then frees them.
            if self.retired > 64.max(self.names.len() / 4) {
                self.sweep();
            }
        }
    }

    /// Takes out the entries of starts that are over.
    fn sweep(&mut self) {
        let mut place = 0;
        while place < self.hashes.len() {
            let before = self.count(place);
            let kept: Vec<Holder> = self
                .list(place)
                .iter()
                .copied()
                .filter(|holder| self.names[(holder >> 8) as usize - 1].is_some())
                .collect();
            if before == kept.len() {
                place += 1;
                continue;
            }
            self.entries -= before - kept.len();
            self.write(place, &kept);
            if kept.is_empty() {
                self.vacate(place); // another entry may have moved here: look again
            } else {
                place += 1;
            }
        }
        self.retired = 0;
    }

    fn mask(&self) -> usize {
        self.hashes.len() - 1
    }

    /// Where a hash is, or the empty place where it would be.
    fn place(&self, hash: u128) -> usize {
        let mask = self.mask();
        // Hashes are spread already; but a worker that lies may name others.
        let mixed = ((hash ^ (hash >> 64)) as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        let mut place = (mixed >> 20) as usize & mask;
        while self.holders[place][0] != NOBODY && self.hashes[place] != hash {
            place = (place + 1) & mask;
        }
        place
    }

    fn list(&self, place: usize) -> &[Holder] {
        let pair = &self.holders[place];
        match pair {
            [NOBODY, _] => &[],
            [_, NOBODY] => &pair[..1],
            [list, LISTED] => &self.lists[*list as usize - 1],
            _ => pair,
        }
    }

    fn count(&self, place: usize) -> usize {
        self.list(place).len()
    }

    fn write(&mut self, place: usize, holders: &[Holder]) {
        if let [list, LISTED] = self.holders[place] {
            let list_at = list as usize - 1;
            self.listed -= self.lists[list_at].len();
            if holders.len() > 2 {
                self.lists[list_at].clear();
                self.lists[list_at].extend_from_slice(holders);
                self.listed += holders.len();
                return;
            }
            self.lists[list_at] = Vec::new();
            self.free_lists.push(list);
        }
        self.holders[place] = match *holders {
            [] => [NOBODY, NOBODY],
            [one] => [one, NOBODY],
            [one, two] => [one, two],
            _ => {
                let list = self.free_lists.pop().unwrap_or_else(|| {
                    self.lists.push(Vec::new());
                    self.lists.len() as u32
                });
                self.lists[list as usize - 1] = holders.to_vec();
                self.listed += holders.len();
                [list, LISTED]
            }
        };
    }

    fn store(&mut self, number: u32, tier: Tier, hash: BlockHash) {
        let mut place = self.place(hash.0);
        if self.holders[place][0] == NOBODY {
            self.make_room();
            place = self.place(hash.0);
            self.hashes[place] = hash.0;
            self.holders[place] = [of(number) | bit(tier), NOBODY];
            self.used += 1;
            self.entries += 1;
            return;
        }
        if let Some(known) = self.known(place, number) {
            *known |= bit(tier);
            return;
        }
        self.entries += 1;
        let new = of(number) | bit(tier);
        match &mut self.holders[place] {
            [list, LISTED] => {
                self.lists[*list as usize - 1].push(new);
                self.listed += 1;
            }
            [_, second @ NOBODY] => *second = new,
            pair => {
                let three = [pair[0], pair[1], new];
                self.write(place, &three);
            }
        }
    }

    /// The holder of this number in an entry.
    fn known(&mut self, place: usize, number: u32) -> Option<&mut Holder> {
        let holders: &mut [Holder] = match &mut self.holders[place] {
            [list, LISTED] => &mut self.lists[*list as usize - 1],
            pair => pair,
        };
        holders.iter_mut().find(|holder| **holder >> 8 == number + 1)
    }

    fn remove(&mut self, number: u32, tier: Tier, hash: BlockHash) {
        let place = self.place(hash.0);
        if self.holders[place][0] == NOBODY {
            return; // a worker may speak of what was evicted here, or lie
        }
        let Some(known) = self.known(place, number) else { return };
        *known &= !bit(tier);
        if *known & 0xff != 0 {
            return;
        }
        self.entries -= 1;
        let kept: Vec<Holder> = self.list(place).iter().copied().filter(|h| h >> 8 != number + 1).collect();
        self.write(place, &kept);
        if kept.is_empty() {
            self.vacate(place);
        }
    }

    /// Closes the gap that an emptied place leaves in its run.
    fn vacate(&mut self, gap: usize) {
        self.used -= 1;
        self.holders[gap] = [NOBODY; 2];
        let mask = self.mask();
        let mut place = (gap + 1) & mask;
        while self.holders[place][0] != NOBODY {
            let moved = self.holders[place];
            let hash = self.hashes[place];
            self.holders[place] = [NOBODY; 2];
            let wanted = self.place(hash);
            self.hashes[wanted] = hash;
            self.holders[wanted] = moved;
            place = (place + 1) & mask;
        }
    }

    /// Room for one more hash: a larger table within the bound, or fewer entries.
    fn make_room(&mut self) {
        if self.used * 8 < self.hashes.len() * 7 {
            return;
        }
        if self.bytes() + self.hashes.len() * PLACE_BYTES <= self.bytes_max {
            let places = self.hashes.len() * 2;
            let hashes = std::mem::replace(&mut self.hashes, vec![0; places]);
            let holders = std::mem::replace(&mut self.holders, vec![[NOBODY; 2]; places]);
            for (hash, pair) in hashes.into_iter().zip(holders) {
                if pair[0] != NOBODY {
                    let place = self.place(hash);
                    self.hashes[place] = hash;
                    self.holders[place] = pair;
                }
            }
            self.hand = 0;
            return;
        }
        // An eighth of a percent at once, in the order of the table, which is random in age and in worker.
        for _ in 0..(self.hashes.len() / 1024).max(1) {
            while self.holders[self.hand][0] == NOBODY {
                self.hand = (self.hand + 1) & self.mask();
            }
            let place = self.hand;
            self.entries -= self.count(place);
            self.write(place, &[]);
            self.vacate(place);
            self.evicted += 1;
        }
    }

    /// What everybody holds of a prompt from its start, the longest first. Exact: a block counts only if all
    /// before it are held too.
    pub fn longest(&self, hashes: &[BlockHash]) -> Vec<Found> {
        // (number, device blocks, blocks, tiers seen)
        let mut open: Vec<(u32, u32, u32, u32)> = Vec::new();
        let mut done: Vec<(u32, u32, u32, u32)> = Vec::new();
        for (at, hash) in hashes.iter().enumerate() {
            let at = at as u32;
            let holders = self.list(self.place(hash.0));
            if at == 0 {
                open.extend(holders.iter().map(|h| (h >> 8, h & 1, 1, lowest(*h))));
            } else if let ([one], [(number, device, blocks, tiers)]) = (holders, open.as_mut_slice())
                && one >> 8 == *number
            {
                // By far the most frequent case: one holder, the same as of the block before.
                *device += u32::from(*device == at && one & 1 == 1);
                *blocks += 1;
                *tiers |= lowest(*one);
            } else {
                open.retain_mut(|entry| {
                    let Some(holder) = holders.iter().find(|h| *h >> 8 == entry.0) else {
                        done.push(*entry);
                        return false;
                    };
                    entry.1 += u32::from(entry.1 == at && holder & 1 == 1);
                    entry.2 += 1;
                    entry.3 |= lowest(*holder);
                    true
                });
            }
            if open.is_empty() {
                break;
            }
        }
        done.append(&mut open);
        done.sort_by_key(|&(number, _, blocks, _)| (std::cmp::Reverse(blocks), number));
        let found = done.into_iter().filter_map(|(number, device_blocks, blocks, tiers)| {
            let (worker, incarnation) = self.names[number as usize - 1].clone()?;
            let tier = [Tier::Store, Tier::Disk, Tier::Host]
                .into_iter()
                .find(|tier| tiers & bit(*tier) != 0 && device_blocks < blocks)
                .unwrap_or(Tier::Device);
            Some(Found { worker, incarnation, device_blocks, blocks, tier })
        });
        found.collect()
    }
}

/// The nearest tier that a holder has a block in, as a bit.
fn lowest(holder: Holder) -> u32 {
    let tiers = holder & 0xff;
    tiers & tiers.wrapping_neg()
}
