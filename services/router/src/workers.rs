//! Which workers there are: membership and sessions, seen together.
//!
//! Membership says who exists; a session says who lives. A lost key alone kills nobody, and a dead session
//! alone is tried again for as long as the key stands.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use serde_json::{Value, json};
use tandem_chassis::{Shutdown, Tasks, seam};
use tandem_cluster::{By, Membership, Registration, View};
use tandem_placement::Candidate;
use tandem_proto::v1::Holder;
use tandem_types::{BLOCK_TOKENS, Incarnation, KvIdentity, Role, StepTime, Time, WorkerId, WorkerState};
use tokio::sync::watch;

use crate::link::{Link, Report};
use crate::prefixes::Prefixes;

/// So long the planner leaves a worker alone whose role an operator has ordered.
const OPERATOR_HOLDS: Duration = Duration::from_secs(600);

/// What a hand-off takes before its first byte, and how fast bytes are, by and large.
const WAY_SETUP_SECONDS: f64 = 2e-3;
const WAY_BYTES_PER_SECOND: f64 = 3e9;

/// Every worker that this router knows, with its session.
pub(crate) struct Workers {
    router: String,
    incarnation: Incarnation,
    membership: Arc<dyn Membership>,
    prefixes: Arc<Prefixes>,
    known: Mutex<Known>,
    changed: watch::Sender<u64>,
    tasks: Tasks,
    shutdown: Shutdown,
}

#[derive(Default)]
struct Known {
    links: BTreeMap<WorkerId, Linked>,
    cordoned: BTreeSet<WorkerId>,
}

struct Linked {
    link: Arc<Link>,
    registration: Registration,
    gone: watch::Sender<bool>,
}

/// Why an operator's wish for a worker cannot be met.
#[derive(Debug, thiserror::Error)]
pub(crate) enum WishError {
    #[error("there is no worker {0:?}; /admin/cluster lists them")]
    Unknown(String),
    #[error("{0}")]
    Refused(String),
}

impl Workers {
    pub(crate) fn new(
        router: &str,
        incarnation: Incarnation,
        membership: Arc<dyn Membership>,
        prefixes: Arc<Prefixes>,
        shutdown: Shutdown,
    ) -> Arc<Workers> {
        Arc::new(Workers {
            router: router.to_owned(),
            incarnation,
            membership,
            prefixes,
            known: Mutex::default(),
            changed: watch::Sender::new(0),
            tasks: Tasks::new(),
            shutdown,
        })
    }

