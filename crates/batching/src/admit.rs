//! Two decisions: who gets pages (does it fit in memory?), and what goes into the next step (does it fit in
//! the budget?).

use tandem_kv_cache::{KvCache, Table};
use tandem_types::{BLOCK_TOKENS, FinishReason, Time, Until};

use crate::batcher::{Batcher, Event, Flight, FlightRow};
use crate::sequence::Sequence;
use crate::{Input, Plan, Row, SequenceId, SlotOpen};

impl Batcher {
    /// The next step, or `None` if there is nothing to compute or as many plans are in flight as may be.
    pub fn plan(&mut self, kv: &mut KvCache, now: Time) -> Option<Plan> {
        if self.in_flight.len() > self.config.depth as usize {
            return None;
        }
        self.end_spent(kv, now);
        // Who has pages comes first: room for its growth is not given to a newcomer that would then have to go
        // again.
        let mut chosen = Vec::new();
        match self.pace {
            Some(pace) => self.choose_paced(&pace, &mut chosen, kv, now),
            None => {
                self.choose(|_| true, &mut chosen, kv, now);
                let admitted = self.admit(kv, now);
                self.choose(|s| admitted.contains(&s.spec.id), &mut chosen, kv, now);
            }
        }
        // One order whoever was admitted when, so that a plan of the same rows looks the same.
        chosen.sort_unstable_by_key(|(id, _)| {
            let sequence = &self.sequences[id];
            (sequence.gap() > 1, sequence.age())
        });
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
        self.debug_check_books();
        Some(plan)
    }

    fn by_age(&self, keep: impl Fn(&Sequence) -> bool) -> Vec<SequenceId> {
        let mut ids: Vec<_> =
            self.sequences.values().filter(|s| keep(s)).map(|s| (s.age(), s.spec.id)).collect();
        ids.sort_unstable();
        ids.into_iter().map(|(_, id)| id).collect()
    }

    /// Ends what came with nothing left to draw: `max_tokens` or the context is used up.
    fn end_spent(&mut self, kv: &mut KvCache, now: Time) {
        let context = self.config.context_tokens;
        for id in self.by_age(|s| s.draws_in_flight == 0 && s.draws_left(context) == 0) {
            self.end_by_length(id, kv, now);
        }
    }

    /// Gives pages to waiting sequences, the oldest first, and says to whom. Nobody passes an older one that
    /// waits for memory.
    fn admit(&mut self, kv: &mut KvCache, now: Time) -> Vec<SequenceId> {
        let mut admitted = Vec::new();
        self.starved = None;
        if self.waiting() == 0 {
            return admitted;
        }
        // Paused ones have pages but no rows; they keep nobody out.
        let active = self.sequences.values().filter(|s| s.table.is_some() && !s.paused).count();
        let context = self.config.context_tokens;
        for id in self.by_age(|s| s.table.is_none() && !s.paused) {
            if active + admitted.len() >= self.config.rows_max as usize {
                break;
            }
            let sequence = &self.sequences[&id];
            if self.yields_to.is_some_and(|older| older < sequence.spec.arrived) {
                break;
            }
            let wanted = sequence.wanted_room(context);
            let room = if kv.fits_ever(wanted) { wanted } else { sequence.known() };
            if !kv.fits_ever(room) {
                self.end_too_large(id, kv, now);
                continue;
            }
            let Some((table, cached)) = self.open(id, room, kv, now) else {
                self.starved = Some(id);
                break;
            };
            self.admitted(id, table, cached);
            admitted.push(id);
        }
        admitted
    }

    /// A sequence has pages, and what they hold already is computed.
    pub(crate) fn admitted(&mut self, id: SequenceId, table: Table, cached: u32) {
        let sequence = self.sequences.get_mut(&id).expect("callers have looked it up");
        sequence.table = Some(table);
        sequence.computed = cached;
        sequence.submitted = cached;
        sequence.cached = cached;
        self.events.push(Event::Admitted { id, cached_tokens: cached });
    }

    /// What has grown to more than the pool has reached its end; what came so large never begins.
    pub(crate) fn end_too_large(&mut self, id: SequenceId, kv: &mut KvCache, now: Time) {
        let sequence = &self.sequences[&id];
        if sequence.known() > sequence.spec.prompt_tokens {
            self.end_by_length(id, kv, now);
        } else {
            self.remove(id, Event::Rejected { id }, kv, now);
        }
    }

    /// Pages for a waiting sequence, if need be those of paused ones; never of one that gets rows.
    pub(crate) fn open(
        &mut self,
        id: SequenceId,
        room: u32,
        kv: &mut KvCache,
        now: Time,
    ) -> Option<(Table, u32)> {
        let sequence = &self.sequences[&id];
        let (hashes, known) = (sequence.reusable(), sequence.known());
        let grows = if sequence.spec.until == Until::FirstToken { 0 } else { self.draws_left(sequence) };
        if !self.leaves_room(kv, known, kv.cached_prefix(hashes, known), grows) {
            return None;
        }
        loop {
            let sequence = &self.sequences[&id];
            if let Ok(opened) = kv.open(sequence.reusable(), sequence.known(), room, now) {
                return Some(opened);
            }
            if !self.graveyard.is_empty() {
                return None; // pages are on their way back with a plan in flight
            }
            let victim = self.preemptible().find(|s| s.paused)?.spec.id;
            self.remove(victim, Event::Preempted { id: victim }, kv, now);
        }
    }

