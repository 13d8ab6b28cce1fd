//! Logs to standard error and, where an endpoint is configured, spans to an OpenTelemetry collector.
//!
//! W3C trace context enters through [`set_parent`] and leaves through [`traceparent_of_current`]; both do
//! nothing while no endpoint is configured.

use std::collections::HashMap;
use std::io::{self, IsTerminal};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use std::{env, fmt};

use opentelemetry::propagation::TextMapPropagator;
use opentelemetry::trace::{TraceContextExt, TracerProvider};
use opentelemetry_otlp::{SpanExporter, WithExportConfig};
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::propagation::TraceContextPropagator;
use opentelemetry_sdk::trace::{SdkTracer, SdkTracerProvider};
use serde::Serialize;
use tokio::runtime::{self, Runtime};
use tracing::{Level, Metadata, Span, Subscriber};
use tracing_opentelemetry::{OpenTelemetryLayer, OpenTelemetrySpanExt};
use tracing_subscriber::filter::{EnvFilter, FilterExt, LevelFilter, filter_fn};
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::registry::LookupSpan;
use tracing_subscriber::{Layer, Registry};

const TRACEPARENT: &str = "traceparent";

/// What is logged when nobody says otherwise.
const LOG_DEFAULT: &str = "info";

/// How long the end of a process waits for a collector that does not answer.
const FLUSH_LIMIT: Duration = Duration::from_secs(3);

/// Flags about telemetry, to flatten into the configuration of a program.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, clap::Args)]
#[command(next_help_heading = "Telemetry")]
pub struct Options {
    /// What to log: a level, or a list like info,tandem_router=debug [default: RUST_LOG, else info]
    #[arg(long, value_name = "FILTER", value_parser = check_filter)]
    pub log: Option<String>,
    /// Export spans to this OTLP collector over gRPC, like http://127.0.0.1:4317 [default:
    /// OTEL_EXPORTER_OTLP_ENDPOINT, else nowhere]
    #[arg(long, value_name = "URL")]
    pub otlp_endpoint: Option<String>,
}

fn check_filter(filter: &str) -> Result<String, String> {
    match EnvFilter::try_new(filter) {
        Ok(_) => Ok(filter.to_owned()),
        Err(error) => Err(error.to_string()),
    }
}

/// Sets up logs and traces as the environment says; `otlp` stands before `OTEL_EXPORTER_OTLP_ENDPOINT`.
///
/// Once per process: components that share one share the first call's `service`, and later calls return a
/// guard that does nothing.
pub fn init(service: &str, otlp: Option<&str>) -> TelemetryGuard {
    init_with(service, &Options { log: None, otlp_endpoint: otlp.map(str::to_owned) })
}

/// [`init`] with the flags of a program, which stand before the environment.
pub fn init_with(service: &str, options: &Options) -> TelemetryGuard {
    static DONE: AtomicBool = AtomicBool::new(false);
    if DONE.swap(true, Ordering::AcqRel) {
        return TelemetryGuard { export: None };
    }
    let from_environment = |name| env::var(name).ok().filter(|value| !value.trim().is_empty());
    let log = options.log.clone().or_else(|| from_environment("RUST_LOG"));
    let endpoint = options.otlp_endpoint.clone().or_else(|| from_environment("OTEL_EXPORTER_OTLP_ENDPOINT"));
    let (export, export_error) = match endpoint.map(|endpoint| Export::start(service, &endpoint)).transpose()
    {
        Ok(export) => (export, None),
        Err(error) => (None, Some(error)),
    };
    let subscriber = Registry::default()
        .with(logs(log.as_deref().unwrap_or(LOG_DEFAULT)))
        .with(export.as_ref().map(Export::layer));
    // Someone else's subscriber, such as a test's, stays in place; then there is nothing to export.
    let export = tracing::subscriber::set_global_default(subscriber).is_ok().then_some(export).flatten();
    if let Some(error) = export_error {
        tracing::error!(%error, "spans are not exported");
    }
    TelemetryGuard { export }
}

/// Keeps the export of spans going; dropped at the end of `main`, it sends what is left.
#[must_use = "spans are exported while this lives"]
pub struct TelemetryGuard {
    export: Option<Export>,
}

