//! One case: what is drawn from its seed, how its stage is reached, what happens then, and what must hold after.

use std::fmt;
use std::time::Duration;

use serde_json::Value;
use tandem_chassis::seam;
use tandem_engine::fake::Ordinary;
use tandem_types::{BLOCK_TOKENS, Time};
use tokio::sync::watch;
use tokio::task::JoinHandle;

use super::super::ask::{End, Heard, Line, Question};
use super::super::fleet::{Fleet, ROUTER};
use super::super::random::Random;
use super::{ANSWER_MAX, MODEL};

/// How often a stage is looked for.
const TRIES: u32 = 6;
/// Tokens of the watched request's answer.
const WATCHED_TOKENS: u64 = 32;
/// Requests after the case until one must have come to the struck worker.
const PROBES_MAX: usize = 24;

/// What happens to the process.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Fault {
    /// `SIGKILL`; another is started at once.
    Kill,
    /// `SIGSTOP`, and `SIGCONT` some seconds later.
    Stop,
}

/// To which one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Victim {
    /// The router.
    Router,
    /// The worker that prefills the watched request.
    Prefill,
    /// The worker that decodes it, or is to.
    Decode,
}

/// When: where the watched request is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Stage {
    /// It waits at its prefill worker.
    Queued,
    /// Its prompt is being computed.
    Prefilling,
    /// Its decode worker is pulling.
    Transferring,
    /// Its client has one token.
    FirstToken,
    /// Its client has some tokens of the decode worker.
    Decoding,
    /// Its client lacks only the last token.
    Finishing,
}

impl Fault {
    pub(super) const ALL: [Fault; 2] = [Fault::Kill, Fault::Stop];
}

impl Victim {
    pub(super) const ALL: [Victim; 3] = [Victim::Router, Victim::Prefill, Victim::Decode];
}

impl Stage {
    pub(super) const ALL: [Stage; 6] = [
        Stage::Queued,
        Stage::Prefilling,
        Stage::Transferring,
        Stage::FirstToken,
        Stage::Decoding,
        Stage::Finishing,
    ];
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Fault::Kill => "kill",
            Fault::Stop => "stop",
        })
    }
}

impl fmt::Display for Victim {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Victim::Router => "router",
            Victim::Prefill => "prefill",
            Victim::Decode => "decode",
        })
    }
}

impl fmt::Display for Stage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Stage::Queued => "queued",
            Stage::Prefilling => "prefilling",
            Stage::Transferring => "transferring",
            Stage::FirstToken => "first token",
            Stage::Decoding => "decoding",
            Stage::Finishing => "finishing",
        })
    }
}

/// Something that must never be, in a sentence.
#[derive(Debug)]
pub struct Violation(pub String);

impl From<String> for Violation {
    fn from(what: String) -> Violation {
        Violation(what)
    }
}

/// A case, as its seed has it.
#[derive(Clone, Debug)]
pub struct Case {
    seed: u64,
    pub(super) fault: Fault,
    pub(super) victim: Victim,
    pub(super) stage: Stage,
    /// How long a stopped process stands still.
    pause: Duration,
    /// Blocks of the watched prompt at the first try.
    blocks: u64,
    /// Tokens after which the watched request counts as decoding.
    decoded: usize,
}

/// What came of the watched request of a case that held.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Watched {
    /// It completed at its first attempt.
    #[default]
    Whole,
    /// It completed after it had been placed again.
    Again,
    /// It ended loudly.
    Loud,
}

/// What came of a case that held.
#[derive(Debug, Default)]
pub struct Outcome {
    pub(super) watched: Watched,
    pub(super) requests: u64,
    pub(super) complete: u64,
    /// Stages that passed unseen.
    pub(super) missed: u32,
    /// The last one too: the fault came after it.
    pub(super) late: bool,
    /// From the last answer's end until everybody was at rest.
    pub(super) rest: Duration,
}

impl fmt::Display for Case {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {} while {}", self.fault, self.victim, self.stage)?;
        if self.fault == Fault::Stop {
            write!(f, " for {:.1?}", self.pause)?;
        }
        Ok(())
    }
}

