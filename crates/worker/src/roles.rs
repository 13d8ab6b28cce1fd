//! Obeys role orders: membership's key is the only way in which a worker's role changes.

use std::sync::Arc;

use tandem_chassis::Shutdown;
use tandem_cluster::{Membership, Registration, RegistrationGuard};
use tandem_types::WorkerState;

use crate::shared::Shared;

/// Follows this worker's orders and keeps its registration true, until it stops; then leaves.
///
/// An order holds for one incarnation and the epoch it expects; any other is stale and is not obeyed.
pub(crate) async fn run(
    shared: Arc<Shared>,
    membership: Arc<dyn Membership>,
    guard: RegistrationGuard,
    mut registration: Registration,
    shutdown: Shutdown,
) {
    let mut views = membership.watch();
    let mut draining = false;
    loop {
        let order = views.borrow_and_update().roles.get(&registration.id).cloned();
        if let Some(order) = order
            && order.incarnation == registration.incarnation
        {
            let changed = shared.change(|core, _| {
                let from = core.role();
                let obeyed = core.epoch() == order.expected_epoch && from != order.role;
                if obeyed {
                    core.change_role(order.role);
                }
                obeyed.then(|| (from, core.role(), core.epoch()))
            });
            if let Some((from, role, epoch)) = changed {
                tracing::info!(%from, to = %role, epoch = epoch.0, by = ?order.by, "role changed");
                shared.metrics.observe_role_switch(from, role);
                registration.role = Some(role);
                registration.epoch = epoch;
                shared.announce();
                guard.update(registration.clone());
            }
        }
        tokio::select! {
            changed = views.changed() => if changed.is_err() { break },
            () = shutdown.draining(), if !draining => {
                draining = true;
                shared.change(|core, _| core.drain());
                shared.announce();
                registration.state = WorkerState::Draining;
                guard.update(registration.clone());
            }
            () = shutdown.stopped() => break,
        }
    }
    guard.leave().await;
}
