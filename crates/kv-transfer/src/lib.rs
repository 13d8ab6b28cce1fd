//! Pulls bytes from a peer's registered regions, and never interprets them.
//!
//! Never knows: pages, leases, models. Always holds: a pull ends with two answers (did every byte arrive; may
//! the buffers be reused), nothing is written after the second one says so, every wait has a deadline, and no
//! byte leaves a region but through its owner's gate.

mod checksum;
pub mod conformance;
mod copying;
mod inproc;
mod shm;
mod tcp;
mod tls;
mod wire;

use std::any::Any;
use std::future::Future;
use std::net::{IpAddr, SocketAddr};
use std::pin::Pin;
use std::sync::Arc;

use async_trait::async_trait;
use tandem_memory::Region;
use tandem_types::{ClaimId, Export, Incarnation, Time};

pub use checksum::checksum;
pub use tls::{Tls, TlsError};

/// Bytes of a region.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ByteRange {
    /// From the region's start.
    pub offset: u64,
    /// How many.
    pub len: u64,
}

/// Keeps what it was given for from reuse until it drops.
pub type Permit = Box<dyn Any + Send>;

/// The gate has not let a read through: the claim does not stand, or does not cover the bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the claim does not cover these bytes now")]
pub struct Denied;

/// The owner's side of every read. Asked once per pull, or once per part of a very long one; the permit it
/// gives is honoured to its end, whatever becomes of the claim meanwhile.
pub trait Gate: Send + Sync + 'static {
    /// Lets these bytes be read under this claim, or not. Must not block.
    fn begin(&self, claim: ClaimId, ranges: &[ByteRange]) -> Result<Permit, Denied>;
}

/// A way for bytes to travel. Stateless: what lives, lives in what it returns.
#[async_trait]
pub trait Transport: Send + Sync + 'static {
    /// As in flags and metrics.
    fn name(&self) -> &'static str;

    /// Makes `region` reachable through `gate`, until the result is dropped. `bind` is where to listen, if
    /// that means anything here.
    async fn export(
        &self,
        region: Arc<Region>,
        gate: Arc<dyn Gate>,
        incarnation: Incarnation,
        bind: IpAddr,
    ) -> Result<Exported, Error>;

    /// Reaches an exported region. Succeeds only if a connection really stands.
    async fn connect(&self, export: &Export, deadline: Time) -> Result<Arc<dyn Peer>, Error>;
}

/// A region of a peer, within reach.
#[async_trait]
pub trait Peer: Send + Sync {
    /// Brings bytes. Dropping the future stops it: afterwards nothing is written any more.
    async fn pull(&self, pull: Pull) -> Completion;

    /// Ends all pulls; further ones fail.
    fn close(&self);
}

/// What to bring, and where to.
#[derive(Clone, Debug)]
pub struct Pull {
    /// Under which claim.
    pub claim: ClaimId,
    /// From where in the peer's region.
    pub remote: Vec<ByteRange>,
    /// Into which region of ours.
    pub local: Arc<Region>,
    /// Where in it, one per remote range; no two places overlap. The caller owns these bytes until the
    /// completion says that they may be reused.
    pub local_offsets: Vec<u64>,
    /// Whether to take the checksum of what arrived, range by range.
    pub checksums: bool,
    /// When to give up.
    pub deadline: Time,
}

/// How a pull ended.
#[derive(Debug)]
pub struct Completion {
    /// Did every byte arrive? How many, or why not.
    pub bytes: Result<u64, PullError>,
    /// Checksums of the bytes that arrived, one per range; empty if nobody asked for them, or bytes are missing.
    pub checksums: Vec<u64>,
    /// May the local bytes be reused?
    pub buffers: Buffers,
}

impl Completion {
    /// Of a pull that has ended or was stopped, so that nothing writes any more.
    fn stopped(done: Result<(u64, Vec<u64>), PullError>) -> Completion {
        let (bytes, checksums) = match done {
            Ok((bytes, checksums)) => (Ok(bytes), checksums),
            Err(error) => (Err(error), Vec::new()),
        };
        Completion { bytes, checksums, buffers: Buffers::Reusable }
    }
}

/// Whether anything may still write to a pull's destination.
pub enum Buffers {
    /// Nothing does.
    Reusable,
    /// Something may; not before this resolves.
    Quarantined(Pin<Box<dyn Future<Output = ()> + Send>>),
}

impl std::fmt::Debug for Buffers {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Buffers::Reusable => "Reusable",
            Buffers::Quarantined(_) => "Quarantined",
        })
    }
}

/// Why bytes did not arrive.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PullError {
    /// The owner's gate said no.
    #[error("the owner denies it: the claim does not cover these bytes now")]
    Denied,
    /// A range is outside of a region, or there are not as many places as ranges.
    #[error("{0}")]
    Invalid(String),
    /// The peer is gone, or closed.
    #[error("the peer is gone: {0}")]
    PeerGone(String),
    /// It took too long.
    #[error("the deadline passed")]
    Deadline,
}

/// Why a region cannot be exported or reached.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The blob is not this transport's.
    #[error("{transport}: the export cannot be read: {reason}")]
    Malformed {
        /// The transport.
        transport: &'static str,
        /// What is wrong.
        reason: String,
    },
    /// Somebody else lives there now.
    #[error("{transport}: the export is of an earlier start of its owner")]
    StaleIncarnation {
        /// The transport.
        transport: &'static str,
    },
    /// Nobody there, or not from here.
    #[error("{transport}: {reason}")]
    Unreachable {
        /// The transport.
        transport: &'static str,
        /// What happened.
        reason: String,
    },
    /// None of the ways worked.
    #[error("no transport reaches the peer: {0}")]
    NoWay(String),
}