    fn lock(&self) -> MutexGuard<'_, Known> {
        self.known.lock().expect("nothing panics under this lock")
    }

    /// Follows membership until the end.
    pub(crate) async fn run(self: Arc<Self>) {
        let mut views = self.membership.watch();
        let mut sweep = seam::interval(Duration::from_millis(500));
        loop {
            let view = views.borrow_and_update().clone();
            self.follow(&view);
            tokio::select! {
                changed = views.changed() => if changed.is_err() { break },
                () = sweep.tick() => {}
                () = self.shutdown.stopped() => break,
            }
        }
        self.tasks.shutdown(Duration::from_secs(1)).await;
    }

    /// Opens links to new workers and new starts of old ones; gives up those that are gone in both ways.
    fn follow(self: &Arc<Self>, view: &View) {
        let now = seam::now();
        let mut known = self.lock();
        for registration in view.workers.values() {
            let id = WorkerId(registration.id.clone());
            if let Some(linked) = known.links.get_mut(&id) {
                if linked.link.incarnation == registration.incarnation {
                    linked.registration = registration.clone();
                    continue;
                }
                linked.gone.send_replace(true);
            }
            let linked = self.open(id.clone(), registration.clone());
            known.links.insert(id, linked);
        }
        known.links.retain(|id, linked| {
            let keep = view.workers.contains_key(&id.0) || linked.link.state(now) != WorkerState::Dead;
            if !keep {
                linked.gone.send_replace(true);
                self.prefixes.forget(id);
            }
            keep
        });
    }

    fn open(self: &Arc<Self>, id: WorkerId, registration: Registration) -> Linked {
        let link = Link::new(
            id,
            registration.incarnation,
            registration.address.clone(),
            &self.router,
            self.incarnation,
            self.prefixes.clone(),
        );
        let (gone, is_gone) = watch::channel(false);
        self.tasks.spawn(link.clone().run(self.shutdown.clone(), is_gone));
        let (mut changes, workers, shutdown) = (link.watch(), Arc::downgrade(self), self.shutdown.clone());
        self.tasks.spawn(async move {
            loop {
                tokio::select! {
                    changed = changes.changed() => if changed.is_err() { return },
                    () = shutdown.stopped() => return,
                }
                let Some(workers) = workers.upgrade() else { return };
                workers.changed.send_modify(|n| *n += 1);
            }
        });
        Linked { link, registration, gone }
    }

    /// Rises when a worker comes, goes or changes its state.
    pub(crate) fn watch(&self) -> watch::Receiver<u64> {
        self.changed.subscribe()
    }

    /// Workers that may take new work, and what a policy may know of them.
    pub(crate) fn candidates(&self) -> (Vec<Arc<Link>>, Vec<Candidate>) {
        let now = seam::now();
        let known = self.lock();
        let ready = known.links.iter().filter(|(id, linked)| {
            !known.cordoned.contains(*id) && linked.link.state(now) == WorkerState::Ready
        });
        let (links, mut candidates): (Vec<_>, Vec<_>) =
            ready.map(|(id, linked)| (linked.link.clone(), candidate(id, linked, now))).unzip();
        drop(known);
        // A worker that has not measured itself yet is taken to be like the others.
        let common = common_model(&candidates);
        candidates.iter_mut().for_each(|candidate| candidate.model = candidate.model.or(common));
        (links, candidates)
    }

    /// The last report of every worker that lives, with the start of its process.
    pub(crate) fn reports(&self) -> Vec<(WorkerId, Incarnation, Report)> {
        let now = seam::now();
        let known = self.lock();
        let alive = known.links.iter().filter(|(_, linked)| linked.link.state(now) != WorkerState::Dead);
        alive.map(|(id, linked)| (id.clone(), linked.link.incarnation, linked.link.report())).collect()
    }

    /// What the KV of the workers is, from the first that says so.
    pub(crate) fn identity(&self) -> Option<KvIdentity> {
        let known = self.lock();
        known.links.values().next().map(|linked| linked.registration.identity.clone())
    }

    /// What every worker has cached.
    pub(crate) fn prefixes(&self) -> &Prefixes {
        &self.prefixes
    }

    /// How many workers are in each state.
    pub(crate) fn count(&self, state: WorkerState) -> usize {
        let now = seam::now();
        self.lock().links.values().filter(|linked| linked.link.state(now) == state).count()
    }

    /// The workers of `/admin/cluster`.
    pub(crate) fn describe(&self) -> Vec<Value> {
        let now = seam::now();
        let known = self.lock();
        let rows = known.links.iter().map(|(id, linked)| {
            let (registration, report) = (&linked.registration, linked.link.report());
            json!({
                "id": id.0,
                "kind": "worker",
                "role": report.role.or(registration.role).map(Role::as_str),
                "epoch": report.epoch.0.max(registration.epoch.0),
                "state": linked.link.state(now).as_str(),
                "cordoned": known.cordoned.contains(id),
                "address": registration.address,
                "admin": registration.admin,
                "model": registration.model,
                "incarnation": registration.incarnation.to_string(),
                "pid": registration.pid,
                "transports": registration.transports,
                "in_flight": linked.link.in_flight().0,
                "blocks": {
                    "total": report.load.blocks_total,
                    "free": report.load.blocks_free,
                    "cached": report.load.blocks_cached,
                },
                "running": report.load.running,
                "waiting": report.load.waiting,
                "trouble": linked.link.trouble(),
            })
        });
        rows.collect()
    }

    /// No new work for this worker, or work again.
    pub(crate) fn cordon(&self, worker: &str, cordoned: bool) -> Result<(), WishError> {
        let id = WorkerId(worker.to_owned());
        let mut known = self.lock();
        if !known.links.contains_key(&id) {
            return Err(WishError::Unknown(worker.to_owned()));
        }
        if cordoned {
            known.cordoned.insert(id)
        } else {
            known.cordoned.remove(&id)
        };
        drop(known);
        self.changed.send_modify(|n| *n += 1);
        Ok(())
    }

    /// Who lends the first blocks of a prompt that this worker has computed, if it can be asked now.
    pub(crate) fn holder(&self, worker: &WorkerId, blocks: u32) -> Option<Holder> {
        let known = self.lock();
        let linked = known.links.get(worker)?;
        let ready = linked.link.state(seam::now()) == WorkerState::Ready;
        ready.then(|| Holder {
            worker: worker.0.clone(),
            incarnation: linked.link.incarnation.0,
            lender: linked.registration.address.clone(),
            blocks,
        })
    }

    /// Asks a worker to take nothing new and finish what it has. Returns how much that is.
    pub(crate) async fn drain(&self, worker: &str) -> Result<u32, WishError> {
        let registration = self.registration(worker)?;
        let refused = |why: String| WishError::Refused(format!("{worker} cannot be drained: {why}"));
        let ask = async {
            let channel = tandem_chassis::grpc::connect(&registration.address).await?;
            let request = tandem_proto::v1::DrainRequest {
                worker_incarnation: registration.incarnation.0,
                remaining_ms: 30_000,
            };
            let reply = tandem_proto::v1::worker_client::WorkerClient::new(channel).drain(request).await;
            reply.map(|r| r.into_inner().running).map_err(|s| s.message().to_owned())
        };
        let reply = seam::timeout(Duration::from_secs(3), ask).await;
        reply.map_err(|_| refused("no answer in 3 s".into()))?.map_err(refused)
    }

    /// Orders another role, by way of membership. An operator's order keeps the planner away for a while.
    pub(crate) async fn order_role(&self, worker: &str, role: Role, by: By) -> Result<(), WishError> {
        let registration = self.registration(worker)?;
        let report = self.lock().links.get(&WorkerId(worker.to_owned())).map(|l| l.link.report());
        let epoch = report.map_or(registration.epoch, |report| report.epoch.max(registration.epoch));
        let order = tandem_cluster::RoleOrder {
            incarnation: registration.incarnation,
            expected_epoch: epoch,
            role,
            by,
            until: (by == By::Operator).then(|| (seam::unix_time() + OPERATOR_HOLDS).as_millis() as u64),
        };
        let ordered = self.membership.order_role(worker, order).await;
        ordered.map_err(|error| WishError::Refused(error.to_string()))
    }

    fn registration(&self, worker: &str) -> Result<Registration, WishError> {
        let known = self.lock();
        let linked = known.links.get(&WorkerId(worker.to_owned()));
        linked.map(|l| l.registration.clone()).ok_or_else(|| WishError::Unknown(worker.to_owned()))
    }

    /// The model that the workers serve, from the first that says so.
    pub(crate) fn view(&self) -> Arc<View> {
        self.membership.watch().borrow().clone()
    }
}

