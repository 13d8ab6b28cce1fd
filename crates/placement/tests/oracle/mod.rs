//! The prefix index as one would write it without a thought for its size or its speed: ordered maps of sets.
//! Tests compare the real one with it, and benches say what the difference is worth.

use std::collections::{BTreeMap, BTreeSet};

use tandem_placement::Tier;
use tandem_placement::index::{Change, Found};
use tandem_types::{BlockHash, Incarnation, WorkerId};

/// Every block with everybody who holds it, by number, and in which tiers.
#[derive(Default)]
pub struct Oracle {
    blocks: BTreeMap<BlockHash, BTreeSet<(u32, Tier)>>,
    names: Vec<WorkerId>,
    members: BTreeMap<WorkerId, (u32, Incarnation, u64)>,
}

impl Oracle {
    pub fn snapshot(
        &mut self,
        worker: &WorkerId,
        incarnation: Incarnation,
        sequence: u64,
        blocks: impl IntoIterator<Item = (Tier, BlockHash)>,
    ) {
        self.forget(worker);
        let number = self.names.len() as u32;
        self.names.push(worker.clone());
        self.members.insert(worker.clone(), (number, incarnation, sequence));
        for (tier, hash) in blocks {
            self.blocks.entry(hash).or_default().insert((number, tier));
        }
    }

    /// Whether the change was taken in.
    pub fn apply(
        &mut self,
        worker: &WorkerId,
        incarnation: Incarnation,
        sequence: u64,
        change: &Change,
    ) -> bool {
        let Some((number, known, last)) = self.members.get_mut(worker) else { return false };
        if *known != incarnation || Some(sequence) != last.checked_add(1) {
            return false;
        }
        *last = sequence;
        let number = *number;
        match change {
            Change::Stored(tier, hashes) => {
                for hash in hashes {
                    self.blocks.entry(*hash).or_default().insert((number, *tier));
                }
            }
            Change::Removed(tier, hashes) => {
                for hash in hashes {
                    if let Some(holders) = self.blocks.get_mut(hash) {
                        holders.remove(&(number, *tier));
                        if holders.is_empty() {
                            self.blocks.remove(hash);
                        }
                    }
                }
            }
            Change::Cleared => self.remove_all(number),
        }
        true
    }

    pub fn forget(&mut self, worker: &WorkerId) {
        if let Some((number, ..)) = self.members.remove(worker) {
            self.remove_all(number);
        }
    }

    fn remove_all(&mut self, number: u32) {
        self.blocks.retain(|_, holders| {
            holders.retain(|(holder, _)| *holder != number);
            !holders.is_empty()
        });
    }

    /// (block, holder) pairs.
    #[allow(dead_code, reason = "tests count them, benches do not")]
    pub fn len(&self) -> usize {
        let workers = |holders: &BTreeSet<(u32, Tier)>| {
            let workers: BTreeSet<u32> = holders.iter().map(|(number, _)| *number).collect();
            workers.len()
        };
        self.blocks.values().map(workers).sum()
    }

    /// What everybody holds of a prompt from its start, the longest first and equals by name.
    pub fn longest(&self, hashes: &[BlockHash]) -> Vec<Found> {
        let nobody = BTreeSet::new();
        let holders = |at: usize| hashes.get(at).and_then(|hash| self.blocks.get(hash)).unwrap_or(&nobody);
        let nearest = |at: usize, number: u32| {
            holders(at).range((number, Tier::Device)..=(number, Tier::Store)).next().map(|(_, tier)| *tier)
        };
        let mut found = Vec::new();
        for (worker, (number, incarnation, _)) in &self.members {
            let tiers: Vec<Tier> = (0..hashes.len()).map_while(|at| nearest(at, *number)).collect();
            let device_blocks = tiers.iter().take_while(|tier| **tier == Tier::Device).count() as u32;
            let Some(&tier) = tiers.iter().max() else { continue };
            let (worker, incarnation, blocks) = (worker.clone(), *incarnation, tiers.len() as u32);
            found.push(Found { worker, incarnation, device_blocks, blocks, tier });
        }
        found.sort_by_key(|found| std::cmp::Reverse(found.blocks));
        found
    }
}
