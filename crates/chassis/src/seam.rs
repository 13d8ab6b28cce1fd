//! The one door to clock, tasks, threads, sockets and randomness.
//!
//! Whole clusters are to be simulated in virtual time with the real code, so nothing else in the workspace
//! calls these directly; `clippy.toml` holds the list. Inside a paused tokio runtime the clock here is the
//! paused one.
#![allow(clippy::disallowed_methods)]

use std::cell::RefCell;
use std::future::Future;
use std::io;
use std::sync::OnceLock;
use std::thread::JoinHandle;
use std::time::Duration;

use tandem_types::Time;
use tokio::net::{TcpListener, TcpStream, ToSocketAddrs, UnixListener, UnixStream};
use tokio::time::{Instant, MissedTickBehavior};

mod net;
mod simulation;

pub use net::{Listener, Stream};
pub use simulation::{Simulation, simulated};
pub use tokio::time::error::Elapsed;

/// Further away than any process lives; tokio's timer wheel ends soon after.
const FAR: Duration = Duration::from_secs(60 * 60 * 24 * 365);

/// Real time on which [`now`] is ahead of zero when first asked.
const HEAD_START: Duration = Duration::from_secs(60 * 60);

/// The moment that [`now`] calls zero. An hour before it was first asked for, because a paused runtime's clock
/// stands at the moment that runtime was built, which may be earlier than the first question.
fn origin() -> Instant {
    static ORIGIN: OnceLock<Instant> = OnceLock::new();
    *ORIGIN.get_or_init(|| {
        let real = std::time::Instant::now();
        real.checked_sub(HEAD_START).unwrap_or(real).into()
    })
}

/// Monotonic time of this process. Its zero lies before everything the process does.
pub fn now() -> Time {
    Time::ZERO + Instant::now().saturating_duration_since(origin())
}

/// Wall-clock time since 1970, for what leaves the process (logs, `created` fields); never for deadlines.
pub fn unix_time() -> Duration {
    std::time::SystemTime::UNIX_EPOCH.elapsed().unwrap_or_default()
}

/// Waits for `duration`.
pub async fn sleep(duration: Duration) {
    tokio::time::sleep(duration.min(FAR)).await;
}

/// Waits until the clock of [`now`] shows `time`; returns at once if it already does.
pub async fn sleep_until(time: Time) {
    let left = time.remaining(now());
    if !left.is_zero() {
        sleep(left).await;
    }
}

/// Runs `future` for at most `limit`; when the limit passes first, the future is dropped.
pub async fn timeout<F: Future>(limit: Duration, future: F) -> Result<F::Output, Elapsed> {
    tokio::time::timeout(limit.min(FAR), future).await
}

/// A steady beat; made by [`interval`].
#[derive(Debug)]
pub struct Interval(tokio::time::Interval);

impl Interval {
    /// Waits for the next beat. Beats missed in the meantime are skipped, not made up for.
    pub async fn tick(&mut self) {
        self.0.tick().await;
    }

    /// Starts over: the next beat comes one whole period from now.
    pub fn reset(&mut self) {
        self.0.reset();
    }
}

/// Beats every `period` (at least a millisecond); the first beat comes at once.
pub fn interval(period: Duration) -> Interval {
    let mut interval = tokio::time::interval(period.clamp(Duration::from_millis(1), FAR));
    interval.set_missed_tick_behavior(MissedTickBehavior::Skip);
    Interval(interval)
}

/// Spawns a task on the current runtime. The caller keeps the handle and waits for it, or uses
/// [`Tasks`](crate::Tasks), which does.
pub fn spawn<F>(future: F) -> tokio::task::JoinHandle<F::Output>
where
    F: Future + Send + 'static,
    F::Output: Send + 'static,
{
    tokio::spawn(future)
}

/// Starts a named thread. Panics only when the system refuses a thread at all.
pub fn thread(name: &str, run: impl FnOnce() + Send + 'static) -> JoinHandle<()> {
    std::thread::Builder::new()
        .name(name.to_owned())
        .spawn(run)
        .expect("the system gives this process a thread")
}

/// Listens on `address`; port 0 takes any free port. In a simulated world that is a port of this world.
pub async fn listen(address: impl ToSocketAddrs) -> io::Result<Listener> {
    if simulated() {
        return simulation::listen(net::one_of(address).await?);
    }
    Ok(listen_tcp(address).await?.into())
}

/// Connects to `address` without Nagle's delay. Without a deadline of its own: wrap it in [`timeout`].
pub async fn connect(address: impl ToSocketAddrs) -> io::Result<Stream> {
    if simulated() {
        return simulation::connect(net::one_of(address).await?);
    }
    Ok(connect_tcp(address).await?.into())
}

/// Listens on a real socket, for those who need the socket itself: transports of bytes.
pub async fn listen_tcp(address: impl ToSocketAddrs) -> io::Result<TcpListener> {
    TcpListener::bind(address).await
}

