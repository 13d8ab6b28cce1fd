//! An answer on its way out.
//!
//! The kernel copies what is written into buffers that a *thread* fills one after the other, whatever socket it
//! writes to, and the reader's kernel copies from there. Both copies take twice as long and more where source and
//! destination lie differently within a cache line. So an answer is whole cache lines, head and tail included, and
//! large ones are written by threads that write nothing else: the runtime's threads write messages of any length
//! in between. It also keeps the copying of many megabytes from whatever else a runtime's thread has to do.

use std::collections::VecDeque;
use std::io::{self, IoSlice, Write};
use std::net::{Shutdown, TcpStream};
use std::sync::Arc;
use std::time::Duration;

use tandem_memory::Region;
use tokio::io::AsyncWriteExt;

use super::socket::{Plain, Socket, is_writable};
use crate::wire::{STALL_MAX, limited};
use crate::{ByteRange, Permit};

/// Bytes of an answer's head, and what all of it is a multiple of.
pub(super) const LINE: usize = 64;
/// Ranges of one system call at most.
pub(super) const PARTS_MAX: usize = 256;
/// Fewer bytes are written where the request was read.
const ASIDE_MIN: u64 = 256 << 10;
/// A thread gives its place to others when the socket takes nothing for so long.
const PATIENCE: Duration = Duration::from_millis(20);

/// What a head of this status looks like.
pub(super) fn head(status: u8) -> [u8; LINE] {
    let mut head = [0; LINE];
    head[0] = status;
    head
}

/// Bytes that follow so many bytes of ranges.
pub(super) fn tail(bytes: u64) -> usize {
    (bytes.next_multiple_of(LINE as u64) - bytes) as usize
}

/// Ranges of a region, with what comes before and after them.
pub(super) struct Outgoing {
    region: Arc<Region>,
    head: [u8; LINE],
    /// Bytes of the head that are left.
    heads: usize,
    ranges: VecDeque<ByteRange>,
    tail: usize,
    /// Keeps everybody from writing to the ranges.
    _permit: Permit,
}

impl Outgoing {
    /// The ranges are inside the region, and nobody writes to them while `permit` lives.
    pub(super) fn new(status: u8, region: Arc<Region>, ranges: &[ByteRange], permit: Permit) -> Outgoing {
        let bytes: u64 = ranges.iter().map(|range| range.len).sum();
        Outgoing {
            region,
            head: head(status),
            heads: LINE,
            ranges: ranges.iter().copied().filter(|range| range.len > 0).collect(),
            tail: tail(bytes),
            _permit: permit,
        }
    }

    fn is_done(&self) -> bool {
        self.heads == 0 && self.ranges.is_empty() && self.tail == 0
    }

    /// The next of what is left.
    fn slices(&self) -> Vec<IoSlice<'_>> {
        static ZEROS: [u8; LINE] = [0; LINE];
        // SAFETY: inside the region, and unwritten while the permit lives, as `new` was promised.
        let bytes =
            |range: &ByteRange| unsafe { self.region.slice(range.offset as usize, range.len as usize) };
        let ranges = self.ranges.iter().take(PARTS_MAX).map(bytes);
        let parts = std::iter::once(&self.head[LINE - self.heads..]).chain(ranges);
        let last = if self.ranges.len() <= PARTS_MAX { &ZEROS[..self.tail] } else { &[] };
        parts.chain([last]).filter(|part| !part.is_empty()).map(IoSlice::new).collect()
    }

    /// So many bytes have gone out.
    fn take(&mut self, bytes: usize) -> io::Result<()> {
        if bytes == 0 {
            return Err(io::ErrorKind::WriteZero.into());
        }
        let heads = bytes.min(self.heads);
        self.heads -= heads;
        let mut rest = (bytes - heads) as u64;
        while rest > 0
            && let Some(range) = self.ranges.front_mut()
        {
            let taken = rest.min(range.len);
            *range = ByteRange { offset: range.offset + taken, len: range.len - taken };
            rest -= taken;
            if range.len == 0 {
                self.ranges.pop_front();
            }
        }
        self.tail -= rest as usize;
        Ok(())
    }

    /// Writes all of it. A puller that reads nothing keeps pages from their owner, so it is given up.
    pub(super) async fn write(mut self, stream: &mut Socket) -> io::Result<()> {
        let bytes: u64 = self.ranges.iter().map(|range| range.len).sum();
        if let Socket::Plain(plain) = stream
            && bytes >= ASIDE_MIN
        {
            return self.write_aside(plain).await;
        }
        while !self.is_done() {
            let written = limited(STALL_MAX, stream.write_vectored(&self.slices())).await?;
            self.take(written)?;
        }
        limited(STALL_MAX, stream.flush()).await
    }

    async fn write_aside(mut self, plain: &Plain) -> io::Result<()> {
        let mut aside = Aside { stream: Arc::new(plain.share()?), done: false };
        while !self.is_done() {
            let (stream, mut outgoing) = (aside.stream.clone(), self);
            let run = move || outgoing.write_while_patient(&stream).map(|()| outgoing);
            self = tokio::task::spawn_blocking(run).await??;
            if !self.is_done() {
                limited(STALL_MAX, plain.writable_again()).await?;
            }
        }
        aside.done = true;
        Ok(())
    }

    /// Writes until nothing is left, or nothing was taken for a while.
    fn write_while_patient(&mut self, mut stream: &TcpStream) -> io::Result<()> {
        while !self.is_done() {
            match stream.write_vectored(&self.slices()) {
                Ok(written) => self.take(written)?,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    if !is_writable(stream, PATIENCE)? {
                        return Ok(());
                    }
                }
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }
}

/// A connection that another thread writes to. When this drops before it is done, nothing more is written to it.
struct Aside {
    stream: Arc<TcpStream>,
    done: bool,
}

impl Drop for Aside {
    fn drop(&mut self) {
        if !self.done {
            // The thread's next write fails. It may be closed already.
            let _ = self.stream.shutdown(Shutdown::Both);
        }
    }
}
