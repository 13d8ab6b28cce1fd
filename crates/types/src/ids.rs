//! Names of things: requests, workers, leases, blocks.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// A model token. The only thing that *token* means in this project.
pub type TokenId = u32;

/// Why a text is not the id it was taken for.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{text:?} is not a {what}; expected {expected}")]
pub struct ParseError {
    /// The text that was read.
    pub text: String,
    /// The kind of id wanted.
    pub what: &'static str,
    /// What would have been right.
    pub expected: &'static str,
}

macro_rules! hex_id {
    ($(#[$doc:meta])* $name:ident, $int:ty, $digits:literal, $what:literal) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(pub $int);

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!("{:0", $digits, "x}"), self.0)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Display::fmt(self, f)
            }
        }

        impl FromStr for $name {
            type Err = ParseError;

            fn from_str(text: &str) -> Result<Self, ParseError> {
                <$int>::from_str_radix(text, 16).map($name).map_err(|_| ParseError {
                    text: text.to_owned(),
                    what: $what,
                    expected: concat!("up to ", $digits, " hexadecimal digits"),
                })
            }
        }

        impl Serialize for $name {
            fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.collect_str(self)
            }
        }

        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
            }
        }
    };
}

hex_id!(
    /// What a client asked for, named by the router that took it in: 128 random bits.
    RequestId, u128, "32", "request id"
);
hex_id!(
    /// One lease on KV pages: 128 random bits drawn by the owner.
    LeaseId, u128, "32", "lease id"
);
hex_id!(
    /// One puller's hold on a lease: 128 random bits drawn by the owner when `Follow` opens.
    ClaimId, u128, "32", "claim id"
);
hex_id!(
    /// One start of a process: random, so that a restarted worker is never taken for its predecessor.
    Incarnation, u64, "16", "incarnation"
);
hex_id!(
    /// The chained hash of a block of tokens and everything before it.
    BlockHash, u128, "32", "block hash"
);

/// Which of a request's `n` answers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Choice(pub u32);

/// One `Start` of one choice; numbers rise with every `Start` of that choice, beginning at 1.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Attempt(pub u32);

/// An attempt that is live on a worker.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct LegKey {
    /// The request.
    pub request: RequestId,
    /// Which of its choices.
    pub choice: Choice,
    /// Which Start of that choice.
    pub attempt: Attempt,
}

impl fmt::Display for LegKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}#{}", self.request, self.choice.0, self.attempt.0)
    }
}

/// Counts a worker's role changes since it started.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Epoch(pub u64);

impl Epoch {
    /// The epoch after this one.
    pub fn next(self) -> Epoch {
        Epoch(self.0 + 1)
    }
}

/// A worker's name in its cluster, such as `prefill-0`.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct WorkerId(pub String);

impl fmt::Display for WorkerId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl From<&str> for WorkerId {
    fn from(name: &str) -> Self {
        WorkerId(name.to_owned())
    }
}

/// What a worker prefers to do now. A preference, not a limit: any worker can do any stage it is able to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// Computes prompts and first tokens.
    Prefill,
    /// Goes on from a hand-off.
    Decode,
    /// Both, on one worker.
    Mixed,
    /// Turns images into embeddings.
    Encode,
}

impl Role {
    /// Every role, in the order in which they are shown.
    pub const ALL: [Role; 4] = [Role::Prefill, Role::Decode, Role::Mixed, Role::Encode];

    /// The word used in flags, JSON and metrics.
    pub fn as_str(self) -> &'static str {
        match self {
            Role::Prefill => "prefill",
            Role::Decode => "decode",
            Role::Mixed => "mixed",
            Role::Encode => "encode",
        }
    }
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for Role {
    type Err = ParseError;

    fn from_str(text: &str) -> Result<Role, ParseError> {
        Role::ALL.into_iter().find(|role| role.as_str() == text).ok_or_else(|| ParseError {
            text: text.to_owned(),
            what: "role",
            expected: "prefill, decode, mixed or encode",
        })
    }
}

/// A worker as it was when a route was chosen.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Target {
    /// Its name.
    pub worker: WorkerId,
    /// Which start of its process.
    pub incarnation: Incarnation,
    /// Which of its role changes; compared only when a new `Start` is admitted.
    pub epoch: Epoch,
}

/// The life of a process as operators see it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum WorkerState {
    /// Loading; not yet registered.
    Starting,
    /// Takes work.
    Ready,
    /// Missed heartbeats: gets no new work.
    Suspect,
    /// Finishes what it has, takes nothing new.
    Draining,
    /// Its streams broke and reconnecting is refused.
    Dead,
}

impl WorkerState {
    /// The word used in JSON and metrics.
    pub fn as_str(self) -> &'static str {
        match self {
            WorkerState::Starting => "starting",
            WorkerState::Ready => "ready",
            WorkerState::Suspect => "suspect",
            WorkerState::Draining => "draining",
            WorkerState::Dead => "dead",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_print_as_fixed_width_hexadecimal_and_read_back() {
        let id = Incarnation(0xab);
        assert_eq!(id.to_string(), "00000000000000ab");
        assert_eq!("00000000000000ab".parse(), Ok(id));
        assert!("xyz".parse::<LeaseId>().unwrap_err().to_string().contains("hexadecimal"));
        assert_eq!(serde_json::to_string(&BlockHash(1)).unwrap(), format!("\"{}1\"", "0".repeat(31)));
    }

    #[test]
    fn a_role_reads_back_from_its_word_and_refuses_others_by_naming_the_right_ones() {
        for role in Role::ALL {
            assert_eq!(role.as_str().parse(), Ok(role));
        }
        assert!("both".parse::<Role>().unwrap_err().to_string().contains("prefill, decode, mixed"));
    }
}
