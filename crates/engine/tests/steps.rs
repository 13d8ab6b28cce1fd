//! What a plan may and may not do: equal bits however it is cut, sampling and its state, bad plans, two steps in
//! flight, pages and their export.

mod support;

use proptest::prelude::*;
use support::{Driver, Request, checkpoint, instruction_sets, open_slot, options, row, tokens};
use tandem_batching::{Input, Plan};
use tandem_engine::{DecoderEngine, Dtype, Engine, LoadError, Options};
use tandem_types::{Choice, Sampled, SamplingParams, Time, TokenId};

const MODEL: &str = "qwen3";

fn prompt(seed: u32, length: usize) -> Vec<TokenId> {
    (0..length as u32).map(|at| (at * at * 7 + at * 31 + seed * 101) % 380).collect()
}

/// Everything on: cuts, penalties, bias, log probabilities.
fn seeded(seed: u64) -> SamplingParams {
    SamplingParams {
        temperature: 0.9,
        top_p: 0.95,
        top_k: 40,
        min_p: 0.01,
        presence_penalty: 0.3,
        frequency_penalty: 0.2,
        repetition_penalty: 1.1,
        logit_bias: vec![(5, 1.5), (7, -2.0)],
        seed,
        logprobs: Some(3),
    }
}

fn requests() -> Vec<Request> {
    let greedy = |seed, length| {
        let sampling = SamplingParams { logprobs: Some(0), ..SamplingParams::default() };
        Request::greedy(&prompt(seed, length), 12).with(sampling)
    };
    vec![
        greedy(1, 1),
        Request::greedy(&prompt(2, 33), 12).with(seeded(11)),
        greedy(3, 64),
        Request::greedy(&prompt(4, 200), 12).with(seeded(12)),
        greedy(5, 290),
    ]
}

#[test]
fn bits_do_not_depend_on_threads_chunks_or_company() {
    for (name, dtype) in [
        (MODEL, Dtype::Float32),
        (MODEL, Dtype::Bfloat16),
        ("llama-s19", Dtype::Bfloat16),
        ("qwen2-s23", Dtype::Float32),
    ] {
        let dir = checkpoint(name);
        for isa in instruction_sets() {
            let driver = |threads| Driver::of_set(isa, &dir, options(dtype, threads));
            let (mut one, mut three) = (driver(1), driver(3));
            let requests = requests();
            let alone: Vec<_> = requests
                .iter()
                .flat_map(|request| one.generate(std::slice::from_ref(request), 512))
                .collect();
            // `Sampled` holds log probabilities, so equality is that of bits.
            assert_eq!(one.generate(&requests, 512), alone, "{name} {dtype} {isa:?} together");
            for chunk in [1, 13, 32, 512] {
                let chunked = three.generate(&requests, chunk);
                assert_eq!(chunked, alone, "{name} {dtype} {isa:?} in chunks of {chunk}");
            }
        }
    }
}

#[test]
fn pages_hold_the_same_bytes_whatever_the_threads_and_chunks() {
    let dir = checkpoint(MODEL);
    let pages = |threads, chunk| {
        let mut driver = Driver::new(&dir, Dtype::Bfloat16, threads);
        driver.logits(&prompt(9, 150), chunk);
        let region = driver.engine.kv_region();
        // SAFETY: no step is in flight.
        unsafe { region.slice(0, region.len()) }.to_vec()
    };
    let whole = pages(1, 150);
    assert!(whole.iter().any(|byte| *byte != 0));
    assert!(whole == pages(3, 150) && whole == pages(3, 32) && whole == pages(1, 1));
}

#[test]
fn a_resumed_request_goes_on_as_if_nothing_had_happened() {
    let mut driver = Driver::new(&checkpoint(MODEL), Dtype::Bfloat16, 1);
    let request = Request::greedy(&prompt(4, 40), 20).with(seeded(3));
    let whole = driver.generate(std::slice::from_ref(&request), 512).remove(0);
    for cut in [1, 7, 19] {
        let resumed = Request { emitted: tokens(&whole[..cut]), new_tokens: 20 - cut, ..request.clone() };
        assert_eq!(driver.generate(&[resumed], 16).remove(0), whole[cut..], "cut at {cut}");
    }
}

