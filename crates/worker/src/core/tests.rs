//! The core alone: commands and outcomes in, output out, time as an argument.

use std::time::Duration;

use tandem_batching::{Batcher, Outcome, Plan, RowOutcome};
use tandem_kv_cache::{FirstTokenBundle, KvCache, Verdict};
use tandem_proto::{convert, v1};
use tandem_types::{
    Attempt, ClaimId, Handle, Incarnation, KvForm, LeaseId, Role, Sampled, SamplingParams, StopRules, Time,
    Usage, WorkerId,
};
use v1::event::Event;

use super::{CompletedPage, Constants, Core, Output, PageSum, PullFailure, PullOrder, SessionId};

const INCARNATION: Incarnation = Incarnation(77);

fn core_named(id: &str, pages: u32) -> Core {
    let constants = Constants {
        id: WorkerId(id.into()),
        incarnation: INCARNATION,
        lender: format!("{id}:1"),
        exports: Vec::new(),
        identity: Default::default(),
        form: KvForm::default(),
        context_tokens: 1000,
        groups: 1,
        legs_max: 4,
        strict: true,
    };
    let kv = KvCache::new(tandem_kv_cache::Config {
        pages,
        groups: 1,
        leased_share: 0.5,
        lease_time_to_live: Duration::from_secs(10),
        prefix_cache: true,
    });
    let batcher = Batcher::new(tandem_batching::Config { context_tokens: 1000, ..Default::default() });
    let mut next = 0;
    let draw = move || {
        next += 1;
        next
    };
    Core::new(constants, Role::Mixed, kv, batcher, Box::new(draw))
}

/// A core with one session, and what it has said so far.
struct Worker {
    core: Core,
    session: SessionId,
    now: Time,
}

impl Worker {
    fn new(id: &str) -> Worker {
        let mut core = core_named(id, 32);
        let session = core.open_session("router-0", 1, Time::ZERO);
        Worker { core, session, now: Time::ZERO }
    }

    fn start(&mut self, start: v1::Start) -> Vec<String> {
        self.core.start(self.session, start, self.now);
        self.said()
    }

    /// One step, in which every row that draws draws `token`.
    fn step(&mut self, token: u32) -> Vec<String> {
        let Some(plan) = self.core.plan(self.now) else { return self.said() };
        let outcome = outcome(&plan, token);
        self.core.collected(outcome, &[], self.now);
        self.said()
    }

    fn said(&mut self) -> Vec<String> {
        let output = self.core.take_output();
        output.iter().filter_map(say).collect()
    }

    fn pull(&mut self) -> Box<PullOrder> {
        let mut output = self.core.take_output().into_iter();
        output.find_map(|o| if let Output::Pull(order) = o { Some(order) } else { None }).expect("an order")
    }

    fn handle(&mut self) -> Handle {
        let mut output = self.core.take_output().into_iter();
        let found = output.find_map(|o| match o {
            Output::Event { event: Event::Granted(granted), .. } => granted.handle,
            _ => None,
        });
        Handle::try_from(&*found.expect("a grant")).expect("a handle")
    }

    fn assert_idle(&self) {
        self.core.check_books();
        let load = self.core.load();
        assert_eq!((load.blocks_in_use, load.leases, self.core.leg_count()), (0, 0, 0));
    }
}

fn outcome(plan: &Plan, token: u32) -> Outcome {
    let scored = |row: &tandem_batching::Row| {
        let targets = row.score.iter().flat_map(|score| (score.first..).zip(&score.targets));
        let scored = |(at, &token)| Sampled { token, logprob: Some(-(at as f32)), top: vec![(token, -0.5)] };
        targets.map(scored).collect()
    };
    let rows = plan.rows.iter().map(|row| RowOutcome {
        slot: row.slot,
        count: row.count,
        sampled: row.sample.then(|| Sampled { token, ..Sampled::default() }),
        scored: scored(row),
    });
    Outcome { id: plan.id, rows: rows.collect(), took: Duration::ZERO }
}

