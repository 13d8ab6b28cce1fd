//! The router's end of one worker's session: sends Starts, hands each leg its events, notices loss.
//!
//! Always holds: every leg that was opened gets exactly one last event (a terminal of the worker's, or
//! `Lost`), and a leg that is dropped before it is cancelled at once.

use std::collections::{HashMap, HashSet};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use futures_util::{FutureExt, Stream, StreamExt, TryStreamExt};
use tandem_chassis::{Shutdown, fail, seam};
use tandem_placement::ledger::{self, Ledger};
use tandem_proto::v1::{self, event, from_worker, to_worker};
use tandem_proto::{PROTOCOL_MAX, PROTOCOL_MIN, Sequence};
use tandem_types::{Epoch, Incarnation, LeaseId, Role, Time, WorkerId, WorkerState};
use tokio::sync::{mpsc, watch};

use crate::breaker::Breaker;
use crate::prefixes::Prefixes;

mod work;

use work::Work;

/// Both ends of a session beat this often.
const BEAT: Duration = Duration::from_millis(200);
/// So long without a beat, and the worker gets no new work.
const SUSPECT_AFTER: Duration = Duration::from_millis(3 * 200);
/// By so much at most that is put off where this process itself gets no time to run.
const LATE_MAX: Duration = Duration::from_secs(2);
/// So long without a beat, and the stream is given up.
const SILENCE_MAX: Duration = Duration::from_secs(3);
/// Leases are renewed this often, several times within their time to live.
const RENEW: Duration = Duration::from_secs(2);
/// A step may take the greater of this and twenty times what was expected.
const STEP_MAX: Duration = Duration::from_secs(2);
/// Messages to a worker that may wait for the network; a link that falls behind is closed.
const OUTBOUND: usize = 8192;
/// Events of a leg that may wait: beyond `PAUSE_AT` the leg is paused, a full queue ends it.
const LEG_QUEUE: usize = 4096;
const PAUSE_AT: usize = 512;

/// What a leg hears from its worker. The last one is `Finished`, `Released`, `Refused`, `Preempted`, `Failed`
/// or `Lost`.
#[derive(Debug)]
pub(crate) enum LegEvent {
    /// From the worker.
    Worker(event::Event),
    /// The session is gone, or the worker's step hangs.
    Lost(&'static str),
}

/// What the worker has said of itself.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Report {
    pub(crate) role: Option<Role>,
    pub(crate) epoch: Epoch,
    pub(crate) draining: bool,
    pub(crate) load: v1::Load,
    /// Up to which of our messages `load` counts.
    pub(crate) admitted: u64,
}

/// A worker's session, connected or trying to be.
pub(crate) struct Link {
    pub(crate) worker: WorkerId,
    pub(crate) incarnation: Incarnation,
    address: String,
    router: String,
    router_incarnation: Incarnation,
    prefixes: Arc<Prefixes>,
    state: Mutex<LinkState>,
    changed: watch::Sender<u64>,
    sent: AtomicU64,
}

#[derive(Default)]
struct LinkState {
    outbound: Option<mpsc::Sender<to_worker::Message>>,
    legs: HashMap<u32, LegSlot>,
    next_leg: u32,
    leases: HashSet<LeaseId>,
    /// The last report's number on its stream, and that of the last change which the index has taken in.
    reported: u64,
    indexed: u64,
    heard: Time,
    /// How late this process's own clock has rung of late: so much longer a worker may seem silent.
    late: Duration,
    hung: bool,
    breaker: Breaker,
    report: Report,
    /// What we have there.
    ledger: Ledger,
    /// Why the last connection ended, for operators.
    trouble: String,
}

struct LegSlot {
    events: mpsc::Sender<LegEvent>,
    paused: bool,
    /// The number of the message that started it, and its tokens so far.
    sequence: u64,
    tokens: u32,
    work: Work,
}

