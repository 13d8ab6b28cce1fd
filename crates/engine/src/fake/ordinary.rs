//! Which tokens of a vocabulary are ordinary: no control tokens, so that nothing the fake draws ends anything.

use std::path::Path;

use serde_json::Value;
use tandem_types::TokenId;

use crate::LoadError;

/// The ordinary tokens of a vocabulary.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ordinary {
    tokens: Vec<TokenId>,
    vocab: u32,
}

impl Ordinary {
    /// All ids below `vocab` but those named.
    ///
    /// # Panics
    /// If none is left.
    pub fn new(vocab: u32, control: &[TokenId]) -> Ordinary {
        let tokens: Vec<TokenId> = (0..vocab).filter(|token| !control.contains(token)).collect();
        assert!(!tokens.is_empty(), "a vocabulary has ordinary tokens");
        Ordinary { tokens, vocab }
    }

    /// Those of the checkpoint in `dir`, from `config.json` and `tokenizer.json`.
    pub fn read(dir: &Path) -> Result<Ordinary, LoadError> {
        let config = read(dir, "config.json")?;
        let tokenizer = read(dir, "tokenizer.json")?;
        let vocab = match &tokenizer["model"]["vocab"] {
            Value::Object(entries) => {
                entries.values().filter_map(Value::as_u64).map(|id| id as TokenId).collect()
            }
            Value::Array(entries) => (0..entries.len() as TokenId).collect::<Vec<_>>(),
            _ => return Err(broken(dir, "tokenizer.json", "it has no vocabulary")),
        };
        let added = tokenizer["added_tokens"].as_array().map_or(&[][..], |tokens| tokens);
        let control: Vec<TokenId> =
            added.iter().filter_map(|token| token["id"].as_u64()).map(|id| id as TokenId).collect();
        let size = config["vocab_size"].as_u64();
        let size = size.ok_or_else(|| broken(dir, "config.json", "vocab_size is missing"))? as u32;
        let mut tokens: Vec<TokenId> =
            vocab.into_iter().filter(|id| *id < size && !control.contains(id)).collect();
        tokens.sort_unstable();
        tokens.dedup();
        if tokens.is_empty() {
            return Err(broken(dir, "tokenizer.json", "it has no ordinary tokens"));
        }
        Ok(Ordinary { tokens, vocab: size })
    }

    /// Token ids are below this.
    pub fn vocab(&self) -> u32 {
        self.vocab
    }

    /// One of them.
    pub(super) fn at(&self, random: u64) -> TokenId {
        self.tokens[(random % self.tokens.len() as u64) as usize]
    }
}

fn broken(dir: &Path, file: &str, reason: &str) -> LoadError {
    LoadError::Unsupported { model: dir.join(file).display().to_string(), reason: reason.to_owned() }
}

fn read(dir: &Path, file: &str) -> Result<Value, LoadError> {
    let text = std::fs::read_to_string(dir.join(file)).map_err(|e| broken(dir, file, &e.to_string()))?;
    serde_json::from_str(&text).map_err(|e| broken(dir, file, &e.to_string()))
}
