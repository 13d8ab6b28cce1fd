//! The figures of a run: what its clients saw, what the router spent, and what the client itself did wrong.

use std::collections::BTreeMap;
use std::time::Duration;

use serde_json::{Value, json};
use tandem_chassis::config::Slo;
use tandem_simulator::report::Spread;

use super::answer::{Answer, End};
use super::drive::Driven;

/// A run that is done.
pub struct Run {
    /// What to call it.
    pub name: String,
    /// Its options, as JSON.
    pub config: Value,
    /// What came of it.
    pub driven: Driven,
    /// The targets that count.
    pub slo: Option<Slo>,
    /// Whether answers were streamed.
    pub streams: bool,
    /// Whether requests had times at which they were due.
    pub scheduled: bool,
    /// For how long they were to come, where it is time that ends them.
    pub planned: Option<Duration>,
    /// Whether the server counts the tokens of prompts.
    pub counted: bool,
    /// Processor seconds of the router, where they are known.
    pub router_seconds: Option<f64>,
    /// Why they count more than the router's own, if they do.
    pub router_shared: bool,
}

/// A thread that is busy for more than this share of a run measures itself.
const BUSY: f64 = 0.85;
/// Requests that are sent later than this, at the 99th percentile, do not arrive as they were to.
const LATE_MS: f64 = 10.0;

impl Run {
    /// Requests that were sent and are over.
    pub fn requests(&self) -> usize {
        self.driven.answers.len()
    }

    /// Answers that ended as they should.
    pub fn whole(&self) -> impl Iterator<Item = &Answer> {
        self.driven.answers.iter().filter(|answer| answer.end == End::Whole)
    }

    /// Refused or lost before anything was streamed, and ended in the middle: each kind and how often.
    pub fn failures(&self) -> (BTreeMap<&str, usize>, BTreeMap<&str, usize>) {
        let (mut errors, mut cut) = (BTreeMap::new(), BTreeMap::new());
        for answer in &self.driven.answers {
            match &answer.end {
                End::Whole => {}
                End::Error(kind) => *errors.entry(kind.as_str()).or_default() += 1,
                End::Cut(kind) => *cut.entry(kind.as_str()).or_default() += 1,
            }
        }
        (errors, cut)
    }

    /// Times to the first token.
    pub fn first_ms(&self) -> Vec<f64> {
        self.whole().filter_map(|answer| Some(ms(answer.first?.since(answer.sent)))).collect()
    }

    /// Times per further token, of answers with more than one.
    pub fn per_token_ms(&self) -> Vec<f64> {
        self.whole().filter_map(per_token_ms).collect()
    }

    /// Times between events with text.
    pub fn gaps_ms(&self) -> Vec<f64> {
        self.whole().flat_map(|answer| answer.gaps.iter().map(|&gap| f64::from(gap))).collect()
    }

    /// Times to the end.
    pub fn whole_ms(&self) -> Vec<f64> {
        self.whole().map(|answer| ms(answer.over.since(answer.sent))).collect()
    }

    /// Times until a request was refused, or lost before anything was streamed.
    pub fn error_ms(&self) -> Vec<f64> {
        let refused = self.driven.answers.iter().filter(|answer| matches!(answer.end, End::Error(_)));
        refused.map(|answer| ms(answer.over.since(answer.sent))).collect()
    }

    /// How long after they were due requests were sent; none where nothing was due.
    pub fn late_ms(&self) -> Vec<f64> {
        let answers = self.driven.answers.iter().filter(|_| self.scheduled);
        answers.map(|answer| ms(answer.sent.since(answer.due))).collect()
    }

    /// Whether an answer counts for goodput: it is whole, and met both targets where there are any.
    pub fn met(&self, answer: &Answer) -> bool {
        answer.end == End::Whole
            && self.slo.is_none_or(|slo| {
                let first = answer.first.is_some_and(|first| first.since(answer.sent) <= slo.ttft);
                first && per_token_ms(answer).is_none_or(|time| time <= ms(slo.tpot))
            })
    }

    /// Share of all requests that count for goodput.
    pub fn attainment(&self) -> f64 {
        let met = self.driven.answers.iter().filter(|answer| self.met(answer)).count();
        met as f64 / self.requests().max(1) as f64
    }

    /// Seconds from the start to the last end.
    pub fn seconds(&self) -> f64 {
        self.driven.ended.since(self.driven.began).as_secs_f64().max(1e-9)
    }

