//! Placement by cost and roles that follow the load, through the public door.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::Duration;

use serde_json::{Value, json};
use tandem_chassis::seam;
use tandem_integration_tests::{Answer, Client, ProcessCluster, Spec, TestCluster, checkpoints, metric};

use crate::support::run;

/// Long enough for any machine; a test that needs it has failed.
const SOON: Duration = Duration::from_secs(120);

fn roles(rows: &[Value]) -> (usize, usize) {
    let of = |role| rows.iter().filter(|row| row["role"] == role).count();
    (of("prefill"), of("decode"))
}

/// Keeps so many requests going until told to stop. Every one must be answered whole.
async fn load(api: &Client, at_once: u32, prompt: u32, output: u32, stop: &AtomicBool, answered: &AtomicU32) {
    let clients = (0..at_once).map(|client| async move {
        let mut round = 0;
        while !stop.load(Ordering::Acquire) {
            round += 1;
            // No two prompts begin alike.
            let tokens: Vec<u32> = (0..prompt).map(|i| 10 + (client * 131 + round * 17 + i) % 200).collect();
            let answer = api.complete("qwen3", &tokens, json!({ "max_tokens": output })).await;
            assert_eq!(answer.status, 200, "{}", answer.text);
            assert_eq!(answer.json["usage"]["completion_tokens"], output, "{}", answer.text);
            answered.fetch_add(1, Ordering::AcqRel);
        }
    });
    futures_util::future::join_all(clients).await;
}

#[test]
fn roles_follow_a_load_that_turns_and_nothing_is_lost() {
    run(async {
        let model = checkpoints::named("qwen3");
        let model = model.to_str().expect("a path");
        let cluster = ProcessCluster::start(&[
            "--fake=qwen3-8b@h200,slow=10",
            "--model",
            model,
            "--prefill",
            "2",
            "--decode",
            "2",
            "--planner",
            "on",
        ])
        .await;
        let api = cluster.api.with_patience(SOON);
        // Short answers to long prompts, and then the reverse: more than two workers can decode.
        let (turn, end, answered) = (AtomicBool::new(false), AtomicBool::new(false), AtomicU32::new(0));
        let prompts = async {
            let some = async {
                while answered.load(Ordering::Acquire) < 12 {
                    seam::sleep(Duration::from_millis(20)).await;
                }
                turn.store(true, Ordering::Release);
            };
            tokio::join!(some, load(&api, 12, 1500, 4, &turn, &answered));
        };
        prompts.await;
        let flip = async {
            cluster.wait_for("a worker that prefilled decodes", |rows| roles(rows) == (1, 3)).await;
            end.store(true, Ordering::Release);
        };
        tokio::join!(flip, load(&api, 140, 40, 150, &end, &answered));
        let planned = cluster.admin.get("/admin/cluster").await.json["planner"].clone();
        assert_eq!(planned["mode"], "on");
        let last = planned["flips"].as_array().and_then(|flips| flips.last()).expect("a flip");
        assert_eq!((&last["from"], &last["to"]), (&json!("prefill"), &json!("decode")), "{planned:#}");
        assert!(last["reason"].as_str().is_some_and(|why| why.contains("1P3D")), "{planned:#}");
        let metrics = cluster.admin.get("/metrics").await.text;
        assert!(metric(&metrics, "tandem_planner_flips_total") >= 1.0, "{metrics}");
        assert!(metric(&metrics, "tandem_role_switch_seconds_count") >= 1.0, "{metrics}");
        for worker in ["prefill-0", "prefill-1", "decode-0", "decode-1"] {
            let state = cluster.state_of(worker).await;
            assert_eq!(
                (&state["running"], &state["leases"], &state["legs"]),
                (&json!(0), &json!(0), &json!(0))
            );
        }
        assert_eq!(cluster.interrupt().await, Some(0));
    });
}

fn spec() -> Spec {
    let spec = Spec::of(checkpoints::named("qwen3")).fake("qwen3-8b@h200").workers(2, 1, 0);
    Spec { policy: "cost".into(), ..spec }
}

