//! Fail points: named places at which a test can make a message late, lost, doubled or broken, or panic.
//!
//! Faults belong to the thread that armed them, as a simulated world does (`seam::Simulation`), and so to that
//! world's cluster. While nothing is armed a fail point costs one relaxed load. Nothing here blocks: who can wait
//! awaits [`pass`] or reads through [`through`], who cannot asks [`hit`].

use std::cell::RefCell;
use std::fmt;
use std::pin::Pin;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use futures_util::Stream;
use tonic::Status;

use crate::seam;

/// Every fail point and where it stands. No others can be armed.
pub const POINTS: &[(&str, &str)] = &[
    ("session.start", "router to worker: begin an attempt"),
    ("session.cancel", "router to worker: end a leg"),
    ("session.pause", "router to worker: the client reads slowly"),
    ("session.resume", "router to worker: the client reads again"),
    ("session.renew", "router to worker: keep these leases"),
    ("session.end-lease", "router to worker: end this lease"),
    ("session.beat", "router to worker: alive"),
    ("frame.granted", "worker to router: a frame with a grant"),
    ("frame.delta", "worker to router: a frame with tokens"),
    ("frame.finished", "worker to router: a frame with a finished answer"),
    ("frame.released", "worker to router: a frame with a release"),
    ("frame.refused", "worker to router: a frame with a refusal"),
    ("frame.preempted", "worker to router: a frame with a preemption"),
    ("frame.failed", "worker to router: a frame with a failure"),
    ("frame.beat", "worker to router: alive"),
    ("follow.claim", "puller to owner: a claim"),
    ("follow.beat", "puller to owner: alive"),
    ("follow.claimed", "owner to puller: the claim stands"),
    ("follow.ready", "owner to puller: pages are whole"),
    ("follow.sealed", "owner to puller: all pages and the first token are there"),
    ("follow.owner-beat", "owner to puller: alive"),
    ("follow.done", "owner to puller: the request ended here"),
    ("follow.superseded", "owner to puller: a newer attempt has the lease"),
    ("follow.lost", "owner to puller: the lease is over"),
    ("pull.request", "puller to transport: bring these pages"),
    ("pull.gate", "transport to owner: may these pages be read"),
    ("pull.completion", "transport to puller: every byte is here"),
    ("end.request", "puller to owner: the verdict, please"),
    ("end.reply", "owner to puller: the verdict"),
    ("lend.request", "borrower to holder: lend these blocks"),
    ("lend.reply", "holder to borrower: a handle to them"),
    ("engine.submit", "step loop to engine: compute this"),
    ("engine.collect", "engine to step loop: what came of it"),
    // Behind all others, so that the numbers of cases stand for the same faults as before it was there.
    ("frame.scored", "worker to router: a frame with scores of a prompt"),
];

/// What every deliberate panic says first, so that it is told from others.
pub const PANIC: &str = "fail point";

/// What happens at a fail point.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Action {
    /// The task that is there panics.
    Panic,
    /// The stream or call breaks.
    Error,
    /// The message comes 100 ms late, and all behind it.
    Late,
    /// The message comes 10 s late, and all behind it.
    VeryLate,
    /// The message is lost.
    Drop,
    /// The message comes twice.
    Double,
}

impl Action {
    /// All of them.
    pub const ALL: [Action; 6] =
        [Action::Panic, Action::Error, Action::Late, Action::VeryLate, Action::Drop, Action::Double];

    /// The word of tables and options.
    pub fn as_str(self) -> &'static str {
        match self {
            Action::Panic => "panic",
            Action::Error => "error",
            Action::Late => "100ms",
            Action::VeryLate => "10s",
            Action::Drop => "drop",
            Action::Double => "double",
        }
    }

    /// How long it makes a message wait.
    pub fn delay(self) -> Option<Duration> {
        match self {
            Action::Late => Some(Duration::from_millis(100)),
            Action::VeryLate => Some(Duration::from_secs(10)),
            _ => None,
        }
    }
}

impl fmt::Display for Action {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// A fault to come.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fault {
    /// Where; a name of [`POINTS`].
    pub point: &'static str,
    /// What.
    pub action: Action,
    /// At which of the messages that pass there, counted from 1.
    pub nth: u32,
    /// Only messages of this worker count, where the point knows whose they are.
    pub whom: Option<String>,
}

#[derive(Debug)]
struct Armed {
    fault: Fault,
    passed: u32,
    struck: Option<String>,
}

/// What became of an armed fault.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fate {
    /// Which.
    pub fault: Fault,
    /// Whom it struck, where the point knows that; `None` if it never did.
    pub struck: Option<String>,
}

