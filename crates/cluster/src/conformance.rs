//! What every membership must hold, whatever store is under it.

use std::sync::Arc;
use std::time::Duration;

use serde_json::json;
use tandem_chassis::seam;
use tandem_types::{Epoch, Incarnation, Role};

use crate::{By, Kind, Membership, Registration, RoleError, RoleOrder, View};

/// A registration to test with.
pub fn worker(id: &str, incarnation: u64) -> Registration {
    Registration {
        id: id.to_owned(),
        kind: Kind::Worker,
        incarnation: Incarnation(incarnation),
        role: Some(Role::Mixed),
        address: "127.0.0.1:1".to_owned(),
        ..Registration::default()
    }
}

/// Waits until a member's view is as wanted.
///
/// # Panics
/// After `limit`.
pub async fn until(member: &dyn Membership, limit: Duration, what: &str, wanted: impl Fn(&View) -> bool) {
    let mut views = member.watch();
    let seen = seam::timeout(limit, views.wait_for(|view| wanted(view))).await.map(|found| found.is_ok());
    let view = member.watch().borrow().clone();
    assert!(matches!(seen, Ok(true)), "{what} within {limit:?}; the view is {view:#?}");
}

const SOON: Duration = Duration::from_secs(10);

/// Runs the suite with two members of one fresh cluster.
///
/// # Panics
/// If they do not hold what a membership must.
pub async fn run(one: Arc<dyn Membership>, other: Arc<dyn Membership>) {
    members_see_each_other_come_change_and_go(&*one, &*other).await;
    a_dropped_guard_lets_go(&*one, &*other).await;
    a_restarted_worker_replaces_its_predecessor(&*one, &*other).await;
    roles_are_ordered_for_one_incarnation_and_epoch(&*one, &*other).await;
    one_leads_at_a_time(&one, &other).await;
    knobs_reach_everybody(&*one, &*other).await;
}

async fn members_see_each_other_come_change_and_go(one: &dyn Membership, other: &dyn Membership) {
    let guard = one.register(worker("w-0", 1)).await.expect("it registers");
    let router = Registration { id: "r-0".into(), kind: Kind::Router, ..Registration::default() };
    let second = other.register(router).await.expect("it registers");
    for member in [one, other] {
        until(member, SOON, "both are seen", |view| {
            view.connected && view.workers.contains_key("w-0") && view.routers.contains_key("r-0")
        })
        .await;
    }
    guard.update(Registration { epoch: Epoch(3), role: Some(Role::Decode), ..worker("w-0", 1) });
    until(other, SOON, "the change is seen", |view| {
        view.workers.get("w-0").is_some_and(|w| w.epoch == Epoch(3) && w.role == Some(Role::Decode))
    })
    .await;
    guard.leave().await;
    until(other, SOON, "the worker is gone", |view| !view.workers.contains_key("w-0")).await;
    second.leave().await;
    until(one, SOON, "the router is gone", |view| view.routers.is_empty()).await;
}

async fn a_dropped_guard_lets_go(one: &dyn Membership, other: &dyn Membership) {
    let guard = one.register(worker("w-1", 1)).await.expect("it registers");
    until(other, SOON, "it is seen", |view| view.workers.contains_key("w-1")).await;
    drop(guard);
    until(other, SOON, "it is gone", |view| !view.workers.contains_key("w-1")).await;
}

async fn a_restarted_worker_replaces_its_predecessor(one: &dyn Membership, other: &dyn Membership) {
    let first = one.register(worker("w-2", 1)).await.expect("it registers");
    let second = other.register(worker("w-2", 2)).await.expect("it registers again");
    let newer = |view: &View| view.workers.get("w-2").is_some_and(|w| w.incarnation == Incarnation(2));
    until(one, SOON, "the newer start is seen", newer).await;
    // The old one's registration ends; the new one's key must stay.
    first.leave().await;
    other.set_config(json!({ "after": "leave" })).await.expect("the store answers");
    until(one, SOON, "a later change is seen", |view| view.config == Some(json!({ "after": "leave" }))).await;
    until(one, SOON, "the newer start is still there", newer).await;
    second.leave().await;
    until(one, SOON, "it is gone", |view| view.workers.is_empty()).await;
}

