//! From a checkpoint's tensors to packed weights on a device: the one place where checkpoint names and shapes
//! meet the decoder's operations.

use std::collections::BTreeSet;

use tandem_device::{
    Buffer, Device, Element, INT8_INPUTS_MAX, Int4Row, Linear, LinearForm, Matrix, QuantisedMatrix,
    QuantisedRows,
};
use tandem_models::{
    AttentionSpec, Checkpoint, Dtype, FeedForwardSpec, Head, LayerPart, MatrixForm, NormSpec, Pairing, Part,
};

use crate::quantise::{self, INT4_GROUP};
use crate::{LoadError, Quantization};

/// A decoder's weights on a device, with the numbers that go with them.
pub(crate) struct Weights {
    pub(crate) embedding: Linear,
    pub(crate) layers: Vec<Layer>,
    pub(crate) final_norm: Norm,
    pub(crate) head: Linear,
}

pub(crate) struct Layer {
    pub(crate) attention_norm: Norm,
    pub(crate) attention: Attention,
    pub(crate) attention_output_norm: Option<Norm>,
    pub(crate) feed_forward_norm: Norm,
    pub(crate) feed_forward: FeedForward,
    pub(crate) feed_forward_output_norm: Option<Norm>,
}

/// Full attention.
pub(crate) struct Attention {
    pub(crate) heads: usize,
    pub(crate) kv_heads: usize,
    pub(crate) width: usize,
    pub(crate) scale: f32,
    pub(crate) qkv: Projection,
    pub(crate) head_norms: Option<(Norm, Norm)>,
    pub(crate) output: Projection,
}

/// A gated feed-forward.
pub(crate) struct FeedForward {
    pub(crate) width: usize,
    pub(crate) gate_up: Projection,
    pub(crate) down: Projection,
}

/// A matrix and its bias.
pub(crate) struct Projection {
    pub(crate) weight: Linear,
    pub(crate) bias: Option<Buffer>,
}

/// A norm's weight and what is added to the mean square.
pub(crate) struct Norm {
    pub(crate) weight: Buffer,
    pub(crate) epsilon: f32,
}

/// Packs all weights of a checkpoint.
pub(crate) fn pack(
    checkpoint: &Checkpoint,
    device: &dyn Device,
    element: Element,
    quantization: Quantization,
    progress: &dyn Fn(f32),
) -> Result<Weights, LoadError> {
    if let (Some(format), Quantization::W8a8 | Quantization::Int4) = (checkpoint.quantised(), quantization) {
        let dir = checkpoint.dir().display();
        return Err(LoadError::Option(format!(
            "quantization {quantization} is made from numbers; {dir} is quantised already ({format}), which auto serves"
        )));
    }
    let mut packer = Packer {
        checkpoint,
        device,
        element,
        quantization,
        progress,
        done: 0,
        total: checkpoint.total_bytes().max(1),
        order: HeadOrder { width: 1, rotated: 0, pairing: Pairing::Halves },
    };
    let spec = checkpoint.spec();
    let head_of_its_own = quantization != Quantization::Auto;
    if head_of_its_own && matches!(spec.head, Head::Tied) {
        packer.total += checkpoint.matrix(Part::Embedding).bytes() as u64;
    }
    let embedding = packer.matrix(&[Part::Embedding], false)?;
    let mut layers = Vec::with_capacity(spec.layers.len());
    for (index, layer) in spec.layers.iter().enumerate() {
        let part = |part| Part::Layer(index, part);
        let AttentionSpec::Full { heads, kv_heads, head_dim, qkv_bias, output_bias, head_norm, scale } =
            layer.attention;
        let FeedForwardSpec::Gated { width, activation: tandem_models::Activation::Silu, bias } =
            layer.feed_forward;
        use LayerPart::*;
        packer.order =
            HeadOrder { width: head_dim, rotated: spec.rope.rotated(head_dim), pairing: spec.rope.pairing };
        let norms = (
            packer.optional_norm(part(QueryNorm), head_norm)?,
            packer.optional_norm(part(KeyNorm), head_norm)?,
        );
        let (attention_out, feed_forward_out) = (layer.attention_output_norm, layer.feed_forward_output_norm);
        layers.push(Layer {
            attention_norm: packer.norm(part(AttentionNorm), layer.attention_norm)?,
            attention: Attention {
                heads,
                kv_heads,
                width: head_dim,
                scale,
                qkv: packer.projection(
                    &[part(Query), part(Key), part(Value)],
                    qkv_bias.then_some(&[part(QueryBias), part(KeyBias), part(ValueBias)]),
                    false,
                )?,
                head_norms: norms.0.zip(norms.1),
                output: packer.projection(
                    &[part(Output)],
                    output_bias.then_some(&[part(OutputBias)]),
                    false,
                )?,
            },
            attention_output_norm: packer.optional_norm(part(AttentionOutputNorm), attention_out)?,
            feed_forward_norm: packer.norm(part(FeedForwardNorm), layer.feed_forward_norm)?,
            feed_forward: FeedForward {
                width,
                gate_up: packer.projection(
                    &[part(Gate), part(Up)],
                    bias.then_some(&[part(GateBias), part(UpBias)]),
                    true,
                )?,
                down: packer.projection(&[part(Down)], bias.then_some(&[part(DownBias)]), false)?,
            },
            feed_forward_output_norm: packer.optional_norm(part(FeedForwardOutputNorm), feed_forward_out)?,
        });
    }
    let final_norm = packer.norm(Part::FinalNorm, spec.final_norm)?;
    // A head in 4 bits would cost more quality than all layers, one of numbers as much time as most of them.
    let made = if head_of_its_own { Quantization::W8a8 } else { Quantization::Auto };
    let head = match spec.head {
        Head::Tied if head_of_its_own => packer.packed(&[Part::Embedding], false, made)?,
        Head::Tied => embedding.clone(),
        Head::Separate => packer.packed(&[Part::Head], false, made)?,
    };
    Ok(Weights { embedding, layers, final_norm, head })
}

