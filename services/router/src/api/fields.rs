//! A request body as fields that are taken out one by one, each checked where it is taken.
//!
//! Fields stay text until somebody asks for them: a body of 32 MiB may hold ten million numbers, and as a tree of
//! values those would take ten times its memory. Lists are therefore visited item by item.

use std::borrow::Cow;
use std::collections::HashMap;
use std::fmt;

use serde::Deserialize;
use serde::de::{Deserializer as _, Error as _, MapAccess, SeqAccess, Visitor};
use serde_json::value::RawValue;
use serde_json::{Deserializer, Map, Value};

use super::error::ApiError;
use super::strings;

/// Fields of an object at most; the API knows some dozens.
const FIELDS_MAX: usize = 1024;
/// Objects and lists within each other, at most.
const DEPTH_MAX: usize = 64;
/// Bytes of a value that is read whole, whatever it is.
const VALUE_BYTES_MAX: usize = 64 << 10;

/// A value that nobody has read yet.
pub(crate) type Raw<'a> = &'a RawValue;

/// The fields of a JSON object. `null` is as good as absent.
#[derive(Debug)]
pub(crate) struct Fields<'a>(HashMap<Cow<'a, str>, Raw<'a>>);

impl<'a> Fields<'a> {
    /// The fields of a body, which is an object without duplicate keys.
    pub(crate) fn parse(body: &'a [u8]) -> Result<Fields<'a>, ApiError> {
        // A mark of the byte order says nothing in UTF-8; some write it all the same.
        let body = body.strip_prefix(b"\xef\xbb\xbf").unwrap_or(body);
        if body.trim_ascii().is_empty() {
            return Err(ApiError::invalid_body("the body is empty; send a JSON object"));
        }
        let text = std::str::from_utf8(body)
            .map_err(|error| ApiError::invalid_body(format!("the body is not UTF-8: {error}")))?;
        if depth(text) > DEPTH_MAX {
            let message = format!("objects and lists may be {DEPTH_MAX} deep within each other");
            return Err(ApiError::invalid_body(message));
        }
        match serde_json::from_str::<Raw>(text) {
            Ok(value) if kind(value) == Kind::Object => Fields::of(value),
            Ok(_) => Err(ApiError::invalid_body("the body must be a JSON object")),
            Err(error) => Err(ApiError::invalid_body(format!("the body is not valid JSON: {error}"))),
        }
    }

    fn of(object: Raw<'a>) -> Result<Fields<'a>, ApiError> {
        serde_json::from_str(object.get())
            .map(|Unique(fields)| Fields(fields))
            .map_err(|error| ApiError::invalid_body(format!("the body is not valid JSON: {error}")))
    }

    /// The fields of a value that must be an object.
    pub(crate) fn read(name: &str, value: Raw<'a>) -> Result<Fields<'a>, ApiError> {
        match kind(value) {
            Kind::Object => Fields::of(value),
            _ => Err(wrong_type(name, "an object", value)),
        }
    }

    /// A field that is there and not null.
    pub(crate) fn take(&mut self, name: &str) -> Option<Raw<'a>> {
        self.0.remove(name).filter(|value| kind(value) != Kind::Null)
    }

    /// Whether a field is there and not null.
    pub(crate) fn has(&self, name: &str) -> bool {
        self.0.get(name).is_some_and(|value| kind(value) != Kind::Null)
    }

    pub(crate) fn string(&mut self, name: &str) -> Result<Option<String>, ApiError> {
        self.take(name).map(|value| string(name, "a string", value)).transpose()
    }

    pub(crate) fn bool(&mut self, name: &str) -> Result<Option<bool>, ApiError> {
        let Some(value) = self.take(name) else { return Ok(None) };
        match value.get() {
            "true" => Ok(Some(true)),
            "false" => Ok(Some(false)),
            _ => Err(wrong_type(name, "true or false", value)),
        }
    }

    /// A whole number within bounds.
    pub(crate) fn integer(&mut self, name: &str, least: i64, most: i64) -> Result<Option<i64>, ApiError> {
        let Some(value) = self.take(name) else { return Ok(None) };
        match whole(value) {
            Some(number) if (least..=most).contains(&number) => Ok(Some(number)),
            Some(_) => Err(out_of_bounds(name, value, &least, &most)),
            None if is_whole(value) => Err(out_of_bounds(name, value, &least, &most)),
            None => Err(wrong_type(name, "a whole number", value)),
        }
    }

    /// A number within bounds.
    pub(crate) fn number(&mut self, name: &str, least: f64, most: f64) -> Result<Option<f32>, ApiError> {
        let Some(value) = self.take(name) else { return Ok(None) };
        if kind(value) != Kind::Number {
            return Err(wrong_type(name, "a number", value));
        }
        match number(value).filter(|number| (least..=most).contains(number)) {
            Some(number) => Ok(Some(number as f32)),
            None => Err(out_of_bounds(name, value, &least, &most)),
        }
    }

    pub(crate) fn object(&mut self, name: &str) -> Result<Option<Fields<'a>>, ApiError> {
        self.take(name).map(|value| Fields::read(name, value)).transpose()
    }

    /// An object of any content, for others to make sense of; not a large one.
    pub(crate) fn map(&mut self, name: &str) -> Result<Option<Map<String, Value>>, ApiError> {
        let Some(value) = self.take(name) else { return Ok(None) };
        if kind(value) != Kind::Object {
            return Err(wrong_type(name, "an object", value));
        }
        if value.get().len() > VALUE_BYTES_MAX {
            return Err(ApiError::invalid(name, format!("{name} may have {VALUE_BYTES_MAX} bytes")));
        }
        serde_json::from_str(value.get())
            .map(Some)
            .map_err(|error| ApiError::invalid(name, format!("{name}: {error}")))
    }
}

/// What a value is, by its first character.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Null,
    Bool,
    Number,
    String,
    List,
    Object,
}

