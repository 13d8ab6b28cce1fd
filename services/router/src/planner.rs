//! The role planner on its own clock: who leads the routers watches all workers, plans by `placement`, and orders
//! roles through membership, which checks that it still leads.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use serde_json::{Value, json};
use tandem_chassis::config::Slo;
use tandem_chassis::{Shutdown, Tasks, seam};
use tandem_cluster::{By, Membership};
use tandem_placement::Candidate;
use tandem_placement::planner::{Config, Load, Observer, Plan, Planner};
use tandem_proto::v1;
use tandem_types::{Incarnation, Role, Time, WorkerId};

use crate::config::PlannerMode;
use crate::metrics::Metrics;
use crate::workers::{Workers, common_model};

/// How often the planner looks.
const TICK: Duration = Duration::from_secs(1);
/// A worker that has not taken its role by then has not obeyed.
const OBEY_MAX: Duration = Duration::from_secs(10);
/// Flips that are kept for operators.
const FLIPS_KEPT: usize = 32;

/// Plans roles while this router leads.
pub(crate) struct RolePlanner {
    pub(crate) id: String,
    pub(crate) mode: PlannerMode,
    pub(crate) slo: Option<Slo>,
    pub(crate) workers: Arc<Workers>,
    pub(crate) membership: Arc<dyn Membership>,
    pub(crate) metrics: Arc<Metrics>,
    pub(crate) shutdown: Shutdown,
    pub(crate) shown: Arc<Shown>,
}

/// What the planner has seen and planned last, for `/admin/cluster`.
#[derive(Default)]
pub(crate) struct Shown(Mutex<Value>);

impl Shown {
    pub(crate) fn get(&self) -> Value {
        self.0.lock().expect("nothing panics under this lock").clone()
    }

    fn set(&self, value: Value) {
        *self.0.lock().expect("nothing panics under this lock") = value;
    }
}

impl RolePlanner {
    /// Leads whenever nobody else does, and plans while it leads.
    pub(crate) async fn run(self) {
        let tasks = Tasks::new();
        loop {
            let campaign = self.membership.campaign(&self.id);
            let mut leadership = tokio::select! {
                guard = campaign => guard,
                () = self.shutdown.draining() => return,
            };
            tracing::info!("this router plans roles");
            let mut watch = LoadWatch::new(self.slo);
            let mut planner = Planner::new(Config::default());
            let mut flips = Vec::new();
            let mut ticks = seam::interval(TICK);
            loop {
                tokio::select! {
                    () = ticks.tick() => {}
                    () = leadership.lost() => break,
                    () = self.shutdown.draining() => return,
                }
                let now = seam::now();
                let load = watch.look(&self.workers, now);
                let plan = planner.plan(&self.candidates(), &load, now);
                self.metrics.observe_plan(!plan.flips.is_empty(), plan.replicas);
                if !plan.flips.is_empty() {
                    self.carry_out(&plan, &tasks, &mut flips);
                }
                self.shown.set(json!({
                    "mode": self.mode,
                    "load": load,
                    "reason": plan.reason,
                    "promises": plan.promises,
                    "replicas": { "prefill": plan.replicas.0, "decode": plan.replicas.1 },
                    "flips": flips,
                }));
            }
            tracing::warn!("this router no longer plans roles");
        }
    }

    /// Workers whose roles may change. Each is shown with what all of them have learnt: a worker that has only
    /// prefilled knows little of decoding.
    fn candidates(&self) -> Vec<Candidate> {
        let view = self.workers.view();
        let now = seam::unix_time().as_millis() as u64;
        let held: BTreeSet<&String> = view
            .roles
            .iter()
            .filter(|(_, order)| order.by == By::Operator && order.until.is_some_and(|until| until > now))
            .map(|(id, _)| id)
            .collect();
        let mut candidates = self.workers.candidates().1;
        candidates.retain(|candidate| !held.contains(&candidate.worker.0));
        let common = common_model(&candidates);
        candidates.iter_mut().for_each(|candidate| candidate.model = common);
        candidates
    }

    fn carry_out(&self, plan: &Plan, tasks: &Tasks, flips: &mut Vec<Value>) {
        for flip in &plan.flips {
            tracing::info!(worker = %flip.worker, from = %flip.from, to = %flip.to, reason = plan.reason,
                mode = %self.mode, "the planner wants another role");
            let at = seam::unix_time().as_secs_f64();
            flips.push(
                json!({ "at": at, "worker": flip.worker, "from": flip.from, "to": flip.to, "reason": plan.reason }),
            );
            if flips.len() > FLIPS_KEPT {
                flips.remove(0);
            }
            if self.mode != PlannerMode::On {
                continue;
            }
            let (workers, metrics, flip) = (self.workers.clone(), self.metrics.clone(), flip.clone());
            tasks.spawn(async move {
                let ordered = seam::now();
                if let Err(error) = workers.order_role(&flip.worker.0, flip.to, By::Planner).await {
                    tracing::warn!(worker = %flip.worker, %error, "the role could not be ordered");
                    return metrics.observe_flip(flip.from, flip.to, None);
                }
                let obeyed = seam::timeout(OBEY_MAX, has_role(&workers, &flip.worker, flip.to)).await;
                metrics.observe_flip(flip.from, flip.to, obeyed.ok().map(|()| seam::now().since(ordered)));
            });
        }
    }
}

