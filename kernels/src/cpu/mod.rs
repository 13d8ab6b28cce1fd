//! The CPU as a device: work happens at once, in the calling thread and the pool's.

#![allow(
    clippy::needless_range_loop,
    reason = "loops over lanes by index read like the arithmetic, and vectorise"
)]

mod attention;
mod factor;
mod form;
mod isa;
mod linear;
mod pack;
mod pages;
mod pool;
mod products;
mod rows;
mod sample;
mod shares;

use std::sync::{Arc, Mutex, PoisonError};

use tandem_device::{
    Attention, Buffer, Device, Download, Element, Embed, Error, HEAD_WIDTH_MAX, KvPages, Linear, LinearCall,
    LinearForm, Logits, Matrix, Norm, Penalties, QkvStore, QuantisedMatrix, Rotations, SampleCall, SampleRow,
    Stream, Tally,
};
use tandem_memory::Region;

use attention::Rooms;
use form::Form;
pub use isa::Isa;
pub(crate) use pages::Pages;
use pool::Pool;
use shares::Shares;

use crate::memory::{Memory, Shared, slice, slice_mut};
use crate::scalar::{Bf16, Scalar};

/// Below this much work (multiplications, roughly) a fork costs more than it saves.
const FORK_WORK: usize = 1 << 15;

/// The CPU. Clones and streams share its threads.
#[derive(Clone)]
pub struct Cpu {
    isa: Isa,
    name: String,
    threads: usize,
    pool: Arc<Mutex<Pool>>,
}

impl Cpu {
    /// The CPU with so many threads, the caller's included, and the instruction set that the environment variable
    /// `TANDEM_CPU` names (`portable`, `avx2`, `avx512-fma`, `avx512`), else the fastest that this machine has.
    pub fn open(threads: usize) -> Result<Cpu, Error> {
        let forced = std::env::var("TANDEM_CPU").ok().filter(|name| !name.is_empty());
        Cpu::with(Isa::choose(forced.as_deref())?, threads)
    }

    /// The CPU with a chosen instruction set.
    pub fn with(isa: Isa, threads: usize) -> Result<Cpu, Error> {
        if !isa.available() {
            return Err(Error::Unsupported(format!("{}: this machine does not have it", isa.as_str())));
        }
        if threads == 0 {
            return Err(Error::Unsupported("0 threads cannot compute; expected at least 1".to_owned()));
        }
        let pool = Pool::new(threads)
            .map_err(|error| Error::Unsupported(format!("cannot start {threads} threads: {error}")))?;
        Ok(Cpu { isa, name: format!("cpu-{}", isa.as_str()), threads, pool: Arc::new(Mutex::new(pool)) })
    }

    /// Runs a job in parts: all threads when there is enough work, else here alone. Parts never share a sum, so
    /// their number changes no bit.
    fn run(&self, work: usize, job: &(dyn Fn(usize, usize) + Sync)) {
        // A part that panicked left nothing half-done in the pool itself.
        let mut pool = self.pool.lock().unwrap_or_else(PoisonError::into_inner);
        let parts = pool.threads();
        if parts == 1 || work < FORK_WORK {
            return job(0, 1);
        }
        pool.run(&|part| job(part, parts));
    }
}

impl Device for Cpu {
    fn name(&self) -> &str {
        &self.name
    }

    // In float32 all instruction sets give the same bits; in bf16 each has a form of its own. The number counts
    // changes of the arithmetic.
    fn numerics(&self, element: Element) -> String {
        match element {
            Element::Bf16 => format!("{}-3-bf16", self.name),
            _ => format!("cpu-2-{}", element.as_str()),
        }
    }

    fn allocate(&self, element: Element, len: usize) -> Result<Buffer, Error> {
        Memory::allocate(element, len)
    }

    fn map(&self, region: Arc<Region>, element: Element) -> Result<Buffer, Error> {
        let len = region.len() / element.bytes();
        Memory::map(region, element, len)
    }

    fn pack(&self, matrix: Matrix<'_>) -> Result<Linear, Error> {
        match matrix.element {
            Element::F32 => pack::numbers::<f32>(self, matrix),
            Element::Bf16 => pack::numbers::<Bf16>(self, matrix),
            Element::U32 => Err(Error::Unsupported("weights are f32 or bf16".to_owned())),
        }
    }

