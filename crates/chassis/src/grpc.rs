//! gRPC between the processes of a cluster: channels and incoming connections, all made the same way.

use std::io;
use std::time::Duration;

use futures_util::{Stream, stream};
use hyper_util::rt::TokioIo;
use tonic::transport::{Channel, Endpoint, Uri};

use crate::seam;

/// Time for a connection to stand.
const CONNECT_MAX: Duration = Duration::from_secs(2);
/// What a peer may send before it is read: per stream, and per connection.
const STREAM_WINDOW: u32 = 1 << 20;
const CONNECTION_WINDOW: u32 = 4 << 20;

/// Connects to `host:port`. The error says what happened, causes included.
pub async fn connect(address: &str) -> Result<Channel, String> {
    let endpoint = Endpoint::from_shared(format!("http://{address}"))
        .map_err(|error| chain(&error))?
        .connect_timeout(CONNECT_MAX)
        .initial_stream_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW);
    let connector = tower::service_fn(|uri: Uri| async move {
        let address = uri.authority().map_or("", |authority| authority.as_str());
        seam::connect(address).await.map(TokioIo::new)
    });
    endpoint.connect_with_connector(connector).await.map_err(|error| chain(&error))
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
