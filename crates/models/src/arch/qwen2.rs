//! Qwen2 and Qwen2.5, dense: biases on query, key and value, always; none elsewhere.

use super::{Architecture, Dense, LLAMA_NAMES, dense, refuse_qwen_windows};

pub(super) const QWEN2: Architecture = Architecture {
    name: "Qwen2ForCausalLM",
    spec: |config| {
        refuse_qwen_windows(config)?;
        dense(config, Dense { kv_heads: Some(32), qkv_bias: true, ..Dense::plain("Qwen2ForCausalLM") })
    },
    names: &LLAMA_NAMES,
};