#[test]
fn draws_differ_by_seed_and_choice_and_repeat_otherwise() {
    let mut driver = Driver::new(&checkpoint(MODEL), Dtype::Float32, 1);
    let hot = |seed, choice| Request {
        choice: Choice(choice),
        ..Request::greedy(&prompt(4, 20), 24).with(SamplingParams {
            temperature: 1.5,
            seed,
            ..SamplingParams::default()
        })
    };
    let mut draw = |request: Request| tokens(&driver.generate(&[request], 512)[0]);
    let first = draw(hot(1, 0));
    assert_eq!(first, draw(hot(1, 0)));
    assert_ne!(first, draw(hot(2, 0)));
    assert_ne!(first, draw(hot(1, 1)));
}

#[test]
fn a_large_presence_penalty_forbids_repeating_output_but_not_the_prompt() {
    let mut driver = Driver::new(&checkpoint(MODEL), Dtype::Float32, 1);
    let all: Vec<TokenId> = (0..384).collect();
    let sampling = SamplingParams { presence_penalty: 1e4, ..SamplingParams::default() };
    let output = tokens(&driver.generate(&[Request::greedy(&all, 60).with(sampling)], 512)[0]);
    let mut distinct = output.clone();
    distinct.sort_unstable();
    distinct.dedup();
    assert_eq!(distinct.len(), 60, "{output:?}");
    // Without it this model repeats itself at once.
    let plain = tokens(&driver.generate(&[Request::greedy(&all, 60)], 512)[0]);
    assert!(plain.iter().any(|token| plain.iter().filter(|other| *other == token).count() > 1));
    assert_eq!(plain[0], output[0], "the prompt is not penalised");
}

#[test]
fn stop_tokens_are_not_drawn_before_min_tokens_and_may_be_from_then_on() {
    let mut driver = Driver::new(&checkpoint(MODEL), Dtype::Float32, 1);
    let plain = Request::greedy(&prompt(6, 30), 10);
    let favourite = driver.generate(std::slice::from_ref(&plain), 512)[0][0].token;
    // A bias makes it the best token everywhere, so that only the mask can keep it away.
    let sampling = SamplingParams { logit_bias: vec![(favourite, 100.0)], ..SamplingParams::default() };
    let request = Request { min_tokens: 4, stop_suppress: vec![favourite, 9999], ..plain.with(sampling) };
    let output = tokens(&driver.generate(&[request], 512)[0]);
    assert!(output[..4].iter().all(|token| *token != favourite), "{output:?}");
    assert!(output[4..].iter().all(|token| *token == favourite), "{output:?}");
}

#[test]
fn log_probabilities_are_those_of_the_raw_logits() {
    let mut driver = Driver::new(&checkpoint(MODEL), Dtype::Float32, 1);
    let prompt = prompt(7, 50);
    let logits = driver.logits(&prompt, 512).pop().unwrap();
    let highest = logits.iter().copied().fold(f32::MIN, f32::max);
    let sum: f64 = logits.iter().map(|logit| f64::from(logit - highest).exp()).sum();
    let truth = |token: TokenId| f64::from(logits[token as usize] - highest) - sum.ln();
    let biased = SamplingParams {
        logit_bias: vec![(17, 100.0)],
        temperature: 0.5,
        repetition_penalty: 1.3,
        logprobs: Some(20),
        ..SamplingParams::default()
    };
    let sampled = driver.generate(&[Request::greedy(&prompt, 1).with(biased)], 512)[0][0].clone();
    assert_eq!((sampled.token, sampled.top.len()), (17, 20));
    assert!((f64::from(sampled.logprob.unwrap()) - truth(17)).abs() < 1e-5);
    for (token, logprob) in &sampled.top {
        assert!((f64::from(*logprob) - truth(*token)).abs() < 1e-5);
    }
    assert!(sampled.top.windows(2).all(|pair| pair[0].1 >= pair[1].1));
    assert_eq!(logits[sampled.top[0].0 as usize], highest);
}

