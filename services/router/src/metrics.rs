//! The router's metrics: vLLM's names where vLLM has one, ours otherwise. Functions named for events.

use std::time::Duration;

use tandem_chassis::metrics::{
    self, Histogram, HistogramVec, IntCounter, IntCounterVec, IntGaugeVec, Registry,
};
use tandem_chassis::seam;
use tandem_types::{Role, Time, Usage, WorkerState};

use crate::request::DispatchError;

pub(crate) struct Metrics {
    registry: Registry,
    running: IntGaugeVec,
    waiting: IntGaugeVec,
    first_token: Histogram,
    between_tokens: Histogram,
    per_output_token: HistogramVec,
    whole: HistogramVec,
    queue: HistogramVec,
    prompt_tokens: IntCounterVec,
    generation_tokens: IntCounter,
    success: IntCounterVec,
    requests: IntCounterVec,
    shed: IntCounterVec,
    retried: IntCounterVec,
    diverged: IntCounterVec,
    workers: IntGaugeVec,
    slo: IntCounterVec,
    decisions: IntCounterVec,
    decision: HistogramVec,
    prediction_error: HistogramVec,
    prefix_tokens: IntCounterVec,
    index: IntGaugeVec,
    plans: IntCounterVec,
    replicas: IntGaugeVec,
    flips: IntCounterVec,
    flip: HistogramVec,
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
            )
            .with_label_values::<&str>(&[]),
            between_tokens: vllm.histogram(
                "vllm:inter_token_latency_seconds",
                "between two tokens of an answer",
                &[],
                metrics::TIME_PER_OUTPUT_TOKEN_SECONDS,
            )
            .with_label_values::<&str>(&[]),
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
            generation_tokens: vllm
                .counter("vllm:generation_tokens_total", "tokens delivered", &[])
                .with_label_values::<&str>(&[]),
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
            slo: ours.counter(
                "tandem_slo_requests_total",
                "answers that ended well by whether they met a target; both met is goodput",
                &["objective", "met"],
            ),
            decisions: ours.counter(
                "tandem_route_decisions_total",
                "routes chosen: one worker for all, or one for prefill and one for decode",
                &["path"],
            ),
            decision: ours.histogram(
                "tandem_route_decision_seconds",
                "time to choose a route",
                &[],
                metrics::STEP_SECONDS,
            ),
            prediction_error: ours.histogram(
                "tandem_predicted_ttft_error_ratio",
                "predicted over actual time to the first token, off by this much of the actual one",
                &[],
                metrics::RATIOS,
            ),
            prefix_tokens: ours.counter(
                "tandem_prefix_hit_tokens_total",
                "prompt tokens known to be cached at the chosen prefill worker (device), or at another (peer)",
                &["tier"],
            ),
            index: registry.gauge(
                "tandem_prefix_index",
                "the index of what workers have cached: entries, bytes, and blocks forgotten for its bound",
                &["what"],
            ),
            plans: registry.counter("tandem_planner_decisions_total", "plans of roles", &["flips"]),
            replicas: registry.gauge(
                "tandem_planner_desired_replicas",
                "workers that the load of late asks for",
                &["role"],
            ),
            flips: registry.counter(
                "tandem_planner_flips_total",
                "role changes ordered, and whether they were obeyed",
                &["from", "to", "obeyed"],
            ),
            flip: registry.histogram(
                "tandem_role_switch_seconds",
                "from ordering a role to the worker's word that it has it",
                &[],
                metrics::STEP_SECONDS,
            ),
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
        histogram.observe(since_last.as_secs_f64());
        self.generation_tokens.inc();
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

    /// An answer ended well; whether it met its targets.
    pub(crate) fn observe_targets(&self, first: bool, each: bool) {
        for (objective, met) in [("ttft", first), ("tpot", each), ("both", first && each)] {
            self.slo.with_label_values(&[objective, if met { "true" } else { "false" }]).inc();
        }
    }

    /// A route was chosen.
    pub(crate) fn observe_decision(&self, alone: bool, took: Duration) {
        let path = if alone { "one_worker" } else { "prefill_decode" };
        self.decisions.with_label_values(&[path]).inc();
        self.decision.with_label_values::<&str>(&[]).observe(took.as_secs_f64());
    }

    /// The first token came after so long, and was predicted to come after that.
    pub(crate) fn observe_prediction(&self, predicted: f64, actual: f64) {
        if predicted.is_finite() && actual > 0.0 {
            let error = (predicted / actual - 1.0).abs();
            self.prediction_error.with_label_values::<&str>(&[]).observe(error);
        }
    }

    /// The index knew so many tokens of a prompt, at the chosen worker or at another.
    pub(crate) fn observe_held(&self, tier: &str, tokens: u32) {
        self.prefix_tokens.with_label_values(&[tier]).inc_by(u64::from(tokens));
    }

    /// The size of the index: entries, bytes, blocks forgotten.
    pub(crate) fn observe_index(&self, (entries, bytes, evicted): (usize, usize, u64)) {
        for (what, value) in
            [("entries", entries as i64), ("bytes", bytes as i64), ("evicted", evicted as i64)]
        {
            self.index.with_label_values(&[what]).set(value);
        }
    }

    /// Roles were planned, and whether anything should change.
    pub(crate) fn observe_plan(&self, flips: bool, (prefill, decode): (usize, usize)) {
        self.plans.with_label_values(&[if flips { "some" } else { "none" }]).inc();
        self.replicas.with_label_values(&["prefill"]).set(prefill as i64);
        self.replicas.with_label_values(&["decode"]).set(decode as i64);
    }

    /// A role was ordered, and taken after so long, if it was.
    pub(crate) fn observe_flip(&self, from: Role, to: Role, took: Option<Duration>) {
        let obeyed = if took.is_some() { "true" } else { "false" };
        self.flips.with_label_values(&[from.as_str(), to.as_str(), obeyed]).inc();
        if let Some(took) = took {
            self.flip.with_label_values::<&str>(&[]).observe(took.as_secs_f64());
        }
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
