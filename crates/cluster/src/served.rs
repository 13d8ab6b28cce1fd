//! The store of a parent process, over gRPC: `tandem up --processes` serves it to its children.

use std::pin::Pin;
use std::time::Duration;

use async_trait::async_trait;
use futures_util::{Stream, StreamExt};
use tandem_chassis::seam;
use tandem_proto::v1;
use tandem_proto::v1::membership_client::MembershipClient;
use tandem_proto::v1::membership_server::{self, MembershipServer};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::{Channel, Endpoint};
use tonic::{Request, Response, Status};

use crate::Error;
use crate::embedded::{Embedded, Memory};
use crate::member::{Member, membership_by};
use crate::store::{Change, Condition, News, Store, StoreError};

/// A cluster that a parent process keeps.
pub struct Served {
    member: Member<Remote>,
}

impl Served {
    /// Connects when needed, and again after every loss.
    ///
    /// # Errors
    /// If `url` is not one.
    pub fn connect(url: &str, cluster: &str) -> Result<Served, Error> {
        let wrong = |reason: String| Error::Unreachable { store: url.to_owned(), reason };
        let endpoint = Endpoint::from_shared(url.to_owned()).map_err(|e| wrong(e.to_string()))?;
        Ok(Served::over(settled(endpoint).connect_lazy(), url, cluster))
    }

    fn over(channel: Channel, url: &str, cluster: &str) -> Served {
        let remote = Remote { url: url.to_owned(), client: MembershipClient::new(channel) };
        Served { member: Member::new(remote, cluster) }
    }
}

membership_by!(Served, member);

/// A parent that is stopped answers nothing and closes nothing: only beats find that out.
fn settled(endpoint: Endpoint) -> Endpoint {
    endpoint
        .connect_timeout(Duration::from_secs(2))
        .tcp_nodelay(true)
        .http2_keep_alive_interval(Duration::from_secs(2))
        .keep_alive_timeout(Duration::from_secs(2))
        .keep_alive_while_idle(true)
}

struct Remote {
    url: String,
    client: MembershipClient<Channel>,
}

fn said(status: Status) -> StoreError {
    status.message().to_owned()
}

#[async_trait]
impl Store for Remote {
    fn name(&self) -> String {
        format!("membership at {}", self.url)
    }

    async fn open(&self, time_to_live: Duration) -> Result<u64, StoreError> {
        let request = v1::OpenRegistration { time_to_live_ms: time_to_live.as_millis() as u32 };
        let reply = self.client.clone().open(request).await.map_err(said)?;
        Ok(reply.into_inner().registration)
    }

    async fn renew(&self, registration: u64) -> Result<bool, StoreError> {
        let reply = self.client.clone().renew(v1::RenewRegistration { registration }).await.map_err(said)?;
        Ok(reply.into_inner().alive)
    }

    async fn close(&self, registration: u64) -> Result<(), StoreError> {
        self.client.clone().close(v1::CloseRegistration { registration }).await.map(|_| ()).map_err(said)
    }

    async fn transact(
        &self,
        conditions: Vec<Condition>,
        changes: Vec<Change>,
    ) -> Result<Option<u64>, StoreError> {
        let request = v1::TransactRequest {
            conditions: conditions
                .into_iter()
                .map(|c| v1::Condition { key: c.key, revision: c.revision })
                .collect(),
            changes: changes
                .into_iter()
                .map(|c| v1::Change {
                    key: c.key,
                    value: c.value.map(Into::into),
                    registration: c.registration,
                })
                .collect(),
        };
        let reply = self.client.clone().transact(request).await.map_err(said)?.into_inner();
        Ok(reply.applied.then_some(reply.revision))
    }

    async fn watch(&self, prefix: &str) -> Result<mpsc::Receiver<News>, StoreError> {
        let request = v1::WatchKeysRequest { prefix: prefix.to_owned() };
        let mut events = self.client.clone().watch_keys(request).await.map_err(said)?.into_inner();
        let (send, news) = mpsc::channel(16);
        // Ends with the stream, or when nobody watches.
        seam::spawn(async move {
            loop {
                let event = tokio::select! {
                    event = events.message() => event,
                    () = send.closed() => return,
                };
                let Ok(Some(event)) = event else { return };
                let keys = event.keys.into_iter().map(|k| (k.key, k.value.map(|v| v.to_vec()), k.revision));
                let news = News { snapshot: event.snapshot, revision: event.revision, keys: keys.collect() };
                if send.send(news).await.is_err() {
                    return;
                }
            }
        });
        Ok(news)
    }
}

/// The gRPC service that lets children join `cluster`.
pub fn serve(cluster: Embedded) -> MembershipServer<impl membership_server::Membership> {
    MembershipServer::new(Service { store: cluster.store().clone() })
}

struct Service {
    store: Memory,
}

fn unavailable(error: StoreError) -> Status {
    Status::unavailable(error)
}

#[tonic::async_trait]
impl membership_server::Membership for Service {
    type WatchKeysStream = Pin<Box<dyn Stream<Item = Result<v1::WatchKeysEvent, Status>> + Send>>;

    async fn open(
        &self,
        request: Request<v1::OpenRegistration>,
    ) -> Result<Response<v1::OpenedRegistration>, Status> {
        let time_to_live = Duration::from_millis(u64::from(request.into_inner().time_to_live_ms));
        let registration = self.store.open(time_to_live).await.map_err(unavailable)?;
        Ok(Response::new(v1::OpenedRegistration { registration }))
    }

    async fn renew(
        &self,
        request: Request<v1::RenewRegistration>,
    ) -> Result<Response<v1::RenewedRegistration>, Status> {
        let alive = self.store.renew(request.into_inner().registration).await.map_err(unavailable)?;
        Ok(Response::new(v1::RenewedRegistration { alive }))
    }

