//! Pages that a step completes, and the checksums they have had ever since.
//!
//! A page's checksum is taken once, between its last write and the word that it is whole, and goes with it
//! wherever it is pulled to. So what is wrong later, in this pool or on the way, can be told from what was computed.

use tandem_types::{BLOCK_TOKENS, Until};

use super::Core;

/// A page that the oldest step in flight completes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CompletedPage {
    /// The KV group.
    pub group: u32,
    /// Its index in the pool.
    pub page: u32,
    /// Rows that are filled; the rest is to be zeroed.
    pub rows: u32,
}

/// The checksum of a page's bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PageSum {
    /// The KV group.
    pub group: u32,
    /// Its index in the pool.
    pub page: u32,
    /// Of all its bytes.
    pub checksum: u64,
}

/// The checksum of every page that was whole when its block was last filled.
#[derive(Debug)]
pub(super) struct PageSums(Vec<Vec<Option<u64>>>);

impl PageSums {
    pub(super) fn new(groups: u32, pages: u32) -> PageSums {
        PageSums(vec![vec![None; pages as usize]; groups as usize])
    }

    pub(super) fn set(&mut self, sum: PageSum) {
        self.0[sum.group as usize][sum.page as usize] = Some(sum.checksum);
    }

    pub(super) fn get(&self, group: u32, page: u32) -> Option<u64> {
        self.0[group as usize][page as usize]
    }
}

impl Core {
    /// What the oldest step in flight completes: full blocks, and the last page of a prompt that is handed off.
    /// Its tail must be zeroed, and all of them summed, before `collected` says that they are whole.
    pub fn completing(&self) -> Vec<CompletedPage> {
        let mut pages = Vec::new();
        for row in self.batcher.completing() {
            let Some(table) = self.batcher.table(row.id) else { continue };
            let hands_off = self.legs.get(&row.id).is_some_and(|leg| leg.until == Until::FirstToken);
            let tail = row.to % BLOCK_TOKENS;
            for group in 0..self.constants.groups {
                let list = table.pages(group);
                let full = (row.from / BLOCK_TOKENS) as usize..(row.to / BLOCK_TOKENS) as usize;
                let full = list[full].iter().map(|page| (page.page, BLOCK_TOKENS));
                let last = (hands_off && row.sample && tail != 0)
                    .then(|| (list[(row.to / BLOCK_TOKENS) as usize].page, tail));
                pages.extend(full.chain(last).map(|(page, rows)| CompletedPage { group, page, rows }));
            }
        }
        pages
    }

    /// Checksums of pages that hold what they should.
    pub fn note_sums(&mut self, sums: impl IntoIterator<Item = PageSum>) {
        sums.into_iter().for_each(|sum| self.sums.set(sum));
    }

    /// The checksum that a page has had since it was whole, if it was taken.
    pub fn sum_of(&self, group: u32, page: u32) -> Option<u64> {
        self.sums.get(group, page)
    }
}
