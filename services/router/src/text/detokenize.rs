//! From tokens to text as they come, never half a character.

use tandem_types::TokenId;

use super::Model;

/// The text of one answer as it grows. What it has given out, put together, is the decoded whole.
#[derive(Debug)]
pub(crate) struct Detokenizer {
    ids: Vec<TokenId>,
    /// From where the window is decoded.
    from: usize,
    /// Tokens whose text has been given out.
    done: usize,
    skip_special_tokens: bool,
}

impl Detokenizer {
    pub(crate) fn new(skip_special_tokens: bool) -> Detokenizer {
        Detokenizer { ids: Vec::new(), from: 0, done: 0, skip_special_tokens }
    }

    /// The text that this token completes; empty while a character is not whole.
    pub(crate) fn push(&mut self, model: &Model, id: TokenId) -> String {
        self.ids.push(id);
        let text = self.window(model);
        // A replacement character at the end is the beginning of a character that is not whole yet.
        if text.ends_with('\u{fffd}') {
            return String::new();
        }
        self.advance();
        text
    }

    /// What is left at the end, whole or not.
    pub(crate) fn finish(&mut self, model: &Model) -> String {
        let text = self.window(model);
        self.advance();
        text
    }

    /// The text of the tokens not given out, in their context.
    fn window(&self, model: &Model) -> String {
        let before = model.decode(&self.ids[self.from..self.done], self.skip_special_tokens);
        let with = model.decode(&self.ids[self.from..], self.skip_special_tokens);
        match with.strip_prefix(before.as_str()) {
            Some(new) => new.to_owned(),
            // A decoder that rewrites what stood before: give out what is longer.
            None => with.get(before.len()..).unwrap_or_default().to_owned(),
        }
    }

    /// The window begins where text was last whole: some decoders look at what stands before, and none may
    /// begin inside a character.
    fn advance(&mut self) {
        self.from = self.done;
        self.done = self.ids.len();
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

    fn whole(model: &Model, ids: &[TokenId], skip: bool) -> (String, bool) {
        let mut detokenizer = Detokenizer::new(skip);
        let mut text = String::new();
        let mut halves = false;
        for &id in ids {
            let piece = detokenizer.push(model, id);
            halves |= piece.ends_with('\u{fffd}');
            text.push_str(&piece);
        }
        text.push_str(&detokenizer.finish(model));
        (text, halves)
    }

    #[test]
    fn characters_of_several_tokens_come_whole() {
        let model = model();
        let text = "naïve 🦀 日本 ok";
        let ids = model.encode(text).unwrap();
        let (decoded, halves) = whole(&model, &ids, true);
        assert_eq!(decoded, text);
        assert!(!halves);
    }

    #[test]
    fn any_tokens_decode_to_what_they_decode_to_at_once() {
        let model = model();
        let vocab = model.vocab;
        proptest!(ProptestConfig::with_cases(300), |(ids in prop::collection::vec(0..vocab, 0..60), skip: bool)| {
            let (decoded, halves) = whole(&model, &ids, skip);
            prop_assert!(!halves);
            prop_assert_eq!(decoded, model.decode(&ids, skip));
        });
    }
}
