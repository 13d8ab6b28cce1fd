//! What a client sees when something breaks: one test per row of the table of that name in `docs/faults.md`.
//!
//! Workers are processes of their own with the fake engine, 20 ms a token, so that there is a middle to break in.

use std::time::Duration;

use serde_json::{Value, json};
use tandem_integration_tests::cluster::ready;
use tandem_integration_tests::processes::{ProcessCluster, StartedAgain};
use tandem_integration_tests::{Spec, TestCluster, checkpoints};
use tandem_types::Role;

use crate::support::{Random, concurrently, run, tiny};

const MODEL: &str = "qwen3";

async fn cluster(fake: &str, prefill: u32, decode: u32) -> ProcessCluster {
    let model = checkpoints::named(MODEL);
    let (fake, prefill, decode) = (format!("--fake={fake}"), prefill.to_string(), decode.to_string());
    let model = model.to_str().expect("a path");
    let arguments = ["--processes", &fake, "--model", model, "--prefill", &prefill, "--decode", &decode];
    ProcessCluster::start(&arguments).await
}

fn prompt(n: usize) -> Vec<u32> {
    Random(n as u64).prompt(20)
}

async fn tokens(cluster: &ProcessCluster, n: usize, max_tokens: u32) -> Vec<u32> {
    let answer = cluster.api.complete(MODEL, &prompt(n), json!({ "max_tokens": max_tokens })).await;
    assert_eq!(answer.status, 200, "{}", answer.text);
    answer.token_ids()
}

/// Everybody gets an answer.
async fn all_fine(cluster: &ProcessCluster, requests: usize) {
    let lengths = concurrently(requests, 8, |n| async move { tokens(cluster, n, 3).await.len() }).await;
    assert!(lengths.into_iter().all(|length| length == 3));
}

/// The first worker of a role that runs something.
async fn busy(cluster: &ProcessCluster, role: &str) -> String {
    cluster.wait_for("a worker is at work", |rows| rows.iter().any(|row| at_work(row, role))).await;
    let rows = cluster.admin.get("/admin/cluster").await.json["workers"].clone();
    let row = rows.as_array().into_iter().flatten().find(|row| at_work(row, role));
    row.and_then(|row| row["id"].as_str()).expect("it is at work for long enough to be seen").to_owned()
}

fn at_work(row: &Value, role: &str) -> bool {
    row["role"] == role && row["in_flight"].as_u64() > Some(0)
}

/// Reads a stream until some tokens have come, breaks something, and reads what is left.
async fn broken_in_the_middle(cluster: &ProcessCluster, breaks: impl AsyncFnOnce()) -> Vec<String> {
    let body = json!({
        "model": MODEL, "prompt": prompt(1), "max_tokens": 2000, "stream": true, "ignore_eos": true,
    });
    let mut events = cluster.api.stream("/v1/completions", &body).await.expect("it begins");
    assert_eq!(events.status, 200);
    for _ in 0..5 {
        events.next().await.expect("more is to come");
    }
    breaks().await;
    events.rest().await
}

fn ends_loudly(events: &[String]) {
    let last: Value = serde_json::from_str(events.last().expect("an event")).unwrap_or_default();
    assert_eq!(last["error"]["code"], "upstream_error", "{events:?}");
    assert!(events.iter().all(|event| event != "[DONE]"));
}

#[test]
fn a_worker_killed_in_the_middle_of_a_stream_ends_it_with_an_error() {
    run(async {
        let cluster = cluster("paced:10ms,20ms", 1, 1).await;
        let rest = broken_in_the_middle(&cluster, async || {
            cluster.kill("decode-0").await;
        })
        .await;
        ends_loudly(&rest);
    });
}

#[test]
fn a_worker_killed_before_the_first_token_is_replaced() {
    run(async {
        let cluster = cluster("paced:2s,1ms", 2, 1).await;
        let kill = async {
            let victim = busy(&cluster, "prefill").await;
            cluster.kill(&victim).await;
        };
        let (got, ()) = tokio::join!(tokens(&cluster, 1, 5), kill);
        assert_eq!(got.len(), 5);
    });
}

#[test]
fn a_worker_killed_under_an_answer_that_is_not_streamed_is_replaced_and_nobody_sees_it() {
    run(async {
        let cluster = cluster("paced:10ms,20ms", 1, 2).await;
        let expected = tokens(&cluster, 1, 150).await;
        let kill = async {
            let victim = busy(&cluster, "decode").await;
            cluster.kill(&victim).await;
        };
        let (got, ()) = tokio::join!(tokens(&cluster, 1, 150), kill);
        assert_eq!(got, expected);
    });
}

#[test]
fn a_worker_that_hangs_in_the_middle_of_a_stream_ends_it_with_an_error() {
    run(async {
        let cluster = cluster("paced:10ms,20ms", 1, 1).await;
        let stopped = std::cell::OnceCell::new();
        let rest = broken_in_the_middle(&cluster, async || {
            // What is stopped does not end with the rest.
            let _ = stopped.set(cluster.stop("decode-0").await);
        })
        .await;
        ProcessCluster::end(stopped.get().expect("it was stopped"));
        ends_loudly(&rest);
    });
}

