//! The closed form and the real batcher make the same cluster: equal logs, whatever comes.

use std::time::Duration;

use proptest::prelude::*;
use tandem_batching::pace::Order;
use tandem_placement::predictor::{PROFILES, Profile};
use tandem_simulator::workload::{Arrival, Workload};
use tandem_simulator::{Batching, Fault, Options, Split, run};
use tandem_types::{ServiceClass, Time};

/// A device whose memory is so small that sequences preempt each other.
static SMALL: Profile = Profile {
    model: "small",
    device: "small",
    step: PROFILES[0].step,
    kv_bytes: PROFILES[0].kv_bytes,
    kv_tokens: 32 * 120,
};

fn workload() -> impl Strategy<Value = Workload> {
    let request = (0..40u64, 1..900u32, 1..250u32, prop::bool::weighted(0.1));
    prop::collection::vec(request, 1..40).prop_map(|requests| {
        let mut at = 0;
        let arrivals = requests.into_iter().map(|(gap, input, output, offline)| {
            at += gap;
            Arrival {
                at: Time::from_millis(at),
                input,
                output,
                class: if offline { ServiceClass::Offline } else { ServiceClass::Online },
                blocks: (0, 0),
            }
        });
        Workload { arrivals: arrivals.collect(), blocks: Vec::new() }
    })
}

fn options() -> impl Strategy<Value = Options> {
    let splits =
        prop_oneof![Just(Split::Roles(1, 1)), Just(Split::Roles(2, 1)), (1..600u32).prop_map(Split::Mixed),];
    let policies = prop_oneof![Just("cost"), Just("least-loaded"), Just("round-robin")];
    let times = (20..400u64, 5..60u64, 0..300u32, 0..2u32, 0..3u32);
    (splits, policies, any::<bool>(), any::<bool>(), times).prop_map(
        |(split, policy, deadline, small, (first, token, headroom, noise, fault))| Options {
            split,
            workers: match split {
                Split::Roles(prefill, decode) => prefill + decode,
                Split::Mixed(_) => 2,
            },
            profile: if small { &SMALL } else { &PROFILES[0] },
            policy: policy.to_owned(),
            order: if deadline { Order::Deadline } else { Order::Arrival },
            first_token: Duration::from_millis(first),
            per_token: Duration::from_millis(token),
            headroom_tokens: headroom,
            noise: f64::from(noise) * 0.1,
            bias: if headroom % 3 == 0 { -0.2 } else { 0.0 },
            faults: match fault {
                0 => vec![(Duration::from_millis(300), 0, Fault::Crash(Duration::from_millis(500)))],
                _ => Vec::new(),
            },
            ..Options::default()
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 32, ..ProptestConfig::default() })]

    #[test]
    fn both_ways_to_batch_make_the_same_log(workload in workload(), options in options()) {
        let twin = run(&options, &workload).expect("the options are sound");
        let real = Options { batching: Batching::Real, ..options };
        let real = run(&real, &workload).expect("the options are sound");
        prop_assert_eq!(twin.log_hash, real.log_hash);
        prop_assert_eq!(twin.attainment(), real.attainment());
        prop_assert_eq!((twin.steps, twin.preempted), (real.steps, real.preempted));
    }
}

#[test]
fn the_small_device_does_preempt_and_what_was_drawn_is_computed_as_prompt() {
    let arrivals = (0..40).map(|i| Arrival {
        at: Time::from_millis(5 * i),
        input: 300,
        output: 200,
        class: ServiceClass::Online,
        blocks: (0, 0),
    });
    let workload = Workload { arrivals: arrivals.collect(), blocks: Vec::new() };
    let options = Options {
        split: Split::Mixed(512),
        workers: 1,
        profile: &SMALL,
        policy: "least-loaded".into(),
        headroom_tokens: 0,
        ..Options::default()
    };
    let outcome = run(&options, &workload).expect("the options are sound");
    assert!(outcome.preempted > 0, "or the test above compares little");
    // Whoever was preempted had drawn more than its first token, and none of it is drawn again.
    let again = outcome.prompt_tokens - 40 * 300;
    assert!(again > 302 * outcome.preempted, "{again} tokens for {} preempted", outcome.preempted);
}
