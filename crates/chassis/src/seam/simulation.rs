//! A simulated world: the network and the randomness of a cluster that runs in virtual time.
//!
//! The world belongs to a thread, because the runtime of a simulation does: several tests simulate side by side,
//! and none sees another's ports, draws or faults.

use std::cell::RefCell;
use std::collections::HashMap;
use std::io;
use std::marker::PhantomData;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicUsize, Ordering};

use tokio::io::DuplexStream;
use tokio::sync::{Mutex, mpsc};

use super::net::{Listener, Stream};

/// Bytes that a simulated connection holds for a reader that does not read.
const CONNECTION_BYTES: usize = 64 << 10;
/// The first port given to whoever wants any.
const FIRST_FREE_PORT: u16 = 10_000;

/// Worlds of this process. While there is none, which is always so in production, nobody looks for one.
static WORLDS: AtomicUsize = AtomicUsize::new(0);

thread_local! {
    static WORLD: RefCell<Option<World>> = const { RefCell::new(None) };
}

struct World {
    ports: HashMap<u16, mpsc::UnboundedSender<DuplexStream>>,
    next_port: u16,
    random: u64,
}

/// The world of this thread, until it is dropped. Run a current-thread runtime with paused time in it.
#[derive(Debug)]
pub struct Simulation {
    /// It stays on its thread.
    here: PhantomData<*const ()>,
}

impl Simulation {
    /// Begins a world in which all randomness comes from `seed`.
    ///
    /// # Panics
    /// If this thread has one.
    pub fn begin(seed: u64) -> Simulation {
        let world = World { ports: HashMap::new(), next_port: FIRST_FREE_PORT, random: seed };
        let before = WORLD.replace(Some(world));
        assert!(before.is_none(), "a thread has one simulated world");
        WORLDS.fetch_add(1, Ordering::Relaxed);
        Simulation { here: PhantomData }
    }
}

impl Drop for Simulation {
    fn drop(&mut self) {
        WORLDS.fetch_sub(1, Ordering::Relaxed);
        WORLD.take();
    }
}

/// Whether this thread is in a simulated world.
pub fn simulated() -> bool {
    in_world(|_| ()).is_some()
}

fn in_world<T>(look: impl FnOnce(&mut World) -> T) -> Option<T> {
    if WORLDS.load(Ordering::Relaxed) == 0 {
        return None;
    }
    WORLD.with_borrow_mut(|world| world.as_mut().map(look))
}

pub(super) fn random() -> Option<u128> {
    in_world(|world| u128::from(world.draw()) << 64 | u128::from(world.draw()))
}

impl World {
    /// SplitMix64.
    fn draw(&mut self) -> u64 {
        self.random = self.random.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut x = self.random;
        x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        x ^ (x >> 31)
    }
}

/// A port of this world that somebody listens on; free again when it drops.
#[derive(Debug)]
pub(super) struct Port {
    address: SocketAddr,
    incoming: Mutex<mpsc::UnboundedReceiver<DuplexStream>>,
}

impl Port {
    pub(super) async fn accept(&self) -> DuplexStream {
        match self.incoming.lock().await.recv().await {
            Some(stream) => stream,
            // Its world has ended.
            None => std::future::pending().await,
        }
    }

    pub(super) fn address(&self) -> SocketAddr {
        self.address
    }
}

impl Drop for Port {
    fn drop(&mut self) {
        in_world(|world| world.ports.remove(&self.address.port()));
    }
}

pub(super) fn listen(mut address: SocketAddr) -> io::Result<Listener> {
    let taken = || io::Error::new(io::ErrorKind::AddrInUse, "somebody listens there in this world");
    let listening = in_world(|world| {
        if address.port() == 0 {
            address.set_port(world.next_port);
            world.next_port += 1;
        }
        let (send, incoming) = mpsc::unbounded_channel();
        match world.ports.insert(address.port(), send) {
            None => Ok(Listener::simulated(Port { address, incoming: Mutex::new(incoming) })),
            Some(before) => {
                world.ports.insert(address.port(), before);
                Err(taken())
            }
        }
    });
    listening.expect("callers are in a world")
}

pub(super) fn connect(address: SocketAddr) -> io::Result<Stream> {
    let (ours, theirs) = tokio::io::duplex(CONNECTION_BYTES);
    let reached = in_world(|world| {
        let port = world.ports.get(&address.port());
        port.is_some_and(|port| port.send(theirs).is_ok())
    });
    match reached {
        Some(true) => Ok(Stream::Simulated(ours)),
        _ => {
            Err(io::Error::new(io::ErrorKind::ConnectionRefused, "connection refused: nobody listens there"))
        }
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::super::{connect, listen, random_u128};
    use super::*;

    fn run(seed: u64, test: impl Future<Output = ()>) {
        let _world = Simulation::begin(seed);
        let runtime = tokio::runtime::Builder::new_current_thread().start_paused(true).enable_all().build();
        runtime.unwrap().block_on(test);
    }

    #[test]
    fn a_connection_carries_bytes_and_its_port_is_free_afterwards() {
        run(1, async {
            let listener = listen("127.0.0.1:0").await.unwrap();
            let address = listener.local_addr().unwrap();
            assert!(listen(address).await.is_err(), "the port is taken");
            let mut client = connect(address).await.unwrap();
            let mut server = listener.accept().await.unwrap();
            client.write_all(b"ping").await.unwrap();
            let mut read = [0; 4];
            server.read_exact(&mut read).await.unwrap();
            assert_eq!(&read, b"ping");
            drop(listener);
            assert!(connect(address).await.is_err_and(|e| e.to_string().contains("refused")));
            assert!(listen(address).await.is_ok());
        });
    }

    #[test]
    fn a_seed_gives_the_same_draws_every_time_and_a_world_ends_with_its_guard() {
        let draws = |seed| {
            let _world = Simulation::begin(seed);
            [random_u128(), random_u128()]
        };
        assert_eq!(draws(7), draws(7));
        assert_ne!(draws(7), draws(8));
        assert!(!simulated());
        assert_ne!(random_u128(), draws(7)[0]);
    }
}
