//! Shared harness of the integration tests: whole clusters through their public doors, in this process or in
//! many, and a small HTTP client to talk to them.

pub mod chaos;
pub mod checkpoints;
pub mod client;
pub mod cluster;
pub mod measure;
pub mod processes;
pub mod skip;
pub mod wire;

pub use client::{Answer, Client, metric};
pub use cluster::{Spec, TestCluster};
pub use processes::ProcessCluster;
pub use wire::WireRouter;
