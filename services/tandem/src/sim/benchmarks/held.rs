//! Sections at a given load: prefix caches, and offline work beside a tide.

use std::time::Duration;

use tandem_simulator::cache::Sizes;
use tandem_simulator::{Offline, Options, Outcome, Scenario, run};

use super::{ATTAINED, Bench, Case, median, spread, table, verdict};
use crate::sim::runs::{self, Planned};

const MOONCAKE: &str = "mooncake_conversation";
/// Publishers grouped arrivals in steps of so many milliseconds.
const MOONCAKE_SPREAD_MS: f64 = 3000.0;
/// Seconds by which the trace is rotated from round to round.
const MOONCAKE_STRIDE: f64 = 700.0;
const CACHES: Sizes = Sizes { device_tokens: 700_000, host_tokens: 3_000_000 };
/// Caches and links that set no bounds.
const BOUNDLESS: Sizes = Sizes { device_tokens: 1 << 34, host_tokens: 0 };
const FREE_LINK: f64 = 1e18;
/// Share of what least load sustains.
const CACHE_LOAD: f64 = 0.9;

pub fn cache(bench: &Bench) -> Result<String, String> {
    let title = "### Prefix caches: Mooncake Conversation, 10 s/50 ms";
    let case = Case::new("Mooncake Conversation", MOONCAKE, 10_000, 50);
    let mut runs: Vec<(&str, Vec<Outcome>)> = Vec::new();
    let (mut scales, mut shares, mut splits) = (Vec::new(), Vec::new(), Vec::new());
    for round in 0..bench.rounds {
        let Some(mut scenario) = bench.scenario(&case, round)? else {
            return Ok(format!("{title}\n\n{}\n", bench.missing(MOONCAKE)));
        };
        scenario.rotate(MOONCAKE_STRIDE * round as f64);
        scenario.spread_ms = MOONCAKE_SPREAD_MS;
        let ours = Options {
            first_token: Duration::from_millis(case.first_ms),
            per_token: Duration::from_millis(case.token_ms),
            cache: CACHES,
            seed: round as u64 + 1,
            ..Options::default()
        };
        let fixed = |policy: &str, peer_pulls, split| Options {
            policy: policy.to_owned(),
            planner: false,
            peer_pulls,
            split,
            ..ours.clone()
        };
        let choices = runs::splits(ours.workers).into_iter().map(|split| fixed("least-loaded", false, split));
        let planned = Planned { name: "cache, least-loaded".to_owned(), choices: choices.collect() };
        let guess = scenario.guess(ours.workers) * 1.3;
        let (best, sustained) = runs::best_scale(&planned, &scenario, ATTAINED, guess, &bench.bar)?;
        let split = best.split;
        let workload = scenario.workload(sustained * CACHE_LOAD);
        scales.push(workload.arrivals.len() as f64 / 3600.0);
        shares.push(workload.best_hit_share() * 100.0);
        splits.push(split.to_string());
        let boundless = Options { cache: BOUNDLESS, link_bytes: FREE_LINK, ..ours.clone() };
        let all = [
            ("cost", ours.clone()),
            ("cost, roles fixed", fixed("cost", true, split)),
            ("cost, no bounds on caches and links", boundless),
            ("prefix without pulls", fixed("prefix", false, split)),
            ("least-loaded", fixed("least-loaded", false, split)),
            ("least-loaded with pulls", fixed("least-loaded", true, split)),
        ];
        for (name, options) in all {
            bench.bar.step(&format!("cache, round {}: {name}", round + 1));
            let outcome = run(&options, &workload)?;
            match runs.iter_mut().find(|(other, _)| *other == name) {
                Some((_, outcomes)) => outcomes.push(outcome),
                None => runs.push((name, vec![outcome])),
            }
        }
    }
    let means = |name: &str| -> Vec<f64> {
        let (_, outcomes) = runs.iter().find(|(other, _)| *other == name).expect("it was run");
        outcomes.iter().map(|outcome| outcome.first_ms().mean).collect()
    };
    let cost = means("cost");
    let rows = runs.iter().map(|(name, outcomes)| {
        let theirs = means(name);
        let under: Vec<f64> = cost.iter().zip(&theirs).map(|(cost, theirs)| 1.0 - cost / theirs).collect();
        let goal = match *name {
            "prefix without pulls" => verdict(median(&under), 0.14),
            "least-loaded" => verdict(median(&under), 0.40),
            "cost, no bounds on caches and links" => verdict(median(&under), -0.03),
            _ => String::new(),
        };
        let hit = outcomes.iter().map(|o| o.hit_tokens as f64 / o.prompt_tokens_in.max(1) as f64 * 100.0);
        vec![
            (*name).to_owned(),
            spread(theirs.iter().copied(), 0),
            spread(under, 3),
            goal,
            spread(hit, 1),
            spread(outcomes.iter().map(|o| o.attainment() * 100.0), 1),
            spread(outcomes.iter().map(|o| o.flips as f64), 0),
        ]
    });
    splits.sort_unstable();
    splits.dedup();
    let head = [
        "policy",
        "mean TTFT ms",
        "cost is so much under it",
        "goal",
        "prompt tokens from caches, %",
        "attained, %",
        "flips",
    ];
    Ok(format!(
        "{title}\n\nAt {} requests a second, {CACHE_LOAD} of what least load sustains with its best fixed split ({}), which \
         the other fixed runs have too. Caches without bounds would hold {} % of prompt tokens.\n\n{}",
        spread(scales, 1),
        splits.join(" "),
        spread(shares, 1),
        table(&head, &rows.collect::<Vec<_>>())
    ))
}

