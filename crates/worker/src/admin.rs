//! What a worker's admin port shows.

use std::sync::Arc;

use serde_json::{Value, json};
use tandem_chassis::admin::Subject;
use tandem_chassis::{Shutdown, process_facts};
use tandem_types::WorkerState;

use crate::Identity;
use crate::shared::Shared;

pub(crate) struct WorkerSubject {
    pub(crate) shared: Arc<Shared>,
    pub(crate) identity: Arc<Identity>,
    pub(crate) config: Value,
    pub(crate) shutdown: Shutdown,
}

impl Subject for WorkerSubject {
    fn ready(&self) -> bool {
        !self.shutdown.is_draining()
    }

    fn state(&self) -> Value {
        let facts = process_facts();
        let identity = &self.identity;
        let claims = self.shared.claims();
        self.shared.look(|core| {
            let (constants, load) = (core.constants(), core.load());
            let state = if self.shutdown.is_draining() { WorkerState::Draining } else { core.state() };
            json!({
                "id": constants.id,
                "kind": "worker",
                "pid": facts.pid,
                "command": identity.command,
                "model": identity.model,
                "role": core.role(),
                "epoch": core.epoch(),
                "incarnation": constants.incarnation,
                "state": state,
                "running": load.running,
                "waiting": load.waiting,
                "leases": load.leases,
                "claims": claims,
                "blocks": {
                    "total": load.blocks_total,
                    "free": load.blocks_free,
                    "cached": load.blocks_cached,
                    "in_use": load.blocks_in_use,
                },
                "legs": core.leg_count(),
                "cpu_seconds": facts.cpu_seconds,
                "resident_bytes": facts.resident_bytes,
                "tasks": facts.tasks,
                "version": identity.version,
                "kernel": identity.kernel,
                "threads": identity.threads,
                "context_tokens": constants.context_tokens,
                "kv_identity": constants.identity,
                "transports": constants.exports.iter().map(|e| &e.transport).collect::<Vec<_>>(),
            })
        })
    }

    fn config(&self) -> Value {
        self.config.clone()
    }

    fn drain(&self) {
        self.shutdown.drain();
    }

    fn metrics(&self) -> String {
        self.shared.metrics.render(&self.shared.look(|core| core.load()))
    }
}
