//! The batcher against a tiny model whose tokens depend on every word of KV before them.

mod harness;
mod promises;
mod random;
mod toy;