fn say(output: &Output) -> Option<String> {
    match output {
        Output::Event { leg, event, .. } => Some(match event {
            Event::Delta(delta) => format!("{leg}: delta {}={:?}", delta.position, delta.tokens),
            Event::Scored(scored) => format!("{leg}: scored {}+{}", scored.position, scored.logprobs.len()),
            Event::Granted(_) => format!("{leg}: granted"),
            Event::Finished(finished) => format!("{leg}: finished {}", finished.reason().as_str_name()),
            Event::Released(_) => format!("{leg}: released"),
            Event::Refused(refused) => format!("{leg}: refused {}", refused.reason().as_str_name()),
            Event::Preempted(_) => format!("{leg}: preempted"),
            Event::Failed(failed) => format!("{leg}: failed {}", failed.reason().as_str_name()),
        }),
        Output::Follow { event, .. } => Some(match event {
            v1::follow_event::Event::Ready(_) => "ready".into(),
            v1::follow_event::Event::Sealed(_) => "sealed".into(),
            v1::follow_event::Event::Done(_) => "done".into(),
            v1::follow_event::Event::Lost(_) => "lost".into(),
            v1::follow_event::Event::Superseded(_) => "superseded".into(),
            other => format!("{other:?}"),
        }),
        Output::Pull(_) => Some("pull".into()),
        Output::StopPull(_) => Some("stop pull".into()),
        Output::CloseSession(_) => Some("close session".into()),
        Output::Stage(_) | Output::Transferred { .. } | Output::Left(_) => None,
    }
}

/// A Start of leg `leg` for 40 tokens of prompt and three of answer.
fn start(leg: u32, attempt: u32, until: v1::Until) -> v1::Start {
    v1::Start {
        leg,
        request: convert::id128(5),
        attempt,
        worker_incarnation: INCARNATION.0,
        until: until as i32,
        remaining_ms: 60_000,
        tokens: (0..40).collect(),
        prompt_tokens: 40,
        sampling: Some((&SamplingParams::default()).into()),
        stop: Some((&StopRules { max_tokens: 3, eos: vec![99], ..StopRules::default() }).into()),
        ..v1::Start::default()
    }
}

fn with_handle(mut start: v1::Start, handle: &Handle) -> v1::Start {
    start.inputs = vec![handle.into()];
    start
}

fn bundle(token: u32) -> FirstTokenBundle {
    let usage = Usage { prompt_tokens: 40, cached_tokens: 0, output_tokens: 1 };
    FirstTokenBundle { sampled: Sampled { token, ..Sampled::default() }, usage }
}

#[test]
fn a_mixed_worker_answers_alone() {
    let mut w = Worker::new("w");
    assert!(w.start(start(1, 1, v1::Until::End)).is_empty());
    assert_eq!(w.step(7), ["1: delta 0=[7]"]);
    assert_eq!(w.step(8), ["1: delta 1=[8]"]);
    assert_eq!(w.step(9), ["1: delta 2=[9]", "1: finished FINISH_REASON_LENGTH", "1: released"]);
    w.assert_idle();
}

#[test]
fn a_prefill_is_granted_sealed_pulled_and_released() {
    let mut w = Worker::new("p");
    w.core.start(w.session, start(1, 1, v1::Until::FirstToken), w.now);
    let plan = w.core.plan(w.now).expect("a prompt to compute");
    let handle = w.handle();
    assert_eq!((handle.tokens, handle.groups[0].pages.len()), (40, 2));
    assert!(w.core.follow(handle.lease, Attempt(2), ClaimId(9), w.now));
    let pages: Vec<u32> = handle.groups[0].pages.iter().map(|page| page.page).collect();
    let whole = |page, rows| CompletedPage { group: 0, page, rows };
    assert_eq!(w.core.completing(), [whole(pages[0], 32), whole(pages[1], 8)], "the tail is to be zeroed");
    let sums = pages.iter().map(|&page| PageSum { group: 0, page, checksum: u64::from(page) + 1000 });
    w.core.collected(outcome(&plan, 7), &sums.collect::<Vec<_>>(), w.now);
    let output = w.core.take_output();
    let sent = output.iter().filter_map(|output| match output {
        Output::Follow { event: v1::follow_event::Event::Ready(ready), .. } => Some(ready.checksums.clone()),
        _ => None,
    });
    let expected: Vec<u64> = pages.iter().map(|&page| u64::from(page) + 1000).collect();
    assert_eq!(
        sent.flatten().collect::<Vec<_>>(),
        expected,
        "checksums go with the word that pages are whole"
    );
    let said: Vec<String> = output.iter().filter_map(say).collect();
    assert_eq!(said, ["1: delta 0=[7]", "ready", "ready", "sealed"]);
    assert_eq!(w.core.end_claim(handle.lease, ClaimId(9), true, w.now), Verdict::Held);
    assert_eq!(w.said(), ["1: released"]);
    w.assert_idle();
}

