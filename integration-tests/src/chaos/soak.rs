//! Very many requests, a third of which leave at a random moment: afterwards nothing is held, and memory has
//! stopped growing early on.

use std::collections::BTreeMap;
use std::fmt;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tandem_chassis::seam;
use tandem_engine::fake::Ordinary;
use tokio::sync::watch;

use super::ask::{End, Heard, Line, Question};
use super::fleet::{Fleet, ROUTER};
use super::random::Random;
use crate::checkpoints;

/// The checkpoint whose vocabulary the fake engines have.
const MODEL: &str = "qwen3";
/// Clients at once.
const CLIENTS: u64 = 48;
/// A process may at no time use so much more memory than it did in the first tenth: what an allocator's lists come
/// to, and less than 24 bytes for each of 90,000 requests.
const GROWTH_MAX: u64 = 2 << 20;
/// Shorter runs do not fill in their first tenth what is filled only once and bounded: the records of the last
/// thousand requests and the prefix caches. Their memory is shown and not judged.
const JUDGED_REQUESTS_MIN: u64 = 20_000;
/// Tenths of a run.
const TENTHS: usize = 10;
/// Samples of each process's memory in a run.
const SAMPLES: u64 = 200;

/// What to run.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// Requests.
    pub requests: u64,
    /// What prompts, lengths and moments are drawn from.
    pub seed: u64,
}

/// What came of it.
#[derive(Debug, Default)]
pub struct Report {
    requests: u64,
    took: Duration,
    complete: u64,
    /// Left before the first token, and later.
    left_early: u64,
    left_late: u64,
    /// From the last request's end until everybody was at rest.
    rest: Duration,
    /// By process, the most resident bytes in each tenth.
    memory: Vec<(String, [u64; TENTHS])>,
    /// What must not be.
    pub violations: Vec<String>,
}

/// By process, the most that was seen of its resident bytes in each tenth.
type Samples = BTreeMap<String, [u64; TENTHS]>;

/// Runs it, calling `done` after each request.
///
/// # Errors
/// If the cluster cannot be started.
pub async fn run(options: Options, done: &(dyn Fn() + Sync)) -> Result<Report, String> {
    let ordinary = Arc::new(Ordinary::read(&checkpoints::named(MODEL)).map_err(|error| error.to_string())?);
    let mut fleet = Fleet::start(&format!("soak-{}", options.seed), members()).await?;
    let soak = Soak {
        options,
        ordinary,
        next: AtomicU64::new(0),
        report: Mutex::default(),
        samples: Mutex::default(),
    };
    // A few first, so that every connection is there that is kept.
    soak.run(&fleet, 0, CLIENTS * 4, &|| {}).await?;
    fleet.note_rest().await?;
    let warm = soak.report.into_inner().expect("nothing panics under this lock");
    if let Some(violation) = warm.violations.first() {
        return Err(violation.clone());
    }
    let soak = Soak { report: Mutex::default(), samples: Mutex::default(), ..soak };

    let began = seam::now();
    soak.run(&fleet, CLIENTS * 4, options.requests, done).await?;
    let mut report = soak.report.into_inner().expect("nothing panics under this lock");
    report.requests = options.requests;
    report.took = seam::now().since(began);
    match fleet.wait_until_at_rest(&fleet.ids()).await {
        Ok(rest) => report.rest = rest,
        Err(held) => report.violations.push(held),
    }
    report.violations.extend(fleet.panics());
    report.judge_memory(soak.samples.into_inner().expect("nothing panics under this lock"));
    if !report.violations.is_empty() {
        report.violations.push(format!(
            "again: cargo xtask chaos --level soak --requests {} --seed {}\n{}",
            options.requests,
            options.seed,
            fleet.last_words()
        ));
    }
    Ok(report)
}

fn members() -> Vec<(String, Vec<String>)> {
    let model = format!("--model={}", checkpoints::named(MODEL).display());
    let worker = |role: &str, index: u32, fake: &str| {
        let mut arguments = vec!["worker".to_owned(), format!("--role={role}"), model.clone()];
        arguments.extend([format!("--fake={fake}"), "--kv-memory=32MiB".into(), "--transport=tcp".into()]);
        (format!("{role}-{index}"), arguments)
    };
    let context = format!("--context-tokens={}", tandem_engine::fake::CONTEXT_TOKENS);
    let router = vec!["router".into(), model.clone(), context, "--policy=round-robin".into()];
    // Half of each side takes no time, the other so much that somebody leaves in every stage.
    let (zero, paced) = ("zero", "paced:3ms,1ms");
    vec![
        worker("prefill", 0, zero),
        worker("prefill", 1, paced),
        worker("decode", 0, zero),
        worker("decode", 1, paced),
        (ROUTER.to_owned(), router),
    ]
}

struct Soak {
    options: Options,
    ordinary: Arc<Ordinary>,
    next: AtomicU64,
    report: Mutex<Report>,
    samples: Mutex<Samples>,
}

/// When a client leaves.
enum Leaves {
    Never,
    After(Duration),
    AtToken(usize),
}

