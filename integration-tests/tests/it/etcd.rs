//! A cluster of processes over a real etcd server. The binary must be built with the feature, as `cargo xtask
//! test` does.

use std::process::{Child, Command, Stdio};
use std::time::Duration;

use serde_json::json;
use tandem_chassis::seam;
use tandem_integration_tests::{ProcessCluster, checkpoints, processes, skip};

use crate::support::run;

/// A real etcd server on free ports with data of its own.
struct Server {
    child: Child,
    data: std::path::PathBuf,
    url: String,
}

impl Server {
    async fn start() -> Option<Server> {
        let program = std::env::var_os("TANDEM_ETCD").unwrap_or_else(|| "etcd".into());
        let mut ports = Vec::new();
        for _ in 0..2 {
            let listener = seam::listen("127.0.0.1:0").await.expect("a port");
            ports.push(listener.local_addr().expect("an address").port());
        }
        let data = std::env::temp_dir().join(format!("tandem-it-etcd-{}", ports[0]));
        let (url, peer) =
            (format!("http://127.0.0.1:{}", ports[0]), format!("http://127.0.0.1:{}", ports[1]));
        let child = Command::new(program)
            .arg("--data-dir")
            .arg(&data)
            .args(["--listen-client-urls", &url, "--advertise-client-urls", &url])
            .args(["--listen-peer-urls", &peer, "--initial-advertise-peer-urls", &peer])
            .args(["--initial-cluster", &format!("default={peer}")])
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn();
        match child {
            Ok(child) => {
                let server = Server { child, data, url };
                let listening = async {
                    while seam::connect(server.url.trim_start_matches("http://")).await.is_err() {
                        seam::sleep(Duration::from_millis(20)).await;
                    }
                };
                seam::timeout(Duration::from_secs(30), listening).await.expect("etcd listens");
                Some(server)
            }
            Err(error) => {
                skip::skip(&format!("there is no etcd server here: {error}"));
                None
            }
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        let _ = std::fs::remove_dir_all(&self.data);
    }
}

#[test]
fn etcd_carries_a_cluster_of_processes() {
    run(async {
        let Some(server) = Server::start().await else { return };
        let help = Command::new(processes::tandem())
            .args(["worker", "--model", "/", "--etcd", "http://127.0.0.1:1"])
            .output()
            .expect("it runs");
        if String::from_utf8_lossy(&help.stderr).contains("this build has no etcd") {
            return skip::skip("this build of tandem has no etcd; `cargo xtask test` makes one");
        }
        let model = checkpoints::named("qwen3");
        let arguments =
            ["--processes", "--fake", "--model", model.to_str().expect("a path"), "--etcd", &server.url];
        let cluster = ProcessCluster::start(&arguments).await;
        let seen = cluster.admin.get("/admin/cluster").await.json;
        assert_eq!(seen["workers"].as_array().map(Vec::len), Some(2), "{seen:#}");
        let answer = cluster.api.complete("qwen3", &[1, 2, 3], json!({ "max_tokens": 8 })).await;
        assert_eq!(answer.status, 200, "{}", answer.text);
        let ordered = cluster.admin.post("/admin/workers/decode-0/role", &json!({ "role": "mixed" })).await;
        assert_eq!(ordered.status, 200, "{}", ordered.text);
        cluster
            .wait_for("the role is taken", |rows| {
                rows.iter().any(|row| row["id"] == "decode-0" && row["role"] == "mixed")
            })
            .await;
        assert_eq!(cluster.interrupt().await, Some(0));
    });
}
