//! The arithmetics of products. A [`Form`] multiplies a few rows by one panel, and everything that multiplies is
//! built on that: matrices, attention's scores, attention's values. A sum runs over the inputs in order, whatever
//! the number of rows, so a row has the same bits in every company; between forms bits differ.
//!
//! A panel holds 32 outputs. For each input (f32), or each pair of inputs (bf16), the outputs' weights lie side by
//! side: one vector is one input, or two, of many outputs.

#[cfg(target_arch = "x86_64")]
mod x86;

use std::ops::Range;

use crate::scalar::{Bf16, Scalar};

#[cfg(target_arch = "x86_64")]
pub(super) use x86::{Fused, FusedWide, Paired, Rows, add_products, add_rows};

/// Outputs of a panel.
pub(super) const PANEL: usize = 32;

/// One way to multiply and add.
pub(super) trait Form: Send + Sync + 'static {
    /// What weights and KV are stored as.
    type Stored: Scalar;
    /// What rows are multiplied as.
    type Input: Scalar;
    /// Most rows of one [`Form::tile`].
    const ROWS: usize;
    /// Up to so many rows a tile goes through the panel once, from its beginning to its end.
    const ROWS_AT_ONCE: usize;

    /// Rows of a tile when `left` are left: tiles of about equal height, since low ones are slow.
    #[inline(always)]
    fn rows_next(left: usize) -> usize {
        left.div_ceil(left.div_ceil(Self::ROWS))
    }

    /// Rows as they are multiplied: themselves, or what `widen` makes of them in `room`.
    fn inputs<'a>(
        stored: &'a [Self::Stored],
        room: &'a mut Vec<f32>,
        widen: impl FnOnce(&[Self::Stored], &mut [f32]),
    ) -> &'a [Self::Input];

    /// The product of `sums.len()` rows, of `inputs` elements and `stride` apart, with a panel, added to what is in
    /// `sums` unless it is `fresh`. Fetches meanwhile what comes next.
    ///
    /// # Safety
    /// The machine has the form's instructions; `x` reaches to the end of the last row; the panel holds
    /// [`panel_len`] of `inputs` elements; there are 1 to `ROWS` rows.
    unsafe fn tile(
        x: &[Self::Input],
        stride: usize,
        inputs: usize,
        panel: &[Self::Stored],
        ahead: Ahead,
        fresh: bool,
        sums: &mut [[f32; PANEL]],
    );

    /// Makes a panel of up to 32 rows of `width` elements: they are its outputs. Missing ones keep what is there.
    ///
    /// # Safety
    /// The machine has the form's instructions.
    unsafe fn panel_of_rows(rows: &[Self::Stored], width: usize, ahead: Ahead, panel: &mut [Self::Stored]);

    /// Makes outputs `first..first + 32` of a panel of up to 32 rows of `width` elements: they are its inputs.
    /// Outputs beyond the width and missing rows are set to zero.
    ///
    /// # Safety
    /// The machine has the form's instructions.
    unsafe fn panel_of_columns(
        rows: &[Self::Stored],
        width: usize,
        first: usize,
        ahead: Ahead,
        panel: &mut [Self::Stored],
    );

    /// Whether keys and values of this width may be multiplied as they lie with so many queries: panels cost more than
    /// they save where few queries use them.
    #[inline(always)]
    fn takes_rows(_queries: usize, _width: usize) -> bool {
        false
    }

    /// Sets the products of queries with up to 32 rows, both of `width` elements: those of a query side by side,
    /// `stride` apart from the next one's. The bits are those of [`Form::tile`] with a panel of these rows.
    ///
    /// # Safety
    /// The machine has the form's instructions, and [`Form::takes_rows`].
    unsafe fn products_of_rows(
        _queries: &[Self::Input],
        _width: usize,
        _rows: &[Self::Stored],
        _ahead: Ahead,
        _products: &mut [f32],
        _stride: usize,
    ) {
        unreachable!("takes_rows says that it cannot");
    }

    /// Adds up to 32 rows of `width` elements, each times its weight, to a sum for each query. Weights of a query lie
    /// `x_stride` apart from the next one's, sums `stride`. The bits are those of [`Form::tile`] with panels of these
    /// rows' columns.
    ///
    /// # Safety
    /// As for [`Form::products_of_rows`].
    unsafe fn add_weighted_rows(
        _x: &[Self::Input],
        _x_stride: usize,
        _rows: &[Self::Stored],
        _width: usize,
        _ahead: Ahead,
        _sums: &mut [f32],
        _stride: usize,
    ) {
        unreachable!("takes_rows says that it cannot");
    }
}

