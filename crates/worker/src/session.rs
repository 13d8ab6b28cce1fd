//! The `Worker` service: sessions with routers, drain, watch and describe.

use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use futures_util::{Stream, StreamExt, TryStreamExt};
use tandem_chassis::{Shutdown, Tasks, fail, seam};
use tandem_kv_cache::CacheChanges;
use tandem_proto::v1::{self, to_worker};
use tandem_proto::{PROTOCOL_MAX, PROTOCOL_MIN, Sequence, convert};
use tandem_types::{LeaseId, Time};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};

use crate::Identity;
use crate::core::SessionId;
use crate::shared::{SESSION_QUEUE, Shared};

/// Both ends of a session beat this often.
const BEAT: Duration = Duration::from_millis(200);
/// A stream that was silent for so long is given up.
const SILENCE_MAX: Duration = Duration::from_secs(3);

type Out<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

/// Serves `Worker`.
pub(crate) struct SessionService {
    pub(crate) shared: Arc<Shared>,
    pub(crate) identity: Arc<Identity>,
    pub(crate) tasks: Arc<Tasks>,
    pub(crate) shutdown: Shutdown,
}

#[tonic::async_trait]
impl v1::worker_server::Worker for SessionService {
    type SessionStream = Out<v1::FromWorker>;
    type WatchStream = Out<v1::WatchEvent>;

    async fn session(
        &self,
        request: Request<Streaming<v1::ToWorker>>,
    ) -> Result<Response<Self::SessionStream>, Status> {
        let own = self.shared.look(|core| core.constants().id.0.clone());
        let mut inbound = fail::through(request.into_inner(), &own, fail_point);
        let first = seam::timeout(SILENCE_MAX, inbound.try_next())
            .await
            .map_err(|_| Status::deadline_exceeded("no hello came"))??;
        let Some(to_worker::Message::Hello(hello)) = first.and_then(|m| m.message) else {
            return Err(Status::invalid_argument("a session begins with hello"));
        };
        let protocol = self.check_hello(&hello)?;

        let (frames, outbound) = mpsc::channel(SESSION_QUEUE);
        let (session, welcome) = self.shared.change(|core, now| {
            let session = core.open_session(&hello.router, hello.router_incarnation, now);
            let constants = core.constants();
            let welcome = v1::Welcome {
                worker: constants.id.0.clone(),
                incarnation: constants.incarnation.0,
                epoch: core.epoch().0,
                protocol,
            };
            (session, welcome)
        });
        let _ = frames.try_send(v1::from_worker::Message::Welcome(welcome));
        self.shared.attach_session(session, frames.clone());
        tracing::info!(router = hello.router, session = session.0, "session opened");
        self.tasks.spawn(serve_session(self.shared.clone(), session, hello.router, inbound, frames));

        let mut sequence = 0;
        let outbound = ReceiverStream::new(outbound).map(move |message| {
            sequence += 1;
            Ok(v1::FromWorker { sequence, message: Some(message) })
        });
        Ok(Response::new(Box::pin(outbound)))
    }

    async fn drain(&self, request: Request<v1::DrainRequest>) -> Result<Response<v1::DrainReply>, Status> {
        let incarnation = request.into_inner().worker_incarnation;
        self.check_incarnation(incarnation)?;
        self.shutdown.drain();
        let running = self.shared.look(|core| core.leg_count() as u32);
        Ok(Response::new(v1::DrainReply { running }))
    }

