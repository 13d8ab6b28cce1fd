//! Between processes and machines: pure Rust over TCP, enforced by the owner.
//!
//! A request is one header and one list for a whole batch of ranges; the bytes are written straight from the
//! region, and a pull reads them straight into its own, taking checksums while they are in the cache. A lane
//! whose pull did not end well is closed, and with the socket goes everything that could still write.
//!
//! A lane is as in `wire`, its answers as in `outgoing`: after a good one come the bytes of all ranges in order.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_trait::async_trait;
use tandem_chassis::{Tasks, seam};
use tandem_memory::Region;
use tandem_types::{Export, Incarnation, Time};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, watch};

use crate::checksum::Sum;
use crate::tls::Tls;
use crate::wire::{self, DENIED, GOOD, INVALID, Name, RANGES_MAX, Request, STALL_MAX, limited};
use crate::{Completion, Error, Exported, Gate, Peer, Pull, PullError, Transport, check};

mod outgoing;
mod socket;

use outgoing::{LINE, Outgoing, PARTS_MAX, head, tail};
pub(crate) use socket::Socket;

pub(crate) const NAME: &str = "tcp";

const MAGIC: &wire::Magic = b"TKV2";
/// Connections an owner serves at once.
const CONNECTIONS_MAX: usize = 256;
/// Pulls a peer has under way at once, each on a lane of its own; more wait.
const LANES: usize = 4;
/// A pull reads so much, and then others get their turn.
const TURN_BYTES: usize = 1 << 20;
/// A lane without requests is closed by the owner after this.
const IDLE_MAX: Duration = Duration::from_secs(120);

/// Bytes over TCP, and with TLS over nothing else.
#[derive(Clone, Default)]
pub(crate) struct Tcp {
    pub(crate) tls: Option<Tls>,
}

#[async_trait]
impl Transport for Tcp {
    fn name(&self) -> &'static str {
        NAME
    }

    async fn export(
        &self,
        region: Arc<Region>,
        gate: Arc<dyn Gate>,
        incarnation: Incarnation,
        bind: IpAddr,
    ) -> Result<Exported, Error> {
        let failed = |error: io::Error| Error::Unreachable { transport: NAME, reason: error.to_string() };
        let listener = seam::listen_tcp(SocketAddr::new(bind, 0)).await.map_err(failed)?;
        let mut address = listener.local_addr().map_err(failed)?;
        if address.ip().is_unspecified() {
            // No address, but it does on this host; `Exported::advertise` says better where that matters.
            address.set_ip(match address.ip() {
                IpAddr::V4(_) => Ipv4Addr::LOCALHOST.into(),
                IpAddr::V6(_) => Ipv6Addr::LOCALHOST.into(),
            });
        }
        let name = Name { incarnation, id: seam::random_u128() };
        let owner =
            Arc::new(Owner { region, gate, name, tls: self.tls.clone(), closed: AtomicBool::new(false) });
        let tasks = Tasks::new();
        tasks.spawn(accept(listener, owner.clone()));
        let serving = Serving { owner, _tasks: tasks };
        Ok(Exported::new(NAME, name.to_bytes().to_vec(), Some(address), Box::new(serving)))
    }

    async fn connect(&self, export: &Export, deadline: Time) -> Result<Arc<dyn Peer>, Error> {
        let malformed = |reason: &str| Error::Malformed { transport: NAME, reason: reason.to_owned() };
        let (name, address) = export.blob.split_first_chunk().ok_or_else(|| malformed("it is too short"))?;
        let address = std::str::from_utf8(address).ok().filter(|text| is_address(text));
        let peer = TcpPeer {
            address: address.ok_or_else(|| malformed("it has no address"))?.to_owned(),
            name: Name::from_bytes(name),
            tls: self.tls.clone(),
            lanes: Mutex::default(),
            permits: Semaphore::new(LANES),
            closed: watch::Sender::new(false),
        };
        let lane = peer.open_lane(deadline).await?;
        peer.keep(lane);
        Ok(Arc::new(peer))
    }
}

fn is_address(text: &str) -> bool {
    text.rsplit_once(':').is_some_and(|(host, port)| !host.is_empty() && port.parse::<u16>().is_ok())
}

// ---------------------------------------------------------------------- the owner

struct Owner {
    region: Arc<Region>,
    gate: Arc<dyn Gate>,
    name: Name,
    tls: Option<Tls>,
    closed: AtomicBool,
}

/// The export: everything ends when this drops.
struct Serving {
    owner: Arc<Owner>,
    _tasks: Tasks,
}

impl Drop for Serving {
    fn drop(&mut self) {
        // Tasks that run on other threads end a little later than they are told to; nothing begins meanwhile.
        self.owner.closed.store(true, Ordering::Release);
    }
}

async fn accept(listener: TcpListener, owner: Arc<Owner>) {
    let connections = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    let tasks = Tasks::new();
    loop {
        let permit = connections.clone().acquire_owned().await.expect("the semaphore is never closed");
        match listener.accept().await {
            Ok((stream, _)) => {
                let owner = owner.clone();
                tasks.spawn(async move {
                    if let Err(error) = owner.serve(stream).await {
                        tracing::debug!(%error, "a lane ended");
                    }
                    drop(permit);
                });
            }
            Err(error) => {
                tracing::warn!(%error, "a lane could not be accepted");
                seam::sleep(Duration::from_millis(50)).await;
            }
        }
    }
}

