//! How a round of a request ends, and what becomes of it when a worker ends it early.

use tandem_proto::v1::{self, event};
use tandem_proto::{WireError, convert};
use tandem_types::{FinishReason, WorkerId};

use crate::link::LegEvent;
use crate::request::DispatchError;

/// How a round ended.
pub(super) enum Round {
    /// The answer is complete.
    Finished(FinishReason),
    /// Place it again.
    Again(Again),
    /// The request is over with an error.
    Broken(DispatchError),
}

/// Why a request is placed again, and how.
pub(super) struct Again {
    /// Who is better avoided.
    pub(super) avoid: Option<WorkerId>,
    /// Whether work was lost by a fault.
    pub(super) fault: bool,
    /// The lease that it was to go on from may serve for the next try.
    pub(super) lease_serves: bool,
    pub(super) why: String,
}

impl Again {
    pub(super) fn new(avoid: Option<WorkerId>, fault: bool, why: String) -> Again {
        Again { avoid, fault, lease_serves: true, why }
    }
}

/// Nothing of this leg has reached the client as its own: it can be placed again.
pub(super) fn broken_before_delta(worker: &WorkerId, event: LegEvent) -> Round {
    let avoid = Some(worker.clone());
    match event {
        LegEvent::Worker(event::Event::Refused(refused)) => {
            let why = format!("{worker} refused it: {}", refused.message);
            match refused.reason() {
                v1::RefuseReason::ContextLength => {
                    Round::Broken(DispatchError::ContextLength { message: refused.message })
                }
                v1::RefuseReason::Unsupported => Round::Broken(DispatchError::Unsupported(refused.message)),
                v1::RefuseReason::Invalid => Round::Broken(DispatchError::Internal(why)),
                _ => Round::Again(Again::new(avoid, false, why)),
            }
        }
        LegEvent::Worker(event::Event::Failed(failed)) => {
            if failed.reason() == v1::FailReason::Deadline {
                return Round::Broken(DispatchError::Deadline);
            }
            use v1::FailReason as Reason;
            let why = format!("{worker} failed: {}", failed.message);
            let lease_serves =
                !matches!(failed.reason(), Reason::LeaseLost | Reason::Superseded | Reason::Corrupt);
            Round::Again(Again { lease_serves, ..Again::new(avoid, true, why) })
        }
        LegEvent::Worker(event::Event::Preempted(_)) => {
            let why = format!("{worker} preempted it");
            Round::Again(Again::new(None, false, why))
        }
        LegEvent::Lost(why) => Round::Again(Again::new(avoid, true, format!("{worker}: {why}"))),
        // Released without our cancel: the lease or the leg ended there.
        LegEvent::Worker(_) => {
            let why = format!("{worker} let go of it");
            Round::Again(Again::new(avoid, true, why))
        }
    }
}

/// The client has tokens of this leg, and this version cannot move a stream: it ends loudly.
pub(super) fn broken_after_delta(worker: &WorkerId, faults: u32, event: LegEvent) -> Round {
    let message = match event {
        LegEvent::Worker(event::Event::Failed(failed)) if failed.reason() == v1::FailReason::Deadline => {
            return Round::Broken(DispatchError::Deadline);
        }
        LegEvent::Worker(event::Event::Failed(failed)) => failed.message,
        LegEvent::Lost(why) => why.to_owned(),
        LegEvent::Worker(_) => "it let go of the request".to_owned(),
    };
    let message = format!("{worker}: {message}");
    Round::Broken(DispatchError::WorkerLost { attempts: faults + 1, message })
}

/// The round that a worker's last event ends.
pub(super) fn finish(finished: &v1::Finished) -> Round {
    match convert::read_finish(finished) {
        Ok(reason) => Round::Finished(reason),
        Err(error @ WireError { .. }) => Round::Broken(DispatchError::Internal(error.to_string())),
    }
}
