//! What legs have their worker do, and the router's books of it.

use std::time::Duration;

use tandem_placement::ledger;
use tandem_proto::v1::{self, event};
use tandem_types::{ServiceClass, StepTime, Time};

use super::{LegSlot, LinkState, Report};

/// What a leg has its worker do.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Work {
    /// Compute its prompt, and go on from there if it stays.
    Prompt {
        stays: bool,
    },
    Decode,
    /// Keep its pages until they are pulled, or say that it is over.
    None,
}

impl Report {
    /// What its steps take, once it has measured any.
    pub(crate) fn model(&self) -> Option<StepTime> {
        let said = self.load.pacing.as_ref()?.step_time?;
        let v1::StepTime { a0, a1, a2, b0, b1, b2 } = said;
        Some(StepTime { a0, a1, a2, b0, b1, b2 }).filter(StepTime::is_sane)
    }

    /// Prompt tokens of a step at most.
    pub(crate) fn prompt_budget(&self) -> u32 {
        self.load.pacing.as_ref().map_or(1, |pacing| pacing.prompt_budget.max(1))
    }

    /// Whether the slack of its decodes bounds its prompts, and deadlines order them.
    pub(crate) fn paced(&self) -> bool {
        self.load.pacing.as_ref().is_some_and(|pacing| pacing.by_slack)
    }

    /// Seconds to compute a prompt behind its cached tokens; none before anything was measured.
    fn prompt_seconds(&self, tokens: u32, cached: u32) -> f64 {
        let left = tokens.saturating_sub(cached);
        self.model().map_or(0.0, |model| model.prefill(left, cached, self.prompt_budget()))
    }
}

/// What a Start asks for, and its prompt.
pub(super) fn of(start: &v1::Start, report: &Report, now: Time) -> (Work, ledger::Prompt) {
    let work = match start.inputs.is_empty() {
        true => Work::Prompt { stays: start.until() == v1::Until::End },
        false => Work::Decode,
    };
    let tokens = start.tokens.len() as u32;
    let left = |target_ms: u32| Duration::from_millis(u64::from(target_ms.saturating_sub(start.waited_ms)));
    let prompt = ledger::Prompt {
        tokens,
        cached: 0,
        seconds: report.prompt_seconds(tokens, 0),
        due: start.ttft_target_ms.map_or(Time::MAX, |target| now + left(target)),
        class: match start.class() {
            v1::ServiceClass::Offline => ServiceClass::Offline,
            v1::ServiceClass::Online | v1::ServiceClass::Unspecified => ServiceClass::Online,
        },
    };
    (work, prompt)
}

impl LinkState {
    /// A leg begins.
    pub(super) fn begin(&mut self, name: u32, slot: LegSlot, prompt: ledger::Prompt, now: Time) {
        match slot.work {
            Work::Prompt { .. } => self.ledger.prompt_sent(name, prompt, now),
            Work::Decode => self.ledger.decode_sent(slot.tokens, now),
            Work::None => {}
        }
        self.legs.insert(name, slot);
    }

    /// Books what an event says of a leg's work.
    pub(super) fn account(&mut self, name: u32, event: &event::Event, now: Time) {
        use event::Event;
        let Some(slot) = self.legs.get_mut(&name) else { return };
        match (event, slot.work) {
            (Event::Granted(granted), Work::Prompt { .. }) => {
                let seconds = self.report.prompt_seconds(slot.tokens, granted.cached_tokens);
                self.ledger.prompt_cached(name, granted.cached_tokens, seconds, now);
            }
            (Event::Delta(delta), Work::Decode) => {
                let drawn = delta.tokens.len() as u32;
                slot.tokens = slot.tokens.saturating_add(drawn);
                self.ledger.drawn(drawn, now);
            }
            (Event::Delta(delta), Work::Prompt { stays }) => {
                self.ledger.prompt_over(name, now);
                slot.tokens = slot.tokens.saturating_add(delta.tokens.len() as u32);
                slot.work = Work::None;
                if stays {
                    slot.work = Work::Decode;
                    self.ledger.decode_sent(slot.tokens, now);
                }
            }
            (Event::Finished(_), _) => self.settle(name, now),
            _ => {}
        }
    }

