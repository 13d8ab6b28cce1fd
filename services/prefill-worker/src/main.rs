//! A worker whose first role is prefill. All it does is in `tandem_worker`.

use std::process::ExitCode;

use tandem_types::Role;

fn main() -> ExitCode {
    tandem_worker::process_main(std::env::args_os().collect(), Some(Role::Prefill))
}
