//! JSON strings, read without memory beyond what they say: serde_json gathers a string with escapes in a buffer that
//! doubles as it grows and copies it once more at the end, which takes several times a large body.

use std::borrow::Cow;

use serde_json::value::RawValue;

/// What is wrong with a string that a JSON parser has let through.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("an escape in it is half a character")]
pub(crate) struct Half;

/// A string as it stands in JSON, quotes and all, without the quotes.
fn inner(string: &RawValue) -> &str {
    let text = string.get();
    text.strip_prefix('"')
        .and_then(|text| text.strip_suffix('"'))
        .expect("callers have looked that it is a string")
}

/// What a string says; borrowed where it has no escapes.
pub(crate) fn read(string: &RawValue) -> Result<Cow<'_, str>, Half> {
    let text = inner(string);
    if !text.contains('\\') {
        return Ok(Cow::Borrowed(text));
    }
    let mut said = String::with_capacity(text.len());
    append(string, &mut said)?;
    Ok(Cow::Owned(said))
}

/// Appends what a string says, which is never more bytes than it has in JSON.
pub(crate) fn append(string: &RawValue, to: &mut String) -> Result<(), Half> {
    let mut rest = inner(string);
    while let Some(at) = rest.find('\\') {
        to.push_str(&rest[..at]);
        let escape = rest.as_bytes()[at + 1];
        rest = &rest[at + 2..];
        let said = match escape {
            b'b' => '\u{8}',
            b'f' => '\u{c}',
            b'n' => '\n',
            b'r' => '\r',
            b't' => '\t',
            b'u' => escaped(&mut rest)?,
            // A quote, a slash or a backslash; nothing else has passed the parser.
            other => char::from(other),
        };
        to.push(said);
    }
    to.push_str(rest);
    Ok(())
}

/// The character of an escape behind its `\u`, or of two that make one.
fn escaped(rest: &mut &str) -> Result<char, Half> {
    let unit = |rest: &mut &str| -> Option<u32> {
        let digits = rest.get(..4)?;
        *rest = &rest[4..];
        u32::from_str_radix(digits, 16).ok()
    };
    let first = unit(rest).ok_or(Half)?;
    if !(0xd800..0xdc00).contains(&first) {
        return char::from_u32(first).ok_or(Half);
    }
    *rest = rest.strip_prefix("\\u").ok_or(Half)?;
    let second = unit(rest).filter(|second| (0xdc00..0xe000).contains(second)).ok_or(Half)?;
    char::from_u32(0x10000 + ((first - 0xd800) << 10) + (second - 0xdc00)).ok_or(Half)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn agrees(json: &str) {
        let raw: &RawValue = serde_json::from_str(json).expect("a value");
        let whole: Result<String, _> = serde_json::from_str(json);
        let said = read(raw);
        assert_eq!(said.clone().ok().as_deref(), whole.as_deref().ok(), "{json}");
        if let Ok(Cow::Owned(said)) = said {
            assert_eq!(said.capacity(), json.len() - 2, "it has grown: {json}");
        }
    }

    #[test]
    fn escapes_say_what_they_say_to_serde_json() {
        for json in [
            r#""""#,
            r#""plain""#,
            r#""\"\\\/\b\f\n\r\t""#,
            r#""\u0041\u00e9\u4f60\uFFFF\u0000""#,
            r#""\ud83d\ude00 and \uD83D\uDE00""#,
            r#""\ud83d""#,
            r#""\ude00""#,
            r#""\ud83d\n""#,
            r#""\ud83dx""#,
            r#""\ud83d\u0041""#,
            r#""\ud83d\ud83d\ude00""#,
            "\"\u{1f600}\\n\u{e9}\"",
        ] {
            agrees(json);
        }
    }

    proptest! {
        #[test]
        fn any_string_says_what_it_says_to_serde_json(
            pieces in prop::collection::vec(
                prop_oneof![
                    "[ -!#-\\[\\]-~é你😀]{0,6}".prop_map(String::from),
                    "\\\\[\"\\\\/bfnrt]",
                    "\\\\u[0-9a-fA-F]{4}",
                    Just("\\ud83d\\ude00".to_owned()),
                ],
                0..12,
            ),
        ) {
            agrees(&format!("\"{}\"", pieces.concat()));
        }
    }
}
