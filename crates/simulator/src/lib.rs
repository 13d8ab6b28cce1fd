//! A cluster in virtual time: real placement, real batching, simulated engines.
//!
//! Never knows: clocks, threads, the network; randomness is a function of seed, entity and draw. Always holds:
//! the same options and workload give the same outcome and the same log hash; adding a worker or a request
//! changes nobody else's draws; every figure says which code decided about steps.

pub mod cache;
mod cluster;
pub mod options;
pub mod random;
pub mod real;
pub mod report;
pub mod scenario;
pub mod search;
pub mod twin;
mod worker;
pub mod workload;

pub use cluster::Cluster;
pub use options::{Batching, Fault, Offline, Options, Split};
pub use report::{Outcome, Run};
pub use scenario::Scenario;
pub use workload::{Trace, Workload};

/// Runs a workload through a cluster.
pub fn run(options: &Options, workload: &Workload) -> Result<Outcome, String> {
    Ok(Cluster::new(options, workload)?.run())
}

/// Whether at least `target` of a workload's online requests meet both targets, without running further than that
/// takes.
pub fn holds(options: &Options, workload: &Workload, target: f64) -> Result<bool, String> {
    Ok(Cluster::new(options, workload)?.holds(target))
}
