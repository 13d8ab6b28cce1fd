//! A worker as a process of its own: configuration, telemetry, membership, signals, and the exit code.

use std::ffi::OsString;
use std::process::ExitCode;
use std::sync::Arc;

use tandem_chassis::{Shutdown, config, drain, seam, telemetry};
use tandem_types::Role;

use crate::WorkerConfig;

/// Runs a worker until a signal ends it. `arguments` begins with the program's name; `role` is the role at
/// first, for programs that stand for one.
pub fn process_main(mut arguments: Vec<OsString>, role: Option<Role>) -> ExitCode {
    if let Some(role) = role {
        arguments.splice(1..1, ["--role".into(), OsString::from(role.as_str())]);
    }
    let config: WorkerConfig = config::load_checked(arguments, |config: &WorkerConfig| {
        config.check()?;
        match (&config.etcd, &config.parent) {
            (None, None) => {
                Err("--etcd URL is needed to join a cluster (or start a whole one with `tandem up`)".into())
            }
            _ => Ok(()),
        }
    });
    let _telemetry = telemetry::init_with("tandem-worker", &config.telemetry);
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

async fn run(config: WorkerConfig) -> Result<(), String> {
    let shutdown = Shutdown::new();
    // Owned by the runtime; it ends with the process.
    seam::spawn(drain::signal(shutdown.clone()));
    let spec = tandem_cluster::Spec { etcd: config.etcd.clone(), parent: config.parent.clone() };
    let membership = tandem_cluster::connect(&spec, &config.cluster).await.map_err(|e| e.to_string())?;
    let id = config.id.clone().unwrap_or_default();
    let started = tokio::select! {
        started = crate::start(config, membership, shutdown.clone(), Arc::new(|_| {})) => started,
        () = shutdown.draining() => return Ok(()),
    };
    started.map_err(|error| format!("{id}: {error}"))?.join().await;
    Ok(())
}
