//! Between processes and machines: pure Rust over TCP, enforced by the owner.
//!
//! A connection is a *lane*. It begins with a hello of both sides that names the owner's start; then requests
//! and answers alternate. A request is one header and one list for a whole batch of ranges; its answer is a
//! status and, if that is good, all bytes in order, written straight from the region. A pull reads them straight
//! into its own region. A lane whose pull did not end well is closed, and with the socket goes everything that
//! could still write.
//!
//! All integers are big-endian.
//! - hello, both ways: magic `TKV1`, incarnation `u64`, export id `u128`; from the owner also a status byte and
//!   the region's length `u64`
//! - request: claim `u128`, ranges `u32`, milliseconds the puller still waits `u32`, then offset `u64` and
//!   length `u64` of each range
//! - answer: status byte (0 good, 1 denied, 2 invalid), then the bytes

use std::collections::VecDeque;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_trait::async_trait;
use tandem_chassis::{Tasks, seam};
use tandem_memory::Region;
use tandem_types::{ClaimId, Export, Incarnation, Time};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, watch};

use crate::{
    Buffers, ByteRange, Completion, Error, Exported, Gate, Peer, Pull, PullError, Transport, check, sum_up,
};

pub(crate) const NAME: &str = "tcp";

const MAGIC: &[u8; 4] = b"TKV1";
/// Connections an owner serves at once.
const CONNECTIONS_MAX: usize = 256;
/// Pulls a peer has under way at once, each on a lane of its own; more wait.
const LANES: usize = 4;
/// Ranges of one request at most; a pull of more is several requests.
const RANGES_MAX: usize = 1 << 16;
/// A pull reads so much, and then others get their turn.
const TURN_BYTES: usize = 1 << 20;
/// Ranges of one system call at most.
const PARTS_MAX: usize = 256;
/// Time for a hello, and for a puller that reads nothing.
const STALL_MAX: Duration = Duration::from_secs(10);
/// Time for one answer, whatever its puller says, and what a puller may be late in noticing its own deadline.
const ANSWER_MAX: Duration = Duration::from_secs(600);
const GRACE: Duration = Duration::from_secs(1);
/// A lane without requests is closed by the owner after this.
const IDLE_MAX: Duration = Duration::from_secs(120);

const HEAD_BYTES: usize = 24;

const GOOD: u8 = 0;
const DENIED: u8 = 1;
const INVALID: u8 = 2;

/// Bytes over TCP.
pub(crate) struct Tcp;

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
        let id = seam::random_u128();
        let mut blob = incarnation.0.to_be_bytes().to_vec();
        blob.extend(id.to_be_bytes());
        let owner = Arc::new(Owner { region, gate, incarnation, id, closed: AtomicBool::new(false) });
        let tasks = Tasks::new();
        tasks.spawn(accept(listener, owner.clone()));
        Ok(Exported::new(NAME, blob, Some(address), Box::new(Serving { owner, _tasks: tasks })))
    }

    async fn connect(&self, export: &Export, deadline: Time) -> Result<Arc<dyn Peer>, Error> {
        let malformed = |reason: &str| Error::Malformed { transport: NAME, reason: reason.to_owned() };
        let (head, address) = export.blob.split_at_checked(24).ok_or_else(|| malformed("it is too short"))?;
        let address = std::str::from_utf8(address).ok().filter(|text| is_address(text));
        let peer = TcpPeer {
            address: address.ok_or_else(|| malformed("it has no address"))?.to_owned(),
            incarnation: u64::from_be_bytes(head[..8].try_into().expect("eight bytes")),
            id: u128::from_be_bytes(head[8..].try_into().expect("sixteen bytes")),
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
    incarnation: Incarnation,
    id: u128,
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
    async fn serve(&self, mut stream: TcpStream) -> io::Result<()> {
        stream.set_nodelay(true)?;
        let mut hello = [0; 28];
        limited(STALL_MAX, stream.read_exact(&mut hello)).await?;
        if &hello[..4] != MAGIC {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "not a lane of ours"));
        }
        let wanted = u64::from_be_bytes(hello[4..12].try_into().expect("eight bytes"));
        let id = u128::from_be_bytes(hello[12..].try_into().expect("sixteen bytes"));
        self.check_open()?;
        let known = wanted == self.incarnation.0 && id == self.id;
        let mut answer = MAGIC.to_vec();
        answer.push(if known { GOOD } else { DENIED });
        answer.extend((self.region.len() as u64).to_be_bytes());
        stream.write_all(&answer).await?;
        if !known {
            return Ok(());
        }
        loop {
            let mut head = [0; HEAD_BYTES];
            limited(IDLE_MAX, stream.read_exact(&mut head)).await?;
            let claim = ClaimId(u128::from_be_bytes(head[..16].try_into().expect("sixteen bytes")));
            let count = u32::from_be_bytes(head[16..20].try_into().expect("four bytes")) as usize;
            let left = u32::from_be_bytes(head[20..].try_into().expect("four bytes"));
            if count > RANGES_MAX {
                return stream.write_all(&[INVALID]).await;
            }
            let mut list = vec![0; count * 16];
            limited(STALL_MAX, stream.read_exact(&mut list)).await?;
            let ranges: Vec<ByteRange> = list.chunks_exact(16).map(read_range).collect();
            // Nobody waits for it longer, so nobody's pages are kept for it longer.
            let left = Duration::from_millis(u64::from(left)).min(ANSWER_MAX) + GRACE;
            limited(left, self.answer(&mut stream, claim, &ranges)).await?;
        }
    }

    fn check_open(&self) -> io::Result<()> {
        match self.closed.load(Ordering::Acquire) {
            true => Err(io::Error::other("the export has ended")),
            false => Ok(()),
        }
    }

    async fn answer(&self, stream: &mut TcpStream, claim: ClaimId, ranges: &[ByteRange]) -> io::Result<()> {
        if !ranges.iter().all(|range| self.region.contains(range.offset, range.len)) {
            return stream.write_all(&[INVALID]).await;
        }
        self.check_open()?;
        let Ok(permit) = self.gate.begin(claim, ranges) else { return stream.write_all(&[DENIED]).await };
        // SAFETY: inside the region, as checked; the permit keeps everybody from writing to these bytes until it
        // drops, which is after the last use of the slices.
        let bytes = ranges.iter().map(|r| unsafe { self.region.slice(r.offset as usize, r.len as usize) });
        let mut parts: VecDeque<&[u8]> = std::iter::once(&[GOOD][..]).chain(bytes).collect();
        let written = write_all(stream, &mut parts).await;
        drop(permit);
        written
    }
}

