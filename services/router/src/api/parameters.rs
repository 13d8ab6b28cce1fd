//! Parameters that chat completions and completions share, checked whole at the door.

use std::collections::BTreeMap;

use serde_json::{Value, json};
use tandem_chassis::seam;
use tandem_types::{SamplingParams, ServiceClass, StopRules, TokenId};

use super::error::ApiError;
use super::fields::{self, Fields, Kind, Raw, kind};
use crate::text::Model;

/// Choices of a request at most.
pub(crate) const CHOICES_MAX: i64 = 128;
/// Stop strings and stop tokens at most.
const STOPS_MAX: usize = 4;
const STOP_TOKENS_MAX: usize = 64;
/// Biases at most.
const BIASES_MAX: usize = 4096;
/// Characters of a stop string at most: text is held back while one may begin.
const STOP_CHARS_MAX: usize = 1024;

/// Known parameters that this version does not have; refused where they say anything.
const UNSUPPORTED: &[&str] = &[
    "tools",
    "tool_choice",
    "functions",
    "function_call",
    "parallel_tool_calls",
    "audio",
    "modalities",
    "prediction",
    "web_search_options",
    "guided_json",
    "guided_regex",
    "guided_choice",
    "guided_grammar",
    "structured_outputs",
    "suffix",
    "prompt_logprobs",
    "use_beam_search",
    "length_penalty",
    "allowed_token_ids",
    "bad_words",
];

/// What both endpoints understand alike.
#[derive(Clone, Debug)]
pub(crate) struct Parameters {
    /// Choices of the answer, per prompt.
    pub(crate) n: u32,
    /// Choices that are drawn, of which the `n` best are given: `best_of`.
    pub(crate) draws: u32,
    /// Log probabilities that the client wants: of every token, and of so many of the likeliest.
    pub(crate) logprobs: Option<u32>,
    pub(crate) stream: bool,
    pub(crate) include_usage: bool,
    pub(crate) sampling: SamplingParams,
    /// As asked for; the context may leave less.
    pub(crate) max_tokens: Option<u32>,
    pub(crate) min_tokens: u32,
    pub(crate) stop: Vec<String>,
    pub(crate) stop_token_ids: Vec<TokenId>,
    pub(crate) include_stop: bool,
    pub(crate) ignore_eos: bool,
    pub(crate) skip_special_tokens: bool,
    pub(crate) return_token_ids: bool,
    pub(crate) class: ServiceClass,
    /// Said in the answer, where the client has asked for one.
    pub(crate) service_tier: Option<&'static str>,
}

impl Parameters {
    /// Takes them out of `fields`. `limits` are the names that this endpoint has for `max_tokens`, with the least
    /// that it may be; `logprobs` has been read by the endpoint.
    pub(crate) fn take(
        fields: &mut Fields,
        model: &Model,
        limits: &[(&str, i64)],
        logprobs: Option<u32>,
    ) -> Result<Parameters, ApiError> {
        check_model(fields, model)?;
        refuse_unsupported(fields)?;
        let stream = fields.bool("stream")?.unwrap_or(false);
        let sampling = take_sampling(fields, model, logprobs)?;
        let mut max_tokens = None;
        for (name, least) in limits {
            let given = fields.integer(name, *least, i64::from(u32::MAX))?;
            max_tokens = max_tokens.or(given.map(|n| n as u32));
        }
        let min_tokens = fields.integer("min_tokens", 0, i64::from(u32::MAX))?.unwrap_or(0) as u32;
        if max_tokens.is_some_and(|max| min_tokens > max) {
            return Err(ApiError::invalid(
                "min_tokens",
                format!("min_tokens {min_tokens} is above max_tokens"),
            ));
        }
        // What it is of no use to anybody to check further.
        fields.string("user")?;
        let n = fields.integer("n", 1, CHOICES_MAX)?.unwrap_or(1) as u32;
        Ok(Parameters {
            n,
            draws: n,
            logprobs,
            stream,
            include_usage: take_include_usage(fields, stream)?,
            sampling,
            max_tokens,
            min_tokens,
            stop: take_stop(fields)?,
            stop_token_ids: take_stop_token_ids(fields, model)?,
            include_stop: fields.bool("include_stop_str_in_output")?.unwrap_or(false),
            ignore_eos: fields.bool("ignore_eos")?.unwrap_or(false),
            skip_special_tokens: fields.bool("skip_special_tokens")?.unwrap_or(true),
            return_token_ids: fields.bool("return_token_ids")?.unwrap_or(false),
            service_tier: fields.has("service_tier").then_some("default"),
            class: take_class(fields)?,
        })
    }

