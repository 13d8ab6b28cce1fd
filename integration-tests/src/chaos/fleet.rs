//! A cluster of real processes under this one's control: each can be killed, stopped and started again alone.
//!
//! Membership is embedded here and served to the processes, as `tandem up --processes` does. Nothing outlives
//! this process.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::fs::{self, File};
use std::net::SocketAddr;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Mutex, MutexGuard};
use std::time::Duration;

use serde_json::Value;
use tandem_chassis::seam;
use tandem_cluster::{Embedded, Membership, Registration};

use super::ask::Line;
use crate::processes::tandem;

/// The router's name.
pub const ROUTER: &str = "router-0";
/// Time in which everything must be given back, and everybody be ready again.
pub const RECOVERY_MAX: Duration = Duration::from_secs(15);
/// Tasks that a connection to a service may cost an end of it: who drives it, who waits for its end, and what
/// queues in front of it.
const TASKS_PER_CALLER: usize = 4;
/// Tasks that a connection to a worker's memory may cost an end of it.
const TASKS_PER_LANE: usize = 1;
/// Connections one process may keep: a few lanes and a channel per pair.
const CONNECTIONS_MAX: usize = 64;

/// What a process has open.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Open {
    /// Open files but for connections between living processes of this cluster.
    files: usize,
    /// Of these connections, those to services, whose ports are registered.
    callers: usize,
    /// And the others: they bring pages.
    lanes: usize,
    tasks: usize,
}

struct Member {
    arguments: Vec<String>,
    process: Child,
}

/// A running cluster; killed when dropped.
pub struct Fleet {
    membership: Embedded,
    parent: SocketAddr,
    members: BTreeMap<String, Member>,
    /// What each had open when it was at rest.
    at_rest: BTreeMap<String, Open>,
    /// To admin ports, kept: a connection that has just been closed would count as left behind.
    lines: Mutex<HashMap<String, Line>>,
    logs: PathBuf,
}

impl Fleet {
    /// Starts one process per entry, each a name and the arguments of `tandem`, and waits until the router sees
    /// every worker.
    ///
    /// # Errors
    /// What is missing after a while.
    pub async fn start(name: &str, members: Vec<(String, Vec<String>)>) -> Result<Fleet, String> {
        let membership = Embedded::new();
        let listener = seam::listen("127.0.0.1:0").await.map_err(|error| error.to_string())?;
        let parent = listener.local_addr().map_err(|error| error.to_string())?;
        let incoming = tandem_chassis::grpc::incoming(listener);
        let server = tonic::transport::Server::builder()
            .add_service(tandem_cluster::serve(membership.clone()))
            .serve_with_incoming(incoming);
        // Serves until this process ends.
        seam::spawn(async move { server.await.unwrap_or_default() });
        let logs = std::env::temp_dir().join(format!("tandem-chaos-{}-{name}", std::process::id()));
        fs::create_dir_all(&logs).map_err(|error| format!("{}: {error}", logs.display()))?;
        let mut fleet = Fleet {
            membership,
            parent,
            members: BTreeMap::new(),
            at_rest: BTreeMap::new(),
            lines: Mutex::default(),
            logs,
        };
        for (id, mut arguments) in members {
            arguments.extend([
                format!("--id={id}"),
                format!("--parent=http://{}", fleet.parent),
                "--port=0".into(),
                "--admin-port=0".into(),
                "--log=warn".into(),
            ]);
            let process = spawn(&fleet.log_of(&id), &arguments)?;
            fleet.members.insert(id, Member { arguments, process });
        }
        fleet.wait_until_whole().await?;
        Ok(fleet)
    }

    /// Everybody's name.
    pub fn ids(&self) -> Vec<String> {
        self.members.keys().cloned().collect()
    }

    fn log_of(&self, id: &str) -> PathBuf {
        self.logs.join(format!("{id}.log"))
    }

    fn member(&self, id: &str) -> &Member {
        self.members.get(id).unwrap_or_else(|| panic!("there is no {id}"))
    }

    // ------------------------------------------------------------------ faults

    /// `kill -9`.
    pub fn kill(&mut self, id: &str) {
        let member = self.members.get_mut(id).unwrap_or_else(|| panic!("there is no {id}"));
        let _ = member.process.kill();
        let _ = member.process.wait();
        self.lines().remove(id);
    }

