//! From text to tokens, word by word from memory where that gives the same tokens.
//!
//! Byte-level BPE cuts a text into words before it merges anything, and the patterns in use all cut between what is
//! no space and a space with a letter behind it. A text may therefore be cut there first, and tokens of the pieces
//! looked up: most words have been seen before, and a tokenizer takes microseconds for each.

use std::collections::HashMap;
use std::hash::{BuildHasher, Hasher};
use std::path::Path;
use std::sync::RwLock;

use serde::Deserialize;
use serde_json::Value;
use tandem_chassis::seam;
use tandem_types::TokenId;
use tokenizers::Tokenizer;
use xxhash_rust::xxh3::xxh3_64_with_seed;

/// Pieces remembered, in each of two generations: the older one is forgotten when the younger is full.
const PIECES_MAX: usize = 32_768;
/// Pieces looked up before others get their turn to remember some.
const PIECES_AT_ONCE: usize = 1024;
/// Bytes of a piece that is remembered, at most.
const PIECE_BYTES_MAX: usize = 64;

/// A tokenizer, and what it has made of pieces of text.
pub(super) struct Encoder {
    tokenizer: Tokenizer,
    /// `None` where pieces might have other tokens than the whole.
    pieces: Option<RwLock<Pieces>>,
    /// So many digits in a row are a word of their own, if that is how the pattern has it.
    digits: Option<usize>,
    /// Tokens that begin and end every text.
    frame: Frame,
}

/// What stands before every text, and behind it.
type Frame = (Vec<TokenId>, Vec<TokenId>);
type Generation = HashMap<Box<str>, Box<[TokenId]>, Seeded>;

/// XXH3 of a piece at once: the hasher that takes input bit by bit has half a kibibyte of state to set up, which costs
/// more than the rest of a lookup.
#[derive(Clone, Copy)]
struct Seeded(u64);

impl BuildHasher for Seeded {
    type Hasher = Seeded;

    fn build_hasher(&self) -> Seeded {
        *self
    }
}

impl Hasher for Seeded {
    fn write(&mut self, bytes: &[u8]) {
        self.0 = xxh3_64_with_seed(bytes, self.0);
    }

    /// What ends a text's bytes is the same for all.
    fn write_u8(&mut self, _: u8) {}

    fn finish(&self) -> u64 {
        self.0
    }
}

struct Pieces {
    young: Generation,
    old: Generation,
}

impl Encoder {
    /// `file` is the one that the tokenizer was read from.
    pub(super) fn new(tokenizer: Tokenizer, file: &Path) -> Result<Encoder, String> {
        let frame = frame(&tokenizer)?;
        let facts = std::fs::read(file).map_err(|error| error.to_string())?;
        let facts: Facts = serde_json::from_slice(&facts).map_err(|error| error.to_string())?;
        let pieces = (facts.cuts_at_words() && frame.is_some()).then(|| RwLock::new(Pieces::new()));
        Ok(Encoder { tokenizer, pieces, digits: facts.digits(), frame: frame.unwrap_or_default() })
    }

    pub(super) fn tokenizer(&self) -> &Tokenizer {
        &self.tokenizer
    }