/// Cache lines to fetch while something else is multiplied: memory answers late, and the machine's own prefetching
/// stops at the ends of pages and does nothing while a panel is used again.
#[derive(Clone, Copy)]
pub(super) struct Ahead {
    next: *const u8,
    lines: usize,
    /// After so many lines it goes on elsewhere.
    left: usize,
    then: *const u8,
    /// Lines are spread evenly over so many turns of a loop.
    turns: usize,
    credit: usize,
}

/// Bytes of a cache line.
const LINE: usize = 64;
/// Bytes of the smallest page.
const PAGE: usize = 4096;
/// How far ahead of itself a single pass over weights fetches: what it reads while memory answers.
const AHEAD_BYTES: usize = 6144;

impl Ahead {
    /// Nothing.
    pub(super) const NONE: Ahead = Ahead {
        next: std::ptr::null(),
        lines: 0,
        left: usize::MAX,
        then: std::ptr::null(),
        turns: 1,
        credit: 0,
    };

    /// Keys and values, one after the other as they lie in memory.
    pub(super) fn both<T>((keys, values): (&[T], &[T])) -> Ahead {
        let left = size_of_val(keys) / LINE;
        let lines = left + size_of_val(values) / LINE;
        Ahead { next: keys.as_ptr().cast(), lines, left, then: values.as_ptr().cast(), ..Ahead::NONE }
    }

    /// The share `part` of `parts` of something.
    pub(super) fn share<T>(of: &[T], part: usize, parts: usize) -> Ahead {
        let lines = size_of_val(of) / LINE;
        let (begin, end) = (lines * part / parts, lines * (part + 1) / parts);
        Ahead { next: of.as_ptr().cast::<u8>().wrapping_add(begin * LINE), lines: end - begin, ..Ahead::NONE }
    }

    /// Has the machine find keys and values in its page tables.
    #[inline(always)]
    pub(super) fn find<T>((keys, values): (&[T], &[T])) {
        for rows in [keys, values] {
            for at in (0..size_of_val(rows)).step_by(PAGE) {
                prefetch(rows.as_ptr().cast::<u8>().wrapping_add(at));
            }
        }
    }

    /// What a single pass over `panel` will come to soon.
    pub(super) fn soon<T>(panel: &[T]) -> Ahead {
        let next = panel.as_ptr().cast::<u8>().wrapping_add(AHEAD_BYTES);
        Ahead { next, lines: size_of_val(panel) / LINE, ..Ahead::NONE }
    }

    /// The share of some rows, of `all`, of what lies behind `panel` and is as long.
    pub(super) fn following<T>(panel: &[T], rows: Range<usize>, all: usize) -> Ahead {
        let lines = size_of_val(panel) / LINE;
        let (begin, end) = (lines * rows.start / all, lines * rows.end / all);
        let next = panel.as_ptr_range().end.cast::<u8>().wrapping_add(begin * LINE);
        Ahead { next, lines: end - begin, ..Ahead::NONE }
    }

    #[cfg(target_arch = "x86_64")]
    pub(super) fn in_two(self) -> [Ahead; 2] {
        let first = self.lines / 2;
        let second = self.next.wrapping_add(first * LINE);
        [Ahead { lines: first, ..self }, Ahead { next: second, lines: self.lines - first, ..self }]
    }

    #[cfg(target_arch = "x86_64")]
    pub(super) fn over(self, turns: usize) -> Ahead {
        Ahead { turns: turns.max(1), ..self }
    }

    /// Fetches one turn's share.
    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    pub(super) fn fetch_next(&mut self) {
        self.credit += self.lines;
        while self.credit >= self.turns {
            self.credit -= self.turns;
            prefetch(self.next);
            self.left = self.left.wrapping_sub(1);
            self.next = if self.left == 0 { self.then } else { self.next.wrapping_add(LINE) };
        }
    }
}

/// Has a cache line fetched. A hint: an address that is not mapped does nothing.
#[inline(always)]
fn prefetch(line: *const u8) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: every x86-64 has the instruction, and it reads nothing.
    unsafe {
        std::arch::x86_64::_mm_prefetch::<{ std::arch::x86_64::_MM_HINT_T0 }>(line.cast());
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = line;
}

/// Inputs that lie together in a panel of `T`.
pub(super) const fn together<T: Scalar>() -> usize {
    4 / size_of::<T>()
}

/// Elements of a panel of `inputs` inputs.
pub(super) fn panel_len<T: Scalar>(inputs: usize) -> usize {
    PANEL * inputs.next_multiple_of(together::<T>())
}

/// Where input `input` of the panel's output `lane` lies.
#[inline(always)]
pub(super) fn place_in_panel<T: Scalar>(input: usize, lane: usize) -> usize {
    let together = together::<T>();
    (input / together * PANEL + lane) * together + input % together
}

