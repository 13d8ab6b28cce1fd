//! The table of architectures. Each row's file turns a config into a [`DecoderSpec`]; what several of them share
//! is here.

mod glm4;
mod llama;
mod qwen2;
mod qwen3;

use crate::config::Config;
use crate::error::Error;
use crate::rope::Pairing;
use crate::spec::{
    Activation, AttentionSpec, DecoderSpec, FeedForwardSpec, Head, LayerPart, LayerSpec, NormSpec, Part,
};

/// What this version can run.
pub static ARCHITECTURES: &[Architecture] = &[qwen3::QWEN3, qwen2::QWEN2, llama::LLAMA, glm4::GLM4];

/// One row of the table.
pub struct Architecture {
    /// The class name in `config.json`.
    pub name: &'static str,
    /// Turns a config into a spec, or says what it asks for that is not supported.
    pub spec: fn(&Config) -> Result<DecoderSpec, Error>,
    /// What its weights are called in checkpoints.
    pub names: &'static WeightNames,
}

/// What weights are called in a checkpoint.
pub struct WeightNames {
    /// The embedding table.
    pub embedding: &'static str,
    /// Goes before every name in `layer`; `{}` is the layer's number.
    pub layer_prefix: &'static str,
    /// The weights of a layer.
    pub layer: &'static [(LayerPart, Place)],
    /// The norm after the last layer.
    pub final_norm: &'static str,
    /// The head, where it is separate.
    pub head: &'static str,
}

/// Where a weight lies in a checkpoint: a tensor, or one of the equal shares of its rows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// The tensor.
    pub tensor: &'static str,
    /// Which share, counted from 0.
    pub share: usize,
    /// Of how many; 1 is the whole tensor.
    pub shares: usize,
}

/// A whole tensor.
const fn whole(tensor: &'static str) -> Place {
    Place { tensor, share: 0, shares: 1 }
}

impl WeightNames {
    /// The name of the tensor that a weight lies in.
    ///
    /// # Panics
    /// If the table lacks a part that the architecture's specs ask for.
    pub fn name(&self, part: Part) -> String {
        let Place { tensor, .. } = self.place(part);
        match part {
            Part::Embedding | Part::FinalNorm | Part::Head => tensor.to_owned(),
            Part::Layer(layer, _) => self.layer_prefix.replace("{}", &layer.to_string()) + tensor,
        }
    }

    /// Where a weight lies; the tensor's name is without the layer's prefix.
    ///
    /// # Panics
    /// As for [`WeightNames::name`].
    pub fn place(&self, part: Part) -> Place {
        match part {
            Part::Embedding => whole(self.embedding),
            Part::FinalNorm => whole(self.final_norm),
            Part::Head => whole(self.head),
            Part::Layer(_, wanted) => {
                let row = self.layer.iter().find(|(part, _)| *part == wanted);
                row.expect("the table names every part in use").1
            }
        }
    }
}

/// The row that a config asks for.
pub(crate) fn find(config: &Config) -> Result<&'static Architecture, Error> {
    let name = config.architecture()?;
    ARCHITECTURES.iter().find(|row| row.name == name).ok_or_else(|| {
        let known: Vec<_> = ARCHITECTURES.iter().map(|row| row.name).collect();
        config
            .unsupported(format!("architecture {name} is not supported; supported are {}", known.join(", ")))
    })
}

/// The names that Llama brought and many took over.
static LLAMA_NAMES: WeightNames = WeightNames {
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
        (LayerPart::QueryNorm, whole("self_attn.q_norm.weight")),
        (LayerPart::KeyNorm, whole("self_attn.k_norm.weight")),
        (LayerPart::Output, whole("self_attn.o_proj.weight")),
        (LayerPart::OutputBias, whole("self_attn.o_proj.bias")),
        (LayerPart::FeedForwardNorm, whole("post_attention_layernorm.weight")),
        (LayerPart::Gate, whole("mlp.gate_proj.weight")),
        (LayerPart::GateBias, whole("mlp.gate_proj.bias")),
        (LayerPart::Up, whole("mlp.up_proj.weight")),
        (LayerPart::UpBias, whole("mlp.up_proj.bias")),
        (LayerPart::Down, whole("mlp.down_proj.weight")),
        (LayerPart::DownBias, whole("mlp.down_proj.bias")),
    ],
    final_norm: "model.norm.weight",
    head: "lm_head.weight",
};