impl fmt::Debug for TelemetryGuard {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TelemetryGuard").field("exports", &self.export.is_some()).finish()
    }
}

/// The `traceparent` header that makes the next process continue the current span; `None` where spans are not
/// exported or none is entered.
pub fn traceparent_of_current() -> Option<String> {
    traceparent_of(&Span::current())
}

/// The `traceparent` header that makes the next process continue `span`.
pub fn traceparent_of(span: &Span) -> Option<String> {
    let mut carrier = HashMap::new();
    TraceContextPropagator::new().inject_context(&span.context(), &mut carrier);
    carrier.remove(TRACEPARENT)
}

/// Makes `span` continue the trace of a received `traceparent`. To be called before the span is first entered;
/// a malformed header is ignored, as W3C asks.
pub fn set_parent(span: &Span, traceparent: &str) {
    let carrier = HashMap::from([(TRACEPARENT.to_owned(), traceparent.to_owned())]);
    let parent = TraceContextPropagator::new().extract_with_context(&opentelemetry::Context::new(), &carrier);
    if parent.span().span_context().is_valid()
        && let Err(error) = span.set_parent(parent)
    {
        tracing::trace!(%error, "a span keeps its own trace");
    }
}

/// Lines for people: with colours and columns on a terminal, compact elsewhere.
fn logs<S>(filter: &str) -> Box<dyn Layer<S> + Send + Sync>
where
    S: Subscriber + for<'a> LookupSpan<'a>,
{
    let lines = tracing_subscriber::fmt::layer().with_writer(io::stderr);
    let filter = EnvFilter::builder().with_default_directive(LevelFilter::INFO.into()).parse_lossy(filter);
    if io::stderr().is_terminal() {
        lines.with_filter(filter).boxed()
    } else {
        lines.with_ansi(false).compact().with_filter(filter).boxed()
    }
}

/// The way of spans to the collector, with a runtime of its own: it works before the process has one, while
/// that is busy, and after it has ended.
struct Export {
    provider: SdkTracerProvider,
    runtime: Option<Runtime>,
}

impl Export {
    fn start(service: &str, endpoint: &str) -> Result<Export, Box<dyn std::error::Error>> {
        let runtime = runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .thread_name("telemetry")
            .enable_all()
            .build()?;
        let exporter = {
            let _inside = runtime.enter();
            SpanExporter::builder().with_tonic().with_endpoint(endpoint).with_timeout(FLUSH_LIMIT).build()?
        };
        let resource = Resource::builder().with_service_name(service.to_owned()).build();
        let provider =
            SdkTracerProvider::builder().with_resource(resource).with_batch_exporter(exporter).build();
        Ok(Export { provider, runtime: Some(runtime) })
    }

    fn layer<S>(&self) -> impl Layer<S> + use<S>
    where
        S: Subscriber + for<'a> LookupSpan<'a>,
    {
        let layer: OpenTelemetryLayer<S, SdkTracer> =
            tracing_opentelemetry::layer().with_tracer(self.provider.tracer("tandem")).with_threads(false);
        layer.with_filter(filter_fn(is_ours).and(LevelFilter::INFO))
    }
}

/// Spans of this workspace. The libraries underneath have spans too, among them those of the export itself.
fn is_ours(metadata: &Metadata<'_>) -> bool {
    *metadata.level() <= Level::INFO && metadata.target().starts_with("tandem")
}

impl Drop for Export {
    fn drop(&mut self) {
        if let Err(error) = self.provider.shutdown_with_timeout(FLUSH_LIMIT) {
            tracing::warn!(%error, "the last spans did not reach the collector");
        }
        if let Some(runtime) = self.runtime.take() {
            // Not a plain drop: that waits, and may not happen inside another runtime.
            runtime.shutdown_background();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn without_export_there_is_no_trace_context() {
        let span = tracing::info_span!("prefill");
        set_parent(&span, "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01");
        let _entered = span.enter();
        assert_eq!(traceparent_of_current(), None);
    }

    #[test]
    fn a_filter_is_checked_at_the_door() {
        assert!(check_filter("info,tandem_router=debug").is_ok());
        assert!(check_filter("tandem=loud").is_err());
    }
}
