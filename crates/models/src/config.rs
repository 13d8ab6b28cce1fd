//! Reads `config.json` in both spellings: that of transformers 5 (`rope_parameters`, `dtype`) and the older one
//! (`rope_theta`, `rope_scaling`, `torch_dtype`). Architectures ask it for facts; every answer is checked.

use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};

use serde_json::{Map, Value};
use tandem_types::TokenId;

use crate::error::Error;
use crate::rope::{Pairing, RopeKind, RopeSpec, yarn_attention_factor};
use crate::weights::Dtype;

/// Base of the rotation where a config gives none.
const THETA_DEFAULT: f64 = 10_000.0;
/// The largest size that is believed; far above every real model, far below what overflows.
const SIZE_MAX: usize = 1 << 24;

/// Longer files of JSON are not read; the index of a model of a trillion weights is shorter.
const FILE_BYTES_MAX: u64 = 256 << 20;

/// A model's configuration: a JSON object and the file it came from.
pub struct Config {
    file: PathBuf,
    facts: Map<String, Value>,
}

impl Config {
    /// Reads a file that must hold a JSON object.
    pub fn read(file: &Path) -> Result<Config, Error> {
        let unreadable = |source| Error::Unreadable { file: file.to_owned(), source };
        let facts = std::fs::metadata(file).map_err(unreadable)?;
        // A pipe would be waited for, and a device may never end.
        if !facts.is_file() {
            return Err(unreadable(std::io::Error::other("is not an ordinary file")));
        }
        if facts.len() > FILE_BYTES_MAX {
            let fact = format!("has {} bytes; at most {FILE_BYTES_MAX} are read", facts.len());
            return Err(Error::Unsupported { file: file.to_owned(), fact });
        }
        Config::parse(file, &std::fs::read(file).map_err(unreadable)?)
    }

    /// Reads the text of a file.
    pub fn parse(file: &Path, bytes: &[u8]) -> Result<Config, Error> {
        let broken = |fact| Error::Broken { file: file.to_owned(), fact };
        match serde_json::from_slice(bytes) {
            Ok(Value::Object(facts)) => Ok(Config { file: file.to_owned(), facts }),
            Ok(_) => Err(broken("holds JSON, but not an object".to_owned())),
            Err(error) => Err(broken(format!("is not valid JSON: {error}"))),
        }
    }

    /// Where it was read.
    pub fn file(&self) -> &Path {
        &self.file
    }

    /// An error about this file: its content is wrong.
    pub fn broken(&self, fact: impl Into<String>) -> Error {
        Error::Broken { file: self.file.clone(), fact: fact.into() }
    }

    /// An error about this file: its content is not supported.
    pub fn unsupported(&self, fact: impl Into<String>) -> Error {
        Error::Unsupported { file: self.file.clone(), fact: fact.into() }
    }

    /// The value of a key; `null` counts as absent.
    pub fn get(&self, key: &str) -> Option<&Value> {
        self.facts.get(key).filter(|value| !value.is_null())
    }

    /// The value of a key, `null` included.
    pub fn raw(&self, key: &str) -> Option<&Value> {
        self.facts.get(key)
    }

    /// A size that must be there, from 1 to 2^24.
    pub fn size(&self, key: &str) -> Result<usize, Error> {
        self.size_or(key, None)
    }

    /// A size from 1 to 2^24, or a default where the key is absent.
    pub fn size_or(&self, key: &str, default: impl Into<Option<usize>>) -> Result<usize, Error> {
        self.size_within(key, 1..=SIZE_MAX, default)
    }

    /// A size within bounds, or a default where the key is absent and there is one.
    pub fn size_within(
        &self,
        key: &str,
        bounds: RangeInclusive<usize>,
        default: impl Into<Option<usize>>,
    ) -> Result<usize, Error> {
        let Some(value) = self.get(key) else {
            return default.into().ok_or_else(|| self.broken(format!("has no {key}")));
        };
        let size = value
            .as_u64()
            .and_then(|size| usize::try_from(size).ok())
            .ok_or_else(|| self.broken(format!("{key} is {value}, not a whole number")))?;
        if !bounds.contains(&size) {
            let (least, most) = bounds.into_inner();
            return Err(self.unsupported(format!("{key} is {size}; supported are {least} to {most}")));
        }
        Ok(size)
    }

