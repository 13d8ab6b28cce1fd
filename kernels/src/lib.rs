//! Implements `device`: the CPU kernels, and a plain float32 twin that is their oracle.
//!
//! Never knows: models, sequences, the network. Only the engine names this crate.
//!
//! Always holds: an operation gives a row the same bits whatever other rows are in the call and however many threads
//! share the work; in float32 also whichever instruction set was chosen, while products of bf16 have a form on each.
//! Every sum has one order, and `exp` is computed here instead of by the system's library. (Sine, cosine and logarithm
//! are the system's, in float64, and rounded to float32 afterwards.)

mod cpu;
pub mod limits;
mod math;
mod memory;
mod philox;
mod plain;
mod scalar;

use std::sync::Arc;

use tandem_device::{Device, Error};

pub use cpu::{Cpu, Isa};
pub use math::exp;
pub use philox::philox4x32;
pub use plain::Plain;

/// A device that can be opened by name.
pub struct Backend {
    /// Its name.
    pub name: &'static str,
    /// Opens it with so many threads, the caller's included.
    pub open: fn(threads: usize) -> Result<Arc<dyn Device>, Error>,
}

/// All devices, best first.
pub static BACKENDS: &[Backend] = &[
    Backend { name: "cpu", open: |threads| Ok(Arc::new(Cpu::open(threads)?)) },
    Backend { name: "plain", open: |_| Ok(Arc::new(Plain)) },
];

/// Opens the device of that name.
pub fn open(name: &str, threads: usize) -> Result<Arc<dyn Device>, Error> {
    match BACKENDS.iter().find(|backend| backend.name == name) {
        Some(backend) => (backend.open)(threads),
        None => {
            let names: Vec<_> = BACKENDS.iter().map(|backend| backend.name).collect();
            Err(Error::Unsupported(format!("{name:?} is not a device; expected one of {}", names.join(", "))))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_unknown_device_is_refused_by_naming_the_known_ones() {
        let message = open("tpu", 1).err().expect("there is no such device").to_string();
        assert_eq!(message, "\"tpu\" is not a device; expected one of cpu, plain");
    }
}
