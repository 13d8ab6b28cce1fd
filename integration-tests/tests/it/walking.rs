//! Requests through the public door.

use serde_json::{Value, json};
use tandem_integration_tests::{Spec, TestCluster};

use crate::support::{run, tiny};

fn chat(model: &str, extra: Value) -> Value {
    let mut body = json!({ "model": model, "messages": [{ "role": "user", "content": "The cat sees" }] });
    body.as_object_mut().expect("an object").extend(extra.as_object().expect("an object").clone());
    body
}

#[test]
fn a_request_goes_through_router_prefill_and_decode_with_a_fake_engine_over_tcp() {
    run(async {
        let spec = Spec { transport: "tcp".into(), ..Spec::of(tiny()).fake("zero") };
        let cluster = TestCluster::start(spec).await;
        let body = json!({ "model": cluster.model, "prompt": [1, 2, 3], "max_tokens": 20, "return_token_ids": true });
        let answer = cluster.api.post_with("/v1/completions", ("x-tandem-debug", "route"), &body).await;
        assert_eq!(answer.status, 200, "{}", answer.text);
        assert_eq!(answer.headers["x-tandem-route"], "prefill=prefill-0,decode=decode-0");
        assert_eq!(answer.token_ids().len(), 20);
        assert_eq!(answer.json["choices"][0]["finish_reason"], "length");
        let usage = &answer.json["usage"];
        assert_eq!((&usage["prompt_tokens"], &usage["completion_tokens"]), (&json!(3), &json!(20)));
        let moved = cluster.workers[1].admin.get("/metrics").await.text;
        assert!(moved.contains(r#"tandem_kv_transfer_bytes_total{direction="in""#), "{moved}");
        cluster.wait_until_idle().await;
        cluster.close().await;
    });
}

#[test]
fn streams_say_what_whole_answers_say() {
    run(async {
        let cluster = TestCluster::start(Spec::of(tiny())).await;
        let extra = json!({ "max_tokens": 24, "temperature": 0, "ignore_eos": true });
        let whole = cluster.api.post("/v1/chat/completions", &chat(&cluster.model, extra.clone())).await;
        assert_eq!(whole.status, 200, "{}", whole.text);
        let text = whole.json["choices"][0]["message"]["content"].as_str().expect("text").to_owned();

        let mut streamed = chat(&cluster.model, extra);
        streamed["stream"] = json!(true);
        streamed["stream_options"] = json!({ "include_usage": true });
        let events = cluster.api.stream("/v1/chat/completions", &streamed).await.expect("it begins");
        assert_eq!(events.status, 200);
        assert_eq!(events.headers["content-type"], "text/event-stream; charset=utf-8");
        let mut events = events.rest().await;
        assert_eq!(events.pop().as_deref(), Some("[DONE]"));
        let chunks: Vec<Value> = events.iter().map(|e| serde_json::from_str(e).expect("JSON")).collect();
        let pieces = chunks.iter().filter_map(|c| c["choices"][0]["delta"]["content"].as_str());
        assert_eq!(pieces.collect::<String>(), text);
        assert_eq!(chunks[0]["choices"][0]["delta"]["role"], "assistant");
        let reasons: Vec<&Value> =
            chunks.iter().map(|c| &c["choices"][0]["finish_reason"]).filter(|r| !r.is_null()).collect();
        assert_eq!(reasons, ["length"]);
        let last = chunks.last().expect("chunks");
        assert_eq!(last["choices"], json!([]));
        assert_eq!(last["usage"], whole.json["usage"]);
        cluster.close().await;
    });
}

#[test]
fn stop_strings_end_an_answer_and_free_the_workers() {
    run(async {
        let cluster = TestCluster::start(Spec::of(tiny())).await;
        let plain = json!({ "max_tokens": 200, "temperature": 1, "seed": 5, "ignore_eos": true });
        let whole = cluster.api.post("/v1/chat/completions", &chat(&cluster.model, plain.clone())).await;
        let text = whole.json["choices"][0]["message"]["content"].as_str().expect("text").to_owned();
        // Some piece of the middle that does not occur earlier.
        let chars: Vec<char> = text.chars().collect();
        let stop: String = (8..chars.len() - 4)
            .map(|at| chars[at..at + 3].iter().collect::<String>())
            .find(|stop| text.find(stop.as_str()).is_some_and(|at| at > 8) && !stop.contains('\u{fffd}'))
            .expect("a piece");
        let mut extra = plain;
        extra["stop"] = json!([stop]);
        let stopped = cluster.api.post("/v1/chat/completions", &chat(&cluster.model, extra)).await;
        let choice = &stopped.json["choices"][0];
        assert_eq!(choice["message"]["content"], text[..text.find(&stop).expect("it is there")]);
        assert_eq!((&choice["finish_reason"], &choice["stop_reason"]), (&json!("stop"), &json!(stop)));
        cluster.wait_until_idle().await;
        cluster.close().await;
    });
}

#[test]
fn end_of_sequence_and_stop_tokens_end_an_answer_where_they_are_drawn() {
    run(async {
        let cluster = TestCluster::start(Spec::of(tiny())).await;
        let complete = async |extra: Value| {
            let mut drawn = json!({ "max_tokens": 30, "temperature": 1, "seed": 11 });
            drawn.as_object_mut().expect("an object").extend(extra.as_object().expect("an object").clone());
            cluster.api.complete(&cluster.model, &[5, 6, 7], drawn).await
        };
        let all = complete(json!({})).await.token_ids();
        let (at, stop) =
            all.iter().enumerate().skip(4).find(|(i, t)| !all[..*i].contains(t)).expect("a new one");
        let stopped = complete(json!({ "stop_token_ids": [stop] })).await;
        assert_eq!(stopped.token_ids(), all[..=at]);
        assert_eq!(stopped.json["choices"][0]["stop_reason"], json!(stop));
        let first = complete(json!({ "stop_token_ids": [all[0]] })).await;
        assert_eq!(first.token_ids(), all[..1], "the prefill worker ends it alone");
        let later = complete(json!({ "stop_token_ids": [stop], "min_tokens": 20 })).await.token_ids();
        assert!(later.len() >= 20 && !later[..20].contains(stop), "{later:?}");
        cluster.wait_until_idle().await;
        cluster.close().await;
    });
}

#[test]
fn several_prompts_and_choices_come_back_in_their_places() {
    run(async {
        let cluster = TestCluster::start(Spec::of(tiny())).await;
        let body = json!({
            "model": cluster.model, "prompt": [[5, 6, 7], [9, 8]], "n": 2, "max_tokens": 6, "temperature": 1.0,
            "seed": 7, "ignore_eos": true, "return_token_ids": true,
        });
        let answer = cluster.api.post("/v1/completions", &body).await;
        assert_eq!(answer.status, 200, "{}", answer.text);
        let choices = answer.json["choices"].as_array().expect("choices").clone();
        assert_eq!(choices.len(), 4);
        for (i, choice) in choices.iter().enumerate() {
            assert_eq!(choice["index"], i);
            assert_eq!(choice["prompt_token_ids"], if i < 2 { json!([5, 6, 7]) } else { json!([9, 8]) });
            // A choice is what it is alone: seed, choice and position say everything.
            let alone = json!({
                "model": cluster.model, "prompt": choice["prompt_token_ids"], "n": i % 2 + 1, "max_tokens": 6,
                "temperature": 1.0, "seed": 7, "ignore_eos": true, "return_token_ids": true,
            });
            let alone = cluster.api.post("/v1/completions", &alone).await;
            assert_eq!(alone.json["choices"][i % 2]["token_ids"], choice["token_ids"]);
        }
        assert_ne!(choices[0]["token_ids"], choices[1]["token_ids"]);
        assert_eq!(answer.json["usage"]["prompt_tokens"], 5);
        assert_eq!(answer.json["usage"]["completion_tokens"], 24);
        cluster.close().await;
    });
}

#[test]
fn a_prompt_that_does_not_fit_is_refused_before_anything_is_computed() {
    run(async {
        let cluster = TestCluster::start(Spec { kv_bytes: 1 << 20, ..Spec::of(tiny()) }).await;
        let too_long: Vec<u32> = vec![5; 3000];
        let beyond_context =
            cluster.api.complete(&cluster.model, &too_long, json!({ "max_tokens": 4 })).await;
        assert_eq!(beyond_context.status, 400);
        assert_eq!(beyond_context.json["error"]["code"], "context_length_exceeded");
        let beyond_pool =
            cluster.api.complete(&cluster.model, &too_long[..2000], json!({ "max_tokens": 4 })).await;
        assert_eq!(beyond_pool.status, 400, "{}", beyond_pool.text);
        assert_eq!(beyond_pool.json["error"]["code"], "context_length_exceeded");
        assert!(beyond_pool.json["error"]["message"].as_str().expect("a sentence").contains("KV pool"));
        cluster.wait_until_idle().await;
        cluster.close().await;
    });
}
