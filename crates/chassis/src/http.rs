//! Serves an [`axum::Router`] on a listener with the limits every HTTP port needs: time for headers, number
//! of connections, and an end that waits a little for answers under way.

use std::convert::Infallible;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tower::ServiceExt;

use crate::seam::{self, Listener, Stream};
use crate::{Shutdown, Tasks};

/// The limits of a port.
#[derive(Clone, Debug)]
pub struct Limits {
    /// Open connections; further clients wait in the system's backlog.
    pub connections_max: usize,
    /// Time a client may take to send the head of a request, also between two requests of a connection.
    pub header_timeout: Duration,
    /// Time that answers under way get once the process stops.
    pub grace: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Limits {
            connections_max: 4096,
            header_timeout: Duration::from_secs(10),
            grace: Duration::from_secs(1),
        }
    }
}

/// Serves `router` until `shutdown` stops; a drain changes nothing here. Then no connection is accepted any
/// more, answers under way get the grace, and the rest is cut. Returns when all of that is over.
pub async fn serve(listener: Listener, router: Router, limits: Limits, shutdown: Shutdown) {
    let connections = Arc::new(Semaphore::new(limits.connections_max));
    let tasks = Tasks::new();
    let mut stopped = pin!(shutdown.stopped());
    loop {
        let (stream, permit) = tokio::select! {
            accepted = accept(&listener, &connections) => accepted,
            () = &mut stopped => break,
        };
        tasks.spawn(connection(stream, permit, router.clone(), limits.header_timeout, shutdown.clone()));
    }
    drop(listener);
    tasks.shutdown(limits.grace).await;
}

async fn accept(listener: &Listener, connections: &Arc<Semaphore>) -> (Stream, OwnedSemaphorePermit) {
    let permit = connections.clone().acquire_owned().await.expect("the semaphore is never closed");
    loop {
        match listener.accept().await {
            Ok(stream) => return (stream, permit),
            Err(error) => {
                // Out of file descriptors, or a client that gave up in the backlog: the next may do better.
                tracing::warn!(%error, "a connection could not be accepted");
                seam::sleep(Duration::from_millis(50)).await;
            }
        }
    }
}

async fn connection(
    stream: Stream,
    _permit: OwnedSemaphorePermit,
    router: Router,
    header_timeout: Duration,
    shutdown: Shutdown,
) {
    let service = service_fn(move |request: hyper::Request<Incoming>| {
        let router = router.clone();
        async move {
            Ok::<_, Infallible>(
                router.oneshot(request.map(Body::new)).await.unwrap_or_else(|never| match never {}),
            )
        }
    });
    let served = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(header_timeout)
        .serve_connection(TokioIo::new(stream), service);
    let mut served = pin!(served);
    let mut stopped = pin!(shutdown.stopped());
    let mut stopping = false;
    loop {
        tokio::select! {
            ended = &mut served => {
                if let Err(error) = ended {
                    tracing::debug!(%error, "a connection broke");
                }
                return;
            }
            () = &mut stopped, if !stopping => {
                stopping = true;
                served.as_mut().graceful_shutdown();
            }
        }
    }
}
