//! What a compute device offers: some twenty fused operations on device buffers, and copies.
//!
//! Never knows: architectures, checkpoints, sequences, sampling policies of clients, instruction sets. There is
//! no tensor algebra here and no way for the host to look into device memory except by a copy.
//!
//! Always holds: buffers are handles; work on one [`Stream`] happens in the order of the calls; every value that
//! changes from step to step (token ids, positions, page tables, counts) lies in a device buffer, so that a step
//! could be captured once and replayed; an operation's result for one row does not depend on the other rows.

mod buffer;
mod operations;

use std::sync::Arc;

use tandem_memory::Region;

pub use buffer::{Buffer, Element};
pub use operations::{
    Attention, Edits, Embed, Epilogue, KvLayer, KvPages, LinearCall, Logits, Norm, Penalties, QkvStore,
    Rotations, SampleCall, SampleRow, SamplingFlags, Sequences, StepRows, TOKEN_PREVIOUS, TOP_LOGPROBS_MAX,
    Tally,
};

/// Elements of a head at most; every device takes all even sizes up to it.
pub const HEAD_WIDTH_MAX: usize = 256;

/// A device: gives memory, packs weights, opens streams.
///
/// Two implementations: the CPU kernels, and their plain float32 twin that serves as oracle. A clone of the
/// `Arc` keeps the device alive; buffers keep their own memory alive.
pub trait Device: Send + Sync {
    /// What it is and which kernels it chose, for logs: `cpu-avx512`.
    fn name(&self) -> &str;

    /// The numerics class: devices with equal classes give equal bits.
    fn numerics(&self, element: Element) -> String;

    /// Memory for `len` elements, zeroed.
    fn allocate(&self, element: Element, len: usize) -> Result<Buffer, Error>;

    /// A region as one buffer. The region stays mapped as long as the buffer lives.
    fn map(&self, region: Arc<Region>, element: Element) -> Result<Buffer, Error>;

    /// Brings a weight matrix into the device's packed form, for good.
    fn pack(&self, matrix: Matrix<'_>) -> Result<Linear, Error>;

    /// Brings a quantised weight matrix into the device's packed form, for good.
    fn pack_quantised(&self, matrix: QuantisedMatrix<'_>) -> Result<Linear, Error>;

    /// A new queue of work. Streams of one device may share its threads.
    fn stream(&self) -> Box<dyn Stream>;
}

/// A weight matrix on its way to the device: row `r` computes output `r`.
pub struct Matrix<'a> {
    /// Rows.
    pub outputs: usize,
    /// Columns.
    pub inputs: usize,
    /// Element type to store.
    pub element: Element,
    /// The rows are two halves, gate over up, and will be used with [`Epilogue::Gate`].
    pub gated: bool,
    /// The bytes of a row, little-endian, where it is of the element type already.
    pub bytes: &'a (dyn Fn(usize) -> Option<&'a [u8]> + Sync),
    /// Fills in one row. Called once per row that gave no bytes, in any order, by several threads.
    pub row: &'a (dyn Fn(usize, &mut [f32]) + Sync),
}

/// A quantised weight matrix on its way to the device: row `r` computes output `r`.
pub struct QuantisedMatrix<'a> {
    /// Rows.
    pub outputs: usize,
    /// Columns.
    pub inputs: usize,
    /// The rows are two halves, gate over up, and will be used with [`Epilogue::Gate`].
    pub gated: bool,
    /// What fills in the rows.
    pub rows: QuantisedRows<'a>,
}

/// What fills in the rows of a quantised matrix; each is called once per row, in any order, by several threads.
pub enum QuantisedRows<'a> {
    /// 8-bit integers; the row's scale comes back. The product quantises its own rows alike when it is computed: each
    /// by its largest magnitude, over 127.
    Int8(&'a (dyn Fn(usize, &mut [i8]) -> f32 + Sync)),
    /// 4-bit integers; the product takes its own rows as they are.
    Int4 {
        /// Inputs of a group, a multiple of 8; the last group may have fewer.
        group: usize,
        /// Fills in a row: `value = (values[input] - zeros[group]) * scales[group]`.
        row: &'a (dyn Fn(usize, Int4Row<'_>) + Sync),
    },
}

/// One row of 4-bit integers in groups.
pub struct Int4Row<'a> {
    /// One per input, 0 to 15.
    pub values: &'a mut [u8],
    /// One per group.
    pub scales: &'a mut [f32],
    /// One per group, 0 to 16.
    pub zeros: &'a mut [u8],
}

/// Inputs that a matrix of 8-bit integers may have: sums of so many products fit 32 bits.
pub const INT8_INPUTS_MAX: usize = 1 << 16;