    /// Starts a killed one again, under its name.
    pub fn start_again(&mut self, id: &str) -> Result<(), String> {
        let process = spawn(&self.log_of(id), &self.member(id).arguments)?;
        self.members.get_mut(id).expect("looked at above").process = process;
        Ok(())
    }

    /// `SIGSTOP`.
    pub fn stop(&self, id: &str) {
        signal(&self.member(id).process, libc::SIGSTOP);
    }

    /// `SIGCONT`.
    pub fn go_on(&self, id: &str) {
        signal(&self.member(id).process, libc::SIGCONT);
    }

    // ------------------------------------------------------------------ looking

    /// What membership knows of this start of a member.
    fn registration(&self, id: &str) -> Option<Registration> {
        let view = self.membership.watch().borrow().clone();
        let known = if id == ROUTER { view.routers.get(id) } else { view.workers.get(id) };
        known.filter(|known| known.pid == self.member(id).process.id()).cloned()
    }

    /// Where the API listens.
    pub fn api(&self) -> Result<SocketAddr, String> {
        address(ROUTER, self.registration(ROUTER).map(|known| known.address))
    }

    /// GET from a member's admin port, as JSON.
    pub async fn get(&self, id: &str, path: &str) -> Result<Value, String> {
        let admin = address(id, self.registration(id).map(|known| known.admin))?;
        let answer = async {
            let kept = self.lines().remove(id);
            // A kept one may have been closed meanwhile; a fresh one decides.
            if let Some(mut line) = kept
                && let Ok(answer) = line.get(path).await
            {
                self.lines().insert(id.to_owned(), line);
                return Ok(answer);
            }
            let mut line = Line::open(admin).await?;
            let answer = line.get(path).await?;
            self.lines().insert(id.to_owned(), line);
            Ok::<_, String>(answer)
        };
        let answer = seam::timeout(Duration::from_secs(5), answer).await;
        answer.map_err(|_| format!("{id} does not answer"))?.map_err(|error| format!("{id}: {error}"))
    }

