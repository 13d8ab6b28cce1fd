//! The integration tests: one binary, a tree of modules.
//!
//! - `walking`: requests through the public door of a cluster in this process
//! - `equality`: hand-offs change no bit
//! - `handoff`: what is moved, when, and what becomes of bytes that are wrong
//! - `leaks`: nothing is held after the last request, whatever was cancelled
//! - `faults`: workers that die, fail, refuse and come back
//! - `chaos`: seeded cases of fail points at every arrow of the protocol, in virtual time
//! - `fleets`: real processes that are killed and stopped, and very many requests to them
//! - `references`: checkpoints agree with their references through the API
//! - `broken`: checkpoints that cannot be served are refused by naming the fact
//! - `operating`: admin endpoints, metrics, roles, cordon and drain
//! - `processes`: real processes, started by the real `tandem up`
//! - `etcd`: the same over a real etcd server
//! - `tracing`: one trace through every process
//! - `openai` and `nodejs`: OpenAI's packages for Python and Node, unmodified
//! - `sdk`: the two do the same
//! - `schemathesis`: OpenAI's published document, case by case

mod broken;
mod chaos;
mod equality;
mod etcd;
mod faults;
mod fleets;
mod handoff;
mod leaks;
mod nodejs;
mod openai;
mod operating;
mod processes;
mod references;
mod roles;
mod schemathesis;
mod sdk;
mod support;
mod tracing;
mod walking;
