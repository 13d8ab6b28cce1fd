//! What operators see and can do.

use serde_json::{Value, json};
use tandem_integration_tests::{Spec, TestCluster};

use crate::support::{run, tiny};

async fn fake(prefill: u32, decode: u32) -> TestCluster {
    TestCluster::start(Spec::of(tiny()).workers(prefill, decode, 0).fake("zero")).await
}

async fn route(cluster: &TestCluster) -> String {
    let body = json!({ "model": cluster.model, "prompt": [1, 2, 3], "max_tokens": 4 });
    let answer = cluster.api.post_with("/v1/completions", ("x-tandem-debug", "route"), &body).await;
    assert_eq!(answer.status, 200, "{}", answer.text);
    answer.headers["x-tandem-route"].to_str().expect("ASCII").to_owned()
}

fn state_of<'a>(rows: &'a [Value], id: &str) -> &'a Value {
    rows.iter().find(|row| row["id"] == id).map_or(&Value::Null, |row| row)
}

#[test]
fn a_role_order_really_switches_the_role_and_the_routes() {
    run(async {
        let cluster = fake(2, 1).await;
        let path = "/admin/workers/prefill-1/role";
        let ordered = cluster.admin.post(path, &json!({ "role": "decode" })).await;
        assert_eq!(ordered.status, 200, "{}", ordered.text);
        cluster
            .wait_for("the role is taken", |rows| {
                let row = state_of(rows, "prefill-1");
                row["role"] == "decode" && row["epoch"] == 1 && row["state"] == "ready"
            })
            .await;
        let mut decoders = std::collections::BTreeSet::new();
        for _ in 0..6 {
            let route = route(&cluster).await;
            assert!(route.starts_with("prefill=prefill-0,"), "{route}");
            decoders.insert(route);
        }
        assert_eq!(decoders.len(), 2, "both decode now: {decoders:?}");
        let wrong = cluster.admin.post(path, &json!({ "role": "cook" })).await;
        assert_eq!(wrong.status, 400);
        let unknown = cluster.admin.post("/admin/workers/nobody/role", &json!({ "role": "decode" })).await;
        assert_eq!(unknown.status, 404);
        cluster.close().await;
    });
}

#[test]
fn a_cordoned_worker_gets_no_new_work_and_a_drained_one_neither() {
    run(async {
        let cluster = fake(2, 2).await;
        assert_eq!(cluster.admin.post("/admin/workers/prefill-0/cordon", &json!({})).await.status, 200);
        assert_eq!(cluster.admin.post("/admin/workers/decode-1/drain", &json!({})).await.status, 200);
        cluster.wait_for("it drains", |rows| state_of(rows, "decode-1")["state"] == "draining").await;
        for _ in 0..6 {
            assert_eq!(route(&cluster).await, "prefill=prefill-1,decode=decode-0");
        }
        let state = cluster.workers[3].admin.get("/admin/state").await.json;
        assert_eq!((&state["id"], &state["state"]), (&json!("decode-1"), &json!("draining")));
        assert_eq!(cluster.workers[3].admin.get("/readyz").await.status, 503);
        cluster.close().await;
    });
}

#[test]
fn every_process_shows_its_state_its_configuration_and_its_metrics() {
    run(async {
        let cluster = fake(1, 1).await;
        route(&cluster).await;
        let mut clients = vec![("router", cluster.admin.clone())];
        clients.extend(cluster.workers.iter().map(|worker| ("worker", worker.admin.clone())));
        for (kind, admin) in clients {
            let state = admin.get("/admin/state").await.json;
            for field in [
                "id",
                "kind",
                "pid",
                "command",
                "model",
                "epoch",
                "incarnation",
                "state",
                "running",
                "waiting",
                "leases",
                "blocks",
                "cpu_seconds",
                "resident_bytes",
                "version",
            ] {
                assert!(!state[field].is_null(), "{kind} has no {field}: {state:#}");
            }
            assert_eq!(state["kind"], kind);
            let blocks = |name: &str| state["blocks"][name].as_u64().expect("a number");
            assert_eq!(blocks("total"), blocks("free") + blocks("cached") + blocks("in_use"));
            assert_eq!(admin.get("/livez").await.status, 200);
            assert_eq!(admin.get("/readyz").await.status, 200);
            assert!(admin.get("/admin/config").await.json.is_object());
            assert_eq!(admin.get("/nope").await.status, 404);
            let metrics = admin.get("/metrics").await.text;
            for name in [
                "vllm:num_requests_running{",
                "vllm:num_requests_waiting{",
                "vllm:time_to_first_token_seconds_bucket{",
                "vllm:e2e_request_latency_seconds_count{",
                "vllm:prompt_tokens_total{",
                "vllm:generation_tokens_total{",
                "vllm:request_success_total{",
            ] {
                assert!(metrics.contains(name), "{kind} has no {name}");
            }
            assert_eq!(metrics.contains("vllm:kv_cache_usage_perc{"), kind == "worker");
        }
        let cluster_view = cluster.admin.get("/admin/cluster").await.json;
        for field in ["id", "kind", "role", "epoch", "state", "address", "admin", "model"] {
            assert!(!cluster_view["workers"][0][field].is_null(), "{field}");
        }
        assert_eq!(cluster_view["routers"][0]["id"], "router-0");
        cluster.close().await;
    });
}

#[test]
fn a_request_can_be_looked_up_by_the_name_its_client_gave_it() {
    run(async {
        let cluster = fake(1, 1).await;
        let body = json!({ "model": cluster.model, "prompt": [1, 2, 3], "max_tokens": 4 });
        let answer = cluster.api.post_with("/v1/completions", ("x-request-id", "my-request-7"), &body).await;
        assert_eq!(answer.headers["x-request-id"], "my-request-7");
        let record = cluster.admin.get("/admin/requests/my-request-7").await.json;
        let what: Vec<&str> =
            record["events"].as_array().expect("events").iter().filter_map(|e| e["what"].as_str()).collect();
        assert_eq!(what, ["route", "start", "decode", "start", "end"], "{record:#}");
        assert_eq!(record["end"], "length");
        let candidates = record["events"][0]["facts"]["candidates"].as_array().expect("candidates");
        assert_eq!(candidates.len(), 2);
        assert_eq!(cluster.admin.get("/admin/requests/nobody").await.status, 404);
        cluster.close().await;
    });
}
