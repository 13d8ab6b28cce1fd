//! What a router knows of a worker between its reports: what it has sent there, and what was answered since.
//!
//! A report is old when it comes. Answers are not: every token passes the router that asked for it. So what a
//! router itself has at a worker is taken from its own books, and a report adds what others have there: what it
//! counts beyond these books as they were when it was made.

use std::collections::{HashMap, VecDeque};
use std::time::Duration;

use tandem_batching::pace::{self, Budget, Line, Order, Pace};
use tandem_types::{ServiceClass, StepTime, Time};

use crate::candidate::{SECONDS_MAX, sane_seconds};

/// Work at a worker.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Load {
    /// Seconds of prompts that are not computed yet.
    pub queue_seconds: f64,
    /// Of these, the seconds of prompts that can still meet their targets.
    pub timely_seconds: f64,
    /// Sequences decoding there or on their way.
    pub decodes: u32,
    /// Their tokens.
    pub decode_tokens: u64,
}

/// A prompt that is sent to a worker.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Prompt {
    /// Its tokens.
    pub tokens: u32,
    /// Of these, those that the worker is expected to hold already.
    pub cached: u32,
    /// Seconds that the rest takes, predicted.
    pub seconds: f64,
    /// When its first token is due; [`Time::MAX`] without a target.
    pub due: Time,
    /// Whether it has targets.
    pub class: ServiceClass,
}

/// Prompts without an answer: each has a place, where it is found without a search.
#[derive(Clone, Debug, Default)]
struct Open {
    /// Each with the number of its turn.
    places: Vec<Option<(u64, Prompt)>>,
    /// Places that nobody has.
    free: Vec<usize>,
    /// Where the prompt of each leg is.
    by_leg: HashMap<u32, usize>,
    turns: u64,
}

/// A prompt's turn: a number that no other has, and its place among those that are open.
type Turn = (u64, usize);

impl Open {
    fn insert(&mut self, leg: u32, prompt: Prompt) -> Turn {
        let at = self.free.pop().unwrap_or(self.places.len());
        if at == self.places.len() {
            self.places.push(None);
        }
        self.turns += 1;
        self.places[at] = Some((self.turns, prompt));
        self.by_leg.insert(leg, at);
        (self.turns, at)
    }

    fn get_mut(&mut self, leg: u32) -> Option<&mut Prompt> {
        let at = *self.by_leg.get(&leg)?;
        self.places[at].as_mut().map(|(_, prompt)| prompt)
    }

    fn remove(&mut self, leg: u32) -> Option<Prompt> {
        let at = self.by_leg.remove(&leg)?;
        self.free.push(at);
        self.places[at].take().map(|(_, prompt)| prompt)
    }

    /// The prompt whose turn this is, unless it is over.
    fn of(&self, (number, at): Turn) -> Option<&Prompt> {
        self.places[at].as_ref().filter(|(of, _)| *of == number).map(|(_, prompt)| prompt)
    }

    fn len(&self) -> usize {
        self.by_leg.len()
    }
}

/// One router's books of one worker.
#[derive(Clone, Debug)]
pub struct Ledger {
    open: Open,
    /// Turns in the order in which they are computed, some of prompts that are over: where many wait, looking for each
    /// that is answered would take longer than all else.
    line: Line<Turn>,
    queue_seconds: f64,
    decodes: u32,
    decode_tokens: u64,
    /// Since when the worker may have been at the first in line.
    begun: Time,
    /// Totals at moments past, from the last one before the last report was made.
    past: VecDeque<(Time, Load)>,
    /// What others had there when the last report was made, and when that was.
    others: Load,
    made: Time,
}

/// Totals are remembered once in so long, and for a report at most so many entries back.
const PAST_EVERY: Duration = Duration::from_millis(5);
const PAST_MAX: usize = 1024;
/// A line may hold so many turns of prompts that are over, beside as many as there are others.
const LINE_SPARE: usize = 64;

/// Seconds by which what others had in line grows less with each second since the report. Everybody hears of a short
/// line at once and goes there: only what is long for its age is news that one can go by.
const OTHERS_PACE: f64 = 10.0;

impl Default for Ledger {
    /// Nothing sent, nothing reported.
    fn default() -> Self {
        Ledger {
            open: Open::default(),
            line: Line::default(),
            queue_seconds: 0.0,
            decodes: 0,
            decode_tokens: 0,
            begun: Time::ZERO,
            past: VecDeque::from([(Time::ZERO, Load::default())]),
            others: Load::default(),
            made: Time::ZERO,
        }
    }
}

