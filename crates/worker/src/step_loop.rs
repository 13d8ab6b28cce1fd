//! The step loop: what the engine thread does, as a value that is driven by a thread or by virtual time.

use std::sync::Arc;

use tandem_engine::Engine;
use tandem_kv_transfer::checksum;
use tandem_types::{BLOCK_TOKENS, Time};

use crate::core::{CompletedPage, Core, PageSum};
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
}

impl StepLoop {
    pub(crate) fn new(shared: Arc<Shared>, engine: Box<dyn Engine>, checksums: bool) -> StepLoop {
        let depth = engine.facts().depth as usize;
        let pages = PageMap::of(&*engine);
        StepLoop { shared, engine, depth, pages, checksums, submitted: Time::ZERO, checked: Time::ZERO }
    }

    /// One turn, whole: take what the device has finished, then give it the next step.
    pub(crate) fn turn(&mut self, now: Time) -> Turn {
        while let Some(result) = self.engine.collect(now) {
            self.shared.progress.end();
            if let Ok(outcome) = &result {
                let prompt: u32 = outcome.rows.iter().map(|row| row.count).filter(|&count| count > 1).sum();
                self.shared.step(|core, _| core.costs().computed(prompt, now.since(self.submitted)));
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

    /// When the device will be done with its oldest step: `None` if `collect` itself waits or is ready.
    pub(crate) fn device_ready_at(&self) -> Option<Time> {
        self.engine.ready_at()
    }
}

/// Turns the loop on this thread until `stopped`; parks while there is nothing to do.
pub(crate) fn drive(mut steps: StepLoop, stopped: &std::sync::atomic::AtomicBool) {
    use tandem_chassis::seam;
    while !stopped.load(std::sync::atomic::Ordering::Acquire) {
        let now = seam::now();
        let until = match steps.turn(now) {
            Turn::Idle => None,
            Turn::Until(time) => Some(time),
            Turn::InFlight => match steps.device_ready_at() {
                None => continue,
                Some(time) => Some(time),
            },
        };
        // An unpark that came since the turn began makes this return at once.
        match until {
            None => std::thread::park(),
            Some(time) if time == Time::MAX => std::thread::park(),
            Some(time) => std::thread::park_timeout(time.remaining(seam::now())),
        }
    }
}
