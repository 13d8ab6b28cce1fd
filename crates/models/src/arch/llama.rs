//! Llama 2 and 3, dense: biases only where the config asks, on all attention or all feed-forward projections.

use super::{Architecture, Dense, LLAMA_NAMES, dense, refuse_windows};

pub(super) const LLAMA: Architecture = Architecture {
    name: "LlamaForCausalLM",
    spec: |config| {
        let windowed =
            config.get("sliding_window").is_some() && config.flag_or("use_sliding_window", true)?;
        refuse_windows(config, |_| windowed)?;
        let bias = config.flag_or("attention_bias", false)?;
        dense(
            config,
            Dense {
                qkv_bias: bias,
                output_bias: bias,
                feed_forward_bias: config.flag_or("mlp_bias", false)?,
                ..Dense::plain("LlamaForCausalLM")
            },
        )
    },
    names: &LLAMA_NAMES,
};
