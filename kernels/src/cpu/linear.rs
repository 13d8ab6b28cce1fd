//! Matrix products over packed panels.
//!
//! A panel holds 32 outputs: for each input, the 32 weights side by side, so that one input is multiplied into 32
//! running sums at once. A sum runs over the inputs in order, in float32, whatever the number of rows: one row
//! and five hundred have the same arithmetic. A gated matrix has panels in turn, gate then up, of the same outputs.

use tandem_device::{Epilogue, Linear};

use super::isa::kernel;
use crate::math;
use crate::memory::Shared;
use crate::scalar::Scalar;

/// Outputs of a panel.
pub(super) const PANEL: usize = 32;
/// Rows multiplied at a time: as many sums as fit the registers of wide vectors.
const ROWS: usize = 4;

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
pub(super) struct Product<'a, T> {
    /// Rows in float32, `[count][inputs]`.
    pub(super) x: &'a [f32],
    pub(super) count: usize,
    pub(super) weight: &'a Linear,
    pub(super) panels: Shared<T>,
    pub(super) bias: Option<&'a [f32]>,
    pub(super) epilogue: Epilogue,
    pub(super) to: Output<T>,
    /// Whether the registers hold the sums of several rows. Changes no bit: rows do not share sums.
    pub(super) several: bool,
}

/// Where results go: stored as activations, or as logits in float32.
pub(super) enum Output<T> {
    Stored(Shared<T>),
    Logits(Shared<f32>),
}

kernel!(
    /// Runs part `part` of `parts` of the product: a fixed range of panels.
    product, body, Product<T>
);

#[inline(always)]
fn body<T: Scalar>(job: &Product<'_, T>, part: usize, parts: usize) {
    let group = if job.weight.gated { 2 } else { 1 };
    let groups = panels(job.weight.outputs, job.weight.gated) / group;
    for at in groups * part / parts..groups * (part + 1) / parts {
        let mut row = 0;
        while job.several && row + ROWS <= job.count {
            rows::<T, ROWS>(job, at, row);
            row += ROWS;
        }
        while row < job.count {
            rows::<T, 1>(job, at, row);
            row += 1;
        }
    }
}

/// `R` rows from `row` on, times panel (or pair of panels) `at`.
#[inline(always)]
fn rows<T: Scalar, const R: usize>(job: &Product<'_, T>, at: usize, row: usize) {
    let inputs = job.weight.inputs;
    let x = &job.x[row * inputs..(row + R) * inputs];
    if !job.weight.gated {
        let sums = panel::<T, R>(job, at, x, inputs);
        return finish(job, at, row, &sums);
    }
    let mut gate = panel::<T, R>(job, at * 2, x, inputs);
    let up = panel::<T, R>(job, at * 2 + 1, x, inputs);
    let half = job.weight.outputs / 2;
    let first = at * PANEL;
    let width = PANEL.min(half - first);
    for r in 0..R {
        let mut ups = up[r];
        if let Some(bias) = job.bias {
            for j in 0..width {
                gate[r][j] += bias[first + j];
                ups[j] += bias[half + first + j];
            }
        }
        for j in 0..PANEL {
            gate[r][j] = math::silu(gate[r][j]) * ups[j];
        }
        if let Output::Stored(to) = &job.to {
            // SAFETY: this part alone writes the columns of its panels.
            let to = unsafe { to.part((row + r) * half + first, width) };
            for j in 0..width {
                to[j] = T::store(gate[r][j]);
            }
        }
    }
}

/// The sums of `R` rows with one panel.
#[inline(always)]
fn panel<T: Scalar, const R: usize>(
    job: &Product<'_, T>,
    at: usize,
    x: &[f32],
    inputs: usize,
) -> [[f32; PANEL]; R] {
    // SAFETY: weights are written once, when they are packed.
    let weights = unsafe { job.panels.read(at * PANEL * inputs, PANEL * inputs) };
    let mut sums = [[0.0; PANEL]; R];
    for (k, weights) in weights.chunks_exact(PANEL).enumerate() {
        let mut wide = [0.0; PANEL];
        for j in 0..PANEL {
            wide[j] = weights[j].load();
        }
        for r in 0..R {
            let value = x[r * inputs + k];
            for j in 0..PANEL {
                sums[r][j] += value * wide[j];
            }
        }
    }
    sums
}

#[inline(always)]
fn finish<T: Scalar, const R: usize>(job: &Product<'_, T>, at: usize, row: usize, sums: &[[f32; PANEL]; R]) {
    let outputs = job.weight.outputs;
    let first = at * PANEL;
    let width = PANEL.min(outputs - first);
    for r in 0..R {
        let mut sums = sums[r];
        if let Some(bias) = job.bias {
            for j in 0..width {
                sums[j] += bias[first + j];
            }
        }
        let begin = (row + r) * outputs + first;
        match &job.to {
            // SAFETY: this part alone writes the columns of its panels.
            Output::Logits(to) => unsafe { to.part(begin, width) }.copy_from_slice(&sums[..width]),
            Output::Stored(to) => {
                // SAFETY: as above.
                let to = unsafe { to.part(begin, width) };
                if job.epilogue == Epilogue::Residual {
                    for j in 0..width {
                        sums[j] += to[j].load();
                    }
                }
                for j in 0..width {
                    to[j] = T::store(sums[j]);
                }
            }
        }
    }
}