/// Faults armed on all threads.
static ARMED: AtomicUsize = AtomicUsize::new(0);

thread_local! {
    static FAULTS: RefCell<Vec<Armed>> = const { RefCell::new(Vec::new()) };
}

/// Arms a fault on this thread; it strikes once.
///
/// # Panics
/// If there is no such point.
pub fn arm(fault: Fault) {
    let known = POINTS.iter().any(|(name, _)| *name == fault.point);
    assert!(known, "there is no fail point {:?}", fault.point);
    FAULTS.with_borrow_mut(|faults| faults.push(Armed { fault, passed: 0, struck: None }));
    ARMED.fetch_add(1, Ordering::Relaxed);
}

/// Takes all faults of this thread away and says what became of them.
pub fn disarm() -> Vec<Fate> {
    let faults = FAULTS.take();
    let left = faults.iter().filter(|armed| armed.struck.is_none()).count();
    ARMED.fetch_sub(left, Ordering::Relaxed);
    faults.into_iter().map(|Armed { fault, struck, .. }| Fate { fault, struck }).collect()
}

/// Whether anything is armed anywhere.
#[inline]
fn armed() -> bool {
    ARMED.load(Ordering::Relaxed) != 0
}

/// A message passes: what strikes it, if anything. A panic is the caller's to carry out, with [`panic_at`].
#[inline]
pub fn hit(point: &'static str, whom: &str) -> Option<Action> {
    if armed() { strike(point, whom) } else { None }
}

#[cold]
fn strike(point: &'static str, whom: &str) -> Option<Action> {
    debug_assert!(POINTS.iter().any(|(name, _)| *name == point), "{point} is missing in the table");
    FAULTS.with_borrow_mut(|faults| {
        let meant = |fault: &Fault| {
            fault.point == point && fault.whom.as_ref().is_none_or(|wanted| whom.is_empty() || wanted == whom)
        };
        let mut struck = None;
        for (index, armed) in faults.iter_mut().enumerate() {
            if armed.struck.is_none() && meant(&armed.fault) {
                armed.passed += 1;
                if armed.passed == armed.fault.nth {
                    struck.get_or_insert(index);
                }
            }
        }
        let armed = &mut faults[struck?];
        armed.struck = Some(whom.to_owned());
        ARMED.fetch_sub(1, Ordering::Relaxed);
        let action = armed.fault.action;
        tracing::info!(point, whom, action = action.as_str(), "a fail point strikes");
        Some(action)
    })
}

/// The deliberate panic of a fail point.
pub fn panic_at(point: &str) -> ! {
    panic!("{PANIC} {point}")
}

/// What becomes of a message, once it has waited or panicked as it should.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub enum Passage {
    /// It goes on.
    Once,
    /// It goes on, twice.
    Twice,
    /// Nobody ever hears of it.
    Lost,
    /// The stream or call breaks.
    Broken,
}

/// A message passes where it can wait.
pub async fn pass(point: &'static str, whom: &str) -> Passage {
    let Some(action) = hit(point, whom) else { return Passage::Once };
    match action {
        Action::Panic => panic_at(point),
        Action::Error => Passage::Broken,
        Action::Drop => Passage::Lost,
        Action::Double => Passage::Twice,
        Action::Late | Action::VeryLate => {
            seam::sleep(action.delay().unwrap_or_default()).await;
            Passage::Once
        }
    }
}

/// A question or an answer of a call passes: how often it comes. One that is lost never returns.
pub async fn times(point: &'static str, whom: &str) -> Result<usize, Status> {
    match pass(point, whom).await {
        Passage::Once => Ok(1),
        Passage::Twice => Ok(2),
        Passage::Lost => std::future::pending().await,
        Passage::Broken => Err(broken(point)),
    }
}

fn broken(point: &str) -> Status {
    Status::unavailable(format!("{PANIC} {point}"))
}