#[test]
fn a_hand_off_is_pulled_and_its_first_delta_repeats_the_bundles_token() {
    let mut p = Worker::new("p");
    p.core.start(p.session, start(1, 1, v1::Until::FirstToken), p.now);
    p.core.plan(p.now).expect("a prompt");
    let handle = p.handle();

    let mut d = Worker::new("d");
    d.core.start(d.session, with_handle(start(4, 2, v1::Until::End), &handle), d.now);
    let order = d.pull();
    assert_eq!((order.attempt, order.skip_blocks, order.local[0].len()), (Attempt(2), 0, 2));
    d.core.pull_done(order.sequence, 40, bundle(7), Vec::new(), d.now);
    assert_eq!(d.said(), ["4: delta 0=[7]"]);
    assert_eq!(d.step(8), ["4: delta 1=[8]"]);
    assert_eq!(d.step(99), ["4: delta 2=[99]", "4: finished FINISH_REASON_EOS", "4: released"]);
    d.assert_idle();
}

#[test]
fn what_a_worker_granted_itself_it_takes_over_without_a_pull() {
    let mut w = Worker::new("w");
    w.core.start(w.session, start(1, 1, v1::Until::FirstToken), w.now);
    let plan = w.core.plan(w.now).expect("a prompt");
    let handle = w.handle();
    w.core.collected(outcome(&plan, 7), &[], w.now);
    w.said();
    assert_eq!(w.start(with_handle(start(2, 2, v1::Until::End), &handle)), ["2: delta 0=[7]", "1: released"]);
    w.step(8);
    w.step(9);
    w.assert_idle();
}

#[test]
fn a_cancel_frees_everything_at_every_stage() {
    // Waiting, computing, handed off, being pulled by somebody.
    for steps in 0..3 {
        let mut w = Worker::new("w");
        w.core.start(w.session, start(1, 1, v1::Until::FirstToken), w.now);
        let plan = (steps > 0).then(|| w.core.plan(w.now).expect("a prompt"));
        if let (Some(plan), true) = (&plan, steps > 1) {
            w.core.collected(outcome(plan, 7), &[], w.now);
        }
        w.core.take_output();
        w.core.cancel(w.session, 1, w.now);
        assert_eq!(w.said(), ["1: released"], "after {steps} steps");
        if let (Some(plan), 1) = (&plan, steps) {
            // The step that was running names its pages until it is collected.
            assert_eq!(w.core.load().blocks_in_use, 2);
            w.core.collected(outcome(plan, 7), &[], w.now);
            assert!(w.said().is_empty());
        }
        w.assert_idle();
    }
}

#[test]
fn a_cancelled_pull_keeps_its_pages_until_nothing_writes_to_them() {
    let mut p = Worker::new("p");
    p.core.start(p.session, start(1, 1, v1::Until::FirstToken), p.now);
    p.core.plan(p.now).expect("a prompt");
    let handle = p.handle();
    let mut d = Worker::new("d");
    d.core.start(d.session, with_handle(start(4, 2, v1::Until::End), &handle), d.now);
    let order = d.pull();
    d.core.cancel(d.session, 4, d.now);
    assert_eq!(d.said(), ["stop pull"]);
    assert_eq!(d.core.load().blocks_in_use, 2);
    d.core.pull_failed(order.sequence, PullFailure::Transfer("cancelled".into()), d.now);
    assert_eq!(d.said(), ["4: released"]);
    d.assert_idle();
}