impl Ledger {
    /// A prompt is sent. `leg` names it until it is answered.
    pub fn prompt_sent(&mut self, leg: u32, prompt: Prompt, now: Time) {
        let seconds = sane_seconds(prompt.seconds);
        if self.open.len() == 0 {
            self.begun = now;
        }
        let cached = prompt.cached.min(prompt.tokens.saturating_sub(1));
        self.forget(leg); // a name that is taken is a prompt that nobody will answer
        self.line.push(self.open.insert(leg, Prompt { seconds, cached, ..prompt }));
        self.queue_seconds += seconds;
        self.remember(now);
    }

    /// The worker holds so many tokens of a prompt already, and the rest takes so long. A leg that has no prompt here
    /// changes nothing.
    pub fn prompt_cached(&mut self, leg: u32, cached: u32, seconds: f64, now: Time) {
        let Some(prompt) = self.open.get_mut(leg) else { return };
        let seconds = sane_seconds(seconds);
        self.queue_seconds = (self.queue_seconds - prompt.seconds + seconds).max(0.0);
        prompt.cached = cached.min(prompt.tokens.saturating_sub(1));
        prompt.seconds = seconds;
        self.remember(now);
    }

    /// Its first token is here, or it will never come. A leg that has no prompt here changes nothing.
    pub fn prompt_over(&mut self, leg: u32, now: Time) {
        if !self.forget(leg) {
            return;
        }
        self.begun = self.begun.max(now);
        self.remember(now);
    }

    /// Whether the leg had a prompt here.
    fn forget(&mut self, leg: u32) -> bool {
        let Some(prompt) = self.open.remove(leg) else { return false };
        self.queue_seconds = (self.queue_seconds - prompt.seconds).max(0.0);
        if self.open.len() == 0 {
            self.queue_seconds = 0.0; // what rounding has left
        }
        if self.line.len() > 2 * self.open.len() + LINE_SPARE {
            self.line.retain(|turn| self.open.of(*turn).is_some());
        }
        true
    }

    /// A sequence of so many tokens decodes there from now on, or is on its way.
    pub fn decode_sent(&mut self, tokens: u32, now: Time) {
        self.decodes = self.decodes.saturating_add(1);
        self.decode_tokens = self.decode_tokens.saturating_add(u64::from(tokens));
        self.remember(now);
    }

    /// So many tokens were drawn by those who decode there.
    pub fn drawn(&mut self, tokens: u32, now: Time) {
        self.decode_tokens = self.decode_tokens.saturating_add(u64::from(tokens));
        self.remember(now);
    }

    /// A sequence that has so many tokens now no longer decodes there.
    pub fn decode_over(&mut self, tokens: u32, now: Time) {
        self.decodes = self.decodes.saturating_sub(1);
        self.decode_tokens = self.decode_tokens.saturating_sub(u64::from(tokens));
        if self.decodes == 0 {
            self.decode_tokens = 0;
        }
        self.remember(now);
    }

    /// Own sequences decoding there or on their way, and their tokens.
    pub fn decodes(&self) -> (u32, u64) {
        (self.decodes, self.decode_tokens)
    }

    fn remember(&mut self, now: Time) {
        let own = Load {
            queue_seconds: self.queue_seconds,
            timely_seconds: 0.0,
            decodes: self.decodes,
            decode_tokens: self.decode_tokens,
        };
        match self.past.back_mut() {
            // Time that runs backwards stands still.
            Some((at, last)) if now.since(*at) < PAST_EVERY => *last = own,
            _ => self.past.push_back((now, own)),
        }
        if self.past.len() > PAST_MAX {
            self.past.pop_front();
        }
    }

    /// A report comes that was made at `made`, and counts the work of all routers there.
    pub fn report(&mut self, load: Load, made: Time) {
        while self.past.get(1).is_some_and(|(at, _)| *at <= made) {
            self.past.pop_front();
        }
        let own = self.past.front().map_or(Load::default(), |(_, own)| *own);
        let reported = sane_seconds(load.queue_seconds);
        let queue_seconds = (reported - own.queue_seconds).max(0.0);
        // As much of it is in time as of all that waits there.
        let in_time = if reported > 0.0 { sane_seconds(load.timely_seconds) / reported } else { 0.0 };
        self.others = Load {
            queue_seconds,
            timely_seconds: queue_seconds * in_time.min(1.0),
            decodes: load.decodes.saturating_sub(own.decodes),
            decode_tokens: load.decode_tokens.saturating_sub(own.decode_tokens),
        };
        self.made = made;
    }