    fn pack_quantised(&self, matrix: QuantisedMatrix<'_>) -> Result<Linear, Error> {
        pack::integers(self, matrix)
    }

    fn stream(&self) -> Box<dyn Stream> {
        Box::new(CpuStream {
            cpu: self.clone(),
            wide: Vec::new(),
            narrow: Vec::new(),
            rooms: Rooms::new(self.threads),
        })
    }
}

struct CpuStream {
    cpu: Cpu,
    /// Room for a product's rows in float32, or partial results of attention; kept to save allocating.
    wide: Vec<f32>,
    /// Room for a product's rows in 8-bit integers.
    narrow: Vec<u32>,
    rooms: Rooms,
}

/// Calls a method for the form that a buffer's element type has on the stream's instruction set.
macro_rules! by_form {
    ($buffer:expr, $self:ident.$method:ident($($argument:expr),*)) => {
        match ($buffer.element(), $self.cpu.isa) {
            (Element::F32, _) => $self.$method::<form::Exact>($($argument),*),
            #[cfg(target_arch = "x86_64")]
            (Element::Bf16, Isa::Avx2) => $self.$method::<form::Fused>($($argument),*),
            #[cfg(target_arch = "x86_64")]
            (Element::Bf16, Isa::Avx512Fma) => $self.$method::<form::FusedWide>($($argument),*),
            #[cfg(target_arch = "x86_64")]
            (Element::Bf16, Isa::Avx512) => $self.$method::<form::Paired>($($argument),*),
            (Element::Bf16, _) => $self.$method::<form::Widened>($($argument),*),
            (Element::U32, _) => panic!("numbers are f32 or bf16, not u32"),
        }
    };
}

/// Calls a method for the element type that a buffer has.
macro_rules! by_element {
    ($buffer:expr, $self:ident.$method:ident($($argument:expr),*)) => {
        match $buffer.element() {
            Element::F32 => $self.$method::<f32>($($argument),*),
            Element::Bf16 => $self.$method::<Bf16>($($argument),*),
            Element::U32 => panic!("numbers are f32 or bf16, not u32"),
        }
    };
}

impl CpuStream {
    fn embed_as<T: Scalar>(&mut self, call: Embed<'_>) {
        let count = call.rows.count;
        expect(call.to, count * call.table.inputs);
        // SAFETY: (that of all slices in this and the following methods) by the stream's contract nothing else
        // touches the call's buffers while it runs, and outputs do not overlap inputs.
        let job = unsafe {
            rows::Embed::<T> {
                table: call.table,
                panels: Shared::of(&call.table.values),
                tokens: &slice(call.tokens)[..count],
                sequences: &slice(call.rows.sequences)[..count],
                slots: slice(call.slots),
                previous: slice(call.previous),
                to: Shared::of(call.to),
            }
        };
        self.cpu.run(count * call.table.inputs, &|part, parts| rows::embed(&job, part, parts));
    }

    fn norm_as<T: Scalar>(&mut self, call: Norm<'_>) {
        let (count, width) = (call.count, call.weight.len());
        expect(call.x, count * width);
        expect(call.to, count * width);
        let isa = self.cpu.isa;
        // SAFETY: as in `embed_as`.
        let job = unsafe {
            rows::Norm::<T> {
                x: Shared::of(call.x),
                add: call.add.map(|add| &slice(add)[..count * width]),
                weight: slice(call.weight),
                epsilon: call.epsilon,
                count,
                to: Shared::of(call.to),
            }
        };
        self.cpu.run(count * width * 4, &|part, parts| rows::norm(isa, &job, part, parts));
    }

