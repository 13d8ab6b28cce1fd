//! Finding a token's key and value rows in paged KV.

use tandem_device::{KvLayer, Sequences};

use crate::memory::{Shared, slice};

/// One layer of the KV of a step's sequences.
pub(crate) struct Pages<'a, T> {
    memory: Shared<T>,
    table: &'a [u32],
    /// Blocks per row of the table; 0: `table` holds the page of block 0, the others follow it.
    stride: usize,
    page_elements: usize,
    layer_first: usize,
    /// Tokens in a page.
    pub(crate) tokens: usize,
    /// Key-value heads.
    pub(crate) heads: usize,
    /// Elements of a key and of a value.
    pub(crate) width: usize,
}

impl<'a, T: Copy> Pages<'a, T> {
    /// # Safety
    /// The tables are not written while this lives.
    pub(crate) unsafe fn of(kv: KvLayer<'a>, sequences: Sequences<'a>) -> Pages<'a, T> {
        let pages = kv.pages;
        assert!(kv.layer < pages.layers, "layer {} of {}", kv.layer, pages.layers);
        // SAFETY: by the caller's promise.
        let (table, stride) = unsafe {
            match sequences {
                Sequences::Tables { pages, stride } => {
                    assert!(stride > 0, "a table has columns");
                    (slice::<u32>(pages), stride)
                }
                Sequences::Contiguous { bases } => (slice::<u32>(bases), 0),
            }
        };
        Pages {
            memory: Shared::of(&pages.memory),
            table,
            stride,
            page_elements: pages.page_elements(),
            layer_first: kv.layer * pages.heads * 2 * pages.tokens * pages.width,
            tokens: pages.tokens,
            heads: pages.heads,
            width: pages.width,
        }
    }

    /// The first element of a head's key rows in a block; its value rows follow them.
    #[inline(always)]
    fn head(&self, sequence: usize, block: usize, head: usize) -> usize {
        let page = if self.stride == 0 {
            self.table[sequence] as usize + block
        } else {
            self.table[sequence * self.stride..][..self.stride][block] as usize
        };
        page * self.page_elements + self.layer_first + head * 2 * self.tokens * self.width
    }

    /// `tokens` key and value rows of a head from `position` on, all in one page.
    ///
    /// # Safety
    /// Nothing writes them while the slices live.
    #[inline(always)]
    pub(crate) unsafe fn rows(
        &self,
        sequence: usize,
        position: usize,
        head: usize,
        tokens: usize,
    ) -> (&[T], &[T]) {
        let row = position % self.tokens;
        assert!(row + tokens <= self.tokens, "rows {row} to {} of {}", row + tokens, self.tokens);
        let first = self.head(sequence, position / self.tokens, head) + row * self.width;
        let len = tokens * self.width;
        // SAFETY: by the caller's promise.
        unsafe { (self.memory.read(first, len), self.memory.read(first + self.tokens * self.width, len)) }
    }

    /// The key and value row of one token.
    ///
    /// # Safety
    /// Nothing else touches them while the slices live.
    #[inline(always)]
    #[allow(clippy::mut_from_ref, reason = "disjoint rows of shared memory")]
    pub(crate) unsafe fn token_mut(
        &self,
        sequence: usize,
        position: usize,
        head: usize,
    ) -> (&mut [T], &mut [T]) {
        let first = self.head(sequence, position / self.tokens, head) + position % self.tokens * self.width;
        // SAFETY: by the caller's promise; keys and values do not overlap.
        unsafe {
            (
                self.memory.part(first, self.width),
                self.memory.part(first + self.tokens * self.width, self.width),
            )
        }
    }
}
