//! Handles to device memory, and what their elements are.

use std::any::Any;
use std::fmt;
use std::ops::Range;
use std::sync::Arc;

/// What a buffer is made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Element {
    /// IEEE single precision.
    F32,
    /// The upper half of a single: 8 exponent and 7 fraction bits.
    Bf16,
    /// Unsigned 32-bit integers: token ids, positions, pages.
    U32,
}

impl Element {
    /// Bytes of one element.
    pub fn bytes(self) -> usize {
        match self {
            Element::F32 | Element::U32 => 4,
            Element::Bf16 => 2,
        }
    }

    /// The word used in KV forms and numerics classes.
    pub fn as_str(self) -> &'static str {
        match self {
            Element::F32 => "f32",
            Element::Bf16 => "bf16",
            Element::U32 => "u32",
        }
    }
}

/// A handle to device memory, or to a part of it. Clones name the same memory; the last one gives it back.
#[derive(Clone)]
pub struct Buffer {
    element: Element,
    first: usize,
    len: usize,
    memory: Arc<dyn Any + Send + Sync>,
}

impl Buffer {
    /// Made by devices: `memory` is what the device finds again through [`Buffer::memory`].
    pub fn new(element: Element, len: usize, memory: Arc<dyn Any + Send + Sync>) -> Buffer {
        Buffer { element, first: 0, len, memory }
    }

    /// What it is made of.
    pub fn element(&self) -> Element {
        self.element
    }

    /// Elements.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether it has no elements.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Bytes.
    pub fn bytes(&self) -> usize {
        self.len * self.element.bytes()
    }

    /// The first element's index in the memory.
    pub fn first(&self) -> usize {
        self.first
    }

    /// A part of the same memory.
    ///
    /// # Panics
    /// If the range leaves the buffer.
    pub fn part(&self, range: Range<usize>) -> Buffer {
        assert!(range.start <= range.end && range.end <= self.len, "part {range:?} of {} elements", self.len);
        Buffer {
            element: self.element,
            first: self.first + range.start,
            len: range.end - range.start,
            memory: self.memory.clone(),
        }
    }

    /// The same memory seen as elements of another type of equal size.
    ///
    /// # Panics
    /// If the sizes differ.
    pub fn seen_as(&self, element: Element) -> Buffer {
        assert_eq!(self.element.bytes(), element.bytes(), "elements of another size");
        Buffer { element, ..self.clone() }
    }

    /// The device's own view of the memory.
    ///
    /// # Panics
    /// If the buffer is another device's.
    pub fn memory<M: 'static>(&self) -> &M {
        self.memory.downcast_ref().expect("a buffer is used on the device that made it")
    }
}

impl fmt::Debug for Buffer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Buffer({} x {} from {})", self.len, self.element.as_str(), self.first)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_part_of_a_part_counts_from_the_memory_s_start() {
        let whole = Buffer::new(Element::Bf16, 100, Arc::new(7_u8));
        let part = whole.part(10..50).part(5..15);
        assert_eq!((part.first(), part.len(), part.bytes()), (15, 10, 20));
        assert_eq!(*part.memory::<u8>(), 7);
    }

    #[test]
    #[should_panic(expected = "part 5..11 of 10 elements")]
    fn a_part_that_leaves_the_buffer_is_refused() {
        Buffer::new(Element::F32, 10, Arc::new(())).part(5..11);
    }

    #[test]
    #[should_panic(expected = "the device that made it")]
    fn a_buffer_of_another_device_is_refused() {
        Buffer::new(Element::F32, 10, Arc::new(1_u8)).memory::<u16>();
    }
}