impl Owner {
    async fn serve(&self, stream: TcpStream) -> io::Result<()> {
        stream.set_nodelay(true)?;
        let mut stream = match &self.tls {
            Some(tls) => limited(STALL_MAX, tls.accept(stream)).await?,
            None => Socket::plain(stream),
        };
        let known = wire::read_hello(&mut stream, MAGIC).await? == self.name;
        self.check_open()?;
        say(&mut stream, &wire::hello_answer(MAGIC, known, &self.region)).await?;
        if !known {
            return Ok(());
        }
        loop {
            let Some(request) = wire::read_request(&mut stream, IDLE_MAX).await? else {
                return say(&mut stream, &head(INVALID)).await;
            };
            limited(request.limit, self.answer(&mut stream, &request)).await?;
        }
    }

    fn check_open(&self) -> io::Result<()> {
        match self.closed.load(Ordering::Acquire) {
            true => Err(io::Error::other("the export has ended")),
            false => Ok(()),
        }
    }

    async fn answer(&self, stream: &mut Socket, request: &Request) -> io::Result<()> {
        let ranges = &request.ranges;
        if !ranges.iter().all(|range| self.region.contains(range.offset, range.len)) {
            return say(stream, &head(INVALID)).await;
        }
        self.check_open()?;
        let Ok(permit) = self.gate.begin(request.claim, ranges) else {
            return say(stream, &head(DENIED)).await;
        };
        let outgoing = Outgoing::new(GOOD, self.region.clone(), ranges, permit);
        outgoing.write(stream).await
    }
}

/// Writes a few bytes.
async fn say(stream: &mut Socket, bytes: &[u8]) -> io::Result<()> {
    stream.write_all(bytes).await?;
    stream.flush().await
}

// ---------------------------------------------------------------------- the puller

struct TcpPeer {
    /// Host and port.
    address: String,
    name: Name,
    tls: Option<Tls>,
    /// Lanes without a pull.
    lanes: Mutex<Vec<Lane>>,
    permits: Semaphore,
    closed: watch::Sender<bool>,
}

struct Lane {
    stream: Socket,
    remote_len: u64,
}

impl TcpPeer {
    async fn open_lane(&self, deadline: Time) -> Result<Lane, Error> {
        let unreachable = |reason: String| Error::Unreachable { transport: NAME, reason };
        let open = async {
            let stream = seam::connect_tcp(&*self.address).await?;
            let host = self.address.rsplit_once(':').map_or("", |(host, _)| host);
            let mut stream = match &self.tls {
                Some(tls) => tls.connect(stream, host).await?,
                None => Socket::plain(stream),
            };
            say(&mut stream, &wire::hello(MAGIC, self.name)).await?;
            let mut answer = [0; wire::ANSWER_BYTES];
            stream.read_exact(&mut answer).await?;
            Ok::<_, io::Error>((stream, answer))
        };
        let opened = seam::timeout(deadline.remaining(seam::now()), open).await;
        let (stream, answer) = opened
            .map_err(|_| unreachable(format!("{} does not answer", self.address)))?
            .map_err(|error| unreachable(format!("{}: {error}", self.address)))?;
        let remote_len = wire::read_hello_answer(NAME, MAGIC, &answer)?;
        Ok(Lane { stream, remote_len })
    }

    fn keep(&self, lane: Lane) {
        let mut lanes = self.lanes.lock().expect("nothing panics under this lock");
        // Under the lock: `close` says so first and clears the lanes then.
        if !*self.closed.borrow() {
            lanes.push(lane);
        }
    }

    fn idle_lane(&self) -> Option<Lane> {
        self.lanes.lock().expect("nothing panics under this lock").pop()
    }

    async fn try_pull(&self, pull: &Pull) -> Result<(u64, Vec<u64>), PullError> {
        let _permit = self.permits.acquire().await.expect("the semaphore is never closed");
        loop {
            let idle = self.idle_lane();
            let fresh = idle.is_none();
            let mut lane = match idle {
                Some(lane) => lane,
                None => {
                    let opened = self.open_lane(pull.deadline).await;
                    opened.map_err(|error| match seam::now() >= pull.deadline {
                        true => PullError::Deadline,
                        false => PullError::PeerGone(error.to_string()),
                    })?
                }
            };
            let bytes = match check(pull, lane.remote_len) {
                Ok(bytes) => bytes,
                Err(error) => {
                    self.keep(lane);
                    return Err(error);
                }
            };
            // A lane that does not come to its end here is dropped: its socket is closed with the future.
            match lane.pull(pull).await {
                Ok(Answer::Good(sums)) => {
                    self.keep(lane);
                    return Ok((bytes, sums));
                }
                Ok(Answer::Denied) => {
                    self.keep(lane);
                    return Err(PullError::Denied);
                }
                Ok(Answer::Invalid) => {
                    return Err(PullError::Invalid("the owner does not accept the ranges".into()));
                }
                // Its owner may have closed an idle lane meanwhile: then a fresh one decides.
                Err(_) if !fresh => {}
                Err(error) => return Err(PullError::PeerGone(error.to_string())),
            }
        }
    }
}

