//! How fast prompts may go: which prompt comes first, and how much of them fits beside the decodes.
//!
//! Values in, values out; the batcher calls these functions, and so does whoever must foresee what it will do.

use std::collections::VecDeque;

use tandem_types::{ServiceClass, StepTime, Time, attention_pairs};

/// Which waiting prompt is computed first.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Order {
    /// The one that came first.
    #[default]
    Arrival,
    /// The first that can still meet its target behind those before it; hopeless ones last.
    Deadline,
}

/// How many prompt tokens a step may compute beside its decodes.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Budget {
    /// So many.
    Tokens(u32),
    /// As many as the slack of the decodes allows, up to so many.
    Slack(u32),
}

impl Budget {
    /// The most prompt tokens of any step.
    pub fn most(&self) -> u32 {
        match *self {
            Budget::Tokens(most) | Budget::Slack(most) => most,
        }
    }
}

/// How prompts are ordered and paced.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Pace {
    /// Which prompt comes first.
    pub order: Order,
    /// How much of them goes into a step.
    pub budget: Budget,
    /// What steps are expected to cost.
    pub model: StepTime,
    /// Tokens of room that an admitted answer has to grow.
    pub headroom_tokens: u32,
    /// Tokens after the first that all but a few answers have: short ones cannot make up for a long first gap.
    pub short_tokens: f64,
}

/// Of the time that a step may take beside decodes with targets, so much for prompts without: those fill gaps, and
/// nobody may be late for them, however short his answer.
pub const OFFLINE_SHARE: f64 = 0.3;
/// Seconds that a hand-off takes, by and large.
const HANDOFF_SECONDS: f64 = 5e-3;

/// The longest step, in seconds, beside prompts where nearly all answers that are handed in have so many tokens after
/// the first, or more.
///
/// The first gap of such an answer holds the hand-off and the rest of the step that is under way. Only later
/// tokens, each faster than its target, make up for it.
#[inline]
pub fn step_most(token_seconds: f64, short_tokens: f64) -> f64 {
    let tokens = short_tokens.max(1.0);
    let most = (tokens * token_seconds - HANDOFF_SECONDS) / (tokens + 0.5);
    most.clamp(0.0, AIM * token_seconds)
}

/// A prompt that is not computed yet, or not wholly.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Prompt {
    /// Tokens to compute.
    pub left: u32,
    /// Tokens in all.
    pub total: u32,
    /// Whether some of it was computed here; such a prompt is finished first, for its pages are taken.
    pub begun: bool,
    /// When its first token is due.
    pub due: Time,
    /// Whether it has targets.
    pub class: ServiceClass,
}

/// A sequence that decodes.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Decode {
    /// When its first token was there.
    pub first_at: Time,
    /// Tokens drawn after the first.
    pub made: u32,
    /// Seconds per token that it may take on average; infinite without a target.
    pub token_seconds: f64,
}

/// What becomes of a prompt in an order by deadline.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Chance {
    /// It meets its target behind those before it.
    InTime,
    /// Not behind those before it, but alone it would.
    Crowded,
    /// Not even alone.
    Hopeless,
}

/// Goes through prompts in their order and says of each what becomes of it.
#[derive(Clone, Debug)]
pub struct Forecast {
    model: StepTime,
    now: f64,
    end: f64,
}

/// The share of its time that a worker gives to prompts while some wait, beside `rows` decodes over `context`
/// tokens. `step_most` bounds its steps where slack does.
#[inline]
pub fn prompt_share(model: &StepTime, budget: Budget, step_most: f64, rows: u32, context: f64) -> f64 {
    if rows == 0 {
        return 1.0;
    }
    let decodes = model.a1 * f64::from(rows) + model.b2 * context;
    let full = model.a0 + model.a1 * f64::from(budget.most());
    let prompts = match budget {
        Budget::Tokens(_) => full,
        Budget::Slack(_) => full.min(step_most - decodes),
    };
    // What every step costs is lost to short prompts: only what is beyond it gets them on.
    if prompts > model.a0 { (prompts - model.a0) / (prompts + decodes) } else { 0.0 }
}