    fn qkv_store_as<T: Scalar>(&mut self, call: QkvStore<'_>) {
        let count = call.rows.count;
        let pages = call.kv.pages;
        check_heads(call.heads, pages);
        assert!(2 * call.pairs <= pages.width, "{} pairs in a head of {}", call.pairs, pages.width);
        expect(call.qkv, count * (call.heads + 2 * pages.heads) * pages.width);
        expect(call.queries, count * call.heads * pages.width);
        expect(call.rotations, count * 2 * call.pairs);
        for norm in [call.query_norm, call.key_norm].into_iter().flatten() {
            expect(norm, pages.width);
        }
        let isa = self.cpu.isa;
        // SAFETY: as in `embed_as`.
        let job = unsafe {
            rows::QkvStore::<T> {
                qkv: slice(call.qkv),
                positions: &slice(call.rows.positions)[..count],
                sequences: &slice(call.rows.sequences)[..count],
                heads: call.heads,
                query_norm: call.query_norm.map(|norm| slice(norm)),
                key_norm: call.key_norm.map(|norm| slice(norm)),
                epsilon: call.epsilon,
                rotations: slice(call.rotations),
                pairs: call.pairs,
                pages: Pages::of(call.kv, call.sequences),
                queries: Shared::of(call.queries),
            }
        };
        self.cpu.run(count * call.heads * pages.width * 8, &|part, parts| {
            rows::qkv_store(isa, &job, part, parts);
        });
    }

    fn attention_as<F: Form>(&mut self, call: Attention<'_>) {
        let count = call.rows.count;
        let pages = call.kv.pages;
        check_heads(call.heads, pages);
        assert!(pages.tokens.is_multiple_of(form::PANEL), "panels end with pages of {} tokens", pages.tokens);
        expect(call.queries, count * call.heads * pages.width);
        expect(call.to, count * call.heads * pages.width);
        let isa = self.cpu.isa;
        // SAFETY: as in `embed_as`.
        let (positions, sequences) =
            unsafe { (&slice(call.rows.positions)[..count], &slice(call.rows.sequences)[..count]) };
        let parts = self.rooms.parts();
        let group = call.heads / pages.heads;
        let together = if F::takes_rows(group, pages.width) { attention::TOGETHER } else { 1 };
        let plan = attention::Plan::new(positions, sequences, group, pages.heads, together, parts);
        let mut partials = std::mem::take(&mut self.wide);
        let len = plan.partials * attention::partial_len(pages.width);
        if partials.len() < len {
            partials.resize(len, 0.0);
        }
        let rooms = self.rooms.of::<F>();
        // SAFETY: as in `embed_as`.
        let job = unsafe {
            attention::Attention::<F> {
                queries: slice(call.queries),
                positions,
                sequences,
                heads: call.heads,
                scale: call.scale,
                pages: Pages::of(call.kv, call.sequences),
                plan: &plan,
                shares: &Shares::new(parts),
                rooms,
                partials: Shared::over(&mut partials),
                to: Shared::of(call.to),
            }
        };
        let tokens: usize = positions.iter().map(|position| *position as usize + 1).sum();
        self.cpu.run(tokens * call.heads * pages.width * 2, &|part, parts| {
            attention::attention(isa, &job, part, parts);
        });
        if plan.partials > 0 {
            self.cpu.run(len, &|part, parts| attention::merge_spans(isa, &job, part, parts));
        }
        self.wide = partials;
    }

    fn zero_rows_as<T: Scalar>(&mut self, pages: &KvPages, page: u32, first_row: u32) {
        let all = Shared::<T>::of(&pages.memory);
        let half = pages.tokens * pages.width;
        let skip = (first_row as usize).min(pages.tokens) * pages.width;
        for head in 0..pages.layers * pages.heads * 2 {
            let first = page as usize * pages.page_elements() + head * half;
            // SAFETY: as in `embed_as`; the page is the caller's alone.
            unsafe { all.part(first + skip, half - skip) }.fill(T::store(0.0));
        }
    }

    fn copy_pages_as<T: Scalar>(&mut self, pages: &KvPages, pairs: &[u32]) {
        let all = Shared::<T>::of(&pages.memory);
        let len = pages.page_elements();
        for pair in pairs.chunks_exact(2) {
            assert_ne!(pair[0], pair[1], "a page is not copied onto itself");
            // SAFETY: as in `embed_as`; the pages differ.
            unsafe {
                all.part(pair[1] as usize * len, len).copy_from_slice(all.read(pair[0] as usize * len, len))
            };
        }
    }
}

/// A shape mismatch is a bug of the caller.
fn expect(buffer: &Buffer, len: usize) {
    assert!(buffer.len() >= len, "{buffer:?} should hold {len} elements");
}

fn check_heads(heads: usize, pages: &KvPages) {
    assert!(heads.is_multiple_of(pages.heads), "{heads} query heads over {} kv heads", pages.heads);
    assert!(pages.width <= HEAD_WIDTH_MAX, "heads of {} elements, at most {HEAD_WIDTH_MAX}", pages.width);
}

