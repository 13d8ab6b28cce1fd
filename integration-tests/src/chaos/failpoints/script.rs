//! A second router, scripted: it speaks the session's protocol with real workers and brings about what the real
//! router of this version seldom or never does.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::time::Duration;

use futures_util::stream;
use tandem_chassis::{grpc, seam};
use tandem_engine::fake::{Ordinary, oracle};
use tandem_proto::v1::{self, event, from_worker, to_worker};
use tandem_proto::{PROTOCOL_MAX, PROTOCOL_MIN, Sequence, convert};
use tandem_types::{Choice, SamplingParams, StopRules};
use tokio::sync::mpsc;

use super::case::Plot;
use super::client::{END_MAX, Ended};
use super::random::Random;
use super::world::World;

/// Both ends of a session beat this often.
const BEAT: Duration = Duration::from_millis(200);
/// A step may take the greater of this and twenty times what was expected.
const STEP_MAX_US: u64 = 2_000_000;

/// Plays a plot with workers of this world. Every leg must get a last word, and an answer that is complete must be
/// right.
pub(crate) async fn play(world: &World, plot: Plot, seed: u64, ordinary: &Ordinary) -> Ended {
    seam::timeout(END_MAX, act(world, plot, seed, ordinary))
        .await
        .unwrap_or_else(|_| Ended::Wrongly(format!("{plot:?}: a leg had no last word after {END_MAX:?}")))
}

/// So often even workers that refuse four of ten do not refuse in a row.
const WARM_ATTEMPTS: u128 = 100;

/// Lets every worker pull from every other, so that all connections that are kept stand.
pub(crate) async fn warm(world: &World) {
    let mut sessions = Vec::new();
    for worker in &world.workers {
        sessions.push(Session::open(worker.address, 1).await.expect("without a fault a session opens"));
    }
    let count = sessions.len();
    let pairs = (0..count * count).map(|pair| (pair / count, pair % count)).filter(|(a, b)| a != b);
    for (owner, puller) in pairs {
        // Where workers refuse or fail by themselves a few attempts are needed.
        for attempt in 0..WARM_ATTEMPTS {
            let id = (owner * count + puller) as u128 * WARM_ATTEMPTS + attempt + 1;
            let request = Request { id, prompt: vec![1, 2, id as u32 % 370], tokens: 2 };
            let mut prefill = sessions[owner].start(request.start(1, v1::Until::FirstToken));
            let Some(event::Event::Granted(granted)) = prefill.next().await else { continue };
            let inputs = granted.handle.into_iter().map(|handle| *handle).collect();
            let start = v1::Start { inputs, after: 1, ..request.start(2, v1::Until::End) };
            let mut decode = sessions[puller].start(start);
            if let Some(event::Event::Delta(_)) = decode.next().await {
                break;
            }
        }
    }
}

