//! One decoder for every architecture: executes the layers of a spec as operations on a device's stream.

use std::sync::Arc;

use tandem_device::{
    Attention, Buffer, Device, Element, Embed, Epilogue, Error, KvLayer, KvPages, LinearCall, Logits, Norm,
    QkvStore, Rotations, StepRows, Stream,
};
use tandem_models::DecoderSpec;

use crate::step::StepBuffers;
use crate::weights::{self, Weights};

/// A model on a device: weights, KV pages and the activations of the running step.
pub(crate) struct Decoder {
    device: Arc<dyn Device>,
    element: Element,
    weights: Weights,
    /// Where each layer keeps its KV: group, and layer of the group.
    places: Vec<(usize, usize)>,
    kv: Vec<KvPages>,
    /// One entry per head width that occurs.
    ropes: Vec<Rope>,
    activations: Activations,
}

struct Rope {
    width: usize,
    frequencies: Vec<f64>,
    scale: f64,
}

/// Buffers between operations, as large as the largest step so far.
struct Activations {
    rows: usize,
    hidden: Buffer,
    normed: Buffer,
    /// What a half of a layer adds to `hidden`, where that is normed first.
    added: Buffer,
    qkv: Buffer,
    queries: Buffer,
    attended: Buffer,
    gated: Buffer,
    rotations: Vec<Buffer>,
}

impl Decoder {
    /// `kv` has one entry per group of `spec.kv_groups()`.
    pub(crate) fn new(
        spec: &DecoderSpec,
        device: Arc<dyn Device>,
        element: Element,
        weights: Weights,
        kv: Vec<KvPages>,
        places: Vec<(usize, usize)>,
    ) -> Result<Decoder, Error> {
        let mut ropes: Vec<Rope> = Vec::new();
        for layer in &weights.layers {
            let width = layer.attention.width;
            if ropes.iter().all(|rope| rope.width != width) {
                ropes.push(Rope {
                    width,
                    frequencies: spec.rope.inverse_frequencies(width),
                    scale: spec.rope.attention_factor(),
                });
            }
        }
        let activations = Activations::new(&*device, element, &weights, &ropes, 1)?;
        Ok(Decoder { device, element, weights, places, kv, ropes, activations })
    }

    pub(crate) fn vocab(&self) -> usize {
        self.weights.head.outputs
    }

    pub(crate) fn hidden(&self) -> usize {
        self.weights.embedding.inputs
    }

    pub(crate) fn kv(&self, group: usize) -> &KvPages {
        &self.kv[group]
    }

    /// Computes the KV of all rows of a step, and the hidden row of each (before the final norm), which stays
    /// until the next step.
    pub(crate) fn run(
        &mut self,
        stream: &mut dyn Stream,
        step: &StepBuffers,
        previous: &Buffer,
    ) -> Result<(), Error> {
        let count = step.count;
        if count > self.activations.rows {
            let rows = count.next_power_of_two();
            self.activations =
                Activations::new(&*self.device, self.element, &self.weights, &self.ropes, rows)?;
        }
        let a = &self.activations;
        let rows = StepRows { count, positions: &step.positions, sequences: &step.sequences };
        stream.embed(Embed {
            table: &self.weights.embedding,
            tokens: &step.tokens,
            rows,
            slots: &step.slots,
            previous,
            to: &a.hidden,
        });
        for (rope, to) in self.ropes.iter().zip(&a.rotations) {
            stream.rotations(Rotations { rows, frequencies: &rope.frequencies, scale: rope.scale, to });
        }
        let mut add = None;
        for (layer, (group, index)) in self.weights.layers.iter().zip(&self.places) {
            let kv = KvLayer { pages: &self.kv[*group], layer: *index };
            add = self.attend(stream, layer, rows, step.sequences_of(*group), kv, add);
            add = self.feed_forward(stream, layer, count, add);
        }
        if add.is_some() {
            // Only for what it adds: rows are normed for the logits when it is known which are wanted.
            norm(stream, &self.weights.final_norm, &a.hidden, add, count, &a.normed);
        }
        Ok(())
    }

