//! Fail points where none can wait: around the engine, and around pulls.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use tandem_batching::{Outcome, Plan};
use tandem_chassis::fail::{self, Action, Passage};
use tandem_chassis::seam;
use tandem_engine::{Engine, Facts, StepError};
use tandem_kv_transfer::{Buffers, Completion, Peer, Pull, PullError};
use tandem_memory::Region;
use tandem_types::Time;

/// An engine behind the fail points `engine.submit` and `engine.collect`. Only simulated workers have one.
pub(crate) struct FaultyEngine {
    engine: Box<dyn Engine>,
    worker: String,
    /// Plans that have not reached the engine yet, and when they will.
    late: VecDeque<(Time, Plan)>,
    /// Outcomes on their way back, and when they are here.
    results: VecDeque<(Time, Result<Outcome, StepError>)>,
    /// Steps that nobody will ever hear of.
    lost: usize,
}

impl FaultyEngine {
    pub(crate) fn new(engine: Box<dyn Engine>, worker: &str) -> FaultyEngine {
        FaultyEngine {
            engine,
            worker: worker.to_owned(),
            late: VecDeque::new(),
            results: VecDeque::new(),
            lost: 0,
        }
    }

    /// Takes what the engine has finished and lets it pass its fail point.
    fn fetch(&mut self, now: Time) {
        while self.late.front().is_some_and(|(due, _)| *due <= now) {
            let (_, plan) = self.late.pop_front().expect("looked at above");
            self.engine.submit(plan, now);
        }
        while let Some(result) = self.engine.collect(now) {
            let struck = fail::hit("engine.collect", &self.worker);
            match struck {
                None => self.results.push_back((now, result)),
                Some(Action::Panic) => fail::panic_at("engine.collect"),
                Some(Action::Error) => {
                    let plan = result.map_or_else(|error| error.plan, |outcome| outcome.id);
                    self.results.push_back((now, Err(failed(plan, "engine.collect"))));
                }
                Some(Action::Drop) => self.lost += 1,
                Some(Action::Double) => {
                    self.results.push_back((now, result.clone()));
                    self.results.push_back((now, result));
                }
                Some(late @ (Action::Late | Action::VeryLate)) => {
                    self.results.push_back((now + late.delay().unwrap_or_default(), result));
                }
            }
        }
    }
}

fn failed(plan: u64, point: &str) -> StepError {
    StepError { plan, reason: format!("{} {point}", fail::PANIC) }
}

impl Engine for FaultyEngine {
    fn facts(&self) -> &Facts {
        self.engine.facts()
    }

    fn kv_region(&self) -> Arc<Region> {
        self.engine.kv_region()
    }

    fn page_offset(&self, group: u32, page: u32) -> u64 {
        self.engine.page_offset(group, page)
    }

    fn submit(&mut self, plan: Plan, now: Time) {
        match fail::hit("engine.submit", &self.worker) {
            None => self.engine.submit(plan, now),
            Some(Action::Panic) => fail::panic_at("engine.submit"),
            Some(Action::Error) => self.results.push_back((now, Err(failed(plan.id, "engine.submit")))),
            Some(Action::Drop) => self.lost += 1,
            Some(Action::Double) => {
                // The device writes the same words to the same pages again, one step after the other.
                self.engine.submit(plan.clone(), now);
                let ready = self.engine.ready_at().unwrap_or(now);
                drop(self.engine.collect(ready));
                self.late.push_back((ready, plan));
            }
            Some(late @ (Action::Late | Action::VeryLate)) => {
                self.late.push_back((now + late.delay().unwrap_or_default(), plan));
            }
        }
    }

    fn collect(&mut self, now: Time) -> Option<Result<Outcome, StepError>> {
        self.fetch(now);
        self.results.front().filter(|(due, _)| *due <= now)?;
        self.results.pop_front().map(|(_, result)| result)
    }

    fn in_flight(&self) -> usize {
        self.engine.in_flight() + self.late.len() + self.results.len() + self.lost
    }

    fn ready_at(&self) -> Option<Time> {
        let late = self.late.front().map(|(due, _)| *due);
        let result = self.results.front().map(|(due, _)| *due);
        let soonest = [late, result, self.engine.ready_at()].into_iter().flatten().min();
        soonest.or((self.lost > 0).then_some(Time::MAX))
    }

    fn expected(&self, plan: &Plan) -> Duration {
        self.engine.expected(plan)
    }

    fn zero_tail(&mut self, group: u32, page: u32, rows: u32) {
        self.engine.zero_tail(group, page, rows);
    }
}

/// Pulls through the fail points `pull.request` and `pull.completion`. Also says how often the completion comes.
pub(crate) async fn pull(peer: Arc<dyn Peer>, pull: Pull, owner: &str) -> (Completion, usize) {
    let deadline = pull.deadline;
    let never = |error| Completion { bytes: Err(error), checksums: Vec::new(), buffers: Buffers::Reusable };
    let broken = |point: &str| never(PullError::PeerGone(format!("{} {point}", fail::PANIC)));
    let completion = match fail::pass("pull.request", owner).await {
        Passage::Once => peer.pull(pull).await,
        Passage::Twice => {
            drop(peer.pull(pull.clone()).await);
            peer.pull(pull).await
        }
        Passage::Lost => {
            seam::sleep_until(deadline).await;
            never(PullError::Deadline)
        }
        Passage::Broken => broken("pull.request"),
    };
    match fail::pass("pull.completion", owner).await {
        Passage::Once => (completion, 1),
        Passage::Twice => (completion, 2),
        Passage::Lost => {
            seam::sleep_until(deadline).await;
            (never(PullError::Deadline), 1)
        }
        Passage::Broken => (broken("pull.completion"), 1),
    }
}
