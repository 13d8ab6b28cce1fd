use proptest::prelude::*;

use super::*;

fn row(slot: u32, start: u32, tokens: &[TokenId], pages: &[u32], sample: bool) -> Row {
    Row {
        slot,
        start,
        count: tokens.len() as u32,
        input: Input::Known(tokens.to_vec()),
        pages: vec![pages.to_vec()],
        sample,
        score: None,
    }
}

fn open(slot: u32, tokens: &[TokenId]) -> SlotOpen {
    SlotOpen {
        slot,
        tokens: tokens.to_vec(),
        prompt_tokens: tokens.len() as u32,
        sampling: SamplingParams::default(),
        choice: Choice(0),
        stop_suppress: Vec::new(),
        min_tokens: 0,
    }
}

fn engine(spec: &str) -> Fake {
    let options = Options { kv_bytes: 1 << 20, depth: 1, ..Options::default() };
    Fake::new(spec.parse().unwrap(), Ordinary::new(500, &[1, 2]), "m".into(), &options).unwrap()
}

fn step(engine: &mut Fake, plan: Plan) -> Outcome {
    engine.submit(plan, Time::ZERO);
    engine.collect(Time::ZERO).expect("zero takes no time").expect("it does not fail")
}

fn first_token(engine: &mut Fake, prompt: &[TokenId], chunks: &[usize], pages: &[u32]) -> TokenId {
    let (mut at, mut id, mut drawn) = (0, 1, None);
    for (i, &chunk) in chunks.iter().enumerate() {
        let last = i + 1 == chunks.len();
        let end = if last { prompt.len() } else { at + chunk };
        let plan = Plan {
            id,
            open: if i == 0 { vec![open(7, prompt)] } else { vec![] },
            rows: vec![row(7, at as u32, &prompt[at..end], pages, last)],
            ..Plan::default()
        };
        drawn = step(engine, plan).rows[0].sampled.clone();
        (at, id) = (end, id + 1);
    }
    drawn.expect("the last chunk draws").token
}

#[test]
fn what_it_draws_is_what_the_oracle_says_however_the_prompt_is_cut() {
    let prompt: Vec<TokenId> = (10..90).collect();
    let says = oracle(&Ordinary::new(500, &[1, 2]), &prompt, &SamplingParams::default(), Choice(0), 3);
    for chunks in [&[80][..], &[32, 48], &[1, 7, 72]] {
        let mut engine = engine("zero");
        assert_eq!(first_token(&mut engine, &prompt, chunks, &[5, 0, 9]), says[0]);
        // And on, by the device's own last token.
        for (i, expected) in says.iter().enumerate().skip(1) {
            let plan = Plan {
                id: 10 + i as u64,
                rows: vec![Row {
                    slot: 7,
                    start: 79 + i as u32,
                    count: 1,
                    input: Input::Previous,
                    pages: vec![vec![5, 0, 9]],
                    sample: true,
                    score: None,
                }],
                ..Plan::default()
            };
            assert_eq!(step(&mut engine, plan).rows[0].sampled.as_ref().unwrap().token, *expected);
        }
    }
}

#[test]
fn torn_swapped_or_stale_pages_change_the_output() {
    let prompt: Vec<TokenId> = (10..75).collect();
    let good = first_token(&mut engine("zero"), &prompt, &[65], &[0, 1, 2]);
    let after = |spoil: &dyn Fn(&Fake), pages: &[u32]| {
        let mut engine = engine("zero");
        first_token(&mut engine, &prompt, &[65], &[0, 1, 2]);
        spoil(&engine);
        let plan = Plan { id: 9, rows: vec![row(7, 64, &prompt[64..], pages, true)], ..Plan::default() };
        step(&mut engine, plan).rows[0].sampled.as_ref().unwrap().token
    };
    assert_eq!(after(&|_| {}, &[0, 1, 2]), good);
    assert_ne!(after(&|_| {}, &[1, 0, 2]), good, "swapped");
    assert_ne!(after(&|_| {}, &[0, 3, 2]), good, "never written");
    // SAFETY: the test owns the engine.
    let torn = |engine: &Fake| unsafe { engine.region.slice_mut(256 + 8, 4) }.fill(0);
    assert_ne!(after(&torn, &[0, 1, 2]), good, "torn");
}