impl Forecast {
    /// Nothing is before the first.
    pub fn new(model: StepTime, now: Time) -> Forecast {
        Forecast { model, now: now.as_secs_f64(), end: now.as_secs_f64() }
    }

    /// The next prompt's chance; those in time delay whoever follows.
    pub fn next(&mut self, prompt: &Prompt) -> Chance {
        let need = self.model.prefill_alone(prompt.left, prompt.total - prompt.left);
        let due = prompt.due.as_secs_f64();
        if prompt.begun || self.end + need <= due {
            self.end += need;
            Chance::InTime
        } else if self.now + need <= due {
            Chance::Crowded
        } else {
            Chance::Hopeless
        }
    }

    /// Seconds of work in time so far.
    pub fn seconds(&self) -> f64 {
        self.end - self.now
    }
}

/// Prompts in the order in which they are computed.
#[derive(Clone, Debug)]
pub struct Line<T> {
    next: VecDeque<T>,
    /// What not even an idle worker could save: looked at once, computed last.
    hopeless: VecDeque<T>,
}

impl<T> Default for Line<T> {
    fn default() -> Self {
        Line { next: VecDeque::new(), hopeless: VecDeque::new() }
    }
}

impl<T> Line<T> {
    /// At the end.
    pub fn push(&mut self, item: T) {
        self.next.push_back(item);
    }

    /// Whether nobody waits.
    pub fn is_empty(&self) -> bool {
        self.next.is_empty() && self.hopeless.is_empty()
    }

    /// How many wait.
    pub fn len(&self) -> usize {
        self.next.len() + self.hopeless.len()
    }

    /// In order.
    pub fn iter(&self) -> impl Iterator<Item = &T> {
        self.next.iter().chain(&self.hopeless)
    }

    /// Who is next.
    pub fn first(&self) -> Option<&T> {
        self.next.front().or_else(|| self.hopeless.front())
    }

    /// Keeps those of whom `keep` says so.
    pub fn retain(&mut self, mut keep: impl FnMut(&T) -> bool) {
        self.next.retain(&mut keep);
        self.hopeless.retain(keep);
    }

    /// In order, to be changed.
    pub fn iter_mut(&mut self) -> impl Iterator<Item = &mut T> {
        self.next.iter_mut().chain(&mut self.hopeless)
    }

    /// Takes out the one at this place, counted as `iter` counts.
    pub fn remove(&mut self, place: usize) -> Option<T> {
        match place.checked_sub(self.next.len()) {
            None => self.next.remove(place),
            Some(place) => self.hopeless.remove(place),
        }
    }

    /// The one at this place has begun, and is finished next even if it is hopeless.
    pub fn begun(&mut self, place: usize) {
        if place >= self.next.len()
            && let Some(item) = self.remove(place)
        {
            self.next.push_front(item);
        }
    }

    /// Puts those that can still meet their targets first, those without targets last, and says how many seconds
    /// of work are in time. `prompt` looks an item up; those it does not find are gone.
    pub fn arrange(&mut self, pace: &Pace, now: Time, prompt: impl Fn(&T) -> Option<Prompt>) -> f64 {
        let mut forecast = Forecast::new(pace.model, now);
        let (mut crowded, mut offline) = (Vec::new(), Vec::new());
        for _ in 0..self.next.len() {
            let item = self.next.pop_front().expect("they are counted");
            let Some(prompt) = prompt(&item) else { continue };
            if pace.order == Order::Arrival {
                self.next.push_back(item);
                continue;
            }
            if prompt.class == ServiceClass::Offline {
                offline.push(item);
                continue;
            }
            match forecast.next(&prompt) {
                Chance::InTime => self.next.push_back(item),
                Chance::Crowded => crowded.push(item),
                Chance::Hopeless => self.hopeless.push_back(item),
            }
        }
        self.next.extend(crowded);
        if !offline.is_empty() {
            // Those without targets come after everybody who has some.
            self.next.append(&mut self.hopeless);
            self.next.extend(offline);
        }
        forecast.seconds()
    }

    /// Takes everybody out, in order.
    pub fn clear(&mut self) -> Vec<T> {
        self.next.drain(..).chain(self.hopeless.drain(..)).collect()
    }
}

