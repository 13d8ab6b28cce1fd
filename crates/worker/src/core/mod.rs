//! What a worker decides, as a value: legs, their pages, their leases, and what to tell whom.
//!
//! Commands and finished steps go in; plans, frames, follow events and orders to pull come out. Time is an
//! argument. The rim (`shared`, `session`, `lender`, `pull`) holds the one lock and carries the output away.

mod absorb;
mod borrow;
mod legs;
mod pulls;
mod speed;
mod start;
#[cfg(test)]
mod tests;
mod whole;

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use tandem_batching::{Batcher, Outcome, Plan, SequenceId};
use tandem_kv_cache::{KvCache, Verdict};
use tandem_proto::v1;
use tandem_types::{
    Attempt, Choice, ClaimId, Epoch, Export, Incarnation, KvForm, KvIdentity, LeaseId, RequestId, Role, Time,
    WorkerId, WorkerState,
};

pub use borrow::{Costs, Holder};
use legs::Leg;
pub use legs::{Finish, LegReport, PullOrder, PullSource, StageChange, StageName};
pub use pulls::PullFailure;
use speed::Speed;
pub use speed::measure;
pub use whole::{CompletedPage, PageSum};

/// One Session stream, numbered by this worker.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SessionId(pub u64);

/// What never changes while the worker runs.
#[derive(Clone, Debug)]
pub struct Constants {
    /// The worker's name.
    pub id: WorkerId,
    /// This start of its process.
    pub incarnation: Incarnation,
    /// `host:port` of its Lender service.
    pub lender: String,
    /// How peers reach its memory, best first.
    pub exports: Vec<Export>,
    /// What its KV is.
    pub identity: KvIdentity,
    /// How it is arranged.
    pub form: KvForm,
    /// Longest sequence, in tokens.
    pub context_tokens: u32,
    /// Number of KV groups.
    pub groups: u32,
    /// Legs that may wait or run at once; more are refused as overloaded.
    pub legs_max: usize,
    /// Whether numerics are part of the block hashes and must be equal for a hand-off.
    pub strict: bool,
}

/// Something for the rim to do. In order.
#[derive(Debug)]
pub enum Output {
    /// An event of a leg, for the frame of its session.
    Event { session: SessionId, leg: u32, event: v1::event::Event },
    /// An event for whoever follows under this claim; `last` closes the stream.
    Follow { claim: ClaimId, event: v1::follow_event::Event, last: bool },
    /// Start pulling; exactly one `pull_done` or `pull_failed` comes back.
    Pull(Box<PullOrder>),
    /// Stop this pull; `pull_failed` comes back once nothing writes any more.
    StopPull(SequenceId),
    /// End this session: a newer one of the same router has come.
    CloseSession(SessionId),
    /// A leg enters a stage: for spans.
    Stage(Box<StageChange>),
    /// A leg's pull has ended well: for spans.
    Transferred { sequence: SequenceId, transfer: Transfer },
    /// A leg is over: for metrics and spans.
    Left(LegReport),
}

/// What a pull that ended well moved, and what of it the owner's computing did not hide.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Transfer {
    /// Bytes that came.
    pub bytes: u64,
    /// Time in which bytes were moving.
    pub busy: Duration,
    /// Bytes that came after the owner had sealed the lease.
    pub exposed_bytes: u64,
    /// From the seal to the verdict.
    pub exposed: Duration,
}

/// A router's stream, as far as decisions go.
#[derive(Debug)]
struct Session {
    router: String,
    incarnation: u64,
    admitted: u64,
}

/// How much work a worker has. Counts of sequences, tokens and blocks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Load {
    /// Sequences in the batch.
    pub running: u32,
    /// Sequences not yet admitted, pulls included.
    pub waiting: u32,
    /// Prompt tokens of these, not yet computed.
    pub waiting_tokens: u64,
    /// Blocks of the pool.
    pub blocks_total: u32,
    /// Blocks that nobody uses and nothing is cached in.
    pub blocks_free: u32,
    /// Blocks that only the prefix cache refers to.
    pub blocks_cached: u32,
    /// Blocks in use.
    pub blocks_in_use: u32,
    /// Leases granted and not over.
    pub leases: u32,
}

/// The whole of a worker's state but its engine.
pub struct Core {
    constants: Arc<Constants>,
    role: Role,
    epoch: Epoch,
    draining: bool,
    kv: KvCache,
    batcher: Batcher,
    legs: BTreeMap<SequenceId, Leg>,
    /// Legs by choice, for superseding; by the session's short name, for commands; by lease, for its end.
    by_choice: HashMap<(RequestId, Choice), SequenceId>,
    by_name: HashMap<(SessionId, u32), SequenceId>,
    by_lease: HashMap<LeaseId, SequenceId>,
    /// Hand-offs to take over that wait for room, oldest first.
    waiting_pulls: VecDeque<SequenceId>,
    /// First-token legs that wait for room under the leased share, oldest first.
    waiting_grants: VecDeque<SequenceId>,
    sessions: BTreeMap<SessionId, Session>,
    next_session: u64,
    next_sequence: u64,
    sums: whole::PageSums,
    costs: Costs,
    speed: Speed,
    /// Draws lease ids; the seam of randomness.
    draw_id: Box<dyn FnMut() -> u128 + Send>,
    output: Vec<Output>,
}

