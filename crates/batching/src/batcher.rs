//! The batcher: sequences in, plans out, outcomes in, events out.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use tandem_kv_cache::{KvCache, Table};
use tandem_types::{BLOCK_TOKENS, FinishReason, Sampled, ServiceClass, Time, Usage, blocks_for};

use crate::lengths::Lengths;
use crate::pace::{Line, Pace};
use crate::sequence::Sequence;
use crate::{Origin, SequenceId, SequenceSpec, Target};

/// Limits of a step.
#[derive(Clone, Debug, PartialEq)]
pub struct Config {
    /// Tokens of a step at most.
    pub token_budget: u32,
    /// Sequences of a step at most. Nobody is admitted while so many have pages and are not paused.
    pub rows_max: u32,
    /// Plans that may be submitted before the oldest is collected, less one.
    pub depth: u32,
    /// Longest sequence.
    pub context_tokens: u32,
    /// Tokens of an answer, assumed until answers have ended here: room for so many is kept for each.
    pub answer_tokens: u32,
}

impl Default for Config {
    /// 512 tokens, 64 rows, depth 0, no limit on context, answers of 128 tokens.
    fn default() -> Self {
        Config { token_budget: 512, rows_max: 64, depth: 0, context_tokens: u32::MAX, answer_tokens: 128 }
    }
}

/// What happened to a sequence. `Finished`, `Preempted`, `Rejected` and `Failed` are its last.
#[derive(Clone, Debug, PartialEq)]
pub enum Event {
    /// It has pages.
    Admitted {
        /// Whose.
        id: SequenceId,
        /// Tokens that the prefix cache held.
        cached_tokens: u32,
    },
    /// The KV of its first `tokens` tokens is in its pages.
    Computed {
        /// Whose.
        id: SequenceId,
        /// Confirmed tokens.
        tokens: u32,
    },
    /// Tokens of its prompt were scored; before its first token, in order, each once.
    Scored {
        /// Whose.
        id: SequenceId,
        /// The position of the first.
        position: u32,
        /// The tokens with their log probabilities.
        scores: Vec<Sampled>,
    },
    /// A token was drawn.
    Token {
        /// Whose.
        id: SequenceId,
        /// Its index in the request's output.
        position: u32,
        /// The token.
        sampled: Sampled,
    },
    /// It has ended.
    Finished {
        /// Which.
        id: SequenceId,
        /// Why; `None` when it was to go to its first token only, and that is not the last.
        reason: Option<FinishReason>,
        /// What it cost.
        usage: Usage,
    },
    /// It was taken out to make room; to be added again with all its tokens.
    Preempted {
        /// Which.
        id: SequenceId,
    },
    /// It could never fit.
    Rejected {
        /// Which.
        id: SequenceId,
    },
    /// Its step failed.
    Failed {
        /// Which.
        id: SequenceId,
    },
}

/// A submitted plan, until it is collected.
#[derive(Debug)]
pub(crate) struct Flight {
    pub(crate) id: u64,
    pub(crate) rows: Vec<FlightRow>,
}

#[derive(Debug)]
pub(crate) struct FlightRow {
    pub(crate) id: SequenceId,
    pub(crate) slot: u32,
    pub(crate) end: u32,
    pub(crate) sample: bool,
    /// Position of the first token it scores, and how many.
    pub(crate) scores: Option<(u32, usize)>,
}

/// Decides what each step computes.
#[derive(Debug)]
pub struct Batcher {
    pub(crate) config: Config,
    pub(crate) sequences: BTreeMap<SequenceId, Sequence>,
    pub(crate) in_flight: VecDeque<Flight>,
    pub(crate) next_plan: u64,
    pub(crate) slots: Slots,
    /// Pages of sequences that left while a plan named them: given back when it is collected.
    pub(crate) graveyard: Vec<(u64, Table)>,
    pub(crate) lengths: Lengths,
    /// The oldest sequence that found no room in the last plan.
    pub(crate) starved: Option<SequenceId>,
    /// Who arrived later is not admitted: somebody outside waits for room since then.
    pub(crate) yields_to: Option<Time>,
    pub(crate) events: Vec<Event>,
    /// Order and pace of prompts; without it they go by age, as far as budget and memory allow.
    pub(crate) pace: Option<Pace>,
    /// Prompts under a pace.
    pub(crate) line: Line<SequenceId>,
    pub(crate) timely_seconds: f64,
}

/// Work at hand, as [`Batcher::backlog`] counts it.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Backlog {
    /// Seconds of prompts with targets that are not computed yet.
    pub prompt_seconds: f64,
    /// Sequences that decode.
    pub decodes: u32,
    /// Their tokens.
    pub decode_tokens: u64,
}

/// Slot numbers, small and reused.
#[derive(Debug, Default)]
pub(crate) struct Slots {
    free: BTreeSet<u32>,
    next: u32,
    /// To be closed in the first plan after the one named.
    pub(crate) closing: Vec<(u32, Option<u64>)>,
}

