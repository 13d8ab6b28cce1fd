//! What every membership must hold, whatever store is under it.

use std::sync::Arc;
use std::time::Duration;

use serde_json::json;
use tandem_chassis::seam;
use tandem_types::{Epoch, Incarnation, Role, WorkerState};

use crate::{By, Kind, Membership, Registration, RoleError, RoleOrder, View};

/// Much longer than anything here takes; only a failure waits so long.
const SOON: Duration = Duration::from_secs(10);
/// Longer than a registration lives that nobody renews.
const LIFE: Duration = Duration::from_secs(7);

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

/// An order for a start of a worker in an epoch.
pub fn order(incarnation: u64, epoch: u64, by: By) -> RoleOrder {
    RoleOrder {
        incarnation: Incarnation(incarnation),
        expected_epoch: Epoch(epoch),
        role: Role::Prefill,
        by,
        until: None,
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

/// Watches a member's view for a time, through which it must always be as wanted.
async fn always(member: &dyn Membership, time: Duration, what: &str, wanted: impl Fn(&View) -> bool) {
    let mut views = member.watch();
    let broken = seam::timeout(time, views.wait_for(|view| !wanted(view))).await.is_ok();
    let view = member.watch().borrow().clone();
    assert!(!broken, "{what} for {time:?}; the view is {view:#?}");
}

fn shows(view: &View, id: &str, incarnation: u64) -> bool {
    view.workers.get(id).is_some_and(|worker| worker.incarnation == Incarnation(incarnation))
}

/// Runs the suite with two members of one fresh cluster, which are to share nothing but the store.
///
/// # Panics
/// If they do not hold what a membership must.
pub async fn run(one: Arc<dyn Membership>, other: Arc<dyn Membership>) {
    members_see_each_other_come_change_and_go(&*one, &*other).await;
    what_is_registered_is_seen_whole(&*one, &*other).await;
    a_dropped_guard_lets_go(&*one, &*other).await;
    a_restarted_worker_replaces_its_predecessor(&*one, &*other).await;
    roles_are_ordered_for_one_incarnation_and_epoch(&*one, &*other).await;
    an_order_goes_with_the_start_it_was_for(&*one, &*other).await;
    one_leads_at_a_time(&one, &other).await;
    a_campaign_that_is_given_up_leads_nobody(&one, &other).await;
    the_planner_orders_only_while_it_leads(&*one, &*other).await;
    knobs_reach_everybody(&*one, &*other).await;
}

async fn members_see_each_other_come_change_and_go(one: &dyn Membership, other: &dyn Membership) {
    let guard = one.register(worker("w-0", 1)).await.expect("it registers");
    let router = Registration { id: "r-0".into(), kind: Kind::Router, ..Registration::default() };
    let second = other.register(router).await.expect("it registers");
    let store = Registration { id: "s-0".into(), kind: Kind::Store, ..Registration::default() };
    let third = other.register(store).await.expect("it registers");
    for member in [one, other] {
        until(member, SOON, "all are seen", |view| {
            view.connected
                && view.workers.contains_key("w-0")
                && view.routers.contains_key("r-0")
                && view.stores.contains_key("s-0")
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
    third.leave().await;
    until(one, SOON, "nobody is left", |view| view.routers.is_empty() && view.stores.is_empty()).await;
}

async fn what_is_registered_is_seen_whole(one: &dyn Membership, other: &dyn Membership) {
    let whole = Registration {
        epoch: Epoch(9),
        state: WorkerState::Draining,
        admin: "127.0.0.1:2".to_owned(),
        model: "a model".to_owned(),
        capacity: crate::Capacity { blocks: 7, block_tokens: 32, context_tokens: 4096 },
        transports: vec!["inproc".to_owned(), "tcp".to_owned()],
        version: "1.2.3".to_owned(),
        command: vec!["/bin/worker".to_owned(), "--id=ü \"1\"".to_owned()],
        pid: 4711,
        ..worker("w-whole", u64::MAX)
    };
    let guard = one.register(whole.clone()).await.expect("it registers");
    until(other, SOON, "every field arrives", |view| view.workers.get("w-whole") == Some(&whole)).await;
    guard.leave().await;
    until(other, SOON, "it is gone", |view| view.workers.is_empty()).await;
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
    until(one, SOON, "the newer start is seen", |view| shows(view, "w-2", 2)).await;
    // What the old one still has to say reaches nobody.
    first.update(Registration { epoch: Epoch(1), ..worker("w-2", 1) });
    other.set_config(json!({ "after": "update" })).await.expect("the store answers");
    until(one, SOON, "a later change is seen", |view| view.config == Some(json!({ "after": "update" })))
        .await;
    always(one, Duration::from_secs(1), "the newer start is there", |view| shows(view, "w-2", 2)).await;
    // When the new one goes, the old one does not come back.
    second.leave().await;
    until(one, SOON, "it is gone", |view| view.workers.is_empty()).await;
    always(one, Duration::from_secs(3), "nobody is there", |view| view.workers.is_empty()).await;
    // When the old one goes, a new one's key must stay.
    let third = other.register(worker("w-2", 3)).await.expect("it registers again");
    first.leave().await;
    other.set_config(json!({ "after": "leave" })).await.expect("the store answers");
    until(one, SOON, "a later change is seen", |view| view.config == Some(json!({ "after": "leave" }))).await;
    until(one, SOON, "the newest start is still there", |view| shows(view, "w-2", 3)).await;
    third.leave().await;
    until(one, SOON, "it is gone", |view| view.workers.is_empty()).await;
}

async fn roles_are_ordered_for_one_incarnation_and_epoch(one: &dyn Membership, other: &dyn Membership) {
    let unknown = other.order_role("nobody", order(1, 0, By::Operator)).await;
    assert_eq!(unknown, Err(RoleError::Unknown("nobody".into())));
    let guard = one.register(worker("w-3", 5)).await.expect("it registers");
    until(other, SOON, "it is seen", |view| view.workers.contains_key("w-3")).await;
    for stale in [order(4, 0, By::Operator), order(5, 1, By::Operator)] {
        let refused = other.order_role("w-3", stale).await;
        assert!(matches!(refused, Err(RoleError::Stale { .. })), "{refused:?}");
    }
    assert!(one.watch().borrow().roles.is_empty(), "a refused order leaves nothing");
    // A change of the worker's key that is not seen yet, and does not matter, is no reason to refuse.
    guard.update(Registration { state: WorkerState::Draining, ..worker("w-3", 5) });
    other.order_role("w-3", order(5, 0, By::Operator)).await.expect("it fits");
    until(one, SOON, "the order is seen", |view| view.roles.get("w-3") == Some(&order(5, 0, By::Operator)))
        .await;
    // The worker obeys, and says so: the same order would be stale now.
    guard.update(Registration { epoch: Epoch(1), role: Some(Role::Prefill), ..worker("w-3", 5) });
    until(other, SOON, "the epoch is seen", |view| view.workers["w-3"].epoch == Epoch(1)).await;
    let again = other.order_role("w-3", order(5, 0, By::Operator)).await;
    assert!(matches!(again, Err(RoleError::Stale { epoch: 1, .. })), "{again:?}");
    guard.leave().await;
    until(one, SOON, "it is gone", |view| view.workers.is_empty() && view.roles.is_empty()).await;
}

async fn an_order_goes_with_the_start_it_was_for(one: &dyn Membership, other: &dyn Membership) {
    let first = one.register(worker("w-4", 1)).await.expect("it registers");
    until(other, SOON, "it is seen", |view| shows(view, "w-4", 1)).await;
    let second = other.register(worker("w-4", 2)).await.expect("it registers again");
    until(one, SOON, "the newer start is seen", |view| shows(view, "w-4", 2)).await;
    one.order_role("w-4", order(2, 0, By::Operator)).await.expect("it fits");
    let ordered = |view: &View| view.roles.get("w-4") == Some(&order(2, 0, By::Operator));
    until(one, SOON, "the order is seen", ordered).await;
    // The older start takes nothing with it that is not its own.
    first.leave().await;
    other.set_config(json!({ "after": "order" })).await.expect("the store answers");
    until(one, SOON, "a later change is seen", |view| view.config == Some(json!({ "after": "order" }))).await;
    until(one, SOON, "the order is still there", ordered).await;
    second.leave().await;
    until(one, SOON, "both are gone", |view| view.workers.is_empty() && view.roles.is_empty()).await;
}

async fn one_leads_at_a_time(one: &Arc<dyn Membership>, other: &Arc<dyn Membership>) {
    let first = seam::timeout(SOON, one.campaign("r-1")).await.expect("in time");
    let waiting = {
        let other = other.clone();
        seam::spawn(async move { other.campaign("r-2").await })
    };
    until(&**other, SOON, "the first leads", |view| view.leader.as_deref() == Some("r-1")).await;
    always(&**one, LIFE, "the first goes on leading", |view| view.leader.as_deref() == Some("r-1")).await;
    assert!(!waiting.is_finished(), "two lead at once");
    drop(first);
    let second = seam::timeout(SOON, waiting).await.expect("in time").expect("no panic");
    until(&**one, SOON, "the second leads", |view| view.leader.as_deref() == Some("r-2")).await;
    drop(second);
    until(&**one, SOON, "nobody leads", |view| view.leader.is_none()).await;
}

async fn a_campaign_that_is_given_up_leads_nobody(one: &Arc<dyn Membership>, other: &Arc<dyn Membership>) {
    let first = seam::timeout(SOON, one.campaign("r-1")).await.expect("in time");
    until(&**other, SOON, "the first leads", |view| view.leader.is_some()).await;
    let waiting = {
        let other = other.clone();
        seam::spawn(async move { other.campaign("r-2").await })
    };
    waiting.abort();
    assert!(waiting.await.is_err(), "it was given up");
    drop(first);
    until(&**other, SOON, "nobody leads", |view| view.leader.is_none()).await;
    let third = seam::timeout(SOON, one.campaign("r-3")).await.expect("in time");
    until(&**one, SOON, "the third leads", |view| view.leader.as_deref() == Some("r-3")).await;
    drop(third);
    until(&**one, SOON, "nobody leads", |view| view.leader.is_none()).await;
}

async fn the_planner_orders_only_while_it_leads(one: &dyn Membership, other: &dyn Membership) {
    let guard = one.register(worker("w-5", 1)).await.expect("it registers");
    for member in [one, other] {
        until(member, SOON, "it is seen", |view| shows(view, "w-5", 1)).await;
    }
    let refused = one.order_role("w-5", order(1, 0, By::Planner)).await;
    assert_eq!(refused, Err(RoleError::NotLeader));
    let leader = seam::timeout(SOON, one.campaign("r-1")).await.expect("in time");
    until(other, SOON, "it is seen", |view| view.leader.is_some()).await;
    let refused = other.order_role("w-5", order(1, 0, By::Planner)).await;
    assert_eq!(refused, Err(RoleError::NotLeader), "the other one leads");
    one.order_role("w-5", order(1, 0, By::Planner)).await.expect("it leads");
    drop(leader);
    let refused = one.order_role("w-5", order(1, 0, By::Planner)).await;
    assert_eq!(refused, Err(RoleError::NotLeader), "it has led");
    until(other, SOON, "nobody leads", |view| view.leader.is_none()).await;
    guard.leave().await;
    until(one, SOON, "it is gone", |view| view.workers.is_empty() && view.roles.is_empty()).await;
}

async fn knobs_reach_everybody(one: &dyn Membership, other: &dyn Membership) {
    one.set_config(json!({ "ttft_ms": 500 })).await.expect("the store answers");
    until(other, SOON, "the knob is seen", |view| view.config == Some(json!({ "ttft_ms": 500 }))).await;
}

/// A registration is renewed also while its value changes all the time.
///
/// # Panics
/// If that does not hold.
pub async fn lives_long(one: Arc<dyn Membership>, other: Arc<dyn Membership>) {
    let quiet = one.register(worker("w-quiet", 1)).await.expect("it registers");
    let busy = one.register(worker("w-busy", 1)).await.expect("it registers");
    let both = |view: &View| shows(view, "w-quiet", 1) && shows(view, "w-busy", 1);
    until(&*other, SOON, "both are seen", both).await;
    for second in 1..=8 {
        busy.update(Registration { epoch: Epoch(second), ..worker("w-busy", 1) });
        always(&*other, Duration::from_secs(1), "both stay", both).await;
    }
    until(&*other, SOON, "the last change is seen", |view| view.workers["w-busy"].epoch == Epoch(8)).await;
    quiet.leave().await;
    busy.leave().await;
    until(&*other, SOON, "both are gone", |view| view.workers.is_empty()).await;
}

/// What a stop of the store leaves behind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stop {
    /// Everything but registrations that nobody could renew.
    Keeps,
    /// Nothing.
    Forgets,
}

/// A stop of the store: nothing that ran fails, the last view stays, a replaced predecessor gains nothing, and
/// within ten seconds afterwards everybody is registered again. `stop` and `go` take the store away and give it
/// back.
///
/// # Panics
/// If that does not hold.
pub async fn survives_a_stop(
    one: Arc<dyn Membership>,
    other: Arc<dyn Membership>,
    stop: impl AsyncFnOnce(),
    how_long: Duration,
    go: impl AsyncFnOnce(),
    leaves: Stop,
) {
    one.set_config(json!({ "ttft_ms": 1 })).await.expect("the store answers");
    let a = one.register(worker("w-a", 1)).await.expect("it registers");
    let replaced = one.register(worker("w-b", 1)).await.expect("it registers");
    let b = other.register(worker("w-b", 2)).await.expect("it registers again");
    let mut leader = seam::timeout(SOON, one.campaign("r-1")).await.expect("in time");
    let both = |view: &View| shows(view, "w-a", 1) && shows(view, "w-b", 2);
    for member in [&one, &other] {
        until(&**member, SOON, "all are seen", |view| both(view) && view.leader.is_some()).await;
    }

    stop().await;
    always(&*one, how_long, "the last view stays", both).await;
    assert!(!one.watch().borrow().connected, "that the store is away is said");
    let ordered = other.order_role("w-a", order(1, 0, By::Operator)).await;
    assert!(matches!(ordered, Err(RoleError::Store(_))), "an order is refused in time: {ordered:?}");

    go().await;
    // Changes made after the stop are seen, so the views are fresh.
    a.update(Registration { epoch: Epoch(9), ..worker("w-a", 1) });
    b.update(Registration { epoch: Epoch(9), ..worker("w-b", 2) });
    let again = |view: &View| {
        view.connected && both(view) && ["w-a", "w-b"].iter().all(|w| view.workers[*w].epoch == Epoch(9))
    };
    for member in [&one, &other] {
        until(&**member, SOON, "everybody is registered again", again).await;
    }
    let config = one.watch().borrow().config.clone();
    assert_eq!(config.is_some(), leaves == Stop::Keeps, "{config:?}");
    always(&*one, LIFE, "everybody stays registered, and nobody comes back from the past", again).await;

    // A leader that could not renew leads no more, and does not block the next.
    if how_long > LIFE {
        seam::timeout(SOON, leader.lost()).await.expect("that it is over is said");
    }
    drop(leader);
    let next = seam::timeout(SOON, other.campaign("r-2")).await.expect("in time");
    until(&*one, SOON, "the next one leads", |view| view.leader.as_deref() == Some("r-2")).await;
    drop(next);

    b.leave().await;
    a.leave().await;
    until(&*one, SOON, "nobody is left", |view| view.workers.is_empty() && view.leader.is_none()).await;
    drop(replaced);
}