#[test]
fn a_pull_that_fails_says_why_and_holds_nothing() {
    let cases = [
        (PullFailure::Done, "4: released"),
        (PullFailure::Unreachable("x".into()), "4: refused REFUSE_REASON_UNREACHABLE"),
        (PullFailure::Incompatible("x".into()), "4: refused REFUSE_REASON_INCOMPATIBLE"),
        (PullFailure::Transfer("x".into()), "4: failed FAIL_REASON_TRANSFER"),
        (PullFailure::Corrupt("x".into()), "4: failed FAIL_REASON_CORRUPT"),
        (PullFailure::Lost("x".into()), "4: failed FAIL_REASON_LEASE_LOST"),
        (PullFailure::Superseded, "4: failed FAIL_REASON_SUPERSEDED"),
    ];
    for (failure, said) in cases {
        let mut p = Worker::new("p");
        p.core.start(p.session, start(1, 1, v1::Until::FirstToken), p.now);
        p.core.plan(p.now).expect("a prompt");
        let handle = p.handle();
        let mut d = Worker::new("d");
        d.core.start(d.session, with_handle(start(4, 2, v1::Until::End), &handle), d.now);
        let order = d.pull();
        d.core.pull_failed(order.sequence, failure, d.now);
        assert_eq!(d.said(), [said]);
        d.assert_idle();
    }
}

#[test]
fn losing_the_session_cancels_its_legs_and_ends_its_leases() {
    let mut w = Worker::new("w");
    w.core.start(w.session, start(1, 1, v1::Until::FirstToken), w.now);
    let plan = w.core.plan(w.now).expect("a prompt");
    w.core.collected(outcome(&plan, 7), &[], w.now);
    w.core.take_output();
    assert_eq!(w.core.load().leases, 1);
    w.core.close_session(w.session, w.now);
    assert!(w.said().is_empty(), "nobody is there to hear it");
    w.assert_idle();
}

#[test]
fn a_new_session_of_the_same_router_ends_its_predecessor() {
    let mut w = Worker::new("w");
    w.start(start(1, 1, v1::Until::End));
    w.core.open_session("router-0", 1, w.now);
    assert_eq!(w.said(), ["close session"]);
    w.assert_idle();
    w.core.open_session("router-0", 2, w.now);
    assert!(w.said().is_empty(), "another start of the router is another router");
}

#[test]
fn a_newer_attempt_supersedes_and_an_older_one_is_refused() {
    let mut w = Worker::new("w");
    w.start(start(1, 2, v1::Until::End));
    assert_eq!(w.start(start(2, 1, v1::Until::End)), ["2: refused REFUSE_REASON_INVALID"]);
    assert_eq!(w.start(start(3, 3, v1::Until::End)), ["1: failed FAIL_REASON_SUPERSEDED"]);
    for token in [7, 8, 9] {
        w.step(token);
    }
    w.assert_idle();
}

#[test]
fn an_overdue_leg_fails_and_an_unwanted_lease_expires() {
    let mut w = Worker::new("w");
    w.start(v1::Start { remaining_ms: 500, ..start(1, 1, v1::Until::End) });
    assert_eq!(w.core.next_deadline(), Some(Time::from_millis(500)));
    w.now = Time::from_millis(500);
    assert_eq!(w.step(7), ["1: failed FAIL_REASON_DEADLINE"]);
    w.core.start(w.session, start(2, 2, v1::Until::FirstToken), w.now);
    let plan = w.core.plan(w.now).expect("a prompt");
    let handle = w.handle();
    w.core.collected(outcome(&plan, 7), &[], w.now);
    w.said();
    w.now = Time::from_millis(9_000);
    w.core.renew([handle.lease, LeaseId(1000)].into_iter(), w.now);
    w.now = Time::from_millis(18_900);
    assert!(w.step(0).is_empty());
    w.now = Time::from_millis(19_000);
    assert_eq!(w.step(0), ["2: failed FAIL_REASON_LEASE_LOST"]);
    w.assert_idle();
}

