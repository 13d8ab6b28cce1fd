//! Weight matrices on their way into panels, by all threads: each makes panels of its own.

use std::ops::Range;

use tandem_device::{
    Error, INT8_INPUTS_MAX, Int4Row, Linear, LinearForm, Matrix, QuantisedMatrix, QuantisedRows,
};

use super::factor::{BYTES, NIBBLES};
use super::form::{self, Ahead, Form, PANEL};
use super::{Cpu, Element, Isa, linear};
use crate::memory::{Memory, Shared};
use crate::scalar::{Bf16, Scalar};

/// The outputs of a panel.
fn outputs_of(outputs: usize, gated: bool, panel: usize) -> Range<usize> {
    let halves = if gated { 2 } else { 1 };
    let half = outputs / halves;
    let first = panel / halves * PANEL;
    let begin = panel % halves * half + first;
    begin..begin + PANEL.min(half - first)
}

/// A matrix of numbers.
pub(super) fn numbers<T: Stored>(cpu: &Cpu, matrix: Matrix<'_>) -> Result<Linear, Error> {
    let Matrix { outputs, inputs, element, gated, bytes, row } = matrix;
    assert!(!gated || outputs.is_multiple_of(2), "a gated matrix has two halves");
    let len = form::panel_len::<T>(inputs);
    let panels = linear::panels(outputs, gated);
    let values = Memory::allocate(element, panels * len)?;
    let to = Shared::<T>::of(&values);
    cpu.run(outputs * inputs, &|part, parts| {
        let (mut rows, mut wide) = (vec![T::store(0.0); PANEL * inputs], vec![0.0; inputs]);
        for at in panels * part / parts..panels * (part + 1) / parts {
            let outputs = outputs_of(outputs, gated, at);
            let rows = &mut rows[..outputs.len() * inputs];
            for (output, to) in outputs.zip(rows.chunks_exact_mut(inputs)) {
                if let Some(bytes) = bytes(output) {
                    T::read(bytes, to);
                    continue;
                }
                row(output, &mut wide);
                for (to, value) in to.iter_mut().zip(&wide) {
                    *to = T::store(*value);
                }
            }
            // SAFETY: each part has panels of its own, in memory that nobody else has yet.
            let panel = unsafe { to.part(at * len, len) };
            T::panel(cpu.isa, rows, inputs, panel);
        }
    });
    Ok(Linear { outputs, inputs, gated, form: LinearForm::Numbers, values, scales: None })
}

/// What numbers are stored as.
pub(super) trait Stored: Scalar {
    /// Elements from their bytes, little-endian.
    fn read(bytes: &[u8], to: &mut [Self]);

    /// A panel whose outputs are the rows.
    fn panel(isa: Isa, rows: &[Self], inputs: usize, panel: &mut [Self]);
}

impl Stored for f32 {
    fn read(bytes: &[u8], to: &mut [f32]) {
        for (to, bytes) in to.iter_mut().zip(bytes.as_chunks().0) {
            *to = f32::from_le_bytes(*bytes);
        }
    }

    fn panel(_: Isa, rows: &[f32], inputs: usize, panel: &mut [f32]) {
        // SAFETY: this form needs no instructions of its own.
        unsafe { form::Exact::panel_of_rows(rows, inputs, Ahead::NONE, panel) }
    }
}

impl Stored for Bf16 {
    fn read(bytes: &[u8], to: &mut [Bf16]) {
        for (to, bytes) in to.iter_mut().zip(bytes.as_chunks().0) {
            *to = Bf16(u16::from_le_bytes(*bytes));
        }
    }

    fn panel(isa: Isa, rows: &[Bf16], inputs: usize, panel: &mut [Bf16]) {
        match isa {
            #[cfg(target_arch = "x86_64")]
            // SAFETY: an `Isa` in use was found available when the device was opened.
            Isa::Avx2 | Isa::Avx512Fma | Isa::Avx512 => unsafe {
                form::Fused::panel_of_rows(rows, inputs, Ahead::NONE, panel)
            },
            // SAFETY: as above.
            _ => unsafe { form::Widened::panel_of_rows(rows, inputs, Ahead::NONE, panel) },
        }
    }
}