    async fn watch(&self, request: Request<v1::WatchRequest>) -> Result<Response<Self::WatchStream>, Status> {
        self.check_incarnation(request.into_inner().worker_incarnation)?;
        let (shared, shutdown) = (self.shared.clone(), self.shutdown.clone());
        let (events, outbound) = mpsc::channel(4);
        self.tasks.spawn(async move {
            let mut load = shared.watch_load();
            let mut seen = None;
            for sequence in 1.. {
                let event = watch_event(&shared, sequence, &mut seen);
                if events.send(Ok(event)).await.is_err() {
                    return;
                }
                // At most ten reports a second, however fast the load changes.
                seam::sleep(Duration::from_millis(100)).await;
                tokio::select! {
                    changed = load.changed() => if changed.is_err() { return },
                    () = events.closed() => return,
                    () = shutdown.stopped() => return,
                }
            }
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(outbound))))
    }

    async fn describe(&self, _: Request<v1::DescribeRequest>) -> Result<Response<v1::DescribeReply>, Status> {
        let identity = &self.identity;
        let (constants, role, epoch) =
            self.shared.look(|core| (core.constants().clone(), core.role(), core.epoch()));
        Ok(Response::new(v1::DescribeReply {
            worker: constants.id.0.clone(),
            incarnation: constants.incarnation.0,
            epoch: epoch.0,
            role: v1::Role::from(role) as i32,
            model: identity.model.clone(),
            identity: Some((&constants.identity).into()),
            form: Some((&constants.form).into()),
            transports: constants.exports.iter().map(|e| e.transport.clone()).collect(),
            context_tokens: constants.context_tokens,
            version: identity.version.clone(),
            protocol_min: PROTOCOL_MIN,
            protocol_max: PROTOCOL_MAX,
        }))
    }
}

impl SessionService {
    fn check_incarnation(&self, incarnation: u64) -> Result<(), Status> {
        let own = self.shared.look(|core| core.constants().incarnation);
        if incarnation != own.0 {
            return Err(Status::failed_precondition(format!("this is incarnation {own}")));
        }
        Ok(())
    }

    fn check_hello(&self, hello: &v1::Hello) -> Result<u32, Status> {
        self.check_incarnation(hello.worker_incarnation)?;
        let newest = hello.protocol_max.min(PROTOCOL_MAX);
        if newest < hello.protocol_min.max(PROTOCOL_MIN) {
            return Err(Status::failed_precondition(format!(
                "no protocol version in common: router {}..{}, worker {PROTOCOL_MIN}..{PROTOCOL_MAX}",
                hello.protocol_min, hello.protocol_max
            )));
        }
        Ok(newest)
    }
}

/// Reads one session until it ends, whoever ends it; then everything that hung on it is cancelled.
async fn serve_session(
    shared: Arc<Shared>,
    session: SessionId,
    router: String,
    mut inbound: impl Stream<Item = Result<v1::ToWorker, Status>> + Unpin,
    frames: mpsc::Sender<v1::from_worker::Message>,
) {
    let open = OpenSession { shared: &shared, session };
    let mut beats = seam::interval(BEAT);
    let mut heard = seam::now();
    let mut numbers = Sequence::default();
    numbers.number(); // the hello
    let why = loop {
        tokio::select! {
            message = inbound.try_next() => match message {
                Ok(Some(message)) => {
                    heard = seam::now();
                    match numbers.take(message.sequence) {
                        Ok(true) => {}
                        Ok(false) => continue,
                        Err(gap) => break gap.to_string(),
                    }
                    if let Err(error) = obey(&shared, session, message) {
                        break error.to_string();
                    }
                }
                Ok(None) => break "the router closed it".to_owned(),
                Err(status) => break status.message().to_owned(),
            },
            () = beats.tick() => {
                if seam::now().since(heard) > SILENCE_MAX {
                    break "the router is silent".to_owned();
                }
                let admitted = shared.look(|core| core.admitted_of(session));
                let beat = shared.progress.beat(seam::now(), admitted);
                if frames.try_send(v1::from_worker::Message::Beat(beat)).is_err() {
                    break "the router does not read".to_owned();
                }
            }
            () = frames.closed() => break "its stream is gone".to_owned(),
        }
    };
    drop(open);
    tracing::info!(router, session = session.0, why, "session closed");
}

/// A session that is served; with it, however that ends, everything that hangs on it is cancelled.
struct OpenSession<'a> {
    shared: &'a Shared,
    session: SessionId,
}

impl Drop for OpenSession<'_> {
    fn drop(&mut self) {
        self.shared.close_session(self.session);
    }
}

