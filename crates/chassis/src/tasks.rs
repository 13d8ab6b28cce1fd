//! An owner for spawned tasks: it waits for them at the end, and takes them with it when dropped.

use std::future::{Future, poll_fn};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::task::Poll;
use std::time::Duration;

use tokio::task::{AbortHandle, JoinError, JoinSet};

use crate::seam;

/// Owner of spawned tasks. [`shutdown`](Tasks::shutdown) waits for them and then aborts; a drop aborts at
/// once. A task that panics is logged and counts as ended.
#[derive(Debug, Default)]
pub struct Tasks {
    set: Mutex<JoinSet<()>>,
    /// Held during a shutdown, so that a second caller waits for the first: the set wakes one waiter only.
    ending: tokio::sync::Mutex<()>,
}

impl Tasks {
    /// An owner of nothing yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Spawns a task on the current runtime. It may be aborted at any `.await`, so what it takes it must hold
    /// in guards.
    pub fn spawn(&self, task: impl Future<Output = ()> + Send + 'static) -> AbortHandle {
        let mut set = self.set();
        reap(&mut set);
        set.spawn(task)
    }

    /// How many tasks still run.
    pub fn len(&self) -> usize {
        let mut set = self.set();
        reap(&mut set);
        set.len()
    }

    /// True when no task runs.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Waits up to `limit` for all tasks, then aborts the rest and waits until they are gone. Returns how many
    /// had to be aborted.
    pub async fn shutdown(&self, limit: Duration) -> usize {
        let _ending = self.ending.lock().await;
        if seam::timeout(limit, self.all_ended()).await.is_ok() {
            return 0;
        }
        let late = {
            let mut set = self.set();
            reap(&mut set);
            set.abort_all();
            set.len()
        };
        self.all_ended().await;
        late
    }

    async fn all_ended(&self) {
        let next = || {
            poll_fn(|context| match self.set().poll_join_next(context) {
                Poll::Ready(ended) => Poll::Ready(ended),
                Poll::Pending => Poll::Pending,
            })
        };
        while let Some(ended) = next().await {
            log(ended);
        }
    }

    fn set(&self) -> MutexGuard<'_, JoinSet<()>> {
        // A panic while the lock was held leaves a valid set behind.
        self.set.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Forgets the tasks that have ended, so that a long-lived owner does not grow with every task it ever had.
fn reap(set: &mut JoinSet<()>) {
    while let Some(ended) = set.try_join_next() {
        log(ended);
    }
}

fn log(ended: Result<(), JoinError>) {
    if let Err(error) = ended
        && error.is_panic()
    {
        tracing::error!(%error, "a task panicked");
    }
}

#[cfg(test)]
mod tests {
    use std::future::pending;
    use std::sync::Arc;

    use tokio::sync::oneshot;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn shutdown_waits_for_tasks_that_end_in_time() {
        let tasks = Tasks::new();
        let (send, receive) = oneshot::channel();
        tasks.spawn(async move {
            seam::sleep(Duration::from_secs(4)).await;
            send.send(seam::now()).unwrap();
        });
        let start = seam::now();
        assert_eq!(tasks.shutdown(Duration::from_secs(5)).await, 0);
        assert_eq!(receive.await.unwrap().since(start).as_secs(), 4);
    }

    #[tokio::test(start_paused = true)]
    async fn shutdown_aborts_what_does_not_end() {
        let tasks = Tasks::new();
        let held = Arc::new(());
        let holds = held.clone();
        tasks.spawn(async move {
            let _holds = holds;
            pending::<()>().await;
        });
        tasks.spawn(async {});
        assert_eq!(tasks.shutdown(Duration::from_secs(5)).await, 1);
        assert_eq!(Arc::strong_count(&held), 1);
        assert!(tasks.is_empty());
    }

    #[tokio::test]
    async fn dropping_the_owner_aborts_its_tasks() {
        let tasks = Tasks::new();
        let (send, receive) = oneshot::channel::<()>();
        tasks.spawn(async move {
            let _send = send;
            pending::<()>().await;
        });
        drop(tasks);
        receive.await.expect_err("the sender goes with the task");
    }

    #[tokio::test]
    async fn ended_and_panicked_tasks_are_forgotten() {
        let tasks = Tasks::new();
        for number in 0..100 {
            tasks.spawn(async move { assert!(number != 50, "one of them panics") });
            while !tasks.is_empty() {
                tokio::task::yield_now().await;
            }
        }
        assert_eq!(tasks.shutdown(Duration::ZERO).await, 0);
    }

    #[tokio::test(start_paused = true)]
    async fn two_shutdowns_at_once_both_return() {
        let tasks = Arc::new(Tasks::new());
        tasks.spawn(seam::sleep(Duration::from_secs(1)));
        let limit = Duration::from_secs(3600);
        let start = seam::now();
        tokio::join!(tasks.shutdown(limit), tasks.shutdown(limit));
        assert_eq!(seam::now().since(start).as_secs(), 1);
    }
}