/// A matrix of integers.
pub(super) fn integers(cpu: &Cpu, matrix: QuantisedMatrix<'_>) -> Result<Linear, Error> {
    let QuantisedMatrix { outputs, inputs, gated, rows } = matrix;
    assert!(!gated || outputs.is_multiple_of(2), "a gated matrix has two halves");
    let panels = linear::panels(outputs, gated);
    let (form, per_word, per_output) = match &rows {
        QuantisedRows::Int8(_) if inputs > INT8_INPUTS_MAX => {
            return Err(Error::Unsupported(format!(
                "8-bit integers with {inputs} inputs; at most {INT8_INPUTS_MAX} are supported"
            )));
        }
        QuantisedRows::Int8(_) => (LinearForm::Int8, BYTES, 1),
        QuantisedRows::Int4 { group, .. } => {
            assert!(*group > 0 && group.is_multiple_of(NIBBLES), "groups of whole words, not of {group}");
            (LinearForm::Int4 { group: *group }, NIBBLES, 2 * inputs.div_ceil(*group))
        }
    };
    let words = inputs.div_ceil(per_word);
    let values = Memory::allocate(Element::U32, panels * PANEL * words)?;
    let scales = Memory::allocate(Element::F32, panels * PANEL * per_output)?;
    let (to, factors) = (Shared::<u32>::of(&values), Shared::<f32>::of(&scales));
    cpu.run(outputs * inputs, &|part, parts| {
        let mut room = Room::new(inputs, &rows);
        for at in panels * part / parts..panels * (part + 1) / parts {
            let factors_len = PANEL * per_output;
            // SAFETY: each part has panels of its own, in memory that nobody else has yet.
            let (panel, factors) = unsafe {
                (to.part(at * PANEL * words, PANEL * words), factors.part(at * factors_len, factors_len))
            };
            for (lane, output) in outputs_of(outputs, gated, at).enumerate() {
                room.write(&rows, output, panel, factors, lane);
            }
        }
    });
    Ok(Linear { outputs, inputs, gated, form, values, scales: Some(scales) })
}

/// Room for one row of integers.
struct Room {
    bytes: Vec<i8>,
    values: Vec<u8>,
    scales: Vec<f32>,
    zeros: Vec<u8>,
}

impl Room {
    fn new(inputs: usize, rows: &QuantisedRows<'_>) -> Room {
        let (bytes, values, groups) = match rows {
            QuantisedRows::Int8(_) => (inputs, 0, 0),
            QuantisedRows::Int4 { group, .. } => (0, inputs, inputs.div_ceil(*group)),
        };
        let (scales, zeros) = (vec![0.0; groups], vec![0; groups]);
        Room { bytes: vec![0; bytes], values: vec![0; values], scales, zeros }
    }

    /// Writes one output into its panel and the panel's factors, at its lane of both.
    fn write(
        &mut self,
        rows: &QuantisedRows<'_>,
        output: usize,
        panel: &mut [u32],
        factors: &mut [f32],
        lane: usize,
    ) {
        let (scales, zeros) = (&mut self.scales, &mut self.zeros);
        match rows {
            QuantisedRows::Int8(row) => {
                factors[lane] = row(output, &mut self.bytes);
                for (word, bytes) in self.bytes.chunks(BYTES).enumerate() {
                    let byte = |at: usize| bytes.get(at).map_or(0, |byte| *byte as u8);
                    panel[word * PANEL + lane] = u32::from_le_bytes([byte(0), byte(1), byte(2), byte(3)]);
                }
            }
            QuantisedRows::Int4 { row, .. } => {
                row(output, Int4Row { values: &mut self.values, scales, zeros });
                for (word, nibbles) in self.values.chunks(NIBBLES).enumerate() {
                    let parts =
                        nibbles.iter().enumerate().map(|(at, value)| u32::from(value & 15) << (4 * at));
                    panel[word * PANEL + lane] = parts.sum();
                }
                for (group, (scale, zero)) in scales.iter().zip(zeros).enumerate() {
                    factors[2 * group * PANEL + lane] = *scale;
                    factors[(2 * group + 1) * PANEL + lane] = -f32::from(*zero) * *scale;
                }
            }
        }
    }
}