    /// The rules for a prompt of this length, or why it does not fit.
    pub(crate) fn stop_rules(
        &self,
        model: &Model,
        prompt: usize,
        param: &str,
    ) -> Result<StopRules, ApiError> {
        let context = model.context_tokens as usize;
        let room = context.saturating_sub(prompt);
        // Of a prompt that is only scored one token is drawn all the same.
        let wanted = self.max_tokens.map_or(1, |max| max as usize);
        if room < wanted {
            let message = match self.max_tokens {
                Some(max) => format!(
                    "the context is {context} tokens, but the prompt has {prompt} and {max} more are asked for; \
                     shorten one of them"
                ),
                None => format!("the context is {context} tokens and the prompt has {prompt}; shorten it"),
            };
            return Err(ApiError::context_length(param, message));
        }
        Ok(StopRules {
            max_tokens: self.max_tokens.unwrap_or(room.min(u32::MAX as usize) as u32),
            min_tokens: self.min_tokens,
            eos: if self.ignore_eos { Vec::new() } else { model.eos.clone() },
            stop_token_ids: self.stop_token_ids.clone(),
        })
    }
}

fn check_model(fields: &mut Fields, model: &Model) -> Result<(), ApiError> {
    if !fields.has("model") {
        let message = format!("model is missing; this cluster serves {:?}", model.name);
        return Err(ApiError::invalid("model", message));
    }
    check_model_if_named(fields, model)
}

/// For endpoints where the model may be left out: there is one.
pub(crate) fn check_model_if_named(fields: &mut Fields, model: &Model) -> Result<(), ApiError> {
    match fields.string("model")? {
        Some(name) if name != model.name => Err(ApiError::unknown_model(&name, &model.name)),
        _ => Ok(()),
    }
}

fn refuse_unsupported(fields: &mut Fields) -> Result<(), ApiError> {
    for name in UNSUPPORTED {
        let says_nothing = |value: Raw| {
            fields::small(value).is_some_and(|value| {
                matches!(value, Value::Bool(false))
                    || value.as_array().is_some_and(Vec::is_empty)
                    || (*name == "tool_choice" && (value == "none" || value == "auto"))
                    || (*name == "parallel_tool_calls" && value.is_boolean())
                    || (*name == "length_penalty" && value.as_f64() == Some(1.0))
                    || (*name == "modalities" && value == json!(["text"]))
                    || (*name == "suffix" && value == "")
            })
        };
        if fields.take(name).is_some_and(|value| !says_nothing(value)) {
            return Err(ApiError::unsupported(name, format!("{name} is not supported in this version")));
        }
    }
    let Some(mut format) = fields.object("response_format")? else { return Ok(()) };
    match format.string("type")?.as_deref() {
        Some("text") => Ok(()),
        Some(other) => {
            let said = fields::quoted(other);
            let message = format!("response_format {said} is not supported in this version; it has text");
            Err(ApiError::unsupported("response_format", message))
        }
        None => Err(ApiError::invalid("response_format", "response_format needs a type, such as text")),
    }
}

fn take_sampling(
    fields: &mut Fields,
    model: &Model,
    logprobs: Option<u32>,
) -> Result<SamplingParams, ApiError> {
    let defaults = &model.defaults;
    let top_k = fields.integer("top_k", -1, i64::from(u32::MAX))?.map(|k| k.max(0) as u32);
    let top_p = fields.number("top_p", 0.0, 1.0)?;
    if top_p == Some(0.0) {
        return Err(ApiError::invalid("top_p", "top_p must be above 0"));
    }
    let repetition = fields.number("repetition_penalty", 0.0, 10.0)?;
    if repetition == Some(0.0) {
        return Err(ApiError::invalid("repetition_penalty", "repetition_penalty must be above 0"));
    }
    // Any seed is a seed: OpenAI's may be negative.
    let seed = fields.integer("seed", i64::MIN, i64::MAX)?.map(|seed| seed as u64);
    Ok(SamplingParams {
        temperature: fields.number("temperature", 0.0, 2.0)?.unwrap_or(defaults.temperature),
        top_p: top_p.unwrap_or(defaults.top_p),
        top_k: top_k.unwrap_or(defaults.top_k),
        min_p: fields.number("min_p", 0.0, 1.0)?.unwrap_or(0.0),
        presence_penalty: fields.number("presence_penalty", -2.0, 2.0)?.unwrap_or(0.0),
        frequency_penalty: fields.number("frequency_penalty", -2.0, 2.0)?.unwrap_or(0.0),
        repetition_penalty: repetition.unwrap_or(1.0),
        logit_bias: take_logit_bias(fields, model)?,
        seed: seed.unwrap_or_else(seam::random_u64),
        logprobs,
    })
}

