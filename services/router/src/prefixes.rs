//! Which worker holds which blocks: the index of `placement`, fed by the reports of workers.

use std::sync::{Mutex, MutexGuard};

use tandem_kv_cache::{HashChain, chain_seed};
use tandem_placement::index::{Change, Index, Refused};
use tandem_placement::{Held, Tier};
use tandem_proto::{convert, v1};
use tandem_types::{BLOCK_TOKENS, BlockHash, Incarnation, KvIdentity, TokenId, WorkerId};

/// The index of a router.
pub(crate) struct Prefixes {
    index: Mutex<Index>,
}

/// Why a report cannot be taken in: its stream is to be opened anew.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ReportError {
    #[error("it reports a block whose name is no hash")]
    Hash,
    #[error("its blocks cannot be followed: {0}")]
    Refused(#[from] Refused),
}

impl Prefixes {
    pub(crate) fn new(bytes_max: u64) -> Prefixes {
        Prefixes { index: Mutex::new(Index::new(bytes_max as usize)) }
    }

    fn lock(&self) -> MutexGuard<'_, Index> {
        self.index.lock().expect("nothing panics under this lock")
    }

    /// Takes in what a report says of blocks. `last` is the number of the last change of this worker.
    pub(crate) fn take(
        &self,
        worker: &WorkerId,
        incarnation: Incarnation,
        report: &v1::WatchEvent,
        last: &mut u64,
    ) -> Result<(), ReportError> {
        let mut changes = Vec::with_capacity(report.blocks.len());
        for event in &report.blocks {
            let hashes = event.hashes.iter().map(|hash| convert::read_id128("hash", hash).map(BlockHash));
            let hashes: Vec<BlockHash> = hashes.collect::<Result<_, _>>().map_err(|_| ReportError::Hash)?;
            changes.push(match event.stored {
                true => Change::Stored(Tier::Device, hashes),
                false => Change::Removed(Tier::Device, hashes),
            });
        }
        let mut index = self.lock();
        if report.snapshot {
            *last = 0;
            index.snapshot(worker, incarnation, 0, [])?;
            index.expect(worker, report.load.map_or(0, |load| load.blocks_total as usize));
        }
        for change in &changes {
            *last += 1;
            index.apply(worker, incarnation, *last, change)?;
        }
        Ok(())
    }

    /// The worker is gone with all it had.
    pub(crate) fn forget(&self, worker: &WorkerId) {
        self.lock().forget(worker);
    }

    /// Who holds how much of the beginning of this chain, by the place that `candidate` gives each.
    pub(crate) fn held(
        &self,
        hashes: &[BlockHash],
        candidate: impl Fn(&WorkerId, Incarnation) -> Option<usize>,
    ) -> Vec<Held> {
        if hashes.is_empty() {
            return Vec::new();
        }
        self.lock().held(hashes, BLOCK_TOKENS, |_, worker, incarnation| candidate(worker, incarnation))
    }

    /// (block, holder) pairs, bytes, and blocks forgotten to keep to the bound.
    pub(crate) fn size(&self) -> (usize, usize, u64) {
        let index = self.lock();
        (index.len(), index.bytes(), index.evicted())
    }
}

/// The names of a prompt's full blocks, as workers of this identity give them.
pub(crate) fn hashes(identity: &KvIdentity, salt: &[u8], prompt: &[TokenId]) -> Vec<BlockHash> {
    let mut chain = HashChain::new(chain_seed(identity, true, salt, ""));
    chain.extend(prompt);
    chain.hashes().to_vec()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report(snapshot: bool, blocks: &[(bool, &[u128])]) -> v1::WatchEvent {
        let event = |(stored, hashes): &(bool, &[u128])| v1::BlockEvent {
            group: 0,
            stored: *stored,
            hashes: hashes.iter().map(|&hash| convert::id128(hash)).collect(),
        };
        v1::WatchEvent { snapshot, blocks: blocks.iter().map(event).collect(), ..v1::WatchEvent::default() }
    }

    #[test]
    fn reports_are_followed_and_nonsense_asks_for_a_new_stream() {
        let (prefixes, worker, mut last) = (Prefixes::new(1 << 20), WorkerId::from("w"), 0);
        let mut take = |report| prefixes.take(&worker, Incarnation(1), &report, &mut last);
        take(report(true, &[(true, &[1, 2, 3])])).unwrap();
        take(report(false, &[(false, &[2]), (true, &[4])])).unwrap();
        let blocks = |hashes: &[u128]| {
            let hashes: Vec<BlockHash> = hashes.iter().copied().map(BlockHash).collect();
            prefixes.held(&hashes, |_, _| Some(0)).first().map_or(0, |held| held.tokens / BLOCK_TOKENS)
        };
        assert_eq!((blocks(&[1, 2, 3]), blocks(&[3, 4, 5]), blocks(&[9])), (1, 2, 0));
        let mut wrong = report(false, &[(true, &[5])]);
        wrong.blocks[0].hashes[0] = vec![1, 2, 3].into();
        assert!(matches!(take(wrong), Err(ReportError::Hash)));
        take(report(true, &[])).unwrap();
        assert_eq!(blocks(&[1]), 0, "a snapshot replaces what was known");
        let unknown = prefixes.take(&worker, Incarnation(2), &report(false, &[(true, &[1])]), &mut 0);
        assert!(matches!(unknown, Err(ReportError::Refused(Refused::SnapshotNeeded))));
    }
}
