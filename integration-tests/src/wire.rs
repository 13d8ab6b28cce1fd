//! A router's end of a session, by hand: for what a router would not do, or not at that moment.

use std::collections::VecDeque;
use std::time::Duration;

use tandem_chassis::{Tasks, grpc, seam};
use tandem_proto::v1::worker_client::WorkerClient;
use tandem_proto::v1::{self, event, from_worker, to_worker};
use tandem_proto::{PROTOCOL_MAX, PROTOCOL_MIN, convert};
use tandem_types::{SamplingParams, StopRules};
use tokio::sync::mpsc;
use tokio_stream::StreamExt;
use tokio_stream::wrappers::ReceiverStream;

/// No test waits longer than this for one event.
const EVENT_MAX: Duration = Duration::from_secs(60);

/// A session with one worker.
pub struct WireRouter {
    /// What the worker says of itself.
    pub worker: v1::DescribeReply,
    outbound: mpsc::Sender<to_worker::Message>,
    inbound: tonic::Streaming<v1::FromWorker>,
    events: VecDeque<(u32, event::Event)>,
    next_leg: u32,
    _beats: Tasks,
}

impl WireRouter {
    /// Opens a session with the worker at `host:port`.
    pub async fn connect(address: &str) -> WireRouter {
        let channel = grpc::connect(address).await.expect("the worker listens");
        let mut client = WorkerClient::new(channel);
        let worker = client.describe(v1::DescribeRequest {}).await.expect("a description").into_inner();
        let (outbound, messages) = mpsc::channel(64);
        let hello = to_worker::Message::Hello(v1::Hello {
            router: format!("wire-{:x}", seam::random_u64()),
            router_incarnation: seam::random_u64(),
            worker_incarnation: worker.incarnation,
            protocol_min: PROTOCOL_MIN,
            protocol_max: PROTOCOL_MAX,
        });
        outbound.try_send(hello).expect("the channel is new");
        let mut sequence = 0;
        let messages = ReceiverStream::new(messages).map(move |message| {
            sequence += 1;
            v1::ToWorker { sequence, message: Some(message) }
        });
        let inbound = client.session(messages).await.expect("a session").into_inner();
        let beats = Tasks::new();
        let beat = outbound.clone();
        beats.spawn(async move {
            let mut interval = seam::interval(Duration::from_millis(200));
            loop {
                interval.tick().await;
                if beat.send(to_worker::Message::Beat(v1::Beat::default())).await.is_err() {
                    return;
                }
            }
        });
        WireRouter { worker, outbound, inbound, events: VecDeque::new(), next_leg: 1, _beats: beats }
    }

    /// Sends a Start, with this worker's incarnation and epoch; returns the leg's name.
    pub async fn start(&mut self, start: v1::Start) -> u32 {
        let leg = self.next_leg;
        self.next_leg += 1;
        let (worker_incarnation, epoch) = (self.worker.incarnation, self.worker.epoch);
        self.send(to_worker::Message::Start(v1::Start { leg, worker_incarnation, epoch, ..start })).await;
        leg
    }

    /// Sends any message.
    pub async fn send(&mut self, message: to_worker::Message) {
        self.outbound.send(message).await.expect("the session stands");
    }

    /// The next event of a leg.
    ///
    /// # Panics
    /// If none comes within a minute.
    pub async fn next(&mut self, leg: u32) -> event::Event {
        loop {
            if let Some(at) = self.events.iter().position(|(of, _)| *of == leg) {
                return self.events.remove(at).expect("it was just found").1;
            }
            let message = seam::timeout(EVENT_MAX, self.inbound.message()).await.expect("an event in time");
            let message = message.expect("the session stands").expect("the session stands");
            if let Some(from_worker::Message::Frame(frame)) = message.message {
                let events = frame.events.into_iter();
                self.events.extend(events.filter_map(|event| Some((event.leg, event.event?))));
            }
        }
    }

    /// Waits for the grant of a leg that goes to its first token, and for that token.
    pub async fn granted(&mut self, leg: u32) -> (v1::Granted, v1::Delta) {
        let granted = match self.next(leg).await {
            event::Event::Granted(granted) => granted,
            other => panic!("{other:?} instead of a grant"),
        };
        match self.next(leg).await {
            event::Event::Delta(delta) => (granted, delta),
            other => panic!("{other:?} instead of a token"),
        }
    }

    /// All tokens of a leg, to its end; an error if it ends without `Finished`.
    pub async fn tokens(&mut self, leg: u32) -> Result<Vec<u32>, event::Event> {
        let mut tokens = Vec::new();
        loop {
            match self.next(leg).await {
                event::Event::Delta(delta) => tokens.extend(delta.tokens),
                event::Event::Finished(_) => return Ok(tokens),
                event::Event::Granted(_) => {}
                other => return Err(other),
            }
        }
    }
}

/// A Start of a new request: a prompt, and how many tokens are to follow, greedily.
pub fn start(prompt: &[u32], max_tokens: u32, until: v1::Until) -> v1::Start {
    v1::Start {
        request: convert::id128(seam::random_u128()),
        attempt: 1,
        until: until as i32,
        remaining_ms: 60_000,
        tokens: prompt.to_vec(),
        prompt_tokens: prompt.len() as u32,
        sampling: Some((&SamplingParams::default()).into()),
        stop: Some((&StopRules { max_tokens, ..StopRules::default() }).into()),
        ..v1::Start::default()
    }
}
