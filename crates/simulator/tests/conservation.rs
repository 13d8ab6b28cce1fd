//! Whatever comes and whatever breaks: nothing is lost, nothing is done twice, and equal seeds give equal logs.

use std::collections::BTreeSet;
use std::time::Duration;

use proptest::prelude::*;
use tandem_batching::pace::Order;
use tandem_simulator::cache::Sizes;
use tandem_simulator::workload::{Arrival, Workload};
use tandem_simulator::{Fault, Options, Split, holds, random, run};
use tandem_types::{ServiceClass, Time};

/// Prompts that share prefixes: block `n` of a conversation, or of the one it branched off.
fn workload() -> impl Strategy<Value = Workload> {
    let request = (0..120u64, 1..6000u32, 1..300u32, 0..4u32, prop::bool::weighted(0.15));
    prop::collection::vec(request, 1..80).prop_map(|requests| {
        let (mut at, mut blocks, mut arrivals) = (0, Vec::new(), Vec::new());
        for (gap, input, output, talk, offline) in requests {
            at += gap;
            let from = blocks.len() as u32;
            blocks.extend((0..input / 512).map(|n| talk * 100 + n));
            arrivals.push(Arrival {
                at: Time::from_millis(at),
                input,
                output,
                class: if offline { ServiceClass::Offline } else { ServiceClass::Online },
                blocks: (from, input / 512),
            });
        }
        Workload { arrivals, blocks }
    })
}

fn faults() -> impl Strategy<Value = Vec<(Duration, usize, Fault)>> {
    let kind = (0..3u8, 100..3000u64);
    let fault = (0..6000u64, 0..5usize, kind).prop_map(|(at, worker, (kind, ms))| {
        let lasts = Duration::from_millis(ms);
        let fault = match kind {
            0 => Fault::Crash(lasts),
            1 => Fault::Slow(5.0, lasts),
            _ => Fault::Silent(lasts),
        };
        (Duration::from_millis(at), worker, fault)
    });
    prop::collection::vec(fault, 0..4)
}

fn options() -> impl Strategy<Value = Options> {
    let split = prop_oneof![
        (1..4usize, 1..4usize).prop_map(|(p, d)| Split::Roles(p, d)),
        (64..2048u32).prop_map(Split::Mixed),
    ];
    let policy = prop_oneof![Just("cost"), Just("prefix"), Just("least-loaded"), Just("round-robin")];
    let flags = (any::<bool>(), any::<bool>(), any::<bool>(), any::<bool>(), any::<bool>());
    let numbers = (0..3u32, (0..3u64, 1..4usize, any::<bool>()), -1..2i32, any::<u64>());
    (split, policy, flags, numbers, faults()).prop_map(
        |(
            split,
            policy,
            (deadline, planner, cached, pulls, shared),
            (noise, (stale, routers, admission), bias, seed),
            faults,
        )| {
            Options {
                split,
                workers: match split {
                    Split::Roles(prefill, decode) => prefill + decode,
                    Split::Mixed(_) => 3,
                },
                policy: policy.to_owned(),
                planner,
                order: if deadline { Order::Deadline } else { Order::Arrival },
                cache: if cached {
                    Sizes { device_tokens: 20_000, host_tokens: 20_000 }
                } else {
                    Sizes::default()
                },
                peer_pulls: pulls,
                shared_links: shared,
                noise: f64::from(noise) * 0.1,
                stale: Duration::from_millis(stale * 500),
                routers,
                admission,
                bias: f64::from(bias) * 0.2,
                seed,
                faults,
                ..Options::default()
            }
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 96, ..ProptestConfig::default() })]

    // Books of KV and of routers are checked by the run itself after every step.
    #[test]
    fn every_request_ends_once_and_every_prompt_token_is_computed_or_found(
        workload in workload(),
        options in options(),
    ) {
        let outcome = run(&options, &workload).expect("the options are sound");
        let online = workload.arrivals.iter().filter(|a| a.class == ServiceClass::Online);
        prop_assert_eq!(outcome.requests, online.clone().count());
        prop_assert_eq!(outcome.served.len() + outcome.unfinished, outcome.requests);
        let ids: BTreeSet<u32> = outcome.served.iter().map(|served| served.id).collect();
        prop_assert_eq!(ids.len(), outcome.served.len(), "one has ended twice");
        let all_over = outcome.unfinished == 0 && outcome.offline_open == 0;
        if all_over {
            prop_assert_eq!(outcome.kv_blocks_left, 0, "what has ended holds KV");
        }
        if all_over && options.faults.is_empty() && outcome.preempted == 0 {
            let came: u64 = workload.arrivals.iter().map(|a| u64::from(a.input)).sum();
            prop_assert_eq!(outcome.prompt_tokens + outcome.hit_tokens, came);
        }
        let again = run(&options, &workload).expect("the options are sound");
        prop_assert_eq!(outcome.log_hash, again.log_hash);
    }

    #[test]
    fn whether_a_load_is_held_is_told_early_but_told_the_same(
        workload in workload(),
        options in options(),
        first_ms in 1..3000u64,
        token_ms in 1..60u64,
        target in 0.0..=1.0f64,
    ) {
        let (first_token, per_token) = (Duration::from_millis(first_ms), Duration::from_millis(token_ms));
        let options = Options { first_token, per_token, ..options };
        let attained = run(&options, &workload).expect("the options are sound").attainment();
        for target in [target, attained, attained + 1e-9] {
            prop_assert_eq!(holds(&options, &workload, target), Ok(attained >= target), "{} of {}", attained, target);
        }
    }

    #[test]
    fn draws_of_one_are_nobody_elses(seed: u64, entity: u64, draw in 0..1000u64) {
        // A draw is a function of who draws and how often it has drawn: others cannot change it.
        let alone = random::uniform(seed, entity, draw);
        let among: Vec<f64> = (0..4).map(|other| random::uniform(seed, entity.wrapping_add(other), draw)).collect();
        prop_assert_eq!(alone, among[0]);
        prop_assert!(among[1..].iter().all(|other| *other != alone));
        prop_assert!((0.0..1.0).contains(&alone));
    }
}

/// Requests far apart, each on the worker of its turn: with one more request at the end, or one more worker that
/// nobody is sent to yet, those before see the very same steps.
#[test]
fn one_more_request_or_worker_changes_no_draw_of_the_others() {
    let arrivals = |count: u64| {
        let arrivals = (0..count).map(|n| Arrival {
            at: Time::from_millis(n * 10_000),
            input: 900,
            output: 20,
            class: ServiceClass::Online,
            blocks: (0, 0),
        });
        Workload { arrivals: arrivals.collect(), blocks: Vec::new() }
    };
    let options = Options {
        split: Split::Mixed(512),
        workers: 3,
        policy: "round-robin".into(),
        planner: false,
        noise: 0.2,
        ..Options::default()
    };
    let times = |options: &Options, count: u64| -> Vec<(u32, f32, f32)> {
        let outcome = run(options, &arrivals(count)).expect("the options are sound");
        outcome.served.iter().map(|served| (served.id, served.first, served.per_token)).collect()
    };
    let few = times(&options, 3);
    assert_eq!(few, times(&options, 4)[..3]);
    assert_eq!(few, times(&Options { workers: 4, ..options }, 3));
}
