//! gRPC between the processes of a cluster: channels and incoming connections, all made the same way.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use futures_util::{Stream, stream};
use hyper::rt::{Read, ReadBufCursor, Write};
use hyper_util::rt::TokioIo;
use tokio::sync::oneshot;
use tonic::transport::{Channel, Endpoint, Uri};

use crate::seam;

/// Time for a connection to stand.
const CONNECT_MAX: Duration = Duration::from_secs(2);
/// What a peer may send before it is read: per stream, and per connection.
const STREAM_WINDOW: u32 = 1 << 20;
const CONNECTION_WINDOW: u32 = 4 << 20;

/// Connects to `host:port`. The error says what happened, causes included.
pub async fn connect(address: &str) -> Result<Channel, String> {
    connect_watched(address).await.map(|(channel, _)| channel)
}

/// Connects likewise. The future resolves once the connection has ended, whoever ended it; a channel by itself
/// keeps quiet about that until it is used again.
pub async fn connect_watched(address: &str) -> Result<(Channel, impl Future<Output = ()> + use<>), String> {
    let (alive, ended) = oneshot::channel();
    // The first connection's; the channel makes further ones when it is used after that.
    let mut alive = Some(alive);
    let endpoint = Endpoint::from_shared(format!("http://{address}"))
        .map_err(|error| chain(&error))?
        .connect_timeout(CONNECT_MAX)
        .initial_stream_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW);
    let connector = tower::service_fn(move |uri: Uri| {
        let alive = alive.take();
        async move {
            let address = uri.authority().map_or("", |authority| authority.as_str());
            let stream = TokioIo::new(seam::connect(address).await?);
            Ok::<_, io::Error>(Watched { stream, _alive: alive })
        }
    });
    let channel = endpoint.connect_with_connector(connector).await.map_err(|error| chain(&error))?;
    Ok((channel, async move { drop(ended.await) }))
}

/// A connection whose drop is heard of.
struct Watched {
    stream: TokioIo<seam::Stream>,
    _alive: Option<oneshot::Sender<()>>,
}

impl Read for Watched {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: ReadBufCursor<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(context, buffer)
    }
}

impl Write for Watched {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(context, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        parts: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(context, parts)
    }
}

/// The connections of a listener, for tonic's server.
pub fn incoming(listener: seam::Listener) -> impl Stream<Item = io::Result<seam::Stream>> {
    stream::unfold(listener, |listener| async move { Some((listener.accept().await, listener)) })
}

/// An error and its causes in one line.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text = format!("{text}: {cause}");
        source = cause.source();
    }
    text
}

#[cfg(test)]
mod tests {
    #[tokio::test]
    async fn an_address_where_nobody_listens_is_an_error_that_says_why() {
        let listener = crate::seam::listen("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        drop(listener);
        let error = super::connect(&address).await.unwrap_err();
        assert!(error.contains("refused"), "{error}");
        assert!(super::connect("no such host:x").await.is_err());
    }
}