#[test]
fn what_cannot_begin_is_refused_in_a_word_and_holds_nothing() {
    let change = |change: &dyn Fn(&mut v1::Start)| {
        let mut start = start(1, 1, v1::Until::End);
        change(&mut start);
        let mut w = Worker::new("w");
        let said = w.start(start);
        w.assert_idle();
        said.join("; ")
    };
    assert_eq!(change(&|s| s.worker_incarnation = 1), "1: refused REFUSE_REASON_STALE_TARGET");
    assert_eq!(change(&|s| s.epoch = 1), "1: refused REFUSE_REASON_STALE_TARGET");
    assert_eq!(change(&|s| s.until = v1::Until::Hidden as i32), "1: refused REFUSE_REASON_UNSUPPORTED");
    assert_eq!(change(&|s| s.adapter = "x".into()), "1: refused REFUSE_REASON_UNSUPPORTED");
    assert_eq!(change(&|s| s.until = 9), "1: refused REFUSE_REASON_INVALID");
    assert_eq!(change(&|s| s.request = vec![1].into()), "1: refused REFUSE_REASON_INVALID");
    assert_eq!(change(&|s| s.prompt_tokens = 0), "1: refused REFUSE_REASON_INVALID");
    assert_eq!(change(&|s| s.prompt_tokens = 41), "1: refused REFUSE_REASON_INVALID");
    assert_eq!(change(&|s| s.sampling = None), "1: refused REFUSE_REASON_INVALID");
    assert_eq!(
        change(&|s| (s.tokens, s.prompt_tokens) = (vec![1; 1000], 1000)),
        "1: refused REFUSE_REASON_CONTEXT_LENGTH"
    );
    let handle = v1::Handle { kind: v1::HandleKind::Prefix as i32, ..v1::Handle::default() };
    assert_eq!(change(&|s| s.inputs = vec![handle.clone()]), "1: refused REFUSE_REASON_UNSUPPORTED");

    let mut w = Worker::new("w");
    w.core.drain();
    assert_eq!(w.start(start(1, 1, v1::Until::End)), ["1: refused REFUSE_REASON_DRAINING"]);
    let mut w = Worker::new("w");
    for leg in 1..=4 {
        w.start(v1::Start { request: convert::id128(u128::from(leg)), ..start(leg, 1, v1::Until::End) });
    }
    assert_eq!(
        w.start(v1::Start { request: convert::id128(9), ..start(5, 1, v1::Until::End) }),
        ["5: refused REFUSE_REASON_OVERLOADED"]
    );
}

#[test]
fn a_role_change_stales_routes_but_not_running_work() {
    let mut w = Worker::new("w");
    w.start(start(1, 1, v1::Until::End));
    w.core.change_role(Role::Decode);
    assert_eq!(w.step(7), ["1: delta 0=[7]"]);
    let other = v1::Start { request: convert::id128(6), ..start(2, 1, v1::Until::End) };
    assert_eq!(w.start(other.clone()), ["2: refused REFUSE_REASON_STALE_TARGET"]);
    assert!(w.start(v1::Start { epoch: 1, ..other }).is_empty());
}

#[test]
fn a_failed_step_fails_its_legs_only() {
    let mut w = Worker::new("w");
    w.start(start(1, 1, v1::Until::End));
    let plan = w.core.plan(w.now).expect("a prompt");
    w.start(v1::Start { request: convert::id128(6), ..start(2, 1, v1::Until::End) });
    w.core.step_failed(plan.id, w.now);
    assert_eq!(w.said(), ["1: failed FAIL_REASON_ENGINE"]);
    assert_eq!(w.step(7), ["2: delta 0=[7]"]);
}

