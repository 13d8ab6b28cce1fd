//! The decision record of each recent request: candidates, what was chosen, what happened and when.
//!
//! Hardly any is ever asked for, so values are kept as they were decided on, and words are found for them when
//! somebody asks.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex};

use serde_json::{Value, json};
use tandem_chassis::seam;
use tandem_placement::{Candidate, Explanation, Policy, Request, Route};
use tandem_proto::v1;
use tandem_types::{Time, WorkerId};

use crate::request::GenerateRequest;

/// Requests remembered.
const RECORDS_MAX: usize = 1000;
/// Notes per request; later ones are counted only.
const NOTES_MAX: usize = 64;
/// Candidates that a note keeps.
const CANDIDATES_KEPT: usize = 32;

/// Recent requests, the oldest forgotten first.
#[derive(Default)]
pub(crate) struct Records {
    kept: Mutex<Kept>,
}

#[derive(Default)]
struct Kept {
    by_name: HashMap<String, Arc<Record>>,
    order: VecDeque<Arc<Record>>,
}

/// What happened to one request.
pub(crate) struct Record {
    name: String,
    id: String,
    model: String,
    prompt_tokens: usize,
    began: Time,
    events: Mutex<Events>,
}

#[derive(Default)]
struct Events {
    notes: Vec<(Time, Note)>,
    left_out: usize,
    end: Option<String>,
}

/// Something that was decided or happened.
pub(crate) enum Note {
    Route(Box<Routed>),
    Decode { candidates: Vec<Candidate>, in_all: usize, chosen: Option<WorkerId> },
    Start { worker: WorkerId, attempt: u32, until: v1::Until },
    Again { what: &'static str, why: String, fault: bool },
    End(String),
}

/// A choice of workers, and what it was made from.
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
                ("start", json!({ "worker": worker, "attempt": attempt, "until": until.as_str_name() }))
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

impl Records {
    pub(crate) fn begin(&self, request: &GenerateRequest) -> Arc<Record> {
        let record = Arc::new(Record {
            name: request.name.clone(),
            id: request.id.to_string(),
            model: request.model.clone(),
            prompt_tokens: request.prompt.len(),
            began: request.arrived,
            events: Mutex::default(),
        });
        let mut kept = self.kept.lock().expect("nothing panics under this lock");
        kept.by_name.insert(record.name.clone(), record.clone());
        kept.order.push_back(record.clone());
        if kept.order.len() > RECORDS_MAX {
            let oldest = kept.order.pop_front().expect("it is not empty");
            // A client may have used the name again.
            if kept.by_name.get(&oldest.name).is_some_and(|known| Arc::ptr_eq(known, &oldest)) {
                kept.by_name.remove(&oldest.name);
            }
        }
        record
    }

    /// By `x-request-id`, or by the internal id. `policy` is the one that chose.
    pub(crate) fn find(&self, name: &str, policy: &dyn Policy) -> Option<Value> {
        let found = {
            let kept = self.kept.lock().expect("nothing panics under this lock");
            let by_id = || kept.order.iter().rev().find(|record| record.id == name);
            kept.by_name.get(name).or_else(by_id).cloned()
        };
        found.map(|record| record.describe(policy))
    }
}

impl Record {
    /// Something was decided or happened.
    pub(crate) fn note(&self, note: Note) {
        let mut events = self.events.lock().expect("nothing panics under this lock");
        if let Note::End(how) = &note {
            events.end = Some(how.clone());
        }
        if events.notes.len() >= NOTES_MAX {
            events.left_out += 1;
            return;
        }
        events.notes.push((seam::now(), note));
    }

    fn describe(&self, policy: &dyn Policy) -> Value {
        let events = self.events.lock().expect("nothing panics under this lock");
        let notes = events.notes.iter().map(|(at, note)| {
            let at_ms = at.since(self.began).as_secs_f64() * 1000.0;
            let (what, facts) = note.describe(policy);
            json!({ "at_ms": at_ms, "what": what, "facts": facts })
        });
        json!({
            "request": self.name,
            "id": self.id,
            "model": self.model,
            "prompt_tokens": self.prompt_tokens,
            "end": events.end,
            "events": notes.collect::<Vec<_>>(),
            "events_left_out": events.left_out,
        })
    }
}
