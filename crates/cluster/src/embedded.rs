//! The store in memory: for one process, and for the children of `tandem up --processes`.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use async_trait::async_trait;
use tandem_chassis::seam;
use tandem_types::Time;
use tokio::sync::{mpsc, watch};

use crate::member::{Member, membership_by};
use crate::store::{Change, Condition, News, Store, StoreError};

/// Changes remembered for watchers; one that is further behind gets a snapshot.
const LOG_MAX: usize = 4096;
/// Registrations that are over are noticed this soon.
const SWEEP: Duration = Duration::from_millis(250);

/// A cluster in the memory of this process. Clones are one member of it.
#[derive(Clone)]
pub struct Embedded {
    store: Memory,
    cluster: Arc<str>,
    member: Arc<Member<Memory>>,
}

impl Embedded {
    /// An empty cluster called `default`.
    pub fn new() -> Embedded {
        Embedded::named("default")
    }

    /// An empty cluster of this name.
    pub fn named(cluster: &str) -> Embedded {
        Embedded::over(Memory::new(), cluster.into())
    }

    /// Another member of the same cluster, as another process would be.
    pub fn member(&self) -> Embedded {
        Embedded::over(self.store.clone(), self.cluster.clone())
    }

    fn over(store: Memory, cluster: Arc<str>) -> Embedded {
        Embedded { member: Arc::new(Member::new(store.clone(), &cluster)), store, cluster }
    }

    /// Takes the store away, or gives it back with everything but registrations that ended meanwhile. For the
    /// conformance suite.
    pub fn set_down(&self, down: bool) {
        self.store.set_down(down);
    }

    pub(crate) fn store(&self) -> &Memory {
        &self.store
    }
}

impl Default for Embedded {
    fn default() -> Self {
        Embedded::new()
    }
}

membership_by!(Embedded, member);

/// Keys, registrations and recent changes.
#[derive(Clone)]
pub(crate) struct Memory {
    state: Arc<Mutex<State>>,
    /// The revision, for those who wait; `None` while the store is down.
    revision: Arc<watch::Sender<Option<u64>>>,
}

#[derive(Default)]
struct State {
    revision: u64,
    values: BTreeMap<String, Entry>,
    /// When each ends, and its time to live.
    registrations: BTreeMap<u64, (Time, Duration)>,
    next_registration: u64,
    /// Recent changes in order of revision.
    log: VecDeque<(u64, String, Option<Vec<u8>>)>,
    /// The log has everything after this revision.
    forgotten: u64,
    down: bool,
}

struct Entry {
    value: Vec<u8>,
    revision: u64,
    registration: u64,
}

impl Memory {
    fn new() -> Memory {
        Memory { state: Arc::default(), revision: Arc::new(watch::Sender::new(Some(0))) }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("nothing panics under this lock")
    }

    fn set_down(&self, down: bool) {
        let mut state = self.lock();
        state.down = down;
        self.revision.send_replace((!down).then_some(state.revision));
    }

    /// Runs on the state with what is overdue swept away, and wakes watchers if anything changed.
    fn with<T>(&self, run: impl FnOnce(&mut State, Time) -> T) -> Result<T, StoreError> {
        let mut state = self.lock();
        if state.down {
            return Err("the store is down".to_owned());
        }
        let (before, now) = (state.revision, seam::now());
        state.sweep(now);
        let result = run(&mut state, now);
        if state.revision != before {
            self.revision.send_replace(Some(state.revision));
        }
        Ok(result)
    }

    fn news(&self, prefix: &str, seen: Option<u64>) -> Result<News, StoreError> {
        self.with(|state, _| {
            let within = |key: &str| key.starts_with(prefix);
            let keys = match seen.filter(|seen| *seen >= state.forgotten) {
                Some(seen) => {
                    let news = state.log.partition_point(|(revision, ..)| *revision <= seen);
                    state
                        .log
                        .range(news..)
                        .filter(|(_, key, _)| within(key))
                        .map(|(revision, key, value)| (key.clone(), value.clone(), *revision))
                        .collect()
                }
                None => state
                    .values
                    .iter()
                    .filter(|(key, _)| within(key))
                    .map(|(key, entry)| (key.clone(), Some(entry.value.clone()), entry.revision))
                    .collect(),
            };
            let snapshot = seen.is_none_or(|seen| seen < state.forgotten);
            News { snapshot, revision: state.revision, keys }
        })
    }
}