/// What a policy may know of a worker: its last report, and our own books.
fn candidate(id: &WorkerId, linked: &Linked, now: Time) -> Candidate {
    let report = linked.link.report();
    let load = &report.load;
    let (legs, unreported_tokens) = linked.link.in_flight();
    let work = linked.link.load(now);
    let used = load.blocks_total.saturating_sub(load.blocks_free + load.blocks_cached);
    Candidate {
        worker: id.clone(),
        role: report.role.or(linked.registration.role).unwrap_or(Role::Mixed),
        in_flight: legs,
        running: load.running,
        waiting: load.waiting,
        waiting_tokens: load.waiting_tokens + unreported_tokens,
        kv_usage: if load.blocks_total == 0 { 0.0 } else { used as f32 / load.blocks_total as f32 },
        model: report.model(),
        prompt_budget: report.prompt_budget(),
        paced: report.paced(),
        queue_seconds: work.queue_seconds,
        timely_seconds: work.timely_seconds,
        decodes: work.decodes,
        decode_tokens: work.decode_tokens,
        kv_tokens: u64::from(load.blocks_total) * u64::from(BLOCK_TOKENS),
        rows_max: load.pacing.map_or(0, |pacing| pacing.rows_max),
        link: way(&linked.registration),
        near: Vec::new(),
    }
}

/// The line bound by arithmetic from those that prefill, the one bound by memory from those that decode.
pub(crate) fn common_model(candidates: &[Candidate]) -> Option<StepTime> {
    let of = |role| candidates.iter().filter(move |c| c.role == role).find_map(Candidate::sane_model);
    let any = || candidates.iter().find_map(Candidate::sane_model);
    let prefill = of(Role::Prefill).or_else(any)?;
    let decode = of(Role::Decode).or_else(any)?;
    let model = StepTime {
        a0: prefill.a0,
        a1: prefill.a1,
        a2: prefill.a2,
        b0: decode.b0,
        b1: decode.b1,
        b2: decode.b2,
    };
    model.is_sane().then_some(model)
}

/// The way between workers of this model, before anybody has measured it.
fn way(registration: &Registration) -> tandem_placement::Link {
    let block_bytes: u64 = registration.form.page_bytes.iter().sum();
    let token_bytes = block_bytes as f64 / f64::from(BLOCK_TOKENS);
    tandem_placement::Link {
        setup_seconds: WAY_SETUP_SECONDS,
        tokens_per_second: WAY_BYTES_PER_SECOND / token_bytes.max(1.0),
    }
}