    fn lines(&self) -> MutexGuard<'_, HashMap<String, Line>> {
        self.lines.lock().expect("nothing panics under this lock")
    }

    /// A member's `/admin/state`.
    pub async fn state(&self, id: &str) -> Result<Value, String> {
        self.get(id, "/admin/state").await
    }

    /// Bytes of physical memory that a member uses.
    pub fn resident(&self, id: &str) -> u64 {
        let pid = self.member(id).process.id();
        let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap_or_default();
        line.split_whitespace().next().and_then(|n| n.parse::<u64>().ok()).unwrap_or(0) * 1024
    }

    /// Waits until the router sees this start of every worker ready.
    ///
    /// # Errors
    /// Who is missing after [`RECOVERY_MAX`].
    pub async fn wait_until_whole(&self) -> Result<Duration, String> {
        let began = seam::now();
        loop {
            let missing = self.missing().await;
            let took = seam::now().since(began);
            if missing.is_empty() {
                return Ok(took);
            }
            if took > RECOVERY_MAX {
                return Err(format!("not ready after {took:.1?}: {}", missing.join("; ")));
            }
            seam::sleep(Duration::from_millis(10)).await;
        }
    }

    async fn missing(&self) -> Vec<String> {
        let cluster = match self.get(ROUTER, "/admin/cluster").await {
            Ok(cluster) => cluster,
            Err(error) => return vec![error],
        };
        let rows = cluster["workers"].as_array().cloned().unwrap_or_default();
        let sees = |id: &str| {
            let pid = self.member(id).process.id();
            rows.iter().any(|row| row["id"] == id && row["pid"] == pid && row["state"] == "ready")
        };
        let workers = self.members.keys().filter(|id| *id != ROUTER);
        workers.filter(|id| !sees(id)).map(|id| format!("{ROUTER} does not see {id} ready")).collect()
    }

    // ------------------------------------------------------------------ what is left behind

    /// Remembers what everybody has open at rest: what later cases are measured by.
    ///
    /// # Errors
    /// What is still held.
    pub async fn note_rest(&mut self) -> Result<(), String> {
        self.at_rest.clear();
        self.wait_until_at_rest(&self.ids()).await?;
        let mut last = BTreeMap::new();
        // Twice the same: nothing is on its way out any more.
        for _ in 0..100 {
            seam::sleep(Duration::from_millis(100)).await;
            let mut now = BTreeMap::new();
            for id in self.ids() {
                now.insert(id.clone(), self.open(&id, &self.state(&id).await?));
            }
            if now == last {
                self.at_rest = now;
                return Ok(());
            }
            last = now;
        }
        Err(format!("it does not come to rest: {last:?}"))
    }

    /// Waits until none of these holds a block, a lease, a leg, a task or a file beyond what it had at rest.
    ///
    /// # Errors
    /// What is still held after [`RECOVERY_MAX`].
    pub async fn wait_until_at_rest(&self, ids: &[String]) -> Result<Duration, String> {
        let began = seam::now();
        loop {
            let mut held = Vec::new();
            for id in ids {
                match self.state(id).await {
                    Ok(state) => held.extend(self.held(id, &state).map(|what| format!("{id}: {what}"))),
                    Err(error) => held.push(error),
                }
            }
            let took = seam::now().since(began);
            if held.is_empty() {
                return Ok(took);
            }
            if took > RECOVERY_MAX {
                return Err(format!("still held after {took:.1?}: {}", held.join("; ")));
            }
            seam::sleep(Duration::from_millis(20)).await;
        }
    }

    fn held(&self, id: &str, state: &Value) -> Option<String> {
        let counts = [
            ("blocks", &state["blocks"]["in_use"]),
            ("leases", &state["leases"]),
            ("claims", &state["claims"]),
            ("legs", &state["legs"]),
            ("running", &state["running"]),
            ("waiting", &state["waiting"]),
        ];
        let mut held: Vec<String> = counts
            .into_iter()
            .filter_map(|(what, count)| count.as_u64().filter(|n| *n > 0).map(|n| format!("{n} {what}")))
            .collect();
        if let Some(rest) = self.at_rest.get(id) {
            let open = self.open(id, state);
            // Which pairs of workers have met varies, so a process may have more connections than it had.
            let tasks_max = rest.tasks
                + open.callers.saturating_sub(rest.callers) * TASKS_PER_CALLER
                + open.lanes.saturating_sub(rest.lanes) * TASKS_PER_LANE;
            if open.files > rest.files
                || open.tasks > tasks_max
                || open.callers + open.lanes > CONNECTIONS_MAX
            {
                held.push(format!("{open:?}, at rest {rest:?}"));
            }
        }
        (!held.is_empty()).then(|| held.join(", "))
    }

    fn open(&self, id: &str, state: &Value) -> Open {
        let pids = self.members.values().map(|member| member.process.id());
        let known: HashSet<u64> = pids.chain([std::process::id()]).flat_map(|pid| sockets(pid).1).collect();
        let (all, sockets) = sockets(self.member(id).process.id());
        let links = Links::read();
        let ports = self.service_ports();
        let calls = |socket: &u64| links.ports(*socket).iter().any(|port| ports.contains(port));
        let alive: Vec<u64> = sockets.into_iter().filter(|socket| links.lives(*socket, &known)).collect();
        let callers = alive.iter().filter(|socket| calls(socket)).count();
        Open {
            files: all - alive.len(),
            callers,
            lanes: alive.len() - callers,
            tasks: state["tasks"].as_u64().unwrap_or_default() as usize,
        }
    }

    /// Where this process and the members answer calls.
    fn service_ports(&self) -> HashSet<u16> {
        let registered = self.members.keys().filter_map(|id| self.registration(id));
        let addresses = registered.flat_map(|known| [known.address, known.admin]);
        let ports = addresses.filter_map(|address| address.parse::<SocketAddr>().ok()).map(|a| a.port());
        ports.chain([self.parent.port()]).collect()
    }

    /// Members whose log tells of a panic, with its first line.
    pub fn panics(&self) -> Vec<String> {
        let log = |id: &String| fs::read_to_string(self.log_of(id)).unwrap_or_default();
        let panic = |id: &String| {
            let log = log(id);
            let line = log.lines().find(|line| line.contains("panicked"))?;
            Some(format!("{id}: {line}"))
        };
        self.members.keys().filter_map(panic).collect()
    }

    /// The last lines of everybody's log.
    pub fn last_words(&self) -> String {
        let tail = |id: &String| {
            let log = fs::read_to_string(self.log_of(id)).unwrap_or_default();
            let lines: Vec<&str> = log.lines().collect();
            lines[lines.len().saturating_sub(12)..].iter().map(|line| format!("  {id}: {line}\n")).collect()
        };
        self.members.keys().map(tail).collect::<Vec<String>>().concat()
    }
}

