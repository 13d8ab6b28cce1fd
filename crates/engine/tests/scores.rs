//! Scores of prompts: what a plain computation makes of the full logits, with the bits of a draw, however the prompt
//! is cut and whoever else is in the batch.

mod support;

use proptest::prelude::*;
use support::{Driver, Reference, Request, checkpoint, checkpoints, open_slot, row};
use tandem_batching::{Input, Plan, Row, Score};
use tandem_engine::{Dtype, Engine};
use tandem_types::{Sampled, SamplingParams, TokenId};

const MODEL: &str = "qwen3";

fn prompt(seed: u32, length: usize) -> Vec<TokenId> {
    (0..length as u32).map(|at| (at * at * 7 + at * 31 + seed * 101) % 380).collect()
}

/// A row that computes `count` positions of a prompt from `start` on and scores what follows them, from `from` on.
fn scored_row(
    slot: u32,
    prompt: &[TokenId],
    start: usize,
    count: usize,
    pages: &[u32],
    from: usize,
    top: u32,
) -> Row {
    let first = from.max(start + 1);
    let targets = prompt.get(first..prompt.len().min(start + count + 1)).unwrap_or_default().to_vec();
    let score = (!targets.is_empty()).then_some(Score { first: first as u32, targets, top });
    let tokens = prompt[start..start + count].to_vec();
    Row { score, ..row(slot, start, Input::Known(tokens), count, pages, start + count == prompt.len()) }
}

/// Scores prompts together, each step taking up to `chunk` tokens of each.
fn score(driver: &mut Driver, prompts: &[Vec<TokenId>], chunk: usize, top: u32) -> Vec<Vec<Sampled>> {
    let pages: Vec<Vec<u32>> = prompts.iter().map(|prompt| driver.pages(prompt.len() as u32)).collect();
    let mut open = prompts.iter().enumerate().map(|(slot, prompt)| open_slot(slot as u32, prompt)).collect();
    let mut scores = vec![Vec::new(); prompts.len()];
    let longest = prompts.iter().map(Vec::len).max().expect("there are prompts");
    for start in (0..longest).step_by(chunk) {
        let left = prompts.iter().zip(&pages).enumerate().filter(|(_, (prompt, _))| prompt.len() > start);
        let rows = left.map(|(slot, (prompt, pages))| {
            let count = chunk.min(prompt.len() - start);
            scored_row(slot as u32, prompt, start, count, pages, 1, top)
        });
        let rows = rows.collect();
        let plan = driver.plan(std::mem::take(&mut open), Vec::new(), rows);
        for row in driver.step(plan).unwrap_or_else(|error| panic!("{error}")).rows {
            scores[row.slot as usize].extend(row.scored);
        }
    }
    let close = (0..prompts.len() as u32).collect();
    let plan = driver.plan(Vec::new(), close, Vec::new());
    driver.step(plan).unwrap();
    driver.give_back(pages.into_iter().flatten());
    scores
}

/// What the logits of all positions say of the prompt's tokens from the second on.
fn plainly(logits: &[Vec<f32>], prompt: &[TokenId], top: usize) -> Vec<Sampled> {
    let scored = logits.iter().zip(&prompt[1..]).map(|(logits, &token)| {
        let highest = logits.iter().copied().fold(f32::MIN, f32::max);
        let sum: f64 = logits.iter().map(|logit| f64::from(logit - highest).exp()).sum();
        let logprob = |token: TokenId| (f64::from(logits[token as usize] - highest) - sum.ln()) as f32;
        let mut order: Vec<TokenId> = (0..logits.len() as TokenId).collect();
        order.sort_by(|a, b| logits[*b as usize].total_cmp(&logits[*a as usize]).then(a.cmp(b)));
        let top = order.into_iter().take(top).map(|token| (token, logprob(token))).collect();
        Sampled { token, logprob: Some(logprob(token)), top }
    });
    scored.collect()
}

