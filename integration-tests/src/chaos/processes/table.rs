//! Stage times fault, counted: what came of each.

use std::collections::BTreeMap;
use std::fmt;

use super::case::{Case, Fault, Outcome, Stage, Victim, Watched};

/// What came of the watched requests of a cell.
#[derive(Clone, Copy, Debug, Default)]
struct Cell {
    passed: usize,
    again: usize,
    loud: usize,
    failed: usize,
}

/// Counts cases by the watched request's stage and what was done to which process.
#[derive(Debug, Default)]
pub struct Table {
    cells: BTreeMap<(Stage, Fault, Victim), Cell>,
    requests: u64,
    complete: u64,
    slowest_rest: f64,
    missed: u32,
    late: usize,
    /// One text for each case that did not hold: seed, what happened, and the command that repeats it.
    pub violations: Vec<String>,
}

impl Table {
    pub(super) fn passed(&mut self, case: &Case, outcome: &Outcome) {
        let cell = self.cell(case);
        let count = match outcome.watched {
            Watched::Whole => &mut cell.passed,
            Watched::Again => &mut cell.again,
            Watched::Loud => &mut cell.loud,
        };
        *count += 1;
        self.requests += outcome.requests;
        self.complete += outcome.complete;
        self.missed += outcome.missed;
        self.late += usize::from(outcome.late);
        self.slowest_rest = self.slowest_rest.max(outcome.rest.as_secs_f64());
    }

    pub(super) fn failed(&mut self, case: &Case, what: String) {
        self.cell(case).failed += 1;
        self.violations.push(what);
    }

    fn cell(&mut self, case: &Case) -> &mut Cell {
        self.cells.entry((case.stage, case.fault, case.victim)).or_default()
    }

    pub(super) fn merge(&mut self, other: Table) {
        for (key, cell) in other.cells {
            let own = self.cells.entry(key).or_default();
            own.passed += cell.passed;
            own.again += cell.again;
            own.loud += cell.loud;
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
        let faults = || Fault::ALL.into_iter().flat_map(|fault| Victim::ALL.map(|victim| (fault, victim)));
        writeln!(
            f,
            "watched requests by what came of them: passed / placed again / ended loudly / FAILED\n"
        )?;
        write!(f, "| stage |")?;
        faults().try_for_each(|(fault, victim)| write!(f, " {fault} {victim} |"))?;
        writeln!(f, "\n|---|{}", "---|".repeat(faults().count()))?;
        for stage in Stage::ALL {
            write!(f, "| {stage} |")?;
            for (fault, victim) in faults() {
                let cell = self.cells.get(&(stage, fault, victim)).copied().unwrap_or_default();
                write!(f, " {}/{}/{}/{} |", cell.passed, cell.again, cell.loud, cell.failed)?;
            }
            writeln!(f)?;
        }
        let cases: usize = self.cells.values().map(|c| c.passed + c.again + c.loud + c.failed).sum();
        writeln!(
            f,
            "\n{cases} cases, {} failed; {} requests whole, {} ended loudly; at rest again after at most {:.1} s; \
             {} stages passed unseen and were tried again, {} faults came after their stage",
            self.violations.len(),
            self.complete,
            self.requests - self.complete,
            self.slowest_rest,
            self.missed,
            self.late
        )
    }
}
