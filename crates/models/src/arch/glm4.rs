//! GLM-4 of 2025 (0414), dense: norms around attention and feed-forward, half of each head rotated in neighbouring
//! pairs, gate and up in one tensor.

use super::{Architecture, Dense, Place, WeightNames, dense, refuse_windows, whole};
use crate::rope::Pairing;
use crate::spec::LayerPart;

pub(super) const GLM4: Architecture = Architecture {
    name: "Glm4ForCausalLM",
    spec: |config| {
        refuse_windows(config, |_| false)?;
        dense(
            config,
            Dense {
                head_dim: Some(128),
                kv_heads: Some(2),
                qkv_bias: config.flag_or("attention_bias", true)?,
                output_norms: true,
                epsilon: 1.5625e-7,
                partial_rope: Some((Pairing::Neighbours, 0.5)),
                ..Dense::plain("Glm4ForCausalLM")
            },
        )
    },
    names: &NAMES,
};

const GATE_UP: &str = "mlp.gate_up_proj.weight";

static NAMES: WeightNames = WeightNames {
    embedding: "model.embed_tokens.weight",
    layer_prefix: "model.layers.{}.",
    layer: &[
        (LayerPart::AttentionNorm, whole("input_layernorm.weight")),
        (LayerPart::Query, whole("self_attn.q_proj.weight")),
        (LayerPart::QueryBias, whole("self_attn.q_proj.bias")),
        (LayerPart::Key, whole("self_attn.k_proj.weight")),
        (LayerPart::KeyBias, whole("self_attn.k_proj.bias")),
        (LayerPart::Value, whole("self_attn.v_proj.weight")),
        (LayerPart::ValueBias, whole("self_attn.v_proj.bias")),
        (LayerPart::Output, whole("self_attn.o_proj.weight")),
        (LayerPart::AttentionOutputNorm, whole("post_self_attn_layernorm.weight")),
        (LayerPart::FeedForwardNorm, whole("post_attention_layernorm.weight")),
        (LayerPart::Gate, Place { tensor: GATE_UP, share: 0, shares: 2 }),
        (LayerPart::Up, Place { tensor: GATE_UP, share: 1, shares: 2 }),
        (LayerPart::Down, whole("mlp.down_proj.weight")),
        (LayerPart::FeedForwardOutputNorm, whole("post_mlp_layernorm.weight")),
    ],
    final_norm: "model.norm.weight",
    head: "lm_head.weight",
};