impl Slots {
    pub(crate) fn take(&mut self) -> u32 {
        self.free.pop_first().unwrap_or_else(|| {
            self.next += 1;
            self.next - 1
        })
    }

    /// Slots that no plan in flight names; they are free for the plan after this one.
    pub(crate) fn take_closable(&mut self, oldest_in_flight: Option<u64>) -> Vec<u32> {
        let closable =
            |last: &Option<u64>| last.is_none_or(|last| oldest_in_flight.is_none_or(|oldest| last < oldest));
        let (now, later): (Vec<_>, Vec<_>) = self.closing.drain(..).partition(|(_, last)| closable(last));
        self.closing = later;
        now.into_iter().map(|(slot, _)| slot).collect()
    }

    pub(crate) fn give_back(&mut self, slots: &[u32]) {
        self.free.extend(slots);
    }
}

impl Batcher {
    /// With nothing to do.
    pub fn new(config: Config) -> Batcher {
        assert!(config.token_budget > 0 && config.rows_max > 0, "a step computes something");
        Batcher {
            lengths: Lengths::new(config.answer_tokens),
            config,
            sequences: BTreeMap::new(),
            in_flight: VecDeque::new(),
            next_plan: 1,
            slots: Slots::default(),
            graveyard: Vec::new(),
            starved: None,
            yields_to: None,
            events: Vec::new(),
            pace: None,
            line: Line::default(),
            timely_seconds: 0.0,
        }
    }

    /// What it was made with.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// Takes a sequence in.
    ///
    /// With nothing left to draw it ends by `Length` in the next plan.
    ///
    /// # Panics
    /// If its id is in use, it has no tokens, all of them are computed, or some that are computed are to be scored.
    pub fn add(&mut self, spec: SequenceSpec, origin: Origin) {
        let mut sequence = Sequence::new(spec);
        assert!(sequence.known() > 0, "a sequence has tokens");
        if let Origin::Computed { table, computed } = origin {
            assert!(computed < sequence.known(), "a token without KV is known");
            assert!(table.room() >= computed, "computed tokens are in the table");
            let scored = sequence.spec.score.is_some_and(|score| computed >= score.from);
            assert!(!scored, "what is computed elsewhere cannot be scored here");
            sequence.table = Some(table);
            sequence.computed = computed;
            sequence.submitted = computed;
            sequence.handed_in = sequence.gap() == 1;
        }
        if !sequence.decodes() {
            self.line.push(sequence.spec.id);
        }
        let before = self.sequences.insert(sequence.spec.id, sequence);
        assert!(before.is_none(), "a sequence id is used once");
    }

    /// Takes a sequence out, without an event. True if it was there.
    pub fn cancel(&mut self, id: SequenceId, kv: &mut KvCache, now: Time) -> bool {
        match self.sequences.remove(&id) {
            Some(sequence) => {
                self.bury(sequence, kv, now);
                true
            }
            None => false,
        }
    }

    /// Gives back everything a removed sequence held, as soon as no plan in flight names it.
    pub(crate) fn bury(&mut self, mut sequence: Sequence, kv: &mut KvCache, now: Time) {
        if let Some(slot) = sequence.slot {
            self.slots.closing.push((slot, sequence.last_plan));
        }
        let Some(table) = sequence.table.take() else { return };
        let named = sequence.last_plan.filter(|last| self.in_flight.iter().any(|flight| flight.id == *last));
        match named {
            Some(plan) => self.graveyard.push((plan, table)),
            None => kv.close(table, now),
        }
    }

    /// No rows for it until `resume`; it is also the first to be preempted.
    pub fn pause(&mut self, id: SequenceId) {
        if let Some(sequence) = self.sequences.get_mut(&id) {
            sequence.paused = true;
        }
    }

    /// Rows again.
    pub fn resume(&mut self, id: SequenceId) {
        if let Some(sequence) = self.sequences.get_mut(&id) {
            sequence.paused = false;
        }
    }

    /// Orders and paces prompts from the next plan on, or no longer.
    pub fn set_pace(&mut self, pace: Option<Pace>) {
        self.pace = pace;
    }

    /// When the tokens of a sequence are due; without it, never. Counts under a pace only.
    pub fn set_target(&mut self, id: SequenceId, target: Target) {
        if let Some(sequence) = self.sequences.get_mut(&id) {
            sequence.target = target;
        }
    }

    /// Somebody who arrived then waits for room outside of this batcher: nobody younger is admitted before.
    pub fn yield_to(&mut self, older: Option<Time>) {
        self.yields_to = older;
    }

    /// When the oldest sequence arrived that found no room in the last plan: nobody younger should take any.
    pub fn starved(&self) -> Option<Time> {
        let sequence = self.sequences.get(&self.starved?)?;
        (sequence.table.is_none() && !sequence.paused).then_some(sequence.spec.arrived)
    }

