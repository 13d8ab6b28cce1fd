//! Pages: who refers to each, which are free, which hold a cached block that nobody uses.

use std::collections::{BTreeMap, HashMap, VecDeque};

use tandem_types::{BlockHash, PageRef};

/// A page anywhere: (group, page).
pub(crate) type At = (u32, u32);

/// A reference to pages by something that is not a table or lease: a submitted step, a read, a quarantine.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct HoldId(u64);

/// Blocks by what refers to them. `total = free + cached + in_use`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// All of them.
    pub total: u32,
    /// Nothing refers to these.
    pub free: u32,
    /// Only the prefix cache refers to these; they count as room.
    pub cached: u32,
    /// Sequences, leases, reads or steps refer to these.
    pub in_use: u32,
}

#[derive(Clone, Debug, Default)]
struct Page {
    generation: u32,
    refs: u32,
    hash: Option<BlockHash>,
    /// When it was last let go of; the key in the group's idle list while it is idle and cached.
    stamp: u64,
}

#[derive(Debug, Default)]
#[cfg_attr(feature = "model", derive(Clone))]
struct Group {
    pages: Vec<Page>,
    free: Vec<u32>,
    index: HashMap<BlockHash, u32>,
    /// Cached pages that nobody uses, oldest first.
    idle: BTreeMap<u64, u32>,
}

/// All pages of a worker.
#[derive(Debug)]
#[cfg_attr(feature = "model", derive(Clone))]
pub(crate) struct Pool {
    groups: Vec<Group>,
    holds: BTreeMap<HoldId, Vec<At>>,
    next_hold: u64,
    next_stamp: u64,
    journal: Journal,
}

/// Changes that are remembered for those who follow the cache.
const JOURNAL_MAX: usize = 1 << 16;

/// Which blocks came into the first group's cache and left it, in order. Groups are used in step.
#[derive(Debug, Default)]
#[cfg_attr(feature = "model", derive(Clone))]
struct Journal {
    /// Whether it is findable from then on, and the block.
    changes: VecDeque<(bool, BlockHash)>,
    /// How many changes there were before the first of these.
    dropped: u64,
}

impl Journal {
    fn note(&mut self, group: u32, stored: bool, hash: BlockHash) {
        if group != 0 {
            return;
        }
        if self.changes.len() == JOURNAL_MAX {
            self.changes.pop_front();
            self.dropped += 1;
        }
        self.changes.push_back((stored, hash));
    }
}

/// What somebody has to learn who follows the prefix cache.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum CacheChanges {
    /// Blocks that are findable now (true) or no longer, in order.
    Since(Vec<(bool, BlockHash)>),
    /// All that are findable: more has changed than is remembered.
    All(Vec<BlockHash>),
}

impl Pool {
    /// What has changed after the first `seen` changes, and how many there were by now. `None` asks for all.
    pub(crate) fn changes(&self, seen: Option<u64>) -> (CacheChanges, u64) {
        let journal = &self.journal;
        let end = journal.dropped + journal.changes.len() as u64;
        let known = seen.filter(|seen| (journal.dropped..=end).contains(seen));
        let changes = match known {
            Some(seen) => {
                let skip = (seen - journal.dropped) as usize;
                CacheChanges::Since(journal.changes.iter().skip(skip).copied().collect())
            }
            None => {
                let mut all: Vec<BlockHash> = self.groups[0].index.keys().copied().collect();
                all.sort_unstable();
                CacheChanges::All(all)
            }
        };
        (changes, end)
    }

    pub(crate) fn new(groups: u32, pages: u32) -> Pool {
        let group = || Group {
            pages: vec![Page::default(); pages as usize],
            free: (0..pages).rev().collect(),
            ..Group::default()
        };
        Pool {
            groups: (0..groups).map(|_| group()).collect(),
            holds: BTreeMap::new(),
            next_hold: 1,
            next_stamp: 1,
            journal: Journal::default(),
        }
    }

    pub(crate) fn groups(&self) -> u32 {
        self.groups.len() as u32
    }

    /// Pages of each group that can be had now, by eviction if need be.
    pub(crate) fn room(&self) -> u32 {
        self.groups.iter().map(|g| g.free.len() + g.idle.len()).min().expect("there is a group") as u32
    }

    /// Blocks by the fullest group: groups are used in step, one page of each per block.
    pub(crate) fn counts(&self) -> Counts {
        let group = &self.groups[0];
        let (total, free, cached) =
            (group.pages.len() as u32, group.free.len() as u32, group.idle.len() as u32);
        Counts { total, free, cached, in_use: total - free - cached }
    }

    /// A page for a new use: a free one, else the cached one that was let go of longest ago.
    pub(crate) fn take(&mut self, group: u32) -> Option<PageRef> {
        let g = &mut self.groups[group as usize];
        let page = match g.free.pop() {
            Some(page) => page,
            None => {
                let (_, page) = g.idle.pop_first()?;
                let hash = g.pages[page as usize].hash.take().expect("an idle page is cached");
                g.index.remove(&hash);
                self.journal.note(group, false, hash);
                page
            }
        };
        let p = &mut g.pages[page as usize];
        p.generation = p.generation.wrapping_add(1);
        p.refs = 1;
        Some(PageRef { page, generation: p.generation })
    }