fn fail_point(message: &v1::ToWorker) -> Option<&'static str> {
    Some(match message.message.as_ref()? {
        to_worker::Message::Start(_) => "session.start",
        to_worker::Message::Cancel(_) => "session.cancel",
        to_worker::Message::Pause(_) => "session.pause",
        to_worker::Message::Resume(_) => "session.resume",
        to_worker::Message::Renew(_) => "session.renew",
        to_worker::Message::End(_) => "session.end-lease",
        to_worker::Message::Beat(_) => "session.beat",
        to_worker::Message::Hello(_) | to_worker::Message::Offer(_) | to_worker::Message::Seal(_) => {
            return None;
        }
    })
}

fn obey(shared: &Shared, session: SessionId, message: v1::ToWorker) -> Result<(), tandem_proto::WireError> {
    let sequence = message.sequence;
    let Some(message) = message.message else { return Ok(()) };
    if let to_worker::Message::Beat(_) = message {
        return Ok(());
    }
    let leases = match &message {
        to_worker::Message::Renew(renew) => {
            renew.leases.iter().map(|id| read_lease(id)).collect::<Result<_, _>>()?
        }
        to_worker::Message::End(end) => vec![read_lease(&end.lease)?],
        _ => Vec::new(),
    };
    let refuses = matches!(message, to_worker::Message::Start(_)) && shared.refuses();
    shared.change(|core, now: Time| {
        match message {
            to_worker::Message::Start(start) if refuses => core.refuse(session, start.leg),
            to_worker::Message::Start(start) => core.start(session, start, now),
            to_worker::Message::Cancel(cancel) => core.cancel(session, cancel.leg, now),
            to_worker::Message::Pause(pause) => core.pause(session, pause.leg, true),
            to_worker::Message::Resume(resume) => core.pause(session, resume.leg, false),
            to_worker::Message::Renew(_) => core.renew(leases.into_iter(), now),
            to_worker::Message::End(_) => core.end_lease(leases[0], now),
            // Migration is not offered by routers of this version.
            to_worker::Message::Offer(_) | to_worker::Message::Seal(_) => {}
            to_worker::Message::Hello(_) | to_worker::Message::Beat(_) => {}
        }
        core.note_admitted(session, sequence);
    });
    Ok(())
}

fn read_lease(bytes: &[u8]) -> Result<LeaseId, tandem_proto::WireError> {
    convert::read_id128("lease", bytes).map(LeaseId)
}

/// A report. `seen` are the changes of the prefix cache that its reader knows.
fn watch_event(shared: &Shared, sequence: u64, seen: &mut Option<u64>) -> v1::WatchEvent {
    shared.look(|core| {
        let (load, forecast) = (core.load(), core.forecast());
        let (changes, now) = core.kv_ref().cache_changes(*seen);
        *seen = Some(now);
        v1::WatchEvent {
            sequence,
            snapshot: matches!(changes, CacheChanges::All(_)),
            role: v1::Role::from(core.role()) as i32,
            epoch: core.epoch().0,
            state: core.state().as_str().to_owned(),
            load: Some(v1::Load {
                running: load.running,
                waiting: load.waiting,
                waiting_tokens: load.waiting_tokens,
                blocks_total: load.blocks_total,
                blocks_free: load.blocks_free,
                blocks_cached: load.blocks_cached,
                leases: load.leases,
                queue_seconds: forecast.queue_seconds,
                timely_seconds: forecast.timely_seconds,
                decodes: forecast.decodes,
                decode_tokens: forecast.decode_tokens,
                pacing: Some(forecast.pacing),
                totals: Some(forecast.totals),
            }),
            admitted: core.admitted().map(|(router, at)| (router.to_owned(), at)).collect(),
            blocks: block_events(changes),
        }
    })
}

/// Neighbours of one kind share an event.
fn block_events(changes: CacheChanges) -> Vec<v1::BlockEvent> {
    let changes = match changes {
        CacheChanges::All(all) => all.into_iter().map(|hash| (true, hash)).collect(),
        CacheChanges::Since(changes) => changes,
    };
    let alike = changes.chunk_by(|(a, _), (b, _)| a == b);
    alike
        .map(|run| v1::BlockEvent {
            group: 0,
            stored: run[0].0,
            hashes: run.iter().map(|(_, hash)| convert::id128(hash.0)).collect(),
        })
        .collect()
}
