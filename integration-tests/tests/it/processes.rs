//! Real processes, started by the real `tandem up`.

use std::process::Command;
use std::time::Duration;

use serde_json::{Value, json};
use tandem_chassis::seam;
use tandem_integration_tests::cluster::ready;
use tandem_integration_tests::processes::{StartedAgain, tandem};
use tandem_integration_tests::{ProcessCluster, checkpoints};

use crate::support::{concurrently, run};

/// What `tandem status --json` says.
async fn status(cluster: &ProcessCluster) -> Value {
    let admin = format!("http://{}", cluster.admin_address);
    let output = tokio::task::spawn_blocking(move || {
        Command::new(tandem()).args(["status", "--json", "--admin", &admin]).output().expect("it runs")
    });
    let output = output.await.expect("the runner lives");
    assert!(output.status.success(), "{output:?}");
    serde_json::from_slice(&output.stdout).expect("JSON")
}

async fn all_succeed(cluster: &ProcessCluster, model: &str, requests: usize) {
    let answers = concurrently(requests, 4, |index| {
        let (api, model) = (cluster.api.clone(), model.to_owned());
        async move { api.complete(&model, &[1, 2, index as u32], json!({ "max_tokens": 8 })).await }
    })
    .await;
    for answer in answers {
        assert_eq!(answer.status, 200, "{}", answer.text);
    }
}

#[test]
fn up_without_arguments_answers_with_the_demo_model_and_ends_well() {
    run(async {
        let cluster = ProcessCluster::start(&[]).await;
        assert_eq!(cluster.admin.get("/readyz").await.status, 200);
        let body = json!({ "model": "demo", "messages": [{ "role": "user", "content": "Say hello" }] });
        let answer = cluster.api.post("/v1/chat/completions", &body).await;
        assert_eq!(answer.status, 200, "{}", answer.text);
        let text = answer.json["choices"][0]["message"]["content"].as_str().expect("text").to_lowercase();
        assert!(text.starts_with("hello"), "{text}");
        let url = format!("http://{}", cluster.address);
        let chat = tokio::task::spawn_blocking(move || {
            use std::io::Write;
            let mut chat = Command::new(tandem())
                .args(["chat", "--url", &url])
                .stdin(std::process::Stdio::piped())
                .stdout(std::process::Stdio::piped())
                .spawn()
                .expect("it runs");
            chat.stdin.take().expect("piped").write_all(b"What is 2+2?\n/quit\n").expect("it reads");
            chat.wait_with_output().expect("it ends")
        });
        let chat = chat.await.expect("the runner lives");
        assert!(chat.status.success() && !chat.stdout.trim_ascii().is_empty(), "{chat:?}");
        assert_eq!(cluster.interrupt().await, Some(0));
    });
}

#[test]
fn a_killed_worker_is_survived_and_taken_back_when_its_command_starts_it_again() {
    run(async {
        let model = checkpoints::named("qwen3");
        let arguments = [
            "--processes",
            "--fake",
            "--model",
            model.to_str().expect("a path"),
            "--prefill",
            "2",
            "--decode",
            "2",
        ];
        let cluster = ProcessCluster::start(&arguments).await;
        let seen = status(&cluster).await;
        assert_eq!(seen["workers"].as_array().map(Vec::len), Some(4), "{seen:#}");
        assert_eq!(seen["routers"].as_array().map(Vec::len), Some(1), "{seen:#}");
        all_succeed(&cluster, "qwen3", 20).await;
        let mut started_again = Vec::new();
        for victim in ["decode-0", "prefill-1"] {
            let state = cluster.kill(victim).await;
            seam::sleep(Duration::from_secs(1)).await;
            all_succeed(&cluster, "qwen3", 40).await;

            started_again.push(StartedAgain::by(&state));
            cluster
                .wait_for("the worker is back as another incarnation", |rows| {
                    ready(rows) == 4
                        && rows
                            .iter()
                            .any(|row| row["id"] == victim && row["incarnation"] != state["incarnation"])
                })
                .await;
            all_succeed(&cluster, "qwen3", 20).await;
            let legs = cluster.state_of(victim).await;
            assert_eq!(legs["state"], "ready");
            let served = metric(&cluster, victim, "tandem_legs_total").await;
            assert!(served > 0.0, "it takes work again");
        }
        assert_eq!(cluster.interrupt().await, Some(0));
    });
}

/// The sum of a worker's metric over its labels.
async fn metric(cluster: &ProcessCluster, worker: &str, name: &str) -> f64 {
    let rows = cluster.admin.get("/admin/cluster").await.json;
    let row = rows["workers"].as_array().expect("workers").iter().find(|row| row["id"] == worker).cloned();
    let admin = row.expect("a worker")["admin"].as_str().expect("an address").parse().expect("an address");
    let text = tandem_integration_tests::Client::new(admin).get("/metrics").await.text;
    let lines = text.lines().filter(|line| line.starts_with(name));
    lines.filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok()).sum()
}

#[test]
fn without_decode_workers_prefill_workers_decode_and_the_reverse_across_processes() {
    run(async {
        let model = checkpoints::named("qwen3");
        let cluster =
            ProcessCluster::start(&["--processes", "--fake", "--model", model.to_str().expect("a path")])
                .await;
        let state = cluster.kill("decode-0").await;
        seam::sleep(Duration::from_secs(1)).await;
        all_succeed(&cluster, "qwen3", 10).await;
        let _again = StartedAgain::by(&state);
        cluster.wait_for("the decode worker is back", |rows| ready(rows) == 2).await;
        cluster.kill("prefill-0").await;
        seam::sleep(Duration::from_secs(1)).await;
        all_succeed(&cluster, "qwen3", 10).await;
        assert_eq!(cluster.interrupt().await, Some(0));
    });
}

#[test]
fn a_wrong_option_is_answered_by_the_right_one() {
    for (arguments, part) in [
        (&["up", "--prefil", "2"][..], "--prefill"),
        (&["upp"], "tandem up"),
        (&["top"], "not in this version"),
        (&["bench", "--concurency", "4"], "--concurrency"),
        (&["bench"], "exactly one of --concurrency N, --rate R and --trace FILE"),
        (&["sim", "--split", "3P3D"], "not a split of 8 workers"),
        (&["sim", "--benchmarks", "speed", "--rows", "x"], "which is made whole"),
        (&["sim", "--benchmarks", "shift", "--rows", "x"], "no row's name contains \"x\""),
        (&["up", "--encoder", "1"], "no encoder"),
        (&["worker", "--model", "x"], "--etcd URL"),
    ] {
        let output = Command::new(tandem()).args(arguments).output().expect("it runs");
        assert_eq!(output.status.code(), Some(2), "{arguments:?}: {output:?}");
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(said.contains(part), "{arguments:?}: {said}");
    }
}