#[test]
fn it_draws_ordinary_tokens_only_and_suppresses_what_it_must() {
    let ordinary = Ordinary::new(4, &[1, 2]);
    let drawn = oracle(&ordinary, &[0], &SamplingParams::default(), Choice(0), 100);
    assert!(drawn.iter().all(|token| [0, 3].contains(token)));
    let sampled = draw(&ordinary, Fold(1), 5, &SamplingParams::default(), Choice(0), &[0]);
    assert_eq!(sampled.token, 3);
}

#[test]
fn a_seed_matters_where_sampling_does() {
    let ordinary = Ordinary::new(500, &[]);
    let run = |temperature, seed, choice| {
        let sampling = SamplingParams { temperature, seed, ..SamplingParams::default() };
        oracle(&ordinary, &[1, 2, 3], &sampling, Choice(choice), 8)
    };
    assert_eq!(run(0.0, 1, 0), run(0.0, 2, 1));
    assert_eq!(run(1.0, 1, 0), run(1.0, 1, 0));
    assert_ne!(run(1.0, 1, 0), run(1.0, 2, 0));
    assert_ne!(run(1.0, 1, 0), run(1.0, 1, 1));
}

#[test]
fn log_probabilities_are_ranked_distinct_and_no_more_than_certain() {
    for (vocab, k, many) in [(500, 20, 20), (500, 0, 0), (3, 20, 3)] {
        let sampling = SamplingParams { logprobs: Some(k), ..SamplingParams::default() };
        for fold in 0..50 {
            let sampled = draw(&Ordinary::new(vocab, &[]), Fold(fold), 1, &sampling, Choice(0), &[]);
            assert_eq!(sampled.top.len(), many);
            assert!(sampled.top.first().is_none_or(|top| *top == (sampled.token, sampled.logprob.unwrap())));
            assert!(sampled.top.windows(2).all(|pair| pair[0].1 > pair[1].1));
            assert!(sampled.top.iter().map(|(_, logprob)| logprob.exp()).sum::<f32>() <= 1.0);
            let distinct: std::collections::BTreeSet<_> =
                sampled.top.iter().map(|(token, _)| token).collect();
            assert_eq!(distinct.len(), many);
        }
    }
    let sampled = draw(&Ordinary::new(9, &[]), Fold(3), 1, &SamplingParams::default(), Choice(0), &[]);
    assert_eq!((sampled.logprob, sampled.top), (None, vec![]), "nothing that was not asked for");
}

#[test]
fn paced_steps_take_their_time_one_after_the_other() {
    let mut engine = engine("paced:50ms,5ms,slow=2");
    let prompt: Vec<TokenId> = (0..10).collect();
    let plan = Plan {
        id: 1,
        open: vec![open(0, &prompt)],
        rows: vec![row(0, 0, &prompt, &[0], true)],
        ..Plan::default()
    };
    engine.submit(plan, Time::ZERO);
    let next = Row {
        slot: 0,
        start: 10,
        count: 1,
        input: Input::Previous,
        pages: vec![vec![0]],
        sample: true,
        score: None,
    };
    engine.submit(Plan { id: 2, rows: vec![next], ..Plan::default() }, Time::from_millis(1));
    assert!(engine.collect(Time::from_millis(99)).is_none());
    assert_eq!(engine.ready_at(), Some(Time::from_millis(100)));
    assert!(engine.collect(Time::from_millis(100)).is_some());
    assert!(engine.collect(Time::from_millis(109)).is_none());
    assert!(engine.collect(Time::from_millis(110)).is_some());
    assert_eq!(engine.in_flight(), 0);
}

