//! Between processes of one user on one host: the puller maps the owner's memory and copies by itself.
//!
//! The memory is a sealed memfd, passed over a local socket after a hello that names the owner's start and its
//! export. Both ends check that the other runs as the same user, in the same network and user namespaces: that is
//! the trust domain. Within it a puller *could* read anything of the region at any time. It does not: as with
//! every other transport the gate is asked first, the permit is held while the puller copies, and the bytes
//! count only when the owner has confirmed that it held it to the end. That costs two short messages per
//! pull. The memory cannot be written to by pullers.
//!
//! Huge pages are asked for by `madvise`, which memfds heed where `shmem_enabled` is `advise` or more.
//!
//! An owner that dies closes its sockets. Its bytes stay readable as long as a mapping exists, but nobody can say
//! any more what they are worth, so pulls end with "gone" and the mapping is dropped at once: a puller must
//! not keep the memory of the dead. The socket's name is no file: nothing is left to clean up.
//!
//! A lane is as in `wire`; after a good answer the puller copies, says `DONE`, and the owner answers `GOOD`.

use std::io;
use std::net::IpAddr;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use async_trait::async_trait;
use tandem_chassis::{Tasks, seam};
use tandem_memory::{Mapping, Region};
use tandem_types::{Export, Incarnation, Time};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{Semaphore, watch};

use crate::copying::{Aside, Copying};
use crate::wire::{self, DENIED, GOOD, INVALID, Name, Request, STALL_MAX, limited};
use crate::{Completion, Error, Exported, Gate, Peer, Pull, PullError, Transport, check};

mod descriptor;

pub(crate) const NAME: &str = "shm";

const MAGIC: &wire::Magic = b"SKV1";
/// The puller has copied.
const DONE: u8 = 3;
/// Connections an owner serves at once.
const CONNECTIONS_MAX: usize = 256;
/// Pulls a peer has under way at once, each on a lane of its own; more wait.
const LANES: usize = 4;
/// Longer copies go to a thread where they keep nobody waiting.
const ASIDE_BYTES: u64 = 512 << 10;

/// Copies out of the owner's memory.
pub(crate) struct Shm;

#[async_trait]
impl Transport for Shm {
    fn name(&self) -> &'static str {
        NAME
    }

    async fn export(
        &self,
        region: Arc<Region>,
        gate: Arc<dyn Gate>,
        incarnation: Incarnation,
        _bind: IpAddr,
    ) -> Result<Exported, Error> {
        let unreachable = |reason: String| Error::Unreachable { transport: NAME, reason };
        if region.fd().is_none() {
            return Err(unreachable("the region is not shared memory".into()));
        }
        let name = Name { incarnation, id: seam::random_u128() };
        let listener = seam::listen_local(&socket(name)).map_err(|error| unreachable(error.to_string()))?;
        let owner = Arc::new(Owner { region, gate, name, closed: AtomicBool::new(false) });
        let tasks = Tasks::new();
        tasks.spawn(accept(listener, owner.clone()));
        let serving = Serving { owner, _tasks: tasks };
        Ok(Exported::new(NAME, name.to_bytes().to_vec(), None, Box::new(serving)))
    }

    async fn connect(&self, export: &Export, deadline: Time) -> Result<Arc<dyn Peer>, Error> {
        let bytes = export.blob.as_slice().try_into();
        let name = Name::from_bytes(bytes.map_err(|_| Error::Malformed {
            transport: NAME,
            reason: format!("it is not {} bytes long", Name::BYTES),
        })?);
        let (watched, len, memory) = open(name, deadline).await?;
        let memory = map(memory, len)?;
        let reach = Arc::new(Reach { memory: Mutex::new(Some(memory)), closed: watch::Sender::new(None) });
        let tasks = Tasks::new();
        tasks.spawn(watch_owner(watched, reach.clone()));
        let permits = Semaphore::new(LANES);
        Ok(Arc::new(ShmPeer { name, reach, lanes: Mutex::default(), permits, _tasks: tasks }))
    }
}

/// Where an owner listens. Nobody else can know the name beforehand, and so take it.
fn socket(name: Name) -> String {
    format!("tandem-kv-{:032x}", name.id)
}

/// Whether the other end runs as this user.
fn check_user(stream: &UnixStream) -> io::Result<()> {
    // SAFETY: it always succeeds and touches no memory.
    let own = unsafe { libc::geteuid() };
    let other = stream.peer_cred()?.uid();
    if other != own {
        return Err(io::Error::new(
            io::ErrorKind::PermissionDenied,
            format!("the other end runs as user {other}, this one as {own}"),
        ));
    }
    Ok(())
}

// ---------------------------------------------------------------------- the owner