/// An exported region. Dropping it ends the export.
pub struct Exported {
    export: Export,
    /// Length of what stands before the address in the blob, and the port, for those that listen.
    listens: Option<(usize, u16)>,
    _serving: Box<dyn Any + Send + Sync>,
}

impl Exported {
    /// `head` is the blob, or what stands before the address in it if the transport listens there.
    pub(crate) fn new(
        transport: &str,
        head: Vec<u8>,
        address: Option<SocketAddr>,
        serving: Box<dyn Any + Send + Sync>,
    ) -> Exported {
        let listens = address.map(|address| (head.len(), address.port()));
        let export = Export { transport: transport.to_owned(), blob: head };
        let mut exported = Exported { export, listens, _serving: serving };
        if let Some(address) = address {
            exported.advertise(&address.ip().to_string());
        }
        exported
    }

    /// What peers need to reach it.
    pub fn export(&self) -> &Export {
        &self.export
    }

    /// Peers are to use this host name or address, and not the one that was bound. For processes that listen on
    /// all addresses, none of which they can tell to be the right one. Means nothing to transports that do not
    /// listen.
    pub fn advertise(&mut self, host: &str) {
        let Some((head, port)) = self.listens else { return };
        let bare = host.contains(':') && !host.starts_with('[');
        let address = if bare { format!("[{host}]:{port}") } else { format!("{host}:{port}") };
        self.export.blob.truncate(head);
        self.export.blob.extend(address.into_bytes());
    }
}

/// What transports are told when they are made. Each takes what concerns it.
#[derive(Clone, Default)]
pub struct Options {
    /// Identity and trust for connections that leave this host's memory; without it they are plain.
    pub tls: Option<Tls>,
}

/// A transport by its name.
pub struct Row {
    /// What `--transport` calls it.
    pub name: &'static str,
    /// Makes it.
    pub make: fn(&Options) -> Arc<dyn Transport>,
    /// Whether it exports shared memory only.
    pub shared_memory: bool,
    /// Cases of the conformance suite that mean nothing here, each with the reason.
    pub not_applicable: &'static [(&'static str, &'static str)],
}

/// All transports, the best first.
pub static TRANSPORTS: &[Row] = &[
    Row { name: inproc::NAME, make: |_| Arc::new(inproc::Inproc), shared_memory: false, not_applicable: &[] },
    Row { name: shm::NAME, make: |_| Arc::new(shm::Shm), shared_memory: true, not_applicable: &[] },
    Row {
        name: tcp::NAME,
        make: |options| Arc::new(tcp::Tcp { tls: options.tls.clone() }),
        shared_memory: false,
        not_applicable: &[],
    },
];

/// The rows that may be used: all for `auto`, or the one of that name.
pub fn allowed(transport: &str) -> impl Iterator<Item = &'static Row> {
    TRANSPORTS.iter().filter(move |row| transport == "auto" || transport == row.name)
}

/// The best way to a peer with which a connection really stands. `transport` is `auto` or one transport's
/// name; with a name there is no other way, however bad. Returns the transport's name too.
pub async fn connect_best(
    exports: &[Export],
    transport: &str,
    options: &Options,
    deadline: Time,
) -> Result<(&'static str, Arc<dyn Peer>), Error> {
    let mut refusals = Vec::new();
    for row in allowed(transport) {
        let Some(export) = exports.iter().find(|export| export.transport == row.name) else { continue };
        match (row.make)(options).connect(export, deadline).await {
            Ok(peer) => return Ok((row.name, peer)),
            // The owner has restarted: no other way leads to what the handle means.
            Err(stale @ Error::StaleIncarnation { .. }) => return Err(stale),
            Err(error) => refusals.push(error.to_string()),
        }
    }
    if refusals.is_empty() {
        let offered: Vec<&str> = exports.iter().map(|export| export.transport.as_str()).collect();
        refusals.push(format!("allowed here: {transport}; offered there: {}", offered.join(", ")));
    }
    Err(Error::NoWay(refusals.join("; ")))
}

/// Checks that a pull is inside both regions and that its places are apart. Returns its bytes.
fn check(pull: &Pull, remote_len: u64) -> Result<u64, PullError> {
    if pull.remote.len() != pull.local_offsets.len() {
        let (ranges, places) = (pull.remote.len(), pull.local_offsets.len());
        return Err(PullError::Invalid(format!("{ranges} ranges and {places} places")));
    }
    let mut bytes = 0u64;
    let mut places = Vec::with_capacity(pull.remote.len());
    for (range, &local) in pull.remote.iter().zip(&pull.local_offsets) {
        let ByteRange { offset, len } = *range;
        let inside = offset.checked_add(len).is_some_and(|end| end <= remote_len);
        if !inside || !pull.local.contains(local, len) {
            return Err(PullError::Invalid(format!(
                "range {offset}+{len} to {local} is outside of a region"
            )));
        }
        bytes += len;
        if len > 0 {
            places.push((local, local + len));
        }
    }
    if !places.is_sorted() {
        places.sort_unstable();
    }
    match places.windows(2).find(|pair| pair[0].1 > pair[1].0) {
        Some(pair) => Err(PullError::Invalid(format!("two ranges go to {}", pair[1].0))),
        None => Ok(bytes),
    }
}