    /// One more reference to a page that is in use or cached.
    pub(crate) fn add_ref(&mut self, (group, page): At) -> PageRef {
        let g = &mut self.groups[group as usize];
        let p = &mut g.pages[page as usize];
        if p.refs == 0 {
            g.idle
                .remove(&p.stamp)
                .expect("a page without references is idle or free, and free ones are taken");
        }
        p.refs += 1;
        PageRef { page, generation: p.generation }
    }

    /// One reference less. The last one frees the page, or leaves it to the cache.
    pub(crate) fn drop_ref(&mut self, (group, page): At) {
        let g = &mut self.groups[group as usize];
        let p = &mut g.pages[page as usize];
        assert!(p.refs > 0, "page {page} of group {group} is given back more often than it was taken");
        p.refs -= 1;
        if p.refs > 0 {
            return;
        }
        if p.hash.is_some() {
            p.stamp = self.next_stamp;
            self.next_stamp += 1;
            g.idle.insert(p.stamp, page);
        } else {
            g.free.push(page);
        }
    }

    /// References to a page.
    pub(crate) fn refs(&self, (group, page): At) -> u32 {
        self.groups[group as usize].pages[page as usize].refs
    }

    /// Whether the page still is what it was when it was named.
    pub(crate) fn is_current(&self, group: u32, page: PageRef) -> bool {
        let p = self.groups[group as usize].pages.get(page.page as usize);
        p.is_some_and(|p| p.generation == page.generation && p.refs > 0)
    }

    /// The page that holds this block.
    pub(crate) fn find(&self, group: u32, hash: BlockHash) -> Option<u32> {
        self.groups[group as usize].index.get(&hash).copied()
    }

    /// This page holds this block, whole. Nothing changes if another page does already.
    pub(crate) fn publish(&mut self, (group, page): At, hash: BlockHash) {
        let g = &mut self.groups[group as usize];
        let p = &mut g.pages[page as usize];
        if p.hash.is_none() && !g.index.contains_key(&hash) {
            p.hash = Some(hash);
            g.index.insert(hash, page);
            self.journal.note(group, true, hash);
        }
    }

    /// This page holds no block that anybody may find.
    pub(crate) fn forget(&mut self, (group, page): At) {
        let g = &mut self.groups[group as usize];
        let Some(p) = g.pages.get_mut(page as usize) else { return };
        let Some(hash) = p.hash.take() else { return };
        g.index.remove(&hash);
        self.journal.note(group, false, hash);
        if p.refs == 0 {
            g.idle.remove(&p.stamp);
            g.free.push(page);
        }
    }

    pub(crate) fn hold(&mut self, pages: impl Iterator<Item = At>) -> HoldId {
        let pages: Vec<At> = pages
            .inspect(|&at| {
                assert!(
                    self.groups[at.0 as usize].pages[at.1 as usize].refs > 0,
                    "only pages in use can be held"
                )
            })
            .collect();
        for &at in &pages {
            self.add_ref(at);
        }
        let id = HoldId(self.next_hold);
        self.next_hold += 1;
        self.holds.insert(id, pages);
        id
    }

    pub(crate) fn release(&mut self, hold: HoldId) {
        let pages = self.holds.remove(&hold).expect("a hold is released once");
        for at in pages {
            self.drop_ref(at);
        }
    }

    pub(crate) fn check_books(&self) {
        for (number, group) in self.groups.iter().enumerate() {
            let used = group.pages.iter().filter(|p| p.refs > 0).count();
            let idle = group.pages.iter().filter(|p| p.refs == 0 && p.hash.is_some()).count();
            let sum = used + idle + group.free.len();
            assert_eq!(idle, group.idle.len(), "group {number}: the idle list is not the idle pages");
            assert_eq!(
                sum,
                group.pages.len(),
                "group {number}: used, cached and free pages are not all pages"
            );
            let hashed = group.pages.iter().filter(|p| p.hash.is_some()).count();
            assert_eq!(hashed, group.index.len(), "group {number}: the index does not name the cached pages");
            for (hash, &page) in &group.index {
                assert_eq!(
                    group.pages[page as usize].hash,
                    Some(*hash),
                    "group {number}: page {page} is misnamed"
                );
            }
        }
        let held: usize = self.holds.values().map(Vec::len).sum();
        let refs: u64 = self.groups.iter().flat_map(|g| &g.pages).map(|p| u64::from(p.refs)).sum();
        assert!(held as u64 <= refs, "more holds than references");
    }
}

/// Equal for pools that behave alike: stamps count by their order, names of holds not at all, generations only
/// for who has noted one, and the index says nothing that the pages do not.
#[cfg(feature = "model")]
impl std::hash::Hash for Pool {
    fn hash<H: std::hash::Hasher>(&self, state: &mut H) {
        for group in &self.groups {
            for page in &group.pages {
                (page.refs, page.hash).hash(state);
            }
            group.free.hash(state);
            group.idle.len().hash(state);
            group.idle.values().for_each(|page| page.hash(state));
        }
        let mut holds: Vec<&Vec<At>> = self.holds.values().collect();
        holds.sort();
        holds.hash(state);
    }
}
