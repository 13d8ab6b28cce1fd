//! Whatever comes in whatever order: the answers are those of the oracle, plans keep to their limits, nothing
//! leaks, and it always goes on.

use proptest::prelude::*;
use tandem_batching::Config;
use tandem_types::{StopRules, Until};

use crate::harness::{Ask, Harness, prompt};

/// Something that happens between two turns. Numbers name a request, by how many there are.
#[derive(Clone, Debug)]
enum Happening {
    Arrives(Ask),
    Cancelled(usize),
    Paused(usize),
    Resumed(usize),
    StepFails,
    /// Turns that plan only, as far as the depth allows, and turns that collect only.
    Plans,
    Collects,
    Turns(u32),
}

fn ask() -> impl Strategy<Value = Ask> {
    let stop = (
        1..90u32,
        prop_oneof![3 => Just(0), 1 => 0..40u32],
        prop_oneof![2 => Just(vec![]), 1 => Just(vec![7]), 1 => Just(vec![7, 8])],
        prop_oneof![3 => Just(vec![]), 1 => Just(vec![3])],
    );
    let start = (0..3u64, prop_oneof![1..10usize, 1..200usize, Just(32), Just(64), Just(33)], 0..3u32);
    let score = prop_oneof![2 => Just(None), 1 => (0..4u32).prop_map(Some)];
    (start, stop, any::<bool>(), score).prop_map(|((family, length, own), stop, hand_off, score)| {
        let mut tokens = prompt(family, length);
        if own > 0 {
            // Alike but for the end.
            *tokens.last_mut().expect("prompts have tokens") = own;
        }
        let (max_tokens, min_tokens, eos, stop_token_ids) = stop;
        Ask {
            prompt: tokens,
            stop: StopRules { max_tokens, min_tokens, eos, stop_token_ids },
            until: if hand_off { Until::FirstToken } else { Until::End },
            score,
        }
    })
}

fn happening() -> impl Strategy<Value = Happening> {
    let any = any::<usize>;
    prop_oneof![
        4 => ask().prop_map(Happening::Arrives),
        1 => any().prop_map(Happening::Cancelled),
        1 => any().prop_map(Happening::Paused),
        1 => any().prop_map(Happening::Resumed),
        1 => Just(Happening::StepFails),
        2 => Just(Happening::Plans),
        2 => Just(Happening::Collects),
        5 => (1..12u32).prop_map(Happening::Turns),
    ]
}

fn limits() -> impl Strategy<Value = (Config, u32, u32, bool)> {
    let budget = prop_oneof![1..8u32, 8..120u32];
    let context = prop_oneof![2 => Just(u32::MAX), 1 => 30..250u32];
    let config = (budget, 1..8u32, 0..2u32, context, prop_oneof![Just(0u32), 1..200u32]);
    let config = config.prop_map(|(token_budget, rows_max, depth, context_tokens, answer_tokens)| Config {
        token_budget,
        rows_max,
        depth,
        context_tokens,
        answer_tokens,
    });
    (config, 1..3u32, prop_oneof![2..8u32, 2..30u32], any::<bool>())
}

fn happens(harness: &mut Harness, happening: Happening) {
    let count = harness.requests.len().max(1);
    let known = |at: usize| Some(at % count).filter(|_| !harness.requests.is_empty());
    match happening {
        Happening::Arrives(ask) => {
            harness.ask(ask);
        }
        Happening::Cancelled(at) => known(at).into_iter().for_each(|at| harness.cancel(at)),
        Happening::Paused(at) => known(at).into_iter().for_each(|at| harness.pause(at, true)),
        Happening::Resumed(at) => known(at).into_iter().for_each(|at| harness.pause(at, false)),
        Happening::StepFails => harness.fail(),
        Happening::Plans => {
            harness.plan();
        }
        Happening::Collects => {
            harness.collect();
        }
        Happening::Turns(turns) => {
            for _ in 0..turns {
                harness.plan();
                harness.collect();
            }
        }
    }
}

proptest! {
    #[test]
    fn every_sequence_gets_its_own_tokens_and_nothing_is_left(
        (config, groups, pages, prefix_cache) in limits(),
        happenings in prop::collection::vec(happening(), 1..60),
    ) {
        let mut harness = Harness::new(config, groups, pages, prefix_cache);
        for happening in happenings {
            happens(&mut harness, happening);
        }
        for at in 0..harness.requests.len() {
            harness.pause(at, false);
        }
        harness.run();
        harness.check_end();
    }

    #[test]
    fn cancelling_everything_at_any_moment_leaves_nothing(
        (config, groups, pages, prefix_cache) in limits(),
        happenings in prop::collection::vec(happening(), 1..30),
    ) {
        let mut harness = Harness::new(config, groups, pages, prefix_cache);
        for happening in happenings {
            happens(&mut harness, happening);
        }
        for at in 0..harness.requests.len() {
            harness.cancel(at);
        }
        prop_assert!(harness.kv.counts().in_use == 0 || harness.engine.in_flight() > 0);
        harness.check_end();
    }
}
