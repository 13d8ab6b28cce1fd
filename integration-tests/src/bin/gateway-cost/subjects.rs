//! What is measured: our router, nginx, peers that already run, and no gateway at all.

use std::fs;
use std::net::SocketAddr;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use serde_json::Value;
use tandem_chassis::group::{Group, listener};
use tandem_chassis::seam;
use tandem_integration_tests::{Client, ProcessCluster};

use crate::Options;

/// Nothing takes longer than this to answer its first request.
const START_MAX: Duration = Duration::from_secs(60);

/// A gateway under test.
pub struct Subject {
    /// What to call it.
    pub name: String,
    /// Its address with workers that answer at once.
    pub url: String,
    /// With paced workers; the same for peers, whose workers are not ours.
    pub paced: String,
    /// Its processes; none for no gateway, and for those that run elsewhere.
    pub group: Option<Group>,
    /// The same for the one with paced workers.
    pub paced_group: Option<Group>,
    /// Bytes of a body per token of its prompt.
    pub bytes_per_token: f64,
    /// How it is started, where that is in our hands.
    pub start: Option<Start>,
}

/// A way to start a gateway.
#[derive(Clone, Debug)]
pub struct Start {
    program: PathBuf,
    arguments: Vec<String>,
}

/// Everything that was started here; it all ends when this is dropped.
pub struct Fleet {
    /// In the order in which they are shown; the first is no gateway at all.
    pub subjects: Vec<Subject>,
    started: Vec<Started>,
    clusters: Vec<ProcessCluster>,
    folder: PathBuf,
}

/// A child, killed with its group when dropped.
pub struct Started(Child);

impl Drop for Started {
    fn drop(&mut self) {
        // SAFETY: a plain system call on the group that this child leads; it has not been waited for.
        unsafe { libc::kill(-(self.0.id() as i32), libc::SIGKILL) };
        let _ = self.0.wait();
    }
}

impl Start {
    /// Starts it at the head of a group of its own.
    pub fn start(&self) -> Result<Started, String> {
        let mut command = Command::new(&self.program);
        command.args(&self.arguments).stdin(Stdio::null()).stdout(Stdio::null()).process_group(0);
        command.spawn().map(Started).map_err(|error| format!("{}: {error}", self.program.display()))
    }
}

impl Started {
    /// Its processes.
    pub fn group(&self) -> Group {
        Group::of(self.0.id().into())
    }
}

impl Fleet {
    /// Starts everything, or says in a line what is left out and why.
    pub async fn start(options: &Options, checkpoint: &Path) -> Result<Fleet, String> {
        let folder = std::env::temp_dir().join(format!("tandem-gateway-{:x}", seam::random_u64()));
        fs::create_dir_all(&folder).map_err(|error| format!("{}: {error}", folder.display()))?;
        let mut fleet = Fleet { subjects: Vec::new(), started: Vec::new(), clusters: Vec::new(), folder };
        let ports = [free_port().await?, free_port().await?];
        for (port, pace) in ports.iter().zip(["zero", "paced"]) {
            let program = std::env::current_exe().map_err(|error| error.to_string())?;
            let start = Start { program, arguments: vec!["respond".into(), port.to_string(), pace.into()] };
            fleet.started.push(start.start()?);
        }
        let urls = ports.map(|port| format!("http://127.0.0.1:{port}"));
        fleet.add("no gateway", urls, [None, None], None).await?;
        fleet.start_nginx(ports).await?;
        fleet.start_tandem("tandem PD", &["--prefill", "1", "--decode", "1"], checkpoint).await?;
        fleet.start_tandem("tandem plain", &["--mixed", "2"], checkpoint).await?;
        for (name, url) in &options.peers {
            let group = peer_group(url);
            if group.is_none() {
                eprintln!(
                    "{name}: nobody listens on {url} here, so its processor time and memory stay unknown"
                );
            }
            fleet.add(name, [url.clone(), url.clone()], [group, group], None).await?;
        }
        Ok(fleet)
    }

    /// Ends everything in order, so that nothing complains of the end of something else.
    pub async fn close(mut self) {
        self.started.clear();
        for cluster in self.clusters.drain(..) {
            cluster.interrupt().await;
        }
    }

    /// Something that ends with the rest.
    pub fn keep(&mut self, started: Started) {
        self.started.push(started);
    }

    async fn start_nginx(&mut self, upstream: [u16; 2]) -> Result<(), String> {
        let Some(program) = find("nginx") else {
            eprintln!("nginx is not installed, so it is left out (Debian's package is `nginx-light`)");
            return Ok(());
        };
        let (mut urls, mut groups, mut first) = (Vec::new(), Vec::new(), None);
        for (at, upstream) in upstream.into_iter().enumerate() {
            let port = free_port().await?;
            let file = self.folder.join(format!("nginx-{at}.conf"));
            fs::write(&file, nginx_config(&self.folder, at, port, upstream))
                .map_err(|error| error.to_string())?;
            let file = file.to_string_lossy().into_owned();
            let error_log = self.folder.join("nginx-errors").to_string_lossy().into_owned();
            let start = Start {
                program: program.clone(),
                arguments: vec!["-e".into(), error_log, "-c".into(), file],
            };
            let started = start.start()?;
            groups.push(Some(started.group()));
            urls.push(format!("http://127.0.0.1:{port}"));
            self.started.push(started);
            first.get_or_insert(start);
        }
        let urls: [String; 2] = urls.try_into().expect("two");
        self.add("nginx", urls, groups.try_into().expect("two"), first).await
    }