/// A request under way.
struct Asked {
    question: Question,
    tokens: watch::Receiver<usize>,
    answer: JoinHandle<Heard>,
}

impl Asked {
    fn ask(fleet: &Fleet, question: Question) -> Result<Asked, Violation> {
        let api = fleet.api()?;
        let (progress, tokens) = watch::channel(0);
        let asked = question.clone();
        let answer = seam::spawn(async move {
            let mut heard = Heard::default();
            match Line::open(api).await {
                Ok(mut line) => line.ask(&asked, &mut heard, &progress).await,
                Err(error) => heard.broken(error),
            }
            heard
        });
        Ok(Asked { question, tokens, answer })
    }

    fn is_over(&self) -> bool {
        self.answer.is_finished()
    }

    /// How it ended, by `deadline`.
    async fn end(self, deadline: Time, ordinary: &Ordinary) -> Result<(Question, Heard, End), Violation> {
        let name = self.question.name.clone();
        let heard = seam::timeout(deadline.remaining(seam::now()), self.answer).await;
        let heard = heard.map_err(|_| format!("{name} hangs: {} tokens came", *self.tokens.borrow()))?;
        let heard = heard.map_err(|error| format!("{name}: {error}"))?;
        let end = self.question.judge(&heard, ordinary);
        if let End::Wrong(what) = &end {
            return Err(Violation(format!("{name}: {what}")));
        }
        Ok((self.question, heard, end))
    }
}

/// Whether the watched request's stage was met.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Seen {
    Now,
    Passed,
}

/// Who works for the watched request.
#[derive(Debug, Default)]
struct Route {
    prefill: Option<String>,
    decode: Option<String>,
}

impl Case {
    /// Draws it.
    pub fn of(seed: u64) -> Case {
        // Neighbours differ in everything, and 36 of them are all there are.
        let cell = (seed.wrapping_mul(7) % 36) as usize;
        let mut random = Random::new(seed);
        Case {
            seed,
            fault: Fault::ALL[cell / 18],
            victim: Victim::ALL[cell / 6 % 3],
            stage: Stage::ALL[cell % 6],
            // Shorter and longer than the three seconds after which a silent session is given up.
            pause: Duration::from_millis(if random.percent(50) {
                random.within(500..2000)
            } else {
                random.within(3500..5000)
            }),
            blocks: random.within(12..52),
            decoded: random.within(3..WATCHED_TOKENS - 4) as usize,
        }
    }

    /// Runs it on a cluster at rest and leaves the cluster at rest.
    pub async fn run(&self, fleet: &mut Fleet, ordinary: &Ordinary) -> Result<Outcome, Violation> {
        for missed in 0.. {
            if let Some(outcome) = self.attempt(fleet, ordinary, missed).await? {
                return Ok(Outcome { missed, ..outcome });
            }
        }
        unreachable!("the last try strikes")
    }