async fn act(world: &World, plot: Plot, seed: u64, ordinary: &Ordinary) -> Ended {
    let mut random = Random::new(seed);
    let length = random.within(200..400);
    let request = Request {
        id: u128::from(seed) << 64 | 1,
        prompt: random.prompt(length),
        tokens: if plot == Plot::EndAtFirst { 1 } else { random.within(3..20) as u32 },
    };
    let mut sessions = Vec::new();
    for worker in &world.workers {
        match Session::open(worker.address, seed).await {
            Ok(session) => sessions.push(session),
            Err(why) => return Ended::Loudly(why),
        }
    }
    // Workers come in order of their first role.
    let last = sessions.len() - 1;
    let right =
        oracle(ordinary, &request.prompt, &SamplingParams::default(), Choice(0), request.tokens as usize);
    if plot == Plot::Borrow {
        return borrow(&mut sessions, &request, &right, world).await;
    }

    let mut prefill = sessions[0].start(request.start(1, v1::Until::FirstToken));
    let handle = loop {
        match prefill.next().await {
            Some(event::Event::Granted(granted)) => break granted.handle,
            Some(event::Event::Delta(_)) => {}
            other => return Ended::Loudly(format!("no grant: {other:?}")),
        }
    };
    let follows = |attempt| v1::Start {
        inputs: handle.iter().map(|handle| v1::Handle::clone(handle)).collect(),
        after: 1,
        ..request.start(attempt, v1::Until::End)
    };
    let mut decodes = vec![sessions[last].start(follows(2))];
    // Long enough for the claim to stand, and not for the prompt to be done.
    seam::sleep(Duration::from_millis(random.within(1..40))).await;
    match plot {
        Plot::Overlap | Plot::EndAtFirst | Plot::Borrow => {}
        Plot::Supersede => decodes.push(sessions[last.saturating_sub(1)].start(follows(3))),
        Plot::CancelPrefill => {
            sessions[0].say(to_worker::Message::Cancel(v1::Cancel { leg: prefill.name }));
        }
        Plot::EndLease => {
            let lease = handle.as_ref().map(|handle| handle.lease.clone()).unwrap_or_default();
            sessions[0].say(to_worker::Message::End(v1::EndLease { lease }));
        }
    }
    let mut ended = Ended::Loudly("nobody decoded".into());
    let first = decodes.len() == 2;
    for (index, leg) in decodes.into_iter().enumerate() {
        match leg.ended(&right).await {
            Ended::Whole if index == 0 && first => {
                // It was quicker than its successor.
                ended = Ended::Whole;
            }
            wrong @ Ended::Wrongly(_) => return wrong,
            other if ended != Ended::Whole => ended = other,
            _ => {}
        }
    }
    match prefill.ended(&right[..1]).await {
        wrong @ Ended::Wrongly(_) => wrong,
        _ => ended,
    }
}

/// Lets one worker compute a prompt, then has another borrow its blocks.
async fn borrow(sessions: &mut [Session], request: &Request, right: &[u32], world: &World) -> Ended {
    let last = sessions.len() - 1;
    let ended = sessions[0].start(request.start(1, v1::Until::End)).ended(right).await;
    if ended != Ended::Whole {
        return ended;
    }
    let holder = v1::Holder {
        worker: world.workers[0].id.clone(),
        incarnation: sessions[0].incarnation,
        lender: world.workers[0].address.to_string(),
        blocks: (request.prompt.len() as u32) / tandem_types::BLOCK_TOKENS,
    };
    let again = Request { id: request.id + 1, ..request.clone() };
    let start = v1::Start { holders: vec![holder], ..again.start(1, v1::Until::End) };
    sessions[last].start(start).ended(right).await
}

#[derive(Clone)]
struct Request {
    id: u128,
    prompt: Vec<u32>,
    tokens: u32,
}

impl Request {
    fn start(&self, attempt: u32, until: v1::Until) -> v1::Start {
        let stop = StopRules { max_tokens: self.tokens, ..StopRules::default() };
        v1::Start {
            request: convert::id128(self.id),
            attempt,
            until: until as i32,
            remaining_ms: END_MAX.as_millis() as u32,
            tokens: self.prompt.clone(),
            prompt_tokens: self.prompt.len() as u32,
            sampling: Some((&SamplingParams::default()).into()),
            stop: Some((&stop).into()),
            request_name: "script".into(),
            ..v1::Start::default()
        }
    }
}

/// A session with one worker. Dropping it ends it.
struct Session {
    incarnation: u64,
    epoch: u64,
    next_leg: u32,
    say: mpsc::UnboundedSender<Said>,
}

/// For the task that keeps the session.
enum Said {
    Message(Box<to_worker::Message>),
    Leg(u32, mpsc::UnboundedSender<event::Event>),
}

