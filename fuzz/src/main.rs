//! One fuzzer for all targets: `TANDEM_FUZZ` names the one, `TANDEM_FUZZ_MODEL` the folder of a checkpoint.
//!
//! `cargo xtask fuzz` builds and runs it; what a target promises stands with the code that keeps it.

#![no_main]

use std::env;
use std::path::PathBuf;
use std::sync::LazyLock;

use libfuzzer_sys::fuzz_target;
use tandem_router::fuzz::{Harness, TARGETS};

static TARGET: LazyLock<(Harness, fn(&Harness, &[u8]))> = LazyLock::new(|| {
    let name = env::var("TANDEM_FUZZ").expect("TANDEM_FUZZ names a target");
    let model = PathBuf::from(env::var_os("TANDEM_FUZZ_MODEL").expect("TANDEM_FUZZ_MODEL names a folder"));
    let (_, target) = TARGETS.iter().find(|(known, _)| *known == name).expect("TANDEM_FUZZ names a target");
    (Harness::open(&model).expect("it is a checkpoint"), *target)
});

fuzz_target!(|data: &[u8]| {
    let (harness, target) = &*TARGET;
    target(harness, data);
});
