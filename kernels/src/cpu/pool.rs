//! A pool of threads that run one job together: fork, fixed parts, join. Waiting spins for some 20 µs and then
//! parks, because a pool that only spins collapses on a machine shared with others.

use std::any::Any;
use std::cell::UnsafeCell;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::thread::{JoinHandle, Thread};

/// Turns of `spin_loop` before parking: each takes 15 to 45 ns on the machines of today.
const SPINS: u32 = 600;

type Job = *const (dyn Fn(usize) + Sync);

/// The caller of [`Pool::run`] and `threads - 1` threads of the pool's own. Dropping it ends them.
pub(crate) struct Pool {
    shared: Arc<Shared>,
    workers: Vec<JoinHandle<()>>,
}

struct Shared {
    /// Counts jobs; a worker that sees it rise runs its part of the new one. `u64::MAX` ends it.
    generation: AtomicU64,
    job: UnsafeCell<Option<Job>>,
    /// Workers that have not finished the current job.
    running: AtomicUsize,
    panic: std::sync::Mutex<Option<Box<dyn Any + Send>>>,
    caller: std::sync::Mutex<Option<Thread>>,
    caller_parked: AtomicBool,
    worker_parked: Vec<AtomicBool>,
}

// SAFETY: `job` is written by the caller while no worker runs (`running` is 0) and read by workers only after the
// generation, stored after it, has risen.
unsafe impl Send for Shared {}
// SAFETY: as above.
unsafe impl Sync for Shared {}

impl Pool {
    /// A pool of `threads`, the caller's included.
    pub(crate) fn new(threads: usize) -> std::io::Result<Pool> {
        assert!(threads > 0, "a pool has at least its caller");
        let shared = Arc::new(Shared {
            generation: AtomicU64::new(0),
            job: UnsafeCell::new(None),
            running: AtomicUsize::new(0),
            panic: std::sync::Mutex::new(None),
            caller: std::sync::Mutex::new(None),
            caller_parked: AtomicBool::new(false),
            worker_parked: (1..threads).map(|_| AtomicBool::new(false)).collect(),
        });
        let mut pool = Pool { shared, workers: Vec::new() };
        for part in 1..threads {
            let shared = pool.shared.clone();
            let worker = std::thread::Builder::new()
                .name(format!("tandem-cpu-{part}"))
                .spawn(move || shared.work(part))?;
            pool.workers.push(worker);
        }
        Ok(pool)
    }

    /// How many parts a job has.
    pub(crate) fn threads(&self) -> usize {
        self.workers.len() + 1
    }

    /// Runs `job(0)` here and `job(1..threads)` on the other threads; returns when all are done.
    ///
    /// # Panics
    /// If a part does, after all parts have ended.
    pub(crate) fn run(&mut self, job: &(dyn Fn(usize) + Sync)) {
        if self.workers.is_empty() {
            return job(0);
        }
        let shared = &*self.shared;
        let job_pointer: *const (dyn Fn(usize) + Sync + '_) = job;
        // SAFETY: only the lifetime changes: this function does not return before every worker has finished the
        // job, so the reference outlives its uses. No worker reads the cell now: `run` has the pool exclusively
        // and the last one returned with `running` at 0.
        unsafe {
            *shared.job.get() =
                Some(std::mem::transmute::<*const (dyn Fn(usize) + Sync + '_), Job>(job_pointer))
        };
        *shared.caller.lock().expect("no holder panics") = Some(std::thread::current());
        shared.running.store(self.workers.len(), Ordering::SeqCst);
        shared.generation.fetch_add(1, Ordering::SeqCst);
        self.wake();
        let own = catch_unwind(AssertUnwindSafe(|| job(0)));
        wait(&shared.caller_parked, || shared.running.load(Ordering::SeqCst) == 0);
        let theirs = shared.panic.lock().expect("no holder panics").take();
        if let Err(panic) = own {
            std::panic::resume_unwind(panic);
        }
        if let Some(panic) = theirs {
            std::panic::resume_unwind(panic);
        }
    }

    fn wake(&self) {
        for (worker, parked) in self.workers.iter().zip(&self.shared.worker_parked) {
            if parked.load(Ordering::SeqCst) {
                worker.thread().unpark();
            }
        }
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.generation.store(u64::MAX, Ordering::SeqCst);
        self.wake();
        for worker in self.workers.drain(..) {
            let _ = worker.join();
        }
    }
}

impl Shared {
    fn work(&self, part: usize) {
        let mut seen = 0;
        loop {
            wait(&self.worker_parked[part - 1], || self.generation.load(Ordering::SeqCst) != seen);
            seen = self.generation.load(Ordering::SeqCst);
            if seen == u64::MAX {
                return;
            }
            // SAFETY: the generation rose after the job was written, and the caller waits for `running` before it
            // writes the next or lets the job go.
            let job = unsafe { &*(*self.job.get()).expect("a job precedes its generation") };
            if let Err(panic) = catch_unwind(AssertUnwindSafe(|| job(part))) {
                *self.panic.lock().expect("no holder panics") = Some(panic);
            }
            let last = self.running.fetch_sub(1, Ordering::SeqCst) == 1;
            if last
                && self.caller_parked.load(Ordering::SeqCst)
                && let Some(caller) = &*self.caller.lock().expect("no holder panics")
            {
                caller.unpark();
            }
        }
    }
}

/// Spins, then parks until `done`. The flag is set before the last look at `done`; whoever makes it true looks at
/// the flag afterwards: one of the two sees the other.
fn wait(parked: &AtomicBool, done: impl Fn() -> bool) {
    for _ in 0..SPINS {
        if done() {
            return;
        }
        std::hint::spin_loop();
    }
    parked.store(true, Ordering::SeqCst);
    while !done() {
        std::thread::park();
    }
    parked.store(false, Ordering::SeqCst);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_part_of_every_job_runs_exactly_once() {
        for threads in 1..5 {
            let mut pool = Pool::new(threads).unwrap();
            let counts: Vec<AtomicUsize> = (0..threads).map(|_| AtomicUsize::new(0)).collect();
            for _ in 0..2000 {
                pool.run(&|part| {
                    counts[part].fetch_add(1, Ordering::Relaxed);
                });
            }
            assert!(counts.iter().all(|count| count.load(Ordering::Relaxed) == 2000));
        }
    }

    #[test]
    fn a_panic_in_any_part_reaches_the_caller_and_the_pool_goes_on() {
        let mut pool = Pool::new(3).unwrap();
        for bad in 0..3 {
            let result = catch_unwind(AssertUnwindSafe(|| {
                pool.run(&|part| assert!(part != bad, "part {bad} fails"));
            }));
            let message = *result.unwrap_err().downcast::<String>().unwrap();
            assert_eq!(message, format!("part {bad} fails"));
            let sum = AtomicUsize::new(0);
            pool.run(&|part| {
                sum.fetch_add(part, Ordering::Relaxed);
            });
            assert_eq!(sum.into_inner(), 3);
        }
    }
}