    /// Tokens of a text; `add_special`: with those that begin and end every text.
    pub(super) fn encode(&self, text: &str, add_special: bool) -> Result<Vec<TokenId>, String> {
        let Some(pieces) = &self.pieces else { return self.whole(text, add_special) };
        let read = || pieces.read().expect("nothing panics under this lock");
        let mut ids = Vec::with_capacity(text.len() / 3 + 8);
        if add_special {
            ids.extend_from_slice(&self.frame.0);
        }
        let (mut rest, mut known, mut held) = (text, read(), 0);
        while !rest.is_empty() {
            let (piece, after) = rest.split_at(first_cut(rest, self.digits));
            rest = after;
            held += 1;
            if let Some(found) = known.young.get(piece) {
                ids.extend_from_slice(found);
                if held < PIECES_AT_ONCE {
                    continue;
                }
                drop(known);
            } else {
                let old = known.old.get(piece).cloned();
                // Whoever remembers something waits for all who read, and they for him: not while the tokenizer works.
                drop(known);
                let found = match old {
                    Some(found) => found,
                    None => self.whole(piece, false)?.into_boxed_slice(),
                };
                ids.extend_from_slice(&found);
                if piece.len() <= PIECE_BYTES_MAX {
                    pieces.write().expect("nothing panics under this lock").remember(piece, found);
                }
            }
            (known, held) = (read(), 0);
        }
        drop(known);
        if add_special {
            ids.extend_from_slice(&self.frame.1);
        }
        Ok(ids)
    }

    /// By the tokenizer itself.
    pub(super) fn whole(&self, text: &str, add_special: bool) -> Result<Vec<TokenId>, String> {
        let encoded = self.tokenizer.encode_fast(text, add_special);
        encoded.map(|encoded| encoded.get_ids().to_vec()).map_err(|error| error.to_string())
    }
}

impl Pieces {
    fn new() -> Pieces {
        // What lies in which bucket is nobody's to guess.
        let generation = || Generation::with_hasher(Seeded(seam::random_u64()));
        Pieces { young: generation(), old: generation() }
    }

    fn remember(&mut self, piece: &str, ids: Box<[TokenId]>) {
        if self.young.len() >= PIECES_MAX {
            std::mem::swap(&mut self.young, &mut self.old);
            self.young.clear();
        }
        self.young.insert(piece.into(), ids);
    }
}

/// Where a text may be cut first, in bytes: between what is no space and a space with a letter behind it, and after
/// every so many `digits` of a row of them.
fn first_cut(text: &str, digits: Option<usize>) -> usize {
    let bytes = text.as_bytes();
    let digit = |at: usize| bytes[at].is_ascii_digit();
    // Digits of the row so far; `None` in a row that may have begun with digits of another script.
    let mut row = Some(usize::from(digit(0)));
    let mut at = 1;
    loop {
        // Nearly all bytes are neither, and this loop is most of what a long prompt costs here.
        let others = bytes[at..].iter().take_while(|&&byte| byte != b' ' && !byte.is_ascii_digit()).count();
        if others > 0 {
            row = Some(0);
            at += others;
        }
        if at == bytes.len() {
            return at;
        }
        if digit(at) {
            match (row, digits) {
                (Some(row), Some(digits)) if row > 0 && row % digits == 0 => return at,
                _ if !bytes[at - 1].is_ascii() => row = None,
                _ => row = row.map(|row| row + 1),
            }
        } else {
            row = Some(0);
            if !text[..at].chars().next_back().is_some_and(char::is_whitespace)
                && text[at + 1..].chars().next().is_some_and(is_letter)
            {
                return at;
            }
        }
        at += 1;
    }
}

/// Letters for certain (Unicode's category L), of alphabets that put spaces between words.
fn is_letter(c: char) -> bool {
    matches!(c,
        'a'..='z' | 'A'..='Z'
        | '\u{c0}'..='\u{d6}' | '\u{d8}'..='\u{f6}' | '\u{f8}'..='\u{24f}'
        | '\u{400}'..='\u{481}' | '\u{48a}'..='\u{52f}')
}

/// What a tokenizer puts around every text: before it and behind it, if it is as simple as that.
fn frame(tokenizer: &Tokenizer) -> Result<Option<Frame>, String> {
    let ids = |special| {
        let encoded = tokenizer.encode_fast("a", special).map_err(|error| error.to_string());
        encoded.map(|encoded| encoded.get_ids().to_vec())
    };
    let (with, without) = (ids(true)?, ids(false)?);
    let at = with.windows(without.len().max(1)).position(|window| window == without);
    Ok(at.map(|at| (with[..at].to_vec(), with[at + without.len()..].to_vec())))
}

