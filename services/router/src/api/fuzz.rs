//! What is to hold for every sequence of bytes, in a form that a fuzzer can call. A broken promise is a panic.
//!
//! `cargo xtask fuzz` runs them under libFuzzer; the tests below run them over bodies and answers that were thought of.

use std::path::Path;
use std::sync::Arc;

use axum::body::Bytes;
use serde_json::Value;
use tandem_types::{Sampled, TokenId};

use super::answer::{Finish, Piece};
use super::sse::Chunks as _;
use super::{chat, completions, tokenize};
use crate::text::{Detokenizer, Message, Model};

/// Tries bytes; panics where a promise is broken.
pub type Target = fn(&Harness, &[u8]);

/// The targets by name.
pub const TARGETS: &[(&str, Target)] = &[
    ("body", Harness::body),
    ("sse", Harness::sse),
    ("detokenizer", Harness::detokenizer),
    ("template", Harness::template),
];

/// The text side of a model, with which bytes are tried.
pub struct Harness {
    model: Arc<Model>,
    /// The same, as if its decoder had to see tokens in their context.
    by_window: Model,
    /// Prints whatever a request can give to a template.
    printing: Model,
}

impl Harness {
    /// From a checkpoint's folder.
    pub fn open(dir: &Path) -> Result<Harness, String> {
        let open = || Model::open(dir, "model".into(), None).map_err(|error| error.to_string());
        let printing = "{% for m in messages %}{{ m.role }}: {{ m.content | trim }}{{ m.content[:2] }}\n{% endfor %}\
                        {{ extra }}{{ extra | tojson(indent=2) }}{{ strftime_now(extra) }}";
        Ok(Harness {
            model: Arc::new(open()?),
            by_window: open()?.without_vocabulary(),
            printing: open()?.with_template(printing)?,
        })
    }

    /// A body, whose first byte chooses the endpoint, is read or refused; a refusal says why.
    pub fn body(&self, data: &[u8]) {
        let Some((&endpoint, body)) = data.split_first() else { return };
        let model = &*self.model;
        let error = match endpoint % 4 {
            0 => chat::read(Bytes::copy_from_slice(body), model).err(),
            1 => completions::read(Bytes::copy_from_slice(body), model).err(),
            2 => tokenize::tokenized(body, model).err(),
            _ => tokenize::detokenized(body, model).err(),
        };
        if let Some(error) = error {
            let body = error.body();
            assert!(body["error"]["message"].as_str().is_some_and(|text| !text.is_empty()), "{body}");
            assert!(body["error"]["code"].is_string(), "{body}");
        }
    }

    /// Pieces of an answer, divided by a byte that is in no text, come out of the event stream as they went in.
    pub fn sse(&self, data: &[u8]) {
        let Some((&options, data)) = data.split_first() else { return };
        let mut asked = serde_json::json!({ "model": "model", "messages": [{ "role": "user", "content": "a" }], "stream": true });
        asked["logprobs"] = (options & 1 > 0).into();
        asked["return_token_ids"] = (options & 2 > 0).into();
        asked["stream_options"] = serde_json::json!({ "include_usage": options & 4 > 0 });
        let (parameters, prompt) = chat::read(asked.to_string().into(), &self.model).expect("it is valid");
        let mut writer = chat::Writer::new("chatcmpl-1".into(), self.model.clone(), parameters, prompt);
        let mut out = Vec::new();
        let mut sent = String::new();
        let parts: Vec<&[u8]> = data.split(|&byte| byte == 0xff).collect();
        for (i, part) in parts.iter().enumerate() {
            let text = String::from_utf8_lossy(part).into_owned();
            sent.push_str(&text);
            let tokens = part.iter().map(|&byte| Sampled {
                token: TokenId::from(byte),
                logprob: Some(if byte == 0 { f32::NAN } else { -f32::from(byte) }),
                top: vec![(TokenId::from(byte), f32::NEG_INFINITY)],
            });
            let piece = Piece { text, drawn: 1, tokens: tokens.collect(), echoed: Default::default() };
            let finish = Finish { reason: "stop", stop_reason: None, cached_tokens: 0 };
            writer.piece(&mut out, 0, piece, i == 0, (i + 1 == parts.len()).then_some(&finish));
        }
        let out = String::from_utf8(out).expect("events are text");
        assert!(out.ends_with("\n\n"), "the last event is whole");
        let mut received = String::new();
        for event in out.split_terminator("\n\n") {
            let data = event.strip_prefix("data: ").expect("every event is data");
            assert!(!data.contains(['\n', '\r']), "an event is one line: {data}");
            let chunk: Value = serde_json::from_str(data).expect("an event's data is JSON");
            received.push_str(chunk["choices"][0]["delta"]["content"].as_str().unwrap_or_default());
        }
        assert_eq!(received, sent);
    }

