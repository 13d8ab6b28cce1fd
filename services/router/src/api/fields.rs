//! A request body as fields that are taken out one by one, each checked where it is taken.

use serde::Deserialize;
use serde::de::{Deserializer, Error as _, MapAccess, SeqAccess, Visitor};
use serde_json::{Map, Value};

use super::error::ApiError;

/// The fields of a JSON object. `null` is as good as absent.
#[derive(Debug)]
pub(crate) struct Fields(Map<String, Value>);

impl Fields {
    /// Parses a body; an object without duplicate keys at any depth.
    pub(crate) fn parse(body: &[u8]) -> Result<Fields, ApiError> {
        if body.is_empty() {
            return Err(ApiError::invalid_body("the body is empty; send a JSON object"));
        }
        let Strict(value) = serde_json::from_slice(body)
            .map_err(|error| ApiError::invalid_body(format!("the body is not valid JSON: {error}")))?;
        match value {
            Value::Object(fields) => Ok(Fields(fields)),
            _ => Err(ApiError::invalid_body("the body must be a JSON object")),
        }
    }

    /// A field that is there and not null.
    pub(crate) fn take(&mut self, name: &str) -> Option<Value> {
        self.0.remove(name).filter(|value| !value.is_null())
    }

    pub(crate) fn string(&mut self, name: &str) -> Result<Option<String>, ApiError> {
        self.take(name)
            .map(|value| match value {
                Value::String(text) => Ok(text),
                other => Err(wrong_type(name, "a string", &other)),
            })
            .transpose()
    }

    pub(crate) fn bool(&mut self, name: &str) -> Result<Option<bool>, ApiError> {
        self.take(name)
            .map(|value| value.as_bool().ok_or_else(|| wrong_type(name, "true or false", &value)))
            .transpose()
    }

    /// A whole number within bounds.
    pub(crate) fn integer(&mut self, name: &str, least: i64, most: i64) -> Result<Option<i64>, ApiError> {
        let Some(value) = self.take(name) else { return Ok(None) };
        let number = whole(&value).ok_or_else(|| wrong_type(name, "a whole number", &value))?;
        if (least..=most).contains(&number) {
            return Ok(Some(number));
        }
        Err(ApiError::invalid(name, format!("{name} is {number} but must be from {least} to {most}")))
    }

    /// A number within bounds.
    pub(crate) fn number(&mut self, name: &str, least: f64, most: f64) -> Result<Option<f32>, ApiError> {
        let Some(value) = self.take(name) else { return Ok(None) };
        let number = value.as_f64().ok_or_else(|| wrong_type(name, "a number", &value))?;
        if number.is_finite() && (least..=most).contains(&number) {
            return Ok(Some(number as f32));
        }
        Err(ApiError::invalid(name, format!("{name} is {number} but must be from {least} to {most}")))
    }

    pub(crate) fn object(&mut self, name: &str) -> Result<Option<Fields>, ApiError> {
        self.take(name)
            .map(|value| match value {
                Value::Object(fields) => Ok(Fields(fields)),
                other => Err(wrong_type(name, "an object", &other)),
            })
            .transpose()
    }

    pub(crate) fn into_map(self) -> Map<String, Value> {
        self.0
    }
}

/// A whole number, also one that is written as `7.0`: JSON has but one kind of number, and JSON Schema calls that an
/// integer too.
pub(crate) fn whole(value: &Value) -> Option<i64> {
    /// Above this a float no longer says which whole number is meant.
    const FLOAT_MAX: f64 = (1_u64 << 53) as f64;
    let from_float = |float: f64| (float.fract() == 0.0 && float.abs() <= FLOAT_MAX).then_some(float as i64);
    value.as_i64().or_else(|| from_float(value.as_f64().filter(|_| value.is_f64())?))
}

/// An error about a field's type, with what it was instead.
pub(crate) fn wrong_type(name: &str, wanted: &str, value: &Value) -> ApiError {
    let is = match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number of another kind",
        Value::String(_) => "a string",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    };
    ApiError::invalid(name, format!("{name} must be {wanted}, not {is}"))
}

/// JSON in which no object has a key twice: which of the two counts would be anybody's guess.
struct Strict(Value);

impl<'de> Deserialize<'de> for Strict {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Strict, D::Error> {
        struct Reader;

        impl<'de> Visitor<'de> for Reader {
            type Value = Strict;

            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("JSON")
            }

            fn visit_bool<E>(self, value: bool) -> Result<Strict, E> {
                Ok(Strict(value.into()))
            }

            fn visit_i64<E>(self, value: i64) -> Result<Strict, E> {
                Ok(Strict(value.into()))
            }

            fn visit_u64<E>(self, value: u64) -> Result<Strict, E> {
                Ok(Strict(value.into()))
            }

            fn visit_f64<E>(self, value: f64) -> Result<Strict, E> {
                Ok(Strict(value.into()))
            }

            fn visit_str<E>(self, value: &str) -> Result<Strict, E> {
                Ok(Strict(value.into()))
            }

            fn visit_string<E>(self, value: String) -> Result<Strict, E> {
                Ok(Strict(value.into()))
            }

            fn visit_unit<E>(self) -> Result<Strict, E> {
                Ok(Strict(Value::Null))
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Strict, A::Error> {
                let mut items = Vec::new();
                while let Some(Strict(item)) = seq.next_element()? {
                    items.push(item);
                }
                Ok(Strict(items.into()))
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Strict, A::Error> {
                let mut fields = Map::new();
                while let Some((key, Strict(value))) = map.next_entry::<String, Strict>()? {
                    if fields.contains_key(&key) {
                        return Err(A::Error::custom(format!("key {key:?} is there twice")));
                    }
                    fields.insert(key, value);
                }
                Ok(Strict(fields.into()))
            }
        }

        deserializer.deserialize_any(Reader)
    }
}
