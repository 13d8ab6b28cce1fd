//! Whatever is said, everything here answers: with a route to somebody who was shown, a reasoned refusal, or a
//! number that is one.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use proptest::prelude::*;
use tandem_placement::admission::{Limits, Verdict, admit};
use tandem_placement::cost::Cost;
use tandem_placement::index::{Change, Index};
use tandem_placement::ledger::{self, Ledger, Prompt};
use tandem_placement::planner::{Config, Load, Observer, Planner, Room, promise};
use tandem_placement::predictor::{Measured, PROFILES, Predictor, from_two_points};
use tandem_placement::{Candidate, Held, Link, POLICIES, Request, Tier};
use tandem_types::{BlockHash, Incarnation, Role, ServiceClass, StepTime, Time, WorkerId};

const TIERS: [Tier; 4] = [Tier::Device, Tier::Host, Tier::Disk, Tier::Store];

/// Numbers as they should be, and as they should not.
fn number() -> impl Strategy<Value = f64> {
    prop_oneof![
        4 => 0.0..10.0f64,
        1 => prop::sample::select(vec![
            f64::NAN, f64::INFINITY, f64::NEG_INFINITY, f64::MAX, f64::MIN, f64::MIN_POSITIVE, -0.0, -1.0, 1e-300, 1e300,
        ]),
        1 => prop::num::f64::ANY,
    ]
}

fn count() -> impl Strategy<Value = u32> {
    prop_oneof![3 => 0..300u32, 1 => Just(u32::MAX), 1 => any::<u32>()]
}

fn tokens() -> impl Strategy<Value = u64> {
    prop_oneof![3 => 0..500_000u64, 1 => Just(u64::MAX), 1 => any::<u64>()]
}

fn moment() -> impl Strategy<Value = Time> {
    prop_oneof![4 => (0..200_000u64).prop_map(Time::from_millis), 1 => Just(Time::MAX), 1 => any::<u64>().prop_map(Time)]
}

fn step_time() -> impl Strategy<Value = StepTime> {
    let any = prop::array::uniform6(number()).prop_map(|[a0, a1, a2, b0, b1, b2]| StepTime {
        a0,
        a1,
        a2,
        b0,
        b1,
        b2,
    });
    prop_oneof![2 => Just(PROFILES[0].step), 1 => number().prop_map(|x| PROFILES[0].step.scaled(x)), 1 => any]
}

fn link() -> impl Strategy<Value = Link> {
    (number(), number())
        .prop_map(|(setup_seconds, tokens_per_second)| Link { setup_seconds, tokens_per_second })
}

/// Few names, so that some are given twice and near links lead to some who are not there.
fn worker() -> impl Strategy<Value = WorkerId> {
    (0..12usize).prop_map(|n| format!("w-{n}").as_str().into())
}

fn candidate() -> impl Strategy<Value = Candidate> {
    let counts = (count(), count(), count(), tokens(), count(), count(), tokens(), tokens());
    let numbers = (number(), number(), number(), prop::option::of(step_time()), link());
    let near = prop::collection::vec((worker(), link()), 0..4);
    (worker(), 0..Role::ALL.len(), any::<bool>(), counts, numbers, near).prop_map(
        |(worker, role, paced, counts, numbers, near)| {
            let (
                in_flight,
                running,
                waiting,
                waiting_tokens,
                prompt_budget,
                decodes,
                decode_tokens,
                kv_tokens,
            ) = counts;
            let (usage, queue_seconds, timely_seconds, model, link) = numbers;
            Candidate {
                worker,
                role: Role::ALL[role],
                in_flight,
                running,
                waiting,
                waiting_tokens,
                kv_usage: usage as f32,
                model,
                prompt_budget,
                paced,
                queue_seconds,
                timely_seconds,
                decodes,
                decode_tokens,
                kv_tokens,
                rows_max: running,
                link,
                near,
            }
        },
    )
}

fn candidates() -> impl Strategy<Value = Vec<Candidate>> {
    prop::collection::vec(candidate(), 0..14)
}