/// Checks [`Form::tile`]'s bounds.
#[inline(always)]
fn check<F: Form>(x: &[F::Input], stride: usize, inputs: usize, panel: &[F::Stored], rows: usize) {
    assert!((1..=F::ROWS).contains(&rows), "{rows} rows of at most {}", F::ROWS);
    assert!(x.len() >= (rows - 1) * stride + inputs, "{rows} rows in {} elements", x.len());
    assert!(panel.len() >= panel_len::<F::Stored>(inputs), "{inputs} inputs in {} weights", panel.len());
}

/// Float32: a product, then an addition. The same bits on every machine.
pub(super) struct Exact;

impl Form for Exact {
    type Stored = f32;
    type Input = f32;
    const ROWS: usize = 4;
    const ROWS_AT_ONCE: usize = 0;

    fn inputs<'a>(stored: &'a [f32], _: &'a mut Vec<f32>, _: impl FnOnce(&[f32], &mut [f32])) -> &'a [f32] {
        stored
    }

    #[inline(always)]
    unsafe fn tile(
        x: &[f32],
        stride: usize,
        inputs: usize,
        panel: &[f32],
        _: Ahead,
        fresh: bool,
        sums: &mut [[f32; PANEL]],
    ) {
        check::<Exact>(x, stride, inputs, panel, sums.len());
        if fresh {
            sums.fill([0.0; PANEL]);
        }
        let panel = &panel[..inputs * PANEL];
        if let Ok(sums) = <&mut [_; 4]>::try_from(&mut *sums) {
            return exact(x, stride, panel, sums);
        }
        for (row, sums) in sums.iter_mut().enumerate() {
            exact(&x[row * stride..], stride, panel, std::array::from_mut(sums));
        }
    }

    #[inline(always)]
    unsafe fn panel_of_rows(rows: &[f32], width: usize, _: Ahead, panel: &mut [f32]) {
        scatter(rows, width, panel);
    }

    #[inline(always)]
    unsafe fn panel_of_columns(rows: &[f32], width: usize, first: usize, _: Ahead, panel: &mut [f32]) {
        gather(rows, width, first, panel);
    }
}

/// Half of the outputs at a time: so many sums fit the registers.
#[inline(always)]
fn exact<const R: usize>(x: &[f32], stride: usize, panel: &[f32], sums: &mut [[f32; PANEL]; R]) {
    const HALF: usize = PANEL / 2;
    for first in [0, HALF] {
        let mut now: [[f32; HALF]; R] = std::array::from_fn(|r| std::array::from_fn(|j| sums[r][first + j]));
        for (k, weights) in panel.chunks_exact(PANEL).enumerate() {
            let weights: &[f32; HALF] = weights[first..first + HALF].try_into().expect("half a panel");
            for r in 0..R {
                let value = x[r * stride + k];
                for j in 0..HALF {
                    now[r][j] += value * weights[j];
                }
            }
        }
        for r in 0..R {
            sums[r][first..first + HALF].copy_from_slice(&now[r]);
        }
    }
}

/// bf16 without special instructions: widened, then a product and an addition each.
pub(super) struct Widened;

impl Form for Widened {
    type Stored = Bf16;
    type Input = f32;
    const ROWS: usize = 2;
    const ROWS_AT_ONCE: usize = 0;

    fn inputs<'a>(
        stored: &'a [Bf16],
        room: &'a mut Vec<f32>,
        widen: impl FnOnce(&[Bf16], &mut [f32]),
    ) -> &'a [f32] {
        widened_inputs(stored, room, widen)
    }

    #[inline(always)]
    unsafe fn tile(
        x: &[f32],
        stride: usize,
        inputs: usize,
        panel: &[Bf16],
        _: Ahead,
        fresh: bool,
        sums: &mut [[f32; PANEL]],
    ) {
        check::<Widened>(x, stride, inputs, panel, sums.len());
        if fresh {
            sums.fill([0.0; PANEL]);
        }
        let panel = &panel[..panel_len::<Bf16>(inputs)];
        match sums {
            [one] => widened(x, stride, inputs, panel, std::array::from_mut(one)),
            _ => widened::<2>(x, stride, inputs, panel, sums.try_into().expect("two rows")),
        }
    }

    #[inline(always)]
    unsafe fn panel_of_rows(rows: &[Bf16], width: usize, _: Ahead, panel: &mut [Bf16]) {
        scatter(rows, width, panel);
    }

    #[inline(always)]
    unsafe fn panel_of_columns(rows: &[Bf16], width: usize, first: usize, _: Ahead, panel: &mut [Bf16]) {
        gather(rows, width, first, panel);
    }
}

