//! A checkpoint for the fake engine with a vocabulary as large as real ones: what a gateway's text side is
//! measured with.

use std::collections::{BTreeSet, HashMap};
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use serde_json::{Map, Value, json};

/// Ordinary tokens: as many as the larger of today's models have.
const TOKENS: usize = 150_000;
/// Behind them, the control tokens of the demo model's template.
const CONTROL: [&str; 3] = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"];

/// The folder of the checkpoint; made once per parent.
pub fn checkpoint(parent: &Path) -> io::Result<PathBuf> {
    let dir = parent.join("vocabulary-150000");
    if dir.join("complete").is_file() {
        return Ok(dir);
    }
    fs::create_dir_all(&dir)?;
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let demo = root.join("demo-model");
    let mut tokenizer: Value = serde_json::from_str(&fs::read_to_string(demo.join("tokenizer.json"))?)?;
    let (vocabulary, merges) = grown(&words(&root)?);
    tokenizer["model"]["vocab"] = vocabulary;
    tokenizer["model"]["merges"] = merges;
    for (at, control) in CONTROL.iter().enumerate() {
        assert_eq!(tokenizer["added_tokens"][at]["content"], *control, "the demo model has these");
        tokenizer["added_tokens"][at]["id"] = (TOKENS + at).into();
    }
    let mut config: Value = serde_json::from_str(&fs::read_to_string(demo.join("config.json"))?)?;
    config["vocab_size"] = (TOKENS + CONTROL.len()).into();
    config["eos_token_id"] = (TOKENS + 2).into();
    config["pad_token_id"] = TOKENS.into();
    let generation = json!({ "eos_token_id": [TOKENS + 2, TOKENS] });
    for (file, content) in
        [("tokenizer.json", &tokenizer), ("config.json", &config), ("generation_config.json", &generation)]
    {
        fs::write(dir.join(file), content.to_string())?;
    }
    for file in ["tokenizer_config.json", "chat_template.jinja"] {
        fs::copy(demo.join(file), dir.join(file))?;
    }
    fs::write(dir.join("complete"), "")?;
    Ok(dir)
}

/// Words of this repository, the most frequent first.
fn words(root: &Path) -> io::Result<Vec<String>> {
    let mut counts: HashMap<String, usize> = HashMap::new();
    let mut folders: Vec<PathBuf> = ["docs", "crates", "services"].map(|folder| root.join(folder)).into();
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder)? {
            let path = entry?.path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|end| end == "rs" || end == "md") {
                let text = fs::read_to_string(path)?;
                for word in text.split(|letter: char| !letter.is_ascii_lowercase()) {
                    *counts.entry(word.to_owned()).or_default() += usize::from(word.len() > 1);
                }
            }
        }
    }
    let mut words: Vec<(usize, String)> = counts.into_iter().map(|(word, count)| (count, word)).collect();
    words.sort_by(|a, b| b.0.cmp(&a.0).then(a.1.cmp(&b.1)));
    Ok(words.into_iter().map(|(_, word)| word).filter(|word| word.len() > 1).collect())
}

/// A byte-level vocabulary in which each word behind a space is a token, and each beginning of it; syllables in
/// every combination make up what is missing.
fn grown(words: &[String]) -> (Value, Value) {
    let mut vocabulary: Map<String, Value> = Map::new();
    for (id, letter) in alphabet().into_iter().enumerate() {
        vocabulary.insert(letter.to_string(), id.into());
    }
    let syllables: Vec<String> = "bdfghklmnprstvwz"
        .chars()
        .flat_map(|first| "aeiou".chars().map(move |second| format!("{first}{second}")))
        .collect();
    let invented = (0..).map(|number: usize| {
        let (mut rest, mut word) = (number, String::new());
        for _ in 0..4 {
            word.push_str(&syllables[rest % syllables.len()]);
            rest /= syllables.len();
        }
        word
    });
    let mut merges: Vec<Value> = Vec::new();
    'words: for word in words.iter().cloned().chain(invented) {
        let mut begun = String::from(SPACE);
        for letter in word.chars() {
            let before = begun.clone();
            begun.push(letter);
            if vocabulary.len() == TOKENS {
                break 'words;
            }
            if !vocabulary.contains_key(&begun) {
                merges.push(json!([before, letter.to_string()]));
                vocabulary.insert(begun.clone(), vocabulary.len().into());
            }
        }
    }
    (Value::Object(vocabulary), merges.into())
}

/// The letter that stands for a space in byte-level vocabularies.
const SPACE: char = '\u{120}';

/// The letters that stand for the 256 bytes: printable ones for themselves, the others from U+0100 on.
fn alphabet() -> BTreeSet<char> {
    let printable = |byte: &u8| matches!(byte, b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff);
    let itself = (0..=255u8).filter(printable).map(char::from);
    let others = (0..=255u8).filter(|byte| !printable(byte)).count() as u32;
    itself.chain((0..others).filter_map(|at| char::from_u32(0x100 + at))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_vocabulary_has_its_size_every_byte_and_merges_that_lead_to_its_tokens() {
        let (vocabulary, merges) = grown(&["time".to_owned(), "ti".to_owned()]);
        let vocabulary = vocabulary.as_object().expect("a map");
        assert_eq!((vocabulary.len(), alphabet().len()), (TOKENS, 256));
        let ids: BTreeSet<u64> = vocabulary.values().filter_map(Value::as_u64).collect();
        assert_eq!(ids.into_iter().next_back(), Some(TOKENS as u64 - 1), "ids have no gap");
        for merge in merges.as_array().expect("a list") {
            let (left, right) = (merge[0].as_str().expect("text"), merge[1].as_str().expect("text"));
            let joined = [left, right].concat();
            assert!([left, right, &joined].iter().all(|token| vocabulary.contains_key(*token)), "{merge}");
        }
        assert!(vocabulary.contains_key("\u{120}time"));
    }
}
