//! Matrix products over packed panels.
//!
//! A matrix is packed once into panels of 32 outputs ([`super::form`]); the same panels serve one row and five
//! hundred, and nothing is packed at run time. A gated matrix has panels in turn, gate then up, of the same outputs.

use tandem_device::{Epilogue, Linear};

use super::factor::Factor;
use super::form::{Ahead, Form, PANEL, panel_len};
use super::isa::kernel;
use super::shares::Shares;
use crate::math;
use crate::memory::Shared;
use crate::scalar::Scalar;

/// Rows that go through all panels together: as many as the second level of cache holds beside the panels. More
/// come in equal blocks, each of which reads the weights again.
pub(super) const ROWS_BLOCK: usize = 70;
/// Inputs that are multiplied at a time when a panel serves several tiles: so much of a panel, and of the next one,
/// stays in the second level of cache.
const INPUTS_BLOCK: usize = 1024;

/// Where output `output` lies: its panel and its place there.
pub(super) fn place(outputs: usize, gated: bool, output: usize) -> (usize, usize) {
    if !gated {
        return (output / PANEL, output % PANEL);
    }
    let half = outputs / 2;
    let (up, within) = (output / half, output % half);
    (within / PANEL * 2 + up, within % PANEL)
}

/// Panels of a matrix.
pub(super) fn panels(outputs: usize, gated: bool) -> usize {
    if gated { (outputs / 2).div_ceil(PANEL) * 2 } else { outputs.div_ceil(PANEL) }
}

/// What the kernel is told.
pub(super) struct Product<'a, F: Factor> {
    /// The rows and the weights.
    pub(super) factor: F,
    pub(super) count: usize,
    pub(super) weight: &'a Linear,
    pub(super) bias: Option<&'a [f32]>,
    pub(super) epilogue: Epilogue,
    pub(super) to: Output<F::Stored>,
    pub(super) shares: &'a Shares,
}

/// Rows and weights of numbers.
pub(super) struct Numbers<'a, F: Form> {
    /// `[count][inputs]`.
    pub(super) x: &'a [F::Input],
    pub(super) inputs: usize,
    pub(super) panels: Shared<F::Stored>,
}

/// Where results go: stored as activations, or as logits in float32, with the peak of every panel's.
pub(super) enum Output<T> {
    Stored(Shared<T>),
    Logits(Shared<f32>, Option<Shared<f32>>),
}

kernel!(
    /// Runs part `part` of `parts` of the product: a range of panels, and what is left of the others'.
    product, body, Product<F: Factor>
);

#[inline(always)]
fn body<F: Factor>(job: &Product<'_, F>, part: usize, parts: usize) {
    let groups = panels(job.weight.outputs, job.weight.gated) / if job.weight.gated { 2 } else { 1 };
    let blocks = job.count.div_ceil(ROWS_BLOCK);
    let begin = |part: usize| groups * part / parts;
    let width = |part: usize| begin(part + 1) - begin(part);
    let (mut sums, mut ups) = ([[0.0; PANEL]; ROWS_BLOCK], [[0.0; PANEL]; ROWS_BLOCK]);
    // All panels of a share with a block of rows, then all with the next block.
    while let Some((whose, unit)) = job.shares.next(part, parts, |whose| blocks * width(whose)) {
        let (block, at) = (unit / width(whose), begin(whose) + unit % width(whose));
        let (first, last) = (job.count * block / blocks, job.count * (block + 1) / blocks);
        let (sums, ups) = (&mut sums[..last - first], &mut ups[..last - first]);
        if job.weight.gated {
            job.factor.multiply(at * 2, first, sums);
            job.factor.multiply(at * 2 + 1, first, ups);
            gate(job, at, first, sums, ups);
        } else {
            job.factor.multiply(at, first, sums);
            finish(job, at, first, sums);
        }
    }
}

impl<F: Form> Factor for Numbers<'_, F> {
    type Stored = F::Stored;

    // While a panel is multiplied the next one is fetched.
    #[inline(always)]
    fn multiply(&self, panel: usize, first: usize, sums: &mut [[f32; PANEL]]) {
        let (inputs, len) = (self.inputs, panel_len::<F::Stored>(self.inputs));
        // SAFETY: weights are written once, when they are packed.
        let panel = unsafe { self.panels.read(panel * len, len) };
        multiply::<F>(self.x, inputs, panel, first, sums);
    }
}

