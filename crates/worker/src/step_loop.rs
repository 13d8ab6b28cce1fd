//! The step loop: what the engine thread does, as a value that is driven by a thread or by virtual time.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use tandem_chassis::seam;
use tandem_engine::Engine;
use tandem_kv_transfer::checksum;
use tandem_placement::predictor::Measured;
use tandem_types::{BLOCK_TOKENS, Time};
use tokio::sync::Notify;

use crate::core::{CompletedPage, Core, PageSum, measure};
use crate::pages::PageMap;
use crate::shared::Shared;

/// Between two checks of the books.
const CHECK_EVERY: std::time::Duration = std::time::Duration::from_secs(1);

/// What to wait for before the next turn.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Turn {
    /// For a command.
    Idle,
    /// For a command, or this moment.
    Until(Time),
    /// For the device; a command may come meanwhile.
    InFlight,
}

/// Engine and state, turned step by step.
pub(crate) struct StepLoop {
    shared: Arc<Shared>,
    engine: Box<dyn Engine>,
    depth: usize,
    pages: PageMap,
    checksums: bool,
    /// When the last plan was submitted.
    submitted: Time,
    /// When the books were last checked.
    checked: Time,
    /// The plans that the engine has, and what they compute, where that tells how fast steps are: those that score a
    /// prompt do much else.
    plans: VecDeque<(u64, Option<Measured>)>,
}

impl StepLoop {
    pub(crate) fn new(shared: Arc<Shared>, engine: Box<dyn Engine>, checksums: bool) -> StepLoop {
        let depth = engine.facts().depth as usize;
        let pages = PageMap::of(&*engine);
        let (submitted, checked, plans) = (Time::ZERO, Time::ZERO, VecDeque::new());
        StepLoop { shared, engine, depth, pages, checksums, submitted, checked, plans }
    }

    /// One turn, whole: take what the device has finished, then give it the next step.
    pub(crate) fn turn(&mut self, now: Time) -> Turn {
        while let Some(result) = self.engine.collect(now) {
            let plan = result.as_ref().map_or_else(|error| error.plan, |outcome| outcome.id);
            if self.plans.front().map(|(id, _)| *id) != Some(plan) {
                // A device that signals twice must not make a step count twice.
                tracing::error!(plan, "the engine brought an outcome that nobody waits for");
                continue;
            }
            let (_, measured) = self.plans.pop_front().expect("looked at above");
            self.shared.progress.end();
            if let Ok(outcome) = &result {
                if let Some(mut step) = measured {
                    let prompt: u32 =
                        outcome.rows.iter().map(|row| row.count).filter(|&count| count > 1).sum();
                    step.seconds = now.since(self.submitted).as_secs_f64();
                    self.shared.step(|core, _| {
                        core.costs().computed(prompt, now.since(self.submitted));
                        core.learn(step);
                    });
                }
                let drawn = outcome.rows.iter().filter(|row| row.sampled.is_some()).count();
                self.shared.metrics.observe_step(now.since(self.submitted), drawn);
            }
            let sums = if result.is_ok() { self.complete_pages() } else { Vec::new() };
            self.shared.step(|core, now| match result {
                Ok(outcome) => core.collected(outcome, &sums, now),
                Err(error) => {
                    tracing::error!(%error, "engine step failed");
                    core.step_failed(error.plan, now);
                }
            });
        }
        if self.engine.in_flight() <= self.depth
            && let Some(plan) = self.shared.step(|core, now| core.plan(now))
        {
            self.shared.metrics.observe_plan(&plan);
            self.shared.progress.begin(now, self.engine.expected(&plan));
            self.submitted = now;
            let scores = plan.rows.iter().any(|row| row.score.is_some());
            self.plans.push_back((plan.id, (!scores).then(|| measure(&plan))));
            self.engine.submit(plan, now);
            return Turn::InFlight;
        }
        if self.engine.in_flight() > 0 {
            return Turn::InFlight;
        }
        // Idle is the cheapest time to find a leak, but large books take a while to check.
        let check = now.since(self.checked) >= CHECK_EVERY;
        if check {
            self.checked = now;
        }
        self.shared.look(|core| {
            if check {
                core.check_books();
            }
            core.next_deadline().map_or(Turn::Idle, Turn::Until)
        })
    }

    /// Zeroes tails and takes checksums of what the step has completed. Not under the lock: pages are large.
    fn complete_pages(&mut self) -> Vec<PageSum> {
        let completed = self.shared.look(Core::completing);
        for page in completed.iter().filter(|page| page.rows < BLOCK_TOKENS) {
            self.engine.zero_tail(page.group, page.page, page.rows);
        }
        if !self.checksums {
            return Vec::new();
        }
        let region = self.engine.kv_region();
        let sum = |page: CompletedPage| {
            let place = self.pages.place(page.group, page.page);
            // SAFETY: the step that wrote the page is collected, and the plan that named it keeps it from any
            // other use until `collected`.
            let bytes = unsafe { region.slice(place.offset as usize, place.len as usize) };
            PageSum { group: page.group, page: page.page, checksum: checksum(bytes) }
        };
        completed.into_iter().map(sum).collect()
    }
}

/// Turns the loop on this thread until `stopped`; parks while there is nothing to do.
pub(crate) fn drive(mut steps: StepLoop, stopped: &AtomicBool) {
    while !stopped.load(Ordering::Acquire) {
        // An unpark that came since the turn began makes these return at once.
        match steps.next(seam::now()) {
            Next::Now => {}
            Next::At(Time::MAX) => std::thread::park(),
            Next::At(time) => std::thread::park_timeout(time.remaining(seam::now())),
        }
    }
}

/// Turns the loop in a task until `stopped`; virtual time goes on while there is nothing to do.
pub(crate) async fn drive_in_virtual_time(mut steps: StepLoop, stopped: &AtomicBool, wake: &Notify) {
    while !stopped.load(Ordering::Acquire) {
        let Next::At(time) = steps.next(seam::now()) else {
            tokio::task::yield_now().await;
            continue;
        };
        tokio::select! {
            () = wake.notified() => {}
            () = seam::sleep_until(time) => tokio::task::yield_now().await,
        }
    }
}

/// When to turn next, unless a command comes.
enum Next {
    Now,
    At(Time),
}

impl StepLoop {
    fn next(&mut self, now: Time) -> Next {
        match self.turn(now) {
            Turn::Idle => Next::At(Time::MAX),
            Turn::Until(time) => Next::At(time),
            // An engine that cannot say when it is done waits in `collect` itself.
            Turn::InFlight => self.engine.ready_at().map_or(Next::Now, Next::At),
        }
    }
}
