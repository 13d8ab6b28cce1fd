//! The one membership above all stores: follows the store for a view that outlives any loss of it.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use async_trait::async_trait;
use serde_json::Value;
use tandem_chassis::{Tasks, seam};
use tokio::sync::watch;

use crate::keeper::{Pause, keep};
use crate::keys::Keys;
use crate::leader::{LeadershipGuard, Leading, campaign};
use crate::store::{Change, Condition, News, Store};
use crate::{By, Error, Kind, Membership, Registration, RegistrationGuard, RoleError, RoleOrder, View};

/// A registration that nobody renews ends after this.
pub(crate) const TIME_TO_LIVE: Duration = Duration::from_secs(5);
/// Every call to the store.
pub(crate) const CALL_MAX: Duration = Duration::from_secs(3);
/// Between two tries after a loss, at most.
pub(crate) const PAUSE_MAX: Duration = Duration::from_secs(1);
/// How long the first registration may take.
const JOIN_MAX: Duration = Duration::from_secs(15);
/// An order is tried again so often when the worker's key changed meanwhile in a way that does not matter.
const ORDER_TRIES: usize = 3;

/// Membership over one store.
pub(crate) struct Member<S> {
    shared: Arc<Shared<S>>,
    /// Guards hold it too.
    following: Arc<Tasks>,
}

/// What a member's parts have in common.
pub(crate) struct Shared<S> {
    pub(crate) store: S,
    pub(crate) keys: Keys,
    known: Mutex<Known>,
    view: watch::Sender<Arc<View>>,
    pub(crate) leading: Leading,
}

/// A value and the revision that put it.
type Revised = (Vec<u8>, u64);

#[derive(Default)]
struct Known {
    /// The store's keys, as last seen.
    values: BTreeMap<String, Revised>,
    /// Up to which revision of the store.
    revision: u64,
}

impl<S: Store> Member<S> {
    pub(crate) fn new(store: S, cluster: &str) -> Member<S> {
        let shared = Arc::new(Shared {
            store,
            keys: Keys::new(cluster),
            known: Mutex::default(),
            view: watch::Sender::new(Arc::new(View::default())),
            leading: Leading::default(),
        });
        let following = Arc::new(Tasks::new());
        following.spawn(shared.clone().follow());
        Member { shared, following }
    }
}

impl<S: Store> Shared<S> {
    /// Watches for ever; a lost watch begins again with a snapshot.
    async fn follow(self: Arc<Self>) {
        let mut pause = Pause::default();
        loop {
            match self.limited(self.store.watch(self.keys.prefix())).await {
                Ok(mut news) => {
                    pause = Pause::default();
                    while let Some(batch) = news.recv().await {
                        self.take(batch);
                    }
                }
                Err(reason) => tracing::debug!(reason, "the store cannot be watched"),
            }
            self.view.send_if_modified(|view| {
                let was = view.connected;
                if was {
                    tracing::warn!(store = self.store.name(), "the store is lost; the last view stays");
                    *view = Arc::new(View { connected: false, ..(**view).clone() });
                }
                was
            });
            pause.wait().await;
        }
    }

    fn take(&self, news: News) {
        let mut known = self.known();
        if news.snapshot {
            known.values.clear();
        }
        for (key, value, revision) in news.keys {
            match value {
                Some(value) => known.values.insert(key, (value, revision)),
                None => known.values.remove(&key),
            };
        }
        known.revision = news.revision;
        let view = self.keys.view(&known.values, news.revision, true);
        drop(known);
        self.view.send_if_modified(|last| {
            let changed = **last != view;
            if changed {
                *last = Arc::new(view);
            }
            changed
        });
    }

