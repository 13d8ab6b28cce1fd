//! What a case's number stands for: a cluster, a load, and the faults that strike it.

use std::time::Duration;

use tandem_chassis::fail::{Action, Fault, POINTS};
use tandem_types::Role;

use super::random::Random;

/// Everything that happens in a case.
#[derive(Clone, Debug)]
pub struct Case {
    /// Its number.
    pub number: u64,
    /// Prefill, decode and mixed workers.
    pub workers: (u64, u64, u64),
    /// What the load is made to bring about.
    pub situation: Situation,
    /// The faults; the first is the one that the number stands for.
    pub faults: Vec<Fault>,
    /// Requests of clients.
    pub asks: Vec<Ask>,
    /// Changes of roles.
    pub flips: Vec<Flip>,
    /// What a scripted router does beside the real one.
    pub scripts: Vec<Plot>,
    /// Seed of what scripts draw.
    pub script_seed: u64,
}

/// What a load is made to bring about. Rare messages need a reason to be sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Situation {
    /// Requests as they come.
    Ordinary,
    /// A client stops reading for a while.
    SlowClient,
    /// Prompts take long, so that leases must be renewed.
    LongPrefill,
    /// Pools are too small for everybody.
    SmallPool,
    /// Most clients leave.
    Leaving,
    /// Workers refuse.
    Refusing,
    /// Steps fail.
    Failing,
}

/// What the scripted router does with two or three workers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Plot {
    /// Starts the decoder at the grant and lets both finish.
    Overlap,
    /// Ends the lease while it is followed.
    EndLease,
    /// Lets the request end with its first token while it is followed.
    EndAtFirst,
    /// Starts a second decoder from the same handle while the first follows.
    Supersede,
    /// Cancels the prefill while it is followed.
    CancelPrefill,
    /// Names a holder of the prompt's blocks.
    Borrow,
}

/// A request of a client.
#[derive(Clone, Debug)]
pub struct Ask {
    /// Its `x-request-id`.
    pub name: String,
    /// When it comes.
    pub at: Duration,
    /// What it asks.
    pub prompt: Vec<u32>,
    /// How many tokens it wants.
    pub tokens: u32,
    /// How many answers.
    pub choices: u32,
    /// Drawn with this seed; greedily without.
    pub seed: Option<u64>,
    /// Answered by events.
    pub streamed: bool,
    /// Asks for log probabilities, which make events long.
    pub logprobs: bool,
    /// Asks for those of its prompt too.
    pub scored: bool,
    /// When the client leaves, if it does.
    pub leaves: Option<Duration>,
    /// After how many events it stops reading, and for how long.
    pub stalls: Option<(usize, Duration)>,
}

/// A worker gets another role.
#[derive(Clone, Debug)]
pub struct Flip {
    /// When.
    pub at: Duration,
    /// Which worker, by index.
    pub worker: u64,
    /// What it becomes.
    pub role: Role,
}

/// Fail points times actions.
pub fn cells() -> Vec<(&'static str, Action)> {
    POINTS.iter().flat_map(|(point, _)| Action::ALL.map(|action| (*point, action))).collect()
}

impl Case {
    /// The case of this number.
    pub fn draw(number: u64) -> Case {
        let cells = cells();
        let (point, action) = cells[(number % cells.len() as u64) as usize];
        let mut random = Random::new(number);
        let (situation, plot) = reason(point, &mut random);
        let workers = match situation {
            Situation::SmallPool => (random.within(0..2), random.within(0..2), 1),
            _ => (random.within(1..3), random.within(1..4), random.within(0..2)),
        };
        // A second decoder is needed to supersede the first.
        let workers = match plot {
            Some(Plot::Supersede) => (workers.0, workers.1.max(2), workers.2),
            _ => workers,
        };
        let all = workers.0 + workers.1 + workers.2;
        let mut faults = vec![Fault { point, action, nth: nth(point, &mut random), whom: None }];
        if random.percent(35) {
            let (point, action) = *random.one_of(&cells);
            let whom = random.percent(30).then(|| name(workers, random.within(0..all)));
            faults.push(Fault { point, action, nth: random.within(1..8) as u32, whom });
        }
        let prefix = random.prompt(96);
        let asks = (0..random.within(4..9)).map(|index| ask(index, situation, &prefix, &mut random));
        let mut asks: Vec<Ask> = asks.collect();
        for ask in asks.iter_mut().filter(|ask| ask.stalls.is_none()) {
            ask.logprobs |= point == "frame.scored";
            ask.scored = ask.logprobs;
        }
        let flips = (0..random.within(0..3)).filter(|_| situation == Situation::Ordinary).map(|_| Flip {
            at: Duration::from_millis(random.within(0..3000)),
            worker: random.within(0..all),
            role: *random.one_of(&[Role::Prefill, Role::Decode, Role::Mixed]),
        });
        let flips = flips.collect();
        Case {
            number,
            workers,
            situation,
            faults,
            asks,
            flips,
            scripts: plot.into_iter().collect(),
            script_seed: random.within(0..u64::MAX),
        }
    }

