//! One fuzzer for all targets: `TANDEM_FUZZ` names the one, `TANDEM_FUZZ_MODEL` the folder of a checkpoint.
//!
//! `cargo xtask fuzz` builds and runs it; what a target of the router promises stands with the router.

#![no_main]

use std::env;
use std::path::PathBuf;
use std::sync::LazyLock;

use libfuzzer_sys::fuzz_target;
use tandem_models::{Int4Row, Matrix, MatrixForm};
use tandem_router::fuzz::{Harness, TARGETS};

type Target = Box<dyn Fn(&[u8]) + Send + Sync>;

static TARGET: LazyLock<Target> = LazyLock::new(|| {
    let name = env::var("TANDEM_FUZZ").expect("TANDEM_FUZZ names a target");
    if name == "checkpoint" {
        return Box::new(checkpoint);
    }
    let model = PathBuf::from(env::var_os("TANDEM_FUZZ_MODEL").expect("TANDEM_FUZZ_MODEL names a folder"));
    let (_, target) = TARGETS.iter().find(|(known, _)| *known == name).expect("TANDEM_FUZZ names a target");
    let harness = Harness::open(&model).expect("it is a checkpoint");
    Box::new(move |data| target(&harness, data))
});

/// Most zeros that stand for the data of tensors.
const DATA_BYTES_MAX: u64 = 2 << 20;

/// A configuration, a byte that is in no text, and the header of a file of weights: a checkpoint or an error.
fn checkpoint(data: &[u8]) {
    let Some(end) = data.iter().position(|&byte| byte == 0xff) else { return };
    let (config, header) = (&data[..end], &data[end + 1..]);
    let mut weights = (header.len() as u64).to_le_bytes().to_vec();
    weights.extend_from_slice(header);
    let bytes = data_bytes(header).min(DATA_BYTES_MAX) as usize;
    weights.resize(weights.len() + bytes, 0);
    let Ok(checkpoint) = tandem_models::from_bytes(config, weights) else { return };
    for weight in checkpoint.spec().weights() {
        if let [_, _] = weight.shape[..] {
            read(&checkpoint.matrix(weight.part));
        } else {
            checkpoint.weight(weight.part).to_f32();
        }
    }
}

/// Reads the first and the last row in every way that the matrix offers.
fn read(matrix: &Matrix<'_>) {
    let (outputs, inputs) = (matrix.outputs(), matrix.inputs());
    for row in [0, outputs - 1] {
        matrix.read_row(row, &mut vec![0.0; inputs]);
        match matrix.form() {
            MatrixForm::Numbers => {}
            MatrixForm::Int8 => {
                let scale = matrix.read_int8(row, &mut vec![0; inputs]);
                assert!(scale.is_finite(), "scales are checked when a checkpoint is opened");
            }
            MatrixForm::Int4 { group } => {
                let groups = inputs.div_ceil(group);
                let (mut values, mut scales, mut zeros) =
                    (vec![0; inputs], vec![0.0; groups], vec![0; groups]);
                let out = Int4Row { values: &mut values, scales: &mut scales, zeros: &mut zeros };
                matrix.read_int4(row, out);
                assert!(values.iter().all(|value| *value < 16) && zeros.iter().all(|zero| *zero <= 16));
                assert!(scales.iter().all(|scale| scale.is_finite()), "scales are checked as well");
            }
        }
    }
}

/// As many as the header says, if it says anything.
fn data_bytes(header: &[u8]) -> u64 {
    let Ok(serde_json::Value::Object(entries)) = serde_json::from_slice(header) else { return 0 };
    entries.values().filter_map(|entry| entry["data_offsets"][1].as_u64()).max().unwrap_or(0)
}

fuzz_target!(|data: &[u8]| TARGET(data));
