//! A router as a process of its own: configuration, telemetry, membership, signals, and the exit code.

use std::ffi::OsString;
use std::process::ExitCode;

use tandem_chassis::{Shutdown, config, drain, seam, telemetry};

use crate::RouterConfig;

/// Runs a router until a signal ends it. `arguments` begins with the program's name.
pub fn process_main(arguments: Vec<OsString>) -> ExitCode {
    tandem_chassis::forgo_huge_pages();
    let config: RouterConfig = config::load_checked(arguments, |config: &RouterConfig| {
        config.check()?;
        match (&config.etcd, &config.parent) {
            (None, None) => {
                Err("--etcd URL is needed to find workers (or start a whole cluster with `tandem up`)".into())
            }
            _ => Ok(()),
        }
    });
    let _telemetry = telemetry::init_with("tandem-router", &config.telemetry);
    let runtime = match tokio::runtime::Builder::new_multi_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            eprintln!("error: cannot start threads: {error}");
            return ExitCode::FAILURE;
        }
    };
    match runtime.block_on(run(config)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(why) => {
            eprintln!("error: {why}");
            ExitCode::FAILURE
        }
    }
}

async fn run(config: RouterConfig) -> Result<(), String> {
    let shutdown = Shutdown::new();
    // Owned by the runtime; it ends with the process.
    seam::spawn(drain::signal(shutdown.clone()));
    let spec = tandem_cluster::Spec { etcd: config.etcd.clone(), parent: config.parent.clone() };
    let membership = tandem_cluster::connect(&spec, &config.cluster).await.map_err(|e| e.to_string())?;
    let started = crate::start(config, membership, shutdown).await.map_err(|e| e.to_string())?;
    started.join().await;
    Ok(())
}
