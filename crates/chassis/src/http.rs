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
    /// Time after which one that lies idle gives its buffers back and keeps a socket only.
    pub linger: Duration,
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
            linger: Duration::from_secs(1),
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

/// One connection. While it is silent it costs a socket and this wait: what serving it takes comes with the first
/// byte, and goes when it lies idle.
async fn connection(
    stream: Stream,
    _permit: OwnedSemaphorePermit,
    router: Router,
    limits: Arc<Limits>,
    shutdown: Shutdown,
) {
    let mut silence = limits.header_timeout;
    let mut socket = Socket { stream, before: Bytes::new() };
    loop {
        if socket.before.is_empty() {
            let spoke = tokio::select! {
                spoke = seam::timeout(silence, socket.stream.readable()) => spoke,
                () = shutdown.stopped() => return,
            };
            if !matches!(spoke, Ok(Ok(()))) {
                return;
            }
        }
        match Box::pin(served(socket, router.clone(), &limits, &shutdown)).await {
            Some(idle) => socket = idle,
            None => return,
        }
        silence = limits.idle_timeout.saturating_sub(limits.linger);
    }
}

/// Serves requests until the connection is over, or lies idle: then it comes back.
async fn served(socket: Socket, router: Router, limits: &Limits, shutdown: &Shutdown) -> Option<Socket> {
    let progress = Arc::new(Progress::new());
    let service = service_fn({
        let progress = progress.clone();
        move |request: hyper::Request<Incoming>| {
            progress.set(Phase::Answering);
            let (router, progress) = (router.clone(), progress.clone());
            Box::pin(async move {
                let request = request.map(Body::new);
                let response = router.oneshot(request).await.unwrap_or_else(|never| match never {});
                Ok::<_, Infallible>(response.map(|body| Answer { body, progress }))
            })
        }
    });
    let io = TokioIo::new(Watched { socket, progress: progress.clone() });
    let mut served = http1::Builder::new()
        .header_read_timeout(None)
        .max_buf_size(limits.buffer_bytes)
        .serve_connection(io, service);
    let mut stopped = std::pin::pin!(shutdown.stopped());
    let mut stopping = false;
    loop {
        let look_again = progress.deadline(limits, seam::now());
        tokio::select! {
            // What has come is looked at before the clock is: this process may itself have been late.
            biased;
            ended = &mut served => {
                if let Err(error) = ended {
                    tracing::debug!(%error, "a connection broke");
                }
                return None;
            }
            () = &mut stopped, if !stopping => {
                stopping = true;
                Pin::new(&mut served).graceful_shutdown();
            }
            () = seam::sleep_until(look_again) => match progress.overdue(limits, seam::now()) {
                None => {}
                Some(Overdue::Head) => {
                    let mut stream = served.into_parts().io.into_inner().socket.stream;
                    let too_slow = b"HTTP/1.1 408 Request Timeout\r\nconnection: close\r\ncontent-length: 0\r\n\r\n";
                    let _ = seam::timeout(Duration::from_secs(1), stream.write_all(too_slow)).await;
                    return None;
                }
                Some(Overdue::Write) => return None,
                Some(Overdue::Idle) if stopping => return None,
                Some(Overdue::Idle) => {
                    // Where a request or an answer is not over, hyper goes on with it and closes afterwards.
                    stopping = true;
                    Pin::new(&mut served).graceful_shutdown();
                    let over = std::future::poll_fn(|cx| Poll::Ready(served.poll_without_shutdown(cx))).await;
                    match over {
                        Poll::Pending => {}
                        Poll::Ready(Err(_)) => return None,
                        Poll::Ready(Ok(())) => {
                            let parts = served.into_parts();
                            let stream = parts.io.into_inner().socket.stream;
                            // Of a next head there may be bytes already; a slice, even of none, would keep the buffer.
                            return Some(Socket { stream, before: Bytes::copy_from_slice(&parts.read_buf) });
                        }
                    }
                }
            }
        }
    }
}

/// Connections are looked at no more often than this.
const LOOK_LEAST: Duration = Duration::from_millis(10);

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
    /// Not too long for the client, but for its buffers.
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
        // While something happens the phase may change at any time, and it is looked at now and then.
        let soon = now + limits.linger.max(LOOK_LEAST);
        match phase {
            Phase::Head => soon.min(since + limits.header_timeout),
            Phase::Idle if self.blocked.load(Ordering::Relaxed) == 0 => since + limits.linger,
            Phase::Idle | Phase::Answering => soon,
        }
    }

    fn overdue(&self, limits: &Limits, now: Time) -> Option<Overdue> {
        let (phase, since) = *self.phase.lock().expect("nothing panics under this lock");
        let blocked = self.blocked.load(Ordering::Relaxed);
        match phase {
            _ if blocked > 0 && now.since(Time(blocked)) >= limits.write_timeout => Some(Overdue::Write),
            Phase::Head if now.since(since) >= limits.header_timeout => Some(Overdue::Head),
            Phase::Idle if blocked == 0 && now.since(since) >= limits.linger => Some(Overdue::Idle),
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

/// A connection's socket, and bytes that were read from it before their turn.
struct Socket {
    stream: Stream,
    before: Bytes,
}

/// A socket that says what it is at.
struct Watched {
    socket: Socket,
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
        if self.socket.before.is_empty() {
            ready!(Pin::new(&mut self.socket.stream).poll_read(cx, buf))?;
        } else {
            let count = buf.remaining().min(self.socket.before.len());
            buf.put_slice(&self.socket.before.split_to(count));
        }
        if buf.filled().len() > before {
            self.progress.received();
        }
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Watched {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let poll = Pin::new(&mut self.socket.stream).poll_write(cx, buf);
        self.wrote(poll)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.socket.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.socket.stream).poll_shutdown(cx)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let poll = Pin::new(&mut self.socket.stream).poll_write_vectored(cx, bufs);
        self.wrote(poll)
    }

    fn is_write_vectored(&self) -> bool {
        self.socket.stream.is_write_vectored()
    }
}
