//! Where pages lie in the region: from (group, page) to bytes and back.

use tandem_engine::Engine;
use tandem_kv_transfer::ByteRange;

/// Pages of each group lie one after the other from the group's base.
#[derive(Clone, Debug)]
pub(crate) struct PageMap {
    groups: Vec<GroupMap>,
    pages: u32,
}

#[derive(Clone, Debug)]
struct GroupMap {
    base: u64,
    stride: u64,
    bytes: u64,
}

impl PageMap {
    pub(crate) fn of(engine: &dyn Engine) -> PageMap {
        let facts = engine.facts();
        let groups = facts.form.page_bytes.iter().enumerate().map(|(group, &bytes)| {
            let base = engine.page_offset(group as u32, 0);
            let stride = if facts.pages > 1 { engine.page_offset(group as u32, 1) - base } else { bytes };
            GroupMap { base, stride, bytes }
        });
        PageMap { groups: groups.collect(), pages: facts.pages }
    }

    /// Where a page lies, here or in the region of a worker with the same form and any number of pages.
    ///
    /// # Panics
    /// If there is no such group.
    pub(crate) fn place(&self, group: u32, page: u32) -> ByteRange {
        let map = &self.groups[group as usize];
        ByteRange { offset: map.base + u64::from(page) * map.stride, len: map.bytes }
    }

    /// The pages that byte ranges touch; `None` if one touches anything that is not inside one page.
    pub(crate) fn covering(&self, ranges: &[ByteRange]) -> Option<Vec<(u32, u32)>> {
        ranges.iter().map(|range| self.page_of(range)).collect()
    }

    fn page_of(&self, range: &ByteRange) -> Option<(u32, u32)> {
        let end = range.offset.checked_add(range.len)?;
        self.groups.iter().enumerate().find_map(|(group, map)| {
            let inside = range.offset.checked_sub(map.base)?;
            let page = inside / map.stride;
            let start = map.base + page * map.stride;
            (page < u64::from(self.pages) && end <= start + map.bytes).then_some((group as u32, page as u32))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn map() -> PageMap {
        PageMap { groups: vec![GroupMap { base: 100, stride: 10, bytes: 8 }], pages: 3 }
    }

    #[test]
    fn a_range_inside_a_page_names_it_and_anything_else_names_nothing() {
        let at = |offset, len| map().covering(&[ByteRange { offset, len }]);
        assert_eq!(at(100, 8), Some(vec![(0, 0)]));
        assert_eq!(at(123, 5), Some(vec![(0, 2)]));
        assert_eq!(at(123, 6), None, "it runs into the gap");
        assert_eq!(at(130, 1), None, "past the last page");
        assert_eq!(at(99, 1), None, "before the first page");
        assert_eq!(at(u64::MAX, 2), None);
    }

    #[test]
    fn a_page_lies_where_its_group_says() {
        assert_eq!(map().place(0, 2), ByteRange { offset: 120, len: 8 });
    }
}
