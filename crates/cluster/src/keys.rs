//! The keys in the store and what is under them.

use std::collections::BTreeMap;

use serde::de::DeserializeOwned;

use crate::{Kind, View};

/// Keys of one cluster.
#[derive(Clone, Debug)]
pub(crate) struct Keys {
    prefix: String,
}

impl Keys {
    pub(crate) fn new(cluster: &str) -> Keys {
        Keys { prefix: format!("/tandem/{cluster}/") }
    }

    pub(crate) fn prefix(&self) -> &str {
        &self.prefix
    }

    pub(crate) fn registration(&self, kind: Kind, id: &str) -> String {
        let folder = match kind {
            Kind::Worker => "workers",
            Kind::Router => "routers",
            Kind::Store => "stores",
        };
        format!("{}{folder}/{id}", self.prefix)
    }

    pub(crate) fn role(&self, worker: &str) -> String {
        format!("{}roles/{worker}", self.prefix)
    }

    pub(crate) fn leader(&self) -> String {
        format!("{}leader", self.prefix)
    }

    pub(crate) fn config(&self) -> String {
        format!("{}config", self.prefix)
    }

    /// The view that these values amount to. What cannot be read is left out, and said in the log.
    pub(crate) fn view(
        &self,
        values: &BTreeMap<String, (Vec<u8>, u64)>,
        revision: u64,
        connected: bool,
    ) -> View {
        let mut view = View { revision, connected, ..View::default() };
        for (key, (value, _)) in values {
            let Some(path) = key.strip_prefix(&self.prefix) else { continue };
            match path.split_once('/') {
                Some(("workers", id)) => insert(&mut view.workers, id, key, value),
                Some(("routers", id)) => insert(&mut view.routers, id, key, value),
                Some(("stores", id)) => insert(&mut view.stores, id, key, value),
                Some(("roles", id)) => insert(&mut view.roles, id, key, value),
                None if path == "leader" => view.leader = Some(String::from_utf8_lossy(value).into_owned()),
                None if path == "config" => view.config = serde_json::from_slice(value).ok(),
                _ => {}
            }
        }
        view
    }
}

fn insert<T: DeserializeOwned>(into: &mut BTreeMap<String, T>, id: &str, key: &str, value: &[u8]) {
    match serde_json::from_slice(value) {
        Ok(read) => {
            into.insert(id.to_owned(), read);
        }
        Err(error) => tracing::warn!(key, %error, "a value in the store cannot be read; it is left out"),
    }
}