impl Weights {
    /// The quantised forms in use, for the numerics class: empty where everything is numbers.
    pub(crate) fn forms(&self) -> Vec<String> {
        let layers = self.layers.iter().flat_map(|layer| {
            let (attention, feed_forward) = (&layer.attention, &layer.feed_forward);
            [&attention.qkv, &attention.output, &feed_forward.gate_up, &feed_forward.down]
        });
        let mut forms: BTreeSet<String> = layers
            .filter_map(|projection| match projection.weight.form {
                LinearForm::Numbers => None,
                LinearForm::Int8 => Some("int8".to_owned()),
                LinearForm::Int4 { group } => Some(format!("int4g{group}")),
            })
            .collect();
        if self.head.form == LinearForm::Int8 {
            forms.insert("head8".to_owned());
        }
        forms.into_iter().rev().collect()
    }
}

/// Matrices of equal width, one under the other.
struct Stack<'a> {
    matrices: Vec<(Part, tandem_models::Matrix<'a>)>,
    order: &'a HeadOrder,
}

impl Stack<'_> {
    fn outputs(&self) -> usize {
        self.matrices.iter().map(|(_, matrix)| matrix.outputs()).sum()
    }

    fn inputs(&self) -> usize {
        self.matrices[0].1.inputs()
    }

    /// The form that all share, or else numbers, which all have.
    fn form(&self) -> MatrixForm {
        let first = self.matrices[0].1.form();
        let shared = self.matrices.iter().all(|(_, matrix)| matrix.form() == first);
        if shared { first } else { MatrixForm::Numbers }
    }

    /// Which matrix and row of it an output is.
    fn find(&self, mut output: usize) -> (&tandem_models::Matrix<'_>, usize) {
        for (part, matrix) in &self.matrices {
            if output < matrix.outputs() {
                return (matrix, self.order.source(*part, output));
            }
            output -= matrix.outputs();
        }
        panic!("there are fewer outputs than {output} more")
    }

    /// A row's bytes, where they are of the element type.
    fn bytes(&self, output: usize, element: Element) -> Option<&[u8]> {
        let (matrix, row) = self.find(output);
        match (matrix.row_bytes(row)?, element) {
            ((Dtype::Bf16, bytes), Element::Bf16) | ((Dtype::F32, bytes), Element::F32) => Some(bytes),
            _ => None,
        }
    }

    fn numbers(&self, output: usize) -> Vec<f32> {
        let mut numbers = vec![0.0; self.inputs()];
        self.read(output, &mut numbers);
        numbers
    }

    fn read(&self, output: usize, to: &mut [f32]) {
        let (matrix, row) = self.find(output);
        matrix.read_row(row, to);
    }
}

struct Packer<'a> {
    checkpoint: &'a Checkpoint,
    device: &'a dyn Device,
    element: Element,
    quantization: Quantization,
    progress: &'a dyn Fn(f32),
    done: u64,
    total: u64,
    /// Of the present layer's query and key heads.
    order: HeadOrder,
}

/// How the elements of query and key heads are put in order, so that those that turn together lie in two halves.
struct HeadOrder {
    width: usize,
    rotated: usize,
    pairing: Pairing,
}

impl HeadOrder {
    /// Which row of a weight comes to `row`.
    fn source(&self, part: Part, row: usize) -> usize {
        use LayerPart::*;
        match part {
            Part::Layer(_, Query | QueryBias | QueryNorm | Key | KeyBias | KeyNorm) => {
                let at = row % self.width;
                row - at + self.pairing.source(at, self.rotated)
            }
            _ => row,
        }
    }
}