    /// A truth value, or a default where the key is absent.
    pub fn flag_or(&self, key: &str, default: bool) -> Result<bool, Error> {
        match self.get(key) {
            None => Ok(default),
            Some(Value::Bool(flag)) => Ok(*flag),
            Some(value) => Err(self.broken(format!("{key} is {value}, neither true nor false"))),
        }
    }

    /// A positive number, or a default where the key is absent.
    pub fn positive_or(&self, key: &str, default: f64) -> Result<f64, Error> {
        Ok(self.positive(&self.facts, "", key)?.unwrap_or(default))
    }

    /// Token ids given as one or as a list; `None` where the key is absent.
    pub fn token_ids(&self, key: &str) -> Result<Option<Vec<TokenId>>, Error> {
        let Some(value) = self.get(key) else { return Ok(None) };
        let id = |value: &Value| value.as_u64().and_then(|id| TokenId::try_from(id).ok());
        let ids = match value {
            Value::Array(list) => list.iter().map(id).collect(),
            one => id(one).map(|id| vec![id]),
        };
        ids.map(Some)
            .ok_or_else(|| self.broken(format!("{key} is {value}, neither a token id nor a list of them")))
    }

    /// The class name of the model: the first of `architectures`.
    pub fn architecture(&self) -> Result<&str, Error> {
        let named = self.get("architectures").and_then(|list| list.get(0)).and_then(Value::as_str);
        named.ok_or_else(|| self.broken("has no architectures, a list whose first entry is the class name"))
    }

    /// The element type the weights are said to have; `None` where the config leaves it open.
    pub fn dtype(&self) -> Result<Option<Dtype>, Error> {
        let Some((key, value)) = ["dtype", "torch_dtype"].iter().find_map(|key| Some((key, self.get(key)?)))
        else {
            return Ok(None);
        };
        match value.as_str().map(|name| name.trim_start_matches("torch.")) {
            Some("bfloat16") => Ok(Some(Dtype::Bf16)),
            Some("float16") => Ok(Some(Dtype::F16)),
            Some("float32") => Ok(Some(Dtype::F32)),
            Some("auto") => Ok(None),
            _ => {
                Err(self
                    .unsupported(format!("{key} is {value}; supported are bfloat16, float16 and float32")))
            }
        }
    }

    /// The rotation of whole heads, in either spelling. Where both are present they must say the same.
    pub fn rope(&self, context_tokens: u32) -> Result<RopeSpec, Error> {
        let spec = self.partial_rope(context_tokens, Pairing::Halves, 1.0)?;
        if spec.share != 1.0 {
            let share = spec.share;
            return Err(self.unsupported(format!("partial_rotary_factor is {share}; only 1 is supported")));
        }
        Ok(spec)
    }