#[inline(always)]
fn widened<const R: usize>(
    x: &[f32],
    stride: usize,
    inputs: usize,
    panel: &[Bf16],
    sums: &mut [[f32; PANEL]; R],
) {
    const HALF: usize = PANEL / 2;
    for first in [0, HALF] {
        let mut now: [[f32; HALF]; R] = std::array::from_fn(|r| std::array::from_fn(|j| sums[r][first + j]));
        for (pair, weights) in panel.chunks_exact(2 * PANEL).enumerate() {
            let weights: &[Bf16; 2 * HALF] =
                weights[2 * first..2 * (first + HALF)].try_into().expect("half a panel");
            for within in 0..2.min(inputs - 2 * pair) {
                let wide: [f32; HALF] = std::array::from_fn(|j| weights[2 * j + within].load());
                for r in 0..R {
                    let value = x[r * stride + 2 * pair + within];
                    for j in 0..HALF {
                        now[r][j] += value * wide[j];
                    }
                }
            }
        }
        for r in 0..R {
            sums[r][first..first + HALF].copy_from_slice(&now[r]);
        }
    }
}

/// [`Form::inputs`] of forms that multiply in float32.
fn widened_inputs<'a>(
    stored: &[Bf16],
    room: &'a mut Vec<f32>,
    widen: impl FnOnce(&[Bf16], &mut [f32]),
) -> &'a [f32] {
    if room.len() < stored.len() {
        room.resize(stored.len(), 0.0);
    }
    let room = &mut room[..stored.len()];
    widen(stored, room);
    room
}

/// [`Form::panel_of_rows`], plainly.
#[inline(always)]
fn scatter<T: Scalar>(rows: &[T], width: usize, panel: &mut [T]) {
    for (lane, row) in rows.chunks_exact(width).enumerate() {
        for (input, value) in row.iter().enumerate() {
            panel[place_in_panel::<T>(input, lane)] = *value;
        }
    }
}

/// [`Form::panel_of_columns`], plainly.
#[inline(always)]
fn gather<T: Scalar>(rows: &[T], width: usize, first: usize, panel: &mut [T]) {
    let together = together::<T>();
    let lanes = PANEL.min(width - first);
    let mut rows = rows.chunks(together * width);
    for panel in panel.chunks_exact_mut(together * PANEL) {
        panel.fill(T::store(0.0));
        for (within, row) in rows.next().unwrap_or(&[]).chunks_exact(width).enumerate() {
            for (lane, value) in row[first..first + lanes].iter().enumerate() {
                panel[lane * together + within] = *value;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::Isa;

    fn numbers(count: usize) -> Vec<Bf16> {
        (0..count).map(|at| Bf16(at as u16 + 1)).collect()
    }

    fn panels<F: Form<Stored = Bf16>>(rows: &[Bf16], width: usize) -> [Vec<Bf16>; 2] {
        let mut of_rows = vec![Bf16(0); panel_len::<Bf16>(width)];
        let mut of_columns = vec![Bf16(9); PANEL * PANEL];
        // SAFETY: called for forms whose instructions are there.
        unsafe {
            F::panel_of_rows(rows, width, Ahead::NONE, &mut of_rows);
            F::panel_of_columns(rows, width, (width - 1) / PANEL * PANEL, Ahead::NONE, &mut of_columns);
        }
        [of_rows, of_columns]
    }

    proptest! {
        #[test]
        fn panels_are_the_same_whoever_makes_them(count in 1_usize..33, half in 1_usize..70, whole: bool) {
            let (count, width) = if whole { (32, half.next_multiple_of(16)) } else { (count, 2 * half) };
            let rows = numbers(count * width);
            let plain = panels::<Widened>(&rows, width);
            #[cfg(target_arch = "x86_64")]
            {
                prop_assert!(!Isa::Avx2.available() || panels::<Fused>(&rows, width) == plain);
                prop_assert!(!Isa::Avx512Fma.available() || panels::<FusedWide>(&rows, width) == plain);
                prop_assert!(!Isa::Avx512.available() || panels::<Paired>(&rows, width) == plain);
            }
            for input in 0..width {
                prop_assert_eq!(plain[0][place_in_panel::<Bf16>(input, count - 1)], rows[(count - 1) * width + input]);
            }
            let (first, last) = ((width - 1) / PANEL * PANEL, width - 1);
            let place = place_in_panel::<Bf16>(count - 1, last - first);
            prop_assert_eq!(plain[1][place], rows[(count - 1) * width + last]);
            prop_assert_eq!(plain[1].iter().filter(|value| value.0 != 0).count(), count * (width - first));
        }
    }
}
