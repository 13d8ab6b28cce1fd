//! Whether a worker whose steps fail gets work: a few failures in a row, and it is left alone for a moment.

use std::time::Duration;

use tandem_types::Time;

/// So many failures in a row open it.
const FAILURES: u32 = 3;
/// For so long. Then one more failure is enough, so a worker that does not mend costs a try each time.
const PAUSE: Duration = Duration::from_secs(1);

/// The failures of one worker, as values.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Breaker {
    in_a_row: u32,
    until: Time,
}

impl Breaker {
    /// A step failed.
    pub(crate) fn failed(&mut self, now: Time) {
        self.in_a_row = self.in_a_row.saturating_add(1);
        if self.in_a_row >= FAILURES {
            self.until = now + PAUSE;
        }
    }

    /// A step brought what it should.
    pub(crate) fn succeeded(&mut self) {
        *self = Breaker::default();
    }

    /// Whether it is to be left alone now.
    pub(crate) fn is_open(&self, now: Time) -> bool {
        now < self.until
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn failures_in_a_row_open_it_for_a_second_and_a_success_closes_it() {
        let (mut breaker, at) = (Breaker::default(), Time::from_millis);
        breaker.failed(at(0));
        breaker.failed(at(1));
        assert!(!breaker.is_open(at(2)));
        breaker.succeeded();
        breaker.failed(at(3));
        breaker.failed(at(4));
        assert!(!breaker.is_open(at(5)), "not in a row");
        breaker.failed(at(6));
        assert!(breaker.is_open(at(7)) && !breaker.is_open(at(1006)));
        breaker.failed(at(1010));
        assert!(breaker.is_open(at(1011)), "once more is enough");
        breaker.succeeded();
        assert!(!breaker.is_open(at(1012)));
    }
}
