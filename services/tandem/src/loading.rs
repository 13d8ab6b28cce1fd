//! The progress of loading, on one line of a terminal; a few lines where standard error is a file.

use std::io::{IsTerminal, Write};
use std::sync::{Arc, Mutex};

/// What every part that loads has reached.
#[derive(Clone, Default)]
pub struct Loading {
    parts: Arc<Mutex<Vec<(String, f32)>>>,
}

impl Loading {
    /// A further part; the function it gets is called with its share, 0 to 1.
    pub fn part(&self, name: &str) -> Arc<dyn Fn(f32) + Send + Sync> {
        let index = {
            let mut parts = self.parts.lock().expect("nothing panics under this lock");
            parts.push((name.to_owned(), 0.0));
            parts.len() - 1
        };
        let loading = self.clone();
        Arc::new(move |share| loading.reached(index, share))
    }

    fn reached(&self, index: usize, share: f32) {
        let mut parts = self.parts.lock().expect("nothing panics under this lock");
        let before = parts[index].1;
        parts[index].1 = share;
        if std::io::stderr().is_terminal() {
            let shown: Vec<String> = parts.iter().map(|(name, share)| bar(name, *share)).collect();
            eprint!("\r\x1b[2K{}", shown.join("  "));
            let _ = std::io::stderr().flush();
        } else if before < 1.0 && share >= 1.0 {
            eprintln!("{} is loaded", parts[index].0);
        }
    }

    /// Clears the line.
    pub fn done(&self) {
        if std::io::stderr().is_terminal() {
            eprint!("\r\x1b[2K");
        }
    }
}

fn bar(name: &str, share: f32) -> String {
    let full = (share.clamp(0.0, 1.0) * 10.0) as usize;
    format!("{name} [{}{}] {:3.0} %", "#".repeat(full), " ".repeat(10 - full), share * 100.0)
}
