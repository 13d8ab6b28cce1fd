//! Between wire messages and nouns. Field names in errors are those of the `.proto` files.

use tandem_types as types;

use crate::v1;

/// A message that cannot be what it claims to be.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("field {field}: {problem}")]
pub struct WireError {
    /// The field, as the `.proto` file spells it.
    pub field: &'static str,
    /// What is wrong with it.
    pub problem: String,
}

impl WireError {
    /// An error about `field`.
    pub fn new(field: &'static str, problem: impl Into<String>) -> WireError {
        WireError { field, problem: problem.into() }
    }
}

impl From<WireError> for tonic::Status {
    fn from(error: WireError) -> tonic::Status {
        tonic::Status::invalid_argument(error.to_string())
    }
}

/// 16 bytes, big-endian.
pub fn id128(value: u128) -> prost::bytes::Bytes {
    prost::bytes::Bytes::copy_from_slice(&value.to_be_bytes())
}

/// Reads what [`id128`] wrote.
pub fn read_id128(field: &'static str, bytes: &[u8]) -> Result<u128, WireError> {
    let bytes: [u8; 16] = bytes
        .try_into()
        .map_err(|_| WireError::new(field, format!("{} bytes instead of 16", bytes.len())))?;
    Ok(u128::from_be_bytes(bytes))
}

impl From<&types::Handle> for v1::Handle {
    fn from(handle: &types::Handle) -> v1::Handle {
        v1::Handle {
            kind: v1::HandleKind::HandOff as i32,
            lease: id128(handle.lease.0),
            owner: handle.owner.0.clone(),
            incarnation: handle.incarnation.0,
            lender: handle.lender.clone(),
            exports: handle
                .exports
                .iter()
                .map(|e| v1::Export { transport: e.transport.clone(), blob: e.blob.clone().into() })
                .collect(),
            identity: Some((&handle.identity).into()),
            form: Some((&handle.form).into()),
            groups: handle.groups.iter().map(Into::into).collect(),
            tokens: handle.tokens,
        }
    }
}

impl TryFrom<&v1::Handle> for types::Handle {
    type Error = WireError;

    fn try_from(handle: &v1::Handle) -> Result<types::Handle, WireError> {
        Ok(types::Handle {
            lease: types::LeaseId(read_id128("Handle.lease", &handle.lease)?),
            owner: types::WorkerId(handle.owner.clone()),
            incarnation: types::Incarnation(handle.incarnation),
            lender: handle.lender.clone(),
            exports: handle
                .exports
                .iter()
                .map(|e| types::Export { transport: e.transport.clone(), blob: e.blob.to_vec() })
                .collect(),
            identity: handle
                .identity
                .as_ref()
                .ok_or_else(|| WireError::new("Handle.identity", "missing"))?
                .into(),
            form: handle.form.as_ref().ok_or_else(|| WireError::new("Handle.form", "missing"))?.into(),
            groups: handle.groups.iter().map(TryInto::try_into).collect::<Result<_, _>>()?,
            tokens: handle.tokens,
        })
    }
}

impl From<&types::KvIdentity> for v1::Identity {
    fn from(identity: &types::KvIdentity) -> v1::Identity {
        v1::Identity { digest: identity.digest.clone(), numerics: identity.numerics.clone() }
    }
}

impl From<&v1::Identity> for types::KvIdentity {
    fn from(identity: &v1::Identity) -> types::KvIdentity {
        types::KvIdentity { digest: identity.digest.clone(), numerics: identity.numerics.clone() }
    }
}

impl From<&types::KvForm> for v1::Form {
    fn from(form: &types::KvForm) -> v1::Form {
        v1::Form {
            layout: form.layout.clone(),
            element: form.element.clone(),
            page_bytes: form.page_bytes.clone(),
            shards: form.shards,
        }
    }
}

impl From<&v1::Form> for types::KvForm {
    fn from(form: &v1::Form) -> types::KvForm {
        types::KvForm {
            layout: form.layout.clone(),
            element: form.element.clone(),
            page_bytes: form.page_bytes.clone(),
            shards: form.shards,
        }
    }
}

impl From<&types::GroupPages> for v1::GroupPages {
    fn from(group: &types::GroupPages) -> v1::GroupPages {
        v1::GroupPages {
            group: group.group,
            shard: group.shard,
            pages: group.pages.iter().map(|p| p.page).collect(),
            generations: group.pages.iter().map(|p| p.generation).collect(),
        }
    }
}

impl TryFrom<&v1::GroupPages> for types::GroupPages {
    type Error = WireError;

    fn try_from(group: &v1::GroupPages) -> Result<types::GroupPages, WireError> {
        if group.pages.len() != group.generations.len() {
            return Err(WireError::new(
                "GroupPages.generations",
                format!("{} for {} pages", group.generations.len(), group.pages.len()),
            ));
        }
        let pages = group.pages.iter().zip(&group.generations);
        Ok(types::GroupPages {
            group: group.group,
            shard: group.shard,
            pages: pages.map(|(&page, &generation)| types::PageRef { page, generation }).collect(),
        })
    }
}

impl From<&types::SamplingParams> for v1::Sampling {
    fn from(s: &types::SamplingParams) -> v1::Sampling {
        v1::Sampling {
            temperature: s.temperature,
            top_p: s.top_p,
            top_k: s.top_k,
            min_p: s.min_p,
            presence_penalty: s.presence_penalty,
            frequency_penalty: s.frequency_penalty,
            repetition_penalty: s.repetition_penalty,
            logit_bias: s.logit_bias.iter().map(|&(token, bias)| v1::LogitBias { token, bias }).collect(),
            seed: s.seed,
            logprobs: s.logprobs,
        }
    }
}

