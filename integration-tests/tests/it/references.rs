//! The committed checkpoints agree with their references through the public door, in float32.

use std::path::Path;

use serde_json::{Value, json};
use tandem_integration_tests::client::token_ids;
use tandem_integration_tests::{Spec, TestCluster, checkpoints};

use crate::support::{concurrently, run};

/// Every case of a checkpoint, all at once.
async fn agrees(dir: &Path, spec: Spec) {
    let text = std::fs::read_to_string(dir.join("reference/cases.json")).expect("it is committed");
    let reference: Value = serde_json::from_str(&text).expect("JSON");
    let cases = reference["cases"].as_array().expect("cases").clone();
    let suppressed: Vec<u32> = token_ids(&reference["suppressed_ids"]);
    let bias: serde_json::Map<String, Value> =
        suppressed.iter().map(|id| (id.to_string(), json!(-100))).collect();
    let cluster = TestCluster::start(spec).await;
    // Twice: the second time the prefix cache answers.
    for round in ["cold", "warm"] {
        let answers = concurrently(cases.len(), 8, |index| {
            let prompt = token_ids(&cases[index]["input_ids"]);
            let extra = json!({ "max_tokens": 24, "logit_bias": bias });
            let (api, model) = (cluster.api.clone(), cluster.model.clone());
            async move { api.complete(&model, &prompt, extra).await }
        })
        .await;
        for (case, answer) in cases.iter().zip(answers) {
            assert_eq!(answer.status, 200, "{}", answer.text);
            let name = format!("{} {} {round}", dir.display(), case["case"]);
            assert_eq!(answer.token_ids(), token_ids(&case["greedy_ids"]), "{name}");
        }
    }
    cluster.wait_until_idle().await;
    cluster.close().await;
}

#[test]
fn every_committed_checkpoint_agrees_with_its_reference_through_the_api() {
    run(async {
        for dir in checkpoints::with_references() {
            agrees(&dir, Spec::of(dir.clone())).await;
        }
    });
}

#[test]
fn chunked_prompts_agree_with_their_reference_through_the_api() {
    run(async {
        for name in ["qwen2", "qwen3", "llama"] {
            let dir = checkpoints::named(name);
            agrees(&dir, Spec { token_budget: 7, ..Spec::of(dir.clone()) }).await;
        }
    });
}

#[test]
fn both_spellings_of_the_configuration_agree_through_the_api() {
    run(async {
        let source = checkpoints::named("llama");
        let copy = std::env::temp_dir().join(format!("tandem-legacy-{}", std::process::id()));
        std::fs::create_dir_all(copy.join("reference")).expect("a folder");
        for file in std::fs::read_dir(&source).expect("a folder").map(|f| f.expect("a file").path()) {
            if file.is_file() {
                std::fs::copy(&file, copy.join(file.file_name().expect("a name"))).expect("a copy");
            }
        }
        std::fs::copy(source.join("config.legacy.json"), copy.join("config.json")).expect("a copy");
        std::fs::copy(source.join("reference/cases.json"), copy.join("reference/cases.json"))
            .expect("a copy");
        agrees(&copy, Spec::of(copy.clone())).await;
        std::fs::remove_dir_all(&copy).expect("it is ours");
    });
}
