//! In-flight correction: what a worker has to do now, from a report of a while ago and what was sent since.

use std::collections::VecDeque;

use tandem_types::Time;

/// Seconds of work at a worker, kept up between its reports.
///
/// Work is taken off at the pace at which one worker does it, so that an old report neither scares nor lures
/// for ever; what was sent after the report was made is added to it.
#[derive(Clone, Debug, Default)]
pub struct Backlog {
    seconds: f64,
    at: Time,
    /// When it was sent, and how much.
    sent: VecDeque<(Time, f64)>,
}

/// Work sent is remembered for a report at most so many entries back.
const SENT_MAX: usize = 4096;

impl Backlog {
    /// Work is sent.
    pub fn send(&mut self, seconds: f64, now: Time) {
        let seconds = crate::candidate::sane_seconds(seconds);
        self.seconds = self.seconds(now) + seconds;
        self.at = self.at.max(now);
        if self.sent.len() == SENT_MAX {
            self.sent.pop_front();
        }
        self.sent.push_back((now, seconds));
    }

    /// A report comes that was made at `made` and counts all that had been sent by then.
    pub fn report(&mut self, seconds: f64, made: Time) {
        while self.sent.front().is_some_and(|(sent, _)| *sent <= made) {
            self.sent.pop_front();
        }
        self.seconds = crate::candidate::sane_seconds(seconds);
        self.at = made;
        for &(sent, seconds) in &self.sent {
            self.seconds = (self.seconds - sent.since(self.at).as_secs_f64()).max(0.0) + seconds;
            self.at = sent;
        }
    }

    /// Seconds of work there now. A time before the last known one changes nothing.
    pub fn seconds(&self, now: Time) -> f64 {
        (self.seconds - now.since(self.at).as_secs_f64()).max(0.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(ms: u64) -> Time {
        Time::from_millis(ms)
    }

    #[test]
    fn what_is_sent_after_a_report_was_made_is_added_to_it() {
        let mut backlog = Backlog::default();
        backlog.send(0.5, at(0));
        backlog.send(0.5, at(100));
        assert!((backlog.seconds(at(100)) - 0.9).abs() < 1e-9);
        // Made between the two: it counts the first only.
        backlog.report(0.45, at(50));
        assert!((backlog.seconds(at(100)) - 0.9).abs() < 1e-9);
        assert_eq!(backlog.seconds(at(5_000)), 0.0);
    }

    #[test]
    fn nonsense_is_clamped_and_time_running_backwards_changes_nothing() {
        let mut backlog = Backlog::default();
        backlog.report(f64::NEG_INFINITY, at(1000));
        backlog.send(1.0, at(2000));
        assert!((backlog.seconds(at(10)) - 1.0).abs() < 1e-9);
        backlog.send(-5.0, at(10));
        assert!((backlog.seconds(at(2000)) - 1.0).abs() < 1e-9);
        backlog.report(f64::NAN, at(3000));
        assert!(backlog.seconds(at(3000)).is_finite());
    }
}