/// Reads messages of `whom` through the fail points that `name` gives them.
pub fn through<S, M>(inner: S, whom: &str, name: fn(&M) -> Option<&'static str>) -> Through<S, M>
where
    S: Stream<Item = Result<M, Status>> + Unpin,
{
    Through { inner, whom: whom.to_owned(), name, late: None, again: None, over: false }
}

type Wait = Pin<Box<dyn Future<Output = ()> + Send + Sync>>;

/// A stream whose messages pass fail points; made by [`through`].
pub struct Through<S, M> {
    inner: S,
    whom: String,
    name: fn(&M) -> Option<&'static str>,
    /// A message that is late; all others wait behind it.
    late: Option<(Wait, M)>,
    /// A message that comes again.
    again: Option<M>,
    over: bool,
}

impl<S, M> Stream for Through<S, M>
where
    S: Stream<Item = Result<M, Status>> + Unpin,
    M: Clone + Unpin,
{
    type Item = Result<M, Status>;

    fn poll_next(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let this = self.get_mut();
        loop {
            if this.over {
                return Poll::Ready(None);
            }
            if let Some(message) = this.again.take() {
                return Poll::Ready(Some(Ok(message)));
            }
            if let Some((wait, _)) = &mut this.late {
                std::task::ready!(wait.as_mut().poll(context));
                return Poll::Ready(this.late.take().map(|(_, message)| Ok(message)));
            }
            let next = std::task::ready!(Pin::new(&mut this.inner).poll_next(context));
            let Some(Ok(message)) = &next else { return Poll::Ready(next) };
            if !armed() {
                return Poll::Ready(next);
            }
            let Some(point) = (this.name)(message) else { return Poll::Ready(next) };
            let Some(action) = hit(point, &this.whom) else { return Poll::Ready(next) };
            let message = message.clone();
            match action {
                Action::Panic => panic_at(point),
                Action::Error => {
                    this.over = true;
                    return Poll::Ready(Some(Err(broken(point))));
                }
                Action::Drop => {}
                Action::Double => {
                    this.again = Some(message);
                    return Poll::Ready(next);
                }
                Action::Late | Action::VeryLate => {
                    let wait = seam::sleep(action.delay().unwrap_or_default());
                    this.late = Some((Box::pin(wait), message));
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use futures_util::{StreamExt, stream};

    use super::*;

    fn fault(point: &'static str, action: Action, nth: u32) -> Fault {
        Fault { point, action, nth, whom: None }
    }

    /// What comes of the messages 1 to 4 when the second meets this action, and how long that takes.
    async fn read(action: Action) -> (Vec<Option<u32>>, u128) {
        let named: fn(&u32) -> Option<&'static str> = |number| (*number != 1).then_some("follow.ready");
        arm(fault("follow.ready", action, 1));
        let start = seam::now();
        let messages = stream::iter((1..=4).map(Ok));
        let read = through(messages, "w", named).map(|message| message.ok()).collect().await;
        assert!(disarm().iter().all(|fate| fate.struck.is_some()));
        (read, seam::now().since(start).as_millis())
    }

    #[tokio::test(start_paused = true)]
    async fn a_message_is_late_lost_doubled_or_breaks_its_stream() {
        let all = vec![Some(1), Some(2), Some(3), Some(4)];
        assert_eq!(read(Action::Late).await, (all.clone(), 100));
        assert_eq!(read(Action::VeryLate).await, (all, 10_000));
        assert_eq!(read(Action::Drop).await.0, [Some(1), Some(3), Some(4)]);
        assert_eq!(read(Action::Double).await.0, [Some(1), Some(2), Some(2), Some(3), Some(4)]);
        assert_eq!(read(Action::Error).await.0, [Some(1), None]);
    }

    #[tokio::test]
    #[should_panic(expected = "fail point follow.ready")]
    async fn a_panic_strikes_the_task_that_reads() {
        read(Action::Panic).await;
    }

    #[test]
    fn the_nth_message_of_the_named_worker_is_struck_once() {
        arm(Fault { whom: Some("a".into()), ..fault("end.reply", Action::Drop, 2) });
        let hits = ["a", "b", "b", "a", "a"].map(|whom| hit("end.reply", whom));
        assert_eq!(hits, [None, None, None, Some(Action::Drop), None]);
        assert_eq!(hit("lend.reply", "a"), None);
    }

    #[tokio::test(start_paused = true)]
    async fn a_question_comes_once_twice_never_or_breaks() {
        let ask = || seam::timeout(Duration::from_secs(60), times("end.request", "w"));
        assert_eq!(ask().await.unwrap().unwrap(), 1);
        arm(fault("end.request", Action::Double, 1));
        assert_eq!(ask().await.unwrap().unwrap(), 2);
        arm(fault("end.request", Action::Drop, 1));
        assert!(ask().await.is_err(), "nobody hears of it");
        arm(fault("end.request", Action::Error, 1));
        assert!(ask().await.unwrap().is_err());
    }

    #[test]
    #[should_panic(expected = "no fail point")]
    fn an_unknown_point_cannot_be_armed() {
        arm(fault("end.everything", Action::Drop, 1));
    }
}