#[test]
fn one_of_two_workers_that_hangs_is_ejected_and_everybody_is_answered() {
    run(async {
        let cluster = cluster("zero", 2, 2).await;
        all_fine(&cluster, 16).await;
        let (prefill, decode) = (cluster.stop("prefill-1").await, cluster.stop("decode-1").await);
        all_fine(&cluster, 40).await;
        cluster.wait_for("both are out", |rows| ready(rows) == 2).await;
        all_fine(&cluster, 40).await;
        for state in [prefill, decode] {
            ProcessCluster::end(&state);
        }
    });
}

#[test]
fn one_of_two_workers_that_fails_every_step_is_avoided_and_everybody_is_answered() {
    run(async {
        let spec = Spec { policy: "cost".into(), ..Spec::of(tiny()).workers(1, 1, 0).fake("zero") };
        let mut cluster = TestCluster::start(spec).await;
        cluster.set_fake("zero,fail=1");
        cluster.add_worker("prefill-1", Role::Prefill).await;
        let (api, model) = (&cluster.api, &cluster.model);
        let mut avoided = false;
        for round in 0..200 {
            let answers = concurrently(4, 4, |n| async move {
                api.complete(model, &prompt(4 * round + n), json!({ "max_tokens": 3 })).await
            });
            for answer in answers.await {
                assert_eq!(answer.status, 200, "{}", answer.text);
            }
            // Three failures in a row, and it is left alone for a second.
            let rows = cluster.admin.get("/admin/cluster").await.json["workers"].clone();
            let failing = rows.as_array().into_iter().flatten().find(|row| row["id"] == "prefill-1");
            avoided |= failing.expect("it is known")["state"] == "suspect";
            if avoided && round >= 20 {
                break;
            }
        }
        assert!(avoided);
        cluster.wait_until_idle().await;
        cluster.close().await;
    });
}

#[test]
fn workers_that_died_at_rest_are_nobodys_trouble() {
    run(async {
        let cluster = cluster("zero", 2, 2).await;
        cluster.kill("prefill-0").await;
        cluster.kill("decode-1").await;
        all_fine(&cluster, 40).await;
    });
}

#[test]
fn without_any_worker_the_answer_is_503_at_once_with_a_time_to_try_again() {
    run(async {
        let cluster = cluster("zero", 1, 1).await;
        cluster.kill("prefill-0").await;
        cluster.kill("decode-0").await;
        cluster
            .wait_for("both are known to be gone", |rows| {
                rows.iter().all(|row| row["state"] != "ready" && row["state"] != "suspect")
            })
            .await;
        let answer = cluster.api.complete(MODEL, &prompt(1), json!({})).await;
        assert_eq!((answer.status, &answer.json["error"]["code"]), (503, &json!("no_worker")));
        assert_eq!(answer.headers["retry-after"], "1");
    });
}

#[test]
fn a_worker_that_comes_back_is_used_as_soon_as_it_is_ready() {
    run(async {
        let cluster = cluster("zero", 1, 1).await;
        let state = cluster.kill("decode-0").await;
        let _again = StartedAgain::by(&state);
        let wanted = |row: &Value| row["id"] == "decode-0" && row["incarnation"] != state["incarnation"];
        cluster
            .wait_for("it is back", |rows| rows.iter().any(|row| wanted(row) && row["state"] == "ready"))
            .await;
        let body = json!({ "model": MODEL, "prompt": prompt(1), "max_tokens": 3 });
        let answer = cluster.api.post_with("/v1/completions", ("x-tandem-debug", "route"), &body).await;
        assert_eq!(answer.status, 200, "{}", answer.text);
        assert!(
            answer.headers["x-tandem-route"].to_str().is_ok_and(|route| route.ends_with("decode=decode-0"))
        );
    });
}

#[test]
fn a_client_that_leaves_frees_every_worker() {
    run(async {
        let spec = Spec::of(tiny()).workers(1, 1, 0).fake("paced:10ms,20ms");
        let cluster = TestCluster::start(spec).await;
        let body = json!({
            "model": cluster.model, "prompt": prompt(1), "max_tokens": 2000, "stream": true, "ignore_eos": true,
        });
        let mut events = cluster.api.stream("/v1/completions", &body).await.expect("it begins");
        events.next().await.expect("a first token");
        drop(events);
        let took = cluster.wait_until_idle().await;
        // The answer itself would take 40 s.
        assert!(took < Duration::from_secs(10), "{took:?}");
        cluster.close().await;
    });
}

#[test]
fn a_prompt_that_no_pool_can_hold_is_the_clients_mistake() {
    run(async {
        let spec = Spec { kv_bytes: 4 * 32 * 1024, ..Spec::of(tiny()).workers(2, 1, 0) };
        let cluster = TestCluster::start(spec).await;
        let long = Random(1).prompt(1000);
        let answer = cluster.api.complete(&cluster.model, &long, json!({ "max_tokens": 1 })).await;
        assert_eq!(answer.status, 400, "{}", answer.text);
        assert_eq!(answer.json["error"]["code"], "context_length_exceeded");
        cluster.wait_until_idle().await;
        cluster.close().await;
    });
}

#[test]
fn a_prefill_worker_killed_under_load_is_replaced_and_a_dead_decode_worker_is_nobodys_trouble() {
    run(async {
        let cluster = cluster("paced:50ms,1ms", 2, 2).await;
        let kill = async {
            let victim = busy(&cluster, "prefill").await;
            cluster.kill(&victim).await;
            cluster.kill("decode-0").await;
        };
        tokio::join!(all_fine(&cluster, 60), kill);
        all_fine(&cluster, 20).await;
    });
}
