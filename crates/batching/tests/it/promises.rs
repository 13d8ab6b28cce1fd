//! What the batcher promises, one sentence each.

use tandem_batching::{Batcher, Config, Event, Input, Origin, Outcome, Plan, RowOutcome, SequenceId};
use tandem_types::{FinishReason, Sampled, StopRules, Time, Until, blocks_for};

use crate::harness::{Ask, End, Harness, prompt};
use crate::toy::{oracle, oracle_scores};

/// Start and count of each row.
fn shape(plan: &Option<Plan>) -> Vec<(u32, u32)> {
    plan.iter().flat_map(|plan| &plan.rows).map(|row| (row.start, row.count)).collect()
}

fn step(harness: &mut Harness) -> Vec<(u32, u32)> {
    let plan = harness.plan();
    harness.collect();
    shape(&plan)
}

fn finished(harness: &mut Harness) {
    harness.run();
    harness.check_end();
}

fn output(prompt: &[u32], max_tokens: u32) -> Vec<u32> {
    oracle(prompt, &StopRules { max_tokens, ..StopRules::default() }, u32::MAX)
}

#[test]
fn a_prompt_is_computed_in_chunks_behind_the_decodes_and_the_oldest_first() {
    let mut harness = Harness::of(40, 0, 50);
    harness.ask(Ask::new(&prompt(1, 10), 5));
    assert_eq!(step(&mut harness), [(0, 10)]);
    harness.ask(Ask::new(&prompt(2, 70), 5));
    harness.ask(Ask::new(&prompt(3, 20), 5));
    assert_eq!(step(&mut harness), [(10, 1), (0, 39)]);
    assert_eq!(step(&mut harness), [(11, 1), (39, 31), (0, 8)]);
    assert_eq!(step(&mut harness), [(12, 1), (70, 1), (8, 12)]);
    finished(&mut harness);
}

#[test]
fn a_step_has_no_more_rows_than_allowed() {
    let config = Config { rows_max: 2, ..Config::default() };
    let mut harness = Harness::new(config, 1, 50, true);
    for family in 0..5 {
        harness.ask(Ask::new(&prompt(family, 10), 3));
    }
    assert_eq!(step(&mut harness), [(0, 10), (0, 10)]);
    assert_eq!((harness.batcher.running(), harness.batcher.waiting()), (2, 3));
    assert_eq!(harness.batcher.waiting_tokens(), 27, "the last token of each is its decode");
    finished(&mut harness);
}

#[test]
fn a_known_prefix_is_not_computed_again_but_its_last_token_is() {
    let mut harness = Harness::of(512, 0, 50);
    let long = prompt(1, 96);
    harness.ask(Ask::new(&long, 2));
    harness.run();
    harness.ask(Ask::new(&long, 2));
    harness.ask(Ask::new(&long[..95], 2));
    harness.ask(Ask::new(&prompt(2, 96), 2));
    assert_eq!(step(&mut harness), [(64, 32), (64, 31), (0, 96)]);
    finished(&mut harness);
}

#[test]
fn rows_stand_in_one_order_whoever_was_admitted_when() {
    let mut harness = Harness::of(512, 0, 50);
    harness.ask(Ask::new(&prompt(1, 33), 1));
    harness.run();
    let older = harness.ask(Ask::new(&prompt(1, 33), 5));
    harness.pause(older, true);
    harness.ask(Ask::new(&prompt(2, 3), 5));
    assert_eq!(step(&mut harness), [(0, 3)]);
    harness.pause(older, false);
    assert_eq!(step(&mut harness), [(32, 1), (3, 1)], "the older one first, though it came later");
    finished(&mut harness);
}

#[test]
fn a_resumed_sequence_goes_on_at_its_position_and_counts_what_was_drawn_before() {
    let mut harness = Harness::of(512, 0, 50);
    let at = harness.ask(Ask::new(&prompt(1, 40), 30));
    for _ in 0..11 {
        step(&mut harness);
    }
    assert_eq!(harness.requests[at].output.len(), 11);
    // The harness adds it again, as after a fault.
    harness.plan();
    harness.fail();
    assert_eq!(step(&mut harness), [(32, 19)], "the first block was cached");
    finished(&mut harness);
    assert_eq!(harness.requests[at].output, output(&prompt(1, 40), 30));
}

