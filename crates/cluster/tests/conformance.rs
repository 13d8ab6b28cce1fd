//! Every row passes the suite.

use std::sync::Arc;
use std::time::Duration;

use tandem_cluster::conformance::{self, Stop};
use tandem_cluster::{Embedded, Membership, Served, Spec, serve};

const STOP: Duration = Duration::from_secs(30);

#[tokio::test(start_paused = true)]
async fn embedded_holds_what_a_membership_must() {
    let cluster = Embedded::new();
    conformance::run(Arc::new(cluster.member()), Arc::new(cluster.member())).await;
    conformance::lives_long(Arc::new(cluster.member()), Arc::new(cluster)).await;
}

#[tokio::test(start_paused = true)]
async fn embedded_survives_a_stop() {
    let cluster = Embedded::new();
    let (one, other) = (Arc::new(cluster.member()), Arc::new(cluster.member()));
    let (stop, go) = (async || cluster.set_down(true), async || cluster.set_down(false));
    conformance::survives_a_stop(one, other, stop, STOP, go, Stop::Keeps).await;
}

#[tokio::test(start_paused = true)]
async fn clusters_with_different_names_do_not_see_each_other() {
    let (one, other) = (Embedded::named("a"), Embedded::named("a-b"));
    let _guard = one.register(conformance::worker("w", 1)).await.expect("it registers");
    conformance::until(&other, STOP, "it is connected", |view| view.connected).await;
    assert!(other.watch().borrow().workers.is_empty());
}

/// The other suites of this row run in virtual time, beside its code.
#[tokio::test]
async fn served_members_meet_over_sockets() {
    let cluster = Embedded::new();
    let listener = tandem_chassis::seam::listen_tcp("127.0.0.1:0").await.expect("a port");
    let url = format!("http://{}", listener.local_addr().expect("an address"));
    let incoming = tonic::transport::server::TcpIncoming::from(listener);
    let server =
        tonic::transport::Server::builder().add_service(serve(cluster)).serve_with_incoming(incoming);
    tandem_chassis::seam::spawn(server);
    let spec = Spec { parent: Some(url.clone()), etcd: None };
    let one = tandem_cluster::connect(&spec, "default").await.expect("a URL");
    let other = Served::connect(&url, "default").expect("a URL");
    let guard = one.register(conformance::worker("w", 1)).await.expect("it registers");
    let here = |view: &tandem_cluster::View| view.connected && view.workers.contains_key("w");
    conformance::until(&other, STOP, "it is seen", here).await;
    guard.leave().await;
    conformance::until(&other, STOP, "it is gone", |view| view.workers.is_empty()).await;
}

#[tokio::test]
async fn a_name_that_would_reach_into_other_clusters_is_refused() {
    for name in ["", "a/workers", "/"] {
        let refused = tandem_cluster::connect(&Spec::default(), name).await.err().expect("it is refused");
        assert!(refused.to_string().contains("cluster name"), "{refused}");
    }
}

#[cfg(not(feature = "etcd"))]
#[tokio::test]
async fn a_build_without_the_store_says_how_to_get_it() {
    let spec = Spec { etcd: Some("http://127.0.0.1:2379".to_owned()), parent: None };
    let refused = tandem_cluster::connect(&spec, "default").await.err().expect("it is refused");
    assert!(refused.to_string().contains("--features etcd"), "{refused}");
}

#[cfg(feature = "etcd")]
mod etcd {
    use std::path::PathBuf;
    use std::process::{Child, Command, Stdio};

    use tandem_cluster::Etcd;

    use super::*;

    /// A real etcd server on free ports with data of its own.
    struct Server {
        child: std::cell::RefCell<Child>,
        data: PathBuf,
        client: u16,
        peer: u16,
    }

    impl Server {
        /// None where there is no etcd, which is said; in CI that is a failure.
        async fn start() -> Option<Server> {
            let free = || async {
                let listener = tandem_chassis::seam::listen_tcp("127.0.0.1:0").await.expect("a port");
                listener.local_addr().expect("an address").port()
            };
            let (client, peer) = (free().await, free().await);
            let data = std::env::temp_dir().join(format!("tandem-etcd-{}-{client}", std::process::id()));
            match command(&data, client, peer).spawn() {
                Ok(child) => Some(Server { child: child.into(), data, client, peer }),
                Err(error) => {
                    assert!(std::env::var("CI").as_deref() != Ok("true"), "CI has an etcd server: {error}");
                    eprintln!("SKIPPED: there is no etcd server here: {error}");
                    None
                }
            }
        }

