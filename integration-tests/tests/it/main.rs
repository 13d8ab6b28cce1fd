//! The integration tests: one binary, a tree of modules.
//!
//! - `walking`: requests through the public door of a cluster in this process
//! - `bench`: `tandem bench` against a server that misbehaves on purpose, and against a real cluster
//! - `equality`: hand-offs change no bit
//! - `handoff`: what is moved, when, and what becomes of bytes that are wrong
//! - `leaks`: nothing is held after the last request, whatever was cancelled
//! - `failures`: what a client sees when something breaks, row by row of the table in `docs/faults.md`
//! - `faults`: workers that die, fail, refuse and come back
//! - `chaos`: seeded cases of fail points at every arrow of the protocol, in virtual time
//! - `fleets`: real processes that are killed and stopped, and very many requests to them
//! - `references`: checkpoints agree with their references through the API
//! - `bad_inputs`: what nobody should send, row by row of `bad_inputs.toml`
//! - `broken`: checkpoints that cannot be served are refused by naming the fact
//! - `demo`: what the demo model answers, and its data's splits
//! - `scores`: log probabilities of the prompt, by `echo` with `logprobs`
//! - `operating`: admin endpoints, metrics, roles, cordon and drain
//! - `processes`: real processes, started by the real `tandem up`
//! - `etcd`: the same over a real etcd server
//! - `tracing`: one trace through every process
//! - `openai` and `nodejs`: OpenAI's packages for Python and Node, unmodified
//! - `sdk`: the two do the same
//! - `schemathesis`: OpenAI's published document, case by case

mod bad_inputs;
mod bench;
mod broken;
mod chaos;
mod demo;
mod equality;
mod etcd;
mod failures;
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
mod scores;
mod sdk;
mod support;
mod tracing;
mod walking;