fn take_logit_bias(fields: &mut Fields, model: &Model) -> Result<Vec<(TokenId, f32)>, ApiError> {
    let Some(biases) = fields.take("logit_bias") else { return Ok(Vec::new()) };
    let wrong = |message: String| Err(ApiError::invalid("logit_bias", message));
    let mut read = BTreeMap::new();
    fields::each_entry("logit_bias", biases, |key, value| {
        let Some(token) = key.parse::<TokenId>().ok().filter(|&token| token < model.vocab) else {
            let key: String = key.chars().take(32).collect();
            return wrong(format!("{key:?} is not a token id below {}", model.vocab));
        };
        let bias = Some(value).filter(|value| kind(value) == Kind::Number).and_then(fields::number);
        let Some(bias) = bias.filter(|bias| (-100.0..=100.0).contains(bias)) else {
            return wrong(format!("the bias of token {token} must be a number from -100 to 100"));
        };
        if read.insert(token, bias as f32).is_some() {
            return wrong(format!("token {token} has two biases"));
        }
        if read.len() > BIASES_MAX {
            return wrong(format!("logit_bias may have {BIASES_MAX} entries"));
        }
        Ok(())
    })?;
    Ok(read.into_iter().collect())
}

fn take_include_usage(fields: &mut Fields, stream: bool) -> Result<bool, ApiError> {
    let Some(mut options) = fields.object("stream_options")? else { return Ok(false) };
    if !stream {
        return Err(ApiError::invalid("stream_options", "stream_options is for requests with stream: true"));
    }
    Ok(options.bool("include_usage")?.unwrap_or(false))
}

fn take_stop(fields: &mut Fields) -> Result<Vec<String>, ApiError> {
    let Some(stop) = fields.take("stop") else { return Ok(Vec::new()) };
    let wanted = "a string or a list of strings";
    let mut stops = Vec::new();
    let mut take = |at: usize, stop: Raw| {
        if at == STOPS_MAX {
            return Err(ApiError::invalid("stop", format!("stop may have {STOPS_MAX} strings")));
        }
        let stop = fields::string("stop", wanted, stop)?;
        if stop.is_empty() {
            return Err(ApiError::invalid("stop", "a stop string must not be empty"));
        }
        if stop.chars().count() > STOP_CHARS_MAX {
            let message = format!("a stop string may have {STOP_CHARS_MAX} characters");
            return Err(ApiError::invalid("stop", message));
        }
        stops.push(stop);
        Ok(())
    };
    match kind(stop) {
        Kind::String => take(0, stop)?,
        _ => fields::each("stop", wanted, stop, take)?,
    }
    Ok(stops)
}

fn take_stop_token_ids(fields: &mut Fields, model: &Model) -> Result<Vec<TokenId>, ApiError> {
    let Some(ids) = fields.take("stop_token_ids") else { return Ok(Vec::new()) };
    let too_many = || {
        let message = format!("stop_token_ids may have {STOP_TOKENS_MAX} ids");
        ApiError::invalid("stop_token_ids", message)
    };
    token_ids("stop_token_ids", ids, model, STOP_TOKENS_MAX, too_many)
}

/// A list of token ids of this model, not more than `most`.
pub(crate) fn token_ids(
    name: &str,
    ids: Raw,
    model: &Model,
    most: usize,
    too_many: impl Fn() -> ApiError,
) -> Result<Vec<TokenId>, ApiError> {
    let mut read = Vec::new();
    fields::each(name, "a list of token ids", ids, |at, id| {
        if at == most {
            return Err(too_many());
        }
        let known =
            fields::whole(id).and_then(|id| TokenId::try_from(id).ok()).filter(|&id| id < model.vocab);
        let known = known.ok_or_else(|| {
            let said: String = id.get().chars().take(32).collect();
            ApiError::invalid(name, format!("{said} in {name} is not a token id below {}", model.vocab))
        })?;
        read.push(known);
        Ok(())
    })?;
    Ok(read)
}

fn take_class(fields: &mut Fields) -> Result<ServiceClass, ApiError> {
    match fields.string("service_tier")?.as_deref() {
        // OpenAI's tiers of online work: here they are all served alike.
        None | Some("auto" | "default" | "fast" | "priority" | "scale" | "standard") => {
            Ok(ServiceClass::Online)
        }
        Some("flex") => {
            Err(ApiError::unsupported("service_tier", "service_tier flex is not in this version"))
        }
        Some(other) => {
            let message = format!("service_tier {} is not known", fields::quoted(other));
            Err(ApiError::invalid("service_tier", message))
        }
    }
}