enum Answer {
    /// With the checksums.
    Good(Vec<u64>),
    Denied,
    Invalid,
}

impl Lane {
    /// Brings everything, in as many requests as it takes.
    async fn pull(&mut self, pull: &Pull) -> io::Result<Answer> {
        let mut sums = Vec::new();
        for batch in 0..pull.remote.len().div_ceil(RANGES_MAX).max(1) {
            let begin = batch * RANGES_MAX;
            let end = pull.remote.len().min(begin + RANGES_MAX);
            let ranges = &pull.remote[begin..end];
            say(&mut self.stream, &wire::request(pull.claim, ranges, pull.deadline)).await?;
            let mut line = [0; LINE];
            self.stream.read_exact(&mut line).await?;
            match line[0] {
                GOOD => {}
                DENIED => return Ok(Answer::Denied),
                _ => return Ok(Answer::Invalid),
            }
            let places = ranges.iter().zip(&pull.local_offsets[begin..end]);
            // SAFETY: the caller of `pull` owns these bytes until the completion or the drop of the pull, and this
            // future, which alone writes to them, ends with either. The places are inside the region and apart, as
            // checked.
            let places = places
                .map(|(range, &local)| unsafe { pull.local.slice_mut(local as usize, range.len as usize) });
            let mut filling = Filling::new(places.collect(), pull.checksums);
            filling.read_all(&mut self.stream).await?;
            sums.extend(filling.sums);
            let bytes: u64 = ranges.iter().map(|range| range.len).sum();
            self.stream.read_exact(&mut line[..tail(bytes)]).await?;
        }
        Ok(Answer::Good(sums))
    }
}

/// Places that are filled one after the other.
struct Filling<'a> {
    places: Vec<&'a mut [u8]>,
    /// The place whose turn it is, and how much of it is filled. A full one's turn is over.
    place: usize,
    filled: usize,
    /// Bytes to come.
    rest: usize,
    sum: Sum,
    summed: bool,
    sums: Vec<u64>,
}

impl<'a> Filling<'a> {
    fn new(places: Vec<&'a mut [u8]>, summed: bool) -> Filling<'a> {
        let sum = Sum::new(places.first().map_or(0, |place| place.len()));
        let rest = places.iter().map(|place| place.len()).sum();
        let mut filling = Filling { places, place: 0, filled: 0, rest, sum, summed, sums: Vec::new() };
        filling.take(0);
        filling
    }

    /// So many bytes have come.
    fn take(&mut self, mut bytes: usize) {
        self.rest -= bytes;
        while let Some(place) = self.places.get(self.place) {
            let more = bytes.min(place.len() - self.filled);
            self.filled += more;
            bytes -= more;
            if self.summed {
                self.sum.advance(&place[..self.filled]);
            }
            if self.filled < place.len() {
                return;
            }
            let next = Sum::new(self.places.get(self.place + 1).map_or(0, |place| place.len()));
            let sum = std::mem::replace(&mut self.sum, next);
            if self.summed {
                self.sums.push(sum.finish(place));
            }
            self.place += 1;
            self.filled = 0;
        }
    }

    /// Fills all places, as many per system call as it takes.
    async fn read_all(&mut self, stream: &mut Socket) -> io::Result<()> {
        let mut turn = 0;
        while self.place < self.places.len() {
            if turn >= TURN_BYTES {
                // A peer that is always faster than we must not keep others from this thread.
                tokio::task::yield_now().await;
                turn = 0;
            }
            let places = self.places[self.place..].iter_mut().filter(|place| !place.is_empty());
            let mut slices: Vec<io::IoSliceMut<'_>> =
                places.take(PARTS_MAX).map(|place| io::IoSliceMut::new(place)).collect();
            slices[0].advance(self.filled);
            let read = stream.read_vectored(&mut slices, self.rest).await?;
            if read == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            turn += read;
            self.take(read);
        }
        stream.rest()
    }
}

#[async_trait]
impl Peer for TcpPeer {
    async fn pull(&self, pull: Pull) -> Completion {
        let mut closed = self.closed.subscribe();
        let left = pull.deadline.remaining(seam::now());
        let done = if left.is_zero() {
            Err(PullError::Deadline)
        } else {
            tokio::select! {
                biased;
                _ = closed.wait_for(|closed| *closed) => Err(PullError::PeerGone("closed here".into())),
                done = seam::timeout(left, self.try_pull(&pull)) => done.unwrap_or(Err(PullError::Deadline)),
            }
        };
        // What was not brought to its end is dropped by now, and its socket with it.
        Completion::stopped(done)
    }

    fn close(&self) {
        self.closed.send_replace(true);
        self.lanes.lock().expect("nothing panics under this lock").clear();
    }
}

#[cfg(test)]
mod tests;