        fn url(&self) -> String {
            format!("http://127.0.0.1:{}", self.client)
        }

        fn signal(&self, signal: i32) {
            // SAFETY: a plain system call on a child that has not been waited for.
            unsafe { libc::kill(self.child.borrow().id() as i32, signal) };
        }

        /// As after a power cut.
        fn kill(&self) {
            let mut child = self.child.borrow_mut();
            child.kill().expect("it runs");
            child.wait().expect("it ends");
        }

        fn start_again(&self) {
            let child = command(&self.data, self.client, self.peer).spawn().expect("it started before");
            *self.child.borrow_mut() = child;
        }

        async fn member(&self, cluster: &str) -> Arc<dyn Membership> {
            for _ in 0..100 {
                if let Ok(member) = Etcd::connect(&self.url(), cluster).await {
                    return Arc::new(member);
                }
                tandem_chassis::seam::sleep(Duration::from_millis(100)).await;
            }
            panic!("etcd answers at {}", self.url());
        }
    }

    fn command(data: &std::path::Path, client: u16, peer: u16) -> Command {
        let (url, peer) = (format!("http://127.0.0.1:{client}"), format!("http://127.0.0.1:{peer}"));
        let mut command = Command::new(std::env::var_os("TANDEM_ETCD").unwrap_or_else(|| "etcd".into()));
        command
            .arg("--data-dir")
            .arg(data)
            .args(["--listen-client-urls", &url, "--advertise-client-urls", &url])
            .args(["--listen-peer-urls", &peer, "--initial-advertise-peer-urls", &peer])
            .args(["--initial-cluster", &format!("default={peer}")])
            .env("ETCD_UNSUPPORTED_ARCH", std::env::consts::ARCH)
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        command
    }

    impl Drop for Server {
        fn drop(&mut self) {
            let child = self.child.get_mut();
            let _ = child.kill();
            let _ = child.wait();
            let _ = std::fs::remove_dir_all(&self.data);
        }
    }

    #[tokio::test]
    async fn etcd_holds_what_a_membership_must() {
        let Some(server) = Server::start().await else { return };
        conformance::run(server.member("suite").await, server.member("suite").await).await;
    }

    #[tokio::test]
    async fn etcd_registrations_are_renewed() {
        let Some(server) = Server::start().await else { return };
        conformance::lives_long(server.member("life").await, server.member("life").await).await;
    }

    #[tokio::test]
    async fn etcd_survives_a_stop_of_thirty_seconds() {
        let Some(server) = Server::start().await else { return };
        let (one, other) = (server.member("stop").await, server.member("stop").await);
        let (stop, go) = (async || server.signal(libc::SIGSTOP), async || server.signal(libc::SIGCONT));
        conformance::survives_a_stop(one, other, stop, STOP, go, Stop::Keeps).await;
    }

    #[tokio::test]
    async fn etcd_may_be_killed_and_started_again() {
        let Some(server) = Server::start().await else { return };
        let (one, other) = (server.member("kill").await, server.member("kill").await);
        let (stop, go) = (async || server.kill(), async || server.start_again());
        let short = Duration::from_secs(2);
        conformance::survives_a_stop(one, other, stop, short, go, Stop::Keeps).await;
    }

    #[tokio::test]
    async fn etcd_may_lose_everything_it_knew() {
        let Some(server) = Server::start().await else { return };
        let (one, other) = (server.member("loss").await, server.member("loss").await);
        let go = async || {
            std::fs::remove_dir_all(&server.data).expect("its data can be removed");
            server.start_again();
        };
        let short = Duration::from_secs(2);
        conformance::survives_a_stop(one, other, async || server.kill(), short, go, Stop::Forgets).await;
    }

    #[tokio::test]
    async fn etcd_is_reached_through_any_of_several_addresses() {
        let Some(server) = Server::start().await else { return };
        drop(server.member("several").await);
        let urls = format!("{0},{0}", server.url());
        let member = Etcd::connect(&urls, "several").await.expect("it answers");
        conformance::until(&member, STOP, "it is connected", |view| view.connected).await;
    }

    #[tokio::test]
    async fn etcd_that_is_not_there_is_said_at_once() {
        let refused = Etcd::connect("http://127.0.0.1:1", "default").await.err().expect("nobody is there");
        assert!(refused.to_string().contains("etcd at http://127.0.0.1:1 cannot be reached"), "{refused}");
    }
}
