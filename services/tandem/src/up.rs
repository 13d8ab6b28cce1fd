//! `tandem up`: a whole cluster on this machine, in one process or (`--processes`) in one per service.

use std::ffi::OsString;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use serde::Serialize;
use tandem_chassis::config::{ByteSize, HumanDuration, Slo};
use tandem_chassis::{Shutdown, seam, telemetry};
use tandem_cluster::{Embedded, Membership};
use tandem_router::{PlannerMode, RouterConfig};
use tandem_types::Role;
use tandem_worker::WorkerConfig;
use tandem_worker::engine::{Dtype, FakeSpec, Quantization};

use crate::loading::Loading;
use crate::{model, up_processes};

/// Start a whole cluster on this machine: by default the demo model, one router, one prefill and one decode
/// worker
#[derive(Clone, Debug, clap::Parser, Serialize)]
#[command(name = "tandem up")]
pub struct UpConfig {
    /// Checkpoint to serve: a Hugging Face directory, or demo
    #[arg(long, default_value = "demo")]
    pub model: String,
    /// Prefill workers [default: 1, or 0 if another kind is given]
    #[arg(long)]
    pub prefill: Option<u32>,
    /// Decode workers [default: 1, or 0 if another kind is given]
    #[arg(long)]
    pub decode: Option<u32>,
    /// Workers that do both [default: 0]
    #[arg(long)]
    pub mixed: Option<u32>,
    /// Encoder workers (not in this version)
    #[arg(long, default_value_t = 0)]
    pub encoder: u32,
    /// KV stores (not in this version)
    #[arg(long, default_value_t = 0)]
    pub kv_store: u32,
    /// Element type of weights, activations and KV: auto, bfloat16 or float32
    #[arg(long, default_value_t = Dtype::Auto)]
    pub dtype: Dtype,
    /// How weights of layers are held: auto (as the checkpoint has them), or made from numbers at load: w8a8 (8 bits,
    /// and rows in 8 bits) or int4 (4 bits in groups of 64)
    #[arg(long, default_value_t = Quantization::Auto)]
    pub quantization: Quantization,
    /// Threads per worker: N, or by role: prefill=N,decode=M [default: the cores divided among the workers]
    #[arg(long)]
    pub threads: Option<Threads>,
    /// KV pool of each worker
    #[arg(long, default_value = "512MiB")]
    pub kv_memory: ByteSize,
    /// Whether the numerics class of both ends of a hand-off must be equal: strict
    #[arg(long, default_value = "strict")]
    pub numerics: tandem_worker::Numerics,
    /// How a request's workers are chosen: cost, prefix, least-loaded or round-robin
    #[arg(long, default_value = "cost")]
    pub policy: String,
    /// Whether roles follow the load: off, advise (say what would change) or on
    #[arg(long, default_value_t)]
    pub planner: PlannerMode,
    /// Latency targets, such as ttft=1s,tpot=50ms: what can still meet them is computed first, what cannot is shed
    #[arg(long)]
    pub slo: Option<Slo>,
    /// Requests that may wait for a worker to begin them; more get 503
    #[arg(long, default_value_t = 256)]
    pub queue_max: usize,
    /// Time that a request may take in all
    #[arg(long, default_value = "600s")]
    pub request_deadline: HumanDuration,
    /// Address to listen on
    #[arg(long, default_value_t = IpAddr::V4(Ipv4Addr::LOCALHOST))]
    pub bind: IpAddr,
    /// Port of the API
    #[arg(long, default_value_t = 8000)]
    pub port: u16,
    /// Port of the router's admin endpoints
    #[arg(long, default_value_t = 8001)]
    pub admin_port: u16,
    /// How KV travels: auto, inproc, shm or tcp
    #[arg(long, default_value = "auto")]
    pub transport: String,
    /// One process per service
    #[arg(long)]
    pub processes: bool,
    /// Register with this etcd, such as http://127.0.0.1:2379, instead of embedded membership
    #[arg(long)]
    pub etcd: Option<String>,
    /// Cluster name
    #[arg(long, default_value = "default")]
    pub cluster: String,
    /// Compute with the fake engine: zero, paced:TTFT,ITL or qwen3-8b@h200, with options after commas
    #[arg(long, num_args = 0..=1, default_missing_value = "zero", require_equals = true)]
    pub fake: Option<FakeSpec>,
    /// Time to live of a lease that nobody renews
    #[arg(long, default_value = "10s")]
    pub lease_time_to_live: HumanDuration,
    /// Time that running requests get after Ctrl-C
    #[arg(long, default_value = "30s")]
    pub drain_timeout: HumanDuration,
    /// Logs and traces.
    #[command(flatten)]
    #[serde(flatten)]
    pub telemetry: telemetry::Options,
}

