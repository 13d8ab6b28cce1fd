//! What a decoder computes, as plain data: the one thing that every architecture becomes. From it follow the
//! weights it needs with their shapes, and what its attention keeps per token.

use crate::rope::RopeSpec;
use crate::weights::Dtype;

/// A decoder-only transformer: embedding, layers, norm, head.
#[derive(Clone, Debug, PartialEq)]
pub struct DecoderSpec {
    /// The class name in `config.json`, e.g. `Qwen3ForCausalLM`.
    pub architecture: &'static str,
    /// Rows of the embedding table and of the head; token ids are below it.
    pub vocab: usize,
    /// Elements of a hidden row (the residual stream).
    pub hidden: usize,
    /// Tokens a sequence may have at most.
    pub context_tokens: u32,
    /// The layers in order; there is at least one.
    pub layers: Vec<LayerSpec>,
    /// Applied to the last layer's output.
    pub final_norm: NormSpec,
    /// What turns hidden rows into logits.
    pub head: Head,
    /// How queries and keys of every layer are rotated by position.
    pub rope: RopeSpec,
}

/// One layer: `x += attention(norm(x))`, then `x += feed_forward(norm(x))`; with output norms
/// `x += output_norm(attention(norm(x)))`, and the other half alike.
#[derive(Clone, Debug, PartialEq)]
pub struct LayerSpec {
    /// Before attention.
    pub attention_norm: NormSpec,
    /// The attention.
    pub attention: AttentionSpec,
    /// Of what attention adds, if there is one.
    pub attention_output_norm: Option<NormSpec>,
    /// Before the feed-forward.
    pub feed_forward_norm: NormSpec,
    /// The feed-forward.
    pub feed_forward: FeedForwardSpec,
    /// Of what the feed-forward adds, if there is one.
    pub feed_forward_output_norm: Option<NormSpec>,
}

/// Division by the root of the mean square, then multiplication by a weight.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct NormSpec {
    /// Added to the mean square.
    pub epsilon: f32,
}

/// Kinds of attention.
#[derive(Clone, Debug, PartialEq)]
pub enum AttentionSpec {
    /// Every token sees all tokens up to itself; query heads share key-value heads in equal groups.
    Full {
        /// Query heads; a multiple of `kv_heads`. Query head `h` reads key-value head `h / (heads / kv_heads)`.
        heads: usize,
        /// Key-value heads.
        kv_heads: usize,
        /// Elements of a head; even. Which of them are rotated, and in what pairs, says [`RopeSpec`].
        head_dim: usize,
        /// Whether the query, key and value projections have biases.
        qkv_bias: bool,
        /// Whether the output projection has a bias.
        output_bias: bool,
        /// The norm over each query and key head before rotation, if there is one; one weight of `head_dim`
        /// elements for all query heads, another for all key heads.
        head_norm: Option<NormSpec>,
        /// Multiplies the scores before the softmax.
        scale: f32,
    },
}

/// Kinds of feed-forward.
#[derive(Clone, Debug, PartialEq)]
pub enum FeedForwardSpec {
    /// `down(activation(gate(x)) * up(x))`.
    Gated {
        /// Outputs of `gate` and `up`, inputs of `down`.
        width: usize,
        /// Applied to the gate.
        activation: Activation,
        /// Whether the three projections have biases.
        bias: bool,
    },
}

/// Functions applied to the gate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Activation {
    /// `x / (1 + exp(-x))`.
    Silu,
}

/// Where the matrix comes from that turns hidden rows into logits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Head {
    /// It is the embedding table.
    Tied,
    /// It is a weight of its own.
    Separate,
}

/// A weight's place in the decoder.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Part {
    /// The embedding table, one row per token id.
    Embedding,
    /// A weight of a layer, counted from 0.
    Layer(usize, LayerPart),
    /// The norm after the last layer.
    FinalNorm,
    /// The head, where it is not tied to the embedding.
    Head,
}

/// A weight's place in its layer. Matrices have one row per output.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum LayerPart {
    /// Norm before attention.
    AttentionNorm,
    /// Query projection: rows are heads, then elements of a head.
    Query,
    /// Its bias.
    QueryBias,
    /// Key projection.
    Key,
    /// Its bias.
    KeyBias,
    /// Value projection.
    Value,
    /// Its bias.
    ValueBias,
    /// Norm of each query head.
    QueryNorm,
    /// Norm of each key head.
    KeyNorm,
    /// Projection of the attended values back to the hidden row.
    Output,
    /// Its bias.
    OutputBias,
    /// Norm of what attention adds to the hidden row.
    AttentionOutputNorm,
    /// Norm before the feed-forward.
    FeedForwardNorm,
    /// Gate projection.
    Gate,
    /// Its bias.
    GateBias,
    /// Up projection.
    Up,
    /// Its bias.
    UpBias,
    /// Down projection.
    Down,
    /// Its bias.
    DownBias,
    /// Norm of what the feed-forward adds to the hidden row.
    FeedForwardOutputNorm,
}