#[test]
fn a_hand_off_without_room_is_sent_back_when_nothing_here_will_make_any() {
    let mut p = Worker::new("p");
    p.core.start(p.session, start(1, 1, v1::Until::FirstToken), p.now);
    p.core.plan(p.now).expect("a prompt");
    let handle = p.handle();
    let mut d = Worker::new("d");
    // A lease on 31 of 32 blocks: it would be the only one.
    d.start(prompt(2, 31, v1::Until::FirstToken));
    d.step(7);
    d.step(7);
    assert!(d.start(with_handle(start(4, 2, v1::Until::End), &handle)).is_empty(), "it waits");
    assert_eq!(d.core.next_deadline(), Some(Time::from_millis(1_000)));
    d.now = Time::from_millis(999);
    assert!(d.step(0).is_empty());
    d.now = Time::from_millis(1_000);
    assert_eq!(d.step(0), ["4: refused REFUSE_REASON_OVERLOADED"]);
    d.core.cancel(d.session, 2, d.now);
    d.assert_idle();
}

#[test]
fn two_workers_that_hold_leases_for_each_other_both_go_on_with_their_own() {
    // Each has computed a prompt of three quarters of its pool, and each is to take the other's over.
    let mut workers = [Worker::new("a"), Worker::new("b")];
    let handles: Vec<Handle> = (1u32..)
        .zip(&mut workers)
        .map(|(leg, w)| {
            w.core.start(w.session, prompt(leg, 24, v1::Until::FirstToken), w.now);
            let mut handle = None;
            while handle.is_none() || w.core.load().waiting_tokens > 0 {
                let plan = w.core.plan(w.now).expect("a prompt to compute");
                handle.get_or_insert_with(|| w.handle());
                w.core.collected(outcome(&plan, 7), &[], w.now);
            }
            w.said();
            handle.expect("granted with the first plan")
        })
        .collect();
    let take = |leg: u32, handle: &Handle| {
        let end = v1::Start { leg: leg + 10, attempt: leg + 1, ..prompt(leg, 24, v1::Until::End) };
        with_handle(end, handle)
    };
    let [a, b] = &mut workers;
    assert!(
        a.start(take(2, &handles[1])).is_empty() && b.start(take(1, &handles[0])).is_empty(),
        "both wait"
    );
    for w in [&mut *a, &mut *b] {
        w.now = Time::from_millis(1_000);
        assert!(w.step(0).concat().contains("refused REFUSE_REASON_OVERLOADED"));
    }
    // What their router does then: another worker, and the owner is one.
    assert_eq!(a.start(v1::Start { attempt: 9, ..take(1, &handles[0]) }), ["11: delta 0=[7]", "1: released"]);
    assert_eq!(b.start(v1::Start { attempt: 9, ..take(2, &handles[1]) }), ["12: delta 0=[7]", "2: released"]);
    for w in [a, b] {
        w.step(8);
        w.step(9);
        w.assert_idle();
    }
}

#[test]
fn a_hand_off_does_not_pass_an_older_prompt_that_waits_for_room() {
    let mut p = Worker::new("p");
    p.core.start(p.session, start(1, 1, v1::Until::FirstToken), p.now);
    p.core.plan(p.now).expect("a prompt");
    let handle = p.handle();
    let mut d = Worker::new("d");
    d.start(prompt(2, 20, v1::Until::End));
    while d.step(7).is_empty() {}
    d.now = Time::from_millis(10);
    d.start(prompt(3, 12, v1::Until::End));
    d.step(7);
    assert_eq!((d.core.load().running, d.core.load().waiting), (1, 1));
    // There is room for the hand-off, but the prompt of twelve blocks came first.
    d.now = Time::from_millis(20);
    assert_eq!(d.start(with_handle(start(4, 2, v1::Until::End), &handle)), [""; 0]);
    assert_eq!(d.step(7), ["2: delta 2=[7]", "2: finished FINISH_REASON_LENGTH", "2: released"]);
    let said = d.step(7);
    assert_eq!((said.concat().contains("pull"), d.core.load().running), (false, 1), "{said:?}");
    assert!(d.step(7).contains(&"pull".to_owned()));
}

/// A Start of leg `leg` for a prompt of whole blocks that no other leg's prompt begins like.
fn prompt(leg: u32, blocks: u32, until: v1::Until) -> v1::Start {
    v1::Start {
        request: convert::id128(u128::from(leg)),
        tokens: (0..blocks * 32).map(|token| token + leg * 1000).collect(),
        prompt_tokens: blocks * 32,
        ..start(leg, 1, until)
    }
}