pub(crate) fn kind(value: Raw) -> Kind {
    match value.get().as_bytes().first() {
        Some(b'n') => Kind::Null,
        Some(b't' | b'f') => Kind::Bool,
        Some(b'"') => Kind::String,
        Some(b'[') => Kind::List,
        Some(b'{') => Kind::Object,
        _ => Kind::Number,
    }
}

/// A string, or an error that says what was wanted.
pub(crate) fn string(name: &str, wanted: &str, value: Raw) -> Result<String, ApiError> {
    let mut text = String::new();
    append_string(name, wanted, value, &mut text)?;
    Ok(text)
}

/// Appends a string to a text, or says what was wanted.
pub(crate) fn append_string(name: &str, wanted: &str, value: Raw, text: &mut String) -> Result<(), ApiError> {
    if kind(value) != Kind::String {
        return Err(wrong_type(name, wanted, value));
    }
    if text.is_empty() {
        // No more than it needs, and no less.
        text.reserve_exact(value.get().len() - 2);
    }
    strings::append(value, text)
        .map_err(|error| ApiError::invalid(name, format!("{name} is not a valid string: {error}")))
}

/// The beginning of what a client has said, to be quoted in an error.
pub(crate) fn quoted(said: &str) -> String {
    const CHARS: usize = 64;
    let beginning: String = said.chars().take(CHARS).collect();
    let rest = if beginning.len() < said.len() { "..." } else { "" };
    format!("{beginning:?}{rest}")
}

/// A finite number.
pub(crate) fn number(value: Raw) -> Option<f64> {
    serde_json::from_str::<f64>(value.get()).ok().filter(|number| number.is_finite())
}

/// A small value, whole; `None` for a large one.
pub(crate) fn small(value: Raw) -> Option<Value> {
    (value.get().len() <= 256).then(|| serde_json::from_str(value.get()).ok())?
}

/// Visits the items of a list in order, until one of them is an error.
pub(crate) fn each<'a>(
    name: &str,
    wanted: &str,
    list: Raw<'a>,
    take: impl FnMut(usize, Raw<'a>) -> Result<(), ApiError>,
) -> Result<(), ApiError> {
    if kind(list) != Kind::List {
        return Err(wrong_type(name, wanted, list));
    }
    let mut failed = None;
    let read = Deserializer::from_str(list.get()).deserialize_seq(Items { take, failed: &mut failed });
    match (failed, read) {
        (Some(error), _) => Err(error),
        (None, Err(error)) => Err(ApiError::invalid(name, format!("{name}: {error}"))),
        (None, Ok(())) => Ok(()),
    }
}

/// Visits the entries of an object in order, until one of them is an error. Keys may repeat.
pub(crate) fn each_entry<'a>(
    name: &str,
    object: Raw<'a>,
    take: impl FnMut(Cow<'a, str>, Raw<'a>) -> Result<(), ApiError>,
) -> Result<(), ApiError> {
    if kind(object) != Kind::Object {
        return Err(wrong_type(name, "an object", object));
    }
    let mut failed = None;
    let read = Deserializer::from_str(object.get()).deserialize_map(Entries { take, failed: &mut failed });
    match (failed, read) {
        (Some(error), _) => Err(error),
        (None, Err(error)) => Err(ApiError::invalid(name, format!("{name}: {error}"))),
        (None, Ok(())) => Ok(()),
    }
}