/// What a packed matrix holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LinearForm {
    /// Numbers of the element type of `values`.
    Numbers,
    /// 8-bit integers with a scale per output.
    Int8,
    /// 4-bit integers.
    Int4 {
        /// Inputs of a group.
        group: usize,
    },
}

/// A packed weight matrix. Its form is the device's business; checkpoint formats end before it.
#[derive(Clone)]
pub struct Linear {
    /// Rows of the matrix it was packed from.
    pub outputs: usize,
    /// Columns.
    pub inputs: usize,
    /// Whether it was packed for [`Epilogue::Gate`].
    pub gated: bool,
    /// What it holds.
    pub form: LinearForm,
    /// The packed values.
    pub values: Buffer,
    /// The scales of a quantised one.
    pub scales: Option<Buffer>,
}

/// A queue of work on a device: calls return before the work is done (the CPU may do it at once), and the work
/// happens in the order of the calls.
///
/// Contract of every operation: shapes agree with the buffers' lengths and elements (a mismatch is a bug and
/// panics in the calling thread); outputs do not overlap inputs unless the operation says so; index values (token
/// ids, pages, slots) are in range, which the caller has checked before it copied them to the device. Rows are
/// counted by the call, at most as many as the buffers hold; with captured graphs the calls will be made for a
/// bucket of rows, and the unused ones carry the dummy page and slot of the caller's choice.
///
/// Operations that come with the models and machines that need them, each one more method with its argument in
/// `operations` and its twin: latent attention (beside `attention`), `route` and the expert feed-forward (in place
/// of the two products around a gate), conversion of pages between forms (beside `copy_pages`), collectives (after
/// `linear`, ordered by the same stream).
pub trait Stream: Send {
    /// Copies from the host to the start of `to`. `bytes` may be reused on return.
    fn upload(&mut self, to: &Buffer, bytes: &[u8]);

    /// Begins to copy a buffer to the host.
    fn download(&mut self, from: &Buffer) -> Box<dyn Download>;

    /// Copies between buffers of one element type and length.
    fn copy(&mut self, from: &Buffer, to: &Buffer);

    /// Sets a buffer to zero.
    fn zero(&mut self, buffer: &Buffer);

    /// Rows of the embedding table by token id.
    fn embed(&mut self, call: Embed<'_>);

    /// Cosines and sines of the step's positions, used by every layer.
    fn rotations(&mut self, call: Rotations<'_>);

    /// Adds (where asked) and normalises by the root of the mean square.
    fn norm(&mut self, call: Norm<'_>);

    /// A matrix product with bias and an epilogue.
    fn linear(&mut self, call: LinearCall<'_>);

    /// Splits the fused projection, normalises heads (where asked), rotates queries and keys, stores keys and
    /// values into pages.
    fn qkv_store(&mut self, call: QkvStore<'_>);

    /// Attention of each row to all tokens of its sequence up to itself.
    fn attention(&mut self, call: Attention<'_>);

    /// Copies the named rows together: `to[i] = from[rows[i]]`, rows of `width` elements.
    fn gather_rows(&mut self, from: &Buffer, rows: &Buffer, count: usize, width: usize, to: &Buffer);

    /// Scores of the whole vocabulary, float32.
    fn logits(&mut self, call: Logits<'_>);

    /// Rebuilds a slot's token counts for the penalties.
    fn tally(&mut self, call: Tally<'_>);

    /// Bias, masks and penalties: from raw to adjusted logits.
    fn penalties(&mut self, call: Penalties<'_>);

    /// Draws one token per row and remembers it for its slot.
    fn sample(&mut self, call: SampleCall<'_>);

    /// Copies whole pages: pairs (from, to) as u32 in `pairs`.
    fn copy_pages(&mut self, pages: &KvPages, pairs: &Buffer, count: usize);

    /// Zeroes the rows of one page from `first_row` on, in every layer and head.
    fn zero_rows(&mut self, pages: &KvPages, page: u32, first_row: u32);
}

/// A copy to the host under way. Dropping it forgets the bytes.
pub trait Download: Send {
    /// Whether the bytes are there.
    fn ready(&self) -> bool;

    /// The bytes; waits for them. An error of any earlier work on the stream shows here.
    fn take(self: Box<Self>) -> Result<Vec<u8>, Error>;
}

/// What a device can refuse.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No memory of that size.
    #[error("the device has no room for {bytes} bytes: {reason}")]
    Memory {
        /// Bytes asked for.
        bytes: usize,
        /// What the system said.
        reason: String,
    },
    /// An option it does not have.
    #[error("{0}")]
    Unsupported(String),
    /// Work on a stream failed.
    #[error("device work failed: {0}")]
    Failed(String),
}