impl Core {
    /// A worker with nothing to do. `draw_id` gives 128 fresh random bits.
    pub fn new(
        constants: Constants,
        role: Role,
        kv: KvCache,
        batcher: Batcher,
        draw_id: Box<dyn FnMut() -> u128 + Send>,
    ) -> Core {
        let pages = kv.counts().total;
        Core {
            sums: whole::PageSums::new(constants.groups, pages),
            costs: Costs::new(constants.form.page_bytes.iter().sum()),
            speed: Speed::new(batcher.config().token_budget, batcher.config().rows_max),
            constants: Arc::new(constants),
            role,
            epoch: Epoch(0),
            draining: false,
            kv,
            batcher,
            legs: BTreeMap::new(),
            by_choice: HashMap::new(),
            by_name: HashMap::new(),
            by_lease: HashMap::new(),
            waiting_pulls: VecDeque::new(),
            waiting_grants: VecDeque::new(),
            sessions: BTreeMap::new(),
            next_session: 1,
            next_sequence: 1,
            draw_id,
            output: Vec::new(),
        }
    }

    /// What never changes.
    pub fn constants(&self) -> &Arc<Constants> {
        &self.constants
    }

    /// The role of now.
    pub fn role(&self) -> Role {
        self.role
    }

    /// How often the role has changed.
    pub fn epoch(&self) -> Epoch {
        self.epoch
    }

    /// `ready` or `draining`.
    pub fn state(&self) -> WorkerState {
        if self.draining { WorkerState::Draining } else { WorkerState::Ready }
    }

    /// Takes another role. Running work, leases and cancels outlive it; only new Starts compare the epoch.
    pub fn change_role(&mut self, role: Role) {
        self.role = role;
        self.epoch = self.epoch.next();
    }

    /// Takes no new work from now on.
    pub fn drain(&mut self) {
        self.draining = true;
    }

    /// Legs that hold or wait for anything.
    pub fn leg_count(&self) -> usize {
        self.legs.len()
    }

    /// How much work there is.
    pub fn load(&self) -> Load {
        let counts = self.kv.counts();
        let queued = self.waiting_pulls.len() + self.waiting_grants.len();
        let queued_tokens: u64 = self
            .waiting_grants
            .iter()
            .filter_map(|id| self.legs.get(id))
            .map(|leg| u64::from(leg.known_tokens))
            .sum();
        Load {
            running: self.batcher.running() as u32,
            waiting: (self.batcher.waiting() + queued) as u32,
            waiting_tokens: self.batcher.waiting_tokens() + queued_tokens,
            blocks_total: counts.total,
            blocks_free: counts.free,
            blocks_cached: counts.cached,
            blocks_in_use: counts.in_use,
            leases: self.kv.lease_count() as u32,
        }
    }

    /// Up to which message of each router's session this worker's load counts.
    pub fn admitted(&self) -> impl Iterator<Item = (&str, u64)> {
        self.sessions.values().map(|s| (s.router.as_str(), s.admitted))
    }

    /// What the rim has to do, in order.
    pub fn take_output(&mut self) -> Vec<Output> {
        std::mem::take(&mut self.output)
    }

    // ------------------------------------------------------------------ sessions

    /// A router's new stream. It ends the predecessor of the same start of that router.
    pub fn open_session(&mut self, router: &str, incarnation: u64, now: Time) -> SessionId {
        let predecessors: Vec<SessionId> = self
            .sessions
            .iter()
            .filter(|(_, s)| s.router == router && s.incarnation == incarnation)
            .map(|(id, _)| *id)
            .collect();
        for id in predecessors {
            self.output.push(Output::CloseSession(id));
            self.close_session(id, now);
        }
        let id = SessionId(self.next_session);
        self.next_session += 1;
        self.sessions.insert(id, Session { router: router.to_owned(), incarnation, admitted: 0 });
        id
    }

    /// The stream is gone: all its legs are cancelled and their leases end.
    pub fn close_session(&mut self, session: SessionId, now: Time) {
        if self.sessions.remove(&session).is_none() {
            return;
        }
        let legs: Vec<SequenceId> =
            self.legs.iter().filter(|(_, leg)| leg.session == session).map(|(id, _)| *id).collect();
        for id in legs {
            self.end_leg(id, Finish::Cancelled, now);
        }
        self.settle(now);
    }

