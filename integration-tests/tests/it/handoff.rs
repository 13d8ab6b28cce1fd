//! What a hand-off moves, when, and what is done with bytes that are not what was computed.

use serde_json::json;
use tandem_engine::fake::{Ordinary, oracle};
use tandem_integration_tests::{Spec, TestCluster, WireRouter, metric, wire};
use tandem_proto::v1::{self, event::Event};
use tandem_types::{Choice, SamplingParams};

use crate::support::{Random, run, tiny};

/// Sum of a metric over the workers whose id begins so.
async fn over_workers(cluster: &TestCluster, begins: &str, name: &str) -> f64 {
    let mut sum = 0.0;
    for worker in cluster.workers.iter().filter(|worker| worker.id.starts_with(begins)) {
        sum += metric(&worker.admin.get("/metrics").await.text, name);
    }
    sum
}

fn expected(prompt: &[u32], choice: u32, count: usize) -> Vec<u32> {
    let ordinary = Ordinary::read(&tiny()).expect("a tokenizer");
    oracle(&ordinary, prompt, &SamplingParams::default(), Choice(choice), count)
}

#[test]
fn a_long_prompt_is_pulled_while_it_is_computed_and_a_short_one_after() {
    run(async {
        // Half a second for each chunk of 512 tokens: the decode worker has all the time it needs.
        let fake = "qwen3-8b@h200,slow=40,page-bytes=16384";
        let spec = Spec { transport: "tcp".into(), ..Spec::of(tiny()).fake(fake) };
        let cluster = TestCluster::start(spec).await;
        let prompt = Random(5).prompt(2048);
        let answer = cluster.api.complete(&cluster.model, &prompt, json!({ "max_tokens": 3 })).await;
        assert_eq!(answer.token_ids(), expected(&prompt, 0, 3), "{}", answer.text);
        let moved = over_workers(&cluster, "decode", "tandem_kv_transfer_bytes_total").await;
        let exposed = over_workers(&cluster, "decode", "tandem_kv_transfer_exposed_bytes_total").await;
        assert_eq!(moved, 64.0 * 16384.0, "every block once");
        assert!(exposed <= moved / 2.0, "{exposed} of {moved} bytes came after the prompt was computed");

        let prompt = Random(6).prompt(200);
        let answer = cluster.api.complete(&cluster.model, &prompt, json!({ "max_tokens": 3 })).await;
        assert_eq!(answer.token_ids(), expected(&prompt, 0, 3), "{}", answer.text);
        let later = over_workers(&cluster, "decode", "tandem_kv_transfer_exposed_bytes_total").await;
        assert_eq!(later - exposed, 7.0 * 16384.0, "all of a short prompt comes after its seal");
        cluster.wait_until_idle().await;
        cluster.close().await;
    });
}

#[test]
fn a_request_that_ends_with_its_first_token_lets_go_of_who_followed() {
    run(async {
        let cluster = TestCluster::start(Spec::of(tiny()).fake("zero")).await;
        let prompt = Random(7).prompt(3000);
        let first = expected(&prompt, 0, 1);
        // The first token is a stop token: only the prefill worker reports the end.
        let extra = json!({ "max_tokens": 5, "stop_token_ids": first });
        let answer = cluster.api.complete(&cluster.model, &prompt, extra).await;
        assert_eq!(answer.status, 200, "{}", answer.text);
        assert_eq!(answer.json["choices"][0]["finish_reason"], "stop");
        assert_eq!(answer.json["usage"]["completion_tokens"], 1);
        cluster.wait_until_idle().await;
        cluster.close().await;
    });
}

#[test]
fn the_choices_of_a_prompt_compute_it_once_and_borrow_it_from_each_other() {
    run(async {
        let cluster = TestCluster::start(Spec::of(tiny()).workers(2, 2, 0).fake("zero")).await;
        let prompt = Random(8).prompt(300);
        let extra = json!({ "max_tokens": 4, "n": 3, "temperature": 1.0, "seed": 9 });
        let answer = cluster.api.complete(&cluster.model, &prompt, extra).await;
        assert_eq!(answer.status, 200, "{}", answer.text);
        let ordinary = Ordinary::read(&tiny()).expect("a tokenizer");
        let sampling = SamplingParams { temperature: 1.0, seed: 9, ..SamplingParams::default() };
        for choice in 0..3u32 {
            let tokens = &answer.json["choices"][choice as usize]["token_ids"];
            let expected = oracle(&ordinary, &prompt, &sampling, Choice(choice), 4);
            assert_eq!(tokens, &json!(expected), "choice {choice}");
        }
        assert_eq!(
            answer.json["usage"]["prompt_tokens_details"]["cached_tokens"], 0,
            "computed for this request"
        );
        // Round robin: choices 0 and 2 on one prefill worker, choice 1 on the other.
        let borrowed = over_workers(&cluster, "prefill", "tandem_prefix_borrowed_tokens_total").await;
        assert_eq!(borrowed, 288.0, "nine whole blocks, once");
        cluster.wait_until_idle().await;
        cluster.close().await;
    });
}

