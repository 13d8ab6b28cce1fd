//! A worker's prefix cache in two tiers, in blocks of a trace.

use std::collections::{BTreeMap, HashMap};

use tandem_placement::Tier;
use tandem_placement::index::Change;
use tandem_types::BlockHash;

use crate::random::mix;
use crate::workload::TRACE_BLOCK_TOKENS;

/// Sizes of a cache; 0 and 0 is none.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Sizes {
    /// Tokens on the device.
    pub device_tokens: u64,
    /// Tokens in host memory.
    pub host_tokens: u64,
}

/// Blocks by last use; what falls off the device goes to the host.
#[derive(Clone, Debug, Default)]
pub struct Cache {
    rooms: [usize; 2],
    /// Blocks by stamp, per tier.
    lists: [BTreeMap<u64, u32>; 2],
    places: HashMap<u32, (usize, u64)>,
    stamp: u64,
}

/// The hash of a trace's block: its id names all before it too.
pub fn hash(block: u32) -> BlockHash {
    BlockHash(u128::from(mix(u64::from(block))) << 64 | u128::from(mix(u64::from(block) << 32 | 1)))
}

const TIERS: [Tier; 2] = [Tier::Device, Tier::Host];

impl Cache {
    /// An empty cache.
    pub fn new(sizes: Sizes) -> Cache {
        let blocks = |tokens: u64| (tokens / u64::from(TRACE_BLOCK_TOKENS)) as usize;
        Cache { rooms: [blocks(sizes.device_tokens), blocks(sizes.host_tokens)], ..Cache::default() }
    }

    /// Leading blocks on the device, and in either tier.
    pub fn longest(&self, blocks: &[u32]) -> (u32, u32) {
        let tier = |block: &u32| self.places.get(block).map(|(tier, _)| *tier);
        let device = blocks.iter().take_while(|block| tier(block) == Some(0)).count();
        let all = blocks.iter().take_while(|block| tier(block).is_some()).count();
        (device as u32, all as u32)
    }

    /// The blocks are on the device now and were used last. Adds what changed.
    pub fn put(&mut self, blocks: &[u32], changes: &mut Vec<Change>) {
        if self.rooms[0] == 0 {
            return;
        }
        // The deepest first: it is the oldest, and goes before what it builds on.
        for &block in blocks.iter().rev() {
            self.stamp += 1;
            let stamp = self.stamp;
            if let Some((tier, old)) = self.places.insert(block, (0, stamp)) {
                self.lists[tier].remove(&old);
                if tier == 1 {
                    changes.push(Change::Removed(TIERS[1], vec![hash(block)]));
                    changes.push(Change::Stored(TIERS[0], vec![hash(block)]));
                }
            } else {
                changes.push(Change::Stored(TIERS[0], vec![hash(block)]));
            }
            self.lists[0].insert(stamp, block);
        }
        while self.lists[0].len() > self.rooms[0] {
            let (stamp, block) = self.lists[0].pop_first().expect("it is longer than its room");
            if self.rooms[1] > 0 {
                self.lists[1].insert(stamp, block);
                self.places.insert(block, (1, stamp));
                // Stored below before it is removed above: no reader may think that it is nowhere.
                changes.push(Change::Stored(TIERS[1], vec![hash(block)]));
            } else {
                self.places.remove(&block);
            }
            changes.push(Change::Removed(TIERS[0], vec![hash(block)]));
        }
        while self.lists[1].len() > self.rooms[1] {
            let (_, block) = self.lists[1].pop_first().expect("it is longer than its room");
            self.places.remove(&block);
            changes.push(Change::Removed(TIERS[1], vec![hash(block)]));
        }
    }

    /// Everything is lost.
    pub fn clear(&mut self) {
        self.lists = [BTreeMap::new(), BTreeMap::new()];
        self.places.clear();
    }
}
