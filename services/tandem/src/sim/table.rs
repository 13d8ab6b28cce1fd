//! Runs as a table of text.

use super::runs::Done;

const HEAD: [&str; 12] = [
    "RUN",
    "SPLIT",
    "ORDER",
    "SCALE",
    "ATTAINED",
    "GOODPUT/S",
    "TTFT P50",
    "P90",
    "P99",
    "TPOT P50",
    "P99",
    "FLIPS",
];

pub fn text(runs: &[Done]) -> String {
    let mut rows = vec![HEAD.map(str::to_owned)];
    for done in runs {
        let (first, token) = (done.outcome.first_ms(), done.outcome.per_token_ms());
        rows.push([
            done.name.clone(),
            done.run.split.clone(),
            done.run.order.to_owned(),
            format!("{:.2}", done.run.scale),
            format!("{:.4}", done.outcome.attainment()),
            format!("{:.1}", done.outcome.goodput()),
            format!("{:.0} ms", first.p50),
            format!("{:.0}", first.p90),
            format!("{:.0}", first.p99),
            format!("{:.1} ms", token.p50),
            format!("{:.1}", token.p99),
            done.outcome.flips.to_string(),
        ]);
    }
    let widths: Vec<usize> =
        (0..HEAD.len()).map(|at| rows.iter().map(|row| row[at].len()).max().unwrap_or(0)).collect();
    let mut text = String::new();
    for row in rows {
        let cells: Vec<String> =
            row.iter().zip(&widths).map(|(cell, &width)| format!("{cell:<width$}")).collect();
        text += cells.join("  ").trim_end();
        text.push('\n');
    }
    let extra = runs.iter().map(|done| &done.outcome);
    for (done, outcome) in runs.iter().zip(extra) {
        if outcome.hit_tokens > 0 {
            let share = outcome.hit_tokens as f64 / outcome.prompt_tokens_in.max(1) as f64;
            text += &format!(
                "{}: {:.1} % of prompt tokens were cached, {} of them pulled from peers; mean TTFT {:.0} ms\n",
                done.name,
                share * 100.0,
                outcome.pulled_tokens,
                outcome.first_ms().mean
            );
        }
        if outcome.offline_tokens > 0 {
            text += &format!("{}: {} offline tokens\n", done.name, outcome.offline_tokens);
        }
        if outcome.unfinished > 0 {
            text += &format!(
                "{}: {} requests did not end; they count as missed\n",
                done.name, outcome.unfinished
            );
        }
    }
    text
}
