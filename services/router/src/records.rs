//! The decision record of each recent request: candidates, what was chosen, what happened and when.
//!
//! Hardly any is ever asked for, so values are kept as they were decided on, and words are found for them when
//! somebody asks. What has ended is kept as bytes in one ring that is there from the start: thousands of small pieces
//! would lie wherever there was room among everything else.

use std::borrow::Cow;
use std::collections::{HashMap, VecDeque};
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tandem_chassis::seam;
use tandem_placement::{Candidate, Explanation, Policy, Request, Route};
use tandem_types::{Choice, RequestId, Time, WorkerId};

use crate::request::GenerateRequest;

/// Ended requests remembered.
const RECORDS_MAX: usize = 1000;
/// Bytes that their records may take, and those they have from the start: enough for a few workers.
const BYTES_MAX: usize = 32 << 20;
const BYTES_FIRST: usize = 1 << 20;
/// Notes per request; later ones are counted only.
const NOTES_MAX: usize = 64;
/// Candidates that a note keeps.
const CANDIDATES_KEPT: usize = 32;

/// One answer of one request.
type Key = (RequestId, Choice);

/// Running requests and recent ones, the oldest forgotten first.
#[derive(Default)]
pub(crate) struct Records {
    running: Mutex<HashMap<Key, Arc<Mutex<Told>>>>,
    ended: Mutex<Ended>,
}

/// Records as bytes, the oldest first.
struct Ended {
    bytes: VecDeque<u8>,
    lengths: VecDeque<usize>,
    /// Where the next one is written first.
    scratch: Vec<u8>,
}

/// The record of a request under way, put with the ended ones when this is dropped.
pub(crate) struct Record {
    records: Arc<Records>,
    key: Key,
    told: Arc<Mutex<Told>>,
}

/// What happened to one request. Its names come first, to be found in the bytes.
#[derive(Serialize, Deserialize)]
struct Told {
    name: String,
    id: RequestId,
    model: String,
    prompt_tokens: usize,
    began: Time,
    notes: Vec<(Time, Note)>,
    left_out: usize,
    end: Option<String>,
}

