//! After the last request nothing is held, whatever was cancelled when.

use std::time::Duration;

use serde_json::json;
use tandem_chassis::seam;
use tandem_integration_tests::{Spec, TestCluster};

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
