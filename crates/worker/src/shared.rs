//! The one lock of a worker, and the delivery of what comes out from under it.
//!
//! Frames must reach a session in the order in which they were decided, so they are put into its bounded
//! channel before the lock is given back. Nothing ever waits under the lock.

use std::collections::{BTreeMap, HashMap};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};

use tandem_chassis::seam;
use tandem_proto::v1;
use tandem_types::{ClaimId, Time};
use tokio::sync::{mpsc, watch};

use tandem_engine::fake::FakeSpec;

use crate::core::{Core, Load, Output, PullOrder, SessionId};
use crate::metrics::Metrics;
use crate::spans::Spans;

/// Frames a session may be behind before it counts as lost: its router always reads.
pub(crate) const SESSION_QUEUE: usize = 1024;
/// Events a follower may be behind before its claim counts as broken.
pub(crate) const FOLLOW_QUEUE: usize = 1024;

/// What a session's stream is fed with.
pub(crate) type FrameSender = mpsc::Sender<v1::from_worker::Message>;
/// What a follower's stream is fed with.
pub(crate) type FollowSender = mpsc::Sender<v1::follow_event::Event>;

struct Inner {
    core: Core,
    sessions: BTreeMap<SessionId, FrameSender>,
    followers: HashMap<ClaimId, FollowSender>,
    spans: Spans,
    steps: u64,
}

/// A worker's state, shared between its step loop and its services.
pub(crate) struct Shared {
    inner: Mutex<Inner>,
    /// Wakes the step loop.
    wake: Box<dyn Fn() + Send + Sync>,
    pulls: mpsc::UnboundedSender<PullCommand>,
    /// The load, with a number that rises when something else that a report says has changed.
    load: watch::Sender<(Load, u64)>,
    /// The fake engine's `refuse=P`.
    refuses: Option<Refuses>,
    pub(crate) progress: StepProgress,
    pub(crate) metrics: Arc<Metrics>,
}

/// For the task that owns all pulls. Unbounded by type, bounded in fact: at most two per leg, and legs are
/// bounded by `legs_max`.
#[derive(Debug)]
pub(crate) enum PullCommand {
    /// Begin.
    Start(Box<PullOrder>),
    /// Stop and report.
    Stop(tandem_batching::SequenceId),
}

impl Shared {
    pub(crate) fn new(
        core: Core,
        metrics: Arc<Metrics>,
        refuses: Option<Refuses>,
        wake: Box<dyn Fn() + Send + Sync>,
    ) -> (Arc<Shared>, mpsc::UnboundedReceiver<PullCommand>) {
        let (pulls, orders) = mpsc::unbounded_channel();
        let (load, _) = watch::channel((core.load(), 0));
        let inner = Inner {
            core,
            sessions: BTreeMap::new(),
            followers: HashMap::new(),
            spans: Spans::default(),
            steps: 0,
        };
        let shared = Shared {
            inner: Mutex::new(inner),
            wake,
            pulls,
            load,
            refuses,
            progress: StepProgress::default(),
            metrics,
        };
        (Arc::new(shared), orders)
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        // A panic under the lock is a bug that has already been reported; the state may be half-changed, so
        // going on would risk other requests' bytes.
        self.inner.lock().unwrap_or_else(|_| {
            tracing::error!("a panic has left this worker's state half-changed; stopping");
            std::process::abort()
        })
    }

    /// Changes the state, delivers what follows from it, and wakes the step loop.
    pub(crate) fn change<R>(&self, change: impl FnOnce(&mut Core, Time) -> R) -> R {
        let result = self.step(change);
        (self.wake)();
        result
    }

    /// As `change`, from the step loop itself.
    pub(crate) fn step<R>(&self, change: impl FnOnce(&mut Core, Time) -> R) -> R {
        let now = seam::now();
        let mut inner = self.lock();
        let result = change(&mut inner.core, now);
        self.deliver(&mut inner, now);
        result
    }

    /// Looks, changes nothing.
    pub(crate) fn look<R>(&self, look: impl FnOnce(&Core) -> R) -> R {
        look(&self.lock().core)
    }

    /// The load, as it changes.
    pub(crate) fn watch_load(&self) -> watch::Receiver<(Load, u64)> {
        self.load.subscribe()
    }

    /// Role or state has changed: report it although the load is the same.
    pub(crate) fn announce(&self) {
        self.load.send_modify(|known| known.1 += 1);
    }

    pub(crate) fn attach_session(&self, session: SessionId, frames: FrameSender) {
        self.lock().sessions.insert(session, frames);
    }

    pub(crate) fn attach_follower(&self, claim: ClaimId, events: FollowSender) {
        self.lock().followers.insert(claim, events);
    }

    pub(crate) fn detach_follower(&self, claim: ClaimId) {
        self.lock().followers.remove(&claim);
    }

