//! Copies between mapped memories, in slices, with checksums taken while a slice is in the cache.

use std::any::Any;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard};

use tokio::task::JoinHandle;

use crate::checksum::Sum;
use crate::{ByteRange, Pull};

/// Bytes copied between two looks at whether to go on: a tenth of a millisecond or so.
pub(crate) const SLICE_BYTES: usize = 1 << 20;
/// Bytes that are copied and then summed: they fit into a core's own cache.
const SUMMED_BYTES: usize = 64 << 10;
/// What a range costs at least, in bytes, so that many small ones are a slice too.
const RANGE_COST: usize = 1 << 10;

/// A pull's bytes on their way from one mapping to another.
pub(crate) struct Copying {
    pieces: Vec<Piece>,
    /// The piece whose turn it is, and how much of it is copied.
    piece: usize,
    copied: usize,
    sum: Sum,
    sums: Option<Vec<u64>>,
    /// What keeps both mappings.
    _mapped: Box<dyn Any + Send>,
}

struct Piece {
    from: *const u8,
    to: *mut u8,
    len: usize,
}

// SAFETY: the pointers lead into mappings that `_mapped` keeps, whichever thread is at work; one is at a time,
// since a step needs the value exclusively.
unsafe impl Send for Copying {}

impl Copying {
    /// A copy that has not begun.
    ///
    /// # Safety
    /// `source` is the beginning of a mapping that holds all remote ranges and that `keep` keeps. Until this value
    /// is dropped, nobody writes to those, and the pull's places are this value's alone.
    pub(crate) unsafe fn new(pull: &Pull, source: *const u8, keep: impl Any + Send) -> Copying {
        let piece = |(&ByteRange { offset, len }, &local): (&ByteRange, &u64)| {
            assert!(pull.local.contains(local, len), "the pull was checked");
            // SAFETY: both are inside their mappings: as the caller promises, and as checked.
            let (from, to) =
                unsafe { (source.add(offset as usize), pull.local.as_ptr().add(local as usize)) };
            Piece { from, to, len: len as usize }
        };
        let pieces: Vec<Piece> = pull.remote.iter().zip(&pull.local_offsets).map(piece).collect();
        let sum = Sum::new(pieces.first().map_or(0, |piece| piece.len));
        let sums = pull.checksums.then(|| Vec::with_capacity(pieces.len()));
        Copying { pieces, piece: 0, copied: 0, sum, sums, _mapped: Box::new((pull.local.clone(), keep)) }
    }

    /// Copies the next slice. False when nothing is left.
    pub(crate) fn step(&mut self) -> bool {
        let mut cost = 0;
        while cost < SLICE_BYTES
            && let Some(piece) = self.pieces.get(self.piece)
        {
            let most = if self.sums.is_some() { SUMMED_BYTES } else { SLICE_BYTES - cost };
            let len = most.min(piece.len - self.copied);
            // SAFETY: inside both mappings, unwritten and ours, as `new` was promised. The mappings may be one and
            // the same, so nothing is said here of the two not overlapping.
            unsafe { std::ptr::copy(piece.from.add(self.copied), piece.to.add(self.copied), len) };
            self.copied += len;
            if self.sums.is_some() {
                // SAFETY: the place is this value's alone, and so much of it was written.
                self.sum.advance(unsafe { std::slice::from_raw_parts(piece.to, self.copied) });
            }
            if self.copied == piece.len {
                self.next_piece();
            }
            cost += len.max(RANGE_COST);
        }
        self.piece < self.pieces.len()
    }

    fn next_piece(&mut self) {
        let piece = &self.pieces[self.piece];
        self.piece += 1;
        self.copied = 0;
        let next = Sum::new(self.pieces.get(self.piece).map_or(0, |piece| piece.len));
        let sum = std::mem::replace(&mut self.sum, next);
        if let Some(sums) = &mut self.sums {
            // SAFETY: the place is this value's alone, and all of it was written.
            sums.push(sum.finish(unsafe { std::slice::from_raw_parts(piece.to, piece.len) }));
        }
    }

    /// The checksums, when nothing is left; none if nobody asked for them.
    pub(crate) fn into_sums(self) -> Vec<u64> {
        assert_eq!(self.piece, self.pieces.len(), "checksums are those of all bytes");
        self.sums.unwrap_or_default()
    }
}

/// A copy on a thread where it keeps nobody waiting. When this value has dropped, nothing is written any more.
pub(crate) struct Aside {
    shared: Arc<Shared>,
    thread: JoinHandle<()>,
}

struct Shared {
    stopped: AtomicBool,
    /// Locked for the length of a slice; `None` once it was stopped.
    copying: Mutex<Option<Copying>>,
}

impl Shared {
    fn copying(&self) -> MutexGuard<'_, Option<Copying>> {
        self.copying.lock().expect("nothing panics under this lock")
    }
}

impl Aside {
    pub(crate) fn start(copying: Copying) -> Aside {
        let shared = Arc::new(Shared { stopped: AtomicBool::new(false), copying: Mutex::new(Some(copying)) });
        let its = shared.clone();
        let run = move || {
            while !its.stopped.load(Ordering::Acquire)
                && let Some(copying) = &mut *its.copying()
                && copying.step()
            {}
        };
        Aside { shared, thread: tokio::task::spawn_blocking(run) }
    }

    /// Waits until nothing is left. Returns the checksums.
    pub(crate) async fn finish(mut self) -> Vec<u64> {
        (&mut self.thread).await.expect("a copy does not panic");
        self.shared.copying().take().expect("only a drop stops it").into_sums()
    }
}

impl Drop for Aside {
    fn drop(&mut self) {
        // The flag first: the thread would be quicker to lock again than this one to wake up.
        self.shared.stopped.store(true, Ordering::Release);
        // Waits for the slice that is under way, which waits for nothing.
        self.shared.copying().take();
    }
}
