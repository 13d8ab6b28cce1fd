//! The messages of `tandem.v1` and their generated clients and servers, with conversions to and from the
//! nouns of `tandem-types`.
//!
//! Never knows: what a message means. A conversion from the wire can fail and says which field was wrong;
//! one to the wire cannot.

/// Generated code: package `tandem.v1`.
#[allow(missing_docs, clippy::all, clippy::pedantic)]
pub mod v1 {
    tonic::include_proto!("tandem.v1");
}

pub mod convert;
mod sequence;

pub use convert::WireError;
pub use sequence::{Gap, Sequence};

/// Oldest protocol version this build understands.
pub const PROTOCOL_MIN: u32 = 1;
/// Newest protocol version this build understands.
pub const PROTOCOL_MAX: u32 = 1;
