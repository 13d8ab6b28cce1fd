//! Workers that fail, refuse, hang, go and come back, in one process.

use serde_json::{Value, json};
use tandem_integration_tests::{Spec, TestCluster};
use tandem_types::Role;

use crate::support::{concurrently, run, tiny};

async fn all_answered(cluster: &TestCluster, requests: usize) {
    let answers = concurrently(requests, 8, |index| {
        let (api, model) = (cluster.api.clone(), cluster.model.clone());
        async move { api.complete(&model, &[1, 2, index as u32 % 300], json!({ "max_tokens": 5 })).await }
    })
    .await;
    for answer in answers {
        assert_eq!(answer.status, 200, "{}", answer.text);
        assert_eq!(answer.token_ids().len(), 5);
    }
}

#[test]
fn refused_starts_are_placed_elsewhere() {
    run(async {
        let spec = Spec::of(tiny()).workers(2, 2, 0).fake("zero,refuse=0.3,seed=5");
        let cluster = TestCluster::start(spec).await;
        all_answered(&cluster, 60).await;
        cluster.wait_until_idle().await;
        cluster.close().await;
    });
}

#[test]
fn a_failing_prefill_is_placed_again_and_given_up_after_three_attempts() {
    run(async {
        let cluster = TestCluster::start(Spec::of(tiny()).workers(2, 1, 0).fake("zero,fail=1")).await;
        let answer = cluster.api.complete(&cluster.model, &[1, 2, 3], json!({ "max_tokens": 5 })).await;
        assert_eq!(answer.status, 502, "{}", answer.text);
        assert_eq!(answer.json["error"]["code"], "upstream_error");
        let name = answer.headers["x-request-id"].to_str().expect("ASCII").to_owned();
        let record = cluster.admin.get(&format!("/admin/requests/{name}")).await.json;
        let starts = record["events"].as_array().expect("events").iter().filter(|e| e["what"] == "start");
        assert_eq!(starts.count(), 3, "{record:#}");
        cluster.wait_until_idle().await;
        cluster.close().await;
    });
}

#[test]
fn a_stream_that_breaks_after_its_first_decoded_token_ends_loudly_and_without_done() {
    run(async {
        // Every third step fails; with one prompt at a time some stream breaks in the middle.
        let cluster =
            TestCluster::start(Spec::of(tiny()).workers(1, 1, 0).fake("zero,fail=0.05,seed=3")).await;
        let mut broken = 0;
        for i in 0..40 {
            let body = json!({
                "model": cluster.model, "prompt": [1, 2, i], "max_tokens": 30, "stream": true, "ignore_eos": true,
            });
            let events = cluster.api.stream("/v1/completions", &body).await.expect("it begins");
            if events.status != 200 {
                continue;
            }
            let events = events.rest().await;
            let last: Value = serde_json::from_str(events.last().expect("events")).unwrap_or_default();
            if events.last().is_some_and(|e| e == "[DONE]") {
                continue;
            }
            broken += 1;
            assert_eq!(last["error"]["code"], "upstream_error", "{events:?}");
            assert!(!events.iter().any(|e| e == "[DONE]"));
        }
        assert!(broken > 0, "with this seed some stream breaks");
        cluster.wait_until_idle().await;
        cluster.close().await;
    });
}

#[test]
fn a_hanging_step_is_noticed_and_its_request_placed_again() {
    run(async {
        // One of two prefill workers hangs at its first step; the watchdog needs two seconds to be sure.
        let spec = Spec::of(tiny()).workers(1, 1, 0).fake("zero");
        let mut cluster = TestCluster::start(spec).await;
        cluster.stop_worker("prefill-0").await;
        cluster.set_fake("zero,hang=1");
        cluster.add_worker("prefill-1", Role::Prefill).await;
        cluster.set_fake("zero");
        let asked = cluster.api.complete(&cluster.model, &[1, 2, 3], json!({ "max_tokens": 5 }));
        let add = async {
            cluster
                .wait_for("the hanging worker is suspect", |rows| {
                    rows.iter().any(|row| row["id"] == "prefill-1" && row["state"] == "suspect")
                })
                .await;
        };
        let (answer, ()) = tokio::join!(asked, add);
        assert_eq!(answer.status, 200, "the decode worker has prefilled it: {}", answer.text);
        cluster.close_hung().await;
    });
}

#[test]
fn with_no_decode_worker_left_a_prefill_worker_decodes_and_the_reverse() {
    run(async {
        let mut cluster = TestCluster::start(Spec::of(tiny()).workers(1, 1, 0).fake("zero")).await;
        let route = async |cluster: &TestCluster| {
            let body = json!({ "model": cluster.model, "prompt": [1, 2, 3], "max_tokens": 5 });
            let answer = cluster.api.post_with("/v1/completions", ("x-tandem-debug", "route"), &body).await;
            assert_eq!(answer.status, 200, "{}", answer.text);
            answer.headers["x-tandem-route"].to_str().expect("ASCII").to_owned()
        };
        cluster.stop_worker("decode-0").await;
        assert_eq!(route(&cluster).await, "prefill=prefill-0,decode=prefill-0");
        cluster.add_worker("decode-1", Role::Decode).await;
        assert_eq!(route(&cluster).await, "prefill=prefill-0,decode=decode-1");
        cluster.stop_worker("prefill-0").await;
        assert_eq!(route(&cluster).await, "prefill=decode-1,decode=decode-1");
        cluster.stop_worker("decode-1").await;
        let none = cluster.api.complete(&cluster.model, &[1], json!({})).await;
        assert_eq!(none.status, 503);
        assert_eq!(none.headers["retry-after"], "1");
        assert_eq!(none.json["error"]["code"], "no_worker");
        cluster.close().await;
    });
}
