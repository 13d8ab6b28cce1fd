//! How far a long command is, on one line of a terminal.

use std::io::{IsTerminal, Write};
use std::sync::atomic::{AtomicUsize, Ordering};

/// How far it is, on one line of a terminal.
pub struct Bar {
    all: usize,
    done: AtomicUsize,
    shown: bool,
}

impl Bar {
    /// Nothing done yet.
    pub fn new(all: usize) -> Bar {
        Bar { all, done: AtomicUsize::new(0), shown: std::io::stderr().is_terminal() }
    }

    /// A bar that only says what is being done.
    pub fn of_unknown_length() -> Bar {
        Bar::new(0)
    }

    /// The next one begins.
    pub fn step(&self, what: &str) {
        let done = self.done.fetch_add(1, Ordering::Relaxed);
        if self.shown {
            match self.all {
                0 => eprint!("\r{:<6} {what:<90}", done + 1),
                all => eprint!("\r[{}] {done}/{all} {what:<50}", drawn(done as f64 / all as f64)),
            }
            let _ = std::io::stderr().flush();
        }
    }

    /// So far of the whole, from 0 to 1; as often as one likes.
    pub fn reached(&self, share: f64, what: &str) {
        if self.shown {
            eprint!("\r[{}] {:3.0} % {what:<80}", drawn(share), share.clamp(0.0, 1.0) * 100.0);
            let _ = std::io::stderr().flush();
        }
    }

    /// All done.
    pub fn end(&self) {
        if self.shown {
            eprint!("\r{:<120}\r", "");
        }
    }
}

fn drawn(share: f64) -> String {
    let full = (share.clamp(0.0, 1.0) * 30.0) as usize;
    (0..30).map(|i| if i < full { '#' } else { '.' }).collect()
}