impl State {
    fn sweep(&mut self, now: Time) {
        let over: Vec<u64> =
            self.registrations.iter().filter(|(_, (ends, _))| *ends <= now).map(|(id, _)| *id).collect();
        for id in over {
            self.end(id);
        }
    }

    fn end(&mut self, registration: u64) {
        self.registrations.remove(&registration);
        let keys: Vec<String> = self
            .values
            .iter()
            .filter(|(_, entry)| entry.registration == registration)
            .map(|(key, _)| key.clone())
            .collect();
        let changes = keys.into_iter().map(|key| Change { key, value: None, registration: 0 });
        self.change(changes.collect());
    }

    /// Everything in one revision, which is returned.
    fn change(&mut self, changes: Vec<Change>) -> u64 {
        let revision = self.revision + 1;
        for Change { key, value, registration } in changes {
            match value.clone() {
                Some(value) => {
                    self.values.insert(key.clone(), Entry { value, revision, registration });
                }
                None if self.values.remove(&key).is_none() => continue,
                None => {}
            }
            self.revision = revision;
            self.log.push_back((revision, key, value));
        }
        while self.log.len() > LOG_MAX
            && let Some((forgotten, ..)) = self.log.pop_front()
        {
            self.forgotten = forgotten;
        }
        self.revision
    }
}

#[async_trait]
impl Store for Memory {
    fn name(&self) -> String {
        "embedded membership".to_owned()
    }

    async fn open(&self, time_to_live: Duration) -> Result<u64, StoreError> {
        self.with(|state, now| {
            state.next_registration += 1;
            state.registrations.insert(state.next_registration, (now + time_to_live, time_to_live));
            state.next_registration
        })
    }

    async fn renew(&self, registration: u64) -> Result<bool, StoreError> {
        self.with(|state, now| match state.registrations.get_mut(&registration) {
            Some((ends, time_to_live)) => {
                *ends = now + *time_to_live;
                true
            }
            None => false,
        })
    }

    async fn close(&self, registration: u64) -> Result<(), StoreError> {
        self.with(|state, _| state.end(registration))
    }

    async fn transact(
        &self,
        conditions: Vec<Condition>,
        changes: Vec<Change>,
    ) -> Result<Option<u64>, StoreError> {
        self.with(|state, _| {
            let holds =
                |c: &Condition| state.values.get(&c.key).map_or(0, |entry| entry.revision) == c.revision;
            let alive = |c: &Change| c.registration == 0 || state.registrations.contains_key(&c.registration);
            if !changes.iter().all(alive) {
                return Err("the registration has ended".to_owned());
            }
            Ok(conditions.iter().all(holds).then(|| state.change(changes)))
        })?
    }

    async fn watch(&self, prefix: &str) -> Result<mpsc::Receiver<News>, StoreError> {
        let (store, prefix) = (self.clone(), prefix.to_owned());
        let mut revision = self.revision.subscribe();
        let first = self.news(&prefix, None)?;
        let (send, news) = mpsc::channel(16);
        // Ends when the watcher is gone or the store goes down.
        seam::spawn(async move {
            let mut seen = first.revision;
            if send.send(first).await.is_err() {
                return;
            }
            loop {
                tokio::select! {
                    changed = revision.changed() => if changed.is_err() { return },
                    () = seam::sleep(SWEEP) => {}
                    () = send.closed() => return,
                }
                let Ok(news) = store.news(&prefix, Some(seen)) else { return };
                seen = news.revision;
                if (news.snapshot || !news.keys.is_empty()) && send.send(news).await.is_err() {
                    return;
                }
            }
        });
        Ok(news)
    }
}