#[test]
fn nothing_that_was_not_asked_for_is_reported() {
    let mut driver = Driver::new(&checkpoint(MODEL), Dtype::Float32, 1);
    let mut one = |logprobs| {
        let sampling = SamplingParams { logprobs, ..SamplingParams::default() };
        driver.generate(&[Request::greedy(&[1, 2, 3], 1).with(sampling)], 512)[0][0].clone()
    };
    let Sampled { token, .. } = one(None);
    assert_eq!(one(None), Sampled { token, logprob: None, top: Vec::new() });
    let chosen = one(Some(0));
    assert!(chosen.logprob.is_some() && chosen.top.is_empty());
    let two = one(Some(2));
    assert_eq!((two.top.len(), two.top[0].0, two.top[0].1), (2, token, two.logprob.unwrap()));
}

#[test]
fn logits_that_are_not_finite_end_their_row_and_no_other() {
    let mut driver = Driver::new(&checkpoint(MODEL), Dtype::Float32, 1);
    let expected = tokens(&driver.generate(&[Request::greedy(&[4, 5, 6], 1)], 512)[0]);
    for bad in [f32::NAN, f32::INFINITY] {
        let pages = driver.pages(64);
        let mut poisoned = open_slot(0, &[4, 5, 6]);
        poisoned.sampling.logit_bias = vec![(8, bad)];
        let rows = (0..2)
            .map(|slot| row(slot, 0, Input::Known(vec![4, 5, 6]), 3, &pages[slot as usize..][..1], true));
        let plan = Plan {
            id: 77,
            open: vec![poisoned, open_slot(1, &[4, 5, 6])],
            rows: rows.collect(),
            ..Plan::default()
        };
        let outcome = driver.step(plan).unwrap();
        assert_eq!(outcome.rows[0].sampled, None);
        assert_eq!(outcome.rows[1].sampled.as_ref().unwrap().token, expected[0]);
    }
}

#[test]
fn a_plan_that_cannot_be_is_refused_in_a_sentence_and_the_engine_goes_on() {
    let mut driver = Driver::new(&checkpoint(MODEL), Dtype::Float32, 1);
    let known = |tokens: &[TokenId]| Input::Known(tokens.to_vec());
    let pages = driver.engine.facts().pages;
    let good = || Plan {
        id: 1,
        open: vec![open_slot(0, &[1, 2])],
        rows: vec![row(0, 0, known(&[1, 2]), 2, &[0], true)],
        ..Plan::default()
    };
    type Break = Box<dyn Fn(&mut Plan)>;
    let broken: Vec<(&str, Break)> = vec![
        ("slot 0 has token 384 of a vocabulary of 384", Box::new(|plan| plan.open[0].tokens = vec![384])),
        ("slot 0 has a prompt of 3 in 2 tokens", Box::new(|plan| plan.open[0].prompt_tokens = 3)),
        ("the row of slot 5 is of a slot that is not open", Box::new(|plan| plan.rows[0].slot = 5)),
        ("slot 0 has two rows", Box::new(|plan| plan.rows.push(plan.rows[0].clone()))),
        (
            "computes no token",
            Box::new(move |plan| plan.rows[0] = row(0, 0, Input::Known(vec![]), 0, &[0], true)),
        ),
        (
            "has 3 tokens for 2 positions",
            Box::new(move |plan| plan.rows[0].input = Input::Known(vec![1, 2, 3])),
        ),
        (
            "has token 400 of a vocabulary",
            Box::new(move |plan| plan.rows[0].input = Input::Known(vec![1, 400])),
        ),
        ("ends beyond 2048 tokens of context", Box::new(|plan| plan.rows[0].start = 2047)),
        ("ends beyond 2048 tokens of context", Box::new(|plan| plan.rows[0].start = u32::MAX)),
        ("has one previous token for more positions", Box::new(|plan| plan.rows[0].input = Input::Previous)),
        (
            "goes on from a token that its slot never drew",
            Box::new(|plan| plan.rows[0] = row(0, 0, Input::Previous, 1, &[0], true)),
        ),
        (
            "draws a token inside the prompt",
            Box::new(move |plan| plan.rows[0] = row(0, 0, Input::Known(vec![1]), 1, &[0], true)),
        ),
        ("has pages of 0 groups; the model has 1", Box::new(|plan| plan.rows[0].pages.clear())),
        ("has 0 pages for 2 tokens", Box::new(|plan| plan.rows[0].pages[0].clear())),
        ("names page 99999", Box::new(|plan| plan.rows[0].pages[0] = vec![99999])),
    ];
    assert!(pages < 99999);
    for (fact, break_it) in broken {
        let mut plan = good();
        break_it(&mut plan);
        let error = driver.step(plan).unwrap_err();
        assert!(error.plan == 1 && error.reason.contains(fact), "{error} should say: {fact}");
    }
    assert!(driver.step(good()).unwrap().rows[0].sampled.is_some());
    let closing = Plan { close: vec![0], open: vec![], ..good() };
    let error = driver.step(closing).unwrap_err();
    assert!(error.reason.contains("is of a slot that the plan closes"), "{error}");
}

