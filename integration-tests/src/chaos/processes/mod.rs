//! Real processes that are killed or stopped while a request is in a named stage.
//!
//! A case is drawn from its seed alone: which process, which fault, in which stage of the request that is
//! watched, with which prompts. Cases share clusters; only the struck process is started again. The stage is
//! seen from outside, in stream events and on admin ports; a stage that has passed unseen is tried again with a
//! longer prompt. Then everything is judged: every answer, what each process still holds, and whether the struck
//! process is of use again.

mod case;
mod table;

use std::time::Duration;

use tandem_engine::fake::Ordinary;

use super::ask::Question;
use super::fleet::{Fleet, ROUTER};
use super::random::Random;
use crate::checkpoints;

use case::{Case, Violation};
pub use table::Table;

/// The checkpoint whose vocabulary the fake engines have.
const MODEL: &str = "qwen3";
/// Pages so large that a hand-off takes a while, steps so slow that every stage can be seen.
const FAKE: &str = "paced:60ms,10ms,page-bytes=131072";

/// What to run.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// Cases.
    pub runs: u64,
    /// The first case's seed; each further one has the next.
    pub seed: u64,
    /// Clusters side by side, each with cases of its own: most of a case's time is waiting.
    pub lanes: u64,
}

/// Called after each case, with what it was and, if it did not hold, what must not have been.
type Done<'a> = dyn Fn(&str, Option<&str>) + 'a;

/// The command that repeats a case.
fn command(seed: u64) -> String {
    format!("cargo xtask chaos --level processes --runs 1 --seed {seed}")
}

/// Runs the cases, calling `done` after each. The table is complete also when cases failed; its violations say which.
///
/// # Errors
/// If a cluster cannot be started at all.
pub async fn run(options: Options, done: &Done<'_>) -> Result<Table, String> {
    let lanes = options.lanes.clamp(1, options.runs.max(1));
    let lanes = (0..lanes).map(|lane| {
        let seeds = (options.seed..options.seed + options.runs).skip(lane as usize).step_by(lanes as usize);
        run_lane(lane, seeds, done)
    });
    let mut table = Table::default();
    for lane in futures_util::future::join_all(lanes).await {
        table.merge(lane?);
    }
    Ok(table)
}

async fn run_lane(lane: u64, seeds: impl Iterator<Item = u64>, done: &Done<'_>) -> Result<Table, String> {
    let ordinary = Ordinary::read(&checkpoints::named(MODEL)).map_err(|error| error.to_string())?;
    let mut table = Table::default();
    let mut fleet: Option<Fleet> = None;
    for (index, seed) in seeds.enumerate() {
        let case = Case::of(seed);
        let mut running = match fleet.take() {
            Some(fleet) => fleet,
            None => start(&format!("{lane}-{index}"), &ordinary).await?,
        };
        let said = format!("seed {seed}, {case}");
        match case.run(&mut running, &ordinary).await {
            Ok(outcome) => {
                table.passed(&case, &outcome);
                done(&said, None);
                fleet = Some(running);
            }
            Err(Violation(what)) => {
                let again = command(seed);
                let words = running.last_words();
                let violation = format!("{said}: {what}\n  again: {again}\n{words}");
                done(&said, Some(&violation));
                table.failed(&case, violation);
                // What this cluster has left behind must not be laid at the next case's door.
            }
        }
    }
    Ok(table)
}

/// A cluster at rest, with every connection that it makes by itself.
async fn start(name: &str, ordinary: &Ordinary) -> Result<Fleet, String> {
    let mut fleet = Fleet::start(name, members()).await?;
    for round in 0..2 {
        for index in 0..6 {
            let mut random = Random::new(index);
            let question = Question {
                name: format!("warm-{round}-{index}"),
                model: MODEL.into(),
                // The long ones are pulled while they are computed, over several lanes.
                prompt: random.prompt(if index % 2 == 0 { 100 } else { 1100 }),
                max_tokens: 3,
                seed: None,
                streamed: true,
            };
            case::must_complete(&fleet, &question, ordinary).await.map_err(|Violation(what)| what)?;
        }
    }
    fleet.note_rest().await?;
    Ok(fleet)
}

fn members() -> Vec<(String, Vec<String>)> {
    let model = format!("--model={}", checkpoints::named(MODEL).display());
    let worker = |role: &str, index: u32, more: &[&str]| {
        let mut arguments = vec!["worker".to_owned(), format!("--role={role}"), model.clone()];
        arguments.extend([format!("--fake={FAKE}"), "--kv-memory=256MiB".into(), "--transport=tcp".into()]);
        arguments.extend(more.iter().map(|&flag| flag.to_owned()));
        (format!("{role}-{index}"), arguments)
    };
    let context = format!("--context-tokens={}", tandem_engine::fake::CONTEXT_TOKENS);
    let router = vec!["router".into(), model.clone(), context, "--policy=round-robin".into()];
    // One prompt at a time, so that others can be seen waiting.
    let prefill = |index| worker("prefill", index, &["--rows-max=1"]);
    let decode = |index| worker("decode", index, &[]);
    vec![prefill(0), prefill(1), decode(0), decode(1), (ROUTER.to_owned(), router)]
}

/// How long a request may take at most once its fault is over.
const ANSWER_MAX: Duration = Duration::from_secs(30);