#[test]
fn a_sequence_ends_by_its_stop_rules() {
    let text = prompt(1, 20);
    let free = output(&text, 40);
    let (nth, token) = (8, free[8]);
    let first = free.iter().position(|other| *other == token).expect("it is there");
    let run = |stop: StopRules| {
        let mut harness = Harness::of(512, 0, 50);
        let at = harness.ask(Ask { stop, ..Ask::new(&text, 0) });
        finished(&mut harness);
        (harness.requests[at].output.len(), harness.requests[at].end)
    };
    let rules = || StopRules { max_tokens: 40, ..StopRules::default() };
    let ended = |reason| Some(End::Finished(reason));
    assert_eq!(run(rules()), (40, ended(FinishReason::Length)));
    assert_eq!(run(StopRules { eos: vec![token], ..rules() }), (first + 1, ended(FinishReason::Eos)));
    let stopped = StopRules { stop_token_ids: vec![token], ..rules() };
    assert_eq!(run(stopped.clone()), (first + 1, ended(FinishReason::StopToken(token))));
    let late = StopRules { min_tokens: nth + 2, ..stopped };
    assert!(run(late).0 as u32 > nth + 1, "not before `min_tokens`");
}

#[test]
fn a_sequence_ends_where_the_context_ends() {
    let config = Config { context_tokens: 50, ..Config::default() };
    let mut harness = Harness::new(config, 1, 50, true);
    let at = harness.ask(Ask::new(&prompt(1, 45), 30));
    let full = harness.ask(Ask::new(&prompt(2, 50), 30));
    finished(&mut harness);
    assert_eq!(harness.requests[at].output, output(&prompt(1, 45), 5));
    assert_eq!(harness.requests[full].end, Some(End::Finished(FinishReason::Length)));
    assert!(harness.requests[full].output.is_empty());
}

#[test]
fn a_prefill_ends_with_its_first_token_at_every_depth() {
    for depth in [0, 1] {
        let mut harness = Harness::of(16, depth, 50);
        harness.ask(Ask { until: Until::FirstToken, ..Ask::new(&prompt(1, 40), 9) });
        let last = harness.ask(Ask { until: Until::FirstToken, ..Ask::new(&prompt(2, 40), 1) });
        harness.run();
        assert_eq!(
            harness.requests[last].end,
            Some(End::Finished(FinishReason::Length)),
            "nothing to hand off"
        );
        harness.check_end();
    }
}

#[test]
fn at_depth_one_the_next_step_is_planned_before_the_token_is_known() {
    let mut harness = Harness::of(512, 1, 50);
    harness.ask(Ask::new(&prompt(1, 10), 4));
    let first = harness.plan().expect("a prompt");
    let second = harness.plan().expect("its first decode");
    assert_eq!(first.rows[0].input, Input::Known(prompt(1, 10)));
    assert_eq!((second.rows[0].start, &second.rows[0].input), (10, &Input::Previous));
    assert_eq!(harness.plan(), None);
    harness.collect();
    assert_eq!(shape(&harness.plan()), [(11, 1)]);
    finished(&mut harness);
    assert_eq!(harness.steps, 4, "no step is wasted where the end is known beforehand");
}

#[test]
fn a_sequence_that_turns_out_to_have_ended_wastes_one_row_and_keeps_its_pages_that_long() {
    let text = prompt(1, 10);
    let eos = vec![output(&text, 1)[0]];
    let mut harness = Harness::of(512, 1, 50);
    let stop = StopRules { max_tokens: 9, eos, ..StopRules::default() };
    let at = harness.ask(Ask { stop, ..Ask::new(&text, 0) });
    harness.plan();
    let wasted = harness.plan().expect("nobody knows yet");
    harness.collect();
    assert_eq!(harness.requests[at].end, Some(End::Finished(FinishReason::Eos)));
    assert!(wasted.rows[0].pages[0].iter().all(|page| harness.engine.names(*page)));
    assert_ne!(harness.kv.counts().in_use, 0, "the step in flight still names them");
    // Its slot stays open meanwhile.
    harness.ask(Ask::new(&prompt(2, 10), 2));
    let next = harness.plan().expect("another sequence");
    assert!(next.close.is_empty() && next.rows[0].slot != wasted.rows[0].slot);
    harness.collect();
    let after = harness.plan().expect("its decode");
    assert_eq!(after.close, [wasted.rows[0].slot]);
    finished(&mut harness);
    assert_eq!(harness.requests[at].output.len(), 1, "the wasted row said nothing");
}

