//! Serves an [`axum::Router`] on a listener with the limits every HTTP port needs: time for headers, number
//! of connections, and an end that waits a little for answers under way.

use std::convert::Infallible;
use std::io;
use std::pin::Pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use bytes::Bytes;
use hyper::body::{Frame, Incoming, SizeHint};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use tandem_types::Time;
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt, ReadBuf};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tower::ServiceExt;

use crate::seam::{self, Listener, Stream};
use crate::{Shutdown, Tasks};

/// The limits of a port.
#[derive(Clone, Debug)]
pub struct Limits {
    /// Open connections; further clients wait in the system's backlog.
    pub connections_max: usize,
    /// Time a client may take to send the head of a request: from when it connects, later from the head's first
    /// byte.
    pub header_timeout: Duration,
    /// Time that a connection may lie idle between two requests.
    pub idle_timeout: Duration,
    /// Time that an answer may wait for a client to read any of it.
    pub write_timeout: Duration,
    /// Bytes of a head, and of an answer that waits to be written.
    pub buffer_bytes: usize,
    /// Time that answers under way get once the process stops.
    pub grace: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Limits {
            connections_max: 16_384,
            header_timeout: Duration::from_secs(10),
            idle_timeout: Duration::from_secs(75),
            write_timeout: Duration::from_secs(30),
            buffer_bytes: 64 << 10,
            grace: Duration::from_secs(1),
        }
    }
}

/// Serves `router` until `shutdown` stops; a drain changes nothing here. Then no connection is accepted any
/// more, answers under way get the grace, and the rest is cut. Returns when all of that is over.
pub async fn serve(listener: Listener, router: Router, limits: Limits, shutdown: Shutdown) {
    let connections = Arc::new(Semaphore::new(limits.connections_max));
    let tasks = Tasks::new();
    let mut stopped = std::pin::pin!(shutdown.stopped());
    let limits = Arc::new(limits);
    loop {
        let (stream, permit) = tokio::select! {
            accepted = accept(&listener, &connections) => accepted,
            () = &mut stopped => break,
        };
        tasks.spawn(connection(stream, permit, router.clone(), limits.clone(), shutdown.clone()));
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
    limits: Arc<Limits>,
    shutdown: Shutdown,
) {
    // Whoever only connects costs a socket and this wait; buffers come with the first byte.
    let spoke = tokio::select! {
        spoke = seam::timeout(limits.header_timeout, stream.readable()) => spoke,
        () = shutdown.stopped() => return,
    };
    if !matches!(spoke, Ok(Ok(()))) {
        return;
    }
    let progress = Arc::new(Progress::new());
    let service = service_fn({
        let progress = progress.clone();
        move |request: hyper::Request<Incoming>| {
            progress.set(Phase::Answering);
            let (router, progress) = (router.clone(), progress.clone());
            async move {
                let request = request.map(Body::new);
                let response = router.oneshot(request).await.unwrap_or_else(|never| match never {});
                Ok::<_, Infallible>(response.map(|body| Answer { body, progress }))
            }
        }
    });
    let io = TokioIo::new(Watched { stream, progress: progress.clone() });
    let mut served = http1::Builder::new()
        .header_read_timeout(None)
        .max_buf_size(limits.buffer_bytes)
        .serve_connection(io, service);
    let mut stopped = std::pin::pin!(shutdown.stopped());
    let mut stopping = false;
    loop {
        let look_again = progress.deadline(&limits, seam::now());
        tokio::select! {
            // What has come is looked at before the clock is: this process may itself have been late.
            biased;
            ended = &mut served => {
                if let Err(error) = ended {
                    tracing::debug!(%error, "a connection broke");
                }
                return;
            }
            () = &mut stopped, if !stopping => {
                stopping = true;
                Pin::new(&mut served).graceful_shutdown();
            }
            () = seam::sleep_until(look_again) => match progress.overdue(&limits, seam::now()) {
                None => {}
                Some(Overdue::Head) => {
                    let mut stream = served.into_parts().io.into_inner().stream;
                    let too_slow = b"HTTP/1.1 408 Request Timeout\r\nconnection: close\r\ncontent-length: 0\r\n\r\n";
                    let _ = seam::timeout(Duration::from_secs(1), stream.write_all(too_slow)).await;
                    return;
                }
                Some(Overdue::Idle | Overdue::Write) => return,
            }
        }
    }
}

/// What a connection is at, and since when.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    /// Between two requests.
    Idle,
    /// A head has begun.
    Head,
    /// From a whole head to the end of its answer.
    Answering,
}

