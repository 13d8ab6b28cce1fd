//! Figures as a table in Markdown, and as JSON.

use serde_json::{Value, json};

use crate::Line;
use crate::scenarios::Figure;

/// Our router with prefill and decode apart, and plain: the columns that goals are for.
const OURS: [&str; 2] = ["tandem PD", "tandem plain"];
const REFERENCE: &str = "nginx";

/// Medians with least and most, ratios and goals, one line for each scenario; then throughput.
pub fn text(names: &[&str], lines: &[Line]) -> String {
    let mut text =
        format!("\n| scenario | of | {} | PD / nginx | goal PD, plain | met |\n", names.join(" | "));
    text += &format!("|---|---|{}---|---|---|\n", "---|".repeat(names.len()));
    for line in lines {
        let cells: Vec<String> = line.figures.iter().map(|figures| cell(figures)).collect();
        let of = |name: &str| {
            names.iter().position(|known| *known == name).and_then(|at| median(&line.figures[at]))
        };
        let ratio = of(OURS[0]).zip(of(REFERENCE)).filter(|(_, nginx)| *nginx > 0.0);
        let ratio = ratio.map_or("-".to_owned(), |(ours, nginx)| format!("{:.2}", ours / nginx));
        let goals = [line.scenario.goal.0, line.scenario.goal.1];
        let met: Vec<&str> = OURS.iter().zip(goals).map(|(name, goal)| met(of(name), goal)).collect();
        let goals = goals.map(|goal| if goal.is_finite() { number(goal) } else { "-".to_owned() });
        text += &format!(
            "| {} | {} | {} | {ratio} | {} | {} |\n",
            line.scenario.name,
            line.scenario.unit,
            cells.join(" | "),
            goals.join(", "),
            met.join(", ")
        );
    }
    let loads: Vec<&Line> = lines
        .iter()
        .filter(|line| line.figures[0].iter().any(|figure| figure.per_second.is_some()))
        .collect();
    if !loads.is_empty() {
        text += &format!(
            "\nPer second, and as a share of no gateway in the same round:\n\n| scenario | {} |\n",
            names.join(" | ")
        );
        text += &format!("|---|{}\n", "---|".repeat(names.len()));
    }
    for line in loads {
        let cells: Vec<String> =
            line.figures.iter().map(|figures| throughput(figures, &line.figures[0])).collect();
        text += &format!("| {} | {} |\n", line.scenario.name, cells.join(" | "));
    }
    let failed: Vec<String> = lines.iter().flat_map(|line| failures(names, line)).collect();
    text + &failed.concat()
}

fn failures(names: &[&str], line: &Line) -> Vec<String> {
    let each = names.iter().zip(&line.figures).filter_map(|(name, figures)| {
        let failed: u64 = figures.iter().map(|figure| figure.failed).sum();
        let bound = figures.iter().any(|figure| figure.client_bound);
        let note = match (failed, bound) {
            (0, false) => return None,
            (0, true) => "the client was the bottleneck".to_owned(),
            (failed, _) => format!("{failed} failed"),
        };
        Some(format!("\n{}, {name}: {note}", line.scenario.name))
    });
    each.collect()
}

fn met(value: Option<f64>, goal: f64) -> &'static str {
    match value {
        Some(value) if goal.is_finite() => {
            if value <= goal {
                "yes"
            } else {
                "no"
            }
        }
        _ => "-",
    }
}

/// The median, and least and most where there are several.
fn cell(figures: &[Figure]) -> String {
    let values = sorted(figures.iter().filter_map(|figure| figure.value).collect());
    let (Some(first), Some(last)) = (values.first(), values.last()) else { return "-".to_owned() };
    let middle = number(values[values.len() / 2]);
    let spread =
        if values.len() > 1 { format!(" ({} to {})", number(*first), number(*last)) } else { String::new() };
    let left = figures.iter().find_map(|figure| figure.left);
    let left = left.map(|left| format!(", {} left after", number(left)));
    format!("{middle}{spread}{}", left.unwrap_or_default())
}