impl Soak {
    /// Asks so many requests, the first with number `first`.
    async fn run(
        &self,
        fleet: &Fleet,
        first: u64,
        requests: u64,
        done: &(dyn Fn() + Sync),
    ) -> Result<(), String> {
        let api = fleet.api()?;
        self.next.store(0, Ordering::Relaxed);
        let clients = (0..CLIENTS).map(|_| async {
            let mut line = None;
            loop {
                let index = self.next.fetch_add(1, Ordering::Relaxed);
                if index >= requests {
                    return;
                }
                line = self.client(api, first + index, line).await;
                if index.is_multiple_of((requests / SAMPLES).max(1)) {
                    self.sample(fleet, index * TENTHS as u64 / requests);
                }
                done();
            }
        });
        futures_util::future::join_all(clients).await;
        Ok(())
    }

    /// One request on this line or a new one; gives back a line that can be used again.
    async fn client(&self, api: SocketAddr, index: u64, line: Option<Line>) -> Option<Line> {
        let mut random = Random::new(self.options.seed ^ index << 20);
        let length = random.within(1..300);
        let question = Question {
            name: format!("soak-{index}"),
            model: MODEL.into(),
            prompt: random.prompt(length),
            max_tokens: random.within(1..24) as usize,
            seed: random.percent(50).then_some(index),
            streamed: true,
        };
        // A few more than a third, for some answers end before their client has left.
        let leaves = match random.within(0..100) {
            0..18 => Leaves::After(Duration::from_micros(random.within(0..30_000))),
            18..36 => Leaves::AtToken(random.within(0..question.max_tokens as u64) as usize),
            _ => Leaves::Never,
        };
        let mut line = match line.filter(Line::is_open) {
            Some(line) => line,
            None => match Line::open(api).await {
                Ok(line) => line,
                Err(error) => {
                    self.note(|report| report.violations.push(format!("no connection: {error}")));
                    return None;
                }
            },
        };
        let mut heard = Heard::default();
        let (progress, mut tokens) = watch::channel(0);
        let whole = line.ask(&question, &mut heard, &progress);
        let left = match leaves {
            Leaves::Never => {
                whole.await;
                false
            }
            Leaves::After(moment) => seam::timeout(moment, whole).await.is_err(),
            Leaves::AtToken(at) => tokio::select! {
                () = whole => false,
                _ = tokens.wait_for(|&tokens| tokens > at) => true,
            },
        };
        if left {
            let early = heard.tokens.is_empty();
            self.note(|report| *(if early { &mut report.left_early } else { &mut report.left_late }) += 1);
            return None;
        }
        match question.judge(&heard, &self.ordinary) {
            End::Complete => self.note(|report| report.complete += 1),
            End::Loud(why) | End::Wrong(why) => self.note(|report| {
                if report.violations.len() < 20 {
                    report.violations.push(format!("request {index}: {why}"));
                }
            }),
        }
        Some(line)
    }

    fn note(&self, change: impl FnOnce(&mut Report)) {
        change(&mut self.report.lock().expect("nothing panics under this lock"));
    }

    fn sample(&self, fleet: &Fleet, tenth: u64) {
        let mut samples = self.samples.lock().expect("nothing panics under this lock");
        for id in fleet.ids() {
            let resident = fleet.resident(&id);
            let most = &mut samples.entry(id).or_default()[(tenth as usize).min(TENTHS - 1)];
            *most = resident.max(*most);
        }
    }
}

impl Report {
    /// Whether every process has after the first tenth what it had in it.
    fn judge_memory(&mut self, samples: Samples) {
        for (id, tenths) in samples {
            let most = tenths[1..].iter().max().expect("there are ten");
            let grown = most.saturating_sub(tenths[0]);
            if grown > GROWTH_MAX && self.requests >= JUDGED_REQUESTS_MIN {
                self.violations.push(format!("{id} has grown by {} KiB after the first tenth", grown >> 10));
            }
            self.memory.push((id, tenths));
        }
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let seconds = self.took.as_secs_f64();
        writeln!(
            f,
            "{} requests in {seconds:.0} s, {:.0} a second: {} complete and bit-equal, {} left before their first \
             token, {} later; at rest {:.1} s after the last.\n\nResident MiB, the most in each tenth:\n",
            self.requests,
            self.requests as f64 / seconds,
            self.complete,
            self.left_early,
            self.left_late,
            self.rest.as_secs_f64()
        )?;
        writeln!(f, "| process |{}", (1..=TENTHS).map(|tenth| format!(" {tenth} |")).collect::<String>())?;
        writeln!(f, "|---|{}", "---|".repeat(TENTHS))?;
        for (id, tenths) in &self.memory {
            let mebibytes =
                tenths.iter().map(|bytes| format!(" {:.1} |", *bytes as f64 / f64::from(1 << 20)));
            writeln!(f, "| {id} |{}", mebibytes.collect::<String>())?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_may_rise_in_the_first_tenth_and_not_after_it() {
        let judged = |requests: u64, mebibytes: [u64; TENTHS]| {
            let mut report = Report { requests, ..Report::default() };
            let tenths = mebibytes.map(|mebibytes| mebibytes << 20);
            report.judge_memory(Samples::from([("decode-0".to_owned(), tenths)]));
            report.violations.len()
        };
        assert_eq!(judged(100_000, [90, 90, 90, 91, 90, 90, 92, 90, 90, 91]), 0);
        assert_eq!(judged(100_000, [10, 11, 11, 11, 12, 12, 13, 13, 14, 15]), 1);
        assert_eq!(judged(1000, [10, 11, 11, 11, 12, 12, 13, 13, 14, 15]), 0);
    }
}
