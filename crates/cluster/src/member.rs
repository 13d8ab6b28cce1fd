//! The one membership above all stores: keeps registrations and the view alive through any loss of the store.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_trait::async_trait;
use serde_json::Value;
use tandem_chassis::{Tasks, seam};
use tokio::sync::{oneshot, watch};

use crate::keys::Keys;
use crate::store::{Change, Condition, News, Store};
use crate::{Error, Membership, Registration, RoleError, RoleOrder, View};

/// A registration that nobody renews ends after this.
pub(crate) const TIME_TO_LIVE: Duration = Duration::from_secs(5);
/// Every call to the store.
const CALL_MAX: Duration = Duration::from_secs(3);
/// How long the first registration may take.
const JOIN_MAX: Duration = Duration::from_secs(15);
/// Between two tries after a loss, at most.
const PAUSE_MAX: Duration = Duration::from_secs(1);

/// A store's keys with their revisions, as last seen.
type Values = BTreeMap<String, (Vec<u8>, u64)>;

/// Membership over one store.
pub(crate) struct Member<S> {
    shared: Arc<Shared<S>>,
    _tasks: Tasks,
}

struct Shared<S> {
    store: S,
    keys: Keys,
    values: Mutex<Values>,
    view: watch::Sender<Arc<View>>,
}

impl<S: Store> Member<S> {
    pub(crate) fn new(store: S, cluster: &str) -> Member<S> {
        let shared = Arc::new(Shared {
            store,
            keys: Keys::new(cluster),
            values: Mutex::default(),
            view: watch::Sender::new(Arc::new(View::default())),
        });
        let tasks = Tasks::new();
        tasks.spawn(shared.clone().follow());
        Member { shared, _tasks: tasks }
    }
}

impl<S: Store> Shared<S> {
    /// Watches for ever; a lost watch begins again with a snapshot.
    async fn follow(self: Arc<Self>) {
        let mut pause = Pause::default();
        loop {
            let watch = self.limited(self.store.watch(self.keys.prefix())).await;
            match watch {
                Ok(mut news) => {
                    pause = Pause::default();
                    while let Some(batch) = news.recv().await {
                        self.take(batch);
                    }
                    tracing::warn!(store = self.store.name(), "the store is lost; the last view stays");
                }
                Err(reason) => tracing::debug!(reason, "the store cannot be watched"),
            }
            self.view.send_if_modified(|view| {
                let was = view.connected;
                if was {
                    *view = Arc::new(View { connected: false, ..(**view).clone() });
                }
                was
            });
            pause.wait().await;
        }
    }

    fn take(&self, news: News) {
        let mut values = self.values.lock().expect("nothing panics under this lock");
        if news.snapshot {
            values.clear();
        }
        for (key, value, revision) in news.keys {
            match value {
                Some(value) => values.insert(key, (value, revision)),
                None => values.remove(&key),
            };
        }
        let view = self.keys.view(&values, news.revision, true);
        drop(values);
        self.view.send_if_modified(|known| {
            let changed = **known != view;
            if changed {
                *known = Arc::new(view);
            }
            changed
        });
    }

    async fn limited<T>(&self, call: impl Future<Output = Result<T, String>>) -> Result<T, String> {
        let none = || Err(format!("no answer in {} s", CALL_MAX.as_secs()));
        seam::timeout(CALL_MAX, call).await.unwrap_or_else(|_| none())
    }

    fn unreachable(&self, reason: String) -> Error {
        Error::Unreachable { store: self.store.name(), reason }
    }

    async fn put(&self, key: &str, value: Vec<u8>, registration: u64) -> Result<(), String> {
        let change = Change { key: key.to_owned(), value: Some(value), registration };
        self.limited(self.store.transact(Vec::new(), vec![change])).await.map(|_| ())
    }

    /// Keeps `key` registered with the latest value until told to leave, or everybody who could tell is gone.
    async fn keep(
        self: Arc<Self>,
        key: String,
        mut value: watch::Receiver<Vec<u8>>,
        mut leave: oneshot::Receiver<oneshot::Sender<()>>,
        registered: oneshot::Sender<()>,
    ) {
        let mut registered = Some(registered);
        let mut pause = Pause::default();
        let mut registration = None;
        let told = loop {
            let step = self.keep_once(&key, &mut registration, &mut value, &mut pause, &mut registered);
            tokio::select! {
                biased;
                told = &mut leave => break told.ok(),
                () = step => {}
            }
        };
        if let Some(registration) = registration {
            // Its key goes with it; if the store is away, time does it.
            let _ = self.limited(self.store.close(registration)).await;
        }
        if let Some(told) = told {
            let _ = told.send(());
        }
    }