/// Why a leg could not be opened.
#[derive(Debug, thiserror::Error)]
#[error("{worker} cannot be reached: {why}")]
pub(crate) struct NotConnected {
    worker: WorkerId,
    why: String,
}

impl Link {
    pub(crate) fn new(
        worker: WorkerId,
        incarnation: Incarnation,
        address: String,
        router: &str,
        router_incarnation: Incarnation,
        prefixes: Arc<Prefixes>,
    ) -> Arc<Link> {
        Arc::new(Link {
            prefixes,
            worker,
            incarnation,
            address,
            router: router.to_owned(),
            router_incarnation,
            state: Mutex::default(),
            changed: watch::Sender::new(0),
            sent: AtomicU64::new(0),
        })
    }

    fn lock(&self) -> MutexGuard<'_, LinkState> {
        self.state.lock().expect("nothing panics under this lock")
    }

    /// Rises when the link's state changes in a way that matters for placing.
    pub(crate) fn watch(&self) -> watch::Receiver<u64> {
        self.changed.subscribe()
    }

    /// `ready` if new work may go there.
    pub(crate) fn state(&self, now: Time) -> WorkerState {
        let state = self.lock();
        match &state.outbound {
            None => WorkerState::Dead,
            Some(_) if state.report.draining => WorkerState::Draining,
            Some(_)
                if state.hung
                    || state.breaker.is_open(now)
                    || now.since(state.heard) > SUSPECT_AFTER + state.late =>
            {
                WorkerState::Suspect
            }
            Some(_) => WorkerState::Ready,
        }
    }

    /// What the worker last said of itself.
    pub(crate) fn report(&self) -> Report {
        self.lock().report.clone()
    }

    /// Why there is no connection; empty if there is one.
    pub(crate) fn trouble(&self) -> String {
        self.lock().trouble.clone()
    }

    /// Legs open here, and the prompt tokens of those that the last report does not count yet.
    pub(crate) fn in_flight(&self) -> (u32, u64) {
        let state = self.lock();
        let prompts = state
            .legs
            .values()
            .filter(|leg| matches!(leg.work, Work::Prompt { .. }) && leg.sequence > state.report.admitted);
        (state.legs.len() as u32, prompts.map(|leg| u64::from(leg.tokens)).sum())
    }

    /// The work there now, ours by our own books and that of others by its last report.
    pub(crate) fn load(&self, now: Time) -> ledger::Load {
        let mut state = self.lock();
        let by_deadline = state.report.model().filter(|_| state.report.paced());
        state.ledger.load(by_deadline, now)
    }

    /// Sends a Start; the answer, and everything after, comes through the leg.
    pub(crate) fn open(self: &Arc<Self>, mut start: v1::Start) -> Result<Leg, NotConnected> {
        let (events, receiver) = mpsc::channel(LEG_QUEUE);
        let mut state = self.lock();
        let not_connected = |why: &str| NotConnected { worker: self.worker.clone(), why: why.to_owned() };
        let Some(outbound) = state.outbound.clone() else {
            return Err(not_connected(if state.trouble.is_empty() {
                "no session yet"
            } else {
                &state.trouble
            }));
        };
        state.next_leg = state.next_leg.wrapping_add(1).max(1);
        let name = state.next_leg;
        start.leg = name;
        start.worker_incarnation = self.incarnation.0;
        start.epoch = state.report.epoch.0;
        let (work, prompt) = work::of(&start, &state.report, seam::now());
        // Under the lock, so that the order of the channel is the order of the numbers.
        if outbound.try_send(to_worker::Message::Start(start)).is_err() {
            return Err(not_connected("its session does not keep up"));
        }
        let sequence = self.sent.fetch_add(1, Ordering::Relaxed) + 1;
        let slot = LegSlot { events, paused: false, sequence, tokens: prompt.tokens, work };
        state.begin(name, slot, prompt, seam::now());
        Ok(Leg { link: self.clone(), name, events: receiver, lease: None, over: false })
    }

    fn send(&self, state: &mut LinkState, message: to_worker::Message) {
        let Some(outbound) = &state.outbound else { return };
        if outbound.try_send(message).is_ok() {
            self.sent.fetch_add(1, Ordering::Relaxed);
        } else {
            // A cancel that cannot be sent must still happen: losing the session cancels everything.
            state.outbound = None;
            state.trouble = "its session does not keep up".into();
        }
    }

    /// Keeps the session up until `shutdown`, or until `gone` says that this incarnation will not come back.
    pub(crate) async fn run(self: Arc<Self>, shutdown: Shutdown, mut gone: watch::Receiver<bool>) {
        let mut pause = Duration::from_millis(50);
        loop {
            let began = seam::now();
            tokio::select! {
                why = std::panic::AssertUnwindSafe(self.serve()).catch_unwind() => {
                    // What one worker says must not cut it off for ever: as if the session had broken.
                    let why = why.unwrap_or_else(|_| "reading it panicked".to_owned());
                    // Said once; that it cannot be opened again is what `/admin/cluster` shows.
                    if self.lose(&why) {
                        tracing::warn!(worker = %self.worker, why, "session with worker ended");
                    }
                }
                () = shutdown.stopped() => break,
                _ = gone.wait_for(|gone| *gone) => break,
            }
            if seam::now().since(began) > SILENCE_MAX {
                pause = Duration::from_millis(50);
            }
            tokio::select! {
                () = seam::sleep(pause) => pause = (pause * 2).min(Duration::from_secs(1)),
                () = shutdown.stopped() => break,
                _ = gone.wait_for(|gone| *gone) => break,
            }
        }
        self.lose("the worker has left");
    }

    /// One connection, from hello to its end; says why it ended.
    async fn serve(&self) -> String {
        match self.connect().await {
            Ok((inbound, watch)) => self.read(inbound, watch).await,
            Err(why) => why,
        }
    }

    async fn connect(&self) -> Result<(impl Frames, tonic::Streaming<v1::WatchEvent>), String> {
        let channel = tandem_chassis::grpc::connect(&self.address).await?;
        let mut client = v1::worker_client::WorkerClient::new(channel)
            .max_decoding_message_size(64 << 20)
            .max_encoding_message_size(64 << 20);
        let (outbound, messages) = mpsc::channel(OUTBOUND);
        let hello = to_worker::Message::Hello(v1::Hello {
            router: self.router.clone(),
            router_incarnation: self.router_incarnation.0,
            worker_incarnation: self.incarnation.0,
            protocol_min: PROTOCOL_MIN,
            protocol_max: PROTOCOL_MAX,
        });
        outbound.try_send(hello).expect("the channel is new");
        let mut sequence = 0;
        let messages = tokio_stream::wrappers::ReceiverStream::new(messages).map(move |message| {
            sequence += 1;
            v1::ToWorker { sequence, message: Some(message) }
        });
        let opened = seam::timeout(SILENCE_MAX, client.session(messages));
        let inbound =
            opened.await.map_err(|_| "no answer to hello")?.map_err(|s| s.message().to_owned())?.into_inner();
        let mut inbound = fail::through(inbound, &self.worker.0, fail_point);
        let first = seam::timeout(SILENCE_MAX, inbound.try_next());
        let first = first.await.map_err(|_| "no welcome came")?.map_err(|s| s.message().to_owned())?;
        let Some(from_worker::Message::Welcome(welcome)) = first.and_then(|m| m.message) else {
            return Err("it did not begin with welcome".into());
        };
        let request =
            v1::WatchRequest { worker_incarnation: self.incarnation.0, router: self.router.clone() };
        let mut watch = seam::timeout(SILENCE_MAX, client.watch(request))
            .await
            .map_err(|_| "no answer to watch")?
            .map_err(|s| s.message().to_owned())?
            .into_inner();
        // The first report before the first Start: routing needs the role.
        let snapshot = seam::timeout(SILENCE_MAX, watch.message())
            .await
            .map_err(|_| "no report came")?
            .map_err(|s| s.message().to_owned())?
            .ok_or("its reports ended at once")?;
        {
            let mut state = self.lock();
            self.sent.store(1, Ordering::Relaxed);
            state.heard = seam::now();
            state.hung = false;
            state.breaker = Breaker::default();
            state.trouble.clear();
            state.report.epoch = Epoch(welcome.epoch);
            state.reported = 0;
            self.take_report(&mut state, snapshot)?;
            state.outbound = Some(outbound);
        }
        self.announce();
        tracing::info!(worker = %self.worker, address = self.address, "session with worker open");
        Ok((inbound, watch))
    }

    async fn read(&self, mut inbound: impl Frames, mut watch: tonic::Streaming<v1::WatchEvent>) -> String {
        let mut beats = seam::interval(BEAT);
        let mut renewed = seam::now();
        let mut rang = seam::now();
        let mut was = WorkerState::Ready;
        let mut numbers = Sequence::default();
        numbers.number(); // the welcome
        loop {
            tokio::select! {
                biased;
                message = inbound.try_next() => match message {
                    Ok(Some(message)) => match numbers.take(message.sequence) {
                        Ok(true) => self.take(message),
                        Ok(false) => {}
                        Err(gap) => return gap.to_string(),
                    },
                    Ok(None) => return "the worker closed it".into(),
                    Err(status) => return status.message().to_owned(),
                },
                report = watch.message() => match report {
                    Ok(Some(report)) => {
                        let taken = self.take_report(&mut self.lock(), report);
                        match taken {
                            Ok(true) => self.announce(),
                            Ok(false) => {}
                            Err(why) => return why,
                        }
                    }
                    Ok(None) => return "its reports ended".into(),
                    Err(status) => return status.message().to_owned(),
                },
                () = beats.tick() => {
                    let now = seam::now();
                    let mut state = self.lock();
                    // Forgotten within a few seconds.
                    let late = now.since(rang).saturating_sub(BEAT);
                    state.late = late.max(state.late * 7 / 8).min(LATE_MAX);
                    rang = now;
                    if now.since(state.heard) > SILENCE_MAX {
                        return "no beat for too long".into();
                    }
                    self.send(&mut state, to_worker::Message::Beat(v1::Beat::default()));
                    if now.since(renewed) >= RENEW && !state.leases.is_empty() {
                        renewed = now;
                        let leases = state.leases.iter().map(|l| tandem_proto::convert::id128(l.0)).collect();
                        self.send(&mut state, to_worker::Message::Renew(v1::Renew { leases }));
                    }
                    if state.outbound.is_none() {
                        return state.trouble.clone();
                    }
                    drop(state);
                    let is = self.state(now);
                    if is != was {
                        was = is;
                        self.announce();
                    }
                }
            }
        }
    }

    fn take(&self, message: v1::FromWorker) {
        let mut state = self.lock();
        let silent = seam::now().since(state.heard) > SUSPECT_AFTER + state.late;
        state.heard = seam::now();
        match message.message {
            Some(from_worker::Message::Frame(frame)) => {
                for event in frame.events {
                    if let Some(kind) = event.event {
                        self.hand_on(&mut state, event.leg, kind);
                    }
                }
            }
            Some(from_worker::Message::Beat(beat)) => {
                let expected = Duration::from_micros(beat.step_expected_us);
                let age = Duration::from_micros(beat.step_age_us);
                let hung = beat.step_running && age > STEP_MAX.max(expected * 20);
                if hung && !state.hung {
                    tracing::error!(worker = %self.worker, ?age, ?expected, "the worker's step hangs");
                    state.ledger = Ledger::default();
                    for (name, leg) in std::mem::take(&mut state.legs) {
                        let _ = leg.events.try_send(LegEvent::Lost("its step hangs"));
                        self.send(&mut state, to_worker::Message::Cancel(v1::Cancel { leg: name }));
                    }
                    state.leases.clear();
                }
                let changed = hung != state.hung;
                state.hung = hung;
                if changed {
                    drop(state);
                    self.announce();
                    return;
                }
            }
            Some(from_worker::Message::Welcome(_)) | None => {}
        }
        drop(state);
        if silent {
            self.announce();
        }
    }

    fn hand_on(&self, state: &mut LinkState, name: u32, kind: event::Event) {
        match &kind {
            event::Event::Delta(_) => state.breaker.succeeded(),
            event::Event::Failed(failed) if failed.reason() == v1::FailReason::Engine => {
                state.breaker.failed(seam::now());
            }
            _ => {}
        }
        state.account(name, &kind, seam::now());
        let Some(slot) = state.legs.get_mut(&name) else { return };
        use event::Event;
        let last =
            !matches!(kind, Event::Delta(_) | Event::Scored(_) | Event::Granted(_) | Event::Finished(_));
        let sent = slot.events.try_send(LegEvent::Worker(kind));
        let behind = LEG_QUEUE - slot.events.capacity();
        let pause = behind >= PAUSE_AT && !slot.paused;
        slot.paused |= pause;
        if last || sent.is_err() {
            state.remove(name, seam::now());
        }
        if sent.is_err() && !last {
            self.send(state, to_worker::Message::Cancel(v1::Cancel { leg: name }));
        } else if pause && !last {
            self.send(state, to_worker::Message::Pause(v1::Pause { leg: name }));
        }
    }

    /// Every leg hears that it is lost. True if there was a session.
    fn lose(&self, why: &str) -> bool {
        let mut state = self.lock();
        let was_open = state.outbound.take().is_some();
        state.trouble = why.to_owned();
        state.leases.clear();
        state.ledger = Ledger::default();
        for (_, leg) in std::mem::take(&mut state.legs) {
            let _ = leg.events.try_send(LegEvent::Lost("its session ended"));
        }
        drop(state);
        self.announce();
        was_open
    }

    /// Takes in a report; true if it matters for who may get work.
    fn take_report(&self, state: &mut LinkState, event: v1::WatchEvent) -> Result<bool, String> {
        if event.sequence != state.reported + 1 {
            return Err(format!("report {} came after {}", event.sequence, state.reported));
        }
        state.reported = event.sequence;
        self.prefixes
            .take(&self.worker, self.incarnation, &event, &mut state.indexed)
            .map_err(|error| error.to_string())?;
        let report = Report {
            role: tandem_proto::convert::role("WatchEvent.role", event.role).ok(),
            epoch: Epoch(event.epoch),
            draining: event.state == WorkerState::Draining.as_str(),
            admitted: event.admitted.get(&self.router).copied().unwrap_or(0),
            load: event.load.unwrap_or_default(),
        };
        let matters = (report.role, report.epoch, report.draining)
            != (state.report.role, state.report.epoch, state.report.draining);
        let load = ledger::Load {
            queue_seconds: report.load.queue_seconds,
            timely_seconds: report.load.timely_seconds,
            decodes: report.load.decodes,
            decode_tokens: report.load.decode_tokens,
        };
        // On the way it was for no longer than what came on the session at the same time.
        state.ledger.report(load, seam::now());
        state.report = report;
        Ok(matters)
    }

    fn announce(&self) {
        self.changed.send_modify(|n| *n += 1);
    }
}