    /// `None` if the stage passed unseen, and nothing was struck. The last try strikes all the same: what must hold
    /// does not depend on the moment.
    async fn attempt(
        &self,
        fleet: &mut Fleet,
        ordinary: &Ordinary,
        nth: u32,
    ) -> Result<Option<Outcome>, Violation> {
        let last = nth + 1 >= TRIES;
        let mut random = Random::new(self.seed ^ u64::from(nth) << 32);
        let mut asked = Vec::new();
        for index in 0..if self.stage == Stage::Queued { 4 } else { 2 } {
            let streamed = index > 0 || random.percent(50);
            let tokens = random.within(40..100) as usize;
            let prompt = prompt(&mut random, 300);
            let name = format!("company-{index}");
            asked.push(Asked::ask(fleet, self.question(&mut random, nth, &name, prompt, tokens, streamed))?);
        }
        if !self.company_is_there(fleet, &asked).await && !last {
            finish(asked, ordinary).await?;
            return Ok(None);
        }
        // A whole number of blocks and a part, twice as many at every further try.
        let blocks = self.blocks << nth.min(3);
        let length = blocks * u64::from(BLOCK_TOKENS) + random.within(1..32);
        let prompt = random.prompt(length);
        let question = self.question(&mut random, nth, "watched", prompt, WATCHED_TOKENS as usize, true);
        let mut watched = Asked::ask(fleet, question)?;
        let (seen, route) = self.reach(fleet, &mut watched).await;
        asked.insert(0, watched);
        if seen == Seen::Passed && !last {
            finish(asked, ordinary).await?;
            return Ok(None);
        }
        let struck = match self.victim {
            Victim::Router => Some(ROUTER.to_owned()),
            Victim::Prefill => route.prefill,
            Victim::Decode => route.decode,
        };
        // On a busy machine a stage may pass every time before it is seen, and with it who was in it.
        let anybody = || fleet.ids().into_iter().find(|id| id.starts_with(&self.victim.to_string()));
        let struck = struck.or_else(anybody).ok_or_else(|| format!("there is no {}", self.victim))?;
        self.strike(fleet, &struck, &mut random, nth, &mut asked).await?;
        let outcome = self.judge(fleet, ordinary, &struck, asked).await?;
        Ok(Some(Outcome { late: seen == Seen::Passed, ..outcome }))
    }

    fn question(
        &self,
        random: &mut Random,
        nth: u32,
        name: &str,
        prompt: Vec<u32>,
        max_tokens: usize,
        streamed: bool,
    ) -> Question {
        let seed = (random.percent(50)).then(|| random.within(0..1 << 50));
        let name = format!("{}-{nth}-{name}", self.seed);
        Question { name, model: MODEL.into(), prompt, max_tokens, seed, streamed }
    }

    // ------------------------------------------------------------------ reaching the stage

    /// Waits until the other requests are where this stage wants them: in front of the watched one, or decoding.
    async fn company_is_there(&self, fleet: &Fleet, company: &[Asked]) -> bool {
        let deadline = seam::now() + Duration::from_secs(5);
        while seam::now() < deadline && company.iter().all(|asked| !asked.is_over()) {
            let there = if self.stage == Stage::Queued {
                let states = [fleet.state("prefill-0").await, fleet.state("prefill-1").await];
                states.iter().flatten().map(|state| number(&state["waiting"])).sum::<u64>() > 0
            } else {
                let states = [fleet.state("decode-0").await, fleet.state("decode-1").await];
                states.iter().flatten().map(|state| number(&state["running"])).sum::<u64>()
                    >= company.len() as u64
            };
            if there {
                return true;
            }
        }
        false
    }

    /// Waits until the watched request is in the stage, or has gone past it, or has ended.
    async fn reach(&self, fleet: &Fleet, watched: &mut Asked) -> (Seen, Route) {
        let deadline = seam::now() + ANSWER_MAX;
        let mut known = Route::default();
        while !watched.is_over() && seam::now() < deadline {
            let tokens = *watched.tokens.borrow_and_update();
            // Asking takes as long as a token; by the first token all has been said but the choice made then.
            if tokens == 0 || (tokens == 1 && self.victim == Victim::Decode) {
                known = route(fleet, &watched.question.name).await;
            }
            let reached = self.is_in(fleet, &known, tokens).await;
            // The stage may have ended while it was looked at.
            let passed = *watched.tokens.borrow() > self.tokens_max() || watched.is_over();
            match (reached, passed) {
                (_, true) => return (Seen::Passed, known),
                (true, false) => return (Seen::Now, known),
                (false, false) if self.stage >= Stage::FirstToken => {
                    let _ = seam::timeout(Duration::from_millis(5), watched.tokens.changed()).await;
                }
                (false, false) => {}
            }
        }
        (Seen::Passed, route(fleet, &watched.question.name).await)
    }

