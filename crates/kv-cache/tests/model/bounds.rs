//! How much of everything there is in one check.

use std::time::Duration;

use tandem_kv_cache::Mistake;
use tandem_types::Time;

/// Tokens of a prompt: two pages, the second of which is not full.
pub const TOKENS: u32 = 40;
/// Pages of a prompt.
pub const BLOCKS: u32 = 2;
/// A lease that nobody renews ends after so many ticks.
pub const TIME_TO_LIVE: Duration = Duration::from_nanos(1);
/// Every request's deadline: a renewed lease would outlive it.
pub const DEADLINE: Time = Time(2);
/// No more time passes after this; all leases are over by then.
pub const HORIZON: Time = Time(2);

/// What the second request is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Second {
    /// There is none.
    Nothing,
    /// Another prompt to hand off.
    HandOff,
    /// A prompt with the first one's beginning, computed by a decoder that asks the owner to lend it.
    Borrow,
}

/// The bounds of one check.
#[derive(Clone, Copy, Debug)]
pub struct Bounds {
    /// Pages of the owner's pool.
    pub pages: u32,
    /// What the second request is.
    pub second: Second,
    /// Faults of a run, at most.
    pub faults: u8,
    /// Role changes of a run, at most.
    pub flips: u8,
    /// Starts of each request, at most; then the router gives it up.
    pub attempts: [u8; 2],
    /// Whether clients may leave.
    pub cancels: bool,
    /// Whether decode may start before the first token.
    pub overlap: bool,
    /// Whether the owner may go on itself.
    pub adopts: bool,
    /// Whether peers read the owner's memory without asking it.
    pub one_sided: bool,
    /// Whether pages travel with checksums.
    pub checksums: bool,
    /// Whether time passes.
    pub time: bool,
    /// Whether the owner's own code may give a table back once too often.
    pub given_back_twice: bool,
    /// A rule that is broken.
    pub mistake: Option<Mistake>,
}

impl Bounds {
    /// One prompt, without faults and time.
    pub const ONE: Bounds = Bounds {
        pages: BLOCKS,
        second: Second::Nothing,
        faults: 0,
        flips: 0,
        attempts: [4, 0],
        cancels: true,
        overlap: true,
        adopts: false,
        one_sided: false,
        checksums: false,
        time: false,
        given_back_twice: false,
        mistake: None,
    };

    /// Two prompts in a pool that has room for one at a time.
    pub const TWO: Bounds = Bounds { second: Second::HandOff, attempts: [2, 2], ..Bounds::ONE };

    /// A prompt, and one with the same beginning elsewhere.
    pub const LEND: Bounds =
        Bounds { pages: 2 * BLOCKS, second: Second::Borrow, attempts: [2, 1], ..Bounds::ONE };

    /// Two prompts, and an owner whose other code may give a lease's pages away.
    pub const GIVEN_BACK: Bounds =
        Bounds { pages: 2 * BLOCKS, faults: 1, cancels: false, given_back_twice: true, ..Bounds::TWO };
}