/// `--threads`: for all workers, or by role.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Threads {
    all: Option<usize>,
    by_role: Vec<(Role, usize)>,
}

impl std::str::FromStr for Threads {
    type Err = String;

    fn from_str(text: &str) -> Result<Threads, String> {
        let wrong = || format!("{text:?} is neither a number nor like prefill=1,decode=3");
        let count = |text: &str| text.parse().ok().filter(|&n: &usize| n > 0).ok_or_else(wrong);
        if !text.contains('=') {
            return Ok(Threads { all: Some(count(text)?), by_role: Vec::new() });
        }
        let parts = text.split(',').map(|part| {
            let (role, n) = part.split_once('=').ok_or_else(wrong)?;
            Ok((role.parse().map_err(|e: tandem_types::ParseError| e.to_string())?, count(n)?))
        });
        Ok(Threads { all: None, by_role: parts.collect::<Result<_, String>>()? })
    }
}

impl std::fmt::Display for Threads {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        if let Some(all) = self.all {
            return write!(f, "{all}");
        }
        let parts: Vec<String> = self.by_role.iter().map(|(role, n)| format!("{role}={n}")).collect();
        f.write_str(&parts.join(","))
    }
}

impl Serialize for Threads {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl UpConfig {
    fn check(&self) -> Result<(), String> {
        if self.workers().is_empty() {
            return Err("no worker is left: give --prefill, --decode or --mixed a number above 0".into());
        }
        if self.queue_max == 0 {
            return Err("--queue-max must be at least 1".into());
        }
        if self.encoder > 0 {
            return Err("--encoder: this version has no encoder workers".into());
        }
        if self.kv_store > 0 {
            return Err("--kv-store: this version has no KV store".into());
        }
        if self.transport == "inproc" && self.processes {
            return Err(
                "--transport inproc reaches no other process; use shm, tcp or auto with --processes".into()
            );
        }
        tandem_placement::named(&self.policy)?;
        model::find(&self.model).map(|_| ())
    }

    /// Name and role of every worker.
    pub fn workers(&self) -> Vec<(String, Role)> {
        let given = self.prefill.is_some() || self.decode.is_some() || self.mixed.is_some();
        let default = u32::from(!given);
        let counts = [
            (Role::Prefill, self.prefill.unwrap_or(default)),
            (Role::Decode, self.decode.unwrap_or(default)),
            (Role::Mixed, self.mixed.unwrap_or(0)),
        ];
        let named =
            counts.into_iter().flat_map(|(role, n)| (0..n).map(move |i| (format!("{role}-{i}"), role)));
        named.collect()
    }

    /// Workers on one host divide its cores unless told otherwise.
    fn threads(&self, role: Role) -> usize {
        let asked = self.threads.as_ref().and_then(|threads| {
            threads.all.or_else(|| threads.by_role.iter().find(|(of, _)| *of == role).map(|(_, n)| *n))
        });
        asked.unwrap_or_else(|| {
            let cores = std::thread::available_parallelism().map_or(1, |n| n.get());
            (cores / self.workers().len()).max(1)
        })
    }

    /// What the worker of this name is told.
    pub fn worker(&self, id: &str, role: Role, model: PathBuf) -> WorkerConfig {
        WorkerConfig {
            id: Some(id.to_owned()),
            role,
            cluster: self.cluster.clone(),
            bind: self.bind,
            port: 0,
            admin_port: 0,
            etcd: self.etcd.clone(),
            model: Some(model),
            model_name: self.model_name(),
            dtype: self.dtype,
            quantization: self.quantization,
            threads: Some(self.threads(role)),
            kv_memory: self.kv_memory,
            fake: self.fake.clone(),
            transport: self.transport.clone(),
            numerics: self.numerics,
            lease_time_to_live: self.lease_time_to_live,
            drain_timeout: self.drain_timeout,
            telemetry: self.telemetry.clone(),
            ..WorkerConfig::defaults()
        }
    }

