//! Sends the requests of a plan and gathers their answers.
//!
//! One thread speaks HTTP. A second writes prompts ahead of time and waits for the moments at which requests are
//! due, because timers of an event loop are a millisecond coarse.

use std::collections::VecDeque;
use std::sync::mpsc as sync;
use std::time::Duration;

use tandem_chassis::{Shutdown, process_facts, seam};
use tandem_types::Time;
use tokio::sync::mpsc;
use tokio::task::JoinSet;

use super::answer::{Answer, Body, End, Server};
use super::plan::{Ask, Plan};
use super::prompts::Prompts;
use crate::progress::Bar;

/// Requests that are written ahead of time, at most.
const AHEAD: usize = 256;
/// Time to write the first ones before the clock of the run starts.
const HEAD_START: Duration = Duration::from_millis(20);
const BEAT: Duration = Duration::from_millis(200);

/// How a prompt becomes a body.
#[derive(Clone)]
pub struct Form {
    /// What stands before the prompt's text.
    pub before: String,
    /// What stands behind it.
    pub behind: String,
    /// Where the number of tokens of the answer stands, and then the end.
    pub end: String,
    /// Writes the text.
    pub prompts: Prompts,
}

impl Form {
    fn body(&self, ask: &Ask) -> Body {
        let text = self.prompts.text(ask.number, ask.input, &ask.blocks);
        // The text is of letters, digits and spaces, which JSON takes as they are.
        let json = [&self.before, text.as_str(), &self.behind, &ask.output.to_string(), &self.end].concat();
        Body { at: ask.at, json: json.into(), asked: ask.input + self.prompts.shared_tokens() }
    }
}

/// What came of a plan.
pub struct Driven {
    /// In order of their end.
    pub answers: Vec<Answer>,
    /// When the clock started.
    pub began: Time,
    /// When the last answer was over.
    pub ended: Time,
    /// Requests that were running when the run was ended early.
    pub unfinished: usize,
    /// Whether the user ended it.
    pub interrupted: bool,
    /// Prompt tokens that were asked for, of all that were sent.
    pub asked_tokens: u64,
    /// Bytes of their bodies.
    pub sent_bytes: u64,
    /// Processor time of this process, seconds.
    pub cpu_seconds: f64,
    /// That of the thread that speaks HTTP.
    pub thread_seconds: f64,
}

/// Runs the plan until it is done or `shutdown` drains.
pub async fn drive(server: &Server, plan: Plan, form: Form, shutdown: &Shutdown, bar: &Bar) -> Driven {
    let cpu = (process_facts().cpu_seconds, thread_seconds());
    let Plan { asks, at_once, expected, ends, .. } = plan;
    let began = seam::now() + HEAD_START;
    let (send, mut bodies) = mpsc::channel(AHEAD);
    let (stop, stopped) = sync::channel::<()>();
    let writer = seam::thread("bench-prompts", move || match at_once {
        Some(_) => write(asks, &form, &send),
        None => write_and_wait(asks, &form, began, &stopped, &send),
    });
    let mut driven = Driven {
        answers: Vec::new(),
        began,
        ended: began,
        unfinished: 0,
        interrupted: false,
        asked_tokens: 0,
        sent_bytes: 0,
        cpu_seconds: 0.0,
        thread_seconds: 0.0,
    };
    seam::sleep_until(began).await;
    let (mut running, mut sent, mut failed, mut open) = (JoinSet::new(), 0u64, 0u64, true);
    let mut beat = seam::interval(BEAT);
    let last_call = seam::sleep_until(ends.map_or(Time::MAX, |ends| began + ends));
    tokio::pin!(last_call);
    while open || !running.is_empty() {
        let room = at_once.is_none_or(|most| running.len() < most);
        tokio::select! {
            biased;
            () = shutdown.draining() => {
                driven.interrupted = true;
                break;
            }
            Some(answer) = running.join_next() => {
                let answer: Answer = answer.expect("asking does not panic");
                failed += u64::from(answer.end != End::Whole);
                driven.answers.push(answer);
            }
            // A rate ends by its own plan: what was due before the end is sent, late or not.
            () = &mut last_call, if open && at_once.is_some() => open = false,
            body = bodies.recv(), if open && room => match body {
                Some(body) => {
                    sent += 1;
                    driven.asked_tokens += u64::from(body.asked);
                    driven.sent_bytes += body.json.len() as u64;
                    let due = body.at.map(|at| began + at);
                    let server = server.clone();
                    running.spawn(async move { server.ask(body, due).await });
                }
                None => open = false,
            },
            () = beat.tick() => {
                let seconds = seam::now().since(began).as_secs_f64().max(1e-3);
                let by_time = ends.map_or(0.0, |ends| seconds / ends.as_secs_f64());
                let by_number = expected.map_or(0.0, |all| driven.answers.len() as f64 / all.max(1) as f64);
                let share = if at_once.is_none() && expected.is_some() { by_number } else { by_time.max(by_number) };
                let per_second = driven.answers.len() as f64 / seconds;
                let counts = format!("{sent} sent, {} running, {failed} failed, {per_second:.1}/s", running.len());
                bar.reached(share, &counts);
            }
        }
    }
    driven.unfinished = running.len();
    running.shutdown().await;
    driven.ended = match driven.answers.last() {
        Some(answer) if !driven.interrupted => answer.over,
        _ => seam::now(),
    };
    driven.cpu_seconds = process_facts().cpu_seconds - cpu.0;
    driven.thread_seconds = thread_seconds() - cpu.1;
    drop((bodies, stop));
    let _ = writer.join();
    driven
}

type Asks = Box<dyn Iterator<Item = Ask> + Send>;

/// Hands bodies on as fast as they are taken, until the other end has gone.
fn write(asks: Asks, form: &Form, send: &mpsc::Sender<Body>) {
    for ask in asks {
        if send.blocking_send(form.body(&ask)).is_err() {
            return;
        }
    }
}

/// Hands bodies on when they are due, until the other end has gone. Writes ahead while nothing is due.
fn write_and_wait(
    mut asks: Asks,
    form: &Form,
    began: Time,
    stopped: &sync::Receiver<()>,
    send: &mpsc::Sender<Body>,
) {
    let due = |body: &Body| began + body.at.unwrap_or_default();
    let mut ahead: VecDeque<Body> = VecDeque::new();
    loop {
        while ahead.len() < AHEAD && ahead.front().is_none_or(|next| due(next) > seam::now()) {
            let Some(ask) = asks.next() else { break };
            ahead.push_back(form.body(&ask));
        }
        let Some(body) = ahead.pop_front() else { return };
        let left = due(&body).remaining(seam::now());
        if !left.is_zero() && stopped.recv_timeout(left) != Err(sync::RecvTimeoutError::Timeout) {
            return;
        }
        if send.blocking_send(body).is_err() {
            return;
        }
    }
}

/// Processor time of the calling thread; 0 where the system does not say.
fn thread_seconds() -> f64 {
    let text = std::fs::read_to_string("/proc/thread-self/schedstat").unwrap_or_default();
    let nanos = text.split_whitespace().next().and_then(|word| word.parse::<f64>().ok());
    nanos.unwrap_or(0.0) / 1e9
}