    /// One turn of `keep`: registers if need be, else renews or updates when it is time.
    async fn keep_once(
        &self,
        key: &str,
        registration: &mut Option<u64>,
        value: &mut watch::Receiver<Vec<u8>>,
        pause: &mut Pause,
        registered: &mut Option<oneshot::Sender<()>>,
    ) {
        let Some(id) = *registration else {
            let opened = self.limited(self.store.open(TIME_TO_LIVE)).await;
            let latest = value.borrow_and_update().clone();
            let put = match opened {
                Ok(id) => {
                    *registration = Some(id);
                    self.put(key, latest, id).await
                }
                Err(reason) => Err(reason),
            };
            match put {
                Ok(()) => {
                    *pause = Pause::default();
                    registered.take().map(|first| first.send(()));
                }
                Err(reason) => {
                    tracing::debug!(key, reason, "not registered");
                    *registration = None;
                    pause.wait().await;
                }
            }
            return;
        };
        tokio::select! {
            changed = value.changed() => {
                if changed.is_err() {
                    return std::future::pending().await; // the guard is gone; `leave` says so too
                }
                let latest = value.borrow_and_update().clone();
                if self.put(key, latest, id).await.is_err() {
                    *registration = None;
                }
            }
            () = seam::sleep(TIME_TO_LIVE / 3) => match self.limited(self.store.renew(id)).await {
                Ok(true) => {}
                Ok(false) => *registration = None,
                // The registration may live on in the store: renewing it is the quickest way back, and if it has
                // ended the store will say so.
                Err(reason) => {
                    tracing::warn!(key, reason, "the registration could not be renewed; serving goes on");
                    *registration = None;
                }
            }
        }
    }
}

/// Pauses that double up to a bound.
struct Pause(Duration);

impl Default for Pause {
    fn default() -> Self {
        Pause(Duration::from_millis(50))
    }
}

impl Pause {
    async fn wait(&mut self) {
        seam::sleep(self.0).await;
        self.0 = (self.0 * 2).min(PAUSE_MAX);
    }
}

/// A registration, kept alive. Dropping it lets it go; `leave` waits until it is gone.
#[derive(Debug)]
pub struct RegistrationGuard {
    value: watch::Sender<Vec<u8>>,
    leave: Option<oneshot::Sender<oneshot::Sender<()>>>,
}

impl RegistrationGuard {
    /// Says something else of the process from now on. Its id and kind must stay.
    pub fn update(&self, registration: Registration) {
        self.value.send_replace(encode(&registration));
    }

    /// Takes the registration back.
    pub async fn leave(mut self) {
        let (told, left) = oneshot::channel();
        if let Some(leave) = self.leave.take()
            && leave.send(told).is_ok()
        {
            let _ = seam::timeout(CALL_MAX, left).await;
        }
    }
}

/// Leadership, for as long as it is not lost. Dropping it gives it up.
#[derive(Debug)]
pub struct LeadershipGuard {
    _registration: RegistrationGuard,
    id: String,
    view: watch::Receiver<Arc<View>>,
}

impl LeadershipGuard {
    /// Returns when somebody else leads, or nobody.
    pub async fn lost(&mut self) {
        let id = self.id.clone();
        let _ = self.view.wait_for(|view| view.connected && view.leader.as_deref() != Some(&id)).await;
    }
}

fn encode(registration: &Registration) -> Vec<u8> {
    serde_json::to_vec(registration).expect("a registration is plain data")
}

#[async_trait]
impl<S: Store> Membership for Member<S> {
    async fn register(&self, registration: Registration) -> Result<RegistrationGuard, Error> {
        let key = self.shared.keys.registration(registration.kind, &registration.id);
        let (value, latest) = watch::channel(encode(&registration));
        let (leave, told) = oneshot::channel();
        let (first, registered) = oneshot::channel();
        // Owned by the guard: it ends when that leaves or drops.
        seam::spawn(self.shared.clone().keep(key, latest, told, first));
        let guard = RegistrationGuard { value, leave: Some(leave) };
        match seam::timeout(JOIN_MAX, registered).await {
            Ok(Ok(())) => Ok(guard),
            _ => Err(self.shared.unreachable(format!("no registration in {} s", JOIN_MAX.as_secs()))),
        }
    }