impl From<&v1::Sampling> for types::SamplingParams {
    fn from(s: &v1::Sampling) -> types::SamplingParams {
        types::SamplingParams {
            temperature: s.temperature,
            top_p: s.top_p,
            top_k: s.top_k,
            min_p: s.min_p,
            presence_penalty: s.presence_penalty,
            frequency_penalty: s.frequency_penalty,
            repetition_penalty: s.repetition_penalty,
            logit_bias: s.logit_bias.iter().map(|b| (b.token, b.bias)).collect(),
            seed: s.seed,
            logprobs: s.logprobs,
        }
    }
}

impl From<&types::StopRules> for v1::StopRules {
    fn from(stop: &types::StopRules) -> v1::StopRules {
        v1::StopRules {
            max_tokens: stop.max_tokens,
            min_tokens: stop.min_tokens,
            eos: stop.eos.clone(),
            stop_token_ids: stop.stop_token_ids.clone(),
        }
    }
}

impl From<&v1::StopRules> for types::StopRules {
    fn from(stop: &v1::StopRules) -> types::StopRules {
        types::StopRules {
            max_tokens: stop.max_tokens,
            min_tokens: stop.min_tokens,
            eos: stop.eos.clone(),
            stop_token_ids: stop.stop_token_ids.clone(),
        }
    }
}

/// The log probabilities of a drawn token, if any were asked for.
pub fn token_logprob(sampled: &types::Sampled) -> Option<v1::TokenLogprob> {
    let top = sampled.top.iter().map(|&(token, logprob)| v1::TopLogprob { token, logprob }).collect();
    sampled.logprob.map(|logprob| v1::TokenLogprob { logprob, top })
}

/// A drawn token from its wire parts.
pub fn sampled(token: u32, logprob: Option<&v1::TokenLogprob>) -> types::Sampled {
    types::Sampled {
        token,
        logprob: logprob.map(|l| l.logprob),
        top: logprob.map(|l| l.top.iter().map(|t| (t.token, t.logprob)).collect()).unwrap_or_default(),
    }
}

impl From<types::Usage> for v1::Usage {
    fn from(usage: types::Usage) -> v1::Usage {
        v1::Usage {
            prompt_tokens: usage.prompt_tokens,
            cached_tokens: usage.cached_tokens,
            output_tokens: usage.output_tokens,
        }
    }
}

impl From<&v1::Usage> for types::Usage {
    fn from(usage: &v1::Usage) -> types::Usage {
        types::Usage {
            prompt_tokens: usage.prompt_tokens,
            cached_tokens: usage.cached_tokens,
            output_tokens: usage.output_tokens,
        }
    }
}

impl From<types::Role> for v1::Role {
    fn from(role: types::Role) -> v1::Role {
        match role {
            types::Role::Prefill => v1::Role::Prefill,
            types::Role::Decode => v1::Role::Decode,
            types::Role::Mixed => v1::Role::Mixed,
            types::Role::Encode => v1::Role::Encode,
        }
    }
}

/// A role from its wire number.
pub fn role(field: &'static str, role: i32) -> Result<types::Role, WireError> {
    match v1::Role::try_from(role) {
        Ok(v1::Role::Prefill) => Ok(types::Role::Prefill),
        Ok(v1::Role::Decode) => Ok(types::Role::Decode),
        Ok(v1::Role::Mixed) => Ok(types::Role::Mixed),
        Ok(v1::Role::Encode) => Ok(types::Role::Encode),
        _ => Err(WireError::new(field, format!("{role} is not a role"))),
    }
}

impl From<types::Until> for v1::Until {
    fn from(until: types::Until) -> v1::Until {
        match until {
            types::Until::FirstToken => v1::Until::FirstToken,
            types::Until::End => v1::Until::End,
            types::Until::Hidden => v1::Until::Hidden,
        }
    }
}

/// How far a Start goes, from its wire number.
pub fn until(until: i32) -> Result<types::Until, WireError> {
    match v1::Until::try_from(until) {
        Ok(v1::Until::FirstToken) => Ok(types::Until::FirstToken),
        Ok(v1::Until::End) => Ok(types::Until::End),
        Ok(v1::Until::Hidden) => Ok(types::Until::Hidden),
        _ => Err(WireError::new("Start.until", format!("{until} is not known"))),
    }
}

/// A finish reason as (number, stop token).
pub fn finish(reason: types::FinishReason) -> (v1::FinishReason, u32) {
    match reason {
        types::FinishReason::Eos => (v1::FinishReason::Eos, 0),
        types::FinishReason::StopToken(token) => (v1::FinishReason::StopToken, token),
        types::FinishReason::Length => (v1::FinishReason::Length, 0),
    }
}

/// Reads what [`finish`] wrote.
pub fn read_finish(finished: &v1::Finished) -> Result<types::FinishReason, WireError> {
    match finished.reason() {
        v1::FinishReason::Eos => Ok(types::FinishReason::Eos),
        v1::FinishReason::StopToken => Ok(types::FinishReason::StopToken(finished.stop_token)),
        v1::FinishReason::Length => Ok(types::FinishReason::Length),
        v1::FinishReason::Unspecified => Err(WireError::new("Finished.reason", "missing")),
    }
}
