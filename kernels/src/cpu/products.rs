//! Products on a stream: from the call to the kernel of the weights' packed form.

use std::marker::PhantomData;

use tandem_device::{Buffer, Epilogue, Linear, LinearCall, Logits};

use super::factor::{self, Factor, Int4, Int8, Int8Rows, Quantise, RowForm};
#[cfg(target_arch = "x86_64")]
use super::factor::{Int4Pairs, Int4Rows, Int4Shifted, NIBBLES, Pair, Shift};
use super::form::Form;
use super::shares::Shares;
use super::{Cpu, CpuStream, expect, linear};
use crate::memory::{Shared, slice};
#[cfg(target_arch = "x86_64")]
use crate::scalar::Bf16;
use crate::scalar::Scalar;

impl Cpu {
    /// Rows in float32, made by all threads.
    fn widen<T: Scalar>(&self, stored: &[T], wide: &mut [f32]) {
        let to = Shared::over(wide);
        self.run(stored.len() / 4, &|part, parts| {
            let (begin, end) = (stored.len() * part / parts, stored.len() * (part + 1) / parts);
            // SAFETY: each part has a range of its own.
            let to = unsafe { to.part(begin, end - begin) };
            for (to, value) in to.iter_mut().zip(&stored[begin..end]) {
                *to = value.load();
            }
        });
    }

    fn product<F: Factor>(
        &self,
        factor: F,
        count: usize,
        weight: &Linear,
        bias: Option<&Buffer>,
        epilogue: Epilogue,
        to: linear::Output<F::Stored>,
    ) {
        assert_eq!(weight.gated, epilogue == Epilogue::Gate, "a gated matrix has a gate as epilogue");
        if let Some(bias) = bias {
            expect(bias, weight.outputs);
        }
        // SAFETY: as in `embed_as`.
        let bias = bias.map(|bias| unsafe { slice(bias) });
        let shares = &Shares::new(self.threads);
        let job = linear::Product { factor, count, weight, bias, epilogue, to, shares };
        self.run(count * weight.inputs * weight.outputs, &|part, parts| {
            linear::product(self.isa, &job, part, parts);
        });
    }
}

impl CpuStream {
    pub(super) fn linear_as<F: Form>(&mut self, call: LinearCall<'_>) {
        let to = stored::<F::Stored>(&call);
        self.numbers::<F>(call.x, call.count, call.weight, call.bias, call.epilogue, to);
    }

    pub(super) fn logits_as<F: Form>(&mut self, call: Logits<'_>) {
        let to = logits::<F::Stored>(&call);
        self.numbers::<F>(call.x, call.count, call.weight, None, Epilogue::None, to);
    }

    fn numbers<F: Form>(
        &mut self,
        x: &Buffer,
        count: usize,
        weight: &Linear,
        bias: Option<&Buffer>,
        epilogue: Epilogue,
        to: linear::Output<F::Stored>,
    ) {
        let inputs = weight.inputs;
        expect(x, count * inputs);
        assert_eq!(weight.values.element(), F::Stored::ELEMENT, "weights and activations are of one type");
        let mut wide = std::mem::take(&mut self.wide);
        // SAFETY: as in `embed_as`.
        let stored = unsafe { &slice::<F::Stored>(x)[..count * inputs] };
        let x = F::inputs(stored, &mut wide, |stored, wide| self.cpu.widen(stored, wide));
        let factor = linear::Numbers::<F> { x, inputs, panels: Shared::of(&weight.values) };
        self.cpu.product(factor, count, weight, bias, epilogue, to);
        self.wide = wide;
    }

    /// 8-bit integers: rows are quantised, then multiplied as whole numbers.
    pub(super) fn linear_int8<T: Scalar>(&mut self, call: LinearCall<'_>) {
        let to = stored::<T>(&call);
        self.int8::<T>(call.x, call.count, call.weight, call.bias, call.epilogue, to);
    }

    pub(super) fn logits_int8<T: Scalar>(&mut self, call: Logits<'_>) {
        let to = logits::<T>(&call);
        self.int8::<T>(call.x, call.count, call.weight, None, Epilogue::None, to);
    }

    fn int8<T: Scalar>(
        &mut self,
        x: &Buffer,
        count: usize,
        weight: &Linear,
        bias: Option<&Buffer>,
        epilogue: Epilogue,
        to: linear::Output<T>,
    ) {
        let inputs = weight.inputs;
        expect(x, count * inputs);
        let words = factor::words_of_bytes(inputs);
        let isa = self.cpu.isa;
        let form = RowForm::of(isa);
        let (mut values, mut scales) = (std::mem::take(&mut self.narrow), std::mem::take(&mut self.wide));
        values.resize(values.len().max(form.words() * count * words), 0);
        scales.resize(scales.len().max(count), 0.0);
        let job = Quantise::<T> {
            // SAFETY: as in `embed_as`.
            x: unsafe { &slice(x)[..count * inputs] },
            inputs,
            form,
            values: Shared::over(&mut values),
            scales: Shared::over(&mut scales),
        };
        self.cpu.run(count * inputs, &|part, parts| factor::quantise(isa, &job, part, parts));
        let packed = weight.scales.as_ref().expect("packed integers have scales");
        let factor = Int8::<T> {
            rows: Int8Rows { values: &values, words, scales: &scales },
            panels: Shared::of(&weight.values),
            scales: Shared::of(packed),
            isa,
            stored: PhantomData,
        };
        self.cpu.product(factor, count, weight, bias, epilogue, to);
        (self.narrow, self.wide) = (values, scales);
    }