/// Connects a real socket, as [`listen_tcp`] listens.
pub async fn connect_tcp(address: impl ToSocketAddrs) -> io::Result<TcpStream> {
    let stream = TcpStream::connect(address).await?;
    stream.set_nodelay(true)?;
    Ok(stream)
}

/// Listens for connections within this host, under a name that no file stands for: it is free again when its
/// owner is gone, however that went.
pub fn listen_local(name: &str) -> io::Result<UnixListener> {
    UnixListener::bind(format!("\0{name}"))
}

/// Connects to a name of [`listen_local`].
pub async fn connect_local(name: &str) -> io::Result<UnixStream> {
    UnixStream::connect(format!("\0{name}")).await
}

/// 64 random bits from the operating system; in a simulated world, from its seed.
pub fn random_u64() -> u64 {
    random_u128() as u64
}

/// 128 random bits from the operating system, for ids that must never meet; in a simulated world, from its seed.
pub fn random_u128() -> u128 {
    // A system call for each would be a hundredth of what a request costs a router.
    thread_local!(static DRAWN: RefCell<Vec<u128>> = const { RefCell::new(Vec::new()) });
    simulation::random().unwrap_or_else(|| {
        DRAWN.with_borrow_mut(|drawn| {
            drawn.pop().unwrap_or_else(|| {
                let bytes = random_bytes::<256>();
                let (first, rest) = bytes.as_chunks().0.split_first().expect("there are 16");
                drawn.extend(rest.iter().map(|bytes| u128::from_ne_bytes(*bytes)));
                u128::from_ne_bytes(*first)
            })
        })
    })
}

fn random_bytes<const N: usize>() -> [u8; N] {
    const { assert!(N <= 256, "getrandom fills up to 256 bytes in one piece") };
    let mut bytes = [0u8; N];
    loop {
        // SAFETY: the pointer and the length describe `bytes`, which lives on this stack and is written by
        // nobody else.
        let filled = unsafe { libc::getrandom(bytes.as_mut_ptr().cast(), N, 0) };
        if filled == N as isize {
            return bytes;
        }
        let error = io::Error::last_os_error();
        // Only before the kernel's pool is first filled can a signal interrupt the call.
        assert!(error.kind() == io::ErrorKind::Interrupted, "the system gives random bytes: {error}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn time_follows_the_paused_clock() {
        let before = now();
        sleep(Duration::from_secs(3600)).await;
        assert_eq!(now().since(before).as_secs(), 3600);
        sleep_until(before).await;
        sleep_until(now() + Duration::from_secs(5)).await;
        assert_eq!(now().since(before).as_secs(), 3605);
    }

    #[tokio::test(start_paused = true)]
    async fn waiting_for_the_end_of_time_can_be_limited() {
        assert!(timeout(Duration::from_secs(60), sleep_until(Time::MAX)).await.is_err());
        assert_eq!(timeout(Duration::MAX, async { 7 }).await, Ok(7));
    }

    #[tokio::test(start_paused = true)]
    async fn missed_beats_are_skipped() {
        let start = now();
        let mut beat = interval(Duration::from_millis(200));
        beat.tick().await;
        sleep(Duration::from_millis(950)).await;
        beat.tick().await;
        assert_eq!(now().since(start).as_millis(), 950);
        beat.tick().await;
        assert_eq!(now().since(start).as_millis(), 1000);
    }

    #[test]
    fn time_only_rises_outside_a_runtime() {
        let mut last = now();
        for _ in 0..1000 {
            let next = now();
            assert!(next >= last);
            last = next;
        }
    }

    #[test]
    fn random_numbers_differ() {
        let many: std::collections::HashSet<u128> = (0..1000).map(|_| random_u128()).collect();
        assert_eq!(many.len(), 1000);
        assert_ne!(random_u64(), random_u64());
    }

    #[tokio::test]
    async fn a_connection_has_no_delay() {
        let listener = listen_tcp("127.0.0.1:0").await.unwrap();
        let stream = connect_tcp(listener.local_addr().unwrap()).await.unwrap();
        assert!(stream.nodelay().unwrap());
    }

    #[tokio::test]
    async fn a_local_name_is_free_again_when_its_owner_is_gone() {
        let name = format!("tandem-seam-{:x}", random_u64());
        assert!(connect_local(&name).await.is_err());
        let listener = listen_local(&name).unwrap();
        connect_local(&name).await.unwrap();
        assert!(listen_local(&name).is_err());
        drop(listener);
        listen_local(&name).unwrap();
    }

    #[test]
    fn a_thread_carries_its_name() {
        let (send, receive) = std::sync::mpsc::channel();
        thread("step-loop", move || {
            send.send(std::thread::current().name().map(str::to_owned)).unwrap();
        })
        .join()
        .unwrap();
        assert_eq!(receive.recv().unwrap().as_deref(), Some("step-loop"));
    }
}
