//! What `cost` loses by weighing the few best of each side, and pairs with a link of their own, instead of all.

use proptest::prelude::*;
use tandem_placement::cost::{Cost, Tuning};
use tandem_placement::predictor::PROFILES;
use tandem_placement::{Candidate, Held, Link, Policy, Request, Route, Stage, Tier};
use tandem_types::{Role, WorkerId};

fn name(n: usize) -> WorkerId {
    format!("w-{n}").as_str().into()
}

/// Clusters as they are: several devices, any split of roles, some busy, links that differ, some neighbours.
fn candidates() -> impl Strategy<Value = Vec<Candidate>> {
    let load = (0.0..2.0f64, 0..200u32, 0..400_000u64);
    let one = (0..3usize, 0..PROFILES.len(), load, 0..3i32, prop::collection::vec(0..40usize, 0..3));
    prop::collection::vec(one, 1..40).prop_map(|all| {
        let made = all.into_iter().enumerate().map(|(n, (role, profile, load, slower, near))| {
            let fast = Link { setup_seconds: 20e-6, tokens_per_second: 1.4e6 };
            let rate = Link::default().tokens_per_second / f64::from(1 << slower);
            Candidate {
                worker: name(n),
                role: [Role::Prefill, Role::Decode, Role::Mixed][role],
                model: Some(PROFILES[profile].step),
                queue_seconds: load.0,
                timely_seconds: load.0,
                decodes: load.1,
                decode_tokens: if load.1 > 0 { load.2 } else { 0 },
                kv_tokens: PROFILES[profile].kv_tokens,
                paced: profile % 2 == 0,
                link: Link { tokens_per_second: rate, ..Link::default() },
                near: near.into_iter().filter(|other| *other != n).map(|other| (name(other), fast)).collect(),
                ..Candidate::default()
            }
        });
        made.collect()
    })
}

fn request() -> impl Strategy<Value = Request> {
    let held = prop::collection::vec((0..40usize, 0..30_000u32), 0..6);
    (1..32_768u32, 1..1_000u32, 0.1..10.0f64, 0.01..0.2f64, held).prop_map(
        |(prompt_tokens, max_tokens, first_token_seconds, token_seconds, held)| {
            let held = held.into_iter().map(|(candidate, tokens)| {
                let tokens = tokens.min(prompt_tokens);
                Held { candidate, device_tokens: tokens, tokens, tier: Tier::Device }
            });
            let held = held.collect();
            Request {
                prompt_tokens,
                max_tokens,
                first_token_seconds,
                token_seconds,
                held,
                ..Request::default()
            }
        },
    )
}

/// The cheapest route itself, and not one that is as good by and large.
fn never_in_turn() -> Cost {
    Cost { tuning: Tuning { equal_seconds: 0.0, ..Tuning::default() } }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 1_000, failure_persistence: None, ..ProptestConfig::default() })]

    /// Parts are chosen without the way between them, so the best of each side are among the few whatever their
    /// way: no more than that way is ever lost.
    #[test]
    fn the_few_best_lose_no_more_than_the_way_between_the_best_of_each_side(candidates in candidates(), request in request()) {
        let cost = never_in_turn();
        let (_, few) = cost.cheapest(&request, &candidates).expect("all can do it");
        let (_, all) = cost.full_search(&request, &candidates).expect("all can do it");
        let everybody: Vec<usize> = (0..candidates.len()).collect();
        let best = |stage| cost.best(stage, &request, &candidates, &everybody);
        let of_each = Route { prefill: best(Stage::Prefill), decode: best(Stage::Decode) };
        let way = cost.terms(&request, &candidates, of_each).transfer;
        prop_assert!(all <= few, "all {all}, few {few}");
        prop_assert!(few <= all + way + 1e-9, "all {all}, few {few}, {way} between the best of each side");
    }

    /// Whoever is put off is looked at where it may matter, so that it never does.
    #[test]
    fn who_cannot_be_the_cheapest_need_not_be_weighed(
        mut candidates in candidates(), request in request(), ordinal in 0..8u64, links: bool,
    ) {
        if !links {
            candidates.iter_mut().for_each(|c| c.near.clear());
        }
        let (cost, request) = (Cost::default(), Request { ordinal, ..request });
        prop_assert_eq!(cost.cheapest(&request, &candidates), cost.few_search(&request, &candidates));
        for prefill in 0..candidates.len() {
            let decode = cost.choose_decode(&request, &candidates, Some(prefill)).expect("all can do it");
            let of = |decode| cost.terms(&request, &candidates, Route { prefill, decode }).sum();
            let least = (0..candidates.len()).map(of).fold(f64::INFINITY, f64::min);
            let most = least + cost.tuning.equal_seconds + 1e-9 * least;
            prop_assert!(of(decode) <= most, "{decode} costs {}, another {least}", of(decode));
        }
    }
}

#[test]
fn the_few_best_are_hardly_ever_not_the_best_of_all() {
    use proptest::strategy::ValueTree;
    use proptest::test_runner::{Config, RngAlgorithm, TestRng, TestRunner};
    let seed = TestRng::deterministic_rng(RngAlgorithm::ChaCha);
    let mut runner =
        TestRunner::new_with_rng(Config { failure_persistence: None, ..Config::default() }, seed);
    let (cost, mut worse, mut lost) = (never_in_turn(), 0, 0.0);
    for _ in 0..2_000 {
        let tree = (candidates(), request()).new_tree(&mut runner).expect("nothing is filtered");
        let (candidates, request) = tree.current();
        let (_, few) = cost.cheapest(&request, &candidates).expect("all can do it");
        let (_, all) = cost.full_search(&request, &candidates).expect("all can do it");
        worse += usize::from(few > all + 1e-6);
        lost += few / all - 1.0;
    }
    println!("{worse} of 2,000 choices cost more, {:.4} % on average", lost / 20.0);
    assert!(worse <= 20, "{worse} of 2,000 choices cost more");
    assert!(lost / 2_000.0 < 1e-3, "{lost}");
}
