//! Leadership: a key that only one can create, and that ends with its registration.

use std::sync::{Arc, Mutex};

use tandem_chassis::{Tasks, seam};
use tandem_types::Time;
use tokio::sync::{oneshot, watch};

use crate::keeper::{Pause, RENEW_MAX};
use crate::member::{Shared, TIME_TO_LIVE};
use crate::store::{Change, Condition, Store};

/// Leadership, for as long as it is not lost. Dropping it gives it up: no order is given under it from then on,
/// and the store hears of it soon.
#[derive(Debug)]
pub struct LeadershipGuard {
    revision: u64,
    leading: Leading,
    _give_up: oneshot::Sender<()>,
    over: watch::Receiver<()>,
    _following: Arc<Tasks>,
}

/// Revision of the leader key, while this member leads.
#[derive(Clone, Debug, Default)]
pub(crate) struct Leading(Arc<Mutex<Option<u64>>>);

impl Leading {
    pub(crate) fn get(&self) -> Option<u64> {
        *self.0.lock().expect("nothing panics under this lock")
    }

    fn begin(&self, revision: u64) {
        *self.0.lock().expect("nothing panics under this lock") = Some(revision);
    }

    /// Ends the leadership of this revision, not a later one.
    fn end(&self, revision: u64) {
        self.0.lock().expect("nothing panics under this lock").take_if(|leading| *leading == revision);
    }
}

impl Drop for LeadershipGuard {
    fn drop(&mut self) {
        self.leading.end(self.revision);
    }
}

impl LeadershipGuard {
    /// Returns when this leadership is over: the store has ended it, or could not be asked for so long that it
    /// may have.
    pub async fn lost(&mut self) {
        while self.over.changed().await.is_ok() {}
    }
}

/// Waits until nobody leads, then tries to; for as long as it takes.
pub(crate) async fn campaign<S: Store>(
    shared: &Arc<Shared<S>>,
    following: &Arc<Tasks>,
    id: &str,
) -> LeadershipGuard {
    let key = shared.keys.leader();
    let mut view = shared.subscribe();
    let mut pause = Pause::default();
    loop {
        let _ = view.wait_for(|view| view.connected && view.leader.is_none()).await;
        let asked = seam::now();
        let Ok(registration) = shared.limited(shared.store.open(TIME_TO_LIVE)).await else {
            pause.wait().await;
            continue;
        };
        let (give_up, given_up) = oneshot::channel();
        let (win, won) = oneshot::channel();
        let (alive, over) = watch::channel(());
        // Owned by the senders: whatever becomes of this future or the guard, the registration is closed with it.
        seam::spawn(reign(shared.clone(), registration, asked, won, given_up, alive));

        let condition = Condition { key: key.clone(), revision: 0 };
        let change = Change { key: key.clone(), value: Some(id.into()), registration };
        if let Ok(Some(revision)) = shared.limited(shared.store.transact(vec![condition], vec![change])).await
        {
            shared.leading.begin(revision);
            let _ = win.send(revision);
            let (leading, following) = (shared.leading.clone(), following.clone());
            return LeadershipGuard { revision, leading, _give_up: give_up, over, _following: following };
        }
        drop((win, give_up));
        pause.wait().await;
    }
}

/// Renews leadership until it is given up or lost. It is never made again: another may lead by then.
async fn reign<S: Store>(
    shared: Arc<Shared<S>>,
    registration: u64,
    opened: Time,
    won: oneshot::Receiver<u64>,
    given_up: oneshot::Receiver<()>,
    alive: watch::Sender<()>,
) {
    // Without an answer the campaign has failed, or was given up.
    if let Ok(revision) = won.await {
        tokio::select! {
            _ = given_up => {}
            () = last(&shared, registration, opened, revision) => tracing::info!("leadership is lost"),
        }
        shared.leading.end(revision);
    }
    drop(alive);
    let _ = shared.limited(shared.store.close(registration)).await;
}

/// Renews, and returns when leadership is over.
async fn last<S: Store>(shared: &Arc<Shared<S>>, registration: u64, opened: Time, revision: u64) {
    let key = shared.keys.leader();
    let mut view = shared.subscribe();
    let mut pause = Pause::default();
    let mut renew_at = opened + TIME_TO_LIVE / 3;
    // By our own clock, the store cannot have ended the registration before this.
    let mut good_until = opened + TIME_TO_LIVE;
    loop {
        tokio::select! {
            () = seam::sleep_until(good_until) => return,
            _ = view.changed() => {
                let (shown, known_to) = shared.shown(&key);
                if known_to >= revision && shown.map(|(_, shown)| shown) != Some(revision) {
                    return;
                }
            }
            () = seam::sleep_until(renew_at) => {
                let asked = seam::now();
                let limit = RENEW_MAX.min(good_until.remaining(asked));
                match shared.limited_by(limit, shared.store.renew(registration)).await {
                    Ok(true) => {
                        good_until = asked + TIME_TO_LIVE;
                        renew_at = asked + TIME_TO_LIVE / 3;
                        pause = Pause::default();
                    }
                    Ok(false) => return,
                    Err(_) => renew_at = seam::now() + pause.next(),
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::conformance::{order, until, worker};
    use crate::{By, Embedded, Membership, RoleError};

    const SOON: Duration = Duration::from_secs(10);

    #[tokio::test(start_paused = true)]
    async fn a_leader_that_does_not_know_yet_that_it_is_none_orders_nothing() {
        let cluster = Embedded::new();
        let _guard = cluster.register(worker("w", 1)).await.unwrap();
        let mut leader = cluster.campaign("r").await;
        until(&cluster, SOON, "all are seen", |view| view.leader.is_some() && view.workers.contains_key("w"))
            .await;
        let gone = Change { key: "/tandem/default/leader".to_owned(), value: None, registration: 0 };
        cluster.store().transact(Vec::new(), vec![gone]).await.unwrap().expect("applied");
        let refused = cluster.order_role("w", order(1, 0, By::Planner)).await;
        assert!(matches!(refused, Err(RoleError::NotLeader | RoleError::Conflict(_))), "{refused:?}");
        seam::timeout(SOON, leader.lost()).await.expect("that it is over is said");
        assert!(cluster.watch().borrow().roles.is_empty());
        assert_eq!(cluster.order_role("w", order(1, 0, By::Planner)).await, Err(RoleError::NotLeader));
    }

    #[tokio::test(start_paused = true)]
    async fn a_leader_that_cannot_renew_stops_before_another_can_lead() {
        let cluster = Embedded::new();
        let mut leader = cluster.campaign("r").await;
        let began = seam::now();
        cluster.set_down(true);
        seam::timeout(SOON, leader.lost()).await.expect("that it is over is said");
        assert!(seam::now().since(began) <= TIME_TO_LIVE, "by its own clock, no later than by the store's");
        // A second question gets the same answer.
        seam::timeout(SOON, leader.lost()).await.expect("it stays over");
    }
}
