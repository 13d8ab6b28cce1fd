//! A worker's metrics: vLLM's names where vLLM has one, ours otherwise. Functions named for events.

use std::time::Duration;

use tandem_batching::Plan;
use tandem_chassis::metrics::{self, HistogramVec, IntCounterVec, IntGaugeVec, Registry};
use tandem_engine::Facts;
use tandem_types::BLOCK_TOKENS;

use crate::core::{Finish, LegReport, Load};

pub(crate) struct Metrics {
    registry: Registry,
    running: IntGaugeVec,
    waiting: IntGaugeVec,
    kv_usage: metrics::GaugeVec,
    blocks: IntGaugeVec,
    leases: IntGaugeVec,
    prefix_queries: IntCounterVec,
    prefix_hits: IntCounterVec,
    prompt_tokens: IntCounterVec,
    generation_tokens: IntCounterVec,
    preemptions: IntCounterVec,
    success: IntCounterVec,
    first_token: HistogramVec,
    whole: HistogramVec,
    batch_tokens: HistogramVec,
    step: HistogramVec,
    legs: IntCounterVec,
    transfer_bytes: IntCounterVec,
    transfer_seconds: HistogramVec,
    transfer_failures: IntCounterVec,
    connections: IntCounterVec,
    quarantined: IntGaugeVec,
    exposed_seconds: HistogramVec,
    exposed_bytes: IntCounterVec,
    corrupt: IntCounterVec,
    borrowed: IntCounterVec,
    role_switches: IntCounterVec,
}

impl Metrics {
    pub(crate) fn new(facts: &Facts, model: &str) -> Metrics {
        let registry = Registry::new();
        let vllm = registry.with_label("model_name", model);
        let ours = registry.with_label("model", model);
        let pages = facts.pages.to_string();
        let block = BLOCK_TOKENS.to_string();
        vllm.with_label("block_size", &block)
            .with_label("num_gpu_blocks", &pages)
            .gauge("vllm:cache_config_info", "the KV pool; always 1", &[])
            .with_label_values::<&str>(&[])
            .set(1);
        ours.with_label("kernel", &facts.kernel)
            .gauge("tandem_kernel_info", "the kernels chosen for this processor; always 1", &[])
            .with_label_values::<&str>(&[])
            .set(1);
        let success = vllm.counter(
            "vllm:request_success_total",
            "legs that ended an answer, by finish reason",
            &["finished_reason"],
        );
        // Both series from the start: a dashboard's rate needs a zero to rise from.
        for reason in ["stop", "length"] {
            success.with_label_values(&[reason]);
        }
        Metrics {
            running: vllm.gauge("vllm:num_requests_running", "sequences in the batch", &[]),
            waiting: vllm.gauge("vllm:num_requests_waiting", "sequences not yet admitted", &[]),
            kv_usage: vllm.fraction("vllm:kv_cache_usage_perc", "share of the KV pool in use, 0 to 1", &[]),
            blocks: ours.gauge("tandem_kv_blocks", "blocks of the KV pool by state", &["state"]),
            leases: ours.gauge("tandem_leases", "leases granted and not over", &[]),
            prefix_queries: vllm.counter(
                "vllm:prefix_cache_queries_total",
                "prompt tokens looked up in the prefix cache",
                &[],
            ),
            prefix_hits: vllm.counter("vllm:prefix_cache_hits_total", "prompt tokens found there", &[]),
            prompt_tokens: vllm.counter("vllm:prompt_tokens_total", "prompt tokens computed", &[]),
            generation_tokens: vllm.counter("vllm:generation_tokens_total", "tokens drawn", &[]),
            preemptions: vllm.counter("vllm:num_preemptions_total", "sequences taken out to make room", &[]),
            success,
            first_token: vllm.histogram(
                "vllm:time_to_first_token_seconds",
                "from a Start to its first token here",
                &[],
                metrics::TIME_TO_FIRST_TOKEN_SECONDS,
            ),
            whole: vllm.histogram(
                "vllm:e2e_request_latency_seconds",
                "from a Start to the end of its leg",
                &[],
                metrics::REQUEST_SECONDS,
            ),
            batch_tokens: ours.histogram("tandem_batch_tokens", "tokens of a step", &[], metrics::TOKENS),
            step: ours.histogram("tandem_step_seconds", "time of a step", &[], metrics::STEP_SECONDS),
            legs: ours.counter("tandem_legs_total", "legs by how they left", &["how"]),
            transfer_bytes: ours.counter(
                "tandem_kv_transfer_bytes_total",
                "bytes of KV pulled from other workers",
                &["transport", "direction"],
            ),
            transfer_seconds: ours.histogram(
                "tandem_kv_transfer_seconds",
                "time in which the bytes of a pull were moving",
                &["transport"],
                metrics::STEP_SECONDS,
            ),
            transfer_failures: ours.counter(
                "tandem_kv_transfer_failures_total",
                "hand-offs that were not taken over",
                &["reason"],
            ),
            connections: {
                let connections = ours.counter(
                    "tandem_kv_transfer_connections_total",
                    "connections made to other workers' memory",
                    &["transport"],
                );
                for row in tandem_kv_transfer::TRANSPORTS {
                    connections.with_label_values(&[row.name]);
                }
                connections
            },
            quarantined: {
                let quarantined = ours.gauge(
                    "tandem_kv_quarantined_bytes",
                    "bytes of this pool that a transport may still write to after its pull has ended",
                    &[],
                );
                quarantined.with_label_values::<&str>(&[]);
                quarantined
            },
            exposed_seconds: ours.histogram(
                "tandem_kv_transfer_exposed_seconds",
                "of a hand-off, from its seal to the verdict: what prefill does not hide",
                &["transport"],
                metrics::STEP_SECONDS,
            ),
            exposed_bytes: ours.counter(
                "tandem_kv_transfer_exposed_bytes_total",
                "bytes of KV pulled after the seal",
                &["transport"],
            ),
            corrupt: {
                let corrupt = ours.counter(
                    "tandem_kv_checksum_failures_total",
                    "checksums that did not match: of a pull (transfer), or of a page in this pool (pool)",
                    &["where"],
                );
                for place in ["transfer", "pool"] {
                    corrupt.with_label_values(&[place]);
                }
                corrupt
            },
            borrowed: ours.counter(
                "tandem_prefix_borrowed_tokens_total",
                "prompt tokens taken from other workers' prefix caches",
                &[],
            ),
            role_switches: ours.counter("tandem_role_switches_total", "role changes", &["from", "to"]),
            registry,
        }
    }