    fn known(&self) -> MutexGuard<'_, Known> {
        self.known.lock().expect("nothing panics under this lock")
    }

    pub(crate) fn subscribe(&self) -> watch::Receiver<Arc<View>> {
        self.view.subscribe()
    }

    /// A key as last seen, and the revision up to which anything has been seen.
    pub(crate) fn shown(&self, key: &str) -> (Option<Revised>, u64) {
        let known = self.known();
        (known.values.get(key).cloned(), known.revision)
    }

    pub(crate) async fn limited<T>(
        &self,
        call: impl Future<Output = Result<T, String>>,
    ) -> Result<T, String> {
        self.limited_by(CALL_MAX, call).await
    }

    pub(crate) async fn limited_by<T>(
        &self,
        limit: Duration,
        call: impl Future<Output = Result<T, String>>,
    ) -> Result<T, String> {
        let none = || Err(format!("no answer in {} ms", limit.as_millis()));
        seam::timeout(limit, call).await.unwrap_or_else(|_| none())
    }

    fn unreachable(&self, reason: String) -> Error {
        Error::Unreachable { store: self.store.name(), reason }
    }

    /// What must hold for `order` to be given, and up to which revision of the store this was decided.
    fn order_conditions(&self, worker: &str, order: &RoleOrder) -> Result<(Vec<Condition>, u64), RoleError> {
        let key = self.keys.registration(Kind::Worker, worker);
        let known = self.known();
        let registered = known.values.get(&key).and_then(|(value, revision)| {
            Some((serde_json::from_slice::<Registration>(value).ok()?, *revision))
        });
        let Some((registration, revision)) = registered else {
            return Err(match self.view.borrow().connected {
                true => RoleError::Unknown(worker.to_owned()),
                false => self.unreachable(format!("worker {worker:?} was not in its last view")).into(),
            });
        };
        if registration.incarnation != order.incarnation || registration.epoch != order.expected_epoch {
            return Err(RoleError::Stale {
                worker: worker.to_owned(),
                incarnation: registration.incarnation,
                epoch: registration.epoch.0,
            });
        }
        let mut conditions = vec![Condition { key, revision }];
        if order.by == By::Planner {
            let revision = self.leading.get().ok_or(RoleError::NotLeader)?;
            conditions.push(Condition { key: self.keys.leader(), revision });
        }
        Ok((conditions, known.revision))
    }
}

#[async_trait]
impl<S: Store> Membership for Member<S> {
    async fn register(&self, registration: Registration) -> Result<RegistrationGuard, Error> {
        let (guard, registered) = keep(self.shared.clone(), self.following.clone(), &registration);
        match seam::timeout(JOIN_MAX, registered).await {
            Ok(Ok(())) => Ok(guard),
            _ => Err(self.shared.unreachable(format!("no registration in {} s", JOIN_MAX.as_secs()))),
        }
    }

    fn watch(&self) -> watch::Receiver<Arc<View>> {
        self.shared.subscribe()
    }

    async fn order_role(&self, worker: &str, order: RoleOrder) -> Result<(), RoleError> {
        let shared = &self.shared;
        let mut view = shared.subscribe();
        let value = serde_json::to_vec(&order).expect("an order is plain data");
        for _ in 0..ORDER_TRIES {
            let (conditions, known_to) = shared.order_conditions(worker, &order)?;
            let change =
                Change { key: shared.keys.role(worker), value: Some(value.clone()), registration: 0 };
            match shared.limited(shared.store.transact(conditions, vec![change])).await {
                Ok(Some(_)) => return Ok(()),
                // The key has changed: perhaps to another state only, and the order still fits.
                Ok(None) => {
                    let moved = view.wait_for(|view| view.revision != known_to);
                    let _ = seam::timeout(PAUSE_MAX, moved).await;
                }
                Err(reason) => return Err(shared.unreachable(reason).into()),
            }
        }
        Err(RoleError::Conflict(worker.to_owned()))
    }

    async fn campaign(&self, id: &str) -> LeadershipGuard {
        campaign(&self.shared, &self.following, id).await
    }

    async fn set_config(&self, config: Value) -> Result<(), Error> {
        let shared = &self.shared;
        let value = Some(config.to_string().into_bytes());
        let change = Change { key: shared.keys.config(), value, registration: 0 };
        let put = shared.limited(shared.store.transact(Vec::new(), vec![change])).await;
        put.map(|_| ()).map_err(|reason| shared.unreachable(reason))
    }
}

/// Gives a public type the membership of the member inside it.
macro_rules! membership_by {
    ($name:ty, $field:ident) => {
        #[async_trait::async_trait]
        impl crate::Membership for $name {
            async fn register(
                &self,
                registration: crate::Registration,
            ) -> Result<crate::RegistrationGuard, crate::Error> {
                self.$field.register(registration).await
            }

            fn watch(&self) -> tokio::sync::watch::Receiver<std::sync::Arc<crate::View>> {
                self.$field.watch()
            }

            async fn order_role(
                &self,
                worker: &str,
                order: crate::RoleOrder,
            ) -> Result<(), crate::RoleError> {
                self.$field.order_role(worker, order).await
            }

            async fn campaign(&self, id: &str) -> crate::LeadershipGuard {
                self.$field.campaign(id).await
            }

            async fn set_config(&self, config: serde_json::Value) -> Result<(), crate::Error> {
                self.$field.set_config(config).await
            }
        }
    };
}
pub(crate) use membership_by;
