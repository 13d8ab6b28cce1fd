//! Hand-offs, checked in every order of events: router, owner, two decoders, faults, and time.
//!
//! The owner's bookkeeping and the pullers are the crate's own. `TANDEM_MODEL=full` takes the full bounds.

mod action;
mod bounds;
mod choices;
mod decoder;
mod lender;
mod owner;
mod router;
mod steps;
mod world;

use action::Action;
use bounds::{Bounds, Second};
use stateright::{Checker, Model, Property};
use tandem_kv_cache::Mistake;
use world::{Down, Ended, Stage, State, Wrong};

impl Model for Bounds {
    type State = State;
    type Action = Action;

    fn init_states(&self) -> Vec<State> {
        vec![State::first(self)]
    }

    fn actions(&self, state: &State, actions: &mut Vec<Action>) {
        if state.wrong.is_some() {
            return;
        }
        actions.extend(state.pending(self));
        state.possible(self, actions);
    }

    fn next_state(&self, state: &State, action: Action) -> Option<State> {
        state.after(self, action)
    }

    fn properties(&self) -> Vec<Property<Bounds>> {
        let mut properties = vec![
            Property::always("no byte is used that was not whole and held", |_, s: &State| {
                !matches!(s.wrong, Some(Wrong::BytesUsed | Wrong::BytesSeen))
            }),
            Property::always("no page is freed while referred to", |_, s: &State| {
                s.wrong != Some(Wrong::Reused)
            }),
            Property::always("a newer attempt gets through and an older one ends nothing", |_, s: &State| {
                s.wrong != Some(Wrong::OlderWon)
            }),
            Property::always("the owner does not contradict itself", |_, s: &State| {
                s.wrong != Some(Wrong::Contradiction)
            }),
            Property::always("no lease outlives its request's deadline", |_, s: &State| {
                s.wrong != Some(Wrong::Outlived)
            }),
            Property::always("no assertion fails", |_, s: &State| s.wrong != Some(Wrong::Panicked)),
            Property::always("at rest nothing is held and every request has ended", at_rest),
            Property::sometimes("every request is handed off", |bounds: &Bounds, s: &State| {
                let requests = if bounds.second == Second::Nothing { 1 } else { 2 };
                let handed_off = |request: &world::Request| request.ended == Some(Ended::HandedOff);
                s.requests[..requests].iter().all(handed_off) && s.holds_nothing()
            }),
            Property::sometimes("a page arrives while the next is computed", |_, s: &State| overlaps(s)),
        ];
        if self.faults > 0 {
            properties.push(Property::sometimes("a claim is superseded", |_, s: &State| {
                s.streams.iter().any(|stream| stream.down.contains(&Down::Superseded))
            }));
        }
        properties
    }
}

/// With no message and no decision pending, every request has ended, no hand-off's lease stands, and what is
/// still held (a prefix that was lent to nobody) waits for a timer.
fn at_rest(bounds: &Bounds, state: &State) -> bool {
    if state.wrong.is_some() || state.given_back_twice || !state.pending(bounds).is_empty() {
        return true;
    }
    let ended = state.requests.iter().all(|request| request.ended.is_some());
    let timers = state.owner.kv.next_expiry().is_some();
    ended && !state.hand_offs_stand(bounds) && (timers || state.holds_nothing())
}

fn overlaps(state: &State) -> bool {
    state.owner.legs.iter().any(|leg| {
        let of = |decoding: &&world::DecodeLeg| {
            decoding.key.request == leg.key.request && decoding.bytes[0] != world::Bytes::default()
        };
        let followed = state.decoders.iter().flat_map(|decoder| &decoder.legs).any(|leg| of(&leg));
        followed && matches!(leg.stage, Stage::Running { whole: 1, .. })
    })
}

/// Checks one configuration to its end and says how much there was.
fn check(name: &str, bounded: Bounds, full: Bounds) {
    steps::expect_panics();
    if std::env::var("TANDEM_MODEL").is_ok_and(|value| value == "full") {
        // Depth first: what waits to be visited stays small. The depth is that of the longest path taken.
        let threads = std::thread::available_parallelism().map_or(1, usize::from);
        judge(name, &full.checker().threads(threads).spawn_dfs().join());
    } else {
        judge(name, &bounded.checker().spawn_bfs().join());
    }
}

