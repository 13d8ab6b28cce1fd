//! A router as a process of its own. All it does is in the library.

use std::process::ExitCode;

tandem_chassis::allocator!();

fn main() -> ExitCode {
    tandem_router::process_main(std::env::args_os().collect())
}
