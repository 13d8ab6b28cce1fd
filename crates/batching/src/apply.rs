//! What collected steps mean.

use tandem_kv_cache::KvCache;
use tandem_types::Time;

use crate::batcher::{Batcher, Event, Flight, FlightRow};
use crate::{Outcome, RowOutcome, SequenceId};

/// Positions that the oldest plan in flight computes for a sequence.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Completing {
    /// Whose.
    pub id: SequenceId,
    /// Tokens confirmed before.
    pub from: u32,
    /// Tokens confirmed when the plan is collected.
    pub to: u32,
    /// Whether it draws a token.
    pub sample: bool,
}

impl Batcher {
    /// What the oldest plan in flight will confirm, for those that are still here: what has to be done to pages
    /// between their last write and the word that they are whole.
    pub fn completing(&self) -> impl Iterator<Item = Completing> {
        let rows = self.in_flight.front().into_iter().flat_map(|flight| &flight.rows);
        rows.filter_map(|row| {
            let sequence = self.sequences.get(&row.id).filter(|s| s.slot == Some(row.slot))?;
            let (from, to) = (sequence.computed, sequence.computed.max(row.end));
            Some(Completing { id: row.id, from, to, sample: row.sample })
        })
    }

    /// Takes in the outcome of the oldest plan in flight.
    ///
    /// # Panics
    /// If it is another plan's, or has not one row per row.
    pub fn apply(&mut self, kv: &mut KvCache, outcome: Outcome, now: Time) {
        let flight = self.land(outcome.id, kv, now);
        assert_eq!(flight.rows.len(), outcome.rows.len(), "an outcome has a row per row of its plan");
        for (row, result) in flight.rows.iter().zip(outcome.rows) {
            assert_eq!(row.slot, result.slot, "outcome rows are in the plan's order");
            self.apply_row(row, result, kv, now);
        }
        self.debug_check_books();
    }

    /// The oldest plan failed as a whole: so did its sequences.
    pub fn fail(&mut self, kv: &mut KvCache, plan: u64, now: Time) {
        let flight = self.land(plan, kv, now);
        for row in &flight.rows {
            self.leave(row.id, row.slot, Event::Failed { id: row.id }, kv, now);
        }
        self.debug_check_books();
    }

    /// The plan is no longer in flight: pages that only it kept go back.
    fn land(&mut self, plan: u64, kv: &mut KvCache, now: Time) -> Flight {
        let flight = self.in_flight.pop_front().expect("an outcome follows a plan");
        assert_eq!(flight.id, plan, "plans are collected in order");
        let (done, kept) =
            std::mem::take(&mut self.graveyard).into_iter().partition(|(last, _)| *last <= plan);
        self.graveyard = kept;
        let done: Vec<_> = done;
        for (_, table) in done {
            kv.close(table, now);
        }
        flight
    }

    fn apply_row(&mut self, row: &FlightRow, result: RowOutcome, kv: &mut KvCache, now: Time) {
        let id = row.id;
        // A sequence that has left meanwhile, or came back under the same id with another slot.
        let Some(sequence) = self.sequences.get_mut(&id).filter(|s| s.slot == Some(row.slot)) else { return };
        sequence.computed = sequence.computed.max(row.end);
        let table = sequence.table.as_mut().expect("sequences in flight have pages");
        kv.publish(table, sequence.chain.hashes(), sequence.computed);
        self.events.push(Event::Computed { id, tokens: sequence.computed });
        if let Some((position, count)) = row.scores {
            if result.scored.len() < count {
                return self.leave(id, row.slot, Event::Failed { id }, kv, now);
            }
            self.events.push(Event::Scored { id, position, scores: result.scored });
        }
        if !row.sample {
            return;
        }
        sequence.draws_in_flight -= 1;
        let Some(sampled) = result.sampled else {
            return self.leave(id, row.slot, Event::Failed { id }, kv, now);
        };
        let token = sampled.token;
        let position = sequence.known() - sequence.spec.prompt_tokens;
        sequence.spec.tokens.push(token);
        sequence.chain.extend(&[token]);
        let finish = sequence.finish(token, self.config.context_tokens);
        let usage = sequence.usage();
        self.events.push(Event::Token { id, position, sampled });
        if let Some(reason) = finish {
            self.leave(id, row.slot, Event::Finished { id, reason, usage }, kv, now);
        }
    }

    fn leave(&mut self, id: SequenceId, slot: u32, event: Event, kv: &mut KvCache, now: Time) {
        if self.sequences.get(&id).is_some_and(|s| s.slot == Some(slot)) {
            self.remove(id, event, kv, now);
        }
    }
}