    /// Pullers that follow a lease here.
    pub(crate) fn claims(&self) -> usize {
        self.lock().followers.len()
    }

    /// Ends every session and every follower's stream: the worker is going.
    pub(crate) fn end_streams(&self) {
        let sessions: Vec<SessionId> = self.lock().sessions.keys().copied().collect();
        sessions.into_iter().for_each(|session| self.close_session(session));
        self.lock().followers.clear();
    }

    /// Ends a session from this side. Dropping its sender ends its stream.
    pub(crate) fn close_session(&self, session: SessionId) {
        let now = seam::now();
        let mut inner = self.lock();
        inner.sessions.remove(&session);
        inner.core.close_session(session, now);
        self.deliver(&mut inner, now);
        drop(inner);
        (self.wake)();
    }

    fn deliver(&self, inner: &mut Inner, now: Time) {
        loop {
            let output = inner.core.take_output();
            if output.is_empty() {
                break;
            }
            let mut frames: BTreeMap<SessionId, Vec<v1::Event>> = BTreeMap::new();
            for item in output {
                match item {
                    Output::Event { session, leg, event } => {
                        frames.entry(session).or_default().push(v1::Event { leg, event: Some(event) });
                    }
                    Output::Follow { claim, event, last } => {
                        let sender = if last {
                            inner.followers.remove(&claim)
                        } else {
                            inner.followers.get(&claim).cloned()
                        };
                        // A follower that does not read loses its claim when its stream is dropped.
                        if let Some(sender) = sender
                            && sender.try_send(event).is_err()
                        {
                            inner.followers.remove(&claim);
                        }
                    }
                    Output::Pull(order) => {
                        let _ = self.pulls.send(PullCommand::Start(order));
                    }
                    Output::StopPull(sequence) => {
                        let _ = self.pulls.send(PullCommand::Stop(sequence));
                    }
                    Output::CloseSession(session) => {
                        inner.sessions.remove(&session);
                    }
                    Output::Stage(change) => inner.spans.change(*change),
                    Output::Transferred { sequence, transfer } => inner.spans.transferred(sequence, transfer),
                    Output::Left(report) => {
                        inner.spans.left(&report);
                        self.metrics.observe_leg(&report);
                    }
                }
            }
            inner.steps += 1;
            for (session, events) in frames {
                let frame = v1::from_worker::Message::Frame(v1::Frame { step: inner.steps, events });
                let sent = inner.sessions.get(&session).map(|frames| frames.try_send(frame).is_ok());
                if sent == Some(false) {
                    tracing::warn!(session = session.0, "router does not read its session; closing it");
                    inner.sessions.remove(&session);
                    inner.core.close_session(session, now);
                }
            }
        }
        let load = inner.core.load();
        self.load.send_if_modified(|known| std::mem::replace(&mut known.0, load) != load);
    }
}

/// How the step loop fares, readable without the lock: a hung step must not stop the beats that tell of it.
#[derive(Debug, Default)]
pub(crate) struct StepProgress {
    done: AtomicU64,
    started: AtomicU64,
    expected: AtomicU64,
}

impl StepProgress {
    /// A step begins; `expected` nanoseconds, 0 if unknown.
    pub(crate) fn begin(&self, now: Time, expected: std::time::Duration) {
        self.expected.store(expected.as_nanos() as u64, Ordering::Relaxed);
        self.started.store(now.0.max(1), Ordering::Release);
    }

    /// The running step is done.
    pub(crate) fn end(&self) {
        self.done.fetch_add(1, Ordering::Relaxed);
        self.started.store(0, Ordering::Release);
    }

    /// What a beat says.
    pub(crate) fn beat(&self, now: Time, admitted: u64) -> v1::Beat {
        let started = self.started.load(Ordering::Acquire);
        let age = if started == 0 { 0 } else { now.since(Time(started)).as_micros() as u64 };
        v1::Beat {
            steps_done: self.done.load(Ordering::Relaxed),
            step_age_us: age,
            step_expected_us: self.expected.load(Ordering::Relaxed) / 1000,
            step_running: started != 0,
            admitted,
        }
    }
}

/// The fake engine's `refuse=P`: which Starts are refused, by a seeded draw each.
pub(crate) struct Refuses {
    share: f64,
    seed: u64,
    drawn: AtomicU64,
}

impl Refuses {
    pub(crate) fn new(spec: &FakeSpec) -> Refuses {
        Refuses { share: spec.refuse, seed: spec.seed, drawn: AtomicU64::new(0) }
    }

    fn draw(&self) -> bool {
        let n = self.drawn.fetch_add(1, Ordering::Relaxed);
        tandem_engine::fake::chance(self.seed, n, self.share)
    }
}

impl Shared {
    /// Whether the fake engine was told to refuse this Start.
    pub(crate) fn refuses(&self) -> bool {
        self.refuses.as_ref().is_some_and(Refuses::draw)
    }
}