impl Session {
    async fn open(address: SocketAddr, router: u64) -> Result<Session, String> {
        let welcome_max = Duration::from_secs(3);
        let channel = grpc::connect(&address.to_string()).await?;
        let mut client = v1::worker_client::WorkerClient::new(channel);
        let described = seam::timeout(welcome_max, client.describe(v1::DescribeRequest {})).await;
        let described = described.map_err(|_| "no description")?.map_err(|s| s.message().to_owned())?;
        let incarnation = described.into_inner().incarnation;
        let (outbound, messages) = mpsc::unbounded_channel();
        let hello = to_worker::Message::Hello(v1::Hello {
            router: "script".into(),
            router_incarnation: router,
            worker_incarnation: incarnation,
            protocol_min: PROTOCOL_MIN,
            protocol_max: PROTOCOL_MAX,
        });
        outbound.send(hello).expect("the channel is new");
        let state = (messages, Sequence::default());
        let messages = stream::unfold(state, |(mut messages, mut numbers)| async move {
            let message = messages.recv().await?;
            let numbered = v1::ToWorker { sequence: numbers.number(), message: Some(message) };
            Some((numbered, (messages, numbers)))
        });
        let opened = seam::timeout(welcome_max, client.session(messages)).await;
        let mut inbound =
            opened.map_err(|_| "no answer to hello")?.map_err(|s| s.message().to_owned())?.into_inner();
        let first = seam::timeout(welcome_max, inbound.message()).await;
        let first = first.map_err(|_| "no welcome")?.map_err(|s| s.message().to_owned())?;
        let Some(from_worker::Message::Welcome(welcome)) = first.and_then(|m| m.message) else {
            return Err("it did not begin with welcome".into());
        };
        let (say, mut said) = mpsc::unbounded_channel();
        seam::spawn(async move {
            let mut legs: HashMap<u32, mpsc::UnboundedSender<event::Event>> = HashMap::new();
            let mut beats = seam::interval(BEAT);
            loop {
                tokio::select! {
                    message = inbound.message() => {
                        // With the stream all legs end: their channels close.
                        let Ok(Some(message)) = message else { return };
                        let frame = match message.message {
                            Some(from_worker::Message::Frame(frame)) => frame,
                            // A step that never ends is loss, as for every router.
                            Some(from_worker::Message::Beat(beat)) if hangs(&beat) => return,
                            _ => continue,
                        };
                        for v1::Event { leg, event } in frame.events {
                            if let (Some(events), Some(event)) = (legs.get(&leg), event) {
                                let _ = events.send(event);
                            }
                        }
                    }
                    said = said.recv() => match said {
                        Some(Said::Message(message)) => drop(outbound.send(*message)),
                        Some(Said::Leg(name, events)) => drop(legs.insert(name, events)),
                        None => return,
                    },
                    () = beats.tick() => drop(outbound.send(to_worker::Message::Beat(v1::Beat::default()))),
                }
            }
        });
        Ok(Session { incarnation, epoch: welcome.epoch, next_leg: 0, say })
    }

    fn say(&self, message: to_worker::Message) {
        // If the session is over, its legs say so.
        let _ = self.say.send(Said::Message(Box::new(message)));
    }

    fn start(&mut self, start: v1::Start) -> Leg {
        self.next_leg += 1;
        let name = self.next_leg;
        let (send, events) = mpsc::unbounded_channel();
        let _ = self.say.send(Said::Leg(name, send));
        let target =
            v1::Start { leg: name, worker_incarnation: self.incarnation, epoch: self.epoch, ..start };
        self.say(to_worker::Message::Start(target));
        Leg { name, events, tokens: Vec::new() }
    }
}

fn hangs(beat: &v1::Beat) -> bool {
    beat.step_running && beat.step_age_us > STEP_MAX_US.max(20 * beat.step_expected_us)
}

struct Leg {
    name: u32,
    events: mpsc::UnboundedReceiver<event::Event>,
    tokens: Vec<u32>,
}

impl Leg {
    /// The next event; `None` when the session is over.
    async fn next(&mut self) -> Option<event::Event> {
        let event = self.events.recv().await?;
        if let event::Event::Delta(delta) = &event {
            self.tokens.extend(&delta.tokens);
        }
        Some(event)
    }

    async fn ended(mut self, right: &[u32]) -> Ended {
        let mut finished = false;
        let last = loop {
            match self.next().await {
                Some(event::Event::Delta(_) | event::Event::Granted(_)) => {}
                Some(event::Event::Finished(_)) => finished = true,
                other => break other,
            }
        };
        if !right.starts_with(&self.tokens) {
            return Ended::Wrongly(format!("a scripted leg sent {:?} instead of {right:?}", self.tokens));
        }
        if finished && self.tokens.len() != right.len() {
            let (is, should) = (self.tokens.len(), right.len());
            return Ended::Wrongly(format!("a scripted leg finished with {is} of {should} tokens"));
        }
        if finished { Ended::Whole } else { Ended::Loudly(format!("{last:?}")) }
    }
}
