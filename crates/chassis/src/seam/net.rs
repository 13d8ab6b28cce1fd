//! Listeners and streams that are TCP in production and memory in a simulated world.

use std::io::{self, IoSlice};
use std::net::SocketAddr;
use std::pin::Pin;
use std::task::{Context, Poll};

use tokio::io::{AsyncRead, AsyncWrite, DuplexStream, ReadBuf};
use tokio::net::{TcpListener, TcpStream, ToSocketAddrs, lookup_host};
use tonic::transport::server::Connected;

use super::simulation::Port;

/// Takes connections in; made by [`listen`](super::listen).
#[derive(Debug)]
pub struct Listener(Way);

#[derive(Debug)]
enum Way {
    Tcp(TcpListener),
    Simulated(Port),
}

impl Listener {
    pub(super) fn simulated(port: Port) -> Listener {
        Listener(Way::Simulated(port))
    }

    /// The next connection, without Nagle's delay. An error is one connection's; the next may do better.
    pub async fn accept(&self) -> io::Result<Stream> {
        match &self.0 {
            Way::Tcp(listener) => {
                let (stream, _) = listener.accept().await?;
                if let Err(error) = stream.set_nodelay(true) {
                    tracing::debug!(%error, "a connection keeps its delay");
                }
                Ok(Stream::Tcp(stream))
            }
            Way::Simulated(port) => Ok(Stream::Simulated(port.accept().await)),
        }
    }

    /// Where it listens.
    pub fn local_addr(&self) -> io::Result<SocketAddr> {
        match &self.0 {
            Way::Tcp(listener) => listener.local_addr(),
            Way::Simulated(port) => Ok(port.address()),
        }
    }
}

impl From<TcpListener> for Listener {
    fn from(listener: TcpListener) -> Listener {
        Listener(Way::Tcp(listener))
    }
}

/// A connection; made by [`connect`](super::connect) and [`Listener::accept`].
#[derive(Debug)]
pub enum Stream {
    /// A socket of the system.
    Tcp(TcpStream),
    /// Memory of this process.
    Simulated(DuplexStream),
}

impl Stream {
    /// Until there may be something to read, or the other end has closed.
    pub async fn readable(&self) -> io::Result<()> {
        match self {
            Stream::Tcp(stream) => stream.readable().await,
            // It has no such word; whoever reads waits then.
            Stream::Simulated(_) => Ok(()),
        }
    }
}

impl From<TcpStream> for Stream {
    fn from(stream: TcpStream) -> Stream {
        Stream::Tcp(stream)
    }
}

impl AsyncRead for Stream {
    fn poll_read(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Stream::Tcp(stream) => Pin::new(stream).poll_read(context, buffer),
            Stream::Simulated(stream) => Pin::new(stream).poll_read(context, buffer),
        }
    }
}

impl AsyncWrite for Stream {
    fn poll_write(self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Stream::Tcp(stream) => Pin::new(stream).poll_write(context, bytes),
            Stream::Simulated(stream) => Pin::new(stream).poll_write(context, bytes),
        }
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        parts: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Stream::Tcp(stream) => Pin::new(stream).poll_write_vectored(context, parts),
            Stream::Simulated(stream) => Pin::new(stream).poll_write_vectored(context, parts),
        }
    }

    fn is_write_vectored(&self) -> bool {
        match self {
            Stream::Tcp(stream) => stream.is_write_vectored(),
            Stream::Simulated(stream) => stream.is_write_vectored(),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Stream::Tcp(stream) => Pin::new(stream).poll_flush(context),
            Stream::Simulated(stream) => Pin::new(stream).poll_flush(context),
        }
    }

    fn poll_shutdown(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Stream::Tcp(stream) => Pin::new(stream).poll_shutdown(context),
            Stream::Simulated(stream) => Pin::new(stream).poll_shutdown(context),
        }
    }
}

impl Connected for Stream {
    type ConnectInfo = ();

    fn connect_info(&self) {}
}

/// The first address that a name stands for.
pub(super) async fn one_of(address: impl ToSocketAddrs) -> io::Result<SocketAddr> {
    let nobody = || io::Error::new(io::ErrorKind::AddrNotAvailable, "the name stands for no address");
    lookup_host(address).await?.next().ok_or_else(nobody)
}
