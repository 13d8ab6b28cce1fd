//! Bookkeeping of paged KV memory: which sequence, cache entry, lease, read or step refers to which page.
//!
//! Never knows: bytes, addresses, the network, clocks (time is an argument), threads.
//!
//! Always holds: a page is free exactly when nothing refers to it; every use of a page raises its generation;
//! a page that was ready is never written again while a lease or a read refers to it; the newest attempt on a
//! lease gets through and older ones can end nothing; `total = free + cached + in_use`.

mod hash;
mod lease;
mod mistake;
mod pool;
mod puller;
mod table;

pub use hash::{ChainSeed, HashChain, chain_seed};
pub use lease::{
    AdoptError, Adopted, Effect, EndedWhy, FirstTokenBundle, FollowError, GrantError, ReadError, Verdict,
};
#[cfg(feature = "model")]
pub use mistake::Mistake;
pub use pool::{CacheChanges, Counts, HoldId};
pub use puller::{GiveUp, PullAction, PullEvent, Puller};
pub use table::{Full, Table};

use std::time::Duration;

use lease::Leases;
use mistake::Mistaken;
use pool::Pool;

/// Sizes and rules of a worker's KV memory.
#[derive(Clone, Debug, PartialEq)]
pub struct Config {
    /// Pages of each group.
    pub pages: u32,
    /// KV groups; a block has one page in each.
    pub groups: u32,
    /// Share of the pool that may be under leases, above 0 and at most 1. One lease always fits.
    pub leased_share: f32,
    /// A lease that nobody renews ends after this.
    pub lease_time_to_live: Duration,
    /// Whether computed blocks stay for others to reuse.
    pub prefix_cache: bool,
}

/// Pool, prefix cache and leases of one worker: the one owner of its bookkeeping.
#[derive(Debug)]
#[cfg_attr(feature = "model", derive(Clone))]
pub struct KvCache {
    config: Config,
    pool: Pool,
    leases: Leases,
    mistaken: Mistaken,
}

impl KvCache {
    /// An empty cache.
    ///
    /// # Panics
    /// If there are no pages or no groups.
    pub fn new(config: Config) -> KvCache {
        assert!(config.pages > 0 && config.groups > 0, "a pool has pages and groups");
        let pool = Pool::new(config.groups, config.pages);
        KvCache { config, pool, leases: Leases::default(), mistaken: Mistaken::default() }
    }

    /// Sizes and rules.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// How many blocks are free, only cached, and in use.
    pub fn counts(&self) -> Counts {
        self.pool.counts()
    }

    /// What has changed in the prefix cache after the first `seen` changes, and how many there were by now. Whoever
    /// begins to follow it has seen `None`.
    pub fn cache_changes(&self, seen: Option<u64>) -> (CacheChanges, u64) {
        self.pool.changes(seen)
    }

    /// Compares all counters with what refers to what, from scratch.
    ///
    /// # Panics
    /// With a sentence, if anything does not add up.
    pub fn check_books(&self) {
        self.pool.check_books();
        self.leases.check_books(&self.pool);
    }
}

#[cfg(feature = "model")]
impl KvCache {
    /// Makes this mistake from now on.
    pub fn make(&mut self, mistake: Mistake) {
        self.mistaken = Mistaken::from(mistake);
    }

    /// Gives pages back that somebody still refers to: what a bug elsewhere in the worker would do.
    pub fn give_back_once_more(&mut self, pages: &[tandem_types::PageRef]) {
        self.give_back(vec![pages.to_vec()]);
    }

    /// The leases that stand.
    pub fn leases(&self) -> impl Iterator<Item = tandem_types::LeaseId> + '_ {
        self.leases.ids()
    }
}