/// Prefixes of candidates that are not there, longer on the device than in all, held twice.
fn held() -> impl Strategy<Value = Held> {
    (prop_oneof![9 => 0..16usize, 1 => any::<usize>()], count(), count(), 0..4usize).prop_map(
        |(candidate, device_tokens, tokens, tier)| Held {
            candidate,
            device_tokens,
            tokens,
            tier: TIERS[tier],
        },
    )
}

fn request() -> impl Strategy<Value = Request> {
    let numbers = (number(), number(), number(), number());
    let tokens = (any::<u64>(), count(), count());
    let held = prop::collection::vec(held(), 0..6);
    (tokens, numbers, prop::array::uniform8(number()), any::<bool>(), held).prop_map(
        |((ordinal, prompt_tokens, max_tokens), numbers, short_shares, online, held)| {
            let (expected_tokens, short_tokens, first_token_seconds, token_seconds) = numbers;
            let class = if online { ServiceClass::Online } else { ServiceClass::Offline };
            Request {
                ordinal,
                prompt_tokens,
                max_tokens,
                expected_tokens,
                short_tokens,
                short_shares,
                first_token_seconds,
                token_seconds,
                class,
                held,
            }
        },
    )
}

fn load() -> impl Strategy<Value = Load> {
    prop::array::uniform6(number()).prop_map(
        |[requests, prompt_tokens, prefill_seconds, output_tokens, first_token_seconds, token_seconds]| {
            Load {
                requests,
                prompt_tokens,
                prefill_seconds,
                output_tokens,
                first_token_seconds,
                token_seconds,
            }
        },
    )
}