    /// Seconds in which requests came, by their own plan; all of them where one waits for another.
    fn load_seconds(&self) -> f64 {
        if !self.scheduled {
            return self.seconds();
        }
        if let Some(planned) = self.planned.filter(|_| !self.driven.interrupted) {
            return planned.as_secs_f64();
        }
        let last = self.driven.answers.iter().map(|answer| answer.due).max();
        let seconds = last.map(|last| last.since(self.driven.began).as_secs_f64()).filter(|&s| s > 0.0);
        seconds.unwrap_or_else(|| self.seconds())
    }

    /// Requests per second that count, while requests came.
    pub fn goodput(&self) -> f64 {
        self.attainment() * self.requests() as f64 / self.load_seconds()
    }

    /// Requests per second that were sent.
    pub fn offered(&self) -> f64 {
        self.requests() as f64 / self.load_seconds()
    }

    /// Tokens of all answers, also of those that broke off.
    pub fn output_tokens(&self) -> u64 {
        self.driven.answers.iter().map(|answer| u64::from(answer.tokens)).sum()
    }

    /// Prompt tokens by the server's count, where it counted all.
    fn prompt_tokens(&self) -> Option<u64> {
        let counted: Option<Vec<u32>> = self.whole().map(|answer| answer.prompt_tokens).collect();
        counted.filter(|counts| !counts.is_empty()).map(|counts| counts.into_iter().map(u64::from).sum())
    }

    /// Share of a core that the thread that speaks HTTP took.
    fn busy(&self) -> f64 {
        self.driven.thread_seconds / self.seconds()
    }

    /// What of this run is the client's doing.
    pub fn warnings(&self) -> Vec<String> {
        let mut warnings = Vec::new();
        if self.busy() > BUSY {
            warnings.push(format!(
                "the client was the bottleneck: its thread was busy {:.0} % of the time",
                self.busy() * 100.0
            ));
        }
        let late = Spread::of(self.late_ms());
        if late.p99 > LATE_MS {
            warnings.push(format!(
                "requests were sent late by the client, 1 % of them by {:.0} ms and more: the load was not what was \
                 asked for",
                late.p99
            ));
        }
        if self.router_shared {
            warnings.push(
                "the router shares its process with workers: its processor time is theirs too".to_owned(),
            );
        }
        if !self.counted {
            warnings.push(
                "the server does not count prompt tokens: one for each word and digit is assumed".to_owned(),
            );
        }
        if self.driven.interrupted {
            warnings.push(format!("ended early with {} requests running", self.driven.unfinished));
        }
        warnings
    }

    /// One entry of the list `runs`.
    pub fn json(&self) -> Value {
        let (errors, cut) = self.failures();
        let (requests, tokens) = (self.requests(), self.output_tokens());
        let share = |seconds: Option<f64>, of: u64| {
            seconds.filter(|_| of > 0).map(|seconds| rounded(seconds * 1e6 / of as f64))
        };
        let (own, router) = (Some(self.driven.cpu_seconds), self.router_seconds);
        json!({
            "name": self.name,
            "requests": requests,
            "errors": errors.values().sum::<usize>(),
            "cut": cut.values().sum::<usize>(),
            "goodput_rps": self.goodput(),
            "attainment": self.attainment(),
            "ttft_ms": spread(self.first_ms()),
            "tpot_ms": spread(self.per_token_ms()),
            "itl_ms": spread(self.gaps_ms()),
            "e2e_ms": spread(self.whole_ms()),
            "router_cpu_us_per_request": share(router, requests as u64),
            "router_cpu_us_per_token": share(router, tokens),
            "offered_rps": self.offered(),
            "seconds": self.seconds(),
            "completed": self.whole().count(),
            "unfinished": self.driven.unfinished,
            "interrupted": self.driven.interrupted,
            "output_tokens": tokens,
            "output_tokens_per_second": tokens as f64 / self.seconds(),
            "prompt_tokens": self.prompt_tokens(),
            "prompt_tokens_asked": self.driven.asked_tokens,
            "sent_bytes": self.driven.sent_bytes,
            "errors_by_kind": errors,
            "cut_by_kind": cut,
            "late_ms": spread(self.late_ms()),
            "error_ms": spread(self.error_ms()),
            "slo": self.slo,
            "client_cpu_us_per_request": share(own, requests as u64),
            "client_cpu_us_per_token": share(own, tokens),
            "client_busy": rounded(self.busy()),
            "router_shares_its_process": self.router_shared,
            "warnings": self.warnings(),
            "config": self.config,
        })
    }

