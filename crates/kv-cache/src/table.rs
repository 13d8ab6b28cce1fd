//! Tables: the pages of one sequence, opened over what the cache holds already.

use tandem_types::{BLOCK_TOKENS, BlockHash, PageRef, Time, blocks_for};

use crate::{HoldId, KvCache};

/// Not enough room now. Nothing has changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{wanted} blocks are wanted and {room} can be had")]
pub struct Full {
    /// Blocks wanted.
    pub wanted: u32,
    /// Blocks free or only cached.
    pub room: u32,
}

/// A sequence's pages, one list per group, a page per block. Goes back with [`KvCache::close`].
#[derive(Debug)]
#[cfg_attr(feature = "model", derive(Clone))]
#[must_use = "a table's pages are in use until it is closed"]
pub struct Table {
    pub(crate) groups: Vec<Vec<PageRef>>,
    /// Leading blocks that the prefix cache has been told of.
    published: u32,
}

impl Table {
    pub(crate) fn of(groups: Vec<Vec<PageRef>>) -> Table {
        Table { groups, published: 0 }
    }

    /// Pages of a group, in order from the sequence's first block.
    pub fn pages(&self, group: u32) -> &[PageRef] {
        &self.groups[group as usize]
    }

    /// How many groups.
    pub fn groups(&self) -> u32 {
        self.groups.len() as u32
    }

    /// Tokens that fit.
    pub fn room(&self) -> u32 {
        self.groups[0].len() as u32 * BLOCK_TOKENS
    }

    /// The pages, for somebody else to give back.
    pub(crate) fn into_pages(self) -> Vec<Vec<PageRef>> {
        self.groups
    }
}

impl KvCache {
    /// How many of `known_tokens` tokens are cached: whole blocks, never the last known token, for its
    /// logits are what comes next.
    pub fn cached_prefix(&self, hashes: &[BlockHash], known_tokens: u32) -> u32 {
        if !self.config.prefix_cache {
            return 0;
        }
        let most = (known_tokens.saturating_sub(1) / BLOCK_TOKENS) as usize;
        let held =
            |hash: &&BlockHash| (0..self.pool.groups()).all(|group| self.pool.find(group, **hash).is_some());
        hashes.iter().take(most).take_while(held).count() as u32 * BLOCK_TOKENS
    }

    /// Takes the cached prefix and fresh pages, so that `room` tokens fit. All or nothing. Returns the table
    /// and how many of the known tokens are computed already.
    pub fn open(
        &mut self,
        hashes: &[BlockHash],
        known_tokens: u32,
        room: u32,
        _now: Time,
    ) -> Result<(Table, u32), Full> {
        let cached = self.cached_prefix(hashes, known_tokens);
        let cached_blocks = (cached / BLOCK_TOKENS) as usize;
        let fresh = blocks_for(room).saturating_sub(cached_blocks as u32);
        // The cached pages first: taking them makes sure that they are not evicted for the fresh ones.
        let groups = 0..self.pool.groups();
        let mut lists: Vec<Vec<PageRef>> = groups
            .map(|group| {
                let taken = hashes[..cached_blocks].iter().map(|&hash| {
                    let page = self.pool.find(group, hash).expect("the prefix is cached in every group");
                    self.pool.add_ref((group, page))
                });
                taken.collect()
            })
            .collect();
        if let Err(full) = self.add_blocks(&mut lists, fresh) {
            self.give_back(lists);
            return Err(full);
        }
        let mut table = Table::of(lists);
        table.published = cached_blocks as u32;
        Ok((table, cached))
    }

    /// Makes `room` tokens fit. All or nothing; a table never shrinks.
    pub fn grow(&mut self, table: &mut Table, room: u32) -> Result<(), Full> {
        let more = blocks_for(room).saturating_sub(table.groups[0].len() as u32);
        if more == 0 {
            return Ok(());
        }
        self.add_blocks(&mut table.groups, more)
    }

    fn add_blocks(&mut self, lists: &mut [Vec<PageRef>], blocks: u32) -> Result<(), Full> {
        let room = self.pool.room();
        if blocks > room {
            return Err(Full { wanted: blocks, room });
        }
        for (group, list) in lists.iter_mut().enumerate() {
            for _ in 0..blocks {
                list.push(self.pool.take(group as u32).expect("there is room for all of them"));
            }
        }
        Ok(())
    }

    /// Tells the prefix cache of the full blocks among the first `computed` tokens. Idempotent.
    pub fn publish(&mut self, table: &mut Table, hashes: &[BlockHash], computed: u32) {
        if !self.config.prefix_cache {
            return;
        }
        let full = ((computed / BLOCK_TOKENS) as usize).min(hashes.len());
        for (block, &hash) in hashes.iter().enumerate().take(full).skip(table.published as usize) {
            for (group, list) in table.groups.iter().enumerate() {
                self.pool.publish((group as u32, list[block].page), hash);
            }
        }
        table.published = table.published.max(full as u32);
    }

    /// Gives a table back. Pages that others refer to stay; full published blocks stay cached.
    pub fn close(&mut self, table: Table, _now: Time) {
        self.give_back(table.into_pages());
    }

    /// Last blocks first, so that among the cached the deepest are evicted before what they build on.
    pub(crate) fn give_back(&mut self, lists: Vec<Vec<PageRef>>) {
        for (group, list) in lists.into_iter().enumerate() {
            for page in list.into_iter().rev() {
                self.pool.drop_ref((group as u32, page.page));
            }
        }
    }

    /// Whether so many tokens could ever fit, were everything else gone.
    pub fn fits_ever(&self, tokens: u32) -> bool {
        blocks_for(tokens) <= self.config.pages
    }

    /// Keeps pages in use for something that is neither table nor lease.
    pub fn hold(&mut self, pages: impl Iterator<Item = (u32, PageRef)>) -> HoldId {
        self.pool.hold(pages.map(|(group, page)| (group, page.page)))
    }

    /// Ends a hold.
    pub fn release(&mut self, hold: HoldId) {
        self.pool.release(hold);
    }
}

#[cfg(feature = "model")]
impl std::hash::Hash for Table {
    fn hash<H: std::hash::Hasher>(&self, state: &mut H) {
        self.groups.iter().flatten().for_each(|page| page.page.hash(state));
        self.published.hash(state);
    }
}