    /// Whether pages may be taken for a sequence of so many known tokens, of which `cached` are cached and after
    /// which `left` more may be drawn: room must be left for what those that run will grow by, and for what it
    /// will grow by itself. Where nobody runs, nobody is to be kept from growing.
    pub fn leaves_room(&self, kv: &KvCache, known: u32, cached: u32, left: u32) -> bool {
        let running = || self.sequences.values().filter(|s| s.will_grow());
        if running().next().is_none() {
            return true;
        }
        let grown = |s: &Sequence| {
            let drawn = s.known() - s.spec.prompt_tokens;
            let growth = self.lengths.growth(drawn, s.draws_left(self.config.context_tokens));
            blocks_for(s.upper() + growth).saturating_sub(s.room() / BLOCK_TOKENS)
        };
        let reserved: u32 = running().map(grown).sum();
        let wanted = blocks_for(known + self.lengths.growth(0, left)) - cached / BLOCK_TOKENS;
        let counts = kv.counts();
        wanted + reserved <= counts.free + counts.cached
    }

    /// Whether a sequence has pages and will give them back by itself, by coming to its end.
    pub fn is_decoding(&self) -> bool {
        self.sequences.values().any(Sequence::will_grow)
    }

    /// A granted sequence is not preempted.
    pub fn set_leased(&mut self, id: SequenceId, leased: bool) {
        if let Some(sequence) = self.sequences.get_mut(&id) {
            sequence.leased = leased;
        }
    }

    /// Whose a slot is, while its sequence is here.
    pub fn sequence_of(&self, slot: u32) -> Option<SequenceId> {
        self.sequences.values().find(|s| s.slot == Some(slot)).map(|s| s.spec.id)
    }

    /// The pages of a sequence, once it is admitted.
    pub fn table(&self, id: SequenceId) -> Option<&Table> {
        self.sequences.get(&id).and_then(|sequence| sequence.table.as_ref())
    }

    /// What happened since the last call, in order.
    pub fn take_events(&mut self) -> Vec<Event> {
        std::mem::take(&mut self.events)
    }

    /// Sequences with pages.
    pub fn running(&self) -> usize {
        self.sequences.values().filter(|s| s.table.is_some()).count()
    }

    /// Sequences without.
    pub fn waiting(&self) -> usize {
        self.sequences.len() - self.running()
    }

    /// Known tokens of waiting sequences, and those of running ones that are not submitted yet, the last one
    /// of each (its decode) not counted.
    pub fn waiting_tokens(&self) -> u64 {
        self.sequences.values().map(|s| u64::from(s.gap().saturating_sub(1))).sum()
    }

    /// What waits and what decodes. `seconds` says what computing `left` tokens of a prompt behind `before` others
    /// takes.
    pub fn backlog(&self, seconds: impl Fn(u32, u32) -> f64) -> Backlog {
        let mut backlog = Backlog::default();
        for sequence in self.sequences.values() {
            let left = sequence.gap();
            if sequence.decodes() {
                backlog.decodes += 1;
                backlog.decode_tokens += u64::from(sequence.known());
            } else if sequence.spec.class == ServiceClass::Online {
                backlog.prompt_seconds += seconds(left, sequence.known() - left);
            }
        }
        backlog
    }

    /// Seconds of prompts that could still be in time when they were last put in order, under a pace.
    pub fn timely_seconds(&self) -> f64 {
        self.timely_seconds
    }

    /// Compares counters with what is in flight, from scratch.
    ///
    /// # Panics
    /// With a sentence, if anything does not add up.
    pub fn check_books(&self) {
        let in_flight = || self.in_flight.iter().flat_map(|flight| &flight.rows);
        let mut draws: BTreeMap<u32, u32> = BTreeMap::new();
        for row in in_flight().filter(|row| row.sample) {
            *draws.entry(row.slot).or_default() += 1;
        }
        let mut used = BTreeSet::new();
        for (id, s) in &self.sequences {
            let drawing = s.slot.and_then(|slot| draws.get(&slot)).copied().unwrap_or(0);
            assert_eq!(s.draws_in_flight, drawing, "{id:?} counts other draws than are in flight");
            assert!(s.computed <= s.submitted && s.submitted <= s.upper(), "{id:?} is ahead of itself");
            assert!(s.computed < s.known(), "{id:?} has no token left to compute");
            assert!(s.submitted <= s.room(), "{id:?} has submitted more than its pages hold");
            assert!(s.slot.is_none_or(|slot| used.insert(slot)), "{id:?} shares its slot");
        }
        let closing = self.slots.closing.iter().map(|(slot, _)| slot);
        for slot in closing.chain(&self.slots.free) {
            assert!(used.insert(*slot), "slot {slot} is used and let go at once");
        }
        assert_eq!(used.len(), self.slots.next as usize, "a slot is lost");
        for (plan, _) in &self.graveyard {
            let waits = self.in_flight.iter().any(|flight| flight.id == *plan);
            assert!(waits, "pages wait for plan {plan}, which is not in flight");
        }
    }

    /// The same after every step, where that may cost something.
    pub(crate) fn debug_check_books(&self) {
        if cfg!(debug_assertions) {
            self.check_books();
        }
    }

    /// When to plan again although nothing happened; nothing here is due by itself.
    pub fn next_deadline(&self) -> Option<Time> {
        None
    }
}