/// Something that was decided or happened.
#[derive(Serialize, Deserialize)]
pub(crate) enum Note {
    Route(Box<Routed>),
    Decode { candidates: Vec<Candidate>, in_all: usize, chosen: Option<WorkerId> },
    Start { worker: WorkerId, attempt: u32, until: Cow<'static, str> },
    Again { what: Cow<'static, str>, why: String, fault: bool },
    End(String),
}

/// A choice of workers, and what it was made from.
#[derive(Serialize, Deserialize)]
pub(crate) struct Routed {
    request: Request,
    candidates: Vec<Candidate>,
    in_all: usize,
    chosen: Option<(WorkerId, WorkerId)>,
    /// Where it cannot be found again from the candidates that are kept.
    why: Option<Explanation>,
}

impl Note {
    /// A policy's choice among these.
    pub(crate) fn route(
        policy: &dyn Policy,
        request: Request,
        mut candidates: Vec<Candidate>,
        route: Option<Route>,
    ) -> Note {
        let name = |at: usize| candidates[at].worker.clone();
        let chosen = route.map(|route| (name(route.prefill), name(route.decode)));
        let in_all = candidates.len();
        let why = (in_all > CANDIDATES_KEPT).then(|| policy.explain(&request, &candidates));
        keep_few(&mut candidates);
        Note::Route(Box::new(Routed { request, candidates, in_all, chosen, why }))
    }

    /// A policy's choice of who goes on.
    pub(crate) fn decode(mut candidates: Vec<Candidate>, chosen: Option<usize>) -> Note {
        let chosen = chosen.map(|at| candidates[at].worker.clone());
        let in_all = candidates.len();
        keep_few(&mut candidates);
        Note::Decode { candidates, in_all, chosen }
    }

    fn describe(&self, policy: &dyn Policy) -> (&str, Value) {
        match self {
            Note::Route(routed) => {
                let Routed { request, candidates, in_all, chosen, why } = &**routed;
                let again;
                let why = match why {
                    Some(why) => why,
                    None => {
                        again = policy.explain(request, candidates);
                        &again
                    }
                };
                let facts = json!({
                    "request": request,
                    "candidates": candidates,
                    "candidates_in_all": in_all,
                    "chosen": chosen.as_ref().map(|(p, d)| json!({ "prefill": p, "decode": d })),
                    "reason": why.reason,
                    "considered": why.considered,
                });
                ("route", facts)
            }
            Note::Decode { candidates, in_all, chosen } => {
                ("decode", json!({ "candidates": candidates, "candidates_in_all": in_all, "chosen": chosen }))
            }
            Note::Start { worker, attempt, until } => {
                ("start", json!({ "worker": worker, "attempt": attempt, "until": until }))
            }
            Note::Again { what, why, fault } => (what, json!({ "why": why, "fault": fault })),
            Note::End(how) => ("end", json!(how)),
        }
    }
}

fn keep_few(candidates: &mut Vec<Candidate>) {
    candidates.truncate(CANDIDATES_KEPT);
    candidates.shrink_to_fit();
}

/// A panic under the lock leaves at most a note less, and a record is put away while its request's panic unwinds.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Records {
    pub(crate) fn begin(self: &Arc<Self>, request: &GenerateRequest) -> Record {
        let told = Arc::new(Mutex::new(Told {
            name: request.name.clone(),
            id: request.id,
            model: request.model.clone(),
            prompt_tokens: request.prompt.len(),
            began: request.arrived,
            notes: Vec::new(),
            left_out: 0,
            end: None,
        }));
        let key = (request.id, request.choice);
        lock(&self.running).insert(key, told.clone());
        Record { records: self.clone(), key, told }
    }

    /// By `x-request-id`, the latest of that name, or by the internal id. `policy` is the one that chose.
    pub(crate) fn find(&self, name: &str, policy: &dyn Policy) -> Option<Value> {
        let running: Vec<Arc<Mutex<Told>>> = lock(&self.running).values().cloned().collect();
        let named = running.into_iter().filter(|told| lock(told).is_called(name));
        if let Some(told) = named.max_by_key(|told| lock(told).began) {
            return Some(lock(&told).describe(policy));
        }
        let told = lock(&self.ended).find(name)?;
        Some(told.describe(policy))
    }
}

impl Default for Ended {
    fn default() -> Self {
        // Filled once, so that the memory is there and does not come with the requests.
        let mut bytes = VecDeque::from(vec![u8::MAX; BYTES_FIRST]);
        bytes.clear();
        Ended { bytes, lengths: VecDeque::with_capacity(RECORDS_MAX), scratch: Vec::new() }
    }
}

impl Ended {
    fn keep(&mut self, told: &Told) {
        let mut scratch = std::mem::take(&mut self.scratch);
        scratch.clear();
        self.scratch = postcard::to_extend(told, scratch).expect("all its parts know their lengths");
        let length = self.scratch.len();
        while self.lengths.len() == RECORDS_MAX || self.bytes.len() + length > BYTES_MAX {
            let Some(oldest) = self.lengths.pop_front() else { return };
            self.bytes.drain(..oldest);
        }
        self.bytes.extend(&self.scratch);
        self.lengths.push_back(length);
    }

    fn find(&self, name: &str) -> Option<Told> {
        let mut end = self.bytes.len();
        for length in self.lengths.iter().rev() {
            let bytes = self.piece(end - length..end);
            let ((own, id), _) = postcard::take_from_bytes::<(&str, &str)>(&bytes).ok()?;
            if own == name || id == name {
                return postcard::from_bytes(&bytes).ok();
            }
            end -= length;
        }
        None
    }

    fn piece(&self, range: Range<usize>) -> Cow<'_, [u8]> {
        let (front, back) = self.bytes.as_slices();
        match range.start.checked_sub(front.len()) {
            Some(start) => Cow::Borrowed(&back[start..range.end - front.len()]),
            None if range.end <= front.len() => Cow::Borrowed(&front[range]),
            None => Cow::Owned([&front[range.start..], &back[..range.end - front.len()]].concat()),
        }
    }
}

