//! The `tandem` command: a whole cluster on this machine, and a window into any other.

mod bench;
mod chat;
mod http;
mod loading;
mod model;
mod plot;
mod progress;
mod sim;
mod status;
mod up;
mod up_processes;

use std::ffi::OsString;
use std::process::ExitCode;

tandem_chassis::allocator!();

const HELP: &str = "\
Tandem serves large language models: prefill and decode on separate workers, one endpoint.

Usage: tandem COMMAND [OPTIONS]

Commands:
  up       Start a whole cluster on this machine and print its endpoint
  status   Show the processes of a running cluster
  chat     Talk to a running cluster in the terminal
  bench    Put a load on a running cluster and measure it
  sim      Simulate a cluster under a trace, against every baseline
  router   Run a router alone
  worker   Run a worker alone (--role prefill, decode or mixed)

`tandem COMMAND --help` tells more.
";

/// Commands of the design that this version does not have.
const LATER: &[&str] = &["top", "selftest"];

fn main() -> ExitCode {
    let command = std::env::args_os().nth(1).unwrap_or_default().to_string_lossy().into_owned();
    // What a command's own parser sees: its name as a user types it, then its options.
    let rest = |name: &str| -> Vec<OsString> {
        std::iter::once(format!("tandem {name}").into()).chain(std::env::args_os().skip(2)).collect()
    };
    match command.as_str() {
        "up" => up::main(rest("up")),
        "status" => status::main(rest("status")),
        "chat" => chat::main(rest("chat")),
        "sim" => sim::main(rest("sim")),
        "bench" => bench::main(rest("bench")),
        "router" => tandem_router::process_main(rest("router")),
        "worker" => tandem_worker::process_main(rest("worker"), None),
        "help" | "--help" | "-h" => {
            print!("{HELP}");
            ExitCode::SUCCESS
        }
        "version" | "--version" | "-V" => {
            println!("tandem {}", env!("CARGO_PKG_VERSION"));
            ExitCode::SUCCESS
        }
        "" => {
            eprint!("{HELP}");
            ExitCode::from(2)
        }
        later if LATER.contains(&later) => {
            eprintln!("error: `tandem {later}` is not in this version");
            ExitCode::from(2)
        }
        unknown => {
            let known = ["up", "status", "chat", "bench", "sim", "router", "worker", "help"];
            let right = tandem_chassis::config::nearest(unknown, known).unwrap_or("help");
            eprintln!("error: there is no command `{unknown}`: did you mean `tandem {right}`?");
            ExitCode::from(2)
        }
    }
}