    /// Tokens, two bytes each, come out in pieces as they do at once.
    pub fn detokenizer(&self, data: &[u8]) {
        let Some((&options, data)) = data.split_first() else { return };
        let skip = options & 1 > 0;
        let (tokens, _) = data.as_chunks::<2>();
        let vocab = self.model.vocab;
        let tokens: Vec<TokenId> =
            tokens.iter().map(|&pair| TokenId::from(u16::from_le_bytes(pair)) % vocab).collect();
        let in_pieces = |model: &Model| {
            let mut detokenizer = Detokenizer::new(model, skip);
            let mut text: String = tokens.iter().map(|&token| detokenizer.push(model, token)).collect();
            text.push_str(&detokenizer.finish(model));
            text
        };
        assert_eq!(in_pieces(&self.model), self.model.decode(&tokens, skip));
        // A decoder that must see its context is asked again for every token, so not for many.
        if tokens.len() <= 64 {
            in_pieces(&self.by_window);
        }
    }

    /// Messages, divided by a byte that is in no text, go through a template or are refused, and no text of theirs
    /// becomes a control token.
    pub fn template(&self, data: &[u8]) {
        let roles = ["user", "assistant", "system", "tool"];
        let parts = data.split(|&byte| byte == 0xff).map(|part| String::from_utf8_lossy(part).into_owned());
        let messages: Vec<Message> = parts
            .enumerate()
            .map(|(i, content)| Message {
                role: roles[content.len() % roles.len().min(i + 1)].into(),
                content,
            })
            .collect();
        let last = messages.last().map(|message| message.content.clone()).unwrap_or_default();
        let extra: serde_json::Map<String, Value> =
            [("extra".to_owned(), serde_json::from_str(&last).unwrap_or(Value::String(last)))]
                .into_iter()
                .collect();
        let _ = self.printing.encode_chat(&messages, true, &extra);
        let Ok(ids) = self.model.encode_chat(&messages, true, &extra) else { return };
        let blank: Vec<Message> =
            messages.iter().map(|m| Message { role: m.role.clone(), content: String::new() }).collect();
        let own =
            self.model.encode_chat(&blank, true, &extra).expect("what is rendered full is rendered empty");
        let control = |ids: &[TokenId]| ids.iter().filter(|&&id| self.model.is_control(id)).count();
        assert_eq!(control(&ids), control(&own), "a text became a control token");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn harness() -> Harness {
        let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../integration-tests/checkpoints/qwen3");
        Harness::open(&dir).expect("it is committed")
    }

    #[test]
    fn every_harness_holds_over_its_seeds() {
        let harness = harness();
        let seeds = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fuzz/seeds");
        for (name, target) in TARGETS {
            let mut tried = 0;
            for entry in std::fs::read_dir(seeds.join(name)).expect("seeds are committed") {
                target(&harness, &std::fs::read(entry.expect("a file").path()).expect("a file"));
                tried += 1;
            }
            assert!(tried > 0, "{name} has no seeds");
        }
    }
}
