//! A device under test with its stream, and the two comparisons: with the plain twin, and bit for bit.
#![allow(dead_code, reason = "each test binary uses a part")]

use std::collections::HashMap;
use std::sync::OnceLock;

use tandem_device::{Buffer, Device, Element, Stream};
use tandem_kernels::{Cpu, Isa, Plain, philox4x32};

pub struct Bench<'a> {
    pub device: &'a dyn Device,
    pub stream: Box<dyn Stream>,
}

impl Bench<'_> {
    pub fn on(device: &dyn Device) -> Bench<'_> {
        Bench { device, stream: device.stream() }
    }

    pub fn numbers(&mut self, element: Element, values: &[f32]) -> Buffer {
        let buffer = self.device.allocate(element, values.len()).unwrap();
        let bytes: Vec<u8> = match element {
            Element::F32 => values.iter().flat_map(|value| value.to_ne_bytes()).collect(),
            Element::Bf16 => {
                values.iter().flat_map(|value| half::bf16::from_f32(*value).to_ne_bytes()).collect()
            }
            Element::U32 => panic!("numbers are not indices"),
        };
        self.stream.upload(&buffer, &bytes);
        buffer
    }

    pub fn words(&mut self, words: &[u32]) -> Buffer {
        let buffer = self.device.allocate(Element::U32, words.len()).unwrap();
        let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_ne_bytes()).collect();
        self.stream.upload(&buffer, &bytes);
        buffer
    }

    pub fn read(&mut self, buffer: &Buffer) -> Vec<f32> {
        let bytes = self.stream.download(buffer).take().unwrap();
        match buffer.element() {
            Element::F32 => bytes.as_chunks::<4>().0.iter().map(|bytes| f32::from_ne_bytes(*bytes)).collect(),
            Element::Bf16 => bytes
                .as_chunks::<2>()
                .0
                .iter()
                .map(|bytes| half::bf16::from_ne_bytes(*bytes).to_f32())
                .collect(),
            Element::U32 => panic!("numbers are not indices"),
        }
    }

    pub fn read_words(&mut self, buffer: &Buffer) -> Vec<u32> {
        let bytes = self.stream.download(buffer).take().unwrap();
        bytes.as_chunks::<4>().0.iter().map(|bytes| u32::from_ne_bytes(*bytes)).collect()
    }
}

/// The CPU with every instruction set this machine has, on one thread and on three.
fn devices() -> &'static [Cpu] {
    static DEVICES: OnceLock<Vec<Cpu>> = OnceLock::new();
    DEVICES.get_or_init(|| {
        let available = Isa::ALL.into_iter().filter(|isa| isa.available());
        available.flat_map(|isa| [1, 3].map(|threads| Cpu::with(isa, threads).unwrap())).collect()
    })
}

/// Runs something on every CPU device.
pub fn each(run: impl Fn(&mut Bench)) {
    for device in devices() {
        run(&mut Bench::on(device));
    }
}

/// What `run` gives on every CPU device is within rounding of what it gives on the plain one, and equal in bits
/// among those of one numerics class. `scale` says how large sums get.
pub fn check(element: Element, scale: f32, run: impl Fn(&mut Bench) -> Vec<f32>) {
    let expected = run(&mut Bench::on(&Plain));
    let ulp = if element == Element::F32 { 2e-6 } else { 1.0 / 128.0 };
    let mut classes: HashMap<String, Vec<u32>> = HashMap::new();
    for device in devices() {
        let got = run(&mut Bench::on(device));
        assert_eq!(got.len(), expected.len());
        for (at, (got, expected)) in got.iter().zip(&expected).enumerate() {
            let near = (got - expected).abs() <= ulp * (expected.abs() + scale);
            let same = got == expected || got.is_nan() && expected.is_nan();
            assert!(near || same, "{}: element {at} is {got}, the twin says {expected}", device_name(device));
        }
        let bits: Vec<u32> = got.iter().map(|value| value.to_bits()).collect();
        let first = classes.entry(device.numerics(element)).or_insert_with(|| bits.clone());
        assert!(*first == bits, "{} differs in bits from the first of its class", device_name(device));
    }
}

/// Two ways to compute the same thing give the same bits on every device.
pub fn same_bits(one: impl Fn(&mut Bench) -> Vec<f32>, other: impl Fn(&mut Bench) -> Vec<f32>) {
    for device in devices() {
        let bits = |values: Vec<f32>| values.iter().map(|value| value.to_bits()).collect::<Vec<_>>();
        let (one, other) = (bits(one(&mut Bench::on(device))), bits(other(&mut Bench::on(device))));
        assert!(one == other, "{} gives different bits", device_name(device));
    }
}

fn device_name(device: &Cpu) -> &str {
    Device::name(device)
}

/// Numbers between -1 and 1 that follow from a seed.
pub fn random(seed: u64, count: usize) -> Vec<f32> {
    (0..count.div_ceil(4))
        .flat_map(|at| philox4x32([at as u32, 0, 0, 0], [seed as u32, (seed >> 32) as u32]))
        .take(count)
        .map(|word| word as f32 / (1_u64 << 31) as f32 - 1.0)
        .collect()
}
