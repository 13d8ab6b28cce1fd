//! Runs plans: a model, its KV memory and its sampling behind one trait, and the fake engine beside the real
//! one.
//!
//! Never knows: requests, routers, leases, clocks (time enters as a value), async. It sees slots, pages and
//! token ids.
//!
//! Always holds: outcomes come back in the order in which plans were submitted; a plan touches only the pages
//! it names; on the CPU the token drawn for an output position depends on the sequence, its sampling
//! parameters and that position alone, bit for bit, whatever else is in the batch.

use std::fmt;
use std::path::Path;
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tandem_batching::{Outcome, Plan};
use tandem_memory::Region;
use tandem_types::{KvForm, KvIdentity, Time};

mod decoder;
mod estimate;
pub mod fake;
mod quantise;
#[cfg(feature = "bench")]
pub mod random_checkpoint;
mod runner;
mod score;
mod slots;
mod step;
mod weights;

pub use quantise::Quantization;
pub use runner::DecoderEngine;
pub use tandem_models::{KvKind, KvSpec};

/// Runs plans. One thread owns it and calls it; nothing here waits.
///
/// Before `submit`: every page a row writes belongs to that row's sequence alone, every page it reads is
/// whole up to `start`, and every slot it names was opened by this plan or an earlier one and not closed
/// since. Pages named by a submitted plan stay the engine's until its outcome was collected. Dropping the
/// engine waits for what the device is doing.
pub trait Engine: Send {
    /// What this engine is; never changes.
    fn facts(&self) -> &Facts;

    /// The memory all KV pages lie in.
    fn kv_region(&self) -> Arc<Region>;

    /// Where in the region a page begins, in bytes; it is `facts().form.page_bytes[group]` long.
    fn page_offset(&self, group: u32, page: u32) -> u64;

    /// Starts a step. At most `facts().depth + 1` may be in flight.
    ///
    /// Rows whose `sample` is true draw a token; a row of the outcome that should have drawn one and holds
    /// none met logits that are not finite: that sequence cannot go on, the others can. A row that scores tokens of
    /// its prompt brings one score per target, or fewer where it met such logits. Logits are there for a few dozen
    /// rows at a time, however long the chunk.
    fn submit(&mut self, plan: Plan, now: Time);

    /// The oldest step in flight, if it is done. An error fails the whole step: nothing it wrote counts.
    fn collect(&mut self, now: Time) -> Option<Result<Outcome, StepError>>;

    /// Steps submitted and not yet collected.
    fn in_flight(&self) -> usize;

    /// When the oldest step will be done, where that is known beforehand (an engine of virtual time).
    fn ready_at(&self) -> Option<Time>;

    /// How long a plan should take, from what earlier ones took. For the watchdog and for beats.
    fn expected(&self, plan: &Plan) -> Duration;

    /// Zeroes all of a page beyond its first `rows` tokens, so that a page handed out holds nothing else.
    fn zero_tail(&mut self, group: u32, page: u32, rows: u32);
}

/// What an engine is.
#[derive(Clone, Debug)]
pub struct Facts {
    /// The model's name: the checkpoint's folder name.
    pub model: String,
    /// What its KV bytes are.
    pub identity: KvIdentity,
    /// How they are arranged.
    pub form: KvForm,
    /// Token ids are below this.
    pub vocab: u32,
    /// Tokens a sequence may have at most.
    pub context_tokens: u32,
    /// What a layer of each KV group keeps per token.
    pub kv: Vec<KvSpec>,
    /// Pages of each group.
    pub pages: u32,
    /// Steps the device may run ahead of the host.
    pub depth: u32,
    /// The instruction set the kernels chose, for logs and metrics.
    pub kernel: String,
}

/// How to load a model.
#[derive(Clone)]
pub struct Options {
    /// Element type of weights, activations and KV.
    pub dtype: Dtype,
    /// Whether weights are quantised at load.
    pub quantization: Quantization,
    /// Threads that compute, the caller's included; at least 1.
    pub threads: usize,
    /// Memory for KV pages, in bytes.
    pub kv_bytes: u64,
    /// Steps that may be submitted before the oldest is collected, less one: 0 or 1.
    pub depth: u32,
    /// Called with the loaded share, from 0 to 1.
    pub progress: Arc<dyn Fn(f32) + Send + Sync>,
    /// Whether peers on this host may map the KV region (a memfd).
    pub shared_memory: bool,
}

impl Default for Options {
    /// The checkpoint's type and quantisation, one thread, 512 MiB, depth 0, private memory.
    fn default() -> Self {
        Options {
            dtype: Dtype::Auto,
            quantization: Quantization::Auto,
            threads: 1,
            kv_bytes: 512 << 20,
            depth: 0,
            progress: Arc::new(|_| {}),
            shared_memory: false,
        }
    }
}

/// Element type of weights, activations and KV.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Dtype {
    /// What the checkpoint says: float32 stays, everything else becomes bfloat16.
    #[default]
    Auto,
    /// Weights, KV and activations between operations in bf16; arithmetic in float32.
    Bfloat16,
    /// Everything in float32.
    Float32,
}

impl Dtype {
    /// The word used in flags and JSON.
    pub fn as_str(self) -> &'static str {
        match self {
            Dtype::Auto => "auto",
            Dtype::Bfloat16 => "bfloat16",
            Dtype::Float32 => "float32",
        }
    }
}

impl fmt::Display for Dtype {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for Dtype {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        [Dtype::Auto, Dtype::Bfloat16, Dtype::Float32]
            .into_iter()
            .find(|dtype| dtype.as_str() == text)
            .ok_or_else(|| format!("{text:?} is not a dtype; expected auto, bfloat16 or float32"))
    }
}

/// A step that failed as a whole.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("step {plan} failed: {reason}")]
pub struct StepError {
    /// The plan's id.
    pub plan: u64,
    /// What went wrong.
    pub reason: String,
}

/// Why a model cannot be served.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// The checkpoint is at fault; the message names the file and the fact.
    #[error(transparent)]
    Checkpoint(#[from] tandem_models::Error),
    /// The model needs something this engine does not have.
    #[error("{model}: {reason}")]
    Unsupported {
        /// The checkpoint's folder.
        model: String,
        /// What is missing.
        reason: String,
    },
    /// Not even one sequence would fit.
    #[error(
        "kv memory of {given} bytes is too small for {model}: one block of 32 tokens takes {needed} bytes"
    )]
    KvMemory {
        /// The checkpoint's folder.
        model: String,
        /// Bytes given.
        given: u64,
        /// Bytes of one block over all groups.
        needed: u64,
    },
    /// The system did not give the memory.
    #[error("cannot map {bytes} bytes of kv memory: {source}")]
    Memory {
        /// Bytes asked for.
        bytes: u64,
        /// What the system said.
        source: std::io::Error,
    },
    /// An option that cannot be.
    #[error("{0}")]
    Option(String),
}

/// Loads a Hugging Face checkpoint folder and makes it ready to run.
///
/// Everything that can be wrong with the files, the options or the memory is found here, before the first
/// plan.
pub fn load(dir: &Path, options: Options) -> Result<Box<dyn Engine>, LoadError> {
    Ok(Box::new(DecoderEngine::load(dir, options)?))
}
