//! Thousands of damaged headers and configurations: each is refused by an error that names its file, or gives the
//! tensors of the undamaged checkpoint. Nothing panics, and nothing asks for memory because a file claims a size.

use std::alloc::{GlobalAlloc, Layout, System};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};

use tandem_models::{Checkpoint, from_bytes};

/// The system's allocator, with a record of the largest piece that was asked for.
struct Recording;

static LARGEST: AtomicUsize = AtomicUsize::new(0);

// SAFETY: every call is handed on as it came, so the system's allocator keeps the contract.
unsafe impl GlobalAlloc for Recording {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        LARGEST.fetch_max(layout.size(), Ordering::Relaxed);
        // SAFETY: as the caller promised.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: as the caller promised.
        unsafe { System.dealloc(pointer, layout) }
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        LARGEST.fetch_max(size, Ordering::Relaxed);
        // SAFETY: as the caller promised.
        unsafe { System.realloc(pointer, layout, size) }
    }
}

#[global_allocator]
static ALLOCATOR: Recording = Recording;

/// Numbers that follow from a seed (Marsaglia's xorshift, 64 bits).
struct Numbers(u64);

impl Numbers {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn below(&mut self, bound: usize) -> usize {
        (self.next() % bound.max(1) as u64) as usize
    }

    fn one_of<'a, T: ?Sized>(&mut self, all: &[&'a T]) -> &'a T {
        all[self.below(all.len())]
    }
}

/// Texts that numbers and words are replaced by.
const INSTEAD: &[&str] = &[
    "0",
    "1",
    "-1",
    "2",
    "3",
    "7",
    "16",
    "255",
    "65536",
    "4294967295",
    "4294967296",
    "9223372036854775807",
    "9223372036854775808",
    "18446744073709551615",
    "1e308",
    "1e-308",
    "1e999",
    "0.5",
    "null",
    "true",
    "[]",
    "{}",
    "\"\"",
    "NaN",
    "[0,0]",
    "\"BF16\"",
    "\"F32\"",
    "\"U8\"",
];

/// Damages a text in one of the ways that files are damaged: by chance or by malice.
fn damage(text: &mut Vec<u8>, numbers: &mut Numbers) {
    let at = numbers.below(text.len());
    match numbers.below(7) {
        0 => text[at] = numbers.next() as u8,
        1 => text[at] ^= 1 << numbers.below(8),
        2 => text.truncate(at),
        3 => drop(text.drain(at..(at + numbers.below(40)).min(text.len()))),
        4 => {
            let piece = text[at..(at + numbers.below(90)).min(text.len())].to_vec();
            let to = numbers.below(text.len());
            text.splice(to..to, piece);
        }
        // A whole number or word after the place becomes another.
        5 => {
            let starts = |byte: &u8| byte.is_ascii_digit();
            let Some(first) = text[at..].iter().position(starts).map(|skip| at + skip) else { return };
            let end =
                text[first..].iter().position(|byte| !starts(byte)).map_or(text.len(), |len| first + len);
            text.splice(first..end, numbers.one_of(INSTEAD).bytes());
        }
        _ => {
            text.splice(at..at, numbers.one_of(INSTEAD).bytes());
        }
    }
}

struct Good {
    config: Vec<u8>,
    header: Vec<u8>,
    data: Vec<u8>,
    opened: Checkpoint,
}

fn good(name: &str) -> Good {
    let folder: PathBuf =
        Path::new(env!("CARGO_MANIFEST_DIR")).join("../../integration-tests/checkpoints").join(name);
    let config = std::fs::read(folder.join("config.json")).expect("checkpoints are committed");
    let file = std::fs::read(folder.join("model.safetensors")).expect("checkpoints are committed");
    let opened = from_bytes(&config, file.clone()).unwrap_or_else(|error| panic!("{error}"));
    let (length, rest) = file.split_first_chunk::<8>().expect("a file has a header");
    let (header, data) = rest.split_at(u64::from_le_bytes(*length) as usize);
    Good { config, header: header.to_vec(), data: data.to_vec(), opened }
}

/// Opens a damaged checkpoint and says whether it was refused.
fn refused(good: &Good, config: &[u8], file: Vec<u8>, damaged: &str, seed: u64) -> bool {
    let bound = 64 * (config.len() + good.header.len()) + (1 << 16);
    LARGEST.store(0, Ordering::Relaxed);
    let result = from_bytes(config, file);
    let largest = LARGEST.load(Ordering::Relaxed);
    assert!(largest <= bound, "seed {seed}: {largest} bytes at once for a {damaged} of a few thousand");
    match result {
        Err(error) => {
            let said = error.to_string();
            let names = ["config.json: ", "model.safetensors: "].iter().any(|file| said.starts_with(file));
            assert!(names && said.len() < bound, "seed {seed}: {said}");
            true
        }
        Ok(opened) => {
            for (part, tensor) in opened.weights() {
                let name = opened.weight_name(part);
                let mut all =
                    good.opened.weights().map(|(part, tensor)| (good.opened.weight_name(part), part, tensor));
                let Some((.., original)) = all.find(|(other, at, _)| *other == name && *at == part) else {
                    continue;
                };
                assert!(tensor.bytes == original.bytes, "seed {seed}: {name} is another tensor");
            }
            false
        }
    }
}

fn file(length: u64, header: &[u8], data: &[u8]) -> Vec<u8> {
    [&length.to_le_bytes(), header, data].concat()
}

/// One test, because the allocator's record belongs to the process.
#[test]
fn damaged_files_are_refused_by_name_or_give_the_same_tensors() {
    for (name, rounds) in [
        ("glm4", 2000),
        ("qwen3-s7", 2000),
        ("llama-s5", 2000),
        ("qwen3-gptq", 300),
        ("qwen3-w8a8", 300),
        ("qwen3-fp8", 300),
    ] {
        let good = good(name);
        let mut refusals = [0; 3];
        for seed in 1..=rounds as u64 {
            let mut numbers = Numbers(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15));
            let times = 1 + numbers.below(3);

            let mut header = good.header.clone();
            (0..times).for_each(|_| damage(&mut header, &mut numbers));
            let whole = file(header.len() as u64, &header, &good.data);
            refusals[0] += usize::from(refused(&good, &good.config, whole, "header", seed));

            let mut config = good.config.clone();
            (0..times).for_each(|_| damage(&mut config, &mut numbers));
            let whole = file(good.header.len() as u64, &good.header, &good.data);
            refusals[1] += usize::from(refused(&good, &config, whole, "config", seed));

            let length = match numbers.below(3) {
                0 => numbers.next(),
                1 => 1 << numbers.below(64),
                _ => good.header.len() as u64 + 1 - 2 * (seed % 2),
            };
            let whole = file(length, &good.header, &good.data);
            refusals[2] += usize::from(refused(&good, &good.config, whole, "length", seed));
        }
        // Some damage falls into white space, or says the same.
        assert!(refusals.iter().all(|count| *count > rounds / 2), "{name}: {refusals:?} of {rounds}");
    }
}