/// Returns when the worker says that it has this role.
async fn has_role(workers: &Workers, worker: &WorkerId, role: Role) {
    let mut changes = workers.watch();
    let is = |id: &WorkerId, said: Option<Role>| id == worker && said == Some(role);
    while !workers.reports().iter().any(|(id, _, report)| is(id, report.role)) {
        if changes.changed().await.is_err() {
            return std::future::pending().await;
        }
    }
}

/// Turns the totals that workers report into the load of late.
struct LoadWatch {
    observer: Observer,
    targets: Option<(f64, f64)>,
    known: BTreeMap<WorkerId, (Incarnation, v1::Totals)>,
}

impl LoadWatch {
    fn new(slo: Option<Slo>) -> LoadWatch {
        LoadWatch {
            observer: Observer::new(Config::default().memory_seconds),
            targets: slo.map(|slo| (slo.ttft.as_secs_f64(), slo.tpot.as_secs_f64())),
            known: BTreeMap::new(),
        }
    }

    fn look(&mut self, workers: &Workers, now: Time) -> Load {
        let reports = workers.reports();
        for (worker, incarnation, report) in &reports {
            let Some(totals) = report.load.totals else { continue };
            let before = self.known.insert(worker.clone(), (*incarnation, totals));
            // Of a worker that was not watched before, what it did until now counts nothing.
            if let Some((_, before)) = before.filter(|(known, _)| known == incarnation) {
                self.count(&before, &totals, now);
            }
        }
        self.known.retain(|known, _| reports.iter().any(|(worker, ..)| worker == known));
        self.observer.load(now)
    }

    /// What lies between two reports. Totals that fall are a lie and count as nothing.
    fn count(&mut self, before: &v1::Totals, now: &v1::Totals, at: Time) {
        let more = |now: u64, before: u64| now.saturating_sub(before) as f64;
        self.observer.arrived_many(
            more(now.prompts, before.prompts),
            more(now.prompt_tokens, before.prompt_tokens),
            now.prompt_seconds - before.prompt_seconds,
            self.targets,
            at,
        );
        self.observer.drawn(more(now.drawn, before.drawn), more(now.ended, before.ended), at);
    }
}

#[cfg(test)]
mod tests {
    use tandem_types::StepTime;

    use super::*;

    #[test]
    fn load_is_what_lies_between_reports_and_falling_totals_count_as_nothing() {
        let mut watch =
            LoadWatch::new(Some(Slo { ttft: Duration::from_secs(1), tpot: Duration::from_millis(50) }));
        let totals = |n: u64| v1::Totals {
            prompts: n,
            prompt_tokens: 1000 * n,
            prompt_seconds: 0.1 * n as f64,
            drawn: 200 * n,
            ended: n,
        };
        for second in 1..=60 {
            watch.count(&totals(5 * second - 5), &totals(5 * second), Time::from_millis(1000 * second));
        }
        watch.count(&totals(300), &totals(7), Time::from_millis(60_000));
        let load = watch.observer.load(Time::from_millis(60_000));
        assert!((4.5..6.0).contains(&load.requests), "{load:?}");
        assert!((load.prompt_tokens - 1000.0).abs() < 1.0, "{load:?}");
        assert!((load.output_tokens - 200.0).abs() < 10.0, "{load:?}");
        assert_eq!((load.first_token_seconds, load.token_seconds), (1.0, 0.05));
    }

    #[test]
    fn prefill_comes_from_who_prefills_and_decode_from_who_decodes() {
        let step = |a, b| StepTime { a0: a, a1: a, a2: a, b0: b, b1: b, b2: b };
        let candidate = |role, model| Candidate { role, model: Some(model), ..Candidate::default() };
        let both = [candidate(Role::Prefill, step(1.0, 9.0)), candidate(Role::Decode, step(9.0, 2.0))];
        assert_eq!(common_model(&both), Some(step(1.0, 2.0)));
        assert_eq!(common_model(&both[..1]), Some(step(1.0, 9.0)));
        assert_eq!(common_model(&[]), None);
    }
}