impl Record {
    /// Something was decided or happened.
    pub(crate) fn note(&self, note: Note) {
        let mut told = lock(&self.told);
        if let Note::End(how) = &note {
            told.end = Some(how.clone());
        }
        if told.notes.len() >= NOTES_MAX {
            told.left_out += 1;
            return;
        }
        told.notes.push((seam::now(), note));
    }
}

impl Drop for Record {
    fn drop(&mut self) {
        // First there, then gone from here: whoever looks meanwhile finds it.
        lock(&self.records.ended).keep(&lock(&self.told));
        lock(&self.records.running).remove(&self.key);
    }
}

impl Told {
    fn is_called(&self, name: &str) -> bool {
        self.name == name || self.id.to_string() == name
    }

    fn describe(&self, policy: &dyn Policy) -> Value {
        let notes = self.notes.iter().map(|(at, note)| {
            let at_ms = at.since(self.began).as_secs_f64() * 1000.0;
            let (what, facts) = note.describe(policy);
            json!({ "at_ms": at_ms, "what": what, "facts": facts })
        });
        json!({
            "request": self.name,
            "id": self.id,
            "model": self.model,
            "prompt_tokens": self.prompt_tokens,
            "end": self.end,
            "events": notes.collect::<Vec<_>>(),
            "events_left_out": self.left_out,
        })
    }
}

#[cfg(test)]
mod tests {
    use tandem_placement::named;
    use tandem_types::{SamplingParams, ServiceClass, StopRules};

    use super::*;
    use crate::request::PromptShare;

    fn request(name: &str, id: u128, choice: u32) -> GenerateRequest {
        GenerateRequest {
            id: RequestId(id),
            name: name.to_owned(),
            model: "m".to_owned(),
            prompt: vec![1; 3].into(),
            choice: Choice(choice),
            sampling: SamplingParams::default(),
            stop: StopRules::default(),
            class: ServiceClass::Online,
            deadline: Time::MAX,
            salt: Vec::new(),
            arrived: Time(id as u64),
            traceparent: None,
            share: PromptShare::Alone,
            unseen: false,
            score_prompt: None,
        }
    }

    fn candidates(n: usize) -> Vec<Candidate> {
        let named = |i: usize| Candidate { worker: WorkerId(format!("worker-{i}")), ..Candidate::default() };
        (0..n).map(named).collect()
    }

    #[test]
    fn a_record_says_the_same_before_and_after_its_end() {
        let records = Arc::new(Records::default());
        let policy = named("cost").expect("there is such a policy");
        let record = records.begin(&request("named", 7, 0));
        for workers in [2, CANDIDATES_KEPT + 1] {
            let route = Some(Route { prefill: 0, decode: 1 });
            record.note(Note::route(&*policy, Request::default(), candidates(workers), route));
        }
        record.note(Note::decode(candidates(2), None));
        record.note(Note::Start { worker: "worker-1".into(), attempt: 1, until: "UNTIL_END".into() });
        record.note(Note::Again { what: "placed again".into(), why: "it left".into(), fault: true });
        record.note(Note::End("stop".into()));
        let running = records.find("named", &*policy).expect("it runs");
        assert_eq!(running["events"].as_array().map(Vec::len), Some(6));
        assert_eq!(running["events"][1]["facts"]["candidates_in_all"], CANDIDATES_KEPT + 1);
        drop(record);
        assert!(lock(&records.running).is_empty());
        for name in ["named", "00000000000000000000000000000007"] {
            assert_eq!(records.find(name, &*policy).as_ref(), Some(&running), "{name}");
        }
        assert_eq!(records.find("nobody", &*policy), None);
    }

