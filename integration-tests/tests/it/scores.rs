//! Log probabilities of the prompt, `echo` with `logprobs`: computed by the workers, and the same whoever computes
//! them.

use std::path::Path;

use serde_json::{Value, json};
use tandem_engine::fake::{Ordinary, oracle, oracle_scores};
use tandem_integration_tests::client::token_ids;
use tandem_integration_tests::processes::ProcessCluster;
use tandem_integration_tests::{Client, Spec, TestCluster, checkpoints};
use tandem_types::{Choice, SamplingParams};

use crate::support::{Random, concurrently, run, tiny};

/// The log probabilities of an answer's choice, from the prompt's first token on.
async fn scored(api: &Client, model: &str, prompt: &[u32], extra: Value) -> Value {
    let mut asked = json!({ "echo": true, "logprobs": 5, "max_tokens": 1 });
    asked.as_object_mut().expect("an object").extend(extra.as_object().expect("an object").clone());
    let answer = api.complete(model, prompt, asked).await;
    assert_eq!(answer.status, 200, "{}", answer.text);
    answer.json["choices"][0]["logprobs"].clone()
}

/// Whether an answer begins with the scores of its prompt and goes on with `drawn` further tokens.
fn expect_scores(logprobs: &[Value], ordinary: &Ordinary, prompt: &[u32], drawn: usize, how: &str) {
    assert_eq!(logprobs.len(), prompt.len() + drawn, "{how}");
    assert_eq!(logprobs[0], Value::Null, "{how}: nothing stands before the first token");
    for (at, scored) in (1..).zip(oracle_scores(ordinary, prompt, 0)) {
        // The same number, but for the last bit that a quick reader of JSON leaves open.
        let is = logprobs[at].as_f64().map(|logprob| logprob as f32);
        assert_eq!(is, scored.logprob, "{how} position {at}");
    }
}

fn list(of: &Value) -> &[Value] {
    of.as_array().expect("a list")
}

/// Logits of the last positions of each case's prompt, as the reference implementation has them.
fn reference_logits(dir: &Path, case: &str) -> Vec<Vec<f32>> {
    let file = std::fs::read(dir.join("reference/tensors.safetensors")).expect("it is committed");
    let (length, rest) = file.split_first_chunk::<8>().expect("a header");
    let (header, data) = rest.split_at(u64::from_le_bytes(*length) as usize);
    let header: Value = serde_json::from_slice(header).expect("JSON");
    let tensor = &header[format!("{case}/logits")];
    let number = |value: &Value| value.as_u64().expect("a number") as usize;
    let bytes = &data[number(&tensor["data_offsets"][0])..number(&tensor["data_offsets"][1])];
    let values: Vec<f32> = bytes.as_chunks().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect();
    values.chunks(number(&tensor["shape"][1])).map(<[f32]>::to_vec).collect()
}

fn log_softmax(logits: &[f32], token: u32) -> f64 {
    let highest = logits.iter().copied().fold(f32::MIN, f32::max);
    let sum: f64 = logits.iter().map(|logit| f64::from(logit - highest).exp()).sum();
    f64::from(logits[token as usize] - highest) - sum.ln()
}