/// Where the dense decoders differ from each other.
struct Dense {
    architecture: &'static str,
    /// Elements of a head where the config does not say; `None` is hidden size over heads.
    head_dim: Option<usize>,
    /// Key-value heads where the config does not say; `None` is as many as query heads.
    kv_heads: Option<usize>,
    qkv_bias: bool,
    output_bias: bool,
    feed_forward_bias: bool,
    head_norm: bool,
    /// Whether what attention and feed-forward add is normed first.
    output_norms: bool,
    /// Added to the mean square where the config does not say.
    epsilon: f64,
    /// Pairs that turn, and the share of a head that does where the config does not say; `None` is whole heads in
    /// halves.
    partial_rope: Option<(Pairing, f64)>,
}

impl Dense {
    /// What most have: nothing of the optional parts.
    const fn plain(architecture: &'static str) -> Dense {
        Dense {
            architecture,
            head_dim: None,
            kv_heads: None,
            qkv_bias: false,
            output_bias: false,
            feed_forward_bias: false,
            head_norm: false,
            output_norms: false,
            epsilon: 1e-6,
            partial_rope: None,
        }
    }
}

/// The spec of a dense decoder with gated feed-forward: equal layers, norm before each half.
fn dense(config: &Config, dense: Dense) -> Result<DecoderSpec, Error> {
    if let Some(name) = config.get("hidden_act").filter(|name| *name != "silu" && *name != "swish") {
        return Err(config.unsupported(format!("hidden_act is {name}; only \"silu\" is supported")));
    }
    let hidden = config.size("hidden_size")?;
    let layers = config.size_within("num_hidden_layers", 1..=4096, None)?;
    let heads = config.size_within("num_attention_heads", 1..=65536, None)?;
    let kv_heads = match config.raw("num_key_value_heads") {
        // An explicit null means as many as query heads, also where absence means a number.
        Some(value) if value.is_null() => heads,
        _ => config.size_or("num_key_value_heads", dense.kv_heads.unwrap_or(heads))?,
    };
    if heads % kv_heads != 0 {
        return Err(config.broken(format!(
            "num_attention_heads is {heads}, not a multiple of num_key_value_heads, which is {kv_heads}"
        )));
    }
    if config.get("head_dim").is_none() && dense.head_dim.is_none() && hidden % heads != 0 {
        return Err(config.broken(format!(
            "hidden_size is {hidden}, not a multiple of num_attention_heads, which is {heads}, and there is no head_dim"
        )));
    }
    let head_dim = config.size_or("head_dim", dense.head_dim.unwrap_or(hidden / heads))?;
    if head_dim % 2 != 0 || head_dim > HEAD_DIM_MAX {
        return Err(config.unsupported(format!(
            "the head size is {head_dim}; supported are even sizes up to {HEAD_DIM_MAX}"
        )));
    }
    let context_tokens = config.size("max_position_embeddings")? as u32;
    let norm = NormSpec { epsilon: config.positive_or("rms_norm_eps", dense.epsilon)? as f32 };
    if !norm.epsilon.is_normal() {
        return Err(config.unsupported("rms_norm_eps is beyond what float32 holds"));
    }
    let rope = match dense.partial_rope {
        None => config.rope(context_tokens)?,
        Some((pairing, share)) => config.partial_rope(context_tokens, pairing, share)?,
    };
    let rotated = rope.rotated(head_dim);
    if rotated == 0 || rotated % 2 != 0 {
        return Err(config.unsupported(format!(
            "partial_rotary_factor is {}: {rotated} of {head_dim} elements of a head; supported are even numbers",
            rope.share
        )));
    }
    let output_norm = dense.output_norms.then_some(norm);
    let layer = LayerSpec {
        attention_norm: norm,
        attention: AttentionSpec::Full {
            heads,
            kv_heads,
            head_dim,
            qkv_bias: dense.qkv_bias,
            output_bias: dense.output_bias,
            head_norm: dense.head_norm.then_some(norm),
            scale: (head_dim as f64).powf(-0.5) as f32,
        },
        attention_output_norm: output_norm,
        feed_forward_norm: norm,
        feed_forward_output_norm: output_norm,
        feed_forward: FeedForwardSpec::Gated {
            width: config.size("intermediate_size")?,
            activation: Activation::Silu,
            bias: dense.feed_forward_bias,
        },
    };
    Ok(DecoderSpec {
        architecture: dense.architecture,
        vocab: config.size("vocab_size")?,
        hidden,
        context_tokens,
        layers: vec![layer; layers],
        final_norm: norm,
        head: if config.flag_or("tie_word_embeddings", false)? { Head::Tied } else { Head::Separate },
        rope,
    })
}