fn judge(name: &str, checker: &impl Checker<Bounds>) {
    let (states, transitions) = (checker.unique_state_count(), checker.state_count());
    println!("{name}: {states} states, {transitions} transitions, depth {}", checker.max_depth());
    checker.assert_properties();
}

#[test]
fn one_hand_off() {
    let bounded = Bounds { faults: 1, flips: 1, time: true, ..Bounds::ONE };
    check("one hand-off", bounded, Bounds { faults: 2, ..bounded });
}

#[test]
fn one_hand_off_with_two_faults() {
    let bounded = Bounds { faults: 2, ..Bounds::ONE };
    check("one hand-off, two faults", bounded, Bounds { adopts: true, flips: 1, ..bounded });
}

#[test]
fn two_hand_offs_through_the_same_pages() {
    let bounded = Bounds { faults: 1, ..Bounds::TWO };
    check("two hand-offs", bounded, Bounds { faults: 2, flips: 1, time: true, ..bounded });
}

#[test]
fn two_hand_offs_side_by_side() {
    let bounded = Bounds { pages: 4, ..Bounds::TWO };
    check("two hand-offs side by side", bounded, Bounds { faults: 1, ..bounded });
}

#[test]
fn the_owner_may_go_on_itself() {
    let bounded = Bounds { faults: 1, flips: 1, adopts: true, ..Bounds::ONE };
    check("adoption", bounded, Bounds { time: true, ..bounded });
}

#[test]
fn peers_may_read_the_owners_memory_themselves_and_check_sums() {
    let bounded = Bounds { faults: 1, one_sided: true, checksums: true, ..Bounds::ONE };
    check("one-sided reads with checksums", bounded, Bounds { time: true, ..bounded });
}

#[test]
fn prefixes_are_lent() {
    let full = Bounds { faults: 1, ..Bounds::LEND };
    check("a lent prefix", Bounds::LEND, full);
}

#[test]
fn pages_that_were_given_back_too_early_are_noticed_by_the_verdict() {
    let full = Bounds { cancels: true, ..Bounds::GIVEN_BACK };
    check("pages given back too early", Bounds::GIVEN_BACK, full);
}

/// The fewest actions after which a mistake breaks this property.
fn shortest(mistake: Mistake, property: &'static str, bounds: Bounds) {
    steps::expect_panics();
    let bounds = Bounds { mistake: Some(mistake), ..bounds };
    let found =
        |depth: usize| bounds.checker().target_max_depth(depth).spawn_bfs().join().discovery(property);
    let path = (2..30).find_map(found).unwrap_or_else(|| panic!("{mistake:?} goes unnoticed"));
    let actions = path.into_actions();
    println!("{mistake:?}: \"{property}\" breaks after {} actions: {actions:?}", actions.len());
}

#[test]
fn freeing_at_a_superseded_end_is_noticed() {
    let property = "a newer attempt gets through and an older one ends nothing";
    shortest(Mistake::FreeAtSupersededEnd, property, Bounds { faults: 1, ..Bounds::ONE });
}

#[test]
fn a_verdict_without_a_look_at_generations_is_noticed() {
    let property = "no byte is used that was not whole and held";
    shortest(Mistake::NoGenerationCheck, property, Bounds::GIVEN_BACK);
}

#[test]
fn a_verdict_that_is_not_remembered_is_noticed() {
    let property = "the owner does not contradict itself";
    shortest(Mistake::VerdictForgotten, property, Bounds { faults: 1, ..Bounds::ONE });
}

#[test]
fn a_renewal_past_the_deadline_is_noticed() {
    let property = "no lease outlives its request's deadline";
    shortest(Mistake::RenewalPastDeadline, property, Bounds { time: true, ..Bounds::ONE });
}

#[test]
fn reading_before_ready_is_noticed() {
    shortest(Mistake::ReadingBeforeReady, "no byte is used that was not whole and held", Bounds::ONE);
}
