//! Who is let in when the cluster has targets to keep.

use tandem_placement::admission::{Limits, Verdict, admit};
use tandem_placement::{Candidate, Request};
use tandem_types::{Role, StepTime, WorkerId};

/// A step of 20 ms, 0.4 ms for each token of a prompt: 38 prompts of 64 tokens a second.
const MODEL: StepTime = StepTime { a0: 0.02, a1: 4e-4, a2: 0.0, b0: 0.1, b1: 1e-3, b2: 0.0 };

fn worker(name: &str, role: Role) -> Candidate {
    let id = WorkerId::from(name);
    Candidate { worker: id, role, model: Some(MODEL), paced: true, ..Candidate::default() }
}

fn request() -> Request {
    Request {
        prompt_tokens: 64,
        max_tokens: 16,
        first_token_seconds: 2.0,
        token_seconds: 0.5,
        ..Request::default()
    }
}

fn admitted(request: &Request, candidates: &[Candidate]) -> bool {
    matches!(admit(request, candidates, &Limits::default(), 0, 256), Verdict::Admit { .. })
}

#[test]
fn a_queue_is_filled_as_far_as_the_target_reaches_and_no_further() {
    let queued = |seconds: f64| Candidate { timely_seconds: seconds, ..worker("p", Role::Prefill) };
    assert!(admitted(&request(), &[queued(1.7)]));
    assert!(!admitted(&request(), &[queued(2.0)]), "half of such requests would be late, and wait for long");
}

#[test]
fn a_decode_worker_with_much_to_do_is_no_way_around_a_queue() {
    let full = Candidate { timely_seconds: 3.0, ..worker("p", Role::Prefill) };
    // Steps of 0.48 s, of the 0.5 s that a token may take: a second of prompts takes several.
    let busy = Candidate { decodes: 380, timely_seconds: 1.0, ..worker("d", Role::Decode) };
    assert!(!admitted(&request(), &[full.clone(), busy]));
    assert!(admitted(&request(), &[full, worker("d", Role::Decode)]), "an idle one is");
}

#[test]
fn a_worker_whose_rows_all_decode_takes_no_prompt() {
    let full = Candidate { timely_seconds: 3.0, ..worker("p", Role::Prefill) };
    let busy = |decodes| Candidate { decodes, rows_max: 64, ..worker("d", Role::Decode) };
    assert!(admitted(&request(), &[full.clone(), busy(64)]), "a row ends every 40 ms");
    let crowded = Candidate { waiting: 50, ..busy(64) };
    assert!(!admitted(&request(), &[full, crowded]), "two seconds until all who wait have one");
}

#[test]
fn decodes_without_a_row_wait_for_their_turn() {
    let busy = |decodes| Candidate { decodes, rows_max: 64, ..worker("d", Role::Decode) };
    let idle = Candidate { rows_max: 64, ..worker("p", Role::Prefill) };
    let answer = Request { max_tokens: 500, ..request() };
    // A step of 64 rows takes 0.164 s: four turns of that are more than the 0.5 s that a token may take.
    let both = |decodes| [Candidate { decodes, ..idle.clone() }, busy(decodes)];
    assert!(admitted(&answer, &both(100)));
    assert!(!admitted(&answer, &both(260)));
}

#[test]
fn decodes_that_leave_no_time_for_another_shut_the_door() {
    let busy = |decodes: u32| Candidate { decodes, ..worker("d", Role::Decode) };
    let prefill = worker("p", Role::Prefill);
    let answer = Request { max_tokens: 500, ..request() };
    assert!(admitted(&answer, &[prefill.clone(), busy(300)]));
    // The prefill worker could decode as well.
    let other = Candidate { decodes: 450, ..prefill };
    assert!(!admitted(&answer, &[other, busy(450)]));
}

#[test]
fn what_no_idle_worker_does_in_time_is_let_in_all_the_same() {
    let idle = [worker("p", Role::Prefill), worker("d", Role::Decode)];
    let long = Request { prompt_tokens: 100_000, ..request() };
    assert!(admitted(&long, &idle), "40 s of work, due in two");
    let piecemeal = idle.clone().map(|worker| Candidate { prompt_budget: 512, ..worker });
    assert!(admitted(&long, &piecemeal), "each piece takes a step of its own");
    let hasty = Request { token_seconds: 1e-3, ..request() };
    assert!(admitted(&hasty, &idle), "no step is that short");
    let mut queued = idle.clone();
    for worker in &mut queued {
        worker.timely_seconds = 60.0;
    }
    assert!(!admitted(&long, &queued), "others are before it");
}

#[test]
fn nobody_is_refused_by_chance_without_targets_or_before_a_worker_has_measured_itself() {
    let swamped = Candidate { timely_seconds: 1e3, decodes: 1000, ..worker("p", Role::Prefill) };
    let patient = Request { first_token_seconds: f64::INFINITY, token_seconds: f64::INFINITY, ..request() };
    assert!(admitted(&patient, std::slice::from_ref(&swamped)));
    assert!(admitted(&request(), &[Candidate { model: None, ..swamped }]));
}

#[test]
fn a_refusal_says_why_and_when_to_come_again() {
    let queued = Candidate { timely_seconds: 9.5, ..worker("p", Role::Prefill) };
    match admit(&request(), &[queued], &Limits::default(), 0, 256) {
        Verdict::Shed { reason, retry_after } => {
            let reason = reason.to_string();
            assert!(reason.contains("9.50 s") && reason.contains("2.00 s"), "{reason}");
            assert_eq!(retry_after.as_secs(), 8);
        }
        Verdict::Admit { chance } => panic!("admitted with {chance}"),
    }
    let crowded = Candidate { decodes: 450, ..worker("d", Role::Decode) };
    match admit(&Request { max_tokens: 500, ..request() }, &[crowded], &Limits::default(), 0, 256) {
        Verdict::Shed { reason, .. } => {
            let reason = reason.to_string();
            assert!(reason.contains("other tokens within 0.500 s"), "{reason}");
        }
        Verdict::Admit { chance } => panic!("admitted with {chance}"),
    }
}
