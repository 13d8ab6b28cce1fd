//! How long loading takes beside reading and copying the same bytes, and what memory it leaves in use.

use std::fs::File;
use std::io::Read;
use std::path::Path;

use tandem_engine::{DecoderEngine, Dtype, Engine, Options, Quantization};
use tandem_memory::Region;

use crate::machine::Took;

/// The KV pool; untouched, so it counts for nothing until it is used.
const KV_BYTES: u64 = 256 << 20;

/// Prints one row of a table per round.
pub(crate) fn report(
    dir: &Path,
    threads: usize,
    rounds: usize,
    quantization: Quantization,
) -> Result<(), String> {
    let failed = |error: std::io::Error| format!("{}: {error}", dir.display());
    println!(
        "| load of | read + copy, wall (CPU) s | load, wall (CPU) s | ratio, wall (CPU) | weights as stored, MiB | RssAnon + \
         RssShmem, MiB |\n|---|---|---|---|---|---|"
    );
    for _ in 0..rounds {
        let (copied, plain) = Took::of(|| read_and_copy(&dir.join("model.safetensors")));
        let stored = copied.map_err(failed)?;
        let before = resident().map_err(failed)?;
        let (engine, took) = Took::of(|| {
            let options = Options {
                dtype: Dtype::Bfloat16,
                quantization,
                threads,
                kv_bytes: KV_BYTES,
                ..Options::default()
            };
            DecoderEngine::load(dir, options)
        });
        let engine = engine.map_err(|error| error.to_string())?;
        let after = resident().map_err(failed)?;
        println!(
            "| {} {} | {:.2} ({:.2}) | {:.2} ({:.2}) | {:.2} ({:.2}) | {} | {} |",
            engine.facts().model,
            engine.facts().identity.numerics,
            plain.wall,
            plain.cpu,
            took.wall,
            took.cpu,
            took.wall / plain.wall,
            took.cpu / plain.cpu,
            stored >> 20,
            after.saturating_sub(before) >> 20,
        );
    }
    Ok(())
}

/// One read of a file and one copy of it, in memory as the engine's own is: fresh, in huge pages where the system gives
/// them. Returns its length.
fn read_and_copy(path: &Path) -> std::io::Result<u64> {
    let mut file = File::open(path)?;
    let length = file.metadata()?.len() as usize;
    let (read, copy) = (Region::anonymous(length)?, Region::anonymous(length)?);
    // SAFETY: both regions are ours alone and at least as long as that.
    let (read, copy) = unsafe {
        (
            std::slice::from_raw_parts_mut(read.as_ptr(), length),
            std::slice::from_raw_parts_mut(copy.as_ptr(), length),
        )
    };
    file.read_exact(read)?;
    copy.copy_from_slice(read);
    std::hint::black_box(copy);
    Ok(length as u64)
}

/// Memory of the process that is not a file's.
fn resident() -> std::io::Result<u64> {
    let status = std::fs::read_to_string("/proc/self/status")?;
    let kib = |name: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(name));
        line.and_then(|line| line.split_whitespace().next()?.parse::<u64>().ok()).unwrap_or(0)
    };
    Ok((kib("RssAnon:") + kib("RssShmem:")) << 10)
}
