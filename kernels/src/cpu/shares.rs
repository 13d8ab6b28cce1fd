//! Work that is shared out evenly beforehand, and taken over at the end from whoever is behind.
//!
//! Parts are equal, processors are not: one is slowed down by whoever else wants it or the memory, and all would wait for
//! it at the join. So a part takes the units of its own share from the front, in order, and then those of the others from
//! the back, one by one. Who computes a unit changes no bit of it.

use std::sync::atomic::{AtomicU64, Ordering};

/// The shares of all parts in one job.
pub(super) struct Shares(Vec<Share>);

/// What is taken of a share: from the front in the lower half, from the back in the upper one.
#[derive(Default)]
#[repr(align(128))]
struct Share(AtomicU64);

impl Shares {
    /// Nothing is taken yet.
    pub(super) fn new(parts: usize) -> Shares {
        Shares((0..parts).map(|_| Share::default()).collect())
    }

    /// What part `part` of `parts` does next: whose share it is of, and which unit of that. `size` says how many units a
    /// share has, at every call the same. Nobody else gets this unit.
    #[inline(always)]
    pub(super) fn next(
        &self,
        part: usize,
        parts: usize,
        size: impl Fn(usize) -> usize,
    ) -> Option<(usize, usize)> {
        if let Some(taken) = self.0[part].take(size(part), 1) {
            return Some((part, taken as u32 as usize));
        }
        (1..parts).map(|step| (part + step) % parts).find_map(|whose| {
            let size = size(whose);
            let taken = self.0[whose].take(size, 1 << 32)?;
            Some((whose, size - 1 - (taken >> 32) as usize))
        })
    }
}

impl Share {
    /// Adds `one` to what is taken of `size` units, if one is left; returns what was taken before. Relaxed: it is the
    /// join that orders results.
    #[inline(always)]
    fn take(&self, size: usize, one: u64) -> Option<u64> {
        let left = |taken: u64| (taken >> 32) + u64::from(taken as u32) < size as u64;
        self.0
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |taken| left(taken).then_some(taken + one))
            .ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_unit_is_done_once_whoever_is_slow() {
        let sizes = [5, 0, 3];
        // One part after the other does what it can get, in every order.
        for order in [[0, 1, 2], [2, 1, 0], [1, 0, 2]] {
            let shares = Shares::new(3);
            let mut done = Vec::new();
            for part in order {
                done.extend(shares.next(part, 3, |whose| sizes[whose]));
            }
            for part in order {
                done.extend(std::iter::from_fn(|| shares.next(part, 3, |whose| sizes[whose])));
            }
            done.sort_unstable();
            let all = (0..3).flat_map(|whose| (0..sizes[whose]).map(move |unit| (whose, unit)));
            assert_eq!(done, all.collect::<Vec<_>>(), "{order:?}");
        }
    }

    #[test]
    fn every_unit_is_done_once_by_many_threads() {
        let shares = Shares::new(4);
        let done = std::sync::Mutex::new(Vec::new());
        std::thread::scope(|scope| {
            for part in 0..4 {
                let (shares, done) = (&shares, &done);
                scope.spawn(move || {
                    // Of unequal shares: some are soon done with theirs.
                    let next = || shares.next(part, 4, |whose| 1 << (4 * whose));
                    let own: Vec<_> = std::iter::from_fn(next).collect();
                    done.lock().expect("nothing panics under this lock").extend(own);
                });
            }
        });
        let mut done = done.into_inner().expect("nothing panics under this lock");
        done.sort_unstable();
        let all = (0..4).flat_map(|whose| (0..1 << (4 * whose)).map(move |unit| (whose, unit)));
        assert_eq!(done, all.collect::<Vec<_>>());
    }
}