/// What of `tokenizer.json` decides about cuts.
#[derive(Deserialize)]
struct Facts {
    #[serde(default)]
    added_tokens: Vec<Added>,
    #[serde(default)]
    normalizer: Value,
    #[serde(default)]
    pre_tokenizer: Value,
    model: ModelFacts,
}

#[derive(Deserialize)]
struct Added {
    content: String,
    #[serde(default)]
    lstrip: bool,
    #[serde(default)]
    rstrip: bool,
    #[serde(default)]
    single_word: bool,
}

#[derive(Deserialize)]
struct ModelFacts {
    #[serde(default, rename = "type")]
    kind: String,
    #[serde(default)]
    dropout: Option<f32>,
}

/// Patterns of words, as Qwen has it with single digits, and as Llama 3 and GPT-4 have it with three at a time. What GPT-2 had is a part of `ByteLevel`.
const PATTERNS: [&str; 2] = [
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
];

impl Facts {
    fn steps(&self) -> Vec<&Value> {
        match self.pre_tokenizer["pretokenizers"].as_array() {
            Some(steps) => steps.iter().collect(),
            None => vec![&self.pre_tokenizer],
        }
    }

    fn digits(&self) -> Option<usize> {
        self.steps().into_iter().find_map(|step| {
            if step["type"] == "Digits" && step["individual_digits"] == true {
                return Some(1);
            }
            let at = PATTERNS.iter().position(|pattern| step["pattern"]["Regex"] == *pattern)?;
            Some([1, 3][at])
        })
    }

    fn cuts_at_words(&self) -> bool {
        let plain = |token: &Added| {
            !(token.lstrip || token.rstrip || token.single_word || token.content.contains(' '))
        };
        let composes = self.normalizer.is_null() || self.normalizer["type"] == "NFC";
        let steps = self.steps();
        let cuts = |step: &&Value| match step["type"].as_str() {
            Some("ByteLevel") => step["use_regex"] != false,
            Some("Split") => {
                step["pattern"]["Regex"].as_str().is_some_and(|pattern| PATTERNS.contains(&pattern))
            }
            _ => false,
        };
        let fits = |step: &&Value| match step["type"].as_str() {
            Some("ByteLevel") => step["add_prefix_space"] == false,
            Some("Split") => cuts(step) && step["behavior"] == "Isolated" && step["invert"] == false,
            Some("Digits") => true,
            _ => false,
        };
        self.model.kind == "BPE"
            && self.model.dropout.is_none()
            && composes
            && self.added_tokens.iter().all(plain)
            && steps.iter().all(fits)
            && steps.iter().any(cuts)
    }
}

#[cfg(test)]
mod tests {
    use std::path::{Path, PathBuf};

    use proptest::prelude::*;

    use super::*;