#[test]
fn a_closed_slot_opens_again_for_another_sequence() {
    let mut driver = Driver::new(&checkpoint(MODEL), Dtype::Float32, 1);
    let first = tokens(&driver.generate(&[Request::greedy(&prompt(1, 10), 4).with(seeded(1))], 512)[0]);
    let other = tokens(&driver.generate(&[Request::greedy(&prompt(2, 10), 4).with(seeded(2))], 512)[0]);
    assert_eq!(
        tokens(&driver.generate(&[Request::greedy(&prompt(1, 10), 4).with(seeded(1))], 512)[0]),
        first
    );
    assert_ne!(first, other);
    // More slots than the tables begin with, and one far away.
    let many: Vec<Request> = (0..40).map(|_| Request::greedy(&prompt(1, 10), 4).with(seeded(1))).collect();
    assert!(driver.generate(&many, 512).iter().all(|output| tokens(output) == first));
}

#[test]
fn two_steps_in_flight_give_what_one_at_a_time_gives() {
    let dir = checkpoint(MODEL);
    let expected =
        tokens(&Driver::new(&dir, Dtype::Float32, 1).generate(&[Request::greedy(&prompt(3, 20), 8)], 512)[0]);
    let mut engine = DecoderEngine::load(&dir, Options { depth: 1, ..options(Dtype::Float32, 1) }).unwrap();
    assert_eq!(engine.facts().depth, 1);
    let mut open = vec![open_slot(0, &prompt(3, 20))];
    let mut plan = |id: u64| {
        let (start, input, count) = match id {
            0 => (0, Input::Known(prompt(3, 20)), 20),
            later => (19 + later as usize, Input::Previous, 1),
        };
        Plan {
            id,
            open: std::mem::take(&mut open),
            rows: vec![row(0, start, input, count, &[3], true)],
            ..Plan::default()
        }
    };
    // The plan for a token is submitted before the host knows the token that goes in.
    engine.submit(plan(0), Time::ZERO);
    let mut drawn = Vec::new();
    for id in 1..8 {
        engine.submit(plan(id), Time::from_millis(10 * id));
        assert_eq!(engine.in_flight(), 2);
        let outcome = engine.collect(Time::from_millis(10 * id)).unwrap().unwrap();
        assert_eq!(outcome.id, id - 1);
        drawn.push(outcome.rows[0].sampled.clone().unwrap().token);
    }
    let outcome = engine.collect(Time::from_millis(75)).unwrap().unwrap();
    assert_eq!(outcome.took.as_millis(), 5);
    drawn.push(outcome.rows[0].sampled.clone().unwrap().token);
    assert_eq!(drawn, expected);
    assert!(engine.collect(Time::ZERO).is_none());
}

#[test]
#[should_panic(expected = "1 steps in flight at depth 0")]
fn more_steps_than_the_depth_allows_are_a_bug() {
    let mut engine = DecoderEngine::load(&checkpoint(MODEL), options(Dtype::Float32, 1)).unwrap();
    engine.submit(Plan::default(), Time::ZERO);
    engine.submit(Plan::default(), Time::ZERO);
}

