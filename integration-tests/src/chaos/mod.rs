//! Clusters under faults, case after case from a seed: what `cargo xtask chaos` runs.

pub mod failpoints;