const TIDE_LENGTHS: &str = "servegen_m_large_day3_10h_30min";
const TIDE_RATES: &str = "servegen_rates_600s";
const OFFLINE_LENGTHS: &str = "lengths_arxiv_sum";
const DAY: f64 = 86_400.0;
/// More than a day can take.
const BACKLOG: usize = 3_000_000;

pub fn offline(bench: &Bench) -> Result<String, String> {
    let title = "### Offline work on a tide: ServeGen m-large, day 3, 24 hours, 1 s/50 ms";
    for name in [TIDE_LENGTHS, TIDE_RATES, OFFLINE_LENGTHS] {
        if bench.find(name).is_none() {
            return Ok(format!("{title}\n\n{}\n", bench.missing(name)));
        }
    }
    let mut rows: Vec<(&str, Vec<Outcome>)> =
        vec![("no offline work", vec![]), ("ours", vec![]), ("only while nobody online is there", vec![])];
    let mut rates = Vec::new();
    for round in 0..bench.rounds {
        let (online, with) = tide(bench, round)?;
        let options = Options { seed: round as u64 + 1, ..Options::default() };
        let idle = Options { offline: Offline::Idle, ..options.clone() };
        for ((name, outcomes), (options, scenario)) in
            rows.iter_mut().zip([(&options, &online), (&options, &with), (&idle, &with)])
        {
            bench.bar.step(&format!("offline, round {}: {name}", round + 1));
            outcomes.push(run(options, &scenario.0.workload(scenario.1))?);
        }
        rates.push(rows[0].1[round].requests as f64 / DAY);
    }
    let attained = |at: usize| rows[at].1.iter().map(|o| o.attainment() * 100.0).collect::<Vec<_>>();
    let tokens = |at: usize| rows[at].1.iter().map(|o| o.offline_tokens as f64).collect::<Vec<_>>();
    let lost: Vec<f64> = attained(0).iter().zip(attained(1)).map(|(alone, with)| alone - with).collect();
    let times: Vec<f64> = tokens(1).iter().zip(tokens(2)).map(|(a, b)| a / b.max(1.0)).collect();
    let cells = (0..rows.len()).map(|at| {
        vec![
            rows[at].0.to_owned(),
            spread(attained(at), 2),
            spread(tokens(at).iter().map(|tokens| tokens / 1e6), 1),
            spread(rows[at].1.iter().map(|o| o.busy_seconds / DAY / 8.0 * 100.0), 1),
        ]
    });
    let head = ["offline work", "online attained, %", "offline tokens, millions", "busy, %"];
    Ok(format!(
        "{title}\n\n{} online requests a second on average.\n\n{}\nOffline tokens, ours over the other: {}; goal {}. \
         Points of online attainment lost: {}; goal at most 0.5: {}.\n",
        spread(rates, 1),
        table(&head, &cells.collect::<Vec<_>>()),
        spread(times.iter().copied(), 1),
        verdict(median(&times), 3.0),
        spread(lost.iter().copied(), 2),
        if median(&lost) <= 0.5 { "met" } else { "missed" },
    ))
}

/// A load and its scale.
type Scaled = (Scenario, f64);

/// A day of online requests at half of what the cluster carries, alone and with the backlog; with the scale.
fn tide(bench: &Bench, round: usize) -> Result<(Scaled, Scaled), String> {
    let case = Case::new("tide", TIDE_LENGTHS, 1000, 50);
    let found = |name: &str| bench.find(name).expect("it was looked for");
    let mut steady = bench.scenario(&case, round)?.expect("it was looked for");
    steady.draw_for(300.0);
    let options = Options { seed: round as u64 + 1, ..Options::default() };
    let planned = Planned { name: "offline, capacity".to_owned(), choices: vec![options.clone()] };
    let guess = steady.guess(options.workers);
    let (_, carried) = runs::best_scale(&planned, &steady, ATTAINED, guess, &bench.bar)?;
    let mut online = bench.scenario(&case, round)?.expect("it was looked for");
    let rates = std::path::PathBuf::from(found(TIDE_RATES));
    let mean = online.follow(&rates, "m_large", 3.0 * DAY, DAY).map_err(|error| error.to_string())?;
    let mut with = online.clone();
    with.beside(&found(OFFLINE_LENGTHS), BACKLOG).map_err(|error| error.to_string())?;
    let scale = carried / 2.0 / mean;
    Ok(((online, scale), (with, scale)))
}