#[test]
fn scores_agree_with_the_reference_implementation_however_the_prompt_is_computed() {
    run(async {
        let mut compared = 0;
        for dir in checkpoints::with_references() {
            let text = std::fs::read_to_string(dir.join("reference/cases.json")).expect("it is committed");
            let reference: Value = serde_json::from_str(&text).expect("JSON");
            // Where activations are rounded to 8 bits, a last bit before that can be a step after it.
            let error_max = if dir.ends_with("qwen3-w8a8") { 0.5 } else { 2e-3 };
            let mut before: Option<Vec<Value>> = None;
            for (workers, token_budget) in [((0, 0, 1), 512), ((1, 1, 0), 23)] {
                let spec = Spec { workers, token_budget, ..Spec::of(dir.clone()) };
                let cluster = TestCluster::start(spec).await;
                let cases = list(&reference["cases"]);
                // A warm prefix cache holds no scores.
                for round in ["cold", "warm"] {
                    let scores = concurrently(cases.len(), 4, |at| {
                        let prompt = token_ids(&cases[at]["input_ids"]);
                        let (api, model) = (cluster.api.clone(), cluster.model.clone());
                        async move { scored(&api, &model, &prompt, json!({})).await }
                    })
                    .await;
                    for (case, scores) in cases.iter().zip(&scores) {
                        let how = format!("{} {} {workers:?} {round}", dir.display(), case["case"]);
                        let prompt = token_ids(&case["input_ids"]);
                        let logprobs = list(&scores["token_logprobs"]);
                        assert_eq!(logprobs.len(), prompt.len() + 1, "{how}");
                        assert_eq!((&logprobs[0], &scores["top_logprobs"][0]), (&Value::Null, &Value::Null));
                        let logits = reference_logits(&dir, case["case"].as_str().expect("a name"));
                        let first = prompt.len() - logits.len();
                        for (logits, at) in logits.iter().zip(first + 1..prompt.len()) {
                            let (is, should) = (logprobs[at].as_f64(), log_softmax(logits, prompt[at]));
                            let near = is.is_some_and(|is| (is - should).abs() < error_max);
                            assert!(near, "{how} position {at}: {is:?} for {should}");
                            let top = scores["top_logprobs"][at].as_object().expect("the likeliest");
                            let best = top.values().filter_map(Value::as_f64).fold(f64::MIN, f64::max);
                            let highest = (0..logits.len() as u32)
                                .max_by(|a, b| logits[*a as usize].total_cmp(&logits[*b as usize]));
                            assert!(
                                (best - log_softmax(logits, highest.expect("tokens"))).abs() < error_max,
                                "{how}"
                            );
                            compared += 1;
                        }
                    }
                    // Not a bit depends on how it was computed.
                    match &before {
                        Some(before) => assert!(*before == scores, "{} {workers:?} {round}", dir.display()),
                        None => before = Some(scores),
                    }
                }
                cluster.wait_until_idle().await;
                cluster.close().await;
            }
        }
        assert!(compared > 100, "{compared} positions have a reference");
    });
}

#[test]
fn a_drawn_token_scores_what_its_draw_reported() {
    run(async {
        let cluster = TestCluster::start(Spec::of(tiny())).await;
        let prompt = Random(1).prompt(50);
        let drawn =
            cluster.api.complete(&cluster.model, &prompt, json!({ "max_tokens": 40, "logprobs": 5 })).await;
        assert_eq!(drawn.status, 200, "{}", drawn.text);
        let whole: Vec<u32> = prompt.iter().copied().chain(drawn.token_ids()).collect();
        let scores = scored(&cluster.api, &cluster.model, &whole, json!({ "max_tokens": 0 })).await;
        let reported = &drawn.json["choices"][0]["logprobs"];
        for name in ["tokens", "token_logprobs", "top_logprobs"] {
            assert_eq!(list(&scores[name])[50..], *list(&reported[name]), "{name}");
        }
        cluster.close().await;
    });
}

#[test]
fn a_fake_cluster_scores_what_its_oracle_says_of_the_prompt_alone() {
    run(async {
        let ordinary = Ordinary::read(&tiny()).expect("it is committed");
        for workers in [(0, 0, 1), (1, 1, 0), (2, 2, 1)] {
            let spec = Spec { token_budget: 100, workers, ..Spec::of(tiny()).fake("zero") };
            let cluster = TestCluster::start(spec).await;
            concurrently(60, 12, |at| {
                let mut random = Random(at as u64);
                let length = [1, 2, 32, 33, 64, 300, 1500][random.below(7) as usize];
                let prompt = [Random(7).prompt(70), random.prompt(length)].concat();
                let prompt = if at % 2 == 0 { prompt } else { prompt[70..].to_vec() };
                let tokens = 1 + random.below(4) as usize;
                let (cluster, ordinary) = (&cluster, &ordinary);
                async move {
                    let scores =
                        scored(&cluster.api, &cluster.model, &prompt, json!({ "max_tokens": tokens })).await;
                    let logprobs = list(&scores["token_logprobs"]);
                    expect_scores(logprobs, ordinary, &prompt, tokens, &format!("{workers:?} {at}"));
                }
            })
            .await;
            cluster.wait_until_idle().await;
            cluster.close().await;
        }
    });
}