/// A weight that a decoder needs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WeightSpec {
    /// Its place.
    pub part: Part,
    /// `[outputs, inputs]` of a matrix, `[elements]` of a norm or bias.
    pub shape: Vec<usize>,
}

/// What one kind of layer keeps in memory for a sequence.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct KvSpec {
    /// What kind of memory it is.
    pub kind: KvKind,
    /// Key-value heads.
    pub heads: usize,
    /// Elements of a key.
    pub key_width: usize,
    /// Elements of a value.
    pub value_width: usize,
    /// Element type of both.
    pub element: Dtype,
    /// How many tokens back the layer looks; `None` is all of them.
    pub window: Option<u32>,
    /// Bytes per sequence and layer that do not grow with its tokens.
    pub state_bytes: u64,
}

/// Kinds of attention memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum KvKind {
    /// Keys and values of every token.
    Full,
}

/// Layers with equal memory: they share pages.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KvGroup {
    /// What each of them keeps.
    pub spec: KvSpec,
    /// Which they are, rising.
    pub layers: Vec<usize>,
}

impl KvSpec {
    /// Bytes that one token takes in one layer.
    pub fn token_bytes(&self) -> u64 {
        (self.heads * (self.key_width + self.value_width) * self.element.bytes()) as u64
    }
}

impl DecoderSpec {
    /// Every weight the decoder needs, in the canonical order: from the embedding up, independent of how the
    /// checkpoint's files are cut.
    pub fn weights(&self) -> Vec<WeightSpec> {
        let mut weights = vec![WeightSpec { part: Part::Embedding, shape: vec![self.vocab, self.hidden] }];
        for (index, layer) in self.layers.iter().enumerate() {
            layer.weights(self.hidden, &mut |part, shape| {
                weights.push(WeightSpec { part: Part::Layer(index, part), shape });
            });
        }
        weights.push(WeightSpec { part: Part::FinalNorm, shape: vec![self.hidden] });
        match self.head {
            Head::Tied => {}
            Head::Separate => {
                weights.push(WeightSpec { part: Part::Head, shape: vec![self.vocab, self.hidden] });
            }
        }
        weights
    }

    /// The layers grouped by what they keep, groups in order of their first layer; `element` is the type that
    /// keys and values are stored in.
    pub fn kv_groups(&self, element: Dtype) -> Vec<KvGroup> {
        let mut groups: Vec<KvGroup> = Vec::new();
        for (index, layer) in self.layers.iter().enumerate() {
            let spec = layer.attention.kv(element);
            match groups.iter_mut().find(|group| group.spec == spec) {
                Some(group) => group.layers.push(index),
                None => groups.push(KvGroup { spec, layers: vec![index] }),
            }
        }
        groups
    }
}

impl LayerSpec {
    fn weights(&self, hidden: usize, needs: &mut dyn FnMut(LayerPart, Vec<usize>)) {
        use LayerPart::*;
        needs(AttentionNorm, vec![hidden]);
        match self.attention {
            AttentionSpec::Full { heads, kv_heads, head_dim, qkv_bias, output_bias, head_norm, .. } => {
                let projections =
                    [(Query, QueryBias, heads), (Key, KeyBias, kv_heads), (Value, ValueBias, kv_heads)];
                for (matrix, bias, heads) in projections {
                    needs(matrix, vec![heads * head_dim, hidden]);
                    if qkv_bias {
                        needs(bias, vec![heads * head_dim]);
                    }
                }
                if head_norm.is_some() {
                    needs(QueryNorm, vec![head_dim]);
                    needs(KeyNorm, vec![head_dim]);
                }
                needs(Output, vec![hidden, heads * head_dim]);
                if output_bias {
                    needs(OutputBias, vec![hidden]);
                }
            }
        }
        if self.attention_output_norm.is_some() {
            needs(AttentionOutputNorm, vec![hidden]);
        }
        needs(FeedForwardNorm, vec![hidden]);
        match self.feed_forward {
            FeedForwardSpec::Gated { width, bias, .. } => {
                let projections = [
                    (Gate, GateBias, width, hidden),
                    (Up, UpBias, width, hidden),
                    (Down, DownBias, hidden, width),
                ];
                for (matrix, bias_part, outputs, inputs) in projections {
                    needs(matrix, vec![outputs, inputs]);
                    if bias {
                        needs(bias_part, vec![outputs]);
                    }
                }
            }
        }
        if self.feed_forward_output_norm.is_some() {
            needs(FeedForwardOutputNorm, vec![hidden]);
        }
    }
}

impl AttentionSpec {
    /// What a layer with this attention keeps.
    pub fn kv(&self, element: Dtype) -> KvSpec {
        match *self {
            AttentionSpec::Full { kv_heads, head_dim, .. } => KvSpec {
                kind: KvKind::Full,
                heads: kv_heads,
                key_width: head_dim,
                value_width: head_dim,
                element,
                window: None,
                state_bytes: 0,
            },
        }
    }
}
