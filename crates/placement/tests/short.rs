//! What `cost` makes of answers that may be too short to be handed off.

use tandem_placement::cost::Cost;
use tandem_placement::predictor::PROFILES;
use tandem_placement::{Candidate, Link, Policy, Request, Route};
use tandem_types::{Role, WorkerId};

fn worker(name: &str, role: Role) -> Candidate {
    Candidate {
        worker: WorkerId::from(name),
        role,
        model: Some(PROFILES[0].step),
        paced: true,
        prompt_budget: 2048,
        kv_tokens: 700_000,
        link: Link { setup_seconds: 1e-3, tokens_per_second: 280_000.0 },
        ..Candidate::default()
    }
}

/// Answers of which such a share has one token after the first.
fn request(share: f64) -> Request {
    let mut request = Request {
        prompt_tokens: 700,
        max_tokens: 10_000,
        expected_tokens: 200.0,
        short_tokens: 2.0,
        first_token_seconds: 1.0,
        token_seconds: 0.05,
        ..Request::default()
    };
    request.short_shares[0] = share;
    request
}

/// A worker that has computed a prompt, and one whose steps are long, for prompts share them.
fn prefill_and_busy_decode() -> [Candidate; 2] {
    let busy = Candidate {
        decodes: 500,
        decode_tokens: 400_000,
        timely_seconds: 0.3,
        queue_seconds: 0.3,
        ..worker("decode", Role::Decode)
    };
    [worker("prefill", Role::Prefill), busy]
}

#[test]
fn answers_stay_where_they_are_prefilled_if_many_are_too_short_to_be_handed_off() {
    let candidates = prefill_and_busy_decode();
    let decodes_at = |share| Cost::default().choose_decode(&request(share), &candidates, Some(0));
    assert_eq!(decodes_at(0.0), Some(1));
    assert_eq!(decodes_at(0.2), Some(0));
}

#[test]
fn short_answers_are_handed_off_where_steps_are_short() {
    let idle = [worker("prefill", Role::Prefill), worker("decode", Role::Decode)];
    assert_eq!(Cost::default().choose_decode(&request(0.2), &idle, Some(0)), Some(1));
}

#[test]
fn what_makes_them_stay_is_part_of_the_transfer() {
    let candidates = prefill_and_busy_decode();
    let away = Route { prefill: 0, decode: 1 };
    let transfer = |share| Cost::default().terms(&request(share), &candidates, away).transfer;
    let more = transfer(0.2) - transfer(0.0);
    assert!((3.9..=4.0).contains(&more), "a fifth is nearly sure to be late, at 20 s each: {more}");
}