    fn committed(dir: &str) -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("../..").join(dir).join("tokenizer.json")
    }

    fn encoder(file: &Path) -> Encoder {
        Encoder::new(Tokenizer::from_file(file).expect("a tokenizer"), file).expect("it is whole")
    }

    /// The committed ones have Qwen's pattern, and GPT-2's with single digits; another is made to have Llama 3's.
    fn encoders() -> Vec<Encoder> {
        let qwen = committed("integration-tests/checkpoints/qwen3");
        let text = std::fs::read_to_string(&qwen).expect("it is committed");
        let by_threes = text.replace(r"|\\p{N}|", r"|\\p{N}{1,3}|");
        assert_ne!(by_threes, text);
        let file = std::env::temp_dir().join(format!("tandem-{:x}-llama3.json", seam::random_u64()));
        std::fs::write(&file, by_threes).expect("it can be written");
        let llama = encoder(&file);
        std::fs::remove_file(&file).expect("it was written");
        assert_eq!(llama.digits, Some(3));
        vec![encoder(&qwen), encoder(&committed("demo-model")), llama]
    }

    #[test]
    fn pieces_have_the_tokens_of_the_whole() {
        let encoders = encoders();
        assert!(encoders.iter().all(|encoder| encoder.pieces.is_some()), "or nothing is tested");
        // Everything that patterns tell apart, in any order.
        let part = prop_oneof![
            Just(" ".to_owned()),
            Just("  ".to_owned()),
            "[a-zA-Z]{1,9}",
            "[ \t\r\n]{1,3}",
            "[0-9]{1,9}",
            "[0-9²٣]{1,9}",
            "[.,:;!?'\"(){}<>|_-]{1,3}",
            Just("'s".to_owned()),
            Just("<|im_start|>".to_owned()),
            Just("<|im_end|>".to_owned()),
            Just("e\u{301}".to_owned()),
            Just("\u{301}".to_owned()),
            "[à-öø-ÿа-яÀ-Ö×÷]{1,4}",
            "[日本語中文]{1,3}",
            Just("🦀".to_owned()),
            Just("\u{a0}".to_owned()),
            Just("\u{2003}".to_owned()),
            "\\PC{1,3}",
        ];
        let text = prop::collection::vec(part, 0..40).prop_map(|parts| parts.concat());
        proptest!(ProptestConfig { cases: 300, failure_persistence: None, ..ProptestConfig::default() }, |(text in text, special: bool)| {
            for encoder in &encoders {
                let whole = encoder.whole(&text, special).expect("it encodes");
                // From nothing, and then from memory.
                prop_assert_eq!(&encoder.encode(&text, special).expect("it encodes"), &whole);
                prop_assert_eq!(&encoder.encode(&text, special).expect("it encodes"), &whole);
            }
        });
    }

    #[test]
    fn memory_is_bounded() {
        let encoder = &encoders()[0];
        for n in 0..(3 * PIECES_MAX as u64) / 1000 {
            let letter = |n: u64| char::from(b'a' + (n % 26) as u8);
            let word = |n: u64| [' ', letter(n), letter(n / 26), letter(n / 676), letter(n / 17_576)];
            let text: String = (0..1000).flat_map(|i| word(n * 1000 + i)).collect();
            encoder.encode(&text, false).expect("it encodes");
        }
        let pieces = encoder.pieces.as_ref().expect("it cuts at words").read().expect("unpoisoned");
        assert!(pieces.young.len() <= PIECES_MAX && pieces.old.len() <= PIECES_MAX);
        assert!(pieces.old.len() + pieces.young.len() >= PIECES_MAX, "and something is remembered");
    }

    #[test]
    fn what_cuts_otherwise_is_left_whole() {
        let facts = |change: &dyn Fn(&mut Value)| {
            let mut facts = serde_json::json!({
                "added_tokens": [{ "content": "<s>" }],
                "normalizer": null,
                "pre_tokenizer": { "type": "ByteLevel", "add_prefix_space": false, "use_regex": true },
                "model": { "type": "BPE", "dropout": null },
            });
            change(&mut facts);
            serde_json::from_value::<Facts>(facts).expect("facts").cuts_at_words()
        };
        assert!(facts(&|_| {}));
        assert!(!facts(&|f| f["added_tokens"][0]["rstrip"] = true.into()));
        assert!(!facts(&|f| f["added_tokens"][0]["content"] = "a b".into()));
        assert!(!facts(&|f| f["normalizer"] = serde_json::json!({ "type": "Lowercase" })));
        assert!(!facts(&|f| f["pre_tokenizer"]["add_prefix_space"] = true.into()));
        assert!(!facts(&|f| f["pre_tokenizer"]["use_regex"] = false.into()));
        assert!(!facts(&|f| f["pre_tokenizer"] = Value::Null));
        assert!(!facts(&|f| f["model"]["type"] = "Unigram".into()));
        assert!(!facts(&|f| f["model"]["dropout"] = 0.1.into()));
    }
}
