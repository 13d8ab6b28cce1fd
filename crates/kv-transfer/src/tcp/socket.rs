//! A connection, plain or over TLS, and how often it wakes its reader.

use std::io::{self, IoSlice, IoSliceMut};
use std::os::fd::{AsFd, AsRawFd};
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, Interest, ReadBuf};
use tokio::net::TcpStream;

/// A puller sleeps until so many bytes are there, or all that are still to come. Otherwise it wakes up for every
/// segment, and where cores are few it takes them from the sender.
const LOW_WATER_BYTES: usize = 512 << 10;
/// Fewer bytes are not worth the system calls.
const LOW_WATER_MIN: usize = 64 << 10;

/// One lane's connection.
pub(crate) enum Socket {
    Plain(Plain),
    #[cfg(feature = "tls")]
    Tls(Box<tokio_rustls::TlsStream<TcpStream>>),
}

/// Without TLS.
pub(crate) struct Plain {
    stream: TcpStream,
    /// Bytes that wake the reader.
    low_water: usize,
}

impl Socket {
    pub(crate) fn plain(stream: TcpStream) -> Socket {
        Socket::Plain(Plain { stream, low_water: 1 })
    }

    /// Reads what there is into the slices, none of which is empty: at least a byte, or none at the end. `rest` bytes
    /// are still to come.
    pub(super) async fn read_vectored(
        &mut self,
        slices: &mut [IoSliceMut<'_>],
        rest: usize,
    ) -> io::Result<usize> {
        match self {
            Socket::Plain(plain) => loop {
                plain.wake_for(rest)?;
                plain.stream.readable().await?;
                match plain.stream.try_read_vectored(slices) {
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                    read => return read,
                }
            },
            #[cfg(feature = "tls")]
            Socket::Tls(stream) => tokio::io::AsyncReadExt::read(stream, &mut slices[0]).await,
        }
    }

    /// All is here that was to come; whatever comes next is short.
    pub(super) fn rest(&mut self) -> io::Result<()> {
        match self {
            Socket::Plain(plain) => plain.wake_for(0),
            #[cfg(feature = "tls")]
            Socket::Tls(_) => Ok(()),
        }
    }
}

impl Plain {
    /// The same connection for a thread that does without the runtime. Nothing on it blocks.
    pub(super) fn share(&self) -> io::Result<std::net::TcpStream> {
        Ok(self.stream.as_fd().try_clone_to_owned()?.into())
    }

    /// Waits until the socket takes more, after others than the runtime have written to it.
    pub(super) async fn writable_again(&self) -> io::Result<()> {
        // The runtime believes what it has seen last until somebody tells it otherwise.
        let look = || match is_writable(&self.stream, Duration::ZERO)? {
            true => Ok(()),
            false => Err(io::ErrorKind::WouldBlock.into()),
        };
        self.stream.async_io(Interest::WRITABLE, look).await
    }

    fn wake_for(&mut self, rest: usize) -> io::Result<()> {
        let wanted = if rest < LOW_WATER_MIN { 1 } else { rest.min(LOW_WATER_BYTES) };
        if wanted == self.low_water {
            return Ok(());
        }
        set(&self.stream, libc::SO_RCVLOWAT, wanted)?;
        self.low_water = wanted;
        Ok(())
    }
}

/// Whether the socket takes more now, or within so much time.
pub(super) fn is_writable(stream: &impl AsRawFd, limit: Duration) -> io::Result<bool> {
    let mut asked = libc::pollfd { fd: stream.as_raw_fd(), events: libc::POLLOUT, revents: 0 };
    let limit = libc::c_int::try_from(limit.as_millis()).unwrap_or(libc::c_int::MAX);
    // SAFETY: a plain system call on an open descriptor, with one entry that lives for the call.
    match unsafe { libc::poll(&raw mut asked, 1, limit) } {
        -1 => match io::Error::last_os_error() {
            error if error.kind() == io::ErrorKind::Interrupted => Ok(false),
            error => Err(error),
        },
        ready => Ok(ready > 0),
    }
}

/// Sets an option of the socket to a number of bytes.
fn set(stream: &TcpStream, option: libc::c_int, bytes: usize) -> io::Result<()> {
    let value = bytes as libc::c_int;
    // SAFETY: a plain system call on an open descriptor; the value lives for the call and has the length that is
    // said.
    let set = unsafe {
        libc::setsockopt(
            stream.as_raw_fd(),
            libc::SOL_SOCKET,
            option,
            (&raw const value).cast(),
            size_of_val(&value) as libc::socklen_t,
        )
    };
    if set == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

impl AsyncRead for Socket {
    fn poll_read(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Socket::Plain(plain) => Pin::new(&mut plain.stream).poll_read(context, buffer),
            #[cfg(feature = "tls")]
            Socket::Tls(stream) => Pin::new(stream).poll_read(context, buffer),
        }
    }
}

impl AsyncWrite for Socket {
    fn poll_write(self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Socket::Plain(plain) => Pin::new(&mut plain.stream).poll_write(context, bytes),
            #[cfg(feature = "tls")]
            Socket::Tls(stream) => Pin::new(stream).poll_write(context, bytes),
        }
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Socket::Plain(plain) => Pin::new(&mut plain.stream).poll_write_vectored(context, slices),
            #[cfg(feature = "tls")]
            Socket::Tls(stream) => Pin::new(stream).poll_write_vectored(context, slices),
        }
    }

    fn is_write_vectored(&self) -> bool {
        match self {
            Socket::Plain(plain) => plain.stream.is_write_vectored(),
            #[cfg(feature = "tls")]
            Socket::Tls(stream) => stream.is_write_vectored(),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Socket::Plain(plain) => Pin::new(&mut plain.stream).poll_flush(context),
            #[cfg(feature = "tls")]
            Socket::Tls(stream) => Pin::new(stream).poll_flush(context),
        }
    }

    fn poll_shutdown(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Socket::Plain(plain) => Pin::new(&mut plain.stream).poll_shutdown(context),
            #[cfg(feature = "tls")]
            Socket::Tls(stream) => Pin::new(stream).poll_shutdown(context),
        }
    }
}