#[test]
fn pages_copied_to_another_worker_give_the_same_continuation() {
    let dir = checkpoint("llama-s13");
    let dtypes = [Dtype::Float32, Dtype::Bfloat16];
    for (isa, dtype) in instruction_sets().into_iter().flat_map(|isa| dtypes.map(|dtype| (isa, dtype))) {
        let prompt = prompt(8, 77);
        let mut prefill = Driver::of_set(isa, &dir, options(dtype, 1));
        let whole = prefill.generate(&[Request::greedy(&prompt, 10).with(seeded(5))], 512).remove(0);

        let from = [5, 2, 9];
        let row_of = |start: usize, tokens: &[TokenId], pages: &[u32]| {
            row(0, start, Input::Known(tokens.to_vec()), tokens.len(), pages, true)
        };
        let open = |known: &[TokenId]| {
            let mut open = open_slot(0, known);
            open.prompt_tokens = prompt.len() as u32;
            open.sampling = seeded(5);
            open
        };
        let plan =
            Plan { open: vec![open(&prompt)], rows: vec![row_of(0, &prompt, &from)], ..Plan::default() };
        let first = prefill.step(plan).unwrap().rows[0].sampled.clone().unwrap();
        assert_eq!(first, whole[0]);

        let mut decode = Driver::of_set(isa, &dir, options(dtype, 3));
        assert_eq!(prefill.engine.facts().identity, decode.engine.facts().identity);
        assert_eq!(prefill.engine.facts().form, decode.engine.facts().form);
        let to = [0, 8, 3];
        let bytes = prefill.engine.facts().form.page_bytes[0] as usize;
        let (source, target) = (prefill.engine.kv_region(), decode.engine.kv_region());
        for (from, to) in from.into_iter().zip(to) {
            let (from, to) = (prefill.engine.page_offset(0, from), decode.engine.page_offset(0, to));
            // SAFETY: no step is in flight in either engine.
            unsafe {
                target.slice_mut(to as usize, bytes).copy_from_slice(source.slice(from as usize, bytes))
            };
        }
        let mut known = prompt.clone();
        known.push(first.token);
        let mut opened = vec![open(&known)];
        for expected in &whole[1..] {
            let row = row_of(known.len() - 1, &known[known.len() - 1..], &to);
            let plan = Plan { open: std::mem::take(&mut opened), rows: vec![row], ..Plan::default() };
            let sampled = decode.step(plan).unwrap().rows[0].sampled.clone().unwrap();
            assert_eq!(sampled, *expected);
            known.push(sampled.token);
        }
    }
}

#[test]
fn the_tail_of_a_page_is_zeroed_in_every_layer_and_head_and_the_rest_kept() {
    let mut driver = Driver::new(&checkpoint(MODEL), Dtype::Bfloat16, 1);
    let tokens = prompt(3, 32);
    let plan = Plan {
        open: vec![open_slot(0, &tokens)],
        rows: vec![row(0, 0, Input::Known(tokens.clone()), 32, &[4], false)],
        ..Plan::default()
    };
    driver.step(plan).unwrap();
    let facts = driver.engine.facts().clone();
    let (bytes, spec) = (facts.form.page_bytes[0] as usize, facts.kv[0]);
    let read = |driver: &Driver| {
        let (region, offset) = (driver.engine.kv_region(), driver.engine.page_offset(0, 4));
        // SAFETY: no step is in flight.
        unsafe { region.slice(offset as usize, bytes) }.to_vec()
    };
    let before = read(&driver);
    driver.engine.zero_tail(0, 4, 20);
    let after = read(&driver);
    let row_bytes = spec.key_width * 2;
    assert_eq!(bytes / row_bytes, 3 * spec.heads * 2 * 32, "three layers");
    for (at, (before, after)) in before.chunks(row_bytes).zip(after.chunks(row_bytes)).enumerate() {
        match at % 32 < 20 {
            true => assert_eq!(before, after, "row {at} is kept"),
            false => assert!(after.iter().all(|byte| *byte == 0) && before != after, "row {at} is zeroed"),
        }
    }
}

#[test]
fn the_plain_device_decodes_the_same_tokens() {
    let dir = checkpoint(MODEL);
    let mut plain = Driver::on(tandem_kernels::open("plain", 1).unwrap(), &dir, Dtype::Float32);
    let mut cpu = Driver::new(&dir, Dtype::Float32, 1);
    let requests = [
        Request::greedy(&prompt(1, 40), 4),
        Request {
            min_tokens: 2,
            stop_suppress: vec![3],
            ..Request::greedy(&prompt(2, 5), 4).with(seeded(9))
        },
    ];
    let (plain, cpu) = (plain.generate(&requests, 16), cpu.generate(&requests, 512));
    for (plain, cpu) in plain.iter().zip(&cpu) {
        assert_eq!(tokens(plain), tokens(cpu));
    }
    assert!((plain[1][0].logprob.unwrap() - cpu[1][0].logprob.unwrap()).abs() < 1e-4);
}