    /// Whether a request with so many tokens is in the stage, as far as the workers' states tell.
    async fn is_in(&self, fleet: &Fleet, route: &Route, tokens: usize) -> bool {
        match self.stage {
            Stage::Queued => number(&state(fleet, &route.prefill).await["waiting"]) > 0,
            Stage::Prefilling => {
                let prefill = state(fleet, &route.prefill).await;
                number(&prefill["running"]) > 0 && number(&prefill["waiting"]) == 0
            }
            Stage::Transferring => {
                let decode = state(fleet, &route.decode).await;
                number(&decode["legs"]) > number(&decode["running"]) + number(&decode["waiting"])
            }
            Stage::FirstToken => tokens == 1,
            Stage::Decoding => tokens >= self.decoded,
            Stage::Finishing => tokens >= WATCHED_TOKENS as usize - 1,
        }
    }

    /// With more tokens than these a request is past the stage.
    fn tokens_max(&self) -> usize {
        match self.stage {
            Stage::Queued | Stage::Prefilling => 0,
            Stage::Transferring | Stage::FirstToken => 1,
            Stage::Decoding => WATCHED_TOKENS as usize - 2,
            Stage::Finishing => WATCHED_TOKENS as usize,
        }
    }

    // ------------------------------------------------------------------ the fault

    /// Does it, to the end, with two more requests in the middle of it.
    async fn strike(
        &self,
        fleet: &mut Fleet,
        struck: &str,
        random: &mut Random,
        nth: u32,
        asked: &mut Vec<Asked>,
    ) -> Result<(), Violation> {
        match self.fault {
            Fault::Kill => {
                fleet.kill(struck);
                fleet.start_again(struck)?;
            }
            Fault::Stop => fleet.stop(struck),
        }
        if struck != ROUTER {
            for index in 0..2 {
                let prompt = prompt(random, 400);
                let tokens = random.within(1..21) as usize;
                let streamed = random.percent(50);
                let name = format!("later-{index}");
                asked.push(Asked::ask(fleet, self.question(random, nth, &name, prompt, tokens, streamed))?);
            }
        }
        if self.fault == Fault::Stop {
            seam::sleep(self.pause).await;
            fleet.go_on(struck);
        }
        Ok(())
    }

    // ------------------------------------------------------------------ what must hold

    /// The watched request comes first.
    async fn judge(
        &self,
        fleet: &Fleet,
        ordinary: &Ordinary,
        struck: &str,
        asked: Vec<Asked>,
    ) -> Result<Outcome, Violation> {
        let mut outcome = Outcome::default();
        let deadline = seam::now() + ANSWER_MAX;
        for (index, asked) in asked.into_iter().enumerate() {
            let (question, heard, end) = asked.end(deadline, ordinary).await?;
            let record = fleet.get(ROUTER, &format!("/admin/requests/{}", question.name)).await;
            let record = record.unwrap_or_default();
            let watched = match end {
                End::Loud(why) if !self.may_be_loud(&record, struck, &question, &heard) => {
                    return Err(Violation(format!(
                        "{} ended after {} tokens although {struck} did not decode it: {why}{}",
                        question.name,
                        heard.tokens.len(),
                        brief(&record)
                    )));
                }
                End::Loud(_) => Watched::Loud,
                _ if was_placed_again(&record) => Watched::Again,
                _ => Watched::Whole,
            };
            outcome.requests += 1;
            outcome.complete += u64::from(watched != Watched::Loud);
            if index == 0 {
                outcome.watched = watched;
            }
        }
        let survivors = fleet.ids().into_iter().filter(|id| self.fault == Fault::Stop || id != struck);
        outcome.rest = fleet.wait_until_at_rest(&survivors.collect::<Vec<_>>()).await?;
        fleet.wait_until_whole().await?;
        self.use_again(fleet, ordinary, struck).await?;
        fleet.wait_until_at_rest(&fleet.ids()).await?;
        match fleet.panics().first() {
            None => Ok(outcome),
            Some(panic) => Err(Violation(panic.clone())),
        }
    }

    /// Only a stream whose decode leg was lost after its first delta, or whose router was struck.
    fn may_be_loud(&self, record: &Value, struck: &str, question: &Question, heard: &Heard) -> bool {
        let decoded_there =
            events(record, "start").any(|start| start["worker"] == struck && start["until"] == "UNTIL_END");
        // Not streamed, nothing is seen of what has come.
        self.victim == Victim::Router || decoded_there && (!question.streamed || !heard.tokens.is_empty())
    }

