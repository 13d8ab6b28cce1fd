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

    /// Memory behind a file descriptor that can be passed to peers on this host. Sealed for good: it can neither
    /// grow nor shrink, so nobody who maps it can be hit by a truncation; and only this mapping can write to it.
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
        // SAFETY: a plain system call on a descriptor that is open.
        if unsafe { libc::ftruncate(fd.as_raw_fd(), bytes as libc::off_t) } != 0 {
            return Err(io::Error::last_os_error());
        }
        let region = Region::map(bytes, libc::MAP_SHARED, Some(fd))?;
        // After the mapping: what is mapped by then stays writable.
        let seals = libc::F_SEAL_SHRINK | libc::F_SEAL_GROW | libc::F_SEAL_FUTURE_WRITE | libc::F_SEAL_SEAL;
        let fd = region.fd.as_ref().expect("it was given one").as_raw_fd();
        // SAFETY: a plain system call on a descriptor that is open.
        if unsafe { libc::fcntl(fd, libc::F_ADD_SEALS, seals) } != 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(region)
    }

    fn map(len: usize, flags: libc::c_int, fd: Option<OwnedFd>) -> io::Result<Region> {
        let raw = fd.as_ref().map_or(-1, AsRawFd::as_raw_fd);
        let start = map(len, libc::PROT_READ | libc::PROT_WRITE, flags, raw)?;
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

/// Another process's shared region, to be read only. Its owner goes on writing to it, so there are no slices of
/// it: which bytes stand still when, its owner says. The memory stays until every mapping of it is gone, also if
/// its owner is gone before.
#[derive(Debug)]
pub struct Mapping {
    start: NonNull<u8>,
    len: usize,
}

// SAFETY: as for a region, an address range that this value alone unmaps.
unsafe impl Send for Mapping {}
// SAFETY: as for `Send`.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Maps what an owner has passed.
    ///
    /// # Errors
    /// What the system says, and `InvalidData` for memory that its owner could take from under the reader.
    pub fn of(fd: &OwnedFd) -> io::Result<Mapping> {
        // SAFETY: a plain system call on a descriptor that is open.
        let seals = unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_GET_SEALS) };
        if seals < 0 || seals & libc::F_SEAL_SHRINK == 0 {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                "the memory is not sealed against shrinking",
            ));
        }
        // SAFETY: a stat is plain numbers, for which zeros are good.
        let mut stat: libc::stat = unsafe { std::mem::zeroed() };
        // SAFETY: the descriptor is open, and the result has a place.
        if unsafe { libc::fstat(fd.as_raw_fd(), &mut stat) } != 0 {
            return Err(io::Error::last_os_error());
        }
        let len = usize::try_from(stat.st_size).unwrap_or(0);
        let start = map(len, libc::PROT_READ, libc::MAP_SHARED, fd.as_raw_fd())?;
        Ok(Mapping { start, len })
    }

    /// Bytes.
    #[allow(clippy::len_without_is_empty)] // no mapping is empty
    pub fn len(&self) -> usize {
        self.len
    }

    /// Where it begins.
    pub fn as_ptr(&self) -> *const u8 {
        self.start.as_ptr()
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: mapped by `of` with this length, and nobody can have a reference any more.
        unsafe { libc::munmap(self.start.as_ptr().cast(), self.len) };
    }
}

