//! The router's metrics: vLLM's names where vLLM has one, ours otherwise. Functions named for events.

use std::time::Duration;

use tandem_chassis::metrics::{self, HistogramVec, IntCounterVec, IntGaugeVec, Registry};
use tandem_chassis::seam;
use tandem_types::{Time, Usage, WorkerState};

use crate::request::DispatchError;

pub(crate) struct Metrics {
    registry: Registry,
    running: IntGaugeVec,
    waiting: IntGaugeVec,
    first_token: HistogramVec,
    between_tokens: HistogramVec,
    per_output_token: HistogramVec,
    whole: HistogramVec,
    queue: HistogramVec,
    prompt_tokens: IntCounterVec,
    generation_tokens: IntCounterVec,
    success: IntCounterVec,
    requests: IntCounterVec,
    shed: IntCounterVec,
    retried: IntCounterVec,
    diverged: IntCounterVec,
    workers: IntGaugeVec,
}

impl Metrics {
    pub(crate) fn new(model: &str) -> Metrics {
        let registry = Registry::new();
        let vllm = registry.with_label("model_name", model);
        let ours = registry.with_label("model", model);
        let success = vllm.counter(
            "vllm:request_success_total",
            "requests that ended well, by finish reason",
            &["finished_reason"],
        );
        // Both series from the start: a dashboard's rate needs a zero to rise from.
        for reason in ["stop", "length"] {
            success.with_label_values(&[reason]);
        }
        Metrics {
            running: vllm.gauge("vllm:num_requests_running", "requests taken in and not over", &[]),
            waiting: vllm.gauge("vllm:num_requests_waiting", "requests that no worker has begun", &[]),
            first_token: vllm.histogram(
                "vllm:time_to_first_token_seconds",
                "from taking a request in to its first token",
                &[],
                metrics::TIME_TO_FIRST_TOKEN_SECONDS,
            ),
            between_tokens: vllm.histogram(
                "vllm:inter_token_latency_seconds",
                "between two tokens of an answer",
                &[],
                metrics::TIME_PER_OUTPUT_TOKEN_SECONDS,
            ),
            per_output_token: ours.histogram(
                "tandem_time_per_output_token_seconds",
                "mean time per token after the first, one value per request",
                &[],
                metrics::TIME_PER_OUTPUT_TOKEN_SECONDS,
            ),
            whole: vllm.histogram(
                "vllm:e2e_request_latency_seconds",
                "from taking a request in to its end",
                &[],
                metrics::REQUEST_SECONDS,
            ),
            queue: ours.histogram(
                "tandem_queue_wait_seconds",
                "from taking a request in to the moment a worker has begun it",
                &[],
                metrics::REQUEST_SECONDS,
            ),
            prompt_tokens: vllm.counter(
                "vllm:prompt_tokens_total",
                "prompt tokens of requests that ended",
                &[],
            ),
            generation_tokens: vllm.counter("vllm:generation_tokens_total", "tokens delivered", &[]),
            success,
            requests: ours.counter("tandem_requests_total", "requests by how they ended", &["code"]),
            shed: ours.counter("tandem_requests_shed_total", "requests refused at the door", &["reason"]),
            retried: ours.counter("tandem_requests_retried_total", "placements done again", &["reason"]),
            diverged: ours.counter(
                "tandem_diverged_tokens_total",
                "tokens that differed from one already delivered at their position",
                &[],
            ),
            workers: registry.gauge("tandem_workers", "workers by state", &["state"]),
            registry,
        }
    }

    pub(crate) fn request_begins(&self) {
        self.running.with_label_values::<&str>(&[]).inc();
    }

    pub(crate) fn observe_refusal(&self, error: &DispatchError) {
        self.shed.with_label_values(&[error.word()]).inc();
    }

    pub(crate) fn observe_queue(&self, waited: Duration) {
        self.queue.with_label_values::<&str>(&[]).observe(waited.as_secs_f64());
    }

    pub(crate) fn observe_token(&self, first: bool, since_last: Duration) {
        let histogram = if first { &self.first_token } else { &self.between_tokens };
        histogram.with_label_values::<&str>(&[]).observe(since_last.as_secs_f64());
        self.generation_tokens.with_label_values::<&str>(&[]).inc();
    }

    pub(crate) fn observe_retry(&self, fault: bool) {
        self.retried.with_label_values(&[if fault { "fault" } else { "refused" }]).inc();
    }

    pub(crate) fn observe_divergence(&self) {
        self.diverged.with_label_values::<&str>(&[]).inc();
    }

    /// A request is over: `how` is `stop`, `length`, `abort` or `error`. `decoding` is the time from its first
    /// token to its last.
    pub(crate) fn observe_end(&self, arrived: Time, decoding: Duration, usage: &Usage, how: &str) {
        let took = seam::now().since(arrived).as_secs_f64();
        self.running.with_label_values::<&str>(&[]).dec();
        self.whole.with_label_values::<&str>(&[]).observe(took);
        self.prompt_tokens.with_label_values::<&str>(&[]).inc_by(u64::from(usage.prompt_tokens));
        if matches!(how, "stop" | "length") {
            self.success.with_label_values(&[how]).inc();
            if usage.output_tokens > 1 {
                let each = decoding.as_secs_f64() / f64::from(usage.output_tokens - 1);
                self.per_output_token.with_label_values::<&str>(&[]).observe(each);
            }
        }
        self.requests.with_label_values(&[how]).inc();
    }

    /// The text of `/metrics`.
    pub(crate) fn render(&self, waiting: usize, count: impl Fn(WorkerState) -> usize) -> String {
        self.waiting.with_label_values::<&str>(&[]).set(waiting as i64);
        for state in [WorkerState::Ready, WorkerState::Suspect, WorkerState::Draining, WorkerState::Dead] {
            self.workers.with_label_values(&[state.as_str()]).set(count(state) as i64);
        }
        metrics::render(&self.registry)
    }
}
