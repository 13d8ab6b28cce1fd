//! What came of the cases: fault by stage.

use std::collections::BTreeMap;
use std::fmt;

use super::case::{Case, Fault, Outcome, Stage, Victim};

/// What came of the cases with one fault in one stage.
#[derive(Clone, Copy, Debug, Default)]
struct Cell {
    cases: u32,
    /// Of these, how many of the watched requests completed; the others ended loudly.
    complete: u32,
    failed: u32,
}

/// What came of all cases.
#[derive(Debug, Default)]
pub struct Table {
    cells: BTreeMap<(Fault, Victim, Stage), Cell>,
    requests: u64,
    complete: u64,
    slowest_rest: f64,
    missed: u64,
    late: u64,
    /// One text for each case that did not hold: seed, what happened, and the command that repeats it.
    pub violations: Vec<String>,
}

impl Table {
    pub(super) fn passed(&mut self, case: &Case, outcome: &Outcome) {
        let cell = self.cells.entry((case.fault, case.victim, case.stage)).or_default();
        cell.cases += 1;
        cell.complete += u32::from(outcome.watched_completed);
        self.requests += outcome.requests;
        self.complete += outcome.complete;
        self.missed += u64::from(outcome.missed);
        self.late += u64::from(outcome.late);
        self.slowest_rest = self.slowest_rest.max(outcome.rest.as_secs_f64());
    }

    pub(super) fn failed(&mut self, case: &Case, what: String) {
        let cell = self.cells.entry((case.fault, case.victim, case.stage)).or_default();
        cell.cases += 1;
        cell.failed += 1;
        self.violations.push(what);
    }

    pub(super) fn merge(&mut self, other: Table) {
        for (key, cell) in other.cells {
            let own = self.cells.entry(key).or_default();
            own.cases += cell.cases;
            own.complete += cell.complete;
            own.failed += cell.failed;
        }
        self.requests += other.requests;
        self.complete += other.complete;
        self.missed += other.missed;
        self.late += other.late;
        self.slowest_rest = self.slowest_rest.max(other.slowest_rest);
        self.violations.extend(other.violations);
    }
}

impl fmt::Display for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "| fault |")?;
        Stage::ALL.iter().try_for_each(|stage| write!(f, " {stage} |"))?;
        write!(f, "\n|---|{}\n", "---|".repeat(Stage::ALL.len()))?;
        for fault in Fault::ALL {
            for victim in Victim::ALL {
                write!(f, "| {fault} {victim} |")?;
                for stage in Stage::ALL {
                    match self.cells.get(&(fault, victim, stage)) {
                        None => write!(f, " – |")?,
                        Some(cell) => {
                            let loud = cell.cases - cell.complete - cell.failed;
                            write!(f, " {} + {loud}", cell.complete)?;
                            if cell.failed > 0 {
                                write!(f, " + {} FAILED", cell.failed)?;
                            }
                            write!(f, " |")?;
                        }
                    }
                }
                writeln!(f)?;
            }
        }
        let cases: u32 = self.cells.values().map(|cell| cell.cases).sum();
        let (failed, loud) = (self.violations.len(), self.requests - self.complete);
        writeln!(
            f,
            "\nWatched requests: complete + loud. {cases} cases, {failed} failed; {} requests in all, {} complete \
             and bit-equal, {loud} loud; at rest again after at most {:.1} s. {} stages passed unseen and were \
             tried again, {} were struck late.",
            self.requests, self.complete, self.slowest_rest, self.missed, self.late
        )
    }
}
