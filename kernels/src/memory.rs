//! Host memory behind device buffers, and the one place where a buffer becomes a slice.

use std::alloc::{Layout, alloc_zeroed, dealloc};
use std::ptr::NonNull;
use std::sync::Arc;

use tandem_device::{Buffer, Element, Error};
use tandem_memory::Region;

/// From this size on memory comes as a region, which asks for huge pages before the first touch.
const REGION_BYTES: usize = 4 << 20;
const ALIGN: usize = 64;

/// A piece of host memory, given back on drop.
pub(crate) struct Memory {
    pointer: NonNull<u8>,
    bytes: usize,
    owner: Owner,
}

enum Owner {
    Heap(Layout),
    Region(#[allow(dead_code, reason = "kept mapped")] Arc<Region>),
}

// SAFETY: the memory is plain bytes with no thread affinity; who may read or write which part when is the
// contract of `tandem_device::Stream`, kept by its callers.
unsafe impl Send for Memory {}
// SAFETY: as above.
unsafe impl Sync for Memory {}

impl Memory {
    /// Zeroed memory for `len` elements as a buffer.
    pub(crate) fn allocate(element: Element, len: usize) -> Result<Buffer, Error> {
        let bytes = len.checked_mul(element.bytes()).filter(|bytes| *bytes <= isize::MAX as usize / 2);
        let Some(bytes) = bytes else {
            return Err(Error::Memory { bytes: usize::MAX, reason: "more than can be addressed".to_owned() });
        };
        if bytes >= REGION_BYTES {
            let region = Region::anonymous(bytes)
                .map_err(|error| Error::Memory { bytes, reason: error.to_string() })?;
            return Memory::map(Arc::new(region), element, len);
        }
        let layout =
            Layout::from_size_align(bytes.max(ALIGN), ALIGN).expect("a small multiple of the alignment");
        // SAFETY: the layout is not empty.
        let pointer = NonNull::new(unsafe { alloc_zeroed(layout) })
            .ok_or_else(|| Error::Memory { bytes, reason: "out of memory".to_owned() })?;
        let memory = Memory { pointer, bytes, owner: Owner::Heap(layout) };
        Ok(Buffer::new(element, len, Arc::new(memory)))
    }

    /// A region's first `len` elements as a buffer.
    pub(crate) fn map(region: Arc<Region>, element: Element, len: usize) -> Result<Buffer, Error> {
        let bytes = len * element.bytes();
        assert!(bytes <= region.len(), "{bytes} bytes of a region of {}", region.len());
        let pointer = NonNull::new(region.as_ptr())
            .ok_or_else(|| Error::Memory { bytes, reason: "the region is not mapped".to_owned() })?;
        let memory = Memory { pointer, bytes, owner: Owner::Region(region) };
        Ok(Buffer::new(element, len, Arc::new(memory)))
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        if let Owner::Heap(layout) = self.owner {
            // SAFETY: allocated with this layout, freed once.
            unsafe { dealloc(self.pointer.as_ptr(), layout) }
        }
    }
}

/// The address of a buffer's first element.
///
/// # Panics
/// If the buffer is made of something of another size.
pub(crate) fn pointer<T>(buffer: &Buffer) -> *mut T {
    assert_eq!(size_of::<T>(), buffer.element().bytes(), "{buffer:?} is not made of these");
    let memory = buffer.memory::<Memory>();
    let offset = buffer.first() * size_of::<T>();
    assert!(offset + buffer.bytes() <= memory.bytes, "{buffer:?} leaves its memory");
    // SAFETY: within the allocation, as just checked.
    unsafe { memory.pointer.as_ptr().add(offset).cast() }
}

/// A buffer's elements.
///
/// # Safety
/// Nothing writes the buffer while the slice lives: by the stream's order only the running operation touches it,
/// and that one does not write it.
pub(crate) unsafe fn slice<T>(buffer: &Buffer) -> &[T] {
    // SAFETY: `pointer` checked bounds and size; memory is zeroed at first, so every element was initialised.
    unsafe { std::slice::from_raw_parts(pointer(buffer), buffer.len()) }
}

/// A buffer's elements, to be written.
///
/// # Safety
/// Nothing else touches the buffer while the slice lives, as for [`slice`].
#[allow(clippy::mut_from_ref, reason = "a buffer is a handle, not the memory")]
pub(crate) unsafe fn slice_mut<T>(buffer: &Buffer) -> &mut [T] {
    // SAFETY: as in `slice`; exclusive by the caller's promise.
    unsafe { std::slice::from_raw_parts_mut(pointer(buffer), buffer.len()) }
}

/// Memory that several threads write in disjoint parts.
pub(crate) struct Shared<T> {
    pointer: *mut T,
    len: usize,
}

// SAFETY: only a pointer and a length; `part` says who may use what.
unsafe impl<T: Send> Send for Shared<T> {}
// SAFETY: as above.
unsafe impl<T: Send> Sync for Shared<T> {}

impl<T> Clone for Shared<T> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<T> Copy for Shared<T> {}

impl<T> Shared<T> {
    /// All of a buffer.
    pub(crate) fn of(buffer: &Buffer) -> Shared<T> {
        Shared { pointer: pointer(buffer), len: buffer.len() }
    }

    /// All of a slice. Whoever makes it keeps the slice alive and untouched as long as it is used.
    pub(crate) fn over(slice: &mut [T]) -> Shared<T> {
        Shared { pointer: slice.as_mut_ptr(), len: slice.len() }
    }

    /// `len` elements from `first` on.
    ///
    /// # Safety
    /// While the slice lives no other thread touches these elements, and the buffer outlives it.
    #[inline(always)]
    #[allow(clippy::mut_from_ref, reason = "disjoint parts of shared memory")]
    pub(crate) unsafe fn part(&self, first: usize, len: usize) -> &mut [T] {
        assert!(first + len <= self.len, "{len} elements from {first} of {}", self.len);
        // SAFETY: in bounds; exclusive by the caller's promise.
        unsafe { std::slice::from_raw_parts_mut(self.pointer.add(first), len) }
    }

    /// `len` elements from `first` on, to be read.
    ///
    /// # Safety
    /// While the slice lives nothing writes these elements, and the buffer outlives it.
    #[inline(always)]
    pub(crate) unsafe fn read(&self, first: usize, len: usize) -> &[T] {
        assert!(first + len <= self.len, "{len} elements from {first} of {}", self.len);
        // SAFETY: in bounds; not written by the caller's promise.
        unsafe { std::slice::from_raw_parts(self.pointer.add(first), len) }
    }
}
