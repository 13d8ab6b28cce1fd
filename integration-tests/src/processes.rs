//! A cluster of real processes, started by the real `tandem up --processes`.

use std::io::{BufRead, BufReader};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;
use std::time::Duration;

use serde_json::Value;

use crate::Client;
use crate::cluster::wait_for_workers;

/// The `tandem` binary: named by `TANDEM_BIN`, else beside this test.
///
/// # Panics
/// If it has not been built.
pub fn tandem() -> PathBuf {
    if let Some(named) = std::env::var_os("TANDEM_BIN") {
        return PathBuf::from(named);
    }
    let test = std::env::current_exe().expect("this program has a path");
    let beside = test.ancestors().skip(1).map(|dir| dir.join("tandem")).find(|path| path.is_file());
    beside.expect("target/debug/tandem is there: `cargo xtask test` builds it, or `cargo build -p tandem`")
}

/// A worker started again by its own command; killed when dropped.
pub struct StartedAgain(Child);

impl StartedAgain {
    /// Starts the argument list of a worker's `/admin/state`.
    ///
    /// # Panics
    /// If it is not one, or cannot be started.
    pub fn by(state: &Value) -> StartedAgain {
        let command: Vec<String> = serde_json::from_value(state["command"].clone()).expect("a list");
        assert!(command[0].starts_with('/'), "paths are absolute: {command:?}");
        StartedAgain(Command::new(&command[0]).args(&command[1..]).spawn().expect("it starts again"))
    }
}

impl Drop for StartedAgain {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A running `tandem up`; killed with all its children when dropped.
pub struct ProcessCluster {
    /// The API.
    pub api: Client,
    /// The router's admin port.
    pub admin: Client,
    /// Where the API listens.
    pub address: SocketAddr,
    /// Where the admin port listens.
    pub admin_address: SocketAddr,
    up: Child,
}

impl ProcessCluster {
    /// Starts `tandem up` with these arguments on free ports and waits for its greeting.
    ///
    /// # Panics
    /// If it ends, or says nothing for a minute.
    pub async fn start(arguments: &[&str]) -> ProcessCluster {
        let mut up = Command::new(tandem())
            .arg("up")
            .args(["--port", "0", "--admin-port", "0"])
            .args(arguments)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .expect("tandem starts");
        let stdout = up.stdout.take().expect("it is piped");
        let (send, lines) = mpsc::channel();
        let reader = tandem_chassis::seam::thread("up-output", move || {
            for line in BufReader::new(stdout).lines().map_while(Result::ok) {
                println!("up: {line}");
                let _ = send.send(line);
            }
        });
        drop(reader);
        let greeting = tokio::task::spawn_blocking(move || {
            let limit = Duration::from_secs(60);
            std::iter::from_fn(|| lines.recv_timeout(limit).ok())
                .find(|line| line.starts_with("Tandem serves"))
        });
        let greeting = greeting.await.expect("the reader lives").expect("`tandem up` greets");
        let (address, admin_address) = addresses(&greeting);
        let (api, admin) = (Client::new(address), Client::new(admin_address));
        ProcessCluster { api, admin, address, admin_address, up }
    }

    /// The state of one worker, from its own admin port.
    pub async fn state_of(&self, worker: &str) -> Value {
        let cluster = self.admin.get("/admin/cluster").await.json;
        let rows = cluster["workers"].as_array().cloned().unwrap_or_default();
        let row =
            rows.iter().find(|row| row["id"] == worker).unwrap_or_else(|| panic!("no {worker}: {cluster:#}"));
        let admin = row["admin"].as_str().and_then(|a| a.parse().ok()).expect("an address");
        Client::new(admin).get("/admin/state").await.json
    }

    /// `kill -9` of a worker. Returns the state it had.
    pub async fn kill(&self, worker: &str) -> Value {
        self.signal(worker, libc::SIGKILL).await
    }

    /// SIGSTOP of a worker: alive for the system, silent for everybody. Returns its state.
    pub async fn stop(&self, worker: &str) -> Value {
        self.signal(worker, libc::SIGSTOP).await
    }

    /// Ends a process that was stopped, by the state it had.
    pub fn end(state: &Value) {
        let pid = state["pid"].as_i64().expect("a pid") as i32;
        // SAFETY: as in `signal`.
        unsafe { libc::kill(pid, libc::SIGKILL) };
    }

    async fn signal(&self, worker: &str, signal: i32) -> Value {
        let state = self.state_of(worker).await;
        let pid = state["pid"].as_i64().expect("a pid") as i32;
        // SAFETY: a plain system call on a process this test has started.
        let sent = unsafe { libc::kill(pid, signal) };
        assert_eq!(sent, 0, "{worker} could be reached");
        state
    }

    /// Waits until `/admin/cluster`'s workers look as wanted.
    pub async fn wait_for(&self, what: &str, wanted: impl Fn(&[Value]) -> bool) {
        wait_for_workers(&self.admin, what, wanted).await;
    }

    /// Ctrl-C; returns the exit code.
    pub async fn interrupt(mut self) -> Option<i32> {
        // SAFETY: as in `kill`.
        unsafe { libc::kill(self.up.id() as i32, libc::SIGINT) };
        let mut up = std::mem::replace(&mut self.up, Command::new("true").spawn().expect("true starts"));
        tokio::task::spawn_blocking(move || up.wait().expect("it can be waited for").code())
            .await
            .expect("the waiter lives")
    }
}

impl Drop for ProcessCluster {
    fn drop(&mut self) {
        // Its children end with it.
        let _ = self.up.kill();
        let _ = self.up.wait();
    }
}

/// Both addresses of the greeting's first line.
fn addresses(greeting: &str) -> (SocketAddr, SocketAddr) {
    let mut found = greeting.split("http://").skip(1).map(|rest| {
        let end = rest.find(|c: char| !(c.is_ascii_digit() || ".:".contains(c))).unwrap_or(rest.len());
        rest[..end].trim_end_matches(['.', ':']).parse().expect("an address")
    });
    let api = found.next().expect("the API's address");
    (api, found.next().expect("the admin address"))
}