    /// What the router is told.
    pub fn router(&self, model: PathBuf) -> RouterConfig {
        RouterConfig {
            id: Some("router-0".to_owned()),
            cluster: self.cluster.clone(),
            bind: self.bind,
            port: self.port,
            admin_port: self.admin_port,
            etcd: self.etcd.clone(),
            model: Some(model),
            model_name: self.model_name(),
            context_tokens: self.fake.as_ref().map(|_| tandem_worker::engine::FAKE_CONTEXT_TOKENS),
            policy: self.policy.clone(),
            planner: self.planner,
            slo: self.slo,
            queue_max: self.queue_max,
            request_deadline: self.request_deadline,
            drain_timeout: self.drain_timeout,
            telemetry: self.telemetry.clone(),
            ..RouterConfig::defaults()
        }
    }

    fn model_name(&self) -> Option<String> {
        (self.model == "demo").then(|| "demo".to_owned())
    }
}

pub fn main(arguments: Vec<OsString>) -> ExitCode {
    let mut config: UpConfig = tandem_chassis::config::load_checked(arguments, UpConfig::check);
    if config.telemetry.log.is_none() && std::env::var_os("RUST_LOG").is_none() {
        // The terminal is for what `up` itself says.
        config.telemetry.log = Some("warn".to_owned());
    }
    let _telemetry = telemetry::init_with("tandem", &config.telemetry);
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().expect("a runtime");
    match runtime.block_on(run(config)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(why) => {
            eprintln!("error: {why}");
            ExitCode::FAILURE
        }
    }
}

async fn run(config: UpConfig) -> Result<(), String> {
    let model = model::find(&config.model)?;
    let shutdown = Shutdown::new();
    // Owned by the runtime; it ends with the process.
    seam::spawn(tandem_chassis::drain::signal(shutdown.clone()));
    if config.processes {
        up_processes::run(config, model, shutdown).await
    } else {
        in_process(config, model, shutdown).await
    }
}

/// Everything in this process. On Ctrl-C the router finishes its requests first; workers go after it, for
/// until then a running request may still need another worker.
async fn in_process(config: UpConfig, model: PathBuf, shutdown: Shutdown) -> Result<(), String> {
    let membership: Arc<dyn Membership> = match &config.etcd {
        None => Arc::new(Embedded::new()),
        Some(_) => {
            let spec = tandem_cluster::Spec { etcd: config.etcd.clone(), parent: None };
            tandem_cluster::connect(&spec, &config.cluster).await.map_err(|e| e.to_string())?
        }
    };
    let workers_end = Shutdown::new();
    let loading = Loading::default();
    let starts = config.workers().into_iter().map(|(id, role)| {
        let progress = loading.part(&id);
        let worker = config.worker(&id, role, model.clone());
        let (membership, end) = (membership.clone(), workers_end.clone());
        async move {
            tandem_worker::start(worker, membership, end, progress).await.map_err(|e| format!("{id}: {e}"))
        }
    });
    let started = tokio::select! {
        started = futures_util::future::try_join_all(starts) => started,
        () = shutdown.draining() => return Ok(()),
    };
    loading.done();
    let workers = started?;
    let router = tandem_router::start(config.router(model), membership, shutdown.clone());
    let router = router.await.map_err(|e| format!("router-0: {e}"))?;
    wait_until_ready(router.admin, config.workers().len(), &shutdown).await?;
    greet(router.api, router.admin, &config);

    router.join().await;
    workers_end.drain();
    for worker in workers {
        worker.join().await;
    }
    eprintln!("All requests are done; the cluster is down.");
    Ok(())
}

/// Until the router sees every worker, or the user has had enough.
pub async fn wait_until_ready(admin: SocketAddr, workers: usize, shutdown: &Shutdown) -> Result<(), String> {
    let url = format!("http://{admin}/admin/cluster");
    let ready = async {
        loop {
            if let Ok(cluster) = crate::http::get_json(&url).await {
                let rows = cluster["workers"].as_array().map_or(&[][..], |rows| rows);
                if rows.iter().filter(|row| row["state"] == "ready").count() >= workers {
                    return;
                }
            }
            seam::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::select! {
        ready = seam::timeout(Duration::from_secs(30), ready) => {
            ready.map_err(|_| format!("the router does not see all {workers} workers after 30 s; {url} says more"))
        }
        () = shutdown.draining() => Ok(()),
    }
}

/// What a newcomer needs next.
pub fn greet(api: SocketAddr, admin: SocketAddr, config: &UpConfig) {
    let names: Vec<String> = config.workers().into_iter().map(|(id, _)| id).collect();
    let name = config.model_name().unwrap_or_else(|| {
        let dir = model::find(&config.model).unwrap_or_default();
        dir.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default()
    });
    println!(
        "Tandem serves {name} on http://{api}/v1 with {}. Admin port: http://{admin}\n\n\
         curl http://{api}/v1/chat/completions -H 'content-type: application/json' \\\n  \
         -d '{{\"model\": \"{name}\", \"messages\": [{{\"role\": \"user\", \"content\": \"Say hello\"}}]}}'\n\n\
         Talk to it with `tandem chat --url http://{api}`, look at it with `tandem status --admin http://{admin}`. \
         Ctrl-C drains and ends it.",
        names.join(", ")
    );
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(arguments: &str) -> UpConfig {
        clap::Parser::parse_from(std::iter::once("tandem up").chain(arguments.split_whitespace()))
    }

    #[test]
    fn without_arguments_there_is_one_worker_of_each_kind_and_any_given_kind_empties_the_others() {
        let names = |arguments| parsed(arguments).workers().into_iter().map(|(id, _)| id).collect::<Vec<_>>();
        assert_eq!(names(""), ["prefill-0", "decode-0"]);
        assert_eq!(names("--prefill 2 --decode 1"), ["prefill-0", "prefill-1", "decode-0"]);
        assert_eq!(names("--mixed 1"), ["mixed-0"]);
        assert!(names("--mixed 0").is_empty());
    }

    #[test]
    fn what_it_prints_it_reads() {
        tandem_chassis::config::assert_prints_what_it_reads::<UpConfig>(&[
            "--prefill=2",
            "--threads=prefill=1,decode=3",
            "--kv-memory=1GiB",
            "--fake=qwen3-8b@h200,slow=0.5",
            "--processes",
        ]);
    }

    #[test]
    fn the_router_and_the_workers_are_told_what_was_said() {
        let config = parsed("--queue-max 7 --request-deadline 90s --policy prefix --quantization int4");
        let router = config.router("/m".into());
        assert_eq!((router.queue_max, router.request_deadline.0.as_secs()), (7, 90));
        assert_eq!(router.policy, "prefix");
        let (id, role) = config.workers().remove(0);
        assert_eq!(config.worker(&id, role, "/m".into()).quantization.as_str(), "int4");
        assert!(parsed("--queue-max 0").check().expect_err("nobody could wait").contains("--queue-max"));
    }

    #[test]
    fn threads_are_one_number_or_one_per_role() {
        assert_eq!(parsed("--threads 3").threads(Role::Decode), 3);
        let by_role = parsed("--threads prefill=1,decode=5");
        assert_eq!((by_role.threads(Role::Prefill), by_role.threads(Role::Decode)), (1, 5));
        assert!("prefill:1".parse::<Threads>().is_err());
        assert!("0".parse::<Threads>().is_err());
        assert!("cook=1".parse::<Threads>().unwrap_err().contains("cook"));
    }

    #[test]
    fn what_this_version_lacks_is_refused_in_a_sentence() {
        for (arguments, part) in [
            ("--encoder 1", "no encoder"),
            ("--kv-store 1", "no KV store"),
            ("--policy chance", "least-loaded"),
            ("--mixed 0", "no worker is left"),
            ("--transport inproc --processes", "no other process"),
            ("--model /no/such/dir", "no such directory"),
        ] {
            let refusal = parsed(arguments).check().expect_err(arguments);
            assert!(refusal.contains(part), "{arguments}: {refusal}");
        }
    }
}
