//! Which requests are sent, and when: as many at once, at a rate, or as a trace has them.

use std::time::Duration;

use tandem_simulator::random::Mersenne;
use tandem_simulator::scenario::{Arrivals, Scenario};

use super::BenchConfig;
use super::lengths::{Draws, Lengths};

/// A request to be sent.
#[derive(Clone, Debug, PartialEq)]
pub struct Ask {
    /// Counted from 0.
    pub number: u64,
    /// When, since the start; without it, as soon as there is room.
    pub at: Option<Duration>,
    /// Tokens of its prompt.
    pub input: u32,
    /// Tokens of its answer.
    pub output: u32,
    /// Prefix blocks of a trace that has them; requests that begin with the same ones begin with the same text.
    pub blocks: Vec<u32>,
}

/// The requests of a run.
pub struct Plan {
    /// What to call it.
    pub name: String,
    /// How many run at once; without it, each is sent at its time.
    pub at_once: Option<usize>,
    /// How many come; unknown where only time ends them.
    pub expected: Option<u64>,
    /// Nothing is sent after this.
    pub ends: Option<Duration>,
    /// The requests, in order.
    pub asks: Box<dyn Iterator<Item = Ask> + Send>,
}

/// So long a run takes where nothing says how long.
const DURATION: Duration = Duration::from_secs(30);
const INPUT: Lengths = Lengths::Fixed(128);
const OUTPUT: Lengths = Lengths::Fixed(64);

/// The requests that the options stand for.
pub fn plan(config: &BenchConfig, seed: u64) -> Result<Plan, String> {
    let (ends, requests) = (config.duration.map(|duration| duration.0), config.requests);
    let ends =
        if ends.is_none() && requests.is_none() && config.trace.is_none() { Some(DURATION) } else { ends };
    let mut inputs = Draws::new(config.input_tokens.as_ref().unwrap_or(&INPUT), seed, 1)?;
    let mut outputs = Draws::new(config.output_tokens.as_ref().unwrap_or(&OUTPUT), seed, 2)?;
    let count = requests.unwrap_or(u64::MAX);
    if let Some(trace) = &config.trace {
        return replayed(config, trace, seed);
    }
    let mut numbers = 0..count;
    let Some(rate) = config.rate else {
        let at_once = config.concurrency.unwrap_or(1);
        let asks = numbers.map(move |number| Ask {
            number,
            at: None,
            input: inputs.next(),
            output: outputs.next(),
            blocks: Vec::new(),
        });
        let name = format!("{at_once} at once");
        return Ok(Plan { name, at_once: Some(at_once), expected: requests, ends, asks: Box::new(asks) });
    };
    let arrivals = config.arrivals()?;
    let mut gaps = Gaps::new(rate, arrivals, seed);
    let asks = std::iter::from_fn(move || {
        let at = gaps.next();
        if ends.is_some_and(|ends| at >= ends) {
            return None;
        }
        let number = numbers.next()?;
        Some(Ask { number, at: Some(at), input: inputs.next(), output: outputs.next(), blocks: Vec::new() })
    });
    let how = match arrivals {
        Arrivals::Poisson => "Poisson".to_owned(),
        Arrivals::Gamma(cv) => format!("Gamma with CV {cv}"),
    };
    let name = format!("{rate} per second, {how}");
    let expected = requests.or(ends.map(|ends| (rate * ends.as_secs_f64()).round() as u64));
    Ok(Plan { name, at_once: None, expected, ends, asks: Box::new(asks) })
}

/// A trace, scaled as the simulator scales it; lengths that are given replace those of the trace.
fn replayed(config: &BenchConfig, trace: &str, seed: u64) -> Result<Plan, String> {
    let (scale, squeeze) = (config.scale.unwrap_or(1.0), config.squeeze.unwrap_or(1.0));
    let offset = config.offset.unwrap_or(0.0);
    let seconds = config.duration.map(|duration| duration.0.as_secs_f64() * squeeze);
    let mut scenario = Scenario::read(trace, offset, seconds, seed).map_err(|error| error.to_string())?;
    scenario.squeeze = squeeze;
    let workload = scenario.workload(scale);
    let mut inputs = config.input_tokens.as_ref().map(|it| Draws::new(it, seed, 1)).transpose()?;
    let mut outputs = config.output_tokens.as_ref().map(|it| Draws::new(it, seed, 2)).transpose()?;
    let count = config.requests.unwrap_or(u64::MAX).min(workload.arrivals.len() as u64);
    if count == 0 {
        return Err(format!("--trace {trace} at --scale {scale} has no request"));
    }
    let blocks = workload.blocks;
    let asks = (0..count).zip(workload.arrivals).map(move |(number, arrival)| {
        let (from, many) = (arrival.blocks.0 as usize, arrival.blocks.1 as usize);
        Ask {
            number,
            at: Some(arrival.at.since(tandem_types::Time::ZERO)),
            input: inputs.as_mut().map_or(arrival.input, Draws::next),
            output: outputs.as_mut().map_or(arrival.output, Draws::next),
            blocks: blocks[from..from + many].to_vec(),
        }
    });
    let squeezed = if squeeze == 1.0 { String::new() } else { format!(", squeezed by {squeeze}") };
    let name = format!("{trace} at {scale}{squeezed}");
    let ends = config.duration.map(|duration| duration.0);
    Ok(Plan { name, at_once: None, expected: Some(count), ends, asks: Box::new(asks) })
}