    /// Nothing more is computed for a leg.
    fn settle(&mut self, name: u32, now: Time) {
        let Some(slot) = self.legs.get_mut(&name) else { return };
        match std::mem::replace(&mut slot.work, Work::None) {
            Work::Prompt { .. } => self.ledger.prompt_over(name, now),
            Work::Decode => self.ledger.decode_over(slot.tokens, now),
            Work::None => {}
        }
    }

    /// A leg is over.
    pub(super) fn remove(&mut self, name: u32, now: Time) -> Option<LegSlot> {
        self.settle(name, now);
        self.legs.remove(&name)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use tandem_chassis::seam;
    use tandem_proto::v1::to_worker;
    use tandem_types::Incarnation;
    use tokio::sync::mpsc;

    use super::super::{Leg, Link};
    use super::*;

    fn link() -> (Arc<Link>, mpsc::Receiver<to_worker::Message>) {
        let link = Link::new(
            "w".into(),
            Incarnation(1),
            String::new(),
            "r",
            Incarnation(1),
            Arc::new(crate::prefixes::Prefixes::new(1 << 20)),
        );
        let (outbound, messages) = mpsc::channel(16);
        link.lock().outbound = Some(outbound);
        (link, messages)
    }

    fn start(tokens: usize, handed_over: bool, until: v1::Until) -> v1::Start {
        let inputs = if handed_over { vec![v1::Handle::default()] } else { Vec::new() };
        v1::Start { tokens: vec![7; tokens], inputs, until: until as i32, ..v1::Start::default() }
    }

    fn hear(link: &Link, leg: &Leg, event: event::Event) {
        link.hand_on(&mut link.lock(), leg.name, event);
    }

    fn delta(tokens: usize) -> event::Event {
        event::Event::Delta(v1::Delta { tokens: vec![7; tokens], ..v1::Delta::default() })
    }

    fn decodes(link: &Link) -> (u32, u64) {
        let load = link.load(seam::now());
        (load.decodes, load.decode_tokens)
    }

    #[tokio::test]
    async fn a_leg_is_work_of_its_worker_until_it_is_over_whatever_reports_say() {
        let (link, _messages) = link();
        let stays = link.open(start(100, false, v1::Until::End)).expect("is connected");
        let leaves = link.open(start(200, false, v1::Until::FirstToken)).expect("is connected");
        let comes = link.open(start(300, true, v1::Until::End)).expect("is connected");
        assert_eq!(decodes(&link), (1, 300));
        hear(&link, &stays, delta(1));
        hear(&link, &leaves, delta(1));
        hear(&link, &comes, delta(2));
        assert_eq!(decodes(&link), (2, 101 + 302));
        hear(&link, &comes, event::Event::Finished(v1::Finished::default()));
        hear(&link, &comes, event::Event::Released(v1::Released::default()));
        assert_eq!(decodes(&link), (1, 101));
        drop(stays);
        assert_eq!(decodes(&link), (0, 0));
        link.lose("a test");
        assert_eq!(link.in_flight(), (0, 0));
    }

    #[tokio::test]
    async fn prompts_wait_until_their_first_token_and_others_have_what_is_reported_beyond() {
        let (link, _messages) = link();
        let report = |decodes, decode_tokens| v1::WatchEvent {
            sequence: link.lock().reported + 1,
            load: Some(v1::Load {
                decodes,
                decode_tokens,
                pacing: Some(v1::Pacing {
                    step_time: Some(v1::StepTime { a0: 1e-3, a1: 1e-3, ..v1::StepTime::default() }),
                    prompt_budget: 1 << 20,
                    ..v1::Pacing::default()
                }),
                ..v1::Load::default()
            }),
            ..v1::WatchEvent::default()
        };
        let first = report(2, 500);
        link.take_report(&mut link.lock(), first).expect("is in order");
        // So long that no clock takes much off it while the test runs.
        let long = link.open(start(1_000_000, false, v1::Until::FirstToken)).expect("is connected");
        assert!(link.load(seam::now()).queue_seconds > 900.0);
        let cached = v1::Granted { cached_tokens: 999_990, ..v1::Granted::default() };
        hear(&link, &long, event::Event::Granted(cached));
        assert!(link.load(seam::now()).queue_seconds < 1.0);
        hear(&link, &long, delta(1));
        assert_eq!(link.load(seam::now()).queue_seconds, 0.0);
        assert_eq!(decodes(&link), (2, 500));
    }
}
