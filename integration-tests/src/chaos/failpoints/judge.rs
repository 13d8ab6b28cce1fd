//! Runs a case and judges it: every answer, every end, and what is left behind.

use std::time::Duration;

use serde_json::Value;
use tandem_chassis::fail::{self, Action, Fate};
use tandem_chassis::seam;
use tandem_engine::fake::Ordinary;
use tandem_types::Time;
use tokio::runtime::Handle;

use super::case::{Ask, Case, Situation};
use super::client::{self, Ended};
use super::script;
use super::world::World;
use crate::checkpoints;

/// After the last request everything is given back within this time.
const REST_MAX: Duration = Duration::from_secs(15);

/// What came of a case.
#[derive(Clone, Debug)]
pub struct Report {
    /// The case.
    pub case: Case,
    /// Its faults, and whom they struck.
    pub fates: Vec<Fate>,
    /// How each request ended, with what the client saw.
    pub ended: Vec<(String, String)>,
    /// Requests with the right answer.
    pub whole: usize,
    /// Requests that ended with an error.
    pub loud: usize,
    /// Requests whose clients left.
    pub left: usize,
    /// Requests that were placed again.
    pub again: usize,
    /// What must not be.
    pub violations: Vec<String>,
    /// Virtual time it took.
    pub took: Duration,
}

impl Report {
    pub(crate) fn broken(case: Case, why: String) -> Report {
        Report { violations: vec![why], ..Report::new(case) }
    }

    fn new(case: Case) -> Report {
        Report {
            case,
            fates: Vec::new(),
            ended: Vec::new(),
            whole: 0,
            loud: 0,
            left: 0,
            again: 0,
            violations: Vec::new(),
            took: Duration::ZERO,
        }
    }

    fn note(&mut self, name: &str, ended: Ended) {
        let text = match ended {
            Ended::Whole => {
                self.whole += 1;
                "whole".to_owned()
            }
            Ended::Loudly(why) => {
                self.loud += 1;
                format!("loudly: {why}")
            }
            Ended::Left => {
                self.left += 1;
                "the client left".to_owned()
            }
            Ended::Wrongly(why) => {
                self.violations.push(format!("{name}: {why}"));
                format!("wrongly: {why}")
            }
        };
        self.ended.push((name.to_owned(), text));
    }
}

pub(crate) async fn run(case: &Case) -> Report {
    let mut report = Report::new(case.clone());
    let ordinary = Ordinary::read(&checkpoints::named("qwen3")).expect("the checkpoint is committed");
    let began = seam::now();
    let world = World::start(case).await;
    warm(&world, case, &ordinary).await;
    let baseline = tasks();

    case.faults.iter().cloned().for_each(fail::arm);
    load(&world, case, &ordinary, &mut report).await;
    report.fates = fail::disarm();
    let over = seam::now();
    for ask in &case.asks {
        let record = world.record(&ask.name).await;
        let notes = record["events"].as_array().cloned().unwrap_or_default();
        let placed_again = |note: &Value| note["what"].as_str().is_some_and(|w| w.ends_with("placed again"));
        report.again += usize::from(notes.iter().any(placed_again));
    }

    let fallen = fallen(&report.fates);
    report.violations.extend(shells(&world, &report.fates).await);
    rest(&world, &fallen, baseline, over, &mut report).await;
    if fallen.len() < world.workers.len() {
        // Steps that fail by themselves may end it too, but not every time.
        let attempts = if case.situation == Situation::Failing { 8 } else { 1 };
        let mut ended = Ended::Left;
        for attempt in 0..attempts {
            let last = plain(&format!("last-{attempt}"), 40, 5);
            ended = client::ask(world.api, &world.model, &last, &ordinary).await;
            if !matches!(ended, Ended::Loudly(_)) {
                break;
            }
        }
        if ended != Ended::Whole {
            report.violations.push(format!("a request after all this ended {ended:?}"));
        }
    }
    report.took = seam::now().since(began);
    world.close().await;
    gone(&mut report).await;
    report
}

/// Work of every kind, so that every connection that is kept stands before tasks are counted.
async fn warm(world: &World, case: &Case, ordinary: &Ordinary) {
    let patient = !case.fake().contains("refuse") && !case.fake().contains("fail");
    script::warm(world).await;
    for index in 0..2 {
        let ask = plain(&format!("warm-{index}"), 40 + index as u64, 3);
        let ended = client::ask(world.api, &world.model, &ask, ordinary).await;
        assert!(!patient || ended == Ended::Whole, "without a fault a request ends whole: {ended:?}");
    }
    seam::sleep(Duration::from_secs(1)).await;
}

