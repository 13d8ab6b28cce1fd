//! Fault times stage, counted: what came of each.

use std::collections::BTreeMap;
use std::fmt;

use tandem_chassis::fail::{Action, POINTS};

use super::judge::Report;

/// What came of the cases of a cell.
#[derive(Clone, Copy, Debug, Default)]
struct Cell {
    passed: usize,
    again: usize,
    loud: usize,
    failed: usize,
    missed: usize,
}

/// Counts cases by fail point and action.
#[derive(Clone, Debug, Default)]
pub struct Table {
    cells: BTreeMap<(&'static str, Action), Cell>,
    cases: usize,
    failed: usize,
    whole: usize,
    loud: usize,
    left: usize,
}

impl Table {
    /// Counts a case under each fault that struck; and as missed under each that did not.
    pub fn add(&mut self, report: &Report) {
        self.cases += 1;
        self.failed += usize::from(!report.violations.is_empty());
        self.whole += report.whole;
        self.loud += report.loud;
        self.left += report.left;
        for fate in &report.fates {
            let cell = self.cells.entry((fate.fault.point, fate.fault.action)).or_default();
            let count = match () {
                () if fate.struck.is_none() => &mut cell.missed,
                () if !report.violations.is_empty() => &mut cell.failed,
                () if report.loud > 0 => &mut cell.loud,
                () if report.again > 0 => &mut cell.again,
                () => &mut cell.passed,
            };
            *count += 1;
        }
    }

    /// Cases with a violation.
    pub fn failed(&self) -> usize {
        self.failed
    }

    /// Cells in which no case was struck.
    pub fn unmet(&self) -> Vec<(&'static str, Action)> {
        let met = |cell: &(&'static str, Action)| {
            self.cells.get(cell).is_some_and(|c| c.passed + c.again + c.loud + c.failed > 0)
        };
        super::case::cells().into_iter().filter(|cell| !met(cell)).collect()
    }
}

impl fmt::Display for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "cases by what came of them: passed / placed again / ended loudly / FAILED\n")?;
        write!(f, "| stage |")?;
        for action in Action::ALL {
            write!(f, " {action} |")?;
        }
        writeln!(f, "\n|---|{}", "---|".repeat(Action::ALL.len()))?;
        for (point, _) in POINTS {
            write!(f, "| {point} |")?;
            for action in Action::ALL {
                let cell = self.cells.get(&(*point, action)).copied().unwrap_or_default();
                write!(f, " {}/{}/{}/{} |", cell.passed, cell.again, cell.loud, cell.failed)?;
            }
            writeln!(f)?;
        }
        let struck: usize = self.cells.values().map(|c| c.passed + c.again + c.loud + c.failed).sum();
        let missed: usize = self.cells.values().map(|c| c.missed).sum();
        writeln!(
            f,
            "\n{} cases, {} failed; {struck} faults struck and {missed} came to nothing; {} requests whole, {} ended \
             loudly, {} left by their clients",
            self.cases, self.failed, self.whole, self.loud, self.left
        )?;
        let unmet = self.unmet();
        if !unmet.is_empty() && self.cases >= super::case::cells().len() {
            let names: Vec<String> =
                unmet.iter().map(|(point, action)| format!("{point} x {action}")).collect();
            writeln!(f, "not struck: {}", names.join(", "))?;
        }
        Ok(())
    }
}