    /// 4-bit integers: weights become numbers on the way.
    pub(super) fn linear_int4<F: Form<Input = f32>>(&mut self, call: LinearCall<'_>, group: usize) {
        let (count, inputs) = (call.count, call.weight.inputs);
        let to = stored::<F::Stored>(&call);
        expect(call.x, count * inputs);
        let mut wide = std::mem::take(&mut self.wide);
        // SAFETY: as in `embed_as`.
        let x = unsafe { &slice::<F::Stored>(call.x)[..count * inputs] };
        let x = F::inputs(x, &mut wide, |stored, wide| self.cpu.widen(stored, wide));
        let packed = call.weight.scales.as_ref().expect("packed integers have scales");
        let factor = Int4::<F::Stored> {
            x,
            inputs,
            group,
            panels: Shared::of(&call.weight.values),
            scales: Shared::of(packed),
            stored: PhantomData,
        };
        self.cpu.product(factor, count, call.weight, call.bias, call.epilogue, to);
        self.wide = wide;
    }

    /// 4-bit integers on AVX-512: products with the integers themselves.
    #[cfg(target_arch = "x86_64")]
    pub(super) fn linear_int4_pairs(&mut self, call: LinearCall<'_>, group: usize) {
        let (count, inputs) = (call.count, call.weight.inputs);
        let to = stored::<Bf16>(&call);
        expect(call.x, count * inputs);
        let (words, groups) = (inputs.div_ceil(factor::NIBBLES), inputs.div_ceil(group));
        let (mut pairs, mut sums) = (std::mem::take(&mut self.narrow), std::mem::take(&mut self.wide));
        pairs.resize(pairs.len().max(4 * count * words), 0);
        sums.resize(sums.len().max(count * groups), 0.0);
        let job = Pair {
            // SAFETY: as in `embed_as`.
            x: unsafe { &slice(call.x)[..count * inputs] },
            inputs,
            group,
            values: Shared::over(&mut pairs),
            sums: Shared::over(&mut sums),
        };
        let isa = self.cpu.isa;
        self.cpu.run(count * inputs, &|part, parts| factor::pair(isa, &job, part, parts));
        let packed = call.weight.scales.as_ref().expect("packed integers have scales");
        let factor = Int4Pairs {
            rows: Int4Rows { values: &pairs, sums: &sums },
            inputs,
            group,
            panels: Shared::of(&call.weight.values),
            scales: Shared::of(packed),
        };
        self.cpu.product(factor, count, call.weight, call.bias, call.epilogue, to);
        (self.narrow, self.wide) = (pairs, sums);
    }

    /// 4-bit integers on AVX2: products with the integers themselves.
    #[cfg(target_arch = "x86_64")]
    pub(super) fn linear_int4_shifted(&mut self, call: LinearCall<'_>, group: usize) {
        let (count, inputs) = (call.count, call.weight.inputs);
        let to = stored::<Bf16>(&call);
        expect(call.x, count * inputs);
        let (words, groups) = (inputs.div_ceil(NIBBLES), inputs.div_ceil(group));
        let mut wide = std::mem::take(&mut self.wide);
        wide.resize(wide.len().max(count * (NIBBLES * words + groups)), 0.0);
        let (values, sums) = wide.split_at_mut(NIBBLES * count * words);
        let job = Shift {
            // SAFETY: as in `embed_as`.
            x: unsafe { &slice(call.x)[..count * inputs] },
            inputs,
            group,
            values: Shared::over(values),
            sums: Shared::over(sums),
        };
        let isa = self.cpu.isa;
        self.cpu.run(count * inputs, &|part, parts| factor::shift(isa, &job, part, parts));
        let packed = call.weight.scales.as_ref().expect("packed integers have scales");
        let factor = Int4Shifted {
            rows: Int4Rows { values, sums },
            inputs,
            group,
            panels: Shared::of(&call.weight.values),
            scales: Shared::of(packed),
        };
        self.cpu.product(factor, count, call.weight, call.bias, call.epilogue, to);
        self.wide = wide;
    }
}

/// Where a call's results go.
fn stored<T: Scalar>(call: &LinearCall<'_>) -> linear::Output<T> {
    let halves = if call.epilogue == Epilogue::Gate { 2 } else { 1 };
    expect(call.to, call.count * call.weight.outputs / halves);
    linear::Output::Stored(Shared::of(call.to))
}

/// Where a call's logits go.
fn logits<T: Scalar>(call: &Logits<'_>) -> linear::Output<T> {
    expect(call.to, call.count * call.weight.outputs);
    if let Some(peaks) = call.peaks {
        expect(peaks, call.count * call.weight.outputs.div_ceil(Logits::PEAK));
    }
    linear::Output::Logits(Shared::of(call.to), call.peaks.map(Shared::of))
}

/// A panel's logits have one peak.
const _: () = assert!(Logits::PEAK == super::form::PANEL);
