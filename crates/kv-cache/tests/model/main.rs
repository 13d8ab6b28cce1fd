//! Hand-offs, checked in every order of events: router, owner, two decoders, faults, and time.
mod steps;
mod world;

use stateright::{Checker, Model, Property};
use steps::Action;
use world::{Bounds, Ended, Second, State, Wrong};

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
        Some(state.after(self, action))
    }

    fn properties(&self) -> Vec<Property<Bounds>> {
        fn never(name: &'static str, wrong: fn(Wrong) -> bool) -> (&'static str, fn(Wrong) -> bool) {
            (name, wrong)
        }
        let _ = never;
        vec![
            Property::always("no byte is used that was not whole and held", |_, s: &State| {
                !matches!(s.wrong, Some(Wrong::BytesUsed | Wrong::BytesSeen))
            }),
            Property::always("no page is reused while referred to", |_, s: &State| {
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
            Property::sometimes("both requests end well", |_, s: &State| {
                s.requests.iter().all(|r| r.ended == Some(Ended::Well)) && s.holds_nothing()
            }),
        ]
    }
}

fn at_rest(bounds: &Bounds, state: &State) -> bool {
    if state.wrong.is_some() || state.given_back_twice || !state.pending(bounds).is_empty() {
        return true;
    }
    let ended = state.requests.iter().all(|request| request.ended.is_some());
    let timers = state.owner.kv.next_expiry().is_some();
    ended && !state.hand_offs_stand(bounds) && (timers || state.holds_nothing())
}

#[test]
fn probe() {
    let bounds = Bounds {
        pages: std::env::var("PAGES").map_or(2, |f| f.parse().unwrap()),
        second: match std::env::var("SECOND").as_deref() { Ok("handoff") => Second::HandOff, Ok("borrow") => Second::Borrow, _ => Second::Nothing },
        faults: std::env::var("FAULTS").map_or(0, |f| f.parse().unwrap()),
        flips: std::env::var("FLIPS").map_or(0, |f| f.parse().unwrap()),
        attempts: std::env::var("ATT").map_or([4, 2], |a| [a[..1].parse().unwrap(), a[1..].parse().unwrap()]),
        cancels: true,
        overlap: true,
        adopts: std::env::var("ADOPTS").is_ok(),
        one_sided: std::env::var("ONE_SIDED").is_ok(),
        checksums: std::env::var("CHECKSUMS").is_ok(),
        time: std::env::var("TIME").is_ok(),
        given_back_twice: std::env::var("GIVEN_BACK_TWICE").is_ok(),
        mistake: std::env::var("MISTAKE").ok().map(|m| tandem_kv_cache::Mistake::ALL[m.parse::<usize>().unwrap()]),
    };
    let started = std::time::Instant::now();
    let checker = bounds.checker().threads(1).timeout(std::time::Duration::from_secs(std::env::var("LIMIT").map_or(60, |f| f.parse().unwrap()))).spawn_bfs().join();
    eprintln!("{bounds:?}: {} unique, {} generated, depth {}, {:?}", checker.unique_state_count(), checker.state_count(), checker.max_depth(), started.elapsed());
    for (name, path) in checker.discoveries() {
        eprintln!("{name}: {} actions: {:?}\n{:?}", path.clone().into_actions().len(), path.clone().into_actions(), path.last_state());
    }
}
