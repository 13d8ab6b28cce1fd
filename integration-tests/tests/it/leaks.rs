//! After the last request nothing is held, whatever was cancelled when.

use std::time::Duration;

use serde_json::json;
use tandem_chassis::group::Group;
use tandem_chassis::seam;
use tandem_integration_tests::{ProcessCluster, Spec, TestCluster};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::support::{Random, concurrently, run, seed, tiny};

const REQUESTS: usize = 1000;

/// A third of the requests leave at a moment drawn from the seed: before the first token, in the middle of the
/// hand-off, or while decoding.
async fn storm(cluster: &TestCluster, requests: usize, latest_ms: u64) {
    let seed = seed();
    concurrently(requests, 32, |index| {
        let mut random = Random(seed ^ (index as u64) << 24);
        let length = 1 + random.below(300) as usize;
        let body = json!({
            "model": cluster.model, "prompt": random.prompt(length), "max_tokens": 1 + random.below(40),
            "ignore_eos": true, "stream": true, "temperature": 0,
        });
        let leaves = index.is_multiple_of(3).then(|| Duration::from_micros(random.below(latest_ms * 1000)));
        let api = cluster.api.clone();
        async move {
            let whole = async {
                let events = api.stream("/v1/completions", &body).await.expect("it begins");
                assert_eq!(events.status, 200);
                let events = events.rest().await;
                assert_eq!(events.last().map(String::as_str), Some("[DONE]"), "{events:?}");
            };
            match leaves {
                None => whole.await,
                Some(moment) => drop(seam::timeout(moment, whole).await),
            }
        }
    })
    .await;
}

#[test]
fn a_thousand_requests_a_third_of_them_cancelled_leave_nothing_on_real_engines() {
    run(async {
        let cluster = TestCluster::start(Spec { kv_bytes: 8 << 20, ..Spec::of(tiny()) }).await;
        storm(&cluster, REQUESTS, 60).await;
        let took = cluster.wait_until_idle().await;
        assert!(took < Duration::from_secs(1), "{took:?}");
        cluster.close().await;
    });
}

#[test]
fn a_thousand_requests_a_third_of_them_cancelled_leave_nothing_on_paced_workers_over_tcp() {
    run(async {
        let spec =
            Spec { transport: "tcp".into(), ..Spec::of(tiny()).workers(2, 2, 0).fake("paced:3ms,1ms") };
        let cluster = TestCluster::start(spec).await;
        storm(&cluster, REQUESTS, 30).await;
        let took = cluster.wait_until_idle().await;
        assert!(took < Duration::from_secs(1), "{took:?}");
        cluster.close().await;
    });
}

#[test]
fn a_pool_that_is_too_small_for_everybody_preempts_and_still_answers_everybody() {
    run(async {
        // Room for about six of these sequences; the router places the preempted again.
        let spec = Spec { kv_bytes: 48 * 32 * 1024, ..Spec::of(tiny()).workers(0, 0, 1).fake("zero") };
        let cluster = TestCluster::start(spec).await;
        let answers = concurrently(40, 16, |index| {
            let prompt = Random(index as u64).prompt(60);
            let (api, model) = (cluster.api.clone(), cluster.model.clone());
            async move { api.complete(&model, &prompt, json!({ "max_tokens": 200 })).await }
        })
        .await;
        for answer in &answers {
            assert_eq!(answer.status, 200, "{}", answer.text);
            assert_eq!(answer.token_ids().len(), 200);
        }
        cluster.wait_until_idle().await;
        cluster.close().await;
    });
}

/// Connections of the next test, and what one may cost while it lies idle.
const IDLE: u64 = 2000;
const IDLE_BYTES: u64 = 5 << 10;

/// Waits until a router holds no more than so much; a minute at most.
async fn until_it_holds(router: Group, bytes: u64, what: &str) {
    for _ in 0..120 {
        if router.resident_bytes() <= bytes {
            return;
        }
        seam::sleep(Duration::from_millis(500)).await;
    }
    panic!("{what}: {} bytes, not {bytes}", router.resident_bytes());
}

#[test]
fn a_connection_that_lies_idle_costs_little_and_is_given_back() {
    run(async {
        let cluster =
            ProcessCluster::start(&["--processes", "--fake=zero", "--prefill", "1", "--decode", "1"]).await;
        let router = Group::of(cluster.admin.get("/admin/state").await.json["pid"].as_i64().expect("a pid"));
        let address = cluster.address;
        let ask = |_| async move {
            let mut stream = seam::connect_tcp(address).await.expect("it listens");
            stream.write_all(b"GET /v1/models HTTP/1.1\r\nhost: a\r\n\r\n").await.expect("it is open");
            let read = stream.read(&mut [0; 4096]).await.expect("it is open");
            assert!(read > 0);
            stream
        };
        // What the first of everything takes is no connection's.
        concurrently(200, 32, ask).await;
        seam::sleep(Duration::from_secs(6)).await;
        let rest = router.resident_bytes();
        let open = concurrently(IDLE as usize, 32, ask).await;
        until_it_holds(router, rest + IDLE * IDLE_BYTES, "idle").await;
        drop(open);
        until_it_holds(router, rest + IDLE * IDLE_BYTES / 3, "gone").await;
        assert_eq!(cluster.interrupt().await, Some(0));
    });
}
