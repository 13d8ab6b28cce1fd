//! Keeps one process registered: through any loss of the store, and against nobody who came later.
//!
//! Every put is conditional on the key's revision, so neither a put that was delayed on its way nor a process
//! that woke up late can undo what happened since. A new start replaces whatever it finds; one that has been
//! replaced stays out.

use std::sync::Arc;
use std::time::Duration;

use tandem_chassis::{Tasks, seam};
use tandem_types::{Incarnation, Time};
use tokio::sync::{oneshot, watch};

use crate::member::{CALL_MAX, PAUSE_MAX, Shared, TIME_TO_LIVE};
use crate::store::{Change, Condition, Store};
use crate::{Registration, RoleOrder, View};

/// A renewal without an answer is tried again after this: three tries fit into a time to live.
pub(crate) const RENEW_MAX: Duration = Duration::from_millis(1500);

/// A registration, kept alive. Dropping it lets it go; `leave` waits until it is gone.
#[derive(Debug)]
pub struct RegistrationGuard {
    value: watch::Sender<Vec<u8>>,
    leave: Option<oneshot::Sender<oneshot::Sender<()>>>,
    /// The view tells whether the registration stands, so it is followed for as long as the guard lives.
    _following: Arc<Tasks>,
}

impl RegistrationGuard {
    /// Says something else of the process from now on. Its id, kind and incarnation must stay.
    pub fn update(&self, registration: Registration) {
        self.value.send_replace(encode(&registration));
    }

    /// Takes the registration back. Waits for the store, but not for long: time does it in the end.
    pub async fn leave(mut self) {
        let (told, left) = oneshot::channel();
        if let Some(leave) = self.leave.take()
            && leave.send(told).is_ok()
        {
            let _ = seam::timeout(CALL_MAX, left).await;
        }
    }
}

fn encode(registration: &Registration) -> Vec<u8> {
    serde_json::to_vec(registration).expect("a registration is plain data")
}

/// Starts to keep `registration`. The receiver hears when it stands for the first time.
pub(crate) fn keep<S: Store>(
    shared: Arc<Shared<S>>,
    following: Arc<Tasks>,
    registration: &Registration,
) -> (RegistrationGuard, oneshot::Receiver<()>) {
    let (value, latest) = watch::channel(encode(registration));
    let (leave, told) = oneshot::channel();
    let (registered, first) = oneshot::channel();
    let keeper = Keeper {
        key: shared.keys.registration(registration.kind, &registration.id),
        role_key: (registration.kind == crate::Kind::Worker).then(|| shared.keys.role(&registration.id)),
        incarnation: registration.incarnation,
        value: latest,
        view: shared.subscribe(),
        open: None,
        standing: Standing::New,
        pause: Pause::default(),
        shared,
    };
    // Owned by the guard: it ends when that leaves or drops.
    seam::spawn(keeper.run(told, registered));
    (RegistrationGuard { value, leave: Some(leave), _following: following }, first)
}

struct Keeper<S> {
    shared: Arc<Shared<S>>,
    key: String,
    /// Where this worker's role is ordered.
    role_key: Option<String>,
    incarnation: Incarnation,
    value: watch::Receiver<Vec<u8>>,
    view: watch::Receiver<Arc<View>>,
    open: Option<Open>,
    standing: Standing,
    pause: Pause,
}

/// A registration of the store, to be renewed.
#[derive(Clone, Copy)]
struct Open {
    id: u64,
    renew_at: Time,
}

/// What is known of our value in the store.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Standing {
    /// Not known to have been put ever: what is there is of an earlier start, and is replaced.
    New,
    /// Put in this revision, and nothing was seen to the contrary.
    Put(u64),
    /// Perhaps gone, or not as put last: the view decides.
    Unsure,
    /// A later start of the same name has taken the key, for good: when it goes or the store forgets it, we are
    /// still the past.
    Replaced,
}

impl<S: Store> Keeper<S> {
    async fn run(
        mut self,
        mut leave: oneshot::Receiver<oneshot::Sender<()>>,
        registered: oneshot::Sender<()>,
    ) {
        let mut registered = Some(registered);
        let told = loop {
            tokio::select! {
                biased;
                told = &mut leave => break told.ok(),
                () = self.turn() => {}
            }
            if let Standing::Put(_) = self.standing
                && let Some(registered) = registered.take()
            {
                let _ = registered.send(());
            }
        };
        self.withdraw().await;
        if let Some(told) = told {
            let _ = told.send(());
        }
    }

    /// One turn: what is missing most, or else waiting until something changes.
    async fn turn(&mut self) {
        let Some(open) = self.open else { return self.open().await };
        if seam::now() >= open.renew_at {
            return self.renew(open.id).await;
        }
        if let Some(conditions) = self.conditions() {
            return self.put(open.id, conditions).await;
        }
        tokio::select! {
            changed = self.value.changed(), if self.standing != Standing::Replaced => match changed {
                Ok(()) => self.value.mark_changed(), // it stays news until it is put
                Err(_) => std::future::pending().await, // the guard is gone; `leave` says so too
            },
            _ = self.view.changed() => self.look(false),
            () = seam::sleep_until(open.renew_at) => {}
        }
    }