#[test]
fn facts_say_what_the_checkpoint_and_the_options_make() {
    let load = |name: &str, options: Options| {
        DecoderEngine::load(&checkpoint(name), options).unwrap().facts().clone()
    };
    let kv_bytes = 1_000_000;
    let facts = load(MODEL, Options { dtype: Dtype::Bfloat16, kv_bytes, ..Options::default() });
    // Three layers of two kv heads of 32 elements, keys and values, two bytes each, 32 tokens.
    assert_eq!(facts.form.page_bytes, [3 * 2 * 32 * 2 * 2 * 32]);
    assert_eq!(u64::from(facts.pages), kv_bytes / facts.form.page_bytes[0]);
    assert_eq!((facts.model.as_str(), facts.vocab, facts.context_tokens), (MODEL, 384, 2048));
    assert_eq!(
        (facts.form.layout.as_str(), facts.form.element.as_str(), facts.form.shards),
        ("rows", "bf16", 1)
    );
    assert!(facts.kernel.starts_with("cpu-"));
    assert_eq!(facts.identity.numerics, format!("{}-3-bf16", facts.kernel));

    let float = load(MODEL, Options { dtype: Dtype::Float32, kv_bytes, ..Options::default() });
    assert_eq!(float.form.page_bytes[0], 2 * facts.form.page_bytes[0]);
    assert_ne!(float.identity.digest, facts.identity.digest);
    // The checkpoint's own type where nothing is asked for.
    assert_eq!(load(MODEL, Options { kv_bytes, ..Options::default() }).identity, facts.identity);
    assert_eq!(load("llama-s19-f32", Options { kv_bytes, ..Options::default() }).form.element, "f32");
    assert_eq!(load("llama-s19-f16", Options { kv_bytes, ..Options::default() }).form.element, "bf16");

    let threads = load(MODEL, Options { threads: 3, kv_bytes: 2 * kv_bytes, ..Options::default() });
    assert_eq!(threads.identity, facts.identity);
    let whole = load("llama-s19", Options { kv_bytes, ..Options::default() });
    assert_eq!(
        whole.identity,
        load("llama-s19-sharded", Options { kv_bytes, ..Options::default() }).identity
    );
    assert_ne!(whole.identity.digest, facts.identity.digest);
}

#[test]
fn what_cannot_be_loaded_is_refused_before_anything_runs() {
    let refuse = |dir: &std::path::Path, options: Options| match DecoderEngine::load(dir, options) {
        Ok(_) => panic!("{} loads", dir.display()),
        Err(error) => error,
    };
    let small = refuse(&checkpoint(MODEL), Options { kv_bytes: 1000, ..Options::default() });
    assert!(matches!(small, LoadError::KvMemory { given: 1000, needed: 24576, .. }), "{small}");
    let text = small.to_string();
    assert!(text.contains("1000 bytes") && text.contains("24576 bytes") && text.contains(MODEL), "{text}");
    let deep = refuse(&checkpoint(MODEL), Options { depth: 2, ..Options::default() });
    assert_eq!(deep.to_string(), "depth 2 is not supported; expected 0 or 1");
    let idle = refuse(&checkpoint(MODEL), Options { threads: 0, ..Options::default() });
    assert!(idle.to_string().contains("0 threads"), "{idle}");
    let missing = refuse(std::path::Path::new("/no/such/model"), Options::default());
    assert!(
        matches!(missing, LoadError::Checkpoint(_)) && missing.to_string().contains("/no/such/model"),
        "{missing}"
    );
}

