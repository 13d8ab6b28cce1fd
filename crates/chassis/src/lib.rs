//! What every process of a cluster needs: the seam to clock, tasks and sockets, configuration, telemetry,
//! the admin port, metrics and an orderly end.
//!
//! Never knows: workers, routers, requests, models or which service it stands in.
//! Always holds: everything spawned here has an owner that waits for it, a drain comes before a stop, and a
//! wrong option is refused with the name of the right one.

pub mod admin;
pub mod allocator;
pub mod config;
pub mod drain;
pub mod fail;
pub mod group;
pub mod grpc;
pub mod http;
pub mod metrics;
mod process;
pub mod seam;
pub mod stages;
mod tasks;
pub mod telemetry;

pub use drain::Shutdown;
pub use process::{ProcessFacts, forgo_huge_pages, process_facts, raise_open_files};
pub use tasks::Tasks;