/// A whole number, also one that is written as `7.0`: JSON has but one kind of number, and JSON Schema calls that an
/// integer too.
pub(crate) fn whole(value: Raw) -> Option<i64> {
    /// Above this a float no longer says which whole number is meant.
    const FLOAT_MAX: f64 = (1_u64 << 53) as f64;
    let from_float = |float: f64| (float.fract() == 0.0 && float.abs() <= FLOAT_MAX).then_some(float as i64);
    match kind(value) {
        Kind::Number => {
            value.get().parse().ok().or_else(|| from_float(number(value).filter(|_| !is_whole(value))?))
        }
        _ => None,
    }
}

/// Whether it is digits and nothing else.
fn is_whole(value: Raw) -> bool {
    let digits = value.get().strip_prefix('-').unwrap_or(value.get());
    kind(value) == Kind::Number && digits.bytes().all(|digit| digit.is_ascii_digit())
}

/// An error about a field's type, with what it was instead.
pub(crate) fn wrong_type(name: &str, wanted: &str, value: Raw) -> ApiError {
    let is = match kind(value) {
        Kind::Null => "null",
        Kind::Bool => "a boolean",
        Kind::Number => "a number of another kind",
        Kind::String => "a string",
        Kind::List => "a list",
        Kind::Object => "an object",
    };
    ApiError::invalid(name, format!("{name} must be {wanted}, not {is}"))
}

fn out_of_bounds(name: &str, value: Raw, least: &dyn fmt::Display, most: &dyn fmt::Display) -> ApiError {
    let said: String = value.get().chars().take(32).collect();
    ApiError::invalid(name, format!("{name} is {said} but must be from {least} to {most}"))
}

/// How deep objects and lists lie within each other, what stands in strings left aside.
fn depth(text: &str) -> usize {
    let (mut depth, mut deepest, mut in_string, mut escaped) = (0usize, 0, false, false);
    for byte in text.bytes() {
        match byte {
            _ if escaped => escaped = false,
            b'\\' if in_string => escaped = true,
            b'"' => in_string = !in_string,
            _ if in_string => {}
            b'{' | b'[' => {
                depth += 1;
                deepest = deepest.max(depth);
            }
            b'}' | b']' => depth = depth.saturating_sub(1),
            _ => {}
        }
    }
    deepest
}

/// An object in which no key is there twice: which of the two counts would be anybody's guess.
struct Unique<'a>(HashMap<Cow<'a, str>, Raw<'a>>);

/// The next key of an object, borrowed where it has no escapes.
fn next_key<'de, A: MapAccess<'de>>(map: &mut A) -> Result<Option<Cow<'de, str>>, A::Error> {
    let key = map.next_key::<Raw>()?;
    key.map(|key| strings::read(key).map_err(|half| A::Error::custom(format!("a key: {half}")))).transpose()
}

impl<'de> Deserialize<'de> for Unique<'de> {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Reader;

        impl<'de> Visitor<'de> for Reader {
            type Value = Unique<'de>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
                let mut fields = HashMap::new();
                while let Some(key) = next_key(&mut map)? {
                    if fields.len() == FIELDS_MAX {
                        return Err(A::Error::custom(format!("an object may have {FIELDS_MAX} keys")));
                    }
                    if fields.contains_key(&key) {
                        return Err(A::Error::custom(format!("key {} is there twice", quoted(&key))));
                    }
                    fields.insert(key, map.next_value()?);
                }
                Ok(Unique(fields))
            }
        }

        deserializer.deserialize_map(Reader)
    }
}

/// Passes items on one by one; the first error ends it.
struct Items<'e, F> {
    take: F,
    failed: &'e mut Option<ApiError>,
}

impl<'de, F: FnMut(usize, Raw<'de>) -> Result<(), ApiError>> Visitor<'de> for Items<'_, F> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a list")
    }

    fn visit_seq<A: SeqAccess<'de>>(mut self, mut seq: A) -> Result<(), A::Error> {
        let mut at = 0;
        while let Some(item) = seq.next_element()? {
            if let Err(error) = (self.take)(at, item) {
                *self.failed = Some(error);
                return Err(A::Error::custom("it was refused"));
            }
            at += 1;
        }
        Ok(())
    }
}

/// Passes entries on one by one; the first error ends it.
struct Entries<'e, F> {
    take: F,
    failed: &'e mut Option<ApiError>,
}

impl<'de, F: FnMut(Cow<'de, str>, Raw<'de>) -> Result<(), ApiError>> Visitor<'de> for Entries<'_, F> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object")
    }

    fn visit_map<A: MapAccess<'de>>(mut self, mut map: A) -> Result<(), A::Error> {
        while let Some(key) = next_key(&mut map)? {
            if let Err(error) = (self.take)(key, map.next_value()?) {
                *self.failed = Some(error);
                return Err(A::Error::custom("it was refused"));
            }
        }
        Ok(())
    }
}
