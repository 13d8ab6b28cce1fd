//! What benches share: a load by `tandem bench`, and figures of several rounds.

use std::process::{Command, Stdio};
use std::time::Duration;

use serde_json::Value;
use tandem_chassis::group::Group;
use tandem_chassis::seam;

use crate::processes::tandem;

/// A router looks every two seconds whether it has little to do, and gives back then.
const GIVEN_BACK: Duration = Duration::from_secs(5);

/// Runs `tandem bench` with these arguments and returns its one run, as `--json` writes it.
pub async fn bench(arguments: &[&str]) -> Result<Value, String> {
    let file = std::env::temp_dir().join(format!("tandem-bench-{:x}.json", seam::random_u128()));
    let mut command = Command::new(tandem());
    command.arg("bench").args(arguments).arg("--json").arg(&file).stdin(Stdio::null()).stdout(Stdio::null());
    let status = tokio::task::spawn_blocking(move || command.status()).await.expect("it waits");
    let text = std::fs::read_to_string(&file);
    let _ = std::fs::remove_file(&file);
    // It ends with an error where requests failed, and reports them all the same.
    let text = text.map_err(|_| format!("`tandem bench` ended with {status:?} and no report"))?;
    let mut report: Value = serde_json::from_str(&text).map_err(|error| error.to_string())?;
    Ok(report["runs"][0].take())
}

/// Minimum, median and maximum.
///
/// # Panics
/// If there is no value.
pub fn spread(mut values: Vec<f64>) -> [f64; 3] {
    values.sort_by(f64::total_cmp);
    [values[0], values[values.len() / 2], values[values.len() - 1]]
}

/// `median (minimum to maximum)`.
pub fn show([low, median, high]: [f64; 3], digits: usize) -> String {
    format!("{median:.digits$} ({low:.digits$} to {high:.digits$})")
}

/// A number from 1 on, as the value of a bench's option.
pub fn number(option: &str, text: &str) -> Result<u32, String> {
    let number = text.parse().ok().filter(|&number| number > 0);
    number.ok_or_else(|| format!("{option} takes a number from 1 on, not {text:?}"))
}

/// Resident bytes once they fall no more: what is free is given back a moment after the last work.
pub async fn at_rest(group: Group) -> u64 {
    let mut least = group.resident_bytes();
    for _ in 0..8 {
        seam::sleep(GIVEN_BACK).await;
        let now = group.resident_bytes();
        if now + now / 100 >= least {
            return now;
        }
        least = now;
    }
    least
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_are_shown_with_their_median_first() {
        assert_eq!(show(spread(vec![3.0, 1.0, 2.25]), 1), "2.2 (1.0 to 3.0)");
        assert_eq!(number("--rounds", "7"), Ok(7));
        assert!(number("--rounds", "0").unwrap_err().contains("from 1 on"));
    }
}