/// Writes all parts, as many per system call as it takes.
async fn write_all(stream: &mut TcpStream, parts: &mut VecDeque<&[u8]>) -> io::Result<()> {
    while !parts.is_empty() {
        let slices: Vec<io::IoSlice<'_>> =
            parts.iter().take(PARTS_MAX).map(|part| io::IoSlice::new(part)).collect();
        // A puller that reads nothing keeps pages from their owner, so it is given up.
        let mut written = limited(STALL_MAX, stream.write_vectored(&slices)).await?;
        if written == 0 && slices.iter().any(|slice| !slice.is_empty()) {
            return Err(io::ErrorKind::WriteZero.into());
        }
        while let Some(part) = parts.front_mut() {
            if written < part.len() {
                *part = &part[written..];
                break;
            }
            written -= part.len();
            parts.pop_front();
        }
    }
    Ok(())
}

fn read_range(bytes: &[u8]) -> ByteRange {
    ByteRange {
        offset: u64::from_be_bytes(bytes[..8].try_into().expect("eight bytes")),
        len: u64::from_be_bytes(bytes[8..].try_into().expect("eight bytes")),
    }
}

async fn limited<T>(limit: Duration, io: impl Future<Output = io::Result<T>>) -> io::Result<T> {
    seam::timeout(limit, io).await.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))
}

// ---------------------------------------------------------------------- the puller

struct TcpPeer {
    /// Host and port.
    address: String,
    incarnation: u64,
    id: u128,
    /// Lanes without a pull.
    lanes: Mutex<Vec<Lane>>,
    permits: Semaphore,
    closed: watch::Sender<bool>,
}

struct Lane {
    stream: TcpStream,
    remote_len: u64,
}

