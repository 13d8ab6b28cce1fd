//! The things that can happen. Streams, reads and messages are named by their place in the state's lists.

use crate::world::Key;

/// One thing that happens. Streams, reads and messages are named by their place in the state's lists.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    // The router.
    Place(u8),
    Decode(u8, Option<usize>),
    GiveUp(u8),
    ClientLeaves(u8),
    // Sessions, in order.
    OwnerReads,
    DecoderReads(usize),
    // The owner.
    Admit(usize),
    Submit(usize),
    Collect(usize),
    FinishWithFirst(usize),
    OwnWork,
    Append(usize),
    Leave(usize),
    Expire,
    Renew(u8),
    // Follow.
    Claim(usize),
    ClaimIsGone(usize),
    Hear(usize),
    PullerNotices(usize),
    OwnerNotices(usize),
    // Pulls.
    BeginRead(usize),
    EndRead(usize),
    ReadFails(usize),
    // Verdicts and loans.
    Judge(usize),
    LendOut(usize),
    Lent(usize),
    Late(usize, Key),
    // Nobody's doing.
    Pass,
    Flip(Option<usize>),
    // Faults.
    Crash(Who),
    BreakSession(Who),
    BreakStream(usize),
    DoubleClaim(usize),
    LoseRead(usize),
    DoubleRead(usize),
    FlipBits(usize),
    LoseEnd(usize),
    DelayEnd(usize),
    DoubleEnd(usize),
    LoseReply(usize),
    LoseLend(usize),
    DoubleLend(usize),
    LoseLent(usize),
    Distrust(u8),
    Refuse(usize, Key),
    GiveBackTwice(usize),
}

/// A process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Who {
    Router,
    Owner,
    Decoder(usize),
}

impl Action {
    /// Whether it costs one of the faults of a run.
    pub fn is_fault(self) -> bool {
        use Action::*;
        matches!(
            self,
            Crash(_)
                | BreakSession(_)
                | BreakStream(_)
                | DoubleClaim(_)
                | LoseRead(_)
                | DoubleRead(_)
                | FlipBits(_)
                | LoseEnd(_)
                | DelayEnd(_)
                | DoubleEnd(_)
                | LoseReply(_)
                | LoseLend(_)
                | DoubleLend(_)
                | LoseLent(_)
                | Distrust(_)
                | Refuse(..)
                | GiveBackTwice(_)
        )
    }
}