    /// The fake engines' spec.
    pub(crate) fn fake(&self) -> String {
        match self.situation {
            Situation::LongPrefill => "paced:5s,10ms".to_owned(),
            Situation::SlowClient => "paced:5ms,1ms".to_owned(),
            Situation::Refusing => format!("paced:30ms,10ms,refuse=0.4,seed={}", self.number),
            Situation::Failing => format!("paced:30ms,10ms,fail=0.05,seed={}", self.number),
            Situation::Ordinary | Situation::Leaving | Situation::SmallPool => "paced:30ms,10ms".to_owned(),
        }
    }

    /// Blocks of each worker's pool.
    pub(crate) fn blocks(&self) -> u64 {
        if self.situation == Situation::SmallPool { 14 } else { 512 }
    }
}

/// The name of a worker by its index.
fn name((prefill, decode, _): (u64, u64, u64), index: u64) -> String {
    match index {
        _ if index < prefill => format!("prefill-{index}"),
        _ if index < prefill + decode => format!("decode-{}", index - prefill),
        _ => format!("mixed-{}", index - prefill - decode),
    }
}

/// What must happen for a message to pass this point.
fn reason(point: &str, random: &mut Random) -> (Situation, Option<Plot>) {
    let plots = [Plot::Overlap, Plot::EndLease, Plot::EndAtFirst, Plot::Supersede, Plot::CancelPrefill];
    match point {
        "session.pause" | "session.resume" => (Situation::SlowClient, None),
        "session.renew" => (Situation::LongPrefill, None),
        "session.cancel" => (Situation::Leaving, None),
        "session.end-lease" => (Situation::Ordinary, Some(Plot::EndLease)),
        "frame.refused" => (Situation::Refusing, None),
        "frame.failed" => (Situation::Failing, None),
        "frame.preempted" => (Situation::SmallPool, None),
        "follow.done" => (Situation::Ordinary, Some(Plot::EndAtFirst)),
        "follow.superseded" => (Situation::Ordinary, Some(Plot::Supersede)),
        "follow.lost" => (Situation::Ordinary, Some(Plot::CancelPrefill)),
        "lend.request" | "lend.reply" => (Situation::Ordinary, Some(Plot::Borrow)),
        _ => {
            let plot = random.percent(30).then(|| *random.one_of(&plots));
            let situations = [Situation::Ordinary, Situation::SmallPool, Situation::Refusing];
            let usual = random.percent(80) || plot.is_some();
            (if usual { Situation::Ordinary } else { *random.one_of(&situations) }, plot)
        }
    }
}

/// Which message is struck. Rare ones must not be waited for in vain.
fn nth(point: &str, random: &mut Random) -> u32 {
    let among = match point {
        "session.beat" | "frame.beat" => 30,
        "frame.delta" => 40,
        "engine.submit" | "engine.collect" => 30,
        "session.start" | "frame.granted" | "frame.released" => 5,
        "session.cancel" => 2,
        "follow.claim" | "follow.claimed" | "follow.ready" | "follow.sealed" => 3,
        "pull.request" | "pull.gate" | "pull.completion" | "end.request" | "end.reply" => 3,
        "frame.finished" | "frame.scored" => 3,
        _ => 1,
    };
    random.within(1..among + 1) as u32
}

fn ask(index: u64, situation: Situation, prefix: &[u32], random: &mut Random) -> Ask {
    let slow = situation == Situation::SlowClient && index == 0;
    let length = match situation {
        Situation::SmallPool => 60..120,
        // Long enough for a decoder to follow while the prompt is still being computed.
        _ if random.percent(30) => 1024..1400,
        _ => 1..260,
    };
    let length = random.within(length);
    let mut prompt = random.prompt(length);
    if random.percent(30) {
        prompt.splice(0..0, prefix.iter().copied());
    }
    let tokens = match situation {
        _ if slow => 2500,
        Situation::SmallPool => random.within(60..180) as u32,
        _ if random.percent(10) => 1,
        _ => random.within(1..50) as u32,
    };
    Ask {
        name: format!("ask-{index}"),
        at: Duration::from_millis(random.within(0..2000)),
        prompt,
        tokens,
        choices: if random.percent(15) { 2 } else { 1 },
        seed: random.percent(40).then(|| random.within(0..1 << 40)),
        streamed: slow || random.percent(70),
        logprobs: slow || random.percent(10),
        scored: false,
        leaves: match situation {
            _ if slow => None,
            Situation::Leaving => random.percent(70).then(|| random.within(0..500)),
            _ => random.percent(20).then(|| random.within(0..2500)),
        }
        .map(Duration::from_millis),
        stalls: slow.then(|| (3, Duration::from_secs(random.within(4..9)))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_number_always_stands_for_the_same_case_and_every_cell_comes_in_turn() {
        assert_eq!(format!("{:?}", Case::draw(5)), format!("{:?}", Case::draw(5)));
        let count = cells().len() as u64;
        let mut met: Vec<_> = (1000..1000 + count)
            .map(|number| {
                let first = Case::draw(number).faults.remove(0);
                (first.point, first.action)
            })
            .collect();
        met.sort_unstable();
        met.dedup();
        assert_eq!(met.len() as u64, count);
    }
}