#[test]
fn every_choice_of_every_prompt_begins_with_the_same_scores_streamed_or_not() {
    run(async {
        let ordinary = Ordinary::read(&tiny()).expect("it is committed");
        let cluster = TestCluster::start(Spec { token_budget: 64, ..Spec::of(tiny()).fake("zero") }).await;
        let prompts = [Random(1).prompt(200), Random(2).prompt(3), Random(3).prompt(90)];
        for (n, max_tokens) in [(1, 0), (3, 2), (2, 0)] {
            let mut body = json!({
                "model": cluster.model, "prompt": prompts, "n": n, "max_tokens": max_tokens, "echo": true,
                "logprobs": 2, "temperature": 1, "seed": 5, "ignore_eos": true, "return_token_ids": true,
            });
            let answer = cluster.api.post("/v1/completions", &body).await;
            assert_eq!(answer.status, 200, "{}", answer.text);
            let whole = list(&answer.json["choices"]);
            assert_eq!(whole.len(), prompts.len() * n);
            for (at, choice) in whole.iter().enumerate() {
                let prompt = &prompts[at / n];
                let logprobs = &choice["logprobs"];
                let how = format!("choice {at} of {n}");
                expect_scores(list(&logprobs["token_logprobs"]), &ordinary, prompt, max_tokens, &how);
                let tops = list(&logprobs["top_logprobs"]);
                assert!(
                    tops[1..]
                        .iter()
                        .all(|top| top.as_object().is_some_and(|top| (1..=2).contains(&top.len())))
                );
                // Each token begins where the ones before it end.
                let mut offset = 0;
                for (token, at) in list(&logprobs["tokens"]).iter().zip(list(&logprobs["text_offset"])) {
                    assert_eq!(*at, json!(offset));
                    offset += token.as_str().expect("text").chars().count();
                }
                assert_eq!(choice["finish_reason"], "length");
            }
            let usage = &answer.json["usage"];
            let all: usize = prompts.iter().map(Vec::len).sum();
            assert_eq!(usage["prompt_tokens"], all);
            assert_eq!(usage["completion_tokens"], prompts.len() * n * max_tokens);
            assert_eq!(usage["prompt_tokens_details"]["cached_tokens"], 0);

            body["stream"] = json!(true);
            let events = cluster.api.stream("/v1/completions", &body).await.expect("it begins").rest().await;
            assert_eq!(events.last().map(String::as_str), Some("[DONE]"));
            let mut streamed = vec![(String::new(), Vec::new()); whole.len()];
            for event in &events[..events.len() - 1] {
                let event: Value = serde_json::from_str(event).expect("JSON");
                for choice in list(&event["choices"]) {
                    let (text, logprobs) =
                        &mut streamed[choice["index"].as_u64().expect("an index") as usize];
                    text.push_str(choice["text"].as_str().expect("text"));
                    let more = choice["logprobs"]["token_logprobs"].as_array().into_iter().flatten();
                    logprobs.extend(more.cloned());
                }
            }
            for (choice, (text, logprobs)) in whole.iter().zip(streamed) {
                assert_eq!(choice["text"], text);
                assert_eq!(choice["logprobs"]["token_logprobs"], json!(logprobs));
            }
        }
        cluster.wait_until_idle().await;
        cluster.close().await;
    });
}

