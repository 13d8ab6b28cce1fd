//! Memory that is free goes back to the system once the router has little to do.
//!
//! The allocator keeps what a thread has freed for what that thread asks for next, and looks at it again only then. A
//! router that has started, or that had ten thousand connections, would hold on to all of that while nothing happens.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;

use tandem_chassis::{Shutdown, seam};
use tokio::runtime::Handle;

/// How often the threads are asked for what they have freed, while there is little to do.
const PERIOD: Duration = Duration::from_secs(2);
/// Threads that run out of work more often than this in a period have much to do: each event is such a time.
const TURNS_QUIET: u64 = 2000;
/// How long a thread waits for the others.
const MEETING_MAX: Duration = Duration::from_millis(2);

/// How often a thread ran out of work.
static TURNS: AtomicU64 = AtomicU64::new(0);

/// A thread of the runtime has run out of work.
pub(crate) fn parked() {
    TURNS.fetch_add(1, Ordering::Relaxed);
}

/// Gives the system what this thread holds and does not use.
pub(crate) fn give_back() {
    // SAFETY: without arguments that could be wrong; it touches the allocator's own state only.
    unsafe { libmimalloc_sys::mi_collect(true) }
}

/// Has all threads give back now and then, while there is little to do.
pub(crate) async fn watch(shutdown: Shutdown) {
    let mut ticks = seam::interval(PERIOD);
    let mut before = 0;
    loop {
        tokio::select! {
            () = ticks.tick() => {}
            () = shutdown.stopped() => return,
        }
        let turns = TURNS.load(Ordering::Relaxed);
        if turns - before < TURNS_QUIET {
            everywhere();
        }
        before = turns;
    }
}

/// A task for each thread. Each keeps its thread until the others have theirs, or one thread would run them all; if
/// another is busy meanwhile, that one is not quiet anyway.
fn everywhere() {
    let threads = Handle::current().metrics().num_workers();
    let meeting = Arc::new((Mutex::new(0), Condvar::new()));
    for _ in 0..threads {
        let meeting = meeting.clone();
        drop(seam::spawn(async move {
            give_back();
            let (here, all_here) = &*meeting;
            let mut here = here.lock().expect("nothing panics under this lock");
            *here += 1;
            all_here.notify_all();
            drop(all_here.wait_timeout_while(here, MEETING_MAX, |here| *here < threads));
        }));
    }
}
