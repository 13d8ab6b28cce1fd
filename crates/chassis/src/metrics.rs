//! Metrics in the Prometheus text format: a registry per component and the bucket lists.
//!
//! Several components may share a process, so nothing here is global. This module is the only one that names
//! the library underneath.

use prometheus::core::{Collector, MetricVec, MetricVecBuilder};
pub use prometheus::{
    Gauge, GaugeVec, Histogram, HistogramVec, IntCounter, IntCounterVec, IntGauge, IntGaugeVec,
};
use prometheus::{HistogramOpts, Opts, TextEncoder};

/// Bounds for time to first token, in seconds: vLLM's, so that its dashboards read ours.
pub const TIME_TO_FIRST_TOKEN_SECONDS: &[f64] = &[
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0,
    80.0, 160.0, 640.0, 2560.0,
];

/// Bounds for time between or per output token, in seconds: vLLM's, with four more below for fast decoders.
pub const TIME_PER_OUTPUT_TOKEN_SECONDS: &[f64] = &[
    0.001, 0.0025, 0.005, 0.0075, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5,
    5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
];

/// Bounds for whole requests and their stages, in seconds: doubling, with a long tail.
pub const REQUEST_SECONDS: &[f64] = &[
    0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12, 10.24, 20.48, 40.96, 81.92, 163.84, 327.68,
    655.36, 1310.72, 2621.44,
];

/// Bounds for engine steps, pulls and other short work, in seconds.
pub const STEP_SECONDS: &[f64] =
    &[0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0];

/// Bounds of relative errors.
pub const RATIOS: &[f64] = &[0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0];

/// Bounds for counts of tokens: vLLM's 1-2-5 series.
pub const TOKENS: &[f64] = &[
    1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0, 1000.0, 2000.0, 5000.0, 10_000.0, 20_000.0,
    50_000.0, 100_000.0, 200_000.0,
];

/// The metrics of one component. Clones share them.
///
/// The makers panic on a name that is taken or malformed: names are constants of the program. Without variable
/// labels the one series exists, at zero, from the start.
#[derive(Clone, Debug, Default)]
pub struct Registry {
    metrics: prometheus::Registry,
    labels: Vec<(String, String)>,
}

impl Registry {
    /// An empty registry.
    pub fn new() -> Self {
        Self::default()
    }

    /// The same registry; metrics made through the returned value carry a further constant label, such as
    /// vLLM's `model_name`.
    pub fn with_label(&self, name: &str, value: &str) -> Registry {
        let mut labelled = self.clone();
        labelled.labels.push((name.to_owned(), value.to_owned()));
        labelled
    }

    /// A counter; `name` ends in `_total`.
    pub fn counter(&self, name: &str, help: &str, labels: &[&str]) -> IntCounterVec {
        let counter = IntCounterVec::new(self.options(name, help), labels).expect(name);
        if labels.is_empty() {
            counter.single();
        }
        self.register(name, counter)
    }

    /// A gauge of whole numbers.
    pub fn gauge(&self, name: &str, help: &str, labels: &[&str]) -> IntGaugeVec {
        let gauge = IntGaugeVec::new(self.options(name, help), labels).expect(name);
        if labels.is_empty() {
            gauge.single();
        }
        self.register(name, gauge)
    }

    /// A gauge of fractions, such as ratios and seconds.
    pub fn fraction(&self, name: &str, help: &str, labels: &[&str]) -> GaugeVec {
        let gauge = GaugeVec::new(self.options(name, help), labels).expect(name);
        if labels.is_empty() {
            gauge.single();
        }
        self.register(name, gauge)
    }

    /// A histogram with one of the bucket lists of this module.
    pub fn histogram(&self, name: &str, help: &str, labels: &[&str], buckets: &[f64]) -> HistogramVec {
        let options = HistogramOpts::from(self.options(name, help)).buckets(buckets.to_vec());
        let histogram = HistogramVec::new(options, labels).expect(name);
        if labels.is_empty() {
            histogram.single();
        }
        self.register(name, histogram)
    }

    fn options(&self, name: &str, help: &str) -> Opts {
        self.labels
            .iter()
            .fold(Opts::new(name, help), |options, (name, value)| options.const_label(name, value))
    }

    fn register<C: Collector + Clone + 'static>(&self, name: &str, metric: C) -> C {
        self.metrics.register(Box::new(metric.clone())).expect(name);
        metric
    }
}

/// The one series of a metric without variable labels.
pub trait Single {
    /// A counter, gauge or histogram.
    type Series;
    /// Panics when the metric was made with variable labels.
    fn single(&self) -> Self::Series;
}

impl<T: MetricVecBuilder> Single for MetricVec<T> {
    type Series = T::M;

    fn single(&self) -> T::M {
        self.with_label_values::<&str>(&[])
    }
}

/// Everything in `registry` as Prometheus text, sorted by name.
pub fn render(registry: &Registry) -> String {
    let text = TextEncoder::new().encode_to_string(&registry.metrics.gather());
    text.expect("metrics checked when they were made can be written")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bucket_lists_rise() {
        for list in [
            TIME_TO_FIRST_TOKEN_SECONDS,
            TIME_PER_OUTPUT_TOKEN_SECONDS,
            REQUEST_SECONDS,
            STEP_SECONDS,
            TOKENS,
        ] {
            assert!(list.windows(2).all(|pair| pair[0] < pair[1]), "{list:?}");
        }
    }

    #[test]
    fn text_shows_every_series_with_its_labels() {
        let registry = Registry::new();
        let vllm = registry.with_label("model_name", "demo");
        vllm.gauge("vllm:num_requests_running", "requests in the batch", &[]);
        let finished =
            vllm.counter("vllm:request_success_total", "requests that ended", &["finished_reason"]);
        finished.with_label_values(&["stop"]).inc_by(2);
        let first = vllm.histogram(
            "vllm:time_to_first_token_seconds",
            "time to first token",
            &[],
            TIME_TO_FIRST_TOKEN_SECONDS,
        );
        first.single().observe(0.3);
        registry.fraction("tandem_load_progress_ratio", "share of the model that is loaded", &[]);
        let text = render(&registry);
        for line in [
            "vllm:num_requests_running{model_name=\"demo\"} 0",
            "vllm:request_success_total{finished_reason=\"stop\",model_name=\"demo\"} 2",
            "vllm:time_to_first_token_seconds_bucket{model_name=\"demo\",le=\"0.25\"} 0",
            "vllm:time_to_first_token_seconds_bucket{model_name=\"demo\",le=\"0.5\"} 1",
            "vllm:time_to_first_token_seconds_count{model_name=\"demo\"} 1",
            "# TYPE vllm:time_to_first_token_seconds histogram",
            "tandem_load_progress_ratio 0",
        ] {
            assert!(text.lines().any(|found| found == line), "{line} is missing in:\n{text}");
        }
    }

    #[test]
    fn components_of_one_process_do_not_share_metrics() {
        let (first, second) = (Registry::new(), Registry::new());
        first.counter("tandem_steps_total", "steps", &[]).single().inc();
        second.counter("tandem_steps_total", "steps", &[]);
        assert!(render(&first).contains("tandem_steps_total 1"));
        assert!(render(&second).contains("tandem_steps_total 0"));
    }

    #[test]
    #[should_panic(expected = "tandem_steps_total")]
    fn a_name_is_given_once() {
        let registry = Registry::new();
        registry.counter("tandem_steps_total", "steps", &[]);
        registry.counter("tandem_steps_total", "steps", &[]);
    }
}
