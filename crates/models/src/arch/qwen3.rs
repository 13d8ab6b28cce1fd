//! Qwen3, dense: norms on query and key heads, biases only where the config asks.

use super::{Architecture, Dense, LLAMA_NAMES, dense, refuse_qwen_windows};

pub(super) const QWEN3: Architecture = Architecture {
    name: "Qwen3ForCausalLM",
    spec: |config| {
        refuse_qwen_windows(config)?;
        let bias = config.flag_or("attention_bias", false)?;
        dense(
            config,
            Dense {
                head_dim: Some(128),
                kv_heads: Some(32),
                qkv_bias: bias,
                output_bias: bias,
                head_norm: true,
                ..Dense::plain("Qwen3ForCausalLM")
            },
        )
    },
    names: &LLAMA_NAMES,
};
