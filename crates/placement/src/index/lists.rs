//! Holders of blocks that more than two hold: short lists by number, which keep to what they are given.

use super::{Holder, LIST_BYTES};

/// The holders of blocks that more than two hold, by numbers from one.
#[derive(Debug, Default)]
pub(super) struct Lists {
    lists: Vec<Vec<Holder>>,
    free: Vec<u32>,
    /// Holders that there is room for, in all lists.
    room: usize,
}

impl Lists {
    pub(super) fn bytes(&self) -> usize {
        self.lists.capacity() * LIST_BYTES + self.room * size_of::<Holder>()
    }

    pub(super) fn get(&self, list: u32) -> &[Holder] {
        &self.lists[list as usize - 1]
    }

    /// To be changed, and not to grow.
    pub(super) fn get_mut(&mut self, list: u32) -> &mut Vec<Holder> {
        &mut self.lists[list as usize - 1]
    }

    /// A new list, if it takes no more bytes than `bytes_max`.
    pub(super) fn add(&mut self, holders: &[Holder], bytes_max: usize) -> Option<u32> {
        let grows = if self.free.is_empty() && self.lists.len() == self.lists.capacity() {
            (self.lists.capacity() / 4).max(64)
        } else {
            0
        };
        if grows * LIST_BYTES + size_of_val(holders) > bytes_max {
            return None;
        }
        self.lists.reserve_exact(grows);
        let list = self.free.pop().unwrap_or_else(|| {
            self.lists.push(Vec::new());
            self.lists.len() as u32
        });
        let new = holders.to_vec();
        self.room += new.capacity();
        self.lists[list as usize - 1] = new;
        Some(list)
    }

    /// One more in a list, if it takes no more bytes than `bytes_max`.
    pub(super) fn insert(&mut self, list: u32, place: usize, new: Holder, bytes_max: usize) -> bool {
        let holders = &mut self.lists[list as usize - 1];
        if holders.len() == holders.capacity() {
            let more = (holders.len() / 2).max(2);
            if more * size_of::<Holder>() > bytes_max {
                return false;
            }
            let before = holders.capacity();
            holders.reserve_exact(more);
            self.room += holders.capacity() - before;
        }
        holders.insert(place, new);
        true
    }

    pub(super) fn give_back(&mut self, list: u32) {
        let old = std::mem::take(&mut self.lists[list as usize - 1]);
        self.room -= old.capacity();
        self.free.push(list);
    }
}
