//! Every row passes the suite.

use std::sync::Arc;
use std::time::Duration;

use tandem_cluster::{Embedded, Membership, Served, conformance, serve};

async fn served(cluster: &Embedded) -> (Arc<dyn Membership>, Arc<dyn Membership>) {
    let listener = tandem_chassis::seam::listen("127.0.0.1:0").await.expect("a port");
    let url = format!("http://{}", listener.local_addr().expect("an address"));
    let incoming = tonic::transport::server::TcpIncoming::from(listener);
    let server =
        tonic::transport::Server::builder().add_service(serve(cluster.clone())).serve_with_incoming(incoming);
    tandem_chassis::seam::spawn(server);
    let connect = || -> Arc<dyn Membership> { Arc::new(Served::connect(&url, "default").expect("a URL")) };
    (connect(), connect())
}

#[tokio::test(start_paused = true)]
async fn embedded_holds_what_a_membership_must() {
    let cluster = Embedded::new();
    conformance::run(Arc::new(cluster.clone()), Arc::new(cluster)).await;
}

#[tokio::test(start_paused = true)]
async fn embedded_survives_a_stop() {
    let cluster = Embedded::new();
    let (one, other) = (Arc::new(cluster.clone()), Arc::new(cluster.clone()));
    let (stop, go) = (async || cluster.set_down(true), async || cluster.set_down(false));
    conformance::survives_a_stop(one, other, stop, Duration::from_secs(30), go).await;
}

#[tokio::test]
async fn served_holds_what_a_membership_must() {
    let (one, other) = served(&Embedded::new()).await;
    conformance::run(one, other).await;
}

#[tokio::test]
async fn served_survives_a_stop() {
    let cluster = Embedded::new();
    let (one, other) = served(&cluster).await;
    let (stop, go) = (async || cluster.set_down(true), async || cluster.set_down(false));
    conformance::survives_a_stop(one, other, stop, Duration::from_secs(1), go).await;
}

#[cfg(feature = "etcd")]
mod etcd {
    use std::process::{Child, Command, Stdio};

    use tandem_cluster::Etcd;

    use super::*;

    /// A real etcd server on free ports with data of its own.
    struct Server {
        child: Child,
        data: std::path::PathBuf,
        url: String,
    }

    impl Server {
        async fn start() -> Option<Server> {
            let program = std::env::var_os("TANDEM_ETCD").unwrap_or_else(|| "etcd".into());
            let free = || async {
                let listener = tandem_chassis::seam::listen("127.0.0.1:0").await.expect("a port");
                listener.local_addr().expect("an address").port()
            };
            let (client, peer) = (free().await, free().await);
            let data = std::env::temp_dir().join(format!("tandem-etcd-{}-{client}", std::process::id()));
            let url = format!("http://127.0.0.1:{client}");
            let child = Command::new(program)
                .arg("--data-dir")
                .arg(&data)
                .args(["--listen-client-urls", &url, "--advertise-client-urls", &url])
                .args(["--listen-peer-urls", &format!("http://127.0.0.1:{peer}")])
                .args(["--initial-advertise-peer-urls", &format!("http://127.0.0.1:{peer}")])
                .args(["--initial-cluster", &format!("default=http://127.0.0.1:{peer}")])
                .env("ETCD_UNSUPPORTED_ARCH", std::env::consts::ARCH)
                .stdout(Stdio::null())
                .stderr(Stdio::null())
                .spawn();
            match child {
                Ok(child) => Some(Server { child, data, url }),
                Err(error) => {
                    assert!(std::env::var("CI").as_deref() != Ok("true"), "CI has an etcd server: {error}");
                    eprintln!("SKIPPED: there is no etcd server here: {error}");
                    None
                }
            }
        }

        fn signal(&self, signal: i32) {
            // SAFETY: a plain system call on a child that has not been waited for.
            unsafe { libc::kill(self.child.id() as i32, signal) };
        }

        async fn member(&self, cluster: &str) -> Arc<dyn Membership> {
            for _ in 0..100 {
                if let Ok(member) = Etcd::connect(&self.url, cluster).await {
                    return Arc::new(member);
                }
                tandem_chassis::seam::sleep(Duration::from_millis(100)).await;
            }
            panic!("etcd answers at {}", self.url);
        }
    }

    impl Drop for Server {
        fn drop(&mut self) {
            let _ = self.child.kill();
            let _ = self.child.wait();
            let _ = std::fs::remove_dir_all(&self.data);
        }
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn etcd_holds_what_a_membership_must() {
        let Some(server) = Server::start().await else { return };
        conformance::run(server.member("suite").await, server.member("suite").await).await;
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn etcd_survives_a_stop_of_thirty_seconds() {
        let Some(server) = Server::start().await else { return };
        let (one, other) = (server.member("stop").await, server.member("stop").await);
        let (stop, go) = (async || server.signal(libc::SIGSTOP), async || server.signal(libc::SIGCONT));
        conformance::survives_a_stop(one, other, stop, Duration::from_secs(30), go).await;
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn etcd_that_is_not_there_is_said_at_once() {
        let refused = Etcd::connect("http://127.0.0.1:1", "default").await.err().expect("nobody is there");
        assert!(refused.to_string().contains("etcd at http://127.0.0.1:1 cannot be reached"), "{refused}");
    }
}
