//! Trace spans of the stages a leg goes through here: `queue`, `prefill`, `transfer`, `decode`.
//!
//! A stage's span is open exactly while the leg is in it; the words are those of metrics and logs.

use std::collections::HashMap;

use tandem_batching::SequenceId;
use tandem_chassis::telemetry;
use tracing::Span;
use tracing::field::Empty;

use crate::core::{LegReport, StageChange, StageName, Transfer};

/// The open span of every traced leg.
#[derive(Default)]
pub(crate) struct Spans {
    open: HashMap<SequenceId, Span>,
}

impl Spans {
    /// A leg enters a stage: the span of the one before closes.
    pub(crate) fn change(&mut self, change: StageChange) {
        let request = change.request_name.as_str();
        let leg = tracing::field::display(change.key);
        let span = match change.stage {
            StageName::Queue => tracing::info_span!("queue", request, leg),
            StageName::Prefill => tracing::info_span!("prefill", request, leg),
            StageName::Transfer => tracing::info_span!(
                "transfer",
                request,
                leg,
                bytes = Empty,
                busy_us = Empty,
                exposed_bytes = Empty,
                exposed_us = Empty,
            ),
            StageName::Decode => tracing::info_span!("decode", request, leg),
        };
        if let Some(traceparent) = &change.traceparent {
            telemetry::set_parent(&span, traceparent);
        }
        self.open.insert(change.sequence, span);
    }

    /// A pull has ended well: its span says how much of it prefill has hidden.
    pub(crate) fn transferred(&mut self, sequence: SequenceId, transfer: Transfer) {
        let Some(span) = self.open.get(&sequence) else { return };
        span.record("bytes", transfer.bytes);
        span.record("busy_us", transfer.busy.as_micros() as u64);
        span.record("exposed_bytes", transfer.exposed_bytes);
        span.record("exposed_us", transfer.exposed.as_micros() as u64);
    }

    /// A leg is over.
    pub(crate) fn left(&mut self, report: &LegReport) {
        self.open.remove(&report.sequence);
    }
}