fn plain(name: &str, length: u64, tokens: u32) -> Ask {
    Ask {
        name: name.to_owned(),
        at: Duration::ZERO,
        prompt: (0..length).map(|i| ((i * 7 + length) % 370) as u32).collect(),
        tokens,
        choices: 1,
        seed: None,
        streamed: true,
        logprobs: false,
        scored: false,
        leaves: None,
        stalls: None,
    }
}

async fn load(world: &World, case: &Case, ordinary: &Ordinary, report: &mut Report) {
    let asks = case.asks.iter().map(|ask| client::ask(world.api, &world.model, ask, ordinary));
    let flips = case.flips.iter().map(async |flip| {
        seam::sleep(flip.at).await;
        world.flip(flip.worker, flip.role).await;
    });
    let plots = case.scripts.iter().map(|plot| script::play(world, *plot, case.script_seed, ordinary));
    let (ended, plotted, _) = tokio::join!(
        futures_util::future::join_all(asks),
        futures_util::future::join_all(plots),
        futures_util::future::join_all(flips),
    );
    for (ask, ended) in case.asks.iter().zip(ended) {
        report.note(&ask.name, ended);
    }
    for (plot, ended) in case.scripts.iter().zip(plotted) {
        report.note(&format!("{plot:?}"), ended);
    }
}

/// Workers that cannot go on: their step loop panicked, or their device has lost a step for ever.
fn fallen(fates: &[Fate]) -> Vec<String> {
    let deadly = |fate: &&Fate| {
        fate.fault.point.starts_with("engine.") && matches!(fate.fault.action, Action::Panic | Action::Drop)
    };
    fates.iter().filter(deadly).filter_map(|fate| fate.struck.clone()).collect()
}

/// Fallen workers that still look alive: one whose step loop panicked has to end, and none may take work.
async fn shells(world: &World, fates: &[Fate]) -> Vec<String> {
    if fallen(fates).is_empty() {
        return Vec::new();
    }
    // The watchdog needs two seconds to be sure.
    seam::sleep(Duration::from_secs(3)).await;
    let ready = world.ready().await;
    let mut shells = Vec::new();
    for worker in world.workers.iter().filter(|worker| fallen(fates).contains(&worker.id)) {
        let panicked = |fate: &Fate| {
            let engine = fate.fault.point.starts_with("engine.") && fate.fault.action == Action::Panic;
            engine && fate.struck.as_ref() == Some(&worker.id)
        };
        if ready.contains(&worker.id) {
            shells.push(format!("{} has fallen and takes work", worker.id));
        } else if fates.iter().any(panicked) && worker.state().await.is_ok() {
            shells.push(format!("the step loop of {} has panicked, and its shell lives", worker.id));
        }
    }
    shells
}

/// Waits until nothing is held and everybody takes work again.
async fn rest(world: &World, fallen: &[String], baseline: usize, over: Time, report: &mut Report) {
    loop {
        // Asking takes tasks too, so they are counted some time after the last question.
        seam::sleep(Duration::from_millis(500)).await;
        let tasks = tasks();
        let mut held = Vec::new();
        let ready = world.ready().await;
        for worker in world.workers.iter().filter(|worker| !fallen.contains(&worker.id)) {
            let state = worker.state().await.unwrap_or_default();
            for count in [&state["blocks"]["in_use"], &state["leases"], &state["legs"], &state["claims"]] {
                if *count != 0 {
                    held.push(format!("{} holds {state}", worker.id));
                    break;
                }
            }
            if !ready.contains(&worker.id) {
                held.push(format!("{} takes no work", worker.id));
            }
        }
        let router = client::get(world.admin, "/admin/state").await.unwrap_or_default();
        if router["running"] != 0 || router["waiting"] != 0 {
            held.push(format!("the router holds {router}"));
        }
        if tasks > baseline {
            held.push(format!("{tasks} tasks where there were {baseline}"));
        }
        if held.is_empty() {
            return;
        }
        if seam::now().since(over) >= REST_MAX {
            report.violations.extend(held.into_iter().map(|what| format!("after {REST_MAX:?}: {what}")));
            return;
        }
    }
}

/// After everything was closed, no task is left.
async fn gone(report: &mut Report) {
    seam::sleep(Duration::from_secs(1)).await;
    let left = tasks();
    if left > 0 {
        report.violations.push(format!("{left} tasks are left after the end"));
    }
}

fn tasks() -> usize {
    Handle::current().metrics().num_alive_tasks()
}