/// A Start for a prompt of 200 tokens, to be scored from a position on.
fn scored(leg: u32, attempt: u32, from: u32) -> v1::Start {
    v1::Start {
        tokens: (0..200).collect(),
        prompt_tokens: 200,
        rows_wanted: v1::RowsWanted::PromptLogprobs as i32,
        score_from: from,
        score_top: 1,
        ..start(leg, attempt, v1::Until::FirstToken)
    }
}

#[test]
fn a_prompts_scores_come_in_small_events_before_its_first_token() {
    let mut w = Worker::new("w");
    assert!(w.start(scored(1, 1, 0)).is_empty());
    let said = w.step(7);
    assert_eq!(
        said,
        [
            "1: granted",
            "1: scored 1+64",
            "1: scored 65+64",
            "1: scored 129+64",
            "1: scored 193+7",
            "1: delta 0=[7]"
        ]
    );
    w.core.cancel(w.session, 1, w.now);
    w.said();
    // Placed again after positions up to 99 were scored: what stands before them may come from the cache.
    w.core.start(w.session, scored(2, 2, 100), w.now);
    let plan = w.core.plan(w.now).expect("a prompt");
    assert_eq!((plan.rows[0].start, plan.rows[0].count), (96, 104));
    w.core.collected(outcome(&plan, 7), &[], w.now);
    assert_eq!(w.said()[1..], ["2: scored 100+64", "2: scored 164+36", "2: delta 0=[7]"]);
    // From the first one on there is nothing that could be taken from there.
    w.core.cancel(w.session, 2, w.now);
    w.core.start(w.session, scored(3, 3, 1), w.now);
    assert_eq!(w.core.plan(w.now).expect("a prompt").rows[0].start, 0);
}

#[test]
fn scores_say_the_log_probability_of_each_token_and_its_alternatives() {
    let mut w = Worker::new("w");
    w.core.start(w.session, scored(1, 1, 1), w.now);
    let plan = w.core.plan(w.now).expect("a prompt");
    w.core.collected(outcome(&plan, 7), &[], w.now);
    let output = w.core.take_output();
    let first = output.iter().find_map(|output| match output {
        Output::Event { event: Event::Scored(scored), .. } => Some(scored.clone()),
        _ => None,
    });
    let first = first.expect("scores");
    let score = convert::sampled(2, Some(&first.logprobs[1]));
    assert_eq!(score, Sampled { token: 2, logprob: Some(-2.0), top: vec![(2, -0.5)] });
}

#[test]
fn what_is_to_be_scored_is_not_borrowed_and_not_taken_over() {
    let holder = v1::Holder { worker: "other".into(), incarnation: 1, lender: "other:1".into(), blocks: 6 };
    let mut w = Worker::new("w");
    assert_eq!(w.start(v1::Start { holders: vec![holder.clone()], ..scored(1, 1, 1) }), Vec::<String>::new());
    w.core.cancel(w.session, 1, w.now);
    w.said();
    let plain = v1::Start { rows_wanted: 0, ..scored(2, 2, 1) };
    assert_eq!(w.start(v1::Start { holders: vec![holder], ..plain }), ["pull"], "that is how others do it");

    let mut p = Worker::new("p");
    p.core.start(p.session, start(1, 1, v1::Until::FirstToken), p.now);
    p.core.plan(p.now).expect("a prompt");
    let taken =
        v1::Start { rows_wanted: v1::RowsWanted::PromptLogprobs as i32, ..start(4, 2, v1::Until::End) };
    let handle = p.handle();
    assert_eq!(w.start(with_handle(taken, &handle)), ["4: refused REFUSE_REASON_INVALID"]);
    for rows_wanted in [v1::RowsWanted::Last as i32, 77] {
        let other = v1::Start { rows_wanted, ..start(5, 1, v1::Until::End) };
        assert_eq!(w.start(other), ["5: refused REFUSE_REASON_UNSUPPORTED"]);
    }
}