    /// `hidden += add`, then `hidden += output(attention(norm(hidden)))`, or what is to be added, normed.
    fn attend(
        &self,
        stream: &mut dyn Stream,
        layer: &weights::Layer,
        rows: StepRows<'_>,
        sequences: tandem_device::Sequences<'_>,
        kv: KvLayer<'_>,
        add: Option<&Buffer>,
    ) -> Option<&Buffer> {
        let a = &self.activations;
        let count = rows.count;
        let attention = &layer.attention;
        let rope = self.ropes.iter().position(|rope| rope.width == attention.width);
        let rope = rope.expect("there is a rope for each head width");
        norm(stream, &layer.attention_norm, &a.hidden, add, count, &a.normed);
        stream.linear(LinearCall {
            x: &a.normed,
            count,
            weight: &attention.qkv.weight,
            bias: attention.qkv.bias.as_ref(),
            epilogue: Epilogue::None,
            to: &a.qkv,
        });
        let norms = attention.head_norms.as_ref();
        stream.qkv_store(QkvStore {
            qkv: &a.qkv,
            rows,
            heads: attention.heads,
            query_norm: norms.map(|(query, _)| &query.weight),
            key_norm: norms.map(|(_, key)| &key.weight),
            epsilon: norms.map_or(0.0, |(query, _)| query.epsilon),
            rotations: &a.rotations[rope],
            pairs: self.ropes[rope].frequencies.len(),
            sequences,
            kv,
            queries: &a.queries,
        });
        stream.attention(Attention {
            queries: &a.queries,
            rows,
            heads: attention.heads,
            scale: attention.scale,
            sequences,
            kv,
            to: &a.attended,
        });
        self.end_half(stream, &a.attended, &attention.output, layer.attention_output_norm.as_ref(), count)
    }

    /// `hidden += add`, then `hidden += down(silu(gate(norm(hidden))) * up(norm(hidden)))`, or what is to be added,
    /// normed.
    fn feed_forward(
        &self,
        stream: &mut dyn Stream,
        layer: &weights::Layer,
        count: usize,
        add: Option<&Buffer>,
    ) -> Option<&Buffer> {
        let a = &self.activations;
        let feed_forward = &layer.feed_forward;
        norm(stream, &layer.feed_forward_norm, &a.hidden, add, count, &a.normed);
        stream.linear(LinearCall {
            x: &a.normed,
            count,
            weight: &feed_forward.gate_up.weight,
            bias: feed_forward.gate_up.bias.as_ref(),
            epilogue: Epilogue::Gate,
            to: &a.gated,
        });
        self.end_half(stream, &a.gated, &feed_forward.down, layer.feed_forward_output_norm.as_ref(), count)
    }

    /// The last product of a half of a layer: added to `hidden` at once, or normed and left for the next norm to add.
    fn end_half(
        &self,
        stream: &mut dyn Stream,
        x: &Buffer,
        projection: &weights::Projection,
        output_norm: Option<&weights::Norm>,
        count: usize,
    ) -> Option<&Buffer> {
        let a = &self.activations;
        let (epilogue, to) = match output_norm {
            None => (Epilogue::Residual, &a.hidden),
            Some(_) => (Epilogue::None, &a.normed),
        };
        let (weight, bias) = (&projection.weight, projection.bias.as_ref());
        stream.linear(LinearCall { x, count, weight, bias, epilogue, to });
        norm(stream, output_norm?, &a.normed, None, count, &a.added);
        Some(&a.added)
    }

    /// Logits of `count` of the last run's rows, named by `rows`, and their peaks, into `to`; `gathered` and `normed` are
    /// T `[count][hidden]`.
    pub(crate) fn logits(
        &self,
        stream: &mut dyn Stream,
        rows: &Buffer,
        count: usize,
        [gathered, normed]: [&Buffer; 2],
        [to, peaks]: [&Buffer; 2],
    ) {
        stream.gather_rows(&self.activations.hidden, rows, count, self.hidden(), gathered);
        norm(stream, &self.weights.final_norm, gathered, None, count, normed);
        stream.logits(Logits { x: normed, count, weight: &self.weights.head, to, peaks: Some(peaks) });
    }
}

fn norm(
    stream: &mut dyn Stream,
    norm: &weights::Norm,
    x: &Buffer,
    add: Option<&Buffer>,
    count: usize,
    to: &Buffer,
) {
    stream.norm(Norm { x, add, weight: &norm.weight, epsilon: norm.epsilon, count, to });
}

impl Activations {
    fn new(
        device: &dyn Device,
        element: Element,
        weights: &Weights,
        ropes: &[Rope],
        rows: usize,
    ) -> Result<Activations, Error> {
        let hidden = weights.embedding.inputs;
        let widest =
            |width: &dyn Fn(&weights::Layer) -> usize| weights.layers.iter().map(width).max().unwrap_or(0);
        let queries = widest(&|layer| layer.attention.heads * layer.attention.width);
        let qkv =
            widest(&|layer| (layer.attention.heads + 2 * layer.attention.kv_heads) * layer.attention.width);
        let gated = widest(&|layer| layer.feed_forward.width);
        let of = |width: usize| device.allocate(element, rows * width);
        Ok(Activations {
            rows,
            hidden: of(hidden)?,
            normed: of(hidden)?,
            added: of(hidden)?,
            qkv: of(qkv)?,
            queries: of(queries)?,
            attended: of(queries)?,
            gated: of(gated)?,
            rotations: ropes
                .iter()
                .map(|rope| device.allocate(Element::F32, rows * 2 * rope.frequencies.len()))
                .collect::<Result<_, _>>()?,
        })
    }
}