#[test]
fn loading_reports_progress_up_to_the_whole() {
    let seen = std::sync::Arc::new(std::sync::Mutex::new(Vec::new()));
    let progress = {
        let seen = seen.clone();
        std::sync::Arc::new(move |share| seen.lock().unwrap().push(share))
    };
    tandem_engine::load(&checkpoint(MODEL), Options { progress, ..options(Dtype::Auto, 1) }).unwrap();
    let seen = seen.lock().unwrap();
    assert!(seen.windows(2).all(|pair| pair[0] < pair[1]) && seen.len() > 10);
    assert_eq!(seen.last(), Some(&1.0));
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 12, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn any_company_and_any_chunks_leave_a_sequence_s_bits_alone(
        lengths in prop::collection::vec((1_usize..140, any::<u8>()), 1..6), chunk in 1_usize..80,
    ) {
        thread_local! {
            static DRIVERS: std::cell::RefCell<(Driver, Driver)> = std::cell::RefCell::new((
                Driver::new(&checkpoint("qwen2-s18"), Dtype::Bfloat16, 1),
                Driver::new(&checkpoint("qwen2-s18"), Dtype::Bfloat16, 3),
            ));
        }
        let requests: Vec<Request> = lengths
            .iter()
            .map(|(length, seed)| {
                let sampling = if seed % 3 == 0 { SamplingParams::default() } else { seeded(u64::from(*seed)) };
                Request::greedy(&prompt(u32::from(*seed), *length), 1 + usize::from(*seed) % 5).with(sampling)
            })
            .collect();
        DRIVERS.with_borrow_mut(|(one, three)| {
            let alone: Vec<_> = requests
                .iter()
                .flat_map(|request| one.generate(std::slice::from_ref(request), 512))
                .collect();
            assert_eq!(three.generate(&requests, chunk), alone);
        });
    }
}

#[test]
fn each_quantisation_is_a_numerics_class_of_its_own_with_the_same_weights() {
    use tandem_engine::Quantization;
    let of = |name: &str, quantization| {
        let options = Options { quantization, ..options(Dtype::Bfloat16, 1) };
        DecoderEngine::load(&checkpoint(name), options).map(|engine| engine.facts().identity.clone())
    };
    let plain = of("qwen3", Quantization::Auto).unwrap();
    let int8 = of("qwen3", Quantization::W8a8).unwrap();
    let int4 = of("qwen3", Quantization::Int4).unwrap();
    assert_eq!((&plain.digest, &plain.digest), (&int8.digest, &int4.digest));
    assert_eq!(int8.numerics, format!("{}-int8-head8", plain.numerics));
    assert_eq!(int4.numerics, format!("{}-int4g64-head8", plain.numerics));
    for (name, suffix) in [("w8a8", "-int8"), ("gptq", "-int4g64"), ("awq", "-int4g64"), ("fp8", "")] {
        let name = format!("qwen3-{name}");
        assert_eq!(of(&name, Quantization::Auto).unwrap().numerics, format!("{}{suffix}", plain.numerics));
        let refusal = of(&name, Quantization::Int4).unwrap_err().to_string();
        assert!(refusal.contains("quantised already") && refusal.contains(&name), "{refusal}");
    }
}

#[test]
fn quantised_weights_give_the_same_bits_alone_in_batches_in_chunks_and_on_any_number_of_threads() {
    use tandem_engine::Quantization;
    for (name, quantization) in [
        ("qwen3", Quantization::W8a8),
        ("glm4", Quantization::Int4),
        ("qwen3-w8a8", Quantization::Auto),
        ("qwen3-awq", Quantization::Auto),
    ] {
        let dtypes = [Dtype::Float32, Dtype::Bfloat16];
        for (isa, dtype) in instruction_sets().into_iter().flat_map(|isa| dtypes.map(|dtype| (isa, dtype))) {
            let driver = |threads| {
                let options = Options { quantization, ..options(dtype, threads) };
                Driver::of_set(isa, &checkpoint(name), options)
            };
            let requests: Vec<Request> = [5, 70, 33, 150]
                .iter()
                .zip(0..)
                .map(|(length, seed)| {
                    Request::greedy(&prompt(seed, *length), 12).with(seeded(u64::from(seed)))
                })
                .collect();
            let (mut one, mut three) = (driver(1), driver(3));
            let together = three.generate(&requests, 512);
            assert_eq!(one.generate(&requests, 19), together, "{name} {dtype}");
            for (request, wanted) in requests.iter().zip(&together) {
                let alone = one.generate(std::slice::from_ref(request), 512);
                assert_eq!(alone[0], *wanted, "{name} {dtype}");
            }
        }
    }
}