/// What a worker says on a session.
trait Frames: Stream<Item = Result<v1::FromWorker, tonic::Status>> + Unpin + Send {}

impl<S: Stream<Item = Result<v1::FromWorker, tonic::Status>> + Unpin + Send> Frames for S {}

fn fail_point(message: &v1::FromWorker) -> Option<&'static str> {
    let frame = match message.message.as_ref()? {
        from_worker::Message::Frame(frame) => frame,
        from_worker::Message::Beat(_) => return Some("frame.beat"),
        from_worker::Message::Welcome(_) => return None,
    };
    // By the rarest of what it holds.
    let rank = |kind: &event::Event| match kind {
        event::Event::Delta(_) => (0, "frame.delta"),
        event::Event::Released(_) => (1, "frame.released"),
        event::Event::Granted(_) => (2, "frame.granted"),
        event::Event::Finished(_) => (3, "frame.finished"),
        event::Event::Refused(_) => (4, "frame.refused"),
        event::Event::Failed(_) => (5, "frame.failed"),
        event::Event::Preempted(_) => (6, "frame.preempted"),
        event::Event::Scored(_) => (7, "frame.scored"),
    };
    frame.events.iter().filter_map(|event| event.event.as_ref().map(rank)).max().map(|(_, point)| point)
}

