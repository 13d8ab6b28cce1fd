//! The store in etcd.

use std::time::Duration;

use async_trait::async_trait;
use etcd_client::{
    Client, Compare, CompareOp, ConnectOptions, EventType, GetOptions, PutOptions, Txn, TxnOp, WatchOptions,
};
use tandem_chassis::seam;
use tokio::sync::mpsc;

use crate::Error;
use crate::member::{Member, membership_by};
use crate::store::{Change, Condition, News, Store, StoreError};

/// A cluster in etcd.
pub struct Etcd {
    member: Member<EtcdStore>,
}

impl Etcd {
    /// Connects; later losses are mended by themselves. `url` may be several, with commas between them.
    pub async fn connect(url: &str, cluster: &str) -> Result<Etcd, Error> {
        let unreachable = |reason: String| Error::Unreachable { store: format!("etcd at {url}"), reason };
        let options = ConnectOptions::new()
            .with_connect_timeout(Duration::from_secs(3))
            .with_timeout(Duration::from_secs(3))
            .with_keep_alive(Duration::from_secs(2), Duration::from_secs(2))
            .with_keep_alive_while_idle(true)
            // A server that has lost its cluster says so, instead of keeping a watch silent.
            .with_require_leader(true);
        let endpoints: Vec<&str> = url.split(',').map(str::trim).collect();
        let connect = Client::connect(endpoints, Some(options));
        let client = seam::timeout(Duration::from_secs(5), connect).await;
        let mut client = client
            .map_err(|_| unreachable("no answer in 5 s".into()))?
            .map_err(|e| unreachable(e.to_string()))?;
        // A lazy connection says nothing: ask once, so that a wrong address is told at once.
        let status = seam::timeout(Duration::from_secs(5), client.status()).await;
        status
            .map_err(|_| unreachable("no answer in 5 s".into()))?
            .map_err(|e| unreachable(e.to_string()))?;
        Ok(Etcd { member: Member::new(EtcdStore { url: url.to_owned(), client }, cluster) })
    }
}

membership_by!(Etcd, member);

struct EtcdStore {
    url: String,
    client: Client,
}

fn said(error: etcd_client::Error) -> StoreError {
    error.to_string()
}

#[async_trait]
impl Store for EtcdStore {
    fn name(&self) -> String {
        format!("etcd at {}", self.url)
    }

    async fn open(&self, time_to_live: Duration) -> Result<u64, StoreError> {
        let seconds = time_to_live.as_secs().max(1) as i64;
        let lease = self.client.lease_client().grant(seconds, None).await.map_err(said)?;
        Ok(lease.id() as u64)
    }

    async fn renew(&self, registration: u64) -> Result<bool, StoreError> {
        let (mut keeper, mut answers) =
            self.client.lease_client().keep_alive(registration as i64).await.map_err(said)?;
        keeper.keep_alive().await.map_err(said)?;
        let answer = answers.message().await.map_err(said)?.ok_or("the lease's stream ended")?;
        Ok(answer.ttl() > 0)
    }

    async fn close(&self, registration: u64) -> Result<(), StoreError> {
        self.client.lease_client().revoke(registration as i64).await.map(|_| ()).map_err(said)
    }

    async fn transact(
        &self,
        conditions: Vec<Condition>,
        changes: Vec<Change>,
    ) -> Result<Option<u64>, StoreError> {
        let compares =
            conditions.into_iter().map(|c| Compare::mod_revision(c.key, CompareOp::Equal, c.revision as i64));
        let operations = changes.into_iter().map(|c| match c.value {
            Some(value) if c.registration != 0 => {
                let options = PutOptions::new().with_lease(c.registration as i64);
                TxnOp::put(c.key, value, Some(options))
            }
            Some(value) => TxnOp::put(c.key, value, None),
            None => TxnOp::delete(c.key, None),
        });
        let transaction =
            Txn::new().when(compares.collect::<Vec<_>>()).and_then(operations.collect::<Vec<_>>());
        let done = self.client.kv_client().txn(transaction).await.map_err(said)?;
        let revision = done.header().map_or(0, |header| header.revision()) as u64;
        Ok(done.succeeded().then_some(revision))
    }

    async fn watch(&self, prefix: &str) -> Result<mpsc::Receiver<News>, StoreError> {
        let options = Some(GetOptions::new().with_prefix());
        let found = self.client.kv_client().get(prefix, options).await.map_err(said)?;
        let revision = found.header().map_or(0, |header| header.revision());
        let keys = found.kvs().iter().map(|kv| {
            let key = String::from_utf8_lossy(kv.key()).into_owned();
            (key, Some(kv.value().to_vec()), kv.mod_revision() as u64)
        });
        let first = News { snapshot: true, revision: revision as u64, keys: keys.collect() };
        let options = WatchOptions::new().with_prefix().with_start_revision(revision + 1);
        let mut stream = self.client.watch_client().watch(prefix, Some(options)).await.map_err(said)?;
        let (send, news) = mpsc::channel(16);
        // Ends with the stream, or when nobody watches.
        seam::spawn(async move {
            if send.send(first).await.is_err() {
                return;
            }
            loop {
                let message = tokio::select! {
                    message = stream.message() => message,
                    () = send.closed() => return,
                };
                let Ok(Some(response)) = message else { return };
                // A compacted revision or a server that gives the watch up: begin again with a snapshot.
                if response.canceled() {
                    return;
                }
                let revision = response.header().map_or(0, |header| header.revision()) as u64;
                let keys = response.events().iter().filter_map(|event| {
                    let kv = event.kv()?;
                    let key = String::from_utf8_lossy(kv.key()).into_owned();
                    let value = (event.event_type() == EventType::Put).then(|| kv.value().to_vec());
                    Some((key, value, kv.mod_revision() as u64))
                });
                let news = News { snapshot: false, revision, keys: keys.collect() };
                if send.send(news).await.is_err() {
                    return;
                }
            }
        });
        Ok(news)
    }
}