/// A prefill and a decode worker with small padded pages, and a session with each.
async fn pair(transport: &str) -> (TestCluster, WireRouter, WireRouter) {
    let spec = Spec { transport: transport.into(), ..Spec::of(tiny()).fake("zero,page-bytes=4096") };
    let cluster = TestCluster::start(spec).await;
    let prefill = WireRouter::connect(&cluster.grpc("prefill-0")).await;
    let decode = WireRouter::connect(&cluster.grpc("decode-0")).await;
    (cluster, prefill, decode)
}

/// The next attempt of a request, from this handle to its end.
fn go_on(start: &v1::Start, attempt: u32, handle: &v1::Handle) -> v1::Start {
    let inputs = vec![handle.clone()];
    v1::Start { attempt, after: 1, inputs, until: v1::Until::End as i32, ..start.clone() }
}

#[test]
fn a_page_that_is_spoilt_in_its_owners_pool_is_noticed_counted_and_never_decoded_from() {
    for transport in ["inproc", "shm", "tcp"] {
        run(async move {
            let (cluster, mut prefill, mut decode) = pair(transport).await;
            let prompt = Random(9).prompt(320);
            let start = wire::start(&prompt, 3, v1::Until::FirstToken);
            let leg = prefill.start(start.clone()).await;
            let (granted, _) = prefill.granted(leg).await;
            let handle = granted.handle.expect("a handle");
            let page = handle.groups[0].pages[3] as usize;
            cluster.spoil_kv("prefill-0", page * 4096 + 17);

            let leg = decode.start(go_on(&start, 2, &handle)).await;
            match decode.next(leg).await {
                Event::Failed(failed) => assert_eq!(failed.reason(), v1::FailReason::Corrupt, "{failed:?}"),
                other => panic!("{other:?} although a page is wrong"),
            }
            let noticed =
                over_workers(&cluster, "decode", "tandem_kv_checksum_failures_total{where=\"transfer\"")
                    .await;
            assert_eq!(noticed, 2.0, "fetched once more, and wrong again");
            let owned =
                over_workers(&cluster, "prefill", "tandem_kv_checksum_failures_total{where=\"pool\"").await;
            assert_eq!(owned, 1.0, "its owner looked and found it");

            // Its owner has forgotten the block and what follows it, so the prompt is computed again and right.
            let again = v1::Start { attempt: 3, ..start.clone() };
            let leg = prefill.start(again.clone()).await;
            let (granted, _) = prefill.granted(leg).await;
            assert_eq!(granted.cached_tokens, 3 * 32, "up to the spoilt block");
            let leg = decode.start(go_on(&start, 4, &granted.handle.expect("a handle"))).await;
            assert_eq!(decode.tokens(leg).await.expect("it ends well"), expected(&prompt, 0, 3));
            drop((prefill, decode));
            cluster.wait_until_idle().await;
            cluster.close().await;
        });
    }
}

#[test]
fn what_a_holder_lends_is_pulled_and_the_rest_is_computed() {
    run(async {
        let (cluster, mut prefill, mut decode) = pair("tcp").await;
        let prompt = Random(10).prompt(200);
        let leg = prefill.start(wire::start(&prompt, 1, v1::Until::End)).await;
        prefill.tokens(leg).await.expect("it ends well");

        let holder = v1::Holder {
            worker: "prefill-0".into(),
            incarnation: prefill.worker.incarnation,
            lender: cluster.grpc("prefill-0"),
            blocks: 6,
        };
        let longer = [&prompt[..], &[7; 20]].concat();
        let start = v1::Start { holders: vec![holder.clone()], ..wire::start(&longer, 4, v1::Until::End) };
        let leg = decode.start(start).await;
        assert_eq!(decode.tokens(leg).await.expect("it ends well"), expected(&longer, 0, 4));
        let borrowed = "tandem_prefix_borrowed_tokens_total";
        assert_eq!(over_workers(&cluster, "decode", borrowed).await, 192.0);

        // Nobody there, another start, or somebody who has nothing: then everything is computed.
        let nobody = v1::Holder { lender: "127.0.0.1:1".into(), worker: "x".into(), ..holder.clone() };
        let earlier = v1::Holder { incarnation: 1, ..holder.clone() };
        for (seed, holder) in [(11, nobody), (12, earlier), (13, holder)] {
            let prompt = Random(seed).prompt(200);
            let start = v1::Start { holders: vec![holder], ..wire::start(&prompt, 4, v1::Until::End) };
            let leg = decode.start(start).await;
            assert_eq!(decode.tokens(leg).await.expect("it ends well"), expected(&prompt, 0, 4));
        }
        assert_eq!(over_workers(&cluster, "decode", borrowed).await, 192.0);
        drop((prefill, decode));
        cluster.wait_until_idle().await;
        cluster.close().await;
    });
}