/// Times of arrival, one after the other.
pub struct Gaps {
    rate: f64,
    arrivals: Arrivals,
    random: Mersenne,
    at: f64,
}

impl Gaps {
    /// At `rate` per second on average.
    pub fn new(rate: f64, arrivals: Arrivals, seed: u64) -> Gaps {
        Gaps { rate, arrivals, random: Mersenne::new(seed.wrapping_mul(4)), at: 0.0 }
    }

    /// The next one, since the start.
    pub fn next(&mut self) -> Duration {
        let gap = match self.arrivals {
            Arrivals::Poisson => self.random.exponential(1.0),
            Arrivals::Gamma(cv) => self.random.gamma(1.0 / (cv * cv)),
        };
        self.at += gap / self.rate;
        Duration::from_secs_f64(self.at)
    }
}

#[cfg(test)]
mod tests {
    use tandem_simulator::Trace;
    use tandem_simulator::scenario::find;

    use super::*;

    fn planned(arguments: &str) -> Plan {
        let words = std::iter::once("tandem bench").chain(arguments.split_whitespace());
        let config: BenchConfig = clap::Parser::parse_from(words);
        config.check().expect(arguments);
        plan(&config, 5).expect(arguments)
    }

    /// Mean and coefficient of variation of the gaps.
    fn gaps(arrivals: Arrivals) -> (f64, f64) {
        let mut gaps = Gaps::new(50.0, arrivals, 3);
        let times: Vec<f64> = (0..20_000).map(|_| gaps.next().as_secs_f64()).collect();
        let between: Vec<f64> = times.windows(2).map(|pair| pair[1] - pair[0]).collect();
        let mean = between.iter().sum::<f64>() / between.len() as f64;
        let square = between.iter().map(|gap| (gap - mean).powi(2)).sum::<f64>() / between.len() as f64;
        (mean, square.sqrt() / mean)
    }

    #[test]
    fn arrivals_have_the_rate_and_the_burstiness_that_are_asked_for() {
        for (arrivals, wanted) in
            [(Arrivals::Poisson, 1.0), (Arrivals::Gamma(3.0), 3.0), (Arrivals::Gamma(0.5), 0.5)]
        {
            let (mean, cv) = gaps(arrivals);
            assert!((mean * 50.0 - 1.0).abs() < 0.08, "{arrivals:?}: a mean gap of {mean}");
            assert!((cv / wanted - 1.0).abs() < 0.1, "{arrivals:?}: a coefficient of variation of {cv}");
        }
    }

    #[test]
    fn a_rate_lasts_as_long_or_brings_as_many_as_asked_for() {
        let timed: Vec<Ask> = planned("--rate 100 --duration 10s").asks.collect();
        assert!((850..1150).contains(&timed.len()), "{} requests", timed.len());
        assert!(timed.iter().all(|ask| ask.at.is_some_and(|at| at < Duration::from_secs(10))));
        assert!(timed.is_sorted_by_key(|ask| ask.at));
        assert_eq!(planned("--rate 100 --requests 17").asks.count(), 17);
        let both = planned("--rate 100 --requests 17 --duration 10ms").asks.count();
        assert!(both < 17, "time ends it first");
    }

    #[test]
    fn a_closed_loop_ends_by_number_or_by_time() {
        let plan = planned("--concurrency 8 --requests 20 --input-tokens 7 --output-tokens uniform:2,4");
        assert_eq!((plan.at_once, plan.expected, plan.ends), (Some(8), Some(20), None));
        let asks: Vec<Ask> = plan.asks.collect();
        assert_eq!(asks.len(), 20);
        assert!(asks.iter().all(|ask| ask.at.is_none() && ask.input == 7 && (2..=4).contains(&ask.output)));
        assert_eq!(planned("--concurrency 8").ends, Some(DURATION));
    }

    #[test]
    fn a_trace_is_scaled_squeezed_and_cut_as_the_simulator_does() {
        let arguments = "--trace azure2023_conv --scale 2.5 --squeeze 4 --offset 600 --duration 30s";
        let asks: Vec<Ask> = planned(arguments).asks.collect();
        let window = Trace::read(&find("azure2023_conv")).expect("committed").window(600.0, Some(120.0));
        let workload = window.divided(4.0).superposed(2.5, 5);
        assert_eq!(asks.len(), workload.arrivals.len());
        for (ask, arrival) in asks.iter().zip(&workload.arrivals) {
            assert_eq!(ask.at.map(|at| at.as_nanos() as u64), Some(arrival.at.0));
            assert_eq!((ask.input, ask.output), (arrival.input, arrival.output));
        }
        let expected = window.rows.len() as f64 * 2.5;
        assert!((asks.len() as f64 / expected - 1.0).abs() < 0.1, "two copies and a half");
        assert!(asks.iter().all(|ask| ask.at.is_some_and(|at| at <= Duration::from_secs(31))));
    }

    #[test]
    fn given_lengths_replace_those_of_the_trace() {
        let asks: Vec<Ask> = planned("--trace azure2023_code --requests 9 --output-tokens 3").asks.collect();
        assert_eq!(asks.len(), 9);
        assert!(asks.iter().all(|ask| ask.output == 3));
        assert!(asks.iter().any(|ask| ask.input != asks[0].input));
    }

    #[test]
    fn the_same_seed_gives_the_same_requests() {
        let asks =
            || planned("--rate 40 --requests 50 --input-tokens lognormal:90,1").asks.collect::<Vec<_>>();
        assert_eq!(asks(), asks());
    }
}