    async fn start_tandem(&mut self, name: &str, workers: &[&str], checkpoint: &Path) -> Result<(), String> {
        let model = checkpoint.to_string_lossy().into_owned();
        let (mut urls, mut groups, mut first) = (Vec::new(), Vec::new(), None);
        for fake in ["--fake=zero", "--fake=paced:20ms,10ms"] {
            let (port, admin) = (free_port().await?.to_string(), free_port().await?.to_string());
            // A router that is started again needs the ports it had.
            let fixed = ["--processes", fake, "--model", &model, "--port", &port, "--admin-port", &admin];
            let cluster = ProcessCluster::start(&[&fixed[..], workers].concat()).await;
            let state = cluster.admin.get("/admin/state").await.json;
            let pid = state["pid"].as_i64().ok_or("the router has no pid")?;
            groups.push(Some(Group::of(pid)));
            urls.push(format!("http://{}", cluster.address));
            first.get_or_insert(start_of(&state)?);
            self.clusters.push(cluster);
        }
        let urls: [String; 2] = urls.try_into().expect("two");
        self.add(name, urls, groups.try_into().expect("two"), first).await
    }

    async fn add(
        &mut self,
        name: &str,
        [url, paced]: [String; 2],
        [group, paced_group]: [Option<Group>; 2],
        start: Option<Start>,
    ) -> Result<(), String> {
        for url in [&url, &paced] {
            let first = seam::timeout(START_MAX, first_answer(url)).await;
            first.map_err(|_| format!("{name}: no answer of {url} in {} s", START_MAX.as_secs()))?;
        }
        let name = name.to_owned();
        self.subjects.push(Subject { name, url, paced, group, paced_group, bytes_per_token: 5.5, start });
        Ok(())
    }
}

impl Drop for Fleet {
    fn drop(&mut self) {
        self.started.clear();
        let _ = fs::remove_dir_all(&self.folder);
    }
}

/// Until a server has answered a request with 200.
pub async fn first_answer(url: &str) {
    let Ok(address) = address(url) else { return };
    let client = Client::new(address);
    loop {
        if let Some(model) = model(&client).await {
            let body = serde_json::json!({ "model": model, "prompt": "time", "max_tokens": 1 });
            if client.try_post("/v1/completions", &body).await.is_ok_and(|answer| answer.status == 200) {
                return;
            }
        }
        seam::sleep(Duration::from_millis(2)).await;
    }
}

/// The first model of a server, if it answers.
pub async fn model(client: &Client) -> Option<String> {
    let answer = client.try_get("/v1/models").await.ok()?;
    answer.json["data"][0]["id"].as_str().map(str::to_owned)
}

/// The socket address in `http://host:port`.
pub fn address(url: &str) -> Result<SocketAddr, String> {
    let host =
        url.strip_prefix("http://").unwrap_or(url).trim_end_matches('/').replace("localhost", "127.0.0.1");
    host.parse().map_err(|_| format!("{url:?} must be like http://127.0.0.1:8000"))
}

fn start_of(state: &Value) -> Result<Start, String> {
    let command: Vec<String> = serde_json::from_value(state["command"].clone()).unwrap_or_default();
    let (program, arguments) = command.split_first().ok_or("the router does not say how it was started")?;
    Ok(Start { program: program.into(), arguments: arguments.to_vec() })
}

fn peer_group(url: &str) -> Option<Group> {
    let address = address(url).ok().filter(|address| address.ip().is_loopback())?;
    listener(address.port()).map(Group::of)
}

async fn free_port() -> Result<u16, String> {
    let listener = seam::listen_tcp("127.0.0.1:0").await.map_err(|error| error.to_string())?;
    listener.local_addr().map(|address| address.port()).map_err(|error| error.to_string())
}

/// Looks on the path and where distributions put servers.
fn find(program: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let folders = std::env::split_paths(&path).chain(["/usr/sbin", "/usr/local/sbin"].map(PathBuf::from));
    folders.map(|folder| folder.join(program)).find(|file| file.is_file())
}

/// A proxy that passes streams on as they come and keeps its connections.
fn nginx_config(folder: &Path, at: usize, port: u16, upstream: u16) -> String {
    let folder = folder.display();
    format!(
        "daemon off; worker_processes 2; pid {folder}/nginx-{at}.pid; worker_rlimit_nofile 65536;
events {{ worker_connections 24000; }}
http {{
  access_log off; keepalive_requests 1000000; keepalive_timeout 600s;
  client_body_temp_path {folder}/body-{at}; proxy_temp_path {folder}/proxy-{at};
  fastcgi_temp_path {folder}/fastcgi-{at}; uwsgi_temp_path {folder}/uwsgi-{at}; scgi_temp_path {folder}/scgi-{at};
  client_max_body_size 64m; client_body_buffer_size 1m;
  upstream workers {{ server 127.0.0.1:{upstream}; keepalive 512; keepalive_requests 1000000; }}
  server {{
    listen 127.0.0.1:{port} backlog=4096;
    location / {{
      proxy_pass http://workers; proxy_http_version 1.1; proxy_set_header Connection \"\"; proxy_buffering off;
      proxy_read_timeout 600s;
    }}
  }}
}}
"
    )
}