    /// Everything up to this message of the session is counted in `load`.
    pub fn note_admitted(&mut self, session: SessionId, sequence: u64) {
        if let Some(session) = self.sessions.get_mut(&session) {
            session.admitted = sequence;
        }
    }

    /// Up to which message of this session `load` counts.
    pub fn admitted_of(&self, session: SessionId) -> u64 {
        self.sessions.get(&session).map_or(0, |s| s.admitted)
    }

    // ------------------------------------------------------------------ commands of a session

    /// Ends a leg and everything it holds. Unknown legs are fine: they have ended by themselves.
    pub fn cancel(&mut self, session: SessionId, leg: u32, now: Time) {
        if let Some(&id) = self.by_name.get(&(session, leg)) {
            self.end_leg(id, Finish::Cancelled, now);
            self.settle(now);
        }
    }

    /// The client reads slowly: no further token for now.
    pub fn pause(&mut self, session: SessionId, leg: u32, paused: bool) {
        if let Some(&id) = self.by_name.get(&(session, leg)) {
            if paused {
                self.batcher.pause(id);
            } else {
                self.batcher.resume(id);
            }
        }
    }

    /// The router still wants these leases.
    pub fn renew(&mut self, leases: impl Iterator<Item = LeaseId>, now: Time) {
        for lease in leases {
            self.kv.renew_lease(lease, now);
        }
    }

    /// The router ends a lease.
    pub fn end_lease(&mut self, lease: LeaseId, now: Time) {
        self.kv.cancel_lease(lease, now);
        self.settle(now);
    }

    // ------------------------------------------------------------------ steps

    /// What the engine should compute next, if anything.
    pub fn plan(&mut self, now: Time) -> Option<Plan> {
        self.expire(now);
        self.begin_waiting_pulls(now);
        self.begin_waiting_grants(now);
        self.set_pace();
        let plan = self.batcher.plan(&mut self.kv, now);
        self.absorb(now);
        plan
    }

    /// A step is done. What `completing` named has been zeroed and summed: `sums`, empty where checksums are off.
    pub fn collected(&mut self, outcome: Outcome, sums: &[PageSum], now: Time) {
        self.note_sums(sums.iter().copied());
        self.batcher.apply(&mut self.kv, outcome, now);
        self.absorb(now);
    }

    /// A step failed as a whole.
    pub fn step_failed(&mut self, ticket: u64, now: Time) {
        self.batcher.fail(&mut self.kv, ticket, now);
        self.absorb(now);
    }

    /// When something is due although no message came: a lease, a deadline.
    pub fn next_deadline(&self) -> Option<Time> {
        let legs = self.legs.values().map(|leg| leg.deadline).min();
        let due = [legs, self.kv.next_expiry(), self.batcher.next_deadline(), self.next_roomless()];
        due.into_iter().flatten().min()
    }

    /// Ends what is overdue.
    pub fn expire(&mut self, now: Time) {
        self.kv.expire(now);
        let overdue: Vec<SequenceId> =
            self.legs.iter().filter(|(_, leg)| leg.deadline <= now).map(|(id, _)| *id).collect();
        for id in overdue {
            self.end_leg(
                id,
                Finish::Failed(v1::FailReason::Deadline, "the request's deadline has passed".into()),
                now,
            );
        }
        self.refuse_roomless(now);
        self.settle(now);
    }

    /// Idle is the cheapest time to find a leak.
    pub fn check_books(&self) {
        self.kv.check_books();
        assert_eq!(self.by_name.len(), self.legs.len(), "every leg has exactly one name");
        assert!(self.by_lease.len() <= self.legs.len(), "a lease without a leg");
    }

    // ------------------------------------------------------------------ the owner's side of hand-offs

    /// A puller claims a lease. Its events come as `Output::Follow` under `claim`.
    pub fn follow(&mut self, lease: LeaseId, attempt: Attempt, claim: ClaimId, now: Time) -> bool {
        let claimed = self.kv.follow(lease, attempt, claim, now).is_ok();
        self.settle(now);
        claimed
    }

    /// The puller's stream shows life.
    pub fn renew_claim(&mut self, claim: ClaimId, now: Time) {
        self.kv.renew_claim(claim, now);
    }

    /// The puller's stream is gone or it refused: the lease waits for the next.
    pub fn unfollow(&mut self, claim: ClaimId, now: Time) {
        self.kv.unfollow(claim, now);
        self.settle(now);
    }

    /// The verdict on a pull.
    pub fn end_claim(&mut self, lease: LeaseId, claim: ClaimId, complete: bool, now: Time) -> Verdict {
        let verdict = self.kv.end(lease, claim, complete, now);
        self.settle(now);
        verdict
    }

    /// Bookkeeping of pages, to look at.
    pub fn kv_ref(&self) -> &KvCache {
        &self.kv
    }

    /// Bookkeeping of pages, for the gate that lets a transport read under a claim.
    pub fn kv(&mut self) -> &mut KvCache {
        &mut self.kv
    }
}