impl Stream for CpuStream {
    fn upload(&mut self, to: &Buffer, bytes: &[u8]) {
        assert!(bytes.len() <= to.bytes(), "{} bytes for {to:?}", bytes.len());
        // SAFETY: as in `embed_as`; every bit pattern is an element.
        unsafe { write_bytes(to, bytes) };
    }

    fn download(&mut self, from: &Buffer) -> Box<dyn Download> {
        // SAFETY: as in `embed_as`.
        Box::new(Ready(unsafe { read_bytes(from) }))
    }

    fn copy(&mut self, from: &Buffer, to: &Buffer) {
        assert_eq!((from.element(), from.len()), (to.element(), to.len()), "copies keep type and length");
        // SAFETY: as in `embed_as`.
        unsafe {
            let bytes = read_bytes(from);
            write_bytes(to, &bytes);
        }
    }

    fn zero(&mut self, buffer: &Buffer) {
        // SAFETY: as in `embed_as`; zero bytes are zero elements.
        unsafe {
            match buffer.element().bytes() {
                2 => slice_mut::<u16>(buffer).fill(0),
                _ => slice_mut::<u32>(buffer).fill(0),
            }
        }
    }

    fn embed(&mut self, call: Embed<'_>) {
        assert_eq!(call.table.form, LinearForm::Numbers, "tables are not quantised");
        assert_eq!(call.to.element(), call.table.values.element(), "rows are of the table's type");
        by_element!(call.to, self.embed_as(call))
    }

    fn rotations(&mut self, call: Rotations<'_>) {
        let count = call.rows.count;
        expect(call.to, count * 2 * call.frequencies.len());
        let job = rows::Rotations {
            // SAFETY: as in `embed_as`.
            positions: unsafe { &slice(call.rows.positions)[..count] },
            frequencies: call.frequencies,
            scale: call.scale,
            to: Shared::of(call.to),
        };
        self.cpu.run(count * call.frequencies.len() * 64, &|part, parts| rows::rotations(&job, part, parts));
    }

    fn norm(&mut self, call: Norm<'_>) {
        by_element!(call.x, self.norm_as(call))
    }

    fn linear(&mut self, call: LinearCall<'_>) {
        match (call.weight.form, call.x.element(), self.cpu.isa) {
            (LinearForm::Numbers, ..) => by_form!(call.x, self.linear_as(call)),
            (LinearForm::Int8, ..) => by_element!(call.x, self.linear_int8(call)),
            #[cfg(target_arch = "x86_64")]
            (LinearForm::Int4 { group }, Element::Bf16, Isa::Avx512) => self.linear_int4_pairs(call, group),
            #[cfg(target_arch = "x86_64")]
            (LinearForm::Int4 { group }, Element::Bf16, Isa::Avx2 | Isa::Avx512Fma) => {
                self.linear_int4_shifted(call, group)
            }
            (LinearForm::Int4 { group }, Element::Bf16, _) => self.linear_int4::<form::Widened>(call, group),
            (LinearForm::Int4 { group }, ..) => self.linear_int4::<form::Exact>(call, group),
        }
    }

    fn qkv_store(&mut self, call: QkvStore<'_>) {
        by_element!(call.qkv, self.qkv_store_as(call))
    }

    fn attention(&mut self, call: Attention<'_>) {
        by_form!(call.queries, self.attention_as(call))
    }

    fn gather_rows(&mut self, from: &Buffer, rows: &Buffer, count: usize, width: usize, to: &Buffer) {
        assert_eq!(from.element(), to.element(), "rows keep their type");
        expect(to, count * width);
        // SAFETY: as in `embed_as`.
        let rows = unsafe { &slice::<u32>(rows)[..count] };
        for (at, row) in rows.iter().enumerate() {
            let row = *row as usize;
            self.copy(&from.part(row * width..(row + 1) * width), &to.part(at * width..(at + 1) * width));
        }
    }

    fn logits(&mut self, call: Logits<'_>) {
        match call.weight.form {
            LinearForm::Numbers => by_form!(call.x, self.logits_as(call)),
            LinearForm::Int8 => by_element!(call.x, self.logits_int8(call)),
            LinearForm::Int4 { .. } => panic!("a head is of numbers or 8-bit integers"),
        }
    }

