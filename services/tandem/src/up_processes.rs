//! `tandem up --processes`: every service as a process of its own, under this one.
//!
//! Children lead process groups of their own, so a Ctrl-C in the terminal reaches only `up`, which ends them in
//! order; if `up` dies, the system ends them. A child that dies is reported and not started again.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::Stdio;
use std::sync::Arc;
use std::time::Duration;

use serde::Serialize;
use serde_json::Value;
use tandem_chassis::{Shutdown, seam};
use tandem_cluster::{Embedded, Membership};
use tokio::process::{Child, Command};
use tokio::sync::mpsc;

use crate::up::{UpConfig, greet, wait_until_ready};

/// Time that children get to leave after the drain time-out, before they are killed.
const LEAVE_MAX: Duration = Duration::from_secs(5);

/// A child and what to call it.
struct Service {
    id: String,
    pid: i32,
    ended: tokio::task::JoinHandle<()>,
}

pub async fn run(config: UpConfig, model: PathBuf, shutdown: Shutdown) -> Result<(), String> {
    let (parent, membership) = membership(&config).await?;
    let (deaths, mut dead) = mpsc::channel(64);
    let mut services = Vec::new();
    for (id, role) in config.workers() {
        let mut worker = config.worker(&id, role, model.clone());
        worker.parent = parent.clone();
        services.push(spawn("worker", &id, &worker, &deaths)?);
    }
    let mut router = config.router(model);
    router.parent = parent;
    services.push(spawn("router", "router-0", &router, &deaths)?);

    let ended = serve(&config, membership, &services, &mut dead, &shutdown).await;
    stop(services, &config, &mut dead).await;
    ended
}

/// Where children register: etcd, or this process.
async fn membership(config: &UpConfig) -> Result<(Option<String>, Arc<dyn Membership>), String> {
    if config.etcd.is_some() {
        let spec = tandem_cluster::Spec { etcd: config.etcd.clone(), parent: None };
        let membership = tandem_cluster::connect(&spec, &config.cluster).await.map_err(|e| e.to_string())?;
        return Ok((None, membership));
    }
    let embedded = Embedded::new();
    let listener =
        seam::listen("127.0.0.1:0").await.map_err(|e| format!("cannot listen for children: {e}"))?;
    let address = listener.local_addr().map_err(|e| e.to_string())?;
    let incoming = tandem_chassis::grpc::incoming(listener);
    let server = tonic::transport::Server::builder()
        .add_service(tandem_cluster::serve(embedded.clone()))
        .serve_with_incoming(incoming);
    // Serves until this process ends: children leave through it.
    seam::spawn(async move {
        if let Err(error) = server.await {
            tracing::error!(%error, "membership is no longer served");
        }
    });
    Ok((Some(format!("http://{address}")), Arc::new(embedded)))
}

/// Starts a child with the options that its configuration amounts to.
fn spawn(
    command: &str,
    id: &str,
    config: &impl Serialize,
    deaths: &mpsc::Sender<String>,
) -> Result<Service, String> {
    let program = std::env::current_exe().map_err(|e| format!("cannot find this program: {e}"))?;
    let mut child = Command::new(&program);
    child
        .arg(command)
        .args(options(config))
        .stdin(Stdio::null())
        .stdout(Stdio::inherit())
        .stderr(Stdio::inherit());
    child.process_group(0);
    // SAFETY: between fork and exec only prctl is called, which is async-signal-safe and touches no memory of
    // ours.
    unsafe {
        child.pre_exec(|| {
            // Ends with `up`, however that ends.
            libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGTERM);
            Ok(())
        });
    }
    let child = child.spawn().map_err(|e| format!("{id} cannot be started: {e}"))?;
    let pid = child.id().ok_or_else(|| format!("{id} ended at once"))? as i32;
    let ended = seam::spawn(report(id.to_owned(), child, deaths.clone()));
    Ok(Service { id: id.to_owned(), pid, ended })
}

/// Every set option as a flag.
fn options(config: &impl Serialize) -> Vec<String> {
    let Ok(Value::Object(fields)) = serde_json::to_value(config) else {
        unreachable!("a configuration is an object");
    };
    let flags = fields.into_iter().filter_map(|(key, value)| {
        let text = match value {
            Value::Null => return None,
            Value::String(text) => text,
            other => other.to_string(),
        };
        Some(format!("--{}={text}", key.replace('_', "-")))
    });
    flags.collect()
}

async fn report(id: String, mut child: Child, deaths: mpsc::Sender<String>) {
    let how = match child.wait().await {
        Ok(status) => status.to_string(),
        Err(error) => error.to_string(),
    };
    let _ = deaths.send(format!("{id} has ended: {how}")).await;
}

/// Until Ctrl-C: waits for readiness, greets, then reports deaths.
async fn serve(
    config: &UpConfig,
    membership: Arc<dyn Membership>,
    services: &[Service],
    dead: &mut mpsc::Receiver<String>,
    shutdown: &Shutdown,
) -> Result<(), String> {
    let ready = async {
        let (api, admin) = router_addresses(&*membership).await?;
        wait_until_ready(admin, services.len() - 1, shutdown).await?;
        Ok::<_, String>((api, admin))
    };
    tokio::select! {
        ready = ready => {
            let (api, admin) = ready?;
            if !shutdown.is_draining() {
                greet(api, admin, config);
            }
        }
        Some(death) = dead.recv() => return Err(format!("{death}; see above")),
        () = shutdown.draining() => return Ok(()),
    }
    loop {
        tokio::select! {
            Some(death) = dead.recv() => eprintln!("{death}; the cluster goes on without it"),
            () = shutdown.draining() => return Ok(()),
        }
    }
}

async fn router_addresses(membership: &dyn Membership) -> Result<(SocketAddr, SocketAddr), String> {
    let mut views = membership.watch();
    loop {
        if let Some(router) = views.borrow_and_update().routers.get("router-0") {
            let parse = |text: &str| text.parse().map_err(|_| format!("{text:?} is not an address"));
            return Ok((parse(&router.address)?, parse(&router.admin)?));
        }
        views.changed().await.map_err(|_| "membership ended".to_owned())?;
    }
}

/// The router first: its requests may need the workers to the end.
async fn stop(mut services: Vec<Service>, config: &UpConfig, dead: &mut mpsc::Receiver<String>) {
    let limit = config.drain_timeout.0 + LEAVE_MAX;
    let router = services.pop();
    for group in [router.into_iter().collect::<Vec<_>>(), services] {
        for service in &group {
            signal(service, libc::SIGTERM);
        }
        for mut service in group {
            // Keeps room for the reports of those that end now.
            let ended = async {
                loop {
                    tokio::select! {
                        _ = &mut service.ended => return,
                        Some(_) = dead.recv() => {}
                    }
                }
            };
            if seam::timeout(limit, ended).await.is_err() {
                eprintln!("{} does not leave; it is killed", service.id);
                signal(&service, libc::SIGKILL);
            }
        }
    }
    eprintln!("All requests are done; the cluster is down.");
}

fn signal(service: &Service, signal: i32) {
    if service.ended.is_finished() {
        return;
    }
    // SAFETY: a plain system call. The child has not been waited for, so its id is still its own.
    unsafe { libc::kill(service.pid, signal) };
}
