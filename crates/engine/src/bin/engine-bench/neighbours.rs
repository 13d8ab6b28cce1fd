//! What is left of the engine's speed beside as many busy processes as it has threads: half would be its fair share.

use std::process::{Child, Command, Stdio};

use tandem_engine::Quantization;

use crate::case::{Case, Subject};
use crate::spread;

/// The argument that makes this program a busy process.
pub(crate) const BUSY: &str = "--busy";

/// Keeps one processor busy for as long as the process that started it lives.
pub(crate) fn be_busy() -> ! {
    let parent = std::os::unix::process::parent_id();
    loop {
        for _ in 0..10_000_000 {
            std::hint::spin_loop();
        }
        if std::os::unix::process::parent_id() != parent {
            std::process::exit(0);
        }
    }
}

/// Busy processes; dropping them ends them.
struct Busy(Vec<Child>);

impl Busy {
    fn start(count: usize) -> Result<Busy, String> {
        let program = std::env::current_exe().map_err(|error| error.to_string())?;
        let mut busy = Busy(Vec::new());
        for _ in 0..count {
            let child = Command::new(&program).arg(BUSY).stdin(Stdio::null()).spawn();
            busy.0.push(child.map_err(|error| format!("a busy process: {error}"))?);
        }
        Ok(busy)
    }
}

impl Drop for Busy {
    fn drop(&mut self) {
        for child in &mut self.0 {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// Prints one row of a table per case.
pub(crate) fn report(threads: usize, rounds: usize, quantization: Quantization) -> Result<(), String> {
    let cases = [
        Case::Prefill { tokens: 512 },
        Case::Decode { batch: 1, context: 128 },
        Case::Decode { batch: 8, context: 128 },
    ];
    let mut subject = Subject::load(threads, &cases, quantization)?;
    let mut figures = vec![Vec::new(); cases.len()];
    for round in 1..=rounds {
        for (case, figures) in cases.iter().zip(&mut figures) {
            let alone = subject.measure(case)?.wall;
            let busy = Busy::start(threads)?;
            let beside = subject.measure(case)?.wall;
            drop(busy);
            eprintln!("round {round}: {case}: {:.2} of its speed is left", alone / beside);
            let tokens = (case.steps() * case.tokens()) as f64;
            figures.push([tokens / alone, tokens / beside, alone / beside]);
        }
    }
    println!(
        "| case | tokens/s by wall, alone | beside {threads} busy processes | ratio |\n|---|---|---|---|"
    );
    for (case, figures) in cases.iter().zip(&figures) {
        let column = |at: usize, digits| spread(figures.iter().map(|figure| figure[at]).collect(), digits);
        println!("| {case} | {} | {} | {} |", column(0, 1), column(1, 1), column(2, 2));
    }
    Ok(())
}
