//! What `cost` and the door make of workers whose memory is full.

use tandem_placement::admission::{Limits, Verdict, admit};
use tandem_placement::cost::Cost;
use tandem_placement::predictor::PROFILES;
use tandem_placement::{Candidate, Policy, Request, Route};
use tandem_types::{Role, WorkerId};

/// A worker whose sequences hold so many tokens, of 700,000.
fn worker(name: &str, decodes: u32, decode_tokens: u64) -> Candidate {
    Candidate {
        worker: WorkerId::from(name),
        role: Role::Mixed,
        model: Some(PROFILES[0].step),
        paced: true,
        kv_tokens: 700_000,
        decodes,
        decode_tokens,
        ..Candidate::default()
    }
}

fn request() -> Request {
    Request {
        prompt_tokens: 2000,
        max_tokens: 10_000,
        expected_tokens: 1000.0,
        first_token_seconds: 1.0,
        token_seconds: 0.05,
        ..Request::default()
    }
}

fn room(candidate: &Candidate) -> f64 {
    let here = Route { prefill: 0, decode: 0 };
    Cost::default().terms(&request(), std::slice::from_ref(candidate), here).room
}

#[test]
fn a_prompt_rather_waits_in_a_queue_than_for_memory() {
    let full = worker("full", 400, 699_000);
    let queued = Candidate { timely_seconds: 0.3, queue_seconds: 0.3, ..worker("queued", 400, 400_000) };
    let route = Cost::default().choose(&request(), &[full, queued]).expect("both can");
    assert_eq!(route, Route { prefill: 1, decode: 1 });
}

#[test]
fn the_door_is_shut_while_nobody_has_room_in_time() {
    let full = worker("full", 600, 699_000);
    let verdict = |candidates: &[Candidate]| admit(&request(), candidates, &Limits::default(), 0, 256);
    assert!(matches!(verdict(std::slice::from_ref(&full)), Verdict::Shed { .. }));
    assert!(matches!(verdict(&[full, worker("free", 100, 100_000)]), Verdict::Admit { .. }));
}

#[test]
fn sequences_that_still_grow_give_back_less_than_those_that_are_long() {
    let (grown, growing) = (room(&worker("w", 200, 699_000)), room(&worker("w", 600, 699_000)));
    assert!(0.0 < grown && 2.0 * grown < growing, "{grown} s and {growing} s");
}

#[test]
fn where_there_is_room_or_no_pool_is_known_nobody_waits_for_it() {
    assert_eq!(room(&worker("w", 200, 400_000)), 0.0);
    assert_eq!(room(&Candidate { kv_tokens: 0, ..worker("w", 600, 699_000) }), 0.0);
    assert!(room(&worker("w", u32::MAX, u64::MAX)).is_finite());
}
