//! Fail points in a cluster in virtual time: the real router and workers with fake engines, in one process and one
//! thread, many virtual minutes in a moment.
//!
//! A case is its number: that says which fail point is struck and how, and the seed of everything else. So a case
//! that fails is repeated by its number alone.

mod case;
mod client;
mod judge;
mod script;
mod table;
mod world;

use std::cell::RefCell;
use std::sync::Once;
use std::sync::mpsc;

use tandem_chassis::fail;
use tandem_chassis::seam::{self, Simulation};

use super::random;

pub use case::Case;
pub use judge::Report;
pub use table::Table;

/// The command that repeats a case.
pub fn command(number: u64) -> String {
    format!("cargo xtask chaos --level failpoints --runs 1 --seed {number}")
}

/// Runs the case of this number, whole, in a world of its own.
pub fn run(number: u64) -> Report {
    keep_panics();
    let (send, report) = mpsc::channel();
    let thread = seam::thread(&format!("case-{number}"), move || {
        let case = Case::draw(number);
        let _world = Simulation::begin(number);
        let runtime = tokio::runtime::Builder::new_current_thread().start_paused(true).enable_all().build();
        let mut report = runtime.expect("a runtime").block_on(judge::run(&case));
        fail::disarm();
        report.violations.extend(PANICS.take());
        let _ = send.send(report);
    });
    let report = report.recv();
    let ended = thread.join();
    report.unwrap_or_else(|_| {
        let why = ended.err().and_then(|panic| panic.downcast::<String>().ok());
        Report::broken(Case::draw(number), format!("the case itself panicked: {}", why.unwrap_or_default()))
    })
}

thread_local! {
    /// Panics of this world that no fail point meant.
    static PANICS: RefCell<Vec<String>> = const { RefCell::new(Vec::new()) };
}

/// In simulated worlds panics are kept for the judge; elsewhere they are printed as always.
fn keep_panics() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let usual = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |info| {
            if !seam::simulated() {
                return usual(info);
            }
            let payload = info.payload();
            let text = payload.downcast_ref::<&str>().copied();
            let text =
                text.or_else(|| payload.downcast_ref::<String>().map(String::as_str)).unwrap_or_default();
            if !text.starts_with(fail::PANIC) {
                let place = info.location().map(ToString::to_string).unwrap_or_default();
                // A panic under a worker's lock ends the process by design, so it is said at once.
                let name = std::thread::current().name().map(str::to_owned).unwrap_or_default();
                eprintln!("{name}: panic at {place}: {text}");
                PANICS.with_borrow_mut(|panics| panics.push(format!("a panic at {place}: {text}")));
            }
        }));
    });
}
