//! What each token is in bytes, for tokenizers whose decoder does no more than put bytes together (byte-level
//! BPE, as GPT-2 has it and most models since).

use std::collections::{HashMap, HashSet};

use tandem_types::TokenId;
use tokenizers::{DecoderWrapper, Tokenizer};

/// The bytes of every token, one after the other.
pub(super) struct Vocabulary {
    bytes: Vec<u8>,
    /// Where each token's end; it begins where the one before it ends.
    ends: Vec<u32>,
    specials: HashSet<TokenId>,
    /// Bytes of the longest token.
    pub(super) longest: usize,
}

impl Vocabulary {
    /// `None` for a decoder that does something else.
    pub(super) fn of(tokenizer: &Tokenizer) -> Option<Vocabulary> {
        let Some(DecoderWrapper::ByteLevel(_)) = tokenizer.get_decoder() else { return None };
        let by_char = bytes_by_char();
        let added = tokenizer.get_added_tokens_decoder();
        let specials = added.iter().filter(|(_, token)| token.special).map(|(id, _)| *id).collect();
        let most = tokenizer.get_vocab(true).into_values().max().map_or(0, |id| id + 1);
        let mut vocabulary = Vocabulary { bytes: Vec::new(), ends: Vec::new(), specials, longest: 0 };
        for id in 0..most {
            let before = vocabulary.bytes.len();
            let token = tokenizer.id_to_token(id).unwrap_or_default();
            match token.chars().map(|c| by_char.get(&c).copied()).collect::<Option<Vec<u8>>>() {
                Some(bytes) => vocabulary.bytes.extend(bytes),
                // An added token whose text is no such code stands for its text.
                None => vocabulary.bytes.extend(token.as_bytes()),
            }
            vocabulary.longest = vocabulary.longest.max(vocabulary.bytes.len() - before);
            vocabulary.ends.push(u32::try_from(vocabulary.bytes.len()).ok()?);
        }
        Some(vocabulary)
    }

    /// Its bytes; none for an id that there is not.
    pub(super) fn bytes(&self, id: TokenId) -> &[u8] {
        let at = id as usize;
        let Some(&end) = self.ends.get(at) else { return &[] };
        let start = if at == 0 { 0 } else { self.ends[at - 1] };
        &self.bytes[start as usize..end as usize]
    }

    pub(super) fn is_special(&self, id: TokenId) -> bool {
        self.specials.contains(&id)
    }
}

/// The characters that stand for bytes in such vocabularies: printable ones for themselves, the others in order
/// from U+0100 (Radford et al., "Language models are unsupervised multitask learners", 2019).
fn bytes_by_char() -> HashMap<char, u8> {
    let printable = |b: u8| matches!(b, b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff);
    let mut others = (0x100..).filter_map(char::from_u32);
    let code = |b: u8| if printable(b) { char::from(b) } else { others.next().expect("there are enough") };
    let codes: Vec<char> = (0..=255).map(code).collect();
    codes.into_iter().zip(0..=255).collect()
}