struct Owner {
    region: Arc<Region>,
    gate: Arc<dyn Gate>,
    name: Name,
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

async fn accept(listener: UnixListener, owner: Arc<Owner>) {
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
    async fn serve(&self, mut stream: UnixStream) -> io::Result<()> {
        check_user(&stream)?;
        let known = wire::read_hello(&mut stream, MAGIC).await? == self.name;
        self.check_open()?;
        let answer = wire::hello_answer(MAGIC, known, &self.region);
        if !known {
            return stream.write_all(&answer).await;
        }
        let memory = self.region.fd().expect("only shared memory is exported");
        limited(STALL_MAX, descriptor::send(&stream, &answer, memory)).await?;
        loop {
            // A lane may rest for as long as its puller likes: with that one's process it goes.
            let Some(request) = wire::read_request(&mut stream, Duration::MAX).await? else {
                return stream.write_all(&[INVALID]).await;
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

    /// Holds the permit until the puller has copied. An error, or the end of the limit, closes the lane: then the
    /// puller learns that its bytes are worth nothing.
    async fn answer(&self, stream: &mut UnixStream, request: &Request) -> io::Result<()> {
        if !request.ranges.iter().all(|range| self.region.contains(range.offset, range.len)) {
            return stream.write_all(&[INVALID]).await;
        }
        self.check_open()?;
        let Ok(permit) = self.gate.begin(request.claim, &request.ranges) else {
            return stream.write_all(&[DENIED]).await;
        };
        stream.write_all(&[GOOD]).await?;
        if stream.read_u8().await? != DONE {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "not what a puller says after its copy"));
        }
        self.check_open()?;
        drop(permit);
        stream.write_all(&[GOOD]).await
    }
}

// ---------------------------------------------------------------------- the puller

/// The owner's memory, for as long as the owner lives and nobody has closed this end.
struct Reach {
    memory: Mutex<Option<Arc<Mapping>>>,
    /// Why there is none any more.
    closed: watch::Sender<Option<&'static str>>,
}

impl Reach {
    fn end(&self, why: &'static str) {
        self.closed.send_if_modified(|known| known.replace(why).is_none());
        self.memory.lock().expect("nothing panics under this lock").take();
    }

    fn memory(&self) -> Option<Arc<Mapping>> {
        self.memory.lock().expect("nothing panics under this lock").clone()
    }
}

struct ShmPeer {
    name: Name,
    reach: Arc<Reach>,
    /// Lanes without a pull.
    lanes: Mutex<Vec<UnixStream>>,
    permits: Semaphore,
    /// Whoever watches the owner.
    _tasks: Tasks,
}

/// Connects. With the owner's hello come the length of the memory and the memory itself.
async fn open(name: Name, deadline: Time) -> Result<(UnixStream, u64, Option<OwnedFd>), Error> {
    let unreachable = |reason: String| Error::Unreachable { transport: NAME, reason };
    let open = async {
        let mut stream = seam::connect_local(&socket(name)).await?;
        check_user(&stream)?;
        stream.write_all(&wire::hello(MAGIC, name)).await?;
        let mut answer = [0; wire::ANSWER_BYTES];
        let memory = descriptor::receive(&stream, &mut answer).await?;
        Ok::<_, io::Error>((stream, answer, memory))
    };
    let opened = seam::timeout(deadline.remaining(seam::now()), open).await;
    let (stream, answer, memory) = opened
        .map_err(|_| unreachable("the owner does not answer".into()))?
        .map_err(|error| unreachable(error.to_string()))?;
    let len = wire::read_hello_answer(NAME, MAGIC, &answer)?;
    Ok((stream, len, memory))
}

fn map(memory: Option<OwnedFd>, len: u64) -> Result<Arc<Mapping>, Error> {
    let unreachable = |reason: String| Error::Unreachable { transport: NAME, reason };
    let memory = memory.ok_or_else(|| unreachable("the owner has passed no memory".into()))?;
    let memory = Mapping::of(&memory).map_err(|error| unreachable(error.to_string()))?;
    if memory.len() as u64 != len {
        return Err(unreachable(format!("{len} bytes are exported, {} are there", memory.len())));
    }
    Ok(Arc::new(memory))
}

/// Waits on a lane that nobody uses for its end, which is the owner's.
async fn watch_owner(mut lane: UnixStream, reach: Arc<Reach>) {
    let _ = lane.read(&mut [0]).await;
    reach.end("its owner is gone");
}

impl ShmPeer {
    fn lanes(&self) -> MutexGuard<'_, Vec<UnixStream>> {
        self.lanes.lock().expect("nothing panics under this lock")
    }

    async fn lane(&self, deadline: Time) -> Result<UnixStream, PullError> {
        let idle = self.lanes().pop();
        match idle {
            Some(lane) => Ok(lane),
            // The memory is mapped already.
            None => match open(self.name, deadline).await {
                Ok((lane, ..)) => Ok(lane),
                Err(_) if seam::now() >= deadline => Err(PullError::Deadline),
                Err(error) => Err(PullError::PeerGone(error.to_string())),
            },
        }
    }

    fn keep(&self, lane: UnixStream) {
        if self.reach.closed.borrow().is_none() {
            self.lanes().push(lane);
        }
    }

    async fn try_pull(&self, pull: &Pull) -> Result<(u64, Vec<u64>), PullError> {
        let _permit = self.permits.acquire().await.expect("the semaphore is never closed");
        let memory = self.reach.memory().ok_or_else(|| PullError::PeerGone("closed here".into()))?;
        let bytes = check(pull, memory.len() as u64)?;
        let mut lane = self.lane(pull.deadline).await?;
        let mut sums = Vec::new();
        for batch in 0..pull.remote.len().div_ceil(wire::RANGES_MAX).max(1) {
            let part = part_of(pull, batch);
            // A lane that does not come to its end here is dropped, and with it the permit at the owner.
            match exchange(&mut lane, &part, &memory).await {
                Ok(Answer::Good(more)) => sums.extend(more),
                Ok(Answer::Denied) => {
                    self.keep(lane);
                    return Err(PullError::Denied);
                }
                Ok(Answer::Invalid) => {
                    return Err(PullError::Invalid("the owner does not accept the ranges".into()));
                }
                Err(error) => return Err(PullError::PeerGone(error.to_string())),
            }
        }
        self.keep(lane);
        Ok((bytes, sums))
    }
}

/// What one request may ask for.
fn part_of(pull: &Pull, batch: usize) -> Pull {
    let begin = batch * wire::RANGES_MAX;
    let end = pull.remote.len().min(begin + wire::RANGES_MAX);
    Pull {
        remote: pull.remote[begin..end].to_vec(),
        local_offsets: pull.local_offsets[begin..end].to_vec(),
        ..pull.clone()
    }
}

enum Answer {
    /// With the checksums.
    Good(Vec<u64>),
    Denied,
    Invalid,
}

/// One request: asks, copies, and asks whether it was held.
async fn exchange(lane: &mut UnixStream, pull: &Pull, memory: &Arc<Mapping>) -> io::Result<Answer> {
    lane.write_all(&wire::request(pull.claim, &pull.remote, pull.deadline)).await?;
    match lane.read_u8().await? {
        GOOD => {}
        DENIED => return Ok(Answer::Denied),
        _ => return Ok(Answer::Invalid),
    }
    // SAFETY: the ranges are inside the mapping, as checked. Until it answers `DONE`, the owner's permit keeps the
    // source as it is; should it break that off, these bytes will not count. The caller of `pull` owns the places
    // until the completion or the drop of this future, whose drop ends the copy.
    let mut copying = unsafe { Copying::new(pull, memory.as_ptr(), memory.clone()) };
    let bytes: u64 = pull.remote.iter().map(|range| range.len).sum();
    let sums = if bytes > ASIDE_BYTES {
        Aside::start(copying).finish().await
    } else {
        while copying.step() {}
        copying.into_sums()
    };
    lane.write_all(&[DONE]).await?;
    match lane.read_u8().await? {
        GOOD => Ok(Answer::Good(sums)),
        _ => Err(io::Error::new(io::ErrorKind::InvalidData, "not what an owner says after a copy")),
    }
}

#[async_trait]
impl Peer for ShmPeer {
    async fn pull(&self, pull: Pull) -> Completion {
        let mut closed = self.reach.closed.subscribe();
        let gone = async {
            let why = closed.wait_for(Option::is_some).await;
            PullError::PeerGone(why.ok().and_then(|why| *why).unwrap_or("closed here").to_owned())
        };
        let left = pull.deadline.remaining(seam::now());
        let done = if left.is_zero() {
            Err(PullError::Deadline)
        } else {
            tokio::select! {
                biased;
                gone = gone => Err(gone),
                done = seam::timeout(left, self.try_pull(&pull)) => match done {
                    // A copy goes on also while nobody polls this; it may have ended in time, but is noticed late.
                    Ok(Ok(_)) if seam::now() >= pull.deadline => Err(PullError::Deadline),
                    done => done.unwrap_or(Err(PullError::Deadline)),
                },
            }
        };
        // A copy that did not come to its end has ended with its future.
        Completion::stopped(done)
    }

    fn close(&self) {
        self.reach.end("closed here");
        self.lanes().clear();
    }
}

#[cfg(test)]
mod tests;