#[test]
fn the_h200_curve_meets_the_points_it_was_fitted_to() {
    let spec: FakeSpec = "qwen3-8b@h200".parse().unwrap();
    let time = |start, count, rows: usize| {
        let row =
            Row { slot: 0, start, count, input: Input::Previous, pages: vec![], sample: true, score: None };
        spec.step_time(&vec![row; rows], false).as_secs_f64() * 1e3
    };
    for (given, measured) in [(time(0, 2048, 1), 42.3), (time(0, 8192, 1), 201.7), (time(2048, 1, 32), 7.64)]
    {
        assert!((given / measured - 1.0).abs() < 0.1, "{given} ms for {measured} ms");
    }
}

#[test]
fn told_to_fail_or_hang_it_does() {
    let run = |spec: &str| {
        let mut engine = engine(spec);
        engine.submit(
            Plan {
                id: 1,
                open: vec![open(0, &[5])],
                rows: vec![row(0, 0, &[5], &[0], true)],
                ..Plan::default()
            },
            Time::ZERO,
        );
        (engine.collect(Time(u64::MAX - 1)), engine.ready_at())
    };
    assert!(matches!(run("fail=1").0, Some(Err(StepError { plan: 1, .. }))));
    let (hung, ready) = run("zero,hang=1");
    assert!(hung.is_none() && ready == Some(Time::MAX));
}

#[test]
fn a_wrong_spec_is_refused_by_naming_the_right_ones() {
    for (text, part) in [
        ("slow", "zero, paced:TTFT,ITL and qwen3-8b@h200"),
        ("paced:50ms", "two times"),
        ("paced:50,5ms", "not a time"),
        ("zero,fail=2", "from 0 to 1"),
        ("zero,explode=1", "slow=FACTOR"),
        ("zero,page-bytes=100", "multiple of 8"),
    ] {
        let refusal = text.parse::<FakeSpec>().unwrap_err();
        assert!(refusal.contains(part), "{text}: {refusal}");
    }
}

#[test]
fn a_spec_is_written_as_one_would_write_it() {
    for text in
        ["zero", "paced:50ms,1500us,slow=2", "paced:1s,1ns", "qwen3-8b@h200,fail=0.1,page-bytes=512,seed=7"]
    {
        assert_eq!(text.parse::<FakeSpec>().unwrap().to_string(), text);
        let json = format!("{text:?}");
        assert_eq!(serde_json::to_string(&serde_json::from_str::<FakeSpec>(&json).unwrap()).unwrap(), json);
    }
    assert_eq!("slow=3".parse::<FakeSpec>().unwrap().to_string(), "zero,slow=3");
    assert!(serde_json::from_str::<FakeSpec>("\"fast\"").is_err());
}

#[test]
fn a_factor_beyond_all_bounds_is_for_ever() {
    let spec: FakeSpec = "paced:1s,1s,slow=1e300".parse().unwrap();
    assert_eq!(spec.step_time(&[], false), Duration::MAX);
}

proptest! {
    #[test]
    fn a_spec_reads_back_from_what_it_prints(
        curve in prop_oneof![
            Just(Curve::Zero),
            Just(Curve::Qwen3_8bH200),
            (0..u64::from(u32::MAX), 0..u64::from(u32::MAX)).prop_map(|(a, b)| Curve::Paced {
                first: Duration::from_nanos(a), next: Duration::from_nanos(b) }),
        ],
        slow in 0.0..100.0f64, fail in 0.0..1.0f64, refuse in 0.0..1.0f64, hang in 0.0..1.0f64,
        page_bytes in prop::option::of((32..1000u64).prop_map(|n| n * 8)), seed: u64,
    ) {
        let spec = FakeSpec { curve, slow, fail, refuse, hang, page_bytes, seed };
        prop_assert_eq!(spec.to_string().parse::<FakeSpec>(), Ok(spec));
    }
}