async fn roles_are_ordered_for_one_incarnation_and_epoch(one: &dyn Membership, other: &dyn Membership) {
    let order = |incarnation, epoch| RoleOrder {
        incarnation: Incarnation(incarnation),
        expected_epoch: Epoch(epoch),
        role: Role::Prefill,
        by: By::Operator,
        until: None,
    };
    let unknown = other.order_role("nobody", order(1, 0)).await;
    assert_eq!(unknown, Err(RoleError::Unknown("nobody".into())));
    let guard = one.register(worker("w-3", 5)).await.expect("it registers");
    until(other, SOON, "it is seen", |view| view.workers.contains_key("w-3")).await;
    for stale in [order(4, 0), order(5, 1)] {
        let refused = other.order_role("w-3", stale).await;
        assert!(matches!(refused, Err(RoleError::Stale { .. })), "{refused:?}");
    }
    other.order_role("w-3", order(5, 0)).await.expect("it fits");
    until(one, SOON, "the order is seen", |view| view.roles.get("w-3") == Some(&order(5, 0))).await;
    guard.leave().await;
}

async fn one_leads_at_a_time(one: &Arc<dyn Membership>, other: &Arc<dyn Membership>) {
    let first = seam::timeout(SOON, one.campaign("r-1")).await.expect("in time").expect("it leads");
    let waiting = {
        let other = other.clone();
        seam::spawn(async move { other.campaign("r-2").await.expect("it leads in the end") })
    };
    until(&**other, SOON, "the first leads", |view| view.leader.as_deref() == Some("r-1")).await;
    assert!(!waiting.is_finished(), "two lead at once");
    drop(first);
    let second = seam::timeout(SOON, waiting).await.expect("in time").expect("no panic");
    until(&**one, SOON, "the second leads", |view| view.leader.as_deref() == Some("r-2")).await;
    drop(second);
    until(&**one, SOON, "nobody leads", |view| view.leader.is_none()).await;
}

async fn knobs_reach_everybody(one: &dyn Membership, other: &dyn Membership) {
    one.set_config(json!({ "ttft_ms": 500 })).await.expect("the store answers");
    until(other, SOON, "the knob is seen", |view| view.config == Some(json!({ "ttft_ms": 500 }))).await;
}

/// A stop of the store: nothing that ran fails, the last view stays, and afterwards everybody is registered
/// again within ten seconds. `stop` and `go` take it away and give it back.
///
/// # Panics
/// If that does not hold.
pub async fn survives_a_stop<S, G>(
    one: Arc<dyn Membership>,
    other: Arc<dyn Membership>,
    stop: S,
    how_long: Duration,
    go: G,
) where
    S: AsyncFnOnce(),
    G: AsyncFnOnce(),
{
    let guards = [
        one.register(worker("w-a", 1)).await.expect("it registers"),
        other.register(worker("w-b", 1)).await.expect("it registers"),
    ];
    let both = |view: &View| view.workers.contains_key("w-a") && view.workers.contains_key("w-b");
    until(&*one, SOON, "both are seen", both).await;
    stop().await;
    let stopped = seam::now();
    while seam::now().since(stopped) < how_long {
        assert!(both(&one.watch().borrow()), "the last view stays while the store is away");
        seam::sleep(Duration::from_millis(500)).await;
    }
    go().await;
    // A change made after the stop is seen, so the view is fresh and not the old one.
    guards[1].update(Registration { epoch: Epoch(9), ..worker("w-b", 1) });
    until(&*one, SOON, "everybody is registered again", |view| {
        view.connected && both(view) && view.workers["w-b"].epoch == Epoch(9)
    })
    .await;
    // And stays so for longer than a registration lives without renewal.
    let back = seam::now();
    while seam::now().since(back) < Duration::from_secs(7) {
        seam::sleep(Duration::from_millis(500)).await;
    }
    until(&*one, Duration::from_secs(3), "everybody is still registered", both).await;
    for guard in guards {
        guard.leave().await;
    }
}
