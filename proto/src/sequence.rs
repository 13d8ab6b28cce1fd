//! Numbered messages of a stream: which come for the first time, and whether one is missing.

/// Numbers the messages of a stream, or checks their numbers where they arrive.
///
/// A stream keeps its order, so a message that is missing was lost by whoever should have sent it, and no later one
/// makes up for it: the stream is to be given up, with all consequences of loss.
#[derive(Clone, Copy, Debug, Default)]
pub struct Sequence(u64);

/// Messages of a stream are missing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("messages {first} to {last} of the stream were lost")]
pub struct Gap {
    /// The first that is missing.
    pub first: u64,
    /// The last.
    pub last: u64,
}

impl Sequence {
    /// The number of the next message to send, from 1.
    pub fn number(&mut self) -> u64 {
        self.0 += 1;
        self.0
    }

    /// A message has come: false if it was here before and is to be left alone.
    pub fn take(&mut self, number: u64) -> Result<bool, Gap> {
        if number > self.0 + 1 {
            return Err(Gap { first: self.0 + 1, last: number - 1 });
        }
        let new = number == self.0 + 1;
        self.0 = self.0.max(number);
        Ok(new)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_numbered_arrives_once_and_a_gap_is_named() {
        let (mut sender, mut reader) = (Sequence::default(), Sequence::default());
        let (first, second) = (sender.number(), sender.number());
        assert_eq!(reader.take(first), Ok(true));
        assert_eq!(reader.take(first), Ok(false));
        assert_eq!(reader.take(second), Ok(true));
        assert_eq!(reader.take(5), Err(Gap { first: 3, last: 4 }));
        assert_eq!(reader.take(3), Ok(true));
    }
}
