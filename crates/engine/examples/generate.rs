//! Continues a prompt with a checkpoint, both as token ids: `cargo run --example generate -- DIR 17 4 25`

use std::path::Path;

use tandem_batching::{Input, Plan, Row, SlotOpen};
use tandem_engine::{Options, load};
use tandem_types::{Choice, SamplingParams, Time, TokenId, blocks_for};

type Error = Box<dyn std::error::Error>;

fn main() -> Result<(), Error> {
    let mut arguments = std::env::args().skip(1);
    let dir = arguments.next().ok_or("usage: generate DIR TOKEN...")?;
    let prompt = arguments.map(|id| id.parse()).collect::<Result<Vec<TokenId>, _>>()?;
    println!("{:?}", generate(Path::new(&dir), &prompt, 16)?);
    Ok(())
}

pub(crate) fn generate(dir: &Path, prompt: &[TokenId], new: u32) -> Result<Vec<TokenId>, Error> {
    let mut engine = load(dir, Options { kv_bytes: 64 << 20, ..Options::default() })?;
    let (tokens, prompt_tokens) = (prompt.to_vec(), prompt.len() as u32);
    let sampling = SamplingParams::default(); // greedy
    let (choice, stop_suppress) = (Choice(0), Vec::new());
    let slot = SlotOpen { slot: 0, tokens, prompt_tokens, sampling, choice, stop_suppress, min_tokens: 0 };
    let (mut open, mut output) = (vec![slot], Vec::new());
    let (mut start, mut count, mut input) = (0, prompt_tokens, Input::Known(prompt.to_vec()));
    while output.len() < new as usize {
        let pages = vec![(0..blocks_for(start + count)).collect()];
        let row = Row { slot: 0, start, count, input, pages, sample: true, score: None };
        let (id, open) = (output.len() as u64, std::mem::take(&mut open));
        engine.submit(Plan { id, open, close: vec![], rows: vec![row], same_shape_steps: 1 }, Time::ZERO);
        let outcome = engine.collect(Time::ZERO).ok_or("the CPU is done when submit returns")??;
        output.push(outcome.rows[0].sampled.as_ref().ok_or("logits are not finite")?.token);
        (start, count, input) = (start + count, 1, Input::Previous);
    }
    Ok(output)
}