fn throughput(figures: &[Figure], none: &[Figure]) -> String {
    let rates = sorted(figures.iter().filter_map(|figure| figure.per_second).collect());
    let Some(rate) = rates.get(rates.len() / 2) else { return "-".to_owned() };
    let shares =
        figures.iter().zip(none).filter_map(|(figure, none)| Some(figure.per_second? / none.per_second?));
    let shares = sorted(shares.collect());
    let share = shares.get(shares.len() / 2).map_or("-".to_owned(), |share| format!("{share:.3}"));
    format!("{rate:.0}, {share}")
}

fn median(figures: &[Figure]) -> Option<f64> {
    let values = sorted(figures.iter().filter_map(|figure| figure.value).collect());
    values.get(values.len() / 2).copied()
}

fn sorted(mut values: Vec<f64>) -> Vec<f64> {
    values.sort_by(f64::total_cmp);
    values
}

/// Three digits that count.
fn number(value: f64) -> String {
    match value.abs() {
        large if large >= 100.0 => format!("{value:.0}"),
        middle if middle >= 10.0 => format!("{value:.1}"),
        _ => format!("{value:.2}"),
    }
}

/// Every figure of every round.
pub fn json(names: &[&str], lines: &[Line]) -> Value {
    let lines = lines.iter().map(|line| {
        let each = names.iter().zip(&line.figures).map(|(name, figures)| {
            let figures = figures.iter().map(|figure| {
                json!({
                    "value": figure.value, "per_second": figure.per_second, "left": figure.left,
                    "failed": figure.failed,
                })
            });
            ((*name).to_owned(), figures.collect::<Value>())
        });
        let goal = [line.scenario.goal.0, line.scenario.goal.1].map(|goal| goal.is_finite().then_some(goal));
        json!({
            "scenario": line.scenario.name,
            "unit": line.scenario.unit,
            "goal_pd": goal[0],
            "goal_plain": goal[1],
            "gateways": each.collect::<serde_json::Map<String, Value>>(),
        })
    });
    json!({ "lines": lines.collect::<Value>() })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::scenarios::SCENARIOS;

    #[test]
    fn a_table_has_medians_ratios_goals_and_what_failed() {
        let figure = |value: f64, per_second: f64| Figure {
            value: Some(value),
            per_second: Some(per_second),
            ..Figure::default()
        };
        let none = Figure { per_second: Some(2000.0), ..Figure::default() };
        let scenario =
            SCENARIOS.iter().find(|scenario| scenario.name == "short, 128 at once").expect("a line");
        let mut figures = vec![
            vec![none; 3],
            vec![figure(25.0, 1000.0), figure(20.0, 1100.0), figure(30.0, 900.0)],
            vec![figure(150.0, 100.0), figure(151.0, 120.0), figure(149.0, 110.0)],
            vec![figure(90.0, 150.0); 3],
        ];
        figures[3][1].failed = 2;
        let names = ["no gateway", "nginx", "tandem PD", "tandem plain"];
        let lines = [Line { scenario, figures }];
        let text = text(&names, &lines);
        let row = "| short, 128 at once | CPU µs per request | - | 25.0 (20.0 to 30.0) | 150 (149 to 151) | 90.0 (90.0 to \
                   90.0) | 6.00 | 140, 100 | no, yes |";
        assert!(text.contains(row), "{text}");
        assert!(
            text.contains("| short, 128 at once | 2000, 1.000 | 1000, 0.500 | 110, 0.055 | 150, 0.075 |"),
            "{text}"
        );
        assert!(text.contains("tandem plain: 2 failed"), "{text}");
        let json = json(&names, &lines);
        assert_eq!(json["lines"][0]["gateways"]["nginx"][1]["value"], 20.0);
        assert_eq!(json["lines"][0]["goal_pd"], 140.0);
    }
}