    async fn close(
        &self,
        request: Request<v1::CloseRegistration>,
    ) -> Result<Response<v1::ClosedRegistration>, Status> {
        self.store.close(request.into_inner().registration).await.map_err(unavailable)?;
        Ok(Response::new(v1::ClosedRegistration {}))
    }

    async fn transact(
        &self,
        request: Request<v1::TransactRequest>,
    ) -> Result<Response<v1::TransactReply>, Status> {
        let request = request.into_inner();
        let conditions =
            request.conditions.into_iter().map(|c| Condition { key: c.key, revision: c.revision });
        let changes = request.changes.into_iter().map(|c| Change {
            key: c.key,
            value: c.value.map(|v| v.to_vec()),
            registration: c.registration,
        });
        let applied =
            self.store.transact(conditions.collect(), changes.collect()).await.map_err(unavailable)?;
        Ok(Response::new(v1::TransactReply {
            applied: applied.is_some(),
            revision: applied.unwrap_or_default(),
        }))
    }

    async fn watch_keys(
        &self,
        request: Request<v1::WatchKeysRequest>,
    ) -> Result<Response<Self::WatchKeysStream>, Status> {
        let news = self.store.watch(&request.into_inner().prefix).await.map_err(unavailable)?;
        let events = ReceiverStream::new(news).map(|news| {
            let keys = news.keys.into_iter().map(|(key, value, revision)| v1::KeyValue {
                key,
                value: value.map(Into::into),
                revision,
            });
            Ok(v1::WatchKeysEvent { snapshot: news.snapshot, revision: news.revision, keys: keys.collect() })
        });
        Ok(Response::new(Box::pin(events)))
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use hyper_util::rt::TokioIo;
    use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream, ReadHalf, WriteHalf, duplex, split};
    use tokio::sync::watch;
    use tonic::transport::Server;

    use super::*;
    use crate::conformance::{self, Stop};

    const STOP: Duration = Duration::from_secs(30);

    /// A parent without sockets, so that time can be virtual. What travels waits while the link is frozen.
    struct Parent {
        cluster: Embedded,
        dial: mpsc::Sender<DuplexStream>,
        frozen: watch::Sender<bool>,
    }

    impl Parent {
        fn new() -> Parent {
            let cluster = Embedded::new();
            let (dial, accepted) = mpsc::channel(16);
            let incoming = ReceiverStream::new(accepted).map(Ok::<DuplexStream, std::io::Error>);
            let server = Server::builder().add_service(serve(cluster.clone())).serve_with_incoming(incoming);
            seam::spawn(server);
            Parent { cluster, dial, frozen: watch::Sender::new(false) }
        }

        fn member(&self) -> Arc<Served> {
            let (dial, frozen) = (self.dial.clone(), self.frozen.subscribe());
            let connector = tower::service_fn(move |_| {
                let (dial, frozen) = (dial.clone(), frozen.clone());
                async move {
                    let (child, near) = duplex(1 << 16);
                    let (far, parent) = duplex(1 << 16);
                    let ((from_near, to_near), (from_far, to_far)) = (split(near), split(far));
                    seam::spawn(carry(from_near, to_far, frozen.clone()));
                    seam::spawn(carry(from_far, to_near, frozen));
                    dial.send(parent).await.map_err(std::io::Error::other)?;
                    Ok::<_, std::io::Error>(TokioIo::new(child))
                }
            });
            let endpoint = settled(Endpoint::from_static("http://parent"));
            let channel = endpoint.connect_with_connector_lazy(connector);
            Arc::new(Served::over(channel, "http://parent", "default"))
        }
    }

    async fn carry(
        mut from: ReadHalf<DuplexStream>,
        mut to: WriteHalf<DuplexStream>,
        mut frozen: watch::Receiver<bool>,
    ) {
        let mut bytes = [0; 4096];
        while let Ok(count @ 1..) = from.read(&mut bytes).await {
            let thawed = frozen.wait_for(|frozen| !frozen).await.is_ok();
            if !thawed || to.write_all(&bytes[..count]).await.is_err() {
                return;
            }
        }
        let _ = to.shutdown().await;
    }

    #[tokio::test(start_paused = true)]
    async fn a_parents_cluster_holds_what_a_membership_must() {
        let parent = Parent::new();
        conformance::run(parent.member(), parent.member()).await;
        conformance::lives_long(parent.member(), parent.member()).await;
    }

    #[tokio::test(start_paused = true)]
    async fn children_and_their_parent_are_members_of_one_cluster() {
        let parent = Parent::new();
        conformance::run(Arc::new(parent.cluster.clone()), parent.member()).await;
    }

    #[tokio::test(start_paused = true)]
    async fn children_survive_a_parent_that_refuses() {
        let parent = Parent::new();
        let (stop, go) = (async || parent.cluster.set_down(true), async || parent.cluster.set_down(false));
        conformance::survives_a_stop(parent.member(), parent.member(), stop, STOP, go, Stop::Keeps).await;
    }

    /// Nothing is closed and nothing answers; what was on its way arrives half a minute late.
    #[tokio::test(start_paused = true)]
    async fn children_survive_a_parent_that_hangs() {
        let parent = Parent::new();
        let freeze = |frozen| {
            parent.frozen.send_replace(frozen);
        };
        let (stop, go) = (async || freeze(true), async || freeze(false));
        conformance::survives_a_stop(parent.member(), parent.member(), stop, STOP, go, Stop::Keeps).await;
    }

    #[tokio::test(start_paused = true)]
    async fn what_is_not_a_url_is_refused() {
        let refused = Served::connect("not a url", "default").err().expect("it is refused");
        assert!(refused.to_string().contains("not a url"), "{refused}");
    }
}
