//! Medians, as a table to read and as JSON.

use std::fmt::Write;
use std::time::Duration;

use crate::measure::{Measured, Results};

/// Median, least and most.
fn spread(values: &[f64]) -> (f64, f64, f64) {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    (sorted[sorted.len() / 2], sorted[0], sorted[sorted.len() - 1])
}

/// A way's rate relative to its base, round by round.
fn ratios(results: &Results, way: &Measured, size: usize) -> Option<Vec<f64>> {
    let base = results.ways.iter().find(|other| Some(other.name.as_str()) == way.base)?;
    Some(way.rates[size].iter().zip(&base.rates[size]).map(|(own, base)| own / base).collect())
}

fn micros(times: &[Duration]) -> Vec<f64> {
    times.iter().map(|time| time.as_secs_f64() * 1e6).collect()
}

fn bytes(bytes: u64) -> String {
    match bytes {
        bytes if bytes >= 1 << 20 => format!("{} MiB", bytes >> 20),
        bytes => format!("{} KiB", bytes >> 10),
    }
}

/// Rows are ways, columns are lengths of ranges.
pub fn table(results: &Results) -> String {
    let mut text = String::new();
    let head: Vec<String> = results.sizes.iter().map(|size| bytes(size.range)).collect();
    let rule = "|---".repeat(head.len() + 1);
    let _ = writeln!(text, "GB/s in batches of 64 MiB: median (least to most), ratio within a round\n");
    let _ = writeln!(text, "| | {} |\n{rule}|", head.join(" | "));
    for way in &results.ways {
        let cells = (0..results.sizes.len()).map(|size| {
            let (median, least, most) = spread(&way.rates[size]);
            let cell = format!("{:.2} ({:.2} to {:.2})", median / 1e9, least / 1e9, most / 1e9);
            match ratios(results, way, size) {
                Some(ratios) => format!("{cell}, {:.2}", spread(&ratios).0),
                None => cell,
            }
        });
        let _ = writeln!(text, "| {} | {} |", way.name, cells.collect::<Vec<_>>().join(" | "));
    }
    let _ = writeln!(text, "\nmicroseconds for a single range: median (least to most)\n");
    let _ = writeln!(text, "| | {} |\n{rule}|", head.join(" | "));
    for way in &results.ways {
        let cells = way.times.iter().map(|times| {
            let (median, least, most) = spread(&micros(times));
            format!("{median:.0} ({least:.0} to {most:.0})")
        });
        let _ = writeln!(text, "| {} | {} |", way.name, cells.collect::<Vec<_>>().join(" | "));
    }
    for note in &results.notes {
        let _ = writeln!(text, "\n{note}");
    }
    text
}

/// One object per way and length.
pub fn json(results: &Results) -> String {
    let mut rows = Vec::new();
    for way in &results.ways {
        for (at, size) in results.sizes.iter().enumerate() {
            let base = way.base.map_or("null".to_owned(), |base| format!("{base:?}"));
            let ratio =
                ratios(results, way, at).map_or("null".to_owned(), |ratios| spread(&ratios).0.to_string());
            rows.push(format!(
                r#"{{"way": {:?}, "range_bytes": {}, "bytes_per_second": {:?}, "microseconds": {:?}, "base": {base}, "ratio": {ratio}}}"#,
                way.name, size.range, way.rates[at], micros(&way.times[at]),
            ));
        }
    }
    let notes: Vec<String> = results.notes.iter().map(|note| format!("{note:?}")).collect();
    format!("{{\"results\": [\n  {}\n],\n\"notes\": [{}]}}\n", rows.join(",\n  "), notes.join(", "))
}