#[test]
fn a_cancel_frees_everything_at_once_but_what_a_step_in_flight_names() {
    let mut harness = Harness::of(512, 0, 50);
    let at = harness.ask(Ask::new(&prompt(1, 100), 9));
    step(&mut harness);
    harness.cancel(at);
    assert_eq!(harness.kv.counts().in_use, 0);
    let at = harness.ask(Ask::new(&prompt(2, 100), 9));
    harness.plan();
    harness.cancel(at);
    assert_eq!(harness.kv.counts().in_use, blocks_for(132));
    harness.collect();
    assert_eq!(harness.kv.counts().in_use, 0);
    harness.check_end();
}

#[test]
fn the_youngest_gives_way_and_is_right_in_the_end() {
    for depth in [0, 1] {
        let config = Config { depth, answer_tokens: 0, ..Config::default() };
        let mut harness = Harness::new(config, 1, 6, true);
        let asks: Vec<usize> = (0..3).map(|family| harness.ask(Ask::new(&prompt(family, 30), 90))).collect();
        finished(&mut harness);
        let preempted: Vec<u32> = asks.iter().map(|at| harness.requests[*at].preempted).collect();
        assert_eq!(preempted[0], 0, "the oldest never");
        assert!(preempted[2] > 0);
    }
}

#[test]
fn a_paused_sequence_gets_no_rows_and_gives_way_first() {
    let mut harness = Harness::new(Config { answer_tokens: 0, ..Config::default() }, 1, 4, true);
    let paused = harness.ask(Ask::new(&prompt(1, 30), 60));
    let other = harness.ask(Ask::new(&prompt(2, 30), 90));
    step(&mut harness);
    harness.pause(paused, true);
    assert_eq!(step(&mut harness), [(30, 1)]);
    while harness.requests[other].end.is_none() {
        step(&mut harness);
    }
    assert_eq!((harness.requests[paused].preempted, harness.requests[other].preempted), (1, 0));
    assert_eq!(step(&mut harness), [], "nor is it admitted");
    harness.pause(paused, false);
    finished(&mut harness);
}

#[test]
fn paused_sequences_do_not_keep_others_out() {
    let config = Config { rows_max: 1, ..Config::default() };
    let mut harness = Harness::new(config, 1, 3, true);
    let paused = harness.ask(Ask::new(&prompt(1, 40), 60));
    step(&mut harness);
    harness.pause(paused, true);
    let other = harness.ask(Ask::new(&prompt(2, 10), 3));
    harness.run();
    assert!(harness.requests[other].end.is_some());
    assert_eq!(harness.requests[paused].preempted, 1, "there was no room for both");
    harness.pause(paused, false);
    finished(&mut harness);
}

#[test]
fn a_granted_sequence_is_not_preempted_and_the_older_one_waits_for_it() {
    let mut harness = Harness::of(3, 0, 6);
    let older = harness.ask(Ask::new(&prompt(1, 30), 90));
    while step(&mut harness) != [(70, 1)] {}
    // Three of six blocks each; as many as may be granted.
    let granted = harness.ask(Ask { until: Until::FirstToken, ..Ask::new(&prompt(2, 96), 2) });
    let mut waited = false;
    while harness.requests[granted].output.is_empty() {
        waited |= step(&mut harness).len() == 1;
    }
    assert!(waited, "the older one would have grown");
    assert_eq!((harness.requests[granted].preempted, harness.requests[older].preempted), (0, 0));
    finished(&mut harness);
}