    /// Which of these sequences get how many positions: decodes first, then prompts, the oldest first of each.
    pub(crate) fn choose(
        &mut self,
        of: impl Fn(&Sequence) -> bool,
        chosen: &mut Vec<(SequenceId, u32)>,
        kv: &mut KvCache,
        now: Time,
    ) {
        let context = self.config.context_tokens;
        let decodes = self.by_age(|s| of(s) && s.wants_row(context) && s.gap() == 1);
        let prompts = self.by_age(|s| of(s) && s.wants_row(context) && s.gap() > 1);
        for id in decodes.into_iter().chain(prompts) {
            // From scratch each time: rows that were preempted for others give their budget back.
            let budget = self.config.token_budget - chosen.iter().map(|(_, count)| count).sum::<u32>();
            if budget == 0 || chosen.len() == self.config.rows_max as usize {
                break;
            }
            let Some(sequence) = self.sequences.get(&id) else { continue };
            let count = sequence.gap().min(budget);
            if self.make_room(id, count, kv, now) {
                chosen.push((id, count));
            }
            chosen.retain(|(id, _)| self.sequences.contains_key(id));
        }
    }

    /// Sees to it that the sequence's pages hold `count` more positions, preempting the youngest if need be.
    /// False if it gets no row this time.
    fn make_room(&mut self, id: SequenceId, count: u32, kv: &mut KvCache, now: Time) -> bool {
        loop {
            let Some(sequence) = self.sequences.get_mut(&id) else { return false };
            let wanted = sequence.submitted + count;
            let table = sequence.table.as_mut().expect("only admitted sequences get rows");
            if kv.grow(table, wanted).is_ok() {
                return true;
            }
            if !self.graveyard.is_empty() {
                return false; // pages are on their way back with a plan in flight
            }
            match self.victim(id) {
                Some(victim) => self.remove(victim, Event::Preempted { id: victim }, kv, now),
                None if self.is_alone(id, kv) => {
                    // Nobody else holds anything: waiting would be for ever.
                    self.end_by_length(id, kv, now);
                    return false;
                }
                // Leases, pulls or reads hold the rest, and they end. Giving up its own pages would help nobody.
                None => return false,
            }
        }
    }

    /// Who goes so that `id` can grow: paused ones first, then the youngest, which may be `id` itself while an
    /// older one gains by it.
    fn victim(&self, id: SequenceId) -> Option<SequenceId> {
        let mut candidates = self.preemptible();
        let victim = candidates.next()?.spec.id;
        (victim != id || candidates.next().is_some()).then_some(victim)
    }

    /// Sequences with pages that are not granted: paused ones first, then the younger before the older.
    fn preemptible(&self) -> impl Iterator<Item = &Sequence> {
        let mut running: Vec<_> =
            self.sequences.values().filter(|s| s.table.is_some() && !s.leased).collect();
        running.sort_unstable_by_key(|s| std::cmp::Reverse((s.paused, s.age())));
        running.into_iter()
    }

    /// Whether all pages in use are this sequence's own.
    fn is_alone(&self, id: SequenceId, kv: &KvCache) -> bool {
        let own = self.sequences[&id].room() / BLOCK_TOKENS;
        kv.counts().in_use <= own
    }

    fn draws_left(&self, sequence: &Sequence) -> u32 {
        sequence.draws_left(self.config.context_tokens)
    }

    /// The pool or the context holds no more of it.
    fn end_by_length(&mut self, id: SequenceId, kv: &mut KvCache, now: Time) {
        let sequence = &self.sequences[&id];
        if sequence.draws_in_flight > 0 {
            return; // its last token is not known yet
        }
        let usage = sequence.usage();
        self.remove(id, Event::Finished { id, reason: Some(FinishReason::Length), usage }, kv, now);
    }

    /// A sequence leaves with its last event.
    pub(crate) fn remove(&mut self, id: SequenceId, event: Event, kv: &mut KvCache, now: Time) {
        let sequence = self.sequences.remove(&id).expect("callers have looked it up");
        if let Event::Finished { reason: Some(_), usage, .. } = &event {
            self.lengths.observe(usage.output_tokens);
        }
        self.bury(sequence, kv, now);
        self.events.push(event);
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
        let score = sequence.score(start, end);
        let scores = score.as_ref().map(|score| (score.first, score.targets.len()));
        plan.rows.push(Row { slot, start, count, input, pages: pages.collect(), sample, score });
        sequence.submitted = end;
        sequence.draws_in_flight += u32::from(sample);
        sequence.draws += u32::from(sample);
        sequence.last_plan = Some(plan.id);
        FlightRow { id, slot, end, sample, scores }
    }

    /// While every sequence decodes, its next tokens go into the pages it has named, and nobody is at its end.
    fn same_shape_steps(&self, plan: &Plan) -> u32 {
        let context = self.config.context_tokens;
        let all_decode = plan.rows.iter().all(|row| row.count == 1 && row.sample);
        if !all_decode || plan.rows.len() < self.sequences.len() {
            return 0;
        }
        let rest_of_block = |s: &Sequence| s.submitted.next_multiple_of(BLOCK_TOKENS) - s.submitted;
        let steps = self.sequences.values().map(|s| s.draws_left(context).min(rest_of_block(s)));
        steps.min().unwrap_or(0)
    }
}