    pub(crate) fn observe_plan(&self, plan: &Plan) {
        let tokens: u32 = plan.rows.iter().map(|row| row.count).sum();
        self.batch_tokens.with_label_values::<&str>(&[]).observe(f64::from(tokens));
        let prompt: u32 = plan.rows.iter().filter(|row| row.count > 1).map(|row| row.count).sum();
        self.prompt_tokens.with_label_values::<&str>(&[]).inc_by(u64::from(prompt));
    }

    pub(crate) fn observe_step(&self, took: Duration, sampled: usize) {
        self.step.with_label_values::<&str>(&[]).observe(took.as_secs_f64());
        self.generation_tokens.with_label_values::<&str>(&[]).inc_by(sampled as u64);
    }

    pub(crate) fn observe_leg(&self, report: &LegReport) {
        let how = match &report.finish {
            Finish::Finished(reason, _) => {
                let length = *reason == tandem_types::FinishReason::Length;
                self.success.with_label_values(&[if length { "length" } else { "stop" }]).inc();
                "finished"
            }
            Finish::HandedOff => "handed_off",
            Finish::Cancelled => "cancelled",
            Finish::Superseded => "superseded",
            Finish::Refused(..) => "refused",
            Finish::Preempted => {
                self.preemptions.with_label_values::<&str>(&[]).inc();
                "preempted"
            }
            Finish::Failed(..) => "failed",
        };
        self.legs.with_label_values(&[how]).inc();
        self.prefix_queries.with_label_values::<&str>(&[]).inc_by(u64::from(report.prompt_tokens));
        self.prefix_hits.with_label_values::<&str>(&[]).inc_by(u64::from(report.cached_tokens));
        if let Some(first) = report.first_token_at {
            self.first_token
                .with_label_values::<&str>(&[])
                .observe(first.since(report.arrived).as_secs_f64());
        }
        self.whole.with_label_values::<&str>(&[]).observe(report.left.since(report.arrived).as_secs_f64());
    }

    pub(crate) fn observe_transfer(&self, transport: &str, bytes: u64, took: Duration) {
        self.transfer_bytes.with_label_values(&[transport, "in"]).inc_by(bytes);
        self.transfer_seconds.with_label_values(&[transport]).observe(took.as_secs_f64());
    }

    /// Another worker's memory is within reach.
    pub(crate) fn observe_connection(&self, transport: &str) {
        self.connections.with_label_values(&[transport]).inc();
    }

    /// So many bytes went into quarantine, or came out of it.
    pub(crate) fn observe_quarantined(&self, bytes: i64) {
        self.quarantined.with_label_values::<&str>(&[]).add(bytes);
    }

    /// A hand-off was taken over so long after its seal, with so many bytes of it pulled by then.
    pub(crate) fn observe_exposed(&self, transport: &str, bytes: u64, took: Duration) {
        self.exposed_bytes.with_label_values(&[transport]).inc_by(bytes);
        self.exposed_seconds.with_label_values(&[transport]).observe(took.as_secs_f64());
    }

    /// Checksums did not match.
    pub(crate) fn observe_corrupt(&self, place: &str, count: u64) {
        self.corrupt.with_label_values(&[place]).inc_by(count);
    }

    /// A prefix came from another worker's cache.
    pub(crate) fn observe_borrowed(&self, tokens: u32) {
        self.borrowed.with_label_values::<&str>(&[]).inc_by(u64::from(tokens));
    }

    pub(crate) fn observe_transfer_failure(&self, reason: &str) {
        self.transfer_failures.with_label_values(&[reason]).inc();
    }

    pub(crate) fn observe_role_switch(&self, from: tandem_types::Role, to: tandem_types::Role) {
        self.role_switches.with_label_values(&[from.as_str(), to.as_str()]).inc();
    }

    /// The text of `/metrics`.
    pub(crate) fn render(&self, load: &Load) -> String {
        self.running.with_label_values::<&str>(&[]).set(i64::from(load.running));
        self.waiting.with_label_values::<&str>(&[]).set(i64::from(load.waiting));
        self.leases.with_label_values::<&str>(&[]).set(i64::from(load.leases));
        let usage = f64::from(load.blocks_in_use) / f64::from(load.blocks_total.max(1));
        self.kv_usage.with_label_values::<&str>(&[]).set(usage);
        let states =
            [("free", load.blocks_free), ("cached", load.blocks_cached), ("in_use", load.blocks_in_use)];
        for (state, blocks) in states {
            self.blocks.with_label_values(&[state]).set(i64::from(blocks));
        }
        metrics::render(&self.registry)
    }
}
