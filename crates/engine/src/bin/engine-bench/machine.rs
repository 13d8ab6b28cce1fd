//! Clocks, and the limits of the machine.

use std::time::Duration;

use tandem_kernels::{Isa, limits};
use tandem_memory::Region;

/// Read per thread: several times any cache's size.
const READ_BYTES: usize = 256 << 20;
/// For how long products are counted.
const PRODUCTS_FOR: Duration = Duration::from_millis(200);

/// Seconds by the wall, and of CPU time of the whole process.
#[derive(Clone, Copy)]
pub(crate) struct Took {
    pub(crate) wall: f64,
    pub(crate) cpu: f64,
}

impl Took {
    /// What `work` takes.
    pub(crate) fn of<T>(work: impl FnOnce() -> T) -> (T, Took) {
        let [wall, cpu] = [libc::CLOCK_MONOTONIC, libc::CLOCK_PROCESS_CPUTIME_ID].map(seconds);
        let result = work();
        let took = Took {
            wall: seconds(libc::CLOCK_MONOTONIC) - wall,
            cpu: seconds(libc::CLOCK_PROCESS_CPUTIME_ID) - cpu,
        };
        (result, took)
    }
}

fn seconds(clock: libc::clockid_t) -> f64 {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the clock exists on every Linux, and `time` is ours.
    let status = unsafe { libc::clock_gettime(clock, &mut time) };
    assert_eq!(status, 0, "these clocks cannot fail");
    time.tv_sec as f64 + time.tv_nsec as f64 * 1e-9
}

/// What all threads together can do, by their CPU time.
pub(crate) struct Limits {
    /// Bytes read from memory a second.
    pub(crate) bytes: f64,
    /// Multiplications and additions a second, of what bf16 is multiplied as.
    pub(crate) products: f64,
    /// The same of 8-bit integers.
    pub(crate) whole: f64,
}

impl Limits {
    pub(crate) fn measure(threads: usize, isa: Isa) -> Result<Limits, String> {
        let regions: Vec<Region> = (0..threads)
            .map(|_| Region::anonymous(READ_BYTES))
            .collect::<Result<_, _>>()
            .map_err(|error| format!("memory to read: {error}"))?;
        for region in &regions {
            // SAFETY: the region is ours alone and as long as that.
            unsafe { std::ptr::write_bytes(region.as_ptr(), 1, region.len()) };
        }
        let bytes = together(&regions, |region| {
            // SAFETY: as above; nothing writes it now.
            let bytes = unsafe { std::slice::from_raw_parts(region.as_ptr(), region.len()) };
            let begin = seconds(libc::CLOCK_THREAD_CPUTIME_ID);
            for _ in 0..4 {
                std::hint::black_box(limits::read(bytes));
            }
            4.0 * READ_BYTES as f64 / (seconds(libc::CLOCK_THREAD_CPUTIME_ID) - begin)
        });
        let count = |work: fn(Isa, u64) -> u64| {
            together(&vec![(); threads], |()| {
                let begin = seconds(libc::CLOCK_THREAD_CPUTIME_ID);
                let (mut done, mut took) = (0, 0.0);
                while took < PRODUCTS_FOR.as_secs_f64() {
                    done += work(isa, 100_000);
                    took = seconds(libc::CLOCK_THREAD_CPUTIME_ID) - begin;
                }
                done as f64 / took
            })
        };
        let (products, whole) = (count(limits::products), count(limits::whole_products));
        Ok(Limits { bytes, products, whole })
    }

    /// Several measurements as text.
    pub(crate) fn spread(limits: &[Limits]) -> String {
        format!(
            "memory {} GB/s read, products {} GFLOP/s, of 8-bit integers {} Gop/s",
            super::spread(limits.iter().map(|limits| limits.bytes / 1e9).collect(), 1),
            super::spread(limits.iter().map(|limits| limits.products / 1e9).collect(), 0),
            super::spread(limits.iter().map(|limits| limits.whole / 1e9).collect(), 0),
        )
    }
}

/// The sum of what threads reach at the same time, one for each item.
fn together<T: Sync>(items: &[T], work: impl Fn(&T) -> f64 + Sync) -> f64 {
    std::thread::scope(|scope| {
        let threads: Vec<_> = items.iter().map(|item| scope.spawn(|| work(item))).collect();
        threads.into_iter().map(|thread| thread.join().expect("a measurement does not panic")).sum()
    })
}
