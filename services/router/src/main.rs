//! A router as a process of its own. All it does is in the library.

use std::process::ExitCode;

/// A router makes and frees small things for every token.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    tandem_router::process_main(std::env::args_os().collect())
}