impl Drop for Fleet {
    fn drop(&mut self) {
        for member in self.members.values_mut() {
            let _ = member.process.kill();
            let _ = member.process.wait();
        }
        let _ = fs::remove_dir_all(&self.logs);
    }
}

fn address(id: &str, known: Option<String>) -> Result<SocketAddr, String> {
    known.and_then(|text| text.parse().ok()).ok_or_else(|| format!("{id} has not registered"))
}

/// Starts `tandem` with these arguments. Must be called from a thread that lives as long as this process does.
fn spawn(log: &Path, arguments: &[String]) -> Result<Child, String> {
    let failed = |error: std::io::Error| format!("{}: {error}", log.display());
    let log = File::options().create(true).append(true).open(log).map_err(failed)?;
    let mut command = Command::new(tandem());
    command.args(arguments).stdin(Stdio::null()).stdout(Stdio::null()).stderr(log).process_group(0);
    // SAFETY: between fork and exec only prctl is called, which is async-signal-safe and touches no memory of
    // ours.
    unsafe {
        command.pre_exec(|| {
            // Ends with this process, however that ends, also while it is stopped.
            libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
            Ok(())
        });
    }
    command.spawn().map_err(failed)
}

fn signal(process: &Child, signal: i32) {
    // SAFETY: a plain system call. The process has not been waited for, so its id is still its own.
    unsafe { libc::kill(process.id() as i32, signal) };
}

/// How many files a process has open, and the inodes of those that are sockets.
fn sockets(pid: u32) -> (usize, Vec<u64>) {
    let entries = fs::read_dir(format!("/proc/{pid}/fd")).into_iter().flatten().flatten();
    let targets: Vec<PathBuf> = entries.filter_map(|entry| fs::read_link(entry.path()).ok()).collect();
    let inode = |path: &PathBuf| path.to_str()?.strip_prefix("socket:[")?.strip_suffix(']')?.parse().ok();
    (targets.len(), targets.iter().filter_map(inode).collect())
}

/// The established TCP connections of this host.
struct Links {
    by_inode: HashMap<u64, (String, String)>,
    by_ends: HashMap<(String, String), u64>,
}

impl Links {
    fn read() -> Links {
        let table = fs::read_to_string("/proc/net/tcp").unwrap_or_default();
        let mut links = Links { by_inode: HashMap::new(), by_ends: HashMap::new() };
        for line in table.lines().skip(1) {
            let words: Vec<&str> = line.split_whitespace().collect();
            let [_, local, remote, "01", _, _, _, _, _, inode, ..] = words[..] else { continue };
            let (ends, inode) = ((local.to_owned(), remote.to_owned()), inode.parse().unwrap_or(0));
            links.by_inode.insert(inode, ends.clone());
            links.by_ends.insert(ends, inode);
        }
        links
    }

    /// Of both ends of a connection.
    fn ports(&self, socket: u64) -> Vec<u16> {
        let ends = self.by_inode.get(&socket).map_or([None, None], |(local, remote)| {
            [local, remote].map(|end| u16::from_str_radix(end.rsplit_once(':')?.1, 16).ok())
        });
        ends.into_iter().flatten().collect()
    }

    /// Whether the socket is one end of a connection whose other end is among the known.
    fn lives(&self, socket: u64, known: &HashSet<u64>) -> bool {
        let other = self
            .by_inode
            .get(&socket)
            .and_then(|(local, remote)| self.by_ends.get(&(remote.clone(), local.clone())));
        other.is_some_and(|other| known.contains(other))
    }
}