    #[test]
    fn the_latest_of_a_name_is_found_and_the_oldest_are_forgotten() {
        let records = Arc::new(Records::default());
        let policy = named("cost").expect("there is such a policy");
        let prompt_id = |name: &str| records.find(name, &*policy).map(|record| record["id"].clone());
        let old = records.begin(&request("again", 1, 0));
        let new = records.begin(&request("again", 2, 0));
        assert_eq!(prompt_id("again"), Some(json!(RequestId(2))));
        drop(new);
        // What still runs is likelier to be meant.
        assert_eq!(prompt_id("again"), Some(json!(RequestId(1))));
        drop(old);
        assert!(prompt_id("again").is_some());
        for id in 0..RECORDS_MAX as u128 {
            let record = records.begin(&request(&format!("r{id}"), 10 + id, 0));
            record.note(Note::End("stop".into()));
        }
        assert_eq!(prompt_id("again"), None);
        assert!(prompt_id("r0").is_some());
        drop(records.begin(&request("one-more", 9, 0)));
        assert_eq!(prompt_id("r0"), None);
        assert!(prompt_id("one-more").is_some());
        let ended = lock(&records.ended);
        assert_eq!(ended.lengths.len(), RECORDS_MAX);
        assert_eq!(ended.bytes.len(), ended.lengths.iter().sum::<usize>());
        assert_eq!(ended.bytes.capacity(), BYTES_FIRST);
    }

    #[test]
    fn choices_of_one_request_do_not_forget_each_other() {
        let records = Arc::new(Records::default());
        let policy = named("cost").expect("there is such a policy");
        let (first, second) = (records.begin(&request("two", 1, 0)), records.begin(&request("two", 1, 1)));
        drop(first);
        assert_eq!(lock(&records.running).len(), 1);
        drop(second);
        assert!(lock(&records.running).is_empty());
        assert_eq!(lock(&records.ended).lengths.len(), 2);
        assert!(records.find("two", &*policy).is_some());
    }

    #[test]
    fn a_request_that_panics_leaves_its_record_and_nothing_else() {
        let records = Arc::new(Records::default());
        let policy = named("cost").expect("there is such a policy");
        let panicked = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            let record = records.begin(&request("broken", 1, 0));
            record.note(Note::decode(candidates(1), Some(0)));
            let _told = lock(&record.told);
            panic!("as a request may");
        }));
        assert!(panicked.is_err());
        assert!(lock(&records.running).is_empty());
        let found = records.find("broken", &*policy).expect("it was put away");
        assert_eq!((found["end"].is_null(), found["events"].as_array().map(Vec::len)), (true, Some(1)));
    }

    fn told(name: String) -> Told {
        Told {
            name,
            id: RequestId(1),
            model: String::new(),
            prompt_tokens: 1,
            began: Time::ZERO,
            notes: Vec::new(),
            left_out: 0,
            end: None,
        }
    }

    #[test]
    fn records_take_no_more_than_their_bytes() {
        let mut ended = Ended::default();
        for letters in [1 << 20, 3 << 20, 10, 31 << 20, 2 << 20, 1 << 10] {
            ended.keep(&told("n".repeat(letters)));
            assert!(ended.bytes.capacity() <= 2 * BYTES_MAX);
            assert_eq!(ended.bytes.len(), ended.lengths.iter().sum::<usize>());
        }
        assert_eq!(ended.lengths.len(), 2);
        ended.keep(&told("n".repeat(BYTES_MAX)));
        assert!(ended.lengths.is_empty());
    }

    #[test]
    fn records_are_read_across_the_seam_of_the_ring() {
        let mut ended = Ended::default();
        let name = |i: usize| format!("{i}-{}", "n".repeat(900));
        let mut across = 0;
        for i in 0..8 * RECORDS_MAX {
            ended.keep(&told(name(i)));
            if i % 50 > 0 {
                continue;
            }
            let seam = ended.bytes.as_slices().0.len();
            let mut end = 0;
            across += usize::from(ended.lengths.iter().any(|length| {
                end += length;
                end - length < seam && seam < end
            }));
            let oldest = i + 1 - ended.lengths.len();
            for j in (oldest..=i).step_by(99) {
                assert_eq!(ended.find(&name(j)).map(|told| told.name), Some(name(j)));
            }
            assert!(ended.find("nobody").is_none(), "every record can be read");
        }
        assert!(across > 10, "{across}");
        assert_eq!(ended.bytes.capacity(), BYTES_FIRST);
    }
}