impl Packer<'_> {
    fn projection<const N: usize>(
        &mut self,
        parts: &[Part; N],
        bias: Option<&[Part; N]>,
        gated: bool,
    ) -> Result<Projection, LoadError> {
        let weight = self.matrix(parts, gated)?;
        let bias = bias.map(|parts| self.vector(parts)).transpose()?;
        Ok(Projection { weight, bias })
    }

    /// Matrices of equal width, one under the other, as one; those of layers in the form that was asked for.
    fn matrix(&mut self, parts: &[Part], gated: bool) -> Result<Linear, LoadError> {
        let in_layer = parts.iter().all(|part| matches!(part, Part::Layer(..)));
        self.packed(parts, gated, if in_layer { self.quantization } else { Quantization::Auto })
    }

    /// The same, in the form `made`.
    fn packed(&mut self, parts: &[Part], gated: bool, made: Quantization) -> Result<Linear, LoadError> {
        let stack = Stack {
            matrices: parts.iter().map(|part| (*part, self.checkpoint.matrix(*part))).collect(),
            order: &self.order,
        };
        let (outputs, inputs) = (stack.outputs(), stack.inputs());
        let in_layer = parts.iter().all(|part| matches!(part, Part::Layer(..)));
        let form = if in_layer { stack.form() } else { MatrixForm::Numbers };
        let quantised = |rows| self.device.pack_quantised(QuantisedMatrix { outputs, inputs, gated, rows });
        let packed = match (form, made) {
            (MatrixForm::Int8, _) if inputs <= INT8_INPUTS_MAX => {
                quantised(QuantisedRows::Int8(&|output, to| {
                    let (matrix, row) = stack.find(output);
                    matrix.read_int8(row, to)
                }))
            }
            (MatrixForm::Int4 { group }, _) if group % 8 == 0 || group >= inputs => {
                let read = |output: usize, to: Int4Row<'_>| {
                    let (matrix, row) = stack.find(output);
                    let Int4Row { values, scales, zeros } = to;
                    matrix.read_int4(row, tandem_models::Int4Row { values, scales, zeros });
                };
                let group = group.next_multiple_of(8);
                quantised(QuantisedRows::Int4 { group, row: &read })
            }
            (MatrixForm::Numbers, Quantization::W8a8) if inputs <= INT8_INPUTS_MAX => {
                quantised(QuantisedRows::Int8(&|output, to| quantise::int8(&stack.numbers(output), to)))
            }
            (MatrixForm::Numbers, Quantization::Int4) => {
                let make = |output: usize, to: Int4Row<'_>| {
                    quantise::int4(&stack.numbers(output), INT4_GROUP, to);
                };
                quantised(QuantisedRows::Int4 { group: INT4_GROUP, row: &make })
            }
            _ => {
                let element = self.element;
                let bytes = |output: usize| stack.bytes(output, element);
                let row = |output: usize, to: &mut [f32]| stack.read(output, to);
                self.device.pack(Matrix { outputs, inputs, element, gated, bytes: &bytes, row: &row })
            }
        };
        let packed = packed.map_err(|error| self.refused(error))?;
        let bytes = stack.matrices.iter().map(|(_, matrix)| matrix.bytes()).sum();
        self.advance(bytes);
        Ok(packed)
    }

    fn norm(&mut self, part: Part, norm: NormSpec) -> Result<Norm, LoadError> {
        Ok(Norm { weight: self.vector(&[part])?, epsilon: norm.epsilon })
    }

    fn optional_norm(&mut self, part: Part, norm: Option<NormSpec>) -> Result<Option<Norm>, LoadError> {
        norm.map(|norm| self.norm(part, norm)).transpose()
    }

    /// Vectors end to end; they stay in float32, being small.
    fn vector(&mut self, parts: &[Part]) -> Result<Buffer, LoadError> {
        let mut values = Vec::new();
        for part in parts {
            let tensor = self.checkpoint.weight(*part);
            let read = tensor.to_f32();
            values.extend((0..read.len()).map(|at| read[self.order.source(*part, at)]));
            self.advance(tensor.bytes.len());
        }
        let buffer = self.device.allocate(Element::F32, values.len()).map_err(|error| self.refused(error))?;
        let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_ne_bytes()).collect();
        self.device.stream().upload(&buffer, &bytes);
        Ok(buffer)
    }

    fn advance(&mut self, bytes: usize) {
        self.done += bytes as u64;
        (self.progress)(self.done as f32 / self.total as f32);
    }

    fn refused(&self, error: tandem_device::Error) -> LoadError {
        LoadError::Unsupported {
            model: self.checkpoint.dir().display().to_string(),
            reason: error.to_string(),
        }
    }
}
