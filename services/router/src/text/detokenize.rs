//! From tokens to text as they come, never half a character.

use tandem_types::TokenId;

use super::Model;

/// The text of one answer as it grows. What it has given out, put together, is the decoded whole.
#[derive(Debug)]
pub(crate) struct Detokenizer {
    skip_special_tokens: bool,
    state: State,
}

#[derive(Debug)]
enum State {
    /// Decoding is putting bytes together: those of a character that is not whole yet.
    Bytes(Vec<u8>),
    /// The decoder has to see tokens in their context.
    Window {
        ids: Vec<TokenId>,
        /// Tokens at the beginning whose text has been given out.
        done: usize,
    },
}

impl Detokenizer {
    pub(crate) fn new(model: &Model, skip_special_tokens: bool) -> Detokenizer {
        let state = match &model.vocabulary {
            Some(_) => State::Bytes(Vec::new()),
            None => State::Window { ids: Vec::new(), done: 0 },
        };
        Detokenizer { skip_special_tokens, state }
    }

    /// The text that this token completes; empty while a character is not whole.
    pub(crate) fn push(&mut self, model: &Model, id: TokenId) -> String {
        match (&mut self.state, &model.vocabulary) {
            (State::Bytes(held), Some(vocabulary)) => {
                if !(self.skip_special_tokens && vocabulary.is_special(id)) {
                    held.extend_from_slice(vocabulary.bytes(id));
                }
                whole_characters(held)
            }
            (state, _) => {
                let State::Window { ids, done } = state else { unreachable!("chosen by the same model") };
                ids.push(id);
                let text = window(model, ids, *done, self.skip_special_tokens);
                // A replacement character at the end is the beginning of a character that is not whole yet.
                if text.ends_with('\u{fffd}') {
                    return String::new();
                }
                // The window begins where text was last whole: some decoders look at what stands before, and
                // none may begin inside a character.
                ids.drain(..*done);
                *done = ids.len();
                text
            }
        }
    }

    /// What is left at the end, whole or not.
    pub(crate) fn finish(&mut self, model: &Model) -> String {
        match &mut self.state {
            State::Bytes(held) => String::from_utf8_lossy(&std::mem::take(held)).into_owned(),
            State::Window { ids, done } => {
                let text = window(model, ids, *done, self.skip_special_tokens);
                *done = ids.len();
                text
            }
        }
    }
}

/// Takes all characters that are whole, and a replacement character for each run of bytes that never will be, as
/// decoding all at once would have it.
fn whole_characters(held: &mut Vec<u8>) -> String {
    let mut text = String::new();
    loop {
        match std::str::from_utf8(held) {
            Ok(whole) => {
                text.push_str(whole);
                held.clear();
                return text;
            }
            Err(error) => {
                let (whole, rest) = held.split_at(error.valid_up_to());
                text.push_str(std::str::from_utf8(whole).expect("valid up to here"));
                let Some(broken) = error.error_len() else {
                    *held = rest.to_vec();
                    return text;
                };
                text.push('\u{fffd}');
                *held = rest[broken..].to_vec();
            }
        }
    }
}

/// The text of the tokens not given out, in their context.
fn window(model: &Model, ids: &[TokenId], done: usize, skip_special_tokens: bool) -> String {
    let before = model.decode(&ids[..done], skip_special_tokens);
    let with = model.decode(ids, skip_special_tokens);
    match with.strip_prefix(before.as_str()) {
        Some(new) => new.to_owned(),
        // A decoder that rewrites what stood before: give out what is longer.
        None => with.get(before.len()..).unwrap_or_default().to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use proptest::prelude::*;

    use super::*;

    fn model() -> Model {
        let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../integration-tests/checkpoints/qwen3");
        Model::open(&dir, "qwen3".into(), None).expect("it is committed")
    }

    /// The same model, as if its decoder needed context.
    fn by_window() -> Model {
        model().without_vocabulary()
    }

    fn whole(model: &Model, ids: &[TokenId], skip: bool) -> String {
        let mut detokenizer = Detokenizer::new(model, skip);
        let mut text = String::new();
        for &id in ids {
            text.push_str(&detokenizer.push(model, id));
        }
        text.push_str(&detokenizer.finish(model));
        text
    }

    #[test]
    fn characters_of_several_tokens_come_whole() {
        let text = "naïve 🦀 日本 ok";
        for model in [model(), by_window()] {
            let ids = model.encode(text, false).unwrap();
            let mut detokenizer = Detokenizer::new(&model, true);
            let pieces: Vec<String> = ids.iter().map(|&id| detokenizer.push(&model, id)).collect();
            assert_eq!(pieces.concat(), text);
            assert!(pieces.iter().any(String::is_empty), "the crab is several tokens");
            assert!(pieces.iter().all(|piece| !piece.contains('\u{fffd}')));
        }
    }

    #[test]
    fn any_tokens_decode_to_what_the_tokenizer_makes_of_them_at_once() {
        for model in [model(), by_window()] {
            let vocab = model.vocab;
            proptest!(ProptestConfig::with_cases(300), |(ids in prop::collection::vec(0..vocab, 0..60), skip: bool)| {
                let reference = model.encoder.tokenizer().decode(&ids, skip).unwrap();
                prop_assert_eq!(&whole(&model, &ids, skip), &reference);
                prop_assert_eq!(&model.decode(&ids, skip), &reference);
            });
        }
    }
}