    /// The struck process, or the one in its place, serves again.
    async fn use_again(&self, fleet: &Fleet, ordinary: &Ordinary, struck: &str) -> Result<(), Violation> {
        let mut random = Random::new(!self.seed);
        for index in 0..PROBES_MAX {
            let prompt = prompt(&mut random, 200);
            let question = self.question(&mut random, 0, &format!("probe-{index}"), prompt, 4, true);
            must_complete(fleet, &question, ordinary).await?;
            let record = fleet.get(ROUTER, &format!("/admin/requests/{}", question.name)).await?;
            if struck == ROUTER || events(&record, "start").any(|start| start["worker"] == struck) {
                return Ok(());
            }
        }
        Err(Violation(format!("no request in {PROBES_MAX} came to {struck}")))
    }
}

/// Asks on a cluster without faults.
pub async fn must_complete(fleet: &Fleet, question: &Question, ordinary: &Ordinary) -> Result<(), Violation> {
    finish(vec![Asked::ask(fleet, question.clone())?], ordinary).await
}

/// Waits for requests that nothing has happened to.
async fn finish(asked: Vec<Asked>, ordinary: &Ordinary) -> Result<(), Violation> {
    let deadline = seam::now() + ANSWER_MAX;
    for asked in asked {
        if let (question, _, End::Loud(why)) = asked.end(deadline, ordinary).await? {
            return Err(Violation(format!("without a fault {} ended: {why}", question.name)));
        }
    }
    Ok(())
}

/// Whom the router's record names so far.
async fn route(fleet: &Fleet, name: &str) -> Route {
    let Ok(record) = fleet.get(ROUTER, &format!("/admin/requests/{name}")).await else {
        return Route::default();
    };
    let mut route = Route::default();
    for chosen in events(&record, "route").map(|facts| &facts["chosen"]) {
        route = Route { prefill: text(&chosen["prefill"]), decode: text(&chosen["decode"]) };
    }
    if let Some(chosen) = events(&record, "decode").last() {
        route.decode = text(&chosen["chosen"]).or(route.decode);
    }
    route
}

/// Facts of the events of a kind in a record.
fn events<'a>(record: &'a Value, what: &'a str) -> impl Iterator<Item = &'a Value> {
    let events = record["events"].as_array().into_iter().flatten();
    events.filter(move |event| event["what"] == what).map(|event| &event["facts"])
}

/// Whether another attempt was made after one had failed.
fn was_placed_again(record: &Value) -> bool {
    let mut events = record["events"].as_array().into_iter().flatten();
    events.any(|event| event["what"].as_str().is_some_and(|what| what.ends_with("placed again")))
}

/// A record without its candidates, a line each.
fn brief(record: &Value) -> String {
    let events = record["events"].as_array().into_iter().flatten();
    let lines = events.map(|event| {
        let facts = &event["facts"];
        let facts = facts.get("chosen").unwrap_or(facts);
        format!("\n  {:.0} ms {} {facts}", event["at_ms"].as_f64().unwrap_or_default(), event["what"])
    });
    lines.collect()
}

async fn state(fleet: &Fleet, id: &Option<String>) -> Value {
    match id {
        Some(id) => fleet.state(id).await.unwrap_or_default(),
        None => Value::Null,
    }
}

/// A prompt of up to so many tokens.
fn prompt(random: &mut Random, tokens_max: u64) -> Vec<u32> {
    let length = random.within(1..tokens_max + 1);
    random.prompt(length)
}

fn number(value: &Value) -> u64 {
    value.as_u64().unwrap_or_default()
}

fn text(value: &Value) -> Option<String> {
    value.as_str().map(str::to_owned)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn thirty_six_neighbours_are_every_fault_in_every_stage() {
        for first in [0, 1, 1000] {
            let cells = (first..first + 36).map(|seed| {
                let case = Case::of(seed);
                (case.fault, case.victim, case.stage)
            });
            assert_eq!(cells.collect::<BTreeSet<_>>().len(), 36);
        }
    }
}
