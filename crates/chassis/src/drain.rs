//! The orderly end in two stages: *draining* takes no new work and finishes the old, *stopped* ends at once.
//!
//! A [`Shutdown`] is a cloneable token; a child follows its parent but can also end alone, so that one worker
//! of many in a process can drain.

use std::sync::Arc;

use futures_util::future::{self, FutureExt};
use tokio::signal::unix::{SignalKind, signal as on_signal};
use tokio::sync::watch;

/// How far the end has come. It only ever rises.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Stage {
    /// Work as usual.
    Running,
    /// No new work; what runs may finish.
    Draining,
    /// End now.
    Stopped,
}

/// Token that carries the [`Stage`] to everyone who holds a clone.
#[derive(Clone, Debug)]
pub struct Shutdown {
    own: Arc<watch::Sender<Stage>>,
    parent: Option<Arc<Shutdown>>,
}

impl Default for Shutdown {
    fn default() -> Self {
        Self::new()
    }
}

impl Shutdown {
    /// A token of its own, running.
    pub fn new() -> Self {
        Shutdown { own: Arc::new(watch::Sender::new(Stage::Running)), parent: None }
    }

    /// A token that is at least as far as this one, and can go ahead of it alone.
    pub fn child(&self) -> Shutdown {
        Shutdown { parent: Some(Arc::new(self.clone())), ..Shutdown::new() }
    }

    /// Begins draining; does nothing if that has begun or everything has stopped.
    pub fn drain(&self) {
        self.advance(Stage::Draining);
    }

    /// Stops (and thereby also drains).
    pub fn stop(&self) {
        self.advance(Stage::Stopped);
    }

    /// How far the end has come.
    pub fn stage(&self) -> Stage {
        let own = *self.own.borrow();
        self.parent.as_ref().map_or(own, |parent| own.max(parent.stage()))
    }

    /// True from the beginning of the drain on, also after the stop.
    pub fn is_draining(&self) -> bool {
        self.stage() >= Stage::Draining
    }

    /// True once everything is to end at once.
    pub fn is_stopped(&self) -> bool {
        self.stage() >= Stage::Stopped
    }

    /// Resolves when draining begins (at once if it has).
    pub async fn draining(&self) {
        self.reached(Stage::Draining).await;
    }

    /// Resolves when the stop comes (at once if it has).
    pub async fn stopped(&self) {
        self.reached(Stage::Stopped).await;
    }

    fn advance(&self, to: Stage) {
        self.own.send_if_modified(|stage| {
            let rises = *stage < to;
            *stage = to.max(*stage);
            rises
        });
    }

    async fn reached(&self, wanted: Stage) {
        let mut waits = Vec::new();
        let mut token = Some(self);
        while let Some(Shutdown { own, parent }) = token {
            let mut stage = own.subscribe();
            waits.push(
                async move {
                    // The sender lives in `self`, which this future borrows, so the channel cannot close.
                    let _ = stage.wait_for(|stage| *stage >= wanted).await;
                }
                .boxed(),
            );
            token = parent.as_deref();
        }
        future::select_all(waits).await;
    }
}

/// Turns Ctrl-C and SIGTERM into the two stages: the first drains, the second stops. Returns after the stop,
/// whoever caused it. Where the system lets no signal be caught, it logs that and waits for the stop.
pub async fn signal(shutdown: Shutdown) {
    let (mut interrupt, mut terminate) =
        match (on_signal(SignalKind::interrupt()), on_signal(SignalKind::terminate())) {
            (Ok(interrupt), Ok(terminate)) => (interrupt, terminate),
            (Err(error), _) | (_, Err(error)) => {
                tracing::error!(%error, "signals cannot be caught");
                return shutdown.stopped().await;
            }
        };
    while !shutdown.is_stopped() {
        tokio::select! {
            _ = interrupt.recv() => {}
            _ = terminate.recv() => {}
            _ = shutdown.stopped() => return,
        }
        if shutdown.is_draining() {
            shutdown.stop();
        } else {
            shutdown.drain();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn stages_only_rise_and_reach_every_clone() {
        let shutdown = Shutdown::new();
        let clone = shutdown.clone();
        assert_eq!(clone.stage(), Stage::Running);
        assert!(clone.draining().now_or_never().is_none());
        shutdown.drain();
        clone.draining().await;
        assert!(clone.stopped().now_or_never().is_none());
        shutdown.stop();
        shutdown.drain();
        clone.stopped().await;
        clone.draining().await;
        assert!(clone.is_stopped() && clone.is_draining());
    }

    #[tokio::test]
    async fn a_child_follows_its_parent_and_can_go_ahead_alone() {
        let parent = Shutdown::new();
        let (first, second) = (parent.child(), parent.child());
        first.drain();
        first.draining().await;
        assert!(!parent.is_draining() && !second.is_draining());
        let waiting = crate::seam::spawn({
            let second = second.clone();
            async move { second.child().stopped().await }
        });
        parent.stop();
        waiting.await.unwrap();
        assert!(first.is_stopped() && second.is_stopped());
    }

    // One test for both: a process has one set of signals.
    #[tokio::test]
    async fn the_first_signal_drains_and_the_second_stops() {
        let shutdown = Shutdown::new();
        let mut signals = Box::pin(signal(shutdown.clone()));
        // The first poll installs the handlers; before it a signal would end the test process.
        assert!(signals.as_mut().now_or_never().is_none());
        raise(libc::SIGTERM);
        tokio::select! {
            _ = &mut signals => panic!("one signal must not stop"),
            _ = shutdown.draining() => {}
        }
        assert!(!shutdown.is_stopped());
        raise(libc::SIGINT);
        signals.await;
        assert!(shutdown.is_stopped());
    }

    fn raise(number: libc::c_int) {
        // SAFETY: `raise` has no memory preconditions, and tokio's handlers for both signals are installed.
        assert_eq!(unsafe { libc::raise(number) }, 0);
    }
}