fn able(candidates: &[Candidate], at: usize) -> bool {
    candidates.get(at).is_some_and(|c| c.role != Role::Encode)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 1_000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn every_policy_names_somebody_who_was_shown_and_can_do_it(
        candidates in candidates(),
        request in request(),
        prefill in prop::option::of(0..20usize),
    ) {
        let somebody = candidates.iter().any(|c| c.role != Role::Encode);
        for row in POLICIES {
            let policy = (row.make)();
            let route = policy.choose(&request, &candidates);
            prop_assert_eq!(route, policy.choose(&request, &candidates), "{}", row.name);
            prop_assert_eq!(route.is_some(), somebody, "{}", row.name);
            if let Some(route) = route {
                prop_assert!(able(&candidates, route.prefill) && able(&candidates, route.decode), "{}", row.name);
            }
            let decode = policy.choose_decode(&request, &candidates, prefill);
            prop_assert_eq!(decode, policy.choose_decode(&request, &candidates, prefill), "{}", row.name);
            prop_assert_eq!(decode.is_some(), somebody, "{}", row.name);
            prop_assert!(decode.is_none_or(|at| able(&candidates, at)), "{}", row.name);
            let explained = policy.explain(&request, &candidates);
            prop_assert_eq!(explained.chosen, route, "{}", row.name);
            prop_assert!(!explained.reason.is_empty());
            for considered in &explained.considered {
                prop_assert!(considered.cost_seconds.is_finite(), "{} in {:?}", row.name, considered);
            }
        }
        if let Some((_, seconds)) = Cost::default().cheapest(&request, &candidates) {
            prop_assert!(seconds.is_finite(), "{seconds} s");
        }
    }

    #[test]
    fn admission_answers_with_a_chance_or_with_a_reason_and_a_time(
        candidates in candidates(),
        request in request(),
        limits in (number(), number()),
        waiting in prop_oneof![0..100usize, any::<usize>()],
        waiting_max in prop_oneof![0..100usize, any::<usize>()],
    ) {
        let limits = Limits { chance_least: limits.0, offline_kv_usage: limits.1 };
        match admit(&request, &candidates, &limits, waiting, waiting_max) {
            Verdict::Admit { chance } => prop_assert!((0.0..=1.0).contains(&chance), "{chance}"),
            Verdict::Shed { reason, retry_after } => {
                prop_assert!(!reason.to_string().is_empty());
                let right = Duration::from_secs(1)..=Duration::from_secs(60);
                prop_assert!(right.contains(&retry_after), "{retry_after:?}");
            }
        }
    }

    #[test]
    fn the_planner_keeps_floors_and_cool_down_whatever_it_is_told(
        turns in prop::collection::vec((candidates(), load(), moment()), 1..12),
        floors in (0..4usize, 0..4usize),
    ) {
        let config = Config { floors, patience: Duration::ZERO, ..Config::default() };
        let cool_down = config.cool_down;
        let mut planner = Planner::new(config);
        let (mut now, mut flipped) = (Time::ZERO, BTreeMap::<WorkerId, Time>::new());
        for (candidates, load, at) in turns {
            now = now.max(at);
            let plan = planner.plan(&candidates, &load, at);
            prop_assert!(!plan.reason.is_empty());
            let mut names = BTreeSet::new();
            for flip in &plan.flips {
                prop_assert!(matches!(flip.from, Role::Prefill | Role::Decode) && flip.to != flip.from);
                prop_assert!(matches!(flip.to, Role::Prefill | Role::Decode));
                let shown = candidates.iter().any(|c| c.worker == flip.worker && c.role == flip.from);
                prop_assert!(shown, "{} is not known as {:?}", flip.worker, flip.from);
                prop_assert!(names.insert(flip.worker.clone()), "{} flips twice", flip.worker);
                if let Some(before) = flipped.insert(flip.worker.clone(), now) {
                    prop_assert!(now.since(before) >= cool_down, "{} flips again", flip.worker);
                }
            }
            if !plan.flips.is_empty() {
                // Who is shown twice is one, as it was shown first.
                let mut seen = BTreeSet::new();
                let once: Vec<&Candidate> = candidates.iter().filter(|c| seen.insert(&c.worker)).collect();
                let left = |role| once.iter().filter(|c| c.role == role && !names.contains(&c.worker)).count();
                let (from, floor) = match plan.flips[0].from {
                    Role::Prefill => (Role::Prefill, floors.0),
                    _ => (Role::Decode, floors.1),
                };
                prop_assert!(left(from) >= floor, "{plan:?}");
            }
            for promise in &plan.promises {
                prop_assert!((0.0..=1.0).contains(&promise.attainment), "{promise:?}");
                prop_assert!(promise.carries.is_finite() && promise.carries >= 0.0, "{promise:?}");
            }
            prop_assert!(plan.replicas.0 <= 1_000_000 && plan.replicas.1 <= 1_000_000);
        }
    }

    #[test]
    fn a_promise_is_a_share_and_a_factor(step in step_time(), room in (number(), number()), load in load(), split in (0..9usize, 0..9usize)) {
        let room = Room { kv_tokens: room.0, rows_max: room.1 };
        let promise = promise(&step, &room, &load, split.0, split.1);
        prop_assert!((0.0..=1.0).contains(&promise.attainment), "{promise:?}");
        prop_assert!(promise.carries.is_finite() && promise.carries >= 0.0, "{promise:?}");
    }

    #[test]
    fn what_is_observed_stays_finite(
        memory in number(),
        events in prop::collection::vec((request(), number(), number(), moment()), 1..40),
    ) {
        let mut observer = Observer::new(memory);
        for (request, a, b, at) in events {
            observer.arrived(&request, a, at);
            observer.drawn(a, b, at);
            let load = observer.load(at);
            for x in [
                load.requests,
                load.prompt_tokens,
                load.prefill_seconds,
                load.output_tokens,
                load.first_token_seconds,
                load.token_seconds,
            ] {
                prop_assert!(x.is_finite() && x >= 0.0, "{load:?}");
            }
        }
    }

    #[test]
    fn a_ledger_stays_between_nothing_and_a_day(
        events in prop::collection::vec((0..7u8, 0..4u32, any::<u32>(), number(), moment()), 1..60),
        step in step_time(),
    ) {
        let mut ledger = Ledger::default();
        for (what, leg, tokens, seconds, at) in events {
            let class = ServiceClass::Online;
            match what {
                0 => ledger.prompt_sent(leg, Prompt { tokens, cached: leg, seconds, due: at, class }, at),
                1 => ledger.prompt_over(leg, at),
                2 => ledger.decode_sent(tokens, at),
                3 => ledger.drawn(tokens, at),
                4 => ledger.decode_over(tokens, at),
                5 => ledger.prompt_cached(leg, tokens, seconds, at),
                _ => {
                    let (decodes, decode_tokens) = (tokens, u64::from(tokens) << 32);
                    let (queue_seconds, timely_seconds) = (seconds, -seconds);
                    let load = ledger::Load { queue_seconds, timely_seconds, decodes, decode_tokens };
                    ledger.report(load, at);
                }
            }
            for now in [Time::ZERO, at, Time::MAX] {
                for by_deadline in [None, Some(step)] {
                    let load = ledger.load(by_deadline, now);
                    prop_assert!((0.0..=86_400.0).contains(&load.queue_seconds), "{load:?}");
                    prop_assert!((0.0..=load.queue_seconds).contains(&load.timely_seconds), "{load:?}");
                }
            }
        }
    }

    #[test]
    fn a_predictor_stays_sane(
        prior in step_time(),
        steps in prop::collection::vec(prop::array::uniform4(number()), 1..60),
    ) {
        let mut predictor = Predictor::new(prior);
        for [tokens, pairs, context, seconds] in steps {
            let step = Measured { tokens, pairs, context, seconds };
            predictor.learn(step);
            prop_assert!(predictor.step_time().is_sane(), "{:?} after {step:?}", predictor.step_time());
            prop_assert!((0.0..=1.0).contains(&predictor.error()), "{}", predictor.error());
            let other = Measured { seconds: tokens, ..step };
            prop_assert!(from_two_points(prior, step, other).is_none_or(|step| step.is_sane()));
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 100, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn a_worker_that_lies_fills_its_own_entries_and_no_more_bytes(
        lies in prop::collection::vec(
            (0..3usize, any::<u64>(), prop_oneof![0..5u64, any::<u64>()], 0..4usize, 0..4u8, any::<u128>(), 0..3_000u128),
            1..30,
        ),
    ) {
        let mut index = Index::new(200_000);
        let mut said: BTreeMap<usize, BTreeSet<BlockHash>> = BTreeMap::new();
        let honest = WorkerId::from("honest");
        let truth: Vec<BlockHash> = (1..=20u128).map(|n| BlockHash(n << 64)).collect();
        index.snapshot(&honest, Incarnation(1), 0, truth.iter().map(|hash| (Tier::Device, *hash))).expect("is known");
        for (worker, incarnation, sequence, tier, what, first, many) in lies {
            let name = WorkerId::from(format!("liar-{worker}").as_str());
            // Duplicates of what others hold, of itself, and blocks that do not exist, thousands at once.
            let mut hashes: Vec<BlockHash> = (0..many).map(|n| BlockHash(first.wrapping_add(n % 2_000))).collect();
            hashes.extend(&truth);
            let known = said.entry(worker).or_default();
            let change = match what {
                0 => {
                    let blocks = hashes.iter().map(|hash| (TIERS[tier], *hash));
                    index.snapshot(&name, Incarnation(incarnation), sequence, blocks).expect("few workers");
                    *known = hashes.iter().copied().collect();
                    continue;
                }
                1 => Change::Stored(TIERS[tier], hashes.clone()),
                2 => Change::Removed(TIERS[tier], hashes.clone()),
                _ => Change::Cleared,
            };
            if index.apply(&name, Incarnation(incarnation), sequence, &change).is_ok() {
                match change {
                    Change::Stored(..) => known.extend(hashes.iter().copied()),
                    Change::Removed(..) => (),
                    Change::Cleared => known.clear(),
                }
            }
            prop_assert!(index.bytes() <= index.bytes_max());
            prop_assert!(index.len() <= 20 + said.values().map(BTreeSet::len).sum::<usize>());
            for found in index.longest(&hashes) {
                let liar = (0..3).find(|n| found.worker.0 == format!("liar-{n}"));
                let leading = hashes.iter().take(found.blocks as usize);
                let right = leading.clone().all(|hash| match liar {
                    Some(liar) => said.get(&liar).is_some_and(|said| said.contains(hash)),
                    None => truth.contains(hash),
                });
                prop_assert!(right && found.device_blocks <= found.blocks && leading.len() == found.blocks as usize);
            }
        }
    }
}