fn map(len: usize, access: libc::c_int, flags: libc::c_int, fd: libc::c_int) -> io::Result<NonNull<u8>> {
    if len == 0 {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "a region has at least one byte"));
    }
    // SAFETY: a new mapping at an address of the system's choice touches no memory that exists.
    let start = unsafe { libc::mmap(std::ptr::null_mut(), len, access, flags, fd, 0) };
    if start == libc::MAP_FAILED {
        return Err(io::Error::last_os_error());
    }
    // Before first touch, or the small pages stay. Only advice: a refusal costs speed and nothing else.
    // SAFETY: the range was mapped above.
    unsafe { libc::madvise(start, len, libc::MADV_HUGEPAGE) };
    Ok(NonNull::new(start.cast()).expect("a mapping is never at address zero"))
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
    fn only_shared_regions_have_a_descriptor_and_it_stays_as_it_is() {
        assert!(Region::anonymous(1).unwrap().fd().is_none());
        let region = Region::shared(4096).unwrap();
        let fd = region.fd().unwrap().as_raw_fd();
        // SAFETY: plain system calls on an open descriptor.
        unsafe {
            assert_ne!(libc::ftruncate(fd, 1), 0, "it does not shrink");
            assert_ne!(libc::ftruncate(fd, 8192), 0, "it does not grow");
            assert_ne!(libc::fcntl(fd, libc::F_ADD_SEALS, libc::F_SEAL_WRITE), 0, "nobody adds a seal");
        }
    }

    #[test]
    fn a_peer_that_maps_the_descriptor_sees_the_same_bytes_also_after_the_owner_is_gone() {
        let region = Region::shared(4096).unwrap();
        let fd = region.fd().unwrap().try_clone_to_owned().unwrap();
        let peer = Mapping::of(&fd).unwrap();
        assert_eq!(peer.len(), 4096);
        // SAFETY: one thread uses both mappings, one slice at a time.
        unsafe {
            let read = || std::slice::from_raw_parts(peer.as_ptr().add(100), 3);
            region.slice_mut(100, 3).copy_from_slice(b"abc");
            assert_eq!(read(), b"abc");
            drop(region);
            assert_eq!(read(), b"abc");
        }
    }

    #[test]
    fn a_peer_cannot_write_and_maps_nothing_that_can_shrink() {
        let region = Region::shared(4096).unwrap();
        let writable =
            map(4096, libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED, region.fd().unwrap().as_raw_fd());
        assert_eq!(writable.unwrap_err().raw_os_error(), Some(libc::EPERM));
        // SAFETY: the name is a C string; the descriptor is new and owned by nobody else.
        let unsealed =
            unsafe { OwnedFd::from_raw_fd(libc::memfd_create(c"unsealed".as_ptr(), libc::MFD_CLOEXEC)) };
        assert_eq!(Mapping::of(&unsealed).unwrap_err().kind(), io::ErrorKind::InvalidData);
    }

    /// Lines of a file under `/proc/self` that are about the mapping of this file.
    fn mappings_of(inode: u64) -> usize {
        let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
        maps.lines().filter(|line| line.split_whitespace().nth(4) == Some(&inode.to_string())).count()
    }

    #[test]
    fn a_dropped_region_is_unmapped() {
        use std::os::unix::fs::MetadataExt;
        let region = Region::shared(1 << 20).unwrap();
        let file = std::fs::File::from(region.fd().unwrap().try_clone_to_owned().unwrap());
        let inode = file.metadata().unwrap().ino();
        assert_eq!(mappings_of(inode), 1);
        drop(region);
        assert_eq!(mappings_of(inode), 0);
    }

    #[test]
    fn memory_is_advised_for_huge_pages_and_costs_nothing_until_it_is_touched() {
        if !std::path::Path::new("/sys/kernel/mm/transparent_hugepage").exists() {
            eprintln!("SKIPPED: this system has no huge pages");
            return;
        }
        let region = Region::anonymous(64 << 20).unwrap();
        let smaps = std::fs::read_to_string("/proc/self/smaps").unwrap();
        // A mapping may have been joined with a neighbour, so it is looked for by an address inside.
        let inside = region.as_ptr() as u64 + (32 << 20);
        let mut about = smaps.lines().skip_while(|line| {
            let range = line.split_whitespace().next().and_then(|range| range.split_once('-'));
            let parse = |text| u64::from_str_radix(text, 16).ok();
            let range = range.and_then(|(from, to)| Some(parse(from)?..parse(to)?));
            !range.is_some_and(|range| range.contains(&inside))
        });
        let flags = about.find(|line| line.starts_with("VmFlags:")).expect("the region is mapped");
        assert!(flags.split_whitespace().any(|flag| flag == "hg"), "{flags}");
        let mut pages = vec![0u8; (32 << 20) / 4096];
        let middle = (inside & !4095) as *mut libc::c_void;
        // SAFETY: asks about pages of the region, one byte each.
        let asked = unsafe { libc::mincore(middle, pages.len() * 4096 - 4096, pages.as_mut_ptr()) };
        assert_eq!(asked, 0, "{}", io::Error::last_os_error());
        assert!(pages.iter().all(|page| page & 1 == 0), "nothing is resident");
    }

    #[test]
    fn an_empty_region_is_refused_and_bounds_do_not_wrap() {
        assert_eq!(Region::anonymous(0).unwrap_err().kind(), io::ErrorKind::InvalidInput);
        let region = Region::anonymous(100).unwrap();
        assert!(region.contains(0, 100) && region.contains(100, 0));
        assert!(!region.contains(1, 100) && !region.contains(u64::MAX, 2));
    }

    #[test]
    fn more_than_there_can_be_is_an_error() {
        assert!(Region::anonymous(usize::MAX).is_err());
        assert!(Region::shared(usize::MAX).is_err());
    }

    #[test]
    #[should_panic(expected = "outside")]
    fn a_slice_outside_is_refused() {
        let region = Region::anonymous(100).unwrap();
        // SAFETY: it panics before anything is read.
        unsafe { region.slice(90, 11) };
    }
}
