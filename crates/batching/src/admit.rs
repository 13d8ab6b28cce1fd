//! Two decisions: who gets pages (does it fit in memory?), and what goes into the next step (does it fit in
//! the budget?).

use tandem_kv_cache::KvCache;
use tandem_types::{BLOCK_TOKENS, FinishReason, Time};

use crate::batcher::{Batcher, Event, Flight, FlightRow};
use crate::{Input, Plan, Row, SequenceId, SlotOpen};

impl Batcher {
    /// The next step, or `None` if there is nothing to compute or as many plans are in flight as may be.
    pub fn plan(&mut self, kv: &mut KvCache, now: Time) -> Option<Plan> {
        if self.in_flight.len() > self.config.depth as usize {
            return None;
        }
        self.admit(kv, now);
        let chosen = self.choose(kv, now);
        if chosen.is_empty() {
            return None;
        }
        let close = self.slots.take_closable(self.in_flight.front().map(|flight| flight.id));
        let mut plan = Plan { id: self.next_plan, close, ..Plan::default() };
        self.next_plan += 1;
        let mut rows = Vec::with_capacity(chosen.len());
        for (id, count) in chosen {
            rows.push(self.submit_row(id, count, &mut plan));
        }
        plan.same_shape_steps = self.same_shape_steps(&plan);
        self.slots.give_back(&plan.close);
        self.in_flight.push_back(Flight { id: plan.id, rows });
        Some(plan)
    }

    fn by_age(&self, keep: impl Fn(&crate::sequence::Sequence) -> bool) -> Vec<SequenceId> {
        let mut ids: Vec<_> =
            self.sequences.values().filter(|s| keep(s)).map(|s| (s.age(), s.spec.id)).collect();
        ids.sort_unstable();
        ids.into_iter().map(|(_, id)| id).collect()
    }

    /// Gives pages to waiting sequences, the oldest first. Nobody passes an older one that waits for memory.
    fn admit(&mut self, kv: &mut KvCache, now: Time) {
        let mut running = self.running();
        if running == self.sequences.len() {
            return;
        }
        let context = self.config.context_tokens;
        for id in self.by_age(|s| s.table.is_none() && !s.paused) {
            if running >= self.config.rows_max as usize {
                return;
            }
            let sequence = self.sequences.get_mut(&id).expect("listed above");
            let known = sequence.known();
            let room = if kv.fits_ever(sequence.wanted_room(context)) {
                sequence.wanted_room(context)
            } else if kv.fits_ever(known) {
                known
            } else {
                let sequence = self.sequences.remove(&id).expect("listed above");
                self.bury(sequence, kv, now);
                self.events.push(Event::Rejected { id });
                continue;
            };
            let Ok((table, cached)) = kv.open(sequence.chain.hashes(), known, room, now) else { return };
            sequence.table = Some(table);
            sequence.computed = cached;
            sequence.submitted = cached;
            sequence.cached = cached;
            running += 1;
            self.events.push(Event::Admitted { id, cached_tokens: cached });
        }
    }

    /// Which sequences get how many positions: decodes first, then prompts, the oldest first of each.
    fn choose(&mut self, kv: &mut KvCache, now: Time) -> Vec<(SequenceId, u32)> {
        let context = self.config.context_tokens;
        let (mut budget, rows_max) = (self.config.token_budget, self.config.rows_max as usize);
        let mut chosen = Vec::new();
        for id in self.by_age(|s| s.wants_row(context) && s.gap() == 1) {
            if budget == 0 || chosen.len() == rows_max {
                break;
            }
            if self.make_room(id, 1, kv, now, &mut chosen) {
                chosen.push((id, 1));
                budget = self.config.token_budget - chosen.len() as u32;
            }
        }
        for id in self.by_age(|s| s.wants_row(context) && s.gap() > 1) {
            if budget == 0 || chosen.len() == rows_max {
                break;
            }
            let Some(sequence) = self.sequences.get(&id) else { continue };
            // A prompt has its pages from admission; only tokens drawn before may need more.
            let count = sequence.gap().min(budget);
            let decodes = chosen.len();
            if self.make_room(id, count, kv, now, &mut chosen) {
                chosen.push((id, count));
                budget -= count;
            }
            // Rows that were preempted for it give their budget back.
            budget += (decodes + 1).saturating_sub(chosen.len()) as u32;
        }
        chosen
    }