    /// The same where a part of each head may be rotated: `share` of it where the config does not say.
    pub fn partial_rope(&self, context_tokens: u32, pairing: Pairing, share: f64) -> Result<RopeSpec, Error> {
        let object = |key: &'static str| match self.get(key) {
            None => Ok(None),
            Some(Value::Object(facts)) if facts.is_empty() => Ok(None),
            Some(Value::Object(facts)) => Ok(Some((key, facts))),
            Some(value) => Err(self.broken(format!("{key} is {value}, not an object"))),
        };
        let theta = self.positive(&self.facts, "", "rope_theta")?;
        let (older, newer) = (object("rope_scaling")?, object("rope_parameters")?);
        let theta_of = |scaling: Option<(&str, &Map<String, Value>)>| match scaling {
            Some((key, facts)) => self.positive(facts, key, "rope_theta"),
            None => Ok(None),
        };
        let theta = theta_of(newer)?.or(theta_of(older)?).or(theta).unwrap_or(THETA_DEFAULT);
        let mut share = self.share(&self.facts, "")?.unwrap_or(share);
        for (key, facts) in [older, newer].into_iter().flatten() {
            share = self.share(facts, key)?.unwrap_or(share);
        }
        let mut spec = None;
        for (key, facts) in [older, newer].into_iter().flatten() {
            let kind = self.scaled(key, facts, context_tokens)?;
            let this = RopeSpec { theta, kind, share, pairing };
            if spec.is_some_and(|other| other != this) {
                return Err(self.broken("rope_scaling and rope_parameters contradict each other"));
            }
            spec = Some(this);
        }
        let spec = spec.unwrap_or(RopeSpec { theta, kind: RopeKind::Default, share, pairing });
        if spec.theta <= 1.0 {
            return Err(self.unsupported(format!("rope_theta is {}; it must be greater than 1", spec.theta)));
        }
        Ok(spec)
    }

    /// One object of rope numbers.
    fn scaled(&self, key: &str, facts: &Map<String, Value>, context_tokens: u32) -> Result<RopeKind, Error> {
        let known =
            ["rope_type", "type"].iter().find_map(|name| facts.get(*name).filter(|value| !value.is_null()));
        if known.is_none() && facts.values().any(Value::is_object) {
            return Err(self.unsupported(format!("{key} differs between layers")));
        }
        let number = |name: &str| self.positive(facts, key, name);
        let required = |name: &str| number(name)?.ok_or_else(|| self.broken(format!("{key} has no {name}")));
        let original_context = || match self.positive(&self.facts, "", "original_max_position_embeddings")? {
            Some(tokens) => Ok(tokens),
            None => Ok(number("original_max_position_embeddings")?.unwrap_or(f64::from(context_tokens))),
        };
        let name = match known {
            None => "default",
            Some(Value::String(name)) => name,
            Some(value) => return Err(self.broken(format!("rope_type in {key} is {value}, not a name"))),
        };
        let kind = match name {
            "default" => RopeKind::Default,
            "linear" => RopeKind::Linear { factor: required("factor")? },
            "llama3" => {
                let (low, high) = (required("low_freq_factor")?, required("high_freq_factor")?);
                if high <= low {
                    return Err(self.broken(format!(
                        "high_freq_factor in {key} is {high}, not greater than low_freq_factor, which is {low}"
                    )));
                }
                RopeKind::Llama3 {
                    factor: required("factor")?,
                    low_freq_factor: low,
                    high_freq_factor: high,
                    original_context: original_context()?,
                }
            }
            "yarn" => {
                let original_context = original_context()?;
                let factor = number("factor")?.unwrap_or(f64::from(context_tokens) / original_context);
                let optional = |name: &str| self.non_negative(facts, key, name);
                // Zero counts as not given for the betas, but not for the attention factor.
                let beta =
                    |name: &str, default| Ok(optional(name)?.filter(|beta| *beta != 0.0).unwrap_or(default));
                RopeKind::Yarn {
                    factor,
                    original_context,
                    beta_fast: beta("beta_fast", 32.0)?,
                    beta_slow: beta("beta_slow", 1.0)?,
                    truncate: match facts.get("truncate") {
                        None => true,
                        Some(Value::Bool(truncate)) => *truncate,
                        Some(value) => {
                            return Err(
                                self.broken(format!("truncate in {key} is {value}, neither true nor false"))
                            );
                        }
                    },
                    attention_factor: match optional("attention_factor")? {
                        Some(factor) => factor,
                        None => {
                            yarn_attention_factor(factor, optional("mscale")?, optional("mscale_all_dim")?)
                        }
                    },
                }
            }
            other => {
                return Err(self.unsupported(format!(
                    "rope type {other} in {key} is not supported; supported are default, linear, llama3 and yarn"
                )));
            }
        };
        Ok(kind)
    }

    /// The share of a head that is rotated, if it is stated.
    fn share(&self, facts: &Map<String, Value>, place: &str) -> Result<Option<f64>, Error> {
        match self.positive(facts, place, "partial_rotary_factor")? {
            Some(share) if share > 1.0 => {
                Err(self.broken(format!("partial_rotary_factor is {share}, more than a whole head")))
            }
            share => Ok(share),
        }
    }

    fn positive(&self, facts: &Map<String, Value>, place: &str, key: &str) -> Result<Option<f64>, Error> {
        match self.non_negative(facts, place, key)? {
            Some(0.0) => Err(self.broken(format!("{} is 0; it must be positive", within(key, place)))),
            number => Ok(number),
        }
    }

    fn non_negative(&self, facts: &Map<String, Value>, place: &str, key: &str) -> Result<Option<f64>, Error> {
        match facts.get(key) {
            None | Some(Value::Null) => Ok(None),
            Some(value) => match value.as_f64() {
                Some(number) if number >= 0.0 && number.is_finite() => Ok(Some(number)),
                _ => Err(self.broken(format!("{} is {value}, not a positive number", within(key, place)))),
            },
        }
    }
}