    /// The figures as lines of text.
    pub fn text(&self) -> String {
        let (errors, cut) = self.failures();
        let kinds = |kinds: &BTreeMap<&str, usize>| {
            let list: Vec<String> = kinds.iter().map(|(kind, count)| format!("{count} {kind}")).collect();
            let sum = kinds.values().sum::<usize>();
            if list.is_empty() { "0".to_owned() } else { format!("{sum} ({})", list.join(", ")) }
        };
        let mut text = format!("{}\n", self.name);
        let mut row = |name: &str, value: String| text += &format!("  {name:<22}{value}\n");
        row(
            "requests",
            format!("{} in {:.2} s, {:.2} per second", self.requests(), self.seconds(), self.offered()),
        );
        row("errors", kinds(&errors));
        row("cut streams", kinds(&cut));
        match self.slo {
            Some(slo) => row(
                "goodput",
                format!("{:.2} per second; {:.2} % met {slo}", self.goodput(), self.attainment() * 100.0),
            ),
            None => row("completed", format!("{:.2} per second", self.goodput())),
        }
        let tokens = self.output_tokens();
        row("output tokens", format!("{tokens}, {:.1} per second", tokens as f64 / self.seconds()));
        if let Some(counted) = self.prompt_tokens() {
            row("prompt tokens", format!("{counted} counted by the server"));
        }
        text += &format!("\n  {:<22}{:>10}{:>10}{:>10}{:>10}\n", "milliseconds", "p50", "p90", "p99", "mean");
        for (name, values) in [
            ("TTFT", self.first_ms()),
            ("TPOT", self.per_token_ms()),
            ("between tokens", self.gaps_ms()),
            ("end to end", self.whole_ms()),
            ("to an error", self.error_ms()),
            ("sent late", self.late_ms()),
        ] {
            if !values.is_empty() {
                let Spread { p50, p90, p99, mean } = Spread::of(values);
                text += &format!("  {name:<22}{p50:>10.2}{p90:>10.2}{p99:>10.2}{mean:>10.2}\n");
            }
        }
        text.push('\n');
        let per = |seconds: f64| {
            let micros = seconds * 1e6;
            let request = micros / self.requests().max(1) as f64;
            format!("{request:.1} µs per request, {:.2} µs per token", micros / tokens.max(1) as f64)
        };
        let mut row = |name: &str, value: String| text += &format!("  {name:<22}{value}\n");
        if let Some(seconds) = self.router_seconds {
            row("CPU of the router", per(seconds));
        }
        row(
            "CPU of this client",
            format!("{}, {:.0} % of a core", per(self.driven.cpu_seconds), self.busy() * 100.0),
        );
        for warning in self.warnings() {
            text += &format!("  note: {warning}\n");
        }
        text
    }
}

/// Milliseconds per token after the first, where there is one.
fn per_token_ms(answer: &Answer) -> Option<f64> {
    let further = answer.tokens.checked_sub(1).filter(|&further| further > 0)?;
    Some(ms(answer.last.since(answer.first?)) / f64::from(further))
}

fn ms(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1e3
}

fn rounded(value: f64) -> f64 {
    (value * 1e3).round() / 1e3
}

/// Percentiles and the mean, or nothing in place of each.
fn spread(values: Vec<f64>) -> Value {
    if values.is_empty() {
        return json!({ "p50": null, "p90": null, "p99": null, "mean": null });
    }
    Spread::of(values).json()
}

#[cfg(test)]
pub mod tests {
    use tandem_types::Time;

    use super::*;

    /// An answer sent at `sent`, with its first text after `first` and then `tokens - 1` more every `each`.
    fn answer(sent: u64, first: u64, each: u64, tokens: u32, end: End) -> Answer {
        let at = Time::from_millis;
        let last = sent + first + each * u64::from(tokens - 1);
        Answer {
            due: at(sent),
            sent: at(sent),
            first: Some(at(sent + first)),
            last: at(last),
            over: at(last),
            tokens,
            prompt_tokens: Some(10),
            gaps: vec![each as f32; tokens as usize - 1],
            end,
        }
    }