impl TcpPeer {
    async fn open_lane(&self, deadline: Time) -> Result<Lane, Error> {
        let unreachable = |reason: String| Error::Unreachable { transport: NAME, reason };
        let open = async {
            let mut stream = seam::connect_tcp(&*self.address).await?;
            let mut hello = MAGIC.to_vec();
            hello.extend(self.incarnation.to_be_bytes());
            hello.extend(self.id.to_be_bytes());
            stream.write_all(&hello).await?;
            let mut answer = [0; 13];
            stream.read_exact(&mut answer).await?;
            Ok::<_, io::Error>((stream, answer))
        };
        let opened = seam::timeout(deadline.remaining(seam::now()), open).await;
        let (stream, answer) = opened
            .map_err(|_| unreachable(format!("{} does not answer", self.address)))?
            .map_err(|error| unreachable(format!("{}: {error}", self.address)))?;
        if &answer[..4] != MAGIC {
            return Err(unreachable(format!("{} is not a lane of ours", self.address)));
        }
        if answer[4] != GOOD {
            return Err(Error::StaleIncarnation { transport: NAME });
        }
        let remote_len = u64::from_be_bytes(answer[5..].try_into().expect("eight bytes"));
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

    async fn try_pull(&self, pull: &Pull) -> Result<u64, PullError> {
        let _permit = self.permits.acquire().await.expect("the semaphore is never closed");
        loop {
            let idle = self.idle_lane();
            let fresh = idle.is_none();
            let mut lane = match idle {
                Some(lane) => lane,
                None => {
                    let opened = self.open_lane(pull.deadline).await;
                    opened.map_err(|error| PullError::PeerGone(error.to_string()))?
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
                Ok(GOOD) => {
                    self.keep(lane);
                    return Ok(bytes);
                }
                Ok(DENIED) => {
                    self.keep(lane);
                    return Err(PullError::Denied);
                }
                Ok(_) => return Err(PullError::Invalid("the owner does not accept the ranges".into())),
                // Its owner may have closed an idle lane meanwhile: then a fresh one decides.
                Err(_) if !fresh => {}
                Err(error) => return Err(PullError::PeerGone(error.to_string())),
            }
        }
    }
}

impl Lane {
    /// Brings everything, in as many requests as it takes. Returns the status that the last one got.
    async fn pull(&mut self, pull: &Pull) -> io::Result<u8> {
        for batch in 0..pull.remote.len().div_ceil(RANGES_MAX).max(1) {
            let begin = batch * RANGES_MAX;
            let end = pull.remote.len().min(begin + RANGES_MAX);
            let status = self.request(pull, &pull.remote[begin..end]).await?;
            if status != GOOD {
                return Ok(status);
            }
            let places = pull.remote[begin..end].iter().zip(&pull.local_offsets[begin..end]);
            // SAFETY: the caller of `pull` owns these bytes until the completion or the drop of the pull, and this
            // future, which alone writes to them, ends with either. The places are inside the region and apart, as
            // checked.
            let places = places
                .filter(|(range, _)| range.len > 0)
                .map(|(range, &local)| unsafe { pull.local.slice_mut(local as usize, range.len as usize) });
            read_all(&self.stream, places.collect()).await?;
        }
        Ok(GOOD)
    }

    /// Sends one request; returns the status of its answer.
    async fn request(&mut self, pull: &Pull, ranges: &[ByteRange]) -> io::Result<u8> {
        let left = pull.deadline.remaining(seam::now()).as_millis();
        let mut request = Vec::with_capacity(HEAD_BYTES + ranges.len() * 16);
        request.extend(pull.claim.0.to_be_bytes());
        request.extend((ranges.len() as u32).to_be_bytes());
        request.extend(u32::try_from(left).unwrap_or(u32::MAX).to_be_bytes());
        for range in ranges {
            request.extend(range.offset.to_be_bytes());
            request.extend(range.len.to_be_bytes());
        }
        self.stream.write_all(&request).await?;
        self.stream.read_u8().await
    }
}

/// Fills all parts, none of which is empty, as many per system call as it takes.
async fn read_all(stream: &TcpStream, mut parts: VecDeque<&mut [u8]>) -> io::Result<()> {
    let mut turn = 0;
    while !parts.is_empty() {
        if turn >= TURN_BYTES {
            // A peer that is always faster than we must not keep others from this thread.
            tokio::task::yield_now().await;
            turn = 0;
        }
        stream.readable().await?;
        let mut slices: Vec<io::IoSliceMut<'_>> =
            parts.iter_mut().take(PARTS_MAX).map(|part| io::IoSliceMut::new(part)).collect();
        let mut read = match stream.try_read_vectored(&mut slices) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(read) => read,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => continue,
            Err(error) => return Err(error),
        };
        turn += read;
        while read > 0
            && let Some(part) = parts.pop_front()
        {
            if read < part.len() {
                parts.push_front(&mut part[read..]);
                break;
            }
            read -= part.len();
        }
    }
    Ok(())
}

#[async_trait]
impl Peer for TcpPeer {
    async fn pull(&self, pull: Pull) -> Completion {
        let mut closed = self.closed.subscribe();
        let left = pull.deadline.remaining(seam::now());
        let bytes = if left.is_zero() {
            Err(PullError::Deadline)
        } else {
            tokio::select! {
                biased;
                _ = closed.wait_for(|closed| *closed) => Err(PullError::PeerGone("closed here".into())),
                done = seam::timeout(left, self.try_pull(&pull)) => done.unwrap_or(Err(PullError::Deadline)),
            }
        };
        // What was not brought to its end is dropped by now, and its socket with it.
        // SAFETY: the lane's future has ended, and the caller owns the destination.
        let checksums = if bytes.is_ok() { unsafe { sum_up(&pull) } } else { Vec::new() };
        Completion { bytes, checksums, buffers: Buffers::Reusable }
    }

    fn close(&self) {
        self.closed.send_replace(true);
        self.lanes.lock().expect("nothing panics under this lock").clear();
    }
}

#[cfg(test)]
mod tests;
