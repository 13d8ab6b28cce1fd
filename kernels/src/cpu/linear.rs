//! Matrix products over packed panels.
//!
//! A matrix is packed once into panels of 32 outputs ([`super::form`]); the same panels serve one row and five
//! hundred, and nothing is packed at run time. A gated matrix has panels in turn, gate then up, of the same outputs.

use tandem_device::{Epilogue, Linear};

use super::form::{Form, PANEL, panel_len, rows_next};
use super::isa::kernel;
use crate::math;
use crate::memory::Shared;
use crate::scalar::Scalar;

/// Bytes of panels that a tile of rows is multiplied with before the next tile comes: they stay in the second
/// level of cache while the rows pass.
const PANELS_BYTES: usize = 256 << 10;
/// No form has more rows in a tile.
const ROWS_MAX: usize = 14;

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
pub(super) struct Product<'a, F: Form> {
    /// Rows, `[count][inputs]`.
    pub(super) x: &'a [F::Input],
    pub(super) count: usize,
    pub(super) weight: &'a Linear,
    pub(super) panels: Shared<F::Stored>,
    pub(super) bias: Option<&'a [f32]>,
    pub(super) epilogue: Epilogue,
    pub(super) to: Output<F::Stored>,
}

/// Where results go: stored as activations, or as logits in float32.
pub(super) enum Output<T> {
    Stored(Shared<T>),
    Logits(Shared<f32>),
}

kernel!(
    /// Runs part `part` of `parts` of the product: a fixed range of panels.
    product, body, Product<F: Form>
);

#[inline(always)]
fn body<F: Form>(job: &Product<'_, F>, part: usize, parts: usize) {
    let pair = if job.weight.gated { 2 } else { 1 };
    let groups = panels(job.weight.outputs, job.weight.gated) / pair;
    let (begin, end) = (groups * part / parts, groups * (part + 1) / parts);
    let bytes = pair * panel_len::<F::Stored>(job.weight.inputs) * size_of::<F::Stored>();
    let at_once = (PANELS_BYTES / bytes.max(1)).max(1);
    for first in (begin..end).step_by(at_once) {
        let mut row = 0;
        while row < job.count {
            let rows = rows_next::<F>(job.count - row);
            for at in first..end.min(first + at_once) {
                tile(job, at, row, rows);
            }
            row += rows;
        }
    }
}

/// `rows` rows from `row` on, times panel (or pair of panels) `at`.
#[inline(always)]
fn tile<F: Form>(job: &Product<'_, F>, at: usize, row: usize, rows: usize) {
    let mut sums = [[0.0; PANEL]; ROWS_MAX];
    let sums = &mut sums[..rows];
    if !job.weight.gated {
        panel(job, at, row, sums);
        return finish(job, at, row, sums);
    }
    let mut ups = [[0.0; PANEL]; ROWS_MAX];
    let ups = &mut ups[..rows];
    panel(job, at * 2, row, sums);
    panel(job, at * 2 + 1, row, ups);
    gate(job, at, row, sums, ups);
}

/// The sums of some rows with one panel.
#[inline(always)]
fn panel<F: Form>(job: &Product<'_, F>, at: usize, row: usize, sums: &mut [[f32; PANEL]]) {
    let inputs = job.weight.inputs;
    let len = panel_len::<F::Stored>(inputs);
    // SAFETY: weights are written once, when they are packed.
    let panel = unsafe { job.panels.read(at * len, len) };
    // SAFETY: a form is used with its instruction set; `tile` checks the rest.
    unsafe { F::tile(&job.x[row * inputs..], inputs, inputs, panel, sums) }
}

#[inline(always)]
fn gate<F: Form>(
    job: &Product<'_, F>,
    at: usize,
    row: usize,
    gates: &mut [[f32; PANEL]],
    ups: &mut [[f32; PANEL]],
) {
    let half = job.weight.outputs / 2;
    let first = at * PANEL;
    let width = PANEL.min(half - first);
    for (r, (gate, up)) in gates.iter_mut().zip(ups).enumerate() {
        if let Some(bias) = job.bias {
            for j in 0..width {
                gate[j] += bias[first + j];
                up[j] += bias[half + first + j];
            }
        }
        for j in 0..PANEL {
            gate[j] = math::silu(gate[j]) * up[j];
        }
        if let Output::Stored(to) = &job.to {
            // SAFETY: this part alone writes the columns of its panels.
            let to = unsafe { to.part((row + r) * half + first, width) };
            for j in 0..width {
                to[j] = F::Stored::store(gate[j]);
            }
        }
    }
}

#[inline(always)]
fn finish<F: Form>(job: &Product<'_, F>, at: usize, row: usize, sums: &mut [[f32; PANEL]]) {
    let outputs = job.weight.outputs;
    let first = at * PANEL;
    let width = PANEL.min(outputs - first);
    for (r, sums) in sums.iter_mut().enumerate() {
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
                    to[j] = F::Stored::store(sums[j]);
                }
            }
        }
    }
}
