//! A pool of threads that run one job together: fork, parts, join. Waiting spins for some 20 µs and then
//! parks, because a pool that only spins collapses on a machine shared with others.
//!
//! A pool that is as wide as the processors it may use pins its own threads, one to each but the first, which is left
//! to the caller. A narrower one does not: two workers on one machine would pin themselves to the same processors.

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
        let allowed = processors::allowed();
        for part in 1..threads {
            let shared = pool.shared.clone();
            let own = (allowed.len() == threads).then(|| allowed[part]);
            let worker = std::thread::Builder::new().name(format!("tandem-cpu-{part}")).spawn(move || {
                if let Some(own) = own {
                    processors::pin(own);
                }
                shared.work(part);
            })?;
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

#[cfg(target_os = "linux")]
mod processors {
    /// The processors that this thread may run on, in order; none where the system does not say.
    pub(super) fn allowed() -> Vec<usize> {
        // SAFETY: a set of bits; all zero is the empty one.
        let mut set: libc::cpu_set_t = unsafe { std::mem::zeroed() };
        // SAFETY: 0 is the calling thread, and the set is as long as that.
        let status = unsafe { libc::sched_getaffinity(0, size_of_val(&set), &raw mut set) };
        if status != 0 {
            return Vec::new();
        }
        // SAFETY: the index is below the set's size.
        (0..libc::CPU_SETSIZE as usize).filter(|at| unsafe { libc::CPU_ISSET(*at, &set) }).collect()
    }

    /// Keeps the calling thread on one processor. Only its speed depends on that, so a refusal changes nothing.
    pub(super) fn pin(processor: usize) {
        // SAFETY: as in `allowed`; the processor came from there.
        unsafe {
            let mut set: libc::cpu_set_t = std::mem::zeroed();
            libc::CPU_SET(processor, &mut set);
            libc::sched_setaffinity(0, size_of_val(&set), &raw const set);
        }
    }
}

#[cfg(not(target_os = "linux"))]
mod processors {
    pub(super) fn allowed() -> Vec<usize> {
        Vec::new()
    }

    pub(super) fn pin(_: usize) {}
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

    #[cfg(target_os = "linux")]
    #[test]
    fn only_a_pool_as_wide_as_its_processors_pins_its_threads_each_to_one_of_its_own() {
        let allowed = processors::allowed();
        assert!(!allowed.is_empty());
        for threads in [allowed.len(), allowed.len() + 1] {
            let mut pool = Pool::new(threads).unwrap();
            let seen: Vec<std::sync::Mutex<Vec<usize>>> = (0..threads).map(|_| Default::default()).collect();
            pool.run(&|part| *seen[part].lock().unwrap() = processors::allowed());
            let seen: Vec<Vec<usize>> = seen.into_iter().map(|seen| seen.into_inner().unwrap()).collect();
            assert_eq!(seen[0], allowed, "the caller stays free");
            for (part, seen) in seen.iter().enumerate().skip(1) {
                let own = if threads == allowed.len() { vec![allowed[part]] } else { allowed.clone() };
                assert_eq!(*seen, own, "part {part} of {threads}");
            }
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