#[test]
fn alone_in_a_full_pool_a_sequence_ends_by_length() {
    for depth in [0, 1] {
        let mut harness = Harness::of(512, depth, 2);
        let at = harness.ask(Ask::new(&prompt(1, 60), 30));
        finished(&mut harness);
        assert_eq!(harness.requests[at].end, Some(End::Finished(FinishReason::Length)));
        assert_eq!(harness.requests[at].output.len(), 5, "64 tokens have KV, and the last needs none");
    }
}

#[test]
fn what_has_grown_beyond_the_pool_ends_by_length_even_if_it_was_taken_out() {
    let mut harness = Harness::of(512, 0, 2);
    let grown = harness.ask(Ask::new(&prompt(1, 60), 30));
    while harness.requests[grown].output.len() < 5 {
        step(&mut harness);
    }
    harness.pause(grown, true);
    let other = harness.ask(Ask::new(&prompt(2, 10), 3));
    harness.run();
    assert!(harness.requests[other].end.is_some());
    assert_eq!(harness.requests[grown].preempted, 1);
    harness.pause(grown, false);
    finished(&mut harness);
    assert_eq!(harness.requests[grown].end, Some(End::Finished(FinishReason::Length)));
}

#[test]
fn what_could_never_fit_is_rejected_and_keeps_nobody_waiting() {
    let mut harness = Harness::of(512, 0, 4);
    let large = harness.ask(Ask::new(&prompt(1, 129), 3));
    let small = harness.ask(Ask::new(&prompt(2, 128), 3));
    finished(&mut harness);
    assert_eq!(harness.requests[large].end, Some(End::Rejected));
    assert_eq!(harness.requests[small].end, Some(End::Finished(FinishReason::Length)));
}

#[test]
fn nobody_passes_an_older_one_that_waits_for_memory() {
    let mut harness = Harness::of(512, 0, 8);
    harness.ask(Ask::new(&prompt(1, 100), 20));
    step(&mut harness);
    harness.ask(Ask::new(&prompt(2, 150), 3));
    let small = harness.ask(Ask::new(&prompt(3, 5), 3));
    assert_eq!(step(&mut harness), [(100, 1)], "there is room for the small one, but not its turn");
    finished(&mut harness);
    assert_eq!(harness.requests[small].preempted, 0);
}

#[test]
fn room_goes_to_the_growth_of_who_is_there_before_it_goes_to_a_newcomer() {
    let mut harness = Harness::of(512, 0, 5);
    harness.ask(Ask::new(&prompt(1, 33), 80));
    while step(&mut harness) != [(95, 1)] {}
    // Two blocks are free, and the newcomer would take both.
    let newcomer = harness.ask(Ask::new(&prompt(2, 5), 3));
    assert_eq!(step(&mut harness), [(96, 1)]);
    finished(&mut harness);
    assert_eq!(harness.requests[newcomer].preempted, 0);
}

#[test]
fn nobody_is_admitted_into_the_room_that_running_answers_will_need() {
    let mut harness = Harness::of(512, 0, 8);
    let asks: Vec<usize> = (0..4).map(|family| harness.ask(Ask::new(&prompt(family, 30), 90))).collect();
    step(&mut harness);
    // Four blocks each in the end: two fit, though all four would have fitted at first.
    assert_eq!((harness.batcher.running(), harness.batcher.waiting()), (2, 2));
    assert_eq!(harness.batcher.starved(), Some(harness.requests[asks[2]].arrived));
    finished(&mut harness);
    assert!(asks.iter().all(|at| harness.requests[*at].preempted == 0));
}

#[test]
fn the_room_kept_for_answers_follows_how_long_they_are() {
    let mut harness = Harness::of(512, 0, 8);
    for family in 0..100 {
        harness.ask(Ask::new(&prompt(family, 3), 2));
        harness.run();
    }
    for family in 0..4 {
        harness.ask(Ask::new(&prompt(family, 30), 90));
    }
    step(&mut harness);
    assert_eq!(harness.batcher.running(), 4, "answers are short here");
    finished(&mut harness);
}