    fn watch(&self) -> watch::Receiver<Arc<View>> {
        self.shared.view.subscribe()
    }

    async fn order_role(&self, worker: &str, order: RoleOrder) -> Result<(), RoleError> {
        let shared = &self.shared;
        let key = shared.keys.registration(crate::Kind::Worker, worker);
        let (registration, revision) = {
            let values = shared.values.lock().expect("nothing panics under this lock");
            let (value, revision) = values.get(&key).ok_or_else(|| RoleError::Unknown(worker.to_owned()))?;
            let registration: Registration =
                serde_json::from_slice(value).map_err(|_| RoleError::Unknown(worker.to_owned()))?;
            (registration, *revision)
        };
        if registration.incarnation != order.incarnation || registration.epoch != order.expected_epoch {
            return Err(RoleError::Stale {
                worker: worker.to_owned(),
                incarnation: registration.incarnation,
                epoch: registration.epoch.0,
            });
        }
        let change = Change {
            key: shared.keys.role(worker),
            value: Some(serde_json::to_vec(&order).expect("an order is plain data")),
            registration: 0,
        };
        let transact = shared.store.transact(vec![Condition { key, revision }], vec![change]);
        match shared.limited(transact).await {
            Ok(true) => Ok(()),
            Ok(false) => Err(RoleError::Conflict(worker.to_owned())),
            Err(reason) => Err(shared.unreachable(reason).into()),
        }
    }

    async fn campaign(&self, id: &str) -> Result<LeadershipGuard, Error> {
        let shared = self.shared.clone();
        let key = shared.keys.leader();
        let mut view = self.watch();
        loop {
            let _ = view.wait_for(|view| view.connected && view.leader.is_none()).await;
            let opened = shared.limited(shared.store.open(TIME_TO_LIVE)).await;
            let registration = opened.map_err(|reason| shared.unreachable(reason))?;
            let conditions = vec![Condition { key: key.clone(), revision: 0 }];
            let change = Change { key: key.clone(), value: Some(id.into()), registration };
            let won = shared.limited(shared.store.transact(conditions, vec![change])).await;
            if won.map_err(|reason| shared.unreachable(reason))? {
                let guard = lead(shared.clone(), registration);
                let _ = view.wait_for(|view| view.leader.is_some()).await;
                return Ok(LeadershipGuard { _registration: guard, id: id.to_owned(), view });
            }
            let _ = shared.limited(shared.store.close(registration)).await;
            let _ = view.changed().await;
        }
    }

    async fn set_config(&self, config: Value) -> Result<(), Error> {
        let shared = &self.shared;
        let value = config.to_string().into_bytes();
        shared.put(&shared.keys.config(), value, 0).await.map_err(|reason| shared.unreachable(reason))
    }
}

/// Renews leadership until the guard goes. It is never made again once lost: another may lead by then.
fn lead<S: Store>(shared: Arc<Shared<S>>, registration: u64) -> RegistrationGuard {
    let (value, _) = watch::channel(Vec::new());
    let (leave, mut told) = oneshot::channel::<oneshot::Sender<()>>();
    // Owned by the guard, as in `register`.
    seam::spawn(async move {
        loop {
            tokio::select! {
                told = &mut told => {
                    let _ = shared.limited(shared.store.close(registration)).await;
                    if let Ok(told) = told {
                        let _ = told.send(());
                    }
                    return;
                }
                () = seam::sleep(TIME_TO_LIVE / 3) => {
                    if let Ok(false) = shared.limited(shared.store.renew(registration)).await {
                        return;
                    }
                }
            }
        }
    });
    RegistrationGuard { value, leave: Some(leave) }
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

            async fn campaign(&self, id: &str) -> Result<crate::LeadershipGuard, crate::Error> {
                self.$field.campaign(id).await
            }

            async fn set_config(&self, config: serde_json::Value) -> Result<(), crate::Error> {
                self.$field.set_config(config).await
            }
        }
    };
}
pub(crate) use membership_by;
