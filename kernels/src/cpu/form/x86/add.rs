//! The innermost step of the AVX-512 forms: a word of a row, spread over a vector, times two vectors of weights, added to
//! two vectors of sums. In assembly, for two reasons. The compiler would load the words of all rows before it multiplies
//! any of them, and the sums would no longer fit the registers. And it would compute the address of each word, on units
//! that Intel's cores multiply with: with addresses that need nothing computed a tile of 12 rows goes 1.4 times as fast.

/// Adds to two vectors the products of a word with two vectors. The word is at `$at`, or `$times` steps behind it, and
/// `$bytes` further.
///
/// Safety: the word may be read for 32 bits, at any alignment; the machine has the instruction.
macro_rules! add_products {
    ($instruction:literal, [$at:expr; $bytes:literal], $weights:expr, $sums:expr) => {{
        let ([first, second], [weights_first, weights_second]) = (&mut $sums, $weights);
        std::arch::asm!(
            concat!("vpbroadcastd {x:z}, dword ptr [{at} + ", $bytes, "]"),
            concat!($instruction, " {first}, {x:z}, {weights_first}"),
            concat!($instruction, " {second}, {x:z}, {weights_second}"),
            x = out(zmm_reg) _,
            at = in(reg) $at,
            first = inout(zmm_reg) *first,
            second = inout(zmm_reg) *second,
            weights_first = in(zmm_reg) weights_first,
            weights_second = in(zmm_reg) weights_second,
            options(pure, readonly, nostack, preserves_flags)
        )
    }};
    ($instruction:literal, [$at:expr, $times:literal $step:expr; $bytes:literal], $weights:expr, $sums:expr) => {{
        let ([first, second], [weights_first, weights_second]) = (&mut $sums, $weights);
        std::arch::asm!(
            concat!("vpbroadcastd {x:z}, dword ptr [{at} + ", $times, "*{step} + ", $bytes, "]"),
            concat!($instruction, " {first}, {x:z}, {weights_first}"),
            concat!($instruction, " {second}, {x:z}, {weights_second}"),
            x = out(zmm_reg) _,
            at = in(reg) $at,
            step = in(reg) $step,
            first = inout(zmm_reg) *first,
            second = inout(zmm_reg) *second,
            weights_first = in(zmm_reg) weights_first,
            weights_second = in(zmm_reg) weights_second,
            options(pure, readonly, nostack, preserves_flags)
        )
    }};
}

/// [`add_products`] for each of `$count` rows, at most 14, of [`Rows`].
///
/// Safety: as there, for the word `$bytes` further in every row.
macro_rules! add_rows {
    ($instruction:literal, $count:expr, $rows:expr, $bytes:literal, $weights:expr, $sums:expr) => {{
        let $crate::cpu::form::Rows { first, eighth, steps: [one, three, five] } = $rows;
        add_rows!($instruction, $count, 0, [first, one, three, five], $bytes, $weights, $sums);
        add_rows!($instruction, $count, 7, [eighth, one, three, five], $bytes, $weights, $sums);
    }};
    (
        $instruction:literal, $count:expr, $from:literal, [$at:ident, $one:ident, $three:ident, $five:ident],
        $bytes:literal, $weights:expr, $sums:expr
    ) => {{
        use $crate::cpu::form::add_products;
        if $count > $from {
            add_products!($instruction, [$at; $bytes], $weights, $sums[$from]);
        }
        if $count > $from + 1 {
            add_products!($instruction, [$at, "1" $one; $bytes], $weights, $sums[$from + 1]);
        }
        if $count > $from + 2 {
            add_products!($instruction, [$at, "2" $one; $bytes], $weights, $sums[$from + 2]);
        }
        if $count > $from + 3 {
            add_products!($instruction, [$at, "1" $three; $bytes], $weights, $sums[$from + 3]);
        }
        if $count > $from + 4 {
            add_products!($instruction, [$at, "4" $one; $bytes], $weights, $sums[$from + 4]);
        }
        if $count > $from + 5 {
            add_products!($instruction, [$at, "1" $five; $bytes], $weights, $sums[$from + 5]);
        }
        if $count > $from + 6 {
            add_products!($instruction, [$at, "2" $three; $bytes], $weights, $sums[$from + 6]);
        }
    }};
}

pub(in super::super::super) use {add_products, add_rows};

/// Where the next words of up to 14 rows lie.
#[derive(Clone, Copy)]
pub(in super::super::super) struct Rows {
    pub(in super::super::super) first: *const u8,
    /// Of the row after seven. It means nothing where there are fewer.
    pub(in super::super::super) eighth: *const u8,
    /// Bytes from a row to the next, to the third and to the fifth after it.
    pub(in super::super::super) steps: [usize; 3],
}

impl Rows {
    /// Rows that lie `stride` elements apart.
    #[inline(always)]
    pub(in super::super::super) fn new<T>(x: *const T, stride: usize) -> Rows {
        let (first, step) = (x.cast::<u8>(), stride * size_of::<T>());
        Rows { first, eighth: first.wrapping_add(7 * step), steps: [step, 3 * step, 5 * step] }
    }

    /// So many bytes further.
    #[inline(always)]
    pub(in super::super::super) fn advance(&mut self, bytes: usize) {
        self.first = self.first.wrapping_add(bytes);
        self.eighth = self.eighth.wrapping_add(bytes);
    }
}
