//! What each token is in bytes, for tokenizers whose decoder does no more than put bytes together (byte-level
//! BPE, as GPT-2 has it and most models since).

use std::collections::HashSet;

use tandem_types::TokenId;
use tokenizers::{DecoderWrapper, Tokenizer};

/// No vocabulary has more tokens; ids beyond are somebody's mistake.
const TOKENS_MAX: usize = 1 << 24;

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
        // All at once: asked for one by one, each is looked up and copied.
        let known = tokenizer.get_vocab(false);
        let most = known.values().chain(added.keys()).max().map_or(0, |id| *id as usize + 1);
        if most > TOKENS_MAX {
            return None;
        }
        let mut tokens = vec![String::new(); most];
        for (token, id) in known {
            tokens[id as usize] = token;
        }
        for (id, token) in added {
            tokens[id as usize] = token.content;
        }
        let mut vocabulary = Vocabulary { bytes: Vec::new(), ends: Vec::new(), specials, longest: 0 };
        for token in &tokens {
            let before = vocabulary.bytes.len();
            for c in token.chars() {
                let Some(byte) = by_char.get(c as usize).copied().flatten() else {
                    // An added token whose text is no such code stands for its text.
                    vocabulary.bytes.truncate(before);
                    vocabulary.bytes.extend(token.as_bytes());
                    break;
                };
                vocabulary.bytes.push(byte);
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
fn bytes_by_char() -> [Option<u8>; 512] {
    let printable = |b: u8| matches!(b, b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff);
    let mut others = (0x100..).filter_map(char::from_u32);
    let code = |b: u8| if printable(b) { char::from(b) } else { others.next().expect("there are enough") };
    let codes: Vec<char> = (0..=255).map(code).collect();
    let mut bytes = [None; 512];
    for (code, byte) in codes.into_iter().zip(0..=255) {
        bytes[code as usize] = Some(byte);
    }
    bytes
}
