//! The decision record of each recent request: candidates, what was chosen, what happened and when.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex};

use serde_json::{Value, json};
use tandem_chassis::seam;
use tandem_types::Time;

use crate::request::GenerateRequest;

/// Requests remembered.
const RECORDS_MAX: usize = 1000;
/// Notes per request; later ones are counted only.
const NOTES_MAX: usize = 64;

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
    notes: Vec<Value>,
    left_out: usize,
    end: Option<String>,
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

    /// By `x-request-id`, or by the internal id.
    pub(crate) fn find(&self, name: &str) -> Option<Value> {
        let kept = self.kept.lock().expect("nothing panics under this lock");
        let found =
            kept.by_name.get(name).or_else(|| kept.order.iter().rev().find(|record| record.id == name));
        found.map(|record| record.describe())
    }
}

impl Record {
    /// Something was decided or happened.
    pub(crate) fn note(&self, what: &str, facts: Value) {
        let at_ms = seam::now().since(self.began).as_secs_f64() * 1000.0;
        let mut events = self.events.lock().expect("nothing panics under this lock");
        if events.notes.len() >= NOTES_MAX {
            events.left_out += 1;
            return;
        }
        events.notes.push(json!({ "at_ms": at_ms, "what": what, "facts": facts }));
    }

    /// The request is over.
    pub(crate) fn end(&self, how: &str) {
        self.note("end", json!(how));
        self.events.lock().expect("nothing panics under this lock").end = Some(how.to_owned());
    }

    fn describe(&self) -> Value {
        let events = self.events.lock().expect("nothing panics under this lock");
        json!({
            "request": self.name,
            "id": self.id,
            "model": self.model,
            "prompt_tokens": self.prompt_tokens,
            "end": events.end,
            "events": events.notes,
            "events_left_out": events.left_out,
        })
    }
}