fn within(key: &str, place: &str) -> String {
    if place.is_empty() { key.to_owned() } else { format!("{key} in {place}") }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;
    use crate::testing::config;

    fn rope(facts: Value) -> Result<RopeSpec, String> {
        config(&facts).rope(2048).map_err(|error| error.to_string())
    }

    #[test]
    fn both_spellings_of_a_rotation_mean_the_same() {
        let scalings = [
            json!({"rope_type": "default"}),
            json!({"rope_type": "linear", "factor": 2}),
            json!({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                   "original_max_position_embeddings": 64}),
            json!({"rope_type": "yarn", "factor": 4.0, "beta_fast": 16, "truncate": false, "mscale": 1.0,
                   "mscale_all_dim": 0.5}),
        ];
        for scaling in scalings {
            let mut newer = scaling.clone();
            newer["rope_theta"] = json!(500000.0);
            let mut oldest = scaling.clone();
            oldest["type"] = oldest.as_object_mut().unwrap().remove("rope_type").unwrap();
            let spec = rope(json!({"rope_parameters": newer})).unwrap();
            assert_eq!(spec.theta, 500000.0);
            assert_eq!(rope(json!({"rope_theta": 500000, "rope_scaling": scaling})).unwrap(), spec);
            assert_eq!(rope(json!({"rope_theta": 500000, "rope_scaling": oldest})).unwrap(), spec);
            let both = json!({"rope_theta": 500000, "rope_scaling": oldest, "rope_parameters": newer});
            assert_eq!(rope(both).unwrap(), spec);
        }
    }

    #[test]
    fn what_a_rotation_leaves_out_has_the_defaults_of_the_reference_implementation() {
        let plain =
            RopeSpec { theta: 10_000.0, kind: RopeKind::Default, share: 1.0, pairing: Pairing::Halves };
        assert_eq!(rope(json!({})).unwrap(), plain);
        assert_eq!(rope(json!({"rope_scaling": null, "rope_parameters": {}})).unwrap(), plain);
        let yarn = |attention_factor, factor, original_context| RopeKind::Yarn {
            factor,
            original_context,
            beta_fast: 32.0,
            beta_slow: 1.0,
            truncate: true,
            attention_factor,
        };
        let kind = |facts| rope(facts).unwrap().kind;
        let ln = 0.1 * 4_f64.ln() + 1.0;
        let scaling = json!({"type": "yarn", "factor": 4, "beta_fast": 0, "beta_slow": null, "mscale": 0});
        assert_eq!(kind(json!({"rope_scaling": scaling})), yarn(ln, 4.0, 2048.0));
        // The config's own original length wins over that of the scaling; a factor left open is the ratio.
        let scaling = json!({"type": "yarn", "factor": null, "original_max_position_embeddings": 64});
        let facts = json!({"rope_scaling": scaling, "original_max_position_embeddings": 512});
        assert_eq!(kind(facts), yarn(ln, 4.0, 512.0));
    }

    #[test]
    fn a_rotation_that_is_wrong_or_unknown_is_refused_by_name() {
        let llama3 = json!({"rope_type": "llama3", "factor": 8, "low_freq_factor": 4, "high_freq_factor": 4});
        for (facts, fact) in [
            (
                json!({"rope_scaling": {"type": "dynamic", "factor": 2}}),
                "rope type dynamic in rope_scaling is not",
            ),
            (
                json!({"rope_parameters": {"rope_type": "longrope"}}),
                "supported are default, linear, llama3 and yarn",
            ),
            (json!({"rope_scaling": {"type": "linear"}}), "rope_scaling has no factor"),
            (json!({"rope_scaling": {"type": "linear", "factor": 0}}), "factor in rope_scaling is 0"),
            (json!({"rope_scaling": {"type": "linear", "factor": "2"}}), "factor in rope_scaling is \"2\""),
            (json!({"rope_scaling": {"type": 7}}), "rope_type in rope_scaling is 7"),
            (json!({"rope_scaling": [1]}), "rope_scaling is [1], not an object"),
            (json!({"rope_parameters": llama3}), "high_freq_factor in rope_parameters is 4, not greater"),
            (json!({"rope_scaling": {"type": "yarn", "truncate": 1}}), "truncate in rope_scaling is 1"),
            (json!({"rope_theta": -1.0}), "rope_theta is -1.0, not a positive number"),
            (json!({"rope_theta": 1.0}), "rope_theta is 1; it must be greater than 1"),
            (json!({"partial_rotary_factor": 0.5}), "partial_rotary_factor is 0.5; only 1 is supported"),
            (
                json!({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.25}}),
                "is 0.25; only 1",
            ),
            (json!({"partial_rotary_factor": 1.5}), "partial_rotary_factor is 1.5, more than a whole head"),
            (json!({"rope_parameters": {"full_attention": {"rope_theta": 1e6}}}), "differs between layers"),
            (
                json!({"rope_scaling": {"type": "linear", "factor": 2}, "rope_parameters": {"rope_type": "default"}}),
                "rope_scaling and rope_parameters contradict each other",
            ),
        ] {
            let error = rope(facts.clone()).unwrap_err();
            assert!(error.starts_with("config.json: ") && error.contains(fact), "{error:?} for {facts}");
        }
    }

    #[test]
    fn the_element_type_is_read_in_both_spellings() {
        let dtype = |facts: Value| config(&facts).dtype().map_err(|error| error.to_string());
        assert_eq!(dtype(json!({"dtype": "bfloat16"})), Ok(Some(Dtype::Bf16)));
        assert_eq!(dtype(json!({"torch_dtype": "float16"})), Ok(Some(Dtype::F16)));
        assert_eq!(dtype(json!({"torch_dtype": "torch.float32"})), Ok(Some(Dtype::F32)));
        assert_eq!(dtype(json!({"dtype": null, "torch_dtype": "auto"})), Ok(None));
        assert_eq!(dtype(json!({})), Ok(None));
        assert!(dtype(json!({"dtype": "float8_e4m3fn"})).unwrap_err().contains("dtype is \"float8_e4m3fn\""));
    }

    #[test]
    fn token_ids_come_as_one_or_as_a_list() {
        let ids =
            |value: Value| config(&json!({"eos": value})).token_ids("eos").map_err(|error| error.to_string());
        assert_eq!(ids(json!(3)), Ok(Some(vec![3])));
        assert_eq!(ids(json!([3, 1])), Ok(Some(vec![3, 1])));
        assert_eq!(ids(json!(null)), Ok(None));
        for wrong in [json!("3"), json!(-1), json!([1, null]), json!(1.5), json!(4294967296_u64)] {
            assert!(ids(wrong).unwrap_err().contains("neither a token id nor a list of them"));
        }
    }

    #[test]
    fn a_file_that_holds_no_object_is_refused() {
        let refusal = |text: &[u8]| Config::parse(Path::new("a.json"), text).err().unwrap().to_string();
        assert!(refusal(b"").starts_with("a.json: is not valid JSON: EOF"));
        assert!(refusal(b"{\"a\": 1").starts_with("a.json: is not valid JSON"));
        assert!(refusal(b"{\"a\": \xff}").starts_with("a.json: is not valid JSON"));
        assert_eq!(refusal(b"[1]"), "a.json: holds JSON, but not an object");
    }

    fn any_value() -> impl Strategy<Value = Value> {
        const WORDS: &[&str] = &["default", "linear", "llama3", "yarn", "x"];
        let leaf = prop_oneof![
            Just(Value::Null),
            any::<bool>().prop_map(Value::from),
            any::<i64>().prop_map(Value::from),
            (0..5_u8).prop_map(Value::from),
            any::<f64>().prop_map(Value::from),
            prop::sample::select(WORDS).prop_map(Value::from),
        ];
        const KEYS: &[&str] =
            &["rope_type", "type", "factor", "rope_theta", "low_freq_factor", "high_freq_factor", "truncate"];
        leaf.prop_recursive(2, 8, 6, |inner| {
            prop::collection::hash_map(prop::sample::select(KEYS).prop_map(str::to_owned), inner, 0..6)
                .prop_map(|map| Value::Object(map.into_iter().collect()))
        })
    }

    proptest! {
        #[test]
        fn no_rotation_makes_the_reader_or_the_arithmetic_panic(
            scaling in any_value(), theta in any_value(), context in 1..1_u32 << 24, half in 1..128_usize
        ) {
            let facts = json!({"rope_scaling": scaling, "rope_theta": theta});
            if let Ok(spec) = config(&facts).rope(context) {
                prop_assert_eq!(spec.inverse_frequencies(2 * half).len(), half);
            }
        }
    }
}