#[test]
fn a_prompt_goes_where_its_beginning_is_cached() {
    run(async {
        let cluster = TestCluster::start(spec()).await;
        let body = |prompt: &[u32]| json!({ "model": cluster.model, "prompt": prompt, "max_tokens": 4 });
        let route = ("x-tandem-debug", "route");
        let prefill = |answer: &Answer| {
            let route = answer.headers["x-tandem-route"].to_str().expect("text");
            route.split([',', '=']).nth(1).expect("a worker").to_owned()
        };
        let mut cached = BTreeMap::new();
        for family in 0..6u32 {
            let prompt: Vec<u32> = (0..1000).map(|i| 10 + (family * 37 + i * 7) % 200).collect();
            let first = cluster.api.post_with("/v1/completions", route, &body(&prompt)).await;
            assert_eq!(first.status, 200, "{}", first.text);
            let worker = prefill(&first);
            let blocks = cached.entry(worker.clone()).or_insert(0);
            *blocks += 31;
            // A report says how much is cached and what it is.
            let heard =
                |row: &Value| row["id"] == *worker && row["blocks"]["cached"].as_u64() >= Some(*blocks);
            cluster.wait_for("its blocks are known", |rows| rows.iter().any(heard)).await;
            let mut longer = prompt.clone();
            longer.extend([7, 8, 9]);
            let second = cluster.api.post_with("/v1/completions", route, &body(&longer)).await;
            assert_eq!(prefill(&second), worker);
            assert_eq!(
                second.json["usage"]["prompt_tokens_details"]["cached_tokens"],
                31 * 32,
                "{}",
                second.text
            );
        }
        let metrics = cluster.admin.get("/metrics").await.text;
        assert!(metric(&metrics, "tandem_prefix_hit_tokens_total") >= f64::from(6 * 31 * 32));
        cluster.close().await;
    });
}

#[test]
fn a_decision_says_what_it_weighed() {
    run(async {
        let cluster = TestCluster::start(spec()).await;
        let body = json!({ "model": cluster.model, "prompt": [1, 2, 3], "max_tokens": 4 });
        cluster.api.post_with("/v1/completions", ("x-request-id", "why"), &body).await;
        let record = cluster.admin.get("/admin/requests/why").await.json;
        let facts = &record["events"][0]["facts"];
        assert!(facts["reason"].as_str().is_some_and(|reason| reason.contains("cost")), "{record:#}");
        let considered = facts["considered"].as_array().expect("routes");
        assert!(considered.len() > 1, "{record:#}");
        assert!(considered.iter().all(|route| route["terms"]["compute"].is_number()), "{record:#}");
        assert_eq!(facts["chosen"]["prefill"], considered[0]["prefill"]);
        cluster.close().await;
    });
}

#[test]
fn under_too_much_load_some_are_served_and_the_others_refused_at_the_door() {
    run(async {
        let slo = Some("ttft=50ms,tpot=1s".parse().expect("targets"));
        let cluster = TestCluster::start(Spec { slo, ..spec().fake("qwen3-8b@h200,slow=5") }).await;
        let complete = |which: u32| {
            // No two prompts begin alike.
            let prompt: Vec<u32> = (0..2000).map(|i| 10 + (which * 37 + i) % 200).collect();
            let (api, model) = (cluster.api.clone(), cluster.model.clone());
            async move { api.complete(&model, &prompt, json!({ "max_tokens": 2 })).await }
        };
        // Until the workers have measured themselves, everybody is let in; and nobody while they are busy with that.
        let flooded = async {
            loop {
                let answers = futures_util::future::join_all((0..32).map(complete)).await;
                let refused: Vec<Answer> =
                    answers.into_iter().filter(|answer| answer.status != 200).collect();
                if (1..32).contains(&refused.len()) {
                    return refused;
                }
            }
        };
        let refused = seam::timeout(SOON, flooded).await.expect("32 prompts at once take longer than one");
        for answer in &refused {
            assert_eq!(answer.status, 503, "{}", answer.text);
            assert_eq!(answer.json["error"]["code"], "overloaded", "{}", answer.text);
            assert!(answer.headers.contains_key("retry-after"), "{:?}", answer.headers);
        }
        // One alone takes longer than the target as well, and that is nobody's fault.
        let served = async { while complete(40).await.status != 200 {} };
        seam::timeout(SOON, served).await.expect("the door opens again");
        let metrics = cluster.admin.get("/metrics").await.text;
        assert!(metric(&metrics, "tandem_requests_shed_total") >= refused.len() as f64, "{metrics}");
        assert!(metric(&metrics, "tandem_slo_requests_total") >= 1.0, "{metrics}");
        cluster.close().await;
    });
}