/// An attempt that is live on a worker. Dropping it cancels it there.
pub(crate) struct Leg {
    link: Arc<Link>,
    name: u32,
    events: mpsc::Receiver<LegEvent>,
    lease: Option<LeaseId>,
    over: bool,
}

impl Leg {
    pub(crate) fn worker(&self) -> &WorkerId {
        &self.link.worker
    }

    /// The next event; after the last one, `Lost`.
    pub(crate) async fn next(&mut self) -> LegEvent {
        let event = self.events.recv().await.unwrap_or(LegEvent::Lost("its session ended"));
        match &event {
            LegEvent::Worker(event::Event::Granted(granted)) => self.keep_lease(granted),
            LegEvent::Worker(event::Event::Delta(_) | event::Event::Scored(_)) => self.maybe_resume(),
            LegEvent::Worker(event::Event::Finished(_)) => {}
            LegEvent::Worker(_) | LegEvent::Lost(_) => self.over = true,
        }
        event
    }

    /// Whether an event already waits: the leg may have ended meanwhile.
    pub(crate) fn try_next(&mut self) -> Option<LegEvent> {
        match self.events.try_recv() {
            Ok(event) => {
                if matches!(
                    event,
                    LegEvent::Lost(_)
                        | LegEvent::Worker(
                            event::Event::Released(_)
                                | event::Event::Refused(_)
                                | event::Event::Preempted(_)
                                | event::Event::Failed(_)
                        )
                ) {
                    self.over = true;
                }
                Some(event)
            }
            Err(mpsc::error::TryRecvError::Empty) => None,
            Err(mpsc::error::TryRecvError::Disconnected) => {
                self.over = true;
                Some(LegEvent::Lost("its session ended"))
            }
        }
    }

    /// Renewed with the link's beats from now on.
    fn keep_lease(&mut self, granted: &v1::Granted) {
        let id =
            granted.handle.as_ref().and_then(|h| tandem_proto::convert::read_id128("lease", &h.lease).ok());
        if let Some(id) = id.map(LeaseId) {
            self.lease = Some(id);
            self.link.lock().leases.insert(id);
        }
    }

    fn maybe_resume(&mut self) {
        if self.events.len() > PAUSE_AT / 4 {
            return;
        }
        let mut state = self.link.lock();
        if let Some(slot) = state.legs.get_mut(&self.name)
            && std::mem::take(&mut slot.paused)
        {
            self.link.send(&mut state, to_worker::Message::Resume(v1::Resume { leg: self.name }));
        }
    }
}

impl Drop for Leg {
    fn drop(&mut self) {
        let mut state = self.link.lock();
        if let Some(lease) = &self.lease {
            state.leases.remove(lease);
        }
        let known = state.remove(self.name, seam::now()).is_some();
        if known && !self.over {
            self.link.send(&mut state, to_worker::Message::Cancel(v1::Cancel { leg: self.name }));
        }
    }
}
