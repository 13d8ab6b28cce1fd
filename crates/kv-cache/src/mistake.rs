//! Mistakes made on purpose, so that a test can show that the model checker would notice them.
//!
//! Without the feature `model`, nobody can ask for one and the code that would make it is not there.

/// A rule that is broken.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Mistake {
    /// An `End` under a superseded claim ends the lease.
    FreeAtSupersededEnd,
    /// The verdict does not look whether the pages still are what they were.
    NoGenerationCheck,
    /// The verdict is forgotten as soon as it is given.
    VerdictForgotten,
    /// A renewal looks at the time to live only.
    RenewalPastDeadline,
    /// The puller does not wait until pages are ready, and the owner does not insist.
    ReadingBeforeReady,
}

#[cfg(feature = "model")]
impl Mistake {
    /// All of them.
    pub const ALL: [Mistake; 5] = [
        Mistake::FreeAtSupersededEnd,
        Mistake::NoGenerationCheck,
        Mistake::VerdictForgotten,
        Mistake::RenewalPastDeadline,
        Mistake::ReadingBeforeReady,
    ];
}

/// The mistake that a state machine makes: none, in every build but the model checker's.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub(crate) struct Mistaken {
    #[cfg(feature = "model")]
    mistake: Option<Mistake>,
}

impl Mistaken {
    #[cfg(feature = "model")]
    pub(crate) fn makes(self, mistake: Mistake) -> bool {
        self.mistake == Some(mistake)
    }

    #[cfg(not(feature = "model"))]
    pub(crate) const fn makes(self, _: Mistake) -> bool {
        false
    }
}

#[cfg(feature = "model")]
impl From<Mistake> for Mistaken {
    fn from(mistake: Mistake) -> Mistaken {
        Mistaken { mistake: Some(mistake) }
    }
}