    /// What is there now. `by_deadline` is the model of a worker that puts its prompts in order by deadline; without
    /// one, all are as timely as they came.
    ///
    /// What is first in line is taken to be under way since the last answer. Of others, prompts are taken off far
    /// faster than a worker computes them, and decodes stay as they were: as many begin as end.
    pub fn load(&mut self, by_deadline: Option<StepTime>, now: Time) -> Load {
        let under_way = self.under_way(now);
        let own_timely = match by_deadline {
            Some(model) => self.arrange(model, under_way, now),
            None => self.queue_seconds - under_way,
        };
        let own_queue = (self.queue_seconds - under_way).max(0.0);
        let drained = OTHERS_PACE * now.since(self.made).as_secs_f64();
        let others_queue = (self.others.queue_seconds - drained).max(0.0);
        let queue_seconds = (own_queue + others_queue).min(SECONDS_MAX);
        let timely =
            sane_seconds(own_timely).min(own_queue) + (self.others.timely_seconds - drained).max(0.0);
        Load {
            queue_seconds,
            timely_seconds: timely.min(queue_seconds),
            decodes: self.decodes.saturating_add(self.others.decodes),
            decode_tokens: self.decode_tokens.saturating_add(self.others.decode_tokens),
        }
    }

    /// The first in line.
    fn first(&mut self) -> Option<(Turn, Prompt)> {
        while let Some(turn) = self.line.first().copied() {
            if let Some(prompt) = self.open.of(turn) {
                return Some((turn, *prompt));
            }
            self.line.remove(0);
        }
        None
    }

    /// Seconds of the first in line that are computed by now.
    fn under_way(&mut self, now: Time) -> f64 {
        let first = self.first().map_or(0.0, |(_, prompt)| prompt.seconds);
        now.since(self.begun).as_secs_f64().min(first)
    }