#[test]
fn who_waits_outside_is_not_passed_by_the_younger() {
    let mut harness = Harness::of(512, 0, 50);
    harness.ask(Ask::new(&prompt(1, 10), 9));
    step(&mut harness);
    harness.now = Time::from_millis(5);
    harness.ask(Ask::new(&prompt(2, 10), 3));
    harness.batcher.yield_to(Some(Time::from_millis(4)));
    assert_eq!(step(&mut harness), [(10, 1)]);
    harness.batcher.yield_to(Some(Time::from_millis(6)));
    assert_eq!(step(&mut harness), [(11, 1), (0, 10)]);
    finished(&mut harness);
}

#[test]
fn a_failed_step_fails_its_sequences_and_no_other() {
    for depth in [0, 1] {
        let mut harness = Harness::of(30, depth, 50);
        let first = harness.ask(Ask::new(&prompt(1, 30), 9));
        let second = harness.ask(Ask::new(&prompt(2, 30), 9));
        let ids = [harness.requests[first].id, harness.requests[second].id];
        assert_eq!(shape(&harness.plan()), [(0, 30)]);
        harness.plan();
        harness.fail();
        assert_ne!(harness.requests[first].id, ids[0], "added again");
        assert_eq!(harness.requests[second].id, ids[1]);
        finished(&mut harness);
    }
}

#[test]
fn a_row_without_the_token_it_should_have_drawn_fails_alone() {
    let mut harness = Harness::of(512, 0, 50);
    let mut batcher = Batcher::new(harness.config.clone());
    for id in [1, 2] {
        let at = harness.ask(Ask::new(&prompt(id, 40), 3));
        let spec = harness.spec(at, Until::End);
        batcher.add(tandem_batching::SequenceSpec { id: SequenceId(id), ..spec }, Origin::Fresh);
    }
    let kv = &mut harness.kv;
    let plan = batcher.plan(kv, harness.now).expect("two prompts");
    let row = |slot, sampled| RowOutcome { slot, count: 40, sampled, scored: Vec::new() };
    let rows = vec![row(plan.rows[0].slot, None), row(plan.rows[1].slot, Some(Default::default()))];
    batcher.apply(kv, Outcome { id: plan.id, rows, ..Outcome::default() }, harness.now);
    let events = batcher.take_events();
    assert!(events.contains(&Event::Failed { id: SequenceId(1) }));
    let drawn = events.iter().filter(|event| matches!(event, Event::Token { .. })).count();
    assert_eq!((drawn, batcher.running()), (1, 1));
    assert!(batcher.cancel(SequenceId(2), kv, harness.now));
    assert_eq!(kv.counts().in_use, 0);
}

#[test]
fn a_plan_says_for_how_many_steps_it_keeps_its_shape() {
    let mut harness = Harness::of(512, 0, 50);
    harness.ask(Ask::new(&prompt(1, 20), 30));
    let steps = |harness: &mut Harness| {
        let plan = harness.plan().expect("there is something to do");
        harness.collect();
        plan.same_shape_steps
    };
    assert_eq!(steps(&mut harness), 0, "a prompt");
    assert_eq!(steps(&mut harness), 11, "positions 21 to 31 are in the same block");
    harness.ask(Ask::new(&prompt(2, 40), 3));
    assert_eq!(steps(&mut harness), 0, "a prompt beside a decode");
    assert_eq!(steps(&mut harness), 1, "the second ends with its third token");
    finished(&mut harness);
}

#[test]
#[should_panic(expected = "used once")]
fn an_id_that_is_in_use_is_a_bug() {
    let mut harness = Harness::of(512, 0, 50);
    let at = harness.ask(Ask::new(&prompt(1, 5), 3));
    let id = harness.requests[at].id;
    let spec = harness.spec(at, Until::End);
    harness.batcher.add(tandem_batching::SequenceSpec { id, ..spec }, Origin::Fresh);
}

#[test]
#[should_panic(expected = "collected in order")]
fn an_outcome_of_another_plan_is_a_bug() {
    let mut harness = Harness::of(512, 0, 50);
    harness.ask(Ask::new(&prompt(1, 5), 3));
    harness.plan();
    harness.batcher.apply(&mut harness.kv, Outcome { id: 9, ..Outcome::default() }, harness.now);
}