    fn tally(&mut self, call: Tally<'_>) {
        let row = call.counts.part(call.slot * call.vocab..(call.slot + 1) * call.vocab);
        // SAFETY: as in `embed_as`.
        unsafe { sample::tally(slice(call.tokens), call.prompt, slice_mut(&row)) };
    }

    fn penalties(&mut self, call: Penalties<'_>) {
        let (count, vocab) = (call.count, call.vocab);
        expect(call.raw, count * vocab);
        expect(call.to, count * vocab);
        expect(call.rows, count * SampleRow::WORDS);
        expect(call.edits.first, count + 1);
        let isa = self.cpu.isa;
        // SAFETY: as in `embed_as`.
        let job = unsafe {
            sample::Penalties {
                raw: slice(call.raw),
                count,
                vocab,
                rows: slice(call.rows),
                first: slice(call.edits.first),
                tokens: slice(call.edits.tokens),
                values: slice(call.edits.values),
                counts: call.counts.map(Shared::of),
                to: Shared::of(call.to),
            }
        };
        self.cpu.run(count * vocab, &|part, parts| sample::penalties(isa, &job, part, parts));
    }

    fn sample(&mut self, call: SampleCall<'_>) {
        let (count, vocab) = (call.count, call.vocab);
        expect(call.raw, count * vocab);
        expect(call.adjusted, count * vocab);
        expect(call.rows, count * SampleRow::WORDS);
        expect(call.to, count * SampleCall::WORDS);
        if let Some(peaks) = call.peaks {
            expect(peaks, count * vocab.div_ceil(Logits::PEAK));
        }
        let isa = self.cpu.isa;
        // SAFETY: as in `embed_as`.
        let job = unsafe {
            sample::Sample {
                raw: slice(call.raw),
                adjusted: slice(call.adjusted),
                peaks: call.peaks.map(|peaks| slice(peaks)),
                count,
                vocab,
                rows: slice(call.rows),
                previous: Shared::of(call.previous),
                counts: call.counts.map(Shared::of),
                to: Shared::of(call.to),
            }
        };
        self.cpu.run(count * vocab * 4, &|part, parts| sample::sample(isa, &job, part, parts));
    }

    fn copy_pages(&mut self, pages: &KvPages, pairs: &Buffer, count: usize) {
        // SAFETY: as in `embed_as`.
        let pairs = unsafe { &slice::<u32>(pairs)[..2 * count] };
        by_element!(pages.memory, self.copy_pages_as(pages, pairs))
    }

    fn zero_rows(&mut self, pages: &KvPages, page: u32, first_row: u32) {
        by_element!(pages.memory, self.zero_rows_as(pages, page, first_row))
    }
}

/// A download that is already there.
pub(crate) struct Ready(pub(crate) Vec<u8>);

impl Download for Ready {
    fn ready(&self) -> bool {
        true
    }

    fn take(self: Box<Self>) -> Result<Vec<u8>, Error> {
        Ok(self.0)
    }
}

/// # Safety
/// As for [`slice`].
pub(crate) unsafe fn read_bytes(buffer: &Buffer) -> Vec<u8> {
    // SAFETY: by the caller's promise.
    unsafe {
        match buffer.element().bytes() {
            2 => slice::<u16>(buffer).iter().flat_map(|value| value.to_ne_bytes()).collect(),
            _ => slice::<u32>(buffer).iter().flat_map(|value| value.to_ne_bytes()).collect(),
        }
    }
}

/// # Safety
/// As for [`slice_mut`].
pub(crate) unsafe fn write_bytes(buffer: &Buffer, bytes: &[u8]) {
    // SAFETY: by the caller's promise.
    unsafe {
        match buffer.element().bytes() {
            2 => {
                for (to, from) in slice_mut::<u16>(buffer).iter_mut().zip(bytes.as_chunks::<2>().0) {
                    *to = u16::from_ne_bytes(*from);
                }
            }
            _ => {
                for (to, from) in slice_mut::<u32>(buffer).iter_mut().zip(bytes.as_chunks::<4>().0) {
                    *to = u32::from_ne_bytes(*from);
                }
            }
        }
    }
}