    /// Sees to it that the sequence's pages hold `count` more positions, preempting the youngest if need be.
    /// False if it gets no row this time.
    fn make_room(
        &mut self,
        id: SequenceId,
        count: u32,
        kv: &mut KvCache,
        now: Time,
        chosen: &mut Vec<(SequenceId, u32)>,
    ) -> bool {
        loop {
            let Some(sequence) = self.sequences.get_mut(&id) else { return false };
            let wanted = sequence.submitted + count;
            if sequence.room() >= wanted {
                return true;
            }
            let table = sequence.table.as_mut().expect("only admitted sequences get rows");
            if kv.grow(table, wanted).is_ok() {
                return true;
            }
            let Some(victim) = self.youngest_preemptible() else { return false };
            if victim == id && self.is_alone(id, kv) {
                // Nobody else holds anything: waiting would be for ever.
                self.end_by_length(id, kv, now);
                return false;
            }
            if !self.graveyard.is_empty() {
                // Pages are on their way back with a plan in flight.
                return false;
            }
            let sequence = self.sequences.remove(&victim).expect("it was found among them");
            self.bury(sequence, kv, now);
            self.events.push(Event::Preempted { id: victim });
            chosen.retain(|(other, _)| *other != victim);
        }
    }

    /// Paused ones first, then the youngest; never one that is granted.
    fn youngest_preemptible(&self) -> Option<SequenceId> {
        let running = self.sequences.values().filter(|s| s.table.is_some() && !s.leased);
        running.max_by_key(|s| (s.paused, s.age())).map(|s| s.spec.id)
    }

    /// Whether all pages in use are this sequence's own.
    fn is_alone(&self, id: SequenceId, kv: &KvCache) -> bool {
        let own = self.sequences[&id].room() / BLOCK_TOKENS;
        kv.counts().in_use <= own && self.graveyard.is_empty()
    }

    fn end_by_length(&mut self, id: SequenceId, kv: &mut KvCache, now: Time) {
        let sequence = self.sequences.get(&id).expect("callers have looked it up");
        if sequence.draws_in_flight > 0 {
            return; // its last token is not known yet
        }
        let usage = sequence.usage();
        let sequence = self.sequences.remove(&id).expect("looked up above");
        self.bury(sequence, kv, now);
        self.events.push(Event::Finished { id, reason: Some(FinishReason::Length), usage });
    }

    /// Adds a sequence's row to the plan and counts it as submitted.
    fn submit_row(&mut self, id: SequenceId, count: u32, plan: &mut Plan) -> FlightRow {
        let sequence = self.sequences.get_mut(&id).expect("chosen sequences exist");
        let slot = *sequence.slot.get_or_insert_with(|| {
            let slot = self.slots.take();
            let (spec, stop) = (&sequence.spec, &sequence.spec.stop);
            plan.open.push(SlotOpen {
                slot,
                tokens: spec.tokens.clone(),
                prompt_tokens: spec.prompt_tokens,
                sampling: spec.sampling.clone(),
                choice: spec.choice,
                stop_suppress: stop.eos.iter().chain(&stop.stop_token_ids).copied().collect(),
                min_tokens: stop.min_tokens,
            });
            slot
        });
        let (start, end) = (sequence.submitted, sequence.submitted + count);
        let input = if end <= sequence.known() {
            Input::Known(sequence.spec.tokens[start as usize..end as usize].to_vec())
        } else {
            assert_eq!(count, 1, "only the next token can be unknown");
            Input::Previous
        };
        let sample = end == sequence.upper();
        let table = sequence.table.as_ref().expect("chosen sequences are admitted");
        let blocks = tandem_types::blocks_for(end) as usize;
        let groups = table.groups();
        let pages = (0..groups).map(|g| table.pages(g)[..blocks].iter().map(|p| p.page).collect());
        plan.rows.push(Row { slot, start, count, input, pages: pages.collect(), sample });
        sequence.submitted = end;
        sequence.draws_in_flight += u32::from(sample);
        sequence.draws += u32::from(sample);
        sequence.last_plan = Some(plan.id);
        FlightRow { id, slot, end, sample }
    }

    fn same_shape_steps(&self, plan: &Plan) -> u32 {
        let context = self.config.context_tokens;
        let all_decode = plan.rows.iter().all(|row| row.count == 1 && row.sample);
        if !all_decode || plan.rows.len() < self.sequences.len() {
            return 0;
        }
        let steps = self.sequences.values().map(|s| s.draws_left(context).min(s.room() - s.submitted));
        steps.min().unwrap_or(0)
    }
}