/// The largest head that the attention kernels take.
const HEAD_DIM_MAX: usize = 256;

/// Refuses a window over the context. `windowed` says whether a layer without an entry in `layer_types` has one.
fn refuse_windows(config: &Config, windowed: impl Fn(usize) -> bool) -> Result<(), Error> {
    let layers = config.size_within("num_hidden_layers", 1..=4096, None)?;
    let refuse = |layer: usize, kind: &str| {
        Err(config.unsupported(format!("layer {layer} has {kind}; only full_attention is supported")))
    };
    match config.get("layer_types") {
        None => match (0..layers).find(|layer| windowed(*layer)) {
            Some(layer) => refuse(layer, "sliding_window attention"),
            None => Ok(()),
        },
        Some(serde_json::Value::Array(kinds)) => {
            if kinds.len() != layers {
                return Err(config.broken(format!(
                    "layer_types has {} entries, num_hidden_layers is {layers}",
                    kinds.len()
                )));
            }
            match kinds.iter().position(|kind| kind != "full_attention") {
                Some(layer) => refuse(layer, &kinds[layer].to_string()),
                None => Ok(()),
            }
        }
        Some(value) => Err(config.broken(format!("layer_types is {value}, not a list"))),
    }
}

/// Refuses windows as the Qwen configs spell them: from layer `max_window_layers` on, if switched on.
fn refuse_qwen_windows(config: &Config) -> Result<(), Error> {
    let used = config.flag_or("use_sliding_window", false)?
        && !config.raw("sliding_window").is_some_and(serde_json::Value::is_null);
    let first = config.size_within("max_window_layers", 0..=usize::MAX, 28)?;
    refuse_windows(config, |layer| used && layer >= first)
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;
    use crate::rope::{RopeKind, RopeSpec};
    use crate::spec::KvGroup;
    use crate::testing::{changed, qwen3, spec};
    use crate::weights::Dtype;

    fn as_class(name: &str) -> Value {
        changed(qwen3(), json!({"architectures": [name]}))
    }

    fn attention(facts: &Value) -> AttentionSpec {
        spec(facts).unwrap().layers[0].attention.clone()
    }

    /// The names of the first layer's weights, without prefix, with shapes.
    fn layer_weights(facts: &Value) -> Vec<(String, Vec<usize>)> {
        let spec = spec(facts).unwrap();
        let row = ARCHITECTURES.iter().find(|row| row.name == spec.architecture).unwrap();
        let first = |part| matches!(part, Part::Layer(0, _));
        let weights = spec.weights().into_iter().filter(|weight| first(weight.part));
        weights
            .map(|weight| (row.names.name(weight.part).replace("model.layers.0.", ""), weight.shape))
            .collect()
    }

    #[test]
    fn qwen3_has_norms_on_heads_and_no_biases() {
        let spec = spec(&qwen3()).unwrap();
        assert_eq!((spec.vocab, spec.hidden, spec.layers.len(), spec.context_tokens), (11, 6, 2, 128));
        assert_eq!(spec.head, Head::Separate);
        let (kind, pairing) = (RopeKind::Default, Pairing::Halves);
        assert_eq!(spec.rope, RopeSpec { theta: 1e6, kind, share: 1.0, pairing });
        let norm = NormSpec { epsilon: 1e-6 };
        assert_eq!(
            spec.layers[1].attention,
            AttentionSpec::Full {
                heads: 4,
                kv_heads: 2,
                head_dim: 4,
                qkv_bias: false,
                output_bias: false,
                head_norm: Some(norm),
                scale: 0.5,
            }
        );
        let named = |name: &str, shape: &[usize]| (name.to_owned(), shape.to_vec());
        assert_eq!(
            layer_weights(&qwen3()),
            [
                named("input_layernorm.weight", &[6]),
                named("self_attn.q_proj.weight", &[16, 6]),
                named("self_attn.k_proj.weight", &[8, 6]),
                named("self_attn.v_proj.weight", &[8, 6]),
                named("self_attn.q_norm.weight", &[4]),
                named("self_attn.k_norm.weight", &[4]),
                named("self_attn.o_proj.weight", &[6, 16]),
                named("post_attention_layernorm.weight", &[6]),
                named("mlp.gate_proj.weight", &[10, 6]),
                named("mlp.up_proj.weight", &[10, 6]),
                named("mlp.down_proj.weight", &[6, 10]),
            ]
        );
    }

    #[test]
    fn glm4_norms_what_it_adds_and_keeps_gate_and_up_in_one_tensor() {
        let facts = changed(as_class("Glm4ForCausalLM"), json!({"partial_rotary_factor": 0.5}));
        let glm4 = spec(&facts).unwrap();
        assert_eq!((glm4.rope.pairing, glm4.rope.rotated(4)), (Pairing::Neighbours, 2));
        assert_eq!(
            spec(&as_class("Glm4ForCausalLM")).unwrap().rope.share,
            0.5,
            "where the config does not say"
        );
        let norm = Some(NormSpec { epsilon: 1.5625e-7 });
        let layer = &glm4.layers[0];
        assert_eq!((layer.attention_output_norm, layer.feed_forward_output_norm), (norm, norm));
        let names: Vec<_> = layer_weights(&facts).into_iter().map(|(name, _)| name).collect();
        for name in ["post_self_attn_layernorm.weight", "post_mlp_layernorm.weight"] {
            assert!(names.contains(&name.to_owned()), "{name} is not in {names:?}");
        }
        assert_eq!(names.iter().filter(|name| *name == "mlp.gate_up_proj.weight").count(), 2);

        let folder = crate::testing::checkpoint(&facts);
        let opened = crate::open(folder.path()).unwrap();
        let [gate, up] = [LayerPart::Gate, LayerPart::Up].map(|part| opened.weight(Part::Layer(0, part)));
        assert_eq!((gate.shape, up.shape), (&[10, 6][..], &[10, 6][..]));
        assert_eq!(gate.bytes.as_ptr_range().end, up.bytes.as_ptr_range().start);
        let uneven = changed(facts, json!({"partial_rotary_factor": 0.8}));
        let refusal = spec(&uneven).unwrap_err();
        assert!(refusal.contains("partial_rotary_factor is 0.8: 3 of 4 elements"), "{refusal}");
    }

    fn biases(facts: Value) -> Vec<String> {
        let names = layer_weights(&facts).into_iter().map(|(name, _)| name);
        names.filter(|name| name.ends_with(".bias")).collect()
    }

    #[test]
    fn each_architecture_has_the_biases_its_config_can_ask_for() {
        let qkv = ["self_attn.q_proj.bias", "self_attn.k_proj.bias", "self_attn.v_proj.bias"];
        let attention = [qkv.as_slice(), &["self_attn.o_proj.bias"]].concat();
        let feed_forward = ["mlp.gate_proj.bias", "mlp.up_proj.bias", "mlp.down_proj.bias"];
        let asked = json!({"attention_bias": true, "mlp_bias": true});
        assert!(biases(as_class("Qwen3ForCausalLM")).is_empty());
        assert!(biases(as_class("LlamaForCausalLM")).is_empty());
        assert_eq!(biases(as_class("Qwen2ForCausalLM")), qkv);
        assert_eq!(biases(changed(as_class("Qwen2ForCausalLM"), asked.clone())), qkv);
        assert_eq!(biases(changed(as_class("Qwen3ForCausalLM"), asked.clone())), attention);
        let all = [attention.as_slice(), &feed_forward].concat();
        assert_eq!(biases(changed(as_class("LlamaForCausalLM"), asked)), all);
        assert_eq!(biases(as_class("Glm4ForCausalLM")), qkv);
        assert!(biases(changed(as_class("Glm4ForCausalLM"), json!({"attention_bias": false}))).is_empty());
    }

    #[test]
    fn head_numbers_that_are_left_out_are_those_of_each_class() {
        let numbers = |facts: &Value| match attention(facts) {
            AttentionSpec::Full { heads, kv_heads, head_dim, .. } => (heads, kv_heads, head_dim),
        };
        let absent = json!({"head_dim": "absent", "num_key_value_heads": "absent", "num_attention_heads": 64,
                            "hidden_size": 1024});
        assert_eq!(numbers(&changed(as_class("LlamaForCausalLM"), absent.clone())), (64, 64, 16));
        assert_eq!(numbers(&changed(as_class("Qwen2ForCausalLM"), absent.clone())), (64, 32, 16));
        assert_eq!(numbers(&changed(as_class("Qwen3ForCausalLM"), absent)), (64, 32, 128));
        let null = json!({"num_key_value_heads": null});
        assert_eq!(numbers(&changed(as_class("Qwen2ForCausalLM"), null)), (4, 4, 4));
        // A head size of its own, not hidden size over heads.
        assert_eq!(numbers(&as_class("Qwen2ForCausalLM")), (4, 2, 4));
        assert_eq!(numbers(&as_class("LlamaForCausalLM")), (4, 2, 4));
    }

    #[test]
    fn a_tied_head_needs_no_weight() {
        let tied = spec(&changed(qwen3(), json!({"tie_word_embeddings": true}))).unwrap();
        assert_eq!(tied.head, Head::Tied);
        assert!(tied.weights().iter().all(|weight| weight.part != Part::Head));
        let absent = spec(&changed(qwen3(), json!({"tie_word_embeddings": "absent"}))).unwrap();
        assert_eq!(absent.weights().last().unwrap().part, Part::Head);
    }

    #[test]
    fn layers_that_keep_the_same_form_one_group_and_others_another() {
        let mut spec = spec(&changed(qwen3(), json!({"num_hidden_layers": 3}))).unwrap();
        let groups = spec.kv_groups(Dtype::Bf16);
        let one = spec.layers[0].attention.kv(Dtype::Bf16);
        assert_eq!(groups, [KvGroup { spec: one, layers: vec![0, 1, 2] }]);
        assert_eq!(one.token_bytes(), 2 * (4 + 4) * 2);
        let AttentionSpec::Full { kv_heads, .. } = &mut spec.layers[1].attention;
        *kv_heads = 1;
        let layers: Vec<_> = spec.kv_groups(Dtype::F32).into_iter().map(|group| group.layers).collect();
        assert_eq!(layers, [vec![0, 2], vec![1]]);
    }

    #[test]
    fn what_a_config_asks_for_and_we_lack_is_named() {
        let windows = json!({"use_sliding_window": true, "sliding_window": 64, "max_window_layers": 1});
        for (class, changes, fact) in [
            (
                "MistralForCausalLM",
                json!({}),
                "architecture MistralForCausalLM is not supported; supported are Qwen3",
            ),
            ("Qwen3ForCausalLM", json!({"architectures": []}), "has no architectures"),
            ("Qwen3ForCausalLM", json!({"architectures": "absent"}), "has no architectures"),
            (
                "Qwen3ForCausalLM",
                json!({"hidden_act": "gelu"}),
                "hidden_act is \"gelu\"; only \"silu\" is supported",
            ),
            ("Qwen3ForCausalLM", windows.clone(), "layer 1 has sliding_window attention"),
            ("Qwen2ForCausalLM", windows, "layer 1 has sliding_window attention"),
            ("LlamaForCausalLM", json!({"sliding_window": 64}), "layer 0 has sliding_window attention"),
            (
                "Qwen3ForCausalLM",
                json!({"layer_types": ["full_attention", "sliding_attention"]}),
                "layer 1 has \"sliding_attention\"; only full_attention",
            ),
            ("Qwen3ForCausalLM", json!({"layer_types": ["full_attention"]}), "layer_types has 1 entries"),
            (
                "Qwen2ForCausalLM",
                json!({"quantization_config": {"quant_method": "awq"}}),
                "quantization_config: w_bit is null; supported: 4",
            ),
            (
                "Qwen3ForCausalLM",
                json!({"head_dim": 5}),
                "the head size is 5; supported are even sizes up to 256",
            ),
            ("Qwen3ForCausalLM", json!({"head_dim": 258}), "the head size is 258"),
            (
                "LlamaForCausalLM",
                json!({"head_dim": "absent"}),
                "hidden_size is 6, not a multiple of num_attention",
            ),
            (
                "Qwen3ForCausalLM",
                json!({"num_key_value_heads": 3}),
                "num_attention_heads is 4, not a multiple of",
            ),
            (
                "Qwen3ForCausalLM",
                json!({"num_hidden_layers": 5000000}),
                "num_hidden_layers is 5000000; supported are",
            ),
            ("Qwen3ForCausalLM", json!({"vocab_size": 0}), "vocab_size is 0; supported are 1 to 16777216"),
            ("Qwen3ForCausalLM", json!({"hidden_size": "64"}), "hidden_size is \"64\", not a whole number"),
            ("Qwen3ForCausalLM", json!({"intermediate_size": "absent"}), "has no intermediate_size"),
            (
                "Qwen3ForCausalLM",
                json!({"tie_word_embeddings": 1}),
                "tie_word_embeddings is 1, neither true nor",
            ),
            (
                "Qwen3ForCausalLM",
                json!({"rms_norm_eps": "x"}),
                "rms_norm_eps is \"x\", not a positive number",
            ),
            ("Qwen3ForCausalLM", json!({"rms_norm_eps": 1e99}), "rms_norm_eps is beyond what float32 holds"),
        ] {
            let error = spec(&changed(as_class(class), changes)).unwrap_err();
            assert!(
                error.starts_with("config.json: ") && error.contains(fact),
                "{error:?} does not say {fact:?}"
            );
        }
    }

    #[test]
    fn windows_that_are_not_in_use_are_no_obstacle() {
        for changes in [
            json!({"use_sliding_window": false, "sliding_window": 32768, "max_window_layers": 0}),
            json!({"use_sliding_window": true, "sliding_window": 64, "max_window_layers": 2}),
            json!({"use_sliding_window": true, "sliding_window": null, "max_window_layers": 0}),
            json!({"layer_types": ["full_attention", "full_attention"], "sliding_window": null}),
        ] {
            assert!(spec(&changed(as_class("Qwen2ForCausalLM"), changes.clone())).is_ok(), "{changes}");
        }
    }

    #[test]
    fn every_architecture_names_every_part_it_can_ask_for() {
        let everything = json!({"attention_bias": true, "mlp_bias": true, "tie_word_embeddings": false});
        for row in ARCHITECTURES {
            let spec = spec(&changed(as_class(row.name), everything.clone())).unwrap();
            assert_eq!(spec.architecture, row.name);
            let place = |part| (row.names.name(part), row.names.place(part).share);
            let mut places: Vec<_> = spec.weights().iter().map(|weight| place(weight.part)).collect();
            let asked = places.len();
            places.sort();
            places.dedup();
            assert_eq!(places.len(), asked, "{}: two parts share a place", row.name);
        }
    }
}
