//! Clusters under faults, case after case from a seed: what `cargo xtask chaos` runs.

mod ask;
pub mod failpoints;
mod fleet;
pub mod processes;
mod random;
pub mod soak;