fn expect_close(scores: &[Sampled], expected: &[Sampled], how: &str) {
    assert_eq!(scores.len(), expected.len(), "{how}");
    for (at, (scored, expected)) in scores.iter().zip(expected).enumerate() {
        let pairs = |sampled: &Sampled| -> Vec<(TokenId, f32)> {
            let own = (sampled.token, sampled.logprob.expect("it was asked for"));
            std::iter::once(own).chain(sampled.top.iter().copied()).collect()
        };
        for ((token, logprob), (wanted, truth)) in pairs(scored).into_iter().zip(pairs(expected)) {
            assert_eq!(token, wanted, "{how}, position {}", at + 1);
            assert!((logprob - truth).abs() < 1e-5, "{how}, position {}: {logprob} for {truth}", at + 1);
        }
        assert_eq!(scored.top.len(), expected.top.len());
    }
}

#[test]
fn scores_are_those_of_the_full_logits_in_every_model() {
    for dir in checkpoints() {
        let mut driver = Driver::new(&dir, Dtype::Auto, 2);
        for case in &Reference::read(&dir).cases {
            let logits = driver.logits(&case.prompt, 512);
            let expected = plainly(&logits, &case.prompt, 5);
            let scores = score(&mut driver, std::slice::from_ref(&case.prompt), 512, 5);
            expect_close(&scores[0], &expected, &format!("{} {}", dir.display(), case.name));
        }
    }
}

#[test]
fn a_score_has_the_bits_that_drawing_the_token_has() {
    for dtype in [Dtype::Float32, Dtype::Bfloat16] {
        let mut driver = Driver::new(&checkpoint("qwen3-s27"), dtype, 2);
        let sampling = SamplingParams {
            temperature: 1.0,
            seed: 7,
            logprobs: Some(20),
            frequency_penalty: 0.5,
            logit_bias: vec![(9, 2.0)],
            ..SamplingParams::default()
        };
        let asked = prompt(3, 45);
        let drawn = driver.generate(&[Request::greedy(&asked, 60).with(sampling)], 512).remove(0);
        let whole: Vec<TokenId> =
            asked.iter().copied().chain(drawn.iter().map(|drawn| drawn.token)).collect();
        let scores = score(&mut driver, &[whole], 50, 20).remove(0);
        assert_eq!(scores[asked.len() - 1..], drawn, "{dtype}");
    }
}

#[test]
fn positions_that_were_computed_before_are_not_scored_and_the_rest_keeps_its_bits() {
    let mut driver = Driver::new(&checkpoint(MODEL), Dtype::Float32, 1);
    let text = prompt(4, 90);
    let all = score(&mut driver, std::slice::from_ref(&text), 512, 2).remove(0);
    let pages = driver.pages(90);
    let first = row(0, 0, Input::Known(text[..64].to_vec()), 64, &pages, false);
    let plan = driver.plan(vec![open_slot(0, &text)], Vec::new(), vec![first]);
    assert_eq!(driver.step(plan).unwrap().rows[0].scored, vec![]);
    // From a position in the middle of the row on.
    let second = scored_row(0, &text, 64, 26, &pages, 70, 2);
    let plan = driver.plan(Vec::new(), Vec::new(), vec![second]);
    let outcome = driver.step(plan).unwrap();
    assert_eq!(outcome.rows[0].scored, all[69..]);
    assert!(outcome.rows[0].sampled.is_some(), "the token that follows the prompt is drawn");
}

#[test]
fn more_alternatives_than_there_are_tokens_or_than_a_step_reports_are_cut() {
    let mut driver = Driver::new(&checkpoint(MODEL), Dtype::Float32, 1);
    let many = score(&mut driver, &[prompt(1, 5)], 512, u32::MAX).remove(0);
    assert!(many.iter().all(|scored| scored.top.len() == 20));
    let none = score(&mut driver, &[prompt(1, 5)], 512, 0).remove(0);
    assert!(none.iter().all(|scored| scored.top.is_empty() && scored.logprob.is_some()));
}