    async fn open(&mut self) {
        let asked = seam::now();
        match self.shared.limited(self.shared.store.open(TIME_TO_LIVE)).await {
            Ok(id) => self.open = Some(Open { id, renew_at: asked + TIME_TO_LIVE / 3 }),
            Err(reason) => {
                tracing::debug!(key = self.key, reason, "not registered");
                self.pause.wait().await;
            }
        }
    }

    /// What must hold for our value to be put now; `None` if there is nothing to put.
    fn conditions(&mut self) -> Option<Vec<Condition>> {
        let shown = || self.shared.shown(&self.key).0;
        let revision = match self.standing {
            Standing::Put(revision) if self.value.has_changed().unwrap_or(false) => revision,
            Standing::Put(_) | Standing::Replaced => return None,
            // If the view is behind, or has never been connected, the put is refused, and tried again.
            Standing::New => shown().map_or(0, |(_, revision)| revision),
            Standing::Unsure => match shown() {
                None => 0,
                Some((value, revision)) if self.is_ours(&value) => revision,
                Some(_) => {
                    tracing::warn!(
                        key = self.key,
                        "a later start of the same name has registered; this one is out"
                    );
                    self.standing = Standing::Replaced;
                    return None;
                }
            },
        };
        Some(vec![Condition { key: self.key.clone(), revision }])
    }

    fn is_ours(&self, value: &[u8]) -> bool {
        serde_json::from_slice::<Registration>(value).is_ok_and(|r| r.incarnation == self.incarnation)
    }

    async fn put(&mut self, registration: u64, conditions: Vec<Condition>) {
        let value = Some(self.value.borrow_and_update().clone());
        let change = Change { key: self.key.clone(), value, registration };
        match self.shared.limited(self.shared.store.transact(conditions, vec![change])).await {
            Ok(Some(revision)) => {
                self.standing = Standing::Put(revision);
                self.pause = Pause::default();
            }
            Ok(None) => {
                // Changed by somebody, or the view is behind: it will say.
                self.doubt();
                tokio::select! {
                    _ = self.view.changed() => {}
                    () = self.pause.wait() => {}
                }
            }
            Err(reason) => {
                // Whether it took effect is not known, and the registration may be what is wrong with it.
                tracing::debug!(key = self.key, reason, "not registered");
                self.open = None;
                self.doubt();
                self.pause.wait().await;
            }
        }
    }

    async fn renew(&mut self, registration: u64) {
        let asked = seam::now();
        let answer = self.shared.limited_by(RENEW_MAX, self.shared.store.renew(registration)).await;
        match answer {
            Ok(true) => {
                self.open = Some(Open { id: registration, renew_at: asked + TIME_TO_LIVE / 3 });
                self.pause = Pause::default();
                self.look(true);
            }
            Ok(false) => {
                tracing::warn!(key = self.key, "the registration has ended; it is made again");
                self.open = None;
                self.doubt();
            }
            Err(reason) => {
                // It may live on in the store, and if not, the store will say so.
                tracing::debug!(
                    key = self.key,
                    reason,
                    "the registration could not be renewed; serving goes on"
                );
                self.open = Some(Open { id: registration, renew_at: seam::now() + self.pause.next() });
            }
        }
    }

    fn doubt(&mut self) {
        if let Standing::Put(_) = self.standing {
            self.standing = Standing::Unsure;
        }
    }

    /// Compares what the view shows with what was put. Usually a view that is behind says nothing; with `surely`
    /// it counts too, because a store that came back without its data counts its revisions from the beginning.
    /// Being wrong costs one refused put.
    fn look(&mut self, surely: bool) {
        let (shown, known_to) = self.shared.shown(&self.key);
        let Standing::Put(put) = self.standing else { return };
        if (surely || known_to >= put) && shown.map(|(_, revision)| revision) != Some(put) {
            self.standing = Standing::Unsure;
        }
    }

    /// Takes back the key, and the role order that was for this start. If the store is away, time does it.
    async fn withdraw(&self) {
        let store = &self.shared.store;
        let close = async {
            if let Some(open) = self.open {
                let _ = self.shared.limited(store.close(open.id)).await;
            }
        };
        let forget = async {
            let Some(key) = &self.role_key else { return };
            let Some((value, revision)) = self.shared.shown(key).0 else { return };
            let order = serde_json::from_slice::<RoleOrder>(&value);
            if order.is_ok_and(|order| order.incarnation == self.incarnation) {
                let condition = Condition { key: key.clone(), revision };
                let change = Change { key: key.clone(), value: None, registration: 0 };
                let _ = self.shared.limited(store.transact(vec![condition], vec![change])).await;
            }
        };
        tokio::join!(close, forget);
    }
}

/// Pauses that double up to a bound.
pub(crate) struct Pause(Duration);

impl Default for Pause {
    fn default() -> Self {
        Pause(Duration::from_millis(50))
    }
}

impl Pause {
    pub(crate) fn next(&mut self) -> Duration {
        let pause = self.0;
        self.0 = (pause * 2).min(PAUSE_MAX);
        pause
    }

    pub(crate) async fn wait(&mut self) {
        let pause = self.next();
        seam::sleep(pause).await;
    }
}

#[cfg(test)]
mod tests;