/// First target and number of targets of each row that scores.
fn scores(plan: &Option<Plan>) -> Vec<(u32, usize)> {
    let rows = plan.iter().flat_map(|plan| &plan.rows);
    rows.filter_map(|row| row.score.as_ref()).map(|score| (score.first, score.targets.len())).collect()
}

#[test]
fn each_chunk_of_a_scored_prompt_scores_the_tokens_that_follow_its_own() {
    let mut harness = Harness::of(40, 0, 50);
    let at = harness.ask(Ask::scored(&prompt(1, 100), 3, 2));
    let mut seen = Vec::new();
    for _ in 0..4 {
        seen.push(scores(&harness.plan()));
        harness.collect();
    }
    // The first token follows nothing, and what follows the last is drawn.
    assert_eq!(seen, [vec![(1, 40)], vec![(41, 40)], vec![(81, 19)], vec![]]);
    finished(&mut harness);
    assert_eq!(harness.requests[at].scores, oracle_scores(&prompt(1, 100), 2));
    assert_eq!(harness.requests[at].output, output(&prompt(1, 100), 3));
}

#[test]
fn a_scored_prompt_takes_nothing_from_the_prefix_cache_and_leaves_its_blocks_there() {
    let mut harness = Harness::of(512, 0, 50);
    for ask in [Ask::new(&prompt(1, 100), 2), Ask::scored(&prompt(1, 100), 2, 0)] {
        harness.ask(ask);
        assert_eq!(step(&mut harness), [(0, 100)], "the cache is cold, or of no use");
        harness.run();
    }
    // A prompt that nobody has computed but to score it.
    harness.ask(Ask::scored(&prompt(2, 100), 2, 0));
    harness.run();
    harness.ask(Ask::new(&prompt(2, 100), 2));
    assert_eq!(step(&mut harness), [(96, 4)]);
    finished(&mut harness);
}

#[test]
fn what_was_scored_before_need_not_be_computed_again() {
    let text = prompt(1, 100);
    for (from, begins) in [(1, 0), (32, 0), (33, 32), (64, 32), (65, 64), (99, 96), (100, 96)] {
        let mut harness = Harness::of(512, 0, 50);
        harness.ask(Ask::new(&text, 2));
        harness.run();
        let at = harness.ask(Ask::scored(&text, 2, 1));
        harness.requests[at].scores = oracle_scores(&text, 1)[..from as usize - 1].to_vec();
        harness.cancel_and_add(at);
        let plan = harness.plan();
        assert_eq!(shape(&plan), [(begins, 100 - begins)], "from {from}");
        let wanted = (from < 100).then_some((from, 100 - from as usize));
        assert_eq!(scores(&plan), wanted.into_iter().collect::<Vec<_>>());
        harness.collect();
        finished(&mut harness);
        assert_eq!(harness.requests[at].scores, oracle_scores(&text, 1));
    }
}

#[test]
fn a_row_without_all_its_scores_fails_alone() {
    let mut harness = Harness::of(512, 0, 50);
    let first = harness.ask(Ask::scored(&prompt(1, 40), 3, 0));
    let second = harness.ask(Ask::scored(&prompt(2, 40), 3, 0));
    let plan = harness.plan().expect("two prompts");
    let row = |at: usize, scored: &[Sampled]| RowOutcome {
        slot: plan.rows[at].slot,
        count: 40,
        sampled: Some(Sampled::default()),
        scored: scored.to_vec(),
    };
    let good = oracle_scores(&prompt(2, 40), 0);
    let rows = vec![row(0, &oracle_scores(&prompt(1, 40), 0)[..38]), row(1, &good)];
    harness.batcher.apply(&mut harness.kv, Outcome { id: plan.id, rows, ..Outcome::default() }, harness.now);
    let events = harness.batcher.take_events();
    let ids = [harness.requests[first].id, harness.requests[second].id];
    assert!(events.contains(&Event::Failed { id: ids[0] }));
    assert!(events.contains(&Event::Scored { id: ids[1], position: 1, scores: good }));
    let drawn = events.iter().filter(|event| matches!(event, Event::Token { .. })).count();
    assert_eq!((drawn, harness.batcher.running()), (1, 1));
}