    /// Two answers in time, one too late, one too slow, one refused, one cut.
    pub fn run() -> Run {
        let error = End::Error("503 overloaded".to_owned());
        let answers = vec![
            answer(0, 100, 10, 11, End::Whole),
            answer(500, 200, 20, 11, End::Whole),
            answer(1000, 1500, 10, 11, End::Whole),
            answer(1500, 100, 60, 11, End::Whole),
            answer(1600, 7, 1, 1, error),
            answer(2000, 100, 10, 5, End::Cut("no finish reason".to_owned())),
        ];
        let driven = Driven {
            answers,
            began: Time::ZERO,
            ended: Time::from_millis(2500),
            unfinished: 0,
            interrupted: false,
            asked_tokens: 60,
            sent_bytes: 600,
            cpu_seconds: 0.012,
            thread_seconds: 0.01,
        };
        Run {
            name: "a run <b>".to_owned(),
            config: json!({ "rate": 3.0 }),
            driven,
            slo: Some(Slo { ttft: Duration::from_secs(1), tpot: Duration::from_millis(50) }),
            streams: true,
            scheduled: true,
            planned: None,
            counted: true,
            router_seconds: Some(0.003),
            router_shared: false,
        }
    }

    #[test]
    fn goodput_counts_what_is_whole_and_met_both_targets() {
        let run = run();
        assert_eq!(run.attainment(), 2.0 / 6.0);
        assert_eq!(run.goodput(), 1.0, "two of them in the two seconds in which requests came");
        assert_eq!(run.offered(), 3.0);
        let planned = Run { planned: Some(Duration::from_secs(4)), ..self::run() };
        assert_eq!((planned.goodput(), planned.offered()), (0.5, 1.5), "time without a request counts");
        assert_eq!(Run { slo: None, ..run }.attainment(), 4.0 / 6.0, "without targets, whole is enough");
    }

    #[test]
    fn json_has_the_promised_form() {
        let json = run().json();
        let per = |name: &str| json[name].as_f64().expect(name);
        assert_eq!((&json["requests"], &json["errors"], &json["cut"]), (&6.into(), &1.into(), &1.into()));
        assert_eq!(json["errors_by_kind"]["503 overloaded"], 1);
        assert_eq!(json["cut_by_kind"]["no finish reason"], 1);
        for (name, p50, p99, mean) in [
            ("ttft_ms", 100.0, 200.0, 475.0),
            ("tpot_ms", 10.0, 20.0, 25.0),
            ("itl_ms", 10.0, 60.0, 25.0),
            ("e2e_ms", 400.0, 700.0, 725.0),
            ("error_ms", 7.0, 7.0, 7.0),
        ] {
            let spread = &json[name];
            let near = |key: &str, wanted: f64| (spread[key].as_f64().expect(key) - wanted).abs() < 1e-6;
            assert!(near("p50", p50) && near("p99", p99) && near("mean", mean), "{name}: {spread}");
            assert!(spread["p90"].is_f64());
        }
        assert_eq!((per("router_cpu_us_per_request"), per("router_cpu_us_per_token")), (500.0, 60.0));
        assert_eq!((per("client_cpu_us_per_request"), per("client_cpu_us_per_token")), (2000.0, 240.0));
        assert_eq!((per("offered_rps"), per("goodput_rps")), (3.0, 1.0));
        assert_eq!((&json["prompt_tokens"], &json["prompt_tokens_asked"]), (&40.into(), &60.into()));
        assert_eq!(json["config"]["rate"], 3.0);
        let unknown = Run { router_seconds: None, ..run() }.json();
        assert!(
            unknown["router_cpu_us_per_request"].is_null() && unknown["router_cpu_us_per_token"].is_null()
        );
    }

    #[test]
    fn a_client_that_was_busy_or_late_says_so() {
        assert_eq!(run().warnings(), Vec::<String>::new());
        let mut busy = run();
        busy.driven.thread_seconds = 2.4;
        assert!(busy.warnings()[0].contains("the client was the bottleneck"), "{:?}", busy.warnings());
        let mut late = run();
        for answer in &mut late.driven.answers {
            answer.due = Time(answer.sent.0.saturating_sub(50_000_000));
        }
        assert!(late.warnings()[0].contains("sent late"), "{:?}", late.warnings());
        assert!(late.text().contains("sent late"));
    }

    #[test]
    fn text_holds_the_figures() {
        let text = run().text();
        for part in ["1 (1 503 overloaded)", "1 (1 no finish reason)", "33.33 % met", "500.0 µs per request"]
        {
            assert!(text.contains(part), "{part}: {text}");
        }
    }
}