#[test]
fn scored_prompts_that_are_preempted_are_scored_whole_and_once() {
    run(async {
        let ordinary = Ordinary::read(&tiny()).expect("it is committed");
        // Room for two or three of the prompts with their answers.
        let pool =
            Spec { kv_bytes: 24 * 32 * 1024, token_budget: 48, workers: (0, 0, 1), ..Spec::of(tiny()) };
        let cluster = TestCluster::start(pool.fake("paced:2ms,1ms")).await;
        concurrently(12, 12, |at| {
            let prompt = Random(at as u64).prompt(150 + 20 * at);
            let (cluster, ordinary) = (&cluster, &ordinary);
            async move {
                let extra = json!({ "max_tokens": 120 });
                let scores = scored(&cluster.api, &cluster.model, &prompt, extra).await;
                let logprobs = list(&scores["token_logprobs"]);
                expect_scores(logprobs, ordinary, &prompt, 120, &format!("prompt {at}"));
            }
        })
        .await;
        cluster.wait_until_idle().await;
        cluster.close().await;
    });
}

#[test]
fn a_prefill_worker_killed_while_it_scores_is_replaced_and_no_score_is_missing_or_there_twice() {
    run(async {
        let model = tiny();
        let ordinary = Ordinary::read(&model).expect("it is committed");
        let model = model.to_str().expect("a path");
        // A step of the prompt takes 100 ms, so 4,000 tokens take most of a second and score 512 at a time.
        let arguments =
            ["--processes", "--fake=paced:100ms,100ms", "--model", model, "--prefill", "2", "--decode", "1"];
        for streamed in [false, true] {
            let cluster = ProcessCluster::start(&arguments).await;
            let prompt = Random(5).prompt(4000);
            let body = json!({
                "model": "qwen3", "prompt": prompt, "max_tokens": 3, "echo": true, "logprobs": 1, "temperature": 0,
                "ignore_eos": true, "return_token_ids": true, "stream": streamed,
            });
            let ask = async {
                if !streamed {
                    let answer = cluster.api.post("/v1/completions", &body).await;
                    assert_eq!(answer.status, 200, "{}", answer.text);
                    let choice = &answer.json["choices"][0];
                    return (answer.token_ids(), list(&choice["logprobs"]["token_logprobs"]).to_vec());
                }
                let events =
                    cluster.api.stream("/v1/completions", &body).await.expect("it begins").rest().await;
                assert_eq!(events.last().map(String::as_str), Some("[DONE]"));
                let (mut ids, mut logprobs) = (Vec::new(), Vec::new());
                for event in &events[..events.len() - 1] {
                    let event: Value = serde_json::from_str(event).expect("JSON");
                    let choice = &event["choices"][0];
                    ids.extend(token_ids(&choice["token_ids"]));
                    logprobs.extend(
                        choice["logprobs"]["token_logprobs"].as_array().into_iter().flatten().cloned(),
                    );
                }
                (ids, logprobs)
            };
            let kill = async {
                let computing = |row: &Value| row["role"] == "prefill" && row["in_flight"].as_u64() > Some(0);
                cluster.wait_for("a worker scores", |rows| rows.iter().any(computing)).await;
                // Some chunks are scored by now, and some are not.
                tandem_chassis::seam::sleep(std::time::Duration::from_millis(350)).await;
                let rows = cluster.admin.get("/admin/cluster").await.json["workers"].clone();
                let victim = list(&rows).iter().find(|row| computing(row)).expect("it scores still").clone();
                cluster.kill(victim["id"].as_str().expect("a name")).await;
            };
            let ((ids, logprobs), ()) = tokio::join!(ask, kill);
            assert_eq!(ids, oracle(&ordinary, &prompt, &SamplingParams::default(), Choice(0), 3));
            expect_scores(&logprobs, &ordinary, &prompt, 3, &format!("streamed: {streamed}"));
            let rest = cluster.admin.get("/admin/state").await.json;
            assert_eq!(rest["running"], 0);
        }
    });
}
