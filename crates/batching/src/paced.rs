//! A step under a pace: all decodes, then prompts in their order, as much of them as the decodes' slack allows.

use tandem_kv_cache::KvCache;
use tandem_types::Time;

use crate::SequenceId;
use crate::batcher::Batcher;
use crate::pace::{Budget, Decode, Filling, Pace, step_seconds};
use crate::sequence::Sequence;

impl Batcher {
    /// Chooses rows and their counts. A prompt is given pages when its first tokens go into a step, not before:
    /// until then a more urgent one may come.
    pub(crate) fn choose_paced(
        &mut self,
        pace: &Pace,
        chosen: &mut Vec<(SequenceId, u32)>,
        kv: &mut KvCache,
        now: Time,
    ) {
        self.choose(Sequence::decodes, chosen, kv, now);
        let mut line = std::mem::take(&mut self.line);
        self.timely_seconds = line
            .arrange(pace, now, |id| self.sequences.get(id).filter(|s| !s.decodes()).map(Sequence::prompt));
        let (seconds, context) = self.allowed(pace, chosen, now);
        let rows = chosen.len() as u32;
        let mut filling = Filling::new(pace, seconds, rows, context);
        let decodes: u32 = chosen.iter().map(|(_, count)| count).sum();
        let mut left = self.config.token_budget.saturating_sub(decodes);
        let mut begun = Vec::new();
        for (place, &id) in line.iter().enumerate() {
            if filling.is_full() || left == 0 || chosen.len() == self.config.rows_max as usize {
                break;
            }
            let Some(sequence) = self.sequences.get(&id) else { continue };
            if sequence.paused || sequence.draws_left(self.config.context_tokens) == 0 {
                continue;
            }
            if filling.clone().take(&sequence.prompt()) == 0 {
                break;
            }
            if sequence.table.is_none() && !self.give_pages(id, kv, now) {
                if self.sequences.contains_key(&id) {
                    break; // nobody passes one that waits for memory
                }
                continue;
            }
            let sequence = &self.sequences[&id];
            let count = filling.take(&sequence.prompt()).min(left);
            left -= count;
            chosen.push((id, count));
            begun.push(place);
        }
        for place in begun {
            line.begun(place);
        }
        self.line = line;
    }

    /// Seconds that the coming step may take, and the tokens that its decodes look back on.
    fn allowed(&self, pace: &Pace, decodes: &[(SequenceId, u32)], now: Time) -> (f64, f64) {
        let rows = || decodes.iter().map(|(id, _)| &self.sequences[id]);
        let context: u64 = rows().map(|s| u64::from(s.known())).sum();
        let (Budget::Slack(_), false) = (pace.budget, decodes.is_empty()) else {
            return (f64::INFINITY, context as f64);
        };
        let least = pace.model.step(decodes.len() as f64, 0.0, context as f64);
        let targets = rows().map(|s| Decode {
            first_at: s.target.first_at,
            made: (s.known() - s.spec.prompt_tokens).saturating_sub(1),
            token_seconds: s.target.token_seconds,
        });
        (step_seconds(targets, least, pace.short_tokens, now), context as f64)
    }

    /// Pages for a prompt whose turn has come. It may be found never to fit, and is over then.
    fn give_pages(&mut self, id: SequenceId, kv: &mut KvCache, now: Time) -> bool {
        let sequence = &self.sequences[&id];
        let wanted = sequence.wanted_room(self.config.context_tokens);
        let room = if kv.fits_ever(wanted) { wanted } else { sequence.known() };
        if !kv.fits_ever(room) {
            self.end_too_large(id, kv, now);
            return false;
        }
        let Some((table, cached)) = self.open(id, room, kv, now) else { return false };
        self.admitted(id, table, cached);
        true
    }
}
