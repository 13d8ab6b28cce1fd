//! Disaggregation changes no bit: token ids and log probabilities are those of one mixed worker.

use serde_json::{Value, json};
use tandem_engine::fake::{Ordinary, oracle};
use tandem_integration_tests::{Client, ProcessCluster, Spec, TestCluster};
use tandem_types::{Choice, SamplingParams};
use tandem_worker::engine::Dtype;

use crate::support::{Random, concurrently, run, seed, tiny};

/// As many as the promise names.
const PROMPTS: usize = 200;
const AT_ONCE: usize = 16;

/// A prompt, and how its answer is drawn.
fn job(seed: u64, index: usize) -> (Vec<u32>, Value) {
    let mut random = Random(seed ^ (index as u64) << 20);
    let length = [3, 31, 32, 33, 64, 90, 200, 420][random.below(8) as usize] + random.below(5) as usize;
    let mut prompt = random.prompt(length);
    if index.is_multiple_of(3) {
        // Shared beginnings, so that prefix caches take part.
        prompt.splice(0..0, Random(1).prompt(70));
    }
    let mut extra = json!({ "max_tokens": 4 + random.below(20), "logprobs": 3 });
    if index % 2 == 1 {
        let sampled = json!({
            "temperature": 0.9, "top_p": 0.95, "top_k": 40, "seed": random.below(1 << 40), "presence_penalty": 0.3,
            "frequency_penalty": 0.2, "repetition_penalty": 1.1,
        });
        extra.as_object_mut().expect("an object").extend(sampled.as_object().expect("an object").clone());
    }
    (prompt, extra)
}

/// Token ids and log probabilities of every prompt.
async fn answers(api: &Client, model: &str, seed: u64) -> Vec<(Vec<u32>, Value)> {
    concurrently(PROMPTS, AT_ONCE, |index| {
        let (prompt, extra) = job(seed, index);
        let (api, model) = (api.clone(), model.to_owned());
        async move {
            let answer = api.complete(&model, &prompt, extra).await;
            assert_eq!(answer.status, 200, "{}", answer.text);
            let logprobs = &answer.json["choices"][0]["logprobs"];
            (answer.token_ids(), json!([logprobs["token_logprobs"], logprobs["top_logprobs"]]))
        }
    })
    .await
}

async fn in_process(spec: Spec, seed: u64) -> Vec<(Vec<u32>, Value)> {
    let cluster = TestCluster::start(spec).await;
    let answers = answers(&cluster.api, &cluster.model, seed).await;
    cluster.wait_until_idle().await;
    cluster.close().await;
    answers
}

fn split_equals_mixed(dtype: Dtype) {
    run(async move {
        let seed = seed();
        let of = |workers: (u32, u32, u32), transport: &str| Spec {
            workers,
            dtype,
            threads: (1, 3),
            transport: transport.into(),
            token_budget: 128,
            ..Spec::of(tiny())
        };
        let mixed = in_process(of((0, 0, 1), "auto"), seed).await;
        for transport in ["inproc", "shm", "tcp"] {
            let split = in_process(of((1, 1, 0), transport), seed).await;
            assert!(split == mixed, "{transport} differs");
        }
    });
}

#[test]
fn a_split_cluster_gives_the_bits_of_a_mixed_worker_in_float32() {
    split_equals_mixed(Dtype::Float32);
}

#[test]
fn a_split_cluster_gives_the_bits_of_a_mixed_worker_in_bfloat16() {
    split_equals_mixed(Dtype::Bfloat16);
}

#[test]
fn several_processes_give_the_bits_of_one_mixed_worker_in_both_types() {
    run(async {
        let seed = seed();
        let model = tiny();
        let model = model.to_str().expect("a path");
        for (dtype, of) in [("float32", Dtype::Float32), ("bfloat16", Dtype::Bfloat16)] {
            let mixed = Spec { workers: (0, 0, 1), dtype: of, ..Spec::of(tiny()) };
            let mixed = in_process(mixed, seed).await;
            let arguments = [
                "--processes",
                "--model",
                model,
                "--dtype",
                dtype,
                "--prefill",
                "1",
                "--decode",
                "1",
                "--threads",
                "prefill=1,decode=3",
            ];
            let cluster = ProcessCluster::start(&arguments).await;
            let split = answers(&cluster.api, "qwen3", seed).await;
            assert!(split == mixed, "{dtype} differs");
            assert_eq!(cluster.interrupt().await, Some(0));
        }
    });
}

#[test]
fn a_fake_cluster_says_what_its_oracle_says_from_the_prompt_alone() {
    run(async {
        let seed = seed();
        let ordinary = Ordinary::read(&tiny()).expect("it is committed");
        let split = ["inproc", "shm", "tcp"].map(|transport| ((1, 1, 0), transport));
        for (workers, transport) in [((0, 0, 1), "auto")].into_iter().chain(split) {
            let spec = Spec { workers, transport: transport.into(), ..Spec::of(tiny()).fake("zero") };
            let got = in_process(spec, seed).await;
            for (index, (ids, _)) in got.iter().enumerate() {
                let (prompt, extra) = job(seed, index);
                let sampling = SamplingParams {
                    temperature: extra["temperature"].as_f64().unwrap_or(0.0) as f32,
                    seed: extra["seed"].as_u64().unwrap_or(0),
                    ..SamplingParams::default()
                };
                assert_eq!(
                    *ids,
                    oracle(&ordinary, &prompt, &sampling, Choice(0), ids.len()),
                    "prompt {index}"
                );
            }
        }
    });
}