/// What has taken too long.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Overdue {
    Head,
    Idle,
    Write,
}

/// How far a connection is, as its socket and its answers see it.
#[derive(Debug)]
struct Progress {
    phase: Mutex<(Phase, Time)>,
    /// Since when the socket has taken nothing of what waits to be written, in nanoseconds; 0 if nothing waits.
    blocked: AtomicU64,
}

impl Progress {
    fn new() -> Progress {
        Progress { phase: Mutex::new((Phase::Head, seam::now())), blocked: AtomicU64::new(0) }
    }

    fn set(&self, phase: Phase) {
        *self.phase.lock().expect("nothing panics under this lock") = (phase, seam::now());
    }

    /// Bytes have come: of a head, if none was expected.
    fn received(&self) {
        let mut phase = self.phase.lock().expect("nothing panics under this lock");
        if phase.0 == Phase::Idle {
            *phase = (Phase::Head, seam::now());
        }
    }

    /// When to look at `overdue` again at the latest.
    fn deadline(&self, limits: &Limits, now: Time) -> Time {
        let (phase, since) = *self.phase.lock().expect("nothing panics under this lock");
        match phase {
            Phase::Head => since + limits.header_timeout,
            // A head may begin meanwhile, and an answer may block.
            Phase::Idle => (since + limits.idle_timeout).min(now + limits.header_timeout),
            Phase::Answering => now + limits.header_timeout.min(limits.write_timeout),
        }
    }

    fn overdue(&self, limits: &Limits, now: Time) -> Option<Overdue> {
        let (phase, since) = *self.phase.lock().expect("nothing panics under this lock");
        let blocked = self.blocked.load(Ordering::Relaxed);
        match phase {
            _ if blocked > 0 && now.since(Time(blocked)) >= limits.write_timeout => Some(Overdue::Write),
            Phase::Head if now.since(since) >= limits.header_timeout => Some(Overdue::Head),
            Phase::Idle if now.since(since) >= limits.idle_timeout => Some(Overdue::Idle),
            _ => None,
        }
    }
}

/// The body of an answer; once it has gone, the connection waits for the next request.
struct Answer {
    body: Body,
    progress: Arc<Progress>,
}

impl Drop for Answer {
    fn drop(&mut self) {
        self.progress.set(Phase::Idle);
    }
}

impl hyper::body::Body for Answer {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        Pin::new(&mut self.body).poll_frame(cx)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

/// A socket that says what it is at.
struct Watched {
    stream: Stream,
    progress: Arc<Progress>,
}

impl Watched {
    fn wrote(&self, poll: Poll<io::Result<usize>>) -> Poll<io::Result<usize>> {
        match &poll {
            Poll::Ready(_) => self.progress.blocked.store(0, Ordering::Relaxed),
            Poll::Pending => {
                // The first of them counts.
                let now = seam::now().0.max(1);
                let _ = self.progress.blocked.compare_exchange(0, now, Ordering::Relaxed, Ordering::Relaxed);
            }
        }
        poll
    }
}

impl AsyncRead for Watched {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buf.filled().len();
        ready!(Pin::new(&mut self.stream).poll_read(cx, buf))?;
        if buf.filled().len() > before {
            self.progress.received();
        }
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Watched {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let poll = Pin::new(&mut self.stream).poll_write(cx, buf);
        self.wrote(poll)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let poll = Pin::new(&mut self.stream).poll_write_vectored(cx, bufs);
        self.wrote(poll)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }
}
