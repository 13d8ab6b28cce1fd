//! What cannot be made to happen through the public door: keys that vanish, and puts that arrive late.

use std::sync::Arc;
use std::time::Duration;

use tandem_types::Epoch;

use crate::conformance::{until, worker};
use crate::store::{Change, Condition, Store};
use crate::{Embedded, Membership, Registration};

const SOON: Duration = Duration::from_secs(10);

fn put(registration: &Registration, under: u64) -> Change {
    let value = Some(serde_json::to_vec(registration).unwrap());
    Change { key: format!("/tandem/default/workers/{}", registration.id), value, registration: under }
}

#[tokio::test(start_paused = true)]
async fn a_key_that_somebody_deletes_is_put_again() {
    let cluster = Embedded::new();
    let guard = cluster.register(worker("w", 1)).await.unwrap();
    until(&cluster, SOON, "it is seen", |view| view.workers.contains_key("w")).await;
    let delete = Change { value: None, ..put(&worker("w", 1), 0) };
    let deleted = cluster.store().transact(Vec::new(), vec![delete]).await.unwrap().expect("applied");
    // At once, and not only when it is renewed.
    let soon = Duration::from_millis(200);
    until(&cluster, soon, "it is back", |view| view.revision > deleted && view.workers.contains_key("w"))
        .await;
    guard.leave().await;
}

#[tokio::test(start_paused = true)]
async fn a_put_of_ours_that_arrives_late_is_put_right() {
    let cluster = Embedded::new();
    let store = cluster.store();
    let guard = cluster.register(worker("w", 1)).await.unwrap();
    let newest = Registration { epoch: Epoch(2), ..worker("w", 1) };
    guard.update(newest.clone());
    until(&cluster, SOON, "it is seen", |view| view.workers.get("w") == Some(&newest)).await;
    // The first put of this start had got no answer in time; now it arrives, under a registration that will end.
    let forgotten = store.open(Duration::from_secs(5)).await.unwrap();
    let late =
        store.transact(Vec::new(), vec![put(&worker("w", 1), forgotten)]).await.unwrap().expect("applied");
    let right = |view: &crate::View| view.workers.get("w") == Some(&newest);
    until(&cluster, SOON, "it is put right", |view| view.revision > late && right(view)).await;
    let mut views = cluster.watch();
    let wrong = views.wait_for(|view| !right(view));
    assert!(tandem_chassis::seam::timeout(SOON, wrong).await.is_err(), "and stays when that one ends");
}

#[tokio::test(start_paused = true)]
async fn a_start_that_was_replaced_while_it_slept_does_not_come_back() {
    let cluster = Embedded::new();
    let store = cluster.store();
    let guard = cluster.register(worker("w", 1)).await.unwrap();
    // Its successor's put, which this member's watch has not brought yet.
    let registration = store.open(Duration::from_secs(3600)).await.unwrap();
    store.transact(Vec::new(), vec![put(&worker("w", 2), registration)]).await.unwrap().expect("applied");
    guard.update(Registration { epoch: Epoch(7), ..worker("w", 1) });
    let observer: Arc<dyn Membership> = Arc::new(cluster.member());
    let successor = |view: &crate::View| view.workers.get("w") == Some(&worker("w", 2));
    until(&*observer, SOON, "the successor is seen", successor).await;
    let wrong = Duration::from_secs(30);
    let mut views = observer.watch();
    let seen = tandem_chassis::seam::timeout(wrong, views.wait_for(|view| !successor(view))).await;
    assert!(seen.is_err(), "the predecessor was put again");
    drop(guard);
}

#[tokio::test(start_paused = true)]
async fn everything_of_one_transaction_has_one_revision_and_nothing_of_a_refused_one_is_done() {
    let cluster = Embedded::new();
    let store = cluster.store();
    let changes = || vec![put(&worker("a", 1), 0), put(&worker("b", 1), 0)];
    let done = store.transact(Vec::new(), changes()).await.unwrap().expect("applied");
    let at = |id: &str, revision| Condition { key: put(&worker(id, 1), 0).key, revision };
    assert_eq!(store.transact(vec![at("a", done), at("b", done + 1)], changes()).await, Ok(None));
    assert_eq!(store.transact(vec![at("c", 1)], changes()).await, Ok(None), "a missing key is at revision 0");
    let next = store.transact(vec![at("a", done), at("b", done), at("c", 0)], changes()).await;
    assert_eq!(next, Ok(Some(done + 1)));
    let ended = store.transact(Vec::new(), vec![put(&worker("d", 1), 99)]).await;
    assert!(ended.unwrap_err().contains("ended"));
}

#[tokio::test(start_paused = true)]
async fn a_watcher_that_is_far_behind_gets_a_snapshot() {
    let cluster = Embedded::new();
    let store = cluster.store();
    let mut news = store.watch("/tandem/default/").await.unwrap();
    assert!(news.recv().await.unwrap().snapshot);
    for epoch in 0..10_000 {
        let registration = Registration { epoch: Epoch(epoch), ..worker("w", 1) };
        store.transact(Vec::new(), vec![put(&registration, 0)]).await.unwrap().expect("applied");
    }
    // Behind by more than is remembered, and without a pause in between: it begins again, and misses nothing.
    let batch = news.recv().await.unwrap();
    assert!(batch.snapshot);
    assert_eq!(batch.keys.len(), 1);
    let last: Registration = serde_json::from_slice(batch.keys[0].1.as_ref().unwrap()).unwrap();
    assert_eq!(last.epoch, Epoch(9_999));
    store
        .transact(Vec::new(), vec![Change { value: None, ..put(&worker("w", 1), 0) }])
        .await
        .unwrap()
        .expect("applied");
    let batch = news.recv().await.unwrap();
    assert!(!batch.snapshot && batch.keys[0].1.is_none(), "{batch:?}");
}
