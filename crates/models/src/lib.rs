//! Architectures as data, and the reader of checkpoints: a Hugging Face folder becomes a [`DecoderSpec`] and
//! named weights in memory maps.
//!
//! Never knows: devices, kernels, packed forms, tokenizers, requests. A new architecture is one file in `arch/`
//! and one row of [`ARCHITECTURES`]; nothing else names it.
//!
//! Always holds: a [`Checkpoint`] that [`open`] returned has every weight its spec asks for, in a supported
//! element type or quantised format and the right shape, inside the mapped file; every fault is an [`Error`] that names
//! the file and the fact, found before anything is computed.

mod arch;
mod checkpoint;
mod config;
mod error;
mod quantised;
mod rope;
mod safetensors;
mod spec;
#[cfg(test)]
mod testing;
mod weights;

pub use arch::{ARCHITECTURES, Architecture, Place, WeightNames};
pub use checkpoint::{Checkpoint, WeightDigest, from_bytes, open};
pub use config::Config;
pub use error::Error;
pub use quantised::{Int4Row, Matrix, MatrixForm};
pub use rope::{Pairing, RopeKind, RopeSpec};
pub use spec::{
    Activation, AttentionSpec, DecoderSpec, FeedForwardSpec, Head, KvGroup, KvKind, KvSpec, LayerPart,
    LayerSpec, NormSpec, Part, WeightSpec,
};
pub use weights::{Dtype, Tensor};