/// The sums of `sums.len()` rows from `first` on with one panel.
#[inline(always)]
fn multiply<F: Form>(
    x: &[F::Input],
    inputs: usize,
    panel: &[F::Stored],
    first: usize,
    sums: &mut [[f32; PANEL]],
) {
    let rows = sums.len();
    let at_once = rows <= F::ROWS_AT_ONCE;
    let block = if at_once { inputs } else { INPUTS_BLOCK };
    for from in (0..inputs).step_by(block) {
        let count = block.min(inputs - from);
        let panel = &panel[from * PANEL..][..panel_len::<F::Stored>(count)];
        let mut row = 0;
        while row < rows {
            let height = F::rows_next(rows - row);
            let ahead = match at_once {
                true => Ahead::soon(panel),
                false => Ahead::following(panel, row..row + height, rows),
            };
            let x = &x[(first + row) * inputs + from..];
            // SAFETY: a form is used with its instruction set; `tile` checks the rest.
            unsafe { F::tile(x, inputs, count, panel, ahead, from == 0, &mut sums[row..row + height]) };
            row += height;
        }
    }
}

#[inline(always)]
fn gate<F: Factor>(
    job: &Product<'_, F>,
    at: usize,
    first_row: usize,
    gates: &mut [[f32; PANEL]],
    ups: &mut [[f32; PANEL]],
) {
    let half = job.weight.outputs / 2;
    let first = at * PANEL;
    let width = PANEL.min(half - first);
    for (r, (gate, up)) in gates.iter_mut().zip(ups).enumerate() {
        if let Some(bias) = job.bias {
            add(gate, &bias[first..first + width]);
            add(up, &bias[half + first..half + first + width]);
        }
        for j in 0..PANEL {
            gate[j] = math::silu(gate[j]) * up[j];
        }
        if let Output::Stored(to) = &job.to {
            // SAFETY: whoever has this unit alone writes the columns of its panel, of these rows.
            let to = unsafe { to.part((first_row + r) * half + first, width) };
            store(gate, to);
        }
    }
}

#[inline(always)]
fn finish<F: Factor>(job: &Product<'_, F>, at: usize, first_row: usize, sums: &mut [[f32; PANEL]]) {
    let outputs = job.weight.outputs;
    let first = at * PANEL;
    let width = PANEL.min(outputs - first);
    for (r, sums) in sums.iter_mut().enumerate() {
        if let Some(bias) = job.bias {
            add(sums, &bias[first..first + width]);
        }
        let begin = (first_row + r) * outputs + first;
        match &job.to {
            Output::Logits(to, peaks) => {
                // SAFETY: whoever has this unit alone writes the columns of its panel, of these rows.
                store(sums, unsafe { to.part(begin, width) });
                if let Some(peaks) = peaks {
                    // SAFETY: as above; a panel has one peak.
                    let to = unsafe { peaks.part((first_row + r) * outputs.div_ceil(PANEL) + at, 1) };
                    to[0] = peak(&sums[..width]);
                }
            }
            Output::Stored(to) => {
                // SAFETY: as above.
                let to = unsafe { to.part(begin, width) };
                if job.epilogue == Epilogue::Residual {
                    add(sums, to);
                }
                store(sums, to);
            }
        }
    }
}

/// The highest of these logits, NaN if one is not finite.
#[inline(always)]
fn peak(logits: &[f32]) -> f32 {
    if math::all_finite(logits) { math::highest(logits) } else { f32::NAN }
}

/// Adds up to 32 values. Whole panels go by arrays, whose loops have no remainder.
#[inline(always)]
fn add<T: Scalar>(sums: &mut [f32; PANEL], values: &[T]) {
    if let Ok(values) = <&[T; PANEL]>::try_from(values) {
        for j in 0..PANEL {
            sums[j] += values[j].load();
        }
        return;
    }
    for (sum, value) in sums.iter_mut().zip(values) {
        *sum += value.load();
    }
}

/// Stores the first sums. As [`add`].
#[inline(always)]
fn store<T: Scalar>(sums: &[f32; PANEL], to: &mut [T]) {
    if let Ok(to) = <&mut [T; PANEL]>::try_from(&mut *to) {
        for j in 0..PANEL {
            to[j] = T::store(sums[j]);
        }
        return;
    }
    for (to, sum) in to.iter_mut().zip(sums) {
        *to = T::store(*sum);
    }
}
