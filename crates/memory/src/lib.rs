//! Regions of memory that a device computes in and a peer may map or read.
//!
//! Never knows: pages, KV, transports. Always holds: a region's bytes are zero at first, stay where they are,
//! and are unmapped exactly when its last owner drops it.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::ptr::NonNull;

/// A mapped piece of memory. Shared by reference; who may touch which bytes when is settled above, by the
/// ownership of pages.
#[derive(Debug)]
pub struct Region {
    start: NonNull<u8>,
    len: usize,
    fd: Option<OwnedFd>,
}

// SAFETY: a region is an address range that this value alone unmaps. Access to the bytes goes through the
// unsafe methods, whose callers answer for races.
unsafe impl Send for Region {}
// SAFETY: as for `Send`.
unsafe impl Sync for Region {}

impl Region {
    /// Private memory, advised for huge pages before anybody touches it.
    ///
    /// # Errors
    /// What the system says, and `InvalidInput` for zero bytes.
    pub fn anonymous(bytes: usize) -> io::Result<Region> {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        Region::map(bytes, flags, None)
    }

    /// Memory behind a file descriptor that can be passed to peers on this host. It can neither grow nor
    /// shrink, so nobody who maps it can be hit by a truncation.
    ///
    /// # Errors
    /// As for `anonymous`.
    pub fn shared(bytes: usize) -> io::Result<Region> {
        let flags = libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING;
        // SAFETY: the name is a C string that lives for the call.
        let fd = unsafe { libc::memfd_create(c"tandem-kv".as_ptr(), flags) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the descriptor is new and owned by nobody else.
        let fd = unsafe { OwnedFd::from_raw_fd(fd) };
        // SAFETY: plain system calls on a descriptor that is open.
        let sized = unsafe {
            libc::ftruncate(fd.as_raw_fd(), bytes as libc::off_t) == 0
                && libc::fcntl(fd.as_raw_fd(), libc::F_ADD_SEALS, libc::F_SEAL_SHRINK | libc::F_SEAL_GROW)
                    == 0
        };
        if !sized {
            return Err(io::Error::last_os_error());
        }
        Region::map(bytes, libc::MAP_SHARED, Some(fd))
    }

    fn map(len: usize, flags: libc::c_int, fd: Option<OwnedFd>) -> io::Result<Region> {
        if len == 0 {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "a region has at least one byte"));
        }
        let raw = fd.as_ref().map_or(-1, AsRawFd::as_raw_fd);
        // SAFETY: a new mapping at an address of the system's choice touches no memory that exists.
        let start = unsafe {
            libc::mmap(std::ptr::null_mut(), len, libc::PROT_READ | libc::PROT_WRITE, flags, raw, 0)
        };
        if start == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        // Before first touch, or the small pages stay. Only advice: a refusal costs speed and nothing else.
        // SAFETY: the range was mapped above.
        unsafe { libc::madvise(start, len, libc::MADV_HUGEPAGE) };
        let start = NonNull::new(start.cast()).expect("a mapping is never at address zero");
        Ok(Region { start, len, fd })
    }

    /// Bytes.
    #[allow(clippy::len_without_is_empty)] // no region is empty
    pub fn len(&self) -> usize {
        self.len
    }

    /// Where it begins, for devices and system calls.
    pub fn as_ptr(&self) -> *mut u8 {
        self.start.as_ptr()
    }

    /// What peers on this host can map, if it is shared.
    pub fn fd(&self) -> Option<BorrowedFd<'_>> {
        self.fd.as_ref().map(AsFd::as_fd)
    }

    /// Whether `len` bytes from `offset` lie inside.
    pub fn contains(&self, offset: u64, len: u64) -> bool {
        offset.checked_add(len).is_some_and(|end| end <= self.len as u64)
    }

    /// Bytes to read.
    ///
    /// # Safety
    /// Nobody writes to them while the slice lives.
    ///
    /// # Panics
    /// If they are not inside.
    pub unsafe fn slice(&self, offset: usize, len: usize) -> &[u8] {
        assert!(self.contains(offset as u64, len as u64), "bytes {offset}+{len} are outside of {}", self.len);
        // SAFETY: inside the mapping, as checked; unwritten, as the caller promises.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr().add(offset), len) }
    }

    /// Bytes to write.
    ///
    /// # Safety
    /// Nobody else reads or writes them while the slice lives.
    ///
    /// # Panics
    /// If they are not inside.
    #[allow(clippy::mut_from_ref)] // exclusive by the caller's promise, page by page
    pub unsafe fn slice_mut(&self, offset: usize, len: usize) -> &mut [u8] {
        assert!(self.contains(offset as u64, len as u64), "bytes {offset}+{len} are outside of {}", self.len);
        // SAFETY: inside the mapping, as checked; exclusive, as the caller promises.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr().add(offset), len) }
    }
}

impl Drop for Region {
    fn drop(&mut self) {
        // SAFETY: mapped by `map` with this length, and nobody can have a reference any more.
        unsafe { libc::munmap(self.start.as_ptr().cast(), self.len) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_region_is_zero_at_first_and_keeps_what_is_written() {
        for region in [Region::anonymous(10_000).unwrap(), Region::shared(10_000).unwrap()] {
            // SAFETY: nobody else knows this region.
            unsafe {
                assert!(region.slice(0, 10_000).iter().all(|&byte| byte == 0));
                region.slice_mut(5000, 3).copy_from_slice(b"abc");
                assert_eq!(region.slice(4999, 5), b"\0abc\0");
            }
        }
    }

    #[test]
    fn only_shared_regions_have_a_descriptor_and_it_cannot_be_truncated() {
        assert!(Region::anonymous(1).unwrap().fd().is_none());
        let region = Region::shared(4096).unwrap();
        let fd = region.fd().unwrap().as_raw_fd();
        // SAFETY: a plain system call on an open descriptor.
        assert_ne!(unsafe { libc::ftruncate(fd, 1) }, 0);
    }

    #[test]
    fn an_empty_region_is_refused_and_bounds_do_not_wrap() {
        assert_eq!(Region::anonymous(0).unwrap_err().kind(), io::ErrorKind::InvalidInput);
        let region = Region::anonymous(100).unwrap();
        assert!(region.contains(0, 100) && region.contains(100, 0));
        assert!(!region.contains(1, 100) && !region.contains(u64::MAX, 2));
    }

    #[test]
    #[should_panic(expected = "outside")]
    fn a_slice_outside_is_refused() {
        let region = Region::anonymous(100).unwrap();
        // SAFETY: it panics before anything is read.
        unsafe { region.slice(90, 11) };
    }
}
