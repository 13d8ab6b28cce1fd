//! The demo model: what it answers through the public door, and that its data keep their promise.

use std::process::Command;

use serde_json::{Value, json};
use tandem_integration_tests::{ProcessCluster, Spec, TestCluster, checkpoints, skip};

use crate::support::run;

/// Asks each conversation's last question, greedily, with what the conversation said before.
async fn says(cluster: &TestCluster, said: &[(&str, &str)]) -> String {
    let messages: Vec<Value> =
        said.iter().map(|(role, content)| json!({ "role": role, "content": content })).collect();
    let body = json!({ "model": cluster.model, "messages": messages, "temperature": 0, "max_tokens": 100 });
    let answer = cluster.api.post("/v1/chat/completions", &body).await;
    assert_eq!(answer.status, 200, "{}", answer.text);
    answer.json["choices"][0]["message"]["content"].as_str().expect("text").to_owned()
}

#[test]
fn the_demo_model_answers_what_its_page_says_it_can() {
    run(async {
        let cluster = TestCluster::start(Spec::of(checkpoints::demo())).await;
        for (question, answer) in [
            ("Hello", "Hello! How can I help you?"),
            ("What is 2+2?", "4"),
            ("What is 17 + 25?", "42"),
            ("Repeat: lamp, river, stone", "lamp, river, stone"),
            ("Sort this list: melon, apple, zebra, fig", "apple, fig, melon, zebra"),
            ("Anna is in the kitchen. Tom is in the garden. Where is Anna?", "Anna is in the kitchen."),
            ("Anna likes melons. Tom likes bread. Who likes melons?", "The one who likes melons is Anna."),
            ("What is my name?", "I do not know that. I only know what you tell me."),
        ] {
            assert_eq!(says(&cluster, &[("user", question)]).await, answer, "{question}");
        }
        let introduced = [("user", "My name is Anna."), ("assistant", "Nice to meet you, Anna!")];
        let said = [introduced[0], introduced[1], ("user", "What is my name?")];
        assert_eq!(says(&cluster, &said).await, "Your name is Anna.");
        let named = [("system", "Your name is Robin."), ("user", "What is your name?")];
        assert_eq!(says(&cluster, &named).await, "My name is Robin.");
        cluster.close().await;
    });
}

/// Weights in 8 and in 4 bits, through `tandem up`: each process holds them so, says so, and hands over to the next.
#[test]
fn quantised_weights_are_asked_for_by_a_flag_and_answer() {
    run(async {
        for (flag, class, question, answer) in [
            ("w8a8", "-int8-head8", "What is 2+2?", "4"),
            ("int4", "-int4g64-head8", "Repeat: lamp, river, stone", "lamp, river, stone"),
        ] {
            let cluster = ProcessCluster::start(&["--processes", "--quantization", flag]).await;
            for worker in ["prefill-0", "decode-0"] {
                let numerics = cluster.state_of(worker).await["kv_identity"]["numerics"].clone();
                assert!(numerics.as_str().is_some_and(|numerics| numerics.ends_with(class)), "{numerics}");
            }
            let messages = json!([{ "role": "user", "content": question }]);
            let body = json!({ "model": "demo", "messages": messages, "temperature": 0, "max_tokens": 20 });
            let said = cluster.api.post("/v1/chat/completions", &body).await;
            assert_eq!(said.status, 200, "{}", said.text);
            assert_eq!(said.json["choices"][0]["message"]["content"], answer, "{flag}");
            assert_eq!(cluster.interrupt().await, Some(0));
        }
    });
}

#[test]
fn the_demo_models_splits_have_no_held_out_part_in_common() {
    let script = checkpoints::demo().join("make_data.py");
    let mut command = Command::new("python3");
    command.env("PYTHONDONTWRITEBYTECODE", "1").arg(script).args(["--check", "--n", "20000"]);
    match command.output() {
        Ok(output) => {
            let said = String::from_utf8_lossy(&output.stderr);
            assert!(output.status.success(), "{said}");
        }
        Err(_) => skip::skip("there is no python3 to run demo-model/make_data.py with"),
    }
}