/// Over how many coming a decode may make up for lost time.
const HORIZON: f64 = 8.0;
/// Share of a target that is aimed at.
const AIM: f64 = 0.95;

/// Seconds that the next step may take so that the decodes keep their targets on average, where a step without
/// prompts takes `least` seconds.
///
/// Each decode spreads what it is ahead or behind over its next few tokens. One that is so late that steps
/// without prompts would not save it does not count: it would stop all prompts and gain nothing.
pub fn step_seconds(decodes: impl Iterator<Item = Decode>, least: f64, short_tokens: f64, now: Time) -> f64 {
    let now = now.as_secs_f64();
    let allowed = decodes.filter_map(|decode| {
        let tokens = f64::from(decode.made) + HORIZON;
        let left = decode.first_at.as_secs_f64() + AIM * tokens * decode.token_seconds - now;
        let seconds = left / HORIZON;
        (seconds >= least).then_some(seconds.min(step_most(decode.token_seconds, short_tokens)))
    });
    allowed.fold(f64::INFINITY, f64::min)
}

/// Fills a step with prompts, in the order given.
#[derive(Clone, Debug)]
pub struct Filling {
    model: StepTime,
    seconds: f64,
    left: u32,
    new_tokens: f64,
    pairs: f64,
    context: f64,
}

impl Filling {
    /// A step with `rows` decodes over `context` tokens that may take `seconds`; infinite if nothing limits it.
    pub fn new(pace: &Pace, seconds: f64, rows: u32, context: f64) -> Filling {
        let (model, left) = (pace.model, pace.budget.most());
        Filling { model, seconds, left, new_tokens: f64::from(rows), pairs: 0.0, context }
    }

    /// Whether nothing more fits.
    pub fn is_full(&self) -> bool {
        self.left == 0
    }

    /// How many tokens of this prompt go into the step, and counts them.
    pub fn take(&mut self, prompt: &Prompt) -> u32 {
        let before = prompt.total - prompt.left;
        let most = prompt.left.min(self.left);
        let seconds = match prompt.class {
            ServiceClass::Offline => OFFLINE_SHARE * self.seconds,
            ServiceClass::Online => self.seconds,
        };
        let count = if seconds.is_finite() {
            let (new, pairs) = (self.new_tokens, self.pairs);
            self.model.tokens_within(seconds, new, pairs, self.context, before, most)
        } else {
            most
        };
        self.left -= count;
        if count < most {
            self.left = 0; // time ran out before tokens did
        }
        self.new_tokens += f64::from(count);
        self.pairs += attention_pairs(count, before);
        count
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Steps of 1 ms and 0.1 ms a token.
    const MODEL: StepTime = StepTime { a0: 1e-3, a1: 1e-4, a2: 0.0, b0: 1e-3, b1: 1e-4, b2: 0.0 };

    #[test]
    fn prompts_without_a_target_take_a_share_of_what_others_may() {
        let pace = Pace {
            order: Order::Deadline,
            budget: Budget::Slack(2048),
            model: MODEL,
            headroom_tokens: 0,
            short_tokens: 10.0,
        };
        let taken = |class, seconds| {
            let prompt = Prompt { left: 5000, total: 5000, begun: false, due: Time::MAX, class };
            Filling::new(&pace, seconds, 0, 0.0).take(&prompt)
        };
        assert_eq!(taken(ServiceClass::Online, 0.041), 400);
        let share = taken(ServiceClass::Offline, 0.041);
        assert!((110..=115).contains(&share), "{share} tokens in 0.3 of 41 ms");
        assert_eq!(taken(ServiceClass::Offline, f64::INFINITY), 2048, "where nobody has a target, all of it");
    }

    #[test]
    fn short_answers_keep_steps_short() {
        // One further token makes up for nothing: hand-off, half a step and its own step are within its target.
        let one = step_most(0.05, 1.0);
        assert!((0.029..0.031).contains(&one), "{one}");
        assert!(one < step_most(0.05, 5.0) && step_most(0.05, 5.0) < step_most(0.05, 1e6));
        assert_eq!(step_most(0.05, 1e6), AIM * 0.05);
        assert_eq!(step_most(0.004, 1.0), 0.0, "the hand-off alone takes longer");
    }
}