#[test]
fn the_plain_device_scores_alike() {
    let dir = checkpoint(MODEL);
    let mut plain = Driver::on(tandem_kernels::open("plain", 1).unwrap(), &dir, Dtype::Float32);
    let mut cpu = Driver::new(&dir, Dtype::Float32, 2);
    // More targets than a block has rows.
    let prompts = [prompt(1, 70), prompt(2, 9)];
    for (plain, cpu) in score(&mut plain, &prompts, 50, 0).iter().zip(score(&mut cpu, &prompts, 512, 0)) {
        for (plain, cpu) in plain.iter().zip(&cpu) {
            assert!((plain.logprob.unwrap() - cpu.logprob.unwrap()).abs() < 1e-4);
        }
    }
}

#[test]
fn scores_of_logits_that_are_not_finite_are_missing_and_no_others() {
    let mut driver = Driver::new(&checkpoint(MODEL), Dtype::Float32, 1);
    let text = prompt(5, 80);
    let (good, bad) = (driver.pages(80), driver.pages(80));
    let rows = |start: usize, count: usize| {
        vec![scored_row(0, &text, start, count, &bad, 1, 1), scored_row(1, &text, start, count, &good, 1, 1)]
    };
    let plan = driver.plan(vec![open_slot(0, &text), open_slot(1, &text)], Vec::new(), rows(0, 32));
    let outcome = driver.step(plan).unwrap();
    assert_eq!(outcome.rows[0].scored.len(), 32);
    let offset = driver.engine.page_offset(0, bad[0]) as usize;
    let bytes = driver.engine.facts().form.page_bytes[0] as usize;
    let region = driver.engine.kv_region();
    // SAFETY: nothing is in flight, and nobody else knows the region.
    unsafe { region.slice_mut(offset, bytes) }.fill(0xff);
    let plan = driver.plan(Vec::new(), Vec::new(), rows(32, 48));
    let outcome = driver.step(plan).unwrap();
    assert_eq!(outcome.rows[0].scored, vec![]);
    assert_eq!(outcome.rows[1].scored.len(), 47);
    assert!(outcome.rows[1].scored.iter().all(|scored| scored.logprob.is_some_and(f32::is_finite)));
}

#[test]
fn a_score_that_cannot_be_is_refused_in_a_sentence() {
    let mut driver = Driver::new(&checkpoint(MODEL), Dtype::Float32, 1);
    let cases = [
        (1, vec![], "scores no token"),
        (0, vec![1], "scores tokens 0 to 0, which do not follow its own"),
        (1, vec![1; 3], "scores tokens 1 to 3, which do not follow its own"),
        (u32::MAX, vec![1, 1], "which do not follow its own"),
        (1, vec![384], "scores token 384 of a vocabulary of 384"),
    ];
    for (first, targets, fact) in cases {
        let score = Some(Score { first, targets, top: 0 });
        let row = Row { score, ..row(0, 0, Input::Known(vec![1, 2]), 2, &[0], true) };
        let plan = Plan { id: 1, open: vec![open_slot(0, &[1, 2])], rows: vec![row], ..Plan::default() };
        let error = driver.step(plan).unwrap_err();
        assert!(error.reason.contains(fact), "{error} should say: {fact}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 12, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn any_company_any_chunks_and_any_threads_leave_a_score_s_bits_alone(
        lengths in prop::collection::vec((2_usize..140, any::<u8>()), 1..5), chunk in 1_usize..80,
    ) {
        thread_local! {
            static DRIVERS: std::cell::RefCell<(Driver, Driver)> = std::cell::RefCell::new((
                Driver::new(&checkpoint("qwen2-s18"), Dtype::Bfloat16, 1),
                Driver::new(&checkpoint("qwen2-s18"), Dtype::Bfloat16, 3),
            ));
        }
        let prompts: Vec<_> = lengths.iter().map(|(length, seed)| prompt(u32::from(*seed), *length)).collect();
        DRIVERS.with_borrow_mut(|(one, three)| {
            let alone: Vec<_> =
                prompts.iter().flat_map(|prompt| score(one, std::slice::from_ref(prompt), 512, 4)).collect();
            for (scores, prompt) in alone.iter().zip(&prompts) {
                assert_eq!(scores.len(), prompt.len() - 1);
            }
            assert_eq!(score(three, &prompts, chunk, 4), alone);
        });
    }
}
