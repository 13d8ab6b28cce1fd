//! The stages of a request, in the order it passes them. Spans, metrics, logs and dashboards use these words
//! and no others.

/// Waiting for admission or for a step.
pub const QUEUE: &str = "queue";
/// Turning images into embeddings.
pub const ENCODE: &str = "encode";
/// Computing the prompt up to the first token.
pub const PREFILL: &str = "prefill";
/// Bringing KV from the worker that made it to the worker that decodes.
pub const TRANSFER: &str = "transfer";
/// Computing token after token.
pub const DECODE: &str = "decode";

/// All of them.
pub const ALL: [&str; 5] = [QUEUE, ENCODE, PREFILL, TRANSFER, DECODE];
