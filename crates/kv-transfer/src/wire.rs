//! What `tcp` and `shm` say to each other in the same way: hellos, and requests for ranges.
//!
//! A connection is a *lane*: after the hello, requests and answers alternate. All integers are big-endian.
//! - hello of the puller: magic, incarnation `u64`, export id `u128`
//! - hello of the owner: magic, status, length of the region `u64`
//! - request: claim `u128`, ranges `u32`, milliseconds the puller still waits `u32`, then offset `u64` and
//!   length `u64` of each range
//! - answer: status (0 good, 1 denied, 2 invalid), then what the transport says

use std::future::Future;
use std::io;
use std::time::Duration;

use tandem_chassis::seam;
use tandem_memory::Region;
use tandem_types::{ClaimId, Incarnation, Time};
use tokio::io::{AsyncRead, AsyncReadExt};

use crate::{ByteRange, Error};

pub(crate) const GOOD: u8 = 0;
pub(crate) const DENIED: u8 = 1;
pub(crate) const INVALID: u8 = 2;

/// Ranges of one request at most; a pull of more is several requests.
pub(crate) const RANGES_MAX: usize = 1 << 16;
/// Time for a hello, and for a peer that reads nothing.
pub(crate) const STALL_MAX: Duration = Duration::from_secs(10);
/// Time for one answer, whatever its puller says, and what a puller may be late in noticing its own deadline.
const ANSWER_MAX: Duration = Duration::from_secs(600);
pub(crate) const GRACE: Duration = Duration::from_secs(1);

pub(crate) type Magic = [u8; 4];
const REQUEST_BYTES: usize = 24;
pub(crate) const ANSWER_BYTES: usize = 13;

/// Which start of which export.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Name {
    pub(crate) incarnation: Incarnation,
    pub(crate) id: u128,
}

impl Name {
    pub(crate) const BYTES: usize = 24;

    /// As in blobs and hellos.
    pub(crate) fn to_bytes(self) -> [u8; Name::BYTES] {
        let mut bytes = [0; Name::BYTES];
        bytes[..8].copy_from_slice(&self.incarnation.0.to_be_bytes());
        bytes[8..].copy_from_slice(&self.id.to_be_bytes());
        bytes
    }

    pub(crate) fn from_bytes(bytes: &[u8; Name::BYTES]) -> Name {
        let (incarnation, id) = bytes.split_at(8);
        Name {
            incarnation: Incarnation(u64::from_be_bytes(incarnation.try_into().expect("eight bytes"))),
            id: u128::from_be_bytes(id.try_into().expect("sixteen bytes")),
        }
    }
}

/// What the puller says first.
pub(crate) fn hello(magic: &Magic, name: Name) -> Vec<u8> {
    [&magic[..], &name.to_bytes()].concat()
}

/// Whom a puller wants to reach.
pub(crate) async fn read_hello(stream: &mut (impl AsyncRead + Unpin), magic: &Magic) -> io::Result<Name> {
    let mut hello = [0; 4 + Name::BYTES];
    limited(STALL_MAX, stream.read_exact(&mut hello)).await?;
    if hello[..4] != magic[..] {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "not a lane of ours"));
    }
    Ok(Name::from_bytes(hello[4..].try_into().expect("as long as a name")))
}

/// What the owner says first.
pub(crate) fn hello_answer(magic: &Magic, known: bool, region: &Region) -> Vec<u8> {
    let mut answer = magic.to_vec();
    answer.push(if known { GOOD } else { DENIED });
    answer.extend((region.len() as u64).to_be_bytes());
    answer
}

/// The length of the owner's region, if it is the owner.
pub(crate) fn read_hello_answer(
    transport: &'static str,
    magic: &Magic,
    answer: &[u8; ANSWER_BYTES],
) -> Result<u64, Error> {
    if answer[..4] != magic[..] {
        return Err(Error::Unreachable {
            transport,
            reason: "there is something that is not a lane of ours".into(),
        });
    }
    match answer[4] {
        GOOD => Ok(u64::from_be_bytes(answer[5..].try_into().expect("eight bytes"))),
        _ => Err(Error::StaleIncarnation { transport }),
    }
}

/// What a puller asks for.
pub(crate) struct Request {
    pub(crate) claim: ClaimId,
    pub(crate) ranges: Vec<ByteRange>,
    /// Nobody waits for it longer, so nobody's pages are kept for it longer.
    pub(crate) limit: Duration,
}

/// A request as it is sent.
pub(crate) fn request(claim: ClaimId, ranges: &[ByteRange], deadline: Time) -> Vec<u8> {
    let left = deadline.remaining(seam::now()).as_millis();
    let mut request = Vec::with_capacity(REQUEST_BYTES + ranges.len() * 16);
    request.extend(claim.0.to_be_bytes());
    request.extend((ranges.len() as u32).to_be_bytes());
    request.extend(u32::try_from(left).unwrap_or(u32::MAX).to_be_bytes());
    for range in ranges {
        request.extend(range.offset.to_be_bytes());
        request.extend(range.len.to_be_bytes());
    }
    request
}

/// The next request; `None` if it is too long to be one of ours. Waits for its beginning for `idle`.
pub(crate) async fn read_request(
    stream: &mut (impl AsyncRead + Unpin),
    idle: Duration,
) -> io::Result<Option<Request>> {
    let mut head = [0; REQUEST_BYTES];
    limited(idle, stream.read_exact(&mut head)).await?;
    let claim = ClaimId(u128::from_be_bytes(head[..16].try_into().expect("sixteen bytes")));
    let count = u32::from_be_bytes(head[16..20].try_into().expect("four bytes")) as usize;
    let left = u32::from_be_bytes(head[20..].try_into().expect("four bytes"));
    if count > RANGES_MAX {
        return Ok(None);
    }
    let mut list = vec![0; count * 16];
    limited(STALL_MAX, stream.read_exact(&mut list)).await?;
    let ranges = list.chunks_exact(16).map(read_range).collect();
    let limit = Duration::from_millis(u64::from(left)).min(ANSWER_MAX) + GRACE;
    Ok(Some(Request { claim, ranges, limit }))
}

fn read_range(bytes: &[u8]) -> ByteRange {
    ByteRange {
        offset: u64::from_be_bytes(bytes[..8].try_into().expect("eight bytes")),
        len: u64::from_be_bytes(bytes[8..].try_into().expect("eight bytes")),
    }
}

/// Input or output that is given up after a while.
pub(crate) async fn limited<T>(limit: Duration, io: impl Future<Output = io::Result<T>>) -> io::Result<T> {
    seam::timeout(limit, io).await.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))
}