    /// Orders own prompts as the worker does, and says how many seconds of them can be in time.
    fn arrange(&mut self, model: StepTime, under_way: f64, now: Time) -> f64 {
        let Some((first, prompt)) = self.first() else { return 0.0 };
        let (budget, order) = (Budget::Slack(u32::MAX), Order::Deadline);
        let pace = Pace { order, budget, model, headroom_tokens: 0, short_tokens: 1.0 };
        let share = under_way / prompt.seconds.max(1e-9);
        self.line.arrange(&pace, now, |turn| {
            let Prompt { tokens, cached, due, class, .. } = *self.open.of(*turn)?;
            let left = f64::from(tokens - cached) * if *turn == first { 1.0 - share } else { 1.0 };
            Some(pace::Prompt { left: left as u32, total: tokens, begun: *turn == first, due, class })
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::predictor::PROFILES;

    const DEADLINE: Option<StepTime> = Some(PROFILES[0].step);

    fn at(ms: u64) -> Time {
        Time::from_millis(ms)
    }

    /// A prompt with the seconds that the model says, due `due_ms` after the origin.
    fn prompt(tokens: u32, due_ms: u64) -> Prompt {
        let seconds = PROFILES[0].step.prefill_alone(tokens, 0);
        Prompt { tokens, cached: 0, seconds, due: at(due_ms), class: ServiceClass::Online }
    }

    fn queue(ledger: &mut Ledger, now: Time) -> f64 {
        ledger.load(None, now).queue_seconds
    }

    fn near(a: f64, b: f64) {
        assert!((a - b).abs() < 1e-6, "{a} is not {b}");
    }

    #[test]
    fn own_work_is_counted_from_when_it_is_sent_until_it_is_answered_however_old_reports_are() {
        let one = prompt(4096, 9_000);
        let mut ledger = Ledger::default();
        ledger.prompt_sent(1, one, at(0));
        ledger.prompt_sent(2, one, at(0));
        ledger.decode_sent(1000, at(0));
        ledger.prompt_over(1, at(200));
        ledger.decode_sent(4097, at(200));
        ledger.drawn(20, at(250));
        ledger.decode_over(1010, at(250));
        // Made before any of this was answered.
        let report =
            Load { queue_seconds: 2.0 * one.seconds, timely_seconds: 0.0, decodes: 1, decode_tokens: 1000 };
        ledger.report(report, at(100));
        let load = ledger.load(None, at(250));
        near(load.queue_seconds, one.seconds - 0.05);
        assert_eq!((load.decodes, load.decode_tokens), (1, 4107));
    }

    #[test]
    fn others_have_what_a_report_counts_beyond_own_work() {
        let one = prompt(4096, 9_000);
        let mut ledger = Ledger::default();
        ledger.prompt_sent(1, one, at(0));
        ledger.decode_sent(500, at(0));
        let report = Load {
            queue_seconds: one.seconds + 4.0,
            timely_seconds: (one.seconds + 4.0) / 2.0,
            decodes: 3,
            decode_tokens: 1700,
        };
        ledger.report(report, at(50));
        ledger.prompt_over(1, at(100));
        let load = ledger.load(DEADLINE, at(150));
        near(load.queue_seconds, 3.0);
        near(load.timely_seconds, 1.0);
        assert_eq!((load.decodes, load.decode_tokens), (3, 1700));
        // A report that is never followed by another neither scares nor lures for ever.
        near(queue(&mut ledger, at(900)), 0.0);
    }

    #[test]
    fn a_worker_that_does_not_answer_does_not_look_idle() {
        let one = prompt(4096, 9_000);
        let mut ledger = Ledger::default();
        for leg in 0..5 {
            ledger.prompt_sent(leg, one, at(0));
        }
        near(queue(&mut ledger, at(60_000)), 4.0 * one.seconds);
    }

    #[test]
    fn what_cannot_be_in_time_is_not_timely() {
        let mut ledger = Ledger::default();
        ledger.prompt_sent(1, prompt(4096, 1_000), at(0));
        ledger.prompt_sent(2, prompt(32_768, 1_000), at(0)); // takes longer than that by itself
        ledger.prompt_sent(3, prompt(4096, 1_000), at(0));
        let load = ledger.load(DEADLINE, at(0));
        near(load.timely_seconds, 2.0 * prompt(4096, 0).seconds);
        near(load.queue_seconds, load.timely_seconds + prompt(32_768, 0).seconds);
        let by_arrival = ledger.load(None, at(0));
        near(by_arrival.timely_seconds, by_arrival.queue_seconds);
    }

    #[test]
    fn a_leg_that_comes_again_has_one_turn() {
        let (short, long) = (prompt(4096, 0).seconds, prompt(8192, 0).seconds);
        let short_by = |seconds: f64| prompt(4096, (1e3 * seconds) as u64);
        // In time behind two short ones, not behind three.
        let last = prompt(8192, (1e3 * (2.5 * short + long)) as u64);
        let mut ledger = Ledger::default();
        ledger.prompt_sent(1, short_by(1.5 * short), at(0));
        ledger.prompt_sent(2, short_by(3.5 * short), at(0));
        ledger.prompt_over(2, at(0));
        ledger.prompt_sent(2, short_by(3.5 * short), at(0));
        ledger.prompt_sent(3, last, at(0));
        let all = 2.0 * short + long;
        near(ledger.load(DEADLINE, at(0)).timely_seconds, all);
        // Turns of those that are over are let go, and a name that is taken stands for one prompt.
        for _ in 0..1_000 {
            ledger.prompt_over(3, at(0));
            ledger.prompt_sent(3, last, at(0));
        }
        assert!(ledger.line.len() <= 2 * 3 + LINE_SPARE + 1 && ledger.open.places.len() == 3);
        ledger.prompt_sent(3, last, at(0));
        near(ledger.load(DEADLINE, at(0)).timely_seconds, all);
        near(queue(&mut ledger, at(0)), all);
    }

    #[test]
    fn what_turns_out_to_be_cached_is_taken_off() {
        let mut ledger = Ledger::default();
        ledger.prompt_sent(1, prompt(4096, 1_000), at(0));
        ledger.prompt_sent(2, prompt(4096, 1_000), at(0));
        ledger.prompt_cached(2, 4000, 0.01, at(0));
        ledger.prompt_cached(3, 4000, 0.01, at(0));
        near(queue(&mut ledger, at(0)), prompt(4096, 0).seconds + 0.01);
        ledger.prompt_over(1, at(50));
        ledger.prompt_over(2, at(60));
        assert_eq!(queue(&mut ledger, at(60)), 0.0);
    }

    #[test]
    fn a_cached_prefix_is_not_computed_and_a_wholly_cached_prompt_computes_its_last_token() {
        let mut ledger = Ledger::default();
        let cached = Prompt { cached: 9_999, seconds: 0.01, ..prompt(4096, 1_000) };
        ledger.prompt_sent(1, cached, at(0));
        let load = ledger.load(DEADLINE, at(0));
        assert!(load.timely_seconds > 0.0 && load.timely_seconds <= 0.01, "{load:?}");
    }

    #[test]
    fn nonsense_is_clamped_and_what_is_not_there_cannot_end() {
        let mut ledger = Ledger::default();
        ledger.prompt_over(7, at(0));
        ledger.decode_over(100, at(0));
        ledger.prompt_sent(1, Prompt { seconds: f64::NAN, ..prompt(0, 0) }, at(2_000));
        ledger.prompt_over(1, at(1_000));
        assert_eq!(ledger.load(DEADLINE, at(0)), Load::default());
        let nonsense = Load { queue_seconds: f64::NAN, timely_seconds: f64::INFINITY, ..Load::default() };
        ledger.report(nonsense, at(3_000));
        let load = ledger.load(DEADLINE, at(2_000));
        assert!(load.queue_seconds.is_finite() && load.timely_seconds <= load.queue_seconds, "{load:?}");
    }
}
